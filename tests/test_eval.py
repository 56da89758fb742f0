"""Evaluation: answers, pass@k, votes, best-of-n, reward models, tables and figures, and how a killed call goes on."""

import itertools
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import prm
from data import Problem, TextOptions, UserError, load_problems, run_script, steps_of, toy_tokenizer
from eval import (
    AGGREGATES, EvalOptions, Scorer, before_after, best_of, bootstrap, interval, measures, parse, pass_at_k,
    same_answers, summarise, vote, voted, ways,
)
from model import ScalarModel, toy_model
from rollout import Sample

TOKENIZER = toy_tokenizer()

# ------------------------------------------------------------------------------------------------ figures


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
    assert voted([True, False, True, True], [0, 1, 0, 0], [1.0] * 4, 2) == 1.0  # a candidate of an earlier group


def test_all_measures_of_two_problems_by_hand():
    greedy = [{"correct": True}, {"correct": False}]
    answers = (["5", "5", "7", "5"], "5"), (["1", "2", "1", "1.0"], "2")
    rows = []
    for texts, gold in answers:
        for text, candidate in zip(texts, same_answers(texts)):
            rows.append({"correct": float(text) == float(gold), "vote": candidate})
    values = measures(greedy, rows, 4, {"X": [0.1, 0.2, 0.9, 0.3] + [0.0, 1.0, 0.2, 0.2]})
    found = {name: x.tolist() for name, x in values.items()}
    assert found["greedy accuracy"] == [1, 0] and found["sampled accuracy"] == found["pass@1"] == [0.75, 0.25]
    assert found["pass@2"] == [1, 0.5] and found["pass@4"] == [1, 1] and found["majority of 4"] == [1, 0]
    assert found["majority of 2"] == [0.5, 0]  # a tie goes to the first
    assert found["best of 2 by X"] == [0.5, 0.5] and found["best of 4 by X"] == [0, 1]
    assert found["vote of 4 by X"] == [0, 1] and found["vote of 2 by X"] == [0.5, 0.5]
    assert not any("of 1" in name for name in found)
    assert measures(greedy, rows[::4], 1, {}).keys() == {"greedy accuracy", "sampled accuracy"}


def test_the_bootstrap_interval_covers_what_the_normal_one_covers():
    values = torch.tensor([1.0] * 300 + [0.0] * 700, dtype=torch.float64)
    mean, low, high = bootstrap(values)
    stderr = (0.3 * 0.7 / 1000) ** 0.5
    assert mean == pytest.approx(0.3) and low == pytest.approx(0.3 - 1.96 * stderr, abs=0.004)
    assert high == pytest.approx(0.3 + 1.96 * stderr, abs=0.004)
    assert bootstrap(torch.ones(5)) == (1, 1, 1)


def test_the_interval_of_a_few_runs_is_students():
    assert interval([0.25]) == (0.25, 0.0)
    assert interval([1, 3]) == pytest.approx((2, 12.706))  # deviation 2^0.5, over 2^0.5
    assert interval([1, 2, 3, 4, 5]) == pytest.approx((3, 2.776 * (2.5 / 5) ** 0.5))
    assert interval([7] * 4) == (7, 0)
    many = [0.0, 1.0] * 50  # of many runs it is at least the normal one
    assert 1.96 <= interval(many)[1] / (sum((x - 0.5) ** 2 for x in many) / 99 / 100) ** 0.5 < 2.3


def test_step_scores_become_one_number_in_four_ways_and_no_step_is_worth_nothing():
    found = ways("prm", [[0.9, 0.5, 0.8], []])
    assert [*found] == [f"PRM {name}" for name in AGGREGATES]
    assert [x for x, _ in found.values()] == pytest.approx([0.8, 0.5, 2.2 / 3, 0.36])
    assert {nothing for _, nothing in found.values()} == {0} and ways("orm", [[0.25], []]) == {"ORM": [0.25, 0]}


# ------------------------------------------------------------------------------------------------ answers


class ByteTokenizer:
    """UTF-8 bytes, and 0 to end with."""

    chat_template, eos_token_id = None, 0

    def __call__(self, texts, **_):
        encode = lambda text: list(text.encode())
        return {"input_ids": encode(texts) if isinstance(texts, str) else [encode(text) for text in texts]}

    def decode(self, ids, **_):
        return bytes(i for i in ids if i).decode(errors="replace")


def test_references_are_graded_as_correct_through_the_whole_path(tmp_path, monkeypatch):
    """Prompt, an answer made of the reference, steps, extraction, grading; and a wrong reference as wrong."""
    rows = [
        {"problem": "A?", "solution": "So $x=\\frac12$.\n\nThus \\boxed{\\frac{1}{2}}", "type": "Algebra"},
        {"problem": "B?", "solution": "The set is\n\n$\\boxed{\\{1,2\\}}$.", "type": "Geometry", "level": "Level 2"},
        {"question": "C?", "answer": "He has 2*4=<<2*4=8>>8\n#### 1,008"},
    ]
    given = [row.get("solution") or row["answer"] for row in rows[:2]] + ["#### 1,009"]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer, prompts = ByteTokenizer(), []

    def generate(sampler, asked, n, **_):
        prompts.extend(asked)
        return [[Sample(i, tokenizer(given[i])["input_ids"] + [0], False)] for i in range(len(asked))]

    monkeypatch.setattr(prm, "rollout", generate)
    monkeypatch.setattr(evaluation, "as_sampler", lambda model: SimpleNamespace(model=model))
    monkeypatch.setattr(prm, "eos_ids", lambda *_: [0])
    text = TextOptions("Q: {question}", "\n\n", 99, 99)
    summary, found = evaluation.evaluate(None, tokenizer, load_problems(str(file)), text)
    assert [row["correct"] for row in found] == [True, True, False] and [row["steps"] for row in found] == [2, 2, 1]
    assert [row["index"] for row in found] == [0, 1, 2] and summary["accuracy"] == pytest.approx(2 / 3)
    assert tokenizer.decode(prompts[0]) == "Q: A?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random policy, lm/, and a reward model on it, rm/."""
    path = tmp_path_factory.mktemp("model")
    model = toy_model(TOKENIZER, seed=0, hidden=16, layers=1, heads=2)
    model.save_pretrained(path / "lm")
    TOKENIZER.save_pretrained(path / "lm")
    ScalarModel(model).save(TOKENIZER, path / "rm")
    return path


def test_evaluation_does_not_change_the_models_mode():
    model = toy_model(TOKENIZER, seed=0, hidden=16, layers=1, heads=2).train()
    text = TextOptions("{question}", "\n", 32, 5)
    evaluation.evaluate(model, TOKENIZER, [Problem("41b+5=", "46")], text)
    assert model.training and torch.is_grad_enabled()


def test_an_answer_depends_on_seed_and_index_alone():
    model = toy_model(TOKENIZER, seed=0, hidden=16, layers=1, heads=2)
    problems = [Problem(f"4{i}b+5=", f"4{i + 5}") for i in range(4)]
    text = TextOptions("{question}", "\n", 32, 12)
    said = lambda rows: [(row["index"], row["response"]) for row in rows]
    ask = lambda indices, seed: said(evaluation.answer(model, TOKENIZER, problems, indices, text, n=3, seed=seed))
    everything = ask(range(4), 1)
    assert ask([2], 1) == everything[6:9] and ask([3, 1], 1) == everything[9:] + everything[3:6]
    assert ask(range(4), 2) != everything and ask([], 1) == []


# ------------------------------------------------------------------------------------------------ --model


def call(monkeypatch, capsys, *argv) -> str:
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
    run_script(evaluation.main)
    return capsys.readouterr().out


def refused(monkeypatch, capsys, *argv) -> str:
    """The one sentence that a wrong call gets."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        run_script(evaluation.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    return error.strip().splitlines()[-1]


def write_problems(path, count: int) -> str:
    kinds = [("Algebra", "Level 1"), ("Geometry", "Level 2")]
    with path.open("w") as file:
        for i in range(count):
            subject, level = kinds[i % 2]
            file.write(json.dumps(dict(problem=f"1{i}b+5=", answer=f"1{i + 5}", type=subject, level=level)) + "\n")
    return str(path)


def options(folder, problems, out, *more) -> list:
    same = ["--model", folder / "lm", "--prompt", "{question}", "--max-new-tokens", 12]
    return [*same, "--data", problems, "--out", out, *more]


def test_a_model_is_evaluated_once_and_another_reward_model_reads_its_answers(folder, monkeypatch, capsys, tmp_path):
    problems, out = f"{write_problems(tmp_path / 'math.jsonl', 5)},{tmp_path / 'other.jsonl'}", tmp_path / "out"
    (tmp_path / "other.jsonl").write_text(json.dumps({"question": "11b+5=", "answer": "16"}))
    argv = options(folder, problems, out, "--samples", 4)
    call(monkeypatch, capsys, *argv)
    answers, loads = [(out / f"{way}.jsonl").read_bytes() for way in ("greedy", "sampled")], []
    monkeypatch.setattr(evaluation, "load_causal_lm", lambda *_: loads.append(1))
    text = call(monkeypatch, capsys, *argv, "--prm", folder / "rm", "--orm", folder / "rm")
    assert not loads and answers == [(out / f"{way}.jsonl").read_bytes() for way in ("greedy", "sampled")]
    assert [len(x.splitlines()) for x in answers] == [6, 6 * 4]
    scores = [json.loads(line) for line in next(out.glob("prm-*.jsonl")).read_text().splitlines()]
    assert [row["index"] for row in scores] == [i for i in range(6) for _ in range(4)]
    assert all(0 <= x <= 1 for row in scores for x in row["scores"])
    assert text.strip().endswith((out / "results.md").read_text().strip())

    results = json.loads((out / "results.json").read_text())["results"]
    assert [*results] == problems.split(",") and results[problems.split(",")[0]]["pass@1"][0] == pytest.approx(
        sum(row["correct"] for row in map(json.loads, answers[1].splitlines()) if row["index"] < 5) / 20
    )
    lines = {line.split(" | ")[0]: line for line in text.split("other.jsonl, %")[0].splitlines()}
    assert lines[f"| {tmp_path}/math.jsonl, %"].endswith(
        "| 5 problems | Algebra (3) | Geometry (2) | level 1 (3) | level 2 (2) |"
    )
    names = ["greedy accuracy", "sampled accuracy", "pass@1", "pass@2", "pass@4", "majority of 2", "majority of 4"]
    names += [f"{how} of 4 by {way}" for how in ("best", "vote") for way in ("ORM", *(f"PRM {a}" for a in AGGREGATES))]
    for name in names:  # with an interval, and by subject and level
        cells = lines[f"| {name}"].split(f"{name} ")[1]
        assert re.fullmatch(r"\| [\d.]+ \([\d.]+ to [\d.]+\)( \| [\d.]+){4} \|", cells)
    assert f"| {tmp_path}/other.jsonl | sampled |" in text


def test_a_block_fills_the_slots(folder, monkeypatch, capsys, tmp_path):
    """40 problems and 256 slots: all go in one rollout, which shows its own progress."""
    calls, rollout = [], prm.rollout

    def counted(sampler, prompts, n, **more):
        calls.append((len(prompts), n, more["temperature"], bool(more["progress"])))
        return rollout(sampler, prompts, n, **more)

    monkeypatch.setattr(prm, "rollout", counted)
    problems = write_problems(tmp_path / "p.jsonl", 40)
    call(monkeypatch, capsys, *options(folder, problems, tmp_path / "out", "--samples", 2))
    assert calls == [(40, 1, 0.0, True), (40, 2, 1.0, True)]
    calls.clear()
    call(monkeypatch, capsys, *options(folder, problems, tmp_path / "few", "--samples", 2, "--slots", 4))
    assert sum(prompts for prompts, *_ in calls) == 80 and len(calls) > 2
    assert all(prompts * n >= 4 for prompts, n, *_ in calls)
    for way in ("greedy", "sampled"):  # the answers are the same
        few, many = ((tmp_path / out / f"{way}.jsonl").read_text() for out in ("few", "out"))
        assert few == many


def test_a_killed_call_goes_on_and_ends_as_one_that_was_not(folder, monkeypatch, capsys, tmp_path):
    problems = write_problems(tmp_path / "p.jsonl", 20)
    argv = lambda out: options(folder, problems, tmp_path / out, "--samples", 2, "--slots", 2, "--prm", folder / "rm")
    files = lambda out: {path.name: path.read_bytes() for path in (tmp_path / out).glob("*.jsonl")}
    call(monkeypatch, capsys, *argv("whole"))
    whole, rollout, calls = files("whole"), prm.rollout, []

    def killed_at(last: int):
        def counted(*args, **more):
            calls.append(1)
            if len(calls) == last:
                raise SystemExit(9)
            return rollout(*args, **more)

        calls.clear()
        monkeypatch.setattr(prm, "rollout", counted)

    for last in (2, 5):  # among the greedy answers, and among the sampled
        killed_at(last)
        with pytest.raises(SystemExit):
            call(monkeypatch, capsys, *argv("killed"))
    begun = files("killed")
    assert begun["greedy.jsonl"] == whole["greedy.jsonl"] and len(begun) == 2  # no scores yet
    assert begun["sampled.jsonl"] in whole["sampled.jsonl"] and len(begun["sampled.jsonl"].splitlines()) == 2 * 8
    (tmp_path / "killed" / "sampled.jsonl").write_bytes(begun["sampled.jsonl"][:-7])  # its last line is cut off
    killed_at(5)  # of the five blocks of sampled answers one is there
    call(monkeypatch, capsys, *argv("killed"))
    assert files("killed") == whole and len(calls) == 4


def test_answers_of_other_settings_are_refused(folder, monkeypatch, capsys, tmp_path):
    argv = options(folder, write_problems(tmp_path / "p.jsonl", 3), tmp_path / "out")
    call(monkeypatch, capsys, *argv)
    others = ["--seed", 1], ["--temperature", 0.5], ["--problems", 2], ["--max-new-tokens", 11], ["--samples", 2]
    for more in others:
        assert "was made with other settings" in refused(monkeypatch, capsys, *argv, *more)


def test_the_default_folder_is_named_by_the_settings(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    argv = options(folder, write_problems(tmp_path / "p.jsonl", 2), "")
    for n in (1, 2, 2):
        call(monkeypatch, capsys, *argv, "--samples", n)
    found = [path.name for path in (tmp_path / "runs/eval").iterdir()]
    assert len(found) == 2 and all(name.startswith("lm-") for name in found)


def test_a_run_folder_brings_its_own_settings(tmp_path, folder):
    run = fake_run(tmp_path / "run", 0.5)
    (run / "model").symlink_to(folder / "lm")
    config = dict(data="toy", eval_data="", prompt="{question}", separator="\n", dtype="float32", temperature=0.5)
    config |= dict(max_prompt_tokens=32, max_new_tokens=77, slots=9)
    (run / "config.json").write_text(json.dumps(config))
    opts = parse(["--model", str(run), "--slots", "3"])
    assert opts.model == str(run / "model") and opts.data == "toy" and opts.max_new_tokens == 77
    assert opts.temperature == 0.5 and opts.slots == 3  # what is given by hand wins


# ------------------------------------------------------------------------------------------------ wrong calls


@pytest.mark.parametrize(
    "argv, words",
    [
        ("", "give one of --model"),
        ("--model a --runs b", "give one of --model"),
        ("--model a", "--model \\(with --data\\)"),
        ("--model a --data toy --figure x.png", "--runs \\(it alone with --figure\\)"),
        ("--processbench x", "need a --prm"),
        ("--pairs x", "a --prm or an --orm"),
        ("--model a --data gsm8k --prm-format qwen", "--prm-format need a --prm"),
        ("--prm ./nowhere --pairs x.jsonl", "cannot read"),
        ("--model a --data toy,", "every data set needs a name"),
        ("--model a --data toy --prm x", "--samples 2 or more"),
        ("--runs nowhere", "not the folder of a run"),
        ("--model a --dta toy", "unrecognized"),
    ],
)
def test_wrong_calls_get_one_sentence_and_status_2(argv, words, monkeypatch, capsys):
    assert re.search(words, refused(monkeypatch, capsys, *argv.split()))


@pytest.mark.parametrize(
    "wrong",
    ["--samples 0", "--slots 0", "--problems -1", "--temperature 0", "--temperature nan", "--temperature inf",
     "--seed -1", "--threshold 1.5", "--threshold nan", "--max-new-tokens 0", "--max-prompt-tokens 0"],
)
def test_numbers_out_of_range_get_one_sentence_before_anything_starts(wrong, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "processes", lambda: pytest.fail("started"))
    option, value = wrong.split()
    sentence = refused(monkeypatch, capsys, "--model", "a", "--data", "toy", option, value)
    assert re.fullmatch(rf"eval.py: {option} [-\w.]+: must be a number in [\[(].*[\])]", sentence)


# ------------------------------------------------------------------------------------------------ reward models


def test_a_scorer_gives_a_score_a_step_or_one_an_answer_and_stops_at_what_is_no_number(folder, tmp_path):
    broken = ScalarModel.load(folder / "rm")
    torch.nn.init.constant_(broken.head.bias, torch.nan)
    broken.save(TOKENIZER, tmp_path / "nan")
    row = {"question": "41b+5=", "response": "b41+5=46\n####46", "char_ends": [9, 15], "truncated": False}
    for kind in ("prm", "orm"):
        opts = EvalOptions(prm=str(folder / "rm"), orm=str(folder / "rm"), prompt="{question}")
        scores = Scorer(opts, kind, "cpu").scores([row, {**row, "response": "", "char_ends": [], "truncated": True}])
        assert scores == ([[0.5, 0.5], []] if kind == "prm" else [[0.5], []])  # a head of zeros
        setattr(opts, kind, str(tmp_path / "nan"))
        with pytest.raises(UserError, match="scores that are not finite"):
            Scorer(opts, kind, "cpu").scores([row])


def test_a_published_prm_as_orm_is_refused(monkeypatch, capsys, folder, tmp_path):
    published = tmp_path / "qwen2.5-math-prm"
    published.mkdir()
    (published / "config.json").write_bytes((folder / "lm" / "config.json").read_bytes())
    assert "give it as --prm" in refused(monkeypatch, capsys, "--orm", published, "--pairs", "x.jsonl")


@pytest.fixture
def known_scores(monkeypatch):
    """A PRM that scores a step by the digit it ends in, an ORM by the last one."""

    class Known:
        def __init__(self, opts, kind, device):
            self.kind = kind

        def scores(self, rows):
            steps = [[int(step.strip()[-1]) / 9 for step in steps_of(row)] for row in rows]
            return [s[-1:] for s in steps] if self.kind == "orm" else steps

    monkeypatch.setattr(evaluation, "Scorer", Known)


def test_processbench_counts_exact_first_errors_and_clean_passes(tmp_path, monkeypatch, capsys, known_scores):
    row = lambda steps, label: {"problem": "q", "steps": steps, "label": label, "final_answer_correct": label < 0}
    rows = [row(["a 9", "b 1"], 1), row(["a 1", "b 1"], 1), row(["a 9"], -1), row(["a 9", "b 8"], -1), row(["a 2"], -1)]
    file, other = tmp_path / "gsm8k.json", tmp_path / "math.jsonl"
    file.write_text(json.dumps(rows))
    other.write_text(json.dumps(row(["a 1"], -1)))
    argv = ["--prm", "x", "--processbench", f"{file},{other}"]
    out = call(monkeypatch, capsys, *argv)
    assert f"| {file} | 50 | 66.67 | 57.14 | 5 |" in out and f"| {other} | 0 | 0 | 0 | 1 |" in out
    assert "| mean |  |  | 28.57 |  |" in out
    assert "| 50 | 33.33 | 40 | 5 |" in call(monkeypatch, capsys, *argv, "--threshold", 0.95)  # b 8, 0.89, is wrong now


def test_pairs_count_a_tie_as_wrong_by_subset(tmp_path, monkeypatch, capsys, known_scores):
    from pyarrow import Table, parquet

    pair = lambda chosen, rejected, subset: {"prompt": "q", "chosen": chosen, "rejected": rejected, "subset": subset}
    rows = [pair("9\n8", "8\n7", "math-prm"), pair("1\n8", "8\n7", "math-prm"), pair("5", "5", "other")]
    file = tmp_path / "pairs.parquet"
    parquet.write_table(Table.from_pylist(rows), file)
    out = call(monkeypatch, capsys, "--prm", "x", "--orm", "y", "--pairs", file)
    lines = {line.split(" |")[0]: line for line in out.splitlines()}
    assert lines["| chosen above rejected, %"].endswith("| math-prm | other |")
    assert "| 100.0 (100.0 to 100.0) | 0.0 (0.0 to 0.0) |" in lines["| ORM"] and "| 100.0 (" in lines["| PRM last"]
    assert lines["| PRM min"].startswith("| PRM min | 50.0 (")


@pytest.mark.parametrize("kind", ["pairs", "processbench"])
def test_rows_of_another_form_get_one_sentence(kind, tmp_path, monkeypatch, capsys, known_scores):
    good = {"prompt": "q", "chosen": "1", "rejected": "0", "problem": "q", "steps": ["1"], "label": 0}
    wrong = {"chosen": None, "steps": "abc"}, {"chosen": [{"role": "user"}], "label": 1}, {"prompt": 3, "steps": []}
    for bad in wrong:
        (tmp_path / "x.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | bad))
        assert "x.jsonl line 2: needs" in refused(monkeypatch, capsys, "--prm", "x", f"--{kind}", tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text("3")
    assert "x.jsonl line 1: needs" in refused(monkeypatch, capsys, "--prm", "x", f"--{kind}", tmp_path / "x.jsonl")


# ------------------------------------------------------------------------------------------------ runs


def evaluated(accuracy: float) -> dict:
    figures = dict(accuracy=accuracy, stderr=0.01, steps=5.5, tokens=44.0, repeats=0.25, truncated=0.125)
    return {f"{way}_{key}": x for way in ("greedy", "sampled") for key, x in figures.items()}


def fake_run(path, accuracy: float):
    path.mkdir()
    rollout = {"success": 0.5, "steps": 5, "tokens": 40, "learned_reward": 1.25}
    lines = [{"iteration": 0, **evaluated(0)}, {"iteration": 1, **rollout, **evaluated(accuracy)}]
    lines.append({"iteration": 2, **rollout})
    (path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"iter')  # it writes just now
    return path


def test_runs_side_by_side_as_a_table_and_a_figure(tmp_path, monkeypatch, capsys):
    runs = [fake_run(tmp_path / "delta", 0.75), fake_run(tmp_path / "prm", 0.125)]
    out = call(monkeypatch, capsys, "--runs", *runs, "--figure", tmp_path / "f.png")
    lines = {line[:28].strip(): line[28:].split() for line in out.splitlines()}
    assert lines[""] == [*map(str, runs)] and lines["iteration"] == ["1", "1"]
    assert lines["greedy accuracy"] == "75.0 ± 2.0 % 12.5 ± 2.0 %".split() and lines["sampled steps"] == ["5.5", "5.5"]
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "f.png").stat().st_size > 20_000


def test_curves_of_several_seeds_are_their_mean_in_a_band(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluation, "save_figure", lambda figure, axes, path: drawn.append(axes))
    runs = [[{"iteration": i, "steps": i + seed} for i in range(3 + seed)] for seed in (0, 1)]
    evaluation.draw_curves({"a": runs, "b": runs[:1]}, "x.png", ("steps", "tokens"))
    steps, tokens = drawn[0][:2]
    x, y = steps.lines[0].get_data()
    assert x.tolist() == [0, 1, 2] and y.tolist() == [0.5, 1.5, 2.5]  # as far as both have come
    edges = steps.collections[0].get_paths()[0].vertices[:, 1]
    half = 12.706 * 0.5  # Student's t of two runs; their standard error is 0.5
    assert (edges.min(), edges.max()) == pytest.approx((0.5 - half, 2.5 + half))
    assert steps.lines[1].get_ydata().tolist() == [0, 1, 2] and not len(tokens.lines[0].get_xdata())


def test_what_training_changed_is_a_line_for_each_figure_and_answers_without_escapes():
    before = evaluated(0.5) | {"greedy_accuracy:math": 0.25, "greedy_stderr:math": 0.02}
    after = evaluated(0.625) | {"greedy_accuracy:math": 0.5, "greedy_stderr:math": 0.0}
    row = {"question": "1+1?", "response": "it\nis \x1b[2J3 ", "verdict": "mismatch"}
    lines = before_after(before, after, ([row], [row | {"response": "2", "verdict": "match"}])).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["before", "after"], "greedy accuracy 50.0 ± 2.0 % 62.5 ± 2.0 %".split(), ["greedy", "steps", "5.5", "5.5"]]
    assert "greedy accuracy:math 25.0 ± 3.9 % 50.0 ± 0.0 %".split() in [line.split() for line in lines]
    assert not any("stderr" in line for line in lines)
    assert lines[-4:] == ["question  1+1?", "before    it", "          is  [2J3   (mismatch)", "after     2   (match)"]
    assert len(lines[0]) == len(lines[1]) == len(lines[2])
