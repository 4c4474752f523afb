"""The same question to every source, or to every stretch of each: an answer for each, under one budget.

Each is asked in a run of its own, so it has its plan, its ledger and its citations. The runs are not listed;
what they paid for is in the cache of calls, so the same question again goes on where it ended, and pays for
what changed. A limit is shared fairly: whoever starts gets an equal part of what is left, and gives back what
it does not use.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from agentctx.asked import Kind
from agentctx.blocking import blocking_iterator
from agentctx.memory.citations import Verifier
from agentctx.memory.documents import Corpus
from agentctx.memory.errors import AgentctxError, BudgetExceeded, ConfigError, ModelError
from agentctx.memory.types import Answer, Budget, Citation, Cost, Document, Plan, Span, Stage
from agentctx.workflows.frame import Strategy
from agentctx.workflows.run import Stop
from agentctx.workflows.send import FATAL
from agentctx.workflows.split import split
from agentctx.workflows.trace import Event

if TYPE_CHECKING:
    from agentctx.api import Context

Unit = Literal["file", "chunk"]
LIMITS = ("calls", "input_tokens", "output_tokens")


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one: an answer, or why there is none; both where a limit left a part of an answer.

    Its citations are places in the whole document, whatever stretch `span` of it was read.
    """

    source: str
    span: Span
    answer: Answer | None = None
    error: AgentctxError | None = None


@dataclass(frozen=True)
class Each:
    """Made by `Context.each`. `rows` asks, `plan` says what that costs at most."""

    context: Context
    question: str
    per: Unit = "file"
    chunk_tokens: int | None = None  # of a chunk, at most; None: half of what the model reads well
    kind: Kind = "search"
    labels: Sequence[str] = ()
    strategy: str | Strategy = "auto"
    budget: Budget = Budget()
    _verifiers: dict[str, Verifier] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.per not in ("file", "chunk"):
            raise ConfigError(f"there is no division per {self.per!r}", hint="choose file or chunk")
        if self.chunk_tokens is not None and self.per == "file":
            raise ConfigError("chunk_tokens are for per='chunk'")
        if not self.question.strip():
            raise ConfigError("the question is empty")

    @cached_property
    def parts(self) -> list[tuple[Document, Span]]:
        """What is asked: documents, and where in them."""
        whole = [(d, Span(d.id, 0, len(d.text))) for d in self.context.corpus.documents]
        if self.per == "file":
            return whole
        model = self.context.model
        limit = self.chunk_tokens or model.profile.window // 2
        chunks = [(d, chunk.span) for d, _ in whole for chunk in split(d, limit, model.counter)]
        return [(d, span) for d, span in chunks if d.text[span.start : span.end].strip()]

    def plan(self) -> Plan:
        """The sum of the ceilings of all. No model call is made."""
        parts = self.parts
        purse = _Purse(self.budget, len(parts), self._parallel)
        plans, refused = [], []
        for document, span in parts:
            try:
                plans.append(
                    self._alone(document, span).plan(
                        self.question,
                        kind=self.kind,
                        labels=self.labels,
                        strategy=self.strategy,
                        budget=purse.share(),
                    )
                )
            except AgentctxError as error:
                refused.append(f"{document.source} is not answered: {error.message}")
        names = Counter(plan.strategy for plan in plans)
        stages = [_stage(name, [p for p in plans if p.strategy == name]) for name in names]
        return Plan(
            strategy=", ".join(names),
            params={"per": self.per, "parts": len(parts)},
            stages=tuple(stages),
            ceiling=sum((plan.ceiling for plan in plans), Cost()),
            seconds=round(sum(plan.seconds for plan in plans) / self._parallel, 2),
            retry_pool=sum(plan.retry_pool for plan in plans),
            hold=sum((plan.hold for plan in plans), Cost()),
            coverage=round(sum(plan.coverage for plan in plans) / max(1, len(parts)), 4),
            supersteps=max((plan.supersteps for plan in plans), default=0),
            assumptions=(f"{len(parts)} {self.per}s, each asked by itself", *refused),
        )

    async def arows(
        self, *, stop: Stop | None = None, on_event: Callable[[Event], None] | None = None
    ) -> AsyncGenerator[Row, None]:
        """A row for each, in the order of the sources, as they come. Leaving the loop ends what is asked.

        What fails fails alone, but that no model can be reached or that `stop` is requested ends all.
        """
        stop, parts = stop or Stop(), self.parts
        gate, purse = asyncio.Semaphore(self._parallel), _Purse(self.budget, len(parts), self._parallel)
        dead: list[ModelError] = []

        async def one(document: Document, span: Span) -> Row:
            async with gate:
                share = purse.share()
                if dead or stop.reason:
                    ended = dead[0] if dead else AgentctxError("it was not asked", code=stop.reason or "")
                    return Row(document.source, span, error=ended)
                row = await self._row(document, span, share, stop, on_event)
                purse.give_back(share, row)
                if isinstance(row.error, ModelError) and row.error.code in (*FATAL, "unavailable"):
                    dead.append(row.error)
                return row

        tasks = [asyncio.create_task(one(*part)) for part in parts]
        try:
            for task in tasks:
                yield await task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    rows = blocking_iterator(arows)

    async def _row(
        self,
        document: Document,
        span: Span,
        budget: Budget,
        stop: Stop,
        on_event: Callable[[Event], None] | None,
    ) -> Row:
        try:
            answer = await self._alone(document, span).aask(
                self.question,
                kind=self.kind,
                labels=self.labels,
                strategy=self.strategy,
                budget=budget,
                stop=stop,
                on_event=on_event,
            )
        except BudgetExceeded as error:
            partial = self._placed(error.partial, document, span) if error.partial else None
            return Row(document.source, span, partial, error)
        except AgentctxError as error:
            return Row(document.source, span, error=error)
        return Row(document.source, span, self._placed(answer, document, span))

    def _placed(self, answer: Answer, document: Document, span: Span) -> Answer:
        """The answer of a stretch with its citations and gaps where they stand in the document."""
        if span.end - span.start == len(document.text):
            return answer
        if document.id not in self._verifiers:  # one is kept: what it makes of a text is larger than that
            self._verifiers.clear()
            self._verifiers[document.id] = Verifier([document])
        return _moved(answer, self._verifiers[document.id], span)

    def _alone(self, document: Document, span: Span) -> Context:
        """A context that holds nothing else; those side by side share the model's calls in flight."""
        text = document.text[span.start : span.end]
        part = document if len(text) == len(document.text) else Document.of(text, document.source)
        model = self.context.model
        each = max(1, model.profile.concurrency // self._parallel)
        model = replace(model, profile=replace(model.profile, concurrency=each), warnings=())
        return replace(self.context, corpus=Corpus((part,), (), ()), model=model, listed=False)

    @property
    def _parallel(self) -> int:
        return max(1, min(self.context.model.profile.concurrency, len(self.parts)))


class _Purse:
    """What is left of a budget for those that wait; `parallel` of them spend time side by side."""

    def __init__(self, budget: Budget, waiting: int, parallel: int) -> None:
        self._left, self._waiting, self._parallel = budget, waiting, parallel
        self._ends = None if budget.seconds is None else time.monotonic() + budget.seconds

    def share(self) -> Budget:
        """For the next: an equal part, rounded up, so that the first few get something where all cannot."""
        parts = {
            name: -(-left // self._waiting)
            for name in LIMITS
            if (left := getattr(self._left, name)) is not None
        }
        seconds = None
        if self._ends is not None:
            left = max(0.0, self._ends - time.monotonic())
            seconds = min(left, left * self._parallel / self._waiting)
        self._left = replace(self._left, **{name: getattr(self._left, name) - parts[name] for name in parts})
        self._waiting -= 1
        return replace(self._left, **parts, seconds=seconds)

    def give_back(self, share: Budget, row: Row) -> None:
        """What was not used. What failed without saying what it used is taken to have used all."""
        if row.answer is not None:
            parts = [name for name in LIMITS if getattr(share, name) is not None]
            unused = {name: getattr(share, name) - getattr(row.answer.usage, name) for name in parts}
            self._left = replace(
                self._left, **{name: getattr(self._left, name) + unused[name] for name in parts}
            )


def _stage(name: str, plans: Sequence[Plan]) -> Stage:
    """All that one strategy does, as one line of a plan."""
    total = sum((plan.ceiling for plan in plans), Cost())
    return Stage(f"{name}, {len(plans)} times", "", total, 1, round(sum(plan.seconds for plan in plans), 2))


def _moved(answer: Answer, verifier: Verifier, part: Span) -> Answer:
    def moved(found: Span) -> Span:
        return Span(part.document_id, part.start + found.start, part.start + found.end)

    def cited(citation: Citation) -> Citation:
        if citation.span is None:
            return citation
        near = part.start + citation.span.start
        return verifier.verify(citation.quote, part.document_id, citation.claim, near=near)

    unread, failed = (tuple(map(moved, spans)) for spans in (answer.coverage.unread, answer.coverage.failed))
    return replace(
        answer,
        citations=tuple(map(cited, answer.citations)),
        coverage=replace(answer.coverage, unread=unread, failed=failed),
    )
