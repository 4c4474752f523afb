"""Every reader on real files: exact text, and locators whose text is what they name."""

import io
import json
import random
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import docx
import openpyxl
import pptx
import pypdf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pypdf.constants import PageLabelStyle

from agentctx.memory.blobs import Blobs
from agentctx.memory.documents import Corpus, open_documents
from agentctx.memory.errors import InputError
from agentctx.memory.loaders import records
from agentctx.memory.loaders.html import extract
from agentctx.memory.loaders.isolation import Worker
from agentctx.memory.loaders.load import load
from agentctx.memory.loaders.parts import Part, join
from agentctx.memory.types import Document, Locator


def opened(path: Path, data: bytes | str) -> Corpus:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return open_documents([path])


def document(path: Path, data: bytes | str) -> Document:
    corpus = opened(path, data)
    assert corpus.skipped == ()
    (only,) = corpus.documents
    return only


def places(document: Document, kind: str) -> dict[int | str, str]:
    return {at.value: document.text[at.start : at.end] for at in document.locators if at.kind == kind}


def test_text_is_exactly_the_file(tmp_path: Path) -> None:
    text = "  a\r\nb\rc\n\n\u2028e\u0301 \x0c ü\t\n"
    found = document(tmp_path / "a.py", text)
    assert (found.text, found.source, found.media_type) == (text, str(tmp_path / "a.py"), "text/plain")


def test_markdown_sections(tmp_path: Path) -> None:
    text = "intro\n# A #\none\n## B\r\ntwo\n```\n# no\n```\nUnder\n=====\nthree\n\nSub\n---\nfour\n"
    found = document(tmp_path / "a.md", text)
    assert found.text == text and found.media_type == "text/markdown"
    assert places(found, "heading") == {
        "A": "# A #\none\n",
        "A > B": "## B\r\ntwo\n```\n# no\n```\n",
        "Under": "Under\n=====\nthree\n\n",
        "Under > Sub": "Sub\n---\nfour\n",
    }


def test_html_is_what_a_browser_shows(tmp_path: Path) -> None:
    markup = """<!doctype html><html><head><title>Costs &amp; terms</title><style>p{}</style></head><body>
      <h1>The <em>first</em>\n part</h1><p>One&nbsp;two,   <b>thr</b>ee&eacute;.<br>Next</p>
      <script>var x = "<p>no</p>";</script><template><p>no</p></template>
      <ul><li>a<li>b</ul><table><tr><th>k<th>v<tr><td>1<td>2</table><pre>  x\n   y</pre>
      <h2>Second</h2>end &#x202f;&unknown; <!-- no --></body></html>"""
    found = document(tmp_path / "a.html", markup)
    assert found.text == (
        "Costs & terms\n\nThe first part\n\nOne\u00a0two, threeé.\nNext\n\na\nb\n\nk\tv\n1\t2\n\n  x\n   y"
        "\n\nSecond\n\nend \u202f&unknown;"
    )
    assert list(places(found, "heading")) == ["The first part", "The first part > Second"]
    assert places(found, "heading")["The first part > Second"].startswith("Second\n\nend")


def test_html_that_breaks_off_keeps_its_text() -> None:
    assert extract("AT&amp;T without a tag").text == "AT&T without a tag"
    assert extract("<p>one <b>two &lt; <a hre").text == "one two < <a hre"
    assert extract("<p>a</p><script>if (a > b) {").text == "a"
    assert extract("<a " * 100_000).text.count("<a") == 100_000  # ends soon


def test_html_names_its_encoding(tmp_path: Path) -> None:
    markup = '<meta charset="windows-1251"><p>Суд постановил</p>'.encode("cp1251")
    corpus = opened(tmp_path / "a.html", markup)
    assert corpus.documents[0].text == "Суд постановил"
    assert [notice.code for notice in corpus.warnings] == ["encoding_guessed"]


def test_the_worker_gives_the_same_text(tmp_path: Path) -> None:
    markup = "<h1>T</h1>" + "<p>Some words &amp; more.</p>\n" * 4000
    found = document(tmp_path / "a.html", markup)
    assert (found.text, found.locators) == (extract(markup).text, extract(markup).locators)


@given(st.text(alphabet=st.sampled_from("<>/!-p h1&;#x\"'=\n\ud800a")))
def test_any_markup_gives_text_and_places_inside_it(markup: str) -> None:
    page = extract(markup)
    assert all(0 <= at.start <= at.end <= len(page.text) for at in page.locators)


def test_csv_rows_with_quoted_lines(tmp_path: Path) -> None:
    text = 'name,note\r\n"Ann","two\r\nlines, ""quoted"""\r\n\r\nBo,5" disk\r\n'
    found = document(tmp_path / "a.csv", text)
    assert found.text == text and found.media_type == "text/csv"
    assert places(found, "row") == {
        1: "name,note",
        2: '"Ann","two\r\nlines, ""quoted"""',
        4: 'Bo,5" disk',
    }
    assert places(document(tmp_path / "b.tsv", 'a\tb\n"1\n2"\t3'), "row") == {1: "a\tb", 2: '"1\n2"\t3'}


def test_json_records(tmp_path: Path) -> None:
    found = document(tmp_path / "a.json", '[ {"a": [1, 2]} ,\n "x,]",\n 3]\n')
    assert places(found, "record") == {1: '{"a": [1, 2]}', 2: '"x,]"', 3: "3"}
    found = document(tmp_path / "b.json", '{"k" : {"z": "}"}, "é": null}')
    assert places(found, "record") == {"k": '"k" : {"z": "}"}', "é": '"é": null'}
    found = document(tmp_path / "c.jsonl", '{"a": 1}\r\n\n{"a": "\u2028"}\n')
    assert places(found, "line") == {1: '{"a": 1}', 3: '{"a": "\u2028"}'}


@pytest.mark.parametrize("text", ["[1, 2", '{"a" 1}', "{1: 2}", "[" * 100_000, "nonsense", "[1 2]"])
def test_broken_json_keeps_its_text(tmp_path: Path, text: str) -> None:
    corpus = opened(tmp_path / "a.json", text)
    assert corpus.documents[0].text == text
    assert [notice.code for notice in corpus.warnings] == ["malformed"]


@given(
    st.lists(
        st.recursive(st.none() | st.integers() | st.text(max_size=4), st.lists, max_leaves=4), max_size=5
    ),
    st.sampled_from([None, 2]),
)
def test_every_json_element_is_found(value: list[object], indent: int | None) -> None:
    data = json.dumps(value, ensure_ascii=True, indent=indent)
    (part,) = records.read_json(io.BytesIO(data.encode()), None)
    assert [json.loads(part.text[at.start : at.end]) for at in part.locators] == value


def test_pdf_pages_are_what_pypdf_reads(tmp_path: Path, make_pdf: Callable[..., bytes]) -> None:
    data = make_pdf("First page", "Second page", "Third page")
    corpus = opened(tmp_path / "a.bin", data)  # content beats the extension
    (found,) = corpus.documents
    pages = [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(data)).pages]
    assert found.text == "\n\n".join(pages)
    assert places(found, "page") == dict(enumerate(pages, 1))
    assert [page.value for page in found.pages] == [1, 2, 3]
    assert found.media_type == "application/pdf" and corpus.warnings == ()


def test_pdf_labels_and_pages_without_text(tmp_path: Path, make_pdf: Callable[..., bytes]) -> None:
    writer = pypdf.PdfWriter(io.BytesIO(make_pdf("Preface", "One", "Two")))
    writer.insert_blank_page(100, 100, 1)
    writer.set_page_label(0, 1, style=PageLabelStyle.LOWERCASE_ROMAN)
    writer.set_page_label(2, 3, style=PageLabelStyle.DECIMAL)
    file = io.BytesIO()
    writer.write(file)
    corpus = opened(tmp_path / "a.pdf", file.getvalue())
    (found,) = corpus.documents
    assert places(found, "page") == {1: "Preface", 2: "", 3: "One", 4: "Two"}
    assert found.text == "Preface\n\n\n\nOne\n\nTwo"
    assert places(found, "page_label") == {"i": "Preface", "ii": "", "1": "One", "2": "Two"}
    assert [(notice.code, notice.message) for notice in corpus.warnings] == [
        ("no_text_layer", "1 of 4 pages have no text: 2")
    ]


def encrypted(data: bytes, password: str, algorithm: str) -> bytes:
    writer = pypdf.PdfWriter(io.BytesIO(data))
    writer.encrypt(password, "owner", algorithm=algorithm)
    file = io.BytesIO()
    writer.write(file)
    return file.getvalue()


@pytest.mark.parametrize("algorithm", ["RC4-128", "AES-256"])
def test_encrypted_pdf(tmp_path: Path, make_pdf: Callable[..., bytes], algorithm: str) -> None:
    data = make_pdf("Secret page")
    assert document(tmp_path / "a.pdf", encrypted(data, "", algorithm)).text == "Secret page"
    with pytest.raises(InputError) as caught:
        opened(tmp_path / "b.pdf", encrypted(data, "word", algorithm))
    assert caught.value.code == "encrypted"


def test_truncated_pdf_keeps_the_pages_before_the_fault(
    tmp_path: Path, make_pdf: Callable[..., bytes]
) -> None:
    data = make_pdf(*(f"Page number {i}" for i in range(1, 7)))
    corpus = opened(tmp_path / "a.pdf", data[: int(len(data) * 0.55)])
    (found,) = corpus.documents
    kept = places(found, "page")
    assert kept[1] == "Page number 1" and kept[2] == "Page number 2"
    assert "Page number 6" not in found.text
    assert "corrupt" in {notice.code for notice in corpus.warnings}


def test_epub_chapters(tmp_path: Path, make_epub: Callable[..., bytes]) -> None:
    data = make_epub("<h1>I. Arrival</h1><p>They came.</p>", "<p></p>", "<p>No heading here.</p>")
    found = document(tmp_path / "a.epub", data)
    assert found.text == "I. Arrival\n\nThey came.\n\nNo heading here."
    assert places(found, "chapter") == {"I. Arrival": "I. Arrival\n\nThey came.", "3": "No heading here."}
    assert places(found, "heading") == {"I. Arrival": "I. Arrival\n\nThey came."}
    assert document(tmp_path / "b.zip", data).media_type == "application/epub+zip"


def test_epub_with_a_missing_chapter_keeps_the_others(
    tmp_path: Path, make_epub: Callable[..., bytes]
) -> None:
    source = zipfile.ZipFile(io.BytesIO(make_epub("<p>One</p>", "<p>Two</p>")))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as copy:
        for name in source.namelist():
            if not name.endswith("c 0.xhtml"):
                copy.writestr(name, source.read(name))
    corpus = opened(tmp_path / "a.epub", file.getvalue())
    assert corpus.documents[0].text == "Two"
    assert [notice.code for notice in corpus.warnings] == ["corrupt"]


def test_epub_with_an_entity_bomb_is_corrupt(
    tmp_path: Path, make_zip: Callable[[Mapping[str, str | bytes]], bytes]
) -> None:
    entities = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>'
    bomb = f'{entities}<container><rootfile full-path="&b;"/></container>'
    with pytest.raises(InputError) as caught:
        opened(
            tmp_path / "a.epub",
            make_zip({"mimetype": "application/epub+zip", "META-INF/container.xml": bomb}),
        )
    assert caught.value.code == "corrupt"


def test_docx_keeps_headings_paragraphs_and_tables(tmp_path: Path) -> None:
    word = docx.Document()
    word.add_heading("Terms", 1)
    word.add_paragraph("The first term.")
    word.add_heading("Price", 2)
    table = word.add_table(2, 2)
    for i, cell in enumerate(cell for row in table.rows for cell in row.cells):
        cell.text = f"cell {i}"
    word.add_paragraph("")
    word.add_paragraph("The end.")
    file = io.BytesIO()
    word.save(file)
    found = document(tmp_path / "a.docx", file.getvalue())
    assert found.text == "Terms\n\nThe first term.\n\nPrice\n\ncell 0\tcell 1\ncell 2\tcell 3\n\nThe end."
    assert places(found, "heading") == {
        "Terms": "Terms\n\nThe first term.\n\n",
        "Terms > Price": "Price\n\ncell 0\tcell 1\ncell 2\tcell 3\n\nThe end.",
    }
    assert places(found, "paragraph")[5] == "The end." and found.pages == ()
    assert [at.start for at in found.locators] == sorted(at.start for at in found.locators)


def test_pptx_slides_with_notes(tmp_path: Path) -> None:
    show = pptx.Presentation()
    for title in ("Opening", "Figures"):
        slide = show.slides.add_slide(show.slide_layouts[5])
        slide.shapes.title.text = title
    slide.notes_slide.notes_text_frame.text = "say this"
    slide.shapes.add_table(1, 2, 0, 0, 9, 9).table.cell(0, 1).text = "42"
    file = io.BytesIO()
    show.save(file)
    found = document(tmp_path / "a.pptx", file.getvalue())
    assert places(found, "slide") == {1: "Opening", 2: "Figures\n\t42\nNotes: say this"}


def test_xlsx_sheets_and_rows(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.title = "Costs"
    book.active.append(["item", "price"])
    book.active.append([])
    book.active.append(["two\nlines", 0, None, True])
    book.create_sheet("Empty")
    file = io.BytesIO()
    book.save(file)
    found = document(tmp_path / "a.xlsx", file.getvalue())
    assert places(found, "sheet") == {"Costs": "Costs\nitem\tprice\ntwo lines\t0\t\tTrue", "Empty": "Empty"}
    assert places(found, "row") == {1: "item\tprice", 3: "two lines\t0\t\tTrue"}


def test_office_files_cut_or_changed_anywhere_give_text_or_a_reason(tmp_path: Path) -> None:
    book, word, show = openpyxl.Workbook(), docx.Document(), pptx.Presentation()
    book.active.append(["item", "price"])
    word.add_paragraph("words")
    show.slides.add_slide(show.slide_layouts[5]).shapes.title.text = "title"
    dice = random.Random(7)
    names = []
    for whole, extension in ((book, "xlsx"), (word, "docx"), (show, "pptx")):
        file = io.BytesIO()
        whole.save(file)
        for number in range(6):
            data = bytearray(file.getvalue())
            if number % 2:
                del data[dice.randrange(len(data)) :]
            for _ in range(40):
                data[dice.randrange(len(data))] = dice.randrange(256)
            names.append(f"{number}.{extension}")
            (tmp_path / names[-1]).write_bytes(b"PK\x03\x04" + data[4:])
    (tmp_path / "good.txt").write_text("good")
    corpus = open_documents([tmp_path])
    told = {notice.source.rpartition("/")[2] for notice in (*corpus.skipped, *corpus.warnings)}
    read = {found.source.rpartition("/")[2] for found in corpus.documents}
    assert "good.txt" in read and told | read == {"good.txt", *names}


def test_joined_parts_keep_their_places_and_lose_only_lone_surrogates() -> None:
    parts = [Part.whole("a\ud800b", "page", 1), Part.whole("", "page", 2), Part.whole("cd", "page", 3)]
    text, locators = join(parts)
    assert text == "a\ufffdb\n\n\n\ncd"
    assert locators == (Locator(0, 3, "page", 1), Locator(5, 5, "page", 2), Locator(7, 9, "page", 3))


def test_a_lone_surrogate_in_a_key_can_be_kept(tmp_path: Path) -> None:
    found = document(tmp_path / "a.json", '{"\\ud800": 1, "b": 2}')
    assert [at.value for at in found.locators] == ["\ufffd", "b"]
    Blobs(tmp_path / "blobs").put_document(found)
    assert Blobs(tmp_path / "blobs").get_document(found.id, found.source) == found


def test_a_chapter_named_again_and_again_is_read_once(
    tmp_path: Path, make_epub: Callable[..., bytes]
) -> None:
    source = zipfile.ZipFile(io.BytesIO(make_epub("<p>One.</p>", "<p>Two.</p>")))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(
                name, source.read(name).replace(b'<itemref idref="c0"/>', b'<itemref idref="c0"/>' * 50)
            )
    assert document(tmp_path / "a.epub", file.getvalue()).text == "One.\n\nTwo."


def test_text_beyond_the_limit_of_a_reader_is_left_out(
    tmp_path: Path, make_epub: Callable[..., bytes]
) -> None:
    (tmp_path / "a.epub").write_bytes(make_epub(*(f"<p>{'word ' * 20}{n}.</p>" for n in range(9))))
    with Worker(characters=250) as worker:
        loaded = load(tmp_path / "a.epub", "a.epub", worker)
        assert loaded.document.text.count("word") == 40
        assert [notice.code for notice in loaded.notices] == ["too_large"]
        (tmp_path / "b.html").write_text("<p>Still at work.</p>")
        assert load(tmp_path / "b.html", "b.html", worker).document.text == "Still at work."
