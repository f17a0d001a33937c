"""What a mail says of itself is shown, and does nothing else: no markup, no escape sequence, no change of direction."""

from __future__ import annotations

import base64
import json
import unicodedata
from collections.abc import Iterator

import pytest
from host import Host

VHOST = "www.a.example"

ESCAPES = "\x1b[31mred\x1b[2J\x1b]0;title\x07\x1b[6n\x9b31m\x08\x08\x7f"
BIDI = "\u202egnp.exe\u202c\u2066isolate\u2069\u200e\u200f\u061c\u202a\u2028\u2029"

SUBJECTS = {
    "closing-tag": b"[/b] [/] [/bold] [[/b]",
    "link": b"[link=https://x.example]x[/link] [red]r[/red] [@click=app.quit]q[/]",
    "escapes": ESCAPES.encode(),
    "raw-escapes": b"\x1b[31mred\x1b[2J\x1b]0;title\x07\x9b31m\x08\x7f\x01",
    "bidi": BIDI.encode(),
    "invalid": b"caf\xe9 \xff\xfe \xc3 \xed\xa0\x80 \xf4\x90\x80\x80",
    "encoded-escapes": b"=?utf-8?B?" + base64.b64encode(ESCAPES.encode()) + b"?=",
    "encoded-bidi": b"=?utf-8?B?" + base64.b64encode(BIDI.encode()) + b"?=",
    "encoded-latin": b"=?iso-8859-1?Q?=1B=5B31m=9B=85=00?= =?utf-8?Q?=0A=0D?=",
    "encoded-broken": b"=?no-such-charset?Q?=1B?= =?utf-8?B?!!!?= =?utf-8?Q?=F?= =?utf-7?Q?+AAo-?= =?unicode_escape?Q?\\x1b?=",
    "encoded-markup": b"=?utf-8?Q?=5B/b=5D=5Blink=3Dhttps=3A//x.example=5Dx?=",
    "emoji": ":smile: \U0001f600 \U000e0041\ufeff".encode(),
    "long": b"x" * 900,
    "folded": b"first\n second\n\tthird",
    "formula": b"=cmd|' /C calc'!A0",
    "repr": b"'; DROP TABLE mail_log; -- %s {0} \\x1b \\u202e",
}


@pytest.fixture(scope="module")
def hostile() -> Iterator[Host]:
    """An installation in which one mail of each kind is held; everything that a mail can say is in it."""
    with Host(default=["0/1h"]) as host:
        host.add(VHOST)
        for name, subject in SUBJECTS.items():
            cwd = host.directory / "cwd" / f"[{name}] \x1b[31m \u202e [b]"
            cwd.mkdir(parents=True)
            message = (
                b"To: one@x.example\nSubject: " + subject + b"\nX-Test: " + name.encode() + b"\nFrom: " + subject
                + b" <a@a.example>\nX-PHP-Originating-Script: 33:" + subject + b"\nMessage-ID: <" + name.encode()
                + b"@a.example>\n\n" + subject + b"\nb\x00d\x1b[31my\r\n"
            )  # fmt: skip
            run = host.enqueue(VHOST, "user@a.example", "-t", message=message, cwd=cwd)
            assert run.returncode == 0, (name, run)
        with host.running():
            host.wait(lambda: len(host.held()) == len(SUBJECTS), "all are held")
            yield host


def dangerous(shown: str) -> set[str]:
    """The characters of the text that are not simply shown: all controls but the line end, and what turns direction."""
    return {each for each in shown.replace("\n", "") if unicodedata.category(each) in ("Cc", "Cf", "Cs", "Zl", "Zp")}


def check_shown(said: bytes) -> str:
    shown = said.decode()
    assert not dangerous(shown), dangerous(shown)
    return shown


@pytest.mark.parametrize(
    "words", [["hold", "list"], ["log"], ["status"], ["log", "--event", "held"], ["hold", "list", "--reason", "limit"], ["check"]]
)
@pytest.mark.parametrize("columns", ["40", "200"])
def test_hostile_text_in_listings(hostile: Host, words: list[str], columns: str) -> None:
    """Listings of hostile mail work, show every row, and have no character that a terminal would act on."""
    run = hostile.cli(*words, text=False, env={"COLUMNS": columns, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"})
    shown = check_shown(run.stdout + run.stderr)
    if words[0] in ("hold", "log") and columns == "200":
        assert all(queue_id in shown for queue_id in hostile.held())


def test_hostile_text_in_listings_under_any_locale(hostile: Host) -> None:
    """The same with a locale that cannot print most of it."""
    for words in (["hold", "list"], ["log"], ["hold", "list", "--json"]):
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
        run = hostile.cli(*words, text=False, env=environment)
        assert not dangerous((run.stdout + run.stderr).decode())


@pytest.mark.parametrize("name", SUBJECTS)
def test_hostile_text_shown(hostile: Host, name: str) -> None:
    """One hostile mail is shown with nothing that acts; --raw gives its bytes as they are; JSON has the same message."""
    queue_id = next(row["queue_id"] for row in hostile.rows() if row["message_id"] == f"<{name}@a.example>")
    shown = check_shown(hostile.cli("hold", "show", queue_id, text=False).stdout)
    assert queue_id in shown or "one@x.example" in shown
    raw = hostile.cli("hold", "show", "--raw", queue_id, text=False).stdout
    subject = SUBJECTS[name]
    assert b"\nSubject: " + subject + b"\n" in raw
    assert raw.endswith(b"\n\n" + subject + b"\nb\x00d\x1b[31my\n")
    assert hostile.json("hold", "show", queue_id)["queue_id"] == queue_id


def test_hostile_text_in_json(hostile: Host) -> None:
    """JSON of every listing parses, is one document without raw control characters, and has text that can be printed."""
    for words in (["hold", "list"], ["log"], ["status"], ["limits", "show", VHOST], ["vhost", "list"], ["check"]):
        said = hostile.cli(*words, "--json", text=False).stdout
        assert not {each for each in said.decode() if unicodedata.category(each) == "Cc" and each != "\n"}
        json.loads(said)
    assert len(hostile.json("hold", "list")) == len(SUBJECTS)
    # No lone surrogates, at which other programs stop.
    json.dumps(hostile.json("log"), ensure_ascii=False).encode()


def test_hostile_text_is_readable(hostile: Host) -> None:
    """Markup is shown as the text that it is, and not taken for markup."""
    shown = {row["message_id"]: hostile.cli("hold", "show", row["queue_id"]).stdout for row in hostile.rows()}
    assert SUBJECTS["closing-tag"].decode() in shown["<closing-tag@a.example>"]
    assert SUBJECTS["link"].decode() in shown["<link@a.example>"]
    assert "[/b] [/]" in hostile.cli("hold", "list", env={"COLUMNS": "300", "PATH": "/usr/bin:/bin"}).stdout


def test_hostile_text_in_the_log_of_the_releaser(hostile: Host) -> None:
    """What the releaser writes about hostile mail is lines of text."""
    said = (hostile.directory / "releaser.log").read_bytes()
    assert said
    check_shown(said)


def test_hostile_text_in_arguments(hostile: Host) -> None:
    """What a command is given, and finds wrong, is repeated without what acts."""
    for words in (
        ["hold", "release", ESCAPES],
        ["hold", "show", BIDI],
        ["hold", "list", "--since", ESCAPES],
        [ESCAPES],
        ["limits", "show", BIDI + ESCAPES],
        ["vhost", "add", ESCAPES + BIDI],
        ["hold", "release", "[/b]"],
    ):
        run = hostile.cli(*words, check=False, text=False)
        assert run.returncode in (1, 64), run
        check_shown(run.stdout + run.stderr)
    run = hostile.enqueue(VHOST, ESCAPES + BIDI, "-Z" + ESCAPES, "-f" + BIDI)
    assert run.returncode == 64
    check_shown(run.stderr)
    # Filters that match nothing, or everything, with the same text.
    for words in (["hold", "list", "--reason", ESCAPES], ["log", "--vhost", BIDI], ["hold", "list", "--script", "[/b]"]):
        check_shown(hostile.cli(*words, text=False).stdout)
