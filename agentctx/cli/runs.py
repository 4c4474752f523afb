"""`agentctx runs ls`, `show`, `resume`, `rm`: the runs that were kept."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from agentctx.cli.options import Json, OutputOptions, expand
from agentctx.cli.output import show
from agentctx.cli.run import resume as finish
from agentctx.paths import Paths

if TYPE_CHECKING:
    from agentctx.runs import Runs

app = typer.Typer(help="The runs that were kept.")
RunId = Annotated[str, typer.Argument(metavar="RUN_ID", help="As `agentctx runs ls` lists it.")]


@app.command("ls")
def ls(json: Json = False) -> None:
    """List the runs."""
    from agentctx.cli.render import columns

    runs = _runs().list()
    rows = [(r.run_id, _when(r.started), r.status, r.task, r.strategy, r.question or "") for r in runs]
    lines = columns([("run", "started", "status", "task", "strategy", "question"), *rows])
    show({"runs": [asdict(run) for run in runs]}, lines, "runs ls", as_json=json)


@app.command("show")
def show_one(run_id: RunId, json: Json = False) -> None:
    """Show one run."""
    from agentctx.memory.clean import one_line

    fields = asdict(_runs().get(run_id))
    lines = [f"{name}: {one_line(str(value))}" for name, value in fields.items()]
    show({"run": fields}, lines, "runs show", as_json=json)


@app.command("resume")
@expand
def resume(options: OutputOptions, run_id: RunId) -> None:
    """Finish a run that was stopped; no finished model call is made again."""
    from agentctx.settings import Settings

    settings = Settings.load({"offline": options.offline})
    settings.export_key()
    finish(run_id, "runs resume", options, offline=settings.offline)


@app.command("rm")
def rm(run_ids: Annotated[list[str], typer.Argument(metavar="RUN_ID...")], json: Json = False) -> None:
    """Delete runs with their traces and checkpoints, and the texts that no other run needs."""
    from agentctx.memory.blobs import Blobs
    from agentctx.settings import Settings

    Settings.load({}).export_key()  # the address of the checkpoints, if they are in a database
    runs, blobs = _runs(), Blobs(Paths.default().blobs)
    for run_id in run_ids:
        runs.remove(run_id, blobs)
    show({"removed": run_ids}, [f"removed {run_id}" for run_id in run_ids], "runs rm", as_json=json)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _runs() -> Runs:
    from agentctx.runs import Runs

    return Runs(Paths.default().runs)
