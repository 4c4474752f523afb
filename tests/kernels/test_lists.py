"""Lists completed with sinks and the local window: exact in every implementation."""

from __future__ import annotations

from typing import Any

import drawn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentctx.kernels.lists import complete_lists

IMPLS = drawn.implementations("complete_lists")


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 300), st.integers(0, 6)),
    block_q=st.sampled_from((1, 64, 128, 100)),
    page=st.sampled_from((16, 64)),
    added=st.tuples(st.integers(0, 3), st.integers(0, 4)),
    offset=st.sampled_from((0, 1, -1, -200, 77, 640, 5000)),
    seed=st.integers(0, 999),
)
def test_agrees(
    impl: str,
    shape: tuple[int, int, int, int],
    block_q: int,
    page: int,
    added: tuple[int, int],
    offset: int,
    seed: int,
) -> None:
    batch, heads, rows, slots = shape
    generator = torch.Generator().manual_seed(seed)
    lists = (batch, heads, -(-rows // block_q))
    # In any order, with repeats, some at the diagonal or above it.
    blocks = torch.randint(0, 12, (*lists, slots), generator=generator, dtype=torch.int32)
    counts = torch.randint(0, slots + 1, lists, generator=generator, dtype=torch.int32)
    blocks.masked_fill_(torch.arange(slots) >= counts[..., None], drawn.UNUSED)
    q_offset = offset + 70 * torch.arange(batch, dtype=torch.int32)
    options: dict[str, Any] = {
        "block_q": block_q,
        "page_tokens": page,
        "sink_blocks": added[0],
        "local_blocks": added[1],
    }
    want = complete_lists(blocks, counts, q_offset, rows, **options, impl="reference", validate=True)
    got = complete_lists(blocks, counts, q_offset, rows, **options, impl=impl, validate=True)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == torch.int32 and torch.equal(one, other)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_an_example(impl: str) -> None:
    blocks = torch.tensor([[[[0, 5, 9], [1, 9, -1]]]], dtype=torch.int32)
    counts = torch.tensor([[[3, 2]]], dtype=torch.int32)
    full, held = complete_lists(blocks, counts, 8 * 64 + 5, 200, block_q=128, page_tokens=64, impl=impl)
    assert held.tolist() == [[[4, 4]]]  # d is 8, then 10
    assert full.tolist() == [[[[0, 5, 6, 7, 0, 0], [0, 1, 8, 9, 0, 0]]]]


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_strided_lists(impl: str) -> None:
    blocks = torch.tensor([1, 3, 5], dtype=torch.int32).expand(2, 2, 1, 3)
    counts = torch.tensor(3, dtype=torch.int32).expand(2, 2, 1)
    full, held = complete_lists(blocks, counts, 640, 64, block_q=64, page_tokens=64, impl=impl)
    assert full.tolist() == [[[[0, 1, 3, 5, 8, 9]]] * 2] * 2 and held.tolist() == [[[6]] * 2] * 2


def test_bad_arguments_are_named() -> None:
    blocks, counts = torch.zeros(1, 1, 2, 3, dtype=torch.int32), torch.zeros(1, 1, 2, dtype=torch.int32)
    options: dict[str, Any] = {"block_q": 64, "page_tokens": 64}
    with pytest.raises(ValueError, match="blocks is torch.int64"):
        complete_lists(blocks.long(), counts, 0, 128, **options)
    with pytest.raises(ValueError, match="blocks is"):
        complete_lists(blocks[0], counts, 0, 128, **options)
    with pytest.raises(ValueError, match="counts is"):
        complete_lists(blocks, counts[..., :1], 0, 128, **options)
    with pytest.raises(ValueError, match="blocks has 2 query blocks: 3 for T = 129"):
        complete_lists(blocks, counts, 0, 129, **options)
    with pytest.raises(ValueError, match="sink_blocks is -1"):
        complete_lists(blocks, counts, 0, 128, **options, sink_blocks=-1)
    with pytest.raises(ValueError, match="block_q is 0"):
        complete_lists(blocks, counts, 0, 128, block_q=0, page_tokens=64)
    with pytest.raises(TypeError, match="q_offset is NoneType"):
        complete_lists(blocks, counts, None, 128, **options)  # type: ignore[arg-type]
    with pytest.raises(IndexError, match=r"counts\[0, 0, 1\] is 4: 0 to 3"):
        complete_lists(blocks, torch.tensor([[[0, 4]]], dtype=torch.int32), 0, 128, **options, validate=True)


@pytest.mark.parametrize("impl", [name for name in IMPLS if name.startswith("cpp")])
def test_a_count_beyond_the_list_never_crashes(impl: str) -> None:
    blocks, counts = torch.zeros(1, 1, 1, 3, dtype=torch.int32), torch.full((1, 1, 1), 9, dtype=torch.int32)
    with pytest.raises(IndexError, match="counts holds 9"):
        complete_lists(blocks, counts, 0, 64, block_q=64, page_tokens=64, impl=impl)
