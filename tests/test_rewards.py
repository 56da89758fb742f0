"""The ten rewards: numbers worked out by hand, the paper's formulas taken literally, and the bounds they promise."""

import doctest
import random

import pytest
import torch

import rewards
from helpers import close, tolerance
from rewards import BASELINES, PROCESS, min_form, refine, token_rewards

EXACT = tolerance(8)  # of the handful of numbers below 1 that make a reward, or a sum of rewards

BY_HAND = {  # step scores s for K = 0, 1, 2, 3, 5, and r of each reward at eta = 0.5
    (): {"prm": (), "clip": (), "delta": (), "clip-delta": ()},
    (0.3,): {"prm": (0.3,), "clip": (-0.2,), "delta": (0.0,), "clip-delta": (0.0,)},
    (0.2, 0.9): {"prm": (0.2, 0.9), "clip": (-0.3, 0.0), "delta": (0.2, 0.0), "clip-delta": (-0.3, 0.0)},
    (0.4, 0.7, 0.1): {
        "prm": (0.4, 0.7, 0.1),
        "clip": (-0.1, 0.0, -0.4),
        "delta": (-0.3, 0.7, 0.0),  # 0.4 - 0.7, then s_(K-1) itself
        "clip-delta": (-0.1, 0.0, 0.0),  # -0.1 - 0, then 0: the clipped -0.4 of the last step is dropped
    },
    (0.8, 0.3, 0.45, 0.25, 0.6): {
        "prm": (0.8, 0.3, 0.45, 0.25, 0.6),
        "clip": (0.0, -0.2, -0.05, -0.25, 0.0),
        "delta": (0.5, -0.15, 0.2, 0.25, 0.0),
        "clip-delta": (0.2, -0.15, 0.2, -0.25, 0.0),
    },
}
BASELINES_BY_HAND = {  # of min: x = 2 s - 1, each times its share of exp(-10 x)
    (): dict.fromkeys(BASELINES, ()),
    (0.3,): {"progress": (0.0,), "min": (-0.4,), "normed": (0.3,), "penalty": (-0.2,)},
    (0.2, 0.9): {
        "progress": (0.2, -0.2),
        "min": (-0.6, 0.0000007),  # 0.8 e^-14
        "normed": (0.1, 0.45),
        "penalty": (-0.3, 0.4),
    },
    (0.4, 0.7, 0.1): {
        "progress": (0.4, 0.3, -0.7),  # the last step's score is 0: back to where it began
        "min": (-0.0004945, 0.0000025, -0.798017),  # -0.2, 0.4 and -0.8 by e^-6, e^-12 and 1, over their sum 1.0024849
        "normed": (0.1333333, 0.2333333, 0.0333333),
        "penalty": (-0.1, 0.2, -0.4),
    },
    (0.8, 0.3, 0.45, 0.25, 0.6): {
        "progress": (0.8, -0.5, 0.15, -0.2, -0.25),
        "min": (0.0000072, -0.1060841, -0.0013204, -0.3604581, 0.0001315),  # by e^-11, e^-1, e^-4, 1, e^-7
        "normed": (0.16, 0.06, 0.09, 0.05, 0.12),
        "penalty": (0.3, -0.2, -0.05, -0.25, 0.1),
    },
}
for example, found in BASELINES_BY_HAND.items():
    BY_HAND[example] |= found


def refine_one(name, scores, eta=0.5):
    """r of one solution as a list of K floats."""
    return refine(name, torch.tensor([scores]), torch.ones(1, len(scores), dtype=torch.bool), eta)[0].tolist()


def ragged(rng, B=40, longest=9):
    """Random ragged scores. Multiples of 1/64 in (0, 1), so that every difference and every sum here is exact."""
    return [[rng.randrange(1, 64) / 64 for _ in range(rng.randint(0, longest))] for _ in range(B)]


def pad(rows, junk):
    """Rows padded with junk to (B, K), and the mask."""
    K = max(map(len, rows))
    mask = torch.arange(K) < torch.tensor([len(row) for row in rows])[:, None]
    return torch.tensor([[*row, *[junk] * (K - len(row))] for row in rows]), mask


def returns_to_go(r):
    return [sum(r[k:]) for k in range(len(r))]


# ------------------------------------------------------------------------------------------------ refine


@pytest.mark.parametrize("name", PROCESS + BASELINES)
def test_every_reward_at_every_K_is_as_by_hand(name):
    for scores, expected in BY_HAND.items():
        assert refine_one(name, scores) == pytest.approx(expected[name], rel=0, abs=EXACT)


@pytest.mark.parametrize("name", PROCESS + BASELINES)
def test_a_padded_row_equals_the_row_alone_and_padding_earns_nothing(name):
    rows = list(BY_HAND)
    scores, mask = pad(rows, junk=float("nan"))
    r = refine(name, scores, mask)
    assert r.shape == (5, 5) and (r[~mask] == 0).all()
    for i, row in enumerate(rows):
        assert r[i, : len(row)].tolist() == refine_one(name, row)


@pytest.mark.parametrize("name", PROCESS + BASELINES)
def test_a_batch_in_which_no_row_has_a_step_earns_nothing(name):
    for K in (0, 3):
        r = refine(name, torch.full((2, K), float("nan")), torch.zeros(2, K, dtype=torch.bool))
        assert torch.equal(r, torch.zeros(2, K))


def paper(name, scores, eta):
    """The piecewise formulas as the paper prints them: steps count from 1, p[k] is r_process(q, p(k))."""
    K, p = len(scores), dict(enumerate(scores, start=1))
    if name in ("clip", "clip-delta"):
        for k in range(1, K + 1):
            p[k] = min(p[k] - eta, 0)
    if name in ("prm", "clip"):
        return [p[k] for k in range(1, K + 1)]
    r = []
    for k in range(1, K + 1):
        if k < K - 1:
            r.append(p[k] - p[k + 1])
        elif k == K - 1:
            r.append(p[k])
        else:
            r.append(0)
    return r


@pytest.mark.parametrize("name", PROCESS)
def test_refine_equals_the_papers_formulas_on_random_ragged_batches(name):
    rng = random.Random(1)
    for _ in range(20):
        rows, eta = ragged(rng), rng.randrange(1, 64) / 64
        r = refine(name, *pad(rows, junk=0.75), eta)
        for i, row in enumerate(rows):
            assert r[i, : len(row)].tolist() == paper(name, row, eta)


def test_bounds_and_telescoping_hold_for_random_scores():
    rng = random.Random(2)
    for scores in ragged(rng, B=300, longest=12):
        K, eta = len(scores), rng.randrange(1, 64) / 64
        clipped = [min(s - eta, 0) for s in scores]
        G = {name: returns_to_go(refine_one(name, scores, eta)) for name in PROCESS}
        # the formulas of the docstring's last column
        assert G["prm"] == [sum(scores[k:]) for k in range(K)]
        assert G["clip"] == [sum(clipped[k:]) for k in range(K)]
        assert G["delta"] == scores[:-1] + [0] * (K > 0)
        assert G["clip-delta"] == clipped[:-1] + [0] * (K > 0)
        # and what follows from them
        assert all(g <= 0 for g in G["clip"])
        assert all(0 <= g < 1 for g in G["delta"])
        assert all(-eta <= g <= 0 for g in G["clip-delta"])


def test_what_the_baselines_promise_holds_for_random_scores():
    rng = random.Random(3)
    for scores in ragged(rng, B=300, longest=12):
        K, eta = len(scores), rng.randrange(1, 64) / 64
        r = {name: refine_one(name, scores, eta) for name in BASELINES}
        assert returns_to_go(r["progress"]) == [0][:K] + [-s for s in scores[:-1]]  # the docstring's: the past alone
        assert sum(r["progress"]) == 0
        assert sum(r["normed"]) == pytest.approx(sum(scores) / max(K, 1), rel=0, abs=EXACT)
        assert returns_to_go(r["penalty"]) == [sum(s - eta for s in scores[k:]) for k in range(K)]
        x = [2 * s - 1 for s in scores] or [0]
        assert min(x) - EXACT <= sum(r["min"]) <= max(x) + EXACT


def test_min_goes_from_the_mean_to_the_least_score_as_its_temperature_falls():
    rng = random.Random(4)
    for scores in ragged(rng, B=50):
        given, x = (torch.tensor([scores]), torch.ones(1, len(scores)).bool()), [2 * s - 1 for s in scores] or [0]
        sums = [min_form(*given, temperature).sum().item() for temperature in (1e6, 1, 0.1, 0.01, 0.001)]
        about = lambda value: pytest.approx(value, rel=0, abs=EXACT)
        assert sums[0] == pytest.approx(sum(x) / len(x), rel=0, abs=EXACT + 1e-6)  # 1 / temperature, times a variance
        assert sums[-1] == about(min(x))
        assert all(warm >= cold - EXACT for warm, cold in zip(sums, sums[1:]))
        assert sums[2] == about(sum(refine_one("min", scores)))  # 0.1 is the one in use


def test_one_more_step_before_the_last_never_pays_under_clip_delta_and_up_to_its_score_under_delta():
    rng = random.Random(5)
    for scores in ragged(rng, B=300, longest=12):
        if not scores:
            continue
        K, new, eta = len(scores), rng.randrange(1, 64) / 64, rng.randrange(1, 64) / 64
        for name, gain in (("clip-delta", min(new - eta, 0)), ("delta", new)):
            before, after = (
                returns_to_go(refine_one(name, s, eta)) for s in (scores, [*scores[:-1], new, scores[-1]])
            )
            assert after.pop(K - 1) == gain and after == before  # the new step's own; all others are as they were


def test_what_repeating_a_step_pays():
    scores, eta = [0.625, 0.875, 0.375, 0.75], 0.5
    repeated = lambda k, m: scores[:k] + [scores[k]] * m + scores[k:]
    sums = lambda name, k: [sum(refine_one(name, repeated(k, m), eta)) for m in range(11)]
    for k, s in enumerate(scores):
        assert sums("prm", k) == [2.625 + m * s for m in range(11)]  # without end
        assert sums("clip", k) == [-0.125 + m * min(s - eta, 0) for m in range(11)]  # nothing, where s > eta
        assert sums("penalty", k) == [0.625 + m * (s - eta) for m in range(11)]
        assert set(sums("delta", k)) == {0.625} and set(sums("clip-delta", k)) == {0} == set(sums("progress", k))
        assert sums("normed", k) == pytest.approx([(2.625 + m * s) / (4 + m) for m in range(11)], rel=0, abs=2 * EXACT)
    assert sums("min", 1) == pytest.approx([-0.25] * 11, abs=0.005)  # a step that is not the least: next to nothing


def test_only_the_sum_of_prm_grows_with_the_number_of_good_steps():
    sums = {name: [sum(refine_one(name, [0.875] * K)) for K in range(2, 41)] for name in PROCESS}
    assert sums.pop("prm") == [0.875 * K for K in range(2, 41)]  # 35 at last
    assert {name: set(x) for name, x in sums.items()} == {"clip": {0}, "delta": {0.875}, "clip-delta": {0}}


def test_delta_pays_the_score_of_the_step_before_last_and_ignores_the_last():
    assert refine_one("delta", [0.5, 0.25, 0.125]) == refine_one("delta", [0.5, 0.25, 0.875]) == [0.25, 0.25, 0]


def test_bf16_scores_are_refined_in_float32():
    scores, mask = torch.tensor([[0.99609375, 0.00012207, 0.5, 0.3]], dtype=torch.bfloat16), torch.ones(1, 4).bool()
    r = refine("delta", scores, mask)
    assert r.dtype == torch.float32
    assert r[0, 0].item() == 0.99609375 - 2**-13  # bf16 would round it to 0.99609375
    for name in PROCESS + BASELINES:
        assert torch.equal(refine(name, scores, mask, 0.3), refine(name, scores.float(), mask, 0.3))


@pytest.mark.parametrize("name", ["success", "orm", "", "Delta", "delta-clip"])
def test_a_name_that_is_no_process_reward_is_refused(name):
    with pytest.raises(ValueError, match="no process reward"):
        refine_one(name, [0.5])


def test_the_example_of_the_docstring_is_right():
    assert doctest.testmod(rewards) == (0, 2)  # none of two failed
    for name in PROCESS + BASELINES:  # the tables: r_1 .. r_4 and their sum, rounded where need be
        table = (rewards if name in PROCESS else refine).__doc__.splitlines()
        *r, total = map(float, next(row for row in map(str.split, table) if row[:1] == [name])[1:6])
        rounded = EXACT if name in PROCESS else 0.05 + EXACT
        assert refine_one(name, [0.9, 0.8, 0.3, 0.6]) == pytest.approx(r, rel=0, abs=rounded)
        assert sum(r) == pytest.approx(total)  # of decimals, in float64


# ------------------------------------------------------------------------------------------------ token_rewards


def example():
    """Three answers: 4 tokens, right, steps end at tokens 1 and 3; 3 tokens, truncated, with one complete step, which
    ends at token 0 (its `correct` and outcome must not count); 1 token, wrong, without steps. Padding is junk."""
    ref_logp = torch.tensor([[-1.0, -2, -3, -4], [-1, -1, -1, 5], [-2, 5, 5, 5]])
    refined = torch.tensor([[0.6, -0.4], [0.2, 7], [7, 7]])
    token_ends, step_mask = torch.tensor([[1, 3], [0, 99], [-1, -1]]), torch.tensor([[1, 1], [1, 0], [0, 0]]).bool()
    return dict(
        logp=ref_logp + torch.tensor([[0.1, -0.2, 0.3, 0], [1, 0, -1, 9], [0.5, 9, 9, 9]]),
        ref_logp=ref_logp,
        response_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]).bool(),
        correct=torch.tensor([True, True, False]),
        truncated=torch.tensor([False, True, False]),
        outcome=torch.tensor([0.8, 0.9, 0.4]),
        steps=(refined, token_ends, step_mask),
    )


def test_each_reward_lies_on_its_token():
    # by hand, with alpha = 0.5 and beta = 0.1
    expected = [
        [-0.01, 0.02 + 0.5 * 0.6, -0.03, 0 - 0.5 * 0.4 + 1 + 0.5 * 0.8],
        [-0.1 + 0.5 * 0.2, 0, 0.1, 0],  # truncated: neither Correct nor outcome, but its step
        [-0.05 + 0.5 * 0.4, 0, 0, 0],  # K = 0
    ]
    close(token_rewards(**example(), beta=0.1, alpha=0.5), expected, terms=8)


def test_without_learned_rewards_there_are_correct_and_kl():
    r = token_rewards(**example() | {"outcome": None, "steps": None}, beta=0.1)
    close(r, [[-0.01, 0.02, -0.03, 1], [-0.1, 0, 0.1, 0], [-0.05, 0, 0, 0]], terms=8)


def test_alpha_scales_only_the_learned_part():
    none, one, three = (token_rewards(**example(), beta=0.1, alpha=alpha) for alpha in (0.0, 1.0, 3.0))
    learned = torch.tensor([[0, 0.6, 0, -0.4 + 0.8], [0.2, 0, 0, 0], [0.4, 0, 0, 0]])
    close(one - none, learned, terms=8, size=1)
    close(three - none, 3 * learned, terms=8, size=3)


def test_a_batch_without_any_step_gets_no_step_reward():
    empty = torch.zeros(3, 0), torch.zeros(3, 0).long(), torch.zeros(3, 0).bool()
    r, without = (token_rewards(**example() | {"steps": steps}, beta=0.1, alpha=1) for steps in (empty, None))
    assert torch.equal(r, without) and not torch.equal(r, token_rewards(**example(), beta=0.1, alpha=1))


@pytest.mark.parametrize("name", PROCESS)
def test_the_return_at_a_steps_first_token_is_the_steps_return_to_go(name):
    scores, all_steps = torch.tensor([[0.9, 0.8, 0.3, 0.6]]), torch.ones(1, 4).bool()
    r = refine(name, scores, all_steps)
    nothing, tokens = torch.zeros(1, 8), torch.ones(1, 8).bool()  # four steps of two tokens
    laid = token_rewards(
        nothing, nothing, tokens, torch.tensor([True]), torch.tensor([False]), beta=0.1, alpha=1,
        steps=(r, torch.tensor([[1, 3, 5, 7]]), all_steps),
    )
    close(returns_to_go(laid[0].tolist())[::2], [1 + g for g in returns_to_go(r[0].tolist())], terms=8)
