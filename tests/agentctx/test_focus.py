"""Parts of a text hidden, pinned or composed, against transformers with the mask that each of these means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

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
    positions: Sequence[int] | None = None,
) -> list[int]:
    """Greedy ids after `tail`, whose tokens and those generated see only the tokens `seen` of `ids`, which
    have seen one another as far as `own` (bool, rows see columns) and stand at `positions`.
    """
    size, found = len(ids), list(tail)
    places = list(range(size)) if positions is None else list(positions)
    end = max(place for place, one in zip(places, seen.tolist(), strict=True) if one) + 1
    end = end if positions is not None else size
    while True:
        total = size + len(found)
        allowed = torch.ones(total, total, dtype=torch.bool).tril()
        if own is not None:
            allowed[:size, :size] &= own
        allowed[size:, :size] &= seen
        mask = torch.zeros(total, total).masked_fill(~allowed, torch.finfo(torch.float32).min)
        at = torch.tensor([[*places, *range(end, end + len(found))]])
        model: Any = stock()
        with torch.inference_mode():
            logits = model(
                torch.tensor([[*ids, *found]]), attention_mask=mask[None, None], position_ids=at
            ).logits
        if len(found) == len(tail) + most:
            return found[len(tail) :]
        found.append(int(logits[0, -1].argmax()))


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


def blocks(readings: Sequence[Reading], order: str) -> tuple[list[int], Tensor, list[int]]:
    """Ids, who saw whom, and positions of readings side by side, what stands before them once."""
    first = readings[0].texts[0].first
    ids = list(readings[0].tokens()[:first])
    groups, positions, at = [0] * first, list(range(first)), first
    for number, reading in enumerate(readings, 1):
        own = reading.tokens()[first:]
        ids += own
        groups += [number] * len(own)
        positions += range(at, at + len(own))
        at += len(own) if order == "sequence" else 0
    group = torch.tensor(groups)
    return ids, (group[:, None] == group) | (group == 0), positions


@pytest.mark.parametrize("order", ["sequence", "set"])
def test_composed_readings_stand_side_by_side(subject: Engine, order: Any) -> None:
    with subject.read(A) as a, subject.read(B) as b, subject.read(C) as c:
        ids, own, positions = blocks([a, b, c], order)
        with subject.compose([a, b, c], order=order) as both:
            reply = both.ask(QUESTION, max_new_tokens=MOST)
            seen = torch.ones(len(ids), dtype=torch.bool)
            assert list(reply.token_ids) == reference(ids, seen, asked(a), own=own, positions=positions)
            assert both.usage.computed_tokens == 0 and both.usage.prompt_tokens == len(ids)
            assert reply.usage.computed_tokens == len(asked(a))
            assert reply.coverage.total == reply.coverage.visible == len(ids) - a.texts[0].first
            together = both.ask_many([QUESTION, "Why?"], max_new_tokens=MOST)
            assert together == [reply, both.ask("Why?", max_new_tokens=MOST)]
            span = Span(B.id, 5, 40)
            found = b.texts[0].offsets.tokens(5, 40)
            seen[len(a.tokens()) + found.start : len(a.tokens()) + found.stop] = False
            hidden = both.ask(QUESTION, drop=[span], max_new_tokens=MOST)
            assert list(hidden.token_ids) == reference(ids, seen, asked(a), own=own, positions=positions)
            anew = both.ask(QUESTION, reread=True, max_new_tokens=MOST)
            assert list(anew.token_ids) == reference(ids, torch.ones(len(ids)).bool(), asked(a))


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
    with subject.read(A) as a, subject.read(B) as b:
        first = a.texts[0].first
        both = subject.compose([(a, [(4, 30), (60, 80)]), (b, [Span(B.id, 0, 10)])])
        lead = list(a.tokens()[:first])
        cut = [a.texts[0].offsets.tokens(*pair) for pair in ((4, 30), (60, 80))]
        tail = asked(a)
    with both:
        kept = [*lead, *(a.tokens()[first + at] for found in cut for at in found)]
        kept += b.tokens()[first : first + 10]
        assert both.coverage.read == len(kept) - first < both.coverage.total
        reply = both.ask(QUESTION, max_new_tokens=MOST)
        assert reply.usage.reused_tokens == len(kept)
        ids, own, _ = blocks([a, b], "sequence")
        seen = torch.zeros(len(ids), dtype=torch.bool)
        seen[:first] = True
        for found in cut:
            seen[first + found.start : first + found.stop] = True
        seen[len(a.tokens()) : len(a.tokens()) + 10] = True
        moved = cut_positions(seen, first)
        assert len(tail) and len(reply.token_ids) == MOST
        assert int(moved[seen].max()) == len(kept) - 1
        with both.fork() as branch:
            branch.drop([Span(B.id, 0, 5)])
            assert len(branch.generate(" So", max_new_tokens=3).token_ids) == 3
    subject.runtime.prefixes.clear()
    assert subject.runtime.pool.used_pages <= before


def cut_positions(seen: Tensor, first: int) -> Tensor:
    """Where kept tokens stand one after another."""
    return torch.where(torch.arange(len(seen)) < first, torch.arange(len(seen)), seen.cumsum(0) - 1)


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
