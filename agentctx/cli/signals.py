"""Ctrl-C and SIGTERM during a run: finish with what is there, then cancel, then leave."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

REASONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Stoppable(Protocol):
    """`agentctx.api.Stop`, which is not imported here because it costs LangGraph."""

    def request(self, reason: str) -> None: ...


@contextmanager
def stopping(stop: Stoppable) -> Iterator[None]:
    """Pass the first two signals to `stop`; a third ends the process as if nobody had listened."""
    asked = 0

    def on_signal(number: int, _: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if asked > 2:
            raise KeyboardInterrupt
        say = "finishing with what was read; again to cancel" if asked == 1 else "cancelling"
        print(f"\n{REASONS[signal.Signals(number)]}: {say}", file=sys.stderr)
        stop.request(REASONS[signal.Signals(number)])

    before = {number: signal.signal(number, on_signal) for number in REASONS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
