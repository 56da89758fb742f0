"""Speed and memory of scoring and of the PPO updates, beside padded batches; errors of attention kernels. Run by hand:

    python tests/bench_update.py --model middling    # default: tiny; --equal: all answers of one length
    python tests/bench_update.py --check             # exit status 1 if a target is missed
    python tests/bench_update.py --sweep             # speed and peak memory against work, with the tiny model
    python tests/bench_update.py --kernels           # exit status 1 if a kernel is off
    python tests/bench_update.py --smoke             # the smallest sizes, to see that all of it runs

Weights and tokens are random and seeded: prompts of 16 tokens, answers of LENGTH / 8 to LENGTH, log-uniform (--equal:
all of LENGTH). Float32 on a CPU, with OMP_NUM_THREADS threads; on CUDA bfloat16 by model.shard, with float32 masters.
By turns:

    scoring   log-probabilities by a frozen model: `score_logps`
    update    `update_policy` and `update_critic`: one minibatch, so one step of AdamW each
    padded    the same written plainly for transformers' own model with sdpa: micro-batches in the given order, all
              logits in float32; on CUDA all weights, moments and sums of gradients in bfloat16, so less to keep and to
              move than ours. First, its losses and gradients are checked to equal ours: in float32, on CUDA in both

Tokens do not count padding. MFU, model FLOP utilisation: what the model needs over the wall time, as a share of the
speed of one large matrix product. What does not fit a GPU gets half the token budget until it does. --sweep starts a
process for each point; peak memory is what the update adds to models, moments and batch, fragments included. --kernels
compares with SDPA in float32, sequence by sequence; errors are shares of the largest element.
Left out: several GPUs, activation checkpointing but in --sweep, other architectures, the quality of what is learned.
"""

import argparse
import copy
import gc
import math
import random
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import UserError, run_script  # before torch, see there
import torch
import torch.nn.functional as F
from bench_rollout import CUDA, DEVICE, DTYPE, MODELS, clock, config_of, in_processes, machine, memory
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Qwen2Config

import model
from helpers import model_terms, tolerance
from model import (
    Decode, KVCache, Packed, Policy, ScalarModel, checkpoint_layers, replica, score_logps, score_values, shard, sync,
    whole,
)
from ppo import Experience, count_tokens, policy_loss, update_critic, update_policy, value_loss
from rollout import Batch

PROMPT = 16  # tokens of a prompt
ANSWERS = {"smoke": 4, "tiny": 64, "middling": 8, "qwen2.5-1.5b": 128}
TARGET = ("qwen2.5-1.5b", 768, 0.45)  # model, length, least MFU of its update on CUDA
adamw = partial(torch.optim.AdamW, lr=1e-6, fused=True)


def make_models(name: str, dtype=DTYPE):
    """Policy, critic and a frozen policy, as train.py has them."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        lm = AutoModelForCausalLM.from_config(config_of(name), attn_implementation=model.ATTENTION).eval()
    for p in lm.parameters():  # norms start as 1 and biases as 0: a forgotten one would go unnoticed
        if p.dim() == 1:
            p.data += 0.1 * torch.randn_like(p)
    frozen, critic = cast(Policy(copy.deepcopy(lm)), dtype).requires_grad_(False), ScalarModel(copy.deepcopy(lm)).eval()
    torch.nn.init.normal_(critic.head.weight, std=0.02)  # it starts as 0, and the gradients of the whole LM with it
    return [shard(m.to, dtype, torch.device(DEVICE)) for m in (Policy(lm), critic, frozen)]


def cast(module, dtype):
    for p in module.parameters():  # not module.to(dtype): the frequencies of rotary embeddings are always float32
        p.data = p.data.to(dtype)
    return module


def make_batch(vocab: int, lengths: list[int]) -> tuple[Batch, Experience]:
    """Answers of these lengths, and what the update reads beside them, so that clipping meets a part of the tokens."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    ids = lambda n: [rng.randrange(vocab) for _ in range(n)]
    batch = Batch([ids(PROMPT) for _ in lengths], [ids(n) for n in lengths], torch.zeros(len(lengths)).bool())
    noise = lambda scale: scale * torch.randn(batch.mask.shape, generator=generator)
    old_logp = noise(0.3) - math.log(vocab)  # which is about what random weights say
    return batch, Experience(batch.mask, old_logp, noise(1), noise(0.3), noise(1))


def our_update(policy, critic, optimizers, batch: Batch, experience: Experience, plan: list) -> list[float]:
    """One step of each, with micro-batches of the rows in `plan`; policy loss, entropy, value loss, gradient norms."""
    minibatches = [[batch.pack(rows, torch.device(DEVICE)) for rows in plan]]
    counts, limits = count_tokens(minibatches, batch.mask), dict(clip_range=0.2, max_grad_norm=1.0)
    log = update_policy(policy, optimizers[0], minibatches, counts, experience, temperature=1.0, **limits)
    log |= update_critic(critic, optimizers[1], minibatches, counts, experience, **limits)
    return [log[name] for name in ("policy_loss", "entropy", "value_loss", "grad_norm_policy", "grad_norm_critic")]


# ------------------------------------------------------------------------------------------------ padded batches


def stock(ours):
    """The model as transformers has it, on the very same parameters; of a sharded one, on copies in DTYPE."""
    lm = replica(ours.lm, DTYPE, DEVICE)
    if lm is not ours.lm:
        source, ours = ours, (ScalarModel if isinstance(ours, ScalarModel) else Policy)(lm)
        sync(cast(ours, DTYPE).requires_grad_(), source)
    twin = copy.deepcopy(ours, {id(p): p for p in ours.parameters()})  # the memo: what it holds is not copied
    twin.lm.set_attn_implementation("sdpa")
    return twin


def padded(batch: Batch, rows: list[int]):
    """The models' inputs (B, L), and where the next token is the answer's (B, L - 1)."""
    ids = [torch.tensor(batch.prompts[i] + batch.responses[i]) for i in rows]
    at, ends = torch.arange(max(map(len, ids))), torch.tensor([[len(x)] for x in ids])
    inputs = dict(input_ids=pad_sequence(ids, batch_first=True).to(DEVICE), attention_mask=(at < ends).to(DEVICE))
    return {**inputs, "use_cache": False}, ((at >= PROMPT) & (at < ends))[:, 1:].to(DEVICE)


def padded_logps(policy, inputs, answer):
    full = policy.lm(**inputs).logits[:, :-1].float().log_softmax(-1)
    return full.gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)[answer], full.detach()


def padded_update(policy, critic, optimizers, batch: Batch, experience: Experience, plan: list) -> list[float]:
    count, sums = batch.mask.sum().item(), torch.zeros(3, device=DEVICE)
    for rows in plan:
        inputs, answer = padded(batch, rows)
        old_logp, advantages, old_values, returns = experience.of(rows, DEVICE)
        logp, full = padded_logps(policy, inputs, answer)
        loss = policy_loss(logp, old_logp, advantages, 0.2).sum() / count
        loss.backward()
        entropy = -(full.exp() * full).sum(-1)[answer].sum() / count
        del logp, full  # not while the critic runs
        values = critic.head(critic.lm.model(**inputs).last_hidden_state).squeeze(-1)[:, :-1][answer].float()
        v_loss = value_loss(values, old_values, returns, 0.2).sum() / count
        v_loss.backward()
        sums += torch.stack([loss.detach(), entropy, v_loss.detach()])
    norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0).item() for m in (policy, critic)]
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return [*sums.tolist(), *norms]


def verify(dtype) -> None:
    """Both ways must compute the same losses and gradients, whatever the micro-batches. Raises UserError if not."""
    (policy, critic, _), (batch, experience) = make_models("tiny", dtype), make_batch(64, [5, 40, 23, 1, 31, 40])
    # away from the edges of clipping, at which the gradient jumps: rounding must not move a token over one
    away = 0.4 * torch.randint(-1, 2, (2, *batch.mask.shape))
    micro = batch.pack([*range(6)], torch.device(DEVICE))
    experience.logp = score_logps(policy, batch, [micro], 1.0) + away[0]
    experience.values = score_values(critic, batch, [micro])[0] + away[1]
    # with a learning rate of 0 nothing moves, and the momentum behind the first step is the gradient
    results, gradients = [], []
    for run, models, plan in (
        (our_update, (policy, critic), [[3, 0, 2], [4, 1, 5]]),
        (padded_update, (stock(policy), stock(critic)), [[0, 1, 2], [3, 4, 5]]),
    ):
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.0, momentum=0.9) for m in models]
        results.append(run(*models, optimizers, batch, experience, plan))
        momenta = [o.state[p].get("momentum_buffer") for o in optimizers for p in o.param_groups[0]["params"]]
        gradients.append([whole(x).float() for x in momenta if x is not None])
    pairs = [*zip(*(map(torch.tensor, numbers) for numbers in results)), *zip(*gradients, strict=True)]
    off = max(((x - y).norm() / y.norm()).item() for x, y in pairs)
    # in float32 sums there and back; products are rounded to bfloat16, some three of a layer
    c = policy.lm.config
    terms = 2 * model_terms(c, 56) if dtype == torch.float32 else 2 * 3 * c.num_hidden_layers
    if not off <= tolerance(terms, 1, dtype):
        raise UserError(f"padded_update does not compute what the updates do: a loss or gradient is {off:.1e} off")
    print(f"losses and gradients are those of padded batches, to {off:.0e} in {str(dtype)[6:]}")


# ------------------------------------------------------------------------------------------------ speed


def timed(run, *args) -> float:
    begin = clock()
    run(*args)
    return clock() - begin


def in_order(sizes: list[int], budget: int) -> list[list[int]]:
    """Micro-batches as a padded loop has them: equally many answers each."""
    return [x.tolist() for x in torch.arange(len(sizes)).split(max(1, budget // max(sizes)))]


def needed(config, weights: int, answers: list[int]) -> dict[str, float]:
    """FLOP. Forward, for each token: 2 for each weight of the layers' matrices, 4 * hidden * layers for each token that
    it reads, itself and those before, and in an answer 2 * hidden * vocabulary. Backward is twice that; nothing else
    counts. So for a model that learns: tokens * (6 * matrix weights + 12 * hidden * layers * length / 2)."""
    lengths = [PROMPT + n for n in answers]
    reads, head = sum(n * (n + 1) / 2 for n in lengths), 2 * config.hidden_size * config.vocab_size * sum(answers)
    body = 2 * weights * sum(lengths) + 4 * config.hidden_size * config.num_hidden_layers * reads
    return {"scoring": body + head, "update": 3 * (2 * body + head)}  # the critic's head is a vector


def compare(name: str, length: int, count: int, equal: bool, budget: int, rounds: int) -> bool:
    """Measures and prints the table. Returns whether the target is met."""
    rng, (policy, critic, frozen) = random.Random(0), make_models(name)
    answers = [length if equal else max(1, round(length / 8 * 8 ** rng.random())) for _ in range(count)]
    batch, experience = make_batch(policy.lm.config.vocab_size, answers)
    sizes, device = [PROMPT + n for n in answers], torch.device(DEVICE)

    def sorted_rows(budget: int) -> list[list[int]]:
        return [micro.rows for micro in batch.micro_batches([[*range(count)]], budget, "meta")[0]]

    def score(budget: int) -> None:
        score_logps(frozen, batch, batch.micro_batches([[*range(count)]], budget, device)[0], 1.0)

    @torch.inference_mode()
    def score_padded(twin, budget: int) -> None:
        for rows in in_order(sizes, budget):
            padded_logps(twin, *padded(batch, rows))[0].cpu()

    def train(update, plan: list[list[int]], *models) -> float:
        optimizers = [adamw(m.parameters()) for m in models]
        update(*models, optimizers, batch, experience, [[0]])  # makes AdamW's moments, which take memory as well
        return timed(update, *models, optimizers, batch, experience, plan)

    systems = {  # each returns its wall seconds; twins and moments take memory in their own turns alone
        "scoring": lambda budget: timed(score, budget),
        "scoring, padded": lambda budget: timed(score_padded, stock(frozen), budget),
        "update": lambda budget: train(our_update, sorted_rows(budget), policy, critic),
        "update, padded": lambda budget: train(padded_update, in_order(sizes, budget), stock(policy), stock(critic)),
    }
    budgets, seconds, rates = dict.fromkeys(systems, budget), {system: [] for system in systems}, []
    for system, run in systems.items():  # a warm-up
        while budgets[system]:
            with suppress(torch.OutOfMemoryError):
                run(budgets[system])
                break
            budgets[system] //= 2
            policy = critic = frozen = None  # all anew: sharded models do not recover from an error in their passes
            gc.collect()  # behind the `with`, for until its end the error holds the tensors
            torch.cuda.empty_cache()
            policy, critic, frozen = make_models(name)
    side = 64 if name == "smoke" else 8192 if CUDA else 2048
    a = torch.randn(side, side, dtype=DTYPE, device=DEVICE)
    for _ in range(rounds):
        rates.append(2 * side**3 / min(timed(torch.mm, a, a) for _ in range(8)))
        for system, run in systems.items():
            seconds[system].append(run(budgets[system]))

    weights = sum(p.numel() for key, p in policy.named_parameters() if p.dim() == 2 and "layers" in key)
    flop, mfu = needed(policy.lm.config, weights, answers), {}
    print(f"{name}, {policy.lm.num_parameters():,} parameters; {count} answers, {sum(sizes):,} tokens\n{machine()}\n")
    print(f"one matrix product: {median(rates) / 1e12:.3g} TFLOP/s\n")
    print(f"{'tokens/s':18}{'median':>9}{'min':>9}{'max':>9}  times padded  budget   MFU")
    for system, times in seconds.items():
        work = system.partition(",")[0]
        mfu[system] = median(flop[work] / s / rate for s, rate in zip(times, rates))
        speeds = "".join(f"{sum(sizes) / f(times):9,.0f}" for f in (median, max, min))
        ratio = median(theirs / mine for theirs, mine in zip(seconds[f"{work}, padded"], times))
        print(f"{system:18}{speeds}{ratio:14.2f}{budgets[system]:8,}{100 * mfu[system]:5.1f}%")
    if not CUDA or (name, length) != TARGET[:2]:
        return True
    met = mfu["update"] >= TARGET[2]
    print(f"{'met' if met else 'MISSED'}: the MFU of the update is {mfu['update']:.3f}, the target is {TARGET[2]}")
    return met


# ------------------------------------------------------------------------------------------------ cost against work


def sweep(smoke: bool) -> None:
    work = [(n, 64, 4096, False) for n in (64, 256, 1024, 4096)]
    work += [(256, 128, 1024 << i, checkpointed) for checkpointed in (False, True) for i in range(6)]
    work = [(4, 8, 64, True)] if smoke else work
    print(machine())
    print(f"\n| answers | tokens each | checkpointed | packed tokens | tokens/s | peak MB |\n{'|---' * 6}|")
    for (answers, length, _, checkpointed), measured in zip(work, in_processes(point, work, smoke)):
        print(f"| {answers} | {length} | {checkpointed} | {measured} |", flush=True)


def point(work: tuple[int, int, int, bool]) -> str:
    """Tokens of the largest micro-batch, tokens per second, and peak memory."""
    answers, length, budget, checkpointed = work
    models, (batch, experience) = make_models("tiny")[:2], make_batch(64, [length] * answers)
    for m in models if checkpointed else ():
        checkpoint_layers(m)
    plan = [micro.rows for micro in batch.micro_batches([[*range(answers)]], budget, "meta")[0]]
    train = partial(our_update, *models, [adamw(m.parameters()) for m in models], batch, experience)
    train([[0]])  # a small warm-up, which makes AdamW's moments
    before = memory(reset=True)
    seconds = timed(train, plan)
    rate, peak = answers * (PROMPT + length) / seconds, (memory() - before) / 2**20
    return f"{max(map(len, plan)) * (PROMPT + length):,} | {rate:,.0f} | {peak:,.1f}"


# ------------------------------------------------------------------------------------------------ kernels

SIZES = [2, 3, 17, 64, 64, 129, 300, 511]  # of packed sequences


def kernels() -> bool:
    """Prints the largest errors of each set of kernels. Returns whether all are within their limits."""
    # scores and values are sums over a head and a sequence; in bfloat16 they are rounded, and so is the result
    cases = [("sdpa, products", torch.float32, 2 * (128 + max(SIZES)), None)]
    if CUDA:
        cases += [("varlen_attn, torch's flash", torch.bfloat16, 3, None)]
    if CUDA and model.flash_attn_varlen_func:
        cases += [("flash_attn, torch's flash", torch.bfloat16, 3, model.flash_attn_varlen_func)]
    print(f"{machine()}\n\n{'packed, decode':28}{'dtype':9}  forward       dq       dk       dv   decode")
    met = True
    for name, dtype, terms, function in cases:
        with patch.object(model, "flash_attn_varlen_func", function):
            rows = [errors(*heads, dim, dtype) for heads in ((8, 8), (8, 2), (12, 2)) for dim in (64, 128)]
        worst = torch.tensor(rows).amax(0)  # nan stays nan
        met &= bool((worst <= tolerance(terms, 1, dtype)).all())
        print(f"{name:28}{str(dtype)[6:]:9}" + "".join(f"{x:9.1e}" for x in worst))
    return met


def errors(heads: int, kv_heads: int, dim: int, dtype) -> list[float]:
    """Of packed attention, of its gradients by queries, keys and values, and of decoding each sequence's last token."""
    torch.manual_seed(0)
    scale, total = dim**-0.5, sum(SIZES)
    random = lambda n: torch.randn(1, total, n, dim, dtype=dtype, device=DEVICE).transpose(1, 2)
    qkv = [random(n).requires_grad_() for n in (heads, kv_heads, kv_heads)]  # (1, H, N, D)
    exact = [x.detach().float().requires_grad_() for x in qkv]
    alike = [x.repeat_interleave(heads // x.shape[1], 1).split(SIZES, 2) for x in exact]
    sdpa = partial(F.scaled_dot_product_attention, is_causal=True, scale=scale)
    expected = torch.cat([sdpa(*one) for one in zip(*alike)], 2).transpose(1, 2)
    out = model.packed_attention(0, *qkv, scale, Packed([[0] * n for n in SIZES], DEVICE))
    gradient = torch.randn_like(out)
    gradients = (torch.autograd.grad(y, x, gradient.to(y)) for y, x in ((out, qkv), (expected, exact)))
    pairs = [(out, expected), *zip(*gradients)]

    config = Qwen2Config(hidden_size=heads * dim, num_hidden_layers=1, num_attention_heads=heads)
    config.num_key_value_heads, ends, B = kv_heads, torch.tensor(SIZES, device=DEVICE), len(SIZES)
    cache, last = KVCache(config, B + 2, 600, dtype, DEVICE), ends.cumsum(0) - 1
    cache.k.normal_(), cache.v.normal_()  # what is not overwritten must not be read
    with torch.no_grad():  # all but the last tokens go into the cache by a prefill, the last ones by decoding
        others = torch.ones(total, dtype=torch.bool, device=DEVICE).index_fill(0, last, False)
        prefill = Packed([[0] * (n - 1) for n in SIZES], DEVICE, cache=cache, slots=torch.arange(B))
        model.packed_attention(0, *(x[:, :, others] for x in qkv), scale, prefill)
        new = (x[0, :, last].transpose(0, 1)[:, :, None] for x in qkv)  # (B, H, 1, D)
        out = model.decode_attention(0, *new, scale, Decode(cache, ends - 1, cache.window(max(SIZES))))
    pairs.append((out, expected[0, last, None]))
    return [((x.float() - y).abs().max() / y.abs().max()).item() for x, y in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of scoring and updates, beside padded batches.")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--length", type=int, default=768, help="tokens of the longest answers")
    parser.add_argument("--answers", type=int, default=0, help="how many; 0: by model")
    parser.add_argument("--token-budget", type=int, default=16384 if CUDA else 4096, help="tokens of a micro-batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--equal", action="store_true", help="all answers of one length")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    parser.add_argument("--sweep", action="store_true", help="cost against work, with the tiny model")
    parser.add_argument("--kernels", action="store_true", help="errors of the attention kernels")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to see that all of it runs")
    args = parser.parse_args()
    if args.smoke:
        args.model, args.length, args.token_budget, args.rounds = "smoke", 16, 64, 1
    if args.model == "qwen2.5-1.5b" and not CUDA:
        raise UserError("qwen2.5-1.5b is measured on CUDA only; tiny and middling run on a CPU")
    met = True
    if args.kernels or args.smoke:
        met = kernels()
    if args.sweep or args.smoke:
        sweep(args.smoke)
    if not args.kernels and not args.sweep:
        for dtype in dict.fromkeys((torch.float32, DTYPE)):
            verify(dtype)
        count = args.answers or ANSWERS[args.model]
        met &= compare(args.model, args.length, count, args.equal, args.token_budget, args.rounds)
    sys.exit(0 if met or not (args.check or args.kernels or args.smoke) else 1)


if __name__ == "__main__":
    run_script(main)
