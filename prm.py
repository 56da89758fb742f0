"""ORM and PRM: step labels, training, published models and how they read, scores, held-out quality.

label   sample solutions, and let a completer finish each prefix p(k), the first k steps, several times. A step's soft
        label is the share of right answers (Math-Shepherd, arXiv 2312.08935), its hard label 1 if there was any, and
        sampling stops there. The last step of a finished solution is labelled by its correctness.
train   a causal LM with a scalar head, by binary cross-entropy at the last token of each step (PRM) or of the solution
        (ORM), on labels made here or by others: Math-Shepherd, PRM800K, TRL's stepwise.
test    AUROC, accuracy and Brier score on the solutions of questions that were held out from training.

    python prm.py label --model DIR --data gsm8k --out labels.jsonl
    python prm.py train --model DIR --labels-file labels.jsonl --kind prm --out prm/
    python prm.py test  --model prm/ --labels-file labels.jsonl --kind prm

Left out: labels by tree search or by binary search for the first error, training of the published formats.
"""

import hashlib
import json
import math
import random
import re
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple

from data import (  # before torch, see there
    SEEDS, SYSTEM, Problem, TextOptions, UserError, append, decode, encode_prompts, encode_steps, is_toy, judge,
    load_problems, lock, option, oracle, problems_key, read_rows, run_script, steps_of, whole_lines, write,
)

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer, HfArgumentParser, LlamaTokenizer

from grader import grade
from model import (
    DTYPES, ScalarModel, all_reduce, barrier, checkpoint_layers, eos_ids, gather, load_causal_lm, load_config,
    load_tokenizer, on_rank_0, processes, rank, read_tensors, say, shard, world_size,
)
from ppo import optimizer_step
from rollout import Batch, Sampler, rollout


@dataclass
class RewardModelOptions(TextOptions):
    """How labels and reward models are made; train.py's options inherit it."""

    label_problems: int = option(500, "questions whose solutions are labelled (prm.py: of each set)", "[1, inf)")
    label_samples: int = option(1, "solutions per labelled question", "[1, inf)")
    completions: int = option(4, "completions per step prefix, at most", "[1, inf)")
    labels: str = option("hard", "hard: any right; soft: share; oracle: exact", choices=["hard", "soft", "oracle"])
    flip_labels: float = option(0.0, "share of the step labels to turn around, to see what noise does", "[0, 1]")
    rm_epochs: int = option(2, "passes over the labelled solutions", "[1, inf)")
    rm_batch_size: int = option(64, "labelled solutions per optimizer step", "[1, inf)")
    rm_lr: float = option(1e-5, "learning rate of the reward model's LM; 0: it is frozen", "[0, 1]")
    rm_head_lr: float = option(1e-3, "learning rate of its head, which starts at zero", "(0, 1]")
    rm_likelihood: bool = option(False, "let its head read the LM's own lowest log-probability")
    temperature: float = option(1.0, "of all sampling", "(0, inf)")
    slots: int = option(256, "answers that decode at once", "[1, inf)")
    token_budget: int = option(16384, "packed tokens per micro-batch; changes memory and speed alone", "[1, inf)")
    checkpoint_activations: bool = option(False, "keep the layers' inputs alone, recompute the rest: slower")
    dtype: str = option("float32", "of the forward passes; weights that learn stay float32", choices=[*DTYPES])
    seed: int = option(0, "of random numbers", SEEDS)


# ------------------------------------------------------------------------------------------------ made once


def short_hash(key) -> str:
    return hashlib.sha1(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]


def model_key(path: str) -> str:
    """A model's name, with the times of change if it is local: a new model in the same folder has a new key."""
    p = Path(path)
    files = [p] if p.is_file() else sorted(p.glob("*.safetensors")) or sorted(f for f in p.rglob("*") if f.is_file())
    return " ".join([str(p.resolve()) if files else path, *(str(f.stat().st_mtime_ns) for f in files)])


def cached(cache: Path, what: str, title: str, key: dict, make: Callable) -> Path:
    """A folder under `cache`, named by what it depends on. If it is not there, make(folder) fills it, on all ranks; it
    gets its name when it is complete, and what a stopped call left behind is handed to the next."""
    folder = cache / f"{what}-{short_hash(key)}"
    unfinished = folder.with_suffix(".partial")
    # two runs that start at once make it once
    with nullcontext() if rank() or folder.exists() else lock(folder.with_name(f".{folder.name}.lock"), wait=True):
        exists = on_rank_0(folder.exists)  # rank 0's view is everyone's
        say(f"{title}: {'cached in' if exists else 'making'} {folder}")
        if not exists:
            unfinished.mkdir(parents=True, exist_ok=True)
            make(unfinished)
            on_rank_0(lambda: unfinished.rename(folder))
    return folder


def in_blocks(path: Path, what: str, settings: dict, total: int, each: int, slots: int, make: Callable) -> None:
    """Fill a JSONL file with `each` rows of every index below `total`, in order; settings: what the rows depend on. All
    ranks call make(indices) for each block, some perhaps without indices: it gives the rows of this rank's part, each
    with its "index", and rank 0 appends them. A block has four rows for each slot of each rank. A later call goes on
    behind the last whole index. Raises UserError for a file that is not ours, is of other settings, or in use."""
    block, sidecar = max(1, math.ceil(4 * slots * world_size() / each)), path.with_name(path.name + ".settings")

    def indices_made() -> int:
        exists, lines = path.exists(), whole_lines(path)
        if exists and not sidecar.exists():
            raise UserError(f"{path} exists and is not one of our {what}: choose another --out")
        old = json.loads(sidecar.read_text()) if exists else settings
        if changed := [f"{k} {old.get(k)} -> {v}" for k, v in settings.items() if old.get(k) != v]:
            raise UserError(f"{path} was made with other settings ({', '.join(changed)}); choose another --out")
        made = len(lines) // each
        write(sidecar, json.dumps(settings))
        write(path, "".join(lines[: made * each]))  # a kill may have cut an index, or a line
        return made

    with nullcontext() if rank() else lock(path.with_name(path.name + ".lock")):
        starts = range(on_rank_0(indices_made), total, block)
        for start in tqdm(starts, what, unit="block", disable=rank() > 0 or not starts):
            rows = gather(make([*range(start, min(start + block, total))[rank() :: world_size()]]))
            if rank() == 0:
                append(path, sorted(rows, key=lambda row: row["index"]))
        barrier()


# ------------------------------------------------------------------------------------------------ labels


def sample_answers(sampler, tokenizer, problems, indices, opts: TextOptions, n, seed, progress="", **how) -> list[dict]:
    """n answers to each of the problems with these indices, in order: rows of `judge`, and their "index". They depend
    on seed and index, not on the other indices. how: temperature and slots of `rollout`."""
    if not indices:
        return []
    chosen, seeds = [problems[i] for i in indices], [seed * 1_000_003 + i for i in indices]
    prompts = encode_prompts(tokenizer, chosen, opts.prompt, opts.max_prompt_tokens)
    limits = dict(max_new_tokens=opts.max_new_tokens, eos_ids=eos_ids(sampler.model, tokenizer))
    samples = rollout(sampler, prompts, n, seeds=seeds, progress="" if rank() else progress, **limits, **how)
    rows = judge(tokenizer, chosen, samples, opts.separator)
    return [row | {"index": indices[k // n]} for k, row in enumerate(rows)]


class Reading(NamedTuple):
    """An answer as a model reads it."""

    ids: list[int]
    prompt_length: int  # of the ids
    positions: list[int]  # of the ids, at which steps are scored, or the outcome


def read_own(tokenizer, rows: list[dict], kind: str = "prm", *, prompt: str, same: bool = False) -> list[Reading]:
    """The models that are trained here read what a policy writes: its prompt, the answer, and EOS if it is finished. A
    PRM scores the last token of each step, an ORM the last of the answer, if there is one.

    same: the rows have the policy's own ids and token_ends; a tokenizer might make other ones of their text."""
    prompts = encode_prompts(tokenizer, [Problem(row["question"], "") for row in rows], prompt, 1 << 30) if rows else []
    readings = []
    for row, before in zip(rows, prompts):
        if same:
            ids, ends = row["ids"], row["token_ends"]
        else:
            ids, ends = encode_steps(tokenizer, row["response"], row["char_ends"])
            if not row["truncated"]:
                ids = [*ids, tokenizer.eos_token_id]
                ends = ends and [*ends[:-1], len(ids) - 1]
        if kind == "orm":
            ends = ids and [len(ids) - 1]
        readings.append(Reading(before + ids, len(before), [len(before) + end for end in ends]))
    return readings


class Prefix(NamedTuple):
    """p(k): a question and the first k steps of an answer to it, which a completer continues."""

    ids: tuple[int, ...]  # prompt and steps, in the completer's tokens
    text: str  # of the steps
    gold: str  # the right answer


def complete(completer: Sampler, tokenizer, prefixes: list[Prefix], opts) -> dict[Prefix, list[bool]]:
    """Which completions of each prefix were right. Each has --max-new-tokens of its own, as far as the model has
    positions; without any there is no completion. A hard label is decided by the first right one: sampling stops."""
    positions = completer.model.config.max_position_embeddings
    unique = [p for p in dict.fromkeys(prefixes) if len(p.ids) < positions]  # samples begin alike
    outcomes, ids = {p: [] for p in prefixes}, [[*p.ids] for p in unique]

    def any_right(i: int, samples: list) -> bool:
        p, right = unique[i], outcomes[unique[i]]
        for s in samples[len(right) :]:  # of all so far, the new ones
            right.append(not s.truncated and grade(p.gold, p.text + decode(tokenizer, s.ids)))
        return any(right)

    sampled = rollout(
        completer, ids, opts.completions, max_new_tokens=[min(opts.max_new_tokens, positions - len(x)) for x in ids],
        eos_ids=eos_ids(completer.model, tokenizer), seeds=[zlib.crc32(repr((opts.seed, x)).encode()) for x in ids],
        temperature=opts.temperature, slots=opts.slots, progress="" if rank() else "completions",
        decided=any_right if opts.labels == "hard" else None,
    )
    for i, samples in enumerate(sampled):
        any_right(i, samples)
    return outcomes


def label_solutions(policy, completer, tokenizer, reads, problems, indices, opts) -> list[dict]:
    """Labelled solutions to the problems with these indices, by Samplers. reads: the completer's tokenizer; the same
    object if it is the policy's."""
    how = dict(temperature=opts.temperature, slots=opts.slots, progress="solutions")
    rows = sample_answers(policy, tokenizer, problems, indices, opts, opts.label_samples, opts.seed, **how)
    if opts.labels == "oracle":
        labels = [oracle(row["question"], row["response"], row["char_ends"]) for row in rows]
    else:
        prefixes, labels = [], []
        for row, r in zip(rows, read_own(reads, rows, prompt=opts.prompt, same=reads is tokenizer)):
            ends = [*zip(r.positions, row["char_ends"])]
            ends = ends if row["truncated"] else ends[:-1]  # behind the last step of a finished one nothing is missing
            prefixes.append([Prefix((*r.ids[: p + 1],), row["response"][:end], row["gold"]) for p, end in ends])
        right = complete(completer, reads, [*chain(*prefixes)], opts)
        for row, of_row in zip(rows, prefixes):
            outcomes = [right[prefix] for prefix in of_row]
            if len(of_row) < len(row["char_ends"]):
                outcomes.append([row["correct"]])
            labels.append([sum(x) / max(len(x), 1) if opts.labels == "soft" else any(x) for x in outcomes])
    for row, of_row in zip(rows, labels):
        rng = random.Random(f"{opts.seed} {row['question']} {row['response']}")
        row["labels"] = [1.0 - y if rng.random() < opts.flip_labels else float(y) for y in of_row]
    return rows


def labels_key(model: str, completer: str, problems: list[Problem], opts: RewardModelOptions) -> dict:
    """All that labels depend on."""
    names = [f.name for f in fields(TextOptions)] + ["label_samples", "completions", "labels", "flip_labels"]
    key = {name: getattr(opts, name) for name in (*names, "temperature", "dtype", "seed")}
    return key | {"model": model_key(model), "completer": model_key(completer), "questions": problems_key(problems)}


def make_labels(model: str, completer: str, problems: list[Problem], opts, path: Path, device="cpu") -> None:
    """Write one line for each solution of the problems to `path`, see `in_blocks`. A completer with a tokenizer of its
    own reads the prefixes as text. Raises UserError for problems, models or a file that do not fit."""
    if opts.labels == "oracle" and (opts.separator != "\n" or not all(is_toy(p.question) for p in problems)):
        raise UserError("--labels oracle: only of the embedded worlds' lines is it known what is right; choose hard")
    tokenizer, reads, dtype = load_tokenizer(model), load_tokenizer(completer), DTYPES[opts.dtype]
    if reads.get_vocab() == tokenizer.get_vocab():
        reads = tokenizer
    policy = Sampler(load_causal_lm(model, dtype, device))  # which keeps its cache from block to block
    other = policy if completer == model else Sampler(load_causal_lm(completer, dtype, device))
    prompts = encode_prompts(reads, problems, opts.prompt, 1 << 30)  # the policy's were not too long
    longest, positions = max(map(len, prompts)) + opts.max_new_tokens, other.model.config.max_position_embeddings
    if longest > positions:
        what = f"a prompt and its answer may take {longest} tokens, but {completer} has {positions} positions"
        raise UserError(f"{what}; lower --max-new-tokens, or choose another --completer")
    settings = labels_key(model, completer, problems, opts)
    label = partial(label_solutions, policy, other, tokenizer, reads, problems, opts=opts)
    # a block of one solution for each slot: they have several prefixes each
    in_blocks(path, "labels", settings, len(problems), opts.label_samples, math.ceil(opts.slots / 4), label)


def solution(question: str, steps: list[str], labels: list, separator: str, finished=False, last=False) -> list[dict]:
    """One row, or none if a step has no label. last: only the last step's label is new. Whether a solution that is not
    finished is right, nobody knows."""
    if not steps or len(steps) != len(labels) or None in labels:
        return []
    pieces = [step + separator for step in steps[:-1]] + steps[-1:]
    char_ends, new = [*accumulate(map(len, pieces))], slice(-1 if last else 0, None)
    row = {"question": question.strip(), "response": "".join(pieces), "char_ends": char_ends[new]}
    correct = labels[-1] > 0.5 if finished else None
    return [row | {"labels": labels[new], "correct": correct, "truncated": not finished}]


def from_shepherd(text: str, marked: str, separator: str) -> list[dict]:
    """In `marked` one character, + or -, stands for each mark of the text."""
    mark, first = "ки", re.search("step 1:", text, re.IGNORECASE)
    start = first.start() if first else text.find("?") + 1
    steps, labels, place = [], [], len(text[:start].replace(mark, "?"))
    for step in text[start:].split(mark)[:-1]:
        place += len(step) + 1
        if step.strip():
            steps.append(step.strip())
            labels.append({"+": 1.0, "-": 0.0}.get(marked[place - 1 : place]))
    return solution(text[:start].replace(mark, ""), steps, labels, separator, finished=True)


def from_prm800k(row: dict, separator: str) -> list[dict]:
    """The solution, and what else was rated on its way: branches, of which only the last step is new."""
    if row.get("is_quality_control_question") or row.get("is_initial_screening_question"):
        return []
    question, before, labels, out = row["question"]["problem"], [], [], []
    for step in row["label"]["steps"]:
        completions, chosen = step["completions"] or [], step["chosen_completion"]
        good = [None if c["rating"] is None else float(c["rating"] >= 0) for c in completions]
        for i, completion in enumerate(completions):
            if i != chosen:
                out += solution(question, [*before, completion["text"]], [*labels, good[i]], separator, last=True)
        if chosen is None and not step["human_completion"]:
            break
        before.append((step["human_completion"] if chosen is None else completions[chosen])["text"])
        labels.append(1.0 if chosen is None else good[chosen])
    return out + solution(question, before, labels, separator, finished=row["label"]["finish_reason"] == "solution")


def read_labels(source: str, separator: str = "\n") -> list[dict]:
    """Labelled solutions: rows with question, response, char_ends (of the labelled steps), labels, correct, truncated.
    source: a file of `make_labels`, or a file, folder or hub name in the format of Math-Shepherd, of PRM800K, where a
    neutral rating counts as good, or of TRL; their steps are joined by the separator. Raises UserError if it is none.
    """
    rows, unusable = [], 0
    for where, row in read_rows(source, "train"):
        try:
            match row:
                case {"question": _, "response": _, "char_ends": _, "labels": _, "correct": _, "truncated": _}:
                    new = [row]
                case {"input": text, "label": marked}:
                    new = from_shepherd(text, marked, separator)
                case {"question": _, "label": _}:
                    new = from_prm800k(row, separator)
                case {"prompt": question, "completions": steps, "labels": labels}:
                    steps, labels = [step.strip() for step in steps], [{0: 0.0, 1: 1.0}[label] for label in labels]
                    new = solution(question, steps, labels, separator, finished=True)
                case _:
                    raise ValueError
            for x in new:
                if len(x["labels"]) != len(x["char_ends"]) or not all(0 <= y <= 1 for y in x["labels"]):
                    raise ValueError
        except (LookupError, TypeError, ValueError, AttributeError):
            raise UserError(f"{where}: not a row of step labels (see read_labels in prm.py for the formats)") from None
        rows += new
        unusable += not new
    if unusable:
        say(f"{source}: {unusable} rows hold no usable steps, and are left out")
    if not rows:
        raise UserError(f"{source}: holds no labels")
    return rows


# ------------------------------------------------------------------------------------------------ how a model reads


def encode_marked(tokenizer, text: str, mark: str, add_special_tokens=False) -> tuple[list[int], list[int]]:
    """Ids, and the index of each mark's last one."""
    ends = [match.end() for match in re.finditer(re.escape(mark), text)]
    return encode_steps(tokenizer, text, ends, add_special_tokens)


def render_qwen(tokenizer, question: str, steps: list[str]) -> tuple[list[int], list[int]]:
    """A chat, with <extra_0> behind each step."""
    answer = "".join(step.strip() + "<extra_0>" for step in steps)
    chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    chat.append({"role": "assistant", "content": answer})
    return encode_marked(tokenizer, tokenizer.apply_chat_template(chat, tokenize=False), "<extra_0>")


def render_shepherd(tokenizer, question: str, steps: list[str]) -> tuple[list[int], list[int]]:
    """QUESTION Step 1: ... ки\\nStep 2: ... ки, where the mark's token begins with its space."""
    text = question.strip()
    for k, step in enumerate(map(str.strip, steps), 1):
        text += ("\n" if k > 1 else " ") + (step if re.match(r"Step \d+:", step) else f"Step {k}: {step}") + " ки"
    return encode_marked(tokenizer, text, "ки", add_special_tokens=True)


def render_rlhflow(tokenizer, question: str, steps: list[str]) -> tuple[list[int], list[int]]:
    """Each step is a turn of the user's and "+" the answer to each, whose logits stand at the token before it. The
    authors run the model once for each step; it is causal: once is enough."""
    chat = []
    for step in map(str.strip, steps):
        text = step if chat else f"{question} {step}"
        chat += [{"role": "user", "content": text}, {"role": "assistant", "content": "+"}]
    chat = chat or [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, date_string="26 Jul 2024")  # as Llama 3.1 has it
    return encode_marked(tokenizer, text, "assistant<|end_header_id|>\n\n")


def render_skywork(tokenizer, question: str, steps: list[str]) -> tuple[list[int], list[int]]:
    """Every line, blank ones too, encoded by itself and ended by a newline; that of a step's last line is scored."""
    ids, marks = tokenizer.encode((tokenizer.bos_token or "") + question + "\n"), []
    newline = tokenizer.encode("\n")[-1]
    for step, before in zip(steps, ["\n", *steps]):
        step = step if before.endswith("\n") else step.removeprefix("\n")  # which we have given to the step before
        text = step.rstrip("\n")
        for line in text.split("\n"):
            ids += (tokenizer.encode(line) if line else []) + [newline]
        marks.append(len(ids) - 1)
        ids += [newline] * (len(step) - len(text) - 1)
    return ids, marks


def render_trl(tokenizer, question: str, steps: list[str]) -> tuple[list[int], list[int]]:
    """Question and steps encoded one by one, a newline behind each step."""
    encode = partial(tokenizer.encode, add_special_tokens=False)
    ids, marks = ([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]) + encode(question), []
    for step in steps:
        ids += encode(step.strip()) + encode("\n")
        marks.append(len(ids) - 1)
    return ids, marks


class Format(NamedTuple):
    """How a published PRM wants its text, and which weights make the logit of "correct"."""

    render: Callable  # tokenizer, question, steps -> ids, and the index of each step's mark
    marks: list[str]  # which a policy must not write
    head: dict[str, int]  # its layers' rows by the prefix of their weights' names; 0 is the hidden size
    names: str  # in lower case: parts of hub names, or of the architecture in config.json


WORDS = {"": 2}  # no weights of a head's: the LM's own for the words - and +
TWO_LAYERS = {"score.0.": 0, "score.2.": 2}
FORMATS = {
    "qwen": Format(render_qwen, ["<extra_0>"], TWO_LAYERS, "forprocessrewardmodel|qwen2.5-math-prm|7b-prm800k"),
    "shepherd": Format(render_shepherd, ["ки"], WORDS, "math-shepherd-mistral-7b-prm"),
    "rlhflow": Format(render_rlhflow, ["<|end_header_id|>"], WORDS, "8b-prm-mistral-data|8b-prm-deepseek-data"),
    "skywork": Format(render_skywork, [], {"v_head.summary.": 1}, "skywork-o1-open-prm"),
    "trl": Format(render_trl, [], {"score.": 2}, "fortokenclassification"),
}


def find_format(path: str, asked: str = "") -> str:
    """The format of a reward model by its files and its name; "own" for those trained here. Raises UserError if it is
    of none that is known."""
    if asked:
        return asked
    if Path(path, "head.json").is_file():
        return "own"
    known = " ".join([path, *(load_config(path).architectures or [])]).lower()
    for name, format in FORMATS.items():
        if re.search(format.names, known):
            return name
    mend = f"say how it reads with --prm-format {', '.join(FORMATS)}"
    raise UserError(f"{path}: neither a reward model that prm.py trained nor one of a name that is known; {mend}")


def published_layer(path: str, lm, prefix: str, rows: int) -> nn.Linear:
    """A layer of a head. Of two classes the second's row less the first's: a sigmoid of that is their softmax."""
    size, bias = lm.config.hidden_size, prefix != "" and getattr(lm.config, "token_classification_bias", True)
    rows = rows or size
    layer = nn.Linear(size, 1 if rows == 2 else rows, bias)
    if lm.device.type == "meta":
        return layer
    if prefix:
        weights = read_tensors(path, prefix)
    else:
        vocab = load_tokenizer(path).get_vocab()
        words = [vocab.get("▁" + word, vocab[word]) for word in "-+"]  # Mistral's begin with a space
        weights = {"weight": lm.get_output_embeddings().weight[words].float().detach()}
    for name, p in layer.named_parameters():
        shape = (rows, *p.shape[1:])
        if name not in weights or weights[name].shape != shape:
            raise UserError(f"{path}: has no weight {prefix}{name} of {[*shape]}: choose another --prm-format")
        p.data = weights[name].diff(dim=0) if rows == 2 else weights[name]
    return layer


def load_reward_model(path: str, dtype=torch.float32, device="cpu", format: str = "") -> ScalarModel:
    """One that was trained here, or published in one of the FORMATS, without running any code of its authors'. On the
    "meta" device its shape alone. Raises UserError if it cannot be loaded."""
    format = find_format(path, format)
    if format == "own":
        return ScalarModel.load(path, dtype, device)
    layers = FORMATS[format].head
    lm = load_causal_lm(path, dtype, device, headless="" not in layers)
    first, *rest = (published_layer(path, lm, prefix, rows) for prefix, rows in layers.items())
    head = nn.Sequential(first, nn.ReLU(), *rest) if rest else first
    lm.set_output_embeddings(nn.Identity())
    return ScalarModel(lm, head=head).eval()


class Reader:
    """Puts answers to a reward model as it was trained on: rows with question, response, char_ends, truncated.
    Their own tokens (ids, token_ends) are read as they are, if the model has the policy's tokenizer."""

    def __init__(self, path: str, format: str, prompt: str, policy_tokenizer=None):
        self.path, self.format, self.prompt, config = path, FORMATS.get(format), prompt, load_config(path)
        # of Llama's kind: it begins a text with a space, which AutoTokenizer forgets if there is no tokenizer.json
        self.tokenizer = load_tokenizer(path, LlamaTokenizer if format == "shepherd" else AutoTokenizer)
        if format == "skywork" and self.tokenizer.bos_token is None and config.bos_token_id is not None:
            self.tokenizer.bos_token = self.tokenizer.convert_ids_to_tokens(config.bos_token_id)
        self.same = policy_tokenizer is not None and policy_tokenizer.get_vocab() == self.tokenizer.get_vocab()
        self.limit = min(filter(None, (config.max_position_embeddings, getattr(config, "sliding_window", None))))

    def published(self, row: dict) -> Reading:
        """A policy must not write marks of its own, nor spell out a chat's special tokens."""
        marks = "|".join(map(re.escape, self.tokenizer.all_special_tokens + self.format.marks))
        texts = [row["question"], *steps_of(row)]
        while (less := [re.sub(marks, "", text) for text in texts]) != texts:  # what is left around a mark may be one
            texts = less
        ids, positions = self.format.render(self.tokenizer, texts[0], texts[1:])
        return Reading(ids, 1, positions)

    def __call__(self, rows: list[dict], kind: str = "prm") -> list[Reading]:
        """Raises UserError if an answer is longer than the model can read."""
        if self.format:
            readings = [self.published(row) for row in rows]
        else:
            readings = read_own(self.tokenizer, rows, kind, prompt=self.prompt, same=self.same)
        longest = max((len(reading.ids) for reading in readings), default=0)
        if longest > self.limit:
            what = f"{self.path} reads {self.limit} tokens, and an answer takes {longest}"
            raise UserError(f"{what}: lower --max-new-tokens, or choose another reward model")
        return readings


# ------------------------------------------------------------------------------------------------ scores and training


def micro_batches(readings: list[Reading], token_budget: int, device):
    """Yields (indices, packed, places): readings end to end, and where in that row their positions are (M,). Empty ones
    follow where a rank has fewer: a sharded model waits until all ranks call it."""
    batch = Batch([r.ids[: r.prompt_length] for r in readings], [r.ids[r.prompt_length :] for r in readings], None)
    for micro in batch.micro_batches([[*range(len(readings))]], token_budget, device)[0]:
        places = [start + p for i, start in zip(micro.rows, micro.packed.starts) for p in readings[i].positions]
        yield micro.rows, micro.packed, torch.tensor(places, dtype=torch.long, device=device)


@torch.no_grad()  # not inference mode: what FSDP gathers there could not be trained with later
def score_at(model: ScalarModel, readings: list[Reading], token_budget: int, device) -> list[list[float]]:
    """Probability of "correct so far" at each position of each reading. All ranks must call, each with its readings.
    Raises UserError, on all ranks, if a score is not finite."""
    scores, bad = [[] for _ in readings], 0
    for part, packed, places in micro_batches(readings, token_budget, device):
        found = torch.sigmoid(model(packed)[places]).cpu()  # (M,)
        bad += int((~found.isfinite()).sum())
        for i, of_one in zip(part, found.split([len(readings[i].positions) for i in part])):
            scores[i] = of_one.tolist()
    if bad := all_reduce(torch.tensor(bad)).item():
        raise UserError(f"the reward model gives {bad} scores that are not finite: train it anew, or give another")
    return scores


def pad_scores(scores: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Step scores of B answers as (B, K) float32, and the step_mask (B, K) of the steps that each has. A score may be
    exactly 0, so only the mask says where a step is."""
    K = max(map(len, scores), default=0)
    padded = torch.tensor([s + [0.0] * (K - len(s)) for s in scores], dtype=torch.float32).view(len(scores), K)
    return padded, torch.arange(K) < torch.tensor([len(s) for s in scores], dtype=torch.long)[:, None]


def held_out(question: str) -> bool:
    """One question in ten is kept for testing, whatever file it stands in."""
    return zlib.crc32(question.encode()) % 10 == 9


def labelled(rows: list[dict], kind: str) -> list[tuple[dict, list[float]]]:
    """The rows that have labels, with those of the positions that are scored: of the steps, or of the outcome alone."""
    if kind == "prm":
        return [(row, row["labels"]) for row in rows if row["labels"]]
    return [(row, [float(row["correct"])]) for row in rows if row["response"] and row["correct"] is not None]


def train_reward_model(model: ScalarModel, tokenizer, rows: list[dict], opts, kind="prm", device="cpu") -> None:
    """Train on all of these labelled solutions. Raises UserError if none has a label, or loss or gradients are not
    finite."""
    examples, size, steps = labelled(rows, kind), opts.rm_batch_size, []
    if not examples:
        raise UserError(f"none of {len(rows)} labelled solutions has a complete step: no {kind} can be trained")
    rng, skipped = random.Random(opts.seed), 0
    for _ in range(opts.rm_epochs):
        rng.shuffle(examples)
        steps += [examples[start : start + size] for start in range(0, len(examples), size)]
    if not opts.rm_lr:
        model.lm.requires_grad_(False)  # neither gradients nor optimizer state
    learning = [p for p in model.lm.parameters() if p.requires_grad]
    groups = [{"params": model.head.parameters(), "lr": opts.rm_head_lr}, {"params": learning, "lr": opts.rm_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 20, 1) * (1 - s / len(steps)))
    bar = tqdm(steps, f"train {kind}", unit="step", disable=rank() > 0)
    for step in bar:
        count, mine, loss = sum(len(y) for _, y in step), step[rank() :: world_size()], torch.zeros(())
        readings = read_own(tokenizer, [row for row, _ in mine], kind, prompt=opts.prompt)
        for part, packed, places in micro_batches(readings, opts.token_budget, device):
            y = torch.tensor([y for i in part for y in mine[i][1]], device=device)  # (M,)
            part_loss = F.binary_cross_entropy_with_logits(model(packed)[places], y, reduction="sum") / count
            part_loss.backward()
            loss += part_loss.detach().cpu()
        loss, norm = all_reduce(loss).item(), optimizer_step(model, [optimizer], 1.0)
        skipped = 0 if math.isfinite(norm) else skipped + 1
        if skipped == 3 or not math.isfinite(loss):
            raise UserError(f"training the {kind}: loss {loss}, gradient {norm}; lower --rm-lr or --rm-head-lr")
        schedule.step()
        bar.set_postfix(loss=f"{loss:.3f}")


def auroc(scores: Tensor, labels: Tensor) -> float:
    """How likely a positive (label > 0.5) scores above a negative, ties counted half; nan if a class is missing."""
    positive, negative = scores[labels > 0.5], scores[labels <= 0.5].sort().values
    below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    return (below.double().sum() / (2 * len(positive) * len(negative))).item()


def measure_quality(model, read, rows: list[dict], kind: str, *, device="cpu", token_budget=16384) -> dict[str, float]:
    """Quality against the labels of rows that were not trained on; of a PRM in the embedded world against the oracle
    too. An AUROC is left out where one class is missing. read: a Reader, or what returns the same."""
    mine, judged, found = labelled(rows, kind)[rank() :: world_size()], [], {}
    all_scores = score_at(model, read([row for row, _ in mine], kind), token_budget, device)
    for (row, labels), scores in zip(mine, all_scores):
        known = kind == "prm" and is_toy(row["question"])
        exact = oracle(row["question"], row["response"], row["char_ends"]) if known else [None] * len(labels)
        judged += zip(scores, labels, [math.nan if good is None else good for good in exact])
    if judged := gather(judged):
        scores, y, exact = (torch.tensor(x, dtype=torch.float) for x in zip(*judged))  # (M,)
        found = {"auroc": auroc(scores, y), "accuracy": ((scores > 0.5) == (y > 0.5)).float().mean().item()}
        found |= {"brier": ((scores - y) ** 2).mean().item(), "positive": (y > 0.5).float().mean().item()}
        found["count"] = len(y)
        if not exact.isnan().any():
            found["auroc_oracle"] = auroc(scores, exact)
    undefined = "undefined (all are of one class)"
    figures = [f"{name} {undefined if math.isnan(x) else f'{x:.3g}'}" for name, x in found.items()]
    say(f"  on held-out questions: {', '.join(figures) or 'none are labelled'}")
    return {name: x for name, x in found.items() if not math.isnan(x)}


# ------------------------------------------------------------------------------------------------ the stages


def make_reward_model(source: str, folder: Path, labels_file, opts, kind: str = "prm", device="cpu") -> None:
    """Train one from the weights of the LM `source` on the questions that are not held out, save it in the folder, and
    measure its quality on those that are."""
    rows, tokenizer = read_labels(str(labels_file), opts.separator), load_tokenizer(source)
    held = [row for row in rows if held_out(row["question"])]
    known = [row for row in rows if not held_out(row["question"])]
    make = lambda home: ScalarModel(load_causal_lm(source, device=home), opts.rm_likelihood).eval()
    model = shard(make, DTYPES[opts.dtype], device)
    if opts.checkpoint_activations:
        checkpoint_layers(model)
    train_reward_model(model, tokenizer, known, opts, kind, device)
    model.save(tokenizer, folder)
    read = partial(read_own, tokenizer, prompt=opts.prompt)
    found = measure_quality(model, read, held, kind, device=device, token_budget=opts.token_budget)
    if rank() == 0:
        write(Path(folder) / "quality.json", json.dumps(found, indent=1))


def prepare_reward_model(cache: Path, policy, completer, problems, opts, kind: str, device="cpu") -> str:
    """Labels, then a reward model trained on them from the completer's weights, each made once; the model's folder."""
    key = labels_key(policy, completer, problems, opts)
    labels = cached(
        cache, "labels", f"labels of {len(problems)} questions", key,
        lambda folder: make_labels(policy, completer, problems, opts, folder / "labels.jsonl", device),
    )
    key |= {name: value for name, value in asdict(opts).items() if name.startswith("rm_")}
    return str(cached(
        cache, kind, f"{kind} on these labels", key,
        lambda folder: make_reward_model(completer, folder, labels / "labels.jsonl", opts, kind, device),
    ))


@dataclass
class ScriptOptions(RewardModelOptions):
    model: str = option("", "label: the policy; train: the LM to start from; test: a reward model; folder or hub name")
    completer: str = option("", "label: the model that completes prefixes; empty: the policy")
    data: str = option("", "label: problems by name or file, see data.py")
    labels_file: str = option("", "train, test: what `label` wrote, or labels of others, see read_labels")
    kind: str = option("prm", "train, test: prm or orm", choices=["prm", "orm"])
    prm_format: str = option("", "test: how a published PRM reads, if its name does not say", choices=["", *FORMATS])
    out: str = option("", "label: the JSONL file to write; train: the folder to write")


STAGES = {"label": ("model", "data", "out"), "train": ("model", "labels_file", "out"), "test": ("model", "labels_file")}


def parse(argv: list[str] | None = None) -> tuple[str, ScriptOptions]:
    """The stage, and its options."""
    usage = "python prm.py label|train|test [--OPTION VALUE ...]"
    parser = HfArgumentParser(ScriptOptions, usage=usage, allow_abbrev=False)
    parser.add_argument("stage", choices=[*STAGES])
    given = vars(parser.parse_args(argv))
    stage = given.pop("stage")
    if missing := [name for name in STAGES[stage] if not given[name]]:
        raise UserError(f"{stage} needs --{missing[0].replace('_', '-')}, see python prm.py --help")
    return stage, ScriptOptions(**given)


def main() -> None:
    stage, opts = parse()
    with processes() as device:
        if stage == "label":
            problems = load_problems(opts.data, "train", opts.label_problems)
            make_labels(opts.model, opts.completer or opts.model, problems, opts, Path(opts.out), device)
        elif stage == "train":
            make_reward_model(opts.model, opts.out, opts.labels_file, opts, opts.kind, device)
        else:
            format, dtype = find_format(opts.model, opts.prm_format), DTYPES[opts.dtype]
            if opts.kind == "orm" and format != "own":
                raise UserError(f"{opts.model}: a published PRM; test it with --kind prm")
            model = shard(lambda home: load_reward_model(opts.model, dtype, home, format), dtype, device)
            held = [row for row in read_labels(opts.labels_file, opts.separator) if held_out(row["question"])]
            read = Reader(opts.model, format, opts.prompt)
            measure_quality(model, read, held, opts.kind, device=device, token_budget=opts.token_budget)


if __name__ == "__main__":
    run_script(main)
