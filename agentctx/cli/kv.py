"""`agentctx kv ls`, `rm`: what local models have read, kept on disk so that it is not read again."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated

import typer

from agentctx.cli.options import Json
from agentctx.cli.output import show
from agentctx.memory.errors import ConfigError, InputError
from agentctx.paths import Paths

app = typer.Typer(help="What local models have read, kept so that it is not read again.")


@app.command("ls")
def ls(json: Json = False) -> None:
    """List what is kept, by model."""
    from agentctx.cli.render import columns
    from agentctx.memory.kv.shelf import Shelf

    held = Shelf(Paths.default().kv, budget=0).held()
    rows = [(one.name, one.model, f"{one.tokens}", f"{one.bytes / 1e6:.1f}", _when(one.used)) for one in held]
    lines = columns([("model", "id", "tokens", "MB", "last used"), *rows])
    show({"kv": [asdict(one) for one in held]}, lines, "kv ls", as_json=json)


@app.command("rm")
def rm(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="A name or id that `kv ls` lists.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="What is kept for every model.")] = False,
    json: Json = False,
) -> None:
    """Delete what is kept; it is read again when it is needed."""
    from agentctx.memory.kv.shelf import Shelf

    if every == bool(models):
        raise ConfigError("name models, or pass --all", hint="agentctx kv ls")
    shelf = Shelf(Paths.default().kv, budget=0)
    known = {name for one in shelf.held() for name in (one.name, one.model)}
    if unknown := sorted(set(models or ()) - known):
        raise InputError(f"nothing is kept for {unknown[0]!r}", code="not_found", hint="agentctx kv ls")
    freed = shelf.remove(None if every else models)
    show({"freed": freed}, [f"{freed / 1e6:.1f} MB freed"], "kv rm", as_json=json)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
