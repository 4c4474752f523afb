"""A good file among every kind of bad one gives the good document and every reason."""

import builtins
import io
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import pytest

from agentctx.memory import documents
from agentctx.memory.documents import Corpus, Selection, open_documents
from agentctx.memory.errors import InputError
from agentctx.memory.loaders import table
from agentctx.memory.loaders.isolation import Worker
from agentctx.memory.types import Notice

ENCRYPTED_OFFICE = table.OLE + b"\0" * 600 + table.OLE_ENCRYPTED + b"\0" * 600


def reasons(notices: tuple[Notice, ...]) -> dict[str, str]:
    return {notice.source: notice.code for notice in notices}


def failure(
    *paths: str | Path, stdin: io.BytesIO | None = None, selection: Selection | None = None
) -> InputError:
    with pytest.raises(InputError) as caught:
        open_documents(paths, stdin=stdin, selection=selection or Selection())
    return caught.value


def test_every_damage_beside_a_good_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_pdf: Callable[..., bytes],
    make_zip: Callable[[Mapping[str, str | bytes]], bytes],
) -> None:
    bomb = make_zip({"mimetype": "application/epub+zip", "zeros": bytes(20_000_000)})
    damaged: dict[str, tuple[str, bytes]] = {
        "empty.txt": ("empty", b""),
        "blank.txt": ("empty", b" \n\t"),
        "mark.txt": ("empty", b"\xef\xbb\xbf"),
        "scan.html": ("empty", b"<script>1</script>"),
        "picture.png": ("binary", b"\x89PNG\r\n\0\0"),
        "cut.pdf": ("corrupt", make_pdf("page")[:150]),
        "random.pdf": ("corrupt", os.urandom(5000)),
        "random.docx": ("corrupt", os.urandom(5000)),
        "cut.epub": ("corrupt", bomb[:60]),
        "cut.xlsx": ("corrupt", make_zip({"xl/workbook.xml": "<workbook/>"})),
        "bomb.epub": ("too_large", bomb),
        "many.epub": ("too_large", make_zip(dict.fromkeys(("mimetype", *map(str, range(10_000))), b""))),
        "locked.docx": ("encrypted", ENCRYPTED_OFFICE),
        "old.doc": ("unsupported", table.OLE + b"\0" * 1000),
        "archive.zip": ("unsupported", make_zip({"a.txt": "text"})),
        "note.rtf": ("unsupported", b"{\\rtf1 text}"),
        "long.txt": ("too_large", b"x" * 3_000_000),
    }
    root = tmp_path / "mixed"
    root.mkdir()
    for name, (_, data) in damaged.items():
        (root / name).write_bytes(data)
    os.mkfifo(root / "pipe.txt")
    (tmp_path / "elsewhere.txt").write_text("elsewhere")
    (root / "link.txt").symlink_to(tmp_path / "elsewhere.txt")
    (root / "good.txt").write_text("The good one.")
    corpus = open_documents([root, tmp_path / "absent.txt"], selection=Selection(max_file_bytes=2_900_000))
    assert [(found.source, found.text) for found in corpus.documents] == [("mixed/good.txt", "The good one.")]
    assert reasons(corpus.skipped) == {f"mixed/{name}": code for name, (code, _) in damaged.items()} | {
        "mixed/pipe.txt": "unsupported",
        "mixed/link.txt": "outside",
        str(tmp_path / "absent.txt"): "not_found",
    }
    assert all(notice.source in notice.message for notice in corpus.skipped)


def test_an_unreadable_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root reads everything, so the refusal of the system is played."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    real = builtins.open

    def guarded(path: str, mode: str = "r") -> IO[Any]:
        if path.endswith("a.txt"):
            raise PermissionError(13, "Permission denied")
        return real(path, mode)

    monkeypatch.setattr(builtins, "open", guarded)
    corpus = open_documents([tmp_path])
    assert [found.text for found in corpus.documents] == ["b.txt"]
    assert [notice.code for notice in corpus.skipped] == ["permission"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_said_by_the_system(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt").chmod(0)
    assert failure(tmp_path / "a.txt").code == "permission"


def test_nothing_readable_raises_the_first_reason(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\0\1")
    error = failure(tmp_path / "a.bin", tmp_path / "gone", tmp_path / "too")
    assert error.code == "binary" and error.source == str(tmp_path / "a.bin")
    assert "2 more skipped" in error.message and error.hint
    assert failure().code == "empty"
    assert failure("-").code == "not_found"
    assert failure("a\0b").code == "not_found"


def test_an_empty_directory_says_what_it_hides(tmp_path: Path) -> None:
    assert failure(tmp_path).code == "empty"
    (tmp_path / ".hidden").write_text("x")
    error = failure(tmp_path)
    assert error.code == "empty" and "1 entries" in error.message and "--hidden" in error.hint


def test_a_sparse_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "sparse.txt"
    with path.open("wb") as file:
        file.truncate(2 << 30)
    assert failure(path).code == "too_large"


def test_one_line_of_49_megabytes(tmp_path: Path) -> None:
    (tmp_path / "line.txt").write_bytes(b"word " * 9_800_000)
    (found,) = open_documents([tmp_path / "line.txt"]).documents
    assert len(found.text) == 49_000_000
    (tmp_path / "line.txt").write_bytes(b"word " * 10_000_001)
    assert failure(tmp_path / "line.txt").code == "too_large"


def test_names_are_those_a_user_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes" / "sub").mkdir(parents=True)
    (tmp_path / "notes" / "sub" / "a.txt").write_text("a")
    (tmp_path / "notes" / "b.txt").write_text("b")
    (tmp_path / "c.txt").write_text("c")
    (tmp_path / "notes" / os.fsdecode(b"caf\xe9.txt")).write_text("d")
    monkeypatch.chdir(tmp_path)
    corpus = open_documents(["c.txt", "notes/", "./notes/b.txt"])
    assert [found.source for found in corpus.documents] == [
        "c.txt", "notes/b.txt", "notes/caf\ufffd.txt", "notes/sub/a.txt",
    ]  # fmt: skip
    assert corpus.warnings == ()
    monkeypatch.chdir(tmp_path / "notes")
    assert open_documents(["."]).documents[0].source == "notes/b.txt"


def test_two_directories_with_one_name_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for project in "AB":
        (tmp_path / project / "docs").mkdir(parents=True)
        (tmp_path / project / "docs" / "a.txt").write_text(project)
        (tmp_path / project / "docs" / "id_rsa").write_text(project)
    monkeypatch.chdir(tmp_path)
    corpus = open_documents(["A/docs", "B/docs", "A/docs/"])
    assert [found.source for found in corpus.documents] == ["docs/a.txt", "B/docs/a.txt"]
    assert [notice.source for notice in corpus.warnings][:2] == ["docs/id_rsa", "B/docs/id_rsa"]


def test_hidden_files_that_are_named_are_read(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("KEY=1")
    assert open_documents([tmp_path / ".env"]).documents[0].text == "KEY=1"
    (tmp_path / "id_rsa").write_text("key")
    (tmp_path / "a.txt").write_text("a")
    corpus = open_documents([tmp_path])
    assert [found.text for found in corpus.documents] == ["a"]
    assert reasons(corpus.warnings) == {f"{tmp_path.name}/id_rsa": "secret"}


def test_equal_texts_are_kept_once(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md"):
        (tmp_path / name).write_text("same")
    corpus = open_documents([tmp_path / "a.txt", tmp_path / "b.md"])
    assert [found.source for found in corpus.documents] == [str(tmp_path / "a.txt")]
    (warning,) = corpus.warnings
    assert warning.code == "duplicate" and warning.source.endswith("b.md") and "a.txt" in warning.message


def test_stdin(make_pdf: Callable[..., bytes]) -> None:
    (found,) = open_documents(["-"], stdin=io.BytesIO("naïve\r\n".encode())).documents
    assert (found.source, found.text) == ("<stdin>", "naïve\r\n")
    (found,) = open_documents(["-"], stdin=io.BytesIO(make_pdf("Piped page"))).documents
    assert (found.text, found.media_type) == ("Piped page", "application/pdf")
    assert failure("-", stdin=io.BytesIO(b"")).code == "empty"
    endless = io.BytesIO(b"x" * 300)
    error = failure("-", stdin=endless, selection=Selection(max_file_bytes=100))
    assert (error.code, error.source) == ("too_large", "<stdin>")


def test_encodings_by_glob(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("naïve ›".encode("cp1252"))
    (tmp_path / "b.txt").write_bytes("hello".encode("utf-16-le"))
    corpus = open_documents([tmp_path], selection=Selection(encodings=("*/a.txt=cp1252", "b.txt=utf-16-le")))
    assert [found.text for found in corpus.documents] == ["naïve ›", "hello"]
    assert corpus.warnings == ()


def test_the_total_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 10)
    monkeypatch.setattr(documents, "MAX_TOTAL_BYTES", 20)
    corpus = open_documents([tmp_path])
    assert len(corpus.documents) == 2
    assert reasons(corpus.skipped) == {f"{tmp_path.name}/c.txt": "too_large"}


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.docx").write_bytes(b"PK\x03\x04word/document.xml")
    monkeypatch.setattr(table, "find_spec", lambda package: None)
    error = failure(tmp_path / "a.docx")
    assert error.code == "missing_extra" and "pip install 'agentctx[office]'" in error.hint


@pytest.fixture
def bad_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module whose readers do what a hostile file can make a reader do."""
    (tmp_path / "bad_readers.py").write_text(
        "import os, time, signal\n"
        "from agentctx.memory.loaders.parts import Part\n"
        "def hang(file, encoding): yield Part('before'); time.sleep(60)\n"
        "def eat(file, encoding): yield Part('before'); bytearray(10**10)\n"
        "def die(file, encoding): yield Part('before'); os.kill(os.getpid(), signal.SIGSEGV)\n"
        "def fail(file, encoding): yield Part('before'); raise KeyError('broken inside')\n"
        "def noisy(file, encoding): print('noise'); yield Part(file.read().decode())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return str(tmp_path / "bad_readers.py")


@pytest.mark.parametrize("what,code", [
    ("hang", "timeout"), ("eat", "too_large"), ("die", "corrupt"), ("fail", "corrupt"),
])  # fmt: skip
def test_a_reader_that_breaks_down_costs_one_file(bad_readers: str, what: str, code: str) -> None:
    with Worker(seconds=2) as worker:
        parts, error = worker.read(f"bad_readers:{what}", bad_readers, None)
        assert [part.text for part in parts] == ["before"]
        assert error is not None and error.code == code
        assert what != "fail" or "broken inside" in error.message
        parts, error = worker.read("bad_readers:noisy", bad_readers, None)
        assert error is None and parts[0].text.startswith("import os")


def test_the_worker_never_imports_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_pdf: Callable[..., bytes]
) -> None:
    (tmp_path / "pypdf.py").write_text("raise SystemExit('hostile code ran')")
    (tmp_path / "a.pdf").write_bytes(make_pdf("Page"))
    monkeypatch.chdir(tmp_path)
    assert open_documents(["a.pdf"]).documents[0].text == "Page"


def test_pages_before_a_crash_are_kept_and_flagged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_readers: str
) -> None:
    row = table.Format("application/pdf", "bad_readers:die", (".pdf",), isolated=True)
    monkeypatch.setitem(table.BY_EXTENSION, ".pdf", row)
    (tmp_path / "a.pdf").write_bytes(b"anything")
    corpus: Corpus = open_documents([tmp_path / "a.pdf"])
    assert corpus.documents[0].text == "before"
    assert reasons(corpus.warnings) == {str(tmp_path / "a.pdf"): "corrupt"}


def test_one_worker_serves_many_files_and_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_pdf: Callable[..., bytes]
) -> None:
    started: list[subprocess.Popen[str]] = []
    real = subprocess.Popen

    class Counted(real):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Counted)
    for i in range(3):
        (tmp_path / f"{i}.pdf").write_bytes(make_pdf(f"Page {i}"))
    assert len(open_documents([tmp_path]).documents) == 3
    assert len(started) == 1 and started[0].returncode is not None


def test_opening_text_imports_nothing_heavy() -> None:
    code = (
        "import sys, io; from agentctx.memory.documents import open_documents;"
        "open_documents(['-'], stdin=io.BytesIO(b'text'));"
        "heavy = {'torch', 'numpy', 'transformers', 'langgraph', 'langchain_core', 'pypdf', 'docx'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or None)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-P", "-c", code], env=environment, check=True)
