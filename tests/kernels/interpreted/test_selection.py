"""Selection in the interpreter: the very lists of the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scores import summary_of
from test_selection import scored
from triton_cases import both_orders

from agentctx.kernels.selection import resolve_pages, select_blocks, topk_blocks, topp_blocks

OPTIONS = {"sink_blocks": st.integers(0, 3), "local_blocks": st.integers(0, 3)}


@settings(max_examples=8, deadline=None, derandomize=True)
@given(case=scored(), k=st.sampled_from((1, 3, 40)), options=st.fixed_dictionaries(OPTIONS))
def test_top_k(case, k, options) -> None:
    if not case[0].numel():
        return
    want = topk_blocks(*case, k, impl="reference", **options)
    for got in both_orders(lambda: topk_blocks(*case, k, impl="triton", **options)):
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@settings(max_examples=6, deadline=None, derandomize=True)
@given(case=scored(), p=st.sampled_from((1e-6, 0.5, 0.9, 1.0)), k_min=st.integers(0, 6))
def test_top_p(case, p, k_min) -> None:
    if not case[0].numel():
        return
    want = topp_blocks(*case, p, k_min=k_min, k_max=k_min + 8, impl="reference")
    for got in both_orders(lambda: topp_blocks(*case, p, k_min=k_min, k_max=k_min + 8, impl="triton")):
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("kind", ["minmax on a GPU", "submeans"])
def test_select_is_score_rank_and_resolve(kind: str) -> None:
    of = summary_of(kind, batch=2, kv_heads=2, capacity=8, generator=torch.Generator().manual_seed(0))
    q = torch.randn(2, 6, 2, 64, generator=torch.Generator().manual_seed(1))
    lens = torch.tensor([500, 65], dtype=torch.int32)
    table = torch.randperm(16, generator=torch.Generator().manual_seed(2)).view(2, 8).int()
    want = select_blocks(q, of, table, lens, 4, impl="reference")
    for got in both_orders(lambda: select_blocks(q, of, table, lens, 4, impl="triton")):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for got in both_orders(lambda: resolve_pages(want.blocks, want.counts, table, impl="triton")):
        assert torch.equal(got.pages, want.pages)
