"""Picks are whole sentences at exact places, chosen by the two signals and within the token limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentctx.memory.sentences import sentences
from agentctx.workflows.pick import excerpt, pick, pick_cost
from agentctx.workflows.ports import Scores

QUESTION = "who designed the harrow bridge"
BRIDGE = (
    "Harrow Bridge\n"
    "It crosses the river Lune at Kirby, in the north of the county, and carries the old coach road. "
    "It was the work of Anna Holt. "
    "The toll was abolished in 1946."
)
TERN = "The blue tern is a small seabird. It nests on cliffs in Iceland."


class ScriptedReader:
    """Scores a text by a rule and counts a token per word; keeps what it was asked."""

    def __init__(self, score: Callable[[str], float]) -> None:
        self._score = score
        self.asked: list[str] = []

    async def likelihood(self, question: str, texts: Sequence[str]) -> Scores:
        self.asked.extend(texts)
        return Scores(tuple(map(self._score, texts)), self.likelihood_cost(question, texts), 0)

    def likelihood_cost(self, question: str, texts: Sequence[str]) -> int:
        return sum(len(f"{text} {question}".split()) for text in texts)


def prefers(word: str) -> ScriptedReader:
    return ScriptedReader(lambda text: -1.0 if word in text else -3.0)


async def quotes(
    passages: Sequence[str], reader: ScriptedReader | None, answer: str = "", limit: int = 1
) -> list[str]:
    picked = await pick(QUESTION, passages, reader=reader, answer=answer, limit=limit)
    return [passages[found.passage][found.start : found.end] for found in picked.picks]


async def test_the_likeliest_sentence_of_all_passages() -> None:
    assert await quotes([TERN, BRIDGE], prefers("Anna")) == ["It was the work of Anna Holt."]
    assert await quotes([TERN, BRIDGE], prefers("cliffs")) == ["It nests on cliffs in Iceland."]


async def test_sentences_are_read_under_their_heading_which_is_no_candidate() -> None:
    reader = prefers("Anna")
    await quotes([BRIDGE], reader)
    assert reader.asked[1] == "Harrow Bridge: It was the work of Anna Holt."
    assert "Harrow Bridge" not in reader.asked


async def test_lines_of_a_list_are_candidates_not_headings() -> None:
    reader = prefers("cats")
    assert await quotes(["dogs: 3\ncats: 5\nbirds: 8"], reader) == ["cats: 5"]
    assert reader.asked == ["dogs: 3", "cats: 5", "birds: 8"]


async def test_a_short_line_inside_running_text_is_no_heading() -> None:
    reader = prefers("x")
    await quotes([f"It rained.\nSo they stayed\n{BRIDGE.splitlines()[1]}"], reader)
    assert reader.asked[1] == "So they stayed"


async def test_rules_and_brackets_are_no_candidates() -> None:
    reader = prefers("x")
    await quotes(["-----\nparse(text)\n}\n"], reader)
    assert reader.asked == ["parse(text)"]


async def test_the_short_answer_outweighs_a_small_difference() -> None:
    near = ScriptedReader(lambda text: -2.0 if "toll" in text else -2.5)
    assert await quotes([BRIDGE], near) == ["The toll was abolished in 1946."]
    assert await quotes([BRIDGE], near, answer="Anna Holt.") == ["It was the work of Anna Holt."]


async def test_an_answer_that_stands_nowhere_changes_nothing() -> None:
    assert await quotes([BRIDGE], prefers("toll"), answer="Karl Marx") == ["The toll was abolished in 1946."]


async def test_neighbours_become_one_pick() -> None:
    assert await quotes(
        [BRIDGE], ScriptedReader(lambda text: float("Anna" in text or "toll" in text)), limit=2
    ) == ["It was the work of Anna Holt. The toll was abolished in 1946."]
    apart = ScriptedReader(lambda text: float("Lune" in text or "toll" in text))
    assert len(await quotes([BRIDGE], apart, limit=2)) == 2


async def test_the_excerpt_names_each_heading_once_and_keeps_the_order() -> None:
    passages = [TERN, BRIDGE]
    wanted = ("Lune", "toll", "cliffs")
    reader = ScriptedReader(lambda text: float(any(word in text for word in wanted)))
    picked = await pick(QUESTION, passages, reader=reader, limit=3)
    assert excerpt(passages, picked.picks) == (
        "It nests on cliffs in Iceland.\n"
        "Harrow Bridge\n"
        "It crosses the river Lune at Kirby, in the north of the county, and carries the old coach road.\n"
        "The toll was abolished in 1946."
    )


async def test_without_a_reader_shared_words_decide() -> None:
    assert await quotes([TERN, "Kirby is a town. A bridge was designed there."], None) == [
        "A bridge was designed there."
    ]


@pytest.mark.parametrize("passages", [[], [""], ["", " \n "]])
async def test_no_text_no_picks(passages: list[str]) -> None:
    picked = await pick(QUESTION, passages, reader=prefers("x"))
    assert picked.picks == () and picked.computed_tokens == 0


@given(
    passages=st.lists(st.text(max_size=300), max_size=4),
    answer=st.text(max_size=30),
    limit=st.integers(1, 5),
    lexical=st.booleans(),
)
async def test_picks_are_runs_of_whole_sentences_within_the_cost(
    passages: list[str], answer: str, limit: int, lexical: bool
) -> None:
    reader = None if lexical else ScriptedReader(lambda text: float(len(text) % 7))
    picked = await pick(QUESTION, passages, reader=reader, answer=answer, limit=limit)
    assert picked.computed_tokens <= pick_cost(QUESTION, passages, reader=reader)
    shown = 0
    for found in picked.picks:
        spans = [s for s in sentences(passages[found.passage]) if found.start <= s[0] and s[1] <= found.end]
        assert (spans[0][0], spans[-1][1]) == (found.start, found.end)
        shown += len(spans)
    assert shown <= limit
    assert [found.score for found in picked.picks] == sorted((p.score for p in picked.picks), reverse=True)
    assert bool(picked.picks) == any(char.isalnum() for passage in passages for char in passage)
