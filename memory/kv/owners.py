"""Which documents the blocks of a KV store were read from: they can be listed and deleted by document.

What was read together is on one list, under the sources of all documents that it is text of. A block belongs
to a document if the text of the document stands in it or before it, so that its keys and values depend on it.
What stands before every document, such as the instructions of a prompt, belongs to none.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from agentctx.memory.kv.shelf import Shelf


@dataclass(frozen=True, slots=True)
class Owned:
    """What is kept of one document for all models (None: of none). Blocks of several count for each."""

    document: str | None
    models: tuple[str, ...]  # names as in `Held`
    blocks: int
    bytes: int
    used: float  # seconds since the epoch


@dataclass
class _Found:
    blocks: set[Path] = field(default_factory=set)
    used: float = 0.0


def name_blocks(shelf: Shelf, model: str, names: Iterable[str], documents: Collection[str]) -> None:
    """These blocks of a model hold text of `documents`. Raises StoreError (no_space, unwritable)."""
    shelf.note(model, json.dumps(sorted(set(documents))), names)


def owned(shelf: Shelf) -> list[Owned]:
    """What is kept of every document, the one used last first; then what is of none."""
    found: dict[str, _Found] = {}
    for documents, blocks, used in _lists(shelf):
        for document in documents:
            one = found.setdefault(document, _Found())
            one.blocks.update(blocks)
            one.used = max(one.used, used)
    names = {held.model: held.name for held in shelf.held()}
    rows = [_owned(document, one, names) for document, one in found.items() if one.blocks]
    rows.sort(key=lambda one: (-one.used, str(one.document)))
    rest = _Found(set(shelf.blocks()).difference(*(one.blocks for one in found.values())))
    return [*rows, _owned(None, rest, names)] if rest.blocks else rows


def forget(shelf: Shelf, documents: Iterable[str]) -> int:
    """Delete every block that belongs to one of these documents, whoever else it belongs to; returns the
    bytes freed. Raises StoreError (unwritable).
    """
    wanted = set(documents)
    return shelf.delete({block for named, blocks, _ in _lists(shelf) if wanted & named for block in blocks})


def _lists(shelf: Shelf) -> list[tuple[set[str], list[Path], float]]:
    """Sources of documents, the blocks that are there of what was read of them together, the last use."""
    found = []
    for one in shelf.lists():
        with suppress(ValueError, TypeError):  # a list of nobody knows whom names nothing
            found.append((set(json.loads(one.head)), one.blocks, one.used))
    return found


def _owned(document: str | None, one: _Found, names: dict[str, str]) -> Owned:
    size, used = 0, one.used
    for block in one.blocks:
        with suppress(FileNotFoundError):
            size += (status := block.stat()).st_size
            used = max(used, status.st_mtime)
    models = {block.parent.parent.name for block in one.blocks}
    return Owned(
        document, tuple(sorted({names.get(model, model) for model in models})), len(one.blocks), size, used
    )
