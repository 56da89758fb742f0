"""Monte-Carlo labels, reward model training, scoring and its quality measures."""

import json
import os
import random
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

import prm
from data import Problem, UserError, oracle, run_script, split_steps, toy_problems, toy_solution, toy_tokenizer
from model import ScalarModel, gpus, toy_model
from prm import LabelOptions, TrainOptions, auroc, make_labels, pad_steps, quality, read_labels, targets
from rollout import Batch, Sample

TOKENIZER = toy_tokenizer()
OPTIONS = LabelOptions(problems=6, samples=2, completions=3, labels="soft", prompt="{question}", max_new_tokens=40, seed=1)


def script(text: str) -> list[int]:
    return TOKENIZER.encode(text)


@pytest.fixture
def tiny():
    return toy_model(TOKENIZER, seed=0, hidden=16, layers=1, heads=2)


@pytest.fixture
def scripted(monkeypatch):
    """A sampler that plays back: solutions from a list, completions right with a known pattern."""
    calls = []

    def play(model, prompts, n, *, max_new_tokens, decided=None, **_):
        calls.append((model, prompts, max_new_tokens))
        if model == "policy":
            return [[Sample(i, ids, truncated) for ids, truncated in play.solutions] for i in range(len(prompts))]
        out = []
        for i, prompt in enumerate(prompts):
            wrong_so_far = "=99" in TOKENIZER.decode(prompt)
            tails = ["####00", "####46", "####46"] if not wrong_so_far else ["####00", "####01", "####02"]
            samples, count = [Sample(i, script(tail) + [1], False) for tail in tails], 1 if decided else n
            while count < n and not decided(i, samples[:count]):
                count = min(2 * count, n)
            out.append(samples[:count])
        return out

    monkeypatch.setattr(prm, "rollout", play)
    monkeypatch.setattr(prm, "as_sampler", lambda model: model)
    monkeypatch.setattr(prm, "eos_ids", lambda *_: [1])
    play.calls = calls
    return play


def test_labels_are_the_share_of_right_completions_and_the_last_step_is_graded_itself(scripted, tmp_path):
    right, wrong = script("b41+5=46\n####46") + [1], script("b41+5=99\n####99") + [1]
    scripted.solutions = [(right, False), (wrong, False)]
    make_labels("policy", "completer", TOKENIZER, [Problem("41b+5=", "46")], OPTIONS, tmp_path / "l.jsonl")
    a, b = read_labels(str(tmp_path / "l.jsonl"))
    assert a["cuts"] == [9, 15] and a["labels"] == [2 / 3, 1.0] and a["correct"]
    assert b["labels"] == [0.0, 0.0] and not b["correct"]
    prefixes = [TOKENIZER.decode(p) for p in scripted.calls[1][1]]
    assert prefixes == ["41b+5=b41+5=46\n", "41b+5=b41+5=99\n"]  # p(k): the question and all steps up to k
    assert scripted.calls[1][2] == [40 - 9, 40 - 9]  # what the step leaves of the limit


def test_a_truncated_solution_is_wrong_and_its_unfinished_step_has_no_label(scripted, tmp_path):
    scripted.solutions = [(script("b41+5=46\nb41+5=46\n####4"), True), (script("####46") + [1], False)]
    make_labels("policy", "completer", TOKENIZER, [Problem("41b+5=", "46")], OPTIONS, tmp_path / "l.jsonl")
    a, b = read_labels(str(tmp_path / "l.jsonl"))
    assert not a["correct"] and a["cuts"] == [9, 18] and a["labels"] == [2 / 3, 2 / 3]
    assert b["labels"] == [1.0]


def test_hard_labels_stop_at_the_first_right_completion_unless_audited(scripted, tmp_path, monkeypatch):
    """The completions of a right prefix are wrong, right, right."""
    options = LabelOptions(**{**vars(OPTIONS), "labels": "hard", "completions": 3})
    solutions = [(script("b41+5=46\n####46") + [1], False), (script("b41+5=99\n####99") + [1], False)]
    for audit in (False, True):
        monkeypatch.setattr(prm, "audited", lambda question, audit=audit: audit)
        scripted.solutions = solutions
        file = tmp_path / f"{audit}.jsonl"
        make_labels("policy", "completer", TOKENIZER, [Problem("41b+5=", "46")], options, file)
        a, b = read_labels(str(file))
        assert a["labels"] == [1.0, 1.0] and b["labels"] == [0.0, 0.0]  # the same labels either way
        assert b["outcomes"] == [[False, False, False], []]
        assert a["outcomes"] == ([[False, True, True], []] if audit else [[False, True], []])


def test_a_completion_is_graded_behind_its_prefix_and_a_truncated_one_is_wrong(monkeypatch):
    tails = [("", False), ("####46", True), ("####47", False)]
    monkeypatch.setattr(prm, "rollout", lambda *_, **__: [[Sample(0, script(tail), cut) for tail, cut in tails]])
    prefix = (script("####46\n"), 9, 0, "####46\n")
    found = prm.complete("completer", TOKENIZER, [prefix], [Problem("41b+5=", "46")], OPTIONS)
    assert found == [[True, False, False]]


def test_the_seeds_of_completions_come_from_their_prefix_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(prm, "rollout", lambda _, prompts, *__, seeds, **___: seen.append(seeds) or [[] for _ in prompts])
    a, b = ((script(text), 9, 0, text) for text in ("b41+5=46\n", "b41+5=47\n"))
    for prefixes in ([a, b], [b]):
        prm.complete("completer", TOKENIZER, prefixes, [Problem("41b+5=", "46")], OPTIONS)
    assert seen[0][1] == seen[1][0] != seen[0][0]


@pytest.fixture
def demonstrations(monkeypatch):
    """A policy that answers with demonstrations, of which some have a wrong line and some end too early; and a completer
    that must not be asked. Gives the rows that are labelled with these options."""

    def play(model, prompts, n, **_):
        assert model == "policy" or not prompts
        return [[solution(TOKENIZER.decode(prompt), j) for j in range(n)] for prompt in prompts]

    def solution(question: str, j: int) -> Sample:
        text, kind = toy_solution(question, random.Random(f"{question} {j}"), repeat=0.3), random.Random(question).random()
        text = text if kind < 0.5 else text.replace("=", "=9", 1)
        return Sample(0, script(text)[:20], True) if kind > 0.8 else Sample(0, script(text) + [1], False)

    def labels(path, problems=None, **more) -> list[dict]:
        problems = problems or toy_problems("train", 150)
        exact = {"labels": "oracle", "problems": len(problems), "max_new_tokens": 128}
        options = LabelOptions(**{**vars(OPTIONS), **exact, **more})
        make_labels("policy", "completer", TOKENIZER, problems, options, path)
        return read_labels(str(path))

    monkeypatch.setattr(prm, "rollout", play)
    monkeypatch.setattr(prm, "as_sampler", lambda model: model)
    monkeypatch.setattr(prm, "eos_ids", lambda *_: [1])
    return labels


def test_exact_labels_are_the_oracles_and_cost_no_completions(demonstrations, tmp_path):
    rows = demonstrations(tmp_path / "l.jsonl")
    assert len(rows) == 300 and 20 < sum(row["truncated"] for row in rows) < 150
    for row in rows:
        exact = oracle(row["question"], row["response"])
        assert row["labels"] == exact[: len(row["cuts"])] and len(exact) - len(row["cuts"]) in (0, row["truncated"])
        assert row["outcomes"] == [[]] * len(row["cuts"])
        assert row["correct"] != row["truncated"]  # the answers are right, whatever the lines
    assert 0.2 < sum(sum(row["labels"]) for row in rows) / sum(len(row["labels"]) for row in rows) < 0.9


def test_exact_labels_of_sums(tmp_path, monkeypatch):
    tok, problems = toy_tokenizer("sums"), toy_problems("train", 5, world="sums")
    options = LabelOptions(**{**vars(OPTIONS), "labels": "oracle", "samples": 1})
    texts = [toy_solution(p.question, random.Random(0)) for p in problems]
    play = lambda model, prompts, n, **_: [[Sample(i, tok.encode(texts[i]) + [1], False)] for i in range(len(prompts))]
    monkeypatch.setattr(prm, "rollout", play)
    monkeypatch.setattr(prm, "as_sampler", lambda model: model)
    monkeypatch.setattr(prm, "eos_ids", lambda *_: [1])
    make_labels("policy", "policy", tok, problems, options, tmp_path / "l.jsonl")
    rows = read_labels(str(tmp_path / "l.jsonl"))
    assert [row["labels"] for row in rows] == [[1.0] * len(text.split("\n")) for text in texts]
    assert all(row["correct"] for row in rows)


def test_exact_labels_are_refused_where_nobody_knows_them(demonstrations, tmp_path):
    with pytest.raises(UserError, match="--labels oracle: only of the embedded worlds"):
        demonstrations(tmp_path / "l.jsonl", [*toy_problems("train", 3), Problem("What is 1+1?", "2")])
    assert not [*tmp_path.iterdir()]


def test_a_share_of_the_labels_is_turned_around_the_same_ones_each_time(demonstrations, tmp_path):
    labelled = lambda name, **more: [y for row in demonstrations(tmp_path / name, **more) for y in row["labels"]]
    labels = labelled("0")
    turned = {flip: [x != y for x, y in zip(labels, labelled(f"{flip}", flip=flip))] for flip in (0.1, 0.3, 1.0)}
    assert len(labels) > 1000 and all(turned[1.0]) and set(labels) == {0.0, 1.0}
    for flip in (0.1, 0.3):
        for kind in (0.0, 1.0):  # good and bad ones alike
            found = [t for t, y in zip(turned[flip], labels) if y == kind]
            assert sum(found) / len(found) == pytest.approx(flip, abs=4 * (flip * (1 - flip) / len(found)) ** 0.5)
    assert all(more or not less for less, more in zip(turned[0.1], turned[0.3]))  # more noise turns more of the same
    (tmp_path / "again").mkdir()
    assert labelled("again/0.3", flip=0.3) == labelled("0.3", flip=0.3)
    assert labelled("other", flip=0.3, seed=2) != labelled("0.3", flip=0.3)
    with pytest.raises(UserError, match="flip 0.3 -> 0.1"):
        labelled("0.3", flip=0.1)


def test_soft_labels_are_turned_around_to_what_is_left_to_1(scripted, tmp_path):
    scripted.solutions = [(script("b41+5=46\n####46") + [1], False)]
    options = LabelOptions(**{**vars(OPTIONS), "flip": 1.0, "samples": 1})
    make_labels("policy", "completer", TOKENIZER, [Problem("41b+5=", "46")], options, tmp_path / "l.jsonl")
    (row,) = read_labels(str(tmp_path / "l.jsonl"))
    assert row["labels"] == pytest.approx([1 / 3, 0.0]) and row["correct"]


@pytest.mark.parametrize("flip", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(flip):
    with pytest.raises(UserError, match="--flip is a share"):
        LabelOptions(flip=flip)


def test_equal_prefixes_are_completed_once(scripted, tmp_path):
    right = script("b41+5=46\n####46") + [1]
    scripted.solutions = [(right, False), (right, False), (script("b41+5=46\n####47") + [1], False)]
    options = LabelOptions(**{**vars(OPTIONS), "samples": 3})
    make_labels("policy", "completer", TOKENIZER, [Problem("41b+5=", "46")], options, tmp_path / "l.jsonl")
    assert len(scripted.calls[1][1]) == 1 and [r["labels"] for r in read_labels(str(tmp_path / "l.jsonl"))] == [
        [2 / 3, 1.0], [2 / 3, 1.0], [2 / 3, 0.0]]  # fmt: skip


def test_what_the_labels_look_like_is_told(tmp_path):
    row = {"question": "q", "labels": [1.0, 0.0], "outcomes": [[True, False, False, True], [False] * 4]}
    other = {"question": "q", "labels": [0.0], "outcomes": [[False, False, True, True]]}
    text = prm.describe([row, other], LabelOptions(labels="soft", completions=4), prefixes=30, seconds=10.0)
    assert "3 steps of 2 solutions" in text and "3.0 a second" in text and "mean label 0.33" in text
    assert "step 1, 2, ...: 0.50 0.00" in text
    assert "2 and of 2 other completions agree in 0.67 of 3 prefixes" in text  # right, nothing; nothing, nothing; no, yes


def test_labels_of_a_run_that_was_killed_ten_times_are_those_of_one_that_was_not(tiny, tmp_path, monkeypatch):
    problems, options = toy_problems("train", 40), LabelOptions(**{**vars(OPTIONS), "problems": 40, "labels": "hard"})
    in_blocks = prm.in_blocks
    monkeypatch.setattr(prm, "in_blocks", lambda *args: in_blocks(*args, size=3))
    began = time.time()
    make_labels(tiny, tiny, TOKENIZER, problems, options, tmp_path / "whole.jsonl")
    took, rng, cut = time.time() - began, random.Random(0), tmp_path / "cut.jsonl"
    kills = 0
    for _ in range(60):
        child = os.fork()
        if not child:
            make_labels(tiny, tiny, TOKENIZER, problems, options, cut)
            os._exit(0)
        time.sleep(rng.random() * took / 12 if kills < 10 else 0)
        if kills < 10:
            os.kill(child, signal.SIGKILL)
        killed = os.waitpid(child, 0)[1] == signal.SIGKILL
        kills += killed
        if not killed:
            break
    assert kills >= 10 and cut.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and len(read_labels(str(cut))) == 80
    assert not any(tmp_path.glob("*.parts"))


@pytest.mark.parametrize("kept", [0, 1, 0.3, 0.5, -1])
def test_a_label_file_that_was_cut_off_is_completed(kept, tiny, tmp_path):
    problems, whole, cut = toy_problems("train", 6), tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    for file in (whole, cut):
        make_labels(tiny, tiny, TOKENIZER, problems, OPTIONS, file)
    lines = whole.read_bytes()
    cut.write_bytes(lines[: kept if isinstance(kept, int) else int(kept * len(lines))])
    make_labels(tiny, tiny, TOKENIZER, problems, OPTIONS, cut)
    assert cut.read_bytes() == lines and lines.count(b"\n") == 12


def test_a_call_that_is_killed_while_it_collects_the_rows_loses_none(tmp_path, monkeypatch):
    make, path, write = lambda block: [{"index": i} for i in block], tmp_path / "a.jsonl", prm.write

    def full(to, text):
        if to == path:
            raise OSError("the disk is full")
        write(to, text)

    monkeypatch.setattr(prm, "write", full)
    with pytest.raises(OSError):
        prm.in_blocks(path, "rows", {}, 100, 1, make)
    monkeypatch.setattr(prm, "write", write)
    prm.in_blocks(path, "rows", {}, 100, 1, lambda block: pytest.fail("all rows were there"), size=7)
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [*range(100)]
    path.unlink()
    prm.in_blocks(path, "rows", {"other": 1}, 3, 1, make)  # what was removed may be made with other settings
    assert len(path.read_text().splitlines()) == 3


def test_labels_of_other_settings_are_refused_with_the_difference(tiny, tmp_path):
    file = tmp_path / "l.jsonl"
    make_labels(tiny, tiny, TOKENIZER, toy_problems("train", 2), OPTIONS, file)
    other = LabelOptions(**{**vars(OPTIONS), "completions": 5})
    with pytest.raises(UserError, match="completions 3 -> 5"):
        make_labels(tiny, tiny, TOKENIZER, toy_problems("train", 2), other, file)
    with pytest.raises(UserError, match="model a -> b"):
        for name in "ab":
            where = dict(path=tmp_path / "m.jsonl", made_by={"model": name})
            make_labels(tiny, tiny, TOKENIZER, toy_problems("train", 2), OPTIONS, **where)
    more_slots = LabelOptions(**{**vars(OPTIONS), "slots": 3})
    make_labels(tiny, tiny, TOKENIZER, toy_problems("train", 2), more_slots, file)  # which change nothing
    (tmp_path / "mine.jsonl").write_text("precious\n")
    with pytest.raises(UserError, match="not one of our labels"):
        make_labels(tiny, tiny, TOKENIZER, toy_problems("train", 2), OPTIONS, tmp_path / "mine.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == "precious\n"


def other_tokenizer():
    """Reads the embedded world as well, with other ids, and an operation and its operand as one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pairs = [op + digit for op in "+-*" for digit in "23456789"]
    tokens = ["<unk>", "<pad>", "<eos>", "####", *"=\ngfedcb9876543210+-*", *pairs]
    tok = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(r"####|[-+*]\d|[\s\S]"), behavior="isolated")
    tok.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def test_a_completer_with_another_tokenizer_reads_the_prefixes_as_text(scripted, tmp_path):
    other = other_tokenizer()
    scripted.solutions = [(script("b41+5=46\n####46") + [1], False), (script("b41+5=46\nc46+2=48\n####4") + [1], True)]
    play = prm.rollout

    def translated(model, prompts, n, **more):
        if model == "completer":  # which the script reads and writes in the policy's tokens
            found = play(model, [script(other.decode(p)) for p in prompts], n, **more)
            return [[Sample(s.prompt, other.encode(TOKENIZER.decode(s.ids[:-1])) + [2], False) for s in x] for x in found]
        return play(model, prompts, n, **more)

    prm.rollout = translated
    try:
        problem = Problem("41b+5=", "46")
        make_labels("policy", "completer", TOKENIZER, [problem], OPTIONS, tmp_path / "l.jsonl", completer_tokenizer=other)
    finally:
        prm.rollout = play
    a, b = read_labels(str(tmp_path / "l.jsonl"))
    assert a["labels"] == [2 / 3, 1.0] and b["labels"] == [2 / 3, 2 / 3]
    assert scripted.calls[1][2] == [40 - 8, 40 - 16]  # an operation is one token there


def test_targets_of_the_prm_and_of_the_orm():
    row = {"labels": [0.25, 0.0, 1.0], "correct": True}
    batch = Batch([[1], [1]], [[0] * 9, [0] * 4], torch.tensor([False, True]))
    unknown = {"labels": [1.0], "correct": None}  # a solution that others labelled, and left unfinished
    assert targets([row, unknown], batch, [[2, 5, 8], [3]], "prm") == [[(2, 0.25), (5, 0.0), (8, 1.0)], [(3, 1.0)]]
    assert targets([row, unknown], batch, [[2, 5, 8], [3]], "orm") == [[(8, 1.0)], []]


def test_labels_by_others_are_read_and_their_faults_left_out(tmp_path, capsys):
    def read(*rows) -> list[tuple]:  # question, steps, labels, correct, truncated
        file = tmp_path / "x.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [(r["question"], prm.steps_of(r), r["labels"], r["correct"], r["truncated"]) for r in read_labels(str(file))]

    shepherd = {"input": "How many + -? Step 1: It is 2-1. ки\nStep 2: So +1. ки\nStep 3: The answer is: 1 ки",
                "label": "How many + -? Step 1: It is 2-1. +\nStep 2: So +1. -\nStep 3: The answer is: 1 -"}  # fmt: skip
    steps = ["Step 1: It is 2-1.\n", "Step 2: So +1.\n", "Step 3: The answer is: 1"]
    marked = {"input": "Ann ки has? Step 1: One. ки", "label": "Ann + has? Step 1: One. -"}  # a mark within the question
    no_steps = {"input": "Ann has?", "label": "Ann has?"}
    assert read(shepherd, marked, no_steps) == [
        ("How many + -?", steps, [1.0, 0.0, 0.0], False, False), ("Ann  has?", ["Step 1: One."], [0.0], False, False)
    ]  # fmt: skip
    assert "1 of 3 rows hold no usable steps" in capsys.readouterr().out

    trl = {"prompt": "1+1?", "completions": ["It is 2.", "The answer is 2."], "labels": [True, True]}
    assert read(trl, {**trl, "completions": [], "labels": []}) == [
        ("1+1?", ["It is 2.\n", "The answer is 2."], [1.0, 1.0], True, False)]  # fmt: skip

    rated = lambda text, rating: {"text": text, "rating": rating, "flagged": None}
    step = lambda chosen, *completions, human=None: dict(completions=[*completions], chosen_completion=chosen,
                                                         human_completion=human)  # fmt: skip
    first = step(1, rated("bad", -1), rated("neutral", 0))
    prm800k = lambda reason, *steps: {"question": {"problem": "q", "ground_truth_answer": "1"},
                                      "label": {"steps": [*steps], "finish_reason": reason}}  # fmt: skip
    solved = prm800k("solution", first, step(None, human={"text": "by hand"}), step(0, rated("# Answer\n\n1", 1)))
    found = read(solved)
    assert found[0][1:] == (["bad"], [0.0], None, True)  # a branch, whose only new step is its last
    assert found[1][1:] == (["neutral\n", "by hand\n", "# Answer\n\n1"], [1.0, 1.0, 1.0], True, False)
    failed = prm800k("found_error", first, step(None, rated("wrong", -1), rated("unrated", None)))
    found = read(failed, {**solved, "is_quality_control_question": True})
    # a branch keeps its prefix in the text, and labels its last step alone
    assert [x[2] for x in found] == [[0.0], [0.0], [1.0]]
    assert [x[1] for x in found] == [["bad"], ["neutral\nwrong"], ["neutral"]]
    for row in ({"question": "1"}, {"question": "q", "label": 3}, {"input": 5, "label": "x"}, {**trl, "labels": ["y"]}, [1],
                {**trl, "labels": [1, 7]}, {**trl, "prompt": [{"role": "user"}]}):  # fmt: skip
        with pytest.raises(UserError, match="line 1: not a row of step labels"):
            read(row)


def labelled(n: int) -> list[dict]:
    """Solutions of the embedded world, every other one with a wrong operation in it, labelled by the oracle."""
    rng, rows = random.Random(0), []
    for i, p in enumerate(toy_problems("train", n)):
        text = toy_solution(p.question, rng)
        if i % 2:
            text = text.replace("b", "c", 1)  # the first line names the wrong step
        ids = script(text) + [1]
        labels = [float(x) for x in oracle(p.question, text)]
        ends = [t for t, x in enumerate(ids) if x in (script("\n")[0], 1)]
        rows.append(dict(question=p.question, answer=p.answer, response=text, truncated=False, cuts=split_steps(text, "\n"),
                         labels=labels, correct=bool(labels[-1])))  # fmt: skip
        assert prm.read_own(TOKENIZER, rows[-1:], "{question}")[1] == [ends]
    return rows


@pytest.mark.parametrize("kind", ["prm", "orm"])
def test_a_reward_model_learns_what_can_be_learnt_and_scores_unseen_questions(kind):
    rows = labelled(300)
    options = TrainOptions(kind=kind, epochs=4, lr=3e-3, head_lr=1e-2, batch_size=16)
    model = ScalarModel(toy_model(TOKENIZER, seed=0, hidden=32, layers=2, heads=2))
    prm.train_reward_model(model, TOKENIZER, rows, options, prompt="{question}")
    result = prm.evaluate_reward_model(model, lambda rows: prm.read_own(TOKENIZER, rows, "{question}"), rows, kind)
    assert result["auroc"] > 0.95 and result["accuracy"] > 0.9 and result["ece"] < 0.2
    held = [r for r in rows if prm.held_out(r["question"])]
    assert 10 < len(held) < 60 and result["count"] == sum(len(r["cuts"]) if kind == "prm" else 1 for r in held)
    if kind == "prm":
        assert result["auroc_oracle"] == pytest.approx(result["auroc"])  # the labels here are the oracle's


def test_the_training_gradient_does_not_depend_on_the_token_budget():
    rows, weights = labelled(40), []
    for budget in (1, 200, 100_000):
        model = ScalarModel(toy_model(TOKENIZER, seed=0, hidden=16, layers=1, heads=2))
        options = TrainOptions(epochs=1, lr=1e-2, head_lr=1e-2, batch_size=8)
        prm.train_reward_model(model, TOKENIZER, rows, options, prompt="{question}", token_budget=budget)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(weights[0], weights[1], atol=1e-4) and torch.allclose(weights[0], weights[2], atol=1e-4)


def test_nothing_to_train_on_is_one_sentence(tiny):
    rows = [dict(r, cuts=[], labels=[], truncated=True) for r in labelled(4)]
    with pytest.raises(UserError, match="none of the . labelled solutions has a complete step"):
        prm.train_reward_model(ScalarModel(tiny), TOKENIZER, rows, TrainOptions(), prompt="{question}")


def test_step_scores_are_the_heads_sigmoid_at_each_steps_last_token(tiny):
    model = ScalarModel(tiny)
    torch.nn.init.normal_(model.head.weight)
    prompts, responses = [[5, 6], [7]], [[8, 9, 10, 11], [12, 13, 14]]
    batch = Batch(prompts, responses, torch.tensor([False, False]))
    ends, mask = pad_steps([[1, 3], [2]])
    assert ends.tolist() == [[1, 3], [2, 0]] and mask.tolist() == [[True, True], [True, False]]
    scores = prm.score_steps(model, batch, ends, [[1, 0]], "cpu")
    for i, places in enumerate(([1, 3], [2])):
        ids = torch.tensor([prompts[i] + responses[i]])
        stock = toy_model(TOKENIZER, seed=0, hidden=16, layers=1, heads=2)
        stock.set_attn_implementation("eager")
        hidden = stock.model(input_ids=ids).last_hidden_state[0]
        for k, t in enumerate(places):
            expected = torch.sigmoid(model.head(hidden[len(prompts[i]) + t]))
            assert scores[i, k].item() == pytest.approx(expected.item(), abs=1e-5)
    outcomes = prm.score_outcomes(model, batch, [[0], [1]], "cpu")
    assert outcomes.tolist() == pytest.approx([scores[0, 1].item(), scores[1, 0].item()], abs=1e-6)


def test_no_steps_at_all_are_an_empty_matrix():
    ends, mask = pad_steps([[], []])
    assert ends.shape == mask.shape == (2, 0)


def test_auroc_and_quality_by_hand():
    assert auroc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0.0, 0.0, 1.0, 1.0])) == 0.75
    assert auroc(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0])) == 0.5  # a tie counts half
    assert torch.tensor(auroc(torch.tensor([0.5, 0.6]), torch.tensor([1.0, 1.0]))).isnan()  # one class only
    result = quality(torch.tensor([0.95, 0.95, 0.05, 0.15]), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert result["accuracy"] == 0.75 and result["positive"] == 0.25 and result["count"] == 4
    assert result["ece"] == pytest.approx(0.5 * 0.45 + 0.25 * 0.05 + 0.25 * 0.15)
    assert result["brier"] == pytest.approx((0.05**2 + 0.95**2 + 0.05**2 + 0.15**2) / 4)


def test_the_stages_run_one_by_one_from_the_command_line(tmp_path, tiny, monkeypatch, capsys):
    folder, labels, out = tmp_path / "m", tmp_path / "labels.jsonl", tmp_path / "prm"
    tiny.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["prm.py", *map(str, argv)])
        run_script(prm.main)
        return capsys.readouterr().out

    shared = ("--prompt", "{question}")
    call("label", "--model", folder, "--data", "toy", "--problems", 30, "--completions", 2, "--max-new-tokens", 30,
         "--out", labels, *shared)  # fmt: skip
    assert len(read_labels(str(labels))) == 30
    trained = call("train", "--model", folder, "--labels-file", labels, "--out", out, "--kind", "prm", *shared)
    tested = call("test", "--model", out, "--labels-file", labels, *shared)
    assert "brier" in trained and trained.splitlines()[-1] == tested.splitlines()[-1]
    halves = call("test", "--model", out, "--labels-file", labels, "--dtype", "bfloat16", *shared)
    dist.destroy_process_group()  # that of one process, which `shard` made
    gpus.cache_clear()
    assert "brier" in halves
    for argv, words in (
        (("train", "--model", folder, "--out", out), "needs --labels-file"),
        (("test", "--model", folder, "--labels-file", labels), "neither a reward model"),
        (("train", "--model", folder, "--labels-file", tmp_path / "none", "--out", out), "no such file"),
        (("label", "--model", folder, "--data", "toy", "--out", labels, "--kindd", "prm"), "unrecognized"),
    ):
        monkeypatch.setattr(sys, "argv", ["prm.py", *map(str, argv)])
        with pytest.raises(SystemExit) as stop:
            run_script(prm.main)
        assert stop.value.code == 2 and words in capsys.readouterr().err
