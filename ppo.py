"""PPO for token sequences with rewards at any token: log-probabilities, GAE, whitening, value normalisation, the update.

    A_t  = sum over l >= t of (gamma * lambda)^(l-t) * (R_l + gamma * V_(l+1) - V_l)        `gae`; R_t: the token's reward
    L_pi = - mean over tokens of min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A)          `policy_loss`
    L_V  = 0.5 * mean over tokens of max((V - G)^2, (clip(V, V_old +- eps_V) - G)^2)        `value_loss`; G_t = A_t + V_t

Tensors are (B, T): B responses of up to T tokens. Only these small tensors are padded; models see packed rows of N tokens.
All sums are divided by the number of response tokens of the whole minibatch over all ranks, so the gradient depends
neither on micro-batches nor on the number of ranks. A micro-batch may be empty: a rank that has fewer than another runs
empty ones, since with sharded models all ranks must take part in each forward and backward pass.

The last section says what all of it takes in memory and time: `python train.py --plan`.

Left out: adaptive KL coefficients, entropy bonus, dual clip, early stopping by KL.

Nothing to run here; train.py calls `Policy`, `score_values`, `gae`, `whiten` and `update` in this order.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import (
    Packed, all_reduce, hidden_states, last_micro_batch, optimizer_step, parameters, side_by_side, width,
)  # fmt: skip
from rollout import PREFILL, Batch


# ------------------------------------------------------------------------------------------------ models on tokens


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
        logp, entropy = (hidden.new_zeros(len(hidden), dtype=torch.float32) for _ in range(2))
        for rows, full in TokenLogProbs.log_softmax(hidden, weight, bias, temperature):
            logp[rows] = full.gather(-1, targets[rows, None]).squeeze(-1)
            if entropy_too:
                entropy[rows] = -(full.exp() * full).sum(-1)
            del full  # or it would live beside the next one
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
            del full, d_logits
        return d_hidden, d_weight, d_bias, None, None, None


class Policy(nn.Module):
    """A causal LM read as a policy: log pi(token) and entropy (0 unless asked for) of the response tokens, both (N,)
    float32. The sampler, the reference and the training forward divide by the same temperature, or the ratio would compare
    two different policies."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm

    def forward(
        self, packed: Packed, keep: Tensor, targets: Tensor, temperature: float, entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        head = self.lm.get_output_embeddings()
        hidden = hidden_states(self.lm, packed)[keep]
        return TokenLogProbs.apply(hidden, head.weight, head.bias, targets, temperature, entropy)


@torch.no_grad()
def score_values(critic, batch: Batch, plan: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """The critic's raw outputs: V(s_t) (B, T) before each token, and V(s_T) (B,) behind the last."""
    final = torch.zeros(len(batch.prompts))

    def values(rows, packed, keep, targets):
        v = critic(packed)
        final[rows] = v[packed.last[: len(rows)]].cpu()
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
    """1 - Var(G - V) / Var(G) of the returns G: 1 for a perfect critic, 0 for a constant one (and where all returns are
    equal, so that nothing is to be explained), below 0 for one that misleads."""
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
    """Half the squared error for each token (N,), the larger of clipped and unclipped; clip 0 switches clipping off."""
    loss = (values - returns) ** 2
    if clip:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (clipped - returns) ** 2)
    return 0.5 * loss


@dataclass
class Experience:
    """What `update` needs beside the batch, all (B, T)."""

    logp: Tensor  # of the policy that sampled, recomputed by the training forward: a KV cache rounds differently
    advantages: Tensor  # whitened
    values: Tensor  # the critic's outputs before the update, normalised
    returns: Tensor  # normalised


def minibatches(keys: list[int], total: int, count: int, seed: int) -> list[list[int]]:
    """Deal this rank's rows into `count` minibatches. keys: the global index of each row, of `total`. The deal is made
    over global indices, so the union over ranks is the same whatever the number of ranks."""
    place = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).argsort()  # of each index in the deal
    dealt = [[] for _ in range(count)]
    for row, key in enumerate(keys):
        dealt[int(place[key]) * count // total].append(row)
    return dealt


def update(
    policy: Policy,
    critic: nn.Module,
    optimizers: tuple,
    batch: Batch,
    experience: Experience,
    plans: list[list[list[int]]],
    *,
    temperature: float = 1.0,
    clip: float = 0.2,
    value_clip: float = 0.2,
    max_grad_norm: float = 1.0,
    train_policy: bool = True,
) -> dict[str, float]:
    """One optimizer step of policy and critic for each plan (one minibatch, cut into micro-batches: as many on every
    rank). Returns metrics, averaged over the response tokens of all minibatches; `max_ratio_error_first` is
    max |ratio - 1| on the first, `skipped_steps` counts those whose gradient was not finite."""
    device = next(policy.parameters()).device
    counts = [all_reduce(torch.tensor(float(sum(batch.mask[rows].sum() for rows in plan)))).item() for plan in plans]
    errors = []  # max |ratio - 1| of each micro-batch

    def policy_terms(packed, keep, targets, take):
        logp, entropy = policy(packed, keep, targets, temperature, entropy=True)
        loss = policy_loss(logp, take(experience.logp), take(experience.advantages), clip)
        log_ratio = (logp - take(experience.logp)).detach()
        off = log_ratio.expm1()  # ratio - 1
        errors.append(F.pad(off.abs(), (0, 1)).max())  # 0 where the micro-batch is empty
        return loss, entropy, off - log_ratio, (off.abs() > clip).float()

    def value_terms(packed, keep, targets, take):
        values = critic(packed)[keep]
        return (value_loss(values, take(experience.values), take(experience.returns), value_clip),)

    def train(model, optimizer, terms, learn=True):
        """Sums over the tokens of the terms, of which the first is the loss, and the norms of the gradients."""
        sums, norms = torch.zeros((), device=device), []
        for plan, count in zip(plans, counts):
            for i, rows in enumerate(plan):
                last_micro_batch(model, i == len(plan) - 1)
                take = lambda x: x[rows][batch.mask[rows]].to(device)  # noqa: B023
                with torch.set_grad_enabled(learn):
                    loss, *more = terms(*batch.pack(rows, device), take)
                if learn:
                    (loss.sum() / count).backward()
                sums = sums + torch.stack([x.detach().sum(dtype=torch.float64) for x in (loss, *more)])
            if learn:
                norms.append(optimizer_step(model, [optimizer], max_grad_norm))
        return sums.cpu(), norms

    (policy_sums, policy_norms), (value_sums, value_norms) = side_by_side(
        lambda: train(policy, optimizers[0], policy_terms, train_policy),
        lambda: train(critic, optimizers[1], value_terms),
    )
    names = ("policy_loss", "entropy", "approx_kl", "clip_fraction", "value_loss")
    means = all_reduce(torch.cat([policy_sums.expand(4), value_sums.expand(1)])) / max(sum(counts), 1)
    first = torch.stack(errors[: len(plans[0])]).max().cpu() if plans[0] else torch.zeros(())
    return dict(zip(names, means.tolist())) | {
        "max_ratio_error_first": all_reduce(first, "max").item(),
        "grad_norm_policy": sum(policy_norms) / max(len(policy_norms), 1),
        "grad_norm_critic": sum(value_norms) / max(len(value_norms), 1),
        "skipped_steps": sum(not math.isfinite(norm) for norm in policy_norms + value_norms),
    }


# ------------------------------------------------------------------------------------------------ what an iteration takes


RESERVE = 6e9  # bytes of a GPU for CUDA, cuBLAS, NCCL, captured graphs, and what a fragmented allocator cannot use
FLOPS, BANDWIDTH, EFFICIENCY = 989e12, 3.35e12, 0.4  # of an H100 in bfloat16, and the share of either that is reached
PHASES = "sampling", "scoring", "update"


def kept_bytes(config, b: int, cuda: bool) -> tuple[int, int]:
    """Bytes of a token that autograd keeps for the backward pass: of one layer, and of all outside the layers. The residual
    stream is not kept twice: a sum needs neither of its terms, and its result is the next norm's input."""
    H, I, Q, K = width(config)
    Hq, Hkv = config.num_attention_heads, config.num_key_value_heads
    layer = b * (
        H + H  # the input of the norm, and its output, from which q, k and v are projected
        + Q + K + K  # queries and keys after the rotation, values: what attention reads
        + Q  # attention's output, which both its backward and the output projection read
        + (0 if cuda else Q)  # on a CPU twice, for the runs of equal length are put together again
        + H + H  # the second norm, and its output for gate and up
        + I + I + I + I  # gate; silu(gate) and up, the factors; their product, which the down projection reads
    )  # fmt: skip
    layer += 4 * Hq  # attention's log-sum of the softmax, float32
    norms = 2  # of which CUDA's kernel keeps a float32 a row; model.RMSNorm computes it again
    if config.model_type == "qwen3":
        layer += b * (Q + K)  # inputs of the norms of each head
        norms += Hq + Hkv
    outside = b * (H + 2 * Q // Hq) + 8  # the last norm's input; cos and sin, which the layers share; the token's id
    return layer + 4 * norms * cuda, outside + 4 * cuda


def memory(
    config, o, *, shards: int, ranks: int, longest: int, reward_config=None, b: int = 2, cuda: bool = True,
    sharded: bool = True, chunk: int = 2**28,
) -> dict[str, float]:  # fmt: skip
    """Bytes on each GPU by part, from the model's shape and train.py's options `o` alone.

    shards: GPUs that share a model; ranks: all of them. longest: tokens of a prompt and its answer. reward_config: shape of
    the reward model, if it is another. b: bytes of the forwards' dtype. chunk: TokenLogProbs.CHUNK. What comes and goes has
    its phase in front; only the largest phase counts, see `peak`. Exact: parameters, and what autograd keeps. Estimated:
    what FSDP holds in flight."""
    (n, layer, root, untied), (H, I, Q, K) = parameters(config), width(config)
    V, L, N = config.vocab_size, config.num_hidden_layers, o.token_budget
    answers = -(-o.questions // ranks) * o.samples
    slots, prompt = min(o.slots, max(answers, -(-o.eval_problems // ranks))), longest - o.max_new_tokens
    frozen, rm = 0 if o.offload_frozen else b / shards, parameters(reward_config or config)[0]
    parts = {
        "policy: weights": 4 * n / shards,
        "policy: AdamW": 8 * n / shards,
        "critic: weights": 4 * n / shards,
        "critic: AdamW": 8 * (n - untied) / shards,
        "reference": frozen * n,
        "reward model": 0 if o.reward == "success" else frozen * rm,
        "sampler's copy": b * n * sharded,
        "KV cache and slots": slots * (2 * L * longest * K * b + 16 * (o.max_new_tokens + 1) + 33),
        "packed rollout": 33 * answers * o.epochs * longest,  # ids, positions, targets, indices of all micro-batches
    }
    # One layer without gradients: its input, which its callers hold, the residual stream and the normed input; the larger
    # of the MLP's rows (silu(gate), up, their product) and attention's.
    forward = b * (4 * H + max(3 * I, 3 * Q + 3 * K))
    gathered = sharded * b * (4 * layer + root)  # this layer and the next, each as it arrives and as copied out; the root
    # A chunk of logits, and log_softmax: of bfloat16 it makes a float32 copy before the result.
    answer_tokens = N * o.max_new_tokens / longest
    rows, low = min(answer_tokens, max(chunk // V, 1)), b < 4
    softmax = rows * V * (b + 4 * low + 4)
    likelihood = N * V * (b + 4 * low + 4) if o.rm_likelihood and o.reward != "success" else 0
    # A step draws from logits, their softmax and a copy of that; top-p sorts: values, indices, sums, masks.
    step = slots * V * (b + (4 + 4 if o.top_p == 1 else 4 * 5 + 8))
    prefill = min(PREFILL, min(slots, -(-o.questions // ranks)) * prompt) * forward
    if cuda:
        parts["sampler's logits"] = step  # captured graphs never give them back
    parts["sampling"] = prefill if cuda else max(prefill, step)
    parts["scoring"] = max(N * forward, softmax + answer_tokens * b * H, likelihood) + gathered

    kept, outside = kept_bytes(config, b, cuda)
    each = b * H if o.checkpoint_activations else kept
    activations = N * (L * each + outside)
    # The update's three candidates. (1) Between the passes: all activations, and the logits of a chunk with their gradient,
    # while the output layer's own is summed in float32.
    d_logits = V * H * 4 + max(softmax, rows * V * (4 + b * low) + V * H * b)
    logits = answer_tokens * b * H + max(rows * V * (b + 3 * 4), d_logits + answer_tokens * b * H)
    # (2) In the last layer's backward pass: its activations once more if they were not kept, gradients of silu(gate) and up;
    # the output layer's gradient waits for the embedding's; a layer's gradients are reduced in float32.
    again = N * (b * 2 * I + kept - each)
    waiting = b * V * H if sharded or not untied else 0
    reducing = sharded * layer * (b + 8 + 8 / shards) or 4 * H * I
    # (3) At the end: the root's weights, and its gradients, as they are and in float32.
    end = sharded * (root * (3 * b + 4 + 4 / shards) + 4 * layer) or 3 * waiting
    moments = [(activations, logits, gathered), (activations + again, 0, gathered + waiting + reducing), (0, 0, end)]
    names = ("update: activations", "update: logits", "update: gathered weights and gradients")
    return parts | {"update: gradients": 4 * n / shards} | dict(zip(names, max(moments, key=sum)))


def peak(parts: dict[str, float]) -> float:
    """What lasts, and the largest phase of what comes and goes."""
    phases = [sum(x for name, x in parts.items() if name.startswith(phase)) for phase in PHASES]
    return sum(parts.values()) - sum(phases) + max(phases)


def hours(config, o, *, ranks: int, prompt: int = 150, b: int = 2, reward_config=None) -> dict[str, float]:
    """Hours of an iteration by phase: the slower of arithmetic and memory, at EFFICIENCY, for prompts of `prompt` tokens and
    answers half as long as they may be: how long they really are sets the time of everything, and is not known before.
    Left out: attention's products, FSDP's traffic, grading, the last answers that decode alone."""
    (n, _, _, untied), (H, _, _, K) = parameters(config), width(config)
    answer, answers, V = o.max_new_tokens / 2, -(-o.questions // ranks) * o.samples, config.vocab_size
    body, slots = n - untied - V * H, min(o.slots, answers)
    flops = lambda tokens, output: 2 * (body * tokens + V * H * output)  # of a forward; output: rows of logits
    # a decoding step reads the weights, the cache, half full on average, and the logits a few times
    read = b * (body + V * H) + slots * ((prompt + answer / 2) * 2 * config.num_hidden_layers * K * b + 20 * V)
    step = max(read / BANDWIDTH, flops(slots, slots) / FLOPS)
    tokens, out, passes = answers * (prompt + answer), answers * answer, 4 if o.checkpoint_activations else 3
    rm = 0 if o.reward == "success" else 2 * parameters(reward_config or config)[0] * tokens
    seconds = {
        "sampling": out / slots * step + flops(prompt * answers / o.samples, 0) / FLOPS,
        "scoring": (3 * flops(tokens, 0) + 2 * flops(0, out) + rm) / FLOPS,
        "update": o.epochs * (2 * passes * flops(tokens, 0) + 4 * flops(0, out)) / FLOPS,  # logits twice, see TokenLogProbs
    }
    return {phase: x / EFFICIENCY / 3600 for phase, x in seconds.items()}
