"""Several processes and sudden ends: the same result in every world, checkpoints, signals, kills, hangs, damage.

    python tests/test_distributed.py 100     # the kill test at length: 100 kills, instead of 20

The processes of a world are forked from this one, which spares each of them the imports; one test goes through torchrun."""

import gc
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.run as torchrun
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import model
import prm
import train
from data import UserError, run_script, toy_problems, toy_tokenizer
from model import on_rank_0, shard, start_processes, toy_model, watching
from ppo import Policy
from rollout import Batch

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")
SHORT = (
    "--prompt {question} --questions 8 --samples 2 --iterations 3 --minibatches 2 --max-new-tokens 12 "
    "--eval-problems 4 --eval-every 2 --save-every 1 --token-budget 100 --lr 1e-3 --critic-lr 1e-3 --label-problems 24 "
    "--keep 2 --completions 2 --rm-epochs 1 --rm-lr 1e-3 --lr-warmup 1 --reward delta --alpha 1"
).split()


@pytest.fixture(scope="module")
def argv(tmp_path_factory) -> list[str]:
    """Options of a short run with a random model; all runs of this file share labels and reward model."""
    return arguments(tmp_path_factory.mktemp("distributed"))


def arguments(folder: Path, layers: int = 2) -> list[str]:
    toy_model(toy_tokenizer(), seed=0, hidden=32, layers=layers, heads=2).save_pretrained(folder / "lm")
    toy_tokenizer().save_pretrained(folder / "lm")
    rows = [json.dumps(vars(p)) for p in toy_problems("train", 60)]
    (folder / "problems.jsonl").write_text("\n".join(rows))
    where = {"--model": "lm", "--runs-dir": "runs", "--data": "problems.jsonl"}
    return [*SHORT, *(x for option, name in where.items() for x in (option, str(folder / name)))]


def folder_of(argv: list[str], name: str) -> Path:
    at = len(argv) - 1 - argv[::-1].index("--runs-dir")  # the last one counts
    return Path(argv[at + 1]) / name


# ------------------------------------------------------------------------------------------------ worlds


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(world: int, main, log: Path, **environment) -> list:
    """Processes that call main() as torchrun would; what they print goes to log.RANK."""
    port, processes = free_port(), []
    gc.freeze()  # a child's collector would copy every page that it looks at

    def child(rank):
        with open(f"{log}.{rank}", "wb", buffering=0) as file:
            for fd in (1, 2):
                os.dup2(file.fileno(), fd)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        if world > 1:
            os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
            os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT=str(port))
        os.environ |= environment
        run_script(main)

    for rank in range(world):
        processes.append(get_context("fork").Process(target=child, args=(rank,)))
        processes[-1].start()
    return processes


def trainer(argv: list[str], **replaced):
    """train.py's main() with these arguments."""

    def main():
        sys.argv = ["train.py", *argv]
        vars(train).update(replaced)
        train.main()

    return main


def finish(processes: list, log: Path, timeout: float = 90) -> tuple[list[int], str]:
    """Their exit codes, and all that they have printed."""
    end = time.monotonic() + timeout
    for p in processes:
        p.join(max(0, end - time.monotonic()))
    hanging = [p for p in processes if p.is_alive()]
    for p in hanging:
        p.kill()
        p.join()
    printed = "".join(Path(f"{log}.{rank}").read_text() for rank in range(len(processes)))
    assert not hanging, printed
    return [p.exitcode for p in processes], printed


def both_succeed(main, log: Path, **environment):
    codes, printed = finish(start(2, main, log, **environment), log)
    assert codes == [0, 0], printed


def run(world: int, argv: list[str], name: str, *more: str, codes=None, **environment) -> str:
    """A run to its end in that many processes; what it printed."""
    log = folder_of(argv, f"{name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    got, printed = finish(start(world, trainer([*argv, "--name", name, *more]), log, **environment), log)
    assert got == (codes or [0] * world), printed
    return printed


def metrics(folder: Path) -> list[dict]:
    """Everything that is logged but time."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def weights(folder: Path) -> dict:
    return load_file(folder / "model" / "model.safetensors")


def furthest(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def assert_bit_equal(a: Path, b: Path):
    assert metrics(a) == metrics(b)
    assert furthest(weights(a), weights(b)) == 0


@pytest.fixture(scope="module")
def alone(argv) -> Path:
    """The run of one process, to its end: what all others are compared with."""
    run(1, argv, "alone")
    return folder_of(argv, "alone")


def assert_close(got: Path, want: Path, argv: list[str]):
    for a, b in zip(metrics(want), metrics(got), strict=True):
        assert b == {k: pytest.approx(v, rel=1e-3, abs=2e-4) for k, v in a.items()}
        assert all(a.get(k) == b.get(k) for k in ("tokens", "steps", "success", "greedy_tokens"))  # the same samples
    before = load_file(Path(argv[argv.index("--model") + 1]) / "model.safetensors")
    assert furthest(weights(got), weights(want)) < 1e-5 < 1e-3 < furthest(weights(want), before)


@pytest.mark.parametrize("world, nodes, more", [(2, [2], ""), (4, [4, 2], "--iterations 2 --eval-problems 2")])
def test_every_world_ends_with_the_metrics_and_weights_of_one_process(world, nodes, more, argv, alone, tmp_path):
    """In float32; also of two nodes with two processes each, which hold the model once a node. The four processes are
    started once for both."""
    want = in_this_process(argv, f"alone-{world}", *more.split()) if more else alone
    names = [f"{world}-{on_a_node}" for on_a_node in nodes]

    def main():
        for on_a_node, name in zip(nodes, names):
            os.environ["LOCAL_WORLD_SIZE"] = str(on_a_node)
            model.gpus.cache_clear()
            trainer([*argv, "--name", name, *more.split(), "--save-every", "0"])()

    codes, printed = finish(start(world, main, tmp_path / "log"), tmp_path / "log")
    assert codes == [0] * world, printed
    for name in names:
        assert_close(folder_of(argv, name), want, argv)


def test_two_processes_make_the_labels_and_the_reward_model_of_one(argv, alone, tmp_path):
    def main():
        rank, world, device = start_processes()
        o, _ = train.parse([*argv, "--runs-dir", str(tmp_path)])
        problems, _, _, parts = train.load_data(o)
        train.prepare(o, problems, parts, rank, world, device)

    both_succeed(main, tmp_path / "log")
    for stage, file in (("labels", "labels.jsonl"), ("prm", "model.safetensors")):
        one, two = (next(cache.glob(f"{stage}-*")) / file for cache in (alone.parent / "cache", tmp_path / "cache"))
        if stage == "labels":
            assert one.read_text() == two.read_text() and one.read_text().count("\n") == 24
        else:
            assert furthest(load_file(one), load_file(two)) < 1e-5


@pytest.fixture(scope="module")
def halfway(argv, alone) -> Path:
    """The run of two processes, ended after two of the three iterations."""
    run(2, argv, "halfway", "--iterations", "2", "--save-every", "0")
    return folder_of(argv, "halfway")


def test_a_sharded_run_resumes_bit_equal_in_its_world_and_close_in_another(argv, alone, halfway):
    whole, same, other = (folder_of(argv, name) for name in ("2-2", "same", "other"))
    if not whole.exists():  # the test above has made it
        run(2, argv, "2-2")
    shutil.copytree(halfway, same)
    shutil.copytree(halfway, other)
    run(2, argv, "same", "--resume")
    run(1, argv, "other", "--resume")
    assert_bit_equal(same, whole)
    assert_close(other, alone, argv)


def test_ranks_with_unequal_lengths_run_as_many_micro_batches(tmp_path):
    def main():
        rank, world, _ = start_processes()
        sizes = [[3, 9], [9, 9, 9, 1]][rank]  # tokens: one micro-batch of up to 12 tokens, three of them
        batch = Batch([[1]] * len(sizes), [[2] * n for n in sizes], torch.zeros(len(sizes), dtype=torch.bool))
        plans = batch.plans([list(range(len(sizes))), []], 14)
        assert [len(plan) for plan in plans] == [3, 0]
        assert sorted(sum(plans[0], [])) == list(range(len(sizes)))
        out = batch.map(lambda rows, packed, keep, targets: keep.float(), plans[0], "cpu")
        assert out.shape == batch.mask.shape and (out[~batch.mask] == 0).all()

    both_succeed(main, tmp_path / "log")


def test_only_rank_0_reads_the_weights_and_ties_and_values_survive_sharding(tmp_path, argv):
    path = argv[argv.index("--model") + 1]

    def main():
        rank, _, device = start_processes()
        homes = []
        make = lambda home: homes.append(home) or Policy(model.load_causal_lm(path, device=home))
        policy = shard(make, torch.float32, device)
        assert homes == ["cpu" if rank == 0 else "meta"]
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
    """model.last_micro_batch, with two nodes of one process each."""
    path = argv[argv.index("--model") + 1]

    def main():
        rank, _, device = start_processes()
        gradients = []
        for deferred in (False, True):
            critic = shard(lambda home: model.ScalarModel(model.load_causal_lm(path, device=home)), torch.float32, device)
            for i, n in enumerate((3, 5, 4)):
                if deferred:
                    model.last_micro_batch(critic, i == 2)
                values = critic(model.Packed([list(range(2, 2 + n + rank))]))
                ((values - 1) ** 2).sum().backward()
            gradients.append([model.whole(p.grad) for p in critic.parameters()])
        assert max(g.abs().max() for g in gradients[0]) > 1
        for a, b in zip(*gradients):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)

    both_succeed(main, tmp_path / "log", LOCAL_WORLD_SIZE="1")


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_question_has_one_rank_and_the_shares_are_equally_long(world):
    rng = random.Random(0)
    lengths = [rng.randint(5, 60) for _ in range(240)]
    shares = []
    for rank in range(world):
        dealer = object.__new__(train.Trainer)
        dealer.prompts, dealer.rank, dealer.world = [[0] * n for n in lengths], rank, world
        shares.append(dealer.share(list(range(240))))
    assert sorted(sum(shares, [])) == list(range(240)) and {len(s) for s in shares} == {240 // world}
    tokens = [sum(lengths[q] for q in share) for share in shares]
    assert max(tokens) - min(tokens) <= 60


# ------------------------------------------------------------------------------------------------ sudden ends


def kill_at_random(argv: list[str], kills: int, seed: int = 0) -> tuple[int, int]:
    """Kill runs at random moments, from the preparation to the export, and resume each until it is complete and equal to
    one that was let be. Returns how many kills hit and how many runs were completed."""
    small = "--questions 4 --minibatches 1 --eval-problems 2 --label-problems 8".split()
    argv, rng, hits, completed = [*argv, *small], random.Random(seed), 0, 0
    attempt(argv, "whole", None)
    began = time.monotonic()
    attempt(argv, "timed", None)
    longest = time.monotonic() - began
    while hits < kills:
        name = f"killed{completed}"
        if rng.random() < 0.3:  # so that some kills meet the preparation too
            shutil.rmtree(folder_of(argv, "cache"), ignore_errors=True)
        while attempt(argv, name, rng.uniform(0, longest) if hits < kills else None):
            hits += 1
            broken = [p for p in folder_of(argv, name).glob("checkpoint-*") if not (p / "manifest.json").exists()]
            assert not broken  # nothing unfinished bears the name of a checkpoint
        assert_bit_equal(folder_of(argv, name), folder_of(argv, "whole"))
        samples = (folder_of(argv, name) / "samples.jsonl").read_text().splitlines()
        assert [json.loads(x)["iteration"] for x in samples] == sorted([1, 2, 3] * 5)  # four, and the watched one
        completed += 1
    return hits, completed


def attempt(argv: list[str], name: str, seconds: float | None) -> bool:
    """Start or resume a run. True if it was killed, after so many seconds; else it must have ended well."""
    log = folder_of(argv, f"{name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
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


def test_a_run_killed_at_20_random_moments_ends_as_if_it_had_not_been(tmp_path):
    hits, completed = kill_at_random(arguments(tmp_path, layers=1), 20)
    assert hits == 20 and completed >= 2


def test_torchrun_restarts_a_run_whose_rank_was_killed(argv, alone, tmp_path):
    """Through torchrun itself, with the default name. A rank is killed in the third iteration of the first try, which is
    forked; the second try is train.py in interpreters of its own, to their end."""
    iteration = train.Trainer.iteration

    class Killed(train.Trainer):
        def iteration(self, i):
            if i == 3 and self.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return iteration(self, i)

    def rank(*command):
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            trainer(argv, Trainer=Killed, watching=partial(watching, every=0.2))()
        else:
            subprocess.run([sys.executable, str(ROOT / "train.py"), *argv], check=True, timeout=90)

    def main():
        launch = torchrun.elastic_launch
        torchrun.elastic_launch = lambda config, entrypoint: launch(replace(config, start_method="fork"), rank)
        torchrun.main(["--standalone", "--nproc_per_node", "2", "--max-restarts", "1", "train.py"])

    log = tmp_path / "log"
    codes, printed = finish(start(1, main, log, OMP_NUM_THREADS="1"), log, timeout=150)
    assert codes == [0], printed
    folder = folder_of(argv, "run-delta-s0")
    assert_close(folder, alone, argv)
    assert not folder.with_name("run-delta-s0-2").exists()
    assert "initial" not in printed


def test_ranks_that_count_restarts_differently_all_resume(argv, alone, halfway, tmp_path):
    """As on two nodes, of which torchrun restarts one for the failure of the other, and does not count that."""
    argv = [*argv, "--runs-dir", str(tmp_path)]
    shutil.copytree(halfway, tmp_path / "run-delta-s0")
    (tmp_path / "cache").symlink_to(halfway.parent / "cache")

    def main():
        os.environ["TORCHELASTIC_RESTART_COUNT"] = os.environ["RANK"]
        trainer(argv)()

    both_succeed(main, tmp_path / "log")
    assert_close(tmp_path / "run-delta-s0", alone, argv)


@pytest.mark.parametrize("how, words", [(signal.SIGKILL, "has died"), (signal.SIGSTOP, "has not been heard of for 2 s")])
def test_when_a_rank_dies_or_hangs_the_others_stop_with_its_name(how, words, tmp_path):
    def main():
        rank, world, _ = start_processes()
        with watching(rank, world, every=0.2, patience=2):
            for i in range(10**9):
                dist.all_reduce(torch.zeros(1))
                time.sleep(0.05)
                if i == 10:  # each has been heard of
                    (tmp_path / f"ready{rank}").touch()

    processes = start(3, main, tmp_path / "log")
    while len(list(tmp_path.glob("ready*"))) < 3 and all(p.is_alive() for p in processes):
        time.sleep(0.02)
    os.kill(processes[1].pid, how)
    began = time.monotonic()
    if how == signal.SIGKILL:
        processes[1].join()  # as torchrun would: until then it is a zombie
    for p in (processes[0], processes[2]):
        p.join(20)
    seconds = time.monotonic() - began
    processes[1].kill()
    codes, printed = finish(processes, tmp_path / "log")
    assert codes[0] == codes[2] == 1 and seconds < 15
    assert printed.count(f"rank 1 (process {processes[1].pid} on {socket.gethostname()}) {words}") == 2, printed
    assert "Traceback" not in printed


def test_a_mistake_that_one_rank_meets_is_told_to_the_others(tmp_path):
    def main():
        rank, world, _ = start_processes()
        with watching(rank, world, every=0.3, patience=5):
            if rank == 1:
                raise UserError("no space left")
            dist.all_reduce(torch.zeros(1))

    codes, printed = finish(start(2, main, tmp_path / "log"), tmp_path / "log")
    assert codes == [1, 2]
    assert "rank 0 stops: rank 1" in printed and "stopped: no space left" in printed and "Traceback" not in printed


def test_a_mistake_of_rank_0_is_everyones(tmp_path):
    def main():
        rank, _, _ = start_processes()
        assert on_rank_0(lambda: os.getpid()) == on_rank_0(lambda: os.getpid())
        assert (on_rank_0(lambda: 7, share=False) == 7) == (rank == 0)

        def fail():
            raise UserError("cannot load it")

        on_rank_0(fail)

    codes, printed = finish(start(2, main, tmp_path / "log"), tmp_path / "log")
    assert codes == [2, 2] and printed.count("cannot load it") == 2


# ------------------------------------------------------------------------------------------------ signals


@contextmanager
def slow(argv, name, *more, world=1, seconds=0.5):
    """A run after its first iteration, whose second takes so long; and its log."""
    iteration, log = train.Trainer.iteration, folder_of(argv, f"{name}.log")

    class Slow(train.Trainer):
        def iteration(self, i):
            time.sleep(seconds if i == 2 else 0)
            return iteration(self, i)

    processes = start(world, trainer([*argv, "--name", name, *more], Trainer=Slow), log)
    rows = folder_of(argv, name) / "metrics.jsonl"
    while all(p.is_alive() for p in processes) and not (rows.exists() and rows.read_text().count("\n") > 1):
        time.sleep(0.02)
    time.sleep(0.2)  # behind the look at what signals came, into the second iteration
    yield processes, log
    for p in processes:
        p.kill()


@pytest.mark.parametrize("world, number", [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_lets_the_iteration_end_saves_it_and_says_so(world, number, argv, alone):
    name = f"{number.name}-{world}"
    with slow(argv, name, "--save-every", "0", world=world) as (processes, log):
        os.kill(processes[-1].pid, number)  # one rank is enough
        codes, printed = finish(processes, log)
    assert codes == ([-number] if world == 1 else [0, 0]), printed  # alone it dies of the signal, as a shell expects
    assert f"stopped by {number.name} after iteration 2, saved" in printed and "Traceback" not in printed
    assert [row["iteration"] for row in metrics(folder_of(argv, name))] == [0, 1, 2]
    assert_close(in_this_process(argv, name, "--save-every", "0", "--resume"), alone, argv)


def test_a_second_signal_leaves_at_once(argv):
    Path(argv[argv.index("--runs-dir") + 1]).mkdir(exist_ok=True)
    with slow(argv, "twice", "--save-every", "0", seconds=5) as (processes, log):
        began = time.monotonic()
        os.kill(processes[0].pid, signal.SIGTERM)
        time.sleep(0.5)
        os.kill(processes[0].pid, signal.SIGTERM)
        codes, printed = finish(processes, log)
    assert codes == [-signal.SIGTERM] and time.monotonic() - began < 3
    assert "once more stops at once" in printed and not list(folder_of(argv, "twice").glob("checkpoint-*"))


def test_two_runs_in_one_folder_are_refused_with_the_holder(argv):
    with slow(argv, "shared", seconds=5) as (processes, _):
        printed = run(1, argv, "shared", "--resume", codes=[2])
        assert f"shared is in use by process {processes[0].pid} on {socket.gethostname()}" in printed


def test_two_processes_that_need_the_same_stage_make_it_once(tmp_path):
    def main():
        def make(folder):
            time.sleep(0.5)
            (folder / f"by{os.getpid()}").touch()

        prm.cached(tmp_path / "cache", "stage", "a stage", {"a": 1}, make)

    logs = [tmp_path / f"log{i}" for i in range(2)]
    processes = [start(1, main, log)[0] for log in logs]
    for p, log in zip(processes, logs):
        assert finish([p], log)[0] == [0]
    (made,) = (tmp_path / "cache").iterdir()
    assert len(list(made.glob("by*"))) == 1


# ------------------------------------------------------------------------------------------------ checkpoints


def in_this_process(argv: list[str], name: str, *more: str) -> Path:
    o, _ = train.parse([*argv, "--name", name, *more])
    folder = train.open_run(o)
    train.run(o, folder, 0, 1, torch.device("cpu"))
    return folder


def test_the_last_checkpoints_are_kept_and_hold_what_resuming_needs(alone):
    assert [p.name for p in train.checkpoints(alone)] == ["checkpoint-000002", "checkpoint-000003"]
    assert not list(alone.glob("*.new")) and not list(alone.glob("*.old"))
    manifest = json.loads((alone / "checkpoint-000003" / "manifest.json").read_text())
    assert manifest["iteration"] == 3 and manifest["world"] == 1 and len(manifest["rng"]) == 1
    assert {"policy", "reward model", "problems"} == manifest["sources"].keys()


@pytest.mark.parametrize("what", ["flipped bit", "cut", "missing", "manifest"])
def test_a_damaged_checkpoint_is_named_and_refused_and_the_one_before_is_used_on_request(what, argv, alone, tmp_path):
    folder = folder_of(argv, f"damaged {what}")
    shutil.copytree(alone, folder)
    shutil.rmtree(folder / "model")
    last = folder / "checkpoint-000003"
    file = last / "manifest.json" if what == "manifest" else next(last.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    if what == "flipped bit":
        content[len(content) // 2] ^= 1
    elif what in ("cut", "manifest"):
        del content[-100:]
    file.unlink() if what == "missing" else file.write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint-000003 is damaged.*--resume-from 2 takes the one before it"):
        in_this_process(argv, folder.name, "--resume")
    with pytest.raises(UserError, match="no checkpoint of iteration 7, but of 2, 3"):
        in_this_process(argv, folder.name, "--resume", "--resume-from", "7")
    in_this_process(argv, folder.name, "--resume", "--resume-from", "2")
    assert_bit_equal(folder, alone)


def test_a_checkpoint_of_another_configuration_is_refused_with_the_difference(argv, alone):
    folder = folder_of(argv, "foreign")
    in_this_process(argv, "foreign", "--iterations", "1", "--gamma", "0.9")
    shutil.rmtree(folder / "model")
    for old in train.checkpoints(folder):
        shutil.rmtree(old)
    shutil.copytree(alone / "checkpoint-000003", folder / "checkpoint-000003")
    with pytest.raises(UserError, match=r"of another configuration \(gamma 1.0 -> 0.9\)"):
        in_this_process(argv, "foreign", "--gamma", "0.9", "--resume")


def test_a_reward_model_changed_since_is_refused_on_resume(argv, tmp_path):
    reward_model = tmp_path / "prm"
    model.ScalarModel(model.load_causal_lm(argv[argv.index("--model") + 1])).save(toy_tokenizer(), reward_model)
    folder = in_this_process(argv, "changed", "--iterations", "1", "--prm", str(reward_model))
    os.utime(reward_model / "head.safetensors", (1, 1))
    with pytest.raises(UserError, match="of another configuration .*reward model"):
        in_this_process(argv, folder.name, "--prm", str(reward_model), "--resume")


def test_resume_of_a_name_without_a_run_starts_it(argv, alone, capsys):
    folder = in_this_process(argv, "requeued", "--resume")
    assert "holds no run yet: it starts" in capsys.readouterr().out
    assert_bit_equal(folder, alone)


def test_a_checkpoint_before_the_policy_has_learnt_resumes_bit_equal(argv):
    more = ("--critic-warmup", "2", "--iterations")
    whole = in_this_process(argv, "warm", *more, "3")
    in_this_process(argv, "warm halves", *more, "2")
    assert_bit_equal(in_this_process(argv, "warm halves", *more, "3", "--resume"), whole)


# ------------------------------------------------------------------------------------------------ broken numbers, full disks


def test_a_step_whose_gradient_is_not_finite_is_skipped_and_counted(argv, monkeypatch):
    whiten, calls = train.whiten, []

    def sometimes(advantages, mask):
        calls.append(1)
        return whiten(advantages, mask) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(train, "whiten", sometimes)
    rows = metrics(in_this_process(argv, "skips", "--critic-lr", "0", "--iterations", "3"))
    assert [row.get("skipped_steps") for row in rows] == [None, 0, 2, 0]  # both minibatches of the policy
    assert rows[2]["policy_loss"] is None and rows[3]["policy_loss"] is not None  # null in JSON
    assert rows[3]["max_ratio_error_first"] == 0


def test_three_such_steps_in_a_row_stop_the_run_and_keep_the_batch(argv, monkeypatch):
    whiten = train.whiten
    monkeypatch.setattr(train, "whiten", lambda a, mask: whiten(a, mask) * float("inf"))
    with pytest.raises(UserError, match="iteration 2: three gradients in a row were not finite .*; its batch is in "):
        in_this_process(argv, "diverged")
    folder = folder_of(argv, "diverged")
    seen = torch.load(folder / "nonfinite-000002-rank0.pt", weights_only=True)
    assert len(seen["answers"]) == 16 and not seen["advantages"].isfinite().all() and seen["logp"].isfinite().all()
    assert [p.name for p in train.checkpoints(folder)] == ["checkpoint-000001"]


@pytest.mark.parametrize("call", [5, 6])  # of the third iteration: the answer that is watched, all others
def test_a_reward_model_that_returns_nan_stops_the_run_in_the_state_before(call, argv, alone, monkeypatch):
    score = prm.score_steps

    def broken(model, batch, ends, plan, device):
        calls.append(1)
        return torch.full((len(ends), 1), torch.nan) if len(calls) == call else score(model, batch, ends, plan, device)

    calls = []
    monkeypatch.setattr(prm, "score_steps", broken)
    with pytest.raises(UserError, match="the reward model gives .* scores that are not finite"):
        in_this_process(argv, f"nan{call}", "--save-every", "0")
    assert [p.name for p in train.checkpoints(folder_of(argv, f"nan{call}"))] == ["checkpoint-000002"]
    monkeypatch.undo()
    assert_bit_equal(in_this_process(argv, f"nan{call}", "--save-every", "0", "--resume"), alone)


def test_a_full_disk_leaves_no_half_line_and_no_half_checkpoint(argv, alone, tmp_path):
    rows = tmp_path / "metrics.jsonl"
    train.append(rows, [{"iteration": 1, "x": float("nan"), "long": "x" * 5000}])  # the log meets the limit too
    before, log = rows.read_text(), tmp_path / "log"

    def main():
        import resource

        limit = rows.stat().st_size + 10
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        train.append(rows, [{"iteration": 2, "x": "long" * 10}])

    codes, printed = finish(start(1, main, log), log)
    assert codes == [2] and "File too large" in printed and "Traceback" not in printed
    assert rows.read_text() == before and before.startswith('{"iteration": 1, "x": null')

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

    codes, printed = finish(start(1, full, log), log)
    assert codes == [2] and "cannot write" in printed and "checkpoints before it are untouched" in printed, printed
    assert "Traceback" not in printed
    assert [p.name for p in train.checkpoints(folder_of(argv, "full"))] == ["checkpoint-000001"]
    run(1, argv, "full", "--resume")
    assert_bit_equal(folder_of(argv, "full"), alone)


def test_questions_that_the_processes_cannot_share_are_refused_with_the_mend(argv):
    printed = run(2, argv, "odd", "--questions", "9", codes=[2, 2])
    assert "--questions 9 cannot be shared by 2 processes: choose 8 or 10" in printed


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        argv, kills = arguments(Path(scratch)), int(sys.argv[1])
        began = time.monotonic()
        hits, completed = kill_at_random(argv, kills, seed=1)
        seconds = time.monotonic() - began
        print(f"{hits} kills, {completed} runs completed, all equal to the uninterrupted one; {seconds:.0f} s")
