"""`search` and `agents`: facts that only make sense together, branches apart, and when to stop."""

import re

import pytest

from agentctx.api import Context
from agentctx.memory.errors import ConfigError, ModelError
from agentctx.memory.types import Cost, Document
from agentctx.testing import ScriptedChat, fenced_texts, scripted_model
from agentctx.workflows.strategies.agents import Agents
from agentctx.workflows.strategies.search import Search

RELATED = re.compile(r"(\w+) is the (\w+) of (\w+)\.")
RAIN = "It rained again and again on the coast, and the wind was cold. " * 40
TEXT = (
    f"Pelias is the uncle of Jason.\n{RAIN}\nJason is the captain of Argo.\n{RAIN}\n"
    f"Admete is the owner of Bacchis.\n{RAIN}"
)
QUESTION = "Who is the uncle of the captain of Argo?"


def hopper(messages):
    """Follows names: notes a fact if one of its names is known, asks for the names it has just learnt."""
    system, prompt = str(messages[0].text), str(messages[-1].text)
    texts = list(fenced_texts(prompt))
    facts = [m for text in texts for m in RELATED.finditer(text)]
    found = prompt.split('name="found elsewhere')[1:]
    known = {"Argo"} | {w for m in RELATED.finditer("".join(found)[:400]) for w in (m[1], m[3])}
    if '"queries"' in system:
        return {"queries": sorted(known - {"Argo"}) or ["captain of Argo"], "give_up": False}
    wanted = set(re.findall(r"\w+", texts[0])) if "looks for" in prompt else set()
    claims = [{"text": m[0], "quotes": [m[0]]} for m in facts if {m[1], m[3]} & (known | wanted)]
    if '"facts"' in system:
        return {"facts": claims[:8], "confidence": 4 if claims else 0, "no_information": not claims}
    answers = [m for m in facts if m[2] == "uncle"]
    claims = [{"text": m[0], "quotes": [m[0]]} for m in facts if answers]
    return {"text": answers[0][1] if answers else "", "claims": claims, "no_information": not answers}


def ask(strategy, reply=hopper, text=TEXT, question=QUESTION):
    chat = ScriptedChat(reply=reply)
    context = Context.open(
        [Document.of(text, "crew.txt")], model=scripted_model(chat, context=1500), ephemeral=True
    )
    answer = context.ask(question, strategy=strategy)
    spent = Cost(answer.usage.calls, answer.usage.input_tokens, answer.usage.output_tokens)
    assert spent.within(answer.plan.ceiling)
    return answer, chat


@pytest.mark.parametrize("kind", [Search, Agents])
def test_a_fact_behind_another_is_found_in_the_second_round_and_not_in_the_first(kind):
    one = Search(rounds=1, keep=1) if kind is Search else Agents(rounds=1)
    more = Search(rounds=3, keep=1) if kind is Search else Agents(rounds=2)
    assert ask(one)[0].status == "unanswerable"
    answer, _ = ask(more)
    assert answer.text.startswith("Pelias")
    assert {c.quote for c in answer.citations} >= {"Pelias is the uncle of Jason."}
    assert all(c.verdict == "supported" for c in answer.citations)


def test_readers_see_what_others_found_and_no_more_than_the_limit():
    _, chat = ask(Agents(rounds=2, findings_tokens=40))
    shown = [p for p in chat.prompts if "found elsewhere" in p]
    assert shown
    assert not any("found elsewhere" in p for p in chat.prompts[:3]), "the first round knows nothing"
    for prompt in shown:
        piece = prompt.split('name="found elsewhere')[1].split("</text-")[0]
        assert len(piece.split()) <= 44


def test_agents_stop_after_the_first_piece_if_it_suffices():
    def knows(messages):
        texts = "".join(fenced_texts(str(messages[-1].text)))
        quote = "Jason is the captain of Argo."
        claims = [{"text": "Jason", "quotes": [quote]}] if quote in texts else []
        if '"facts"' in str(messages[0].text):
            return {"facts": claims, "confidence": 5, "no_information": not claims}
        return {"text": "Jason", "claims": claims, "no_information": not claims}

    answer, chat = ask(Agents(rounds=3), reply=knows, question="Who is the captain of Argo?")
    assert answer.text.startswith("Jason")
    assert answer.usage.calls == answer.plan.params["reads"] + 1


def test_agents_stop_when_a_round_finds_nothing_new():
    nothing = {"facts": [], "confidence": 0, "no_information": True}
    answer, chat = ask(Agents(rounds=5), reply=lambda messages: nothing)
    assert answer.status == "unanswerable"
    assert answer.usage.calls == answer.plan.params["reads"]


def test_a_search_reads_only_what_it_retrieves_and_says_so():
    answer, _ = ask(Search(rounds=2, keep=1))
    assert 0 < answer.coverage.read < answer.coverage.total
    assert answer.coverage.unread


def test_a_branch_that_fails_stays_alone():
    def poisoned(messages):
        if "Bacchis" in next(iter(fenced_texts(str(messages[-1].text))), ""):
            return ModelError("no", code="refused")
        if '"queries"' in str(messages[0].text):
            return {"queries": ["Bacchis", "Jason"], "give_up": False}
        return hopper(messages)

    answer, _ = ask(Search(rounds=3, width=3, keep=1), reply=poisoned)
    assert answer.text.startswith("Pelias")
    assert answer.status == "partial"
    assert any("no" in warning.message for warning in answer.warnings)


def test_a_query_is_never_tried_twice():
    def stubborn(messages):
        if '"queries"' in str(messages[0].text):
            return {"queries": ["rain", "RAIN ", "rain"], "give_up": False}
        return {"facts": [], "confidence": 0, "no_information": True}

    answer, chat = ask(Search(rounds=4, width=3), reply=stubborn)
    reads = [p for p in chat.prompts if "looks for" in p]
    assert len(reads) == 2  # the question and "rain"
    assert answer.status == "unanswerable"


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Search(width=0),
        lambda: Search(rounds=0),
        lambda: Agents(rounds=0),
        lambda: Agents(findings_tokens=1),
    ],
)
def test_parameters_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError):
        bad()
