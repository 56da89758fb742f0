"""PPO for token sequences with rewards at any token: GAE, whitening, value normalisation, the losses, the updates.

    A_t  = sum over l >= t of (gamma * lambda)^(l-t) * (R_l + gamma * V_(l+1) - V_l)     `gae`; R_t: the token's reward
    L_pi = - mean over tokens of min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A)       `policy_loss`
    L_V  = 0.5 * mean over tokens of max((V - G)^2, (clip(V, V_old +- eps_V) - G)^2)     `value_loss`; G_t = A_t + V_t

Tensors are (B, T): B responses of up to T tokens, response_mask true on those that a row has. Only these small tensors
are padded; models see packed rows of N tokens. All sums are divided by the number of response tokens of the whole
minibatch over all ranks, so the gradient depends neither on micro-batches nor on the number of ranks. A micro-batch may
be empty: with sharded models all ranks must take part in each forward and backward pass.

Left out: adaptive KL coefficients, entropy bonus, dual clip, early stopping by KL. Needs torch alone: the updates call
models as model.py's `Policy` and `ScalarModel` are called, with micro-batches like those of rollout.py. Nothing to run
here: train.py calls `gae`, `whiten`, `update_policy`, `update_critic`.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def all_reduce(x: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
    """Sum or maximum over the ranks, on the CPU."""
    y = x.detach().to("cpu", copy=True)
    if dist.is_initialized():
        dist.all_reduce(y, op)
    return y


# ------------------------------------------------------------------------------------------------ advantages


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, bootstrap: Tensor, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438) on rows of unequal length: advantages and returns (B, T).

    rewards, values (B, T). bootstrap (B,) is the value of the state after the last token: V(s_T) where the length limit
    cut the response, for it would have gone on, and 0 behind an EOS. Every row has a token."""
    last = response_mask.sum(1) - 1  # (B,)
    next_values = F.pad(values[:, 1:], (0, 1)).scatter(1, last[:, None], bootstrap[:, None])
    deltas = (rewards + gamma * next_values - values) * response_mask
    advantages, running = torch.zeros_like(rewards), torch.zeros_like(bootstrap)
    for t in reversed(range(rewards.shape[1])):
        running = deltas[:, t] + gamma * lam * running  # 0 behind a row's end, where the sum starts
        advantages[:, t] = running
    return advantages, (advantages + values) * response_mask


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the mask, over all ranks."""
    total, count = all_reduce(torch.stack([(x * mask).sum(dtype=torch.float64), mask.sum(dtype=torch.float64)]))
    return total / count.clamp(min=1)


def whiten(advantages: Tensor, response_mask: Tensor) -> Tensor:
    """Zero mean and unit variance over the response tokens of the whole rollout, over all ranks."""
    mean = masked_mean(advantages, response_mask)
    std = masked_mean((advantages - mean) ** 2, response_mask).sqrt()
    return ((advantages - mean) / (std + 1e-5) * response_mask).float()


def variance(x: Tensor, mask: Tensor) -> float:
    return (masked_mean(x**2, mask) - masked_mean(x, mask) ** 2).item()


def explained_variance(values: Tensor, returns: Tensor, response_mask: Tensor) -> float:
    """1 - Var(G - V) / Var(G) of the returns G: 1 for a perfect critic, 0 for a constant one (and where all returns are
    equal, so that nothing is to be explained), below 0 for one that misleads."""
    total = variance(returns, response_mask)
    return 1 - variance(returns - values, response_mask) / total if total > 1e-12 else 0.0


class ValueNorm:
    """Mean and standard deviation of the returns, so that the critic predicts numbers of order 1 and clipping its
    change at 0.2 means something. Debiased exponential averages of mean and mean square, as in ReaLHF: at this decay,
    in effect the average over the whole run."""

    def __init__(self, decay: float = 0.99995):
        self.decay = decay
        self.sums = torch.zeros(3, dtype=torch.float64)  # of x, of x^2, of 1 (the debiasing term)

    def update(self, returns: Tensor, response_mask: Tensor) -> None:
        means = [masked_mean(returns, response_mask), masked_mean(returns**2, response_mask)]
        new = torch.stack([*means, torch.ones((), dtype=torch.float64)])
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


def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """PPO's clipped objective (arXiv 1707.06347, eq. 7), negated, for each token (N,)."""
    ratio = (logp - old_logp).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """Half the squared error for each token (N,), the larger of clipped and unclipped; 0 switches clipping off."""
    loss = (values - returns) ** 2
    if clip_range:
        clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
        loss = torch.maximum(loss, (clipped - returns) ** 2)
    return 0.5 * loss


@dataclass
class Experience:
    """What the update reads beside the tokens, all (B, T)."""

    response_mask: Tensor
    logp: Tensor  # of the policy that sampled, recomputed by the training forward: a KV cache rounds differently
    advantages: Tensor  # whitened
    values: Tensor  # the critic's outputs before the update, normalised
    returns: Tensor  # normalised

    def of(self, rows: list[int], device) -> list[Tensor]:
        """logp, advantages, values, returns (N,) of the response tokens of these rows."""
        mask = self.response_mask[rows]
        return [x[rows][mask].to(device) for x in (self.logp, self.advantages, self.values, self.returns)]


def minibatches(keys: list[int], total: int, count: int, seed: int) -> list[list[int]]:
    """Deal this rank's rows into `count` minibatches. keys: the global index of each row, of `total`. The deal is made
    over global indices, so the union over ranks is the same whatever the number of ranks."""
    place = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).argsort()  # of each index in the deal
    dealt = [[] for _ in range(count)]
    for row, key in enumerate(keys):
        dealt[int(place[key]) * count // total].append(row)
    return dealt


def optimizer_step(model: nn.Module, optimizers: list, max_grad_norm: float) -> float:
    """Sum the gradients over the ranks (losses are already divided by global counts), clip, step; returns their norm. A
    step whose norm is not finite is skipped."""
    params = [p for p in model.parameters() if p.requires_grad]
    if dist.is_initialized() and not isinstance(params[0], DTensor):  # those of sharded models are summed already
        for p in params:  # a rank without rows has none, but must take part
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = nn.utils.parameters_to_vector([p.grad for p in params])
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat, [p.grad for p in params])
    norm = nn.utils.clip_grad_norm_(params, max_grad_norm)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    for optimizer in optimizers:
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
    return norm


def count_tokens(minibatches: list[list], response_mask: Tensor) -> list[float]:
    """Response tokens of each minibatch, over all ranks."""
    sizes = [sum(float(response_mask[micro.rows].sum()) for micro in batch) for batch in minibatches]
    return all_reduce(torch.tensor(sizes, dtype=torch.float64)).tolist()


def last_micro_batch(model: nn.Module, last: bool) -> None:
    """Among several nodes, sum the gradients once per step; within a node FSDP sums them in each backward pass, since
    nobody has room for all of them."""
    if hasattr(model, "set_requires_all_reduce"):
        model.set_requires_all_reduce(last)


def averages(sums: dict[str, Tensor], counts: list[float], norms: list[float], name: str) -> dict[str, float]:
    """Means over the response tokens of all minibatches and ranks, the mean norm, how many steps were skipped."""
    means = all_reduce(torch.stack([*sums.values()])) / max(sum(counts), 1)
    skipped = sum(not math.isfinite(norm) for norm in norms)
    log = {**dict(zip(sums, means.tolist())), f"skipped_{name}": skipped}
    return log | {f"grad_norm_{name}": sum(norms) / max(len(norms), 1)}


def update_policy(
    policy: nn.Module, optimizer, minibatches: list[list], counts: list[float], experience: Experience, *,
    temperature: float, clip_range: float, max_grad_norm: float, learn: bool = True,
) -> dict[str, float]:
    """One optimizer step for each minibatch, a list of micro-batches with rows, packed, predict_at and targets: as many
    on every rank. policy(packed, predict_at, targets, temperature, True) gives log-probabilities and entropies (N,).

    counts: from `count_tokens`. learn: False measures alone. Returns metrics; `max_ratio_error_first`, max |ratio - 1|
    on the first minibatch, is 0 unless log-probabilities are wrong."""
    device, sums, errors, norms = next(policy.parameters()).device, defaultdict(float), [], []
    for batch, count in zip(minibatches, counts):
        for micro in batch:
            last_micro_batch(policy, micro is batch[-1])
            old_logp, advantages, _, _ = experience.of(micro.rows, device)
            with torch.set_grad_enabled(learn):
                logp, entropy = policy(micro.packed, micro.predict_at, micro.targets, temperature, True)
                loss = policy_loss(logp, old_logp, advantages, clip_range)
            if learn:
                (loss.sum() / count).backward()
            log_ratio = (logp - old_logp).detach()
            ratio_minus_1 = log_ratio.expm1()
            if batch is minibatches[0]:
                errors.append(F.pad(ratio_minus_1.abs(), (0, 1)).max())  # 0 where the micro-batch is empty
            terms = {"policy_loss": loss.detach(), "entropy": entropy, "approx_kl": ratio_minus_1 - log_ratio}
            terms["clip_fraction"] = ratio_minus_1.abs() > clip_range
            for name, x in terms.items():
                sums[name] += x.sum(dtype=torch.float64)
        if learn:
            norms.append(optimizer_step(policy, [optimizer], max_grad_norm))
    error = all_reduce(torch.stack(errors).max(), dist.ReduceOp.MAX).item()
    return {**averages(sums, counts, norms, "policy"), "max_ratio_error_first": error}


def update_critic(
    critic: nn.Module, optimizer, minibatches: list[list], counts: list[float], experience: Experience, *,
    clip_range: float, max_grad_norm: float,
) -> dict[str, float]:
    """The same for the critic: critic(packed)[predict_at] are the values (N,) before each response token."""
    device, sums, norms = next(critic.parameters()).device, defaultdict(float), []
    for batch, count in zip(minibatches, counts):
        for micro in batch:
            last_micro_batch(critic, micro is batch[-1])
            _, _, old_values, returns = experience.of(micro.rows, device)
            loss = value_loss(critic(micro.packed)[micro.predict_at], old_values, returns, clip_range)
            (loss.sum() / count).backward()
            sums["value_loss"] += loss.detach().sum(dtype=torch.float64)
        norms.append(optimizer_step(critic, [optimizer], max_grad_norm))
    return averages(sums, counts, norms, "critic")
