import math
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentctx.memory.lexical import Lexical, terms

TEXTS = [
    "The court of appeal ruled on 3 May that the lease had ended.",
    "Two movies were filmed in the harbour; the fee was 1,250,000 dollars.",
    "def parseHTTPReply(max_tokens): return reply.body",
    "東京は日本の首都です。人口は約1400万人です。",
    "Столица России - Москва, город на реке.",
    "हिन्दी भारत की भाषा है",
    "The movie about the harbour of a small town.",
]


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("which court rules", 0),
        ("price 1250000", 1),
        ("HTTP reply", 2),
        ("the max tokens", 2),
        ("PARSEHTTPREPLY", 2),
        ("日本の首都", 3),
        ("МОСКВА", 4),
        ("हिन्दी", 5),
        ("ﬁlming ｍｏｖｉｅｓ", 1),  # a ligature and full-width letters
    ],
)
def test_finds_words_identifiers_numbers_and_other_scripts(query: str, first: int) -> None:
    assert Lexical(TEXTS).top(query, 1) == [first]


def test_scores_are_those_of_the_formula() -> None:
    """Two texts, one shared term: idf = ln(1 + (2 - 1 + .5) / (1 + .5)), tf 2, length 3 of mean 2.5."""
    score, other = Lexical(["cat cat dog", "bird fish"]).scores("cat")
    expected = math.log(2) * 2 / (2 + 1.5 * (1 - 0.75 + 0.75 * 3 / 2.5))
    assert score == pytest.approx(expected, rel=1e-5)
    assert other == 0.0


@pytest.mark.parametrize("texts", [[], [""], ["", "..."], ["one word"]])
@pytest.mark.parametrize("query", ["", "?!", "absent"])
def test_nothing_in_common_scores_zero(texts: list[str], query: str) -> None:
    assert Lexical(texts).scores(query) == [0.0] * len(texts)


def test_equal_scores_keep_the_order_of_the_texts() -> None:
    assert Lexical(["x", "same words", "same words", "y", "same words"]).top("words", 4) == [1, 2, 4, 0]


def test_prints_nothing_and_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "from agentctx.memory.lexical import Lexical;"
        "print(Lexical(['the cat sat', 'a dog and a cat', 'birds']).scores('cat and dog'))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        for seed in "12"
    ]
    assert runs[0].stdout == runs[1].stdout
    assert [run.stderr for run in runs] == ["", ""]


@given(st.lists(st.text(max_size=60), max_size=6), st.text(max_size=40))
def test_any_text_gives_one_finite_score_each(texts: list[str], query: str) -> None:
    index = Lexical(texts)
    scores = index.scores(query)
    assert len(scores) == len(texts)
    assert all(0.0 <= score < float("inf") for score in scores)
    shared = [bool(set(terms(text)) & set(terms(query))) for text in texts]
    assert [score > 0 for score in scores] == shared
    assert sorted(index.top(query, len(texts))) == list(range(len(texts)))
