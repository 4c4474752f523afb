"""A text that was read: asked, forked and continued, and never changed by an answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, Unpack

import torch
from torch import Tensor

from agentctx.memory.errors import ConfigError
from agentctx.memory.kv.past import Past
from agentctx.memory.kv.quantised import QuantisedPool
from agentctx.models.failures import memory_errors
from agentctx.reading.branch import Branch
from agentctx.reading.contents import Contents
from agentctx.reading.frame import Frame
from agentctx.reading.many import spoken_together
from agentctx.reading.records import Coverage, Delta, Reply, Usage
from agentctx.reading.request import Asking, Focus, Place, Request, question_hash, split
from agentctx.reading.scoring import HINT, Look, Method, SpanScore, score_spans
from agentctx.reading.sources import Source, gathered, places, refuse_chosen
from agentctx.reading.speech import Speech, spoken
from agentctx.reading.texts import Text, document_of
from agentctx.runtime.context import Context
from agentctx.runtime.llama import LlamaDecoder
from agentctx.runtime.methods.dense import Dense
from agentctx.runtime.retrieve.mass import attended

if TYPE_CHECKING:
    from agentctx.reading.engine import Engine


class Reading:
    """Made by `Engine.read` or `Engine.compose`; close it, or use it in a `with` statement, to give its
    memory back. What was kept on disk stays. Safe to ask from several threads: they take turns by tokens.

    `complete` is False if reading was cancelled; reading the same again goes on where it ended. `usage` is
    what it took, `warnings` what of the disk failed on the way.
    """

    def __init__(
        self,
        engine: Engine,
        context: Context,
        ids: Sequence[int],
        texts: tuple[Text, ...],
        frame: Frame,
        *,
        keep: bool = False,
        sources: Sequence[Source] = (),
        question: str | None = None,
    ) -> None:
        """`context` holds `ids`, or the first of them; of several `sources`, those of their tokens that they
        keep. `question`: the hash of the only question that it was made for.
        """
        self.engine = engine
        self.complete = bool(sources) or len(context.ids) == len(ids)
        self.usage = Usage(len(context.ids), context.reused, context.computed)
        self.warnings: tuple[str, ...] = tuple(context.warnings)
        self.frame = frame
        self.question = question
        self._context: Context | None = context
        self._sources = tuple(sources)
        self._keep = keep
        kept = [source.kept for source in sources] or [torch.ones(len(context.ids), dtype=torch.bool)]
        self._contents = Contents(list(ids)[: sum(map(len, kept))], torch.cat(kept), texts)
        self._lock = threading.Lock()

    @property
    def texts(self) -> tuple[Text, ...]:
        """What was read, and where its tokens are."""
        return self._contents.texts

    @property
    def coverage(self) -> Coverage:
        """Tokens of the texts, and how many of them were read."""
        return self._contents.coverage(self._contents.kept)

    def ask(self, question: str, **options: Unpack[Asking]) -> Reply:
        """Answer a question from the text, in the form of the model's chat template.

        `options` are the fields of `Focus` and of `Request`. Raises ModelError: overflow if text and question
        exceed the window, out_of_memory, unsupported where the model or its attention method cannot leave
        tokens out; ConfigError for options that cannot be, or a reading that is closed.
        """
        return _last(self.stream(question, **options))

    def stream(self, question: str, **options: Unpack[Asking]) -> Iterator[Delta]:
        """The same as it comes. The last piece carries the reply; leaving the loop ends the answer."""
        focus, request = split(options)
        return self._answer(self._question(question, focus), focus, request)

    def generate(self, prompt: str = "", **options: Unpack[Asking]) -> Reply:
        """Go on from the text and `prompt` as they are, without a chat template."""
        focus, request = split(options)
        self._serves(None, focus)
        return _last(self._answer(self.engine.tokens.data(prompt).ids, focus, request))

    def ask_many(self, questions: Sequence[str], **options: Unpack[Asking]) -> list[Reply]:
        """Answer each question on its own, all in one batch over the same text.

        In float32 the ids are those of separate calls; in bfloat16 they may differ where two tokens are
        nearly as likely. Exact answers are made one after another.
        """
        focus, request = split(options)
        if request.exact or not questions:
            return [self.ask(question, **options) for question in questions]
        asked = [self._question(question, focus) for question in questions]
        weights = self.engine.weights
        contexts: list[Context] = []
        try:
            with memory_errors(weights.name):
                contexts.append(self._together() if focus == Focus() else self._focused(focus, request))
                contexts += [contexts[0].fork() for _ in asked[1:]]
                speeches = [Speech(weights, context, request) for context in contexts]
                return spoken_together(speeches, asked, self._seen(focus), self._told())
        finally:
            for context in contexts:
                context.close()

    def score_spans(
        self,
        question: str,
        spans: Sequence[Place] | None = None,
        *,
        method: Method = "auto",
        rows: Literal["question"] | Reply = "question",
        calibrate: bool = True,
        hint: str = HINT,
    ) -> list[SpanScore]:
        """How much each span has to do with a question, best first; by default the sentences.

        "attention": what the question's `rows` attend to, or those of a reply; "focal": what the row after
        `hint` does; with `calibrate` less what an empty question attends to. "likelihood": how well the span,
        read by itself, predicts the question; "entropy": how sure the model is, after it, of how an answer
        begins. "auto": by attention, but only in the four chunks of 256 tokens that predict the question
        best; what is elsewhere gets minus infinity.

        Attention says where to look; it proves nothing. A model that was not calibrated looks through all
        heads of its middle layers, and a warning says so. Raises ConfigError for an empty question and for
        what was read as token ids, ModelError: overflow, out_of_memory, unsupported where heads hold
        different tokens (an evicted reading) or every layer has a window.
        """
        return score_spans(self, question, spans, method, Look(rows, calibrate, hint))

    def look(self, ids: Sequence[int], *, rows: int, heads: Tensor | None = None) -> Tensor:
        """`runtime.retrieve.mass.attended` of all tokens of the reading in order, 0 for those not held:
        float32 `[tokens]`, without `heads` `[layers, Hq, tokens]`.
        """
        with self._lock:
            order = places(self._sources) if self._sources else None
            context = self._held().fork()
        try:
            with memory_errors(self.engine.weights.name):
                mass = attended([context], ids, rows=rows, heads=heads)[0]
        finally:
            context.close()
        if order is None:
            return mass
        whole = mass.new_zeros(*mass.shape[:-1], len(self._contents.ids))
        return whole.index_copy(-1, order.to(mass.device), mass)

    @property
    def held(self) -> Tensor:
        """Which tokens are held and used, bool `[tokens]`."""
        return self._contents.kept

    def fork(self, *, force: bool = False) -> Branch:
        """A conversation of its own over the same text; nothing is copied until it goes on. `force` as in
        `Focus`.
        """
        self._serves(None, Focus(force=force))
        with self._lock:
            context = self._held().fork()
            shared = [source.share(self.engine.runtime) for source in self._sources]
        return Branch(self.engine, context, self._contents, shared)

    def extend(self, text: str) -> None:
        """Read on: `text` follows what was read. Answers that are being made do not see it.

        The text becomes a longer document with another id. ConfigError unless this is a complete reading of
        one text.
        """
        with self._lock:
            old = self._held()
            last = self.texts[-1]
            if not self.complete or last.document is None or self._sources:
                raise ConfigError("only a complete reading of one text can grow", hint="read it to its end")
            more = self.engine.tokens.data(text)
            document = document_of(last.document.text + text, last.document.source)
            ids = [*self._contents.ids, *more.ids]
            try:
                with memory_errors(self.engine.weights.name):
                    new = self.engine.runtime.read(ids, keep=self._keep)
            finally:
                if self._keep:
                    self.engine.runtime.name(ids, (document.source,), first=last.first)
            grown = replace(last, document=document, offsets=last.offsets.joined(more.offsets))
            self._contents = Contents(ids, torch.ones(len(ids), dtype=torch.bool), (grown,))
            self._context, self.question = new, None
            self.usage = Usage(len(ids), new.reused, new.computed)
            old.close()

    def part(self, places: Sequence[Place] | None, at: int, *, opening: bool) -> Source:
        """The text, or these places of it, to be composed from position `at` on; who takes it closes it.

        With `opening`, what stands before the text is kept.
        """
        contents, first = self._contents, self.texts[0].first
        if self._sources or not self.complete:
            raise ConfigError("only complete readings of one text each can be composed")
        kept = contents.kept if places is None else contents.seen(Focus(attend_only=places))
        before = torch.arange(len(kept)) < first
        kept = kept & ~before | before & opening
        still = torch.arange(len(kept))
        new = torch.where(before, still, at - 1 + (kept & ~before).cumsum(0))
        with self._lock:
            refuse_chosen(self._held(), self._sources)
            past = Source.of(self.engine.runtime, self._held().table).past
        return Source(past, kept, None if torch.equal(new[kept], still[kept]) else new)

    def tokens(self) -> Sequence[int]:
        """The ids of all that was read, with what stands before the text."""
        return self._contents.ids

    def close(self) -> None:
        """Give the memory back. Forks live on."""
        with self._lock:
            if self._context:
                self._context.close()
                for source in self._sources:
                    source.close(self.engine.runtime)
            self._context = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _serves(self, question: str | None, focus: Focus) -> None:
        """Refuse to show what was chosen for one question to another: it lacks what that one needs."""
        if self.question is None or focus.force or focus.reread:
            return
        if question is None or question_hash(question) != self.question:
            raise ConfigError(
                f"this reading was made for one question ({self.question[:12]}…), and kept what that needs",
                hint="read the text without question=, or ask with force=True",
            )

    def _question(self, question: str, focus: Focus) -> list[int]:
        self._held()
        self._serves(question, focus)
        if not question.strip():
            raise ConfigError("the question is empty")
        if not self.frame.after:
            raise ConfigError(
                f"{self.engine.weights.name} has no chat template to ask with",
                hint="use generate, or an instruction-tuned model",
            )
        return self.frame.question(self.engine.tokens, question)

    def _answer(self, ids: Sequence[int], focus: Focus, request: Request) -> Iterator[Delta]:
        with memory_errors(self.engine.weights.name):
            context = self._focused(focus, request)
        try:
            speech = Speech(self.engine.weights, context, request)
            yield from spoken(speech, ids, self._seen(focus), self._told())
        finally:
            context.close()

    def _focused(self, focus: Focus, request: Request) -> Context:
        """A context of its own, over what an answer sees."""
        runtime, contents = self.engine.runtime, self._contents
        with self._lock:
            held, seen = self._held(), contents.seen(focus)
            hidden = bool((contents.kept & ~seen).any())
            if not hidden and not focus.reread:
                context = held.fork()
            elif not focus.reread:
                refuse_chosen(held, self._sources)
                sources = self._sources or (Source.of(runtime, held.table),)
                try:
                    context = gathered(runtime, sources, held.ids, self._end(held), seen)
                finally:
                    for source in sources if not self._sources else ():
                        source.close(runtime)
        if focus.reread:
            ids = [contents.ids[at] for at in seen.nonzero()[:, 0].tolist()]
            context = runtime.read(ids, cancelled=request.cancel)
        if focus.pins:
            try:
                pins = contents.pins(focus.pins, runtime.method, seen if focus.reread else None)
            except ConfigError:
                context.close()
                raise
            context.state.notes[0].pins = pins
        return context

    def _together(self) -> Context:
        """For forks that answer side by side: what was read, as one past that they attend to as one.

        Only where attention is dense and no layer has a window, as in the plain decoder; else a fork.
        """
        runtime = self.engine.runtime
        with self._lock:
            held = self._held()
            plain = runtime.method == Dense() and isinstance(runtime.body, LlamaDecoder)
            if self._sources or not plain or isinstance(runtime.pool, QuantisedPool):
                return held.fork()
            with runtime.lock:
                return Context.over(runtime, Past.over(held.table), held.ids)

    def _seen(self, focus: Focus) -> Coverage:
        return self._contents.coverage(self._contents.seen(focus))

    def _end(self, held: Context) -> int:
        past = held.state.pasts[0]
        return past.end if past else held.table.tokens

    def _held(self) -> Context:
        if self._context is None:
            raise ConfigError("this reading is closed", hint="read the text again: what was kept is not lost")
        return self._context

    def _told(self) -> tuple[str, ...]:
        if self.complete:
            return self.warnings
        missing = self.coverage.total - self.coverage.read
        return (*self.warnings, f"reading was cancelled: {missing:,} tokens of the text were not read")


def _last(deltas: Iterator[Delta]) -> Reply:
    reply = [delta.reply for delta in deltas][-1]
    assert reply is not None
    return reply
