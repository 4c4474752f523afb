"""Start and end quickly: what is loaded at the start stays to the end, so nobody needs to look through it.

Importing torch and transformers makes a million objects. The collector would look at them again and again
while they are made, and once more when the process ends: together a second of a command's time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_resting() -> Iterator[None]:
    """No garbage collection inside; what is alive at the end is left out of all later ones."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
