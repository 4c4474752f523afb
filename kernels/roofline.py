"""The least work of each call: the bytes that must move and the floating-point operations that must be done.

Functions of shapes alone. K and V count once for each KV head that needs them, queries and results are left
out where they are a thousandth; an exponential, a mask or a comparison counts nothing. No implementation can
be faster than `Cost.us` on a machine with these rates, so the quotient with a measured time is the share of
the roofline. `element` is bytes per value of K and V, `ELEMENT[format]` for the quantised ones (one bfloat16
scale for each page, head and channel of 64 tokens).
"""

from __future__ import annotations

from typing import NamedTuple

ELEMENT = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 2 / 64, "int4": 0.5 + 2 / 64}


class Cost(NamedTuple):
    """What a call must read and write, in bytes, and compute, in FLOP (a multiply-add is two)."""

    bytes: float
    flop: float

    def __add__(self, other: object) -> Cost:
        """One call after the other."""
        if not isinstance(other, Cost):
            return NotImplemented
        return Cost(self.bytes + other.bytes, self.flop + other.flop)

    def us(self, bytes_per_s: float, flop_per_s: float) -> float:
        """Microseconds at these rates, with memory and arithmetic overlapped."""
        return max(self.bytes / bytes_per_s, self.flop / flop_per_s) * 1e6


def dense_decode(
    q_heads: int, kv_heads: int, size: int, tokens: int, *, rows: int = 1, element: float
) -> Cost:
    """Every token of the context, K and V."""
    return Cost(2 * kv_heads * tokens * size * element, 4.0 * q_heads * rows * tokens * size)


def sparse_decode(
    q_heads: int,
    kv_heads: int,
    size: int,
    blocks: int,
    *,
    page_tokens: int = 64,
    rows: int = 1,
    element: float,
) -> Cost:
    """`blocks` blocks for each KV head."""
    tokens = blocks * page_tokens
    return dense_decode(q_heads, kv_heads, size, tokens, rows=rows, element=element)


def prefill(
    q_heads: int,
    kv_heads: int,
    size: int,
    rows: int,
    tokens: int,
    *,
    density: float = 1.0,
    block_q: int = 128,
    element: float,
) -> Cost:
    """The last `rows` of `tokens` positions, each seeing the share `density` of the keys before it.

    K and V are read once for each block of query rows.
    """
    pairs = density * (rows * (tokens - rows) + rows * rows / 2)
    return Cost(2 * kv_heads * size * element * pairs / block_q, 4 * q_heads * size * pairs)


def summary_bytes(
    kind: str, kv_heads: int, size: int, blocks: int, *, page_tokens: int = 64, element: float
) -> float:
    """Bytes of a summary of `blocks` blocks; `element` is that of the summary (minmax on a CPU: 4)."""
    per_block = {
        "minmax": 2 * size * element,
        "mean": size * element,
        "submeans": size * element * page_tokens / 16,
        "vmax": 4,
        "hadamard2": page_tokens * size / 4,
    }
    return kv_heads * blocks * per_block[kind]


def block_scores(
    kind: str,
    q_heads: int,
    kv_heads: int,
    size: int,
    blocks: int,
    *,
    page_tokens: int = 64,
    rows: int = 1,
    element: float,
) -> Cost:
    """Each summary once, and the scores written; minmax is two dots, of which half the factors are 0."""
    dots = {"submeans": page_tokens / 16, "hadamard2": page_tokens}.get(kind, 1)
    read = summary_bytes(kind, kv_heads, size, blocks, page_tokens=page_tokens, element=element)
    return Cost(read + 4 * kv_heads * rows * blocks, 2.0 * q_heads * rows * blocks * dots * size)


def select_blocks(
    q_heads: int, kv_heads: int, size: int, blocks: int, *, rows: int = 1, element: float
) -> Cost:
    """A minmax summary once; the scores are never written."""
    return Cost(
        summary_bytes("minmax", kv_heads, size, blocks, element=element), 2.0 * q_heads * rows * blocks * size
    )


def attention_mass(
    q_heads: int, kv_heads: int, size: int, rows: int, tokens: int, *, with_lse: bool = False, element: float
) -> Cost:
    """K once for each pass: one for the lse of the rows, unless it is given, one for the masses."""
    passes = 1 if with_lse else 2
    return Cost(
        passes * kv_heads * tokens * size * element + 4 * tokens,
        passes * 2.0 * q_heads * rows * tokens * size,
    )


def merge_lse(q_heads: int, size: int, rows: int, parts: int, *, element: float) -> Cost:
    """Float32 parts read, one result written."""
    one = q_heads * rows * (size + 1)
    return Cost(4.0 * parts * one + q_heads * rows * (size * element + 4), 2.0 * parts * one)


def write_kv(kv_heads: int, size: int, tokens: int, *, element: float) -> Cost:
    """K and V of new tokens, read and written."""
    return Cost(4 * kv_heads * tokens * size * element, 0.0)


def build_summary(
    kind: str, kv_heads: int, size: int, tokens: int, *, element: float, summary_element: float
) -> Cost:
    """K (vmax: V) read, the summary written; an operation or two for each value."""
    values = kv_heads * tokens * size
    return Cost(
        values * element + summary_bytes(kind, kv_heads, size, tokens // 64, element=summary_element),
        2.0 * values,
    )


def quantize_pages(kv_heads: int, size: int, tokens: int, bits: int, *, element: float) -> Cost:
    """K and V read once, codes and scales written once."""
    values = 2 * kv_heads * tokens * size
    return Cost(values * (element + ELEMENT[f"int{bits}"]), 3.0 * values)


def rope(heads: int, size: int, tokens: int, *, element: float) -> Cost:
    """x read and written."""
    return Cost(2 * heads * tokens * size * element, 3.0 * heads * tokens * size)
