r"""Math answer grader: is the final answer of a response the gold answer? It gives PPO its outcome reward.

    gold      Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72
    response  ... so $48 + 24 = 72$ and the answer is $\boxed{72}$.      -> match

`extract` finds the final answer in a response, in linear time. `grade` compares two answers: first as normalised
strings, then as exact rationals with a unit, then as lists, element by element. Policies find every hole of a reward,
so what is not understood *entirely* counts only as a string: nothing is guessed, truncated, rounded or executed.

Left out: symbolic equality (`\frac{\sqrt2}{2}` is not `\frac{1}{\sqrt2}` here), unordered lists and sets, inequalities
read as intervals, repeating decimals, clock times.

Run `python grader.py GOLD TEXT`, for example `python grader.py '\frac12' 'The answer is 0.50.'`
"""

import argparse
import re
from fractions import Fraction

MAX_TEXT = 200_000  # characters; the final answer is at the end, and only the end of a longer text is read
MAX_ANSWER = 10_000  # characters; a longer answer is right only if it is identical
MAX_NESTING = 4  # tuples in tuples: deeper ones count as strings, and recursion stays bounded

# ------------------------------------------------------------------------------------------------ extraction

BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s{0,9}(?:(\{)|([-+.0-9\\][^\s$]{0,99}))|\\.|[{}]", re.DOTALL)
MARKER = re.compile(r"answer\s{0,3}(?:is\b:?|:)|^A: ", re.IGNORECASE | re.MULTILINE)
COMMAND = re.compile(r"\\[a-zA-Z]+ ?(?:\{[^{}\\]*\})?")  # with its argument: \text{ square cm} is not prose
MATH = re.compile(r"(?<!\\)\$\$?|\\[()\[\]]")  # where math mode begins or ends
WORD = re.compile(r"(?!(?:and|or)\b)\b[a-zA-Z]{2,}")
NUMBER = re.compile(
    r"(?:(?<![\w)}])[-−]\\?\$?)?"  # 5-3 ends in 3, not in -3
    r"(?:[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+|/[0-9]+)?(?:\\?%)?"
)


def extract(text: str) -> str | None:
    r"""The final answer in a response or a reference solution, None if there is none.

    The last \boxed{}, else what follows the last ####, else "answer is" or "answer:", else a text that is nothing but
    an answer, else the last $math$, else the last number."""
    text = text[-MAX_TEXT:]
    answer = marked_answer(text)
    if answer or is_bare(text):
        return answer or text.strip() or None
    # What stands between the dollars of "$5 and then $8" is no math: it has words.
    segments = [s for s in MATH.split(text)[1:-1:2] if s.strip() and not WORD.search(COMMAND.sub(" ", s))]
    found = segments or NUMBER.findall(text)
    return found[-1].strip() if found else None


def marked_answer(text: str) -> str | None:
    """The answer that the text itself points out. Empty ones do not count: prompts are quoted with an empty box."""
    text = text[-MAX_TEXT:]
    if boxed := boxed_answer(text):
        return boxed
    _, found, rest = text.rpartition("####")
    if not found:
        rest = text[max((match.end() for match in MARKER.finditer(text)), default=len(text)) :]
    line = re.split(r"\n|\.\s", rest.strip(), maxsplit=1)[0]  # "The answer is 5. I hope it is correct."
    return line.lstrip(" $*").rstrip(" .$*\r") or None


def boxed_answer(text: str) -> str | None:
    r"""The content of the last balanced box; boxes joined only by "and", "or" or a comma count as one list.

    One pass with a stack: to look for the end of each box apart takes quadratic time on 50,000 times "\boxed{"."""
    boxes, stack = [], []  # boxes: (start of the box, start of its content, end of its content, end of the box)
    for token in BOX_OR_BRACE.finditer(text):
        if token[2]:  # \boxed 3
            boxes.append((token.start(), token.start(2), token.end(), token.end()))
        elif token[1] or token[0] == "{":
            stack.append(token)
        elif token[0] == "}" and stack and (opened := stack.pop())[1]:
            boxes.append((opened.start(), opened.end(), token.start(), token.end()))
    answers, following = [], None
    for start, content, stop, end in sorted(boxes, reverse=True):  # of nested boxes the inner one comes first
        if answers:
            gap = re.sub(r"\\(?:text|mbox|quad|[ ,;])|[\s${}]", "", text[end : min(following, end + 50)])
            if gap not in (",", "and", "or", ",and", ",or"):
                break
        if answer := text[content:stop].strip(" \n").rstrip(".,;"):
            answers.append(answer)
            following = start
    if not answers and (unclosed := [token.end() for token in stack if token[1]]):
        return text[unclosed[0] :].strip().partition("\n")[0].rstrip(" .$") or None
    return ", ".join(reversed(answers)) or None


def is_bare(text: str) -> bool:
    """Is the text an answer and nothing else? Without this rule the last number of "(0, 1)" would be its answer."""
    rest = COMMAND.sub(" ", text.strip())
    return len(text) <= 300 and "\n" not in rest and len(WORD.findall(rest)) <= (0 if MATH.search(text) else 2)


# ------------------------------------------------------------------------------------------------ normal forms

CLEANERS = [  # (pattern, replacement), in this order
    (r"\\\$", r"\\usd "),  # money, to be told from the $ of math mode
    (r"\$|(?<!\\)\\[()\[\]]", ""),
    (r"(?<=[0-9])(?<!\b0)(?:, ?\\!|\{,\}|\\,) ?(?=[0-9]{3}(?![0-9]))", ""),  # 1,\!234 10{,}000, but not 0{,}125
    (r"(?<!\\)\\!", ""),
    (r"(?<!\\)\\(?:[,;:> ]|q?quad(?![a-zA-Z]))|~", " "),
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])", ""),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:mbox|mathrm|text(?:bf|rm|it|normal)?) ?\{ ?", r"\\text{"),
    (r" ?\^ ?(?:\\circ|\{ ?\\circ ?\})|\\degree(?![a-zA-Z])", "°"),
    (r"\\%", "%"),
    (r"−", "-"),
    (r"\\frac ?([0-9]) ?([0-9])(?![0-9])", r"\\frac{\1}{\2}"),  # \frac123 stays: it may mean anything
    (r"\\frac ?([0-9]) ?\{", r"\\frac{\1}{"),
    (r"(\\frac ?\{[^{}]*\}) ?([0-9])(?![0-9])", r"\1{\2}"),
    (r"\\sqrt ?([0-9])(?![0-9])", r"\\sqrt{\1}"),
    (r"([\^_]) ?([0-9a-zA-Z])(?![0-9])", r"\1{\2}"),
]
VARIABLE = re.compile(r"([a-zA-Z](?:_\{[0-9a-zA-Z]\})?) ?= ?([^=]+)")
TEXT = re.compile(r"\\text\{([^{}]*)\}")
BLANK = re.compile(r"(?<![0-9]) | (?![0-9])")  # "1 2" is not 12
WORDS = re.compile(r"\\text\{[^{}]*\}|[a-zA-Z][a-z]{2,}")
DECIMAL = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3}){1,99}|[0-9]{0,999})(?:\.[0-9]{0,999})?(?:[eE][-+]?[0-9]{1,3})?"  # capped
VALUE = re.compile(rf"([-+]?)(\\usd)? ?(?:([0-9]{{1,99}}) )?([-+]?{DECIMAL})(?:/([-+]?{DECIMAL}))?")
UNIT = re.compile(r"(?:(%)|(°)|\\text\{([a-z][a-zA-Z ./]*)\}(\^\{[23]\})?| (percent|dollars?|cents?|degrees?))$")
SAME_UNIT = {"percent": "%", "dollar": "$", "degree": "°"}
# A text behind a number that changes its value is no unit: 5\text{ million}, 2\text{pi}, 2\text{i}, 5\text{ or more}.
NO_UNIT = set(
    "and or not more less fewer than above below least most over under base mod remainder pi hundred thousand million "
    "billion trillion dozen half third quarter fourth fifth tenth hundredth thousandth squared cubed factorial choose "
    "times plus minus negative am pm".split()
) | set("abcdefijknopqrtuvwxyz")  # a single letter is a variable, but for g, h, l, m, s


def clean(answer: str) -> str:
    """One spelling for each LaTeX notation. Blanks are kept, single: "1, 234" is not 1,234."""
    answer = " ".join(answer.split())
    for pattern, replacement in CLEANERS:
        answer = re.sub(pattern, replacement, answer)
    answer = " ".join(answer.split())
    return answer if answer.endswith("..") else answer.removesuffix(".").rstrip()


def same_string(a: str, b: str) -> bool:
    r"""Equal but for blanks, \text, the brackets of a choice (A) and the case of words? In math x is not X."""
    words = bool(WORDS.fullmatch(a)) + bool(WORDS.fullmatch(b))
    a, b = (re.sub(r"^\(([a-zA-Z])\)$", r"\1", BLANK.sub("", TEXT.sub(r"\1", s)).removesuffix(".")) for s in (a, b))
    return a == b or (a.casefold() == b.casefold() and (words == 2 or (words == 1 and len(a) > 1)))


def value(answer: str) -> tuple[Fraction, str] | None:
    """The exact value and the unit ("" for none) of a plain number; None if anything in it is not understood."""
    unit, match = "", UNIT.search(answer)
    if match:
        words = " ".join(filter(None, match.groups())).lower().replace(".", "").split()
        singular = [word[:-1] if len(word) > 3 and word.endswith("s") else word for word in words]
        if NO_UNIT.intersection(words + singular):
            return None
        unit, answer = " ".join(singular), answer[: match.start()]
    # Anchored at the ends: \frac{1}{2}3 must not become 1/23, nor 1/2 \times 10^{3} become 1/2000.
    number = re.sub(r"^([^/]*)(?:\\times|\\cdot)10\^\{([-+]?[0-9]{1,3})\}$", r"\1e\2", BLANK.sub("", answer))
    number = re.sub(r"\\frac\{([^{} ]*)\}\{([^{} ]*)\}$", r" \1/\2", number)
    match = VALUE.fullmatch(number)
    if not match or ", " in answer or (match[2] and unit not in ("", "dollar")):
        return None
    sign, money, whole, top, bottom = match.groups()
    try:
        x = Fraction(top.replace(",", "")) / Fraction((bottom or "1").replace(",", ""))
    except (ValueError, ZeroDivisionError):  # no digits at all, as in "." or "e5"; or 1/0
        return None
    if whole and not (bottom and top.isdigit() and bottom.isdigit() and x < 1):
        return None  # 3\frac{1}{2} is a mixed number; 3\frac{5}{2} is more likely a product
    return (x + int(whole or 0)) * (-1 if sign == "-" else 1), ("$" if money else SAME_UNIT.get(unit, unit))


def same_value(a: tuple[Fraction, str], b: tuple[Fraction, str]) -> bool:
    """A unit may be missing, but must not contradict. 20% is 20 or 1/5; 20 is never 1/5."""
    (x, unit_x), (y, unit_y) = a, b
    if unit_x and unit_y:
        return unit_x == unit_y and x == y
    return x == y or (unit_x == "%" and x == 100 * y) or (unit_y == "%" and 100 * x == y)


def items(answer: str) -> tuple[str, list[str], str]:
    r"""Opening bracket, elements, closing bracket of a list, tuple, set or interval: `[0,1)` -> ("[", ["0", "1"], ")").

    The brackets are "" around a bare list, and if they are no pair, as those of (0,1)\cup(2,3)."""
    listed = re.sub(r" ?,? ?(?:\\text\{ ?(?:and|or) ?\}|\b(?:and|or)\b) ?", ", ", answer)
    # "1 and 2" is a list; but "x > 2 and x < 5" is not "x > 2 or x < 5".
    if listed != answer and all(value(element.strip()) for element in listed.split(",")):
        return "", listed.split(","), ""
    match = re.fullmatch(r"(\\\{|[(\[])(.*?)(\\\}|[)\]])", answer)
    elements = match and split_commas(match[2])
    return (match[1], elements, match[3]) if elements else ("", split_commas(answer) or [answer], "")


def split_commas(answer: str) -> list[str] | None:
    """Splits at the commas outside of all brackets, of any kind: intervals mix them. None if they do not match."""
    depth, start, elements = 0, 0, []
    for token in re.finditer(r"[(\[{}\])]|,", answer):
        depth += (token[0] in "([{") - (token[0] in ")]}")
        if depth < 0:
            return None
        if token[0] == "," and depth == 0:
            elements.append(answer[start : token.start()])
            start = token.end()
    return None if depth else elements + [answer[start:]]


# ------------------------------------------------------------------------------------------------ verdict


def same(a: str, b: str, nesting: int = 0) -> bool:
    """Are two cleaned answers equal? Symmetric."""
    a, b = a.strip(), b.strip()
    if same_string(a, b):
        return True
    value_a, value_b = value(a), value(b)
    if value_a and value_b:
        return same_value(value_a, value_b)
    (open_a, a, close_a), (open_b, b, close_b) = items(a), items(b)
    if (open_a, len(a), close_a) != (open_b, len(b), close_b) or (len(a) == 1 and not open_a) or nesting == MAX_NESTING:
        return False
    return all(same(x, y, nesting + 1) for x, y in zip(a, b))


def grade(gold: str, text: str) -> bool:
    r"""Is the final answer of the response `text` the one of `gold`, a bare answer or a reference solution?

    Symmetric for bare answers; True only if the two are certainly equal. `grade("0.5", r"So \boxed{\frac12}")`"""
    a, b = marked_answer(gold) or gold.strip(), extract(text) or text.strip()
    identical = a == b or gold == text
    if not a or identical or max(len(a), len(b)) > MAX_ANSWER:
        return identical and a != ""
    a, b = clean(a), clean(b)
    variable_a, variable_b = VARIABLE.fullmatch(a), VARIABLE.fullmatch(b)
    if variable_a and variable_b and variable_a[1] != variable_b[1]:
        return False
    return same(variable_a[2] if variable_a else a, variable_b[2] if variable_b else b)


def main():
    parser = argparse.ArgumentParser(description="Grade a response: is its final answer the gold answer?")
    parser.add_argument("gold", help="the gold answer, or a reference solution with \\boxed{} or ####")
    parser.add_argument("text", help="the response (put -- before the arguments if one starts with a minus)")
    args = parser.parse_args()
    print(f"gold      {marked_answer(args.gold) or args.gold}")
    print(f"response  {extract(args.text)}")
    print("match" if grade(args.gold, args.text) else "mismatch")


if __name__ == "__main__":
    main()
