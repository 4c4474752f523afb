"""A decode step as a CUDA graph: replayed on new contents it equals the same calls one by one."""

from __future__ import annotations

import drawn
import pytest
import torch

from agentctx.kernels.decode import dense_decode, sparse_decode
from agentctx.kernels.errors import KernelUnavailable
from agentctx.kernels.gpu.graph import captured
from agentctx.kernels.records import Attention, KVPages
from agentctx.kernels.selection import select_blocks
from agentctx.kernels.store import write_kv
from agentctx.kernels.summary import build_summary

ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(KernelUnavailable, match="no NVIDIA GPU"):
        captured(lambda: None)


class Step:
    """Write a token, score, select and attend, on tensors that stay where they are."""

    def __init__(self, case: drawn.Case, kind: str) -> None:
        kv = case.kv
        self.kv = KVPages(kv.k.cuda(), kv.v.cuda(), kv.page_tokens, kv.head_dim)
        self.table, self.lens, self.q = case.table.cuda(), case.lens.cuda(), case.q.cuda()
        self.at = self.lens - 1
        self.new = torch.ones(len(self.q), kv.n_kv_heads, 1, kv.head_dim, dtype=kv.k.dtype, device="cuda")
        self.summary = build_summary(self.kv, self.table, self.lens, kind)

    def __call__(self) -> tuple[Attention, Attention]:
        write_kv(self.kv, self.new, self.new, self.table, self.at, summary=self.summary, impl="triton")
        chosen = select_blocks(self.q, self.summary, self.table, self.lens, 4, impl="triton")
        sparse = sparse_decode(self.q, self.kv, chosen, self.lens, impl="triton")
        return sparse, dense_decode(self.q, self.kv, self.table, self.lens, impl="triton")

    def advance(self) -> None:
        self.q.normal_()
        self.new.normal_()
        self.lens += 1
        self.at += 1


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=ON_A_GPU) for kind in ("minmax", "mean")])
def test_a_replay_equals_the_calls(kind: str) -> None:
    case = drawn.make(batch=2, kv_heads=2, group=4, size=128, lens=[700, 130], dtype=torch.bfloat16)
    step = Step(case, kind)
    replay = captured(step)
    for _ in range(3):
        step.advance()
        got = [x.clone() for part in replay() for x in part]
        want = [x for part in step() for x in part]
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
        assert not bool(got[0].isnan().any())
