"""Evaluation: greedy, sampled, pass@k, majority vote, best-of-N and weighted votes; of reward models too; runs compared.

    python eval.py --model runs/NAME --samples 16 --prm DIR                   # one model: a run, a folder or a hub name
    python eval.py --model DIR --data math,gsm8k,FILE.jsonl --samples 64 --prm Qwen/Qwen2.5-Math-PRM-7B
    python eval.py --prm DIR --processbench gsm8k,math                        # the first wrong step
    python eval.py --prm DIR --orm DIR --pairs FILE.jsonl                     # chosen against rejected
    python eval.py --runs runs/A runs/B --figure curves.png
    python eval.py --claim all                                                # the README's, over what train.py --sweep made
    python eval.py show runs/NAME --html page.html                            # what each step of an answer was paid

Figures come with 95 % intervals by bootstrap over problems, the unit that was drawn. pass@k is the unbiased estimate
1 - C(n-c, k) / C(n, k) of c right answers among n (arXiv 2107.03374); votes and best-of-k are means over the n / k groups
of k answers. Votes count answers that the grader holds equal as one; a weighted vote adds up the reward model's scores
instead of counting. A PRM's step scores are reduced to one number by their last, minimum, mean or product. A truncated
answer is wrong and has no vote. Answers and scores are written as they come, and the same command goes on from them.
Over runs of several seeds figures are means with 95 % intervals of Student's t, the run being the unit.

Left out: few-shot prompts, tools, reward models that do not fit one GPU.
"""

import json
import math
import os
import random
import re
import subprocess
import sys
import zlib
from collections import defaultdict
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from io import StringIO
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from transformers import HfArgumentParser

import prm
from data import (
    Problem, TextOptions, UserError, encode_prompts, find_steps, is_toy, load_hub, load_problems, mixture, option, oracle_at,
    read_rows, run_script, split_steps, toy_lines, whole_lines, write,
)  # fmt: skip
from grader import extract, grade, verdict
from model import DTYPES, eos_ids, gather, load_causal_lm, load_tokenizer, on_rank_0, start_processes, watching
from prm import FORMATS
from rewards import BASELINES, PROCESS, REWARDS, refine
from rollout import Sample, as_sampler, rollout

# ------------------------------------------------------------------------------------------------ answers


def judge(tokenizer, problems: list[Problem], samples: list[list[Sample]], separator: str) -> list[dict]:
    """One dictionary per answer, in order: text, right or wrong, steps, tokens, exact repeats of a step."""
    rows = []
    for problem, group in zip(problems, samples):
        for s in group:
            text, cuts, ends = find_steps(tokenizer, s.ids, separator, s.truncated)
            steps = [step.strip() for step in text.split(separator) if step.strip()]
            kind = "truncated" if s.truncated else verdict(problem.answer, text).kind
            rows.append({
                "question": problem.question, "response": text, "gold": problem.answer,
                "verdict": kind, "correct": kind == "match", "truncated": s.truncated, "steps": len(ends),
                "tokens": len(s.ids), "repeats": len(steps) - len(set(steps)), "cuts": cuts, "ends": ends, "ids": s.ids,
            })  # fmt: skip
    return rows


def answer(
    model, tokenizer, problems: list[Problem], indices, prompt: str, separator: str, *, max_new_tokens: int,
    temperature: float = 1.0, n: int = 1, slots: int = 256, seed: int = 0, progress="",
) -> list[dict]:  # fmt: skip
    """n answers to each of the problems with these indices, in order. model: a causal LM or a Sampler of one."""
    sampler, chosen = as_sampler(model), [problems[i] for i in indices]
    prompts = encode_prompts(tokenizer, chosen, prompt, 1 << 30) if chosen else []
    samples = rollout(
        sampler, prompts, n, max_new_tokens=max_new_tokens, eos_ids=eos_ids(sampler.model, tokenizer),
        temperature=temperature, slots=slots, seeds=[seed * 1_000_003 + i for i in indices], progress=progress,
    )  # fmt: skip
    rows = judge(tokenizer, chosen, samples, separator)
    return [{"index": indices[k // n], **row} for k, row in enumerate(rows)]


def summarise(rows: list[dict], n: int) -> dict:
    """Means over the answers; stderr is that of the mean over problems, each with n answers."""
    correct = torch.tensor([row["correct"] for row in rows], dtype=torch.float64).view(-1, n).mean(1)
    result = {"accuracy": correct.mean().item(), "stderr": correct.std(correction=0).item() / len(correct) ** 0.5}
    for key in ("steps", "tokens", "repeats", "truncated"):
        result[key] = sum(row[key] for row in rows) / len(rows)
    return result


def evaluate(
    model, tokenizer, problems: list[Problem], prompt: str, separator: str, *, n: int = 1, rank: int = 0, world: int = 1,
    progress: str = "", **more,
) -> tuple[dict, list[dict]]:  # fmt: skip
    """Summary over all problems, and the answers: n for each problem, in order; `more` as for `answer`."""
    mine = range(rank, len(problems), world)
    rows = answer(model, tokenizer, problems, mine, prompt, separator, n=n, progress="" if rank else progress, **more)
    rows = sorted(gather(rows), key=lambda row: row["index"])
    return summarise(rows, n), rows


# ------------------------------------------------------------------------------------------------ choosing among answers


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that k of the n answers, drawn without replacement, hold a right one."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def same_answers(answers: list[str | None]) -> list[int | None]:
    """For each answer the place of the first one that the grader holds equal to it; None where there is no answer."""
    firsts = {}
    for i, text in enumerate(answers):
        if text is not None and text not in firsts:
            firsts[text] = next((place for other, place in firsts.items() if grade(other, text)), i)
    return [firsts.get(text) for text in answers]


def vote(votes: list[int | None], weights: list[float]) -> int | None:
    """The candidate with the largest sum of weights, the first of equal ones."""
    total = defaultdict(float)
    for candidate, weight in zip(votes, weights):
        if candidate is not None:
            total[candidate] += weight
    return max(total, key=total.get) if total else None


AGGREGATES = {"last": lambda s: s[-1], "min": min, "mean": lambda s: sum(s) / len(s), "product": math.prod}


def voted(correct: list[bool], votes: list[int | None], weights: list[float], k: int) -> float:
    """Share of the groups of k answers to one problem in which the candidate that is voted for is right."""
    groups = [slice(i, i + k) for i in range(0, len(correct) // k * k, k)]
    chosen = [vote(votes[group], weights[group]) for group in groups]
    right = [x is not None and (True, x) in zip(correct[group], votes[group]) for group, x in zip(groups, chosen)]
    return sum(right) / len(groups)


def best_of(correct: list[bool], weights: list[float], k: int) -> float:
    """Share of the groups of k answers in which the one of the largest weight is right: each is its own candidate."""
    return voted(correct, [*range(len(correct))], weights, k)


def measures(greedy: list[dict], rows: list[dict], n: int, weights: dict[str, list[list[float]]]) -> dict[str, Tensor]:
    """Each figure as its value for every problem (P,): greedy and sampled accuracy; of k = 1, 2, 4, ... n answers pass@k,
    majority, and best-of-k and weighted vote by each way of weighing: the n weights of every problem."""
    groups = [rows[i : i + n] for i in range(0, len(rows), n)]
    correct = [[row["correct"] for row in group] for group in groups]
    out = {"greedy accuracy": [float(row["correct"]) for row in greedy], "sampled accuracy": [sum(c) / n for c in correct]}
    ks = sorted({2**e for e in range(n.bit_length())} | {n}) if n > 1 else []
    votes = [[row["vote"] for row in group] for group in groups]
    for k in ks:
        out[f"pass@{k}"] = [pass_at_k(n, sum(c), k) for c in correct]
    for k in ks[1:]:
        out[f"majority of {k}"] = [voted(c, v, [1.0] * n, k) for c, v in zip(correct, votes)]
    for way, by in weights.items():
        for k in ks[1:]:
            out[f"best of {k} by {way}"] = [best_of(c, w, k) for c, w in zip(correct, by)]
            out[f"vote of {k} by {way}"] = [voted(c, v, w, k) for c, v, w in zip(correct, votes, by)]
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in out.items()}


def bootstrap(values: Tensor, resamples: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of the values (P,) and its 95 % interval over resampled problems."""
    generator, P = torch.Generator().manual_seed(seed), len(values)
    means = values[torch.randint(P, (resamples, P), generator=generator)].mean(1)  # (resamples,)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return values.mean().item(), low, high


# ------------------------------------------------------------------------------------------------ reward models


def form_of(o: "Options", kind: str) -> str:
    """How the --prm or --orm reads. Raises UserError for an --orm that is a PRM."""
    form = prm.find_format(getattr(o, kind), o.prm_format if kind == "prm" else "")
    if kind == "orm" and form != "own":
        raise UserError(f"--orm {o.orm}: a PRM; give it as --prm, whose last step is one of the ways to judge")
    return form


class Scorer:
    """A reward model that scores answers: rows with question, response, cuts, truncated."""

    def __init__(self, o: "Options", kind: str, device):
        self.o, self.kind, self.path, self.device = o, kind, getattr(o, kind), device
        form = form_of(o, kind)
        self.read = prm.Reader(self.path, form, o.prompt)
        self.model = prm.load_reward_model(self.path, DTYPES[o.dtype], device, form)

    def scores(self, rows: list[dict]) -> list[list[float]]:
        """Of each answer the scores of its steps, or its outcome score alone."""
        batch, ends = self.read(rows)
        plan = batch.plan([i for i, ids in enumerate(batch.responses) if ids], 16384)
        if self.kind == "orm":
            found = prm.score_outcomes(self.model, batch, plan, self.device)[:, None]  # (B, 1)
            mask = torch.ones_like(found, dtype=torch.bool)
        else:
            places, mask = prm.pad_steps(ends)
            found = prm.score_steps(self.model, batch, places, plan, self.device)  # (B, K)
        if not found[mask].isfinite().all():
            raise UserError(f"{self.path}: gives scores that are not finite: train it anew, or give another")
        return [s[m].tolist() for s, m in zip(found, mask)]


def ways(kind: str, scores: list[list[float]]) -> dict[str, list[float]]:
    """One number for each answer, in each way of reducing its scores. An answer without a step gets 0."""
    if kind == "orm":
        return {"ORM": [s[0] for s in scores]}
    return {f"PRM {name}": [f(s) if s else 0.0 for s in scores] for name, f in AGGREGATES.items()}


def first_wrong(scores: list[float], threshold: float) -> int:
    """ProcessBench's prediction: index of the first step below the threshold, -1 if there is none."""
    return next((k for k, score in enumerate(scores) if score < threshold), -1)


def process_bench(name: str, scorer: Scorer, o: "Options", rank: int, world: int) -> dict[str, float]:
    """First wrong step (arXiv 2412.06559): % found exactly among the solutions with one, % passed among those without, and
    their harmonic mean F1. name: a split of Qwen/ProcessBench, or a file in its format."""
    local = Path(name).suffix or "/" in name or Path(name).exists()
    found = read_rows(name, "test") if local else enumerate(load_hub("Qwen/ProcessBench", name), 1)
    rows, labels = [], []
    for where, row in found:
        row = row if isinstance(row, dict) else {}
        text, steps, label = (row.get(k) for k in ("problem", "steps", "label"))
        listed = isinstance(text, str) and isinstance(steps, list) and steps and all(isinstance(x, str) for x in steps)
        if not (listed and isinstance(label, int) and -1 <= label < len(steps)):
            raise UserError(f"{where}: needs problem, steps (texts) and label (a step's index or -1), as in ProcessBench")
        rows += prm.solution(text, steps, [0.0] * len(steps), o.separator, finished=True)
        labels.append(label)
    if not rows:
        raise UserError(f"{name}: holds no solutions")
    mine = range(rank, len(rows), world)
    guesses = [first_wrong(s, o.threshold) for s in scorer.scores([rows[i] for i in mine])] if mine else []
    guesses = dict(gather([*zip(mine, guesses)]))
    hits = [guesses[i] == label for i, label in enumerate(labels)]
    share = lambda wrong: [h for h, label in zip(hits, labels) if (label >= 0) == wrong]
    wrong, right = (100 * sum(x) / max(len(x), 1) for x in (share(True), share(False)))
    f1 = 2 * wrong * right / (wrong + right) if wrong + right else 0.0
    return {"erroneous": wrong, "correct": right, "F1": f1, "solutions": len(hits)}


def answer_row(question: str, response: str, o: "Options") -> dict:
    return {"question": question, "response": response, "cuts": split_steps(response, o.separator), "truncated": False}


def pairs_accuracy(name: str, scorers: list[Scorer], o: "Options", rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    """In the manner of RewardBench: for each way of judging and each subset, whether the chosen answer scored above the
    rejected one (P,); a tie counts as wrong."""
    pairs = [*read_rows(name, "filtered")]
    texts = lambda row: isinstance(row, dict) and all(isinstance(row.get(k), str) for k in ("prompt", "chosen", "rejected"))
    if missing := [where for where, row in pairs if not texts(row)]:
        raise UserError(f"{missing[0]}: needs the texts prompt, chosen and rejected, as RewardBench has them")
    if not pairs:
        raise UserError(f"{name}: holds no pairs")
    mine, wins = range(rank, len(pairs), world), {}
    rows = [answer_row(pairs[i][1]["prompt"], pairs[i][1][side], o) for i in mine for side in ("chosen", "rejected")]
    for scorer in scorers:
        for way, x in ways(scorer.kind, scorer.scores(rows) if rows else []).items():
            wins[way] = dict(gather([(i, x[2 * j] > x[2 * j + 1]) for j, i in enumerate(mine)]))
    subsets = [str(row.get("subset", "all")) for _, row in pairs]
    inside = {s: [i for i, subset in enumerate(subsets) if subset == s] for s in dict.fromkeys(subsets)}
    return {way: {s: torch.tensor([w[i] for i in inside[s]]).double() for s in inside} for way, w in wins.items()}


# ------------------------------------------------------------------------------------------------ tables and figures


# The paper's own figures, by model and reward ("" before training): data set -> accuracy, (greedy, sampled).
PAPER = {
    ("qwen2-1.5b-instruct", ""): {"math": (24.90, 16.79)},
    ("qwen2-1.5b-instruct", "success"): {"math": (30.58, 27.05)},
    ("qwen2-1.5b-instruct", "orm"): {"math": (30.57, 27.12)},
    ("qwen2-1.5b-instruct", "prm"): {"math": (11.16, 14.68)},
    ("qwen2-1.5b-instruct", "clip"): {"math": (30.30, 28.40)},
    ("qwen2-1.5b-instruct", "delta"): {"math": (30.68, 27.96)},
    ("qwen2-1.5b-instruct", "clip-delta"): {"math": (31.44, 28.20)},
    ("qwen2-math-1.5b-instruct", ""): {"math": (69.98, None)},
    ("qwen2-math-1.5b-instruct", "clip-delta"): {"math": (70.94, None)},
    ("qwen2.5-math-1.5b-instruct", ""): {"math": (76.00, None)},
    ("qwen2.5-math-1.5b-instruct", "clip-delta"): {"math": (76.78, None)},
    ("qwen2-math-7b-instruct", ""): {"math": (75.30, None)},
    ("qwen2-math-7b-instruct", "clip-delta"): {"math": (76.00, None)},
    ("qwen2.5-math-7b-instruct", ""): {"math": (83.30, 52.76), "gsm8k": (95.60, 80.74)},
    ("qwen2.5-math-7b-instruct", "clip-delta"): {"math": (83.38, 81.22), "gsm8k": (95.60, 95.07)},
}


def short(name: str) -> str:
    """`math` for math, DIR/math.jsonl and DIR/math_test.jsonl."""
    return Path(name).stem.removesuffix("_test") if Path(name).suffix else name.replace("/", "-")


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, two-sided, n = 2 to 10 and more


def interval(values: list[float]) -> tuple[float, float]:
    """Mean of independent runs, and half the width of its 95 % interval; 0 for a single one, of which nothing is known."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, 0.0
    deviation = (sum((x - mean) ** 2 for x in values) / (n - 1)) ** 0.5
    return mean, T95[min(n, 10) - 2] * deviation / n**0.5


def percent(bounds: tuple[float, float, float]) -> str:
    """A mean and its interval."""
    return "{:.1f} ({:.1f} to {:.1f})".format(*(100 * x for x in bounds))


def of_k(measure: str) -> tuple[str, int]:
    """`best of 4 by ORM` -> ("best of k by ORM", 4); k is 0 where a measure has none."""
    found = re.match(r"(pass@|(?:majority|best|vote) of )(\d+)(.*)", measure)
    return (f"{found[1]}k{found[3]}", int(found[2])) if found else (measure, 0)


def results_table(results: dict[str, dict[str, list[float]]], sizes: dict[str, int], paper: dict, n: int) -> str:
    """Figures (mean, low, high) by data set, one beside the other, and the paper's beside ours where it has them."""
    heads, columns = ["% (95 % interval)"], []
    for name, figures in results.items():
        heads.append(f"{name}, {sizes[name]} problems")
        columns.append({m: percent(x) for m, x in figures.items()})
        if name in paper:
            heads.append("the paper's")
            both = zip(("greedy accuracy", "sampled accuracy"), paper[name])
            columns.append({measure: f"{x:.2f}" for measure, x in both if x is not None})
    names = dict.fromkeys(measure for figures in results.values() for measure in figures if of_k(measure)[1] in (0, n))
    return markdown(heads, [[measure, *(column.get(measure, "") for column in columns)] for measure in names])


def over_k(figures: dict[str, list[float]], name: str) -> str:
    """How choosing among k answers grows with k; nothing where there is one answer."""
    cells = {of_k(measure): f"{100 * mean:.1f}" for measure, (mean, *_) in figures.items() if of_k(measure)[1]}
    ks = sorted({k for _, k in cells})
    rows = [[method, *(cells.get((method, k), "") for k in ks)] for method in dict.fromkeys(method for method, _ in cells)]
    return markdown([f"{name}, %", *(f"k = {k}" for k in ks)], rows) if rows else ""


def breakdown(problems: list[Problem], values: dict[str, Tensor], name: str) -> str:
    """The same figures by subject and by level; nothing where the data set has neither."""
    rows = []
    for kind in ("subject", "level"):
        groups = sorted({getattr(p, kind) for p in problems} - {""})
        for group in groups if len(groups) > 1 else ():
            mask = torch.tensor([getattr(p, kind) == group for p in problems])
            rows.append([f"{kind} {group}" if kind == "level" else group, str(int(mask.sum()))])
            rows[-1] += [percent(bootstrap(v[mask])) for v in values.values()]
    return f"{name}:\n\n" + markdown(["% (95 % interval)", "problems", *values], rows) if rows else ""


def clean(text: str) -> str:
    """What a model wrote may hold escape sequences, which would command the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def word(verdict: str) -> str:
    return {"match": "right", "mismatch": "wrong"}.get(verdict, verdict)


def before_after(before: dict, after: dict, answers: tuple[list, list]) -> str:
    """What training changed: a table, and some answers before and after."""
    lines = [f"{'':28}{'before':>16}{'after':>16}"]
    accuracy = lambda r, way, source: f"{100 * r[f'{way}_accuracy{source}']:.1f} ± {196 * r[f'{way}_stderr{source}']:.1f} %"
    sets = sorted(key.removeprefix("greedy_accuracy") for key in before if key.startswith("greedy_accuracy:"))
    for way in ("greedy", "sampled"):
        for source in ("", *sets):
            name = f"  {short(source[1:])}" if source else f"{way} accuracy"
            lines.append(f"{name:28}{accuracy(before, way, source):>16}{accuracy(after, way, source):>16}")
        for key in ("steps", "tokens", "repeats", "truncated"):
            name = "  truncated answers" if key == "truncated" else f"  {key} per answer"
            lines.append(f"{name:28}{before[f'{way}_{key}']:>16.2f}{after[f'{way}_{key}']:>16.2f}")
    for b, a in zip(*answers):
        lines.append(f"\nquestion  {clean(b['question'])}")
        for when, x in (("before", b), ("after", a)):
            text = f"{when:9} {clean(x['response']).strip()}   ({word(x['verdict'])})"
            lines.append(text.replace("\n", "\n" + " " * 10))
    return "\n".join(lines)


def read_run(folder: str) -> list[dict]:
    """The lines of metrics.jsonl. Raises UserError if the folder holds no run."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder}: not the folder of a run (it has no metrics.jsonl)")
    rows = [json.loads(line) for line in whole_lines(path)]
    if not any("greedy_accuracy" in row for row in rows):
        raise UserError(f"{path}: holds no evaluation")
    return rows


def read_answers(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def last_evaluation(folder: str) -> dict:
    """The run's name, its options, and the last line of its metrics that holds an evaluation."""
    config = Path(folder) / "config.json"
    options = json.loads(config.read_text()) if config.is_file() else {}
    last = [row for row in read_run(folder) if "greedy_accuracy" in row][-1]
    return {"run": Path(folder).name, "options": options, "metrics": last}


def compare(runs: list[dict]) -> str:
    """Runs side by side: their last evaluation, as a Markdown table."""
    heads = ["run", "iteration"]
    heads += [f"{way} {key}" for way in ("greedy", "sampled") for key in ("accuracy %", "steps", "tokens")]
    rows = []
    for run in runs:
        m = run["metrics"]
        cells = [run["run"], str(m["iteration"])]
        for way in ("greedy", "sampled"):
            cells.append(f"{100 * m[f'{way}_accuracy']:.1f} ± {196 * m[f'{way}_stderr']:.1f}")
            cells += [f"{m[f'{way}_{key}']:.1f}" for key in ("steps", "tokens")]
        rows.append([*cells, f"{m.get('process_reward') or 0:.2f}"])
    return markdown([*heads, "process reward"], rows)


PANELS = {
    "greedy_accuracy": "greedy accuracy, unseen problems",
    "success": "success rate of the rollout (sampled)",
    "steps": "steps per answer",
    "tokens": "tokens per answer",
    "repeats": "exact repeats per answer",
    "process_reward": "process reward per answer",
}
# Okabe and Ito's colours; with dashes and markers they are told apart in grey print too
LOOKS = [
    *zip(["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F", "#8C510A", "#4B0082"],
         ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 3)), (0, (2, 4)),
          (0, (6, 1, 1, 1))],
         "osD^vPX<>*")
]  # fmt: skip


def new_figure(panels: list[str], columns: int):
    """A figure, and its axes, one for each title."""
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.67 * columns, 3 * rows + 0.3), layout="constrained")
    axes = [*figure.subplots(rows, columns, squeeze=False).flat]
    for ax, title in zip(axes, panels):
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.3)
    return figure, axes


def save_figure(figure, axes: list, path: str) -> None:
    handles, labels = axes[0].get_legend_handles_labels()
    columns = min(len(labels), int(figure.get_size_inches()[0] / 1.35))  # as many as fit in the width
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    figure.savefig(path, dpi=150)


def draw_curves(groups: dict[str, list[list[dict]]], path: str, panels: tuple[str, ...] = tuple(PANELS)) -> None:
    """One line for each group of runs against iteration: their mean, and a band of its 95 % interval if there are several.
    groups: by name the lines of each run's metrics.jsonl."""
    figure, axes = new_figure([PANELS[key] for key in panels], 3)
    for ax, key in zip(axes, panels):
        for (name, runs), (colour, style, marker) in zip(groups.items(), LOOKS * 9):
            series = [{row["iteration"]: row[key] for row in rows if row.get(key) is not None} for rows in runs]
            x = sorted(set.intersection(*map(set, series)))
            if not x:
                continue
            mean, half = map(torch.tensor, zip(*(interval([by[i] for by in series]) for i in x)))
            few = key == "greedy_accuracy"
            ax.plot(x, mean, color=colour, linestyle=style, marker=marker if few else None, markersize=4, label=name)
            if len(runs) > 1:
                ax.fill_between(x, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
        ax.set_xlabel("iteration")
        if key in ("steps", "tokens", "repeats"):
            ax.set_ylim(bottom=0)
    save_figure(figure, axes, path)


# ------------------------------------------------------------------------------------------------ one run, step by step


@dataclass
class ShowOptions:
    iteration: int | None = option(None, "whose answers, or where the page begins; default: the first and the last")
    html: str = option("", "write a page with a slider over the iterations to this file, instead")


def explain(row: dict, alpha: float) -> dict:
    """An answer as `show` shows it, with None for what its reward does not have. A step's return-to-go has two parts: what
    the learned reward `pays`, alpha * (r_k + ... + r_K) or alpha * r_outcome, and Correct. It is undiscounted, and without
    the KL penalty and the value that a truncated answer bootstraps, which samples.jsonl does not hold."""
    K, texts, s, r = row["steps"], [text.strip() for text in prm.steps_of(row)], row["scores"], row["refined"]
    question, response, outcome = row["question"], row["response"], row["outcome"]
    pays = [None if outcome is None else alpha * outcome * (not row["truncated"])] * K
    pays = pays if r is None else [alpha * sum(r[k:]) for k in range(K)]
    right = oracle_at(question, response, row["cuts"]) if is_toy(question) else [None] * K
    steps = [
        {"text": text, "repeats": texts.index(text) + 1 if text in texts[:k] else None, "score": s and s[k], "r": r and r[k],
         "pays": pay, "return": None if pay is None else pay + row["correct"], "oracle": good}
        for k, (text, good, pay) in enumerate(zip(texts, right, pays))
    ]  # fmt: skip
    return {
        "question": question, "gold": extract(row["gold"]) or row["gold"], "verdict": word(row["verdict"]),
        "outcome": outcome, "correct": row["correct"], "watched": row.get("watched", False), "steps": steps,
        "rest": response[max([0, *row["cuts"]]) :].strip(),
    }  # fmt: skip


def read_show(folder: str) -> dict:
    """A run's name, reward and alpha, and of each iteration its means and a few answers."""
    path, means = Path(folder), {row["iteration"]: row for row in read_run(folder)}
    if missing := [name for name in ("config.json", "samples.jsonl") if not (path / name).is_file()]:
        raise UserError(f"{folder}: not the folder of a run (it has no {missing[0]})")
    options, answers = json.loads((path / "config.json").read_text()), defaultdict(list)
    for row in map(json.loads, whole_lines(path / "samples.jsonl")):
        answers[row["iteration"]].append(explain(row, options["alpha"]))
    if not answers:
        raise UserError(f"{folder}: has no answers yet, its first iteration is not done")
    keys = ("success", "steps", "repeats", "process_reward")
    rows = [{"iteration": i, **{k: means.get(i, {}).get(k) for k in keys}, "answers": x} for i, x in answers.items()]
    return {"run": path.resolve().name, "reward": options["reward"], "alpha": options["alpha"], "iterations": rows}


def answer_text(answer: dict, colour: bool) -> str:
    """For the terminal: blue is good and vermilion bad, which the colour-blind tell apart."""
    paint = lambda text, value: f"\x1b[38;5;{32 if value > 0 else 166}m{text}\x1b[0m" if colour and value else text
    middle = {"score": 0.5, "r": 0, "return": 0, "oracle": 0.5}
    columns = [key for key in middle if any(step[key] is not None for step in answer["steps"])]
    lines = [clean(f"{answer['question']}   gold {answer['gold']}, ") + paint(answer["verdict"], answer["correct"] - 0.5)]
    lines[0] += "" if answer["outcome"] is None else f", outcome score {answer['outcome']:.2f}"
    lines[0] += "   (the same question in every iteration)" if answer["watched"] else ""
    lines.append("   k" + "".join(f"{key:>8}" for key in columns) + "  step")
    below = "\n" + " " * (len(lines[1]) - 4)  # where a step goes on that has several lines
    for k, step in enumerate(answer["steps"], 1):
        cell = lambda key, x: {True: "right", False: "wrong", None: ""}[x] if key == "oracle" else f"{x:.2f}"
        cells = [paint(f"{cell(key, step[key]):>8}", (step[key] or 0) - middle[key]) for key in columns]
        again = f"   (repeats {step['repeats']})" if step["repeats"] else ""
        lines.append(f"{k:4}{''.join(cells)}  {clean(step['text']).replace(chr(10), below)}{again}")
    rest = clean(answer["rest"]).replace("\n", below)
    return "\n".join(lines) + (f"{below}{rest}   (cut off: no step)" if rest else "")


def parse_show(argv: list[str]):
    usage = "python eval.py show RUN [--iteration N] [--html FILE]"
    parser = HfArgumentParser(ShowOptions, usage=usage, allow_abbrev=False)
    parser.add_argument("run", help="the folder of a run")
    return parser.parse_args(argv)


def show(argv: list[str]) -> None:
    o = parse_show(argv)
    run = read_show(o.run)
    rows = {row["iteration"]: row for row in run["iterations"]}
    if o.iteration not in (None, *rows):
        raise UserError(f"{o.run}: has no answers of iteration {o.iteration}, but of {min(rows)} to {max(rows)}")
    if o.html:
        # not one <, lest a model's </script> end the data, or its <!-- with <script hide the page's own end of them
        text = json.dumps({**run, "start": f"#iteration={o.iteration or min(rows)}"}).replace("<", "\\u003c")
        page = Path(__file__).with_name("assets") / "show.html"
        write(Path(o.html), page.read_text(encoding="utf-8").replace("{{run}}", text))
        print(f"written: {o.html}")
        return
    print(f"{run['run']}: reward {run['reward']}, alpha {run['alpha']:g}")
    print("return: alpha * (r_k + ... + r_K, or r_outcome) + Correct; left out: KL penalty, value behind truncated answers")
    for i in [o.iteration] if o.iteration else sorted({min(rows), max(rows)}):
        means = ", ".join(f"{key.replace('_', ' ')} {x:.2f}" for key, x in rows[i].items() if isinstance(x, float))
        print(f"\niteration {i} of {max(rows)}: {means}")
        for answer in rows[i]["answers"]:
            print("\n" + answer_text(answer, sys.stdout.isatty() and not os.environ.get("NO_COLOR")))


# ------------------------------------------------------------------------------------------------ claims, over many runs


SIX, FIVE, THREE = "reward=success,orm,prm,clip,delta,clip-delta", "seed+prepare_seed=0,1,2,3,4", "seed+prepare_seed=0,1,2"
SWEEPS = {  # the runs behind the README's claims, which `python train.py --sweep NAME` makes
    "main": [f"{SIX} alpha=0.5 {FIVE}"],
    "low-alpha": [f"reward=prm,delta alpha=0.3 {FIVE}"],
    "labels": [f"reward=prm labels=oracle alpha=0.5 {FIVE}", f"reward=prm flip_labels=0.1,0.2,0.4 alpha=0.5 {FIVE}"],
    "sums": [f"{SIX} preset=sums alpha=0.5 {THREE}"],
    "map": ["seed+prepare_seed=0,1 reward=orm,prm,clip,delta,clip-delta,progress,min,normed,penalty "
            "alpha=0.03,0.1,0.3,0.5,1,3"],
}  # fmt: skip
SEED = ("seed", "prepare_seed")
MADE_OF = ("policy", "reward_model", "commit")  # which a run's config.json says, beside its options
FREE = (  # what is in config.json and does not change what is computed
    "name", "resume", "resume_from", "iterations", "save_every", "keep", "runs_dir", "slots", "threads", "token_budget",
    "checkpoint_activations", "offload_frozen", "log_to", "sweep", "workers", *MADE_OF,
)  # fmt: skip


def combinations(words: list[str]) -> dict[str, dict[str, str]]:
    """Names and options of the runs that a --sweep asks for: of each of SWEEPS by its name, or of all combinations of lists
    of values. Options that go together share one list: seed+prepare_seed=0,1. Raises UserError for what is neither."""
    if words[0] in SWEEPS:
        if unknown := [word for word in words if word not in SWEEPS]:
            raise UserError(f"--sweep {unknown[0]}: there is none of that name, choose {', '.join(SWEEPS)}")
        grids = [grid.split() for word in words for grid in SWEEPS[word]]
    else:
        grids = [words]
    first, runs = ("reward", "preset", "labels"), {}
    for axes in ([part.partition("=") for part in grid] for grid in grids):
        for values in product(*(listed.split(",") for _, _, listed in axes)):
            run = {name: value for (names, _, _), value in zip(axes, values) for name in names.split("+")}
            if unknown := [k for k, v in run.items() if not (k and v)]:
                raise UserError(f"--sweep {unknown[0]}: give OPTION=VALUE,VALUE, or of {', '.join(SWEEPS)} one or several")
            if run.get("reward") == "success":  # whose reward has no weight
                run.pop("alpha", None)
            alike = run.get("seed") == run.get("prepare_seed")
            names = [k for k in first if k in run] + [k for k in run if k not in (*first, *SEED)]
            names += [k for k in SEED if k in run and not (alike and k == "prepare_seed")]
            runs["-".join(run[k] if k in first else k + run[k] for k in names).replace("/", "_")] = run
    return runs


def render(table: dict) -> str:
    """A table of a claim in Markdown. A cell is text, or the values of the runs: their mean and interval, of two runs both
    values; with one digit under a head in %, else with two."""

    def cell(head: str, x) -> str:
        if isinstance(x, str) or not x:
            return x or ""
        digits = 1 if "%" in head + table["title"] else 2
        shown = [round(value, digits) + 0.0 for value in (interval(x) if len(x) > 2 else x)]  # + 0.0: there is a -0.0
        return (" ± " if len(x) > 2 else ", ").join(f"{value:.{digits}f}" for value in shown)

    return markdown(table["heads"], [[cell(head, x) for head, x in zip(table["heads"], row)] for row in table["rows"]])


def read_sweep(names: list[str], runs_dir: str) -> list[dict]:
    """The runs of these sweeps that are done; how many are not is printed. Raises UserError if there is none, or if they
    differ in more than they should."""
    found, asked = [], combinations(names)
    for name in asked:
        folder = Path(runs_dir, name)
        if (folder / "model").is_dir():
            options = json.loads((folder / "config.json").read_text())
            found.append({"run": name, "folder": str(folder), "options": options, "rows": read_run(str(folder))})
    make = f"python train.py --sweep {' '.join(names)} makes them"
    if not found:
        raise UserError(f"{runs_dir}: holds no run of the sweep {' '.join(names)} that is done; {make}")
    if len(found) < len(asked):
        print(f"{len(asked) - len(found)} of {len(asked)} runs are not done: {make}")
    free = {*FREE} - {"iterations"} | {k for run in asked.values() for k in run}
    fixed = [{k: v for k, v in run["options"].items() if k not in free} for run in found]
    for run, options in zip(found, fixed):
        if other := [k for k in {**fixed[0], **options} if options.get(k) != fixed[0].get(k)]:
            raise UserError(f"{run['run']} and {found[0]['run']} differ in {', '.join(other)}: they cannot share a table")
    return found


def of(runs: list[dict], **want) -> list[dict]:
    """Those with these options, by seed."""
    chosen = (run for run in runs if all(run["options"][k] == v for k, v in want.items()))
    return sorted(chosen, key=lambda run: run["options"]["seed"])


def at(runs: list[dict], key: str, iteration: int | None = None) -> list[float]:
    """Of each run that has one its value in an iteration, or its last one; shares in %."""
    scale = 100 if "accuracy" in key or key == "nonzero" else 1.0
    rows = ([x for x in run["rows"] if x.get(key) is not None and iteration in (None, x["iteration"])] for run in runs)
    return [scale * found[-1][key] for found in rows if found]


def gains(runs: list[dict], others: list[dict], key: str) -> list[float]:
    """Of each run its last value less that of the other run of its seed, where there is one."""
    pairs = [(run, other) for run in runs for other in of(others, seed=run["options"]["seed"])]
    return [x - y for x, y in (at(pair, key) for pair in pairs)]


def rewards_table(runs: list[dict], title: str, paper: bool) -> dict:
    """Before and after training with each reward; the differences are by seed, so that what the seeds share cancels."""
    heads = ["reward", "alpha", "seeds", "greedy %", "sampled %", "sampled, against before, %", "against success, %"]
    heads += ["steps", "repeats", "process reward, first iteration", "last", "the paper's greedy / sampled %"]
    success, width = of(runs, reward="success"), len(heads) if paper else len(heads) - 1
    said = lambda reward: " / ".join(f"{x:.2f}" for x in PAPER.get(("qwen2-1.5b-instruct", reward), {}).get("math", ()))
    rows = [[
        "before", "", str(len(success)), at(success, "greedy_accuracy", 0), at(success, "sampled_accuracy", 0), "", "",
        at(success, "sampled_steps", 0), at(success, "sampled_repeats", 0), "", "", said(""),
    ]]  # fmt: skip
    for reward in REWARDS:
        for alpha in sorted({run["options"]["alpha"] for run in of(runs, reward=reward)}):
            group, learned = of(runs, reward=reward, alpha=alpha), reward != "success"
            after, before = at(group, "sampled_accuracy"), at(group, "sampled_accuracy", 0)
            rows.append([
                reward, f"{alpha:g}" if learned else "", str(len(group)), at(group, "greedy_accuracy"), after,
                [x - y for x, y in zip(after, before)], gains(group, success, "sampled_accuracy") if learned else "",
                at(group, "sampled_steps"), at(group, "sampled_repeats"),
                *([at(group, "process_reward", 1), at(group, "process_reward")] if learned else ["", ""]), said(reward),
            ])  # fmt: skip
    return {"title": title, "heads": heads[:width], "rows": [row[:width] for row in rows]}


def claim_main(o: "Options", device) -> dict:
    """2, 4, 5: the six rewards at one alpha."""
    runs = read_sweep(["main"], o.runs_dir)
    groups = {reward: of(runs, reward=reward) for reward in REWARDS if of(runs, reward=reward)}
    panels = ("success", "steps", "process_reward")
    draw_curves({name: [run["rows"] for run in group] for name, group in groups.items()}, f"{o.out}/hacking.png", panels)
    series = lambda run, key: [round(row[key], 4) for row in run["rows"] if key in row]
    curves = {key: {name: [series(run, key) for run in group] for name, group in groups.items()} for key in panels}
    run = groups["prm"][0]
    alpha, rows = run["options"]["alpha"], read_answers(Path(run["folder"]) / "samples.jsonl")
    most = max((row for row in rows if row["iteration"] == rows[-1]["iteration"]), key=lambda row: row["repeats"])
    hacked = f"{run['run']}, iteration {most['iteration']}, alpha {alpha:g}\n{answer_text(explain(most, alpha), False)}"
    return {"runs": runs, "tables": [rewards_table(runs, "rewards", True)], "texts": [hacked], "curves": curves}


def claim_low_alpha(o: "Options", device) -> dict:
    """5: is there an alpha at which the process reward is hacked, and Delta not?"""
    less = combinations(["low-alpha"])
    runs = [run for run in read_sweep(["main", "low-alpha"], o.runs_dir)
            if run["run"] in less or run["options"]["reward"] == "success"]  # fmt: skip
    return {"runs": runs, "tables": [rewards_table(runs, "low-alpha", False)]}


def claim_orm(o: "Options", device) -> dict:
    """3: what an ORM says beyond correctness."""
    runs = of(read_sweep(["main"], o.runs_dir), reward="orm")
    keys = ("success", "outcome_right", "outcome_wrong", "outcome_explained_by_correct", "outcome_explained_by_more")
    heads = ["iteration", "seeds", "success", "ORM of right answers", "of wrong answers"]
    heads += ["its variance explained by Correct", "by Correct, steps and repeats"]
    rows = [[str(i), str(len(runs)), *(at(runs, key, i) for key in keys)] for i in (1, 5, 10, 20)]
    return {"runs": runs, "tables": [{"title": "orm", "heads": heads, "rows": [row for row in rows if row[-1]]}]}


def claim_map(o: "Options", device) -> dict:
    """6: every reward at every alpha, of the seeds of which all runs are done, or no two cells could be compared; in the
    figure the bars are from the least to the greatest of them."""
    runs, tables, asked = read_sweep(["map", "main"], o.runs_dir), [], combinations(["map"])
    missing = {int(run["seed"]) for name, run in asked.items() if name not in {run["run"] for run in runs}}
    seeds = sorted(seed for seed in {int(run["seed"]) for run in asked.values()} if seed not in missing)
    if not seeds:
        raise UserError(f"{o.runs_dir}: the sweep map has no seed of which all runs are done")
    runs = [run for run in runs if run["options"]["seed"] in seeds]
    alphas = sorted({run["options"]["alpha"] for run in runs} - {0.0})
    titles = {"sampled_accuracy": "sampled accuracy, %", "sampled_steps": "steps of a sampled answer"}
    for key, title in titles.items():
        title += f", seed {' and '.join(map(str, seeds))}"
        rows = []
        for reward in [r for r in REWARDS if of(runs, reward=r)]:
            groups = [of(runs, reward=reward, **({"alpha": a} if reward != "success" else {})) for a in alphas]
            rows.append([reward, *(at(group, key) or "" for group in groups)])
        tables.append({"title": title, "heads": [title, *(f"alpha {alpha:g}" for alpha in alphas)], "rows": rows})
    figure, axes = new_figure([*titles.values()], 2)
    for ax, table in zip(axes, tables):
        for (name, *cells), (colour, style, marker) in zip(table["rows"], LOOKS * 9):
            x, mean, low, high = zip(*((a, sum(v) / len(v), min(v), max(v)) for a, v in zip(alphas, cells) if v))
            ax.plot(x, mean, color=colour, linestyle=style, marker=marker, markersize=4, label=name)
            ax.vlines(x, low, high, color=colour, linewidth=0.8)
        ax.set_xscale("log")
        ax.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas], minor=False)
        ax.minorticks_off()
        ax.set_xlabel("alpha")
        ax.set_ylim(bottom=0)
    axes[0].set_ylim(top=100)
    save_figure(figure, axes, f"{o.out}/map.png")
    return {"runs": runs, "tables": tables}


def quality_of(run: dict) -> dict:
    return json.loads(Path(run["options"]["reward_model"], "quality.json").read_text())


def claim_labels(o: "Options", device) -> dict:
    """7: the process reward by exact, Monte-Carlo and noisy labels."""
    everything = read_sweep(["labels", "main"], o.runs_dir)
    runs, success = of(everything, reward="prm"), of(everything, reward="success")
    heads = ["labels", "seeds", "step AUROC against the oracle", "greedy %", "sampled %", "against success, %", "steps"]
    heads += ["against success", "repeats", "process reward, first iteration", "last"]
    kinds = {"exact": ("oracle", 0.0), "Monte-Carlo": ("hard", 0.0)}
    kinds |= {f"Monte-Carlo, {flip:.0%} flipped": ("hard", flip) for flip in (0.1, 0.2, 0.4)}
    rows = []
    for name, (labels, flip) in kinds.items():
        if group := of(runs, labels=labels, flip_labels=flip):
            rows.append([
                name, str(len(group)), [quality_of(run)["auroc_oracle"] for run in group],
                at(group, "greedy_accuracy"), at(group, "sampled_accuracy"), gains(group, success, "sampled_accuracy"),
                at(group, "sampled_steps"), gains(group, success, "sampled_steps"), at(group, "sampled_repeats"),
                at(group, "process_reward", 1), at(group, "process_reward"),
            ])  # fmt: skip
    return {"runs": [*success, *runs], "tables": [{"title": "labels", "heads": heads, "rows": rows}]}


def claim_dense(o: "Options", device) -> dict:
    """8: is the refined reward dense, and does it stay so?"""
    runs, when = read_sweep(["main"], o.runs_dir), (1, 5, 10, 15, 20)
    groups = {reward: of(runs, reward=reward) for reward in PROCESS}
    rows = [[name, str(len(x)), *(at(x, "nonzero", i) for i in when)] for name, x in groups.items() if x]
    heads = ["steps whose reward is not 0, %", "seeds", *(f"iteration {i}" for i in when)]
    return {"runs": runs, "tables": [{"title": "dense, %", "heads": heads, "rows": rows}]}


def claim_cost(o: "Options", device) -> dict:
    """9: seconds of an iteration, in the first five, while all policies still answer alike."""
    runs, rows, phases = read_sweep(["main"], o.runs_dir), [], ("sample", "score", "refine", "update")
    for reward in [r for r in REWARDS if of(runs, reward=r)]:
        group = of(runs, reward=reward)
        mean = lambda run, phase: sum(at([run], f"seconds_{phase}", i)[0] for i in range(1, 6)) / 5
        by = {phase: [mean(run, phase) for run in group] for phase in phases}
        rows.append([reward, str(len(group)), by["sample"], by["score"], [1000 * x for x in by["refine"]], by["update"],
                     [sum(x) for x in zip(*by.values())]])  # fmt: skip
    heads = ["seconds of an iteration", "seeds", "sample", "score", "refine, in milliseconds", "update", "total"]
    return {"runs": runs, "tables": [{"title": "cost", "heads": heads, "rows": rows}]}


def claim_sums(o: "Options", device) -> dict:
    """10: the other embedded world."""
    runs = read_sweep(["sums"], o.runs_dir)
    return {"runs": runs, "tables": [rewards_table(runs, "sums", False)]}


def claim_best_of_n(o: "Options", device) -> dict:
    """1: reward models choose among 16 answers of the policy before training."""
    runs, values, quality, used = read_sweep(["main"], o.runs_dir), {}, [], []
    for run in of(runs, reward="prm"):
        c = run["options"]
        if not (other := of(runs, reward="orm", seed=c["seed"])):
            continue
        used += [run, *other]
        out = Path(o.runs_dir, "eval", f"best-of-16-seed{c['seed']}")
        each = Options(
            model=c["policy"], prm=c["reward_model"], orm=other[0]["options"]["reward_model"], data=c["data"],
            problems=o.problems or 500, samples=16, prompt=c["prompt"], max_new_tokens=c["max_new_tokens"],
            slots=c["slots"], out=str(out),
        )  # fmt: skip
        with redirect_stdout(StringIO()):
            evaluate_model(each, ("", ""), 0, 1, device)
        for measure, figures in json.loads((out / "results.json").read_text())["results"][c["data"]].items():
            values.setdefault(measure, []).append(100 * figures[0])
        quality.append((quality_of(run), quality_of(other[0])))
    chosen = [f"{how} of 16 by {way}" for way in ("ORM", *(f"PRM {x}" for x in AGGREGATES)) for how in ("best", "vote")]
    names = ["pass@1", "majority of 16", *chosen, "pass@16"]
    gain = lambda i, base: [x - y for x, y in zip(values[names[i]], values[names[base]])] if i > base else ""
    rows = [[name, values[name], gain(i, 0), gain(i, 1)] for i, name in enumerate(names)]
    heads = [f"%, {len(quality)} seeds, {o.problems or 500} problems each", "accuracy", "above pass@1", "above majority"]
    judged = [["PRM: steps, against the oracle", [q["auroc_oracle"] for q, _ in quality]],
              ["PRM: steps, against Monte-Carlo labels", [q["auroc"] for q, _ in quality]],
              ["ORM: answers, against Correct", [q["auroc"] for _, q in quality]]]  # fmt: skip
    tables = [{"title": "best of n, %", "heads": heads, "rows": rows},
              {"title": "auroc", "heads": ["AUROC on held-out questions", "mean"], "rows": judged}]  # fmt: skip
    return {"runs": used, "tables": tables}


def claim_repeats(o: "Options", device) -> dict:
    """11: what each reward pays, before alpha, for right answers with one step written m times more, or m empty steps before
    the answer."""
    runs, most, tables, everything = of(read_sweep(["main"], o.runs_dir), reward="prm"), 10, [], {}
    for kind in ("repeated", "empty"):
        sums, last = ({name: [] for name in PROCESS + BASELINES} for _ in range(2))  # of each run the means by m
        for run in runs:
            c, rng = run["options"], random.Random(0)
            scorer = Scorer(Options(prm=c["reward_model"], prompt=c["prompt"]), "prm", device)
            rows, places = [], []
            for p in load_problems(c["data"], "test", 200):
                lines = toy_lines(p.question)
                k = rng.randrange(len(lines) - 1) + 1 if kind == "repeated" else len(lines) - 1
                for m in range(most + 1):
                    more = [lines[k - 1] if kind == "repeated" else "="] * m
                    rows.append(answer_row(p.question, "\n".join(lines[:k] + more + lines[k:]), scorer.o))
                    places.append(k + m - 1)  # of the last step that was put in
            ends, mask = prm.pad_steps([row["cuts"] for row in rows])
            scores = torch.zeros(mask.shape)
            scores[mask] = torch.tensor([x for row in scorer.scores(rows) for x in row])
            for name in sums:
                r = refine(name, scores, mask, c["eta"])
                go = r.flip(1).cumsum(1).flip(1)[torch.arange(len(rows)), places]  # the return-to-go
                for by, x in ((sums, r.sum(1)), (last, go)):
                    by[name].append(x.view(-1, most + 1).mean(0).tolist())
        for what, by in (("sum", sums), ("return-to-go of the last one", last)):
            title, few = f"{kind} steps: {what}", (0, 1, 2, 3, 5, 10)
            everything[title] = {name: [*map(list, zip(*x))] for name, x in by.items()}
            rows = [[name, *(x[m] for m in few)] for name, x in everything[title].items()]
            tables.append({"title": title, "heads": [title, *(f"m = {m}" for m in few)], "rows": rows})
    return {"runs": runs, "tables": tables, "for m = 0 to 10": everything}


CLAIMS = {
    "best-of-n": claim_best_of_n, "main": claim_main, "low-alpha": claim_low_alpha, "orm": claim_orm, "map": claim_map,
    "labels": claim_labels, "dense": claim_dense, "cost": claim_cost, "sums": claim_sums, "repeats": claim_repeats,
}  # fmt: skip


def commit() -> str:
    """Of this code, with a + if it was changed since; empty outside a git checkout."""
    try:
        call = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(call, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def show_claims(o: "Options", device) -> None:
    """Print the tables of the claims, and write them with all that is behind them: OUT/NAME.json, figures as png."""
    o.out = o.out or str(Path(o.runs_dir, "claims"))
    Path(o.out).mkdir(parents=True, exist_ok=True)
    for name in CLAIMS if o.claim == "all" else [o.claim]:
        found = CLAIMS[name](o, device)
        runs = [{k: run["options"][k] for k in ("name", *SEED, "alpha", "commit")} for run in found.pop("runs")]
        options = json.loads(Path(o.runs_dir, runs[0]["name"], "config.json").read_text())
        print("\n" + "\n\n".join([f"# {name}", *map(render, found["tables"]), *found.get("texts", [])]))
        whole = {"claim": name, "commit": commit(), **found, "runs": runs, "options_of_the_first": options}
        rounded = json.loads(json.dumps(whole), parse_float=lambda x: round(float(x), 6))
        write(Path(o.out, f"{name}.json"), json.dumps(rounded, indent=1))
    print(f"\nwritten: {o.out}/")


# ------------------------------------------------------------------------------------------------ the script


@dataclass
class Options(TextOptions):
    model: str = option("", "a run's folder, a model's folder or a hub name")
    runs: list[str] = field(default_factory=list, metadata={"help": "folders of runs to compare, instead of --model"})
    claim: str = option("", "tables and figures of one of the README's claims, or all, over the runs of train.py --sweep",
                        choices=["", "all", *CLAIMS])  # fmt: skip
    runs_dir: str = option("runs", "with --claim: where the runs are")
    figure: str = option("", "with --runs: write the curves to this file (png, pdf, svg)")
    data: str = option("", "problems: toy, gsm8k, math, math-500, files, NAME,NAME; empty: the run's evaluation problems")
    problems: int = option(0, "how many of each set at most; 0: all, 1000 of an embedded world, 500 for --claim best-of-n")
    samples: int = option(1, "sampled answers per problem, n; above 1 also pass@k, votes, best-of-n")
    prm: str = option("", "a PRM, by folder or hub name: best-of-n and weighted votes by it")
    prm_format: str = option("", "how a published --prm reads, where its name does not say", choices=["", *FORMATS])
    orm: str = option("", "folder of an ORM, likewise")
    processbench: str = option("", "with --prm: splits of Qwen/ProcessBench, or files in its format: NAME,NAME")
    threshold: float = option(0.5, "with --processbench: a step that scores below is wrong")
    pairs: str = option("", "with --prm or --orm: chosen and rejected answers, RewardBench's fields: a file or hub name")
    temperature: float = option(1.0, "of the sampled answers")
    dtype: str = option("float32", "of all models", choices=list(DTYPES))
    slots: int = option(256, "answers that decode at once")
    seed: int = option(0, "of the sampled answers")
    out: str = option("", "with --model a folder for answers, scores, results; else a JSON file. Empty: runs/eval/...")


def parse(argv: list[str] | None = None) -> tuple[Options, tuple[str, str]]:
    """The options, and the name by which the paper would know the model: (model, reward)."""
    usage = "python eval.py --model M | --runs R [R ...] | --claim C | --prm P --processbench NAMES [--OPTION VALUE ...]"
    usage += "\n       python eval.py show RUN [--OPTION VALUE ...]"
    parser = HfArgumentParser(Options, usage=usage, allow_abbrev=False)
    o = Options(**vars(parser.parse_args(argv)))
    if sum(map(bool, (o.model, o.runs, o.claim, o.processbench or o.pairs))) != 1:
        raise UserError("give one of --model, --runs, --claim, or a reward model with --processbench or --pairs")
    if o.figure and not o.runs:
        raise UserError("--figure draws the curves of --runs: a model alone has none")
    if o.model and (o.prm or o.orm) and o.samples < 2:
        raise UserError("--prm and --orm choose among several answers: give --samples 2 or more")
    if o.processbench and not o.prm or o.pairs and not (o.prm or o.orm):
        raise UserError("--processbench needs a --prm to evaluate, and --pairs a --prm or an --orm")
    if o.prm_format and not o.prm:
        raise UserError("--prm-format says how the --prm reads: give both, or neither")
    if min(o.samples, o.slots) < 1 or o.problems < 0 or o.temperature <= 0:
        raise UserError("--samples, --slots and --temperature must be above 0, and --problems at least 0")
    config, known = Path(o.model) / "config.json", (o.model.split("/")[-1].lower(), "")
    if o.model and (Path(o.model) / "model").is_dir() and config.is_file():  # a run: its own settings are the defaults
        run = json.loads(config.read_text())
        known = (run.get("preset", ""), run.get("reward", ""))
        same = ("prompt", "separator", "max_prompt_tokens", "max_new_tokens", "slots", "temperature", "dtype")
        parser.set_defaults(data=run["eval_data"] or run["data"], **{k: run[k] for k in same if k in run})
        o = Options(**vars(parser.parse_args(argv)))
        o.model = str(Path(o.model) / "model")
    if o.model and not o.data:
        raise UserError("--data: say on which problems (toy, gsm8k, math, or a JSONL file)")
    return o, known


def with_votes(rows: list[dict], n: int) -> list[dict]:
    """What is kept of the answers; each with its "vote": which of the n answers to its problem is the first equal one."""
    texts = [None if row["truncated"] else extract(row["response"]) for row in rows]
    votes = [vote for i in range(0, len(rows), n) for vote in same_answers(texts[i : i + n])]
    return [{k: v for k, v in row.items() if k not in ("ids", "ends")} | {"vote": vote} for row, vote in zip(rows, votes)]


def score_answers(scorer, answers: Path, file: Path, n: int, problems: int, settings: dict, rank: int, world: int) -> None:
    rows, settings = read_answers(answers), {**settings, "answers": zlib.crc32(answers.read_bytes())}

    def make(block) -> list[dict]:
        found = scorer().scores([row for i in block for row in rows[i * n : (i + 1) * n]])
        return [{"index": i, "scores": found[j * n : (j + 1) * n]} for j, i in enumerate(block)]

    prm.in_blocks(file, file.stem, settings, problems, 1, make, rank, world, size=max(1, 1024 // n))


def report(o: Options, known: tuple[str, str], sets: dict, answers: dict, weights: dict, folder: Path) -> None:
    """Print the tables, and write them: results.md, results.json."""
    results, text, means = {}, [], {}
    for name, problems in sets.items():
        greedy, rows = (read_answers(answers[name, way]) for way in ("greedy", "sampled"))
        values = measures(greedy, rows, o.samples, weights[name])
        results[name] = {measure: bootstrap(x) for measure, x in values.items()}
        means[name] = {way: summarise(r, n) for way, r, n in (("greedy", greedy, 1), ("sampled", rows, o.samples))}
        few = ("greedy accuracy", "sampled accuracy", f"pass@{o.samples}", f"majority of {o.samples}")
        parts = breakdown(problems, {m: values[m] for m in few if m in values}, name)
        text += filter(None, [over_k(results[name], name), parts])
    sizes = {name: len(problems) for name, problems in sets.items()}
    text.insert(0, results_table(results, sizes, PAPER.get(known, {}), o.samples))
    for way in ("greedy", "sampled"):
        keys = ("steps", "tokens", "repeats", "truncated")
        lines = [[name, *(f"{means[name][way][k]:.2f}" for k in keys)] for name in sets]
        text.append(markdown([f"{way}, per answer", *keys], lines))
    print("\n" + "\n\n".join(text))
    write(folder / "results.md", "\n\n".join(text) + "\n")
    everything = {"options": asdict(o), "problems": sizes, "results": results, "means": means}
    write(folder / "results.json", json.dumps(everything, indent=1))


def evaluate_model(o: Options, known: tuple[str, str], rank: int, world: int, device) -> None:
    names = [short(name) for name in mixture(o.data)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two of the data sets are called {twice[0]}: rename a file, or evaluate them one by one")
    sets = {short(name): load_problems(name, "test", o.problems or None) for name in mixture(o.data)}
    tokenizer = load_tokenizer(o.model)
    for kind in ("orm", "prm"):  # bad input first
        if getattr(o, kind):
            form_of(o, kind)
    for problems in sets.values():
        encode_prompts(tokenizer, problems, o.prompt, o.max_prompt_tokens)
    same = (*(f.name for f in fields(TextOptions)), "samples", "temperature", "seed", "dtype")
    settings = {"model": prm.identity(o.model), **{name: getattr(o, name) for name in same}}
    own = Path(o.model).parent.name if Path(o.model).name == "model" else Path(o.model).name
    folder = Path(o.out or f"runs/eval/{own}-{prm.digest([settings, o.problems])}")
    on_rank_0(lambda: folder.mkdir(parents=True, exist_ok=True), share=False)
    if rank == 0:
        print(f"answers, scores and results: {folder}/", flush=True)

    sampler = lru_cache(lambda: as_sampler(load_causal_lm(o.model, DTYPES[o.dtype], device)))  # none if all is there
    answers, weights = {}, {name: {} for name in sets}
    for name, problems in sets.items():
        for way, n, temperature in (("greedy", 1, 0.0), ("sampled", o.samples, o.temperature)):
            how = dict(max_new_tokens=o.max_new_tokens, temperature=temperature, n=n, slots=o.slots, seed=o.seed)
            make = lambda block, problems=problems, how=how: with_votes(
                answer(sampler(), tokenizer, problems, block, o.prompt, o.separator, **how), how["n"]
            )
            answers[name, way] = file = folder / f"{name}-{way}.jsonl"
            size = max(1, min(4 * o.slots // n, -(-len(problems) // 64)))  # every one of up to 64 GPUs has some to do
            key = {**settings, "problems": prm.fingerprint(problems)}
            prm.in_blocks(file, f"{name} {way}", key, len(problems), n, make, rank, world, size=size)
    sampler.cache_clear()  # room for the reward models
    for kind in ("orm", "prm"):
        scorer = lru_cache(lambda kind=kind: Scorer(o, kind, device))
        for name, problems in sets.items() if getattr(o, kind) else ():
            model = {**settings, kind: prm.identity(getattr(o, kind)), "format": o.prm_format}
            file = folder / f"{name}-{kind}-{prm.digest(model)}.jsonl"
            score_answers(scorer, answers[name, "sampled"], file, o.samples, len(problems), model, rank, world)
            found = ways(kind, [s for row in read_answers(file) for s in row["scores"]])
            places = range(0, len(problems) * o.samples, o.samples)
            weights[name] |= {way: [w[i : i + o.samples] for i in places] for way, w in found.items()}
    if rank == 0:
        report(o, known, sets, answers, weights, folder)


def evaluate_reward_models(o: Options, rank: int, world: int, device) -> None:
    Path(o.out).parent.mkdir(parents=True, exist_ok=True)
    scorers = {kind: Scorer(o, kind, device) for kind in ("orm", "prm") if getattr(o, kind)}
    text, results = [], {}
    if o.processbench:
        found = {name: process_bench(name, scorers["prm"], o, rank, world) for name in mixture(o.processbench)}
        results["processbench"] = found
        heads = ("erroneous", "correct", "F1")
        rows = [[short(name), *(f"{x[k]:.1f}" for k in heads), str(x["solutions"])] for name, x in found.items()]
        if len(rows) > 1:
            rows.append(["mean", "", "", f"{sum(x['F1'] for x in found.values()) / len(found):.1f}", ""])
        text.append(markdown(["ProcessBench, %", *heads, "solutions"], rows))
    if o.pairs:
        wins = pairs_accuracy(o.pairs, [*scorers.values()], o, rank, world)
        results["pairs"] = {way: {s: bootstrap(x) for s, x in by.items()} for way, by in wins.items()}
        subsets = [*next(iter(wins.values()))]
        rows = [[way, *(percent(results["pairs"][way][s]) for s in subsets)] for way in wins]
        text.append(markdown(["chosen above rejected, %", *subsets], rows))
    if rank == 0:
        print("\n\n".join(text))
        if o.out:
            write(Path(o.out), json.dumps({"options": asdict(o), **results}, indent=1))


def main() -> None:
    if sys.argv[1:2] == ["show"]:
        return show(sys.argv[2:])
    o, known = parse()
    if o.runs:
        runs = [last_evaluation(folder) for folder in o.runs]
        print(compare(runs))
        if o.out:
            write(Path(o.out), json.dumps(runs, indent=1))
        if o.figure:
            draw_curves({Path(folder).name: [read_run(folder)] for folder in o.runs}, o.figure)
            print(f"\nwritten: {o.figure}")
        return
    rank, world, device = start_processes()
    with watching(rank, world):
        if o.claim:
            show_claims(o, device)
        elif o.model:
            evaluate_model(o, known, rank, world, device)
        else:
            evaluate_reward_models(o, rank, world, device)


if __name__ == "__main__":
    run_script(main)
