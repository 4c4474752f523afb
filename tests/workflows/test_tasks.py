"""Every kind of task over a scripted model that reads perfectly: what code computes from it is exact."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentctx.api import Context
from agentctx.memory.errors import BudgetExceeded, ConfigError
from agentctx.memory.types import Budget, Cost, Document, Failure
from agentctx.testing import FaultyChat, ScriptedChat, fenced_texts, scripted_model
from agentctx.workflows.combine import pairs
from agentctx.workflows.roles import Reply
from agentctx.workflows.strategies.recursive import Recursive
from agentctx.workflows.tasks.aggregate import asked_for, number_in

ROW = re.compile(r"The ship (\w+) carried (\d[\d,]*) tons\.")
RELATED = re.compile(r"(\w+) is the (?:captain|owner) of (\w+)\.")


def perfect(messages):
    """Finds every row; joins two items if their names begin alike; a captain only once the ship is known."""
    system, prompt = str(messages[0].text), str(messages[-1].text)
    texts = list(fenced_texts(prompt))
    if not texts:
        return "no"  # a repair shows no text
    rows = [m for text in texts for m in ROW.finditer(text)]
    if '"items"' in system:
        items = [{"key": m[1], "value": m[2], "quotes": [m[0]]} for m in rows]
        return {"items": items, "no_information": not items}
    if '"label"' in system:
        quotes = [m[0] for m in rows][:4]
        heavy = sum(int(m[2].replace(",", "")) for m in rows) > 100
        label = "heavy" if heavy else "light"
        return {"label": label, "quotes": quotes, "confidence": 4, "no_information": not quotes}
    if '"holds"' in system:
        names = [text.split(":")[0] for text in texts]
        return {"holds": names[0][0] == names[1][0], "reason": "same initial"}
    known = {"Argo"} | {w for m in RELATED.finditer(texts[0]) for w in m.groups() if "found" in prompt}
    claims = [
        {"text": m[0], "quotes": [m[0]]}
        for text in texts
        for m in RELATED.finditer(text)
        if '"claims"' in system or known & set(m.groups())
    ]
    if '"facts"' in system:
        return {"facts": claims[:8], "confidence": 4 if claims else 0, "no_information": not claims}
    found = "Pelias" if any("Pelias" in claim["text"] for claim in claims) else ""
    return {"text": found, "claims": claims[:8] if found else [], "no_information": not found}


def fleet(count: int, seed: int = 0) -> tuple[str, dict[str, int]]:
    rng = random.Random(seed)
    ships = {f"{rng.choice('ABCDEFGH')}ship{n}": rng.randint(1, 5000) for n in range(count)}
    lines = [f"The ship {name} carried {tons:,} tons." for name, tons in ships.items()]
    lines += [f"On day {n} nothing came in but rain and wind." for n in range(count * 6)]
    rng.shuffle(lines)
    return "\n".join(lines), ships


def open_text(text, *, chat=None, window=1500, paths=None, tiers=frozenset({"reads", "writes"})):
    model = scripted_model(chat or ScriptedChat(reply=perfect), context=window, tiers=tiers)
    return Context.open([Document.of(text, "log.txt")], model=model, ephemeral=True)


def within_plan(answer):
    spent = Cost(answer.usage.calls, answer.usage.input_tokens, answer.usage.output_tokens)
    assert spent.within(answer.plan.ceiling)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("question", "operation", "expected"),
    [
        ("How many ships came in?", "count", lambda ships: len(ships)),
        ("How much did they carry in total?", "sum", lambda ships: str(sum(ships.values()))),
        ("What was the largest cargo?", "max", lambda ships: str(max(ships.values()))),
        ("What was the smallest cargo?", "min", lambda ships: str(min(ships.values()))),
        ("Which ships came in?", "list", lambda ships: None),
    ],
)
def test_an_aggregate_is_exact_over_shuffled_input(question, operation, expected, seed):
    text, ships = fleet(40, seed)
    answer = open_text(text).ask(question, kind="aggregate")
    within_plan(answer)
    assert answer.value["operation"] == operation
    assert answer.value["result"] == expected(ships)
    stated = {item["key"]: int(item["value"].replace(",", "")) for item in answer.value["items"]}
    assert stated == ships
    assert len([c for c in answer.citations if c.verdict == "supported"]) == len(ships)
    assert answer.status == "complete"


def test_different_values_of_one_thing_stay_side_by_side():
    text = "The ship Argo carried 3 tons.\n" + "Rain.\n" * 600 + "The ship argo carried 4 tons.\n"
    answer = open_text(text).ask("How many ships?", kind="aggregate")
    assert answer.value["result"] == 1
    assert answer.value["conflicts"] == ["argo"]
    assert any(warning.code == "conflict" for warning in answer.warnings)


def test_a_classification_is_a_vote_of_quoted_reads():
    text, _ = fleet(30)
    answer = open_text(text).ask("Is the cargo heavy?", kind="classify", labels=["heavy", "light"])
    within_plan(answer)
    assert answer.text.startswith("heavy")
    assert answer.value["label"] == "heavy"
    assert answer.value["margin"] == 1.0
    assert all(citation.verdict == "supported" for citation in answer.citations)


def test_a_vote_for_no_label_or_without_a_quote_does_not_count():
    replies = iter(
        [
            {"label": "huge", "quotes": ["rain"], "confidence": 5, "no_information": False},
            {
                "label": "light",
                "quotes": ["words that are nowhere"],
                "confidence": 5,
                "no_information": False,
            },
        ]
    )
    nothing = {"label": "", "quotes": [], "confidence": 0, "no_information": True}
    chat = ScriptedChat(reply=lambda messages: next(replies, nothing))
    answer = open_text("It rains and rains all day. " * 400, chat=chat).ask(
        "Heavy?", kind="classify", labels=["heavy", "light"]
    )
    assert answer.status == "unanswerable"
    assert {"unknown_label", "vote_without_quote"} <= {warning.code for warning in answer.warnings}


def test_pairs_are_those_for_which_the_model_says_so():
    text, ships = fleet(10)
    answer = open_text(text).ask("Which ships have the same initial?", kind="pairwise")
    within_plan(answer)
    names = sorted(ships)
    expected = {(a, b) for a in names for b in names if a < b and a[0] == b[0]}
    assert {tuple(sorted(pair)) for pair in answer.value["pairs"]} == expected
    assert answer.value["compared"] == 45


def test_more_pairs_than_allowed_are_a_failure_and_the_items_are_kept():
    text, ships = fleet(10)
    answer = open_text(text).ask(
        "Which ships have the same initial?", kind="pairwise", strategy=Recursive(max_pairs=44)
    )
    assert answer.status == "partial"
    assert answer.value == {"items": sorted(ships), "pairs": None, "compared": 0}
    assert any("45 pairs" in warning.message for warning in answer.warnings)


def test_the_second_pass_sees_what_the_first_found():
    """Who commands the ship of which Jason is captain? The owner's name stands far from the ship's."""
    rain = "It rained again on the coast.\n" * 300
    text = f"Pelias is the owner of Jason.\n{rain}Jason is the captain of Argo.\n{rain}"
    chat = ScriptedChat(reply=perfect)
    answer = open_text(text, chat=chat).ask("Who owns the captain of Argo?", kind="multi_hop")
    within_plan(answer)
    assert "Pelias" in answer.text
    assert {c.quote for c in answer.citations} >= {"Pelias is the owner of Jason."}
    one_pass = open_text(text).ask("Who owns the captain of Argo?", strategy="recursive")
    assert "Pelias" not in one_pass.text


@pytest.mark.parametrize("kind", ["aggregate", "classify", "pairwise", "multi_hop"])
def test_failed_reads_are_said_and_the_rest_is_used(kind):
    text, _ = fleet(30)
    chat = FaultyChat(reply=perfect, faults=[None, "refused", None])
    labels = ["heavy", "light"] if kind == "classify" else []
    answer = open_text(text, chat=chat).ask("Which ships are there?", kind=kind, labels=labels)
    within_plan(answer)
    assert answer.status == "partial"
    assert answer.coverage.failed


@settings(max_examples=20, deadline=None)
@given(
    text=st.text(min_size=1, max_size=3000).filter(str.strip) | st.integers(5, 60).map(lambda n: fleet(n)[0]),
    kind=st.sampled_from(["aggregate", "classify", "pairwise", "multi_hop"]),
    window=st.integers(1500, 3000),
    seed=st.integers(0, 2**16),
)
def test_no_kind_spends_more_than_its_plan(text, kind, window, seed):
    """A model that claims its maximum for every reply, now and then garbage."""
    rng = random.Random(seed)

    def reply(messages):
        return perfect(messages) if rng.random() < 0.7 else rng.choice(['{"items": [', "{}", "", "no"])

    chat = ScriptedChat(reply=reply, output_tokens=10**6)
    labels = ["heavy", "light"] if kind == "classify" else []
    try:
        answer = open_text(text, chat=chat, window=window).ask("Which ships?", kind=kind, labels=labels)
    except BudgetExceeded as error:
        answer = error.partial
    within_plan(answer)


@pytest.mark.parametrize("kind", ["aggregate", "classify", "pairwise", "multi_hop"])
def test_a_model_that_only_reads_is_warned_of_and_breaks_nothing(kind):
    labels = ["a", "b"] if kind == "classify" else []
    text, _ = fleet(20)
    answer = open_text(text, tiers=frozenset({"reads"})).ask("Which?", kind=kind, labels=labels)
    within_plan(answer)
    assert [w.message for w in answer.warnings if w.code == "below_tier"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "classify", "labels": ["only"]}, "at least two labels"),
        ({"kind": "classify", "labels": ["A", "a"]}, "at least two labels"),
        ({"kind": "search", "labels": ["a", "b"]}, "labels are for"),
        ({"kind": "riddle"}, "no kind of question 'riddle'"),
        ({"kind": "aggregate", "strategy": "spans"}, "does not do the task aggregate"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        open_text("rain " * 2000).ask("x", **options)


def test_a_budget_of_one_call_gives_a_partial_answer():
    text, _ = fleet(60)
    with pytest.raises(BudgetExceeded) as error:
        open_text(text).ask("Which ships?", kind="aggregate", budget=Budget(calls=1))
    assert error.value.partial.usage.calls <= 1


@pytest.mark.parametrize(
    ("question", "operation"),
    [("How many died?", "count"), ("the total weight", "sum"), ("the highest peak", "max"), ("who?", "list")],
)
def test_the_words_of_a_question_name_the_operation(question, operation):
    assert asked_for(question) == operation


@pytest.mark.parametrize(
    ("value", "number"),
    [("$1,234.50 in all", "1234.50"), ("−3 degrees", "-3"), ("12'000 Fr.", "12000"), ("none", None)],
)
def test_numbers_are_read_exactly(value, number):
    assert (None if number is None else str(number_in(value))) == number


@given(st.integers(0, 30), st.integers(1, 500))
def test_pairs_are_all_or_a_failure(count, most):
    found = pairs(range(count), most)
    if count * (count - 1) // 2 > most:
        assert isinstance(found, Failure)
    else:
        assert len(found) == len(set(found)) == count * (count - 1) // 2


def replies(kind: type[Reply]):
    for sub in kind.__subclasses__():
        yield sub
        yield from replies(sub)


def test_every_example_in_a_prompt_fits_its_own_form():
    known = [kind for kind in replies(Reply) if hasattr(kind, "example")]
    assert len(known) >= 6
    for kind in known:
        kind.model_validate({**kind.example})
