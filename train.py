"""PPO on math problems with any of the six rewards: options, the loop, preparation, checkpoints, logs.

    python train.py --reward delta                                     # the embedded world on a laptop
    torchrun --nproc_per_node 8 train.py --reward delta                # the paper's setting on 8 GPUs
    python train.py --reward clip-delta --model DIR --data FILE.jsonl --eval-data TEST.jsonl  # your own

`Trainer.iteration` is the algorithm. Before the loop comes what it needs, each stage cached in RUNS_DIR/cache: in the
embedded world the warm start, which makes the policy and a stronger model of the same size, the *completer*; then step
labels and the reward model that the chosen reward reads. A run writes to RUNS_DIR/NAME: config.json, metrics.jsonl (one
line an iteration), samples.jsonl (a few answers of each), checkpoint-N/, and at the end model/ in Hugging Face format.
It may be killed at any moment: --name NAME --resume goes on from its checkpoint.

Left out: curricula, mixtures by weight, training questions made on the way.
"""

import gc
import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
import warnings
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from data import (  # before torch, see there
    SEEDS, WORLDS, Problem, TextOptions, UserError, append, data_sets, encode_prompts, is_toy, judge, load_problems,
    lock, option, oracle, run_script, toy_problems, toy_solution, toy_tokenizer, whole_lines, write,
)
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser

import prm
from eval import before_after, evaluate, summarise
from grader import VERDICTS
from model import (
    DTYPES, Policy, ScalarModel, all_reduce, checkpoint_layers, eos_ids, gather, load_causal_lm, load_tokenizer,
    on_rank_0, processes, random_lm, rank, replica, save_lm, say, score_logps, score_values, shard, side_by_side, sync,
    toy_model, world_size,
)
from ppo import (
    Experience, ValueNorm, count_tokens, explained_variance, gae, minibatches, optimizer_step, update_critic,
    update_policy, whiten,
)
from prm import FORMATS, pad_scores
from rewards import REWARDS, refine, token_rewards
from rollout import Batch, Sampler, rollout

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a checkpoint of a single process


@dataclass
class TrainOptions(prm.RewardModelOptions):
    reward: str = option("delta", "one of the paper's six, or of rewards.py's four others", choices=list(REWARDS))
    preset: str = option("", "toy, sums, or one of the paper's models; default: by hardware, with --model none")
    model: str = option("", "policy: a folder or hub name; empty: the embedded world's own")
    data: str = option("gsm8k", "training problems, see data.py: a name, a file or hub name, or NAME,NAME")
    eval_data: str = option("", "evaluation problems, one or several sets: NAME,NAME; empty: the test split of --data")
    prm: str = option("", "process reward model: a folder, or a published one by hub name; empty: label and train one")
    prm_format: str = option("", "how a published --prm reads, where its name does not say", choices=["", *FORMATS])
    orm: str = option("", "folder of an outcome reward model; empty: label and train one")
    completer: str = option("", "model that completes step prefixes for the labels; empty: the policy")
    # the reward: alpha * r + Correct - beta * log(pi / pi_ref)
    alpha: float | None = option(None, "weight of the learned reward; default: 0.5, of delta 0.3", "[0, inf)")
    eta: float = option(0.5, "threshold of clip: steps scored above it get 0; of penalty the price of a step", "[0, 1]")
    beta: float = option(0.02, "weight of the KL penalty", "[0, inf)")
    # the rollout
    prompts_per_iteration: int = option(64, "questions per iteration", "[1, inf)")
    samples_per_prompt: int = option(4, "answers per question", "[1, inf)")
    # PPO
    iterations: int = option(100, "rollouts", "[1, inf)")
    epochs: int = option(1, "passes over a rollout", "[1, inf)")
    minibatches: int = option(4, "optimizer steps per pass", "[1, inf)")
    lr: float = option(1e-6, "learning rate of the policy", "[0, 1]")
    critic_lr: float = option(1e-5, "learning rate of the critic", "[0, 1]")
    lr_warmup: int = option(5, "iterations of linear warmup of the policy's learning rate", "[0, inf)")
    critic_warmup: int = option(0, "iterations that train the critic alone", "[0, inf)")
    gamma: float = option(1.0, "discount", "[0, 1]")
    lam: float = option(1.0, "GAE's lambda", "[0, 1]")
    clip_range: float = option(0.2, "PPO's epsilon: the ratio is clipped to 1 +- this", "(0, inf)")
    value_clip_range: float = option(0.2, "epsilon of the value clip, in normalised units; 0: off", "[0, inf)")
    max_grad_norm: float = option(1.0, "gradient clip", "(0, inf)")
    offload_frozen: bool = option(False, "keep reference and reward model in the CPU's memory, slower")
    # the run
    eval_problems: int = option(200, "evaluation problems, of each set", "[1, inf)")
    eval_every: int = option(10, "iterations between evaluations; 0: only before and after", "[0, inf)")
    prepare_seed: int = option(0, "of the preparation: warm start, labels, reward model", SEEDS)
    name: str = option("", "name of the run; empty: from preset, reward and seed")
    runs_dir: str = option("runs", "where runs and the cache live")
    threads: int = option(0, "CPU threads of a single process; 0: torch's choice", "[0, inf)")
    resume: bool = option(False, "continue the run NAME from its checkpoint; start it if there is none")
    save_every: int = option(10, "iterations between checkpoints; 0: only at the end", "[0, inf)")
    log_to: str = option("", "log there too", choices=["", "tensorboard", "wandb"], aliases=["--log"])


PRESETS = {
    # The embedded world. Sizes so that a laptop's two cores need minutes, where more do not help so small a model.
    "toy": dict(
        data="toy", eval_data="toy", prompt="{question}", max_prompt_tokens=32, max_new_tokens=128, threads=2,
        prompts_per_iteration=768, samples_per_prompt=1, iterations=20, minibatches=2, lr=3e-4, critic_lr=1e-3,
        token_budget=4096, slots=768, label_problems=1000, rm_epochs=4, rm_lr=3e-4, rm_head_lr=2e-2, rm_likelihood=True,
        eval_problems=1000,
    ),
}
PRESETS["sums"] = PRESETS["toy"] | dict(data="sums", eval_data="sums", max_new_tokens=160)
# The paper's six models. Batch, training and evaluation questions and completer are the paper's; what it leaves open is
# ours, for the README's reasons. 1 epoch, 4 minibatches, gamma = lambda = 1 are ReaLHF's, the authors' own system.
for family in ("Qwen2", "Qwen2-Math", "Qwen2.5-Math"):
    for size, questions in (("1.5B", 1024), ("7B", 4096)):
        PRESETS[f"{family}-{size}-Instruct".lower()] = dict(
            model=f"Qwen/{family}-{size}-Instruct", completer="Qwen/Qwen2-7B-Instruct", data="mathinstruct",
            eval_data="math,gsm8k", eval_problems=5000, separator="\n\n", dtype="bfloat16",
            prompts_per_iteration=questions, samples_per_prompt=8, max_new_tokens=1024, label_problems=20_000,
            checkpoint_activations=True, **(dict(slots=96) if size == "7B" else {}),
        )
DEFAULT = "qwen2-1.5b-instruct"  # with CUDA
# In the embedded world prm is hacked at both, clip and clip-delta are not, delta hardly at the lower one.
ALPHA = dict.fromkeys(REWARDS, 0.5) | {"success": 0.0, "delta": 0.3}
KIND = dict.fromkeys(REWARDS, "prm") | {"success": "", "orm": "orm"}  # of the reward model that it reads


def check(opts: TrainOptions) -> None:
    """Raises UserError for options that cannot work together."""
    reward, kind, world = opts.reward, KIND[opts.reward], int(os.environ.get("WORLD_SIZE", 1))
    answers = opts.prompts_per_iteration * opts.samples_per_prompt
    clipped, labelled = "clip" in reward or reward == "penalty", kind == "prm" and not opts.prm
    other_world = {*data_sets(opts.eval_data or opts.data)} & ({*WORLDS} - {opts.data})
    plain_name = Path(opts.name).name == opts.name and opts.name not in (".", "..", "cache")
    rules = [
        (opts.preset not in ("", *PRESETS), f"--preset: there is none of that name, choose {', '.join(PRESETS)}"),
        (opts.prm and kind != "prm", f"--prm is not used by --reward {reward}: drop it"),
        (opts.orm and kind != "orm", f"--orm is not used by --reward {reward}: drop it"),
        (opts.prm_format and not opts.prm, "--prm-format says how the --prm reads: give both, or neither"),
        (opts.log_to and not find_spec(opts.log_to), f"--log-to {opts.log_to}: pip install it first"),
        (reward == "success" and opts.alpha is not None, "--alpha weighs a learned reward, success has none: drop it"),
        (opts.eta != TrainOptions.eta and not clipped, f"--eta is not used by --reward {reward}: drop it"),
        (opts.labels == "oracle" and not labelled, "--labels oracle is for a PRM that is made here: drop it"),
        (opts.flip_labels and not labelled, "--flip-labels is for a PRM that is made here: drop it"),
        (not opts.model and opts.data not in WORLDS, f"--data {opts.data} needs a --model, or choose a --preset"),
        (not opts.model and other_world, f"the policy of --data {opts.data} cannot read --eval-data {opts.eval_data}"),
        (not plain_name, f"--name {opts.name}: must be a plain name for a folder in --runs-dir, and not cache"),
        (opts.offload_frozen and not torch.cuda.is_available(), "--offload-frozen: there is no GPU: drop it"),
        (opts.minibatches > answers, f"--minibatches {opts.minibatches} is more than the {answers} answers"),
        (opts.prompts_per_iteration % world, f"--prompts-per-iteration must be a multiple of the {world} processes"),
    ]
    for broken, sentence in rules:
        if broken:
            raise UserError(sentence)


def parse(argv: list[str] | None = None) -> tuple[TrainOptions, str]:
    """Options from the command line over a preset, and the sentence that says which preset runs and why."""
    parser = HfArgumentParser(TrainOptions, usage="python train.py [--OPTION VALUE ...]", allow_abbrev=False)
    given, cuda = parser.parse_args(argv), torch.cuda.is_available()
    preset, why = given.preset, "asked for" if given.preset else "--model was given: general defaults, nothing tuned"
    if not (given.preset or given.model):
        preset, why = DEFAULT if cuda else "toy", f"{'CUDA' if cuda else 'no CUDA'} here; --preset chooses another"
    parser.set_defaults(**PRESETS.get(preset, {}), preset=preset)
    opts = TrainOptions(**vars(parser.parse_args(argv)))
    check(opts)
    if opts.alpha is None:
        opts.alpha = ALPHA[opts.reward]
    return opts, f"preset: {preset or 'none'} ({why})"


# ------------------------------------------------------------------------------------------------ the algorithm


def hash_seed(*parts: int) -> int:
    return zlib.crc32(repr(parts).encode())


def adam(model, lr: float, betas: tuple) -> torch.optim.AdamW:
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=0.0, fused=True)
    for p in params:  # not at the first step, as torch would: a checkpoint before it holds and finds them too
        moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer


class Trainer:
    """Models, optimizers and problems of one run; `iteration` is the algorithm."""

    def __init__(self, opts: TrainOptions, data: tuple, model: str, reward_model: str, device, load=load_causal_lm):
        self.opts, self.device, self.kind, self.skipped = opts, device, KIND[opts.reward], 0
        self.total = opts.prompts_per_iteration * opts.samples_per_prompt  # answers of an iteration, on all ranks
        self.problems, self.prompts, self.test = data
        self.toy = all(is_toy(p.question) for p in self.problems)
        self.tokenizer, dtype, offload = load_tokenizer(model), DTYPES[opts.dtype], opts.offload_frozen
        self.policy = shard(lambda home: Policy(load(model, device=home)), dtype, device)
        self.critic = shard(lambda home: ScalarModel(load(model, device=home)).eval(), dtype, device)
        if opts.checkpoint_activations:
            checkpoint_layers(self.policy)
            checkpoint_layers(self.critic)
        frozen = lambda home: Policy(load(model, dtype, home)).requires_grad_(False)
        self.reference = shard(frozen, dtype, device, offload)
        self.sampler = Sampler(replica(self.policy.lm, dtype, device))
        self.reward_model = None
        if reward_model:
            form = prm.find_format(reward_model, opts.prm_format)
            self.read = prm.Reader(reward_model, form, opts.prompt, self.tokenizer)
            scorer = lambda home: prm.load_reward_model(reward_model, dtype, home, form).requires_grad_(False)
            self.reward_model = shard(scorer, dtype, device, offload)
        self.eos = on_rank_0(lambda: eos_ids(self.policy.lm, self.tokenizer))  # in a file that rank 0 alone reads
        self.sampler.model.generation_config.eos_token_id = self.eos
        # the second moments must forget within a run of tens of steps, hence the low betas
        self.policy_optimizer = adam(self.policy, opts.lr, (0.9, 0.99))
        self.critic_optimizer = adam(self.critic, opts.critic_lr, (0.9, 0.95))
        self.value_norm = ValueNorm()

    def iteration(self, iteration: int) -> tuple[dict, list[dict]]:
        """Sample, grade, score, reward, advantage, update. Returns metrics over all ranks, and a few answers."""
        opts, kind = self.opts, self.kind
        ends = {"start": time.perf_counter()}  # of phases: each ends when its results are on the CPU

        # 1. sample, with the seeds of (iteration, question): the same answers whatever the number of ranks
        problems, samples, batch, keys = self.sample(iteration)
        ends["sample"] = time.perf_counter()

        # 2. grade the final answers, find the steps; on rank 0, the tracked question's stands behind the B answers
        answers = judge(self.tokenizer, problems, samples, opts.separator)
        token_ends, step_mask = pad_scores([a["token_ends"] for a in answers])  # (B, K)
        correct = torch.tensor([a["correct"] for a in answers])  # (B,)
        ends["grade"] = time.perf_counter()

        # 3. score, in the micro-batches of the update, so that the ratio starts at exactly 1
        epochs = self.deal(iteration, batch, keys)
        logp, ref_logp, raw_values, raw_final, scores = self.score(batch, epochs[: opts.minibatches], answers)
        ends["score"] = time.perf_counter()

        # 4. reward each token
        B, mask = len(batch.prompts), batch.mask
        refined = refine(opts.reward, scores, step_mask, opts.eta) if kind == "prm" else torch.zeros(step_mask.shape)
        outcome = scores[:, 0] if kind == "orm" else torch.zeros(len(answers))
        ends["refine"] = time.perf_counter()
        rewards = token_rewards(
            logp, ref_logp, mask, correct[:B], batch.truncated, beta=opts.beta, alpha=opts.alpha,
            outcome=outcome[:B], steps=(refined[:B], token_ends[:B].long(), step_mask[:B]),
        )

        # 5. advantages; a truncated answer would have gone on, so it bootstraps
        values = self.value_norm.denormalise(raw_values) * mask
        bootstrap = self.value_norm.denormalise(raw_final) * batch.truncated
        advantages, returns = gae(rewards, values, mask, bootstrap, opts.gamma, opts.lam)
        self.value_norm.update(returns, mask)
        experience = Experience(mask, logp, whiten(advantages, mask), raw_values, self.value_norm.normalise(returns))

        # 6. update policy and critic
        losses = self.update(iteration, epochs, experience)
        ends["update"] = time.perf_counter()

        # 7. log: means over the answers of all ranks
        paid = {"return": rewards.sum(1), "learned_reward": refined[:B].sum(1) + outcome[:B]}
        paid |= {"kl": ((logp - ref_logp) * mask).sum(1), "tokens": mask.sum(1)}
        log = {"iteration": iteration, **self.means(paid, answers[:B], refined[:B], outcome[:B]), **losses}
        log |= {f"seconds_{phase}": end - start for (_, start), (phase, end) in pairwise(ends.items())}
        log["explained_variance"] = explained_variance(values, returns, mask)
        log["tokens_per_second"] = log["tokens"] * self.total / (ends["update"] - ends["start"])
        return log, self.noted(iteration, B, answers, scores, refined, outcome)

    def questions(self, iteration: int) -> list[int]:
        """Indices of the iteration's questions: each pass over the problems is a permutation of its own."""
        n, count = len(self.problems), self.opts.prompts_per_iteration
        places = range((iteration - 1) * count, iteration * count)
        passes = {place // n for place in places}
        orders = {k: random.Random(f"{self.opts.seed}-{k}").sample(range(n), n) for k in passes}
        return [orders[place // n][place % n] for place in places]

    def sample(self, iteration: int):
        """This rank's problems, their samples, the batch of B answers, and the index of each in the whole iteration.

        On rank 0 one more problem and sample stand behind: the first evaluation question, with the same random numbers
        in every iteration. `eval.py show` shows what training makes of it; training itself skips it. (It is sampled as
        often as the others, and all but the first are thrown away.)"""
        opts, n, chosen = self.opts, self.opts.samples_per_prompt, self.questions(iteration)
        mine = range(rank(), len(chosen), world_size())
        problems, prompts = ([of_all[chosen[q]] for q in mine] for of_all in (self.problems, self.prompts))
        seeds = [hash_seed(opts.seed, iteration, q) for q in mine]
        if rank() == 0:
            problems.append(self.test[0])
            prompts += encode_prompts(self.tokenizer, self.test[:1], opts.prompt, opts.max_prompt_tokens)
            seeds.append(opts.seed * 1_000_003)
        sync(self.sampler.model, self.policy.lm)
        groups = rollout(
            self.sampler, prompts, n, max_new_tokens=opts.max_new_tokens, eos_ids=self.eos, seeds=seeds,
            temperature=opts.temperature, slots=opts.slots,
        )
        learn = [sample for group in groups[: len(mine)] for sample in group]
        truncated = torch.tensor([s.truncated for s in learn])
        batch = Batch([prompts[s.prompt] for s in learn], [s.ids for s in learn], truncated)
        samples = groups[: len(mine)] + [group[:1] for group in groups[len(mine) :]]
        return problems, samples, batch, [q * n + j for q in mine for j in range(n)]

    def deal(self, iteration: int, batch: Batch, keys: list[int]) -> list[list]:
        """The minibatches of all epochs, each as its micro-batches."""
        opts, parts = self.opts, []
        for epoch in range(opts.epochs):
            parts += minibatches(keys, self.total, opts.minibatches, hash_seed(opts.seed, iteration, epoch))
        return batch.micro_batches(parts, opts.token_budget, self.device)

    def score(self, batch: Batch, epoch: list[list], answers: list[dict]):
        """Log-probabilities of policy and reference (B, T), the critic's raw values (B, T) and final values (B,), and
        the reward model's scores of the answers: of steps (B, K), of outcomes (B, 1), (B, 0) without one."""
        micro, opts = [m for minibatch in epoch for m in minibatch], self.opts

        def score_answers() -> list[list[float]]:
            if self.reward_model is None:
                return [[] for _ in answers]
            return prm.score_at(self.reward_model, self.read(answers, self.kind), opts.token_budget, self.device)

        logp, ref_logp, (values, final), scores = side_by_side(
            lambda: score_logps(self.policy, batch, micro, opts.temperature),
            lambda: score_logps(self.reference, batch, micro, opts.temperature),
            lambda: score_values(self.critic, batch, micro),
            score_answers,
        )
        if self.kind == "orm":  # an answer without text has no outcome
            scores = [outcome or [0.0] for outcome in scores]
        return logp, ref_logp, values, final, pad_scores(scores)[0]

    def update(self, iteration: int, epochs: list[list], experience: Experience) -> dict:
        """Raises UserError for a loss that is no number, or for three skipped steps without an iteration between."""
        opts, counts = self.opts, count_tokens(epochs, experience.response_mask)
        lr_scale = min(1, max(0, (iteration - opts.critic_warmup) / max(opts.lr_warmup, 1)))
        self.policy_optimizer.param_groups[0]["lr"] = lr = opts.lr * lr_scale
        both = dict(minibatches=epochs, counts=counts, experience=experience, max_grad_norm=opts.max_grad_norm)
        how = dict(temperature=opts.temperature, clip_range=opts.clip_range, learn=iteration > opts.critic_warmup)
        of_policy, of_critic = side_by_side(
            lambda: update_policy(self.policy, self.policy_optimizer, **both, **how),
            lambda: update_critic(self.critic, self.critic_optimizer, **both, clip_range=opts.value_clip_range),
        )
        log = {"lr": lr, **of_policy, **of_critic}
        log["skipped_steps"] = skipped = log.pop("skipped_policy") + log.pop("skipped_critic")
        self.skipped = self.skipped + skipped if skipped else 0
        if self.skipped >= 3 or not math.isfinite(log["policy_loss"] + log["value_loss"]):
            raise UserError(f"iteration {iteration}: losses or gradients are not finite; lower the learning rates")
        return log

    def means(self, values: dict[str, Tensor], answers: list[dict], refined: Tensor, outcome: Tensor) -> dict:
        """Means over the answers of all ranks, and their verdicts, counted."""

        def mean(x) -> float:
            return all_reduce(torch.as_tensor(x).sum(dtype=torch.float64)).item() / self.total

        log = {name: mean(x) for name, x in values.items()} | {"success": mean([a["correct"] for a in answers])}
        log |= {name: mean([a[name] for a in answers]) for name in ("steps", "repeats", "truncated")}
        steps = max(log["steps"], 1e-9)
        log["tokens_per_step"] = log["tokens"] / steps
        if self.kind == "prm":
            log["nonzero"] = mean(refined != 0) / steps
        if self.kind == "orm":
            rows = gather([(x, a["correct"]) for x, a in zip(outcome.tolist(), answers) if not a["truncated"]])
            for name, right in (("outcome_right", True), ("outcome_wrong", False)):
                chosen = [x for x, correct in rows if correct == right]
                log[name] = sum(chosen) / len(chosen) if chosen else None
        if self.toy:
            good = [sum(filter(None, oracle(a["question"], a["response"], a["char_ends"]))) for a in answers]
            log["good_steps"] = mean(good) / steps
        verdicts = gather([a["verdict"] for a in answers])
        return log | {kind.replace(" ", "_"): verdicts.count(kind) for kind in VERDICTS}

    def noted(self, iteration: int, B: int, answers: list[dict], scores, refined, outcome) -> list[dict]:
        """The tracked answer and four others, as samples.jsonl holds them, with what their reward has."""
        rows = []
        for i in [*range(B, len(answers)), *range(min(4, B))]:
            K, row = answers[i]["steps"], {"scores": None, "refined": None, "outcome": None}
            if self.kind == "prm":
                row |= {"scores": scores[i, :K].tolist(), "refined": refined[i, :K].tolist()}
            if self.kind == "orm":
                row["outcome"] = outcome[i].item()
            rows.append({**answers[i], "iteration": iteration, "tracked": i >= B, **row})
        return rows

    def evaluate(self) -> tuple[dict, list[dict]]:
        """Greedy and sampled results on the evaluation problems, and the first greedy answers."""
        opts, log, first = self.opts, {}, []
        sources = sorted({p.source for p in self.test})
        sync(self.sampler.model, self.policy.lm)
        for way, temperature in (("greedy", 0.0), ("sampled", opts.temperature)):
            how = dict(temperature=temperature, slots=opts.slots, progress=f"evaluate {way}")
            result, answers = evaluate(self.sampler, self.tokenizer, self.test, opts, **how)
            log |= {f"{way}_{k}": v for k, v in result.items()}
            first = first or answers[:3]
            for source in sources if len(sources) > 1 else ():
                of_one = summarise([row for row in answers if self.test[row["index"]].source == source], 1)
                log |= {f"{way}_{k}:{source}": of_one[k] for k in ("accuracy", "stderr")}
        return log, first

    def tensors(self) -> dict:
        """All that training changes and a checkpoint must hold, by name; loading writes into these tensors."""
        out = {"value_norm": self.value_norm.sums}
        both = (("policy", self.policy, self.policy_optimizer), ("critic", self.critic, self.critic_optimizer))
        for kind, model, optimizer in both:
            for name, p in model.named_parameters():
                if p.requires_grad:
                    out[f"{kind}.{name}"] = {"weight": p.detach(), **optimizer.state[p]}
        return out


# ------------------------------------------------------------------------------------------------ preparation


def load_data(opts: TrainOptions) -> tuple[list[Problem], list[list[int]], list[Problem]]:
    """Training problems, their prompts, and evaluation problems: first of all, so that bad input costs no time.
    Training questions that the evaluation asks too, that repeat another or are too long are dropped, and counted."""
    tokenizer = load_tokenizer(opts.model) if opts.model else toy_tokenizer(opts.data)
    words = lambda p: " ".join(p.question.split())
    test, asked = [], set()
    for name in data_sets(opts.eval_data or opts.data):
        found = load_problems(name, "test", opts.eval_problems if name in WORLDS else None)
        test += found[: opts.eval_problems]
        if opts.eval_data or not Path(name).is_file():
            asked |= set(map(words, found))
        else:
            say(f"{name}: training and evaluation ask the same questions; --eval-data names others")
    encode_prompts(tokenizer, test, opts.prompt, opts.max_prompt_tokens)
    found = load_problems(opts.data, "train")
    new = [p for p in found if words(p) not in asked]
    unique = [*{p.question: p for p in new}.values()]
    encoded = encode_prompts(tokenizer, unique, opts.prompt, 1 << 30) if unique else []
    fitting = [(p, ids) for p, ids in zip(unique, encoded) if len(ids) <= opts.max_prompt_tokens]
    left = pairwise(map(len, (found, new, unique, fitting)))
    reasons = ("the evaluation asks too", "repeat another", f"have more than {opts.max_prompt_tokens} tokens")
    dropped = [f"{before - after} that {reason}" for (before, after), reason in zip(left, reasons) if after < before]
    said = f"dropped: {', '.join(dropped) or 'none'}"
    if not fitting:
        raise UserError(f"--data {opts.data}: no question is left ({said}); choose another --eval-data")
    if opts.data not in WORLDS:
        say(f"{len(fitting)} training questions; {said}")
    return [p for p, _ in fitting], [ids for _, ids in fitting], test


def warm_start(world: str, seed: int, folder: Path, device) -> None:
    """Teach the policy of an embedded world to answer at all, from demonstrations. Writes folder/policy, the weights at
    which sampled accuracy first passed one half, and folder/completer, where training ends: it is to the policy what
    the paper's 7B is to its 1.5B."""
    steps, questions, accuracy, tokenizer = 850, 64, 0.0, toy_tokenizer(world)
    model, hidden, others = toy_model(tokenizer, seed).to(device), [], []
    for name, p in model.named_parameters():
        (hidden if p.dim() == 2 and "embed" not in name else others).append(p)
    # AdamW alone takes longer, and in some seeds its completer is right less often than two times of three
    optimizers = [
        torch.optim.Muon(hidden, lr=5e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]
    scale = lambda step: min((step + 1) / 100, 1, (steps - step) / (0.2 * steps))  # up, constant, down
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, scale) for optimizer in optimizers]
    problems = toy_problems("train", steps * questions, 1000 + seed, world)
    unseen, text = toy_problems("train", 200, 2000 + seed, world), TextOptions("{question}", "\n", 32, 160)
    rng = random.Random(seed)
    for step in (bar := tqdm(range(steps), desc="warm start", unit="step", disable=rank() > 0)):
        chosen = problems[step * questions : (step + 1) * questions]
        prompts = encode_prompts(tokenizer, chosen, text.prompt, text.max_prompt_tokens)
        responses = [tokenizer.encode(toy_solution(p.question, rng)) + [tokenizer.eos_token_id] for p in chosen]
        batch, loss = Batch(prompts, responses, torch.zeros(questions, dtype=torch.bool)), torch.zeros(())
        for micro in batch.micro_batches([[*range(rank(), questions, world_size())]], 8192, device)[0]:
            logp, _ = Policy(model)(micro.packed, micro.predict_at, micro.targets, 1.0)
            part = -logp.sum() / batch.mask.sum()
            part.backward()
            loss += part.detach().cpu()
        optimizer_step(model, optimizers, 1.0)
        for schedule in schedules:
            schedule.step()
        if step >= 300 and step % 25 == 0 and accuracy <= 0.5:
            accuracy = evaluate(model, tokenizer, unseen, text)[0]["accuracy"]
            save_lm(model, tokenizer, folder / "policy")
        bar.set_postfix(loss=f"{all_reduce(loss).item():.3f}", accuracy=f"{accuracy:.2f}")
    save_lm(model, tokenizer, folder / "completer")


def prepare(opts: TrainOptions, problems: list[Problem], device) -> tuple[str, str]:
    """The folders (or hub names) of the policy to start from and of the reward model ("" for success), made if need be;
    labels come from some of the problems, or from the embedded world's own supply."""
    cache, policy, completer = Path(opts.runs_dir) / "cache", opts.model, opts.completer or opts.model
    if not policy:
        made = prm.cached(
            cache, opts.data, "warm start of the embedded policy", {"seed": opts.prepare_seed, "by": "Muon"},
            lambda folder: warm_start(opts.data, opts.prepare_seed, folder, device),
        )
        policy, completer = str(made / "policy"), opts.completer or str(made / "completer")
    kind, given = KIND[opts.reward], opts.prm or opts.orm
    if given or not kind:
        return policy, given
    if opts.data in WORLDS:
        chosen = toy_problems("train", opts.label_problems, 3000 + opts.prepare_seed, opts.data)
    else:
        chosen = random.Random(opts.prepare_seed).sample(problems, min(opts.label_problems, len(problems)))
    less_memory = opts.checkpoint_activations or device.type == "cuda"  # it is often larger than the policy
    own = replace(opts, seed=opts.prepare_seed, checkpoint_activations=less_memory)
    return policy, prm.prepare_reward_model(cache, policy, completer, chosen, own, kind, device)


def free_memory() -> None:
    """Of models that nobody holds: those that recompute their layers refer to themselves."""
    gc.collect()
    torch.cuda.empty_cache()


def probe(opts: TrainOptions, data: tuple, device) -> None:
    """Whether it fits the GPU, before anything is made: models of the same shapes, with the sampler's cache in place,
    score and learn from the largest micro-batch that can occur, a reward model that is to be trained as well. Raises
    UserError if it does not."""
    longest, kind, dtype = max(map(len, data[1])), KIND[opts.reward], DTYPES[opts.dtype]
    rows = [*range(max(1, opts.token_budget // (longest + opts.max_new_tokens)))]
    batch = Batch([[0] * longest for _ in rows], [[0] * opts.max_new_tokens for _ in rows], torch.zeros(len(rows)))
    micro = batch.pack(rows, device)
    path = opts.prm or opts.orm or opts.completer or opts.model  # of the reward model's shape
    learning = lambda home: ScalarModel(random_lm(path, device=home), opts.rm_likelihood)
    frozen = lambda home: ScalarModel(random_lm(path, dtype, home), opts.rm_likelihood).requires_grad_(False)
    try:
        if kind and opts.rm_lr and not (opts.prm or opts.orm):
            model = shard(learning, dtype, device)
            checkpoint_layers(model)
            optimizer = adam(model, opts.rm_lr, (0.9, 0.95))
            model(micro.packed).sum().backward()
            del model, optimizer
            free_memory()
        trainer = Trainer(opts, data, opts.model, "", device, load=random_lm)
        trainer.sampler.start(opts.slots, longest + opts.max_new_tokens, opts.max_new_tokens, trainer.eos, 1.0)
        if kind:
            score_values(shard(frozen, dtype, device, opts.offload_frozen), batch, [micro])
        score_logps(trainer.reference, batch, [micro], opts.temperature)
        trainer.policy(micro.packed, micro.predict_at, micro.targets, opts.temperature, True)[0].sum().backward()
        trainer.critic(micro.packed).sum().backward()
    except torch.OutOfMemoryError:
        mend = "lower --slots or --token-budget, add --checkpoint-activations or --offload-frozen, or use more GPUs"
        raise UserError(f"this does not fit the GPU: {mend}") from None
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        say(f"takes up to {torch.cuda.max_memory_allocated(device) / 1e9:.1f} of {total / 1e9:.1f} GB on each GPU")


# ------------------------------------------------------------------------------------------------ a run


FREE = (  # what may differ between the calls of one run
    "name", "resume", "iterations", "save_every", "runs_dir", "slots", "threads", "token_budget", "offload_frozen",
    "checkpoint_activations", "log_to",
)


def open_run(opts: TrainOptions) -> tuple[Path, dict]:
    """The folder of the run, and what its config.json is to hold: the options, and which models and data it was given,
    with the times of their last change. Raises UserError if the run is there and not to be resumed, or has others."""
    folder = Path(opts.runs_dir) / (opts.name or f"{opts.preset or 'run'}-{opts.reward}-s{opts.seed}")
    given = [opts.model, opts.prm, opts.orm, opts.completer, opts.data, opts.eval_data]
    given = [name for names in given if names for name in data_sets(names)]
    config, old = asdict(opts) | {"keys": [prm.model_key(name) for name in given]}, folder / "config.json"
    if old.exists() and not opts.resume:
        raise UserError(f"{folder} exists: --resume continues it, another --name starts a new run")
    before = json.loads(old.read_text()) if old.exists() else config
    changed = [f"{k} {before.get(k)} -> {v}" for k, v in config.items() if k not in FREE and before.get(k) != v]
    if changed:
        raise UserError(f"{folder} has another configuration ({', '.join(changed)}): use that, or another --name")
    return folder, config


def commit() -> str:
    """Of this code, with a + if it was changed since; empty outside a git checkout."""
    folder = str(Path(__file__).parent)
    failed, name = subprocess.getstatusoutput(f"git -C '{folder}' describe --always --dirty=+ --exclude='*'")
    return "" if failed else name


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-[0-9]*"))


def save_checkpoint(folder: Path, iteration: int, trainer: Trainer) -> None:
    """FOLDER/checkpoint-ITERATION: each rank writes its part of the tensors. It gets its name when it is complete; then
    the one before goes. Raises UserError if it cannot be written."""
    new = folder / "checkpoint.new"
    on_rank_0(lambda: shutil.rmtree(new, ignore_errors=True))
    try:
        dcp.save(trainer.tensors(), checkpoint_id=new)
    except dcp.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise UserError(f"cannot write {new}: {cause}; the checkpoint before it is untouched") from None
    if rank() == 0:
        new.rename(folder / f"checkpoint-{iteration:06d}")
        for path in checkpoints(folder)[:-1]:
            shutil.rmtree(path)


def load_checkpoint(folder: Path, trainer: Trainer) -> int:
    """Read the checkpoint into the trainer; returns its iteration, 0 if there is none. Raises UserError if it is
    damaged."""
    found = on_rank_0(lambda: checkpoints(folder))
    if not found:
        return 0
    try:
        dcp.load(trainer.tensors(), checkpoint_id=found[-1])
    except dcp.CheckpointException:
        raise UserError(f"{found[-1]} is damaged: remove it, and the run starts anew") from None
    return int(found[-1].name.removeprefix("checkpoint-"))


class Interrupt:
    """Notes SIGTERM and Ctrl-C, so that the iteration can be finished and saved; a second one kills."""

    def __init__(self):
        self.number = 0
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number, frame) -> None:
        self.number = number
        self.restore()
        say("\nstopping after this iteration, to save it; once more stops at once")

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def open_log(opts: TrainOptions, folder: Path, start: int):
    """log(numbers, step=iteration) to the service of --log-to, under the run's name; nothing without."""
    if opts.log_to == "wandb":
        import wandb

        name = dict(project="reward-design", name=folder.name, id=prm.short_hash(str(folder.resolve())))
        return wandb.init(config=asdict(opts), resume="allow", dir=str(folder), **name).log
    if opts.log_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

        def log(numbers: dict, step: int) -> None:
            for name, x in numbers.items():
                writer.add_scalar(name, x, step)
            writer.flush()

        return log
    return lambda numbers, step: None


def start_files(folder: Path, config: dict, before: list, start: int) -> None:
    """Written at each start. The logs lose what a stopped run wrote after its checkpoint, and a half line."""
    write(folder / "config.json", json.dumps(config, indent=1))
    write(folder / "before.json", json.dumps(before))
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = [line for line in whole_lines(folder / name) if start and json.loads(line)["iteration"] <= start]
        write(folder / name, "".join(lines))
    if not start:
        append(folder / "metrics.jsonl", [{"iteration": 0, **before[0]}])


def loop(opts: TrainOptions, folder: Path, trainer: Trainer, config: dict, interrupt: Interrupt) -> None:
    """All iterations that are not done yet; writes the files of the run."""
    start = load_checkpoint(folder, trainer) if opts.resume else 0
    before = after = json.loads((folder / "before.json").read_text()) if start else trainer.evaluate()
    if rank() == 0:
        start_files(folder, config, before, start)
        log_to = open_log(opts, folder, start)
    answers = f"{opts.prompts_per_iteration} x {opts.samples_per_prompt} answers"
    say(f"PPO, reward {opts.reward}, alpha {opts.alpha:g}: {opts.iterations} iterations of {answers}")
    bar = tqdm(total=opts.iterations, initial=start, desc=f"PPO {opts.reward}", unit="iteration", disable=rank() > 0)
    iteration, stop = start, 0
    while iteration < opts.iterations and not stop:
        iteration += 1
        final = iteration == opts.iterations
        log, rows = trainer.iteration(iteration)
        if final or (opts.eval_every and iteration % opts.eval_every == 0):
            after = trainer.evaluate()
            log |= after[0]
        if rank() == 0:
            append(folder / "metrics.jsonl", [log])
            append(folder / "samples.jsonl", rows)
            log_to({k: x for k, x in log.items() if isinstance(x, int | float) and k != "iteration"}, step=iteration)
        stop = int(all_reduce(torch.tensor(interrupt.number), "max"))
        if stop or final or (opts.save_every and iteration % opts.save_every == 0):
            save_checkpoint(folder, iteration, trainer)
        shown = ("success", "learned_reward", "steps", "repeats", "kl")
        bar.set_postfix({k: f"{log[k]:.2f}" for k in shown} | {"tok/s": f"{log['tokens_per_second']:.0f}"})
        bar.update()
    bar.close()
    if iteration < opts.iterations:
        how = f"--name {folder.name} --resume goes on"
        say(f"stopped by {signal.Signals(stop).name} after iteration {iteration}, saved: {how}")
        return
    if start >= opts.iterations:  # stopped between the checkpoint and the end
        after = trainer.evaluate()
    new = folder / "model.new"
    save_lm(trainer.policy.lm, trainer.tokenizer, new)
    if rank() == 0:
        shutil.rmtree(folder / "model", ignore_errors=True)
        new.rename(folder / "model")
        print(before_after(before[0], after[0], (before[1], after[1])))
        print(f"\nwritten: {folder}/ (metrics.jsonl, samples.jsonl, model/)")


def run(opts: TrainOptions, folder: Path, config: dict, device) -> None:
    data = load_data(opts)
    if opts.prm or opts.orm:
        form = prm.find_format(opts.prm or opts.orm, opts.prm_format)  # now, not after the preparation
        if opts.orm and form != "own":
            raise UserError(f"--orm {opts.orm}: a published PRM; give it as --prm, with a reward that reads one")
    if device.type == "cuda" and opts.model:
        probe(opts, data, device)
        free_memory()
    with nullcontext() if rank() else lock(folder / "lock"):
        policy, reward_model = prepare(opts, data[0], device)
        free_memory()
        trainer, interrupt = Trainer(opts, data, policy, reward_model, device), Interrupt()
        config |= {"policy": policy, "reward_model": reward_model, "commit": on_rank_0(commit)}
        loop(opts, folder, trainer, config, interrupt)
    interrupt.restore()
    if interrupt.number and world_size() == 1:  # what a shell expects; torchrun would take it for a failure
        os.kill(os.getpid(), interrupt.number)


def main() -> None:
    opts, preset = parse()
    with processes() as device:
        say(preset)
        if opts.threads and world_size() == 1:  # torchrun divides the cores itself
            torch.set_num_threads(opts.threads)
        # after a restart by torchrun --max-restarts; its nodes count for themselves: one of them may say 0
        restarts = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
        opts.resume |= bool(all_reduce(restarts, "max"))
        folder, config = on_rank_0(lambda: open_run(opts))
        run(opts, folder, config, device)


if __name__ == "__main__":
    run_script(main)
