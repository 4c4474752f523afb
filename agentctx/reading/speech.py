"""From token ids to an answer: text in whole characters, why it ended, what it took."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from agentctx.memory.errors import ConfigError
from agentctx.models.failures import memory_errors
from agentctx.models.stops import StopFilter
from agentctx.models.tokenizer import Detokenizer
from agentctx.models.weights import Weights
from agentctx.reading.records import Bracket, Coverage, Delta, Finish, Reply, Usage
from agentctx.reading.request import Request
from agentctx.runtime.context import Context
from agentctx.runtime.methods.dense import Dense
from agentctx.runtime.sampling import generate
from agentctx.runtime.speculate import Speculation, draft_method


class Speech:
    """One answer while it is made; `most` tokens are left to it by its request and the window."""

    def __init__(self, weights: Weights, context: Context, request: Request, *, since: int = 0) -> None:
        """`since`: tokens that were computed for `context` before, and do not count."""
        self.weights = weights
        self.context = context
        self.request = request
        self.usage = Usage()
        self.token_ids: list[int] = []
        self.finish: Finish | None = None
        self.most = 0
        self._since = since
        self._decoder = Detokenizer(weights.tokenizer)
        self._stops = StopFilter(request.stops)
        self._sent = 0  # tokens
        self._text: list[str] = []

    def listen(self, ids: Sequence[int]) -> Tensor | None:
        """Feed the question; returns the last hidden state, None if it was cancelled. Without ids the last
        token is fed again, as only its keys and values are held.
        """
        context = self.context
        if not ids:
            if not context.ids:
                raise ConfigError("there is no text to go on from", hint="read something, or give a prompt")
            if any(context.state.pasts) and not context.table.tokens:
                raise ConfigError("where parts of a text are hidden, a prompt is needed to go on from")
            ids = context.ids[-1:]
            context.crop(len(context.ids) - 1)
        reused = len(context.ids) - (context.computed - self._since)
        hidden = context.feed(ids, cancelled=self.request.cancelled)
        self.usage = Usage(len(context.ids), reused, context.computed - self._since)
        endless = context.engine.method.endless
        room = self.request.max_new_tokens if endless else self.weights.context - len(context.ids)
        self.most = min(self.request.max_new_tokens, room)
        return hidden

    def take(self, token: int) -> Delta | None:
        """Go on with a token; the text that is ready, if any. Sets `finish` at the end."""
        self.token_ids.append(token)
        self.usage = replace(self.usage, output_tokens=len(self.token_ids))
        if token in self.weights.ends:
            self.finish = "stop"
            return None
        piece = self._stops.feed(self._decoder.step(token))
        if self._stops.stopped:
            self.finish = "stop"
        return self._delta(piece) if piece else None

    def end(self, coverage: Coverage, warnings: Sequence[str] = ()) -> Delta:
        """The last piece, with the reply."""
        count = len(self.token_ids)
        if self.finish is None and count == self.request.max_new_tokens:
            self.finish = "length"
        if self.finish is None:
            self.finish = "cancelled" if self.request.cancelled.is_set() else "window"
        last = self._delta("" if self._stops.stopped else self._stops.flush())
        seen = Bracket.of(self.context.state.notes[0].coverage)
        reply = Reply(
            "".join(self._text),
            tuple(self.token_ids),
            self.finish,
            self.usage,
            replace(coverage, bracket=seen),
            tuple(warnings),
        )
        return replace(last, reply=reply)

    def _delta(self, text: str) -> Delta:
        tokens = tuple(self.token_ids[self._sent :])
        self._sent = len(self.token_ids)
        self._text.append(text)
        return Delta(text, tokens, self.usage)


def spoken(
    speech: Speech, ids: Sequence[int], coverage: Coverage, warnings: Sequence[str]
) -> Iterator[Delta]:
    """Answer `ids` token by token; they and the answer are appended to the speech's context."""
    request, context = speech.request, speech.context
    draft = Speculation(draft_method(context.engine.method)) if request.exact else None
    if draft:
        context.state.method = Dense()  # what is asked is read exactly as well
    with memory_errors(speech.weights.name):
        hidden = speech.listen(ids)
        if draft:
            ends, most = speech.weights.ends, speech.most
            tokens = draft.generate(context, hidden, most=most, ends=ends, cancelled=request.cancelled)
        else:
            tokens = _plainly(speech, hidden)
        for token in tokens:
            delta = speech.take(token)
            if draft:
                counts = draft.draft_tokens, draft.accepted_tokens
                speech.usage = replace(speech.usage, draft_tokens=counts[0], accepted_tokens=counts[1])
            if delta:
                yield delta
            if speech.finish:
                break
        yield speech.end(coverage, warnings)


def _plainly(speech: Speech, hidden: Tensor | None) -> Iterator[int]:
    return generate(
        speech.context,
        hidden,
        most=speech.most,
        ends=speech.weights.ends,
        sampling=speech.request.sampling,
        cancelled=speech.request.cancelled,
    )
