"""The grader accepts equal answers in any notation, refuses near misses, and survives hostile text."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from grader import extract, grade

EQUAL = {
    "toy world": [("49", "49"), ("02", "2"), ("00", "0")],
    "integer": [("18", "18."), ("+5", "5"), ("-3", "−3"), ("- 3", "-3"), ("7", "$7$"), ("7", r"\(7\)")],
    "thousands": [("1234", "1,234"), ("1234", r"1,\!234"), ("10000", "10{,}000"), ("1,000,000", r"1,\! 000,\! 000")],
    "decimal": [("0.5", ".5"), ("0.5", "0.50"), ("5", "5.0"), ("0.1", r"\frac{1}{10}"), ("3.2e5", "320000")],
    "scientific": [(r"3.2 \times 10^5", "320,000"), (r"2\cdot10^{-3}", "0.002"), ("1E3", "1000")],
    "fraction": [(r"\frac{1}{2}", r"\frac12"), (r"\dfrac{1}{2}", r"\tfrac12"), ("1/2", r"\frac{2}{4}"), ("3/1", "3")],
    "fraction signs": [(r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"\frac{1}{-2}", "-0.5"), (r"\frac 3 4", r"\frac3{4}")],
    "mixed number": [(r"3\frac{1}{2}", "3.5"), (r"-3\frac12", r"-\frac72"), ("3 1/2", "7/2")],
    "percent": [(r"20\%", "20"), (r"20\%", "0.2"), ("20%", r"\frac15"), ("20%", r"20\text{ percent}")],
    "money": [("5", r"\$5"), (r"-\$0.50", r"\$-0.50"), ("5", "$5"), (r"\$1,250", "1250 dollars")],
    "degrees": [("30", r"30^\circ"), (r"30^{\circ}", "30°"), (r"30^\circ", r"30\text{ degrees}")],
    "units in text": [("5", r"5\text{ cm}"), (r"5 \mbox{ m}^2", "5"), (r"5\text{ inches}", r"5 \, \text{inches}")],
    "variable": [("5", "x = 5"), ("x=5", "x = 5.0"), ("1/2", r"x_1=\frac12"), ("1, 2", "x = 1, 2")],
    "list": [("1,2", "1, 2"), (r"1 \text{ and } 2", "1, 2"), ("1 or 2", "1,2"), (r"\frac12, 3", "0.5, 3")],
    "tuple": [("(1,2)", r"\left( 1, 2 \right)"), (r"(\frac12,3)", "(0.5, 3)"), ("((1,2),3)", "((1,2.0),3)")],
    "interval and set": [("[0,1)", r"[0, \frac{2}{2})"), (r"\{1,2\}", r"\{ 1, 2.0 \}"), (r"(1,2)\cup[3,4]",) * 2],
    "words": [(r"\text{Evelyn}", "Evelyn"), (r"\text{even}", "Even"), (r"\text{June 20}", "June 20")],
    "choice": [(r"\text{(A)}", "A"), ("(B)", "B"), (r"(\text{E})", r"\text{E}"), (r"\text{A, C}", "A,C")],
    "notation": [(r"\sqrt3", r"\sqrt{3}"), ("x^{2}", "x^2"), (r"2 \pi", r"2\pi"), ("101_2", "101_{2}")],
    "long": [("9" * 3000, "9" * 3000), ("x" * 20_000, "x" * 20_000)],
}
DIFFERENT = {
    "integer": [("5", "-5"), ("120000", "120006"), ("12", "1 2"), ("49", "4"), ("1", "10")],
    "thousands": [("1,234", "1.234"), ("1234", "1, 234"), ("125", "0{,}125"), ("1,23", "123")],
    "decimal": [("0.333", "1/3"), ("0.0000001", "0.0000003"), ("3.14", r"\pi"), ("0.5", "0.05")],
    "exponents": [("2^{10}", "210"), ("1e5", "1e6"), ("10^{-7}", r"3 \cdot 10^{-7}"), (r"1/2 \times 10^3", "1/2000")],
    "dropped remainder": [("101_2", "101_3"), (r"0.\overline{3}", r"0.\overline{4}"), ("101_2", "101"), ("5!", "5")],
    "fraction": [(r"\frac12", r"\frac21"), (r"\frac{1}{2}3", r"\frac{1}{23}"), (r"\frac\pi4", r"\frac\pi5")],
    "ambiguous": [(r"\frac123", r"\frac{1}{2}"), (r"3\frac{5}{2}", "5.5"), ("1/0", "0"), ("1/2/3", "1/6")],
    "percent": [("20", "0.2"), ("0.2", "20"), ("20%", "2000%"), ("20%", "2"), (r"20\%", r"\$20")],
    "units": [(r"5\text{ cm}", r"5\text{ m}"), (r"5\text{ m}^2", r"5\text{ m}^3"), (r"\$5", r"5\text{ cents}")],
    "no units": [("4t", "4s"), ("4", "4t"), ("5", r"5\text{ million}"), ("2", r"2\text{i}"), ("3", r"3\text{ or so}")],
    "variable": [("x=5", "y=5"), ("5", "x+y=5"), ("5", "2x=5"), ("5", "x=y=5"), ("c46+3=49", "49")],
    "relation": [("x>3", "x<3"), (r"x \le 3", "x<3"), ("x>1 or x<0", "x>1 and x<0"), ("3", "x>3")],
    "brackets": [("[0,1)", "(0,1)"), (r"\{1,2\}", "(1,2)"), ("(1,2)", "1,2"), (r"(1,2)\cup(3,4)", r"(1,2)\cap(3,4)")],
    "elements": [("(1,2)", "(2,1)"), ("1,2", "1,2,3"), ("(1,(2,3))", "((1,2),3)"), ("1", "(0, 1)"), ("1,1", "11")],
    "case and words": [("x", "X"), ("a", r"\text{A}"), (r"\text{A}", r"\text{B}"), (r"\text{June 20}", "20")],
    "roots and functions": [(r"\sqrt3", r"3"), (r"3\sqrt[3]2", r"3\sqrt2"), (r"\sin 2", r"\cos 2"), ("a+b", "+b")],
    "clock": [("4:30", "4.30"), (r"9\text{ a.m.}", r"9\text{ p.m.}"), ("1:2", "12")],
    "beyond the caps": [("9" * 9000, "9" * 8999 + "8"), ("1e999999999", "1e999999998"), ("x" * 20_000, "y" * 20_000)],
    "nothing": [("5", ""), ("0", ""), ("", ""), ("5", r"\boxed{}")],
}
EXTRACTED = {
    "toy response": ("b41+5=46\nc46+3=49\n####49", "49"),
    "gsm8k solution": ("She has 48+24 = <<48+24=72>>72 clips.\n#### 72", "72"),
    "gsm8k money": ("#### $1,234.", "1,234"),
    "last ####": ("#### 3\nNo, wait.\n#### 4\nDone.", "4"),
    "nested braces": (r"so $\boxed{\frac{1}{\sqrt{2}}}$ holds", r"\frac{1}{\sqrt{2}}"),
    "escaped braces": (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    "fbox": (r"\fbox{5}.", "5"),
    "box without braces": (r"The result is $\boxed 3$.", "3"),
    "box in a box": (r"\boxed{\boxed{5}}", "5"),
    "box goes before ####": ("\\boxed{5}\n#### 6", "5"),
    "last box decides": (r"\boxed{3}, so that $x = \boxed{5}$", "5"),
    "boxes joined by and": (r"$\boxed{3}$ and $\boxed{5}$", "3, 5"),
    "boxes joined by or": (r"\boxed{3} or \boxed{\frac{2}{5}}.", r"3, \frac{2}{5}"),
    "boxes joined by commas": (r"\boxed{1}, \boxed{2},\text{ and }\boxed{3}", "1, 2, 3"),
    "empty box is no answer": (r"The box \boxed{} is to hold the answer: 4", "4"),
    "unterminated box": (r"so we get \boxed{\frac{1}{2}", r"\frac{1}{2}"),
    "unterminated box behind another": (r"\boxed{3} or rather \boxed{4", "3"),
    "the answer is": ("The answer is $\\frac{1}{2}$.\n", r"\frac{1}{2}"),
    "a sentence behind the answer": ("The final answer is 5. I hope it is correct.", "5"),
    "leading point": ("Therefore the answer is .5", ".5"),
    "bold answer": ("**Answer:** 18", "18"),
    "A:": ("Q: what is two times nine?\nA: 18", "18"),
    "bare answer": ("(0, 1)", "(0, 1)"),
    "bare words": ("June 20", "June 20"),
    "last math segment": ("First $x = 3$, and then we get $y = 7$ as well.", "y = 7"),
    "money is not math": ("She paid $5 for it and then $18.", "18"),
    "last number": ("He has 3 cats, and they weigh 1,234.5 kg in total", "1,234.5"),
    "negative number": ("the temperature was then -7", "-7"),
    "minus between numbers": ("we can compute it as 9-7", "7"),
    "no answer": ("I do not know.", None),
    "empty": ("", None),
}


def cases(table):
    return [pytest.param(a, b, id=f"{kind} {i}") for kind, pairs in table.items() for i, (a, b) in enumerate(pairs)]


@pytest.mark.parametrize("a, b", cases(EQUAL))
def test_equal_answers_match_both_ways_bare_and_boxed(a, b):
    assert grade(a, b) and grade(b, a)
    assert grade(a, f"So it is $\\boxed{{{b}}}$.") and grade(f"Hence \\boxed{{{b}}}", a)


@pytest.mark.parametrize("a, b", cases(DIFFERENT))
def test_near_misses_do_not_match_either_way(a, b):
    assert not grade(a, b) and not grade(b, a)
    assert not grade(a, f"So it is $\\boxed{{{b}}}$.")


@pytest.mark.parametrize("text, answer", EXTRACTED.values(), ids=EXTRACTED)
def test_extract_finds_the_final_answer(text, answer):
    assert extract(text) == answer


def test_a_reference_solution_is_a_gold_answer():
    solution = "Natalia sold 48+24 = <<48+24=72>>72 clips.\n#### 1,072"
    assert grade(solution, "1072") and grade(solution, solution) and not grade(solution, "72")
    assert grade(r"Thus $x=\boxed{\dfrac12}$.", "I think that the answer is 0.5.")


def test_a_right_toy_answer_counts_and_a_number_on_the_way_does_not():
    response = "b41+5=46\nc46+3=49\n####49"
    assert grade("49", response) and not grade("46", response) and not grade("4", response)
    assert grade("02", "e40*5=00\nf00+2=02\n####02") and not grade("20", "####02")


UNITS = ["{", "}", "[", "(", r"\[", r"\boxed{", r"\boxed{},", r"\boxed 3", r"\fbox{1},", "$", r"$1$", "\\", "#", "####"]
UNITS += ["9", "1,", "1,111", "-", "1/", "1.", "e9", "^", r"\frac", r"\frac{1}{", r"\text{", ",\\!", " ", "1 ", "a "]
UNITS += ["\n", "\0", "answer is ", "A: ", "1 and ", "\ud800", "٣", r"\boxed{5}{"]


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_a_megabyte_of_hostile_text_is_graded_in_time(unit):
    text = unit * (1_000_000 // len(unit))
    for hostile in (text, "\\boxed{" + text, "\\boxed{" + text[:9000] + "}"):
        start = time.perf_counter()
        assert grade("5", hostile) in (True, False) and grade(hostile, "5") in (True, False)
        assert time.perf_counter() - start < 4  # two calls


HUGE = ["1e999999999", "9^{9^{9^{9}}}", "999999999!", "9" * 9000, "1/" + "9" * 9000, "(" * 4000 + "1" + ")" * 4000]


@pytest.mark.parametrize("answer", HUGE, ids=lambda answer: answer[:15])
def test_huge_numbers_and_deep_nesting_are_not_computed(answer):
    start = time.perf_counter()
    assert grade(answer, answer) and not grade("7", answer) and not grade(f"({answer}, 1)", f"({answer}, 2)")
    assert time.perf_counter() - start < 2


def test_nested_boxes_take_no_quadratic_memory():
    assert not grade("6", "\\boxed{" * 20_000 + "5" + "}" * 20_000)


def test_nothing_is_executed(tmp_path):
    target = tmp_path / "made"
    for code in (f"__import__('os').mkdir({str(target)!r})", f"open({str(target)!r}, 'w')", "exit()", "1+1"):
        assert not grade("2", f"\\boxed{{{code}}}") and not grade(code, "\\boxed{2}")
    assert not target.exists()


def run(*arguments):
    script = Path(__file__).parents[1] / "grader.py"
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)


def test_the_command_shows_both_answers_and_the_verdict():
    right = run(r"\frac12", "The answer is 0.50.")
    assert right.returncode == 0 and right.stdout.split() == ["gold", r"\frac12", "response", "0.50", "match"]
    assert run("5", "six or 7").stdout.endswith("mismatch\n")


def test_a_mistake_on_the_command_line_is_one_sentence_and_status_2():
    wrong = run("5")
    assert wrong.returncode == 2 and "required: text" in wrong.stderr and "Traceback" not in wrong.stderr
