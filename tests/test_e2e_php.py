"""PHP's mail() -> enqueue -> releaser -> Postfix by SMTP -> smtp-sink, and what is on the wire on the way."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest
from host import Host, smtp, subject
from servers import Postfix, Sink, Wire

pytestmark = pytest.mark.server

VHOST = "www.a.example"
SENDER = "user@a.example"
TAG = '[tag]\ncomplaints_to = "abuse@host.example"\n'

# The original's line, without any option, and the one that is documented now.
LINES = [[], ["-t", "-i"]]


@pytest.fixture
def relay(postfix: Postfix) -> Iterator[Wire]:
    """A recorder between the releaser and Postfix."""
    with Wire(postfix.port) as relay:
        yield relay


@pytest.fixture
def site(relay: Wire) -> Iterator[Host]:
    with Host(mta=smtp(relay.port), extra=TAG) as host:
        host.add(VHOST)
        with host.running():
            yield host


def header_lines(data: bytes) -> list[str]:
    """The header fields, unfolded."""
    header = data.replace(b"\r\n", b"\n").partition(b"\n\n")[0].decode("utf-8", "surrogateescape")
    return re.sub(r"\n(?=[ \t])", "", header).split("\n")


def values(data: bytes, name: str) -> list[str]:
    """The values of all fields of that name, however it is spelled."""
    found = (re.fullmatch(rf"{name}[ \t]*:(.*)", line, re.IGNORECASE | re.DOTALL) for line in header_lines(data))
    return [match[1].strip() for match in found if match]


def has_only_crlf(sent: bytes) -> bool:
    return re.search(rb"(?<!\r)\n|\r(?!\n)", sent) is None


def mailed(host: Host, code: str, words: list[str], *settings: str) -> None:
    """Runs a script, in whose `$ok` each mail() must have returned true."""
    run = host.php(f"$ok = true; {code} exit($ok ? 0 : 9);", host.sendmail_path(VHOST, SENDER, *words), *settings)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")


@pytest.mark.parametrize("words", LINES, ids=["original", "documented"])
def test_php_mail_is_tagged_once_with_our_values(site: Host, relay: Wire, sink: Sink, words: list[str]) -> None:
    """However a script spells our two fields, the mail has each once, first, with our value; nobody sees a Bcc."""
    code = r"""
    $headers = implode("\r\n", [
        "From: user@a.example",
        "X-Domain: forged.example",
        "x-domain: forged.example",
        "X-DOMAIN : forged.example",
        "X-Domain\t: forged.example",
        "X-Domain:\r\n forged.example",
        "X-One: 1\rX-Domain: forged.example",
        "X-Two: 2\rX-Complaints-To: forged@x.example\rX-Three: 3",
        "X-Complaints-To: forged@x.example",
        "X-COMPLAINTS-TO : forged@x.example",
        "x-complaints-to:\r\n\tforged@x.example",
        "Cc: two@x.example",
        "Bcc: three@x.example",
        "BCC :\r\n four@x.example",
        "X-Domain: forged.example",
    ]);
    $ok = mail("one@x.example", "Hello", "First line\nlast line\n", $headers);
    """
    mailed(site, code, words)
    on_wire = relay.wait(1)
    delivered = sink.wait(1)
    assert (len(on_wire), len(delivered)) == (1, 1)
    for message in (*on_wire, *delivered):
        assert message.sender == SENDER
        recipients = ["four@x.example", "one@x.example", "three@x.example", "two@x.example"]
        assert sorted(message.recipients) == recipients
        assert values(message.data, "X-Domain") == [VHOST]
        assert values(message.data, "X-Complaints-To") == ["abuse@host.example"]
        assert values(message.data, "Bcc") == []
        assert values(message.data, "To") == ["one@x.example"]
        assert values(message.data, "Subject") == ["Hello"]
        assert values(message.data, "Cc") == ["two@x.example"]
        assert values(message.data, "X-One") == ["1"]
        assert values(message.data, "X-Three") == ["3"]
        assert not re.search(rb"forged|three@|four@", message.data)
        assert re.search(rb"\r?\n\r?\nFirst line\r?\nlast line\r?\n", message.data)
    assert header_lines(on_wire[0].data)[:2] == [f"X-Domain: {VHOST}", "X-Complaints-To: abuse@host.example"]
    assert has_only_crlf(bytes(relay.connections[0].client))
    site.wait_until_idle()
    rows = site.rows()
    assert sorted(row["recipient"] for row in rows) == recipients
    assert {(row["event"], row["vhost"], row["sender"]) for row in rows} == {("released", VHOST, SENDER)}
    # Postfix's own queue id, so that its log can be searched for it.
    assert all(row["mta_queue_id"] for row in rows)


def test_php_mail_is_a_message_as_the_standard_wants_it(site: Host, relay: Wire) -> None:
    """A script that gives no From: gets all fields that a message needs, and PHP's own script header is kept."""
    mailed(site, '$ok = mail("one@x.example", "Hello", "Text");', ["-t", "-i"], "mail.add_x_header=On")
    (message,) = relay.wait(1)
    assert values(message.data, "From") == [SENDER]
    assert [len(values(message.data, name)) for name in ("Date", "Message-ID", "To", "Subject")] == [1, 1, 1, 1]
    assert re.fullmatch(r"<[^<>@\s]+@[^<>@\s]+>", values(message.data, "Message-ID")[0])
    assert values(message.data, "X-PHP-Originating-Script") == ["0:Command line code"]
    site.wait_until_idle()
    assert [row["script"] for row in site.rows()] == ["0:Command line code"]


def test_php_fifth_argument_sets_the_sender(site: Host, relay: Wire) -> None:
    """mail()'s fifth argument is understood as the sendmail option that it is."""
    mailed(site, '$ok = mail("one@x.example", "Hello", "Text", "", "-fbounce@a.example");', ["-t", "-i"])
    (message,) = relay.wait(1)
    assert (message.sender, message.recipients) == ("bounce@a.example", ["one@x.example"])


@pytest.mark.parametrize("words", LINES, ids=["original", "documented"])
def test_php_lone_dot_is_text(site: Host, relay: Wire, sink: Sink, words: list[str]) -> None:
    """All lines behind a lone dot arrive, and lines that begin with dots keep them."""
    body = r"first\n.\nbehind the dot\n..\n...three\n.one\n.\n.\nlast\n"
    mailed(site, f'$ok = mail("one@x.example", "Dots", "{body}", "From: user@a.example");', words)
    (message,) = relay.wait(1)
    # PHP itself adds a line end.
    assert message.data.partition(b"\r\n\r\n")[2] == body.replace("\\n", "\r\n").encode() + b"\r\n"
    (delivered,) = sink.wait(1)
    assert delivered.data.partition(b"\n\n")[2] == body.replace("\\n", "\n").encode() + b"\n"


@pytest.mark.parametrize("words", LINES, ids=["original", "documented"])
def test_php_body_cannot_start_another_transaction(site: Host, relay: Wire, sink: Sink, words: list[str]) -> None:
    """SMTP commands behind a lone dot are text, whatever mixture of line ends stands around the dot."""
    ends = ("\\n", "\\r\\n", "\\r", "\\r\\r\\n")
    mixtures = list(itertools.product(ends, repeat=2)) + [("\\n\\r", "\\n"), ("\\n", "\\n\\r"), ("\\r\\n", "\\r\\n\\r")]
    lines = ["MAIL FROM:<x@y.example>", "RCPT TO:<v@z.example>", "DATA", "Subject: smuggled", "", "smuggled", ".", "QUIT"]
    code = ""
    for number, (before, after) in enumerate(mixtures):
        for kind, end in enumerate(("\\n", "\\r\\n")):
            body = f"begin{before}.{after}" + end.join(lines) + end
            code += f'$ok = $ok && mail("one@x.example", "mixture {number} {kind}", "{body}");\n'
    mailed(site, code, words)
    count = 2 * len(mixtures)
    on_wire = relay.wait(count)
    delivered = sink.wait(count)
    site.wait_until_idle()
    for messages in (on_wire, delivered, sink.messages()):
        assert len({subject(message.data) for message in messages}) == len(messages) == count
        assert {(message.sender, *message.recipients) for message in messages} == {(SENDER, "one@x.example")}
    for message in on_wire:
        text = message.data.partition(b"\r\n\r\n")[2].decode().split("\r\n")
        assert [line for line in text if line] == ["begin", ".", *filter(None, lines)]
    assert all(has_only_crlf(bytes(connection.client)) for connection in relay.connections)


def test_php_line_that_is_no_field_ends_the_header(site: Host, relay: Wire, sink: Sink) -> None:
    """What stands behind a line that is no field is text for us and for the MTA alike: no recipient, and no tag."""
    code = r"""$ok = mail("one@x.example", "Hello", "Text",
        "X-Domain\r\n : forged.example\r\nX-Domain: forged.example\r\nBcc: two@x.example");"""
    mailed(site, code, ["-t", "-i"])
    for message in (*relay.wait(1), *sink.wait(1)):
        assert message.recipients == ["one@x.example"]
        assert values(message.data, "X-Domain") == [VHOST]
        assert values(message.data, "X-Complaints-To") == ["abuse@host.example"]
        assert b"Bcc: two@x.example" in message.data.replace(b"\r\n", b"\n").partition(b"\n\n")[2]


def test_php_header_with_blank_looking_line_adds_no_hidden_recipient(site: Host, relay: Wire) -> None:
    """Recipients are those of the header as it is sent: a Bcc: behind a line of white space is counted and removed."""
    mailed(site, r'$ok = mail("one@x.example", "Hello", "Text", "X-One: 1\r\n \r\nBcc: two@x.example");', ["-t", "-i"])
    (message,) = relay.wait(1)
    assert sorted(message.recipients) == ["one@x.example", "two@x.example"]
    assert b"two@x.example" not in message.data


def test_php_sees_a_refusal(site: Host, relay: Wire) -> None:
    """mail() returns false where enqueue refuses, and nothing is sent."""
    run = site.php('var_dump(mail("", "Hello", "Text"));', site.sendmail_path(VHOST, SENDER, "-t", "-i"))
    assert run.stdout == b"bool(false)\n"
    assert (site.ls(), relay.messages()) == ([], [])
