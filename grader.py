r"""Math answer grader: is the final answer of a response the gold answer? It gives PPO its outcome reward.

    gold      Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72
    response  ... so $48 + 24 = 72$ and the answer is $\boxed{72}$.      -> match

Policies find every hole of a reward, so that what is not understood *entirely* counts only as a string: nothing is
guessed, truncated, rounded or executed. The file has six parts, each of which uses only those above it:

    extraction    the final answer in a response, in linear time
    spelling      one spelling for each notation; equal strings and plain numbers need nothing more
    parser        tokens, then recursive descent: an answer becomes a tree of tuples, or is `Unparsed`
    numbers       the value of a tree at a point: exact rationals as long as possible, then as many digits as it takes
    answers       when are two trees the same answer? Lists, intervals, equations, units, ... each have their rule
    worker        the last three run in a process with little memory and less time, so that nothing can hang training

Two expressions are equal if they are at random points: exactly where they are rational (Schwartz-Zippel), else to more
digits than are written in them. There is no symbolic simplification, which is slow and can only fail to prove things.

Left out: sums with symbolic limits, integrals, limits and derivatives are equal only if their parts are; solving
equations; converting units; piecewise functions.

Run `python grader.py GOLD TEXT`, for example `python grader.py '\frac12' 'The answer is 0.50.'`, or
`python grader.py --file X.jsonl` for a file of {"gold": ..., "text": ...}
"""

import argparse
import atexit
import faulthandler
import json
import math
import operator
import os
import random
import re
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import product

from mpmath import mp
from tqdm import tqdm

MAX_TEXT = 200_000  # characters; the final answer is at the end, and only the end of a longer text is read
MAX_ANSWER = 4_000  # characters; a longer answer is right only if it is identical
MAX_DEPTH = 40  # brackets in brackets
MAX_BITS = 200_000  # of an exact number; what is larger (9^{9^9}) has no value here, and only its spelling counts
MAX_DIGITS = 1_500  # of an inexact one
MAX_ITEMS = 200  # elements of a list, cells of a matrix, terms of a sum, values of \pm
TIME_LIMIT, MEMORY_LIMIT = 0.4, 400 << 20  # seconds of a verdict, bytes of the worker
VERDICTS = ("match", "mismatch", "unparsed", "timed out")

# ------------------------------------------------------------------------------------------------ extraction

BOX_OR_BRACE = re.compile(
    r"\\{1,2}(?:boxed|fbox)(?![a-zA-Z])\s{0,9}(?:(\{)|([-+.0-9\\][^\s$]{0,99}))|\\.|[{}]", re.DOTALL
)
MARKER = re.compile(r"answer\s{0,3}(?:is\b:?|:)|^A: ", re.IGNORECASE | re.MULTILINE)
LINE_END = re.compile(r"\n|\.\s|<\|")  # "The answer is 5. I hope it is correct.<|im_end|>"
COMMAND = re.compile(r"\\[a-zA-Z]+ ?(?:\{[^{}\\]*\}){0,2}")  # with its argument: \text{ square cm} is not prose
MATH = re.compile(r"(?<!\\)\$\$?|\\[()\[\]]")  # where math mode begins or ends
WORD = re.compile(r"(?!(?:and|or|sqrt|(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|ln|log|exp|pi)\b)\b[a-zA-Z]{2,}")
NUMBER = re.compile(
    r"(?:(?<![\w)}])[-−]\\?\$?)?"  # 5-3 ends in 3, not in -3
    r"(?:[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:[.][0-9]+|,[0-9]{2}(?![0-9]))?|\.[0-9]+)(?:[eE][-+]?[0-9]+|/[0-9]+)?(?:\\?%)?"
)
JOINT = re.compile(r"[,;+&]*|(?:,|[a-z]+|for part \([a-z]\))?(?:and|or)(?:[a-z]_\d=)?")  # between boxes of one answer


def extract(text: str) -> str | None:
    r"""The final answer in a response or a reference solution, None if there is none.

    The last \boxed{}, else what follows the last ####, else "answer is" or "answer:", else a text that is nothing but
    an answer, else the last $math$, else the last number."""
    text = text[-MAX_TEXT:]
    answer = marked_answer(text)
    if answer or is_bare(text):
        return answer or text.strip() or None
    return last_in_prose(text)


def last_in_prose(text: str) -> str | None:
    """The last math segment or the last number, whichever is later."""
    found, found_end, end, opened = None, 0, 0, False
    for delimiter in MATH.finditer(text):
        segment, end = text[end : delimiter.start()].strip(" "), delimiter.end()
        # What stands between the dollars of "$5 and then $8" is no math: it has words.
        if opened and segment and not WORD.search(COMMAND.sub(" ", segment)):
            if "\n" not in segment or delimiter[0] in ("$$", r"\]"):  # inline math does not go over several lines
                found = segment.strip()
            found_end, opened = end, False
        else:
            opened = True
    numbers = NUMBER.findall(text[found_end:])
    return numbers[-1] if numbers else found


def marked_answer(text: str) -> str | None:
    """The answer that the text itself points out. Empty ones do not count: prompts are quoted with an empty box."""
    text = text[-MAX_TEXT:]
    before, final, rest = text.rpartition("final answer is")
    line = re.split(LINE_END, rest.strip(), maxsplit=1)[0]
    if not (final and "boxed" in before and "boxed" not in rest and is_bare(line)):  # the later one of the two counts
        if boxed := boxed_answer(text):
            return boxed
        _, final, rest = text.rpartition("####")
        if not final:
            rest = text[max((match.end() for match in MARKER.finditer(text)), default=len(text)) :]
        line = re.split(LINE_END, rest.strip(), maxsplit=1)[0]
    line = re.sub(r'\\?"', "", line)
    if not is_bare(line):  # "Final answer: $3$, since x is 5", "Final answer: the largest n is 34"
        start = re.match(r"\$([^$]+)\$|\\\((.+?)\\\)", line)
        line = start[1] or start[2] if start else last_in_prose(line) or line
    return line.lstrip(" $*").rstrip(" .$*\r") or None


def boxed_answer(text: str, joined: bool = True) -> str | None:
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
            if not joined:
                break
            gap = text[end : min(following, end + 60)]
            gap = re.sub(r"\\(?:text|mbox|q?quad|[ ,;()\[\]])|[${}]", "", gap)
            if not JOINT.fullmatch(re.sub(r"(?<!for)(?<!part)\s", "", gap)) or end > following:
                break
        if answer := text[content:stop].strip(" \n").rstrip(".,;"):
            answers.append(answer)
            following = start
    if not answers and (unclosed := [token.end() for token in stack if token[1]]):
        return text[unclosed[0] :].strip().partition("\n")[0].rstrip(" .$") or None
    return ", ".join(dict.fromkeys(reversed(answers))) or None


def is_bare(text: str) -> bool:
    """Is the text an answer and nothing else? Without this rule the last number of "(0, 1)" would be its answer."""
    if re.fullmatch(r"\$\$?[^$]{1,300}\$\$?", text.strip()):
        return True
    rest = COMMAND.sub(" ", text.strip())
    rest = rest.replace("\n", " ") if "\\begin" in text else rest
    if "\n" in rest or re.search(r"[a-zA-Z]{3,9} ?:\s|^(?:[A-Za-z][a-z]{2,}|[Ss]o)\s.*=|<<", rest):
        return False
    words = len(WORD.findall(rest))
    if re.search(r"[-+*/^=]", rest) and not re.search("[a-zA-Z]{3}", rest):  # xy+yz+zx
        words = 0
    return not words or (words <= 2 and len(text) <= 300 and not MATH.search(text))


# ------------------------------------------------------------------------------------------------ spelling

PLAIN = re.compile(r"([-+]?)(?:(\d{1,300})|(\d{1,3}(?:,\d{3}){1,99}))??(?:\.(\d{0,300})|,(\d\d)|(?<=\b0),(\d{3,}))?", re.ASCII)
SPELLINGS = {  # LaTeX command -> the one spelling that the parser knows
    **dict.fromkeys("left right bigl bigr Bigl Bigr biggl biggr Biggl Biggr big Big bigg Bigg".split(), ""),
    **dict.fromkeys("displaystyle textstyle limits rm bf it mathbf boldsymbol bm mathit boxed".split(), ""),
    **dict.fromkeys("enspace thinspace".split(), " "),
    **dict.fromkeys("dfrac tfrac cfrac".split(), r"\frac"),
    **dict.fromkeys("dbinom tbinom".split(), r"\binom"),
    **dict.fromkeys("mbox hbox mathrm textbf textrm textit textsf textnormal operatorname mathsf".split(), r"\text"),
    **dict.fromkeys("le leq leqslant leqq".split(), "≤"), **dict.fromkeys("ge geq geqslant geqq".split(), "≥"),
    **dict.fromkeys("ne neq".split(), "≠"), **dict.fromkeys("approx simeq doteq".split(), "≈"),
    **dict.fromkeys("cdot times ast".split(), "*"), **dict.fromkeys("emptyset varnothing".split(), "∅"),
    **dict.fromkeys("mid vert lvert rvert".split(), "|"), **dict.fromkeys("setminus backslash".split(), "∖"),
    **dict.fromkeys("dots ldots cdots dotsc".split(), "..."), **dict.fromkeys("land wedge".split(), r"\text{and}"),
    **dict.fromkeys("lor vee".split(), r"\text{or}"), **dict.fromkeys("circ degree".split(), "°"),
    "lt": "<", "gt": ">", "div": "÷", "pm": "±", "mp": "∓", "in": "∈", "cup": "∪", "cap": "∩", "infty": "∞", "pi": "π",
    "equiv": "≡", "colon": ":", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "prime": "'",
    "varepsilon": r"\epsilon", "varphi": r"\phi", "vartheta": r"\theta", "arcctg": r"\arccot", "tg": r"\tan",
}  # fmt: skip
CHARACTERS = {
    **dict(zip("−–×·⋅∙∗⁢﹣", "--*****\u200b-")), **dict(zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", (rf"\frac{{{a}}}{{{b}}}" for a, b in (
        (1, 2), (1, 3), (2, 3), (1, 4), (3, 4), (1, 5), (2, 5), (3, 5), (4, 5), (1, 6), (5, 6), (1, 8), (3, 8), (5, 8),
        (7, 8))))),
    **{c: rf"\{name} " for c, name in zip("αβγδθλμρσφωΔ", "alpha beta gamma delta theta lambda mu rho sigma phi omega "
        "Delta".split())},
    "≦": "≤", "≧": "≥", "⩽": "≤", "⩾": "≥", "º": "°", "∛": r"\sqrt[3]", "′": "'", "’": "'", "…": "...", "\u200b": "",
    "\xa0": " ", "\u2009": " ", "\u202f": " ", "（": "(", "）": ")", "，": ",", "：": ":", "\ufeff": "", "~": " ",
}  # fmt: skip
TRANSLATION = str.maketrans(CHARACTERS)
RAISED, LOWERED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+"), re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻₀₁₂₃₄₅₆₇₈₉", "0123456789+-0123456789")
CLEANERS = [  # (pattern, replacement), in this order
    (r"(?<=[0-9])(?<!\b0) ?(?:, ?\\!|\{ ?, ?\}|\\,) ?(?=[0-9]{3}(?![0-9]))", ""),  # 1,\!234 10{,}000, but not 0{,}125
    (r"\\\\ ?\[[-0-9. ]{1,9}[a-z]{2}\]", r"\\\\"),  # \\[2pt]
    (r"(?<!\\)\\[,;:> ]", " "),
    (r"(?<!\\)\\(?:!|$)", ""),
    (r" ?\{ ?([:,]) ?\} ?", r"\1"),
    (r"(?<=[0-9]) ?[xX] ?(?=10 ?\^)", "*"),  # 6.02 x 10^23
    (r"(?<=[0-9)}])(and|or)(?=[0-9A-Z(-])", r" \1 "),
    (r"^([-+]?[1-9][0-9]{0,2})((?: [0-9]{3})+)(?![0-9/])", lambda m: m[1] + m[2].replace(" ", "")),  # 1 000
    (r" ?\^ ?(?:°|\{ ?° ?\})", "°"),
    (r"\^ ?\{ ?('+) ?\}", r"\1"),
    (r"^≈ ?|\\(?:text)?color ?\{[a-zA-Z]*\}", ""),
    (r"^\*\*(.*)\*\*$", r"\1"),
    (r" ?\\text ?\{ ?to ?\} ?|(?<=[0-9]) to (?=[0-9])", ":"),
    (r"(^|[(,\[] ?)([-+]) ?([$€£]) ?", r"\1\3\2"),
    (r"<=", "≤"), (r">=", "≥"), (r"!=", "≠"), (r"\*\*", "^"), (r"\+/-", "±"),
    (r"\\mathbb ?\{? ?R ?\}?", "ℝ"),
    (r"\\text ?\{ ?", r"\\text{"),
    (r"([\^_]) ?([0-9a-zA-Z])(?![0-9])", r"\1{\2}"),
    (r"\\sqrt ?([0-9])(?![0-9])", r"\\sqrt{\1}"),
    (r"\\frac ?([0-9]) ?([0-9])(?![0-9])", r"\\frac{\1}{\2}"),
]  # fmt: skip
CLEANERS = [(re.compile(pattern), replacement) for pattern, replacement in CLEANERS]
TEXT = re.compile(r"\\text\{([^{}]*)\}")
BLANK = re.compile(r"(?<![0-9,]) | (?![0-9])")  # "1 2" is not 12, "1, 234" not 1,234
WORDS = re.compile(r"\\text\{[^{}]*\}|[a-zA-Z][a-z]{2,}")


def plain_number(answer: str) -> int | Fraction | None:
    """-1,234.50 -> Fraction(-2469, 2), the commonest kind of answer by far; None for anything else."""
    match = PLAIN.fullmatch(answer)
    if not match or len(answer) < 3 and not any(c.isdigit() for c in answer):
        return None
    sign, digits, grouped, *decimals = match.groups()
    x = int(digits or (grouped or "0").replace(",", ""))
    if decimals := next(filter(None, decimals), ""):
        x = simple(x + Fraction(int(decimals), 10 ** len(decimals)))
    return -x if sign == "-" else x


def clean(answer: str) -> str:
    """One spelling for each LaTeX notation. Blanks are kept, single: "1, 234" is not 1,234."""
    answer = RAISED.sub(lambda m: f"^{{{m[0].translate(DIGITS)}}}", answer.translate(TRANSLATION))
    answer = LOWERED.sub(lambda m: f"_{{{m[0].translate(DIGITS)}}}", answer)
    if "\\" in answer or "$" in answer:
        if "\\\\" in answer and "\\begin" not in answer:
            answer = re.sub(r"\\\\(?=[a-zA-Z{}])", r"\\", answer)  # escaped twice, as in JSON
        answer = re.sub(r"\\(?:left|right) ?\.|\\q?quad", " ", answer)
        answer = re.sub(r"\\\\|\\([a-zA-Z]+)", lambda m: SPELLINGS.get(m[1], m[0]) if m[1] else m[0], answer)
        answer = answer.replace(r"\$", "\0").replace("$", "").replace("\0", "$")
        answer = re.sub(r"(?<!\\)\\[()\[\]]", "", answer).replace(r"\%", "%")
    answer = " ".join(answer.split())
    for pattern, replacement in CLEANERS:
        answer = pattern.sub(replacement, answer)
    answer = " ".join(answer.split())
    return answer if answer.endswith("..") else answer.removesuffix(".").rstrip()


def same_string(a: str, b: str) -> bool:
    r"""Equal but for blanks, \text, the brackets of a choice (A) and the case of words? In math x is not X."""
    words = bool(WORDS.fullmatch(a)) + bool(WORDS.fullmatch(b))
    a, b = (re.sub(r"^\(([a-zA-Z])\)$", r"\1", BLANK.sub("", TEXT.sub(r"\1", s)).removesuffix(".")) for s in (a, b))
    return a == b or (a.casefold() == b.casefold() and (words == 2 or (words == 1 and len(a) > 1)))


# ------------------------------------------------------------------------------------------------ parser


class Unparsed(Exception):
    """The answer is not understood entirely, or is too large to be computed with."""


FUNCTIONS = set("sin cos tan cot sec csc sinh cosh tanh coth sech csch exp ln log lg min max gcd lcm".split())
FUNCTIONS |= set("arcsin arccos arctan arccot arcsec arccsc".split())
GREEK = set("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi chi psi omega".split())
GREEK |= set("Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell triangle".split())
CONSTANTS = {"π", "e", "i"}
PLAIN_WORDS = {"sqrt": r"\sqrt", "pi": "π", "infinity": "∞", "infty": "∞", "inf": "∞", "oo": "∞", "union": "∪", "U": "∪"}
SHORT_UNITS = set("cm mm km kg mg ml mL ft mi hr lb oz in yd pm am mph cc sq".split())
UNIT_LETTERS = set("ghlmsLNJWVKFCA")  # 5\text{ m} is a length, 5\text{ x} a product
RELATIONS = "=<>≤≥≠≈≡∈"
CLOSING = {"(": ")", "[": "]", r"\{": r"\}", "{": "}", r"\langle": r"\rangle", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
INFIX = {r"\pmod", r"\bmod", r"\choose", r"\over"}  # commands that no factor begins with
ACCENTS = "overline|bar|vec|hat|widehat|overrightarrow|overarc|tilde|mathcal|mathbb|mathfrak"
TOKEN = re.compile(
    rf"""(?P<blank>[ ]+)
    |(?P<repeating>[0-9]*\.[0-9]*\\(?:overline|bar|dot)[ ]?(?:\{{[0-9]+\}}|[0-9])|[0-9]*\.\([0-9]+\)|[0-9]*\.[0-9]+[ ]?\.\.\.)
    |(?P<number>(?:[0-9]+(?:,[0-9]+)*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+(?![0-9]*[a-zA-Z]))?)
    |\\text\{{(?P<text>(?:[^{{}}]|\{{[^{{}}]*\}})*)\}}
    |(?P<environment>\\(?:begin|end)[ ]?\{{[a-zA-Z]+\*?\}})(?:[ ]?\{{[clr| ]*\}})?
    |(?P<name>(?:\\(?:{ACCENTS})|\\angle|∠)[ ]?(?:\{{[^{{}}]+\}}|[a-zA-Z]+)|\.\.\.)
    |(?P<word>[a-zA-Z]+)
    |(?P<symbol>\\[a-zA-Z]+|\\[{{}}|\\]|.)""",
    re.VERBOSE,
)


def tokenize(answer: str) -> list[tuple[str, object, bool]]:
    """(kind, value, after a blank?) for each token; the kinds are number, value, variable, text, and symbol for the rest."""
    tokens, depth, blank = [], 0, False
    for match in TOKEN.finditer(answer):
        kind, token = match.lastgroup, match[0]
        if kind == "blank":
            blank = True
            continue
        last, before = tokens[-1] if tokens else ("", ""), tokens[-2] if len(tokens) > 1 else ("", "")
        measured = last[0] in ("number", "value") or last[1] in (")", "}", "°") or (last[1] == "/" and before[0] == "text")
        if kind == "number":
            groups = token.split(",")
            thousands = len(groups[0]) <= 3 and groups[0] != "0" and all(re.match(r"\d{3}(\D|$)", g) for g in groups[1:])
            if thousands and depth == 0:  # in (1,234) the comma separates
                groups = ["".join(groups)]
            for i, group in enumerate(groups):
                tokens += [("symbol", ",", False)] * (i > 0) + [("number", group, blank and i == 0)]
        elif kind == "repeating":
            tokens.append(("value", repeating_decimal(token), blank))
        elif kind == "environment":
            tokens.append(("symbol", match["environment"].replace(" ", "").replace("*", ""), blank))
        elif kind == "name":
            tokens.append(("variable", re.sub(r"[ {}]", "", token), blank))
        elif kind == "symbol":
            depth += 0 if token in "{}" else (token in CLOSING) - (token in CLOSING.values())
            tokens.append(("symbol", token, blank))
        else:
            words = match["text"].strip() if kind == "text" else token
            if words.strip(" ,") in ("and", "or"):
                tokens.append(("symbol", words.strip(" ,"), blank))
            elif words in FUNCTIONS or words in PLAIN_WORDS:
                tokens.append(("symbol", PLAIN_WORDS.get(words, "\\" + words), blank))
            elif kind == "text" and "," in words:
                tokens += tokenize(",".join(rf"\text{{{word}}}" for word in words.split(",")))
            elif kind == "text" and re.fullmatch(r"[^a-zA-Z\\]*[a-zA-Z]?[^a-zA-Z\\]*", words) and not (
                measured and words in UNIT_LETTERS
            ):
                tokens += tokenize(words)  # \text{(A)}, \text{5}, \text{e}
            elif kind == "word" and is_product(words) and not (measured and words in SHORT_UNITS):
                tokens += [("variable", letter, blank and i == 0) for i, letter in enumerate(words)]
            elif words:
                tokens.append(("text", words, blank))
        blank = False
    return tokens


def is_product(word: str) -> bool:
    """Are these letters a product, as xy, abc or AB are? A longer word is one only in alphabetical order: dog is none."""
    return len(word) <= 2 or (len(word) <= 4 and (word.isupper() or list(word) == sorted(word)))


def to_number(text: str) -> int | Fraction:
    """12.5e3, exactly. Raises Unparsed beyond the caps."""
    mantissa, _, exponent = text.lower().partition("e")
    whole, _, decimals = mantissa.partition(".")
    if len(mantissa) > 300 or len(exponent) > 4:
        raise Unparsed("too many digits")
    return simple(Fraction(int(whole + decimals or "0"), 10 ** len(decimals)) * Fraction(10) ** int(exponent or 0))


def repeating_decimal(text: str) -> Fraction:
    r"""0.1\overline{6} = 1/6, also 0.(6), and 0.1666... if its last digits repeat at least three times."""
    whole, _, rest = text.replace(" ", "").partition(".")
    pattern = r"(\d*?)(\d{1,9}?)\2{2,}\.\.\." if rest.endswith("...") else r"(\d*)\D+(\d+)\W?"
    match = re.fullmatch(pattern, rest)
    if not match or len(text) > 300:
        raise Unparsed("which digits repeat?")
    fixed, period = match.groups()
    return (int(whole + fixed or "0") + Fraction(int(period), 10 ** len(period) - 1)) / 10 ** len(fixed)


def simple(x: Fraction) -> int | Fraction:
    return x.numerator if x.denominator == 1 else x


class Parser:
    """Recursive descent. Nodes are numbers (int, Fraction) or tuples (kind, ...) of strings and nodes; each method reads
    what it is named after. Whatever is left over at the end makes the whole answer Unparsed."""

    def __init__(self, answer: str):
        self.tokens, self.i, self.depth = tokenize(answer), 0, 0
        self.bars = False  # inside |...| and {... | ...}, where the next bar is the closing one

    def peek(self, ahead: int = 0):
        i = self.i + ahead
        return self.tokens[i] if 0 <= i < len(self.tokens) else ("end", "", False)

    def sees(self, *symbols: str) -> bool:
        return self.peek()[0] == "symbol" and self.peek()[1] in symbols

    def accept(self, *symbols: str) -> str | None:
        if not self.sees(*symbols):
            return None
        self.i += 1
        return self.tokens[self.i - 1][1]

    def expect(self, *symbols: str) -> str:
        if found := self.accept(*symbols):
            return found
        raise Unparsed(f"{' or '.join(symbols)} expected, not {self.peek()[1]!r}")

    def answer(self):
        node = self.items()
        if self.peek()[0] != "end":
            raise Unparsed(f"left over: {self.peek()[1]!r}")
        return node

    def items(self):
        """Elements between commas, semicolons, "and" and "or". Of "p=5,q=2; p=7,q=2" the groups are tuples."""
        groups, separators = [[self.relation()]], set()
        while separator := self.accept(",", ";", "and", "or"):
            while word := self.accept("and", "or"):  # 1, 2, and 3
                separator = word
            separators.add(separator)
            if separator == ";":
                groups.append([])
            groups[-1].append(self.relation())
        nodes = [node for group in groups for node in group]
        if len(nodes) > MAX_ITEMS:
            raise Unparsed("too many elements")
        if {",", ";"} <= separators:
            nodes = [("seq", "()", *group) if len(group) > 1 else group[0] for group in groups]
        elif len(nodes) > 1 and all(kind_of(node) == "order" for node in nodes):
            unequal = all("≠" in node for node in nodes)
            if unequal or separators in ({"and"}, {"or"}):
                return ("∩" if unequal or separators == {"and"} else "∪", *nodes)
        return ("list", *nodes) if len(nodes) > 1 else nodes[0]

    def relation(self):
        """a, a <= b < c, x in S, a = b = c, of which the last counts: with a name before it, it is ("named", a, c)."""
        members, signs = [self.union()], []
        while self.sees(*RELATIONS):
            signs.append(self.expect(*RELATIONS))
            members.append(self.union())
        first, last = members[0], members[-1]
        if not signs:
            return first
        if set(signs) <= set("<>≤≥≠"):
            return ("order", first, *(x for pair in zip(signs, members[1:]) for x in pair))
        if "≈" in signs:  # of x = 1/3 ≈ 0.33 the exact value counts
            last, signs = members[max(signs.index("≈"), 1)], ["="]
        if not set(signs) <= {"=", "≡"} and signs != ["∈"]:
            raise Unparsed("a mixture of relations")
        if kind_of(first) == kind_of(last) == "seq" and len(first) == len(last) and is_name(first):
            return ("seq", first[1], *(("named", x, y) for x, y in zip(first[2:], last[2:])))  # (x, y) = (1, 2)
        if is_name(first):
            return ("named", first, last)
        if is_name(last) and signs == ["="]:
            return ("named", last, first)
        if len(signs) > 1 or not variables(first) | variables(last):
            return last
        return ("equation", first, last)

    def union(self):
        node = self.ratio()
        while symbol := self.accept("∪", "∩", "∖"):
            node = (symbol, node, self.ratio())
            if exact(node[1]) or exact(node[2]):
                raise Unparsed("a number is no set")
        return node

    def ratio(self):
        terms = [self.quantity()]
        while not self.bars and self.accept(":"):
            terms.append(self.quantity())
        return terms[0] if len(terms) == 1 else ("ratio", *terms)

    def quantity(self):
        """A sum and its unit: $5, 5 cm^2, 12 square inches, 3 (mod 7)."""
        unit = [symbol] if (symbol := self.accept("$", "€", "£")) else []
        node = self.sum()
        while self.peek()[0] == "text" or self.sees("$", "€", "£", "/", r"\pmod"):
            unit.append(str(self.peek()[1]))
            self.i += 1
            if unit[-1] == r"\pmod":
                unit.append(str(self.atom()))
            if self.accept("^"):
                unit.append(f"^{self.argument()}")
        return ("unit", node, canonical_unit(unit)) if unit else node

    def sum(self):
        terms = []
        while not terms or self.sees("+", "-"):
            negative = False
            while sign := self.accept("+", "-"):
                negative ^= sign == "-"
            term = self.product()
            terms.append(times(-1, term) if negative else term)
        return plus(*terms)

    def product(self):
        """Factors, side by side or not. 3\\frac12 and 3 1/2 are mixed numbers; 3 5 is nothing."""
        node, start = self.power(), self.i - 1
        while True:
            last, whole = self.peek(-1), self.i - 1 == start and type(node) is int and self.peek(-1)[0] == "number"
            if self.accept("*"):
                node = times(node, self.signed())
            elif self.accept(r"\bmod"):
                node = ("fn", "mod", node, self.signed())
            elif self.sees("/", "÷") and self.peek(1)[0] != "text":
                self.i += 1
                node = ("/", node, self.signed())
            elif self.peek()[0] == "number" and last[1] in ("!", ")", "i", "π"):
                node = times(node, self.power())
            elif self.peek()[0] == "number":
                top, slash, bottom = self.peek(), self.peek(1)[1], self.peek(2)
                if not (whole and top[2] and slash == "/" and bottom[0] == "number"):
                    raise Unparsed("two numbers side by side")
                self.i += 3
                node = mixed(node, ("/", to_number(top[1]), to_number(bottom[1])))
            elif self.starts_factor():
                fraction, factor = self.sees(r"\frac"), self.power()
                node = mixed(node, factor) if whole and fraction and is_proper(factor) else times(node, factor)
            elif sign := self.accept("%", "°"):
                node = (sign, node)
            else:
                return node

    def starts_factor(self) -> bool:
        kind, value, _ = self.peek()
        if kind != "symbol" or value == "|":
            return kind in ("variable", "value") or (value == "|" and not self.bars)
        if value[0] == "\\" and len(value) > 2:
            return value not in INFIX and value not in CLOSING.values() and not value.startswith(r"\end")
        return value in CONSTANTS or value in "([{√"

    def signed(self):
        return times(-1, self.signed()) if self.accept("-") else self.power()

    def power(self):
        node = self.atom()
        while symbol := self.accept("^", "!", "'"):
            if symbol == "!":
                node = ("fn", "!!" if self.accept("!") else "!", node)
            elif symbol == "'":
                node = ("'", node)
            elif self.peek()[0] == "text" or (self.sees("{") and self.peek(1)[0] == "text"):  # 5^{\text{th}}
                braces = self.accept("{")
                node = ("unit", node, canonical_unit([self.peek()[1]]))
                self.i += 1
                braces and self.expect("}")
            else:
                node = ("^", node, self.argument(whole=True))
        return node

    def argument(self, whole: bool = False):
        r"""Of \frac, \sqrt, ^: a group in braces, or one token; of a number without braces TeX takes one digit."""
        if self.accept("{"):
            return self.group("{")
        kind, value, _ = self.peek()
        if kind == "number" and not whole and len(value) > 1:
            self.tokens[self.i] = ("number", value[1:], False)
            return to_number(value[0])
        return times(-1, self.argument(whole)) if whole and self.accept("-") else self.atom()

    def group(self, opened: str):
        """The rest of a bracket: (x+1) is x+1, (1,2) a sequence, [0,1) an interval, {x : x > 3} what its relation says."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unparsed("nested too deeply")
        outside, self.bars = self.bars, opened == r"\{"
        node = self.items()
        if opened == "{" and (symbol := self.accept(r"\over", r"\choose")):
            node = ("/", node, self.items()) if symbol == r"\over" else ("fn", "binom", node, self.items())
        self.bars = False
        if opened == r"\{" and self.accept(":", "|"):
            name, node = node, self.items()
            if kind_of(name) == "named":  # {x in R : ...}
                name, node = name[1], node if name[2] == ("ℝ",) else ("∩", name[2], node)
            if not is_name(name) or name not in names_in(node):
                raise Unparsed("not a set")
        else:
            name = None
        closed = self.expect(*(")", "]") if opened in "([" else (CLOSING[opened],))
        self.bars, self.depth = outside, self.depth - 1
        if name is not None:
            return node
        items = node[1:] if kind_of(node) == "list" else (node,)
        if opened == r"\{":
            return ("set", *items)
        if len(items) == 1:
            if CLOSING[opened] != closed:
                raise Unparsed("brackets do not match")
            return ("fn", opened, node) if opened in (r"\lfloor", r"\lceil") else node
        return ("seq", "()" if opened == r"\langle" else opened + closed, *items)

    def atom(self):
        kind, value, _ = self.peek()
        self.i += 1
        if kind == "value":
            return value
        if kind == "number":
            return ("based", value.lstrip("0"), str(self.argument(whole=True))) if self.accept("_") else to_number(value)
        if kind == "variable":
            return self.variable(value)
        if kind == "text":
            if self.i > 1 and self.peek(-2)[1] not in (*RELATIONS, ",", "and", "or", "(", r"\{"):
                raise Unparsed("a word in an expression")
            return ("text", " ".join(re.findall(r"\w+", value.casefold())))
        if kind == "end":
            raise Unparsed("unfinished")
        if value == r"\{" and self.accept(r"\}"):
            return ("set",)
        if value in CLOSING:
            return self.group(value)
        if value in ("|", r"\|"):
            outside, self.bars = self.bars, True
            node = self.items()
            self.expect(value)
            self.bars = outside
            return ("fn", "abs", node)
        if value in CONSTANTS or value == "∞":
            return ("constant", value)
        if value in "∅ℝ":
            return ("set",) if value == "∅" else ("ℝ",)
        if value == r"\frac":
            return ("/", self.argument(), self.argument())
        if value == r"\binom":
            return ("fn", "binom", self.argument(), self.argument())
        if value == "√":
            return ("fn", "root", 2, self.power() if self.sees("(") else self.argument(whole=True))
        if value == r"\sqrt":
            index = (self.sum(), self.expect("]"))[0] if self.accept("[") else 2
            if self.peek()[0] == "number" and len(self.peek()[1]) > 1:
                raise Unparsed("does the root end after the first digit?")
            return ("fn", "root", index, self.argument())
        if value[1:] in FUNCTIONS:
            return self.function(value[1:])
        if value in (r"\sum", r"\prod", r"\int"):
            return self.big_operator(value)
        if value.startswith(r"\begin"):
            return self.matrix(value[7:-1])
        if value[1:] in GREEK:
            return self.variable(value)
        raise Unparsed(f"unexpected {value!r}")

    def variable(self, name: str):
        r"""x, V_{\text{max}}; values of unknown functions: f(x), f^{-1}(x), x', and x_1 or a_{n+1} by their index."""
        if self.accept("_"):
            braces = self.sees("{")
            kind, text, _ = self.peek(int(braces))
            if kind != "text":
                return ("call", name + "_", self.argument(whole=True))
            name += "_" + text
            self.i += 3 if braces else 1
        while self.accept("'"):
            name += "'"
        following = [str(token[1]) for token in self.tokens[self.i : self.i + 6]]
        if name in "fgh" and "".join(following) == "^{-1}(":
            self.i += 5
            name += "^{-1}"
        # W(n) = 1 defines a function; elsewhere only some letters before a bracket are one, and the others factors.
        defined = following[2:3] == [")"] and following[3:4] and following[3] in RELATIONS
        if self.sees("(") and (name[0] in "fghFGHP" or name[-1] == "'" or defined):
            self.i += 1
            return ("call", name, *arguments(self.group("(")))
        return ("constant", name) if name in CONSTANTS else ("variable", name)

    def function(self, name: str):
        r"""\sin^2 2x is sin(2x)^2, \sin^{-1} the inverse, \sin(x) y a product; an argument ends before the next function."""
        exponent = base = None
        while symbol := self.accept("^", "_"):
            if symbol == "^":
                exponent = self.argument(whole=True)
            else:  # \log_28 is log 8 to the base 2, but \log_10 5 has the base 10
                last = self.peek(1)[0] == "end" or self.peek(1)[1] in ("+", "-", ",", ")", "}", "*", "/")
                base = self.argument(whole=not last)
        if self.sees("(", "{", "[", "|"):
            argument = self.atom()
        else:
            negative = self.accept("-")
            if not (self.starts_factor() or self.peek()[0] == "number"):
                raise Unparsed("a function of nothing")
            argument = self.power()
            while self.starts_factor() and not self.sees("(", "[", "|", *("\\" + f for f in FUNCTIONS)):
                argument = times(argument, self.power())
            argument = times(-1, argument) if negative else argument
        argument = ("°", argument) if self.accept("°") else argument
        if name == "lg" or (name == "log" and base is not None):
            node = ("/", ("fn", "ln", argument), ("fn", "ln", 10 if name == "lg" else base))
        elif exponent == -1 and "arc" + name in FUNCTIONS:
            return ("fn", "arc" + name, argument)
        else:
            node = ("fn", name, *arguments(argument))
        return node if exponent is None else ("^", node, exponent)

    def big_operator(self, name: str):
        low = high = None
        while symbol := self.accept("_", "^"):
            if symbol == "_":
                low = self.argument(whole=True)
            else:
                high = self.argument(whole=True)
        if name == r"\int":  # equal only if its parts are
            return ("call", name, low or 0, high or 0, self.product())
        if kind_of(low) != "named" or kind_of(low[1]) not in ("variable", "constant") or high is None:
            raise Unparsed("a sum over what?")
        return ("big", name, low[1], low[2], high, self.product())

    def matrix(self, name: str):
        if name not in ("matrix", "pmatrix", "bmatrix", "Bmatrix", "vmatrix", "smallmatrix", "array"):
            raise Unparsed(f"no matrix: {name}")
        rows = [[]]
        while not self.accept(rf"\end{{{name}}}"):
            if self.accept(r"\\"):
                rows.append([])
            elif not self.accept(r"\hline"):
                rows[-1] and self.expect("&")
                rows[-1].append(self.quantity())
        rows = [row for row in rows if row]
        if not rows or len({len(row) for row in rows}) > 1 or len(rows) * len(rows[0]) > MAX_ITEMS:
            raise Unparsed("no matrix")
        return determinant(rows) if name == "vmatrix" else matrix(rows)


def kind_of(node) -> str:
    return node[0] if isinstance(node, tuple) else "number"


def children(node) -> list:
    """The nodes inside of a node; what else it holds are strings."""
    return [child for child in node[1:] if not isinstance(child, str)] if isinstance(node, tuple) else []


def walk(node):
    yield node
    for child in children(node):
        yield from walk(child)


def substitute(node, old, new):
    if node == old:
        return new
    return tuple(substitute(child, old, new) for child in node) if isinstance(node, tuple) else node


def variables(node) -> set:
    return {n for n in walk(node) if kind_of(n) in ("variable", "text")}


def is_name(node) -> bool:
    r"""May this stand before "=" as the name of a value? x, x_1, f(x), AB, |AB|, (x, y), \sin A, AB/CD, but not 2x or x+y."""
    kind = kind_of(node)
    if kind in ("variable", "call", "text") or node in (("constant", "i"), ("constant", "e")):
        return True
    if kind in ("*", "/"):
        return all(is_name(n) and not (kind_of(n) == "variable" and n[1][0].islower()) for n in children(node))
    return kind in ("ratio", "seq", "fn", "'", "°") and all(map(is_name, children(node)))


def names_in(node) -> set:
    """The names of an inequality or equation: of 0 < f(x) < 1 only f(x)."""
    return {node} if is_name(node) else set().union(*map(names_in, children(node)))


def arguments(node) -> tuple:
    return node[2:] if kind_of(node) == "seq" else (node,)


def mixed(whole: int, fraction):
    if not is_proper(fraction):
        raise Unparsed("not a mixed number")
    return whole + Fraction(fraction[1], fraction[2])


def is_proper(fraction) -> bool:
    _, top, bottom = fraction
    return type(top) is int and type(bottom) is int and 0 < top < bottom


def matrix(rows):
    return ("matrix", len(rows[0]), *(cell for row in rows for cell in row))


def rows_of(node):
    return [node[i : i + node[1]] for i in range(2, len(node), node[1])] if kind_of(node) == "matrix" else None


def plus(*terms):
    rows = [rows_of(term) for term in terms]
    if len(terms) == 1 or not all(rows):
        return ("+", *terms) if len(terms) > 1 else terms[0]
    if len({(len(r), len(r[0])) for r in rows}) > 1:
        raise Unparsed("matrices of different shapes")
    return matrix([[plus(*cells) for cells in zip(*lines)] for lines in zip(*rows)])


def times(x, y):
    """The product; of matrices and a number, or two matrices, the matrix."""
    rows_x, rows_y = rows_of(x), rows_of(y)
    if rows_x and rows_y:
        if len(rows_x[0]) != len(rows_y) or len(rows_x) * len(rows_y[0]) * len(rows_y) > MAX_ITEMS:
            raise Unparsed("matrices of these shapes have no product")
        return matrix([[plus(*map(times, row, column)) for column in zip(*rows_y)] for row in rows_x])
    if rows_x or rows_y:
        scalar = y if rows_x else x
        return matrix([[times(scalar, cell) for cell in row] for row in rows_x or rows_y])
    if x == -1 and exact(y):
        return -y
    if x == -1 and kind_of(y) in ("unit", "%", "°"):
        return (y[0], times(-1, y[1]), *y[2:])
    return ("*", x, y)


def determinant(rows):
    if len(rows) != len(rows[0]) or len(rows) > 4:
        raise Unparsed("no determinant")
    if len(rows) == 1:
        return rows[0][0]
    minors = ([row[:j] + row[j + 1 :] for row in rows[1:]] for j in range(len(rows)))
    return plus(*(times((-1) ** j, times(rows[0][j], determinant(minor))) for j, minor in enumerate(minors)))


UNIT_NAMES = {  # spelling -> unit; a plural s is taken off first
    "percent": "%", "percentage": "%", "pct": "%", "dollar": "$", "usd": "$", "buck": "$", "euro": "€", "cent": "¢",
    "degree": "°", "deg": "°", "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "meter": "m",
    "metre": "m", "kilometer": "km", "kilometre": "km", "inche": "in", "inch": "in", "foot": "ft", "feet": "ft", "yard": "yd",
    "mile": "mi", "gram": "g", "kilogram": "kg", "milligram": "mg", "liter": "l", "litre": "l", "milliliter": "ml",
    "ounce": "oz", "lb": "pound", "hr": "hour", "h": "hour", "min": "minute", "sec": "second", "s": "second",
    "sq": "square", "people": "person", "men": "man", "women": "woman", "children": "child",
}  # fmt: skip
# A text behind a number that changes its value is no unit: 5\text{ million}, 2\text{ pi}, 5\text{ or more}.
NO_UNIT = set(
    "and or not more less fewer than above below least most over under base remainder pi hundred thousand million "
    "billion trillion dozen half third quarter fourth fifth tenth hundredth thousandth squared cubed factorial choose "
    "times plus minus negative if for where when with is are to".split()
)


def canonical_unit(words: list[str]) -> str:
    r"""One name for a unit: "square centimeters", cm^2 and "sq cm" are "cm^2". Raises Unparsed for what is no unit."""
    text = " ".join(words).lower().replace(".", "").replace("per ", "/ ").replace("/", " / ").replace("^ ", "^")
    power, names = "", []
    for word in text.split():
        word = word.removesuffix("s") if len(word) > 2 and not word.endswith("ss") else word
        if word in NO_UNIT:
            raise Unparsed(f"{word!r} is no unit")
        word = UNIT_NAMES.get(word, word)
        if word in ("square", "cubic"):
            power = "^2" if word == "square" else "^3"
        elif word.startswith("^") and names:
            names[-1] += word
        else:
            names.append(word + power)
            power = ""
    return " ".join(names) or "unit" + power


# ------------------------------------------------------------------------------------------------ numbers


class Undefined(Exception):
    """The expression has no value at this point."""


class Point(dict):
    """Values of the variables. If `real`, roots and logarithms must be, too: sqrt(x) sqrt(x) = x only where it is defined."""

    real = True
    base = mp.mpf(7) / 3  # of a \log without one: it is equal only to what it equals in any base


def points(names: set):
    """Points to compare at: of all signs and of several sizes, integers too, where (-1)^n and n! are defined."""
    for i in range(12):
        rng, point = random.Random(i), Point()
        point.base = mp.mpf(rng.randrange(2 * 10**6, 10**7)) / 10**6
        for k, name in enumerate(sorted(names)):
            sign = (1, -1, (-1) ** k, -((-1) ** k))[i % 4]
            x = Fraction(rng.randrange(1, 10**6), (10**6 + 3, 10**5 + 3, 33333)[i % 3])
            point[name] = rng.randrange(2, 40) if i % 6 == 4 else sign * x
        yield point


def exact(x) -> bool:
    return isinstance(x, (int, Fraction))


def inexact(x):
    """int and Fraction -> mpf."""
    return mp.mpf(x.numerator) / x.denominator if exact(x) else x


def size(x: int | Fraction) -> int:
    return x.numerator.bit_length() + x.denominator.bit_length()


def value(node, point: Point):
    """The value of an expression: int or Fraction where it is exact, else mpf or mpc, to mp.dps digits.

    Raises Undefined where there is none, Unparsed if it is no number at all, or too large a one."""
    if exact(node):
        return node
    kind, *args = node
    if kind in ("variable", "text"):
        return point[node]
    if kind == "constant":
        return {"π": mp.pi, "e": mp.e, "∞": mp.inf}[args[0]] * mp.mpf(1) if args[0] != "i" else checked(mp.mpc(0, 1), point)
    if kind == "call":
        return unknown(args[0], *(value(x, point) for x in args[1:]))
    if kind == "big":
        return big_value(*args, point)
    if kind == "%":
        return value(("/", args[0], 100), point)
    if kind == "°":
        return value(("*", args[0], ("/", ("constant", "π"), 180)), point)
    if kind == "fn":
        kind, *args = args
    operation = OPERATIONS.get("/" if kind == "ratio" and len(args) == 2 else kind)
    if not operation and kind not in FUNCTIONS:
        raise Unparsed(f"no number: {kind}")
    values = [value(arg, point) for arg in args]
    try:
        return checked(operation(point, *values) if operation else function(kind, point, *values), point)
    except (ZeroDivisionError, ValueError, TypeError):  # tan at its pole, the factorial of -1, the minimum of i and 1
        raise Undefined from None


def checked(x, point: Point):
    """A new value, if it may be used: a number, real where it has to be, and not too large to compute on with."""
    if exact(x):
        if size(x) > MAX_BITS:
            raise Unparsed("too large")
        return simple(x) if isinstance(x, Fraction) else x
    if mp.isnan(x):
        raise Undefined
    if isinstance(x, mp.mpc):
        if x.imag != 0 and point.real:
            raise Undefined
        x = x.real if x.imag == 0 else x
    if x != 0 and not mp.isinf(x) and abs(mp.mag(x)) > 10**9:
        raise Unparsed("too large")
    return x


def add(point, *terms):
    return sum(terms) if all(map(exact, terms)) else mp.fsum(map(inexact, terms))


def multiply(point, x, y):
    return x * y if exact(x) and exact(y) else inexact(x) * inexact(y)


def divide(point, x, y):
    return Fraction(x) / y if exact(x) and exact(y) else inexact(x) / inexact(y)


def raise_to(point, x, y):
    if isinstance(y, int) and exact(x) and (abs(y) * size(x) <= MAX_BITS or x in (0, 1, -1)):
        return Fraction(x) ** y
    if isinstance(y, Fraction) and exact(x) and x >= 0 and (found := exact_root(x, y.denominator)) is not None:
        return raise_to(point, found, y.numerator)
    x, y = inexact(x), inexact(y)
    if x == 0:
        if mp.re(y) <= 0:
            raise Undefined
    elif mp.isinf(y) or (y != 0 and not mp.isinf(x) and mp.mag(mp.mag(x) or 1) + mp.mag(y) > 40):
        raise Unparsed("too large")
    return mp.power(x, y)


def root(point, n, x):
    if isinstance(n, int) and n > 1 and exact(x) and (x >= 0 or n % 2) and (found := exact_root(abs(x), n)) is not None:
        return found if x >= 0 else -found
    if point.real and isinstance(n, int) and n % 2 and mp.re(inexact(x)) < 0:
        return -root(point, n, -x)
    return raise_to(point, x, checked(divide(point, 1, n), point))


def exact_root(x: int | Fraction, n: int):
    """The n-th root of x >= 0 if it is rational, else None."""
    if size(x) > 10_000 or n > 100:
        return None
    with mp.workprec(size(x) + 20):
        roots = [int(mp.nint(mp.root(k, n))) for k in (x.numerator, x.denominator)]
    return simple(Fraction(*roots)) if roots[0] ** n == x.numerator and roots[1] ** n == x.denominator else None


def factorial(point, n, step: int = 1):
    if isinstance(n, int):
        if not 0 <= n <= 5000:
            raise Unparsed("too large") if n > 0 else Undefined
        return math.prod(range(n, 0, -step))
    if step > 1 or mp.mag(inexact(n)) > 20:
        raise Unparsed("no factorial")
    return mp.gamma(inexact(n) + 1)


def binomial(point, n, k):
    if isinstance(n, int) and isinstance(k, int) and 0 <= n <= 5000:
        return math.comb(n, k) if k >= 0 else 0
    if max(mp.mag(inexact(n)), mp.mag(inexact(k))) > 20:
        raise Unparsed("too large")
    return mp.binomial(inexact(n), inexact(k))


def floor(point, x):
    if not exact(x) and (mp.isinf(x) or mp.mag(x) > 3000):
        raise Unparsed("too large")
    return math.floor(x) if exact(x) else int(mp.floor(x))


def of_rationals(operation, integers: bool):
    def checked_operation(point, *values):
        if not all(isinstance(x, int) if integers else exact(x) for x in values):
            raise Unparsed("not of rational numbers")
        return operation(*values)

    return checked_operation


OPERATIONS = {  # name -> function of a point and of the values
    "+": add, "*": multiply, "/": divide, "^": raise_to, "root": root, "abs": lambda point, x: abs(x),
    "!": factorial, "!!": lambda point, n: factorial(point, n, 2), "binom": binomial,
    r"\lfloor": floor, r"\lceil": lambda point, x: -floor(point, -x),
    "min": of_rationals(min, False), "max": of_rationals(max, False), "mod": of_rationals(operator.mod, True),
    "gcd": of_rationals(math.gcd, True), "lcm": of_rationals(math.lcm, True),
}  # fmt: skip


def function(name: str, point: Point, x):
    """sin, ln, ... of mpmath's."""
    x = inexact(x)
    if mp.isinf(x) or mp.mag(x) > 200:
        raise Unparsed("too large")
    if name == "log":
        return mp.ln(x) / mp.ln(point.base)
    return getattr(mp, name.replace("arc", "a"))(x)


def unknown(name: str, *values):
    """The value of a function that is not known: a random number for each argument."""
    key = repr((name, *(mp.nstr(inexact(x), 20) for x in values)))
    return Fraction(random.Random(key).randrange(1, 10**9), 10**8)


def big_value(name: str, index, low, high, term, point: Point):
    """A sum or product: term by term between integers, else unknown, but the same for the same limits and terms."""
    low, high = value(low, point), value(high, point)
    if not (isinstance(low, int) and isinstance(high, int)):
        return unknown(name, low, high, value(substitute(term, index, Fraction(7919, 1009)), point))
    if high - low > MAX_ITEMS:
        raise Unparsed("too many terms")
    result = int(name == r"\prod")
    for k in range(low, high + 1):
        operation = OPERATIONS["*" if name == r"\prod" else "+"]
        result = checked(operation(point, result, value(substitute(term, index, k), point)), point)
    return result


def digits(node) -> float:
    """How many digits are written in an expression, its powers multiplied out: it takes more to tell its value apart."""
    if exact(node):
        return 0.31 * size(node)
    if node == ("constant", "i"):
        return 0
    if node[0] == "^":
        return digits(node[1]) * max(1, magnitude(node[2])) + digits(node[2]) + 1
    if node[:2] == ("fn", "!"):
        return 30 if variables(node[2]) else 10 * magnitude(node[2])
    return 1 + sum(map(digits, children(node)))


def magnitude(node) -> float:
    """Of an exponent, roughly, and at most a billion."""
    try:
        return 50 if variables(node) else float(min(abs(inexact(value(node, Point()))), 10**9))
    except Undefined:
        return 50


def close(x, y, tolerance) -> bool:
    return x == y or (mp.isfinite(x) and mp.isfinite(y) and abs(x - y) <= tolerance * max(abs(x), abs(y)))


def agree(a, b, point: Point) -> bool:
    """Are a and b equal at a point: exactly, or to many digits more than are written in them? Nothing is ever rounded to
    zero: what seems to be zero must shrink with the precision."""
    mp.dps = 30
    x, y = value(a, point), value(b, point)
    if exact(x) and exact(y):
        return x == y
    n = digits_needed(a, b)
    largest = mp.inf
    for mp.dps in (2 * n, 4 * n):
        x, y = inexact(value(a, point)), inexact(value(b, point))
        if close(x, y, mp.mpf(10) ** -n):
            return True
        before, largest = largest, max(abs(x), abs(y))
        if largest > mp.mpf(10) ** -n:
            return False
    return largest < before * mp.mpf(10) ** -n


def digits_needed(*nodes) -> int:
    n = 20 + math.ceil(sum(map(digits, nodes)))
    if n > MAX_DIGITS:
        raise Unparsed("too many digits")
    return n


def equal(a, b) -> bool:
    """Are two expressions equal wherever both are defined? Raises Unparsed if one is no number, or too large."""
    if a == b:
        return True
    names = variables(a) | variables(b)
    for real in (True, False):
        tried = 0
        for point in points(names):
            point.real = real
            try:
                if not agree(a, b, point):
                    return False
            except Undefined:
                continue
            tried += 1
            if tried == 6 or not names:
                return True
        if tried >= 3:
            return True
    return False


def proportional(a, b, positive: bool = False) -> bool:
    """Is a = c b, for a constant c that is not 0 (or is positive)?"""
    quotients, n = [], digits_needed(a, b)
    mp.dps = 2 * n
    for point in points(variables(a) | variables(b)):
        try:
            x, y = inexact(value(a, point)), inexact(value(b, point))
        except Undefined:
            continue
        if x != 0 and y != 0:
            quotients.append(x / y)
        if (x == 0) != (y == 0) or (quotients and not close(quotients[0], quotients[-1], mp.mpf(10) ** -n)):
            return False
    return len(quotients) >= 3 and (not positive or quotients[0] > 0)


# ------------------------------------------------------------------------------------------------ answers

MONTHS = "january february march april may june july august september october november december".split()
LONG_DECIMAL = re.compile(r"[-+]?(\d*)\.(\d+)", re.ASCII)


def compare(a: str, b: str) -> bool:
    """Are two cleaned answers the same? Raises Unparsed. This can take long, and much memory: `Worker` bounds both."""
    return same(parse(a), parse(b)) or is_rounded(a, b) or is_rounded(b, a)


@lru_cache(4096)
def parse(answer: str):
    r"""The tree of a cleaned answer; one with \pm is the set of its values. Raises Unparsed.

    Several \pm are independent, but \pm and \mp take opposite signs."""
    count = answer.count("±") + answer.count("∓")
    if not count:
        return parse_one(answer)
    values = []
    for choice in product("+-", repeat=min(count, 7) if "∓" not in answer else 1):
        if len(values) > MAX_ITEMS:
            raise Unparsed("too many values")
        signs = iter(choice * count if "∓" in answer else choice)
        one = re.sub("[±∓]", lambda m: {"±": "+-", "∓": "-+"}[m[0]]["+-".index(next(signs, "+"))], answer)  # noqa: B023
        node = parse_one(one)
        values += node[1:] if kind_of(node) in ("list", "set") else [node]
    return ("set", *values)


def parse_one(answer: str):
    for special in (clock_time, date, based_number, choice, phrase):
        if node := special(answer):
            return node
    try:
        return Parser(answer).answer()
    except Unparsed:
        if node := phrase(TEXT.sub(r" \1 ", answer), "0-9,()"):  # an apartment number, and the like
            return node
        raise


def clock_time(answer: str):
    """4:30 p.m. -> ("clock", minutes, seconds, "half" if it is known which half of the day)"""
    plain = TEXT.sub(r"\1", answer).replace(".", "").replace(" ", "").lower()
    match = re.fullmatch(r"(\d{1,2})(?::([0-5]\d)(?::([0-5]\d))?)?([ap]m|noon|midnight)?", plain)
    if not match or not (match[2] or match[4]) or int(match[1]) > 24:
        return None
    hour, minute, second, half = match.groups()
    hour = int(hour) % 12 + 12 * (half in ("pm", "noon")) if half else int(hour)
    return ("clock", hour * 60 + int(minute or 0), int(second or 0), "half" if half or hour > 12 else "")


def date(answer: str):
    """June 20, 2015 = 20 June 2015 = Jun. 20th, 2015"""
    words = re.sub(r"\\text|[{}.,^]|(?<=\d)(?:st|nd|rd|th)\b|\bof\b|\bthe\b", " ", answer).lower().split()
    months = [m for m in MONTHS for w in words if w == m or (len(w) in (3, 4) and m.startswith(w))]
    numbers = [int(w) for w in words if re.fullmatch(r"\d{1,4}", w, re.ASCII)]
    return ("date", *months, *numbers) if len(months) == 1 and len(numbers) + 1 == len(words) in (2, 3) else None


def based_number(answer: str):
    """101_2, 1A3_{16}, (101)_2, 101 base 2 -> ("based", digits, base)"""
    plain = TEXT.sub(r" \1 ", answer)
    match = re.fullmatch(r"\{?(-?)[({]?([0-9A-Z ,.]+)[)}]?\s*(?:_ ?\{? ?|,? ?(?:in )?base ?)(\w+)\s*\}{0,2}", plain)
    if not match or not re.search(r"\d", match[2]):
        return None
    words = "zero one two three four five six seven eight nine ten eleven twelve".split()
    base = str(words.index(match[3])) if match[3] in words else match[3]
    return ("based", match[1] + re.sub("[ ,]", "", match[2]).lstrip("0"), base) if base.isdigit() else None


def choice(answer: str):
    r"""(A), A) and \text{(A)} are the choice A."""
    match = re.fullmatch(r"\(([A-Z])\)|([A-Z])\)", TEXT.sub(r"\1", answer).strip())
    return ("variable", match[1] or match[2]) if match else None


def phrase(answer: str, also: str = ""):
    """No solution -> ("text", "no solution"). With a word that is neither mathematics nor a product of variables."""
    words = re.findall(r"[a-zA-Z]+", answer)
    if all(map(is_product, words)) or not re.fullmatch(rf"[a-zA-Z .'\"!?{also}-]*", answer):
        return None
    if not also and any(word in FUNCTIONS or word in PLAIN_WORDS or word in ("and", "or") for word in words):
        return None
    return ("text", " ".join(re.findall(r"\w+", answer.casefold())))


def is_rounded(a: str, b: str) -> bool:
    """Is a decimal of at least ten digits the rounded value of b, which is no such decimal itself? 1.41421356237 is sqrt(2)."""
    match = LONG_DECIMAL.fullmatch(a.rpartition("=")[2].strip())
    if not match or len((match[1] + match[2]).lstrip("0")) < 10 or plain_number(b) is not None:
        return False
    node = parse(b)
    node = split_unit(node[2] if kind_of(node) == "named" else node)[0]
    if variables(node):
        return False
    mp.dps = 60 + len(a)
    try:
        return abs(mp.mpf(match[0]) - inexact(value(node, Point()))) <= mp.mpf(10) ** -len(match[2]) / 2
    except (Undefined, Unparsed):
        return False


def split_unit(node):
    """(number, unit) of 5 cm, 20%, 30 degrees; the unit is "" where there is none."""
    if kind_of(node) in ("%", "°"):
        return node[1], node[0]
    if kind_of(node) == "unit":
        inner, unit = split_unit(node[1])
        return inner, " ".join(filter(None, (unit, node[2])))
    return node, ""


def same(a, b) -> bool:
    """Are two trees the same answer? Symmetric. Raises Unparsed where it takes numbers, and one is none."""
    if a == b:
        return True
    kinds = {kind_of(a), kind_of(b)}
    if kinds & {"order", "∪", "∩", "∖", "ℝ"} or is_interval(a) or is_interval(b):
        return same_set(a, b)
    if kinds & {"list", "set"}:
        return same_list(a, b)
    if kinds & {"named", "equation"}:
        return same_equation(a, b)
    if kinds & {"seq", "matrix"}:
        shapes = a[1] == b[1] or {a[1], b[1]} == {"{}", "()"} if len(kinds) == 1 else False
        return shapes and len(a) == len(b) and all(map(same, a[2:], b[2:]))
    if "clock" in kinds:
        return same_time(a, b)
    if kinds == {"ratio"} and len(a) == len(b) > 3:
        return all(equal(("*", a[1], y), ("*", b[1], x)) for x, y in zip(a[2:], b[2:]))
    if kinds & {"text", "date", "based"}:
        return False
    (x, unit_x), (y, unit_y) = split_unit(a), split_unit(b)
    if unit_x and unit_y and unit_x != unit_y:
        return False
    if equal(x, y):
        return True
    if unit_x == unit_y or "%" not in (unit_x, unit_y):
        return False
    return equal(a, y) if unit_x == "%" else equal(x, b)  # 20% is 20 or 1/5; 20 is never 1/5


def same_time(a, b) -> bool:
    if kind_of(a) == kind_of(b):
        return a[2] == b[2] and (a[1] == b[1] if a[3] == b[3] else a[1] % 720 == b[1] % 720)
    clock, other = (a, b) if kind_of(a) == "clock" else (b, a)  # 7:32 may be a ratio
    return kind_of(other) == "ratio" and not clock[3] and same(("ratio", clock[1] // 60, clock[1] % 60), other)


def same_equation(a, b) -> bool:
    """x = 5 is 5, but not y = 5; f(x) = 2x is y = 2x; y = 2x is the equation 4x - 2y = 0."""
    if kind_of(a) != "named":
        a, b = b, a
    if kind_of(a) == "named":
        _, name, content = a
        if kind_of(b) not in ("named", "equation"):
            return same(content, b)
        if kind_of(b) == "named":
            dummies = all(kind_of(x) == "variable" for x in name[2:] + b[1][2:])  # f(x) = 1 is f(y) = 1
            if name == b[1] or (name[:2] == b[1][:2] and name[0] == "call" and dummies and not variables(content)):
                return same(content, b[2])
            if not (variables(content) and variables(b[2])):
                return False
            if "call" in (name[0], b[1][0]) and same(content, b[2]):
                return True
    elif kind_of(a) != kind_of(b):
        return False
    if any(kind_of(side) in ("seq", "list", "set", "matrix", "text", "order") for side in a[1:] + b[1:]):
        return False
    return proportional(difference(*a[1:]), difference(*b[1:]))


def difference(left, right):
    return plus(split_unit(left)[0], times(-1, split_unit(right)[0]))


def same_list(a, b) -> bool:
    """Unordered, and a set is as good as a list; but x = 1, y = 2 go by their names, or by their order if the other side
    has none, and what stands in round brackets is ordered."""
    for x, y in ((a, b), (b, a)):
        if kind_of(x) == "list":
            names = [base_name(item) for item in x[1:] if kind_of(item) == "named"]
            others = y[2:] if kind_of(y) == "seq" else y[1:] if kind_of(y) == "list" else ()
            if len(x) - 1 == len(names) == len(set(names)) and not any(kind_of(item) == "named" for item in others):
                return len(others) == len(names) and all(map(same, (item[2] for item in x[1:]), others))
        if kind_of(x) == "seq" and x[1] == "{}":
            return same(("set", *x[2:]), y)
        if kind_of(x) == "seq" and kind_of(y) == "list" and all(kind_of(n) == "named" for n in x[2:] + y[1:]):
            return same(("list", *x[2:]), y)
        if kind_of(x) == "named" and kind_of(x[2]) in ("list", "set"):
            return same(x[2], y)
    items_a, items_b = elements(a), elements(b)
    if items_a is None or items_b is None or (shared_name(a) and shared_name(b) and shared_name(a) != shared_name(b)):
        return False
    if not kind_of(a) == kind_of(b) == "list" or any(kind_of(x) == "seq" for x in items_a):
        items_a, items_b = unique(items_a), unique(items_b)
    return len(items_a) == len(items_b) and matched(items_a, items_b)


def matched(items_a: list, items_b: list) -> bool:
    rest = list(items_b)
    for x in items_a:
        found = next((i for i, y in enumerate(rest) if same(x, y)), None)
        if found is None:
            return False
        del rest[found]
    return True


def base_name(named):
    """The name without its index: x_1 = 2, x_2 = 3 are two values of x."""
    return named[1][1] if named[1][0] == "call" and named[1][1].endswith("_") else named[1]


def shared_name(node):
    """The x of "x = 1, 2"."""
    first, *rest = node[1:] if kind_of(node) == "list" else (node,)
    return first[1] if kind_of(first) == "named" and rest and all(kind_of(item) != "named" for item in rest) else None


def elements(node) -> list | None:
    if kind_of(node) not in ("list", "set"):
        return None if kind_of(node) in ("seq", "matrix", "equation", "text") else [node]
    return [item[2] if shared_name(node) and kind_of(item) == "named" else item for item in node[1:]]


def unique(items: list) -> list:
    kept = []
    for x in items:
        if not any(same(x, y) for y in kept):
            kept.append(x)
    return kept


def is_interval(node) -> bool:
    return kind_of(node) == "seq" and len(node) == 4 and node[1] in ("[)", "(]", "[]")


def same_set(a, b) -> bool:
    """Intervals, unions and inequalities are equal if they agree at all of their ends and anywhere between them."""
    mp.dps, names_a, names_b = 100, set(), set()
    try:
        ends = sorted(x for x in boundary(a, names_a) + boundary(b, names_b) if mp.isfinite(x))
    except Undefined:
        return same_parts(a, b)
    if names_a and names_b and names_a != names_b:
        return False
    probes = [mp.mpf(0)] if not ends else [ends[0] - 1, *ends, *((x + y) / 2 for x, y in zip(ends, ends[1:])), ends[-1] + 1]
    return all(holds(a, x) == holds(b, x) for x in probes)


def boundary(node, names: set) -> list:
    """The ends of the intervals of a set of real numbers; adds its variable to names. Raises Undefined if it is none, or one
    with other ends: inequalities must be linear in one variable or in its absolute value."""
    kind = kind_of(node)
    if kind == "ℝ":
        return []
    if kind == "named":
        names.add(node[1])
        return boundary(node[2], names)
    if kind in ("∪", "∩", "∖"):
        return [x for child in node[1:] for x in boundary(child, names)]
    if kind in ("set", "list") or (kind == "seq" and len(node) == 4 and node[1] in ("()", "[)", "(]", "[]")):
        ends = [real(child) for child in children(node)]
        if kind == "seq" and not ends[0] <= ends[1]:
            raise Undefined
        return ends
    found = names_in(node)
    if kind != "order" or len(found) != 1:
        raise Undefined
    (name,) = found
    absolute = name[:2] == ("fn", "abs")
    names.add(name[2] if absolute else name)
    ends = []
    for left, right in zip(node[1::2], node[3::2]):
        if {left, right} & {("constant", "∞"), ("*", -1, ("constant", "∞"))}:
            continue
        gap = substitute(difference(left, right), name, ("variable", "x"))
        at = [inexact(value(gap, Point({("variable", "x"): x}))) for x in (0, 1, 2)]
        slope = at[1] - at[0]
        if slope == 0 or not close(slope, at[2] - at[1], mp.mpf(10) ** -80):
            raise Undefined
        ends += [-at[0] / slope] + [at[0] / slope] * absolute
    return ends


def real(node):
    """The value of an end of an interval. Raises Undefined if it is not a real number."""
    try:
        return inexact(value(split_unit(node)[0], Point()))
    except (Unparsed, KeyError):
        raise Undefined from None


def holds(node, x) -> bool:
    """Is the real number x in the set?"""
    kind = kind_of(node)
    if kind == "named":
        return holds(node[2], x)
    if kind in ("∪", "∩", "∖"):
        inside = [holds(child, x) for child in node[1:]]
        return any(inside) if kind == "∪" else inside[0] and all(y == (kind == "∩") for y in inside[1:])
    if kind in ("set", "list"):
        return any(close(real(child), x, mp.mpf(10) ** -80) for child in node[1:])
    if kind == "seq":
        signs = ["≤" if bracket in "[]" else "<" for bracket in node[1]]
        return in_order(real(node[2]), signs[0], x) and in_order(x, signs[1], real(node[3]))
    if kind == "ℝ":
        return True
    (name,) = names_in(node)
    name = name[2] if name[:2] == ("fn", "abs") else name
    point = Point({("variable", "x"): x})
    values = [inexact(value(substitute(side, name, ("variable", "x")), point)) for side in node[1::2]]
    return all(map(in_order, values, node[2::2], values[1:]))


def in_order(x, sign: str, y) -> bool:
    same_value = close(x, y, mp.mpf(10) ** -80)
    if sign == "≠" or same_value:
        return same_value == (sign in "≤≥")
    return x < y if sign in "<≤" else x > y


def same_parts(a, b) -> bool:
    """Intervals and inequalities whose ends are no numbers: the same part by part, or up to a positive factor."""
    kind = kind_of(a)
    if kind != kind_of(b):
        return False
    if kind == "seq":
        return a[1] == b[1] and len(a) == len(b) and all(map(same, a[2:], b[2:]))
    if kind != "order":
        return kind in ("∪", "∩") and len(a) == len(b) and matched(list(a[1:]), list(b[1:]))
    (members_a, signs_a), (members_b, signs_b) = upward(a), upward(b)
    if signs_a != signs_b:
        return False
    if all(map(equal, members_a, members_b)):
        return True
    return len(signs_a) == 1 and proportional(difference(*members_a), difference(*members_b), positive=signs_a != ["≠"])


def upward(order):
    """The members of a chain of inequalities, and its signs, from the smaller to the larger end."""
    members, signs = order[1::2], list(order[2::2])
    if set(signs) <= {">", "≥"}:
        return members[::-1], [{">": "<", "≥": "≤"}[sign] for sign in signs[::-1]]
    return members, signs


# ------------------------------------------------------------------------------------------------ worker


def serve():
    """The worker process: two answers as a line of JSON in, one byte out, until the parent closes the pipe or is gone.

    It ends itself when its time is over. The watchdog of faulthandler is a thread in C: it needs neither signals nor the
    interpreter's lock, so that no computation can keep it from its work."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    except (ImportError, ValueError, OSError):
        pass  # not on this system: the time limit holds
    nowhere = open(os.devnull, "w")
    for line in sys.stdin.buffer:
        faulthandler.dump_traceback_later(TIME_LIMIT, exit=True, file=nowhere)
        try:
            reply = b"=" if compare(*json.loads(line)) else b"!"
        except (Unparsed, Undefined, RecursionError):
            reply = b"?"
        os.write(1, reply)
        faulthandler.cancel_dump_traceback_later()


class Worker:
    """The process behind `verdict`: started on first need, after a kill, and anew in a process that was forked. Threads take
    turns. It lives as long as its standard input is open: when its parent ends, however that happens, it does, too."""

    def __init__(self):
        self.process, self.lock = None, threading.Lock()

    def ask(self, a: str, b: str) -> str:
        """match, mismatch, unparsed or timed out"""
        with self.lock:
            for _ in range(2):
                if self.process is None:
                    self.start()
                line = json.dumps([a, b]).encode() + b"\n"
                try:
                    while line:
                        line = line[self.process.stdin.write(line) :]
                    reply = self.process.stdout.read(1)
                    break
                except BrokenPipeError:  # it was killed between two calls, which is not these answers' fault
                    self.stop()
                    reply = b""
            if not reply:
                self.stop()
                self.start()  # now, so that the next call need not wait for it
        return {b"=": "match", b"!": "mismatch", b"?": "unparsed"}.get(reply, "timed out")

    def start(self):
        command = [sys.executable, os.path.abspath(__file__), "--worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, bufsize=0, start_new_session=True, **pipes)

    def stop(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.close()

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process = None

    def forked(self):
        """In a forked child the worker is still the parent's, and another thread may have held the lock."""
        self.lock = threading.Lock()
        if self.process:
            self.process.returncode = 0  # not to be waited for
            self.close()


WORKER = Worker()
atexit.register(WORKER.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=WORKER.forked)

# ------------------------------------------------------------------------------------------------ verdict


@dataclass(frozen=True)
class Verdict:
    """kind: match, mismatch, unparsed (one of the answers is missing, or not understood) or timed out."""

    kind: str
    gold: str
    answer: str | None  # what was extracted from the response


def verdict(gold: str, text: str) -> Verdict:
    r"""Is the final answer of the response `text` the one of `gold`, a bare answer or a reference solution?

    Symmetric for bare answers; "match" only if the two are certainly equal. verdict("0.5", r"So \boxed{\frac12}").
    Of boxes joined by "and" the last one alone may match, too: data sets such as MATH keep only that of a solution."""
    a, b = marked_answer(gold) or gold.strip(), extract(text)
    kind = "match" if a and text in (gold, a) else judge(a, b)
    if kind != "match" and b and ", " in b and (last := boxed_answer(text[-MAX_TEXT:], joined=False)) not in (None, b):
        if judge(a, last) == "match":
            return Verdict("match", a, last)
    return Verdict(kind, a, b)


def judge(a: str, b: str | None) -> str:
    """The kind of verdict on two extracted answers: as strings, as plain numbers, or by the worker."""
    if not a or not b:
        return "unparsed"
    x, y = plain_number(a), plain_number(b)
    if x is not None and y is not None:
        return "match" if x == y else "mismatch"
    if a == b or max(len(a), len(b)) > MAX_ANSWER:
        return "match" if a == b else "unparsed"
    a, b = clean(a), clean(b)
    return "match" if same_string(a, b) else WORKER.ask(a, b)


def grade(gold: str, text: str) -> bool:
    """Is the answer right? See `verdict`."""
    return verdict(gold, text).kind == "match"


# ------------------------------------------------------------------------------------------------ command line


def explain(gold: str, text: str):
    found = verdict(gold, text)
    print(f"gold      {found.gold}\nresponse  {found.answer}\nverdict   {found.kind}")
    for name, answer in (("gold", found.gold), ("response", found.answer)):
        if answer and plain_number(answer) is None:
            try:
                print(f"{name} is read as {parse(clean(answer[:MAX_ANSWER]))}")
            except (Unparsed, RecursionError) as problem:
                print(f"{name} is not understood: {problem}")


def grade_file(path: str, error):
    """Count the verdicts on the lines {"gold": ..., "text": ...} of a file; "answer" and "response" will do as well."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = [line for line in enumerate(file, 1) if line[1].strip()]
    except OSError as problem:
        error(f"cannot read {path}: {problem.strerror}")
    pairs = []
    for number, line in lines:
        try:
            row = json.loads(line)
            pairs.append((row.get("gold", row.get("answer")), row.get("text", row.get("response"))))
        except (ValueError, AttributeError, RecursionError):
            pairs.append((None, None))
        if not all(isinstance(x, str) for x in pairs[-1]):
            error(f'{path}, line {number}: this is no JSON object with the strings "gold" and "text"')
    counts = Counter()
    with tqdm(pairs, unit=" answers") as bar:
        for gold, text in bar:
            counts[verdict(gold, text).kind] += 1
            bar.set_postfix({"match": f"{counts['match'] / counts.total():.1%}"}, refresh=False)
    for kind in VERDICTS:
        print(f"{kind:9s} {counts[kind]:8d}   {counts[kind] / max(1, counts.total()):.1%}")


def main():
    if sys.argv[1:] == ["--worker"]:
        return serve()
    parser = argparse.ArgumentParser(description="Grade responses: is the final answer the gold answer?")
    parser.add_argument("gold", nargs="?", help="the gold answer, or a reference solution with \\boxed{} or ####")
    parser.add_argument("text", nargs="?", help="the response (put -- before the two if one starts with a minus)")
    parser.add_argument("--file", help='a JSONL file with "gold" and "text" in each line: counts its verdicts')
    args = parser.parse_args()
    if (args.file is None) == (args.text is None):
        parser.error("say either GOLD and TEXT, or --file X.jsonl")
    grade_file(args.file, parser.error) if args.file else explain(args.gold, args.text)


if __name__ == "__main__":
    main()
