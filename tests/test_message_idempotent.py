"""Two programs read each message: what enqueue wrote comes out of the releaser unchanged."""

import itertools
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enqueue import failure
from enqueue import message as enqueued
from releaser import message as released

PROPERTY = settings(max_examples=200, derandomize=False, print_blob=True, deadline=None)

TAG = (("X-Domain", "www.v.example"), ("X-Complaints-To", "abuse@host.example"))
TAG_BYTES = [(name.encode(), value.encode()) for name, value in TAG]
MISSING = [(b"Date", b"Sun, 22 Nov 2026 19:36:07 +0000"), (b"From", b"u@v.example"), (b"Message-ID", b"<1@v.example>")]

LINES = [
    b"\r", b"\n", b"\r\n", b"\r\r\n", b"\n\n", b"To: a@x.y", b"Bcc: b@x.y", b"bcc :", b"X-Domain: evil", b"x-domain\t: evil",
    b"X-Complaints-To", b"From: f@x.y", b"Date:", b"Message-ID: <m>", b"message-id :", b"From me Mon", b">From me", b" ", b"\t",
    b" fold", b".", b":", b": x", b"x", b"x y: z", b"\0", b"\xff", b"Resent-To: r@x.y", b"Resent-Bcc:", b"Return-Path: <p>",
]  # fmt: skip
MESSAGES = st.one_of(st.lists(st.sampled_from(LINES), max_size=25).map(b"".join), st.binary(max_size=60))
PLACES = st.lists(st.integers(0, 500), max_size=20)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """DATA in pieces, none of them empty."""
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(ends)]


def reader(pieces: list[bytes]) -> Callable[[], bytes]:
    left = iter(pieces)
    return lambda: next(left, b"")


def enqueue(data: bytes) -> bytes:
    """What enqueue stores. Raises Failure."""
    mail = enqueued.Message(reader([data] if data else []))
    return b"".join(mail.chunks(TAG_BYTES, MISSING))


def release(pieces: list[bytes]) -> bytes:
    """What the releaser sends of a message in a file."""
    chunks = released.canonical(pieces)
    header = released.read_header(chunks)
    return header.tagged(TAG, "<other@v.example>") + b"".join(chunks)


@PROPERTY
@given(MESSAGES, PLACES)
def test_releaser_changes_nothing(data: bytes, places: list[int]) -> None:
    """Byte for byte, however the file is cut into reads, the releaser sends what enqueue stored."""
    try:
        stored = enqueue(data)
    except failure.Failure:
        return
    assert release(cut(stored, places)) == stored


@PROPERTY
@given(MESSAGES, PLACES)
def test_releasing_twice_is_releasing_once(data: bytes, places: list[int]) -> None:
    """Whatever somebody put into the maildrop, the releaser's own output comes out of it unchanged."""
    once = release(cut(data, places))
    assert release(cut(once, places)) == once


@PROPERTY
@given(MESSAGES, PLACES, PLACES)
def test_same_line_ends(data: bytes, places: list[int], other: list[int]) -> None:
    """Both programs make the same lines of the same bytes, and of their own output nothing new."""
    lines = b"".join(released.canonical(cut(data, places)))
    assert b"".join(enqueued.canonical(enqueued.ended(reader(cut(data, other))))) == lines
    assert b"".join(released.canonical(cut(lines, other))) == lines


@PROPERTY
@given(MESSAGES)
def test_same_header(data: bytes) -> None:
    """Both programs see the same fields, but for the mbox lines, which enqueue alone takes off."""
    data = b"Subject: s\n" + data
    try:
        fields = enqueued.Message(reader([data])).fields
    except failure.Failure:
        return
    header = released.read_header(released.canonical([data]))
    assert [(field.name, field.raw) for field in fields] == list(header.fields)


@PROPERTY
@given(MESSAGES)
def test_nothing_hidden_is_released(data: bytes) -> None:
    """Without enqueue, too: no CR, the tag once and in front, a Message-ID, no Bcc, no Return-Path."""
    head, _, _ = release([data]).partition(b"\n\n")
    assert b"\r" not in release([data])
    assert head.startswith(b"X-Domain: www.v.example\nX-Complaints-To: abuse@host.example\n")
    names = [line.partition(b":")[0].rstrip().lower() for line in head.split(b"\n") if line[:1] not in (b" ", b"\t")]
    assert names.count(b"x-domain") == names.count(b"x-complaints-to") == 1
    assert b"message-id" in names
    assert not {b"bcc", b"resent-bcc", b"return-path"} & set(names)


def test_message_id_is_kept() -> None:
    """A message has one Message-ID for ever: its own, or what it is given at the first pass."""
    assert release([b"Message-ID: <own@x.y>\n\nb\n"]).count(b"<own@x.y>") == 1
    assert b"other@v.example" not in release([b"message-id : <own@x.y>\n\nb\n"])
    assert release([b"To: a@x.y\n\nb\n"]).count(b"\nMessage-ID: <other@v.example>\n") == 1
    assert release([release([b"To: a@x.y\n\nb\n"])]).count(b"Message-ID") == 1


@pytest.mark.parametrize("less", [0, 1, 60, 100, 1000])
def test_longest_header_that_enqueue_takes(less: int) -> None:
    """A header that enqueue accepts is one that the releaser accepts, with the fields that enqueue has added."""
    data = b"X: " + b"x" * (enqueued.MAX_HEADER - 4 - less) + b"\n"
    assert len(data) == enqueued.MAX_HEADER - less
    try:
        stored = enqueue(data + b"\nbody\n")
    except failure.Failure:
        return
    assert release([stored]) == stored


def test_header_without_end() -> None:
    """A header above one of the limits is refused, a body is not."""
    for long in (b"X: " + b"1" * released.MAX_HEADER, b"X: 1\n" * (released.MAX_LINES + 1)):
        with pytest.raises(released.HeaderTooLong):
            release([long])
    assert enqueued.MAX_LINES + 100 < released.MAX_LINES
    body = b"X: 1\n" * (released.MAX_HEADER // 5 + 1)
    assert release([b"To: a@x.y\n\n" + body]).endswith(b"\n\n" + body)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("piece", [b" \n", b"X: 1\n", b" \r", b"Bcc:\n", b"\r", b"X:\n \n"])
def test_long_header_is_read_soon(piece: bytes) -> None:
    """The longest header, whatever its lines, keeps the daemon from other vhosts' mail for less than half a second."""
    for lines in ((released.MAX_HEADER - 100) // len(piece), released.MAX_LINES // 2 - 10):
        data = b"X: y\n" + piece * lines + b"\n\nb\n"
        started = time.process_time()
        try:
            release(cut(data, list(range(0, len(data), 1 << 18))))
        except released.HeaderTooLong:
            pass
        assert time.process_time() - started < 0.5


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "piece", [b"x", b"=?", b"=?a?q?x", b"=?utf-8?q?x?= ", b"=?utf-8?b?eHg=?=", b"=?utf-8?q?x?=", b"\xff", b"\n "]
)
def test_long_subject_is_decoded_soon(piece: bytes) -> None:
    """A Subject of 100,000 bytes is ready to be shown in less than 1 s of CPU, whatever it is made of."""
    header = released.read_header(iter([b"Subject: " + piece * (100_000 // max(len(piece), 5)) + b"\n\n"]))
    started = time.process_time()
    shown = header.text("subject")
    assert len(shown) <= released.MAX_SHOWN
    assert time.process_time() - started < 1


SHOWN = [
    (b"Subject: plain\n", "plain"),
    (b"SUBJECT :  plain \n", "plain"),
    (b"Subject: one\nSubject: two\n", "one"),
    (b"Subject: folded\n over\n\tlines\n", "folded over\tlines"),
    (b"Subject: =?utf-8?Q?J=C3=B6rg?= =?utf-8?B?w7w=?=\n", "Jörgü"),
    (b"Subject: =?iso-8859-1?q?J=F6rg?=\n", "Jörg"),
    ("Subject: Jörg\n".encode(), "Jörg"),
    (b"Subject: =?no-such-charset?q?a?=\n", "=?no-such-charset?q?a?="),
    (b"Subject: =?utf-8?q?=ff?=\n", "=?utf-8?q?=ff?="),
    (b"Subject: =?utf-8?b?a?=\n", "=?utf-8?b?a?="),
    (b"Subject: J\xf6rg\n", "J\ufffdrg"),
    (b"Subject: " + b"x" * 1000 + b"\n", "x" * 255),
    (b"Subject:\n", ""),
    (b"X: 1\n", ""),
]


@pytest.mark.parametrize(("field", "shown"), SHOWN)
def test_subject_as_it_is_shown(field: bytes, shown: str) -> None:
    """A header value is unfolded, decoded (RFC 2047) and cut; what cannot be decoded is shown as it stands."""
    assert released.read_header(iter([field + b"\n"])).text("subject") == shown


CHARSETS = [
    "utf-8",
    "utf-7",
    "utf-16",
    "iso-2022-jp",
    "idna",
    "punycode",
    "rot13",
    "hex",
    "zlib",
    "undefined",
    "x",
    "",
    "a*b",
    "big5",
]
CHARSETS += ["unicode_escape", "raw_unicode_escape", "unknown-8bit", "us-ascii", "mbcs", "utf-8*en", "\0"]
WORDS = st.builds(
    "=?{}?{}?{}?=".format,
    st.sampled_from(CHARSETS),
    st.sampled_from("qQbBx"),
    st.one_of(
        st.text("aA=?_ 0FfC3+/\\x\udcff", max_size=10), st.binary(max_size=8).map(lambda b: "".join(f"={n:02X}" for n in b))
    ),
)
VALUES = st.lists(st.one_of(WORDS.map(lambda w: w.encode("utf-8", "surrogateescape")), st.binary(max_size=6)), max_size=4)


@PROPERTY
@given(VALUES.map(b" ".join))
def test_any_value_can_be_shown(value: bytes) -> None:
    """Whatever a header holds, there is a text for people: nothing is raised, and the text can be stored as UTF-8."""
    assert isinstance(released.decoded(value).encode(), bytes)
