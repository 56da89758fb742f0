"""Judging answers, pass@k, votes, best-of-n, tables and figures."""

import itertools
import json
import sys

import pytest
import torch

import eval as evaluation
from data import Problem, UserError, run_script, toy_tokenizer
from eval import AGGREGATES, choose, judge, pass_at_k, summarise, vote
from model import ScalarModel, toy_model
from rollout import Sample

TOKENIZER = toy_tokenizer()


def rows(*answers: tuple[str, bool]) -> list[dict]:
    return [{"response": f"####{a}", "correct": c, "truncated": False} for a, c in answers]


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
    assert vote(["1/2", "0.5", "3", None], [1, 1, 1.5, 9]) == "1/2"
    assert vote(["1/2", "0.5", "3"], [1, 1, 2.5]) == "3"
    assert vote([None, None], [1, 1]) is None


def test_choosing_best_and_by_vote():
    group = rows(("5", False), ("5", False), ("7", True)) + rows(("8", True), ("9", False), ("8", True))
    assert choose(group, 3, [1.0] * 6, "vote") == 0.5  # 5 wins the first problem, 8 the second
    assert choose(group, 3, [0.1, 0.1, 0.9, 0.1, 0.9, 0.2], "best") == 0.5
    assert choose(group, 3, [0.1, 0.1, 0.9, 0.1, 0.9, 0.2], "vote") == 0.5
    assert choose(group, 3, [0.1, 0.1, 0.9, 0.9, 0.1, 0.2], "best") == 1.0
    group[2]["truncated"] = True
    assert choose(group, 3, [0.0, 0.0, 9.0, 1.0, 0.0, 0.0], "vote") == 0.5  # a truncated answer has no vote


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


def test_a_model_is_evaluated_with_votes_and_best_of_n(folder, monkeypatch, capsys, tmp_path):
    data = tmp_path / "p.jsonl"
    data.write_text("".join(json.dumps({"question": f"1{i}b+5=", "answer": f"1{i + 5}"}) + "\n" for i in range(5)))
    argv = ["--model", folder / "lm", "--data", data, "--prompt", "{question}", "--n", 4, "--max-new-tokens", 20]
    argv += ["--prm", folder / "rm", "--orm", folder / "rm", "--out", tmp_path / "r.json", "--answers", tmp_path / "a.jsonl"]
    out = call(monkeypatch, capsys, *argv)
    for words in ("greedy accuracy", "sampled accuracy", "pass@1", "pass@2", "pass@4", "majority of 4", "best of 4 by orm",
                  "vote of 4 by orm", *(f"best of 4 by prm {a}" for a in AGGREGATES)):  # fmt: skip
        assert words in out
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["problems"] == 5
    assert results["results"]["pass@1"] == pytest.approx(results["results"]["sampled"]["accuracy"])
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 5 + 5 * 4
    assert out == call(monkeypatch, capsys, *argv)  # the same seed, the same answers


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
        ("", "either --model or --runs"),
        ("--model a --runs b", "either --model or --runs"),
        ("--model a --data toy --figure x.png", "--figure draws"),
        ("--model a --data toy --prm x", "--n 2 or more"),
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
    assert stop.value.code == 2 and words in error and "Traceback" not in error


def test_a_run_folder_brings_its_own_settings(tmp_path, folder):
    run = fake_run(tmp_path / "run", 0.5)
    (run / "model").symlink_to(folder / "lm")
    config = dict(data="toy", eval_data="", prompt="{question}", separator="\n", max_prompt_tokens=32, max_new_tokens=77,
                  slots=9, temperature=0.5)  # fmt: skip
    (run / "config.json").write_text(json.dumps(config))
    options = evaluation.parse(["--model", str(run), "--slots", "3"])
    assert options.model == str(run / "model") and options.data == "toy" and options.max_new_tokens == 77
    assert options.slots == 3  # what is given by hand wins
    with pytest.raises(UserError):
        evaluation.parse([])


def test_evaluation_does_not_change_the_models_mode():
    model = toy_model(TOKENIZER, seed=0, hidden=16, layers=1, heads=2).train()
    evaluation.evaluate(model, TOKENIZER, [Problem("41b+5=", "46")], "{question}", "\n", max_new_tokens=5)
    assert model.training and torch.is_grad_enabled()
