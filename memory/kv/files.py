"""The files of the KV store: blocks in a folder for each model, and lists of their names beside them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from agentctx.memory.atomic import make_private

SUFFIX = ".kv"
BLOCKS = f"*/*{SUFFIX}"  # in the folder of a model
LISTS = "lists/*.names"


def block_file(folder: Path, name: str) -> Path:
    """Where a block is, or would be, in the folder of its model."""
    return folder / name[:2] / f"{name}{SUFFIX}"


def files_of(folder: Path, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
    for path in list(folder.glob(pattern)):
        with suppress(FileNotFoundError):
            yield path, path.stat()


def lines_of(path: Path) -> list[str]:
    """Of a list; empty if it is not there or cannot be read."""
    try:
        return path.read_bytes().decode().splitlines()
    except (OSError, ValueError):
        return []


def joined(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def listed_blocks(path: Path, names: Iterable[str]) -> list[Path]:
    """Those blocks on the list at `path` that are there."""
    found = [block_file(path.parent.parent, name) for name in names if name.isalnum()]
    return [block for block in found if block.exists()]


def delete(path: Path) -> int:
    """Returns the bytes of what was deleted."""
    try:
        size = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size


def write(path: Path, data: bytes) -> None:
    make_private(path.parent)
    handle, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        delete(Path(temporary))
        raise


def sweep(root: Path) -> int:
    """Take names off the lists of every model whose blocks are gone; returns the bytes freed."""
    freed = 0
    for path, status in files_of(root, f"*/{LISTS}"):
        head, *names = lines_of(path) or [""]
        left = [block.stem for block in listed_blocks(path, names)]
        if not left:
            freed += delete(path)
        elif len(left) < len(names):
            write(path, data := joined([head, *left]))
            os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
            freed += status.st_size - len(data)
    return freed
