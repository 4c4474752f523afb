"""Open a workflow file: it and what it names are read once, from its own folder and nowhere else."""

from __future__ import annotations

from pathlib import Path

from agentctx.memory.errors import AgentctxError, ConfigError, InputError
from agentctx.workflows.definition.file import MOST_BYTES, read_source
from agentctx.workflows.definition.schema import Workflow, parsed
from agentctx.workflows.definition.site import Folder
from agentctx.workflows.definition.strategy import Definition
from agentctx.workflows.definition.table import node_type

MOST_FILES = 64


def open_definition(path: str | Path) -> Definition:
    """The workflow of a YAML file, checked, as a strategy. Nothing is read from disk afterwards.

    Raises InputError if the file cannot be read, ConfigError (file, line, key, remedy) if it is not right.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"there is no file {path}", code="not_found", source=str(path), hint="name a YAML file"
        )
    path = path.resolve()  # a link to a workflow is that workflow, in its own folder
    files: dict[str, str] = {}
    _gather(path.parent, path.name, files)
    made = Definition(path.name, files)
    made.check()
    return made


def _gather(root: Path, name: str, files: dict[str, str]) -> None:
    """Read a workflow file, and the files that it names, into `files`."""
    files[name] = _read(root, name)
    source = read_source(files[name], name)
    folder = Folder(files, name)
    for title, node in parsed(Workflow, source.data, source).nodes.items():
        try:
            kind = node_type(node.type)
        except ConfigError:
            continue  # the check of the whole says where
        for param in kind.files:
            given = node.with_.get(param)
            if not isinstance(given, str):
                continue
            try:
                path = folder.path(given)
                if path in files:
                    continue
                if len(files) >= MOST_FILES:
                    raise ValueError(f"more than {MOST_FILES} files are named")
                if node.type == "definition":
                    _gather(root, path, files)
                else:
                    files[path] = _read(root, path)
            except (ValueError, InputError) as error:
                message = error.message if isinstance(error, AgentctxError) else str(error)
                where = ("nodes", title, "with", param)
                raise source.error(where, message, "name a file beside the workflow") from None


def _read(root: Path, name: str) -> str:
    """The text of a file below `root`, links followed. Raises InputError."""
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise InputError(f"{name!r} is a link out of the workflow's folder", code="outside", source=name)
    if not path.is_file():  # not there, a folder, or a pipe that would never end
        raise InputError(f"{name} cannot be read: there is no such file", code="not_found", source=name)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{name} is larger than {MOST_BYTES // 1000} kB", code="too_large", source=name)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise InputError(f"{name} cannot be read: {reason}", code="unsupported", source=name) from None
