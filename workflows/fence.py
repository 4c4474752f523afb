"""Documents are data: their text stands between delimiters that it cannot know.

The tag is drawn per run and is in no document of the run. It lowers the risk of injected instructions; the
roles that read documents also have no tools, so that an obeyed instruction has no effect.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from agentctx.memory.types import Document

# Digits only: a tag then has the same number of tokens whichever it is, and a plan stays exact.
TAG_DIGITS = 8


def draw_tag(documents: Iterable[Document]) -> str:
    """A random tag that occurs in none of the documents."""
    texts = [document.text for document in documents]
    while True:
        tag = f"{secrets.randbelow(10**TAG_DIGITS):0{TAG_DIGITS}d}"
        if not any(tag in text for text in texts):
            return tag


def fenced(text: str, tag: str, label: str) -> str:
    """The text between delimiters; `label` names it and is cleaned, for file names are data too."""
    name = "".join(c if c.isprintable() and c not in '<>"' else " " for c in label)[:120]
    return f'<text-{tag} name="{name}">\n{text}\n</text-{tag}>'
