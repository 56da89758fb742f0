"""The handwritten KV-cached sampler: continuous batching over the slots of a preallocated cache.

    while there is work:
        fill free slots   prefill the prompts of new samples, packed in one forward; a prompt shared by several samples
                          is computed once and its keys and values are copied
        decode            one token for every live slot
        retire            finished samples leave, the last live slots move into the gaps: live slots stay 0 .. B-1

A sample ends at an EOS token or at its length limit; then, and only then, `truncated` is true. The draw of token t of
sample j of a prompt depends on (that prompt's seed, j, t) alone, never on slots, order or rank: only rounding of the
logits can change an answer.

Left out: CUDA graphs, beam search, repetition penalties, paged caches.

Run `python eval.py --model DIR --data FILE.jsonl` to sample from a model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from data import UserError
from model import Decode, KVCache, Packed


@dataclass
class Sample:
    prompt: int  # index of its prompt
    ids: list[int]  # response tokens, with the EOS token if there is one
    truncated: bool  # stopped by the length limit, without EOS


@dataclass
class Batch:
    """B prompts, each with one response: what training and scoring read. Models see packed rows, `map` pads the result."""

    prompts: list[list[int]]
    responses: list[list[int]]
    truncated: Tensor  # (B,)

    def __post_init__(self):
        lengths = torch.tensor([len(r) for r in self.responses])
        self.mask = torch.arange(max(lengths.tolist(), default=0)) < lengths[:, None]  # (B, T)

    def pack(self, rows: list[int], device) -> tuple[Packed, Tensor, Tensor]:
        """Rows laid end to end: the packed sequences, the indices (N,) of the tokens that predict a response token,
        and the response tokens (N,)."""
        sequences = [self.prompts[i] + self.responses[i] for i in rows]
        packed = Packed(sequences, device, [len(self.prompts[i]) for i in rows])
        spans = [
            torch.arange(start + len(self.prompts[i]) - 1, start + length - 1)
            for i, start, length in zip(rows, packed.starts, packed.lengths)
        ]
        keep = torch.cat(spans).to(device)
        return packed, keep, packed.ids[0, keep + 1]

    def plan(self, rows: list[int], token_budget: int) -> list[list[int]]:
        """Micro-batches of at most token_budget tokens (at least one sequence each). Sorted by length, so that equally
        long sequences meet in one attention call."""
        size = lambda i: len(self.prompts[i]) + len(self.responses[i])
        micro, tokens = [], token_budget
        for i in sorted(rows, key=size):
            if tokens + size(i) > token_budget:
                micro.append([])
                tokens = 0
            micro[-1].append(i)
            tokens += size(i)
        return micro

    @torch.no_grad()
    def map(self, fn, plan: list[list[int]], device) -> Tensor:
        """fn(rows, packed, keep, targets) -> (N,) over the micro-batches of a plan, laid out as (B, T) on the CPU."""
        out = torch.zeros(self.mask.shape)
        for rows in plan:
            padded = torch.zeros(len(rows), out.shape[1])
            padded[self.mask[rows]] = fn(rows, *self.pack(rows, device)).float().cpu()
            out[rows] = padded
        return out


def uniforms(seeds: Tensor, steps: int) -> Tensor:
    """Counter-based random numbers in [0, 1): seeds (M,) int64 -> (M, steps) float64, element (m, t) a function of
    (seeds[m], t) alone. SplitMix64's finaliser; torch has no unsigned 64-bit shift, hence the masks."""
    x = seeds[:, None] + torch.arange(1, steps + 1, device=seeds.device) * -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ ((x >> 30) & (1 << 34) - 1)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & (1 << 37) - 1)) * -7723592293110705685  # 0x94D049BB133111EB
    x = x ^ ((x >> 31) & (1 << 33) - 1)
    return ((x >> 11) & (1 << 53) - 1).double() / (1 << 53)


def draw(logits: Tensor, u: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """Next tokens (B,) from logits (B, V) by inverting the distribution function at u (B,); greedy at temperature 0."""
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits.float() / temperature, -1)
    if top_p < 1:  # keep the smallest set of most likely tokens that holds top_p of the mass
        ordered, order = p.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        p = torch.zeros_like(p).scatter(-1, order, ordered)
    cdf = p.double().cumsum(-1)  # float32 sums of 150,000 terms would starve the rare tokens
    # right=True: a token of probability 0 spans an empty interval and is never drawn, not even at u = 0
    token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(1)
    return token.clamp(max=logits.shape[1] - 1)


@torch.inference_mode()
def rollout(
    model,
    prompts: list[list[int]],
    n: int = 1,
    *,
    max_new_tokens: int | list[int],
    eos_ids: list[int],
    seeds: list[int] | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    slots: int = 256,
    progress: str = "",
) -> list[list[Sample]]:
    """n samples for each prompt, in order: result[i][j] is sample j of prompts[i].

    max_new_tokens: one limit, or one for each prompt. seeds: one for each prompt (default: its index).
    temperature 0 is greedy. slots: how many samples decode at once. progress: text of a progress bar, "" for none.
    Raises UserError if a prompt and its limit do not fit the model's positions, ValueError for an empty prompt or limit."""
    if not prompts:
        return []
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    if min(limits) < 1 or not all(prompts):
        raise ValueError("every prompt needs a token, and every answer room for one")
    longest = max(len(p) + limit for p, limit in zip(prompts, limits))
    if longest > model.config.max_position_embeddings:
        raise UserError(
            f"a prompt and its response may take {longest} tokens, but the model has only "
            f"{model.config.max_position_embeddings} positions; lower --max-new-tokens"
        )
    device, was_training = model.device, model.training
    model.eval()
    slots = min(slots, len(prompts) * n)
    cache = KVCache(model.config, slots, longest, model.dtype, device)
    eos = torch.tensor(eos_ids, device=device)
    seeds = torch.tensor(range(len(prompts)) if seeds is None else seeds, device=device)
    seeds = uniforms(seeds, n).view(torch.int64)  # (prompts, n): one well-mixed seed for each sample
    limit = torch.tensor(limits, device=device)

    # the long ones first, so that no straggler is left decoding alone
    order = sorted(range(len(prompts)), key=lambda i: -limits[i])
    todo = [(i, j) for i in reversed(order) for j in reversed(range(n))]
    out = [[None] * n for _ in prompts]
    # state of the slots; the live ones are 0 .. B-1
    owner = torch.zeros(slots, dtype=torch.long, device=device)  # i * n + j
    length = torch.zeros(slots, dtype=torch.long, device=device)  # tokens in the cache
    count = torch.zeros(slots, dtype=torch.long, device=device)  # tokens drawn
    token = torch.zeros(slots, dtype=torch.long, device=device)  # the last one drawn, not yet in the cache
    drawn = torch.zeros(slots, max(limits), dtype=torch.long, device=device)
    noise = torch.zeros(slots, max(limits), dtype=torch.float64, device=device)
    B, longest_live = 0, 0
    bar = tqdm(total=len(todo), desc=progress, unit="answer", disable=not progress, leave=False)

    while B or todo:
        # fill: wait for some free slots, since a prefill of one prompt costs as much as one of eight
        free = slots - B
        if todo and (free >= min(len(todo), max(1, slots // 8)) or B == 0):
            new = [todo.pop() for _ in range(min(free, len(todo)))]
            first = {}  # prompt -> the slot that its prefill writes
            for k, (i, _) in enumerate(new):
                first.setdefault(i, B + k)
            target = torch.arange(B, B + len(new), device=device)
            source = torch.tensor([first[i] for i, _ in new], device=device)
            packed = Packed([prompts[i] for i in first], device, cache=cache, slots=torch.tensor(list(first.values())))
            logits = forward(model, packed.ids, packed, packed.last)[0]
            cache.copy(source, target, packed.max_length)
            which = torch.tensor([list(first).index(i) for i, _ in new], device=device)
            i, j = torch.tensor(new, device=device).unbind(1)
            owner[target] = i * n + j
            length[target] = torch.tensor([len(prompts[i]) for i, _ in new], device=device)
            count[target] = 0
            noise[target] = uniforms(seeds[i, j], noise.shape[1])
            B += len(new)
            longest_live = max(longest_live, packed.max_length)
            fresh = target
            next_logits = logits[which]
        else:
            window = min(longest, -(-(longest_live + 1) // 32) * 32)
            seqs = Decode(cache, length[:B], window)
            next_logits = forward(model, token[:B, None], seqs, 0)[:, 0]
            length[:B] += 1
            longest_live += 1
            fresh = torch.arange(B, device=device)
        t = count[fresh]
        chosen = draw(next_logits, noise[fresh, t], temperature, top_p)
        token[fresh] = chosen
        drawn[fresh, t] = chosen
        count[fresh] = t + 1

        # retire
        ended = torch.isin(token[:B], eos)
        done = (ended | (count[:B] >= limit[owner[:B] // n])).nonzero().squeeze(1)
        if len(done):
            rows = zip(owner[done].tolist(), drawn[done].tolist(), count[done].tolist(), ended[done].tolist())
            for who, ids, size, finished in rows:
                out[who // n][who % n] = Sample(who // n, ids[:size], not finished)
            bar.update(len(done))
            live = B - len(done)
            gaps = done[done < live]
            if len(gaps):
                stays = torch.ones(B, dtype=torch.bool, device=device)
                stays[done] = False
                movers = stays[live:B].nonzero().squeeze(1) + live
                cache.copy(movers, gaps, longest_live)
                for state in (owner, length, count, token, drawn, noise):
                    state[gaps] = state[movers]
            B = live
            longest_live = int(length[:B].max()) if B else 0
    bar.close()
    model.train(was_training)
    return out


def forward(model, ids: Tensor, seqs: Packed | Decode, keep) -> Tensor:
    """Logits of the model at the positions `keep`."""
    return model(input_ids=ids, position_ids=seqs.position_ids, seqs=seqs, use_cache=False, logits_to_keep=keep).logits
