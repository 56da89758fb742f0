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

Several data sets make a mixture: `"mathinstruct=3,gsm8k=1"`. Training questions that an evaluation asks too are dropped.

Left out: near duplicates in other words, answers that are checked by running code.

Run `python data.py toy` (or sums, gsm8k, math, math-500, mathinstruct, FILE.jsonl) to see a few problems.
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
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


class UserError(Exception):
    """A mistake of the user's (a missing file, a wrong model): one sentence, and exit status 2 instead of a traceback."""


def option(default, help: str, **more):
    """A field of an options dataclass, with its help text."""
    return field(default=default, metadata={"help": help, **more})


@dataclass
class TextOptions:
    """How text becomes prompts and steps; the scripts' options inherit it. A shell passes \\n as two characters."""

    prompt: str = option("Question: {question}\nAnswer:", "prompt where the tokenizer has no chat template")
    separator: str = option("\n", "what stands between two steps")
    max_prompt_tokens: int = option(1024, "longest prompt that is accepted")
    max_new_tokens: int = option(512, "longest answer; a longer one is truncated, and wrong")

    def __post_init__(self):
        self.prompt, self.separator = (x.replace("\\n", "\n") for x in (self.prompt, self.separator))
        if "{question}" not in self.prompt:
            raise UserError("--prompt must say where the {question} goes")
        if not self.separator:
            raise UserError("--separator must not be empty: every character would be a step")
        if min(self.max_prompt_tokens, self.max_new_tokens) < 1:
            raise UserError("--max-prompt-tokens and --max-new-tokens must be at least 1")


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str  # the gold answer, or a reference solution that ends in it
    subject: str = ""  # where the data set says so, as MATH does
    level: str = ""
    source: str = ""  # the data set that it is from, in a mixture


# ------------------------------------------------------------------------------------------------ the embedded worlds


def chain_question(rng: random.Random) -> str:
    value = rng.randrange(100)
    letters = "bcdefg"[: rng.randint(3, 6)]
    return f"{value:02d}" + "".join(letter + rng.choice("+-*") + str(rng.randint(2, 9)) for letter in letters) + "="


def chain_lines(question: str) -> list[str]:
    lines, value = [], int(question[:2])
    for letter, op, operand in re.findall(r"([b-g])([-+*])(\d)", question):
        x = int(operand)
        result = (value + x if op == "+" else value - x if op == "-" else value * x) % 100
        lines.append(f"{letter}{value:02d}{op}{operand}={result:02d}")
        value = result
    return lines + [f"####{value:02d}"]


def sum_question(rng: random.Random) -> str:
    letters = "bcdefgh"[: rng.randint(4, 7)]
    return "".join(f"{letter}{rng.randrange(10)}{rng.randrange(10)}" for letter in letters) + "="


def sum_lines(question: str) -> list[str]:
    lines, digits, carry = [], "", 0
    for letter, x, y in reversed(re.findall(r"([b-h])(\d)(\d)", question)):
        total = int(x) + int(y) + carry
        lines.append(f"{letter}{x}+{y}+{carry}={total:02d}")
        carry, digits = total // 10, f"{total % 10}{digits}"
    return lines + [f"####{carry}{digits}"]


@dataclass(frozen=True)
class World:
    pattern: re.Pattern  # of a question
    chars: str  # the tokens, beside ####
    question: Callable[[random.Random], str]
    lines: Callable[[str], list[str]]  # of a question: the one right line of each step, then the answer


WORLDS = {
    "toy": World(re.compile(r"\d\d(?:[b-g][-+*]\d)+="), "0123456789bcdefg+-*=\n", chain_question, chain_lines),
    "sums": World(re.compile(r"(?:[b-h]\d\d)+="), "0123456789bcdefgh+=\n", sum_question, sum_lines),
}


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
    """n distinct problems. A question belongs to "test" if its checksum is divisible by 8, else to "train": a test
    problem is unseen by construction, whatever the seeds."""
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


def oracle(question: str, response: str) -> list[bool]:
    """Exact process labels of the embedded worlds: step k is good if it and all steps before it are right lines of the
    problem. A repeated right line is good: correct, and needless."""
    right, ends = set(toy_lines(question)), split_steps(response, "\n")
    lines = [response[start:end].strip("\n") for start, end in zip([0, *ends], ends)]
    return [*accumulate((line in right for line in lines), min)]


def oracle_at(question: str, response: str, cuts: list[int]) -> list[bool | None]:
    """`oracle` of the steps that end at these characters; None where no line ends, for others may cut elsewhere."""
    right = dict(zip(split_steps(response, "\n"), oracle(question, response)))
    return [right.get(cut) for cut in cuts]


def toy_tokenizer(world: str = "toy"):
    """One token per character, `####` one token, `<eos>` and `<pad>` apart (pad == eos would destroy the EOS mask)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>"]
    vocab = {token: i for i, token in enumerate(special + ["####"] + list(WORLDS[world].chars))}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(r"####|[\s\S]"), behavior="isolated")
    tok.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


# ------------------------------------------------------------------------------------------------ data sets


HUB = {  # name -> (hub name, configuration)
    "gsm8k": ("openai/gsm8k", "main"),
    "math": ("DigitalLearningGmbH/MATH-lighteval", None),
    "math-500": ("HuggingFaceH4/MATH-500", None),
    "mathinstruct": ("TIGER-Lab/MathInstruct", None),
}
ONLY = {"math-500": "test", "mathinstruct": "train"}  # the only split that they have
FIELDS = (("question", "answer"), ("problem", "answer"), ("problem", "solution"), ("instruction", "output"))


def read_jsonl(path: Path):
    """Yields ("FILE line 3", row) for each line that is not blank."""
    with open(path, encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path} line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number}: not JSON ({error.msg})") from None
        except RecursionError:
            raise UserError(f"{path} line {number}: nested too deeply") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text") from None


def read_array(path: Path):
    """A .json file: one array, as MathInstruct has it, or in truth JSONL."""
    with open(path, "rb") as file:
        array = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        try:
            file.seek(0)
            rows = json.load(file) if array else []
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error})") from None
    if not array:
        yield from read_jsonl(path)
    yield from ((f"{path} row {i}", row) for i, row in enumerate(rows, 1))


def load_hub(name: str, split: str):
    import datasets

    path, config = HUB.get(name, (name, None))
    if ONLY.get(name, split) != split:
        raise UserError(f"{name} has no {split} split: choose another data set for that (in train.py by --eval-data)")
    try:
        return datasets.load_dataset(path, config, split=split)
    except Exception as error:  # the hub's client raises many kinds; all mean the same to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        mend = "give a local copy instead: a .jsonl, .json or .parquet file, or a folder of them"
        raise UserError(f"cannot load the data set {path} ({reason}); {mend}") from None


def read_rows(name: str, split: str):
    """Yields (where, row) of a JSONL, JSON or Parquet file, or of a split of a data set: a folder with the files of one, as
    the hub keeps them, or a hub name. Raises UserError if there is none, or it cannot be read."""
    path = Path(name)
    local = path.suffix in (".jsonl", ".json", ".parquet") or path.is_absolute() or name.startswith(".")
    if local and not path.exists():
        raise UserError(f"{name}: no such file")
    if path.suffix == ".parquet":
        from pyarrow import ArrowException, parquet  # which datasets needs

        try:
            rows = parquet.read_table(path).to_pylist()
        except ArrowException as error:
            raise UserError(f"{name}: cannot be read as Parquet ({str(error).splitlines()[0]})") from None
    elif path.is_file():
        yield from read_array(path) if path.suffix == ".json" else read_jsonl(path)
        return
    else:
        rows = load_hub(name, split)
    yield from ((f"{name} row {i}", row) for i, row in enumerate(rows, 1))


def to_problem(row: dict, where: str) -> Problem:
    for q, a in FIELDS:
        if isinstance(row, dict) and q in row and a in row:
            if isinstance(row[q], str) and isinstance(row[a], str | int | float) and row[q].strip() and str(row[a]).strip():
                subject, level = row.get("type") or row.get("subject") or "", str(row.get("level") or "")
                return Problem(row[q], str(row[a]), str(subject), level.removeprefix("Level "))
            raise UserError(f"{where}: {q} and {a} must be text that is not empty")
    raise UserError(f"{where}: needs the fields (question, answer) or (problem, solution | answer)")


def load_problems(name: str, split: str = "train", limit: int | None = None) -> list[Problem]:
    """Problems by name: `toy`, `sums`, `gsm8k`, `math`, `math-500`, `mathinstruct`, or whatever `read_rows` reads, with the
    fields (question, answer), (problem, answer | solution) or (instruction, output).

    Raises UserError if there is no such file or data set, a row is malformed, or nothing is left."""
    if name in WORLDS:
        return toy_problems(split, limit or (20_000 if split == "train" else 1000), world=name)
    # MathInstruct's "program of thought" half answers in Python, which nothing here runs.
    program = lambda row: isinstance(row, dict) and str(row.get("source", "")).startswith("data/PoT")
    found = (to_problem(row, where) for where, row in read_rows(name, split) if not program(row))
    problems = [*islice(found, limit or None)]
    if not problems:
        raise UserError(f"{name}: holds no problems")
    return problems


def mixture(names: str) -> dict[str, float | None]:
    """`"math=2,gsm8k"` -> {"math": 2.0, "gsm8k": None}. Raises UserError for a weight that is no positive number."""
    if Path(names).exists():
        return {names: None}
    weights = {}
    for part in names.split(","):
        weighted = "=" in part and not Path(part).exists()
        name, equals, weight = part.strip().rpartition("=") if weighted else (part.strip(), "", "")
        try:
            weights[name] = float(weight) if equals else None
        except ValueError:
            raise UserError(f"{names}: the weight {weight!r} is not a number; write NAME=WEIGHT,NAME=WEIGHT") from None
        if not name or equals and not 0 < weights[name] < float("inf"):
            raise UserError(f"{names}: every data set needs a name, and a weight, if it has one, above 0")
    if None in weights.values() and any(weights.values()):
        raise UserError(f"{names}: give every data set a weight, or none of them, who then count by their size")
    return weights


def load_mixture(names: str, split: str, limit: int | None = None) -> tuple[list[Problem], list[tuple[int, float]]]:
    """The problems of one or several data sets, one after the other, at most `limit` of each; and of each data set how many
    there are, and its weight: how many there are, where none was given."""
    problems, sizes = [], []
    for name, weight in mixture(names).items():
        found = [replace(p, source=name) for p in load_problems(name, split, limit)]
        problems += found
        sizes.append((len(found), weight or len(found)))
    return problems, sizes


def deal(counts: list[int], places: int, weights: list[float]) -> list[int]:
    """Places for each weight, in all, after `places` more: each goes to the weight that would be furthest behind without it,
    so that the counts stay about as near to their shares as whole numbers can, and none ever shrinks."""
    counts, total = [*counts], sum(weights)
    for place in range(sum(counts) + 1, sum(counts) + places + 1):
        counts[max(range(len(weights)), key=lambda i: weights[i] / total * place - counts[i])] += 1
    return counts


def draw(problems: list[Problem], sizes: list[tuple[int, float]], count: int, seed: int) -> list[Problem]:
    """`count` random problems of a mixture, of each data set its share, as far as it has as many."""
    rng, rest, out = random.Random(seed), iter(problems), []
    for (n, _), share in zip(sizes, deal([0] * len(sizes), count, [weight for _, weight in sizes])):
        out += rng.sample([*islice(rest, n)], min(share, n))
    return rng.sample(out, len(out))


def normalised(question: str) -> str:
    """A question without case, spacing around signs, dollar signs, quotes, and stops and commas that are not within a
    number: little enough that 2+3 and 2-3, 1.5 and 15, .5 and 5, 3 1/2 and 31/2 stay different questions."""
    text = question.casefold().replace("\\dfrac", "\\frac")
    text = re.sub(r"\\(?:left|right|displaystyle)(?![a-z])|\\[,;:! ]|(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"""[$~?;:,"`‘’“”]|(?<![a-z)])'|'(?![\w(])|\.(?!\d)""", " ", text)
    return re.sub(r"\s*([^\w\s.])\s*", r"\1", " ".join(text.split()))


def drop_known(problems: list[Problem], known: list[Problem]) -> tuple[list[Problem], int, int]:
    """Those whose question is not among the known ones; how many were dropped that are equal to the letter, and how many
    more that are equal when `normalised`."""
    exact, alike = {p.question for p in known}, {normalised(p.question) for p in known}
    other = [p for p in problems if p.question not in exact]
    kept = [p for p in other if normalised(p.question) not in alike]
    return kept, len(problems) - len(other), len(other) - len(kept)


# ------------------------------------------------------------------------------------------------ prompts and steps


def encode_prompts(tokenizer, problems: list[Problem], template: str, max_tokens: int) -> list[list[int]]:
    """Token ids of all prompts: by the tokenizer's chat template where it has one, else by the plain `template`. Raises
    UserError if one is empty or longer than max_tokens: cutting a question silently would make it unanswerable."""
    chat = bool(tokenizer.chat_template)
    if chat:
        system = {"role": "system", "content": SYSTEM}
        chats = [[system, {"role": "user", "content": p.question}] for p in problems]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    else:
        texts = [template.replace("{question}", p.question) for p in problems]
    prompts = tokenizer(texts, add_special_tokens=not chat)["input_ids"]  # all at once: a tenth of the time
    longest = max(prompts, key=len)
    if len(longest) > max_tokens:
        raise UserError(
            f"{sum(len(p) > max_tokens for p in prompts)} of {len(prompts)} prompts are longer than the limit of "
            f"{max_tokens} tokens (the longest has {len(longest)}); raise --max-prompt-tokens or drop them"
        )
    if not all(prompts):
        raise UserError("a prompt has no tokens; give a --prompt template with some text")
    return prompts


def split_steps(text: str, separator: str, finished: bool = True) -> list[int]:
    """Character offsets at which the steps of a response end, each just behind its separator.

    Pieces without text (a doubled separator) belong to the step before. What follows the last separator is a step only
    if the response is finished: a truncated step is not complete and is not judged. `"a\\nb"` -> [2, 3]."""
    ends, start = [], 0
    while start < len(text):
        cut = text.find(separator, start)
        end = len(text) if cut < 0 else cut + len(separator)
        if text[start:end].removesuffix(separator).strip():
            if cut >= 0 or finished:
                ends.append(end)
        elif ends:
            ends[-1] = end
        start = end
    return ends


def decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@lru_cache(maxsize=500_000)
def token_text(tokenizer, i: int) -> str:
    return decode(tokenizer, [i])


def token_ends(tokenizer, ids: list[int]) -> tuple[str, list[int]]:
    """The text of the sampled ids, and for each token the number of characters up to its end.

    Sampled ids need not be what the tokenizer would make of their text, so re-encoding cannot give the offsets."""
    text = decode(tokenizer, ids)
    parts = [token_text(tokenizer, i) for i in ids]
    if "".join(parts) == text:
        return text, list(accumulate(map(len, parts)))
    # Byte pieces of one character, or a tokenizer that drops a leading blank: decode prefixes. A prefix that ends inside a
    # character decodes to one replacement character per byte, hence the running minimum from the end.
    ends = [len(decode(tokenizer, ids[: t + 1])) for t in range(len(ids))]
    return text, list(accumulate(reversed(ends), min))[::-1]


def find_steps(tokenizer, ids: list[int], separator: str, truncated: bool) -> tuple[str, list[int], list[int]]:
    """The text of a response, and of each of its K steps the end in characters and the index of its last token; both
    strictly increasing.

    A step's last token is the one that holds its last character; tokens and steps need not align, so one token may end
    two steps, which then count as one. The last step of a finished response ends at its last token (EOS)."""
    text, ends = token_ends(tokenizer, ids)
    cuts = split_steps(text, separator, finished=not truncated)
    cut_at = {min(bisect_left(ends, cut), len(ids) - 1): cut for cut in cuts}  # by last token; of two steps the second's
    steps = [*cut_at]
    if steps and not truncated:
        steps[-1] = len(ids) - 1
    return text, [*cut_at.values()], steps


def encode_steps(tokenizer, text: str, cuts: list[int], add_special_tokens: bool = False) -> tuple[list[int], list[int]]:
    """A text in the ids of whatever tokenizer, and for each character offset in `cuts` the index of the token that holds
    the character before it: tokenizers differ, characters do not."""
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], [max(bisect_left(starts, cut) - 1, 0) for cut in cuts]


# ------------------------------------------------------------------------------------------------ files and scripts


def write(path: Path, text: str) -> None:
    """Beside and moved into place: whoever is killed here leaves the old file or the new one."""
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def whole_lines(path: Path) -> list[str]:
    """Of a file that is being written, or whose writer was killed: all but a half one at its end. Of no file, none."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]


def append(path: Path, rows: list[dict]) -> None:
    """All rows as lines of JSON, or none if the disk is full. Numbers that are not finite become null, which JSON knows."""
    clean = lambda x: None if isinstance(x, float) and not math.isfinite(x) else x
    left = "".join(json.dumps({k: clean(v) for k, v in row.items()}) + "\n" for row in rows).encode()
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            while left:  # a full disk takes a part, and complains at the next
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            raise


def main():
    for problem in load_problems(sys.argv[1] if len(sys.argv) > 1 else "toy", limit=3):
        print(f"question  {problem.question}\nanswer    {problem.answer}\n")


def run_script(main) -> None:
    """Call a script's main(). A mistake of the user's, or a full disk, becomes one sentence on stderr and exit status 2;
    Ctrl-C ends the process without a traceback."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # of `| head`, which has seen enough: nothing to say, nor at the end about what is left unread
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(1)  # most mistakes are seen by all ranks: the first one has spoken, and torchrun stops us here
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: stopped", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # die of it, so that a shell's loop over runs ends as well
        os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    run_script(main)
