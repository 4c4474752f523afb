"""Passages moved into a context, and tokens of them computed anew, against reading in one piece."""

from __future__ import annotations

import pytest
import torch
from grouped import engine, words
from tiny import FAMILIES
from torch import Tensor

from agentctx.corpus.blend import LAYER, changes, compute_anew
from agentctx.reading.sources import appended
from agentctx.runtime.context import Context
from agentctx.runtime.engine import Engine
from agentctx.runtime.hf.body import HFBody

BEFORE, PASSAGE, OPENING = words(150, 1), words(140, 2), words(5, 3)


def moved(subject: Engine) -> tuple[Context, Tensor, Tensor]:
    """A context of `BEFORE`, and behind it the passage as it was read behind `OPENING`."""
    context, _ = subject.begin(BEFORE)
    held = subject.read([*OPENING, *PASSAGE])
    k, v = appended(context, held.table, range(len(OPENING), len(OPENING) + len(PASSAGE)))
    held.close()
    context.ids += PASSAGE
    return context, k, v


def stored(context: Context, first: int = 0) -> tuple[Tensor, Tensor]:
    return context.table.read(first)


def same(found: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], at: Tensor | slice = slice(None)) -> None:
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a[:, :, at], b[:, :, at], atol=2e-3, rtol=2e-3)


@pytest.fixture(scope="module", params=["llama-own", *FAMILIES])
def subject(request: pytest.FixtureRequest) -> Engine:
    if request.param == "llama-own":
        return engine(3)
    body = HFBody(FAMILIES[request.param]())
    if None in body.rotations():
        pytest.skip("its keys cannot be moved")
    return Engine(body, fingerprint=request.param, memory_bytes=32 << 20)


def test_all_computed_anew_is_reading_in_one_piece(subject: Engine) -> None:
    whole = subject.read([*BEFORE, *PASSAGE])
    context, k, v = moved(subject)
    same(stored(context, len(BEFORE)), (k, v))
    apart = (stored(context)[1][-1] - stored(whole)[1][-1]).abs().max()
    assert apart > 0.05  # it did not see what stands before it
    compute_anew(context, torch.arange(len(BEFORE), len(BEFORE) + len(PASSAGE)))
    same(stored(context), stored(whole))
    going_on = context.feed([3, 4])
    assert going_on is not None
    torch.testing.assert_close(going_on, whole.feed([3, 4]), atol=5e-3, rtol=5e-3)


def test_each_token_sees_what_stands_before_it_anew_or_moved(subject: Engine) -> None:
    """One pass is what token after token would give: moved where it stays, fed where it is chosen."""
    context, _, _ = moved(subject)
    chance = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(PASSAGE), generator=chance)[:30].sort().values
    compute_anew(context, chosen + len(BEFORE))
    slow, _ = subject.begin(BEFORE)
    held = subject.read([*OPENING, *PASSAGE])
    for number, token in enumerate(PASSAGE):
        if number in chosen.tolist():
            slow.feed([token])
        else:
            appended(slow, held.table, range(len(OPENING) + number, len(OPENING) + number + 1))
            slow.ids.append(token)
    same(stored(context), stored(slow))


def test_changes_are_those_of_the_second_layer(subject: Engine) -> None:
    whole = subject.read([*BEFORE, *PASSAGE])
    context, k, v = moved(subject)
    pages = subject.pool.used_pages
    found = changes(context, len(BEFORE), k, v)
    assert subject.pool.used_pages == pages
    same(stored(context, len(BEFORE)), (k, v))  # nothing was written
    want = torch.zeros(len(PASSAGE))
    for new, old in zip(stored(whole, len(BEFORE)), (k, v), strict=True):
        want += (new - old)[LAYER].square().mean((0, 2)) / new[LAYER].square().mean()
    torch.testing.assert_close(found, want, atol=1e-3, rtol=1e-2)


def test_what_stands_behind_what_was_shared_is_left_alone() -> None:
    """The open page of the beginning is shared with a fork, which must not see what is written."""
    subject = engine(3)
    context, _ = subject.begin(BEFORE)
    twin = context.fork()
    before = [x.clone() for x in stored(twin)]
    held = subject.read([*OPENING, *PASSAGE])
    appended(context, held.table, range(len(OPENING), len(OPENING) + 100))
    context.ids += PASSAGE[:100]
    compute_anew(context, torch.tensor([len(BEFORE), len(BEFORE) + 70]))
    for a, b in zip(stored(twin), before, strict=True):
        assert torch.equal(a, b)
    for one in (context, twin, held):
        one.close()
