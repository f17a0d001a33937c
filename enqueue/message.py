"""The message: line ends made one, header read once, recipients found, Bcc and forged tags taken out, ours put in."""

from enqueue import address
from enqueue.failure import DATAERR, Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Postfix refuses a header field above 102,400 bytes ("message header length exceeds safety limit").
MAX_FIELD = 102_400
# Postfix reads a line in pieces of so many bytes, and looks for a field's name, or `From `, in the first one only.
MAX_START = 2048
MAX_HEADER, MAX_LINES = 1 << 20, 20_000

# Never passed on, whoever wrote them: who got a blind copy, and the trace header that only final delivery adds.
ALWAYS_DROPPED = frozenset((b"bcc", b"resent-bcc", b"return-path"))

# A field name: printable ASCII without the colon (RFC 5322 section 2.2).
NAME_BYTES = bytes(range(33, 58)) + bytes(range(59, 127))


class Field:
    """A header field: its name in lower case, and its bytes as they stand, continuation lines and last LF included."""

    def __init__(self, name: bytes, raw: bytes) -> None:
        self.name = name
        self.raw = raw

    def value(self) -> bytes:
        """The value on one line, unfolded as Postfix does it: each line end, and each lone CR, is a blank."""
        return self.raw.partition(b":")[2].replace(b"\n", b" ").replace(b"\r", b" ").strip(b" \t")


def ended(read: "Callable[[], bytes]") -> "Iterator[bytes]":
    """What READ returns until it is empty, with CRLF and CR CR LF as one LF; a missing last line end is added.

    A lone CR is still there, for recipients() to see.
    """
    waiting = 0
    last = b"\n"
    while chunk := read():
        if not chunk.strip(b"\r"):
            waiting += len(chunk)
            continue
        if waiting:
            rest = chunk.lstrip(b"\r")
            waiting += len(chunk) - len(rest)
            chunk = rest if rest.startswith(b"\n") else b"\r" * waiting + rest
        body = chunk.rstrip(b"\r")
        waiting = len(chunk) - len(body)
        if b"\r" in body:
            body = body.replace(b"\r\n", b"\n")
            if b"\r" in body:
                body = b"\n".join([line.rstrip(b"\r") for line in body.split(b"\n")])
        last = body[-1:]
        yield body
    if last != b"\n" or waiting:
        yield b"\n"


def canonical(chunks: "Iterator[bytes]") -> "Iterator[bytes]":
    """CHUNKS, whose lines are ended, with a lone CR as a line end too, and so without any CR.

    Done before anything looks at a field, so that no later reader sees a line that we did not see.
    """
    for chunk in chunks:
        yield chunk.replace(b"\r", b"\n")


class Message:
    """A message with its header in memory and its body still to be read.

    Raises Failure(DATAERR) for an empty input, an endless header, a NUL in the header.
    """

    def __init__(self, read: "Callable[[], bytes]") -> None:
        self._chunks = ended(read)
        data = b"".join(self._first_chunks())
        if not data:
            raise Failure(DATAERR, "the message is empty")
        # For recipients() only: nothing else reads what has a CR.
        self._with_lone_cr = data if b"\r" in data else b""
        data = data.replace(b"\r", b"\n")
        self.fields, end = _header(data)
        # The blank line is ours to write: a header that ends in a line which is no field gets one too.
        self._rest = data[end:].removeprefix(b"\n")

    def _first_chunks(self) -> "Iterator[bytes]":
        """As many as a header may take."""
        size = 0
        for chunk in self._chunks:
            yield chunk
            size += len(chunk)
            if size > MAX_HEADER:
                break

    def first(self, name: bytes) -> bytes | None:
        """The value of the first field called NAME (lower case)."""
        for field in self.fields:
            if field.name == name:
                return field.value()
        return None

    def recipients(self) -> list[bytes]:
        """The mailboxes of To, Cc and Bcc, or of Resent-To, Resent-Cc and Resent-Bcc where one of these is there."""
        found = _recipients(self.fields)
        if self._with_lone_cr:
            # To Postfix a lone CR is white space inside a line, to others it ends one.
            try:
                same = set(found) == set(_recipients(_header(self._with_lone_cr)[0]))
            except Failure:
                same = False
            if not same:
                raise Failure(DATAERR, "a lone CR in the header: MTAs disagree on who gets the message")
        return found

    def chunks(self, tag: list[tuple[bytes, bytes]], missing: list[tuple[bytes, bytes]]) -> "Iterator[bytes]":
        """The message to be stored: TAG first and only ours, then those of MISSING that the header lacks, then the rest."""
        dropped = ALWAYS_DROPPED | {name.lower() for name, _ in tag}
        # A field with nothing in it is as good as none.
        names = {field.name for field in self.fields if field.value()}
        added = [(name, value) for name, value in missing if name.lower() not in names]
        dropped |= {name.lower() for name, _ in added}
        head = [name + b": " + value + b"\n" for name, value in tag + added]
        head += [field.raw for field in self.fields if field.name not in dropped]
        yield b"".join(head) + b"\n" + self._rest
        yield from canonical(self._chunks)


def _recipients(fields: list[Field]) -> list[bytes]:
    names: tuple[bytes, ...] = (b"resent-to", b"resent-cc", b"resent-bcc")
    if not any(field.name in names for field in fields):
        names = (b"to", b"cc", b"bcc")
    found = []
    for field in fields:
        if len(field.raw) > MAX_FIELD:
            raise Failure(DATAERR, f"the {field.name[:80].decode()} field is longer than {MAX_FIELD} bytes")
        if field.name in names:
            found += lexed(field.value(), f"the {field.name.decode()} field")
    return found


def lexed(value: bytes, where: str) -> list[bytes]:
    """The mailboxes in VALUE. Raises Failure(DATAERR), saying WHERE, when it has no single reading."""
    try:
        return address.mailboxes(value)
    except address.Ambiguous as error:
        raise Failure(DATAERR, f"ambiguous recipients in {where}: {error}") from None


def _header(data: bytes) -> tuple[list[Field], int]:
    """The fields at the beginning of DATA, and the place behind them. Raises Failure."""
    data = data[: MAX_HEADER + 1]
    start = _mbox_lines(data)
    end = _header_end(data[:MAX_HEADER], start)
    if end >= MAX_HEADER and len(data) > MAX_HEADER:
        raise Failure(DATAERR, f"the header is longer than {MAX_HEADER} bytes")
    if data.count(b"\n", start, end) > MAX_LINES:
        # Each costs its reader as much as a hundred bytes.
        raise Failure(DATAERR, f"the header has more than {MAX_LINES} lines")
    if b"\0" in data[start:end]:
        raise Failure(DATAERR, "a NUL byte in the header")
    return _fields(data[start:end]), end


def _mbox_lines(data: bytes) -> int:
    """The length of the leading `From ` lines of an mbox file, quoted or not."""
    start = 0
    while True:
        end = data.find(b"\n", start, start + MAX_START)
        if end < 0 or not data[start:end].lstrip(b">").startswith(b"From "):
            return start
        start = end + 1


def _header_end(data: bytes, position: int) -> int:
    """The place of the first line from POSITION on that is neither a field nor its continuation; len(DATA) if none is.

    A short last line without its end counts as a field, whatever it looks like so far.
    """
    start = position
    while position < len(data):
        line_end = data.find(b"\n", position) + 1
        if not line_end and len(data) - position < MAX_START:
            return len(data)
        line_end = line_end or len(data)
        continues = position > start and data[position] in b" \t"
        if not continues and not _name(data[position : min(line_end, position + MAX_START)]):
            break
        position = line_end
    return position


def _name(line: bytes) -> bytes:
    """The field name of LINE in lower case, white space before the colon allowed; empty if LINE is no field."""
    name, colon, _ = line.partition(b":")
    name = name.rstrip(b" \t")
    if not colon or name.strip(NAME_BYTES):
        return b""
    # strip() takes bytes off both ends only, and leaves something exactly when a byte inside is not allowed.
    return name.lower()


def _fields(head: bytes) -> list[Field]:
    """The fields of HEAD, each sliced once, since a field can have as many lines as the header."""
    starts = []
    position = 0
    while position < len(head):
        if head[position] not in b" \t":
            starts.append(position)
        position = head.find(b"\n", position) + 1 or len(head)
    raws = [head[begin:end] for begin, end in zip(starts, [*starts[1:], len(head)], strict=False)]
    return [Field(_name(raw), raw) for raw in raws]
