"""Content-addressed store of texts, and of documents beside them.

    root/9f/9f2c….txt                   the text in UTF-8; its name is the SHA-256 of its bytes
    root/9f/9f2c….<source key>.json     source, media type and locators of one document with that text

A text is stored once however many documents have it. Everything is checked when read: disks and editors
change bytes, and an offset into a changed text would cite something else.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import astuple
from pathlib import Path

from agentctx.memory.atomic import storing, write_bytes
from agentctx.memory.errors import StoreError
from agentctx.memory.types import Document, Locator

SCHEMA_VERSION = 1
ID = re.compile("[0-9a-f]{64}")


class Blobs:
    """Safe for many processes at once: writes are atomic and two writers of one id write the same."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, text: str) -> str:
        """Store `text` and return its id, which is that of `Document.of(text)`. A damaged copy is mended."""
        data = text.encode()
        id = _digest(data)
        self._write(self._text_path(id), data)
        return id

    def get(self, id: str) -> str:
        """The text. Raises StoreError `missing` or `damaged`."""
        data = self._read(self._text_path(id), f"text {id}")
        if _digest(data) != id:
            raise _damaged(f"text {id}", self._text_path(id))
        return data.decode()

    def __contains__(self, id: str) -> bool:
        return ID.fullmatch(id) is not None and self._text_path(id).is_file()

    def put_document(self, document: Document) -> None:
        """Store the text and what else the document says of it."""
        self.put(document.text)
        record = {
            "schema_version": SCHEMA_VERSION,
            "id": document.id,
            "source": document.source,
            "media_type": document.media_type,
            "locators": [astuple(locator) for locator in document.locators],
        }
        body = json.dumps(record, ensure_ascii=False).encode()
        self._write(self._record_path(document.id, document.source), _digest(body).encode() + b"\n" + body)

    def get_document(self, id: str, source: str) -> Document:
        """The document as it was put. Raises StoreError `missing`, `damaged`, or `version`."""
        path = self._record_path(id, source)
        digest, _, body = self._read(path, f"document {source!r}").partition(b"\n")
        if _digest(body).encode() != digest:
            raise _damaged(f"document {source!r}", path)
        record = json.loads(body)
        if record["schema_version"] != SCHEMA_VERSION:
            message = f"document {source!r} has schema {record['schema_version']}, this version reads"
            raise StoreError(f"{message} {SCHEMA_VERSION}", code="version", hint="upgrade agentctx")
        locators = tuple(Locator(*locator) for locator in record["locators"])
        return Document(id, record["source"], self.get(id), record["media_type"], locators)

    def drop_document(self, id: str, source: str) -> None:
        """Delete what is said of the document, and the text with the last document that has it."""
        text = self._text_path(id)
        with storing(text):
            self._record_path(id, source).unlink(missing_ok=True)
            if not any(text.parent.glob(f"{id}.*.json")):
                text.unlink(missing_ok=True)

    def _text_path(self, id: str) -> Path:
        if not ID.fullmatch(id):
            raise StoreError(f"{id!r} is no document id", code="missing", hint="an id is a SHA-256 in hex")
        return self.root / id[:2] / f"{id}.txt"

    def _record_path(self, id: str, source: str) -> Path:
        return self._text_path(id).with_suffix(f".{_digest(source.encode())[:32]}.json")

    def _write(self, path: Path, data: bytes) -> None:
        try:
            if not path.is_file() or path.read_bytes() != data:
                write_bytes(path, data)
        except OSError as error:
            message = f"cannot write {path}: {error.strerror or error}"
            hint = "free some space, or point AGENTCTX_HOME to a folder that can be written"
            raise StoreError(message, code="write", hint=hint) from error

    def _read(self, path: Path, what: str) -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            message, code = f"{what} is not in the store {self.root}", "missing"
        except OSError as error:
            message, code = f"cannot read {path}: {error.strerror or error}", "store"
        raise StoreError(message, code=code, hint="open its source again")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _damaged(what: str, path: Path) -> StoreError:
    message = f"{what} is damaged: {path} does not match its SHA-256"
    return StoreError(message, code="damaged", hint="delete the file and open its source again")
