"""Public implementations to compare with; none is a dependency, what does not import is told in the results.

torch's fused attention (flash, cuDNN) and compiled flex_attention come with torch. `flashinfer`,
`sageattention` and `fla` are called where the method is the same; `hip-attn` and
`native-sparse-attention-pytorch` bring models of their own around their kernels and are only named.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import torch
from draw import PAGE, Sequences, Shapes
from measure import FAILURES, Bench, Call, reason
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from agentctx.kernels.records import BlockSelection

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
BLOCK_Q = 128


def imported(bench: Bench, module: str, row: str) -> Any | None:
    """The module, or None with the reason among the results."""
    if bench.dry:
        bench.skip(row, f"{module}: a dry run compares with nothing")
        return None
    try:
        return import_module(module)
    except FAILURES as error:
        bench.skip(row, reason(error))
        return None


def decode(bench: Bench, of: Shapes, data: Sequences, kv: list[tuple[Tensor, Tensor]]) -> dict[str, Call]:
    """Attention of one token to everything; the heads that share keys are rows of one, where that helps."""
    if bench.dry:
        return {}
    packed = [q.view(1, of.kv_heads, -1, of.size) for q in data.q]
    calls: dict[str, Call] = {}
    for name, backend in BACKENDS.items():

        def grouped(i: int, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(data.q[i], *kv[i], enable_gqa=True)

        def as_rows(i: int, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(packed[i], *kv[i])

        calls |= {f"sdpa {name}": grouped, f"sdpa {name} packed": as_rows}
    flex = torch.compile(flex_attention)
    calls["flex_attention"] = lambda i: flex(data.q[i], *kv[i], enable_gqa=True)
    return calls


def infer(bench: Bench, of: Shapes, data: Sequences, kv: list[tuple[Tensor, Tensor]]) -> dict[str, Call]:
    """flashinfer, which builds its kernel at the first call."""
    module = imported(bench, "flashinfer", "dense_decode against flashinfer")
    if module is None:
        return {}

    def attend(i: int) -> Any:
        k, v = kv[i]
        return module.single_decode_with_kv_cache(data.q[i][0, :, 0], k[0], v[0], kv_layout="HND")

    return {"flashinfer": attend}


def causal(bench: Bench, data: Sequences, kv: list[tuple[Tensor, Tensor]]) -> dict[str, Call]:
    """Causal attention to everything."""
    if bench.dry:
        return {}
    calls: dict[str, Call] = {}
    for name, backend in BACKENDS.items():

        def attend(i: int, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(data.q[i], *kv[i], is_causal=True, enable_gqa=True)

        calls[f"sdpa {name} causal"] = attend
    sage = imported(bench, "sageattention", "dense prefill against sageattention")
    if sage is not None:
        calls["sageattention causal"] = lambda i: sage.sageattn(
            data.q[i], *kv[i], tensor_layout="HND", is_causal=True
        )
    return calls


def blocks(
    bench: Bench, of: Shapes, data: Sequences, kv: list[tuple[Tensor, Tensor]], lists: BlockSelection
) -> dict[str, Call]:
    """Compiled flex_attention over the very blocks of `lists`, with the diagonal masked."""
    if bench.dry:
        return {}
    mask = block_mask(lists, of.q_heads // of.kv_heads, data.tables[0].shape[1])
    flex = torch.compile(flex_attention)
    # Its blocks of rows and keys must divide those of the mask.
    options = {"BLOCK_M": BLOCK_Q, "BLOCK_N": PAGE}

    def attend(i: int) -> Any:
        return flex(data.q[i], *kv[i], block_mask=mask, enable_gqa=True, kernel_options=options)

    return {"flex_attention blocks": attend}


def block_mask(lists: BlockSelection, group: int, n_blocks: int) -> BlockMask:
    """Listed blocks whole, the two of the diagonal causal; one list for each query head."""
    listed, counts = (x.repeat_interleave(group, 1) for x in (lists.blocks, lists.counts))
    full = torch.nn.functional.pad(listed, (0, n_blocks - listed.shape[-1])).contiguous()
    starts = torch.arange(counts.shape[2], device=counts.device, dtype=torch.int32) * (BLOCK_Q // PAGE)
    steps = torch.arange(n_blocks, device=counts.device, dtype=torch.int32)
    diagonal = (starts[:, None] + steps).clamp_max(n_blocks - 1).expand(*counts.shape, -1).contiguous()
    partial = torch.full_like(counts, BLOCK_Q // PAGE)
    # What only the backward pass needs would be made dense.
    known = inspect.signature(BlockMask.from_kv_blocks).parameters
    forward = {"compute_q_blocks": False} if "compute_q_blocks" in known else {}
    return BlockMask.from_kv_blocks(
        partial,
        diagonal,
        counts.contiguous(),
        full,
        BLOCK_SIZE=(BLOCK_Q, PAGE),
        mask_mod=lambda b, h, row, key: row >= key,
        **forward,
    )


def nsa(bench: Bench, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, window: int) -> dict[str, Call]:
    """flash-linear-attention: q `[1, Hq, T, D]`, k and v `[1, Hkv, T, D]`, gates `[1, Hq, T, 3]`."""
    module = imported(bench, "fla.ops.nsa", "NSA against flash-linear-attention")
    if module is None:
        return {}
    rows, keys, vals = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    compressed, selected, near = (g.contiguous() for g in gates.transpose(1, 2).unbind(-1))

    def whole(i: int) -> Any:
        return module.parallel_nsa(
            rows, keys, vals, compressed, selected, near, block_counts=16, block_size=PAGE, window_size=window
        )

    def without_window(i: int) -> Any:
        return module.parallel_nsa(
            rows, keys, vals, compressed, selected, None, block_counts=16, block_size=PAGE
        )

    return {"fla": whole, "fla without window": without_window}


def named(bench: Bench) -> None:
    """Peers whose kernels are not called by themselves."""
    for module, row in (
        ("hip_attn", "hip-attn"),
        ("native_sparse_attention_pytorch", "native-sparse-attention-pytorch"),
    ):
        if imported(bench, module, row) is not None:
            bench.skip(row, f"{module} is here, but brings a model of its own around its kernels")
