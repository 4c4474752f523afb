"""What a pass leaves behind that failed, was interrupted or was cancelled: nothing that changes an answer."""

from __future__ import annotations

import threading
from copy import copy
from typing import Any

import pytest
import torch
from test_methods import body, engine, words
from torch import Tensor

from agentctx.memory.errors import ConfigError
from agentctx.runtime import twins
from agentctx.runtime.context import Context
from agentctx.runtime.engine import Engine
from agentctx.runtime.llama import LlamaDecoder
from agentctx.runtime.methods.table import EVICTORS, method
from agentctx.runtime.state import KVState


class Failing(LlamaDecoder):
    """Fails in a layer of the pass that is counted down to."""

    layer: int
    passes: int

    def plain(self) -> LlamaDecoder:
        return self

    def _attend(self, index: int, layer: Any, x: Tensor, at: Tensor, state: KVState) -> Tensor:
        if index == self.layer:
            self.passes -= 1
            if self.passes == 0:
                raise KeyboardInterrupt
        return super()._attend(index, layer, x, at, state)


def failing(layer: int, passes: int) -> Failing:
    found = copy(body())
    found.__class__ = Failing
    assert isinstance(found, Failing)
    found.layer, found.passes = layer, passes
    return found


def over(model: LlamaDecoder, *, text: str = "dense", chunk: int = 64) -> Engine:
    return Engine(model, fingerprint="x", memory_bytes=64 << 20, method=method(text), chunk=chunk)


def held(context: Context) -> tuple[int, int, list[int], list[int]]:
    return len(context.ids), context.table.tokens, list(context.state.layer_lengths), [context.computed]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("passes", [1, 3])  # of the feed: in its first piece, and when two are done
@pytest.mark.parametrize("text", ["dense", "quest:budget=448,dense_below=448"])
def test_a_failed_feed_leaves_everything_as_it_was(text: str, layer: int, passes: int) -> None:
    broken, sound = over(failing(layer, 10 + passes), text=text), over(body(), text=text)
    context, other = broken.read(words(600)), sound.read(words(600))
    before, pages = held(context), broken.pool.used_pages
    with pytest.raises(KeyboardInterrupt):
        context.feed(words(180, 1))
    assert held(context) == before
    assert broken.pool.used_pages <= pages + 1  # a copy of the open page, which others hold
    again, expected = context.feed(words(180, 1)), other.feed(words(180, 1))
    assert again is not None and expected is not None
    assert torch.equal(again, expected)


def test_a_failed_pass_over_several_leaves_each_as_it_was() -> None:
    model = failing(1, 3)
    broken = over(model, chunk=512)
    contexts = [broken.read(words(count, count)) for count in (100, 130)]
    before = [held(context) for context in contexts]
    model.passes = 1
    ids = torch.tensor([words(3, 7), words(3, 8)])
    with pytest.raises(KeyboardInterrupt):
        broken.step(contexts, ids)
    assert [held(context) for context in contexts] == before
    sound = over(body(), chunk=512)
    expected = sound.step([sound.read(words(count, count)) for count in (100, 130)], ids)
    assert torch.equal(broken.step(contexts, ids), expected)


@pytest.mark.parametrize("text", ["triangle:dense_below=200,local=128", "quest:budget=448,dense_below=448"])
def test_a_cancelled_reading_is_asked_like_any_other(text: str) -> None:
    cancelled = threading.Event()
    first = engine(text, chunk=64)

    def stop(held: int, _: int) -> None:
        if held >= 512:
            cancelled.set()

    part = first.read(words(900), cancelled=cancelled, progress=stop)
    whole = engine(text, chunk=64).read(words(900)[: len(part.ids)])
    assert len(part.ids) == 512 and not part.state.reading
    one, other = part.feed(words(9, 3)), whole.feed(words(9, 3))
    assert one is not None and other is not None
    assert torch.equal(one, other)


def test_what_is_asked_never_goes_through_weights_of_fewer_bits() -> None:
    """So a prompt of which all but a few tokens are held gets the answer that it got at first."""
    model = body.__wrapped__()  # not the one that all tests share
    twins.make(model.linears(), {})
    fewer = over(model)
    for ids in (words(195), words(195)):
        context, hidden = fewer.begin(ids)
        assert hidden is not None
        assert torch.allclose(hidden, _exactly(words(195)), atol=1e-4)
        spoken = fewer.step([context], torch.tensor([[5]]), spoken=True)
        context.crop(195)
        assert not torch.allclose(spoken, fewer.step([context], torch.tensor([[5]])), atol=1e-2)


def _exactly(ids: list[int]) -> Tensor:
    hidden = over(body()).begin(ids)[1]
    assert hidden is not None
    return hidden


@pytest.mark.parametrize("name", EVICTORS)
def test_evictors_do_not_go_with_quantised_memory(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Engine(body(), fingerprint="x", memory_bytes=64 << 20, method=method(name), kv_dtype="int8")
