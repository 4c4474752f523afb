"""Steps that attention kernels share: a tile of keys or values out of a page, scores, and the online softmax.

A tile is BN tokens of one page: `at` is its first token in the page. Channels are padded to BD, a power of
two. Scores are kept in base 2: `exp2(scores)` weighs, so `scale` comes multiplied by log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from agentctx.kernels.errors import Uncovered
from agentctx.kernels.gpu.configs import KINDS, Config, arch_of, pick
from agentctx.kernels.records import KVPages

LARGEST = 256  # head size

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


def uncovered(q: Tensor, kv: KVPages) -> None:
    """Raise Uncovered for what the kernels leave to torch."""
    if kv.format == "packed":
        raise Uncovered("packed pages are the CPU's")
    if q.shape[3] > LARGEST:
        raise Uncovered(f"head size {q.shape[3]}: Triton serves up to {LARGEST}")


def configuration(table: tuple[Config, ...], q: Tensor, kv: KVPages, rows: int) -> Config:
    """The row of `table` for so many rows of q; float32 queries need float32 products, whatever the pages.

    Raises Uncovered if there is none.
    """
    kind = KINDS[q.dtype if q.element_size() == 4 else kv.k.dtype]
    try:
        return pick(table, arch_of(q), dim=q.shape[3], rows=rows, kind=kind)
    except LookupError as missing:
        raise Uncovered(str(missing)) from missing


def strides(kv: KVPages) -> tuple[int, ...]:
    """Page and head strides of k, v and their scales."""
    pools = (kv.k, kv.v, kv.k_scale, kv.v_scale)
    return tuple(step for x in pools for step in ((0, 0) if x is None else x.stride()[:2]))


def page_valid(kv: KVPages) -> Tensor | None:
    """The valid tokens of each page, one behind the other, or None where pages are in position order."""
    return None if kv.page_valid is None else kv.page_valid.contiguous()


@triton.jit
def _signed(byte, channel, D: tl.constexpr, FORMAT: tl.constexpr):
    """The code of a channel from its byte: channel i in the low nibble, i + D/2 in the high one."""
    if FORMAT == "int4":
        nibble = (byte.to(tl.int32) >> tl.where(channel < D // 2, 0, 4)) & 15
        byte = (nibble ^ 8) - 8
    return byte


@triton.jit
def keys(
    pool, scales, page, head, page_stride, head_stride, scale_page, scale_head, at, D: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """K of a tile, transposed, `[BD, BN]` in DTYPE. `page` and `head` are int64."""
    pool += page * page_stride + head * head_stride
    token = at + tl.arange(0, BN)[None, :]
    channel = tl.arange(0, BD)[:, None]
    where = token * (D // 2) + channel % (D // 2) if FORMAT == "int4" else token * D + channel
    tile = tl.load(pool + where) if BD == D else tl.load(pool + where, mask=channel < D, other=0)
    if FORMAT != "paged":
        scales += page * scale_page + head * scale_head
        scale = tl.load(scales + channel, mask=channel < D, other=0.0).to(tl.float32)
        tile = (_signed(tile, channel, D, FORMAT).to(tl.float32) * scale).to(DTYPE)
    return tile


@triton.jit
def values(
    pool, scales, page, head, page_stride, head_stride, scale_page, scale_head, at, D: tl.constexpr,
    PAGE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """V of a tile, `[BN, BD]` in DTYPE. Quantised pages hold it transposed."""
    pool += page * page_stride + head * head_stride
    if FORMAT == "paged":
        token = at + tl.arange(0, BN)[:, None]
        channel = tl.arange(0, BD)[None, :]
        where = pool + token * D + channel
        tile = tl.load(where) if BD == D else tl.load(where, mask=channel < D, other=0.0)
    else:
        token = at + tl.arange(0, BN)[None, :]
        channel = tl.arange(0, BD)[:, None]
        row = channel % (D // 2) if FORMAT == "int4" else channel
        code = tl.load(pool + row * PAGE + token, mask=channel < D, other=0)
        scales += page * scale_page + head * scale_head
        scale = tl.load(scales + channel, mask=channel < D, other=0.0).to(tl.float32)
        tile = tl.trans((_signed(code, channel, D, FORMAT).to(tl.float32) * scale).to(DTYPE))
    return tile


@triton.jit
def scores(q, k, scale, softcap, CAPPED: tl.constexpr):
    """Scaled and capped scores of rows `q [M, BD]` against `k [BD, BN]`, float32, in base 2."""
    s = tl.dot(q, k, input_precision="ieee")
    if CAPPED:
        # tanh of the natural score over the cap, by an exponent that cannot overflow
        cap = softcap * LOG2E
        x = s * (scale / cap)
        e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
        tanh = (1 - e) / (1 + e)
        s = tl.where(x < 0, -tanh, tanh) * cap
    else:
        s *= scale
    return s


@triton.jit
def accumulate(s, v, top, total, acc):
    """One step of the online softmax over scores `s [M, BN]`, -inf where hidden, and values `[BN, BD]`."""
    peak = tl.maximum(top, tl.max(s, 1))
    # A row that has seen nothing keeps -inf, and -inf - -inf is NaN.
    base = tl.where(peak == float("-inf"), 0.0, peak)
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(top - base)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return peak, total * shrink + tl.sum(p, 1), acc


@triton.jit
def finish(top, total, acc):
    """Output rows and their natural lse; 0 and -inf for a row that saw nothing."""
    out = acc / tl.where(total == 0, 1.0, total)[:, None]
    return out, tl.where(total == 0, float("-inf"), (top + tl.log2(total)) * LN2)
