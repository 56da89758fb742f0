"""Several processes and sudden ends: the same result in every world, resume, kills, signals, checkpoints, damage.

    python tests/test_distributed.py 100     # kills at 100 random moments, instead of 3

The processes of a world are forked from this one, which spares each the imports; one test goes through torchrun."""

import gc
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed.run as torchrun
from helpers import model_terms, tolerance
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
import model
import train
from data import UserError, run_script, toy_problems, toy_tokenizer
from model import Policy, on_rank_0, processes, rank, shard, toy_model
from ppo import last_micro_batch
from rollout import Batch

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")
UNTRAINED = toy_model(toy_tokenizer(), seed=0, hidden=32, layers=2, heads=2)
TERMS = 2 * model_terms(UNTRAINED.config, 32)  # of the sums in a forward and backward pass
STEPS = 6  # of the optimizer, in a run
SHORT = (
    "--prompt {question} --prompts-per-iteration 8 --samples-per-prompt 2 --iterations 3 --minibatches 2 "
    "--max-new-tokens 12 --eval-problems 4 --eval-every 2 --save-every 1 --token-budget 100 --lr 1e-3 --critic-lr 1e-3 "
    "--label-problems 24 --completions 2 --rm-lr 1e-3 --rm-head-lr 0.1 --lr-warmup 1 --reward clip-delta"
).split()


@pytest.fixture(scope="module")
def argv(tmp_path_factory) -> list[str]:
    """Options of a short run: a Qwen2 folder, a JSONL file, clip-delta with a PRM that is made here and shared."""
    return arguments(tmp_path_factory.mktemp("distributed"))


def arguments(folder: Path) -> list[str]:
    UNTRAINED.save_pretrained(folder / "lm")
    toy_tokenizer().save_pretrained(folder / "lm")
    rows = [json.dumps(vars(p)) for p in toy_problems("train", 60)]
    (folder / "problems.jsonl").write_text("\n".join(rows))
    where = {"--model": "lm", "--runs-dir": "runs", "--data": "problems.jsonl"}
    return [*SHORT, *(x for option, name in where.items() for x in (option, str(folder / name)))]


def folder_of(argv: list[str], name: str) -> Path:
    last = len(argv) - 1 - argv[::-1].index("--runs-dir")  # the last one counts
    return Path(argv[last + 1]) / name


# ------------------------------------------------------------------------------------------------ worlds


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(world: int, main, log: Path, **environment) -> list:
    """Processes that call main() as torchrun would; what they print goes to log.RANK."""
    port, started = free_port(), []
    log.parent.mkdir(parents=True, exist_ok=True)
    gc.freeze()  # a child's collector would copy every page that it looks at

    def child(number):
        with open(f"{log}.{number}", "wb", buffering=0) as file:
            for fd in (1, 2):
                os.dup2(file.fileno(), fd)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)
        if world > 1:
            os.environ |= dict(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(world))
            os.environ |= dict(LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT=str(port))
        os.environ |= environment
        run_script(main)

    for number in range(world):
        started.append(get_context("fork").Process(target=child, args=(number,)))
        started[-1].start()
    return started


def trainer(argv: list[str], **replaced):
    """train.py's main() with these arguments."""

    def main():
        sys.argv = ["train.py", *argv]
        vars(train).update(replaced)
        train.main()

    return main


def finish(started: list, log: Path, timeout: float = 90) -> tuple[list[int], str]:
    """Their exit codes, and all that they have printed."""
    end = time.monotonic() + timeout
    for p in started:
        p.join(max(0, end - time.monotonic()))
    hanging = [p for p in started if p.is_alive()]
    for p in hanging:
        p.kill()
        p.join()
    printed = "".join(Path(f"{log}.{number}").read_text() for number in range(len(started)))
    assert not hanging, printed
    return [p.exitcode for p in started], printed


def both_succeed(main, log: Path, **environment):
    codes, printed = finish(start(2, main, log, **environment), log)
    assert codes == [0, 0], printed


def run(world: int, argv: list[str], name: str, *more: str) -> None:
    """A run to its end in that many processes."""
    log = folder_of(argv, f"{name}.log")
    codes, printed = finish(start(world, trainer([*argv, "--name", name, *more]), log), log)
    assert codes == [0] * world, printed


def in_this_process(argv: list[str], name: str, *more: str) -> Path:
    with patch.object(sys, "argv", ["train.py", *argv, "--name", name, *more]):
        train.main()
    return folder_of(argv, name)


def metrics(folder: Path) -> list[dict]:
    """Everything that is logged but time."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def weights(folder: Path) -> torch.Tensor:
    found = load_file(folder / "model.safetensors")
    return torch.cat([found[name].flatten() for name in sorted(found)])


def assert_bit_equal(a: Path, b: Path):
    assert metrics(a) == metrics(b)
    assert torch.equal(*(weights(folder / "model") for folder in (a, b)))
    samples = [(folder / "samples.jsonl").read_text() for folder in (a, b)]
    assert samples[0] == samples[1]


def assert_close_weights(got: Path, want: Path, argv: list[str], steps: int):
    """Up to rounding in each step. Of all together: Adam divides by a gradient's size, and that of some is rounding."""
    before, a, b = (weights(folder) for folder in (Path(argv[argv.index("--model") + 1]), got, want))
    assert (a - b).norm() <= tolerance(steps * TERMS) * (b - before).norm()


def assert_close(got: Path, want: Path, argv: list[str]):
    """Equal but for the order of the sums, and the same samples."""
    for a, b in zip(metrics(want), metrics(got), strict=True):
        assert b == {k: pytest.approx(v, rel=0, abs=tolerance(TERMS, max(1, abs(v)))) for k, v in a.items()}
        assert all(a.get(k) == b.get(k) for k in ("tokens", "steps", "success", "greedy_tokens"))
    assert_close_weights(got / "model", want / "model", argv, STEPS)


@pytest.fixture(scope="module")
def alone(argv) -> Path:
    """The run of one process, to its end: what all others are compared with."""
    run(1, argv, "alone")
    return folder_of(argv, "alone")


@pytest.fixture(scope="module")
def two(argv, alone) -> Path:
    """The same of two processes."""
    run(2, argv, "two")
    return folder_of(argv, "two")


def test_two_processes_end_with_the_metrics_and_weights_of_one(two, alone, argv):
    assert_close(two, alone, argv)
    rows = [json.loads(line) for line in (two / "samples.jsonl").read_text().splitlines()]
    assert [row["tracked"] for row in rows] == ([True] + [False] * 4) * 3  # the tracked question is rank 0's alone


def test_two_nodes_of_two_processes_end_with_those_of_one(argv, alone):
    """They hold the model once a node."""
    name, more = "nodes", ("--iterations", "1", "--eval-problems", "2")
    log = folder_of(argv, f"{name}.log")
    codes, printed = finish(start(4, trainer([*argv, "--name", name, *more]), log, LOCAL_WORLD_SIZE="2"), log)
    assert codes == [0] * 4, printed
    assert_close(folder_of(argv, name), in_this_process(argv, "alone2", *more), argv)


def test_two_processes_make_the_labels_and_the_reward_model_of_one(argv, alone, tmp_path):
    def main():
        with processes() as device:
            opts, _ = train.parse([*argv, "--runs-dir", str(tmp_path)])
            problems, _, _ = train.load_data(opts)
            train.prepare(opts, problems, device)

    both_succeed(main, tmp_path / "log")
    caches = [alone.parent / "cache", tmp_path / "cache"]
    one, two = ((next(cache.glob("labels-*")) / "labels.jsonl").read_text() for cache in caches)
    assert one == two and one.count("\n") == 24
    one, two = (next(cache.glob("prm-*")) for cache in caches)
    assert_close_weights(two, one, argv, steps=2)
    one, two = (load_file(prm / "head.safetensors")["weight"] for prm in (one, two))
    assert (one - two).norm() <= tolerance(2 * TERMS, one.norm())


def test_ranks_with_unequal_lengths_run_as_many_micro_batches(tmp_path):
    def main():
        with processes():
            sizes = [[3, 9], [9, 9, 9, 1]][rank()]  # tokens: one micro-batch of up to 12 tokens, three of them
            batch = Batch([[1]] * len(sizes), [[2] * n for n in sizes], torch.zeros(len(sizes), dtype=torch.bool))
            first, second = batch.micro_batches([[*range(len(sizes))], []], 14, "cpu")
            assert len(first) == 3 and second == []
            assert sorted(i for micro in first for i in micro.rows) == [*range(len(sizes))]
            out = torch.zeros(batch.mask.shape)
            for micro in first:
                batch.lay_out(out, micro.rows, micro.targets)
            assert torch.equal(out, 2.0 * batch.mask)

    both_succeed(main, tmp_path / "log")


def test_only_rank_0_reads_the_weights_and_ties_and_values_survive_sharding(tmp_path, argv):
    path = argv[argv.index("--model") + 1]

    def main():
        with processes() as device:
            homes = []
            make = lambda home: homes.append(home) or Policy(model.load_causal_lm(path, device=home))
            policy = shard(make, torch.float32, device)
            assert homes == ["cpu" if rank() == 0 else "meta"]
            assert policy.lm.lm_head.weight is policy.lm.model.embed_tokens.weight
            plain = model.load_causal_lm(path)
            mine = sum(p.to_local().numel() for p in policy.parameters())
            assert abs(mine / plain.num_parameters() - 0.5) < 0.05
            copy = model.replica(policy.lm, torch.bfloat16, device)
            model.sync(copy, policy.lm)
            for a, b, c in zip(plain.parameters(), policy.parameters(), copy.parameters()):
                assert torch.equal(a, model.whole(b)) and torch.equal(a.bfloat16(), c)
            for a, b in zip(plain.buffers(), copy.buffers()):
                assert torch.equal(a, b)

    both_succeed(main, tmp_path / "log")


def test_a_gradient_summed_once_a_step_over_nodes_is_that_of_every_pass(tmp_path, argv):
    """ppo.last_micro_batch, with two nodes of one process each."""
    path = argv[argv.index("--model") + 1]

    def main():
        with processes() as device:
            gradients = []
            for deferred in (False, True):
                make = lambda home: model.ScalarModel(model.load_causal_lm(path, device=home))
                critic = shard(make, torch.float32, device)
                for i, n in enumerate((3, 5, 4)):
                    if deferred:
                        last_micro_batch(critic, i == 2)
                    values = critic(model.Packed([[*range(2, 2 + n + rank())]]))
                    ((values - 1) ** 2).sum().backward()
                gradients.append([model.whole(p.grad) for p in critic.parameters()])
            largest = max(g.abs().max() for g in gradients[0])
            assert largest > 1
            for a, b in zip(*gradients):
                assert (a - b).abs().max() <= tolerance(TERMS, largest)

    both_succeed(main, tmp_path / "log", LOCAL_WORLD_SIZE="1")


def test_what_rank_0_makes_is_everyones(tmp_path):
    def main():
        with processes():
            assert on_rank_0(rank) == 0 and on_rank_0(os.getpid) == on_rank_0(os.getpid)

    both_succeed(main, tmp_path / "log")


def test_a_mistake_that_rank_0_sees_is_one_sentence_of_it_and_ends_all(argv, alone, tmp_path):
    codes, printed = finish(start(2, trainer([*argv, "--name", "alone"]), tmp_path / "log"), tmp_path / "log")
    assert codes[0] == 2 and codes[1] != 0 and "alone exists: --resume continues it" in printed


# ------------------------------------------------------------------------------------------------ sudden ends


def test_a_run_resumes_bit_equal_in_its_world_and_close_in_another(argv, alone, two, tmp_path):
    """The ranks count restarts differently, as on two nodes of which torchrun restarts one for the other's failure."""
    run(2, argv, "halves", "--iterations", "2", "--save-every", "0")
    shutil.copytree(folder_of(argv, "halves"), folder_of(argv, "other"))

    def main():
        os.environ["TORCHELASTIC_RESTART_COUNT"] = os.environ["RANK"]
        trainer([*argv, "--name", "halves"])()  # without --resume

    both_succeed(main, tmp_path / "log")
    assert_bit_equal(folder_of(argv, "halves"), two)
    assert_close(in_this_process(argv, "other", "--resume"), alone, argv)


def test_torchrun_restarts_a_run_whose_rank_was_killed_and_it_ends_bit_equal(argv, two, tmp_path):
    """With the default name, which both tries find. The rank is killed in the third iteration of the first try."""
    iteration, launch = train.Trainer.iteration, torchrun.elastic_launch

    class Killed(train.Trainer):
        def iteration(self, i):
            if i == 3 and rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                (tmp_path / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return iteration(self, i)

    def forked(config, entrypoint):  # spares both tries the imports
        return launch(replace(config, start_method="fork"), lambda *_: trainer(argv, Trainer=Killed)())

    def main():
        torchrun.elastic_launch = forked
        torchrun.main(["--standalone", "--nproc_per_node", "2", "--max-restarts", "1", "train.py"])

    codes, printed = finish(start(1, main, tmp_path / "log", OMP_NUM_THREADS="1"), tmp_path / "log")
    assert codes == [0] and (tmp_path / "killed").exists(), printed
    assert_bit_equal(folder_of(argv, "run-clip-delta-s0"), two)


def attempt(argv: list[str], name: str, seconds: float | None) -> bool:
    """Start or resume a run. True if it was killed, after so many seconds; else it must have ended well."""
    log = folder_of(argv, f"{name}.log")
    (process,) = start(1, trainer([*argv, "--name", name, "--resume"]), log)
    if seconds is not None:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            return True
    codes, printed = finish([process], log)
    assert codes == [0], printed
    return False


def kill_at_random(argv: list[str], kills: int, seed: int = 0) -> int:
    """Kill runs at random moments, from the preparation to the export, and resume each until it is complete and equal
    to one that was let be. Returns how many were completed."""
    small = "--prompts-per-iteration 4 --minibatches 1 --eval-problems 2 --label-problems 8".split()
    argv, rng, hits, completed = [*argv, *small], random.Random(seed), 0, 0
    began = time.monotonic()
    attempt(argv, "whole", None)
    longest = time.monotonic() - began
    while hits < kills:
        name = f"killed{completed}"
        shutil.rmtree(folder_of(argv, "cache"))
        while attempt(argv, name, rng.uniform(0, longest) if hits < kills else None):
            hits += 1
            assert len(train.checkpoints(folder_of(argv, name))) <= 2  # the new one, and that before it
        assert_bit_equal(folder_of(argv, name), folder_of(argv, "whole"))
        completed += 1
    return completed


def test_a_run_killed_at_3_random_moments_ends_as_if_it_had_not_been(tmp_path):
    assert kill_at_random(arguments(tmp_path), 3) >= 1


# ------------------------------------------------------------------------------------------------ signals, locks


@contextmanager
def slow(argv, name, *more, world=1, seconds=0.5):
    """A run after its first iteration, whose second takes so long; and its log."""
    iteration, log = train.Trainer.iteration, folder_of(argv, f"{name}.log")

    class Slow(train.Trainer):
        def iteration(self, i):
            time.sleep(seconds if i == 2 else 0)
            return iteration(self, i)

    started = start(world, trainer([*argv, "--name", name, *more], Trainer=Slow), log)
    rows = folder_of(argv, name) / "metrics.jsonl"
    while all(p.is_alive() for p in started) and not (rows.exists() and rows.read_text().count("\n") > 1):
        time.sleep(0.02)
    time.sleep(0.2)  # behind the look at what signals came, into the second iteration
    yield started, log
    for p in started:
        p.kill()


@pytest.mark.parametrize("world, number", [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_lets_the_iteration_end_saves_it_and_says_so(world, number, argv, alone):
    name = f"{number.name}-{world}"
    with slow(argv, name, "--save-every", "0", world=world) as (started, log):
        os.kill(started[-1].pid, number)  # one rank is enough
        codes, printed = finish(started, log)
    assert codes == ([-number] if world == 1 else [0, 0]), printed  # alone it dies of it, as a shell expects
    assert f"stopped by {number.name} after iteration 2, saved" in printed and "Traceback" not in printed
    assert [row["iteration"] for row in metrics(folder_of(argv, name))] == [0, 1, 2]
    if world == 1:
        assert_bit_equal(in_this_process(argv, name, "--resume"), alone)


def test_a_second_signal_leaves_at_once_and_a_second_run_in_the_folder_is_refused(argv, alone):
    with slow(argv, "shared", "--save-every", "0", seconds=30) as (started, log):
        with pytest.raises(UserError, match="shared is in use by another process"):
            in_this_process(argv, "shared", "--resume")
        os.kill(started[0].pid, signal.SIGTERM)
        time.sleep(0.5)
        os.kill(started[0].pid, signal.SIGTERM)
        codes, printed = finish(started, log, timeout=10)
    assert codes == [-signal.SIGTERM] and "once more stops at once" in printed
    assert not train.checkpoints(folder_of(argv, "shared"))


# ------------------------------------------------------------------------------------------------ checkpoints


def test_one_checkpoint_is_kept_and_nothing_unfinished(alone):
    assert [p.name for p in train.checkpoints(alone)] == ["checkpoint-000003"]
    assert not [*alone.glob("*.new")]


@pytest.mark.parametrize("what", ["cut", "missing", "metadata"])
def test_a_damaged_checkpoint_is_refused_and_names_itself(what, argv, alone):
    folder = folder_of(argv, f"damaged {what}")
    shutil.copytree(alone, folder)
    checkpoint = folder / "checkpoint-000003"
    file = checkpoint / ".metadata" if what == "metadata" else next(checkpoint.glob("*.distcp"))
    content = file.read_bytes()
    file.unlink() if what == "missing" else file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"checkpoint-000003 is damaged") as error:
        in_this_process(argv, folder.name, "--resume", "--iterations", "4")
    assert "\n" not in str(error.value)


def test_a_run_of_another_configuration_is_refused_with_the_difference(argv, alone):
    with pytest.raises(UserError, match=r"another configuration \(gamma 1.0 -> 0.9, lam 1.0 -> 0.95\)"):
        in_this_process(argv, "alone", "--resume", "--gamma", "0.9", "--lam", "0.95")


def test_a_run_whose_reward_model_has_changed_since_is_refused(argv, tmp_path):
    reward_model = tmp_path / "prm"
    lm = model.load_causal_lm(argv[argv.index("--model") + 1])
    model.ScalarModel(lm).save(toy_tokenizer(), reward_model)
    given = ("--prm", str(reward_model), "--iterations", "1")
    in_this_process(argv, "changed", *given)
    os.utime(reward_model / "head.safetensors", (1, 1))
    with pytest.raises(UserError, match="another configuration") as error:
        in_this_process(argv, "changed", *given, "--resume")
    assert "\n" not in str(error.value)


def test_resume_of_a_name_without_a_run_starts_it(argv, alone):
    assert_bit_equal(in_this_process(argv, "requeued", "--resume"), alone)


def test_a_checkpoint_before_the_policy_has_learnt_resumes_bit_equal(argv, alone):
    more = ("--critic-warmup", "2", "--iterations")
    whole = in_this_process(argv, "warm", *more, "3")
    in_this_process(argv, "warm halves", *more, "2")
    assert_bit_equal(in_this_process(argv, "warm halves", *more, "3", "--resume"), whole)


def test_a_reward_model_that_returns_nan_stops_the_run_and_the_last_checkpoint_stands(argv, alone, monkeypatch):
    iteration = train.Trainer.iteration

    def broken(self, i):
        if i == 3:
            self.reward_model.head.weight.data.fill_(torch.nan)
        return iteration(self, i)

    monkeypatch.setattr(train.Trainer, "iteration", broken)
    with pytest.raises(UserError, match="the reward model gives .* scores that are not finite"):
        in_this_process(argv, "nan")
    monkeypatch.undo()
    with open(folder_of(argv, "nan") / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 3, "half')
    assert_bit_equal(in_this_process(argv, "nan", "--resume"), alone)


def test_a_full_disk_leaves_the_checkpoint_before(argv, alone):
    def full():
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        save = train.save_checkpoint

        def small(folder, iteration, *more):
            if iteration == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            save(folder, iteration, *more)

        train.save_checkpoint = small
        trainer([*argv, "--name", "full"])()

    log = folder_of(argv, "full.log")
    codes, printed = finish(start(1, full, log), log)
    assert codes == [2] and "cannot write" in printed and "File too large" in printed, printed
    assert "Traceback" not in printed
    assert [p.name for p in train.checkpoints(folder_of(argv, "full"))] == ["checkpoint-000001"]
    assert_bit_equal(in_this_process(argv, "full", "--resume"), alone)


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        began = time.monotonic()
        completed = kill_at_random(arguments(Path(scratch)), int(sys.argv[1]), seed=1)
        print(f"{completed} runs, all equal to the one that was let be; {time.monotonic() - began:.0f} s")
