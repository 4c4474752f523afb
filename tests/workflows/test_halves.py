"""A model that takes less than its profile says: what it refuses as too long is read in halves."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentctx.api import Context
from agentctx.memory.errors import BudgetExceeded, ModelError
from agentctx.memory.types import Cost, Document
from agentctx.paths import Paths
from agentctx.testing import ScriptedChat, WordCounter, finding, scripted_model
from agentctx.workflows.halves import halves
from agentctx.workflows.roles import ReadReply
from agentctx.workflows.split import LEAST
from agentctx.workflows.strategies.map_reduce import MapReduce
from agentctx.workflows.strategies.recursive import Recursive
from agentctx.workflows.tasks.classify import LabelReply
from agentctx.workflows.tasks.items import ItemsReply

QUESTION = "What is the code of Zed?"
FACT = r"The code of (\w+ is \w+)\."
COUNTER = WordCounter()
LABELS = ("stated", "not stated")


class SmallWindow(ScriptedChat):
    """Refuses what takes more tokens, prompt and answer together."""

    takes: int = 0
    refused: int = 0

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        if COUNTER.count_messages(messages) + kwargs["max_tokens"] > self.takes:
            self.refused += 1
            raise ModelError("the prompt is too long", code="overflow")
        return super()._generate(messages, stop, run_manager, **kwargs)


def haystack(sentences, facts=("Zed is K77",), seed=0):
    rng = random.Random(seed)
    lines = [f"Sentence {n} speaks of {rng.choice('abcdefgh') * 5} and no more." for n in range(sentences)]
    for place, fact in enumerate(facts, 1):
        lines[place * sentences // (len(facts) + 1)] = f"The code of {fact}."
    return " ".join(lines)


def context(chat, *texts, window=2000, paths=None):
    sources = [Document.of(text, f"{number}.txt") for number, text in enumerate(texts)]
    return Context.open(
        sources, model=scripted_model(chat, context=window), ephemeral=paths is None, paths=paths
    )


def spent(answer):
    return Cost(answer.usage.calls, answer.usage.input_tokens, answer.usage.output_tokens)


LABEL = st.sampled_from(("a.txt", "b.txt", "found elsewhere"))


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(LABEL, st.text(max_size=900)), max_size=4))
def test_halves_are_the_pieces(pieces):
    sources = frozenset({"a.txt", "b.txt"})
    parts = halves(pieces, sources, COUNTER)
    texts = [text for label, text in pieces if label in sources]
    if parts is None:
        assert not texts or (len(texts) == 1 and COUNTER.count_text(texts[0]) < 2 * LEAST)
        return
    beside = [piece for piece in pieces if piece[0] not in sources]
    for part in parts:
        assert [piece for piece in part if piece[0] not in sources] == beside
        assert len(part) > len(beside)
    joined = [piece[1] for part in parts for piece in part if piece[0] in sources]
    assert "".join(joined) == "".join(texts)
    if len(texts) == 1:
        assert all(COUNTER.count_text(text) < COUNTER.count_text(texts[0]) for text in joined)


def test_records_of_two_halves_are_one():
    first = {"facts": [{"text": "a", "quotes": ["a"]}], "confidence": 2, "no_information": False}
    second = {"facts": [], "confidence": 0, "no_information": True}
    assert ReadReply.joined([first, second]) == first
    assert ReadReply.joined([second, second])["no_information"]
    one, other = ({"items": [{"key": k, "value": "", "quotes": [k]}], "no_information": False} for k in "ab")
    assert [item["key"] for item in ItemsReply.joined([one, other])["items"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("votes", "label", "quotes"),
    [
        ((("yes", 2), ("no", 4)), "no", ["no4"]),
        ((("yes", 2), ("Yes ", 3)), "yes", ["yes2", "Yes 3"]),
        ((("yes", 5), ("", None)), "yes", ["yes5"]),
    ],
)
def test_one_read_has_one_vote(votes, label, quotes):
    records = [
        {
            "label": name,
            "quotes": [f"{name}{sure}"] if sure else [],
            "confidence": sure or 0,
            "no_information": sure is None,
        }
        for name, sure in votes
    ]
    joined = LabelReply.joined(records)
    assert (joined["label"], joined["quotes"], joined["no_information"]) == (label, quotes, False)


def test_a_read_that_is_refused_is_read_in_halves_and_nothing_is_missing(tmp_path):
    chat = SmallWindow(reply=finding(FACT), takes=1400)
    paths = Paths(*(tmp_path / name for name in ("cache", "data", "state", "config")))
    texts = (haystack(20, ()), haystack(140), haystack(15, ()))
    ctx = context(chat, *texts, paths=paths)
    plan = ctx.plan(QUESTION, strategy=Recursive())
    answer = ctx.ask(QUESTION, strategy=Recursive())
    assert chat.refused == 1
    assert (answer.status, answer.text) == ("complete", "Zed is K77 [1]")
    assert answer.coverage.read == answer.coverage.total
    assert spent(answer).within(plan.ceiling)
    assert [w.code for w in answer.warnings].count("halved") == 1
    again = ctx.ask(QUESTION, strategy=Recursive())
    assert (again.text, again.usage.calls, chat.refused) == (answer.text, 0, 1)


def test_what_cannot_be_halved_enough_is_a_failure_that_coverage_tells():
    chat = SmallWindow(reply=finding(FACT), takes=500)
    ctx = context(chat, haystack(20, ()), haystack(140))
    strategy = Recursive(quorum=0.0)
    plan = ctx.plan(QUESTION, strategy=strategy)
    try:
        answer = ctx.ask(QUESTION, strategy=strategy)
    except ModelError as error:
        assert error.code == "overflow"
        return
    assert answer.status == "partial"
    assert answer.coverage.failed
    assert "failed_overflow" in {warning.code for warning in answer.warnings}
    assert spent(answer).within(plan.ceiling)


def test_halving_ends_with_the_extra_attempts():
    chat = SmallWindow(reply=finding(FACT), takes=1400)
    ctx = context(chat, haystack(2500))
    plan = ctx.plan(QUESTION, strategy=MapReduce())
    answer = ctx.ask(QUESTION, strategy=MapReduce())
    assert chat.refused == plan.params["reads"] > plan.retry_pool // 2
    assert answer.status == "partial"
    assert answer.coverage.read and answer.coverage.failed
    assert any("no extra attempts are left" in warning.message for warning in answer.warnings)
    assert spent(answer).within(plan.ceiling)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=st.lists(st.integers(1, 220), min_size=1, max_size=4),
    takes=st.integers(300, 2000),
    kind=st.sampled_from(("search", "multi_hop", "classify", "aggregate", "summarise")),
    per_file=st.booleans(),
    claims=st.sampled_from((None, 10**6)),
)
def test_no_run_spends_more_than_its_plan_however_much_is_refused(sizes, takes, kind, per_file, claims):
    chat = SmallWindow(reply=finding(FACT), takes=takes, output_tokens=claims)
    ctx = context(chat, *(haystack(size, seed=n) for n, size in enumerate(sizes)))
    strategy = (Recursive if per_file else MapReduce)()
    options = {"labels": LABELS} if kind == "classify" else {}
    try:
        if kind == "summarise":
            plan = ctx.plan(QUESTION, task="summarize", strategy=strategy)
            answer = ctx.summarize(QUESTION, strategy=strategy)
        else:
            plan = ctx.plan(QUESTION, kind=kind, strategy=strategy, **options)
            answer = ctx.ask(QUESTION, kind=kind, strategy=strategy, **options)
    except BudgetExceeded as error:
        answer = error.partial
    except ModelError as error:
        assert error.code == "overflow"
        assert chat.refused + len(chat.prompts) <= plan.ceiling.calls
        return
    assert spent(answer).within(plan.ceiling)
    assert answer.usage.calls == chat.refused + len(chat.prompts)
    assert 0 <= answer.coverage.read <= answer.coverage.total
    if not chat.refused:
        assert answer.coverage.read == answer.coverage.total
