"""HTML to text: what a browser would show, blocks on lines of their own, headings as locators.

Runs of white space become one space, except in `pre`. Scripts, styles and templates are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from typing import BinaryIO

from agentctx.memory.errors import InputError
from agentctx.memory.loaders.decode import decode
from agentctx.memory.loaders.headings import Heading, sections
from agentctx.memory.loaders.parts import Part

DECLARED = re.compile(rb"""(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]+)""", re.I)
DECLARED_BYTES = 1024  # where HTML allows the declaration
DROPPED = frozenset({"script", "style", "template"})
PARAGRAPHS = frozenset(
    {"address", "article", "aside", "blockquote", "body", "details", "dialog", "div", "dl", "fieldset"}
    | {"figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "main", "nav", "ol"}
    | {"p", "pre", "section", "table", "title", "ul"}
)
LINES = frozenset({"br", "caption", "dd", "dt", "figcaption", "legend", "li", "option", "summary", "tr"})
SPACE = re.compile(r"[ \t\r\n\f]+")


def read(file: BinaryIO, encoding: str | None) -> Iterator[Part]:
    """The whole page as one part."""
    data = file.read()
    declared = DECLARED.search(data[:DECLARED_BYTES])
    decoded = decode(data, encoding, declared=declared[1].decode("ascii", "replace") if declared else None)
    page = extract(decoded.text)
    if not page.text.strip():
        raise InputError("the page has no text", code="empty", hint="it may be drawn by a script")
    yield Part(page.text, page.locators, decoded.notices)


def extract(markup: str) -> Part:
    """The visible text of a page, without surrounding white space, and its headings."""
    page = _Page()
    end_of_tags = markup.rfind(">") + 1
    page.feed(markup[:end_of_tags])
    page.close()
    page.handle_data(unescape(markup[end_of_tags:]))  # the parser is quadratic in "<" without ">"
    page.end_heading()
    text = "".join(page.pieces).rstrip()
    headings = [(min(start, len(text)), level, title) for start, level, title in page.headings]
    return Part(text, sections(headings, len(text)))


class _Page(HTMLParser):
    """Collects text. `gap` is the white space that stands before the next word, if one follows."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.length = 0
        self.gap = ""
        self.dropped: list[str] = []  # open elements whose content is not shown
        self.pre = 0
        self.headings: list[Heading] = []
        self.heading: tuple[int, list[str]] | None = None  # level, words of the one that is open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in DROPPED:
            self.dropped.append(tag)
        elif tag in ("td", "th"):
            self._break("\t")
        else:
            self._block(tag)
        if tag == "pre":
            self.pre += 1
        elif re.fullmatch("h[1-6]", tag):
            self.end_heading()
            self.heading = (int(tag[1]), [])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in DROPPED:
            self._block(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.dropped:
            while self.dropped.pop() != tag:
                pass
        elif tag == "pre":
            self.pre = max(self.pre - 1, 0)
        if self.heading and tag == f"h{self.heading[0]}":
            self.end_heading()
        self._block(tag)

    def handle_data(self, data: str) -> None:
        if self.dropped:
            return
        if self.pre:
            self._write(data)
            return
        flat = SPACE.sub(" ", data)
        if flat.startswith(" "):
            self._break(" ")
        if word := flat.strip(" "):
            self._write(word)
            if flat.endswith(" "):
                self._break(" ")

    def _block(self, tag: str) -> None:
        if tag in PARAGRAPHS:
            self._break("\n\n")
        elif tag in LINES:
            self._break("\n")

    def _break(self, gap: str) -> None:
        """Keep the strongest gap asked for since the last word: paragraph, line, cell, space."""
        order = ("", " ", "\t", "\n", "\n\n")
        self.gap = max(self.gap, gap, key=order.index)

    def _write(self, words: str) -> None:
        if self.pieces and self.gap:
            self.pieces.append(self.gap)
            self.length += len(self.gap)
        self.gap = ""
        if self.heading:
            level, title = self.heading
            if not title:
                self.headings.append((self.length, level, ""))
            title.append(words.strip())
        self.pieces.append(words)
        self.length += len(words)

    def end_heading(self) -> None:
        """Give the open heading its title."""
        if self.heading and self.heading[1]:
            offset, level, _ = self.headings.pop()
            self.headings.append((offset, level, " ".join(self.heading[1])))
        self.heading = None
