"""The estimate must rather be high than low; the floor must never be above the truth."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import HumanMessage

from agentctx.models.counters import EstimateCounter, least_tokens
from agentctx.models.load import Model

TEXTS = {
    "prose": "The court ruled on the third of May that the contract, although signed, was void. " * 20,
    "code": Path(__file__).read_text(),
    "numbers": "2021-05-03,17.25,1048576,-3\n" * 50,
    "german": "Die Rechtsprechungsänderung wurde überraschenderweise zurückgenommen. " * 20,
    "russian": "Суд вынес решение третьего мая, и договор был признан недействительным. " * 20,
    "chinese": "法院於五月三日裁定該合約無效。" * 30,
    "emoji": "😀🎉👩‍🚀 fine " * 30,
    "blanks": "a   \t  b\n\n\n        c\n" * 40,
    "rules": "=" * 70 + "\n" + "-" * 70 + "\n",
    "digits and blanks": " ".join(str(n % 10) for n in range(400)),
    "table": "\n".join("\t".join(str((7 * row + cell) % 10) for cell in range(12)) for row in range(40)),
    "two digits and blanks": " ".join(str(10 + n % 90) for n in range(300)),
    "table of two digits": "\n".join(
        "\t".join(str(10 + row + cell) for cell in range(9)) for row in range(40)
    ),
    "hex": " ".join(f"{n * 37 % 256:02x}" for n in range(300)),
    "base64": "aGVsbG8gd29ybGQgdGhpcyBpcyBhIHRlc3Q5ODc2NTQzMjE" * 20,
}


@given(st.text(), st.text())
def test_more_text_is_never_fewer_tokens(left: str, right: str) -> None:
    counter = EstimateCounter()
    assert counter.count_text(left + " " + right) >= max(counter.count_text(left), counter.count_text(right))


@given(st.lists(st.text(), max_size=5))
def test_messages_cost_more_than_their_text(texts: list[str]) -> None:
    counter = EstimateCounter()
    assert counter.count_messages([HumanMessage(text) for text in texts]) > sum(
        map(counter.count_text, texts)
    )


@pytest.mark.model
@pytest.mark.parametrize("name", TEXTS)
def test_against_a_real_tokenizer(embedded_model: Model, name: str) -> None:
    """With the quarter that plans reserve for an estimate, it is a ceiling; the floor is a floor."""
    truth = embedded_model.counter.count_text(TEXTS[name])
    estimate = EstimateCounter().count_text(TEXTS[name])
    assert truth <= estimate * 1.25
    assert least_tokens([HumanMessage(TEXTS[name])]) <= truth
