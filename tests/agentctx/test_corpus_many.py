"""An index of thousands of small documents: its work grows with them, and no batch looks at all of them."""

import asyncio
import os
import threading
from collections import Counter

import pytest

from agentctx.corpus import held
from agentctx.corpus.index import TOGETHER, Index
from agentctx.memory.kv.catalog import Passage, passage_name
from agentctx.memory.types import Document
from agentctx.models.load import open_model
from agentctx.paths import Paths

MANY = 5_000
NEW = 4 * TOGETHER


@pytest.fixture
def paths(tmp_path):
    return Paths(*(tmp_path / name for name in ("cache", "data", "state", "config")))


@pytest.fixture
def counts(monkeypatch):
    """How often the system was asked about a file, and what SQL ran."""
    found, real = Counter(), os.stat

    def stat(*given, **options):
        found["stat"] += 1
        return real(*given, **options)

    monkeypatch.setattr(os, "stat", stat)
    return found


def known(index, documents):
    """What reading all of these would have left, with files of one byte for their KV."""
    texts = [one.text for one in documents]
    ids = index.reader.held_as(texts)
    passages = [
        Passage(passage_name(text), len(ids[text]), tuple(index.engine.kept(ids[text], "int8")))
        for text in texts
    ]
    index.catalog.add(passages)
    for path in index.store.files([name for one in passages for name in one.blocks]):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"0")
    return passages


def test_work_grows_with_the_documents_and_batches_do_not_look_at_all(tiny_model, paths, counts):
    index = Index.open(paths.index, open_model(str(tiny_model), paths=paths, memory_bytes=60 << 20))
    documents = [Document.of(f"Note {n} says {n * 7919 % 1000}.", f"d/{n}.txt") for n in range(MANY + NEW)]
    blocks = sum(len(one.blocks) for one in known(index, documents[:MANY]))
    index.database._db.set_trace_callback(lambda sql: counts.update([" ".join(sql.split()[:4])]))
    counts.clear()
    added = index.add("d", documents)
    assert (added.passages, added.fresh) == (MANY + NEW, NEW)
    assert counts["stat"] < 4 * blocks + 60 * NEW
    assert counts["SELECT * FROM passages"] <= 4
    assert counts["INSERT INTO documents VALUES"] == MANY + NEW
    assert sum(counts.values()) - counts["stat"] - MANY < 20 * NEW
    counts.clear()
    index.add("d", documents)  # nothing is new
    assert counts["stat"] < 2 * blocks
    assert sum(counts.values()) - counts["stat"] < MANY + NEW + 30
    counts.clear()
    (one,) = held.listed(paths)
    assert (one.documents, one.kept) == (MANY + NEW, MANY + NEW)
    assert counts["stat"] < 3 * (blocks + 3 * NEW)


def test_stopped_before_it_read_anything_it_holds_nothing(tiny_model, paths):
    index = Index.open(paths.index, open_model(str(tiny_model), paths=paths, memory_bytes=60 << 20))
    stop = threading.Event()
    stop.set()
    documents = [Document.of(f"Note {n}.", f"d/{n}.txt") for n in range(100)]
    added = index.add("d", documents, cancel=stop)
    assert (added.fresh, added.computed_tokens) == (100, 0)
    assert not any(index.held([one.text for one in documents]))
    assert held.listed(paths)[0].passages == 100
    near = asyncio.run(index.nearest("Which note?", [one.text for one in documents], 5))
    assert set(near.values) == {float("-inf")}
