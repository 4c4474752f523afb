"""Tokens that a model has read, to go on from: the handle that an engine gives out."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agentctx.memory.kv.past import Past
from agentctx.memory.kv.table import BlockTable
from agentctx.runtime.state import KVState

if TYPE_CHECKING:
    from agentctx.runtime.engine import Engine


@dataclass
class Context:
    """Tokens whose keys and values are held. `computed` were computed for it, `reused` were there before.

    `warnings` says what of the disk failed on the way; none of it changes an answer.
    """

    engine: Engine
    state: KVState  # of one row
    ids: list[int]
    computed: int = 0
    reused: int = 0
    warnings: list[str] = field(default_factory=list)

    @property
    def table(self) -> BlockTable:
        return self.state.tables[0]

    @classmethod
    def over(cls, engine: Engine, past: Past, ids: Sequence[int]) -> Context:
        """Go on after chosen tokens; `ids` are the tokens of the text. Closes `past` when it is closed."""
        state = KVState(engine.pool, [BlockTable(engine.pool)], engine.method, [0], 0, False, pasts=[past])
        return cls(engine, state, list(ids), reused=len(ids))

    def fork(self) -> Context:
        """The same past, to go on from in another way: no page is copied until one of the two writes to
        it.
        """
        with self.engine.lock:
            state = self.state.fork()
        return Context(self.engine, state, list(self.ids), reused=len(self.ids))

    def feed(
        self, ids: Sequence[int], *, cancelled: threading.Event | None = None, spoken: bool = False
    ) -> Tensor | None:
        """Append tokens; returns the hidden state of the last, `[H]`.

        They ask about what was read, or answer, rather than being part of it, which sparse methods
        distinguish. None if `cancelled` was set before the end; then `ids` says how far it came. Raises
        ModelError: overflow beyond the model's window, out_of_memory. After an error all is as it was before.
        `spoken`: as in `Engine.step`.
        """
        self.engine.fits(len(self.ids) + len(ids))
        hidden, before, computed = None, len(self.ids), self.computed
        try:
            for start in range(0, len(ids), self.engine.chunk):
                if cancelled is not None and cancelled.is_set():
                    return None
                piece = list(ids[start : start + self.engine.chunk])
                hidden = self.engine.step([self], torch.tensor([piece]), spoken=spoken)[0, -1]
                self.ids += piece
                self.computed += len(piece)
        except BaseException:
            self.crop(before)
            self.computed = computed
            raise
        return hidden

    def crop(self, tokens: int) -> None:
        """Forget all but the first `tokens`."""
        with self.engine.lock:
            self.state.crop(len(self.ids) - tokens)
        del self.ids[tokens:]

    def close(self) -> None:
        """Let go of the pages."""
        with self.engine.lock:
            self.state.close()
