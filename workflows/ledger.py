"""A tree of accounts: every call is paid for before it is sent, and never more than was allowed.

`reserve` takes the worst case of a call at a node and all its ancestors, or takes nothing; `settle` gives
back what was not used. What finishing will cost is held back from exploration. All methods run in the
event loop's thread and never await, so no lock is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Budget, Cost

NOTHING = Cost()
Journal = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Reservation:
    """A worst case that was taken from a ledger and waits to be settled."""

    id: int
    cost: Cost
    finishing: bool = False


def limit_of(budget: Budget, ceiling: Cost) -> Cost:
    """The smaller of what the caller allows and what the plan announced, per dimension."""

    def least(allowed: int | None, planned: int) -> int:
        return planned if allowed is None else min(allowed, planned)

    return Cost(
        least(budget.calls, ceiling.calls),
        least(budget.input_tokens, ceiling.input_tokens),
        least(budget.output_tokens, ceiling.output_tokens),
    )


class Ledger:
    """One account. `limit` caps it, `hold` is the part that only finishing may use."""

    def __init__(
        self,
        limit: Cost,
        *,
        hold: Cost = NOTHING,
        parent: Ledger | None = None,
        journal: Journal | None = None,
    ) -> None:
        if min(limit.calls, limit.input_tokens, limit.output_tokens) < 0:
            raise ConfigError(f"a limit cannot be negative: {limit}")
        self.limit = limit
        # A hold larger than the limit would stop all work; finishing then simply has everything.
        self.hold = Cost(
            min(hold.calls, limit.calls),
            min(hold.input_tokens, limit.input_tokens),
            min(hold.output_tokens, limit.output_tokens),
        )
        self.spent = Cost()
        self.reserved = Cost()
        self.finished = Cost()  # spent or reserved out of the hold
        self._parent = parent
        self._journal = journal
        self._open: dict[int, Reservation] = {}
        self._root: Ledger = parent._root if parent else self
        self._next = 0

    def child(self, limit: Cost) -> Ledger:
        """An account that draws on this one and is capped by `limit` besides."""
        return Ledger(limit, parent=self)

    @property
    def left(self) -> Cost:
        """What can still be reserved here, the hold included, whatever the ancestors allow."""
        return self.limit - self.spent - self.reserved

    @property
    def held(self) -> Cost:
        """What is still held back from exploration: the hold without what finishing has taken of it."""
        return Cost(
            max(0, self.hold.calls - self.finished.calls),
            max(0, self.hold.input_tokens - self.finished.input_tokens),
            max(0, self.hold.output_tokens - self.finished.output_tokens),
        )

    def reserve(self, cost: Cost, *, finishing: bool = False) -> Reservation | None:
        """Take `cost` here and at every ancestor, or return None and take nothing.

        Exploration leaves the hold untouched; with `finishing` the hold may be used.
        """
        if not self._fits(cost, finishing):
            return None
        # Numbered by the root: all nodes share one journal.
        root = self._root
        root._next += 1
        reservation = Reservation(root._next, cost, finishing)
        self._take(reservation)
        return reservation

    def settle(self, reservation: Reservation, actual: Cost) -> bool:
        """Replace the reservation by what was used. False if that was more than was reserved."""
        node: Ledger | None = self
        while node is not None:
            node.reserved -= reservation.cost
            node.spent += actual
            if reservation.finishing:
                node.finished += actual - reservation.cost
            node._write("settle", reservation, actual)
            node = node._parent
        del self._open[reservation.id]
        return actual.within(reservation.cost)

    def replay(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Charge what an interrupted run spent; a reservation that was never settled counts in full.

        The hold is whole again: finishing may fail, and then there is all of it still to do.
        """
        opened: dict[int, Cost] = {}
        for event in events:
            if event["event"] not in ("reserve", "settle"):
                continue
            data = event["data"]
            cost = Cost(data["calls"], data["input_tokens"], data["output_tokens"])
            if event["event"] == "reserve":
                opened[data["reservation"]] = cost
            else:
                opened.pop(data["reservation"], None)
                self.spent += cost
            self._next = max(self._next, data["reservation"])
        self.spent += sum(opened.values(), Cost())

    def _fits(self, cost: Cost, finishing: bool) -> bool:
        node: Ledger | None = self
        while node is not None:
            room = node.left if finishing else node.left - node.held
            if not cost.within(room):
                return False
            node = node._parent
        return True

    def _take(self, reservation: Reservation) -> None:
        self._open[reservation.id] = reservation
        node: Ledger | None = self
        while node is not None:
            node.reserved += reservation.cost
            if reservation.finishing:
                node.finished += reservation.cost
            node._write("reserve", reservation, reservation.cost)
            node = node._parent

    def _write(self, event: str, reservation: Reservation, cost: Cost) -> None:
        if self._journal:
            self._journal(
                event,
                {
                    "reservation": reservation.id,
                    "finishing": reservation.finishing,
                    "calls": cost.calls,
                    "input_tokens": cost.input_tokens,
                    "output_tokens": cost.output_tokens,
                },
            )
