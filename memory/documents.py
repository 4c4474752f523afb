"""Open files, directories and standard input as documents with exact offsets.

One bad source never ends a run: it becomes a `Notice` with a code and a reason, and the rest goes on. Only if
nothing at all can be read is there an error, that of the first source.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from agentctx.memory.errors import InputError
from agentctx.memory.loaders.isolation import Worker
from agentctx.memory.loaders.load import Loaded, load
from agentctx.memory.loaders.table import BINARY_BYTES
from agentctx.memory.selection import Selection as Selection
from agentctx.memory.types import Document, Notice
from agentctx.memory.walk import walk

MAX_TOTAL_BYTES = 2_000_000_000
STDIN = "<stdin>"
EVERYTHING = Selection()


@dataclass(frozen=True, slots=True)
class Corpus:
    """What was opened, in the order of the paths, sorted inside each directory."""

    documents: tuple[Document, ...]
    skipped: tuple[Notice, ...]  # sources that gave nothing, by InputError's codes
    warnings: tuple[Notice, ...]  # encoding_guessed, encoding_damaged, corrupt, no_text_layer, duplicate, …


def open_documents(
    paths: Sequence[str | Path], *, selection: Selection = EVERYTHING, stdin: BinaryIO | None = None
) -> Corpus:
    """Read every path: files as named, directories by `selection`, "-" from `stdin` as `<stdin>`.

    A file is called as it was named, a file in a directory by its path from there with the directory's name
    in front; of two directories with one name, the second is called as it was named. Of equal texts one
    document is kept. Raises InputError if nothing could be read.
    """
    with Worker() as worker:
        opening = _Opening(selection, worker)
        for path in paths:
            opening.open(path, stdin)
    return opening.corpus()


class _Opening:
    """The state of one `open_documents`."""

    def __init__(self, selection: Selection, worker: Worker) -> None:
        self.selection = selection
        self.worker = worker
        self.documents: dict[str, Document] = {}  # by id
        self.problems: list[InputError] = []
        self.warnings: list[Notice] = []
        self.seen: set[str] = set()  # real paths
        self.roots: dict[str, Path] = {}  # of directories, by the name in front of their files
        self.total_bytes = 0

    def open(self, path: str | Path, stdin: BinaryIO | None) -> None:
        if str(path) == "-":
            self._stdin(stdin)
        elif "\0" in str(path):
            message = f"{str(path)!r}: no file has a NUL in its name"
            self.problems.append(InputError(message, code="not_found", source=str(path)))
        elif os.path.isdir(path):
            self._directory(Path(path))
        else:
            self._file(path, _printable_name(str(path)))

    def corpus(self) -> Corpus:
        if not self.documents:
            self._nothing()
        skipped = tuple(Notice(error.code, error.message, error.source) for error in self.problems)
        return Corpus(tuple(self.documents.values()), skipped, tuple(self.warnings))

    def _nothing(self) -> None:
        if not self.problems:
            raise InputError("nothing to read", code="empty", hint="name a file, a directory, or - for stdin")
        first = self.problems[0]
        others = len(self.problems) - 1
        message = first.message + (f" (and {others} more skipped, nothing could be read)" if others else "")
        raise InputError(message, code=first.code, source=first.source, hint=first.hint)

    def _stdin(self, stdin: BinaryIO | None) -> None:
        """Copy to a file first: readers seek, and the worker opens a path."""
        if stdin is None:
            self.problems.append(InputError("no standard input", code="not_found", source=STDIN))
            return
        limit = self.selection.max_file_bytes or BINARY_BYTES
        with tempfile.NamedTemporaryFile(prefix="agentctx-") as copy:
            while copy.tell() <= limit and (block := stdin.read(1 << 20)):
                copy.write(block)
            copy.flush()
            self._file(copy.name, STDIN)

    def _directory(self, path: Path) -> None:
        found = walk(path, self.selection)
        name = found.root.name or "/"
        if self.roots.setdefault(name, found.root) != found.root:
            name = str(path)
            self.roots[name] = found.root
        for file in found.files:
            self._file(file, _printable_name(os.path.join(name, file.relative_to(found.root))))
        for secret in found.secrets:
            source = _printable_name(os.path.join(name, secret.relative_to(found.root)))
            self.warnings.append(
                Notice("secret", "left out: it may hold a secret; name it to read it", source)
            )
        self.problems += found.problems
        if not found.files and not found.problems:
            message = f"no files in {_printable_name(str(path))}"
            hint = ""
            if found.left_out or found.secrets:
                message += f", {found.left_out + len(found.secrets)} entries are hidden or ignored"
                hint = "--hidden, --no-ignore, --include and --exclude choose"
            self.problems.append(InputError(message, code="empty", source=str(path), hint=hint))

    def _file(self, path: str | Path, source: str) -> None:
        real = os.path.realpath(path)
        if real in self.seen:
            return
        self.seen.add(real)
        try:
            if self.total_bytes >= MAX_TOTAL_BYTES:
                message = f"{source}: not read, the files before it come to {self.total_bytes:,} bytes"
                raise InputError(message, code="too_large", source=source, hint="name fewer files at once")
            encoding = self.selection.encoding_of(source)
            loaded = load(
                path, source, self.worker, encoding=encoding, max_bytes=self.selection.max_file_bytes
            )
        except InputError as error:
            self.problems.append(error)
        else:
            self._keep(loaded)

    def _keep(self, loaded: Loaded) -> None:
        document = loaded.document
        self.total_bytes += loaded.size
        self.warnings += loaded.notices
        first = self.documents.setdefault(document.id, document)
        if first is not document:
            message = f"same text as {first.source}, kept under that name"
            self.warnings.append(Notice("duplicate", message, document.source))


def _printable_name(path: str) -> str:
    """The path with bytes that are no UTF-8 replaced: names travel in JSON and to terminals."""
    return os.fsencode(path).decode(errors="replace")
