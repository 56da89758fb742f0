"""The grader accepts equal answers in any notation, refuses near misses, and survives hostile text."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mpmath
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from grader import WORKER, extract, grade, main, verdict

ROOT = Path(__file__).parents[1]


# fmt: off
M = r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"
EQUAL = {
    "toy world": [("49", "49"), ("02", "2"), ("00", "0"), ("07", "7.")],
    "integer": [
        ("18", "18."), ("+5", "5"), ("-3", "−3"), ("- 3", "-3"), ("7", "$7$"), ("7", r"\(7\)"), ("0", "-0"), ("12", "012"),
        ("(7)", "7"), ("-(-4)", "4"), ("12345678901234567890", "12,345,678,901,234,567,890"),
    ],
    "thousands": [
        ("1234", "1,234"), ("1234", r"1,\!234"), ("10000", "10{,}000"), ("1,000,000", r"1,\! 000,\! 000"), ("1000", "1 000"),
        ("12,345.67", "12345.67"), ("-1,234", "-1234"), (r"12\,345", "12345"), (r"1\;000\;000", "1000000"),
        ("1,234,567", "1 234 567"), ("100,000", "10^5"),
    ],
    "decimal": [
        ("0.5", ".5"), ("0.5", "0.50"), ("5", "5.0"), ("0.1", r"\frac{1}{10}"), ("3.2e5", "320000"), ("1,22", "1.22"),
        ("-.25", r"-\frac14"), ("0.125", "1/8"), ("2.5", r"\frac{5}{2}"), ("4.123105625617661", r"\sqrt{17}"),
        ("0.3333333333333333", r"\frac13"),
    ],
    "scientific notation": [
        (r"3.2 \times 10^5", "320,000"), (r"2\cdot10^{-3}", "0.002"), ("1E3", "1000"), (r"3.2\times10^{5}", "3.2e5"),
        (r"6.02 \times 10^{23}", r"60.2 \times 10^{22}"), (r"-1.5 \times 10^{-2}", "-0.015"),
        ("10^{-7}", r"1 \times 10^{-7}"), ("1e-3", "0.001"), ("2.5E+2", "250"), (r"4 \times 10^8", r"400{,}000{,}000"),
        (r"10^6", "1,000,000"),
    ],
    "fraction": [
        (r"\frac{1}{2}", r"\frac12"), (r"\dfrac{1}{2}", r"\tfrac12"), ("1/2", r"\frac{2}{4}"), ("3/1", "3"),
        ("7/3", r"\frac{14}{6}"), (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"\frac{1}{-2}", "-0.5"),
        (r"\frac 3 4", r"\frac3{4}"), (r"\cfrac{3}{4}", "3/4"), (r"1+\frac{1}{1+\frac{1}{2}}", r"\frac53"),
        (r"\frac12x", "0.5x"),
    ],
    "mixed number": [
        (r"3\frac{1}{2}", "3.5"), (r"-3\frac12", r"-\frac72"), ("3 1/2", "7/2"), (r"1\dfrac{3}{4}", "1.75"),
        ("-2 1/3", "-7/3"), (r"10 \frac{2}{5}", "10.4"), (r"2\tfrac{1}{3}", r"\frac{7}{3}"), (r"3\frac12\%", r"3.5\%"),
        (r"5\,\frac{1}{4}", "21/4"), (r"3\frac{1}{2}\text{ cm}", "3.5"), (r"12\frac{1}{12}", r"\frac{145}{12}"),
    ],
    "percent": [
        (r"20\%", "20"), (r"20\%", "0.2"), ("20%", r"\frac15"), ("20%", r"20\text{ percent}"), (r"20 \%", "20%"),
        (r"12.5\%", r"\frac18"), (r"33\frac13\%", r"\frac13"), (r"150\%", "1.5"), (r"0.5\%", "0.005"), (r"-5\%", "-0.05"),
        (r"\frac{200}{3}\%", r"66\frac{2}{3}\%"),
    ],
    "money": [
        ("5", r"\$5"), (r"-\$0.50", r"\$-0.50"), ("5", "$5"), (r"\$1,250", "1250 dollars"), (r"\$5.00", r"\$5"),
        (r"\$ 18", "18"), (r"5\text{ dollars}", r"\$5"), (r"\$18.90", "18.9"), ("18.90", "$18.90"),
        (r"\$1{,}000", "$1,000$"), ("$1,234.", "1234"),
    ],
    "units": [
        ("5", r"5\text{ cm}"), (r"5 \mbox{ m}^2", "5"), (r"5\text{ inches}", r"5 \, \text{inches}"),
        ("5 cm", r"5\text{ cm}"), (r"5\,\mathrm{cm}", "5 cm"), (r"5\text{ cm}^2", r"5\mbox{ cm}^2"),
        (r"60\text{ km/h}", "60"), ("72 clips", "72"), (r"12\pi\text{ square units}", r"12\pi"),
        (r"18\text{ ft.}", r"18\text{ ft}"), (r"x = 5\text{ cm}", "5"),
    ],
    "degrees": [
        ("30", r"30^\circ"), (r"30^{\circ}", "30°"), (r"30^\circ", r"30\text{ degrees}"), ("30 degrees", r"30^\circ"),
        (r"22.5^\circ", r"\frac{45}{2}"), (r"-40^\circ", "-40"), (r"\frac{180}{7}^\circ", r"\frac{180}{7}"),
        (r"90^{ \circ }", "90"), (r"30\degree", r"30^\circ"), (r"\theta = 30^\circ", r"30^\circ"),
        (r"30^\circ, 150^\circ", "150, 30"),
    ],
    "radical": [
        (r"\sqrt3", r"\sqrt{3}"), (r"\sqrt{8}", r"2\sqrt{2}"), (r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}"),
        (r"\sqrt{16}", "4"), (r"\sqrt{5+2\sqrt6}", r"\sqrt2+\sqrt3"), (r"\frac{2}{\sqrt3-1}", r"\sqrt3+1"),
        (r"\sqrt{\frac13}", r"\frac{\sqrt3}{3}"), (r"5\sqrt{3}", r"\sqrt{75}"), ("sqrt(2)/2", r"\frac{\sqrt{2}}{2}"),
        (r"\sqrt{2+\sqrt3}", r"\frac{\sqrt6+\sqrt2}{2}"), (r"x\sqrt{2}", r"\sqrt{2}x"),
    ],
    "nth root": [
        (r"\sqrt[3]{8}", "2"), (r"\sqrt[3]2", "2^{1/3}"), (r"\sqrt[3]{54}", r"3\sqrt[3]{2}"), (r"\sqrt[4]{16}", "2"),
        (r"\sqrt[3]{9}\cdot\sqrt[3]{3}", "3"), (r"\frac{1}{\sqrt[3]2}", r"\frac{\sqrt[3]4}{2}"), (r"\sqrt[6]{8}", r"\sqrt2"),
        (r"\sqrt[3]{7+5\sqrt2}", r"1+\sqrt2"), (r"\sqrt[3]{2}", r"\sqrt[ 3 ]{2}"), (r"3\sqrt[3]2", r"3 \sqrt[3]{2}"),
        (r"\sqrt[2]{5}", r"\sqrt5"),
    ],
    "power": [
        ("2^{10}", "1024"), ("2^{-3}", r"\frac18"), ("4^{3/2}", "8"), ("2^{2^3}", "256"), ("(2^2)^3", "64"),
        ("x^{-1}", r"\frac1x"), ("a^2b^3", "b^3a^2"), ("2^{100}", "1267650600228229401496703205376"), (r"8^{\frac23}", "4"),
        (r"2^{1000}\cdot2", "2^{1001}"), ("-2^2", "-4"),
    ],
    "pi and e": [
        (r"2 \pi", r"2\pi"), (r"\frac{\pi}{2}", r"0.5\pi"), (r"\pi/2", r"\frac12\pi"), (r"\pi r^2", r"r^2\pi"),
        ("e^2", r"\exp(2)"), (r"\frac1e", "e^{-1}"), ("3.141592653589793", r"\pi"), ("2.718281828459045", "e"),
        (r"\mathrm{e}^2", "e^2"), (r"\frac\pi4+2-\sqrt2", r"2-\sqrt2+\frac{\pi}{4}"), ("2pi", r"2\pi"),
    ],
    "complex": [
        ("(1+i)^2", "2i"), ("i^2", "-1"), (r"\frac1i", "-i"), (r"e^{i\pi}", "-1"), ("|3+4i|", "5"), (r"\sqrt{-4}", "2i"),
        ("3+4i", "4i+3"), (r"\frac{1}{1+i}", r"\frac{1-i}{2}"), (r"\frac12+\frac{\sqrt3}{2}i", r"e^{i\pi/3}"),
        ("(2+i)(2-i)", "5"), ("i^{2023}", "-i"),
    ],
    "polynomial": [
        ("x^2+2x+1", "1+2x+x^2"), ("2x+3", "3+2x"), ("x^2 - 5x + 6", "x^{2}-5x+6"), ("xy", "yx"), ("3x-2y", "-2y+3x"),
        (r"2\cdot x", "2x"), ("2*x", "2x"), ("-(x-1)", "1-x"), ("3(x+2)", "3x+6"), (r"\frac{x^2}{2}", "0.5x^2"),
        ("x+x", "2x"),
    ],
    "factored": [
        ("(x+1)^2", "x^2+2x+1"), ("(x-1)(x+1)", "x^2-1"), ("(x-2)(x-3)", "(x-3)(x-2)"), ("(a+b)^3", "a^3+3a^2b+3ab^2+b^3"),
        ("x(x-1)(x-2)", "x^3-3x^2+2x"), ("(1-x)(2-x)", "(x-1)(x-2)"), ("2(x+1)", "(x+1)2"), ("(x^2+1)(x^4-x^2+1)", "x^6+1"),
        ("(x-y)(x^2+xy+y^2)", "x^3-y^3"), (r"(x+1)\cdot(x+2)", r"(x+1) \times (x+2)"),
        ("(a-b)(b-c)(c-a)", "-(b-a)(b-c)(c-a)"),
    ],
    "rational function": [
        (r"\frac1x+\frac1y", r"\frac{x+y}{xy}"), (r"\frac{x+1}{2}", r"\frac x2+\frac12"),
        (r"\frac{1}{1-x}", r"-\frac{1}{x-1}"), (r"\frac{a-b}{c-d}", r"\frac{b-a}{d-c}"),
        (r"\frac{2}{2x+2}", r"\frac{1}{x+1}"), (r"\frac{1}{x}", "x^{-1}"),
        (r"\frac{1}{n}-\frac{1}{n+1}", r"\frac{1}{n(n+1)}"), ("1/(x+1)", r"\frac{1}{x+1}"),
        (r"\frac{x}{y}\cdot\frac{y}{z}\cdot z^2", "xz"), (r"\frac{1}{1+\frac{1}{x}}", r"\frac{x}{x+1}"),
        (r"3+\frac{2}{x-1}", r"\frac{3x-1}{x-1}"),
    ],
    "trigonometric": [
        (r"\sin^2x+\cos^2x", "1"), (r"\sin 2x", r"2\sin x\cos x"), (r"\cos2x", r"1-2\sin^2x"),
        (r"\sec x", r"\frac{1}{\cos x}"), (r"\sin\frac\pi6", r"\frac12"), (r"\cos36^\circ", r"\frac{1+\sqrt5}{4}"),
        (r"\arctan1", r"\frac\pi4"), (r"\sin(x)", r"\sin x"), (r"\sin15^\circ", r"\frac{\sqrt6-\sqrt2}{4}"),
        (r"\sin^2x+\cos^2x+x", "x+1"), (r"\sin x\cos y+\cos x\sin y", r"\sin(x+y)"),
    ],
    "logarithm and exponential": [
        (r"\log_28", "3"), (r"\ln e^2", "2"), (r"\log_{10}1000", "3"), (r"\ln8", r"3\ln2"),
        (r"\log_23", r"\frac{\ln3}{\ln2}"), (r"\log2+\log3", r"\log6"), (r"e^{\ln3}", "3"), (r"2^{\log_25}", "5"),
        (r"\ln\frac12", r"-\ln2"), (r"\log_32", r"\frac{1}{\log_23}"), (r"\frac{\log3}{\log2}", r"\log_23"),
    ],
    "absolute value and floor": [
        ("|-5|", "5"), (r"\lfloor3.7\rfloor", "3"), (r"\lceil3.2\rceil", "4"), ("|x-1|", "|1-x|"),
        (r"\left|x\right|", "|x|"), (r"\lfloor-0.5\rfloor", "-1"), (r"\lvert-2\rvert", "2"), (r"2|x|", r"|2x|"),
        (r"\left\lfloor\pi\right\rfloor", "3"), (r"\left\lfloor \frac{n}{2} \right\rfloor", r"\lfloor n/2\rfloor"),
        (r"|1-\sqrt2|", r"\sqrt2-1"),
    ],
    "factorial and binomial": [
        ("5!", "120"), (r"\binom52", "10"), (r"\binom{5}{2}", r"{5 \choose 2}"), (r"\frac{10!}{8!}", "90"),
        (r"\dbinom{6}{3}", "20"), (r"\binom n2", r"\frac{n(n-1)}{2}"), (r"\frac{100!}{98!}", "9900"), ("(n+1)!", "(n+1)n!"),
        ("(3!)!", "720"), ("0!", "1"), ("20!", "2432902008176640000"),
    ],
    "equation": [
        ("x^2+y^2=25", "25=y^2+x^2"), ("2x+4y-3=0", r"y=-\frac12x+\frac34"),
        (r"\frac{x^2}{9}+\frac{y^2}{4}=1", "4x^2+9y^2=36"), ("y=2x+1", "2x-y+1=0"), (r"A=\pi r^2", r"\pi r^2=A"),
        ("(x-1)^2+(y-2)^2=9", "x^2+y^2-2x-4y-4=0"), ("x+y=5", "y=5-x"), ("2x+3y=6", "4x+6y=12"), ("x-y=0", "y=x"),
        (r"\frac x2+\frac y3=1", "3x+2y=6"), ("y-3=2(x-1)", "y=2x+1"),
    ],
    "function and assignment": [
        ("5", "x = 5"), ("x=5", "x = 5.0"), ("1/2", r"x_1=\frac12"), ("5=x", "5"), ("f(x)=2x+1", "2x+1"),
        ("f(x)=2x+1", "y=2x+1"), ("y=2x+1", "2x+1=y"), ("2x+1", "y=1+2x"), ("f(x)=(x+1)^2", "f(x)=x^2+2x+1"),
        ("n=1,234", "1234"), (r"P(A) = \frac{3}{8}", "3/8"),
    ],
    "chain of equalities": [
        ("x=2+3=5", "5"), (r"\frac{10}{2}=5", "5"), (r"S=\frac{3\cdot4}{2}=6", "6"), ("2^3=8", "8"), ("x=2+3=5", "x=5"),
        ("1+1=2", "2"), (r"\frac{6}{8}=\frac34=0.75", r"\frac34"), (r"\binom52=10", "10"), (r"A=\pi\cdot3^2=9\pi", r"9\pi"),
        ("f(2)=2^2+1=5", "5"), (r"r = \sqrt{16} = 4", "4"),
    ],
    "inequality": [
        ("x>3", "3<x"), ("x>3", r"(3,\infty)"), (r"x\in(3,\infty)", "x > 3"), (r"0\le x<1", "[0,1)"),
        (r"x\geq2", r"x\geqslant 2"), (r"x\ge2", "x >= 2"), (r"-2<x<2", "(-2,2)"), (r"x\ne3", r"(-\infty,3)\cup(3,\infty)"),
        (r"x<0\text{ or }x>1", r"(-\infty,0)\cup(1,\infty)"), (r"x>1\text{ and }x<3", "1<x<3"),
        (r"3<x", r"x \in \left(3, +\infty\right)"),
    ],
    "interval": [
        ("[0,1)", r"[0, \frac{2}{2})"), (r"\left[0,1\right]", "[0,1]"), (r"(-\infty,2]", r"\left( -\infty, 2 \right]"),
        ("(0, 1)", "(0,1.0)"), (r"[\frac12,1]", "[0.5, 1]"), (r"(0,\infty)", r"(0,+\infty)"),
        (r"(-\infty,\infty)", r"\mathbb{R}"), ("x ∈ [0, 1)", r"x\in[0,1)"),
        (r"[-\sqrt2,\sqrt2]", r"[-\frac{2}{\sqrt2}, \sqrt2]"), (r"\bigl[0,1\bigr)", "[0,1)"), (r"\lbrack 0,1)", "[0,1)"),
    ],
    "union": [
        (r"(1,2)\cup[3,4]",) * 2, (r"(1,2)\cup[3,4]", r"[3,4]\cup(1,2)"),
        (r"(-\infty,0)\cup(0,\infty)", r"\mathbb{R}\setminus\{0\}"), (r"(-\infty,-1)\cup(1,\infty)", r"x<-1\text{ or }x>1"),
        (r"[0,1]\cup\{2\}", r"\{2\}\cup[0,1]"), (r"(0,1) \cup (1,2)", "(0,1)∪(1,2)"),
        (r"(0,1)\cup(2,3)\cup(4,5)", r"(4,5)\cup(0,1)\cup(2,3)"),
        (r"x\in(-\infty,0)\cup(1,\infty)", r"(-\infty,0)\cup(1,\infty)"),
        (r"\left(-\infty, \tfrac12\right) \cup [1, +\infty)", r"(-\infty,0.5)\cup[1,\infty)"),
        (r"x<0\text{ or }x>1", "x>1 or x<0"),
    ],
    "infinity": [
        (r"\infty", r"+\infty"), (r"\infty", "∞"), (r"-\infty", r"- \infty"), (r"\infty", r"\text{infinity}"),
        (r"x=\infty", r"\infty"), ("-∞", r"-\infty"), (r"\left(-\infty, \infty\right)", "(-∞, ∞)"),
    ],
    "list": [
        ("1,2", "1, 2"), (r"1 \text{ and } 2", "1, 2"), ("1 or 2", "1,2"), (r"\frac12, 3", "0.5, 3"), ("1, 2", "2, 1"),
        ("3,1,2", "1,2,3"), ("1, 2", "x = 1, 2"), ("1, 2 and 3", "3,2,1"), (r"\text{Ann, Bob}", r"\text{Bob, Ann}"),
        ("1,000, 2", "2, 1000"), (r"x = 1, x = 2", r"x \in \{1, 2\}"),
    ],
    "set": [
        (r"\{1,2\}", r"\{ 1, 2.0 \}"), (r"\{1,2,3\}", r"\{3,1,2\}"), (r"\emptyset", r"\varnothing"), (r"\{\}", r"\emptyset"),
        (r"\left\{1,2\right\}", r"\{2,1\}"), (r"\{-1,1\}", "-1, 1"), (r"\{1,2,\ldots,10\}", r"\{1, 2, \dots, 10\}"),
        (r"\{(1,2),(3,4)\}", r"\{(3,4),(1,2)\}"), (r"\lbrace1,2\rbrace", r"\{1,2\}"), (r"\{x\mid x>3\}", r"(3,\infty)"),
        (r"\{\pm 2\}", r"\{-2,2\}"),
    ],
    "tuple": [
        ("(1,2)", r"\left( 1, 2 \right)"), (r"(\frac12,3)", "(0.5, 3)"), ("((1,2),3)", "((1,2.0),3)"),
        ("(x,y)=(1,2)", "(1,2)"), (r"(2\sqrt2,\pi)", r"(\sqrt8, \pi)"), ("(1,2,3)", "(1, 2, 3)"),
        (r"\left(3,\frac\pi2\right)", r"(3, \pi/2)"), ("(a+b,c)", "(b+a, c)"), (r"(a, b, c) = (1, 2, 3)", "(1,2,3)"),
        (r"(1,\,2)", r"(1,\ 2)"), (r"\left(\dfrac{3}{2}, -13\right)", "(1.5,-13)"),
    ],
    "list of tuples": [
        ("(1,2),(3,4)", "(3,4),(1,2)"), ("(1,2), (3,4)", r"(1,2)\text{ and }(3,4)"), ("(0,1),(1,0)", r"\{(1,0),(0,1)\}"),
        ("(1,2),(3,4),(5,6)", "(5,6),(1,2),(3,4)"), (r"(\frac12,0),(0,0.5)", r"(0,\frac12),(0.5,0)"),
        ("(1,2);(3,4)", "(3,4);(1,2)"), (r"(x,y)=(1,2),(2,1)", "(2,1),(1,2)"),
        (r"(1,2),\ (3,4)", r"\left(3,4\right), \left(1,2\right)"), (r"(\pm1,2)", "(1,2),(-1,2)"),
    ],
    "named values": [
        ("x=1, y=2", "y=2, x=1"), (r"x=1\text{ and }y=2", "x=1,y=2"), ("a=1,b=2,c=3", "c=3,a=1,b=2"),
        (r"x=\frac12,y=3", "y=3.0, x=0.5"), ("(x,y)=(1,2)", "x=1,y=2"), ("x=1,\\ y=2", "x = 1, y = 2"),
        (r"x=\sqrt8, y=0", r"x=2\sqrt2, y=0"), ("a=-1, b=0", "b=0, a=-1"),
        (r"m = 2, \quad n = 7", r"n = 7 \text{ and } m = 2"),
    ],
    "plus-minus": [
        (r"\pm2", "2,-2"), (r"\pm2", "-2, 2"), (r"1\pm\sqrt5", r"1+\sqrt5,1-\sqrt5"), (r"x=\pm2", "±2"),
        (r"\pm\sqrt2", r"\mp\sqrt2"), (r"\frac{3\pm\sqrt5}{2}", r"\frac{3+\sqrt5}{2},\frac{3-\sqrt5}{2}"),
        (r"\pm1,\pm2", "-2,-1,1,2"), (r"\pm i", "i,-i"), (r"x=\pm2", r"x=2\text{ or }x=-2"), (r"2 \pm i", "2-i, 2+i"),
        (r"0, \pm 1", "-1, 0, 1"),
    ],
    "matrix": [
        (r"\begin{pmatrix}1&2\end{pmatrix}^T", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (M, r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"), (M, r"\left(\begin{array}{cc}1&2\\3&4\end{array}\right)"),
        (r"\begin{pmatrix}1/2&0\\0&\sqrt8\end{pmatrix}", r"\begin{pmatrix}0.5&0\\0&2\sqrt2\end{pmatrix}"),
        (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", "-2"), (r"\begin{pmatrix}1&2\\3&4\\\end{pmatrix}", M),
        (r"\frac12\begin{pmatrix}2&4\\6&8\end{pmatrix}", M),
        (r"\begin{pmatrix}\cos x&0\\0&-\sin x\end{pmatrix}", r"\begin{bmatrix} \cos x & 0 \\ 0 & -\sin x \end{bmatrix}"),
        (r"\left[\begin{matrix}1&0\\0&1\end{matrix}\right]", r"\begin{pmatrix}1&0\\0&1\end{pmatrix}"),
        (r"A = \begin{pmatrix}1&0\\0&2\end{pmatrix}", r"\begin{pmatrix}1&0\\0&2\end{pmatrix}"),
        (r"\begin{pmatrix}(x+1)^2&0\\0&1\end{pmatrix}", r"\begin{pmatrix}x^2+2x+1&0\\0&1\end{pmatrix}"),
        (r"\begin{pmatrix} \frac13 & 2 \\[6pt] 0 & 1 \end{pmatrix}", r"\begin{pmatrix}1/3&2\\0&1\end{pmatrix}"),
    ],
    "vector": [
        (r"\begin{pmatrix}1\\2\\3\end{pmatrix}", r"\begin{bmatrix}1\\2\\3\end{bmatrix}"),
        (r"2\mathbf i-3\mathbf j", r"-3\mathbf{j}+2\mathbf{i}"),
        (r"\langle1,2\rangle", r"\left\langle 1, 2.0 \right\rangle"),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{bmatrix}1&2\end{bmatrix}"),
        (r"\begin{pmatrix}1/2\\-1\end{pmatrix}", r"\begin{pmatrix}\frac12\\-1\end{pmatrix}"),
        (r"2\vec{a}+\vec{b}", r"\vec b + 2\vec a"),
        (r"\begin{pmatrix} -7 \\ 16 \\ 5 \end{pmatrix}", r"\left(\begin{array}{c}-7\\16\\5\end{array}\right)"),
        (r"\mathbf{v} = \begin{pmatrix} 1 \\ 0 \end{pmatrix}", r"\begin{pmatrix}1\\0\end{pmatrix}"),
    ],
    "text": [
        (r"\text{Evelyn}", "Evelyn"), (r"\text{even}", "Even"), ("no solution", "No solution"),
        (r"\text{no solution}", "no solution"), (r"\text{Yes}", "yes"), (r"\textbf{odd}", "odd"), (r"\mathrm{True}", "true"),
        (r"\text{no real roots}", r"\text{ No real roots.}"), (r"\text{east}", r"\text{ east }"),
        (r"\text{Hyperbola}", "hyperbola"), (r"\textit{Ann}", r"\text{Ann}"),
    ],
    "choice": [
        (r"\text{(A)}", "A"), ("(B)", "B"), (r"(\text{E})", r"\text{E}"), (r"\text{A, C}", "A,C"), (r"\textbf{(C)}", "C"),
        (r"\mathrm{(D)}", "(D)"), ("C.", "C"), (r"\textbf{(E) }", "E"), (r"\text{B}", "B"), ("**C**", "C"),
        (r"\mathbf{B}", "B"),
    ],
    "based number": [
        ("101_2", "101_{2}"), ("(101)_2", "101_2"), (r"\text{101}_2", "101_2"), ("x=101_2", "101_{2}"),
        ("2A3_{16}", "2A3_{ 16 }"), (r"1101_2,110_2", r"110_2, 1101_2"), ("101_{10}", "101_{10}"), (r"{101}_{2}", "101_2"),
        ("4210_{5}", "$4210_5$"), ("2043_5", r"2043_{5}."),
    ],
    "clock time": [
        ("4:30 p.m.", "4:30 PM"), (r"4:30\text{ p.m.}", "4:30 p.m."), (r"4\!:\!30 \text{ PM}", "4:30 pm"),
        ("12:05", r"12:05"), ("4:30pm", r"4:30\text{ PM}"), (r"10{:}45", "10:45"), (r"9:00\text{ a.m.}", "9:00 AM"),
        (r"\text{4:30 p.m.}", "4:30 PM"), (r"7:05\ \text{A.M.}", "7:05 am"), (r"9\text{ a.m.}", "9 AM"),
    ],
    "ratio": [
        ("3:4", "3 : 4"), ("3:4", "6:8"), (r"3\colon4", "3:4"), ("1:2:3", "2:4:6"), (r"\frac12:1", "1:2"),
        (r"3\text{ to }4", "3:4"), ("3:4", r"3 \!:\! 4"), ("1:2:3", r"1 : 2 : 3"), (r"1:\sqrt3", r"\sqrt3:3"),
        (r"\pi:4", r"\pi : 4"), ("0.5:2", "1:4"),
    ],
    "date": [
        (r"\text{June 20}", "June 20"), ("June 20, 2020", r"\text{June 20, 2020}"), (r"\text{Monday}", "monday"),
        (r"\text{June }20", "June 20"), (r"\text{MARCH 5}", "March 5"), (r"\mbox{Friday}", r"\text{Friday}"),
        ("2020-06-20", r"\text{2020-06-20}"), ("4 July 1776", r"\text{4 July 1776}"),
    ],
    "repeating decimal": [
        (r"0.\overline{3}", r"\frac13"), (r"0.\overline{142857}", "1/7"), (r"0.1\overline6", r"\frac16"),
        (r"0.\bar3", "1/3"), (r"0.\dot3", "1/3"), (r"1.\overline{36}", r"\frac{15}{11}"), (r"0.\overline9", "1"),
        (r"2.1\overline3", r"\frac{32}{15}"), (r"-0.\overline3", r"-\frac13"), (r"0.\overline{3}", r"0.\overline{33}"),
        (r"0.1\overline{21}", r"0.\overline{12}"),
    ],
    "unicode": [
        ("½", r"\frac12"), ("¾", "0.75"), ("⅓", r"\frac13"), ("x∈[0,1]", "[0,1]"), ("2½", r"\frac52"),
        ("(−∞, 2)", r"(-\infty,2)"), ("1\u202f000", "1000"), ("±3", r"\pm3"), ("101₂", "101_2"), ("10⁻³", "0.001"),
        ("–7", "-7"),
    ],
    "spacing and notation": [
        (r"\left(x+1\right)^2", "(x+1)^2"), (r"\displaystyle\frac12", r"\frac12"), (r"x\,y", "xy"), (r"2\;\cdot\;3", "6"),
        ("x~+~1", "x+1"), (r"\mathrm{e}", "e"), (r"{x}^{2}", "x^2"), (r"\boxed{7}", "7"), ("$$7$$", "7"),
        (r"\mathrm{x}+1", "x+1"), (r"x\cdot y", r"x \times y"),
    ],
    "unread tail": [
        (r"3\pmod7", r"3 \pmod{7}"), (r"x\equiv3\pmod7", r"x \equiv 3 \pmod{7}"), ("x^2+C", "C+x^2"),
        (r"\sum_{k=1}^{n}k", r"\sum_{k=1}^n k"), (r"\int_0^1x\,dx", r"\int_0^1 x dx"),
        (r"1+2+\cdots+n", r"1 + 2 + \cdots + n"), (r"\overline{AB}", r"\overline{ AB }"), ("a_1", "a_{1}"),
        (r"\prod_{i=1}^{n}i", r"\prod_{i=1}^n i"), (r"\lim_{x\to0}f(x)", r"\lim_{x \to 0} f(x)"),
        (r"7 \bmod 3", r"7\bmod{3}"),
    ],
    "beyond the caps": [
        ("9" * 3000, "9" * 3000), ("x" * 20_000, "x" * 20_000), ("1e999999999", "1e999999999"), ("999999999!", "999999999!"),
        ("9^{9^{9^{9}}}", "9^{9^{9^9}}"), ("10^{10^{10}}", r"10^{ 10^{10} }"),
    ],
    "found by attack": [
        (r"x\le90^\circ", r"x\le90"), ("45", r"45\text{ min}"), (r"45\text{ min}", r"45\text{ minutes}"),
        ("80", "80 sec"), ("12", "12 square cm"), ("12", "12 cm squared"), (r"12\text{ cm}^2", "12 cm squared"),
        (r"12\text{ cm}^2", r"12\text{ cm²}"), ("12", "12 hrs"), ("60", "60 km/h"),
        (r"60\text{ mph}", r"60\text{ miles per hour}"), (r"\sqrt2", r"\sqrt2 \approx 1.414"),
        (r"\frac13", r"\frac13 \approx 0.333"), (r"\frac13", "0.333..."), ("No", "no"), ("No", "NO"), ("C", "(C) 12"),
        ("C", r"\textbf{(C)}\ 12"), ("C", "C. 12"), ("C", "Option C"), ("C", r"\text{option (C)}"),
        ("no solution", r"\text{no solutions}"), (r"\infty", r"\text{Infinity}"),
        (r"\emptyset", r"\text{the empty set}"), (r"\mathbb{R}", r"\text{all real numbers}"),
        (r"\text{hyperbola}", "a hyperbola"), (r"\sqrt2", "2^0.5"), (r"\log_2 3", "log2(3)"), (r"\arctan 2", "atan(2)"),
        (r"\lfloor n/2\rfloor", "⌊n/2⌋"), (r"\frac37", "3⁄7"), (r"x \in \{1,2,3\}", "x ∈ {1,2,3}"),
        (r"\{x\mid x>3\}", r"\{y\mid y>3\}"), (r"\{x\mid x>3\}", r"\left\{x \,\middle|\, x>3\right\}"),
        (r"\mathbb R\setminus\{1\}", r"\mathbb R-\{1\}"), ("x=3,y=-2", r"\begin{cases}x=3\\y=-2\end{cases}"),
        ("12", r"\begin{aligned}x&=12\end{aligned}"), (r"3 \pmod 7", r"3\ (\text{mod }7)"), (r"3 \pmod 7", "3 (mod 7)"),
        (r"x_{\max}=5", "5"), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"A^{-1}=\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"63.75^\circ", r"63^\circ 45'"), (r"\binom{10}{3}", "{}_{10}C_3"), ("f(x)=2x", "f(n)=2n"),
        ("1.4142135623730951", r"\sqrt2"), (r"2^{1000}\cdot 3^{500}", "2^{1000} 3^{500}"), (r"20\text{ percent}", "0.2"),
        (r"20\%", r"20\text{ per cent}"), ("|x-5|<3", "2<x<8"), ("|x-5|<3", "(2,8)"),
        (r"|2x+1|\ge 3", r"x\le -2 \text{ or } x\ge1"), ("12", r"\text{12 apples}"), ("(1,2)", "y=2,x=1"),
        (r"x=1\quad y=2", "y=2, x=1"), ("(2n-1)!!", r"\frac{(2n)!}{2^n n!}"),
        (r"\frac{1}{2^n}\binom{2n}{n}", r"\frac{(2n)!}{2^n n!^2}"), (r"[0^\circ,90^\circ)", "[0,90)"),
        (r"0^\circ\le x<90^\circ", r"[0^\circ,90^\circ)"),
        (r"9.8\text{ m/s}^2", r"9.8\ \mathrm{m/s^2}"), (r"5\text{ m}^2", r"5\text{ m^2}"),
        (r"5\text{ inches}^2", r"5\text{ inches^2}"), ("(x+1)^2 = x^2+2x+1", "x^2+2x+1"),
        (r"m\angle ABC = 40^\circ", "40"), (r"\frac{dy}{dx}=2x", "2x"), ("2.5 million", "2500000"),
        (r"2.5\text{ million}", "2,500,000"), (r"180^\circ-2x", "180-2x"), (r"x\ne1,2", r"\mathbb{R}\setminus\{1,2\}"),
        (r"x\ne1,2", r"x\ne 2,1"), ("P(3,-2)", "(3,-2)"), ("P(3,-2)", "P=(3,-2)"), ("3210_4", r"3210_{\text{base }4}"),
        (r"\text{(II)}", "II"), ("PV=nRT", "nRT=PV"), ("2abc", "2bca"), ("xyz", "zyx"),
        (r"n \equiv 3 \mod 7", r"n \equiv 3 \pmod{7}"), ("]0,1[", "(0,1)"), ("25¢", r"25\text{ cents}"),
        (r"101\text{ base }4", "101_4"), ("5cm", "5"), ("12", "12 cm"), ("16:30", "4:30 p.m."),
        (r"x=\frac\pi4+k\pi, k\in\mathbb{Z}", r"\frac\pi4+k\pi, k\in\mathbb{Z}"), (r"\bar z", r"\overline{z}"),
        (r"x=1,y=2 \text{ or } x=2,y=1", "(1,2),(2,1)"),
    ],
}
DIFFERENT = {
    "toy world": [("49", "4"), ("02", "20"), ("00", "10"), ("49", "94"), ("49", "9")],
    "integer": [
        ("5", "-5"), ("120000", "120006"), ("12", "1 2"), ("49", "4"), ("1", "10"), ("0", ""), ("7", "77"),
        ("12345678901234567890", "12345678901234567891"), ("2 3", "23"), ("2+3", "23"), ("6", "3!+1"),
        ("10^{50}", "10^{50}+1"),
    ],
    "thousands": [
        ("1,234", "1.234"), ("1234", "1, 234"), ("125", "0{,}125"), ("1,23", "123"), ("1,234", "234"), ("1,000", "1"),
        ("1,000,000", "1,000"), ("1,234", "1,243"), ("12,34", "1234"), ("10,00", "1000"), ("1 00", "100"),
        ("1,234.5", "1,234"),
    ],
    "decimal": [
        ("0.333", "1/3"), ("0.0000001", "0.0000003"), ("3.14", r"\pi"), ("0.5", "0.05"), ("0.67", "2/3"),
        ("1.4142", r"\sqrt2"), ("0.99", "1"), ("4.123105625617665", r"\sqrt{17}"), ("3.1415926537", r"\pi"),
        ("2.50", "2.05"), ("0.5", "5"), ("-0.5", "0.5"),
    ],
    "scientific notation": [
        ("1e5", "1e6"), ("10^{-7}", r"3 \cdot 10^{-7}"), (r"1/2 \times 10^3", "1/2000"), (r"3\times10^5", r"3\times10^{-5}"),
        (r"3\times10^5", "3105"), (r"3.2\times10^5", r"3.2\times10^6"), (r"6.02\times10^{23}", r"6.03\times10^{23}"),
        ("1e3", "e^3"), (r"2\times10^3", "20^3"), ("1e-3", "1e3"), ("2e", "2"), ("1e-400", "0"),
    ],
    "fraction": [
        (r"\frac12", r"\frac21"), (r"\frac{1}{2}3", r"\frac{1}{23}"), (r"\frac\pi4", r"\frac\pi5"),
        (r"\frac123", r"\frac{1}{2}"), ("1/0", "0"), ("1/2^{99}", "1/2^{98}"), (r"\frac{1}{2}", "12"), (r"\frac{1}{2}", "1"),
        (r"\frac{3}{4}", r"-\frac34"), ("1/2", "2"), (r"\frac{10^{30}+1}{10^{30}}", "1"), (r"\frac11{2}", r"\frac{11}{2}"),
    ],
    "mixed number": [
        (r"3\frac{5}{2}", "5.5"), (r"3\frac12", r"\frac32"), (r"3\frac{1}{2}", r"\frac{31}{2}"), ("3 1/2", "31/2"),
        (r"-3\frac12", "-2.5"), (r"3\frac12", "3"), (r"2\frac13", r"2\frac23"), (r"3\cdot\frac12", "3.5"),
        (r"3\frac12", r"2\frac13"), (r"3(\frac12)", "3.5"), ("3 1/2", "1.5"), (r"5\frac{1}{4}", "5.4"),
    ],
    "percent": [
        ("20", "0.2"), ("0.2", "20"), ("20%", "2000%"), ("20%", "2"), (r"20\%", r"\$20"), (r"20\%", "2000"),
        (r"20\%", r"25\%"), (r"20\%", "0.02"), (r"0.2\%", r"20\%"), (r"50\%", r"\frac{1}{50}"), (r"5", "500"),
        (r"20\%", r"20^\circ"),
    ],
    "money": [
        (r"\$5", r"5\text{ cents}"), (r"\$5", r"\$50"), (r"\$5.00", r"\$500"), (r"\$1,250", r"\$1.250"),
        (r"\$18.90", r"\$18.09"), (r"\$5", r"-\$5"), (r"\$5", r"5\text{ cm}"), ("$5", "$6"), (r"\$0.50", r"50"),
        (r"\$5\text{ million}", r"\$5"),
    ],
    "units": [
        (r"5\text{ cm}", r"5\text{ m}"), (r"5\text{ m}^2", r"5\text{ m}^3"), ("4t", "4s"), ("4", "4t"),
        ("5", r"5\text{ million}"), ("2", r"2\text{i}"), ("3", r"3\text{ or so}"), ("4t", "4"), ("a+b", "+b"),
        ("5 cm", "6 cm"), (r"5\text{ cm}", r"50\text{ cm}"), (r"5\text{ km/h}", r"5\text{ km}"),
        (r"5\text{ hours}", r"5\text{ minutes}"), ("5m", "5"), ("12x", "12"), (r"5\text{ cm}", r"\$5"), ("sec", "c"),
        (r"5\text{ squared}", "5"), ("abc", "c"), (r"5\text{ degrees}", r"5\text{ dollars}"),
    ],
    "degrees": [
        (r"30^\circ", r"30^0"), (r"30^\circ", r"60^\circ"), (r"30^\circ", "300"), (r"30^\circ", "3"),
        (r"30^\circ", r"30\text{ cm}"), (r"\sin30^\circ", "30"), (r"30^\circ", r"30\%"), (r"30^\circ", r"-30^\circ"),
        (r"180^\circ-x", r"180^\circ"), (r"30^\circ", r"\frac{\pi}{3}"), (r"90^\circ", "9^0"),
    ],
    "radical": [
        (r"\sqrt3", "3"), (r"\sqrt{10}", r"\pi"), (r"\sqrt2+\sqrt3", r"\sqrt5"), (r"\sqrt2", "1.41421356"),
        (r"\sqrt2", r"\frac{99}{70}"), (r"\sqrt{16}", "8"), (r"\sqrt{10^{40}+1}", "10^{20}"), (r"\sqrt{x^2}", "x"),
        (r"\sqrt{x+1}", r"\sqrt x+1"), (r"2\sqrt3", r"3\sqrt2"), (r"2\sqrt3", r"\sqrt6"), (r"\sqrt{1000001}-1000", "0.0005"),
    ],
    "nth root": [
        (r"3\sqrt[3]2", r"3\sqrt2"), (r"\sqrt[3]2", r"3\sqrt2"), (r"\sqrt[3]8", r"\sqrt[4]8"), (r"\sqrt[3]{31}", r"\pi"),
        (r"\sqrt[3]{x}", r"\sqrt x"), (r"\sqrt[3]8", "8/3"), (r"\sqrt[4]{16}", "4"), (r"2^{1/3}", r"\frac{2}{3}"),
        (r"\sqrt[3]{2}", r"\sqrt[2]{3}"), (r"\sqrt[n]{x}", r"\sqrt[m]{x}"), (r"\sqrt[3]{2}", "1.2599"),
        (r"\sqrt[0]{2}", "1"),
    ],
    "power": [
        ("2^{10}", "210"), ("2^{10}", "2^{11}"), ("2^{2^3}", "64"), ("(-2)^2", "-2^2"), ("2^{1000}", "2^{1001}"),
        ("x^{-1}", "-x"), ("2^{100}", "1267650600228229401496703205377"), ("(a+b)^2", "a^2+b^2"), ("0^0", "0"),
        ("x^{12}", "x^1 2"), ("7^{1/2}", "3.5"), ("2^{0.5}", "2^{0.50001}"),
    ],
    "pi and e": [
        (r"\pi", "3.14"), (r"\pi", r"\frac{22}{7}"), (r"\pi", "3.14159"), (r"\frac{355}{113}", r"\pi"), ("e", "2.718"),
        (r"2\pi", "2"), (r"\pi", "180"), (r"\frac \pi4 + 2-\sqrt2", r"\frac \pi5 + 2-\sqrt2"), (r"e^\pi-\pi", "20"),
        (r"e^{\pi\sqrt{163}}", "262537412640768744"), (r"\mathrm{e}", r"\mathrm{e}+1"), (r"\pi^4+\pi^5", "e^6"),
    ],
    "complex": [
        ("2i", "2"), ("i", "-i"), ("1+i", "1-i"), ("3+4i", "4+3i"), ("3+4i", "7i"), ("i^2", "1"), ("|3+4i|", "7"),
        ("i", "1"), (r"\sqrt{-4}", "-2"), ("5", "3+4i"), ("a+bi", "a+b"), ("0", "10^{-30}i"),
    ],
    "polynomial": [
        ("x^2+2x+1", "x^2+2x-1"), ("2x+3", "2x"), ("x^2", "x^3"), ("xy", "x+y"), ("3x-2y", "3y-2x"), ("x+1", "y+1"),
        ("2x", "x"), ("-x", "x"), ("x-y", "y-x"), ("x^2-5x+6", "x^2-5x-6"), ("x^{10}+x", "x^{10}"), ("x+10^{-20}", "x"),
    ],
    "factored": [
        ("(x+1)^2", "x^2+1"), ("(x-1)(x+1)", "x^2+1"), ("(x-2)(x-3)", "(x+2)(x+3)"), ("(x-2)(x-3)", "x-2, x-3"),
        ("(a+b)^3", "a^3+b^3"), ("(x+1)(x+2)", "(x+1)(x+3)"), ("(x-1)^2", "(x-1)"), ("2(x+1)(x+2)", "(x+1)(x+2)"),
        ("(x-2)(x-3)", "0"), ("(x+1)(x+2)", "(x+1)+(x+2)"), ("(x+1)^{10}", "(x+1)^{11}"), ("(x-1)(x-2)", "(1-x)(x-2)"),
    ],
    "rational function": [
        (r"\frac1x+\frac1y", r"\frac{2}{x+y}"), (r"\frac{x+1}{2}", r"x+\frac12"), (r"\frac{1}{1-x}", r"\frac{1}{x-1}"),
        (r"\frac{a}{b+c}", r"\frac ab+c"), (r"\frac{x}{x+1}", r"\frac{x+1}{x}"), (r"\frac{x}{y}", "x"),
        (r"\frac{1}{x+1}", r"\frac{1}{x+2}"), ("1/(x+1)", "1/x+1"), (r"\frac{1}{x^2}", r"\frac{1}{x}"),
        (r"\frac{x+10^{-15}}{x}", "1"), (r"\frac{2x}{3}", r"\frac{3x}{2}"), (r"\frac{1}{a}+\frac{1}{b}", r"\frac{1}{a+b}"),
    ],
    "trigonometric": [
        (r"\sin2", r"\cos2"), (r"\sec x", r"\csc x"), (r"\sin2x", r"2\sin x"), (r"\sin^2x", r"\sin x^2"),
        (r"\sin^{-1}x", r"\frac{1}{\sin x}"), (r"\sec x", "x"), (r"\arctan2", r"\arctan\frac12"), (r"\tan x", r"\tan y"),
        (r"\cos x", r"-\cos x"), (r"\sec", "c"), (r"\sin\pi", r"10^{-16}"), (r"\sin^2x+\cos^2x+x", "x"),
    ],
    "logarithm and exponential": [
        (r"\log_28", r"\log_82"), (r"\ln2", r"\ln3"), (r"\log_23", r"\log_32"), (r"\log6", r"\log2\cdot\log3"),
        (r"\ln2", "0.693"), (r"\log_2x", r"\log_3x"), (r"\ln(x+1)", r"\ln x+1"), ("e^x", "x^e"), ("e^{2x}", "2e^x"),
        (r"\ln x", "x"), (r"\log x", "logy"), (r"\ln x", "n x"),
    ],
    "absolute value and floor": [
        ("|x|", "x"), (r"\lfloor3.7\rfloor", "4"), (r"\lceil3.2\rceil", "3"), ("|-5|", "-5"), ("|x-1|", "|x+1|"),
        (r"\lfloor x\rfloor", "x"), ("|x|", "-x"), (r"\lfloor x\rfloor", r"\lceil x\rceil"), (r"\lfloor-0.5\rfloor", "0"),
        ("|x|+|y|", "|x+y|"), ("|x-1|", "x-1"), ("|a||b|", "a|b|"),
    ],
    "factorial and binomial": [
        ("5!", "5"), ("n!", "n"), ("3!!", "720"), (r"\binom52", r"\binom53+1"), (r"\binom52", r"\frac52"),
        ("(n+1)!", "n!+1"), ("100!", "101!"), ("5!", "5!!"), (r"\binom nk", r"\binom kn"), ("-5!", "(-5)!"),
        (r"\binom{5}{2}", "(5,2)"), ("1000!", "1000!+1"),
    ],
    "equation": [
        ("x+y=5", "5"), ("y=2x+1", "y=2x-1"), ("x^2+y^2=25", "x^2+y^2=5"), ("x^2+y^2=25", "x^2-y^2=25"),
        ("y=2x+1", "x=2y+1"), ("2x+3y=6", "3x+2y=6"), ("x^2=4", "x=2"), ("5", "2x=5"), ("c46+3=49", "49"),
        ("2x+4y-3=0", "2x+4y+3=0"), ("y=x^2", "y=x^3"), ("y=2x", "y=-2x"), ("x+y=0", "0"), ("2x+3y=6", "2x+3y"),
    ],
    "function and assignment": [
        ("x=5", "y=5"), ("5", "x+y=5"), ("x=5", "x=-5"), ("f(x)=2x+1", "f(x)=2x-1"), ("f(x)=2x+1", "2x"), ("f(3)=10", "3"),
        ("f(x)=x^2", "x"), ("x=2y", "y=2x"), ("x=5", "5x"), ("x=5", r"x\ne5"), ("x=5", "x>5"), ("x_1=5", "x_2=5"),
        ("f(3)=10", "f(10)=3"), ("x=1", "x=11"), ("x=5!", "5"),
    ],
    "chain of equalities": [
        ("x=2+3=5", "6"), ("x=2+3=5", "2"), ("x=2+3=5", "y=5"), (r"\frac{10}{2}=5", "10"), ("2^3=8", "2"), ("1+1=2", "1"),
        (r"\frac68=\frac34", "68"), ("a=b=5", "a=b=6"), (r"x = 3 = 5", "3"), (r"S=\frac{3\cdot4}{2}=6", "12"),
        (r"A=\pi\cdot3^2=9\pi", "9"), ("1=2=3=4=5", "1"),
    ],
    "inequality": [
        ("x>3", "x<3"), (r"x \le 3", "x<3"), ("3", "x>3"), (r"x\ge3", r"x\le3"), (r"0\le x<1", "(0,1)"),
        (r"0\le x<1", "[0,1]"), ("x>3", r"[3,\infty)"), ("x>3", "x>4"), (r"x\ne3", "3"), ("1<x<2", "1<x<3"),
        ("x>1 or x<0", "x>1 and x<0"), (r"x^2 > 4", "x > 2"),
    ],
    "interval": [
        ("[0,1)", "(0,1)"), ("[0,1]", "[0,1)"), ("(0,1]", "[0,1)"), ("[0,1)", "[0,2)"), (r"(0,\infty)", r"(-\infty,0)"),
        (r"(-\infty,2]", r"(-\infty,2)"), ("[0,1)", "0,1"), (r"(0,\infty)", "0"), ("[0,1]", r"\{0,1\}"), ("[1,2]", "[2,1]"),
        ("[0.5, 1]", "[0, 5.1]"), (r"\mathbb{R}", r"\mathbb{Z}"),
    ],
    "union": [
        (r"(1,2)\cup(3,4)", r"(1,2)\cap(3,4)"), (r"(1,2)\cup[3,4]", r"(1,2)\cup(3,4)"), (r"(1,2)\cup(3,4)", "(1,2)"),
        (r"(1,2)\cup(3,4)", "(1,2),(3,5)"), (r"(-\infty,0)\cup(1,\infty)", "(0,1)"),
        (r"(-\infty,0)\cup(1,\infty)", r"(-\infty,1)\cup(0,\infty)"), (r"[0,1]\cup\{2\}", r"[0,1]\cup\{3\}"),
        (r"(0,1)\cup(1,2)", "(0,2)"), (r"(-\infty,0)\cup(0,\infty)", r"\mathbb{R}"), (r"A\cup B", r"A\cap B"),
        (r"(1,2)\cup(3,4)\cup(5,6)", r"(1,2)\cup(3,4)"), (r"[1,2]\cup[3,4]", r"[1,4]"),
    ],
    "infinity": [
        (r"\infty", r"-\infty"), (r"\infty", "10^{100}"), (r"\infty", "8"), (r"\infty", r"\text{DNE}"), (r"\infty", "0"),
        (r"-\infty", "-1"), (r"\infty", r"\text{undefined}"), (r"\infty-\infty", "0"), (r"\frac{\infty}{\infty}", "1"),
        (r"\infty", r"\pm\infty"), (r"(0,\infty)", r"\infty"), (r"\infty", "1/0"),
    ],
    "list": [
        ("1,2", "1,2,3"), ("1,1", "11"), ("1,2", "1,3"), ("1,2", "12"), ("1,2", "1"), ("1,2", "2"), ("1,2", "3"),
        ("1,2", "1.2"), ("5", "1, 2, 3, 4, 5"), ("5", "5, 6"), ("5", "5 or 6"), ("1,000", "1, 000"),
    ],
    "set": [
        (r"\{1,2\}", "(1,2)"), (r"\{1,2\}", r"\{1,2,3\}"), (r"\emptyset", r"\{0\}"), (r"\emptyset", "0"),
        (r"\emptyset", r"\{\emptyset\}"), (r"\{(1,2)\}", r"\{1,2\}"), (r"\{1,2\}", r"\{\{1,2\}\}"), (r"\{1,2\}", r"\{12\}"),
        (r"\{1,2\}", "[1,2]"), (r"\{1,2\}", r"\{1,-2\}"), (r"\{1,2,\ldots,10\}", r"\{1,2,\ldots,9\}"),
        (r"\{1,2,3\}", r"\{1,3\}"),
    ],
    "tuple": [
        ("(1,2)", "1,2"), ("(1,2)", "(2,1)"), ("1", "(0, 1)"), ("(1,(2,3))", "((1,2),3)"), ("(1,2)", "(1,2,2)"),
        ("(1,2)", "1.2"), ("(1,2)", "12"), ("(x,y)=(1,2)", "(2,1)"), ("(1,2)", "(1,-2)"), ("(1,2,3)", "(1,2)"),
        ("(1,2)", "(1.2)"), ("(3,4)", "5"),
    ],
    "list of tuples": [
        ("(1,2),(3,4)", "(2,1),(4,3)"), ("(1,2),(3,4)", "(1,3),(2,4)"), ("(1,2),(3,4)", "(1,2)"), ("(1,2),(3,4)", "1,2,3,4"),
        ("(0,1),(1,0)", "(0,1),(0,1)"), ("(1,2),(3,4)", "(1,2,3,4)"), ("(1,2),(3,4)", "(1,2),(3,5)"),
        ("(1,2),(3,4)", "((1,2),(3,4)),5"), ("(1,2)", "(1,2),(1,3)"), (r"(\pm1,2)", "(1,2)"), ("(1,2),(3,4)", "(4,6)"),
    ],
    "named values": [
        ("x=1,y=2", "x=2,y=1"), ("x=1,y=2", "x=1"), ("x=1,y=2", "a=1,b=2"), ("x=1,y=2", "x=1,y=-2"),
        ("a=1,b=2,c=3", "a=1,b=2"), ("x=1,y=2", "x=1,z=2"), ("x=1,y=2", "y=2"), ("x=1,y=2", "2"), ("x=1, y=2", "x=12"),
        ("(x,y)=(1,2)", "x=2,y=1"), (r"x=1\text{ and }y=2", "x=1,y=3"), ("x=1, x=2", "x=1, y=2"),
    ],
    "plus-minus": [
        (r"\pm2", "2"), (r"\pm2", "-2"), (r"1\pm\sqrt5", r"1+\sqrt5"), (r"1\pm\sqrt5", r"1\pm\sqrt6"), (r"\pm2", r"\pm3"),
        (r"\pm2", "4"), (r"\pm1,2", "1,-1,2,-2"), (r"\pm2", "0"), (r"\frac{3\pm\sqrt5}{2}", r"\frac{3\pm\sqrt5}{3}"),
        (r"1\pm2", "1,2"), (r"1\pm\sqrt5", r"\pm1+\sqrt5"), (r"2\pm3", r"3\pm2"),
    ],
    "matrix": [
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^2T", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}T"),
        (M, r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"), (M, r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"),
        (M, r"\begin{pmatrix}1&2&3&4\end{pmatrix}"), (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", M),
        (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", "2"), (M, "1,2,3,4"), (M, "-2"),
        (M, r"2\begin{pmatrix}1&2\\3&4\end{pmatrix}"), (r"\begin{pmatrix}1&0\\0&1\end{pmatrix}", "1"),
        (r"\begin{pmatrix}12\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        (M, r"\begin{pmatrix}1&2\\3&4\\0&0\end{pmatrix}"), (M, r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^2"),
    ],
    "vector": [
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
        (r"2\mathbf i-3\mathbf j", r"2\mathbf i+3\mathbf j"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\\0\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\{1,2\}"), (r"\langle1,2\rangle", r"\langle2,1\rangle"),
        (r"2\vec a", r"2\vec b"), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\frac12"),
        (r"\begin{pmatrix}5\end{pmatrix}", r"\begin{pmatrix}5\\5\end{pmatrix}"),
    ],
    "text": [
        (r"\text{yes}", r"\text{no}"), ("True", "False"), (r"\text{even}", "odd"), (r"\text{Evelyn}", "Eve"),
        ("not odd", "odd"), (r"\text{possible}", r"\text{not possible}"), ("Ann", "Anna"), (r"\text{no solution}", "0"),
        (r"\text{no solution}", "solution"), (r"\text{east}", r"\text{west}"), ("x", "X"), (r"\text{line 3}", "3"),
    ],
    "choice": [
        ("A", "B"), ("(A)", "(B)"), (r"\text{A}", r"\text{B}"), ("A", "A, B"), ("(A)", "1"), (r"\text{A}", r"\text{AB}"),
        ("A", "(A,B)"), (r"\textbf{(C)}", "D"), ("A,C", "A,B"), ("A", "A or B"),
        (r"\text{(A)}", r"\text{(A), (B), (C), (D), (E)}"), ("ABCDE", "A"),
    ],
    "based number": [
        ("101_2", "101_3"), ("101_2", "101"), ("101_2", "5"), ("101_2", "110_2"), ("2A3_{16}", "2B3_{16}"),
        ("101_2", "1012"), ("101_2", "101_{20}"), ("1010_2", "101_2"), ("101_2", "101^2"), ("101_{10}", "5"),
        ("101_2", "-101_2"), ("4210_5", "4210_6"),
    ],
    "clock time": [
        ("4:30", "4.30"), (r"9\text{ a.m.}", r"9\text{ p.m.}"), ("4:30 p.m.", "4:30 a.m."), ("4:30", "4:31"),
        ("4:30", "4.5"), ("4:30", "430"), ("12:00 a.m.", "12:00 p.m."), ("4:30 p.m.", "2:15 p.m."),
        (r"4:30\text{ p.m.}", "4"), ("4:30", "30"), ("10:45", "10:54"), ("1:20:30", "1:20:31"),
    ],
    "ratio": [
        ("1:2", "12"), ("3:4", "4:3"), ("3:4", "3:5"), ("1:2:3", "1:2"), ("1:2:3", "1:3:2"), ("3:4", "34"), ("1:2", "1.2"),
        ("1:2", "1,2"), ("3:4", "3"), (r"1:\sqrt2", r"1:\sqrt3"), ("3:4", "0:0"), ("1:2:3", "1:23"),
    ],
    "date": [
        (r"\text{June 20}", "20"), ("June 20", "June 21"), ("June 20", "July 20"),
        (r"\text{June 20, 2020}", "June 20, 2021"), ("Monday", "Tuesday"), ("1/2/2020", "2/1/2020"), ("June 20", "June 2"),
        ("June 20", "June"), ("2020-06-20", "2020-06-02"), ("4 July 1776", "4 July 1767"),
        (r"\text{March 5}", r"\text{May 5}"),
    ],
    "repeating decimal": [
        (r"0.\overline{3}", r"0.\overline{4}"), (r"0.\overline3", "0.3"), (r"0.\overline3", "0.33"),
        (r"0.\overline3", r"0.\overline{34}"), (r"0.\overline3", "0"), (r"0.\overline3", "3"),
        (r"0.\overline3", r"0.0\overline3"), (r"0.\overline{12}", r"0.1\overline2"),
        (r"0.\overline{142857}", r"0.\overline{142858}"), (r"0.\overline9", "0.9"), (r"0.1\overline6", r"0.\overline{16}"),
        (r"0.\overline{3}", "1/3+10^{-20}"),
    ],
    "unicode": [
        ("x²", "x2"), ("x²", "x³"), ("√3", "3"), ("½", "2"), ("½", "12"), ("2½", "1"), ("π", "3.14"), ("5²", "52"),
        ("√12", "√1·2"), ("10⁻³", "10³"), ("½x", "12x"), ("2^½", "2½"),
    ],
    "spacing and notation": [
        (r"\left(x+1\right)^2", "x+1^2"), (r"x\,y", "x+y"), ("x y", "x,y"), (r"\frac{1}{2} 3", r"\frac{1}{2}"),
        (r"{x+1}", "x"), (r"a_{12}", "a_1"), (r"x^{2}y", "x^{2y}"), (r"x'", "x"), (r"x_1 2", "x_{12}"),
        (r"\mathrm{lcm}(4,6)", r"\gcd(4,6)"), (r"\ell", "l+1"), (r"\color{red}{7}", r"\color{red}{8}"),
    ],
    "unread tail": [
        (r"3\pmod7", r"4\pmod7"), (r"3\pmod7", r"3\pmod5"), (r"x\equiv3\pmod7", r"x\equiv3\pmod5"),
        (r"\sum_{k=1}^{10}k", r"\sum_{k=1}^{11}k"), ("5+C", "5"), ("x^2+C", "x^2"), ("x^2+C", "x^3+C"), ("5!!", "5"),
        (r"5\text{ remainder }2", "5"), (r"5\text{ or more}", "5"), (r"\text{at least }5", "5"), ("f'(x)", "f(x)"),
        (r"\hat x", r"\hat y"), ("a_1", "a"), ("a_1", "a_2"), ("x'", "x"), (r"5\foo", "5"), (r"5^{+}", "5"),
        (r"1+2+\cdots+n", "1+2"), (r"\int_0^1x\,dx", r"\int_0^2x\,dx"), (r"1,2,\ldots", "1,2"),
        (r"1+2+\cdots+n", r"1+2+\cdots+m"), (r"5 \text{ R } 2", "5"), ("5 mod 3", "5"), (r"5 \to 6", "5"), ("5 @ 3", "5"),
        ("5 & 6", "5"), ("5 # 6", "5"), (r"5 \\ 6", "5"), (r"\triangle ABC", r"\triangle ABD"), ("5 ] 6", "5"),
        ("5 -> 6", "5"), (r"\sum_{k=1}^{10} k", "k"), (r"\phantom{1}2", "12"),
    ],
    "beyond the caps": [
        ("9" * 9000, "9" * 8999 + "8"), ("1e999999999", "1e999999998"), ("x" * 20_000, "y" * 20_000),
        ("999999999!", "999999998!"), ("9^{9^{9^9}}", "9^{9^{9^8}}"), ("1" + "0" * 400, "1" + "0" * 401),
        ("10^{10^{10}}", "10^{10^{10}}+1"), ("0." + "0" * 400 + "1", "0"), ("2^{99999}", "2^{99998}"),
        ("1." + "0" * 4000 + "1", "1"), (r"\frac{1}{9^{9^9}}", "0"), ("(1+10^{-400})^2", "1"),
    ],
    "found by attack": [
        (r"0^\circ<x<90^\circ", r"0^\circ<x<80^\circ"), (r"x>90^\circ", r"x>80^\circ"), (r"x<20\%", r"x<30\%"),
        ("(0,0)", "(5,5]"), ("(2,2)", "[7,7)"), ("(3,3)", r"x<0 \text{ and } x>1"), ("|x-5|<3", "x>2"),
        (r"|x-5|\le3", r"x\ge2"), ("|x-5|>3", "x<2"), (r"x>0 \text{ and } y<5", r"y>0 \text{ and } x<5"),
        (r"x<1 \text{ or } y>3", r"y<1 \text{ or } x>3"), (r"\text{-5 dollars}", r"\text{5 dollars}"),
        ("5 million", "-5 million"), (r"\text{n-1 ways}", r"\text{n+1 ways}"), ("n ways", "n! ways"),
        (r"\text{all x < 3}", r"\text{all x > 3}"), (r"\text{at least -5}", r"\text{at least 5}"), ("1:2:3", "0:0:0"),
        ("0:1:2", "0:3:7"), ("0", "I(0)"), ("I(0)e^{-kt}", "N(0)e^{kt}"), ("V(1)", "V"), ("y_1=x", "y_2=x"),
        ("a_n=2n+1", "a_{n+1}=2n+1"), ("f(x)=2x", "f(x+1)=2x"), ("f(x)=2x", "f'(x)=2x"), ("f(x)=2x", "g(x)=2x"),
        (r"x=3 \quad y=4", r"x=7 \quad y=4"), (r"x=3\ y=4", r"x=5\ y=4"), ("y=2, x=1", "(2,1)"), ("xyz", "XYZ"),
        ("AB", r"\text{ab}"), ("BAC", "CAB"), ("no", "on"), (r"5\text{ plus 2}", "5"), (r"5\text{ minus x}", "5"),
        (r"3\text{ halves}", "3"), (r"5\text{ sixths}", "5"), (r"5\text{ out of 6}", "5"), (r"5\text{ mod 7}", "5"),
        (r"5 \text{ (or 6)}", "5"), (r"5\text{ maybe}", "5"), ("y=1.4142135624", r"x=\sqrt2"),
        ("x+y=1.4142135624", r"\sqrt2"), ("1000000000.0", "10^9+0.04"), ("1.0000000000", "1+10^{-20}"),
        (r"2x \equiv 3 \pmod 5", r"2x \equiv 3 \pmod 7"), (r"2x=10\text{ cm}", r"2x=10\text{ m}"),
        (r"(0,5\text{ m}]", r"(0,5\text{ cm}]"), (r"\tanh 100", "1"), (r"\sinh 200", r"\cosh 200"),
        (r"1+\exp(-200)", "1"), (r"x+\exp(-100)", "x"), (r"\arctan(\exp(100))", r"\frac\pi2"),
        (r"\pi+\frac1{99!!}", r"\pi"), ("e", r"\sum_{k=0}^{100}\frac1{k!}"), ("|ac|+b", "ac+b"),
        (r"\frac{xz}{|xz|}+y", "1+y"), ("|x+100|", "x+100"), ("|x-50|", "50-x"), (r"\min(x,1000)", "x"),
        ("x>2^{300}", "x>2^{300}+1"), ("[0,10^{100}]", "[0,10^{100}+1]"), (r"(1,\infty]", r"(1,\infty)"),
        (r"\int_0^1 x dt", r"\int_0^1 t dx"), (r"1+2+\cdots+10", r"3+\cdots+10"), (r"\ln_2 8", r"\ln 8"),
        ("1, 2_3", "12_3"), ("16:25", "4:25"), ("24:30", "12:30"), (r"\infty", r"\infty+1"), ("0", r"1/\infty"),
        (r"p \land q", r"p \lor q"), (r"x \in A", "x = A"), ("2^3^2", "64"), (r"2\cdot3\frac12", "3"),
        ("(1,000)", "(1,0)"), ("5 .5", "5.5"), ("5, 5", "5"), ("x<1 or x>3 and x<5", "x<1 and x>3 or x<5"),
        (r"\ln x=5", "5"), (r"\sin x = 2", "2"), ("f(10^{30})", "f(10^{30}+1)"), (r"\log 8", "log2(3)"),
        (r"3\frac{1}{2}'", "3"), (r"m^\circ<90^\circ", "m<80"), (r"\frac{dy}{dx}", r"\frac yx"), ("A", "(A) and (B)"),
        ("A", "(A) or (C)"), ("A", "A:B"), ("C", "(D) 12"), ("C", "(A, C)"),
        ("2abx", "2"), ("4axy", "4"), ("2lwh", "2"), ("5mgh", "5"), ("5xzy", "5"),
        (r"\text{(a) } 3 \text{ (b) } 1", r"\text{(a) } 1 \text{ (b) } 3"), ("(a) 3 (b) 1", "(a) 1 (b) 3"),
        (r"\begin{cases}1, & x>0\\2, & x<0\end{cases}", r"\begin{cases}2, & x>0\\1, & x<0\end{cases}"),
        (r"\begin{cases}1 & x>0\\2 & x<0\end{cases}", r"\begin{cases}3 & x>0\\5 & x<0\end{cases}"),
        (r"\frac{x-1}{2}=\frac{y-2}{3}=\frac{z-3}{4}", r"\frac{x+5}{7}=\frac{y}{9}=\frac{z-3}{4}"),
        ("2x=3y=6z", "5x=7y=6z"), ("x=y=z", "x=z"), ("x=y=z", "x=-y=z"), ("x=y=2", "x=2"),
        (r"x=1, y=2 \text{ or } x=2, y=1", r"x=1, y=1 \text{ or } x=2, y=2"),
        ("x=1 and y=2 or x=2 and y=1", "x=1 and y=1 or x=2 and y=2"), ("x=1,y=2,x=2,y=1", "x=1,y=1,x=2,y=2"),
        ("|x|+|x-1|", "|2x-1|"), ("|x^2-x|", "x^2-x"), (r"\max(x,x^2)", "x^2"), ("|x-3|+|x-5|", "|2x-8|"),
        ("|x+1|+|x+2|", "|2x+3|"), ("|x-1000000|", "1000000-x"), (r"\lfloor x+0.0001\rfloor", r"\lfloor x\rfloor"),
        ("1<2", "3<5"), (r"2^{30}\ne3^{20}", r"1\ne2"), ("16:30", "4:30 a.m."), ("13:00", "1:00 am"),
        (r"f\circ g", r"g\circ f"), ("HT", "TH"), (r"\{HT, HH\}", r"\{TH, HH\}"),
        (r"x=\frac{1}{2}\ y=4", r"x=\frac{1}{3}\ y=4"), ("x=1, y=2", "x=1, 2"), ("x=1, y=2", "x=2, 1"),
        (r"5\text{ sixteenths}", "5"), (r"3\text{ bn}", "3"), (r"5\text{ by six}", "5"),
        ("3.14159265358979323900000000", r"\pi"), (r"3 \in \{1,2,3\}", r"4 \in \{1,2,3\}"),
        (r"\text{It is not: }5", "5"), ("1.4142135623730951", r"\infty"), (r"\{\{1\},\{2\}\}", r"\{1,2\}"),
        (r"\{\{1\}\}", r"\{1\}"), (r"(\{1\},\{2\})", "(1,2)"), (r"\{2,1\}", "x=1, y=2"), ("(-1)^n", "-1^n"),
        ("f(x)=2x", "x=2x"),
    ],
}
# fmt: on

EXTRACTED = {
    "toy response": ("b41+5=46\nc46+3=49\n####49", "49"),
    "gsm8k solution": ("She has 48+24 = <<48+24=72>>72 clips.\n#### 72", "72"),
    "gsm8k money": ("#### $1,234.", "1,234"),
    "last ####": ("#### 3\nNo, wait.\n#### 4\nDone.", "4"),
    "#### with CRLF": ("So it is.\r\n#### 72\r\n", "72"),
    "#### before a template token": ("#### 72<|im_end|>", "72"),
    "#### and a minus": ("#### -3", "-3"),
    "nested braces": (r"so $\boxed{\frac{1}{\sqrt{2}}}$ holds", r"\frac{1}{\sqrt{2}}"),
    "deeply nested braces": (r"\boxed{\frac{1}{1+\frac{1}{1+\frac{1}{2}}}}", r"\frac{1}{1+\frac{1}{1+\frac{1}{2}}}"),
    "escaped braces": (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    "fbox": (r"\fbox{5}.", "5"),
    "box without braces": (r"The result is $\boxed 3$.", "3"),
    "box with a blank before the brace": (r"The result is $\boxed {3}$.", "3"),
    "box in a box": (r"\boxed{\boxed{5}}", "5"),
    "box in display math": ("Therefore\n\\[\n\\boxed{42}\n\\]\n", "42"),
    "box in dollars": (r"$$\boxed{x^2+1}$$", "x^2+1"),
    "box in bold": (r"**\boxed{18}**", "18"),
    "box with blanks": (r"\boxed{ 42 }", "42"),
    "box of text": (r"Thus $\boxed{\text{(A)}}$.", r"\text{(A)}"),
    "box of a tuple": (r"\boxed{(0, 1)}", "(0, 1)"),
    "box of a matrix": (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    "box with a unit": (r"\boxed{5\text{ cm}^2}", r"5\text{ cm}^2"),
    "unit behind the box": (r"It is $\boxed{20}$ percent of them.", "20"),
    "template token behind the box": (r"It is \boxed{20}.<|im_end|>", "20"),
    "box goes before ####": ("\\boxed{5}\n#### 6", "5"),
    "box goes before the answer is": (r"The answer is 6. \boxed{5}", "5"),
    "last box decides": (r"\boxed{3}, so that $x = \boxed{5}$", "5"),
    "last box decides over sentences": ("\\boxed{3}. This is wrong.\n\nSo it is \\boxed{5}.", "5"),
    "boxes joined by and": (r"$\boxed{3}$ and $\boxed{5}$", "3, 5"),
    "boxes joined by or": (r"\boxed{3} or \boxed{\frac{2}{5}}.", r"3, \frac{2}{5}"),
    "boxes joined by a comma": (r"$\boxed{3},\boxed{5}$", "3, 5"),
    "boxes joined by commas": (r"\boxed{1}, \boxed{2},\text{ and }\boxed{3}", "1, 2, 3"),
    "boxes joined in text": (r"\boxed{1}\text{ or }\boxed{2}", "1, 2"),
    "only joined boxes are joined": (r"\boxed{9} gives \boxed{1} and \boxed{2}", "1, 2"),
    "empty box is no answer": (r"The box \boxed{} is to hold the answer: 4", "4"),
    "unterminated box": (r"so we get \boxed{\frac{1}{2}", r"\frac{1}{2}"),
    "unterminated box behind another": (r"\boxed{3} or rather \boxed{4", "3"),
    "the answer is": ("The answer is $\\frac{1}{2}$.\n", r"\frac{1}{2}"),
    "the answer is, with CRLF": ("The answer is 5.\r\nThanks.\r\n", "5"),
    "the answer is, before a template token": ("So the answer is 5.<|im_end|>", "5"),
    "the answer is, twice": ("The answer is 3. No, the answer is 4.", "4"),
    "a sentence behind the answer": ("The final answer is 5. I hope it is correct.", "5"),
    "final answer": ("Final Answer: The final answer is $x^2$. I hope it is correct.", "x^2"),
    "final answer in bold": ("**Final Answer:** $\\sqrt{2}$", r"\sqrt{2}"),
    "the answer is a choice": ("So the answer is (C).", "(C)"),
    "the answer is a thousand": ("Hence the answer is 1,234.5.", "1,234.5"),
    "leading point": ("Therefore the answer is .5", ".5"),
    "bold answer": ("**Answer:** 18", "18"),
    "answer in the next line": ("Answer:\n18", "18"),
    "A:": ("Q: what is two times nine?\nA: 18", "18"),
    "bare answer": ("(0, 1)", "(0, 1)"),
    "bare words": ("June 20", "June 20"),
    "last math segment": ("First $x = 3$, and then we get $y = 7$ as well.", "y = 7"),
    "last math segment in brackets": ("We know \\(x = 3\\), therefore\n\\[ y = 7 \\]\nwhich was to be found.", "y = 7"),
    "last math segment in double dollars": ("We know that $x = 3$. It follows that\n$$y = 7$$\nas was claimed.", "y = 7"),
    "money is not math": ("She paid $5 for it and then $18.", "18"),
    "last number": ("He has 3 cats, and they weigh 1,234.5 kg in total", "1,234.5"),
    "last number of a sentence": ("So in the end there are 42.", "42"),
    "percentage": ("In the end it is more than before by 20%.", "20%"),
    "negative number": ("the temperature was then -7", "-7"),
    "minus between numbers": ("we can compute it as 9-7", None),
    "no answer": ("I do not know.", None),
    "empty": ("", None),
    "blank": (" \n\t ", None),
}

# Answers that are not worth computing, each with one that is not equal to it, or is no answer at all.
CELLS = [[str(i * j) for j in range(300)] for i in range(300)]
MATRIX = r"\begin{pmatrix}" + r"\\".join("&".join(row) for row in CELLS) + r"\end{pmatrix}"
FACTORS = "".join(f"(x+{i})" for i in range(1, 500))
PRIMES = [p for p in range(2, 100) if all(p % q for q in range(2, p))]
ROOTS = "+".join(rf"\sqrt{{{p}}}" for p in PRIMES[:-1])
CYCLE = "".join(str(i % 10) for i in range(4999))
HOSTILE = {
    "tower": ("9^{9^{9^9}}", "9^{9^{9^8}}"),
    "plain tower": ("9^9^9^9^9", "9^9^9^9^8"),
    "high tower": ("2^{" * 500 + "2" + "}" * 500, "2^{" * 501 + "2" + "}" * 501),
    "tower of variables": ("x^{" * 100 + "x" + "}" * 100, "x^{" * 101 + "x" + "}" * 101),
    "tower of e": ("e^{e^{e^{e^{e}}}}", "e^{e^{e^{e^{3}}}}"),
    "tower in a fraction": (r"\frac{1}{9^{9^{9^9}}}", "0"),
    "tower under a sine": (r"\sin(9^{9^{9^9}})", "0"),
    "power": ("10^{10^{10}}", "10^{10^{10}}+1"),
    "power of 9s": ("9^{" + "9" * 5000 + "}", "9^{" + "9" * 4999 + "8}"),
    "powers multiplied": (r"2^{1000000} \cdot 3^{1000000}", "6^{1000000}+1"),
    "exponent": ("1e" + "9" * 3000, "1e" + "9" * 2999 + "8"),
    "complex power": ("(1+2i)^{1000000}", "(2+i)^{1000000}"),
    "factorials of factorials": ("100!!!", "100!"),
    "a thousand factorials": ("5" + "!" * 1000, "5"),
    "factorial": ("9999999!", "9999998!"),
    "bracketed factorials": ("((99!)!)!", "((98!)!)!"),
    "binomial": (r"\binom{1000000000}{500000000}", r"\binom{1000000000}{499999999}"),
    "gamma": (r"\Gamma(10^{10})", r"\Gamma(10^{10}+1)"),
    "huge root": (r"\sqrt[1000000000]{2}", r"\sqrt[1000000000]{3}"),
    "huge root in a power": (r"\sqrt[10^9]{2}", "1"),
    "braces": ("{" * 100_000 + "5" + "}" * 100_000, "6"),
    "parentheses": ("(" * 20_000 + "5" + ")" * 20_000, "6"),
    "short parentheses": ("(" * 900 + "x+1" + ")" * 900, "x+2"),
    "fractions": (r"\frac{1}{" * 5000 + "2" + "}" * 5000, "5"),
    "short fractions": (r"\frac{1}{1+" * 200 + "2" + "}" * 200, "5"),
    "square roots": (r"\sqrt{" * 3000 + "2" + "}" * 3000, "3"),
    "nested sums in roots": (r"\sqrt{2+" * 200 + "2" + "}" * 200, r"1+\sqrt{2+" * 200 + "2" + "}" * 200),
    "minus signs": ("-" * 50_001 + "1", "1"),
    "few minus signs": ("-" * 999 + "x", "x"),
    "plus signs": ("+" * 50_000 + "1", "2"),
    "left": (r"\left(" * 5000 + "5", "6"),
    "environments": (r"\begin{pmatrix}" * 3000, "6"),
    "sets in sets": (r"\{" * 2000 + "5" + r"\}" * 2000, "6"),
    "subscripts": ("x_{" * 3000 + "5" + "}" * 3000, "x"),
    "sines": (r"\sin(" * 500 + "1" + ")" * 500, r"\sin(" * 499 + "1" + ")" * 499),
    "bare sines": (r"\sin " * 500 + "x", r"\cos " * 500 + "x"),
    "digits": ("7" * 2_000_000, "7" * 1_999_999 + "8"),
    "digits within the limits": ("7" * 9000, "7" * 8999 + "8"),
    "digits below a bar": ("1/" + "7" * 9000, "1/" + "7" * 8999 + "8"),
    "long decimal": ("0." + "3" * 5000, r"\frac{1}{3}+10^{-5000}"),
    "long decimals": ("0." + "3" * 5000, "0." + "3" * 4999 + "4"),
    "repeating decimals": (rf"0.\overline{{{CYCLE}1}}", rf"0.\overline{{{CYCLE}2}}"),
    "repeating decimal and a fraction": (rf"0.\overline{{{CYCLE}1}}", r"\frac{1}{81}"),
    "base": ("101_{" + "9" * 5000 + "}", "101_{" + "9" * 4999 + "8}"),
    "digits in a base": ("1" * 5000 + "_{36}", "1" * 5000 + "_{35}"),
    "boxes": (r"\boxed{" * 100_000, "5"),
    "boxes with an answer": (r"\boxed{5" * 50_000, "6"),
    "NUL": ("5\0" * 1000, "6"),
    "surrogates": ("\ud800" * 1000, "5"),
    "a surrogate and an answer": ("\udfff5\ud800", "6"),
    "display math": (r"\[" * 50_000, "5"),
    "blanks": (" " * 100_000 + "x" + " " * 100_000, "5"),
    "commas": ("," * 100_000, "5"),
    "numbers and commas": ("1," * 50_000, "1"),
    "text": (r"\text{" * 50_000, "5"),
    "dollars": ("$" * 99_999, "5"),
    "backslashes": ("\\" * 99_999, "5"),
    "cells": ("&" * 50_000 + r"\\" * 50_000, "5"),
    "superscripts": ("x" + "²" * 5000, "x"),
    "fractions in unicode": ("½" * 9000, r"\frac12"),
    "units": ("5" + r"\text{ cm}" * 1000, "6"),
    "template tokens": ("5" + "<|im_end|>" * 20_000, "6"),
    "chain": ("1=" * 4000 + "2", "1"),
    "chain of inequalities": ("x<" * 2000 + "x", "x"),
    "list": (",".join(map(str, range(5000))), ",".join(map(str, range(5000, 0, -1)))),
    "list of sums": (",".join(f"x+{i}" for i in range(999)), ",".join(f"{i}+x" for i in range(999, 0, -1))),
    "set": (r"\{" + ",".join(rf"\sqrt{{{i}}}" for i in range(300)) + r"\}", r"\{" + "x," * 299 + r"x\}"),
    "tuples": ("(1,2)," * 1500 + "(1,2)", "(1,2)," * 1500 + "(2,1)"),
    "unions": (r"\cup".join(f"({2 * i},{2 * i + 1})" for i in range(900)), r"\cup".join(["(0,1)"] * 900)),
    "200 times plus-minus": (r"\pm1" * 200, r"\pm1" * 199),
    "20 times plus-minus": (r"\pm x" * 20, r"\pm y" * 20),
    "list of plus-minus": (",".join(rf"\pm {i}\pm\sqrt{{{i}}}" for i in range(500)), "1,2"),
    "matrix": (MATRIX, MATRIX[:-20] + "9" + MATRIX[-20:]),
    "determinant": (MATRIX.replace("pmatrix", "vmatrix"), "5"),
    "power of a matrix": (rf"{M}^{{1000000000}}", M),
    "factors": (FACTORS + "(x+500)", FACTORS + "(x+501)"),
    "power of a sum": ("(x+y+z)^{500}", "(x+y+z)^{499}(x+y-z)"),
    "power of a sum and one": ("(1+x)^{1000000}", "(1+x)^{1000000}+1"),
    "power of many variables": ("(a+b+c+d+e+f+g+h+k+l)^{40}", "(a+b+c+d+e+f+g+h+k-l)^{40}"),
    "many variables": ("+".join(f"x_{{{i}}}" for i in range(900)), "+".join(f"x_{{{i}}}" for i in range(1, 901))),
    "sum of fractions": ("+".join(rf"\frac{{1}}{{{i}}}" for i in range(1, 600)), r"\ln 600"),
    "sum of roots": (ROOTS + r"+\sqrt{97}", ROOTS + r"+\sqrt{98}"),
    "sine of a huge number": (r"\sin(10^{1000})", r"\sin(10^{1000}+1)"),
    "integral": (r"\int_0^{\infty} e^{-x^2} \sin(x^x)\,dx", "5"),
    "sum": (r"\sum_{k=1}^{10^{12}} \frac{1}{k^2}", r"\frac{\pi^2}{6}"),
    "product": (r"\prod_{k=1}^{10^9} (x+k)", "x"),
    "limit": (r"\lim_{n\to\infty} \left(1+\frac{1}{n}\right)^{n^n}", "e"),
    "remainder": (r"9^{9^{9^9}} \bmod 7", "5"),
    "logarithm": (r"\log_{1}{5}", "5"),
    "tangent of a right angle": (r"\tan 90^\circ", "0"),
    "zero to a tower": (r"0^{9^{9^9}}", "1"),
    "division by zero": (r"\frac{x}{(x+1)^2-x^2-2x-1}", "x"),
}
# Equal, but nobody has to see it: the verdict is to come in time, and may say that it did not.
DEMANDING = {
    "factors in another order": (FACTORS, "".join(f"(x+{i})" for i in range(499, 0, -1))),
    "list in another order": (",".join(map(str, range(5000))), ",".join(map(str, range(4999, -1, -1)))),
    "list of roots": (",".join(rf"\sqrt{{{4 * i}}}" for i in range(500)), ",".join(rf"2\sqrt{{{i}}}" for i in range(500))),
    "expansion": ("(x+y+z)^{60}", "(x+y+z)^{30}(x^2+y^2+z^2+2xy+2yz+2zx)^{15}"),
    "roots in another order": (ROOTS, "+".join(rf"\sqrt{{{p}}}" for p in reversed(PRIMES[:-1]))),
    "nested radicals": (r"\sqrt{16-2\sqrt{29}+2\sqrt{55-10\sqrt{29}}}", r"\sqrt{22+2\sqrt5}-\sqrt{11+2\sqrt{29}}+\sqrt5"),
    "cosines": (r"\cos\frac{\pi}{11}" * 40, r"(\cos\frac{\pi}{11})^{40}"),
    "telescope": (r"\sum_{k=1}^{99999} \frac{1}{k(k+1)}", r"\frac{99999}{100000}"),
}
# Too much for strings and rational numbers: with these the expensive part of the grader has to work.
HARD = [
    (r"\sqrt{5+2\sqrt6}", r"\sqrt2+\sqrt3", True),
    (r"\sin^2 x+\cos^2 x + x", "x+1", True),
    (r"\sqrt{5+2\sqrt6}", r"\sqrt2+\sqrt5", False),
    (r"\cos\frac{\pi}{5}", r"\frac{1+\sqrt5}{4}", True),
    (r"\log_2 3", r"\frac{\ln 3}{\ln 2}", True),
    (r"e^{i\pi/3}", r"\frac{1-i\sqrt3}{2}", False),
]
GOOD = "Thus $\\boxed{0.5}$."


def cases(table):
    return [pytest.param(a, b, id=f"{kind} {i}") for kind, pairs in table.items() for i, (a, b) in enumerate(pairs)]


@pytest.mark.parametrize("a, b", cases(EQUAL))
def test_equal_answers_match_both_ways_bare_and_boxed(a, b):
    assert grade(a, b) and grade(b, a)
    assert grade(a, f"So it is $\\boxed{{{b}}}$.") and grade(f"Hence \\boxed{{{b}}}", a)


@pytest.mark.parametrize("a, b", cases(DIFFERENT))
def test_near_misses_do_not_match_either_way(a, b):
    assert not grade(a, b) and not grade(b, a)
    assert not grade(a, f"So it is $\\boxed{{{b}}}$.") and not grade(b, f"Hence \\boxed{{{a}}}")


def test_every_kind_of_answer_has_equal_pairs_and_near_misses():
    assert list(EQUAL) == list(DIFFERENT) and len(EQUAL) >= 32
    assert sum(map(len, [*EQUAL.values(), *DIFFERENT.values()])) >= 560


def test_every_answer_equals_itself():
    answers = {a for table in (EQUAL, DIFFERENT) for pairs in table.values() for pair in pairs for a in pair}
    assert [a[:50] for a in sorted(answers) if a and not grade(a, a)] == []


CHAT = [  # gold, and a response as chat models write it
    ("x+1", "Thus, the answer is:\n\n\\[\nx+1\n\\]"),
    ("x+1", "Answer:\n```\nx+1\n```"),
    (r"2\sqrt3", r"Hence $BC = 2\sqrt{3}$."),
    ("ab", "The product is $ab$."),
    ("x+1", "### Answer\n**x+1**"),
    ("(3,4)", "Final Answer\n\n(3, 4)"),
    ("72", "Final Answer: **72** clips"),
    ("5", "**Answer:** **5** apples"),
    ("5", "**Answer**: **5**"),
    ("5", "The answer is `5`"),
    ("5", "It is 5."),
    ("5", "There are 5."),
    ("5", "Hence 5 apples."),
    ("12", "12 cups of flour"),
    ("12", r"\boxed{12 \text{ cups of flour}}"),
    ("12", r"\boxed{12 cups of flour}"),
    ("5", "<answer>5</answer>"),
    ("C", "The correct option is C."),
    ("C", "The correct choice is (C)."),
    ("5", "The answer is 5. I am confident that the answer is correct."),
    ("5", "Answer: 5\n\nThe answer is correct because $2+3=5$."),
    ("7", "The answer is thus 7"),
    ("5", "The answer is approximately 5"),
    ("15", r"\boxed{\text{The answer is }15}"),
    ("15", r"$\boxed{\text{Answer: }15}$"),
    (r"\text{does not exist}", "does not exist"),
    (r"\text{does not exist}", "Does not exist."),
    (r"8\pi", r"The area is $8\pi$."),
    ("15", r"\boxed{\text{15 apples}}"),
    ("5", "She sells them for 5 dollars each, so 5"),
    ("72", "Answer: 72 clips altogether in May"),
]
MISLEADING = [  # what is read out of the end of a sentence must not be a part of a number
    ("8", "The area is 8π."), ("3", "The length is 2√3."), ("30", "We meet at 4:30 p.m."), ("2", "It is 5 cm^2."),
]


@pytest.mark.parametrize("gold, text", CHAT)
def test_the_answer_is_found_in_what_chat_models_write(gold, text):
    assert grade(gold, text)


@pytest.mark.parametrize("gold, text", MISLEADING)
def test_a_part_of_a_number_is_not_the_answer(gold, text):
    assert not grade(gold, text)


@pytest.mark.parametrize("text, answer", EXTRACTED.values(), ids=EXTRACTED)
def test_extract_finds_the_final_answer(text, answer):
    assert extract(text) == answer


FRAMES = ["#### {}", "The answer is {}.", "The answer is ${}$.", "the final answer is: ${}$", "**Answer:** {}", "A: {}"]
FRAMES += [r"Thus \[\boxed{{{}}}\]", r"Hence $\boxed{{{}}}$ apples.", "The final answer is ${}$. I hope it is correct."]
FRAMES += [r"First \boxed{{17}}, but really \boxed{{{}}}.", "####{}<|im_end|>", "So we have found that\n$$x = {}$$\n", "{}"]


@pytest.mark.parametrize("frame", FRAMES)
def test_the_answer_is_found_in_what_models_write_around_it(frame):
    for gold, right, wrong in [("1234", "1,234", "1243"), ("-0.5", r"-\frac12", r"\frac12"), (r"\sqrt8", r"2\sqrt2", "8")]:
        assert grade(gold, frame.format(right)) and not grade(gold, frame.format(wrong))


def test_a_reference_solution_is_a_gold_answer():
    solution = "Natalia sold 48+24 = <<48+24=72>>72 clips.\n#### 1,072"
    assert grade(solution, "1072") and grade(solution, solution) and not grade(solution, "72")
    assert grade(r"Thus $x=\boxed{\dfrac12}$.", "I think that the answer is 0.5.")


def test_a_right_toy_answer_counts_and_a_number_on_the_way_does_not():
    response = "b41+5=46\nc46+3=49\n####49"
    assert grade("49", response) and not grade("46", response) and not grade("4", response)
    assert grade("02", "e40*5=00\nf00+2=02\n####02") and not grade("20", "####02")


TRICKS = {
    "several numbers": ("5", r"\boxed{1, 2, 3, 4, 5}"),
    "several boxes": ("5", r"\boxed{4}, \boxed{5}, \boxed{6}"),
    "two chances": ("5", r"\boxed{5} or \boxed{6}"),
    "two chances in words": ("5", "The answer is 5 or 6."),
    "a right box before a wrong one": ("5", r"\boxed{5}. No, it is \boxed{6}."),
    "all choices": ("A", r"\boxed{\text{A, B, C, D}}"),
    "all choices at once": ("A", r"\boxed{ABCD}"),
    "plus-minus": ("5", r"\boxed{\pm 5}"),
    "an interval around it": ("5", r"\boxed{[4, 6]}"),
    "everything": ("5", r"\boxed{x \in \mathbb{R}}"),
    "an unknown": ("5", r"\boxed{x}"),
    "a false equation": ("5", r"\boxed{5 = 6}"),
    "a false chain": ("5", r"\boxed{5 = 5 = 6}"),
    "about": ("6", r"\boxed{5 \approx 6}"),
    "a condition": ("5", r"\boxed{5 \text{ if } x > 0}"),
    "a denial": ("5", r"\boxed{\text{not } 5}"),
    "a second answer as text": ("5", r"\boxed{5 \text{ or maybe } 6}"),
    "a parameter": ("5", r"\boxed{5 + k}"),
    "not a number": ("5", r"\boxed{\text{NaN}}"),
    "a quotient of zeros": ("5", r"\boxed{\frac{0}{0}}"),
    "an empty box": ("5", r"\boxed{}"),
    "a box of blanks": ("5", r"\boxed{ \, }"),
    "nothing at all": ("0", ""),
    "the number on the way": ("5", r"We have 5 apples, so \boxed{10}."),
    "python": ("5", r"\boxed{2.__add__(3)}"),
    "python's brackets": ("5", r"\boxed{[5][0]}"),
    "python's bits": ("5", r"\boxed{4|1}"),
    "python's underscore": ("1000", r"\boxed{1_000}"),
    "python's truth": ("1", r"\boxed{True}"),
    "python's None": ("0", r"\boxed{None}"),
    "sympy's number": ("5", r"\boxed{Integer(5)}"),
    "sympy's one": ("1", r"\boxed{S.One}"),
    "hexadecimal": ("16", r"\boxed{0x10}"),
    "a comment": ("5", r"\boxed{6 % 5}"),
    "hidden text": ("5", r"\boxed{\phantom{6}5 \hspace{0pt} 6}"),
    "a crossed out answer": ("5", r"\boxed{\cancel{6} 5 6}"),
    "another number in small print": ("5", r"\boxed{5_{6}}"),
}


@pytest.mark.parametrize("gold, text", TRICKS.values(), ids=TRICKS)
def test_a_policy_that_hedges_or_plays_tricks_is_not_paid(gold, text):
    assert not grade(gold, text)


def test_a_verdict_tells_the_kind_and_shows_both_answers():
    right = verdict("Well.\n#### 1/2", r"So $x = \boxed{0.50}$.")
    assert (right.kind, right.gold, right.answer) == ("match", "1/2", "0.50")
    wrong = verdict("3", r"\boxed{3} and \boxed{5}")
    assert (wrong.kind, wrong.gold, wrong.answer) == ("mismatch", "3", "3, 5")


def test_the_last_of_joined_boxes_may_match_alone_because_data_sets_keep_only_that_one():
    text = r"Hence $x$ must be $\boxed{3}$ or $\boxed{\frac{2}{5}}$."
    assert grade(text, text) and grade(r"3, \frac25", text) and verdict(r"\frac{2}{5}", text).answer == r"\frac{2}{5}"
    assert not grade("3", text) and not grade(r"\frac25, 4", text)


def test_garbage_and_silence_are_unparsed_not_wrong():
    garbage = verdict("5", r"\boxed{\foo{3} ]] +}")
    assert (garbage.kind, garbage.answer) == ("unparsed", r"\foo{3} ]] +")
    silence = verdict("5", "I do not know.")
    assert (silence.kind, silence.answer) == ("unparsed", None)
    assert verdict("5", "").kind == "unparsed"
    assert verdict(r"\foo{3} ]] +", r"\boxed{\foo{3} ]] +}").kind == "match"  # the same string


def test_grade_is_a_verdict_of_match_and_verdicts_repeat():
    for a, b in [("5", "5.0"), ("5", "6"), ("5", ""), ("5", r"\foo"), HARD[0][:2], HARD[2][:2], HOSTILE["tower"]]:
        kinds = {verdict(a, b).kind for _ in range(3)}
        assert len(kinds) == 1 and grade(a, b) is (kinds == {"match"})


@pytest.mark.parametrize("a, b, same", HARD)
def test_symbolic_equality(a, b, same):
    assert grade(a, b) is same and grade(b, f"\\boxed{{{a}}}") is same


# ------------------------------------------------------------------------------------------------ hostile texts


@pytest.fixture
def timed():
    """A verdict that fails the test if it takes a second. What is loaded once, and a lost worker, are not timed."""
    assert grade(*HARD[0][:2])

    def judge(gold, text):
        start = time.perf_counter()
        result = verdict(gold, text)
        seconds = time.perf_counter() - start
        assert seconds < 1, f"{seconds:.1f} s"
        assert result.kind in ("match", "mismatch", "unparsed", "timed out")
        return result.kind

    return judge


@pytest.mark.parametrize("a, b", HOSTILE.values(), ids=HOSTILE)
def test_hostile_answers_are_refused_in_time(a, b, timed):
    assert timed(a, b) != "match"
    assert timed(b, f"Thus $\\boxed{{{a}}}$.") != "match"


@pytest.mark.parametrize("a, b", DEMANDING.values(), ids=DEMANDING)
def test_demanding_answers_are_judged_in_time(a, b, timed):
    timed(a, b)
    timed(b, f"Thus $\\boxed{{{a}}}$.")


UNITS = ["{", "}", "[", "(", r"\[", r"\boxed{", r"\boxed{},", r"\boxed 3", r"\fbox{1},", "$", r"$1$", "\\", "#", "####"]
UNITS += ["9", "1,", "1,111", "-", "1/", "1.", "e9", "^", r"\frac", r"\frac{1}{", r"\text{", ",\\!", " ", "1 ", "a "]
UNITS += ["\n", "\0", "answer is ", "A: ", "1 and ", "\ud800", "٣", r"\boxed{5}{", "\r\n", "%", "=", "<|", r"\pm", "!", "_"]


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_a_megabyte_of_hostile_text_is_graded_in_time(unit, timed):
    text = unit * (1_000_000 // len(unit))
    for hostile in (text, "\\boxed{" + text[:9000] + "}"):
        timed("5", hostile)
        timed(hostile, "5")


HUGE = ["1e999999999", "9^{9^{9^{9}}}", "999999999!", "9" * 9000, "1/" + "9" * 9000, "(" * 4000 + "1" + ")" * 4000]


@pytest.mark.parametrize("answer", HUGE, ids=lambda answer: answer[:15])
def test_huge_numbers_and_deep_nesting_are_not_computed(answer, timed):
    assert timed(answer, answer) == "match"
    assert timed("7", answer) != "match" and timed(f"({answer}, 1)", f"({answer}, 2)") != "match"


def test_nested_boxes_take_no_quadratic_memory():
    assert not grade("6", "\\boxed{" * 20_000 + "5" + "}" * 20_000)


CODE = ["__import__('os').system('touch {}')", "open('{}', 'w')", "__import__('os').mkdir('{}')", "raise SystemExit"]
CODE += ["().__class__.__base__.__subclasses__()", "exit()", "__import__('os')._exit(0)", "lambda: x", "{}.write_text('')"]
CODE += ["[open('{}','w') for x in (1,)]", "Symbol('x').func(open('{}','w'))", "exec(open('{}','w'))"]
CODE += [r"\write18{{touch {}}}", r"\input{{{}}}", r"\immediate\openout1={}", "$(touch {})", "`touch {}`", "; touch {}"]


@pytest.mark.parametrize("code", CODE)
def test_nothing_is_executed(code, tmp_path, timed):
    target = tmp_path / "made"
    code = code.format(target)
    for a, b in [("2", f"\\boxed{{{code}}}"), (code, "2"), ("2", code), (f"x+{code}", "x+2"), (f"\\text{{{code}}}", "2")]:
        assert timed(a, b) != "match"
    assert not target.exists()


# ------------------------------------------------------------------------------------------------ processes

LINUX = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
PRELUDE = f"""
import os, resource, signal, sys, threading, time
from grader import grade
HARD = {HARD!r}
right = lambda: all(grade(a, b) is same for a, b, same in HARD)
"""


def start(code, mark="", **options):
    """Runs the code in a process of its own. Its environment has the mark, which all of its children inherit."""
    environment = {**os.environ, "GRADER_TEST": mark}
    options = dict(cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | options
    return subprocess.Popen([sys.executable, "-c", PRELUDE + code], **options)


def output(code, mark=""):
    process = start(code, mark)
    try:
        printed, errors = process.communicate(timeout=20)  # a worker that keeps the streams open lets this fail
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, errors
    return printed.strip()


def marked(mark):
    """The living processes with this mark. Orphans keep it, zombies have none."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"GRADER_TEST={mark}\0".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:  # gone by now, or somebody else's
            pass
    return found


def all_gone(mark, seconds=3):
    deadline = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return not left


@pytest.fixture
def mark(request):
    return f"{os.getpid()}-{request.node.name}-{random.getrandbits(64)}"


@LINUX
def test_memory_stays_below_500_megabytes():
    names = "power of a sum", "factorials of factorials", "binomial", "matrix", "digits", "sum of roots", "list", "sum"
    code = f"""
sys.path.insert(0, "tests")
from test_grader import HOSTILE, marked
for name in {names}:
    a, b = HOSTILE[name]
    assert not grade(a, b) and not grade(b, a)
living = [open(f"/proc/{{pid}}/status").read() for pid in marked(os.environ["GRADER_TEST"])]
peaks = [int(status.split("VmHWM:")[1].split()[0]) for status in living]  # ru_maxrss of itself has the parent's peak
print(max(peaks + [resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""
    assert 1000 < int(output(code, "memory")) < 500_000  # kilobytes


@LINUX
@pytest.mark.parametrize("end", ["sys.exit()", "os._exit(0)", "pass"])
def test_no_process_survives_its_parent(end, mark):
    assert output(f"print(right(), flush=True); {end}", mark) == "True"
    assert all_gone(mark)


KILLED = [(how, "time.sleep(60)") for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)]
KILLED += [(signal.SIGKILL, f"while True: {busy}") for busy in ("right()", "grade('(x+y+z)^{500}', '(x-y+z)^{500}')")]


@LINUX
@pytest.mark.parametrize("how, busy", KILLED)
def test_no_process_survives_a_killed_parent(how, busy, mark):
    process = start(f"print(right(), flush=True)\n{busy}", mark)
    with process:
        assert process.stdout.readline() == "True\n"
        time.sleep(0.1)
        process.send_signal(how)
        assert process.wait(timeout=10) != 0
        assert all_gone(mark)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="the system does not tell a process's processor time")
def test_a_worker_that_waits_for_a_processor_is_waited_for():
    """As where many processes share few of them: it counts what the worker has worked, not how long that took."""
    assert grade("-0.5", r"A: -\frac12")  # starts it
    worker = WORKER.process.pid
    os.kill(worker, signal.SIGSTOP)
    threading.Timer(1.5, os.kill, (worker, signal.SIGCONT)).start()
    began = time.monotonic()
    assert verdict("-0.25", r"A: -\frac14").kind == "match"
    assert time.monotonic() - began > 1 and WORKER.process.pid == worker


@LINUX
def test_a_killed_worker_is_replaced(mark):
    code = """
sys.path.insert(0, "tests")
from test_grader import marked
def kill():
    while workers := set(marked(os.environ["GRADER_TEST"])) - {os.getpid()}:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
for _ in range(3):
    assert right()
    kill()
stop = threading.Event()
def keep_killing():
    while not stop.wait(0.02):
        try:
            kill()
        except ProcessLookupError:
            pass
killer = threading.Thread(target=keep_killing)
killer.start()
for a, b, same in HARD * 2:
    assert same or not grade(a, b)
    assert grade(a, b) in (True, False)
stop.set()
killer.join()
kill()
print(right())
"""
    assert output(code, mark) == "True" and all_gone(mark)


def test_the_grader_works_in_threads():
    results = [None] * 8

    def judge(i):
        results[i] = [grade(a, b) is same for a, b, same in HARD * 2] + [grade("0.5", GOOD), not grade(f"{i}", f"{i + 1}")]

    threads = [threading.Thread(target=judge, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert results == [[True] * 14] * 8


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_grader_works_in_daemonic_processes(method, mark):
    code = f"""
import multiprocessing
assert right()  # the children inherit a grader that is in use
with multiprocessing.get_context({method!r}).Pool(2) as pool:
    print(pool.starmap(grade, [(a, b) for a, b, _ in HARD]) == [same for _, _, same in HARD], right())
"""
    assert output(code, mark) == "True True"
    assert not Path("/proc").exists() or all_gone(mark)


def test_parent_and_forked_children_do_not_mix_up_their_answers(mark):
    code = """
assert right()
children = []
while len(children) < 2 and 0 not in children:
    children.append(os.fork())
fine = all([right() for _ in range(5)])
if 0 in children:
    os._exit(not fine)
print(fine, [os.waitpid(pid, 0)[1] for pid in children])
"""
    assert output(code, mark) == "True [0, 0]"
    assert not Path("/proc").exists() or all_gone(mark)


def test_a_fork_in_the_middle_of_a_verdict_does_not_hang(mark):
    code = """
stop = threading.Event()
def keep_grading():
    while not stop.is_set():
        assert right()
threads = [threading.Thread(target=keep_grading) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(4):
    time.sleep(0.05)
    pid = os.fork()
    if pid == 0:
        os._exit(not right())
    assert os.waitpid(pid, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
print(right())
"""
    assert output(code, mark) == "True"
    assert not Path("/proc").exists() or all_gone(mark)


def test_the_grader_leaves_signals_timers_and_limits_alone():
    signals = [signal.SIGALRM, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE, signal.SIGHUP]

    def state():
        handlers = [signal.getsignal(s) for s in signals]
        limits = [resource.getrlimit(r) for r in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE)]
        return handlers, limits, sys.getrecursionlimit(), sys.get_int_max_str_digits(), mpmath.mp.dps, random.getstate()

    def judge():
        for a, b, same in HARD:
            assert grade(a, b) is same
        for name in ("tower", "sum of roots", "power of a sum", "digits", "sines", "parentheses"):
            assert not grade(*HOSTILE[name])

    before, numbers = state(), np.random.get_state()[1].tolist()
    judge()
    assert state() == before and np.random.get_state()[1].tolist() == numbers
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    rang = []
    previous = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 60)  # somebody else's alarm clock goes on
        judge()
        assert not rang and 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 60
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# ------------------------------------------------------------------------------------------------ command line


def run(*arguments):
    return subprocess.run([sys.executable, ROOT / "grader.py", *arguments], capture_output=True, text=True, timeout=20)


@pytest.fixture
def refused(monkeypatch, capsys):
    """Calls the command's main(); gives the one sentence that a wrong command gets."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["grader.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        return capsys.readouterr().err

    return call


def test_the_command_shows_both_answers_and_the_verdict():
    right = run(r"\frac12", "The answer is 0.50.")
    assert right.returncode == 0 and [word in right.stdout.split() for word in (r"\frac12", "0.50", "match")] == [True] * 3
    assert "mismatch" in run("5", "six or 7").stdout and "unparsed" in run("5", "I do not know.").stdout
    assert "mismatch" not in run(r"\sqrt{5+2\sqrt6}", r"\boxed{\sqrt2+\sqrt3}").stdout


def test_the_command_counts_the_verdicts_of_a_file(tmp_path):
    file = tmp_path / "graded.jsonl"
    rows = [{"gold": "5", "text": r"\boxed{5.0}"}, {"answer": "Well.\n#### 7", "response": "The answer is 7."}]
    rows += [{"gold": "1/2", "response": "0.5"}, {"gold": "5", "text": "6"}, {"answer": "8", "text": "9", "id": 3}]
    rows += [{"gold": "5", "text": "I do not know."}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counted = run("--file", str(file))
    assert counted.returncode == 0
    for kind, n in [("match", 3), ("mismatch", 2), ("unparsed", 1), ("timed out", 0)]:
        assert re.search(rf"\b{kind}\b\W*\b{n}\b|\b{n}\W+{kind}\b", counted.stdout), counted.stdout


BROKEN = ['{"gold": "5", "text"', '{"gold": "5"}', '{"text": "5"}', "[1, 2]", "5", '{"gold": 5, "text": null}', "\udcff"]


@pytest.mark.parametrize("line", BROKEN, ids=ascii)
def test_a_broken_line_is_named(line, tmp_path, refused):
    file = tmp_path / "broken.jsonl"
    good = json.dumps({"gold": "5", "text": "5"})
    file.write_bytes(f"{good}\n{good}\n{line}\n{good}\n".encode(errors="surrogateescape"))
    assert re.search(r"\b3\b", refused("--file", str(file)))


def test_a_mistake_on_the_command_line_is_one_sentence_and_status_2(tmp_path, refused):
    assert "text" in refused("5").lower()
    assert refused() and "nowhere.jsonl" in refused("--file", str(tmp_path / "nowhere.jsonl"))
    assert refused("--file", str(tmp_path))  # a folder
