"""Which sources a command reads: those that were named, standard input, or the current directory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from agentctx.cli.options import Options
from agentctx.memory.errors import ConfigError

if TYPE_CHECKING:
    from agentctx.memory.selection import Selection


def selection_of(options: Options) -> Selection:
    """The flags that choose files."""
    from agentctx.memory.selection import Selection

    return Selection(
        include=tuple(options.include or ()),
        exclude=tuple(options.exclude or ()),
        hidden=options.hidden,
        no_ignore=options.no_ignore,
        encodings=tuple(options.encoding or ()),
        max_file_bytes=options.max_file_bytes,
        max_files=options.max_files,
    )


def sources_of(paths: Sequence[str], options: Options, selection: Selection) -> list[str]:
    """The sources to open. The current directory is read only after it was counted and agreed to."""
    if paths:
        return list(paths)
    if sys.stdin and not sys.stdin.isatty():
        return ["-"]
    _agree_to_directory(options, selection)
    return ["."]


def _agree_to_directory(options: Options, selection: Selection) -> None:
    from agentctx.memory.walk import walk

    files = walk(Path(), selection).files
    size = sum(file.stat().st_size for file in files)
    counted = f"{len(files):,} files, {size / 1e6:,.1f} MB, in {Path.cwd()}"
    if options.yes:
        print(f"reading {counted}", file=sys.stderr)
    elif not sys.stderr.isatty():
        raise ConfigError(f"no path was named: {counted}", hint="name paths, or pass --yes to read all of it")
    elif not typer.confirm(f"read {counted}?", default=True, err=True):
        raise ConfigError("nothing to read", hint="name files or directories")
