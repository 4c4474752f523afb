"""Vectors on disk: found exactly, whatever happened to the files."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentctx.memory import vectors as module
from agentctx.memory.database import Database
from agentctx.memory.errors import StoreError
from agentctx.memory.vectors import SCHEMA, Vectors

SIZE = 8


def opened(folder):
    return Vectors(Database(folder / "v.db", SCHEMA, 1), SIZE)


def drawn(seed, rows=1):
    found = np.random.default_rng(seed).normal(size=(rows, SIZE)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    steps=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=9, unique=True), min_size=1, max_size=6),
    dropped=st.sets(st.integers(0, 40), max_size=10),
    k=st.integers(1, 12),
    shard=st.integers(2, 9),
)
def test_a_search_is_that_of_all_vectors_at_once(steps, dropped, k, shard, tmp_path_factory):
    folder = tmp_path_factory.mktemp("v")
    held = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHARD", shard)
        for owners in steps:
            found = opened(folder)
            new = {f"o{n}": drawn(n, 1 + n % 3) for n in owners}
            found.put(new)
            held |= new
            found.settle()
        found.drop(f"o{n}" for n in dropped)
        held = {name: rows for name, rows in held.items() if name not in {f"o{n}" for n in dropped}}
        query = drawn(99)[0]
        among = sorted(held)[: len(held) // 2 + 1]
        for chosen in (None, among):
            exact = {name: (held[name] @ query).max() for name in (held if chosen is None else chosen)}
            best = sorted(exact, key=lambda name: -exact[name])[:k]
            hits = found.search(query, k, chosen)
            assert [hit.owner for hit in hits] == best
            np.testing.assert_allclose([hit.score for hit in hits], [exact[n] for n in best], rtol=1e-4)
    assert found.warnings == []


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_file_is_made_again_and_told(tmp_path, damage):
    opened(tmp_path).put({"a": drawn(1), "b": drawn(2)})
    opened(tmp_path).settle()
    (file,) = tmp_path.glob("*.faiss")
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(whole[:40] if damage == "cut" else whole[:-1] + b"\xff")
    found = opened(tmp_path)
    assert len(found.verify()) == 1
    found = opened(tmp_path)
    assert found.search(drawn(2)[0], 1)[0].owner == "b"
    (said,) = found.warnings
    assert "made again" in said
    assert opened(tmp_path).verify() == []


def test_what_was_added_but_not_put_into_a_file_is_found(tmp_path):
    first = opened(tmp_path)
    first.put({"a": drawn(1)})
    first.settle()
    first.put({"b": drawn(2)})  # and the process dies
    assert opened(tmp_path).search(drawn(2)[0], 1)[0].owner == "b"


def test_an_owner_is_entered_once_and_all_or_none(tmp_path):
    found = opened(tmp_path)
    found.put({"a": drawn(1)})
    found.put({"a": drawn(2), "b": drawn(3)})
    assert len(found) == 2
    with pytest.raises(ValueError, match=r"not \[n, 8\]"):
        found.put({"c": drawn(1), "d": np.zeros((1, 3), np.float32)})
    assert {hit.owner for hit in found.search(drawn(1)[0], 9)} == {"a", "b"}


def test_several_write_at_once(tmp_path):
    def work(start):
        mine = opened(tmp_path)
        for n in range(start, start + 10):
            mine.put({f"o{n}": drawn(n)})
            assert mine.search(drawn(n)[0], 1)[0].owner == f"o{n}"
        return mine.warnings

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, (0, 5, 20))) == [[], [], []]
    found = opened(tmp_path)
    assert len(found) == 25
    assert all(found.search(drawn(n)[0], 1)[0].owner == f"o{n}" for n in (0, 14, 29))
    assert len(list(tmp_path.glob("*.faiss"))) == 1
    assert opened(tmp_path).verify() == []


def test_a_database_that_is_none_is_a_typed_error(tmp_path):
    (tmp_path / "v.db").write_bytes(b"nonsense" * 500)
    with pytest.raises(StoreError) as caught:
        opened(tmp_path)
    assert caught.value.code == "corrupt"


def test_another_version_is_a_typed_error(tmp_path):
    opened(tmp_path).database.close()
    sqlite3.connect(tmp_path / "v.db").execute("PRAGMA user_version = 7")
    with pytest.raises(StoreError) as caught:
        opened(tmp_path)
    assert caught.value.code == "version"


def test_a_full_disk_is_a_typed_error_and_nothing_is_lost(tmp_path):
    found = opened(tmp_path)
    found.put({"a": drawn(1)})
    pages = found.database.one("PRAGMA page_count")[0]
    found.database.rows(f"PRAGMA max_page_count = {pages + 2}")  # SQLite's own full disk
    with pytest.raises(StoreError) as caught:
        found.put({f"o{n}": drawn(n, 200) for n in range(50)})
    assert caught.value.code == "no_space"
    assert found.search(drawn(1)[0], 5)[0].owner == "a"
    assert len(found) == 1
