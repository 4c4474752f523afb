"""The trace of a run: one append-only JSON Lines file that mirrors the tree of calls.

It is the ledger's journal, the progress stream and the record that `trace show` prints. A line is handed
to the operating system before the request it announces leaves, so a killed process loses none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from agentctx.memory.atomic import make_private, storing
from agentctx.memory.errors import StoreError

_ENCODE = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode
_span: ContextVar[tuple[str, str, str]] = ContextVar("span", default=("0", "", ""))  # span, parent, node


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a trace. `span` and `parent` form one tree; `node` is the LangGraph node it happened in.

    Events: run.start plan.made node.start node.end reserve settle call.start call.end cache.hit evidence
    verdict failure wind_down token answer run.end.
    """

    run_id: str
    seq: int
    time: float  # seconds since the epoch
    span: str
    parent: str
    node: str
    event: str
    data: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "seq": self.seq,
            "time": self.time,
            "span": self.span,
            "parent": self.parent,
            "node": self.node,
            "event": self.event,
            "data": self.data,
        }


class Trace:
    """Numbers events, writes them to `path` if there is one, and hands each to `listener`.

    Raises StoreError, no_space or unwritable, where the file cannot be written.
    """

    def __init__(
        self, run_id: str, path: Path | None = None, listener: Callable[[Event], None] | None = None
    ) -> None:
        self.run_id = run_id
        self._listener = listener
        self._seq = sum(1 for _ in read_trace(path)) if path and path.exists() else 0
        self._spans = self._seq
        self._file: IO[str] | None = None
        if path:
            with storing(path):
                make_private(path.parent)
                _drop_torn_line(path)
                # A lone surrogate in a model's words is written as JSON's own escape of it.
                self._file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def emit(self, event: str, **data: Any) -> None:
        """Append one event to the current span."""
        span, parent, node = _span.get()
        self._seq += 1
        line = Event(self.run_id, self._seq, time.time(), span, parent, node, event, data)
        # Tokens of the final answer are shown, not kept: the whole reply follows in call.end.
        if self._file and event != "token":
            with storing(self._file.name):
                self._file.write(_ENCODE(line.as_dict()) + "\n")
                self._file.flush()
        if self._listener:
            self._listener(line)

    @contextmanager
    def span(self, node: str = "") -> Iterator[None]:
        """Open a child of the current span; a node name marks a LangGraph node."""
        parent, _, current = _span.get()
        self._spans += 1
        token = _span.set((str(self._spans), parent, node or current))
        try:
            if node:
                self.emit("node.start")
            yield
            if node:
                self.emit("node.end")
        finally:
            _span.reset(token)

    def close(self) -> None:
        if self._file:
            file, self._file = self._file, None
            with storing(file.name):
                file.close()


def read_trace(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a trace file. A last line cut off by a kill is left out."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise StoreError(
                    f"line {number} of the trace {path.name} is damaged: {error}",
                    code="corrupt",
                    hint="remove the run and ask again",
                ) from error


def _drop_torn_line(path: Path) -> None:
    """Cut a half-written last line, so that the next event starts on a line of its own."""
    if not path.exists():
        return
    data = path.read_bytes()
    keep = data.rfind(b"\n") + 1
    if keep != len(data):
        with path.open("r+b") as file:
            file.truncate(keep)
