"""A conversation over a text that was read: it goes on from there, and the reading does not notice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

import torch

from agentctx.memory.errors import ConfigError
from agentctx.models.failures import memory_errors
from agentctx.reading.contents import Contents
from agentctx.reading.records import Reply
from agentctx.reading.request import Focus, Options, Place, Request
from agentctx.reading.scope import Scope
from agentctx.reading.sources import Source, gathered, moved, refuse_chosen
from agentctx.reading.speech import Speech, spoken
from agentctx.runtime.context import Context

if TYPE_CHECKING:
    from agentctx.reading.engine import Engine


class Branch:
    """Made by `Reading.fork`. For one thread at a time; its forks are others. Raises what a reading does."""

    def __init__(
        self, engine: Engine, context: Context, contents: Contents, sources: Sequence[Source] = ()
    ) -> None:
        """Closes `context` and `sources`, whose tokens are those of `contents`, and then what was said."""
        self.engine = engine
        self._context: Context | None = context
        self._contents = contents
        self._sources = tuple(sources)
        self._seen = contents.kept
        self._pending: list[int] = []  # said, and not fed yet
        self._scopes: list[Scope] = []

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All that stands in it, from the beginning of the text, hidden or not."""
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
        """Go on from what stands here and `prompt`, both as they are; prompt and answer stay."""
        context = self._held()
        ids = [*self._pending, *self.engine.tokens.data(prompt).ids]
        if not ids and context.table.tokens:  # the last token is fed once more, to go on from it
            ids = [context.ids[-1]]
            context.crop(len(context.ids) - 1)
        start = len(context.ids)
        method = context.state.method
        speech = Speech(self.engine.weights, context, Request(**options), since=context.computed)
        try:
            *_, last = spoken(speech, ids, self._contents.coverage(self._seen), ())
        finally:
            context.state.method = method  # an exact answer changed it
            due = [*ids, *speech.token_ids]
            if len(context.ids) > start + len(due):  # drafts that nobody heard
                context.crop(start + len(due))
            if len(context.ids) >= start:
                self._pending = due[len(context.ids) - start :]
        assert last.reply is not None
        return last.reply

    def pin(self, spans: Sequence[Place]) -> None:
        """What is said from now on always reads these spans, where the method chooses; [] ends it."""
        context = self._held()
        if not any(context.state.pasts):  # else all of it is read anyway
            context.state.notes[0].pins = self._contents.pins(spans, self.engine.runtime.method)

    def drop(self, spans: Sequence[Place]) -> None:
        """Hide these spans from what is said from now on. What was said keeps what it took from them."""
        self._narrow(Focus(drop=spans))

    def attend_only(self, spans: Sequence[Place]) -> None:
        """Hide all of the text but these spans; what was hidden before stays hidden."""
        self._narrow(Focus(attend_only=spans))

    def scope(self, name: str) -> Scope:
        """What is written from here to the end of a `with` statement, to be dropped but for a conclusion."""
        self._held()
        self._scopes.append(scope := Scope(self, name))
        return scope

    def replace(self, scope: Scope, end: int, ids: Sequence[int]) -> None:
        """Let `ids` stand where the tokens of a scope do, up to `end`; what came after is computed again."""
        tail = self.token_ids[end:]

        def change(context: Context, before: Sequence[int]) -> None:
            context.crop(len(before))
            context.feed([*ids, *tail])

        self._change(scope, end, len(ids), change)

    def keep(self, scope: Scope, end: int, kept: range) -> None:
        """Of the tokens of a scope, up to `end`, leave those `kept`, and move them and the rest forward."""
        stay = [*kept, *range(end, len(self.token_ids))]
        self._change(scope, end, len(kept), lambda context, before: moved(context, len(before), stay))

    def fork(self) -> Branch:
        """Another one from here. Scopes stay with this one."""
        context = self._held().fork()
        shared = [source.share(self.engine.runtime) for source in self._sources]
        twin = Branch(self.engine, context, self._contents, shared)
        twin._seen, twin._pending = self._seen, list(self._pending)
        return twin

    def close(self) -> None:
        """Give the memory back."""
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

    def _change(
        self, scope: Scope, end: int, size: int, change: Callable[[Context, Sequence[int]], None]
    ) -> None:
        """Change what stands in a scope, on a fork that takes this one's place once it is done; `size` tokens
        are in it then.
        """
        old, before = self._held(), self.token_ids[: scope.start]
        new = old.fork()
        try:
            with memory_errors(self.engine.weights.name):
                new.feed(self._pending)
                change(new, before)
        except BaseException:
            new.close()
            raise
        self._context, self._pending = new, []
        old.close()
        later = self._scopes.index(scope)
        for number, other in enumerate(self._scopes):
            if number != later:
                other.shift(scope.start, end, scope.start + size - end, inner=number > later)
        scope.end = scope.start + size
        self._scopes = [one for one in self._scopes if not one.lost]

    def _narrow(self, focus: Focus) -> None:
        context, runtime = self._held(), self.engine.runtime
        refuse_chosen(context, self._sources)
        seen = self._seen & self._contents.seen(focus)
        past, table = context.state.pasts[0], context.table
        end = table.tokens + (past.end if past else 0)
        own = [Source.of(runtime, table)] if table.tokens else []
        sources = (*self._sources, *own)
        said = sum(len(source.kept) for source in sources) - len(seen)
        mask = torch.cat([seen, torch.ones(said, dtype=torch.bool)])
        try:
            with memory_errors(self.engine.weights.name):
                narrowed = gathered(runtime, sources, context.ids, end, mask)
        except BaseException:
            for source in own:
                source.close(runtime)
            raise
        self._context, self._sources, self._seen = narrowed, sources, seen
        context.close()

    def _held(self) -> Context:
        if self._context is None:
            raise ConfigError("this branch is closed", hint="fork the reading again")
        return self._context
