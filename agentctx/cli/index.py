"""`agentctx index PATH...`, `ls`, `rm`, `pin`, `unpin`, `verify`: what a local model has read and keeps."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from agentctx.cli import exits
from agentctx.cli.options import Json
from agentctx.cli.output import show
from agentctx.cli.progress import Progress
from agentctx.memory.clean import one_line
from agentctx.memory.errors import ConfigError, InputError
from agentctx.paths import Paths

ADD = "add"
Named = Annotated[list[str], typer.Argument(metavar="PATH...", help="As they were indexed.")]
Indexed = Annotated[list[str] | None, typer.Argument(metavar="[PATH]...", help="As they were indexed.")]


class _PathsOrCommand(TyperGroup):
    """What is no command is a path to index; one that is called like a command is written ./ls."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "--help"}:
            args = [ADD, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_PathsOrCommand,
    no_args_is_help=True,
    help="Read files once with a local model: index PATH..., then ask over them.",
)


@app.command(ADD)
def add(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Files and directories.")],
    model: Annotated[str | None, typer.Option(help="A local model.", metavar="MODEL")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Only these files.", metavar="GLOB")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Not these files.", metavar="GLOB")] = None,
    offline: Annotated[bool | None, typer.Option("--offline/--no-offline", help="No downloads.")] = None,
    max_files: Annotated[int, typer.Option(help="Of a directory.")] = 10_000,
    pin: Annotated[bool, typer.Option("--pin", help="Its KV never leaves the disk to make room.")] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress line.")] = False,
    json: Json = False,
) -> None:
    """Read what is new in these paths and keep it. Stopped, it goes on where it was."""
    from agentctx.corpus.index import Index
    from agentctx.memory.documents import open_documents
    from agentctx.memory.selection import Selection
    from agentctx.models.load import open_model
    from agentctx.settings import Settings

    settings = Settings.load({"model": model, "offline": offline})
    if settings.ephemeral:
        raise ConfigError("ephemeral keeps nothing on disk", hint="leave it out to index")
    selection = Selection(include=tuple(include or ()), exclude=tuple(exclude or ()), max_files=max_files)
    found = {path: open_documents([path], selection=selection) for path in paths}
    progress = Progress(enabled=not no_progress and sys.stderr.isatty())
    rows = []
    try:
        opened = open_model(
            settings.model,
            base_url=settings.base_url,
            paths=Paths.default(),
            offline=settings.offline,
            **settings.local(),
            kv_bytes=settings.kv_bytes,
            memory_bytes=settings.memory_bytes,
            progress=progress.stage,
        )
        index = Index.open(Paths.default().index, opened)
        for path, corpus in found.items():
            shown = _timed(progress, path)
            added = index.add(os.path.realpath(path), corpus.documents, progress=shown, pin=pin)
            rows.append({"path": path, "documents": len(corpus.documents), **asdict(added)})
    finally:
        progress.clear()
    notices = [notice for corpus in found.values() for notice in (*corpus.skipped, *corpus.warnings)]
    told = [f"{notice.source}: {notice.message} ({notice.code})" for notice in notices]
    for line in (*told, *(line for row in rows for line in row["warnings"])):
        print(f"warning: {one_line(line)}", file=sys.stderr)
    lines = [
        f"{row['path']}: {row['documents']} documents, {row['passages']} passages, {row['fresh']} of them "
        f"new, {row['computed_tokens']:,} tokens read"
        for row in rows
    ]
    show({"indexed": rows, "skipped": [asdict(one) for one in notices]}, lines, "index", as_json=json)


@app.command("ls")
def ls(json: Json = False) -> None:
    """List what is indexed, by model and path."""
    from agentctx.cli.render import columns
    from agentctx.corpus.held import listed

    found = listed(Paths.default())
    rows = [
        (
            one.root or one.folder,
            one.model,
            f"{one.documents}",
            one.problem or f"{one.kept}/{one.passages}",
            f"{one.tokens}",
            f"{one.bytes / 1e6:.1f}",
            "yes" if one.pinned else "",
        )
        for one in found
    ]
    lines = columns([("path", "model", "documents", "passages kept", "tokens", "MB", "pinned"), *rows])
    show({"indexes": [asdict(one) for one in found]}, lines, "index ls", as_json=json)


@app.command("rm")
def rm(
    paths: Indexed = None,
    every: Annotated[bool, typer.Option("--all", help="Everything.")] = False,
    json: Json = False,
) -> None:
    """Delete what is indexed, and the KV that only it holds."""
    from agentctx.corpus.held import remove

    if bool(paths) == every:
        raise ConfigError("name paths, or pass --all", hint="agentctx index ls")
    freed = remove(Paths.default(), None if every else [os.path.realpath(path) for path in paths or ()])
    show({"freed": freed}, [f"{freed / 1e6:.1f} MB freed"], "index rm", as_json=json)


@app.command("pin")
def pin(paths: Named, json: Json = False) -> None:
    """Keep the KV of indexed paths on disk, whatever else is read; `kv_bytes` still holds."""
    from agentctx.corpus.held import pin
    from agentctx.settings import Settings

    roots = [os.path.realpath(path) for path in paths]
    missing = pin(Paths.default(), roots, budget=Settings.load({}).kv_bytes)
    if missing:
        print(f"warning: {missing} passages are not on disk any more (agentctx index PATH)", file=sys.stderr)
    show(
        {"pinned": roots, "missing": missing},
        [f"pinned: {root}" for root in roots],
        "index pin",
        as_json=json,
    )


@app.command("unpin")
def unpin(paths: Named, json: Json = False) -> None:
    """Let the KV of indexed paths make room again."""
    from agentctx.corpus.held import unpin

    roots = [os.path.realpath(path) for path in paths]
    unpin(Paths.default(), roots)
    show({"unpinned": roots}, [f"unpinned: {root}" for root in roots], "index unpin", as_json=json)


@app.command("verify")
def verify(
    paths: Indexed = None,
    json: Json = False,
) -> None:
    """Read all that is kept and compare the files with what was indexed; exits with 1 if anything differs."""
    from agentctx.corpus.held import listed, verify

    roots = [os.path.realpath(path) for path in paths or ()]
    known = {one.root for one in listed(Paths.default())}
    if unknown := sorted(set(roots) - known):
        raise InputError(f"{unknown[0]} is in no index", code="not_found", hint="agentctx index ls")
    problems = verify(Paths.default(), roots)
    lines = [one_line(f"{one.kind}: {one.source}: {one.message}") for one in problems] or [
        "all is as it was indexed"
    ]
    show({"problems": [asdict(one) for one in problems]}, lines, "index verify", as_json=json)
    if problems:
        print("hint: index the paths again; what is unchanged is not read again", file=sys.stderr)
        raise typer.Exit(exits.FAILURE)


def _timed(progress: Progress, path: str) -> Callable[[int, int], None]:
    """Shows the share of tokens that are read, and the time that the rest will take at this rate."""
    began = time.monotonic()
    progress.stage(f"indexing {path}", 0, None)

    def told(done: int, total: int) -> None:
        left = (time.monotonic() - began) * (total - done) / max(1, done)
        minutes, seconds = divmod(round(left), 60)
        progress.stage(f"indexing {path}, {minutes}:{seconds:02d} left:", done, total)

    return told
