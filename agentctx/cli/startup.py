"""Start quickly: importing torch and LangChain makes a million objects that all stay.

The collector would look at them again and again while they are made, and whenever it looks at everything.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_resting() -> Iterator[None]:
    """No garbage collection inside; what is there at the end is never looked at again, in a process that ends
    with its command.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
