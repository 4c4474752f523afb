"""A conversation over a text that was read: it goes on from there, and the reading does not notice."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

from agentctx.memory.errors import ConfigError
from agentctx.models.failures import memory_errors
from agentctx.reading.records import Coverage, Reply
from agentctx.reading.request import Options, Request
from agentctx.reading.speech import Speech, spoken
from agentctx.runtime.engine import Context

if TYPE_CHECKING:
    from agentctx.reading.engine import Engine


class Branch:
    """Made by `Reading.fork`. For one thread at a time; forks of it are others."""

    def __init__(self, engine: Engine, context: Context, coverage: Coverage) -> None:
        self.engine = engine
        self._context: Context | None = context
        self._coverage = coverage
        self._pending: list[int] = []  # said, and not fed yet

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All that stands in it, from the beginning of the text."""
        return (*self._held().ids, *self._pending)

    def feed(self, text: str, *, control: bool = False) -> int:
        """Append a text as data, or with `control` as one whose control tokens count; returns its tokens."""
        tokens = self.engine.tokens
        ids = tokens.prompt(text) if control else tokens.data(text).ids
        with memory_errors(self.engine.weights.name):
            self._held().feed([*self._pending, *ids])
        self._pending = []
        return len(ids)

    def generate(self, prompt: str = "", **options: Unpack[Options]) -> Reply:
        """Go on from what stands here and `prompt`; the answer stays. `options` as in `Reading.ask`."""
        context = self._held()
        ids = [*self._pending, *self.engine.tokens.data(prompt).ids]
        method = context.state.method
        speech = Speech(self.engine.weights, context, Request(**options))
        try:
            for delta in spoken(speech, ids, self._coverage, ()):
                last = delta
        finally:
            context.state.method = method  # an exact answer changed it
            fed = speech.usage.prompt_tokens
            said = speech.token_ids
            if len(context.ids) > fed + len(said):  # a draft that nobody heard
                context.crop(fed + len(said))
            self._pending = said[len(context.ids) - fed :]
        assert last.reply is not None
        return last.reply

    def fork(self) -> Branch:
        """Another one from here."""
        twin = Branch(self.engine, self._held().fork(), self._coverage)
        twin._pending = list(self._pending)
        return twin

    def close(self) -> None:
        """Give the memory back."""
        if self._context:
            self._context.close()
        self._context = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _held(self) -> Context:
        if self._context is None:
            raise ConfigError("this branch is closed", hint="fork the reading again")
        return self._context
