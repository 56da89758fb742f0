"""What sharing, stopping and deduplicating save when steps are labelled: 8 completions of each prefix.

    python tests/bench_prm.py [--hidden 384] [--layers 6] [--solutions 8] [--prompt 150] [--rounds 3]

A solution has 8 steps of 25 tokens behind a prompt of 150, as a short one of MATH has in Qwen's chat template; a completion
of p(k) is as long as what is missing, give or take a half. The model has six query heads for each key, as Qwen2's 1.5B has;
it is random, so lengths are drawn, and a completion counts as right with probability `--right`, by a checksum of its text.
The ways by turns, in one process:

    from scratch      every completion prefills its own prefix
    shared            a solution is prefilled once, and keys and values are copied to the completions of its prefixes, as
                      far as they begin together (soft labels)
    shared, stopped   1, 1, 2, 4 at a time, and none after the first right one (hard labels)
"""

import argparse
import random
import statistics
import sys
import time
import zlib
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import prm
from data import Problem
from model import ATTENTION, fuse
from prm import LabelOptions
from rollout import Sample, Sampler, rollout

VOCAB, STEPS, STEP = 2048, 8, 25


class Words:
    """A tokenizer whose text is its ids."""

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--solutions", type=int, default=8)
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=150)
    parser.add_argument("--right", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=a.hidden, intermediate_size=3 * a.hidden, num_hidden_layers=a.layers,
        num_attention_heads=a.hidden // 64, num_key_value_heads=max(a.hidden // 384, 1), max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lm = fuse(AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)).to(device).eval()
    sampler, rng = Sampler(lm), random.Random(0)
    prefixes = []  # as prm.complete wants them: ids, limit, index of the problem, text
    for i in range(a.solutions):
        ids = [rng.randrange(VOCAB) for _ in range(a.prompt + STEPS * STEP)]
        for k in range(1, STEPS):
            missing = int((STEPS - k) * STEP * (0.5 + rng.random()))
            prefixes.append((ids[: a.prompt + k * STEP], missing, i, ""))
    problems = [Problem(f"question {i}", "1") for i in range(a.solutions)]
    prm.grade = lambda gold, text: zlib.crc32(text.encode()) / 2**32 < a.right
    prm.audited = lambda question: False
    ended = lambda samples: [Sample(s.prompt, s.ids, False) for s in samples]  # the limit stands for an end of their own
    prm.rollout = lambda *args, decided, **more: [
        ended(x)
        for x in rollout(*args, decided=decided and (lambda i, samples: decided(i, ended(samples))), **more)
    ]
    how = dict(temperature=1.0, slots=a.slots, eos_ids=[VOCAB])  # none: the limits end the answers
    labels = lambda kind: LabelOptions(completions=8, labels=kind)

    def scratch():
        again = [prefix for prefix in prefixes for _ in range(8)]
        with patch("rollout.longest_of_each", lambda prompts, which: {i: i for i in which}):
            rollout(sampler, [p[0] for p in again], 1, max_new_tokens=[p[1] for p in again], **how)

    ways = {
        "from scratch": scratch,
        "shared": lambda: prm.complete(sampler, Words(), prefixes, problems, labels("soft"), **how),
        "shared, stopped": lambda: prm.complete(sampler, Words(), prefixes, problems, labels("hard"), **how),
    }
    seconds = {name: [] for name in ways}
    for round in range(device.type == "cpu", a.rounds + 1):
        for name, way in ways.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            way()
            if round:  # the first one takes memory, and captures graphs
                seconds[name].append(time.perf_counter() - began)
    size = sum(p.numel() for p in lm.parameters()) / 1e6
    mean = statistics.mean(len(p[0]) for p in prefixes), statistics.mean(p[1] for p in prefixes)
    print(f"{size:.0f} million parameters on {device}, {len(prefixes)} prefixes of {mean[0]:.0f} tokens on average, "
          f"completions of {mean[1]:.0f}; medians of {a.rounds} rounds")  # fmt: skip
    print("| | seconds | prefixes/s | faster than from scratch by |\n|---|---|---|---|")
    for name, x in seconds.items():
        ratios = sorted(s / y for s, y in zip(seconds["from scratch"], x))
        median = statistics.median(x)
        faster = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {name} | {median:.2f} | {len(prefixes) / median:.1f} | {faster} |")


if __name__ == "__main__":
    main()
