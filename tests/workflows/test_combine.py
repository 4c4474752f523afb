import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Document, Evidence, Failure, Span
from agentctx.workflows.combine import Item, concat, cross, merge, unite, vote
from agentctx.workflows.split import split, text_of

evidence = st.builds(
    Evidence,
    span=st.builds(Span, st.sampled_from("de"), st.integers(0, 2), st.integers(3, 4)),
    quote=st.just("q"),
    note=st.sampled_from(["", "n"]),
    score=st.sampled_from([0.0, 1.0]),
)
items = st.lists(
    st.builds(
        Item,
        key=st.sampled_from(["Bo", "bo", "Ann"]),
        value=st.sampled_from(["1", "2"]),
        evidence=st.lists(evidence, max_size=3).map(tuple),
    ),
    max_size=5,
)
numbers = st.lists(st.integers(), max_size=5)


@given(numbers, numbers, numbers)
def test_concat_is_associative_and_the_empty_list_its_identity(
    a: list[int], b: list[int], c: list[int]
) -> None:
    assert concat([concat([a, b]), c]) == concat([a, concat([b, c])]) == a + b + c
    assert concat([a, []]) == concat([[], a]) == a
    assert concat([]) == []


class Characters:
    exact = True

    def count_text(self, text: str) -> int:
        return len(text)

    def count_messages(self, messages: object) -> int:
        return 0


@given(st.text(max_size=400))
def test_concat_after_split_is_the_document(text: str) -> None:
    document = Document.of(text)
    chunks = split(document, 64, Characters())
    assert "".join(concat([text_of(chunk, {document.id: document})] for chunk in chunks)) == text


@given(items, items, items)
def test_merge_laws(a: list[Item], b: list[Item], c: list[Item]) -> None:
    merged = merge([a, b, c])
    assert merge([merge([a, b]), c]) == merge([a, merge([b, c])]) == merged
    assert merge([c, a, b]) == merge([list(reversed(concat([a, b, c])))]) == merged
    assert merge([merged, merged]) == merge([a, b, c, a]) == merged


@given(items)
def test_merge_keeps_every_value_and_every_span_once(a: list[Item]) -> None:
    merged = merge([a])
    assert {(item.key.casefold(), item.value) for item in a} == {
        (item.key.casefold(), item.value) for item in merged
    }
    assert len({(item.key.casefold(), item.value) for item in merged}) == len(merged)
    for item in merged:
        alike = [one for one in a if (one.key.casefold(), one.value) == (item.key.casefold(), item.value)]
        spans = [one.span for one in item.evidence]
        assert spans == sorted({one.span for other in alike for one in other.evidence})


def test_conflicts_stand_side_by_side_and_the_better_score_stays() -> None:
    weak, strong = (Evidence(Span("d", 0, 4), "1934", score=score) for score in (0.1, 0.9))
    one, two = Item("year", "1934", (weak,)), Item("Year", "1935")
    assert merge([[one], [two, Item("year", "1934", (strong,))]]) == [Item("year", "1934", (strong,)), two]
    assert unite([weak, strong]) == unite([strong, weak]) == (strong,)


ballots = st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1e6)), max_size=8)


@given(ballots, st.randoms(use_true_random=False))
def test_vote_does_not_depend_on_order(cast: list[tuple[str, float]], rng: random.Random) -> None:
    label, margin = vote(cast, "cab")
    assert vote(rng.sample(cast, len(cast)), "cab") == (label, margin)
    assert 0 <= margin <= 1


@pytest.mark.parametrize(
    ("cast", "expected"),
    [
        ([("a", 1.0), ("b", 3.0)], ("b", 0.5)),
        ([("b", 2.0), ("a", 1.0), ("a", 1.0)], ("a", 0.0)),
        ([("b", 0.1)] * 10 + [("c", 1.0)], ("b", 0.0)),
        ([], ("a", 0.0)),
        ([("c", 2.0)], ("c", 1.0)),
    ],
)
def test_vote(cast: list[tuple[str, float]], expected: tuple[str, float]) -> None:
    assert vote(cast, ["a", "b", "c"]) == expected


@pytest.mark.parametrize(
    ("cast", "labels"),
    [([("x", 1.0)], ["a"]), ([("a", -1.0)], ["a"]), ([("a", float("nan"))], ["a"]), ([], [])],
)
def test_vote_refuses(cast: list[tuple[str, float]], labels: list[str]) -> None:
    with pytest.raises(ConfigError, match="a vote"):
        vote(cast, labels)


def test_cross_gives_all_pairs_or_a_failure() -> None:
    assert cross([1, 2, 3], [2, 3], lambda a, b: a < b, 6) == [(1, 2), (1, 3), (2, 3)]
    refused = cross([1, 2, 3], [2, 3], lambda a, b: a < b, 5)
    assert isinstance(refused, Failure)
    assert refused.message == "6 pairs to compare; 5 are allowed"
