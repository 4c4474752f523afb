"""Exact answers at the price of cheap ones: draft a few tokens cheaply, verify them in one exact pass.

Self-speculation (Zhang et al., "Draft & Verify", arXiv 2309.08168) with sparse attention over the same KV as
the draft (Chen et al., "MagicDec", arXiv 2408.11049), or with the 4-bit twins of the same weights, or both.
The exact pass over a draft costs little more than one over a single token, since it reads the weights and
the KV once. What it disagrees with is forgotten, so the ids are those that greedy decoding alone gives, as
far as one pass over several tokens computes what several passes do: in bfloat16 two tokens can tie to the
last bit, and then the rounding of either pass chooses.

A draft of g tokens yields `1 + a + ... + a^g` tokens on average, if each is accepted with probability a, and
costs g cheap steps and one exact pass. All of this is measured on the way; g is what yields the most tokens
a second, and 0, plain decoding to the end, once that is better.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from agentctx.memory.errors import ConfigError
from agentctx.runtime.body import Body
from agentctx.runtime.context import Context
from agentctx.runtime.layer import DECODE_TOKENS
from agentctx.runtime.methods.blocks import BestBlocks
from agentctx.runtime.methods.dense import Dense
from agentctx.runtime.methods.quest import Quest

MOST = DECODE_TOKENS - 1  # with the token before the draft, the exact pass is still a decode step
FIRST = 3  # tokens of a draft while little is known
ROUNDS = 3  # drafts before one is judged: the first pays for summaries and caches


def draft_method(method: Dense) -> Dense:
    """How to draft where answers are read by `method`: by itself, if it is sparse, else by quest.

    Raises ConfigError for a method that changes what is held: dense attention over that is not exact.
    """
    if method.writes or method.evicts:
        raise ConfigError(
            f"answers under {method.name} cannot be exact: it changes what is held of a text",
            hint="choose dense, quest, mean or adamas, or leave exact out",
        )
    if isinstance(method, BestBlocks):
        return replace(method, guard="")  # a draft is verified in any case
    return Quest() if method == Dense() else method


@dataclass
class Pace:
    """What was measured so far; times are seconds, the shortest seen, as others may use the machine."""

    plain: float = math.inf  # one exact step
    cheap: float = math.inf  # one step of the draft
    row: float = math.inf  # what each token of a draft adds to the exact pass
    rounds: int = 0
    tried: int = 0  # drafted tokens that were compared
    right: int = 0

    def note(self, drafting: float, checking: float, length: int, right: int) -> None:
        """A draft of `length` tokens, 0 for none, of which `right` were accepted."""
        if not length:
            self.plain = min(self.plain, checking)
            return
        self.cheap = min(self.cheap, drafting / length)
        self.row = min(self.row, max(0.0, checking - self.plain) / length)
        self.rounds += 1
        self.tried += min(right + 1, length)
        self.right += right

    def length(self) -> int:
        """How many tokens to draft, 0 to `MOST`, for the most tokens a second."""
        if self.rounds < ROUNDS:
            return FIRST
        chance, one = self.right / self.tried, self.cheap + self.row

        def rate(draft: int) -> float:
            return sum(chance**i for i in range(draft + 1)) / (self.plain + draft * one)

        return max(range(MOST + 1), key=rate)


@dataclass
class Speculation:
    """How to draft, and what came of it. One for each answer."""

    method: Dense  # the attention of the draft
    body: Body | None = None  # the weights of the draft, for KV of the same shape; None: the engine's own
    draft_tokens: int = 0
    accepted_tokens: int = 0
    pace: Pace = field(default_factory=Pace)

    def generate(
        self,
        context: Context,
        hidden: Tensor | None,
        *,
        most: int,
        ends: frozenset[int],
        cancelled: threading.Event,
    ) -> Iterator[int]:
        """Yield what `sampling.generate` yields at temperature 0 over dense attention, whatever the method of
        `context`, which from now on is dense; the arguments are as there.

        An iterator that is closed early leaves tokens in `context` that it has not yielded, `MOST` at most.
        """
        if hidden is None or most < 1:
            return
        context.state.method = Dense()
        token = int(context.engine.logits(hidden, spoken=True).argmax())
        yield token
        count, length = 1, 0  # the first round is a plain step, which tells what one costs
        while count < most and token not in ends and not cancelled.is_set():
            room = min(most - count, context.engine.window - len(context.ids)) - 1
            fed = len(context.ids)
            found = self._round(context, token, max(0, min(length, room)))
            end = next((at + 1 for at, one in enumerate(found) if one in ends), len(found))
            context.crop(fed + end)
            for token in found[:end]:
                yield token
            length = self.pace.length() if length or count == 1 else 0
            count += end

    def _round(self, context: Context, token: int, length: int) -> list[int]:
        """The tokens after `token`, at most `length` + 1; all but the last may stay in the context."""
        engine = context.engine
        engine.fits(len(context.ids) + length + 1)
        with engine.lock, torch.inference_mode():
            began = time.perf_counter()
            draft = self._draft(context, token, length)
            drafted = time.perf_counter()
            said = engine.step([context], torch.tensor([[token, *draft]]), spoken=True)[0]
            exact = engine.logits(said, spoken=True).argmax(-1).tolist()
            checked = time.perf_counter() - drafted
        context.ids += [token, *draft]
        context.computed += 1 + length
        right = next((at for at, (a, b) in enumerate(zip(draft, exact, strict=False)) if a != b), length)
        self.draft_tokens += length
        self.accepted_tokens += right
        self.pace.note(drafted - began, checked, length, right)
        return [*draft[:right], exact[right]]

    def _draft(self, context: Context, token: int, length: int) -> list[int]:
        """Cheap guesses of what follows; the KV that they leave is forgotten."""
        state, body = context.state, self.body or context.engine.body
        exact, state.method = state.method, self.method
        draft: list[int] = []
        start = state.length
        try:
            for _ in range(length):
                hidden = body.forward(torch.tensor([[token]]), state)[0, -1]
                token = int(body.logits(hidden).argmax())
                draft.append(token)
        finally:
            state.crop(state.length - start)
            state.method = exact
        return draft
