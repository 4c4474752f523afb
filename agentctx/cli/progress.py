"""One line on stderr that says what is going on, only where a person can see it."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentctx.workflows.trace import Event

INTERVAL = 0.1  # seconds between two changes of the line


class Progress:
    """Shows stages with their share, or the number of calls of a run.

    When not `enabled`, a stage is still announced by one plain line when it begins: stages are rare, and a
    download that nobody named must not be silent.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._shown = 0.0
        self._calls = 0

    def stage(self, label: str, done: int, total: int | None) -> None:
        """A stage of `total` steps (None: unknown), of which `done` are done."""
        if not self.enabled and done == 0:
            print(label, file=sys.stderr)
        share = f" {done / total:.0%}" if total else ""
        self._show(f"{label}{share}", force=done == 0)

    def event(self, event: Event) -> None:
        """Follow the trace of a run."""
        if event.event == "call.end":
            self._calls += 1
        if event.event in ("call.end", "node.start"):
            self._show(f"{event.node or 'run'}: {self._calls} calls done")

    def clear(self) -> None:
        """Remove the line, so that what follows starts at the margin."""
        if self.enabled and self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = 0.0

    def _show(self, line: str, *, force: bool = False) -> None:
        now = time.monotonic()
        if self.enabled and (force or now - self._shown >= INTERVAL):
            self._shown = now
            print(f"\r\x1b[K{line[:79]}", end="", file=sys.stderr, flush=True)
