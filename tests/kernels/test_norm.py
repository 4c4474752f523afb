"""The norm against its definition in float64."""

from __future__ import annotations

from typing import Any

import drawn
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentctx.kernels.norm import rms_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEADS = ((), (1,), (3,), (2, 0), (1, 1), (2, 9), (300,))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("impl", drawn.implementations("rms_norm"))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(DTYPES),
    size=st.integers(1, 200),
    lead=st.sampled_from(LEADS),
    magnitude=st.sampled_from((0.0, 1e-3, 1.0, 300.0)),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_norm_is_as_defined(impl, dtype, size, lead, magnitude, strided, seed):
    assume(dtype != torch.float16 or "cpp" not in impl)  # left to torch
    x = (noise(*lead, 2 * size if strided else size, seed=seed) * magnitude).to(dtype)
    x = x[..., ::2] if strided else x
    weight = noise(size, seed=seed + 1).to(dtype)
    got = rms_norm(x, weight, eps=1e-5, impl=impl)
    want = rms_norm(x, weight, eps=1e-5, impl="reference")
    assert got.dtype == dtype and got.shape == x.shape
    close(got, want, 2 if impl == "torch" else 1)  # torch rounds before the weight as well


@pytest.mark.parametrize("impl", drawn.implementations("rms_norm"))
def test_what_is_not_finite_is_not_hidden(impl):
    norm = rms_norm(torch.tensor([[1.0, torch.nan], [torch.inf, 1.0]]), torch.ones(2), impl=impl)
    assert bool(norm[0].isnan().all() and norm[1, 0].isnan()) and norm[1, 1] == 0


def close(got: Tensor, want: Tensor, roundings: int) -> None:
    """Within so many roundings of each element."""
    unit = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[got.dtype]
    allowed = roundings * 1.01 * unit * want.double().abs() + 1e-7
    assert bool(((got.double() - want.double()).abs() <= allowed + unit * want.double().abs()).all())


X = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: rms_norm([1.0], X[0]), TypeError, "x is list"),
        (lambda: rms_norm(X, None), TypeError, "weight NoneType"),
        (lambda: rms_norm(X, torch.ones(3)), ValueError, "weight is"),
        (lambda: rms_norm(X, torch.ones(4).bfloat16()), ValueError, "weight is"),
        (lambda: rms_norm(X, X[0], eps=-1.0), ValueError, "eps is"),
        (lambda: rms_norm(X.int(), X[0].int()), ValueError, "x is"),
        (lambda: rms_norm(torch.tensor(1.0), X[0]), ValueError, "x is"),
        (lambda: rms_norm(X[:, :0], X[0, :0]), ValueError, "x is"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, kind: type[Exception], words: str):
    with pytest.raises(kind, match=words):
        call()
