"""The C++ kernels, compiled on the user's machine at first use: once for each level of the processor.

A level is a set of compiler flags; the sources are the same. The library of a level registers its operators
as `torch.ops.agentctx_<level>`. It is kept in the user's cache under a key of all that it depends on, so a
folder that travels between machines never serves a wrong one. The compiler is called directly: torch's
extension loader needs ninja and keeps a lock file that a killed build leaves behind. Ours is an flock,
which dies with its owner; the library is written beside its place and renamed, so a half-written one is
never loaded. Its digest lies beside it: a damaged one would end the process when it is mapped, so it is
built again instead.

A missing or failing compiler is not an error: there is one warning, `reason` tells it, and torch serves
instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parent / "src"
NAME = "agentctx.so"
HEADER = "ops.h"  # included by every source
OLDEST_GCC = 12  # the first with clang's __builtin_shufflevector
TIMEOUT = 600  # seconds for one source; a busy machine takes ten times the usual ten
UNUSED = 30 * 24 * 3600  # seconds after which the library of another version or compiler is removed

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
# From the best to the one that runs everywhere. "brgemm" is avx512_bf16 with torch's brgemm for the
# products of prefill, which uses AMX where the processor has it.
LEVELS: dict[str, tuple[str, ...]] = {
    "brgemm": (*_AVX512, "-mavx512bf16", "-DAGENTCTX_BRGEMM"),
    "avx512_bf16": (*_AVX512, "-mavx512bf16"),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "plain": (),
}
FLAGS = (
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
)


def cache_folder() -> Path:
    """Where libraries are kept; AGENTCTX_HOME moves it with everything else."""
    if home := os.environ.get("AGENTCTX_HOME"):
        return Path(home).expanduser().absolute() / "cache" / "kernels"
    import platformdirs

    return platformdirs.user_cache_path("agentctx", appauthor=False) / "kernels"


@functools.cache
def features() -> frozenset[str]:
    """The levels that this processor can run."""
    found = {"plain"}
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset(found)
    if torch.cpu._is_avx2_supported():
        found.add("avx2")
    if torch.cpu._is_avx512_supported():
        found.add("avx512")
    if torch.cpu._is_avx512_bf16_supported():
        found |= {"avx512_bf16", "brgemm"}
    return frozenset(found)


@functools.cache
def best() -> str:
    """The level used when none is named: the first that runs, brgemm only with AMX."""
    amx = torch.cpu._is_amx_tile_supported()
    return next(level for level in LEVELS if level in features() and (level != "brgemm" or amx))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def compiler() -> tuple[str, ...]:
    """The command of the C++ compiler: $CXX, or the first of c++, g++ and clang++ on the path, or ()."""
    named = shlex.split(os.environ.get("CXX", ""))
    commands = [named] if named else [["c++"], ["g++"], ["clang++"]]
    found = ((shutil.which(tool), options) for tool, *options in commands)
    return next(((path, *options) for path, options in found if path), ())


@functools.cache
def reason(level: str) -> str | None:
    """Why the library of `level` cannot be used here, or None. Builds it if it is not there yet."""
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}: use one of {', '.join(LEVELS)}")
    if level not in features():
        return f"this processor has no {level}"
    try:
        torch.ops.load_library(str(library(level)))  # type: ignore[no-untyped-call]
    except OSError as error:
        if level == best():  # who forces another level gets an error
            text = f"the C++ kernels cannot be used, torch serves instead (slower): {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        return str(error)
    return None


def load(level: str) -> Any:
    """The operators of a level whose `reason` is None."""
    if why := reason(level):
        raise OSError(why)
    return getattr(torch.ops, f"agentctx_{level}")


def built(level: str, *, sources: Path = SOURCES) -> Path | None:
    """The library of `level` in the cache, if it is there and sound. Builds nothing.

    Raises OSError without a fit compiler: its version is part of the name.
    """
    folder = cache_folder() / key(level, _needed(), sources)
    return folder / NAME if _sound(folder) else None


def key(level: str, tool: tuple[str, ...], sources: Path = SOURCES) -> str:
    """A name for everything a library depends on. Raises OSError for a compiler that cannot build it."""
    parts = [level, *tool, _version(tool), *FLAGS, *LEVELS[level], platform.machine()]
    parts += [torch.__version__, str(torch.version.git_version), Path(_openmp()).name]
    for source in _files(sources):
        parts += [source.name, source.read_text()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return f"{level}-{digest[:20]}"


def library(level: str, *, say: Callable[[str], None] = _say, sources: Path = SOURCES) -> Path:
    """The library of `level`, built under a lock if it is missing or damaged.

    `say` gets one line before a build and one after it. Raises OSError with the reason if there is no
    compiler, or it fails, or the cache cannot be written.
    """
    tool = _needed()
    root = cache_folder()
    folder = root / key(level, tool, sources)
    if not _sound(folder):
        root.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        root.mkdir(exist_ok=True, mode=0o700)
        with open(root / "flock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _sound(folder):
                _clear(level, folder)
                _build(level, tool, sources, folder, say)
    with contextlib.suppress(OSError):  # a cache that cannot be written serves all the same
        os.utime(folder)
    return folder / NAME


def _needed() -> tuple[str, ...]:
    if tool := compiler():
        return tool
    raise OSError(f"no C++ compiler: install g++ {OLDEST_GCC} or newer, or clang++, or set CXX")


def _version(tool: tuple[str, ...]) -> str:
    """What the compiler says of itself: told here, old GCC costs nobody a build that fails each time."""
    said = _run([*tool, "--version"])
    gcc = re.match(r"\S+ \(.*?\) (\d+)\.", said) if "Free Software Foundation" in said else None
    if gcc and int(gcc[1]) < OLDEST_GCC:
        raise OSError(
            f"{tool[0]} is GCC {gcc[1]}, too old: install g++ {OLDEST_GCC} or newer, or clang++, and set CXX"
        )
    return said


def _sound(folder: Path) -> bool:
    """Whether the folder holds a library that is, byte for byte, the one that was built."""
    try:
        with open(folder / NAME, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == (folder / "sha256").read_text()
    except OSError:
        return False


def _clear(level: str, folder: Path) -> None:
    """Remove what is damaged, what killed builds left, and libraries of this level long unused.

    Only the holder of the lock may: it knows that nobody else builds.
    """
    stale = [folder, *folder.parent.glob("building-*")]
    for other in folder.parent.glob(f"{level}-*"):
        with contextlib.suppress(OSError):
            if time.time() - other.stat().st_mtime > UNUSED:
                stale.append(other)
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)


def _build(
    level: str, tool: tuple[str, ...], sources: Path, folder: Path, say: Callable[[str], None]
) -> None:
    """Compile into a folder beside the place, then rename."""
    say(f"building the CPU kernels ({level}), once; about 30 s …")
    began = time.monotonic()
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}", f"-I{sources}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as scratch:
        done = Path(scratch) / "done"
        done.mkdir(mode=0o700)
        common = [
            *tool,
            *FLAGS,
            *LEVELS[level],
            abi,
            f"-DAGENTCTX_NS=agentctx_{level}",
            f"-I{scratch}",
            *include,
        ]
        if (header := sources / HEADER).exists():
            # torch's headers take seven of the eight seconds of a file: they are read once.
            _run([*common, "-x", "c++-header", str(header), "-o", f"{scratch}/{HEADER}.gch"])
            common += ["-include", HEADER]
        units = [path for path in _files(sources) if path.suffix == ".cpp"]
        objects = [Path(scratch) / f"{unit.stem}.o" for unit in units]
        commands = [
            [*common, "-c", str(unit), "-o", str(made)] for unit, made in zip(units, objects, strict=True)
        ]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        # The OpenMP runtime must be the one that torch itself loads: a second one has its own threads.
        linked = [
            f"-L{root / 'lib'}",
            "-ltorch_cpu",
            "-ltorch",
            "-lc10",
            _openmp(),
            f"-Wl,-rpath,{root / 'lib'}",
        ]
        _run([*tool, "-shared", "-o", str(done / NAME), *map(str, objects), *linked])
        (done / "sha256").write_text(hashlib.sha256((done / NAME).read_bytes()).hexdigest())
        done.rename(folder)
    say(f"built the CPU kernels ({level}) in {time.monotonic() - began:.0f} s")


def _files(sources: Path) -> list[Path]:
    return sorted(path for path in sources.iterdir() if path.suffix in (".h", ".cpp"))


def _openmp() -> str:
    """What to link for OpenMP: torch's own runtime if it brings one."""
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return str(bundled[0]) if bundled else "-fopenmp"


def _run(command: list[str]) -> str:
    """What a command prints. Raises OSError with the first line that tells why it failed."""
    name, plain = Path(command[0]).name, {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=plain,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{name} did not finish within {TIMEOUT} s") from error
    if done.returncode:
        said = done.stderr.splitlines()
        told = [line for line in said if "error" in line or "undefined" in line] or said
        raise OSError(f"{name} failed: {told[0] if told else f'exit status {done.returncode}'}")
    return done.stdout
