"""Names for blocks of tokens: each depends on every token before it, so an equal name means an equal past."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from agentctx.memory.kv.pool import PAGE_TOKENS


class Block(NamedTuple):
    """A block of a text: its name, and the tokens `start` to `end` that it holds (64, or fewer at the end).
    """

    name: str
    start: int
    end: int


def blocks(ids: Sequence[int], root: str) -> Iterator[Block]:
    """The blocks of `ids`, in order. `root` names what else their KV depends on: the model, the method."""
    tokens = np.asarray(ids, dtype="<i4")
    name = root
    for start in range(0, len(tokens), PAGE_TOKENS):
        piece = tokens[start : start + PAGE_TOKENS]
        name = hashlib.blake2b(name.encode() + piece.tobytes(), digest_size=20).hexdigest()
        yield Block(name, start, start + len(piece))
