"""Attention mass in the interpreter: against the reference, and sums that masses must have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton_cases  # isort: skip  (before Triton)
import drawn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentctx.kernels.gpu import mass as kernels
from agentctx.kernels.mass import attention_mass

BF16 = torch.bfloat16


def agree(case: drawn.Case, got: Tensor, want: Tensor) -> None:
    """Products of 16-bit numbers are exact; quantised keys are rounded once more."""
    assert got.dtype == torch.float32 and got.shape == want.shape
    allowed = (1e-2 if case.kv.quantised else 1e-5) * max(1, case.largest() / 10)
    assert drawn.relative(got, want) <= allowed


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    shape=st.fixed_dictionaries(
        {
            "kv_heads": st.integers(1, 2),
            "group": st.integers(1, 3),
            "rows": st.sampled_from((1, 5, 30)),
            "size": st.sampled_from((32, 80, 128)),
            "page": st.sampled_from((16, 64, 128)),
            "dtype": st.sampled_from((BF16, BF16, torch.float16)),
            "format": st.sampled_from(("paged", "paged", "int8", "int4")),
            "seed": st.integers(0, 2**16),
        }
    ),
    lens=st.lists(st.sampled_from((0, 1, 63, 128, 150)), min_size=1, max_size=2),
    softcap=st.sampled_from((0.0, 20.0)),
    per=st.sampled_from(("token", "block")),
    per_head=st.booleans(),
    given_lse=st.booleans(),
    placed=st.booleans(),
)
def test_agrees_with_the_reference(
    shape: dict[str, Any],
    lens: list[int],
    softcap: float,
    per: str,
    per_head: bool,
    given_lse: bool,
    placed: bool,
) -> None:
    case = drawn.make(batch=len(lens), lens=lens, **shape)
    batch, n_heads, rows, _ = case.q.shape
    options: dict[str, Any] = {"softcap": softcap, "per": per, "per_head": per_head}
    options["heads"] = torch.rand(n_heads, generator=case.generator).round(decimals=1)
    if placed:
        options["q_pos"] = torch.randint(-5, 150, (batch, rows), generator=case.generator, dtype=torch.int32)
    if given_lse:
        options["lse"] = 10 + case.q.float().norm(dim=-1)
        options["lse"][:, :, -1] = float("-inf")
    ask = (case.q, case.kv, case.table, case.lens)
    want = attention_mass(*ask, impl="reference", validate=True, **options)
    for got in triton_cases.both_orders(lambda: attention_mass(*ask, impl="triton", **options)):
        agree(case, got, want)


def test_masses_sum_to_their_weights_over_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits beyond the context, a row whose maximum is in the last one, float32."""
    case = drawn.make(kv_heads=1, group=2, rows=3, size=32, lens=[330], seed=8)
    case.q[:, :, 1] *= 20
    monkeypatch.setattr(kernels, "processors", lambda _: 4)
    heads = torch.tensor([0.25, 2.0])
    found = triton_cases.both_orders(
        lambda: attention_mass(
            case.q, case.kv, case.table, case.lens, heads=heads, per_head=True, impl="triton"
        )
    )
    assert torch.equal(*found)
    torch.testing.assert_close(found[0].sum(2), 3 * heads[None], rtol=1e-5, atol=1e-6)
    assert not bool(found[0][..., 330:].any())


def test_marked_pages_are_seen_by_every_row() -> None:
    case = drawn.make(kv_heads=1, group=2, rows=3, lens=[192], dtype=BF16, seed=5)
    valid = torch.full((case.kv.n_pages,), -1, dtype=torch.int32)
    valid[case.table[0, 2].long()], valid[case.table[0, 1].long()] = 60, 0
    ask = (case.q, replace(case.kv, page_valid=valid), case.table, case.lens)
    q_pos = torch.tensor([[0, 70, 191]], dtype=torch.int32)
    want = attention_mass(*ask, q_pos=q_pos, impl="reference")
    for got in triton_cases.both_orders(lambda: attention_mass(*ask, q_pos=q_pos, impl="triton")):
        agree(case, got, want)


def test_pages_outside_the_pool_are_caught() -> None:
    case = drawn.make(lens=[100], dtype=BF16)
    case.table[0, 1] = case.kv.n_pages + 40
    with triton_cases.fault("out-of-bounds load"):
        attention_mass(case.q, case.kv, case.table, case.lens, impl="triton")
