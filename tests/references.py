"""Are a data set's own solutions graded as correct, through the whole path of eval.py?

    python tests/references.py math_test.jsonl gsm8k_test.jsonl

Prompts are made, a sampler that knows the solutions answers with them, its tokens (UTF-8 bytes) are decoded, cut into steps
and graded. Each solution is also put to the next problem, where it must be wrong, unless that has the same answer. By
subject and level; exit status 1 if a solution is not graded as correct.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from test_eval import ByteTokenizer
from tqdm import tqdm

import eval as evaluation
from data import Problem, load_problems, run_script
from rollout import Sample


def graded(problems: list[Problem], solutions: list[str]) -> list[dict]:
    tokenizer = ByteTokenizer()

    def generate(sampler, prompts, n, **_):
        texts = [tokenizer.decode(prompt).removeprefix("Question: ").removesuffix("\nAnswer:") for prompt in prompts]
        assert texts == [p.question for p in problems]  # the sampler sees the questions
        return [[Sample(i, [*solutions[i].encode(), tokenizer.eos_token_id], False)] for i in range(len(prompts))]

    with (
        patch.object(evaluation, "rollout", generate), patch.object(evaluation, "eos_ids", lambda *_: [0]),
        patch.object(evaluation, "as_sampler", lambda model: SimpleNamespace(model=model)),
    ):  # fmt: skip
        prompt = "Question: {question}\nAnswer:"
        return evaluation.evaluate(None, tokenizer, problems, prompt, "\n", max_new_tokens=1)[1]


def main() -> None:
    failed = 0
    for file in tqdm(sys.argv[1:], unit="file"):
        problems = load_problems(file, "test")
        right = graded(problems, [p.answer for p in problems])
        wrong = graded(problems, [p.answer for p in [*problems[1:], problems[0]]])
        failed += sum(not row["correct"] for row in right)
        print(f"{file}: {sum(row['correct'] for row in right)} of {len(problems)} solutions are graded as correct, and "
              f"{sum(row['correct'] for row in wrong)} of those of the next problem")  # fmt: skip
        for kind in ("subject", "level"):
            for group in sorted({getattr(p, kind) for p in problems} - {""}):
                rows = [row for p, row in zip(problems, right) if getattr(p, kind) == group]
                print(f"  {kind} {group}: {sum(row['correct'] for row in rows)} of {len(rows)}")
        for row in right:
            if not row["correct"]:
                print(f"  {row['verdict']}: {row['question'][:100]!r} ... {row['response'][-100:]!r}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    run_script(main)
