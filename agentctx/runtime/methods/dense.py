"""Exact attention over all that is stored: what every other method is measured against."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from agentctx.kernels.records import Attention
from agentctx.memory.errors import ConfigError
from agentctx.memory.kv.pool import PAGE_TOKENS
from agentctx.runtime.layer import LayerKV

if TYPE_CHECKING:
    from agentctx.runtime.body import Body
    from agentctx.runtime.context import Context


@dataclass(frozen=True)
class Dense:
    """The base of every method."""

    name: ClassVar[str] = "dense"
    moves: ClassVar[bool] = False  # queries are turned to other positions: the layers' rotations are needed
    evicts: ClassVar[bool] = False  # what was read is asked through a part of it
    query_aware: ClassVar[bool] = False  # a question in view would change what it keeps
    endless: ClassVar[bool] = False  # no distance ever exceeds what the method names: texts may be longer

    @property
    def writes(self) -> str:
        """What changes the stored keys and values; readings made under different values are never mixed.

        Empty for methods that only ask differently: one reading serves them all.
        """
        return ""

    @property
    def grid(self) -> int:
        """A text is read in pieces that end at multiples of so many tokens, or where it ends."""
        return PAGE_TOKENS

    @property
    def joins(self) -> bool:
        """Whether its attention may be one part of several: what comes before a sequence is read whole."""
        return not self.moves

    def on(self, body: Body) -> tuple[Body, Dense]:
        """The model as the method needs it, and the method with what it takes from the model."""
        return body, self

    def over(self, inner: Dense) -> Dense:
        """Both at once. Raises ConfigError for methods that cannot be combined."""
        raise ConfigError(
            f"{self.name} cannot be combined with {inner.name}", hint="ropescale:factor=4+quest can be"
        )

    def reach(self, window: int) -> int:
        """Tokens that a text may have, for a model of a window."""
        return sys.maxsize if self.endless else window

    def attend(self, q: Tensor, kv: LayerKV) -> Attention:
        """Attention of new tokens q `[B, Hq, T, D]` over a layer that holds them already."""
        return kv.exact(q)

    def reduce(self, context: Context, tokens: int, asked: Sequence[int] = ()) -> Context:
        """What a text of as many tokens is asked through, once it is read: takes the place of `context`.

        `asked`: ids of the one question that it is for, if that is known.
        """
        return context
