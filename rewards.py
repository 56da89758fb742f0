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

Why prm is hacked: G_1 grows with K, so the policy repeats correct but needless steps. Under delta the return from step
k on is the score of step k alone: bounded, yet not neutral, for s_k > 0 where answering at once (k = K) earns 0, and
one more step is always worth up to alpha. Clip-delta closes that hole: its returns are never positive. The bound
survives both: with c_k = min(s_k - eta, 0) in [-eta, 0], r_k = c_k - c_(k+1), r_(K-1) = c_(K-1), r_K = 0, all that
follows step k telescopes to G_k = c_k for k < K and G_K = 0. So -eta <= G_k <= 0 whatever K is, and no step more ever
pays.

Left out: implicit rewards (log-likelihood ratios), rewards of several models at once.

Needs torch alone. `python -m doctest rewards.py` checks the example, `python train.py --reward NAME` uses it.

>>> s, mask = torch.tensor([[0.9, 0.8, 0.3, 0.6]]), torch.ones(1, 4, dtype=torch.bool)
>>> for name in PROCESS + BASELINES:
...     print(name, [round(r, 2) + 0.0 for r in refine(name, s, mask, eta=0.5)[0].tolist()])
prm [0.9, 0.8, 0.3, 0.6]
clip [0.0, 0.0, -0.2, 0.0]
delta [0.1, 0.5, 0.3, 0.0]
clip-delta [0.0, 0.2, -0.2, 0.0]
progress [0.9, -0.1, -0.5, -0.3]
min [0.0, 0.0, -0.4, 0.0]
normed [0.22, 0.2, 0.08, 0.15]
penalty [0.4, 0.3, -0.2, 0.1]
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PROCESS = ("prm", "clip", "delta", "clip-delta")
BASELINES = ("progress", "min", "normed", "penalty")  # not the paper's
REWARDS = ("success", "orm", *PROCESS, *BASELINES)


def clip(scores: Tensor, eta: float) -> Tensor:
    """PR-Clip: r_k = min(s_k - eta, 0)."""
    return (scores - eta).clamp(max=0)


def but_last(scores: Tensor, mask: Tensor) -> Tensor:
    """The scores with 0 for the last step, K: the success reward judges that one, or, in an answer cut off, nothing."""
    has_next = F.pad(mask, (0, 1))[:, 1:]  # (B, K)
    return scores * has_next


def delta(scores: Tensor, mask: Tensor) -> Tensor:
    """PR-Delta: r = s' - (s' one step later), where s' is s with s_K set to 0."""
    s = but_last(scores, mask)
    return s - F.pad(s, (0, 1))[:, 1:]


def progress(scores: Tensor, mask: Tensor) -> Tensor:
    """r = s' - (s' one step earlier): the potential is 0 before the first step and behind the last."""
    s = but_last(scores, mask)
    return s - F.pad(s, (1, 0))[:, :-1]


def min_form(scores: Tensor, mask: Tensor, temperature: float = 0.1) -> Tensor:
    """x_k times its softmax weight among -x / temperature, x_k = 2 s_k - 1: the sum is about the least x (PURE)."""
    x = 2 * scores - 1
    weights = torch.softmax((-x / temperature).masked_fill(~mask, -torch.inf), 1)
    return (x * weights).masked_fill(~mask, 0)  # where a row has no step, the weights are not numbers


def refine(name: str, scores: Tensor, mask: Tensor, eta: float = 0.5) -> Tensor:
    """Refined process rewards r (B, K) from step scores s (B, K), for K from 0 up. Paper, section on PR-Clip, PR-Delta.

    mask (B, K) is true on the steps that a row has, which come first; r is 0 elsewhere. Raises ValueError for a name
    that is no process reward. The last four are not among the paper's six; the example of above:

        progress    0.9  -0.1  -0.5  -0.3   0    -s_(k-1)        potential-based (Ng, Harada, Russell 1999)
        min          0     0   -0.4    0   -0.4  min x, x = 2 s - 1: r_k = x_k softmax(-x / 0.1)_k  (arXiv 2504.15275)
        normed      0.2   0.2   0.1   0.2   0.7  (s_k + ... + s_K) / K   the paper tried it, and found it insufficient
        penalty     0.4   0.3  -0.2   0.1   0.6  sum of s_j - eta        a step costs eta; one scored above pays"""
    s = scores.float().masked_fill(~mask, 0)  # float32: delta subtracts neighbours, and bf16 near 1 steps by 0.004
    match name:
        case "prm":
            return s
        case "clip":
            return clip(s, eta) * mask
        case "delta":
            return delta(s, mask)
        case "clip-delta":
            return delta(clip(s, eta) * mask, mask)
        case "progress":
            return progress(s, mask)
        case "min":
            return min_form(s, mask)
        case "normed":
            return s / mask.sum(1, keepdim=True).clamp(min=1)
        case "penalty":
            return (s - eta) * mask
    raise ValueError(f"{name!r} is no process reward: choose one of {', '.join(PROCESS + BASELINES)}")


def token_rewards(
    logp: Tensor,
    ref_logp: Tensor,
    response_mask: Tensor,
    correct: Tensor,
    truncated: Tensor,
    *,
    beta: float,
    alpha: float = 0.0,
    outcome: Tensor | None = None,
    steps: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """The reward of each response token (B, T): the paper's objective, laid out in time. Every row has a token.

    every response token        -beta * (logp - ref_logp)     logp, ref_logp, response_mask (B, T)
    last token of step k        + alpha * r_k                 steps: r, token_ends and step_mask, all (B, K)
    last token of the response  + Correct + alpha * r_outcome correct, truncated, outcome (B,)

    A truncated response has not answered: neither Correct nor an outcome. Its complete steps keep their rewards."""
    rewards = -beta * (logp - ref_logp) * response_mask  # (B, T)
    final = correct.float()
    if outcome is not None:
        final = final + alpha * outcome.float()
    last = response_mask.sum(1) - 1  # (B,)
    rewards.scatter_add_(1, last[:, None], (final * ~truncated)[:, None])
    if steps is not None:
        refined, token_ends, step_mask = steps
        places = token_ends.masked_fill(~step_mask, 0)  # a place that exists, and gets 0
        rewards.scatter_add_(1, places, alpha * refined * step_mask)
    return rewards
