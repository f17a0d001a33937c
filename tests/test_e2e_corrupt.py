"""What lies in new/ and is no message is put aside for a person, and stops nobody's mail; the MTA is a maildir."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from host import Host, text

VHOST = "www.a.example"
NAME = "1795376167.{number:06}.P3395.2bad27e5dbb62169d779a57a"


def new(host: Host) -> Path:
    return host.spool / "vhosts" / VHOST / "new"


def genuine(host: Host) -> bytes:
    """The file of a message as enqueue writes it, taken out of new/ again."""
    host.send(VHOST, message=text("one@x.example", subject="genuine"))
    (path,) = new(host).iterdir()
    content = path.read_bytes()
    path.unlink()
    return content


def put(host: Host, content: bytes, number: int = 0) -> str:
    """Puts a file into new/ whose name is as it should be."""
    name = f"{NAME.format(number=number)},S={len(content)}"
    (new(host) / name).write_bytes(content)
    return name


def with_line(content: bytes, line: str) -> bytes:
    """The file with another envelope line."""
    envelope, _, message = content.partition(b"\n\n")
    return envelope + b"\n" + line.encode() + b"\n\n" + message


def still_flows(host: Host) -> None:
    """Mail of this vhost and of another one goes out, and leaves nothing behind."""
    before = len(host.mail())
    there = set(host.ls())
    for vhost in (VHOST, "www.b.example"):
        host.send(vhost, message=text("one@x.example", subject=f"good {vhost}"))
    host.wait_for_mail(before + 2)
    host.wait(lambda: not [name for name in host.ls() if name.startswith("vhosts/") and name not in there], "they are out")


ENVELOPES: dict[str, Callable[[bytes], bytes]] = {
    "junk": lambda _: b"\x00\xff" * 100,
    "empty": lambda _: b"",
    "text": lambda _: b"Hello\n",
    "a bare message": lambda _: text("one@x.example"),
    "no empty line": lambda content: content.partition(b"\n\n")[0] + b"\n",
    "no recipient": lambda content: content.replace(b"Recipient: one@x.example\n", b""),
    "no vhost": lambda content: content.replace(b"Vhost: www.a.example\n", b""),
    "two vhosts": lambda content: with_line(content, "Vhost: www.a.example"),
    "two senders": lambda content: with_line(with_line(content, "Sender: a@a.example"), "Sender: b@a.example"),
    "layout twice": lambda content: with_line(content, "Layout: 2"),
    "layout not first": lambda content: content.replace(
        b"Layout: 2\nVhost: www.a.example\n", b"Vhost: www.a.example\nLayout: 2\n"
    ),
    "layout odd": lambda content: content.replace(b"Layout: 2\n", b"Layout: one\n"),
    "layout without space": lambda content: content.replace(b"Layout: 2\n", b"Layout:1\n"),
    "layout with space": lambda content: content.replace(b"Layout: 2\n", b"Layout: 1 \n"),
    "layout -1": lambda content: content.replace(b"Layout: 2\n", b"Layout: -1\n"),
    "layout +1": lambda content: content.replace(b"Layout: 2\n", b"Layout: +1\n"),
    "layout 1_1": lambda content: content.replace(b"Layout: 2\n", b"Layout: 1_1\n"),
    "layout in other digits": lambda content: content.replace(b"Layout: 2\n", "Layout: ١\n".encode()),
    "unknown key": lambda content: with_line(content, "Priority: high"),
    "no key": lambda content: with_line(content, "nonsense"),
    "control character": lambda content: with_line(content, "Script: a\x1bb"),
    "carriage return": lambda content: with_line(content, "Script: a\rb"),
    "not UTF-8": lambda content: content.replace(b"\n\n", b"\nScript: \xff\n\n", 1),
    "Queue-Id": lambda content: with_line(content, "Queue-Id: 0660E2E85F2C029E9"),
    "Source": lambda content: with_line(content, f"Source: {NAME.format(number=1)},S=480"),
    "Owner": lambda content: with_line(content, "Owner: 33"),
    "Picked-Up": lambda content: with_line(content, "Picked-Up: 2026-11-22T19:36:07.011099Z"),
    "Held": lambda content: with_line(content, "Held: 2026-11-22T19:36:07.011099Z"),
    "Reason": lambda content: with_line(content, "Reason: none"),
    "Failed": lambda content: with_line(content, "Failed: one@x.example 550 no"),
}


def test_corrupt_files_are_put_aside(host: Host) -> None:
    """Each file that is no message goes to corrupt/ as it is, is counted and logged, and nothing of it is sent."""
    content = genuine(host)
    files = {name: change(content) for name, change in ENVELOPES.items()}
    assert len(set(files.values())) == len(files) and content not in files.values()
    for number, file in enumerate(files.values()):
        put(host, file, number)
    with host.running():
        host.wait_until_idle()
        host.wait(lambda: len(list((host.spool / "corrupt").iterdir())) == len(files), "all are put aside")
        assert sorted(path.read_bytes() for path in (host.spool / "corrupt").iterdir()) == sorted(files.values())
        assert all(name.startswith("corrupt/") for name in host.ls())
        assert host.json("status")["corrupt"] == len(files)
        assert (host.mail(), host.held()) == ([], [])
        still_flows(host)
        assert host.subjects() == [f"good {VHOST}", "good www.b.example"]
    # Nor is any of it looked at again.
    with host.running():
        still_flows(host)
        assert len([name for name in host.ls() if name.startswith("corrupt/")]) == len(files)


def test_corrupt_is_told_from_genuine(host: Host) -> None:
    """The same file without a change is a message, so it is the change that makes it none."""
    put(host, genuine(host))
    with host.running():
        host.wait_for_mail(1)
        host.wait_until_idle()
        assert (host.subjects(), host.ls()) == (["genuine"], [])


def test_corrupt_is_a_layout_that_never_was(host: Host) -> None:
    """Layouts are counted from 1: a file of layout 0 is no message."""
    put(host, genuine(host).replace(b"Layout: 2\n", b"Layout: 0\n"))
    with host.running():
        host.wait_until_idle()
        assert (host.mail(), host.json("status")["corrupt"]) == ([], 1)


def junk(path: Path) -> None:
    path.write_bytes(b"junk")


def link_to_file(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def link_to_nothing(path: Path) -> None:
    path.symlink_to("/nonexistent/file")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [junk, os.mkfifo, link_to_file, link_to_nothing, link_to_itself, os.mkdir])
@pytest.mark.parametrize("name", ["junk", f"{NAME.format(number=1)},S=4"], ids=["odd-name", "good-name"])
def test_corrupt_things_that_are_no_message(host: Host, make: Callable[[Path], None], name: str) -> None:
    """A FIFO, a link, a directory, a file of another name: put aside as they are; nobody waits for them or follows them."""
    with host.running():
        make(new(host) / name)
        still_flows(host)
        host.wait(lambda: not os.path.lexists(new(host) / name), "it is put aside", timeout=45)
        (aside,) = (host.spool / "corrupt").iterdir()
        assert host.json("status")["corrupt"] == 1
        assert aside.lstat().st_mode & 0o170000 == made(host, make)
        assert host.subjects() == [f"good {VHOST}", "good www.b.example"]


def made(host: Host, make: Callable[[Path], None]) -> int:
    """The kind of file that this makes."""
    path = host.directory / "made"
    make(path)
    return path.lstat().st_mode & 0o170000


def test_corrupt_directory_with_something_in_it(host: Host) -> None:
    """A directory that is not empty, links to directories and a hard link stop nothing, and lose nothing outside."""
    outside = host.directory / "outside"
    outside.mkdir()
    (outside / "file").write_text("kept")
    directory = new(host) / f"{NAME.format(number=1)},S=4096"
    (directory / "deep").mkdir(parents=True)
    (directory / "deep" / "file").write_text("x")
    (new(host) / "link").symlink_to(outside)
    os.link(outside / "file", new(host) / f"{NAME.format(number=2)},S=4")
    with host.running():
        still_flows(host)
        assert host.subjects() == [f"good {VHOST}", "good www.b.example"]
    with host.running():
        still_flows(host)
    assert (outside / "file").read_text() == "kept"
    assert host.held() == []


def test_corrupt_names_of_people(host: Host) -> None:
    """Names that are long, not UTF-8 or full of control characters are put aside and logged in plain lines."""
    names = [b"x" * 255, b"\xff\xfe", b"a\nb", b"\x1b[31m", "\u202e".encode(), b"name with spaces", b"-rf", b"0660E2E85F2C029E9"]
    for name in names:
        Path(os.fsdecode(os.fsencode(new(host)) + b"/" + name)).write_bytes(b"junk")
    with host.running():
        still_flows(host)
        host.wait(lambda: host.json("status")["corrupt"] == len(names), "all are put aside", timeout=45)
        assert list(new(host).iterdir()) == []
    assert not {"\x1b", "\u202e"} & set(host.log())


def test_corrupt_is_not_what_is_newer_than_us(host: Host) -> None:
    """A file of a newer layout stays where it is and is said to be there; the mail behind it flows."""
    newer = genuine(host).replace(b"Layout: 2\n", b"Layout: 3\nFuture: key\n")
    name = put(host, newer)
    with host.running():
        still_flows(host)
        host.wait_for_log(name)
        host.wait(lambda: host.ls() == [f"vhosts/{VHOST}/new/{name}"], "the others are out")
    with host.running():
        still_flows(host)
    assert host.ls() == [f"vhosts/{VHOST}/new/{name}"]
    assert (new(host) / name).read_bytes() == newer
    assert host.json("status")["corrupt"] == 0


def test_corrupt_is_not_yet_what_may_still_come(host: Host) -> None:
    """A file that is shorter than its name says, and a dot file, stay; the mail behind them flows."""
    content = genuine(host)
    short = new(host) / f"{NAME.format(number=1)},S={len(content)}"
    short.write_bytes(content[:-20])
    dot = new(host) / ".being-written"
    dot.write_bytes(b"x")
    with host.running():
        still_flows(host)
        host.wait(lambda: len(host.ls()) == 2, "the others are out")
        assert (short.exists(), dot.exists()) == (True, True)
        # When the rest has come, it is a message.
        short.write_bytes(content)
        host.send(VHOST, message=text("one@x.example", subject="bell"))
        host.wait(lambda: "genuine" in host.subjects(), "it is sent", timeout=45)
        host.wait(lambda: len(host.ls()) == 1, "it is out")
    assert (dot.exists(), host.json("status")["corrupt"]) == (True, 0)


@pytest.mark.parametrize("line", ["Vhost: www.b.example", "Vhost: www.nobody.example"])
def test_corrupt_or_held_is_what_claims_another_vhost(host: Host, line: str) -> None:
    """A file that claims a vhost other than its directory's is never sent: claim against stamp."""
    put(host, genuine(host).replace(b"Vhost: www.a.example", line.encode()))
    with host.running():
        still_flows(host)
        host.wait(lambda: not list(new(host).iterdir()), "it has left new/")
        assert host.subjects() == [f"good {VHOST}", "good www.b.example"]
        assert len(host.ls()) == 1
        assert host.ls()[0].startswith(("corrupt/", "hold/"))


def test_corrupt_message_is_made_canonical(host: Host) -> None:
    """What did not come from our enqueue is stripped of forged fields and tagged again before it is sent."""
    envelope, _, _ = genuine(host).partition(b"\n\n")
    message = (
        b"x-domain: forged.example\r\nX-Complaints-To : forged@x.example\n"
        b"Bcc: hidden@x.example\rX-DOMAIN:\n forged.example\nSubject: own\n\nbody\r"
    )
    put(host, envelope + b"\n\n" + message)
    with host.running():
        host.wait_until_idle()
        sent = host.mail()
        if sent:
            header, _, body = sent[0].read_bytes().partition(b"\n\n")
            assert header.startswith(b"X-Domain: www.a.example\nX-Complaints-To: ")
            assert header.lower().count(b"x-domain") == header.lower().count(b"x-complaints-to") == 1
            assert body == b"body\n"
            assert b"forged" not in header and b"hidden" not in header
        else:
            assert host.json("status")["corrupt"] == 1
