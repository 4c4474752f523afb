"""Attention as a retriever against its definition in float64: masses, spans, heads."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tiny
import torch
from grouped import HEADS, LAYERS, SIZE, engine, hidden, words
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentctx.memory.errors import ModelError
from agentctx.memory.kv.gather import Part, gather, slots
from agentctx.memory.kv.past import Past
from agentctx.runtime.context import Context
from agentctx.runtime.engine import Engine
from agentctx.runtime.hf.body import HFBody
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.evictor import show
from agentctx.runtime.retrieve.heads import (
    Asked,
    chosen,
    heads_of,
    middle,
    reciprocal_rank,
    together,
    weighed,
)
from agentctx.runtime.retrieve.mass import attended, query_heads
from agentctx.runtime.retrieve.spans import BEST, BOX, smoothed, worth

TOKENS, ASKED, ROWS = 300, 20, 15


def definition(context: Context, ids: Sequence[int], rows: int) -> Tensor:
    """The matrix of shares in float64, `[layers, Hq, N]` without the question's own columns."""
    layers = context.engine.pool.shape.layers
    found: dict[int, Tensor] = {}

    def see(q: Tensor, kv: LayerKV) -> None:
        found[kv.index] = q[0].double()

    tokens = len(context.ids)
    fork = context.fork()
    with torch.inference_mode():
        show(fork, list(ids), see)
        past = Past.over(fork.table)
        end = tokens + len(ids)
        keys = [past.read(layer)[0][:, :end].double() for layer in range(layers)]
        past.close()
    fork.close()
    masses = []
    for layer in range(layers):
        q = found[layer]
        group = len(q) // len(keys[layer])
        scores = q @ keys[layer].repeat_interleave(group, 0).mT * SIZE**-0.5
        later = torch.arange(end) > (tokens + torch.arange(len(ids)))[:, None]
        shares = scores.masked_fill(later, -torch.inf).softmax(-1)
        masses.append(shares[:, -rows:, :tokens].mean(1))
    return torch.stack(masses)


def close(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found.double(), want, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("group", [1, 3, 4])
def test_masses_are_the_mean_shares_of_the_rows(group: int) -> None:
    context = engine(group).read(words(TOKENS))
    before = hidden(context.fork(), [3, 4])
    asked = words(ASKED, seed=1)
    want = definition(context, asked, ROWS)
    close(attended([context], asked, rows=ROWS)[0], want)
    heads = torch.rand(LAYERS, HEADS * group)
    heads[0, 0] = 0
    close(attended([context], asked, rows=ROWS, heads=heads)[0], (want * heads[..., None]).sum((0, 1)))
    heads[0] = 0  # a layer that nobody looks at
    close(attended([context], asked, rows=ROWS, heads=heads)[0], (want * heads[..., None]).sum((0, 1)))
    assert context.ids == words(TOKENS)
    assert torch.equal(hidden(context, [3, 4]), before)  # nothing changed


@pytest.mark.parametrize("chunk", [64, 512])
def test_long_questions_and_any_piece_size(chunk: int) -> None:
    asked = words(150, seed=2)
    context = engine(3, chunk=chunk).read(words(TOKENS))
    close(attended([context], asked, rows=140)[0], definition(engine(3).read(words(TOKENS)), asked, 140))


def test_a_sparse_method_looks_with_exact_attention() -> None:
    asked = words(ASKED, seed=1)
    sparse = engine(3, "quest:budget=448,dense_below=0,dense_layers=0").read(words(900))
    close(attended([sparse], asked, rows=ROWS)[0], definition(engine(3).read(words(900)), asked, ROWS))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 130), min_size=1, max_size=4), group=st.sampled_from([1, 3, 4]))
def test_a_batch_is_its_rows(lengths: list[int], group: int) -> None:
    subject = engine(group)
    contexts = subject.read_all([words(length, seed=length) for length in lengths])
    asked = words(9, seed=3)
    heads = torch.rand(LAYERS, HEADS * group)
    found = attended(contexts, asked, rows=7, heads=heads)
    assert found.shape == (len(lengths), max(lengths))
    for row, context, length in zip(found, contexts, lengths, strict=True):
        alone = attended([context], asked, rows=7, heads=heads)[0]
        torch.testing.assert_close(row[:length], alone, atol=1e-5, rtol=1e-4)
        assert not row[length:].any()


def test_tokens_of_a_past_stand_in_the_order_of_its_slots() -> None:
    """A composed reading: parts of two texts; shares of the whole, by a matrix over the gathered keys."""
    subject = engine(3)
    texts = [subject.read(words(200, seed=seed)) for seed in (5, 6)]
    pasts = [Past.over(text.table) for text in texts]
    kept = [torch.rand(200, generator=torch.Generator().manual_seed(seed)) < 0.5 for seed in (7, 8)]
    kept[1][:128] = True  # two blocks that are shared as they are
    parts = [Part(past, mask) for past, mask in zip(pasts, kept, strict=True)]
    both = gather(parts, end=400)
    order = slots(parts)
    keys = torch.cat([past.read(1)[0][:, :200] for past in pasts], 1)
    held = both.read(1)[0][:, : both.longest]
    assert torch.equal(held, keys[:, order])
    assert sorted(order.tolist()) == torch.cat(kept).nonzero()[:, 0].tolist()
    context = Context.over(subject, both, [0] * both.longest)
    asked = words(ASKED, seed=1)
    found = attended([context], asked, rows=ROWS)[0]

    queries: list[Tensor] = []
    own: list[Tensor] = []

    def see(q: Tensor, kv: LayerKV) -> None:
        if kv.index == 1:
            queries.append(q[0].double())

    fork = context.fork()
    show(fork, asked, see)
    past = Past.over(fork.table)
    own.append(past.read(1)[0][:, :ASKED])
    past.close()
    whole = torch.cat([held, own[0]], 1).double().repeat_interleave(3, 0)
    later = torch.arange(both.longest + ASKED) > (both.longest + torch.arange(ASKED))[:, None]
    scores = (queries[0] @ whole.mT * SIZE**-0.5).masked_fill(later, -torch.inf)
    close(found[1], scores.softmax(-1)[:, -ROWS:, : both.longest].mean(1))


def test_layers_with_windows_are_not_looked_at_and_sinks_take_their_share() -> None:
    model = tiny.FAMILIES["gpt-oss"]()
    model.config._attn_implementation = "eager"
    ids = torch.randint(2, 97, (1, 80), generator=torch.Generator().manual_seed(0))
    want = model(ids, output_attentions=True).attentions[1][0, :, -6:, :70].mean(1)
    subject = Engine(HFBody(model), fingerprint="sinks", memory_bytes=16 << 20)
    context = subject.read(ids[0, :70].tolist())
    found = attended([context], ids[0, 70:].tolist(), rows=6)[0]
    assert not found[0].any()  # its window is 128, and the other layer's is none
    torch.testing.assert_close(found[1], want, atol=1e-5, rtol=1e-3)


def test_what_cannot_be_looked_at_is_refused() -> None:
    subject = engine(3)
    context = subject.read(words(100))
    with pytest.raises(ModelError) as caught:
        attended([context], words(2000), rows=2)
    assert caught.value.code == "overflow"
    with pytest.raises(ModelError) as caught:
        attended([context], [1, 2], rows=1, heads=torch.zeros(LAYERS, HEADS * 3))
    assert caught.value.code == "unsupported"
    evicted = engine(3, "snap:keep=0.5,dense_below=0").read(words(200))
    with pytest.raises(ModelError) as caught:
        attended([evicted], [1, 2], rows=1)
    assert caught.value.code == "unsupported"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(size=st.integers(1, 60), data=st.data())
def test_spans_are_worth_the_mean_of_their_best_smoothed_tokens(size: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    mass = torch.rand(2, size, generator=generator)
    start = data.draw(st.integers(0, size))
    place = range(start, data.draw(st.integers(start, size)))
    boxed = smoothed(mass, [place])
    for at in range(size):
        window = [i for i in range(at - BOX // 2, at + BOX - BOX // 2) if i in place]
        want = mass[:, window].double().sum(-1) / BOX if at in place else torch.zeros(2).double()
        torch.testing.assert_close(boxed[:, at].double(), want)
    first = data.draw(st.integers(0, size))
    span = range(first, data.draw(st.integers(first, size)))
    own = boxed[:, span.start : span.stop].double().sort(-1, descending=True).values[:, :BEST]
    want = own.mean(-1) if len(span) else torch.zeros(2).double()
    torch.testing.assert_close(worth(boxed, [span])[:, 0].double(), want)


def test_heads_without_a_calibration_are_those_of_the_middle_layers() -> None:
    found = middle(30, 9)
    layers = found.sum(1).nonzero()[:, 0].tolist()
    assert layers == list(range(14, 22))  # 0.45 to 0.75 of 29
    assert float(found.sum()) == pytest.approx(1)
    subject = engine(4)
    assert query_heads(subject) == HEADS * 4
    assert torch.equal(heads_of(subject, [(1, 5)]), weighed([(1, 5)], LAYERS, HEADS * 4))


def planted(seed: int, good: Sequence[tuple[int, int]], count: int = 12) -> list[Asked]:
    """Questions about texts of ten spans, of which these heads look at the right one, in turn."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        mass = torch.rand(3, 4, 100, generator=generator) * 0.5
        right = int(torch.randint(10, (1,), generator=generator))
        mass[good[number % len(good)]][right * 10 : right * 10 + 10] += 1
        spans = [range(at, at + 10) for at in range(0, 100, 10)]
        found.append(Asked(mass, spans, right, torch.zeros(3, 4)))
    return found


def test_the_heads_that_were_planted_are_chosen_and_no_others() -> None:
    good = [(1, 2), (2, 0), (0, 3)]
    heads = chosen(planted(0, good), planted(1, good))
    assert sorted(heads) == sorted(good)
    assert together(planted(2, good), weighed(heads, 3, 4)) == (1.0, 1.0)


def test_a_head_that_only_one_half_likes_is_not_kept() -> None:
    one, other = planted(0, [(1, 2), (0, 0)]), planted(1, [(1, 2)])
    assert chosen(one, other) == [(1, 2)]


def test_reciprocal_rank() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 3.0], [0.0, 9.0, 2.0, 3.0]])
    assert reciprocal_rank(scores, 1).tolist() == [0.5, 1.0]
