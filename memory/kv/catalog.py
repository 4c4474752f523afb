"""What an index holds, by the paths it was made of: documents, their passages, and where the KV of those is.

A passage is known by its text, so documents that share one share what is kept of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentctx.memory.database import Database

SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE documents (root TEXT NOT NULL, source TEXT NOT NULL, id TEXT NOT NULL, passages TEXT NOT NULL,
    PRIMARY KEY (root, source));
CREATE TABLE passages (name TEXT PRIMARY KEY, tokens INTEGER NOT NULL, blocks TEXT NOT NULL)
"""


@dataclass(frozen=True, slots=True)
class Passage:
    """`tokens` of its text, and the names of the blocks that hold its KV."""

    name: str
    tokens: int
    blocks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Listed:
    """What was indexed under one path: the `passages` that were read, of `total`."""

    root: str
    documents: int
    total: int
    passages: tuple[Passage, ...]


def passage_name(text: str) -> str:
    """The name of a passage."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()


class Catalog:
    """Over a `database` that has `SCHEMA`. Raises StoreError as that does."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def fact(self, name: str) -> bytes | None:
        """What was written down about the index as a whole."""
        rows = self.database.rows("SELECT value FROM facts WHERE name = ?", (name,))
        return bytes(rows[0][0]) if rows else None

    def state(self, facts: Mapping[str, bytes]) -> None:
        """Write facts down, those that are not there yet."""
        with self.database.write() as db:
            db.executemany("INSERT OR IGNORE INTO facts VALUES (?, ?)", list(facts.items()))

    def add(self, passages: Iterable[Passage]) -> None:
        rows = [(one.name, one.tokens, json.dumps(one.blocks)) for one in passages]
        with self.database.write() as db:
            db.executemany("INSERT OR REPLACE INTO passages VALUES (?, ?, ?)", rows)

    def passages(self, names: Iterable[str] | None = None) -> dict[str, Passage]:
        """Those of these names that there are; None: all."""
        if names is None:
            rows = self.database.rows("SELECT * FROM passages")
        else:
            sql = "SELECT * FROM passages WHERE name IN (SELECT value FROM json_each(?))"
            rows = self.database.rows(sql, (json.dumps(list(set(names))),))
        return {one.name: one for one in map(_passage, rows)}

    def enter(self, root: str, documents: Mapping[str, tuple[str, Sequence[str]]]) -> bool:
        """A path holds these now: source to document id and names of passages. What it held is forgotten;
        returns whether that was anything.
        """
        rows = [(root, source, id_, json.dumps(list(names))) for source, (id_, names) in documents.items()]
        with self.database.write() as db:
            before = db.execute("DELETE FROM documents WHERE root = ?", (root,)).rowcount
            db.executemany("INSERT INTO documents VALUES (?, ?, ?, ?)", rows)
        return before > 0

    def roots(self) -> list[str]:
        return [root for (root,) in self.database.rows("SELECT DISTINCT root FROM documents ORDER BY root")]

    def documents(self, root: str) -> dict[str, str]:
        """Source to document id, of one path."""
        return dict(self.database.rows("SELECT source, id FROM documents WHERE root = ?", (root,)))

    def listed(self, root: str) -> Listed:
        rows = self.database.rows("SELECT passages FROM documents WHERE root = ?", (root,))
        names = {name for (found,) in rows for name in json.loads(found)}
        return Listed(root, len(rows), len(names), tuple(self.passages(names).values()))

    def unused(self) -> list[Passage]:
        """Passages of no document: of earlier states of changed files, or of paths that were taken out."""
        rows = self.database.rows(
            "SELECT * FROM passages WHERE name NOT IN"
            " (SELECT value FROM documents, json_each(documents.passages))"
        )
        return [_passage(row) for row in rows]

    def leave(self, roots: Iterable[str]) -> None:
        """Forget these paths, and that they are pinned; their passages stay until `drop`."""
        rows = [(root,) for root in roots]
        with self.database.write() as db:
            db.executemany("DELETE FROM documents WHERE root = ?", rows)
            db.executemany("DELETE FROM facts WHERE name = 'pinned ' || ?", rows)

    def pinned(self) -> list[str]:
        """The paths whose KV stays on disk."""
        rows = self.database.rows(
            "SELECT substr(name, 8) FROM facts WHERE name LIKE 'pinned %' ORDER BY name"
        )
        return [root for (root,) in rows]

    def pin(self, root: str) -> None:
        self.state({f"pinned {root}": b""})

    def unpin(self, root: str) -> None:
        with self.database.write() as db:
            db.execute("DELETE FROM facts WHERE name = 'pinned ' || ?", (root,))

    def blocks(self, root: str) -> list[str]:
        """The blocks of all that was read of a path."""
        return [name for one in self.listed(root).passages for name in one.blocks]

    def drop(self, passages: Iterable[Passage]) -> None:
        with self.database.write() as db:
            db.executemany("DELETE FROM passages WHERE name = ?", [(one.name,) for one in passages])


def _passage(row: Sequence[Any]) -> Passage:
    name, tokens, blocks = row
    return Passage(name, tokens, tuple(json.loads(blocks)))
