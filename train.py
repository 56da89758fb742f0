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
import hashlib
import json
import os
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser

import prm
from data import UserError, encode_prompts, load_problems, oracle, run_script, toy_problems, toy_solution, toy_tokenizer
from eval import before_after, evaluate, judge
from model import (
    Muon, ScalarModel, all_reduce, barrier, eos_ids, load_causal_lm, load_tokenizer, optimizer_step, start_processes,
    toy_model,
)  # fmt: skip
from ppo import Rollout, ValueNorm, gae, log_probs, masked_mean, minibatches, score_values, update, whiten
from rewards import PROCESS, REWARDS, refine, token_rewards
from rollout import Batch, rollout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def option(default, help, **kw):
    return field(default=default, metadata={"help": help, **kw})


@dataclass
class Options:
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
    questions: int = option(128, "questions per iteration")
    samples: int = option(8, "answers per question")
    temperature: float = option(1.0, "of sampling, reference and training alike")
    top_p: float = option(1.0, "sample from the most likely tokens that hold this mass; 1: off")
    max_prompt_tokens: int = option(1024, "longest prompt that is accepted")
    max_new_tokens: int = option(1024, "longest answer; a longer one is truncated")
    prompt: str = option("Question: {question}\nAnswer:", "prompt where the tokenizer has no chat template")
    separator: str = option("\n", "what stands between two steps")
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
    dtype: str = option("float32", "of the forward passes; weights stay float32", choices=["float32", "bfloat16"])
    # the reward model, where one is made
    label_problems: int = option(2000, "questions whose solutions are labelled; 0: make no reward model")
    label_samples: int = option(1, "solutions per labelled question")
    completions: int = option(4, "completions per step prefix")
    labels: str = option("hard", "hard: any completion right; soft: the share of right ones", choices=["hard", "soft"])
    rm_epochs: int = option(2, "passes over the labelled solutions")
    rm_lr: float = option(1e-5, "learning rate of the reward model; 0: train its head alone")
    rm_head_lr: float = option(1e-3, "learning rate of the reward model's head")
    rm_likelihood: bool = option(False, "let the head read the LM's own lowest log-probability")
    # the run
    eval_problems: int = option(1000, "evaluation problems")
    eval_every: int = option(10, "iterations between evaluations; 0: only before and after")
    seed: int = option(0, "of the run: problems' order, sampling, minibatches")
    prepare_seed: int = option(0, "of the preparation: warm start, labels, reward model")
    name: str = option("", "name of the run; empty: from preset, reward and seed")
    runs_dir: str = option("runs", "where runs and the cache live")
    resume: bool = option(False, "continue the run NAME from its checkpoint")
    save_every: int = option(10, "iterations between checkpoints; 0: only at the end")


PRESETS = {
    # The embedded world. Sizes so that a laptop's two cores need minutes.
    "toy": dict(
        data="toy", eval_data="toy", prompt="{question}", max_prompt_tokens=32, max_new_tokens=128,
        questions=768, samples=1, iterations=25, minibatches=2, lr=3e-4, critic_lr=1e-3, token_budget=4096,
        label_problems=1000, rm_epochs=4, rm_lr=3e-4, rm_head_lr=2e-2, rm_likelihood=True, slots=768,
    ),
    # The paper's 1.5B setting. Its learning rates, alpha, beta and eta are not published: those here are ours.
    "paper": dict(
        model="Qwen/Qwen2-1.5B-Instruct", data="mathinstruct", eval_data="math", separator="\n\n", dtype="bfloat16",
        questions=1024, samples=8,
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


def check(o: Options) -> None:
    """Raises UserError for options that cannot work together."""
    kind = "orm" if o.reward == "orm" else "prm" if o.reward in PROCESS else ""
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
    low = {"temperature": 1e-6, "questions": 1, "samples": 1, "epochs": 1, "minibatches": 1, "max_new_tokens": 1, "slots": 1,
           "max_prompt_tokens": 1, "token_budget": 1, "completions": 1, "label_samples": 1, "iterations": 0, "beta": 0,
           "eval_problems": 1, "eval_every": 0, "save_every": 0, "value_clip": 0, "rm_epochs": 1}  # fmt: skip
    for name, least in low.items():
        if getattr(o, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least:g}")
    if o.minibatches > o.questions * o.samples:
        raise UserError(f"--minibatches {o.minibatches} is more than the {o.questions * o.samples} answers of an iteration")
    if not 0 < o.top_p <= 1:
        raise UserError("--top-p must be above 0 and at most 1")


# ------------------------------------------------------------------------------------------------ preparation


def warm_start(seed: int, folder: Path, rank: int, world: int) -> None:
    """Teach the embedded policy to answer at all, from demonstrations. Writes folder/policy, the weights at which sampled
    accuracy first passed one half, and folder/completer, where training ends: it is to the policy what the paper's 7B is
    to its 1.5B."""
    steps, questions = 850, 64
    tokenizer = toy_tokenizer()
    model, snapshot, accuracy = toy_model(tokenizer, seed), None, 0.0
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
            logp, _ = log_probs(model, *batch.pack(rows, "cpu"), temperature=1.0)
            part = -logp.sum() / batch.mask.sum()
            part.backward()
            loss += part.detach()
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


class Stages:
    """The preparation, stage by stage, each made once: a stage writes into a folder of its own under RUNS_DIR/cache, named
    by everything that it depends on, and the folder gets its name when it is complete."""

    def __init__(self, options: Options, rank: int, world: int, device):
        self.o, self.rank, self.world, self.device = options, rank, world, device
        self.cache = Path(options.runs_dir) / "cache"

    def stage(self, what: str, title: str, key: dict, make) -> Path:
        folder = self.cache / f"{what}-{hashlib.sha1(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]}"
        exists = all_reduce(torch.tensor(float(self.rank == 0 and folder.exists()))).item()  # rank 0's view is everyone's
        if self.rank == 0:
            print(f"{title}: {'cached in' if exists else 'to'} {folder}")
        if not exists:
            partial = folder.with_suffix(".partial")
            partial.mkdir(parents=True, exist_ok=True)
            make(partial)
            barrier()
            if self.rank == 0:
                (partial / "key.json").write_text(json.dumps(key, indent=1))
                partial.rename(folder)
            barrier()
        return folder

    def policy(self) -> tuple[str, str]:
        """The policy to train, and the model that completes prefixes."""
        o = self.o
        if o.model:
            return o.model, o.completer or o.model
        folder = self.stage(
            "toy", "warm start of the embedded policy", {"seed": o.prepare_seed},
            lambda folder: warm_start(o.prepare_seed, folder, self.rank, self.world),
        )  # fmt: skip
        return str(folder / "policy"), o.completer or str(folder / "completer")

    def labels(self, model: str, completer: str) -> tuple[Path, dict]:
        o = self.o
        options = prm.LabelOptions(
            o.label_problems, o.label_samples, o.completions, o.prompt, o.separator, o.max_prompt_tokens, o.max_new_tokens,
            o.temperature, o.slots, o.prepare_seed,
        )  # fmt: skip
        key = {"model": identity(model), "completer": identity(completer), "data": identity(o.data), **asdict(options)}

        def make(folder):
            tokenizer = load_tokenizer(model)
            policy = load_causal_lm(model, DTYPES[o.dtype], self.device)
            other = policy if completer == model else load_completer(completer, tokenizer, o, self.device)
            if o.data == "toy":
                problems = toy_problems("train", o.label_problems, seed=3000 + o.prepare_seed)
            else:
                problems = load_problems(o.data, "train")
                random.Random(o.prepare_seed).shuffle(problems)
            prm.make_labels(policy, other, tokenizer, problems, options, folder / "labels.jsonl", self.rank, self.world)

        title = f"step labels of {o.label_problems} questions, {o.completions} completions a step"
        return self.stage("labels", title, key, make) / "labels.jsonl", key

    def reward_model(self, kind: str, model: str, completer: str) -> str:
        o = self.o
        if getattr(o, kind):
            return getattr(o, kind)
        file, labels_key = self.labels(model, completer)
        options = prm.TrainOptions(kind, o.labels, o.rm_epochs, o.rm_lr, o.rm_head_lr, 64, o.rm_likelihood)

        def make(folder):
            tokenizer, rows = load_tokenizer(model), prm.read_labels(file)
            lm = load_causal_lm(completer, device=self.device)
            trained = prm.train_reward_model(
                lm, tokenizer, rows, options, prompt=o.prompt, token_budget=o.token_budget, seed=o.prepare_seed,
                rank=self.rank, world=self.world,
            )  # fmt: skip
            quality = prm.test_reward_model(trained, tokenizer, rows, options, prompt=o.prompt, toy=o.data == "toy")
            if self.rank == 0:
                trained.save(folder)
                tokenizer.save_pretrained(folder)
                (folder / "quality.json").write_text(json.dumps(quality, indent=1))

        folder = self.stage(kind, f"{kind.upper()} on these labels", {**labels_key, **asdict(options)}, make)
        if self.rank == 0:
            quality = json.loads((folder / "quality.json").read_text())
            print(f"  held-out questions: {', '.join(f'{k} {v:.3g}' for k, v in quality.items())}")
        return str(folder)


def identity(path: str) -> str:
    """A name for what a cache was made from: of local files also the times of change, so that a new model is a new key."""
    p = Path(path)
    files = sorted(p.glob("*.safetensors")) if p.is_dir() else [p] if p.is_file() else []
    return " ".join([str(p.resolve()) if files else path, *(str(f.stat().st_mtime_ns) for f in files)])


def load_completer(path: str, tokenizer, o: Options, device):
    if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"--completer {path}: its tokenizer is not the policy's, so it cannot continue the policy's tokens")
    return load_causal_lm(path, DTYPES[o.dtype], device)


# ------------------------------------------------------------------------------------------------ the loop


class Trainer:
    """Models, optimizers and problems of one run; `iteration` is the algorithm."""

    def __init__(self, o: Options, model: str, reward_model: str, rank: int, world: int, device):
        self.o, self.rank, self.world, self.device = o, rank, world, device
        dtype = DTYPES[o.dtype]
        self.tokenizer = load_tokenizer(model)
        self.policy = load_causal_lm(model, device=device)
        self.critic = ScalarModel(load_causal_lm(model, device=device)).eval()
        self.reference = load_causal_lm(model, dtype, device).requires_grad_(False)
        self.sampler = self.policy if dtype == torch.float32 else copy.deepcopy(self.policy).to(dtype).requires_grad_(False)
        self.reward_model = None
        if reward_model:
            self.reward_model = ScalarModel.load(reward_model, dtype, device).requires_grad_(False)
            if load_tokenizer(reward_model).get_vocab() != self.tokenizer.get_vocab():
                raise UserError(f"{reward_model}: the reward model's tokenizer is not the policy's")
        # betas: the second moment must forget within a run of tens of steps
        self.optimizers = [
            torch.optim.AdamW(self.policy.parameters(), lr=o.lr, betas=(0.9, 0.99), weight_decay=0.0),
            torch.optim.AdamW(self.critic.parameters(), lr=o.critic_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.value_norm = ValueNorm()
        self.problems = load_problems(o.data, "train")
        self.prompts = encode_prompts(self.tokenizer, self.problems, o.prompt, o.max_prompt_tokens)
        self.test = load_problems(o.eval_data or o.data, "test", o.eval_problems)

    def autocast(self):
        dtype = DTYPES[self.o.dtype]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def evaluate(self) -> tuple[dict, list[dict]]:
        """Greedy and sampled results on the evaluation problems, and the first answers."""
        o, out, first = self.o, {}, []
        for way, temperature in (("greedy", 0.0), ("sampled", o.temperature)):
            result, answers = evaluate(
                self.sampler, self.tokenizer, self.test, o.prompt, o.separator, max_new_tokens=o.max_new_tokens,
                max_prompt_tokens=o.max_prompt_tokens, temperature=temperature, slots=o.slots,
                rank=self.rank, world=self.world,
            )  # fmt: skip
            out |= {f"{way}_{k}": v for k, v in result.items()}
            first = first or answers[:3]
        return out, first

    def questions(self, iteration: int) -> list[int]:
        """Indices of the iteration's questions: every question once in each pass over the data, in an order of its own."""
        n, Q = len(self.problems), self.o.questions
        places = range((iteration - 1) * Q, iteration * Q)
        orders = {e: random.Random(f"{self.o.seed}-{e}").sample(range(n), n) for e in {p // n for p in places}}
        return [orders[p // n][p % n] for p in places]

    def iteration(self, iteration: int) -> tuple[dict, list[dict]]:
        """Sample, grade, score, reward, advantage, update. Returns metrics over all ranks and a few answers."""
        o, device, clock = self.o, self.device, Clock()
        total = o.questions * o.samples
        chosen = self.questions(iteration)
        mine = range(self.rank, o.questions, self.world)
        keys = [q * o.samples + j for q in mine for j in range(o.samples)]  # of my answers, in the whole iteration

        # sample
        sync(self.sampler, self.policy)
        samples = rollout(
            self.sampler, [self.prompts[chosen[q]] for q in mine], o.samples, max_new_tokens=o.max_new_tokens,
            eos_ids=eos_ids(self.policy, self.tokenizer), temperature=o.temperature, top_p=o.top_p, slots=o.slots,
            seeds=[(o.seed * 1_000_003 + iteration) * 1_000_003 + q for q in mine],
        )  # fmt: skip
        flat = [s for group in samples for s in group]
        prompts = [self.prompts[chosen[q]] for q in mine for _ in range(o.samples)]
        batch = Batch(prompts, [s.ids for s in flat], torch.tensor([s.truncated for s in flat]))
        clock("sample")

        # grade
        answers = judge(self.tokenizer, [self.problems[chosen[q]] for q in mine], samples, o.separator)
        correct = torch.tensor([a["correct"] for a in answers])
        step_ends, step_mask = prm.pad_steps([a["ends"] for a in answers])
        clock("grade")

        # score; the micro-batches are those of the update, so that the first ratio is exactly 1
        deal = [minibatches(keys, total, o.minibatches, o.seed * 1_000_003 + iteration * 101 + e) for e in range(o.epochs)]
        plans = [batch.plan(rows, o.token_budget) for epoch in deal for rows in epoch]
        plan = [rows for minibatch in plans[: o.minibatches] for rows in minibatch]
        with self.autocast():
            logp, ref_logp = (
                batch.map(lambda _, *packed: log_probs(model, *packed, o.temperature)[0], plan, device)
                for model in (self.policy, self.reference)
            )
            raw_values, raw_final = score_values(self.critic, batch, plan, device)
            scores = refined = outcome = None
            if o.reward == "orm":
                outcome = prm.score_outcomes(self.reward_model, batch, plan, device)
            elif o.reward in PROCESS:
                scores = prm.score_steps(self.reward_model, batch, step_ends, plan, device)
        clock("score")

        # reward
        if scores is not None:
            refined = refine(o.reward, scores, step_mask, o.eta)
        rewards = token_rewards(
            logp, ref_logp, batch.mask, correct, batch.truncated, beta=o.beta, alpha=o.alpha, outcome=outcome,
            steps=refined, step_ends=step_ends, step_mask=step_mask,
        )  # fmt: skip

        # advantage
        values = self.value_norm.denormalise(raw_values) * batch.mask
        bootstrap = self.value_norm.denormalise(raw_final) * batch.truncated
        advantages, returns = gae(rewards, values, batch.mask, bootstrap, o.gamma, o.lam)
        residual = masked_var(returns - values, batch.mask) / masked_var(returns, batch.mask)
        self.value_norm.update(returns, batch.mask)
        data = Rollout(logp, whiten(advantages, batch.mask), raw_values, self.value_norm.normalise(returns))

        # update
        train_policy = iteration > o.critic_warmup
        self.optimizers[0].param_groups[0]["lr"] = o.lr * min(1, (iteration - o.critic_warmup) / max(o.lr_warmup, 1))
        with self.autocast():
            metrics = update(
                self.policy, self.critic, self.optimizers, batch, data, plans, temperature=o.temperature, clip=o.clip,
                value_clip=o.value_clip, max_grad_norm=o.max_grad_norm, train_policy=train_policy,
            )  # fmt: skip
        clock("update")

        # log
        per_answer = {
            "return": rewards.sum(1),
            "success": correct,
            "process_reward": refined.sum(1) if refined is not None else outcome if outcome is not None else 0 * correct,
            "steps": step_mask.sum(1),
            "tokens": batch.mask.sum(1),
            "repeats": torch.tensor([a["repeats"] for a in answers]),
            "truncated": batch.truncated,
            "kl": ((logp - ref_logp) * batch.mask).sum(1),
            "nonzero": ((refined != 0) & step_mask).sum(1) if refined is not None else 0 * correct,
        }
        if o.data == "toy":
            good = [oracle(a["question"], a["response"])[: a["steps"]] for a in answers]
            per_answer["good_steps"] = torch.tensor([sum(g) for g in good])
        sums = all_reduce(torch.stack([x.sum(dtype=torch.float64) for x in per_answer.values()])) / total
        log = {"iteration": iteration, **dict(zip(per_answer, sums.tolist()))}
        log["tokens_per_step"] = log["tokens"] / max(log["steps"], 1e-9)
        for share in ("nonzero", "good_steps"):
            if share in log:
                log[share] /= max(log["steps"], 1e-9)
        log |= {"explained_variance": 1 - residual, "lr": self.optimizers[0].param_groups[0]["lr"], **metrics}
        log |= clock.seconds
        log["tokens_per_second"] = log["tokens"] * total / sum(clock.seconds.values())
        for i, answer in enumerate(answers[:4]):
            K = answer["steps"]
            answer |= {
                "iteration": iteration,
                "scores": None if scores is None else scores[i, :K].tolist(),
                "refined": None if refined is None else refined[i, :K].tolist(),
                "outcome": None if outcome is None else outcome[i].item(),
            }
        return log, answers[:4]

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
        self.value_norm.sums = state["value_norm"]


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


def masked_var(x: torch.Tensor, mask: torch.Tensor) -> float:
    return (masked_mean(x**2, mask) - masked_mean(x, mask) ** 2).clamp(min=1e-12).item()


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
        free = ("resume", "iterations", "save_every", "runs_dir", "slots")  # these do not change what is computed
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


def run(o: Options, folder: Path, rank: int, world: int, device) -> None:
    stages = Stages(o, rank, world, device)
    model, completer = stages.policy()
    kind = "orm" if o.reward == "orm" else "prm" if o.reward in PROCESS else ""
    trainer = Trainer(o, model, stages.reward_model(kind, model, completer) if kind else "", rank, world, device)
    start = 0
    if o.resume:
        checkpoint = torch.load(folder / "checkpoint.pt", map_location=device, weights_only=True)
        trainer.load_state(checkpoint)
        start = checkpoint["iteration"]
        sync(trainer.sampler, trainer.policy)
        before, first = json.loads((folder / "before.json").read_text())
        result, last = before, first
    else:
        before, first = result, last = trainer.evaluate()
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
            sync(trainer.sampler, trainer.policy)
            result, last = trainer.evaluate()
            log |= result
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
        print(before_after(before, result, (first, last)))
        print(f"\nwritten: {folder}/ (metrics.jsonl, samples.jsonl, model/)")


def append(path: Path, rows: list[dict]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    options, preset = parse()
    rank, world, device = start_processes()
    if rank == 0:
        print(preset)
    if options.questions < world:
        raise UserError(f"--questions {options.questions} is less than the {world} processes that share them")
    run(options, open_run(options), rank, world, device)


if __name__ == "__main__":
    run_script(main)
