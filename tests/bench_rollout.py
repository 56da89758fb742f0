"""Speed of the sampler beside transformers' generate and transformers' continuous batching. Run by hand:

    python tests/bench_rollout.py --model middling    # default: tiny; on CUDA also qwen2.5-1.5b
    python tests/bench_rollout.py --check             # exit status 1 if a target is missed
    python tests/bench_rollout.py --sweep             # speed and peak memory over number and length of answers
    python tests/bench_rollout.py --smoke             # the smallest sizes, to see that it runs

All systems answer the same prompts with the same weights and to the same lengths, by turns in one process, so that a
drift of the machine's speed meets all. Weights, prompts and lengths are random and seeded: prompts of 8 to 32 tokens,
answers of 16 to 256, log-uniform, since most answers are short and a few are long (qwen2.5-1.5b: 256 and 512, all
equal). Nothing ends an answer but its wanted length, which a real run does not know. Speed is wanted tokens over wall
seconds, whatever else was computed:

    generate      dynamic cache, at its best batch size. A batch runs until its longest answer is done; batches are
                  taken in the given order, not sorted by length
    continuous    the manager behind model.generate_batch, with each request's own length; setting up and stopping do
                  not count. On a CPU with 16 requests at a time (more are slower there), and once only: it is slow
    ours          rollout.rollout, told of one limit for all; answers end at their lengths as others end at an EOS
    long first    the same, told of each length: it begins with the long ones

A ratio is the median of the ratios within a round. On CUDA, in bfloat16, decoding is also set beside its roofline.
Left out: other engines (vLLM, SGLang), several samples of a prompt, several GPUs, and EOS, whose test costs the same.
"""

import argparse
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

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import UserError, run_script  # before torch, see there
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, Qwen2Config, __version__
from transformers.generation.continuous_batching.utils import WorkloadHints

import model
from rollout import Sampler, rollout

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
MODELS = {
    "smoke": (32, 1, 4, 48, 64), "tiny": (128, 4, 4, 384, 64), "middling": (512, 8, 8, 1536, 8192),
    "qwen2.5-1.5b": (1536, 28, 12, 8960, 151936),
}
PROMPTS = {"smoke": 6, "tiny": 384, "middling": 256, "qwen2.5-1.5b": 256}
BATCHES = {"smoke": (2, 4), "tiny": (16, 64, 256), "middling": (16, 64, 256), "qwen2.5-1.5b": (64, 256)}  # of generate
SLOTS = {"smoke": (2, 4), "tiny": (16, 64, 256), "middling": (256,), "qwen2.5-1.5b": (64, 256)}
TARGETS = {  # (slots, peer): at least so many times the peer's speed
    "tiny": {(256, "generate"): 3, (64, "generate"): 2}, "middling": {(256, "generate"): 1.9},
    "qwen2.5-1.5b": {(256, "generate"): 5, (256, "roofline"): 0.6},
}


def config_of(name: str) -> Qwen2Config:
    more = dict(num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True)
    return Qwen2Config(**dict(zip(SHAPE, MODELS[name])), **more, pad_token_id=0, eos_token_id=None, bos_token_id=None)


def make_models(name: str):
    """transformers' own model and that of the sampler: the same random weights, in the same memory."""
    torch.manual_seed(0)
    stock, ours = (  # a config each: the attention's name is written into it, and read from there at each call
        AutoModelForCausalLM.from_config(config_of(name), attn_implementation=kind, dtype=DTYPE).to(DEVICE).eval()
        for kind in ("sdpa", model.ATTENTION)
    )
    ours.load_state_dict(stock.state_dict(), assign=True)
    return stock, ours


def make_prompts(name: str, count: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of random ids, none of them 0, and the wanted length of each answer."""
    rng, vocab = random.Random(0), MODELS[name][-1]
    shortest, longest = (2, 16) if name == "smoke" else (16, 256)
    prompts, lengths = [], []
    for _ in range(count):
        if name == "qwen2.5-1.5b":
            tokens, length = 256, 512
        else:
            tokens = rng.randint(shortest // 2, longest // 8)
            length = round(math.exp(rng.uniform(math.log(shortest), math.log(longest))))
        prompts.append([rng.randrange(1, vocab) for _ in range(tokens)])
        lengths.append(length)
    return prompts, lengths


def clock() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


# ------------------------------------------------------------------------------------------------ the systems
# Each returns its wall seconds.


def generate(stock, batch: int, prompts, lengths) -> float:
    begin = clock()
    for start in range(0, len(prompts), batch):
        some, tokens = prompts[start : start + batch], max(lengths[start : start + batch])
        width = max(map(len, some))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in some], device=DEVICE)
        # top_k=0: its default of 50 would be another distribution, and more work
        config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=tokens, pad_token_id=0)
        answers = stock.generate(ids, attention_mask=(ids > 0).long(), generation_config=config)
        assert answers.shape == (len(some), width + tokens)
    return clock() - begin


def continuous(stock, prompts, lengths) -> float:
    # on a CPU every query meets the whole cache under a mask, so the cache should hold no more than is needed
    small = {} if CUDA else dict(max_requests_per_batch=16, max_batch_tokens=64, num_blocks=40)
    flash = model.flash_attn_varlen_func is not None  # False: do not look for kernels on the hub
    config = ContinuousBatchingConfig(allow_block_sharing=False, auto_switch_to_flash=flash, **small)
    generation = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=max(lengths), eos_token_id=-1)
    sizes, results = WorkloadHints(max(map(len, prompts)), max(lengths), len(prompts)), []
    with stock.continuous_batching_context_manager(generation, True, 5, config, workload_hints=sizes) as manager:
        begin = clock()
        for prompt, length in zip(prompts, lengths):
            manager.add_request(prompt, max_new_tokens=length)
        while len(results) < len(prompts) and manager.is_running():
            result = manager.get_result(timeout=1)
            results += [result] if result and result.is_finished() else []
        seconds = clock() - begin
    if sum(len(r.generated_tokens) for r in results) != sum(lengths):
        raise RuntimeError("; ".join({r.error for r in results if r.error}) or "its thread ended early")
    return seconds


class Unaware(Sampler):
    """A sampler whose answers end at lengths of which `rollout` has not been told."""

    def fill(self, new, prompts, limits, seeds) -> None:
        super().fill(new, prompts, self.lengths, seeds)


def ours(sampler: Sampler, slots: int, prompts, lengths) -> float:
    limits = lengths
    if isinstance(sampler, Unaware):
        sampler.lengths, limits = lengths, max(lengths)
    begin = clock()
    answers = rollout(sampler, prompts, max_new_tokens=limits, eos_ids=[-1], slots=slots)
    seconds = clock() - begin
    assert [len(row[0].ids) for row in answers] == lengths
    return seconds


# ------------------------------------------------------------------------------------------------ tables


def compare(name: str, rounds: int) -> bool:
    """Measures and prints the table. Returns whether all targets are met."""
    (stock, lm), (prompts, lengths) = make_models(name), make_prompts(name, PROMPTS[name])
    most, sampler = max(SLOTS[name]), Unaware(lm)  # kept from call to call, as in training
    print(f"{name}, {lm.num_parameters():,} parameters; {len(prompts)} prompts, {sum(lengths):,} tokens\n{machine()}\n")
    batched = {f"generate {batch}": partial(generate, stock, batch) for batch in BATCHES[name]}
    systems = {**batched, "continuous": partial(continuous, stock)}
    systems |= {f"ours {slots}": partial(ours, sampler, slots) for slots in SLOTS[name]}
    systems[f"long first {most}"] = partial(ours, Sampler(lm), most)
    seconds, left_out = {system: [] for system in systems}, {}
    for number in range(rounds + 1):  # the first warms up, with an eighth of each length
        for system, run in tqdm(systems.items(), f"round {number} of {rounds}", leave=False):
            if system in left_out or (system == "continuous" and number > 1 and not CUDA):
                continue
            try:
                seconds[system].append(run(prompts, lengths if number else [max(1, n // 8) for n in lengths]))
            except Exception as error:
                if system != "continuous":
                    raise
                left_out[system] = f"{type(error).__name__}: {error}".partition("\n")[0]
        if number == 0 and name != "tiny":  # a round takes long: only the best batch size goes on
            left_out |= dict.fromkeys(sorted(batched, key=seconds.get)[1:], "slower in the warm-up")
    seconds = {system: times[1:] for system, times in seconds.items()}

    best = min((system for system in batched if system not in left_out), key=lambda system: median(seconds[system]))
    faster = lambda system: median(y / x for x, y in zip(seconds[system], seconds[best]))
    print(f"{'tokens/s':20}{'median':>9}{'min':>9}{'max':>9}  times {best}")
    for system, times in seconds.items():
        rates = "".join(f"{sum(lengths) / f(times):9,.0f}" for f in (median, max, min)) if times else ""
        print(f"{system:20}" + (f"{rates}{faster(system):9.2f}" if times else f"  {left_out[system]}"))
    share = 0.0
    if CUDA or name == "smoke":
        share = roofline(sampler, most, median(seconds[f"ours {most}"]), prompts, lengths, 31 if CUDA else 20)
    met = True
    for (slots, peer), goal in TARGETS.get(name, {}).items():
        value = share if peer == "roofline" else faster(f"ours {slots}")
        met &= value >= goal
        print(f"{'met' if value >= goal else 'MISSED'}: ours {slots} / {peer} is {value:.2f}, the target is {goal}")
    return met


def best_of(run, times: int = 10) -> float:
    """Its least seconds."""
    seconds = []
    for _ in range(times):
        begin = clock()
        run()
        seconds.append(clock() - begin)
    return min(seconds)


def roofline(sampler: Sampler, slots: int, seconds: float, prompts, lengths, size: int) -> float:
    """Prints how fast decoding could be by its bytes and operations, as measured on 2^size bytes and a matrix of as
    many elements as 2^(size - 5), and returns our share of that."""
    prefill = median(ours(sampler, slots, prompts, [1] * len(prompts)) for _ in range(3))
    rate = (sum(lengths) - len(lengths)) / (seconds - prefill)
    context = sum(n * (len(p) + n / 2) for p, n in zip(prompts, lengths)) / sum(lengths)
    x, side = torch.ones(2**size, dtype=torch.uint8, device=DEVICE), 2 ** (size // 2 - 2)
    y, a = torch.empty_like(x), torch.randn(side, side, dtype=DTYPE, device=DEVICE)
    bandwidth, flops = 2 * len(x) / best_of(lambda: y.copy_(x)), 2 * side**3 / best_of(lambda: a @ a)
    c, weights = sampler.model.config, sampler.model.num_parameters()  # the tied embedding is read once, as the head
    per_token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.hidden_size // c.num_attention_heads
    memory = a.itemsize * (weights + slots * context * per_token) / bandwidth  # seconds of a step
    compute = slots * (2 * weights + 4 * c.num_hidden_layers * c.hidden_size * context) / flops
    overlapped, serial = slots / max(memory, compute), slots / (memory + compute)
    print(
        f"decoding {slots} slots at context {context:.0f}: {rate:,.0f} tokens/s; roofline {overlapped:,.0f} "
        f"overlapped, {serial:,.0f} serial ({bandwidth / 1e12:.3g} TB/s, {flops / 1e12:.3g} TFLOP/s)"
    )
    return rate / overlapped


def memory(reset: bool = False) -> int:
    """Bytes in use now, or with reset=False the most since that call. Not getrusage: a child's ru_maxrss begins with
    its parent's, and nothing sets it back."""
    if CUDA:
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() if reset else torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    field = "VmRSS" if reset else "VmHWM"
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def in_processes(function, work: list, smoke: bool):
    """function of each piece of work, each in a process of its own: freed memory would hide what is needed."""
    if smoke:
        yield from map(function, work)
        return
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        yield from pool.imap(function, work)


def sweep(threads: int, smoke: bool) -> None:
    work = [(n, 64, threads) for n in (64, 256, 1024, 4096)] + [(256, n, threads) for n in (32, 128, 512, 1024)]
    print(f"{machine()}\n\n| answers | tokens each | tokens/s | peak memory MB |\n|---|---|---|---|", flush=True)
    for row in in_processes(point, [(4, 8, threads)] if smoke else work, smoke):
        print(row, flush=True)


def point(work: tuple[int, int, int]) -> str:
    answers, length, threads = work
    torch.set_num_threads(threads)
    (_, lm), (prompts, _) = make_models("tiny"), make_prompts("tiny", answers)
    ours(Sampler(lm), 256, prompts[:8], [8] * len(prompts[:8]))
    before = memory(reset=True)
    rate = answers * length / ours(Sampler(lm), 256, prompts, [length] * answers)
    return f"| {answers:,} | {length:,} | {rate:,.0f} | {(memory() - before) / 2**20:,.0f} |"


def machine() -> str:
    cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]
    name, threads = torch.cuda.get_device_name() if CUDA else cpu, torch.get_num_threads()
    return f"{name}, {threads} of {os.cpu_count()} threads, torch {torch.__version__}, transformers {__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the sampler beside transformers' generate.")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    parser.add_argument("--sweep", action="store_true", help="cost against work, with the tiny model")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to see that all of it runs")
    args = parser.parse_args()
    if args.smoke:
        args.model, args.rounds, args.threads = "smoke", 1, 1
    torch.set_num_threads(args.threads)
    logging.disable(logging.CRITICAL)  # transformers' remarks on what is done here on purpose
    if args.model == "qwen2.5-1.5b" and not CUDA:
        raise UserError("qwen2.5-1.5b is measured on CUDA only; tiny and middling run on a CPU")
    if args.sweep or args.smoke:
        sweep(args.threads, args.smoke)
    if not args.sweep:
        sys.exit(0 if compare(args.model, args.rounds) or not args.check else 1)


if __name__ == "__main__":
    run_script(main)
