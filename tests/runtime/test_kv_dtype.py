"""Keys and values of 8 and 4 bits in memory: what is read is what the codes say, whatever reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_methods import SMALL, answer, body, near, stored, words

from agentctx.kernels.quant import dequantize_pages, quantize_pages
from agentctx.memory.errors import ConfigError, ModelError
from agentctx.memory.kv.dtype import KVDtype
from agentctx.memory.kv.past import Past
from agentctx.memory.kv.pool import KVShape, PagePool
from agentctx.memory.kv.quantised import LOCAL, QuantisedPool, pool_of
from agentctx.memory.kv.store import BlockStore
from agentctx.runtime.context import Context
from agentctx.runtime.engine import Engine
from agentctx.runtime.methods.table import method

SHAPE = KVShape(4, 2, 32, torch.float32)
BITS: tuple[KVDtype, ...] = ("int8", "int4")
MOST_OFF = {"int8": 0.05, "int4": 0.8}  # of logits that are a few units large


def engine(
    text: str = "dense", kv_dtype: KVDtype = "int8", *, chunk: int = 512, store: BlockStore | None = None
) -> Engine:
    return Engine(
        body(),
        fingerprint="small",
        memory_bytes=32 << 20,
        method=method(text),
        chunk=chunk,
        kv_dtype=kv_dtype,
        store=store,
    )


@pytest.mark.parametrize("kv_dtype", BITS)
def test_what_is_sealed_is_what_was_written_rounded(kv_dtype: KVDtype) -> None:
    plain, some = engine(kv_dtype="auto"), engine(kv_dtype=kv_dtype)
    text = words(700)
    exact, found = stored(plain.read(text)), stored(some.read(text))
    local = 700 // 64 * 64 - LOCAL * 64
    near(found[:, 0, :, local:], exact[:, 0, :, local:])  # the first layer does not depend on the others
    pages = exact[:, 0, :, :local].unflatten(2, (-1, 64)).transpose(1, 2).contiguous()
    codes = quantize_pages(pages[0], pages[1], 8 if kv_dtype == "int8" else 4)
    want = torch.stack(dequantize_pages(codes, torch.arange(len(pages[0])).int(), torch.float32))
    near(found[:, 0, :, :local], want.transpose(1, 2).flatten(2, 3))


@pytest.mark.parametrize("kv_dtype", BITS)
@pytest.mark.parametrize(
    "name", ["dense", "quest", "mean", "adamas", "streaming", "selfextend", "ladder", "flex"]
)
def test_methods_read_decoded_values(name: str, kv_dtype: KVDtype) -> None:
    """As the plain pool would, if it held them."""
    text = words(900)
    context = engine(SMALL[name], kv_dtype).read(text)
    held = context.fork()
    held.feed(words(3, 1))  # seals what is behind the local blocks
    held.crop(900)
    plain = engine(SMALL[name], "auto")
    twin = plain.read(text)
    for at, page in enumerate(twin.table.pages):
        plain.pool.write(page, *held.table.pool.read(held.table.pages[at], 64))
    twin.state.notes[0].crop(0)
    got, want = answer(held), answer(twin)
    assert got[0] == want[0]
    near(got[1], want[1])


@pytest.mark.parametrize("kv_dtype", BITS)
def test_answers_are_close_to_those_of_the_plain_pool(kv_dtype: KVDtype) -> None:
    text = words(900)
    got, want = (engine(kv_dtype=kind).read(text).feed(words(12, 1)) for kind in (kv_dtype, "auto"))
    assert got is not None and want is not None
    off = float((engine().logits(got) - engine().logits(want)).abs().max())
    assert 0 < off < MOST_OFF[kv_dtype]


def test_pieces_matter_little() -> None:
    """Rows of one pass see its own blocks before they are quantised, so a cut shows: that much, no more."""
    text = words(1100)
    found = [answer(engine(chunk=chunk).read(text), count=1)[1] for chunk in (128, 512)]
    assert float((found[0] - found[1]).abs().max()) < MOST_OFF["int8"]


def test_forks_are_separate_runs_and_crops_go_back() -> None:
    some = engine()
    parent = some.read(words(900))
    parent.feed(words(1, 5))
    before = stored(parent)
    forks = [answer(parent.fork(), words(9, seed)) for seed in (1, 2, 1)]
    assert forks[0][0] == forks[2][0] != forks[1][0]
    assert torch.equal(stored(parent), before)
    cropped = parent.fork()
    cropped.crop(200)  # into a sealed block, which is opened again
    cropped.feed(words(5, 3))
    assert torch.equal(stored(parent), before)
    near(stored(cropped)[:, :, :, :192], before[:, :, :, :192])


def test_a_batch_is_its_rows() -> None:
    texts = [words(count, count) for count in (700, 430, 90)]
    together, asked = engine(), torch.tensor([words(12, 9)] * 3)
    hidden = together.step([context.fork() for context in together.read_all(texts)], asked)
    for index, text in enumerate(texts):
        alone = engine().read(text).feed(words(12, 9))
        near(hidden[index, -1], alone)


@pytest.mark.parametrize("kv_dtype", BITS)
def test_readings_are_never_mixed_with_others(kv_dtype: KVDtype, tmp_path: Path) -> None:
    text = words(730)

    def read(kind: KVDtype) -> int:
        store = BlockStore(tmp_path, "small", budget=1 << 28)
        return engine(kv_dtype=kind, store=store).read(text, keep=True).computed

    assert [read(kv_dtype), read("auto"), read(kv_dtype), read("auto")] == [730, 730, 0, 0]
    assert engine(kv_dtype=kv_dtype).identity != engine(kv_dtype="auto").identity


@pytest.mark.parametrize(("kv_dtype", "times"), [("int8", 1.8), ("int4", 3.4)])
def test_more_tokens_in_the_same_bytes(kv_dtype: KVDtype, times: float) -> None:
    shape = KVShape(2, 2, 64, torch.bfloat16)
    plain, some = PagePool(shape, budget=32 << 20), pool_of(shape, budget=32 << 20, kv_dtype=kv_dtype)
    assert isinstance(some, QuantisedPool)
    assert some.capacity >= times * plain.capacity
    arrays = [some._k, some._v, *some._codes, *some._scales]
    assert 0.95 * some.budget < sum(array.nbytes for array in arrays) <= some.budget
    pages: list[int] = []
    while some.free_pages:
        pages += some.take(1)
        some.write(pages[-1], *torch.randn(2, 2, 2, 64, 64).bfloat16())
        some.filled(pages)
    assert len(pages) == some.capacity and some.used_bytes <= some.budget
    with pytest.raises(ModelError, match="has room for 0 more tokens"):
        some.take(1)
    some.release(pages)
    assert some.used_bytes == 0 and some.free_pages == len(some._slots)


def test_a_long_text_in_a_pool_that_could_not_hold_it_plainly() -> None:
    text, most = words(2000), 24 * SHAPE.page_bytes
    with pytest.raises(ModelError, match="KV memory"):
        Engine(body(), fingerprint="f", memory_bytes=most, chunk=128).read(text)
    small = Engine(body(), fingerprint="f", memory_bytes=most, chunk=128, kv_dtype="int4")
    context = small.read(text)
    assert len(answer(context)[0]) == 6
    assert small.pool.used_bytes <= most


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_dtype is 'bf16', the model computes in float32"):
        engine(kv_dtype="bf16")
    assert type(engine(kv_dtype="fp32").pool) is PagePool
    some = engine()
    past = Past.over(some.read(words(100)).table)
    with pytest.raises(ModelError, match="cannot be evicted, narrowed or composed"):
        past.read(0)


def test_a_block_that_was_cut_is_not_sealed_before_it_is_full_again() -> None:
    def cut(some: Engine) -> Context:
        context = some.read(words(192))
        some.prefixes.clear()  # else the block is shared, and a copy of it is written to
        context.crop(150)
        context.feed(words(1, 2))
        return context

    some, plain = engine(), engine(kv_dtype="auto")
    page, twin = cut(some).table.pages[2], cut(plain).table.pages[2]
    some.pool.take(some.pool.free_pages)  # seals whatever may be
    for got, want in zip(some.pool.read(page, 23), plain.pool.read(twin, 23), strict=True):
        near(got[0], want[0])
