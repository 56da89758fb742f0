"""Exercises: a function loses its body, and the tests that specify it say when it is back.

    python tests/exercises.py list                  # all of them, with minutes and what comes before
    python tests/exercises.py start 3 [FOLDER]      # a working copy without the body (default: ../exercise-3), the task
    python tests/exercises.py check 3 [FOLDER]      # passed or failed; exit status 0 or 1
    python tests/exercises.py teacher [3]           # what students get wrong

An exercise is a row of EXERCISES. Its solution is this checkout's code: `diff ../exercise-3/rewards.py rewards.py`.
The last three have none: `start` adds functions to be written, test_exercises.py holds what they must satisfy. All take
about ten hours, of which a course chooses. Two sessions are 1 to 4, and 5, 8, 16; the runs of 16 take an hour.

Left out: points, hints, hiding the solutions: docstrings and tests show the way, and git the code.
"""

import argparse
import ast
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from data import UserError, run_script  # noqa: E402


@dataclass(frozen=True)
class Exercise:
    session: int
    title: str
    file: str
    names: str  # functions and methods that lose their body, a table that loses its numbers, or what is to be written
    minutes: int
    needs: str  # exercises by number, and knowledge
    tests: str  # "file: test test[parameter,parameter]"
    task: str
    teacher: str  # what students get wrong
    stub: str = ""  # added to the file, where there is no body to be removed

    def nodes(self) -> list[str]:
        """Of pytest, one for each test, or for each parameter that is named."""
        file, names = self.tests.split(": ", 1)
        found = []
        for name, parameters in re.findall(r"(\w+)(?:\[([^]]*)])?", names):
            found += [f"tests/{file}.py::{name}" + (f"[{x}]" if x else "") for x in parameters.split(",")]
        return found


EXERCISES = {
    1: Exercise(1, "The process rewards by hand", "tests/test_rewards.py", "BY_HAND", 20, "none",
        "test_rewards: test_every_reward_at_every_K_is_as_by_hand[prm,clip,delta,clip-delta]",
        """The table BY_HAND has lost its numbers: r of four rewards, for scores of 1, 2, 3 and 5 steps, at eta = 0.5.
        Read the docstring of rewards.py, and put them back with pen and paper. Then sum each row from the right: that
        is the return-to-go, which PPO credits to a step. Which of the four grows with the number of steps?""",
        """The end of delta: r_(K-1) is s_(K-1) itself and r_K is 0, so the last score appears nowhere, and with one
        step all of delta is 0. Most write s_K at the end. In clip-delta they take differences and clip those, instead
        of the scores. Make them compute G, not only the sum of r."""),
    2: Exercise(1, "Clip and Delta", "rewards.py", "clip but_last delta", 30, "1; slices of tensors",
        """test_rewards: test_every_reward_at_every_K_is_as_by_hand[clip,delta,clip-delta,progress]
        test_a_padded_row_equals_the_row_alone_and_padding_earns_nothing[clip,delta,clip-delta,progress]
        test_refine_equals_the_papers_formulas_on_random_ragged_batches[clip,delta,clip-delta]
        test_delta_pays_the_score_of_the_step_before_last_and_ignores_the_last""",
        """Write the three for scores (B, K) and a mask (B, K) whose true entries come first, without a loop over steps.
        Rows have any number of steps, 0 among them. `progress` needs but_last as well.""",
        """They take the tensor's last column for the last step; a row's last step is where its mask ends, so the table
        by hand passes and ragged batches fail. With the last score set to 0 first, one difference gives both of the
        paper's special cases; three cases by torch.where mostly get K = 1 wrong."""),
    3: Exercise(1, "All of them: refine", "rewards.py", "refine", 25, "2",
        """test_rewards: test_every_reward_at_every_K_is_as_by_hand
        test_a_padded_row_equals_the_row_alone_and_padding_earns_nothing
        test_a_batch_in_which_no_row_has_a_step_earns_nothing test_bounds_and_telescoping_hold_for_random_scores
        test_what_repeating_a_step_pays test_bf16_scores_are_refined_in_float32
        test_a_name_that_is_no_process_reward_is_refused""",
        """Turn scores into refined rewards by name: the paper's four, and the four others. Padding is junk, even NaN,
        and must come out as 0; bfloat16 scores are refined in float32; an unknown name is refused with a
        sentence.""",
        """NaN * 0 is NaN: padding must be filled before any arithmetic, not multiplied away after it. bfloat16 steps by
        0.004 near 1: the cast must stand before the difference of neighbours. In clip-delta, Clip comes before
        Delta."""),
    4: Exercise(1, "Rewards on tokens", "rewards.py", "token_rewards", 30, "3; the paper's objective; scatter_add",
        """test_rewards: test_each_reward_lies_on_its_token test_without_learned_rewards_there_are_correct_and_kl
        test_alpha_scales_only_the_learned_part test_a_batch_without_any_step_gets_no_step_reward
        test_the_return_at_a_steps_first_token_is_the_steps_return_to_go""",
        """Lay the objective out in time, as the docstring says: KL at every token, alpha * r_k at the last token of
        step k, Correct and the outcome at the last token of the answer. Where step_mask is false, token_ends is
        junk.""",
        """The last step ends at the answer's last token, where Correct lies too: `rewards[rows, ends] = ...`
        overwrites, it must add. Junk ends must be replaced before they index, and their reward be 0. A truncated answer
        loses Correct and the outcome, and keeps its steps: many clear the row. alpha scales the learned part
        alone."""),
    5: Exercise(2, "Advantages", "ppo.py", "gae", 40, "4; value functions",
        """test_ppo: test_gae_by_hand test_gae_is_the_double_sum_on_ragged_rows_with_both_endings
        test_with_gamma_and_lambda_1_the_advantage_is_later_rewards_plus_bootstrap_minus_value""",
        """Write GAE for rows of unequal length: one loop over time, from the end. Behind a row's last token stands its
        own bootstrap: the value of the state where the limit cut the answer, 0 behind an EOS. Returns are advantages +
        values, and 0 in the padding.""",
        """The bootstrap enters at each row's own end, not in the last column, and the recursion must not carry junk out
        of the padding: the hand example passes, the ragged one fails. gamma stands at the next value, gamma * lambda at
        the running sum; at 1 and 1, as in training, the two are the same. To bootstrap 0 at a cut would punish length
        by itself."""),
    6: Exercise(2, "Whitening over ranks", "ppo.py", "masked_mean whiten", 30, "5; all_reduce",
        """test_ppo: test_whitened_advantages_have_mean_0_and_std_1_over_the_mask_only test_explained_variance_by_hand
        test_two_processes_with_half_of_the_answers_each_end_where_one_with_all_does""",
        """Zero mean and unit variance over the response tokens of all ranks, with the file's `all_reduce`, which sums
        over the processes. Each rank may have another number of tokens. Equal advantages become 0.""",
        """The mean of the ranks' means: ranks have unequal numbers of tokens, so sums and counts are reduced, and
        divided after that; one process cannot tell. The variance is about the common mean, which must be known first.
        No mask at the end, and padding gets -mean / std."""),
    7: Exercise(2, "Value normalisation", "ppo.py",
        "ValueNorm.update ValueNorm.mean_std ValueNorm.normalise ValueNorm.denormalise", 30, "6; Adam's debiasing",
        "test_ppo: test_value_norm_by_hand test_value_norm_remembers_with_its_decay_and_survives_constant_returns",
        """Keep debiased exponential averages of the mean and the mean square of the returns in `self.sums`, whose third
        number is the weight so far. Before any update nothing is changed; the variance is at least 1e-4.""",
        """No debiasing: at a decay of 0.99995 the averages would be near 0 for the whole run. They average standard
        deviations, where mean squares are needed, or subtract the square of the batch's mean instead of the average's.
        Ask why train.py denormalises values before `update` and normalises returns after it."""),
    8: Exercise(2, "The two losses", "ppo.py", "policy_loss value_loss", 25, "5; the PPO paper, eq. 7",
        "test_ppo: test_policy_loss_by_hand test_value_loss_by_hand",
        """Write PPO's clipped objective, negated, and half the clipped squared value error, for each token; means are
        taken elsewhere. The tests look at gradients as well: where must they be 0, and where not?""",
        """clamp(ratio) * A alone has no gradient at ratio 1.5 with A < 0 (raised though bad), where it is needed most:
        the minimum of both keeps it. The value loss takes the *larger* error and clips around the old value, not around
        the return; a clip_range of 0 means no clipping, not a width of 0."""),
    9: Exercise(2, "Minibatches of any number of ranks", "ppo.py", "minibatches", 25, "permutations",
        """test_ppo: test_minibatches_deal_every_row_once_and_the_same_for_any_number_of_ranks
        test_minibatches_are_shuffled_by_the_seed""",
        """Deal this rank's rows into `count` minibatches, so that their union over all ranks does not depend on how
        many ranks there are, and differs in size by one row at most. A rank knows the global indices of its rows
        (keys), their total, and a seed.""",
        """Each rank shuffles its own rows: every rank looks right, and the union is another one for each world. The
        permutation is of the global indices, and a rank looks up its own. Chunks of total // count lose the rest of 13
        in 4."""),
    10: Exercise(3, "An oracle for the embedded worlds", "data.py", "oracle", 20, "the docstring of data.py",
        """test_data: test_oracle_labels test_oracle_labels_of_sums
        test_toy_solutions_are_right_and_short_and_repeat_only_right_lines""",
        """Label each step of a response with certainty: it is good if it and all before it are right lines of the
        problem. `toy_lines` gives these, `split_steps` says where steps end.""",
        """They compare the k-th step with the k-th line, so that a repetition and all behind it is wrong. A right line
        behind a wrong one is bad: labels are of prefixes. That a repeated line is good is no slip: prm's hack lives on
        it. Ask whether label or reward is to blame, and come back in 18."""),
    11: Exercise(3, "Where steps end, in characters", "data.py", "split_steps", 30, "none",
        "test_data: test_split_steps test_the_steps_of_a_solution_in_Qwens_manner_are_those_that_a_person_would_mark",
        """Find the char_ends of a response, each just behind its separator. A piece without a letter or a digit belongs
        to the step before, leading ones to the first; of an unfinished response, what follows the last separator is no
        step.""",
        """text.split() loses the offsets, and makes steps of doubled separators and of brackets; each would be scored,
        and a policy would be paid for punctuation. A truncated answer that happens to end in a separator has all of its
        steps. A response of blanks alone has none."""),
    12: Exercise(3, "Where steps end, in tokens", "data.py", "find_steps", 45, "11; tokenizers",
        """test_data: test_the_tokens_between_step_ends_are_the_steps test_step_ends_where_tokens_and_steps_do_not_align
        test_steps_that_end_in_one_token_end_at_the_later_character
        test_a_character_of_several_tokens_counts_from_its_first_one_on
        test_steps_where_the_decoder_drops_the_leading_blank_and_characters_are_bytes""",
        """Find the token that holds the last character of each step, from the char_ends of `split_steps` and the
        offsets of `char_offsets`. Tokens and separators need not align: a token that ends two steps counts once. The
        last step of a finished answer ends at its last token.""",
        """They encode the steps anew and add up lengths: sampled ids need not be those that the tokenizer would choose,
        so the offsets drift. A token that spans the separator ends the step whose last character it holds. EOS belongs
        to the last step unless the answer was cut: at EOS lies Correct, and the PRM reads there."""),
    13: Exercise(3, "Drawing a token", "rollout.py", "invert", 35, "distribution functions; floating point",
        """test_rollout: test_invert_never_returns_an_index_of_weight_0 test_a_token_of_probability_0_is_never_drawn
        test_a_token_is_drawn_by_inverting_the_distribution_function
        test_the_rare_tokens_of_a_large_vocabulary_are_not_starved""",
        """Find where the running sum of weights p (B, V) passes u times their total, and how far into that weight. The
        weights need not sum to 1; an index of weight 0 is never returned, not at u = 0 and not at the largest u below
        1.""",
        """searchsorted from the left returns a weight of 0 at u = 0. At u near 1 the product rounds up to the total,
        and the index is behind the end. A float32 sum of 100,000 terms never draws the rare ones. With
        torch.multinomial a draw depends on its neighbours, and runs of 1 and 2 ranks differ."""),
    14: Exercise(4, "Monte-Carlo labels", "prm.py", "complete", 45, "12; Math-Shepherd",
        """test_prm: test_labels_are_the_share_of_right_completions_and_the_last_step_is_graded_itself
        test_a_completion_is_graded_behind_its_prefix_and_a_truncated_one_is_wrong
        test_a_completion_has_room_of_its_own_within_the_models_positions
        test_the_seeds_of_completions_come_from_their_prefix_alone test_hard_labels_stop_at_the_first_right_completion
        test_equal_prefixes_are_completed_once test_a_completer_with_another_tokenizer_reads_the_prefixes_as_text""",
        """Complete each prefix by `rollout`, and grade what came out, behind the prefix's text. Hard labels stop at the
        first right completion, by rollout's `decided`; soft ones take all. Each has --max-new-tokens of its own, as far
        as the model has positions; seeds come from the prefix alone.""",
        """`decided` is called with all samples so far: who grades them all again counts some twice. For soft labels
        nobody calls it, so the outcomes stay empty. They give completions what the prefix left of the room, and late
        steps get wrong labels. Seeds by position tie the labels to the order of the prefixes."""),
    15: Exercise(4, "pass@k and votes", "eval.py", "pass_at_k vote voted best_of", 35, "binomial coefficients",
        """test_eval: test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_answer
        test_votes_count_equal_answers_as_one_and_ignore_missing_ones
        test_best_of_k_and_votes_are_means_over_groups_of_k test_all_measures_of_two_problems_by_hand""",
        """Write the unbiased pass@k, the vote over candidates with weights, and the means of best-of-k and of votes
        over the n / k groups of k answers. Ties go to the first; a truncated answer (None) has no vote; a rest of less
        than k is left out.""",
        """1 - (1 - c / n)^k draws with replacement, and is biased. With fewer than k wrong answers pass@k is 1:
        math.comb says so by itself. A group without any vote is wrong, no error. They vote among all n and call it
        majority of k."""),
    16: Exercise(4, "The alpha at which Delta breaks", "tests/claims.py", "where_delta_breaks", 40,
        "2; and an hour of two cores",
        "test_exercises: test_delta_holds_at_one_alpha_and_breaks_at_four_times_that_at_most",
        """Find two alphas, the larger at most four times the smaller. With the smaller, Delta ends with a greedy
        accuracy no lower than it began with, in every run; with the larger, it loses more than 10 points in every run.
        Take at least two seeds, 20 iterations or more, and all else equal: python tests/claims.py --make reward=delta
        alpha=0.1,1 seed=0,1 in the copy is a beginning; python eval.py --runs runs/delta-*/ shows them. Let
        where_delta_breaks return the two alphas; the runs are checked.""",
        """They name an alpha from one seed, or from success of the rollout in the last iteration. "Delta is bounded, so
        it cannot be hacked": by one step more the return of writing on is up to alpha, that of answering at once 0
        (docstring of rewards.py). Let them look at steps and truncated before they look at accuracy.""",
        '''def where_delta_breaks() -> tuple[float, float]:
    """An alpha at which delta holds, and one at which it breaks, by the runs in runs/."""
'''),
    17: Exercise(4, "A reward that is hackable in another way", "rewards.py", "mine exploit", 60, "3; Goodhart's law",
        "test_exercises: test_a_reward_that_repeating_does_not_hack_and_something_else_does",
        """Write a reward `mine`, and let `refine` and BASELINES know it, so that --reward mine trains. Its return-to-go
        is never above 1, and repeating a step pays next to nothing: prm's hack is closed. Yet it is open to another:
        `exploit` takes the scores of an answer, and drops, repeats or reorders them (the last stays last), so that the
        sum rises by 0.1 and more on average. Then train with it, and see whether the policy finds out.""",
        """What is found most easily: a penalty for bad steps is an offer to leave steps out (Clip, PURE's min: drop the
        worst one); a telescoping sum pays for the first step alone. A hack by the sum is not yet one for PPO: let them
        compute the return-to-go of the step that is dropped, and predict before they train.""",
        '''def mine(scores: Tensor, mask: Tensor, eta: float) -> Tensor:
    """A reward of our own: r (B, K), 0 where mask is false."""


def exploit(scores: list[float]) -> list[float]:
    """The scores of a worse answer that `mine` pays better: some of the given ones, in any order, the last one last."""
'''),
    18: Exercise(4, "A PRM that repetition does not fool", "prm.py", "harden", 60, "10, 14",
        "test_exercises: test_a_prm_trained_on_hardened_labels_scores_repeated_steps_low_and_fresh_ones_high",
        """Write `harden`: from labelled solutions make those that a PRM should be trained on, so that a step which only
        repeats an earlier one scores below 0.5, while steps that say something new keep their scores. A row has
        question, response, char_ends, labels (see `read_labels`); the check trains a small PRM on what you return, and
        asks it about questions that are held out. Then train on your labels by prm.py train, and see how long train.py
        --reward prm --prm DIR withstands the hack.""",
        """They relabel the repetitions that are there: about one line in ten, too few to learn from; some must be put
        in, and char_ends made anew. They label all that follows a repetition 0, and the PRM forgets what a right step
        is: look at the fresh ones as well. And the end of it: the policy finds the next needless step ("=" alone, a
        line of another problem): a better PRM moves the hack, a bounded reward closes it.""",
        '''def harden(rows: list[dict]) -> list[dict]:
    """The rows to train on: labelled ones, in which a step that says what an earlier one said has the label 0."""
'''),
}


def find(source: str, name: str) -> ast.stmt:
    """A function, a Class.method or a table in a source."""
    node = ast.parse(source)
    for part in name.split("."):
        for child in node.body:
            targets = [getattr(target, "id", "") for target in getattr(child, "targets", [])]
            if part in (getattr(child, "name", ""), *targets):
                node = child
                break
    return node


def stripped(source: str, number: int) -> str:
    """The source of the exercise's file without what is to be written: bodies raise NotImplementedError."""
    exercise = EXERCISES[number]
    if exercise.stub:
        head, *script = re.split(r'(?=\n\nif __name__ == "__main__":)', source)
        source = "".join([head, "\n\n", exercise.stub, *script])
    nodes, lines = [find(source, name) for name in exercise.names.split()], source.splitlines(keepends=True)
    for node in sorted(nodes, key=lambda node: -node.lineno):  # from the end, so that line numbers stay
        if isinstance(node, ast.Assign):  # of a table the numbers behind its keys
            start, text = node.lineno - 1, "".join(lines[node.lineno - 1 : node.end_lineno])
            text = re.sub(r'(?<=": \()[^)]*', lambda row: re.sub(r"-?\d[.\d]*", "None", row[0]), text)
            text = re.sub(r"(?<=\),)  #.*", "", text)  # nor the comments, which say how
        else:
            first = node.body[0]
            start = first.end_lineno if ast.get_docstring(node) else first.lineno - 1
            text = " " * first.col_offset + f'raise NotImplementedError("exercise {number}")\n'
        lines[start : node.end_lineno] = [text]
    return "".join(lines)


def start(number: int, folder: Path) -> None:
    exercise = EXERCISES[number]
    if (HERE / "EXERCISE").exists():
        raise UserError(f"{HERE} is a working copy itself: start from the original checkout")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there, and not empty: give another folder")
    patterns = ("*.py", "tests/*.py", "assets/*.*", "README.md", "LICENSE", "requirements.txt")
    for path in [path for pattern in patterns for path in HERE.glob(pattern)]:
        target = folder / path.relative_to(HERE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    file = folder / exercise.file
    file.write_text(stripped(file.read_text(encoding="utf-8"), number), encoding="utf-8")
    names, nodes = exercise.names.replace(" ", ", "), "\n  ".join(exercise.nodes())
    task = f"{number}. {exercise.title}: {names} in {exercise.file}, {exercise.minutes} minutes\n\n"
    task += f"{paragraph(exercise.task)}\n\nThe tests:\n  {nodes}\n"
    (folder / "EXERCISE").write_text(task, encoding="utf-8")
    print(f"{task}\nWork in {file}; then: python tests/exercises.py check {number} {folder}")


def check(number: int, folder: Path) -> bool:
    call = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", *EXERCISES[number].nodes()]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout + done.stderr)
    outcome = done.stdout.strip().splitlines()[-1:] or ["pytest did not start"]
    verdict = "failed" if done.returncode else "passed"
    print(f"exercise {number} in {folder}: {verdict} ({outcome[0].strip('= ')})")
    return done.returncode == 0


def paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 100, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["list", "start", "check", "teacher"])
    parser.add_argument("number", type=int, nargs="?", choices=EXERCISES)
    parser.add_argument("folder", type=Path, nargs="?")
    opts = parser.parse_args()
    if opts.command in ("start", "check") and not opts.number:
        raise UserError(f"{opts.command} which one? Give its number, 1 to {len(EXERCISES)}")
    own = HERE if (HERE / "EXERCISE").exists() else HERE.parent / f"exercise-{opts.number}"
    folder = (opts.folder or own).resolve()
    if opts.command == "start":
        return start(opts.number, folder)
    if opts.command == "check":
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; python tests/exercises.py start {opts.number} makes it")
        sys.exit(not check(opts.number, folder))
    for number in [opts.number] if opts.number else EXERCISES:
        x = EXERCISES[number]
        if opts.command == "list":
            print(f"{number:3} {x.minutes:4} min  session {x.session}  {x.title:41} {x.file:22} needs {x.needs}")
        else:
            print(f"{number}. {x.title}\n{paragraph(x.teacher)}\n")


if __name__ == "__main__":
    run_script(main)
