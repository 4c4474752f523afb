"""The runs on disk: one folder a run, with its manifest, its trace and its checkpoints.

The manifest says what was asked of what, so that a killed run can be taken up again; texts are in the blob
store, never here. No key and no secret is written, nor the login that an endpoint's URL may hold.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentctx.memory.atomic import make_private, storing, write_bytes
from agentctx.memory.blobs import Blobs
from agentctx.memory.errors import AgentctxError, InputError, StoreError
from agentctx.secret import without_login
from agentctx.workflows.trace import read_trace

SCHEMA = 1
LONGEST = 128  # bytes of an id: file systems allow 255
NEEDED = {"task", "strategy", "budget", "model", "documents", "started", "attempt", "status"}


@dataclass(frozen=True, slots=True)
class RunInfo:
    """One line of `runs ls`. `started` is in seconds since the epoch."""

    run_id: str
    task: str
    question: str
    status: str  # running, complete, partial, unanswerable, failed; damaged, or of another version
    started: float
    sources: tuple[str, ...]
    strategy: str
    model: str


class Runs:
    """The folder of runs."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, run_id: str) -> Path:
        """The folder of a run that may not exist yet; an id is a plain name, never a path."""
        plain = all(c.isalnum() or c in "-_." for c in run_id) and not run_id.startswith(".")
        if not run_id or not plain or len(run_id.encode()) > LONGEST:
            raise InputError(
                f"{run_id[:LONGEST]!r} is no run id",
                code="not_found",
                hint=f"ids are letters, digits, '-', '_' and '.', at most {LONGEST} bytes",
            )
        return self.root / run_id

    @contextmanager
    def locked(self, run_id: str) -> Iterator[None]:
        """Keep others from the run meanwhile: two that carry it out would pay for everything twice.

        Raises StoreError: locked, no_space, unwritable.
        """
        folder = self.folder(run_id)
        with storing(folder):
            make_private(folder)
            file = (folder / "lock").open("a")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with its process
            except BlockingIOError:
                raise StoreError(
                    f"run {run_id} is being carried out", code="locked", hint="wait for it, or stop it"
                ) from None
            yield

    def write(self, run_id: str, manifest: dict[str, Any]) -> None:
        """Raises StoreError: no_space, unwritable."""
        if url := manifest["model"].get("base_url"):
            manifest = {**manifest, "model": {**manifest["model"], "base_url": without_login(url)}}
        text = json.dumps({"schema": SCHEMA, **manifest}, ensure_ascii=False, indent=1)
        path = self.folder(run_id) / "run.json"
        with storing(path):
            write_bytes(path, text.encode("utf-8", "surrogatepass"))

    def manifest(self, run_id: str) -> dict[str, Any]:
        """The manifest. Raises InputError for an unknown id, StoreError for a damaged or newer one."""
        path = self.folder(run_id) / "run.json"
        if not path.exists():
            raise InputError(f"there is no run {run_id}", code="not_found", hint="see: agentctx runs ls")
        try:
            value = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            value = None
        schema = value.get("schema") if isinstance(value, dict) else SCHEMA
        if schema != SCHEMA:
            raise StoreError(
                f"run {run_id} was written by another version (schema {schema})",
                code="version",
                hint=f"use that version, or agentctx runs rm {run_id}",
            )
        if not isinstance(value, dict) or NEEDED - value.keys():
            raise StoreError(
                f"the manifest of run {run_id} is damaged", code="corrupt", hint=f"agentctx runs rm {run_id}"
            )
        return value

    def get(self, run_id: str) -> RunInfo:
        value = self.manifest(run_id)
        return RunInfo(
            run_id,
            value["task"]["kind"],
            value["task"]["question"],
            value["status"],
            value["started"],
            tuple(source for _, source in value["documents"]),
            value["strategy"],
            value["model"]["name"],
        )

    def list(self) -> list[RunInfo]:
        """All runs, newest first."""
        if not self.root.is_dir():
            return []
        found = [self._listed(path) for path in self.root.glob("*/run.json")]
        return sorted(found, key=lambda info: -info.started)

    def _listed(self, path: Path) -> RunInfo:
        """A run that cannot be read has its line too, so that it can be removed."""
        try:
            return self.get(path.parent.name)
        except AgentctxError as error:
            status = "another version" if error.code == "version" else "damaged"
            return RunInfo(path.parent.name, "", "", status, path.stat().st_mtime, (), "", "")

    def trace(self, run_id: str) -> Iterator[dict[str, Any]]:
        """The events of a run so far."""
        self.manifest(run_id)
        path = self.folder(run_id) / "trace.jsonl"
        return read_trace(path) if path.exists() else iter(())

    def remove(self, run_id: str, blobs: Blobs | None = None) -> None:
        """Delete the run's manifest, trace and checkpoints, and of its `blobs` those that no other run names.

        Checkpoints in a database are deleted first, in the one that is named now; StoreError if it does not
        answer, or if the run is being carried out.
        """
        from agentctx.checkpoints import forget

        try:
            manifest = self.manifest(run_id)
        except StoreError:  # damaged, or of another version: it does not say what is its own
            manifest = {"attempt": -1, "documents": []}
        with self.locked(run_id):
            forget([thread_of(run_id, manifest, number) for number in range(manifest["attempt"] + 1)])
            with storing(self.folder(run_id)):
                shutil.rmtree(self.folder(run_id))
        if blobs:
            self._drop(_documents(manifest), blobs)

    def _drop(self, documents: set[tuple[str, str]], blobs: Blobs) -> None:
        """Delete those that no run names; all stay while there is a run that does not say what it needs."""
        try:
            for path in self.root.glob("*/run.json"):
                documents -= _documents(self.manifest(path.parent.name))
        except StoreError:
            return
        for document_id, source in documents:
            blobs.drop_document(document_id, source)


def _documents(manifest: dict[str, Any]) -> set[tuple[str, str]]:
    return {(document_id, source) for document_id, source in manifest["documents"]}


def thread_of(run_id: str, manifest: dict[str, Any], attempt: int) -> str:
    """Under what the checkpoints of an attempt are kept.

    With the run's start, because a database may be shared, and an id may be used again once a run is removed.
    """
    return f"{run_id}:{attempt}:{manifest['started']}"
