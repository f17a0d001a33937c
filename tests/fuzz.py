"""Fuzz target over the scanners: `make fuzz MINUTES=10` runs it with atheris, tests/test_fuzz.py shortly without.

Whatever the bytes are: no exception but the documented ones, what enqueue stores is what the releaser sends, our tag stands
there once, the wire has one final dot, and no input takes time that grows faster than it does.
"""

from __future__ import annotations

import importlib
import io
import os
import posix
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TAG = [(b"X-Domain", b"www.a.example"), (b"X-Complaints-To", b"abuse@host.example")]
MISSING = [(b"Date", b"d"), (b"From", b"f@a.example"), (b"Message-ID", b"<i@a.example>")]
# An input is repeated up to so many bytes; four times as many may then take so many times as long.
AMPLIFIED, TIMES_AS_LONG = 1 << 18, 8

SEEDS = [
    b"To: one@x.example, Two <two@x.example>;three@x.example\r\nBcc :\r\n\tfour@x.example\r\n\r\n.\r\nMAIL FROM:<a@b>\r\n",
    b'>From me\nTo: a(c(d)e)@x.y, <@r1.z,@r2.z:b@x.y>, group: c@x.y, d@x.y;, "q, r"@x.y\n\nbody',
    b"Resent-To: r@x.y\rX-Domain: forged\r\r\nX-Domain\t: forged\n folded\n\n.\r.\n..\r\n",
    b"Layout: 2\nVhost: www.a.example\nSender: \nRecipient: one@x.example\nUid: 33\nNotify: never\nScript: 33:a.php",
    b"To: =?utf-8?q?a=40b?= <j\xc3\xb6rg@b\xc3\xbccher.example>, a%b@[127.0.0.1]\nMessage-ID:\n\n\0\xff",
    b"-ti\0-f\0a@x.y\0-N\0never\0--\0one@x.y,two@x.y",
]


def one_input(data: bytes) -> None:
    """Everything that reads what a customer writes, on DATA."""
    for reader in (_message, _spool_file, _envelope, _words, _addresses):
        reader(data)
    # One in a thousand, chosen by its bytes, so that a finding can be run again.
    if data and zlib.crc32(data) % 1000 == 0:
        _amplified(data)


def _message(data: bytes) -> None:
    from enqueue import address
    from enqueue.failure import DATAERR, Failure
    from enqueue.message import Message

    source = io.BytesIO(data)
    # Cuts that depend on the input alone.
    cuts = random.Random(data[:16])
    try:
        mail = Message(lambda: source.read(cuts.choice((1, 2, 3, 7, 64, 1 << 16))))
        try:
            found = mail.recipients()
        except Failure as failure:
            assert failure.status == DATAERR
            found = []
        _all_good(address.unique(found))
        missing = [(name, value) for name, value in MISSING if not mail.first(name.lower())]
        stored = b"".join(mail.chunks(list(TAG), missing))
    except Failure as failure:
        assert failure.status == DATAERR
        return
    assert _sent(stored) == stored
    _on_the_wire(stored)


def _spool_file(data: bytes) -> None:
    """A message that a customer has written into new/ himself."""
    sent = _sent(data)
    # Empty: too long a header. Near the limits it is our tag that makes it so.
    assert not sent or _sent(sent) == sent or len(data) > AMPLIFIED // 2
    _on_the_wire(sent)


def _sent(data: bytes) -> bytes:
    from releaser import message

    chunks = message.canonical(iter([data[:100], data[100:]]))
    tag = tuple((name.decode(), value.decode()) for name, value in TAG)
    try:
        header = message.read_header(chunks)
    except message.HeaderTooLong:
        return b""
    header.text("subject")
    sent = header.tagged(tag, "<i@a.example>") + b"".join(chunks)
    again = message.read_header(iter([sent]))
    names = [name for name, _ in again.fields]
    assert names[:2] == [b"x-domain", b"x-complaints-to"] and len(set(names[:2]) & set(names[2:])) == 0
    assert b"bcc" not in names and b"\r" not in sent
    return sent


def _on_the_wire(data: bytes) -> None:
    """What a server of RFC 5321 makes of it is DATA again, ended by the one final dot."""
    from releaser import mta

    if not data:
        return
    sent = b"".join(mta.on_the_wire(io.BytesIO(data)))
    lines = sent.split(b"\r\n")
    assert lines[-2:] == [b".", b""] and b"." not in lines[:-2]
    assert b"\n" not in sent.replace(b"\r\n", b"") and b"\r" not in sent.replace(b"\r\n", b"")
    received = b"\n".join(line.removeprefix(b".") for line in lines[:-2])
    assert received + b"\n" == data


def _envelope(data: bytes) -> None:
    from releaser import envelope

    for verified in (False, True):
        try:
            found = envelope.parse(data, verified)
        except (envelope.NoLayout, envelope.NewerLayout):
            continue
        assert envelope.parse(found.format()[:-2], verified).recipients == found.recipients


def _words(data: bytes) -> None:
    from enqueue import options
    from enqueue.failure import USAGE, Failure

    words = [os.fsdecode(word) for word in data.split(b"\0")]
    # The answer of -bs goes to standard output, which is not looked at here.
    write, posix.write = posix.write, lambda fd, text: len(text)
    try:
        options.parse(words)
    except Failure as failure:
        assert failure.status == USAGE
    finally:
        posix.write = write


def _addresses(data: bytes) -> None:
    from enqueue import address

    try:
        found = address.mailboxes(data)
    except address.Ambiguous:
        return
    _all_good(found)


def _all_good(addresses: list[bytes]) -> None:
    from releaser import envelope

    for each in addresses:
        assert envelope.is_address(each.decode()), each


def _amplified(data: bytes) -> None:
    for part in {len(data), max(len(data) // 2, 1), 1}:
        for reader in (_message, _spool_file, _envelope, _addresses):
            times = []
            for size in (AMPLIFIED, 4 * AMPLIFIED):
                large = data[:part] * (size // part) + data[part:]
                started = time.process_time()
                reader(large)
                times.append(time.process_time() - started)
            # What takes next to no time is not compared.
            assert times[1] < TIMES_AS_LONG * times[0] + 0.5, f"{reader.__name__}: {times} s, four times the input"


def mutations(seed: int, count: int) -> Iterator[bytes]:
    """Inputs made of the seeds, where no atheris is there to find better ones."""
    chance = random.Random(seed)
    pieces = [
        b"\n",
        b"\r",
        b"\r\n",
        b".",
        b":",
        b" ",
        b"<",
        b">",
        b"(",
        b")",
        b'"',
        b"\\",
        b"@",
        b",",
        b";",
        b"\0",
        b"\xff",
        b"X-Domain: f",
    ]
    for _ in range(count):
        data = bytearray(chance.choice(SEEDS))
        for _ in range(chance.randrange(1, 12)):
            place = chance.randrange(len(data) + 1)
            data[place : place + chance.choice((0, 0, 1, 5))] = chance.choice(pieces) * chance.choice((1, 1, 1, 3))
        yield bytes(data)


def main(run: Callable[[bytes], None]) -> None:
    import atheris

    with atheris.instrument_imports(include=["enqueue", "releaser"]):
        for name in (
            "enqueue.address",
            "enqueue.message",
            "enqueue.options",
            "releaser.envelope",
            "releaser.message",
            "releaser.mta",
        ):
            importlib.import_module(name)
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS):
        (corpus / f"seed{number}").write_bytes(seed)
    atheris.Setup(sys.argv, run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(one_input)
