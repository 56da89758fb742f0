"""Labels, their files, reward model training, scores and their quality."""

import json
import math
import os
import random
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import prm
from data import (
    Problem, UserError, oracle, run_script, split_steps, steps_of, toy_problems, toy_solution, toy_tokenizer,
)
from model import ScalarModel, load_causal_lm, toy_model
from prm import (
    Prefix, Reader, Reading, RewardModelOptions, auroc, pad_scores, read_labels, read_own,
)
from rollout import Sample

TOKENIZER = toy_tokenizer()
PROBLEM = Problem("41b+5=", "46")
CPU = torch.device("cpu")


def options(**more) -> RewardModelOptions:
    defaults = dict(label_samples=2, completions=3, labels="soft", prompt="{question}", max_new_tokens=40, seed=1)
    return RewardModelOptions(**{**defaults, **more})


def script(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def finished(text: str) -> tuple[list[int], bool]:
    return script(text) + [1], False


def save(lm, path) -> str:
    lm.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path)


@pytest.fixture
def tiny():
    return toy_model(TOKENIZER, seed=0, hidden=16, layers=1, heads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """That of an untrained policy."""
    return save(toy_model(TOKENIZER, seed=0, hidden=16, layers=1, heads=2), tmp_path_factory.mktemp("policy"))


# ------------------------------------------------------------------------------------------------ labels


@pytest.fixture
def scripted(monkeypatch):
    """Labels by a sampler that plays back: solutions from a list; completions wrong, right, right, and of a prefix with
    =99 in it all wrong. Its calls are kept."""
    policy, completer = (SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=256)))
                         for _ in range(2))
    calls = []

    def play(model, prompts, n, *, max_new_tokens, seeds, decided=None, **_):
        calls.append(SimpleNamespace(prompts=prompts, limits=max_new_tokens, seeds=seeds))
        if model is policy:
            return [[Sample(i, ids, truncated) for ids, truncated in label.solutions] for i in range(len(prompts))]
        out = []
        for i, prompt in enumerate(prompts):
            wrong = "=99" in label.reads.decode(prompt)
            tails = ["####00", "####01", "####02"] if wrong else ["####00", "####46", "####46"]
            samples, count = [Sample(i, label.reads.encode(tail), False) for tail in tails], 1 if decided else n
            while count < n and not decided(i, samples[:count]):
                count = min(2 * count, n)
            out.append(samples[:count])
        return out

    def label(*solutions, other_tokenizer=None, **more) -> list[dict]:
        label.solutions, label.reads = solutions, other_tokenizer or TOKENIZER
        opts = options(label_samples=len(solutions), **more)
        return prm.label_solutions(policy, completer, TOKENIZER, label.reads, [PROBLEM], [0], opts)

    monkeypatch.setattr(prm, "rollout", play)
    monkeypatch.setattr(prm, "eos_ids", lambda *_: [1])
    label.calls, label.completer = calls, completer
    return label


def test_labels_are_the_share_of_right_completions_and_the_last_step_is_graded_itself(scripted):
    a, b = scripted(finished("b41+5=46\n####46"), finished("b41+5=99\n####99"))
    assert a["char_ends"] == [9, 15] and a["labels"] == [2 / 3, 1.0] and a["correct"]
    assert b["labels"] == [0.0, 0.0] and not b["correct"]
    prefixes = [TOKENIZER.decode(ids) for ids in scripted.calls[1].prompts]
    assert prefixes == ["41b+5=b41+5=46\n", "41b+5=b41+5=99\n"]  # p(k): the question and all steps up to k


def test_a_truncated_solution_is_wrong_and_its_unfinished_step_has_no_label(scripted):
    a, b = scripted((script("b41+5=46\nb41+5=46\n####4"), True), finished("####46"))
    assert not a["correct"] and a["char_ends"] == [9, 18] and a["labels"] == [2 / 3, 2 / 3]
    assert b["labels"] == [1.0]


def test_hard_labels_stop_at_the_first_right_completion(scripted, monkeypatch):
    graded = []
    monkeypatch.setattr(prm, "grade", lambda gold, text: graded.append(text) or text.endswith("####46"))
    a, b = scripted(finished("b41+5=46\n####46"), finished("b41+5=99\n####99"), labels="hard")
    assert a["labels"] == [1.0, 1.0] and b["labels"] == [0.0, 0.0]
    assert [text.startswith("b41+5=46") for text in graded] == 2 * [True] + 3 * [False]  # wrong, right; three wrong


def test_a_completion_is_graded_behind_its_prefix_and_a_truncated_one_is_wrong(scripted, monkeypatch):
    samples = [Sample(0, script(tail), cut) for tail, cut in (("", False), ("####46", True), ("####47", False))]
    monkeypatch.setattr(prm, "rollout", lambda *_, **__: [samples])
    prefix = Prefix(tuple(script("####46\n")), "####46\n", "46")
    assert prm.complete(scripted.completer, TOKENIZER, [prefix], options()) == {prefix: [True, False, False]}


def test_a_completion_has_room_of_its_own_within_the_models_positions(scripted):
    scripted.completer.model.config.max_position_embeddings = 50
    long = "b41+5=46\n" * 4 + "####46"
    a, b = scripted(finished("b41+5=46\n####46"), finished(long))
    assert scripted.calls[1].limits == [35, 26, 17, 8]  # 50 less 6 for the prompt, and 9 for each step
    scripted.completer.model.config.max_position_embeddings = 33
    a, b = scripted(finished("b41+5=46\n####46"), finished(long))
    assert scripted.calls[3].limits == [18, 9]
    assert b["labels"] == [2 / 3, 2 / 3, 0.0, 0.0, 1.0]  # no room behind the third


def test_the_seeds_of_completions_come_from_their_prefix_alone(scripted):
    a, b = (Prefix(tuple(script(text)), text, "46") for text in ("b41+5=46\n", "b41+5=47\n"))
    scripted.reads = TOKENIZER
    for prefixes in ([a, b], [b]):
        prm.complete(scripted.completer, TOKENIZER, prefixes, options())
    (first, second), (alone,) = (call.seeds for call in scripted.calls)
    assert second == alone != first


def test_equal_prefixes_are_completed_once(scripted):
    right = finished("b41+5=46\n####46")
    rows = scripted(right, right, finished("b41+5=46\n####47"))
    assert len(scripted.calls[1].prompts) == 1
    assert [row["labels"] for row in rows] == [[2 / 3, 1.0], [2 / 3, 1.0], [2 / 3, 0.0]]


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


def test_a_completer_with_another_tokenizer_reads_the_prefixes_as_text(scripted):
    other = other_tokenizer()
    unfinished = script("b41+5=46\nc46+2=48\n####4"), True
    a, b = scripted(finished("b41+5=46\n####46"), unfinished, other_tokenizer=other)
    assert a["labels"] == [2 / 3, 1.0] and b["labels"] == [2 / 3, 2 / 3]
    assert scripted.calls[1].prompts == [other.encode("41b+5=b41+5=46\n"), other.encode("41b+5=b41+5=46\nc46+2=48\n")]


def demonstrate(monkeypatch, problems: list[Problem], tokenizer=TOKENIZER, **more) -> list[dict]:
    """Rows labelled by the oracle, of demonstrations of which some have a wrong line and some end too early."""

    def solution(question: str, j: int) -> Sample:
        text, kind = toy_solution(question, random.Random(f"{question} {j}"), 0.3), random.Random(question).random()
        ids = tokenizer.encode(text if kind < 0.5 else text.replace("=", "=9", 1))
        return Sample(0, ids[:20], True) if kind > 0.8 else Sample(0, [*ids, 1], False)

    def play(model, prompts, n, **_):
        assert model == policy  # a completer must not be asked
        return [[solution(tokenizer.decode(prompt), j) for j in range(n)] for prompt in prompts]

    policy = SimpleNamespace(model=None)
    monkeypatch.setattr(prm, "rollout", play)
    monkeypatch.setattr(prm, "eos_ids", lambda *_: [1])
    opts = options(labels="oracle", max_new_tokens=128, **more)
    return prm.label_solutions(policy, None, tokenizer, tokenizer, problems, range(len(problems)), opts)


@pytest.mark.parametrize("world", ["toy", "sums"])
def test_exact_labels_are_the_oracles_and_cost_no_completions(world, monkeypatch):
    rows = demonstrate(monkeypatch, toy_problems("train", 150, world=world), toy_tokenizer(world))
    assert [row["index"] for row in rows] == [i // 2 for i in range(300)]
    assert 20 < sum(row["truncated"] for row in rows) < 150
    for row in rows:
        exact = oracle(row["question"], row["response"])
        assert row["labels"] == exact[: len(row["char_ends"])]
        assert len(exact) - len(row["char_ends"]) in (0, row["truncated"])
        assert row["correct"] != row["truncated"]  # the answers are right, whatever the lines
    labels = [y for row in rows for y in row["labels"]]
    assert 0.2 < sum(labels) / len(labels) < 0.9


def test_a_share_of_the_labels_is_turned_around_the_same_ones_each_time(monkeypatch):
    def labelled(**more) -> list[float]:
        rows = demonstrate(monkeypatch, toy_problems("train", 150), **more)
        return [y for row in rows for y in row["labels"]]

    labels = labelled()
    turned = {flip: [x != y for x, y in zip(labels, labelled(flip_labels=flip))] for flip in (0.1, 0.3, 1.0)}
    assert len(labels) > 1000 and all(turned[1.0]) and set(labels) == {0.0, 1.0}
    for flip in (0.1, 0.3):
        for kind in (0.0, 1.0):  # good and bad ones alike
            found = [t for t, y in zip(turned[flip], labels) if y == kind]
            assert sum(found) / len(found) == pytest.approx(flip, abs=4 * (flip * (1 - flip) / len(found)) ** 0.5)
    assert all(more or not less for less, more in zip(turned[0.1], turned[0.3]))  # more noise turns more of the same
    assert labelled(flip_labels=0.3) == labelled(flip_labels=0.3) != labelled(flip_labels=0.3, seed=2)


def test_soft_labels_are_turned_around_to_what_is_left_to_1(scripted):
    (row,) = scripted(finished("b41+5=46\n####46"), flip_labels=1.0)
    assert row["labels"] == pytest.approx([1 / 3, 0.0]) and row["correct"]


# ------------------------------------------------------------------------------------------------ their files


def make_labels(folder, path, problems=None, completer="", **more) -> list[dict]:
    problems = problems or toy_problems("train", 6)
    prm.make_labels(folder, completer or folder, problems, options(**more), path, CPU)
    return read_labels(str(path))


def test_a_label_file_that_was_cut_off_anywhere_is_completed_to_the_same(folder, tmp_path):
    path = tmp_path / "labels.jsonl"
    make_labels(folder, path, slots=4)
    whole = path.read_bytes()
    assert whole.count(b"\n") == 12
    for kept in (0, 1, 0.3, 0.7, -1):
        path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
        make_labels(folder, path, slots=4)
        assert path.read_bytes() == whole


def test_labels_of_other_settings_and_files_of_others_are_refused(folder, tmp_path):
    path, mine = tmp_path / "labels.jsonl", tmp_path / "mine.jsonl"
    whole = make_labels(folder, path, slots=3)
    assert make_labels(folder, path, slots=4) == whole  # which changes nothing
    with pytest.raises(UserError, match="other settings .completions 3 -> 5"):
        make_labels(folder, path, completions=5)
    with pytest.raises(UserError, match="other settings .model "):
        make_labels(save(toy_model(TOKENIZER, seed=1, hidden=16, layers=1, heads=2), tmp_path / "other"), path)
    mine.write_text("precious\n")
    with pytest.raises(UserError, match="not one of our labels"):
        make_labels(folder, mine)
    assert mine.read_text() == "precious\n"
    path.unlink()
    make_labels(folder, path, completions=5)  # what was removed may be made anew


def test_exact_labels_are_refused_where_nobody_knows_them(folder, tmp_path):
    with pytest.raises(UserError, match="--labels oracle: only of the embedded worlds"):
        make_labels(folder, tmp_path / "l", [*toy_problems("train", 3), Problem("What is 1+1?", "2")], labels="oracle")
    assert not [*tmp_path.iterdir()]


def test_a_completer_without_room_for_prompt_and_answer_is_refused(folder, tmp_path):
    lm = toy_model(TOKENIZER, seed=0, hidden=16, layers=1, heads=2)
    lm.config.max_position_embeddings = 30
    with pytest.raises(UserError, match="has 30 positions; lower --max-new-tokens"):
        make_labels(folder, tmp_path / "l", completer=save(lm, tmp_path / "short"))


def squares(indices: list[int]) -> list[dict]:
    return [{"index": i, "row": j, "square": i * i} for i in indices for j in range(2)]


def test_a_file_whose_maker_was_killed_at_random_is_that_of_one_that_was_not(tmp_path):
    def slow(indices):
        time.sleep(0.01)
        return squares(indices)

    whole, cut, rng, kills = tmp_path / "whole", tmp_path / "cut", random.Random(0), 0
    prm.in_blocks(whole, "squares", {}, 100, 2, 1, squares)
    assert [json.loads(line) for line in whole.read_text().splitlines()] == squares(range(100))
    for _ in range(60):
        child = os.fork()
        if not child:
            prm.in_blocks(cut, "squares", {}, 100, 2, 1, slow)
            os._exit(0)
        if kills < 10:
            time.sleep(0.05 * rng.random())
            os.kill(child, signal.SIGKILL)
        killed = os.waitpid(child, 0)[1] == signal.SIGKILL
        kills += killed
        if not killed:
            break
    assert kills >= 10 and cut.read_bytes() == whole.read_bytes()


def test_the_ranks_make_a_block_of_four_rows_a_slot_together(tmp_path, monkeypatch):
    asked, block = [], []
    monkeypatch.setattr(prm, "world_size", lambda: 3)
    monkeypatch.setattr(prm, "gather", lambda rows: [row for r in (0, 1, 2) for row in squares([*block[-1]][r::3])])

    def make(indices):
        asked.append(indices)
        block.append(range(indices[0], min(indices[0] + 48, 50)))

    prm.in_blocks(tmp_path / "a", "squares", {}, 50, 2, 8, make)
    assert asked == [[*range(0, 48, 3)], [48]]  # of 4 * 8 * 3 rows, two of each index
    assert [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()] == squares(range(50))


def test_what_is_cached_is_made_once_and_what_was_stopped_goes_on(tmp_path, capsys):
    made = []

    def make(folder, fail=False):
        made.append([path.name for path in folder.glob("part*")])
        (folder / f"part{len(made)}").touch()
        if fail:
            raise UserError("stopped")

    call = lambda key, **more: prm.cached(tmp_path, "stage", "a stage", key, lambda folder: make(folder, **more))
    with pytest.raises(UserError, match="stopped"):
        call({"a": 1, "b": 2}, fail=True)
    folder = call({"b": 2, "a": 1})
    assert made == [[], ["part1"]] and call({"a": 1, "b": 2}) == folder and len(made) == 2
    assert call({"a": 1, "b": 3}) != folder and len(made) == 3
    assert f"a stage: cached in {folder}" in capsys.readouterr().out


def test_a_new_model_in_the_same_folder_has_another_key(folder, tmp_path):
    assert prm.model_key("a/hub-name") == "a/hub-name" and prm.model_key(folder) == prm.model_key(folder)
    copy = save(load_causal_lm(folder), tmp_path / "copy")
    before = prm.model_key(copy)
    os.utime(tmp_path / "copy" / "model.safetensors", ns=(1, 1))
    assert before.startswith(copy) and prm.model_key(copy) != before


# ------------------------------------------------------------------------------------------------ labels of others


@pytest.fixture
def read(tmp_path):
    """What is read from a file of these rows: question, steps, labels, correct, truncated."""

    def read(*rows) -> list[tuple]:
        file = tmp_path / "x.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [(r["question"], steps_of(r), r["labels"], r["correct"], r["truncated"]) for r in read_labels(str(file))]

    return read


TRL = {"prompt": "1+1?", "completions": ["It is 2.", "The answer is 2."], "labels": [True, True]}


def test_labels_of_math_shepherd(read, capsys):
    shepherd = {"input": "How many + -? Step 1: It is 2-1. ки\nStep 2: So +1. ки\nStep 3: The answer is: 1 ки",
                "label": "How many + -? Step 1: It is 2-1. +\nStep 2: So +1. -\nStep 3: The answer is: 1 -"}
    steps = ["Step 1: It is 2-1.\n", "Step 2: So +1.\n", "Step 3: The answer is: 1"]
    marked = {"input": "Ann ки has? Step 1: One. ки", "label": "Ann + has? Step 1: One. -"}  # in the question, too
    unnumbered = {"input": "Ann has? One. ки\nTwo. ки", "label": "Ann has? One. +\nTwo. -"}
    no_steps = {"input": "Ann has?", "label": "Ann has?"}
    assert read(shepherd, marked, unnumbered, no_steps) == [
        ("How many + -?", steps, [1.0, 0.0, 0.0], False, False),
        ("Ann  has?", ["Step 1: One."], [0.0], False, False),
        ("Ann has?", ["One.\n", "Two."], [1.0, 0.0], False, False),
    ]
    assert "1 rows hold no usable steps" in capsys.readouterr().out


def test_labels_of_trl(read):
    found = read(TRL, {**TRL, "completions": [], "labels": []})
    assert found == [("1+1?", ["It is 2.\n", "The answer is 2."], [1.0, 1.0], True, False)]


def test_labels_of_prm800k_and_their_branches(read):
    rated = lambda text, rating: {"text": text, "rating": rating, "flagged": None}
    step = lambda chosen, *completions, human=None: dict(completions=[*completions], chosen_completion=chosen,
                                                         human_completion=human)
    first = step(1, rated("bad", -1), rated("neutral", 0))
    prm800k = lambda reason, *steps: {"question": {"problem": "q", "ground_truth_answer": "1"},
                                      "label": {"steps": [*steps], "finish_reason": reason}}
    solved = prm800k("solution", first, step(None, human={"text": "by hand"}), step(0, rated("# Answer\n\n1", 1)))
    found = read(solved)
    assert found[0][1:] == (["bad"], [0.0], None, True)  # a branch, whose only new step is its last
    assert found[1][1:] == (["neutral\n", "by hand\n", "# Answer\n\n1"], [1.0, 1.0, 1.0], True, False)
    failed = prm800k("found_error", first, step(None, rated("wrong", -1), rated("unrated", None)))
    found = read(failed, {**solved, "is_quality_control_question": True})
    # a branch keeps its prefix in the text, and labels its last step alone
    assert [(x[1], x[2]) for x in found] == [(["bad"], [0.0]), (["neutral\nwrong"], [0.0]), (["neutral"], [1.0])]


@pytest.mark.parametrize("row", [
    {"question": "1"}, {"question": "q", "label": 3}, {"input": 5, "label": "x"}, {**TRL, "labels": ["y"]}, [1],
    {**TRL, "labels": [1, 7]}, {**TRL, "labels": [1, float("nan")]}, {**TRL, "prompt": [{"role": "user"}]},
])
def test_a_row_of_no_format_is_named(row, read):
    with pytest.raises(UserError, match="line 1: not a row of step labels"):
        read(row)


# ------------------------------------------------------------------------------------------------ training


def labelled(n: int) -> list[dict]:
    """Solutions of the embedded world, every other one with a wrong operation in it, labelled by the oracle."""
    rng, rows = random.Random(0), []
    for i, p in enumerate(toy_problems("train", n)):
        text = toy_solution(p.question, rng)
        if i % 2:
            text = text.replace("b", "c", 1)  # the first line names the wrong step
        labels = [float(x) for x in oracle(p.question, text)]
        rows.append(dict(question=p.question, response=text, truncated=False, char_ends=split_steps(text, "\n"),
                         labels=labels, correct=bool(labels[-1])))
    return rows


def read_toy(rows, kind="prm"):
    return read_own(TOKENIZER, rows, kind, prompt="{question}")


def train(model, rows, **more) -> list[float]:
    """The loss of each step."""
    kind, defaults = more.pop("kind", "prm"), dict(rm_epochs=1, rm_lr=1e-2, rm_head_lr=1e-2, rm_batch_size=8)
    opts = RewardModelOptions(**{"prompt": "{question}", **defaults, **more})
    return prm.train_reward_model(model, TOKENIZER, rows, opts, kind, CPU)


def test_what_a_prm_and_an_orm_are_trained_and_scored_at():
    text = "b41+5=46\n####46"
    row = dict(question="41b+5=", response=text, char_ends=[9, 15], labels=[0.25, 1.0], correct=True, truncated=False)
    cut = {**row, "response": "b41+5=46\n##", "char_ends": [9], "labels": [0.5], "correct": None, "truncated": True}
    (a, b), ids = read_toy([row, cut]), script("41b+5=" + text) + [1]
    assert a.ids == ids and a.prompt_length == 6 and a.positions == [14, len(ids) - 1]  # the newline; EOS
    assert b.ids == script("41b+5=b41+5=46\n##") and b.positions == [14]
    a, b = read_toy([row, {**cut, "response": "", "char_ends": []}], "orm")
    assert a.positions == [len(ids) - 1] and b.positions == [] and b.ids == script("41b+5=")
    assert prm.labelled([row, cut], "prm") == [(row, [0.25, 1.0]), (cut, [0.5])]
    assert prm.labelled([row, cut], "orm") == [(row, [1.0])]  # whether an unfinished one is right, nobody knows


@pytest.mark.parametrize("kind", ["prm", "orm"])
def test_a_reward_model_learns_what_can_be_learnt_and_scores_unseen_questions(kind):
    rows = labelled(300)
    held = [row for row in rows if prm.held_out(row["question"])]
    model = ScalarModel(toy_model(TOKENIZER, seed=0, hidden=32, layers=2, heads=2))
    train(model, [row for row in rows if row not in held], kind=kind, rm_epochs=4, rm_lr=3e-3, rm_batch_size=16)
    found = prm.measure_quality(model, read_toy, held, kind, device=CPU)
    assert found["auroc"] > 0.95 and found["accuracy"] > 0.9
    assert 10 < len(held) < 60 and found["count"] == sum(len(r["char_ends"]) if kind == "prm" else 1 for r in held)
    if kind == "prm":
        assert found["auroc_oracle"] == pytest.approx(found["auroc"])  # the labels here are the oracle's


def test_the_training_does_not_depend_on_the_token_budget():
    rows, weights = labelled(40), []
    for token_budget in (1, 200, 100_000):
        model = ScalarModel(toy_model(TOKENIZER, seed=0, hidden=16, layers=1, heads=2))
        train(model, rows, token_budget=token_budget)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(weights[0], weights[1], atol=1e-4) and torch.allclose(weights[0], weights[2], atol=1e-4)


def test_a_frozen_lm_computes_no_gradients_and_its_head_learns(tiny, monkeypatch):
    model, before, seen = ScalarModel(tiny), {k: p.clone() for k, p in tiny.named_parameters()}, []
    step = prm.optimizer_step

    def spy(model, optimizers, norm):
        grads = [p.grad is None for p in model.lm.parameters()]
        seen.append((all(grads), [len(group["params"]) for group in optimizers[0].param_groups]))
        return step(model, optimizers, norm)

    monkeypatch.setattr(prm, "optimizer_step", spy)
    train(model, labelled(16), rm_lr=0.0)
    assert seen == [(True, [2, 0])] * 2 and all(torch.equal(p, before[k]) for k, p in tiny.named_parameters())
    assert model.head.weight.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:Detected call of")  # of a schedule without an optimizer, which the second part has
def test_a_loss_or_gradients_that_are_not_finite_stop_the_training(tiny, monkeypatch):
    broken = ScalarModel(toy_model(TOKENIZER, seed=0, hidden=16, layers=1, heads=2))
    broken.head.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="training the prm: loss nan, .*lower --rm-lr"):
        train(broken, labelled(16))
    norms = iter([1.0, float("inf"), float("inf"), 1.0, float("inf"), float("nan"), float("inf"), 1.0])
    monkeypatch.setattr(prm, "optimizer_step", lambda *_: next(norms))
    with pytest.raises(UserError, match="gradient inf"):
        train(ScalarModel(tiny), labelled(64))
    assert [*norms] == [1.0]  # the third in a row


def test_nothing_to_train_on_is_one_sentence(tiny):
    rows = [dict(r, char_ends=[], labels=[], truncated=True) for r in labelled(4)]
    with pytest.raises(UserError, match="none of 4 labelled solutions has a complete step"):
        train(ScalarModel(tiny), rows)


@pytest.mark.parametrize("name, value", [("rm_epochs", 0), ("rm_lr", -1e-5), ("rm_lr", float("nan"))])
def test_training_options_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} "):
        RewardModelOptions(**{name: value})


# ------------------------------------------------------------------------------------------------ scores


def test_scores_are_the_heads_sigmoid_at_the_positions(tiny):
    model = ScalarModel(tiny)
    torch.nn.init.normal_(model.head.weight)
    readings = [Reading([5, 6, 8, 9, 10, 11], 2, [3, 5]), Reading([7, 12], 1, []), Reading([7, 12, 13], 1, [2])]
    stock = toy_model(TOKENIZER, seed=0, hidden=16, layers=1, heads=2)
    stock.set_attn_implementation("eager")
    for budget in (1, 100):
        scores = prm.score_at(model, readings, budget, CPU)
        assert [len(s) for s in scores] == [2, 0, 1]
        for reading, found in zip(readings, scores):
            hidden = stock.model(input_ids=torch.tensor([reading.ids])).last_hidden_state[0]
            expected = torch.sigmoid(model.head(hidden[reading.positions])).flatten()
            assert found == pytest.approx(expected.tolist(), abs=1e-5)
    assert prm.score_at(model, [], 100, CPU) == []


def test_a_score_that_is_not_finite_is_an_error(tiny):
    model = ScalarModel(tiny)
    model.head.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="gives 2 scores that are not finite"):
        prm.score_at(model, [Reading([5, 6, 7], 1, [1, 2]), Reading([5, 6], 1, [])], 100, CPU)


def test_padded_scores_and_their_mask():
    scores, step_mask = pad_scores([[0.25, 0.0], [], [0.5]])
    assert scores.tolist() == [[0.25, 0.0], [0.0, 0.0], [0.5, 0.0]] and scores.dtype == torch.float32
    assert step_mask.tolist() == [[True, True], [False, False], [True, False]]
    for empty in ([], [[], []]):
        scores, step_mask = pad_scores(empty)
        assert scores.shape == step_mask.shape == (len(empty), 0)


def test_a_policys_own_tokens_are_read_as_they_are(folder, tmp_path):
    ScalarModel(load_causal_lm(folder)).save(TOKENIZER, tmp_path / "prm")
    ids = [*script("b41+5=46\n####46"), 1]
    row = dict(question="41b+5=", response="b41+5=46\n####46", char_ends=[9, 15], truncated=False)
    row |= dict(ids=[*ids[:-1], 5, 1], token_ends=[8, 14])  # which no tokenizer would make of the text
    for tokenizer, response, ends in ((TOKENIZER, row["ids"], [14, 20]), (None, ids, [14, 6 + len(ids) - 1])):
        (reading,) = Reader(str(tmp_path / "prm"), "own", "{question}", tokenizer)([row])
        assert reading.ids == script("41b+5=") + response and reading.positions == ends
    with pytest.raises(UserError, match="reads 256 tokens, and an answer takes 3[0-9][0-9]: lower --max-new-tokens"):
        Reader(str(tmp_path / "prm"), "own", "{question}")([{**row, "response": "b41+5=46\n" * 40}])


# ------------------------------------------------------------------------------------------------ quality


def test_auroc_by_hand():
    assert auroc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0.0, 0.0, 1.0, 1.0])) == 0.75
    assert auroc(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0])) == 0.5  # a tie counts half
    assert math.isnan(auroc(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.5])))


def test_quality_by_hand(monkeypatch):
    monkeypatch.setattr(prm, "score_at", lambda *_: [[0.95, 0.95], [0.05, 0.15]])
    rows = [dict(question="q", labels=labels) for labels in ([1.0, 0.0], [], [0.0, 0.25])]
    found = prm.measure_quality(None, lambda rows, kind: rows, rows, "prm")
    assert found["auroc"] == pytest.approx(2.5 / 3) and found["accuracy"] == 0.75
    assert found["positive"] == 0.25 and found["count"] == 4
    assert found["brier"] == pytest.approx((0.05**2 + 0.95**2 + 0.05**2 + 0.1**2) / 4)


def test_of_one_class_the_auroc_is_undefined_and_that_is_said(tiny, capsys):
    rows = [row for row in labelled(20) if row["correct"]]
    found = prm.measure_quality(ScalarModel(tiny), read_toy, rows, "prm", device=CPU)
    assert found["brier"] == 0.25 and not found.keys() & {"auroc", "auroc_oracle"}
    assert "auroc undefined (all are of one class), accuracy 0" in capsys.readouterr().out
    assert prm.measure_quality(ScalarModel(tiny), read_toy, [], "prm", device=CPU) == {}
    assert "none are labelled" in capsys.readouterr().out


def test_a_tenth_of_the_questions_is_held_out():
    share = sum(prm.held_out(p.question) for p in toy_problems("train", 2000)) / 2000
    assert abs(share - 0.1) < 4 * (0.09 / 2000) ** 0.5


# ------------------------------------------------------------------------------------------------ the stages


def test_a_reward_model_is_prepared_once(folder, tmp_path, capsys):
    def prepare(**more):
        opts = options(**{"labels": "oracle", "rm_epochs": 1, **more})
        return prm.prepare_reward_model(tmp_path / "cache", folder, folder, toy_problems("train", 30), opts, "prm", CPU)

    first = prepare()
    assert prm.find_format(first) == "own" and capsys.readouterr().out.count(": making ") == 2
    assert prepare() == first and capsys.readouterr().out.count(": cached in ") == 2
    assert prepare(rm_epochs=2) != first and ": cached in " in capsys.readouterr().out  # the labels


@pytest.fixture
def call(monkeypatch, capsys):
    """Run `python prm.py ...`; what it prints, and its exit status."""

    def call(*argv) -> tuple[str, int]:
        monkeypatch.setattr(sys, "argv", ["prm.py", *map(str, argv), "--prompt", "{question}"])
        try:
            run_script(prm.main)
        except SystemExit as stop:
            return capsys.readouterr().err, stop.code
        return capsys.readouterr().out, 0

    return call


def test_the_stages_run_one_by_one_from_the_command_line(folder, tmp_path, call):
    labels, out = tmp_path / "labels.jsonl", tmp_path / "prm"
    size = ("--label-problems", 30, "--completions", 2, "--max-new-tokens", 30)
    call("label", "--model", folder, "--data", "toy", "--out", labels, *size)
    assert len(read_labels(str(labels))) == 30
    trained, status = call("train", "--model", folder, "--labels-file", labels, "--out", out, "--kind", "prm")
    tested, _ = call("test", "--model", out, "--labels-file", labels)
    assert status == 0 and "brier" in trained and trained.splitlines()[-1] == tested.splitlines()[-1]


@pytest.mark.parametrize("argv, words", [
    (("train", "--model", "FOLDER", "--out", "x"), "needs --labels-file"),
    (("test", "--model", "FOLDER", "--labels-file", "x"), "neither a reward model"),
    (("train", "--model", "FOLDER", "--labels-file", "none.jsonl", "--out", "x"), "no such file"),
    (("label", "--model", "FOLDER", "--data", "toy", "--out", "x", "--kindd", "prm"), "unrecognized"),
    (("label", "--model", "FOLDER", "--data", "toy", "--out", "x", "--flip-labels", "1.1"), "be a number in"),
])
def test_a_mistake_at_the_command_line_is_one_sentence(argv, words, folder, call):
    said, status = call(*(folder if word == "FOLDER" else word for word in argv))
    assert status == 2 and words in said and "Traceback" not in said
