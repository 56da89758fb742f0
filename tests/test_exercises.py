"""Each exercise passes its check with the real code, none of its tests without; what the open ones must satisfy."""

import ast
import functools
import importlib
import json
import random
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from exercises import EXERCISES, HERE, find, main, stripped
from test_prm import TOKENIZER, labelled

import claims
import prm
import rewards
from data import run_script, split_steps, steps_of, toy_lines
from eval import read_run
from model import ScalarModel, toy_model
from rewards import BASELINES, PROCESS, refine
from train import FREE

# ------------------------------------------------------------------------------------------------ all exercises


class Outcomes:
    """A plugin of pytest: which tests passed, and which did not."""

    def __init__(self):
        self.passed, self.failed = [], []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed.append(report.nodeid)


def outcomes(nodes: list[str], folder: Path) -> Outcomes:
    """pytest within this process, whose modules a test may change, and which has loaded torch already."""
    found, more = Outcomes(), ["-p", "no:cacheprovider", f"--rootdir={HERE}", f"--basetemp={folder}/nested"]
    code = pytest.main(["-q", "--tb=line", *more, *(str(HERE / node) for node in nodes)], plugins=[found])
    assert code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)  # else a test is not there
    return found


def take_out(monkeypatch, number: int) -> None:
    """What `start` changes, in the modules that are loaded, from the text that it would write: a function gets other
    code, so that whoever has imported it has that."""
    exercise = EXERCISES[number]
    source, module = stripped(text_of(number), number), importlib.import_module(Path(exercise.file).stem)
    for name in exercise.names.split():
        space, owner = dict(vars(module)), module
        exec(textwrap.dedent(ast.get_source_segment(source, find(source, name), padded=True)), space)
        *classes, last = name.split(".")
        for part in classes:
            owner = getattr(owner, part)
        if callable(old := getattr(owner, last, None)):
            monkeypatch.setattr(old, "__code__", space[last].__code__)
        else:  # a table, or what an open exercise adds
            monkeypatch.setattr(owner, last, space[last], raising=False)


def text_of(number: int) -> str:
    return (HERE / EXERCISES[number].file).read_text(encoding="utf-8")


def test_every_exercise_passes_with_the_real_code(tmp_path):
    """Those of the open ones are below: here they would only run a second time."""
    nodes = {node for exercise in EXERCISES.values() for node in exercise.nodes() if not exercise.stub}
    found = outcomes(sorted(nodes), tmp_path)
    assert not found.failed and len(found.passed) >= len(nodes) > 50


@pytest.mark.parametrize("number", EXERCISES)
def test_without_the_body_no_test_of_the_exercise_passes(number, tmp_path, monkeypatch):
    take_out(monkeypatch, number)
    found = outcomes(EXERCISES[number].nodes(), tmp_path)
    assert found.failed and not found.passed


def names_of(node: ast.stmt) -> set[str]:
    return {getattr(node, "name", ""), *(getattr(target, "id", "") for target in getattr(node, "targets", []))}


@pytest.mark.parametrize("number", EXERCISES)
def test_only_what_is_named_is_taken_out(number):
    whole, names = text_of(number), {name.partition(".")[0] for name in EXERCISES[number].names.split()}
    rests = [
        [ast.dump(node) for node in ast.parse(text).body if not names_of(node) & names]
        for text in (whole, stripped(whole, number))
    ]
    assert rests[0] == rests[1] and ast.dump(ast.parse(whole)) != ast.dump(ast.parse(stripped(whole, number)))
    assert all(int(n) < number for n in EXERCISES[number].needs.replace(";", ",").split(",") if n.strip().isdigit())


def test_a_working_copy_fails_until_the_real_code_is_back(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "copy"

    def call(*argv) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["exercises.py", *map(str, argv)])
        try:
            code = run_script(main) or 0
        except SystemExit as end:
            code = int(end.code)
        return code, "".join(capsys.readouterr()).splitlines()

    assert "refine in rewards.py" in call("start", 3, folder)[1][0]
    assert call("start", 3, folder)[0] == 2  # it is not empty now
    code, said = call("check", 3, folder)
    assert code == 1 and said[-1].startswith("exercise 3 in ") and "failed (" in said[-1]
    (folder / "rewards.py").write_text(text_of(3))
    code, said = call("check", 3, folder)
    assert code == 0 and len(said) == 1 and "passed (" in said[0]


# ------------------------------------------------------------------------------------------------ where Delta breaks


def made(folder: Path, alpha: float, seed: int, before: float, after: float, iterations: int = 20, **options) -> None:
    """A run of tests/claims.py --make, as far as it is looked at."""
    path = folder / f"delta-alpha{alpha:g}-seed{seed}"
    (path / "model").mkdir(parents=True)
    config = {"reward": "delta", "alpha": alpha, "seed": seed, "prepare_seed": 0, "lr": 3e-4, "slots": seed} | options
    (path / "config.json").write_text(json.dumps(config))
    rows = [{"iteration": i, "greedy_accuracy": x} for i, x in ((0, before), (iterations, after))]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def objections_to_alphas(runs: Path, low: float, high: float) -> list[str]:
    """What the runs do not show of: with alpha low all end no worse than they began, with high all lose over 10
    points."""
    gains, others = {low: {}, high: {}}, set()
    for path in (model.parent for model in runs.glob("*/model")):
        config = json.loads((path / "config.json").read_text())
        if config["reward"] == "delta" and config["alpha"] in gains:
            rows = [row for row in read_run(str(path)) if "greedy_accuracy" in row]
            seeds = config["seed"], config["prepare_seed"]
            gains[config["alpha"]][seeds] = rows[-1]["greedy_accuracy"] - rows[0]["greedy_accuracy"]
            free = {*FREE, "alpha", "seed", "prepare_seed", "policy", "reward_model", "keys"}
            same = {key: value for key, value in config.items() if key not in free}
            others.add((rows[-1]["iteration"], json.dumps(same, sort_keys=True)))
    found = {
        "the larger alpha is at most four times the smaller": low < high <= 4 * low,
        "two seeds or more of each": min(map(len, gains.values())) >= 2,
        "nothing else differs, nor the number of iterations": len(others) <= 1,
        "20 iterations or more": all(iterations >= 20 for iterations, _ in others),
        "with the smaller every run ends no worse than it began": all(gain >= 0 for gain in gains[low].values()),
        "with the larger every run loses more than 10 points": all(gain < -0.1 for gain in gains[high].values()),
    }
    return [what for what, holds in found.items() if not holds]


def test_delta_holds_at_one_alpha_and_breaks_at_four_times_that_at_most(tmp_path):
    if hasattr(claims, "where_delta_breaks"):
        assert not objections_to_alphas(HERE / "runs", *claims.where_delta_breaks())
        return
    for seed, held, broke in ((0, 0.8, 0.19), (1, 0.79, 0.4)):
        made(tmp_path, 0.5, seed, 0.675, held)
        made(tmp_path, 1.0, seed, 0.675, broke)
    assert not objections_to_alphas(tmp_path, 0.5, 1.0)


@pytest.mark.parametrize(
    "runs, objection",
    [
        ([(0.5, 0, 0.6, 0.7), (1, 0, 0.6, 0.1)], "two seeds"),
        ([(0.2, 0, 0.6, 0.7), (0.2, 1, 0.6, 0.7), (1, 0, 0.6, 0.1), (1, 1, 0.6, 0.1)], "at most four times"),
        ([(0.5, 0, 0.6, 0.7), (0.5, 1, 0.6, 0.59), (1, 0, 0.6, 0.1), (1, 1, 0.6, 0.1)], "with the smaller"),
        ([(0.5, 0, 0.6, 0.7), (0.5, 1, 0.6, 0.7), (1, 0, 0.6, 0.1), (1, 1, 0.6, 0.55)], "with the larger"),
        ([(0.5, 0, 0.6, 0.7), (0.5, 1, 0.6, 0.7), (1, 0, 0.6, 0.1, 40), (1, 1, 0.6, 0.1, 40)], "nothing else differs"),
        ([(0.5, 0, 0.6, 0.7, 9), (0.5, 1, 0.6, 0.7, 9), (1, 0, 0.6, 0.1, 9), (1, 1, 0.6, 0.1, 9)], "20 iterations"),
    ],
)
def test_runs_that_do_not_show_where_delta_breaks(runs, objection, tmp_path):
    for run in runs:
        made(tmp_path, *run)
    [found] = objections_to_alphas(tmp_path, runs[0][0], 1)
    assert found.startswith(objection) or objection in found


# ------------------------------------------------------------------------------------------------ another hack


def sum_of(name: str, scores: list[float]) -> float:
    return refine(name, torch.tensor([scores]), torch.ones(1, len(scores), dtype=torch.bool))[0].sum().item()


def pay_of_repeating(name: str, scores: list[float], k: int) -> float:
    """By how much the sum rises where step k stands ten times more."""
    return sum_of(name, scores[:k] + 10 * [scores[k]] + scores[k:]) - sum_of(name, scores)


def objections_to_hack(name: str, exploit) -> list[str]:
    """What does not hold of a reward that is hacked by something else than repeating."""
    rng = random.Random(0)
    answers = [[rng.randrange(1, 64) / 64 for _ in range(rng.randint(3, 8))] for _ in range(100)]
    mask = torch.arange(200) < torch.tensor([len(s) for s in answers] + [199, 200])[:, None]
    scores = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0))
    scores[100:] = 0.99
    r = refine(name, scores.masked_fill(~mask, torch.nan), mask)
    others = [refine(x, scores, mask) for x in PROCESS + BASELINES if x != name]
    repeats = [max(pay_of_repeating(name, s, k) for k in range(len(s) - 1)) for s in answers]
    hacked = [exploit([*s]) for s in answers]
    gains = [sum_of(name, h) - sum_of(name, s) for h, s in zip(hacked, answers)]
    found = {
        "r is finite, and 0 behind a row's end": bool(r.isfinite().all() and (r[~mask] == 0).all()),
        "it is none of the other rewards": not any(torch.allclose(r, x, atol=1e-3) for x in others),
        "its return-to-go is at most 1": bool(r.flip(1).cumsum(1).max() <= 1),
        "to repeat the best step ten times pays at most 0.05 on average": sum(repeats) / 100 <= 0.05,
        "exploit takes the answer's own scores, the last one last": all(
            h and set(h) <= set(s) and h[-1] == s[-1] for h, s in zip(hacked, answers)
        ),
        "exploit pays 0.1 or more on average": sum(gains) / 100 >= 0.1,
    }
    return [what for what, holds in found.items() if not holds]


def without_the_worst(scores: list[float]) -> list[float]:
    worst = scores.index(min(scores[:-1]))
    return scores[:worst] + scores[worst + 1 :]


def test_a_reward_that_repeating_does_not_hack_and_something_else_does():
    if hasattr(rewards, "mine"):
        assert not objections_to_hack("mine", rewards.exploit)
    else:  # in the student's part two that are there, and pay for silence
        assert objections_to_hack("clip", without_the_worst) == objections_to_hack("min", without_the_worst) == []


@pytest.mark.parametrize(
    "name, exploit, objection",
    [
        ("prm", lambda s: 20 * s[:1] + s, "at most 1"),
        ("normed", lambda s: 20 * [max(s)] + s, "to repeat"),
        ("penalty", lambda s: 20 * [max(s)] + s, "to repeat"),
        ("clip-delta", without_the_worst, "exploit pays"),
        ("progress", without_the_worst, "exploit pays"),
        ("clip", lambda s: s, "exploit pays"),
        ("clip", lambda s: [0.99] + s[-1:], "own scores"),
        ("clip", lambda s: s[:1], "the last one last"),
    ],
)
def test_rewards_and_exploits_that_do_not_count(name, exploit, objection):
    assert any(objection in found for found in objections_to_hack(name, exploit))


# ------------------------------------------------------------------------------------------------ a PRM not fooled


@functools.cache
def labelled_once() -> list[dict]:
    return labelled(300)


def scores_of_a_prm_trained_on(rows: list[dict]) -> tuple[float, float, float]:
    """Of held-out right answers in which one step stands four times the mean score of its repetitions, and of all other
    steps; and the AUROC against the oracle on answers like those of the training."""
    model = ScalarModel(toy_model(TOKENIZER, seed=0, hidden=32, layers=2, heads=2))
    opts = prm.RewardModelOptions("{question}", rm_epochs=4, rm_lr=3e-3, rm_head_lr=1e-2, rm_batch_size=16)
    known = [row for row in rows if not prm.held_out(row["question"])]
    prm.train_reward_model(model, TOKENIZER, known, opts)
    read = functools.partial(prm.read_own, TOKENIZER, prompt="{question}")
    held = [row for row in labelled_once() if prm.held_out(row["question"])]
    answers, is_repeat = [], []
    for row in held:
        lines = toy_lines(row["question"])
        for k in range(len(lines) - 1):
            text = "\n".join(lines[:k] + 4 * [lines[k]] + lines[k + 1 :])
            answers.append(row | {"response": text, "char_ends": split_steps(text, "\n"), "truncated": False})
            is_repeat += [k < i <= k + 3 for i in range(len(lines) + 3)]
    found = prm.score_at(model, read(answers), 16384, torch.device("cpu"))
    scores, repeated = torch.tensor([score for of_one in found for score in of_one]), torch.tensor(is_repeat)
    auroc = prm.measure_quality(model, read, held, "prm")["auroc_oracle"]
    return scores[repeated].mean().item(), scores[~repeated].mean().item(), auroc


def repeat_and_relabel(rows: list[dict]) -> list[dict]:
    """Each answer, and once more with a step repeated up to four times; what repeats an earlier step is labelled 0."""
    rng, out = random.Random(0), []
    for row in rows:
        steps, labels = [step.strip("\n") for step in steps_of(row)], row["labels"]
        k, m = rng.randrange(max(len(steps) - 1, 1)), rng.randint(1, 4)
        for copies in (1, 1 + m):
            new = steps[:k] + copies * [steps[k]] + steps[k + 1 :]
            old = labels[:k] + copies * [labels[k]] + labels[k + 1 :]
            text, relabelled = "\n".join(new), [0.0 if step in new[:i] else old[i] for i, step in enumerate(new)]
            out.append(row | {"response": text, "char_ends": split_steps(text, "\n"), "labels": relabelled})
    return out


def test_a_prm_trained_on_hardened_labels_scores_repeated_steps_low_and_fresh_ones_high():
    rows = getattr(prm, "harden", repeat_and_relabel)(labelled_once())
    repeated, fresh, auroc = scores_of_a_prm_trained_on(rows)
    assert repeated < 0.5 and fresh > 0.7 and auroc > 0.9


def test_a_prm_trained_on_the_labels_as_they_are_is_fooled():
    repeated, fresh, auroc = scores_of_a_prm_trained_on(labelled_once())
    assert repeated > 0.8 and fresh > 0.8 and auroc > 0.9
