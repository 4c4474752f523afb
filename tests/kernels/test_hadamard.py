"""The Walsh-Hadamard rotation."""

from __future__ import annotations

import drawn
import pytest
import torch

from agentctx.kernels.errors import KernelUnavailable
from agentctx.kernels.hadamard import hadamard

IMPLEMENTATIONS = drawn.implementations("hadamard")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1,), (3, 2), (5, 16), (2, 3, 32), (0, 64), (7, 64), (2, 2, 128), (3, 256), (2, 512)]
)
def test_agrees_with_the_matrix(impl: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    cpp = impl.startswith("cpp") and (dtype == torch.float16 or not 16 <= shape[-1] <= 1024)
    if cpp or (impl == "triton" and not 16 <= shape[-1] <= 256):
        with pytest.raises(KernelUnavailable):
            hadamard(x, impl=impl)
        return
    got = hadamard(x, impl=impl)
    assert got.dtype == dtype and got.shape == x.shape
    assert drawn.relative(got, hadamard(x.double().float(), impl="reference")) <= drawn.RELATIVE[dtype]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 1e20])
def test_twice_is_nothing_and_dots_are_kept(impl: str, magnitude: float) -> None:
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(2)) * magnitude
    y = hadamard(x, impl=impl)
    assert drawn.relative(hadamard(y, impl=impl), x) <= 1e-6
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strides_do_not_matter(impl: str) -> None:
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(3)).T
    assert drawn.relative(hadamard(x, impl=impl), hadamard(x.contiguous(), impl="reference")) <= 1e-6


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard(torch.ones(2, 96))
    with pytest.raises(ValueError, match="power of two"):
        hadamard(torch.tensor(1.0))
    with pytest.raises(ValueError, match="x is torch.int64"):
        hadamard(torch.ones(4, dtype=torch.int64))
    with pytest.raises(TypeError, match="x is list"):
        hadamard([1.0, 2.0])  # type: ignore[arg-type]
