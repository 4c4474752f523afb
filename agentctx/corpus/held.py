"""What indexes there are on this machine, for people: listed, checked and deleted without loading a model."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from agentctx.memory.database import Database
from agentctx.memory.documents import open_documents
from agentctx.memory.errors import InputError, StoreError
from agentctx.memory.kv import catalog
from agentctx.memory.kv.catalog import Catalog, Listed
from agentctx.memory.kv.store import BlockStore
from agentctx.memory.selection import Selection
from agentctx.memory.vectors import SCHEMA, Vectors
from agentctx.paths import Paths

VERSION = 1
DATABASE = "index.db"


@dataclass(frozen=True, slots=True)
class Held:
    """One indexed path of one model: `kept` of its `passages` are on disk, in `bytes` of KV.

    `pinned`: they do not leave it to make room. `problem`: why nothing else is known of the index in
    `folder`.
    """

    model: str
    folder: str
    root: str = ""
    documents: int = 0
    passages: int = 0
    kept: int = 0
    tokens: int = 0
    bytes: int = 0
    pinned: bool = False
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """`kind`: changed, deleted (a document), corrupt, missing (of what is kept), version, unreadable."""

    kind: str
    source: str
    message: str


def opened(folder: Path) -> Database:
    """The database of an index, made if it is new. Raises StoreError."""
    return Database(folder / DATABASE, f"{SCHEMA};{catalog.SCHEMA}", VERSION)


def listed(paths: Paths) -> list[Held]:
    """All that is indexed."""
    return [held for folder in _folders(paths) for held in _listed(paths, folder)]


def verify(paths: Paths, roots: Sequence[str] = ()) -> list[Problem]:
    """Read it all: documents as they are now, every block of KV, every file. Changes nothing but damaged
    blocks, which are deleted.

    `roots`: only these paths; () is all.
    """
    return [problem for folder in _folders(paths) for problem in _verified(paths, folder, roots)]


def remove(paths: Paths, roots: Sequence[str] | None) -> int:
    """Take these paths out of every index, None: delete all. Returns the bytes of KV that are freed.

    Raises InputError (not_found) for a path that is in none.
    """
    freed, known = 0, set[str]()
    for folder in _folders(paths):
        try:
            database = opened(folder)
            found = Catalog(database)
            store = _store(paths, found)
            known.update(found.roots())
            found.leave(found.roots() if roots is None else roots)
            loosen(found, store)
            freed += prune(found, Vectors(database, 0), store)
            left = found.roots()
            database.close()
        except StoreError:
            if roots is not None:
                raise
            left = []
        if not left:
            shutil.rmtree(folder)
    _all_known(roots or (), known)
    return freed


def pin(paths: Paths, roots: Sequence[str], *, budget: int) -> int:
    """Keep what is on disk of these paths there, whatever else is read; returns the passages of them that are
    not on disk.

    Raises InputError (not_found) for a path that is in no index, StoreError (no_space) where too much of
    `budget` bytes of KV would be pinned; then that path and those after it are not.
    """
    missing, known = 0, set[str]()
    for found, store in _stores(paths, budget):
        for root in sorted(set(roots) & set(found.roots())):
            known.add(root)
            store.shelf.pin(store.files(found.blocks(root)))
            found.pin(root)
            one = _held("", paths.index, found.listed(root), store, True)
            missing += one.passages - one.kept
    _all_known(roots, known)
    return missing


def unpin(paths: Paths, roots: Sequence[str]) -> None:
    """Let what is kept of these paths make room again. Raises InputError (not_found)."""
    known = set[str]()
    for found, store in _stores(paths):
        for root in sorted(set(roots) & set(found.roots())):
            known.add(root)
            found.unpin(root)
        loosen(found, store)
    _all_known(roots, known)


def loosen(found: Catalog, store: BlockStore) -> None:
    """Of what an index holds, only that stays pinned on disk which it says is. Raises StoreError."""
    stay = {name for root in found.pinned() for name in found.blocks(root)}
    own = {name for one in found.passages().values() for name in one.blocks}
    store.shelf.unpin(store.shelf.pinned().intersection(store.files(sorted(own - stay))))


def prune(found: Catalog, vectors: Vectors, store: BlockStore) -> int:
    """Delete passages of no document, with the KV that no other passage shares; returns its bytes."""
    unused = found.unused()
    if not unused:
        return 0
    found.drop(unused)
    vectors.drop(one.name for one in unused)
    shared = {name for one in found.passages().values() for name in one.blocks}
    gone = {name for one in unused for name in one.blocks} - shared
    return store.shelf.delete(store.files(sorted(gone)))


def _folders(paths: Paths) -> list[Path]:
    return sorted(path.parent for path in paths.index.glob(f"*/{DATABASE}"))


def _store(paths: Paths, found: Catalog, budget: int = 0) -> BlockStore:
    return BlockStore(paths.kv, (found.fact("kv") or b"unknown").decode(), budget=budget)


def _stores(paths: Paths, budget: int = 0) -> Iterator[tuple[Catalog, BlockStore]]:
    """Every index, closed when the next is asked for."""
    for folder in _folders(paths):
        database = opened(folder)
        try:
            found = Catalog(database)
            yield found, _store(paths, found, budget)
        finally:
            database.close()


def _all_known(roots: Sequence[str], known: set[str]) -> None:
    if unknown := sorted(set(roots) - known):
        raise InputError(f"{unknown[0]} is in no index", code="not_found", hint="agentctx index ls")


def _listed(paths: Paths, folder: Path) -> Iterator[Held]:
    try:
        database = opened(folder)
        found = Catalog(database)
        model, store = (found.fact("model") or b"").decode(), _store(paths, found)
        pinned = found.pinned()
        for root in found.roots():
            yield _held(model, folder, found.listed(root), store, root in pinned)
        database.close()
    except StoreError as error:
        yield Held("", str(folder), problem=error.message)


def _held(model: str, folder: Path, one: Listed, store: BlockStore, pinned: bool) -> Held:
    sizes = [
        [path.stat().st_size if path.exists() else -1 for path in store.files(passage.blocks)]
        for passage in one.passages
    ]
    return Held(
        model,
        str(folder),
        one.root,
        one.documents,
        one.total,
        sum(min(found) >= 0 for found in sizes),
        sum(passage.tokens for passage in one.passages),
        sum(size for found in sizes for size in found if size > 0),
        pinned,
    )


def _verified(paths: Paths, folder: Path, roots: Sequence[str]) -> Iterator[Problem]:
    try:
        database = opened(folder)
        found = Catalog(database)
        for root in found.roots():
            if not roots or root in roots:
                yield from _documents(found, root)
                yield from _blocks(found.listed(root), _store(paths, found))
        for line in Vectors(database, 0).verify():
            yield Problem("corrupt", str(folder), line)
        database.close()
    except StoreError as error:
        yield Problem(error.code, str(folder), error.message)


def _documents(found: Catalog, root: str) -> Iterator[Problem]:
    """What is at a path now against what was there."""
    try:
        everything = Selection(max_files=sys.maxsize)
        now = {one.source: one.id for one in open_documents([root], selection=everything).documents}
    except InputError as error:
        now = {}
        if os.path.exists(root):
            yield Problem("unreadable", root, error.message)
    for source, id_ in found.documents(root).items():
        if now and os.path.isfile(root):  # it goes by the name it was given, from wherever that was
            now = dict.fromkeys([source], next(iter(now.values())))
        if source not in now:
            yield Problem("deleted", source, "it is not there any more, or cannot be read: it is not used")
        elif now[source] != id_:
            yield Problem("changed", source, "it changed after it was indexed: what is new is not indexed")


def _blocks(one: Listed, store: BlockStore) -> Iterator[Problem]:
    missing = one.total - len(one.passages)
    for passage in one.passages:
        try:
            missing += any(store.get(name, torch.float32) is None for name in passage.blocks)
        except StoreError as error:
            yield Problem(error.code, one.root, error.message)
    if missing:
        yield Problem("missing", one.root, f"{missing} passages are not kept: they are read when needed")
