"""Whose text the blocks of a KV store hold: written once, counted, and gone with the blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from agentctx.memory.kv.owners import forget, owned
from agentctx.memory.kv.store import BlockStore

BUDGET = 1 << 20


def store(root: Path, *, budget: int = BUDGET, model: str = "m") -> BlockStore:
    return BlockStore(root, model, budget=budget)


def put(some: BlockStore, *names: str) -> int:
    """Blocks of one size, which is returned."""
    for seed, name in enumerate(names):
        some.put(name, *torch.randn(2, 2, 1, 64, 16, generator=torch.Generator().manual_seed(seed)))
    return max(path.stat().st_size for path in some.shelf.blocks())


def lists(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.glob("*/lists/*")}


def names(root: Path) -> set[str]:
    return {line for data in lists(root).values() for line in data.decode().splitlines()[1:]}


def of(root: Path) -> dict[str | None, int]:
    return {one.document: one.blocks for one in owned(store(root).shelf)}


def test_another_process_writes_nothing_anew(tmp_path: Path) -> None:
    put(store(tmp_path), "aa1", "aa2", "aa3")
    store(tmp_path).own(["aa1", "aa2"], ["a.txt"])
    before = lists(tmp_path)
    for _ in range(3):
        store(tmp_path).own(["aa1", "aa2"], ["a.txt"])
    assert lists(tmp_path) == before
    store(tmp_path).own(["aa1", "aa2", "aa3"], ["a.txt"])
    ((path, data),) = lists(tmp_path).items()
    assert data == before[path] + b"aa3\n"


def test_what_nobody_kept_is_not_named(tmp_path: Path) -> None:
    some = store(tmp_path)
    put(some, "aa1")
    some.own(["zz1"], ["a.txt"])
    some.own(["aa1"], [])
    assert not lists(tmp_path) and of(tmp_path) == {None: 1}


def test_names_count_and_leave_with_their_blocks(tmp_path: Path) -> None:
    size = put(store(tmp_path / "probe"), "aa0")
    some = store(tmp_path / "kv", budget=5 * size)
    put(some, "aa1", "aa2", "bb1", "bb2")
    some.own(["aa1", "aa2"], ["a.txt"])
    some.own(["bb1", "bb2"], ["b.txt"])
    files = [path for path in (tmp_path / "kv").rglob("*") if path.suffix in (".kv", ".names")]
    assert some.shelf.used_bytes == sum(path.stat().st_size for path in files) > 4 * size
    some.used(["bb1", "bb2"])
    used = {one.document: one.used for one in owned(some.shelf)}
    put(some, "cc1")
    assert "aa1" not in some and "aa2" in some
    assert names(tmp_path / "kv") == {path.stem for path in some.shelf.blocks()} - {"cc1"}
    assert all(one.used == used[one.document] for one in owned(some.shelf) if one.document)
    put(some, "cc2", "cc3", "cc4", "cc5")
    assert names(tmp_path / "kv") <= {path.stem for path in some.shelf.blocks()}
    put(some, "cc6", "cc7", "cc8", "cc9")
    assert not lists(tmp_path / "kv") and some.shelf.used_bytes <= 5 * size


def test_a_block_that_came_back_is_named_again(tmp_path: Path) -> None:
    some, other = store(tmp_path), store(tmp_path)
    put(some, "aa1", "aa2")
    some.own(["aa1", "aa2"], ["a.txt"])
    forget(other.shelf, ["a.txt"])
    assert not other.shelf.blocks() and not lists(tmp_path)
    put(some, "aa1")
    some.own(["aa1", "aa2"], ["a.txt"])
    assert of(tmp_path) == {"a.txt": 1}


def test_what_was_read_together_goes_with_each_and_what_only_stood_before_stays(tmp_path: Path) -> None:
    some = store(tmp_path)
    put(some, "aa1", "ab1", "ab2", "bb1", "cc1")
    some.own(["aa1"], ["a.txt"])
    some.own(["ab1", "ab2"], ["b.txt", "a.txt", "b.txt"])
    some.own(["bb1", "ab1"], ["b.txt"])
    assert of(tmp_path) == {"a.txt": 3, "b.txt": 3, None: 1}
    before = some.shelf.used_bytes
    freed = forget(some.shelf, ["a.txt"])
    assert before - freed == some.shelf.used_bytes
    assert of(tmp_path) == {"b.txt": 1, None: 1} and names(tmp_path) == {"bb1"}


def test_sources_of_any_name_are_told_apart(tmp_path: Path) -> None:
    some = store(tmp_path)
    odd = ["a\nb", "\u2028", "\ud800", '["a.txt"]', "π.txt", ""]
    blocks = [f"aa{number}" for number in range(len(odd))]
    put(some, *blocks)
    for block, document in zip(blocks, odd, strict=True):
        some.own([block], [document])
    assert of(tmp_path) == dict.fromkeys(odd, 1)


@pytest.mark.parametrize("budget", [1, 200])
def test_names_that_do_not_fit_are_no_error(tmp_path: Path, budget: int) -> None:
    put(store(tmp_path), "aa1")
    store(tmp_path, budget=budget).own(["aa1"], ["a.txt" * 100])
    assert not lists(tmp_path) and of(tmp_path) == {None: 1}


def test_models_are_removed_with_their_lists(tmp_path: Path) -> None:
    for model in ("m", "n"):
        some = store(tmp_path, model=model)
        put(some, "aa1")
        some.own(["aa1"], ["a.txt"])
    (one,) = owned(some.shelf)
    assert (one.blocks, one.models) == (2, ("m", "n"))
    before = some.shelf.used_bytes
    assert before - some.shelf.remove(["m"]) == some.shelf.used_bytes
    (one,) = owned(some.shelf)
    assert one.models == ("n",)
