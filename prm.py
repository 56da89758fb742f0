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

import argparse
import hashlib
import json
import random
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser

from data import (
    Problem, TextOptions, UserError, decode, encode_prompts, is_toy, load_problems, option, oracle, read_jsonl,
    run_script, step_ends,
)  # fmt: skip
from grader import grade
from model import (
    NonFinite, ScalarModel, all_reduce, barrier, checkpoint_layers, eos_ids, gather, load_causal_lm, load_tokenizer, lock,
    optimizer_step, same_tokenizer, shard, start_processes, watching,
)  # fmt: skip
from rollout import Batch, as_sampler, rollout


@dataclass
class LabelOptions(TextOptions):
    problems: int = option(1000, "questions to sample solutions for")
    samples: int = option(1, "solutions per question")
    completions: int = option(4, "completions per step prefix")
    temperature: float = option(1.0, "of solutions and completions")
    slots: int = option(256, "answers that decode at once")
    seed: int = option(0, "random seed")


@dataclass
class TrainOptions:
    kind: str = option("prm", "prm or orm", choices=["prm", "orm"])
    labels: str = option("hard", "hard: any completion right; soft: the share of right ones", choices=["hard", "soft"])
    epochs: int = option(2, "passes over the labelled solutions")
    lr: float = option(1e-5, "learning rate of the LM; linear warmup and decay")
    head_lr: float = option(1e-3, "learning rate of the scalar head, which starts at zero")
    batch_size: int = option(64, "solutions per optimizer step")
    likelihood: bool = option(False, "let the head read the LM's own lowest log-probability, see model.ScalarModel")


# ------------------------------------------------------------------------------------------------ labels


CHUNK = 256  # questions between two writes


def make_labels(
    policy, completer, tokenizer, problems: list[Problem], options: LabelOptions, path: Path, rank: int = 0, world: int = 1
) -> None:
    """Write one line per solution to `path`: question, answer, response, ids, truncated, correct, ends (K,) and labels
    (K,): the share of right completions of each prefix. Continues a file of the same options; refuses another's."""
    o, eos = options, eos_ids(policy, tokenizer)
    problems = problems[: o.problems]
    prompts = encode_prompts(tokenizer, problems, o.prompt, o.max_prompt_tokens)
    done = continue_labels(path, {**asdict(o), "questions": fingerprint(problems)}, o.samples) if rank == 0 else 0
    done = int(all_reduce(torch.tensor(done)))
    sampler = dict(eos_ids=eos, temperature=o.temperature, slots=o.slots)
    same = completer is policy
    policy = as_sampler(policy)  # which keeps its cache from chunk to chunk
    completer = policy if same else as_sampler(completer)
    bar = tqdm(total=len(problems), initial=done, desc="labels", unit="question", disable=rank > 0)
    total = steps = 0
    for start in range(done, len(problems), CHUNK):
        mine = range(start + rank, min(start + CHUNK, len(problems)), world)
        solutions = rollout(
            policy, [prompts[i] for i in mine], o.samples, max_new_tokens=o.max_new_tokens,
            seeds=[o.seed * 1_000_003 + i for i in mine], **sampler,
        )  # fmt: skip
        rows = [
            {"index": i, "question": problems[i].question, "answer": problems[i].answer, **solution_row(tokenizer, s, o)}
            for i, samples in zip(mine, solutions)
            for s in samples
        ]
        label_steps(completer, tokenizer, rows, {i: prompts[i] for i in mine}, o, sampler)
        rows = sorted(gather(rows), key=lambda row: row["index"])
        if rank == 0:
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
        total, steps = total + sum(sum(r["labels"]) for r in rows), steps + sum(len(r["labels"]) for r in rows)
        bar.update(min(CHUNK, len(problems) - start))
        bar.set_postfix(steps=steps, mean_label=f"{total / max(steps, 1):.2f}")
    bar.close()


def solution_row(tokenizer, s, o: LabelOptions) -> dict:
    ends = step_ends(tokenizer, s.ids, o.separator, s.truncated)
    return {"response": decode(tokenizer, s.ids), "ids": s.ids, "truncated": s.truncated, "ends": ends}


def label_steps(completer, tokenizer, rows: list[dict], prompts: dict, o: LabelOptions, sampler: dict) -> None:
    """Add "correct" and "labels" to the rows. A prefix that leaves no room to answer within the limit is labelled 0."""
    prefixes, limits, places = [], [], []
    for row in rows:
        row["correct"] = not row["truncated"] and grade(row["answer"], row["response"])
        row["labels"] = [0.0] * len(row["ends"])
        for k, end in enumerate(row["ends"]):
            if end == len(row["ids"]) - 1 and not row["truncated"]:
                row["labels"][k] = float(row["correct"])
            elif end + 1 < o.max_new_tokens:
                prefixes.append(prompts[row["index"]] + row["ids"][: end + 1])
                limits.append(o.max_new_tokens - end - 1)
                places.append((row, k))
    seeds = [zlib.crc32(repr((o.seed, prefix)).encode()) for prefix in prefixes]
    completions = rollout(completer, prefixes, o.completions, max_new_tokens=limits, seeds=seeds, **sampler)
    for (row, k), samples in zip(places, completions):
        start = row["ids"][: row["ends"][k] + 1]
        right = [not s.truncated and grade(row["answer"], decode(tokenizer, start + s.ids)) for s in samples]
        row["labels"][k] = sum(right) / len(right)


def fingerprint(problems: list[Problem]) -> int:
    return zlib.crc32(repr([(p.question, p.answer) for p in problems]).encode())


def continue_labels(path: Path, settings: dict, samples: int) -> int:
    """How many questions the label file holds completely; a line or a question cut off by a kill is removed."""
    sidecar = path.with_suffix(".settings.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size and not sidecar.exists():
        raise UserError(f"{path} exists and is no label file of this program: choose another --out")
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
    if not Path(path).is_file():
        raise UserError(f"{path}: no such label file; make one with `python prm.py label`")
    rows = [row for _, row in read_jsonl(Path(path))]
    if not rows:
        raise UserError(f"{path}: holds no labels")
    if missing := {"question", "ids", "truncated", "correct", "ends", "labels"} - rows[0].keys():
        raise UserError(f"{path}: not a label file of prm.py (no field {', '.join(sorted(missing))})")
    return rows


# ------------------------------------------------------------------------------------------------ training


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
    model: ScalarModel, tokenizer, rows: list[dict], options: TrainOptions, *, prompt: str, device="cpu",
    token_budget: int = 16384, seed: int = 0, rank: int = 0, world: int = 1,
) -> None:  # fmt: skip
    """Train on the rows whose questions are not held out. Raises UserError if no row has a step, or if the gradients stop
    being finite."""
    o = options
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
    learning = [p for p in model.lm.parameters() if p.requires_grad]
    groups = [{"params": learning, "lr": o.lr}, {"params": model.head.parameters(), "lr": o.head_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    total = o.epochs * -(-len(usable) // o.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 20, 1) * (1 - s / total))
    bar = tqdm(total=total, desc=f"train {o.kind}", unit="step", disable=rank > 0)
    rng, average = random.Random(seed), None
    for _ in range(o.epochs):
        rng.shuffle(usable)
        for start in range(0, len(usable), o.batch_size):
            step = usable[start : start + o.batch_size]
            count, loss = weight[step].sum().item(), torch.zeros(())
            for micro in batch.plans([step[rank::world]], token_budget)[0]:
                packed, keep, _ = batch.pack(micro, device)
                w, y = (x[micro][batch.mask[micro]].to(device) for x in (weight, target))
                part = (F.binary_cross_entropy_with_logits(model(packed)[keep + 1], y, reduction="none") * w).sum() / count
                part.backward()
                loss += part.detach().cpu()
            try:
                optimizer_step(model, [optimizer], 1.0)
            except NonFinite as error:
                raise UserError(f"training the {o.kind}: {error}; lower --rm-lr, or --lr in prm.py") from None
            schedule.step()
            loss = all_reduce(loss).item()
            average = loss if average is None else 0.9 * average + 0.1 * loss
            bar.update()
            bar.set_postfix(loss=f"{average:.3f}")
    bar.close()


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


def evaluate_reward_model(
    model, tokenizer, rows: list[dict], options: TrainOptions, *, prompt: str, device="cpu", token_budget: int = 16384,
    rank: int = 0, world: int = 1,
) -> dict[str, float]:  # fmt: skip
    """Quality on held-out questions against the labels; of a PRM in the embedded world against the exact oracle too."""
    rows = [row for row in rows if held_out(row["question"])]
    marks = targets(rows, options.kind, options.labels)
    if not any(marks):
        return {}
    batch, mine = to_batch(rows, tokenizer, prompt), list(range(rank, len(rows), world))
    scores = score_tokens(model, batch, batch.plans([mine], token_budget)[0], device)
    flat = dict(gather([(i, [scores[i, t].item() for t, _ in marks[i]]) for i in mine]))
    flat = torch.tensor([score for i in range(len(rows)) for score in flat[i]])
    result = quality(flat, torch.tensor([y for m in marks for _, y in m]))
    if options.kind == "prm" and all(is_toy(row["question"]) for row in rows):
        exact = [x for row in rows for x in oracle(row["question"], row["response"])[: len(row["ends"])]]
        result["auroc_oracle"] = auroc(flat, torch.tensor(exact, dtype=torch.float))
    return {k: v for k, v in result.items() if v == v}  # no AUROC (nan) where only one class occurs


# ------------------------------------------------------------------------------------------------ made once


def cached(cache: Path, what: str, title: str, key: dict, make, rank: int = 0) -> Path:
    """A folder under `cache`, named by everything that it depends on. make(folder) fills it if it is not there; it gets
    its name when it is complete, and what a stopped call left behind is handed to the next."""
    folder = cache / f"{what}-{hashlib.sha1(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]}"
    partial = folder.with_suffix(".partial")
    held = None if rank or folder.exists() else lock(partial / "lock", wait=True)  # two runs that start at once make it once
    exists = all_reduce(torch.tensor(float(rank == 0 and folder.exists()))).item()  # rank 0's view is everyone's
    if rank == 0:
        print(f"{title}: {'cached in' if exists else 'making'} {folder}", flush=True)
    if not exists:
        make(partial)
        barrier()
        if rank == 0:
            (partial / "key.json").write_text(json.dumps(key, indent=1))
            partial.rename(folder)
        barrier()
    if held:
        held.close()
    return folder


def identity(path: str) -> str:
    """What a cache was made from. For local files also their times of change, so that a new model is a new key."""
    p = Path(path)
    files = sorted(p.glob("*.safetensors")) if p.is_dir() else [p] if p.is_file() else []
    return " ".join([str(p.resolve()) if files else path, *(str(f.stat().st_mtime_ns) for f in files)])


def prepare_reward_model(
    cache: Path, model: str, completer: str, data: str, problems, label_options: LabelOptions, train_options: TrainOptions,
    *, dtype=torch.float32, device="cpu", rank: int = 0, world: int = 1, token_budget: int = 16384,
    checkpointed: bool = False,
) -> str:  # fmt: skip
    """Labels, then a reward model trained on them from the completer's weights, each made once; the model's folder.

    problems() gives the questions; it is called only if the labels are not there yet. token_budget: packed tokens of a
    micro-batch of the training; checkpointed: it recomputes its activations."""
    key = {"model": identity(model), "completer": identity(completer), "data": identity(data), **asdict(label_options)}
    tokenizer = load_tokenizer(model)

    def label(folder):
        policy = load_causal_lm(model, dtype, device)
        other = policy if completer == model else load_causal_lm(completer, dtype, device)
        make_labels(policy, other, tokenizer, problems(), label_options, folder / "labels.jsonl", rank, world)

    def train(folder):
        rows = read_labels(labels / "labels.jsonl")
        model = shard(lambda home: new_reward_model(completer, train_options, home), dtype, device)
        if checkpointed:
            checkpoint_layers(model)
        where = dict(prompt=label_options.prompt, device=device, rank=rank, world=world, token_budget=token_budget)
        train_reward_model(model, tokenizer, rows, train_options, seed=label_options.seed, **where)
        quality = evaluate_reward_model(model, tokenizer, rows, train_options, **where)
        model.save(tokenizer, folder, rank)
        if rank == 0:
            (folder / "quality.json").write_text(json.dumps(quality, indent=1))

    same_tokenizer(tokenizer, completer)
    o, kind = label_options, train_options.kind
    title = f"labels of {o.problems} questions, {o.completions} completions a step"
    labels = cached(cache, "labels", title, key, label, rank)
    folder = cached(cache, kind, f"{kind} on these labels", {**key, **asdict(train_options)}, train, rank)
    if rank == 0:
        print_quality(json.loads((folder / "quality.json").read_text()))
    return str(folder)


def new_reward_model(path: str, options: TrainOptions, device) -> ScalarModel:
    return ScalarModel(load_causal_lm(path, device=device), options.likelihood).eval()


def print_quality(quality: dict[str, float]) -> None:
    figures = ", ".join(f"{k} {v:.3g}" for k, v in quality.items())
    print(f"  on held-out questions: {figures or 'none are labelled'}", flush=True)


# ------------------------------------------------------------------------------------------------ the script


@dataclass
class Options:
    model: str = option("", "label: the policy; train: the LM to start from; test: the reward model's folder")
    completer: str = option("", "label: the model that completes prefixes; empty: the policy")
    data: str = option("", "label: problems by name or file, see data.py")
    labels_file: str = option("", "train, test: what `label` wrote")
    out: str = option("", "label: the JSONL file to write; train: the folder to write")


def main() -> None:
    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        """Keep the lines of the description, show the defaults."""

    parser = HfArgumentParser(
        (Options, LabelOptions, TrainOptions), usage="python prm.py label|train|test [--OPTION VALUE ...]",
        description=__doc__.split("train.py calls")[0], formatter_class=Formatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("stage", choices=["label", "train", "test"])
    given = vars(parser.parse_args())
    stage = given.pop("stage")
    o, label_options, train_options = (
        cls(**{f.name: given[f.name] for f in fields(cls)}) for cls in (Options, LabelOptions, TrainOptions)
    )
    needed = {"label": ("model", "data", "out"), "train": ("model", "labels_file", "out"), "test": ("model", "labels_file")}
    for name in needed[stage]:
        if not getattr(o, name):
            raise UserError(f"{stage} needs --{name.replace('_', '-')}, see python prm.py --help")
    rank, world, device = start_processes()
    with watching(rank, world):
        run_stage(stage, o, label_options, train_options, rank, world, device)


def run_stage(stage: str, o: Options, label_options: LabelOptions, train_options: TrainOptions, rank, world, device) -> None:
    tokenizer, prompt = load_tokenizer(o.model), label_options.prompt
    if stage == "label":
        problems = load_problems(o.data, "train", label_options.problems)
        policy = completer = load_causal_lm(o.model, device=device)
        if o.completer:
            same_tokenizer(tokenizer, o.completer)
            completer = load_causal_lm(o.completer, device=device)
        make_labels(policy, completer, tokenizer, problems, label_options, Path(o.out), rank, world)
        return
    rows = read_labels(o.labels_file)
    make = (lambda home: new_reward_model(o.model, train_options, home)) if stage == "train" else (
        lambda home: ScalarModel.load(o.model, device=home))  # fmt: skip
    model, where = shard(make, torch.float32, device), dict(prompt=prompt, device=device, rank=rank, world=world)
    if stage == "train":
        train_reward_model(model, tokenizer, rows, train_options, seed=label_options.seed, **where)
        model.save(tokenizer, o.out, rank)
    quality = evaluate_reward_model(model, tokenizer, rows, train_options, **where)
    if rank == 0:
        print_quality(quality)


if __name__ == "__main__":
    run_script(main)
