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

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model import Packed, all_reduce, optimizer_step
from rollout import Batch


# ------------------------------------------------------------------------------------------------ models on tokens


def log_probs(model, packed: Packed, keep: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log pi(token) and entropy of the response tokens, both (N,) float32. The sampler, the reference and the training
    forward divide by the same temperature, or the ratio would compare two different policies."""
    out = model(
        input_ids=packed.ids, position_ids=packed.position_ids, seqs=packed, use_cache=False, logits_to_keep=keep
    )
    logp = (out.logits[0].float() / temperature).log_softmax(-1)  # (N, V)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), entropy


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
    progress=None,
) -> dict[str, float]:
    """One optimizer step of policy and critic for each plan (one minibatch, cut into micro-batches). Returns metrics,
    averaged over the response tokens of all minibatches; `max_ratio_error_first` is max |ratio - 1| on the first."""
    device = next(policy.parameters()).device
    sums = torch.zeros(6, dtype=torch.float64)
    first, norms = None, ([0.0], [0.0])
    for plan in plans:
        tokens = all_reduce(torch.tensor(float(sum(batch.mask[rows].sum() for rows in plan)))).item()
        worst = torch.zeros(())
        for rows in plan:
            packed, keep, targets = batch.pack(rows, device)
            old, A, V, R = (x[rows][batch.mask[rows]].to(device) for x in
                            (rollout.logp, rollout.advantages, rollout.values, rollout.returns))  # fmt: skip
            logp, entropy = log_probs(policy, packed, keep, targets, temperature)
            loss = policy_loss(logp, old, A, clip)
            if train_policy:
                (loss.sum() / tokens).backward()
            v_loss = value_loss(critic(packed)[keep], V, R, value_clip)
            (v_loss.sum() / tokens).backward()
            with torch.no_grad():
                log_ratio = logp - old
                ratio = log_ratio.exp()
                worst = torch.maximum(worst, (ratio - 1).abs().max().cpu())
                kinds = (loss, v_loss, entropy, ratio - 1 - log_ratio, ((ratio - 1).abs() > clip).float())
                sums += torch.stack([*(x.sum(dtype=torch.float64) for x in kinds), old.new_tensor(len(old))]).cpu()
            if progress:
                progress(len(rows))
        first = worst if first is None else first
        for model, optimizer in zip((policy, critic), optimizers):
            if model is policy and not train_policy:
                continue
            norms[model is critic].append(optimizer_step(model, [optimizer], max_grad_norm))
    *means, count = all_reduce(sums).tolist()
    names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")
    metrics = {name: x / max(count, 1) for name, x in zip(names, means)}
    metrics["max_ratio_error_first"] = all_reduce(first, "max").item()
    metrics["grad_norm_policy"], metrics["grad_norm_critic"] = (sum(n) / len(plans) for n in norms)
    return metrics
