"""Documents are data: their text stands between delimiters that it cannot know.

The tag is derived from a secret of this user and is in no document of the run: a text that holds it, by
whatever chance, gets another one. It is the same from run to run, because the keys and values of a text can
be used again only behind the same delimiters. It lowers the risk of injected instructions; the roles that
read documents also have no tools, so that an obeyed instruction has no effect.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from itertools import count

from agentctx.memory.types import Document

# Digits only: a tag then has the same number of tokens whichever it is, and a plan stays exact.
TAG_DIGITS = 8


def draw_tag(documents: Iterable[Document], secret: bytes) -> str:
    """The first tag of this secret that occurs in none of the documents."""
    texts = [document.text for document in documents]
    tags = (_tag(secret, number) for number in count())
    return next(tag for tag in tags if not any(tag in text for text in texts))


def _tag(secret: bytes, number: int) -> str:
    digest = hmac.digest(secret, number.to_bytes(8), "sha256")
    return f"{int.from_bytes(digest[:8]) % 10**TAG_DIGITS:0{TAG_DIGITS}d}"


def fenced(text: str, tag: str, label: str) -> str:
    """The text between delimiters; `label` names it and is cleaned, for file names are data too."""
    name = "".join(c if c.isprintable() and c not in '<>"' else " " for c in untagged(label, tag))[:120]
    return f'<text-{tag} name="{name}">\n{untagged(text, tag)}\n</text-{tag}>'


def untagged(text: str, tag: str) -> str:
    """The text without the tag, which no document holds, but what a model wrote of one may: it saw it.

    A mark takes its place, because what stood around it could be the tag once more.
    """
    return text.replace(tag, "#")
