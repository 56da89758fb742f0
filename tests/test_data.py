"""The embedded worlds, data sets, prompts and steps; the ranges of every script's numbers; files."""

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import fields, replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import data
import eval as evaluation
import prm
import train
from data import (
    SYSTEM, WORLDS, Problem, UserError, char_offsets, data_sets, decode, encode_prompts, encode_steps, find_steps,
    is_toy, judge, load_problems, oracle, problems_key, run_script, split_steps, steps_of, toy_lines, toy_problems,
    toy_solution, toy_tokenizer,
)
from rollout import Sample

ROOT = Path(__file__).parents[1]
SPECIAL = ["<pad>", "<eos>", "<unk>"]
NAMES, THINGS = ("Ana", "Zoé", "中村", "Bo"), ("apples", "naïve cafés", "苹果", "🍎🍏")
TAILS = ("now.", "in all, 7+5=12!", "é…")
SENTENCES = [f"{a} has {i} {b}, {c}" for i, a in enumerate(NAMES) for b in THINGS for c in TAILS]  # 48


def fast(model, decoder, pre=None, trainer=None):
    tok = Tokenizer(model)
    tok.decoder = decoder
    if pre is not None:
        tok.pre_tokenizer = pre
    if trainer is not None:
        tok.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def bpe():
    """GPT-2's and Qwen's kind, with merges: most words, and some of the non-ASCII characters, are one token."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return fast(models.BPE(), decoders.ByteLevel(), pre_tokenizers.ByteLevel(add_prefix_space=False), trainer)


def one_byte_each():
    """The same kind without merges: every non-ASCII character is several tokens, none of which is text alone."""
    vocab = {token: i for i, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return fast(models.BPE(vocab, []), decoders.ByteLevel(), pre)


def byte_fallback():
    """Llama 2's kind: a leading blank belongs to the word and is dropped at the start; unknown characters are bytes."""
    tokens = SPECIAL + ["▁a", "▁b", "▁c", "\n"] + [f"<0x{i:02X}>" for i in range(256)]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model = models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    return fast(model, decoders.Sequence(steps))


def of_pieces(*pieces: str):
    """A tokenizer whose tokens are these strings, and the ids of all of them, in order, with EOS."""
    vocab = {token: i for i, token in enumerate(SPECIAL + list(dict.fromkeys(pieces)))}
    tok = fast(models.WordLevel(vocab, unk_token="<unk>"), decoders.Fuse())
    return tok, [vocab[p] for p in pieces] + [tok.eos_token_id]


def pieces(tok, ids, token_ends) -> list[str]:
    """The texts between successive step ends."""
    return [decode(tok, ids[a + 1 : b + 1]) for a, b in zip([-1] + token_ends, token_ends)]


# ------------------------------------------------------------------------------------------------ the embedded world


@pytest.mark.parametrize(
    "question, lines",
    [
        ("41b+5c+3d-9e*5f+2=", ["b41+5=46", "c46+3=49", "d49-9=40", "e40*5=00", "f00+2=02", "####02"]),
        ("03b-8c*7d+9=", ["b03-8=95", "c95*7=65", "d65+9=74", "####74"]),  # below 0, and 665 mod 100
        ("00b-2c-9d+6=", ["b00-2=98", "c98-9=89", "d89+6=95", "####95"]),
        ("99b+9c*9d-8=", ["b99+9=08", "c08*9=72", "d72-8=64", "####64"]),  # above 99
        ("b42c05d97e16=", ["e1+6+0=07", "d9+7+0=16", "c0+5+1=06", "b4+2+0=06", "####06667"]),  # 4091 + 2576
        ("b95c40d61e38=", ["e3+8+0=11", "d6+1+1=08", "c4+0+0=04", "b9+5+0=14", "####14481"]),  # 9463 + 5018
        ("b00c00d00e00=", ["e0+0+0=00", "d0+0+0=00", "c0+0+0=00", "b0+0+0=00", "####00000"]),
    ],
)
def test_toy_lines_are_the_ones_computed_by_hand(question, lines):
    assert toy_lines(question) == lines and is_toy(question)


OTHER = ["", "41=", "41b+5", "1b+5c+3=", "41b+55c+3=", "41b/5=", "41b+5= ", "41h+5="]
OTHER += ["=", "b42", "b4=", "b421=", "i42=", "b4-2=", "b42 c05=", "41b42=", "b42c+5="]


@pytest.mark.parametrize("question", OTHER)
def test_other_questions_are_not_of_the_embedded_world(question):
    assert not is_toy(question)
    with pytest.raises(UserError, match="embedded world"):
        toy_lines(question)


def test_the_answer_of_sums_is_the_sum_of_its_two_numbers():
    lengths = set()
    for p in toy_problems("train", 200, world="sums"):
        first, second = (int("".join(p.question[i::3][: len(p.question) // 3])) for i in (1, 2))
        assert int(p.answer.removeprefix("####")) == first + second
        lengths.add(len(toy_lines(p.question)) - 1)
    assert lengths == {4, 5, 6, 7}


def test_a_question_of_one_world_is_never_one_of_the_other():
    for name, world in WORLDS.items():
        for p in toy_problems("train", 300, world=name):
            assert is_toy(p.question) and [n for n, w in WORLDS.items() if w.pattern.fullmatch(p.question)] == [name]
            assert toy_lines(p.question) == world.lines(p.question)


@pytest.mark.parametrize("world, columns", [("toy", range(3, 7)), ("sums", range(4, 8))])
def test_toy_problems_are_distinct_and_no_test_question_is_a_training_question_whatever_the_seeds(world, columns):
    questions = lambda split: [{p.question for p in toy_problems(split, 1500, seed, world)} for seed in range(3)]
    train, test = questions("train"), questions("test")
    assert all(len(q) == 1500 for q in train + test)
    assert not set.union(*train) & set.union(*test)
    assert train[0] != train[1] and toy_problems("train", 20, 7, world) == toy_problems("train", 20, 7, world)
    for p in toy_problems("train", 300, world=world):
        assert p.answer == toy_lines(p.question)[-1] and len(toy_lines(p.question)) - 1 in columns
    assert load_problems(world, "test", 50) == [replace(p, source=world) for p in toy_problems("test", 50, world=world)]


@pytest.mark.parametrize("world, lines_at_most, tokens", [("toy", 7, 128), ("sums", 8, 160)])
def test_toy_solutions_are_right_and_short_and_repeat_only_right_lines(world, lines_at_most, tokens):
    tok, rng, most = toy_tokenizer(world), random.Random(0), {}
    for p in toy_problems("train", 300, world=world):
        right = toy_lines(p.question)
        for repeat in (0.0, 0.1, 1.0):
            text = toy_solution(p.question, rng, repeat)
            lines = text.split("\n")
            assert lines[-1] == p.answer and list(dict.fromkeys(lines)) == right  # each first time in the right order
            assert len(lines) <= 13 and len(tok.encode(text)) + 1 <= tokens
            assert oracle(p.question, text) == [True] * len(lines)
            most[repeat] = max(most.get(repeat, 0), len(lines))
    assert most[0.0] == lines_at_most < most[0.1] <= most[1.0] == 13


@pytest.mark.parametrize(
    "response, labels",
    [
        ("b41+5=46\nc46*3=38\n####38", [True, True, True]),
        ("b41+5=46\nc46*3=37\n####37", [True, False, False]),
        ("b41+5=45\nc46*3=38\n####38", [False, False, False]),  # all that follows a wrong line is bad, right or not
        ("b41+5=46\nb41+5=46\nc46*3=38\nb41+5=46\n####38", [True] * 5),  # repeating is no error
        ("c46*3=38\n####38", [True, True]),
        ("b41+5=46\n\n\nc46*3=38\n", [True, True]),
        ("\nb41+5=46\n c46*3=38", [True, False]),
        ("b41+5=46 c46*3=38", [False]),
        ("b41+5=46\n=\nc46*3=38", [False, False]),  # its line belongs to the step before
        ("####46", [False]),
        ("", []),
        ("\n\n", []),
    ],
)
def test_oracle_labels(response, labels):
    assert oracle("41b+5c*3=", response) == labels


def test_the_oracle_has_no_label_for_a_step_that_ends_within_a_line():
    assert oracle("41b+5c*3=", "b41+5=46\nc46*3=38\n####38", [4, 9, 18, 20]) == [None, True, True, None]


@pytest.mark.parametrize(
    "response, labels",
    [
        ("e1+6+0=07\nd9+7+0=16\nc0+5+1=06\nb4+2+0=06\n####06667", [True] * 5),
        ("e1+6+0=07\ne1+6+0=07\nd9+7+0=16\nd9+7+0=16\nc0+5+1=06\nb4+2+0=06\n####06667", [True] * 7),
        ("e1+6+0=07\nd9+7+0=16\nc0+5+0=05\nb4+2+0=06\n####06567", [True, True, False, False, False]),  # lost a carry
        ("e1+6+0=08\ne1+6+0=07", [False, False]),
        ("####06667", [True]),
        ("####6667", [False]),
        ("####07666", [False]),  # the digits as they came
    ],
)
def test_oracle_labels_of_sums(response, labels):
    assert oracle("b42c05d97e16=", response) == labels


@pytest.mark.parametrize("world", WORLDS)
def test_toy_tokenizer_round_trip(world):
    tok, rng = toy_tokenizer(world), random.Random(1)
    for p in toy_problems("test", 200, world=world):
        for text in (p.question, toy_solution(p.question, rng, 0.3)):
            ids = tok.encode(text)
            assert decode(tok, ids) == text and tok.unk_token_id not in ids
            assert decode(tok, ids + [tok.eos_token_id, tok.pad_token_id]) == text
    assert [tok.decode([i]) for i in tok.encode("=\n####02")] == ["=", "\n", "####", "0", "2"]
    assert len({tok.pad_token_id, tok.eos_token_id, tok.unk_token_id}) == 3


# ------------------------------------------------------------------------------------------------ steps


def split(text: str, separator: str, finished: bool = True) -> list[str]:
    return steps_of({"response": text, "char_ends": split_steps(text, separator, finished)})


@pytest.mark.parametrize(
    "text, separator, finished, steps",
    [
        ("a\nb", "\n", True, ["a\n", "b"]),
        ("a\nb\n", "\n", True, ["a\n", "b\n"]),
        ("a\n\n\nb", "\n", True, ["a\n\n\n", "b"]),  # a doubled separator belongs to the step before
        ("\n\na\nb", "\n", True, ["\n\na\n", "b"]),  # a leading one to the first step
        ("a\nb \n\n", "\n", True, ["a\n", "b \n\n"]),
        ("a b", "\n", True, ["a b"]),
        ("a b", "\n", False, []),  # truncated: what is not complete is no step
        ("a\nb", "\n", False, ["a\n"]),
        ("a\nb\n", "\n", False, ["a\n", "b\n"]),
        ("a\nb\n  ", "\n", False, ["a\n", "b\n"]),
        ("a\nb\n  ", "\n", True, ["a\n", "b\n  "]),
        ("", "\n", True, []),
        (" \n\n", "\n", True, []),
        ("...\n\\]\n", "\n", True, []),
        ("a\nb\n\nc", "\n\n", True, ["a\nb\n\n", "c"]),
        ("a\n\n\nb", "\n\n", True, ["a\n\n", "\nb"]),
        ("a\n\nb\n", "\n\n", False, ["a\n\n"]),
        ("a ки\nb ки", " ки", True, ["a ки", "\nb ки"]),  # letters of the separator do not make a step
        ("a ки ки b", " ки", True, ["a ки ки", " b"]),
        ("é\n中\n½\n", "\n", True, ["é\n", "中\n", "½\n"]),
    ],
)
def test_split_steps(text, separator, finished, steps):
    assert split(text, separator, finished) == steps


IN_QWENS_MANNER = {
    "display math, by lines": ("\n", [
        "We subtract 1 from both sides:\n\\[\n",
        "x + 1 - 1 = 3 - 1\n\\]\n",
        "So $x = 2$.",
    ]),
    "display math, by blank lines": ("\n\n", [
        "We subtract 1 from both sides:\n\n",
        "\\[\nx + 1 - 1 = 3 - 1\n\\]\n\n",
        "So $x = 2$.",
    ]),
    "display math with blank lines within": ("\n\n", ["We get\n\n$$\n\n", "x = 2\n\n$$\n\n", "So $x = 2$."]),
    "display math at the beginning": ("\n", ["\\[\nx + 1 = 3\n\\]\n", "So $x = 2$."]),
    "a list, by blank lines": ("\n\n", [
        "**Step 1:** Count.\n- 3 apples\n- 4 pears\n\n",
        "**Step 2:** Add.\n1. $3 + 4 = 7$\n\n",
        "The answer is $\\boxed{7}$.",
    ]),
    "a list, by lines": ("\n", ["1. 3 apples\n", "2. 4 pears\n\n---\n\n", "Together: 7."]),
    "code fences, by blank lines": ("\n\n", [
        "Let us compute it.\n\n",
        "```python\nx = 3 + 4\nprint(x)\n```\n\n",
        "```output\n7\n```\n\n",
        "So 7.",
    ]),
    "code fences, by lines": ("\n", ["We run\n```\n", "print(3 + 4)\n```\n", "and get 7.\n"]),
    "blank lines with spaces": ("\n", ["One.\n  \n", "Two.\n \t\n\n", "Three.\n "]),
    "blank lines with spaces between blank lines": ("\n\n", ["One.\n\n  \n\n", "Two.\n\n \t\n\n", "Three."]),
}


@pytest.mark.parametrize("name", IN_QWENS_MANNER)
def test_the_steps_of_a_solution_in_Qwens_manner_are_those_that_a_person_would_mark(name):
    separator, steps = IN_QWENS_MANNER[name]
    assert split("".join(steps), separator) == steps
    assert split("".join(steps[:-1]) + steps[-1][:3], separator, finished=False) == steps[:-1]  # the last is cut off


@pytest.mark.parametrize("separator", ["\n", "\n\n"])
@pytest.mark.parametrize("make", [toy_tokenizer, bpe, one_byte_each])
def test_the_tokens_between_step_ends_are_the_steps(make, separator):
    tok, rng = make(), random.Random(2)
    for p in toy_problems("train", 12):
        steps = toy_lines(p.question) if make is toy_tokenizer else rng.sample(SENTENCES, rng.randint(1, 5))
        text = separator.join(steps)
        canonical, by_character = tok.encode(text), [i for c in text.replace("####", "") for i in tok.encode(c)]
        assert make is one_byte_each or make is toy_tokenizer or len(canonical) < 0.7 * len(by_character)
        for ids in (canonical, by_character):  # sampled ids need not be the ones that encode would choose
            expected = [s + separator for s in decode(tok, ids).split(separator)]
            expected[-1] = expected[-1].removesuffix(separator)
            assert len(expected) == len(steps)
            finished = ids + [tok.eos_token_id]
            text, char_ends, token_ends = find_steps(tok, finished, separator, truncated=False)
            assert steps_of({"response": text, "char_ends": char_ends}) == expected
            assert pieces(tok, finished, token_ends) == expected and token_ends[-1] == len(ids)  # the last ends at EOS
            assert find_steps(tok, ids, separator, truncated=True)[2] == token_ends[:-1]
            again, places = encode_steps(tok, text, char_ends)  # of any ids: the token that holds the last character
            for end, place in zip(char_ends, places):
                assert decode(tok, again[: place + 1]).startswith(text[:end]) and place < len(again)
                assert not decode(tok, again[:place]).startswith(text[:end])


@pytest.mark.parametrize(
    "tokens, separator, finished, truncated",
    [
        (["So x", ".\n\nN", "ow y", "."], "\n\n", [1, 4], [1]),  # a token spans the separator: it ends the step before
        (["a", "\nb\n", "c"], "\n", [1, 3], [1]),  # a token ends two steps, which count as one
        (["a", "\n", "\n", "b"], "\n", [2, 4], [2]),  # the second separator belongs to the first step
        (["a", "\n", "\nb"], "\n", [3], [2]),  # as above, by the blank line
        (["a\nb"], "\n", [1], [0]),
        (["\n", "\n"], "\n", [], []),
        ([], "\n", [], []),
    ],
)
def test_step_ends_where_tokens_and_steps_do_not_align(tokens, separator, finished, truncated):
    tok, ids = of_pieces(*tokens)
    assert find_steps(tok, ids, separator, truncated=False)[2] == finished
    assert find_steps(tok, ids[:-1], separator, truncated=True)[2] == truncated


def test_steps_that_end_in_one_token_end_at_the_later_character():
    tok, ids = of_pieces("a", "\nb\n", "c")
    assert find_steps(tok, ids, "\n", truncated=False) == ("a\nb\nc", [4, 5], [1, 3])


def test_a_token_ends_where_its_own_characters_end_though_encode_would_choose_others():
    tok = bpe()
    canonical, by_character = tok.encode("Ana has"), [tok.encode(c)[0] for c in "Ana has"]
    assert len(canonical) < 7 and decode(tok, canonical) == decode(tok, by_character) == "Ana has"
    assert char_offsets(tok, by_character + [tok.eos_token_id]) == ("Ana has", [1, 2, 3, 4, 5, 6, 7, 7])
    assert char_offsets(tok, canonical)[1] == [3, 7]


def test_a_character_of_several_tokens_counts_from_its_first_one_on():
    tok = one_byte_each()
    ids = tok.encode("é\n中\n")  # 2, 1, 3 and 1 bytes
    assert char_offsets(tok, ids) == ("é\n中\n", [1, 1, 2, 3, 3, 3, 4])
    assert find_steps(tok, ids, "\n", truncated=True)[2] == [2, 6]
    assert char_offsets(tok, ids[:5])[1] == [1, 1, 2, 3, 3]  # the limit cut a character
    assert find_steps(tok, ids[:5], "\n", truncated=True)[2] == [2]


@pytest.mark.parametrize(
    "tokens, text, offsets, token_ends",
    [
        (["▁a", "▁b", "\n", "▁c"], "a b\n c", [1, 3, 4, 6, 6], [2, 4]),
        (["▁a", "<0xE4>", "<0xB8>", "<0xAD>", "\n", "▁b"], "a中\n b", [1, 2, 2, 2, 3, 5, 5], [4, 6]),
        (["▁a", "▁b", "\n", "▁c", "<0xE4>", "<0xB8>", "<0xAD>"], "a b\n c中", [1, 3, 4, 6, 7, 7, 7, 7], [2, 7]),
    ],
)
def test_steps_where_the_decoder_drops_the_leading_blank_and_characters_are_bytes(tokens, text, offsets, token_ends):
    tok = byte_fallback()
    ids = tok.convert_tokens_to_ids([*tokens, "<eos>"])
    assert char_offsets(tok, ids) == (text, offsets) and find_steps(tok, ids, "\n", False)[2] == token_ends


def test_judge_grades_each_answer_and_counts_its_steps_tokens_and_exact_repeats():
    tok = toy_tokenizer()
    right, cut = tok.encode("b41+5=46\nb41+5=46\nb41+5=47\n####46") + [1], tok.encode("b41+5=46\nb41+5=46\nb41+5=46")
    problems = [Problem("41b+5=", "####46"), Problem("41b+6=", "####47")]
    a, b, c = judge(tok, problems, [[Sample(0, right, False), Sample(0, cut, True)], [Sample(1, right, False)]], "\n")
    assert [row["verdict"] for row in (a, b, c)] == ["match", "truncated", "mismatch"]
    assert [row["correct"] for row in (a, b, c)] == [True, False, False]
    assert (a["steps"], a["tokens"], a["repeats"]) == (4, len(right), 1) == (c["steps"], c["tokens"], c["repeats"])
    assert (b["steps"], b["tokens"], b["repeats"]) == (2, len(cut), 1)  # what was cut off is no step
    assert (a["question"], c["question"], a["gold"], a["ids"]) == ("41b+5=", "41b+6=", "####46", right)
    assert (a["char_ends"], a["token_ends"]) == ([9, 18, 27, 33], [8, 17, 26, 30])  # #### is one token; then EOS


# ------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"question": "1+1?", "answer": "So\n#### 2"}, Problem("1+1?", "So\n#### 2")),
        ({"problem": "1+1?", "solution": r"\boxed{2}"}, Problem("1+1?", r"\boxed{2}")),
        ({"problem": "1+1?", "answer": "2"}, Problem("1+1?", "2")),
        ({"problem": "1+1?", "answer": "2", "solution": "so 2"}, Problem("1+1?", "2")),
        ({"instruction": "1+1?", "output": "two", "source": "data/CoT/x.json"}, Problem("1+1?", "two")),
        ({"question": "1+1?", "answer": 2, "level": 5}, Problem("1+1?", "2", level="5")),
        ({"problem": "1?", "solution": "2", "level": "Level 3", "type": "Algebra"}, Problem("1?", "2", "Algebra", "3")),
        ({"problem": "1+1?", "answer": "2", "level": 3, "subject": "Algebra"}, Problem("1+1?", "2", "Algebra", "3")),
        ({"question": "1/2?", "answer": 0.5}, Problem("1/2?", "0.5")),
        ({"question": "é 中?", "answer": "🍎"}, Problem("é 中?", "🍎")),
    ],
)
def test_jsonl_rows(row, problem, tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert load_problems(str(file)) == [replace(problem, source=str(file))]


def test_jsonl_skips_blank_lines_and_programs_and_stops_at_the_limit(tmp_path):
    file = tmp_path / "problems.jsonl"
    rows = [json.dumps({"question": f"q{i}", "answer": i}) for i in range(4)]
    rows[1] = json.dumps({"instruction": "q", "output": "print(1)", "source": "data/PoT/x.json"})
    file.write_text("\n \n".join(rows) + "\n\n{malformed")
    assert [p.question for p in load_problems(str(file), limit=3)] == ["q0", "q2", "q3"]  # never reads on
    assert [p.question for p in load_problems(str(file), limit=1)] == ["q0"]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"question": "q", "answer": ', "line 3: not JSON"),
        ("question", "line 3: not JSON"),
        ('{"question": "q"}', "line 3: needs the fields"),
        ('["q", "a"]', "line 3: needs the fields"),
        ('{"question": " ", "answer": "a"}', "line 3: question and answer must be text"),
        ('{"problem": null, "solution": "a"}', "line 3: problem and solution must be text"),
        ('{"question": "q", "answer": null}', "line 3: question and answer must be text"),
        ('{"question": "q", "answer": ["a"]}', "line 3: question and answer must be text"),
        ('{"question": "q", "answer": ""}', "line 3: question and answer must be text"),
    ],
)
def test_a_bad_row_is_one_line_with_its_number(line, message, tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text('{"question": "q", "answer": "a"}\n\n' + line + '\n{"question": "q", "answer": "a"}\n')
    with pytest.raises(UserError) as error:
        load_problems(str(file))
    assert str(error.value).startswith(f"{file} {message}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.jsonl", b"", "holds no problems"),
        ("blank.jsonl", b"\n \n", "holds no problems"),
        ("latin.jsonl", '{"question": "é", "answer": "1"}'.encode("latin-1"), "not JSON"),
        ("missing.jsonl", None, "no such file"),
        ("missing.parquet", None, "no such file"),
        ("bad.parquet", b"PAR2", "cannot be read as Parquet"),
        ("bad.json", b'[{"question": "q"', "not JSON"),
        ("latin.json", b'[{"question": "\xe9"}]', "not JSON"),
        (".", None, "doesn't contain any data files.*give a local copy instead: a .jsonl"),
    ],
)
def test_a_bad_file_is_one_line_with_its_name(name, content, message, tmp_path):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_problems(str(file))
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_the_files_of_a_data_set_as_the_hub_keeps_them(tmp_path):
    from pyarrow import Table, parquet

    rows = [{"problem": f"q{i}", "level": "Level 2", "type": "Algebra", "solution": "\\boxed{1}"} for i in range(3)]
    expected = [Problem(f"q{i}", "\\boxed{1}", "Algebra", "2") for i in range(3)]
    (tmp_path / "set/data").mkdir(parents=True)
    for split, part in (("train", rows[:2]), ("test", rows[2:])):
        parquet.write_table(Table.from_pylist(part), tmp_path / f"set/data/{split}-00000-of-00001.parquet")
    found = lambda name, split="train": [replace(p, source="") for p in load_problems(str(tmp_path / name), split)]
    assert found("set") == expected[:2] and found("set", "test") == expected[2:]
    (tmp_path / "x.json").write_text(json.dumps(rows))  # MathInstruct's form
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(Table.from_pylist(rows), tmp_path / "x.parquet")
    assert all(found(name) == expected for name in ("x.json", "lines.json", "x.parquet"))


def test_several_sets_are_one_list_in_which_each_problem_knows_its_source(tmp_path):
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b,c.jsonl")]
    for path in paths:
        Path(path).write_text("".join(json.dumps({"question": f"q{i}", "answer": "1"}) + "\n" for i in range(3)))
    found = load_problems(f"{paths[0]}, toy", limit=2)
    assert [p.source for p in found] == [paths[0]] * 2 + ["toy"] * 2 and [p.question for p in found[:2]] == ["q0", "q1"]
    assert [p.source for p in load_problems(paths[1])] == [paths[1]] * 3  # a file with a comma in its name is one
    assert data_sets("math, gsm8k") == ["math", "gsm8k"] and data_sets(paths[1]) == [paths[1]]
    for wrong in ("", "math,", "math,,gsm8k"):
        with pytest.raises(UserError, match="every data set needs a name"):
            data_sets(wrong)
    one, other, told = [Problem("q", "1")], [Problem("q", "2")], [Problem("q", "1", "Algebra", "5", "math")]
    assert problems_key(one) == problems_key(told) != problems_key(other)


# ------------------------------------------------------------------------------------------------ prompts


def test_prompts_by_chat_template_and_by_plain_template():
    tok = bpe()
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", tok.eos_token_id)]
    )
    problems = [Problem("f({x}) = {question}?", "1"), Problem("中", "2")]
    plain = encode_prompts(tok, problems, "Q: {question}\nA:", 100)
    assert [decode(tok, ids) for ids in plain] == ["Q: f({x}) = {question}?\nA:", "Q: 中\nA:"]
    assert all(ids.count(tok.eos_token_id) == 1 == 1 + ids.index(tok.eos_token_id) for ids in plain)  # as encode does

    tok.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    chat = encode_prompts(tok, problems, "Q: {question}\nA:", 1000)
    assert [decode(tok, ids) for ids in chat] == [f"<system>{SYSTEM}<user>{p.question}<bot>" for p in problems]
    assert not any(tok.eos_token_id in ids for ids in chat)  # the template alone decides on special tokens


def test_a_prompt_that_is_too_long_or_empty_is_refused():
    tok, problems = toy_tokenizer(), [Problem(q, "") for q in ("41b+5c+3d-9=", "41b+5c+3d-9e*5=", "41b+5c+3d-9e*5f+2=")]
    assert [len(ids) for ids in encode_prompts(tok, problems, "{question}", 18)] == [12, 15, 18]
    with pytest.raises(UserError, match="^2 of 3 prompts .* 12 tokens.* 18") as error:
        encode_prompts(tok, problems, "{question}", 12)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no tokens"):
        encode_prompts(tok, [Problem("", "")], "{question}", 12)


# ------------------------------------------------------------------------------------------------ numbers


OPTIONS = (train.TrainOptions, evaluation.EvalOptions, prm.ScriptOptions)
NUMBERS = [(kind, f) for kind in OPTIONS for f in fields(kind) if f.type in (int, float, float | None)]


@pytest.mark.parametrize("kind, f", NUMBERS, ids=lambda x: getattr(x, "__name__", getattr(x, "name", None)))
def test_every_number_of_every_script_has_an_interval_and_is_finite(kind, f):
    interval = f.metadata["help"].rpartition("; in ")[2]
    low, high = map(float, interval[1:-1].split(","))
    assert interval[0] in "[(" and interval[-1] in ("])" if high < math.inf else ")") and math.isfinite(low)
    step = (lambda x, way: x + way) if f.type is int else (lambda x, way: math.nextafter(x, way * math.inf))
    below = low if interval[0] == "(" else step(low, -1)
    above = high if interval[-1] == ")" else step(high, 1)
    for value in (below, above, -math.inf, math.inf, math.nan):
        with pytest.raises(UserError) as error:
            kind(**{f.name: value})
        assert str(error.value) == f"--{f.name.replace('_', '-')} {value}: must be a number in {interval}"
    number = int if f.type is int else float
    for value in (number(step(below, 1)), number(min(step(above, -1), 1e9)), f.default):
        kind(**{f.name: value})


TRAIN, EVAL = "train.py --preset toy --runs-dir OUT", "eval.py --model OUT/model --data toy --out OUT"
PRM = "prm.py train --model OUT --labels-file OUT.jsonl --out OUT"
LABEL = "prm.py label --model OUT --data toy --out OUT/labels.jsonl"


@pytest.mark.parametrize(
    "command",
    [
        *(f"{TRAIN} {x}" for x in ("--eta nan", "--max-grad-norm -1", "--clip-range nan", "--gamma 2", "--lr nan")),
        *(f"{TRAIN} {x}" for x in ("--lr -1", "--seed 99999999999999999999", "--temperature nan", "--iterations nan")),
        *(f"{EVAL} {x}" for x in ("--temperature nan", "--samples 0", "--seed 99999999999999999999")),
        *(f"{PRM} {x}" for x in ("--rm-epochs 0", "--rm-lr nan", "--rm-lr -1", "--rm-head-lr inf")),
        *(f"{LABEL} {x}" for x in ("--temperature 0", "--flip-labels 2", "--label-problems 0", "--max-new-tokens -1")),
    ],
)
def test_a_number_out_of_range_is_one_sentence_before_anything_starts(command, tmp_path, monkeypatch, capsys):
    script, *argv = command.replace("OUT", str(tmp_path / "out")).split()
    monkeypatch.setattr(sys, "argv", [script, *argv])
    with pytest.raises(SystemExit) as stop:
        run_script({"train.py": train, "eval.py": evaluation, "prm.py": prm}[script].main)
    said = capsys.readouterr()
    *_, sentence = said.err.strip().splitlines()
    assert stop.value.code == 2 and sentence.startswith(f"{script}: ") and argv[-2] in sentence
    assert "must be a number in " in sentence or "invalid int value: 'nan'" in sentence
    assert "Traceback" not in said.err and said.out == "" and not [*tmp_path.iterdir()]


# ------------------------------------------------------------------------------------------------ files and scripts


def test_a_locked_file_is_refused_until_it_is_closed(tmp_path):
    held = data.lock(tmp_path / "a" / "lock")
    with pytest.raises(UserError, match="a is in use by another process"):
        data.lock(tmp_path / "a" / "lock")
    held.close()
    data.lock(tmp_path / "a" / "lock").close()


def test_lines_are_whole_and_what_is_undefined_is_null(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert data.whole_lines(file) == []
    data.append(file, [{"x": 1.5, "y": math.nan}, {"x": math.inf, "y": [1]}])
    data.append(file, [{"x": True, "y": "é"}])
    rows = [json.loads(line) for line in data.whole_lines(file)]
    assert rows == [{"x": 1.5, "y": None}, {"x": None, "y": [1]}, {"x": True, "y": "é"}]
    with open(file, "a") as f:
        f.write('{"x": 2')  # the writer was killed
    assert len(data.whole_lines(file)) == 3
    data.write(file, "new")
    assert file.read_text() == "new" and [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("name", ["train", "eval", "prm"])
def test_idle_threads_are_told_not_to_spin_before_torch_is_imported(name):
    """OpenMP reads the setting when torch is imported."""
    code = f"""if True:
        import os, sys
        class Finder:
            def find_spec(name, *_):
                if name == "torch":
                    print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
                    os._exit(0)
        sys.meta_path.insert(0, Finder)
        import {name}"""
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.stdout.strip().isdigit(), found.stdout + found.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("flush", [True, False])  # in the middle of the script, and at its end
def test_a_reader_that_has_seen_enough_ends_a_script_without_a_word(flush, tmp_path):
    """As `python eval.py show RUN | head` does."""

    def child():
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(os.open(tmp_path / "said", os.O_WRONLY | os.O_CREAT), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1, closefd=False)
        run_script(lambda: print("a table", flush=flush))
        os._exit(0)

    process = get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    assert process.exitcode == 1 and (tmp_path / "said").read_text() == ""
