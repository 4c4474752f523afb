"""The list of files of a stored model, written last: a folder without it is unfinished and never loaded.

Sizes and SHA-256 are checked before use, because the libraries that read weights do not notice a flipped
bit. Hashing 270 MB takes 0.2 s and runs beside the import of torch, so every load checks every byte.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from agentctx.memory.errors import ModelError
from agentctx.models.disk import flush, write_atomic

NAME = "manifest.json"
CONVERTED = "gguf-"  # a folder made of a GGUF file of the user: this, and the beginning of the file's SHA-256
SCHEMA = 1
_PIECE = 16 << 20  # bytes read at once: between two of them a thread waits until the one that imports lets go


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a model folder holds: `files` maps names to (bytes, SHA-256)."""

    name: str
    source: str  # SHA-256 of the file the folder was made from
    dtype: str
    files: Mapping[str, tuple[int, str]]
    schema: int = SCHEMA

    @classmethod
    def of(cls, folder: Path, *, name: str, source: str, dtype: str) -> Manifest:
        """Hash the files of `folder`."""
        paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != NAME)
        files = {path.name: (path.stat().st_size, sha256(path)) for path in paths}
        return cls(name, source, dtype, files)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of `folder`; None if there is none, or one of another version."""
        try:
            fields = json.loads((folder / NAME).read_bytes())
            files = {str(name): (int(size), str(digest)) for name, (size, digest) in fields["files"].items()}
            found = cls(fields["name"], fields["source"], fields["dtype"], files, fields["schema"])
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return found if found.schema == SCHEMA else None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())

    @property
    def digest(self) -> str:
        """One SHA-256 over everything that is listed."""
        return hashlib.sha256(self._json()).hexdigest()

    def write(self, folder: Path) -> None:
        write_atomic(folder / NAME, self._json())

    def verify(self, folder: Path) -> None:
        """Compare the files of `folder` with the list; ModelError `wrong_hash` names the first difference."""
        for name, (size, digest) in self.files.items():
            path = folder / name
            if not path.is_file():
                raise _damaged(path, "is missing", self.name)
            if path.stat().st_size != size:
                raise _damaged(path, f"has {path.stat().st_size} bytes instead of {size}", self.name)
            if sha256(path) != digest:
                raise _damaged(path, "has changed since it was made", self.name)

    def _json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()


def seal(part: Path, target: Path, *, name: str, source: str, dtype: str) -> None:
    """Write the manifest of the folder `part`, whose files are whole, and give it its name `target`."""
    for path in part.iterdir():
        path.chmod(0o600)
        flush(path)
    Manifest.of(part, name=name, source=source, dtype=dtype).write(part)
    os.replace(part, target)
    flush(target.parent)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(piece):
            digest.update(piece[:size])
    return digest.hexdigest()


def _damaged(path: Path, what: str, name: str) -> ModelError:
    key, repair = path.parent.name, f"run `agentctx models fetch {name}` to repair it"
    if key.startswith(CONVERTED):
        repair = f"run `agentctx models rm {key}`: it is made again when the GGUF file is opened"
    return ModelError(f"the model file {path} {what}", code="wrong_hash", hint=repair)
