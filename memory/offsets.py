"""Which tokens hold which characters of a text.

Tokenizers report a range of characters for each token. Some cut blanks off it, so that characters are in no
range, and a token of a byte-level vocabulary may hold a part of a character only. Here every character is in
at least one range, and a token that holds part of a character holds the character: what is asked for by
characters is never missing a piece.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Offsets:
    """`starts` and `ends`, int64 `[N]`, of the characters that each of N tokens holds; neither ever falls."""

    def __init__(self, ranges: Sequence[tuple[int, int]], characters: int) -> None:
        """`ranges` as a tokenizer gives them, of a text of so many characters. A gap goes to the token after
        it, the last gap to the last token.
        """
        self.characters = characters
        pairs = np.array(ranges, dtype=np.int64).reshape(-1, 2)
        ends = np.maximum.accumulate(pairs[:, 1])
        before = np.concatenate([[0], ends[:-1]])[: len(ends)]
        starts = np.minimum(pairs[:, 0], before)
        self.starts: NDArray[np.int64] = np.minimum.accumulate(starts[::-1])[::-1]
        self.ends: NDArray[np.int64] = ends
        if len(ends):
            self.ends[-1] = characters

    def __len__(self) -> int:
        return len(self.ends)

    def tokens(self, start: int, end: int) -> range:
        """The tokens that hold any of the characters from `start` to `end`; none if there are none."""
        if start >= end:
            return range(0)
        first = int(np.searchsorted(self.ends, start, side="right"))
        return range(first, int(np.searchsorted(self.starts, end, side="left")))

    def span(self, first: int, last: int) -> tuple[int, int]:
        """The characters that the tokens from `first` to `last`, which is not one of them, hold."""
        if first >= last:
            return (0, 0)
        return int(self.starts[first]), int(self.ends[last - 1])

    def joined(self, other: Offsets) -> Offsets:
        """Of this text and another one after it."""
        both = Offsets((), 0)
        both.characters = self.characters + other.characters
        both.starts = np.concatenate([self.starts, other.starts + self.characters])
        both.ends = np.concatenate([self.ends, other.ends + self.characters])
        return both
