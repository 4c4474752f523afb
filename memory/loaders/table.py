"""Every format in one table, and how a file is matched to a row.

Readers are named, not imported: a run over text files loads no PDF library. A reader is
`(file, encoding) -> Iterator[Part]`. Content beats the extension for PDF and ZIP.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, BinaryIO

from agentctx.memory.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from agentctx.memory.loaders.parts import Part

    Reader = Callable[[BinaryIO, str | None], Iterator[Part]]

TEXT_BYTES = 50_000_000
BINARY_BYTES = 200_000_000
SNIFF_BYTES = 16
EDGE_BYTES = 256 * 1024  # where the names of an archive's members are looked for, at both ends
LOADERS = "agentctx.memory.loaders"
OOXML = "application/vnd.openxmlformats-officedocument"


@dataclass(frozen=True, slots=True)
class Format:
    """One row: what a format is called, who reads it and within which limits."""

    media_type: str
    reader: str  # "module:function"
    extensions: tuple[str, ...] = ()
    max_bytes: int = TEXT_BYTES
    isolated: bool = False  # read in the worker process: a hostile file can hang the reader or eat memory
    package: str = ""  # what an extra installs
    extra: str = ""
    member: bytes = b""  # a name or type inside the archive that tells this format from other archives

    def check_installed(self) -> None:
        """Raise InputError `missing_extra` if the package of the extra is absent."""
        if self.package and find_spec(self.package) is None:
            message = f"reading {self.extensions[0]} files needs the extra {self.extra!r}"
            hint = f"pip install 'agentctx[{self.extra}]'"
            raise InputError(message, code="missing_extra", hint=hint)


def _office(extension: str, kind: str, package: str, member: bytes) -> Format:
    reader = f"{LOADERS}.office:read_{extension}"
    media_type = f"{OOXML}.{kind}"
    return Format(media_type, reader, (f".{extension}",), BINARY_BYTES, True, package, "office", member)


TEXT = Format("text/plain", f"{LOADERS}.text:read")
PDF = Format("application/pdf", f"{LOADERS}.pdf:read", (".pdf",), BINARY_BYTES, True)
ARCHIVES = (
    Format(
        "application/epub+zip",
        f"{LOADERS}.epub:read",
        (".epub",),
        BINARY_BYTES,
        True,
        member=b"mimetypeapplication/epub+zip",
    ),
    _office("docx", "wordprocessingml.document", "docx", b"word/document.xml"),
    _office("pptx", "presentationml.presentation", "pptx", b"ppt/presentation.xml"),
    _office("xlsx", "spreadsheetml.sheet", "openpyxl", b"xl/workbook.xml"),
)
FORMATS = (
    TEXT,
    PDF,
    *ARCHIVES,
    Format("text/html", f"{LOADERS}.html:read", (".html", ".htm", ".xhtml"), isolated=True),
    Format("text/markdown", f"{LOADERS}.text:read_markdown", (".md", ".markdown")),
    Format("text/csv", f"{LOADERS}.records:read_csv", (".csv",)),
    Format("text/tab-separated-values", f"{LOADERS}.records:read_csv", (".tsv",)),
    Format("application/json", f"{LOADERS}.records:read_json", (".json",)),
    Format("application/jsonl", f"{LOADERS}.records:read_jsonl", (".jsonl", ".ndjson")),
)
BY_EXTENSION = {extension: row for row in FORMATS for extension in row.extensions}
ZIP = b"PK\x03\x04"
FOREIGN = (  # starts of files that look like something else, and what to do about it
    (b"{\\rtf", "an RTF file", "save it as docx or text"),
    (ZIP, "a ZIP archive", "unpack it and name the folder"),
)
OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
OLE_ENCRYPTED = "EncryptedPackage".encode("utf-16-le")


def format_of(name: str, file: BinaryIO) -> Format:
    """The row for a file by content and name; leaves `file` at its start.

    Raises InputError `unsupported` for archives and office formats that nothing here reads, and `encrypted`
    for an office file behind a password.
    """
    head = file.read(SNIFF_BYTES)
    row = BY_EXTENSION.get(os.path.splitext(name)[1].lower(), TEXT)
    try:
        if head.startswith(OLE):
            raise _old_office(head + file.read(BINARY_BYTES))
        if head.startswith(b"%PDF-"):
            return PDF
        if head.startswith(ZIP):
            row = _archive(file) or row
        for start, what, hint in FOREIGN:
            if head.startswith(start) and row not in ARCHIVES:
                raise InputError(what, code="unsupported", hint=hint)
    finally:
        file.seek(0)
    return row


def reader_of(name: str) -> Reader:
    """Import the reader "module:function"."""
    module, _, function = name.partition(":")
    reader: Reader = getattr(import_module(module), function)
    return reader


def _archive(file: BinaryIO) -> Format | None:
    file.seek(0)
    head = file.read(EDGE_BYTES)
    file.seek(max(file.seek(0, 2) - EDGE_BYTES, 0))
    edges = head + file.read()
    return next((row for row in ARCHIVES if row.member in edges), None)


def _old_office(data: bytes) -> InputError:
    if OLE_ENCRYPTED in data:
        hint = "save a copy without the password"
        return InputError("an office file behind a password", code="encrypted", hint=hint)
    hint = "save it as docx, pptx or xlsx"
    return InputError("an office file of the formats before 2007", code="unsupported", hint=hint)
