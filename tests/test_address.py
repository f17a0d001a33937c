"""The address lexer: as many mailboxes as the MTA delivers to, or Ambiguous."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enqueue import address
from enqueue.message import MAX_FIELD
from releaser import envelope

PROPERTY = settings(max_examples=200, derandomize=False, print_blob=True, deadline=None)

# Values of a To: field, and whom Postfix's `sendmail -t` delivers to.
DELIVERED = [
    (b"a@x.y", [b"a@x.y"]),
    (b"a@x.y, b@x.y", [b"a@x.y", b"b@x.y"]),
    (b"a@x.y b@x.y c@x.y", [b"a@x.y", b"b@x.y", b"c@x.y"]),
    (b"a@x.y\tb@x.y", [b"a@x.y", b"b@x.y"]),
    (b"a@x.y; b@x.y; c@x.y", [b"a@x.y", b"b@x.y", b"c@x.y"]),
    (b"a@x.y,, ,b@x.y,", [b"a@x.y", b"b@x.y"]),
    (b"<@r1.z,@r2.z:a@x.y>", [b"a@x.y"]),
    (b"<@r1.z:a@x.y>, b@x.y", [b"a@x.y", b"b@x.y"]),
    (b"alice@x.y]<bob@x.y>", [b"bob@x.y"]),
    (b"alice@x.y <bob@x.y>", [b"bob@x.y"]),
    (b"=?utf-8?Q?b=40x.y?=", [b"=?utf-8?Q?b=40x.y?="]),
    (b"=?utf-8?Q?B=2C_A?= <b@x.y>", [b"b@x.y"]),
    (b"undisclosed-recipients:;", []),
    (b"Friends: a@x.y, b@x.y;", [b"a@x.y", b"b@x.y"]),
    (b"Friends: a@x.y, b@x.y; c@x.y", [b"a@x.y", b"b@x.y", b"c@x.y"]),
    (b'"My, friends": a@x.y;, none:;, b@x.y', [b"a@x.y", b"b@x.y"]),
    (b"Friends: A <a@x.y>, B <b@x.y>;", [b"a@x.y", b"b@x.y"]),
    (b"a@x.y (one, two), b@x.y", [b"a@x.y", b"b@x.y"]),
    (b"a(x(y(z))<n@x.y>)@(, )x.y", [b"a@x.y"]),
    (b"(only a comment)", []),
    (b"a@x.y (escaped \\) b@x.y)", [b"a@x.y"]),
    (b'"Doe, Jane" <jane@x.y>, b@x.y', [b"jane@x.y", b"b@x.y"]),
    (b'"a <b@x.y>" <c@x.y>', [b"c@x.y"]),
    (b'"a b"@x.y', [b'"a b"@x.y']),
    (b'"a,b@x.y;"@x.y', [b'"a,b@x.y;"@x.y']),
    (b'"a\\"b"@x.y', [b'"a\\"b"@x.y']),
    (b'"-o x"@x.y', [b'"-o x"@x.y']),
    (b"J. R. Doe <j.r@x.y>", [b"j.r@x.y"]),
    (b"j . r @ x . y", [b"j.r@x.y"]),
    (b"a@[192.0.2.1]", [b"a@[192.0.2.1]"]),
    (b"a@[IPv6:2001:db8::1]", [b"a@[IPv6:2001:db8::1]"]),
    (b"root", [b"root"]),
    (b"a%b@x.y, h!u", [b"a%b@x.y", b"h!u"]),
    (b"a % b@x.y, h! u c|d @x.y", [b"a%b@x.y", b"h!u", b"c|d@x.y"]),
    (b"DOMAIN\\user <a@x.y>", [b"a@x.y"]),
    (b"a@[192.0.2.1] b", [b"a@[192.0.2.1]", b"b"]),
    (b"a@x.y;, G: b@x.y;", [b"a@x.y", b"b@x.y"]),
    (b"-t", [b"-t"]),
    (b"A <a@x.y>, B <b@x.y>", [b"a@x.y", b"b@x.y"]),
    (b"A@X.Y", [b"A@X.Y"]),
    (b"a@x.y.", [b"a@x.y"]),
    (b"<>", []),
    (b"<>, a@x.y", [b"a@x.y"]),
    (b"Nobody <>", []),
    (b"", []),
    (b" \t", []),
]


@pytest.mark.parametrize(("value", "expected"), DELIVERED)
def test_same_as_postfix(value: bytes, expected: list[bytes]) -> None:
    """The lexer finds whom Postfix delivers to."""
    assert address.mailboxes(value) == expected


# Values on which MTAs and libraries disagree, or that no MTA delivers to.
AMBIGUOUS = [
    b"Foo <a@x.y",
    b'"abc <a@x.y>, b@x.y',
    b"(abc a@x.y, b@x.y",
    b"a@[x.y, b@x.y",
    b"a@x.y>",
    b"<a@x.y> b@x.y",
    b"<a@x.y> trailing",
    b"<a@x.y><b@x.y>",
    b"A <B <a@x.y>>",
    b"<a@x.y, b@x.y>",
    b"<a@x.y b@x.y>",
    b"<a@x.y; b@x.y>",
    b"a@b@c",
    b"a@x.y@",
    b"a@",
    b"@x.y",
    b"a@x.y: b@x.y;",
    b"<@r1.z,@r2.z>",
    b"<@r1.z:>",
    b"<@r1.z:@r2.z:a@x.y>",
    b"a)@x.y",
    b"a\\@x.y",
    b"a]@x.y",
    b"a@x.y\\, b@x.y",
    b"A\\( <a@x.y>, b@x.y) <c@x.y>",
    b'A \\"b" <a@x.y>',
    b"A \\ <a@x.y>",
    b"A <a@x.y>, \\",
    b"a@[192.0.2.1] .b",
    b"a@[192.0.2.1]!b",
    b"a@x.y; G: b@x.y;",
    b"G: a@x.y; H: b@x.y;",
    b"G: a@x.y",
    b"undisclosed-recipients:",
]


@pytest.mark.parametrize("value", AMBIGUOUS)
def test_ambiguous_is_refused(value: bytes) -> None:
    """What has no single reading is refused, never guessed."""
    with pytest.raises(address.Ambiguous):
        address.mailboxes(value)


@pytest.mark.parametrize("byte", [*range(9), *range(10, 32), 127])
@pytest.mark.parametrize("value", ["a%s@x.y", "a@x%s.y", '"a%sb"@x.y', '"a\\%sb"@x.y', "a@[192.%s0.2.1]", "<a@x.y%s>"])
def test_control_characters_are_refused(value: str, byte: int) -> None:
    """No control character gets into an address."""
    with pytest.raises(address.Ambiguous):
        address.mailboxes((value % chr(byte)).encode())


INTERNATIONAL = [
    ("a@bücher.example", b"a@xn--bcher-kva.example"),
    ("a@BÜCHER.example", b"a@xn--bcher-kva.example"),
    ("a@пример.испытание", b"a@xn--e1afmkfd.xn--80akhbyknj4f"),
    ("Jörg <jörg@x.y>", "jörg@x.y".encode()),
    ("jörg@bücher.example", "jörg@xn--bcher-kva.example".encode()),
    ("Bücher: a@x.y;", b"a@x.y"),
]


@pytest.mark.parametrize(("value", "expected"), INTERNATIONAL)
def test_international_domain_becomes_a_labels(value: str, expected: bytes) -> None:
    """A domain is handed over as A-labels (RFC 5891), a local part as it is."""
    assert address.mailboxes(value.encode()) == [expected]


NOT_INTERNATIONAL = [
    b"a@b\xfccher.example",
    b"j\xf6rg@x.y",
    b"\xff",
    b"\xff\xfe",
    # Characters that nameprep (RFC 3491) maps to , @ > space and /.
    "a@x，y.z".encode(),
    "a@b＠c.d".encode(),
    "a@b＞.c".encode(),
    "a@ü\u00a0b.c".encode(),
    "a@b／ü.c".encode(),
    # 64 characters in a label.
    b"a@" + "ü".encode() * 64 + b".c",
    # Short enough as it stands, above 320 bytes as A-labels.
    b"a@" + "ü.".encode() * 100 + b"c",
    "a@ü..c".encode(),
    # IDNA 2003 makes another domain of these than IDNA 2008 does.
    "a@straße.example".encode(),
    "a@STRAẞE.example".encode(),
    "a@ς.example".encode(),
]


@pytest.mark.parametrize("value", NOT_INTERNATIONAL)
def test_bad_international_address_is_refused(value: bytes) -> None:
    """Latin-1, what is no host name behind the mapping, and what becomes too long, is refused."""
    with pytest.raises(address.Ambiguous):
        address.mailboxes(value)


@pytest.mark.parametrize("end", ["", ".c", "。c"])
def test_long_international_domain_is_refused_at_once(end: str) -> None:
    """The codec takes time that grows with the square of a label's length, so it sees none that is too long."""
    domain = "".join(chr(0x4E00 + number) for number in range(10_000))
    start = time.process_time()
    with pytest.raises(address.Ambiguous):
        address.mailboxes(f"a@{domain}{end}".encode())
    assert time.process_time() - start < 1


def test_length() -> None:
    """An address has at most 320 bytes."""
    longest = b"a" * 64 + b"@" + (b"b" * 60 + b".") * 4 + b"c" * 11
    assert len(longest) == 320
    assert address.mailboxes(longest) == [longest]
    assert address.mailboxes(b"x" * 1000 + b" <" + longest + b">") == [longest]
    for longer in (longest + b"c", b"a" * 321, b"<" + longest + b"c>", "ü".encode() * 161 + b"@x.y"):
        with pytest.raises(address.Ambiguous):
            address.mailboxes(longer)


UNIQUE = [
    ([], []),
    ([b"a@x.y", b"b@x.y", b"a@x.y"], [b"a@x.y", b"b@x.y"]),
    ([b"a@x.y", b"a@X.Y"], [b"a@x.y"]),
    ([b"A@x.y", b"a@x.y"], [b"A@x.y", b"a@x.y"]),
    ([b"root", b"Root", b"root"], [b"root", b"Root"]),
    ([b'"a@B"@x.y', b'"a@b"@x.y'], [b'"a@B"@x.y', b'"a@b"@x.y']),
    ([b"b@x.y", b"a@x.y", b"b@x.Y"], [b"b@x.y", b"a@x.y"]),
]


@pytest.mark.parametrize(("addresses", "expected"), UNIQUE)
def test_duplicates(addresses: list[bytes], expected: list[bytes]) -> None:
    """The same mailbox named twice is one recipient: local parts compare with case, domains without."""
    assert address.unique(addresses) == expected


# A megabyte of what could make a scanner start again at every byte.
ADVERSARIAL = [b"(", b"<", b'"', b",", b":", b"[", b".", b"(\\", b"<@a,", b"a@b.c ", "ü,".encode()]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("piece", ADVERSARIAL)
def test_a_megabyte_ends_soon(piece: bytes) -> None:
    """Whatever the bytes are, the lexer comes to an end: a megabyte of any special does."""
    try:
        address.mailboxes(piece * ((1 << 20) // len(piece)))
    except address.Ambiguous:
        pass


@pytest.mark.timeout(5)
@pytest.mark.parametrize("piece", [b". ", b"a . ", b'"a" . '])
def test_a_field_of_dots_ends_soon(piece: bytes) -> None:
    """Words that dots tie together do not slow down the longest field that is read."""
    with pytest.raises(address.Ambiguous):
        address.mailboxes(piece * (MAX_FIELD // len(piece)))


PIECES = [
    b"a", b"b.c", b"@", b"x.y", b"a@x.y", b",", b";", b":", b"<", b">", b"(", b")", b"[", b"]", b'"', b"\\", b".", b" ", b"\t",
    b"-", b"\0", b"\x7f", b"\xff", "ü".encode(), "＠".encode(), "，".encode(), b"%", b"!", b"[192.0.2.1]", b'"a b"', b"xn--",
]  # fmt: skip
VALUES = st.one_of(st.binary(max_size=60), st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join))


@PROPERTY
@given(VALUES)
def test_nothing_but_ambiguous(value: bytes) -> None:
    """On any bytes the lexer returns mailboxes or raises Ambiguous, and nothing else."""
    try:
        found = address.mailboxes(value)
    except address.Ambiguous:
        return
    assert all(isinstance(mailbox, bytes) and mailbox for mailbox in found)


# Mailboxes that lexers take, and that a strict grammar may not.
LOOSE = [
    b"a..b@x.y", b"a.@x.y", b".a@x.y", b"a@x..y", b"a@.x.y", b"a@-x.y", b"a@x.y-", b"a@[x y]", b"a@[]", b'a."b"@x.y',
    b'a@"x.y"', b'"a\tb"@x.y', b'"a\\\tb"@x.y', '"a\\ü"@x.y'.encode(), "ü\u0085@x.y".encode(), "a@ü_b.c".encode(), b"a@x/y",
    '"ü@ü"'.encode(),
]  # fmt: skip


def accepted(value: bytes) -> list[bytes]:
    try:
        return address.mailboxes(value)
    except address.Ambiguous:
        return []


@pytest.mark.parametrize("value", LOOSE)
def test_loose_address_is_refused_at_the_door_or_sent(value: bytes) -> None:
    """An address that the releaser's grammar refuses is refused by the lexer: mail answered with 0 is no corrupt file."""
    assert all(envelope.is_address(mailbox.decode()) for mailbox in accepted(value))


@PROPERTY
@given(VALUES)
def test_every_mailbox_passes_the_releasers_grammar(value: bytes) -> None:
    """Whatever the lexer hands over, the releaser takes for an address."""
    assert all(envelope.is_address(mailbox.decode()) for mailbox in accepted(value))


ATOM = st.text("abcXYZ019!#$&'*+/=?^_`{|}~-", min_size=1, max_size=8)
DOTTED = st.lists(ATOM, min_size=1, max_size=3).map(".".join)
QUOTED = st.text('ab ,;:<>()@[]."\\', max_size=8).map(lambda text: '"' + re.sub(r'(["\\])', r"\\\1", text) + '"')
DOMAIN = st.from_regex(r"[a-z0-9]{1,8}(\.[a-z0-9]{1,8}){0,2}", fullmatch=True)
MAILBOX = st.builds(lambda local, domain: f"{local}@{domain}".encode(), st.one_of(DOTTED, QUOTED), DOMAIN)
COMMENT = st.text("ab ,;<>@", max_size=5).map(lambda text: f"({text})".encode())
SPACE = st.one_of(st.sampled_from([b"", b" ", b"\t", b" \t "]), COMMENT)
WRITTEN = [b"%s", b"<%s>", b"Name <%s>", b'"N, <n@x.y>" <%s>', b"J. Doe <%s>", b"<@route.z:%s>", b"%s (c, (d))"]


@PROPERTY
@given(st.lists(st.tuples(MAILBOX, st.sampled_from(WRITTEN), SPACE, SPACE, st.sampled_from([b",", b";", b",,"])), max_size=8))
def test_as_many_as_were_written(elements: list[tuple[bytes, bytes, bytes, bytes, bytes]]) -> None:
    """However the mailboxes of a list are written, the lexer finds each of them, in order, and no other."""
    value = b"".join(before + form % mailbox + after + mark for mailbox, form, before, after, mark in elements)
    assert address.mailboxes(value) == [mailbox for mailbox, *_ in elements]


@PROPERTY
@given(st.lists(MAILBOX))
def test_unique_loses_nobody(mailboxes: list[bytes]) -> None:
    """Without its duplicates a list still names the same mailboxes, each once, and in order."""
    found = address.unique(mailboxes)
    assert address.unique(found) == found
    assert {m.rpartition(b"@")[0] + b"@" + m.rpartition(b"@")[2].lower() for m in mailboxes} == set(found)
