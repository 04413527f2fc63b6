"""The process that reads and compares mathematical answers, with math-verify: a JSON line in, a JSON line out.

`experiments.judge` starts it and is the only one that talks to it. It may use so much memory, and so many seconds for
each request, after which the system ends it.

  {"gold": "0.5"}                                -> {"answer": "1/2"}
  {"gold": "0.5", "readings": ["\\frac12"]}      -> {"answer": "1/2", "correct": true}
"""

import functools
import json
import logging
import resource
import signal
import sys

import math_verify
import sympy
from math_verify.grader import get_pct_val, is_assignment_relation, is_equation, take_first_relation, take_last_relation
from sympy import Basic, Float, MatrixBase, Set, Tuple
from sympy.core.relational import Relational

CONFIG = math_verify.LatexExtractionConfig()
DECIMALS = 1e-5  # relative distance at which a rounded decimal is the number; math-verify's own limit is absolute
EXACT = 1e-12


@functools.lru_cache(maxsize=4096)
def parse(answer: str) -> Basic | MatrixBase | None:
    """The value of an answer in LaTeX; None if math-verify cannot read it."""
    read = math_verify.parse(f"\\boxed{{{answer}}}", [CONFIG], fallback_mode="no_fallback", parsing_timeout=None)
    return read[0] if read else None


@functools.lru_cache(maxsize=4096)
def canonical(answer: str) -> str | None:
    r"""One form for all ways to write a value, for a vote: `25.0` and `5^2` are "25", `x = \frac12` and `50\%` "1/2".

    Of what only relates variables, as `2x - y = 0` and `1 < x < 2` do, no side is the answer. None if the answer cannot
    be read.
    """
    value = parse(answer)
    if value is None:
        return None
    if is_equation(value):
        begins = take_first_relation(value)  # what a name or a number comes to stands last
        if not begins.lhs.free_symbols or is_assignment_relation(begins) and not begins.lhs.is_Add:
            value = take_last_relation(value).rhs
    return str(simple(value))


def simple(value):
    """A value in its simplest exact form, and what it consists of likewise."""
    if isinstance(value, MatrixBase):
        return value.applyfunc(simple)
    if isinstance(value, Set | Tuple) and value.args:
        return value.func(*[simple(part) for part in value.args])
    if isinstance(value, sympy.And):
        return sympy.And(*map(simple, value.args))
    if isinstance(value, Relational):
        return value.func(simple(value.lhs), simple(value.rhs)).canonical
    if not isinstance(value, sympy.Expr):
        return value
    # Decimals are exact: 18.9 is 189/10, whatever its binary form.
    exact = {number: sympy.Rational(repr(float(number))) for number in value.atoms(Float) if number.is_finite}
    value = value.xreplace(exact).doit()
    if value.is_Rational:
        return value
    if value.is_number:
        return sympy.sqrtdenest(sympy.radsimp(sympy.expand(value)))
    return sympy.cancel(value) if value.is_rational_function(*value.free_symbols) else sympy.expand(value)


def close(a, b) -> bool:
    """Whether two numbers are as near to each other as equal ones are; True for what is no number.

    math-verify compares numbers up to an absolute distance, under which all tiny ones are equal.
    """
    if not all(isinstance(x, sympy.Expr) and x.is_number for x in (a, b)):
        return True
    rounded = bool(a.atoms(Float) or b.atoms(Float))
    pairs = [(a.doit(), b.doit()), (get_pct_val(a, a), get_pct_val(b, b))]  # 9% answers a question for percents
    return any(_near(x, y, DECIMALS if rounded else EXACT) for x, y in pairs)


def _near(a, b, tolerance: float) -> bool:
    if a == b:
        return True
    size = max(abs(a).evalf(30), abs(b).evalf(30))
    return bool(size.is_finite) and bool(abs(a - b).evalf(30) <= tolerance * size)


def equal(gold: str, answer: str) -> bool:
    """Whether an answer is right."""
    right, given = parse(gold), parse(answer)
    if right is None or given is None:
        return gold == answer
    if canonical(gold) == canonical(answer):
        return True
    return close(right, given) and math_verify.verify([right], [given], timeout_seconds=None)


def verdict(readings: list[str], gold: str) -> dict:
    """The answer in its canonical form, that of the right answer where it is right, and whether it is."""
    if any(equal(gold, reading) for reading in readings):
        return {"answer": canonical(gold) or gold, "correct": True}
    return {"answer": canonical(readings[0]) or readings[0], "correct": False}


def reply(request: dict) -> dict:
    """The answer to one line; an exception is not worth a process, since the answer is then only a text."""
    try:
        if "readings" in request:
            return verdict(request["readings"], request["gold"])
        return {"answer": canonical(request["gold"])}
    except Exception as error:  # sympy and the parser raise many kinds, on input that nobody foresaw
        return {"error": f"{type(error).__name__}: {error}"}


def main(seconds: float, memory: int) -> None:
    logging.disable(logging.CRITICAL)
    sys.set_int_max_str_digits(0)  # an answer may have thousands of digits; time is limited here anyway
    sys.setrecursionlimit(5_000)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    canonical(r"\frac{1}{2}+\sqrt{2}")  # what is slow the first time
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # nobody handles the signal: it ends the process
        answer = reply(json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
