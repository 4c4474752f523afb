"""Plain text, source code and Markdown: the text is exactly the decoded file.

Line numbers need no locators, they are counted when shown. Markdown gets its headings, both `# styles` and
underlined, outside of fenced code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

from agentctx.memory.loaders.decode import decode
from agentctx.memory.loaders.headings import Heading, sections
from agentctx.memory.loaders.parts import Part

MARKDOWN = re.compile(
    r"^ {0,3}(?:(?P<fence>```|~~~)|(?P<hashes>#{1,6})[ \t]+(?P<title>[^\r\n]+)|"
    r"(?P<under>[^\s#>|`~-][^\r\n]*)\r?\n {0,3}(?P<line>={2,}|-{2,})[ \t]*\r?$)",
    re.M,
)


def read(file: BinaryIO, encoding: str | None) -> Iterator[Part]:
    """All of the file as one part."""
    decoded = decode(file.read(), encoding)
    yield Part(decoded.text, (), decoded.notices)


def read_markdown(file: BinaryIO, encoding: str | None) -> Iterator[Part]:
    """All of the file as one part, with its headings."""
    decoded = decode(file.read(), encoding)
    yield Part(decoded.text, sections(_headings(decoded.text), len(decoded.text)), decoded.notices)


def _headings(text: str) -> Iterator[Heading]:
    fence = ""
    for match in MARKDOWN.finditer(text):
        mark = match["fence"] or ""
        if fence:
            fence = "" if mark == fence else fence
        elif mark:
            fence = mark
        elif match["hashes"]:
            title = match["title"].strip().rstrip("#").rstrip()
            yield match.start(), len(match["hashes"]), title
        else:
            yield match.start(), 1 if match["line"].startswith("=") else 2, match["under"].strip()
