"""The evidence behind the README: the runs of its claims, their tables and figures, and assets/CLAIMS.md.

    python tests/claims.py main labels                # tables, figures, JSON of these claims, over their runs in runs/
    python tests/claims.py --make main --workers 2    # makes the runs that are missing first, each by its own train.py
    python tests/claims.py --make all                 # six to seven hours on two cores
    python tests/claims.py                            # CLAIMS.md alone, from the JSON files
    python tests/claims.py --make reward=delta alpha=0.1,1 seed+prepare_seed=0,1    # only makes the runs of this grid

A claim is a function from runs to tables, in whose cells stand the values of the single runs, by seed. assets/NAME.json
holds them and what made them. CLAIMS.md is written whole from these files: its verdicts are computed as its numbers
are, so that other runs give other sentences. Ctrl-C stops the runs, which save themselves; the same command goes on.

Left out: tables over a part of a claim's runs (eval.py --runs compares any), runs on several machines.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import redirect_stdout
from io import StringIO
from itertools import product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402  # before torch, see data.py
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data import UserError, load_problems, run_script, toy_lines, whole_lines, write  # noqa: E402
from eval import (  # noqa: E402
    LOOKS, EvalOptions, Scorer, answer_row, answer_text, draw_curves, evaluate_model, explain, interval, markdown,
    new_figure, read_answers, read_run, save_figure,
)
from prm import pad_scores  # noqa: E402
from rewards import BASELINES, PROCESS, REWARDS, refine  # noqa: E402

# ------------------------------------------------------------------------------------------------ the runs

SIX, LEARNED = "reward=success,orm,prm,clip,delta,clip-delta", "reward=orm,prm,clip,delta,clip-delta"
TWO, FIVE = "seed+prepare_seed=0,1", "seed+prepare_seed=0,1,2,3,4"
GRIDS = {  # of a claim that is not here those of main
    "main": [f"{SIX} alpha=0.5 {FIVE}"],
    "low-alpha": [f"reward=success {FIVE}", f"reward=prm,delta alpha=0.3 {FIVE}"],
    "labels": [f"reward=success,prm alpha=0.5 {FIVE}", f"reward=prm labels=oracle alpha=0.5 {FIVE}",
               f"reward=prm flip_labels=0.1,0.2,0.4 alpha=0.5 {FIVE}"],
    "map": [f"reward=success {TWO}", f"{LEARNED},progress,min,normed,penalty alpha=0.03,0.1,0.3,0.5,1,3 {TWO}"],
    "sums": [f"{SIX} preset=sums alpha=0.5 {TWO},2"],
    "drift": ["reward=success,prm,delta,clip-delta alpha=0.5 seed+prepare_seed=0"],
}
OTHER_KERNELS = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}  # drift: no AVX2
TRAIN = [sys.executable, str(ROOT / "train.py")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROBLEMS = 500  # of best-of-n


def combinations(grids: list[str]) -> dict[str, dict[str, str]]:
    """Names and options of the runs of grids such as `alpha=0.1,1 seed+prepare_seed=0,1`: all combinations of values,
    which options joined by a + share. Raises UserError for what is no grid."""
    runs = {}
    for grid in grids:
        axes = []
        for word in grid.split():
            options, _, values = word.partition("=")
            if not all(options.split("+")) or not all(values.split(",")):
                raise UserError(f"{word}: give claims ({', '.join(CLAIMS)}, all), or OPTION=VALUE,VALUE alone")
            axes.append([dict.fromkeys(options.split("+"), value) for value in values.split(",")])
        for parts in product(*axes):
            run = {}
            for part in parts:
                run |= part
            if run.get("reward") == "success":  # which has no weight
                run.pop("alpha", None)
            shown = [k for k in run if k != "prepare_seed" or run[k] != run.get("seed")]
            bare = ("reward", "preset", "labels")  # whose values speak for themselves
            runs["-".join(run[k] if k in bare else k + run[k] for k in shown).replace("/", "_")] = run
    return runs


def reached(folder: Path) -> int:
    lines = whole_lines(folder / "metrics.jsonl")
    return json.loads(lines[-1])["iteration"] if lines else 0


def make(runs: dict[str, dict[str, str]], folder: Path, workers: int, environment: dict[str, str]) -> None:
    """Make those of the runs that are not done, each a process of its own, `workers` at once. Raises UserError at once
    for options that train.py refuses, and at the end for runs that failed."""
    calls, goals, running, failed = {}, {}, {}, []
    single = ["--threads", "1"] if workers > 1 else []
    for name, run in runs.items():
        calls[name] = ["--name", name, "--resume", "--runs-dir", str(folder), *single]
        for option, value in run.items():
            calls[name] += [f"--{option.replace('_', '-')}", value]
        goals[name] = train.parse(calls[name])[0].iterations
    seen = {name: reached(folder / name) for name in runs}
    waiting = [name for name in runs if seen[name] < goals[name] or not (folder / name / "model").is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | environment | ({"OMP_NUM_THREADS": "1"} if workers > 1 else {})
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, or the runs would outlive us
    how = dict(desc=f"{len(runs)} runs", unit="iteration", mininterval=1)
    bar = tqdm(total=sum(goals.values()), initial=sum(seen.values()), **how)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                name = waiting.pop(0)
                with open(folder / f"{name}.log", "w") as log:  # in a session of its own: Ctrl-C is ours to pass on
                    how = dict(stdout=log, stderr=log, env=environment, start_new_session=True)
                    running[name] = subprocess.Popen(TRAIN + calls[name], **how)
            time.sleep(0.2)
            for name, process in [*running.items()]:
                if process.poll() is not None:
                    del running[name]
                    failed += [name] if process.returncode else []
                seen[name] = reached(folder / name)
            bar.set_postfix_str(f"{', '.join(running)}; {len(waiting)} waiting, {len(failed)} failed", refresh=False)
            bar.update(sum(seen.values()) - bar.n)
    except KeyboardInterrupt:
        print("\nthe runs finish their iteration and save it; the same command goes on", file=sys.stderr, flush=True)
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        raise
    finally:
        bar.close()
    if failed:
        said = (folder / f"{failed[0]}.log").read_text().strip().splitlines()[-1:]
        names = ", ".join(failed)
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: {names}; the first says: {' '.join(said)}")


class Run(NamedTuple):
    folder: Path
    options: dict  # of its config.json
    rows: list[dict]  # of its metrics.jsonl


def read_runs(asked: dict[str, dict[str, str]], folder: Path) -> list[Run]:
    """Raises UserError if one is not done, or two differ in an option that is not among those asked for."""
    if missing := [name for name in asked if not (folder / name / "model").is_dir()]:
        share = f"{len(missing)} of {len(asked)} runs are not done"
        raise UserError(f"{folder}: {share}, such as {missing[0]}; --make makes them")
    free = {*train.FREE, "policy", "reward_model", "keys", "commit"} - {"iterations"}
    free |= {option for run in asked.values() for option in run}
    found = []
    for path in [folder / name for name in asked]:
        run = Run(path, json.loads((path / "config.json").read_text()), read_run(path))
        first = found[0] if found else run
        names = (first.options.keys() | run.options.keys()) - free
        if other := sorted(k for k in names if run.options.get(k) != first.options.get(k)):
            pair = f"{path.name} and {first.folder.name}"
            raise UserError(f"{pair} differ in {', '.join(other)}: they cannot share a table")
        found.append(run)
    return found


# ------------------------------------------------------------------------------------------------ tables

PAPER = {  # greedy and sampled % of MATH, Qwen2-1.5B-Instruct (arXiv 2410.15115), before training and by reward
    "before": (24.90, 16.79), "success": (30.58, 27.05), "orm": (30.57, 27.12), "prm": (11.16, 14.68),
    "clip": (30.30, 28.40), "delta": (30.68, 27.96), "clip-delta": (31.44, 28.20),
}
GAIN, BEHIND = "sampled, against before, %", "against success, %"


def select(runs: list[Run], **want) -> list[Run]:
    """Those with these options, by seed."""
    chosen = [run for run in runs if all(run.options[k] == value for k, value in want.items())]
    return sorted(chosen, key=lambda run: run.options["seed"])


def by_reward(runs: list[Run]) -> dict[str, list[Run]]:
    return {reward: select(runs, reward=reward) for reward in REWARDS if select(runs, reward=reward)}


def values(runs: list[Run], key: str, iteration: int | None = None) -> list[float]:
    """Of each run its value in this iteration, or its last one; shares in %."""
    scale, out = 100 if "accuracy" in key or key in ("nonzero", "greedy_truncated") else 1, []
    for run in runs:
        found = [row[key] for row in run.rows if row.get(key) is not None and iteration in (None, row["iteration"])]
        out.append(scale * found[-1])
    return out


def minus(some: list[float], others: list[float]) -> list[float]:
    """Differences by seed, in which what the runs of a seed share cancels."""
    return [x - y for x, y in zip(some, others, strict=True)]


def quality(runs: list[Run], key: str) -> list[float]:
    return [json.loads(Path(run.options["reward_model"], "quality.json").read_text())[key] for run in runs]


def show(numbers: list[float], digits: int = 1) -> str:
    """Mean and interval; of one or two runs their values."""
    several = len(numbers) > 2
    rounded = [round(x, digits) + 0.0 for x in (interval(numbers) if several else numbers)]  # + 0.0: there is a -0.0
    return (" ± " if several else ", ").join(f"{x:.{digits}f}" for x in rounded)


def render(table: dict) -> str:
    """A table in Markdown. A cell is text or the values of the runs; one digit under a head in %, else two."""
    digits = [1 if "%" in head + table["title"] else 2 for head in table["heads"]]
    cells = [[x if isinstance(x, str) else show(x, n) for x, n in zip(row, digits)] for row in table["rows"]]
    return markdown(table["heads"], cells)


def rewards_tables(runs: list[Run], opts) -> dict:
    """Before and after training with each reward."""
    heads = ["reward", "alpha", "seeds", "greedy %", "sampled %", GAIN, BEHIND, "steps", "repeats",
             "process reward, first iteration", "last"]
    success, sampled = select(runs, reward="success"), "sampled_accuracy"
    rows = [["before", "", str(len(success)), values(success, "greedy_accuracy", 0), values(success, sampled, 0), "",
             "", values(success, "sampled_steps", 0), values(success, "sampled_repeats", 0), "", ""]]
    for reward, group in by_reward(runs).items():
        gain = minus(values(group, sampled), values(group, sampled, 0))
        row = [reward, "", str(len(group)), values(group, "greedy_accuracy"), values(group, sampled), gain, "",
               values(group, "sampled_steps"), values(group, "sampled_repeats"), "", ""]
        if reward != "success":
            row[1], row[6] = f"{group[0].options['alpha']:g}", minus(values(group, sampled), values(success, sampled))
            row[9:] = values(group, "learned_reward", 1), values(group, "learned_reward")
        rows.append(row)
    return {"tables": [{"title": "rewards", "heads": heads, "rows": rows}]}


def main_tables(runs: list[Run], opts) -> dict:
    """With the paper's figures, the curves, and an answer of a policy that was trained by prm."""
    found, groups, panels = rewards_tables(runs, opts), by_reward(runs), ("success", "steps", "learned_reward")
    found["tables"][0]["heads"].append("the paper's greedy / sampled %")
    for row in found["tables"][0]["rows"]:
        row.append("{:.2f} / {:.2f}".format(*PAPER[row[0]]))
    draw_curves({name: [run.rows for run in group] for name, group in groups.items()}, opts.out / "hacking.png", panels)
    series = lambda run: {key: [round(row[key], 4) for row in run.rows if key in row] for key in panels}
    found["greedy answers of prm that are cut off, %"] = values(groups["prm"], "greedy_truncated")
    run = groups["prm"][0]
    answers, alpha = read_answers(run.folder / "samples.jsonl"), run.options["alpha"]
    last = [row for row in answers if row["iteration"] == answers[-1]["iteration"]]
    title = f"{run.folder.name}, iteration {last[0]['iteration']}, alpha {alpha:g}"
    text = answer_text(explain(max(last, key=lambda row: row["repeats"]), alpha))
    return {**found, "texts": [f"{title}\n{text}"], "curves": {run.folder.name: series(run) for run in runs}}


def best_of_n_tables(runs: list[Run], opts) -> dict:
    """Of each seed the reward models choose among 16 answers of its policy before training, to each problem."""
    prms, orms, accuracy = select(runs, reward="prm"), select(runs, reward="orm"), {}
    for c, orm in zip([run.options for run in prms], orms):
        out = Path(opts.runs_dir, "eval", f"best-of-16-seed{c['seed']}")
        models = dict(model=c["policy"], prm=c["reward_model"], orm=orm.options["reward_model"])
        same = {key: c[key] for key in ("data", "prompt", "max_new_tokens", "slots")}
        with redirect_stdout(StringIO()):
            evaluate_model(EvalOptions(**models, **same, problems=PROBLEMS, samples=16, out=str(out)), DEVICE)
        figures = json.loads((out / "results.json").read_text())["results"][c["data"]]
        for name, (mean, *_) in figures.items():
            accuracy.setdefault(name, []).append(100 * mean)
    base, vote, rows = accuracy["pass@1"], accuracy["majority of 16"], [["pass@1", accuracy["pass@1"], "", ""]]
    for name in [name for name in accuracy if " of 16" in name] + ["pass@16"]:
        x = accuracy[name]
        rows.append([name, x, minus(x, base), "" if x is vote else minus(x, vote)])
    judged = [["PRM: steps, against the oracle", quality(prms, "auroc_oracle")],
              ["PRM: steps, against Monte-Carlo labels", quality(prms, "auroc")],
              ["ORM: answers, against Correct", quality(orms, "auroc")]]
    heads = [f"%, {len(prms)} seeds, {PROBLEMS} problems each", "accuracy", "above pass@1", "above majority"]
    return {"tables": [{"title": "best of n, %", "heads": heads, "rows": rows},
                       {"title": "auroc", "heads": ["AUROC on held-out questions", "mean"], "rows": judged}]}


def orm_tables(runs: list[Run], opts) -> dict:
    group, keys = select(runs, reward="orm"), ("success", "outcome_right", "outcome_wrong")
    rows = [[str(i), str(len(group)), *(values(group, key, i) for key in keys)] for i in (1, 5, 10, 20)]
    heads = ["iteration", "seeds", "success", "ORM of right answers", "of wrong answers"]
    return {"tables": [{"title": "orm", "heads": heads, "rows": rows}]}


def map_tables(runs: list[Run], opts) -> dict:
    groups, tables = by_reward(runs), []
    alphas = sorted({run.options["alpha"] for run in groups["prm"]})
    at = lambda name, alpha: groups[name] if name == "success" else select(groups[name], alpha=alpha)
    seeds = " and ".join(str(run.options["seed"]) for run in groups["success"])
    for key, what in {"sampled_accuracy": "sampled accuracy, %", "sampled_steps": "steps of a sampled answer"}.items():
        rows = [[name, *(values(at(name, alpha), key) for alpha in alphas)] for name in groups]
        title = f"{what}, seed {seeds}"
        tables.append({"title": title, "heads": [title, *(f"alpha {alpha:g}" for alpha in alphas)], "rows": rows})
    figure, axes = new_figure([table["title"] for table in tables], 2)
    for ax, table in zip(axes, tables):
        for (name, *cells), (colour, style, marker) in zip(table["rows"], LOOKS):
            mean = [sum(cell) / len(cell) for cell in cells]
            ax.plot(alphas, mean, color=colour, linestyle=style, marker=marker, markersize=4, label=name)
            ax.vlines(alphas, [*map(min, cells)], [*map(max, cells)], color=colour, linewidth=0.8)
        ax.set(xscale="log", xlabel="alpha", ylim=(0, None))
        ax.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas], minor=False)
        ax.minorticks_off()
    axes[0].set_ylim(top=100)
    save_figure(figure, axes, opts.out / "map.png")
    return {"tables": tables}


def labels_tables(runs: list[Run], opts) -> dict:
    heads = ["labels", "seeds", "step AUROC against the oracle", "greedy %", "sampled %", BEHIND, "steps",
             "against success", "repeats", "process reward, first iteration", "last"]
    success, rows = select(runs, reward="success"), []
    for labels, flip in (("oracle", 0.0), ("hard", 0.0), ("hard", 0.1), ("hard", 0.2), ("hard", 0.4)):
        group = select(runs, reward="prm", labels=labels, flip_labels=flip)
        name = "exact" if labels == "oracle" else "Monte-Carlo" + (f", {flip:.0%} flipped" if flip else "")
        sampled, steps = values(group, "sampled_accuracy"), values(group, "sampled_steps")
        rows.append([
            name, str(len(group)), quality(group, "auroc_oracle"), values(group, "greedy_accuracy"), sampled,
            minus(sampled, values(success, "sampled_accuracy")), steps, minus(steps, values(success, "sampled_steps")),
            values(group, "sampled_repeats"), values(group, "learned_reward", 1), values(group, "learned_reward"),
        ])
    return {"tables": [{"title": "labels", "heads": heads, "rows": rows}]}


def dense_tables(runs: list[Run], opts) -> dict:
    when, groups = (1, 5, 10, 15, 20), by_reward(runs)
    rows = [[name, str(len(groups[name])), *(values(groups[name], "nonzero", i) for i in when)] for name in PROCESS]
    heads = ["steps whose reward is not 0, %", "seeds", *(f"iteration {i}" for i in when)]
    return {"tables": [{"title": "dense, %", "heads": heads, "rows": rows}]}


def cost_tables(runs: list[Run], opts) -> dict:
    """Means of the first five iterations, in which all policies still answer alike."""
    heads = ["seconds of an iteration", "seeds", "sample", "score", "refine, in milliseconds", "update", "total"]
    rows = []
    for reward, group in by_reward(runs).items():
        phases = []
        for phase in ("sample", "score", "refine", "update"):
            first = [values(group, f"seconds_{phase}", i) for i in (1, 2, 3, 4, 5)]
            phases.append([sum(seconds) / 5 for seconds in zip(*first)])
        total = [sum(seconds) for seconds in zip(*phases)]
        phases[2] = [1000 * seconds for seconds in phases[2]]
        rows.append([reward, str(len(group)), *phases, total])
    return {"tables": [{"title": "cost", "heads": heads, "rows": rows}]}


def longer_answers(kind: str, problems: list, most: int) -> tuple[list[dict], list[int]]:
    """Right answers with 0 to `most` needless steps, and which step is the last of these: a step `repeated`, or `empty`
    ones, a letter alone, before the answer line."""
    rng, rows, places = random.Random(0), [], []
    for problem in problems:
        lines = toy_lines(problem.question)
        k = rng.randrange(len(lines) - 1) + 1 if kind == "repeated" else len(lines) - 1
        needless = lines[k - 1] if kind == "repeated" else lines[k - 1][0]
        for m in range(most + 1):
            rows.append(answer_row(problem.question, "\n".join(lines[:k] + [needless] * m + lines[k:]), "\n"))
            places.append(k + m - 1)
    return rows, places


def repeats_tables(runs: list[Run], opts) -> dict:
    """What each reward pays, before alpha: the sum over an answer, and what PPO credits to the last needless step."""
    most, few, tables = 10, (0, 1, 2, 3, 5, 10), []
    for kind in ("repeated", "empty"):
        total, credit = ({name: [] for name in PROCESS + BASELINES} for _ in range(2))  # of each run the means by m
        for c in [run.options for run in select(runs, reward="prm")]:
            rows, places = longer_answers(kind, load_problems(c["data"], "test", 200), most)
            scorer = Scorer(EvalOptions(prm=c["reward_model"], prompt=c["prompt"]), "prm", DEVICE)
            scores, mask = pad_scores(scorer.scores(rows))  # (B, K)
            for name in PROCESS + BASELINES:
                r = refine(name, scores, mask, c["eta"])  # (B, K)
                returns = r.flip(1).cumsum(1).flip(1)[torch.arange(len(rows)), places]  # (B,)
                total[name].append(r.sum(1).view(-1, most + 1).mean(0).tolist())
                credit[name].append(returns.view(-1, most + 1).mean(0).tolist())
        for what, paid in (("sum", total), ("return-to-go of the last one", credit)):
            title = f"{kind} steps: {what}"
            cells = [[name, *([means[m] for means in x] for m in few)] for name, x in paid.items()]
            tables.append({"title": title, "heads": [title, *(f"m = {m}" for m in few)], "rows": cells})
    return {"tables": tables, "empty step": "a letter alone (`b`)"}


# ------------------------------------------------------------------------------------------------ the page

CLAIMS = {  # in the page's order: heading; (runs, the script's options) -> {"tables": [...], ...}, what its JSON holds
    "main": ("Claims 2, 4 and 5: training with the six rewards", main_tables),
    "low-alpha": ("Claims 4 and 5 at a lower alpha", rewards_tables),
    "best-of-n": ("Claim 1: the same reward models at inference time", best_of_n_tables),
    "orm": ("Claim 3: an ORM against the success reward", orm_tables),
    "map": ("Claim 6: Delta's hole, and the map of alpha and reward", map_tables),
    "labels": ("Claim 7: does hacking need label noise?", labels_tables),
    "dense": ("Claim 8: is the refined reward dense, and bounded?", dense_tables),
    "cost": ("Claim 9: what a refinement costs", cost_tables),
    "sums": ("Claim 10: another world", rewards_tables),
    "repeats": ("Claim 11: what needless steps are paid", repeats_tables),
    "drift": ("How far numbers drift on another processor", rewards_tables),
}
GONE, FAR = 10, 10  # % of greedy accuracy, points of sampled accuracy: see the INTRO
INTRO = """Claims 1 to 5 are the paper's, 6 to 11 look behind them. Each is an experiment in an embedded world, on two
    cores. A seed is everything: warm start, labels, reward models, PPO (`--seed S --prepare-seed S`). A run has
    {iterations} iterations; accuracy is that on {eval_problems} unseen problems. Intervals are 95 %, Student's t over
    seeds; differences are taken seed by seed. *Hacked*: sampled accuracy ends below that of `success` and answers are
    longer, both by more than their intervals. *Far behind*: more than {far} points below `success`. *Gone*: greedy
    accuracy below {gone} %. The command under a heading makes tables and figures from the runs, with `--make` the runs
    first, those of `main` in about an hour. The JSON files beside this page hold each run's values and options."""


def listed(items: list, digits: int = 1) -> str:
    """`0.0, 0.9 and 86.1`; of texts `a and b`; or `none`."""
    text = [x if isinstance(x, str) else show([x], digits) for x in items]
    return " and ".join([", ".join(text[:-1]), text[-1]] if len(text) > 1 else text or ["none"])


def seeds(chosen: list, of: list, unit: str = "") -> str:
    """`2 of 5 seeds (0.0 and 0.9 %)`."""
    return f"{len(chosen) or 'none'} of {len(of)} seeds" + (f" ({listed(chosen)}{unit})" if chosen else "")


def sign(numbers: list[float]) -> int:
    """1 if the mean of the runs is above 0, -1 if below, 0 if they are too few or too different to tell."""
    centre, half = interval(numbers)
    return 0 if len(numbers) < 3 or abs(centre) <= half else 1 if centre > 0 else -1


def versus(numbers: list[float], what: str) -> str:
    """Where these differences leave us: `24.8 ± 13.6 points below ...`."""
    below = sum(numbers) < 0
    text = f"{show([-x for x in numbers] if below else numbers)} points {'below' if below else 'above'} {what}"
    return text if sign(numbers) else f"{text}, which {len(numbers)} seeds do not tell from 0"


def rows_of(claim: dict, table: int = 0) -> dict[str, dict[str, list[float]]]:
    """The cells of one of its tables by row and head."""
    table = claim["tables"][table]
    return {row[0]: dict(zip(table["heads"], row)) for row in table["rows"]}


def verdicts(rows: dict[str, dict[str, list[float]]], prefix: str = "") -> list[str]:
    """Bullets about the rows of a table that are compared with `success`."""
    out, held = [], []
    for name, row in rows.items():
        if not row[BEHIND]:
            continue
        longer = row.get("against success") or minus(row["steps"], rows["success"]["steps"])
        far = [x for x in row[BEHIND] if x < -FAR]
        gone = [x for x in row["greedy %"] if x < GONE]
        if sign(row[BEHIND]):
            word = "gains" if sign(row[BEHIND]) > 0 else "is hacked" if sign(longer) > 0 else "loses"
            out.append(f"""- **`{prefix}{name}` {word}**: sampled accuracy ends {versus(row[BEHIND], "`success`")}, far
                behind in {seeds(far, row[BEHIND])}, with {show(longer, 2)} steps more; greedy accuracy is gone in
                {seeds(gone, row["greedy %"], " %")}.""")
        else:
            exceptions = f", far behind in {seeds(far, longer)}" if far else ""
            held.append(f"`{prefix}{name}` {show(row[BEHIND])}{exceptions}")
    return out + ([f"- **Not told from `success`**, in points: {'; '.join(held)}."] if held else [])


def map_verdict(accuracy: dict, steps: dict) -> str:
    alphas, broken, held = [*accuracy["success"]][1:], [], []
    for name in [*accuracy][1:]:
        lost = [minus(accuracy[name][alpha], accuracy["success"][alpha]) for alpha in alphas]
        far = [i for i, points in enumerate(lost) if max(points) < -FAR]
        if far:
            broken.append(f"`{name}` from {alphas[far[0]]} on (there {listed(lost[far[0]])} points)")
        else:
            held.append(f"`{name}` ({listed(lost[-1])}; {listed(steps[name][alphas[-1]], 2)})")
    return f"""Far behind in every seed: {listed(broken)}. Never so: {listed(held)}; in brackets their points against
        `success` and their steps at {alphas[-1]}, where `success` has {listed(steps["success"][alphas[-1]], 2)}."""


def paragraphs(found: dict) -> dict[str, list[str]]:
    """What stands below the tables of each claim, from the JSON of all."""
    rows, text = {name: rows_of(claim) for name, claim in found.items()}, {}
    before, success, orm, prm = (rows["main"][name] for name in ("before", "success", "orm", "prm"))
    cut = found["main"].get("greedy answers of prm that are cut off, %")
    text["main"] = [
        "![Success, steps and learned reward of the six rewards](hacking.png)",
        f"""- **`success` {"works" if sign(success[GAIN]) > 0 else "is not shown to work"}** (claim 2): sampled accuracy
        ends {versus(success[GAIN], "its start")}.""",
        *verdicts(rows["main"]),
        f"""Under `prm` (claim 4) exact repeats go from {show(before["repeats"], 2)} to {show(prm["repeats"], 2)} an
        answer, and the process reward from {show(prm["process reward, first iteration"], 2)} to {show(prm["last"], 2)}.
        {f"Of its greedy answers {listed(cut, 0)} % are cut off, by seed." if cut else ""} `clip` and `clip-delta` are
        claim 5. Of the answers that one run kept of its last iteration, the one with the most repeats; `return` is what
        PPO credits to a step, alpha * (r_k + ... + r_K) + Correct, without the KL penalty and the value behind a
        truncated answer:""",
        textwrap.indent("\n".join(found["main"]["texts"]), "    "),
    ]
    others = [listed(rows["low-alpha"][name][BEHIND][2:]) for name in ("prm", "delta")]
    text["low-alpha"] = [*verdicts(rows["low-alpha"]), f"""The alpha was chosen after a look at seeds 0 and 1. The
        others end at {others[0]} points against `success` with `prm`, at {others[1]} with `delta`."""]
    best = rows["best-of-n"]["best of 16 by PRM last"]["above pass@1"]
    vote = rows["best-of-n"]["vote of 16 by PRM product"]["above majority"]
    point = sign(best) > 0 and sign(vote) > 0 and sign(prm[BEHIND]) < 0
    text["best-of-n"] = [f"""A PRM's step scores become one number by their last, minimum, mean or product; *best* takes
        the answer that scores highest, *vote* adds up the scores of equal answers. Best of 16 by the last score is
        {versus(best, "pass@1")}, votes weighted by the product are {versus(vote, "the majority's")}.
        {"Strong at inference, harmful in training: that is the paper's point." if point else ""}"""]
    text["orm"] = [f"""`orm` ends {versus(orm[BEHIND], "`success`")}. An ORM of two levels, one for right and one for
        wrong answers, says no more than Correct does: whitening removes scale and shift."""]
    text["map"] = [
        "![Sampled accuracy and steps of every reward, over alpha](map.png)",
        """Under `delta` all that follows step k telescopes: G_k = s_k for k < K, and G_K = 0. So where the policy could
        answer, the answer line earns 0 (and Correct), while one more right line earns alpha * s_k, and the answer line
        behind it as much as before. No answer is paid more in sum (claim 11), but at each line writing on is credited
        alpha * s_k and answering 0; at a small alpha the KL penalty and the risk of losing Correct outweigh that.
        `clip-delta` closes the hole, for min(s_k - eta, 0) is 0 for a good step; so does `progress`, whose
        G_k = -s_(k-1) is the same for both choices.""",
        map_verdict(rows["map"], rows_of(found["map"], 1)),
    ]
    noisy = rows["labels"]["Monte-Carlo, 40% flipped"]["step AUROC against the oracle"]
    text["labels"] = [*verdicts(rows["labels"], "prm, "), f"""What pays are right, needless steps, about which exact
        labels are not wrong. With 40 % flipped the AUROC is {show(noisy, 2)}, but the best that a PRM can learn is 0.6
        for right steps and 0.4 for others: it pays both nearly alike."""]
    text["dense"] = ["""`delta` touches every step but the last, `clip` those that score below eta. Under `clip-delta`,
        which is both, -eta <= G_k <= 0 for any number of steps: proved in `rewards.py`, and tested."""]
    more = minus(rows["cost"]["prm"]["score"], rows["cost"]["success"]["score"])
    text["cost"] = [f"""To have a reward model at all costs {show(more, 2)} s of scoring (`prm` against `success`).
        First five iterations, while all policies still answer alike; two runs at a time: totals vary by chance."""]
    text["sums"] = ["""Answers are longer than in the first world: one step more is a smaller share of what an answer
        is paid.""", *verdicts(rows["sums"])]
    paid, credit, empty = (rows_of(found["repeats"], i) for i in range(3))
    above = [x for x in minus(empty["prm"]["m = 10"], empty["prm"]["m = 0"]) if x > 0]
    step = found["repeats"].get("empty step", "`=`")
    text["repeats"] = [f"""Right answers of 200 problems to which a step, chosen at random, is added m times more, or m
        empty steps, {step}, before the answer line: the sum of the refined rewards, before alpha, by the PRMs of all
        seeds, and the return-to-go of the last of these steps, which is what PPO credits to writing it. `prm` pays
        {show(paid["prm"]["m = 0"], 2)} for the plain answer, {show(paid["prm"]["m = 10"], 2)} with ten repeats and
        {show(empty["prm"]["m = 10"], 2)} with ten empty steps, which is more in {seeds(above, empty["prm"]["m = 0"])}.
        Under `delta` the sum stays, but the first repeat itself earns its score, {show(credit["delta"]["m = 1"], 2)},
        where the answer line earns 0; under `clip-delta` it earns {show(credit["clip-delta"]["m = 1"], 2)}. The tenth
        is scored {show(credit["delta"]["m = 10"], 2)}."""]
    kernels = " ".join(f"{key}={value}" for key, value in OTHER_KERNELS.items())
    first = {name: [rows["main"][name][head][0] for head in ("greedy %", "sampled %")] for name in rows["drift"]}
    text["drift"] = [f"""A rerun on one machine gives the same digits. Another processor rounds otherwise, and a sampled
        token that differs makes another run of it: expect the verdicts, and means like these, not the digits. The table
        is of seed 0, preparation included, by kernels without AVX2 (`{kernels}`). Greedy and sampled accuracy of the
        same runs in `main`: {listed([f"`{name}` {listed(x)} %" for name, x in first.items()])}."""]
    return text


def against_paper(rows: dict) -> str:
    """Whether differences of sampled accuracy point where the paper's do."""
    cells = []
    for name in [*rows][1:]:
        for base, head in (("before", GAIN), ("success", BEHIND)):
            if name != base:
                theirs = PAPER[name][1] - PAPER[base][1]
                same = {0: "not told", 1: "yes", -1: "no"}[sign(rows[name][head]) * (1 if theirs > 0 else -1)]
                cells.append([f"`{name}` against {base}", f"{theirs:.2f}", show(rows[name][head]), same])
    return markdown(["sampled accuracy, points", "the paper's", "here", "the same direction"], cells)


def fill(block: str) -> str:
    """A paragraph or bullet in lines of at most 120; a table, code or a picture as it is."""
    if block.startswith(("|", "    ", "!")):
        return block
    indent = "  " if block.startswith("- ") else ""
    how = dict(subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return textwrap.fill(" ".join(block.split()), 120, **how)


def page(folder: Path) -> str:
    """CLAIMS.md from the JSON files in a folder."""
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in CLAIMS}
    text, options = paragraphs(found), found["main"]["options_of_the_first"]
    note = "<!-- written by tests/claims.py from the JSON files beside it: change its templates, not this page -->"
    blocks = ["# What was measured", note, fill(INTRO.format(**options, gone=GONE, far=FAR))]
    for name, (title, _) in CLAIMS.items():
        commits = listed(sorted({run["commit"] for run in found[name]["runs"]}))
        made = f"`python tests/claims.py {name}`, over {len(found[name]['runs'])} runs of commit {commits}:"
        blocks += [f"## {title}", made, *map(render, found[name]["tables"]), *map(fill, text[name])]
    blocks += ["## What reproduced, and what did not", against_paper(rows_of(found["main"]))]
    return "\n\n".join(blocks) + "\n"


# ------------------------------------------------------------------------------------------------ the script


def write_claim(name: str, runs: list[Run], opts) -> None:
    """Print its tables, and write them with what made them."""
    found = CLAIMS[name][1](runs, opts)
    print("\n" + "\n\n".join([f"# {name}", *map(render, found["tables"]), *found.get("texts", [])]), flush=True)
    keys = ("name", "seed", "prepare_seed", "alpha", "commit")
    made = {"runs": [{k: run.options[k] for k in keys} for run in runs], "options_of_the_first": runs[0].options}
    whole = json.dumps({"claim": name, "commit": train.commit(), **found, **made})
    rounded = json.loads(whole, parse_float=lambda x: round(float(x), 6))
    write(opts.out / f"{name}.json", json.dumps(rounded, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", help=f"{', '.join(CLAIMS)}, all, or with --make OPTION=VALUE,VALUE ...")
    parser.add_argument("--make", action="store_true", help="make the runs that are missing first")
    parser.add_argument("--workers", type=int, default=0, help="runs at once; 0: one a core, with CUDA one")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=ROOT / "assets", help="folder of JSON files, figures, CLAIMS.md")
    opts = parser.parse_args()
    if opts.workers < 0:
        raise UserError("--workers must be at least 0")
    workers = opts.workers or (1 if DEVICE == "cuda" else os.cpu_count() or 1)
    if opts.make and any("=" in word for word in opts.claims):
        return make(combinations([" ".join(opts.claims)]), opts.runs_dir, workers, {})
    names = [*CLAIMS] if opts.claims == ["all"] else opts.claims
    if unknown := [name for name in names if name not in CLAIMS]:
        raise UserError(f"{unknown[0]}: no claim, choose of {', '.join(CLAIMS)}, all")
    opts.out.mkdir(parents=True, exist_ok=True)
    runs, drift = {name: combinations(GRIDS.get(name, GRIDS["main"])) for name in names}, opts.runs_dir / "drift"
    if opts.make:
        together = {}
        for name in names:
            together |= runs[name] if name != "drift" else {}
        make(together, opts.runs_dir, workers, {})
        if "drift" in names:  # whose runs have the names of main's
            make(runs["drift"], drift, workers, OTHER_KERNELS)
    for name in names:
        write_claim(name, read_runs(runs[name], drift if name == "drift" else opts.runs_dir), opts)
    if missing := [name for name in CLAIMS if not (opts.out / f"{name}.json").is_file()]:
        print(f"\n{opts.out}: no CLAIMS.md, which needs the JSON of {', '.join(missing)} too")
    else:
        write(opts.out / "CLAIMS.md", page(opts.out))
        print(f"\nwritten: {opts.out}/CLAIMS.md")


if __name__ == "__main__":
    run_script(main)
