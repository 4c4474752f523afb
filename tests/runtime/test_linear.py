"""The twins of linear layers: near the weights, used for few rows, kept in a file that is checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from agentctx.kernels.linear import Int8Weight
from agentctx.runtime import twins
from agentctx.runtime.linear import FEW, Linear
from agentctx.runtime.twins import HEAD, Codes

Named = list[tuple[str, tuple[str, ...], Linear]]


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def layers() -> Named:
    return [
        ("0.qkv", ("q", "k"), Linear(drawn(96, 64), drawn(1, 96)[0])),
        ("0.odd", ("odd",), Linear(drawn(20, 64))),  # no multiple of 16: stays as it is
        (HEAD, ("lm_head",), Linear(drawn(259, 64))),
    ]


def far(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def test_few_rows_go_through_the_twin_and_many_do_not() -> None:
    linear = Linear(drawn(96, 64), drawn(1, 96)[0])
    twins.make([("0.out", ("o",), linear)], {})
    plain = Linear(linear.weight, linear.bias)
    for shape in ((1, FEW), (FEW, 1), (1, 1), (3,), ()):
        x = torch.randn(*shape, 64).to(torch.bfloat16)
        assert linear(x).shape == (*shape, 96)
        assert 1e-4 < far(linear(x), plain(x)) < 0.2
    many = torch.randn(1, FEW + 1, 64).to(torch.bfloat16)
    assert torch.equal(linear(many), plain(many))


def test_known_codes_lose_nothing_and_wrong_ones_are_not_used() -> None:
    codes = torch.randint(0, 16, (96, 64), dtype=torch.uint8)
    scales, minima = torch.full((96, 2), 0.25), torch.full((96, 2), -2.0)
    whole = codes.view(96, 2, 32) * scales[..., None] + minima[..., None]
    linear = Linear(whole.view(96, 64).to(torch.bfloat16))
    parts = {
        "q": Codes(codes[:64], scales[:64], minima[:64]),
        "k": Codes(codes[64:], scales[64:], minima[64:]),
    }
    assert twins.make([("0.qkv", ("q", "k"), linear)], parts) == 0
    x = drawn(2, 64)
    assert far(linear(x), x.double() @ whole.view(96, 64).double().t()) < 5e-3
    swapped = {"q": parts["k"], "k": parts["q"]}
    assert twins.make([("0.qkv", ("q", "k"), linear)], swapped) == linear.weight.numel()
    assert twins.make([("0.qkv", ("q", "k"), linear)], {"q": parts["q"]}) == linear.weight.numel()


def test_the_file_gives_the_same_twins(tmp_path: Path) -> None:
    made, taken, path = layers(), layers(), tmp_path / twins.FILE
    twins.make(made, {})
    twins.keep(path, made, source="these")
    assert twins.take(path, taken, source="these")
    assert isinstance(taken[2][2].twin, Int8Weight) and taken[1][2].twin is None
    x = drawn(3, 64)
    for (_, _, one), (_, _, other) in zip(made, taken, strict=True):
        assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("damage", ["absent", "source", "flipped", "short", "layout", "fewer"])
def test_a_file_that_does_not_fit_is_not_used(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, path = layers(), tmp_path / twins.FILE
    twins.make(made, {})
    twins.keep(
        path, made[:1] if damage == "fewer" else made, source="other" if damage == "source" else "these"
    )
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-7] ^= 1
    if damage != "absent":
        path.write_bytes(data[:-40] if damage == "short" else data)
    else:
        path.unlink()
    if damage == "layout":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    taken = layers()
    assert not twins.take(path, taken, source="these")
    assert all(linear.twin is None for _, _, linear in taken)
