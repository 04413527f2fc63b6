"""What RULER's synthetic tasks share: haystacks, their size for a context length, and the metric.

RULER (Hsieh et al., arXiv 2404.06654) hides short statements in a long text and asks for them. The prompts here
are its own; where it draws all samples from one stream of random numbers, each sample here has its own, made from
(task, seed, number), so that sample 7 is the same whether or not samples 0 to 6 were made.
"""

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dms_jax.config import ConfigError, require

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
DEPTHS = tuple(round(100 * n / 39) for n in range(40))  # percent of a text, where essays take a needle each
SHORT = 4096  # below this length a sample that is too long shrinks in small steps

Encode = Callable[[str, str], Sequence[int]]  # (prompt, answer prefix) -> the token ids that a model is given


class Sample(NamedTuple):
    """One question. The model continues `prompt` + `prefix`; `answers` are what its output must contain.

    position: tokens of the prompt before the first answer in the haystack.
    length: tokens of the whole prompt, prefix and template included, and those that may be generated.
    """

    id: str
    prompt: str
    prefix: str
    answers: tuple[str, ...]
    position: int
    length: int


class Draft(NamedTuple):
    """A question before its tokens are counted; `first` is the statement that holds the first answer."""

    prompt: str
    prefix: str
    answers: tuple[str, ...]
    first: str


class Form(NamedTuple):
    """A task at one haystack size: `draw(rng, units)` writes a question over that many units.

    units are words of an essay, lines otherwise. least: the fewest that hold all statements.
    step: by how much a sample that came out too long shrinks.
    """

    name: str
    draw: Callable[[random.Random, int], Draft]
    least: int
    step: int
    new_tokens: int  # that the model may generate


def read_text(path: Path, option: str = "data") -> str:
    """The text of a file that an option names.

    Raises:
      ConfigError: no such file, not text, or nothing in it.
    """
    require(path.is_file(), option, str(path), "no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option}={str(path)!r}: not a text in UTF-8 ({error})") from error
    require(bool(text.strip()), option, str(path), "the file is empty")
    return text


def essay_sentences(words: Sequence[str], count: int) -> list[str]:
    """Sentences of the first `count` words; a text that is too short is repeated."""
    repeated = list(words) * -(-count // len(words))
    return SENTENCE_END.split(" ".join(repeated[:count]))


def at_depths(sentences: Sequence[str], statements: Sequence[str], rng: random.Random) -> str:
    """`sentences` with a statement at as many depths, drawn without replacement, in the order given."""
    depths = sorted(rng.sample(DEPTHS, len(statements)))
    places = [len(sentences) * depth // 100 for depth in depths]
    return " ".join(inserted(sentences, statements, places))


def inserted(lines: Sequence[str], statements: Sequence[str], places: Sequence[int]) -> list[str]:
    """`lines` with statement n before line `places[n]`; the places ascend.

    (a b c), (X Y), (1, 2) -> a X b Y c
    """
    out, before = [], 0
    for statement, place in zip(statements, places, strict=True):
        out += [*lines[before:place], statement]
        before = place
    return [*out, *lines[before:]]


def largest(fits: Callable[[int], bool], least: int) -> int:
    """The largest n >= `least` for which `fits(n)`, by doubling and bisection; `least - 1` if none does."""
    low, high = least - 1, least
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def samples(form: Form, count: int, length: int, seed: int, encode: Encode) -> list[Sample]:
    """The first `count` questions of a task, each of at most `length` tokens, generated ones included.

    The haystack's size is the largest that fits for one trial sample; a sample that comes out longer shrinks by
    `form.step` until it fits.

    Raises:
      ConfigError: not even the smallest haystack fits in `length`.
    """

    def draft(number: int | str, units: int) -> tuple[Draft, int]:
        drawn = form.draw(random.Random(f"{form.name}/{seed}/{number}"), units)
        return drawn, len(encode(drawn.prompt, drawn.prefix)) + form.new_tokens

    units = largest(lambda n: draft("trial", n)[1] <= length, form.least)
    reason = f"too short for {form.name} with this tokenizer"
    require(units >= form.least, "length", length, reason)
    made = []
    for number in range(count):
        own = units
        drawn, tokens = draft(number, own)
        while tokens > length:
            require(own > form.least, "length", length, reason)
            own = max(own - form.step, form.least)
            drawn, tokens = draft(number, own)
        position = len(encode(drawn.prompt[: drawn.prompt.index(drawn.first)], ""))
        made.append(Sample(f"{form.name}-{number}", drawn.prompt, drawn.prefix, drawn.answers, position, tokens))
    return made


def essay_step(length: int) -> int:
    """Words by which an essay that is too long shrinks: 500, as in RULER, but 25 below SHORT tokens.

    RULER takes 500 words off a text of 1,000 tokens too, and what is left has little of the length asked for.
    """
    return 25 if length < SHORT else 500


def share_found(output: str, answers: Sequence[str]) -> float:
    """The share of answers that occur in the output, whatever their case: RULER's metric is its mean over samples."""
    return sum(answer.lower() in output.lower() for answer in answers) / len(answers)
