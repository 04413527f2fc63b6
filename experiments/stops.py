"""Stop strings: where they end a chain's tokens, and its text."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class StopStrings:
    """Strings that end a chain; neither they nor what follows counts."""

    tokenizer: Any
    strings: tuple[str, ...]

    def chain_end(self, tokens: list[int], new: int) -> int | None:
        """How many tokens it takes to complete the first stop string; None if there is none.

        new: tokens that were not yet there at the last call.
        """
        # A string may have begun in tokens seen before: a token is a byte at least, and special ones have no text.
        before = 4 + max((len(string.encode()) for string in self.strings), default=0)
        first = max(0, len(tokens) - new - before)
        if not self._within(tokens[first:]):
            return None
        counts = range(max(first, len(tokens) - new), len(tokens) + 1)
        return next(count for count in counts if self._within(tokens[first:count]))

    def _within(self, tokens: list[int]) -> bool:
        text = self.tokenizer.decode(tokens)
        return any(string in text for string in self.strings)

    def ended(self, tokens: list[int]) -> bool:
        """Whether a stop string is in a chain."""
        return bool(self.strings) and self._within(tokens)

    def cut(self, text: str) -> str:
        """A text up to the first stop string.

        "4.\\n\\nProblem: 2" with "\\nProblem:" -> "4.\\n"
        """
        return text[: min((n for string in self.strings if (n := text.find(string)) >= 0), default=len(text))]
