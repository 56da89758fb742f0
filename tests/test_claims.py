"""tests/claims.py: grids, runs that are made, tables with their values, the page with its verdicts."""

import json
import math
import os
import signal
import sys
import threading

import pytest
import torch
from claims import CLAIMS, GRIDS, PAPER, ROOT, combinations, make, page, read_runs, render, sign, verdicts, versus

import claims
import train
from data import UserError, load_problems, run_script, toy_tokenizer
from eval import interval
from model import ScalarModel, toy_model

ALL = {claim: combinations(GRIDS.get(claim, GRIDS["main"])) for claim in CLAIMS}


# ------------------------------------------------------------------------------------------------ grids


@pytest.mark.parametrize(
    "claim, count, seeds", [("main", 30, 5), ("low-alpha", 15, 5), ("map", 110, 2), ("labels", 30, 5), ("sums", 18, 3)]
)
def test_each_claim_has_its_runs_each_under_a_name_of_its_own(claim, count, seeds):
    runs = ALL[claim].values()
    assert len(runs) == count == len({json.dumps(run, sort_keys=True) for run in runs})
    assert all(run["seed"] == run["prepare_seed"] for run in runs) and len({run["seed"] for run in runs}) == seeds
    assert all(("alpha" in run) == (run["reward"] != "success") for run in runs)
    assert {run.get("preset") for run in runs} == {"sums" if claim == "sums" else None}


def test_claims_share_the_runs_that_are_the_same():
    everything = {}
    for claim, runs in ALL.items():
        if claim != "drift":  # which has a folder of its own
            assert all(everything.setdefault(name, run) == run for name, run in runs.items())
    assert len(everything) == 172 and ALL["best-of-n"] == ALL["main"]
    assert len(ALL["map"].keys() & ALL["main"].keys()) == 6 * 2
    for name in ("prm-oracle-alpha0.5-seed4", "prm-flip_labels0.1-alpha0.5-seed0", "clip-sums-alpha0.5-seed2"):
        assert name in everything


def test_a_grid_combines_lists_of_values_and_success_once_for_each_seed():
    assert combinations(["reward=success,prm alpha=0.1,1 seed+prepare_seed=0"]) == {
        "success-seed0": {"reward": "success", "seed": "0", "prepare_seed": "0"},
        "prm-alpha0.1-seed0": {"reward": "prm", "alpha": "0.1", "seed": "0", "prepare_seed": "0"},
        "prm-alpha1-seed0": {"reward": "prm", "alpha": "1", "seed": "0", "prepare_seed": "0"},
    }
    assert [*combinations(["seed=0 prepare_seed=0,1 labels=soft"])] == ["seed0-soft", "seed0-prepare_seed1-soft"]


@pytest.mark.parametrize("grid", ["alpha=", "alpha=1,", "alpha", "=1", "+seed=1", "x", "alpha=1 main"])
def test_what_is_no_grid_is_refused(grid):
    with pytest.raises(UserError, match="give claims .*, or OPTION=VALUE"):
        combinations([grid])


# ------------------------------------------------------------------------------------------------ making runs

STUB = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--runs-dir") + 1], sys.argv[sys.argv.index("--name") + 1])
folder.mkdir(exist_ok=True)
(folder / "call.json").write_text(json.dumps([sys.argv[1:], os.environ.get("OMP_NUM_THREADS")]))
if "slow" in folder.name:
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), sys.exit(1)))
    (folder / "metrics.jsonl").write_text('{"iteration": 1}' + chr(10))
    time.sleep(30)
if "seed1" in folder.name:
    sys.exit("train.py: no space left")
(folder / "metrics.jsonl").write_text("".join(json.dumps({"iteration": i}) + chr(10) for i in range(3)))
(folder / "model").mkdir(exist_ok=True)
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(claims, "TRAIN", [sys.executable, str(tmp_path / "stub.py")])
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path / "runs"
    signal.signal(signal.SIGTERM, before)


def test_the_runs_that_are_missing_are_made_and_those_that_fail_are_named(stub, capfd):
    runs = combinations(["iterations=2 beta=0.02 seed=0,1,2"])
    done = stub / "iterations2-beta0.02-seed2"
    (done / "model").mkdir(parents=True)
    (done / "metrics.jsonl").write_text('{"iteration": 2}\n{"iter')
    failure = "1 of 3 runs failed: iterations2-beta0.02-seed1; the first says: .*no space left"
    with pytest.raises(UserError, match=failure):
        make(runs, stub, 2, {})
    assert not (done / "call.json").exists()
    call, threads = json.loads((stub / "iterations2-beta0.02-seed0" / "call.json").read_text())
    assert "--resume" in call and call[call.index("--beta") + 1] == "0.02" and threads == "1"
    assert train.parse(call)[0].threads == 1 and train.parse(call)[0].name == "iterations2-beta0.02-seed0"
    shown = capfd.readouterr().err
    assert "4/6" in shown and "1 failed" in shown  # of the failed one no iteration is done
    make({name: runs[name] for name in [*runs][::2]}, stub, 1, {})  # all there


def test_an_option_that_no_run_has_is_refused_before_the_first(stub, capsys):
    for grid in ("speed=1 seed=0", "seed=0,-1", "reward=prm eta=0.4 seed=0"):
        with pytest.raises((UserError, SystemExit)):
            make(combinations([grid]), stub, 1, {})
    assert not stub.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_stops_the_runs_which_save_themselves(number, stub, capfd):
    runs = {"slow": {"seed": "0"}, "slower": {"seed": "1"}, "slowest": {"seed": "2"}}

    def interrupt():
        while not all((stub / name / "metrics.jsonl").exists() for name in ("slow", "slower")):
            threading.Event().wait(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        make(runs, stub, 2, {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"})
    assert (stub / "slow" / "saved").exists() and (stub / "slower" / "saved").exists()
    assert not (stub / "slowest").exists() and "the same command goes on" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------ tables


def write_run(path, run: dict, reward_model: str) -> None:
    """A run that is done, with numbers that tell reward, alpha, seed and iteration."""
    seed, alpha, reward = int(run["seed"]), float(run.get("alpha", 0)), run["reward"]
    (path / "model").mkdir(parents=True)
    options = dict(name=path.name, reward=reward, alpha=alpha, seed=seed, prepare_seed=seed, commit="abc", eta=0.5)
    options |= dict(preset=run.get("preset", "toy"), labels=run.get("labels", "hard"), eval_problems=1000, data="toy")
    options |= dict(flip_labels=float(run.get("flip_labels", 0)), prompt="{question}", max_new_tokens=24, slots=64)
    options |= dict(policy=str(path.parent / "policy"), reward_model=reward_model, keys=[seed], iterations=20)
    (path / "config.json").write_text(json.dumps(options))
    level = 0.6 + 0.01 * seed - (0.5 * alpha if reward in ("prm", "delta") else 0.0)
    evaluation = dict(sampled_steps=5.0 + alpha * (reward == "prm"), sampled_repeats=0.25, greedy_truncated=0.5)
    rows = [dict(evaluation, iteration=0, greedy_accuracy=0.5, sampled_accuracy=0.4 + 0.02 * seed, sampled_steps=4.0)]
    for i in range(1, 21):
        row = dict(iteration=i, success=level, steps=5 + i, learned_reward=float(i), nonzero=i / 20)
        row |= dict(outcome_right=0.8, outcome_wrong=None if i == 4 else 0.3)
        row |= dict(seconds_sample=i, seconds_score=1, seconds_refine=0.001, seconds_update=2)
        rows.append(row | (dict(evaluation, greedy_accuracy=level, sampled_accuracy=level) if i in (10, 20) else {}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = dict(iteration=20, question="41b+5=", response="b41+5=46\n####46", gold="46", char_ends=[9, 15], steps=2)
    answer |= dict(scores=[0.75, 0.5], refined=[0.75, 0.5], verdict="match", correct=True, truncated=False)
    answer |= dict(outcome=None, tracked=False)
    texts = [json.dumps(answer | dict(repeats=n, iteration=i)) + "\n" for n, i in ((9, 19), (0, 20), (2, 20))]
    (path / "samples.jsonl").write_text("".join(texts))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs of all claims, with a policy and a reward model that scores everything 0.5."""
    folder = tmp_path_factory.mktemp("runs")
    for claim, asked in ALL.items():
        for name, run in asked.items():
            path = folder / "drift" / name if claim == "drift" else folder / name
            if not path.exists():
                write_run(path, run, str(folder / "judge"))
    policy, tokenizer = toy_model(toy_tokenizer(), 0, hidden=16, layers=1, heads=2), toy_tokenizer()
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    ScalarModel(policy).save(tokenizer, folder / "judge")
    (folder / "judge" / "quality.json").write_text('{"auroc": 0.8, "auroc_oracle": 0.9}')
    return folder


def test_runs_that_are_not_done_or_differ_share_no_table(tmp_path):
    asked = combinations(["reward=prm alpha=1 seed+prepare_seed=0,1"])
    first, second = (tmp_path / name for name in asked)
    for path, run in zip((first, second), asked.values()):
        write_run(path, run, "")
    assert [run.options["seed"] for run in read_runs(asked, tmp_path)] == [0, 1]
    config = json.loads((second / "config.json").read_text())
    for other in ({"eta": 0.4}, {"iterations": 19}, {"new": 1}):
        (second / "config.json").write_text(json.dumps(config | other))
        with pytest.raises(UserError, match=f"{second.name} and {first.name} differ in {[*other][0]}: they cannot"):
            read_runs(asked, tmp_path)
    (second / "model").rmdir()
    with pytest.raises(UserError, match=f"1 of 2 runs are not done, such as {second.name}; --make makes them"):
        read_runs(asked, tmp_path)


def test_tables_hold_each_runs_values_and_differences_by_seed_and_the_page_is_written_from_them(
    runs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(claims, "PROBLEMS", 4)
    monkeypatch.setattr(claims, "load_problems", lambda *_: load_problems("toy", "test", 3))
    monkeypatch.setattr(sys, "argv", ["claims.py", "all", "--runs-dir", str(runs), "--out", str(tmp_path)])
    claims.main()
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in CLAIMS}
    shown = capsys.readouterr().out
    column = lambda name, head, i=0: {row: cells[head] for row, cells in claims.rows_of(found[name], i).items()}
    approx = lambda *numbers: pytest.approx([*numbers], abs=1e-5)

    main = found["main"]
    assert render(main["tables"][0]) in shown and {run["commit"] for run in main["runs"]} == {"abc"}
    assert column("main", "greedy %")["before"] == [50] * 5 and column("main", "seeds")["prm"] == "5"
    assert column("main", "greedy %")["prm"] == column("main", "sampled %")["prm"] == approx(35, 36, 37, 38, 39)
    assert column("main", claims.BEHIND)["prm"] == approx(*[-25] * 5)  # what the seeds share cancels
    assert column("main", claims.GAIN)["success"] == approx(20, 19, 18, 17, 16)
    assert column("main", "last")["clip"] == [20] * 5 and column("main", "last")["success"] == ""
    assert column("main", "the paper's greedy / sampled %")["prm"] == "11.16 / 14.68"
    assert main["curves"]["delta-alpha0.5-seed3"]["steps"] == [*range(6, 26)]
    assert main["greedy answers of prm that are cut off, %"] == [50] * 5
    lines = main["texts"][0].splitlines()
    assert lines[0] == "prm-alpha0.5-seed0, iteration 20, alpha 0.5"
    assert lines[3].split() == ["1", "0.75", "0.75", "1.62", "right", "b41+5=46"]

    assert column("low-alpha", "sampled %")["delta"] == approx(45, 46, 47, 48, 49)
    last = found["orm"]["tables"][0]["rows"][-1]
    assert last == ["20", "5", approx(0.6, 0.61, 0.62, 0.63, 0.64), [0.8] * 5, [0.3] * 5]
    assert column("map", "alpha 1")["prm"] == approx(10, 11) and column("map", "alpha 3", 1)["prm"] == [8, 8]
    assert column("map", "alpha 0.1")["success"] == approx(60, 61)
    assert column("labels", "step AUROC against the oracle")["exact"] == [0.9] * 5
    assert column("labels", "against success")["Monte-Carlo, 40% flipped"] == [0.5] * 5
    assert column("dense", "iteration 5")["delta"] == approx(*[25] * 5) and "orm" not in column("dense", "iteration 5")
    assert column("cost", "sample")["prm"] == [3] * 5 and column("cost", "total")["orm"] == approx(*[6.001] * 5)
    assert column("cost", "refine, in milliseconds")["prm"] == approx(*[1] * 5)
    assert len(found["sums"]["runs"]) == 18 and column("drift", "sampled %")["prm"] == approx(35)
    for figure in ("hacking.png", "map.png"):
        assert (tmp_path / figure).stat().st_size > 10_000

    accuracy = column("best-of-n", "accuracy")  # the policy knows nothing
    assert len(accuracy) == 13 and accuracy["pass@1"] == accuracy["best of 16 by ORM"] == [0] * 5
    assert column("best-of-n", "mean", 1)["PRM: steps, against the oracle"] == [0.9] * 5
    sums, last = column("repeats", "m = 10"), column("repeats", "m = 10", 1)  # each step scores 0.5
    assert sums["prm"][0] - column("repeats", "m = 0")["prm"][0] == pytest.approx(5)
    assert sums["delta"] == last["delta"] == [0.5] * 5
    assert sums["clip"] == sums["clip-delta"] == last["clip-delta"] == [0] * 5
    assert last["progress"] == approx(*[-0.5] * 5) and sums["normed"] == approx(*[0.5] * 5)
    assert column("repeats", "m = 3", 2)["prm"][0] == pytest.approx(column("repeats", "m = 0", 2)["prm"][0] + 1.5)

    text = (tmp_path / "CLAIMS.md").read_text()
    assert text == page(tmp_path) and all(render(table) in text for x in found.values() for table in x["tables"])
    assert "    " + lines[3] in text and text.count("`prm` is hacked") == 3  # main, low-alpha, sums
    assert "`prm` from alpha 0.3 on (there -15.0 and -15.0 points)" in text


def test_a_claim_without_its_runs_an_unknown_one_and_a_page_without_a_file_are_told(tmp_path, monkeypatch, capsys):
    call = ["claims.py", "--runs-dir", str(tmp_path), "--out", str(tmp_path)]
    for argv, said in ((["orm"], "30 of 30 runs are not done"), (["mian"], "mian: no claim, choose of main, low"),
                       (["alpha=1"], "alpha=1: no claim"), (["--make", "alpha=1", "mian"], "mian: give claims"),
                       (["--workers", "-1"], "at least 0")):
        monkeypatch.setattr(sys, "argv", [*call, *argv])
        with pytest.raises(SystemExit):
            run_script(claims.main)
        assert said in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", call)
    claims.main()
    assert "no CLAIMS.md, which needs the JSON of main, low-alpha" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]


def test_the_runs_of_several_claims_are_made_together_and_drifts_in_a_folder_of_their_own(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(claims, "make", lambda *call: made.append(call))
    where = ["--runs-dir", str(tmp_path), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["claims.py", "--make", "orm", "labels", "drift", "--workers", "3", *where])
    with pytest.raises(UserError, match="30 of 30 runs are not done"):  # after they should have been made
        claims.main()
    assert made == [(ALL["main"] | ALL["labels"], tmp_path, 3, {}),
                    (ALL["drift"], tmp_path / "drift", 3, claims.OTHER_KERNELS)]


def test_a_table_has_one_digit_under_a_head_in_percent_and_else_two():
    heads = ["reward", "greedy %", "steps"]
    rows = [["prm", [50.0, 51.0, 52.0], [5.125]], ["before", "", [-0.001, 3.0]]]
    assert render({"title": "t", "heads": heads, "rows": rows}).splitlines() == [
        "| reward | greedy % | steps |",
        "| --- | --- | --- |",
        "| prm | 51.0 ± 2.5 | 5.12 |",
        "| before |  | 0.00, 3.00 |",
    ]
    assert render({"title": "accuracy, %", "heads": ["a"], "rows": [[[3.14159]]]}).endswith("| 3.1 |")


def test_a_row_of_the_first_main_table_is_rendered_as_it_was():
    heads = ["reward", "alpha", "greedy %", claims.GAIN, "repeats", "process reward, first iteration"]
    row = ["prm", "0.5", [0.0, 0.9, 86.1, 0.0, 67.9], [-8.9, -12.7, 11.0, -17.2, 3.2]]
    row += [[4.084, 2.81, 2.847, 4.408, 2.227], [3.958155, 4.353427, 4.168695, 4.044971, 3.746839]]
    text = render({"title": "rewards", "heads": heads, "rows": [row]}).splitlines()[-1]
    assert text == "| prm | 0.5 | 31.0 ± 52.8 | -4.9 ± 14.5 | 3.28 ± 1.15 | 4.05 ± 0.28 |"


def student(t: float, df: int) -> float:
    """P(|T| < t), by Simpson's rule over the density."""
    scale = math.gamma((df + 1) / 2) / (math.gamma(df / 2) * math.sqrt(df * math.pi))
    x = torch.linspace(0, t, 20001, dtype=torch.float64)
    y = scale * (1 + x**2 / df) ** (-(df + 1) / 2)
    return 2 * ((y[0] + y[-1] + 4 * y[1::2].sum() + 2 * y[2:-1:2].sum()) * t / 60000).item()


@pytest.mark.parametrize("n", range(2, 11))
def test_the_interval_of_a_few_runs_is_students(n):
    numbers = [math.sin(3 * i) for i in range(n)]
    mean, half = interval(numbers)
    error = math.sqrt(sum((x - mean) ** 2 for x in numbers) / (n - 1) / n)
    assert mean == pytest.approx(sum(numbers) / n) and student(half / error, n - 1) == pytest.approx(0.95, abs=1e-4)


def test_the_interval_of_one_run_is_nothing_and_that_of_many_no_smaller_than_students():
    assert interval([0.25]) == (0.25, 0.0)
    many = [0.0, 1.0] * 50
    assert 0.95 < student(interval(many)[1] / math.sqrt(25 / 99 / 100), 99) < 0.98


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_is_that_of_the_files_beside_it():
    assert (ROOT / "assets" / "CLAIMS.md").read_text() == page(ROOT / "assets")


def test_each_file_says_its_runs_with_seed_alpha_and_commit_and_the_options():
    for name in CLAIMS:
        found = json.loads((ROOT / "assets" / f"{name}.json").read_text())
        assert found["claim"] == name and found["commit"] and found["options_of_the_first"]["iterations"] > 0
        for run in found["runs"]:
            assert run.keys() == {"name", "seed", "prepare_seed", "alpha", "commit"} and run["commit"]


def test_a_verdict_goes_by_the_numbers():
    assert sign([1, 2, 3]) == 0 and sign([2, 2.1, 2.2]) == 1 and sign([-2, -2.1, -2.2]) == -1 and sign([5, 5]) == 0
    assert versus([-2.0, -3.0, -4.0], "x") == "3.0 ± 2.5 points below x"
    assert versus([1.0, -0.5, 1.0], "x") == "0.5 ± 2.2 points above x, which 3 seeds do not tell from 0"

    def bullets(behind: list[float], steps: list[float], greedy: list[float]) -> str:
        row = {claims.BEHIND: behind, "steps": steps, "greedy %": greedy}
        success = row | {claims.BEHIND: "", "steps": [5.0] * 3}
        return " ".join(" ".join(verdicts({"success": success, "prm": row})).split())

    lost, longer, fine = [-9.0, -12.0, -10.0], [7.0, 7.1, 7.2], [70.0] * 3
    assert bullets(lost, longer, [9.0, 50.0, 0.0]) == (
        "- **`prm` is hacked**: sampled accuracy ends 10.3 ± 3.8 points below `success`, far behind in 1 of 3 seeds "
        "(-12.0), with 2.10 ± 0.25 steps more; greedy accuracy is gone in 2 of 3 seeds (9.0 and 0.0 %).")
    assert "`prm` loses**" in bullets(lost, [4.0] * 3, fine) and "none of 3 seeds." in bullets(lost, longer, fine)
    assert "`prm` gains**" in bullets([9.0, 12.0, 10.0], longer, fine)
    assert bullets([-11.0, 1.0, 2.0], longer, fine) == (
        "- **Not told from `success`**, in points: `prm` -2.7 ± 18.0, far behind in 1 of 3 seeds (-11.0).")


def test_the_papers_differences_are_told_from_ours_by_direction():
    rows = {name: {claims.GAIN: [9.0, 10.0, 11.0], claims.BEHIND: [-3.0, -3.1, -3.2]} for name in PAPER}
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in claims.against_paper(rows).splitlines()[2:]]
    found = {name: same for name, _, _, same in cells}
    assert found["`prm` against before"] == "no" == found["`delta` against success"]  # the paper's is above
    assert found["`prm` against success"] == "yes" == found["`success` against before"] and len(found) == 11
