"""What the engine needs of a model: hidden states for tokens at positions, over stored KV, and their
logits.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from agentctx.memory.kv.pool import KVShape
from agentctx.runtime.rotation import RopeScaling, Rotation
from agentctx.runtime.state import KVState


class Body(Protocol):
    """A decoder without a head start: it holds weights, and no token of any text."""

    shape: KVShape
    window: int  # tokens it was trained for
    weight_bytes: int

    def rescaled(self, scaling: RopeScaling) -> Body:
        """The same weights with other rotary positions and a longer window.

        Raises ModelError (unsupported) where its rotations are not one plain table.
        """
        ...

    def plain(self) -> Body:
        """The same model without weights of fewer bits, which only the tokens of an answer go through."""
        ...

    def forward(self, ids: Tensor, state: KVState) -> Tensor:
        """Hidden states `[B, T, H]` after the last norm, of ids `[B, T]` int64; `state` says where they
        stand.

        The keys and values go to `state`, whose rows they continue.
        """
        ...

    def rotations(self) -> tuple[Rotation | None, ...]:
        """How each layer turns keys; None where that is not known, so that they must stay where they are."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., V]`, in the dtype of the weights, of hidden states `[..., H]`."""
        ...


def forward(body: Body, ids: Tensor, state: KVState) -> Tensor:
    """A pass over `state`, which is as it was if the pass fails or is interrupted."""
    before = state.length
    try:
        return body.forward(ids, state)
    except BaseException:
        state.crop(state.length - before)
        raise
