"""What a caller may hand over to be read: paths, documents, a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from agentctx.memory.documents import Corpus, Selection, open_documents
from agentctx.memory.errors import InputError
from agentctx.memory.types import Document

Source = str | Path | Document


def corpus_of(
    sources: Source | Sequence[Source], text: str | None, selection: Selection, stdin: BinaryIO | None
) -> Corpus:
    """What the caller gave: documents and text as they are, then files and directories, read in order."""
    given = [sources] if isinstance(sources, str | Path | Document) else list(sources)
    ready = [source for source in given if isinstance(source, Document)]
    if text is not None:
        ready.append(Document.of(text))
    paths = [source for source in given if not isinstance(source, Document)]
    if not paths and not ready:
        raise InputError(
            "there is nothing to read", code="empty", hint="name a file or directory, or pass text="
        )
    if any(not document.text.strip() for document in ready):
        raise InputError("the given text is empty", code="empty")
    read = open_documents(paths, selection=selection, stdin=stdin) if paths else Corpus((), (), ())
    return replace(read, documents=(*ready, *read.documents))
