"""`agentctx config show` and `agentctx paths`: what holds, and where things are kept."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from agentctx.cli.options import Json
from agentctx.cli.output import show
from agentctx.paths import Paths

app = typer.Typer(help="The settings that hold here.")


@app.callback()
def group() -> None:
    """Keeps `show` a sub-command, because typer folds a group of one command into it."""


@app.command("show")
def show_config(
    origin: Annotated[bool, typer.Option("--origin", help="Say where each value came from.")] = False,
    config: Annotated[
        Path | None, typer.Option(help="Read settings from this file only.", metavar="FILE")
    ] = None,
    json: Json = False,
) -> None:
    """Show every setting; a key is masked."""
    from agentctx.cli.render import columns
    from agentctx.settings import Settings

    settings = Settings.load({}, config)
    values = settings.model_dump(mode="json")
    origins = {name: settings.origin(name) for name in values}
    rows = [(name, _toml(value), *([origins[name]] if origin else [])) for name, value in values.items()]
    fields = {"settings": values, **({"origins": origins} if origin else {})}
    show(fields, columns(rows), "config show", as_json=json)


def show_paths(json: Json = False) -> None:
    """Show every folder that agentctx uses, and the size of what was read and is kept."""
    from agentctx.cli.render import columns
    from agentctx.memory.kv.shelf import Shelf

    paths = Paths.default()
    folders = asdict(paths) | {
        name: getattr(paths, name)
        for name in ("models", "kv", "index", "calls", "blobs", "calibration", "runs", "logs")
    }
    named = {name: str(path) for name, path in folders.items()}
    size = Shelf(paths.kv, budget=0).used_bytes
    shown = named | {"kv": f"{paths.kv} ({size / 1e6:,.1f} MB)"}
    show({"paths": named, "kv_bytes": size}, columns(shown.items()), "paths", as_json=json)


def _toml(value: object) -> str:
    if value is None:
        return "(not set)"
    return str(value).lower() if isinstance(value, bool) else str(value)
