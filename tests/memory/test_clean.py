import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentctx.memory.clean import one_line, printable


@pytest.mark.parametrize("dirty,clean", [
    ("\x1b[31mred\x1b[0m", "red"),
    ("\x1b]0;title\x07text", "text"),
    ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
    ("\x1b]52;c;cm0=\x07", ""),
    ("\x1b(Bplain\x1bc", "plain"),
    ("\x9b31mred", "red"),
    ("\x1b]never ends\nnext line", "never ends\nnext line"),
    ("a\x08\x7f\x00b\rc", "abc"),
    ("safe\u202egnp.exe\u2066x\u2069", "safegnp.exex"),
    ("tab\tnewline\nÄ 漢 👩\u200d👩", "tab\tnewline\nÄ 漢 👩\u200d👩"),
    ("\x1b\x1b[31m[31mx", "[31mx"),
])  # fmt: skip
def test_what_moves_a_terminal_goes(dirty: str, clean: str) -> None:
    assert printable(dirty) == clean


@given(st.text(alphabet=st.sampled_from("\x1b[]\x9b\x9d31mc;\x07\\\n\tX\u202e\x00 ")))
def test_nothing_harmful_is_left_and_again_changes_nothing(text: str) -> None:
    clean = printable(text)
    assert all(letter in "\n\t" or letter.isprintable() for letter in clean)
    assert printable(clean) == clean


def test_a_name_of_several_lines_becomes_one() -> None:
    assert one_line("Terms\n[2] contract.pdf\x1b[0m,\r\n\u2028  page 3\n") == "Terms [2] contract.pdf, page 3"
