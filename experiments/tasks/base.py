"""What every task shares: a record, and the verdict on a chain's answer.

`math-verify` judges. A chain answers in its last `\\boxed{...}`; a chain without one is wrong.
"""

import functools
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

BOX = re.compile(r"\\boxed\s*\{")
DIGITS = re.compile(r"[0-9]+")
SECONDS = 5  # that math-verify may spend on one expression


class Record(NamedTuple):
    """A problem: its text and its right answer."""

    id: str
    problem: str
    answer: str


class Task(NamedTuple):
    """Records, in a fixed order, and how one becomes a prompt (text, or token ids) for a tokenizer."""

    name: str
    records: Sequence[Record]
    prompt: Callable[[Record, Any], str | list[int]]


class Verdict(NamedTuple):
    """What a chain answered, in a form in which equal answers are equal strings, and whether it is right."""

    answer: str | None
    correct: bool


def last_box(text: str) -> str | None:
    r"""The content of the last closed `\boxed{...}` that is not blank, inner braces included; None if there is none.

    "so \boxed{1}, no: \boxed{\frac{14}{2}}." -> "\frac{14}{2}"
    """
    for match in reversed(list(BOX.finditer(text))):
        depth = 1
        for n in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[n], 0)
            if depth == 0:
                content = text[match.end() : n].strip()
                if content:
                    return content
                break
    return None


def judge(text: str, gold: str) -> Verdict:
    """The verdict on a chain's text, given the right answer (a number or LaTeX)."""
    box = last_box(text)
    if box is None:
        return Verdict(None, False)
    if DIGITS.fullmatch(box) and DIGITS.fullmatch(gold.strip()):
        # What math-verify says of two plain integers, a thousand times faster; a test holds the two equal.
        return Verdict(str(int(box)), int(box) == int(gold))
    return verify_box(box, gold)


def verify_box(box: str, gold: str) -> Verdict:
    """math-verify's own verdict on the content of a box."""
    import math_verify

    limit = _time_limit()
    parsed = _parse(box)
    correct = bool(math_verify.verify(list(_parse(gold.strip())), list(parsed), timeout_seconds=limit))
    # "x = 7" and "\frac{14}{2}" are votes for "7".
    form = getattr(parsed[0], "rhs", parsed[0]) if parsed else box
    return Verdict(str(form), correct)


@functools.lru_cache(maxsize=4096)
def _parse(expression: str) -> tuple:
    import math_verify

    return tuple(
        math_verify.parse(
            f"\\boxed{{{expression}}}",
            extraction_config=[math_verify.LatexExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=_time_limit(),
        )
    )


def _time_limit() -> int | None:
    """math-verify stops itself with an alarm signal, which only a main thread can receive."""
    return SECONDS if threading.current_thread() is threading.main_thread() else None
