"""Make the plain form of an async function: same code, same signature, run in a loop kept for that.

One loop in one thread serves all plain calls of a process. A loop per call would leave the open connections
of an endpoint behind in a closed loop, and none could be made inside a notebook's running loop.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def blocking(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """The function, run to its end. An interrupt cancels what it runs."""

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> T:
        return _wait(function(*args, **kwargs))

    return plain


def blocking_iterator(function: Callable[P, AsyncGenerator[T, None]]) -> Callable[P, Iterator[T]]:
    """The async generator as a plain one. Leaving the loop early closes it."""

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        items = function(*args, **kwargs)
        try:
            while (item := _wait(_next(items))) is not _END:
                yield item  # type: ignore[misc]
        finally:
            _wait(items.aclose())

    return plain


_END = object()


async def _next(items: AsyncGenerator[T, None]) -> T | object:
    return await anext(items, _END)


def _wait(work: Coroutine[Any, Any, T]) -> T:
    future = asyncio.run_coroutine_threadsafe(work, _loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The loop, started on first use and ended with the process."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="agentctx", daemon=True)
    thread.start()

    def end() -> None:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    atexit.register(end)
    return loop
