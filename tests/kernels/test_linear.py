"""Linear layers of 4 bits against the product in float64."""

from __future__ import annotations

import drawn
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from agentctx.kernels.linear import (
    Int4Weight,
    int4_linear,
    int8_linear,
    pack_int4,
    pack_int4_groups,
    pack_int8,
)
from agentctx.kernels.reference.linear import dequantised

IMPLEMENTATIONS = drawn.implementations("int4_linear")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(DTYPES),
    group=st.sampled_from((32, 64, 128, 256)),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    lead=st.sampled_from(((), (1,), (3,), (2, 0), (1, 1), (2, 9))),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_the_product_in_float64(impl, dtype, group, rows, groups, lead, strided, seed):
    weight = pack_int4(noise(16 * rows, group * groups, seed=seed), group=group)
    x = noise(*lead, group * groups * (2 if strided else 1), seed=seed + 1).to(dtype)
    x = x[..., ::2] if strided else x
    got = int4_linear(x, weight, impl=impl)
    want = int4_linear(x, weight, impl="reference")
    assert got.dtype == dtype and got.shape == (*lead, 16 * rows)
    assert drawn.relative(got, want) <= drawn.RELATIVE[torch.bfloat16]


@pytest.mark.parametrize("impl", drawn.implementations("int8_linear"))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(DTYPES),
    outs=st.integers(1, 40),
    width=st.integers(1, 200),
    lead=st.sampled_from(((), (1,), (3,), (2, 0), (1, 1), (2, 9))),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_eight_bits_agree_with_the_product_in_float64(impl, dtype, outs, width, lead, strided, seed):
    assume(dtype != torch.float16 or "cpp" not in impl)  # left to torch
    weight = pack_int8(noise(outs, width, seed=seed))
    x = noise(*lead, width * (2 if strided else 1), seed=seed + 1).to(dtype)
    x = x[..., ::2] if strided else x
    got, want = int8_linear(x, weight, impl=impl), int8_linear(x, weight, impl="reference")
    assert got.dtype == dtype and got.shape == (*lead, outs)
    allowed = 1e-5 if "cpp" in impl and dtype == torch.float32 else 2**-6  # torch works in bfloat16
    bound = (x.double().abs() @ weight.codes.double().abs().t()) * weight.scales.double()
    assert bool(((got.double() - want.double()).abs() <= allowed * bound + 1e-9).all())


def test_eight_bits_do_not_depend_on_threads_or_rows():
    weight, x = pack_int8(noise(3001, 577)), noise(5, 577, seed=1).to(torch.bfloat16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(int8_linear(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(group=st.sampled_from((32, 64)), seed=st.integers(0, 2**16))
def test_a_weight_is_at_most_half_a_step_away(group, seed):
    weight = noise(32, 4 * group, seed=seed) * 3 + 1
    weight[5] = 0.25  # a constant group has no step
    values = dequantised(pack_int4(weight, group=group))
    groups = weight.view(32, 4, group)
    step = (groups.amax(2) - groups.amin(2)) / 15
    far = (values - weight).abs().view(32, 4, group).amax(2)
    rounding = (8 * step + (groups.amin(2) + 8 * step).abs()) * 2**-8  # of scale and zero to bfloat16
    assert bool((far <= step / 2 + rounding + 1e-6).all())


def test_groups_of_a_file_lose_only_the_rounding_of_their_scales():
    codes = torch.randint(0, 16, (48, 96), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    scales, minima = noise(48, 3, seed=4), noise(48, 3, seed=5)

    def each(groups: torch.Tensor) -> torch.Tensor:
        return groups.double().repeat_interleave(32, 1)

    values = dequantised(pack_int4_groups(codes, scales, minima))
    bound = (8 * scales.abs() + (minima + 8 * scales).abs()) * 2**-8
    assert bool(((values - (codes * each(scales) + each(minima))).abs() <= each(bound)).all())
    short = scales.bfloat16().float()
    values = dequantised(pack_int4_groups(codes, short, -8 * short))
    assert torch.equal(values, (codes.double() - 8) * each(short)), "no minimum to round: exact"


W = noise(32, 64)
PACKED = pack_int4(W)
EIGHT = pack_int8(W)
CODES, GROUPS = torch.zeros(32, 64, dtype=torch.uint8), torch.zeros(32, 2)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: pack_int4(W[:20]), ValueError, r"weight is \[20, 64\]"),
        (lambda: pack_int4(W[:, :40]), ValueError, r"weight is \[32, 40\]"),
        (lambda: pack_int4(W[:0]), ValueError, r"weight is \[0, 64\]"),
        (lambda: pack_int4(W[0]), ValueError, r"weight is \[64\]"),
        (lambda: pack_int4(W.double()), ValueError, "weight is torch.float64"),
        (lambda: pack_int4(W, group=48), ValueError, "group is 48"),
        (lambda: pack_int4_groups(CODES.int(), GROUPS, GROUPS), ValueError, "codes is torch.int32"),
        (lambda: pack_int4_groups(CODES + 16, GROUPS, GROUPS), ValueError, "codes reach 16"),
        (lambda: pack_int4_groups(CODES, GROUPS[:3], GROUPS), ValueError, "scales"),
        (lambda: pack_int4_groups(CODES, GROUPS, GROUPS[:3]), ValueError, "minima"),
        (lambda: pack_int4_groups(CODES, torch.zeros(32, 4), torch.zeros(32, 4)), ValueError, "group is 16"),
        (lambda: int4_linear(torch.zeros(2, 32), PACKED), ValueError, r"x is \[2, 32\], weight \[32, 64\]"),
        (lambda: int4_linear(torch.zeros(()), PACKED), ValueError, r"x is \[\]"),
        (lambda: int4_linear(torch.zeros(2, 64).double(), PACKED), ValueError, "x is torch.float64"),
        (lambda: int4_linear(torch.zeros(2, 64), W), TypeError, "weight Tensor"),
        (lambda: int4_linear([1.0], PACKED), TypeError, "x is list"),
        (lambda: pack_int8(W[0]), ValueError, r"weight is \[64\]"),
        (lambda: int8_linear(torch.zeros(2, 32), EIGHT), ValueError, r"x is \[2, 32\], weight \[32, 64\]"),
        (lambda: int8_linear(torch.zeros(2, 64).double(), EIGHT), ValueError, "x is torch.float64"),
        (lambda: int8_linear(torch.zeros(2, 64), W), TypeError, "weight Tensor"),
    ],
)
def test_what_does_not_fit_is_named(call, error, named):
    with pytest.raises(error, match=named):
        call()


def test_the_record_holds_what_it_says():
    assert isinstance(PACKED, Int4Weight)
    assert PACKED.shape == (32, 64) and PACKED.group == 32
    assert PACKED.packed.dtype == torch.uint8 and PACKED.packed.numel() == 32 * 32
    assert PACKED.scales.shape == (2, 32, 2) and PACKED.scales.dtype == torch.bfloat16
