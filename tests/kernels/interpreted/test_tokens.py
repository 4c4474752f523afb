"""Attention to single tokens and to summary keys in Triton's interpreter, in two program orders."""

from __future__ import annotations

from typing import Any

import drawn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_cases import both_orders, fault

from agentctx.kernels.errors import KernelUnavailable
from agentctx.kernels.tokens import pseudo_attention, token_decode

few = settings(max_examples=8, deadline=None, derandomize=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def listed(case: drawn.Case, slots: int) -> tuple[Tensor, Tensor]:
    """Random tokens of each sequence for each KV head, ragged; unused slots are hostile."""
    batch, heads, page = len(case.lens), case.kv.n_kv_heads, case.kv.page_tokens
    tokens = torch.full((batch, heads, slots), drawn.UNUSED, dtype=torch.int32)
    counts = torch.zeros(batch, heads, dtype=torch.int32)
    for b, length in enumerate(case.lens.tolist()):
        for h in range(heads):
            position = torch.randperm(length, generator=case.generator)[: slots - h]
            tokens[b, h, : len(position)] = case.table[b, position // page] * page + position % page
            counts[b, h] = len(position)
    return tokens, counts


@few
@given(data=st.data())
def test_tokens_agree(data: Any) -> None:
    draw = data.draw
    case = draw(drawn.cases(dtypes=DTYPES, formats=("paged",), sizes=(32, 64, 80, 256), max_tokens=150))
    tokens, counts = listed(case, draw(st.sampled_from((3, 64, 130))))
    options = {"softcap": draw(st.sampled_from((0.0, 5.0))), "scale": draw(st.sampled_from((None, 0.05)))}
    call: tuple[Any, ...] = (case.q, case.kv, tokens, counts)
    want = token_decode(*call, impl="reference", out_dtype=torch.float32, **options)
    for got in both_orders(lambda: token_decode(*call, impl="triton", validate=True, **options)):
        drawn.assert_close(got, want, case.q.dtype, largest=case.largest())


def keys(
    *, seed: int = 0, heads: int = 2, group: int = 3, rows: int = 2, slots: int = 100, size: int = 64,
    dtype: torch.dtype = torch.float32, magnitude: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v and log weights, a third of them -inf."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q = noise(2, heads * group, rows, size) * magnitude
    k, v = noise(2, heads, slots, size) * magnitude, noise(2, heads, slots, size)
    weight = noise(2, heads, slots) * 3
    weight[torch.rand(weight.shape, generator=generator) < 0.3] = -torch.inf
    return q.to(dtype), k.to(dtype), v.to(dtype), weight


@few
@given(data=st.data())
def test_pseudo_keys_agree(data: Any) -> None:
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    given = keys(
        seed=draw(st.integers(0, 1000)),
        heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 8)),
        rows=draw(st.integers(1, 4)),
        slots=draw(st.sampled_from((1, 63, 64, 65, 150))),
        size=draw(st.sampled_from((16, 64, 80, 256))),
        dtype=dtype,
        magnitude=draw(st.sampled_from((1e-10, 1.0, 8.0))),
    )
    if draw(st.booleans()):
        given[3][0] = -torch.inf
    options = {"softcap": draw(st.sampled_from((0.0, 5.0, 50.0)))}
    want = pseudo_attention(*given, impl="reference", out_dtype=torch.float32, **options)
    largest = float(given[0].float().norm(dim=-1).amax() * given[1].float().norm(dim=-1).amax())
    largest *= given[0].shape[3] ** -0.5
    for got in both_orders(lambda: pseudo_attention(*given, impl="triton", **options)):
        drawn.assert_close(got, want, dtype, largest=largest)


def test_long_lists_are_split() -> None:
    given = keys(slots=1500, heads=1, group=2, rows=1, dtype=torch.bfloat16)
    want = pseudo_attention(*given, impl="reference", out_dtype=torch.float32)
    for got in both_orders(lambda: pseudo_attention(*given, impl="triton")):
        drawn.assert_close(got, want, torch.bfloat16)


def test_strides_do_not_matter() -> None:
    q, k, v, weight = keys()
    k2, v2 = torch.stack([k, v], 3).unbind(3)
    q2 = q.transpose(1, 2).contiguous().transpose(1, 2)
    weight2 = weight.mT.contiguous().mT
    want = pseudo_attention(q, k, v, weight, impl="reference")
    for got in both_orders(lambda: pseudo_attention(q2, k2, v2, weight2, impl="triton")):
        drawn.assert_close(got, want, torch.float32)


@pytest.mark.parametrize("token", (-70, 2**31 - 1))
def test_a_token_outside_the_pool_is_caught(token: int) -> None:
    case = drawn.make(lens=[130], kv_heads=2)
    tokens, counts = listed(case, 40)
    tokens[0, 1, 2] = token
    with fault("out-of-bounds load"):
        token_decode(case.q, case.kv, tokens, counts, impl="triton")


def test_what_is_left_to_torch() -> None:
    for case in (drawn.make(lens=[70], format="int8"), drawn.make(lens=[70], size=40)):
        with pytest.raises(KernelUnavailable, match="int8|head size"):
            token_decode(case.q, case.kv, *listed(case, 9), impl="triton")
