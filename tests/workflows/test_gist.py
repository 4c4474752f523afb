"""`gist`: an index that does not depend on the question, and pages opened by number."""

import json

import pytest

from agentctx.api import Context
from agentctx.memory.errors import ConfigError
from agentctx.memory.types import Cost, Document
from agentctx.paths import Paths
from agentctx.testing import FaultyChat, ScriptedChat, fenced_texts, finding, scripted_model
from agentctx.workflows.strategies.gist import Gist

CODE = r"The code of (\w+ is \w+)\."
RAIN = [
    " ".join(f"On day {n} it rained on the coast." for n in range(a, a + 100)) for a in (0, 500)
]  # 2,000 tokens
TEXT = f"The code of Zed is K77. {RAIN[0]} The code of Ypsilon is Q12. {RAIN[1]}"


def open_text(chat, paths=None, text=TEXT, window=1500):
    model = scripted_model(chat, context=window)
    return Context.open([Document.of(text, "a.txt")], model=model, ephemeral=paths is None, paths=paths)


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_citations_point_into_pages_and_the_cost_is_within_the_plan(mode):
    answer = open_text(ScriptedChat(reply=finding(CODE))).ask(
        "Which codes are there?", strategy=Gist(mode=mode)
    )
    assert {c.quote for c in answer.citations} == {"The code of Zed is K77.", "The code of Ypsilon is Q12."}
    for citation in answer.citations:
        assert TEXT[citation.span.start : citation.span.end] == citation.quote
    spent = Cost(answer.usage.calls, answer.usage.input_tokens, answer.usage.output_tokens)
    assert spent.within(answer.plan.ceiling)
    assert answer.coverage.read == answer.coverage.total


def test_a_second_question_makes_no_call_for_gists(tmp_path):
    paths = Paths(*(tmp_path / name for name in ("cache", "data", "state", "config")))
    first, second = ScriptedChat(reply=finding(CODE)), ScriptedChat(reply=finding(CODE))
    one = open_text(first, paths).ask("Which codes are there?", strategy="gist")
    two = open_text(second, paths).ask("Who has a code?", strategy="gist")
    assert one.usage.calls == one.plan.params["pages"] + 2
    assert two.usage.calls == 2
    assert two.usage.cached == two.plan.params["pages"]


def test_a_page_without_a_gist_is_shown_by_its_first_sentence():
    chat = FaultyChat(reply=finding(CODE), faults=["refused"])
    answer = open_text(chat).ask("Which codes are there?", strategy="gist")
    table = next(p for p in chat.prompts if "page 2 " in p)
    assert "page 1 (a.txt): The code of Zed is K77." in table
    assert any(warning.code == "no_gist" for warning in answer.warnings)


def test_pages_that_do_not_exist_are_reported_and_the_others_opened():
    def reply(messages):
        if '"pages"' in str(messages[0].text):
            return {"pages": [99, 1]}
        return finding(CODE)(messages)

    answer = open_text(ScriptedChat(reply=reply)).ask("Which codes are there?", strategy="gist")
    assert [c.quote for c in answer.citations] == ["The code of Zed is K77."]
    assert any("[99]" in warning.message for warning in answer.warnings)


def test_pages_are_opened_in_turn_until_the_model_has_enough():
    asked = []

    def reply(messages):
        if '"pages"' not in str(messages[0].text):
            return finding(CODE)(messages)
        texts = list(fenced_texts(str(messages[-1].text)))
        asked.append(len(texts) - 1)
        return {"pages": [len(asked)], "enough": len(asked) == 3}

    strategy = Gist(mode="sequential", lookups=5, page_tokens=200, gist_tokens=40)
    open_text(ScriptedChat(reply=reply), window=2000).ask("Which?", strategy=strategy)
    assert asked == [0, 1, 2]


def test_a_gist_holds_names_and_figures():
    gist = {"gist": "A storm.", "names": ["Zed"], "figures": ["12 May"]}
    chat = ScriptedChat(reply=lambda m: gist if '"gist"' in str(m[0].text) else json.dumps({"pages": []}))
    open_text(chat).ask("When?", strategy="gist")
    assert "A storm.; Zed; 12 May" in chat.prompts[-1]


@pytest.mark.parametrize(
    "params", [{"mode": "random"}, {"lookups": 0}, {"gist_tokens": 1}, {"page_tokens": 1}]
)
def test_parameters_out_of_range_are_refused(params):
    with pytest.raises(ConfigError):
        Gist(**params)
