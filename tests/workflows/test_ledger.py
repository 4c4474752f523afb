import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Budget, Cost
from agentctx.workflows.ledger import Ledger, Reservation, limit_of

costs = st.builds(Cost, st.integers(0, 4), st.integers(0, 300), st.integers(0, 90))


class Accounts(RuleBasedStateMachine):
    """Any order of reserving and settling, at any node of a tree."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict] = []
        self.root = Ledger(Cost(10, 1000, 300), hold=Cost(1, 100, 30), journal=self.journal)
        self.nodes = [self.root, self.root.child(Cost(5, 500, 300)), self.root.child(Cost(10, 400, 100))]

    def journal(self, event: str, data: dict) -> None:
        self.events.append({"event": event, "data": data})

    reservations = Bundle("reservations")

    @rule(target=reservations, node=st.integers(0, 2), cost=costs, finishing=st.booleans())
    def reserve(self, node, cost, finishing):
        before = [(ledger.spent, ledger.reserved) for ledger in self.nodes]
        reservation = self.nodes[node].reserve(cost, finishing=finishing)
        if reservation is None:
            assert before == [(ledger.spent, ledger.reserved) for ledger in self.nodes]
        return node, reservation

    @rule(entry=consumes(reservations), share=st.floats(0, 1))
    def settle(self, entry, share):
        node, reservation = entry
        if reservation is None:
            return
        c = reservation.cost
        actual = Cost(c.calls, int(c.input_tokens * share), int(c.output_tokens * share))
        assert self.nodes[node].settle(reservation, actual)

    @invariant()
    def never_above_a_limit(self):
        for ledger in self.nodes:
            assert (ledger.spent + ledger.reserved).within(ledger.limit)
        children = self.nodes[1].spent + self.nodes[2].spent
        assert children.within(self.root.spent)

    @invariant()
    def replay_counts_open_reservations_as_spent(self):
        again = Ledger(self.root.limit)
        again.replay(self.events)
        assert again.spent == self.root.spent + self.root.reserved


TestAccounts = Accounts.TestCase


def test_exploration_leaves_the_hold_to_finishing():
    ledger = Ledger(Cost(3, 100, 30), hold=Cost(1, 40, 10))
    assert ledger.reserve(Cost(1, 61, 0)) is None
    assert ledger.reserve(Cost(1, 60, 0)) is not None
    assert ledger.reserve(Cost(1, 40, 0)) is None
    assert ledger.reserve(Cost(1, 40, 0), finishing=True) is not None


def test_more_than_was_reserved_is_reported_and_charged():
    ledger = Ledger(Cost(3, 100, 30))
    reservation = ledger.reserve(Cost(1, 10, 5))
    assert isinstance(reservation, Reservation)
    assert not ledger.settle(reservation, Cost(1, 10, 9))
    assert ledger.spent.output_tokens == 9


def test_reservations_of_a_resumed_run_get_new_numbers():
    events: list[dict] = []
    first = Ledger(Cost(5, 5, 5), journal=lambda e, d: events.append({"event": e, "data": d}))
    first.reserve(Cost(1, 1, 1))
    second = Ledger(Cost(5, 5, 5))
    second.replay(events)
    assert second.reserve(Cost(1, 1, 1)).id == 2


def test_limit_is_the_smaller_of_budget_and_plan():
    assert limit_of(Budget(calls=2, input_tokens=900), Cost(5, 100, 7)) == Cost(2, 100, 7)


def test_a_negative_limit_is_refused():
    with pytest.raises(ConfigError, match="negative"):
        Ledger(Cost(-1, 0, 0))


def test_finishing_has_its_whole_hold_again_in_a_resumed_run():
    events: list[dict] = []
    first = Ledger(
        Cost(9, 9, 9), hold=Cost(2, 2, 2), journal=lambda e, d: events.append({"event": e, "data": d})
    )
    failed = first.reserve(Cost(2, 2, 2), finishing=True)
    first.settle(failed, Cost(2, 2, 2))
    again = Ledger(Cost(9, 9, 9), hold=Cost(2, 2, 2))
    again.replay(events)
    assert (again.spent, again.held) == (Cost(2, 2, 2), Cost(2, 2, 2))
    assert again.reserve(Cost(6, 6, 6)) is None
    assert again.reserve(Cost(5, 5, 5)) is not None
