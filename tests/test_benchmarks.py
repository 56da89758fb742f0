"""What is run by hand still runs: with `--smoke` each benchmark takes all its paths at its smallest sizes."""

import json
import multiprocessing
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
SECONDS = 120  # of one script, on a machine with much else to do


def start(argv: list[str], printed: Path) -> None:
    with open(printed, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    torch.set_num_threads(1)  # a forked process must not wait for threads that its parent had
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def run(script: str, *args: str, folder: Path) -> str:
    """What a script prints that ends with status 0.

    It has a process of its own, for benchmarks patch what they measure; forked, where that spares it slow imports."""
    kind, printed = "spawn" if torch.cuda.is_available() or sys.platform != "linux" else "fork", folder / "printed"
    argv = [str(TESTS / script), *args]
    process = multiprocessing.get_context(kind).Process(target=start, args=(argv, printed))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 0, printed.read_text()
    return printed.read_text()


@pytest.mark.parametrize("script", sorted(path.name for path in TESTS.glob("bench_*.py")))
def test_a_benchmark_runs_and_prints_a_table(script, tmp_path):
    printed = run(script, "--smoke", folder=tmp_path)
    rows = [line for line in printed.splitlines() if len(re.findall(r"\d[\d.,]*", line)) >= 3]
    assert rows, printed


def test_the_check_of_reference_solutions_runs(tmp_path):
    rows = [{"problem": "A?", "solution": r"So $\boxed{\frac{1}{2}}$", "type": "Algebra", "level": "Level 1"}]
    rows.append({"problem": "B?", "solution": r"\boxed{3}", "type": "Geometry", "level": "Level 1"})
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = run("references.py", str(tmp_path / "p.jsonl"), folder=tmp_path)
    assert "2 of 2 solutions are graded as correct, and 0 of those of the next problem" in printed
    assert "subject Algebra: 1 of 1" in printed and "level 1: 2 of 2" in printed
