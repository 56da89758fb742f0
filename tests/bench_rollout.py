"""Speed of the sampler beside transformers' generate, transformers' continuous batching and a ceiling. Run by hand:

    python tests/bench_rollout.py --model middling    # default: tiny
    python tests/bench_rollout.py --check             # exit status 1 if a target is missed
    python tests/bench_rollout.py --sweep             # speed and peak memory over the number and the length of answers

All systems answer the same prompts with the same weights and to the same lengths, by turns in one process, so that a
drift of the machine's speed meets all. Weights, prompts and lengths are random and seeded: prompts of 8 to 32 tokens,
answers of 16 to 256, log-uniform, since most answers are short and a few are long (qwen2.5-1.5b: 256 and 512, all equal).
Nothing ends an answer but its wanted length. Speed is wanted tokens over wall seconds, whatever else was computed:

    generate      dynamic cache, at its best batch size (but for the tiny model, the best in the warm-up). A batch runs until
                  its longest answer is done; a real run does not know the lengths beforehand, so the batches are taken in
                  the given order, not sorted by length
    continuous    the manager behind model.generate_batch, with each request's own length; setting up and stopping do not
                  count. On a CPU with 16 requests at a time (more are slower there), and once only: it is slow
    ours          rollout.rollout. It begins with the long limits, but here they stand for lengths that a real run does not
                  know: so it is held to the given order, by a `sorted` in its module that hides the builtin. One row shows
                  what its own order gains
    ceiling       rollout.rollout on `FusedLM`: the same computation, without what readable modules cost

A ratio is the median of the ratios within a round. On CUDA, in bfloat16, decoding is also set beside its roofline.
Left out: other engines (vLLM, SGLang), several samples of a prompt, several GPUs, and EOS, whose test costs the same.
"""

import argparse
import copy
import logging
import math
import os
import random
import re
import sys
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest.mock import Mock, patch

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, Qwen2Config, __version__
from transformers.generation.continuous_batching.utils import WorkloadHints

sys.path.insert(0, str(Path(__file__).parents[1]))
import model as attention
import rollout as sampler
from data import UserError, run_script

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
MODELS = {  # shape, prompts, generate's batches, slots, targets: at least so many times this system at so many slots
    "tiny": ((128, 4, 4, 384, 64), 384, (16, 64, 256), (16, 64, 256),
             {(256, "generate"): 3, (64, "generate"): 2, (256, "ceiling"): 0.9}),
    "middling": ((512, 8, 8, 1536, 8192), 256, (16, 64, 256), (256,), {(256, "generate"): 1.9}),
    "qwen2.5-1.5b": ((1536, 28, 12, 8960, 151936), 256, (64, 256), (64, 256),
                     {(256, "generate"): 5, (256, "roofline"): 0.6}),
}  # fmt: skip


def make_models(name):
    """transformers' own model, and the one that the sampler is given: the same random weights, in the same memory."""
    torch.manual_seed(0)
    tied = dict(zip(SHAPE, MODELS[name][0]), num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True)
    ids = dict(pad_token_id=0, eos_token_id=None, bos_token_id=None)
    # a config each: the attention's name is written into it, and read from there at each call
    build = lambda kind: AutoModelForCausalLM.from_config(Qwen2Config(**tied, **ids), attn_implementation=kind, dtype=DTYPE)
    stock, ours = build("sdpa").to(DEVICE).eval(), attention.fuse(build(attention.ATTENTION)).to(DEVICE).eval()
    for p in stock.parameters():  # biases and norms too, or FusedLM could forget them unnoticed
        p.data = torch.randn_like(p) * (p.shape[1] ** -0.5 if p.dim() == 2 else 0.1) + (p.mean() if p.dim() == 1 else 0)
    ours.load_state_dict(stock.state_dict(), assign=True)
    return stock, ours


def make_prompts(name, count):
    """Prompts of random ids, none of them 0, and the wanted length of each answer."""
    rng, vocab, fixed = random.Random(0), MODELS[name][0][-1], name == "qwen2.5-1.5b"
    prompts = [[rng.randrange(1, vocab) for _ in range(256 if fixed else rng.randint(8, 32))] for _ in range(count)]
    return prompts, [512 if fixed else round(math.exp(rng.uniform(math.log(16), math.log(256)))) for _ in prompts]


class FusedLM:
    """The ceiling: Qwen2 without modules, one matrix for q, k, v and one for gate, up. It attends with the same functions
    as the model, and looks like it to the sampler."""

    def __init__(self, lm):
        c, base = lm.config, lm.model
        self.config, self.device, self.dtype, self.training, self.lm_head = c, lm.device, lm.dtype, False, lm.lm_head
        self.eval = self.train = lambda *mode: self
        self.dim, self.kv_heads = c.hidden_size // c.num_attention_heads, c.num_key_value_heads
        self.embedding, self.norm = base.embed_tokens.weight, base.norm.weight
        cos, sin = base.rotary_emb(self.embedding, torch.arange(c.max_position_embeddings, device=lm.device)[None])
        first, second = sin.chunk(2, -1)  # rotate_half(x) is x rolled by half, its first half negated: here the sine is
        self.cos, self.sin = cos[0, :, None], torch.cat([-first, second], -1)[0, :, None]  # (positions, 1, D)
        cat = lambda field, *modules: torch.cat([getattr(m, field) for m in modules]).detach()
        self.layers = []
        for layer in base.layers:
            a, m = layer.self_attn, layer.mlp
            w_qkv, b_qkv = (cat(field, a.q_proj, a.k_proj, a.v_proj) for field in ("weight", "bias"))
            norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
            outer = cat("weight", m.gate_proj, m.up_proj), a.o_proj.weight, m.down_proj.weight
            self.layers.append((*norms, w_qkv, b_qkv, *outer))

    def base_model(self, input_ids, position_ids, seqs, use_cache=False):
        attend = attention.packed_attention if isinstance(seqs, attention.Packed) else attention.decode_attention
        rms = lambda x, weight: F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)
        x = F.embedding(input_ids, self.embedding)  # (B, T, H)
        cos, sin = self.cos[position_ids], self.sin[position_ids]  # (B, T, 1, D)
        for i, (norm1, norm2, w_qkv, b_qkv, w_gate_up, w_o, w_down) in enumerate(self.layers):
            heads = F.linear(rms(x, norm1), w_qkv, b_qkv).unflatten(-1, (-1, self.dim))  # (B, T, Hq + 2 Hkv, D)
            qk, v = heads[:, :, : -self.kv_heads], heads[:, :, -self.kv_heads :]
            qk = qk * cos + qk.roll(self.dim // 2, -1) * sin
            q, k, v = (y.transpose(1, 2) for y in (qk[:, :, : -self.kv_heads], qk[:, :, -self.kv_heads :], v))
            x = x + F.linear(attend(i, q, k, v, self.dim**-0.5, seqs).flatten(2), w_o)
            gate, up = F.linear(rms(x, norm2), w_gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, w_down)
        return SimpleNamespace(last_hidden_state=rms(x, self.norm))

    def __call__(self, logits_to_keep=0, **inputs):
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # 0 means all
        return SimpleNamespace(logits=F.linear(self.base_model(**inputs).last_hidden_state[:, keep], self.lm_head.weight))


@torch.inference_mode()
def verify(lm, prompts):
    """The ceiling must compute the same: logits of a packed row and tokens of greedy decoding, in float32 on any device."""
    lm = copy.deepcopy(lm).float()  # in bfloat16 the two differ by a tenth, and a forgotten bias would pass
    both, packed = (lm, FusedLM(lm)), attention.Packed(prompts, DEVICE)
    inputs = dict(input_ids=packed.ids, position_ids=packed.position_ids, seqs=packed, use_cache=False)
    expected, got = (m(**inputs, logits_to_keep=0).logits for m in both)
    greedy = [sampler.rollout(m, prompts, max_new_tokens=16, eos_ids=[-1], temperature=0) for m in both]
    if not (got - expected).abs().max() <= 1e-4 or greedy[0] != greedy[1]:
        raise UserError("FusedLM does not compute what the model does: logits or greedy tokens differ")


def clock():
    torch.cuda.synchronize() if CUDA else None
    return time.perf_counter()


def generate(stock, batch, prompts, limits):  # each system returns its wall seconds
    begin = clock()
    for start in range(0, len(prompts), batch):
        some, tokens = prompts[start : start + batch], max(limits[start : start + batch])
        width = max(map(len, some))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in some], device=DEVICE)
        # top_k=0: its default of 50 would be another distribution, and more work
        config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=tokens, pad_token_id=0)
        answers = stock.generate(ids, attention_mask=(ids > 0).long(), generation_config=config)
        assert answers.shape == (len(some), width + tokens)
    return clock() - begin


def continuous(stock, prompts, limits):
    # On a CPU every query meets the whole cache under a mask, so the cache should hold no more than is needed.
    small = {} if CUDA else dict(max_requests_per_batch=16, max_batch_tokens=64, num_blocks=40)
    flash = attention.flash_attn_varlen_func is not None  # False: do not look for kernels on the hub
    config = ContinuousBatchingConfig(allow_block_sharing=False, auto_switch_to_flash=flash, **small)
    generation = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=max(limits), eos_token_id=-1)
    sizes, results = WorkloadHints(max(map(len, prompts)), max(limits), len(prompts)), []
    with stock.continuous_batching_context_manager(generation, True, 5, config, workload_hints=sizes) as manager:
        begin = clock()
        for prompt, limit in zip(prompts, limits):
            manager.add_request(prompt, max_new_tokens=limit)
        while len(results) < len(prompts) and manager.is_running():
            result = manager.get_result(timeout=1)
            results += [result] if result and result.is_finished() else []
        seconds = clock() - begin
    if sum(len(r.generated_tokens) for r in results) != sum(limits):
        raise RuntimeError("; ".join({r.error for r in results if r.error}) or "its thread ended early")
    return seconds


def ours(lm, slots, given_order, prompts, limits):
    order = Mock(side_effect=lambda items, key: list(items) if given_order else sorted(items, key=key))
    with patch.object(sampler, "sorted", order, create=True):
        begin = clock()
        answers = sampler.rollout(lm, prompts, max_new_tokens=limits, eos_ids=[-1], slots=slots)
        seconds = clock() - begin
    assert order.call_count == 1, "rollout.rollout must call sorted once, and for its order"
    assert [len(row[0].ids) for row in answers] == limits  # whatever the order, result i answers prompt i
    return seconds


def compare(name, rounds):
    """Measures and prints the table. Returns whether all targets are met."""
    _, count, batches, sizes, targets = MODELS[name]
    (stock, lm), (prompts, limits) = make_models(name), make_prompts(name, count)
    verify(lm, prompts[:8])
    samplers = {
        "ours": sampler.Sampler(lm),
        "ceiling": sampler.Sampler(FusedLM(lm)),
    }  # kept from call to call, as in training
    print(f"{name}, {lm.num_parameters():,} parameters; {len(prompts)} prompts, {sum(limits):,} tokens\n{machine()}\n")
    batched = {f"generate {b}": partial(generate, stock, b) for b in batches}
    systems = batched | {"continuous": partial(continuous, stock)}
    systems |= {f"{who} {s}": partial(ours, m, s, True) for s in sizes for who, m in samplers.items()}
    systems["ours 256, long ones first"] = partial(ours, samplers["ours"], 256, False)
    seconds, out = {system: [] for system in systems}, {}  # out: why a system is left out
    for r in range(rounds + 1):  # the first warms up, with an eighth of each length
        for system, run in tqdm(systems.items(), f"round {r} of {rounds}", leave=False):
            if system in out or (system == "continuous" and r > 1 and not CUDA):
                continue
            try:
                seconds[system].append(run(prompts, limits if r else [max(1, n // 8) for n in limits]))
            except Exception as error:
                if system != "continuous":
                    raise
                out[system] = f"{type(error).__name__}: {error}".partition("\n")[0]
        if r == 0 and name != "tiny":  # a round takes long: only the best batch size goes on
            out |= dict.fromkeys(sorted(batched, key=seconds.get)[1:], "slower in the warm-up")
    seconds = {system: times[1:] for system, times in seconds.items()}

    best = min((system for system in batched if system not in out), key=lambda system: median(seconds[system]))
    ratio = lambda a, b: median(y / x for x, y in zip(seconds[a], seconds[b]))  # of the speeds of a and b
    print(f"{'tokens/s':28}{'median':>9}{'min':>9}{'max':>9}  times {best}")
    for system, times in seconds.items():
        rates = "".join(f"{sum(limits) / f(times):9,.0f}" for f in (median, max, min)) if times else f"  {out[system]}"
        print(f"{system:28}{rates}" + (f"{ratio(system, best):9.2f}" if times else ""))
    share = roofline(samplers["ours"], median(seconds["ours 256"]), prompts, limits) if CUDA else None
    met = True
    for (slots, peer), goal in targets.items():
        peers = {"generate": best, "ceiling": "ceiling 256"}
        value = share if peer == "roofline" else ratio(f"ours {slots}", peers[peer])
        met &= value >= goal
        print(f"{'met' if value >= goal else 'MISSED'}: ours {slots} / {peer} is {value:.2f}, the target is {goal}")
    return met


def roofline(kept, seconds, prompts, limits, slots=256):
    """Prints how fast decoding could be by its bytes and operations, and returns our share of that."""
    prefill = median(ours(kept, slots, True, prompts, [1] * len(prompts)) for _ in range(3))
    rate = (sum(limits) - len(limits)) / (seconds - prefill)
    context = sum(n * (len(p) + n / 2) for p, n in zip(prompts, limits)) / sum(limits)
    x, a = torch.ones(2**31, dtype=torch.uint8, device=DEVICE), torch.randn(8192, 8192, dtype=DTYPE, device=DEVICE)
    y, fastest = torch.empty_like(x), {}
    for work in (lambda: y.copy_(x), lambda: a @ a) * 10:
        begin = clock()
        work()
        fastest[work] = min(clock() - begin, fastest.get(work, math.inf))
    bandwidth, flops = (amount / t for amount, t in zip((2 * 2**31, 2 * 8192**3), fastest.values()))
    c, weights = kept.model.config, kept.model.num_parameters()  # the tied embedding is read once, as the head
    kv_bytes = 2 * 2 * c.num_hidden_layers * c.num_key_value_heads * c.hidden_size // c.num_attention_heads  # a token
    memory = (2 * weights + slots * context * kv_bytes) / bandwidth  # seconds of a step
    compute = slots * (2 * weights + 4 * c.num_hidden_layers * c.hidden_size * context) / flops
    overlapped, serial = slots / max(memory, compute), slots / (memory + compute)
    print(f"decoding {slots} slots at context {context:.0f}: {rate:,.0f} tokens/s; roofline {overlapped:,.0f} overlapped, "
          f"{serial:,.0f} serial ({bandwidth / 1e12:.2f} TB/s, {flops / 1e12:.0f} TFLOP/s)")  # fmt: skip
    return rate / overlapped


def sweep(threads):
    work = [(n, 64, threads) for n in (64, 256, 1024, 4096)] + [(256, n, threads) for n in (32, 128, 512, 1024)]
    print(f"{machine()}\n\n| answers | tokens each | tokens/s | peak memory MB |\n|---|---|---|---|", flush=True)
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # a process for each: freed memory hides what is needed
        for row in pool.imap(point, work):
            print(row, flush=True)


def point(work):
    answers, length, threads = work
    torch.set_num_threads(threads)
    (_, lm), (prompts, _) = make_models("tiny"), make_prompts("tiny", answers)
    ours(lm, 256, True, prompts[:8], [8] * 8)
    # not getrusage: a child's ru_maxrss begins with its parent's, and nothing sets it back
    status = lambda field: int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    torch.cuda.reset_peak_memory_stats() if CUDA else Path("/proc/self/clear_refs").write_text("5")
    before = torch.cuda.memory_allocated() if CUDA else status("VmRSS")
    rate = answers * length / ours(lm, 256, True, prompts, [length] * answers)
    peak = torch.cuda.max_memory_allocated() if CUDA else status("VmHWM")
    return f"| {answers:,} | {length:,} | {rate:,.0f} | {(peak - before) / 2**20:,.0f} |"


def machine():
    cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]
    name, threads = torch.cuda.get_device_name() if CUDA else cpu, f"{torch.get_num_threads()} threads of {os.cpu_count()}"
    return f"{name}, {threads}, torch {torch.__version__}, transformers {__version__}"


def main():
    parser = argparse.ArgumentParser(description="Speed of the sampler beside transformers' generate.")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    parser.add_argument("--sweep", action="store_true", help="cost against work, with the tiny model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.CRITICAL)  # transformers' remarks on what is done here on purpose
    if args.sweep:
        return sweep(args.threads)
    if args.model == "qwen2.5-1.5b" and not CUDA:
        raise UserError("qwen2.5-1.5b is measured on CUDA only; tiny and middling run on a CPU")
    sys.exit(0 if compare(args.model, args.rounds) or not args.check else 1)


if __name__ == "__main__":
    run_script(main)
