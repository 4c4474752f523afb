"""The files of a KV store: a folder for each model, within one budget of bytes. Knows no tensors.

    root/lock                       the bytes in use, under an flock while they change
    root/<model>/about.json         the model's name and the bytes of a token
    root/<model>/ab/ab3f….kv        a block

The least recently used files leave first; the times are those of the files. A file that nobody may write is
pinned: it does not leave. Every change of what is there is made under the lock, so the budget holds for all
processes together. A file is renamed into place when it is
whole. Nothing waits for the disk to be flushed: who reads a file checks it, and can do without.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path

from agentctx.memory.atomic import make_private, write_bytes
from agentctx.memory.errors import StoreError

SUFFIX = ".kv"
AHEAD = 0.05  # of the budget, freed beyond what is needed: else every file would look at all others
FULL = 0.9  # of the budget that pinned files may take: the rest is for what is read meanwhile
OPEN, PINNED = 0o600, 0o400  # modes of files
REMEDY = "free some space, lower kv_bytes, or set AGENTCTX_HOME to another disk"


@dataclass(frozen=True, slots=True)
class Held:
    """What is kept for one model. `tokens` is worked out from the bytes; 0 if its about.json is lost."""

    model: str
    name: str
    tokens: int
    bytes: int
    used: float  # seconds since the epoch


class Shelf:
    """The files under `root`, never more than `budget` bytes. Safe for several processes and threads."""

    def __init__(self, root: Path, *, budget: int) -> None:
        self.root = root
        self.budget = budget
        self._counted = False

    @property
    def used_bytes(self) -> int:
        """Of all models, counted now."""
        return sum(status.st_size for _, status in _files(self.root))

    def add(self, path: Path, data: bytes) -> None:
        """Write a file, making room first; one that is there stays.

        Raises StoreError (no_space, also where what is pinned leaves none; unwritable) and leaves no part of
        a file.
        """
        if len(data) > self.budget:
            message = f"a KV block of {len(data):,} bytes exceeds the budget of {self.budget:,}"
            raise StoreError(message, code="no_space", hint="raise kv_bytes")
        try:
            with self._locked() as count:
                if path.exists():
                    return
                if count.bytes + len(data) > self.budget:
                    count.set(self._make_room(len(data)))
                count.set(
                    count.bytes + len(data)
                )  # before: who dies here has counted too much, not too little
                _write(path, data)
        except OSError as error:
            raise StoreError(
                f"KV cannot be kept under {self.root}: {error.strerror or error}",
                code="no_space" if error.errno in (ENOSPC, EDQUOT) else "unwritable",
                hint=REMEDY,
            ) from error

    def discard(self, path: Path) -> None:
        """Delete one file, if it can be deleted."""
        with suppress(OSError), self._locked() as count:
            count.set(count.bytes - _delete(path))

    def touch(self, paths: Sequence[Path]) -> None:
        """These were used now. The later ones count as older: without the first they are worth nothing."""
        now = time.time_ns()
        for age, path in enumerate(paths):
            with suppress(OSError):
                os.utime(path, ns=(now - age, now - age))

    def pinned(self) -> set[Path]:
        """The pinned files."""
        return {path for path, status in _files(self.root) if _is_pinned(status)}

    def taken(self, paths: Collection[Path]) -> int:
        """Bytes of these files, where they are there, and of all that are pinned."""
        return sum(
            status.st_size for path, status in _files(self.root) if path in paths or _is_pinned(status)
        )

    def pin(self, paths: Iterable[Path]) -> None:
        """These files stay until they are deleted by name; those that are not there are passed over.

        Raises StoreError (no_space), with none of them pinned, where all that is pinned would take more than
        `FULL` of the budget; unwritable.
        """
        with _explained(), self._locked():
            wanted = {path for path in paths if path.exists()}
            if (total := self.taken(wanted)) > FULL * self.budget:
                raise StoreError(
                    f"{total:,} bytes of KV would be pinned, {FULL:.0%} of {self.budget:,} can be",
                    code="no_space",
                    hint="raise kv_bytes, or unpin another path (agentctx index ls)",
                )
            for path in wanted:
                path.chmod(PINNED)

    def unpin(self, paths: Iterable[Path]) -> None:
        """These files leave as others do. Raises StoreError (unwritable)."""
        with _explained(), self._locked():
            for path in set(paths):
                with suppress(FileNotFoundError):
                    path.chmod(OPEN)

    def introduce(self, model: str, name: str, token_bytes: int) -> None:
        """Write down what the folder of a model is."""
        about = {"name": name, "token_bytes": token_bytes}
        with suppress(OSError):  # then blocks cannot be written either, which is told
            write_bytes(self.root / model / "about.json", json.dumps(about).encode())

    def held(self) -> list[Held]:
        """What is kept, the model used last first."""
        found = [_held(folder) for folder in self.root.glob("*/")]
        return sorted(found, key=lambda held: -held.used)

    def remove(self, models: Iterable[str] | None = None) -> int:
        """Delete what is kept for these models, by name or folder; None: for all. Returns the bytes freed.

        Raises StoreError (unwritable).
        """
        held = self.held()
        wanted = {one.model for one in held} if models is None else set(models)
        freed = 0
        with _explained(), self._locked() as count:
            for one in held:
                if wanted & {one.model, one.name}:
                    shutil.rmtree(self.root / one.model)
                    freed += one.bytes
            count.set(self.used_bytes)
        return freed

    def delete(self, paths: Iterable[Path]) -> int:
        """Delete these files; returns the bytes freed. Raises StoreError (unwritable)."""
        with _explained(), self._locked() as count:
            freed = sum(_delete(path) for path in paths)
            count.set(self.used_bytes)
        return freed

    @contextmanager
    def _locked(self) -> Iterator[_Count]:
        """The count of bytes, to be changed by nobody else. Counted anew when first used."""
        make_private(self.root)
        with open(os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # dies with its owner
            count = _Count(file.fileno())
            if not self._counted:
                for torn in self.root.glob("*/*/.*"):  # of a process that was killed; nobody else writes now
                    _delete(torn)
                count.set(self.used_bytes)
                self._counted = True
            yield count

    def _make_room(self, wanted: int) -> int:
        """Delete the oldest files; returns the bytes that are left. Raises StoreError if none can be."""
        found = sorted(_files(self.root), key=lambda file: file[1].st_mtime_ns)
        total = sum(status.st_size for _, status in found)
        pinned = sum(status.st_size for _, status in found if _is_pinned(status))
        if pinned + wanted > self.budget:
            raise StoreError(
                f"{pinned:,} of {self.budget:,} bytes of KV are pinned: {wanted:,} more do not fit",
                code="no_space",
                hint="raise kv_bytes, or unpin a path (agentctx index ls)",
            )
        limit = max(self.budget * (1 - AHEAD), pinned + wanted)
        for path, status in found:
            if total + wanted <= limit:
                break
            total -= 0 if _is_pinned(status) else _delete(path)
        return total


class _Count:
    """A number in a file that is locked."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self.bytes = int(os.pread(handle, 32, 0) or 0)

    def set(self, count: int) -> None:
        self.bytes = count
        os.pwrite(self._handle, f"{count:<31}\n".encode(), 0)


@contextmanager
def _explained() -> Iterator[None]:
    """What the system refuses, as StoreError."""
    try:
        yield
    except OSError as error:
        message = f"{error.filename} cannot be changed: {error.strerror}"
        raise StoreError(message, code="unwritable") from error


def _is_pinned(status: os.stat_result) -> bool:
    return not status.st_mode & stat.S_IWUSR


def _files(root: Path, models: str = "*") -> Iterator[tuple[Path, os.stat_result]]:
    for path in root.glob(f"{models}/*/*{SUFFIX}"):
        with suppress(FileNotFoundError):
            yield path, path.stat()


def _held(folder: Path) -> Held:
    found = [status for _, status in _files(folder.parent, folder.name)]
    size = sum(status.st_size for status in found)
    used = max((status.st_mtime for status in found), default=folder.stat().st_mtime)
    try:
        about = json.loads((folder / "about.json").read_bytes())
        return Held(folder.name, about["name"], size // about["token_bytes"], size, used)
    except (OSError, ValueError, KeyError):
        return Held(folder.name, folder.name, 0, size, used)


def _delete(path: Path) -> int:
    """Returns the bytes of what was deleted."""
    try:
        size = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size


def _write(path: Path, data: bytes) -> None:
    make_private(path.parent)
    handle, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        _delete(Path(temporary))
        raise
