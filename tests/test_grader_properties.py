r"""Random answers in random notation: forms of the same value match both ways, a value changed in one place never does.

`draw(kind, seed)` returns two lists of strings, answers that mean the same and answers that differ from them. Of a kind
in FAMILIES a random sympy expression is made (`expression`), printed in several ways (`forms`) and changed in one place
(`perturbed`), where 50 digits at random points prove the difference. The kinds in TYPES are lists, intervals, matrices,
percents and the like. Left out on purpose: branch quarrels (\sqrt{x^2} against x, \ln ab), and what people read in two ways
(\sin(x)(x+1), 5e+3, 3\frac{1}{2} for a product).

Run `python -m pytest tests/test_grader_properties.py`; for more draws, `python tests/bench_grader.py --draws 10000`.
"""

import random
import re
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
import sympy as sp

sys.path.insert(0, str(Path(__file__).parents[1]))
from grader import grade

DRAWS = 7  # of each kind
LETTERS = ("x", "t", "n", "z", "xy", "ab", "nk")  # of one expression; no two spell a word, a constant or a unit

# ------------------------------------------------------------------------------------------------ random expressions


def integer(rng, most=9):
    """A small integer other than 0."""
    return rng.choice((-1, 1)) * sp.Integer(rng.randint(1, most))


def rational(rng):
    return integer(rng, 20) / rng.choice((1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 12, 25))


def root(rng, index=2):
    return sp.root(sp.Integer(rng.choice((2, 3, 5, 6, 7, 10, 11))), index)


def families(rng, x, y):
    """Generators of random expressions in x and y, which may be the same symbol."""
    pick, upto = lambda *options: rng.choice(options), lambda n: rng.randint(0, n)
    q, k, linear = lambda: rational(rng), lambda: integer(rng), lambda x: integer(rng) * x + integer(rng)
    wave = lambda x: pick(sp.sin, sp.cos, sp.tan)(x * pick(1, 1, 2, 3))
    polynomial = lambda n: sum(q() * x ** upto(3) * y ** pick(0, 0, 1) for _ in range(n))
    return {
        "rational": q,
        "polynomial": lambda: polynomial(3),
        "product": lambda: q() * linear(x) * linear(y) ** pick(1, 2),
        "rational function": lambda: polynomial(2) / linear(x) + q() / y,
        "radical": lambda: (q() + k() * root(rng)) / pick(1, 3, root(rng), 4 + root(rng)),
        "higher root": lambda: q() + q() * root(rng, pick(3, 4)) ** pick(1, 2),
        "nested radical": lambda: pick(-1, 2, 3) * sp.sqrt(sp.expand((1 + upto(2) + root(rng)) ** 2) + pick(0, 0, 1)),
        "root of x": lambda: q() * sp.sqrt(x ** pick(1, 2) + upto(5)) / y ** upto(1),
        "power": lambda: k() * sp.Integer(2 + upto(3)) ** linear(x) + q() / y ** pick(1, 2, 3),
        "pi and e": lambda: q() * pick(sp.pi, sp.pi**2, sp.E, sp.pi * root(rng)) + upto(1) * q(),
        "trigonometry": lambda: q() * wave(x) ** pick(1, 2) + pick(y, 1, wave(y)),
        "exponential": lambda: q() * y * sp.exp(pick(-2, -1, 1, 2, 3) * x + upto(2)) + q(),
        "logarithm": lambda: q() * sp.log(pick(2, 3, 5, 10, x)) + pick(q(), y),
        "complex": lambda: (q() + k() * sp.I) * (k() + pick(1, root(rng)) * sp.I) ** pick(-1, 1, 2),
        "absolute value": lambda: q() * sp.Abs(linear(x)) + pick(y, q()),
        "factorial": lambda: q() * sp.factorial(3 + upto(5), evaluate=False) + upto(1) * k(),
        "binomial": lambda: q() * sp.binomial(5 + upto(4), 2 + upto(2), evaluate=False) + upto(1) * k(),
    }


FAMILIES = list(families(random, *sp.symbols("x y")))


PRINTED = (sp.sin, sp.cos, sp.tan, sp.cot, sp.log, sp.exp, sp.Abs)


def sound(e):
    """Is it finite, not 0, short, and of printable functions? A factorial that was changed might be of 2/5, and (-2)^n is
    defined at integers only, where (-2)^{6n} is 2^{6n}."""
    printable = all(f.func in PRINTED or all(n.is_Integer and n > 0 for n in f.args) for f in e.atoms(sp.Function))
    if any(power.base.is_negative and power.exp.free_symbols for power in e.atoms(sp.Pow)):
        return False
    return printable and not e.has(sp.nan, sp.zoo, sp.oo) and e != 0 and len(sp.latex(e)) < 160


def expression(rng, family=None):
    """A random expression, of a random family if none is given."""
    while True:
        letters = sp.symbols(list(rng.choice(LETTERS)))
        e = sp.sympify(families(rng, letters[0], letters[-1])[family or rng.choice(FAMILIES)]())
        if sound(e):
            return e


REWRITES = (sp.expand, sp.factor, sp.together, sp.apart, sp.radsimp, sp.sqrtdenest, sp.expand_trig, sp.expand_complex)
REWRITES += (lambda e: e.rewrite(sp.cos) if e.has(sp.sin, sp.tan) else e, sp.factor_terms, lambda e: e.doit())


def rewritten(e, rng):
    """The same value as another expression."""
    rewrite = rng.choice(REWRITES)
    if rewrite is sp.expand_complex and (e.free_symbols or e.is_real):
        return e  # it would write x as re(x) + i im(x)
    try:
        other = rewrite(e)
    except (sp.PolynomialError, NotImplementedError, ValueError):  # apart of two variables, and the like
        return e
    return other if sound(other) else e


def at_random_point(e, rng):
    """The value at a point to 50 digits, None where it is not a number. Equal generators give equal points."""
    point = {letter: sp.Rational(rng.randint(-300, 300), 101) for letter in "abkntxyz"}
    value = sp.N(e.subs({symbol: point[symbol.name] for symbol in e.free_symbols}), 50)
    return value if value.is_number and value.is_finite else None


def differ(e, other, rng):
    """Are the values certainly different, at one of three points at least?"""
    for seed in (rng.random(), rng.random(), rng.random()):
        x, y = at_random_point(e, random.Random(seed)), at_random_point(other, random.Random(seed))
        if x is not None and y is not None and abs(x - y) > sp.Float("1e-9") * (abs(x) + abs(y)):
            return True
    return False


def perturbed(e, rng):
    """The expression with one small change, certainly of another value."""
    swaps = {sp.sin: sp.cos, sp.cos: sp.sin, sp.tan: sp.cot, sp.log: sp.sqrt, sp.exp: sp.sin, sp.Abs: lambda x: x}
    while True:
        node = rng.choice(sorted(set(sp.preorder_traversal(e)), key=sp.default_sort_key))
        new = [-node, 2 * node, node**2]
        if node.is_Rational:
            new = [node + 1, node - 1, -node, 2 * node, node / 10]
        elif node.is_Add or node.is_Mul:
            part = rng.choice(sorted(node.args, key=sp.default_sort_key))
            rest = node.func(*(a for a in node.args if a is not part))
            new = [rest, node.func(rest, -part), node.func(rest, 2 * part)]
        elif node.is_Pow:
            new = [node.base, node.base ** (node.exp + 1), node.base ** (node.exp * sp.Rational(2, 3)), -node]
        elif node.func in swaps:
            new = [swaps[node.func](*node.args)]
        other = e.xreplace({node: rng.choice(new)})
        if sound(other) and differ(e, other, rng):
            return other


# ------------------------------------------------------------------------------------------------ random notation

SUM, SIGNED, PRODUCT, BARE, POWER, ATOM = range(6)  # how tightly a text binds: a+b, -a, a/b, \sin x, a^b, a
NAMES = {sp.pi: r"\pi", sp.E: "e", sp.I: "i"}
FUNCTIONS = {sp.sin: r"\sin", sp.cos: r"\cos", sp.tan: r"\tan", sp.cot: r"\cot", sp.log: r"\ln"}


def inside(e, rng, least):
    """The text of an operand, in brackets if it binds less tightly than it must."""
    text, level = spell(e, rng)
    return text if level >= least else rng.choice(("(%s)", r"\left(%s\right)", r"\left( %s \right)")) % text


def times(left, right, rng):
    if right[0] in "0123456789.-" or (left[-1].isdigit() and re.match(r"\\[dt]?frac|e", right)):
        return left + rng.choice((r" \cdot ", r" \times ")) + right
    return left + rng.choice((" ", " ", r"\,", r" \cdot ", "" if not re.search(r"\\[a-z]+$", left) else " ")) + right


def number(q, rng):
    """An exact rational: integer, fraction or decimal."""
    if q < 0:
        if not q.is_Integer and rng.random() < 0.3:
            return rf"\frac{{{q.p}}}{{{q.q}}}", POWER
        return "-" + number(-q, rng)[0], SIGNED
    if q.is_Integer:
        return str(q), ATOM
    decimal = f"{float(q):.6f}".rstrip("0")
    if Fraction(decimal) == Fraction(q.p, q.q) and rng.random() < 0.4:
        return decimal, ATOM
    k = rng.choice((1, 1, 1, 2, 3))
    return rng.choice(((rf"\frac{{{k * q.p}}}{{{k * q.q}}}", POWER), (f"{k * q.p}/{k * q.q}", PRODUCT)))


def product(factors, rng):
    """Functions last, so that none swallows a factor; \\sin x without brackets only at the end."""
    last = lambda f: (not f.is_Rational, f.as_base_exp()[0].func in FUNCTIONS)
    factors = sorted(rng.sample(factors, len(factors)), key=last)
    text = inside(factors[0], rng, POWER)
    for i, factor in enumerate(factors[1:], 2):
        text = times(text, inside(factor, rng, BARE if i == len(factors) else POWER), rng)
    return text, PRODUCT


def spell(e, rng):
    """LaTeX of an expression, with a random choice of notation and order at each node, and how tightly it binds."""
    if e.is_Rational:
        return number(e, rng)
    if e.is_Symbol or e in NAMES:
        return NAMES.get(e, str(e)), ATOM
    args = sorted(e.args, key=sp.default_sort_key)
    if e.is_Add:
        terms = [inside(a, rng, SIGNED) for a in rng.sample(args, len(args))]
        return re.sub(r"\+ ?-", "-", rng.choice(("+", " + ")).join(terms)), SUM
    if e.is_Mul and e.as_coeff_Mul()[0].is_negative:
        return "-" + inside(-e, rng, PRODUCT), SIGNED
    if e.is_Mul or e.is_Pow or e.func == sp.exp:
        base, exponent = e.as_base_exp()
        top, bottom = (sp.S.One, base**-exponent) if exponent.could_extract_minus_sign() else sp.fraction(e)
        if bottom != 1 and rng.random() < 0.7:
            if rng.random() < 0.3:
                return f"{inside(top, rng, POWER)}/{inside(bottom, rng, ATOM)}", PRODUCT
            return rf"\frac{{{spell(top, rng)[0]}}}{{{spell(bottom, rng)[0]}}}", POWER
        if e.is_Mul:
            return product(args, rng)
        if base.func in FUNCTIONS and exponent.is_Integer and exponent > 0 and rng.random() < 0.7:
            name = f"{FUNCTIONS[base.func]}^{{{exponent}}}"
            return rf"{name}{inside(base.args[0], rng, ATOM + 1)}", POWER
        if exponent.is_Rational and exponent.p == 1 and rng.random() < 0.8:
            index = "" if exponent.q == 2 else f"[{exponent.q}]"
            return rf"\sqrt{index}{{{spell(base, rng)[0]}}}", POWER
        upper = spell(exponent, rng)[0]
        if exponent.is_Rational and exponent.q > 1:  # in lowest terms: x^{2/4} might be the fourth root of x^2
            upper = rng.choice(("%s/%s", r"\frac{%s}{%s}")) % (exponent.p, exponent.q)
        return f"{inside(base, rng, ATOM)}^{{{upper}}}", POWER
    if e.func in FUNCTIONS:
        x = e.args[0]
        if re.fullmatch(r"[0-9]*\*?[a-z]?", str(x)) and rng.random() < 0.5:
            return f"{FUNCTIONS[e.func]} {str(x).replace('*', '')}", BARE
        return FUNCTIONS[e.func] + inside(x, rng, ATOM + 1), POWER
    text = spell(e.args[0], rng)[0]
    if e.func == sp.factorial:
        return text + "!", POWER
    if e.func == sp.binomial:
        return rng.choice((r"\binom{%s}{%s}", r"\dbinom{%s}{%s}", r"{%s \choose %s}")) % e.args, POWER
    assert e.func == sp.Abs, e
    return rng.choice((r"\left|%s\right|", "|%s|", r"\lvert %s \rvert")) % text, ATOM


RESPELL = [  # (pattern, replacement, share of the forms in which it is applied); 5 e + 3 stays, 5e+3 is 5000
    (r"\\frac", r"\\dfrac", 0.2),
    (r"\\frac", r"\\tfrac", 0.1),
    (r"(\\[dt]?frac)\{([0-9])\}\{([0-9])\}(?! ?[0-9])", r"\1\2\3", 0.4),
    (r"(\\[dt]?frac)\{([0-9])\}\{", r"\1\2{", 0.1),
    (r"\^\{([0-9a-z])\}(?! ?[0-9a-z])", r"^\1", 0.6),
    (r"\\sqrt\{([0-9])\}(?! ?[0-9])", r"\\sqrt\1", 0.4),
    (r"\\sqrt\{([a-z])\}", r"\\sqrt \1", 0.3),
    (r"\\(left|right)(?=[()])", "", 0.3),
    (r"(?<!e) ([-+]) ", r"\1", 0.4),
    (r"(?<!e) ([-+]) ", r" \\, \1 \\; ", 0.1),
    (r"(?<=[0-9]) (?=[a-df-z])", "", 0.5),
    (r"(?<=[0-9]) (?=\\(?:pi|sqrt|left|sin|cos|tan))", "", 0.5),
    ("-", "−", 0.05),
    (r"\\cdot", "·", 0.05),
    (r"\\pi(?![a-z])", "π", 0.05),
]


def respelled(text, rng):
    for pattern, replacement, share in RESPELL:
        if rng.random() < share:
            text = re.sub(pattern, replacement, text)
    return text


def plain(e):
    """As on a keyboard: sqrt(2)*x^2/3."""
    text = str(e).replace("**", "^").replace("log", "ln").replace("exp(", "e^(")
    return re.sub(r"\bI\b", "i", re.sub(r"\bE\b", "e", text))


def form(e, rng):
    """One string that means e."""
    e, style = rewritten(e, rng), rng.random()
    if style < 0.6 or e.has(sp.factorial, sp.binomial):
        return respelled(spell(e, rng)[0], rng)
    if style < 0.7 and not e.has(sp.Abs):
        return plain(e)
    options = {"fold_frac_powers": rng.random() < 0.3, "root_notation": rng.random() < 0.8}
    options |= {"mul_symbol": rng.choice((None, None, "times", "dot")), "order": rng.choice(("lex", "rev-lex"))}
    if not e.free_symbols and not e.has(sp.log):  # else x / 2 z stands for x/(2z)
        options["fold_short_frac"] = rng.random() < 0.3
    return respelled(sp.latex(e, ln_notation=True, **options), rng)


def forms(e, rng, n=3):
    """n strings that mean e: of an irrational number now and then its correct rounding, else sometimes "x = ..."."""
    texts = [form(e, rng) for _ in range(n)]
    symbols = {s.name for s in e.free_symbols}
    if not symbols and e.is_irrational and rng.random() < 0.2 and 0.001 < abs(e) < 10**6:
        texts[-1] = f"{Decimal(str(sp.N(e, 40))):.{rng.randint(10, 15)}g}"
    elif rng.random() < 0.2:
        texts[-1] = rng.choice(("f(x) = ", "y = ") if symbols == {"x"} else ("S = ",) if symbols else ("x = ",)) + texts[-1]
    return texts


# ------------------------------------------------------------------------------------------------ other types of answer


def values(rng, n):
    """n different numbers, in ascending order."""
    found = {rational(rng) * rng.choice((1, 1, 1, 1, root(rng))) for _ in range(n)}
    return sorted(found) if len(found) == n else values(rng, n)


def show(items, rng, style="%s"):
    """The items in random notation, joined by commas."""
    return style % ", ".join(respelled(spell(sp.sympify(e), rng)[0], rng) for e in items)


def changed(items, rng):
    """One item replaced by a number that is not among them."""
    i = rng.randrange(len(items))
    return [*items[:i], next(items[i] + k for k in range(1, 9) if items[i] + k not in items), *items[i + 1 :]]


LISTS = ("%s", r"\{%s\}", r"\left\{ %s \right\}")
TUPLES = ("(%s)", r"\left(%s\right)", r"\left( %s \right)")


def lists(rng):
    """Lists and sets are the same, in any order."""
    items = values(rng, rng.randint(2, 4))
    same = [show(rng.sample(items, len(items)), rng, style) for style in LISTS]
    if len(items) == 2:
        same += [" or ".join(f"x = {show([e], rng)}" for e in items), r" \text{ and } ".join(show([e], rng) for e in items)]
    return same, [show(changed(items, rng), rng, LISTS[1]), show(items[1:], rng), show(items, rng, TUPLES[0])]


def tuples(rng):
    items = values(rng, rng.randint(2, 4))
    different = [items[::-1], changed(items, rng), items[1:]]
    return [show(items, rng, style) for style in TUPLES], [
        *(show(other, rng, TUPLES[0]) for other in different),
        show(items, rng, rng.choice(LISTS)),
    ]


def points(rng):
    a, b, c, d = values(rng, 4)
    pairs = lambda *pairs: ", ".join(show(pair, rng, rng.choice(TUPLES)) for pair in pairs)
    different = [pairs((d, a), (b, c)), pairs((a, c), (b, d)), pairs((a, d, b, c))]
    return [pairs((a, d), (b, c)), pairs((b, c), (a, d))], different


def assignments(rng):
    a, b, c = (show([e], rng) for e in values(rng, 3))
    same = [f"x = {a}, y = {b}", f"y={b}, x={a}", rf"y = {b} \text{{ and }} x = {a}"]
    return same, [f"x = {b}, y = {a}", f"x={a}, y={c}", f"x = {a}"]


FLIP = str.maketrans("()[]", "[]()")


def interval(low, high, kinds, rng):
    """An interval with brackets, and as an inequality."""
    a, b = (r"-\infty" if low == -sp.oo else show([low], rng)), (r"\infty" if high == sp.oo else show([high], rng))
    left, right = (rng.choice((r" \le ", r" \leq ", "≤", " <= ") if kind in "[]" else (" < ", "<")) for kind in kinds)
    chain = ("" if low == -sp.oo else a + left) + "x" + ("" if high == sp.oo else right + b)
    if low == -sp.oo or high == sp.oo:  # x < 3 or 3 > x
        reverse = r" \ge " if set(kinds) & set("[]") else " > "
        chain = rng.choice((chain, f"{b}{reverse}x" if low == -sp.oo else f"x{reverse}{a}"))
    return rng.choice((f"{kinds[0]}{a}, {b}{kinds[1]}", f"\\left{kinds[0]} {a}, {b} \\right{kinds[1]}")), chain


def intervals(rng):
    """One interval, or the union of two that do not meet, in any order."""
    a, b, c, d = values(rng, 4)
    pieces = [(rng.choice((a, a, -sp.oo)), b), (c, rng.choice((d, d, sp.oo)))]
    bracket = lambda end, kinds: rng.choice(kinds) if end.is_finite else kinds[0]
    pieces = [(low, high, bracket(low, "([") + bracket(high, ")]")) for low, high in pieces]
    pieces = rng.choice((pieces, pieces[:1], pieces[1:]))
    low, high, (left, right) = pieces[0]  # its right end is finite, or its left
    flipped = (low, high, left + right.translate(FLIP) if high.is_finite else left.translate(FLIP) + right)
    longer = (low - 1, high, left + right) if low.is_finite else (low, high - 1, left + right)
    other = (-sp.oo, low, "()") if high == sp.oo else (high, sp.oo, "()") if low == -sp.oo else longer

    def both(*pieces):
        brackets, chains = zip(*(interval(*piece, rng) for piece in rng.sample(pieces, len(pieces))))
        x = rng.choice(("", r"x \in "))
        return [x + rng.choice((r" \cup ", "∪")).join(brackets), rng.choice((r" \text{ or } ", " or ")).join(chains)]

    return both(*pieces) + both(*pieces), both(flipped, *pieces[1:]) + both(longer, *pieces[1:]) + both(other)


def matrices(rng):
    rows, columns = rng.choice(((2, 1), (3, 1), (2, 2), (2, 3), (1, 2)))
    entries = rng.sample(values(rng, rows * columns), rows * columns)
    styles = [rf"\begin{{{kind}}} %s \end{{{kind}}}" for kind in ("pmatrix", "bmatrix")]
    styles.append(rf"\left(\begin{{array}}{{{'c' * columns}}} %s \end{{array}}\right)")

    def matrix(entries, columns, style):
        lines = [" & ".join(show([e], rng) for e in entries[i : i + columns]) for i in range(0, len(entries), columns)]
        return style % rng.choice((r" \\ ", r"\\")).join(lines)

    transposed = matrix([e for i in range(columns) for e in entries[i::columns]], rows, styles[0])
    different = [matrix(changed(entries, rng), columns, styles[1]), transposed]
    return [matrix(entries, columns, style) for style in styles], different


def equations(rng):
    """A line or a circle."""
    x, y, (a, b, c, k) = *sp.symbols("x y"), (integer(rng) for _ in range(4))
    line, circle, r = a * x + b * y, (x - a) ** 2 + (y - b) ** 2, rng.randint(1, 9)
    lines = [(line, c), (k * line - k * c, 0), (c - b * y, a * x), (y, (c - a * x) / b)]
    circles = [(circle, r), (sp.expand(circle) - r, 0), (sp.expand(k * circle), k * r), (r, circle)]
    no_lines = [(line, c + 1), (a * x - b * y, c), (y, (a * x - c) / b), (y, (c - (a + b) * x) / b)]
    no_circles = [(circle, r + 1), ((x + a) ** 2 + (y - b) ** 2, r), (circle, -r)]
    pair = rng.choice(((lines, no_lines), (circles, no_circles)))
    return [[f"{show([left], rng)} = {show([right], rng)}" for left, right in some] for some in pair]


def plus_minus(rng):
    p, d, q = integer(rng), root(rng), sp.Integer(rng.choice((1, 2, 3, 5)))
    both, fraction = show([(p - d) / q, (p + d) / q], rng, rng.choice(LISTS)), rf"\frac{{%s \pm {show([d], rng)}}}{{{q}}}"
    different = [show([(p + d) / q], rng), fraction % (p + 1), show([(p + d) / q, p / q], rng)]
    return [rf"{show([p / q], rng)} \pm {show([d / q], rng)}", fraction % p, both], different


def thousands(rng):
    n = rng.randint(1000, 9_999_999)
    comma = f"{n:,}"
    same = [str(n), comma, comma.replace(",", r",\!"), comma.replace(",", "{,}"), comma + ".0"]
    same.append(rf"{n / 10**6:.6f} \times 10^6")
    return same, [str(n + 1), f"{n * 10:,}", f"-{n}", f"{n / 1000:.3f}", comma.replace(",", ", ")]


def mixed_numbers(rng):
    whole, d, sign = rng.randint(1, 4), rng.choice((3, 5, 7, 11)), rng.choice(("", "-"))
    n = rng.randint(1, d - 1)
    different = [f"{sign}{whole * n}/{d}", rf"{sign}{whole}\frac{{{n}}}{{{d + 1}}}", f"{sign}{whole + 1} {n}/{d}"]
    return [rf"{sign}{whole}\frac{{{n}}}{{{d}}}", f"{sign}{whole} {n}/{d}", f"{sign}{whole * d + n}/{d}"], different


def percents(rng):
    n = Fraction(rng.randint(1, 400), rng.choice((1, 1, 2, 4)))
    text, different = f"{float(n):g}", [rf"{float(n) + 0.5:g}\%", f"{float(n / 10):g}", str(n / 10000)]
    if rng.random() < 0.5:  # 20% is 20, and 20% is 0.2; but 20 is not 0.2
        return [rf"{text}\%", rng.choice((text, f"{float(n / 100):g}", str(n / 100)))], different
    return [rf"{text}\%", f"{text}%", rf"{text}\text{{ percent}}", f"{text} percent"], [*different, rf"{float(100 * n):g}\%"]


def repeating_decimals(rng):
    head, period = rng.choice(("", "0", "1", "25")), str(rng.randint(1, 888)).replace("9", "8")
    q = 2 + Fraction(int(head + period) - int(head or 0), 10 ** len(head) * (10 ** len(period) - 1))
    same = [rf"2.{head}\overline{{{period}}}", rf"2.{head}\overline{{{period * 2}}}", str(q)]
    return same, [rf"2.{head}\overline{{{int(period) + 1}}}", f"2.{head}{period}", f"2.{head}{period * 2}", "2"]


def bases(rng):
    base = rng.randint(2, 8)
    digits = "1" + "".join(str(rng.randrange(base)) for _ in range(rng.randint(2, 6)))
    different = [f"{digits}_{base + 1}", f"{digits}0_{base}", digits, str(int(digits, base))]
    return [f"{digits}_{base}", f"{digits}_{{{base}}}"], different


def units(rng):
    q, (unit, other) = rational(rng), rng.sample(("cm", "m", "inches", "hours", "square feet", "kg", "cm}^{2"), 2)
    same = [rf"{show([q], rng)}\text{{ {unit}}}", rf"{show([q], rng)} \text{{{unit}}}"]
    if rng.random() < 0.5:
        return same, [rf"{show([q], rng)}\text{{ {other}}}", rf"{show([-q], rng)}\text{{ {unit}}}"]
    return [*same, show([q], rng)], [show([q + 1], rng), rf"{show([q / 10], rng)}\text{{ {unit}}}"]


def choices(rng):
    letter, other = rng.sample("ABCDE", 2)
    return [letter, f"({letter})", rf"\text{{({letter})}}", rf"(\text{{{letter}}})"], [f"({other})", rf"\text{{{other}}}"]


def clocks(rng):
    hour, minute, (half, other) = rng.randint(1, 12), rng.randint(10, 49), rng.sample("ap", 2)
    same = [f"{hour}:{minute} {half}.m.", f"{hour}:{minute} {half.upper()}M", rf"{hour}:{minute}\text{{ {half}.m.}}"]
    return same, [f"{hour}:{minute} {other}.m.", rf"{hour}:{minute + 10}\text{{ {half}.m.}}"]


TYPES = (lists, tuples, points, assignments, intervals, matrices, equations, plus_minus, thousands, mixed_numbers, percents)
TYPES += (repeating_decimals, bases, units, choices, clocks)
TYPES = {make.__name__.replace("_", " "): make for make in TYPES}
KINDS = [*FAMILIES, *TYPES]


# ------------------------------------------------------------------------------------------------ the properties


def draw(kind, seed):
    """Strings of one meaning, and strings of other meanings. Equal seeds give equal strings."""
    rng = random.Random(f"{kind}-{seed}")
    if kind in TYPES:
        return TYPES[kind](rng)
    e = expression(rng, kind)
    return forms(e, rng), forms(perturbed(e, rng), rng, 2)


SOLUTIONS = (r"Hence it is $\boxed{%s}$.", r"\boxed{%s}", "I counted 3 of them.\n#### %s")
RESPONSES = (*SOLUTIONS, "So the answer is $%s$.", "The answer is %s")


def failures(kind, seed):
    """What the grader gets wrong in one draw: (expected verdict, gold, text) for each."""
    rng, (same, different) = random.Random(seed), draw(kind, seed)
    (a, b), c, solution, response = rng.sample(same, 2), rng.choice(different), rng.choice(SOLUTIONS), rng.choice(RESPONSES)
    expected = [(True, a, b), (True, b, a), (True, a, a), (True, a, response % b), (True, solution % a, b)]
    expected += [(False, a, c), (False, c, a), (False, b, response % c), (False, solution % c, b)]
    return [(verdict, gold, text) for verdict, gold, text in expected if grade(gold, text) is not verdict]


@pytest.mark.parametrize("kind", KINDS)
def test_random_forms_match_and_random_changes_do_not(kind):
    wrong = [failure for seed in range(DRAWS) for failure in failures(kind, seed)]
    assert not wrong, "\n".join(f"should be {verdict}: {gold!r} against {text!r}" for verdict, gold, text in wrong)


def test_the_generator_keeps_and_changes_values():
    """The check of the checker: rewriting keeps the value at random points, perturbing does not."""
    for kind in FAMILIES:
        rng = random.Random(kind)
        e = expression(rng, kind)
        assert not any(differ(e, rewritten(e, rng), rng) for _ in range(3)) and differ(e, perturbed(e, rng), rng), e
    assert draw("product", 1) == draw("product", 1) != draw("product", 2)
