"""Text to token ids in two ways: as data, in which nothing is a control token, and as words of the prompt."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from agentctx.memory.errors import ConfigError
from agentctx.memory.offsets import Offsets
from agentctx.models.tokenizer import Detokenizer, Tokenizer
from agentctx.reading.texts import check_unicode


class Encoded(NamedTuple):
    """A text as tokens, and where each stands in it."""

    ids: list[int]
    offsets: Offsets


class Tokens:
    """A tokenizer. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.backend = tokenizer.backend
        controls = "|".join(map(re.escape, sorted(tokenizer.controls)))
        self._control = re.compile(f"(?={controls})" if controls else "(?!)")
        self.opening = tokenizer.opening  # what every sequence begins with

    def data(self, text: str) -> Encoded:
        """A text that is not trusted: where it holds a control token, it is cut after the first character of
        it, and the pieces are only text. Raises InputError for what is not Unicode.
        """
        check_unicode(text)
        ids: list[int] = []
        ranges: list[tuple[int, int]] = []
        for start, piece in self._pieces(text):
            found = self.backend.encode(piece, add_special_tokens=False)
            ids += found.ids
            ranges += [(start + a, start + b) for a, b in found.offsets]
        return Encoded(ids, Offsets(ranges, len(text)))

    def prompt(self, text: str) -> list[int]:
        """A text of ours or the caller's, control tokens and all."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def spelling(self, ids: Sequence[int], text: str) -> range:
        """Which of `ids` spell `text`, where it stands last; tokens that hold any of it count.

        ConfigError if it does not stand there.
        """
        pieces = list(map(Detokenizer(self._tokenizer, special=True).step, ids))
        ends = list(accumulate(map(len, pieces)))
        start = "".join(pieces).rfind(text)
        if start < 0:
            raise ConfigError(
                f"{text[:60]!r} does not stand in the scope", hint='use mode="reread", which takes any text'
            )
        if not text:
            return range(0)
        first, last = bisect_right(ends, start), bisect_left(ends, start + len(text))
        while first and not pieces[first - 1]:  # it holds the beginning of a character
            first -= 1
        return range(first, last + 1)

    def _pieces(self, text: str) -> Iterator[tuple[int, str]]:
        start = 0
        for found in self._control.finditer(text):
            yield start, text[start : found.start() + 1]
            start = found.start() + 1
        yield start, text[start:]
