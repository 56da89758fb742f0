"""PPO for token sequences with rewards at any token: log-probabilities, GAE, whitening, value normalisation, the update.

    A_t  = sum over l >= t of (gamma * lambda)^(l-t) * (r_l + gamma * V_(l+1) - V_l)        `gae`
    L_pi = - mean over tokens of min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A)          `policy_loss`
    L_V  = 0.5 * mean over tokens of max((V - R)^2, (clip(V, V_old +- eps_V) - R)^2)        `value_loss`

Tensors are (B, T): B responses of up to T tokens. Only these small tensors are padded; models see packed rows of N tokens.
All sums are divided by the number of response tokens of the whole minibatch over all ranks, so the gradient depends
neither on micro-batches nor on the number of ranks.

Left out: adaptive KL coefficients, entropy bonus, dual clip, early stopping by KL.

Nothing to run here; train.py calls `log_probs`, `score_values`, `gae`, `whiten` and `update` in this order.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Packed, all_reduce, hidden_states, optimizer_step, side_by_side
from rollout import Batch


# ------------------------------------------------------------------------------------------------ models on tokens


def log_probs(
    model, packed: Packed, keep: Tensor, targets: Tensor, temperature: float, entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """log pi(token) and entropy (0 unless asked for) of the response tokens, both (N,) float32. The sampler, the reference
    and the training forward divide by the same temperature, or the ratio would compare two different policies."""
    head = model.get_output_embeddings()
    hidden = hidden_states(model, packed)[keep]
    if torch.is_autocast_enabled(hidden.device.type):  # else the last norm's float32 would make the largest product slow
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return TokenLogProbs.apply(hidden, head.weight, head.bias, targets, temperature, entropy)


class TokenLogProbs(torch.autograd.Function):
    """log p(target) (N,) and entropy (N,) by an output layer, from hidden (N, H), weight (V, H), bias (V,) or None.

    The float32 logits exist for a chunk of rows at a time, and once more in the backward pass: (N, V) would be 2.5 GB
    for 4,096 tokens of a vocabulary of 150,000. The weight's gradient is summed over the chunks in float32."""

    CHUNK = 2**28 if torch.cuda.is_available() else 2**24  # logits

    @staticmethod
    def log_softmax(hidden, weight, bias, temperature):
        """Chunks of rows, and the log-probabilities (rows, V) of each."""
        weight, bias = (x if x is None else x.to(hidden.dtype) for x in (weight, bias))
        size = max(TokenLogProbs.CHUNK // len(weight), 1)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = F.linear(hidden[rows], weight, bias)
            if temperature != 1:
                logits = logits.float() / temperature
            yield rows, torch.log_softmax(logits, -1, dtype=torch.float32)

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, entropy_too):
        logp, entropy = hidden.new_zeros(2, len(hidden), dtype=torch.float32)
        for rows, full in TokenLogProbs.log_softmax(hidden, weight, bias, temperature):
            logp[rows] = full.gather(-1, targets[rows, None]).squeeze(-1)
            if entropy_too:
                entropy[rows] = -(full.exp() * full).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, bias, targets = ctx.saved_tensors
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        low = weight.to(hidden.dtype)
        for rows, full in TokenLogProbs.log_softmax(hidden, low, bias, ctx.temperature):
            g = grad[rows, None] / ctx.temperature
            d_logits = full.exp_().mul_(-g).scatter_add_(-1, targets[rows, None], g)
            if bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(hidden.dtype)
            d_hidden[rows] = d_logits @ low
            d_weight += d_logits.T @ hidden[rows]
        return d_hidden, d_weight, d_bias, None, None, None


@torch.no_grad()
def score_values(critic, batch: Batch, plan: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """The critic's raw outputs: V(s_t) (B, T) before each token, and V(s_T) (B,) behind the last."""
    final = torch.zeros(len(batch.prompts))

    def values(rows, packed, keep, targets):
        v = critic(packed)
        final[rows] = v[packed.last].cpu()
        return v[keep]

    return batch.map(values, plan, device), final


# ------------------------------------------------------------------------------------------------ advantages


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438) on rows of unequal length: advantages and returns (B, T).

    rewards, values, mask (B, T). bootstrap (B,) is the value of the state after the last token: V(s_T) where the length
    limit cut the response, for it would have gone on, and 0 behind an EOS."""
    advantages, running = torch.zeros_like(rewards), torch.zeros_like(bootstrap)
    last = mask.sum(1) - 1
    for t in reversed(range(mask.shape[1])):
        after = values[:, t + 1] if t + 1 < mask.shape[1] else bootstrap
        after = torch.where(last == t, bootstrap, after)
        delta = rewards[:, t] + gamma * after - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]  # 0 behind a row's end, where the sum starts
        advantages[:, t] = running
    return advantages, (advantages + values) * mask


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the mask, over all ranks."""
    total, count = all_reduce(torch.stack([(x * mask).sum(dtype=torch.float64), mask.sum(dtype=torch.float64)]))
    return total / count.clamp(min=1)


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit variance over the response tokens of the whole rollout, over all ranks."""
    mean = masked_mean(advantages, mask)
    std = masked_mean((advantages - mean) ** 2, mask).sqrt()
    return ((advantages - mean) / (std + 1e-5) * mask).float()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for a constant one (and where all returns are equal, so that
    nothing is to be explained), below 0 for one that misleads."""
    var = lambda x: (masked_mean(x**2, mask) - masked_mean(x, mask) ** 2).item()
    return 1 - var(returns - values) / var(returns) if var(returns) > 1e-12 else 0.0


class ValueNorm:
    """Running mean and standard deviation of the returns, so that the critic predicts numbers of order 1 and clipping its
    change at 0.2 means something. Debiased exponential averages of the mean and the mean square, as in ReaLHF."""

    def __init__(self, decay: float = 0.99995):
        self.decay = decay
        self.sums = torch.zeros(3, dtype=torch.float64)  # of x, of x^2, of 1 (the debiasing term)

    def update(self, returns: Tensor, mask: Tensor) -> None:
        new = torch.stack([masked_mean(returns, mask), masked_mean(returns**2, mask), torch.ones((), dtype=torch.float64)])
        self.sums = self.decay * self.sums + (1 - self.decay) * new

    def mean_std(self) -> tuple[float, float]:
        if self.sums[2] == 0:
            return 0.0, 1.0
        mean, square, _ = (self.sums / self.sums[2]).tolist()
        return mean, max(square - mean**2, 1e-4) ** 0.5

    def normalise(self, x: Tensor) -> Tensor:
        mean, std = self.mean_std()
        return (x - mean) / std

    def denormalise(self, x: Tensor) -> Tensor:
        mean, std = self.mean_std()
        return x * std + mean


# ------------------------------------------------------------------------------------------------ losses and update


def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's clipped objective (arXiv 1707.06347, eq. 7), negated, for each token (N,)."""
    ratio = (logp - old_logp).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Squared error for each token (N,), the larger of clipped and unclipped; clip 0 switches clipping off."""
    loss = (values - returns) ** 2
    if clip:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (clipped - returns) ** 2)
    return 0.5 * loss


@dataclass
class Rollout:
    """What `update` needs beside the batch, all (B, T)."""

    logp: Tensor  # of the policy that sampled, recomputed by the training forward: a KV cache rounds differently
    advantages: Tensor  # whitened
    values: Tensor  # the critic's outputs before the update, normalised
    returns: Tensor  # normalised


def minibatches(keys: list[int], total: int, count: int, seed: int) -> list[list[int]]:
    """Deal this rank's rows into `count` minibatches. keys: the global index of each row, of `total`. The deal is made
    over global indices, so the union over ranks is the same whatever the number of ranks."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    place = torch.empty_like(order)
    place[order] = torch.arange(total)
    dealt = [[] for _ in range(count)]
    for row, key in enumerate(keys):
        dealt[int(place[key]) * count // total].append(row)
    return dealt


def update(
    policy: nn.Module,
    critic: nn.Module,
    optimizers: tuple,
    batch: Batch,
    rollout: Rollout,
    plans: list[list[list[int]]],
    *,
    temperature: float = 1.0,
    clip: float = 0.2,
    value_clip: float = 0.2,
    max_grad_norm: float = 1.0,
    train_policy: bool = True,
    autocast=nullcontext,
) -> dict[str, float]:
    """One optimizer step of policy and critic for each plan (one minibatch, cut into micro-batches). Returns metrics,
    averaged over the response tokens of all minibatches; `max_ratio_error_first` is max |ratio - 1| on the first.

    autocast() is entered for each forward anew: it keeps low-precision copies of the weights, which a step makes stale."""
    device = next(policy.parameters()).device
    counts = [all_reduce(torch.tensor(float(sum(batch.mask[rows].sum() for rows in plan)))).item() for plan in plans]
    errors = []  # max |ratio - 1| of each micro-batch

    def policy_terms(packed, keep, targets, take):
        with autocast():
            logp, entropy = log_probs(policy, packed, keep, targets, temperature, entropy=True)
        loss = policy_loss(logp, take(rollout.logp), take(rollout.advantages), clip)
        log_ratio = (logp - take(rollout.logp)).detach()
        off = log_ratio.expm1()  # ratio - 1
        errors.append(off.abs().max())
        return loss, entropy, off - log_ratio, (off.abs() > clip).float()

    def value_terms(packed, keep, targets, take):
        with autocast():
            values = critic(packed)[keep]
        return (value_loss(values, take(rollout.values), take(rollout.returns), value_clip),)

    def train(model, optimizer, terms, learn=True):
        """Sums over the tokens of the terms, of which the first is the loss, and the mean norm of the gradient."""
        sums, norm = torch.zeros((), device=device), 0.0
        for plan, count in zip(plans, counts):
            for rows in plan:
                take = lambda x: x[rows][batch.mask[rows]].to(device)  # noqa: B023
                loss, *more = terms(*batch.pack(rows, device), take)
                if learn:
                    (loss.sum() / count).backward()
                sums = sums + torch.stack([x.detach().sum(dtype=torch.float64) for x in (loss, *more)])
            if learn:
                norm += optimizer_step(model, [optimizer], max_grad_norm) / len(plans)
        return sums.cpu(), norm

    (policy_sums, policy_norm), (value_sums, value_norm) = side_by_side(
        lambda: train(policy, optimizers[0], policy_terms, train_policy),
        lambda: train(critic, optimizers[1], value_terms),
    )
    names = ("policy_loss", "entropy", "approx_kl", "clip_fraction", "value_loss")
    means = all_reduce(torch.cat([policy_sums.expand(4), value_sums.expand(1)])) / max(sum(counts), 1)
    first = torch.stack(errors[: len(plans[0])]).max().cpu() if plans[0] else torch.zeros(())
    return dict(zip(names, means.tolist())) | {
        "max_ratio_error_first": all_reduce(first, "max").item(),
        "grad_norm_policy": policy_norm,
        "grad_norm_critic": value_norm,
    }
