"""PPO: each formula against hand numbers or a naive version of it, packed models against padded plain transformers, and
the gradient of `update`, which depends neither on micro-batches nor on the number of processes."""

import random
import sys
from copy import deepcopy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.utils import parameters_to_vector as flat
from torch.nn.utils.rnn import pad_sequence

from data import toy_problems, toy_solution, toy_tokenizer
from model import ScalarModel, toy_model
from ppo import (
    Policy, Experience, TokenLogProbs, ValueNorm, explained_variance, gae, minibatches, policy_loss, score_values, update,
    value_loss, whiten,
)  # fmt: skip
from rollout import Batch

TEMPERATURE, CLIP, VALUE_CLIP = 0.7, 0.25, 0.3  # none is the default


def close(x, y, atol=1e-5):
    torch.testing.assert_close(x, torch.as_tensor(y, dtype=x.dtype), atol=atol, rtol=0)


# ------------------------------------------------------------------------------------------------ a small world


def solutions(n=8):
    """Real questions and solutions of unequal length; every third answer is cut off before its EOS."""
    rng, tokenizer = random.Random(0), toy_tokenizer()
    problems = toy_problems("train", n)
    prompts = [tokenizer.encode(p.question) for p in problems]
    responses = [tokenizer.encode(toy_solution(p.question, rng, repeat=0.3) + "<eos>") for p in problems]
    truncated = torch.arange(n) % 3 == 0
    return Batch(prompts, [r[: len(r) // 2] if cut else r for r, cut in zip(responses, truncated)], truncated)


def models():
    tokenizer = toy_tokenizer()
    policy, critic = (toy_model(tokenizer, seed, hidden=32, layers=2, heads=2) for seed in (1, 2))
    policy.get_input_embeddings().weight.data *= 10  # tied: as they start, every token is about equally likely
    critic = ScalarModel(critic)
    torch.nn.init.normal_(critic.head.weight, std=0.2)  # a head of zeros would pass no gradient on
    return Policy(policy), critic


def noisy_rollout(policy, batch, plan):
    """Random advantages and targets, and old log-probabilities off by enough for some tokens to be clipped."""
    rng = torch.Generator().manual_seed(0)
    noise = lambda scale: scale * torch.randn(batch.mask.shape, generator=rng)
    return Experience(old_log_probs(policy, batch, plan) + noise(0.2), noise(1), noise(1), noise(1))


def old_log_probs(policy, batch, plan, temperature=TEMPERATURE):
    return batch.map(lambda _, *packed: policy(*packed, temperature)[0], plan, "cpu")


def plain(model, batch):
    """A plain padded forward of transformers' own model with its own attention: the output, and the ids (B, L)."""
    model.set_attn_implementation("eager")
    sequences = [torch.tensor(p + r) for p, r in zip(batch.prompts, batch.responses)]
    ids = pad_sequence(sequences, batch_first=True)
    lengths = torch.tensor([len(s) for s in sequences])[:, None]
    return model(ids, attention_mask=(torch.arange(ids.shape[1]) < lengths).long(), output_hidden_states=True), ids


def plain_log_probs(policy, batch, temperature):
    """log pi and entropy of the response tokens, (B, T)."""
    out, ids = plain(policy.lm, batch)
    p = torch.softmax(out.logits / temperature, -1)
    logp, entropy = torch.zeros(batch.mask.shape), torch.zeros(batch.mask.shape)
    for b, (prompt, response) in enumerate(zip(batch.prompts, batch.responses)):
        for t in range(len(response)):
            before = p[b, len(prompt) + t - 1]
            logp[b, t] = before[ids[b, len(prompt) + t]].log()
            entropy[b, t] = -(before * before.log()).sum()
    return logp, entropy


def plain_values(critic, batch):
    """V before each response token (B, T), and behind the last (B,)."""
    out, _ = plain(critic.lm, batch)
    v = critic.head(out.hidden_states[-1]).squeeze(-1)
    values, final = torch.zeros(batch.mask.shape), []
    for b, (prompt, response) in enumerate(zip(batch.prompts, batch.responses)):
        values[b, : len(response)] = v[b, len(prompt) - 1 : len(prompt) + len(response) - 1]
        final.append(v[b, len(prompt) + len(response) - 1])
    return values, torch.stack(final)


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
            expected[b, t] = sum((gamma * lam) ** (l - t) * (r[l] + gamma * V[l + 1] - V[l]) for l in range(t, T))  # noqa: E741
    advantages, returns = gae(rewards, values, mask, bootstrap, gamma, lam)
    close(advantages, expected)
    close(returns, expected + values * mask)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_with_gamma_and_lambda_1_the_advantage_is_later_rewards_plus_bootstrap_minus_value():
    rewards, values, mask, bootstrap = ragged(1)
    later = (rewards * mask).flip(1).cumsum(1).flip(1) + bootstrap[:, None]
    advantages, returns = gae(rewards, values, mask, bootstrap)
    close(advantages, (later - values) * mask)
    close(returns, later * mask)


def test_whitened_advantages_have_mean_0_and_std_1_over_the_mask_only():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    junk = torch.tensor([[1.0, 5, 1000], [3, 3, 3]])  # over the mask: mean 3, variance 8 / 5
    white = whiten(junk, mask)
    close(white, torch.tensor([[-2.0, 2, 0], [0, 0, 0]]) / 1.6**0.5, atol=1e-4)
    white = whiten(ragged()[0] * 7 + 3, ragged()[2])[ragged()[2]]
    assert white.mean().abs() < 1e-5 and abs(white.std(correction=0) - 1) < 1e-4
    assert (whiten(torch.full((2, 3), 4.0), mask) == 0).all()  # no spread: no advantage, and no nan


def test_explained_variance_by_hand():
    returns, mask = torch.tensor([[1.0, 2, 3, 99]]), torch.tensor([[1, 1, 1, 0]]).bool()
    for values, expected in [([1, 2, 3], 1), ([7, 7, 7], 0), ([2, 3, 4], 1), ([1, 1.5, 2], 0.75), ([3, 2, 1], -3)]:
        assert explained_variance(torch.tensor([[*values, -50.0]]), returns, mask) == pytest.approx(expected)


def test_value_norm_by_hand():
    norm = ValueNorm(decay=0.5)
    assert norm.mean_std() == (0, 1)  # before any update: the identity
    norm.update(torch.tensor([[1.0, 3], [3, 1000], [1, 1000]]), torch.tensor([[1, 1], [1, 0], [1, 0]]).bool())
    assert norm.mean_std() == pytest.approx((2, 1))  # debiased: not 0.5 * 2
    norm.update(torch.tensor([[6.0, 6]]), torch.ones(1, 2).bool())
    # weights 1/3 and 2/3: the mean is (2 + 2 * 6) / 3, the mean square (5 + 2 * 36) / 3
    assert norm.mean_std() == pytest.approx((14 / 3, (77 / 3 - (14 / 3) ** 2) ** 0.5))
    x = torch.tensor([-3.0, 0, 14 / 3, 50])
    close(norm.normalise(x), (x - 14 / 3) / (35 / 9) ** 0.5)
    close(norm.denormalise(norm.normalise(x)), x)
    close(norm.normalise(norm.denormalise(x)), x)


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
    out = policy_loss(logp, old, torch.tensor([advantage]), clip=0.2)
    close(out.detach(), [loss])
    out.backward()
    close(logp.grad, [gradient])


@pytest.mark.parametrize(
    "value, old, target, clip, loss, gradient",  # 0.5 * max((V - R)^2, (clip(V) - R)^2); V - R, or 0 where clipped
    [
        (0.6, 0.5, 0.0, 0.2, 0.18, 0.6),  # within the clip
        (1.0, 0.5, 2.0, 0.2, 0.845, 0.0),  # moved to 0.7 at most: (0.7 - 2)^2 is the larger
        (1.0, 0.5, 2.0, 0.0, 0.5, -1.0),  # no clipping
        (1.0, 0.5, 0.0, 0.2, 0.5, 1.0),  # moved away from the target: unclipped is the larger
        (-1.0, 0.5, -2.0, 0.2, 2.645, 0.0),  # moved to 0.3 at most
    ],
)
def test_value_loss_by_hand(value, old, target, clip, loss, gradient):
    v = torch.tensor([value], requires_grad=True)
    out = value_loss(v, torch.tensor([old]), torch.tensor([target]), clip)
    close(out.detach(), [loss])
    out.backward()
    close(v.grad, [gradient])


# ------------------------------------------------------------------------------------------------ models on tokens


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_log_probs_and_entropy_are_those_of_a_padded_plain_forward(temperature):
    batch, (policy, _) = solutions(), models()
    plan = batch.plan(list(range(8)), 100)
    with torch.no_grad():
        expected = plain_log_probs(deepcopy(policy), batch, temperature)
    logp = old_log_probs(policy, batch, plan, temperature)
    entropy = batch.map(lambda _, *packed: policy(*packed, temperature, entropy=True)[1], plan, "cpu")
    for got, want in zip((logp, entropy), expected):
        close(got, want)
        assert want[batch.mask].std() > 0.05  # the models are not so dull that anything would pass


def test_score_values_ends_with_the_critics_value_at_the_last_token():
    batch, (_, critic) = solutions(), models()
    with torch.no_grad():
        expected = plain_values(deepcopy(critic), batch)
    for got, want in zip(score_values(critic, batch, batch.plan(list(range(8)), 100), "cpu"), expected):
        close(got, want)
        assert want.std() > 0.05


@pytest.mark.parametrize("chunk", [1, 100, 2**26])
@pytest.mark.parametrize("temperature, bias", [(1.0, False), (0.7, True)])
def test_chunked_log_probs_and_their_gradients_are_those_of_one_log_softmax(monkeypatch, chunk, temperature, bias):
    N, H, V = 11, 6, 30
    monkeypatch.setattr(TokenLogProbs, "CHUNK", chunk)  # logits: 1, 3 and all rows at a time
    rng = torch.Generator().manual_seed(0)
    hidden, weight, b = (torch.randn(*n, generator=rng, requires_grad=True) for n in ((N, H), (V, H), (V,)))
    targets, g = torch.randint(V, (N,), generator=rng), torch.randn(N, generator=rng)
    inputs = [hidden, weight] + [b] * bias
    full = ((hidden @ weight.T + (b if bias else 0)) / temperature).log_softmax(-1)
    expected = full[torch.arange(N), targets]
    logp, entropy = TokenLogProbs.apply(hidden, weight, b if bias else None, targets, temperature, True)
    close(logp, expected)
    close(entropy, -(full.exp() * full).sum(-1))
    assert not entropy.requires_grad
    for got, want in zip(torch.autograd.grad(logp, inputs, g), torch.autograd.grad(expected, inputs, g)):
        close(got, want)
    with torch.no_grad():
        assert TokenLogProbs.apply(hidden, weight, None, targets, 1.0, False)[1].tolist() == [0] * N


# ------------------------------------------------------------------------------------------------ update


def step(policy, critic, batch, rollout, plans, lr=1.0, **options):
    """`update` with plain gradient descent; metrics."""
    optimizers = tuple(torch.optim.SGD(m.parameters(), lr=lr) for m in (policy, critic))
    options = dict(temperature=TEMPERATURE, clip=CLIP, value_clip=VALUE_CLIP, max_grad_norm=1e9) | options
    return update(policy, critic, optimizers, batch, rollout, plans, **options)


def moved(model, before):
    return flat(before.parameters()).detach() - flat(model.parameters()).detach()


BUDGETS = {1: 8, 120: 6, 160: 5, 240: 3, 400: 2, 10_000: 1}  # tokens, and the micro-batches that they make of 8 answers
CUTS = {f"micro-batches of {n}": [list(range(i, i + n)) for i in range(0, 8, n)] for n in (1, 2, 4, 8)}
CUTS |= {f"token budget {budget}": solutions().plan(list(range(8)), budget) for budget in BUDGETS}


@pytest.fixture(scope="module")
def naive_gradients():
    """Gradients of policy and critic, of one padded plain forward and a mean over all response tokens; and metrics."""
    batch, (policy, critic) = solutions(), models()
    data = noisy_rollout(policy, batch, [list(range(8))])
    policy, critic, m = deepcopy(policy), deepcopy(critic), batch.mask
    logp, entropy = plain_log_probs(policy, batch, TEMPERATURE)
    ratio = (logp - data.logp).exp()[m]
    losses = (
        policy_loss(logp[m], data.logp[m], data.advantages[m], CLIP).mean(),
        value_loss(plain_values(critic, batch)[0][m], data.values[m], data.returns[m], VALUE_CLIP).mean(),
    )
    gradients = []
    for loss, model in zip(losses, (policy, critic)):
        loss.backward()
        gradients.append(flat([torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]))
    metrics = {
        "policy_loss": losses[0], "value_loss": losses[1], "entropy": entropy[m].mean(),
        "approx_kl": (ratio - 1 - ratio.log()).mean(), "clip_fraction": ((ratio - 1).abs() > CLIP).float().mean(),
        "max_ratio_error_first": (ratio - 1).abs().max(),
        "grad_norm_policy": gradients[0].norm(), "grad_norm_critic": gradients[1].norm(), "skipped_steps": torch.zeros(()),
    }  # fmt: skip
    assert 0.1 < metrics["clip_fraction"] < 0.9 and min(g.abs().max() for g in gradients) > 0.05
    return gradients, {name: x.item() for name, x in metrics.items()}


@pytest.mark.parametrize("cut", CUTS)
def test_the_gradient_is_the_token_mean_however_the_minibatch_is_cut(cut, naive_gradients):
    batch, before, after = solutions(), models(), models()
    metrics = step(*after, batch, noisy_rollout(before[0], batch, [list(range(8))]), [CUTS[cut]])
    for model, old, gradient in zip(after, before, naive_gradients[0]):
        close(moved(model, old), gradient)
    assert metrics == pytest.approx(naive_gradients[1], abs=1e-4)


def test_token_budgets_cut_differently():
    assert {budget: len(CUTS[f"token budget {budget}"]) for budget in BUDGETS} == BUDGETS


def test_metrics_are_means_over_the_tokens_of_all_minibatches(naive_gradients):
    batch, pair = solutions(), models()
    data, halves = noisy_rollout(pair[0], batch, [list(range(8))]), ([[0, 1, 2], [3]], [[4, 5], [6, 7]])
    metrics, *alone = (step(*pair, batch, data, plans, lr=0) for plans in (halves, halves[:1], halves[1:]))
    for name, mean in naive_gradients[1].items():
        if name.startswith("grad_norm"):
            mean = sum(m[name] for m in alone) / 2
        elif name == "max_ratio_error_first":
            mean = alone[0][name]
        assert metrics[name] == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ratio_is_exactly_1_on_the_first_minibatch(dtype):
    batch, pair = solutions(), models()
    plans = [batch.plan(rows, 100) for rows in minibatches(list(range(8)), 8, 2, seed=0)]
    other = models()
    for policy, critic in (pair, other):
        policy.to(dtype), critic.lm.to(dtype)
    data = noisy_rollout(pair[0], batch, plans[0] + plans[1])
    data.logp = old_log_probs(pair[0], batch, plans[0] + plans[1])
    off = step(*other, batch, data, plans, temperature=1.0)["max_ratio_error_first"]
    metrics = step(*pair, batch, data, plans)
    assert metrics["max_ratio_error_first"] == 0.0
    assert metrics["approx_kl"] > 1e-4  # the second minibatch meets a policy that has moved
    assert off > 0.1  # a temperature other than the sampler's shows at once


def test_policy_and_critic_side_by_side_learn_as_one_after_the_other():
    batch, results = solutions(), []
    for threads in (1, 2):
        pair = models()
        data = noisy_rollout(pair[0], batch, [list(range(8))])
        torch.set_num_threads(threads)
        try:
            metrics = step(*pair, batch, data, [[[0, 1], [2, 3]], [[4, 5, 6, 7]]])
        finally:
            torch.set_num_threads(1)
        results.append((metrics, *(flat(m.parameters()).detach() for m in pair)))
    (a, *one), (b, *other) = results
    assert a == pytest.approx(b, abs=1e-5)
    for x, y in zip(one, other):
        close(x, y)


def test_the_gradient_is_clipped_to_the_given_norm():
    batch, before, after = solutions(), models(), models()
    data = noisy_rollout(before[0], batch, [list(range(8))])
    metrics = step(*after, batch, data, [[list(range(8))]], max_grad_norm=0.05)
    for model, old, name in zip(after, before, ("policy", "critic")):
        assert moved(model, old).norm().item() == pytest.approx(0.05, abs=1e-5)
        assert metrics[f"grad_norm_{name}"] > 0.1  # logged as it was before


def test_without_train_policy_only_the_critic_moves():
    batch, before, after = solutions(), models(), models()
    data = noisy_rollout(before[0], batch, [list(range(8))])
    optimizers = None, torch.optim.SGD(after[1].parameters(), lr=1)  # the policy's is not even asked
    metrics = update(*after, optimizers, batch, data, [[[0, 1]], [[2, 3]]], train_policy=False)
    assert (moved(after[0], before[0]) == 0).all() and metrics["grad_norm_policy"] == 0
    assert moved(after[1], before[1]).abs().max() > 0.01
    assert all(p.grad is None for p in after[0].parameters())  # nothing left over for the first real step


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


# ------------------------------------------------------------------------------------------------ two processes

HALVES = [0, 1, 2, 4], [3, 5, 6, 7]
COUNT, SEED = 4, 11  # minibatches of two answers: the first with one of each half, later ones with both of one half


def iterate(mine):
    """One `update` of four steps on the rows `mine` of the eight answers: parameters, and all averages."""
    full, (policy, critic) = solutions(), models()
    data = noisy_rollout(policy, full, [list(range(8))])
    batch = Batch([full.prompts[i] for i in mine], [full.responses[i] for i in mine], full.truncated[mine])
    cut = lambda x: x[mine, : batch.mask.shape[1]]
    part = Experience(cut(data.logp), whiten(cut(data.advantages) + 1, batch.mask), cut(data.values), cut(data.returns))
    norm = ValueNorm()
    norm.update(part.returns, batch.mask)
    plans = [batch.plan(rows, 150) for rows in minibatches(mine, 8, COUNT, SEED)]
    metrics = step(policy, critic, batch, part, plans, lr=0.5, max_grad_norm=0.5)
    metrics["explained_variance"] = explained_variance(part.values, part.returns, batch.mask)
    metrics["mean"], metrics["std"] = norm.mean_std()
    return [flat(m.parameters()).detach() for m in (policy, critic)], metrics


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
    expected, expected_metrics = iterate(list(range(8)))
    while not running.join():
        pass
    for rank in (0, 1):
        parameters, metrics = torch.load(tmp_path / f"{rank}.pt")
        for got, want, before in zip(parameters, expected, models()):
            close(got, want)
            assert (want - flat(before.parameters())).abs().max() > 0.02
        assert metrics == pytest.approx(expected_metrics, abs=1e-4)
