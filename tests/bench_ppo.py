"""Seconds by phase of one PPO iteration in the embedded world, beside TRL's PPO and GRPO, and beside a floor. Run by hand:

    pip install trl==1.12.0 requests                   # TRL's last release with a PPO trainer
    python tests/bench_ppo.py [--check]                # 256 and 768 answers; exit status 1 if a target is missed

All start from the same warm-started policy (RUNS_DIR/cache; made once, in minutes), on the same questions, in float32 on
the CPU, with answers of up to 128 tokens at temperature 1, a KL penalty, and two optimizer steps an iteration:

    ours        --preset toy --reward prm: policy, reference, critic, process reward model, grader; one answer a question
    TRL PPO     the same but for the grader; its reward model gives one score an answer; one answer a question
    TRL GRPO    policy, reference, grader: neither critic nor reward model; two answers (its least) to half the questions

They take turns in one process and thread, so that a drift of the machine's speed meets all. The first round is dropped;
printed are medians of the others, for ratios with their range. Learning rates of 1e-9 keep the answers as long as they are.

TRL runs on whole batches, without gradient checkpointing, logs and files; smaller batches and eager attention were no
faster. Its clock leaves out the set-up of train(). The arithmetic of rewards and advantages is in TRL's score and in our
update; metrics are in TRL's score and update and in our rest. The floor is what the matrix products of our iteration, by
mean lengths, would take at the measured speed of one float32 product: a large one, and one of this model's shapes.
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

import torch
import transformers
from torch.utils.benchmark import Timer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import train
from data import UserError, run_script
from grader import grade

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


def ours(trainer, number):
    start = time.perf_counter()
    log, _ = trainer.iteration(number)
    total = time.perf_counter() - start
    seconds = {phase: log[f"seconds_{phase}"] for phase in PHASES[:-1]}
    return seconds | {"rest": total - sum(seconds.values()), "tokens": log["tokens"]}


class Laps(transformers.TrainerCallback):
    """Seconds by phase in a TRL trainer, from the start of its loop to the end of its last optimizer step."""

    def __init__(self):
        self.seconds, self.tokens, self.last = {}, 0.0, 0.0

    def __call__(self, phase):
        """The time since the last call belongs to this phase."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now

    def around(self, owner, name, before, after, tokens=None):
        """The times before and in owner.name belong to these phases; tokens(its result, *its arguments): mean length."""
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

    def iteration(self, trainer):
        """train() of one iteration, with the models and optimizers of the one before. Not one long train() in a thread that
        pauses: it would have OpenMP threads of its own, and where these outnumber the cores, all wait in another way."""
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        return self.seconds | {"tokens": self.tokens}


def common(o, folder):
    """Options of both trainers. bfloat16 and gradient checkpointing are TRL's defaults, even on a CPU."""
    off = dict(bf16=False, gradient_checkpointing=False, save_strategy="no", logging_strategy="no", disable_tqdm=True)
    learning = dict(learning_rate=LR, lr_scheduler_type="constant", gradient_accumulation_steps=1, temperature=o.temperature)
    return dict(output_dir=folder, use_cpu=True, seed=o.seed, report_to="none", **learning, **off)


def trl_ppo(o, data, policy, folder):
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    lm = lambda: AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    scalar = lambda: AutoModelForSequenceClassification.from_pretrained(policy, dtype=torch.float32, num_labels=1)
    config = PPOConfig(  # whole minibatches: gradient_accumulation_steps=2 would halve the number of optimizer steps
        **common(o, folder), per_device_train_batch_size=o.questions, num_mini_batches=o.minibatches, lam=o.lam,
        num_ppo_epochs=o.epochs, local_rollout_forward_batch_size=o.questions, total_episodes=o.questions, gamma=o.gamma,
        num_sample_generations=0, response_length=o.max_new_tokens, stop_token="eos", kl_coef=o.beta,
    )  # fmt: skip
    laps, prompts = Laps(), Dataset.from_dict({"input_ids": data[1]})
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=lm(), ref_model=lm(), reward_model=scalar(), value_model=scalar(),
        train_dataset=prompts, eval_dataset=prompts, callbacks=[laps],
    )  # fmt: skip
    tokens = lambda y, _, queries, *__: (y[0][:, queries.shape[1] :] != tokenizer.pad_token_id).sum().item() / len(queries)
    laps.around(ppo_trainer, "batch_generation", "rest", "sample", tokens)
    laps.around(ppo_trainer, "masked_whiten", "score", "score")  # of the advantages: the last thing before the update
    return partial(laps.iteration, trainer)


def trl_grpo(o, data, policy, folder):
    config = GRPOConfig(
        **common(o, folder), per_device_train_batch_size=o.questions // o.minibatches, steps_per_generation=o.minibatches,
        num_iterations=o.epochs, max_steps=o.minibatches, num_generations=2, max_completion_length=o.max_new_tokens,
        beta=o.beta, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    laps = Laps()
    trainer = GRPOTrainer(
        model=policy,  # a folder: from it the reference is loaded as well
        reward_funcs=lambda completions, answer, **_: [float(grade(*pair)) for pair in zip(answer, completions)],
        processing_class=AutoTokenizer.from_pretrained(policy), args=config, callbacks=[laps],
        train_dataset=Dataset.from_list([{"prompt": p.question, "answer": p.answer} for p in data[0]]),
    )  # fmt: skip
    laps.around(trainer, "_generate", "rest", "sample", lambda result, *_: mean(map(len, result[1])))
    laps.around(trainer, "_calculate_rewards", "score", "grade")
    laps.around(trainer, "_generate_and_score_completions", "rest", "score")
    return partial(laps.iteration, trainer)


# ------------------------------------------------------------------------------------------------ the floor and the tables


def gemm_rate(m, k, n):
    """Floating-point operations per second of (m, k) @ (k, n) in float32, on all threads: Timer's default is one."""
    names = {"a": torch.randn(m, k), "b": torch.randn(k, n), "out": torch.empty(m, n)}
    timer = Timer("torch.mm(a, b, out=out)", "import torch", globals=names, num_threads=torch.get_num_threads())
    return 2 * m * k * n / timer.blocked_autorange(min_run_time=0.3).median


def operations(model, answers, prompt, answer):
    """Floating-point operations of our iteration by phase, from the mean numbers of prompt and answer tokens."""
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name)
    c, length = model.config, prompt + answer
    attention = 2 * c.hidden_size * c.num_hidden_layers * length * (length + 1)  # a token reads those up to itself
    body = answers * (2 * matrices * length + attention)
    head = answers * 2 * c.hidden_size * c.vocab_size * answer  # log-probabilities of the answer's tokens alone
    return {
        "sample": body + head,
        "score": 4 * body + 3 * head,  # policy, reference, critic, reward model, which reads log-probabilities as well
        "update": 3 * (2 * body + head),  # policy and critic; the backward pass is twice the forward
    }


def bench(answers, args):
    """All systems by turns. Prints the tables; returns a sentence for each missed target."""
    argv = f"--preset toy --reward prm --questions {answers} --lr {LR} --critic-lr {LR} --threads {args.threads}".split()
    o, _ = train.parse([*argv, "--runs-dir", args.runs_dir])
    problems, prompts, test = train.load_data(o)
    data = problems[:answers], prompts[:answers], test  # so that each iteration has these very questions
    policy, reward_model = train.prepare(o, problems, 0, 1, torch.device("cpu"))
    trainer = train.Trainer(o, data, policy, reward_model, 0, 1, torch.device("cpu"))
    rows, rates = {"ours": [], "TRL PPO": [], "TRL GRPO": []}, {(2048, 2048, 2048): [], (4096, 64, 192): []}
    with tempfile.TemporaryDirectory() as folder:
        systems = trl_ppo(o, data, policy, folder), trl_grpo(o, data, policy, folder)
        gc.collect()
        gc.freeze()  # TRL PPO collects garbage in each iteration: not also in all that was there before
        for number in range(1, args.rounds + 2):
            for name, iteration in zip(rows, (partial(ours, trainer, number), *systems)):
                rows[name].append(iteration())
            for shape in rates:
                rates[shape].append(gemm_rate(*shape))
    gc.unfreeze()
    patch.stopall()
    rows = {name: kept for name, (_, *kept) in rows.items()}  # without the first
    total = {name: [sum(row.get(p, 0.0) for p in PHASES) for row in rows[name]] for name in rows}
    middle = lambda name, key: median(row[key] for row in rows[name])
    print(f"\n{answers} answers, {torch.get_num_threads()} threads, seconds: medians of {args.rounds} rounds")
    print(" " * 10 + "".join(f"{c:>9}" for c in (*PHASES, "total")) + "  answers/s  tokens/s  tokens/answer")
    for name in rows:
        rate, tokens = answers / median(total[name]), middle(name, "tokens")
        phases = "".join(f"{middle(name, p):9.3f}" if p in rows[name][0] else f"{'-':>9}" for p in PHASES)
        print(f"{name:10}{phases}{median(total[name]):9.3f}{rate:11.1f}{rate * tokens:10.0f}{tokens:15.1f}")
    missed = []
    for name in ("TRL PPO", "TRL GRPO"):
        ratios = [theirs / mine for theirs, mine in zip(total[name], total["ours"])]
        target = TARGETS.get(answers, {}).get(name, 0.0)
        print(said := f"ours is {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) times as fast as {name}")
        missed += [f"{answers} answers: {said}, the target is {target}"] if median(ratios) < target else []
    speeds = {" x ".join(map(str, shape)): median(rate) for shape, rate in rates.items()}
    titles = (f"{shape}, {rate / 1e9:.0f} GFLOP/s" for shape, rate in speeds.items())
    print("our floor     GFLOP  seconds" + "".join(f"{title:>34}" for title in titles))
    for phase, flop in operations(trainer.policy.lm, answers, mean(map(len, data[1])), middle("ours", "tokens")).items():
        seconds = middle("ours", phase)
        floors = (f"{flop / r:.3f} s ({seconds * r / flop:.1f} times)" for r in speeds.values())
        print(f"{phase:10}{flop / 1e9:9.2f}{seconds:9.3f}" + "".join(f"{floor:>34}" for floor in floors))
    return missed


def main():
    parser = argparse.ArgumentParser(description="Seconds by phase of one PPO iteration, beside TRL's and a floor.")
    parser.add_argument("--answers", type=int, nargs="+", default=[256, 768], help="answers of an iteration")
    parser.add_argument("--rounds", type=int, default=5, help="measured iterations of each system, after one that is not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs-dir", default="runs", help="its cache holds, or gets, the warm-started policy")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    args = parser.parse_args()
    if trl is None:
        raise UserError(f"pip install trl==1.12.0 requests, to compare with TRL's last PPO trainer ({missing})")
    if min(args.rounds, args.threads, *args.answers) < 1 or any(n % 4 for n in args.answers):
        raise UserError("--rounds and --threads must be at least 1, --answers multiples of 4 (two steps of pairs)")
    logging.disable(logging.WARNING)  # heads that are new, options that are old
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    print(f"TRL {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    missed = [f"missed: {sentence}" for answers in args.answers for sentence in bench(answers, args)]
    sys.exit("\n".join(missed) if missed and args.check else 0)  # a text is status 1


if __name__ == "__main__":
    run_script(main)
