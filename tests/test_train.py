"""train.py as a user meets it: options, errors, the loop, resume, several processes."""

import json
import os
import subprocess
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from test_prm import other_tokenizer
from torch.distributed.run import get_args_parser
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

import data
import eval as evaluation
import model
import prm
import train
from data import UserError, toy_problems, toy_tokenizer
from model import toy_model

PROBLEMS = Path(tempfile.mkdtemp()) / "problems.jsonl"
PROBLEMS.write_text("\n".join(json.dumps(vars(p)) for p in toy_problems("train", 100)))
SMALL = (
    f"--data {PROBLEMS} --prompt {{question}} --questions 8 --samples 2 --iterations 4 --minibatches 2 --max-new-tokens 24 "
    "--eval-problems 6 --eval-every 2 --token-budget 128 --lr 1e-3 --critic-lr 1e-3 --label-problems 24 "
    "--completions 2 --rm-epochs 1 --rm-lr 1e-3 --lr-warmup 1"
).split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A random model with the embedded world's tokenizer, as a Hugging Face folder outside the project."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = toy_tokenizer()
    toy_model(tokenizer, seed=0, hidden=16, layers=1, heads=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(*argv: str) -> Path:
    """A run in this process; returns its folder."""
    options, _ = train.parse(list(argv))
    folder = train.open_run(options)
    train.run(options, folder, 0, 1, torch.device("cpu"))
    return folder


def metrics(folder: Path) -> list[dict]:
    """Everything that is logged but time."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


# ------------------------------------------------------------------------------------------------ options


def test_each_preset_names_only_options_that_exist_and_says_why_it_runs():
    for name in train.PRESETS:
        options, why = train.parse(["--preset", name])
        assert options.preset == name and "asked for by --preset" in why
    options, why = train.parse(["--model", "somewhere"])
    assert options.preset == "" and "--model was given" in why
    expected = train.DEFAULT if torch.cuda.is_available() else "toy"
    assert train.parse([])[0].preset == expected


def test_a_backslash_n_from_the_shell_is_a_line_break():
    options, _ = train.parse(["--preset", "toy", "--separator", r"\n\n", "--prompt", r"Q: {question}\nA:"])
    assert options.separator == "\n\n" and options.prompt == "Q: {question}\nA:"
    with pytest.raises(UserError, match="--separator must not be empty"):
        train.parse(["--preset", "toy", "--separator", ""])


def test_every_option_has_a_help_text():
    assert all(f.metadata.get("help") for f in train.Options.__dataclass_fields__.values())


def test_alpha_has_one_default_for_every_learned_reward_but_delta_and_is_overridden_by_hand():
    for reward in train.REWARDS:
        assert train.parse(["--preset", "toy", "--reward", reward])[0].alpha == {"success": 0, "delta": 0.3}.get(reward, 0.5)
    assert train.parse(["--preset", "toy", "--reward", "delta", "--alpha", "0.7"])[0].alpha == 0.7


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--reward success --prm x", "--prm is not used"),
        ("--reward orm --prm x", "--prm is not used"),
        ("--reward delta --label-problems 0", "needs a reward model"),
        ("--reward orm --label-problems 0", "give --orm"),
        ("--reward success --alpha 1", "drop it"),
        ("--reward delta --eta 0.3", "delta has none"),
        ("--data gsm8k", "needs a --model"),
        ("--data sums", "choose --preset sums"),
        ("--resume", "--name"),
        ("--workers 2", "how many runs of a --sweep"),
        ("--sweep reward=prm --workers -1", "--workers must be at least 0"),
        ("--flip-labels 1.5", "--flip-labels is a share"),
        ("--minibatches 1000", "more than"),
        ("--top-p 0", "--top-p"),
        ("--temperature 0", "--temperature must be at least"),
        ("--questions 0", "--questions must be at least 1"),
        ("--prompt Q:", "{question}"),
        ("--max-new-tokens 0", "at least 1"),
        ("--preset nothing", "choose"),
        ("--prm-format qwen", "give both, or neither"),
        ("--log wandb", "pip install it, or drop it"),
        ("--log-to tensorboard", "needs the package tensorboard"),
    ],
)
def test_wrong_combinations_fail_at_parse_time_with_the_mend(argv, words):
    with pytest.raises(UserError, match=words):
        argv = argv.split()
        train.parse(argv if "--preset" in argv else ["--preset", "toy", *argv])


# ------------------------------------------------------------------------------------------------ errors


def fails(monkeypatch, capsys, *argv: str) -> str:
    """The sentence on stderr of a call that must end with status 2."""
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    with pytest.raises(SystemExit) as stop:
        data.run_script(train.main)
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "\n".join(message)
    return message[-1]


def test_bad_input_gets_one_sentence_and_status_2(monkeypatch, capsys, tmp_path, tiny):
    fail = lambda *argv: fails(monkeypatch, capsys, "--runs-dir", str(tmp_path / "runs"), "--model", tiny, *argv)
    good, small = '{"question": "1+1", "answer": "2"}\n', ("--data", str(PROBLEMS))
    (tmp_path / "malformed.jsonl").write_text(good + '{"question": \n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "fields.jsonl").write_text(good + good + '{"text": "1"}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"question": "1+" * 600 + "1=", "answer": "601"}))
    (tmp_path / "no_tokenizer").mkdir()
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path / "no_tokenizer")
    assert "unrecognized arguments: --rewrad" in fail("--rewrad", "delta")
    assert "invalid choice" in fail("--reward", "deltas")
    assert "no such file" in fail("--data", str(tmp_path / "missing.jsonl"))
    assert "malformed.jsonl line 2: not JSON" in fail("--data", str(tmp_path / "malformed.jsonl"))
    assert "holds no problems" in fail("--data", str(tmp_path / "empty.jsonl"))
    assert "line 3: needs the fields" in fail("--data", str(tmp_path / "fields.jsonl"))
    assert "longer than the limit of 1024 tokens" in fail("--data", str(tmp_path / "long.jsonl"))
    assert "tokenizer" in fail(*small, "--model", str(tmp_path / "no_tokenizer"))
    assert "cannot load" in fail(*small, "--model", str(tmp_path / "nowhere"))
    assert "neither a reward model that prm.py trained" in fail(*small, "--reward", "delta", "--prm", tiny)
    assert "needs a reward model" in fail(*small, "--reward", "delta", "--label-problems", "0")
    assert "positions" in fail(*small, "--reward", "success", "--max-new-tokens", "300")


def test_an_existing_run_is_neither_overwritten_nor_resumed_with_other_options(tmp_path, tiny, capsys):
    argv = [*SMALL, "--model", tiny, "--reward", "success", "--runs-dir", str(tmp_path), "--name", "a", "--iterations", "1"]
    run(*argv)
    with pytest.raises(UserError, match="--resume continues it"):
        run(*argv)
    with pytest.raises(UserError, match=r"other options \(beta 0.02 -> 0.5\)"):
        run(*argv, "--resume", "--beta", "0.5")
    capsys.readouterr()
    run(*argv, "--resume")
    assert "has run its 1 iterations already: raise --iterations" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ the loop


@pytest.mark.parametrize("reward", ["success", "orm", "prm", "clip", "delta", "clip-delta"])
def test_every_reward_runs_from_labels_to_a_model_that_transformers_loads(reward, tmp_path_factory, tiny, capsys):
    runs = tmp_path_factory.getbasetemp() / "every_reward"  # shared, so that the labels are made once
    folder = run(*SMALL, "--model", tiny, "--reward", reward, "--runs-dir", str(runs), "--name", reward)
    rows = metrics(folder)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(row["max_ratio_error_first"] == 0 for row in rows[1:])  # recomputed by the same forward: exactly 1
    assert all(0 <= row["truncated"] <= 1 and row["tokens"] <= 24 for row in rows[1:])
    assert {"return", "success", "process_reward", "nonzero", "steps", "tokens_per_step", "repeats", "kl", "clip_fraction",
            "explained_variance"} <= rows[1].keys()  # fmt: skip
    n = 16
    for row in rows[1:]:  # the grader's verdicts on the finished answers
        assert sum(row[kind] for kind in ("match", "mismatch", "unparsed", "timed_out")) == round(n * (1 - row["truncated"]))
        assert row["match"] == round(n * row["success"])
    learns = reward != "success"  # a random policy is never right, and success alone gives it nothing to learn from
    assert rows[1]["kl"] == 0 and (rows[4]["kl"] != 0) == learns
    assert "greedy_accuracy" in rows[0] and "greedy_accuracy" in rows[2] and "greedy_accuracy" not in rows[3]
    assert "greedy accuracy" in capsys.readouterr().out
    before, after = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (tiny, folder / "model"))
    assert any(not torch.equal(before[k], after[k]) for k in before) == learns
    assert AutoTokenizer.from_pretrained(folder / "model").get_vocab() == toy_tokenizer().get_vocab()
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    if reward in ("prm", "clip", "delta", "clip-delta"):
        assert all(len(s["scores"]) == len(s["refined"]) == s["steps"] for s in samples)
        assert all(0 < score < 1 for s in samples for score in s["scores"])
    if reward == "orm":
        assert all(0 < s["outcome"] < 1 for s in samples)
    watched = [s for s in samples if s.get("watched")]
    assert [s["iteration"] for s in watched] == [1, 2, 3, 4] and len({s["question"] for s in watched}) == 1
    assert watched[0]["response"] == watched[1]["response"] or learns  # the same random numbers
    assert len(samples) == 4 * 5


def test_labels_are_cached_and_made_anew_for_other_settings(tmp_path, tiny, capsys):
    argv = [*SMALL, "--model", tiny, "--iterations", "1", "--runs-dir", str(tmp_path), "--reward"]
    run(*argv, "prm")
    assert capsys.readouterr().out.count("making") == 2  # labels, prm
    run(*argv, "clip")
    assert capsys.readouterr().out.count("cached in") == 2
    run(*argv, "orm")
    out = capsys.readouterr().out
    assert out.count("cached in") == 1 and out.count("making") == 1  # the same labels
    run(*argv, "clip", "--completions", "3")
    assert capsys.readouterr().out.count("making") == 2


def test_each_set_of_a_mixture_has_its_share_of_every_iteration():
    assert data.deal([0, 0], 10, [3, 1]) == [8, 2] and data.deal([8, 2], 1, [3, 1]) == [8, 3]
    assert data.deal([2], 7, [0.2]) == [9]
    for weights in ([3, 1], [0.1, 5, 2], [1, 1, 1]):
        counts = [[0] * len(weights)]
        for _ in range(200):
            counts.append(data.deal(counts[-1], 1, weights))
        assert data.deal(counts[0], 200, weights) == counts[200]
        for n, (before, after) in enumerate(zip(counts, counts[1:])):
            assert sum(before) == n and sorted(b - a for a, b in zip(before, after))[-1] == 1  # one more, of one set
            assert all(abs(count - n * w / sum(weights)) < 1 for count, w in zip(before, weights))


def test_a_mixture_asks_each_question_once_in_each_pass_over_its_set():
    trainer = SimpleNamespace(o=SimpleNamespace(questions=6, seed=0), parts=[(9, 2.0), (3, 1.0)], dealt=[[0, 0]])
    asked = [q for i in range(1, 10) for q in train.Trainer.questions(trainer, i)]  # 54: 36 of the first, 18 of the second
    first, second = [q for q in asked if q < 9], [q for q in asked if q >= 9]
    for questions, size, low in ((first, 9, 0), (second, 3, 9)):
        passes = [questions[i : i + size] for i in range(0, len(questions), size)]
        assert all(sorted(x) == [*range(low, low + size)] for x in passes) and len({*map(tuple, passes)}) > 1
    assert len(first) == 36 and len(second) == 18


def test_training_questions_that_the_evaluation_asks_are_dropped_and_counted(tmp_path, capsys, tiny):
    write = lambda name, *questions: (tmp_path / name).write_text(
        "".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in questions)
    )
    write("a.jsonl", "What is $1+1$?", "what is 1+1", "What is 1-1?", "x")
    write("b.jsonl", "WHAT  IS 2.5?", "What is 25?", "What is 25?", "1+" * 600 + "1")
    write("test.jsonl", "What is $1+1$?", "y", "What is 2.5?", "z")
    names = f"{tmp_path}/a.jsonl=3,{tmp_path}/b.jsonl=2"
    argv = ["--data", names, "--eval-data", f"{tmp_path}/test.jsonl", "--model", tiny, "--eval-problems", "1"]
    problems, prompts, test, parts = train.load_data(train.parse(argv)[0])
    assert [p.question for p in problems] == ["What is 1-1?", "x", "What is 25?"] and len(prompts) == 3 and len(test) == 1
    assert [p.source[-7:] for p in problems] == ["a.jsonl", "a.jsonl", "b.jsonl"] and parts == [(2, 3.0), (1, 2)]
    said = capsys.readouterr().out
    assert "3 training questions; dropped 1 that the evaluation asks too, 2 that differ from one of its own" in said
    assert "1 that repeat another, 1 that have more than 1024 tokens" in said
    with pytest.raises(UserError, match="asks all of one set's questions"):
        train.load_data(train.parse([*argv, "--data", f"{tmp_path}/test.jsonl"])[0])
    train.load_data(train.parse(["--data", f"{tmp_path}/a.jsonl", "--model", tiny])[0])
    assert "training and evaluation ask the same questions" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["trl", "own"])
def test_a_reward_model_with_another_tokenizer_scores_each_step_of_the_policy(kind, tmp_path, tiny):
    """A published PRM, and one of ours, whose tokens are other ones: a step's score is that of its characters."""
    other, folder = other_tokenizer(), tmp_path / "prm"
    lm = toy_model(other, seed=1, hidden=16, layers=1, heads=2)
    if kind == "trl":
        stock = AutoModelForTokenClassification.from_config(lm.config, attn_implementation="eager").eval()
        stock.save_pretrained(folder)
        other.save_pretrained(folder)
    else:
        reward_model = model.ScalarModel(lm)
        torch.nn.init.normal_(reward_model.head.weight)
        reward_model.save(other, folder)
    argv = [*SMALL, "--model", tiny, "--reward", "prm", "--runs-dir", str(tmp_path), "--iterations", "1", "--prm"]
    rows = [json.loads(line) for line in (run(*argv, str(folder)) / "samples.jsonl").read_text().splitlines()]
    assert rows and all(len(row["scores"]) == row["steps"] for row in rows)
    for row in rows:
        for k, cut in enumerate(row["cuts"]):
            pieces = [other.encode(step) for step in prm.steps_of(row)[: k + 1]]
            if kind == "trl":
                ids = other.encode(row["question"])
                ids += [i for step in prm.steps_of(row)[: k + 1] for i in other.encode(step.strip()) + other.encode("\n")]
                expected = stock(torch.tensor([ids])).logits[0, -1].softmax(-1)[1]
            else:
                last = not row["truncated"] and cut == len(row["response"])
                ids = other.encode(row["question"]) + [i for piece in pieces for i in piece] + [other.eos_token_id] * last
                expected = reward_model(model.Packed([ids], prompt_lengths=[1]))[-1].sigmoid()
            assert row["scores"][k] == pytest.approx(expected.item(), abs=1e-5)


def test_a_reward_model_that_cannot_read_an_answer_stops_the_run_before_the_iteration(tmp_path, tiny, monkeypatch):
    other, folder = other_tokenizer(), tmp_path / "prm"
    model.ScalarModel(toy_model(other, seed=1, hidden=16, layers=1, heads=2)).save(other, folder)
    argv = [*SMALL, "--model", tiny, "--reward", "prm", "--runs-dir", str(tmp_path), "--name", "a", "--prm", str(folder)]
    score, calls = train.Trainer.score, []

    def short(self, *args):
        calls.append(self.read)
        self.read.limit = 1024 if len(calls) < 3 else 5
        return score(self, *args)

    monkeypatch.setattr(train.Trainer, "score", short)
    with pytest.raises(UserError, match="reads 5 tokens, and an answer takes"):
        run(*argv)
    assert (tmp_path / "a" / "checkpoint-000002").is_dir()  # nothing is lost


def test_no_option_is_one_that_torchrun_would_take_for_its_own():
    known = [option for action in get_args_parser()._actions for option in action.option_strings]
    for options in (train.Options, evaluation.Options, prm.Options, prm.LabelOptions, prm.TrainOptions):
        for name in options.__dataclass_fields__:
            for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
                assert flag not in known and not any(option.startswith(flag) for option in known), flag


def test_several_evaluation_sets_are_told_apart(tmp_path, tiny, capsys):
    for name, questions in (("a", 3), ("b", 2)):
        lines = [json.dumps(vars(p)) for p in toy_problems("test", 5)[-questions:]]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    names = [f"{tmp_path}/{name}.jsonl" for name in "ab"]
    argv = [*SMALL, "--model", tiny, "--reward", "success", "--runs-dir", str(tmp_path), "--iterations", "1"]
    row = metrics(run(*argv, "--eval-data", ",".join(names)))[0]
    a, b = (row[f"greedy_accuracy:{name}"] for name in names)
    assert row["greedy_accuracy"] == pytest.approx((3 * a + 2 * b) / 5) and f"sampled_stderr:{names[1]}" in row
    assert "\n  a  " in capsys.readouterr().out


@pytest.mark.parametrize("service", ["wandb", "tensorboard"])
def test_metrics_go_to_a_service_that_is_installed_and_asked_for(service, tmp_path, tiny, monkeypatch):
    seen = []

    class Writer:
        def __init__(self, folder, purge_step):
            assert folder == str(tmp_path / "a" / "tensorboard") and purge_step == 1

        def add_scalar(self, name, value, step):
            seen.append((step, {name: value}))

        def flush(self):
            pass

    def init(**more):
        assert more["name"] == "a" and more["resume"] == "allow" and more["config"]["reward"] == "success"
        return SimpleNamespace(log=lambda row, step: seen.append((step, row)))

    wandb, board, writer = (ModuleType(name) for name in ("wandb", "tensorboard", "torch.utils.tensorboard"))
    wandb.init, writer.SummaryWriter = init, Writer
    for module in (wandb, board, writer):
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    argv = [*SMALL, "--model", tiny, "--reward", "success", "--runs-dir", str(tmp_path), "--name", "a", "--iterations", "2"]
    rows = [json.loads(line) for line in (run(*argv, "--log", service) / "metrics.jsonl").read_text().splitlines()]
    for step in (1, 2):
        found = {k: v for at, part in seen if at == step for k, v in part.items()}
        assert found == {k: v for k, v in rows[step].items() if k != "iteration" and v is not None}


def test_an_interrupted_run_resumes_bit_equal(tmp_path, tiny, monkeypatch):
    argv = [*SMALL, "--model", tiny, "--reward", "clip-delta", "--runs-dir", str(tmp_path), "--name"]
    whole = run(*argv, "whole")
    iteration = train.Trainer.iteration

    def stopped(self, i):
        if i == 4:
            raise KeyboardInterrupt
        return iteration(self, i)

    monkeypatch.setattr(train.Trainer, "iteration", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(*argv, "halves", "--save-every", "2")  # iteration 3 is done, but its checkpoint is that of 2
    monkeypatch.undo()
    with open(tmp_path / "halves" / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "half')
    halves = run(*argv, "halves", "--resume")
    assert metrics(halves) == metrics(whole)
    assert [json.loads(x)["iteration"] for x in (halves / "samples.jsonl").read_text().splitlines()] == [
        json.loads(x)["iteration"] for x in (whole / "samples.jsonl").read_text().splitlines()
    ]
    a, b = (AutoModelForCausalLM.from_pretrained(f / "model").state_dict() for f in (whole, halves))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_metrics_depend_on_the_seed_and_not_on_slots_or_token_budget(tmp_path, tiny):
    argv = [*SMALL, "--model", tiny, "--reward", "success", "--runs-dir", str(tmp_path), "--iterations", "2"]
    a, b, c = (run(*argv, *more) for more in ((), ("--slots", "3", "--token-budget", "4096"), ("--seed", "1")))
    a, b, c = (metrics(x)[2] for x in (a, b, c))
    assert all(a[k] == pytest.approx(b[k], abs=1e-4) for k in a)
    assert any(a[k] != pytest.approx(c[k], abs=1e-4) for k in ("kl", "tokens", "return"))


def test_bfloat16_forward_keeps_float32_weights_and_the_first_ratio(tmp_path, tiny):
    argv = [*SMALL, "--model", tiny, "--reward", "delta", "--iterations", "2", "--dtype", "bfloat16"]
    try:
        folder = run(*argv, "--runs-dir", str(tmp_path))
    finally:
        dist.destroy_process_group()  # that of one process, which `shard` made
        model.gpus.cache_clear()
    assert all(row["max_ratio_error_first"] == 0 for row in metrics(folder)[1:])
    assert AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto").dtype == torch.float32


# ------------------------------------------------------------------------------------------------ many runs


class Forked:
    """In place of Popen: main() in a fork of this process, which has imported all that it takes seconds to import."""

    def __init__(self, call, stdout, stderr, **_):
        assert call[:2] == [sys.executable, train.__file__] and stdout is stderr
        self.pid, self.code = os.fork(), None
        if not self.pid:
            sys.argv, sys.stdout, sys.stderr, code = call[1:], stdout, stderr, 0
            try:
                data.run_script(train.main)
            except BaseException as error:
                code = error.code if isinstance(error, SystemExit) else 1
            stdout.flush()
            os._exit(code)

    def poll(self):
        pid, status = os.waitpid(self.pid, os.WNOHANG) if self.code is None else (0, 0)
        self.code = os.waitstatus_to_exitcode(status) if pid else self.code
        return self.code


def sweep(*argv: str):
    train.sweep(train.parse([*argv])[0], [*argv])


def test_a_sweep_makes_each_run_once_and_names_those_that_fail(tmp_path, tiny, monkeypatch, capsys):
    begun, real = [], subprocess.Popen

    def start(call, **more):  # one of them as a user's would be
        begun.append(call[call.index("--name") + 1])
        return (real if begun[-1].endswith("24-seed1") else Forked)(call, **more)

    monkeypatch.setattr(train, "subprocess", SimpleNamespace(Popen=start))
    runs, cut = tmp_path / "runs", ["--max-new-tokens", "8", "--iterations", "2", "--eval-every", "0", "--workers", "2"]
    argv = [*SMALL, "--model", tiny, "--reward", "success", *cut, "--runs-dir", str(runs), "--sweep", "seed=0,1"]
    names = [f"max_new_tokens{length}-seed{seed}" for seed in (0, 1) for length in (300, 24)]
    failed = f"2 of 4 runs failed: {names[0]}, {names[2]}; the first says: train.py: .* positions"
    with pytest.raises(UserError, match=failed):
        sweep(*argv, "max_new_tokens=300,24")
    assert begun == names and not any((runs / name / "model").exists() for name in (names[0], names[2]))
    for seed, name in enumerate((names[1], names[3])):
        config = json.loads((runs / name / "config.json").read_text())
        assert [config[k] for k in ("seed", "max_new_tokens", "name", "threads")] == [seed, 24, name, 1]
        assert [row["iteration"] for row in metrics(runs / name)] == [0, 1, 2] and (runs / name / "model").is_dir()
        assert "PPO, reward success" in (runs / f"{name}.log").read_text()
    assert metrics(runs / names[1])[1] != metrics(runs / names[3])[1]

    monkeypatch.setattr(train, "subprocess", SimpleNamespace(Popen=lambda *_, **__: pytest.fail("all is done")))
    files = lambda: {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    before = files()
    capsys.readouterr()
    sweep(*argv, "max_new_tokens=24")
    assert f"2 runs in {runs}: {names[1]} {names[3]}" in capsys.readouterr().out and files() == before


def test_a_sweep_with_other_options_does_not_take_the_runs_for_its_own(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(train, "subprocess", SimpleNamespace(Popen=lambda *_, **__: pytest.fail("it is done")))
    argv = [*SMALL, "--model", tiny, "--reward", "success", "--runs-dir", str(tmp_path), "--iterations", "1"]
    run(*argv, "--name", "seed0")
    sweep(*argv, "--sweep", "seed=0")
    with pytest.raises(UserError, match="seed0 was started with other options .beta 0.02 -> 0.5."):
        sweep(*argv, "--sweep", "seed=0", "--beta", "0.5")


def test_a_sweep_goes_on_with_a_run_that_was_interrupted_and_with_more_iterations(tmp_path, tiny, monkeypatch):
    argv = [*SMALL, "--model", tiny, "--reward", "success", "--eval-every", "0", "--save-every", "1", "--workers", "1"]
    argv += ["--runs-dir", str(tmp_path), "--sweep", "seed=3", "--iterations"]
    monkeypatch.setattr(train, "subprocess", SimpleNamespace(Popen=Forked))
    sweep(*argv, "1")
    before = metrics(tmp_path / "seed3")
    assert len(before) == 2
    with open(tmp_path / "seed3" / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 2, "half')
    sweep(*argv, "2")
    after = metrics(tmp_path / "seed3")
    assert [row["iteration"] for row in after] == [0, 1, 2] and after[:2] == before


@pytest.mark.parametrize(
    "words, message",
    [
        ("reward=prm,nonsense", "invalid choice: 'nonsense'"),
        ("seed=0,x", "invalid int value: 'x'"),
        ("temperature=1,0", "--temperature must be at least"),
        ("nothing=1", "--sweep nothing=...:"),
        ("=1", "--sweep"),
        ("seed", "give OPTION=VALUE,VALUE"),
        ("alpha=", "give OPTION=VALUE,VALUE"),
        ("main nonsense", "there is none of that name, choose main"),
        ("reward=prm alpha=1 --reward", "expected one argument"),
        ("reward=success,prm --alpha 1", "which --reward success has not"),
        ("reward=prm,clip eta=0.3", "prm has none"),
        ("name=a,b", "--sweep name"),
        ("runs_dir=a,b", "--sweep runs_dir"),
        ("sweep=main", "--sweep sweep"),
    ],
)
def test_wrong_values_of_a_sweep_are_told_before_the_first_run(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "subprocess", SimpleNamespace(Popen=lambda *_, **__: pytest.fail("a run has begun")))
    argv = ["--preset", "toy", "--runs-dir", str(tmp_path / "runs"), "--sweep", *words.split()]
    assert message in fails(monkeypatch, capsys, *argv)
    assert not (tmp_path / "runs").exists()


def test_an_option_that_fits_each_run_of_a_sweep_need_not_fit_the_default_reward(tmp_path, monkeypatch):
    begun = []

    class Done:
        poll = lambda self: 0
        __init__ = lambda self, call, **_: begun.append(call)

    monkeypatch.setattr(train, "subprocess", SimpleNamespace(Popen=Done))
    sweep("--preset", "toy", "--runs-dir", str(tmp_path), "--eta", "0.3", "--sweep", "reward=clip,clip-delta")
    assert len(begun) == 2


def test_a_value_with_a_slash_is_no_folder_in_a_runs_name(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(train, "subprocess", SimpleNamespace(Popen=Forked))
    argv = [*SMALL, "--model", tiny, "--reward", "success", "--iterations", "1", "--runs-dir", str(tmp_path / "runs")]
    sweep(*argv, "--workers", "1", "--sweep", f"data={PROBLEMS}")
    assert len([*(tmp_path / "runs").glob("*/model")]) == 1


# ------------------------------------------------------------------------------------------------ what an ORM says


def finished(correct: bool, steps: int = 4, repeats: int = 0, truncated: bool = False) -> dict:
    return dict(correct=correct, steps=steps, repeats=repeats, truncated=truncated)


def test_what_an_orm_says_of_right_and_wrong_answers_is_as_by_hand():
    answers = [*map(finished, (True, True, False, False)), finished(False, 50, 9, truncated=True)]
    found = train.outcome_metrics(torch.tensor([0.9, 0.7, 0.2, 0.4, 99.0]), answers)
    # about their mean, 0.55, the squares are 0.29; about the means 0.8 and 0.3 they are 0.04
    expected = {"outcome_right": 0.8, "outcome_wrong": 0.3}
    expected |= {"outcome_explained_by_correct": 1 - 0.04 / 0.29, "outcome_explained_by_more": 1 - 0.04 / 0.29}
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_variance_explained_is_that_of_least_squares():
    generator = torch.Generator().manual_seed(0)
    correct, steps, repeats = (torch.randint(0, n, (60,), generator=generator).double() for n in (2, 9, 4))
    noise = torch.randn(60, generator=generator, dtype=torch.float64)
    answers = [finished(bool(c), int(s), int(r)) for c, s, r in zip(correct, steps, repeats)]
    by = lambda y: [train.outcome_metrics(y, answers)[f"outcome_explained_by_{what}"] for what in ("correct", "more")]
    y = 0.5 + 0.3 * correct - 0.05 * steps + 0.1 * noise
    r2 = []
    for columns in ([correct], [correct, steps, repeats]):
        x = torch.stack([torch.ones(60), *columns], 1)
        y_hat = x @ torch.linalg.solve(x.T @ x, x.T @ y)
        r2.append(1 - ((y - y_hat) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    assert by(y) == pytest.approx([x.item() for x in r2], abs=1e-9) and r2[0] + 0.05 < r2[1]
    assert by(0.2 + 0.6 * correct) == pytest.approx([1, 1])
    assert by(0.2 + 0.6 * correct - 0.03 * steps + 0.01 * repeats)[1] == pytest.approx(1)


@pytest.mark.parametrize(
    "outcomes, answers, known",
    [
        ([0.9, 0.7], [finished(True)] * 2, {"outcome_right": 0.8, "outcome_explained_by_correct": 0}),
        ([0.9, 0.7], [finished(False)] * 2, {"outcome_wrong": 0.8, "outcome_explained_by_correct": 0}),
        ([0.9, 0.9], [finished(True), finished(False)], {"outcome_right": 0.9, "outcome_wrong": 0.9}),
        ([0.9], [finished(True)], {"outcome_right": 0.9}),
        ([0.9, 0.3], [finished(False, truncated=True)] * 2, {}),
        ([], [], {}),
    ],
)
def test_where_there_is_nothing_to_explain_or_no_answer_of_a_kind_it_is_nan(outcomes, answers, known):
    found = train.outcome_metrics(torch.tensor(outcomes), answers)
    known |= {"outcome_explained_by_more": 0} if "outcome_explained_by_correct" in known else {}
    assert {k: v for k, v in found.items() if v == v} == pytest.approx(known, abs=1e-6) and len(found) == 4
