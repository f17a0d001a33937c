"""The envelope: what is written is what is read, and what the page does not allow is no envelope."""

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from releaser import envelope
from releaser.envelope import Envelope, NewerLayout, NoLayout

PROPERTY = settings(max_examples=200, derandomize=False, print_blob=True, deadline=None)

LEAST = "Layout: 1\nVhost: a.example\nRecipient: r@x.y"


def text_of(written: bytes) -> bytes:
    """The envelope of a file, as a reader takes it: up to the first empty line."""
    text, mark, rest = written.partition(b"\n\n")
    assert mark and not rest
    return text


# What may stand in an envelope.
VALUE = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=30)
LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
HOST = st.lists(LABEL, min_size=1, max_size=3).map(".".join)
ATOM = st.text("abcXYZ019!#$%&'*+/=?^_`{|}~-jöü☃", min_size=1, max_size=8)
QUOTED = st.text('ab ,;:<>()@[].!%"\\', max_size=8).map(lambda t: '"' + t.replace("\\", "\\\\").replace('"', '\\"') + '"')
LOCAL = st.one_of(st.lists(ATOM, min_size=1, max_size=3).map(".".join), QUOTED)
DOMAIN = st.one_of(HOST, st.sampled_from(["[192.0.2.1]", "[IPv6:2001:db8::1]", "xn--bcher-kva.example", "_x.example"]))
ADDRESS = st.one_of(st.builds("{}@{}".format, LOCAL, DOMAIN), LOCAL)
OPTIONAL = st.one_of(st.just(""), VALUE)
CLAIMS = {name: OPTIONAL for name in ("arrived", "uid", "cwd", "program", "script", "script_filename", "message_id")}
STAMPS = {name: OPTIONAL for name in ("queue_id", "source", "owner", "picked_up", "held", "reason")}
SUBMITTED = {
    "vhost": HOST,
    "recipients": st.lists(ADDRESS, min_size=1, max_size=5).map(tuple),
    "sender": st.one_of(st.none(), st.just(""), ADDRESS),
    "notify": st.sampled_from(["", "never", "failure", "delay", "failure,delay"]),
    **CLAIMS,
}


@PROPERTY
@given(st.builds(Envelope, **SUBMITTED, **STAMPS, failed=st.lists(VALUE, max_size=3).map(tuple)))
def test_round_trip(written: Envelope) -> None:
    """Every envelope is read as it was written, the releaser's lines included."""
    assert envelope.parse(text_of(written.format()), verified=True) == written


@PROPERTY
@given(st.builds(Envelope, **SUBMITTED))
def test_round_trip_of_what_is_submitted(written: Envelope) -> None:
    """What enqueue may write is read from new/ too, where none of the releaser's lines is allowed."""
    assert envelope.parse(text_of(written.format()), verified=False) == written


@PROPERTY
@given(
    st.builds(Envelope, **(SUBMITTED | {name: st.text(st.characters(exclude_categories=["Cs"]), max_size=20) for name in CLAIMS}))
)
def test_no_value_ends_its_line(written: Envelope) -> None:
    """No value, whatever is in it, starts a line of its own or ends the envelope."""
    read = envelope.parse(text_of(written.format()), verified=True)
    assert (read.vhost, read.recipients, read.sender, read.queue_id) == (written.vhost, written.recipients, written.sender, "")
    assert len(read.cwd) == len(written.cwd)


@PROPERTY
@given(st.one_of(st.binary(max_size=80), st.binary(max_size=40).map(lambda data: LEAST.encode() + b"\n" + data)), st.booleans())
def test_any_bytes(text: bytes, verified: bool) -> None:
    """Any bytes are an envelope, no layout, or a newer one; nothing else is raised."""
    try:
        assert isinstance(envelope.parse(text, verified), Envelope)
    except (NoLayout, NewerLayout):
        pass


def test_least_envelope() -> None:
    """Layout, vhost and one recipient are enough; without a Sender line none was given, with an empty one it is null."""
    assert envelope.parse(LEAST.encode(), verified=False) == Envelope(vhost="a.example", recipients=("r@x.y",))
    assert envelope.parse(f"{LEAST}\nSender: ".encode(), verified=False).sender == ""


BAD = [
    "", "\n", "Vhost: a.example\nLayout: 1\nRecipient: r@x.y", "Vhost: a.example\nRecipient: r@x.y", "\n" + LEAST,
    "From r@x.y\n" + LEAST,
    # A line is missing.
    "Layout: 1", "Layout: 1\nVhost: a.example", "Layout: 1\nRecipient: r@x.y",
    # A bad vhost.
    "Layout: 1\nVhost: \nRecipient: r@x.y", "Layout: 1\nVhost: A.example\nRecipient: r@x.y",
    "Layout: 1\nVhost: ../a\nRecipient: r@x.y",
    "Layout: 1\nVhost: a.example.\nRecipient: r@x.y", "Layout: 1\nVhost: a_b\nRecipient: r@x.y",
    # A line too many, an unknown one, one that is none.
    LEAST + "\nLayout: 1", LEAST + "\nVhost: a.example", LEAST + "\nSender: s@x.y\nSender: s@x.y", LEAST + "\nUid: 1\nUid: 1",
    LEAST + "\nSubject: s", LEAST + "\nuid: 1", LEAST + "\n Uid: 1", LEAST + "\nUid:1", LEAST + "\nUid", LEAST + "\n",
    LEAST + "\n\nUid: 1", LEAST + "\nUid : 1", LEAST + "\nRecipients: r@x.y",
    # A bad address.
    LEAST + "\nRecipient: ", LEAST + "\nRecipient: a b@x.y", LEAST + "\nRecipient: <a@x.y>", LEAST + "\nSender: a b@x.y",
    LEAST + "\nSender: <>", LEAST + "\nRecipient: a@x.y>SIZE=1", LEAST + "\nRecipient: a@x.y, b@x.y",
    # Control characters.
    LEAST + "\nCwd: /a\tb", LEAST + "\nCwd: /a\0b", LEAST + "\nCwd: /a\x1b[31m", LEAST + "\nCwd: /a\rb", LEAST + "\nCwd: /a\x7fb",
    LEAST + "\nCwd: /a\u0085b", LEAST + "\nCwd: /a\u009b31m", LEAST + "\r\nUid: 1", LEAST + "\r",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_bad_envelope(text: str) -> None:
    """What is no envelope of this page is no layout, in the maildrop and in our own directories."""
    for verified in (False, True):
        with pytest.raises(NoLayout):
            envelope.parse(text.encode(), verified)


VERSIONS = [
    "Layout", "Layout:", "Layout: ", "Layout: x", "Layout: -1", "Layout: 0", "Layout: 1.0", "Layout:1", "Layout:  1",
    " Layout: 1",
    "layout: 1", "Layout: ١", "Layout: ²", "Layout: 1 ", "Layout: 0x1", "Layout : 1",
]  # fmt: skip


@pytest.mark.parametrize("line", VERSIONS)
def test_bad_version(line: str) -> None:
    """A first line that is not `Layout: ` and a number from 1 on is no layout."""
    with pytest.raises(NoLayout):
        envelope.parse(LEAST.replace("Layout: 1", line).encode(), verified=False)


def test_no_utf8() -> None:
    """Bytes that are no UTF-8 are no envelope."""
    with pytest.raises(NoLayout):
        envelope.parse(LEAST.encode() + b"\nCwd: /\xff", verified=False)


@pytest.mark.parametrize("line", ["Queue-Id", "Source", "Owner", "Picked-Up", "Held", "Reason", "Failed"])
def test_releasers_lines(line: str) -> None:
    """A line that only the releaser writes makes a file in new/ no message."""
    text = f"{LEAST}\n{line}: value".encode()
    with pytest.raises(NoLayout):
        envelope.parse(text, verified=False)
    assert "value" in repr(envelope.parse(text, verified=True))


def test_lines_that_may_repeat() -> None:
    """Recipient and Failed may stand there often, in order."""
    read = envelope.parse(f"{LEAST}\nRecipient: s@x.y\nFailed: r@x.y 550\nFailed: s@x.y 551".encode(), verified=True)
    assert read.recipients == ("r@x.y", "s@x.y") and read.failed == ("r@x.y 550", "s@x.y 551")


@pytest.mark.parametrize(
    "rest", ["", "\nVhost: a.example\nRecipient: r@x.y", "\nNew-Line: of that layout", "\nno line of this one"]
)
@pytest.mark.parametrize("version", ["3", "10", "999"])
def test_newer_layout(version: str, rest: str) -> None:
    """A newer layout is told apart by its first line, whatever follows: it is not corrupt."""
    for verified in (False, True):
        with pytest.raises(NewerLayout):
            envelope.parse(f"Layout: {version}{rest}".encode(), verified)


LONGEST = "a" * 64 + "@" + ("b" * 60 + ".") * 4 + "c" * 11

GOOD_ADDRESSES = [
    # Some providers have given out such names; every MTA takes them.
    "a..b@x.y", ".a@x.y", "a.@x.y",
    "a@x.y", "a.b.c@x.y", "A@X.Y", "!#$%&'*+-/=?^_`{|}~@x.y", "1@1", "-a@x.y", "a-@x.y", "a@x", "a@x-y.z",
    "a@xn--bcher-kva.example",
    "a@_dmarc.x.y", '"a b"@x.y', '""@x.y', '"a\\"b"@x.y', '"a\\\\"@x.y', '"a@b"@x.y', '"<a>"@x.y', '"a,b;c:d"@x.y', '"a\\ b"@x.y',
    "a@[192.0.2.1]", "a@[IPv6:2001:db8::1]", "a@[IPv6:::1]", "jörg@x.y", "用户@x.y", '"j ö"@x.y', "root", "a.b", '"a b"',
    "a%b@x.y", "h!u@x.y", LONGEST, "ü" * 158 + "@x.y",
]  # fmt: skip

BAD_ADDRESSES = [
    "", " ", "@", "@x.y", "a@", "a@b@c", "a b@x.y", " a@x.y", "a@x.y ", "a@x y", "a@b c", "a @x.y", "a@ x.y", "<a@x.y>", "<>",
    "a@x.y>",
    "a>@x.y", "<a@x.y", "a@x.y> SIZE=1", "a@x.y\r\nDATA", "a\n@x.y", "a@x.y\n", "a\r@x.y", "a\0@x.y", "a@x\0.y", "a\t@x.y",
    "a\x7f@x.y",
    # Hidden, or turning the direction of what follows.
    "a\u200bb@x.y", "a\u202eb@x.y", '"a\u2028b"@x.y', '"\u2066a"@x.y', "a\ufeff@x.y", "a\u00a0b@x.y",
    '"a\nb"@x.y', '"a\rb"@x.y', '"a\0b"@x.y', '"a\tb"@x.y', '"a\\\nb"@x.y', '"a\x7f"@x.y', "a\x85b@x.y", '"a\x9bb"@x.y',
    "a@.x", "a@x.", "a@x..y", "a@-x.y", "a@x.y-", "a@x.-y", "a@x-.y",
    '"a@x.y', 'a"@x.y', '"a"b"@x.y', '"a\\"@x.y', '"a"b@x.y', 'a"b"@x.y', "a,b@x.y", "a;b@x.y", "a:b@x.y", "(c)a@x.y", "a(c)@x.y",
    "@r.z:a@x.y", "a\\b@x.y", "a]@x.y", "a@[192.0.2.1", "a@192.0.2.1]", "a@[]", "a@[x y]", "a@[x]y", "a@[[x]]", "a@x,y", "a@x/y",
    "a@x;y",
    "a@bücher.example", "a@x，y", "a@x＠y", LONGEST + "c", "a" * 321, "ü" * 161, "ü" * 158 + "@x.yz",
]  # fmt: skip


@pytest.mark.parametrize("address", GOOD_ADDRESSES)
def test_good_address(address: str) -> None:
    """Dot-atoms, quoted strings, UTF-8 local parts, IP literals and names without a domain may be handed over."""
    assert envelope.is_address(address)
    assert envelope.parse(f"{LEAST}\nRecipient: {address}".encode(), verified=False).recipients == ("r@x.y", address)


@pytest.mark.parametrize("address", BAD_ADDRESSES)
def test_bad_address(address: str) -> None:
    """Nothing else may: no space outside quotes, no control character, no angle bracket, no name that is no host name."""
    assert not envelope.is_address(address)


def test_long_addresses_are_refused_at_once() -> None:
    """However it goes on, what is longer than an address costs no more memory than itself."""
    text = "a@" + "a." * 1_000_000
    tracemalloc.start()
    assert not envelope.is_address(text) and not envelope.is_address('"' + text)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@PROPERTY
@given(st.text(max_size=30))
def test_no_address_leaves_its_command(text: str) -> None:
    """Whatever is an address can stand between < and > in one line of SMTP, and ends there."""
    if not envelope.is_address(text):
        return
    assert not any(character < " " or character == "\x7f" for character in text)
    unquoted = text if not text.startswith('"') else text[text.rindex('"') + 1 :]
    assert not set("<> ,;:()\\") & set(unquoted.partition("[")[0])


@PROPERTY
@given(st.one_of(st.text(max_size=20), st.text(st.characters(categories=["Cs", "Ll"]), max_size=5)))
def test_any_text_is_judged(text: str) -> None:
    """Any text is an address or is not; nothing is raised."""
    assert envelope.is_address(text) in (True, False)


ONE_MAILBOX = [
    ("a@x.y", True), ("a.b+c@x.y", True), ("a@localhost", True), ("a@[192.0.2.1]", True), ('"a b"@x.y', True), ("jörg@x.y", True),
    ("-a@x.y", True), ("a#b@x.y", True),
    # Aliases and includes of this host.
    ("root", False), ("all", False), ('"a b"', False), ('"a@b"', False), ('"a@b.example"', False), ("a.b", False), ("", False),
    # Routes.
    ("a%b@x.y", False), ("h!u@x.y", False), ("a%b%c@x.y", False), ('"a%b"@x.y', False), ('"h!u"@x.y', False), ("%@x.y", False),
    ("a%b", False), ("h!u", False),
    # Postfix looks inside the quotes where the domain is its own, and delivers to b@c.d, and to MAILER-DAEMON.
    ('"b@c.d"@x.y', False), ('"b\\@c.d"@x.y', False), ('"@r.z:b@c.d"@x.y', False), ('"@"@x.y', False), ('""@x.y', False),
    ('"\\""@x.y', True), ('" "@x.y', True),
]  # fmt: skip


@pytest.mark.parametrize(("address", "one"), ONE_MAILBOX)
def test_one_mailbox(address: str, one: bool) -> None:
    """An address is one mailbox where it has a domain, and in front of it something, but no `%`, `!` or `@`."""
    assert envelope.one_mailbox(address) is one
