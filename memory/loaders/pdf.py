"""PDF by page. Each page is a part, with its number and, if the file names it otherwise, its label.

A truncated file has lost the index at its end. Naming the catalogue anew lets pypdf rebuild the index from
the objects that are left, so that the pages before the fault are kept, flagged.
"""

from __future__ import annotations

import io
import logging
import re
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from pypdf import PdfReader
from pypdf.errors import DependencyError, PyPdfError

from agentctx.memory.errors import InputError
from agentctx.memory.loaders.parts import Part
from agentctx.memory.types import Locator, Notice

# pypdf says of itself that broken files raise other exceptions than its own
FAULTS = (
    *(PyPdfError, ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, OSError),
    *(RecursionError, TypeError, ValueError, zlib.error),
)
CATALOGUE = re.compile(rb"(\d+)\s+\d+\s+obj\b(?:(?!endobj).){0,2000}?/Type\s*/Catalog\b", re.S)


def read(file: BinaryIO, encoding: str | None) -> Iterator[Part]:
    """The pages in order. Raises InputError `encrypted`, `corrupt`, `missing_extra`, or `empty`."""
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # its remarks become our notices
    pdf, repaired = _open(file)
    labels = _labels(pdf)
    blank: list[int] = []
    count = 0
    try:
        for number, page in enumerate(pdf.pages, 1):
            part = _page(page.extract_text, number, labels)
            count += 1
            if not part.text.strip() and not part.notices:
                blank.append(number)
            yield part
    except FAULTS as error:
        raise _corrupt(f"broken after page {count}: {_told(error)}") from error
    yield from _closing(count, blank, repaired)


def _closing(count: int, blank: list[int], repaired: bool) -> Iterator[Part]:
    """What can only be said at the end; raised after the pages, so that these are kept."""
    if count and len(blank) == count and not repaired:
        hint = "recognise its text first (OCR)"
        raise InputError("no page has a text layer, only pictures", code="empty", hint=hint)
    if repaired or not count:
        raise _corrupt(f"truncated or damaged, {count - len(blank)} pages could be read")
    if blank:
        pages = ", ".join(map(str, blank[:10])) + (", …" if len(blank) > 10 else "")
        message = f"{len(blank)} of {count} pages have no text: {pages}"
        yield Part("", (), (Notice("no_text_layer", message),))


def _open(file: BinaryIO) -> tuple[PdfReader, bool]:
    try:
        return _unlocked(PdfReader(file)), False
    except FAULTS:
        file.seek(0)
        data = file.read()
    try:
        return _unlocked(PdfReader(_repaired(data))), True
    except FAULTS as error:
        raise _corrupt(f"not a readable PDF: {_told(error)}") from error


def _unlocked(pdf: PdfReader) -> PdfReader:
    """Try the empty password, which many encrypted files have, and look at the page tree."""
    try:
        if pdf.is_encrypted and not pdf.decrypt(""):
            hint = "save a copy without the password"
            raise InputError("encrypted with a password", code="encrypted", hint=hint)
        len(pdf.pages)
    except DependencyError as error:
        hint = "pip install 'agentctx[pdf-crypto]'"
        raise InputError(
            "AES-encrypted, and the extra is missing", code="missing_extra", hint=hint
        ) from error
    return pdf


def _repaired(data: bytes) -> io.BytesIO:
    found = [int(match[1]) for match in CATALOGUE.finditer(data)]
    root = b"trailer << /Root %d 0 R >>\n" % found[-1] if found else b""
    return io.BytesIO(data + b"\n" + root + b"startxref\n0\n%%EOF\n")


def _page(extract: Callable[[], str], number: int, labels: list[str]) -> Part:
    notices: tuple[Notice, ...] = ()
    try:
        text = extract()
    except FAULTS as error:
        text, notices = "", (Notice("corrupt", f"page {number} cannot be read: {_told(error)}"),)
    inner = []
    if number <= len(labels) and labels[number - 1] != str(number):
        inner.append(Locator(0, len(text), "page_label", labels[number - 1]))
    part = Part.whole(text, "page", number, inner)
    return Part(part.text, part.locators, notices)


def _labels(pdf: PdfReader) -> list[str]:
    """The names that the file gives its pages; most give none, and a broken table is no reason to stop."""
    try:
        if "/PageLabels" not in pdf.root_object:
            return []
        return list(pdf.page_labels)
    except FAULTS:
        return []


def _corrupt(message: str) -> InputError:
    return InputError(message, code="corrupt", hint="get an undamaged copy of the file")


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]
