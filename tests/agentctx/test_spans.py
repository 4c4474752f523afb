"""Spans of a reading scored: against the definition in float64, on any text, composed, calibrated."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentctx.memory.errors import ConfigError, InputError, ModelError, StoreError
from agentctx.memory.sentences import sentences
from agentctx.memory.types import Document, Span
from agentctx.models.calibration import VERSION, Calibration, calibration_file, calibration_of, shipped
from agentctx.models.load import Model
from agentctx.models.local import LocalChat
from agentctx.models.reader import UNCALIBRATED, LikelihoodReader
from agentctx.models.table import SMOLLM2
from agentctx.reading.calibrate import calibrate
from agentctx.reading.engine import Engine
from agentctx.reading.needles import haystack
from agentctx.reading.reading import Reading
from tests.agentctx.tiny_reader import engine, stock

TEXT = "The court of Łódź ruled on 3 May 1984. Nobody appealed! 東京 is far away. Was it 🙂? It was not."
QUESTION = "Which court ruled?"
HEADS = ((1, 4), (2, 0), (2, 5))


def known(**fields: Any) -> Calibration:
    row = (0.0,) * 6
    found = Calibration(
        "tiny", 3, 6, HEADS, 0.5, 0.4, 0.3, 0.2, 20, 900, 0, "generated", {256: 0.95, 512: 0.5}, 256,
        (row,) * 3, (row,) * 3,
    )  # fmt: skip
    return replace(found, **fields)


@pytest.fixture(scope="module")
def subject(tiny_model: Path) -> Engine:
    found = engine(tiny_model)
    found.weights.calibration = known()
    return found


@pytest.fixture
def reading(subject: Engine) -> Iterator[Reading]:
    with subject.read(TEXT) as found:
        yield found


def shares(reading: Reading, asked: list[int], rows: int) -> Tensor:
    """What transformers attends to, `[tokens]` in float64: mean of the heads and the last rows."""
    ids = [*reading.tokens(), *asked]
    with torch.inference_mode():
        found = stock()(torch.tensor([ids]), output_attentions=True).attentions
    held = len(reading.tokens())
    return torch.stack([found[layer][0, head, -rows:, :held] for layer, head in HEADS]).double().mean((0, 1))


def defined(reading: Reading, mass: Tensor) -> list[float]:
    """The worth of each sentence."""
    text = reading.texts[0]
    inside = range(text.first, text.first + len(text.offsets))
    boxed = [
        sum(float(mass[j]) for j in range(i - 4, i + 4) if j in inside) / 8 if i in inside else 0.0
        for i in range(len(mass))
    ]
    found = []
    for pair in sentences(TEXT):
        tokens = text.tokens(*pair)
        best = sorted(boxed[tokens.start : tokens.stop])[-8:]
        found.append(sum(best) / len(best))
    return found


@pytest.mark.parametrize("method", ["attention", "focal"])
@pytest.mark.parametrize("null", [True, False])
def test_attention_is_its_definition(reading: Reading, method: Any, null: bool) -> None:
    tokens, frame = reading.engine.tokens, reading.frame
    tail = tokens.data("Well,").ids if method == "focal" else []
    asked, empty = frame.question(tokens, QUESTION) + tail, frame.question(tokens, "") + tail
    rows = 1 if tail else len(asked) - len(tokens.data(frame.between).ids)
    mass = shares(reading, asked, rows)
    rest = mass - shares(reading, empty, 1) if null else mass
    found = reading.score_spans(QUESTION, method=method, calibrate=null, hint="Well,")
    by_place = sorted(found, key=lambda one: one.span.start)
    assert [(one.span.start, one.span.end) for one in by_place] == sentences(TEXT)
    assert [one.score for one in by_place] == pytest.approx(defined(reading, rest), abs=1e-6)
    own = [reading.texts[0].tokens(*pair) for pair in sentences(TEXT)]
    assert [one.mass for one in by_place] == pytest.approx([float(mass[r].sum()) for r in own], abs=1e-6)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)


def test_the_rows_of_a_reply(reading: Reading) -> None:
    reply = reading.ask(QUESTION, max_new_tokens=6)
    asked = reading.frame.question(reading.engine.tokens, QUESTION)
    mass = shares(reading, [*asked, *reply.token_ids], 6)
    found = reading.score_spans(QUESTION, method="attention", rows=reply, calibrate=False)
    by_place = sorted(found, key=lambda one: one.span.start)
    assert [one.score for one in by_place] == pytest.approx(defined(reading, mass), abs=1e-6)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(text=st.text(max_size=60), seed=st.integers(0, 9))
def test_every_sentence_of_any_text_once(subject: Engine, text: str, seed: int) -> None:
    try:
        found = subject.read(text, keep=False)
    except InputError:
        return  # half a surrogate pair
    with found as reading:
        scored = reading.score_spans(QUESTION, method="attention")
        assert sorted((one.span.start, one.span.end) for one in scored) == sentences(text)
        assert all(math.isfinite(one.score) and 0 <= one.mass <= 1 for one in scored)
        start = random.Random(seed).randint(0, len(text))
        (one,) = reading.score_spans(QUESTION, [(start, len(text))], method="attention")
        assert one.span == Span(Document.of(text).id, start, len(text))


def test_likelihood_and_entropy_read_the_spans_by_themselves(subject: Engine, reading: Reading) -> None:
    cut = [TEXT[a:b] for a, b in sentences(TEXT)]
    reader = subject.reader
    for method in ("likelihood", "entropy"):
        found = reading.score_spans(QUESTION, method=method)  # type: ignore[arg-type]
        values = reader.scores(QUESTION, cut, entropy=method == "entropy").values
        by_place = sorted(found, key=lambda one: one.span.start)
        assert [one.score for one in by_place] == pytest.approx(list(values), abs=1e-4)
        assert max(values) < 0 and {one.mass for one in found} == {0.0}


def test_entropy_is_that_of_the_next_token(subject: Engine) -> None:
    tokenizer = subject.weights.tokenizer
    after = "\n\nThis text answers the question: Which court ruled?\nThe answer is"
    ids = [*tokenizer.opening, *tokenizer.encode("A text." + after)]
    with torch.inference_mode():
        logits = stock()(torch.tensor([ids])).logits[0, -1].double()
    want = float((logits.softmax(-1) * logits.log_softmax(-1)).sum())
    assert subject.reader.scores(QUESTION, ["A text."], entropy=True).values[0] == pytest.approx(
        want, abs=1e-4
    )


def test_auto_looks_in_the_chunks_that_predict_the_question(subject: Engine) -> None:
    lines = [f"Line {number} of {number * number} says little about the court. " * 2 for number in range(16)]
    with subject.read("\n".join(lines)) as reading:
        found = reading.score_spans(QUESTION)
        looked = {one.span: one.score for one in found if math.isfinite(one.score)}
        attention = {one.span: one.score for one in reading.score_spans(QUESTION, method="attention")}
        assert 0 < len(looked) < len(attention) == len(found)
        assert all(score == attention[span] for span, score in looked.items())


async def test_a_reader_scores_the_sentences_of_each_text_alone_and_together(subject: Engine) -> None:
    texts = [TEXT, "", "One sentence.", "A first one. And a second one, which is a little longer. " * 3]
    for method in ("attention", "focal", "likelihood", "entropy"):
        together = await subject.reader.score_spans(QUESTION, texts, method=method)  # type: ignore[arg-type]
        assert [len(row) for row in together.values] == [len(sentences(text)) for text in texts]
        for text, row in zip(texts, together.values, strict=True):
            alone = await subject.reader.score_spans(QUESTION, [text], method=method)  # type: ignore[arg-type]
            assert row == pytest.approx(alone.values[0], abs=1e-4)
        assert not together.warnings


async def test_a_reader_that_is_not_calibrated_says_so(subject: Engine) -> None:
    reader = LikelihoodReader(subject.runtime, subject.weights.tokenizer)
    found = await reader.score_spans(QUESTION, [TEXT])
    assert found.warnings == (UNCALIBRATED,)
    with pytest.raises(InputError):
        await reader.score_spans(" ", [TEXT])


def test_a_composed_reading(subject: Engine, reading: Reading) -> None:
    whole = {one.span: one for one in reading.score_spans(QUESTION, method="attention")}
    with subject.compose([reading]) as same:
        for one in same.score_spans(QUESTION, method="attention"):
            assert one.score == pytest.approx(whole[one.span].score, abs=1e-6)
            assert one.mass == pytest.approx(whole[one.span].mass, abs=1e-6)
    first, second, *_ = sentences(TEXT)
    with subject.compose([(reading, [first]), (reading, [second])]) as parts:
        scored = parts.score_spans(QUESTION, method="attention")
        pairs = {(one.span.start, one.span.end): one for one in scored}
        assert set(pairs) >= {first, second} and len(pairs) <= 3  # a token may hold a neighbour's blank
        assert all(pairs[pair].mass > 0 for pair in (first, second))


def test_what_cannot_be_scored(tiny_model: Path, subject: Engine, reading: Reading) -> None:
    with pytest.raises(ConfigError, match="empty"):
        reading.score_spans("  ")
    with pytest.raises(ConfigError, match="no text of this reading"):
        reading.score_spans(QUESTION, [Span("0" * 64, 0, 1)])
    with subject.read([5, 6, 7]) as bare, pytest.raises(ConfigError, match="token ids"):
        bare.score_spans(QUESTION)
    evicting = engine(tiny_model, attention="keydiff:keep=0.5,dense_below=0")
    evicting.weights.calibration = known()
    with evicting.read(TEXT * 4) as evicted, pytest.raises(ModelError) as caught:
        evicted.score_spans(QUESTION, method="attention")
    assert caught.value.code == "unsupported"
    with engine(tiny_model).read(TEXT) as plain, pytest.warns(UserWarning, match="not calibrated"):
        assert plain.score_spans(QUESTION, method="attention")


def test_a_calibration_is_kept_and_found(tmp_path: Path) -> None:
    file = calibration_file(tmp_path / "calibration", "content")
    known().write(file)
    assert calibration_of(file.parent, "content", "any") == known()
    assert calibration_of(file.parent, "other", "any") is None
    assert known().router_layers == (1, 2)
    known(version=VERSION + 1).write(file)
    assert calibration_of(file.parent, "content", "any") is None
    for broken in ("{", "[]", "{}", file.read_text().replace('"heads": [[1', '"heads": [[7')):
        file.write_text(broken.replace(f'"version": {VERSION + 1}', f'"version": {VERSION}'))
        with pytest.raises(StoreError):
            calibration_of(file.parent, "content", "any")


def test_the_window_that_calibrating_measured(tiny_model: Path) -> None:
    subject = engine(tiny_model)
    assert subject.window.method == "assumed"
    subject.weights.calibration = known()
    assert (subject.window.reliable, subject.window.method) == (256, "calibrated")
    subject.weights.entry = SMOLLM2
    assert (subject.window.reliable, subject.window.method) == (256, "calibrated")
    subject.weights.calibration = known(reliable=None)
    assert (subject.window.reliable, subject.window.method) == (300, "table")
    subject.weights.entry = None
    assert subject.window.method == "assumed"


@pytest.mark.parametrize("half", [0, 1])
def test_a_haystack(half: int) -> None:
    def count(text: str) -> int:
        return len(text.split())

    found = haystack(random.Random(3), 600, count, half=half)
    assert found == haystack(random.Random(3), 600, count, half=half)
    assert len(found.needles) == 24 and 550 <= count(found.text) <= 620
    cut = sentences(found.text)
    for needle in found.needles:
        fact = found.text[needle.start : needle.end]
        assert (needle.start, needle.end) in cut and needle.value in fact
        shared = set(fact.lower().strip(".").split()) & set(needle.question.lower().strip("?").split())
        assert len(shared - {"is", "of", "the", "a", "by", "in", "to", "can"}) <= 2  # the name
    depths = sorted(needle.start / len(found.text) for needle in found.needles)
    assert depths[0] < 0.2 and depths[-1] > 0.8


def test_what_calibrating_finds_is_used(tiny_model: Path) -> None:
    subject = engine(tiny_model)
    found = calibrate(subject, texts=1, questions=1)
    assert found.heads and found.reliable is None and list(found.recall) == [256]
    assert (found.layers, found.width) == (3, 6) == (len(found.hits), len(found.shares[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subject.weights.calibration = found
        with subject.read(TEXT) as reading:
            assert reading.score_spans(QUESTION, method="attention")


@pytest.mark.model
def test_the_embedded_model_looks_through_the_heads_that_ship(embedded_model: Model) -> None:
    assert isinstance(embedded_model.chat, LocalChat)
    weights = embedded_model.chat.weights
    known = shipped("smollm2")
    assert known is not None and weights.calibration == known and known.first > known.first_middle
    text = (
        "The mill was closed in spring. Ada Novak earns a living as a dentist. The bridge leads to the "
        "market. Hugo Weiss must never eat peanuts. Rain fell on the harbour. Thea Quint sits in room 4711."
    )
    with Engine(weights).read(text) as reading:
        found = reading.score_spans("Where is the office of Thea Quint?", method="attention")
    assert "4711" in text[found[0].span.start : found[0].span.end]
