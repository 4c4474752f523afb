"""Which documents the blocks of a KV store were read from: they can be listed and deleted by document.

    root/<model>/documents/<hash>.names     the source of a document, then a block's name on each line

Blocks are shared by all texts that begin alike, so a block belongs to every document that names it. The files
are only ever appended to, and names of blocks that are gone are left out when they are read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agentctx.memory.atomic import make_private
from agentctx.memory.kv.shelf import SUFFIX, Shelf

FOLDER = "documents"


@dataclass(frozen=True, slots=True)
class Owned:
    """What is kept of one document for all models; blocks that others name as well count for each of them."""

    document: str
    models: tuple[str, ...]  # names as in `Held`
    blocks: int
    bytes: int
    used: float  # seconds since the epoch


class Owners:
    """The names that documents give to the blocks of one model under `folder`. Safe for several processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written: dict[str, set[str]] = {}  # what need not be written again

    def name(self, document: str, blocks: Iterable[str]) -> None:
        """These blocks hold text of `document`. Nothing is written if the disk does not take it."""
        path = self._path(document)
        known = self._written.setdefault(document, set())
        if not path.exists():  # or deleted since, by whomever
            known.clear()
        fresh = [block for block in blocks if block not in known]
        with suppress(OSError):
            if not fresh:
                path.touch()
                return
            make_private(path.parent)
            head = "" if known or path.exists() else json.dumps(document) + "\n"
            with open(path, "a", opener=_private) as file:
                file.write(head + "".join(f"{block}\n" for block in fresh))
            known |= set(fresh)

    def _path(self, document: str) -> Path:
        digest = hashlib.blake2b(document.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        return self.folder / FOLDER / f"{digest}.names"


def owned(shelf: Shelf) -> list[Owned]:
    """What is kept of every document, the one used last first."""
    found: dict[str, Owned] = {}
    names = {held.model: held.name for held in shelf.held()}
    for path, document, blocks in _files(shelf.root):
        with suppress(FileNotFoundError):
            used = path.stat().st_mtime
            sizes = [block.stat().st_size for block in blocks]
            held = found.get(document) or Owned(document, (), 0, 0, used)
            model = names.get(path.parent.parent.name, path.parent.parent.name)
            found[document] = Owned(
                document,
                tuple(sorted({*held.models, model})),
                held.blocks + len(blocks),
                held.bytes + sum(sizes),
                max(held.used, used),
            )
    return sorted((one for one in found.values() if one.blocks), key=lambda one: (-one.used, one.document))


def forget(shelf: Shelf, documents: Iterable[str]) -> int:
    """Delete the blocks that these documents name and no other does; returns the bytes freed.

    Raises StoreError (unwritable).
    """
    wanted = set(documents)
    lists = list(_files(shelf.root))
    kept = {block for _, document, blocks in lists if document not in wanted for block in blocks}
    gone = [path for path, document, _ in lists if document in wanted]
    named = {block for _, document, blocks in lists if document in wanted for block in blocks}
    return shelf.delete([*gone, *sorted(named - kept)])


def _files(root: Path) -> list[tuple[Path, str, list[Path]]]:
    """Each list of names: where it is, of which document, and those of its blocks that are there."""
    found = []
    for path in sorted(root.glob(f"*/{FOLDER}/*.names")):
        with suppress(OSError, ValueError):  # a list that cannot be read names nothing
            head, *names = path.read_text().splitlines()
            blocks = [
                path.parent.parent / name[:2] / f"{name}{SUFFIX}"
                for name in dict.fromkeys(names)
                if name.isalnum()
            ]
            found.append((path, str(json.loads(head)), [block for block in blocks if block.exists()]))
    return found


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
