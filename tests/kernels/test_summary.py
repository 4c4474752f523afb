"""Summaries: every implementation against the reference, and what a summary must be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import drawn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentctx.kernels.errors import KernelUnavailable
from agentctx.kernels.fallback.summary import gathered
from agentctx.kernels.hadamard import hadamard
from agentctx.kernels.records import BlockSummary, KVPages
from agentctx.kernels.summary import KINDS, build_summary

IMPLEMENTATIONS = drawn.implementations("build_summary")
FORMATS = ("paged", "packed", "int8", "int4")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def covered(impl: str, kv: KVPages, kind: str = "mean") -> bool:
    """Whether `impl` serves the pool, by its own documentation."""
    if impl == "triton":
        most = 128 if kind == "hadamard2" and kv.k.dtype != torch.bfloat16 else 256
        return kv.format != "packed" and kv.head_dim <= most
    multiple = 32 if kv.format == "int4" else 16
    served = kv.page_tokens == 64 and kv.k.dtype != torch.float16 and kv.head_dim % multiple == 0
    return served or not impl.startswith("cpp")


def by_channel(data: Tensor) -> Tensor:
    """Extremes in the layout of the CPU, whatever their own; other kinds as they are."""
    return data.permute(0, 1, 3, 4, 2).flatten(2, 3).float() if data.dim() == 5 else data


def keys(case: drawn.Case) -> Tensor:
    """Float32 keys `[B, NB, Hkv, page, D]` as the pool holds them: of quantised pages the decoded ones."""
    return gathered(case.kv, case.table, "k")


def assert_codes(got: Tensor, want: Tensor, case: drawn.Case, thresholds: Tensor) -> None:
    """Codes are equal wherever the rotated key is not within rounding of a threshold."""
    rotated = hadamard(keys(case), impl="reference").transpose(1, 2).flatten(2, 3)
    t = thresholds.view(1, -1, 1, 1)
    slack = 1e-5 * case.kv.k.float().abs().where(case.kv.k.float().abs() < drawn.STALE, 0).max() + 1e-5 * t
    if case.kv.quantised:
        slack = slack + 1e-5 * rotated.abs()
    near = torch.stack([(rotated - edge).abs() <= slack for edge in (-t, torch.zeros_like(t), t)]).any(0)

    def split(codes: Tensor) -> Tensor:
        codes = codes[:, :, : near.shape[2]]
        return torch.cat([(codes >> shift) & 3 for shift in (0, 2, 4, 6)], -1)

    assert torch.equal(split(got).where(~near, 0), split(want).where(~near, 0))
    beyond = torch.arange(got.shape[2]) >= case.lens[:, None]
    assert not bool(got.where(beyond[:, None, :, None], 0).any())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(case=drawn.cases(formats=FORMATS), first=st.integers(0, 3))
def test_agrees_with_the_reference(impl: str, kind: str, case: drawn.Case, first: int) -> None:
    first = min(first, case.table.shape[1])
    if kind == "hadamard2" and case.kv.head_dim & (case.kv.head_dim - 1):
        with pytest.raises(ValueError, match="power of two"):
            build_summary(case.kv, case.table, case.lens, kind)
        return
    if not covered(impl, case.kv, kind):
        with pytest.raises(KernelUnavailable):
            build_summary(case.kv, case.table, case.lens, kind, impl=impl)
        return
    ask = (case.kv, case.table, case.lens, kind)
    want = build_summary(*ask, first_block=first, impl="reference", validate=True)
    got = build_summary(*ask, first_block=first, impl=impl, validate=True)
    assert got.data.is_contiguous() and got.page_tokens == case.kv.page_tokens
    found = by_channel(got.data)
    assert found.dtype == want.data.dtype and found.shape == want.data.shape
    if kind == "hadamard2":
        assert got.scale is not None and want.scale is not None
        torch.testing.assert_close(got.scale, want.scale, rtol=1e-5, atol=1e-12)
        again = build_summary(*ask, thresholds=want.scale, impl="reference")
        got = build_summary(*ask, thresholds=want.scale, impl=impl)
        assert got.scale is want.scale
        assert_codes(got.data, again.data, case, want.scale)
    elif kind == "minmax":
        assert torch.equal(found, want.data)
    else:
        assert drawn.relative(found, want.data) <= TOLERANCE[want.data.dtype]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(case=drawn.cases(sizes=(32, 64), formats=("paged", "packed", "int8")), steps=st.data())
def test_growing_equals_building_at_once(
    impl: str, kind: str, case: drawn.Case, steps: st.DataObject
) -> None:
    """A summary that grew with its context is bit for bit the one of the whole context."""
    if not covered(impl, case.kv, kind):
        return
    thresholds = torch.full((case.kv.n_kv_heads,), 0.9) if kind == "hadamard2" else None
    whole = build_summary(case.kv, case.table, case.lens, kind, thresholds=thresholds, impl=impl)
    part = torch.tensor([steps.draw(st.integers(0, n)) for n in case.lens.tolist()], dtype=torch.int32)
    grown = build_summary(case.kv, case.table, part, kind, thresholds=thresholds, impl=impl)
    first = int(part.min()) // case.kv.page_tokens
    again = build_summary(case.kv, case.table, case.lens, kind, first_block=first, out=grown, impl=impl)
    assert again is grown
    assert torch.equal(again.data, whole.data)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_bound_every_key(impl: str, format: str, dtype: torch.dtype) -> None:
    case = drawn.make(batch=2, kv_heads=2, lens=[130, 64], dtype=dtype, format=format, seed=3)
    if not covered(impl, case.kv):
        pytest.skip("packed pages are the CPU's")
    found = by_channel(build_summary(case.kv, case.table, case.lens, "minmax", impl=impl).data)
    for b, length in enumerate(case.lens.tolist()):
        for i in range(-(-length // 64)):
            k = keys(case)[b, i, :, : length - 64 * i]  # [Hkv, n, D]
            high, low = found[b, :, :, i].split(64, 1)
            assert torch.equal(high, k.amax(1)) and torch.equal(low, k.amin(1))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("page", [16, 64, 128])
def test_submeans_are_means_of_32_keys_every_16(impl: str, page: int) -> None:
    case = drawn.make(lens=[page + 9], page=page, size=32)
    if not covered(impl, case.kv):
        pytest.skip("C++ serves pages of 64")
    found = build_summary(case.kv, case.table, case.lens, "submeans", impl=impl).data
    for w in range(-(-(page + 9) // 16)):
        want = case.k[0, 0, 16 * w : min(16 * w + 32, page + 9)].mean(0)
        torch.testing.assert_close(found[0, 0, w], want)
    assert not bool(found[0, 0, w + 1 :].any())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_marked_pages_hold_what_they_say(impl: str, kind: str) -> None:
    case = drawn.make(kv_heads=2, lens=[180], size=32, seed=5)
    valid = torch.full((case.kv.n_pages,), -1, dtype=torch.int32)
    valid[case.table[0, 0].long()], valid[case.table[0, 1].long()] = 20, 0
    ask = (replace(case.kv, page_valid=valid), case.table, case.lens, kind)
    thresholds = torch.tensor([0.5, 1.0]) if kind == "hadamard2" else None
    want = build_summary(*ask, thresholds=thresholds, impl="reference").data
    got = build_summary(*ask, thresholds=thresholds, impl=impl).data
    assert drawn.relative(by_channel(got), want) <= 1e-5


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strided_pools_and_tables(impl: str) -> None:
    k, v = torch.randn(2, 3, 192, 64)
    kv = KVPages.over(k, v)
    table = torch.tensor([[0, 9, 1, 9, 2, 9]], dtype=torch.int32)[:, ::2]
    lens = torch.tensor([190, 0], dtype=torch.int32)[::2]
    for kind in KINDS:
        thresholds = torch.ones(3) if kind == "hadamard2" else None
        want = build_summary(kv, table, lens, kind, thresholds=thresholds, impl="reference").data
        got = build_summary(kv, table, lens, kind, thresholds=thresholds, impl=impl).data
        assert drawn.relative(by_channel(got), want) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_an_outgrown_summary_is_copied(kind: str) -> None:
    case = drawn.make(lens=[70 * 16], page=16, size=32)
    small = build_summary(case.kv, case.table[:, :30], torch.tensor([480], dtype=torch.int32), kind)
    before = small.data.clone()
    grown = build_summary(case.kv, case.table, case.lens, kind, first_block=29, out=small)
    whole = build_summary(case.kv, case.table, case.lens, kind, thresholds=small.scale)
    assert grown is not small and torch.equal(small.data, before)
    assert torch.equal(grown.data, whole.data) and grown.scale is small.scale


def test_thresholds_are_kept_once_made() -> None:
    case = drawn.make(kv_heads=2, lens=[200], size=64)
    made = build_summary(case.kv, case.table, case.lens, "hadamard2")
    assert made.scale is not None
    rotated = hadamard(case.k[0, :, :200])
    torch.testing.assert_close(made.scale, 0.98 * rotated.std((1, 2), correction=0))
    again = build_summary(case.kv, case.table, case.lens, "hadamard2", first_block=2, out=made)
    assert again is made
    other = build_summary(case.kv, case.table, case.lens, "hadamard2", out=made, thresholds=torch.ones(2))
    assert other.data is made.data and other.scale is not made.scale


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("impl", [name for name in IMPLEMENTATIONS if name != "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_change_results(
    impl: str, kind: str, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentctx.kernels.threads.worth", lambda *_: torch.get_num_threads())
    case = drawn.make(batch=2, kv_heads=2, lens=[64 * 40 + 3, 700], size=64, format="packed")
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(build_summary(case.kv, case.table, case.lens, kind, impl=impl))
    assert torch.equal(found[0].data, found[1].data)
    assert kind != "hadamard2" or torch.equal(found[0].scale, found[1].scale)


def test_bad_arguments_are_named() -> None:
    case = drawn.make(kv_heads=2, lens=[100], size=64)
    ask = (case.kv, case.table, case.lens)
    made = build_summary(*ask, "mean")
    with pytest.raises(ValueError, match="kind is 'median'"):
        build_summary(*ask, "median")
    with pytest.raises(ValueError, match="first_block is 9"):
        build_summary(*ask, "mean", first_block=9)
    with pytest.raises(ValueError, match="out is mean"):
        build_summary(*ask, "vmax", out=made)
    with pytest.raises(ValueError, match="out.data"):
        build_summary(
            *ask, "mean", out=replace(made, data=made.data.transpose(2, 3).contiguous().transpose(2, 3))
        )
    with pytest.raises(ValueError, match="thresholds belong to hadamard2"):
        build_summary(*ask, "mean", thresholds=torch.ones(2))
    with pytest.raises(ValueError, match="thresholds is torch.float32"):
        build_summary(*ask, "hadamard2", thresholds=torch.ones(3))
    with pytest.raises(ValueError, match="block_table is torch.int64"):
        build_summary(case.kv, case.table.long(), case.lens, "mean")
    with pytest.raises(TypeError, match="kv is Tensor"):
        build_summary(case.k, case.table, case.lens, "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out is mean"):
        build_summary(*ask, "mean", out=BlockSummary("mean", made.data, 16))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_contents_raise(impl: str, kind: str) -> None:
    case = drawn.make(lens=[100], size=64)
    wrong = case.table.clone()
    wrong[0, 1] = 999
    with pytest.raises(IndexError):  # a GPU is asked with `validate` only: the kernel would read the page
        build_summary(case.kv, wrong, case.lens, kind, impl=impl, validate=impl == "triton")
    for lens in (torch.tensor([1000], dtype=torch.int32), torch.tensor([-1], dtype=torch.int32)):
        with pytest.raises(IndexError, match="context_lens"):
            build_summary(case.kv, case.table, lens, kind, impl=impl, validate=True)
    if impl.startswith("cpp"):
        wrong[0, 1] = -1
        with pytest.raises(IndexError, match="block_table names page -1"):
            build_summary(case.kv, wrong, case.lens, kind, impl=impl)
