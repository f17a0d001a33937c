"""The releaser hands mail to smtp-sink: what is on the wire, what becomes of refusals, and what a person releases."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from host import Host, smtp, subject, text
from servers import EximServer, Message, Postfix, Sink, Wire

from releaser.mta import SESSIONS

pytestmark = pytest.mark.server

VHOST = "www.a.example"


@pytest.fixture
def site(wire: Wire) -> Iterator[Host]:
    """An installation whose MTA is the recorder in front of the sink."""
    with Host(mta=smtp(wire.port)) as host:
        host.add(VHOST, "www.b.example")
        with host.running():
            yield host


def on_wire(wire: Wire, count: int) -> list[Message]:
    """So many messages, and no byte that is not as SMTP wants it."""
    messages = wire.wait(count, timeout=30)
    for connection in wire.connections:
        assert re.search(rb"(?<!\r)\n|\r(?!\n)", bytes(connection.client)) is None
    assert len(messages) == count
    return messages


def test_smtp_release_of_held_mail(wire: Wire, sink: Sink) -> None:
    """What is released arrives once, byte for byte as it was shown: LF there, CRLF on the wire, 8-bit as it was."""
    with Host(mta=smtp(wire.port), default=["0/1h"]) as host:
        host.add(VHOST)
        with host.running():
            body = "Gr\u00fc\u00dfe\n.\n..two\n" + "long " * 300 + "\n\n\nlast"
            headers = "Bcc: two@x.example\nX-Folded: one\n two\n"
            host.send(VHOST, "user@a.example", message=text("one@x.example", subject="held", headers=headers, body=body))
            host.send(VHOST, "user@a.example", message=text("one@x.example", subject="other"))
            host.wait(lambda: len(host.held()) == 2, "both are held")
            assert (wire.messages(), sink.messages()) == ([], [])
            queue_id = host.held()[0]
            raw = host.cli("hold", "show", "--raw", queue_id, text=False).stdout
            host.cli("hold", "release", queue_id)
            (message,) = on_wire(wire, 1)
            assert message.data == raw.replace(b"\n", b"\r\n")
            assert (message.sender, sorted(message.recipients)) == ("user@a.example", ["one@x.example", "two@x.example"])
            assert raw.endswith(f"\n\n{body}\n".encode())
            host.wait_until_idle()
            assert host.cli("hold", "release", queue_id, check=False).returncode == 1
            host.wait_until_idle()
            (delivered,) = sink.messages()
            assert delivered.data == raw
            assert len(host.ls()) == 1


def test_smtp_large_message(site: Host, wire: Wire) -> None:
    """A message of 3 MB arrives byte for byte."""
    body = b"".join(b"%d %s\n" % (number, b".:x"[number % 3 : number % 3 + 1] * 60) for number in range(45_000))
    assert len(body) > 3_000_000
    site.send(VHOST, message=text("one@x.example", subject="large").removesuffix(b"body\n") + body)
    (message,) = on_wire(wire, 1)
    assert message.data.partition(b"\r\n\r\n")[2] == body.replace(b"\n", b"\r\n")
    site.wait_until_idle()
    assert [row["event"] for row in site.rows()] == ["released"]


def test_smtp_dots_at_every_place(site: Host, wire: Wire) -> None:
    """Dots at line starts are kept wherever they fall into the pieces in which a large message is read."""
    body = b".\n" * 700_000 + b"..\n" * 100_001 + b"x" * 1_000_000 + b"\n.\n"
    site.send(VHOST, message=text("one@x.example").removesuffix(b"body\n") + body)
    (message,) = on_wire(wire, 1)
    assert message.data.partition(b"\r\n\r\n")[2] == body.replace(b"\n", b"\r\n")


def test_smtp_eight_bit_message(site: Host, wire: Wire) -> None:
    """A body of bytes that are no ASCII arrives as it is, and is announced; an ASCII one needs no announcement."""
    body = bytes(byte for byte in range(1, 256) if byte not in b"\r\n") + b"\n\xff\xfe\n"
    site.send(VHOST, message=text("one@x.example", subject="bits").removesuffix(b"body\n") + body)
    site.send(VHOST, message=text("one@x.example", subject="ascii"))
    messages = {subject(message.data): message for message in on_wire(wire, 2)}
    assert messages["bits"].data.partition(b"\r\n\r\n")[2] == body.replace(b"\n", b"\r\n")
    assert "BODY=8BITMIME" in messages["bits"].mail_options


def test_smtp_long_lines_and_line_ends(site: Host, wire: Wire) -> None:
    """A line of a megabyte, and a message without a last line end, arrive whole."""
    body = b"y" * 1_100_000
    site.send(VHOST, message=text("one@x.example").removesuffix(b"body\n") + body)
    (message,) = on_wire(wire, 1)
    assert message.data.partition(b"\r\n\r\n")[2] == body + b"\r\n"


def test_smtp_many_recipients(site: Host, wire: Wire, sink: Sink) -> None:
    """250 recipients of one mail get it once each, a hundred at a time, and with the same Message-ID."""
    recipients = [f"user{number}@x{number % 7}.example" for number in range(250)]
    site.send(VHOST, message=text(*recipients[:100], headers=f"Bcc: {', '.join(recipients[100:])}\n"))
    messages = on_wire(wire, 3)
    assert sorted(len(message.recipients) for message in messages) == [50, 100, 100]
    delivered = sink.wait(3)
    assert Counter(each for message in delivered for each in message.recipients) == Counter(recipients)
    assert len({message.data for message in messages}) == 1
    site.wait_until_idle()
    assert Counter(row["recipient"] for row in site.rows("released")) == Counter(recipients)


def test_smtp_thousands_of_recipients(site: Host, wire: Wire, sink: Sink) -> None:
    """5,000 recipients of one mail, in the header and among the arguments, get it once each."""
    recipients = [f"user{number}@x{number % 7}.example" for number in range(5_000)]
    site.send(VHOST, "-t", "-i", "--", *recipients[2_500:], message=text(*recipients[:2_600]))
    wire.wait(50, timeout=30)
    site.wait_until_idle()
    delivered = sink.wait(50)
    assert Counter(each for message in delivered for each in message.recipients) == Counter(recipients)
    assert Counter(row["recipient"] for row in site.rows("released")) == Counter(recipients)


@pytest.mark.parametrize(
    "recipient",
    [
        *("root", "all", "a%b@x.example", "x.example!user@y.example", '"two@x.example"@y.example', '""@y.example'),
        *("root@", "two@x.example@y.example"),
    ],
)
def test_smtp_recipients_that_may_be_many_are_held(site: Host, wire: Wire, recipient: str) -> None:
    """An address that the MTA may expand into others is held, or refused at the door; the mail behind it flows."""
    run = site.enqueue(VHOST, "-t", message=text(recipient, subject="odd"))
    site.send(VHOST, message=text("one@x.example", subject="good"))
    (message,) = on_wire(wire, 1)
    assert subject(message.data) == "good"
    if recipient not in ("root@", "two@x.example@y.example"):
        assert run.returncode == 0
    if run.returncode == 0:
        (held,) = site.wait(lambda: site.json("hold", "list"), "it is held")
        assert (held["recipients"], held["subject"]) == ([recipient], "odd")
        assert recipient in held["reason"] or "recipient" in held["reason"] or "domain" in held["reason"]
        site.wait_until_idle()
        assert site.ls() == [f"hold/{held['queue_id']}"]
    else:
        assert run.returncode == 65
        site.wait_until_idle()
        assert site.ls() == []
    assert len(wire.messages()) == 1


def test_smtp_one_odd_recipient_holds_the_whole_mail(site: Host, wire: Wire) -> None:
    """A mail with one such recipient among others is held whole."""
    site.send(VHOST, message=text("one@x.example", "root", "two@x.example"))
    (held,) = site.wait(lambda: site.json("hold", "list"), "it is held")
    assert sorted(held["recipients"]) == ["one@x.example", "root", "two@x.example"]
    assert wire.messages() == []


def test_smtp_null_sender(site: Host, wire: Wire) -> None:
    """The null sender is handed over as that."""
    site.send(VHOST, "-f", "", "-t", message=text("one@x.example"))
    (message,) = on_wire(wire, 1)
    assert message.sender == ""


def test_smtp_addresses_are_handed_over_as_they_are(site: Host, wire: Wire) -> None:
    """Quoted local parts, a leading hyphen and long names reach the MTA unchanged."""
    recipients = ['"a b"@x.example', "-oX@x.example", "a+b=c@x.example", "o'hara@x.example", f"{'l' * 64}@x.example"]
    site.send(VHOST, "user@a.example", "-t", message=text(*recipients))
    (message,) = on_wire(wire, 1)
    assert sorted(message.recipients) == sorted(recipients)


@pytest.mark.parametrize("command", ["MAIL", "RCPT", "DATA", "."])
def test_smtp_refusal_for_good(command: str) -> None:
    """A message refused with 5xx, at whatever command, lies in failed/ with the MTA's words; it is not tried again."""
    with (
        Sink(options=["-f", command, "-B", "554 5.7.1 We do not want this"]) as sink,
        Wire(sink.port) as wire,
        Host(mta=smtp(wire.port)) as host,
    ):
        host.add(VHOST)
        with host.running():
            host.send(VHOST, "user@a.example", message=text("one@x.example", "two@x.example", subject="bad"))
            host.wait(lambda: len(host.rows("failed")) == 2, "it has failed")
            host.wait_until_idle()
            rows = host.rows("failed")
            assert sorted(row["recipient"] for row in rows) == ["one@x.example", "two@x.example"]
            assert all("554 5.7.1 We do not want this" in row["reason"] for row in rows)
            queue_id = rows[0]["queue_id"]
            assert host.ls() == [f"failed/{queue_id}"]
            content = (host.spool / "failed" / queue_id).read_text()
            failed = [line for line in content.partition("\n\n")[0].split("\n") if line.startswith("Failed: ")]
            assert len(failed) == 2
            assert all("554 5.7.1 We do not want this" in line for line in failed)
            assert {address for address in ("one@x.example", "two@x.example") if any(address in each for each in failed)} == {
                "one@x.example",
                "two@x.example",
            }
            assert host.json("status")["failed"] == 1
        tried = bytes(b"".join(bytes(each.client) for each in wire.connections)).count(b"MAIL FROM")
        # The next run, and a server that would take it now, change nothing.
        sink.stop()
        sink.options = []
        sink.start()
        with host.running():
            host.send(VHOST, message=text("one@x.example", subject="good"))
            host.wait_until_idle()
        assert [subject(message.data) for message in sink.messages() if subject(message.data) != "bad"] == ["good"]
        sent = b"".join(bytes(each.client) for each in wire.connections)
        assert sent.count(b"MAIL FROM") == tried + 1
        assert host.ls() == [f"failed/{queue_id}"]


def started(stack: ExitStack, options: list[list[str]], limits: list[str]) -> list[tuple[Sink, Host]]:
    """A sink for each of these options, and for each an installation with a running releaser; all end with the stack."""
    pairs = []
    for each in options:
        sink = stack.enter_context(Sink(options=each))
        host = stack.enter_context(Host(mta=smtp(sink.port), default=limits))
        host.add(VHOST)
        host.start()
        pairs.append((sink, host))
    return pairs


def test_smtp_refusal_for_now() -> None:
    """A message refused with 4xx, at whatever command, waits in active/, is logged, and goes out by itself later, once."""
    with ExitStack() as stack:
        reply = "451 4.3.2 Come back later"
        options = [["-r", command, "-b", reply] for command in ("MAIL", "RCPT", "DATA", ".")]
        pairs = started(stack, options, ["2/1h"])
        for _, host in pairs:
            host.send(VHOST, message=text("one@x.example", subject="later"))
        for sink, host in pairs:
            host.wait_for_row("deferred")
            (row,) = host.rows("deferred")
            assert reply in row["reason"]
            host.wait_for_ls(f"active/{row['queue_id']}")
            assert host.json("status")["active"] == 1
            sink.stop()
            sink.options = []
            # What has been refused at its final dot is among the messages of the sink too.
            (sink.directory / "mail" / "dump").unlink(missing_ok=True)
            sink.start()
        # One of the releasers is a new one by then; it knows what waits.
        pairs[0][1].kill()
        pairs[0][1].start()
        for sink, host in pairs:
            sink.wait(1, timeout=40)
            host.wait_until_idle()
            assert [subject(message.data) for message in sink.messages()] == ["later"]
            assert ([row["event"] for row in host.rows()][-1], host.ls()) == ("released", [])
            # Tried twice, counted once.
            assert [window["used"] for window in host.json("limits", "show", VHOST)["windows"]] == [1]
            assert host.stop() == 0


def test_smtp_message_that_is_too_large_for_the_mta(sink: Sink) -> None:
    """A message larger than the MTA takes fails alone, or is refused at the door; the mail behind it flows."""
    with Postfix(sink.port, message_size_limit=100_000) as postfix, Host(mta=smtp(postfix.port)) as host:
        host.add(VHOST)
        with host.running():
            for number in range(2):
                large = text("one@x.example", subject="large", body="0123456789\n" * 20_000)
                run = host.enqueue(VHOST, "-t", message=large)
                host.send(VHOST, message=text("one@x.example", subject=f"small {number}"))
                sink.wait(number + 1, timeout=30)
                assert run.returncode in (0, 69)
            host.wait_until_idle()
            assert [subject(message.data) for message in sink.messages()] == ["small 0", "small 1"]
            # The first one came before anybody could know.
            assert [row["subject"] for row in host.rows("failed")][:1] == ["large"]
            assert all(name.startswith("failed/") for name in host.ls())


def test_smtp_disconnect_before_the_final_dot() -> None:
    """A server that hangs up before it has the message, or says 421, gets it again when it is back; it arrives once."""
    with ExitStack() as stack:
        options = [["-q", "CONNECT"], ["-q", "EHLO"], ["-Q", "MAIL"], ["-q", "RCPT"], ["-Q", "DATA"], ["-q", "DATA"]]
        pairs = started(stack, options, ["unlimited"])
        for _, host in pairs:
            for number in range(3):
                host.send(VHOST, message=text("one@x.example", subject=f"mail {number}"))
        for sink, host in pairs:
            # It has tried, and says what came of it.
            host.wait_for_log("next_try")
            assert (len(host.ls()), host.rows("failed", "held")) == (3, [])
            sink.stop()
            sink.options = []
            sink.start()
        for sink, host in pairs:
            sink.wait(3, timeout=50)
            host.wait_until_idle()
            assert sorted(subject(message.data) for message in sink.messages()) == ["mail 0", "mail 1", "mail 2"]
            assert (host.ls(), host.stop()) == ([], 0)


def test_smtp_finishes_what_is_in_flight() -> None:
    """SIGTERM while the MTA is silent behind the final dot: the reply is waited for and logged; nothing is sent twice."""
    with Sink(options=["-W", ".:3"]) as sink, Host(mta=smtp(sink.port)) as host:
        host.add(VHOST)
        host.start()
        host.send(VHOST, message=text("one@x.example", subject="in flight"))
        # smtp-sink has the final dot, and has not answered.
        sink.wait(1)
        assert host.rows("released") == []
        assert host.stop() == 0
        assert [(row["event"], row["subject"]) for row in host.rows()] == [("released", "in flight")]
        assert host.ls() == []
        with host.running():
            host.send(VHOST, message=text("one@x.example", subject="next"))
            host.wait_until_idle()
        assert [subject(message.data) for message in sink.messages()] == ["in flight", "next"]
        assert host.rows("retried") == []


def test_smtp_takes_nothing_new_once_it_is_to_end() -> None:
    """What is not in flight at SIGTERM waits for the next run, in its order."""
    with Sink(options=["-W", ".:2"]) as sink, Host(mta=smtp(sink.port)) as host:
        host.add(VHOST)
        for number in range(20):
            host.send(VHOST, message=text("one@x.example", subject=f"mail {number:02}"))
        host.start()
        sink.wait(1)
        assert host.stop() == 0
        done = len(host.rows("released"))
        assert done == len(sink.messages()) == 20 - len(host.ls())
        assert 0 < done < 20
        sink.stop()
        sink.options = []
        sink.start()
        with host.running():
            host.wait_until_idle()
        assert [subject(message.data) for message in sink.messages()] == [f"mail {number:02}" for number in range(20)]


def test_smtp_second_signal_ends_at_once() -> None:
    """A second SIGTERM does not wait for a silent MTA; the message is sent again, and the log says so."""
    with Sink(options=["-W", ".:30"]) as sink, Host(mta=smtp(sink.port)) as host:
        host.add(VHOST)
        host.start()
        host.send(VHOST, message=text("one@x.example", subject="twice"))
        sink.wait(1)
        # Signals of one number that are pending at the same time are one.
        ended = time.monotonic() + 20
        while host.alive():
            assert time.monotonic() < ended
            host.signal(signal.SIGTERM)
            time.sleep(0.2)
        host.ended()
        sink.stop()
        sink.options = []
        sink.start()
        with host.running():
            host.wait_until_idle()
        first, second = sink.messages()
        assert first.data == second.data
        assert [row["queue_id"] for row in host.rows("retried")] == [row["queue_id"] for row in host.rows("released")]


def test_smtp_killed_behind_the_final_dot() -> None:
    """kill -9 between the final dot and its reply: sent again at the next start, same Message-ID, a row `retried`."""
    with Sink(options=["-W", ".:30"]) as sink, Host(mta=smtp(sink.port), default=["2/1h"]) as host:
        host.add(VHOST)
        host.start()
        host.send(VHOST, message=text("one@x.example", subject="twice"))
        sink.wait(1)
        host.kill()
        sink.stop()
        sink.options = []
        sink.start()
        with host.running():
            host.wait_until_idle()
            first, second = sink.messages()
            assert first.data == second.data
            (retried,) = host.rows("retried")
            assert [row["queue_id"] for row in host.rows("released")] == [retried["queue_id"]]
            assert host.ls() == []
            # Counted once.
            assert [window["used"] for window in host.json("limits", "show", VHOST)["windows"]] == [1]


def test_smtp_process_of_the_senders_is_killed() -> None:
    """kill -9 of the process that talks to the MTA: mail goes on in another, and what nobody knows of is sent again and told."""
    with Sink(options=["-W", ".:30"]) as sink, Host(mta=smtp(sink.port)) as host:
        host.add(VHOST)
        with host.running():
            host.send(VHOST, message=text("one@x.example", subject="twice"))
            sink.wait(1)
            (child,) = Path(f"/proc/{host.pid}/task/{host.pid}/children").read_text().split()
            os.kill(int(child), signal.SIGKILL)
            host.wait_for_row("deferred")
            sink.stop()
            sink.options = []
            sink.start()
            host.send(VHOST, message=text("one@x.example", subject="next"))
            sink.wait(3)
            host.wait_until_idle()
            assert sorted(subject(message.data) for message in sink.messages()) == ["next", "twice", "twice"]
            assert len(host.rows("retried")) == 1
            assert host.ls() == []


@pytest.mark.parametrize("option", ("smtp_banner = mail", "acl_smtp_data = accept message = thanks"))
def test_smtp_exim_is_given_no_more_than_it_sends_on_at_once(sink: Sink, option: str) -> None:
    """Exim leaves to its next queue run what comes in one connection behind the tenth message; also one that says little."""
    with EximServer(sink.port, option) as exim, Host(mta=smtp(exim.port)) as host:
        host.add(VHOST)
        for number in range(25):
            host.send(VHOST, message=text("one@x.example", subject=f"number {number}"))
        with host.running():
            assert len(sink.wait(25, 30)) == 25
            host.wait_until_idle()
        assert "no immediate delivery" not in exim.log()


def test_smtp_session_is_used_for_many(sink: Sink) -> None:
    with Wire(sink.port) as wire, Host(mta=smtp(wire.port)) as host:
        host.add(VHOST)
        for number in range(60):
            host.send(VHOST, message=text("one@x.example", subject=f"number {number}"))
        with host.running():
            sink.wait(60, 30)
            host.wait_until_idle()
        assert len([each for each in wire.connections if each.client]) <= SESSIONS


def test_smtp_frozen_server(sink: Sink) -> None:
    """A frozen server is waited for; mail goes on when it thaws, and nothing is sent twice."""
    with Host(mta=smtp(sink.port)) as host:
        host.add(VHOST)
        with host.running():
            host.send(VHOST, message=text("one@x.example", subject="before"))
            sink.wait(1)
            host.wait_until_idle()
            (process,) = sink._processes
            os.killpg(process.server.pid, signal.SIGSTOP)
            try:
                for number in range(3):
                    host.send(VHOST, message=text("one@x.example", subject=f"mail {number}"))
                time.sleep(1)
                assert len(host.ls()) == 3
                assert host.json("status")["queued"] == 3
            finally:
                os.killpg(process.server.pid, signal.SIGCONT)
            host.wait_until_idle()
            assert [subject(message.data) for message in sink.messages()] == ["before", "mail 0", "mail 1", "mail 2"]
            assert host.rows("retried") == []
