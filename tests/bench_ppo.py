"""Seconds by phase of one PPO iteration in the embedded world, beside TRL's PPO and GRPO. Run by hand:

    pip install trl==1.12.0 requests            # TRL's last release with a PPO trainer; without it ours is shown alone
    python tests/bench_ppo.py [--check]         # 256 and 768 answers; exit status 1 if a target is missed
    python tests/bench_ppo.py --smoke           # the smallest sizes, to see that it runs

All start from the same warm-started policy (RUNS_DIR/cache; made once, in minutes), on the same questions, in float32
on the CPU, with answers of up to 128 tokens at temperature 1, a KL penalty, and two optimizer steps an iteration:

    ours        --preset toy --reward prm: policy, reference, critic, process reward model, grader; one answer each
    TRL PPO     the same but for the grader; its reward model gives one score an answer; one answer each
    TRL GRPO    policy, reference, grader: neither critic nor reward model; two answers (its least), half the questions

They take turns in one process, so that a drift of the machine's speed meets all. The first round is dropped; printed
are medians of the others, for ratios with their range. Learning rates of 1e-9 keep the answers as long as they are.

TRL runs on whole batches, without gradient checkpointing, logs and files; smaller batches and eager attention were no
faster. Its clock leaves out the set-up of train(). The arithmetic of rewards and advantages is in TRL's score and in
our rest; metrics are in TRL's score and update and in our rest.
Left out: CUDA, more than one process, larger models, the quality of what is learned.
"""

import argparse
import contextlib
import gc
import io
import logging
import os
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import mean, median
from unittest.mock import patch

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}  # neither fetches nor warnings
sys.path.insert(0, str(Path(__file__).parents[1]))

from data import UserError, run_script, toy_tokenizer  # before torch, see there
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import train
from grader import grade
from model import ScalarModel, save_lm, toy_model

try:
    import trl
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
except (ImportError, RuntimeError) as error:  # RuntimeError: TRL itself lacks a package
    trl, missing = None, str(error).splitlines()[-1]

PHASES = ("sample", "grade", "score", "update", "rest")
TARGETS = {256: {"TRL PPO": 2.5, "TRL GRPO": 1.3}, 768: {"TRL PPO": 2.0, "TRL GRPO": 1.4}}  # times as fast as they
LR = 1e-9

# ------------------------------------------------------------------------------------------------ the three systems
# Each iteration returns {phase: seconds, "tokens": mean number in an answer}.


def ours(trainer: train.Trainer, number: int) -> dict[str, float]:
    start = time.perf_counter()
    log, _ = trainer.iteration(number)
    total = time.perf_counter() - start
    seconds = {phase: log[f"seconds_{phase}"] for phase in PHASES[:-1]}
    return {**seconds, "rest": total - sum(seconds.values()), "tokens": log["tokens"]}


class Laps(transformers.TrainerCallback):
    """Seconds by phase in a TRL trainer, from the start of its loop to the end of its last optimizer step."""

    def __init__(self):
        self.seconds, self.tokens, self.last = {}, 0.0, 0.0

    def __call__(self, phase: str) -> None:
        """The time since the last call belongs to this phase."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now

    def around(self, owner, name: str, before: str, after: str, tokens=None) -> None:
        """The times before and in owner.name belong to these phases; tokens(result, *arguments): mean length."""
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            self(before)
            result = function(*args, **kwargs)
            self(after)
            self.tokens = tokens(result, *args) if tokens else self.tokens
            return result

        patch.object(owner, name, timed).start()

    def on_train_begin(self, *args, **kwargs):
        self.seconds, self.last = {}, time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self("update")

    def iteration(self, trainer, number: int) -> dict[str, float]:
        """train() of one iteration, with the models and optimizers of the one before. Not one long train() in a thread
        that pauses: it would have OpenMP threads of its own, and where these outnumber the cores, all wait in another
        way."""
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        return {**self.seconds, "tokens": self.tokens}


def common(opts: train.TrainOptions, folder: str) -> dict:
    """Options of both trainers. bfloat16 and gradient checkpointing are TRL's defaults, even on a CPU."""
    off = dict(bf16=False, gradient_checkpointing=False, save_strategy="no", logging_strategy="no", disable_tqdm=True)
    learning = dict(learning_rate=LR, lr_scheduler_type="constant", gradient_accumulation_steps=1)
    here = dict(output_dir=folder, use_cpu=True, report_to="none", seed=opts.seed, temperature=opts.temperature)
    return here | learning | off


def trl_ppo(opts: train.TrainOptions, data: tuple, policy: str, folder: str):
    tokenizer, batch = AutoTokenizer.from_pretrained(policy, padding_side="left"), opts.prompts_per_iteration
    lm = lambda: AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    scalar = lambda: AutoModelForSequenceClassification.from_pretrained(policy, dtype=torch.float32, num_labels=1)
    config = PPOConfig(  # whole minibatches: gradient_accumulation_steps=2 would halve the number of optimizer steps
        **common(opts, folder), per_device_train_batch_size=batch, local_rollout_forward_batch_size=batch,
        total_episodes=batch, num_mini_batches=opts.minibatches, num_ppo_epochs=opts.epochs, gamma=opts.gamma,
        lam=opts.lam, kl_coef=opts.beta, response_length=opts.max_new_tokens, stop_token="eos",
        num_sample_generations=0,
    )
    laps, prompts = Laps(), Dataset.from_dict({"input_ids": data[1]})
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=lm(), ref_model=lm(), reward_model=scalar(),
        value_model=scalar(), train_dataset=prompts, eval_dataset=prompts, callbacks=[laps],
    )

    def tokens(result, _, queries, *__) -> float:
        return (result[0][:, queries.shape[1] :] != tokenizer.pad_token_id).sum().item() / len(queries)

    laps.around(ppo_trainer, "batch_generation", "rest", "sample", tokens)
    laps.around(ppo_trainer, "masked_whiten", "score", "score")  # of the advantages: the last thing before the update
    return partial(laps.iteration, trainer)


def trl_grpo(opts: train.TrainOptions, data: tuple, policy: str, folder: str):
    config = GRPOConfig(
        **common(opts, folder), per_device_train_batch_size=opts.prompts_per_iteration // opts.minibatches,
        steps_per_generation=opts.minibatches, max_steps=opts.minibatches, num_iterations=opts.epochs, beta=opts.beta,
        num_generations=2, max_completion_length=opts.max_new_tokens, model_init_kwargs={"dtype": "float32"},
    )
    laps = Laps()
    trainer = GRPOTrainer(
        model=policy,  # a folder: from it the reference is loaded as well
        reward_funcs=lambda completions, answer, **_: [float(grade(*pair)) for pair in zip(answer, completions)],
        processing_class=AutoTokenizer.from_pretrained(policy), args=config, callbacks=[laps],
        train_dataset=Dataset.from_list([{"prompt": p.question, "answer": p.answer} for p in data[0]]),
    )
    laps.around(trainer, "_generate", "rest", "sample", lambda result, *_: mean(map(len, result[1])))
    laps.around(trainer, "_calculate_rewards", "score", "grade")
    laps.around(trainer, "_generate_and_score_completions", "rest", "score")
    return partial(laps.iteration, trainer)


# ------------------------------------------------------------------------------------------------ tables


def untrained(folder: Path) -> tuple[str, str]:
    """A policy and a reward model that nobody trained."""
    tokenizer = toy_tokenizer()
    save_lm(toy_model(tokenizer, seed=0), tokenizer, folder / "policy")
    ScalarModel(toy_model(tokenizer, seed=1), likelihood=True).save(tokenizer, folder / "prm")
    return str(folder / "policy"), str(folder / "prm")


def bench(answers: int, args, folder: Path) -> list[str]:
    """All systems by turns. Prints the tables; returns a sentence for each missed target."""
    argv = ["--preset", "toy", "--reward", "prm", "--prompts-per-iteration", str(answers), "--runs-dir", args.runs_dir]
    argv += ["--lr", str(LR), "--critic-lr", str(LR), "--threads", str(args.threads)]
    argv += ["--max-new-tokens", "8", "--eval-problems", "1"] if args.smoke else []
    opts, device = train.parse(argv)[0], torch.device("cpu")
    problems, prompts, test = train.load_data(opts)
    data = problems[:answers], prompts[:answers], test  # so that each iteration has these very questions
    policy, reward_model = untrained(folder) if args.smoke else train.prepare(opts, problems, device)
    trainer = train.Trainer(opts, data, policy, reward_model, device)
    systems = {"ours": partial(ours, trainer)}
    if trl:
        for name, make in (("TRL PPO", trl_ppo), ("TRL GRPO", trl_grpo)):
            systems[name] = make(opts, data, policy, str(folder))
    rows = {name: [] for name in systems}
    gc.collect()
    gc.freeze()  # TRL PPO collects garbage in each iteration: not also in all that was there before
    for number in range(1, args.rounds + 2):
        for name, iteration in systems.items():
            row = iteration(number)
            if number > 1:
                rows[name].append({**row, "total": sum(row.get(phase, 0.0) for phase in PHASES)})
    gc.unfreeze()
    patch.stopall()

    middle = lambda name, key: median(row.get(key, 0.0) for row in rows[name])
    print(f"\n{answers} answers, {torch.get_num_threads()} threads, seconds: medians of {args.rounds} rounds")
    print(" " * 10 + "".join(f"{c:>9}" for c in (*PHASES, "total")) + "  answers/s  tokens/s  tokens/answer")
    for name in rows:
        rate, tokens = answers / middle(name, "total"), middle(name, "tokens")
        phases = "".join(f"{middle(name, phase):9.3f}" for phase in (*PHASES, "total"))
        print(f"{name:10}{phases}{rate:11.1f}{rate * tokens:10.0f}{tokens:15.1f}")
    missed = []
    for name in [*rows][1:]:
        ratios = [peer["total"] / mine["total"] for peer, mine in zip(rows[name], rows["ours"])]
        target = TARGETS.get(answers, {}).get(name, 0.0)
        print(said := f"ours is {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) times as fast as {name}")
        missed += [f"{answers} answers: {said}, the target is {target}"] if median(ratios) < target else []
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds by phase of one PPO iteration, beside TRL's.")
    parser.add_argument("--answers", type=int, nargs="+", default=[256, 768], help="answers of an iteration")
    parser.add_argument("--rounds", type=int, default=5, help="measured iterations of each, after one that is not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs-dir", default="runs", help="its cache holds, or gets, the warm-started policy")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.answers, args.rounds, args.threads = [4], 1, 1
    if min(args.rounds, args.threads, *args.answers) < 1 or any(n % 4 for n in args.answers):
        raise UserError("--rounds and --threads must be at least 1, --answers multiples of 4 (two steps of pairs)")
    logging.disable(logging.WARNING)  # heads that are new, options that are old
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    if trl is None:
        print(f"TRL is not installed, so ours is shown alone: pip install trl==1.12.0 requests ({missing})")
    missed = [] if trl else ["not compared with TRL"]
    for answers in args.answers:
        with tempfile.TemporaryDirectory() as folder:
            missed += bench(answers, args, Path(folder))
    for sentence in missed if args.check else ():
        print(f"missed: {sentence}")
    sys.exit(1 if missed and args.check else 0)


if __name__ == "__main__":
    run_script(main)
