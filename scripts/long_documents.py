"""Makes long training documents out of short ones: chats of several problems, and passages of text files.

A cache is compressed over long contexts, so a retrofit has to see some. Rows of problems with solutions are joined
to chats of many turns, text files are cut into passages; the last part of each text file is left out, to measure on.

    python -m scripts.long_documents --problems gsm8k_train.jsonl math_train.jsonl --texts wiki.txt --out long.jsonl
"""

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path

from dms_jax.config import require
from experiments.tasks.data import rows
from experiments.tasks.ruler import read_text
from scripts import command

FIELDS = (("problem", "solution"), ("question", "answer"))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to join.

    problems: JSONL files with problem and solution, or question and answer. texts: plain text files. characters:
    length of a document. held_out: the share of each text file, from its end, that is left out. bare: passages are
    text alone, not the answer in a chat.
    """

    problems: tuple[Path, ...] = ()
    texts: tuple[Path, ...] = ()
    out: Path = Path("long.jsonl")
    characters: int = 4000
    held_out: float = 0.2
    bare: bool = False
    seed: int = 0

    def __post_init__(self):
        require(bool(self.problems or self.texts), "problems, texts", (), "name some files")
        require(self.characters > 0, "characters", self.characters, "must be positive")
        require(0 <= self.held_out < 1, "held_out", self.held_out, "must lie in [0, 1)")


def turns(paths: tuple[Path, ...]) -> Iterator[tuple[str, str]]:
    """Every problem with its solution."""
    for path in paths:
        for row in rows(str(path)):
            problem, solution = FIELDS["problem" not in row.fields]
            yield row.text(problem), row.text(solution)


def chats(settings: Settings) -> Iterator[dict]:
    """Problems in a random order, as many to a chat as reach its length."""
    every = list(turns(settings.problems))
    random.Random(settings.seed).shuffle(every)
    messages, size = [], 0
    for problem, solution in every:
        messages += [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}]
        size += len(problem) + len(solution)
        if size >= settings.characters:
            yield {"messages": messages}
            messages, size = [], 0


def passages(settings: Settings) -> Iterator[dict]:
    """Pieces of the first part of each text file: each a chat of one turn, or as it is."""
    for path in settings.texts:
        text = read_text(path, "texts")
        text = text[: round(len(text) * (1 - settings.held_out))]
        for start in range(0, len(text), settings.characters):
            piece = text[start : start + settings.characters]
            chat = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": piece}]
            yield {"text": piece} if settings.bare else {"messages": chat}


def main(settings: Settings) -> None:
    documents = [*chats(settings), *passages(settings)]
    require(bool(documents), "characters", settings.characters, "more than all problems have")
    random.Random(settings.seed).shuffle(documents)
    settings.out.write_text("".join(json.dumps(document) + "\n" for document in documents))
    print(f"{settings.out}: {len(documents)} documents")


if __name__ == "__main__":
    command.run(main, Settings)
