"""The six rewards: numbers worked out by hand, the paper's formulas taken literally, and the bounds they promise."""

import doctest
import random

import pytest
import torch

import rewards
from rewards import PROCESS, refine, token_rewards

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


@pytest.mark.parametrize("name", PROCESS)
def test_every_reward_at_every_K_is_as_by_hand(name):
    for scores, expected in BY_HAND.items():
        assert refine_one(name, scores) == pytest.approx(expected[name], abs=1e-6)


@pytest.mark.parametrize("name", PROCESS)
def test_a_padded_row_equals_the_row_alone_and_padding_earns_nothing(name):
    rows = list(BY_HAND)
    scores, mask = pad(rows, junk=float("nan"))
    r = refine(name, scores, mask)
    assert r.shape == (5, 5) and (r[~mask] == 0).all()
    for i, row in enumerate(rows):
        assert r[i, : len(row)].tolist() == refine_one(name, row)


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
    for name in PROCESS:
        assert torch.equal(refine(name, scores, mask, 0.3), refine(name, scores.float(), mask, 0.3))


@pytest.mark.parametrize("name", ["success", "orm", "", "Delta", "delta-clip"])
def test_a_name_that_is_no_process_reward_is_refused(name):
    with pytest.raises(ValueError, match="no process reward"):
        refine_one(name, [0.5])


def test_the_example_of_the_docstring_is_right():
    assert doctest.testmod(rewards) == (0, 2)  # none of two failed
    for name in PROCESS:  # the table: r_1 .. r_4 and their sum
        *r, total = map(float, next(x for x in map(str.split, rewards.__doc__.splitlines()) if x[:1] == [name])[1:6])
        assert refine_one(name, [0.9, 0.8, 0.3, 0.6]) == pytest.approx(r, abs=1e-6)
        assert sum(r) == pytest.approx(total)


# ------------------------------------------------------------------------------------------------ token_rewards


def example():
    """Three answers: 4 tokens, right, steps end at tokens 1 and 3; 3 tokens, truncated, with one complete step, which
    ends at token 0 (its `correct` and outcome must not count); 1 token, wrong, without steps. Padding is junk."""
    ref_logp = torch.tensor([[-1.0, -2, -3, -4], [-1, -1, -1, 5], [-2, 5, 5, 5]])
    return dict(
        logp=ref_logp + torch.tensor([[0.1, -0.2, 0.3, 0], [1, 0, -1, 9], [0.5, 9, 9, 9]]),
        ref_logp=ref_logp,
        mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]).bool(),
        correct=torch.tensor([True, True, False]),
        truncated=torch.tensor([False, True, False]),
        outcome=torch.tensor([0.8, 0.9, 0.4]),
        steps=torch.tensor([[0.6, -0.4], [0.2, 7], [7, 7]]),
        step_ends=torch.tensor([[1, 3], [0, 99], [-1, -1]]),
        step_mask=torch.tensor([[1, 1], [1, 0], [0, 0]]).bool(),
    )


def test_each_reward_lies_on_its_token():
    # by hand, with alpha = 0.5 and beta = 0.1
    expected = [
        [-0.01, 0.02 + 0.5 * 0.6, -0.03, 0 - 0.5 * 0.4 + 1 + 0.5 * 0.8],
        [-0.1 + 0.5 * 0.2, 0, 0.1, 0],  # truncated: neither Correct nor outcome, but its step
        [-0.05 + 0.5 * 0.4, 0, 0, 0],  # K = 0
    ]
    r = token_rewards(**example(), beta=0.1, alpha=0.5)
    torch.testing.assert_close(r, torch.tensor(expected), atol=1e-6, rtol=0)


def test_without_learned_rewards_there_are_correct_and_kl():
    case = {name: x for name, x in example().items() if name not in ("outcome", "steps", "step_ends", "step_mask")}
    r = token_rewards(**case, beta=0.1)
    expected = torch.tensor([[-0.01, 0.02, -0.03, 1], [-0.1, 0, 0.1, 0], [-0.05, 0, 0, 0]])
    torch.testing.assert_close(r, expected, atol=1e-6, rtol=0)


def test_alpha_scales_only_the_learned_part():
    none, one, three = (token_rewards(**example(), beta=0.1, alpha=alpha) for alpha in (0.0, 1.0, 3.0))
    learned = torch.tensor([[0, 0.6, 0, -0.4 + 0.8], [0.2, 0, 0, 0], [0.4, 0, 0, 0]])
    torch.testing.assert_close(one - none, learned, atol=1e-6, rtol=0)
    torch.testing.assert_close(three - none, 3 * learned, atol=1e-6, rtol=0)


def test_a_batch_without_any_step_gets_no_step_reward():
    case = example()
    none = {"steps": torch.zeros(3, 0), "step_ends": torch.zeros(3, 0).long(), "step_mask": torch.zeros(3, 0).bool()}
    absent = dict.fromkeys(none)
    r, without = (token_rewards(**case | steps, beta=0.1, alpha=1) for steps in (none, absent))
    assert torch.equal(r, without) and not torch.equal(r, token_rewards(**case, beta=0.1, alpha=1))


@pytest.mark.parametrize("name", PROCESS)
def test_the_return_at_a_steps_first_token_is_the_steps_return_to_go(name):
    scores = [0.9, 0.8, 0.3, 0.6]
    r = refine(name, torch.tensor([scores]), torch.ones(1, 4).bool())
    nothing, T = torch.zeros(1, 8), torch.ones(1, 8).bool()  # four steps of two tokens
    laid = token_rewards(
        nothing, nothing, T, torch.tensor([True]), torch.tensor([False]), beta=0.1, alpha=1,
        steps=r, step_ends=torch.tensor([[1, 3, 5, 7]]), step_mask=torch.ones(1, 4).bool(),
    )  # fmt: skip
    G = returns_to_go(laid[0].tolist())[::2]
    assert G == pytest.approx([1 + g for g in returns_to_go(r[0].tolist())], abs=1e-6)
