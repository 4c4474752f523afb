"""What agentctx needs of a machine, checked one by one; a check is data, so that any surface can show it.

Checking changes nothing and nothing leaves the machine, except one request to the endpoint in use if
`endpoints` is asked for.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from agentctx.memory.errors import AgentctxError, ModelError
from agentctx.paths import Paths
from agentctx.privacy import TRACING

ROOM = 1_000_000_000  # bytes free that a first use may need
NETWORK = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "9p",
    "fuse.sshfs",
    "lustre",
    "ceph",
}  # SQLite's locks fail on these
PACKAGES = (
    "torch",
    "transformers",
    "langgraph",
    "langchain-core",
    "pypdf",
    "bm25s",
)


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report; `remedy` is empty when `ok`. `damaged`: a file of a cache, to be put aside."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    damaged: str = ""


def examine(paths: Paths, *, endpoints: bool = False) -> list[Check]:
    """Run every check."""
    checks = [_python(), *(_package(name) for name in PACKAGES), _accelerator(), _kernels(), _sqlite()]
    checks += [_folder(name, path) for name, path in asdict(paths).items()]
    checks += [_kv(paths), *_locks(paths), *_databases(paths), *_models(paths), *_environment(), _settings()]
    if endpoints:
        checks.append(_endpoint())
    return checks


def fix(checks: Iterable[Check]) -> list[str]:
    """Take damaged caches out of the way, so that they are made again; returns where they are now."""
    moved = []
    for path in (check.damaged for check in checks if check.damaged):
        aside = f"{path}.corrupt-{time.time_ns()}"
        for part in ("-wal", "-shm", ""):  # first what SQLite would add to a new file of that name
            with suppress(FileNotFoundError):
                os.replace(path + part, aside + part)
        moved.append(aside)
    return moved


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    return Check("python", sys.version_info >= (3, 11), found, "install Python 3.11 or newer")


def _package(name: str) -> Check:
    try:
        return Check(name, True, version(name))
    except PackageNotFoundError:
        return Check(name, False, "not installed", f"pip install {name}")


def _accelerator() -> Check:
    if find_spec("torch") is None:
        return Check("accelerator", False, "unknown without torch", "install torch")
    import torch

    if torch.cuda.is_available():
        return Check("accelerator", True, f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    return Check("accelerator", True, f"none; {torch.get_num_threads()} threads of the CPU are used")


def _kernels() -> Check:
    """The C++ kernels: they are optional, so their absence is told and is no failure. Builds nothing."""
    title = "CPU kernels"
    if find_spec("torch") is None:
        return Check(title, False, "unknown without torch", "install torch")
    from agentctx.kernels.cpu import build

    cache, level = build.cache_folder(), build.best()
    size = sum(path.stat().st_size for path in cache.glob(f"*/{build.NAME}"))
    kept = f"{cache}, {size / 1e6:.1f} MB"
    try:
        place = build.built(level)
    except OSError as error:
        return Check(title, True, f"torch serves instead (slower): {error}; {kept}")
    state = "built" if place else "not built yet, the first use builds"
    return Check(title, True, f"{level}, {state} with {shlex.join(build.compiler())}; {kept}")


def _sqlite() -> Check:
    with closing(sqlite3.connect(":memory:")) as database:
        options = {row[0] for row in database.execute("pragma compile_options")}
    safe = "THREADSAFE=0" not in options
    return Check("sqlite", safe, sqlite3.sqlite_version, "use a Python whose SQLite is thread-safe")


def _folder(name: str, path: Path) -> Check:
    title = f"folder {name}"
    there = path
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK):
        return Check(title, False, f"{there} cannot be written", "set AGENTCTX_HOME to a folder you own")
    if path.exists() and path.stat().st_mode & 0o077:
        return Check(title, False, f"{path} is open to other users", f"chmod 700 {path}")
    kind, free = _file_system(there), shutil.disk_usage(there).free
    if kind in NETWORK:
        return Check(title, False, f"{path} is on a network ({kind})", "set AGENTCTX_HOME to a local disk")
    if free < ROOM:
        return Check(
            title, False, f"{path}: {free / 1e9:.1f} GB free", "free some space, or set AGENTCTX_HOME"
        )
    return Check(title, True, f"{path}, {free / 1e9:.0f} GB free, {kind or 'unknown file system'}")


def _kv(paths: Paths) -> Check:
    """What was read and is kept, by model."""
    from agentctx.memory.kv.shelf import Shelf

    held = Shelf(paths.kv, budget=0).held()
    size = sum(one.bytes for one in held)
    named = ", ".join(f"{one.name} {one.bytes / 1e6:,.0f} MB" for one in held) or "nothing kept"
    return Check("KV store", True, f"{paths.kv}, {size / 1e6:,.1f} MB ({named})")


def _file_system(path: Path) -> str:
    """The type of the file system that holds `path`, where the system tells; of the deepest mount."""
    table = Path("/proc/self/mounts")
    if not table.exists():
        return ""
    mounts = [line.split()[1:3] for line in table.read_text().splitlines()]
    above = [(len(point), kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
    return max(above, default=(0, ""))[1]


def _locks(paths: Paths) -> Iterator[Check]:
    from filelock import FileLock, Timeout

    for lock in sorted(
        path for root in (paths.cache, paths.data, paths.state) for path in root.rglob("*.lock")
    ):
        try:
            with FileLock(lock, blocking=False):
                continue
        except Timeout:
            detail = f"{lock} is held by another process"
            yield Check("lock", True, detail)


def _databases(paths: Paths) -> Iterator[Check]:
    for path in sorted(
        path for root in (paths.cache, paths.data, paths.state) for path in root.rglob("*.db")
    ):
        title, broken = f"database {path.name}", True
        try:
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=5)) as database:
                said = database.execute("pragma quick_check(1)").fetchone()[0]
        except sqlite3.Error as error:  # an OperationalError says nothing of the file: it may be locked
            said, broken = str(error), not isinstance(error, sqlite3.OperationalError)
        detail = f"{path}: {said}"
        if said == "ok":
            yield Check(title, True, detail)
        elif path.is_relative_to(paths.cache):
            again = ", then `agentctx index` what it held" if path.is_relative_to(paths.index) else ""
            remedy = f"it is a cache: `agentctx doctor --fix`{again}" if broken else "look who uses it"
            yield Check(title, False, detail, remedy, str(path) if broken else "")
        else:
            yield Check(title, False, detail, f"keep a copy of {path} and remove the run")


def _models(paths: Paths) -> Iterator[Check]:
    from agentctx.models.catalog import installed
    from agentctx.models.manifest import Manifest
    from agentctx.models.table import FETCHABLE

    for model in installed(paths):
        title = f"model {model.name}"
        folder = Path(model.folder)
        manifest = Manifest.read(folder)
        if manifest is None:
            size = f"{model.size / 1e6:.0f} MB"
            there = f"{size} that are not whole, or of another version: `agentctx models rm {model.name}`"
            absent = f"not here; {size} are fetched at its first use"
            yield Check(title, True, absent if model.name in FETCHABLE else there)
            continue
        try:
            manifest.verify(folder)
            yield Check(title, True, f"every byte is as it was, {model.size / 1e6:.0f} MB")
        except ModelError as error:
            yield Check(title, False, error.message, error.hint)


def _environment() -> Iterator[Check]:
    for name in TRACING:
        if os.environ.get(name, "").lower() == "true":
            detail = f"{name} is true: LangChain uploads runs, with the text of documents"
            yield Check("environment", False, detail, f"unset {name}, or pass --offline")


def _settings() -> Check:
    from agentctx.settings import Settings

    try:
        settings = Settings.load({})
    except AgentctxError as error:
        return Check("settings", False, error.message, error.hint)
    return Check("settings", True, f"model {settings.model} ({settings.origin('model')})")


def _endpoint() -> Check:
    from openai import APIError, OpenAI

    from agentctx.settings import Settings

    settings = Settings.load({})
    if not settings.base_url:
        return Check("endpoint", True, "none is set")
    settings.export_key()
    key = os.environ.get("AGENTCTX_API_KEY") or os.environ.get("OPENAI_API_KEY") or "none"
    try:
        with OpenAI(base_url=settings.base_url, api_key=key, timeout=10, max_retries=0) as client:
            names = [model.id for model in client.models.list()]
    except APIError as error:
        return Check(
            "endpoint", False, f"{settings.base_url}: {type(error).__name__}", "start it, or correct base_url"
        )
    return Check("endpoint", True, f"{settings.base_url} has {', '.join(names)}")
