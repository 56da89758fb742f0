"""PPO on math problems with any of the six rewards: options, preparation, the loop, logs, checkpoints.

    python train.py --reward delta                                     # the embedded world on a laptop
    torchrun --nproc_per_node 8 train.py --reward delta                # the paper's setting on 8 GPUs
    python train.py --reward clip-delta --model DIR --data FILE.jsonl --eval-data TEST.jsonl  # your own

Before the loop comes what it needs, each stage cached in RUNS_DIR/cache: in the embedded world the warm start, which
makes the policy and a stronger model of the same size, the *completer*; then step labels and the reward model that the
chosen reward reads. A run writes to RUNS_DIR/NAME: config.json, metrics.jsonl (one line an iteration), samples.jsonl
(a few answers of each), checkpoint-N/, and at the end model/ in Hugging Face format. It may be killed at any moment:
--name NAME --resume goes on from its last checkpoint.

Left out: curricula, training questions made on the way.
"""

import argparse
import copy
import gc
import importlib.util
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zlib
from bisect import bisect_left
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser

import prm
from data import (
    WORLDS, TextOptions, UserError, append, deal, draw, drop_known, encode_prompts, is_toy, load_mixture, mixture, option,
    oracle_at, run_script, toy_problems, toy_solution, toy_tokenizer, whole_lines, write,
)  # fmt: skip
from eval import FREE, MADE_OF, answer, before_after, combinations, commit, evaluate, judge, summarise
from grader import VERDICTS
from model import (
    DTYPES, Muon, NonFinite, ScalarModel, all_reduce, barrier, checkpoint_layers, eos_ids, gather, load_causal_lm,
    load_tokenizer, lock, model_shape, on_rank_0, optimizer_step, replica, save_lm, shard, side_by_side, start_processes,
    sync, toy_model, watching,
)  # fmt: skip
from ppo import (
    EFFICIENCY, RESERVE, Policy, Experience, ValueNorm, explained_variance, gae, hours, memory, minibatches, peak,
    score_values, update, whiten,
)  # fmt: skip
from prm import FORMATS
from rewards import REWARDS, refine, token_rewards
from rollout import Batch, Sampler, rollout

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a checkpoint of a single process


@dataclass
class Options(TextOptions):
    reward: str = option("delta", "one of the paper's six, or of rewards.py's four others", choices=list(REWARDS))
    preset: str = option("", "toy, sums, or one of the paper's models, see PRESETS; default: by hardware, with --model none")
    model: str = option("", "policy: a folder or hub name; empty: the embedded world's own")
    data: str = option("gsm8k", "training problems: toy, gsm8k, math, mathinstruct, a hub name or a file; a mixture by "
                       "weights: NAME=WEIGHT,NAME=WEIGHT")  # fmt: skip
    eval_data: str = option("", "evaluation problems, one or several sets: NAME,NAME; empty: the test split of --data")
    prm: str = option("", "process reward model: a folder, or a published one by hub name; empty: label and train one")
    prm_format: str = option("", "how a published --prm reads, where its name does not say", choices=["", *FORMATS])
    orm: str = option("", "folder of an outcome reward model; empty: label and train one")
    completer: str = option("", "model that completes step prefixes for the labels; empty: the policy")
    # the reward: alpha * r + Correct - beta * log(pi / pi_ref)
    alpha: float | None = option(None, "weight of the learned reward; default: 0.5, of delta 0.3")
    eta: float = option(0.5, "threshold of clip: steps that score above it get 0; of penalty the price of a step")
    beta: float = option(0.02, "weight of the KL penalty")
    # the rollout
    questions: int = option(64, "questions per iteration")
    samples: int = option(4, "answers per question")
    temperature: float = option(1.0, "of sampling, reference and training alike")
    top_p: float = option(1.0, "of rollouts: sample from the most likely tokens that hold this mass; log-probabilities and "
                          "evaluation are of all tokens; 1: off")  # fmt: skip
    slots: int = option(256, "answers that decode at once")
    # PPO
    iterations: int = option(100, "rollouts")
    epochs: int = option(1, "passes over a rollout")
    minibatches: int = option(4, "optimizer steps per pass")
    lr: float = option(1e-6, "learning rate of the policy")
    critic_lr: float = option(1e-5, "learning rate of the critic")
    lr_warmup: int = option(5, "iterations of linear warmup of the policy's learning rate")
    critic_warmup: int = option(0, "iterations that train the critic alone")
    gamma: float = option(1.0, "discount")
    lam: float = option(1.0, "GAE's lambda")
    clip: float = option(0.2, "PPO's epsilon: the ratio is clipped to 1 +- this (the threshold of --reward clip is --eta)")
    value_clip: float = option(0.2, "epsilon of the value clip, in normalised units; 0: off")
    max_grad_norm: float = option(1.0, "gradient clip")
    token_budget: int = option(16384, "packed tokens per micro-batch; changes memory and speed, never the gradient")
    checkpoint_activations: bool = option(False, "keep only the layers' inputs, recompute the rest: less memory, slower")
    dtype: str = option("float32", "of the forward passes; weights stay float32", choices=["float32", "bfloat16"])
    offload_frozen: bool = option(False, "keep reference and reward model in the CPU's memory: less of the GPU's, slower")
    # the reward model, where one is made
    label_problems: int = option(500, "questions whose solutions are labelled; 0: make no reward model")
    label_samples: int = option(1, "solutions per labelled question")
    completions: int = option(4, "completions per step prefix")
    labels: str = option("hard", "hard: any completion right; soft: the share of right ones; oracle: exact, of an embedded "
                         "world", choices=["hard", "soft", "oracle"])  # fmt: skip
    flip_labels: float = option(0.0, "share of the step labels that are turned around, to see what noise does")
    rm_epochs: int = option(2, "passes over the labelled solutions")
    rm_lr: float = option(1e-5, "learning rate of the reward model; 0: train its head alone")
    rm_head_lr: float = option(1e-3, "learning rate of the reward model's head")
    rm_likelihood: bool = option(False, "let the head read the LM's own lowest log-probability")
    # the run
    eval_problems: int = option(200, "evaluation problems, of each set")
    eval_every: int = option(10, "iterations between evaluations; 0: only before and after")
    seed: int = option(0, "of the run: problems' order, sampling, minibatches")
    prepare_seed: int = option(0, "of the preparation: warm start, labels, reward model")
    name: str = option("", "name of the run; empty: from preset, reward and seed")
    runs_dir: str = option("runs", "where runs and the cache live")
    threads: int = option(0, "CPU threads of a single process; 0: torch's choice")
    resume: bool = option(False, "continue the run NAME from its last checkpoint; start it if there is none")
    resume_from: int = option(0, "with --resume: from the checkpoint of this iteration; later ones are removed")
    save_every: int = option(10, "iterations between checkpoints; 0: only at the end")
    keep: int = option(2, "how many of the last checkpoints are kept")
    sweep: list[str] = field(default_factory=list, metadata={"help": "many runs: main, low-alpha, map, labels, sums; or "
                             "values to combine, as in: reward=prm,delta alpha=0.1,1 seed+prepare_seed=0,1"})  # fmt: skip
    workers: int = option(0, "with --sweep: runs at once; 0: one for each core, with CUDA one")
    log_to: str = option("", "log to this as well, if it is installed (--log is taken by torchrun, where that starts us)",
                         choices=["", "tensorboard", "wandb"], aliases=["--log"])  # fmt: skip
    # the plan
    plan: bool = option(False, "print what an iteration takes in memory and time, and stop; needs neither GPU nor network")
    gpus: int = option(0, "with --plan: how many GPUs, in nodes of 8; 0: 8")
    gpu_memory: float = option(0.0, "with --plan: GB of each GPU; 0: 80")


PRESETS = {
    # The embedded world. Sizes so that a laptop's two cores need minutes.
    "toy": dict(
        data="toy", eval_data="toy", prompt="{question}", max_prompt_tokens=32, max_new_tokens=128,
        questions=768, samples=1, iterations=20, minibatches=2, lr=3e-4, critic_lr=1e-3, token_budget=4096,
        label_problems=1000, rm_epochs=4, rm_lr=3e-4, rm_head_lr=2e-2, rm_likelihood=True, slots=768,
        eval_problems=1000,
        threads=2,  # more do not help so small a model
    ),
}  # fmt: skip
PRESETS["sums"] = PRESETS["toy"] | dict(data="sums", eval_data="sums", max_new_tokens=160)
# The paper's six models. Batch, training and evaluation questions and completer are the paper's. What it leaves open is
# ours, for these reasons:
#   alpha, eta, beta, learning rates          the general defaults above; alpha is what the embedded world bore
#   1 epoch, 4 minibatches, gamma = lambda = 1: ReaLHF's defaults, the authors' own system
#   max_new_tokens 1024                       Qwen's solutions of MATH rarely need more, and a hacked one must end
#   separator                                 a blank line, where Qwen's models end a step, and Qwen's PRMs too
#   20,000 labelled questions, 4 completions  about an hour of 8 GPUs, says --plan; Math-Shepherd took 8 completions
#   the reward model starts from the completer, and judges solutions that the policy itself sampled
for family in ("Qwen2", "Qwen2-Math", "Qwen2.5-Math"):
    for size, questions in (("1.5B", 1024), ("7B", 4096)):
        PRESETS[f"{family}-{size}-Instruct".lower()] = dict(
            model=f"Qwen/{family}-{size}-Instruct", completer="Qwen/Qwen2-7B-Instruct", data="mathinstruct",
            eval_data="math,gsm8k", eval_problems=5000, separator="\n\n", dtype="bfloat16", questions=questions, samples=8,
            max_new_tokens=1024, label_problems=20_000,
            **(dict(checkpoint_activations=True, slots=96) if size == "7B" else {}),  # see --plan
        )  # fmt: skip
DEFAULT = "qwen2-1.5b-instruct"  # with CUDA
# At both the embedded world's prm is hacked within 20 iterations, clip and clip-delta are not, delta hardly at the lower.
ALPHA = dict.fromkeys(REWARDS, 0.5) | {"success": 0.0, "delta": 0.3}


def reward_model_kind(reward: str) -> str:
    return {"success": "", "orm": "orm"}.get(reward, "prm")


def check(o: Options) -> None:
    """Raises UserError for options that cannot work together."""
    kind = reward_model_kind(o.reward)
    for name in ("prm", "orm"):
        if getattr(o, name) and kind != name:
            raise UserError(f"--{name} is not used by --reward {o.reward}: drop it, or choose a reward that uses it")
    if o.prm_format and not o.prm:
        raise UserError("--prm-format says how the --prm reads: give both, or neither")
    if o.log_to and importlib.util.find_spec(o.log_to) is None:
        raise UserError(f"--log-to {o.log_to} needs the package {o.log_to}: pip install it, or drop it")
    if kind and not getattr(o, kind) and o.label_problems <= 0:
        raise UserError(f"--reward {o.reward} needs a reward model: give --{kind} DIR, or let --label-problems be above 0")
    if o.reward == "success" and o.alpha is not None:
        raise UserError("--alpha weighs a learned reward, which --reward success has not: drop it")
    if o.eta != Options.eta and "clip" not in o.reward and o.reward != "penalty":
        raise UserError(f"--eta is for clip, clip-delta and penalty, and --reward {o.reward} has none: drop it")
    if o.labels == "oracle" and (o.data not in WORLDS or o.separator != "\n"):
        raise UserError("--labels oracle is for the lines of an embedded world (--data toy or sums); choose hard or soft")
    if (o.labels == "oracle" or o.flip_labels) and (kind != "prm" or o.prm):
        raise UserError("--labels oracle and --flip-labels change the labels of a PRM that is made here: drop them")
    if not 0 <= o.flip_labels <= 1:
        raise UserError("--flip-labels is a share of the labels: give 0 to 1")
    if not o.model and o.data not in WORLDS:
        raise UserError(f"--data {o.data} needs a --model: the embedded policy only knows its own world")
    if not o.model and any(name in WORLDS and name != o.data for name in mixture(o.eval_data or o.data)):
        raise UserError(f"--eval-data {o.eval_data}: the policy of --data {o.data} cannot read it; choose --preset {o.data}")
    if o.resume and not o.name:
        raise UserError("--resume needs the --name of the run to continue")
    if o.workers and not o.sweep:
        raise UserError("--workers says how many runs of a --sweep go at once: give both, or neither")
    if o.resume_from and not o.resume:
        raise UserError("--resume-from says which checkpoint to --resume from: give both, or neither")
    if o.plan and not o.model:
        raise UserError("--plan is for a --model, or a preset with one: the embedded world fits everywhere")
    if (o.gpus or o.gpu_memory) and not o.plan:
        raise UserError("--gpus and --gpu-memory describe a machine to --plan for: add --plan, or drop them")
    if o.offload_frozen and not o.plan and not torch.cuda.is_available():
        raise UserError("--offload-frozen moves models out of the GPU's memory, and there is no GPU: drop it")
    low = {"temperature": 1e-6, "questions": 1, "samples": 1, "epochs": 1, "minibatches": 1, "slots": 1,
           "token_budget": 1, "completions": 1, "label_samples": 1, "iterations": 1, "beta": 0,
           "eval_problems": 1, "eval_every": 0, "save_every": 0, "value_clip": 0, "rm_epochs": 1, "threads": 0,
           "keep": 1, "resume_from": 0, "workers": 0}  # fmt: skip
    for name, least in low.items():
        if getattr(o, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least:g}")
    if o.minibatches > o.questions * o.samples:
        raise UserError(f"--minibatches {o.minibatches} is more than the {o.questions * o.samples} answers of an iteration")
    if not 0 < o.top_p <= 1:
        raise UserError("--top-p must be above 0 and at most 1")


def parse(argv: list[str] | None = None) -> tuple[Options, str]:
    """Options from the command line over a preset, and the sentence that says which preset runs and why."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="")
    first.add_argument("--model", default="")
    given = first.parse_known_args(argv)[0]
    if given.preset:
        preset, why = given.preset, "asked for by --preset"
    elif given.model:
        preset, why = "", "--model was given: general defaults, nothing tuned"
    elif torch.cuda.is_available():
        preset, why = DEFAULT, "CUDA is present; --preset toy runs the embedded world"
    else:
        preset, why = "toy", "no CUDA here: the embedded world, on the CPU"
    if preset and preset not in PRESETS:
        raise UserError(f"--preset {preset}: there is none of that name, choose {', '.join(PRESETS)}")
    parser = HfArgumentParser(Options, usage="python train.py [--reward NAME] [--OPTION VALUE ...]", allow_abbrev=False)
    parser.set_defaults(**PRESETS.get(preset, {}), preset=preset)
    options = Options(**vars(parser.parse_args(argv)))
    if not options.sweep:  # of which each run is checked
        check(options)
    elif options.workers < 0:
        raise UserError("--workers must be at least 0")
    if options.alpha is None:
        options.alpha = ALPHA[options.reward]
    return options, f"preset: {preset or 'none'} ({why})"


def run_hours(config, o: Options, iteration: dict, reward_config, ranks: int, b: int) -> dict[str, float]:
    """Hours of a whole run by phase: what is made before it (labels with all completions, solutions of 8 steps), PPO, and
    the evaluations, each greedy and sampled. Downloads are not counted."""
    sampling = lambda config, answers, tokens: hours(
        config, replace(o, questions=int(answers), samples=1, max_new_tokens=int(tokens)), ranks=ranks, b=b
    )["sampling"]  # fmt: skip
    out, T = {}, o.max_new_tokens
    if reward_model_kind(o.reward) and not (o.prm or o.orm):
        solutions = o.label_problems * o.label_samples
        out["labels"] = sampling(config, solutions, T) + sampling(reward_config, solutions * 8 * o.completions, T / 2)
        passes = replace(o, questions=solutions, samples=1, epochs=o.rm_epochs)
        out["reward model"] = hours(reward_config, passes, ranks=ranks, b=b)["update"] / 2  # no critic
    out["PPO"] = o.iterations * sum(iteration.values())
    evaluations = 2 + (o.iterations - 1) // o.eval_every if o.eval_every else 2
    out["evaluation"] = evaluations * 2 * sampling(config, o.eval_problems * len(mixture(o.eval_data or o.data)), T)
    return out


def plan(o: Options, gpus: int, gpu_memory: float, node: int, longest: int) -> tuple[str, str]:
    """A table of each GPU's memory by part, the largest slots and token budget that fit, and hours by phase; and what to
    change if it does not fit."""
    config, b = model_shape(o.model), torch.finfo(DTYPES[o.dtype]).bits // 8
    reward_config = model_shape(o.prm or o.orm or o.completer or o.model) if reward_model_kind(o.reward) else None
    shape, sharded = dict(ranks=gpus, b=b, reward_config=reward_config), gpus > 1 or b < 4
    parts = lambda **new: memory(
        config, replace(o, **new), shards=min(gpus, node), longest=longest, sharded=sharded, **shape
    )  # fmt: skip
    fits = lambda **new: peak(parts(**new)) <= gpu_memory * 1e9 - RESERVE
    # the largest value of an option with which it fits, up to `most`; 0 if none does
    largest = lambda name, most, **new: bisect_left(range(1, most + 1), True, key=lambda x: not fits(**new, **{name: x}))
    slots, budget = largest("slots", 4096), largest("token_budget", 1 << 20)
    time, tokens = hours(config, o, **shape), o.questions * o.samples * o.max_new_tokens / 2
    rows = {**parts(), "total: what lasts, and the largest phase": peak(parts())}
    lines = [
        f"GB of each GPU, of {gpus}, for prompts of {longest - o.max_new_tokens} and answers of {o.max_new_tokens} tokens",
        *(f"  {name:42}{x / 1e9:8.1f}" for name, x in rows.items() if x),
        f"fits in {gpu_memory:g} GB, {RESERVE / 1e9:g} of them for CUDA, NCCL and fragments: {'yes' if fits() else 'no'}",
        f"largest --slots {slots}, largest --token-budget {budget if budget >= longest else 0} (each alone; 0: none fits)",
        f"an iteration: {tokens / 1e6:.1f} million tokens of answers, if these are half as long as they may be,",
        f"  and {sum(time.values()):.3f} hours at {EFFICIENCY:.0%} of an H100: "
        + ", ".join(f"{phase} {x:.3f}" for phase, x in time.items()),
        "the run: " + ", ".join(f"{phase} {x:.2f} hours" for phase, x in run_hours(config, o, time, **shape).items()),
    ]
    ways, less = [], {}
    for flag in ("", "checkpoint_activations", "offload_frozen"):
        less |= {flag: True} if flag else {}
        slots = o.slots if fits(**less) else largest("slots", o.slots, **less)
        if slots >= 16:
            flags = [f"--{x.replace('_', '-')}" for x in less if not getattr(o, x)]
            ways.append(" ".join([*flags, f"--slots {slots}"]))
    ways.append("more GPUs, a smaller --token-budget or a smaller model")
    return "\n".join(lines), "" if fits() else f"this does not fit: use {', or '.join(dict.fromkeys(ways))}"


def check_share(o: Options, world: int) -> None:
    """Raises UserError if the processes cannot have as many questions each."""
    if o.questions % world:
        fewer = o.questions - o.questions % world
        near = f"{fewer} or {fewer + world}" if fewer else world
        raise UserError(f"--questions {o.questions} cannot be shared by {world} processes: choose {near}")


# ------------------------------------------------------------------------------------------------ preparation


def warm_start(name: str, seed: int, folder: Path, rank: int, world: int, device) -> None:
    """Teach the policy of the embedded world `name` to answer at all, from demonstrations. Writes folder/policy, the
    weights at which sampled accuracy first passed one half, and folder/completer, where training ends: it is to the policy
    what the paper's 7B is to its 1.5B."""
    steps, questions = 850, 64
    tokenizer = toy_tokenizer(name)
    model, snapshot, accuracy = toy_model(tokenizer, seed).to(device), None, 0.0
    is_matrix = lambda name, p: p.dim() == 2 and "embed" not in name
    optimizers = [
        Muon([p for name, p in model.named_parameters() if is_matrix(name, p)], lr=5e-3),
        torch.optim.AdamW([p for name, p in model.named_parameters() if not is_matrix(name, p)], lr=3e-3, betas=(0.9, 0.98)),
    ]
    scale = lambda s: min((s + 1) / 100, 1, (steps - s) / (0.2 * steps))  # up, constant, down
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, scale) for o in optimizers]
    problems = toy_problems("train", steps * questions, 1000 + seed, name)
    probe = toy_problems("train", 200, 2000 + seed, name)
    rng = random.Random(seed)
    for step in (bar := tqdm(range(steps), desc="warm start", unit="step", disable=rank > 0)):
        chosen = problems[step * questions : (step + 1) * questions]
        prompts = encode_prompts(tokenizer, chosen, "{question}", 32)
        responses = [tokenizer.encode(toy_solution(p.question, rng)) + [tokenizer.eos_token_id] for p in chosen]
        batch = Batch(prompts, responses, torch.zeros(questions, dtype=torch.bool))
        loss = torch.zeros(())
        for rows in batch.plan(list(range(rank, questions, world)), 8192):
            logp, _ = Policy(model)(*batch.pack(rows, device), temperature=1.0)
            part = -logp.sum() / batch.mask.sum()
            part.backward()
            loss += part.detach().cpu()
        optimizer_step(model, optimizers, 1.0)
        for schedule in schedules:
            schedule.step()
        if step >= 300 and step % 25 == 0 and snapshot is None:
            result, _ = evaluate(model, tokenizer, probe, "{question}", "\n", max_new_tokens=160, rank=rank, world=world)
            accuracy = result["accuracy"]
            snapshot = copy.deepcopy(model) if accuracy > 0.5 else None
        bar.set_postfix(loss=f"{all_reduce(loss).item():.3f}", accuracy=f"{accuracy:.2f}")
    if rank == 0:
        for m, part in ((snapshot or model, "policy"), (model, "completer")):
            m.save_pretrained(folder / part)
            tokenizer.save_pretrained(folder / part)


def prepare(o: Options, found: list, parts: list, rank: int, world: int, device) -> tuple[str, str]:
    """The folders (or hub names) of the policy to start from and of the reward model ("" for success), made if need be;
    labels come from some of the problems `found`, of each part its share, or from the embedded world's own supply."""
    cache, policy, completer = Path(o.runs_dir) / "cache", o.model, o.completer or o.model
    if not policy:
        make = lambda folder: warm_start(o.data, o.prepare_seed, folder, rank, world, device)
        folder = prm.cached(cache, o.data, "warm start of the embedded policy", {"seed": o.prepare_seed}, make, rank)
        policy, completer = str(folder / "policy"), o.completer or str(folder / "completer")
    kind = reward_model_kind(o.reward)
    if not kind or getattr(o, kind):
        return policy, getattr(o, kind) if kind else ""
    made = lambda: toy_problems("train", o.label_problems, 3000 + o.prepare_seed, o.data)
    drawn = lambda: draw(found, parts, o.label_problems, o.prepare_seed)
    labels = prm.LabelOptions(
        o.prompt, o.separator, o.max_prompt_tokens, o.max_new_tokens, problems=o.label_problems, samples=o.label_samples,
        completions=o.completions, labels=o.labels, flip=o.flip_labels, temperature=o.temperature, slots=o.slots,
        seed=o.prepare_seed,
    )  # fmt: skip
    training = prm.TrainOptions(kind, o.rm_epochs, o.rm_lr, o.rm_head_lr, likelihood=o.rm_likelihood)
    return policy, prm.prepare_reward_model(
        cache, policy, completer, o.data, made if o.data in WORLDS else drawn, labels, training,
        questions=prm.fingerprint(found), dtype=DTYPES[o.dtype], device=device, rank=rank, world=world,
        token_budget=o.token_budget, checkpointed=o.checkpoint_activations or device.type == "cuda",  # often larger
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ the loop


def noted(answers: list[dict], iteration: int, scores, refined, outcome) -> list[dict]:
    """Answers as samples.jsonl holds them, each with what its reward has of scores, refined rewards, an outcome score."""
    out = []
    for i, a in enumerate(answers):
        steps = lambda x, i=i, K=a["steps"]: None if x is None else x[i, :K].tolist()
        more = {"iteration": iteration, "scores": steps(scores), "refined": steps(refined)}
        out.append({**a, **more, "outcome": None if outcome is None else outcome[i].item()})
    return out


def outcome_metrics(outcome, answers: list[dict]) -> dict:
    """What an ORM says of finished answers, of all ranks: its mean for right and for wrong ones, the share of its variance
    that correctness explains, and that correctness, steps and repeats explain together (ordinary least squares)."""
    rows = [(o, a["correct"], a["steps"], a["repeats"]) for o, a in zip(outcome.tolist(), answers) if not a["truncated"]]
    table = torch.tensor(gather(rows), dtype=torch.float64).view(-1, 4)
    y, x, correct = table[:, 0], table.clone(), table[:, 1] > 0.5
    x[:, 0] = 1

    def explained(columns: int) -> float:
        fit = x[:, :columns] @ (torch.linalg.pinv(x[:, :columns]) @ y)
        return 1 - ((y - fit).var() / y.var()).item() if len(y) > 1 and y.var() > 1e-12 else math.nan

    means = {"outcome_right": y[correct].mean().item(), "outcome_wrong": y[~correct].mean().item()}
    return means | {"outcome_explained_by_correct": explained(2), "outcome_explained_by_more": explained(4)}


class BrokenReward(UserError):
    """The iteration cannot be rewarded; nothing has changed since the one before."""


def adam(model, lr: float, betas: tuple) -> torch.optim.AdamW:
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=0.0, fused=True)
    for p in params:  # not at the first step, as torch would: a checkpoint before it holds and finds them too
        moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer


class Clock:
    """Seconds by phase."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def __call__(self, phase: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[f"seconds_{phase}"], self.last = now - self.last, now


def hash_seed(*parts: int) -> int:
    return zlib.crc32(repr(parts).encode())


class Trainer:
    """Models, optimizers and problems of one run; `iteration` is the algorithm."""

    def __init__(self, o: Options, data: tuple, model: str, reward_model: str, rank: int, world: int, device):
        self.o, self.rank, self.world, self.device = o, rank, world, device
        self.problems, self.prompts, self.test, self.parts = data
        self.dealt = [[0] * len(self.parts)]
        self.toy = all(is_toy(p.question) for p in self.problems)  # of all ranks' problems: they must log the same metrics
        self.dtype = DTYPES[o.dtype]
        self.tokenizer = load_tokenizer(model)
        on_gpus = lambda make, **more: shard(make, self.dtype, device, **more)
        frozen = lambda make: on_gpus(lambda home: make(home).requires_grad_(False), offload=o.offload_frozen)
        self.policy = on_gpus(lambda home: Policy(load_causal_lm(model, device=home)))
        self.critic = on_gpus(lambda home: ScalarModel(load_causal_lm(model, device=home)).eval())
        if o.checkpoint_activations:
            checkpoint_layers(self.policy)
            checkpoint_layers(self.critic)
        self.reference = frozen(lambda home: Policy(load_causal_lm(model, self.dtype, home)))
        self.sampler = Sampler(replica(self.policy.lm, self.dtype, device))
        self.reward_model = None
        if reward_model:
            form = prm.find_format(reward_model, o.prm_format)
            self.read = prm.Reader(reward_model, form, o.prompt, self.tokenizer)
            self.reward_model = frozen(lambda home: prm.load_reward_model(reward_model, self.dtype, home, form))
        self.eos = on_rank_0(lambda: eos_ids(self.policy.lm, self.tokenizer))  # which is in a file that rank 0 alone reads
        # the second moments must forget within a run of tens of steps, hence the low betas
        self.optimizers = [adam(self.policy, o.lr, (0.9, 0.99)), adam(self.critic, o.critic_lr, (0.9, 0.95))]
        self.value_norm = ValueNorm()

    def iteration(self, iteration: int) -> tuple[dict, list[dict]]:
        """Sample, grade, score, reward, advantage, update. Returns metrics over all ranks, and a few answers."""
        o, clock = self.o, Clock()

        # 1. sample, with the seeds of (iteration, question): the same answers whatever the number of ranks
        problems, samples, batch, keys = self.sample(iteration)
        clock("sample")
        watched = self.watch(iteration)
        clock("watch")

        # 2. grade the final answers, find the steps
        answers = judge(self.tokenizer, problems, samples, o.separator)
        correct = torch.tensor([a["correct"] for a in answers])  # (B,)
        ends, mask = prm.pad_steps([a["ends"] for a in answers])  # (B, K)
        clock("grade")

        # 3. score, in the micro-batches of the update, so that the ratio starts at exactly 1
        total = o.questions * o.samples
        deals = [minibatches(keys, total, o.minibatches, hash_seed(o.seed, iteration, e)) for e in range(o.epochs)]
        plans = batch.plans([rows for deal in deals for rows in deal], o.token_budget)
        logp, ref_logp, raw_values, raw_final, scores, outcome = self.score(batch, plans[: o.minibatches], ends, answers)
        clock("score")

        # 4. reward each token
        refined = None if scores is None else refine(o.reward, scores, mask, o.eta)
        clock("refine")
        rewards = token_rewards(
            logp, ref_logp, batch.mask, correct, batch.truncated, beta=o.beta, alpha=o.alpha, outcome=outcome,
            refined=refined, step_ends=ends, step_mask=mask,
        )  # fmt: skip

        # 5. advantages; a truncated answer would have gone on, so it bootstraps
        values = self.value_norm.denormalise(raw_values) * batch.mask
        bootstrap = self.value_norm.denormalise(raw_final) * batch.truncated
        advantages, returns = gae(rewards, values, batch.mask, bootstrap, o.gamma, o.lam)
        self.value_norm.update(returns, batch.mask)
        data = Experience(logp, whiten(advantages, batch.mask), raw_values, self.value_norm.normalise(returns))
        self.seen = {"answers": answers, "rewards": rewards, "ref_logp": ref_logp, "scores": scores, **vars(data)}

        # 6. update policy and critic
        warm = (iteration - o.critic_warmup) / max(o.lr_warmup, 1)
        self.optimizers[0].param_groups[0]["lr"] = lr = o.lr * min(1, max(0, warm))
        losses = update(
            self.policy, self.critic, self.optimizers, batch, data, plans, temperature=o.temperature, clip=o.clip,
            value_clip=o.value_clip, max_grad_norm=o.max_grad_norm, train_policy=iteration > o.critic_warmup,
        )  # fmt: skip
        clock("update")

        # 7. log: means over the answers of all ranks
        per_answer = {"return": rewards.sum(1), "success": correct, "kl": ((logp - ref_logp) * batch.mask).sum(1)}
        per_answer |= self.rollout_metrics(batch, answers, mask, refined, outcome)
        mean = lambda x: all_reduce(x.sum(dtype=torch.float64)).item() / total
        log = {"iteration": iteration, **{k: mean(x) for k, x in per_answer.items()}}
        verdicts = torch.tensor([[a["verdict"] == kind for kind in VERDICTS] for a in answers]).sum(0)
        log |= dict(zip((kind.replace(" ", "_") for kind in VERDICTS), all_reduce(verdicts).tolist()))
        for share in {"nonzero", "good_steps"} & log.keys():
            log[share] /= max(log["steps"], 1e-9)
        if outcome is not None:
            log |= outcome_metrics(outcome, answers)
        log |= {"explained_variance": explained_variance(values, returns, batch.mask), "lr": lr, **losses, **clock.seconds}
        log["tokens_per_step"] = log["tokens"] / max(log["steps"], 1e-9)
        log["tokens_per_second"] = log["tokens"] * total / sum(clock.seconds.values())
        return log, [watched, *noted(answers[:4], iteration, scores, refined, outcome)]

    def questions(self, iteration: int) -> list[int]:
        """Indices of the iteration's questions: of each data set its share, and every question once in each pass over its
        set, in an order of its own."""
        weights, out, first = [weight for _, weight in self.parts], [], 0
        while len(self.dealt) <= iteration:  # of each data set how many, after each iteration
            self.dealt.append(deal(self.dealt[-1], self.o.questions, weights))
        for (n, _), start, end in zip(self.parts, self.dealt[iteration - 1], self.dealt[iteration]):
            places = range(start, end)
            orders = {e: random.Random(f"{self.o.seed}-{e}").sample(range(n), n) for e in {p // n for p in places}}
            out += [first + orders[p // n][p % n] for p in places]
            first += n
        return out

    def share(self, chosen: list[int]) -> list[int]:
        """Which of the iteration's questions are this rank's. Long questions get long answers: dealt longest first, there
        and back, so that the ranks decode about as long."""
        order = sorted(range(len(chosen)), key=lambda q: -len(self.prompts[chosen[q]]))
        there_and_back = [*range(self.world), *reversed(range(self.world))]
        return sorted(q for place, q in enumerate(order) if there_and_back[place % (2 * self.world)] == self.rank)

    def sample(self, iteration: int):
        """This rank's problems, their samples, the batch of B answers, and the index of each in the whole iteration."""
        o, chosen = self.o, self.questions(iteration)
        mine = self.share(chosen)
        prompts = [self.prompts[chosen[q]] for q in mine]
        sync(self.sampler.model, self.policy.lm)
        samples = rollout(
            self.sampler, prompts, o.samples, max_new_tokens=o.max_new_tokens, eos_ids=self.eos,
            temperature=o.temperature, top_p=o.top_p, slots=o.slots, seeds=[hash_seed(o.seed, iteration, q) for q in mine],
        )  # fmt: skip
        flat = [s for group in samples for s in group]
        repeated = [prompt for prompt in prompts for _ in range(o.samples)]
        batch = Batch(repeated, [s.ids for s in flat], torch.tensor([s.truncated for s in flat]))
        keys = [q * o.samples + j for q in mine for j in range(o.samples)]
        return [self.problems[chosen[q]] for q in mine], samples, batch, keys

    def score(self, batch: Batch, plans: list, ends, answers: list[dict]):
        """Log-probabilities of policy and reference (B, T), the critic's raw values (B, T) and final values (B,), and
        the reward model's step scores (B, K) or outcome scores (B,), None where the reward has none."""
        o, plan, device = self.o, [rows for minibatch in plans for rows in minibatch], self.device
        read = batch, ends, plan
        if self.reward_model is not None and not self.read.same:  # another tokenizer, or another format: other tokens
            read = self.reread(answers)
        logp_by = lambda policy: batch.map(lambda _, *packed: policy(*packed, o.temperature)[0], plan, device)
        jobs = [lambda: logp_by(self.policy), lambda: logp_by(self.reference)]
        jobs.append(lambda: score_values(self.critic, batch, plan, device))
        if self.reward_model is not None:
            jobs.append(lambda: self.learned(*read))
        logp, ref_logp, (values, final), *learned = side_by_side(*jobs)
        return logp, ref_logp, values, final, *(self.finite(*learned[0]) if learned else (None, None))

    def reread(self, answers: list[dict]) -> tuple[Batch, Tensor, list]:
        """The answers as the reward model reads them: a batch, the ends of its steps (B, K), and its micro-batches."""
        problem = ""
        try:
            batch, ends = self.read(answers)
        except UserError as error:
            problem = str(error)
        if problems := gather([problem] if problem else []):
            raise BrokenReward(problems[0])
        return batch, prm.pad_steps(ends)[0], batch.plans([list(range(len(answers)))], self.o.token_budget)[0]

    def learned(self, batch: Batch, ends, plan: list) -> tuple[Tensor | None, Tensor | None]:
        """Step scores (B, K), or of an ORM outcome scores (B,); None for the other."""
        if self.o.reward == "orm":
            return None, prm.score_outcomes(self.reward_model, batch, plan, self.device)
        return prm.score_steps(self.reward_model, batch, ends, plan, self.device), None

    def finite(self, *learned) -> tuple:
        """What the reward model said, on all ranks. Raises BrokenReward if a part of it is no number."""
        for x in learned:
            if x is not None and (bad := int(all_reduce((~x.isfinite()).sum()))):
                raise BrokenReward(f"the reward model gives {bad} scores that are not finite: train it anew or give another")
        return learned

    def watch(self, iteration: int) -> dict:
        """An answer to the first evaluation question, with the same random numbers in every iteration: `eval.py show` shows
        what training makes of it. All ranks take part, since the reward model may be sharded."""
        o, scores, refined, outcome = self.o, None, None, None
        rows = answer(
            self.sampler, self.tokenizer, self.test, [0], o.prompt, o.separator, max_new_tokens=o.max_new_tokens,
            temperature=o.temperature, slots=o.slots, seed=o.seed,
        )  # fmt: skip
        if self.reward_model is not None:
            scores, outcome = self.finite(*self.learned(*self.reread(rows)))
        if scores is not None:
            refined = refine(o.reward, scores, torch.ones_like(scores, dtype=torch.bool), o.eta)
        return noted(rows, iteration, scores, refined, outcome)[0] | {"watched": True}

    def rollout_metrics(self, batch: Batch, answers: list[dict], mask, refined, outcome) -> dict:
        """One number for each of the B answers, to be averaged over all of them."""
        zero = torch.zeros(len(answers))
        count = {
            "process_reward": refined.sum(1) if refined is not None else outcome if outcome is not None else zero,
            "steps": mask.sum(1),
            "tokens": batch.mask.sum(1),
            "repeats": torch.tensor([a["repeats"] for a in answers]),
            "truncated": batch.truncated,
            "nonzero": ((refined != 0) & mask).sum(1) if refined is not None else zero,
        }
        if self.toy:
            good = [oracle_at(a["question"], a["response"], a["cuts"]) for a in answers]
            count["good_steps"] = torch.tensor([sum(filter(None, steps)) for steps in good])
        return count

    def evaluate(self) -> tuple[dict, list[dict]]:
        """Greedy and sampled results on the evaluation problems, and the first greedy answers."""
        o, out, first = self.o, {}, []
        sync(self.sampler.model, self.policy.lm)
        for way, temperature in (("greedy", 0.0), ("sampled", o.temperature)):
            result, answers = evaluate(
                self.sampler, self.tokenizer, self.test, o.prompt, o.separator, max_new_tokens=o.max_new_tokens,
                temperature=temperature, slots=o.slots, rank=self.rank, world=self.world, progress=f"evaluate {way}",
            )  # fmt: skip
            out |= {f"{way}_{k}": v for k, v in result.items()}
            first = first or answers[:3]
            sources = {p.source for p in self.test}
            for source in sorted(sources) if len(sources) > 1 else ():
                rows = [row for row in answers if self.test[row["index"]].source == source]
                out |= {f"{way}_{k}:{source}": v for k, v in summarise(rows, 1).items() if k in ("accuracy", "stderr")}
        return out, first

    def tensors(self) -> dict:
        """All that training changes and a checkpoint must hold, by name; loading writes into these tensors."""
        out = {"value_norm": self.value_norm.sums}
        for kind, model, optimizer in zip(("policy", "critic"), (self.policy, self.critic), self.optimizers):
            for name, p in model.named_parameters():
                if p.requires_grad:
                    out |= {f"{kind}.{name}": p.detach(), **{f"{kind}.{name}/{k}": x for k, x in optimizer.state[p].items()}}
        return out


# ------------------------------------------------------------------------------------------------ checkpoints


def fixed(options: dict) -> dict:
    return {k: v for k, v in options.items() if k not in FREE}


def differences(old: dict, new: dict) -> str:
    return ", ".join(f"{k} {old.get(k)} -> {new.get(k)}" for k in {**old, **new} if old.get(k) != new.get(k))


def checkpoints(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("checkpoint-*") if p.name[11:].isdigit())


def remove(path: Path) -> None:
    """First out of the way: a half removed checkpoint must not look like a damaged one."""
    gone = path.with_name("checkpoint.old")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


def signature(path: Path) -> list:
    """Name, size and checksum of a file."""
    size = value = 0
    if path.is_file():
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                size, value = size + len(block), zlib.crc32(block, value)
    return [path.name, size, value]


def save_checkpoint(folder: Path, iteration: int, trainer: Trainer, sources: dict) -> None:
    """FOLDER/checkpoint-ITERATION: each rank writes its part of the tensors, rank 0 a manifest with everything else and a
    checksum of each file. It gets its name when it is complete and on the disk; then the oldest ones go."""
    new, name, rank = folder / "checkpoint.new", f"checkpoint-{iteration:06d}", trainer.rank
    if rank == 0:
        shutil.rmtree(new, ignore_errors=True)
    barrier()
    try:
        dcp.save(trainer.tensors(), checkpoint_id=new, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise UserError(f"cannot write {new}: {cause}; the checkpoints before it are untouched") from None
    files = gather([signature(path) for path in sorted(new.glob(f"__{rank}_*"))])
    cuda = torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else []
    rng = gather([[torch.get_rng_state().tolist(), cuda]])
    if rank == 0:
        manifest = {"iteration": iteration, "world": trainer.world, "options": fixed(asdict(trainer.o)), "sources": sources}
        manifest |= {"files": [*files, signature(new / ".metadata")], "rng": rng}
        write(new / "manifest.json", json.dumps(manifest))
        new.rename(folder / name)
        for old in checkpoints(folder)[: -trainer.o.keep]:
            remove(old)
    barrier()


def load_checkpoint(folder: Path, trainer: Trainer, sources: dict) -> int:
    """Read the last checkpoint, or the one that --resume-from names, into the trainer; returns its iteration, 0 if there is
    none yet. Raises UserError if it is damaged or of another run."""
    o, found = trainer.o, {int(path.name[11:]): path for path in on_rank_0(lambda: checkpoints(folder))}
    if not found and not o.resume_from:
        return 0
    wanted = o.resume_from or max(found)
    if wanted not in found:
        raise UserError(f"{folder} has no checkpoint of iteration {wanted}, but of {', '.join(map(str, found)) or 'none'}")
    path, before = found[wanted], [n for n in found if n < wanted]
    mend = f"--resume-from {before[-1]} takes the one before it" if before else "there is none before it"
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{path} is damaged (its manifest cannot be read); {mend}") from None
    damaged = [file[0] for file in files[trainer.rank :: trainer.world] if signature(path / file[0]) != file]
    if damaged := gather(damaged):
        raise UserError(f"{path} is damaged ({', '.join(damaged)}); {mend}")
    if other := differences({**manifest["options"], **manifest["sources"]}, {**fixed(asdict(o)), **sources}):
        raise UserError(f"{path} is of another configuration ({other}): use that one, or another --name")
    dcp.load(trainer.tensors(), checkpoint_id=path, no_dist=not dist.is_initialized())
    if manifest["world"] == trainer.world:
        cpu, cuda = manifest["rng"][trainer.rank]
        torch.set_rng_state(torch.tensor(cpu, dtype=torch.uint8))
        if cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state(torch.tensor(cuda, dtype=torch.uint8))
    for later in [n for n in found if n > wanted] if trainer.rank == 0 else ():
        remove(found[later])
    return manifest["iteration"]


# ------------------------------------------------------------------------------------------------ runs


def same_options(folder: Path, o: Options) -> None:
    """Raises UserError if the run in this folder has others."""
    old = {**asdict(Options()), **json.loads((folder / "config.json").read_text())}  # of an older version, perhaps
    if changed := differences(fixed(old), fixed(asdict(o))):
        raise UserError(f"{folder} was started with other options ({changed}): use those, or another --name")


def open_run(o: Options, again: bool = False) -> Path:
    """The folder of the run, of the last one without a name if it starts `again`. Raises UserError if it exists and is not
    to be resumed, is in use, or has other options."""
    runs, base = Path(o.runs_dir), f"{o.preset or 'run'}-{o.reward}-s{o.seed}"
    taken = lambda folder: (folder / "config.json").exists()
    numbered = [runs / (base if i == 1 else f"{base}-{i}") for i in range(1, 1000)]
    folder = runs / o.name if o.name else next(x for x in numbered if not taken(x))
    if again and not o.name:
        folder = max((x for x in numbered if taken(x)), key=numbered.index, default=folder)
    if taken(folder) and not o.resume:
        raise UserError(f"{folder} exists: --resume continues it, another --name starts a new run")
    if taken(folder):
        lock(folder / "lock").close()  # to say so now, not after the preparation
        same_options(folder, o)
    elif o.resume:
        print(f"{folder} holds no run yet: it starts", flush=True)
    return folder


def keep_until(path: Path, iteration: int) -> None:
    """Drop the lines that a stopped run wrote after its checkpoint, and a half line."""
    write(path, "".join(line for line in whole_lines(path) if json.loads(line)["iteration"] <= iteration))


class Interrupt:
    """Within it, SIGTERM and Ctrl-C are noted, so that the iteration can be finished and saved; a second one kills."""

    def __enter__(self):
        self.number = 0
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame) -> None:
        if self.number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.number = number
        if os.environ.get("RANK", "0") == "0":
            print("\nstopping after this iteration, to save it; once more stops at once", file=sys.stderr, flush=True)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def load_data(o: Options) -> tuple[list, list, list, list]:
    """Training problems, their prompts, evaluation problems, and (size, weight) of each training set: first of all, so that
    bad input costs no time. A question that the evaluation asks too is dropped."""
    tokenizer = load_tokenizer(o.model) if o.model else toy_tokenizer(o.data)
    known, sizes = load_mixture(o.eval_data or o.data, "test", o.eval_problems if o.data in WORLDS else None)
    rest = iter(known)
    test = [p for n, _ in sizes for p in [*islice(rest, n)][: o.eval_problems]]
    encode_prompts(tokenizer, test, o.prompt, o.max_prompt_tokens)
    found, sizes = load_mixture(o.data, "train")
    say = print if os.environ.get("RANK", "0") == "0" else lambda *_, **__: None
    if not o.eval_data and (same := [name for name in mixture(o.data) if Path(name).is_file()]):
        say(f"{', '.join(same)}: training and evaluation ask the same questions; --eval-data names others", flush=True)
        known = [p for p in known if p.source not in same]
    problems, prompts, parts, dropped, rest = [], [], [], [0] * 4, iter(found)
    for n, weight in sizes:
        kept, *alike = drop_known([*islice(rest, n)], known)
        if not kept:
            raise UserError(f"--data {o.data}: the evaluation asks all of one set's questions; choose another --eval-data")
        unique = [*{p.question: p for p in kept}.values()]
        encoded = encode_prompts(tokenizer, unique, o.prompt, 1 << 30)
        fits = [i for i, prompt in enumerate(encoded) if len(prompt) <= o.max_prompt_tokens]
        if not fits:
            encode_prompts(tokenizer, unique, o.prompt, o.max_prompt_tokens)  # which says so
        problems, prompts = problems + [unique[i] for i in fits], prompts + [encoded[i] for i in fits]
        parts.append((len(fits), weight))
        counts = (*alike, len(kept) - len(unique), len(unique) - len(fits))
        dropped = [x + y for x, y in zip(dropped, counts)]
    if o.data not in WORLDS:
        why = ("the evaluation asks too", "differ from one of its own in spacing, case or punctuation alone",
               "repeat another", f"have more than {o.max_prompt_tokens} tokens")  # fmt: skip
        counts = ", ".join(f"{n} that {reason}" for n, reason in zip(dropped, why))
        say(f"{len(problems)} training questions; dropped {counts}", flush=True)
    return problems, prompts, test, parts


def loop(o: Options, folder: Path, trainer: Trainer, sources: dict, config: dict, interrupt: Interrupt) -> None:
    rank, metrics, samples, exported = trainer.rank, folder / "metrics.jsonl", folder / "samples.jsonl", folder / "model"
    start = load_checkpoint(folder, trainer, sources) if o.resume else 0
    if start >= o.iterations and exported.exists():  # no mistake: a script that resumes until it is done may ask once more
        if rank == 0:
            print(f"{folder} has run its {start} iterations already: raise --iterations to go on")
        return
    before, first = after, last = json.loads((folder / "before.json").read_text()) if start else trainer.evaluate()
    if rank == 0:
        write(folder / "config.json", json.dumps(config, indent=1))
        write(folder / "before.json", json.dumps([before, first]))
        keep_until(metrics, start or -1)  # -1: the line of iteration 0 is written anew
        keep_until(samples, start)
        if not start:
            append(metrics, [{"iteration": 0, **before}])
        print(f"PPO, reward {o.reward}, alpha {o.alpha:g}: {o.iterations} iterations of {o.questions} x {o.samples} answers")
    log_to = open_log(o, folder, start) if rank == 0 else None
    bar = tqdm(total=o.iterations, initial=start, desc=f"PPO {o.reward}", unit="iteration", disable=rank > 0)
    for iteration in range(start + 1, o.iterations + 1):
        try:
            log, answers = trainer.iteration(iteration)
        except BrokenReward:
            if not (folder / f"checkpoint-{iteration - 1:06d}").exists():
                save_checkpoint(folder, iteration - 1, trainer, sources)
            raise
        except NonFinite as error:
            path = folder / f"nonfinite-{iteration:06d}-rank{rank}.pt"
            torch.save(trainer.seen, path)
            raise UserError(f"iteration {iteration}: {error}; its batch is in {path}, the last checkpoint stands") from None
        final = iteration == o.iterations
        if final or (o.eval_every and iteration % o.eval_every == 0):
            after, last = trainer.evaluate()
            log |= after
        if rank == 0:
            append(metrics, [log])
            append(samples, answers)
            log_to(log)
        stop = int(all_reduce(torch.tensor(interrupt.number), "max"))
        if stop or final or (o.save_every and iteration % o.save_every == 0):
            save_checkpoint(folder, iteration, trainer, sources)
        shown = ("success", "process_reward", "steps", "repeats", "kl")
        bar.set_postfix({k: f"{log[k]:.2f}" for k in shown} | {"tok/s": f"{log['tokens_per_second']:.0f}"})
        bar.update()
        if stop and not final:
            bar.close()
            if rank == 0:
                how = f"--name {folder.name} --resume goes on"
                print(f"stopped by {signal.Signals(stop).name} after iteration {iteration}, saved: {how}", flush=True)
            return
    bar.close()
    if start >= o.iterations:  # stopped between the last checkpoint and the end
        after, last = trainer.evaluate()
    new = folder / "model.new"
    save_lm(trainer.policy.lm, trainer.tokenizer, new, rank)
    if rank == 0:
        shutil.rmtree(exported, ignore_errors=True)
        new.rename(exported)
        print(before_after(before, after, (first, last)))
        print(f"\nwritten: {folder}/ (metrics.jsonl, samples.jsonl, model/)")


def run(o: Options, folder: Path, rank: int, world: int, device) -> None:
    problems, prompts, _, parts = data = load_data(o)
    if o.prm or o.orm:
        found = prm.find_format(o.prm or o.orm, o.prm_format)  # now, not after the preparation
        if o.orm and found != "own":
            raise UserError(f"--orm {o.orm}: a published PRM; give it as --prm, with a reward that reads one")
    if device.type == "cuda" and o.model:
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        longest = max(map(len, prompts)) + o.max_new_tokens
        table, mend = plan(o, world, torch.cuda.get_device_properties(device).total_memory / 1e9, per_node, longest)
        if rank == 0 and not mend:
            print(table, flush=True)
        if mend:
            raise UserError(f"{table}\n{mend}")
    policy, reward_model = prepare(o, problems, parts, rank, world, device)
    gc.collect()  # the models that it needed: they refer to themselves
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trainer = Trainer(o, data, policy, reward_model, rank, world, device)
    identity = lambda path: prm.identity(path) if path else ""
    sources = on_rank_0(lambda: {"policy": identity(policy), "reward model": identity(reward_model)})
    sources["problems"] = prm.fingerprint(problems)
    config = asdict(o) | dict(zip(MADE_OF, (policy, reward_model, on_rank_0(commit))))
    with on_rank_0(lambda: lock(folder / "lock"), share=False) or nullcontext(), Interrupt() as interrupt:
        loop(o, folder, trainer, sources, config, interrupt)
    if interrupt.number and world == 1:  # what a shell expects; torchrun would take it for a failure, and start again
        os.kill(os.getpid(), interrupt.number)


def open_log(o: Options, folder: Path, start: int):
    """log(metrics) to the service of --log-to, under the run's name; nothing without."""
    numbers = lambda log: {k: v for k, v in log.items() if isinstance(v, int | float) and k != "iteration"}
    if o.log_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

        def log(metrics: dict) -> None:
            for name, value in numbers(metrics).items():
                writer.add_scalar(name, value, metrics["iteration"])
            writer.flush()

        return log
    if o.log_to == "wandb":
        import wandb

        name = f"{folder.name}-{zlib.crc32(str(folder.resolve()).encode()):08x}"
        where = dict(project="reward-design", name=folder.name, id=name, resume="allow", dir=str(folder))
        run = wandb.init(config=asdict(o), **where)
        return lambda metrics: run.log(numbers(metrics), step=metrics["iteration"])
    return lambda metrics: None


# ------------------------------------------------------------------------------------------------ many runs


def sweep(o: Options, argv: list[str]) -> None:
    """All runs of a sweep, each a process of its own, some at once, under one progress bar. Those that are done are left as
    they are, others continue. Raises UserError at the end if one has failed."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--sweep", nargs="+")
    first.add_argument("--workers")
    rest, runs = first.parse_known_args(argv)[1], combinations(o.sweep)
    own = {"name", "runs_dir", "resume", "sweep", "workers", "plan"}
    if unknown := {k for run in runs.values() for k in run} - ({f.name for f in fields(Options)} - own):
        raise UserError(f"--sweep {min(unknown)}=...: a sweep has no option of that name, see python train.py --help")
    workers = o.workers or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    calls, folder, goals = {}, Path(o.runs_dir), {}
    for name, run in runs.items():
        chosen = [x for k, v in run.items() for x in (f"--{k.replace('_', '-')}", v)]
        calls[name] = [*rest, *chosen, "--name", name, "--resume", *(["--threads", "1"] if workers > 1 else [])]
        run = parse(calls[name])[0]  # a mistake is told before the first run
        goals[name] = run.iterations
        if (folder / name / "config.json").exists():
            same_options(folder / name, run)

    def reached(name: str) -> int:
        lines = whole_lines(folder / name / "metrics.jsonl")
        return json.loads(lines[-1])["iteration"] if lines else 0

    waiting = [name for name in runs if reached(name) < goals[name] or not (folder / name / "model").exists()]
    running, failed, told, seen = {}, [], [], {name: reached(name) for name in runs}
    folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=sum(goals.values()), initial=sum(seen.values()), desc=f"{len(runs)} runs", unit="iteration")
    with Interrupt() as interrupt:
        while running or (waiting and not interrupt.number):
            while waiting and len(running) < workers and not interrupt.number:
                name = waiting.pop(0)
                with open(folder / f"{name}.log", "w") as log:
                    call = [sys.executable, str(Path(__file__).resolve()), *calls[name]]
                    single = {**os.environ, "OMP_NUM_THREADS": "1"} if workers > 1 else None
                    running[name] = subprocess.Popen(call, stdout=log, stderr=log, env=single, start_new_session=True)
            time.sleep(0.5)
            for name in [*running]:
                if interrupt.number and name not in told:
                    running[name].terminate()  # which it notes; it finishes its iteration, and saves
                    told.append(name)
                seen[name] = max(seen[name], reached(name))
                if (code := running[name].poll()) is not None:
                    del running[name]
                    if code and not interrupt.number:
                        failed.append(name)
            left = f"{len(waiting)} waiting" + (f", {len(failed)} failed" if failed else "")
            bar.set_postfix_str(", ".join([*running, left]), refresh=False)
            if new := sum(seen.values()) - bar.n:
                bar.update(new)
    bar.close()
    if interrupt.number:
        print("stopped; the same command goes on", flush=True)
        os.kill(os.getpid(), interrupt.number)
    if failed:
        last = (folder / f"{failed[0]}.log").read_text().strip().splitlines()[-1:]
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; the first says: {' '.join(last)}")
    print(f"{len(runs)} runs in {folder}: " + " ".join(runs))


def main() -> None:
    options, preset = parse()
    if options.sweep:
        sweep(options, sys.argv[1:])
        return
    if options.plan:
        gpus, longest = options.gpus or 8, options.max_prompt_tokens + options.max_new_tokens
        check_share(options, gpus)
        table, mend = plan(options, gpus, options.gpu_memory or 80, 8, longest)
        print(f"{preset}: {options.model}\n{table}", flush=True)
        if mend:
            raise UserError(mend)
        return
    check_share(options, int(os.environ.get("WORLD_SIZE", 1)))  # before the processes meet, of whom one would leave first
    rank, world, device = start_processes()
    if rank == 0:
        print(preset, flush=True)
    if options.threads and world == 1:  # torchrun divides the cores itself
        torch.set_num_threads(options.threads)
    with watching(rank, world):
        # by torchrun --max-restarts, with the same options; its nodes count for themselves: one of them may say 0
        again = bool(all_reduce(torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))), "max"))
        options.resume |= again
        run(options, on_rank_0(lambda: open_run(options, again)), rank, world, device)


if __name__ == "__main__":
    run_script(main)
