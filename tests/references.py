"""Are a data set's own solutions graded as correct, as answers are that a model samples?

    python tests/references.py math_test.jsonl gsm8k_test.jsonl

Each solution becomes tokens (UTF-8 bytes), which are decoded, cut into steps and graded by `judge`, as in training. It
is also put to the next problem, where it must be wrong, unless that has the same answer. By subject and level; exit
status 1 if a solution is not graded as correct.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tqdm import tqdm

from data import Problem, judge, load_problems, run_script
from rollout import Sample

EOS = 0


class ByteTokenizer:
    def decode(self, ids, **_):
        return bytes(i for i in ids if i != EOS).decode(errors="replace")


def graded(problems: list[Problem], solutions: list[str]) -> list[dict]:
    samples = [[Sample(i, [*solution.encode(), EOS], False)] for i, solution in enumerate(solutions)]
    return judge(ByteTokenizer(), problems, samples, "\n")


def main() -> None:
    failed = 0
    for file in tqdm(sys.argv[1:], unit="file"):
        problems = load_problems(file, "test")
        solutions = [p.answer for p in problems]
        right = graded(problems, solutions)
        wrong = sum(row["correct"] for row in graded(problems, [*solutions[1:], solutions[0]]))
        failures = [row for row in right if not row["correct"]]
        failed += len(failures)
        graded_right = f"{len(problems) - len(failures)} of {len(problems)} solutions are graded as correct"
        print(f"{file}: {graded_right}, and {wrong} of those of the next problem")
        for kind in ("subject", "level"):
            for group in sorted({getattr(p, kind) for p in problems} - {""}):
                rows = [row for p, row in zip(problems, right) if getattr(p, kind) == group]
                print(f"  {kind} {group}: {sum(row['correct'] for row in rows)} of {len(rows)}")
        for row in failures:
            print(f"  {row['verdict']}: {row['question'][:100]!r} ... {row['response'][-100:]!r}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    run_script(main)
