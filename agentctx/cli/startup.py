"""Start quickly: importing torch and transformers makes a million objects that all stay.

The collector would look at them again and again while they are made, which takes half a second.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_resting() -> Iterator[None]:
    """No garbage collection inside."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
