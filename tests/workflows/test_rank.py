"""Ranking with a scripted reader: what is looked at, how the two stages are fused, what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentctx.workflows.ports import Scores
from agentctx.workflows.rank import FirstStage, rank, rank_cost

TEXTS = [
    "Geese were counted in spring.",
    "The rent is 1,450 pounds per month.",
    "Rent that comes late bears interest.",
    "No dog may enter.",
]


class ScriptedReader:
    """Scores a text by its entry in `values`; a token is a word; counts what it was asked."""

    def __init__(self, values: dict[str, float] | None = None) -> None:
        self.values = values or {}
        self.asked: list[tuple[str, ...]] = []

    async def likelihood(self, question: str, texts: Sequence[str]) -> Scores:
        self.asked.append(tuple(texts))
        return Scores(
            tuple(self.values.get(text, -9.0) for text in texts), self.likelihood_cost(question, texts), 0
        )

    def likelihood_cost(self, question: str, texts: Sequence[str]) -> int:
        return sum(len(text.split()) + len(question.split()) for text in texts)


async def test_without_a_reader_the_lexical_order_stands() -> None:
    ranking = await rank("how high is the rent per month", TEXTS, reader=None)
    assert ranking.order[0] == 1
    assert set(ranking.order[:2]) == {1, 2}
    assert (ranking.scored, ranking.computed_tokens) == ((), 0)
    assert sorted(ranking.scores, reverse=True) == [ranking.scores[i] for i in ranking.order]


async def test_a_likely_text_comes_first_although_it_shares_no_word() -> None:
    reader = ScriptedReader({TEXTS[3]: -1.0})
    ranking = await rank("can I bring my puppy", TEXTS, reader=reader)
    assert ranking.order[0] == 3
    assert ranking.scored == (0, 1, 2, 3)
    assert ranking.likelihoods == (-9.0, -9.0, -9.0, -1.0)


async def test_among_equally_likely_texts_the_lexical_stage_decides() -> None:
    ranking = await rank("dog", TEXTS, reader=ScriptedReader())
    assert ranking.order[0] == 3


async def test_the_reader_sees_the_candidates_only_and_the_rest_stands_behind() -> None:
    reader = ScriptedReader()
    ranking = await rank("late rent", TEXTS, reader=reader, candidates=2)
    assert reader.asked == [(TEXTS[1], TEXTS[2])]
    assert ranking.scored == (1, 2)
    assert set(ranking.order[:2]) == {1, 2}
    assert [ranking.scores[i] for i in ranking.order[2:]] == [-math.inf, -math.inf]


async def test_inflected_and_mistyped_words_are_found_by_their_parts() -> None:
    texts = ["The seafarer slept.", "A calm day.", "The lighthousekeeper's log."]
    for question in ("lighthouses", "seafaring"):
        expected = 2 if question == "lighthouses" else 0
        assert (await rank(question, texts, reader=None)).order[0] == expected


async def test_a_directory_of_passages_is_searched_whole_and_scored_in_part() -> None:
    texts = [f"Entry {n}: nothing to report, wind {n % 9}." for n in range(3000)]
    texts[2345] = "A woodcock broke the pane."
    reader = ScriptedReader({texts[2345]: -1.0})
    first = FirstStage(texts)
    ranking = await rank("which bird, a woodcock, broke it", texts, reader=reader, candidates=20, first=first)
    assert ranking.order[0] == 2345
    assert len(ranking.scored) == 20
    assert sorted(ranking.order) == list(range(3000))


class ScriptedEmbedder:
    """Texts are near a question if they are listed for it."""

    def __init__(self, near: Sequence[str]) -> None:
        self.near = near

    async def similarities(self, question: str, texts: Sequence[str]) -> Scores:
        return Scores(tuple(float(text in self.near) for text in texts), 0, 0, ("said",))


async def test_what_is_near_by_its_meaning_becomes_a_candidate() -> None:
    texts = [f"Entry {n}: nothing to report, wind {n % 9}." for n in range(300)]
    texts[200] = "No dog may enter."
    reader, embedder = ScriptedReader({texts[200]: -1.0}), ScriptedEmbedder([texts[200]])
    question = "is a report of a puppy to be made"
    blind = await rank(question, texts, reader=reader, candidates=20)
    assert 200 not in blind.scored
    ranking = await rank(question, texts, reader=reader, candidates=20, embedder=embedder)
    assert ranking.order[0] == 200 and ranking.warnings == ("said",)
    assert (await rank(question, texts, reader=None, embedder=embedder)).order[0] == 200


@given(
    texts=st.lists(st.text(max_size=40), max_size=8),
    near=st.sets(st.integers(0, 7)),
    candidates=st.integers(0, 10),
)
async def test_whatever_is_near_the_cost_holds(texts: list[str], near: set[int], candidates: int) -> None:
    reader, embedder = ScriptedReader(), ScriptedEmbedder([texts[i] for i in near if i < len(texts)])
    ranking = await rank("a b", texts, reader=reader, candidates=candidates, embedder=embedder)
    assert sorted(ranking.order) == list(range(len(texts)))
    cost = rank_cost("a b", texts, reader=reader, candidates=candidates, embedder=embedder)
    assert ranking.computed_tokens <= cost


async def test_nothing_to_rank() -> None:
    assert (await rank("anything", [], reader=ScriptedReader())).order == ()
    assert rank_cost("anything", [], reader=ScriptedReader()) == 0


@given(
    question=st.text(max_size=40),
    texts=st.lists(st.text(max_size=40), max_size=8),
    candidates=st.integers(0, 10),
    values=st.lists(st.floats(-20, 0), min_size=8, max_size=8),
)
async def test_whatever_the_texts_it_is_a_permutation_within_its_cost(
    question: str, texts: list[str], candidates: int, values: list[float]
) -> None:
    reader = ScriptedReader(dict(zip(texts, values, strict=False)))
    ranking = await rank(question, texts, reader=reader, candidates=candidates)
    assert sorted(ranking.order) == list(range(len(texts)))
    assert ranking.computed_tokens <= rank_cost(question, texts, reader=reader, candidates=candidates)
    assert len(ranking.scored) == min(candidates, len(texts))
    again = await rank(question, texts, reader=reader, candidates=candidates)
    assert again == ranking


@pytest.mark.parametrize("candidates", [1, 3])
def test_cost_is_of_the_candidates_and_nothing_without_a_reader(candidates: int) -> None:
    reader = ScriptedReader()
    cost = rank_cost("late rent", TEXTS, reader=reader, candidates=candidates)
    assert 0 < cost < reader.likelihood_cost("late rent", TEXTS)
    assert rank_cost("late rent", TEXTS, reader=None) == 0
    assert reader.asked == []
