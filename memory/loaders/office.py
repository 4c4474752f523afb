"""Word, PowerPoint and Excel, each with the places that its format really has.

A docx has headings and paragraphs but no pages: where a page ends is the printer's choice. Slides come with
their notes, sheets as tab-separated rows of the values last computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, BinaryIO

from agentctx.memory.errors import InputError
from agentctx.memory.loaders.archive import faults_told, open_archive
from agentctx.memory.loaders.headings import Heading, sections
from agentctx.memory.loaders.parts import Part
from agentctx.memory.types import Locator

if TYPE_CHECKING:
    from docx.document import Document as WordFile
    from docx.table import Table
    from docx.text.paragraph import Paragraph
    from openpyxl import Workbook
    from pptx.presentation import Presentation
    from pptx.shapes.base import BaseShape


def read_docx(file: BinaryIO, encoding: str | None) -> Iterator[Part]:
    """Paragraphs and tables in order, as one part: its headings span many paragraphs."""
    import docx

    open_archive(file)
    with faults_told():
        yield from _word(docx.Document(file))


def _word(document: WordFile) -> Iterator[Part]:
    from docx.table import Table

    pieces: list[str] = []
    locators: list[Locator] = []
    headings: list[Heading] = []
    offset = 0
    for block in document.iter_inner_content():
        text = _table(block) if isinstance(block, Table) else block.text
        if not text.strip():
            continue
        if not isinstance(block, Table) and (level := _level(block)):
            headings.append((offset, level, text.strip()))
        locators.append(Locator(offset, offset + len(text), "paragraph", len(locators) + 1))
        pieces.append(text)
        offset += len(text) + 2
    text = "\n\n".join(pieces)
    if not text:
        raise InputError("no paragraph has text", code="empty")
    locators += sections(headings, len(text))
    yield Part(text, tuple(sorted(locators, key=lambda at: (at.start, -at.end))))


def read_pptx(file: BinaryIO, encoding: str | None) -> Iterator[Part]:
    """One part per slide, its notes last."""
    import pptx

    open_archive(file)
    with faults_told():
        yield from _slides(pptx.Presentation(file))


def _slides(show: Presentation) -> Iterator[Part]:
    some = False
    for number, slide in enumerate(show.slides, 1):
        texts = [text for shape in slide.shapes for text in _shape(shape)]
        if slide.has_notes_slide and (frame := slide.notes_slide.notes_text_frame) and frame.text.strip():
            texts.append(f"Notes: {frame.text}")
        part = Part.whole("\n".join(texts), "slide", number)
        some = some or bool(part.text.strip())
        yield part
    if not some:
        raise InputError("no slide has text", code="empty")


def read_xlsx(file: BinaryIO, encoding: str | None) -> Iterator[Part]:
    """One part per sheet, its name first, then a line per row that has a value."""
    import openpyxl

    open_archive(file)
    with faults_told():
        yield from _sheets(openpyxl.load_workbook(file, read_only=True, data_only=True))


def _sheets(book: Workbook) -> Iterator[Part]:
    some = False
    for sheet in book.worksheets:
        sheet.reset_dimensions()  # a size that the file claims could make every row a million cells wide
        lines = [sheet.title]
        rows: list[Locator] = []
        offset = len(sheet.title) + 1
        for number, row in enumerate(sheet.iter_rows(values_only=True), 1):
            line = _cells("" if value is None else str(value) for value in row).rstrip("\t")
            if line:
                rows.append(Locator(offset, offset + len(line), "row", number))
                lines.append(line)
                offset += len(line) + 1
        some = some or bool(rows)
        yield Part.whole("\n".join(lines), "sheet", sheet.title, rows)
    if not some:
        raise InputError("no sheet has a value", code="empty")


def _cells(values: Iterable[str]) -> str:
    """A row stays one line, and a tab always means the next cell."""
    return "\t".join(" ".join(value.split()) for value in values)


def _table(table: Table) -> str:
    return "\n".join(_cells(cell.text for cell in row.cells) for row in table.rows)


def _level(paragraph: Paragraph) -> int:
    """1 to 9 for a heading, 1 for the title, 0 for other paragraphs."""
    style = paragraph.style.name if paragraph.style is not None else None
    if style == "Title":
        return 1
    name, _, number = (style or "").rpartition(" ")
    return int(number) if name == "Heading" and number.isdecimal() else 0


def _shape(shape: BaseShape) -> Iterator[str]:
    inner: Iterable[BaseShape] = getattr(shape, "shapes", ())  # a group
    for member in inner:
        yield from _shape(member)
    if getattr(shape, "has_table", False):
        yield from (_cells(cell.text for cell in row.cells) for row in shape.table.rows)  # type: ignore[attr-defined]
    elif shape.has_text_frame and shape.text_frame.text.strip():  # type: ignore[attr-defined]
        yield shape.text_frame.text  # type: ignore[attr-defined]
