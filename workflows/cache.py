"""The leaf cache: every finished model call under the hash of all that determined it.

This, not the checkpointer, is why a killed run resumes without repeating a paid call, and why a second run
over mostly unchanged files pays only for what changed. Only successes are kept, and they are written
before the caller sees them. Values are JSON; the store is SQLite. Whoever opens it while nobody else has it
open puts it in order: damaged, it is put aside; too large, the older half goes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from pathlib import Path
from typing import IO, Any

from agentctx.memory.atomic import make_private, storing
from agentctx.memory.database import Database
from agentctx.memory.errors import StoreError

VERSION = 1
SCHEMA = """
DROP TABLE IF EXISTS calls;
CREATE TABLE calls (key TEXT PRIMARY KEY, value TEXT, time REAL)
"""
IN_MEMORY = Path(":memory:")  # SQLite's own name for it
LIMIT = 2 << 30  # bytes of disk
_OLDER_HALF = """
DELETE FROM calls WHERE rowid < (
    SELECT rowid FROM calls ORDER BY rowid LIMIT 1 OFFSET (SELECT count(*) / 2 FROM calls)
)
"""


def call_key(**parts: Any) -> str:
    """A 128-bit key of everything that determines a call's result."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class LeafCache:
    """Key to JSON value. `path=None` keeps it in memory, for runs that must leave nothing behind.

    Above `limit` bytes the older half is dropped. All of it raises StoreError: locked, no_space, unwritable,
    or corrupt, where damage is met while others use it too.
    """

    def __init__(self, path: Path | None, *, limit: int = LIMIT) -> None:
        self.warning = ""  # set when a damaged cache was put aside
        self._using: IO[str] | None = None
        if path is None:
            self._db = _opened(IN_MEMORY)
            return
        with storing(path):
            make_private(path.parent)
            self._using = path.with_name(f"{path.name}.lock").open("a")
        try:
            with storing(path):
                alone = _alone(self._using)
            self._db = self._in_order(path, limit) if alone else _opened(path)
            with storing(path):
                path.chmod(0o600)
                fcntl.flock(self._using, fcntl.LOCK_SH)
        except BaseException:
            self._using.close()
            raise

    def get(self, key: str) -> Any | None:
        return self.get_many([key]).get(key)

    def get_many(self, keys: list[str]) -> dict[str, Any]:
        """The values of those keys that are there."""
        found: dict[str, Any] = {}
        for start in range(0, len(keys), 500):
            part = keys[start : start + 500]
            marks = ",".join("?" * len(part))
            rows = self._db.rows(f"SELECT key, value FROM calls WHERE key IN ({marks})", part)
            found.update((key, json.loads(value)) for key, value in rows)
        return found

    def put(self, key: str, value: Any) -> None:
        self.put_many({key: value})

    def put_many(self, items: dict[str, Any]) -> None:
        """Write these in one transaction."""
        now = time.time()
        with self._db.write() as db:
            db.executemany(
                "INSERT OR REPLACE INTO calls (key, value, time) VALUES (?, ?, ?)",
                [(key, _encoded(value), now) for key, value in items.items()],
            )

    def close(self) -> None:
        self._db.close()
        if self._using:
            self._using.close()

    def _in_order(self, path: Path, limit: int) -> Database:
        """The file, sound and not too large; nobody else has it open."""
        try:
            db = _opened(path)
        except StoreError as error:
            if error.code != "corrupt":
                raise
            aside = path.with_name(f"{path.name}.corrupt-{int(time.time())}")
            with storing(path):
                path.rename(aside)
                for suffix in ("-wal", "-shm"):
                    path.with_name(path.name + suffix).unlink(missing_ok=True)
            self.warning = f"the call cache was damaged ({error.message}); it was put aside as {aside.name}"
            db = _opened(path)
        pages = db.one("PRAGMA page_count")[0] - db.one("PRAGMA freelist_count")[0]
        if pages * db.one("PRAGMA page_size")[0] > limit:
            with db.write() as connection:
                connection.execute(_OLDER_HALF)
        return db


def _opened(path: Path) -> Database:
    return Database(path, SCHEMA, VERSION, renew=True)  # a cache of another version is dropped, not migrated


def _alone(file: IO[str]) -> bool:
    """True with the lock of one that is alone; else with that of one among others, once they are in order."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with its process
    except BlockingIOError:
        fcntl.flock(file, fcntl.LOCK_SH)
        return False
    return True


def _encoded(value: Any) -> bytes:
    """Any JSON: a model's words may hold a lone surrogate, which is no text for SQLite."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
