"""Attention mass: every implementation against the reference, and the sums that masses must have."""

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
from agentctx.kernels.mass import attention_mass, span_sums
from agentctx.kernels.records import KVPages

IMPLEMENTATIONS = drawn.implementations("attention_mass")
QUANTISED = 6e-3


def covered(impl: str, case: drawn.Case) -> bool:
    if impl == "triton":
        return case.kv.format != "packed"
    tiles = case.kv.page_tokens == 64 and case.q.shape[3] % (32 if case.kv.format == "int4" else 16) == 0
    return (tiles and case.q.dtype != torch.float16) or not impl.startswith("cpp")


def assert_mass(got: Tensor, want: Tensor, case: drawn.Case, scale: float | None) -> None:
    """Within 1e-5, more where scores are large: an error of a score is one of the exponent."""
    assert got.dtype == torch.float32 and got.shape == want.shape
    allowed = (QUANTISED if case.kv.quantised else 1e-5) * max(1, case.largest(scale) / 10)
    assert drawn.relative(got, want) <= allowed


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    case=drawn.cases(max_rows=9, formats=("paged", "packed", "int8", "int4")),
    softcap=st.sampled_from([0.0, 0.0, 5.0, 50.0]),
    per=st.sampled_from(["token", "block"]),
    per_head=st.booleans(),
    weighed=st.booleans(),
    placed=st.booleans(),
    given_lse=st.booleans(),
)
def test_agrees_with_the_reference(
    impl: str,
    case: drawn.Case,
    softcap: float,
    per: str,
    per_head: bool,
    weighed: bool,
    placed: bool,
    given_lse: bool,
) -> None:
    batch, n_heads, rows, _ = case.q.shape
    options: dict[str, object] = {"softcap": softcap, "per": per, "per_head": per_head}
    if weighed:
        heads = torch.rand(n_heads, generator=case.generator)
        options["heads"] = heads.where(torch.rand(n_heads, generator=case.generator) < 0.6, 0)
    if placed:
        options["q_pos"] = torch.randint(-5, 310, (batch, rows), generator=case.generator, dtype=torch.int32)
    if given_lse:
        lse = 10 * torch.ones(batch, n_heads, rows) + case.q.float().norm(dim=-1) * 30
        lse[:, :, -1] = float("-inf")
        options["lse"] = lse
    ask = (case.q, case.kv, case.table, case.lens)
    if not covered(impl, case):
        with pytest.raises(KernelUnavailable):
            attention_mass(*ask, impl=impl, **options)  # type: ignore[arg-type]
        return
    want = attention_mass(*ask, impl="reference", validate=True, **options)  # type: ignore[arg-type]
    got = attention_mass(*ask, impl=impl, validate=True, **options)  # type: ignore[arg-type]
    assert_mass(got, want, case, None)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(case=drawn.cases(max_rows=9, sizes=(32, 64, 128), formats=("paged", "packed", "int8")))
def test_masses_sum_to_the_weights_of_their_rows(impl: str, case: drawn.Case) -> None:
    if not covered(impl, case):
        return
    heads = torch.rand(case.q.shape[1], generator=case.generator)
    mass = attention_mass(case.q, case.kv, case.table, case.lens, heads=heads, per_head=True, impl=impl)
    positions = case.lens[:, None] - case.q.shape[2] + torch.arange(case.q.shape[2])
    seeing = ((positions >= 0) & (case.lens > 0)[:, None]).sum(1)  # rows that see a key
    torch.testing.assert_close(mass.sum(2), heads * seeing[:, None].float(), rtol=1e-5, atol=1e-6)
    whole = attention_mass(case.q, case.kv, case.table, case.lens, heads=heads, impl=impl)
    torch.testing.assert_close(whole, mass.sum(1), rtol=1e-5, atol=1e-6)
    blocks = attention_mass(case.q, case.kv, case.table, case.lens, heads=heads, per="block", impl=impl)
    torch.testing.assert_close(
        blocks, whole.unflatten(1, (-1, case.kv.page_tokens)).sum(2), rtol=1e-5, atol=1e-6
    )
    beyond = torch.arange(whole.shape[1]) >= case.lens[:, None]
    assert not bool(whole[beyond].any())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_context_and_many_rows(impl: str, dtype: torch.dtype) -> None:
    """Several chunks of blocks, several groups of rows, a maximum that grows and shrinks on the way."""
    format = "paged" if impl == "triton" else "packed"
    case = drawn.make(kv_heads=2, group=3, rows=11, lens=[64 * 70 + 5], dtype=dtype, format=format, seed=8)
    case.q[:, :, 3] *= 20
    want = attention_mass(case.q, case.kv, case.table, case.lens, impl="reference")
    got = attention_mass(case.q, case.kv, case.table, case.lens, impl=impl)
    assert drawn.relative(got, want) <= 5e-5


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("magnitude", [1e-20, 1e4])
def test_huge_and_tiny_magnitudes(impl: str, magnitude: float) -> None:
    case = drawn.make(rows=3, lens=[200])
    q = case.q * magnitude
    want = attention_mass(q, case.kv, case.table, case.lens, impl="reference")
    got = attention_mass(q, case.kv, case.table, case.lens, impl=impl)
    assert drawn.relative(got, want) <= 1e-5 * max(1, magnitude / 10)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_marked_pages_are_seen_by_every_row(impl: str) -> None:
    case = drawn.make(kv_heads=2, group=2, rows=3, lens=[192], seed=5)
    valid = torch.full((case.kv.n_pages,), -1, dtype=torch.int32)
    valid[case.table[0, 2].long()], valid[case.table[0, 1].long()] = 60, 0
    ask = (case.q, replace(case.kv, page_valid=valid), case.table, case.lens)
    q_pos = torch.tensor([[0, 70, 191]], dtype=torch.int32)
    want = attention_mass(*ask, q_pos=q_pos, impl="reference")
    assert bool(want[0, 128:188].all()) and not bool(want[0, 64:128].any())
    assert drawn.relative(attention_mass(*ask, q_pos=q_pos, impl=impl), want) <= 1e-5


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strided_arguments(impl: str) -> None:
    draw = torch.Generator().manual_seed(9)
    kv = KVPages.over(torch.randn(2, 192, 64, generator=draw), torch.randn(2, 192, 64, generator=draw))
    q = torch.randn(1, 3, 4, 64, generator=draw).transpose(1, 2)  # [1, 4, 3, 64]
    table = torch.tensor([[0, 9, 1, 9, 2, 9]], dtype=torch.int32)[:, ::2]
    heads = torch.rand(8, generator=draw)[::2]
    lse = 3 + torch.rand(1, 3, 4, generator=draw).transpose(1, 2)
    lens = torch.tensor([190], dtype=torch.int32)
    want = attention_mass(q, kv, table, lens, heads=heads, lse=lse, impl="reference")
    assert drawn.relative(attention_mass(q, kv, table, lens, heads=heads, lse=lse, impl=impl), want) <= 1e-5


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("impl", [name for name in IMPLEMENTATIONS if name.startswith("cpp")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_results(
    impl: str, dtype: torch.dtype, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentctx.kernels.threads.worth", lambda *_: torch.get_num_threads())
    case = drawn.make(
        batch=2, kv_heads=2, group=2, rows=5, lens=[64 * 40 + 3, 700], dtype=dtype, format="packed"
    )
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(attention_mass(case.q, case.kv, case.table, case.lens, impl=impl))
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_span_sums(impl: str) -> None:
    mass = torch.rand(3, 205, generator=torch.Generator().manual_seed(1))[:, ::2]
    spans = torch.tensor([[0, 103], [5, 5], [100, 103], [7, 60], [102, 103]], dtype=torch.int32)
    got = span_sums(mass, spans, impl=impl, validate=True)
    want = span_sums(mass, spans, impl="reference")
    assert got.shape == (3, 5) and not bool(got[:, 1].any())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[:, 0], mass.sum(1), rtol=1e-5, atol=0)
    assert span_sums(mass, spans[:0], impl=impl).shape == (3, 0)
    for wrong in ([0, 104], [5, 4], [-1, 4]):
        with pytest.raises(IndexError, match=r"spans\[0\]"):
            span_sums(mass, torch.tensor([wrong], dtype=torch.int32), impl=impl, validate=True)
        if impl.startswith("cpp"):
            with pytest.raises(IndexError, match=r"spans\[0\]"):
                span_sums(mass, torch.tensor([wrong], dtype=torch.int32), impl=impl)


def test_bad_arguments_are_named() -> None:
    case = drawn.make(kv_heads=2, group=2, rows=2, lens=[100])
    ask = (case.q, case.kv, case.table, case.lens)
    with pytest.raises(ValueError, match="per is 'page'"):
        attention_mass(*ask, per="page")
    with pytest.raises(ValueError, match="heads is"):
        attention_mass(*ask, heads=torch.ones(3))
    with pytest.raises(ValueError, match="lse is"):
        attention_mass(*ask, lse=torch.zeros(1, 4, 2, dtype=torch.float64))
    with pytest.raises(IndexError, match="lse"):
        attention_mass(*ask, lse=torch.full((1, 4, 2), float("nan")), validate=True)
    with pytest.raises(ValueError, match="q_pos is"):
        attention_mass(*ask, q_pos=torch.zeros(1, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="softcap"):
        attention_mass(*ask, softcap=-1.0)
    with pytest.raises(ValueError, match="q is torch.bfloat16"):
        attention_mass(case.q.bfloat16(), *ask[1:])
    with pytest.raises(ValueError, match="mass is torch.float64"):
        span_sums(torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="spans is"):
        span_sums(torch.zeros(1, 4), torch.zeros(1, 3, dtype=torch.int32))


# On a GPU only `validate` looks at contents.
@pytest.mark.parametrize("impl", [name for name in IMPLEMENTATIONS if name != "triton"])
def test_bad_contents_raise(impl: str) -> None:
    case = drawn.make(lens=[100])
    wrong = case.table.clone()
    wrong[0, 1] = 999
    with pytest.raises(IndexError):
        attention_mass(case.q, case.kv, wrong, case.lens, impl=impl)
    with pytest.raises(IndexError, match="context_lens"):
        attention_mass(case.q, case.kv, case.table, case.lens * 100, impl=impl, validate=True)
