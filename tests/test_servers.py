"""The servers that the other tests stand on do what those tests take for granted."""

from __future__ import annotations

import smtplib
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from servers import HANG_UP, HOST, LIBRARIES, POSTFIX, YES, Postfix, Recorder, Sink, Wire, free_port, wait_until

pytestmark = pytest.mark.server

SENDER = "sender@from.test"
RECIPIENTS = ["one@to.test", "two@to.test"]


def client(port: int) -> smtplib.SMTP:
    return smtplib.SMTP(HOST, port, local_hostname="client.test", timeout=10)


def send(port: int, data: bytes, sender: str = SENDER, recipients: Sequence[str] = RECIPIENTS) -> None:
    with client(port) as smtp:
        smtp.sendmail(sender, recipients, data)


def send_untouched(port: int, data: bytes) -> None:
    """Sends the data as they are behind DATA; smtplib's own sendmail() corrects line ends and adds dots."""
    with client(port) as smtp:
        smtp.ehlo()
        smtp.mail(SENDER, ["BODY=8BITMIME"])
        smtp.rcpt(RECIPIENTS[0])
        smtp.docmd("DATA")
        smtp.send(data)
        assert smtp.getreply()[0] == 250


def answers(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except ConnectionRefusedError:
        return False
    return True


def processes_with(text: Path) -> list[str]:
    found = subprocess.run(["pgrep", "--full", "--list-full", str(text)], capture_output=True, text=True, check=False)
    return found.stdout.splitlines()


def test_free_port() -> None:
    """Ports differ, and are none that the kernel gives to clients."""
    ports = [free_port() for _ in range(50)]
    lowest_of_clients = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert len(set(ports)) == 50
    assert all(1024 < port < lowest_of_clients for port in ports)


def test_sink_keeps_envelope_and_message() -> None:
    """Messages stand in the order of arrival, without the dots that SMTP adds, and with LF line ends."""
    with Sink() as sink:
        assert sink.messages() == []
        send(sink.port, b"Subject: one\r\n\r\n.dot\r\n..dots\r\n\xff\0\r\n")
        send(sink.port, b"X-Rcpt-Args: <no@to.test>\r\n\r\n\r\n", sender="", recipients=['"a> b"@to.test'])
        first, second = sink.wait(2)
    assert (first.sender, first.recipients) == (SENDER, RECIPIENTS)
    assert first.data == b"Subject: one\n\n.dot\n..dots\n\xff\0\n"
    assert (second.sender, second.recipients) == ("", ['"a> b"@to.test'])
    assert second.data == b"X-Rcpt-Args: <no@to.test>\n\n\n"


def test_sink_forgets_a_torn_message() -> None:
    """A connection that breaks before the final dot leaves nothing."""
    with Sink() as sink:
        smtp = client(sink.port)
        smtp.helo()
        smtp.mail(SENDER)
        smtp.rcpt(RECIPIENTS[0])
        smtp.docmd("DATA")
        smtp.send(b"Subject: torn\r\n")
        smtp.close()
        send(sink.port, b"Subject: whole\r\n")
        assert [message.data for message in sink.wait(1)] == [b"Subject: whole\n"]


def test_sink_shows_no_part_of_a_message() -> None:
    """A message that is looked at while the sink writes it is not yet there."""
    seen = set()
    with Sink() as sink:
        # Postfix's load generator sends 20 messages of one size.
        command = [str(POSTFIX / "usr/sbin/smtp-source"), "-l", "500000", "-m", "20", f"{HOST}:{sink.port}"]
        with subprocess.Popen(command, env={"LD_LIBRARY_PATH": str(LIBRARIES)}) as source:
            while source.poll() is None:
                seen |= {len(message.data) for message in sink.messages()}
        assert source.returncode == 0
        assert len(sink.messages()) == 20
        assert seen == {len(sink.messages()[0].data)}


def test_sink_start_uses_up_no_session() -> None:
    """With -n 1 the one session is the test's. (smtp-sink counts sessions only when told to show the count.)"""
    with Sink(["-c", "-n", "1"]) as sink:
        send(sink.port, b"Subject: only\r\n")
        wait_until(lambda: not answers(sink.port), 5, "the sink ends")
        assert len(sink.messages()) == 1


def test_sink_starts_again_with_other_options() -> None:
    """The port and the messages stay over a restart."""
    with Sink() as sink:
        send(sink.port, b"Subject: one\r\n")
        sink.stop()
        assert not answers(sink.port)
        sink.options = ["-f", "MAIL"]
        sink.start()
        with pytest.raises(smtplib.SMTPSenderRefused):
            send(sink.port, b"Subject: two\r\n")
        sink.stop()
        sink.options = []
        sink.start()
        send(sink.port, b"Subject: three\r\n")
        assert [message.data for message in sink.wait(2)] == [b"Subject: one\n", b"Subject: three\n"]


def test_wire_shows_line_ends() -> None:
    """What the sink's own record has lost is seen on the wire."""
    sent = b"Subject: one\r\n\r\n..dot\r\nbare\nlf, bare\rcr\n.\r\n\xff\0\r\n"
    with Sink() as sink, Wire(sink.port) as wire:
        send_untouched(wire.port, sent + b".\r\n")
        send_untouched(wire.port, b".\r\n")
        first, second = wire.messages()
        assert first.data == b"Subject: one\r\n\r\n.dot\r\nbare\nlf, bare\rcr\n.\r\n\xff\0\r\n"
        assert (first.sender, first.recipients) == (SENDER, RECIPIENTS[:1])
        assert first.mail_options == "BODY=8BITMIME"
        assert first.reply == "250 2.0.0 Ok"
        assert second.data == b""
        assert sink.messages()[0].data == b"Subject: one\n\n.dot\nbare\nlf, barecr\n.\n\xff\0\n"
        connection = wire.connections[0]
        assert bytes(connection.client).startswith(b"ehlo client.test\r\nmail FROM:<sender@from.test> BODY=8BITMIME\r\n")
        assert sent in bytes(connection.client)
        assert bytes(connection.server).startswith(b"220 smtp-sink ESMTP\r\n250-smtp-sink\r\n")


def test_wire_before_nothing() -> None:
    """When the server behind it does not run, the connection ends without a greeting."""
    with Wire(free_port()) as wire:
        with pytest.raises(smtplib.SMTPServerDisconnected):
            client(wire.port)
        assert wire.connections == []


def test_wire_stops_and_starts() -> None:
    """stop() ends open connections too; the port and the record stay."""
    with Sink() as sink, Wire(sink.port) as wire:
        send(wire.port, b"Subject: one\r\n")
        smtp = client(wire.port)
        wire.stop()
        with pytest.raises(smtplib.SMTPServerDisconnected):
            smtp.noop()
        smtp.close()
        assert not answers(wire.port)
        wire.start()
        send(wire.port, b"Subject: two\r\n")
        assert [message.data for message in wire.messages()] == [b"Subject: one\r\n", b"Subject: two\r\n"]


def test_postfix_delivers_to_the_relay() -> None:
    """Envelope and body arrive as they were sent; Postfix adds its Received and nothing else to a full header."""
    body = b"a\r\n.dot\r\n\xc3\xa4" + b"x" * 900 + b"\r\n\r\n"
    header = b"From: <a@from.test>\r\nDate: Mon, 1 Jan 2024 00:00:00 +0000\r\nMessage-ID: <1@from.test>\r\n\r\n"
    with Sink() as sink, Wire(sink.port) as wire, Postfix(wire.port) as postfix:
        send(postfix.port, header + body)
        (message,) = wire.wait(1)
        assert (message.sender, message.recipients) == (SENDER, RECIPIENTS)
        received, _, rest = message.data.partition(b"From: ")
        assert b"From: " + rest == header + body
        assert received.startswith(b"Received: from client.test (unknown [127.0.0.1])\r\n\tby mta.test (Postfix)")
        assert sink.wait(1)[0].data == message.data.replace(b"\r\n", b"\n")
        wait_until(lambda: postfix.log().count("status=sent (250 2.0.0 Ok)") == 2, 5, "both recipients are logged")


def test_postfix_keeps_port_and_queue_over_a_restart() -> None:
    """What Postfix has taken is delivered after it and the relay have been away."""
    retry_soon = {"minimal_backoff_time": "1s", "maximal_backoff_time": "1s", "queue_run_delay": "1s"}
    with Sink() as sink, Postfix(sink.port, parameters=retry_soon) as postfix:
        sink.stop()
        send(postfix.port, b"Subject: one\r\n")
        wait_until(lambda: "status=deferred" in postfix.log(), 5, "the mail is deferred")
        postfix.stop()
        assert not answers(postfix.port)
        assert processes_with(postfix.directory) == []
        postfix.start()
        sink.start()
        send(postfix.port, b"Subject: two\r\n")
        assert sorted(b"one" in message.data for message in sink.wait(2)) == [False, True]


def test_postfix_refuses_what_is_too_large() -> None:
    """The size limit is the given one, and other parameters hold too."""
    with (
        Sink() as sink,
        Postfix(sink.port, message_size_limit=2000, parameters={"myhostname": "other.test"}) as postfix,
    ):
        with pytest.raises(smtplib.SMTPSenderRefused) as refusal:
            send(postfix.port, b"x" * 3000)
        assert refusal.value.smtp_code == 552
        with client(postfix.port) as smtp:
            assert smtp.ehlo()[1].startswith(b"other.test\n")


def test_postfix_that_cannot_start_says_why() -> None:
    """The error carries what Postfix has logged, and nothing is left."""
    postfix = Postfix(free_port(), parameters={"mail_owner": "root"})
    with pytest.raises(RuntimeError) as failure, postfix:
        pass
    assert "mail_owner" in failure.value.__notes__[0]
    assert not postfix.directory.exists()


def test_nothing_is_left_after_close() -> None:
    """close() ends the servers and removes their files, also when the test in between fails."""
    with pytest.raises(ZeroDivisionError), Sink() as sink, Postfix(sink.port) as postfix:
        send(postfix.port, b"Subject: one\r\n")
        sink.wait(1)
        raise ZeroDivisionError
    for server in (sink, postfix):
        assert not answers(server.port)
        assert not server.directory.exists()
        assert processes_with(server.directory) == []


@pytest.mark.parametrize("end", ["raise SystemExit", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_postfix_ends_with_the_test_run(end: str) -> None:
    """Postfix does not outlive tests that forget it, nor tests that are killed."""
    script = (
        "import os, signal, sys; from servers import Postfix\n"
        f"postfix = Postfix(25); postfix.start(); print(postfix.port, postfix.directory, flush=True); {end}"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    port, directory = run.stdout.split()
    wait_until(lambda: not Path(directory).exists(), 5, "the files are removed")
    assert not answers(int(port))
    assert processes_with(Path(directory)) == []


# What the client meets when the sink refuses, and how many messages the sink then shows.
REFUSALS = [
    (["-r", "RCPT"], smtplib.SMTPRecipientsRefused, "450", 0),
    (["-f", "RCPT"], smtplib.SMTPRecipientsRefused, "500", 0),
    (["-f", "MAIL"], smtplib.SMTPSenderRefused, "500", 0),
    (["-r", "DATA"], smtplib.SMTPDataError, "450", 0),
    (["-B", "554 5.7.1 No", "-f", "."], smtplib.SMTPDataError, "554", 1),
    (["-r", "."], smtplib.SMTPDataError, "450", 1),
    (["-Q", "."], smtplib.SMTPDataError, "421", 1),
    (["-q", "."], smtplib.SMTPServerDisconnected, "", 1),
    (["-q", "MAIL"], smtplib.SMTPServerDisconnected, "", 0),
    (["-q", "CONNECT"], smtplib.SMTPServerDisconnected, "", 0),
    (["-r", "CONNECT"], smtplib.SMTPConnectError, "450", 0),
]


@pytest.mark.parametrize(("options", "error", "code", "shown"), REFUSALS)
def test_sink_refuses(options: list[str], error: type[Exception], code: str, shown: int) -> None:
    """The sink refuses as its options say; a message whose final dot it refuses, it shows all the same."""
    with Sink(options) as sink, Wire(sink.port) as wire:
        with pytest.raises(error) as refusal:
            send(wire.port, b"Subject: one\r\n")
        assert code in str(refusal.value)
        assert len(sink.messages()) == shown
        assert [message.reply[:3] for message in wire.messages()] == [code] * shown


def test_recorder_keeps_what_it_has_answered() -> None:
    """Also a message whose final dot it does not answer; not one that it refuses, nor a MAIL that it hangs up on."""
    plan: dict[bytes, bytes | None] = {}
    recorder = Recorder(lambda verb, address: b"550 no" if address.startswith("two@") else plan.get(verb, YES), free_port())
    for verb, answer in ((b".", YES), (b".", HANG_UP), (b".", b"451 later"), (b"MAIL", HANG_UP), (b"MAIL", b"421 bye")):
        plan = {verb: answer}
        try:
            send(recorder.port, b".Subject: one\r\n")
        except smtplib.SMTPException:
            pass
        # The same port again.
        recorder.close()
        assert not answers(recorder.port)
        recorder.start()
    recorder.close()
    first, second, third = recorder.transactions
    assert (first.sender, first.recipients, first.data) == (SENDER, RECIPIENTS[:1], b".Subject: one\r\n")
    assert 0 < first.began <= first.taken <= second.began <= second.taken <= third.began
    assert [(bool(each.taken), each.replied) for each in recorder.transactions] == [(True, True), (True, False), (False, False)]
