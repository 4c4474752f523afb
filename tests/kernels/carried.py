"""Run the Triton operations elsewhere than where a test's tensors lie: on a GPU, or in guarded memory.

The tests of `kernels/` hold CPU tensors. `elsewhere` replaces the dispatcher for implementation "triton":
every storage among the arguments is copied over, with strides and sharing as they were; results come back,
and what the operation wrote into its arguments as well. The extremes of a summary have another layout on a
GPU; they are turned on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from agentctx.kernels import choose
from agentctx.kernels.records import BlockSummary, KVPages


@contextmanager
def elsewhere(place: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Triton operations meet copies of their arguments; `place` copies a one-dimensional byte tensor."""
    stay = choose.run

    def run(operation: str, impl: str | None, device: torch.device, /, *args: Any, **options: Any) -> Any:
        if impl != "triton":
            return stay(operation, impl, device, *args, **options)
        trip = _Trip(place, _dtype_of_extremes(args))
        if operation == "build_summary" and args[3] == "minmax" and args[5].dim() == 4:
            args = (*args[:5], trip.extremes(args[5]), *args[6:])
        there = [trip.carry(x) for x in args]
        named = {name: trip.carry(x) for name, x in options.items()}
        found = stay(operation, impl, place(torch.zeros(1, dtype=torch.uint8)).device, *there, **named)
        trip.back()
        return trip.home(found)

    choose.run = run
    try:
        yield
    finally:
        choose.run = stay


def turned(extremes: Tensor) -> Tensor:
    """Maxima and minima: the CPU's `[B, Hkv, 2 D, NB]` as the GPU's `[B, Hkv, NB, 2, D]`, uncopied."""
    return extremes.unflatten(2, (2, -1)).permute(0, 1, 4, 2, 3)


def _dtype_of_extremes(args: tuple[Any, ...]) -> torch.dtype | None:
    for x in args:
        if isinstance(x, KVPages):
            return torch.float32 if x.quantised else x.k.dtype
    return None


@dataclass
class _Trip:
    """One call: what was carried where."""

    place: Callable[[Tensor], Tensor]
    dtype: torch.dtype | None  # of extremes; None: bfloat16 if that holds them exactly
    storages: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # bytes here and there
    twins: dict[tuple[int, tuple[int, ...]], Tensor] = field(default_factory=dict)
    layouts: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # extremes here and there

    def carry(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, BlockSummary) and value.kind == "minmax" and value.data.dim() == 4:
            return BlockSummary("minmax", self.extremes(value.data), value.page_tokens)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.carry(x) for x in value))
        if isinstance(value, (tuple, list)):
            return type(value)(self.carry(x) for x in value)
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{f.name: self.carry(getattr(value, f.name)) for f in fields(value)})
        return value

    def _tensor(self, x: Tensor) -> Tensor:
        if any(x is there for _, there in self.layouts):
            return x  # turned and carried already
        if x.numel() == 0:
            device = self.place(torch.zeros(1, dtype=torch.uint8)).device
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.storages:
            here = torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage)
            self.storages[storage.data_ptr()] = (here, self.place(here))
        there = self.storages[storage.data_ptr()][1]
        start = there.storage_offset() // x.element_size() + x.storage_offset()
        copy = torch.empty(0, dtype=x.dtype, device=there.device)
        copy.set_(there.untyped_storage(), start, x.shape, x.stride())
        self.twins[copy.data_ptr(), tuple(x.shape)] = x
        return copy

    def extremes(self, x: Tensor) -> Tensor:
        dtype = self.dtype
        if dtype is None:
            dtype = torch.bfloat16 if torch.equal(x, x.bfloat16().float()) else torch.float32
        there = _Trip(self.place, None)._tensor(turned(x).to(dtype).contiguous())
        self.layouts.append((x, there))
        return there

    def back(self) -> None:
        for here, there in self.storages.values():
            here.copy_(there)
        for here, there in self.layouts:
            turned(here).copy_(there)

    def home(self, value: Any) -> Any:
        """A result on the CPU; what the operation returned of its arguments is the argument."""
        if isinstance(value, Tensor):
            return self.twins.get((value.data_ptr(), tuple(value.shape)), value.cpu())
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.home(x) for x in value))
        if isinstance(value, (tuple, list)):
            return type(value)(self.home(x) for x in value)
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{f.name: self.home(getattr(value, f.name)) for f in fields(value)})
        return value
