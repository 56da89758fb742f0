"""Evaluation: of a model, of reward models, of runs side by side; and one run step by step.

    python eval.py --model runs/NAME --samples 16 --prm DIR               # a run, a model's folder or a hub name
    python eval.py --model DIR --data math,gsm8k,FILE.jsonl --samples 64 --prm Qwen/Qwen2.5-Math-PRM-7B
    python eval.py --prm DIR --processbench gsm8k,math                    # the first wrong step
    python eval.py --prm DIR --orm DIR --pairs FILE.jsonl                 # chosen against rejected answers
    python eval.py --runs runs/A runs/B --figure curves.png
    python eval.py show runs/NAME --html page.html                        # what each step of an answer was paid

A model is evaluated in three stages: answers, scores, report. The first two write what they have as it comes, and the
same command goes on from there. Figures have 95 % intervals by bootstrap over problems. pass@k is the unbiased estimate
(arXiv 2107.03374); votes and best-of-k are means over n / k groups of k answers. Votes count answers that the grader
holds equal as one. A PRM's step scores become one number by last, minimum, mean or product. A truncated answer is wrong
and has no vote. Left out: few-shot prompts, tools, reward models that do not fit one GPU.
"""

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

from data import (  # before torch, see there
    SEEDS, Problem, TextOptions, UserError, data_sets, encode_prompts, is_toy, load_hub, load_problems, option,
    oracle, problems_key, read_rows, run_script, split_steps, steps_of, whole_lines, write,
)
import torch
from transformers import HfArgumentParser

import prm
from grader import extract, grade
from model import DTYPES, gather, load_causal_lm, load_tokenizer, processes, rank, say, world_size
from rollout import as_sampler

PER_ANSWER = ("steps", "tokens", "repeats", "truncated")
AGGREGATES = {"last": lambda s: s[-1], "min": min, "mean": statistics.fmean, "product": math.prod}  # of step scores
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, two-sided, n = 2 to 10 and more
PANELS = {
    "greedy_accuracy": "greedy accuracy, unseen problems", "success": "success rate of the rollout (sampled)",
    "steps": "steps per answer", "tokens": "tokens per answer", "repeats": "exact repeats per answer",
    "learned_reward": "learned reward per answer",
}
# Okabe and Ito's colours; with dashes and markers they are told apart in grey print too
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000 #7F7F7F #8C510A #4B0082".split()
LOOKS = [*zip(COLOURS, ["-", "--", "-.", ":"] * 3, "osD^vPX<>*")]


def answer(model, tokenizer, problems, indices, opts: TextOptions, *, n=1, seed=0, progress="", **sampling) -> list:
    """n answers to each of the problems with these indices, in order: rows of `judge`, without tokens, with "index" and
    "vote", which of the answers to its problem is the first equal one. They depend on seed and index, not on the other
    indices. model: a causal LM or a Sampler; sampling: as of `rollout`."""
    rows = prm.sample_answers(as_sampler(model), tokenizer, problems, indices, opts, n, seed, progress, **sampling)
    for group in in_groups(rows, n):
        votes = same_answers([None if row["truncated"] else extract(row["response"]) for row in group])
        for row, candidate in zip(group, votes):
            row["vote"] = candidate
            del row["ids"], row["token_ends"]
    return rows


def summarise(rows: list[dict], n: int) -> dict[str, float]:
    """Means over the answers; stderr is that of the mean over problems, each with n answers."""
    correct = torch.tensor([row["correct"] for row in rows], dtype=torch.float64).view(-1, n).mean(1)  # (problems,)
    means = {"accuracy": correct.mean().item(), "stderr": correct.std(correction=0).item() / len(correct) ** 0.5}
    return means | {key: sum(row[key] for row in rows) / len(rows) for key in PER_ANSWER}


def evaluate(model, tokenizer, problems: list[Problem], opts: TextOptions, *, n=1, **sampling) -> tuple[dict, list]:
    """`summarise` and `answer` of all problems. All ranks call, and each answers its share."""
    mine = range(rank(), len(problems), world_size())
    found = gather(answer(model, tokenizer, problems, mine, opts, n=n, **sampling))
    rows = sorted(found, key=lambda row: row["index"])
    return summarise(rows, n), rows


def in_groups(values: list, size: int) -> list[list]:
    """Consecutive groups of this size; a rest is left out."""
    return [values[i : i + size] for i in range(0, len(values) - size + 1, size)]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that k of the n answers, drawn without replacement, hold a right one."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def same_answers(answers: list[str | None]) -> list[int | None]:
    """For each answer the index of the first one that the grader holds equal to it; None where there is no answer."""
    firsts = {}
    for i, text in enumerate(answers):
        if text is not None and text not in firsts:
            firsts[text] = next((first for other, first in firsts.items() if grade(other, text)), i)
    return [firsts.get(text) for text in answers]


def vote(votes: list[int | None], weights: list[float]) -> int | None:
    """The candidate with the largest sum of weights, the first of equal ones; None is no vote."""
    total = defaultdict(float)
    for candidate, weight in zip(votes, weights):
        total[candidate] += weight
    total.pop(None, None)
    return max(total, key=total.get, default=None)


def voted(correct: list[bool], votes: list[int | None], weights: list[float], k: int) -> float:
    """Share of the groups of k answers in which the candidate voted for, index of the first of its kind, is right."""
    chosen = [vote(*group) for group in zip(in_groups(votes, k), in_groups(weights, k))]
    return sum(candidate is not None and correct[candidate] for candidate in chosen) / len(chosen)


def best_of(correct: list[bool], weights: list[float], k: int) -> float:
    """Share of the groups of k answers in which the one of the largest weight is right: each is its own candidate."""
    return voted(correct, [*range(len(correct))], weights, k)


def measures(greedy: list[dict], sampled: list[dict], n: int, weights: dict) -> dict[str, torch.Tensor]:
    """Each figure as its value for every problem (P,); for k = 1, 2, 4, ..., n. weights: for each way of weighing one
    number for each of the n answers to every problem."""
    correct, votes = (in_groups([row[key] for row in sampled], n) for key in ("correct", "vote"))
    ks = sorted({2**e for e in range(n.bit_length())} | {n}) if n > 1 else []
    found = {"greedy accuracy": [row["correct"] for row in greedy], "sampled accuracy": [sum(c) / n for c in correct]}
    found |= {f"pass@{k}": [pass_at_k(n, sum(c), k) for c in correct] for k in ks}
    for k in ks[1:]:
        found[f"majority of {k}"] = [voted(c, v, [1.0] * n, k) for c, v in zip(correct, votes)]
    for way, numbers in weights.items():
        each = [*zip(correct, votes, in_groups(numbers, n))]
        found |= {f"best of {k} by {way}": [best_of(c, w, k) for c, _, w in each] for k in ks[1:]}
        found |= {f"vote of {k} by {way}": [voted(c, v, w, k) for c, v, w in each] for k in ks[1:]}
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def bootstrap(values: torch.Tensor, resamples: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of the values (P,) and its 95 % interval over resampled problems."""
    generator, P = torch.Generator().manual_seed(seed), len(values)
    means = values[torch.randint(P, (resamples, P), generator=generator)].mean(1)  # (resamples,)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return values.mean().item(), low, high


class Scorer:
    """The reward model that opts names as "prm" or "orm", loaded when first used. Raises UserError for what is none."""

    def __init__(self, opts: "EvalOptions", kind: str, device):
        self.kind, self.device, self.model, path = kind, device, None, getattr(opts, kind)
        self.form = prm.find_format(path, opts.prm_format if kind == "prm" else "")
        if kind == "orm" and self.form != "own":
            raise UserError(f"--orm {path}: a PRM; give it as --prm, whose last step is one of the ways to judge")
        self.read = prm.Reader(path, self.form, opts.prompt)
        self.load = partial(prm.load_reward_model, path, DTYPES[opts.dtype], device, self.form)

    def scores(self, rows: list[dict]) -> list[list[float]]:
        """Of each row (question, response, char_ends, truncated) the scores of its steps, or an ORM's one, if any. All
        ranks call. Raises UserError for a score that is not finite."""
        self.model = self.model or self.load()
        return prm.score_at(self.model, self.read(rows, self.kind), 16384, self.device)

    def score_rows(self, answers: list[dict], indices) -> list[dict]:
        """Rows with the scores of those answers that belong to these indices."""
        wanted = {*indices}
        rows = [row for row in answers if row["index"] in wanted]
        return [{"index": row["index"], "scores": scores} for row, scores in zip(rows, self.scores(rows))]


def ways(kind: str, scores: list[list[float]]) -> dict[str, list[float]]:
    """One number for each answer, in each way of reducing its scores; 0 where there are none."""
    reductions = {"ORM": max} if kind == "orm" else {f"PRM {name}": f for name, f in AGGREGATES.items()}
    return {name: [reduction(s) if s else 0.0 for s in scores] for name, reduction in reductions.items()}


def process_bench(name: str, scorer: Scorer, opts: "EvalOptions") -> dict[str, float]:
    """First wrong step (arXiv 2412.06559): % found exactly among the solutions with one, % passed among those without,
    and their harmonic mean F1. name: a split of Qwen/ProcessBench, or a file in its format."""
    local = Path(name).suffix or "/" in name or Path(name).exists()
    rows, hits = [], {True: [], False: []}  # hits by whether there is a wrong step
    for where, row in read_rows(name, "test") if local else enumerate(load_hub("Qwen/ProcessBench", name), 1):
        text, steps, label = map(row.get, ("problem", "steps", "label")) if isinstance(row, dict) else [None] * 3
        texts = [text, *steps] if isinstance(steps, list) and steps else [None]
        if not all(isinstance(x, str) for x in texts) or label not in range(-1, len(steps)):
            raise UserError(f"{where}: needs problem, steps (texts), label (a step's index or -1), as in ProcessBench")
        rows.append({**prm.solution(text, steps, [0.0] * len(steps), opts.separator, finished=True)[0], "wrong": label})
    for row, scores in zip(rows, scorer.scores(rows)):
        guess = next((k for k, score in enumerate(scores) if score < opts.threshold), -1)
        hits[row["wrong"] >= 0].append(guess == row["wrong"])
    wrong, right = (100 * sum(x) / max(len(x), 1) for x in hits.values())
    f1 = 2 * wrong * right / max(wrong + right, 1e-9)
    return {"erroneous": wrong, "correct": right, "F1": f1, "solutions": len(rows)}


def answer_row(question: str, response: str, separator: str) -> dict:
    """A finished answer, as a reward model reads it."""
    ends = split_steps(response, separator)
    return {"question": question, "response": response, "char_ends": ends, "truncated": False}


def pairs_accuracy(name: str, scorers: list[Scorer], opts: "EvalOptions") -> dict[str, dict[str, tuple]]:
    """In the manner of RewardBench: for each way of judging and each subset, the share of pairs in which the chosen
    answer scored above the rejected one, with its interval."""
    rows, subsets, found = [], defaultdict(list), {}  # subset -> the indices of its pairs
    for where, row in read_rows(name, "filtered"):
        texts = [row.get(key) if isinstance(row, dict) else None for key in ("prompt", "chosen", "rejected")]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: needs the texts prompt, chosen and rejected, as RewardBench has them")
        subsets[str(row.get("subset", "all"))].append(len(rows) // 2)
        rows += [answer_row(texts[0], response, opts.separator) for response in texts[1:]]
    for scorer in scorers:
        for way, numbers in ways(scorer.kind, scorer.scores(rows)).items():
            won = torch.tensor([chosen > rejected for chosen, rejected in in_groups(numbers, 2)]).double()  # (pairs,)
            found[way] = {subset: bootstrap(won[inside]) for subset, inside in subsets.items()}
    return found


def evaluate_reward_models(opts: "EvalOptions", device) -> None:
    """--processbench and --pairs. Every process does all of it."""
    scorers = {kind: Scorer(opts, kind, device) for kind in ("orm", "prm") if getattr(opts, kind)}
    if opts.processbench:
        found = {name: process_bench(name, scorers["prm"], opts) for name in data_sets(opts.processbench)}
        rows = [[name, *(f"{x:.4g}" for x in figures.values())] for name, figures in found.items()]
        rows.append(["mean", "", "", f"{statistics.fmean(x['F1'] for x in found.values()):.4g}", ""])
        say(markdown(["ProcessBench, %", "erroneous", "correct", "F1", "solutions"], rows))
    if opts.pairs:
        found = pairs_accuracy(opts.pairs, [*scorers.values()], opts)
        rows = [[way, *map(percent, by_subset.values())] for way, by_subset in found.items()]
        say(markdown(["chosen above rejected, %", *next(iter(found.values()))], rows))


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(bounds: tuple[float, float, float]) -> str:
    return "{:.1f} ({:.1f} to {:.1f})".format(*(100 * x for x in bounds))


def interval(values: list[float]) -> tuple[float, float]:
    """Mean of independent runs, and half the width of its 95 % interval: of a single one 0."""
    n = len(values)
    half = T95[min(n, 10) - 2] * statistics.stdev(values) / n**0.5 if n > 1 else 0.0
    return sum(values) / n, half


def clean(text: str) -> str:
    """What a model wrote may hold escape sequences, which would command the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def side_by_side(evaluations: dict[str, dict]) -> str:
    """A table of evaluations by name, as lines of metrics.jsonl hold them; accuracies with 95 % intervals."""
    width = max(16, *(len(name) + 1 for name in evaluations))
    lines = [" " * 28 + "".join(f"{name:>{width}}" for name in evaluations)]
    for key in next(iter(evaluations.values())):
        if key.startswith(("iteration", "greedy_", "sampled_")) and "stderr" not in key:
            line, error = f"{key.replace('_', ' '):28}", key.replace("accuracy", "stderr")
            for row in evaluations.values():
                x, half = row.get(key, math.nan), 1.96 * row.get(error, math.nan)
                cell = f"{100 * x:.1f} ± {100 * half:.1f} %" if "accuracy" in key else f"{x:.4g}"
                line += f"{cell:>{width}}"
            lines.append(line)
    return "\n".join(lines)


def before_after(before: dict, after: dict, answers: tuple[list, list]) -> str:
    """What training changed: two evaluations, and some answers before and after."""
    lines = [side_by_side({"before": before, "after": after})]
    for pair in zip(*answers):
        lines.append(f"\nquestion  {pair[0]['question']}")
        for when, row in zip(("before", "after"), pair):
            text = f"{when:9} {row['response'].strip()}   ({row['verdict']})"
            lines.append(text.replace("\n", "\n" + " " * 10))
    return clean("\n".join(lines))


def read_answers(path: Path) -> list[dict]:
    return [json.loads(line) for line in whole_lines(path)]


def read_run(folder: str) -> list[dict]:
    """The lines of metrics.jsonl. Raises UserError if the folder holds no run."""
    rows = read_answers(Path(folder, "metrics.jsonl"))
    if not any("greedy_accuracy" in row for row in rows):
        raise UserError(f"{folder}: not the folder of a run (its metrics.jsonl is missing, or holds no evaluation)")
    return rows


def compare(opts: "EvalOptions") -> None:
    """--runs: the last evaluation of each as a table, and their curves as a figure."""
    runs = {folder: read_run(folder) for folder in opts.runs}
    last = {name: [row for row in rows if "greedy_accuracy" in row][-1] for name, rows in runs.items()}
    print(side_by_side(last))
    if opts.figure:
        draw_curves({name: [rows] for name, rows in runs.items()}, opts.figure)


def new_figure(panels: list[str], columns: int):
    from matplotlib.figure import Figure  # which takes a second

    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.67 * columns, 3 * rows + 0.3), layout="constrained")
    axes = [*figure.subplots(rows, columns, squeeze=False).flat]
    for ax, title in zip(axes, panels):
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.3)
    return figure, axes


def save_figure(figure, axes: list, path: str) -> None:
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    figure.savefig(path, dpi=150)


def draw_curves(groups: dict[str, list[list[dict]]], path: str, panels: tuple[str, ...] = tuple(PANELS)) -> None:
    """groups: by name the metrics.jsonl of some runs. A line for each is their mean, in a band of its 95 % interval."""
    figure, axes = new_figure([PANELS[key] for key in panels], 3)
    for ax, key in zip(axes, panels):
        for (name, runs), (colour, style, marker) in zip(groups.items(), LOOKS * 9):
            series = [{row["iteration"]: row[key] for row in rows if row.get(key) is not None} for rows in runs]
            x = sorted(set.intersection(*map(set, series)))
            means = [interval([values[i] for values in series]) for i in x]
            mean, half = torch.tensor(means).view(-1, 2).unbind(1)  # (iterations,)
            ax.plot(x, mean, color=colour, linestyle=style, marker=marker, markevery=0.1, markersize=4, label=name)
            ax.fill_between(x, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
        ax.set(xlabel="iteration", ylim=(0 if key in PER_ANSWER else None, None))
    save_figure(figure, axes, path)


def explain(row: dict, alpha: float) -> dict:
    """A row of samples.jsonl as `show` shows it. A step's return-to-go is what the learned reward `pays`, alpha * (r_k
    + ... + r_K) or alpha * r_outcome, and Correct. KL penalty and bootstrapped value, in no file, are left out."""
    texts, scores, refined = [text.strip() for text in steps_of(row)], row["scores"], row["refined"]
    question, outcome, ends = row["question"], row["outcome"], row["char_ends"]
    good = oracle(question, row["response"], ends) if is_toy(question) else [None] * len(texts)
    pays = [None if outcome is None else alpha * outcome * (not row["truncated"])] * len(texts)
    if refined is not None:
        pays = [alpha * sum(refined[k:]) for k in range(len(texts))]
    steps = []
    for k, text in enumerate(texts):
        again = texts.index(text) + 1 if text in texts[:k] else None
        total = None if pays[k] is None else pays[k] + row["correct"]
        step = {"text": text, "repeats": again, "pays": pays[k], "return": total, "oracle": good[k]}
        steps.append(step | {"score": scores and scores[k], "r": refined and refined[k]})
    gold, rest = extract(row["gold"]) or row["gold"], row["response"][ends[-1] if ends else 0 :].strip()
    shown = {key: row.get(key) for key in ("question", "verdict", "outcome", "correct", "tracked")}
    return {**shown, "gold": gold, "steps": steps, "rest": rest}


def read_show(folder: str) -> dict:
    """A run's name, reward and alpha, and of each iteration its means and a few answers."""
    path, means, answers = Path(folder), {row["iteration"]: row for row in read_run(folder)}, defaultdict(list)
    run = json.loads((path / "config.json").read_text())
    for row in read_answers(path / "samples.jsonl"):
        answers[row["iteration"]].append(explain(row, run["alpha"]))
    if not answers:
        raise UserError(f"{folder}: has no answers yet, its first iteration is not done")
    keys = ("success", "steps", "repeats", "learned_reward")
    rows = [{"iteration": i, **{k: means.get(i, {}).get(k) for k in keys}, "answers": x} for i, x in answers.items()]
    return {"run": path.resolve().name, "reward": run["reward"], "alpha": run["alpha"], "iterations": rows}


def answer_text(answer: dict) -> str:
    """For the terminal, with the columns that its reward has."""
    columns = [key for key in ("score", "r", "return", "oracle") if any(x[key] is not None for x in answer["steps"])]
    title = f"{answer['question']}   gold {answer['gold']}, {answer['verdict']}"
    title += "" if answer["outcome"] is None else f", outcome score {answer['outcome']:.2f}"
    title += "   (the same question in every iteration)" if answer["tracked"] else ""
    heads = "   k" + "".join(f"{key:>8}" for key in columns) + "  step"
    below, lines = "\n" + " " * (len(heads) - 4), [title, heads]  # below: where a step goes on that has several lines
    for k, step in enumerate(answer["steps"], 1):
        words = step | {"oracle": {True: "right", False: "wrong"}.get(step["oracle"], "")}
        cells = "".join(f"{x:>8}" if isinstance(x, str) else f"{x:8.2f}" for x in map(words.get, columns))
        again = f"   (repeats {step['repeats']})" if step["repeats"] else ""
        lines.append(f"{k:4}{cells}  {step['text']}{again}".replace("\n", below))
    rest = f"\n{answer['rest']}   (cut off: no step)".replace("\n", below) if answer["rest"] else ""
    return clean("\n".join(lines) + rest)


def show(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="eval.py show", allow_abbrev=False)
    parser.add_argument("run", help="the folder of a run")
    parser.add_argument("--iteration", type=int, help="where to begin; default: show the first and the last")
    parser.add_argument("--html", help="write a page with a slider over the iterations to this file, instead")
    opts = parser.parse_args(argv)
    run = read_show(opts.run)
    rows = {row["iteration"]: row for row in run["iterations"]}
    if opts.iteration not in (None, *rows):
        raise UserError(f"{opts.run}: has no answers of iteration {opts.iteration}, but of {min(rows)} to {max(rows)}")
    if opts.html:
        # not one <, lest a model's </script> end the data, or its <!-- with <script hide the page's own end of them
        text = json.dumps({**run, "start": f"#iteration={opts.iteration or min(rows)}"}).replace("<", "\\u003c")
        page = Path(__file__).with_name("assets") / "show.html"
        write(Path(opts.html), page.read_text(encoding="utf-8").replace("{{run}}", text))
        return print(f"written: {opts.html}")
    print(f"{run['run']}: reward {run['reward']}, alpha {run['alpha']:g}")
    print("return: alpha * (r_k + ... + r_K, or r_outcome) + Correct, without KL penalty and value of cut-off answers")
    for i in [opts.iteration] if opts.iteration else sorted({min(rows), max(rows)}):
        means = ", ".join(f"{key.replace('_', ' ')} {x:.2f}" for key, x in rows[i].items() if isinstance(x, float))
        print(f"\niteration {i} of {max(rows)}: {means}")
        for answer in rows[i]["answers"]:
            print("\n" + answer_text(answer))


@dataclass
class EvalOptions(TextOptions):
    model: str = option("", "a run's folder, a model's folder or a hub name")
    runs: list[str] = field(default_factory=list, metadata={"help": "folders of runs to compare"})
    figure: str = option("", "with --runs: write the curves to this file (png, pdf, svg)")
    data: str = option("", "problems: toy, gsm8k, math, math-500, files, NAME,NAME; empty: the run's evaluation set")
    problems: int = option(0, "how many of each set at most; 0: all, 1000 of an embedded world", "[0, inf)")
    samples: int = option(1, "sampled answers per problem, n; above 1 also pass@k, votes, best-of-n", "[1, inf)")
    prm_format: str = option("", "how a published --prm reads, if its name does not say", choices=["", *prm.FORMATS])
    prm: str = option("", "a PRM, by folder or hub name: best-of-n and weighted votes by it")
    orm: str = option("", "folder of an ORM, likewise")
    processbench: str = option("", "with --prm: splits of Qwen/ProcessBench, or files in its format: NAME,NAME")
    threshold: float = option(0.5, "with --processbench: a step that scores below is wrong", "[0, 1]")
    pairs: str = option("", "with --prm or --orm: chosen and rejected answers, RewardBench's fields: file or hub name")
    temperature: float = option(1.0, "of the sampled answers", "(0, inf)")
    dtype: str = option("float32", "of all models", choices=list(DTYPES))
    slots: int = option(256, "answers that decode at once", "[1, inf)")
    seed: int = option(0, "of the sampled answers", SEEDS)
    out: str = option("", "with --model a folder for answers, scores, results; empty: runs/eval/...")


def parse(argv: list[str] | None = None) -> EvalOptions:
    """Where --model is a run, its own settings are the defaults, and its model/ is the model."""
    parser = HfArgumentParser(EvalOptions, usage=__doc__.split("\n\n")[1].strip(), allow_abbrev=False)
    folder = Path(parser.parse_args(argv).model or "/nowhere")
    if is_run := (folder / "model").is_dir() and (folder / "config.json").is_file():
        run = json.loads((folder / "config.json").read_text())
        same = ("prompt", "separator", "max_prompt_tokens", "max_new_tokens", "slots", "temperature", "dtype")
        parser.set_defaults(data=run["eval_data"] or run["data"], **{key: run[key] for key in same})
    opts = EvalOptions(**vars(parser.parse_args(argv)))
    modes = [opts.model and opts.data, opts.runs, opts.processbench or opts.pairs]
    if sum(map(bool, modes)) != 1 or opts.model and not modes[0] or opts.figure and not opts.runs:
        raise UserError("give one of --model (with --data), --runs (it alone with --figure), --processbench or --pairs")
    if opts.model and (opts.prm or opts.orm) and opts.samples < 2:
        raise UserError("--prm and --orm choose among several answers: give --samples 2 or more")
    if (opts.processbench or opts.prm_format) and not opts.prm or opts.pairs and not (opts.prm or opts.orm):
        raise UserError("--processbench and --prm-format need a --prm, and --pairs a --prm or an --orm")
    opts.model = str(folder / "model") if is_run else opts.model
    return opts


def evaluate_model(opts: EvalOptions, device) -> None:
    """Answers, scores, report. A later call goes on from its files, and is refused if they are of other settings."""
    problems, tokenizer = load_problems(opts.data, "test", opts.problems or None), load_tokenizer(opts.model)
    encode_prompts(tokenizer, problems, opts.prompt, opts.max_prompt_tokens)  # bad input first
    scorers = {kind: Scorer(opts, kind, device) for kind in ("orm", "prm") if getattr(opts, kind)}
    same = (*(f.name for f in fields(TextOptions)), "samples", "temperature", "seed", "dtype")
    settings = {"model": prm.model_key(opts.model), "problems": problems_key(problems)}
    settings |= {name: getattr(opts, name) for name in same}
    folder = Path(opts.out or f"runs/eval/{Path(opts.model.removesuffix('/model')).name}-{prm.short_hash(settings)}")
    say(f"answers, scores and results: {folder}/")

    model, answers, weights = None, {}, {}
    for way, n, temperature in (("greedy", 1, 0.0), ("sampled", opts.samples, opts.temperature)):  # 1. answers
        path = folder / f"{way}.jsonl"
        if model is None and len(whole_lines(path)) < n * len(problems):
            model = as_sampler(load_causal_lm(opts.model, DTYPES[opts.dtype], device))
        how = dict(n=n, temperature=temperature, seed=opts.seed, slots=opts.slots, progress=f"{way} answers")
        make = partial(answer, model, tokenizer, problems, opts=opts, **how)
        prm.in_blocks(path, f"{way} answers", settings, len(problems), n, opts.slots, make)
        answers[way] = read_answers(path)
    model = make = None  # room for the reward models

    for kind in [*scorers]:  # 2. scores
        scorer = scorers.pop(kind)
        key = {**settings, kind: prm.model_key(getattr(opts, kind)), "format": scorer.form}
        path = folder / f"{kind}-{prm.short_hash(key)}.jsonl"
        make = partial(scorer.score_rows, answers["sampled"])
        prm.in_blocks(path, f"{kind} scores", key, len(problems), opts.samples, opts.slots, make)
        weights |= ways(kind, [row["scores"] for row in read_answers(path)])

    if rank() == 0:  # 3. report
        report(opts, problems, answers, weights, folder)


def report(opts: EvalOptions, problems: list[Problem], answers: dict, weights: dict, folder: Path) -> None:
    """Print the tables, and write them: results.md, results.json."""
    values, parts = measures(**answers, n=opts.samples, weights=weights), defaultdict(lambda: defaultdict(list))
    for i, p in enumerate(problems):
        for part in {"", p.subject, p.level and f"level {p.level}"}:  # "": all of the data set
            parts[p.source][part].append(i)
    tables, means, results = [], [], {}
    for source, inside in parts.items():
        some = sorted(inside)[1:]
        results[source] = {name: bootstrap(x[inside[""]]) for name, x in values.items()}
        rows = [[name, percent(bounds)] for name, bounds in results[source].items()]
        for row, x in zip(rows, values.values()):
            row += [f"{100 * x[inside[part]].mean():.1f}" for part in some]
        heads = [f"{source}, %", f"{len(inside[''])} problems", *(f"{part} ({len(inside[part])})" for part in some)]
        tables.append(markdown(heads, rows))
        for way, n in (("greedy", 1), ("sampled", opts.samples)):
            found = summarise([row for row in answers[way] if problems[row["index"]].source == source], n)
            means.append([source, way, *(f"{found[key]:.2f}" for key in PER_ANSWER)])
    text = "\n\n".join([*tables, markdown(["per answer", "", *PER_ANSWER], means)])
    print("\n" + text)
    write(folder / "results.md", text + "\n")
    write(folder / "results.json", json.dumps({"options": asdict(opts), "results": results}, indent=1))


def main() -> None:
    if sys.argv[1:2] == ["show"]:
        return show(sys.argv[2:])
    opts = parse()
    if opts.runs:
        return compare(opts)
    with processes() as device:
        (evaluate_model if opts.model else evaluate_reward_models)(opts, device)


if __name__ == "__main__":
    run_script(main)
