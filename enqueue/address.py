"""The address lexer: which mailboxes a To:, Cc: or Bcc: value, or a recipient given as an argument, stands for.

What it returns is handed to the MTA as it is, one RCPT command each, so that the number counted is the number
delivered. Where MTAs and libraries disagree on a value (an open quote, text behind an angle address), it raises
Ambiguous instead of guessing. Standard: RFC 5322 section 3.4, with the obsolete forms that MTAs still accept:
`;` and white space as separators, source routes.
"""

MAX_ADDRESS = 320

_SPACE = b" \t"
_SPECIAL = b'<>@,;:()[]"\\'

# A token is its kind and its bytes. Kinds: w (a word: atom or quoted string), l (domain literal), a (an angle
# address, its bytes already a mailbox, empty for <>), x (a stray special), and , ; : < > @ for themselves.
Token = tuple[str, bytes]


class Ambiguous(ValueError):
    """The value has no single reading."""


def mailboxes(value: bytes) -> list[bytes]:
    """The mailboxes in VALUE, in order, as `local@domain` or, unqualified, `local`; groups are flattened.

    Raises Ambiguous.
    """
    found: list[bytes] = []
    element: list[Token] = []
    tokens = _tokens(value)
    position = 0
    while position < len(tokens):
        token = tokens[position]
        position += 1
        kind = token[0]
        if kind in ",;":
            found += _element(element)
            element = []
        elif kind == ":":
            # What stood before is the name of a group.
            if any(k in "@a" for k, _ in element):
                raise Ambiguous("a colon behind an address")
            element = []
        elif kind == "<":
            end = position
            while end < len(tokens) and tokens[end][0] != ">":
                if tokens[end][0] == "<":
                    raise Ambiguous("'<' inside '<…>'")
                end += 1
            if end == len(tokens):
                raise Ambiguous("'<' without '>'")
            element.append(("a", _angle(tokens[position:end])))
            position = end + 1
        elif kind == ">":
            raise Ambiguous("'>' without '<'")
        else:
            element.append(token)
    return found + _element(element)


def unique(addresses: list[bytes]) -> list[bytes]:
    """ADDRESSES without repeats; domains compare without case, local parts with it (RFC 5321 section 2.4)."""
    seen: dict[bytes, bytes] = {}
    for address in addresses:
        local, at, domain = address.rpartition(b"@")
        seen.setdefault(local + at + domain.lower(), address)
    return list(seen.values())


def _element(tokens: list[Token]) -> list[bytes]:
    """One element of the list: `phrase <mailbox>`, or mailboxes with white space between them."""
    angles = [data for kind, data in tokens if kind == "a"]
    if not angles:
        return _plain(tokens)
    if len(angles) > 1 or tokens[-1][0] != "a":
        raise Ambiguous("text behind '<…>' without a comma")
    return angles if angles[0] else []


def _angle(tokens: list[Token]) -> bytes:
    if tokens and tokens[0][0] == "@":
        # A source route, which RFC 5321 appendix C tells to ignore.
        colons = [n for n, (kind, _) in enumerate(tokens) if kind == ":"]
        if len(colons) != 1:
            raise Ambiguous("a source route without its colon")
        tokens = tokens[colons[0] + 1 :]
        if not tokens:
            raise Ambiguous("a source route without a mailbox")
    found = _plain(tokens)
    if len(found) > 1:
        raise Ambiguous("more than one mailbox inside '<…>'")
    return found[0] if found else b""


def _plain(tokens: list[Token]) -> list[bytes]:
    found = []
    position = 0
    while position < len(tokens):
        local, position = _dotted(tokens, position)
        if position < len(tokens) and tokens[position][0] == "@":
            domain, position = _domain(tokens, position + 1)
            found.append(_checked(local + b"@" + domain))
        else:
            found.append(_checked(local))
    return found


def _dotted(tokens: list[Token], position: int) -> tuple[bytes, int]:
    """A word, joined with those that a dot at either side ties to it."""
    if position == len(tokens) or tokens[position][0] != "w":
        raise Ambiguous("a special character where an address should be")
    joined = tokens[position][1]
    position += 1
    while position < len(tokens) and tokens[position][0] == "w":
        word = tokens[position][1]
        if not joined.endswith(b".") and not word.startswith(b"."):
            break
        joined += word
        position += 1
    return joined, position


def _domain(tokens: list[Token], position: int) -> tuple[bytes, int]:
    if position < len(tokens) and tokens[position][0] == "l":
        return tokens[position][1], position + 1
    domain, position = _dotted(tokens, position)
    if position < len(tokens) and tokens[position][0] in "@l":
        raise Ambiguous("more than one '@' in an address")
    return domain.removesuffix(b"."), position


def _checked(address: bytes) -> bytes:
    if len(address) > MAX_ADDRESS:
        raise Ambiguous(f"an address of more than {MAX_ADDRESS} bytes")
    if address.isascii():
        return address
    local, at, domain = address.rpartition(b"@")
    try:
        local.decode()
        # RFC 5891: MTAs without SMTPUTF8 take a domain as A-labels only.
        return local + at + domain.decode().encode("idna") if at else address
    except UnicodeError:
        raise Ambiguous("an address that is neither valid UTF-8 nor a valid international domain") from None


def _tokens(value: bytes) -> list[Token]:
    tokens: list[Token] = []
    position, end = 0, len(value)
    while position < end:
        start = position
        byte = value[position : position + 1]
        if byte in _SPACE:
            position += 1
        elif byte == b"(":
            position = _comment(value, position)
        elif byte == b'"':
            position = _closing(value, position, b'"')
            tokens.append(("w", value[start:position]))
        elif byte == b"[":
            position = _closing(value, position, b"]")
            tokens.append(("l", value[start:position]))
        elif byte in b"<>@,;:":
            tokens.append((byte.decode(), byte))
            position += 1
        elif byte in b")]\\":
            tokens.append(("x", byte))
            position += 1
        else:
            while position < end and value[position] not in _SPECIAL and value[position] not in _SPACE:
                if value[position] < 32 or value[position] == 127:
                    raise Ambiguous("a control character in an address")
                position += 1
            tokens.append(("w", value[start:position]))
    return tokens


def _closing(value: bytes, position: int, mark: bytes) -> int:
    """The place behind the MARK that closes the quoted string or literal which opens at POSITION."""
    position += 1
    while position < len(value):
        byte = value[position]
        if byte == 0x5C:
            position += 1
        elif byte == mark[0]:
            return position + 1
        if position < len(value) and (value[position] < 32 or value[position] == 127) and value[position] != 9:
            raise Ambiguous("a control character inside a quoted part")
        position += 1
    raise Ambiguous(f"an opening mark without {mark.decode()}")


def _comment(value: bytes, position: int) -> int:
    depth = 0
    while position < len(value):
        byte = value[position]
        position += 1
        if byte == 0x5C:
            position += 1
        elif byte == 0x28:
            depth += 1
        elif byte == 0x29:
            depth -= 1
            if not depth:
                return position
    raise Ambiguous("an open comment")
