"""PPO: each formula against hand numbers or a naive version of it, and the gradient of the updates against that of a
padded plain model: it depends neither on micro-batches nor on the number of processes."""

import sys
from copy import deepcopy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_model import padded, random_sequences, tiny
from torch.nn.utils import parameters_to_vector as flat

from helpers import close, model_terms, run_alone, tolerance
from model import Packed, Policy, ScalarModel, score_logps, side_by_side
from ppo import (
    Experience, ValueNorm, count_tokens, explained_variance, gae, minibatches, optimizer_step, policy_loss,
    update_critic, update_policy, value_loss, whiten,
)
from rollout import Batch

TEMPERATURE, CLIP, VALUE_CLIP = 0.7, 0.25, 0.3  # none is the default


# ------------------------------------------------------------------------------------------------ advantages


def ragged(seed=0):
    """Rewards, values (junk behind the rows' ends), mask, bootstrap: V(s_T) in the cut rows, 0 behind an EOS."""
    rng = torch.Generator().manual_seed(seed)
    lengths, cut = torch.tensor([5, 1, 3, 4, 5, 1]), torch.tensor([1, 1, 1, 0, 0, 0])
    rewards, values = torch.randn(2, 6, 5, generator=rng)
    return rewards, values, torch.arange(5) < lengths[:, None], torch.randn(6, generator=rng) * cut


def test_gae_by_hand():
    case = torch.tensor([[1.0, 2]]), torch.tensor([[0.5, 0.25]]), torch.ones(1, 2).bool()
    # EOS: delta_1 = 2 - 0.25 = 1.75, delta_0 = 1 + 0.5 * 0.25 - 0.5 = 0.625, A_0 = 0.625 + 0.5 * 0.5 * 1.75
    assert gae(*case, torch.tensor([0.0]), gamma=0.5, lam=0.5)[0].tolist() == [[1.0625, 1.75]]
    # truncated, V(s_T) = 4: delta_1 = 1.75 + 0.5 * 4 = 3.75, A_0 = 0.625 + 0.25 * 3.75
    assert gae(*case, torch.tensor([4.0]), gamma=0.5, lam=0.5)[0].tolist() == [[1.5625, 3.75]]


@pytest.mark.parametrize("gamma, lam", [(0.9, 0.8), (0.9, 1), (1, 0.8), (0.7, 0)])
def test_gae_is_the_double_sum_on_ragged_rows_with_both_endings(gamma, lam):
    rewards, values, mask, bootstrap = ragged()
    expected = torch.zeros_like(rewards)
    for b in range(6):
        T = int(mask[b].sum())
        r, V = rewards[b, :T], [*values[b, :T], bootstrap[b]]
        for t in range(T):
            expected[b, t] = sum((gamma * lam) ** (l - t) * (r[l] + gamma * V[l + 1] - V[l]) for l in range(t, T))
    advantages, returns = gae(rewards, values, mask, bootstrap, gamma, lam)
    close(advantages, expected, terms=3 * 5)  # three numbers for each of five tokens
    close(returns, expected + values * mask, terms=3 * 5)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_with_gamma_and_lambda_1_the_advantage_is_later_rewards_plus_bootstrap_minus_value():
    rewards, values, mask, bootstrap = ragged(1)
    later = (rewards * mask).flip(1).cumsum(1).flip(1) + bootstrap[:, None]
    advantages, returns = gae(rewards, values, mask, bootstrap)
    close(advantages, (later - values) * mask, terms=3 * 5)
    close(returns, later * mask, terms=3 * 5)


def test_whitened_advantages_have_mean_0_and_std_1_over_the_mask_only():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    given = torch.tensor([[1.0, 5, 1000], [3, 3, 3]])  # over the mask: mean 3, variance 8 / 5
    std = 1.6**0.5 + 1e-5  # which keeps it off 0
    close(whiten(given, mask), torch.tensor([[-2.0, 2, 0], [0, 0, 0]]) / std, terms=5)
    rewards, _, mask, _ = ragged()
    white = whiten(rewards * 7 + 3, mask)[mask]
    close(white.mean(), 0, terms=len(white), size=1)
    assert 0 < 1 - white.std(correction=0) < 1e-5  # the spread is 7
    assert (whiten(torch.full((2, 3), 4.0), torch.ones(2, 3).bool()) == 0).all()  # no spread: no advantage, and no nan


def test_explained_variance_by_hand():
    returns, mask = torch.tensor([[1.0, 2, 3, 99]]), torch.tensor([[1, 1, 1, 0]]).bool()
    for values, expected in [([1, 2, 3], 1), ([7, 7, 7], 0), ([2, 3, 4], 1), ([1, 1.5, 2], 0.75), ([3, 2, 1], -3)]:
        found = explained_variance(torch.tensor([[*values, -50.0]]), returns, mask)
        assert found == pytest.approx(expected)  # sums in float64, of numbers that float32 has exactly
    assert explained_variance(returns, torch.full((1, 4), 0.3), mask) == 0  # nothing to explain


def test_value_norm_by_hand():
    norm = ValueNorm(decay=0.5)
    assert norm.mean_std() == (0, 1)  # before any update: the identity
    norm.update(torch.tensor([[1.0, 3], [3, 1000], [1, 1000]]), torch.tensor([[1, 1], [1, 0], [1, 0]]).bool())
    assert norm.mean_std() == pytest.approx((2, 1))  # debiased: not 0.5 * 2
    norm.update(torch.tensor([[6.0, 6]]), torch.ones(1, 2).bool())
    # weights 1/3 and 2/3: the mean is (2 + 2 * 6) / 3, the mean square (5 + 2 * 36) / 3
    assert norm.mean_std() == pytest.approx((14 / 3, (77 / 3 - (14 / 3) ** 2) ** 0.5))
    x = torch.tensor([-3.0, 0, 14 / 3, 50])
    close(norm.normalise(x), (x - 14 / 3) / (35 / 9) ** 0.5, terms=3)
    close(norm.denormalise(norm.normalise(x)), x, terms=6)


def test_value_norm_remembers_with_its_decay_and_survives_constant_returns():
    norm, ones = ValueNorm(decay=0.9), torch.ones(1, 1).bool()
    for x in (1.0, 0, 0, 0):
        norm.update(torch.tensor([[x]]), ones)
    assert norm.mean_std()[0] == pytest.approx(0.9**3 * 0.1 / (1 - 0.9**4))
    constant = ValueNorm()
    constant.update(torch.tensor([[5.0]]), ones)
    assert constant.mean_std() == pytest.approx((5, 0.01))  # the floor of the variance is 1e-4


# ------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient",  # clip 0.2; the gradient is that of the log-probability, -ratio * A or 0
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.0, -3.0, 3.0, 3.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 1.0, -1.2, 0.0),  # raised enough
        (1.5, -1.0, 1.5, 1.5),  # raised though bad: full gradient back
        (0.5, 1.0, -0.5, -0.5),  # lowered though good: full gradient back
        (0.5, -1.0, 0.8, 0.0),  # lowered enough
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_policy_loss_by_hand(ratio, advantage, loss, gradient):
    old = torch.tensor([-1.3])
    logp = (old + torch.tensor([ratio]).log()).requires_grad_()
    out = policy_loss(logp, old, torch.tensor([advantage]), clip_range=0.2)
    close(out, [loss], terms=8, size=4)
    out.backward()
    close(logp.grad, [gradient], terms=8, size=4)


@pytest.mark.parametrize(
    "value, old, target, clip_range, loss, gradient",
    [  # 0.5 * max((V - R)^2, (clip(V) - R)^2); V - R, or 0 where clipped
        (0.6, 0.5, 0.0, 0.2, 0.18, 0.6),  # within the clip
        (1.0, 0.5, 2.0, 0.2, 0.845, 0.0),  # moved to 0.7 at most: (0.7 - 2)^2 is the larger
        (1.0, 0.5, 2.0, 0.0, 0.5, -1.0),  # no clipping
        (1.0, 0.5, 0.0, 0.2, 0.5, 1.0),  # moved away from the target: unclipped is the larger
        (-1.0, 0.5, -2.0, 0.2, 2.645, 0.0),  # moved to 0.3 at most
    ],
)
def test_value_loss_by_hand(value, old, target, clip_range, loss, gradient):
    v = torch.tensor([value], requires_grad=True)
    out = value_loss(v, torch.tensor([old]), torch.tensor([target]), clip_range)
    close(out, [loss], terms=8, size=4)
    out.backward()
    close(v.grad, [gradient], terms=8, size=4)


# ------------------------------------------------------------------------------------------------ updates

ROWS = list(range(8))


def a_batch() -> Batch:
    prompts, responses = random_sequences([3, 1, 4, 2, 1, 5, 2, 3]), random_sequences([9, 2, 6, 1, 7, 3, 9, 4], seed=1)
    return Batch(prompts, responses, torch.zeros(8, dtype=torch.bool))


def models() -> tuple[Policy, ScalarModel]:
    critic = ScalarModel(tiny("llama gqa", seed=2)[1])
    torch.nn.init.normal_(critic.head.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return Policy(tiny("qwen2 gqa", seed=1)[1]), critic


POLICY, CRITIC = models()  # as they were before any update
TERMS = 2 * (model_terms(POLICY.lm.config, 12) + POLICY.lm.config.vocab_size) + 41  # there, back, and over 41 tokens


def random_experience(policy, batch) -> Experience:
    """Random advantages and targets, and old log-probabilities off by enough for some tokens to be clipped."""
    generator = torch.Generator().manual_seed(0)
    noise = lambda scale: scale * torch.randn(batch.mask.shape, generator=generator)
    logp = score_logps(policy, batch, [batch.pack(ROWS, "cpu")], TEMPERATURE)
    return Experience(batch.mask, logp + noise(0.2), noise(1), noise(1), noise(1))


def sgd(model, lr=1.0):
    return torch.optim.SGD(model.parameters(), lr=lr)


def learn(policy, critic, plans, experience, lr=1.0, **options) -> dict[str, float]:
    """Both updates with plain gradient descent; metrics."""
    options = dict(temperature=TEMPERATURE, clip_range=CLIP, max_grad_norm=1e9) | options
    counts = count_tokens(plans, experience.response_mask)
    log = update_policy(policy, sgd(policy, lr), plans, counts, experience, **options)
    options = dict(clip_range=VALUE_CLIP, max_grad_norm=options["max_grad_norm"])
    return log | update_critic(critic, sgd(critic, lr), plans, counts, experience, **options)


def moved(model, before):
    return flat(before.parameters()).detach() - flat(model.parameters()).detach()


def about(metrics):
    """The same up to rounding; small metrics are differences of ratios near 1."""
    return {name: pytest.approx(x, rel=0, abs=tolerance(TERMS, max(1, abs(x)))) for name, x in metrics.items()}


@pytest.fixture(scope="module")
def naive():
    """Gradients of policy and critic by padded plain forwards and a mean over all response tokens; and metrics."""
    batch = a_batch()
    data, mask = random_experience(POLICY, batch), batch.mask
    sequences = [p + r for p, r in zip(batch.prompts, batch.responses)]
    spans = [
        range(start + len(p) - 1, start + len(p) + len(r) - 1)
        for start, p, r in zip(Packed(sequences).starts, batch.prompts, batch.responses)
    ]
    predict_at = [i for span in spans for i in span]
    (lm, _), (value_lm, critic) = tiny("qwen2 gqa", seed=1), (tiny("llama gqa", seed=2)[0], deepcopy(CRITIC))
    logp = (padded(lm, sequences)[0][predict_at] / TEMPERATURE).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    logp = logp[range(len(predict_at)), [i for r in batch.responses for i in r]]
    values = critic.head(padded(value_lm, sequences)[1][predict_at]).squeeze(-1)
    ratio = (logp - data.logp[mask]).exp()
    losses = (
        policy_loss(logp, data.logp[mask], data.advantages[mask], CLIP).mean(),
        value_loss(values, data.values[mask], data.returns[mask], VALUE_CLIP).mean(),
    )
    gradients = []
    for loss, params in zip(losses, ([*lm.parameters()], [*value_lm.parameters(), *critic.head.parameters()])):
        loss.backward()
        gradients.append(flat([torch.zeros_like(p) if p.grad is None else p.grad for p in params]))
    metrics = {
        "policy_loss": losses[0], "value_loss": losses[1], "entropy": entropy.mean(),
        "approx_kl": (ratio - 1 - ratio.log()).mean(), "clip_fraction": ((ratio - 1).abs() > CLIP).float().mean(),
        "max_ratio_error_first": (ratio - 1).abs().max(),
        "grad_norm_policy": gradients[0].norm(), "grad_norm_critic": gradients[1].norm(),
    }
    assert 0.1 < metrics["clip_fraction"] < 0.9 and min(g.abs().max() for g in gradients) > 0.05
    return gradients, {name: x.item() for name, x in metrics.items()} | {"skipped_policy": 0, "skipped_critic": 0}


CUTS = {
    "one by one": [[i] for i in ROWS], "one half after the other": [ROWS[:4], ROWS[4:]],
    "all at once": [ROWS], "some, and an empty one": [[5, 0, 7], [1], [6, 2, 3, 4], []],
}


@pytest.mark.parametrize("cut", CUTS)
def test_the_gradient_is_the_token_mean_however_the_minibatch_is_cut(cut, naive):
    batch, after = a_batch(), models()
    plan = [batch.pack(rows, "cpu") for rows in CUTS[cut]]
    metrics = learn(*after, [plan], random_experience(POLICY, batch))
    for model, before, gradient in zip(after, (POLICY, CRITIC), naive[0]):
        close(moved(model, before), gradient, TERMS)
    assert metrics == about(naive[1])


def test_metrics_are_means_over_the_tokens_of_all_minibatches(naive):
    batch, pair = a_batch(), models()
    data = random_experience(POLICY, batch)
    halves = [[batch.pack(rows, "cpu") for rows in half] for half in ([[0, 1, 2], [3]], [[4, 5], [6, 7]])]
    metrics, *alone = (learn(*pair, plans, data, lr=0) for plans in (halves, halves[:1], halves[1:]))
    expected = dict(naive[1], max_ratio_error_first=alone[0]["max_ratio_error_first"])
    for name in ("grad_norm_policy", "grad_norm_critic"):
        expected[name] = sum(m[name] for m in alone) / 2
    assert metrics == about(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ratio_is_exactly_1_on_the_first_minibatch(dtype):
    batch, (policy, critic), (other, _) = a_batch(), models(), models()
    plans = batch.micro_batches(minibatches(ROWS, 8, 2, seed=0), 12, "cpu")
    policy.to(dtype), other.to(dtype)
    data = random_experience(policy, batch)
    data.logp = score_logps(policy, batch, plans[0] + plans[1], TEMPERATURE)
    off = learn(other, critic, plans, data, temperature=1.0)["max_ratio_error_first"]
    metrics = learn(policy, critic, plans, data)
    assert metrics["max_ratio_error_first"] == 0.0
    assert metrics["approx_kl"] > 1e-4  # the second minibatch meets a policy that has moved
    assert off > 0.1  # a temperature other than the sampler's shows at once


def test_policy_and_critic_side_by_side_learn_as_one_after_the_other():
    batch, limits = a_batch(), dict(clip_range=0.2, max_grad_norm=1.0)
    data, plans = random_experience(POLICY, batch), batch.micro_batches([ROWS[:4], ROWS[4:]], 20, "cpu")
    counts = count_tokens(plans, batch.mask)

    def learn_with(threads: int):
        policy, critic = models()
        torch.set_num_threads(threads)
        try:
            of_policy, of_critic = side_by_side(
                lambda: update_policy(policy, sgd(policy), plans, counts, data, temperature=1.0, **limits),
                lambda: update_critic(critic, sgd(critic), plans, counts, data, **limits),
            )
        finally:
            torch.set_num_threads(1)
        return of_policy | of_critic, moved(policy, POLICY), moved(critic, CRITIC)

    (log, *one), (expected, *other) = learn_with(2), learn_with(1)
    assert log == about(expected)
    for x, y in zip(one, other):
        close(x, y, 2 * TERMS, size=1)  # two steps of a norm of 1 at most


def test_the_gradient_is_clipped_to_the_given_norm():
    batch, after = a_batch(), models()
    metrics = learn(*after, [[batch.pack(ROWS, "cpu")]], random_experience(POLICY, batch), max_grad_norm=0.05)
    for model, before, name in zip(after, (POLICY, CRITIC), ("policy", "critic")):
        change = moved(model, before)  # of weights of size 3 at most, each rounded
        close(change.norm(), 0.05, terms=1, size=3 * len(change) ** 0.5)
        assert metrics[f"grad_norm_{name}"] > 0.1  # logged as it was before


def test_a_step_whose_gradient_is_not_finite_is_skipped_and_counted():
    batch, after = a_batch(), models()
    data, plans = random_experience(POLICY, batch), [[batch.pack([i], "cpu")] for i in (0, 1)]
    data.advantages[0, 0] = data.returns[1, 0] = torch.inf
    metrics = learn(*after, plans, data)
    assert (metrics["skipped_policy"], metrics["skipped_critic"]) == (1, 1)
    for model, before in zip(after, (POLICY, CRITIC)):
        change = moved(model, before)
        assert change.isfinite().all() and change.abs().max() > 0.01  # the other step was taken
        assert all(p.grad is None for p in model.parameters())


def test_all_optimizers_of_a_model_take_the_clipped_step():
    layer = torch.nn.Linear(1, 1)
    layer.weight.data.fill_(1), layer.bias.data.fill_(1)
    for p in layer.parameters():
        p.grad = torch.full_like(p, 3)
    optimizers = [torch.optim.SGD([layer.weight], lr=1.0), torch.optim.SGD([layer.bias], lr=2.0)]
    close(optimizer_step(layer, optimizers, max_grad_norm=0.5), 18**0.5, terms=4)
    half = 0.5 / 2**0.5  # of each of the two gradients
    close([layer.weight.item(), layer.bias.item()], [1 - half, 1 - 2 * half], terms=8, size=1)


def test_a_policy_that_does_not_learn_is_measured_alone():
    batch, (policy, _) = a_batch(), models()
    data, plans = random_experience(POLICY, batch), [[batch.pack(ROWS, "cpu")]]
    limits = dict(temperature=TEMPERATURE, clip_range=CLIP, max_grad_norm=1.0)
    metrics = update_policy(policy, None, plans, [41.0], data, learn=False, **limits)  # no optimizer is even asked
    assert (moved(policy, POLICY) == 0).all() and metrics["grad_norm_policy"] == 0 and metrics["clip_fraction"] > 0.1
    assert all(p.grad is None for p in policy.parameters())  # nothing left over for the first real step


@pytest.mark.parametrize("total, count", [(12, 4), (13, 4), (8, 1), (5, 5)])
def test_minibatches_deal_every_row_once_and_the_same_for_any_number_of_ranks(total, count):
    alone = minibatches(list(range(total)), total, count, seed=3)
    assert sorted(sum(alone, [])) == list(range(total))
    assert max(map(len, alone)) - min(map(len, alone)) <= 1
    for world in (2, 3, 5):
        union = [[] for _ in range(count)]
        for rank in range(world):
            keys = list(range(rank, total, world))
            for part, rows in zip(union, minibatches(keys, total, count, seed=3)):
                part += [keys[row] for row in rows]
        assert [sorted(part) for part in union] == [sorted(part) for part in alone]


def test_minibatches_are_shuffled_by_the_seed():
    deals = [minibatches(list(range(12)), 12, 4, seed) for seed in (0, 1, 0)]
    assert deals[0] == deals[2] != deals[1]


# ------------------------------------------------------------------------------------------------ elsewhere

HALVES = [0, 1, 2, 4], [3, 5, 6, 7]
COUNT, SEED = 4, 11  # minibatches of two answers: the first with one of each half, later ones with both of one half


def iterate(mine):
    """Updates of four steps on the rows `mine` of the eight answers: parameters, and all averages."""
    full, (policy, critic) = a_batch(), models()
    data = random_experience(policy, full)
    batch = Batch([full.prompts[i] for i in mine], [full.responses[i] for i in mine], full.truncated[mine])
    cut = lambda x: x[mine, : batch.mask.shape[1]]
    advantages = whiten(cut(data.advantages) + 1, batch.mask)
    part = Experience(batch.mask, cut(data.logp), advantages, cut(data.values), cut(data.returns))
    norm = ValueNorm()
    norm.update(part.returns, batch.mask)
    plans = batch.micro_batches(minibatches(mine, 8, COUNT, SEED), 20, "cpu")
    metrics = learn(policy, critic, plans, part, lr=0.5, max_grad_norm=0.5)
    metrics["explained_variance"] = explained_variance(part.values, part.returns, batch.mask)
    metrics["mean"], metrics["std"] = norm.mean_std()
    return [moved(policy, POLICY), moved(critic, CRITIC)], metrics


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=60), world_size=2, rank=rank)
    torch.save(iterate(HALVES[rank]), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_half_of_the_answers_each_end_where_one_with_all_does(tmp_path):
    deals = [minibatches(half, 8, COUNT, SEED) for half in HALVES]
    assert [[len(rows) for rows in deal] for deal in deals] == [[1, 1, 2, 0], [1, 1, 0, 2]]
    start = "spawn" if torch.cuda.is_available() or sys.platform != "linux" else "fork"  # fork spares two slow imports
    running = mp.start_processes(process, (tmp_path,), nprocs=2, join=False, start_method=start)
    expected, expected_metrics = iterate(ROWS)
    while not running.join():
        pass
    for rank in (0, 1):
        changes, metrics = torch.load(tmp_path / f"{rank}.pt")
        for got, want in zip(changes, expected):
            close(got, want, COUNT * TERMS, size=0.5)  # steps of a norm of 0.25
            assert want.abs().max() > 0.02
        assert metrics == about(expected_metrics)


def test_rewards_and_ppo_each_need_torch_alone(tmp_path):
    code = """
import torch, torch.distributed.tensor
for name in ("rewards", "ppo"):
    before = set(sys.modules)
    module = __import__(name)
    loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
    print(loaded - set(sys.stdlib_module_names) - {"torch"})
    del sys.modules[name]
mask = torch.ones(1, 2, dtype=torch.bool)
print(module.gae(torch.ones(1, 2), torch.zeros(1, 2), mask, torch.zeros(1))[0].tolist())"""
    printed = run_alone(["rewards.py", "ppo.py"], code, tmp_path)
    assert printed.splitlines() == ["{'rewards'}", "{'ppo'}", "[[2.0, 1.0]]"]
