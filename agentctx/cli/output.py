"""stdout carries data only: text, one JSON object, or JSON Lines. Everything else goes to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TYPE_CHECKING, Any, TextIO

from agentctx.cli import exits
from agentctx.cli.options import OutputOptions
from agentctx.cli.progress import Progress

if TYPE_CHECKING:
    from agentctx.cli.render import Line
    from agentctx.each import Row
    from agentctx.memory.errors import AgentctxError
    from agentctx.memory.types import Answer, Notice, Plan
    from agentctx.result import Result
    from agentctx.workflows.profile import ModelProfile
    from agentctx.workflows.trace import Event


@contextmanager
def claim_stdout() -> Iterator[TextIO]:
    """Yield the real stdout. Until the end, whatever else writes there, also from C, lands on stderr."""
    sys.stdout.flush()
    encoding = sys.stdout.encoding
    data = open(os.dup(1), "w", encoding=encoding, errors="backslashreplace")  # noqa: SIM115
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield data
    finally:
        os.dup2(data.fileno(), 1)
        with suppress(BrokenPipeError):
            data.close()


def show(fields: dict[str, Any], lines: Iterable[str], command: str, *, as_json: bool) -> None:
    """Print what a command without a run has to say, as lines or as one object."""
    if as_json:
        print(
            json.dumps({"schema_version": 1, "command": command, **fields}, ensure_ascii=False, default=str)
        )
    else:
        from agentctx.memory.clean import printable

        for line in lines:
            print(printable(line))


class Output:
    """Shows one run in the form that was asked for."""

    def __init__(self, command: str, options: OutputOptions, data: TextIO) -> None:
        self.command = command
        self.options = options
        self.data = data
        self.broken = False
        self.on_broken: Callable[[], None] = lambda: None
        hidden = options.quiet or options.no_progress or not sys.stderr.isatty()
        self.progress = Progress(enabled=not hidden)
        self.profile: ModelProfile | None = None
        self.resumable = True
        self._last = ("", 0)
        self._told: set[Notice] = set()

    def event(self, event: Event) -> None:
        """Follow the trace of the run."""
        self._last = (event.run_id, event.seq)
        if self.options.stream:
            self._write(json.dumps({"schema_version": 1, **event.as_dict()}, ensure_ascii=False, default=str))
        elif self.options.verbose and event.event != "token":
            self.progress.clear()
            print(f"{event.seq} {event.node} {event.event} {event.data}", file=sys.stderr)
        else:
            self.progress.event(event)

    def answer(self, answer: Answer) -> None:
        """Show the end of a run, complete or not."""
        from agentctx.cli.render import answer_lines
        from agentctx.result import result

        self.notices((*answer.coverage.skipped, *answer.warnings))
        if self.options.json or self.options.stream:
            self._result(result(answer, self.command, self.profile))
        else:
            self.lines(answer_lines(answer, quiet=self.options.quiet))
        if answer.status == "partial" and self.resumable and not self.broken:
            print(f"hint: agentctx runs resume {answer.run_id}", file=sys.stderr)

    def plan(self, plan: Plan, profile: ModelProfile, notices: Iterable[Notice] = ()) -> None:
        """Show the plan of a dry run."""
        from agentctx.cli.render import plan_lines
        from agentctx.result import planned

        notices = tuple(notices)
        self.notices(notices)
        if self.options.json or self.options.stream:
            self._result(planned(plan, self.command, profile, notices))
        else:
            self.lines(plan_lines(plan))

    def failure(self, error: AgentctxError) -> None:
        """Show why there is no answer, or only a part of one."""
        from agentctx.memory.errors import BudgetExceeded
        from agentctx.result import failure

        if self.options.json or self.options.stream:
            self._result(failure(error, self.command, self.profile))
        elif isinstance(error, BudgetExceeded) and error.partial:
            self.answer(error.partial)
        self.progress.clear()
        print(exits.explain(error), file=sys.stderr)

    def row(self, row: Row, lines: Iterable[Line] | None) -> None:
        """Show one answer of several: as an object, or these `lines` if there are any."""
        from agentctx.result import row as made

        self.notices(row.answer.warnings if row.answer else ())
        if self.options.json or self.options.stream:
            self._result(made(row, self.command, self.profile))
        elif lines is not None:
            self.lines(lines)

    def notices(self, notices: Iterable[Notice]) -> None:
        """Say on stderr what the user should know, each thing once."""
        from agentctx.memory.clean import one_line

        self.progress.clear()
        for notice in () if self.broken else notices:
            if notice in self._told:
                continue
            self._told.add(notice)
            said = ": ".join(one_line(part) for part in (notice.source, notice.message) if part)
            print(f"warning: {said} ({notice.code})", file=sys.stderr)

    def _result(self, result: Result) -> None:
        fields = result.model_dump(mode="json")
        if self.options.stream:
            run_id, seq = self._last
            head = {"schema_version": 1, "run_id": result.run_id or run_id or None, "seq": seq + 1}
            fields = {**head, "event": "result", "result": fields}
        self._write(json.dumps(fields, ensure_ascii=False))

    def lines(self, lines: Iterable[Line]) -> None:
        """Print text, with its styles on a terminal."""
        if not self.data.isatty():
            self._write("\n".join(line.text for line in lines))
            return
        from rich.console import Console
        from rich.text import Text

        console = Console(file=self.data, markup=False, highlight=False, soft_wrap=True)
        for line in lines:
            console.print(Text(line.text, style=line.style))

    def _write(self, text: str) -> None:
        if self.broken:
            return
        try:
            print(text, file=self.data, flush=True)
        except BrokenPipeError:
            self.broken = True
            self.on_broken()
