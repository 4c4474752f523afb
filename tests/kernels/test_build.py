"""The C++ build with the real compiler, on a source of one line; the real sources once for each level."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from agentctx.kernels import choose
from agentctx.kernels.cpu import build
from agentctx.kernels.records import KVPages
from agentctx.kernels.store import pack_pages

CXX = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
CHILD = """
import ctypes, sys
from pathlib import Path
from agentctx.kernels.cpu import build
place = build.library("plain", sources=Path(sys.argv[1]))
print(place, ctypes.CDLL(str(place)).answer())
"""
CACHES = (build.reason, build.features, build.best, choose.unavailable, choose.function)
pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


@pytest.fixture
def fresh():
    """No answer of an earlier test is remembered, and none of this one is kept."""
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch, fresh):
    """An empty cache and the usual compiler."""
    monkeypatch.setenv("AGENTCTX_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "home" / "cache" / "kernels"


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "answer.cpp").write_text(
        'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
    )
    return folder


@pytest.fixture
def stand_in(monkeypatch):
    """`pack_pages` has a C++ implementation, whatever the tree holds."""
    name = "agentctx.kernels.cpu.store"
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.pack_pages = lambda lib, kv: pytest.fail("there is no library to call")
    monkeypatch.setitem(sys.modules, name, module)


def script(path, body, version="stand-in 1.0"):
    """A compiler that answers `--version` and otherwise does `body`; "$CXX" is the real one there."""
    told = f'case "$*" in *--version) echo "{version}"; exit 0;; esac'
    path.write_text(f"#!/bin/sh\nCXX={CXX}\n{told}\n{body}\n")
    path.chmod(0o755)
    return str(path)


def answer(place):
    return ctypes.CDLL(str(place)).answer()


def torch_serves(wanted):
    """Packing works in torch, with one warning in all that says why; so does `available()`."""
    kv = KVPages(torch.randn(2, 1, 64, 32), torch.randn(2, 1, 64, 32), 64, 32)
    with pytest.warns(RuntimeWarning) as seen:
        packed = pack_pages(kv)
        assert torch.equal(pack_pages(kv).k, packed.k)
        why = choose.available()["pack_pages"]
    assert torch.equal(packed.k, pack_pages(kv, impl="torch").k)
    assert [str(w.message) for w in seen] == [
        f"the C++ kernels cannot be used, torch serves instead (slower): {why['cpp']}"
    ]
    assert why["torch"] is None and wanted in why["cpp"]
    with pytest.raises(choose.KernelUnavailable, match="pack_pages: cpp cannot run"):
        pack_pages(kv, impl="cpp")


def test_without_a_compiler_torch_serves(cache, stand_in, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    torch_serves("no C++ compiler: install g++ 12 or newer, or clang++, or set CXX")
    assert not cache.exists()


def test_a_compiler_that_is_not_there(cache, stand_in, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    torch_serves("no C++ compiler")


def test_a_compiler_that_fails(cache, stand_in, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", 'echo "a.cpp:1: error: too old" >&2; exit 1'))
    torch_serves("cxx failed: a.cpp:1: error: too old")
    assert [path.name for path in cache.iterdir()] == ["flock"]


@pytest.mark.parametrize(
    "version", ["g++ (Ubuntu 11.4.0-1ubuntu1~22.04) 11.4.0", "g++ (GCC) 11.5.0 2024 (Red Hat 11.5.0-5)"]
)
def test_a_gcc_that_is_too_old_is_not_tried(cache, stand_in, monkeypatch, tmp_path, version):
    said = f"{version} / Free Software Foundation, Inc."
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", f"touch {tmp_path / 'tried'}; exit 1", said))
    torch_serves("cxx is GCC 11, too old: install g++ 12 or newer")
    with pytest.raises(OSError, match="GCC 11, too old"):
        build.built("plain")
    assert not (tmp_path / "tried").exists()


def test_a_compiler_that_does_not_know_its_version(cache, stand_in, monkeypatch, tmp_path):
    broken = tmp_path / "cxx"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    torch_serves("cxx failed: exit status 3")


def test_a_cache_that_cannot_be_written(cache, stand_in, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("a folder below a file cannot be made, not even by root")
    monkeypatch.setenv("AGENTCTX_HOME", str(tmp_path / "file"))
    torch_serves("Not a directory")


def test_a_library_that_does_not_load_is_built_once(cache, stand_in, monkeypatch, tmp_path):
    log = tmp_path / "calls"
    body = f'echo x >> {log}; while [ "$1" != -o ]; do shift; done; echo garbage > "$2"'
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", body))
    torch_serves("agentctx.so")
    units = len(list(build.SOURCES.glob("*.cpp")))
    assert len(log.read_text().split()) == units + 2  # the headers, and the link


def test_a_library_is_built_once_and_serves(cache, sources, capsys):
    place = build.library("plain", sources=sources)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0].startswith("building the CPU kernels (plain), once")
    assert said[1].startswith("built the CPU kernels (plain) in ")
    assert answer(place) == 42 and place.is_relative_to(cache)
    assert {path.name for path in cache.iterdir()} == {"flock", place.parent.name}
    assert build.library("plain", sources=sources) == place
    assert capsys.readouterr().err == ""
    assert {cache.stat().st_mode & 0o777, cache.parent.stat().st_mode & 0o777} == {0o700}


def test_a_callback_gets_the_lines(cache, sources, capsys):
    said = []
    build.library("plain", sources=sources, say=said.append)
    assert len(said) == 2 and capsys.readouterr().err == ""


def test_a_compiler_killed_midway_leaves_nothing(cache, sources, monkeypatch, tmp_path):
    body = 'while [ "$1" != -o ]; do shift; done; echo half > "$2"; kill -9 $$'
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", body))
    with pytest.raises(OSError, match="cxx failed: exit status -9"):
        build.library("plain", sources=sources)
    assert [path.name for path in cache.iterdir()] == ["flock"]
    monkeypatch.delenv("CXX")
    assert answer(build.library("plain", sources=sources)) == 42


def child(sources, **env):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(sources)],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_process_killed_midway_leaves_no_lock_and_no_rubbish(cache, sources, tmp_path):
    mark = tmp_path / "compiling"
    with child(sources, CXX=script(tmp_path / "cxx", f"touch {mark}; sleep 60")) as process:
        while not mark.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    assert list(cache.glob("building-*"))
    assert answer(build.library("plain", sources=sources)) == 42
    assert not list(cache.glob("building-*"))


def test_two_processes_build_once(cache, sources, tmp_path):
    log = tmp_path / "calls"
    cxx = script(tmp_path / "cxx", f'echo "$*" >> {log}; sleep 1; exec $CXX "$@"')
    pair = [child(sources, CXX=cxx) for _ in range(2)]
    ends = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], ends
    first, second = (out for out, _ in ends)
    assert first == second and first.endswith(" 42\n")
    assert len(log.read_text().splitlines()) == 2  # one unit and the link
    assert sorted(err.count("\n") for _, err in ends) == [0, 2]


@pytest.mark.parametrize("name", [build.NAME, "sha256"])
def test_a_damaged_library_is_built_again_once(cache, sources, name):
    said = []
    place = build.library("plain", sources=sources, say=said.append)
    os.truncate(place.with_name(name), 20)
    assert build.library("plain", sources=sources, say=said.append) == place
    assert len(said) == 4 and answer(place) == 42
    build.library("plain", sources=sources, say=said.append)
    assert len(said) == 4


def test_a_library_without_its_file_is_built_again(cache, sources):
    place = build.library("plain", sources=sources, say=len)
    place.unlink()
    assert answer(build.library("plain", sources=sources, say=len)) == 42


def test_what_is_long_unused_is_removed(cache, sources):
    month = time.time() - build.UNUSED
    ages = {
        "plain-old": month - 60,
        "plain-used": month + 60,
        "avx2-old": month - 60,
        "building-x": month + 60,
    }
    for name, age in ages.items():
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (age, age))
    place = build.library("plain", sources=sources, say=len)
    assert {path.name for path in cache.iterdir()} == {"flock", "plain-used", "avx2-old", place.parent.name}
    os.utime(place.parent, (month - 60, month - 60))
    build.library("plain", sources=sources, say=len)
    assert place.parent.stat().st_mtime > month  # a use counts


def test_the_key_names_all_that_a_library_depends_on(cache, sources, monkeypatch, tmp_path):
    def key(level="plain"):
        return build.key(level, build.compiler(), sources)

    def changed(wanted=True):
        new = key()
        assert (new not in keys) == wanted
        keys.append(new)

    keys = [key()]
    changed(False)
    assert key("avx2").split("-")[1] != keys[0].split("-")[1]
    (sources / "notes.txt").write_text("not a source")
    changed(False)
    (sources / "more.h").write_text("// a header")
    changed()
    (sources / "more.h").write_text("// a header, changed")
    changed()
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    changed()
    monkeypatch.setattr(torch, "__version__", "9.9")
    changed()
    for version in ("1.0", "1.1"):
        monkeypatch.setenv("CXX", script(tmp_path / "cxx", "exit 1", version))
        changed()
    monkeypatch.setenv("CXX", f"{tmp_path / 'cxx'} -stdlib=other")
    changed()


def test_the_compiler_is_that_of_CXX(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", f"{script(tmp_path / 'cxx', 'exit 1')} -g")
    assert build.compiler() == (str(tmp_path / "cxx"), "-g")
    monkeypatch.setenv("CXX", "")
    assert build.compiler() == (CXX,)


def test_what_is_built_is_told_without_building(cache, sources, monkeypatch):
    assert build.built("plain", sources=sources) is None and not cache.exists()
    place = build.library("plain", sources=sources, say=len)
    assert build.built("plain", sources=sources) == place
    os.truncate(place, 20)
    assert build.built("plain", sources=sources) is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(OSError, match="no C\\+\\+ compiler"):
        build.built("plain")


@pytest.mark.parametrize(
    ("machine", "has", "best"),
    [
        ("x86_64", {"avx2", "avx512", "avx512_bf16", "amx_tile"}, "brgemm"),
        ("x86_64", {"avx2", "avx512", "avx512_bf16"}, "avx512_bf16"),
        ("x86_64", {"avx2", "avx512"}, "avx512"),
        ("x86_64", {"avx2"}, "avx2"),
        ("x86_64", set(), "plain"),
        ("aarch64", {"avx2"}, "plain"),
    ],
)
def test_the_level_is_that_of_the_processor(fresh, monkeypatch, machine, has, best):
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    for name in ("avx2", "avx512", "avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in has)
    assert build.best() == best
    assert build.reason("avx512_bf16") == "this processor has no avx512_bf16" or "avx512_bf16" in has


def test_an_unknown_level(fresh):
    with pytest.raises(ValueError, match="level is 'sse': use one of brgemm, avx512_bf16"):
        build.reason("sse")


@pytest.mark.parametrize("level", build.LEVELS)
def test_every_level_of_this_processor_runs(level):
    if level not in build.features():
        pytest.skip(f"this processor has no {level}")
    assert build.reason(level) is None
    for threads in (1, 2):
        build.load(level).region(threads)
    place = build.built(level)
    assert place is not None and place.parent.parent == build.cache_folder()
