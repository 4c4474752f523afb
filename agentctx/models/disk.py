"""Writing files that are either whole or absent, with the failures of a disk as typed errors."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agentctx.memory.errors import ModelError, StoreError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Translate the failures of the disk at `place`: a full one is a ModelError, others are StoreErrors."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise no_space(place) from error
        raise StoreError(
            f"cannot write under {place}: {error.strerror or error}",
            hint="check the rights, or set AGENTCTX_HOME to a folder you own",
        ) from error


def no_space(place: Path, *, needed: int = 0, free: int = 0) -> ModelError:
    """The error for a disk without room; sizes in bytes."""
    numbers = f": {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free" if needed else ""
    return ModelError(
        f"no space left for the model under {place}{numbers}",
        code="no_space",
        hint="free some space, or set AGENTCTX_HOME to a folder on a larger disk",
    )


def private_folder(folder: Path) -> Path:
    """Make `folder` and its parents if absent; others may not look into it."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


def flush(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: a crash at any moment leaves the old file or the new one."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        part.chmod(0o600)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    flush(path.parent)
