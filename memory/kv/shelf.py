"""The files of a KV store: a folder for each model, within one budget of bytes. Knows no tensors.

    root/lock                       the bytes in use, under an flock while they change
    root/<model>/about.json         the model's name and the bytes of a token
    root/<model>/ab/ab3f….kv        a block
    root/<model>/lists/12cd….names  a line that says what is listed, then the name of a block on each

The least recently used files leave first; the times are those of the files. Every change of what is there is
made under the lock, so the budget holds for all processes together. A file is renamed into place when it is
whole. Nothing waits for the disk to be flushed: who reads a file checks it, and can do without. Names leave
the lists with their blocks, and lists with their last name.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path

from agentctx.memory.atomic import make_private, write_bytes
from agentctx.memory.errors import StoreError

SUFFIX = ".kv"
BLOCKS = f"*/*{SUFFIX}"  # in the folder of a model
LISTS = "lists/*.names"
AHEAD = 0.05  # of the budget, freed beyond what is needed: else every file would look at all others
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
        counted = [*_files(self.root, f"*/{BLOCKS}"), *_files(self.root, f"*/{LISTS}")]
        return sum(status.st_size for _, status in counted)

    def add(self, path: Path, data: bytes) -> None:
        """Write a file, making room first; one that is there stays.

        Raises StoreError (no_space, unwritable) and leaves no part of a file.
        """
        with self._changing() as count:
            if not path.exists():
                self._take(count, len(data))
                _write(path, data)

    def note(self, model: str, head: str, names: Iterable[str]) -> None:
        """Put names of blocks of a model on the list under `head`, a line of text. What is there already is
        not written again, the list counts as used now.

        Raises StoreError (no_space, unwritable).
        """
        digest = hashlib.blake2b(head.encode(), digest_size=16).hexdigest()
        path, wanted = self.root / model / LISTS.replace("*", digest), list(names)
        if set(wanted) <= set(_lines(path)[1:]):
            self.touch([path])
            return
        with self._changing() as count:
            data = _joined(dict.fromkeys([head, *_lines(path)[1:], *wanted]))
            self._take(count, len(data))
            before = path.stat().st_size if path.exists() else 0
            _write(path, data)
            count.set(count.bytes - before)

    def blocks(self) -> list[Path]:
        """Every block of every model."""
        return [path for path, _ in _files(self.root, f"*/{BLOCKS}")]

    def lists(self) -> list[Listed]:
        """Every list that can be read, with those of its blocks that are there."""
        found = []
        for path, status in _files(self.root, f"*/{LISTS}"):
            if lines := _lines(path):
                found.append(Listed(lines[0], _blocks(path, lines[1:]), status.st_mtime))
        return found

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
        try:
            with self._locked() as count:
                before = self.used_bytes
                for one in held:
                    if wanted & {one.model, one.name}:
                        shutil.rmtree(self.root / one.model)
                count.set(self.used_bytes)
                return before - count.bytes
        except OSError as error:
            raise StoreError(
                f"{error.filename} cannot be deleted: {error.strerror}", code="unwritable"
            ) from error

    def delete(self, paths: Iterable[Path]) -> int:
        """Delete these files; returns the bytes freed. Raises StoreError (unwritable)."""
        freed = 0
        try:
            with self._locked() as count:
                freed = sum(_delete(path) for path in paths) + self._sweep()
                count.set(self.used_bytes)
        except OSError as error:
            raise StoreError(
                f"{error.filename} cannot be deleted: {error.strerror}", code="unwritable"
            ) from error
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
                    _delete(torn)
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
        """Delete the oldest blocks; returns the bytes that are left."""
        found = sorted(_files(self.root, f"*/{BLOCKS}"), key=lambda file: file[1].st_mtime_ns)
        total = self.used_bytes
        limit = max(self.budget * (1 - AHEAD), wanted)
        for path, _ in found:
            if total + wanted <= limit:
                break
            total -= _delete(path)
        return total - self._sweep()

    def _sweep(self) -> int:
        """Take names off the lists whose blocks are gone; returns the bytes freed."""
        freed = 0
        for path, status in _files(self.root, f"*/{LISTS}"):
            head, *names = _lines(path) or [""]
            left = [block.stem for block in _blocks(path, names)]
            if not left:
                freed += _delete(path)
            elif len(left) < len(names):
                _write(path, data := _joined([head, *left]))
                os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
                freed += status.st_size - len(data)
        return freed


def block_file(folder: Path, name: str) -> Path:
    """Where a block is, or would be, in the folder of its model."""
    return folder / name[:2] / f"{name}{SUFFIX}"


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


def _files(folder: Path, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
    for path in list(folder.glob(pattern)):
        with suppress(FileNotFoundError):
            yield path, path.stat()


def _lines(path: Path) -> list[str]:
    """Of a list; empty if it is not there or cannot be read."""
    try:
        return path.read_bytes().decode().splitlines()
    except (OSError, ValueError):
        return []


def _joined(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _blocks(path: Path, names: Iterable[str]) -> list[Path]:
    """Those blocks on the list at `path` that are there."""
    found = [block_file(path.parent.parent, name) for name in names if name.isalnum()]
    return [block for block in found if block.exists()]


def _held(folder: Path) -> Held:
    found = [status for _, status in _files(folder, BLOCKS)]
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
