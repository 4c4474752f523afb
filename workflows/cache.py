"""The leaf cache: every finished model call under the hash of all that determined it.

This, not the checkpointer, is why a killed run resumes without repeating a paid call, and why a second run
over mostly unchanged files pays only for what changed. Only successes are kept, and they are written
before the caller sees them. Values are JSON; the store is SQLite.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

from agentctx.memory.atomic import make_private

SCHEMA = 1


def call_key(**parts: Any) -> str:
    """A 128-bit key of everything that determines a call's result."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class LeafCache:
    """Key to JSON value. `path=None` keeps it in memory, for runs that must leave nothing behind."""

    def __init__(self, path: Path | None) -> None:
        self.warning = ""  # set when a damaged cache was put aside
        self._waiting: dict[str, Any] = {}
        self._lock = threading.Lock()  # one connection: quotes are verified in threads, and notes kept there
        if path:
            make_private(path.parent)
        try:
            self._db = _open(path)
        except sqlite3.DatabaseError as error:
            if path is None or isinstance(error, sqlite3.OperationalError):
                raise
            aside = path.with_name(f"{path.name}.corrupt-{int(time.time())}")
            path.rename(aside)
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self.warning = f"the call cache was damaged ({error}); it was put aside as {aside.name}"
            self._db = _open(path)

    def get(self, key: str) -> Any | None:
        if key in self._waiting:
            return self._waiting[key]
        with self._lock:
            row = self._db.execute("SELECT value FROM calls WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def get_many(self, keys: list[str]) -> dict[str, Any]:
        """The values of those keys that are there."""
        found = {key: self._waiting[key] for key in keys if key in self._waiting}
        for start in range(0, len(keys), 500):
            part = keys[start : start + 500]
            marks = ",".join("?" * len(part))
            with self._lock:
                rows = self._db.execute(
                    f"SELECT key, value FROM calls WHERE key IN ({marks})", part
                ).fetchall()
            found.update((key, json.loads(value)) for key, value in rows)
        return found

    def put(self, key: str, value: Any) -> None:
        self.put_many({key: value})

    def put_many(self, items: dict[str, Any]) -> None:
        """Write these, and what waits, in one transaction."""
        with self._lock, self._db:
            rows, now = {**self._waiting, **items}, time.time()
            self._db.executemany(
                "INSERT OR REPLACE INTO calls (key, value, time) VALUES (?, ?, ?)",
                [(key, json.dumps(value, ensure_ascii=False), now) for key, value in rows.items()],
            )
            self._waiting = {}

    def put_soon(self, key: str, value: Any) -> None:
        """Write this with the next `put`, or when the cache is closed: what may be lost if it is killed."""
        with self._lock:
            self._waiting[key] = value

    def close(self) -> None:
        if self._waiting:
            self.put_many({})
        self._db.close()


def _open(path: Path | None) -> sqlite3.Connection:
    db = sqlite3.connect(str(path or ":memory:"), timeout=5.0, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        if path:
            path.chmod(0o600)
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version != SCHEMA:  # a cache of another version is dropped, not migrated
            db.execute("DROP TABLE IF EXISTS calls")
            db.execute(f"PRAGMA user_version = {SCHEMA}")
        db.execute("CREATE TABLE IF NOT EXISTS calls (key TEXT PRIMARY KEY, value TEXT, time REAL)")
        db.commit()
    except sqlite3.DatabaseError:
        db.close()
        raise
    return db
