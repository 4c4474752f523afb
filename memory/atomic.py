"""Write a file so that a crash at any moment leaves the old content or the new, never a part.

The data goes to a temporary file in the same folder, to the disk, and then under its name; last the folder
itself goes to the disk, since the name is kept there. What is written may be private text: files get mode
0600 and new folders 0700.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EDQUOT, ENOSPC
from pathlib import Path

from agentctx.memory.errors import StoreError

HINTS = {
    "no_space": "free some space, or set AGENTCTX_HOME to another disk",
    "unwritable": "check who may write there",
}


@contextmanager
def storing(path: Path | str) -> Iterator[None]:
    """Raise StoreError, no_space or unwritable, for what the file system refuses at `path`."""
    try:
        yield
    except OSError as error:
        code = "no_space" if error.errno in (ENOSPC, EDQUOT) else "unwritable"
        message = f"{path} cannot be written: {error.strerror or error}"
        raise StoreError(message, code=code, hint=HINTS[code]) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, making its folders. An OSError leaves everything as it was."""
    make_private(path.parent)
    handle, temporary = tempfile.mkstemp(
        prefix=f".{path.name[:100]}.", dir=path.parent
    )  # made with mode 0600
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def make_private(folder: Path) -> None:
    """Make `folder` and what is missing above it, each with mode 0700."""
    if not folder.is_dir():
        make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
