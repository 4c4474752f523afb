import codecs

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentctx.memory.errors import InputError
from agentctx.memory.loaders.decode import decode

RUSSIAN = "Суд постановил третьего мая, что договор действителен. " * 20


@given(st.text())
@example("\r\n\u2028 \x0c\ufeff")
def test_utf8_comes_back_exactly(text: str) -> None:
    data = ("." + text).encode()
    if b"\0" not in data:
        assert decode(data).text == "." + text


@given(st.binary())
@example(b"\xff\xfe\x00\xd8")
@example(b"\xed\xa0\x80")
def test_any_bytes_decode_or_are_binary(data: bytes) -> None:
    try:
        decoded = decode(data)
    except InputError as error:
        assert error.code == "binary" and b"\0" in data
    else:
        decoded.text.encode()  # no lone surrogate


@pytest.mark.parametrize("mark,name", [
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
])  # fmt: skip
def test_a_byte_order_mark_decides_and_goes(mark: bytes, name: str) -> None:
    assert decode(mark + "naïve\r\n".encode(name)) == decode("naïve\r\n".encode(), None).__class__(
        "naïve\r\n", name
    )


def test_nul_means_binary_unless_the_encoding_is_named() -> None:
    with pytest.raises(InputError) as caught:
        decode(b"GIF89a\0\1\2")
    assert caught.value.code == "binary" and "--encoding" in caught.value.hint
    assert decode("hello".encode("utf-16-le"), "utf-16-le").text == "hello"
    late = b"x" * 8192 + b"\0"
    assert decode(late).text == late.decode()


@pytest.mark.parametrize("name", ["cp1251", "shift_jis", "gb18030"])
def test_a_guess_is_said_to_be_one(name: str) -> None:
    text = {
        "cp1251": RUSSIAN,
        "shift_jis": "裁判所は五月三日に判決を下した。" * 40,
        "gb18030": "法院于五月三日作出判决。" * 40,
    }[name]
    decoded = decode(text.encode(name))
    assert decoded.text == text
    assert [notice.code for notice in decoded.notices] == ["encoding_guessed"]


def test_a_cut_through_a_character_does_not_mislead_the_guess() -> None:
    text = ("a" + RUSSIAN.replace(". ", ".\n")) * 120
    assert decode(text.encode("koi8-r")).text == text


def test_damaged_utf8_keeps_its_other_letters_and_counts() -> None:
    decoded = decode("Müller, ".encode() * 30 + b"\xff\xfe" + "größer \ufffd".encode())
    assert decoded.text == "Müller, " * 30 + "\ufffd\ufffdgrößer \ufffd"
    (notice,) = decoded.notices
    assert notice.code == "encoding_damaged" and notice.message.startswith("2 broken")


def test_the_user_and_the_page_name_encodings() -> None:
    data = "“Straße”".encode("cp1252")
    assert decode(data, "cp1252").text == "“Straße”"
    assert decode(data, "cp1252").notices == ()
    assert decode(data, declared="cp1252").text == "“Straße”"
    assert decode(data, declared="no-such").text
    assert decode(b"caf\xe9", "ascii").text == "caf\ufffd"
