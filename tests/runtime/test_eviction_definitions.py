"""Each score of an evictor against its definition in float64, with groups of 1, 3 and 4 query heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grouped import HEADS, LAYERS, SIZE, body, engine, words
from torch import Tensor

from agentctx.memory.kv.past import Past
from agentctx.runtime.context import Context
from agentctx.runtime.layer import LayerKV
from agentctx.runtime.methods.evictor import Evictor, leading, observe, show
from agentctx.runtime.methods.expected import Expected
from agentctx.runtime.methods.keystats import KeyDiff, LagKV
from agentctx.runtime.methods.kvzip import KVZip
from agentctx.runtime.methods.snap import Snap

TOKENS = 300


def read(group: int) -> tuple[Context, Tensor, Tensor]:
    """A reading, and its K and V `[layers, Hkv, N, D]`."""
    context = engine(group).read(words(TOKENS))
    past = Past.over(context.table)
    k, v = (torch.stack(x).double()[:, :, :TOKENS] for x in zip(*map(past.read, range(LAYERS)), strict=True))
    return context, k, v


def queries(watch: Callable[[Any], None]) -> Tensor:
    """What every layer is asked, `[layers, Hkv, G, T, D]`."""
    found: dict[int, list[Tensor]] = {}

    def see(q: Tensor, kv: LayerKV) -> None:
        found.setdefault(kv.index, []).append(q[0].double())

    with torch.inference_mode():
        watch(see)
    all_rows = torch.stack([torch.cat(found[layer], 1) for layer in range(LAYERS)])
    return all_rows.view(LAYERS, HEADS, -1, *all_rows.shape[2:])


def scores(evictor: Evictor, context: Context) -> Tensor:
    with torch.inference_mode():
        return evictor.scores(context)


def causal(logits: Tensor, first: int) -> Tensor:
    """Logits `[..., T, N]` of rows that stand from `first` on."""
    rows, keys = logits.shape[-2:]
    later = torch.arange(keys) > (first + torch.arange(rows))[:, None]
    return logits.masked_fill(later, -torch.inf)


def close(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("group", [1, 3, 4])
def test_snap(group: int) -> None:
    context, k, _ = read(group)
    q = queries(lambda see: observe(context, TOKENS - 64, TOKENS, see))
    shares = causal(q @ k[:, :, None].mT * SIZE**-0.5, TOKENS - 64).softmax(-1)
    mean = shares.mean((2, 3))[..., : TOKENS - 64]
    padded = torch.nn.functional.pad(mean, (2, 2))
    want = torch.stack([padded[..., at : at + TOKENS - 64] for at in range(5)]).mean(0)
    found = scores(Snap(), context)
    close(found[..., :-64], want)
    assert bool(found[..., -64:].isposinf().all())


@pytest.mark.parametrize("group", [1, 3, 4])
def test_expected(group: int) -> None:
    context, k, v = read(group)
    q = queries(lambda see: observe(context, 4, TOKENS, see))
    freq = body(group).rotation.inv_freq.double()

    def turn(position: int) -> Tensor:
        """The rotation to a position, as a matrix for rows."""
        angle = position * freq
        cos, sin = angle.cos().diag(), angle.sin().diag()
        return torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)], 0)

    plain = torch.stack([q[..., row, :] @ turn(4 + row).T for row in range(TOKENS - 4)], -2)
    mean = plain.mean(-2)
    away = plain - mean[..., None, :]
    covariance = away.mT @ away / (TOKENS - 4)
    ahead = torch.stack([turn(TOKENS + step) for step in range(512)]).mean(0)
    mean, covariance, scale = mean @ ahead, ahead.T @ covariance @ ahead, SIZE**-0.5
    logits = scale * torch.einsum("lhgd,lhnd->lhgn", mean, k)
    logits = logits + scale**2 / 2 * torch.einsum("lhnd,lhgde,lhne->lhgn", k, covariance, k)
    want = logits.softmax(-1).mean(2) * v.norm(dim=-1)
    found = scores(Expected(), context)
    close(found[..., 4:], want[..., 4:])
    assert bool(found[..., :4].isposinf().all())


def test_expected_samples_long_texts() -> None:
    context, _, _ = read(3)
    with torch.inference_mode():
        some = Expected(rows=128).statistics(context)
    assert [one.count for one in some] == [128] * LAYERS
    q = queries(lambda see: [observe(context, at, at + 64, see) for at in (4, TOKENS - 64)])
    norms = q.square().sum((3, 4)).flatten(1)  # a rotation changes no norm
    for layer, one in enumerate(some):
        close(one.products.diagonal(dim1=1, dim2=2).sum(-1), norms[layer])


@pytest.mark.parametrize("group", [1, 3, 4])
def test_kvzip(group: int) -> None:
    context, k, _ = read(group)
    want = torch.zeros(LAYERS, HEADS, TOKENS, dtype=torch.float64)
    for start, end in ((0, 128), (128, 256), (256, 300)):
        fork = context.fork()
        fed = context.ids[max(0, start - 8) : end]
        q = queries(lambda see, fork=fork, fed=fed: show(fork, fed, see))
        past = Past.over(fork.table)
        own = torch.stack([past.read(layer)[0] for layer in range(LAYERS)]).double()
        among = torch.cat([k[:, :, start:end], own[:, :, TOKENS : TOKENS + len(fed)]], 2)
        logits = causal(q @ among[:, :, None].mT * SIZE**-0.5, end - start)
        want[..., start:end] = logits.softmax(-1)[..., : end - start].amax((2, 3))
    close(scores(KVZip(chunk=128), context), want)


def test_keydiff() -> None:
    context, k, _ = read(3)
    unit = k / k.norm(dim=-1, keepdim=True)
    mean = unit.mean(2, keepdim=True)
    close(scores(KeyDiff(), context), -(unit * mean).sum(-1) / mean.norm(dim=-1))


def test_lagkv() -> None:
    context, k, v = read(3)
    found = scores(LagKV(lag=64), context)
    assert bool(found[..., :4].isposinf().all()) and bool(found[..., 4 + 3 * 64 :].isposinf().all())
    for layer in range(LAYERS):
        for head in range(HEADS):
            for part in range(3):
                at, after = (slice(4 + 64 * i, 68 + 64 * i) for i in (part, part + 1))
                worth = torch.zeros(64, dtype=torch.float64)
                for x in (k[layer, head], v[layer, head]):
                    low, high = x[after].amin(0), x[after].amax(0)
                    worth += ((x[at] - low) / (high - low)).std(-1).softmax(-1)
                order = found[layer, head, at].argsort(descending=True)
                ranked = worth[order]
                assert bool((ranked[:-1] >= ranked[1:] - 1e-7).all())
                assert sorted(found[layer, head, at].tolist()) == list(range(-63, 1))


def test_a_text_too_short_for_partitions_stays_whole() -> None:
    context = engine(3).read(words(100))
    assert bool(scores(LagKV(lag=64), context).isposinf().all())


def test_leading_takes_the_first_of_equals_and_all_that_must_stay() -> None:
    given = torch.tensor([[1.0, 3.0, 3.0, 2.0], [torch.inf, 0.0, torch.inf, 5.0]])
    assert leading(given, 1).tolist() == [[False, True, False, False], [True, False, True, False]]
    assert leading(given, 0).tolist() == [[False] * 4, [True, False, True, False]]
    assert bool(leading(given, 9).all())


def test_heads_compete_beyond_their_safe_share() -> None:
    chance = torch.rand(LAYERS, HEADS, 400, generator=torch.Generator().manual_seed(1))
    chance[:, 1] *= 0.1  # a head that nothing would be left of
    kept = Snap(keep=0.25, safeguard=0.2).choose(chance).sum(-1)
    assert kept.sum(-1).tolist() == [200] * LAYERS
    assert kept[:, 1].tolist() == [20] * LAYERS
    even = Snap(keep=0.25, safeguard=1.0).choose(chance).sum(-1)
    assert even.tolist() == [[100, 100]] * LAYERS


def test_deeper_layers_keep_less_with_a_slope() -> None:
    chance = torch.rand(5, HEADS, 400, generator=torch.Generator().manual_seed(1))
    kept = Snap(keep=0.25, slope=0.8).choose(chance).sum((1, 2))
    assert kept.tolist() == [360, 280, 200, 120, 40]
    assert bool(Snap(keep=1.0, slope=0.8).choose(chance).all())


def test_kvzip_ranks_all_layers_and_heads_together() -> None:
    chance = torch.rand(LAYERS, HEADS, 100, generator=torch.Generator().manual_seed(2))
    chance[0, 0] = 0.0
    kept = KVZip(keep=0.5).choose(chance)
    assert int(kept.sum()) == 50 * LAYERS * HEADS and not bool(kept[0, 0].any())
