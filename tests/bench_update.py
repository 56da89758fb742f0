"""Speed and memory of scoring and of the PPO update, beside padded batches; errors of the attention kernels. Run by hand:

    python tests/bench_update.py --model middling    # default: tiny; --equal: all answers of one length
    python tests/bench_update.py --check             # exit status 1 if a target is missed
    python tests/bench_update.py --sweep             # cost against work with the tiny model, in a quarter of an hour
    python tests/bench_update.py --kernels           # exit status 1 if a kernel is off

Weights and tokens are random and seeded: prompts of 16 tokens, answers of LENGTH / 8 to LENGTH, log-uniform, or --equal.
Float32 on a CPU, with OMP_NUM_THREADS threads; on CUDA bfloat16 by model.shard, with float32 masters. By turns:

    scoring   log-probabilities by a frozen model: Batch.map of a ppo.Policy
    update    ppo.update of policy and critic: one minibatch, so one step of AdamW each
    padded    the same written plainly for transformers' own model with sdpa: micro-batches in the given order, all logits in
              float32; on CUDA all weights, moments and sums of gradients in bfloat16, so less to keep and to move than ours.
              First, its losses and gradients are checked to equal ours with the tiny model: in float32, on CUDA in both

Tokens do not count padding. MFU, model FLOP utilisation: what the model needs over the wall time, as a share of the speed
of one large matrix product. What does not fit a GPU gets half the token budget until it does. --sweep starts a process for
each point; peak memory is what the update adds to models, moments and batch. In its second part the C library gives freed
blocks back at once: slow, but else fragments count, up to three times what is needed. --kernels compares with SDPA in
float32, sequence by sequence; errors are shares of the largest element.
Left out: several GPUs, activation checkpointing but in --sweep, other architectures, the quality of what is learned.
"""

import argparse
import copy
import gc
import math
import os
import random
import re
import sys
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import linear_regression, median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).parents[1]))
import model as attention
from bench_rollout import CUDA, DEVICE, DTYPE, MODELS, SHAPE, clock, machine
from data import UserError, run_script
from model import Decode, KVCache, Packed, ScalarModel, checkpoint_layers, fuse, replica, shard, sync, whole
from ppo import Policy, Experience, policy_loss, update, value_loss
from rollout import Batch

ANSWERS, PROMPT = {"tiny": 64, "middling": 8, "qwen2.5-1.5b": 128}, 16  # answers by model; tokens of a prompt
TARGET = ("qwen2.5-1.5b", 768, 0.45)  # model, length, least MFU of its update on CUDA
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of a kernel's relative error
VERIFIED = {torch.float32: 1e-4, torch.bfloat16: 0.2}  # of losses and gradients; in bfloat16 those of keys nearly cancel
adamw = partial(torch.optim.AdamW, lr=1e-6, fused=True)


def make_models(name, dtype=DTYPE):
    """Policy, critic and a frozen policy, as train.py has them."""
    torch.manual_seed(0)
    shape = dict(zip(SHAPE, MODELS[name][0]), num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True)
    config = Qwen2Config(**shape, pad_token_id=0, eos_token_id=None, bos_token_id=None)
    with torch.device(DEVICE):
        lm = fuse(AutoModelForCausalLM.from_config(config, attn_implementation=attention.ATTENTION)).eval()
    for p in lm.parameters():  # norms start as 1 and biases as 0: a forgotten one would go unnoticed
        p.data += 0.1 * torch.randn_like(p) if p.dim() == 1 else 0
    frozen, critic = cast(Policy(copy.deepcopy(lm)), dtype).requires_grad_(False), ScalarModel(copy.deepcopy(lm)).eval()
    torch.nn.init.normal_(critic.head.weight, std=0.02)  # it starts as 0, and the gradients of the whole LM with it
    return [shard(m.to, dtype, torch.device(DEVICE)) for m in (Policy(lm), critic, frozen)]


def cast(model, dtype):
    for p in model.parameters():  # not model.to(dtype): the frequencies of rotary embeddings are float32 in any model
        p.data = p.data.to(dtype)
    return model


def make_batch(vocab, lengths):
    """Answers of these lengths, and what the update reads beside them, so that clipping meets a part of the tokens."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    ids = lambda n: [rng.randrange(vocab) for _ in range(n)]
    batch = Batch([ids(PROMPT) for _ in lengths], [ids(n) for n in lengths], torch.zeros(len(lengths), dtype=torch.bool))
    noise = lambda scale: scale * torch.randn(batch.mask.shape, generator=generator)
    return batch, Experience(noise(0.3) - math.log(vocab), noise(1), noise(0.3), noise(1))  # random weights say -log(vocab)


def stock(model):
    """The model as transformers has it, on the very same parameters; of a sharded one, on copies in DTYPE."""
    if (lm := replica(model.lm, DTYPE, DEVICE)) is not model.lm:
        source, model = model, (ScalarModel if isinstance(model, ScalarModel) else Policy)(lm)
        sync(cast(model, DTYPE).requires_grad_(), source)
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # the memo: what it holds is not copied
    for module in twin.modules():
        vars(module).pop("forward", None)  # what `fuse` put there
    twin.lm.set_attn_implementation("sdpa")
    return twin


def padded(batch, rows):
    """The models' inputs (B, L), and where the next token is the answer's (B, L - 1)."""
    ids = [torch.tensor(batch.prompts[i] + batch.responses[i]) for i in rows]
    at, ends = torch.arange(max(map(len, ids))), torch.tensor([[len(x)] for x in ids])
    inputs = dict(input_ids=pad_sequence(ids, batch_first=True).to(DEVICE), attention_mask=(at < ends).to(DEVICE))
    return inputs | {"use_cache": False}, ((at >= PROMPT) & (at < ends))[:, 1:].to(DEVICE)


def padded_log_probs(policy, inputs, answer):
    full = policy.lm(**inputs).logits[:, :-1].float().log_softmax(-1)
    return full.gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)[answer], full.detach()


def padded_update(policy, critic, optimizers, batch, rollout, plans):
    count, metrics = batch.mask.sum().item(), torch.zeros(3, device=DEVICE)
    for rows in plans[0]:
        inputs, answer = padded(batch, rows)
        take = lambda x: x[rows][batch.mask[rows]].to(DEVICE)  # noqa: B023
        logp, full = padded_log_probs(policy, inputs, answer)
        loss = policy_loss(logp, take(rollout.logp), take(rollout.advantages), 0.2).sum() / count
        loss.backward()
        entropy = -(full.exp() * full).sum(-1)[answer].sum() / count
        del logp, full  # not while the critic runs
        values = critic.head(critic.lm.model(**inputs).last_hidden_state).squeeze(-1)[:, :-1][answer].float()
        v_loss = value_loss(values, take(rollout.values), take(rollout.returns), 0.2).sum() / count
        v_loss.backward()
        metrics += torch.stack([loss.detach(), entropy, v_loss.detach()])
    norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item() for model in (policy, critic)]
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return [*metrics.tolist(), *norms]


def verify(dtype):
    """Both ways must compute the same losses and gradients, whatever the micro-batches."""
    models, (batch, rollout) = make_models("tiny", dtype)[:2], make_batch(64, [5, 40, 23, 1, 31, 40])
    # away from the edges of clipping, at which the gradient jumps: rounding must not move a token over one
    away = lambda fn: batch.map(fn, [[*range(6)]], DEVICE) + 0.4 * torch.randint(-1, 2, batch.mask.shape)
    rollout.logp = away(lambda _, *packed: models[0](*packed, 1.0)[0])
    rollout.values = away(lambda _, packed, keep, __: models[1](packed)[keep])
    # with a learning rate of 0 nothing moves, and the momentum behind the first step is the gradient
    twins, sgd = list(map(stock, models)), partial(torch.optim.SGD, lr=0.0, momentum=0.9)
    ours, plain = ([sgd(m.parameters()) for m in both] for both in (models, twins))
    got = update(*models, ours, batch, rollout, [batch.plan(range(6), 100)])
    got = [got[name] for name in ("policy_loss", "entropy", "value_loss", "grad_norm_policy", "grad_norm_critic")]
    pairs = list(zip(got, padded_update(*twins, plain, batch, rollout, [[[0, 1, 2], [3, 4, 5]]])))
    for both in zip(ours, plain):
        pairs += zip(*([whole(o.state[p]["momentum_buffer"]) for p in o.param_groups[0]["params"]] for o in both))
    pairs = [[torch.as_tensor(x).float() for x in pair] for pair in pairs]
    off = max(((x - y).norm() / y.norm()).item() for x, y in pairs)
    if not off <= VERIFIED[dtype]:
        raise UserError(f"padded_update does not compute what ppo.update does: a loss or gradient is {off:.1e} off")
    print(f"losses and gradients are those of padded batches, to {off:.0e} in {str(dtype)[6:]}")


def timed(run, *args):
    begin = clock()
    run(*args)
    return clock() - begin


def compare(name, length, count, equal, budget, rounds):
    """Measures and prints the table. Returns whether the target is met."""
    rng, (policy, critic, frozen) = random.Random(0), make_models(name)
    answers = [length if equal else max(1, round(length / 8 * 8 ** rng.random())) for _ in range(count)]
    batch, data = make_batch(policy.lm.config.vocab_size, answers)
    logp = lambda _, *packed: frozen(*packed, 1.0)[0]
    plan = lambda budget: batch.plan(range(count), budget)
    fixed = lambda budget: [x.tolist() for x in torch.arange(count).split(max(1, budget // (PROMPT + max(answers))))]

    @torch.inference_mode()
    def scores(twin, budget):
        return [padded_log_probs(twin, *padded(batch, rows))[0].cpu() for rows in fixed(budget)]

    def train(step, planned, budget, *models):
        optimizers = [adamw(m.parameters()) for m in models]
        step(*models, optimizers, batch, data, [[[0]]])  # makes AdamW's moments, which take memory as well
        return timed(lambda: step(*models, optimizers, batch, data, [planned(budget)]))

    systems = {  # each returns its wall seconds; twins and moments take memory in their own turns alone
        "scoring": lambda budget: timed(lambda: batch.map(logp, plan(budget), DEVICE)),
        "scoring, padded": lambda budget: timed(scores, stock(frozen), budget),
        "update": lambda budget: train(update, plan, budget, policy, critic),
        "update, padded": lambda budget: train(padded_update, fixed, budget, stock(policy), stock(critic)),
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
    a = torch.randn([8192 if CUDA else 2048] * 2, dtype=DTYPE, device=DEVICE)
    for _ in range(rounds):
        rates.append(2 * len(a) ** 3 / min(timed(torch.mm, a, a) for _ in range(8)))
        for system, run in systems.items():
            batch.packs.clear()  # packing is part of the work, as padding is
            seconds[system].append(run(budgets[system]))

    # Forward, for each token: 2 FLOP for each weight of the layers' matrices, 4 * hidden * layers for each token that it
    # reads, itself and those before, and in an answer 2 * hidden * vocabulary. Backward is twice that; nothing else counts.
    # So for a model that learns: tokens * (6 * matrix weights + 12 * hidden * layers * length / 2).
    c, lengths = policy.lm.config, [PROMPT + n for n in answers]
    weights = sum(p.numel() for key, p in policy.named_parameters() if p.dim() == 2 and "layers" in key)
    reads, head = sum(n * (n + 1) / 2 for n in lengths), 2 * c.hidden_size * c.vocab_size * sum(answers)
    body = 2 * weights * sum(lengths) + 4 * c.hidden_size * c.num_hidden_layers * reads
    needed, mfu = {"scoring": body + head, "update": 3 * (2 * body + head)}, {}  # the critic's head is a vector
    print(f"{name}, {policy.lm.num_parameters():,} parameters; {count} answers, {sum(lengths):,} tokens\n{machine()}\n"
          f"one matrix product: {median(rates) / 1e12:.3g} TFLOP/s\n\n"
          f"{'tokens/s':18}{'median':>9}{'min':>9}{'max':>9}  times padded  budget   MFU")  # fmt: skip
    for system, times in seconds.items():
        work = system.partition(",")[0]
        mfu[system] = median(needed[work] / s / rate for s, rate in zip(times, rates))
        speeds = "".join(f"{sum(lengths) / f(times):9,.0f}" for f in (median, max, min))
        ratio = median(theirs / mine for theirs, mine in zip(seconds[f"{work}, padded"], times))
        print(f"{system:18}{speeds}{ratio:14.2f}{budgets[system]:8,}{100 * mfu[system]:5.1f}%")
    if not CUDA or (name, length) != TARGET[:2]:
        return True
    met = mfu["update"] >= TARGET[2]
    print(f"{'met' if met else 'MISSED'}: the MFU of the update is {mfu['update']:.3f}, the target is {TARGET[2]}")
    return met


def sweep():
    print(machine())
    table("Speed", [(n, 64, 4096) for n in (64, 256, 1024, 4096)] + [(256, n, 4096) for n in (32, 128, 512, 1024)])
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # of the processes to come
    for checkpointed in (False, True):
        title = f"Memory {'with' if checkpointed else 'without'} checkpoint_layers"
        points = table(title, [(256, 128, 1024 << i, checkpointed) for i in range(6)])
        slope, start = linear_regression(*zip(*points))
        off = max(abs(start + slope * tokens - peak) / peak for tokens, peak in points)
        print(f"\n{slope:.1f} KB for each packed token, and {start:,.0f} KB; off by {100 * off:.1f} % at most")


def table(title, work):
    """Prints a row for each point. Returns the packed tokens of its largest micro-batch, and its peak memory in KB."""
    print(f"\n{title}\n\n| answers | tokens each | packed tokens | tokens/s | peak MB |\n{'|---' * 5}|", flush=True)
    points = []
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # a process for each: freed memory hides what is needed
        for (answers, length, *_), (tokens, rate, peak) in zip(work, pool.imap(point, work)):
            print(f"| {answers:,} | {length:,} | {tokens:,} | {rate:,.0f} | {peak / 1024:,.1f} |", flush=True)
            points.append((tokens, peak))
    return points


def point(work):
    answers, length, budget, checkpointed = (*work, False)[:4]
    models, (batch, data) = make_models("tiny")[:2], make_batch(64, [length] * answers)
    for model in models if checkpointed else ():
        checkpoint_layers(model)
    optimizers, plan = [adamw(m.parameters()) for m in models], batch.plan(range(answers), budget)
    train = partial(update, *models, optimizers, batch, data)
    train([[[0]]])  # a small warm-up, which makes AdamW's moments
    # not getrusage: a child's ru_maxrss begins with its parent's, and nothing sets it back
    status = lambda field: int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    torch.cuda.reset_peak_memory_stats() if CUDA else Path("/proc/self/clear_refs").write_text("5")
    before = torch.cuda.memory_allocated() / 1024 if CUDA else status("VmRSS")
    seconds = timed(train, [plan])
    peak = torch.cuda.max_memory_allocated() / 1024 if CUDA else status("VmHWM")
    return max(map(len, plan)) * (PROMPT + length), answers * (PROMPT + length) / seconds, peak - before


def kernels():
    """Prints the largest errors of each set of kernels. Returns whether all are within their limits."""
    every, met = ("varlen_attn", "flash_attn_varlen_func", "flash_attn_with_kvcache"), True
    cases = [("sdpa, products", torch.float32, ())]
    if CUDA:  # without flash_attn, what decodes in bfloat16 is torch's _flash_attention_forward
        cases += [(name, torch.bfloat16, kept) for name, kept in
                  (("sdpa, torch's flash", ()), ("varlen_attn, torch's flash", every[:1]), ("flash_attn", every[1:]))]
    print(f"{machine()}\n\n{'packed, decode':28}{'dtype':9}  forward       dq       dk       dv   decode")
    for name, dtype, kept in cases:
        if not all(getattr(attention, function) for function in kept):
            print(f"{name:28}not installed")
            continue
        with patch.multiple(attention, **{function: None for function in every if function not in kept}):
            rows = [errors(*heads, dim, dtype) for heads in ((8, 8), (8, 2), (12, 2)) for dim in (64, 128)]
        worst = torch.tensor(rows).amax(0)  # nan stays nan
        met &= bool((worst <= LIMITS[dtype]).all())
        print(f"{name:28}{str(dtype)[6:]:9}" + "".join(f"{x:9.1e}" for x in worst))
    return met


def errors(heads, kv_heads, dim, dtype):
    """Of packed attention, of its gradients by queries, keys and values, and of decoding each sequence's last token."""
    torch.manual_seed(0)
    sizes, scale = [2, 3, 17, 64, 64, 129, 300, 511], dim**-0.5
    random = lambda n: torch.randn(1, sum(sizes), n, dim, dtype=dtype, device=DEVICE).transpose(1, 2)
    qkv = [random(n).requires_grad_() for n in (heads, kv_heads, kv_heads)]  # (1, H, N, D)
    exact = [x.detach().float().requires_grad_() for x in qkv]
    sdpa = partial(F.scaled_dot_product_attention, is_causal=True, scale=scale)
    alike = [x.repeat_interleave(heads // x.shape[1], 1).split(sizes, 2) for x in exact]
    expected = torch.cat([sdpa(*one) for one in zip(*alike)], 2).transpose(1, 2)
    out = attention.packed_attention(0, *qkv, scale, Packed([[0] * n for n in sizes], DEVICE))
    gradient = torch.randn_like(out)
    pairs = [(out, expected), *zip(*(torch.autograd.grad(y, x, gradient.to(y)) for y, x in ((out, qkv), (expected, exact))))]

    config = Qwen2Config(hidden_size=heads * dim, num_hidden_layers=1, num_attention_heads=heads)
    config.num_key_value_heads, ends, B = kv_heads, torch.tensor(sizes, device=DEVICE), len(sizes)
    cache, last = KVCache(config, B + 2, 600, dtype, DEVICE), ends.cumsum(0) - 1
    cache.k.normal_(), cache.v.normal_()  # what is not overwritten must not be read
    with torch.no_grad():  # all but the last tokens go into the cache by a prefill, the last ones by decoding
        others = torch.ones(sum(sizes), dtype=torch.bool, device=DEVICE).index_fill(0, last, False)
        prefill = Packed([[0] * (n - 1) for n in sizes], DEVICE, cache=cache, slots=torch.arange(B))
        attention.packed_attention(0, *(x[:, :, others] for x in qkv), scale, prefill)
        new = (x[0, :, last].transpose(0, 1)[:, :, None] for x in qkv)  # (B, H, 1, D)
        out = attention.decode_attention(0, *new, scale, Decode(cache, ends - 1, cache.window(max(sizes))))
    pairs.append((out, expected[0, last, None]))
    return [((x.float() - y).abs().max() / y.abs().max()).item() for x, y in pairs]


def main():
    parser = argparse.ArgumentParser(description="Speed and memory of scoring and of the PPO update, beside padded batches.")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--length", type=int, default=768, help="tokens of the longest answers")
    parser.add_argument("--answers", type=int, default=0, help="how many; 0: by model")
    parser.add_argument("--token-budget", type=int, default=16384 if CUDA else 4096, help="tokens of a micro-batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--equal", action="store_true", help="all answers of one length")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    parser.add_argument("--sweep", action="store_true", help="cost against work, with the tiny model")
    parser.add_argument("--kernels", action="store_true", help="errors of the attention kernels")
    o = parser.parse_args()
    if o.sweep:
        return sweep()
    if o.kernels:
        sys.exit(0 if kernels() else 1)
    if o.model == "qwen2.5-1.5b" and not CUDA:
        raise UserError("qwen2.5-1.5b is measured on CUDA only; tiny and middling run on a CPU")
    for dtype in dict.fromkeys((torch.float32, DTYPE)):
        verify(dtype)
    met = compare(o.model, o.length, o.answers or ANSWERS[o.model], o.equal, o.token_budget, o.rounds)
    sys.exit(0 if met or not o.check else 1)


if __name__ == "__main__":
    run_script(main)
