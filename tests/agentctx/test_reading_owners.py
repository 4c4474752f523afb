"""What readings keep on disk goes by the name of their document."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from agentctx.memory.errors import ModelError
from agentctx.memory.kv.owners import forget, owned
from agentctx.memory.kv.shelf import Shelf
from agentctx.memory.types import Document
from tests.agentctx.tiny_reader import TEXT, engine

QUESTION = "Which court ruled?"


def kept(kv: Path) -> dict[str | None, int]:
    return {one.document: one.blocks for one in owned(Shelf(kv, budget=0))}


def test_all_that_a_reading_keeps_is_of_its_document(tiny_model: Path, tmp_path: Path) -> None:
    subject = engine(tiny_model, kv=tmp_path)
    with subject.read(Document.of(TEXT * 3, "a.txt")) as reading:
        before = reading.texts[0].first // 64
        read = kept(tmp_path)
        assert read == {"a.txt": -(-len(reading.tokens()) // 64) - before, None: before} and before > 0
        reading.extend("It was in force from June on. " * 4)
        extended = kept(tmp_path)
        assert extended["a.txt"] > read["a.txt"] and extended[None] == before
        reading.score_spans(QUESTION, method="likelihood")
        scored = kept(tmp_path)
        assert scored["a.txt"] > extended["a.txt"] and scored[None] == before
        with pytest.warns(UserWarning, match="not calibrated"):
            reading.score_spans(QUESTION)
        assert kept(tmp_path)["a.txt"] > scored["a.txt"] and kept(tmp_path)[None] == before
    with subject.read(Document.of("Geese return in autumn.", "b.txt")):
        pass
    forget(Shelf(tmp_path, budget=0), ["a.txt"])
    left = kept(tmp_path)
    assert left.keys() == {"b.txt", None} and left[None] == before
    with engine(tiny_model, kv=tmp_path).read(Document.of(TEXT * 3, "a.txt")) as again:
        assert again.usage.reused_tokens == before * 64


@pytest.mark.parametrize("broken", [False, True])
def test_what_was_read_until_it_ended_is_of_the_document_too(
    tiny_model: Path, tmp_path: Path, broken: bool
) -> None:
    subject, cancel = engine(tiny_model, kv=tmp_path, chunk=128), threading.Event()

    def progress(held: int, wanted: int) -> None:
        if held > wanted // 2:
            if broken:
                raise MemoryError
            cancel.set()

    document = Document.of(TEXT * 3, "a.txt")
    if broken:
        with pytest.raises(ModelError):
            subject.read(document, cancel=cancel, progress=progress)
    else:
        with subject.read(document, cancel=cancel, progress=progress) as reading:
            assert not reading.complete
    assert kept(tmp_path)["a.txt"] > 4


def test_token_ids_and_what_is_not_kept_are_of_no_document(tiny_model: Path, tmp_path: Path) -> None:
    subject = engine(tiny_model, kv=tmp_path)
    with subject.read(Document.of(TEXT, "a.txt"), keep=False) as reading:
        ids = reading.tokens()
    assert kept(tmp_path) == {}
    with engine(tiny_model, kv=tmp_path).read(ids):
        pass
    assert kept(tmp_path) == {None: -(-len(ids) // 64)}
