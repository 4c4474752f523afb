"""Workflow files as strategies: the five that ship, and what every run must keep to."""

import json
import random
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentctx.api import Context, Stop
from agentctx.memory.errors import AgentctxError, BudgetExceeded, ConfigError, ModelError
from agentctx.memory.types import Budget, Cost, Document
from agentctx.paths import Paths
from agentctx.testing import FaultyChat, ScriptedChat, fenced_texts, finding, scripted_model
from agentctx.workflows.definition import table
from agentctx.workflows.definition.folder import open_definition
from agentctx.workflows.definition.site import NodeType, Result
from agentctx.workflows.definition.symbolic import ListParams
from agentctx.workflows.strategies.map_reduce import MapReduce

FLOWS = Path(__file__).parents[3] / "examples" / "workflows"
NEEDLE = r"The code of (\w+ is \w+)\."
QUESTION = "What is the code of Zed?"
SEARCHING = """\
version: 1
name: same
nodes:
  cut: {type: split}
  note: {type: read}
  say: {type: answer}
edges:
  - {source: START, target: cut}
  - {source: cut, map: {over: cut, as: part, node: note}}
  - {source: note, target: say}
  - {source: say, target: END}
"""
LOOKING = """\
version: 1
name: look_further
nodes:
  cut: {type: split, with: {chunk_tokens: 200}}
  best: {type: select, with: {k: 2}, max_visits: 3}
  say: {type: answer}
edges:
  - {source: START, target: cut}
  - {source: cut, target: best}
  - {source: best, target: say}
  - {source: say, match: {path: no_information, cases: {"true": best}, default: END}}
"""


def haystack(sentences, seed=0, needles=("The code of Zed is K77.",)):
    rng = random.Random(seed)
    lines = [f"Sentence {n} speaks of {rng.choice('abcdefgh') * 5} and no more." for n in range(sentences)]
    for number, needle in enumerate(needles, 1):
        lines[number * sentences // (len(needles) + 1)] = needle
    return " ".join(lines)


def opened(folder, text, **others):
    for name, content in {"flow.yaml": text, **others}.items():
        (folder / name.replace("_yaml", ".yaml")).write_text(content)
    return open_definition(folder / "flow.yaml")


def context(chat, *documents, window=1500, paths=None, tiers=frozenset({"reads", "writes"})):
    model = scripted_model(chat, context=window, tiers=tiers)
    sources = [Document.of(text, f"{number}.txt") for number, text in enumerate(documents)]
    return Context.open(sources, model=model, ephemeral=paths is None, paths=paths)


def spent(answer):
    return Cost(answer.usage.calls, answer.usage.input_tokens, answer.usage.output_tokens)


def kept(ctx, question, flow, **options):
    """Plan, run, and check what holds for every run."""
    calls = len(ctx.model.chat.prompts)
    plan = ctx.plan(question, strategy=flow)
    assert len(ctx.model.chat.prompts) == calls, "a plan calls no model"
    answer = ctx.ask(question, strategy=flow, **options)
    assert spent(answer).within(plan.ceiling)
    texts = {document.id: document.text for document in ctx.corpus.documents}
    for citation in answer.citations:
        if citation.verdict == "supported":
            span = citation.span
            assert texts[span.document_id][span.start : span.end] == citation.quote
    unread = sum(
        len(ctx.model.counter.count_text(texts[s.document_id][s.start : s.end]) * " ")
        for s in (*answer.coverage.unread, *answer.coverage.failed)
    )
    assert answer.coverage.read <= answer.coverage.total
    assert (answer.coverage.read == answer.coverage.total) == (unread == 0)
    return plan, answer


def item_reply(pattern):
    """A perfect reader of items: each match is one, its first group the key, its second the value."""

    def reply(messages):
        texts = list(fenced_texts(str(messages[-1].text)))
        found = [match for text in texts for match in re.finditer(pattern, text)]
        items = [{"key": m[1], "value": m[2], "quotes": [m[0]]} for m in found]
        return {"items": items, "no_information": not items}

    return reply


def test_contract_terms_finds_the_term_and_looks_elsewhere_only_if_it_must():
    flow = open_definition(FLOWS / "contract_terms.yaml")
    chat = ScriptedChat(reply=finding(NEEDLE))
    plan, answer = kept(context(chat, haystack(900), window=3000), QUESTION, flow)
    assert (answer.status, answer.strategy) == ("complete", "contract_terms")
    assert "Zed is K77" in answer.text and answer.citations[0].verdict == "supported"
    assert answer.coverage.read == answer.coverage.total
    assert flow.depth == 1 and plan.ceiling.calls < 200
    silent = ScriptedChat(reply=finding("nothing like (that)"))
    _, nothing = kept(context(silent, haystack(900), window=3000), QUESTION, flow)
    assert nothing.status == "unanswerable"
    assert len(silent.prompts) > len(chat.prompts), "the search inside ran"


def test_meeting_decisions_lists_them_file_by_file():
    flow = open_definition(FLOWS / "meeting_decisions.yaml")
    texts = [haystack(300, n, (f"Resolved: bridge {n} is closed.",)) for n in range(3)]
    chat = ScriptedChat(reply=finding(r"Resolved: (bridge \d is closed)\."))
    _, answer = kept(context(chat, *texts), flow.question, flow)
    assert [line for line in answer.text.splitlines() if line.endswith(".txt")] == ["0.txt", "1.txt", "2.txt"]
    assert answer.text.count("is closed") == 3 and answer.uncited == 0


def test_compare_versions_shows_what_differs():
    flow = open_definition(FLOWS / "compare_versions.yaml")
    texts = [f"{haystack(200)} The rent is {rent}. The term is five years." for rent in ("£400", "£450")]
    chat = ScriptedChat(reply=item_reply(r"The (rent|term) is ([^.]+)\."))
    _, answer = kept(context(chat, *texts), flow.question, flow)
    assert answer.value["conflicts"] == ["rent"]
    assert {(i["key"], i["value"]) for i in answer.value["items"]} == {
        ("rent", "£400"),
        ("rent", "£450"),
        ("term", "five years"),
    }


def test_glossary_has_each_term_once_in_order():
    flow = open_definition(FLOWS / "glossary.yaml")
    text = haystack(400, needles=("Zinc means a metal.", "Adit means a way in.", "Zinc means a metal."))
    chat = ScriptedChat(reply=item_reply(r"([A-Z]\w+) means ([^.]+)\."))
    _, answer = kept(context(chat, text), flow.question, flow)
    assert [line.split(" [")[0] for line in answer.text.splitlines()] == [
        "- Adit: a way in",
        "- Zinc: a metal",
    ]


@pytest.mark.parametrize(("label", "reads"), [("urgent", True), ("routine", False)])
def test_triage_votes_and_goes_on_only_where_it_is_urgent(label, reads):
    flow = open_definition(FLOWS / "triage.yaml")
    quote = "The code of Zed is K77."

    def reply(messages):
        if '"label"' not in str(messages[0].text):
            return finding(NEEDLE)(messages)
        if quote not in str(messages[-1].text):
            return {"label": "", "no_information": True}
        return {"label": label, "quotes": [quote], "confidence": 4, "no_information": False}

    chat = ScriptedChat(reply=reply)
    _, answer = kept(context(chat, haystack(900)), flow.question, flow)
    assert answer.value["label"] == label
    assert answer.text.startswith("- Zed is K77" if reads else label)


def test_a_file_makes_the_same_calls_as_the_strategy_written_by_hand(tmp_path):
    flow = opened(tmp_path, SEARCHING)
    seen = []
    for strategy in (flow, MapReduce()):
        chat = ScriptedChat(reply=finding(NEEDLE))
        ctx = context(chat, haystack(900))
        answer = ctx.ask(QUESTION, strategy=strategy)
        plan = ctx.plan(QUESTION, strategy=strategy)
        # The tag of the delimiters is drawn for each run.
        prompts = sorted(re.sub(r"text-\w+", "text", prompt) for prompt in chat.prompts)
        stages = [(s.role, s.cost.calls) for s in plan.stages]
        seen.append((prompts, stages, answer.text, answer.citations, answer.coverage))
    assert seen[0] == seen[1]


def test_what_fits_is_read_by_exactly_the_direct_prompt(tmp_path):
    flow = opened(tmp_path, SEARCHING)
    prompts = []
    for strategy in (flow, "direct"):
        chat = ScriptedChat(reply=finding(NEEDLE))
        context(chat, "The code of Zed is K77.").ask(QUESTION, strategy=strategy)
        (prompt,) = chat.prompts
        prompts.append(re.sub(r"text-\w+", "text", prompt))
    assert prompts[0] == prompts[1]


def test_a_loop_takes_the_next_chunks_until_the_answer_is_there(tmp_path):
    flow = opened(tmp_path, LOOKING)
    text = haystack(600)
    chat = ScriptedChat(reply=finding(r"speaks of (h+) and no more"))  # says little of where it is
    _, answer = kept(context(chat, text), "Which code has the thing called Zed?", flow)
    assert answer.status == "complete" and answer.coverage.read < answer.coverage.total
    silent = ScriptedChat(reply=finding("nothing like (that)"))
    plan, nothing = kept(context(silent, text), QUESTION, flow)
    assert (len(silent.prompts), plan.stages[0].cost.calls) == (3, 3)
    assert len({prompt.split("\n\n")[0] for prompt in silent.prompts}) == 3, "each visit reads what is new"
    assert nothing.status == "unanswerable"


def test_a_file_runs_inside_another(tmp_path):
    outer = (
        SEARCHING.replace("name: same", "name: outer")
        .replace("say: {type: answer}", "say: {type: definition, with: {file: inner.yaml}}")
        .replace("note: {type: read}", "note: {type: read}\n  list_it: {type: list}")
    )
    outer = outer.replace("target: say}", "target: list_it}").replace(
        "- {source: say,", "- {source: list_it, target: say}\n  - {source: say,"
    )
    flow = opened(tmp_path, outer, inner_yaml=SEARCHING)
    assert flow.depth == 1
    chat = ScriptedChat(reply=finding(NEEDLE))
    plan, answer = kept(context(chat, haystack(900)), QUESTION, flow)
    assert answer.status == "complete" and answer.usage.cached > 0, (
        "what the outer file read is not read again"
    )
    assert any(stage.name.startswith("say: ") for stage in plan.stages)
    with pytest.raises(ConfigError, match="depth 0"):
        context(chat, haystack(900)).plan(QUESTION, strategy=flow, budget=Budget(depth=0))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    text=st.text(min_size=1, max_size=3000).filter(str.strip) | st.integers(20, 300).map(haystack),
    window=st.integers(1400, 3000),
    seed=st.integers(0, 2**32),
)
@pytest.mark.parametrize("name", sorted(path.stem for path in FLOWS.glob("*.yaml")))
def test_no_run_spends_more_than_its_plan(name, text, window, seed):
    """A model that always writes its maximum, at times garbage, at times nothing, on arbitrary text."""
    rng = random.Random(seed)
    flow = open_definition(FLOWS / f"{name}.yaml")

    def reply(messages):
        return rng.choice(['{"facts": [', "{}", "", '{"points": [{"text": "a", "quotes": ["b"]}]}', "no"])

    ctx = context(ScriptedChat(reply=reply, output_tokens=10**6), text, window=window)
    try:
        kept(ctx, QUESTION, flow)
    except (ModelError, BudgetExceeded):
        return


@pytest.mark.parametrize("name", sorted(path.stem for path in FLOWS.glob("*.yaml")))
@pytest.mark.parametrize("fault", ["timeout", "malformed", "refused", "overflow", "rate_limit"])
def test_a_fault_in_any_call_ends_in_an_answer_or_a_typed_error(name, fault, monkeypatch):
    async def at_once(run, seconds):
        return None

    monkeypatch.setattr("agentctx.workflows.send._pause", at_once)
    flow = open_definition(FLOWS / f"{name}.yaml")
    for at in (0, 3):
        chat = FaultyChat(reply=finding(NEEDLE), faults=[*[None] * at, fault])
        try:
            answer = context(chat, haystack(500)).ask(QUESTION, strategy=flow)
        except AgentctxError:
            continue
        assert answer.status in ("complete", "partial", "unanswerable")


@pytest.mark.parametrize("after", range(1, 40, 5))
def test_it_can_be_stopped_at_any_event_and_finished_later(tmp_path, after):
    paths = Paths(*(tmp_path / name for name in ("cache", "data", "state", "config")))
    flow = open_definition(FLOWS / "contract_terms.yaml")
    stop, events = Stop(), []

    def listen(event):
        events.append(event)
        if len(events) == after:
            stop.request("interrupted")
            stop.request("interrupted")

    chat = ScriptedChat(reply=finding(NEEDLE), delay=0.001)
    ctx = context(chat, haystack(900), window=3000, paths=paths)
    first = ctx.ask(QUESTION, strategy=flow, run_id="r", stop=stop, on_event=listen)
    assert first.status in ("partial", "complete")
    # The file is not needed any more: the run keeps what it was made of.
    manifest = json.loads((paths.runs / "r" / "run.json").read_text())
    assert manifest["strategy"] == "definition" and "prompts/terms.md" in manifest["params"]["files"]
    again = ctx.ask(QUESTION, strategy=flow)
    assert again.status == "complete"
    assert len(set(chat.prompts)) <= again.plan.ceiling.calls


def test_the_smaller_of_two_budgets_holds(tmp_path):
    flow = opened(tmp_path, SEARCHING.replace("edges:", "budget: {calls: 3}\nedges:"))
    chat = ScriptedChat(reply=finding(NEEDLE))
    ctx = context(chat, haystack(900))
    with pytest.raises(BudgetExceeded) as caught:
        ctx.ask(QUESTION, strategy=flow, budget=Budget(calls=50))
    assert len(chat.prompts) <= 3 and caught.value.partial.status == "partial"
    with pytest.raises(BudgetExceeded):
        ctx.ask(QUESTION, strategy=flow, budget=Budget(calls=2))


@pytest.mark.parametrize(
    ("limit", "said"), [("input_tokens: 40", "40 input tokens"), ("output_tokens: 5", "5 output")]
)
def test_a_budget_below_one_call_is_refused_before_anything_is_spent(tmp_path, limit, said):
    flow = opened(tmp_path, SEARCHING.replace("edges:", f"budget: {{{limit}}}\nedges:"))
    with pytest.raises(ConfigError, match=f"the budget of {said}.* pays for no call"):
        context(ScriptedChat(reply=finding(NEEDLE)), haystack(900)).plan(QUESTION, strategy=flow)


def test_retry_timeout_and_cache_hold_for_the_calls_of_their_node(tmp_path):
    terms = "{type: read, retry: {attempts: 1}, timeout: 0.05}"
    flow = opened(tmp_path, SEARCHING.replace("{type: read}", terms))
    chat = ScriptedChat(reply=finding(NEEDLE), delay=0.5)
    with pytest.raises(ModelError, match="no reply in the time"):
        context(chat, haystack(500)).ask(QUESTION, strategy=flow)
    assert not chat.prompts, "no call came to its end, and none was sent again"
    paths = Paths(*(tmp_path / name for name in ("cache", "data", "state", "config")))
    fresh = opened(tmp_path, SEARCHING.replace("{type: read}", "{type: read, cache: false}"))
    counts = []
    for _ in range(2):
        ctx = context(ScriptedChat(reply=finding(NEEDLE)), haystack(500), paths=paths)
        counts.append(ctx.ask(QUESTION, strategy=fresh).usage.calls)
    assert counts[1] == counts[0] - 1, "the answer is shared between runs, the reads are not"


def test_the_state_holds_no_text_and_the_graph_is_an_ordinary_one(tmp_path):
    paths = Paths(*(tmp_path / name for name in ("cache", "data", "state", "config")))
    flow = open_definition(FLOWS / "contract_terms.yaml")
    text = haystack(600).replace("no more", "XYZZY")
    ctx = context(ScriptedChat(reply=finding(NEEDLE)), text, window=3000, paths=paths)
    ctx.ask(QUESTION, strategy=flow, run_id="r")
    assert b"XYZZY" not in b"".join(path.read_bytes() for path in (paths.runs / "r").iterdir())
    graph = flow.graph().compile()
    assert "note" in graph.get_graph().draw_mermaid()
    assert set(graph.get_input_jsonschema()["properties"]) == {"question", "sources"}
    assert {"parts", "notes"} <= set(flow.state.__annotations__)


def test_a_node_type_of_another_package_is_found_by_its_entry_point(tmp_path, monkeypatch):
    def build(site):
        async def step(run, values):
            (port,) = site.ports
            return Result({n: key for n, key in values[port.key].items() if int(n) % 2 == 0})

        return step

    even = NodeType(ListParams, build, lambda site, scope: [], takes=("records",), gives="records")
    points = [
        EntryPoint("even", "own_nodes:EVEN", table.GROUP),
        EntryPoint("broken", "no_such:X", table.GROUP),
    ]
    monkeypatch.setattr(table, "entry_points", lambda group: [p for p in points if p.group == group])
    (tmp_path / "own_nodes.py").write_text("EVEN = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import own_nodes

    text = SEARCHING.replace(
        "say: {type: answer}", "half: {type: even, reads: note}\n  say: {type: answer, reads: half}"
    )
    text = text.replace(
        "source: note, target: say}", "source: note, target: half}\n  - {source: half, target: say}"
    )
    with pytest.raises(ConfigError, match="own_nodes:EVEN is no NodeType"):
        opened(tmp_path, text)
    own_nodes.EVEN = even
    _, answer = kept(
        context(ScriptedChat(reply=finding(NEEDLE)), haystack(900)), QUESTION, opened(tmp_path, text)
    )
    assert answer.coverage.read == answer.coverage.total
    with pytest.raises(ConfigError, match="no_such:X cannot be loaded"):
        opened(tmp_path, text.replace("type: even", "type: broken"))
