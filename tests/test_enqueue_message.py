"""enqueue's message: the header read once, as the MTA reads it; Bcc and forged tags taken out, ours put in."""

import itertools
import re
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enqueue import message
from enqueue.failure import DATAERR, Failure

PROPERTY = settings(max_examples=200, derandomize=False, print_blob=True, deadline=None)

TAG = [(b"X-Domain", b"www.v.example"), (b"X-Complaints-To", b"abuse@host.example")]
TAGGED = b"X-Domain: www.v.example\nX-Complaints-To: abuse@host.example\n"
MISSING = [(b"Date", b"D"), (b"From", b"F"), (b"Message-ID", b"<M>")]


def reader(pieces: list[bytes]) -> Callable[[], bytes]:
    """Reads as from a pipe: each piece once, then nothing for ever."""
    left = iter(pieces)
    return lambda: next(left, b"")


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """DATA in pieces, none of them empty."""
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(ends)]


def read(data: bytes) -> message.Message:
    return message.Message(reader([data] if data else []))


def stored(data: bytes, missing: list[tuple[bytes, bytes]] | None = None) -> bytes:
    return b"".join(read(data).chunks(TAG, missing or []))


def header(data: bytes) -> bytes:
    """What stands behind our tag and before the empty line in what is stored."""
    head, _, _ = stored(data).partition(b"\n\n")
    return (head + b"\n").removeprefix(TAGGED)


def body(data: bytes) -> bytes:
    return stored(data).partition(b"\n\n")[2]


def status(call: Callable[[], object]) -> int:
    with pytest.raises(Failure) as failure:
        call()
    return failure.value.status


# Line ends.

LINE_ENDS = [
    (b"a\nb\n", b"a\nb\n"),
    (b"a\r\nb\r\n", b"a\nb\n"),
    (b"a\rb\r", b"a\nb\n"),
    (b"a\r\r\nb\r\r\n", b"a\nb\n"),
    (b"a\r\r\r\nb", b"a\nb\n"),
    (b"a\nb", b"a\nb\n"),
    (b"a\r\nb\nc\rd\r\r\ne", b"a\nb\nc\nd\ne\n"),
    (b"a\r\rb\n", b"a\n\nb\n"),
    (b"a\n\rb\n", b"a\n\nb\n"),
    (b"\n", b"\n"),
    (b"\r\n", b"\n"),
    (b"\r", b"\n"),
    (b"\n\n", b"\n\n"),
    (b"\r\n\r\n", b"\n\n"),
    (b"a\r\n.\r\nb\r\n", b"a\n.\nb\n"),
    (b"a\0b\r\n", b"a\0b\n"),
    (b"a\x0b\x0c\x85\x1cb\n", b"a\x0b\x0c\x85\x1cb\n"),
    (b"", b""),
]


@pytest.mark.parametrize(("data", "expected"), LINE_ENDS)
def test_line_ends(data: bytes, expected: bytes) -> None:
    """CRLF, LF, CR CR LF and a lone CR each end one line; a missing last line end is added."""
    assert b"".join(message.canonical(message.ended(reader([data])))) == expected


def canonical(data: bytes) -> bytes:
    """The same rule, said another way: the CRs before a LF or the end belong to that line end, any other is one itself."""
    *lines, last = re.split(rb"\r*\n", data)
    if last:
        lines.append(last.rstrip(b"\r"))
    return b"".join(line.replace(b"\r", b"\n") + b"\n" for line in lines)


LINES = [
    b"\r", b"\n", b"\r\n", b"\r\r\n", b"To: a@x.y", b"Bcc: b@x.y", b"bcc :", b"X-Domain: evil", b"x-domain\t: evil",
    b"From: f@x.y",
    b"Date:", b"Message-ID: <m>", b"From me Mon", b">From me", b" ", b"\t", b" fold", b".", b"..", b":", b": x", b"x", b"\0",
    b"\xff",
    b"Resent-To: r@x.y", b"Return-Path: <p>", b"Subject: s", b"a,b@x.y;", b"\n\n", b"-",
]  # fmt: skip
MESSAGES = st.one_of(st.lists(st.sampled_from(LINES), max_size=20).map(b"".join), st.binary(max_size=40))
PLACES = st.lists(st.integers(0, 400), max_size=30)


@PROPERTY
@given(MESSAGES, PLACES)
def test_line_ends_of_anything(data: bytes, places: list[int]) -> None:
    """However the bytes come, every line ends with one LF, no CR is left, and no other byte is changed."""
    assert b"".join(message.canonical(message.ended(reader(cut(data, places))))) == canonical(data)


def everything(pieces: list[bytes]) -> object:
    """All that the message is, or the status that it is refused with."""
    try:
        found = message.Message(reader(pieces))
        fields = [(field.name, field.raw) for field in found.fields]
        try:
            recipients: object = found.recipients()
        except Failure as failure:
            recipients = failure.status
        return fields, recipients, b"".join(found.chunks(TAG, MISSING))
    except Failure as failure:
        return failure.status


@PROPERTY
@given(MESSAGES, PLACES)
def test_cuts_change_nothing(data: bytes, places: list[int]) -> None:
    """Fields, recipients and what is stored are the same however the input is cut into reads."""
    whole = everything([data] if data else [])
    assert everything(cut(data, places)) == whole
    assert everything([data[n : n + 1] for n in range(len(data))]) == whole


# A header that comes near to the limit, then a field whose name straddles it.
NEAR = b"X: " + b"x" * (message.MAX_HEADER - 23) + b"\n"


@pytest.mark.parametrize("end", range(message.MAX_HEADER - 21, message.MAX_HEADER + 30))
def test_cuts_change_nothing_at_the_limit(end: int) -> None:
    """Where the header comes near its longest, too, no read decides what is header and what is body."""
    data = NEAR + b"X-Long-Name-Of-A-Field: value\nBcc: b@x.y\n\nbody\n"
    assert everything([data[:end], data[end:]]) == everything([data])


# Where the header ends.

FIELDS = [
    (b"To: a@x.y\n\nbody\n", b"To: a@x.y\n", b"body\n"),
    # Without an empty line; it is written.
    (b"To: a@x.y\nbody\n", b"To: a@x.y\n", b"body\n"),
    (b"To: a@x.y\nbody, no: field\nb\n\nc\n", b"To: a@x.y\n", b"body, no: field\nb\n\nc\n"),
    (b"To: a@x.y", b"To: a@x.y\n", b""),
    (b"To: a@x.y\n", b"To: a@x.y\n", b""),
    (b"To: a@x.y\n\n", b"To: a@x.y\n", b""),
    (b"To: a@x.y\r\n\r\nbody", b"To: a@x.y\n", b"body\n"),
    (b"To: a@x.y\r\r", b"To: a@x.y\n", b""),
    # PHP 8: its own lines with CRLF, the script's with LF.
    (b"To: a@x.y\r\nSubject: s\r\nX: 1\nY: 2\r\n\r\nb\nc\r\n", b"To: a@x.y\nSubject: s\nX: 1\nY: 2\n", b"b\nc\n"),
    # mail("", "", "")
    (b"To: \r\nSubject: \r\n\r\n\r\n", b"To: \nSubject: \n", b"\n"),
    # The first line is no field.
    (b" junk\nTo: a@x.y\n\nb\n", b"", b" junk\nTo: a@x.y\n\nb\n"),
    (b" To: a@x.y\n\nb\n", b"", b" To: a@x.y\n\nb\n"),
    (b"\tevil\n", b"", b"\tevil\n"),
    (b": x\nTo: a@x.y\n", b"", b": x\nTo: a@x.y\n"),
    (b"\nTo: a@x.y\n", b"", b"To: a@x.y\n"),
    (b"\n\nb\n", b"", b"\nb\n"),
    (b"just text\n", b"", b"just text\n"),
    (b"\xef\xbb\xbfTo: a@x.y\n\nb\n", b"", b"\xef\xbb\xbfTo: a@x.y\n\nb\n"),
    (b"T\xc3\xb6: a@x.y\n\nb\n", b"", b"T\xc3\xb6: a@x.y\n\nb\n"),
    (b"To me: a@x.y\n\nb\n", b"", b"To me: a@x.y\n\nb\n"),
    # From lines of an mbox file, in front only.
    (b"From me Mon Jan  1\nTo: a@x.y\n\nb\n", b"To: a@x.y\n", b"b\n"),
    (b">From me\n>>From you\nTo: a@x.y\n\nb\n", b"To: a@x.y\n", b"b\n"),
    (b"From me\r\nFrom you\r\nTo: a@x.y\r\n\r\nb\r\n", b"To: a@x.y\n", b"b\n"),
    (b"From me\n", b"", b""),
    (b">" * 100 + b"From me\nTo: a@x.y\n", b"To: a@x.y\n", b""),
    # Where a line begins is all that counts: Postfix looks no further than 2,048 bytes.
    (b"From " + b"x" * 2042 + b"\nTo: a@x.y\n", b"To: a@x.y\n", b""),
    (b"From " + b"x" * 2043 + b"\nTo: a@x.y\n", b"", b"From " + b"x" * 2043 + b"\nTo: a@x.y\n"),
    (b"x" * 2047 + b":\nTo: a@x.y\n", b"x" * 2047 + b":\nTo: a@x.y\n", b""),
    (b"x" * 2048 + b":\nTo: a@x.y\n", b"", b"x" * 2048 + b":\nTo: a@x.y\n"),
    (b"To: a@x.y\nFrom me Mon\nCc: b@x.y\n\nb\n", b"To: a@x.y\n", b"From me Mon\nCc: b@x.y\n\nb\n"),
    (b"From: me\nTo: a@x.y\n\nFrom me\n", b"From: me\nTo: a@x.y\n", b"From me\n"),
    # Continuation lines, one of white space alone too.
    (b"To: a@x.y,\n\tb@x.y\n\nb\n", b"To: a@x.y,\n\tb@x.y\n", b"b\n"),
    (b"X: 1\r\n \r\nY: 2\r\n\r\nb\r\n", b"X: 1\n \nY: 2\n", b"b\n"),
    (b"X: 1\n\t\n \t \nY: 2\n\nb\n", b"X: 1\n\t\n \t \nY: 2\n", b"b\n"),
    # A lone dot is text.
    (b"To: a@x.y\n\nl1\n.\nl2\n", b"To: a@x.y\n", b"l1\n.\nl2\n"),
    (b"To: a@x.y\n.\nCc: b@x.y\n", b"To: a@x.y\n", b".\nCc: b@x.y\n"),
    (b"To: a@x.y\r\n\r\nb\r\n.\r\n", b"To: a@x.y\n", b"b\n.\n"),
    # NUL in the body.
    (b"To: a@x.y\n\nb\0c\n", b"To: a@x.y\n", b"b\0c\n"),
    # Names as MTAs read them.
    (b"to : a@x.y\nX-A_1!: \n\n", b"to : a@x.y\nX-A_1!: \n", b""),
    (b"To\t \t: a@x.y\n\n", b"To\t \t: a@x.y\n", b""),
]


@pytest.mark.parametrize(("data", "head", "rest"), FIELDS)
def test_header_and_body(data: bytes, head: bytes, rest: bytes) -> None:
    """The first line that is neither a field nor its continuation ends the header, and our tag begins it."""
    assert stored(data) == TAGGED + head + b"\n" + rest


REFUSED = [
    b"",
    b"To: a\0@x.y\n\nb\n",
    b"To: a@x.y\nX: \0\n\nb\n",
    b"To: a@x.y\n \0\n\nb\n",
    b"To: a@x.y\nX: 1\0",
    b"X: " + b"x" * (1 << 20) + b"\n\nb\n",
    b"X: 1\n" * (1 << 18) + b"\nb\n",
    b"X: " + b"x" * (3 << 20),
]


@pytest.mark.parametrize("data", REFUSED, ids=range(len(REFUSED)))
def test_refused(data: bytes) -> None:
    """An empty message, a NUL in the header and a header without an end are 65."""
    assert status(lambda: read(data)) == DATAERR
    assert status(lambda: message.Message(reader(cut(data, list(range(0, len(data), 60_000)))))) == DATAERR


def test_a_long_body_is_no_long_header() -> None:
    """Only the header is limited: the same bytes behind the empty line pass."""
    long = b"x: y" * (1 << 19) + b"\n"
    assert body(b"To: a@x.y\n\n" + long) == long
    assert body(b"To: a@x.y\n\n" + b"X: 1\n" * (1 << 18)) == b"X: 1\n" * (1 << 18)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("piece", [b" \n", b"X: 1\n", b" \r", b"Bcc:\n", b"\r", b"X:\n \n"])
def test_long_header_is_read_soon(piece: bytes) -> None:
    """The time that the longest header takes grows with its length only: under 2 s of CPU, whatever its lines are."""
    data = b"X: y\n" + piece * ((message.MAX_HEADER - 100) // len(piece)) + b"\n\nb\n"
    started = time.process_time()
    everything([data[n : n + 65536] for n in range(0, len(data), 65536)])
    assert time.process_time() - started < 2


TEN_MEGABYTES = 10_000_000


@pytest.mark.timeout(30)
@pytest.mark.parametrize("start", [b"", b"X: ", b"From ", b"To: a@x.y\n\n"])
@pytest.mark.parametrize("piece", [b"x", b" ", b">", b"\r", b"x\r", b"x\r\r\n", b"X: y\r", b">From me\n"])
def test_ten_megabytes_are_read_soon(start: bytes, piece: bytes) -> None:
    """Ten megabytes in one line, or of any line ends, take less than 1 s of CPU."""
    data = start + piece * (TEN_MEGABYTES // len(piece))
    started = time.process_time()
    everything([data[n : n + 65536] for n in range(0, len(data), 65536)])
    assert time.process_time() - started < 1


# Recipients.

RECIPIENTS = [
    (b"To: a@x.y\nCc: b@x.y\nBcc: c@x.y\n\n", [b"a@x.y", b"b@x.y", b"c@x.y"]),
    (b"TO: a@x.y\ncC: b@x.y\nbCC: c@x.y\n\n", [b"a@x.y", b"b@x.y", b"c@x.y"]),
    (b"To : a@x.y\nBcc\t: b@x.y\n\n", [b"a@x.y", b"b@x.y"]),
    (b"To: a@x.y\nTo: b@x.y\n\n", [b"a@x.y", b"b@x.y"]),
    (b"To: a@x.y,\n b@x.y,\n\tc@x.y\n\n", [b"a@x.y", b"b@x.y", b"c@x.y"]),
    (b"To:\n a@x.y\n\n", [b"a@x.y"]),
    (b"To: a@x.y\r\r\nBcc: b@x.y\r\r\n\r\r\nb", [b"a@x.y", b"b@x.y"]),
    # A lone CR where it changes nobody.
    (b"To: a@x.y\nX: 1\rX-Domain: evil\n\n", [b"a@x.y"]),
    (b"To: a@x.y,\r b@x.y\n\n", [b"a@x.y", b"b@x.y"]),
    (b"To: a@x.y\n\nbody\rCc: b@x.y\r\r", [b"a@x.y"]),
    (b"To: a@x.y\nTo\r: b@x.y\n\n", [b"a@x.y"]),
    (b"X: 1\rTo: a@x.y\nTo: a@x.y\n\n", [b"a@x.y", b"a@x.y"]),
    (b"X: 1\r\n \r\nBcc: e@v.il\r\n\r\nb", [b"e@v.il"]),
    (b">From x\n>>From y\nTo: a@x.y\n\n", [b"a@x.y"]),
    (b"To: a@x.y\nFrom me Mon\nBcc: b@x.y\n\n", [b"a@x.y"]),
    (b"To: a@x.y\n\nBcc: b@x.y\n", [b"a@x.y"]),
    (b"To: a@x.y", [b"a@x.y"]),
    (b"To: undisclosed-recipients:;\nBcc: b@x.y\n\n", [b"b@x.y"]),
    (b"To: undisclosed-recipients:;\n\n", []),
    (b"To: \n\n", []),
    (b"Apparently-To: a@x.y\n\n", []),
    (b"Reply-To: a@x.y\nDelivered-To: b@x.y\nX-To: c@x.y\n\n", []),
    (b" junk\nTo: a@x.y\n\n", []),
    (b": x\nTo: a@x.y\n\n", []),
    (b"\nTo: a@x.y\n\n", []),
    (b"\xef\xbb\xbfTo: a@x.y\n\n", []),
    # Resent-To, -Cc or -Bcc alone count where one of them is there; Resent-From changes nothing.
    (b"To: a@x.y\nBcc: b@x.y\nResent-To: r@x.y\n\n", [b"r@x.y"]),
    (b"Resent-Cc: r@x.y\nTo: a@x.y\n\n", [b"r@x.y"]),
    (b"To: a@x.y\nresent-BCC : r@x.y\n\n", [b"r@x.y"]),
    (b"Resent-To: r@x.y\nResent-Cc: s@x.y\nResent-Bcc: t@x.y\nTo: a@x.y\n\n", [b"r@x.y", b"s@x.y", b"t@x.y"]),
    (b"Resent-From: f@x.y\nTo: a@x.y\nBcc: b@x.y\n\n", [b"a@x.y", b"b@x.y"]),
    (b"Resent-To:\nTo: a@x.y\n\n", []),
]


@pytest.mark.parametrize(("data", "expected"), RECIPIENTS)
def test_recipients(data: bytes, expected: list[bytes]) -> None:
    """The header names the recipients that Postfix's `sendmail -t` takes from it."""
    assert read(data).recipients() == expected


AMBIGUOUS = [
    b"To: Foo <a@x.y\n\n",
    b'To: "abc <a@x.y>, b@x.y\n\n',
    b"Cc: a@b@c\n\n",
    b"To: ok@x.y\nBcc: (\n\n",
    b"To: a\x0bb@x.y\n\n",
    # A lone CR ends a line, or it is white space: not the same people, or nobody that Postfix would take it for.
    b"To: a@x.y\rBcc: b@x.y\r\rbody",
    b"To: a@x.y\nX: y\rBcc: b@x.y\n\n",
    b"To: a@x.y\nX: y\r\rbody\nBcc: b@x.y\n\n",
    b"From me\rTo: b@x.y\nTo: a@x.y\n\n",
    b"X: y\rTo: a@x.y\n\n",
    b"X: y\r\rbody\0\nTo: a@x.y\n\n",
    b"X: y\r\r" + b"x" * (1 << 20) + b"\n\n",
    # Any field above 102,400 bytes makes Postfix refuse the message.
    b"To: a@x.y\nX: " + b"x" * 102_400 + b"\n\n",
]


@pytest.mark.parametrize("data", AMBIGUOUS, ids=range(len(AMBIGUOUS)))
def test_ambiguous_recipients(data: bytes) -> None:
    """A recipient field without a single reading is 65."""
    assert status(lambda: read(data).recipients()) == DATAERR


def test_ambiguous_field_that_does_not_count() -> None:
    """Where Resent-To counts, To is not read."""
    assert read(b"To: Foo <a@x.y\nResent-To: r@x.y\n\n").recipients() == [b"r@x.y"]


def test_many_recipients() -> None:
    """3,000 recipients in one field are counted, folded over 200 lines too; a field above 102,400 bytes is 65."""
    mailboxes = [b"r%04d@example.org" % n for n in range(3000)]
    assert read(b"To: " + b", ".join(mailboxes) + b"\n\n").recipients() == mailboxes
    lines = [b", ".join(mailboxes[n : n + 15]) for n in range(0, 3000, 15)]
    assert len(lines) == 200
    assert read(b"To: " + b",\r\n ".join(lines) + b"\r\n\r\n").recipients() == mailboxes
    longest = b"To: " + b" " * (102_400 - 10) + b"a@x.y"
    assert read(longest + b"\n\n").recipients() == [b"a@x.y"]
    assert status(lambda: read(longest + b" " * 10 + b"\n\n").recipients()) == DATAERR


# Bcc, and forged tags.

BCC = [
    b"Bcc: secret@x.y\n", b"bcc: secret@x.y\n", b"BCC: secret@x.y\n", b"Bcc : secret@x.y\n", b"Bcc\t:\n\tsecret@x.y\n",
    b"Bcc:\n secret@x.y,\n secret2@x.y\n", b"Bcc: secret@x.y\nBcc: secret2@x.y\n", b"Resent-Bcc: secret@x.y\n",
    b"RESENT-BCC :\n secret@x.y\n", b"X: 1\n \nBcc: secret@x.y\n", b"X: 1\rBcc: secret@x.y\n", b"X: 1\r\r\nBcc: secret@x.y\r\r\n",
    b"Bcc:secret@x.y\n", b"Bcc:\n \n secret@x.y\n", b"Return-Path: <secret@x.y>\n", b"return-path :\n <secret@x.y>\n",
]  # fmt: skip


@pytest.mark.parametrize("end", [b"\nbody\n", b"body\n", b"", b"To: b@x.y\n\nbody\n"])
@pytest.mark.parametrize("field", BCC)
def test_bcc_is_not_passed_on(field: bytes, end: bytes) -> None:
    """Nobody sees who gets a blind copy: Bcc, Resent-Bcc and Return-Path are gone in every spelling, the last line too."""
    assert b"secret" not in stored(b"To: a@x.y\n" + field + end)
    assert b"secret" not in stored(field + end)
    assert b"secret" not in stored((b"To: a@x.y\n" + field + end).rstrip(b"\n"))


FORGED = [
    b"X-Domain: evil\n", b"x-domain: evil\n", b"X-DOMAIN: evil\n", b"X-Domain : evil\n", b"X-Domain\t: evil\n",
    b"X-Domain:\n evil\n",
    b"X-Domain: a\n evil\n\tevil\n", b"X-Domain: a\nX-Domain: evil\n", b"X: 1\rX-Domain: evil\n", b"X: 1\r\r\nX-Domain: evil\n",
    b"X: 1\n \nX-Domain: evil\n", b"X-Complaints-To: evil\n", b"x-complaints-to :\n evil\n", b"X-Domain:evil\n",
]  # fmt: skip


@pytest.mark.parametrize("field", FORGED)
def test_forged_tag_is_taken_out(field: bytes) -> None:
    """Of each tag field there is one, ours, at the very beginning, however another is spelled and wherever it stands."""
    for data in (field + b"To: a@x.y\n\nbody\n", b"To: a@x.y\n" + field + b"\nbody\n", b"To: a@x.y\n" + field.rstrip(b"\n")):
        head = stored(data).partition(b"\n\n")[0]
        assert head.startswith(TAGGED[:-1]) and b"evil" not in head
        assert len(re.findall(rb"(?im)^x-(?:domain|complaints-to)[ \t]*:", head)) == 2


def test_forged_tag_behind_the_header_is_text() -> None:
    """A second block of fields behind the empty line is body."""
    assert stored(b"To: a@x.y\n\nX-Domain: evil\n\nbody\n") == TAGGED + b"To: a@x.y\n\nX-Domain: evil\n\nbody\n"


def test_leading_white_space_does_not_continue_our_tag() -> None:
    """A message that begins with white space cannot change the value of our last tag field."""
    assert stored(b" evil\nTo: a@x.y\n\nb").startswith(TAGGED + b"\n evil\n")
    assert stored(b"From me\n evil\nTo: a@x.y\n\nb").startswith(TAGGED + b"\n evil\n")
    assert stored(b"X-Domain: evil\n evil\n\n evil\n") == TAGGED + b"\n evil\n"


MISSING_FIELDS = [
    (b"To: a@x.y\n\n", b"Date: D\nFrom: F\nMessage-ID: <M>\n"),
    (b"To: a@x.y\nDate: d\n\n", b"From: F\nMessage-ID: <M>\n"),
    (b"To: a@x.y\nfrom : f\nDATE: d\n\n", b"Message-ID: <M>\n"),
    (b"To: a@x.y\nmessage-id: <m>\nFrom: f\nDate:\n d\n\n", b""),
    (b"To: a@x.y\n\nFrom: f\nDate: d\nMessage-ID: <m>\n", b"Date: D\nFrom: F\nMessage-ID: <M>\n"),
    (b"text\n", b"Date: D\nFrom: F\nMessage-ID: <M>\n"),
    (b"Resent-From: f\nResent-Date: d\nResent-Message-ID: <m>\n\n", b"Date: D\nFrom: F\nMessage-ID: <M>\n"),
]


@pytest.mark.parametrize(("data", "added"), MISSING_FIELDS)
def test_missing_fields_are_added_once(data: bytes, added: bytes) -> None:
    """Date, From and Message-ID are added behind our tag where the header lacks them, and only there."""
    once = stored(data, MISSING)
    assert once.startswith(TAGGED + added)
    assert once.replace(TAGGED + added, TAGGED, 1) == stored(data)
    assert stored(once, MISSING).removeprefix(TAGGED).count(b"Message-ID: <M>\n") == added.count(b"Message-ID")


def test_first_field() -> None:
    """A field is found by its name without case, the first of several, unfolded."""
    found = read(b"Message-ID:\n <1@x.y> \nmessage-id: <2@x.y>\nX-PHP-Originating-Script: 33:a.php\n\n")
    assert found.first(b"message-id") == b"<1@x.y>"
    assert found.first(b"x-php-originating-script") == b"33:a.php"
    assert found.first(b"subject") is None


@PROPERTY
@given(MESSAGES)
def test_nothing_else_is_changed(data: bytes) -> None:
    """What is stored is what came, line by line, without the fields that are dropped, and with our tag in front."""
    try:
        found = read(data)
    except Failure:
        return
    text = b"".join(found.chunks(TAG, []))
    assert text.startswith(TAGGED) and text.endswith(b"\n") and b"\r" not in text
    names = [field.name for field in found.fields]
    kept = b"".join(f.raw for f in found.fields if f.name not in (b"bcc", b"return-path", b"x-domain"))
    assert b"resent-bcc" not in names and text.startswith(TAGGED + kept + b"\n")
    lines = canonical(data).split(b"\n")
    assert all(line in lines for line in text.removeprefix(TAGGED).split(b"\n") if line)
