r"""Speed, accuracy, random equal and different answers, and random hostile text for the grader. Run by hand:

    python tests/bench_grader.py --gsm8k gsm8k_test.jsonl --math math_test.jsonl   # the tables, about 2 minutes
    python tests/bench_grader.py --check                          # exit status 1 if a target is missed
    python tests/bench_grader.py --draws 10000                    # tests/test_grader_properties.py, longer
    python tests/bench_grader.py --fuzz 10                        # 10 minutes of hostile text
    python tests/bench_grader.py --smoke                          # a little of everything, to see that it runs

The tables set the grader beside math-verify (`pip install math-verify`): the same answers, one process, one core, by
turns in blocks, so that a drift of the machine's speed meets both; math-verify's time-outs of 5 s count. Three sets, of
pairs with known verdicts:

    gsm8k   the reference solutions, ending in `#### 18` or "The answer is 18.", against their own answer
    math    the reference solutions with one \boxed{} against their own answer
    table   EQUAL and DIFFERENT of tests/test_grader.py, both ways, and boxed; answers of 200 characters or less

In the first two every right pair has a wrong one beside it: the next problem's answer, if both are integers and differ.
"""

import argparse
import importlib.util
import json
import logging
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_grader import DIFFERENT, EQUAL
from test_grader_properties import KINDS, failures
from tqdm import tqdm

from data import UserError, read_rows, run_script
from grader import VERDICTS, extract, grade, verdict

TARGETS = {"gsm8k": 5000, "math": 3000, "table": 1000}  # answers per second
TIMES_MATH_VERIFY = {"table": 10}
SLOWEST = 1.0  # seconds that a verdict may take

# ------------------------------------------------------------------------------------------------ the three sets


def box(solution: str) -> str:
    r"""The content of the \boxed{} of a reference solution. Not grader.extract: that is to be measured."""
    content = solution.partition("\\boxed")[2]
    if content[0] != "{":  # \boxed 2
        return re.match(r" ?([^\s$]+)", content)[1]
    depth = 0
    for i, character in enumerate(content):
        depth += {"{": 1, "}": -1}.get(character, 0) if content[i - 1] != "\\" else 0
        if depth == 0:
            return content[1:i]
    raise UserError(f"a box without end: {content[:50]}")


def read(name: str, field: str) -> list[dict]:
    rows = [row for _, row in read_rows(name, "test")]
    if not rows or not all(isinstance(row, dict) and isinstance(row.get(field), str) for row in rows):
        raise UserError(f"{name}: needs the field {field} in every row")
    return rows


def with_wrong(golds: list[str], texts: list[str]) -> list[tuple[str, str, bool]]:
    """(gold, text, verdict): each text against its own answer, and against the next one, if certainly another."""
    items = []
    for i, (gold, text) in enumerate(zip(golds, texts)):
        items.append((gold, text, True))
        other = golds[(i + 1) % len(golds)]
        if all(re.fullmatch(r"-?[0-9]{1,9}", answer) for answer in (gold, other)) and int(gold) != int(other):
            items.append((other, text, False))
    return items


def gsm8k_set(name: str):
    golds, texts = [], []
    for i, row in enumerate(read(name, "answer")):
        solution, _, gold = row["answer"].partition("\n#### ")
        golds.append(gold)
        texts.append(re.sub(r"<<.*?>>", "", solution) + (f"\n#### {gold}" if i % 2 else f"\nThe answer is {gold}."))
    return with_wrong(golds, texts)


def math_set(name: str):
    rows = [row for row in read(name, "solution") if row["solution"].count("\\boxed") == 1]
    return with_wrong([row.get("answer") or box(row["solution"]) for row in rows], [row["solution"] for row in rows])


def pairs():
    for table in (EQUAL, DIFFERENT):
        for group in table.values():
            yield from ((*pair, table is EQUAL) for pair in group if max(map(len, pair)) <= 200)


def table_set(_):
    items = []
    for a, b, same in pairs():
        items += [(a, b, same), (b, a, same), (a, rf"So it is $\boxed{{{b}}}$.", same)]
    return items


# ------------------------------------------------------------------------------------------------ speed and accuracy


def math_verify():
    """(gold, text) -> bool of math-verify, None where it is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        print("math-verify is not installed, so the grader is shown alone: pip install math-verify\n")
        return None
    from math_verify import parse, verify

    logging.disable(logging.ERROR)  # its warnings about time-outs

    def judge(gold, text):  # it reads LaTeX in math mode only; a bare answer is put there
        bare = "boxed" not in text and "answer is" not in text and "####" not in text
        return verify(parse(f"\\boxed{{{gold}}}"), parse(f"\\boxed{{{text}}}" if bare else text))

    return judge


def measure(judges: dict, items: list, name: str, block: int = 50) -> dict[str, tuple[list, list]]:
    """For each judge its verdicts and its seconds, one by one. Blocks of items go by turns to the judges."""
    results = {who: ([], []) for who in judges}
    for number, start in enumerate(tqdm(range(0, len(items), block), name, unit="block", disable=None, leave=False)):
        for who in [*judges][:: -1 if number % 2 else 1]:
            found, seconds = results[who]
            for gold, text, _ in items[start : start + block]:
                begin = time.perf_counter()
                found.append(judges[who](gold, text))
                seconds.append(time.perf_counter() - begin)
    return results


def tables(args) -> list[str]:
    """Measures the sets and prints both tables. Returns a sentence for each target that is missed."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core, which child processes inherit
    peer = math_verify()
    judges = {"grader": grade, **({"math-verify": peer} if peer else {})}
    for judge in judges.values():  # what they load, loaded; worker processes started
        for gold, text in ((r"\frac{1}{\sqrt{3}}", r"\boxed{\frac{\sqrt3}{3}}"), ("x^2+2x+1", r"\boxed{(x+1)^2}")) * 3:
            judge(gold, text)
    rows, missed, errors = [], [], []
    sets = {"gsm8k": (gsm8k_set, args.gsm8k), "math": (math_set, args.math), "table": (table_set, "")}
    for name, (make, source) in sets.items():
        try:
            items = make(source)
        except UserError as error:
            print(f"{name} is left out: {error} (--{name} FILE.jsonl)\n")
            missed.append(f"{name} was not measured")
            continue
        random.Random(args.seed).shuffle(items)
        items, rates = items[: args.items], {}
        for who, (found, seconds) in measure(judges, items, name).items():
            wrong = [(gold, text, same) for (gold, text, same), said in zip(items, found) if said is not same]
            errors += [(name, *case) for case in wrong] if who == "grader" else []
            positives, ordered = sum(not same for *_, same in wrong), sorted(seconds)
            latency = [f"{1000 * ordered[int(share * (len(ordered) - 1))]:,.2f}" for share in (0.5, 0.99, 1)]
            rates[who], accuracy = len(items) / sum(seconds), f"{100 * (1 - len(wrong) / len(items)):.2f} %"
            counts = accuracy, str(positives), str(len(wrong) - positives)
            rows.append((name, who, f"{len(items):,}", f"{rates[who]:,.0f}", *counts, *latency))
        if rates["grader"] < TARGETS[name]:
            missed.append(f"{name}: {rates['grader']:,.0f} answers per second, the target is {TARGETS[name]:,}")
        times = TIMES_MATH_VERIFY.get(name)
        if times and not peer:
            missed.append(f"{name}: not compared with math-verify")
        elif times and rates["grader"] < times * rates["math-verify"]:
            missed.append(f"{name}: not {times} times as fast as math-verify")
    head = ("set", "judge", "items", "per s", "expected", "false +", "false -", "p50 ms", "p99 ms", "max ms")
    print_table(head, rows)
    for name, gold, text, same in errors[:20]:
        print(f"{name}: should be {same}: {gold[:100]!r} against {(extract(text) or text)[:100]!r}")
    return missed


def print_table(head: tuple, rows: list[tuple]) -> None:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = [cell.rjust(width) if i > 1 else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        print("  ".join(cells))
    print()


# ------------------------------------------------------------------------------------------------ random text


def draws(n: int, seed: int) -> int:
    """The property test over n draws. Returns the number of failing ones."""
    failing, begin = 0, time.perf_counter()
    for i in tqdm(range(n), unit=" draws", disable=None):
        wrong = failures(KINDS[i % len(KINDS)], f"{seed}-{i}")
        failing += bool(wrong)
        for same, gold, text in wrong:
            tqdm.write(f"{KINDS[i % len(KINDS)]} {seed}-{i}: should be {same}: {gold!r} against {text!r}")
    print(f"{n:,} draws, {failing} with failures, {n / (time.perf_counter() - begin):.0f} draws per second")
    return failing


SOUP = r"""
\frac \dfrac \frac1 \sqrt \sqrt[ \left( \right) \left\{ \right. \boxed{ \boxed \text{ \mbox{ \mathrm{ \pi \infty \pm
\cup \in \le \ge \ne \cdot \times \div \sin \cos^ \log_ \ln \exp \binom \choose \overline{ \hat{ \vec{ \sum_ \int_
\begin{pmatrix} \end{pmatrix} \begin{array}{cc} \end{array} \begin{cases} \\ & \, \! \; \% \$ \{ \} { } ( ) [ ] + - *
/ ^ _ = < > ! | ' , . : ; ? # #### $ $$ % & ~ 0 1 2 7 10 99 1.5 1,000 1e9 1e99999 x y n i e f(x) and or cm (A)
½ √ π × − ° ² ∞ ≤ ∪ ∈ ٣ é 𝟏 __import__('os').system('false') exit() ().__class__ eval('1') 9**9**9 99!
""".split()
SOUP += ["\u202e", "\ud800", "\0", "\x1b[0m", "\n", " ", "\t", "lambda: 0", "answer is ", "A: ", "factorial(999999)"]


def hostile(rng, valid):
    """A token soup, or a valid answer cut, spliced, doubled or repeated."""
    if rng.random() < 0.4:
        return rng.choice(("", " ")).join(rng.choices(SOUP, k=rng.choice((1, 2, 5, 10, 30, 100))))
    text = rng.choice(valid)
    for _ in range(rng.randint(1, 3)):
        i, j = sorted(rng.randint(0, len(text)) for _ in range(2))
        unit = rng.choice((text[i:j], rng.choice(valid), rng.choice(SOUP)))
        times = int(10 ** rng.uniform(0, 4)) if len(text) < 100 else 2
        middle = rng.choice(("", unit, unit * times))
        text = (text[:i] + middle + text[j:])[:200_000]
    return text


def plain(answer):
    """Are its braces balanced, and has it no marks of an answer? Then extraction must find it whole in a box."""
    braces = re.findall(r"[{}]", re.sub(r"\\[{}\\]", "", answer))
    depths = [braces[:i].count("{") - braces[:i].count("}") for i in range(min(len(braces), 200) + 1)]
    marked = re.search(r"\\[bf]box|boxed|#|\$|answer|A:", answer)
    return answer.strip() and len(braces) < 200 and min(depths) == depths[-1] == 0 and not marked


def fuzz_one(a, b, boxed):
    """What goes wrong in one pair (None if nothing), and the seconds of the slowest verdict."""
    safe = boxed and plain(a) and plain(b)  # of bare answers, prose is searched for an answer on one side only
    if boxed:
        a, b = f"\\boxed{{{a}}}", f"\\boxed{{{b}}}"
    kinds, seconds = [], []
    for gold, text in ((a, b), (b, a), (a, a)):
        begin = time.perf_counter()
        kinds.append(verdict(gold, text).kind)
        seconds.append(time.perf_counter() - begin)
    wrong = None
    if not set(kinds) <= set(VERDICTS):
        wrong = f"unknown verdict among {kinds}"
    elif safe and "timed out" not in kinds and (kinds[0] == "match") != (kinds[1] == "match"):
        wrong = f"not symmetric: {kinds[:2]}"
    elif safe and extract(a) and kinds[2] != "match":
        wrong = f"not equal to itself: {kinds[2]}"
    return f"{max(seconds):.2f} s for a verdict" if max(seconds) > SLOWEST else wrong, max(seconds)


def give_up(*_):
    raise TimeoutError("no verdict in 30 s")


def fuzz(minutes, seed):
    """Random hostile pairs until the time is over. Returns the number of failures."""
    valid = [answer for *pair, _ in pairs() for answer in pair]
    signal.signal(signal.SIGALRM, give_up)
    end, number, failed, slowest, worst = time.perf_counter() + 60 * minutes, 0, 0, 0.0, ""
    with tqdm(unit=" inputs", disable=None) as bar:
        while time.perf_counter() < end:
            rng = random.Random(f"{seed}-{number}")
            a, b = hostile(rng, valid), rng.choice((rng.choice(valid), hostile(rng, valid)))
            signal.alarm(30)
            try:
                wrong, seconds = fuzz_one(a, b, boxed=rng.random() < 0.5)
            except Exception as error:
                wrong, seconds = f"{type(error).__name__}: {error}", 0.0
            signal.alarm(0)
            if seconds > slowest:
                slowest, worst = seconds, f"{a[:200]!r} ({len(a)} characters) against {b[:200]!r} ({len(b)})"
            if wrong:
                failed += 1
                bar.write(f"input {seed}-{number}: {wrong[:300]}\n    {a[:500]!r}\n    {b[:500]!r}")
            number += 1
            bar.set_postfix(slowest=f"{slowest:.3f} s", failures=failed, refresh=False)
            bar.update()
    print(f"seed {seed}: {number:,} inputs, {failed} failures; slowest verdict {slowest:.3f} s, of\n{worst}")
    return failed


SAMPLES = {  # of --smoke
    "gsm8k": [{"question": "?", "answer": f"He has 2*{i}=<<2*{i}={2 * i}>>{2 * i}\n#### {2 * i}"} for i in range(4)],
    "math": [{"problem": "?", "solution": rf"So it is $\boxed{{\frac{{{i}}}{{2}}}}$."} for i in range(4)],
}


def smoke(args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in SAMPLES.items():
            file = Path(folder, f"{name}.jsonl")
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            setattr(args, name, str(file))
        tables(args)
    draws(3, args.seed)
    fuzz(0.01, args.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and accuracy of the grader beside math-verify's; random tests.")
    parser.add_argument("--gsm8k", default="gsm8k", help="a file of questions and answers; default: from the hub")
    parser.add_argument("--math", default="math", help="a file of problems and solutions; default: from the hub")
    parser.add_argument("--items", type=int, default=2500, help="at most so many items of each set")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    parser.add_argument("--draws", type=int, metavar="N", help="run the property test over N draws instead")
    parser.add_argument("--fuzz", type=float, metavar="MINUTES", help="grade random hostile text instead")
    parser.add_argument("--smoke", action="store_true", help="a little of everything, to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.smoke:
        args.items = 20
        return smoke(args)
    if args.draws or args.fuzz:
        failed = draws(args.draws or 0, args.seed) + (fuzz(args.fuzz, args.seed) if args.fuzz else 0)
        sys.exit(failed > 0)
    missed = tables(args)
    for sentence in missed if args.check else ():
        print(f"missed: {sentence}")
    sys.exit(bool(missed) and args.check)


if __name__ == "__main__":
    run_script(main)
