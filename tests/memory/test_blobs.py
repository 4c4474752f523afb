import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentctx.memory.blobs import Blobs
from agentctx.memory.errors import StoreError
from agentctx.memory.types import Document, Locator


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_texts_come_back_exactly(tmp_path: Path, text: str) -> None:
    blobs = Blobs(tmp_path)
    id = blobs.put(text)
    assert id == Document.of(text).id and id in blobs
    assert blobs.get(id) == text


def test_documents_of_equal_text_keep_their_own_names_and_places(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    first = Document.of(
        "a\r\nb", "x/é.md", media_type="text/markdown", locators=(Locator(0, 4, "heading", "A"),)
    )
    second = Document.of(
        "a\r\nb", "y.pdf", media_type="application/pdf", locators=(Locator(0, 4, "page", 7),)
    )
    for document in (first, second, first):
        blobs.put_document(document)
    assert blobs.get_document(first.id, "x/é.md") == first
    assert blobs.get_document(first.id, "y.pdf") == second


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "how", [damage, lambda path: path.write_bytes(b""), lambda path: os.truncate(path, 3)]
)
def test_damage_is_noticed_in_texts_and_in_records(tmp_path: Path, how: Callable[[Path], None]) -> None:
    blobs = Blobs(tmp_path)
    document = Document.of("some text", "a.txt")
    blobs.put_document(document)
    text, record = sorted(tmp_path.glob("*/*"), key=lambda path: path.suffix, reverse=True)
    how(text)
    for read in (lambda: blobs.get(document.id), lambda: blobs.get_document(document.id, "a.txt")):
        with pytest.raises(StoreError) as caught:
            read()
        assert caught.value.code == "damaged" and caught.value.hint
    blobs.put_document(document)  # mends the text
    assert blobs.get_document(document.id, "a.txt") == document
    how(record)
    with pytest.raises(StoreError) as caught:
        blobs.get_document(document.id, "a.txt")
    assert caught.value.code == "damaged"


def test_what_is_not_there_is_missing(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    absent = Document.of("never put").id
    assert absent not in blobs and "../../etc/passwd" not in blobs
    for id in (absent, "../../etc/passwd"):
        with pytest.raises(StoreError) as caught:
            blobs.get(id)
        assert caught.value.code == "missing"
    id = blobs.put("text without a document")
    with pytest.raises(StoreError, match="'a.txt'"):
        blobs.get_document(id, "a.txt")


def test_a_full_disk_is_a_store_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left") as caught:
        Blobs(tmp_path).put("text")
    assert "AGENTCTX_HOME" in caught.value.hint
