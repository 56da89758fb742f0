"""The handwritten KV-cached sampler: continuous batching over the slots of a preallocated cache.

    while there is work:
        fill     prefill the prompts of new samples, packed in one forward; a prompt of several samples, or one that
                 another begins with, is computed once and its keys and values are copied
        step     one token for every live slot; on CUDA one captured graph per (slots, window), replayed
        retire   finished samples leave, the last live slots move into the gaps: live slots stay 0 .. B-1

A sample ends at an EOS token, or at its length limit without one: then `truncated` is true. The draw of token t of
sample j of a prompt depends on (that prompt's seed, j, t) alone, never on slots, order or rank: only rounding of the
logits can change an answer.

Tokens, lengths and noise live on the device, and a step reads nothing back. Whether a row is done is copied to the host
every few steps and read one such copy later, so that the GPU never waits; a done row meanwhile decodes into its own
slot and changes nothing.

Left out: beam search, repetition penalties, paged caches, what prompts share that are not one the beginning of another.

Needs model.py beside it, of which load_causal_lm loads what it samples from. Run `python eval.py --model DIR --data
FILE.jsonl` to sample from a model, `python tests/bench_rollout.py` to time it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from model import Decode, KVCache, Packed, UserError, all_reduce, check_attention


PREFILL = 32768  # prompt tokens in one forward, about: they need memory beside the cache


@dataclass
class Sample:
    prompt: int  # index of its prompt
    ids: list[int]  # response tokens, with the EOS token if there is one
    truncated: bool  # stopped by the length limit, without EOS


@dataclass
class MicroBatch:
    """Rows of a batch end to end, as models read them. Without rows: one token, of which nothing is kept."""

    rows: list[int]
    packed: Packed
    predict_at: Tensor  # (N,) indices of the tokens that predict a response token
    targets: Tensor  # (N,) the response tokens


@dataclass
class Batch:
    """B prompts, each with one response: what training and scoring read. Models see packed rows; what they say of the
    response tokens is laid out as (B, T) on the CPU."""

    prompts: list[list[int]]
    responses: list[list[int]]
    truncated: Tensor  # (B,)

    def __post_init__(self):
        lengths = torch.tensor([len(r) for r in self.responses])
        self.mask = torch.arange(max(lengths.tolist(), default=0)) < lengths[:, None]  # (B, T)

    def size(self, row: int) -> int:
        return len(self.prompts[row]) + len(self.responses[row])

    def pack(self, rows: list[int], device) -> MicroBatch:
        sequences = [self.prompts[i] + self.responses[i] for i in rows]
        packed = Packed(sequences or [[0]], device, [len(self.prompts[i]) for i in rows] or [1])
        spans = [torch.empty(0, dtype=torch.long)]
        for i, start in zip(rows, packed.starts):
            spans.append(torch.arange(len(self.prompts[i]) - 1, self.size(i) - 1) + start)
        predict_at = torch.cat(spans).to(device)
        return MicroBatch(rows, packed, predict_at, packed.ids[0, predict_at + 1] if rows else predict_at)

    def micro_batches(self, parts: list[list[int]], token_budget: int, device) -> list[list[MicroBatch]]:
        """Each part's rows as micro-batches of at most token_budget tokens (at least one sequence each), sorted by
        length, so that equally long sequences meet in one attention call. Where a rank has fewer than another, empty
        ones follow: all ranks must run as many passes through a sharded model, or they would wait for each other for
        ever."""
        plans = []
        for part in parts:
            plan, tokens = [], token_budget
            for i in sorted(part, key=self.size):
                if tokens + self.size(i) > token_budget:
                    plan.append([])
                    tokens = 0
                plan[-1].append(i)
                tokens += self.size(i)
            plans.append(plan)
        counts = all_reduce(torch.tensor([len(plan) for plan in plans]), "max").tolist()
        plans = [plan + [[]] * (count - len(plan)) for plan, count in zip(plans, counts)]
        return [[self.pack(rows, device) for rows in plan] for plan in plans]

    def lay_out(self, out: Tensor, rows: list[int], values: Tensor) -> None:
        """Write the values (N,) of the response tokens of these rows into out (B, T)."""
        padded = torch.zeros(len(rows), out.shape[1])
        padded[self.mask[rows]] = values.float().cpu()
        out[rows] = padded


def uniforms(seeds: Tensor, steps: int) -> Tensor:
    """Counter-based random numbers in [0, 1): seeds (M,) int64 -> (M, steps) float64, element (m, t) a function of
    (seeds[m], t) alone. SplitMix64's finaliser; torch has no unsigned 64-bit shift, hence the masks."""
    x = seeds[:, None] + torch.arange(1, steps + 1, device=seeds.device) * -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ ((x >> 30) & (1 << 34) - 1)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & (1 << 37) - 1)) * -7723592293110705685  # 0x94D049BB133111EB
    x = x ^ ((x >> 31) & (1 << 33) - 1)
    return ((x >> 11) & (1 << 53) - 1).double() / (1 << 53)


def invert(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The index (B,) at which the running sum of the weights p (B, V) passes u (B,) times their total, and how far into
    that weight it does, in [0, 1]. An index of weight 0 spans an empty interval and is never returned."""
    cdf = p.double().cumsum(-1)  # float32 sums of 150,000 terms would starve the rare tokens
    total = cdf[:, -1:]
    x = torch.minimum(u[:, None] * total, total.nextafter(torch.zeros_like(total)))
    index = torch.searchsorted(cdf, x, right=True)
    rest = 1 - (cdf.gather(1, index) - x) / p.gather(1, index)
    return index.squeeze(1), rest.clamp(0, 1).squeeze(1)


def invert_in_blocks(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The same, first the block, then the index in it: float64 sums over a large vocabulary cost more than all the
    rest."""
    V = p.shape[1]
    size = next((n for n in (512, 256, 128, 64) if V % n == 0), 512)
    p = F.pad(p, (0, -V % size)).unflatten(1, (-1, size))  # (B, V / size, size)
    block, rest = invert(p.sum(-1), u)
    inside = p.take_along_dim(block[:, None, None], 1).squeeze(1)  # (B, size)
    index, rest = invert(inside, rest)
    return block * size + index, rest


def sample_token(logits: Tensor, u: Tensor, temperature: float) -> Tensor:
    """Next tokens (B,) from logits (B, V) by inverting the distribution function at u (B,); greedy at temperature 0."""
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits if temperature == 1 else logits.float() / temperature, -1, dtype=torch.float32)
    return (invert if p.shape[1] <= 1024 else invert_in_blocks)(p, u)[0]


def longest_of_each(prompts: list[list[int]], which) -> dict[int, int]:
    """For each of these prompts one that begins with it, as long as there is: prefilling that one serves both. In the
    order of a dictionary, who begins another prompt begins the next one."""
    out, after = {}, None
    for i in sorted(which, key=lambda i: prompts[i], reverse=True):
        begins = after is not None and prompts[after][: len(prompts[i])] == prompts[i]
        out[i] = out[after] if begins else i
        after = i
    return out


def capture_graph(step, captured: list):
    """step() recorded as a CUDA graph. It shares the memory of those captured before: they run one at a time, and leave
    nothing there that is read later."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=captured[0].pool() if captured else None):
        step()
    return graph


def forward(model, ids: Tensor, seqs: Packed | Decode, keep) -> Tensor:
    """Logits of the model at the positions `keep`."""
    return model(input_ids=ids, position_ids=seqs.position_ids, seqs=seqs, use_cache=False, logits_to_keep=keep).logits


class Sampler:
    """A causal LM with the cache, the state of the slots and the graphs. The weights may change between calls, in
    place.

    The memory is taken at the first call and kept; a call that needs more takes more."""

    def __init__(self, model: nn.Module):
        check_attention(model)
        self.model, self.device, self.shape = model, model.device, (0, 0, 0)
        cuda = self.device.type == "cuda"
        # these rotary embeddings look at the positions on the host, which a graph cannot
        moving = any(kind in str(getattr(model.config, "rope_parameters", "")) for kind in ("dynamic", "longrope"))
        self.capture = capture_graph if cuda and not moving else None
        self.poll_every = 4 if cuda else 1  # steps between two looks at `done`
        self.lag = cuda  # act on the look before, whose copy has surely arrived

    def start(self, slots: int, tokens: int, new_tokens: int, eos_ids: list[int], temperature: float) -> None:
        """Room for `slots` samples of up to `tokens` tokens, of which `new_tokens` are drawn."""
        self.live = []  # (prompt, sample) of the slots 0 .. B-1, host side
        self.longest = 0  # at least the number of tokens in any live slot's cache
        self.steps, self.look = 0, None
        if any(need > have for need, have in zip((slots, tokens, new_tokens), self.shape)):
            self.cache = None  # free the old one first
            self.shape = slots, tokens, new_tokens = tuple(map(max, (slots, tokens, new_tokens), self.shape))
            zeros = lambda *shape, dtype=torch.long: torch.zeros(shape, dtype=dtype, device=self.device)
            self.cache = KVCache(self.model.config, slots, tokens, self.model.dtype, self.device)
            self.length, self.limit = zeros(slots), zeros(slots)  # tokens in the cache; tokens to draw at most
            self.token, self.count = zeros(slots), zeros(slots)  # the last one, not yet in the cache; how many
            self.done = zeros(slots, dtype=torch.bool)
            # one column more than is read: there a row goes on writing that is done, and not yet known to be
            self.drawn, self.noise = zeros(slots, new_tokens + 1), zeros(slots, new_tokens + 1, dtype=torch.float64)
            self.graphs, self.ends = {}, {}
        self.how = (temperature, *eos_ids)
        if self.how not in self.ends:  # kept, since graphs read it
            self.ends[self.how] = torch.tensor(eos_ids, device=self.device)
        self.eos = self.ends[self.how]
        self.done.fill_(True)

    def accept(self, rows: slice, logits: Tensor) -> None:
        """Draw a token for each of the rows, and note which are done with it."""
        t = self.count[rows, None]
        token = sample_token(logits, self.noise[rows].gather(1, t).squeeze(1), self.how[0])
        self.token[rows] = token
        self.drawn[rows].scatter_(1, t, token[:, None])
        self.count[rows] += ~self.done[rows]
        self.done[rows] |= (token[:, None] == self.eos).any(1) | (self.count[rows] >= self.limit[rows])

    def fill(self, new: list[tuple[int, int]], prompts: list, limits: list, seeds: Tensor) -> None:
        """Prefill the prompts of new samples into the slots behind the live ones, and draw their first tokens."""
        start, device = len(self.live), self.device
        slot_of = {}  # prompt -> the slot that its prefill writes
        for slot, (i, _) in enumerate(new, start):
            slot_of.setdefault(i, slot)
        within = longest_of_each(prompts, slot_of)
        whole = sorted(set(within.values()), key=lambda i: len(prompts[i]))  # equal ones together: `packed_sdpa`
        slots = torch.tensor([slot_of[i] for i in whole])
        packed = Packed([prompts[i] for i in whole], device, cache=self.cache, slots=slots)
        begin = dict(zip(whole, packed.starts))
        last = torch.tensor([begin[within[i]] + len(prompts[i]) - 1 for i in slot_of])
        logits = forward(self.model, packed.ids, packed, last.to(device))[0]  # (prompts, V)
        row_of = {i: row for row, i in enumerate(slot_of)}
        rows = torch.tensor([row_of[i] for i, _ in new])
        source = torch.tensor([slot_of[within[i]] for i, _ in new])
        target = torch.arange(start, start + len(new))
        shared = source != target
        if shared.any():
            self.cache.copy(source[shared].to(device), target[shared].to(device), packed.max_length)
        new_slots = slice(start, start + len(new))
        i, j = torch.tensor(new).unbind(1)
        self.length[new_slots] = torch.tensor([len(prompts[i]) for i, _ in new]).to(device)
        self.limit[new_slots] = torch.tensor([limits[i] for i, _ in new]).to(device)
        self.noise[new_slots] = uniforms(seeds[i, j].to(device), self.noise.shape[1])
        self.count[new_slots], self.done[new_slots] = 0, False
        self.live += new
        self.longest = max(self.longest, packed.max_length)
        self.accept(new_slots, logits[rows.to(device)])

    def decode(self, B: int, window: int) -> None:
        """All of a step that runs on the device; reads and writes the state in place, and nothing back to the host."""
        logits = forward(self.model, self.token[:B, None], Decode(self.cache, self.length[:B], window), 0)[:, 0]
        self.length[:B] += ~self.done[:B]
        self.accept(slice(0, B), logits)

    def step(self) -> None:
        """One token for every live slot."""
        B, window = len(self.live), self.cache.window(self.longest + 1)
        self.longest = min(self.longest + 1, self.shape[1] - 1)
        if self.capture is None:
            return self.decode(B, window)
        B = min(self.shape[0], 1 << (B - 1).bit_length())  # the slots between are done, and stay so
        key = (self.how, B, window)
        if key not in self.graphs:  # a first step runs as it is: a capture must not be the first to call a kernel
            self.graphs[key] = None
            return self.decode(B, window)
        if self.graphs[key] is None:
            captured = [graph for graph in self.graphs.values() if graph is not None]
            self.graphs[key] = self.capture(lambda: self.decode(B, window), captured)
        self.graphs[key].replay()

    def finished(self) -> list[int]:
        """Live slots that are known to be done."""
        self.steps += 1
        if self.steps % self.poll_every:
            return []
        done = self.done[: len(self.live)].to("cpu", non_blocking=True)
        if not self.lag:
            return done.nonzero().squeeze(1).tolist()
        event = torch.cuda.Event()
        event.record()
        before, self.look = self.look, (done, event)
        if before is None:
            return []
        before[1].synchronize()
        return before[0].nonzero().squeeze(1).tolist()

    def retire(self) -> list[tuple[tuple[int, int], list[int]]]:
        """Take finished samples out: ((prompt, sample), tokens) of each. The last live slots move into the gaps."""
        done, B = self.finished(), len(self.live)
        if len(done) <= B // 16:  # moving a few costs as much as decoding them on for nothing
            return []
        drawn, count = self.drawn[done].tolist(), self.count[done].tolist()
        out = [(self.live[row], ids[:size]) for row, ids, size in zip(done, drawn, count)]
        stay = B - len(done)
        gaps = [row for row in done if row < stay]
        gone = set(done)
        movers = [row for row in range(stay, B) if row not in gone]
        if gaps:
            target, source = torch.tensor([gaps, movers], device=self.device)
            self.cache.copy(source, target, self.longest)
            for state in (self.length, self.limit, self.token, self.count, self.done, self.drawn, self.noise):
                state[target] = state[source]
        for gap, mover in zip(gaps, movers):
            self.live[gap] = self.live[mover]
        del self.live[stay:]
        self.done[stay:] = True
        self.longest = int(self.length[:stay].max()) if stay else 0
        self.look = None  # its rows have moved
        return out


def as_sampler(model) -> Sampler:
    return model if isinstance(model, Sampler) else Sampler(model)


def rollout(
    model: nn.Module | Sampler, prompts: list[list[int]], n: int = 1, *, max_new_tokens: int | list[int],
    eos_ids: list[int], seeds: list[int] | None = None, temperature: float = 1.0, slots: int = 256,
    progress: str = "", decided: Callable[[int, list[Sample]], bool] | None = None,
) -> list[list[Sample]]:
    """n samples for each prompt, in order: result[i][j] is sample j of prompts[i].

    model: a causal LM, or a Sampler of one, which keeps its memory and its graphs for the next call. max_new_tokens:
    one limit, or one for each prompt. seeds: one for each prompt (default: its index). temperature 0 is greedy. slots:
    how many samples decode at once. progress: text of a progress bar, "" for none. decided: then a prompt's samples are
    drawn 1, 1, 2, 4, ... at a time, until decided(i, result[i]) or there are n. Raises UserError if a prompt and its
    limit do not fit the model's positions, ValueError for an empty prompt or limit."""
    if not prompts:
        return []
    sampler = as_sampler(model)
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    if min(limits) < 1 or not all(prompts):
        raise ValueError("every prompt needs a token, and every answer room for one")
    longest = max(len(p) + limit for p, limit in zip(prompts, limits))
    positions = sampler.model.config.max_position_embeddings
    if longest > positions:
        what = f"a prompt and its response may take {longest} tokens, but the model has only {positions} positions"
        raise UserError(f"{what}; lower --max-new-tokens")
    # the long ones first, so that no straggler is left decoding alone; those that begin alike together
    within, most = longest_of_each(prompts, range(len(prompts))), {}
    for i, limit in enumerate(limits):
        most[within[i]] = max(limit, most.get(within[i], 0))
    order = sorted(range(len(prompts)), key=lambda i: (-most[within[i]], within[i], -limits[i]))
    first = 1 if decided else n
    todo = [(i, j) for i in reversed(order) for j in reversed(range(first))]
    out = [[None] * first for _ in prompts]
    slots = min(slots, len(prompts) * n)
    seeds = uniforms(torch.tensor(range(len(prompts)) if seeds is None else seeds), n)
    seeds = seeds.view(torch.int64)  # (prompts, n): one well-mixed seed for each sample
    bar = tqdm(total=len(todo), desc=progress, unit="answer", disable=not progress, leave=False)
    was_training = sampler.model.training
    sampler.model.eval()
    with torch.inference_mode():
        sampler.start(slots, longest, max(limits), eos_ids, temperature)
        while todo or sampler.live:
            free = slots - len(sampler.live)
            # wait for some free slots, since a prefill of one prompt costs as much as one of eight
            if todo and (free >= min(len(todo), max(1, slots // 8)) or not sampler.live):
                new, tokens = [], 0
                while todo and len(new) < free and tokens < PREFILL:
                    i, j = todo.pop()
                    new.append((i, j))
                    if len(new) < 2 or new[-2][0] != i:  # a prompt's samples stand side by side
                        tokens += len(prompts[i])
                sampler.fill(new, prompts, limits, seeds)
            else:
                sampler.step()
            for (i, j), ids in sampler.retire():
                out[i][j] = Sample(i, ids, ids[-1] not in eos_ids)
                bar.update()
                if decided and None not in out[i] and not decided(i, out[i]):
                    more = range(len(out[i]), min(2 * len(out[i]), n))
                    todo += [(i, j) for j in reversed(more)]
                    out[i] += [None] * len(more)
                    bar.total += len(more)
    bar.close()
    sampler.model.train(was_training)
    return out
