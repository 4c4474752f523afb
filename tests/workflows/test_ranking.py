"""`rank` and `reread` over the whole API, with scripted models: the order, what repairs it, what it costs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentctx.api import Context
from agentctx.memory.errors import BudgetExceeded, ConfigError, InputError, ModelError
from agentctx.memory.types import Answer, Budget, Cost, Document
from agentctx.paths import Paths
from agentctx.testing import (
    FaultyChat,
    Reply,
    ScriptedChat,
    ScriptedReader,
    fenced_texts,
    finding,
    scripted_model,
)
from agentctx.workflows.permute import permuted
from agentctx.workflows.strategies.rank import Rank
from agentctx.workflows.strategies.reread import Reread

QUESTION = "Which file is worth most?"
WORTH = re.compile(r"is worth (\d+) pounds")


def files(worths: Sequence[int]) -> list[Document]:
    """Each file says what it is worth, in a sentence of its own."""
    return [
        Document.of(
            f"The weather in May was dull. The thing of number {n} is worth {worth} pounds.", f"{n}.txt"
        )
        for n, worth in enumerate(worths)
    ]


def judge(messages: Sequence[Any]) -> dict[str, Any]:
    """A perfect judge of worth."""
    worths = [int(WORTH.findall(text)[0]) for text in fenced_texts(str(messages[-1].text))]
    return {"ids": [n + 1 for n in sorted(range(len(worths)), key=lambda n: -worths[n])]}


def worth(question: str, text: str) -> float:
    found = WORTH.findall(text)
    return float(found[0]) if found else -1.0


def opened(
    documents: Sequence[Document], reply: Reply = judge, *, reader: bool = False, window: int = 4000
) -> tuple[Context, ScriptedChat]:
    chat = ScriptedChat(reply=reply)
    scripted = ScriptedReader(worth) if reader else None
    return Context.open(
        documents, model=scripted_model(chat, context=window, reader=scripted), ephemeral=True
    ), chat


def order(answer: Answer) -> list[str]:
    return [entry["source"] for entry in answer.value]


def by_worth(worths: Sequence[int]) -> list[str]:
    return [f"{n}.txt" for n in sorted(range(len(worths)), key=lambda n: -worths[n])]


WORTHS = [30, 80, 10, 70, 20, 90, 60, 50, 40]


def test_a_reader_orders_documents_and_the_best_are_quoted() -> None:
    context, chat = opened(files(WORTHS), reader=True)
    answer = context.ask(QUESTION, strategy=Rank(top=3))
    assert order(answer) == by_worth(WORTHS) and not chat.prompts
    assert answer.value[0]["score"] > answer.value[1]["score"] > answer.value[-1]["score"]
    assert [citation.source for citation in answer.citations] == ["5.txt", "1.txt", "3.txt"]
    assert all(citation.verdict == "supported" for citation in answer.citations)
    assert "is worth 90 pounds" in answer.citations[0].quote
    assert answer.text.splitlines()[0].startswith("- 5.txt, 0 to ") and answer.text.endswith("[3]")
    assert answer.uncited == 0 and answer.status == "complete"
    coverage = answer.coverage
    assert (coverage.read, coverage.scored) == (0, coverage.total)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.permutations(range(8)))
def test_the_order_of_the_candidates_changes_no_score(turn: list[int]) -> None:
    documents = files(WORTHS[:8])
    scores = []
    for given_order in (range(8), turn):
        context, _ = opened([documents[n] for n in given_order], reader=True)
        value = context.ask(QUESTION, strategy="rank").value
        scores.append({entry["source"]: entry["score"] for entry in value})
    assert scores[0] == scores[1]


def test_a_long_document_counts_as_its_best_passage() -> None:
    long = "Nothing of note was said that day. " * 60
    documents = [
        Document.of(f"{long}The ship is worth 99 pounds. {long}", "long.txt"),
        *files([40, 50]),
    ]
    context, _ = opened(documents, reader=True)
    answer = context.ask(QUESTION, strategy=Rank(passage_tokens=64))
    assert order(answer) == ["long.txt", "1.txt", "0.txt"]
    assert answer.citations[0].quote == "The ship is worth 99 pounds."
    first = answer.value[0]
    assert "worth 99" in documents[0].text[first["start"] : first["end"]]


def test_one_document_is_ordered_by_passages() -> None:
    text = "\n\n".join(f"{'Some words go on. ' * 12}It is worth {worth} pounds." for worth in WORTHS)
    context, _ = opened([Document.of(text, "a.txt")], reader=True)
    answer = context.ask(QUESTION, strategy=Rank(passage_tokens=64, top=2))
    assert len(answer.value) > 5
    assert ["worth 90" in c.quote or "worth 80" in c.quote for c in answer.citations] == [True, True]


@pytest.mark.parametrize("mode", ["window", "listwise"])
def test_a_chat_model_orders_windows_from_the_end(mode: Any) -> None:
    context, chat = opened(files(WORTHS))
    strategy = Rank(mode=mode, window=4, stride=2)
    plan = context.plan(QUESTION, strategy=strategy)
    answer = context.ask(QUESTION, strategy=strategy)
    calls = 1 if mode == "listwise" else -(-(len(WORTHS) - 4) // 2) + 1
    assert answer.usage.calls == len(chat.prompts) == calls == plan.stages[0].cost.calls
    assert order(answer)[:2] == by_worth(WORTHS)[:2], "the best two rise through every window"
    assert mode == "window" or order(answer) == by_worth(WORTHS)
    assert answer.coverage.read == answer.coverage.total
    assert answer.value[0]["score"] is None
    assert [warning.code for warning in answer.warnings].count("below_tier") == 1


def test_what_a_reply_leaves_out_or_invents_is_repaired_and_counted() -> None:
    context, _ = opened(files([1, 2, 3, 4]), lambda messages: {"ids": [3, 99, 3, 0]})
    answer = context.ask(QUESTION, strategy=Rank(mode="listwise"))
    assert sorted(order(answer)) == ["0.txt", "1.txt", "2.txt", "3.txt"]
    (said,) = [warning.message for warning in answer.warnings if warning.code == "rank_repaired"]
    assert said == "3 texts were not named and keep their order, 3 unknown numbers dropped"


@given(st.lists(st.integers(-3, 12)), st.integers(0, 9))
def test_any_reply_gives_a_permutation(ids: list[int], size: int) -> None:
    found = permuted(ids, size)
    assert sorted(found.order) == list(range(size))
    named = [n - 1 for n in dict.fromkeys(ids) if 1 <= n <= size]
    assert found.order[: len(named)] == named
    assert found.order[len(named) :] == sorted(found.order[len(named) :])
    assert (found.missing, found.unknown) == (size - len(named), len(ids) - len(named))


def test_a_failed_window_keeps_its_order_and_the_answer_is_partial() -> None:
    chat = FaultyChat(reply=judge, faults=["refused"])
    context = Context.open(files(WORTHS), model=scripted_model(chat, context=4000), ephemeral=True)
    answer = context.ask(QUESTION, strategy=Rank(mode="window", window=4, stride=2))
    assert answer.status == "partial" and len(answer.value) == len(WORTHS)
    assert any(warning.code == "failed_refusal" for warning in answer.warnings)
    assert answer.coverage.failed and answer.coverage.read < answer.coverage.total


def test_a_spent_budget_leaves_the_order_of_words() -> None:
    context, chat = opened(files(WORTHS))
    with pytest.raises(BudgetExceeded) as caught:
        context.ask(
            "What is the thing of number 7 worth?",
            strategy=Rank(mode="window", window=4, stride=2),
            budget=Budget(calls=0),
        )
    assert not chat.prompts and caught.value.partial is not None
    assert order(caught.value.partial)[0] == "7.txt"


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    worths=st.lists(st.integers(0, 99), min_size=1, max_size=30),
    window=st.integers(2, 9),
    size=st.integers(1300, 3000),
    garbage=st.booleans(),
)
def test_a_ranking_stays_within_its_plan(worths: list[int], window: int, size: int, garbage: bool) -> None:
    context, chat = opened(files(worths), (lambda messages: "no") if garbage else judge, window=size)
    chat.output_tokens = 10**6
    strategy = Rank(mode="window", window=window, stride=1)
    plan = context.plan(QUESTION, strategy=strategy)
    try:
        used = context.ask(QUESTION, strategy=strategy).usage
    except ModelError:
        return
    assert Cost(used.calls, used.input_tokens, used.output_tokens).within(plan.ceiling)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.lists(
        st.lists(
            st.sampled_from(["It is so. ", "Not so. ", f"{'word ' * 30}ends. "]), min_size=1, max_size=30
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 4),
)
def test_what_a_reader_looks_at_is_in_the_plan(sentences: list[list[str]], top: int) -> None:
    """Without calls there is no pool of retries that would hide a plan that is too low."""
    documents = [Document.of(f"{n}. {''.join(text)}", f"{n}.txt") for n, text in enumerate(sentences)]
    chat = ScriptedChat(reply=judge)
    reader = ScriptedReader(lambda question, text: float(len(text)))
    context = Context.open(documents, model=scripted_model(chat, reader=reader), ephemeral=True)
    answer = context.ask(QUESTION, strategy=Rank(top=top))
    assert answer.usage.scored == answer.usage.input_tokens <= answer.plan.ceiling.input_tokens
    assert len(answer.value) == len(documents) and answer.stopped_because is None


def test_a_second_ranking_is_free_and_a_changed_one_pays_for_what_changed(tmp_path: Path) -> None:
    paths = Paths(*(tmp_path / name for name in ("cache", "data", "state", "config")))
    calls = []
    for worths in (WORTHS, WORTHS, [95, *WORTHS[1:]]):
        chat = ScriptedChat(reply=judge)
        context = Context.open(files(worths), model=scripted_model(chat, context=4000), paths=paths)
        answer = context.ask(QUESTION, strategy=Rank(mode="window", window=3, stride=2))
        assert order(answer)[0] == by_worth(worths)[0]
        calls.append(len(chat.prompts))
    assert calls[:2] == [4, 0] and 0 < calls[2] < 4


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"mode": "attention"}, "likelihood, window or listwise"),
        ({"by": "page"}, "document or passage"),
        ({"top": 0}, "top must be at least 1"),
        ({"window": 4, "stride": 4}, "below window"),
    ],
)
def test_bad_parameters_are_refused(params: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Rank(**params)


def test_what_the_model_cannot_do_is_refused_before_a_call() -> None:
    context, chat = opened(files(WORTHS))
    with pytest.raises(ConfigError, match="cannot score"):
        context.plan(QUESTION, strategy=Rank(mode="likelihood"))
    long = [Document.of("word " * 700 + str(n), f"{n}.txt") for n in range(30)]
    with pytest.raises(ConfigError, match="do not fit the window"):
        opened(long)[0].plan(QUESTION, strategy=Rank(mode="listwise"))
    assert not chat.prompts


def test_a_text_is_read_twice_with_the_question_between() -> None:
    text = "The code of Zed is K77. " + "Nothing else was said. " * 150
    chat = ScriptedChat(reply=finding(r"The code of (\w+ is \w+)\."))
    context = Context.open(
        [Document.of(text, "a.txt")], model=scripted_model(chat, context=9000), ephemeral=True
    )
    question = "What is the code of Zed?"
    plan = context.plan(question, strategy="reread")
    once = context.plan(question, strategy="direct")
    answer = context.ask(question, strategy="reread")
    (prompt,) = chat.prompts
    pieces = prompt.split(f"Question: {question}")
    assert len(pieces) == 3 and pieces[0].strip() == pieces[1].strip() and not pieces[2]
    assert text in pieces[0]
    assert answer.strategy == "reread" and answer.status == "complete"
    assert [citation.quote for citation in answer.citations] == ["The code of Zed is K77."]
    assert plan.stages[0].cost.calls == 1
    assert 1.8 < plan.stages[0].cost.input_tokens / once.stages[0].cost.input_tokens < 2
    assert answer.usage.input_tokens == plan.stages[0].cost.input_tokens


def test_what_fits_once_but_not_twice_is_refused() -> None:
    text = "Nothing else was said. " * 160
    context, chat = opened([Document.of(text, "a.txt")], window=2000)
    assert context.plan(QUESTION, strategy="direct").strategy == "direct"
    with pytest.raises(InputError, match="2 copies of the input"):
        context.ask(QUESTION, strategy="reread")
    with pytest.raises(ConfigError, match="at least 2"):
        Reread(repeats=1)
    assert not chat.prompts
