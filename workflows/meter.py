"""The Reader behind the ledger: what it looks at is reserved, settled, cached and stopped like any call."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence

from agentctx.memory.types import Cost
from agentctx.workflows.cache import call_key
from agentctx.workflows.ports import Reader, Scores
from agentctx.workflows.run import RunContext

BATCH = 16  # texts between two looks at the clock and the stop flag


class Refused(Exception):
    """The budget, the clock or the user ended the scoring. Callers fall back on what needs no model."""


class MeteredReader:
    """A `Reader` for one run. Scores are kept in the leaf cache, so a resumed run scores nothing twice."""

    def __init__(
        self,
        run: RunContext,
        *,
        finishing: bool = False,
        holders: Callable[[str], Sequence[str]] | None = None,
    ) -> None:
        """`holders`: which documents hold a text, for callers that know; they are looked for otherwise."""
        if run.scope.reader is None:
            raise ValueError("this run has no reader")
        self._run, self._reader, self._finishing = run, run.scope.reader, finishing
        self._holders = holders or run.scope.holders

    def likelihood_cost(self, question: str, texts: Sequence[str]) -> int:
        return self._reader.likelihood_cost(question, texts)

    async def likelihood(
        self, question: str, texts: Sequence[str], sources: Sequence[Sequence[str]] = ()
    ) -> Scores:
        """As the reader's; the sources are found in the run's documents."""
        keys = [self._key(question, text) for text in texts]
        known: dict[str, float] = self._run.cache.get_many(keys)
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        computed = reused = 0
        items = list(missing.items())
        for at in range(0, len(items), BATCH):
            part = items[at : at + BATCH]
            scores = await self._score(question, [text for _, text in part])
            fresh = dict(zip((key for key, _ in part), scores.values, strict=True))
            self._run.cache.put_many(fresh)
            known |= fresh
            computed += scores.computed_tokens
            reused += scores.reused_tokens
        return Scores(tuple(known[key] for key in keys), computed, reused)

    async def _score(self, question: str, texts: Sequence[str]) -> Scores:
        run: RunContext = self._run
        if run.stop.cancelled or (not self._finishing and run.winding_down()):
            raise Refused(run.stopped_because)
        reader: Reader = self._reader
        worst = Cost(0, reader.likelihood_cost(question, texts), 0)
        reservation = run.ledger.reserve(worst, finishing=self._finishing)
        if reservation is None:
            run.stopped_because = run.stopped_because or "budget"
            raise Refused("budget")
        actual = worst
        try:
            sources = await asyncio.to_thread(lambda: [self._holders(text) for text in texts])
            scores = await reader.likelihood(question, texts, sources)
            actual = Cost(0, scores.computed_tokens, 0)
        finally:
            run.ledger.settle(reservation, actual)
        run.scored += scores.computed_tokens
        run.reused += scores.reused_tokens
        for warning in scores.warnings:
            run.warn("kv", warning)
        return scores

    def _key(self, question: str, text: str) -> str:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return call_key(
            model=self._run.scope.profile.fingerprint, role="likelihood", question=question, text=digest
        )
