"""ORM and PRM: Monte-Carlo step labels, training, held-out quality, scoring.

    label   sample solutions with the policy, split them into steps, and let a completer finish each prefix p(k) several
            times. A step's soft label is the share of right answers among them (Math-Shepherd, arXiv 2312.08935); its
            hard label is 1 if there was any. The last step of a finished answer is labelled by its correctness.
            One JSONL line a solution, written as they come; a second call continues where the first stopped.
    train   a causal LM with a scalar head, by binary cross-entropy: PRM at the last token of each step, ORM at the last
            token of the solution.
    test    AUROC, accuracy and calibration on the solutions of questions that were held out from training.

train.py calls `make_labels`, `train_reward_model`, `score_steps` and `score_outcomes`; the stages apart:

    python prm.py label --model DIR --data gsm8k --out labels.jsonl
    python prm.py train --model DIR --labels-file labels.jsonl --kind prm --out prm/
    python prm.py test  --model prm/ --labels-file labels.jsonl --kind prm

Left out: published PRMs and their formats, other label sources, sharing a prefix's cache among its completions.
"""

import json
import random
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser

from data import Problem, UserError, decode, encode_prompts, load_problems, oracle, run_script, step_ends, token_ends
from grader import grade
from model import ScalarModel, all_reduce, eos_ids, gather, load_causal_lm, load_tokenizer, optimizer_step, start_processes
from rollout import Batch, rollout


@dataclass
class LabelOptions:
    problems: int = field(default=1000, metadata={"help": "questions to sample solutions for"})
    samples: int = field(default=1, metadata={"help": "solutions per question"})
    completions: int = field(default=4, metadata={"help": "completions per step prefix"})
    prompt: str = field(default="{question}\n", metadata={"help": "prompt where the tokenizer has no chat template"})
    separator: str = field(default="\n", metadata={"help": "what stands between two steps"})
    max_prompt_tokens: int = field(default=1024, metadata={"help": "longest prompt that is accepted"})
    max_new_tokens: int = field(default=1024, metadata={"help": "longest response; a longer one is truncated"})
    temperature: float = field(default=1.0, metadata={"help": "of solutions and completions"})
    slots: int = field(default=256, metadata={"help": "answers that decode at once"})
    seed: int = field(default=0, metadata={"help": "random seed"})


# ------------------------------------------------------------------------------------------------ labels


def make_labels(policy, completer, tokenizer, problems: list[Problem], options: LabelOptions, path: Path, rank=0, world=1):
    """Write one line per solution to `path`: question, answer, response, ids, truncated, correct, ends (K,) and labels
    (K,): the share of right completions of each prefix. Continues a file of the same options; refuses another's."""
    o, eos = options, eos_ids(policy, tokenizer)
    problems = problems[: o.problems]
    prompts = encode_prompts(tokenizer, problems, o.prompt, o.max_prompt_tokens)
    done = continue_labels(path, {**asdict(o), "questions": fingerprint(problems)}, o.samples) if rank == 0 else 0
    done = int(all_reduce(torch.tensor(done if rank == 0 else 0)))
    sampler = dict(eos_ids=eos, temperature=o.temperature, slots=o.slots)
    bar = tqdm(total=len(problems), initial=done, desc="labels", unit="question", disable=rank > 0)
    right = steps = 0
    for start in range(done, len(problems), 256):
        mine = range(start + rank, min(start + 256, len(problems)), world)
        seeds = [o.seed * 1_000_003 + 2 * i for i in mine]
        solutions = rollout(policy, [prompts[i] for i in mine], o.samples, max_new_tokens=o.max_new_tokens, seeds=seeds, **sampler)
        rows, prefixes, limits, where = [], [], [], []
        for i, samples in zip(mine, solutions):
            for s in samples:
                text, ends = decode(tokenizer, s.ids), step_ends(tokenizer, s.ids, o.separator, s.truncated)
                correct = not s.truncated and grade(problems[i].answer, text)
                rows.append(dict(index=i, question=problems[i].question, answer=problems[i].answer, response=text, ids=s.ids,
                                 truncated=s.truncated, correct=correct, ends=ends, labels=[0.0] * len(ends)))  # fmt: skip
                for k, end in enumerate(ends):
                    if end == len(s.ids) - 1 and not s.truncated:
                        rows[-1]["labels"][k] = float(correct)
                    elif end + 1 < o.max_new_tokens:
                        prefixes.append(prompts[i] + s.ids[: end + 1])
                        limits.append(o.max_new_tokens - end - 1)
                        where.append((len(rows) - 1, k))
        completions = rollout(completer, prefixes, o.completions, max_new_tokens=limits or 1,
                              seeds=[zlib.crc32(repr((o.seed, p)).encode()) for p in prefixes], **sampler)  # fmt: skip
        for (r, k), samples in zip(where, completions):
            row, hits = rows[r], 0
            for s in samples:
                hits += not s.truncated and grade(row["answer"], decode(tokenizer, row["ids"][: row["ends"][k] + 1] + s.ids))
            row["labels"][k] = hits / o.completions
        rows = sorted(gather(rows), key=lambda row: row["index"])
        if rank == 0:
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
        right, steps = right + sum(sum(r["labels"]) for r in rows), steps + sum(len(r["labels"]) for r in rows)
        bar.update(min(256, len(problems) - start))
        bar.set_postfix(steps=steps, label_mean=f"{right / max(steps, 1):.2f}")
    bar.close()


def fingerprint(problems: list[Problem]) -> int:
    return zlib.crc32(repr([(p.question, p.answer) for p in problems]).encode())


def continue_labels(path: Path, settings: dict, samples: int) -> int:
    """How many questions the label file holds completely; a line or a question cut off by a kill is removed."""
    sidecar = path.with_suffix(".settings.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and sidecar.exists():
        old = json.loads(sidecar.read_text())
        changed = [f"{k} {old.get(k)} -> {v}" for k, v in settings.items() if old.get(k) != v]
        if changed:
            raise UserError(f"{path} was made with other settings ({', '.join(changed)}); remove it or choose another --out")
    sidecar.write_text(json.dumps(settings))
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    lines = lines[: len(lines) // samples * samples]
    path.write_bytes(b"".join(lines))
    return len(lines) // samples


def read_labels(path: str | Path) -> list[dict]:
    """Raises UserError for a missing or malformed label file."""
    from data import read_jsonl

    if not Path(path).is_file():
        raise UserError(f"{path}: no such label file; make one with `python prm.py label`")
    rows = [row for _, row in read_jsonl(Path(path))]
    if not rows:
        raise UserError(f"{path}: holds no labels")
    if missing := {"question", "ids", "truncated", "correct", "ends", "labels"} - rows[0].keys():
        raise UserError(f"{path}: not a label file of prm.py (no field {', '.join(sorted(missing))})")
    return rows


# ------------------------------------------------------------------------------------------------ training


@dataclass
class TrainOptions:
    kind: str = field(default="prm", metadata={"help": "prm or orm", "choices": ["prm", "orm"]})
    labels: str = field(default="hard", metadata={"help": "hard: any completion right; soft: their share", "choices": ["hard", "soft"]})
    epochs: int = field(default=2, metadata={"help": "passes over the labelled solutions"})
    lr: float = field(default=1e-5, metadata={"help": "learning rate of the LM; linear warmup and decay"})
    head_lr: float = field(default=1e-3, metadata={"help": "learning rate of the scalar head, which starts at zero"})
    batch_size: int = field(default=64, metadata={"help": "solutions per optimizer step"})
    likelihood: bool = field(default=False, metadata={"help": "let the head read the LM's own lowest log-probability"})


def held_out(question: str) -> bool:
    """One question in ten is kept for testing, whatever file it stands in."""
    return zlib.crc32(question.encode()) % 10 == 9


def to_batch(rows: list[dict], tokenizer, prompt: str, max_prompt_tokens: int = 1 << 30) -> Batch:
    problems = [Problem(row["question"], "") for row in rows]
    prompts = encode_prompts(tokenizer, problems, prompt, max_prompt_tokens)
    return Batch(prompts, [row["ids"] for row in rows], torch.tensor([row["truncated"] for row in rows]))


def targets(rows: list[dict], kind: str, labels: str) -> list[list[tuple[int, float]]]:
    """For each solution the tokens that carry a label, and the label: step ends for a PRM, the last token for an ORM."""
    if kind == "orm":
        return [[(len(row["ids"]) - 1, float(row["correct"]))] for row in rows]
    value = (lambda x: float(x > 0)) if labels == "hard" else float
    return [[(end, value(label)) for end, label in zip(row["ends"], row["labels"])] for row in rows]


def train_reward_model(
    lm, tokenizer, rows: list[dict], options: TrainOptions, *, prompt: str, token_budget: int = 16384, seed: int = 0,
    rank: int = 0, world: int = 1,
) -> ScalarModel:  # fmt: skip
    """Train on the rows whose questions are not held out. lm becomes part of the model. Raises UserError if no row has a
    step."""
    o = options
    model = ScalarModel(lm, o.likelihood).train(False)
    rows = [row for row in rows if not held_out(row["question"])]
    marks = targets(rows, o.kind, o.labels)
    batch = to_batch(rows, tokenizer, prompt)
    usable = [i for i, m in enumerate(marks) if m]
    if not usable:
        raise UserError(f"none of the {len(rows)} labelled solutions has a complete step: nothing to train the {o.kind} on")
    positive = sum(y > 0.5 for m in marks for _, y in m) / sum(len(m) for m in marks)
    if rank == 0 and not 0 < positive < 1:
        print(f"warning: every {o.kind} label is {positive:.0f}, so its scores will tell nothing apart")
    target, weight = torch.zeros(batch.mask.shape), torch.zeros(batch.mask.shape)
    for i, m in enumerate(marks):
        for t, y in m:
            target[i, t], weight[i, t] = y, 1
    groups = [{"params": model.lm.parameters(), "lr": o.lr}, {"params": model.head.parameters(), "lr": o.head_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    total = o.epochs * -(-len(usable) // o.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 20, 1) * (1 - s / total))
    bar = tqdm(total=total, desc=f"train {o.kind}", unit="step", disable=rank > 0)
    rng, device, average = random.Random(seed), lm.device, None
    for _ in range(o.epochs):
        rng.shuffle(usable)
        for start in range(0, len(usable), o.batch_size):
            step = usable[start : start + o.batch_size]
            count, loss = weight[step].sum().item(), torch.zeros(())
            for micro in batch.plan(step[rank::world], token_budget):
                packed, keep, _ = batch.pack(micro, device)
                w, y = (x[micro][batch.mask[micro]].to(device) for x in (weight, target))
                part = (F.binary_cross_entropy_with_logits(model(packed)[keep + 1], y, reduction="none") * w).sum() / count
                part.backward()
                loss += part.detach().cpu()
            optimizer_step(model, [optimizer], 1.0)
            schedule.step()
            loss = all_reduce(loss).item()
            average = loss if average is None else 0.9 * average + 0.1 * loss
            bar.update()
            bar.set_postfix(loss=f"{average:.3f}")
    bar.close()
    return model


# ------------------------------------------------------------------------------------------------ scoring


def score_tokens(model: ScalarModel, batch: Batch, plan: list[list[int]], device) -> Tensor:
    """Probability of "correct so far" at each response token (B, T), float32."""
    return batch.map(lambda rows, packed, keep, _: torch.sigmoid(model(packed)[keep + 1]), plan, device)


def pad_steps(ends: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Step ends of B responses as (B, K), and the mask of the steps that each has. A score may be exactly 0, so only the
    mask says where a step is."""
    K = max(map(len, ends), default=0)
    step_ends = torch.tensor([e + [0] * (K - len(e)) for e in ends], dtype=torch.long).view(len(ends), K)
    return step_ends, torch.arange(K) < torch.tensor([len(e) for e in ends], dtype=torch.long)[:, None]


def score_steps(model: ScalarModel, batch: Batch, ends: Tensor, plan: list[list[int]], device) -> Tensor:
    """Process scores s (B, K): the PRM at the last token of each step; ends (B, K) as from `pad_steps`."""
    return score_tokens(model, batch, plan, device).gather(1, ends)


def score_outcomes(model: ScalarModel, batch: Batch, plan: list[list[int]], device) -> Tensor:
    """Outcome scores (B,): the ORM at the last token."""
    last = (batch.mask.sum(1) - 1)[:, None]
    return score_tokens(model, batch, plan, device).gather(1, last).squeeze(1)


# ------------------------------------------------------------------------------------------------ quality


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Probability that a positive (label > 0.5) scores above a negative, ties counted half; nan if a class is missing."""
    positive = labels > 0.5
    values, inverse, counts = scores.unique(return_inverse=True, return_counts=True)  # sorted
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()  # ties share their mean rank
    n1, n0 = int(positive.sum()), int((~positive).sum())
    return ((ranks[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0)).item() if n1 and n0 else float("nan")


def quality(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """scores, labels (M,): AUROC, accuracy at 0.5, Brier score, and expected calibration error over ten bins."""
    hard = (labels > 0.5).float()
    bins = (scores * 10).long().clamp(0, 9)
    error = sum(
        (bins == b).float().mean() * (scores[bins == b].mean() - labels[bins == b].mean()).abs() for b in bins.unique()
    )
    return {
        "auroc": auroc(scores, labels),
        "accuracy": ((scores > 0.5).float() == hard).float().mean().item(),
        "brier": ((scores - labels) ** 2).mean().item(),
        "ece": float(error),
        "positive": hard.mean().item(),
        "count": len(labels),
    }


def test_reward_model(model, tokenizer, rows: list[dict], options: TrainOptions, *, prompt: str, toy: bool = False) -> dict:
    """Quality on held-out questions against the labels, and in the embedded world against the exact oracle as well."""
    rows = [row for row in rows if held_out(row["question"])]
    marks = targets(rows, options.kind, options.labels)
    if not any(marks):
        return {}
    batch = to_batch(rows, tokenizer, prompt)
    device = model.lm.device
    scores = score_tokens(model, batch, batch.plan(range(len(rows)), 16384), device)
    flat = torch.tensor([scores[i, t] for i, m in enumerate(marks) for t, _ in m])
    result = quality(flat, torch.tensor([y for m in marks for _, y in m]))
    if toy and options.kind == "prm":
        exact = [x for row in rows for x in oracle(row["question"], row["response"])[: len(row["ends"])]]
        result["auroc_oracle"] = auroc(flat, torch.tensor(exact, dtype=torch.float))
    return result
