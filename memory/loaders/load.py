"""One file to one Document: check it, choose the reader, read within limits, put the parts together."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, replace
from typing import BinaryIO

from agentctx.memory.errors import InputError
from agentctx.memory.loaders.isolation import Worker
from agentctx.memory.loaders.parts import Part, join
from agentctx.memory.loaders.table import Format, format_of, reader_of
from agentctx.memory.types import Document, Notice


@dataclass(frozen=True, slots=True)
class Loaded:
    """A document, what a user should know about it, and the bytes it took."""

    document: Document
    notices: tuple[Notice, ...]
    size: int


def load(
    path: str | os.PathLike[str],
    source: str,
    worker: Worker,
    *,
    encoding: str | None = None,
    max_bytes: int | None = None,
) -> Loaded:
    """Read the file at `path` as `source`. `max_bytes` replaces the limit of the format.

    Raises InputError with every code of its list but `outside`. What was read before a fault is kept, with
    the fault as a notice.
    """
    path = os.fspath(path)
    try:
        check_regular(path)
        with open(path, "rb") as file:
            return _load(file, path, source, worker, encoding, max_bytes)
    except OSError as error:
        code = "permission" if isinstance(error, PermissionError) else "not_found"
        raise InputError(f"{source}: {error.strerror or error}", code=code, source=source) from error
    except InputError as error:
        if error.source:
            raise
        message = f"{source}: {error.message}"
        raise InputError(message, code=error.code, source=source, hint=error.hint) from error


def check_regular(path: str) -> None:
    """Raise InputError for what is no file: opening a pipe would wait for its other end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        hint = "to read a pipe, give '-' and pass it on standard input"
        raise InputError("neither a file nor a directory", code="unsupported", hint=hint)


def _load(
    file: BinaryIO, path: str, source: str, worker: Worker, encoding: str | None, max_bytes: int | None
) -> Loaded:
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise InputError("an empty file", code="empty")
    row = format_of(source, file)
    limit = max_bytes or row.max_bytes
    if size > limit:
        hint = "raise --max-file-bytes, or split it"
        raise InputError(f"{size:,} bytes, the limit is {limit:,}", code="too_large", hint=hint)
    row.check_installed()
    parts, stopped = _read(row, file, path, worker, encoding)
    text, locators = join(parts)
    if not text.strip():
        raise stopped or InputError("nothing but white space", code="empty")
    notices = [notice for part in parts for notice in part.notices]
    if stopped:
        notices.append(Notice(stopped.code, f"kept what came before the fault: {stopped.message}"))
    document = Document.of(text, source, media_type=row.media_type, locators=locators)
    return Loaded(document, tuple(replace(notice, source=source) for notice in notices), size)


def _read(
    row: Format, file: BinaryIO, path: str, worker: Worker, encoding: str | None
) -> tuple[list[Part], InputError | None]:
    if row.isolated:
        return worker.read(row.reader, path, encoding)
    return list(reader_of(row.reader)(file, encoding)), None
