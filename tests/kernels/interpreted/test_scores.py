"""Block scores in the interpreter, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from test_scores import assert_scores, summary_of
from triton_cases import both_orders

from agentctx.kernels.scores import block_scores, pool_queries

CASES = [
    ("minmax on a GPU", torch.bfloat16, 3, 1, {}),
    ("minmax on a GPU", torch.float32, 2, 2, {"group": "sum", "scale": -1.0}),
    ("mean", torch.float16, 4, 1, {"group": "mean"}),
    ("mean", torch.bfloat16, 1, 3, {"per_head": True}),
    ("submeans", torch.bfloat16, 3, 2, {}),
    ("hadamard2", torch.bfloat16, 2, 1, {}),
    ("hadamard2", torch.float32, 3, 2, {"estimate": "manhattan"}),
]


@pytest.mark.parametrize(("kind", "dtype", "group", "rows", "options"), CASES)
@pytest.mark.parametrize("lengths", [[100, 1], [0, 256]])
def test_scores(kind, dtype, group, rows, options, lengths) -> None:
    generator = torch.Generator().manual_seed(rows)
    size, page = (32, 16) if kind == "hadamard2" else (80, 64)
    capacity = 16 if page == 16 else 4
    shape = {"batch": 2, "kv_heads": 1, "size": size, "page": page, "capacity": capacity}
    of = summary_of(kind, dtype=dtype, generator=generator, **shape)
    q = torch.randn(2, rows, group, size, generator=generator).to(dtype).transpose(1, 2)
    lens = torch.tensor(lengths, dtype=torch.int32)
    positions = torch.randint(-2, 120, (2, rows), generator=generator).int() if rows == 2 else None
    want = block_scores(q, of, lens, q_pos=positions, impl="reference", **options)
    for got in both_orders(lambda: block_scores(q, of, lens, q_pos=positions, impl="triton", **options)):
        assert_scores(got, want, options.get("estimate") == "manhattan")


def test_a_nan_query_is_not_hidden() -> None:
    q = torch.randn(1, 3, 1, 64, generator=torch.Generator().manual_seed(1))
    q[0, 1, 0, 5] = float("nan")
    of, lens = summary_of("minmax on a GPU", capacity=4), torch.tensor([100], dtype=torch.int32)
    for got in both_orders(lambda: block_scores(q, of, lens, impl="triton")):
        assert bool(got[0, 0, 0, :2].isnan().all())


def test_pooled_queries_are_means() -> None:
    q = torch.randn(1, 2, 37, 50, generator=torch.Generator().manual_seed(2))
    want = pool_queries(q, 16, impl="reference")
    for got in both_orders(lambda: pool_queries(q, 16, impl="triton")):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
