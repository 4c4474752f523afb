"""Blocks of keys and values on disk, each in a file named after every token up to its end.

A file is a safetensors file: k and v `[layers, Hkv, tokens, D]`, or their codes and scales; in its metadata
the version of the format, the codec and a checksum of all of it.

The name is the chained hash of `chain.blocks`, so a block is written once however many texts share it, a text
that grew is recomputed from its last full block on, and two processes that read the same text write the same
bytes. The checksum is verified when a file is read: a damaged block counts as absent and is computed again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from agentctx.kernels.quant import dequantize_pages, quantize_pages
from agentctx.kernels.records import KVPages
from agentctx.memory.errors import ConfigError, StoreError
from agentctx.memory.kv.files import SUFFIX, block_file
from agentctx.memory.kv.owners import name_blocks
from agentctx.memory.kv.pool import PAGE_TOKENS
from agentctx.memory.kv.shelf import Shelf

VERSION = "1"
CODECS = {"plain": 0, "int8": 8, "int4": 4}  # bits; plain keeps the dtype


class BlockStore:
    """The blocks of one model under `root`, where all models share `budget` bytes.

    `model` is the fingerprint that the blocks depend on, `name` what a person calls it.
    """

    def __init__(self, root: Path, model: str, *, budget: int, codec: str = "plain", name: str = "") -> None:
        if codec not in CODECS:
            raise ConfigError(f"there is no KV codec {codec!r}", hint=f"known: {', '.join(CODECS)}")
        self.shelf = Shelf(root, budget=budget)
        self.folder = root / model
        self.name = name or model
        self.codec = codec

    def __contains__(self, name: str) -> bool:
        return os.path.exists(f"{self.folder}/{name[:2]}/{name}{SUFFIX}")  # half the time of a Path

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
        if about.get("checksum") != _checksum(tensors, about):
            raise self._corrupt(path, "its checksum differs")
        if about["version"] != VERSION:
            raise StoreError(
                f"{path} has version {about['version']}, this program reads {VERSION}",
                code="version",
                hint="delete all with `agentctx kv rm --all`: it is computed again",
            )
        return _decode(tensors, about["codec"], dtype)

    def put(self, name: str, k: Tensor, v: Tensor, codec: str | None = None) -> None:
        """Store a block `[layers, Hkv, tokens, D]`, making room first. Present: nothing is done.

        `codec` None: the store's. int8 and int4 apply to whole blocks; a shorter one, the end of a text,
        stays as it is. Raises StoreError (no_space, unwritable) and leaves no part of a file.
        """
        path = self._path(name)
        if path.exists():
            return
        codec = (codec or self.codec) if k.shape[2] == PAGE_TOKENS else "plain"
        tensors = {key: value.cpu() for key, value in _encode(k, v, codec).items()}
        about = {"version": VERSION, "codec": codec}
        data = save(tensors, about | {"checksum": _checksum(tensors, about)})
        if not self.folder.exists():
            self.shelf.introduce(self.folder.name, self.name, len(data) // k.shape[2])
        self.shelf.add(path, data)

    def files(self, names: Sequence[str]) -> list[Path]:
        """Where these blocks are, or would be."""
        return [self._path(name) for name in names]

    def size(self, names: Iterable[str]) -> int:
        """Bytes of those of these blocks that are there."""
        found = 0
        for name in names:
            with suppress(FileNotFoundError):
                found += self._path(name).stat().st_size
        return found

    def used(self, names: Sequence[str]) -> None:
        """These blocks of one text, in its order, were used now."""
        self.shelf.touch([self._path(name) for name in names])

    def own(self, names: Sequence[str], documents: Collection[str]) -> None:
        """These blocks, those that are here, hold text of `documents`. Nothing is written if the disk does
        not take it.
        """
        if held := [name for name in names if name in self] if documents else []:
            with suppress(StoreError):
                name_blocks(self.shelf, self.folder.name, held, documents)

    def _path(self, name: str) -> Path:
        return block_file(self.folder, name)

    def _corrupt(self, path: Path, why: str) -> StoreError:
        self.shelf.discard(path)
        return StoreError(
            f"the KV block {path} is damaged: {why}", code="corrupt", hint="it is computed again"
        )


def _checksum(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    digest = hashlib.blake2b(f"{about.get('version')} {about.get('codec')}".encode(), digest_size=20)
    for name, tensor in sorted(tensors.items()):
        digest.update(f" {name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _encode(k: Tensor, v: Tensor, codec: str) -> dict[str, Tensor]:
    if codec == "plain":
        return {"k": k.contiguous(), "v": v.contiguous()}
    pages = quantize_pages(k.contiguous(), v.contiguous(), CODECS[codec])
    assert pages.k_scale is not None and pages.v_scale is not None
    return {"k": pages.k, "v": pages.v, "k_scale": pages.k_scale, "v_scale": pages.v_scale}


def _decode(tensors: Mapping[str, Tensor], codec: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if codec == "plain":
        return tensors["k"].to(dtype), tensors["v"].to(dtype)
    size = tensors["k_scale"].shape[2]
    pages = KVPages(
        tensors["k"], tensors["v"], PAGE_TOKENS, size, codec, tensors["k_scale"], tensors["v_scale"]
    )
    return dequantize_pages(pages, torch.arange(pages.n_pages, dtype=torch.int32), dtype)
