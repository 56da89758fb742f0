"""What sharing and stopping save when steps are labelled: 8 completions of each prefix.

    python tests/bench_prm.py [--hidden 384] [--layers 6] [--solutions 8] [--prompt 150] [--rounds 3] [--smoke]

A solution has 8 steps of 25 tokens behind a prompt of 150, as a short one of MATH has in Qwen's chat template; a
completion of p(k) is as long as what is missing, give or take a half. The model has six query heads for each key, as
Qwen2's 1.5B has; it is random, so lengths are drawn, and a completion counts as right with probability `--right`, by a
checksum of its text. The ways by turns, in one process:

    from scratch      every completion prefills its own prefix
    shared            a solution is prefilled once, and keys and values are copied to the completions of its prefixes,
                      as far as they begin together (soft labels)
    shared, stopped   1, 1, 2, 4 at a time, and none after the first right one (hard labels)
"""

import argparse
import random
import statistics
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import prm
import torch
from model import ATTENTION
from prm import Prefix, RewardModelOptions
from rollout import Sample, Sampler, rollout
from transformers import AutoModelForCausalLM, Qwen2Config

VOCAB, STEPS, STEP = 2048, 8, 25
WORDS = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))  # a tokenizer whose text is its ids


def make_model(hidden: int, layers: int):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(hidden // 384, 1), max_position_embeddings=1024,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).to(device).eval()


def make_prefixes(solutions: int, prompt: int) -> tuple[list[Prefix], list[int]]:
    """The prefixes of each solution, and how long a completion of each is."""
    rng, prefixes, missing = random.Random(0), [], []
    for _ in range(solutions):
        ids = [rng.randrange(VOCAB) for _ in range(prompt + STEPS * STEP)]
        for k in range(1, STEPS):
            prefixes.append(Prefix(tuple(ids[: prompt + k * STEP]), "", "1"))
            missing.append(int((STEPS - k) * STEP * (0.5 + rng.random())))
    return prefixes, missing


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--solutions", type=int, default=8)
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=150)
    parser.add_argument("--right", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to see that it runs")
    a = parser.parse_args()
    if a.smoke:
        a.hidden, a.layers, a.solutions, a.prompt, a.rounds = 64, 1, 1, 10, 1
    sampler, (prefixes, missing) = Sampler(make_model(a.hidden, a.layers)), make_prefixes(a.solutions, a.prompt)
    ids, device = [list(prefix.ids) for prefix in prefixes], sampler.device
    opts = lambda labels: RewardModelOptions(completions=8, labels=labels, slots=a.slots)
    ended = lambda samples: [Sample(s.prompt, s.ids, False) for s in samples]

    def to_their_lengths(*args, max_new_tokens, decided, **more):
        """A rollout in which the drawn length stands for an end of its own."""
        decided = decided and (lambda i, samples, decide=decided: decide(i, ended(samples)))
        return [ended(x) for x in rollout(*args, max_new_tokens=missing, decided=decided, **more | {"progress": ""})]

    def scratch():
        with patch("rollout.longest_of_each", lambda prompts, which: {i: i for i in which}):
            again = [x for x in ids for _ in range(8)]
            limits = [limit for limit in missing for _ in range(8)]
            rollout(sampler, again, 1, max_new_tokens=limits, eos_ids=[VOCAB], slots=a.slots)

    ways = {
        "from scratch": scratch,
        "shared": lambda: prm.complete(sampler, WORDS, prefixes, opts("soft")),
        "shared, stopped": lambda: prm.complete(sampler, WORDS, prefixes, opts("hard")),
    }
    seconds = {name: [] for name in ways}
    prm.rollout, prm.eos_ids = to_their_lengths, lambda *_: [VOCAB]  # none
    prm.grade = lambda gold, text: zlib.crc32(text.encode()) / 2**32 < a.right
    for round in range(device.type == "cpu", a.rounds + 1):
        for name, way in ways.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            way()
            if round:  # the first one takes memory, and captures graphs
                seconds[name].append(time.perf_counter() - began)
    size = sum(p.numel() for p in sampler.model.parameters()) / 1e6
    lengths = f"{statistics.mean(map(len, ids)):.0f} tokens, completions of {statistics.mean(missing):.0f}"
    print(f"{size:.0f} million parameters on {device}, {len(prefixes)} prefixes of {lengths}; {a.rounds} rounds")
    print("| | seconds | prefixes/s | faster than from scratch by |\n|---|---|---|---|")
    for name, x in seconds.items():
        ratios = sorted(s / y for s, y in zip(seconds["from scratch"], x))
        median = statistics.median(x)
        faster = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {name} | {median:.2f} | {len(prefixes) / median:.1f} | {faster} |")


if __name__ == "__main__":
    main()
