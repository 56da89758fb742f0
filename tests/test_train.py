"""train.py as a user meets it: options, errors, data, the loop and what it logs. One process, untrained models."""

import json
import math
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from helpers import model_terms, tolerance
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

CPU = torch.device("cpu")
PROBLEMS = Path(tempfile.mkdtemp()) / "problems.jsonl"
PROBLEMS.write_text("\n".join(json.dumps(vars(p)) for p in toy_problems("train", 100)))
SMALL = (
    f"--data {PROBLEMS} --prompt {{question}} --prompts-per-iteration 8 --samples-per-prompt 2 --iterations 3 "
    "--minibatches 2 --max-new-tokens 24 --eval-problems 6 --eval-every 2 --token-budget 128 --lr 1e-3 "
    "--critic-lr 1e-3 --label-problems 24 --completions 2 --rm-epochs 4 --rm-lr 1e-3 --rm-head-lr 0.1 --lr-warmup 1"
).split()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A random model with the embedded world's tokenizer, as a Hugging Face folder outside the project."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = toy_tokenizer()
    toy_model(tokenizer, seed=0, hidden=16, layers=1, heads=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory) -> list[str]:
    """Options of a short run of that model; these runs share labels and reward models."""
    return [*SMALL, "--model", tiny, "--runs-dir", str(tmp_path_factory.mktemp("runs"))]


def run(*argv: str) -> Path:
    """A run in this process; returns its folder."""
    with patch.object(sys, "argv", ["train.py", *argv]):
        train.main()
    opts, _ = train.parse([*argv])
    return Path(opts.runs_dir) / (opts.name or f"run-{opts.reward}-s{opts.seed}")


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def metrics(folder: Path) -> list[dict]:
    """Everything that is logged but time."""
    return [{k: v for k, v in row.items() if "second" not in k} for row in lines(folder, "metrics.jsonl")]


# ------------------------------------------------------------------------------------------------ options


def test_each_preset_names_only_options_that_exist_and_is_said_to_run():
    for name in train.PRESETS:
        opts, said = train.parse(["--preset", name])
        assert opts.preset == name and f"preset: {name} (" in said
    opts, said = train.parse(["--model", "somewhere"])
    assert opts.preset == "" and "preset: none (" in said
    expected = train.DEFAULT if torch.cuda.is_available() else "toy"
    assert train.parse([])[0].preset == expected
    own = train.parse(["--preset", "toy", "--iterations", "3", "--model", "somewhere"])[0]
    assert (own.iterations, own.model, own.slots) == (3, "somewhere", 768)  # what is given by hand stands


def test_a_backslash_n_from_the_shell_is_a_line_break():
    opts, _ = train.parse(["--preset", "toy", "--separator", r"\n\n", "--prompt", r"Q: {question}\nA:"])
    assert opts.separator == "\n\n" and opts.prompt == "Q: {question}\nA:"


def test_every_option_of_every_script_has_a_help_text_and_is_none_that_torchrun_takes_for_its_own():
    known = [option for action in get_args_parser()._actions for option in action.option_strings]
    for kind in (train.TrainOptions, evaluation.EvalOptions, prm.ScriptOptions):
        for name, field in kind.__dataclass_fields__.items():
            assert field.metadata.get("help"), name
            for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
                assert flag not in known and not any(option.startswith(flag) for option in known), flag


def test_alpha_has_one_default_for_every_learned_reward_but_delta_and_is_overridden_by_hand():
    for reward in train.REWARDS:
        alpha = train.parse(["--preset", "toy", "--reward", reward])[0].alpha
        assert alpha == {"success": 0, "delta": 0.3}.get(reward, 0.5)
    assert train.parse(["--preset", "toy", "--reward", "delta", "--alpha", "0.7"])[0].alpha == 0.7


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--reward success --prm x", "--prm is not used"),
        ("--reward orm --prm x", "--prm is not used"),
        ("--reward success --alpha 1", "--alpha .* drop it"),
        ("--reward delta --eta 0.3", "--eta .* drop it"),
        ("--reward orm --labels oracle", "--labels oracle .* drop it"),
        ("--prm x --flip-labels 0.1 --reward prm", "--flip-labels .* drop it"),
        ("--data gsm8k", "needs a --model"),
        ("--data sums", "--data sums cannot read --eval-data toy"),
        ("--minibatches 1000", "more than the 768 answers"),
        ("--prompt Q:", "{question}"),
        ("--separator=", "--separator must not be empty"),
        ("--preset nothing", "there is none of that name, choose toy, sums"),
        ("--prm-format qwen", "give both, or neither"),
        ("--log wandb", "--log-to wandb.*pip install"),
        ("--log-to tensorboard", "--log-to tensorboard.*pip install"),
        ("--name ..", "must be a plain name"),
        ("--name .", "must be a plain name"),
        ("--name a/b", "must be a plain name"),
        ("--name cache", "must be a plain name"),
    ],
)
def test_wrong_combinations_fail_at_parse_time_with_the_mend(argv, words):
    with pytest.raises(UserError, match=words):
        argv = argv.split()
        train.parse(argv if "--preset" in argv else ["--preset", "toy", *argv])


def test_questions_that_the_processes_cannot_share_are_refused_with_the_mend(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--prompts-per-iteration .* 2 processes"):
        train.parse(["--preset", "toy", "--prompts-per-iteration", "9"])


# ------------------------------------------------------------------------------------------------ errors


def fails(monkeypatch, capsys, *argv: str) -> str:
    """The sentence on stderr of a call that must end with status 2."""
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    with pytest.raises(SystemExit) as stop:
        data.run_script(train.main)
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "Traceback" not in said
    return said.splitlines()[-1]


def test_bad_input_gets_one_sentence_and_status_2(monkeypatch, capsys, tmp_path, tiny):
    runs, good = tmp_path / "runs", '{"question": "1+1", "answer": "2"}\n'
    fail = lambda *argv: fails(monkeypatch, capsys, "--runs-dir", str(runs), "--model", tiny, *argv)
    (tmp_path / "malformed.jsonl").write_text(good + '{"question": \n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"question": "1+" * 600 + "1=", "answer": "601"}))
    (tmp_path / "no_tokenizer").mkdir()
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path / "no_tokenizer")
    assert "unrecognized arguments: --rewrad" in fail("--rewrad", "delta")
    assert "invalid choice" in fail("--reward", "deltas")
    assert "no such file" in fail("--data", str(tmp_path / "missing.jsonl"))
    assert "malformed.jsonl line 2: not JSON" in fail("--data", str(tmp_path / "malformed.jsonl"))
    assert "1 of 1 prompts" in fail("--data", str(tmp_path / "long.jsonl"))
    usual = ("--data", str(PROBLEMS))
    assert "tokenizer" in fail(*usual, "--model", str(tmp_path / "no_tokenizer"))
    assert "neither a reward model that prm.py trained" in fail(*usual, "--reward", "delta", "--prm", tiny)
    assert "--name ..: must be a plain name" in fail(*usual, "--name", "..")
    assert not (tmp_path / "config.json").exists() and not [*runs.rglob("*.json*")]


def test_an_existing_run_is_neither_overwritten_nor_resumed_with_other_options(small):
    argv = [*small, "--reward", "success", "--seed", "5", "--iterations", "1"]
    folder = run(*argv)
    assert folder.name == "run-success-s5"  # from preset, reward and seed
    with pytest.raises(UserError, match="run-success-s5 exists: --resume continues it, another --name"):
        run(*argv)
    with pytest.raises(UserError, match=r"another configuration \(beta 0.02 -> 0.5\)"):
        run(*argv, "--resume", "--beta", "0.5")
    before = metrics(folder)
    assert run(*argv, "--resume") == folder and metrics(folder) == before


# ------------------------------------------------------------------------------------------------ data


def test_questions_that_the_evaluation_asks_repeat_or_are_too_long_are_dropped_and_counted(tmp_path, capsys, tiny):
    def file(name: str, *questions: str) -> str:
        rows = [json.dumps({"question": q, "answer": "1"}) + "\n" for q in questions]
        (tmp_path / name).write_text("".join(rows))
        return str(tmp_path / name)

    a = file("a.jsonl", "What is 1+1?", "What  is\n1+1? ", "what is 1+1?", "x")
    b = file("b.jsonl", "x", "1+" * 600 + "1", "What is 25?")
    test = file("test.jsonl", "y", "What is 1+1?")
    argv = ["--data", f"{a},{b}", "--eval-data", test, "--model", tiny, "--eval-problems", "1"]
    problems, prompts, evaluated = train.load_data(train.parse(argv)[0])
    assert [p.question for p in problems] == ["what is 1+1?", "x", "What is 25?"] and len(prompts) == 3
    assert [p.source for p in problems[::2]] == [a, b] and [p.question for p in evaluated] == ["y"]
    dropped = "2 that the evaluation asks too, 1 that repeat another, 1 that have more than 1024 tokens"
    assert f"3 training questions; dropped: {dropped}" in capsys.readouterr().out
    with pytest.raises(UserError, match="question is left .*2 that the evaluation asks too.*another --eval-data"):
        train.load_data(train.parse([*argv, "--data", test])[0])
    train.load_data(train.parse(["--data", a, "--model", tiny])[0])
    assert "training and evaluation ask the same questions; --eval-data names others" in capsys.readouterr().out


def test_each_pass_asks_each_question_once_in_an_order_of_its_own():
    trainer = SimpleNamespace(opts=SimpleNamespace(prompts_per_iteration=6, seed=0), problems=[None] * 9)
    asked = [q for i in range(1, 10) for q in train.Trainer.questions(trainer, i)]  # 54
    passes = [tuple(asked[i : i + 9]) for i in range(0, 54, 9)]
    assert all(sorted(one) == [*range(9)] for one in passes) and len({*passes}) == 6


# ------------------------------------------------------------------------------------------------ the loop


@pytest.mark.parametrize("reward", ["success", "orm", "prm", "clip-delta"])
def test_a_reward_runs_from_labels_to_a_model_that_transformers_loads(reward, small, tiny, capsys):
    folder = run(*small, "--reward", reward, "--name", reward)
    rows, samples = metrics(folder), lines(folder, "samples.jsonl")
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
    assert all(row["max_ratio_error_first"] == 0 for row in rows[1:])  # recomputed by the same forward: exactly 1
    learns = reward != "success"  # a random policy is never right, and success alone gives it nothing to learn from
    assert rows[1]["kl"] == 0 and (rows[3]["kl"] != 0) == learns
    assert "greedy_accuracy" in rows[0] and "greedy_accuracy" in rows[2] and "greedy_accuracy" not in rows[1]
    assert "greedy accuracy" in capsys.readouterr().out
    before, after = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (tiny, folder / "model"))
    assert any(not torch.equal(before[k], after[k]) for k in before) == learns
    assert AutoTokenizer.from_pretrained(folder / "model").get_vocab() == toy_tokenizer().get_vocab()
    for row in samples:
        K = row["steps"]
        if reward in ("prm", "clip-delta"):
            assert len(row["scores"]) == len(row["refined"]) == K and all(0 < score < 1 for score in row["scores"])
        assert (row["outcome"] is not None) == (reward == "orm")
    if reward == "orm":  # no answer is right, so that there is no mean of the right ones
        assert all(row["outcome_right"] is None and 0 < row["outcome_wrong"] < 1 for row in rows[1:])
    tracked = [row for row in samples if row["tracked"]]
    assert [row["iteration"] for row in tracked] == [1, 2, 3] and len({row["question"] for row in tracked}) == 1
    assert tracked[0]["response"] == tracked[1]["response"] or learns  # the same random numbers
    assert len(samples) == 3 * 5


@pytest.mark.parametrize("reward", ["orm", "prm"])
def test_the_metrics_are_means_over_the_answers_without_the_tracked_one(reward, small, monkeypatch):
    """All four answers of an iteration are in samples.jsonl. Right are those of even length."""
    kind = lambda gold, text: SimpleNamespace(kind="mismatch" if len(text) % 2 else "match")
    monkeypatch.setattr(data, "verdict", kind)
    few = "--prompts-per-iteration 2 --samples-per-prompt 2 --iterations 4 --eval-every 0".split()
    folder = run(*small, *few, "--reward", reward, "--name", f"means-{reward}")
    mean = lambda values: sum(values) / len(values) if values else math.nan
    samples = lines(folder, "samples.jsonl")
    for row in lines(folder, "metrics.jsonl")[1:]:
        answers = [a for a in samples if a["iteration"] == row["iteration"] and not a["tracked"]]
        assert len(answers) == 4 and row["mismatch"] == sum(a["verdict"] == "mismatch" for a in answers)
        expected = {key: mean([a[key] for a in answers]) for key in ("steps", "tokens", "repeats", "truncated")}
        expected["success"] = mean([a["correct"] for a in answers])
        if reward == "prm":
            expected["learned_reward"] = mean([sum(a["refined"]) for a in answers])
        else:
            expected["learned_reward"] = mean([a["outcome"] for a in answers])
            for name, right in (("outcome_right", True), ("outcome_wrong", False)):
                expected[name] = mean([a["outcome"] for a in answers if a["correct"] == right and not a["truncated"]])
        found = {key: math.nan if row[key] is None else row[key] for key in expected}
        assert found == pytest.approx(expected, rel=0, abs=tolerance(8), nan_ok=True)
        total = row["kl"] * -0.02 + row["success"] + 0.5 * row["learned_reward"]
        if not row["truncated"] or reward == "prm":  # the outcome score of a truncated answer is not paid
            assert row["return"] == pytest.approx(total, rel=0, abs=tolerance(3 * 24))  # a sum over the tokens


def test_labels_are_cached_and_made_anew_for_other_settings(tmp_path, small, capsys):
    argv = [*small, "--iterations", "1", "--runs-dir", str(tmp_path), "--eval-every", "0", "--reward"]
    made = lambda *more: (run(*argv, *more), capsys.readouterr().out)[1]
    assert made("prm").count("making") == 2  # labels, prm
    assert made("clip").count("cached in") == 2
    out = made("orm")
    assert out.count("cached in") == 1 and out.count("making") == 1  # the same labels
    assert made("delta", "--completions", "3").count("making") == 2


@pytest.mark.parametrize("kind", ["trl", "own"])
def test_a_reward_model_with_another_tokenizer_scores_each_step_of_the_policy(kind, tmp_path, small):
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
    argv = [*small, "--reward", "prm", "--name", kind, "--iterations", "1", "--prm", str(folder)]
    rows = lines(run(*argv), "samples.jsonl")
    assert rows and all(len(row["scores"]) == row["steps"] for row in rows)
    for row in rows:
        steps = data.steps_of(row)
        for k, end in enumerate(row["char_ends"]):
            ids = other.encode(row["question"])
            if kind == "trl":
                ids += [i for step in steps[: k + 1] for i in other.encode(step.strip()) + other.encode("\n")]
                expected = stock(torch.tensor([ids])).logits[0, -1].softmax(-1)[1]
            else:
                last = not row["truncated"] and end == len(row["response"])
                ids += [i for step in steps[: k + 1] for i in other.encode(step)] + [other.eos_token_id] * last
                expected = reward_model(model.Packed([ids], prompt_lengths=[1]))[-1].sigmoid()
            assert abs(row["scores"][k] - expected.item()) <= tolerance(model_terms(lm.config, len(ids)))


def test_a_reward_model_that_cannot_read_an_answer_stops_the_run_and_the_last_checkpoint_stands(
    tmp_path, small, monkeypatch
):
    other, folder, calls = other_tokenizer(), tmp_path / "prm", []
    model.ScalarModel(toy_model(other, seed=1, hidden=16, layers=1, heads=2)).save(other, folder)
    read = prm.Reader.__call__

    def short(self, *args):
        calls.append(1)
        self.limit = 1024 if len(calls) < 3 else 5
        return read(self, *args)

    monkeypatch.setattr(prm.Reader, "__call__", short)
    argv = [*small, "--reward", "prm", "--runs-dir", str(tmp_path), "--name", "a", "--prm", str(folder)]
    with pytest.raises(UserError, match="reads 5 tokens, and an answer takes"):
        run(*argv, "--save-every", "2")
    assert (tmp_path / "a" / "checkpoint-000002").is_dir()


def test_several_evaluation_sets_are_told_apart(tmp_path, small, capsys):
    for name, questions in (("a", 3), ("b", 2)):
        rows = [json.dumps(vars(p)) for p in toy_problems("test", 5)[-questions:]]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    names = [f"{tmp_path}/{name}.jsonl" for name in "ab"]
    argv = [*small, "--reward", "success", "--name", "sets", "--iterations", "1"]
    row = metrics(run(*argv, "--eval-data", ",".join(names)))[0]
    a, b = (row[f"greedy_accuracy:{name}"] for name in names)
    assert row["greedy_accuracy"] == pytest.approx((3 * a + 2 * b) / 5) and f"sampled_stderr:{names[1]}" in row
    assert "/a.jsonl " in capsys.readouterr().out  # a line of the table


@pytest.mark.parametrize("service", ["wandb", "tensorboard"])
def test_metrics_go_to_a_service_that_is_installed_and_asked_for(service, small, monkeypatch):
    seen = []

    class Writer:
        def __init__(self, folder, purge_step):
            assert folder.endswith("/tensorboard/tensorboard") and purge_step == 1

        def flush(self):
            pass

        def add_scalar(self, name, value, step):
            seen.append((step, {name: value}))

    def init(**more):
        assert more["name"] == "wandb" and more["resume"] == "allow" and more["config"]["reward"] == "success"
        return wandb

    wandb, board, writer = (ModuleType(name) for name in ("wandb", "tensorboard", "torch.utils.tensorboard"))
    wandb.init, wandb.log, writer.SummaryWriter = init, lambda row, step: seen.append((step, row)), Writer
    for module in (wandb, board, writer):
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    argv = [*small, "--reward", "success", "--name", service, "--iterations", "2", "--log", service]
    rows = lines(run(*argv), "metrics.jsonl")
    for step in (1, 2):
        found = {k: v for at, part in seen if at == step for k, v in part.items()}
        assert found == {k: v for k, v in rows[step].items() if k != "iteration" and v is not None}


def test_metrics_depend_on_the_seed_and_not_on_slots_or_token_budget(small, tiny):
    argv = [*small, "--reward", "success", "--iterations", "1", "--eval-every", "0", "--name"]
    runs = (run(*argv, "a"), run(*argv, "b", "--slots", "3", "--token-budget", "4096"), run(*argv, "c", "--seed", "1"))
    a, b, c = (metrics(folder)[1] for folder in runs)
    terms = 2 * model_terms(model.load_config(tiny), 24 + 20)
    equal = lambda x, y: abs(x - y) <= tolerance(terms, max(1, abs(x)))
    assert all(equal(a[k], b[k]) for k in a) and not equal(a["tokens"], c["tokens"])


def test_bfloat16_forward_keeps_float32_weights_and_the_first_ratio(small):
    folder = run(*small, "--reward", "delta", "--name", "low", "--iterations", "2", "--dtype", "bfloat16")
    model.gpus.cache_clear()  # it holds the process group, of one, that is gone
    assert all(row["max_ratio_error_first"] == 0 for row in metrics(folder)[1:])
    assert AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto").dtype == torch.float32


# ------------------------------------------------------------------------------------------------ numbers, memory


def test_a_loss_that_is_not_finite_is_an_error(small, monkeypatch):
    whiten = train.whiten
    monkeypatch.setattr(train, "whiten", lambda a, mask: whiten(a, mask) * math.nan)
    with pytest.raises(UserError, match="iteration 1: losses or gradients are not finite; lower the learning rates"):
        run(*small, "--reward", "delta", "--name", "nan-loss")


def with_broken_norms(monkeypatch, which) -> None:
    """Of the steps with these numbers, from 0: four in each iteration, two of the policy and two of the critic."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def norm(*args):
        calls.append(clip(*args))
        return calls[-1] * math.inf if len(calls) - 1 in which else calls[-1]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", norm)


def test_a_step_whose_gradient_is_not_finite_is_skipped_and_counted(small, monkeypatch):
    run(*small, "--reward", "delta", "--name", "prepared", "--iterations", "1")  # its reward model takes steps, too
    with_broken_norms(monkeypatch, {4, 5})
    rows = metrics(run(*small, "--reward", "delta", "--name", "skips"))
    assert [row.get("skipped_steps") for row in rows] == [None, 0, 2, 0]
    assert rows[2]["grad_norm_policy"] is None and rows[2]["policy_loss"] is not None  # null in JSON
    with_broken_norms(monkeypatch, {6, 7, 8, 9})
    with pytest.raises(UserError, match="iteration 3: losses or gradients are not finite"):
        run(*small, "--reward", "delta", "--name", "stops", "--save-every", "1")
    assert [p.name for p in (Path(small[-1]) / "stops").glob("checkpoint-*")] == ["checkpoint-000002"]


def probe(small: list[str], *more: str) -> None:
    opts, _ = train.parse([*small, *more])
    train.probe(opts, train.load_data(opts), CPU)


@pytest.mark.parametrize("reward", ["success", "clip-delta"])
def test_the_probe_runs_what_an_iteration_runs_on_the_largest_micro_batch(reward, small, monkeypatch):
    longest, forward = [], model.ScalarModel.forward

    def seen(self, packed):
        longest.append(len(packed.ids[0]))
        return forward(self, packed)

    monkeypatch.setattr(model.ScalarModel, "forward", seen)
    probe(small, "--reward", reward)
    # the reward model's training and its scores, the critic
    assert len(longest) == (1 if reward == "success" else 3) and 128 - 24 - 20 < min(longest) <= 128


@pytest.mark.parametrize("name", ["adam", "score_values", "score_logps"])
def test_what_does_not_fit_the_gpu_is_one_sentence_with_the_mend(name, small, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(train, name, full)
    with pytest.raises(UserError, match="does not fit the GPU") as error:
        probe(small, "--reward", "clip-delta")
    for mend in ("--slots", "--token-budget", "--checkpoint-activations", "--offload-frozen"):
        assert mend in str(error.value)
    assert "\n" not in str(error.value)
