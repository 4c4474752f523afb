"""Argument checks. Each names the argument, what came and what was wanted; none looks at the contents of a
tensor, so none waits for a GPU. What `validate=True` checks of the contents is in `validate.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentctx.kernels.records import BlockSelection, KVPages

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def tensor(name: str, value: object, dims: int) -> None:
    """Raise TypeError unless `value` is a tensor, ValueError unless it has `dims` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}: a tensor is needed")
    if value.dim() != dims:
        raise ValueError(f"{name} is {list(value.shape)}: {dims} dimensions are needed")


def floats(name: str, value: Tensor) -> None:
    if value.dtype not in FLOATS:
        raise ValueError(f"{name} is {value.dtype}: bfloat16, float16 or float32 is needed")


def ints(name: str, value: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise ValueError unless `value` is int32 of `shape` (-1: any size) on `device`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}: an int32 tensor is needed")
    if value.dtype != torch.int32:
        raise ValueError(f"{name} is {value.dtype}: int32 is needed, {name}.to(torch.int32)")
    came = value.shape
    if came != shape and (  # the exact shape, the common case, costs one comparison
        len(came) != len(shape) or any(want not in (-1, got) for want, got in zip(shape, came, strict=True))
    ):
        raise ValueError(f"{name} is {list(came)}: {list(shape)} is needed (-1 is any size)")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, not on {device}: move it")


def queries(q: Tensor, kv: KVPages) -> tuple[int, int, int]:
    """Check q `[B, Hq, T, D]` against the pool, and the pool itself. Return B, Hq, T."""
    tensor("q", q, 4)
    floats("q", q)
    batch, heads, rows, size = q.shape
    if size and q.stride(-1) != 1:
        raise ValueError(f"q has stride {q.stride(-1)} in its last dimension: 1 is needed, q.contiguous()")
    pages(kv)
    if size != kv.head_dim:
        raise ValueError(f"q has head size {size}, kv {kv.head_dim}: they must be equal")
    if heads == 0 or heads % kv.n_kv_heads:
        raise ValueError(f"q has {heads} heads: a multiple of kv's {kv.n_kv_heads} is needed")
    if kv.k.device != q.device:
        raise ValueError(f"kv is on {kv.k.device}, q on {q.device}: move one of them")
    if not kv.quantised and kv.k.dtype != q.dtype:
        raise ValueError(f"q is {q.dtype}, kv {kv.k.dtype}: they must be equal, or kv quantised")
    return batch, heads, rows


def pages(kv: KVPages) -> None:
    """Check that the tensors of a pool are those of its format."""
    if not isinstance(kv, KVPages):
        raise TypeError(f"kv is {type(kv).__name__}: KVPages is needed")
    page, size, lead, device = kv.page_tokens, kv.head_dim, kv.k.shape[:2], kv.k.device
    if lead[1:] < (1,):
        raise ValueError(f"kv.k is {list(kv.k.shape)}: pages and at least one head are needed")
    wanted: tuple[tuple[int, ...], tuple[int, ...]]
    if kv.format == "packed":
        wanted = ((page * size,), (page * size,))
    elif kv.format == "paged":
        wanted = ((page, size), (page, size))
    elif kv.format in ("int8", "int4"):
        width = size if kv.format == "int8" else size // 2
        wanted = ((page, width), (width, page))
    else:
        raise ValueError(f"kv has format {kv.format!r}: paged, packed, int8 or int4 is needed")
    for name, x, shape in (("k", kv.k, wanted[0]), ("v", kv.v, wanted[1])):
        if x.shape != lead + shape:
            raise ValueError(f"kv.{name} is {list(x.shape)}: {[*lead, *shape]} is needed for {kv.format}")
        # Strides are compared first: looking at a page of its own costs microseconds.
        dense = (1,) if len(shape) == 1 else (shape[1], 1)
        if x.stride()[2:] != dense and x.numel() and not x[0, 0].is_contiguous():
            raise ValueError(f"kv.{name} has strides {x.stride()}: a page of a head must be contiguous")
    if (kv.format in ("int8", "int4")) != (kv.k_scale is not None and kv.v_scale is not None):
        raise ValueError(f"kv.k_scale and kv.v_scale belong to int8 and int4 pages, kv is {kv.format}")
    for name, scale in (("k_scale", kv.k_scale), ("v_scale", kv.v_scale)):
        if scale is not None and (scale.dtype != torch.bfloat16 or scale.shape != (*lead, size)):
            raise ValueError(
                f"kv.{name} is {scale.dtype} {list(scale.shape)}: bfloat16 {[*lead, size]} is needed"
            )
    if kv.page_valid is not None:
        ints("kv.page_valid", kv.page_valid, (lead[0],), device)


def attention_options(scale: float | None, softcap: float, out_dtype: torch.dtype | None, q: Tensor) -> float:
    """Check the options common to attention; return the scale."""
    if softcap < 0:
        raise ValueError(f"softcap is {softcap}: 0 (none) or a positive number is needed")
    if out_dtype is not None and out_dtype not in FLOATS:
        raise ValueError(f"out_dtype is {out_dtype}: bfloat16, float16 or float32 is needed")
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def window_options(first_pos: Tensor | None, sink_tokens: int, batch: int, device: torch.device) -> None:
    if first_pos is not None:
        ints("first_pos", first_pos, (batch,), device)
    if sink_tokens < 0:
        raise ValueError(f"sink_tokens is {sink_tokens}: 0 or more is needed")


def selection(chosen: BlockSelection, lead: tuple[int, ...], heads: tuple[int, int], q: Tensor) -> None:
    """Check a selection `[B, H, (M,) S]`: H one of `heads` (Hkv, Hq); `lead` is (B,) or (B, M)."""
    if not isinstance(chosen, BlockSelection):
        raise TypeError(f"selection is {type(chosen).__name__}: BlockSelection is needed")
    batch, rest = lead[0], lead[1:]
    own = chosen.pages.shape[1] if chosen.pages.dim() > 1 else -1
    if own not in heads:
        raise ValueError(f"selection.pages is {list(chosen.pages.shape)}: {heads[0]} or {heads[1]} heads")
    slots = chosen.pages.shape[-1]
    ints("selection.pages", chosen.pages, (batch, own, *rest, slots), q.device)
    ints("selection.blocks", chosen.blocks, (batch, own, *rest, slots), q.device)
    ints("selection.counts", chosen.counts, (batch, own, *rest), q.device)


def tail(value: tuple[Tensor, Tensor] | None, kv: KVPages, q: Tensor) -> None:
    """Check the open page's 16- or 32-bit K and V, `[B, Hkv, page_tokens, D]` each, in the dtype of q."""
    if value is None:
        return
    shape = (q.shape[0], kv.n_kv_heads, kv.page_tokens, kv.head_dim)
    for name, x in zip(("tail[0]", "tail[1]"), value, strict=True):
        tensor(name, x, 4)
        if tuple(x.shape) != shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} {list(x.shape)} on {x.device}: {q.dtype} {list(shape)} on {q.device}"
            )
