"""ORM and PRM: Monte-Carlo step labels, training, published models and their formats, scoring, held-out quality.

    label   sample solutions with the policy, split them into steps, and let a completer finish each prefix p(k) several
            times. A step's soft label is the share of right answers among them (Math-Shepherd, arXiv 2312.08935); its
            hard label is 1 if there was any, and sampling stops there. The last step of a finished answer is labelled by
            its correctness. One JSONL line a solution; a second call continues where the first stopped.
    train   a causal LM with a scalar head, by binary cross-entropy: PRM at the last token of each step, ORM at the last
            token of the solution. On labels made here, or by others: Math-Shepherd, PRM800K, TRL's stepwise format.
    test    AUROC, accuracy and calibration on the solutions of questions that were held out from training.

A published PRM is one row of `FORMATS`: how it wants its text, and which of its weights make the logit of "correct".

train.py calls `prepare_reward_model`, `Reader` and `score_steps`; the stages apart:

    python prm.py label --model DIR --data gsm8k --out labels.jsonl
    python prm.py train --model DIR --labels-file labels.jsonl --kind prm --out prm/
    python prm.py test  --model prm/ --labels-file labels.jsonl --kind prm

Left out: labels by tree search or by binary search for the first error, training of the published formats.
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import shutil
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import accumulate, zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer, HfArgumentParser, LlamaTokenizer

from data import (
    SYSTEM, Problem, TextOptions, UserError, append, decode, draw, encode_prompts, encode_steps, find_steps, is_toy,
    load_mixture, mixture, option, oracle_at, read_rows, run_script, whole_lines, write,
)  # fmt: skip
from grader import grade
from model import (
    DTYPES, NonFinite, ScalarModel, all_reduce, barrier, checkpoint_layers, eos_ids, gather, load_causal_lm, load_config,
    load_tokenizer, lock, on_rank_0, optimizer_step, read_tensors, shard, start_processes, watching, without_head,
)  # fmt: skip
from rollout import Batch, as_sampler, rollout


@dataclass
class LabelOptions(TextOptions):
    problems: int = option(1000, "questions to sample solutions for")
    samples: int = option(1, "solutions per question")
    completions: int = option(4, "completions per step prefix, at most")
    labels: str = option("hard", "hard: any completion right; soft: the share of right ones; oracle: exact, and without "
                         "completions, of an embedded world", choices=["hard", "soft", "oracle"])  # fmt: skip
    flip: float = option(0.0, "share of the step labels that are turned around, to see what noise does")
    temperature: float = option(1.0, "of solutions and completions")
    slots: int = option(256, "answers that decode at once")
    seed: int = option(0, "random seed")

    def __post_init__(self):
        super().__post_init__()
        if min(self.problems, self.samples, self.completions, self.slots) < 1 or self.temperature <= 0:
            raise UserError("--problems, --samples, --completions, --slots and --temperature must be above 0")
        if not 0 <= self.flip <= 1:
            raise UserError("--flip is a share of the labels: give 0 to 1")


@dataclass
class TrainOptions:
    kind: str = option("prm", "prm or orm", choices=["prm", "orm"])
    epochs: int = option(2, "passes over the labelled solutions")
    lr: float = option(1e-5, "learning rate of the LM; linear warmup and decay")
    head_lr: float = option(1e-3, "learning rate of the scalar head, which starts at zero")
    batch_size: int = option(64, "solutions per optimizer step")
    likelihood: bool = option(False, "let the head read the LM's own lowest log-probability, see model.ScalarModel")


# ------------------------------------------------------------------------------------------------ labels


def audited(question: str) -> bool:
    """One question in sixteen gets all completions of each prefix, to see how well two halves of them agree."""
    return zlib.crc32(b"audit" + question.encode()) % 16 == 0


def complete(completer, tokenizer, prefixes: list[tuple], problems: list[Problem], o: LabelOptions, **sampler) -> list[list]:
    """For each prefix (ids, limit, index of its problem, text) which of its completions were right.

    A hard label is decided by the first right completion, and no more are sampled; but a few questions get all of them,
    see `audited`. A prefix is prefilled once for all completions that begin together."""
    outcomes = [[] for _ in prefixes]

    def graded(j: int, samples: list) -> bool:
        _, _, i, text = prefixes[j]
        texts = [text + decode(tokenizer, s.ids) for s in samples]
        new = range(len(outcomes[j]), len(samples))
        outcomes[j] += [not samples[k].truncated and grade(problems[i].answer, texts[k]) for k in new]
        return any(outcomes[j]) and not audited(problems[i].question)

    found = rollout(
        completer, [prefix[0] for prefix in prefixes], o.completions, max_new_tokens=[prefix[1] for prefix in prefixes],
        seeds=[zlib.crc32(repr((o.seed, prefix[0])).encode()) for prefix in prefixes],
        decided=graded if o.labels == "hard" else None, **sampler,
    )  # fmt: skip
    for j, samples in enumerate(found):
        graded(j, samples)
    return outcomes


def describe(rows: list[dict], o: LabelOptions, prefixes: int, seconds: float) -> str:
    """What the labels look like: how many, how fast, their mean by step, and whether two halves agree."""
    labels = [label for row in rows for label in row["labels"]]
    columns = [[y for y in column if y is not None] for column in zip_longest(*(row["labels"] for row in rows))]
    means = " ".join(f"{sum(column) / len(column):.2f}" for column in columns[:20])
    half = o.completions // 2
    pairs = [
        (any(x[:half]), any(x[half : 2 * half]))
        for row in rows if o.labels == "soft" or audited(row["question"])
        for x in row["outcomes"] if half and len(x) == o.completions
    ]  # fmt: skip
    agreement = f"{sum(a == b for a, b in pairs) / max(len(pairs), 1):.2f} of {len(pairs)} prefixes"
    fast = f"{prefixes} prefixes now, {prefixes / seconds:.1f} a second; " if prefixes else ""
    return (
        f"  {len(labels)} steps of {len(rows)} solutions; {fast}mean label {sum(labels) / max(len(labels), 1):.2f}\n"
        f"  mean label of step 1, 2, ...: {means}"
        + (f"\n  hard labels of {half} and of {half} other completions agree in {agreement}" if o.labels != "oracle" else "")
    )


def fingerprint(problems: list[Problem]) -> int:
    return zlib.crc32(repr([(p.question, p.answer) for p in problems]).encode())


def make_labels(
    policy, completer, tokenizer, problems: list[Problem], options: LabelOptions, path: Path, rank: int = 0, world: int = 1,
    completer_tokenizer=None, made_by: dict | None = None,
) -> None:  # fmt: skip
    """Write one line per solution to `path`, and print what the labels look like. Continues a file of the same options and
    models (`made_by` names them); refuses another's. A completer with a tokenizer of its own reads the prefixes as text."""
    o, eos, reads = options, eos_ids(policy, tokenizer), completer_tokenizer or tokenizer
    problems = problems[: o.problems]
    if o.labels == "oracle" and (o.separator != "\n" or not all(is_toy(p.question) for p in problems)):
        raise UserError("--labels oracle: only of the embedded worlds' lines is it known what is right; choose hard or soft")
    prompts = encode_prompts(tokenizer, problems, o.prompt, o.max_prompt_tokens)
    own = reads.get_vocab() == tokenizer.get_vocab()
    starts = prompts if own else encode_prompts(reads, problems, o.prompt, 1 << 30)
    ends_completion = eos_ids(completer, reads)
    policy, completer = map(lru_cache(as_sampler), (policy, completer))  # which keep their caches from block to block
    sampler = dict(temperature=o.temperature, slots=o.slots)
    done, began, figures = [0, 0], time.perf_counter(), {}  # prefixes, completions

    def make(block: range) -> list[dict]:
        solutions = rollout(
            policy, [prompts[i] for i in block], o.samples, max_new_tokens=o.max_new_tokens, eos_ids=eos,
            seeds=[o.seed * 1_000_003 + i for i in block], **sampler,
        )  # fmt: skip
        rows, prefixes, places = [], [], []
        for i, samples in zip(block, solutions):
            for s in samples:
                text, cuts, ends = find_steps(tokenizer, s.ids, o.separator, s.truncated)
                row = {"index": i, "question": problems[i].question, "answer": problems[i].answer, "response": text}
                row |= {"truncated": s.truncated, "correct": not s.truncated and grade(problems[i].answer, text)}
                rows.append(row | {"cuts": cuts, "labels": [0.0] * len(cuts), "outcomes": [[] for _ in cuts]})
                if o.labels == "oracle":
                    rows[-1]["labels"] = [float(good) for good in oracle_at(problems[i].question, text, cuts)]
                    continue
                for k, (cut, end) in enumerate(zip(cuts, ends)):
                    ids = s.ids[: end + 1] if own else encode_steps(reads, text[:cut], [])[0]
                    if end == len(s.ids) - 1 and not s.truncated:
                        rows[-1]["labels"][k] = float(rows[-1]["correct"])
                    elif len(ids) < o.max_new_tokens:  # else there is no room to answer
                        prefixes.append((starts[i] + ids, o.max_new_tokens - len(ids), i, text[:cut]))
                        places.append((rows[-1], k))
        unique = {(tuple(ids), i): prefix for prefix in prefixes for ids, _, i, _ in [prefix]}  # samples begin alike
        right = complete(completer, reads, [*unique.values()], problems, o, eos_ids=ends_completion, **sampler)
        found = dict(zip(unique, right))
        for (row, k), (ids, _, i, _) in zip(places, prefixes):
            row["outcomes"][k] = right = found[tuple(ids), i]
            row["labels"][k] = sum(right) / len(right) if o.labels == "soft" else float(any(right))
        for row in rows if o.flip else ():
            rng = random.Random(f"{o.seed} {row['question']} {row['response']}")
            row["labels"] = [1 - y if rng.random() < o.flip else y for y in row["labels"]]
        done[0], done[1] = done[0] + len(unique), done[1] + sum(map(len, found.values()))
        seconds = time.perf_counter() - began
        figures.update({"prefixes/s": f"{done[0] / seconds:.1f}", "completions": f"{done[1] / max(done[0], 1):.2f}"})
        return rows

    settings = {**asdict(o), **(made_by or {}), "questions": fingerprint(problems)}
    del settings["slots"]  # which change nothing
    in_blocks(path, "labels", settings, len(problems), o.samples, make, rank, world, figures)
    prefixes = all_reduce(torch.tensor(done[0])).item()
    if rank == 0:
        print(describe(read_labels(str(path)), o, prefixes, time.perf_counter() - began), flush=True)


# ------------------------------------------------------------------------------------------------ labels of others


def solution(question: str, steps: list[str], labels: list, separator: str, finished=False, last=False) -> list[dict]:
    """One row, or none if a step has no label. last: only the last step's label is new. Whether a solution that is not
    finished is right, nobody knows."""
    if not steps or len(steps) != len(labels) or None in labels:
        return []
    pieces = [step + separator for step in steps[:-1]] + [steps[-1]]
    cuts = [*accumulate(map(len, pieces))]
    cuts, labels = (cuts[-1:], labels[-1:]) if last else (cuts, labels)
    row = {"question": question.strip(), "response": "".join(pieces), "cuts": cuts, "labels": labels}
    return [row | {"correct": labels[-1] > 0.5 if finished else None, "truncated": not finished}]


def from_shepherd(row: dict, separator: str) -> list[dict]:
    text, mark = row["input"], "ки"
    first = re.search(r"step 1:", text, re.IGNORECASE)
    start = first.start() if first else text.find("?") + 1
    steps, labels = [], []
    for count, end in enumerate(occurrences(text, mark)):
        # in `label` one character stands for each mark; those within a question belong to no step
        label = row["label"][end - len(mark) * (count + 1) + count : ][:1]
        if end - len(mark) > start:
            begin = max(start, text.rfind(mark, 0, end - len(mark)) + len(mark))
            steps.append(text[begin : end - len(mark)].strip())
            labels.append({"+": 1.0, "-": 0.0}.get(label))
    return solution(text[:start].replace(mark, ""), steps, labels, separator, finished=True)


def from_prm800k(row: dict, separator: str) -> list[dict]:
    if row.get("is_quality_control_question") or row.get("is_initial_screening_question"):
        return []
    question, before, labels, out = row["question"]["problem"], [], [], []
    good = lambda completion: float(completion["rating"] >= 0) if completion["rating"] is not None else None
    for step in row["label"]["steps"]:
        completions, chosen = step["completions"] or [], step["chosen_completion"]
        for i, completion in enumerate(completions):
            if i != chosen:  # a branch: of its steps only the last one is new
                out += solution(question, [*before, completion["text"]], [*labels, good(completion)], separator, last=True)
        if chosen is None and not step["human_completion"]:
            break
        before.append((completions[chosen] if chosen is not None else step["human_completion"])["text"])
        labels.append(good(completions[chosen]) if chosen is not None else 1.0)
    return out + solution(question, before, labels, separator, finished=row["label"]["finish_reason"] == "solution")


def from_trl(row: dict, separator: str) -> list[dict]:
    steps, labels = [step.strip() for step in row["completions"]], [float(label) for label in row["labels"]]
    return solution(row["prompt"], steps, labels, separator, finished=True)


SOURCES = {  # by the fields that a row has
    ("question", "response", "cuts", "labels", "correct", "truncated"): lambda row, _: [row],
    ("input", "label"): from_shepherd,
    ("question", "label"): from_prm800k,
    ("prompt", "completions", "labels"): from_trl,
}


def read_labels(source: str, separator: str = "\n") -> list[dict]:
    """Labelled solutions: rows with question, response, cuts (the ends of labelled steps, in characters), labels, correct,
    truncated. From a file of `make_labels`, or a file, folder or hub name in one of three formats, told by their fields:

    - Math-Shepherd: input "QUESTION Step 1: ... ки\\nStep 2: ... ки", label the same with + or - instead of ки;
    - PRM800K: question, label.steps, each with rated completions; a neutral rating counts as good;
    - TRL's stepwise: prompt, completions, labels.

    Steps that come one by one are joined by the separator, by which the policy will separate its own.
    Raises UserError for a missing file, or a row of none of them. Known faults (no steps, marks that do not fit) are left
    out, and counted."""
    rows, found, faulty = [], 0, 0
    for where, row in read_rows(source, "train"):
        try:
            convert = next(f for fields, f in SOURCES.items() if row.keys() >= set(fields))
            new = convert(row, separator)
            if any(not (math.isfinite(y) and 0 <= y <= 1) for x in new for y in x["labels"]):
                raise ValueError
        except (StopIteration, LookupError, TypeError, ValueError, AttributeError):
            raise UserError(f"{where}: not a row of step labels (see read_labels in prm.py for the four formats)") from None
        rows.extend(new)
        found, faulty = found + 1, faulty + (not new)
    if faulty and os.environ.get("RANK", "0") == "0":
        print(f"{source}: {faulty} of {found} rows hold no usable steps, and are left out", flush=True)
    if not rows:
        raise UserError(f"{source}: holds no labels")
    return rows


# ------------------------------------------------------------------------------------------------ how a model reads


def read_own(tokenizer, rows: list[dict], prompt: str, same: bool = False) -> tuple[Batch, list[list[int]]]:
    """The models that are trained here read what a policy writes: its prompt, the answer, and EOS if it is finished.
    same: the rows have the policy's own tokens, which need not be what a tokenizer would make of their text."""
    problems = [Problem(row["question"], "") for row in rows]
    prompts = encode_prompts(tokenizer, problems, prompt, 1 << 30) if rows else []
    responses, places = [row.get("ids") for row in rows], [row.get("ends") for row in rows]
    for i, row in enumerate(rows if not same else []):
        responses[i], places[i] = encode_steps(tokenizer, row["response"], row["cuts"])
        if not row["truncated"]:
            responses[i] = [*responses[i], tokenizer.eos_token_id]
            if row["cuts"] and row["cuts"][-1] == len(row["response"]):
                places[i][-1] = len(responses[i]) - 1
    return Batch(prompts, responses, torch.tensor([row["truncated"] for row in rows], dtype=torch.bool)), places


def steps_of(row: dict) -> list[str]:
    return [row["response"][start:end] for start, end in zip([0, *row["cuts"]], row["cuts"])]


def reward_tokenizer(path: str, format: str):
    """Math-Shepherd's, of Llama's kind, begins a text with a space, which AutoTokenizer forgets if there is no
    tokenizer.json; Skywork's has a BOS token in its model's configuration, if nowhere else."""
    tokenizer = load_tokenizer(path, LlamaTokenizer if format == "shepherd" else AutoTokenizer)
    if format == "skywork" and tokenizer.bos_token is None and (bos := load_config(path).bos_token_id) is not None:
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(bos)
    return tokenizer


def without(marks: list[str], text: str) -> str:
    """A policy must not write marks of its own, nor spell out a chat's special tokens."""
    pattern = re.compile("|".join(map(re.escape, marks)))
    while marks and pattern.search(text):  # what is left around a mark may be one
        text = pattern.sub("", text)
    return text


def occurrences(text: str, mark: str) -> list[int]:
    """Where each mark ends."""
    return [match.end() for match in re.finditer(re.escape(mark), text)]


def render_qwen(tokenizer, question: str, steps: list[str]) -> tuple[list[int], list[int]]:
    """Qwen2.5-Math-PRM-7B and -72B, Qwen2.5-Math-7B-PRM800K: a chat, <extra_0> behind each step."""
    mark = "<extra_0>"
    question, *steps = (without([mark], text) for text in (question, *steps))
    answer = "".join(step.strip() + mark for step in steps)
    roles = (("system", SYSTEM), ("user", question), ("assistant", answer))
    text = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in roles], tokenize=False)
    return encode_steps(tokenizer, text, occurrences(text, mark))


def render_shepherd(tokenizer, question: str, steps: list[str]) -> tuple[list[int], list[int]]:
    """math-shepherd-mistral-7b-prm: "QUESTION Step 1: ... ки\\nStep 2: ... ки"; the mark's token begins with its space."""
    mark = " ки"
    question, *steps = (without(["ки"], text).strip() for text in (question, *steps))
    numbered = [step if re.match(r"Step \d+:", step) else f"Step {k}: {step}" for k, step in enumerate(steps, 1)]
    text = f"{question} " + "\n".join(step + mark for step in numbered)
    return encode_steps(tokenizer, text, occurrences(text, mark), add_special_tokens=True)


@lru_cache
def around_turns(tokenizer) -> tuple[str, str, str]:
    """The chat template's text before the first user's turn, from one to the next, and behind the last."""
    turn = lambda text: [{"role": "user", "content": text}, {"role": "assistant", "content": "+"}]
    turns = [*turn("<first>"), *turn("<second>")]
    text = tokenizer.apply_chat_template(turns, tokenize=False, date_string="26 Jul 2024")  # as Llama 3.1 has it
    before, rest = text.split("<first>")
    return before, *rest.split("<second>")


def render_rlhflow(tokenizer, question: str, steps: list[str]) -> tuple[list[int], list[int]]:
    """Llama3.1-8B-PRM-Mistral-Data and -Deepseek-Data: each step is a turn of the user's and "+" the answer to each, whose
    logits stand at the token before it. The authors run the model once for each step; it is causal, so once is enough."""
    before, between, after = around_turns(tokenizer)
    text, cuts = before, []
    for k, step in enumerate(steps):
        text += (between if k else "") + (f"{question} {step.strip()}" if k == 0 else step).strip()
        cuts.append(len(text) + between.index("+"))
    return encode_steps(tokenizer, text + after, cuts)


def render_skywork(tokenizer, question: str, steps: list[str]) -> tuple[list[int], list[int]]:
    """Skywork-o1-Open-PRM-Qwen-2.5-1.5B and -7B: every line, blank ones too, encoded by itself and ended by a newline; at
    that of its last line a step is scored."""
    ids, marks = tokenizer.encode((tokenizer.bos_token or "") + question + "\n"), []
    newline = tokenizer.encode("\n")[-1]
    for step, before in zip(steps, ["\n", *steps]):
        step = step if before.endswith("\n") else step.removeprefix("\n")  # which we have given to the step before
        text = step.rstrip("\n")
        for line in text.split("\n"):
            ids = ids + (tokenizer.encode(line) if line else []) + [newline]
        marks.append(len(ids) - 1)
        ids = ids + [newline] * (len(step) - len(text) - 1)
    return ids, marks


def render_trl(tokenizer, question: str, steps: list[str]) -> tuple[list[int], list[int]]:
    """Token classifiers trained by TRL's PRMTrainer: question and steps encoded one by one, a newline behind each step."""
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    ids, marks = ([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]) + encode(question), []
    for step in steps:
        ids = ids + encode(step.strip()) + encode("\n")
        marks.append(len(ids) - 1)
    return ids, marks


@dataclass(frozen=True)
class Format:
    """Of a published PRM. All give two logits, or one, of which we keep the difference: the sigmoid of that is the softmax
    over the two. So each is a ScalarModel, with weights from another place."""

    render: Callable  # tokenizer, question, steps -> ids, and the index of each step's mark
    head: Callable  # path, LM (on "meta": its shape alone), tokenizer -> the head: from hidden states to the difference
    names: tuple[str, ...]  # parts of hub names, in lower case, or of the architecture in config.json


def linear(path: str, lm, prefix: str, rows: int, bias: bool = True) -> nn.Linear:
    """A layer of a published head, with so many rows in the files; of two classes the second's row less the first's."""
    size = lm.config.hidden_size
    layer = nn.Linear(size, 1 if rows == 2 else rows)
    if lm.device.type == "meta":
        return layer
    weights = read_tensors(path, prefix)
    for name, shape in {"weight": (rows, size), **({"bias": (rows,)} if bias else {})}.items():
        if name not in weights or weights[name].shape != shape:
            want = "x".join(map(str, shape))
            raise UserError(f"{path}: has no weight {prefix}{name} of {want}, so it is of another format: see --prm-format")
    both = {"weight": weights["weight"], "bias": weights.get("bias", torch.zeros(rows))}
    layer.load_state_dict({name: x.diff(dim=0) if rows == 2 else x for name, x in both.items()})
    return layer


def two_words(path: str, lm, tokenizer) -> nn.Linear:
    """The logits of "+" and "-", of the LM itself."""
    output, vocab = lm.get_output_embeddings().weight, tokenizer.get_vocab()
    plus, minus = (vocab.get("▁" + word, vocab[word]) for word in "+-")  # Mistral's begin with a space
    head = nn.Linear(output.shape[1], 1)
    if not output.is_meta:
        weight = (output[plus].float() - output[minus].float())[None].detach()
        head.load_state_dict({"weight": weight, "bias": torch.zeros(1)})
    return head


def two_classes(path: str, lm, tokenizer) -> nn.Linear:
    return linear(path, lm, "score.", 2, getattr(lm.config, "token_classification_bias", True))


def two_classes_mlp(path: str, lm, tokenizer) -> nn.Sequential:
    return nn.Sequential(linear(path, lm, "score.0.", lm.config.hidden_size), nn.ReLU(), linear(path, lm, "score.2.", 2))


FORMATS = {
    "qwen": Format(render_qwen, two_classes_mlp, ("qwen2forprocessrewardmodel", "qwen2.5-math-prm", "7b-prm800k")),
    "shepherd": Format(render_shepherd, two_words, ("math-shepherd-mistral-7b-prm",)),
    "rlhflow": Format(render_rlhflow, two_words, ("8b-prm-mistral-data", "8b-prm-deepseek-data")),
    "skywork": Format(render_skywork, lambda path, lm, _: linear(path, lm, "v_head.summary.", 1), ("skywork-o1-open-prm",)),
    "trl": Format(render_trl, two_classes, ("fortokenclassification",)),
}


class Reader:
    """Puts answers to a reward model the way that it was trained on: a Batch of B sequences, and in each the places of its
    step scores. An answer is a row with question, response, truncated, and cuts, where its steps end in characters; its
    own tokens (ids, ends) are read as they are if the model has the policy's tokenizer, which is then `policy_tokenizer`."""

    def __init__(self, path: str, format: str, prompt: str, policy_tokenizer=None):
        self.path, self.format, self.prompt = path, FORMATS.get(format), prompt
        self.tokenizer = reward_tokenizer(path, format)
        vocab = policy_tokenizer and policy_tokenizer.get_vocab()
        self.same = format == "own" and vocab == self.tokenizer.get_vocab()
        config = load_config(path)
        limits = config.max_position_embeddings, getattr(config, "sliding_window", None)
        self.limit = min(x for x in limits if x)

    def __call__(self, rows: list[dict]) -> tuple[Batch, list[list[int]]]:
        """Raises UserError if an answer is longer than the model can read."""
        if self.format is None:
            batch, ends = read_own(self.tokenizer, rows, self.prompt, self.same)
        else:
            plain = lambda text: without(self.tokenizer.all_special_tokens, text)
            texts = [(plain(row["question"]), [plain(step) for step in steps_of(row)]) for row in rows]
            read = [self.format.render(self.tokenizer, *text) for text in texts]
            truncated = torch.tensor([row["truncated"] for row in rows], dtype=torch.bool)
            batch = Batch([ids[:1] for ids, _ in read], [ids[1:] for ids, _ in read], truncated)
            ends = [[mark - 1 for mark in marks] for _, marks in read]
        longest = max((len(p) + len(r) for p, r in zip(batch.prompts, batch.responses)), default=0)
        if longest > self.limit:
            mend = "lower --max-new-tokens, or leave it out"
            raise UserError(f"{self.path} reads {self.limit} tokens, and an answer takes {longest}: {mend}")
        return batch, ends


def find_format(path: str, asked: str = "") -> str:
    """The format of a reward model by its files and its name; "own" for those trained here. Raises UserError if it is of
    none that is known."""
    if asked:
        return asked
    if Path(path, "head.json").is_file():
        return "own"
    if Path(path).is_dir() and not Path(path, "config.json").is_file():
        raise UserError(f"{path}: not a reward model (it has no config.json)")
    known = " ".join([path, *(load_config(path).architectures or [])]).lower()
    for name, format in FORMATS.items():
        if any(part in known for part in format.names):
            return name
    raise UserError(
        f"{path}: neither a reward model that prm.py trained (it has no head.json) nor one of a name that is known; say how "
        f"it reads with --prm-format {', '.join(FORMATS)}"
    )


def load_reward_model(path: str, dtype=torch.float32, device="cpu", format: str = "") -> ScalarModel:
    """One that was trained here, or published in one of the FORMATS, without running any code of its authors'. On the
    "meta" device its shape alone. Raises UserError if it cannot be loaded."""
    format = find_format(path, format)
    if format == "own":
        return ScalarModel.load(path, dtype, device)
    make_head = FORMATS[format].head
    lm = load_causal_lm(path, dtype, device, headless=make_head is not two_words)
    with torch.device("meta" if str(device) == "meta" else "cpu"):
        head = make_head(path, lm, reward_tokenizer(path, format))
    return ScalarModel(without_head(lm, True), head=head, format=format).eval()


# ------------------------------------------------------------------------------------------------ training


def held_out(question: str) -> bool:
    """One question in ten is kept for testing, whatever file it stands in."""
    return zlib.crc32(question.encode()) % 10 == 9


def targets(rows: list[dict], batch: Batch, ends: list[list[int]], kind: str) -> list[list[tuple[int, float]]]:
    """For each solution the tokens that carry a label, and the label: step ends for a PRM, the last token for an ORM."""
    if kind == "orm":
        known = [ids and row["correct"] is not None for row, ids in zip(rows, batch.responses)]
        return [[(len(ids) - 1, float(row["correct"]))] if k else [] for k, row, ids in zip(known, rows, batch.responses)]
    return [[(t, float(y)) for t, y in zip(places, row["labels"])] for row, places in zip(rows, ends)]


def train_reward_model(
    model: ScalarModel, tokenizer, rows: list[dict], o: TrainOptions, *, prompt: str, device="cpu",
    token_budget: int = 16384, seed: int = 0, rank: int = 0, world: int = 1,
) -> None:  # fmt: skip
    """Train on the rows whose questions are not held out. Raises UserError if no row has a step, or if the gradients stop
    being finite."""
    rows = [row for row in rows if not held_out(row["question"])]
    labels = [row["labels"] if o.kind == "prm" else [row["correct"]] if row["correct"] is not None else [] for row in rows]
    usable = [i for i, found in enumerate(labels) if found and rows[i]["response"]]
    if not usable:
        raise UserError(f"none of the {len(rows)} labelled solutions has a complete step: nothing to train the {o.kind} on")
    positive = [label > 0.5 for i in usable for label in labels[i]]
    if rank == 0 and len(set(positive)) == 1:
        print(f"warning: every {o.kind} label is {positive[0]:d}, so its scores will tell nothing apart")
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
            step = [rows[i] for i in usable[start : start + o.batch_size]]
            batch, ends = read_own(tokenizer, step, prompt)
            target, weight = torch.zeros(2, *batch.mask.shape)  # (B, T)
            for i, marks in enumerate(targets(step, batch, ends, o.kind)):
                for t, y in marks:
                    target[i, t], weight[i, t] = y, 1
            count, loss = weight.sum().item(), torch.zeros(())
            for micro in batch.plans([[*range(rank, len(step), world)]], token_budget)[0]:
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
    """Outcome scores (B,): the ORM at the last token; 0 for an answer without one."""
    scores = F.pad(score_tokens(model, batch, plan, device), (1, 0))  # (B, 1 + T)
    return scores.gather(1, batch.mask.sum(1, keepdim=True)).squeeze(1)


# ------------------------------------------------------------------------------------------------ quality


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Probability that a positive (label > 0.5) scores above a negative, ties counted half: Mann-Whitney's U by
    ranks; nan if a class is missing."""
    positive = labels > 0.5
    values, inverse, counts = scores.unique(return_inverse=True, return_counts=True)  # sorted
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()  # ties share their mean rank
    n1, n0 = int(positive.sum()), int((~positive).sum())
    return ((ranks[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0)).item() if n1 and n0 else float("nan")


def quality(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """scores, labels (M,): AUROC, accuracy at 0.5, Brier score, and expected calibration error over ten bins (arXiv
    1706.04599)."""
    hard = (labels > 0.5).float()
    bins = (scores * 10).long().clamp(0, 9)
    inside = [bins == b for b in bins.unique()]
    error = sum(x.float().mean() * (scores[x].mean() - labels[x].mean()).abs() for x in inside)
    return {
        "auroc": auroc(scores, labels),
        "accuracy": ((scores > 0.5).float() == hard).float().mean().item(),
        "brier": ((scores - labels) ** 2).mean().item(),
        "ece": float(error),
        "positive": hard.mean().item(),
        "count": len(labels),
    }


def evaluate_reward_model(
    model, read: Callable, rows: list[dict], kind: str, *, device="cpu", token_budget: int = 16384, rank: int = 0,
    world: int = 1,
) -> dict[str, float]:  # fmt: skip
    """Quality on held-out questions against the labels; of a PRM in the embedded world against the exact oracle too.

    read: a Reader, or what returns the same."""
    rows = [row for row in rows if held_out(row["question"])]
    batch, ends = read(rows)
    marks = targets(rows, batch, ends, kind)
    if not any(marks):
        return {}
    mine = list(range(rank, len(rows), world))
    scores = score_tokens(model, batch, batch.plans([mine], token_budget)[0], device)
    flat = dict(gather([(i, [scores[i, t].item() for t, _ in marks[i]]) for i in mine]))
    flat = torch.tensor([score for i in range(len(rows)) for score in flat[i]])  # (M,)
    result = quality(flat, torch.tensor([y for m in marks for _, y in m]))
    if kind == "prm" and all(is_toy(row["question"]) for row in rows):
        exact = [x for row in rows for x in oracle_at(row["question"], row["response"], row["cuts"])]
        if None not in exact:
            result["auroc_oracle"] = auroc(flat, torch.tensor(exact, dtype=torch.float))
    return {k: v for k, v in result.items() if v == v}  # no AUROC (nan) where only one class occurs


# ------------------------------------------------------------------------------------------------ made once


def digest(key, **more) -> str:
    return hashlib.sha1(json.dumps(key, **more).encode()).hexdigest()[:10]


def cached(cache: Path, what: str, title: str, key: dict, make, rank: int = 0) -> Path:
    """A folder under `cache`, named by everything that it depends on. make(folder) fills it if it is not there; it gets
    its name when it is complete, and what a stopped call left behind is handed to the next."""
    folder = cache / f"{what}-{digest(key, sort_keys=True)}"
    partial = folder.with_suffix(".partial")
    # two runs that start at once make it once
    with nullcontext() if rank or folder.exists() else lock(partial / "lock", wait=True):
        exists = on_rank_0(folder.exists)  # rank 0's view is everyone's
        if rank == 0:
            print(f"{title}: {'cached in' if exists else 'making'} {folder}", flush=True)
        if not exists:
            make(partial)
            barrier()
            if rank == 0:
                (partial / "key.json").write_text(json.dumps(key, indent=1))
                partial.rename(folder)
            barrier()
    return folder


def complete_indices(files: list[Path], each: int) -> dict[int, list[str]]:
    """The lines of every index that has `each` of them in one file; a kill may have cut the last one."""
    out = {}
    for file in files:
        found = {}
        for line in whole_lines(file):
            found.setdefault(json.loads(line)["index"], []).append(line)
        out |= {i: lines[-each:] for i, lines in found.items() if len(lines) >= each}
    return out


def left_to_do(path: Path, parts: Path, what: str, settings: dict, total: int, each: int, size: int) -> list[int]:
    """The first indices of the blocks that are missing. What there is of others is collected in one file."""
    sidecar = path.with_name(path.name + ".settings")
    if path.exists() and path.stat().st_size and not sidecar.exists():
        raise UserError(f"{path} exists and is not one of our {what}: choose another --out")
    held = path.exists() or any(parts.glob("*.jsonl"))
    old = json.loads(sidecar.read_text()) if sidecar.exists() and held else settings
    if changed := [f"{k} {old.get(k)} -> {v}" for k, v in settings.items() if old.get(k) != v]:
        raise UserError(f"{path} was made with other settings ({', '.join(changed)}); remove it or choose another --out")
    write(sidecar, json.dumps(settings))
    files = [path, *sorted(parts.glob("*.jsonl"))]
    lines = complete_indices(files, each)
    missing = [i for i in range(0, total, size) if any(j not in lines for j in range(i, min(i + size, total)))]
    if missing:
        kept = [line for i in sorted(lines) if i // size * size not in missing for line in lines[i]]
        write(parts / "done.jsonl", "".join(kept))
        for file in files:
            if file != parts / "done.jsonl":
                file.unlink(missing_ok=True)
    return missing


def in_blocks(
    path: Path, what: str, settings: dict, total: int, each: int, make, rank: int = 0, world: int = 1,
    figures: dict | None = None, size: int = 64,
) -> None:  # fmt: skip
    """Fill a JSONL file with `each` rows of every index below `total`, in order. make(indices) gives the rows of a block of
    `size` indices, each with its "index"; `figures` are shown beside the progress bar.

    Every rank writes its blocks as they come to a file of its own, in PATH.parts/. A later call, in whatever world, goes on
    from the blocks that are there: they are always the same, and made whole, so that an interrupted file ends as one that
    was not. Raises UserError for a file of other settings, or one that is in use."""
    parts = path.with_name(path.name + ".parts")
    with on_rank_0(lambda: lock(parts / "lock"), share=False) or nullcontext():
        missing = on_rank_0(lambda: left_to_do(path, parts, what, settings, total, each, size))
        mine = [range(i, min(i + size, total)) for i in missing[rank::world]]
        share = total if world == 1 else sum(map(len, mine))  # one rank's alone: the others do not wait for it
        start, hidden = share - sum(map(len, mine)), rank > 0 or not missing
        bar = tqdm(total=share, initial=start, desc=what, unit="question", disable=hidden)
        for block in mine:
            append(parts / f"{rank}.jsonl", make(block))
            bar.update(len(block))
            bar.set_postfix(figures or {})
        bar.close()
        barrier()
        if rank == 0 and any(parts.glob("*.jsonl")):  # ours, or of a call that was killed just here
            lines = complete_indices([path, *sorted(parts.glob("*.jsonl"))], each)
            write(path, "".join(line for i in range(total) for line in lines[i]))
        if rank == 0:
            shutil.rmtree(parts)
        barrier()


def identity(path: str) -> str:
    """What a cache was made from. For local files also their times of change, so that a new model is a new key."""
    p = Path(path)
    files = sorted(p.glob("*.safetensors")) or sorted(f for f in p.rglob("*") if f.is_file()) if p.is_dir() else []
    files = files or ([p] if p.is_file() else [])
    return " ".join([str(p.resolve()) if files else path, *(str(f.stat().st_mtime_ns) for f in files)])


def make_reward_model(
    source: str, folder, rows: list[dict], options: TrainOptions, prompt: str, seed: int, dtype, device, *,
    rank: int, world: int, token_budget: int = 16384, checkpointed: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Train one from the weights of the LM `source`, save it in the folder, and measure its quality."""
    tokenizer, where = load_tokenizer(source), dict(device=device, rank=rank, world=world, token_budget=token_budget)
    untrained = lambda home: ScalarModel(load_causal_lm(source, device=home), options.likelihood).eval()
    model = shard(untrained, dtype, device)
    if checkpointed:
        checkpoint_layers(model)
    train_reward_model(model, tokenizer, rows, options, seed=seed, prompt=prompt, **where)
    model.save(tokenizer, folder, rank)
    return evaluate_reward_model(model, lambda rows: read_own(tokenizer, rows, prompt), rows, options.kind, **where)


def print_quality(quality: dict[str, float]) -> None:
    figures = ", ".join(f"{k} {v:.3g}" for k, v in quality.items())
    print(f"  on held-out questions: {figures or 'none are labelled'}", flush=True)


def prepare_reward_model(
    cache: Path, model: str, completer: str, data: str, problems, label_options: LabelOptions, train_options: TrainOptions,
    *, questions: int = 0, dtype=torch.float32, device="cpu", rank: int = 0, world: int = 1, token_budget: int = 16384,
    checkpointed: bool = False,
) -> str:  # fmt: skip
    """Labels, then a reward model trained on them from the completer's weights, each made once; the model's folder.

    problems() gives the questions; it is called only if the labels are not there yet. questions: the `fingerprint` of those
    that they are drawn from. token_budget: packed tokens of a micro-batch of the training; checkpointed: it recomputes its
    activations."""
    sources = [f"{identity(name)} {weight or ''}" for name, weight in mixture(data).items()]
    made_by = {"model": identity(model), "completer": identity(completer)}
    o, kind = label_options, train_options.kind
    key = {**made_by, "data": sources, "questions": questions, **asdict(o)}
    del key["slots"]  # which change nothing
    tokenizer, reads = load_tokenizer(model), load_tokenizer(completer)

    def label(folder):
        policy = load_causal_lm(model, dtype, device)
        other = policy if completer == model else load_causal_lm(completer, dtype, device)
        make_labels(policy, other, tokenizer, problems(), o, folder / "labels.jsonl", rank, world, reads, made_by)

    def train(folder):
        quality = make_reward_model(
            completer, folder, read_labels(str(labels / "labels.jsonl")), train_options, o.prompt, o.seed, dtype, device,
            rank=rank, world=world, token_budget=token_budget, checkpointed=checkpointed,
        )  # fmt: skip
        if rank == 0:
            (folder / "quality.json").write_text(json.dumps(quality, indent=1))

    title = f"labels of {o.problems} questions, up to {o.completions} completions a step"
    labels = cached(cache, "labels", title, key, label, rank)
    folder = cached(cache, kind, f"{kind} on these labels", {**key, **asdict(train_options)}, train, rank)
    if rank == 0:
        print_quality(json.loads((folder / "quality.json").read_text()))
    return str(folder)


# ------------------------------------------------------------------------------------------------ the script


@dataclass
class Options:
    model: str = option("", "label: the policy; train: the LM to start from; test: a reward model, by folder or hub name")
    completer: str = option("", "label: the model that completes prefixes; empty: the policy")
    data: str = option("", "label: problems by name or file, see data.py")
    labels_file: str = option("", "train, test: what `label` wrote, or labels of others, see read_labels")
    prm_format: str = option("", "test: how a published PRM reads, where its name does not say", choices=["", *FORMATS])
    dtype: str = option("float32", "of the forward passes; weights in training stay float32", choices=list(DTYPES))
    out: str = option("", "label: the JSONL file to write; train: the folder to write")


def parse(argv: list[str] | None = None) -> tuple[str, Options, LabelOptions, TrainOptions]:
    """The stage, and its options."""

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        """Keep the lines of the description, show the defaults."""

    parser = HfArgumentParser(
        (Options, LabelOptions, TrainOptions), usage="python prm.py label|train|test [--OPTION VALUE ...]",
        description=__doc__.split("train.py calls")[0], formatter_class=Formatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("stage", choices=["label", "train", "test"])
    given = vars(parser.parse_args(argv))
    stage = given.pop("stage")
    o, *more = (cls(**{f.name: given[f.name] for f in fields(cls)}) for cls in (Options, LabelOptions, TrainOptions))
    needed = {"label": ("model", "data", "out"), "train": ("model", "labels_file", "out"), "test": ("model", "labels_file")}
    for name in needed[stage]:
        if not getattr(o, name):
            raise UserError(f"{stage} needs --{name.replace('_', '-')}, see python prm.py --help")
    if o.prm_format and stage != "test":
        raise UserError("--prm-format says how a published PRM reads, for the stage test: drop it")
    return stage, o, *more


def run_stage(stage: str, o: Options, label_options: LabelOptions, train_options: TrainOptions, rank, world, device) -> None:
    prompt, dtype = label_options.prompt, DTYPES[o.dtype]
    if stage == "label":
        problems, sizes = load_mixture(o.data, "train", label_options.problems if len(mixture(o.data)) == 1 else None)
        problems = problems if len(sizes) == 1 else draw(problems, sizes, label_options.problems, label_options.seed)
        name = o.completer or o.model
        tokenizer, reads = load_tokenizer(o.model), load_tokenizer(name)
        policy = load_causal_lm(o.model, dtype, device)
        completer = policy if name == o.model else load_causal_lm(name, dtype, device)
        made_by = {"model": identity(o.model), "completer": identity(name), "dtype": o.dtype}
        make_labels(policy, completer, tokenizer, problems, label_options, Path(o.out), rank, world, reads, made_by)
        return
    rows, where = read_labels(o.labels_file, label_options.separator), dict(rank=rank, world=world)
    if stage == "train":
        quality = make_reward_model(o.model, o.out, rows, train_options, prompt, label_options.seed, dtype, device, **where)
    else:
        form = find_format(o.model, o.prm_format)
        read = Reader(o.model, form, prompt)
        model = shard(lambda home: load_reward_model(o.model, dtype, home, form), dtype, device)
        quality = evaluate_reward_model(model, read, rows, train_options.kind, device=device, **where)
    if rank == 0:
        print_quality(quality)


def main() -> None:
    chosen = parse()
    rank, world, device = start_processes()
    with watching(rank, world):
        run_stage(*chosen, rank, world, device)


if __name__ == "__main__":
    run_script(main)
