"""Names for blocks of tokens: each depends on every token before it, so an equal name means an equal past."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from agentctx.memory.kv.pool import PAGE_TOKENS


class Block(NamedTuple):
    """A block of a text: its name, and the tokens `start` to `end` that it holds, 64 or fewer at the end."""

    name: str
    start: int
    end: int


def blocks(ids: Sequence[int], root: str, grid: int = PAGE_TOKENS) -> Iterator[Block]:
    """The blocks of `ids`, in order. `root` names what else their KV depends on: the model, the method.

    `grid`: tokens whose KV may depend on one another, a multiple of 64. What lies beyond its last multiple is
    therefore named after all of it.
    """
    tokens = np.asarray(ids, dtype="<i4")
    whole = len(tokens) // grid * grid
    rest = tokens[whole:].tobytes()
    name = root
    for start in range(0, len(tokens), PAGE_TOKENS):
        piece = tokens[start : start + PAGE_TOKENS]
        name = _hash(name.encode() + piece.tobytes())
        shared = start < whole or grid == PAGE_TOKENS
        yield Block(name if shared else _hash(name.encode() + rest), start, start + len(piece))


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=20).hexdigest()


def root_after(fingerprint: str, difference: str) -> str:
    """The root of readings that differ from the plain ones of a model in something; "" is those."""
    return hashlib.sha256(f"{fingerprint} {difference}".encode()).hexdigest() if difference else fingerprint
