"""The address lexer: which mailboxes a To:, Cc: or Bcc: value, or a recipient given as an argument, stands for.

What it returns is handed to the MTA as it is, one RCPT command each, so that the number counted is the number
delivered. Where MTAs and libraries disagree on a value (an open quote, text behind an angle address), it raises
Ambiguous instead of guessing. Standard: RFC 5322 section 3.4, with the obsolete forms that MTAs still accept:
`;` and white space as separators, source routes.
"""

MAX_ADDRESS = 320
# Of a domain's labels; as an A-label none has fewer characters than as it is written.
MAX_LABEL = 63

_SPACE = b" \t"
_SPECIAL = b'<>@,;:()[]"\\'
# Behind a backslash in a display name, as in `DOMAIN\user <a@x.example>`, everything else is harmless.
_ESCAPED = _SPECIAL + _SPACE
# What ties the word at its other side to an address, blanks or not. The dot is older than the others (RFC 822).
_TIES = (b".", b"%", b"!", b"|")

_NOT_ATEXT = b'()<>[]:;@\\," \t'
_LABEL = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"
# What IDNA takes for a dot (RFC 3490 section 3.1).
_DOTS = {ord(mark): "." for mark in "。．｡"}
_LITERAL = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:."

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
    group = False
    # What stands before the element.
    mark = ","
    while position < len(tokens):
        token = tokens[position]
        position += 1
        kind = token[0]
        if kind in ",;":
            found += _element(element)
            element = []
            mark = kind
            group = group and kind != ";"
        elif kind == ":":
            # What stood before is the name of a group.
            if group or any(k in "@a" for k, _ in element):
                raise Ambiguous("a colon behind an address")
            if mark == ";":
                # Postfix takes all since the last comma for the name.
                raise Ambiguous("a group behind ';' without a comma")
            element = []
            group = True
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
    found += _element(element)
    # MTAs disagree on where the group ends, and Postfix takes `Undisclosed recipients:` for an address.
    if group:
        raise Ambiguous("a group without its ';'")
    return found


def unique(addresses: list[bytes]) -> list[bytes]:
    """ADDRESSES without repeats; domains compare without case, local parts with it (RFC 5321 section 2.4)."""
    seen: dict[bytes, bytes] = {}
    for address in addresses:
        local, domain = _split(address)
        seen.setdefault(local + domain.lower(), address)
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
        if not joined.endswith(_TIES) and not word.startswith(_TIES):
            break
        joined += word
        position += 1
    return joined, position


def _domain(tokens: list[Token], position: int) -> tuple[bytes, int]:
    if position < len(tokens) and tokens[position][0] == "l":
        if position + 1 < len(tokens) and tokens[position + 1][1].startswith(_TIES):
            raise Ambiguous("text behind a domain in '[…]'")
        return tokens[position][1], position + 1
    domain, position = _dotted(tokens, position)
    if position < len(tokens) and tokens[position][0] in "@l":
        raise Ambiguous("more than one '@' in an address")
    return domain.removesuffix(b"."), position


def _checked(address: bytes) -> bytes:
    """ADDRESS with its domain as A-labels, if it is one that the releaser takes: spool_layout.md, Recipient."""
    try:
        text = address.decode()
    except UnicodeDecodeError:
        raise Ambiguous("an address that is not UTF-8") from None
    if not text.isprintable():
        raise Ambiguous("a character in an address that cannot be seen")
    local, domain = _split(address)
    if domain and not domain.isascii():
        if set("ßẞς") & set(text[len(local.decode()) :]):
            raise Ambiguous("a domain of two readings (IDNA 2003 and 2008 disagree on ß and ς): write it as xn--…")
        # The codec's time grows with the square of a label's length, and it looks at that last.
        if max(map(len, domain[1:].decode().translate(_DOTS).split("."))) > MAX_LABEL:
            raise Ambiguous(f"a domain with a part of more than {MAX_LABEL} characters")
        # RFC 5891: MTAs without SMTPUTF8 take a domain as A-labels only.
        try:
            domain = b"@" + domain[1:].decode().encode("idna")
        except UnicodeError:
            raise Ambiguous("a domain that is no valid international name") from None
    if len(local) + len(domain) > MAX_ADDRESS:
        raise Ambiguous(f"an address of more than {MAX_ADDRESS} bytes")
    if not _good_local(local) or (domain and not _good_domain(domain[1:])):
        raise Ambiguous("an address that no MTA takes")
    return local + domain


def _split(address: bytes) -> tuple[bytes, bytes]:
    """The local part, and the domain with its @, empty where there is none; an @ inside quotes is neither."""
    at = address.find(b"@", address.rfind(b'"') + 1) if address.startswith(b'"') else address.rfind(b"@")
    return (address, b"") if at < 0 else (address[:at], address[at:])


def _good_local(local: bytes) -> bool:
    """Words with dots, also where RFC 5321 has none but some providers do; or one quoted string."""
    if not local.startswith(b'"'):
        return not any(byte in _NOT_ATEXT for byte in local)
    inside = local[1:-1]
    # Escapes are of ASCII (RFC 5321 section 4.1.2), and nothing else stands outside the one pair of quotes.
    rest = inside.replace(b"\\\\", b"").replace(b'\\"', b"")
    escapes = rest.split(b"\\")[1:]
    return len(local) > 1 and b'"' not in rest and all(part and part[0] < 128 for part in escapes)


def _good_domain(domain: bytes) -> bool:
    if domain.startswith(b"["):
        return len(domain) > 2 and not domain[1:-1].strip(_LITERAL)
    return all(
        label and not label.strip(_LABEL) and not label.startswith(b"-") and not label.endswith(b"-")
        for label in domain.split(b".")
    )


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
        elif byte == b"\\" and (value[position + 1 : position + 2] or b" ") in _ESCAPED:
            # To Postfix the next byte is then text, wherever this stands: `\(` opens no comment.
            raise Ambiguous("a backslash before a special character or a blank")
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
