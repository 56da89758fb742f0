r"""Math answer grader: is the final answer of a response the gold answer? It gives PPO its outcome reward.

    gold      Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72
    response  ... so $48 + 24 = 72$ and the answer is $\boxed{72}$.      -> match

Policies find every hole of a reward, so what is not understood *entirely* counts only as a string: nothing is guessed,
dropped, rounded or executed. The file is long because answers are of many kinds; it has six parts, to be read apart, and
each uses only those above it:

    extraction    the final answer in a response, in linear time
    spelling      one spelling for each notation; equal strings and plain numbers need nothing more
    parser        tokens, then recursive descent: an answer becomes a tree of tuples, or is `Unparsed`
    numbers       the value of a tree at a point: exact rationals as long as possible, then as many digits as it takes
    answers       when are two trees the same answer? Lists, intervals, equations, units, ... each have their rule
    worker        the last three run in a process with little memory and less time, so that nothing can hang training

Two expressions are equal if they are at random points: exactly where they are rational (Schwartz-Zippel), else to more
digits than are written in them. There is no symbolic simplification: it is slow, and can only fail to prove things.

Left out: solving equations and nonlinear inequalities, converting units, calculus, piecewise functions; sums with symbolic
limits are equal only if their parts are.

Run `python grader.py GOLD TEXT`, for example `python grader.py '\frac12' 'The answer is 0.50.'`, or
`python grader.py --file X.jsonl` for a file of {"gold": ..., "text": ...}
"""

import argparse
import atexit
import faulthandler
import json
import math
import os
import random
import re
import select
import subprocess
import sys
import threading
import time
import unicodedata
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
TIME_LIMIT, MEMORY_LIMIT = 0.4, 400 << 20  # seconds of processor time of a verdict, bytes of the worker
STARTING_LIMIT = 30  # seconds: it takes a tenth, but all processes of a busy machine may start theirs at once
VERDICTS = ("match", "mismatch", "unparsed", "timed out")

# ------------------------------------------------------------------------------------------------ extraction

BOX_OR_BRACE = re.compile(r"\\{1,2}(?:boxed|fbox)(?![a-zA-Z])\s{0,9}(?:(\{)|([-+.0-9\\][^\s$]{0,99}))|\\.|[{}]", re.DOTALL)
MARKER = re.compile(  # "The answer is", "**Answer**:", "### Answer", but not "the answer is correct"
    r"(?:answer[*_]{0,2}\s{0,3}|(?:option|choice) )(?:is\b:?|:)(?!\W{0,3}(?:indeed |thus |therefore |also )?"
    r"(?:correct|right|wrong|clear|not|reasonable|valid|unique|verified)\b)|<answer>|"
    r"^[#*_ ]{0,9}(?:final )?answer[*_ ]{0,9}$",
    re.IGNORECASE | re.MULTILINE,
)
LINE_END = re.compile(r"\n|\.\s|<\||</?[a-z_]{3,12}>")  # "The answer is 5. I hope it is correct.<|im_end|>"
COMMENT = re.compile(r",?\s(?:as|because|since|which|where)\b|;\s+[a-z]{2,}|\s\((?:approx|about|≈|[a-z-]{4,}\))")
DISPLAYED = re.compile(r"[\s*:_`]{0,20}(?:\\\[|\$\$)(.+?)(?:\\\]|\$\$)", re.DOTALL)
FILLER = re.compile(r"^\W{0,3}(?:approximately|about|exactly|thus|hence|so|then|therefore|simply|just|equal to),?\s", re.I)
COMMAND = re.compile(r"\\[a-zA-Z]+ ?(?:\{[^{}\\]*\}){0,2}")  # with its argument: \text{ square cm} is not prose
LABEL = re.compile(r"[a-zA-Z]{3,9} ?:\s|^[A-Za-z][a-z]{2,}\s.*=|<<|\b(?:is|are|has|have|gets?)\b")  # "Result: 5", "It is 5"
MATH = re.compile(r"(?<!\\)\$\$?|\\[()\[\]]")  # where math mode begins or ends
WORD = re.compile(r"(?!(?:and|or|sqrt|(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|ln|log|exp|pi)\b)\b[a-zA-Z]{2,}")
PROSE = re.compile(r"\b(?!(?:and|or|sqrt|sin|cos|tan|log|exp|abc|xyz)\b)(?:[A-Za-z][a-z]{2,}|is|of|to|on|if|we|he)\b")
NUMBER = re.compile(
    r"[0-9]+(?::[0-9]+)+(?:\s?[aApP]\.?[mM]\b\.?)?|"
    r"(?:(?<![\w)}])[-−]\\?\$?)?"  # 5-3 ends in 3, not in -3
    r"(?:[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:[.][0-9]+|,[0-9]{2}(?![0-9]))?|\.[0-9]+)(?:[eE][-+]?[0-9]+|/[0-9]+)?(?:\\?%)?"
)
PART_BEFORE = re.compile(
    r"(?:[-+/^√π(]|(?<!\*)\*|\w\*\*|[0-9]:?|"
    r"\b(?:not|than|minus|negative|plus|times|over|root of|mod|base|sqrt|sin|cos|tan|ln|log)) ?$"
)
PART_AFTER = re.compile(
    r" ?[√π^!]|:[0-9]|[)\]]|(?!(?:[a-z]{4,}|cm|mm|km|kg|mg|ml|ft|lbs?|hrs?|mph|am|pm|st|nd|rd|th)\b|[mc]?m[²³])[a-zA-Z]|"
    r" ?[-+*/] ?[0-9a-z(]| (?:hundred|thousand|million|billion|trillion|dozen|mod|base|choose)\b"
)
FIRST_SEGMENT = re.compile(
    r"(?:\$([^$]+)\$|\\\((.+?)\\\))(?!\W*(?:and|or|times|plus|minus|hundred|thousand|million|billion)\b)"
)
DOUBT = re.compile(r"\b(?:not|more|less|fewer|than|root|least|most|except|between|power|maybe|or)\b", re.IGNORECASE)
JOINT = re.compile(r"[,;+&]*|(?:,|[a-z]+|for part \([a-z]\))?(?:and|or)(?:[a-z](?:_\d)?=)?")  # between boxes of one answer


def marked_position(text: str) -> int:
    """Where the last "answer is", "Answer:", "A: ", ... ends; the end of the text, if there is none."""
    lower, marks = text.lower(), []
    if "answer" in lower or "option" in lower or "choice" in lower:
        marks = [match.end() for match in MARKER.finditer(text)]
    if "\nB: " not in text and (i := ("\n" + text).rfind("\nA: ")) >= 0:  # as in Q: ... A: 18, but no list of options
        marks.append(i + len("A: "))
    return max(marks, default=len(text))


def first_statement(text: str) -> str:
    """The displayed formula or the line that a text begins with, without Markdown's bold and code marks."""
    if displayed := DISPLAYED.match(text):
        return displayed[1].strip()
    line = LINE_END.split(text.lstrip(" \r\n*:_`"), maxsplit=1)[0]
    line = FILLER.sub("", re.sub(r'\\?"', "", line))
    head = COMMENT.split(line, maxsplit=1)[0].rstrip(" ,")
    line = head if re.search(r"[0-9\\]", head) else line
    return line if re.search(r"\w\*\*\w", line) else re.sub(r"\*\*|`", "", line)  # 2**3


def boxed_answer(text: str, joined: bool = True) -> str | None:
    r"""The content of the last balanced box. If joined, boxes with only "and", "or" or a comma between them are one list.

    One pass with a stack: to look for the end of each box apart takes quadratic time on 50,000 times "\boxed{"."""
    if "box" not in text:
        return None
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
            gap = re.sub(r"\\(?:text|mbox|q?quad|[ ,;()\[\]])|[${}]", "", text[end : min(following, end + 60)])
            if not joined or end > following or not JOINT.fullmatch(re.sub(r"(?<!for)(?<!part)\s", "", gap)):
                break
        answer = text[content:stop].strip(" \n")
        if answer := answer if answer.endswith("...") else answer.rstrip(".,;"):
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
    if ("\n" in rest and "\\begin" not in text) or LABEL.search(rest):
        return False
    words = len(WORD.findall(rest))
    if re.search(r"[-+*/^=]", rest) and not re.search("[a-zA-Z]{3}", rest) and not MATH.search(text):  # xy+yz+zx
        words = 0
    return not words or (words <= 2 and len(text) <= 300 and not MATH.search(text))


def last_in_prose(text: str) -> str | None:
    """The last math segment or the last number, whichever is later."""
    found, found_end, end, opened, gap = None, 0, 0, False, ""
    for delimiter in MATH.finditer(text):
        segment, end = text[end : delimiter.start()].strip(" "), delimiter.end()
        # What stands between the dollars of "$5 and then $8" is no math: it has words.
        if opened and segment and not PROSE.search(COMMAND.sub(" ", segment)):
            if "\n" not in segment or delimiter[0] in ("$$", r"\]"):  # inline math does not go over several lines
                name = segment.partition("=")[0].strip()
                listed = found and gap.strip() in ("and", "or", ",", ", and", ", or") and "=" in segment
                listed = listed and found.partition("=")[0].strip() == name
                found = f"{found}, {segment}" if listed else segment.strip()  # $x = 1$ and $x = 2$
            found_end, opened = end, False
        else:
            opened, gap = True, segment
    for number in reversed(list(NUMBER.finditer(text, found_end))):
        start, stop = number.span()
        before, after = text[max(0, start - 12) : start], text[stop : stop + 12]
        if not before.endswith(("^", "_")):  # the 2 of cm^2 is not the answer; of 2π, √3, 2x, 3+5 and "not 5" no part is
            return found if PART_BEFORE.search(before) or PART_AFTER.match(after) else number[0]
    return found


def marked_answer(text: str) -> str | None:
    """The answer that the text itself points out. Empty ones do not count: prompts are quoted with an empty box."""
    text = text[-MAX_TEXT:]
    before, final, rest = text.rpartition("final answer is")
    line = first_statement(rest) if "boxed" in before and "boxed" not in rest else ""
    if not (line and is_bare(line)):  # of a box and the final answer, the later one counts
        if boxed := boxed_answer(text):
            return boxed
        _, found, rest = text.rpartition("####")
        if not found:
            rest = text[marked_position(text) :]
        line = first_statement(rest)
    if not is_bare(line):  # "Final answer: $3$, since x is 5", "Final answer: the largest n is 34"
        if first := FIRST_SEGMENT.match(line):
            line = first[1] or first[2]
        elif len(NUMBER.findall(line)) <= 1 and not DOUBT.search(line):
            line = last_in_prose(line) or line
    if line.count("$") % 2 == 0 and r"\$" not in line:  # $5$ m
        line = line.replace("$", " ")
    return line.lstrip(" $*").rstrip(" .$*\r") or None


def extract(text: str) -> str | None:
    r"""The final answer in a response or a reference solution, None if there is none.

    The last \boxed{}, else what follows the last ####, else "answer is" or "answer:", else a text that is nothing but an
    answer, else the last $math$ or the last number, whichever is later."""
    text = text[-MAX_TEXT:]
    if answer := marked_answer(text):
        return answer
    text = FILLER.sub("", text.strip().strip("`*"))
    if is_bare(text):
        return text or None
    tail = re.split(r"\b(?:is|are|equals|at)\b", text.rpartition("\n")[2].rstrip(" ."))[-1].strip()  # The area is 8π.
    clear = re.search(r"[0-9√π∞]", tail) and is_bare(tail) and not DOUBT.search(tail)
    return last_in_prose(text) or (tail if clear else None)


# ------------------------------------------------------------------------------------------------ spelling

PLAIN = re.compile(  # -5, 1,234.5, .5, and with a decimal comma 1,50 and 0,125
    r"([-+]?)(?=\.?\d)(?:(\d{1,300})|(\d{1,3}(?:,\d{3}){1,99}))?(?:\.(\d{0,300})|,(\d\d)|(?<=\b0),(\d{3,99}))?", re.ASCII
)
SPELLINGS = {  # the one spelling that the parser knows: LaTeX commands that mean the same
    "": "left right bigl bigr Bigl Bigr biggl biggr Biggl Biggr big Big bigg Bigg displaystyle textstyle limits rm bf it "
    "mathbf boldsymbol bm mathit boxed middle large Large LARGE huge Huge small underline bold pmb tt ensuremath "
    "vec mathcal", r"\overline": "bar", r"\pmod": "mod",
    " ": "enspace thinspace", r"\frac": "dfrac tfrac cfrac", r"\binom": "dbinom tbinom",
    r"\text": "mbox hbox mathrm textbf textrm textit textsf textnormal operatorname mathsf", "≤": "le leq leqslant leqq",
    "≥": "ge geq geqslant geqq", "≠": "ne neq", "≈": "approx simeq doteq", "*": "cdot times ast",
    "∅": "emptyset varnothing", "|": "mid vert lvert rvert", "∖": "setminus smallsetminus backslash",
    "...": "dots ldots cdots dotsc", "°": "circ degree textdegree", "<": "lt", ">": "gt", "÷": "div", "±": "pm", "∓": "mp",
    "∈": "in", "∩": "cap", "∪": "cup bigcup", "∞": "infty", "π": "pi", "≡": "equiv", ":": "colon", r"\{": "lbrace",
    r"\}": "rbrace", "[": "lbrack", "]": "rbrack", "'": "prime", r"\epsilon": "varepsilon", r"\phi": "varphi",
    r"\theta": "vartheta", r"\tan": "tg", r"\arctan": "arctg",
}  # fmt: skip
SPELLINGS = {command: spelling for spelling, commands in SPELLINGS.items() for command in commands.split()}
CHARACTERS = dict(zip("−–×·⋅∙∗≦≧⩽⩾º′’~", "--*****≤≥≤≥°'' ")) | {"∛": r"\sqrt[3]"} | dict.fromkeys("\u200b\u2062\ufeff\0", "")
CHARACTERS |= dict(zip("⌊⌋⌈⌉⟨⟩△∠", (rf"\{c} " for c in "lfloor rfloor lceil rceil langle rangle triangle angle".split())))
CHARACTERS = str.maketrans(CHARACTERS | {"⁄": "/", "∶": ":", "Ø": "∅"})
DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ₀₁₂₃₄₅₆₇₈₉ₙ", "0123456789+-n0123456789n")
CONDITION = re.compile(r"(?<![=<>≤≥≠≈])(?<![=<>≤≥≠≈] )& ?(?![=<>≤≥≠≈ ])|\\text")  # of a piecewise function
CLEANERS = [  # (what an answer must contain to be searched, pattern, replacement), in this order
    ("", "[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: f"^{{{m[0].translate(DIGITS)}}}"),
    ("", "[₀₁₂₃₄₅₆₇₈₉ₙ]+", lambda m: f"_{{{m[0].translate(DIGITS)}}}"),
    ("", "[¼-¾⅐-⅞]", lambda m: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", m[0]).split("⁄"))),
    ("", "[α-ορ-ω]", lambda m: "\\" + unicodedata.name(m[0]).split()[-1].lower().replace("lamda", "lambda") + " "),
    ("\\", r"\\(?:left|right) ?\.", " "),
    ("quad", r"(, ?|\\text ?\{[^{}]*\} ?|^ ?)?\\q?quad *(?=(\\text|\\mbox|and |or |,|\\q?quad|$)?)",
     lambda m: (m[1] or "") + (" " if m[1] is not None or m[2] is not None else ", ")),  # x=3 \quad y=4
    ("\\\\", r"\\\\ ?\[[-0-9. ]{1,9}[a-z]{2}\]", r"\\\\"),  # \\[2pt]
    ("\\", r"\\\\|\\([a-zA-Z]+)", lambda m: SPELLINGS.get(m[1], m[0])),
    ("$", r"\\\$", "\0"), ("$", r"\$", " "), ("\0", "\0", "$"),  # money, to be told from the $ of math mode
    ("\\", r"(?<!\\)\\[()\[\]]", ""), ("\\", r"\\%", "%"),
    ("", r"(?<=[0-9])(?<!\b0) ?(?:, ?\\!|\{ ?, ?\}|\\,) ?(?=[0-9]{3}(?![0-9]))", ""),  # 1,\!234 10{,}000, but not 0{,}125
    ("\\", r"(?<!\\)\\[,;:> ]", " "), ("\\", r"(?<!\\)\\(?:!|$)", ""), ("{", r" ?\{ ?([:,]) ?\} ?", r"\1"),
    ("", r"\s+", " "),
    ("=", r"^ ?\\(?:lim|int|iint|oint)(?![a-zA-Z])[^=]*=(?=[^=]+$)", ""),  # \lim ... = 1
    ("^", r"(?<=[0-9]) ?[xX] ?(?=10 ?\^)", "*"),  # 6.02 x 10^23
    ("", r"(?<=[0-9)}])(and|or)(?=[0-9A-Z(-])", r" \1 "),
    (" ", r"^ ?([-+]?[1-9][0-9]{0,2})((?: [0-9]{3})+)(?![0-9/])", lambda m: m[1] + m[2].replace(" ", "")),  # 1 000
    ("^", r" ?\^ ?(?:°|\{ ?° ?\})", "°"), ("^", r"\^ ?\{ ?('+) ?\}", r"\1"),
    ("", r"^ ?(?:≈|=|∴|⇒|\\(?:therefore|Rightarrow|implies)(?![a-zA-Z]))", ""),
    ("color", r"\\(?:text)?color ?\{[a-zA-Z]*\}", ""), ("space", r"\\[hv]space ?\{[^{}]*\}", " "),
    ("\\text", r"^ ?\\text ?\{(?![^{}]*(?:[Nn]ot\b|except))[^{}]*(?:\bis|:) ?\}", ""),  # \text{The answer is }15
    ("°", r"([0-9]+) ?° ?([0-9]+) ?'(?: ?([0-9.]+) ?'')?", r"(\1+\2/60+0\3/3600)°"),
    ("C", r"(?:\{\})?[_^] ?\{?([0-9]+)\}? ?C_ ?\{?([0-9]+)\}?", r"\\binom{\1}{\2}"),
    ("mod", r"\( ?(?:\\text ?\{ ?mod ?\}|\\[bp]?mod|mod) ?\{? ?([0-9]+) ?\}? ?\)", r"\\pmod{\1}"),
    ("angle", r"\bm ?(?=\\angle)", ""), ("log", r"\blog(2|10)\(", r"\\log_{\1}("), ("^", r"\^ ?\((-?[0-9]+)\)", r"^{\1}"),
    ("[", r"^ ?([\[\]])([^\[\]()]*,[^\[\]()]*)([\[\]]) ?$", lambda m: "(["[m[1] == "["] + m[2] + ")]"[m[3] == "]"]),  # ]0,1]
    ("_", r"\{ ?([a-zA-Z]) ?\}(?=_)", r" \1"),  # \mathbf{u}_1
    ("\\begin", r"\\begin ?\{(cases|aligned|gathered|split)\}(.*)\\end ?\{\1\}",
     lambda m: m[0] if CONDITION.search(m[2]) else m[2].replace("&", "").replace(r"\\", ",")),
    ("**", r"^ ?\*\*(.*)\*\* ?$", r"\1"), ("to", r" ?\\text ?\{ ?to ?\} ?|(?<=[0-9]) to (?=[0-9])", ":"),
    ("", r"(^ ?|[(,\[] ?)([-+]) ?([$€£]) ?", r"\1\3\2"),  # -$5
    ("<=", "<=", "≤"), (">=", ">=", "≥"), ("!=", "!=", "≠"), ("**", r"\*\*", "^"), ("+/-", r"\+/-", "±"),
    ("\\mathbb", r"\\mathbb ?\{? ?R ?\}?", "ℝ"), ("ℝ", r"ℝ ?[-\\] ?(?=\\\{)", "ℝ∖"),
    ("\\text", r"\\text ?\{ ?", r"\\text{"), ("", r"([\^_]) ?([0-9a-zA-Z])(?![0-9]|\.[0-9])", r"\1{\2}"),
]  # fmt: skip
CLEANERS = [(needed, re.compile(pattern), replacement) for needed, pattern, replacement in CLEANERS]
TEXT = re.compile(r"\\text\{([^{}]*)\}")
BLANK = re.compile(r"(?<![0-9,]) | (?![0-9.])")  # "1 2" is not 12, "1, 234" not 1,234
WORDS = re.compile(r"\\text\{[^{}]*\}|[a-zA-Z][a-z]{2,}|(?i:no)")


def plain_number(answer: str) -> int | Fraction | None:
    """-1,234.50 -> Fraction(-2469, 2), the commonest kind of answer by far; None for anything else."""
    match = PLAIN.fullmatch(answer)
    if not match:
        return None
    sign, digits, grouped, *decimals = match.groups()
    x, decimals = int(digits or (grouped or "0").replace(",", "")), next(filter(None, decimals), "")
    x = simple(x + Fraction(int(decimals), 10 ** len(decimals))) if decimals else x
    return -x if sign == "-" else x


def clean(answer: str) -> str:
    """One spelling for each LaTeX notation. Blanks are kept, single: "1, 234" is not 1,234."""
    answer = unicodedata.normalize("NFC", answer).translate(CHARACTERS)
    if "\\\\" in answer and "\\begin" not in answer:
        answer = re.sub(r"\\\\(?=[a-zA-Z{}])", r"\\", answer)  # escaped twice, as in JSON
    for needed, pattern, replacement in CLEANERS[4 * answer.isascii() :]:
        if needed in answer:
            answer = pattern.sub(replacement, answer)
    answer = answer.strip(" ,")
    return answer if answer.endswith("..") else answer.removesuffix(".").rstrip()


def same_string(a: str, b: str) -> bool:
    r"""Equal but for blanks, \text, the brackets of a choice (A) and the case of words? In math x is not X."""
    words = sum(bool(WORDS.fullmatch(s)) and not is_product(s.lower()) for s in (a, b))
    a, b = (re.sub(r"^\(([a-zA-Z])\)$", r"\1", BLANK.sub("", TEXT.sub(r"\1", s)).removesuffix(".")) for s in (a, b))
    return a == b or (a.casefold() == b.casefold() and (words == 2 or (words and len(a) >= 3)))


# ------------------------------------------------------------------------------------------------ parser


class Unparsed(Exception):
    """The answer is not understood entirely, or is too large to be computed with."""


FUNCTIONS = set(
    "sin cos tan cot sec csc sinh cosh tanh coth sech csch arcsin arccos arctan arccot arcsec arccsc exp ln log lg min max "
    "gcd lcm abs cis".split()
)
GREEK = set(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi chi psi omega Gamma Delta "
    "Theta Lambda Xi Pi Sigma Phi Psi Omega ell triangle".split()
)
CONSTANTS = ("π", "e", "i")
PLAIN_WORDS = {"sqrt": r"\sqrt", "pi": "π", "infinity": "∞", "infty": "∞", "inf": "∞", "oo": "∞", "Infinity": "∞", "U": "∪"}
PLAIN_WORDS |= {"union": "∪", "atan": r"\arctan", "asin": r"\arcsin", "acos": r"\arccos"}
SHORT_WORDS = {"no", "No", "of", "is", "to", "on", "if", "we", "he"}  # but ax + by
SHORT_UNITS = set("cm mm km kg mg ml mL ft mi hr hrs lb lbs pts oz in yd pm am mph kph rpm pct cc sq".split())
UNIT_LETTERS = set("ghlmsLNJWVKFCA")  # 5\text{ m} is a length, 5\text{ x} a product
RELATIONS = tuple("=<>≤≥≠≈≡∈")
CLOSING = {"(": ")", "[": "]", r"\{": r"\}", "{": "}", r"\langle": r"\rangle", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
UNORDERED, INTERVALS = ("", r"\{\}", "{}"), ("()", "[)", "(]", "[]")  # brackets of lists and sets, and of intervals
X, BOUND = ("variable", "x"), ("variable", "bound")  # the unknown of an inequality; of {y : y > 3}, whatever its name
INFIX = (r"\pmod", r"\bmod", r"\choose", r"\over")  # commands that no factor begins with
UNIT_NAMES = {  # unit: its spellings, without a plural s
    "%": "percent percentage pct", "$": "dollar usd buck", "€": "euro", "¢": "cent", "°": "degree deg", "cm": "centimeter "
    "centimetre", "mm": "millimeter millimetre", "m": "meter metre", "km": "kilometer kilometre", "in": "inche inch",
    "ft": "foot feet", "yd": "yard", "mi": "mile", "g": "gram", "kg": "kilogram", "mg": "milligram", "l": "liter litre",
    "ml": "milliliter", "oz": "ounce", "pound": "lb", "hour": "hr h", "minute": "min", "second": "sec s", "square": "sq",
    "person": "people", "man": "men", "woman": "women", "child": "children",
    "gallon": "gal", "cubic": "cu", "mi / hour": "mph", "yen": "¥",
}  # fmt: skip
UNIT_NAMES = {spelling: unit for unit, spellings in UNIT_NAMES.items() for spelling in spellings.split()}
SMALL_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
# A text behind a number that changes its value is no unit: 5\text{ million}, 2\text{ pi}, 5\text{ or more}.
NO_UNIT = set(
    "and or not more less fewer than above below least most over under base remainder pi hundred thousand million "
    "billion trillion quadrillion dozen score ten half halves third quarter fourth fifth sixth seventh eighth ninth tenth "
    "eleventh twelfth hundredth thousandth millionth squared cubed factorial choose times plus minus negative if for where "
    "when with is are to maybe except root divided halved doubled tripled bn mn mil mln grand by until through".split()
)
TOKEN = re.compile(
    r"""(?P<blank>[ ]+)
    |(?P<repeating>[0-9]*\.[0-9]*\\(?:overline|dot)[ ]?(?:\{[0-9]+\}|[0-9])|[0-9]*\.\([0-9]+\)|[0-9]*\.[0-9]+[ ]?\.\.\.)
    |(?P<number>(?:[0-9]+(?:,[0-9]+)*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+(?![0-9]*[a-zA-Z]))?)
    |\\text\{(?P<text>(?:[^{}]|\{[^{}]*\})*)\}
    |(?P<environment>\\(?:begin|end)[ ]?\{[a-zA-Z]+\*?\})(?:[ ]?\{[clr| ]*\})?
    |(?P<name>\\(?:overline|hat|widehat|overrightarrow|overarc|tilde|mathbb|mathfrak)[ ]?\{[^{}]+\}
        |(?:\\angle|\\hat|\\overline)[ ]?[a-zA-Z]+|\.\.\.)
    |(?P<word>[a-zA-Z]+)
    |(?P<symbol>\\[a-zA-Z]+|\\[{}|\\]|.)""",
    re.VERBOSE,
)


def is_product(word: str) -> bool:
    """Are these letters a product, as xy, abc, nRT and AB are? Longer words, and those with a vowel, are none."""
    if len(word) <= 2:
        return word not in SHORT_WORDS
    consonants = not set(word.lower()) & set("aeiouy")
    return len(word) <= 4 and (word.isupper() or consonants or "".join(sorted(word)) in "abcdefghijklmnopqrstuvwxyz")


def repeating_decimal(text: str) -> Fraction:
    r"""0.1\overline{6} = 1/6, also 0.(6), and 0.1666... if its last digits repeat at least three times."""
    whole, _, rest = text.replace(" ", "").partition(".")
    pattern = r"(\d*?)(\d{1,9}?)\2{2,}\.\.\." if rest.endswith("...") else r"(\d*)\D+(\d+)\W?"
    match = re.fullmatch(pattern, rest)
    if not match or len(text) > 300:
        raise Unparsed("which digits repeat?")
    fixed, period = match.groups()
    return (int(whole + fixed or "0") + Fraction(int(period), 10 ** len(period) - 1)) / 10 ** len(fixed)


def tokenize(answer: str) -> list[tuple[str, object, bool]]:
    """(kind, value, after a blank?) for each token; the kinds are number, value, variable, text, and symbol for the rest."""
    tokens, depth, blank = [], 0, False
    for match in TOKEN.finditer(answer):
        kind, token = match.lastgroup, match[0]
        last, before = tokens[-1] if tokens else ("", ""), tokens[-2] if len(tokens) > 1 else ("", "")
        per = last[1] == "/" and before[0] == "text"
        measured = per or last[0] in ("number", "value") or last[1] in (")", "}", "°", "π")
        if kind == "number":
            groups = token.split(",")
            thousands = len(groups[0]) <= 3 and groups[0] != "0" and all(re.match(r"\d{3}(\D|$)", g) for g in groups[1:])
            if thousands and (depth == 0 or any(g[0] == "0" for g in groups[1:])):  # in (1,234) the comma separates
                groups = ["".join(groups)]
            for i, group in enumerate(groups):
                tokens += [("symbol", ",", False)] * (i > 0) + [("number", group, blank and i == 0)]
        elif kind == "repeating":
            tokens.append(("value", repeating_decimal(token), blank))
        elif kind == "environment":
            tokens.append(("symbol", re.sub("[ *]", "", match["environment"]), blank))
        elif kind == "name":
            tokens.append(("variable", re.sub("[ {}]", "", token), blank))
        elif kind == "symbol":
            depth += 0 if token in "{}" else (token in CLOSING) - (token in CLOSING.values())
            tokens.append(("symbol", token, blank))
        elif kind in ("text", "word"):
            words = match["text"].strip() if kind == "text" else token
            formula = kind == "text" and re.fullmatch(r"[^a-zA-Z\\]*[a-zA-Z]?[^a-zA-Z\\]*", words)  # \text{(A)}, \text{5}
            following = answer[match.end() :][:1]
            raised = len(words) <= 3 and following in ("^", "_") and words not in FUNCTIONS  # xee^{x}
            seconds = words in ("min", "sec") and (measured or last[0] == "text") and following not in ("(", "{")
            glued = not blank and (measured or last[0] == "variable") and len(words) <= 4 and words not in UNIT_NAMES  # 2abx
            unit = per or (measured and words in SHORT_UNITS) or (last[0] == "text" and len(words) > 1)
            if words.strip(" ,") in ("and", "or"):
                tokens.append(("symbol", words.strip(" ,"), blank))
            elif (words in FUNCTIONS and not seconds) or words in PLAIN_WORDS:
                tokens.append(("symbol", PLAIN_WORDS.get(words, "\\" + words), blank))
            elif kind == "text" and "," in words:
                tokens += tokenize(",".join(rf"\text{{{word}}}" for word in words.split(",")))
            elif (formula and not (measured and words.partition("^")[0] in UNIT_LETTERS)) or (
                kind == "text" and not tokens and words[:1].isdigit()  # \text{15 apples}
            ):
                tokens += tokenize(words)
            elif re.fullmatch("d[xyzt]|[HT]{2,}|[A-Z]{3,}", words):  # THH is a name, and no product
                tokens.append(("variable", words, blank))
            elif kind == "word" and (is_product(words) or raised or glued) and not unit:
                tokens += [("variable", letter, blank and i == 0) for i, letter in enumerate(words)]
            elif words:
                tokens.append(("text", words, blank))
        blank = kind == "blank"
    return tokens


def simple(x: Fraction) -> int | Fraction:
    return x.numerator if x.denominator == 1 else x


def to_number(text: str) -> int | Fraction:
    """12.5e3, exactly. Raises Unparsed beyond the caps."""
    mantissa, _, exponent = text.lower().partition("e")
    whole, _, decimals = mantissa.partition(".")
    if len(mantissa) > 300 or len(exponent) > 4:
        raise Unparsed("too many digits")
    return simple(Fraction(int(whole + decimals or "0"), 10 ** len(decimals)) * Fraction(10) ** int(exponent or 0))


def kind_of(node) -> str:
    return node[0] if isinstance(node, tuple) else "number"


def substitute(node, old, new):
    if node == old:
        return new
    return tuple(substitute(child, old, new) for child in node) if isinstance(node, tuple) else node


def children(node) -> list:
    """The nodes inside of a node; what else it holds are strings."""
    return [child for child in node[1:] if not isinstance(child, str)] if isinstance(node, tuple) else []


def walk(node):
    yield node
    for child in children(node):
        yield from walk(child)


def variables(node) -> set:
    return {n for n in walk(node) if kind_of(n) in ("variable", "text")}


def is_name(node) -> bool:
    r"""May this stand before "=" as a value's name? x, x_1, f(x), AB, |AB|, (x, y), \sin A, AB/CD, but not 2x or x+y."""
    kind = kind_of(node)
    if kind in ("variable", "call", "text") or node in (("constant", "i"), ("constant", "e")):
        return True
    if kind in ("*", "/"):
        lower = [n for n in children(node) if kind_of(n) == "variable" and re.match("[a-z](?<!d)|d$", n[1])]  # but dy/dx
        return not lower and all(map(is_name, children(node)))
    if kind == "fn":
        return all(is_name(n) and all(v[1][:1].isupper() or v[1][0] == "\\" for v in variables(n)) for n in children(node))
    return kind in ("ratio", "seq", "'") and all(map(is_name, children(node)))


def names_in(node) -> set:
    """The names of an inequality or equation: of 0 < f(x) < 1 only f(x)."""
    return {node} if is_name(node) else set().union(*map(names_in, children(node)))


def is_list(node, *brackets: str) -> bool:
    return kind_of(node) == "seq" and node[1] in (brackets or UNORDERED)


def arguments(node) -> tuple:
    return node[2:] if kind_of(node) == "seq" else (node,)


def exact(x) -> bool:
    return type(x) is int or type(x) is Fraction  # isinstance takes three times as long


def is_proper(fraction) -> bool:
    return kind_of(fraction) == "/" and type(fraction[1]) is type(fraction[2]) is int and 0 < fraction[1] < fraction[2]


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
    rows_x, rows_y = rows_of(x), rows_of(y)
    if rows_x and rows_y:
        if len(rows_x[0]) != len(rows_y) or len(rows_x) * len(rows_y[0]) * len(rows_y) > MAX_ITEMS:
            raise Unparsed("matrices of these shapes have no product")
        return matrix([[plus(*map(times, row, column)) for column in zip(*rows_y)] for row in rows_x])
    if rows_x or rows_y:
        return matrix([[times(y if rows_x else x, cell) for cell in row] for row in rows_x or rows_y])
    if x == -1 and exact(y):
        return -y
    return (y[0], times(-1, y[1]), *y[2:]) if x == -1 and kind_of(y) in ("unit", "%", "°") else ("*", x, y)


def determinant(rows):
    if len(rows) != len(rows[0]) or len(rows) > 4:
        raise Unparsed("no determinant")
    if len(rows) == 1:
        return rows[0][0]
    minors = ([row[:j] + row[j + 1 :] for row in rows[1:]] for j in range(len(rows)))
    return plus(*(times((-1) ** j, times(rows[0][j], determinant(minor))) for j, minor in enumerate(minors)))


def canonical_unit(words: list[str]) -> str:
    r"""One name for a unit: "square centimeters", cm^2 and "sq cm" are "cm^2". Raises Unparsed for what is no unit."""
    text = re.sub("[.{}*]", "", " ".join(words).lower()).replace("per cent", "percent").replace("per ", "/ ")
    power, names = "", []
    for plural in text.replace("/", " / ").replace("^ ", "^").split():
        word, _, exponent = plural.partition("^")
        word = word.removesuffix("s") if len(word) > 2 and not word.endswith("ss") else word
        if word in ("squared", "cubed") and names:
            names[-1] += "^2" if word == "squared" else "^3"
            continue
        word = UNIT_NAMES.get(word, word) + (f"^{exponent}" if exponent else "")
        counted = re.search(r"(?:teen|ie)th$|(?<!\^)(?<!\^-)[0-9(\[=<>]", word)  # 5 sixteenths, 5 out of 6
        if counted or {word, plural} & (NO_UNIT | set(SMALL_NUMBERS)):
            raise Unparsed(f"{word!r} is no unit")
        if word in ("square", "cubic"):
            power = "^2" if word == "square" else "^3"
        elif word.startswith("^") and names:
            names[-1] += word
        else:
            names.append(word + power)
            power = ""
    return " ".join(names) or "unit" + power


class Parser:
    """Recursive descent; each method reads what it is named after. Nodes are numbers (int, Fraction) or tuples (kind, ...)
    of strings and nodes. Lists are ("seq", brackets, ...): "" for none, "{}" for braces that TeX would not print."""

    def __init__(self, answer: str):
        self.tokens, self.i, self.depth = tokenize(answer) + 6 * [("end", "", False)], 0, 0
        self.bars = False  # inside |...| and {... | ...}, where the next bar is the closing one

    def peek(self, ahead: int = 0):
        return self.tokens[self.i + ahead]

    def sees(self, *symbols: str) -> bool:
        kind, value, _ = self.tokens[self.i]
        return kind == "symbol" and value in symbols

    def accept(self, *symbols: str) -> str | None:
        found = self.sees(*symbols)
        self.i += found
        return self.peek(-1)[1] if found else None

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
        for i, node in enumerate(nodes[1:], 1):  # x ≠ 1, 2
            if exact(node) and kind_of(nodes[i - 1]) == "order" and nodes[i - 1][2:3] == ("≠",):
                nodes[i] = (*nodes[i - 1][:3], node)
        if len(nodes) > MAX_ITEMS:
            raise Unparsed("too many elements")
        names = [node[1] for node in nodes if kind_of(node) == "named"]
        n = len(set(names))
        rounds = [nodes[i : i + n] for i in range(0, len(nodes), n)] if n > 1 and len(names) == len(nodes) > n else []
        if rounds and all({node[1] for node in group} == set(names) for group in rounds):  # x=1, y=2 or x=2, y=1
            nodes = [("seq", "()", *sorted(group, key=lambda node: str(node[1]))) for group in rounds]
        elif {",", ";"} <= separators:
            nodes = [("seq", "()", *group) if len(group) > 1 else group[0] for group in groups]
        elif len(nodes) > 1 and all(kind_of(node) == "order" for node in nodes):
            if separators >= {"and", "or"}:
                raise Unparsed("and, or both?")
            unequal = all("≠" in node for node in nodes)
            if unequal or separators in ({"and"}, {"or"}):
                return ("∩" if unequal or separators == {"and"} else "∪", *nodes)
        return ("seq", "", *nodes) if len(nodes) > 1 else nodes[0]

    def relation(self):
        """a, a <= b < c, x in S, a = b = c, of which the last counts: with a name before it, it is ("named", a, c)."""
        members, signs = [self.union()], []
        while sign := self.accept(*RELATIONS):
            value_before = self.peek(-3)[0] in ("number", "value") or self.peek(-3)[1] in ("}", ")")
            if signs and self.peek(-2)[0] == "variable" and self.peek(-2)[2] and value_before:
                raise Unparsed("two equations side by side")  # x=3\ y=4
            signs.append(sign)
            members.append(self.union())
        first, last = members[0], members[-1]
        if not signs:
            if kind_of(first) == "call" and len(first) > 3 and first[1].isupper():  # the point P(1, 2)
                return ("named", ("variable", first[1]), ("seq", "()", *first[2:]))
            point = kind_of(first) == "*" and kind_of(first[1]) == "variable" and is_list(first[2], "()")
            return ("named", *first[1:]) if point and first[1][1].isupper() else first
        if set(signs) <= set("<>≤≥≠"):
            return ("order", first, *(x for pair in zip(signs, members[1:]) for x in pair))
        if "≈" in signs:  # of x = 1/3 ≈ 0.33 the exact value counts
            i = signs.index("≈")
            last, signs = members[i if i or not is_name(first) else 1], ["="]
        if not set(signs) <= {"=", "≡"} and signs != ["∈"]:
            raise Unparsed("a mixture of relations")
        if signs == ["∈"] and not is_name(first):
            raise Unparsed("a statement")
        if signs == ["∈"] and kind_of(last) not in ("seq", "∪", "∩", "∖", "ℝ") and str(last[1:2])[2:9] != r"\\mathb":
            raise Unparsed("in what?")
        if is_list(last, "{}") and signs == ["∈"]:
            last = ("seq", r"\{\}", *last[2:])
        if kind_of(last) == "matrix" and kind_of(first) != "matrix":
            return last  # A^{-1} = ...
        if kind_of(first) == kind_of(last) == "seq" and len(first) == len(last) and is_name(first):
            return ("seq", first[1], *(("named", x, y) for x, y in zip(first[2:], last[2:])))  # (x, y) = (1, 2)
        if len(signs) > 1 and any(is_name(member) and kind_of(member) != "call" for member in members[1:]):
            raise Unparsed("a chain of names")
        if len(signs) > 1 and not is_name(first) and any(variables(m) - variables(last) for m in members):
            raise Unparsed("several equations")
        if is_name(first):
            return ("named", first, last)
        if is_name(last) and signs == ["="]:
            return ("named", last, first)
        return last if len(signs) > 1 or not variables(first) | variables(last) else ("equation", first, last)

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
        scales = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
        unit, modulus = [symbol] if (symbol := self.accept("$", "€", "£", "¥")) else [], ""
        node = self.sum()
        while self.peek()[0] == "text" and (words := self.peek()[1].split())[0] in scales:
            node = times(node, scales[words[0]])
            self.tokens[self.i : self.i + 1] = [("text", " ".join(words[1:]), True)] if words[1:] else []
        while self.peek()[0] == "text" or self.sees("$", "€", "£", "¢", "/", r"\pmod") or (self.sees("*") and unit):
            self.i += 1
            if self.peek(-1)[1] == r"\pmod":
                modulus = f"mod {self.atom()}"
            else:
                unit.append(str(self.peek(-1)[1]))
            if self.accept("^"):
                unit.append(f"^{self.argument()}")
        node = ("unit", node, canonical_unit(unit)) if unit else node
        return ("unit", node, modulus) if modulus else node

    def sum(self):
        terms = []
        while not terms or self.sees("+", "-"):
            negative = False
            while sign := self.accept("+", "-"):
                negative ^= sign == "-"
            terms.append(times(-1, self.product()) if negative else self.product())
        return plus(*terms)

    def product(self):
        r"""Factors, side by side or not. 3\frac12 and 3 1/2 are mixed numbers; 3 5 is nothing."""
        node, start = self.power(), self.i
        while True:
            last, whole = self.peek(-1), self.i == start and type(node) is int and self.peek(-1)[0] == "number"
            if self.accept("*"):
                node = times(node, self.signed())
            elif self.accept(r"\bmod"):
                node = ("fn", "mod", node, self.signed())
            elif self.sees("/", "÷") and self.peek(1)[0] != "text":
                self.i += 1
                node = ("/", node, self.signed())
            elif self.peek()[0] == "number" and (
                last[1] in ("!", "i", "π", "}" if self.peek(1)[1] == "^" else "!")
                or (last[1] == ")" and self.peek(-3)[1] != "(")  # but (a) 3 (b) 1 has two parts
            ):
                node = times(node, self.power())
            elif self.peek()[0] == "number":
                top, slash, bottom = self.peek(), self.peek(1)[1], self.peek(2)
                if not (whole and top[2] and slash == "/" and bottom[0] == "number"):
                    raise Unparsed("two numbers side by side")
                self.i += 3
                if not is_proper(fraction := ("/", to_number(top[1]), to_number(bottom[1]))):
                    raise Unparsed("not a mixed number")
                node += Fraction(*fraction[1:])
            elif self.starts_factor():
                fraction, factor = self.sees(r"\frac") and last[0] == "number", self.power()
                fraction = fraction and is_proper(factor)
                if fraction and not whole:
                    raise Unparsed("a mixed number, or a product?")
                node = node + Fraction(*factor[1:]) if fraction else times(node, factor)
            elif sign := self.accept("%", "°"):
                if kind_of(node) == "variable" and self.starts_factor():
                    raise Unparsed("functions of functions")
                node = (sign, node)
            else:
                return node

    def starts_factor(self) -> bool:
        kind, value, _ = self.peek()
        if kind != "symbol" or value == "|":
            return kind in ("variable", "value") or (value == "|" and not self.bars)
        if value[0] == "\\" and len(value) > 2:
            return value not in INFIX and value not in CLOSING.values() and not value.startswith(r"\end")
        return value in (*CONSTANTS, "(", "[", "{", "√")

    def signed(self):
        return times(-1, self.signed()) if self.accept("-") else self.power()

    def power(self):
        node = self.atom()
        while symbol := self.accept("^", "!", "'"):
            braces = int(self.sees("{"))
            kind, word, _ = self.peek(braces)
            if symbol == "!":
                node = ("fn", "!!" if self.accept("!") else "!", node)
            elif symbol == "'":
                node = ("'", node)
            elif kind == "text" or (rows_of(node) and word in ("T", r"\top")):  # 5^{\text{th}}, the transpose of a matrix
                node = ("unit", node, canonical_unit([word])) if kind == "text" else matrix(list(zip(*rows_of(node))))
                self.i += braces + 1
                braces and self.expect("}")
            else:
                node = ("^", node, self.argument(whole=True))
                if self.sees("^"):
                    raise Unparsed("a power of a power")
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
        node, condition = self.items(), None
        if opened == "{" and (symbol := self.accept(r"\over", r"\choose")):
            node = ("/", node, self.items()) if symbol == r"\over" else ("fn", "binom", node, self.items())
        self.bars = False
        if opened == r"\{" and self.accept(":", "|"):
            name, condition = node, self.items()
            if kind_of(name) == "named":  # {x in R : ...}
                name, condition = name[1], condition if name[2] == ("ℝ",) else ("∩", name[2], condition)
            if not is_name(name) or name not in names_in(condition):
                raise Unparsed("not a set")
            condition = substitute(condition, name, BOUND)
        closed = self.expect(*(")", "]") if opened in ("(", "[") else (CLOSING[opened],))
        self.bars, self.depth = outside, self.depth - 1
        if condition is not None:
            return condition
        items = node[2:] if is_list(node, "") else (node,)
        if opened == r"\{" or len(items) > 1:
            return ("seq", "()" if opened == r"\langle" else opened + closed, *items)
        if CLOSING[opened] != closed:
            raise Unparsed("brackets do not match")
        return ("fn", opened, node) if opened in (r"\lfloor", r"\lceil") else node

    def atom(self):
        kind, value, _ = self.peek()
        if kind == "end":
            raise Unparsed("unfinished")
        self.i += 1
        if kind == "value":
            return value
        if kind == "number":
            return ("based", value.lstrip("0"), str(self.argument(whole=True))) if self.accept("_") else to_number(value)
        if kind == "text":
            if self.i > 1 and self.peek(-2)[1] not in (*RELATIONS, ",", "and", "or", "(", r"\{"):
                raise Unparsed("a word in an expression")
            return text_node(value)
        if kind == "variable" or value[1:] in GREEK:
            return self.variable(value)
        if value == r"\{" and self.accept(r"\}"):
            return ("seq", r"\{\}")
        if value in CLOSING:
            return self.group(value)
        if value in ("|", r"\|"):
            outside, self.bars = self.bars, True
            node = (self.items(), self.expect(value))[0]
            self.bars = outside
            return ("fn", "abs", node)
        if value in (*CONSTANTS, "∞"):
            return ("constant", value)
        if value in ("∅", "ℝ"):
            return ("seq", r"\{\}") if value == "∅" else ("ℝ",)
        if value in (r"\frac", r"\binom"):
            pair = self.argument(), self.argument()
            return ("/", *pair) if value == r"\frac" else ("fn", "binom", *pair)
        if value == "√":
            return ("fn", "root", 2, self.power() if self.sees("(") else self.argument(whole=True))
        if value == r"\sqrt":
            index = (self.sum(), self.expect("]"))[0] if self.accept("[") else 2
            if self.peek()[0] == "number" and len(self.peek()[1]) > 1:
                raise Unparsed("does the root end after the first digit?")
            return ("fn", "root", index, self.argument())
        if value[1:] in FUNCTIONS:
            return self.function(value[1:])
        if value in (r"\sum", r"\prod"):
            return self.big_operator(value)
        if value.startswith(r"\begin"):
            return self.matrix(value[7:-1])
        raise Unparsed(f"unexpected {value!r}")

    def variable(self, name: str):
        r"""x, V_{\text{max}}; values of unknown functions: f(x), f^{-1}(x), x', and x_1 or a_{n+1} by their index."""
        if self.accept("_"):
            braces = self.sees("{")
            kind, text, _ = self.peek(int(braces))
            if kind != "text" and text not in (r"\max", r"\min"):
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
        defined = following[2:3] == [")"] and (self.peek(1)[0] == "number" or following[3:4] and following[3] in RELATIONS)
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
        if self.sees("(", "{", "[", "|", r"\{"):
            argument = self.atom()
        else:
            negative = self.accept("-")
            if not (self.starts_factor() or self.peek()[0] == "number"):
                raise Unparsed("a function of nothing")
            argument = self.power()
            while self.starts_factor() and not self.sees("(", "[", "|", *("\\" + f for f in FUNCTIONS)):
                argument = times(argument, self.power())
            if self.sees("("):
                raise Unparsed(f"what is {name} of?")
            argument = times(-1, argument) if negative else argument
        argument = ("°", argument) if self.accept("°") else argument
        if base is not None and name != "log":
            raise Unparsed(f"the index of {name}")
        if name == "lg" or base is not None:
            node = ("/", ("fn", "ln", argument), ("fn", "ln", 10 if name == "lg" else base))
        elif exponent == -1 and "arc" + name in FUNCTIONS:
            return ("fn", "arc" + name, argument)
        else:
            node = ("fn", name, *arguments(argument))
        return node if exponent is None else ("^", node, exponent)

    def big_operator(self, name: str):
        limits = {"_": 0, "^": 0}
        while symbol := self.accept("_", "^"):
            limits[symbol] = self.argument(whole=True)
        low, high = limits.values()
        if kind_of(low) != "named" or kind_of(low[1]) not in ("variable", "constant"):
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


# ------------------------------------------------------------------------------------------------ numbers


class Undefined(Exception):
    """The expression has no value at this point."""


class Point(dict):
    """Values of variables. If `real`, roots and logarithms must be, too: sqrt(x) sqrt(x) is x only where it is defined."""

    real = True


@lru_cache(None)
def random_numbers(i: int) -> list[Fraction]:
    """Fifty between 0.1 and 1: the same in every process, but hardly the roots of anything."""
    rng = random.Random(i)
    return [Fraction(rng.randrange(10**5, 10**6), 10**6 + 3) for _ in range(50)]


def points(names: set, literals: set = frozenset()):
    """Points to compare at: of all signs and of several sizes, integers too, where (-1)^n and n! are defined, and then some
    between the literals, where |x - 3| has its kinks."""
    ends = sorted({Fraction(0), *literals, *(-x for x in literals)})
    ends = [ends[0] - 1, *ends, ends[-1] + 1]
    for i in range(48 if literals else 12):
        scale, point = (0, 1, 10, 1, 10**5, 10**5, 0, 1, 10, 0, 1, 0)[i] if i < 12 else 10 ** (i % 4), Point()
        for k, (name, x) in enumerate(zip(sorted(names), random_numbers(i))):
            sign = {1: -1, 2: (-1) ** k, 3: 1, 4: -1, 5: (-1) ** (k // 2), 7: 1}.get(i, (-1) ** x.numerator)
            point[name] = sign * x * scale if scale else x.numerator % 20 * 2 + 1 + (i + k) % 2
            if i >= 12 and i % 4:
                j = (i * (k + 1)) % (len(ends) - 1)
                point[name] = ends[j] + x * (ends[j + 1] - ends[j])
        yield point


def inexact(x):
    return mp.mpf(x.numerator) / x.denominator if exact(x) else x


def size(x) -> float:
    """Bits of an exact number; of an inexact one, how far its logarithm is from 0."""
    if exact(x):
        return x.numerator.bit_length() + x.denominator.bit_length()
    return 0 if x == 0 else abs(mp.mag(x))


def limited(bits: int, *values) -> list:
    """The values as mpmath's, if they are not too large to compute with."""
    values = [inexact(x) for x in values]
    if any(mp.isinf(x) or (x != 0 and mp.mag(x) > bits) for x in values):
        raise Unparsed("too large")
    return values


def checked(x, point: Point):
    """A new value, if it may be used: a number, real where it has to be, and not too large to compute on with."""
    if exact(x):
        x = simple(x)
    elif mp.isnan(x) or (x.imag != 0 and point.real):
        raise Undefined
    elif mp.isinf(x := x.real if x.imag == 0 else x):
        return x
    if size(x) > (MAX_BITS if exact(x) else 10**9):
        raise Unparsed("too large")
    return x


def add(point, *terms):
    return sum(terms) if all(map(exact, terms)) else mp.fsum(map(inexact, terms))


def multiply(point, x, y):
    return x * y if exact(x) and exact(y) else inexact(x) * inexact(y)


def divide(point, x, y):
    return Fraction(x) / y if exact(x) and exact(y) else inexact(x) / inexact(y)


def exact_root(x: int | Fraction, n: int):
    """The n-th root of x >= 0 if it is rational, else None."""
    if size(x) > 10_000 or n > 100:
        return None
    with mp.workprec(size(x) + 20):
        roots = [int(mp.nint(mp.root(k, n))) for k in (x.numerator, x.denominator)]
    return simple(Fraction(*roots)) if roots[0] ** n == x.numerator and roots[1] ** n == x.denominator else None


def power(point, x, y):
    if isinstance(y, int) and exact(x) and (abs(y) * size(x) <= MAX_BITS or x in (0, 1, -1)):
        return Fraction(x) ** y
    if isinstance(y, Fraction) and exact(x) and x >= 0 and (found := exact_root(x, y.denominator)) is not None:
        return power(point, found, y.numerator)
    x, y = inexact(x), inexact(y)
    if x == 0 and mp.re(y) <= 0:
        raise Undefined
    if x != 0 and not mp.isinf(x) and (mp.isinf(y) or mp.mag(size(x) or 1) + (size(y) if abs(y) > 1 else 0) > 40):
        raise Unparsed("too large")
    return mp.power(x, y)


def root(point, n, x):
    if isinstance(n, int) and n > 1 and exact(x) and (x >= 0 or n % 2) and (found := exact_root(abs(x), n)) is not None:
        return found if x >= 0 else -found
    if point.real and isinstance(n, int) and n % 2 and mp.re(inexact(x)) < 0:
        return -root(point, n, -x)
    return power(point, x, checked(divide(point, 1, n), point))


def factorial(point, n, step: int = 1):
    if isinstance(n, int) and 0 <= n <= 5000:
        return math.prod(range(n, 0, -step))
    if isinstance(n, (int, mp.mpc)) or step > 1:
        raise Unparsed("too large") if isinstance(n, int) and n > 0 else Undefined
    return mp.gamma(limited(12, n)[0] + 1)


def binomial(point, n, k):
    if isinstance(n, int) and isinstance(k, int) and 0 <= n <= 5000:
        return math.comb(n, k) if k >= 0 else 0
    return mp.binomial(*limited(12, n, k))


def floor(point, x):
    return math.floor(x) if exact(x) else int(mp.floor(*limited(3000, x)))


def integer(x) -> int:
    if not isinstance(x, int):
        raise Unparsed("not of integers")
    return x


OPERATIONS = {  # name -> function of a point and of the values
    "+": add, "*": multiply, "/": divide, "^": power, "root": root, "abs": lambda point, x: abs(x), "!": factorial,
    "!!": lambda point, n: factorial(point, n, 2), "binom": binomial, r"\lfloor": floor,
    r"\lceil": lambda point, x: -floor(point, -x), "gcd": lambda point, *values: math.gcd(*map(integer, values)),
    "lcm": lambda point, *values: math.lcm(*map(integer, values)), "mod": lambda point, x, y: integer(x) % integer(y),
    "min": lambda point, *values: min(values, key=inexact), "max": lambda point, *values: max(values, key=inexact),
}  # fmt: skip


def function(name: str, point: Point, x):
    (x,) = limited(200, x)
    if name == "cis":
        return mp.expj(x)
    if name == "log":  # without a base: it is equal only to what it equals in any, and 2.7071 is as good as any
        return mp.ln(x) / mp.ln(mp.mpf(27071) / 10**4)
    return getattr(mp, name.replace("arc", "a"))(x)


def unknown(name: str, *values):
    """The value of a function that is not known: a random number for each argument."""
    key = repr((name, *(x if exact(x) else mp.nstr(x, 20) for x in values)))
    return Fraction(random.Random(key).randrange(1, 10**9), 10**8)


def big_value(name: str, index, low, high, term, point: Point):
    """A sum or product: term by term between integers, else unknown, but the same for the same limits and terms."""
    low, high = value(low, point), value(high, point)
    if not (isinstance(low, int) and isinstance(high, int)):
        return unknown(name, low, high, value(substitute(term, index, Fraction(7919, 1009)), point))
    if high - low > MAX_ITEMS:
        raise Unparsed("too many terms")
    result, operation = (0, add) if name == r"\sum" else (1, multiply)
    for k in range(low, high + 1):
        result = checked(operation(point, result, value(substitute(term, index, k), point)), point)
    return result


def value(node, point: Point):
    """The value of an expression: int or Fraction where it is exact, else mpf or mpc, to mp.dps digits.

    Raises Undefined where there is none, Unparsed if it is no number at all, or too large a one."""
    if exact(node):
        return node
    kind, *args = node
    if kind in ("variable", "text"):
        if node[1] == "..." or node not in point:
            raise Unparsed("no number") if node[1] == "..." else Undefined
        return point[node]
    if kind == "constant":
        constant = {"π": mp.pi, "e": mp.e, "i": mp.j, "∞": mp.inf}[args[0]]
        return checked(constant * mp.one, point)
    if kind == "call":
        return unknown(args[0], *(value(x, point) for x in args[1:]))
    if kind == "big":
        return big_value(*args, point)
    if kind in ("%", "°"):
        return value(("*", args[0], Fraction(1, 100) if kind == "%" else ("/", ("constant", "π"), 180)), point)
    if kind == "fn":
        kind, *args = args
    operation = OPERATIONS.get("/" if kind == "ratio" and len(args) == 2 else kind)
    if not operation and kind not in FUNCTIONS:
        raise Unparsed(f"no number: {kind}")
    values = [value(arg, point) for arg in args]
    if any(not exact(x) and mp.isinf(x) for x in values) and (kind != "*" or args[0] != -1):
        raise Undefined  # there is no calculating with infinity, but with its sign
    try:
        return checked(operation(point, *values) if operation else function(kind, point, *values), point)
    except (ZeroDivisionError, ValueError, TypeError):  # 1/0, tan at its pole, the factorial of -1, the floor of i
        raise Undefined from None


def magnitude(node) -> float:
    """Of an exponent, roughly, and at most a billion."""
    try:
        return 10 if variables(node) else float(min(abs(inexact(value(node, Point()))), 10**9))
    except Undefined:
        return 10


def digits(node) -> float:
    """How many digits are written in an expression, its powers multiplied out: it takes more to tell its value apart."""
    if exact(node):
        return 0.31 * size(node)
    inside = sum(map(digits, children(node)))
    if node[0] == "^":
        return digits(node[1]) * max(1, magnitude(node[2])) + digits(node[2]) + 1
    if node[:2] in (("fn", "!"), ("fn", "!!"), ("fn", "binom"), ("big", r"\sum"), ("big", r"\prod")):
        try:
            x = None if variables(node) else value(node, Point())
        except Undefined:
            x = None
        return inside + (0.31 * size(x) if exact(x) else 10 if node[0] == "fn" else MAX_ITEMS)
    if node[0] == "fn" and node[1] in ("exp", "sinh", "cosh", "tanh", "coth", "sech", "csch"):
        return inside + 1 + magnitude(node[2])
    return 0 if node == ("constant", "i") else 1 + inside


def digits_needed(*nodes) -> int:
    n = sum(map(digits, nodes))
    if not n <= MAX_DIGITS:
        raise Unparsed("too many digits")
    return 20 + math.ceil(n)


def close(x, y, n: int) -> bool:
    """Do they agree to n digits? Always relative to their size."""
    if exact(x) and exact(y):
        return x == y
    x, y = inexact(x), inexact(y)
    return x == y or (mp.isfinite(x) and mp.isfinite(y) and abs(x - y) <= mp.mpf(10) ** -n * max(abs(x), abs(y)))


def agree(a, b, point: Point) -> bool:
    """Are a and b equal at a point: exactly, or to many digits more than are written in them? Nothing is ever rounded to
    zero: what seems to be zero must shrink with the precision."""
    mp.dps = 30
    x, y = value(a, point), value(b, point)
    if exact(x) and exact(y):
        return x == y
    n, largest = digits_needed(a, b), mp.inf
    for mp.dps in (2 * n, 4 * n):
        x, y = inexact(value(a, point)), inexact(value(b, point))
        before, largest = largest, max(abs(x), abs(y))
        if close(x, y, n) or largest > mp.mpf(10) ** -n:
            return close(x, y, n)
    return largest < before * mp.mpf(10) ** -n


def equal(a, b) -> bool:
    """Are two expressions equal wherever both are defined? Raises Unparsed if one is no number, or too large."""
    names, unparsed = variables(a) | variables(b), None
    pieces = any(kind_of(n) == "fn" and n[1] in ("abs", "min", "max", r"\lfloor", r"\lceil") for n in walk(("+", a, b)))
    literals = {n for n in walk(("+", a, b)) if exact(n)} if pieces else set()
    for real in (True, False) if a != b else ():
        tried = 0
        for point in points(names, literals):
            point.real = real
            try:
                if not agree(a, b, point):
                    return False
            except Undefined:
                continue
            except Unparsed as problem:  # e^{e^x} is too large at some points only
                if not names:
                    raise
                unparsed = problem
                continue
            tried += 1
            if tried == (40 if pieces else 6) or not names:
                return True
        if tried >= 3:
            return True
    if unparsed:
        raise unparsed
    return a == b


def proportional(a, b, positive: bool = False) -> bool:
    """Is a = c b, for a constant c that is not 0 (or is positive)?"""
    if not variables(a) or not variables(b):
        return False
    quotients, n = [], digits_needed(a, b)
    mp.dps = 2 * n
    for point in points(variables(a) | variables(b)):
        try:
            x, y = value(a, point), value(b, point)
        except (Undefined, Unparsed):
            continue
        if x != 0 and y != 0:
            quotients.append(divide(point, x, y))
        if (x == 0) != (y == 0) or (quotients and not close(quotients[0], quotients[-1], n)):
            return False
        if len(quotients) == 6:
            break
    return len(quotients) >= 3 and (not positive or quotients[0] > 0)


# ------------------------------------------------------------------------------------------------ answers

MONTHS = "january february march april may june july august september october november december".split()
SYNONYMS = {
    "all real numbers": ("ℝ",), "all reals": ("ℝ",), "empty set": ("seq", r"\{\}"), "dne": ("text", "does not exist"),
    "no solutions": ("text", "no solution"),
}  # fmt: skip
CHOICE = re.compile(r"\(?([A-J])\)?")
OPTION = re.compile(r"(?:[Oo]ption |[Cc]hoice )?\(?([A-J])(?:\)|(?:\) *|[.:] +)(?!.*\b[A-J]\b)\S.*)?")  # (C) 12, C. 12
LONG_DECIMAL = re.compile(r"[-+]?(\d*)\.(\d+)", re.ASCII)


def clock_time(answer: str):
    """4:30 p.m. -> ("clock", minutes, seconds, "half" if it is known which half of the day)"""
    plain = TEXT.sub(r"\1", answer).replace(".", "").replace(" ", "").lower()
    match = re.fullmatch(r"(\d{1,2})(?::([0-5]\d)(?::([0-5]\d))?)?([ap]m|noon|midnight)?", plain, re.ASCII)
    if not match or not (match[2] or match[4]) or int(match[1]) > 24:
        return None
    hour, minute, second, half = match.groups()
    hour = int(hour) % 12 + 12 * (half in ("pm", "noon")) if half else int(hour)
    return ("clock", hour * 60 + int(minute or 0), int(second or 0), "half" if half else "")


def date(answer: str):
    """June 20, 2015 = 20 June 2015 = Jun. 20th, 2015"""
    words = re.sub(r"\\text|[{}.,^]|(?<=\d)(?:st|nd|rd|th)\b|\bof\b|\bthe\b", " ", answer).lower().split()
    months = [m for m in MONTHS for w in words if w == m or (len(w) in (3, 4) and m.startswith(w))]
    numbers = [int(w) for w in words if re.fullmatch(r"\d{1,4}", w, re.ASCII)]
    return ("date", *months, *numbers) if len(months) == 1 and len(numbers) + 1 == len(words) in (2, 3) else None


def based_number(answer: str):
    """101_2, 1A3_{16}, (101)_2, 101 base 2 -> ("based", digits, base)"""
    plain = TEXT.sub(r" \1 ", answer).strip()
    base = r"(?:_ ?\{? ?(?:base *)?|,? ?\(?(?:in )?base *)(\w+)\s*[})]{0,2}"
    match = re.fullmatch(rf"\{{?(-?)[({{]?([0-9A-Z.]+)[)}}]?\s*{base}", plain, re.ASCII)
    if not match or not re.search("[0-9]", match[2]):
        return None
    base = str(SMALL_NUMBERS.index(match[3])) if match[3] in SMALL_NUMBERS else match[3]
    return ("based", match[1] + match[2].lstrip("0"), base) if base.isdigit() else None


def choice(answer: str):
    r"""(A), A) and \text{(A)} are the choice A, as (II) and II are."""
    match = re.fullmatch(r"\(?([A-Z]|[IVX]+)\)|([IVX]{2,})", TEXT.sub(r"\1", answer).strip())
    return ("variable", match[1] or match[2]) if match else None


def text_node(text: str):
    """Lower case, without articles and the punctuation of prose. What may be mathematics stays: n! ways are not n ways."""
    text = re.sub(r"(?<=[a-z])-(?=[a-z]{2})|^ ?(?:an?|the|there (?:is|are)) ", " ", text.casefold())
    text = " ".join(re.sub(r"(?<=[a-z]{2})[.,'?!\"]+|\"", "", text).split())
    return SYNONYMS.get(text, ("text", text))


def phrase(answer: str, also: str = ""):
    """No solution -> ("text", "no solution"). With a word that is neither mathematics nor a product of variables."""
    words = re.findall(r"[a-zA-Z]+", answer)
    if all(map(is_product, words)) or not re.fullmatch(rf"[a-zA-Z .'\"!?{also}-]*", answer):
        return None
    if not also and any(word in FUNCTIONS or word in PLAIN_WORDS or word in ("and", "or") for word in words):
        return None
    return text_node(answer)


def parse_one(answer: str):
    for special in (clock_time, date, based_number, choice, phrase):
        if node := special(answer):
            return node
    try:
        return Parser(answer).answer()
    except Unparsed:
        if node := phrase(TEXT.sub(r" \1 ", answer), "0-9,()"):  # an address, and the like
            return node
        raise


@lru_cache(512)
def parse(answer: str):
    r"""The tree of a cleaned answer; one with \pm is the set of its values. Raises Unparsed.

    Several \pm are independent, but \pm and \mp take opposite signs."""
    count = answer.count("±") + answer.count("∓")
    if not count:
        return parse_one(answer)
    if count > 7 and "∓" not in answer:
        raise Unparsed("too many signs")
    values = []
    for signs in product("+-", repeat=1 if "∓" in answer else count):
        choice = iter(signs * count if "∓" in answer else signs)
        pieces = re.split("([±∓])", answer)
        pieces[1::2] = [sign if mark == "±" else "+-"[sign == "+"] for mark, sign in zip(pieces[1::2], choice)]
        node = parse_one("".join(pieces))
        values += node[2:] if is_list(node) else [node]
    return ("seq", r"\{\}", *values)


def split_unit(node):
    """(number, unit) of 5 cm, 20%, 30 degrees; the unit is "" where there is none."""
    if kind_of(node) in ("%", "°"):
        return node[1], node[0]
    if kind_of(node) == "unit":
        inner, unit = split_unit(node[1])
        return inner, " ".join(filter(None, (unit, node[2])))
    return node, ""


def is_rounded(a: str, b: str) -> bool:
    """Is a decimal of at least ten digits the rounded value of b, which is none itself? 1.41421356237 is sqrt(2)."""
    match = LONG_DECIMAL.fullmatch(a.rpartition("=")[2].strip())
    if not match or len((match[1] + match[2]).lstrip("0")) < 10 or plain_number(b) is not None:
        return False
    node, other = parse(a), parse(b)
    if kind_of(node) == kind_of(other) == "named" and node[1] != other[1]:
        return False
    node, other = (split_unit(n[2] if kind_of(n) == "named" else n)[0] for n in (node, other))
    mp.dps = 60 + len(a)
    try:
        y = value(other, Point())
        if not exact(node) or (exact(y) and 10**99 % y.denominator == 0):  # 1/8 needs no rounding
            return False
        x, y = mp.mpf(match[0]), inexact(y)
        long = len((match[1] + match[2]).lstrip("0")) in (16, 17)  # the double that Python prints is off in its last digit
        return mp.isfinite(y) and abs(x - y) <= max(mp.mpf(10) ** -len(match[2]) / 2, abs(y) * mp.mpf(2) ** -52 * long)
    except (Undefined, Unparsed):
        return False


def same_time(a, b) -> bool:
    if kind_of(a) == kind_of(b):
        known = a[3] == b[3] or any(not 60 <= n[1] < 780 for n in (a, b) if not n[3])  # 16:30 is in the afternoon
        return a[2] == b[2] and (a[1] == b[1] if known else a[1] % 720 == b[1] % 720)
    clock, other = (a, b) if kind_of(a) == "clock" else (b, a)  # 7:32 may be a ratio
    plain = kind_of(other) == "ratio" and clock[2] == 0 and not clock[3]
    return plain and same(("ratio", clock[1] // 60, clock[1] % 60), other)


def is_definition(named) -> bool:
    """f(x) = ... of one variable, but not x_1 = ..., f'(x) = ... or f^{-1}(x) = ..."""
    name = named[1]
    return kind_of(name) == "call" and len(name) == 3 and name[1].isalpha() and kind_of(name[2]) == "variable"


def difference(left, right):
    return plus(split_unit(left)[0], times(-1, split_unit(right)[0]))


def same_equation(a, b) -> bool:
    """x = 5 is 5, but not y = 5; f(x) = 2x is y = 2x; y = 2x is the equation 4x - 2y = 0."""
    if kind_of(a) != "named":
        a, b = b, a
    if kind_of(a) == "named":
        _, name, content = a
        if kind_of(b) not in ("named", "equation"):
            return same(content, b)
        if kind_of(b) == "named":
            if is_definition(a) and is_definition(b) and name[1] == b[1][1]:
                b = substitute(b, b[1][2], name[2])  # f(x) = 2x is f(n) = 2n
            if name == b[1]:
                return same(content, b[2])
            if not (variables(content) and variables(b[2])):
                return False
            others = [kind_of(y[1]) for x, y in ((a, b), (b, a)) if is_definition(x)]
            if "variable" in others and not {name, b[1]} & variables(content) and same(content, b[2]):
                return True
    elif kind_of(a) != kind_of(b):  # (x+1)^2 = x^2+2x+1 is as good as its right side, but x+y = 5 is not 5
        equation, other = (a, b) if kind_of(a) == "equation" else (b, a)
        return kind_of(other) in ("number", "+", "*", "^", "/") and equal(*equation[1:]) and same(equation[2], other)
    if any(kind_of(side) in ("seq", "matrix", "text", "order") for side in a[1:] + b[1:]):
        return False
    units_a, units_b = ({split_unit(side)[1] for side in node[1:]} - {""} for node in (a, b))
    if units_a and units_b and units_a != units_b:
        return False
    return proportional(difference(*a[1:]), difference(*b[1:]))


def same_item(x, y) -> bool:
    """{{1}} is not {1}, although the answer {1} is as good as 1."""
    return is_list(x, r"\{\}") == is_list(y, r"\{\}") and same(x, y)


def matched(items_a, items_b) -> bool:
    rest = list(items_b)
    for x in items_a:
        found = next((i for i, y in enumerate(rest) if same_item(x, y)), None)
        if found is None:
            return False
        del rest[found]
    return True


def shared_name(node):
    """The x of "x = 1, 2"."""
    first, *rest = node[2:] if is_list(node, "") else (node,)
    return first[1] if kind_of(first) == "named" and rest and all(kind_of(item) != "named" for item in rest) else None


def elements(node) -> list | None:
    if not is_list(node):
        return None if kind_of(node) in ("seq", "matrix", "equation", "text") else [node]
    return [item[2] if shared_name(node) and kind_of(item) == "named" else item for item in node[2:]]


def unique(items: list) -> list:
    kept = []
    for x in items:
        if not any(same(x, y) for y in kept):
            kept.append(x)
    return kept


def same_list(a, b) -> bool:
    """Unordered, and a set is as good as a list; but x = 1, y = 2 go by their names, or by their order if the other side
    has none, and what stands in round brackets is ordered."""
    for x, y in ((a, b), (b, a)):
        named = [kind_of(item) == "named" for item in children(y)] if kind_of(y) == "seq" else []
        if is_list(x, "") and named and all(kind_of(item) == "named" for item in x[2:]):
            names = [item[1] for item in x[2:]]
            names = {n[1] if n[0] == "call" and n[1][-1] == "_" else n for n in names}  # x_1 = 2, x_2 = 3 are values of x
            if 1 < len(names) == len(x) - 2 and not any(named):
                if y[1] not in ("", "()"):
                    return False
                items = sorted(x[2:], key=lambda item: str(item[1])) if y[1] else x[2:]  # y=2, x=1 is the point (1,2)
                return len(x) == len(y) and all(map(same, (item[2] for item in items), y[2:]))
            if all(named):  # (x, y) = (1, 2)
                return len(x) == len(y) and matched(x[2:], y[2:])
        if kind_of(x) == "named" and is_list(x[2]):
            return same(x[2], y)
    for x, y in ((a, b), (b, a)):
        if shared_name(x) and len({item[1] for item in children(y) if kind_of(item) == "named"}) > 1:
            return False
    items_a, items_b = elements(a), elements(b)
    if items_a is None or items_b is None or (shared_name(a) and shared_name(b) and shared_name(a) != shared_name(b)):
        return False
    sets = is_list(a, *UNORDERED[1:]) or is_list(b, *UNORDERED[1:])
    if sets or all(kind_of(x) == "seq" for x in items_a):  # but 2, 2, 3 is not 2, 3
        items_a, items_b = unique(items_a), unique(items_b)
    return len(items_a) == len(items_b) and matched(items_a, items_b)


def roots(left, right, name) -> list:
    """Where left = right, both linear in the name, or in absolute values, of which either sign may be right."""
    if {left, right} & {("constant", "∞"), ("*", -1, ("constant", "∞"))}:
        return []
    gaps = [substitute(difference(left, right), name, X)]
    while absolute := [n for gap in gaps for n in walk(gap) if kind_of(n) == "fn" and n[1] == "abs" and X in walk(n)]:
        gaps = [substitute(gap, absolute[0], times(sign, absolute[0][2])) for gap in gaps for sign in (1, -1)]
        if len(gaps) > 8:
            raise Undefined
    found = []
    for gap in gaps:
        at = {x: inexact(value(gap, Point({X: x}))) for x in (0, 1, 2, Fraction(10**7, 7), -Fraction(10**7, 9))}
        slope = at[1] - at[0]
        if slope == 0 and len(gaps) > 1:
            continue
        if slope == 0 or not all(close(at[0] + slope * inexact(x), y, mp.dps // 2) for x, y in at.items() if x > 1 or x < 0):
            raise Undefined
        found.append(-at[0] / slope)
    return found


def in_order(x, sign: str, y) -> bool:
    if close(x, y, mp.dps // 2):
        return sign in "≤≥"
    return sign == "≠" or (x < y) == (sign in "<≤")


def real_set(node, about: dict):
    """Of a set of real numbers the ends of its intervals (maybe some more points), and a function: is a number in it?

    Says which names and units it is about. Raises Undefined if it is no such set: inequalities must be linear in one
    variable, or in absolute values of it."""
    kind = kind_of(node)
    if kind == "named":
        about["name"].add(node[1])
        return real_set(node[2], about)
    if kind in ("∪", "∩", "∖", "ℝ"):
        parts = [real_set(child, about) for child in node[1:]]
        decide = {"∪": any, "∖": lambda inside: inside[0] and not any(inside[1:])}.get(kind, all)  # of ℝ there are no parts
        return [x for ends, _ in parts for x in ends], lambda x: decide([holds(x) for _, holds in parts])
    found, interval = names_in(node), is_list(node, *INTERVALS) and len(node) == 4
    if not (is_list(node) or interval or (kind == "order" and len(found) == 1)):
        raise Undefined
    sides, units = zip(*map(split_unit, children(node))) if children(node) else ((), ())
    about["unit"].update(filter(None, units))
    if kind == "order":
        about["name"].update(found - {BOUND})
        ends = [x for left, right in zip(sides, sides[1:]) for x in roots(left, right, *found)]

        def holds(x):
            values = [inexact(value(substitute(side, *found, X), Point({X: x}))) for side in sides]
            return all(map(in_order, values, node[2::2], values[1:]))

        return ends, holds
    try:
        ends = [inexact(value(side, Point())) for side in sides]
    except Unparsed:
        raise Undefined from None
    if not interval:
        return ends, lambda x: any(close(end, x, mp.dps // 2) for end in ends)
    empty = not (ends[0] < ends[1] or (ends[0] == ends[1] and node[1] == "[]"))
    if empty or any(mp.isinf(x) and bracket in "[]" for x, bracket in zip(ends, node[1])):  # (2,2) is a point
        raise Undefined
    low, high = ("≤" if bracket in "[]" else "<" for bracket in node[1])
    return ends, lambda x: in_order(ends[0], low, x) and in_order(x, high, ends[1])


def upward(order):
    """The members of a chain of inequalities, and its signs, from the smaller to the larger end."""
    members, signs = order[1::2], list(order[2::2])
    if set(signs) <= {">", "≥"}:
        return members[::-1], [{">": "<", "≥": "≤"}[sign] for sign in signs[::-1]]
    return members, signs


def same_parts(a, b) -> bool:
    """Intervals and inequalities whose ends are no numbers: the same part by part, or up to a positive factor."""
    kind = kind_of(a)
    if kind != kind_of(b) or kind == "seq":
        return kind == kind_of(b) and a[1] == b[1] and len(a) == len(b) and all(map(same, a[2:], b[2:]))
    if kind != "order":
        return kind in ("∪", "∩") and len(a) == len(b) and matched(a[1:], b[1:])
    (members_a, signs_a), (members_b, signs_b) = upward(a), upward(b)
    if signs_a != signs_b:
        return False
    if all(map(equal, members_a, members_b)):
        return True
    return len(signs_a) == 1 and proportional(difference(*members_a), difference(*members_b), positive=signs_a != ["≠"])


def same_set(a, b) -> bool:
    """Intervals, unions and inequalities are equal if they agree at all of their ends and anywhere between them."""
    about_a, about_b = ({"name": set(), "unit": set()} for _ in range(2))
    mp.dps = 2 * digits_needed(a, b)
    try:
        (ends_a, in_a), (ends_b, in_b) = real_set(a, about_a), real_set(b, about_b)
    except Undefined:
        return same_parts(a, b)
    for found_a, found_b in zip(about_a.values(), about_b.values()):
        if max(len(found_a), len(found_b)) > 1:
            return same_parts(a, b)
        if found_a and found_b and found_a != found_b:
            return False
    ends = sorted(x for x in {*ends_a, *ends_b} if mp.isfinite(x))
    probes = [ends[0] - 1, *ends, *((x + y) / 2 for x, y in zip(ends, ends[1:])), ends[-1] + 1] if ends else [mp.mpf(0)]
    return all(in_a(x) == in_b(x) for x in probes)


def same(a, b) -> bool:
    """Are two trees the same answer? Symmetric. Raises Unparsed where it takes numbers, and one is none."""
    if a == b:
        return True
    kinds = {kind_of(a), kind_of(b)}
    if kinds & {"order", "∪", "∩", "∖", "ℝ"} or any(is_list(n, *INTERVALS[1:]) and len(n) == 4 for n in (a, b)):
        return same_set(a, b)
    if (is_list(a) or is_list(b)) and not (kinds == {"seq"} and {a[1], b[1]} == {"{}", "()"}):
        return same_list(a, b)
    if kinds & {"named", "equation"}:
        return same_equation(a, b)
    if kinds & {"seq", "matrix"}:
        shapes = len(kinds) == 1 and len(a) == len(b) and (a[1] == b[1] or kinds == {"seq"} and {a[1], b[1]} == {"{}", "()"})
        return shapes and all(map(same_item, a[2:], b[2:]))
    if "clock" in kinds:
        return same_time(a, b)
    if kinds == {"ratio"} and len(a) == len(b) > 3:
        pairs = list(zip(a[1:], b[1:]))
        proportion = all(equal(("*", x, v), ("*", y, u)) for i, (x, y) in enumerate(pairs) for u, v in pairs[:i])
        return proportion and not any(all(equal(x, 0) for x in node[1:]) for node in (a, b))
    if kinds & {"text", "date", "based"}:
        return False
    (x, unit_x), (y, unit_y) = split_unit(a), split_unit(b)
    if unit_x and unit_y and unit_x != unit_y:
        return False
    if equal(x, y):
        return True
    if any(kind_of(n) == "+" and "°" in map(kind_of, n) for n in (x, y)):  # 180° - x is 180 - x
        return same(*(plus(*(split_unit(term)[0] for term in n[1:])) if kind_of(n) == "+" else n for n in (x, y)))
    if unit_x == unit_y or "%" not in (unit_x, unit_y):
        return False
    return equal(("%", x), y) if unit_x == "%" else equal(x, ("%", y))  # 20% is 20 or 1/5; 20 is never 1/5


def compare(a: str, b: str) -> bool:
    """Are two cleaned answers the same? Raises Unparsed. This can take long, and much memory: `Worker` bounds both."""
    for x, y in ((a, b), (b, a)):
        if (letter := CHOICE.fullmatch(TEXT.sub(r"\1", x))) and (option := OPTION.fullmatch(TEXT.sub(r"\1", y))):
            return letter[1] == option[1]
    return same(parse(a), parse(b)) or is_rounded(a, b) or is_rounded(b, a)


# ------------------------------------------------------------------------------------------------ worker


def serve():
    """The worker process: two answers as a line of JSON in, one byte out, until the parent closes the pipe or is gone.

    The parent kills it when its time is over. A limit of processor time ends it, by the kernel's hand, if the parent dies
    meanwhile; without such limits (on Windows) faulthandler does, whose watchdog is a thread that needs no interpreter."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    except (ImportError, ValueError, OSError):
        resource = None
    nowhere = open(os.devnull, "w")
    os.write(1, b".")  # ready
    for line in sys.stdin.buffer:
        if resource:
            seconds = int(time.process_time() + TIME_LIMIT) + 1
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        else:
            faulthandler.dump_traceback_later(TIME_LIMIT, exit=True, file=nowhere)
        try:
            reply = b"=" if compare(*json.loads(line)) else b"!"
        except MemoryError:
            os._exit(1)
        except Exception:  # Unparsed, Undefined, RecursionError; any other is a mistake of this file, and no match
            reply = b"?"
        os.write(1, reply)
        faulthandler.cancel_dump_traceback_later()


class Worker:
    """The process behind `verdict`: started on first need, after a kill, and anew in a process that was forked. Threads take
    turns. It lives as long as its standard input is open: when its parent ends, however that happens, it does, too."""

    def __init__(self):
        self.process, self.started, self.lock = None, False, threading.Lock()

    def ask(self, a: str, b: str) -> str:
        with self.lock:
            for _ in range(2):
                if self.process is None:
                    self.start()
                line = json.dumps([a, b]).encode() + b"\n"
                try:
                    while line:
                        line = line[self.process.stdin.write(line) :]
                    reply = self.read(TIME_LIMIT)
                    break
                except BrokenPipeError:  # it was killed between two calls, which is not these answers' fault
                    self.stop()
                    reply = b""
            if not reply:
                self.stop()
                self.start()  # now, so that the next call need not wait for it
        return {b"=": "match", b"!": "mismatch", b"?": "unparsed"}.get(reply, "timed out")

    def read(self, seconds: float) -> bytes:
        """One byte, b"" if the worker is dead or the time over. Its first byte says that it has started."""
        if not self.started:
            self.started = True
            if self.read(STARTING_LIMIT) != b".":
                return b""
        if hasattr(select, "poll"):
            spent, poll, end = self.busy(), select.poll(), time.monotonic() + min(20 * seconds, STARTING_LIMIT)
            poll.register(self.process.stdout, select.POLLIN)
            ready = poll.poll(1000 * seconds)
            # where the processors are busy with others, the worker still has its share of their time to come
            while not ready and self.busy() - spent < seconds and time.monotonic() < end:
                ready = poll.poll(50)
            if not ready:
                return b""
        return self.process.stdout.read(1)

    def busy(self) -> float:
        """Processor time of the worker, where the system tells it (Linux)."""
        try:
            with open(f"/proc/{self.process.pid}/stat") as file:
                user, system = file.read().rsplit(")", 1)[1].split()[11:13]
            return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError):
            return math.inf

    def start(self):
        self.started = False
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


def verdict(gold: str, text: str) -> Verdict:
    r"""Is the final answer of the response `text` the one of `gold`, a bare answer or a reference solution?

    Symmetric for bare answers; "match" only if the two are certainly equal. verdict("0.5", r"So \boxed{\frac12}").
    Of boxes joined by "and" the last one alone may match, too: data sets such as MATH keep only that of a solution."""
    a, b = marked_answer(gold) or gold.strip(), extract(text)
    kind = "match" if a and text in (gold, a) else judge(a, b)
    if b is None and len(text) <= 80 and judge(a, text.strip()) == "match":
        return Verdict("match", a, text.strip())
    if kind in ("mismatch", "unparsed") and b and ", " in b:
        last = boxed_answer(text[-MAX_TEXT:], joined=False)
        if last and last != b and judge(a, last) == "match":
            return Verdict("match", a, last)
    return Verdict(kind, a, b)


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
