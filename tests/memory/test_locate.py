import pytest

from agentctx.memory.locate import locate
from agentctx.memory.types import Document, Locator, Span

CHAPTER = Locator(0, 100, "chapter", "I")
FIRST = Locator(0, 48, "page", 1)
LINE = Locator(10, 20, "line", 2)
SECOND = Locator(50, 100, "page", 2)
LABELLED = Locator(100, 110, "page", "xii")
DOCUMENT = Document.of("x" * 120, locators=(CHAPTER, FIRST, LINE, SECOND, LABELLED))


@pytest.mark.parametrize(
    ("start", "page", "innermost"),
    [
        (0, 1, FIRST),
        (10, 1, LINE),
        (19, 1, LINE),
        (20, 1, FIRST),
        (48, None, CHAPTER),
        (99, 2, SECOND),
        (105, None, LABELLED),
        (115, None, None),
    ],
)
def test_page_and_innermost_locator(start: int, page: int | None, innermost: Locator | None) -> None:
    assert locate(DOCUMENT, Span(DOCUMENT.id, start, start + 1)) == (page, innermost)
