"""Judging answers, pass@k, votes, best-of-n, tables and figures."""

import itertools
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import prm
from data import Problem, UserError, load_problems, run_script, toy_tokenizer
from eval import (
    AGGREGATES, PAPER, SWEEPS, best_of, bootstrap, combinations, first_wrong, interval, judge, measures, pass_at_k,
    read_sweep, render, same_answers, summarise, vote, voted,
)  # fmt: skip
from model import ScalarModel, toy_model
from rollout import Sample

TOKENIZER = toy_tokenizer()


def test_judge_counts_steps_tokens_and_exact_repeats():
    text = "b41+5=46\nb41+5=46\nb41+5=47\n####46"
    ids = TOKENIZER.encode(text)
    right, cut = judge(TOKENIZER, [Problem("41b+5=", "46")], [[Sample(0, ids + [1], False), Sample(0, ids, True)]], "\n")
    assert (right["correct"], right["steps"], right["tokens"], right["repeats"]) == (True, 4, len(ids) + 1, 1)
    assert (cut["correct"], cut["steps"], cut["truncated"]) == (False, 3, True)  # truncated: wrong, last step unfinished


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_answer():
    for n, c in ((4, 0), (4, 1), (5, 2), (6, 6)):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([i < c for i in range(n)], k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_stderr_is_over_problems_not_over_answers():
    answers = [{"correct": c, "steps": 1, "tokens": 2, "repeats": 0, "truncated": False} for c in (1, 1, 0, 0)]
    assert summarise(answers, n=2)["stderr"] == pytest.approx(0.5 / 2**0.5)  # two problems: 1 and 0
    assert summarise(answers, n=1)["stderr"] == pytest.approx(0.5 / 4**0.5)


def test_votes_count_equal_answers_as_one_and_ignore_missing_ones():
    assert same_answers(["1/2", "0.5", "3", None, "3.0", "1/2"]) == [0, 0, 2, None, 2, 0]
    assert vote([0, 0, 2, None], [1, 1, 1.5, 9]) == 0
    assert vote([0, 0, 2], [1, 1, 2.5]) == 2
    assert vote([None, None], [1, 1]) is None


def test_best_of_k_and_votes_are_means_over_groups_of_k():
    correct, votes = [False, False, True, True, False, True], [0, 0, 2, 3, 4, 3]
    assert voted(correct, votes, [1.0] * 6, 3) == 0.5  # candidate 0 wins the first three, candidate 3 the others
    assert best_of(correct, [0.1, 0.1, 0.9, 0.1, 0.9, 0.2], 3) == 0.5
    assert voted(correct, votes, [0.1, 0.1, 0.9, 0.1, 0.9, 0.2], 3) == 0.5
    assert best_of(correct, [0.1, 0.1, 0.9, 0.9, 0.1, 0.2], 3) == 1.0
    assert voted(correct, [0, 0, None, 3, 4, 3], [0.0, 0.0, 9.0, 1.0, 0.0, 0.0], 3) == 0.5  # truncated: no vote
    assert best_of(correct, [0.0] * 6, 2) == pytest.approx(1 / 3)  # the first of equal ones, in each of three pairs
    assert best_of(correct, [1, 0, 0, 0, 9, 0], 4) == 0.0 == voted([False], [None], [1.0], 1)  # a rest is left out
    assert voted([True, True, False], [0, 1, 2], [1.0] * 3, 2) == 1.0


def test_all_measures_of_two_problems_by_hand():
    row = lambda answer, gold: {"response": f"####{answer}", "correct": float(answer) == float(gold), "truncated": False}
    greedy = [row("5", "5"), row("1", "2")]
    rows = [row(x, "5") for x in ("5", "5", "7", "5")] + [row(x, "2") for x in ("1", "2", "1", "1.0")]
    rows = evaluation.with_votes([row | {"ids": [1], "ends": [0]} for row in rows], 4)
    assert "ids" not in rows[0] and [row["vote"] for row in rows] == [0, 0, 2, 0, 0, 1, 0, 0]
    values = measures(greedy, rows, 4, {"X": [[0.1, 0.2, 0.9, 0.3], [0.0, 1.0, 0.2, 0.2]]})
    found = {name: x.tolist() for name, x in values.items()}
    assert found["greedy accuracy"] == [1, 0] and found["sampled accuracy"] == found["pass@1"] == [0.75, 0.25]
    assert found["pass@2"] == [1, 0.5] and found["pass@4"] == [1, 1] and found["majority of 4"] == [1, 0]
    assert found["majority of 2"] == [0.5, 0]  # a tie goes to the first
    assert found["best of 2 by X"] == [0.5, 0.5] and found["best of 4 by X"] == [0, 1]
    assert found["vote of 4 by X"] == [0, 1] and found["vote of 2 by X"] == [0.5, 0.5]
    assert not any("of 1" in name for name in found)


def test_the_bootstrap_interval_covers_what_the_normal_one_covers():
    values = torch.tensor([1.0] * 300 + [0.0] * 700, dtype=torch.float64)
    mean, low, high = bootstrap(values)
    stderr = (0.3 * 0.7 / 1000) ** 0.5
    assert mean == pytest.approx(0.3) and low == pytest.approx(0.3 - 1.96 * stderr, abs=0.004)
    assert high == pytest.approx(0.3 + 1.96 * stderr, abs=0.004)
    assert bootstrap(torch.ones(5)) == (1, 1, 1)


def test_the_first_wrong_step_is_the_first_below_the_threshold():
    assert [first_wrong(s, 0.5) for s in ([0.9, 0.4, 0.1], [0.5, 0.5], [0.0], [])] == [1, -1, 0, -1]


def test_aggregates_of_step_scores():
    scores = [0.9, 0.5, 0.8]
    found = {k: round(f(scores), 4) for k, f in AGGREGATES.items()}
    assert found == {"last": 0.8, "min": 0.5, "mean": 0.7333, "product": 0.36}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    model = toy_model(TOKENIZER, seed=0, hidden=16, layers=1, heads=2)
    model.save_pretrained(path / "lm")
    TOKENIZER.save_pretrained(path / "lm")
    ScalarModel(model).save(TOKENIZER, path / "rm")
    return path


def call(monkeypatch, capsys, *argv) -> str:
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
    run_script(evaluation.main)
    return capsys.readouterr().out


@pytest.fixture
def problems(tmp_path) -> str:
    data = tmp_path / "math_test.jsonl"
    kinds = [("Algebra", "Level 1"), ("Geometry", "Level 2")]
    rows = [dict(problem=f"1{i}b+5=", answer=f"1{i + 5}", type=kinds[i % 2][0], level=kinds[i % 2][1]) for i in range(5)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(data)


def test_a_model_is_evaluated_once_and_a_second_call_goes_on(folder, problems, monkeypatch, capsys, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other.jsonl"
    other.write_text(json.dumps({"question": "11b+5=", "answer": "16"}))
    argv = ["--model", folder / "lm", "--data", f"{problems},{other}", "--prompt", "{question}", "--samples", 4]
    argv += ["--max-new-tokens", 20, "--out", out]
    plain = call(monkeypatch, capsys, *argv)
    greedy, loads = (out / "math-greedy.jsonl").read_bytes(), []
    monkeypatch.setattr(evaluation, "load_causal_lm", lambda *_: loads.append(1))
    text = call(monkeypatch, capsys, *argv, "--prm", folder / "rm", "--orm", folder / "rm")
    assert not loads and (out / "math-greedy.jsonl").read_bytes() == greedy  # the answers were there
    for words in ("greedy accuracy", "sampled accuracy", "pass@4", "majority of 4", "best of 4 by ORM", "vote of k by ORM",
                  "| math, % | k = 1 | k = 2 | k = 4 |", *(f"best of 4 by PRM {a}" for a in AGGREGATES)):  # fmt: skip
        assert words in text
    assert "| % (95 % interval) | math, 5 problems | other, 1 problems |" in text
    assert "| Algebra | 3 |" in text and "| level 2 | 2 |" in text and "| Algebra | 3 |" in plain
    results = json.loads((out / "results.json").read_text())
    assert results["problems"] == {"math": 5, "other": 1}
    assert results["results"]["math"]["pass@1"] == results["results"]["math"]["sampled accuracy"]
    assert len((out / "math-sampled.jsonl").read_text().splitlines()) == 5 * 4
    assert text.strip().endswith((out / "results.md").read_text().strip())
    scores = [json.loads(line)["scores"] for line in next(out.glob("math-prm-*.jsonl")).read_text().splitlines()]
    assert [len(s) for s in scores] == [4] * 5 and all(0 <= x <= 1 for s in scores for steps in s for x in steps)


def test_the_default_folder_is_named_by_the_settings(folder, problems, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    argv = ["--model", folder / "lm", "--data", problems, "--prompt", "{question}", "--max-new-tokens", 9]
    for n in (1, 2, 2):
        call(monkeypatch, capsys, *argv, "--samples", n)
    found = sorted(p.name for p in (tmp_path / "runs/eval").iterdir())
    assert len(found) == 2 and all(name.startswith("lm-") for name in found)


def test_the_papers_figures_stand_beside_those_of_its_models():
    math = {"greedy accuracy": (0.3, 0.25, 0.35), "pass@1": (0.3, 0.2, 0.4), "pass@16": (0.5, 0.4, 0.6)}
    results, paper = {"math": math, "toy": {"pass@16": (1, 1, 1)}}, PAPER["qwen2-1.5b-instruct", "clip-delta"]
    table = evaluation.results_table(results, {"math": 5000, "toy": 3}, paper, 16)
    assert table.splitlines() == [
        "| % (95 % interval) | math, 5000 problems | the paper's | toy, 3 problems |",
        "| --- | --- | --- | --- |",
        "| greedy accuracy | 30.0 (25.0 to 35.0) | 31.44 |  |",
        "| pass@16 | 50.0 (40.0 to 60.0) |  | 100.0 (100.0 to 100.0) |",
    ]
    math["best of 16 by PRM min"] = (0.45, 0.4, 0.5)
    assert evaluation.over_k(math, "math").splitlines() == [
        "| math, % | k = 1 | k = 16 |",
        "| --- | --- | --- |",
        "| pass@k | 30.0 | 50.0 |",
        "| best of k by PRM min |  | 45.0 |",
    ]
    assert evaluation.parse(["--model", "Qwen/Qwen2-1.5B-Instruct", "--data", "math"])[1] in PAPER


def test_references_are_graded_as_correct_through_the_whole_path(tmp_path, monkeypatch):
    """Prompt, an answer made of the reference, steps, extraction, grading; and a wrong reference as wrong."""
    rows = [
        {"problem": "A?", "solution": "So $x=\\frac12$.\n\nThus \\boxed{\\frac{1}{2}}", "type": "Algebra", "level": "?"},
        {"problem": "B?", "solution": "The set is\n\n$\\boxed{\\{1,2\\}}$.", "type": "Geometry", "level": "Level 2"},
        {"question": "C?", "answer": "He has 2*4=<<2*4=8>>8\n#### 1,008"},
    ]
    given = [row.get("solution") or row["answer"] for row in rows[:2]] + ["#### 1,009"]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = ByteTokenizer()
    prompts = []

    def generate(sampler, asked, n, **_):
        prompts.extend(asked)
        return [[Sample(i, tokenizer(given[i])["input_ids"] + [0], False)] for i in range(len(asked))]

    monkeypatch.setattr(evaluation, "rollout", generate)
    monkeypatch.setattr(evaluation, "as_sampler", lambda model: SimpleNamespace(model=model))
    monkeypatch.setattr(evaluation, "eos_ids", lambda *_: [0])
    found = evaluation.evaluate(None, tokenizer, load_problems(str(file)), "Q: {question}", "\n\n", max_new_tokens=99)[1]
    assert [row["correct"] for row in found] == [True, True, False] and [row["steps"] for row in found] == [2, 2, 1]
    assert tokenizer.decode(prompts[0]) == "Q: A?"


class ByteTokenizer:
    """UTF-8 bytes, and 0 to end with."""

    chat_template, eos_token_id = None, 0

    def __call__(self, texts, **_):
        encode = lambda text: list(text.encode())
        return {"input_ids": encode(texts) if isinstance(texts, str) else [encode(text) for text in texts]}

    def decode(self, ids, **_):
        return bytes(i for i in ids if i).decode(errors="replace")


@pytest.fixture(scope="module")
def known_scores():
    """A PRM that scores a step by the digit it ends in, an ORM by the last one."""

    class Known:
        def __init__(self, o, kind, device):
            self.kind = kind

        def scores(self, rows):
            steps = [[int(step.strip()[-1]) / 9 for step in prm.steps_of(row)] for row in rows]
            return [s[-1:] for s in steps] if self.kind == "orm" else steps

    return Known


def test_processbench_counts_exact_first_errors_and_clean_passes(tmp_path, monkeypatch, capsys, known_scores):
    monkeypatch.setattr(evaluation, "Scorer", known_scores)
    row = lambda steps, label: {"problem": "q", "steps": steps, "label": label, "final_answer_correct": label < 0}
    rows = [row(["a 9", "b 1"], 1), row(["a 1", "b 1"], 1), row(["a 9"], -1), row(["a 9", "b 8"], -1), row(["a 2"], -1)]
    file, other = tmp_path / "gsm8k.json", tmp_path / "math.jsonl"
    file.write_text(json.dumps(rows))
    other.write_text(json.dumps(row(["a 1"], -1)))
    argv = ["--prm", "x", "--processbench", f"{file},{other}", "--out", tmp_path / "r.json"]
    out = call(monkeypatch, capsys, *argv)
    assert "| gsm8k | 50.0 | 66.7 | 57.1 | 5 |" in out and "| math | 0.0 | 0.0 | 0.0 | 1 |" in out
    assert "| mean |  |  | 28.6 |  |" in out
    assert json.loads((tmp_path / "r.json").read_text())["processbench"][str(file)]["F1"] == pytest.approx(400 / 7)
    assert "| gsm8k | 50.0 | 33.3 |" in call(monkeypatch, capsys, *argv, "--threshold", 0.95)


def test_pairs_count_a_tie_as_wrong_by_subset(tmp_path, monkeypatch, capsys, known_scores):
    from pyarrow import Table, parquet

    monkeypatch.setattr(evaluation, "Scorer", known_scores)
    pair = lambda chosen, rejected, subset: {"prompt": "q", "chosen": chosen, "rejected": rejected, "subset": subset}
    rows = [pair("9\n8", "8\n7", "math-prm"), pair("1\n8", "8\n7", "math-prm"), pair("5", "5", "other")]
    file = tmp_path / "pairs.parquet"
    parquet.write_table(Table.from_pylist(rows), file)
    out = call(monkeypatch, capsys, "--prm", "x", "--orm", "y", "--pairs", file)
    lines = {line.split(" |")[0]: line for line in out.splitlines()}
    assert lines["| chosen above rejected, %"].endswith("| math-prm | other |")
    assert "| 100.0 (100.0 to 100.0) | 0.0 (0.0 to 0.0) |" in lines["| ORM"] and "| 100.0 (" in lines["| PRM last"]
    assert lines["| PRM min"].startswith("| PRM min | 50.0 (")


def fake_run(path, accuracy: float):
    path.mkdir()
    ways = {f"{w}_{k}": v for w in ("greedy", "sampled") for k, v in
            dict(accuracy=accuracy, stderr=0.01, steps=5.5, tokens=44.0, repeats=0, truncated=0).items()}  # fmt: skip
    rollout = {"success": 0.5, "steps": 5, "tokens": 40, "process_reward": 1.25}
    lines = [{"iteration": 0, **ways}, {"iteration": 1, **rollout, **ways}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return path


def test_runs_side_by_side_as_a_table_and_a_figure(tmp_path, monkeypatch, capsys):
    runs = [fake_run(tmp_path / "delta", 0.75), fake_run(tmp_path / "prm", 0.125)]
    out = call(monkeypatch, capsys, "--runs", *runs, "--figure", tmp_path / "f.png")
    assert "| delta | 1 | 75.0 ± 2.0 | 5.5 | 44.0 |" in out and "| prm | 1 | 12.5 ± 2.0 |" in out and "| 1.25 |" in out
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "f.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    "argv, words",
    [
        ("", "give one of --model, --runs"),
        ("--model a --runs b", "give one of --model, --runs"),
        ("--processbench x", "needs a --prm to evaluate"),
        ("--pairs x", "a --prm or an --orm"),
        ("--model a --data gsm8k --prm-format qwen", "give both, or neither"),
        ("--prm ./nowhere --pairs x.jsonl", "cannot read"),
        ("--model a --data toy=0", "above 0"),
        ("--model a --data ./x/test.jsonl,./y/test.jsonl", "two of the data sets are called test"),
        ("--model a --data gsm8k=1,toy", "a weight, or none of them"),
        ("--model a --data toy --figure x.png", "--figure draws"),
        ("--model a --data toy --prm x", "--samples 2 or more"),
        ("--model a", "--data"),
        ("--runs nowhere", "not the folder of a run"),
        ("--model a --dta toy", "unrecognized"),
    ],
)
def test_wrong_calls_get_one_sentence_and_status_2(argv, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", *argv.split()])
    with pytest.raises(SystemExit) as stop:
        run_script(evaluation.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(words, error) and "Traceback" not in error


def test_a_run_folder_brings_its_own_settings(tmp_path, folder):
    run = fake_run(tmp_path / "run", 0.5)
    (run / "model").symlink_to(folder / "lm")
    config = dict(data="toy", eval_data="", prompt="{question}", separator="\n", max_prompt_tokens=32, max_new_tokens=77,
                  slots=9, temperature=0.5, preset="qwen2-1.5b-instruct", reward="delta")  # fmt: skip
    (run / "config.json").write_text(json.dumps(config))
    options, known = evaluation.parse(["--model", str(run), "--slots", "3"])
    assert options.model == str(run / "model") and options.data == "toy" and options.max_new_tokens == 77
    assert known == ("qwen2-1.5b-instruct", "delta") and options.slots == 3  # what is given by hand wins
    with pytest.raises(UserError):
        evaluation.parse([])


def test_evaluation_does_not_change_the_models_mode():
    model = toy_model(TOKENIZER, seed=0, hidden=16, layers=1, heads=2).train()
    evaluation.evaluate(model, TOKENIZER, [Problem("41b+5=", "46")], "{question}", "\n", max_new_tokens=5)
    assert model.training and torch.is_grad_enabled()


def test_scores_that_are_not_finite_stop_the_evaluation(folder, tmp_path):
    reward_model = ScalarModel.load(folder / "rm")
    torch.nn.init.constant_(reward_model.head.bias, torch.nan)
    reward_model.save(TOKENIZER, tmp_path / "nan")
    row = {"question": "41b+5=", "response": "b41+5=46\n####46", "cuts": [9, 15], "truncated": False}
    for kind in ("prm", "orm"):
        options = evaluation.Options(prm=str(folder / "rm"), orm=str(folder / "rm"), prompt="{question}")
        judge = evaluation.Scorer(options, kind, "cpu")
        scores = judge.scores([row, {**row, "response": "", "cuts": [], "truncated": True}])
        assert [len(s) for s in scores] == ([2, 0] if kind == "prm" else [1, 1])
        setattr(options, kind, str(tmp_path / "nan"))
        with pytest.raises(UserError, match="scores that are not finite"):
            evaluation.Scorer(options, kind, "cpu").scores([row])


@pytest.mark.parametrize("kind", ["pairs", "processbench"])
def test_rows_of_another_form_get_one_sentence(kind, tmp_path, monkeypatch, capsys, known_scores):
    monkeypatch.setattr(evaluation, "Scorer", known_scores)
    good = {"prompt": "q", "chosen": "1", "rejected": "0", "problem": "q", "steps": ["1"], "label": 0}
    for bad in ({"chosen": None, "steps": "abc"}, {"chosen": [{"role": "user"}], "label": 1}, {"prompt": 3, "steps": []}):
        (tmp_path / "x.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | bad))
        monkeypatch.setattr(sys, "argv", ["eval.py", "--prm", "x", f"--{kind}", str(tmp_path / "x.jsonl")])
        with pytest.raises(SystemExit):
            run_script(evaluation.main)
        assert "x.jsonl line 2: needs" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ claims, over many runs


@pytest.mark.parametrize(
    "name, count, seeds", [("main", 30, 5), ("low-alpha", 10, 5), ("map", 108, 2), ("labels", 20, 5), ("sums", 18, 3)]
)
def test_each_sweep_of_the_claims_has_its_runs_each_under_a_name_of_its_own(name, count, seeds):
    runs = combinations([name])
    assert len(runs) == count and len({json.dumps(run, sort_keys=True) for run in runs.values()}) == count
    assert {run["seed"] for run in runs.values()} == {run["prepare_seed"] for run in runs.values()} == {*"01234"[:seeds]}
    success = [run for run in runs.values() if run["reward"] == "success"]
    assert len(success) == (seeds if name in ("main", "sums") else 0) and not any("alpha" in run for run in success)
    assert all("alpha" in run for run in runs.values() if run not in success)
    assert {run.get("preset") for run in runs.values()} == {"sums" if name == "sums" else None}


def test_sweeps_share_the_runs_that_are_the_same():
    main, grid, both = (combinations(names) for names in (["main"], ["map"], ["map", "main"]))
    shared = main.keys() & grid.keys()
    assert len(shared) == 5 * 2 and all(main[name] == grid[name] for name in shared)  # five rewards, two seeds
    assert both == grid | main and set(SWEEPS) == {"main", "low-alpha", "map", "labels", "sums"}
    assert not combinations(["sums"]).keys() & combinations(["main", "map", "labels"]).keys()


def test_a_sweep_combines_lists_of_values_and_success_once_for_each_seed():
    assert combinations("reward=success,prm alpha=0.1,1 seed+prepare_seed=0,1".split()) == {
        "success-seed0": {"reward": "success", "seed": "0", "prepare_seed": "0"},
        "success-seed1": {"reward": "success", "seed": "1", "prepare_seed": "1"},
        "prm-alpha0.1-seed0": {"reward": "prm", "alpha": "0.1", "seed": "0", "prepare_seed": "0"},
        "prm-alpha0.1-seed1": {"reward": "prm", "alpha": "0.1", "seed": "1", "prepare_seed": "1"},
        "prm-alpha1-seed0": {"reward": "prm", "alpha": "1", "seed": "0", "prepare_seed": "0"},
        "prm-alpha1-seed1": {"reward": "prm", "alpha": "1", "seed": "1", "prepare_seed": "1"},
    }
    assert [*combinations("lr=1e-4,1e-3 seed=0".split())] == ["lr1e-4-seed0", "lr1e-3-seed0"]
    assert [*combinations("seed=0,1 prepare_seed=0,1 labels=soft".split())] == [
        "soft-seed0", "soft-seed0-prepare_seed1", "soft-seed1-prepare_seed0", "soft-seed1"]  # fmt: skip


def test_the_name_of_a_run_is_the_same_wherever_reward_alpha_labels_preset_and_seeds_stand():
    words = ["reward=prm,clip", "preset=sums", "alpha=1", "labels=soft", "seed+prepare_seed=2"]
    names = {frozenset(combinations([*order])) for order in itertools.permutations(words)}
    assert names == {frozenset(["prm-sums-soft-alpha1-seed2", "clip-sums-soft-alpha1-seed2"])}


@pytest.mark.parametrize("words", ["alpha=", "alpha=1,", "alpha", "=1", "+seed=1", "x", "main x", "alpha=1 main"])
def test_what_is_no_sweep_is_refused(words):
    with pytest.raises(UserError, match="--sweep"):
        combinations(words.split())


def test_the_interval_of_a_few_runs_is_students():
    assert interval([0.25]) == (0.25, 0.0)
    assert interval([1, 3]) == pytest.approx((2, 12.706))  # deviation 2^0.5, over 2^0.5
    assert interval([1, 2, 3, 4, 5]) == pytest.approx((3, 2.776 * (2.5 / 5) ** 0.5))
    assert interval([7] * 4) == (7, 0)
    many = [0.0, 1.0] * 50  # of many runs it is at least the normal one
    assert 1.96 <= interval(many)[1] / (sum((x - 0.5) ** 2 for x in many) / 99 / 100) ** 0.5 < 2.3


def test_a_table_has_one_digit_under_a_head_in_percent_and_else_two():
    heads, rows = ["reward", "greedy %", "steps"], [["prm", [50.0, 51.0, 52.0], [5.125]], ["before", "", [1.0, 3.0]]]
    assert render({"title": "t", "heads": heads, "rows": rows}).splitlines() == [
        "| reward | greedy % | steps |",
        "| --- | --- | --- |",
        "| prm | 51.0 ± 2.5 | 5.12 |",
        "| before |  | 1.00, 3.00 |",
    ]
    assert render({"title": "accuracy, %", "heads": ["a"], "rows": [[[3.14159]]]}).endswith("| 3.1 |")


def test_a_cell_of_which_no_run_is_done_yet_is_empty():
    assert render({"title": "t", "heads": ["a", "b"], "rows": [["x", []]]}).endswith("| x |  |")


@pytest.fixture
def main_sweep(monkeypatch):
    monkeypatch.setitem(SWEEPS, "main", ["reward=success,prm,clip alpha=1 seed+prepare_seed=0,1"])  # six runs


def swept(path, **options):
    """A run of a sweep that is done."""
    fake_run(path, 0.5)
    (path / "model").mkdir()
    default = {"name": path.name, "reward": "prm", "alpha": 1.0, "seed": 0, "prepare_seed": 0, "lr": 0.1}
    (path / "config.json").write_text(json.dumps(default | options))


def test_a_sweep_is_read_as_far_as_it_is_done(tmp_path, capsys, main_sweep):
    with pytest.raises(UserError, match="holds no run of the sweep main that is done; python train.py --sweep main makes"):
        read_sweep(["main"], str(tmp_path))
    swept(tmp_path / "success-seed0", reward="success", alpha=0.0, commit="a", policy="p", threads=1, workers=0)
    swept(tmp_path / "prm-alpha1-seed1", seed=1, prepare_seed=1, commit="b", policy="q", threads=2, workers=0)
    swept(tmp_path / "prm-alpha1-seed7", seed=7, lr=9)  # not of the sweep
    fake_run(tmp_path / "prm-alpha1-seed0", 0.5)  # not done: it has no model yet
    runs = read_sweep(["main"], str(tmp_path))
    assert [run["run"] for run in runs] == ["success-seed0", "prm-alpha1-seed1"]
    assert runs[1]["options"]["seed"] == 1 and runs[1]["rows"][-1]["greedy_accuracy"] == 0.5
    assert runs[1]["folder"] == str(tmp_path / "prm-alpha1-seed1")
    assert "4 of 6 runs are not done: python train.py --sweep main makes them" in capsys.readouterr().out


@pytest.mark.parametrize("other", [{"lr": 0.2}, {"labels": "soft"}])
def test_runs_that_differ_in_another_option_share_no_table(other, tmp_path, main_sweep):
    swept(tmp_path / "prm-alpha1-seed0")
    swept(tmp_path / "prm-alpha1-seed1", seed=1, prepare_seed=1, **other)
    with pytest.raises(UserError, match=f"prm-alpha1-seed1 and prm-alpha1-seed0 differ in {[*other][0]}: they cannot share"):
        read_sweep(["main"], str(tmp_path))
    (tmp_path / "prm-alpha1-seed1" / "model").rmdir()
    assert len(read_sweep(["main"], str(tmp_path))) == 1


def test_an_option_that_only_the_first_run_has_is_a_difference_too(tmp_path, main_sweep):
    swept(tmp_path / "prm-alpha1-seed0", labels="soft")
    swept(tmp_path / "prm-alpha1-seed1", seed=1, prepare_seed=1)
    with pytest.raises(UserError, match="differ in labels"):
        read_sweep(["main"], str(tmp_path))


def claim_sweep(folder, monkeypatch, reward_model=""):
    """Two seeds of success, orm, prm and delta, three iterations each, with numbers that tell seed and iteration."""
    grid = "reward=success,orm,prm,delta alpha=0.5 seed+prepare_seed=0,1"
    for name in SWEEPS:
        monkeypatch.setitem(SWEEPS, name, [grid + (" preset=sums" if name == "sums" else "")])
    monkeypatch.setitem(SWEEPS, "labels", ["reward=prm labels=oracle alpha=0.5 seed+prepare_seed=0,1"])
    runs = {name: run for sweep in ("main", "labels", "sums") for name, run in combinations([sweep]).items()}
    for name, run in runs.items():
        seed, path = int(run["seed"]), folder / name
        (path / "model").mkdir(parents=True)
        options = dict(reward=run["reward"], alpha=float(run.get("alpha", 0)), seed=seed, prepare_seed=seed, name=name)
        options |= dict(preset=run.get("preset", "toy"), labels=run.get("labels", "hard"), flip_labels=0.0, eta=0.5)
        options |= dict(policy=str(folder / "policy"), reward_model=reward_model, commit="abc", iterations=3)
        options |= dict(data="toy", prompt="{question}", max_new_tokens=24, slots=64)
        (path / "config.json").write_text(json.dumps(options))
        level = {"success": 0.6, "orm": 0.6, "prm": 0.1, "delta": 0.5}[run["reward"]] + 0.1 * seed
        rows = [dict(iteration=0, greedy_accuracy=0.5, sampled_accuracy=0.4, sampled_steps=5.0, sampled_repeats=0.2)]
        for i in (1, 2, 3):
            row = {"iteration": i, "success": level, "steps": 5 + i, "process_reward": float(i), "nonzero": 0.25 * i}
            row |= {"good_steps": 0.9, "outcome_right": 0.8, "outcome_wrong": 0.3, "outcome_explained_by_correct": 0.7}
            row["outcome_explained_by_more"] = 0.75
            if i == 3:
                row |= {"greedy_accuracy": level, "sampled_accuracy": level, "sampled_steps": 8.0, "sampled_repeats": 2.0}
            rows.append(row)
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        answer = {"iteration": 3, "question": "41b+5=", "response": "b41+5=46\n####46", "gold": "46", "cuts": [9, 15]}
        answer |= {"scores": [0.75, 0.5], "refined": [0.75, 0.5], "repeats": 0, "verdict": "match"}
        answer |= {"steps": 2, "correct": True, "truncated": False, "outcome": None}
        (path / "samples.jsonl").write_text(json.dumps(answer) + "\n")
    return folder


def claim(monkeypatch, runs, name, *more):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--claim", name, "--runs-dir", str(runs), *more])
    evaluation.main()
    return json.loads((runs / "claims" / f"{name}.json").read_text())


def column(table, head):
    return {row[0]: row[table["heads"].index(head)] for row in table["rows"]}


def test_the_claims_over_metrics_give_each_runs_values_and_their_differences_by_seed(tmp_path, monkeypatch, capsys):
    runs = claim_sweep(tmp_path / "runs", monkeypatch)
    found = claim(monkeypatch, runs, "main")
    table = found["tables"][0]
    assert column(table, "sampled %")["before"] == [40, 40] and column(table, "seeds")["prm"] == "2"
    assert column(table, "greedy %")["prm"] == pytest.approx([10, 20])
    assert column(table, "against success, %")["prm"] == pytest.approx([-50, -50])  # what the seeds share cancels
    assert column(table, "sampled, against before, %")["success"] == pytest.approx([20, 30])
    assert column(table, "the paper's greedy / sampled %")["prm"] == "11.16 / 14.68"
    assert found["curves"]["steps"]["delta"] == [[6, 7, 8]] * 2 and found["runs"][0]["commit"] == "abc"
    assert [line.split() for line in found["texts"][0].splitlines()[3:]] == [
        ["1", "0.75", "0.75", "1.62", "right", "b41+5=46"], ["2", "0.50", "0.50", "1.25", "right", "####46"]]  # fmt: skip
    assert render(table) in capsys.readouterr().out and (runs / "claims" / "hacking.png").stat().st_size > 10_000

    table = claim(monkeypatch, runs, "low-alpha")["tables"][0]
    assert column(table, "greedy %")["delta"] == pytest.approx([50, 60]) and "the paper's" not in "".join(table["heads"])

    table = claim(monkeypatch, runs, "orm")["tables"][0]
    assert table["rows"] == [["1", "2", [0.6, 0.7], [0.8] * 2, [0.3] * 2, [0.7] * 2, [0.75] * 2]]  # of three
    accuracy, steps = claim(monkeypatch, runs, "map")["tables"]
    assert column(accuracy, "alpha 0.5")["delta"] == pytest.approx([50, 60]) and column(steps, "alpha 0.5")["prm"] == [8, 8]
    assert (runs / "claims" / "map.png").stat().st_size > 10_000
    (runs / "prm-alpha0.5-seed1" / "model").rename(runs / "away")  # of seed 1 not all runs are done
    accuracy, _ = claim(monkeypatch, runs, "map")["tables"]
    assert accuracy["title"].endswith("seed 0") and column(accuracy, "alpha 0.5")["delta"] == pytest.approx([50])
    (runs / "away").rename(runs / "prm-alpha0.5-seed1" / "model")
    table = claim(monkeypatch, runs, "dense")["tables"][0]
    assert column(table, "iteration 1") == {"prm": [25, 25], "delta": [25, 25]}
    assert {row[2] for row in claim(monkeypatch, runs, "sums")["tables"][0]["rows"]} == {"2"}


def test_the_claims_over_reward_models_run_them(tmp_path, monkeypatch):
    runs, policy, judge = tmp_path / "runs", toy_model(TOKENIZER, 0, hidden=16, layers=1, heads=2), tmp_path / "judge"
    claim_sweep(runs, monkeypatch, str(judge))
    policy.save_pretrained(runs / "policy")
    TOKENIZER.save_pretrained(runs / "policy")
    ScalarModel(policy).save(TOKENIZER, judge)  # whose head is zero: it scores everything 0.5
    (judge / "quality.json").write_text('{"auroc": 0.8, "auroc_oracle": 0.9}')
    best, judged = claim(monkeypatch, runs, "best-of-n", "--problems", "6")["tables"]
    assert column(best, "accuracy")["pass@1"] == column(best, "accuracy")["best of 16 by ORM"] == [0, 0]  # it knows nothing
    assert column(judged, "mean")["PRM: steps, against the oracle"] == [0.9, 0.9]
    assert column(claim(monkeypatch, runs, "labels")["tables"][0], "step AUROC against the oracle")["exact"] == [0.9, 0.9]

    monkeypatch.setattr(evaluation, "load_problems", lambda *_: load_problems("toy", "test", 5))
    sums, last, *_ = claim(monkeypatch, runs, "repeats")["tables"]
    paid, one = column(sums, "m = 10"), column(last, "m = 10")
    assert paid["prm"][0] - column(sums, "m = 0")["prm"][0] == pytest.approx(5)  # ten more steps at 0.5
    assert paid["delta"] == pytest.approx([0.5, 0.5]) and one["delta"] == pytest.approx([0.5, 0.5])
    assert paid["clip"] == paid["clip-delta"] == one["clip-delta"] == [0, 0]
    assert paid["progress"] == pytest.approx([0, 0], abs=1e-6) and one["progress"] == pytest.approx([-0.5, -0.5])
    assert paid["normed"] == pytest.approx([0.5, 0.5]) and paid["penalty"] == pytest.approx([0, 0])
