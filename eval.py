"""Evaluation: greedy, sampled, pass@k, majority vote, best-of-N and weighted votes; runs side by side.

    python eval.py --model runs/NAME --n 16 --prm DIR     # one model: a run, a folder or a hub name
    python eval.py --model DIR --data FILE.jsonl
    python eval.py --runs runs/A runs/B --figure curves.png

`accuracy` is given with a 95 % interval over problems, the unit that was drawn. pass@k is the unbiased estimate
1 - C(n-c, k) / C(n, k) of c right answers among n (arXiv 2107.03374). Votes count answers that the grader holds equal as
one; a weighted vote adds up the reward model's scores instead of counting. A PRM's step scores are reduced to one number
by their last, minimum, mean or product. A truncated answer is wrong and has no vote.

Left out: intervals by bootstrap, results by subject and level, ProcessBench.
"""

import json
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

import prm
from data import Problem, TextOptions, UserError, decode, encode_prompts, load_problems, option, run_script, step_ends
from grader import extract, grade, verdict
from model import ScalarModel, eos_ids, gather, load_causal_lm, load_tokenizer, start_processes, watching
from rollout import Sample, as_sampler, rollout

# ------------------------------------------------------------------------------------------------ answers


def judge(tokenizer, problems: list[Problem], samples: list[list[Sample]], separator: str) -> list[dict]:
    """One dictionary per answer, in order: text, right or wrong, steps, tokens, exact repeats of a step."""
    rows = []
    for problem, group in zip(problems, samples):
        for s in group:
            text, ends = decode(tokenizer, s.ids), step_ends(tokenizer, s.ids, separator, s.truncated)
            steps = [step.strip() for step in text.split(separator) if step.strip()]
            kind = "truncated" if s.truncated else verdict(problem.answer, text).kind
            rows.append({
                "question": problem.question, "response": text, "gold": problem.answer,
                "verdict": kind, "correct": kind == "match", "truncated": s.truncated,
                "steps": len(ends), "tokens": len(s.ids), "repeats": len(steps) - len(set(steps)), "ends": ends,
            })  # fmt: skip
    return rows


def evaluate(
    model, tokenizer, problems: list[Problem], prompt: str, separator: str, *, max_new_tokens: int,
    max_prompt_tokens: int = 1 << 30, temperature: float = 1.0, n: int = 1, slots: int = 256, seed: int = 0,
    rank: int = 0, world: int = 1, progress: str = "",
) -> tuple[dict, list[dict]]:  # fmt: skip
    """Summary over all problems, and the answers: n for each problem, in order. model: a causal LM or a Sampler of one.
    temperature 0 is greedy."""
    sampler, mine = as_sampler(model), range(rank, len(problems), world)
    prompts = encode_prompts(tokenizer, [problems[i] for i in mine], prompt, max_prompt_tokens) if mine else []
    samples = rollout(
        sampler, prompts, n, max_new_tokens=max_new_tokens, eos_ids=eos_ids(sampler.model, tokenizer),
        temperature=temperature, slots=slots, seeds=[seed * 1_000_003 + i for i in mine],
        progress=progress if rank == 0 else "",
    )  # fmt: skip
    rows = judge(tokenizer, [problems[i] for i in mine], samples, separator)
    for k, row in enumerate(rows):
        row |= {"index": mine[k // n], "ids": samples[k // n][k % n].ids}
    rows = sorted(gather(rows), key=lambda row: row["index"])
    return summarise(rows, n), rows


def summarise(rows: list[dict], n: int) -> dict:
    """Means over the answers; stderr is that of the mean over problems, each with n answers."""
    correct = torch.tensor([row["correct"] for row in rows], dtype=torch.float64).view(-1, n).mean(1)
    result = {"accuracy": correct.mean().item(), "stderr": correct.std(correction=0).item() / len(correct) ** 0.5}
    for key in ("steps", "tokens", "repeats", "truncated"):
        result[key] = sum(row[key] for row in rows) / len(rows)
    return result


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that k of the n answers, drawn without replacement, hold a right one."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def vote(answers: list[str | None], weights: list[float]) -> str | None:
    """The answer with the largest sum of weights; answers that the grader holds equal are one, the first such spelling."""
    total = defaultdict(float)
    for answer, weight in zip(answers, weights):
        if answer is not None:
            total[next((a for a in total if a == answer or grade(a, answer)), answer)] += weight
    return max(total, key=total.get) if total else None


AGGREGATES = {"last": lambda s: s[-1], "min": min, "mean": lambda s: sum(s) / len(s), "product": math.prod}


def choose(rows: list[dict], n: int, weights: list[float], how: str) -> float:
    """Accuracy when one of the n answers of each problem is chosen, by "best" or by "vote"."""
    right = 0
    for start in range(0, len(rows), n):
        group, w = rows[start : start + n], weights[start : start + n]
        if how == "best":
            right += group[max(range(n), key=lambda j: w[j])]["correct"]
        else:
            answers = [None if row["truncated"] else extract(row["response"]) for row in group]
            chosen = vote(answers, w)
            right += any(row["correct"] for row, a in zip(group, answers) if a is not None and a == chosen)
    return right / (len(rows) // n)


def best_of_n(rows: list[dict], n: int, kind: str, model: ScalarModel, tokenizer, prompt: str) -> dict[str, float]:
    """best-of-n and weighted vote by an ORM ("orm"), or by each aggregate of a PRM's step scores ("prm")."""
    batch = prm.to_batch(rows, tokenizer, prompt)
    plan, device = batch.plan(list(range(len(rows))), 16384), model.lm.device
    if kind == "orm":
        weights = {"orm": prm.score_outcomes(model, batch, plan, device).tolist()}
    else:
        ends, mask = prm.pad_steps([row["ends"] for row in rows])
        scores = prm.score_steps(model, batch, ends, plan, device)
        steps = [s[m].tolist() or [0.0] for s, m in zip(scores, mask)]
        weights = {f"prm {name}": [f(s) for s in steps] for name, f in AGGREGATES.items()}
    names = {"best": f"best of {n} by", "vote": f"vote of {n} by"}
    return {f"{names[how]} {by}": choose(rows, n, w, how) for by, w in weights.items() for how in names}


# ------------------------------------------------------------------------------------------------ tables and figures


def before_after(before: dict, after: dict, answers: tuple[list, list]) -> str:
    """What training changed: a table, and some answers before and after."""
    lines = [f"{'':28}{'before':>16}{'after':>16}"]
    accuracy = lambda r, way: f"{100 * r[way + '_accuracy']:.1f} ± {196 * r[way + '_stderr']:.1f} %"
    for way in ("greedy", "sampled"):
        lines.append(f"{way + ' accuracy':28}{accuracy(before, way):>16}{accuracy(after, way):>16}")
        for key in ("steps", "tokens", "repeats", "truncated"):
            name = "  truncated answers" if key == "truncated" else f"  {key} per answer"
            lines.append(f"{name:28}{before[f'{way}_{key}']:>16.2f}{after[f'{way}_{key}']:>16.2f}")
    for b, a in zip(*answers):
        lines.append(f"\nquestion  {b['question']}")
        for when, x in (("before", b), ("after", a)):
            kind = {"match": "right", "mismatch": "wrong"}.get(x["verdict"], x["verdict"])
            lines.append(f"{when:9} {x['response'].strip()}   ({kind})".replace("\n", "\n" + " " * 10))
    return "\n".join(lines)


def read_run(folder: str) -> list[dict]:
    """The lines of metrics.jsonl. Raises UserError if the folder holds no run."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder}: not the folder of a run (it has no metrics.jsonl)")
    rows = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if not any("greedy_accuracy" in row for row in rows):
        raise UserError(f"{path}: holds no evaluation")
    return rows


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
    heads.append("process reward")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for run in runs:
        m = run["metrics"]
        cells = [run["run"], str(m["iteration"])]
        for way in ("greedy", "sampled"):
            cells.append(f"{100 * m[f'{way}_accuracy']:.1f} ± {196 * m[f'{way}_stderr']:.1f}")
            cells += [f"{m[f'{way}_{key}']:.1f}" for key in ("steps", "tokens")]
        lines.append("| " + " | ".join([*cells, f"{m.get('process_reward') or 0:.2f}"]) + " |")
    return "\n".join(lines)


def draw_curves(folders: list[str], path: str) -> None:
    """Accuracy, steps, length and process reward against iteration, one line a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito
    styles = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2))]  # told apart in grey print too
    panels = [
        ("greedy_accuracy", "greedy accuracy, unseen problems"),
        ("success", "success rate of the rollout (sampled)"),
        ("steps", "steps per answer"),
        ("tokens", "tokens per answer"),
        ("repeats", "exact repeats per answer"),
        ("process_reward", "process reward per answer"),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for ax, (key, title) in zip(axes.flat, panels):
        for i, folder in enumerate(folders):
            points = [(row["iteration"], row[key]) for row in read_run(folder) if row.get(key) is not None]
            if points:
                marker = "o" if key == "greedy_accuracy" else None
                ax.plot(*zip(*points), color=colours[i % 7], linestyle=styles[i % 7], marker=marker, label=Path(folder).name)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("iteration")
        ax.grid(alpha=0.3)
        if "accuracy" in key or key == "success":
            ax.set_ylim(-0.03, 1.03)
        else:
            ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    axes.flat[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------ the script


@dataclass
class Options(TextOptions):
    model: str = option("", "a run's folder, a model's folder or a hub name")
    runs: list[str] = field(default_factory=list, metadata={"help": "folders of runs to compare, instead of --model"})
    figure: str = option("", "with --runs: write the curves to this file (png, pdf, svg)")
    data: str = option("", "problems (see train.py); empty: the run's evaluation problems")
    problems: int = option(1000, "how many problems at most")
    n: int = option(1, "sampled answers per problem; above 1 also pass@k, votes, best-of-n")
    prm: str = option("", "folder of a PRM: best-of-n and weighted votes by it")
    orm: str = option("", "folder of an ORM, likewise")
    temperature: float = option(1.0, "of the sampled answers")
    slots: int = option(256, "answers that decode at once")
    seed: int = option(0, "of the sampled answers")
    out: str = option("", "write the results to this JSON file")
    answers: str = option("", "write every answer to this JSONL file")


def parse(argv: list[str] | None = None) -> Options:
    usage = "python eval.py --model M | --runs R [R ...] [--OPTION VALUE ...]"
    parser = HfArgumentParser(Options, usage=usage, allow_abbrev=False)
    o = Options(**vars(parser.parse_args(argv)))
    if bool(o.model) == bool(o.runs):
        raise UserError("give either --model or --runs")
    if o.figure and not o.runs:
        raise UserError("--figure draws the curves of --runs: a model alone has none")
    if (o.prm or o.orm) and o.n < 2:
        raise UserError("--prm and --orm choose among several answers: give --n 2 or more")
    config = Path(o.model) / "config.json"
    if o.model and (Path(o.model) / "model").is_dir() and config.is_file():  # a run: its own settings are the defaults
        run = json.loads(config.read_text())
        same = ("prompt", "separator", "max_prompt_tokens", "max_new_tokens", "slots", "temperature")
        parser.set_defaults(data=run["eval_data"] or run["data"], **{k: run[k] for k in same})
        o = Options(**vars(parser.parse_args(argv)))
        o.model = str(Path(o.model) / "model")
    if o.model and not o.data:
        raise UserError("--data: say on which problems (toy, gsm8k, math, or a JSONL file)")
    return o


def evaluate_model(o: Options, rank: int, world: int, device) -> None:
    tokenizer, model = load_tokenizer(o.model), load_causal_lm(o.model, device=device)
    problems = load_problems(o.data, "test", o.problems)
    run = lambda **more: evaluate(
        model, tokenizer, problems, o.prompt, o.separator, max_new_tokens=o.max_new_tokens, slots=o.slots,
        max_prompt_tokens=o.max_prompt_tokens, rank=rank, world=world, **more,
    )  # fmt: skip
    greedy, greedy_rows = run(temperature=0.0, progress="greedy")
    sampled, rows = run(temperature=o.temperature, n=o.n, seed=o.seed, progress="sampled")
    if rank > 0:
        return
    results = {"greedy": greedy, "sampled": sampled}
    show = lambda name, value: print(f"{name:28}{value}")
    print(f"{len(problems)} problems of {o.data}")
    for way, r in results.items():
        show(f"{way} accuracy", f"{100 * r['accuracy']:.1f} ± {196 * r['stderr']:.1f} %")
        show("", ", ".join(f"{k} {r[k]:.2f}" for k in ("steps", "tokens", "repeats", "truncated")))
    if o.n > 1:
        right = [sum(row["correct"] for row in rows[i : i + o.n]) for i in range(0, len(rows), o.n)]
        more = {}
        for k in sorted({2**e for e in range(20) if 2**e <= o.n} | {o.n}):
            more[f"pass@{k}"] = sum(pass_at_k(o.n, c, k) for c in right) / len(right)
        more[f"majority of {o.n}"] = choose(rows, o.n, [1.0] * len(rows), "vote")
        for kind in ("orm", "prm"):
            if folder := getattr(o, kind):
                more |= best_of_n(rows, o.n, kind, ScalarModel.load(folder, device=device), tokenizer, o.prompt)
        for name, value in more.items():
            show(name, f"{100 * value:.1f} %")
        results |= more
    if o.out:
        options = {k: v for k, v in asdict(o).items() if k not in ("out", "answers", "runs", "figure")}
        Path(o.out).write_text(json.dumps({"options": options, "problems": len(problems), "results": results}, indent=1))
    if o.answers:
        lines = [json.dumps({"way": way, **row}) for way, r in (("greedy", greedy_rows), ("sampled", rows)) for row in r]
        Path(o.answers).write_text("\n".join(lines) + "\n")


def main() -> None:
    o = parse()
    if o.runs:
        runs = [last_evaluation(folder) for folder in o.runs]
        print(compare(runs))
        if o.out:
            Path(o.out).write_text(json.dumps(runs, indent=1))
        if o.figure:
            draw_curves(o.runs, o.figure)
            print(f"\nwritten: {o.figure}")
    else:
        rank, world, device = start_processes()
        with watching(rank, world):
            evaluate_model(o, rank, world, device)


if __name__ == "__main__":
    run_script(main)
