"""Native sparse attention: against the reference, and against dense attention where one gate is open."""

from __future__ import annotations

from typing import Any

import drawn
import pytest
import torch
from drawn_nsa import Problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentctx.kernels.records import KVPages

IMPLS = drawn.implementations("nsa_forward")


def only(problem: Problem, branch: int) -> None:
    problem.gates.zero_()[..., branch] = 1


def causal(problem: Problem, kv: KVPages) -> Tensor:
    """Dense attention of the last rows, by its definition."""
    rows, group = problem.q.shape[2], problem.q.shape[1] // kv.n_kv_heads
    k, v = (x.transpose(0, 1).flatten(1, 2).repeat_interleave(group, 0).double() for x in (kv.k, kv.v))
    scores = problem.q[0].double() @ k.transpose(1, 2) * problem.q.shape[3] ** -0.5
    position = problem.offset + torch.arange(rows)
    hidden = torch.arange(k.shape[1]) > position[:, None]
    out: Tensor = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    return out[None]


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    shape=st.fixed_dictionaries(
        {
            "batch": st.integers(1, 2),
            "kv_heads": st.integers(1, 2),
            "group": st.integers(1, 4),
            "rows": st.sampled_from((1, 5, 40)),
            "size": st.sampled_from((32, 80, 128)),
            "tokens": st.sampled_from((40, 64, 257, 600)),
            "dtype": st.sampled_from((torch.float32, torch.bfloat16)),
            "seed": st.integers(0, 999),
        }
    ),
    n_selected=st.sampled_from((3, 5, 16)),
    window=st.sampled_from((1, 70, 512)),
)
def test_agrees(impl: str, shape: dict[str, Any], n_selected: int, window: int) -> None:
    problem = Problem(**shape)
    options = {"n_selected": n_selected, "window": window}
    want, lists = problem.run(impl="reference", **options)
    got, chosen = problem.run(impl=impl, **options)
    assert got.dtype == problem.q.dtype and got.shape == problem.q.shape
    for one, other in zip(chosen, lists, strict=True):
        assert torch.equal(one, other)
    assert drawn.relative(got, want) <= drawn.RELATIVE[problem.q.dtype]


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_branch_of_everything_is_dense(impl: str, dtype: torch.dtype) -> None:
    problem = Problem(kv_heads=2, group=3, rows=70, size=64, tokens=300, dtype=dtype, seed=1)
    only(problem, 1)
    selected, _ = problem.run(impl=impl, n_selected=16)
    assert drawn.relative(selected, causal(problem, problem.slc)) <= drawn.RELATIVE[dtype]
    only(problem, 2)
    near, _ = problem.run(impl=impl, window=300)
    assert drawn.relative(near, causal(problem, problem.win)) <= drawn.RELATIVE[dtype]


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_decode_is_the_last_row(impl: str) -> None:
    problem = Problem(kv_heads=2, group=2, rows=40, tokens=500, seed=2)
    whole, lists = problem.run(impl=impl, n_selected=4, window=100)
    problem.q, problem.gates = problem.q[:, :, -1:], problem.gates[:, :, -1:]
    one, chosen = problem.run(impl=impl, n_selected=4, window=100, q_offset=499)
    assert drawn.relative(one, whole[:, :, -1:]) <= 1e-5
    assert torch.equal(chosen.blocks, lists.blocks[:, :, -1:])


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_what_is_selected(impl: str) -> None:
    """Block 0, the own and the one before; the fourth is where the compressed keys point."""
    problem = Problem(group=2, tokens=640, seed=3)
    k = problem.cmp[0]
    k.zero_()
    k[:, :, 5 * 4 + 1] = 20 * problem.q[:, :1, 0]  # a compressed block inside selection block 5
    problem.q[:, 1] = problem.q[:, 0]
    _, chosen = problem.run(impl=impl, n_selected=4)
    assert chosen.blocks.tolist() == [[[[0, 5, 8, 9]]]] and chosen.counts.tolist() == [[[4]]]
    k.zero_()
    _, chosen = problem.run(impl=impl, n_selected=5)
    # All equal: block 0 has one stride less, the own block too; ties go to the higher block.
    assert chosen.blocks.tolist() == [[[[0, 6, 7, 8, 9]]]]


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_rows_that_see_no_compressed_block(impl: str) -> None:
    problem = Problem(group=2, rows=40, tokens=40, seed=4)
    only(problem, 0)
    out, chosen = problem.run(impl=impl)
    assert not bool(out[:, :, :31].any()) and bool(out[:, :, 31:].any())
    assert bool((chosen.counts == 1).all())


def test_bad_arguments_are_named() -> None:
    problem = Problem(group=2, rows=3, tokens=200, seed=5)
    for options, message in (
        ({"slc_block": 32}, "slc_block is 32"),
        ({"cmp_stride": 24}, "cmp_stride is 24"),
        ({"n_selected": 2}, "n_selected is 2"),
        ({"window": 0}, "window is 0"),
        ({"q_offset": 300}, "slc has 4 pages a sequence: 303 tokens are due"),
    ):
        with pytest.raises(ValueError, match=message):
            problem.run(**options)
    problem.gates[0, 0, 1, 2] = torch.nan
    with pytest.raises(IndexError, match=r"gates\[0, 0, 1, 2\] is NaN"):
        problem.run()
    problem.gates = problem.gates[..., :2]
    with pytest.raises(ValueError, match="gates is"):
        problem.run()
    problem.cmp = (problem.cmp[0], problem.cmp[1][..., :16])
    with pytest.raises(ValueError, match=r"cmp\[1\] is"):
        problem.run()
