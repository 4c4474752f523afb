"""Blocks of keys and values on disk, each in a file named after every token up to its end.

    root/<model>/ab/ab3f….safetensors     k, v [layers, Hkv, tokens, D]; metadata: version, codec, checksum
    root/<model>/readings/<document>.json names of the blocks of a document, so that it can be found and
    deleted

The name is the chained hash of `chain.blocks`, so a block is written once however many texts share it, a text
that grew is recomputed from its last full block on, and two processes that read the same text write the same
bytes. A file is renamed into place when it is whole, and its checksum is verified when it is read: a damaged
block counts as absent, is reported, and is computed again. So nothing waits for the disk to be flushed.

The least recently used blocks leave when `budget` bytes are exceeded; the times are those of the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from agentctx.kernels.quant import dequantize_pages, quantize_pages
from agentctx.kernels.records import KVPages
from agentctx.memory.atomic import make_private, write_bytes
from agentctx.memory.errors import ConfigError, StoreError
from agentctx.memory.kv.pool import PAGE_TOKENS

VERSION = "1"
CODECS = {"plain": 0, "int8": 8, "int4": 4}  # bits; plain keeps the dtype


@dataclass(frozen=True, slots=True)
class Held:
    """What the store holds of one document."""

    document: str
    source: str
    model: str
    tokens: int
    bytes: int
    used: float  # seconds since the epoch


class BlockStore:
    """The blocks of one model. Safe for several processes; `budget` is in bytes, for all models under
    `root`.
    """

    def __init__(self, root: Path, model: str, *, budget: int, codec: str = "plain") -> None:
        if codec not in CODECS:
            raise ConfigError(f"there is no KV codec {codec!r}", hint=f"known: {', '.join(CODECS)}")
        self.root = root
        self.folder = root / model
        self.budget = budget
        self.codec = codec
        self._bytes: int | None = None  # counted when first needed

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def get(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """K and V `[layers, Hkv, tokens, D]` of a block, or None if it is not there.

        Raises StoreError `corrupt` for a damaged file (which is removed) and `version` for one of another
        version.
        """
        path = self._path(name)
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            raise self._corrupt(path, str(error)) from error
        if about.get("version") != VERSION:
            raise StoreError(
                f"{path} has version {about.get('version')}, this program reads {VERSION}",
                code="version",
                hint="remove it with `agentctx kv rm --all`: it is computed again",
            )
        if about.get("checksum") != _checksum(tensors):
            raise self._corrupt(path, "its checksum differs")
        with suppress(OSError):
            os.utime(path)
        return _decode(tensors, about["codec"], dtype)

    def put(self, name: str, k: Tensor, v: Tensor) -> None:
        """Store a block `[layers, Hkv, tokens, D]`, making room first. Present: nothing is done.

        int8 and int4 apply to whole blocks; a shorter one, the end of a text, stays as it is. Raises
        StoreError (no_space, unwritable) and leaves no part of a file.
        """
        path = self._path(name)
        if path.exists():
            return
        codec = self.codec if k.shape[2] == PAGE_TOKENS else "plain"
        tensors = _encode(k, v, codec)
        data = save(tensors, {"version": VERSION, "codec": codec, "checksum": _checksum(tensors)})
        self._make_room(len(data))
        _write(path, data)
        self._bytes = self.used_bytes + len(data)

    def note(self, document: str, source: str, names: Sequence[str], tokens: int) -> None:
        """Remember which blocks hold a document."""
        record = {"version": VERSION, "source": source, "tokens": tokens, "blocks": list(names)}
        write_bytes(self.folder / "readings" / f"{document}.json", json.dumps(record).encode())

    def held(self) -> list[Held]:
        """The documents noted, with the bytes that are still there of each."""
        found = []
        for path in sorted((self.folder / "readings").glob("*.json")):
            record = json.loads(path.read_bytes())
            sizes = [file.stat() for name in record["blocks"] if (file := self._path(name)).exists()]
            used = max((size.st_mtime for size in sizes), default=path.stat().st_mtime)
            total = sum(size.st_size for size in sizes)
            found.append(Held(path.stem, record["source"], self.folder.name, record["tokens"], total, used))
        return found

    def remove(self, document: str) -> int:
        """Delete the blocks of a document that no other noted document has; returns the bytes freed."""
        note = self.folder / "readings" / f"{document}.json"
        if not note.exists():
            return 0
        own = set(json.loads(note.read_bytes())["blocks"])
        for other in note.parent.glob("*.json"):
            if other != note:
                own -= set(json.loads(other.read_bytes())["blocks"])
        freed = sum(_delete(self._path(name)) for name in own)
        note.unlink()
        self._bytes = None
        return freed

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks of all models under the root."""
        if self._bytes is None:
            self._bytes = sum(status.st_size for _, status in _files(self.root))
        return self._bytes

    def _make_room(self, wanted: int) -> None:
        if self.used_bytes + wanted <= self.budget:
            return
        if wanted > self.budget:
            raise StoreError(f"a KV block of {wanted:,} bytes exceeds the budget of {self.budget:,}")
        found = sorted(_files(self.root), key=lambda file: file[1].st_mtime)
        total = sum(status.st_size for _, status in found)
        for path, status in found:
            if total + wanted <= self.budget * 0.9:  # some room ahead, or every block would search anew
                break
            _delete(path)
            total -= status.st_size
        self._bytes = total

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"

    def _corrupt(self, path: Path, why: str) -> StoreError:
        _delete(path)
        return StoreError(
            f"the KV block {path} is damaged: {why}", code="corrupt", hint="it is computed again"
        )


def _files(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in root.glob("*/*/*.safetensors"):
        with suppress(FileNotFoundError):
            yield path, path.stat()


def _delete(path: Path) -> int:
    with suppress(FileNotFoundError):
        size = path.stat().st_size
        path.unlink()
        return size
    return 0


def _write(path: Path, data: bytes) -> None:
    temporary = None
    try:
        make_private(path.parent)
        handle, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
        with open(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
        raise StoreError(
            f"KV cannot be kept under {path.parent}: {error.strerror or error}",
            code="no_space" if error.errno in (28, 122) else "unwritable",
            hint="free some space, lower kv_bytes, or set AGENTCTX_HOME to another disk",
        ) from error


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _encode(k: Tensor, v: Tensor, codec: str) -> dict[str, Tensor]:
    if codec == "plain":
        return {"k": k.contiguous(), "v": v.contiguous()}
    pages = quantize_pages(k.contiguous(), v.contiguous(), CODECS[codec])
    assert pages.k_scale is not None and pages.v_scale is not None
    return {"k": pages.k, "v": pages.v, "k_scale": pages.k_scale, "v_scale": pages.v_scale}


def _decode(tensors: dict[str, Tensor], codec: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if codec == "plain":
        return tensors["k"].to(dtype), tensors["v"].to(dtype)
    size = tensors["k_scale"].shape[2]
    pages = KVPages(
        tensors["k"], tensors["v"], PAGE_TOKENS, size, codec, tensors["k_scale"], tensors["v_scale"]
    )
    return dequantize_pages(pages, torch.arange(pages.n_pages, dtype=torch.int32), dtype)
