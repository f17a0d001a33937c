"""calling.md, Message: each row of the table, from the command to the wire; the MTA is smtp-sink behind a recorder."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import page
import pytest
from host import ENQUEUE, Host, smtp
from servers import Message, Postfix, Sink, Wire

pytestmark = pytest.mark.server

VHOST = "www.a.example"
TAG = '[tag]\ncomplaints_to = "abuse@host.example"\n'
NAME = "1795376167.{number:06}.P3395.2bad27e5dbb62169d779a57a"


@pytest.fixture
def site(wire: Wire) -> Iterator[Host]:
    with Host(mta=smtp(wire.port), extra=TAG) as host:
        host.add(VHOST)
        with host.running():
            yield host


def written(site: Host, message: bytes, number: int = 0) -> None:
    """A file that a customer writes into new/ himself: one recipient, and no command of ours has seen it."""
    content = f"Layout: 2\nVhost: {VHOST}\nSender: user@a.example\nRecipient: one@x.example\n\n".encode() + message
    new = site.spool / "vhosts" / VHOST / "new"
    name = f"{NAME.format(number=number)},S={len(content)}"
    (new.parent / "tmp" / name).write_bytes(content)
    os.rename(new.parent / "tmp" / name, new / name)
    site.enqueue(VHOST, "-i", "rings@x.example", message=b"Subject: rings the bell\n\n")


def on_wire(wire: Wire, count: int) -> list[Message]:
    """So many messages, without those that only ring the bell; no line end but CRLF."""
    messages = [each for each in wire.wait(count, timeout=30) if each.recipients != ["rings@x.example"]]
    for connection in wire.connections:
        assert re.search(rb"(?<!\r)\n|\r(?!\n)", bytes(connection.client)) is None
    return messages


def header(message: Message) -> list[str]:
    """The fields, unfolded."""
    text = message.data.partition(b"\r\n\r\n")[0].decode("utf-8", "surrogateescape")
    return re.sub(r"\r\n(?=[ \t])", "", text).split("\r\n")


def fields(message: Message, name: str) -> list[str]:
    """The values of all fields of that name, however it is spelled."""
    found = (re.fullmatch(rf"{name}[ \t]*:(.*)", line, re.IGNORECASE | re.DOTALL) for line in header(message))
    return [match[1].strip() for match in found if match]


def body(message: Message) -> bytes:
    return message.data.partition(b"\r\n\r\n")[2]


def sent(site: Host, wire: Wire, message: bytes, *words: str) -> Message:
    """What the MTA gets of a message that enqueue accepts."""
    site.send(VHOST, *words, message=message)
    *_, found = on_wire(wire, len(wire.messages()) + 1)
    return found


def refused(site: Host, message: bytes, *words: str) -> bytes:
    """What enqueue says of a message that it refuses with 65."""
    run = site.enqueue(VHOST, *words, message=message)
    assert run.returncode == 65 and run.stderr.count(b"\n") == 1, run
    assert not any(name.startswith("vhosts/") for name in site.ls())
    return run.stderr


@pytest.mark.parametrize("words", [["-t"], ["-t", "two@x.example", "three@x.example"], ["two@x.example", "three@x.example"]])
def test_message_blind_copies(site: Host, wire: Wire, words: list[str]) -> None:
    """Blind copies are sent to, and nobody else sees them, also where the recipients are arguments, as nodemailer does."""
    blind = b"Bcc: two@x.example\nbCC :\n\tthree@x.example\nBcc\t: two@x.example\nBcc:\n"
    found = sent(site, wire, b"Subject: s\n" + blind + b"Resent-Date: now\nX-Last: 1\n\nBcc: text\n", *words)
    assert sorted(found.recipients) == ["three@x.example", "two@x.example"]
    assert fields(found, "bcc") == [] and fields(found, "x-last") == ["1"]
    assert b"two@" not in found.data and b"three@" not in found.data
    assert body(found) == b"Bcc: text\r\n"


def test_message_return_path(site: Host, wire: Wire) -> None:
    """A Return-Path that the script writes is neither the sender nor passed on."""
    found = sent(
        site, wire, b"Return-Path: <boss@x.example>\nreturn-path : <b@x.example>\nTo: one@x.example\n\n", "-fs@a.example"
    )
    assert (found.sender, fields(found, "return-path")) == ("s@a.example", [])


def test_message_resent(site: Host, wire: Wire) -> None:
    """Resent- recipients are the only ones, and a blind one is not passed on; Resent-From alone changes nothing."""
    fields_of_both = b"To: one@x.example\nBcc: two@x.example\nResent-From: me@a.example\n"
    site.send(VHOST, message=fields_of_both + b"Resent-To: three@x.example\nResent-Bcc: four@x.example\n\n")
    site.send(VHOST, message=fields_of_both + b"\n")
    first, second = on_wire(wire, 2)
    assert sorted(first.recipients) == ["four@x.example", "three@x.example"]
    assert fields(first, "resent-bcc") == [] and fields(first, "resent-to") == ["three@x.example"]
    assert sorted(second.recipients) == ["one@x.example", "two@x.example"]


def test_message_missing_fields(wire: Wire) -> None:
    """From, Date and Message-ID are added once where they are missing or empty; the id is the same at every attempt."""
    with Sink() as sink:
        sink.stop()
        sink.options = ["-r", "RCPT"]
        sink.start()
        wire.target_port = sink.port
        with Host(mta=smtp(wire.port), extra=TAG) as site:
            site.add(VHOST)
            with site.running():
                site.send(VHOST, "user@a.example", "-t", "-F", 'Jane "J" Doe', message=b"To: one@x.example\nDate:\n\nbody\n")
                site.wait_for_row("deferred")
                (copy,) = (site.spool / "active").iterdir()
                stored = copy.read_bytes()
                sink.stop()
                sink.options = []
                sink.start()
                (found,) = on_wire(wire, 1)
    (message_id,) = fields(found, "message-id")
    assert f"\nMessage-ID: {message_id}\n".encode() in stored
    assert fields(found, "from") == ['"Jane \\"J\\" Doe" <user@a.example>']
    (date,) = fields(found, "date")
    assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d [+]0000", date)


def test_message_mbox_line(site: Host, wire: Wire) -> None:
    """The line that a mailbox file has in front of a message is left out, quoted or not; inside the header it ends that."""
    site.send(VHOST, message=b"From me Mon\n>>From you Tue\r\nTo: one@x.example\nSubject: s\n\nFrom here\n")
    site.send(VHOST, message=b"To: one@x.example\nFrom me Mon\nBcc: two@x.example\n\ntext\n")
    first, second = on_wire(wire, 2)
    assert b"From me" not in first.data and b"From you" not in first.data
    assert fields(first, "subject") == ["s"] and body(first) == b"From here\r\n"
    assert second.recipients == ["one@x.example"]
    assert body(second) == b"From me Mon\r\nBcc: two@x.example\r\n\r\ntext\r\n"


def test_message_line_ends(site: Host, wire: Wire) -> None:
    """However lines end, and however it is mixed, they are the same lines on the wire."""
    lines = [b"To: one@x.example", b"Cc: two@x.example", b"Subject: s", b"", b"first", b"", b" second", b".", b"", b"last"]
    ends = (b"\n", b"\r\n", b"\r\r\n", b"\r\r\r\n")
    mixes = [[end] for end in ends] + [list(ends), [b"\n", b"\r\n"], [b"\r\r\n", b"\n"]]
    for mix in mixes:
        site.send(VHOST, message=b"".join(line + end for line, end in zip(lines, itertools.cycle(mix), strict=False)))
    # In a text, a lone CR is a line end, too.
    site.send(VHOST, message=b"\n".join(lines[:4]) + b"\n" + b"\r".join(lines[4:]))
    for found in on_wire(wire, len(mixes) + 1):
        assert sorted(found.recipients) == ["one@x.example", "two@x.example"]
        assert body(found) == b"\r\n".join(lines[4:]) + b"\r\n"


FORGERIES = {
    "case": b"x-dOMAIN: forged.example\nTo: one@x.example\n\ntext\n",
    "fold": b"To: one@x.example\nX-Domain:\n forged.example\n\tforged.example\n\ntext\n",
    "space before colon": b"X-Domain \t : forged.example\nTo: one@x.example\n\ntext\n",
    "repeat": b"X-Domain: forged.example\n" * 3 + b"To: one@x.example\nX-Domain: forged.example\n\ntext\n",
    "lone CR": b"To: one@x.example\nX-One: 1\rX-Domain: forged.example\r\n\ntext\n",
    "second header block": b"To: one@x.example\n\nX-Domain: text\nTo: two@x.example\n\ntext\n",
    "leading white space": b" forged.example\nX-Domain: forged.example\nTo: one@x.example\n\ntext\n",
    "our tag copied": b"X-Domain: www.a.example\nX-Complaints-To: abuse@host.example\nX-Domain: forged.example\n"
    b"X-Complaints-To: forged.example\nTo: one@x.example\n\ntext\n",
}


@pytest.mark.parametrize("by", ["enqueue", "the customer himself"])
@pytest.mark.parametrize("forgery", FORGERIES)
def test_message_forged_tags(site: Host, wire: Wire, forgery: str, by: str) -> None:
    """One X-Domain on the wire, ours, at the top; the same where a customer writes the file into new/ himself."""
    if by == "enqueue":
        site.send(VHOST, "-i", "one@x.example", message=FORGERIES[forgery])
        (found,) = on_wire(wire, 1)
    else:
        written(site, FORGERIES[forgery])
        (found,) = on_wire(wire, 2)
    assert found.recipients == ["one@x.example"]
    assert header(found)[:2] == [f"X-Domain: {VHOST}", "X-Complaints-To: abuse@host.example"]
    assert (fields(found, "x-domain"), fields(found, "x-complaints-to")) == ([VHOST], ["abuse@host.example"])
    if forgery != "leading white space":
        assert b"forged" not in found.data


@pytest.mark.parametrize("line", ["X-Domain: forged.example", "Queue-Id: 0660E2E85F2C029E9", "Verified: yes", "Layout: 2"])
def test_message_forged_tags_in_the_envelope(site: Host, wire: Wire, line: str) -> None:
    """A line that enqueue does not write makes a file in new/ no message: nothing of it is sent."""
    content = f"Layout: 2\nVhost: {VHOST}\nRecipient: one@x.example\n{line}\n\nTo: one@x.example\n\n".encode()
    (site.spool / "vhosts" / VHOST / "new" / f"{NAME.format(number=0)},S={len(content)}").write_bytes(content)
    site.send(VHOST, message=b"To: two@x.example\n\n")
    (found,) = on_wire(wire, 1)
    assert found.recipients == ["two@x.example"] and fields(found, "x-domain") == [VHOST]
    site.wait(lambda: site.json("status")["corrupt"] == 1, "it is set aside")


@pytest.mark.parametrize("space", [b" ", b"\t", b" \t "])
def test_message_leading_space(site: Host, wire: Wire, space: bytes) -> None:
    """A message that begins with white space has no header: all of it is the text, and our last field is as it should be."""
    site.send(VHOST, "-i", "one@x.example", message=space + b"evil\nTo: two@x.example\n\ntext\n")
    written(site, space + b"evil\nTo: two@x.example\n\ntext\n")
    # Of all three the recorder has seen, on_wire() leaves out the bell's.
    for found in on_wire(wire, 3):
        assert found.recipients == ["one@x.example"]
        assert "evil" not in "".join(header(found))
        assert body(found) == space + b"evil\r\nTo: two@x.example\r\n\r\ntext\r\n"
    assert b"no recipients" in refused(site, space + b"evil\nTo: two@x.example\n\ntext\n", "-t")


@pytest.mark.parametrize("line", [b"no field", b": x", b"X Y: z", "Gr\u00fc\u00dfe: x".encode(), b"X\x01: y", b"<html>"])
def test_message_line_that_is_no_field(site: Host, wire: Wire, line: bytes) -> None:
    """It and what follows is the text, for us and for every MTA, since there is an empty line in front of it."""
    found = sent(site, wire, b"To: one@x.example\n" + line + b"\nBcc: two@x.example\nX-Domain: text\n\ntext\n")
    assert found.recipients == ["one@x.example"] and fields(found, "x-domain") == [VHOST]
    assert body(found) == line + b"\r\nBcc: two@x.example\r\nX-Domain: text\r\n\r\ntext\r\n"


@pytest.mark.parametrize("by", ["enqueue", "the customer himself"])
def test_message_dots_and_commands(site: Host, wire: Wire, sink: Sink, by: str) -> None:
    """SMTP commands behind a lone dot, with whatever line ends around it, are text of the one mail."""
    ends = (b"\n", b"\r\n", b"\r", b"\r\r\n", b"\n\r", b"\r\n\r", b"\0\n")
    commands = [
        b"MAIL FROM:<x@y.example>",
        b"RCPT TO:<v@z.example>",
        b"DATA",
        b"Subject: smuggled",
        b"",
        b"smuggled",
        b".",
        b"QUIT",
    ]
    mixtures = list(itertools.product(ends, ends))
    for number, (before, after) in enumerate(mixtures):
        text = b"begin" + before + b"." + after + after.join(commands) + after
        message = b"To: one@x.example\nSubject: %d\n\n" % number + text
        if by == "enqueue":
            site.send(VHOST, message=message)
        else:
            written(site, message, number)
    count = len(mixtures) * (1 if by == "enqueue" else 2)
    for messages in (on_wire(wire, count), [m for m in sink.wait(count) if m.recipients != ["rings@x.example"]]):
        assert len(messages) == len(mixtures)
        assert {tuple(each.recipients) for each in messages} == {("one@x.example",)}
    site.wait_until_idle()
    assert len(wire.messages()) == len(sink.messages()) == count
    for found in on_wire(wire, count):
        assert [line.strip(b"\0") for line in body(found).split(b"\r\n") if line.strip(b"\0")] == [
            b"begin",
            b".",
            *filter(None, commands),
        ]


@pytest.mark.parametrize("offered", [True, False])
def test_message_eight_bits(offered: bool) -> None:
    """UTF-8 and Latin-1 in header and body arrive byte for byte, announced only where the MTA offers that."""
    text = "Grüße".encode() + b" Gr\xfc\xdfe\n"
    with (
        Sink(options=[] if offered else ["-8"]) as sink,
        Wire(sink.port) as wire,
        Host(mta=smtp(wire.port), extra=TAG) as site,
    ):
        site.add(VHOST)
        with site.running():
            site.send(VHOST, message=b"To: one@x.example\nSubject: " + text + b"\n" + text)
            (found,) = on_wire(wire, 1)
    assert body(found) == text.replace(b"\n", b"\r\n")
    assert b"Subject: " + text.strip() + b"\r\n" in found.data
    assert ("BODY=8BITMIME" in found.mail_options) == offered


def test_message_long_line(site: Host, wire: Wire) -> None:
    """A line of ten million bytes, and a header line of 2,000, arrive as they are."""
    line = b"abcdefghij" * 1_000_000
    found = sent(site, wire, b"To: one@x.example\nX-Long: " + line[:2000] + b"\n\n" + line)
    assert body(found) == line + b"\r\n" and fields(found, "x-long") == [line[:2000].decode()]


def test_message_nul(site: Host, wire: Wire) -> None:
    """A NUL in the body is passed on; one in the header could end it for one reader and not for another."""
    found = sent(site, wire, b"To: one@x.example\n\na\0b\n\0\n")
    assert body(found) == b"a\0b\r\n\0\r\n"
    for place in (b"To: one@x.example\0, two@x.example\n\n", b"To: one@x.example\nX: \0\n\n", b"X\0: y\nTo: one@x.example\n\n"):
        assert b"NUL" in refused(site, place) or b"no recipients" in refused(site, place)


@pytest.mark.parametrize("message", [b"To: one@x.example", b"To: one@x.example\n", b"To: one@x.example\n\n"])
def test_message_without_body(site: Host, wire: Wire, message: bytes) -> None:
    """A header alone is a message."""
    found = sent(site, wire, message)
    assert fields(found, "to") == ["one@x.example"] and body(found) == b""


def test_message_empty(site: Host) -> None:
    """No byte at all is no message, also with recipients as arguments."""
    assert b"empty" in refused(site, b"")
    assert b"empty" in refused(site, b"", "-i", "one@x.example")


def test_message_too_large(site: Host) -> None:
    """enqueue reads no further than the limit: who writes for ever is refused at once, and nothing is left of it."""
    site.configure(extra='max_message_size = "1M"\n' + TAG)
    policy = site.spool / "vhosts" / VHOST / "policy"
    site.wait(lambda: b"Max-Size: 1048576" in policy.read_bytes(), "the limit is known")
    command = [ENQUEUE, "--spool", site.spool, VHOST, "-i", "one@x.example"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin and process.stderr
        with pytest.raises(BrokenPipeError):
            for _ in range(10_000):
                process.stdin.write(b"x" * 999 + b"\n")
        # close() would write what is left.
        process.stdin.raw.close()
        assert process.wait(30) == 69
        assert b"1048576" in process.stderr.read()
        process.stdin = None
    assert list((policy.parent / "tmp").iterdir()) == [] == list((policy.parent / "new").iterdir())


def test_message_endless_header(site: Host, wire: Wire) -> None:
    """A header that does not end within a MiB, or 20,000 lines, is refused, not cut."""
    assert b"header is longer than" in refused(site, b"X-Field: " + b"12345678" * 140_000 + b"\n\n", "-i", "one@x.example")
    for line in (b"a:\n", b"To: one@x.example\n", b"X: y\n z\n"):
        assert b"more than 20000 lines" in refused(site, line * 20_001 + b"\ntext\n", "-i", "one@x.example")
    # The longest that is taken goes out.
    found = sent(site, wire, b"a:\n" * 19_999 + b"To: one@x.example\n\ntext\n")
    assert len(header(found)) == 20_005


def test_message_endless_header_of_a_customer_himself(site: Host, wire: Wire) -> None:
    """Written into new/, such a file is no message: it costs no more time than others."""
    written(site, b"a:\n" * 600_000 + b"\n")
    assert on_wire(wire, 1) == []
    site.wait(lambda: site.json("status")["corrupt"] == 1, "it is set aside")


def test_message_long_field(site: Host, wire: Wire) -> None:
    """A field of which an MTA would drop a part waits for a person; one that names recipients is refused."""
    site.send(VHOST, "-i", "one@x.example", message=b"X-Long: " + b"long \n " * 15_000 + b"\n\ntext\n")
    (held,) = site.wait(lambda: site.json("hold", "list"), "it is held")
    assert "header field" in held["reason"] and wire.messages() == []
    assert b"longer than 102400" in refused(site, b"To: one@x.example,\n " + b"          \n " * 10_000 + b"two@x.example\n\n")
    found = sent(site, wire, b"X-Long: " + b"long \n " * 14_000 + b"end\nTo: one@x.example\n\ntext\n")
    assert fields(found, "x-long")[0].endswith("end")


@pytest.mark.parametrize("offered", [True, False])
@pytest.mark.parametrize(("sender", "recipient"), [("user@a.example", "jörg@x.example"), ("jörg@a.example", "one@x.example")])
def test_message_international_address(sink: Sink, offered: bool, sender: str, recipient: str) -> None:
    """An address that is not ASCII is handed to an MTA that offers SMTPUTF8; another fails for good, and is kept."""
    parameters = {"smtputf8_enable": "yes" if offered else "no"}
    with (
        Postfix(sink.port, parameters=parameters) as postfix,
        Wire(postfix.port) as wire,
        Host(mta=smtp(wire.port), extra=TAG) as site,
    ):
        site.add(VHOST)
        with site.running():
            site.send(VHOST, "-f", sender, recipient, message=b"Subject: s\n\n")
            site.send(VHOST, "-f", "user@a.example", "two@x.example", message=b"Subject: s\n\n")
            site.wait_until_idle()
            outcomes = {row["recipient"]: row for row in site.rows()}
            assert outcomes["two@x.example"]["event"] == "released"
            assert outcomes[recipient]["event"] == ("released" if offered else "failed")
            assert offered or "SMTPUTF8" in outcomes[recipient]["reason"]
    assert ["SMTPUTF8" in found.mail_options for found in wire.messages()] == ([True, False] if offered else [False])


def test_message_hops(postfix: Postfix) -> None:
    """What the MTA takes for a loop is refused by it in the session, and lies in failed/ with its words."""
    with Host(mta=smtp(postfix.port), extra=TAG) as site:
        site.add(VHOST)
        with site.running():
            site.send(VHOST, message=b"Received: from a by b; now\n" * 60 + b"To: one@x.example\n\n")
            site.wait_for_row("failed")
            assert "too many hops" in site.rows("failed")[0]["reason"]
            assert [name.partition("/")[0] for name in site.ls()] == ["failed"]


def test_message_cut_short(site: Host, wire: Wire, tmp_path: Path) -> None:
    """Where the caller is killed in the middle, what came is sent: to the command it is the end of its input."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    text = "printf 'Subject: s\\n\\n'; head -c 2000000 /dev/zero | tr '\\0' x"
    script = f"{ENQUEUE} --spool {site.spool} {VHOST} -i one@x.example < {fifo} & exec 3> {fifo}; ({text}) >&3; sleep 60"
    with subprocess.Popen(["bash", "-c", script], start_new_session=True) as caller:
        site.wait(lambda: list((site.spool / "vhosts" / VHOST / "tmp").iterdir()), "it is being written")
        caller.send_signal(signal.SIGKILL)
    (found,) = on_wire(wire, 1)
    # Less than was written may have come by then.
    assert re.fullmatch(rb"x{1000000,2000000}\r\n", body(found))


def test_every_row_of_the_page_has_its_test() -> None:
    """Page and module name the same tests."""
    documented = {row[2] for row in page.table(page.text("calling.md"), "message")}
    implemented = {name for name in globals() if name.startswith("test_message_")} - {
        "test_message_forged_tags_in_the_envelope", "test_message_endless_header_of_a_customer_himself"
    }  # fmt: skip
    assert documented == implemented
