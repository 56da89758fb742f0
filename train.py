"""PPO on math problems with any of the six rewards: options, preparation, the loop, logs, checkpoints.

    python train.py --reward delta                                     # the embedded world on a laptop
    torchrun --nproc_per_node 8 train.py --reward delta                # the paper's setting on 8 GPUs
    python train.py --reward clip-delta --model DIR --data FILE.jsonl  # your model, your problems

Before the loop comes what it needs, each stage cached in RUNS_DIR/cache: in the embedded world the warm start, which
makes the policy and a stronger model of the same size, the *completer*; then step labels and the reward model that the
chosen reward reads. A run writes to RUNS_DIR/NAME: config.json, metrics.jsonl (one line an iteration), samples.jsonl
(a few answers of each), checkpoint.pt, and at the end model/ in Hugging Face format.

Left out: sharding of model and optimizer over GPUs (each holds a copy), mixtures of data sets, logging services.
"""

import argparse
import copy
import json
import os
import random
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import HfArgumentParser

import prm
from data import (
    TextOptions, UserError, encode_prompts, is_toy, load_problems, option, oracle, run_script, toy_problems,
    toy_solution, toy_tokenizer,
)  # fmt: skip
from eval import before_after, evaluate, judge
from grader import VERDICTS
from model import (
    Muon, ScalarModel, all_reduce, checkpoint_layers, eos_ids, load_causal_lm, load_tokenizer, optimizer_step,
    same_tokenizer, side_by_side, start_processes, toy_model,
)  # fmt: skip
from ppo import Rollout, ValueNorm, explained_variance, gae, log_probs, minibatches, score_values, update, whiten
from rewards import PROCESS, REWARDS, refine, token_rewards
from rollout import Batch, Sampler, rollout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Options(TextOptions):
    reward: str = option("delta", "success, orm, prm, clip, delta or clip-delta", choices=list(REWARDS))
    preset: str = option("", "toy or paper; default: paper with CUDA, else toy; with --model, none")
    model: str = option("", "policy: a folder or hub name; empty: the embedded world's own")
    data: str = option("gsm8k", "training problems: toy, gsm8k, math, mathinstruct, a hub name or a JSONL file")
    eval_data: str = option("", "evaluation problems; empty: the test split of --data, or --data if it is a file")
    prm: str = option("", "folder of a process reward model; empty: label and train one")
    orm: str = option("", "folder of an outcome reward model; empty: label and train one")
    completer: str = option("", "model that completes step prefixes for the labels; empty: the policy")
    # the reward: alpha * r + Correct - beta * log(pi / pi_ref)
    alpha: float | None = option(None, "weight of the learned reward; default: by reward, see ALPHA")
    eta: float = option(0.5, "threshold of clip: steps that score above it get 0")
    beta: float = option(0.02, "weight of the KL penalty")
    # the rollout
    questions: int = option(64, "questions per iteration")
    samples: int = option(4, "answers per question")
    temperature: float = option(1.0, "of sampling, reference and training alike")
    top_p: float = option(1.0, "sample from the most likely tokens that hold this mass; 1: off")
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
    clip: float = option(0.2, "epsilon of the ratio clip")
    value_clip: float = option(0.2, "epsilon of the value clip, in normalised units; 0: off")
    max_grad_norm: float = option(1.0, "gradient clip")
    token_budget: int = option(16384, "packed tokens per micro-batch; changes memory and speed, never the gradient")
    checkpoint_activations: bool = option(False, "keep only the layers' inputs, recompute the rest: less memory, slower")
    dtype: str = option("float32", "of the forward passes; weights stay float32", choices=["float32", "bfloat16"])
    # the reward model, where one is made
    label_problems: int = option(500, "questions whose solutions are labelled; 0: make no reward model")
    label_samples: int = option(1, "solutions per labelled question")
    completions: int = option(4, "completions per step prefix")
    labels: str = option("hard", "hard: any completion right; soft: the share of right ones", choices=["hard", "soft"])
    rm_epochs: int = option(2, "passes over the labelled solutions")
    rm_lr: float = option(1e-5, "learning rate of the reward model; 0: train its head alone")
    rm_head_lr: float = option(1e-3, "learning rate of the reward model's head")
    rm_likelihood: bool = option(False, "let the head read the LM's own lowest log-probability")
    # the run
    eval_problems: int = option(200, "evaluation problems")
    eval_every: int = option(10, "iterations between evaluations; 0: only before and after")
    seed: int = option(0, "of the run: problems' order, sampling, minibatches")
    prepare_seed: int = option(0, "of the preparation: warm start, labels, reward model")
    name: str = option("", "name of the run; empty: from preset, reward and seed")
    runs_dir: str = option("runs", "where runs and the cache live")
    threads: int = option(0, "CPU threads of a single process; 0: torch's choice")
    resume: bool = option(False, "continue the run NAME from its checkpoint")
    save_every: int = option(10, "iterations between checkpoints; 0: only at the end")


PRESETS = {
    # The embedded world. Sizes so that a laptop's two cores need minutes.
    "toy": dict(
        data="toy", eval_data="toy", prompt="{question}", max_prompt_tokens=32, max_new_tokens=128,
        questions=768, samples=1, iterations=20, minibatches=2, lr=3e-4, critic_lr=1e-3, token_budget=4096,
        label_problems=1000, rm_epochs=4, rm_lr=3e-4, rm_head_lr=2e-2, rm_likelihood=True, slots=768,
        eval_problems=1000,
        threads=2,  # more do not help so small a model
    ),
    # The paper's 1.5B setting. Its learning rates, alpha, beta and eta are not published: those here are ours.
    "paper": dict(
        model="Qwen/Qwen2-1.5B-Instruct", data="mathinstruct", eval_data="math", separator="\n\n", dtype="bfloat16",
        questions=1024, samples=8, max_new_tokens=1024, label_problems=2000, eval_problems=5000,
    ),
}  # fmt: skip
ALPHA = {"success": 0.0, "orm": 1.0, "prm": 1.0, "clip": 1.0, "delta": 0.1, "clip-delta": 1.0}


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
        preset, why = "paper", "CUDA is present; --preset toy runs the embedded world"
    else:
        preset, why = "toy", "no CUDA here: the embedded world, on the CPU"
    if preset and preset not in PRESETS:
        raise UserError(f"--preset {preset}: there is none of that name, choose {' or '.join(PRESETS)}")
    parser = HfArgumentParser(Options, usage="python train.py [--reward NAME] [--OPTION VALUE ...]", allow_abbrev=False)
    parser.set_defaults(**PRESETS.get(preset, {}), preset=preset)
    options = Options(**vars(parser.parse_args(argv)))
    check(options)
    if options.alpha is None:
        options.alpha = ALPHA[options.reward]
    return options, f"preset: {preset or 'none'} ({why})"


def reward_model_kind(reward: str) -> str:
    return "orm" if reward == "orm" else "prm" if reward in PROCESS else ""


def check(o: Options) -> None:
    """Raises UserError for options that cannot work together."""
    kind = reward_model_kind(o.reward)
    for name in ("prm", "orm"):
        if getattr(o, name) and kind != name:
            raise UserError(f"--{name} is not used by --reward {o.reward}: drop it, or choose a reward that uses it")
    if kind and not getattr(o, kind) and o.label_problems <= 0:
        raise UserError(f"--reward {o.reward} needs a reward model: give --{kind} DIR, or let --label-problems be above 0")
    if o.reward == "success" and o.alpha is not None:
        raise UserError("--alpha weighs a learned reward, which --reward success has not: drop it")
    if o.eta != Options.eta and "clip" not in o.reward:
        raise UserError(f"--eta is the threshold of clip and clip-delta, and --reward {o.reward} does not clip: drop it")
    if not o.model and o.data != "toy":
        raise UserError(f"--data {o.data} needs a --model: the embedded policy only knows its own world")
    if o.resume and not o.name:
        raise UserError("--resume needs the --name of the run to continue")
    low = {"temperature": 1e-6, "questions": 1, "samples": 1, "epochs": 1, "minibatches": 1, "slots": 1,
           "token_budget": 1, "completions": 1, "label_samples": 1, "iterations": 1, "beta": 0,
           "eval_problems": 1, "eval_every": 0, "save_every": 0, "value_clip": 0, "rm_epochs": 1, "threads": 0}  # fmt: skip
    for name, least in low.items():
        if getattr(o, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least:g}")
    if o.minibatches > o.questions * o.samples:
        raise UserError(f"--minibatches {o.minibatches} is more than the {o.questions * o.samples} answers of an iteration")
    if not 0 < o.top_p <= 1:
        raise UserError("--top-p must be above 0 and at most 1")


# ------------------------------------------------------------------------------------------------ preparation


def warm_start(seed: int, folder: Path, rank: int, world: int, device) -> None:
    """Teach the embedded policy to answer at all, from demonstrations. Writes folder/policy, the weights at which sampled
    accuracy first passed one half, and folder/completer, where training ends: it is to the policy what the paper's 7B is
    to its 1.5B."""
    steps, questions = 850, 64
    tokenizer = toy_tokenizer()
    model, snapshot, accuracy = toy_model(tokenizer, seed).to(device), None, 0.0
    is_matrix = lambda name, p: p.dim() == 2 and "embed" not in name
    optimizers = [
        Muon([p for name, p in model.named_parameters() if is_matrix(name, p)], lr=5e-3),
        torch.optim.AdamW([p for name, p in model.named_parameters() if not is_matrix(name, p)], lr=3e-3, betas=(0.9, 0.98)),
    ]
    scale = lambda s: min((s + 1) / 100, 1, (steps - s) / (0.2 * steps))  # up, constant, down
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, scale) for o in optimizers]
    problems = toy_problems("train", steps * questions, seed=1000 + seed)
    probe = toy_problems("train", 200, seed=2000 + seed)
    rng = random.Random(seed)
    for step in (bar := tqdm(range(steps), desc="warm start", unit="step", disable=rank > 0)):
        chosen = problems[step * questions : (step + 1) * questions]
        prompts = encode_prompts(tokenizer, chosen, "{question}", 32)
        responses = [tokenizer.encode(toy_solution(p.question, rng)) + [tokenizer.eos_token_id] for p in chosen]
        batch = Batch(prompts, responses, torch.zeros(questions, dtype=torch.bool))
        loss = torch.zeros(())
        for rows in batch.plan(list(range(rank, questions, world)), 8192):
            logp, _ = log_probs(model, *batch.pack(rows, device), temperature=1.0)
            part = -logp.sum() / batch.mask.sum()
            part.backward()
            loss += part.detach().cpu()
        optimizer_step(model, optimizers, 1.0)
        for schedule in schedules:
            schedule.step()
        if step >= 300 and step % 25 == 0 and snapshot is None:
            result, _ = evaluate(model, tokenizer, probe, "{question}", "\n", max_new_tokens=128, rank=rank, world=world)
            accuracy = result["accuracy"]
            snapshot = copy.deepcopy(model) if accuracy > 0.5 else None
        bar.set_postfix(loss=f"{all_reduce(loss).item():.3f}", accuracy=f"{accuracy:.2f}")
    if rank == 0:
        for m, name in ((snapshot or model, "policy"), (model, "completer")):
            m.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)


def prepare(o: Options, found: list, rank: int, world: int, device) -> tuple[str, str]:
    """The folders (or hub names) of the policy to start from and of the reward model ("" for success), made if need be;
    labels come from some of the problems `found`, or from the embedded world's own supply."""
    cache, policy, completer = Path(o.runs_dir) / "cache", o.model, o.completer or o.model
    if not policy:
        make = lambda folder: warm_start(o.prepare_seed, folder, rank, world, device)
        folder = prm.cached(cache, "toy", "warm start of the embedded policy", {"seed": o.prepare_seed}, make, rank)
        policy, completer = str(folder / "policy"), o.completer or str(folder / "completer")
    kind = reward_model_kind(o.reward)
    if not kind or getattr(o, kind):
        return policy, getattr(o, kind) if kind else ""

    def problems():
        if o.data == "toy":
            return toy_problems("train", o.label_problems, seed=3000 + o.prepare_seed)
        return random.Random(o.prepare_seed).sample(found, min(o.label_problems, len(found)))

    labels = prm.LabelOptions(
        o.prompt, o.separator, o.max_prompt_tokens, o.max_new_tokens, problems=o.label_problems, samples=o.label_samples,
        completions=o.completions, temperature=o.temperature, slots=o.slots, seed=o.prepare_seed,
    )  # fmt: skip
    training = prm.TrainOptions(kind, o.labels, o.rm_epochs, o.rm_lr, o.rm_head_lr, likelihood=o.rm_likelihood)
    dtype = DTYPES[o.dtype]
    return policy, prm.prepare_reward_model(
        cache, policy, completer, o.data, problems, labels, training, dtype=dtype, device=device, rank=rank, world=world
    )


# ------------------------------------------------------------------------------------------------ the loop


class Trainer:
    """Models, optimizers and problems of one run; `iteration` is the algorithm."""

    def __init__(self, o: Options, data: tuple, model: str, reward_model: str, rank: int, world: int, device):
        self.o, self.rank, self.world, self.device = o, rank, world, device
        self.problems, self.prompts, self.test = data
        self.toy = all(is_toy(p.question) for p in self.problems)  # of all ranks' problems: they must log the same metrics
        self.dtype = DTYPES[o.dtype]
        self.tokenizer = load_tokenizer(model)
        self.policy = load_causal_lm(model, device=device)
        self.critic = ScalarModel(load_causal_lm(model, device=device)).eval()
        if o.checkpoint_activations:
            for lm in (self.policy, self.critic.lm):
                checkpoint_layers(lm)
        self.reference = load_causal_lm(model, self.dtype, device).requires_grad_(False)
        # what samples: the policy itself, or a low-precision copy of it
        self.sampler = Sampler(self.policy if self.dtype == torch.float32 else copy.deepcopy(self.reference))
        self.reward_model = None
        if reward_model:
            same_tokenizer(self.tokenizer, reward_model)
            self.reward_model = ScalarModel.load(reward_model, self.dtype, device).requires_grad_(False)
        self.optimizers = [  # the second moments must forget within a run of tens of steps, hence the low betas
            torch.optim.AdamW(self.policy.parameters(), lr=o.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
            torch.optim.AdamW(self.critic.parameters(), lr=o.critic_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]
        self.value_norm = ValueNorm()

    def iteration(self, iteration: int) -> tuple[dict, list[dict]]:
        """Sample, grade, score, reward, advantage, update. Returns metrics over all ranks, and a few answers."""
        o, clock = self.o, Clock()

        # 1. sample, with the seeds of (iteration, question): the same answers whatever the number of ranks
        problems, samples, batch, keys = self.sample(iteration)
        clock("sample")

        # 2. grade the final answers, find the steps
        answers = judge(self.tokenizer, problems, samples, o.separator)
        correct = torch.tensor([a["correct"] for a in answers])  # (B,)
        ends, mask = prm.pad_steps([a["ends"] for a in answers])  # (B, K)
        clock("grade")

        # 3. score, in the micro-batches of the update, so that the ratio starts at exactly 1
        total = o.questions * o.samples
        deals = [minibatches(keys, total, o.minibatches, hash_seed(o.seed, iteration, e)) for e in range(o.epochs)]
        plans = [batch.plan(rows, o.token_budget) for deal in deals for rows in deal]
        logp, ref_logp, raw_values, raw_final, scores, outcome = self.score(batch, plans[: o.minibatches], ends)
        clock("score")

        # 4. reward each token
        refined = None if scores is None else refine(o.reward, scores, mask, o.eta)
        rewards = token_rewards(
            logp, ref_logp, batch.mask, correct, batch.truncated, beta=o.beta, alpha=o.alpha, outcome=outcome,
            steps=refined, step_ends=ends, step_mask=mask,
        )  # fmt: skip

        # 5. advantages; a truncated answer would have gone on, so it bootstraps
        values = self.value_norm.denormalise(raw_values) * batch.mask
        bootstrap = self.value_norm.denormalise(raw_final) * batch.truncated
        advantages, returns = gae(rewards, values, batch.mask, bootstrap, o.gamma, o.lam)
        self.value_norm.update(returns, batch.mask)
        data = Rollout(logp, whiten(advantages, batch.mask), raw_values, self.value_norm.normalise(returns))

        # 6. update policy and critic
        warm = (iteration - o.critic_warmup) / max(o.lr_warmup, 1)
        self.optimizers[0].param_groups[0]["lr"] = lr = o.lr * min(1, max(0, warm))
        losses = update(
            self.policy, self.critic, self.optimizers, batch, data, plans, temperature=o.temperature, clip=o.clip,
            value_clip=o.value_clip, max_grad_norm=o.max_grad_norm, train_policy=iteration > o.critic_warmup,
            autocast=self.autocast,
        )  # fmt: skip
        clock("update")

        # 7. log: means over the answers of all ranks
        per_answer = {"return": rewards.sum(1), "success": correct, "kl": ((logp - ref_logp) * batch.mask).sum(1)}
        per_answer |= self.rollout_metrics(batch, answers, mask, refined, outcome)
        log = {k: all_reduce(x.sum(dtype=torch.float64)).item() / total for k, x in per_answer.items()}
        verdicts = torch.tensor([[a["verdict"] == kind for kind in VERDICTS] for a in answers]).sum(0)
        log |= dict(zip((kind.replace(" ", "_") for kind in VERDICTS), all_reduce(verdicts).tolist()))
        for share in {"nonzero", "good_steps"} & log.keys():
            log[share] /= max(log["steps"], 1e-9)
        log |= {"explained_variance": explained_variance(values, returns, batch.mask), "lr": lr, **losses, **clock.seconds}
        log = {"iteration": iteration, **log}
        log["tokens_per_step"] = log["tokens"] / max(log["steps"], 1e-9)
        log["tokens_per_second"] = log["tokens"] * total / sum(clock.seconds.values())
        few = answers[:4]
        for i, answer in enumerate(few):
            K = answer["steps"]
            answer["iteration"] = iteration
            answer["scores"] = None if scores is None else scores[i, :K].tolist()
            answer["refined"] = None if refined is None else refined[i, :K].tolist()
            answer["outcome"] = None if outcome is None else outcome[i].item()
        return log, few

    def questions(self, iteration: int) -> list[int]:
        """Indices of the iteration's questions: every question once in each pass over the data, in an order of its own."""
        n, Q = len(self.problems), self.o.questions
        places = range((iteration - 1) * Q, iteration * Q)
        orders = {e: random.Random(f"{self.o.seed}-{e}").sample(range(n), n) for e in {p // n for p in places}}
        return [orders[p // n][p % n] for p in places]

    def sample(self, iteration: int):
        """This rank's problems, their samples, the batch of B answers, and the index of each in the whole iteration."""
        o, chosen = self.o, self.questions(iteration)
        mine = range(self.rank, o.questions, self.world)
        prompts = [self.prompts[chosen[q]] for q in mine]
        sync(self.sampler.model, self.policy)
        samples = rollout(
            self.sampler, prompts, o.samples, max_new_tokens=o.max_new_tokens, eos_ids=eos_ids(self.policy, self.tokenizer),
            temperature=o.temperature, top_p=o.top_p, slots=o.slots, seeds=[hash_seed(o.seed, iteration, q) for q in mine],
        )  # fmt: skip
        flat = [s for group in samples for s in group]
        repeated = [prompt for prompt in prompts for _ in range(o.samples)]
        batch = Batch(repeated, [s.ids for s in flat], torch.tensor([s.truncated for s in flat]))
        keys = [q * o.samples + j for q in mine for j in range(o.samples)]
        return [self.problems[chosen[q]] for q in mine], samples, batch, keys

    def score(self, batch: Batch, plans: list, ends):
        """Log-probabilities of policy and reference (B, T), the critic's raw values (B, T) and final values (B,), and
        the reward model's step scores (B, K) or outcome scores (B,), None where the reward has none."""
        o, device = self.o, self.device
        plan = [rows for minibatch in plans for rows in minibatch]

        def scored(score, *args):
            with self.autocast():  # which holds for one thread
                return score(*args, plan, device)

        logp_by = lambda model: lambda _, *packed: log_probs(model, *packed, o.temperature)[0]
        jobs = [
            lambda: scored(batch.map, logp_by(self.policy)),
            lambda: scored(batch.map, logp_by(self.reference)),
            lambda: scored(score_values, self.critic, batch),
        ]
        if o.reward == "orm":
            jobs.append(lambda: scored(prm.score_outcomes, self.reward_model, batch))
        elif o.reward in PROCESS:
            jobs.append(lambda: scored(prm.score_steps, self.reward_model, batch, ends))
        logp, ref_logp, (values, final), *learned = side_by_side(*jobs)
        learned = learned[0] if learned else None
        scores, outcome = (None, learned) if o.reward == "orm" else (learned, None)
        return logp, ref_logp, values, final, scores, outcome

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
            count["good_steps"] = torch.tensor([sum(oracle(a["question"], a["response"])[: a["steps"]]) for a in answers])
        return count

    def evaluate(self) -> tuple[dict, list[dict]]:
        """Greedy and sampled results on the evaluation problems, and the first greedy answers."""
        o, out, first = self.o, {}, []
        sync(self.sampler.model, self.policy)
        for way, temperature in (("greedy", 0.0), ("sampled", o.temperature)):
            result, answers = evaluate(
                self.sampler, self.tokenizer, self.test, o.prompt, o.separator, max_new_tokens=o.max_new_tokens,
                temperature=temperature, slots=o.slots, rank=self.rank, world=self.world, progress=f"evaluate {way}",
            )  # fmt: skip
            out |= {f"{way}_{k}": v for k, v in result.items()}
            first = first or answers[:3]
        return out, first

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def state(self) -> dict:
        return {
            "policy": self.policy.state_dict(),
            "critic": self.critic.state_dict(),
            "optimizers": [x.state_dict() for x in self.optimizers],
            "value_norm": self.value_norm.sums,
        }

    def load_state(self, state: dict) -> None:
        self.policy.load_state_dict(state["policy"])
        self.critic.load_state_dict(state["critic"])
        for optimizer, s in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(s)
        self.value_norm.sums = state["value_norm"].cpu()


class Clock:
    """Seconds by phase."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def __call__(self, phase: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[f"seconds_{phase}"], self.last = now - self.last, now


@torch.no_grad()
def sync(sampler, policy) -> None:
    """Copy the policy's weights into the sampler's low-precision copy, in place; nothing to do where they are one."""
    if sampler is not policy:
        for target, source in zip(sampler.parameters(), policy.parameters()):
            target.copy_(source)


def hash_seed(*parts: int) -> int:
    return zlib.crc32(repr(parts).encode())


# ------------------------------------------------------------------------------------------------ runs


def open_run(o: Options) -> Path:
    """The folder of the run. Raises UserError if it exists and is not to be resumed, or the other way round."""
    runs = Path(o.runs_dir)
    base = f"{o.preset or 'run'}-{o.reward}-s{o.seed}"
    name, number = o.name or base, 2
    while not o.name and (runs / name).exists():
        name, number = f"{base}-{number}", number + 1
    folder = runs / name
    if o.resume:
        if not (folder / "checkpoint.pt").is_file():
            raise UserError(f"{folder} has no checkpoint to resume from")
        old = json.loads((folder / "config.json").read_text())
        # these do not change what is computed
        free = ("resume", "iterations", "save_every", "runs_dir", "slots", "threads", "checkpoint_activations")
        changed = [f"{k} {old.get(k)} -> {v}" for k, v in asdict(o).items() if k not in free and old.get(k) != v]
        if changed:
            raise UserError(f"{folder} was started with other options ({', '.join(changed)}): use those, or another --name")
    elif folder.exists():
        raise UserError(f"{folder} exists: --resume continues it, another --name starts a new run")
    return folder


def keep_until(path: Path, iteration: int) -> None:
    """Drop the lines that a stopped run wrote after its checkpoint, and a half line."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["iteration"] <= iteration]
    path.write_text("".join(kept))


def save(path: Path, value: dict) -> None:
    """Written beside and moved into place: a run killed here keeps its last checkpoint."""
    torch.save(value, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def load_data(o: Options) -> tuple[list, list, list]:
    """Training problems, their prompts, evaluation problems: first of all, so that bad input costs no time."""
    tokenizer = load_tokenizer(o.model) if o.model else toy_tokenizer()
    problems, test = load_problems(o.data, "train"), load_problems(o.eval_data or o.data, "test", o.eval_problems)
    encode_prompts(tokenizer, test, o.prompt, o.max_prompt_tokens)
    return problems, encode_prompts(tokenizer, problems, o.prompt, o.max_prompt_tokens), test


def run(o: Options, folder: Path, rank: int, world: int, device) -> None:
    data = load_data(o)
    trainer = Trainer(o, data, *prepare(o, data[0], rank, world, device), rank, world, device)
    start = 0
    if o.resume:
        checkpoint = torch.load(folder / "checkpoint.pt", map_location=device, weights_only=True)
        trainer.load_state(checkpoint)
        start = checkpoint["iteration"]
        if start >= o.iterations:
            raise UserError(f"{folder} has run its {start} iterations already: raise --iterations to go on")
        before, first = json.loads((folder / "before.json").read_text())
    else:
        before, first = trainer.evaluate()
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(o), indent=1))
        (folder / "before.json").write_text(json.dumps([before, first]))
        for name in ("metrics.jsonl", "samples.jsonl"):
            keep_until(folder / name, start)
        if not o.resume:
            append(folder / "metrics.jsonl", [{"iteration": 0, **before}])
        print(f"PPO, reward {o.reward}, alpha {o.alpha:g}: {o.iterations} iterations of {o.questions} x {o.samples} answers")
    bar = tqdm(total=o.iterations, initial=start, desc=f"PPO {o.reward}", unit="iteration", disable=rank > 0)
    for iteration in range(start + 1, o.iterations + 1):
        log, answers = trainer.iteration(iteration)
        final = iteration == o.iterations
        if final or (o.eval_every and iteration % o.eval_every == 0):
            after, last = trainer.evaluate()
            log |= after
        if rank == 0:
            append(folder / "metrics.jsonl", [log])
            append(folder / "samples.jsonl", answers)
            if final or (o.save_every and iteration % o.save_every == 0):
                save(folder / "checkpoint.pt", {"iteration": iteration, **trainer.state()})
        shown = ("success", "process_reward", "steps", "repeats", "kl")
        bar.set_postfix({k: f"{log[k]:.2f}" for k in shown} | {"tok/s": f"{log['tokens_per_second']:.0f}"})
        bar.update()
    bar.close()
    if rank == 0:
        trainer.policy.save_pretrained(folder / "model")
        trainer.tokenizer.save_pretrained(folder / "model")
        print(before_after(before, after, (first, last)))
        print(f"\nwritten: {folder}/ (metrics.jsonl, samples.jsonl, model/)")


def append(path: Path, rows: list[dict]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    options, preset = parse()
    rank, world, device = start_processes()
    if rank == 0:
        print(preset, flush=True)
    if options.threads and world == 1:  # torchrun divides the cores itself
        torch.set_num_threads(options.threads)
    if options.questions < world:
        raise UserError(f"--questions {options.questions} is less than the {world} processes that share them")
    run(options, open_run(options), rank, world, device)


if __name__ == "__main__":
    run_script(main)
