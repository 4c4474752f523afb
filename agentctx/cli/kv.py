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
    """List what is kept, by model and by document.

    Of no document is what prompts have before the first text, and what `agentctx index ls` lists alone.
    """
    from agentctx.cli.render import columns
    from agentctx.memory.kv.owners import owned
    from agentctx.memory.kv.shelf import Shelf

    shelf = Shelf(Paths.default().kv, budget=0)
    held, documents = shelf.held(), owned(shelf)
    models = [
        (one.name, one.model, f"{one.tokens}", f"{one.bytes / 1e6:.1f}", _when(one.used)) for one in held
    ]
    lines = columns([("model", "id", "tokens", "MB", "last used"), *models])
    if documents:
        rows = [
            (_shown(one.document), ", ".join(one.models), f"{one.bytes / 1e6:.1f}", _when(one.used))
            for one in documents
        ]
        lines = [*lines, "", *columns([("document", "model", "MB", "last used"), *rows])]
    found = {"kv": [asdict(one) for one in held], "documents": [asdict(one) for one in documents]}
    show(found, lines, "kv ls", as_json=json)


@app.command("rm")
def rm(
    documents: Annotated[
        list[str] | None, typer.Argument(metavar="[DOCUMENT]...", help="As `kv ls` lists it.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="What is kept for a model, by name or id.", metavar="MODEL")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Everything.")] = False,
    json: Json = False,
) -> None:
    """Delete what is kept; it is read again when it is needed.

    Of a document goes all that was read of it, alone or together with others.
    """
    from agentctx.memory.kv.owners import forget, owned
    from agentctx.memory.kv.shelf import Shelf

    if [bool(documents), bool(model), every].count(True) != 1:
        raise ConfigError("name documents, or pass --model or --all", hint="agentctx kv ls")
    shelf = Shelf(Paths.default().kv, budget=0)
    known: set[str | None] = {one.document for one in owned(shelf)} if documents else set()
    if model:
        known = {name for one in shelf.held() for name in (one.name, one.model)}
    if unknown := sorted({*(documents or ()), *(model or ())} - known):
        raise InputError(f"nothing is kept for {unknown[0]!r}", code="not_found", hint="agentctx kv ls")
    freed = forget(shelf, documents) if documents else shelf.remove(None if every else model)
    show({"freed": freed}, [f"{freed / 1e6:.1f} MB freed"], "kv rm", as_json=json)


def _shown(document: str | None) -> str:
    return "(no document)" if document is None else document


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
