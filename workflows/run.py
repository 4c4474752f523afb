"""One run: what its nodes share. LangGraph's `context`, never checkpointed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from langchain_core.language_models import BaseChatModel

from agentctx.memory.errors import ModelError
from agentctx.memory.types import Budget, Cost, Failure, LeftOut, Notice, Plan, Usage
from agentctx.workflows.cache import LeafCache
from agentctx.workflows.cost import without_retries
from agentctx.workflows.ledger import Ledger, limit_of
from agentctx.workflows.scope import Scope
from agentctx.workflows.state import State
from agentctx.workflows.trace import Trace

# From this share of the user's budget on, a run that may not fit starts to finish.
WIND_DOWN = 0.8


class Stop:
    """A request to end a run, from any thread. The first winds down, the second cancels."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.cancelled = False
        self._lock = threading.RLock()  # a signal handler may interrupt the thread that holds it
        self._listeners: dict[object, tuple[asyncio.AbstractEventLoop, Callable[[], None]]] = {}

    def request(self, reason: str) -> None:
        """Ask the run to finish with what it has; asked again, to drop what is in flight too."""
        with self._lock:
            self.cancelled = self.reason is not None
            self.reason = self.reason or reason
            loops = {loop for loop, _ in self._listeners.values()}
        for loop in loops:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._tell, loop)

    @contextmanager
    def heard(self, listener: Callable[[], None]) -> Iterator[None]:
        """Call `listener` in the running loop at each request that comes inside the block."""
        mark = object()
        with self._lock:
            self._listeners[mark] = asyncio.get_running_loop(), listener
        try:
            yield
        finally:
            with self._lock:
                del self._listeners[mark]

    async def requested(self, *, twice: bool = False) -> None:
        """Wait for a request; with `twice`, for the second."""
        event = asyncio.Event()
        with self.heard(event.set):
            while not (self.cancelled if twice else self.reason):
                await event.wait()
                event.clear()

    def _tell(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            listeners = [listener for its, listener in self._listeners.values() if its is loop]
        for listener in listeners:
            listener()


@dataclass
class RunContext:
    """The model's door, the accounts and the stores of one run."""

    run_id: str
    scope: Scope
    model: BaseChatModel
    plan: Plan
    cache: LeafCache
    trace: Trace
    stop: Stop = field(default_factory=Stop)
    backoff: float = 0.5  # seconds before the first retry, doubled for each further one
    grace: float = 10.0  # seconds that calls in flight get after a stop request
    warnings: list[Notice] = field(default_factory=list)
    cached: int = 0
    scored: int = 0
    retried: int = 0
    reused: int = 0  # tokens of prompts and scored texts whose keys and values were held
    uncomputed: int = 0  # those of them that are input tokens: the prompts'
    drafted: int = 0
    accepted: int = 0
    left_out: LeftOut | None = None  # of attention, where a guard looks
    succeeded: int = 0
    seen: State = field(default_factory=lambda: State())  # what the nodes gave so far, for a cancelled run
    dead: Failure | None = None  # set when the model cannot be reached at all
    dead_error: ModelError | None = None

    def __post_init__(self) -> None:
        self.ledger = Ledger(
            limit_of(self.scope.budget, self.plan.ceiling), hold=self.plan.hold, journal=self._journal
        )
        self._completes = without_retries(self.plan).within(self.ledger.limit)  # a plan that fits always does
        self.retries_left = self.plan.retry_pool
        self.started = time.monotonic()
        self.gate = asyncio.Semaphore(self.scope.profile.concurrency)
        # Calls that are prepared: more than can be in flight, so that no place waits for a prompt, but not
        # all, or ten thousand reads would make theirs before the first is sent.
        self.desk = asyncio.Semaphore(2 * self.scope.profile.concurrency)
        self.inflight: dict[str, asyncio.Task[object]] = {}
        self.stopped_because: str | None = None

    def seconds_left(self) -> float | None:
        limit = self.scope.budget.seconds
        return None if limit is None else limit - (time.monotonic() - self.started)

    def winding_down(self) -> str | None:
        """Why no new exploratory call may start, or None."""
        reason = self.stop.reason or self._time_is_up() or self._budget_is_short()
        if reason and not self.stopped_because:
            self.stopped_because = reason
            self.trace.emit("wind_down", reason=reason)
        return reason

    def see(self, update: Mapping[str, Any]) -> None:
        """Keep a node's update at hand: a cancelled run concludes from it."""
        for key, value in update.items():
            old = self.seen.get(key)
            if isinstance(old, dict) and isinstance(value, dict):
                old.update(value)  # in place: a copy for each of many reads would cost their square
            else:
                kept = dict(value) if isinstance(value, dict) else value
                self.seen[key] = kept  # type: ignore[literal-required]

    def take_retry(self, attempts: int = 1) -> bool:
        """Take extra attempts from the run's pool, if so many are left and the run is not ending."""
        if self.retries_left < attempts or self.stop.reason:
            return False
        self.retries_left -= attempts
        return True

    def usage(self) -> Usage:
        spent = self.ledger.spent
        return Usage(
            spent.calls,
            spent.input_tokens,
            spent.output_tokens,
            round(time.monotonic() - self.started, 3),
            self.cached,
            self.scored,
            self.retried,
            spent.input_tokens - self.uncomputed,
            self.reused,
            self.drafted,
            self.accepted,
        )

    def warn(self, code: str, message: str, source: str = "") -> None:
        """Record something the user should know, once."""
        notice = Notice(code, message, source)
        if notice not in self.warnings:
            self.warnings.append(notice)

    def _time_is_up(self) -> str | None:
        left = self.seconds_left()
        if left is None:
            return None
        profile, hold = self.scope.profile, self.plan.hold
        finish = hold.input_tokens / profile.rate_in + hold.output_tokens / profile.rate_out
        # A finish longer than the whole budget must not forbid the start.
        return "seconds" if left <= min(finish, (self.scope.budget.seconds or 0) * (1 - WIND_DOWN)) else None

    def _budget_is_short(self) -> str | None:
        if self._completes:
            return None
        used, limit = self.ledger.spent + self.ledger.reserved, self.ledger.limit
        for name in ("calls", "input_tokens", "output_tokens"):
            if getattr(used, name) >= WIND_DOWN * getattr(limit, name) and getattr(limit, name) < getattr(
                self.plan.ceiling, name
            ):
                return name
        return None

    def _journal(self, event: str, data: dict[str, int]) -> None:
        self.trace.emit(event, **data)


def fits(budget: Budget, cost: Cost) -> bool:
    """True if the budget allows the cost in every dimension."""
    return cost.within(limit_of(budget, cost))
