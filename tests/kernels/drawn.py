"""Random cases for the kernels' tests: shapes from Hypothesis, contents from a seed, pools that are hostile.

Pages lie shuffled in a pool with unused pages between; unused slots and page tails hold 1e4 (finite, as the
contract says); unused list slots hold -999999. Every implementation is compared with the float64 reference on
the same rounded inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from agentctx.kernels.choose import unavailable
from agentctx.kernels.records import Attention, BlockSelection, KVPages

STALE = 1e4
UNUSED = -999999
RELATIVE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def implementations(operation: str) -> list[str]:
    """Those that run here: torch, every level of the C++ build that this machine has, and Triton.

    Without a GPU Triton's tests are collected and skipped (`conftest.py`).
    """
    from agentctx.kernels.cpu import build

    names = ["torch", *(f"cpp:{level}" for level in build.LEVELS), "triton"]
    return [name for name in names if unavailable(operation, name) in (None, "no NVIDIA GPU")]


@dataclass(repr=False)
class Case:
    """One random problem: queries, the keys and values in order, and the pool that holds them."""

    q: Tensor  # [B, Hq, T, D]
    k: Tensor  # [B, Hkv, N, D], N a multiple of the page, stale beyond lens
    v: Tensor
    kv: KVPages
    table: Tensor  # [B, NB]
    lens: Tensor  # [B]
    generator: torch.Generator

    def __repr__(self) -> str:
        kv = self.kv
        pages = f"{kv.format} pages of {kv.page_tokens}, {kv.n_kv_heads} heads"
        return f"Case(q {self.q.dtype} {list(self.q.shape)}, lens {self.lens.tolist()}, {pages})"

    @property
    def tail(self) -> tuple[Tensor, Tensor]:
        """K and V of the block that is not full, `[B, Hkv, page, D]` each."""
        page = self.kv.page_tokens
        at = [slice(int(n) // page * page, int(n) // page * page + page) for n in self.lens]
        return (
            torch.stack([x[:, here] for x, here in zip(self.k, at, strict=True)]),
            torch.stack([x[:, here] for x, here in zip(self.v, at, strict=True)]),
        )

    @property
    def blocks(self) -> Tensor:
        """Blocks in use, [B]."""
        return ((self.lens + self.kv.page_tokens - 1) // self.kv.page_tokens).to(torch.int32)

    def largest(self, scale: float | None = None) -> float:
        """The largest scaled product of the norms of a query and a key.

        A float32 score is right to some units in the last place of this, however small the score itself is.
        """
        k = self.k.where(self.k.abs() < STALE, 0).float()
        norms = float(self.q.float().norm(dim=-1).amax()) * float(k.norm(dim=-1).amax())
        return norms * (scale or self.q.shape[3] ** -0.5)

    def selection(self, *, heads: int | None = None, density: float = 0.5) -> BlockSelection:
        """A random ragged list for each head, ascending; `density` 0 is empty, 1 is every block in use."""
        heads = heads or self.kv.n_kv_heads
        batch, slots = self.table.shape
        lead = (batch, heads)
        pages = torch.full((*lead, slots), UNUSED, dtype=torch.int32)
        blocks, counts = pages.clone(), torch.zeros(lead, dtype=torch.int32)
        for b in range(batch):
            for h in range(heads):
                keep = torch.rand(int(self.blocks[b]), generator=self.generator) < density
                ids = keep.nonzero()[:, 0]
                blocks[b, h, : len(ids)] = ids.int()
                pages[b, h, : len(ids)] = self.table[b, ids]
                counts[b, h] = len(ids)
        return BlockSelection(pages, blocks, counts)


def make(
    *,
    batch: int = 1,
    kv_heads: int = 1,
    group: int = 1,
    rows: int = 1,
    size: int = 64,
    page: int = 64,
    lens: list[int],
    dtype: torch.dtype = torch.float32,
    format: str = "paged",
    magnitude: float = 1.0,
    seed: int = 0,
) -> Case:
    """Build a case. int8 and int4 pools hold quantised keys; the case's k and v are the originals."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    blocks = max(1, -(-max(lens) // page)) + 1
    q = (noise(batch, group * kv_heads, rows, size) * magnitude).to(dtype)
    k = (noise(batch, kv_heads, blocks * page, size) * magnitude).to(dtype)
    v = noise(batch, kv_heads, blocks * page, size).to(dtype)
    for b, length in enumerate(lens):
        k[b, :, length:] = STALE
        v[b, :, length:] = STALE
    n_pages = batch * blocks + 3
    table = torch.randperm(n_pages, generator=generator)[: batch * blocks].view(batch, blocks).to(torch.int32)
    pool_k = torch.full((n_pages, kv_heads, page, size), STALE, dtype=dtype)
    pool_v = pool_k.clone()
    for b in range(batch):
        pool_k[table[b].long()] = k[b].view(kv_heads, blocks, page, size).transpose(0, 1)
        pool_v[table[b].long()] = v[b].view(kv_heads, blocks, page, size).transpose(0, 1)
    kv = KVPages(pool_k, pool_v, page, size)
    if format == "packed":
        from agentctx.kernels.store import pack_pages

        kv = pack_pages(kv)
    elif format != "paged":
        from agentctx.kernels.quant import quantize_pages

        # Stale tokens must not set the scales, or the real ones would all be 0; they get the largest code.
        stale = pool_k == STALE
        kv = quantize_pages(
            pool_k.masked_fill(stale, 0), pool_v.masked_fill(stale, 0), 8 if format == "int8" else 4
        )
        top = 127 if format == "int8" else 0x77
        unused = stale[..., : kv.k.shape[3]]
        kv.k[unused] = top
        kv.v[unused.transpose(2, 3)] = top
    return Case(q, k, v, kv, table, torch.tensor(lens, dtype=torch.int32), generator)


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
    formats: tuple[str, ...] = ("paged", "packed"),
    sizes: tuple[int, ...] = (32, 64, 80, 96, 128, 256),
    max_rows: int = 4,
    max_tokens: int = 300,
    magnitudes: tuple[float, ...] = (1.0, 1e-3, 8.0),
) -> Case:
    """B 1-3, Hkv 1-3, G 1-8, T 1-4, contexts from no token over exact multiples of a page and one more."""
    format = draw(st.sampled_from(formats))
    page = 64 if format == "packed" else draw(st.sampled_from((16, 64)))
    batch = draw(st.integers(1, 3))
    length = st.one_of(
        st.integers(0, max_tokens),
        st.sampled_from((1, page - 1, page, page + 1, 2 * page, 4 * page + 1)),
    )
    return make(
        batch=batch,
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 8)),
        rows=draw(st.integers(1, max_rows)),
        size=draw(st.sampled_from(sizes)),
        page=page,
        lens=draw(st.lists(length, min_size=batch, max_size=batch)),
        dtype=draw(st.sampled_from(dtypes)),
        format=format,
        magnitude=draw(st.sampled_from(magnitudes)),
        seed=draw(st.integers(0, 2**16)),
    )


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialised is NaN: an element that nobody writes shows."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """`count` threads, and calls that take them however small they are."""
    from agentctx.kernels import threads as cost

    was, worth = torch.get_num_threads(), cost.worth
    torch.set_num_threads(count)
    cost.worth = lambda bytes_read, flop: count
    try:
        yield
    finally:
        cost.worth = worth
        torch.set_num_threads(was)


def relative(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius distance; NaN anywhere is infinitely far."""
    got, want = got.double(), want.double()
    if bool(got.isnan().any()):
        return float("inf")
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def assert_close(
    got: Attention, want: Attention, dtype: torch.dtype, *, quantised: bool = False, largest: float = 0.0
) -> None:
    """`got` agrees with the float64 reference `want` within the tolerance of `dtype`; lse as well.

    Quantised keys may be rounded to bfloat16 once more when they are widened. `largest` (`Case.largest`): the
    rounding of float32 scores is one of the exponents of the weights, so `out` and `lse` inherit it.
    """
    rounding = min(1e-7 * largest, 1e-4)
    relative_allowed = (RELATIVE[torch.bfloat16] if quantised else RELATIVE[dtype]) + rounding
    assert got.out.shape == want.out.shape and got.lse.shape == want.lse.shape
    assert got.lse.dtype == torch.float32
    seen = ~want.lse.isinf()
    assert torch.equal(~got.lse.isinf(), seen), "rows that see no key differ"
    assert not bool(got.out[~seen].any()), "a row that sees no key must be 0"
    if bool(seen.any()):
        far = relative(got.out[seen], want.out[seen])
        assert far <= relative_allowed, f"out is {far:.2e} away, {relative_allowed:.0e} is allowed"
        error = (got.lse[seen].double() - want.lse[seen].double()).abs()
        per_unit = float((error / want.lse[seen].double().abs().clamp_min(1)).max())
        allowed = (1e-3 if quantised else 1e-5 if dtype == torch.float32 else 1e-4) + rounding
        assert per_unit <= allowed, f"lse is {per_unit:.2e} away, {allowed:.0e} is allowed"
