"""What several test files use: how far rounding may take two results apart, and the project's files on their own."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def tolerance(terms: int, size: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """How far apart two ways to compute the same may end, whatever order their sums are taken in.

    The error of a sum of n random terms grows as sqrt(n) * eps * (sum of their absolute values), and that sum is about
    sqrt(n) times the size of the result: n * eps * size. terms: n, of sums that feed each other all of their n; size:
    of the largest result, or of what cancels in it."""
    return terms * torch.finfo(dtype).eps * float(size)


def close(got, expected, terms: int, size: float | None = None) -> None:
    """Assert that two tensors, or lists of numbers, are equal up to the rounding of so many terms in float32; size: the
    largest of those expected."""
    got, expected = (torch.as_tensor(x).detach().double() for x in (got, expected))
    largest = expected.abs().max() if size is None else size
    torch.testing.assert_close(got, expected, atol=tolerance(terms, largest), rtol=0)


def model_terms(config, tokens: int) -> int:
    """The lengths of all sums between a token and its logits, for `tolerance`; a backward pass takes them again."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    attention = 2 * hidden + head + 2 * tokens + heads * head  # norm, projections, scores, softmax, values, output
    mlp = 2 * hidden + config.intermediate_size  # norm, gate and up, down
    return config.num_hidden_layers * (attention + mlp) + 2 * hidden


def run_alone(files: list[str], code: str, folder: Path) -> str:
    """What a new process prints that runs `code` with only these of the project's files in reach."""
    for name in files:
        shutil.copy(ROOT / name, folder)
    program = f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
