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

import tyro

from dms_jax.config import require

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
        for number, line in enumerate(path.read_text().splitlines()):
            row = json.loads(line)
            fields = next((names for names in FIELDS if all(name in row for name in names)), None)
            require(fields is not None, f"{path}, row {number}", list(row), "has neither problem nor question")
            yield row[fields[0]], row[fields[1]]


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
        text = path.read_text()
        text = text[: round(len(text) * (1 - settings.held_out))]
        for start in range(0, len(text), settings.characters):
            piece = text[start : start + settings.characters]
            chat = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": piece}]
            yield {"text": piece} if settings.bare else {"messages": chat}


def main(settings: Settings) -> None:
    rows = [*chats(settings), *passages(settings)]
    random.Random(settings.seed).shuffle(rows)
    settings.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{settings.out}: {len(rows)} documents")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
