"""Rotary positions against float64, and back again."""

from __future__ import annotations

from collections.abc import Iterator

import drawn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentctx.kernels.rope import rope, rope_move

IMPLEMENTATIONS = drawn.implementations("rope")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}


def frequencies(rotary: int, base: float = 10000.0) -> Tensor:
    return base ** -(torch.arange(0, rotary, 2, dtype=torch.float32) / rotary)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, dict[str, object]]:
    """x with strided heads, positions up to a million, frequencies, options."""
    batch, heads, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(0, 9))
    size = draw(st.sampled_from((2, 32, 50, 64, 80, 96, 128, 256)))
    rotary = draw(st.sampled_from((None, size, max(2, size // 4 * 2))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(batch, tokens, heads, size, generator=generator)
    x = (x * draw(st.sampled_from((1.0, 1e-30, 1e30)))).to(draw(st.sampled_from((*TOLERANCE,))))
    if x.dtype == torch.float16:
        x = torch.randn(batch, tokens, heads, size, generator=generator).half()
    shape = (tokens,) if draw(st.booleans()) else (batch, tokens)
    far = draw(st.sampled_from((10, 8192, 1_000_000)))
    dtype = draw(st.sampled_from((torch.int32, torch.int64)))
    positions = torch.randint(0, far, shape, generator=generator, dtype=dtype)
    options: dict[str, object] = {"style": draw(st.sampled_from(("half", "interleaved")))}
    return x.transpose(1, 2), positions, frequencies(rotary or size), options | {"rotary_dim": rotary}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=problems(), inverse=st.booleans(), scaling=st.sampled_from((1.0, 1.3)))
def test_agrees_with_the_reference(impl, problem, inverse, scaling):
    x, positions, inv_freq, options = problem
    if impl.startswith("cpp") and x.dtype == torch.float16:
        return
    options = {**options, "inverse": inverse, "attention_scaling": scaling}
    got = rope(x, positions, inv_freq, impl=impl, **options)
    exact = rope(x, positions, inv_freq, impl="reference", **options)
    assert got.dtype == x.dtype and got.shape == x.shape
    assert drawn.relative(got, exact) <= TOLERANCE[x.dtype]
    rotary = 2 * len(inv_freq)
    assert torch.equal(got[..., rotary:], x[..., rotary:]), "channels beyond the rotary ones must pass"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(problem=problems(), scaling=st.sampled_from((1.0, 1.3)))
def test_there_and_back_is_the_identity(impl, problem, scaling):
    x, positions, inv_freq, options = problem
    x = x.float()
    there = rope(x, positions, inv_freq, attention_scaling=scaling, impl=impl, **options)
    back = rope(there, positions, inv_freq, inverse=True, attention_scaling=scaling, impl=impl, **options)
    assert drawn.relative(back, x) <= 1e-6


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(problem=problems(), stretch=st.sampled_from((None, 0.25)))
def test_a_move_is_back_and_there(impl, problem, stretch):
    x, positions, inv_freq, options = problem
    x = x.float()
    new = positions * 3 + 17
    new_freq = None if stretch is None else inv_freq * stretch
    moved = rope_move(x, positions, new, inv_freq, new_inv_freq=new_freq, impl=impl, **options)
    exact = rope_move(x, positions, new, inv_freq, new_inv_freq=new_freq, impl="reference", **options)
    assert drawn.relative(moved, exact) <= 1e-6
    origin = rope(x, positions, inv_freq, inverse=True, impl=impl, **options)
    again = rope(origin, new, inv_freq if new_freq is None else new_freq, impl=impl, **options)
    assert drawn.relative(moved, again) <= 1e-6


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_a_move_near_a_million_keeps_what_turning_by_the_difference_loses(impl):
    inv_freq = frequencies(128, 500000.0)
    old = torch.arange(1_000_000, 1_000_064)
    new = old - 900_017
    key = torch.randn(1, 2, 64, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def turned(positions: Tensor, x: Tensor) -> Tensor:
        angle = (positions.float()[:, None] * inv_freq).double()
        a, b = x[..., :64], x[..., 64:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    want = turned(new, key)
    stored = turned(old, key).float()
    assert float((rope_move(stored, old, new, inv_freq, impl=impl).double() - want).abs().max()) < 2e-6
    by_difference = rope(stored, old - new, inv_freq, inverse=True, impl=impl)
    assert float((by_difference.double() - want).abs().max()) > 0.05


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_in_place_and_into_another_tensor(impl):
    x = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(1))
    positions, inv_freq = torch.arange(5), frequencies(64)
    want = rope(x, positions, inv_freq, impl=impl)
    poisoned = torch.full((2, 5, 3, 64), float("nan")).transpose(1, 2)
    assert rope(x, positions, inv_freq, out=poisoned, impl=impl) is poisoned
    assert torch.equal(poisoned, want)
    assert rope(x, positions, inv_freq, out=x, impl=impl) is x
    assert torch.equal(x, want)


@pytest.fixture
def team() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("impl", [name for name in IMPLEMENTATIONS if name.startswith("cpp")])
def test_one_and_two_threads_agree(impl, team, monkeypatch):
    monkeypatch.setattr("agentctx.kernels.threads.worth", lambda *_: torch.get_num_threads())
    x = torch.randn(1, 3, 301, 80, generator=torch.Generator().manual_seed(2)).bfloat16()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(rope(x, torch.arange(301), frequencies(80), impl=impl))
    assert torch.equal(*results)


X, AT, FREQ = torch.zeros(2, 3, 4, 64), torch.arange(4), frequencies(64)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: rope(X[0], AT, FREQ), ValueError, "x is"),
        (lambda: rope(X.double(), AT, FREQ), ValueError, "x is torch.float64"),
        (lambda: rope(X.transpose(2, 3), AT, FREQ[:2]), ValueError, "x has stride"),
        (lambda: rope(X, AT.float(), FREQ), ValueError, "positions is"),
        (lambda: rope(X, AT[:3], FREQ), ValueError, "positions is"),
        (lambda: rope(X, [0, 1, 2, 3], FREQ), TypeError, "positions is list"),
        (lambda: rope(X, AT, FREQ[:5]), ValueError, "inv_freq is"),
        (lambda: rope(X, AT, FREQ.double()), ValueError, "inv_freq is"),
        (lambda: rope(X, AT, FREQ, rotary_dim=33), ValueError, "rotary_dim is 33"),
        (lambda: rope(X, AT, FREQ, rotary_dim=66), ValueError, "rotary_dim is 66"),
        (lambda: rope(X[..., :63], AT, FREQ), ValueError, "rotary_dim is 63"),
        (lambda: rope(X, AT, FREQ, style="neox"), ValueError, "style is 'neox'"),
        (lambda: rope(X, AT, FREQ, attention_scaling=0.0), ValueError, "attention_scaling is 0"),
        (lambda: rope(X, AT, FREQ, out=X[:1]), ValueError, "out is"),
        (lambda: rope_move(X, AT, AT[:2], FREQ), ValueError, "new_positions is"),
        (lambda: rope_move(X, AT[:2], AT, FREQ), ValueError, "old_positions is"),
        (lambda: rope_move(X, AT, AT, FREQ, new_inv_freq=FREQ[:3]), ValueError, "new_inv_freq is"),
    ],
)
def test_what_does_not_fit_is_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
