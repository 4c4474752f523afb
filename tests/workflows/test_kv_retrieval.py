"""`kv_retrieval` over a scripted index: what it reads, what it says, and when `auto` takes it."""

import pytest

from agentctx.api import Context
from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Document
from agentctx.testing import ScriptedChat, ScriptedIndex, ScriptedReader, finding, scripted_model
from agentctx.workflows.registry import strategy

NEEDLE = r"The code of (\w+ is \w+)\."
QUESTION = "What is the code of Zed?"


def haystack(lines=600, at=200):
    found = [f"Sentence {n} speaks of number {n * 7} and no more." for n in range(lines)]
    found[at] = "The code of Zed is K77."
    return Document.of(" ".join(found), "hay.txt")


def opened(held=bool, *, reader=None, tiers=frozenset({"reads", "writes"})):
    chat, composed = (ScriptedChat(reply=finding(NEEDLE)) for _ in range(2))
    index = ScriptedIndex(composed, lambda question, text: float("Zed" in text), held=held)
    model = scripted_model(chat, context=1500, index=index, reader=reader, tiers=tiers)
    return Context.open([haystack()], model=model, ephemeral=True), chat, index


def codes(answer):
    return [warning.code for warning in answer.warnings]


@pytest.mark.parametrize("tiers", [frozenset({"reads", "writes"}), frozenset({"reads"})])
def test_auto_answers_from_composed_passages_where_all_are_indexed(tiers):
    context, chat, index = opened(reader=ScriptedReader(lambda q, t: 0.0), tiers=tiers)
    plan = context.plan(QUESTION)
    assert "kv_retrieval" in plan.assumptions[0]
    answer = context.ask(QUESTION)
    assert (answer.strategy, answer.status) == ("kv_retrieval", "complete")
    assert "not_indexed" not in codes(answer)
    assert not chat.prompts, "only the composed model is asked"
    (passages,) = index.answered
    assert 1 <= len(passages) <= 4
    assert any("Zed is K77" in text for text in passages)
    assert all(text in context.corpus.documents[0].text for text in passages)
    assert answer.usage.input_tokens <= plan.ceiling.input_tokens
    assert "Zed is K77" in answer.citations[0].quote
    assert answer.citations[0].verdict == "supported"


def test_auto_leaves_an_index_that_is_not_up_to_date_and_says_so():
    context, chat, index = opened(lambda text: "Zed" not in text, reader=ScriptedReader(lambda q, t: 0.0))
    answer = context.ask(QUESTION)
    assert answer.strategy == "spans"
    assert not index.answered
    assert "not_indexed" in codes(answer)


def test_auto_says_nothing_of_an_index_of_other_documents():
    context, _, index = opened(lambda text: False, reader=ScriptedReader(lambda q, t: 0.0))
    answer = context.ask(QUESTION)
    assert answer.strategy == "spans"
    assert "not_indexed" not in codes(answer)


def test_named_it_reads_what_is_not_indexed_and_says_so():
    context, _, index = opened(lambda text: "Zed" not in text)
    answer = context.ask(QUESTION, strategy="kv_retrieval")
    assert answer.status == "complete"
    assert "not_indexed" in codes(answer)
    assert any("Zed" in text for (passages) in index.answered for text in passages)


def test_without_an_index_it_reads_like_spans_and_says_so():
    chat = ScriptedChat(reply=finding(NEEDLE))
    context = Context.open([haystack()], model=scripted_model(chat, context=1500), ephemeral=True)
    assert "nothing is indexed" in context.plan(QUESTION, strategy="kv_retrieval").assumptions[-1]
    answer = context.ask(QUESTION, strategy="kv_retrieval")
    assert "not_indexed" in codes(answer)
    assert len(chat.prompts) == 1


def test_the_ranking_looks_at_few_passages_of_many():
    context, _, index = opened()
    context.ask(QUESTION, strategy=strategy("kv_retrieval", candidates=5, most=2))
    assert len(index.reader.looked) == 5
    assert len(index.answered[0]) <= 2


@pytest.mark.parametrize("params", [{"most": 0}, {"candidates": 0}])
def test_impossible_parameters_are_refused(params):
    with pytest.raises(ConfigError):
        strategy("kv_retrieval", **params)
