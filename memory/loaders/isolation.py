"""Read a file in a worker process with a time and a memory limit.

One process serves many files, since starting one and importing a PDF library costs more than most files; it
is started with the first job, and anew after a file that killed it. It gets the import path of this process
but never the current directory, where documents from strangers may lie.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from agentctx.memory.errors import InputError
from agentctx.memory.loaders.parts import Part
from agentctx.memory.types import Locator, Notice

SECONDS = 120
MEMORY_BYTES = 2 * 1024**3
CHARACTERS = 100_000_000  # of text: some formats can say the same again and again in a few bytes
PACKAGE_PARENT = Path(__file__).parents[3]


class Worker:
    """Use as a context manager; one job at a time."""

    def __init__(
        self, *, seconds: int = SECONDS, memory_bytes: int = MEMORY_BYTES, characters: int = CHARACTERS
    ) -> None:
        self.seconds = seconds
        self.memory_bytes = memory_bytes
        self.characters = characters
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[bytes] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process, if one runs."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None
        if self._log:
            self._log.close()
            self._log = None

    def read(self, reader: str, path: str, encoding: str | None) -> tuple[list[Part], InputError | None]:
        """The parts that could be read and what stopped the reader, None if nothing did."""
        process = self._running()
        parts: list[Part] = []
        late = threading.Event()
        answered = False

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self.seconds, stop)
        timer.start()
        try:
            job = json.dumps({"reader": reader, "path": os.path.abspath(path), "encoding": encoding})
            if not process.stdin or not process.stdout:
                raise RuntimeError("the worker has no pipes")
            with suppress(BrokenPipeError):  # it died before; its end is read below
                process.stdin.write(job + "\n")
                process.stdin.flush()
            for line in process.stdout:
                if not line.endswith("\n"):
                    break  # it died while it wrote
                reply = json.loads(line)
                if "end" in reply:
                    answered = True
                    return parts, InputError(**reply["end"]) if reply["end"] else None
                parts.append(_part(reply))
            return parts, self._death(late.is_set())
        finally:
            timer.cancel()
            if late.is_set() or not answered:
                self.close()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed by close()
            path = [str(PACKAGE_PARENT), *(entry for entry in sys.path if entry)]
            threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # each would reserve memory
            module = "agentctx.memory.loaders.worker"
            limits = map(str, (self.seconds, self.memory_bytes, self.characters))
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *limits],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                encoding="ascii",
                env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(path)},
            )
        return self._process

    def _death(self, late: bool) -> InputError:
        if late:
            hint = "split the file, or name the parts that matter"
            return InputError(f"not read within {self.seconds} seconds", code="timeout", hint=hint)
        last = ""
        if self._log:
            self._log.seek(0)
            lines = self._log.read().decode(errors="replace").strip().splitlines()
            last = lines[-1][:200] if lines else ""
        hint = "get an undamaged copy of the file"
        return InputError(f"the reader broke down: {last or 'killed'}", code="corrupt", hint=hint)


def _part(reply: dict[str, Any]) -> Part:
    locators = tuple(Locator(*at) for at in reply["locators"])
    return Part(reply["text"], locators, tuple(Notice(**notice) for notice in reply["notices"]))
