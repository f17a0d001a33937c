"""The message as it will be sent: line ends made one, forged tags taken out, ours put in. Pure.

enqueue does the same before it writes; a customer need not use enqueue, so nothing it did is believed. What enqueue
wrote comes out of here unchanged.
"""

import email.errors
import email.header
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

# More than enqueue takes, since it adds to the header what is missing and our tag.
MAX_HEADER, MAX_LINES = 2 << 20, 21_000
# Postfix drops without a word what a field has beyond this many bytes (header_size_limit).
MAX_FIELD = 102_400
ALWAYS_DROPPED = frozenset((b"bcc", b"resent-bcc", b"return-path"))
# A field's name, and its colon, before which white space is allowed. No step back: a line can be two megabytes long.
_NAME = re.compile(rb"([!-9;-~]++)[ \t]*+:")
# Bytes of a header that are decoded at most: decoding takes time that grows with the square of its length.
MAX_DECODED = 2000
# Longest text kept of a header for listings and the log, in characters.
MAX_SHOWN = 255


class HeaderTooLong(ValueError):
    """The header does not end within MAX_HEADER bytes and MAX_LINES lines."""


@dataclass(frozen=True)
class Header:
    """The fields of a message: (lower-case name, bytes with continuation lines and last LF), and its first body bytes."""

    fields: tuple[tuple[bytes, bytes], ...]
    rest: bytes

    def text(self, name: str) -> str:
        """The first field called NAME (lower case), unfolded, decoded (RFC 2047) and cut, for people to read."""
        return decoded(self._first(name.encode()))[:MAX_SHOWN]

    @cached_property
    def message_id(self) -> str:
        """The Message-ID, which has no encoded words; empty where there is none."""
        return self._first(b"message-id")[:MAX_DECODED].decode("utf-8", "replace").replace("\n", "").strip()[:MAX_SHOWN]

    def _first(self, name: bytes) -> bytes:
        for field_name, raw in self.fields:
            if field_name == name:
                return raw.partition(b":")[2]
        return b""

    @property
    def longest(self) -> int:
        """The bytes of the longest field."""
        return max((len(raw) for _, raw in self.fields), default=0)

    def tagged(self, tag: tuple[tuple[str, str], ...], message_id: str) -> bytes:
        """The header to send: TAG first and only ours; MESSAGE_ID where there is none; the empty line; the first body bytes."""
        dropped = ALWAYS_DROPPED | {name.lower().encode() for name, _ in tag}
        head = [f"{name}: {value}\n".encode() for name, value in tag]
        if not self.message_id:
            dropped |= {b"message-id"}
            head.append(f"Message-ID: {message_id}\n".encode())
        head += [raw for name, raw in self.fields if name not in dropped]
        return b"".join(head) + b"\n" + self.rest


def canonical(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """CHUNKS with every line ended by one LF and no CR left: CRLF, CR CR LF and a lone CR are one line end each."""
    waiting = 0
    last = b"\n"
    for chunk in chunks:
        if not chunk.strip(b"\r"):
            waiting += len(chunk)
            continue
        if waiting:
            rest = chunk.lstrip(b"\r")
            waiting += len(chunk) - len(rest)
            chunk = rest if rest.startswith(b"\n") else b"\n" * waiting + rest
        body = chunk.rstrip(b"\r")
        waiting = len(chunk) - len(body)
        if b"\r" in body:
            body = body.replace(b"\r\n", b"\n")
            if b"\r" in body:
                body = b"\n".join([line.rstrip(b"\r") for line in body.split(b"\n")]).replace(b"\r", b"\n")
        last = body[-1:]
        yield body
    if last != b"\n" or waiting:
        yield b"\n"


def read_header(chunks: Iterator[bytes]) -> Header:
    """Take the header off the front of canonical CHUNKS. Raises HeaderTooLong."""
    pieces = []
    size = 0
    for chunk in chunks:
        pieces.append(chunk)
        size += len(chunk)
        if size > MAX_HEADER:
            break
    data = b"".join(pieces)
    head = data[:MAX_HEADER]
    starts: list[int] = []
    names: list[bytes] = []
    position = lines = 0
    while position < len(head):
        lines += 1
        if lines > MAX_LINES:
            raise HeaderTooLong(f"the header has more than {MAX_LINES} lines")
        line_end = head.find(b"\n", position) + 1
        if not line_end:
            # Cut by the limit: whatever the line is, it does not end within it.
            position = len(head)
            break
        if not (starts and head[position] in b" \t"):
            name = _NAME.match(head, position, line_end)
            if not name:
                break
            starts.append(position)
            names.append(name[1].lower())
        position = line_end
    if position == MAX_HEADER < len(data):
        raise HeaderTooLong(f"the header is longer than {MAX_HEADER} bytes")
    # Each field is sliced once, since it can have as many lines as the header.
    raws = [head[begin:end] for begin, end in zip(starts, [*starts[1:], position], strict=False)]
    return Header(tuple(zip(names, raws, strict=True)), data[position:].removeprefix(b"\n"))


def decoded(raw: bytes) -> str:
    """A header value for people to read: encoded words decoded, broken bytes replaced."""
    text = raw[:MAX_DECODED].decode("utf-8", "replace").replace("\n", "").strip()
    if "=?" in text:
        try:
            text = str(email.header.make_header(email.header.decode_header(text)))
        except (email.errors.MessageError, ValueError, LookupError):
            pass
    return text.encode("utf-8", "replace").decode()
