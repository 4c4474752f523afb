"""The C++ kernels, compiled on the user's machine at first use: once for each level of the processor.

A level is a set of compiler flags; the sources are the same. The library of a level registers its operators
as `torch.ops.agentctx_<level>`. It is kept in the user's cache under a key of all that it depends on, so a
folder that travels between machines never serves a wrong one. The compiler is called directly: torch's
extension loader needs ninja and keeps a lock file that a killed build leaves behind. Ours is an flock,
which dies with its owner; the library is written beside its place and renamed, so a half-written one is
never loaded.

A missing or failing compiler is not an error: there is one warning, `reason` tells it, and torch serves
instead.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parent / "src"
TIMEOUT = 600  # seconds for one source; a busy machine takes ten times the usual ten

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


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first of c++, g++ and clang++ on the path."""
    named = os.environ.get("CXX")
    names = (named,) if named else ("c++", "g++", "clang++")
    return next((path for name in names if (path := shutil.which(name))), None)


@functools.cache
def reason(level: str) -> str | None:
    """Why the library of `level` cannot be used here, or None. Builds it if it is not there yet."""
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}: use one of {', '.join(LEVELS)}")
    if level not in features():
        return f"this processor has no {level}"
    try:
        torch.ops.load_library(str(_library(level)))  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        why = str(error)
        warnings.warn(f"the C++ kernels cannot be used, torch serves instead (slower): {why}", stacklevel=2)
        return why
    return None


def load(level: str) -> Any:
    """The operators of a level whose `reason` is None."""
    if why := reason(level):
        raise OSError(why)
    return getattr(torch.ops, f"agentctx_{level}")


def built(level: str) -> Path | None:
    """The library of `level` in the cache, if it is there and the compiler that made it is still the same."""
    if (tool := compiler()) is None:
        return None
    place = cache_folder() / key(level, tool) / "agentctx.so"
    return place if place.exists() else None


@functools.cache
def key(level: str, tool: str) -> str:
    """A name for everything a library depends on."""
    version = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=TIMEOUT, check=True)
    parts = [level, *FLAGS, *LEVELS[level], torch.__version__, version.stdout, platform.machine()]
    for source in sorted(SOURCES.iterdir()):
        parts += [source.name, source.read_text()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return f"{level}-{digest[:20]}"


def _library(level: str) -> Path:
    """The library of `level`, built under a lock if it is missing."""
    tool = compiler()
    if tool is None:
        raise OSError("no C++ compiler: install g++ or clang++, or set CXX")
    place = cache_folder() / key(level, tool) / "agentctx.so"
    if place.exists():
        return place
    place.parent.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(place.parent.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            _build(level, tool, place)
    return place


def _build(level: str, tool: str, place: Path) -> None:
    """Compile into a folder beside the place, then rename."""
    _say(f"building the CPU kernels ({level}), once; about 30 s …")
    began = time.monotonic()
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}", f"-I{SOURCES}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    common = [tool, *FLAGS, *LEVELS[level], abi, f"-DAGENTCTX_NS=agentctx_{level}", *include]
    with tempfile.TemporaryDirectory(dir=place.parent.parent, prefix="building-") as scratch:
        folder = Path(scratch) / "done"
        folder.mkdir()
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        commands = [
            [*common, "-c", str(source), "-o", str(made)]
            for source, made in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(_compile, commands))
        _compile([tool, "-shared", "-o", str(folder / "agentctx.so"), *map(str, objects), *_libraries(root)])
        folder.rename(place.parent)
    _say(f"built the CPU kernels ({level}) in {time.monotonic() - began:.0f} s")


def _libraries(root: Path) -> list[str]:
    """What to link: torch, and the OpenMP runtime that torch itself loads. A second runtime has its own
    threads.
    """
    lib = root / "lib"
    bundled = sorted(lib.glob("libgomp*.so*"))
    openmp = [str(bundled[0])] if bundled else ["-fopenmp"]
    return [f"-L{lib}", "-ltorch_cpu", "-ltorch", "-lc10", *openmp, f"-Wl,-rpath,{lib}"]


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise OSError(f"{Path(command[0]).name} failed: {lines[0] if lines else done.returncode}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
