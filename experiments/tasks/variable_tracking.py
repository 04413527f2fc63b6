"""RULER's variable tracking: chains of assignments `VAR X2 = VAR X1` are hidden in a text; who holds the value?

A worked example of the same form comes before the question.
"""

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dms_jax.config import one_of, require
from experiments.tasks import ruler
from experiments.tasks.ruler import NOISE, Draft, Encode, Form

TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
)
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assigned the value {query}, they are: "
)
NEW_TOKENS = 30
EXAMPLE_TOKENS = 500  # of the worked example
EXAMPLE_VALUE = 12345  # with which its size is found


@dataclass(frozen=True)
class Tracking:
    """`chains` chains of `hops` + 1 variables each; the first chain is asked for."""

    haystack: Literal["noise", "essay"] = "noise"
    chains: int = 1
    hops: int = 4

    def __post_init__(self):
        one_of("haystack", self.haystack, ("noise", "essay"))
        for field in ("chains", "hops"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "must be at least 1")
        statements, most = self.chains * (self.hops + 1), len(ruler.DEPTHS)
        fits = self.haystack != "essay" or statements <= most
        require(fits, "chains", self.chains, f"an essay takes {most} statements, these are {statements}")


TASKS = {"vt": Tracking(), "vt_essay": Tracking("essay"), "vt_two_chains": Tracking(chains=2)}


class Chain(NamedTuple):
    """Names in order of assignment, and the value that they all hold."""

    names: tuple[str, ...]
    value: int

    def statements(self) -> list[str]:
        """The assignments in order; all but the first end in a space, as RULER's do."""
        copies = [f"VAR {new} = VAR {old} " for old, new in zip(self.names, self.names[1:], strict=False)]
        return [f"VAR {self.names[0]} = {self.value}", *copies]


def draw_chains(task: Tracking, letters: int, rng: random.Random) -> list[Chain]:
    """Chains whose names, of so many capitals, and values are all different."""
    names: dict[str, None] = {}  # a set that keeps its order
    while len(names) < task.chains * (task.hops + 1):
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    values = rng.sample(range(10_000, 99_999), task.chains)
    each = iter(names)
    return [Chain(tuple(next(each) for _ in range(task.hops + 1)), value) for value in values]


def hide(task: Tracking, essay: Sequence[str], chains: Sequence[Chain], rng: random.Random, units: int) -> str:
    """A text of `units` words (essay) or lines (noise) with the chains' statements in it, each chain in order."""
    statements = [chain.statements() for chain in chains]
    if task.haystack == "essay":
        turns = [n for n, own in enumerate(statements) for _ in own]
        rng.shuffle(turns)
        in_order = [iter(own) for own in statements]
        mixed = [f"{next(in_order[n]).strip()}." for n in turns]
        return ruler.at_depths(ruler.essay_sentences(essay, units), mixed, rng)
    lines = [NOISE] * units
    for own in statements:
        lines = ruler.inserted(lines, own, sorted(rng.sample(range(len(lines)), len(own))))
    return "\n".join(lines)


def write(task: Tracking, essay: Sequence[str], chains: Sequence[Chain], rng: random.Random, units: int) -> Draft:
    """The question for the first chain."""
    asked = chains[0]
    prompt = TEMPLATE.format(context=hide(task, essay, chains, rng, units), query=asked.value)
    prefix = PREFIX.format(count=len(asked.names), query=asked.value)
    return Draft(prompt, prefix, asked.names, asked.statements()[0].strip())


def write_example(task: Tracking, essay: Sequence[str], chains: Sequence[Chain], units: int) -> str:
    """A worked example. Where its statements stand depends on the task only: they are placed once for all samples."""
    prompt, prefix, answers, _ = write(task, essay, chains, random.Random(f"{task} example"), units)
    return f"{prompt}{prefix}{' '.join(answers)}\n"


def example_units(task: Tracking, essay: Sequence[str], encode: Encode, least: int) -> int:
    """The largest haystack with which the worked example has at most EXAMPLE_TOKENS tokens."""
    names = draw_chains(task, 3, random.Random(f"{task} example names"))
    chains = [names[0]._replace(value=EXAMPLE_VALUE), *names[1:]]

    def fits(units):
        return len(encode(write_example(task, essay, chains, units), "")) <= EXAMPLE_TOKENS

    units = ruler.largest(fits, least)
    reason = f"its worked example takes more than {EXAMPLE_TOKENS} tokens with this tokenizer"
    require(units >= least, "task", task, reason)
    return units


def form(name: str, length: int, encode: Encode, essay: Sequence[str] = ()) -> Form:
    """The task of that name at a context length; `essay` are the words of the text that vt_essay hides chains in.

    Raises:
      ConfigError: an unknown name, no text for a task that needs one, or a tokenizer that makes the worked example
        too long.
    """
    one_of("task", name, tuple(TASKS))
    task = TASKS[name]
    in_essay = task.haystack == "essay"
    require(not in_essay or len(essay) > 0, "task", name, "needs a text to hide the chains in: --data FILE")
    least = 1 if in_essay else task.hops + 1
    size = example_units(task, essay, encode, least)

    def draw(rng: random.Random, units: int) -> Draft:
        example = write_example(task, essay, draw_chains(task, 3, rng), size)
        draft = write(task, essay, draw_chains(task, 5, rng), rng, units)
        return draft._replace(prompt=example + draft.prompt)

    step = ruler.essay_step(length) if in_essay else 5 if length < ruler.SHORT else 10
    return Form(name, draw, least, step, NEW_TOKENS)
