"""The files of a KV store: a folder for each model, within one budget of bytes. Knows no tensors.

    root/lock                       the bytes in use, under an flock while they change
    root/<model>/about.json         the model's name and the bytes of a token
    root/<model>/ab/ab3f….kv        a block
    root/<model>/lists/12cd….names  a line that says what is listed, then the name of a block on each

The least recently used files leave first; the times are those of the files. A file that nobody may write is
pinned: it does not leave. Every change of what is there is made under the lock, so the budget holds for all
processes together. A file is renamed into place when it is whole. Nothing waits for the disk to be flushed:
who reads a file checks it, and can do without. Names leave the lists with their blocks, and lists with their
last name.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path

from agentctx.memory.atomic import make_private, write_bytes
from agentctx.memory.errors import StoreError
from agentctx.memory.kv.files import (
    BLOCKS,
    LISTS,
    delete,
    files_of,
    joined,
    lines_of,
    listed_blocks,
    sweep,
    write,
)

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


@dataclass(frozen=True, slots=True)
class Listed:
    """A list of blocks, under a line of text."""

    head: str
    blocks: list[Path]
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
        counted = [*files_of(self.root, f"*/{BLOCKS}"), *files_of(self.root, f"*/{LISTS}")]
        return sum(status.st_size for _, status in counted)

    def add(self, path: Path, data: bytes) -> None:
        """Write a file, making room first; one that is there stays.

        Raises StoreError (no_space, also where what is pinned leaves none; unwritable) and leaves no part of
        a file.
        """
        with self._changing() as count:
            if not path.exists():
                self._take(count, len(data))
                write(path, data)

    def note(self, model: str, head: str, names: Iterable[str]) -> None:
        """Put names of blocks of a model on the list under `head`, a line of text. What is there already is
        not written again, the list counts as used now.

        Raises StoreError (no_space, unwritable).
        """
        digest = hashlib.blake2b(head.encode(), digest_size=16).hexdigest()
        path, wanted = self.root / model / LISTS.replace("*", digest), list(names)
        if set(wanted) <= set(lines_of(path)[1:]):
            self.touch([path])
            return
        with self._changing() as count:
            data = joined(dict.fromkeys([head, *lines_of(path)[1:], *wanted]))
            self._take(count, len(data))
            before = path.stat().st_size if path.exists() else 0
            write(path, data)
            count.set(count.bytes - before)

    def blocks(self) -> list[Path]:
        """Every block of every model."""
        return [path for path, _ in files_of(self.root, f"*/{BLOCKS}")]

    def lists(self) -> list[Listed]:
        """Every list that can be read, with those of its blocks that are there."""
        found = []
        for path, status in files_of(self.root, f"*/{LISTS}"):
            if lines := lines_of(path):
                found.append(Listed(lines[0], listed_blocks(path, lines[1:]), status.st_mtime))
        return found

    def discard(self, path: Path) -> None:
        """Delete one file, if it can be deleted."""
        with suppress(OSError), self._locked() as count:
            count.set(count.bytes - delete(path))

    def touch(self, paths: Sequence[Path]) -> None:
        """These were used now. The later ones count as older: without the first they are worth nothing."""
        now = time.time_ns()
        for age, path in enumerate(paths):
            with suppress(OSError):
                os.utime(path, ns=(now - age, now - age))

    def pinned(self) -> set[Path]:
        """The pinned files."""
        return {path for path, status in files_of(self.root, f"*/{BLOCKS}") if _is_pinned(status)}

    def taken(self, paths: Collection[Path]) -> int:
        """Bytes of these files, where they are there, and of all that are pinned."""
        return sum(
            status.st_size
            for path, status in files_of(self.root, f"*/{BLOCKS}")
            if path in paths or _is_pinned(status)
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
        with _explained(), self._locked() as count:
            before = self.used_bytes
            for one in held:
                if wanted & {one.model, one.name}:
                    shutil.rmtree(self.root / one.model)
            count.set(self.used_bytes)
            return before - count.bytes

    def delete(self, paths: Iterable[Path]) -> int:
        """Delete these files; returns the bytes freed. Raises StoreError (unwritable)."""
        with _explained(), self._locked() as count:
            freed = sum(delete(path) for path in paths) + sweep(self.root)
            count.set(self.used_bytes)
        return freed

    @contextmanager
    def _changing(self) -> Iterator[_Count]:
        """As `_locked`, to write something. Raises StoreError (no_space, unwritable)."""
        try:
            with self._locked() as count:
                yield count
        except OSError as error:
            raise StoreError(
                f"KV cannot be kept under {self.root}: {error.strerror or error}",
                code="no_space" if error.errno in (ENOSPC, EDQUOT) else "unwritable",
                hint=REMEDY,
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[_Count]:
        """The count of bytes, to be changed by nobody else. Counted anew when first used."""
        make_private(self.root)
        with open(os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # dies with its owner
            count = _Count(file.fileno())
            if not self._counted or count.bytes < 0:
                for torn in self.root.glob("*/*/.*"):  # of a process that was killed; nobody else writes now
                    delete(torn)
                count.set(self.used_bytes)
                self._counted = True
            yield count

    def _take(self, count: _Count, size: int) -> None:
        """Make room and count it. Raises StoreError (no_space) for more than the budget."""
        if size > self.budget:
            raise StoreError(
                f"a KV file of {size:,} bytes exceeds the budget of {self.budget:,}",
                code="no_space",
                hint="raise kv_bytes",
            )
        if count.bytes + size > self.budget:
            count.set(self._make_room(size))
        count.set(count.bytes + size)  # before: who dies here has counted too much, not too little

    def _make_room(self, wanted: int) -> int:
        """Delete the oldest blocks; returns the bytes that are left. Raises StoreError if none can be."""
        found = sorted(files_of(self.root, f"*/{BLOCKS}"), key=lambda file: file[1].st_mtime_ns)
        total = self.used_bytes
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
            total -= 0 if _is_pinned(status) else delete(path)
        return total - sweep(self.root)


class _Count:
    """A number in a file that is locked; negative: not known."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        try:
            self.bytes = int(os.pread(handle, 32, 0))
        except ValueError:  # new, or of a machine that failed
            self.bytes = -1

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


def _held(folder: Path) -> Held:
    found = [status for _, status in files_of(folder, BLOCKS)]
    size = sum(status.st_size for status in found)
    used = max((status.st_mtime for status in found), default=folder.stat().st_mtime)
    try:
        about = json.loads((folder / "about.json").read_bytes())
        return Held(folder.name, about["name"], size // about["token_bytes"], size, used)
    except (OSError, ValueError, KeyError):
        return Held(folder.name, folder.name, 0, size, used)
