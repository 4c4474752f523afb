"""Bytes and times against the numbers of the design, which were computed by hand: one layer of 32 query and
8 KV heads of 128, bfloat16, on 4.3 TB/s and 790 TFLOP/s.
"""

import pytest

from agentctx.kernels import roofline as roof

HEADS = {"q_heads": 32, "kv_heads": 8, "size": 128}
KV = {"kv_heads": 8, "size": 128}
BF16 = roof.ELEMENT["bfloat16"]
MIB, K = 2**20, 1024
RATES = (4.3e12, 790e12)


def us(cost):
    return cost.us(*RATES)


def test_dense_decode():
    cost = roof.dense_decode(**HEADS, tokens=128 * K, element=BF16)
    assert cost.bytes == 512 * MIB and roof.dense_decode(**HEADS, tokens=1, element=BF16).bytes == 4096
    assert us(cost) == pytest.approx(124.9, abs=0.05)
    assert cost.flop / 790e12 * 1e6 == pytest.approx(2.7, abs=0.05)  # memory alone counts
    million = roof.dense_decode(**HEADS, tokens=1024 * K, element=BF16)
    assert us(million) == pytest.approx(998.8, abs=0.1)


def test_sparse_decode():
    cost = roof.sparse_decode(**HEADS, blocks=64, element=BF16)
    assert cost.bytes == 16 * MIB and us(cost) == pytest.approx(3.90, abs=0.005)
    assert cost == roof.dense_decode(**HEADS, tokens=4096, element=BF16)
    assert roof.sparse_decode(**HEADS, blocks=0, element=BF16) == (0, 0)


@pytest.mark.parametrize(
    ("kind", "page", "share", "read_us"),
    [
        ("minmax", 16, 0.0625, 7.8),
        ("minmax", 64, 0.0156, 1.95),
        ("mean", 64, 0.0078, 0.98),
        ("hadamard2", 64, 0.0625, 7.8),
    ],
)
def test_summaries(kind, page, share, read_us):
    blocks = 128 * K // page
    read = roof.summary_bytes(kind, **KV, blocks=blocks, page_tokens=page, element=BF16)
    assert read / (512 * MIB) == pytest.approx(share, rel=0.005)
    assert read / 4.3e12 * 1e6 == pytest.approx(read_us, rel=0.01)


def test_selection_and_attention_are_one_after_the_other():
    steps = (
        roof.select_blocks(**HEADS, blocks=2048, element=BF16),
        roof.sparse_decode(**HEADS, blocks=64, element=BF16),
    )
    both = steps[0] + steps[1]
    assert both.bytes == 24 * MIB
    dense = roof.dense_decode(**HEADS, tokens=128 * K, element=BF16)
    assert us(dense) / us(both) == pytest.approx(21.2, rel=0.01)


def test_prefill():
    full = roof.prefill(**HEADS, rows=128 * K, tokens=128 * K, element=BF16)
    assert full.flop == pytest.approx(0.14e15, rel=0.01)
    assert us(full) == pytest.approx(178e3, rel=0.005)
    tenth = roof.prefill(**HEADS, rows=128 * K, tokens=128 * K, density=0.1, element=BF16)
    assert us(tenth) == pytest.approx(17.8e3, rel=0.005)
    assert us(tenth) / 0.75 == pytest.approx(23.8e3, rel=0.005)
    one = roof.prefill(**HEADS, rows=1, tokens=4096, block_q=1, element=BF16)
    assert one.flop == pytest.approx(4 * 32 * 128 * 4096, rel=1e-3)  # a decode step, seen as a prefill


def test_pooled_scoring():
    cost = roof.block_scores("mean", 8, 8, 128, 2048, rows=1024, element=BF16)
    assert cost.flop / 790e12 * 1e3 == pytest.approx(0.005, abs=0.0005)


def test_attention_mass():
    one = roof.attention_mass(**HEADS, rows=32, tokens=128 * K, with_lse=True, element=BF16)
    two = roof.attention_mass(**HEADS, rows=32, tokens=128 * K, element=BF16)
    assert us(one) == pytest.approx(62.4, rel=0.005)
    assert two.bytes - one.bytes == 256 * MIB and two.flop == 2 * one.flop


def test_quantised_elements():
    assert roof.ELEMENT["int8"] == pytest.approx(1.03, abs=0.005)
    assert roof.ELEMENT["int4"] == pytest.approx(0.53, abs=0.005)
    bf16 = roof.dense_decode(**HEADS, tokens=128 * K, element=BF16)
    int8 = roof.dense_decode(**HEADS, tokens=128 * K, element=roof.ELEMENT["int8"])
    assert bf16.bytes / int8.bytes == pytest.approx(1.94, abs=0.01) and bf16.flop == int8.flop


def test_merge_moves_partial_results_only():
    one = roof.merge_lse(32, 128, 1, 1, element=0)
    assert one.bytes - 32 * 4 == pytest.approx(16.5e3, rel=0.002)  # a float32 part with its lse
    assert roof.merge_lse(32, 128, 1, 3, element=0).bytes - one.bytes == 2 * 16512


def test_what_moves_bytes():
    assert roof.write_kv(8, 128, 1, element=BF16).bytes == 2 * 4096
    assert roof.rope(32, 128, 1, element=BF16).bytes == 2 * 32 * 128 * 2
    assert roof.quantize_pages(8, 128, 64, 8, element=BF16).bytes == 64 * 2048 * (2 + 1) + 8 * 128 * 2 * 2
    built = roof.build_summary("minmax", 8, 128, 64, element=BF16, summary_element=4)
    assert built.bytes == 64 * 1024 * 2 + 8 * 256 * 4
