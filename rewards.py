"""The six rewards of "On Designing Effective RL Reward at Training Time for LLM Reasoning" (arXiv 2410.15115).

A solution has K steps; s_k in (0, 1) is the process reward model's score of the prefix that ends with step k. The paper
maximises  alpha * (sum of r_k, or r_outcome) + Correct - beta * log(pi / pi_ref);  `refine` turns s into r, and
`token_rewards` lays everything on the tokens. The example: eta = 0.5, s = (0.9, 0.8, 0.3, 0.6), the outcome reward
model says 0.7. The return-to-go G_k is what PPO (gamma = 1) credits to writing step k, in units of alpha:

    name        r_1   r_2   r_3   r_4   sum   G_k = r_k + ... + r_K
    success      0     0     0     0     0    0                       Correct alone
    orm          0     0     0    0.7   0.7   r_outcome               said once, whatever the number of steps
    prm         0.9   0.8   0.3   0.6   2.6   s_k + ... + s_K         one more good step pays its score: *unbounded*
    clip         0     0   -0.2    0   -0.2   sum of min(s_j - eta, 0)            <= 0: no step ever pays
    delta       0.1   0.5   0.3    0    0.9   s_k if k < K, 0 if k = K            < 1: later steps cancel out
    clip-delta   0    0.2  -0.2    0     0    min(s_k - eta, 0) if k < K, else 0  in [-eta, 0]

Why prm is hacked: G_1 grows with K, so the policy repeats correct but needless steps. Under delta the return from step k
on is the score of step k alone: bounded, yet not neutral, for s_k > 0 where answering at once (k = K) earns 0, and one
more step is always worth up to alpha. Clip-delta closes that hole: its returns are never positive.

Left out: shaping rewards that are not the paper's (potential-based, min-form, length-normalised).

Nothing to run here: `python -m doctest rewards.py` checks the example, `python train.py --reward NAME` uses it.

>>> s, mask = torch.tensor([[0.9, 0.8, 0.3, 0.6]]), torch.ones(1, 4, dtype=torch.bool)
>>> for name in PROCESS:
...     print(name, [round(r, 1) + 0.0 for r in refine(name, s, mask, eta=0.5)[0].tolist()])
prm [0.9, 0.8, 0.3, 0.6]
clip [0.0, 0.0, -0.2, 0.0]
delta [0.1, 0.5, 0.3, 0.0]
clip-delta [0.0, 0.2, -0.2, 0.0]
"""

import torch
from torch import Tensor

PROCESS = ("prm", "clip", "delta", "clip-delta")
REWARDS = ("success", "orm", *PROCESS)


def clip(scores: Tensor, eta: float) -> Tensor:
    """PR-Clip: r_k = min(s_k - eta, 0)."""
    return (scores - eta).clamp(max=0)


def delta(scores: Tensor, mask: Tensor) -> Tensor:
    """PR-Delta: r_k = s_k - s_(k+1) for k < K-1, s_(K-1) for k = K-1, 0 for k = K.

    With the last score taken as 0, for the success reward judges that step, this is one difference."""
    pad = torch.zeros_like(scores[:, :1])
    has_next = torch.cat([mask, pad.bool()], 1)[:, 1:]
    scores = scores * has_next
    return scores - torch.cat([scores, pad], 1)[:, 1:]


def refine(name: str, scores: Tensor, mask: Tensor, eta: float = 0.5) -> Tensor:
    """Refined process rewards r (B, K) from step scores s (B, K), for K from 0 up. Paper, section on PR-Clip, PR-Delta.

    mask (B, K) is true on the steps that a row has, which come first; r is 0 elsewhere. Raises ValueError for a name
    that is no process reward."""
    if name not in PROCESS:
        raise ValueError(f"{name!r} is no process reward: choose one of {', '.join(PROCESS)}")
    scores = scores.float().masked_fill(~mask, 0)  # float32: delta subtracts neighbours, and bf16 near 1 steps by 0.004
    if "clip" in name:
        scores = clip(scores, eta) * mask
    if "delta" in name:
        scores = delta(scores, mask)
    return scores


def token_rewards(
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    correct: Tensor,
    truncated: Tensor,
    *,
    beta: float,
    alpha: float = 0.0,
    outcome: Tensor | None = None,
    steps: Tensor | None = None,
    step_ends: Tensor | None = None,
    step_mask: Tensor | None = None,
) -> Tensor:
    """The reward of each response token (B, T): the paper's objective, laid out in time.

    every response token        -beta * (logp - ref_logp)     logp, ref_logp, mask (B, T)
    last token of step k        + alpha * r_k                 steps, step_ends, step_mask (B, K)
    last token of the response  + Correct + alpha * r_outcome correct, truncated, outcome (B,)

    A truncated response has not answered: neither Correct nor an outcome. Its complete steps keep their rewards."""
    rewards = -beta * (logp - ref_logp) * mask  # (B, T)
    final = correct.float()
    if outcome is not None:
        final = final + alpha * outcome.float()
    last = (mask.sum(1) - 1)[:, None]
    rewards.scatter_add_(1, last, (final * ~truncated)[:, None])
    if steps is not None:
        ends = step_ends.masked_fill(~step_mask, 0)  # a place that exists, and gets 0
        rewards.scatter_add_(1, ends, alpha * steps * step_mask)
    return rewards
