"""The Triton kernels without a GPU, in processes of their own that run beside each other.

A: Triton's interpreter. B: ahead-of-time compiling, under the installed Triton and under the oldest that is
supported, which `make install` puts into `.venv/triton-3.6`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OLDEST = ROOT / ".venv" / "triton-3.6"
PROCESSES = {"interpreted": "interpreted", "compiled": "compiled", "compiled by triton 3.6": "compiled"}

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen, Path]]]:
    """All of them, started at once; each writes to a file."""
    scratch = tmp_path_factory.mktemp("triton")
    started = {}
    for name, folder in PROCESSES.items():
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TRITON_CACHE_DIR": str(scratch / f"{name} cache"),
        }
        if folder == "interpreted":
            environment["TRITON_INTERPRET"] = "1"
        if name.endswith("3.6"):
            if not OLDEST.is_dir():
                continue
            paths = [str(OLDEST), *environment.get("PYTHONPATH", "").split(os.pathsep)]
            environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        target = Path("tests") / "kernels" / folder
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(target)]
        with (scratch / name).open("w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        started[name] = (process, scratch / name)
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_process(name: str, running: dict[str, tuple[subprocess.Popen, Path]]) -> None:
    if name not in running:
        pytest.skip("make install puts Triton 3.6 into .venv/triton-3.6; it is not there")
    process, output = running[name]
    code = process.wait()
    assert code == 0, output.read_text()[-8000:]
