"""A text that was read: asked, forked and continued, and never changed by an answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

from agentctx.memory.errors import ConfigError
from agentctx.models.failures import memory_errors
from agentctx.reading.branch import Branch
from agentctx.reading.frame import Frame
from agentctx.reading.many import spoken_together
from agentctx.reading.records import Coverage, Delta, Reply, Usage
from agentctx.reading.request import Options, Request
from agentctx.reading.speech import Speech, spoken
from agentctx.reading.texts import Text, document_of
from agentctx.runtime.engine import Context

if TYPE_CHECKING:
    from agentctx.reading.engine import Engine


class Reading:
    """Made by `Engine.read`; close it, or use it in a `with` statement, to give its memory back. What was
    kept on disk stays. Safe to ask from several threads: they take turns token by token.
    """

    def __init__(
        self,
        engine: Engine,
        context: Context,
        ids: Sequence[int],
        texts: tuple[Text, ...],
        frame: Frame,
        keep: bool,
    ) -> None:
        self.engine = engine
        self.texts = texts
        self.usage = Usage(len(context.ids), context.reused, context.computed)
        self.warnings: tuple[str, ...] = tuple(context.warnings)
        self._ids = list(ids)  # all that was to be read
        self._frame = frame
        self._keep = keep
        self._context: Context | None = context
        self._lock = threading.Lock()

    @property
    def complete(self) -> bool:
        """False if reading was cancelled; reading the same again goes on where it ended."""
        return len(self._held().ids) == len(self._ids)

    @property
    def coverage(self) -> Coverage:
        """Tokens of the text, and how many of them were read."""
        held = len(self._held().ids)
        total = sum(len(text.offsets) for text in self.texts)
        read = sum(min(len(text.offsets), max(0, held - text.first)) for text in self.texts)
        return Coverage(total, read, read)

    def ask(self, question: str, **options: Unpack[Options]) -> Reply:
        """Answer a question from the text, in the form of the model's chat template.

        `options` are the fields of `Request`. Raises ModelError: overflow if text and question exceed the
        window, out_of_memory; ConfigError for options that cannot be, or a reading that is closed.
        """
        return _last(self.stream(question, **options))

    def stream(self, question: str, **options: Unpack[Options]) -> Iterator[Delta]:
        """The same as it comes. The last piece carries the reply; leaving the loop ends the answer."""
        return self._answer(self._question(question), Request(**options))

    def generate(self, prompt: str = "", **options: Unpack[Options]) -> Reply:
        """Go on from the text and `prompt` as they are, without a chat template."""
        return _last(self._answer(self.engine.tokens.data(prompt).ids, Request(**options)))

    def ask_many(self, questions: Sequence[str], **options: Unpack[Options]) -> list[Reply]:
        """Answer each question on its own, all in one batch over the same text.

        In float32 the ids are those of separate calls; in bfloat16 they may differ where two tokens are
        nearly as likely. Exact answers are made one after another.
        """
        request = Request(**options)
        if request.exact:
            return [self.ask(question, **options) for question in questions]
        asked = [self._question(question) for question in questions]
        speeches = [Speech(self.engine.weights, self._fork(), request) for _ in asked]
        try:
            with memory_errors(self.engine.weights.name):
                return spoken_together(speeches, asked, self.coverage, self._told())
        finally:
            for speech in speeches:
                speech.context.close()

    def fork(self) -> Branch:
        """A conversation of its own over the same text; nothing is copied until it goes on."""
        return Branch(self.engine, self._fork(), self.coverage)

    def extend(self, text: str) -> None:
        """Read on: `text` follows what was read. Answers that are being made do not see it.

        A complete reading of a text grows; ConfigError else.
        """
        with self._lock:
            old = self._held()
            last = self.texts[-1]
            if not self.complete or last.document is None:
                raise ConfigError("only a complete reading of one text can grow", hint="read it to its end")
            more = self.engine.tokens.data(text)
            ids = [*self._ids, *more.ids]
            with memory_errors(self.engine.weights.name):
                new = self.engine.runtime.read(ids, keep=self._keep)
            document = document_of(last.document.text + text, last.document.source)
            grown = replace(last, document=document, offsets=last.offsets.joined(more.offsets))
            self.texts = (*self.texts[:-1], grown)
            self._ids, self._context = ids, new
            self.usage = Usage(len(ids), new.reused, new.computed)
            old.close()

    def close(self) -> None:
        """Give the memory back. Forks live on."""
        with self._lock:
            if self._context:
                self._context.close()
            self._context = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _question(self, question: str) -> list[int]:
        if not question.strip():
            raise ConfigError("the question is empty")
        if not self._frame.after:
            raise ConfigError(
                f"{self.engine.weights.name} has no chat template to ask with",
                hint="use generate, or an instruction-tuned model",
            )
        self._held()
        return self._frame.question(self.engine.tokens, question)

    def _answer(self, ids: Sequence[int], request: Request) -> Iterator[Delta]:
        with self._forked() as context:
            speech = Speech(self.engine.weights, context, request)
            yield from spoken(speech, ids, self.coverage, self._told())

    @contextmanager
    def _forked(self) -> Iterator[Context]:
        context = self._fork()
        try:
            yield context
        finally:
            context.close()

    def _fork(self) -> Context:
        with self._lock:
            return self._held().fork()

    def _held(self) -> Context:
        if self._context is None:
            raise ConfigError("this reading is closed", hint="read the text again: what was kept is not lost")
        return self._context

    def _told(self) -> tuple[str, ...]:
        missing = self.coverage.total - self.coverage.read
        cut = (f"reading was cancelled: {missing:,} tokens of the text were not read",) if missing else ()
        return (*self.warnings, *cut)


def _last(deltas: Iterator[Delta]) -> Reply:
    reply = [delta.reply for delta in deltas][-1]
    assert reply is not None
    return reply
