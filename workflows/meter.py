"""The Reader behind the ledger: what it looks at is reserved, settled, cached and stopped like any call."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence

from agentctx.memory.types import Cost
from agentctx.workflows.cache import call_key
from agentctx.workflows.ports import Reader, Scores
from agentctx.workflows.run import RunContext

BATCH = 16  # texts between two looks at the clock and the stop flag


class Refused(Exception):
    """The budget, the clock or the user ended the scoring. Callers fall back on what needs no model."""


async def metered(
    run: RunContext, worst: int, look: Callable[[], Awaitable[Scores]], *, finishing: bool = False
) -> Scores:
    """Reserve `worst` tokens, look, and settle what was computed. Raises Refused."""
    if run.stop.cancelled or (not finishing and run.winding_down()):
        raise Refused(run.stopped_because)
    reservation = run.ledger.reserve(Cost(0, worst, 0), finishing=finishing)
    if reservation is None:
        run.stopped_because = run.stopped_because or "budget"
        raise Refused("budget")
    actual = Cost(0, worst, 0)
    try:
        scores = await look()
        actual = Cost(0, scores.computed_tokens, 0)
    finally:
        run.ledger.settle(reservation, actual)
    run.scored += scores.computed_tokens
    run.reused += scores.reused_tokens
    for warning in scores.warnings:
        run.warn("kv", warning)
    return scores


class MeteredReader:
    """A `Reader` for one run. Scores are kept in the leaf cache, so a resumed run scores nothing twice."""

    def __init__(
        self,
        run: RunContext,
        *,
        finishing: bool = False,
        reader: Reader | None = None,
        holders: Callable[[str], Sequence[str]] | None = None,
    ) -> None:
        """`reader`: in the place of the run's, its scores kept apart. `holders`: which documents hold a text,
        for callers that know; they are looked for otherwise.
        """
        found = reader or run.scope.reader
        if found is None:
            raise ValueError("this run has no reader")
        self._run, self._reader, self._finishing = run, found, finishing
        self._role = "likelihood" if found is run.scope.reader else "kv_likelihood"
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
        reader: Reader = self._reader

        async def look() -> Scores:
            sources = await asyncio.to_thread(lambda: [self._holders(text) for text in texts])
            return await reader.likelihood(question, texts, sources)

        return await metered(run, reader.likelihood_cost(question, texts), look, finishing=self._finishing)

    def _key(self, question: str, text: str) -> str:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return call_key(
            model=self._run.scope.profile.fingerprint, role=self._role, question=question, text=digest
        )
