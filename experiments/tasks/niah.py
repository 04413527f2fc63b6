"""RULER's needles in a haystack: `One of the special magic numbers for KEY is: VALUE.` stands in a long text.

The text is asked for the value. The eight variants differ in the haystack (a noise line, other needles, an essay),
in what keys and values are, and in how many there are of each.
"""

import functools
import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dms_jax.config import one_of, require
from experiments.tasks import ruler
from experiments.tasks.ruler import NOISE, Draft, Form

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
)
PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
NEW_TOKENS = 128


@dataclass(frozen=True)
class Niah:
    """A variant: `keys` different keys are hidden with `values` values each, and `queries` of them are asked for."""

    haystack: Literal["noise", "needle", "essay"]
    key: Literal["words", "numbers", "uuids"] = "words"
    value: Literal["words", "numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def __post_init__(self):
        one_of("haystack", self.haystack, ("noise", "needle", "essay"))
        for field in ("key", "value"):
            one_of(field, getattr(self, field), ("words", "numbers", "uuids"))
        for field in ("keys", "values", "queries"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "must be at least 1")
        needles = self.needles
        most = len(ruler.DEPTHS)
        require(self.haystack != "essay" or needles <= most, "keys", self.keys, f"an essay takes {most} needles")

    @property
    def needles(self) -> int:
        """How many needles the haystack holds: there are never fewer keys than queries."""
        return max(self.keys, self.queries) * self.values


TASKS = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("essay"),
    "niah_single_3": Niah("essay", value="uuids"),
    "niah_multikey_1": Niah("essay", keys=4),
    "niah_multikey_2": Niah("needle"),
    "niah_multikey_3": Niah("needle", key="uuids", value="uuids"),
    "niah_multivalue": Niah("essay", values=4),
    "niah_multiquery": Niah("essay", queries=4),
}


@functools.cache
def _words() -> tuple[list[str], list[str]]:
    """Adjectives and nouns, without those of several words."""
    from wonderwords import RandomWord

    words = RandomWord()
    kinds = ("adjective", "noun")
    return tuple(words.filter(include_categories=[kind], exclude_with_spaces=True) for kind in kinds)


def draw(rng: random.Random, kind: str) -> str:
    """A key or a value: adjective-noun, seven digits, or a UUID."""
    if kind == "words":
        return "-".join(rng.choice(words) for words in _words())
    if kind == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _distinct(rng: random.Random, kind: str, count: int, taken: set[str]) -> list[str]:
    """`count` draws, none of them in `taken`, which they are added to: no answer may be ambiguous."""
    out = []
    while len(out) < count:
        one = draw(rng, kind)
        if one not in taken:
            taken.add(one)
            out.append(one)
    return out


def enumerate_query(keys: Sequence[str]) -> str:
    """`a`, `a, and b`, `a, b, and c`."""
    return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"


def templates(task: Niah) -> tuple[str, str]:
    """Template and answer prefix with the kind of value filled in; singular where one answer is asked for."""
    template, prefix, kind = TEMPLATE, PREFIX, task.value
    if task.queries * task.values == 1:
        kind = kind.removesuffix("s")
        for many, one in (("Some", "A"), ("are all", "is"), ("are", "is")):
            template, prefix = template.replace(many, one), prefix.replace(many, one)
    return template.replace("{kind}", kind), prefix.replace("{kind}", kind)


def question(task: Niah, essay: Sequence[str], rng: random.Random, units: int) -> Draft:
    """One question over `units` words (essay) or lines (noise, needle)."""
    taken: set[str] = set()
    keys = _distinct(rng, task.key, max(task.keys, task.queries), taken)
    values = {key: _distinct(rng, task.value, task.values, taken) for key in keys}

    def needle(key, value):
        return NEEDLE.format(kind=task.value, key=key, value=value)

    needles = [needle(key, value) for key in keys for value in values[key]]
    rng.shuffle(needles)
    if task.haystack == "essay":
        context = ruler.at_depths(ruler.essay_sentences(essay, units), needles, rng)
    else:
        lines = [NOISE] * units
        if task.haystack == "needle":
            pairs = zip(*(_distinct(rng, kind, units, taken) for kind in (task.key, task.value)), strict=True)
            lines = [needle(*pair) for pair in pairs]
        context = "\n".join(ruler.inserted(lines, needles, sorted(rng.sample(range(units), len(needles)))))
    asked = rng.sample(keys, task.queries)
    template, prefix = templates(task)
    query = enumerate_query(asked)
    answers = tuple(value for key in asked for value in values[key])
    prompt = template.format(context=context, query=query)
    return Draft(prompt, prefix.format(query=query), answers, needle(asked[0], answers[0]))


def form(name: str, length: int, essay: Sequence[str] = ()) -> Form:
    """The task of that name at a context length; `essay` are the words of the text that some are hidden in.

    Raises:
      ConfigError: an unknown name, or no text for a task that needs one.
    """
    one_of("task", name, tuple(TASKS))
    task = TASKS[name]
    in_essay = task.haystack == "essay"
    require(not in_essay or len(essay) > 0, "task", name, "needs a text to hide the needles in: --data FILE")
    step = ruler.essay_step(length) if in_essay else 5 if length < ruler.SHORT else 25
    return Form(name, functools.partial(question, task, essay), 1 if in_essay else task.needles, step, NEW_TOKENS)
