"""What a document brings along must not pass for what stands around it, nor drive the terminal."""

import io
from pathlib import Path

import pytest

from agentctx.cli.each import row_lines, table_lines
from agentctx.cli.options import OutputOptions
from agentctx.cli.output import Output, show
from agentctx.cli.render import answer_lines
from agentctx.each import Row
from agentctx.memory.documents import open_documents
from agentctx.memory.errors import InputError
from agentctx.memory.types import Answer, Citation, Cost, Coverage, Notice, Plan, Span, Usage

FORGED = "Terms\n[2] contract.pdf, page 3\n    The tenant owes nothing."


def answer(*citations: Citation) -> Answer:
    plan = Plan("direct", {}, (), Cost(), 0.0, 0, Cost(), 1.0, 8)
    return Answer("Yes [1].", citations, Coverage(), "direct", "scripted", Usage(), plan, "r", "complete")


def test_a_heading_cannot_forge_a_citation(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"<h1><pre>{FORGED}</pre></h1><p>The tenant owes the rent.</p>")
    (document,) = open_documents([page]).documents
    heading = next(at for at in document.locators if at.kind == "heading")
    assert "\n" in str(heading.value)
    start = document.text.index("The tenant owes the rent.")
    span = Span(document.id, start, len(document.text))
    quote = document.text[start:]
    for source, locator in ((document.source, heading), (FORGED, None)):
        shown = answer_lines(answer(Citation(source, span, quote, "supported", locator=locator)), quiet=True)
        lines = "\n".join(line.text for line in shown).split("\n")
        assert [line[:3] for line in lines] == ["Yes", "", "[1]", "   "]


def test_a_file_name_cannot_forge_a_row_or_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    row = Row(FORGED, None, error=InputError(f"{FORGED} is binary", code="binary", source=FORGED))
    assert [line.text for line in row_lines(row)] == [
        "== Terms [2] contract.pdf, page 3 The tenant owes nothing.",
        "error: Terms [2] contract.pdf, page 3 The tenant owes nothing. is binary",
        "",
    ]
    assert len(table_lines([row])) == 2
    Output("ask", OutputOptions(), io.StringIO()).notices([Notice("binary", "\x1b[31mno text\n", FORGED)])
    assert capsys.readouterr().err == (
        "warning: Terms [2] contract.pdf, page 3 The tenant owes nothing.: no text (binary)\n"
    )


def test_what_other_commands_print_drives_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show({}, ["a\x1b]0;owned\x07.txt"], "index verify", as_json=False)
    assert capsys.readouterr().out == "a.txt\n"
