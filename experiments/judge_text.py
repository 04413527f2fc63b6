r"""Reading an answer in a chain's text: which part counts, and what its last `\boxed{...}` holds.

Everything here takes time in proportion to the text, so that no text can hold up a run.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

THOUGHT_END = "</think>"
BOX = r"\\(?:boxed|fbox)\s*\{"
NUMBER = r"[-+]?(?:\\\$|\$)?\.?\d(?:[\d.,/]*\d)?(?:\\?%)?|[-+]?\\[dt]?frac\s*(?:\{[^{}]*\}|\d)\s*(?:\{[^{}]*\}|\d)"
# A box, a box without braces before a number, what only looks like a brace, or a brace.
PIECE = re.compile(rf"(?P<box>{BOX})|\\boxed\s*(?P<bare>{NUMBER})|\\\\(?!boxed|fbox)|\\[{{}}]|[{{}}]")
# How a model that does not stop goes on after its answer: with a problem of its own, or the other side of a chat.
NEW_PROBLEM = re.compile(
    r"^[ \t>*#]*(?:problem|question|exercise|q|human|user)[ \t]*(?:\d+[ \t]*)?\**[ \t]*(?:[:.]|$)"
    r"|<\|(?:im_start|user)\|>",
    re.IGNORECASE | re.MULTILINE,
)
COMMA = re.compile(r"(?<=\d)(?:\{,\}|,\\! ?)(?=\d{3})")
SPACE = re.compile(r"(?<!\\)\\[,;: ]|\\q?quad\b|\\thinspace\b|~")
MODULUS = re.compile(r" ?(?:\\[pb]?mod ?(?:\{[^{}]*\}|\w+)|\( ?(?:\\(?:text|mathrm)\{ ?)?mod\b[^()]*\))$")
LABEL = re.compile(r"(?:\\(?:textbf|text|mathbf|mathrm|bf) ?\{ ?)?\(([A-Z])\)(?: ?\} ?| |$)")
INTEGER = re.compile(r"([-+]?)(\d{1,3}(?:,\d{3})+|\d+)(?:\.0*)?")


class Span(NamedTuple):
    """A part of a text: what it says (of a box, its content), and where in the text it begins and ends."""

    content: str
    start: int
    end: int


def boxes(text: str) -> list[Span]:
    r"""The closed boxes that are not blank, in order of their beginnings; `\boxed 7` is one too.

    "so \boxed{1}, no: \boxed{\frac{14}{2}}." -> "1", "\frac{14}{2}"
    """
    found, opened = [], []  # opened: begin of the box and of its content, or None for another brace
    for piece in PIECE.finditer(text):
        if piece["box"]:
            opened.append((piece.start(), piece.end()))
        elif piece["bare"]:
            found.append(Span(piece["bare"], piece.start(), piece.end()))
        elif piece[0] == "{":
            opened.append(None)
        elif piece[0] == "}" and opened and (box := opened.pop()):
            start, begin = box
            # A box inside a box: what the inner one holds is the answer, so the outer one's text is not copied.
            inside = bool(found) and found[-1].start > start
            content = "" if inside else text[begin : piece.start()].strip()
            if clean(content):
                found.append(Span(content, start, piece.end()))
    return found


def last_answer(text: str, found: Sequence[Span]) -> Span | None:
    """The one of these parts of a text, in order, that is the chain's answer; None if there is none.

    It is the last one, but nothing counts that comes after an answer and the beginning of another problem. Inside a
    thought, which often states the problem again, nothing is cut off.
    """
    thought = text.rfind(THOUGHT_END) + 1
    first = next((part for part in found if part.start >= thought), None)
    if first and (new := NEW_PROBLEM.search(text, first.end)):
        found = [part for part in found if part.end <= new.start()]
    return found[-1] if found else None


def answer_box(text: str) -> str | None:
    """The content of the box that holds a chain's answer; None if there is none."""
    box = last_answer(text, boxes(text))
    return box and box.content


def clean(answer: str) -> str:
    r"""An answer without what is only typography: dollar signs, thin spaces, a full stop; and without its modulus.

    "$1\,000.$" -> "1000"    "25 \pmod{1000}" -> "25"
    """
    answer = plain(answer).strip("$ ")
    for begin, end in ((r"\(", r"\)"), (r"\[", r"\]")):
        answer = answer.removeprefix(begin).removesuffix(end)
    answer = COMMA.sub("", answer).replace(r"\!", "").replace(r"\displaystyle", "").removeprefix(r"\approx")
    answer = re.sub(r"(?<=\d) +(?=\d{3}(?!\d))", "", SPACE.sub(" ", answer))
    return MODULUS.sub("", plain(answer).rstrip(".,; ")).rstrip(".,; ")


def readings(answer: str) -> list[str]:
    r"""What a box may mean, the likeliest first: behind the label of a choice stands its value.

    "\textbf{(C) } 25" -> "25", "C"    "\text{(C)}" -> "\text{(C)}"
    """
    answer = clean(answer)
    label = LABEL.match(answer)
    rest = answer[label.end() :] if label else ""
    if not rest:
        return [answer]
    # "\text{(C) 25}" closes its brace behind the value.
    return [clean(rest[:-1] if rest.count("}") > rest.count("{") else rest), label[1]]


def integer(answer: str) -> str | None:
    """The digits of a plain integer, of any length, without leading zeros; None for anything else.

    "007", "7.", "7.0" -> "7"    "1,000" -> "1000"    "-0" -> "0"
    """
    match = INTEGER.fullmatch(answer)
    if not match:
        return None
    digits = match[2].replace(",", "").lstrip("0")
    return (("-" if match[1] == "-" else "") + digits) if digits else "0"


def plain(answer: str) -> str:
    """An answer with single spaces: how answers compare that nothing else can read."""
    return " ".join(answer.split())
