"""Replies as no model should give them: broken off, nested without end, half characters, foreign errors."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentctx.api import Context
from agentctx.memory.errors import ConfigError, ModelError
from agentctx.memory.types import Document
from agentctx.paths import Paths
from agentctx.testing import ScriptedChat, finding, scripted_model
from agentctx.workflows.call import parse
from agentctx.workflows.roles import READ
from agentctx.workflows.send import without_surrogates
from agentctx.workflows.strategies.fold import FOLD

GOOD = finding(r"The code of (\w+ is \w+)\.")
QUESTION = "What is the code of Zed?"
RAIN = " ".join(f"Sentence {n} speaks of rain and no more." for n in range(150))
HAY = f"{RAIN} The code of Zed is K77. {RAIN}"
ITEMS = " ".join(f"Item n{n} exists here." for n in range(120))
LISTED = [f"n{n}" for n in range(120)]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    async def at_once(run, seconds):
        return None

    monkeypatch.setattr("agentctx.workflows.send._pause", at_once)


def opened(reply, text, folder=None, context=1500):
    paths = folder and Paths(*(folder / name for name in ("cache", "data", "state", "config")))
    model = scripted_model(ScriptedChat(reply=reply), context=context)
    return Context.open([Document.of(text, "a.txt")], model=model, ephemeral=not folder, paths=paths)


def listing(most):
    """Lists all items of a text; the reply is cut after so many characters."""

    def reply(messages):
        found = re.findall(r"Item (\w+) exists here\.", str(messages[-1].text))
        items = [{"key": key, "value": "1", "quotes": [f"Item {key} exists here."]} for key in found]
        return json.dumps({"items": items[:24], "no_information": not items})[:most]

    return reply


def test_items_of_replies_that_are_cut_off_are_not_all_and_a_cached_run_says_so_too(tmp_path):
    ctx = opened(listing(400), ITEMS, tmp_path, context=2000)
    first, again = (ctx.ask("How many items exist?", kind="aggregate") for _ in range(2))
    assert again.usage.calls == 0
    for answer in (first, again):
        assert 0 < answer.value["result"] < len(LISTED)
        assert answer.status == "partial"
        assert [w.code for w in answer.warnings] == ["cut_off"]
        assert answer.coverage.read == answer.coverage.total


def test_whole_replies_are_not_said_to_be_cut_off():
    text = " ".join(ITEMS.split(" ")[: 4 * 20])
    answer = opened(listing(None), text, context=2000).ask("How many items exist?", kind="aggregate")
    assert (answer.value["result"], answer.status, answer.warnings) == (20, "complete", ())


def test_a_read_in_halves_is_as_incomplete_as_a_half(tmp_path):
    halved = listing(400)

    def reply(messages):
        if len(str(messages[-1].text)) > 1800:
            return ModelError("too long", code="overflow")
        return halved(messages)

    ctx = opened(reply, ITEMS, tmp_path, context=2000)
    first, again = (ctx.ask("How many items exist?", kind="aggregate") for _ in range(2))
    assert "halved" in {w.code for w in first.warnings}
    assert again.usage.calls == 0
    assert again.status == first.status == "partial"
    assert "cut_off" in {w.code for w in again.warnings}


def test_of_an_edit_that_is_cut_off_all_complete_entries_stay():
    whole = {
        "add": [{"text": "a", "quotes": ["q"]}],
        "replace": [{"id": "n1", "text": "b", "quotes": ["r"]}],
        "drop": ["n2", "n3"],
    }
    text = json.dumps(whole)
    assert parse(FOLD, text) == ({**whole, "complete": False}, "")
    data, problem = parse(FOLD, text[: text.index('"n3"') + 2])
    assert (data, problem) == ({**whole, "drop": ["n2"], "complete": False, "cut_off": True}, "")


HALF = '{"facts": [{"text": "a", "quotes": ["hi %s there"]}], "confidence": 1, "no_information": false}'
ODD = {
    "half a character, spelt": HALF % "\\ud83d",
    "half a character": HALF % "\ud83d",
    "nested": '{"facts": ' + "[" * 3000,
    "nested in the list": '{"facts": [{"text": "a", "quotes": []}, ' + "[" * 3000,
    "a long number": '{"confidence": ' + "1" * 6000 + "}",
}


@pytest.mark.parametrize("strategy", ["map_reduce", "lexical", "continue"])
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("at", [0, 1])
def test_an_odd_reply_does_not_end_a_run(strategy, odd, at, tmp_path):
    calls = []

    def reply(messages):
        calls.append(1)
        return ODD[odd] if len(calls) == at + 1 else GOOD(messages)

    answer = opened(reply, HAY, tmp_path).ask(QUESTION, strategy=strategy)
    assert answer.status in ("complete", "partial", "unanswerable")
    assert "overflow" not in " ".join(w.code for w in answer.warnings)


def test_of_a_reply_without_end_the_text_is_not_said_to_be_too_long():
    """It does not fit the prompt of its repair; that is no reason to read the text in halves."""
    ctx = opened(lambda messages: '{"facts": ' + "[" * 6000, HAY)
    answer = ctx.ask(QUESTION, strategy="map_reduce")
    codes = {w.code for w in answer.warnings}
    assert "failed_parse" in codes
    assert not {"failed_overflow", "halved"} & codes


class Foreign(Exception):
    """As the client of a chat model that is not ours raises it."""


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_foreign_error_is_a_failed_attempt(at):
    calls = []

    def reply(messages):
        calls.append(1)
        return Foreign("429 from somebody else") if len(calls) == at else GOOD(messages)

    answer = opened(reply, HAY).ask(QUESTION, strategy="map_reduce")
    assert (answer.status, answer.text) == ("complete", "Zed is K77 [1]")
    assert answer.usage.retried == 1


def test_foreign_errors_only_are_an_error_of_ours_that_names_them():
    with pytest.raises(ModelError, match="Foreign: 429 \ufffd") as error:
        opened(lambda messages: Foreign("429 \ud83d"), HAY).ask(QUESTION, strategy="map_reduce")
    assert error.value.code == "unavailable"


def test_another_error_of_ours_is_no_failed_attempt():
    with pytest.raises(ConfigError, match="no such call"):
        opened(lambda messages: ConfigError("no such call"), HAY).ask(QUESTION, strategy="map_reduce")


@given(st.text(st.characters(exclude_categories=())) | st.just("\ud83d\ude00"))
def test_characters_are_whole_afterwards_and_others_stay(text):
    whole = without_surrogates({"a": [text]})["a"][0]
    whole.encode()
    assert whole == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if text.isascii():
        assert whole == text


def test_a_quote_of_half_a_character_is_kept_with_a_mark():
    data, _ = parse(READ, HALF % "\\ud83d")
    assert without_surrogates(data)["facts"][0]["quotes"] == ["hi \ufffd there"]
