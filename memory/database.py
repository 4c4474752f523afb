"""A small SQLite database that several processes share: one writer at a time, and typed errors."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentctx.memory.atomic import HINTS, make_private, storing
from agentctx.memory.errors import StoreError

WAIT = 60.0  # seconds for another process that writes
_CODES = {
    sqlite3.SQLITE_FULL: "no_space",
    sqlite3.SQLITE_IOERR: "unwritable",
    sqlite3.SQLITE_READONLY: "unwritable",
    sqlite3.SQLITE_CANTOPEN: "unwritable",
    sqlite3.SQLITE_BUSY: "locked",
    sqlite3.SQLITE_LOCKED: "locked",
    sqlite3.SQLITE_CORRUPT: "corrupt",
    sqlite3.SQLITE_NOTADB: "corrupt",
}
_HINTS = HINTS | {
    "locked": "another process writes to it: try again",
    "corrupt": "delete it and make it again: what it was made from is not lost",
}


class Database:
    """The file at `path`, made with `schema` if it is new. Safe for several threads.

    With `renew` the schema is run over another version too: it drops what it makes again. All of it raises
    StoreError: corrupt, locked, no_space, unwritable, or version where `version` differs.
    """

    def __init__(self, path: Path, schema: str, version: int, *, renew: bool = False) -> None:
        self.path = path
        self._lock = threading.RLock()
        with self._explained():
            make_private(path.parent)
            self._db = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(schema, version, renew)
        except BaseException:
            self._db.close()
            raise

    def _prepare(self, schema: str, version: int, renew: bool) -> None:
        with self._explained():
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            with self.write():
                (found,) = self.one("PRAGMA user_version")
                if not found or (renew and found != version):
                    for statement in schema.split(";"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version = {version}")
        if found not in (0, version) and not renew:
            raise StoreError(
                f"{self.path} has version {found}, this program reads {version}",
                code="version",
                hint="delete it with `agentctx index rm --all` and index again",
            )

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it or nothing, and nobody else writes meanwhile."""
        with self._lock, self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def rows(self, sql: str, args: Sequence[Any] = ()) -> list[Any]:
        with self._lock, self._explained():
            return self._db.execute(sql, args).fetchall()

    def one(self, sql: str, args: Sequence[Any] = ()) -> Any:
        return self.rows(sql, args)[0]

    def state(self) -> tuple[int, int]:
        """Changes whenever the content may have: by others, by this object."""
        return int(self.one("PRAGMA data_version")[0]), self._db.total_changes

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            with storing(self.path):
                yield
        except sqlite3.DatabaseError as error:
            code = _CODES.get((getattr(error, "sqlite_errorcode", None) or 0) & 0xFF, "store")
            raise StoreError(f"{self.path}: {error}", code=code, hint=_HINTS.get(code, "")) from error
