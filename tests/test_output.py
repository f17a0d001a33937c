"""Text from mail on a terminal: what the terminal would obey is made visible, what people write stays as it is."""

import csv
import io
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from releaser.cli import log as cli_log
from releaser.cli import output
from releaser.ledger import LOG_COLUMNS

PROPERTY = settings(max_examples=200, derandomize=False, print_blob=True, deadline=None)

ORDINARY = [
    "",
    "plain text, 100 % of it: <a@x.y> [b] {c} \\d",
    "Grüße aus Köln, naïve façade, Ærø, Łódź",
    "Привет, γειά, مرحبا, שלום, नमस्ते, สวัสดี",
    "こんにちは、世界 你好 안녕하세요 ｆｕｌｌ",
    "Sale! 🎉🛒 ❤️ 👍🏽 🇩🇪",
    "5 € – “quoted” … ½ × ²",
    "e\u0301 combined",
    "a\u00a0b\u3000c",
    "[/b] [red]x[/red] :smile: {0} %s",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_stays(text: str) -> None:
    """Letters, marks, digits, punctuation, symbols, emoji and spaces of every script are shown as they are."""
    assert output.visible(text) == text


OBEYED = [
    ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
    ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
    ("\x9b31m", r"\x9b31m"),
    ("a\nb\rc\td", r"a\nb\rc\td"),
    ("a\0b\x08c\x7fd", r"a\x00b\x08c\x7fd"),
    ("\u0085", r"\x85"),
    ("invoice\u202efdp.exe", r"invoice\u202efdp.exe"),
    ("\u2066a\u2069\u200e\u200f\u061c", r"\u2066a\u2069\u200e\u200f\u061c"),
    ("pay\u200bpal\u200d\ufeff\u00ad", r"pay\u200bpal\u200d\ufeff\xad"),
    ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
    ("\udcff\ud800", r"\udcff\ud800"),
    ("\ue000\U000f0000", r"\ue000\U000f0000"),
    ("\U000e0041\U000e0001", r"\U000e0041\U000e0001"),
    ("\uffff", r"\uffff"),
]


@pytest.mark.parametrize(("text", "expected"), OBEYED)
def test_what_a_terminal_obeys_becomes_visible(text: str, expected: str) -> None:
    """Escape sequences, bidi marks, characters without width, line separators and surrogates are shown as escapes."""
    assert output.visible(text) == expected


def test_no_such_character_survives() -> None:
    """Of all characters, no control, format, surrogate, line or paragraph separator comes through."""
    unseen = [chr(n) for n in range(sys.maxunicode + 1) if unicodedata.category(chr(n)) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert len(unseen) > 2000
    assert all(output.visible(character).isascii() and output.visible(character).isprintable() for character in unseen)


@PROPERTY
@given(st.text(st.one_of(st.characters(), st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp"])), max_size=30))
def test_visible_text_can_be_printed(text: str) -> None:
    """Whatever comes in, what comes out is printable, is UTF-8, and does not change again."""
    shown = output.visible(text)
    assert not any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in shown)
    assert shown.encode().decode() == shown == output.visible(shown)


@PROPERTY
@given(st.text(st.characters(categories=["L", "M", "N", "P", "S", "Zs"]), max_size=30))
def test_visible_characters_are_not_touched(text: str) -> None:
    """Letters, marks, numbers, punctuation, symbols and spaces are never changed."""
    assert output.visible(text) == text


@pytest.mark.parametrize("text", ["[/b]", "[red]x[/red]", ":smile:", "[link=http://x.y]y[/link]", "\\[b]", "{x}"])
def test_text_is_never_markup(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A Subject with markup in it breaks no table and no sentence: it is shown."""
    output.table(["subject"], [[text]], "none")
    output.say(text)
    output.complain(text)
    printed = capsys.readouterr()
    assert printed.out.split("\n")[1].strip() == printed.out.split("\n")[2] == text
    assert printed.err == f"secure-sendmail: {text}\n"


def test_a_row_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """No text from mail can add a line, or an escape sequence, to a table."""
    output.table(["id", "subject"], [["1", "a\nFAKE ROW"], ["2", "\x1b[2Jb\r\u2028c"]], "none")
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 3 and "\x1b" not in printed and "\r" not in printed


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("text", [
    "=1+1", "+1", "-1", "@SUM(1)", "'=1", " =1+1", '"=1+1"', "\uff1d1+1", "Sale;=1+1", 'Sale; "=1+1"', ";;@SUM(1)", "a\t=1",
    "\r=1", 'x";"=1+1', "a;=1,=2;+3",
])  # fmt: skip
def test_csv_has_no_formula(text: str, delimiter: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever a customer writes, and whichever delimiter the reader's country has: no cell begins as a formula does."""
    write = cli_log._line(as_csv=True, as_json=False)
    write({name: text if name == "subject" else "" for name in LOG_COLUMNS})
    for row in csv.reader(io.StringIO(capsys.readouterr().out), delimiter=delimiter):
        for cell in row:
            assert not unicodedata.normalize("NFKC", cell.lstrip('" ')).startswith(("=", "+", "-", "@")), cell


def test_empty_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Without rows there is a sentence instead of a table."""
    output.table(["id"], [], "No mail is held.")
    assert capsys.readouterr().out == "No mail is held.\n"


def test_without_a_terminal_nothing_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """Where a program reads, a row of ordinary length stays one line, and a longer text stays whole."""
    output.table(["id", "sender", "subject"], [["0660E2E85F2C029E9", "a" * 60, "s" * 120]], "none")
    assert "s" * 120 in capsys.readouterr().out
    output.table(["subject"], [["s" * 1000]], "none")
    assert capsys.readouterr().out.replace("\n", "").count("s") == 1001


def test_json_is_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON carries every text, bidi marks and surrogates too, as ASCII."""
    output.as_json({"subject": "Grüße\u202e\x1b\udcff🎉"})
    printed = capsys.readouterr().out
    assert printed.isascii() and "\x1b" not in printed
    assert r"\u202e\u001b\udcff" in printed
