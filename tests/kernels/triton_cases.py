"""For the tests of process A: an operation in Triton's interpreter, in two program orders, memory guarded.

    for got in both_orders(lambda: dense_decode(..., impl="triton")):
        drawn.assert_close(got, want, dtype)

Import `interp` (or this module) before anything that imports Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import drawn
import interp
import pytest
from carried import elsewhere
from triton.runtime.errors import InterpreterError

Found = TypeVar("Found")
SHUFFLE = 7  # seed of the second program order


@contextmanager
def guarded_memory(shuffle: int | None = None) -> Iterator[None]:
    """Arguments of Triton operations lie between guards, outputs start as NaN, programs run in this order."""
    before = interp.checks.shuffle
    interp.checks.shuffle = shuffle
    try:
        with drawn.poisoned(), elsewhere(interp.guarded):
            yield
    finally:
        interp.checks.shuffle = before


def both_orders(call: Callable[[], Found]) -> list[Found]:
    """What `call` returns in grid order and in a shuffled order; it must run a kernel."""
    found = []
    for shuffle in (None, SHUFFLE):
        before = interp.checks.elements
        with guarded_memory(shuffle):
            found.append(call())
        assert interp.checks.elements > before, "no kernel ran"
    return found


@contextmanager
def fault(words: str) -> Iterator[None]:
    """The kernel inside must be caught doing what `words` says."""
    with pytest.raises(InterpreterError, match=words), guarded_memory():
        yield
