"""Native sparse attention in the interpreter: output and selection against the reference."""

from __future__ import annotations

from typing import Any

import triton_cases  # isort: skip  (before Triton)
import drawn
import pytest
import torch
from drawn_nsa import Problem

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"group": 2, "rows": 20, "size": 32, "tokens": 257}, {"n_selected": 4, "window": 70}),
        (
            {"batch": 2, "kv_heads": 2, "rows": 5, "size": 80, "tokens": 330, "dtype": BF16},
            {"n_selected": 3, "window": 1},
        ),
        ({"group": 3, "rows": 1, "size": 128, "tokens": 600, "dtype": BF16}, {"n_selected": 5}),
        (
            {"group": 1, "rows": 3, "size": 64, "tokens": 300, "dtype": BF16},
            {"cmp_block": 64, "cmp_stride": 16, "n_selected": 4, "window": 100},
        ),
    ],
)
def test_agrees(shape: dict[str, Any], options: dict[str, Any]) -> None:
    problem = Problem(**shape, seed=1)
    want, lists = problem.run(impl="reference", **options)
    for got, chosen in triton_cases.both_orders(lambda: problem.run(impl="triton", **options)):
        assert got.dtype == problem.q.dtype and got.shape == problem.q.shape
        for one, other in zip(chosen, lists, strict=True):
            assert torch.equal(one, other)
        assert drawn.relative(got, want) <= drawn.RELATIVE[problem.q.dtype]


def test_rows_that_see_no_compressed_block() -> None:
    problem = Problem(group=2, rows=40, tokens=40, dtype=BF16, seed=4)
    problem.gates.zero_()[..., 0] = 1
    for out, chosen in triton_cases.both_orders(lambda: problem.run(impl="triton")):
        assert not bool(out[:, :, :31].any()) and bool(out[:, :, 31:].any())
        assert bool((chosen.counts == 1).all())


def test_importance_of_equal_keys_and_ties() -> None:
    """All probabilities equal: block 0 and the own have fewer strides; ties go to the higher block."""
    problem = Problem(group=2, tokens=640, seed=3)
    problem.cmp[0].zero_()
    for _, chosen in triton_cases.both_orders(lambda: problem.run(impl="triton", n_selected=5)):
        assert chosen.blocks.tolist() == [[[[0, 6, 7, 8, 9]]]]
