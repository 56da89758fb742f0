"""Problems, prompts and steps: the embedded worlds, GSM8K, MATH, MathInstruct, and any JSONL.

A `Problem` is a question and its gold answer (bare, or a reference solution that holds it: grader.py reads both).
The *embedded worlds* need no download, and their steps can be checked exactly (`oracle`), which no natural data set
allows. In `toy` a problem is a chain of 3 to 6 operations, applied from left to right, modulo 100, which the letters
number. In `sums` it is a sum of two numbers of 4 to 7 digits, given column by column (b42c05 is 40 + 25): every step is
as easy as the first, and the answer is gathered from all of them.

    question   41b+5c+3d-9e*5f+2=                                     b42c05d97e16=
    response   b41+5=46       46 is carried to the next line          e1+6+0=07      column e, and nothing carried
               c46+3=49                                               d9+7+0=16
               d49-9=40                                               c0+5+1=06      1 is carried
               e40*5=00                                               b4+2+0=06
               f00+2=02                                               ####06667      the last carry, then the digits
               ####02         the answer, in GSM8K's notation, then <eos>

Left out: weights of several sets, near duplicates, answers that are checked by running code. Needs grader.py beside
it. Run `python data.py toy` (or sums, gsm8k, math, math-500, mathinstruct, FILE.jsonl) to see a few problems.
"""

import json
import math
import os
import random
import re
import signal
import sys
import time
import zlib
from bisect import bisect_left
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path

from grader import verdict

# OpenMP's idle threads spin; on a busy machine that made a run ten times as long. Read when torch is imported, so the
# scripts import this file first.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
SEEDS = "[0, 4294967295]"


class UserError(Exception):
    """A mistake of the user's, such as a missing file: one sentence and exit status 2, no traceback."""


def option(default, help: str, within: str = "", **metadata):
    """A field of an options dataclass: its help text and, of a number, the interval that holds it, such as "(0, 1]"."""
    return field(default=default, metadata={"help": f"{help}; in {within}" if within else help, **metadata})


class Options:
    """Base of the scripts' options. Raises UserError for a number that is not within the interval of its help text."""

    def __post_init__(self):
        for f in fields(self):
            x, (_, bracketed, interval) = getattr(self, f.name), f.metadata["help"].rpartition("; in ")
            if not bracketed or x is None:
                continue
            low, high = map(float, interval[1:-1].split(","))
            closed = x == low and interval[0] == "[" or x == high and interval[-1] == "]"
            if not (low < x < high or closed):  # nan is in no interval
                raise UserError(f"--{f.name.replace('_', '-')} {x}: must be a number in {interval}")


@dataclass
class TextOptions(Options):
    """How text becomes prompts and steps; the scripts' options inherit it. A shell passes \\n as two characters."""

    prompt: str = option("Question: {question}\nAnswer:", "prompt where the tokenizer has no chat template")
    separator: str = option("\n", "what stands between two steps")
    max_prompt_tokens: int = option(1024, "longest prompt that is accepted", "[1, inf)")
    max_new_tokens: int = option(512, "longest answer; a longer one is truncated, and wrong", "[1, inf)")

    def __post_init__(self):
        super().__post_init__()
        self.prompt, self.separator = (x.replace("\\n", "\n") for x in (self.prompt, self.separator))
        if "{question}" not in self.prompt:
            raise UserError("--prompt must say where the {question} goes")
        if not self.separator:
            raise UserError("--separator must not be empty: every character would be a step")


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str  # the gold answer, or a reference solution that ends in it
    subject: str = ""  # where the data set says so, as MATH does
    level: str = ""
    source: str = ""  # the data set that it is from


# ------------------------------------------------------------------------------------------------ the embedded worlds


class Toy:
    pattern = re.compile(r"\d\d(?:[b-g][-+*]\d)+=")  # of a question
    chars = "0123456789bcdefg+-*=\n"  # the tokens, beside ####

    def question(self, rng: random.Random) -> str:
        value, letters = rng.randrange(100), "bcdefg"[: rng.randint(3, 6)]
        return f"{value:02d}" + "".join(letter + rng.choice("+-*") + str(rng.randint(2, 9)) for letter in letters) + "="

    def lines(self, question: str) -> list[str]:
        lines, value = [], int(question[:2])
        for letter, op, x in re.findall(r"([b-g])([-+*])(\d)", question):
            result = {"+": value + int(x), "-": value - int(x), "*": value * int(x)}[op] % 100
            lines.append(f"{letter}{value:02d}{op}{x}={result:02d}")
            value = result
        return lines + [f"####{value:02d}"]


class Sums:
    pattern = re.compile(r"(?:[b-h]\d\d)+=")
    chars = "0123456789bcdefgh+=\n"

    def question(self, rng: random.Random) -> str:
        letters = "bcdefgh"[: rng.randint(4, 7)]
        return "".join(f"{letter}{rng.randrange(10)}{rng.randrange(10)}" for letter in letters) + "="

    def lines(self, question: str) -> list[str]:
        lines, digits, carry = [], "", 0
        for letter, x, y in reversed(re.findall(r"([b-h])(\d)(\d)", question)):
            total = int(x) + int(y) + carry
            lines.append(f"{letter}{x}+{y}+{carry}={total:02d}")
            carry, digits = total // 10, f"{total % 10}{digits}"
        return lines + [f"####{carry}{digits}"]


WORLDS = {"toy": Toy(), "sums": Sums()}


def is_toy(question: str) -> bool:
    """Of any embedded world, toy or sums."""
    return any(world.pattern.fullmatch(question) for world in WORLDS.values())


def toy_lines(question: str) -> list[str]:
    """The one right line of each step, then the answer line: `["b41+5=46", ..., "####02"]`."""
    for world in WORLDS.values():
        if world.pattern.fullmatch(question):
            return world.lines(question)
    raise UserError(f"{question!r} is not a problem of an embedded world (such as 41b+5c*3=)")


def toy_problems(split: str, n: int, seed: int = 0, world: str = "toy") -> list[Problem]:
    """n distinct problems, in "test" if the checksum of the question is divisible by 8, else in "train": a test problem
    is unseen by construction, whatever the seeds."""
    rng, problems = random.Random(f"{split}-{seed}"), {}
    while len(problems) < n:
        question = WORLDS[world].question(rng)
        if (zlib.crc32(question.encode()) % 8 == 0) == (split == "test"):
            problems[question] = Problem(question, toy_lines(question)[-1])
    return list(problems.values())


def toy_solution(question: str, rng: random.Random, repeat: float = 0.1, max_lines: int = 13) -> str:
    """A demonstration for the warm start. After each line an earlier one is restated with probability `repeat`, again
    and again: correct but needless steps. Real LLMs restate as well, and a policy can only exploit what it explores."""
    *lines, answer = toy_lines(question)
    out = []
    for k, line in enumerate(lines):
        out.append(line)
        while rng.random() < repeat and len(out) + len(lines) - k < max_lines:
            out.append(line if rng.random() < 0.7 else rng.choice(out))
    return "\n".join(out + [answer])


def oracle(question: str, response: str, char_ends: list[int] | None = None) -> list[bool | None]:
    """Exact process labels of the embedded worlds: a step is good if it and all before it are right lines, repeated or
    not. char_ends: the steps to label, default all; None for one that ends within a line, as others may cut."""
    finished = char_ends is None or char_ends[-1:] == [len(response)]  # else what follows the last line is of no step
    lines = split_steps(response, "\n", finished)
    right, steps = set(toy_lines(question)), steps_of({"response": response, "char_ends": lines})
    labels = dict(zip(lines, accumulate((step.strip("\n") in right for step in steps), min)))  # and all before it
    return [labels.get(end) for end in (lines if char_ends is None else char_ends)]


def toy_tokenizer(world: str = "toy"):
    """One token per character, `####` one token, `<eos>` and `<pad>` apart (pad == eos would destroy the EOS mask)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", "####", *WORLDS[world].chars])}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(r"####|[\s\S]"), behavior="isolated")
    tok.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


# ------------------------------------------------------------------------------------------------ data sets


HUB = {  # name -> hub name, configuration, the split where there is but one
    "gsm8k": ("openai/gsm8k", "main", ""), "math": ("DigitalLearningGmbH/MATH-lighteval", None, ""),
    "math-500": ("HuggingFaceH4/MATH-500", None, "test"), "mathinstruct": ("TIGER-Lab/MathInstruct", None, "train"),
}
FIELDS = (("question", "answer"), ("problem", "answer"), ("problem", "solution"), ("instruction", "output"))


def load_hub(name: str, split: str):
    import datasets

    path, config, only = HUB.get(name, (name, None, ""))
    if only and only != split:
        raise UserError(f"{name} has no {split} split: choose another data set for that (in train.py by --eval-data)")
    try:
        return datasets.load_dataset(path, config, split=split)
    except Exception as error:  # the hub's client raises many kinds; all mean the same to the user
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        mend = "give a local copy instead: a .jsonl, .json or .parquet file, or a folder of them"
        raise UserError(f"cannot load the data set {path} ({reason}); {mend}") from None


def read_json(text: bytes, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None


def read_rows(name: str, split: str):
    """Yields (where, row) of a JSONL, JSON or Parquet file, or of a split of a data set: a folder with the files of
    one, as the hub keeps them, or a hub name. Raises UserError if there is none, or it cannot be read."""
    path = Path(name)
    local = path.suffix in (".jsonl", ".json", ".parquet") or path.is_absolute() or name.startswith(".")
    if local and not path.exists():
        raise UserError(f"{name}: no such file")
    if not path.is_file():
        rows = load_hub(name, split)
    elif path.suffix == ".parquet":
        from pyarrow import ArrowException, parquet  # which datasets needs

        try:
            rows = parquet.read_table(path).to_pylist()
        except ArrowException as error:
            raise UserError(f"{name}: cannot be read as Parquet ({error})".splitlines()[0]) from None
    else:
        text = path.read_bytes()
        first = text[:64].lstrip(b"\xef\xbb\xbf \t\r\n")[:1]  # behind a mark of the byte order
        if path.suffix == ".json" and first == b"[":  # one array, as MathInstruct has it
            rows = read_json(text, name)
        else:
            places = ((f"{name} line {number}", line) for number, line in enumerate(text.split(b"\n"), 1))
            yield from ((where, read_json(line, where)) for where, line in places if line.strip())
            return
    yield from ((f"{name} row {i}", row) for i, row in enumerate(rows, 1))


def to_problem(row, where: str) -> Problem:
    for q, a in FIELDS:
        if isinstance(row, dict) and q in row and a in row:
            question, answer = row[q], str(row[a]) if isinstance(row[a], str | int | float) else ""
            if not (isinstance(question, str) and question.strip() and answer.strip()):
                raise UserError(f"{where}: {q} and {a} must be text that is not empty")
            subject, level = str(row.get("type") or row.get("subject") or ""), str(row.get("level") or "")
            return Problem(question, answer, subject, level.removeprefix("Level "))
    raise UserError(f"{where}: needs the fields (question, answer) or (problem, solution | answer)")


def data_sets(names: str) -> list[str]:
    """`"math,gsm8k"` -> ["math", "gsm8k"]. Raises UserError for an empty name."""
    sets = [names] if Path(names).exists() else [name.strip() for name in names.split(",")]
    if not all(sets):
        raise UserError(f"{names!r}: every data set needs a name, as in math,gsm8k")
    return sets


def load_problems(names: str, split: str = "train", limit: int | None = None) -> list[Problem]:
    """The problems of one or several sets (`data_sets`), at most `limit` of each: an embedded world's, or the rows that
    `read_rows` finds, with two of FIELDS. Raises UserError for a set that is missing or empty, or a malformed row."""
    problems = []
    for name in data_sets(names):
        if name in WORLDS:
            found = toy_problems(split, limit or (20_000 if split == "train" else 1000), world=name)
        else:
            # MathInstruct's "program of thought" half answers in Python, which nothing here runs
            program = lambda row: isinstance(row, dict) and str(row.get("source", "")).startswith("data/PoT")
            rows = (to_problem(row, where) for where, row in read_rows(name, split) if not program(row))
            found = [*islice(rows, limit or None)]
        if not found:
            raise UserError(f"{name}: holds no problems")
        problems += [replace(p, source=name) for p in found]
    return problems


def problems_key(problems: list[Problem]) -> int:
    """A checksum of the questions and answers."""
    return zlib.crc32(repr([(p.question, p.answer) for p in problems]).encode())


# ------------------------------------------------------------------------------------------------ prompts and steps


def encode_prompts(tokenizer, problems: list[Problem], template: str, max_tokens: int) -> list[list[int]]:
    """Token ids of all prompts, by the tokenizer's chat template if it has one, else by `template`. Raises UserError if
    one is empty, or longer than max_tokens: cutting a question silently would make it unanswerable."""
    texts = [template.replace("{question}", p.question) for p in problems]
    if tokenizer.chat_template:
        system = {"role": "system", "content": SYSTEM}
        chats = [[system, {"role": "user", "content": p.question}] for p in problems]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    prompts = tokenizer(texts, add_special_tokens=not tokenizer.chat_template)["input_ids"]  # at once: ten times faster
    if too_long := [len(ids) for ids in prompts if len(ids) > max_tokens]:
        what = f"{len(too_long)} of {len(prompts)} prompts have more than {max_tokens} tokens, up to {max(too_long)}"
        raise UserError(f"{what}; raise --max-prompt-tokens, or drop them")
    if not all(prompts):
        raise UserError("a prompt has no tokens; give a --prompt template with some text")
    return prompts


def split_steps(text: str, separator: str, finished: bool = True) -> list[int]:
    """Characters at which the steps of a response end, each just behind its separator: `"a\\nb"` -> [2, 3]. A piece
    without a letter or a digit (a blank line, `\\[`, a bracket) is no step, or a policy would be paid for punctuation:
    it belongs to the step before, or, where there is none, to the one behind. What follows the last separator is a step
    only if the response is finished: a truncated step is not complete and is not judged."""
    char_ends, start = [], 0
    while start < len(text):
        cut = text.find(separator, start)
        end = len(text) if cut < 0 else cut + len(separator)
        if any(map(str.isalnum, text[start:end].removesuffix(separator))):
            if cut >= 0 or finished:
                char_ends.append(end)
        elif char_ends and (cut >= 0 or finished):
            char_ends[-1] = end
        start = end
    return char_ends


def decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@lru_cache(maxsize=500_000)
def token_text(tokenizer, i: int) -> str:
    return decode(tokenizer, [i])


def char_offsets(tokenizer, ids: list[int]) -> tuple[str, list[int]]:
    """The text of the sampled ids, and for each token the number of characters up to its end. Sampled ids need not be
    what the tokenizer would make of their text, so re-encoding cannot give it."""
    text = decode(tokenizer, ids)
    parts = [token_text(tokenizer, i) for i in ids]
    if "".join(parts) == text:
        return text, list(accumulate(map(len, parts)))
    # Byte pieces of one character, or a tokenizer that drops a leading blank: decode prefixes. A prefix that ends
    # inside a character decodes to one replacement character per byte, hence the running minimum from the end.
    offsets = [len(decode(tokenizer, ids[: t + 1])) for t in range(len(ids))]
    return text, list(accumulate(reversed(offsets), min))[::-1]


def find_steps(tokenizer, ids: list[int], separator: str, truncated: bool) -> tuple[str, list[int], list[int]]:
    """The text of a response, and of each of its K steps the end in characters (`char_ends`) and the index of its last
    token (`token_ends`), the one that holds its last character; both strictly increasing. Tokens and steps need not
    align: one token may end two steps, which then count as one. The last step of a finished response ends at EOS."""
    text, offsets = char_offsets(tokenizer, ids)
    end_at = {}  # last token of a step -> the character at which it ends
    for end in split_steps(text, separator, finished=not truncated):
        end_at[min(bisect_left(offsets, end), len(ids) - 1)] = end
    token_ends = list(end_at)
    if token_ends and not truncated:
        token_ends[-1] = len(ids) - 1
    return text, list(end_at.values()), token_ends


def steps_of(row: dict) -> list[str]:
    """The texts of an answer's steps, from its `response` and `char_ends`."""
    return [row["response"][start:end] for start, end in zip([0, *row["char_ends"]], row["char_ends"])]


def judge(tokenizer, problems: list[Problem], samples: list[list], separator: str) -> list[dict]:
    """Grade the samples (rollout.Sample) of each problem: one row an answer, in order, with the verdict on its text,
    where its steps end, and how many of them say exactly what an earlier one said."""
    rows = []
    for problem, group in zip(problems, samples):
        for sample in group:
            text, char_ends, token_ends = find_steps(tokenizer, sample.ids, separator, sample.truncated)
            kind = "truncated" if sample.truncated else verdict(problem.answer, text).kind
            row = {"question": problem.question, "response": text, "gold": problem.answer, "char_ends": char_ends}
            row |= {"verdict": kind, "correct": kind == "match", "truncated": sample.truncated}
            row |= {"steps": len(char_ends), "tokens": len(sample.ids)}
            row["repeats"] = len(char_ends) - len({step.strip() for step in steps_of(row)})
            rows.append(row | {"token_ends": token_ends, "ids": sample.ids})
    return rows


def encode_steps(tokenizer, text: str, char_ends: list[int], add_special_tokens=False) -> tuple[list[int], list[int]]:
    """A text in the ids of whatever tokenizer, and for each of `char_ends` the index of the token that holds the
    character before it: tokenizers differ, characters do not."""
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], [max(bisect_left(starts, end) - 1, 0) for end in char_ends]


# ------------------------------------------------------------------------------------------------ files and scripts


def write(path: Path, text: str) -> None:
    """Beside and moved into place: whoever is killed here leaves the old file or the new one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def whole_lines(path: Path) -> list[str]:
    """Of a file that is being written, or whose writer was killed: all but a half one at its end. Of no file, none."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]


def append(path: Path, rows: list[dict]) -> None:
    """The rows as lines of JSON, in which a number that is undefined (nan) is null."""
    clean = lambda x: None if isinstance(x, float) and not math.isfinite(x) else x
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps({k: clean(v) for k, v in row.items()}) + "\n" for row in rows)


def lock(path: Path, wait: bool = False):
    """An open file that no other process can lock until it is closed, or this process ends, however that happens.
    Raises UserError if another holds it, or waits for that one."""
    import fcntl  # not on Windows

    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise UserError(f"{path.resolve().parent} is in use by another process: choose another name") from None
        print(f"waiting for another process in {path.parent}", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def main():
    for problem in load_problems(sys.argv[1] if len(sys.argv) > 1 else "toy", limit=3):
        print(f"question  {problem.question}\nanswer    {problem.answer}\n")


def run_script(main) -> None:
    """Call main(). A user's mistake or a full disk is one sentence on stderr and status 2, Ctrl-C no traceback."""
    script = Path(sys.argv[0]).name
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # of `| head`, which has seen enough; nor a word about what is left in the buffer
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(1)  # most mistakes are seen by all ranks: let the first one speak, and torchrun stop us here
        print(f"{script}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{script}: stopped", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # die of it, so that a shell's loop over runs ends as well
        os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    run_script(main)
