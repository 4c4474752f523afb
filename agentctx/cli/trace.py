"""`agentctx trace show`: what a run did, event by event."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer

from agentctx.cli.options import Json
from agentctx.cli.output import show
from agentctx.paths import Paths

app = typer.Typer(help="What a run did, event by event.")


@app.command("show")
def show_trace(run_id: Annotated[str, typer.Argument(metavar="RUN_ID")], json: Json = False) -> None:
    """Print the trace of a run, indented as its calls were nested."""
    from agentctx.runs import Runs

    events = list(Runs(Paths.default().runs).trace(run_id))
    show({"run_id": run_id, "events": events}, _tree(events), "trace show", as_json=json)


@app.callback()
def group() -> None:
    """Keeps `show` a sub-command, because typer folds a group of one command into it."""


def _tree(events: Iterable[dict[str, Any]]) -> Iterator[str]:
    from agentctx.memory.clean import printable

    depth: dict[str, int] = {}
    start: float | None = None
    for event in events:
        start = event["time"] if start is None else start
        level = depth.setdefault(event["span"], depth.get(event["parent"], -1) + 1)
        data = jsonlib.dumps(event["data"], ensure_ascii=False)
        said = f"{event['node']} {event['event']} {data}" if event["node"] else f"{event['event']} {data}"
        yield printable(f"{event['time'] - start:8.2f} s  {'  ' * level}{said}")
