"""Monte-Carlo labels, reward model training, scoring and its quality measures."""

import json
import sys

import pytest
import torch

import prm
from data import Problem, UserError, oracle, run_script, toy_problems, toy_solution, toy_tokenizer
from model import ScalarModel, toy_model
from prm import LabelOptions, TrainOptions, auroc, make_labels, pad_steps, quality, read_labels, targets
from rollout import Batch, Sample

TOKENIZER = toy_tokenizer()
OPTIONS = LabelOptions(problems=6, samples=2, completions=3, prompt="{question}", max_new_tokens=40, seed=1)


def script(text: str) -> list[int]:
    return TOKENIZER.encode(text)


@pytest.fixture
def tiny():
    return toy_model(TOKENIZER, seed=0, hidden=16, layers=1, heads=2)


@pytest.fixture
def scripted(monkeypatch):
    """A sampler that plays back: solutions from a list, completions right with a known pattern."""
    calls = []

    def play(model, prompts, n, *, max_new_tokens, **_):
        calls.append((model, prompts, max_new_tokens))
        if model == "policy":
            return [[Sample(i, ids, truncated) for ids, truncated in play.solutions] for i in range(len(prompts))]
        out = []
        for i, prompt in enumerate(prompts):
            wrong_so_far = "=99" in TOKENIZER.decode(prompt)
            tails = ["####00", "####46", "####46"] if not wrong_so_far else ["####00", "####01", "####02"]
            out.append([Sample(i, script(tail) + [1], False) for tail in tails[:n]])
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
    a, b = read_labels(tmp_path / "l.jsonl")
    assert a["ends"] == [8, 12] and a["labels"] == [2 / 3, 1.0] and a["correct"]
    assert b["labels"] == [0.0, 0.0] and not b["correct"]
    prefixes = [TOKENIZER.decode(p) for p in scripted.calls[1][1]]
    assert prefixes == ["41b+5=b41+5=46\n", "41b+5=b41+5=99\n"]  # p(k): the question and all steps up to k
    assert scripted.calls[1][2] == [40 - 9, 40 - 9]  # what the step leaves of the limit


def test_a_truncated_solution_is_wrong_and_its_unfinished_step_has_no_label(scripted, tmp_path):
    scripted.solutions = [(script("b41+5=46\nb41+5=46\n####4"), True), (script("####46") + [1], False)]
    make_labels("policy", "completer", TOKENIZER, [Problem("41b+5=", "46")], OPTIONS, tmp_path / "l.jsonl")
    a, b = read_labels(tmp_path / "l.jsonl")
    assert not a["correct"] and a["ends"] == [8, 17] and a["labels"] == [2 / 3, 2 / 3]
    assert b["labels"] == [1.0]


def test_a_killed_labelling_continues_to_the_same_file(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(prm, "CHUNK", 2)
    problems = toy_problems("train", 6)
    make_labels(tiny, tiny, TOKENIZER, problems, OPTIONS, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert whole.count(b"\n") == 12
    for kept in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        cut = tmp_path / f"cut{kept}.jsonl"
        make_labels(tiny, tiny, TOKENIZER, problems, OPTIONS, cut)
        cut.write_bytes(whole[:kept])
        make_labels(tiny, tiny, TOKENIZER, problems, OPTIONS, cut)
        assert cut.read_bytes() == whole


def test_labels_of_other_settings_are_refused_with_the_difference(tiny, tmp_path):
    file = tmp_path / "l.jsonl"
    make_labels(tiny, tiny, TOKENIZER, toy_problems("train", 2), OPTIONS, file)
    other = LabelOptions(**{**vars(OPTIONS), "completions": 5})
    with pytest.raises(UserError, match="completions 3 -> 5"):
        make_labels(tiny, tiny, TOKENIZER, toy_problems("train", 2), other, file)
    (tmp_path / "mine.jsonl").write_text("precious\n")
    with pytest.raises(UserError, match="no label file"):
        make_labels(tiny, tiny, TOKENIZER, toy_problems("train", 2), OPTIONS, tmp_path / "mine.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == "precious\n"


def test_targets_of_hard_and_soft_labels_and_of_the_orm():
    row = {"ids": list(range(9)), "ends": [2, 5, 8], "labels": [0.25, 0.0, 1.0], "correct": True}
    assert targets([row], "prm", "hard") == [[(2, 1.0), (5, 0.0), (8, 1.0)]]
    assert targets([row], "prm", "soft") == [[(2, 0.25), (5, 0.0), (8, 1.0)]]
    assert targets([row], "orm", "hard") == [[(8, 1.0)]]


def labelled(n: int) -> list[dict]:
    """Solutions of the embedded world, every other one with a wrong operation in it, labelled by the oracle."""
    import random

    rng, rows = random.Random(0), []
    for i, p in enumerate(toy_problems("train", n)):
        text = toy_solution(p.question, rng)
        if i % 2:
            text = text.replace("b", "c", 1)  # the first line names the wrong step
        ids = script(text) + [1]
        labels = [float(x) for x in oracle(p.question, text)]
        ends = [t for t, x in enumerate(ids) if x in (script("\n")[0], 1)]
        rows.append(dict(question=p.question, answer=p.answer, response=text, ids=ids, truncated=False, ends=ends,
                         labels=labels, correct=bool(labels[-1])))  # fmt: skip
    return rows


@pytest.mark.parametrize("kind", ["prm", "orm"])
def test_a_reward_model_learns_what_can_be_learnt_and_scores_unseen_questions(kind):
    rows = labelled(300)
    options = TrainOptions(kind=kind, epochs=4, lr=3e-3, head_lr=1e-2, batch_size=16)
    model = ScalarModel(toy_model(TOKENIZER, seed=0, hidden=32, layers=2, heads=2))
    prm.train_reward_model(model, TOKENIZER, rows, options, prompt="{question}")
    result = prm.evaluate_reward_model(model, TOKENIZER, rows, options, prompt="{question}")
    assert result["auroc"] > 0.95 and result["accuracy"] > 0.9 and result["ece"] < 0.2
    held = [r for r in rows if prm.held_out(r["question"])]
    assert 10 < len(held) < 60 and result["count"] == sum(len(r["ends"]) if kind == "prm" else 1 for r in held)
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
    rows = [dict(r, ends=[], labels=[], truncated=True) for r in labelled(4)]
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
    assert len(read_labels(labels)) == 30
    trained = call("train", "--model", folder, "--labels-file", labels, "--out", out, "--kind", "prm", *shared)
    tested = call("test", "--model", out, "--labels-file", labels, *shared)
    assert "brier" in trained and trained.splitlines()[-1] == tested.splitlines()[-1]
    for argv, words in (
        (("train", "--model", folder, "--out", out), "needs --labels-file"),
        (("test", "--model", folder, "--labels-file", labels), "not a reward model"),
        (("train", "--model", folder, "--labels-file", tmp_path / "none", "--out", out), "no such label file"),
        (("label", "--model", folder, "--data", "toy", "--out", labels, "--kindd", "prm"), "unrecognized"),
    ):
        monkeypatch.setattr(sys, "argv", ["prm.py", *map(str, argv)])
        with pytest.raises(SystemExit) as stop:
            run_script(prm.main)
        assert stop.value.code == 2 and words in capsys.readouterr().err


def test_a_file_that_holds_no_labels_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"question": "1"}) + "\n")
    with pytest.raises(UserError, match="not a label file"):
        read_labels(tmp_path / "x.jsonl")
