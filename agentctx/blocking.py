"""Make the plain form of an async function: same code, same signature, a loop of its own."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def blocking(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """The function, run to its end. Inside a running loop (a notebook) it runs in a thread beside it."""

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> T:
        if not _in_a_loop():
            return asyncio.run(function(*args, **kwargs))
        box: list[T | BaseException] = []

        def work() -> None:
            try:
                box.append(asyncio.run(function(*args, **kwargs)))
            except BaseException as error:  # noqa: BLE001 - carried over to the caller's thread
                box.append(error)

        thread = threading.Thread(target=work, name="agentctx")
        thread.start()
        thread.join()
        if isinstance(box[0], BaseException):
            raise box[0]
        return box[0]

    return plain


def blocking_iterator(function: Callable[P, AsyncGenerator[T, None]]) -> Callable[P, Iterator[T]]:
    """The async generator as a plain one. Leaving the loop early closes it."""

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        items = function(*args, **kwargs)
        with asyncio.Runner() as runner:
            try:
                while True:
                    try:
                        item = runner.run(_next(items))
                    except StopAsyncIteration:
                        return
                    yield item
            finally:
                runner.run(items.aclose())

    return plain


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _next(items: AsyncGenerator[T, None]) -> T:
    return await anext(items)
