"""Whom enqueue finds in a message is whom Postfix's own `sendmail -t` finds, or the message is refused.

The Postfix is a private one without a daemon: what its postdrop writes into maildrop/ is read and removed. Where enqueue
accepts, both must name the same mailboxes; where it refuses, that is right, and the well-formed mail below shows that it
does not refuse too much. Random messages come of a seed: DIFFERENTIAL_SEED (`random` for a new one) and DIFFERENTIAL_CASES
(how many) are read from the environment, and a failure says which to give.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import page
import pytest
from host import Host
from servers import LIBRARIES, MAIL_OWNER, POSTFIX, SETGID_GROUP

from enqueue import address, message, options
from enqueue import main as command
from enqueue.failure import DATAERR, Failure

pytestmark = pytest.mark.server

# The same every time, so that a run which looks for new disagreements is one that somebody wanted.
SEED = os.environ.get("DIFFERENTIAL_SEED", "20261123").replace("random", str(random.randrange(1 << 32)))
CASES = int(os.environ.get("DIFFERENTIAL_CASES") or 600)
VHOST = "www.a.example"


class Sendmail:
    """Postfix's sendmail and postdrop on a queue directory of their own, where nothing takes the mail from."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="pss-differential-", dir="/tmp"))
        self.maildrop = self.directory / "queue/maildrop"
        self.maildrop.mkdir(parents=True)
        (self.directory / "queue/public").mkdir()
        parameters = {
            "compatibility_level": "3.6",
            "queue_directory": f"{self.directory}/queue",
            "command_directory": f"{POSTFIX}/usr/sbin",
            "daemon_directory": f"{LIBRARIES}/sbin",
            "shlib_directory": str(LIBRARIES),
            "meta_directory": str(self.directory),
            "maillog_file": f"{self.directory}/log",
            "maillog_file_prefixes": str(self.directory),
            # postdrop, too, looks for its libraries in the directories of an installed Postfix.
            "import_environment": "MAIL_CONFIG TZ LANG=C LD_LIBRARY_PATH",
            "export_environment": "MAIL_CONFIG TZ LANG LD_LIBRARY_PATH",
            "mail_owner": MAIL_OWNER,
            "setgid_group": SETGID_GROUP,
            "myhostname": "mta.test",
            "inet_interfaces": "127.0.0.1",
            "message_size_limit": "52428800",
        }
        main_cf = self.directory / "main.cf"
        main_cf.write_text("".join(f"{name} = {value}\n" for name, value in parameters.items()))
        # Postfix waits until a main.cf is older than a second, lest somebody be writing it.
        os.utime(main_cf, (time.time() - 3600, time.time() - 3600))

    def recipients(self, data: bytes, words: Sequence[bytes], header: bool) -> list[bytes] | None:
        """The recipient records of the queue file, in Postfix's internal form; None where sendmail fails."""
        run = subprocess.run(
            [f"{POSTFIX}/usr/sbin/sendmail", "-i", *(["-t"] if header else []), "-f", "s@a.example", "--", *words],
            input=data,
            capture_output=True,
            env={"PATH": "/usr/bin:/bin", "MAIL_CONFIG": str(self.directory), "LD_LIBRARY_PATH": str(LIBRARIES)},
            timeout=60,
        )
        if run.returncode:
            assert b"error while loading" not in run.stderr, run.stderr
            assert not list(self.maildrop.iterdir())
            return None
        (file,) = self.maildrop.iterdir()
        found = [value for kind, value in records(file.read_bytes()) if kind == b"R"]
        file.unlink()
        return found

    def close(self) -> None:
        shutil.rmtree(self.directory)


def records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The records of a queue file: a letter, the length in groups of seven bits, the lowest first, and the bytes."""
    position = 0
    while position < len(content):
        kind = content[position : position + 1]
        length = shift = 0
        while True:
            position += 1
            length |= (content[position] & 127) << shift
            shift += 7
            if content[position] < 128:
                break
        yield kind, content[position + 1 : position + 1 + length]
        position += 1 + length


@pytest.fixture(scope="module")
def sendmail() -> Iterator[Sendmail]:
    postfix = Sendmail()
    yield postfix
    postfix.close()


# What the comparison does not see, and why; everything else must be equal byte for byte.


def internal(mailbox: bytes) -> bytes:
    """Our MAILBOX in Postfix's internal form: its local part without quotes and backslashes."""
    if not mailbox.startswith(b'"'):
        return mailbox
    end = mailbox.rindex(b'"')
    return re.sub(rb"\\(.)", rb"\1", mailbox[1:end], flags=re.DOTALL) + mailbox[end + 1 :]


def normal(flat: bytes) -> bytes:
    """A mailbox in internal form, as it is once Postfix's trivial-rewrite has seen it.

    Without a source route, which RFC 5321 tells to ignore; the domain in lower case, as A-labels, without a last dot.
    """
    flat = re.sub(rb"^(?:@(?:\[[^\]]*\]|[^:\[])*:)+", b"", flat)
    local, at, domain = flat.rpartition(b"@")
    if not domain.isascii():
        try:
            domain = domain.decode().encode("idna")
        except UnicodeError:
            pass
    return local + at + domain.lower().removesuffix(b".")


class Case:
    """A message, the words behind `--`, and whether -t is given."""

    def __init__(self, data: bytes, words: Sequence[bytes] = (), header: bool = True) -> None:
        self.data = data
        self.words = list(words)
        self.header = header

    def __repr__(self) -> str:
        return f"Case({self.data[:3000]!r}, {self.words!r}, {self.header})"

    def ours(self) -> set[bytes] | str:
        """Whom enqueue finds, or the sentence with which it refuses."""
        call = options.Call()
        call.recipients = [os.fsdecode(word) for word in self.words]
        call.from_header = self.header or not self.words
        pieces = iter([self.data] if self.data else [])
        try:
            found = command._recipients(call, message.Message(lambda: next(pieces, b"")))
        except Failure as failure:
            assert failure.status == DATAERR
            return failure.sentence
        return {normal(internal(mailbox)) for mailbox in found}

    def theirs(self, sendmail: Sendmail) -> set[bytes] | None:
        found = sendmail.recipients(self.data, self.words, self.header)
        return None if found is None else {normal(mailbox) for mailbox in found}


def agree(case: Case, sendmail: Sendmail, where: str = "") -> str:
    """What became of CASE: accepted by both, refused by both, or the sentence with which only we refuse."""
    ours, theirs = case.ours(), case.theirs(sendmail)
    if isinstance(ours, str):
        return "refused by both" if theirs is None else ours
    assert ours == theirs, f"{where}{case}: we say {ours}, Postfix says {theirs}"
    return "accepted"


# The pieces that random messages are made of.

MAILBOXES = [
    b"a@x.y", b"b@x.y", b"A@X.Y", b"c.d@x.y", b"root", b"e%f@x.y", b"h!u", b"a@[192.0.2.1]", b"a@[IPv6:2001:db8::1]", b"a@x.y.",
    b'"a b"@x.y', b'"a@b"@x.y', b'"a,b;c:d<e>"@x.y', b'"a\\"b"@x.y', b'"a\\\\"@x.y', b'""@x.y', "ü@x.y".encode(),
    "a@bücher.example".encode(), "a@BÜCHER.example".encode(), b"a@b\xfc.example", b"-t", b"=?utf-8?q?a=40x.y?=", b"a+b@x.y",
    b"a..b@x.y", b".a@x.y", b"a.@x.y", b"a@x_y.z", b"a . b @ x . y", b"a@x .y", b"a (c)@(d) x.y", b"a|b@x.y", b"a ! b",
    b"a% b@x.y",
    "a@straße.de".encode(), b'"a"."b"@x.y', b'a."b"@x.y', b'"q"b@x.y', b"a@b@c", b"a@", b"@x.y", b"a@-x.y", b"a@x..y",
]  # fmt: skip
WRITTEN = [
    b"%s", b"%s", b"<%s>", b"Name <%s>", b'"N, <n@x.y>" <%s>', b"J. R. Doe <%s>", b"<@r1.z,@r2.z:%s>", b"%s (c, (d))",
    b"(c) %s",
    b"< %s >", b"Name<%s>(c)", b"=?utf-8?Q?B=2C_A?= <%s>", b"G: %s;", b"G: %s, b@x.y;", b"G: %s", b"a@x.y <%s>", b"<%s", b"%s>",
    b'"%s', b"(%s", b"[%s", b"<%s> x", b"x] <%s>", b"\\%s", b"%s\\", b'"a \\" b" <%s>', b"DOM\\user <%s>", b"A\\( <%s>",
    b"A\\ <%s>",
]  # fmt: skip
SEPARATORS = [
    b", ",
    b",",
    b"; ",
    b";",
    b" ",
    b"\t",
    b",,",
    b" , ",
    b",\n ",
    b"\n\t",
    b",\r\n ",
    b"\n \n ",
    b"\r",
    b",\r",
    b":",
    b"(,)",
    b" " * 2040,
]
BITS = [
    b",", b";", b":", b"<", b">", b"(", b")", b"[", b"]", b'"', b"\\", b".", b"@", b"%", b"!", b"|", b" ", b"\t", b"\n ",
    b"\r", b"\0",
    b"\x0b", b"\x7f", b"\x1b", b"\xff", "ü".encode(), "，".encode(), "\u00a0".encode(), b"a", b"x.y", b"<>", b"()", b'""',
    b"[]", b"::",
    b"G:", b":;", b"a@x.y", b"\\\\", b'\\"', b"\\)", b"=?", b"\r\n ", b"\r\r\n\t",
]  # fmt: skip
NAMES = [
    b"To", b"Cc", b"Bcc", b"To", b"Cc", b"Bcc", b"TO", b"bCC", b"To ", b"Bcc\t", b"Cc \t ", b"Resent-To", b"Resent-Cc",
    b"resent-bcc",
    b"Resent-From", b"Resent-Reply-To", b"Apparently-To", b"Reply-To", b"Delivered-To", b"X-To", b"Subject", b"From",
    b"Return-Path",
    b"To\r", b"\rTo", b"T\ro", b"T o", b"\xef\xbb\xbfTo", b"T\xc3\xb6", b"", b" To", b"To\0", b"X" * 2050, b"To" + b" " * 2046,
]  # fmt: skip
ENDS = [b"\n", b"\n", b"\n", b"\r\n", b"\r\n", b"\r\r\n", b"\r", b"\r\r", b"\n\r", b"\r\n\r\n", b"\n\n", b""]
STRAY = [
    b"From me Mon Jan  1", b">From me", b">>From me", b">" * 100 + b"From me", b"From me\rTo: b@x.y", b"From " + b"x" * 2043,
    b"no field",
    b"", b" ", b"\t", b" \t ", b" junk", b": x", b".", b"To", b"\r", b"\0", b"\xef\xbb\xbf", b"X: y\rX-Domain: forged",
    b"X: y\rBcc: b@x.y",
    b"X: " + b"x" * 2045, b"Z: y\r\rBcc: b@x.y", b"-- ", b"Content-Type: multipart/mixed; boundary=b",
    b"Content-Type: message/rfc822",
]  # fmt: skip


def a_value(pick: random.Random) -> bytes:
    kind = pick.random()
    if kind < 0.15:
        return b"".join(pick.choice(BITS) for _ in range(pick.randrange(12)))
    pieces = []
    for _ in range(pick.choice((0, 1, 1, 1, 2, 2, 3, 4, 6))):
        pieces += [pick.choice(WRITTEN if kind > 0.5 else WRITTEN[:14]) % pick.choice(MAILBOXES), pick.choice(SEPARATORS)]
    if pieces and pick.random() < 0.8:
        pieces.pop()
    value = b"".join(pieces)
    return changed(value, pick) if pick.random() < 0.2 else value


def a_message(pick: random.Random) -> bytes:
    lines = []
    end = pick.choice(ENDS[:6])
    for _ in range(pick.choice((1, 1, 1, 2, 2, 3, 5))):
        if pick.random() < 0.15:
            lines.append(pick.choice(STRAY))
        else:
            name = pick.choice(NAMES[:6] if pick.random() < 0.6 else NAMES)
            lines.append(name + b":" + pick.choice((b" ", b" ", b"", b"\t", b"\n ", b"\r\n\t")) + a_value(pick))
    text = b"".join(line + (end if pick.random() < 0.85 else pick.choice(ENDS)) for line in lines)
    return text + pick.choice((end + b"body" + end, end, b"", end + b"Bcc: late@x.y" + end, b"body\rCc: late@x.y"))


def changed(data: bytes, pick: random.Random) -> bytes:
    """DATA with a few bytes removed, repeated, or replaced by a piece."""
    for _ in range(pick.choice((1, 1, 2, 4))):
        start = pick.randrange(len(data) + 1)
        length = pick.choice((0, 0, 1, 1, 2, 5))
        new = pick.choice((pick.choice(BITS), b"", bytes([pick.randrange(256)]), data[start : start + 10] * 2))
        data = data[:start] + new + data[start + length :]
    return data


def a_case(seed: str, number: int) -> Case:
    """The case of that number: the same for the same seed, whatever the others are."""
    pick = random.Random(f"{seed}/{number}")
    kind = pick.random()
    if kind < 0.3:
        old = pick.choice(CORPUS)
        return Case(changed(old.data[:5000], pick), old.words, old.header)
    if kind < 0.4:
        words = [(a_value(pick) if pick.random() < 0.9 else b"").replace(b"\0", b"") for _ in range(pick.choice((1, 1, 2, 3)))]
        return Case(a_message(pick), words, pick.random() < 0.6)
    if kind < 0.45:
        return Case(bytes(pick.choice(b'To: Cc\nBcc\r ,;<>"@a.x(\\)\t:[]') for _ in range(pick.randrange(40))))
    return Case(a_message(pick))


MANY = [b"r%04d@example.org" % number for number in range(5000)]


def field(length: int) -> bytes:
    """A To field of that many bytes with its line end."""
    return b"To: a@x.y," + b" " * (length - 17) + b"b@x.y\n"


def folded(length: int) -> bytes:
    return b"To: a@x.y,\n" + (b" " * 99 + b"\n") * (length // 100) + b" b@x.y\n"


ESCAPED = b'A "b c" <a@x.y>, (d) "e"@[192.0.2.1]'

CORPUS = [
    Case(b"To: a@x.y\nCc: b@x.y\nBcc: c@x.y\n\nb\n"),
    Case(b"To: a@x.y\n\n", [b"b@x.y", b"c@x.y, d@x.y", b"A <e@x.y>"]),
    Case(b"To: a@x.y\n\n", [b"b@x.y", b"c@x.y, d@x.y"], False),
    Case(b"To: a@x.y\n\n", [b"-t", b"-f", b"b@x.y"]),
    Case(b"To: a@x.y\n\n", [b""]),
    Case(b"To: a@x.y\n\n", [b"", b"b@x.y"], False),
    Case(b"To: a@x.y\n\n", [b"<>"], False),
    Case(b"To: a@x.y\n\n", [b"b@x.y\nc@x.y"], False),
    Case(b"To: a@x.y\n\n", [b"b@x.y\rc@x.y"]),
    Case(b"", [b"a@x.y"], False),
    Case(b""),
    Case(b"To : a@x.y\nBcc\t: b@x.y\n\n"),
    Case(b"To: a@x.y b@x.y; c@x.y\n\n"),
    Case(b"Resent-To: r@x.y\nTo: a@x.y\nBcc: b@x.y\n\n"),
    Case(b"Resent-From: r@x.y\nTo: a@x.y\n\n"),
    Case(b"Resent-Bcc:\nTo: a@x.y\n\n"),
    Case(b"To: <@r1.z,@r2.z:a@x.y>, <@[192.0.2.1]:b@x.y>\n\n"),
    Case(b"To: undisclosed-recipients:;\nBcc: b@x.y\n\n"),
    Case(b"To: G: a@x.y, B <b@x.y>;, H:;, c@x.y\n\n"),
    Case(b"To: G: a@x.y; H: b@x.y;\n\n"),
    Case(b"To: a@x.y; H: b@x.y;\n\n"),
    Case(b"To: A <a@x.y>; H: b@x.y;\n\n"),
    Case(b"To: G: H: a@x.y;;\n\n"),
    Case(b"To: G: a@x.y\n\n"),
    Case(b"To: a@x.y (c (d (e)) f), b@x.y\n\n"),
    Case(b'To: "open <a@x.y>, b@x.y\n\n'),
    Case(b"To: Foo <a@x.y\n\n"),
    Case(b"To: A\\( <a@x.y>, b@x.y) <c@x.y>\n\n"),
    Case(b"From me\nTo: a@x.y\n\n"),
    Case(b">>From me\nFrom you\r\nTo: a@x.y\nFrom us\nCc: b@x.y\n\n"),
    Case(b">" * 100 + b"From me\nTo: a@x.y\n\n"),
    Case(b"From " + b"x" * 2042 + b"\nTo: a@x.y\n\n"),
    Case(b"From " + b"x" * 2043 + b"\nTo: a@x.y\n\n"),
    Case(b"From me\rTo: b@x.y\nTo: a@x.y\n\n"),
    Case(b"To: a@x.y\rBcc: b@x.y\n\n"),
    Case(b"X: y\rX-Domain: forged\nTo: a@x.y\n\n"),
    Case(b"X: y\r\rTo: b@x.y\nTo: a@x.y\n\n"),
    Case(b"To: a@x.y\nX: y\r\rbody\nCc: b@x.y\n\n"),
    Case(b"To: a@x.y\rSubject: s\r\rbody\r"),
    Case(b"To: a@x.y,\r b@x.y\n\n"),
    Case(b'To: "a\rb"@x.y\n\n'),
    Case(b'To: "a\n b"@x.y, "a\tb" <c@x.y>\n\n'),
    Case(b"To\r: a@x.y\nTo: b@x.y\n\n"),
    Case(b"To: b@x.y\n\rTo: a@x.y\n\n"),
    Case(b"To: a@x.y\r\r\nCc: b@x.y\r\n\r\r\nb"),
    Case(b"To: a@x.y\0, b@x.y\n\n"),
    Case(b"\xef\xbb\xbfTo: a@x.y\n\n"),
    Case(b"\nTo: a@x.y\n\n"),
    Case(b" To: a@x.y\nCc: b@x.y\n\n"),
    Case(b"X: 1\r\n \r\nBcc: b@x.y\r\n\r\nb"),
    Case(b"X: 1\n\t\nTo: a@x.y\n \n,b@x.y\n\n"),
    Case(field(102_400) + b"\n"),
    Case(field(102_401) + b"\n"),
    Case(field(102_500) + b"\n"),
    Case(field(106_000) + b"\n"),
    Case(folded(102_200) + b"\n"),
    Case(folded(102_400) + b"\n"),
    Case(folded(103_000) + b"\n"),
    Case(b"To: a@x.y\nX: " + b"x" * 106_000 + b"\n\n"),
    Case(b"To: a@x.y\nX: " + b"x" * 106_000 + b"\n\n", [b"b@x.y"], False),
    Case(b"To: " + b", ".join(MANY) + b"\n\n"),
    Case(b"To: " + b",\r\n ".join(MANY) + b"\r\n\r\n"),
    Case(b"".join(b"To: " + mailbox + b"\n" for mailbox in MANY) + b"\n"),
    Case(b"To: a@x.y\nX" + b"y" * 2048 + b": z\nCc: b@x.y\n\n"),
    Case(b"X" + b" " * 2047 + b": z\nTo: a@x.y\n\n"),
    Case(b"X" + b" " * 2046 + b": z\nTo: a@x.y\n\n"),
    Case("To: ü@x.y, a@bücher.example, a@BÜCHER.Example\n\n".encode()),
    Case(b"To: J\xf6rg <a@x.y>, j\xf6rg@x.y\n\n"),
    Case(b"To: J\xf6rg <a@x.y>\n\n"),
    Case(b"To: root, a%b@x.y, h!u, a ! b, c % d@x.y\n\n"),
    Case(b"To: a !b@x.y\n\n"),
    Case(b"To: a@x.y !b\n\n"),
    Case(b"To: a@[192.0.2.1] .b\n\n"),
    Case(b"To: a@[192.0.2.1]b\n\n"),
    Case(b"To: =?utf-8?Q?b=40x.y?=, =?utf-8?Q?B=2C_A?= <c@x.y>\n\n"),
    Case(b"To: a@x.y\nto: b@x.y\nTO: a@x.y\n\n"),
    Case(b"To:\nCc: a@x.y\n\n"),
    Case(b"To: <>, Nobody <>, a@x.y\n\n"),
    Case(b'To: ""\n\n'),
    Case(b"Apparently-To: a@x.y\n\n"),
    Case(b"To: a@x.y\nBcc: b@x.y"),
    Case(b"To: a@x.y\nBcc: b@x.y\r"),
    Case(b'To: "a b"@x.y, "c@d"@x.y, "e\\"f\\\\"@x.y, "-o x"@x.y\n\n'),
    Case(b"To: a@[192.0.2.1], b@[IPv6:2001:db8::1], c@[192.0.\\2.1]\n\n"),
    Case(b"To: a. b@x.y, c .d@x.y, e@x. y, f@x .y, g . h @ x . y\n\n"),
    Case(b"To: " + b",\n ".join(MANY[:200]) + b"\n\n"),
    Case(b"To: a@x.y, a@X.Y\nCc: a@x.y\n\n", [b"a@x.y"]),
    Case(b"To: a\x0bb@x.y\n\n"),
    Case(b"To: A\x1bB <a@x.y>\n\n"),
]
# A backslash at every place.
CORPUS += [Case(b"To: " + ESCAPED[:place] + b"\\" + ESCAPED[place:] + b"\n\n") for place in range(len(ESCAPED) + 1)]


@pytest.mark.parametrize("number", range(len(CORPUS)))
def test_corpus(number: int, sendmail: Sendmail) -> None:
    """Each message of the corpus is for the same people in both programs, or refused."""
    agree(CORPUS[number], sendmail)


@pytest.mark.timeout(0)
def test_random_messages(sendmail: Sendmail) -> None:
    """So is each random one; and of each kind there are some."""
    became = Counter(
        agree(a_case(SEED, number), sendmail, f"DIFFERENTIAL_SEED={SEED}, case {number}: ") for number in range(CASES)
    )
    print(f"DIFFERENTIAL_SEED={SEED} DIFFERENTIAL_CASES={CASES}")
    for kind, count in became.most_common():
        print(f"{count:6} {kind}")
    assert became["accepted"] > CASES // 20 and became["refused by both"] > CASES // 20


# What is valid, or in common use, must not be refused: a message, the words behind `--`, and who gets it.
GOOD = [
    # PHP's mail(), PHPMailer, Symfony, nodemailer, git, cron, mailx, mdadm, as they write it.
    (b"To: a@x.y\nSubject: s\nX-PHP-Originating-Script: 33:a.php\nFrom: W <w@x.y>\n\nb\n", [], [b"a@x.y"]),
    (b"To: a@x.y\r\nSubject: s\r\nBcc: b@x.y\nReply-To: r@x.y\r\n\r\nb\r\n", [], [b"a@x.y", b"b@x.y"]),
    (b"To: a@x.y\r\r\nSubject: s\r\r\n\r\r\nb", [], [b"a@x.y"]),
    (b'Date: d\r\nTo: =?UTF-8?Q?J=C3=B6rg?= <a@x.y>, "B, C" <b@x.y>\r\nFrom: f@x.y\r\n\r\nb', [], [b"a@x.y", b"b@x.y"]),
    (b"To: a@x.y\r\nBcc: b@x.y\r\n\r\nb", [b"a@x.y", b"b@x.y"], [b"a@x.y", b"b@x.y"]),
    (b"From: f@x.y\nTo: a@x.y,\n\tB <b@x.y>\nCc: c@x.y\n\n", [], [b"a@x.y", b"b@x.y", b"c@x.y"]),
    (b"From: root (Cron Daemon)\nTo: root\nSubject: s\n\nb\n", [b"root"], [b"root"]),
    (b"From me@host Mon Jan  1 00:00:00 2026\nTo: a@x.y\n\n", [], [b"a@x.y"]),
    (b"To: undisclosed-recipients:;\nBcc: a@x.y, b@x.y\n\n", [], [b"a@x.y", b"b@x.y"]),
    (b"To: a@x.y", [], [b"a@x.y"]),
    # White space, separators and names, as people type them.
    (b"TO:a@x.y ;b@x.y,\nCC :\n c@x.y , \n\n", [], [b"a@x.y", b"b@x.y", b"c@x.y"]),
    (b"To: A B<a@x.y>, 'C' <c@x.y>; J. R. \"Bob\" D <d@x.y> (office)\n\n", [], [b"a@x.y", b"c@x.y", b"d@x.y"]),
    (b"To: DOMAIN\\user <a@x.y>, a@x.y <a@x.y>, O'Neil [sales] <o'neil@x.y>\n\n", [], [b"a@x.y", b"o'neil@x.y"]),
    (b"To: J\xf6rg <a@x.y>\n\n", [], [b"a@x.y"]),
    ("To: Jörg <jörg@x.y>, a@bücher.example\n\n".encode(), [], ["jörg@x.y".encode(), b"a@xn--bcher-kva.example"]),
    (b'To: "very.\\"(),:;<>[]\\".un usual"@x.y, a+b=c@x-y.z, _@1.2.y\n\n', [],
     [b'very."(),:;<>[]".un usual@x.y', b"a+b=c@x-y.z", b"_@1.2.y"]),
    (b"To: a@[192.0.2.1], a@[IPv6:2001:db8::1]\n\n", [], [b"a@[192.0.2.1]", b"a@[ipv6:2001:db8::1]"]),
    (b"To: Friends: a@x.y, B <b@x.y>;, Others: c@x.y;\n\n", [], [b"a@x.y", b"b@x.y", b"c@x.y"]),
    # A lone CR where it changes nobody.
    (b"To: a@x.y\r\nX-One: 1\rX-Domain: forged\r\n\r\nb", [], [b"a@x.y"]),
    (b"To: a@x.y\n\nold\rMac\rtext\r", [], [b"a@x.y"]),
    (b"To: " + b", ".join(MANY) + b"\n\n", [], MANY),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(GOOD)))
def test_good_mail_is_not_refused(number: int, sendmail: Sendmail) -> None:
    """What programs and people really write is accepted, for whom it says."""
    data, words, recipients = GOOD[number]
    case = Case(data, words)
    assert case.ours() == case.theirs(sendmail) == set(recipients)


ATEXT = "abcxyzABC019!#$&'*+-/=?^_`{}~"


def a_good_message(pick: random.Random) -> tuple[bytes, set[bytes]]:
    """A message as RFC 5322 has it, comments, folds, routes and groups among it, and who gets it in internal form."""
    everybody: set[bytes] = set()

    def text(letters: str, least: int = 1) -> str:
        return "".join(pick.choice(letters) for _ in range(pick.randrange(least, 8)))

    def blank() -> str:
        return pick.choice(("", "", " ", "\t", " (c, <d@x.y>; (e\\)))", f"{end} ", f"{end}\t "))

    def mailbox() -> str:
        domain = ".".join(text("abc0_") for _ in range(pick.randrange(1, 4)))
        if pick.random() < 0.2:
            local = text('ab ,;:<>()@[]."\\', 1)
            written = '"' + re.sub(r'(["\\])', r"\\\1", local) + '"'
        else:
            local = written = ".".join(text(ATEXT) for _ in range(pick.randrange(1, 3)))
        everybody.add(normal(f"{local}@{domain}".encode()))
        at = pick.choice(("@", "@", "@", " @ ", "(c)@(d)"))
        plain = f"{written}{at}{domain}"
        name = pick.choice(("", "Name", "J. R. Doe", '"N, <n@x.y>; \\" x"', "=?utf-8?Q?B=2C?=", f"A{end} B", "Jörg"))
        route = pick.choice(("", "", "", "@r1.z:", "@r1.z,@r2.z:"))
        return pick.choice((plain, plain, f"{name} <{blank()}{route}{plain}{blank()}>"))

    def mailboxes(least: int) -> str:
        return ",".join(f"{blank()}{mailbox()}{blank()}" for _ in range(pick.randrange(least, 5)))

    end = pick.choice(("\n", "\r\n"))
    head = f"From: f@x.y{end}Subject: s, t@x.y{end}"
    for name in pick.sample(("To", "Cc", "Bcc", "to", "CC "), pick.randrange(1, 4)):
        group = f",{blank()}Group x{blank()}:{mailboxes(0)}{blank()};" if pick.random() < 0.3 else ""
        head += f"{name}:{pick.choice(('', ' '))}{mailboxes(1)}{group}{end}"
    return f"{head}{end}b{end}".encode(), everybody


@pytest.mark.timeout(0)
def test_well_formed_messages_are_not_refused(sendmail: Sendmail) -> None:
    """A random message as RFC 5322 has it is accepted, for all whom it names and nobody else."""
    for number in range(CASES // 4):
        data, everybody = a_good_message(random.Random(f"{SEED}/good/{number}"))
        case = Case(data)
        where = f"DIFFERENTIAL_SEED={SEED}, good message {number}: {case}"
        assert case.ours() == everybody, where
        assert case.theirs(sendmail) == everybody, where


BREAKS = {
    "only a dot ties words": ("address._TIES", (b".",)),
    "a backslash is text": ("address._ESCAPED", b""),
    "a long line begins anywhere": ("message.MAX_START", 1 << 20),
    "a field is as long as it likes": ("message.MAX_FIELD", 1 << 20),
    "a lone CR ends a line, and that is that": (
        "message.Message.recipients", lambda self: message._recipients(self.fields)
    ),
    "a fold leaves nothing": (
        "message.Field.value", lambda self: self.raw.partition(b":")[2].replace(b"\n", b"").strip(b" \t")
    ),
    "a comment ends at the first parenthesis": (
        "address._comment", lambda value, position: value.find(b")", position) + 1 or len(value)
    ),
    "a display name is an address": ("address._element", lambda tokens: [data for kind, data in tokens if kind == "w"]),
    "no local part is quoted": ("address._closing", lambda value, position, mark: position + 1),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_lexer_is_found(name: str, sendmail: Sendmail, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: each mistake put into the lexer shows in the corpus."""
    target, mistake = BREAKS[name]
    monkeypatch.setattr(f"enqueue.{target}", mistake)
    with pytest.raises(AssertionError, match="we say"):
        for case in CORPUS:
            agree(case, sendmail)


def test_refusing_everything_is_found(sendmail: Sendmail, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a lexer pass that takes nothing."""
    monkeypatch.setattr(address, "MAX_ADDRESS", 0)
    with pytest.raises(AssertionError):
        test_good_mail_is_not_refused(0, sendmail)
    with pytest.raises(AssertionError):
        test_well_formed_messages_are_not_refused(sendmail)


# The real command.


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as installation:
        installation.add(VHOST)
        yield installation


def sent(host: Host, case: Case) -> list[bytes] | None:
    """The recipients in the file that the command writes; None where it refuses, and leaves nothing."""
    run = host.enqueue(VHOST, "-i", *(["-t"] if case.header else []), "--", *case.words, message=case.data)
    assert run.returncode in (0, DATAERR) and (run.returncode == 0) == (run.stderr == b""), run
    if run.returncode:
        assert host.ls() == []
        return None
    (name,) = host.ls()
    envelope, _, content = (host.spool / name).read_bytes().partition(b"\n\n")
    assert b"\r" not in content
    (host.spool / name).unlink()
    return [line.removeprefix(b"Recipient: ") for line in envelope.split(b"\n") if line.startswith(b"Recipient: ")]


def test_the_command_says_the_same(host: Host, sendmail: Sendmail) -> None:
    """The command stores the recipients that Postfix finds, each once, or ends with 65 and stores nothing."""
    for case in [*CORPUS, *(Case(data, words) for data, words, _ in GOOD), *(a_case(SEED, n) for n in range(CASES // 8))]:
        found, ours = sent(host, case), case.ours()
        if found is None:
            assert isinstance(ours, str), case
            continue
        assert len(found) == len(set(found)), case
        assert {normal(internal(mailbox)) for mailbox in found} == ours == case.theirs(sendmail), case


COUNTS = [
    ("To folded over 200 lines", Case(b"To: " + b",\n ".join(MANY[:200]) + b"\n\nb\n"), 200),
    ("three arguments", Case(b"Subject: s\n\nb\n", MANY[:3], False), 3),
    ("three arguments, and To without -t", Case(b"To: a@x.y\n\nb\n", MANY[:3], False), 3),
    ("three arguments, and To with -t", Case(b"To: a@x.y\n\nb\n", MANY[:3]), 4),
    ("one in To, Cc and an argument", Case(b"To: a@x.y\nCc: A <a@X.Y>\n\nb\n", [b"a@x.y"]), 1),
    ("5,000 in To", Case(b"To: " + b", ".join(MANY[:5000]) + b"\n\nb\n"), 5000),
    ("10,000 fields", Case(b"".join(b"To: r%d@x.y\n" % n for n in range(10_000)) + b"\nb\n"), 10_000),
    ("10,001 fields", Case(b"".join(b"To: r%d@x.y\n" % n for n in range(10_001)) + b"\nb\n"), None),
]


@pytest.mark.parametrize(("what", "case", "count"), COUNTS, ids=[what for what, _, _ in COUNTS])
def test_count(what: str, case: Case, count: int | None, host: Host) -> None:
    """So many recipients are stored, and counted against the limits."""
    found = sent(host, case)
    assert (None if found is None else len(found)) == count


ROWS = page.table(page.text("calling.md"), "recipients")


def test_page_has_examples() -> None:
    assert len(ROWS) > 20
    assert {"65", "nobody"} < {means for _, means in ROWS}


@pytest.mark.parametrize(("written", "means"), ROWS, ids=[written for written, _ in ROWS])
def test_page(written: str, means: str, sendmail: Sendmail) -> None:
    """Each value of the page's table means what the page says, to the command's code and to Postfix."""
    # Somebody else besides, so that a value that means nobody is no reason to refuse the message.
    case = Case(f"To: {written}\nCc: else@x.example\n\n".encode())
    if means == "65":
        assert isinstance(case.ours(), str)
        return
    named = [] if means == "nobody" else [internal(mailbox.encode()) for mailbox in means.split("`, `")]
    assert case.ours() == case.theirs(sendmail) == {normal(mailbox) for mailbox in [*named, b"else@x.example"]}
