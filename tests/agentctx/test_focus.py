"""Parts of a text hidden, pinned or composed, against transformers with the mask that each of these means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from agentctx.memory.errors import ConfigError, ModelError
from agentctx.memory.types import Document, Span
from agentctx.reading.engine import Engine
from agentctx.reading.reading import Reading
from agentctx.runtime.methods.quest import Quest
from tests.agentctx.tiny_reader import TEXT, engine, stock

QUESTION = "Which court?"
MOST = 6
A = Document.of(TEXT[:130], "a")
B = Document.of("Nobody knew the harbour's name. 大阪 " * 3, "b")
C = Document.of("It rained for a week.", "c")


@pytest.fixture(scope="module")
def subject(tiny_model: Path) -> Engine:
    return engine(tiny_model)


def asked(reading: Reading, question: str = QUESTION) -> list[int]:
    return reading.frame.question(reading.engine.tokens, question)


def reference(
    ids: Sequence[int],
    seen: Tensor,
    tail: Sequence[int],
    *,
    most: int = MOST,
    own: Tensor | None = None,
) -> list[int]:
    """Greedy ids after `tail`, whose tokens and those generated see only the tokens `seen` of `ids`, which
    have seen one another as far as `own` (bool, rows see columns).
    """
    size, found = len(ids), list(tail)
    model: Any = stock()
    while len(found) < len(tail) + most:
        total = size + len(found)
        allowed = torch.ones(total, total, dtype=torch.bool).tril()
        if own is not None:
            allowed[:size, :size] &= own
        allowed[size:, :size] &= seen
        mask = torch.zeros(total, total).masked_fill(~allowed, torch.finfo(torch.float32).min)
        with torch.inference_mode():
            logits = model(torch.tensor([[*ids, *found]]), attention_mask=mask[None, None]).logits
        found.append(int(logits[0, -1].argmax()))
    return found[len(tail) :]


def side_by_side(parts: Sequence[tuple[Sequence[int], Tensor, Tensor]], tail: Sequence[int]) -> list[int]:
    """Greedy ids after `tail`, over texts that were each read alone: the tokens of `ids` that are `kept`,
    their keys turned to the positions `new`.
    """
    model: Any = stock()
    cache, end = DynamicCache(), 0
    with torch.inference_mode():
        layers: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.model.layers]
        for ids, kept, new in parts:
            held = model(torch.tensor([list(ids)]), use_cache=True).past_key_values
            delta = (new - torch.arange(len(ids)))[kept]
            for layer, of in zip(held.layers, layers, strict=True):
                of.append((turned(layer.keys[:, :, kept], delta), layer.values[:, :, kept]))
            end = max(end, int(new[kept].max()) + 1)
        for number, of in enumerate(layers):
            cache.update(*(torch.cat(x, 2) for x in zip(*of, strict=True)), number)
        feed, found = list(tail), []
        while len(found) < MOST:
            at = torch.arange(end, end + len(feed))[None]
            logits = model(torch.tensor([feed]), past_key_values=cache, position_ids=at).logits
            found.append(int(logits[0, -1].argmax()))
            end, feed = end + len(feed), found[-1:]
    return found


def turned(keys: Tensor, delta: Tensor) -> Tensor:
    """Rotated keys `[1, H, T, D]` further by `delta [T]` positions."""
    half = keys.shape[-1] // 2
    angle = delta[:, None] / 10000.0 ** (torch.arange(half, dtype=torch.float64) / half)
    low, high, cos, sin = keys[..., :half], keys[..., half:], angle.cos(), angle.sin()
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).float()


def mask(reading: Reading, *hidden: tuple[int, int]) -> Tensor:
    """All tokens but those of these characters of the only text."""
    seen = torch.ones(len(reading.tokens()), dtype=torch.bool)
    text = reading.texts[0]
    for start, end in hidden:
        found = text.offsets.tokens(start, end)
        seen[text.first + found.start : text.first + found.stop] = False
    return seen


@pytest.mark.parametrize(
    "hidden", [[(0, 7)], [(13, 17)], [(70, 240)], [(5, 90), (200, 201), (300, len(TEXT))], [(0, len(TEXT))]]
)
def test_dropped_spans_are_hidden_token_by_token(subject: Engine, hidden: list[tuple[int, int]]) -> None:
    with subject.read(Document.of(TEXT, "t")) as reading:
        seen = mask(reading, *hidden)
        reply = reading.ask(QUESTION, drop=hidden, max_new_tokens=MOST)
        assert list(reply.token_ids) == reference(reading.tokens(), seen, asked(reading))
        assert reply.coverage.visible == int(seen.sum()) - reading.texts[0].first
        assert reply.usage.computed_tokens == len(asked(reading))
        spans = [Span(Document.of(TEXT).id, *pair) for pair in hidden]
        assert reading.ask(QUESTION, drop=spans, max_new_tokens=MOST) == reply
        together = reading.ask_many([QUESTION, "Why?"], drop=hidden, max_new_tokens=MOST)
        assert together[0] == reply
        assert reading.ask("Why?", drop=hidden, max_new_tokens=MOST) == together[1]
        assert reading.ask(QUESTION, drop=hidden, max_new_tokens=MOST, exact=True).text == reply.text


def test_only_these_spans_are_seen(subject: Engine) -> None:
    with subject.read(TEXT) as reading:
        keep = [(13, 18), (100, 250)]  # the first begins in the middle of nothing: Łódź
        seen = ~mask(reading, *keep)
        seen[: reading.texts[0].first] = True
        reply = reading.ask(QUESTION, attend_only=keep, max_new_tokens=MOST)
        assert list(reply.token_ids) == reference(reading.tokens(), seen, asked(reading))
        seen &= mask(reading, (120, 130))
        both = reading.ask(QUESTION, attend_only=keep, drop=[(120, 130)], max_new_tokens=MOST)
        assert list(both.token_ids) == reference(reading.tokens(), seen, asked(reading))
        nothing = reading.ask(QUESTION, attend_only=[], max_new_tokens=MOST)
        assert nothing.coverage.visible == 0 and nothing.coverage.read == len(TEXT.encode())
        every = reading.ask(QUESTION, attend_only=[(0, len(TEXT))], max_new_tokens=MOST)
        assert every == reading.ask(QUESTION, max_new_tokens=MOST)


def test_the_first_tokens_of_a_bare_text_are_always_seen(subject: Engine) -> None:
    ids = subject.tokens.data(TEXT).ids
    with subject.read(ids) as reading:
        tail = subject.tokens.data(" So").ids
        reply = reading.generate(" So", attend_only=[], max_new_tokens=MOST)
        seen = torch.arange(len(ids)) < 4
        assert list(reply.token_ids) == reference(ids, seen, tail)


def test_read_anew_nothing_of_what_was_dropped_lingers(subject: Engine) -> None:
    with subject.read(TEXT) as reading:
        ids, hidden = reading.tokens(), [(100, 170)]
        left = [token for token, one in zip(ids, mask(reading, *hidden).tolist(), strict=True) if one]
        all_seen = torch.ones(len(left), dtype=torch.bool)
        reply = reading.ask(QUESTION, drop=hidden, reread=True, max_new_tokens=MOST)
        assert list(reply.token_ids) == reference(left, all_seen, asked(reading))
        usage = reply.usage
        first = reading.texts[0].first + reading.texts[0].offsets.tokens(100, 101).start
        assert usage.prompt_tokens == len(left) + len(asked(reading))
        assert usage.reused_tokens == first // 64 * 64
        kept = reading.ask(QUESTION, drop=hidden, max_new_tokens=MOST)
        assert kept.token_ids != reply.token_ids  # what came after had absorbed it


def test_a_branch_is_narrowed_step_by_step_and_keeps_what_was_said(subject: Engine) -> None:
    with subject.read(TEXT) as reading, reading.fork() as branch:
        ids = list(reading.tokens())
        one = branch.generate(" A", max_new_tokens=3)
        branch.drop([(20, 120)])
        said = [*subject.tokens.data(" A").ids, *one.token_ids]
        own = torch.ones(len(ids) + len(said), len(ids) + len(said), dtype=torch.bool)  # saw all of it
        seen = torch.cat([mask(reading, (20, 120)), torch.ones(len(said), dtype=torch.bool)])
        with branch.fork() as twin:
            two = twin.generate(" B", max_new_tokens=3)
        assert list(two.token_ids) == reference(
            [*ids, *said], seen, subject.tokens.data(" B").ids, most=3, own=own
        )
        assert branch.generate(" B", max_new_tokens=3).token_ids == two.token_ids
        branch.attend_only([(100, 300)])
        tail = [*subject.tokens.data(" B").ids, *two.token_ids]
        now = ~mask(reading, (120, 300))
        now[: reading.texts[0].first] = True
        size = len(ids) + len(said) + len(tail)
        own = torch.ones(size, size, dtype=torch.bool)
        own[len(seen) :, : len(seen)] = seen
        now = torch.cat([now, torch.ones(size - len(ids), dtype=torch.bool)])
        three = branch.generate(" C", max_new_tokens=3)
        assert list(three.token_ids) == reference(
            [*ids, *said, *tail], now, subject.tokens.data(" C").ids, most=3, own=own
        )
        assert three.coverage.visible == int(now[: len(ids)].sum()) - reading.texts[0].first


def parts(
    readings: Sequence[Reading], order: str, *hidden: tuple[int, range]
) -> list[tuple[Sequence[int], Tensor, Tensor]]:
    """For `side_by_side`, what stands before the texts once; without the tokens `hidden` of some readings."""
    first = at = readings[0].texts[0].first
    found = []
    for number, reading in enumerate(readings):
        index = torch.arange(len(reading.tokens()))
        kept = (index >= first) | (number == 0)
        for which, tokens in hidden:
            if which == number:
                kept[first + tokens.start : first + tokens.stop] = False
        found.append((reading.tokens(), kept, torch.where(index < first, index, index + at - first)))
        at += len(index) - first if order == "sequence" else 0
    return found


@pytest.mark.parametrize("order", ["sequence", "set"])
def test_composed_readings_stand_side_by_side(subject: Engine, order: Any) -> None:
    with subject.read(A) as a, subject.read(B) as b, subject.read(C) as c:
        readings, tail, first = [a, b, c], asked(a), a.texts[0].first
        ids = [*a.tokens(), *b.tokens()[first:], *c.tokens()[first:]]
        with subject.compose(readings, order=order) as both:
            reply = both.ask(QUESTION, max_new_tokens=MOST)
            assert list(reply.token_ids) == side_by_side(parts(readings, order), tail)
            assert both.usage.computed_tokens == 0 and both.usage.prompt_tokens == len(ids)
            assert reply.usage.computed_tokens == len(tail)
            assert reply.coverage.total == reply.coverage.visible == len(ids) - first
            together = both.ask_many([QUESTION, "Why?"], max_new_tokens=MOST)
            assert together == [reply, both.ask("Why?", max_new_tokens=MOST)]
            hidden = both.ask(QUESTION, drop=[Span(B.id, 5, 40)], max_new_tokens=MOST)
            without = parts(readings, order, (1, b.texts[0].offsets.tokens(5, 40)))
            assert list(hidden.token_ids) == side_by_side(without, tail) != list(reply.token_ids)
            anew = both.ask(QUESTION, reread=True, max_new_tokens=MOST)
            assert list(anew.token_ids) == reference(ids, torch.ones(len(ids), dtype=torch.bool), tail)


def test_the_order_of_a_set_does_not_matter(subject: Engine) -> None:
    with subject.read(A) as a, subject.read(B) as b, subject.read(C) as c:
        found = set()
        for readings in ([a, b, c], [c, a, b], [b, c, a]):
            with subject.compose(readings, order="set") as both:
                found.add(both.ask(QUESTION, max_new_tokens=12).token_ids)
        assert len(found) == 1


def test_one_reading_composed_is_that_reading_and_shares_its_pages(subject: Engine) -> None:
    with subject.read(TEXT) as reading:
        used = subject.runtime.pool.used_pages
        with subject.compose([reading]) as same:
            assert subject.runtime.pool.used_pages <= used + 1  # the open block
            assert same.ask(QUESTION, max_new_tokens=12) == reading.ask(QUESTION, max_new_tokens=12)


def test_places_of_readings_are_composed_and_outlive_them(subject: Engine) -> None:
    before = subject.runtime.pool.used_pages
    places = [(4, 30), (60, 80)]
    with subject.read(A) as a, subject.read(B) as b:
        first, tail = a.texts[0].first, asked(a)
        both = subject.compose([(a, places), (b, [Span(B.id, 0, 10)])])
        one = torch.arange(len(a.tokens())) < first
        for found in (a.texts[0].offsets.tokens(*pair) for pair in places):
            one[first + found.start : first + found.stop] = True
        two = torch.zeros(len(b.tokens()), dtype=torch.bool)
        two[first : first + 10] = True
        size = int(one.sum())
        expected = side_by_side(
            [(a.tokens(), one, one.cumsum(0) - 1), (b.tokens(), two, size - 1 + two.cumsum(0))], tail
        )
    with both:
        assert both.coverage.read == size - first + 10 < both.coverage.total
        reply = both.ask(QUESTION, max_new_tokens=MOST)
        assert list(reply.token_ids) == expected and reply.usage.reused_tokens == size + 10
        with both.fork() as branch:
            branch.drop([Span(B.id, 0, 5)])
            assert branch.generate(" So", max_new_tokens=3).coverage.visible == both.coverage.read - 5
    subject.runtime.prefixes.clear()
    assert subject.runtime.pool.used_pages <= before


def test_pinned_spans_are_always_read(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[set[int]] = []
    choose = Quest.choose

    def watched(self: Quest, q: Tensor, kv: Any) -> Any:
        found = choose(self, q, kv)
        lists = found.blocks.flatten(0, -2)
        counts = found.counts.flatten()
        chosen.extend(set(row[:count].tolist()) for row, count in zip(lists, counts, strict=True))
        return found

    monkeypatch.setattr(Quest, "choose", watched)
    subject = engine(tiny_model, attention="quest:budget=576,dense_below=64,dense_layers=0,guard=report")
    text = TEXT * 3
    with subject.read(text) as reading:
        first, offsets = reading.texts[0].first, reading.texts[0].offsets
        wanted = {(first + at) // 64 for at in offsets.tokens(300, 420)}
        assert len(wanted) == 3
        free = reading.ask(QUESTION, max_new_tokens=3)
        assert not all(wanted <= one for one in chosen)
        assert free.coverage.bracket is not None and free.coverage.bracket.rows > 0
        assert (
            0 <= free.coverage.bracket.low <= free.coverage.bracket.high <= free.coverage.bracket.worst <= 1
        )
        for call in (reading.ask, lambda *_, **how: reading.ask_many([QUESTION, "Why?"], **how)[0]):
            chosen.clear()
            call(QUESTION, pins=[(300, 420)], max_new_tokens=3)
            assert chosen and all(wanted <= one for one in chosen)
        with reading.fork() as branch:
            branch.pin([(300, 420)])
            chosen.clear()
            branch.fork().generate(" So", max_new_tokens=2)
            assert chosen and all(wanted <= one for one in chosen)
        moved = reading.ask(QUESTION, pins=[(300, 420)], drop=[(0, 100)], reread=True, max_new_tokens=2)
        assert moved.finish == "length"
        with pytest.raises(ConfigError, match="blocks of 64 tokens are pinned, 3 can be"):
            reading.ask(QUESTION, pins=[(0, len(text))])
    with engine(tiny_model, attention="streaming:window=100").read(TEXT) as fixed:
        with pytest.raises(ConfigError, match="streaming does not choose"):
            fixed.ask(QUESTION, pins=[(0, 9)])
        with pytest.raises(ModelError, match="streaming does not go with chosen tokens"):
            fixed.ask(QUESTION, drop=[(0, 9)])


def test_what_cannot_be_hidden_or_composed_is_refused(subject: Engine) -> None:
    used = subject.runtime.pool.used_pages
    with subject.read(A) as a, subject.read(B) as b:
        for wrong in ((-1, 3), (5, 3), (0, len(A.text) + 1)):
            with pytest.raises(ConfigError, match="are not in a text of 130"):
                a.ask(QUESTION, drop=[wrong])
        with pytest.raises(ConfigError, match="no text of this reading has the id"):
            a.ask(QUESTION, attend_only=[Span(B.id, 0, 3)])
        with pytest.raises(ConfigError, match="a prompt is needed"):
            a.generate(drop=[(0, 9)])
        with pytest.raises(ConfigError, match="nothing to compose"):
            subject.compose([])
        with subject.read(B, prefix="") as bare, pytest.raises(ConfigError, match="begin differently"):
            subject.compose([a, bare])
        with subject.compose([a, b]) as both:
            with pytest.raises(ConfigError, match="of which of 2 texts"):
                both.ask(QUESTION, drop=[(0, 3)])
            with pytest.raises(ConfigError, match="only complete readings of one text"):
                subject.compose([both, a])
            with pytest.raises(ConfigError, match="can grow"):
                both.extend("more")
        with subject.read("x" * 1500) as long, pytest.raises(ModelError) as failed:
            subject.compose([long, long])
        assert failed.value.code == "overflow"
    subject.runtime.prefixes.clear()
    assert subject.runtime.pool.used_pages <= used
