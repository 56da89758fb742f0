"""The sampler draws what transformers' generate and the exact softmax say, whatever the slots, order and neighbours."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from test_model import padded, random_sequences, tiny
from torch.utils._python_dispatch import TorchDispatchMode

import rollout as sampler_module
from data import UserError
from helpers import run_alone, tolerance
from rollout import Batch, Sampler, invert, rollout, sample_token, uniforms

NEVER = [-1]  # EOS ids of answers that do not end
PROMPTS = random_sequences([4, 1, 7, 2, 9, 3, 6, 5, 3], seed=4)


def answers(samples) -> list[list[tuple]]:
    return [[(s.ids, s.truncated) for s in row] for row in samples]


# ------------------------------------------------------------------------------------------------ greedy


@pytest.mark.parametrize("kind", ["qwen2", "llama gqa"])
def test_greedy_tokens_are_those_of_transformers_generate(kind):
    (stock, ours), eos = tiny(kind), [3, 11, 20]
    go = lambda slots: rollout(ours, PROMPTS, max_new_tokens=14, eos_ids=eos, temperature=0, slots=slots)
    few, many = go(3), go(64)
    ended = 0
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        greedy = dict(do_sample=False, max_new_tokens=14, eos_token_id=eos, pad_token_id=0)
        expected = stock.generate(ids, attention_mask=torch.ones_like(ids), **greedy)[0, len(prompt) :].tolist()
        for got in (few, many):
            assert [(s.prompt, s.ids, s.truncated) for s in got[i]] == [(i, expected, expected[-1] not in eos)]
        ended += expected[-1] in eos
    assert 2 <= ended <= len(PROMPTS) - 2 and len({len(s.ids) for [s] in few}) >= 3  # slots were refilled and compacted


# ------------------------------------------------------------------------------------------------ distribution


def p_value(counts, probabilities) -> float:
    """Pearson's chi-square test of counts (V,) against probabilities (V,); cells that expect less than 5 are merged."""
    expected = probabilities.double() * counts.sum()
    small = expected < 5
    cells = lambda x: torch.cat([x[~small].double(), x[small].double().sum()[None]])[: len(x) if small.any() else -1]
    observed, expected = cells(counts), cells(expected)
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2, dtype=torch.float64), statistic / 2).item()


def test_p_value_of_a_table_in_a_textbook():
    fair = torch.full((6,), 1 / 6)
    found = p_value(torch.tensor([5, 8, 9, 8, 10, 20]), fair)  # chi2 = 13.4, dof 5
    assert found == pytest.approx(0.01991, rel=0, abs=0.5e-5)  # as printed


@torch.no_grad()
def test_sampled_tokens_follow_the_softmax_of_the_model():
    stock, ours = tiny("llama gqa")
    prompt, temperature = PROMPTS[0], 0.7
    more = dict(max_new_tokens=2, eos_ids=[0], temperature=temperature, slots=1000, seeds=[8])
    [samples] = rollout(ours, [prompt], 4000, **more)
    exact = lambda ids, t=temperature: (padded(stock, [ids])[0][-1] / t).softmax(-1)
    first = torch.bincount(torch.tensor([s.ids[0] for s in samples]), minlength=40)
    assert p_value(first, exact(prompt)) > 0.01
    assert p_value(first, exact(prompt, 1.0)) < 1e-6  # the test can tell
    tested = 0
    for token in first.argsort(descending=True)[:3].tolist():
        second = torch.bincount(torch.tensor([s.ids[1] for s in samples if s.ids[0] == token]), minlength=40)
        assert p_value(second, exact(prompt + [token])) > 0.01
        assert p_value(second, exact(prompt)) < 1e-6
        tested += second.sum().item()
    assert tested > 1000
    assert not any(s.ids[0] == 0 for s in samples if len(s.ids) == 2)


def test_a_token_is_drawn_by_inverting_the_distribution_function():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    u = torch.tensor([0.0, 0.05, 0.0999, 0.1001, 0.2999, 0.3001, 0.5999, 0.6001, 0.9999], dtype=torch.float64)
    assert sample_token(logits.expand(9, 4), u, 1.0).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert sample_token(logits.expand(9, 4), u, 0.5).tolist() == [0, 1, 1, 1, 2, 2, 3, 3, 3]  # p^2: 1, 4, 9, 16 of 30
    assert sample_token(logits.expand(9, 4), u, 0.0).tolist() == [3] * 9


@pytest.mark.parametrize("V", [1000, 3200, 5003])  # in one stage; in two, with and without a remainder
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_token_is_that_in_whose_share_of_the_float64_distribution_u_lies(V, temperature):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1000, V, generator=generator)
    u = torch.rand(1000, generator=generator, dtype=torch.float64)
    shares = (logits.double() / temperature).softmax(-1)
    tokens = sample_token(logits, u, temperature)
    ends = shares.cumsum(-1).gather(1, tokens[:, None])[:, 0]
    # a share is as exact as its exponent, and blocks of up to 512 are added up in float32
    rounding = tolerance(512) + tolerance(2, logits.abs().max() / temperature)
    assert (ends >= u - rounding).all() and (ends - shares.gather(1, tokens[:, None])[:, 0] <= u + rounding).all()
    assert len(tokens.unique()) > 300


@pytest.mark.parametrize("size", [5, 100_000])
def test_a_token_of_probability_0_is_never_drawn(size):
    logits = torch.randn(4, size, generator=torch.Generator().manual_seed(0))
    logits[:, [0, 1, size - 1]] = -torch.inf
    for first in (30.0, 0.0):  # nearly all of the mass at the start: what follows hardly adds to the sum; or not
        logits[:, 2] = first
        for u in (0.0, 2**-53, 0.5, 1 - 2**-53):
            tokens = sample_token(logits, torch.full((4,), u, dtype=torch.float64), 1.0)
            assert not set(tokens.tolist()) & {0, 1, size - 1}
    assert set(tokens.tolist()) == {size - 2}  # u near 1 is the last token that there is


def test_the_rare_tokens_of_a_large_vocabulary_are_not_starved():
    logits = torch.full((100_001,), 1e-8).log()
    logits[0] = torch.tensor(0.999).log()
    u = 0.9995 + torch.arange(60, dtype=torch.float64) * 1e-8  # steps of one token, a sixth of float32's resolution
    tokens = sample_token(logits.expand(60, -1), u, 1.0)
    assert len(tokens.unique()) > 56 and (tokens.diff() >= 0).all()
    assert abs(tokens[0] - 50_000) < tolerance(8) / 1e-8  # the first token's share is rounded to float32, and its log


def test_invert_never_returns_an_index_of_weight_0():
    p = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0, 0.0], [0, 0, 0, 0, 0, 1e-30]])
    for u, index in ((0.0, 1), (0.3, 1), (0.3000001, 3), (1 - 2**-53, 3), (1.0, 3)):
        i, rest = invert(p, torch.full((2,), u, dtype=torch.float64))
        assert i.tolist() == [index, 5] and (0 <= rest).all() and (rest <= 1).all()
    i, rest = invert(p, torch.tensor([0.65, 0.25], dtype=torch.float64))
    assert i.tolist() == [3, 5] and rest.tolist() == pytest.approx([0.5, 0.25], rel=0, abs=tolerance(4))


def test_uniforms_are_splitmix64():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]  # of seed 1234567
    u = uniforms(torch.tensor([1234567, -1]), 4)
    assert u[0].tolist() == [(x >> 11) / 2**53 for x in published] and u[1].tolist() != u[0].tolist()


def test_uniforms_are_uniform_and_depend_on_seed_and_index_alone():
    seeds = torch.tensor([0, 1, 2, -5, 2**63 - 1, -(2**63)] + list(range(100, 294)))
    u = uniforms(seeds, 500)
    assert u.shape == (200, 500) and u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    # 4 standard errors of 100,000 draws; that of the variance is sqrt(1/80 - 1/144) / sqrt(n)
    assert abs(u.mean() - 1 / 2) < 4 * (1 / 12 / 1e5) ** 0.5 and abs(u.var() - 1 / 12) < 4 * (1 / 180 / 1e5) ** 0.5
    assert p_value(torch.histc(u, 50, 0, 1), torch.full((50,), 0.02)) > 0.01
    for a, b in ((u[:, :-1], u[:, 1:]), (u[:-1], u[1:])):  # neither successive elements nor successive seeds correlate
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 4 / 1e5**0.5
    assert torch.equal(uniforms(seeds, 3), u[:, :3]) and torch.equal(uniforms(seeds[[7, 2]], 500), u[[7, 2]])


# ------------------------------------------------------------------------------------------------ independence


def test_samples_depend_neither_on_slots_nor_on_order_nor_on_the_other_prompts():
    _, ours = tiny("qwen2")
    limits, seeds, more = [9, 3, 12, 5, 9, 1, 12, 7, 8], [50 + i * i for i in range(9)], dict(eos_ids=[3, 11, 20, 21])
    expected = answers(rollout(ours, PROMPTS, 3, max_new_tokens=limits, seeds=seeds, **more))
    assert {t for row in expected for _, t in row} == {True, False}
    for slots in (1, 3, 64):
        assert answers(rollout(ours, PROMPTS, 3, max_new_tokens=limits, seeds=seeds, slots=slots, **more)) == expected
    for picked in ([8, 3, 0, 5, 1, 7, 2, 6, 4], [2], [6, 1]):
        of = lambda x, picked=picked: [x[i] for i in picked]
        got = rollout(ours, of(PROMPTS), 3, max_new_tokens=of(limits), seeds=of(seeds), slots=4, **more)
        assert answers(got) == of(expected)
        assert [[s.prompt for s in row] for row in got] == [[i] * 3 for i in range(len(picked))]
    fewer = answers(rollout(ours, PROMPTS, 2, max_new_tokens=limits, seeds=seeds, **more))
    assert fewer == [row[:2] for row in expected]  # sample j does not depend on how many there are


def test_a_sampler_that_is_kept_gives_the_same_answers_and_follows_the_weights():
    _, ours = tiny("llama gqa")
    sampler = Sampler(ours)
    small = dict(n=2, max_new_tokens=6, eos_ids=[3, 11], slots=3)
    large = dict(n=3, max_new_tokens=14, eos_ids=[3], slots=20, temperature=0.8)
    for _ in range(2):
        for more in (small, large, small, large | dict(temperature=0)):
            assert answers(rollout(sampler, PROMPTS, **more)) == answers(rollout(ours, PROMPTS, **more))
        before = answers(rollout(ours, PROMPTS, **large))
        with torch.no_grad():
            for p in ours.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        assert answers(rollout(ours, PROMPTS, **large)) != before


@pytest.mark.parametrize("slots", [1, 5, 64])
def test_the_loop_of_a_gpu_gives_the_same_answers(slots, monkeypatch):
    """As on CUDA, but for the graphs themselves: the number of slots rounded up, steps "captured" and replayed, and
    what is done read seldom and late."""
    monkeypatch.setattr(torch.cuda, "Event", Mock)
    _, ours = tiny("qwen2 gqa")
    limits, more = [9, 3, 12, 5, 30, 1, 12, 7, 8], dict(eos_ids=[3, 11, 20, 21])
    expected = answers(rollout(ours, PROMPTS, 3, max_new_tokens=limits, **more))
    sampler, replays = Sampler(ours), []
    sampler.capture = lambda step, _: SimpleNamespace(replay=lambda: (replays.append(1), step()))
    sampler.poll_every, sampler.lag = 3, True
    for _ in range(2):
        assert answers(rollout(sampler, PROMPTS, 3, max_new_tokens=limits, slots=slots, **more)) == expected
    assert {B for _, B, _ in sampler.graphs} <= {1, 2, 4, 8, 16, min(slots, 27)}
    assert len(replays) > 2 * len(sampler.graphs)


def test_a_step_reads_nothing_back_to_the_host():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    _, ours = tiny("llama gqa")
    sampler, seen = Sampler(ours), []
    decode = sampler.decode

    def watched(*args):
        with Watch():
            decode(*args)

    sampler.decode = watched
    rollout(sampler, PROMPTS, 2, max_new_tokens=12, eos_ids=[3, 11], slots=4)
    assert len(seen) > 500
    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
    assert not [op for op in seen if any(name in op for name in waiting)]


def test_samples_of_a_prompt_differ_and_a_seed_gives_the_same_again():
    _, ours = tiny("qwen2")
    go = lambda seeds: answers(rollout(ours, [PROMPTS[0]] * 3, 2, max_new_tokens=12, eos_ids=[3], seeds=seeds))
    [a, b], [c, d], [e, f] = go([5, 5, 6])
    assert (a, b) == (c, d) and len({str(x) for x in (a, b, e, f)}) == 4
    assert go(None) == go([0, 1, 2])


# ------------------------------------------------------------------------------------------------ limits


def test_prompts_that_begin_alike_are_prefilled_once_and_answered_as_if_they_were_not(monkeypatch):
    ours, base = tiny("llama gqa")[1], random_sequences([12], seed=9)[0]
    other = [base[0], base[1], (base[2] + 1) % 40]
    prompts = [base[:5], other, base, base[:1], base[:5], other[:2], base[:9]]
    how = dict(max_new_tokens=8, eos_ids=NEVER)
    alone = [rollout(ours, [p], 3, seeds=[i], **how)[0] for i, p in enumerate(prompts)]
    lengths, pack = [], sampler_module.Packed

    def packed(sequences, *args, **more):
        lengths.append([len(s) for s in sequences])
        return pack(sequences, *args, **more)

    monkeypatch.setattr(sampler_module, "Packed", packed)
    for slots in (64, 4):
        lengths.clear()
        together = rollout(ours, prompts, 3, seeds=[*range(7)], slots=slots, **how)
        assert [[s.ids for s in row] for row in together] == [[s.ids for s in row] for row in alone]
        assert slots < 64 or lengths == [[3, 12]]  # all in two rows


def test_a_prompt_gets_more_samples_until_it_is_decided_and_they_are_those_of_a_full_call():
    ours, asked = tiny("qwen2")[1], []
    how = dict(max_new_tokens=6, eos_ids=[3], seeds=[7 * i for i in range(len(PROMPTS))])
    full = answers(rollout(ours, PROMPTS, 7, **how))
    wanted = [3, 1, 9, 2, 5, 7, 1, 4, 6]  # decided once there are as many

    def decided(i, samples):
        asked.append((i, len(samples)))
        return len(samples) >= wanted[i]

    for slots in (2, 64):
        asked.clear()
        some = answers(rollout(ours, PROMPTS, 7, slots=slots, decided=decided, **how))
        assert [len(row) for row in some] == [4, 1, 7, 2, 7, 7, 1, 4, 7]  # 1, 2, 4, 7 at most
        assert some == [row[: len(got)] for row, got in zip(full, some)]
        assert [n for i, n in asked if i == 2] == [1, 2, 4, 7] and [n for i, n in asked if i == 1] == [1]


def test_truncated_says_that_the_limit_was_met_without_eos():
    _, ours = tiny("qwen2")
    eos, go = [3, 11], lambda limit: rollout(ours, PROMPTS, 4, max_new_tokens=limit, eos_ids=[3, 11])
    long = go(20)
    kinds = {True: 0, False: 0}
    for s in (s for row in long for s in row):
        assert s.truncated == (s.ids[-1] not in eos) and not set(s.ids[:-1]) & set(eos)
        assert len(s.ids) == 20 if s.truncated else len(s.ids) <= 20
        kinds[s.truncated] += 1
    assert min(kinds.values()) >= 5
    exactly = next(len(s.ids) for row in long for s in row if not s.truncated and len(s.ids) > 1)
    for limit in (exactly, exactly - 1):
        for short, whole in zip((s for row in go(limit) for s in row), (s for row in long for s in row), strict=True):
            assert short.ids == whole.ids[:limit]
            assert short.truncated == (whole.truncated or len(whole.ids) > limit)


def test_each_prompt_has_its_own_limit():
    _, ours = tiny("llama gqa")
    limits = [1, 12, 5, 1, 3, 12, 2, 8, 4]
    go = lambda limit, slots: rollout(ours, PROMPTS, 2, max_new_tokens=limit, eos_ids=NEVER, slots=slots)
    whole = go(12, 64)
    for slots in (2, 64):
        got = go(limits, slots)
        assert [[s.ids for s in row] for row in got] == [[s.ids[:n] for s in row] for row, n in zip(whole, limits)]
        assert all(s.truncated and len(s.ids) == n for row, n in zip(got, limits) for s in row)


def test_a_prompt_and_its_limit_must_fit_the_positions():
    _, ours = tiny("qwen2")
    prompt = random_sequences([50])[0]
    assert len(rollout(ours, [prompt, prompt[:9]], max_new_tokens=[14, 55], eos_ids=[0], slots=1)) == 2  # 64 each
    with pytest.raises(UserError, match="65 tokens.* 64 positions") as error:
        rollout(ours, [prompt, prompt[:9]], max_new_tokens=[15, 55], eos_ids=[0])
    assert "\n" not in str(error.value)


def test_a_rollout_leaves_the_model_as_it_was_and_no_prompts_give_no_samples():
    _, ours = tiny("qwen2")
    for training in (True, False):
        ours.train(training)
        rollout(ours, PROMPTS[:1], max_new_tokens=2, eos_ids=[3])
        assert ours.training == training
    assert rollout(ours, [], max_new_tokens=2, eos_ids=[3]) == []


def test_a_model_whose_attention_reads_no_packed_rows_is_refused():
    stock, _ = tiny("qwen2")
    with pytest.raises(UserError, match="not loaded by model.load_causal_lm"):
        rollout(stock, PROMPTS, max_new_tokens=2, eos_ids=[3])


def test_two_files_are_all_that_a_sampler_elsewhere_needs(tmp_path):
    (tmp_path / "files").mkdir()
    tiny("qwen2")[1].save_pretrained(tmp_path / "lm")
    code = f"""
from model import load_causal_lm
from rollout import rollout
[[sample]] = rollout(load_causal_lm({str(tmp_path / "lm")!r}), [{PROMPTS[0]}], max_new_tokens=5, eos_ids=[-1])
print(sample.ids)"""
    [[here]] = rollout(tiny("qwen2")[1], PROMPTS[:1], max_new_tokens=5, eos_ids=NEVER)
    assert run_alone(["model.py", "rollout.py"], code, tmp_path / "files").strip() == str(here.ids)


# ------------------------------------------------------------------------------------------------ batches


def a_batch():
    prompts, responses = [[1, 2, 3], [4], [5, 6], [7, 8], [9]], [[11], [12, 13, 14, 15], [16, 17], [18], [19, 20, 21]]
    return Batch(prompts, responses, torch.zeros(5, dtype=torch.bool))


def test_packing_lays_rows_end_to_end_and_says_what_predicts_a_response_token():
    micro = a_batch().pack([2, 0, 4], "cpu")
    assert micro.rows == [2, 0, 4] and micro.packed.ids.tolist() == [[5, 6, 16, 17, 1, 2, 3, 11, 9, 19, 20, 21]]
    assert micro.predict_at.tolist() == [1, 2, 6, 8, 9, 10] and micro.targets.tolist() == [16, 17, 11, 19, 20, 21]
    assert micro.packed.is_response.nonzero().squeeze(1).tolist() == [2, 3, 7, 9, 10, 11]


def test_packing_goes_to_the_device_that_is_asked_for():
    batch = a_batch()
    for device in ("cpu", "meta", "cpu"):
        [[micro]] = batch.micro_batches([[0, 1]], 100, device)
        tensors = micro.packed.ids, micro.packed.position_ids, micro.packed.cu, micro.predict_at, micro.targets
        assert {x.device.type for x in tensors} == {device}


@pytest.mark.parametrize("budget", [1, 5, 8, 1000])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [4, 1, 2], []])
def test_micro_batches_hold_each_row_once_within_the_budget_sorted_by_length(rows, budget):
    batch, sizes = a_batch(), [4, 5, 4, 3, 4]
    [plan] = batch.micro_batches([rows], budget, "cpu")
    dealt = [micro.rows for micro in plan]
    assert sorted(i for micro in dealt for i in micro) == sorted(rows)
    assert all(sum(sizes[i] for i in micro) <= budget or len(micro) == 1 for micro in dealt)
    assert [sizes[i] for micro in dealt for i in micro] == sorted(sizes[i] for i in rows)
    if budget == 8 and len(rows) == 5:
        assert [[sizes[i] for i in micro] for micro in dealt] == [[3, 4], [4, 4], [5]]
    out = torch.zeros(5, 4)
    for micro in plan:
        batch.lay_out(out, micro.rows, micro.targets)
    assert out.tolist() == [(r + [0] * 4)[:4] if i in rows else [0] * 4 for i, r in enumerate(batch.responses)]


def test_a_micro_batch_without_rows_is_one_token_of_which_nothing_is_kept():
    micro = a_batch().pack([], "cpu")
    assert micro.packed.ids.tolist() == [[0]] and len(micro.predict_at) == len(micro.targets) == 0


def test_the_mask_is_the_length_of_the_responses():
    mask = a_batch().mask
    assert mask.sum(1).tolist() == [1, 4, 2, 1, 3] and mask[2].tolist() == [True, True, False, False]


def test_a_prefill_stays_within_its_tokens_when_samples_are_drawn_one_after_another(monkeypatch):
    (_, model), filled, fill = tiny("qwen2"), [], Sampler.fill

    def counted(self, new, prompts, *more):
        filled.append(sum(len(prompts[i]) for i in {i for i, _ in new}))
        return fill(self, new, prompts, *more)

    monkeypatch.setattr(Sampler, "fill", counted)
    monkeypatch.setattr(sampler_module, "PREFILL", 30)
    prompts = [[3 + i, 5, 4, 7, 6] for i in range(16)]
    rollout(model, prompts, 4, max_new_tokens=2, eos_ids=NEVER, decided=lambda *_: False)
    assert max(filled) <= 30 and sum(filled) >= 3 * 16 * 5  # drawn 1, 1 and 2 at a time
