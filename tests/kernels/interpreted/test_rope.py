"""Rotary positions in the interpreter, near position one million as well."""

from __future__ import annotations

import drawn
import pytest
import torch
from test_rope import TOLERANCE, frequencies
from triton_cases import both_orders

from agentctx.kernels.rope import rope, rope_move


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize(("rotary", "inverse"), [(50, False), (24, True)])
def test_turning_and_moving(dtype: torch.dtype, style: str, rotary: int, inverse: bool) -> None:
    generator = torch.Generator().manual_seed(rotary)
    x = torch.randn(2, 9, 3, 50, generator=generator).to(dtype).transpose(1, 2)
    at = torch.randint(0, 1_000_000, (2, 9), generator=generator)
    frequency, options = frequencies(rotary), {"style": style, "rotary_dim": rotary}
    turn = options | {"inverse": inverse, "attention_scaling": 1.3}
    want = rope(x, at, frequency, impl="reference", **turn)
    for got in both_orders(lambda: rope(x, at, frequency, impl="triton", **turn)):
        assert drawn.relative(got, want) <= TOLERANCE[dtype]
        assert torch.equal(got[..., rotary:], x[..., rotary:])
    want = rope_move(x, at, at[0], frequency, impl="reference", **options)
    for got in both_orders(lambda: rope_move(x, at, at[0], frequency, impl="triton", **options)):
        assert drawn.relative(got, want) <= TOLERANCE[dtype]
