"""DATA on the wire: whatever the lines are and however they are read, the server gets these lines, and one final dot."""

import io
from collections.abc import Iterable
from typing import BinaryIO, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from releaser.mta import on_the_wire

PROPERTY = settings(max_examples=300, derandomize=False, print_blob=True, deadline=None)


class Odd(io.RawIOBase):
    """A stream that returns as little as it likes, as a pipe may: the given sizes in turn, over and over."""

    def __init__(self, data: bytes, sizes: Iterable[int]) -> None:
        self._data = data
        self._sizes = list(sizes) or [1 << 16]
        self._turn = 0

    def read(self, size: int = -1) -> bytes:
        most = self._sizes[self._turn % len(self._sizes)]
        self._turn += 1
        taken, self._data = self._data[: min(most, size)], self._data[min(most, size) :]
        return taken


def wire(data: bytes, sizes: Iterable[int] = ()) -> bytes:
    return b"".join(on_the_wire(cast(BinaryIO, Odd(data, sizes))))


def received(sent: bytes) -> tuple[bytes, bytes]:
    """What a server makes of the bytes behind DATA (RFC 5321 section 4.5.2): the message, and what follows the final dot."""
    message, position = b"", 0
    while True:
        end = sent.index(b"\r\n", position)
        line, position = sent[position:end], end + 2
        if line == b".":
            return message, sent[position:]
        message += line.removeprefix(b".") + b"\r\n"


PIECES = [
    b"\n",
    b".",
    b"..",
    b"\n.",
    b"\n.\n",
    b"\n..\n",
    b"a",
    b" ",
    b"\0",
    b"\xff",
    b"MAIL FROM:<a@x.y>\n",
    b".\nDATA\n",
    b"x" * 70,
]
# LF line ends, no CR, and the last line is ended: what a file of the spool is.
MESSAGES = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join),
    st.binary(max_size=60).map(lambda data: data.replace(b"\r", b"")),
).map(lambda data: data + b"\n")
SIZES = st.lists(st.integers(1, 9), max_size=6)


@PROPERTY
@given(MESSAGES, SIZES)
def test_server_gets_the_message(data: bytes, sizes: list[int]) -> None:
    """Any message, however it is read, arrives as it is with CRLF line ends, and nothing follows its final dot."""
    assert received(wire(data, sizes)) == (data.replace(b"\n", b"\r\n"), b"")


@PROPERTY
@given(MESSAGES, SIZES)
def test_one_final_dot(data: bytes, sizes: list[int]) -> None:
    """CRLF . CRLF is there once, at the very end, and no line end is a bare CR or LF: one transaction, for every server."""
    sent = wire(data, sizes)
    assert sent.endswith(b"\r\n.\r\n") and (b"\r\n" + sent).count(b"\r\n.\r\n") == 1
    assert sent.count(b"\r") == sent.count(b"\n") == sent.count(b"\r\n")
    assert b"\n.\n" not in sent


@PROPERTY
@given(MESSAGES, SIZES, SIZES)
def test_reads_change_nothing(data: bytes, sizes: list[int], other: list[int]) -> None:
    """The bytes are the same however the file is read."""
    assert wire(data, sizes) == wire(data, other) == wire(data)


TABLE = [
    (b"a\n", b"a\r\n.\r\n"),
    (b"\n", b"\r\n.\r\n"),
    (b".\n", b"..\r\n.\r\n"),
    (b"..\n", b"...\r\n.\r\n"),
    (b"a\n.\nb\n", b"a\r\n..\r\nb\r\n.\r\n"),
    (b"a\n.b\n..c\n", b"a\r\n..b\r\n...c\r\n.\r\n"),
    (b"\n.\n.\n.\n", b"\r\n..\r\n..\r\n..\r\n.\r\n"),
    (b"a.\n", b"a.\r\n.\r\n"),
    (b".\nMAIL FROM:<x@y>\nRCPT TO:<v@z>\nDATA\n", b"..\r\nMAIL FROM:<x@y>\r\nRCPT TO:<v@z>\r\nDATA\r\n.\r\n"),
    (b"a\0\xff\n", b"a\0\xff\r\n.\r\n"),
    (b"", b".\r\n"),
]


@pytest.mark.parametrize("size", [1, 2, 3, 1 << 16])
@pytest.mark.parametrize(("data", "sent"), TABLE)
def test_wire(data: bytes, sent: bytes, size: int) -> None:
    """Leading dots are doubled, line ends are CRLF, and the final dot is a line of its own."""
    assert wire(data, [size]) == sent


@pytest.mark.parametrize("shift", range(4))
def test_at_the_real_chunk_size(shift: int) -> None:
    """A file read in chunks of the size that is really used, with a dot at every place around its end, arrives whole."""
    data = b"x" * ((1 << 16) - shift) + b"\n.\n..\n.a\n" + b"y\n." * (1 << 16) + b"\n"
    assert received(b"".join(on_the_wire(io.BytesIO(data)))) == (data.replace(b"\n", b"\r\n"), b"")
