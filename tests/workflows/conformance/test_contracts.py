"""K1, K3, K5–K8 and K10 of the conformance suite: plan, prompt, coverage, citations, state, trace, graph."""

import hashlib
import json
from dataclasses import dataclass

import pytest
from conformance_cases import (
    CASES,
    EACH,
    YIELDING,
    Case,
    chat_of,
    haystack,
    opened,
    paths_in,
    sentences_of,
    shape,
    spent,
)
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import END, START, StateGraph
from pydantic import TypeAdapter

from agentctx.memory.citations import Verifier
from agentctx.memory.errors import BudgetExceeded, ModelError
from agentctx.memory.types import Answer
from agentctx.runs import Runs
from agentctx.testing import ScriptedChat, fenced_texts, finding
from agentctx.workflows.frame import Strategy
from agentctx.workflows.registry import STRATEGIES, build, strategy
from agentctx.workflows.run import RunContext
from agentctx.workflows.state import Input, Output, State

TIERED = [pytest.param(case, tiers, id=f"{case}-{len(tiers)}") for case in CASES for tiers in case.tiers()]


def test_every_strategy_and_every_kind_is_a_case():
    assert set(STRATEGIES) - {case.strategy for case in EACH} == {"reread"}, "which refuses what is long"
    assert {case.kind for case in EACH} == {case.kind for case in CASES}


@pytest.mark.parametrize(("case", "tiers"), TIERED)
def test_k1_a_plan_makes_no_call_and_k2_holds_and_k6_citations_round_trip(case, tiers):
    chat = chat_of()
    ctx = opened(chat, haystack(), tiers=tiers)
    plan = case.plan(ctx)
    assert not chat.prompts
    assert not ctx.model.reader or not ctx.model.reader.looked
    answer = case.run(ctx)
    assert answer.status == "complete", answer.warnings
    assert spent(answer).within(plan.ceiling)
    assert answer.usage.calls == len(chat.prompts)
    (document,) = ctx.corpus.documents
    supported = [citation for citation in answer.citations if citation.verdict == "supported"]
    assert supported
    for citation in supported:
        start, end = citation.span.start, citation.span.end
        assert document.text[start:end] == citation.quote
        again = Verifier([document]).verify(citation.quote, document.id, near=start)
        assert (again.verdict, again.span) == ("supported", citation.span)
    form = TypeAdapter(Answer)
    assert form.validate_json(form.dump_json(answer)) == answer


@pytest.mark.parametrize("case", YIELDING, ids=str)
def test_k3_an_input_that_fits_one_call_is_sent_in_one(case):
    """A question: by exactly the prompt of `direct`. Another task: whole, in a single read."""
    text = "The code of Zed is K77."
    chat = chat_of()
    answer = case.run(opened(chat, text))
    prompts = [prompt for prompt in chat.prompts if text in list(fenced_texts(prompt))]
    assert len(prompts) == 1
    assert answer.coverage.read == answer.coverage.total
    if case.kind in ("search", "multi_hop"):
        plain = chat_of()
        Case("direct", "search").run(opened(plain, text))
        assert [_untagged(p) for p in chat.prompts] == [_untagged(p) for p in plain.prompts]
        assert answer.strategy == "direct"


def _untagged(prompt):
    return prompt.replace(prompt.partition("<text-")[2][:8], "TAG")


def _fails(prompt, share):
    """A fixed share of all prompts."""
    return int(hashlib.sha256(_untagged(prompt).encode()).hexdigest(), 16) % 100 < share


@pytest.mark.parametrize("case", CASES, ids=str)
def test_k5_failed_calls_leave_a_partial_answer_whose_coverage_is_true(case):
    """Three of ten calls over the text fail. What counts as read was sent in a call that succeeded."""
    sent, failed = [], []

    def reply(messages):
        prompt = str(messages[-1].text)
        if "Sentence" in prompt and _fails(prompt, 30):
            failed.extend(fenced_texts(prompt))
            return ModelError("no", code="refused")
        sent.extend(fenced_texts(prompt))
        return finding(r"(Sentence \d+) speaks of \w+ and no more\.")(messages)

    text = haystack(600, facts=())
    ctx = opened(ScriptedChat(reply=reply), text)
    try:
        answer = case.run(ctx)
    except ModelError:
        assert failed
        return
    except BudgetExceeded as error:
        answer = error.partial
    coverage = answer.coverage
    gaps = sorted([*coverage.unread, *coverage.failed], key=lambda span: span.start)
    assert all(one.end <= other.start for one, other in zip(gaps, gaps[1:], strict=False))
    count = ctx.model.counter.count_text
    assert coverage.read + sum(count(text[span.start : span.end]) for span in gaps) == coverage.total
    assert coverage.total == count(text)
    if coverage.failed:
        assert answer.status == "partial"
    place = 0
    for sentence in sentences_of(text):
        start = text.index(sentence, place)
        place = start + len(sentence)
        if all(span.end <= start or place <= span.start for span in gaps):
            assert any(sentence.strip() in shown for shown in sent), sentence
        elif any(span.start <= start and place <= span.end for span in coverage.failed):
            assert any(sentence.strip() in shown for shown in failed), sentence


@pytest.mark.parametrize("case", CASES, ids=str)
def test_k7_state_holds_no_document_text_and_stays_small_and_k8_the_trace_is_a_tree(case, tmp_path):
    paths = paths_in(tmp_path)
    text = haystack(600).replace("no more", "XYZZY")
    answer = case.run(opened(chat_of(), text, paths=paths), run_id="r")
    folder = paths.runs / "r"
    if not any("XYZZY" in citation.quote for citation in answer.citations):
        assert b"XYZZY" not in b"".join(path.read_bytes() for path in folder.iterdir())
    serde = JsonPlusSerializer(allowed_msgpack_modules=None)
    with SqliteSaver.from_conn_string(str(folder / "checkpoints.db")) as saver:
        saver.serde = serde
        kept = list(saver.list(None))
    assert kept
    for checkpoint in kept:
        values = dict(checkpoint.checkpoint["channel_values"])
        values.pop("answer", None)
        assert b"XYZZY" not in serde.dumps_typed(values)[1]
        reads = len(values.get("reads", ()))
        assert len(serde.dumps_typed(values)[1]) <= 16_000 + 64 * reads
    events = list(Runs(paths.runs).trace("r"))
    assert [event["seq"] for event in events if event["event"] == "run.start"] == [1]
    parents = {event["span"]: event["parent"] for event in events}
    assert parents.pop("0") == "", "one root"
    assert set(parents.values()) <= {"0", *parents}, "every parent is a span of the file"
    assert all(int(parent) < int(span) for span, parent in parents.items()), "no cycle"
    assert all(event["node"] for event in events if event["event"].startswith("call.")), "calls are in nodes"
    settled = [event["data"] for event in events if event["event"] == "settle"]
    for name in ("calls", "input_tokens", "output_tokens"):
        assert sum(data[name] for data in settled) == getattr(answer.usage, name)


@dataclass(frozen=True)
class Outer(Strategy):
    """A graph of somebody else's, with the strategy's own graph as one of its nodes."""

    inner: str = "direct"

    @property
    def name(self):
        return self.inner

    @property
    def kinds(self):
        return strategy(self.inner).kinds

    def plan(self, scope):
        return strategy(self.inner).plan(scope)

    def body_plan(self, scope):
        return strategy(self.inner).body_plan(scope)

    def body(self, graph):
        raise NotImplementedError

    def covered(self, scope, state):
        return strategy(self.inner).covered(scope, state)

    def graph(self):
        graph = StateGraph(State, RunContext, input_schema=Input, output_schema=Output)
        graph.add_node("before", _pass)
        graph.add_node("inside", build(self.inner).compile())
        graph.add_edge(START, "before")
        graph.add_edge("before", "inside")
        graph.add_edge("inside", END)
        return graph


async def _pass(state: State):
    return {}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_k10_it_draws_exports_its_schemas_and_runs_as_a_subgraph(case):
    graph = build(case.strategy).compile()
    assert "__start__" in graph.get_graph().draw_mermaid()
    assert set(graph.get_input_jsonschema()["properties"]) == {"question", "sources"}
    assert set(graph.get_output_jsonschema()["properties"]) == {"answer"}
    json.dumps([graph.get_input_jsonschema(), graph.get_output_jsonschema()])
    alone = case.run(opened(chat_of(), haystack()))
    inside = case.run(opened(chat_of(), haystack()), strategy=Outer(inner=case.strategy))
    assert shape(inside) == shape(alone)
