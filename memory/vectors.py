"""Vectors on disk, found by their inner product with a query.

SQLite holds the vectors, each under the name of its owner; it is what counts. FAISS searches them in files of
its own (Douze et al., arXiv 2401.08281), each over a range of ids, mapped into memory and never changed: what
is added goes to the last one, which is written anew until it is full. The database keeps a checksum of each
file. One that is missing or damaged is made again from the database, and `warnings` says so.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from agentctx.memory.database import Database

Floats = NDArray[np.float32]
SHARD = 1 << 14  # vectors of a file
FIRST = 64  # hits that a search asks for at first: several may belong to one owner
SCHEMA = """
CREATE TABLE vectors (id INTEGER PRIMARY KEY AUTOINCREMENT, owner TEXT NOT NULL, vector BLOB NOT NULL);
CREATE INDEX vector_owner ON vectors (owner);
CREATE TABLE files (first INTEGER PRIMARY KEY, last INTEGER NOT NULL, name TEXT NOT NULL,
    checksum TEXT NOT NULL)
"""


class Hit(NamedTuple):
    """An owner, and the score of the best of its vectors."""

    owner: str
    score: float


class _File(NamedTuple):
    first: int
    last: int
    name: str
    checksum: str


class _Listed(NamedTuple):
    owners: dict[int, str]  # by id
    places: dict[str, list[int]]  # ids by owner
    ids: NDArray[np.int64]


class Vectors:
    """Vectors float32 of `size` numbers, in `database` (which has `SCHEMA`) and FAISS files beside it."""

    def __init__(self, database: Database, size: int) -> None:
        self.database = database
        self.size = size
        self.warnings: list[str] = []
        self._lock = threading.RLock()  # files are opened and swept away together
        self._opened: dict[_File, faiss.Index] = {}
        self._seen: tuple[tuple[int, int], _Listed] | None = None

    def put(self, vectors: Mapping[str, Floats]) -> None:
        """Add the vectors `[n, size]` of owners, all or none; an owner that is known keeps its own.

        Raises ValueError for another size, StoreError as `Database` does.
        """
        for owner, rows in vectors.items():
            if rows.ndim != 2 or rows.shape[1] != self.size:
                raise ValueError(f"vectors of {owner} are {list(rows.shape)}, not [n, {self.size}]")
        with self.database.write() as db:
            for owner, rows in vectors.items():
                if not db.execute("SELECT 1 FROM vectors WHERE owner = ?", (owner,)).fetchone():
                    blobs = [(owner, row.astype("<f4").tobytes()) for row in rows]
                    db.executemany("INSERT INTO vectors (owner, vector) VALUES (?, ?)", blobs)

    def drop(self, owners: Iterable[str]) -> None:
        """Forget owners. Their place in a file is passed over."""
        with self.database.write() as db:
            db.executemany("DELETE FROM vectors WHERE owner = ?", [(owner,) for owner in owners])

    def __len__(self) -> int:
        return int(self.database.one("SELECT count(*) FROM vectors")[0])

    def search(self, query: Floats, k: int, among: Sequence[str] | None = None) -> list[Hit]:
        """The `k` best owners for `query [size]`, of those in `among` if it is given, the best first."""
        with self._lock:
            return self._search(query, k, among)

    def _search(self, query: Floats, k: int, among: Sequence[str] | None) -> list[Hit]:
        files = self.settle()
        owners, places, ids = self._listed()
        if among is not None:
            chosen = (number for owner in dict.fromkeys(among) for number in places.get(owner, ()))
            ids = np.fromiter(chosen, np.int64)
        if not len(ids) or k < 1:
            return []
        width = min(len(ids), max(FIRST, 4 * k))
        while True:
            found: dict[str, float] = {}
            for number, score in self._nearest(files, query, ids, width):
                owner = owners[number]
                found[owner] = max(score, found.get(owner, score))
            if len(found) >= k or width == len(ids):
                best = sorted(found.items(), key=lambda item: -item[1])[:k]
                return [Hit(owner, score) for owner, score in best]
            width = min(len(ids), 4 * width)

    def settle(self) -> list[_File]:
        """Bring all vectors into files, making again what is damaged. Returns the files."""
        with self._lock:
            return self._settle()

    def _settle(self) -> list[_File]:
        while not self._whole(files := self._files()):
            with self.database.write() as db:  # nobody else makes files meanwhile
                old = {one.first: one for one in self._files()}
                lost = [one for one in old.values() if self._open(one) is None]
                self.warnings += [f"the index file {one.name} is damaged: it was made again" for one in lost]
                end = self._end()
                for first in range(1, end + 1, SHARD):
                    last = min(first + SHARD - 1, end)
                    if first not in old or old[first] in lost or old[first].last != last:
                        made = self._make(first, last)
                        db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", made)
            self._sweep()
        return files

    def verify(self) -> list[str]:
        """What is wrong with the files, one line each; nothing is changed."""
        with self._lock:
            self._opened.clear()
            damaged = [one.name for one in self._files() if self._open(one) is None]
        return [f"{name} is damaged: it is made again when it is needed" for name in damaged]

    def _nearest(
        self, files: Sequence[_File], query: Floats, ids: NDArray[np.int64], k: int
    ) -> list[tuple[int, float]]:
        found: list[tuple[int, float]] = []
        rows = np.ascontiguousarray(query[None], np.float32)
        for one in files:
            mask = np.zeros(one.last - one.first + 1, bool)
            inside = ids[(ids >= one.first) & (ids <= one.last)]
            mask[inside - one.first] = True
            if not len(inside):
                continue
            select: Any = faiss.IDSelectorBitmap  # its types are those of C++, and what it takes is arrays
            chosen: Any = faiss.SearchParameters
            params = chosen(sel=select(np.packbits(mask, bitorder="little")))
            scores, places = self._opened[one].search(rows, min(k, len(inside)), params=params)
            found += [
                (one.first + int(place), float(score))
                for place, score in zip(places[0], scores[0], strict=True)
                if place >= 0
            ]
        return sorted(found, key=lambda hit: -hit[1])[:k]

    def _listed(self) -> _Listed:
        """Who has which vectors, read again when the database changed."""
        now = self.database.state()
        if self._seen is None or self._seen[0] != now:
            owners: dict[int, str] = dict(self.database.rows("SELECT id, owner FROM vectors"))
            places: dict[str, list[int]] = {}
            for number, owner in owners.items():
                places.setdefault(owner, []).append(number)
            self._seen = now, _Listed(owners, places, np.fromiter(owners, np.int64, len(owners)))
        return self._seen[1]

    def _files(self) -> list[_File]:
        return [_File(*row) for row in self.database.rows("SELECT * FROM files ORDER BY first")]

    def _end(self) -> int:
        """The last id that was given out."""
        rows = self.database.rows("SELECT seq FROM sqlite_sequence WHERE name = 'vectors'")
        return int(rows[0][0]) if rows else 0

    def _whole(self, files: Sequence[_File]) -> bool:
        covered = files[-1].last if files else 0
        return covered == self._end() and all(self._open(one) is not None for one in files)

    def _open(self, one: _File) -> faiss.Index | None:
        """The file mapped into memory, None if it is not what was written."""
        if one not in self._opened:
            path = self._folder / one.name
            try:
                if _checksum(path) != one.checksum:
                    raise RuntimeError("its checksum differs")
                self._opened[one] = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
            except (OSError, RuntimeError):  # what FAISS raises
                return None
        return self._opened[one]

    def _make(self, first: int, last: int) -> _File:
        held = np.zeros((last - first + 1, self.size), np.float32)
        sql = "SELECT id, vector FROM vectors WHERE id BETWEEN ? AND ?"
        for number, blob in self.database.rows(sql, (first, last)):
            held[number - first] = np.frombuffer(blob, "<f4")
        index = faiss.IndexFlatIP(self.size)
        index.add(held)
        handle, temporary = tempfile.mkstemp(prefix=".", dir=self._folder)
        try:
            with open(handle, "wb") as file:
                file.write(faiss.serialize_index(index).data)
                file.flush()
                os.fsync(handle)
            checksum = _checksum(Path(temporary))
            name = f"{first}-{last}-{checksum[:8]}.faiss"
            os.replace(temporary, self._folder / name)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        return _File(first, last, name, checksum)

    def _sweep(self) -> None:
        """Delete files that no row names: earlier states of the last one."""
        with self.database.write():  # or it would delete what another process is about to name
            files = self._files()
            named = {one.name for one in files}
            for path in self._folder.glob("*.faiss"):
                if path.name not in named:
                    with suppress(OSError):
                        path.unlink()
        self._opened = {one: index for one, index in self._opened.items() if one in files}

    @property
    def _folder(self) -> Path:
        return self.database.path.parent


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()
