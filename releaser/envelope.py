"""The envelope: the lines before the message in every file of the spool. Pure; the page is spool_layout.md."""

import re
from dataclasses import dataclass, field, replace

from releaser import layout

# What enqueue writes at most: recipients, and bytes of envelope with their longest addresses.
MAX_RECIPIENTS = 10_000
MAX_ENVELOPE = 4 << 20
# Characters kept of what a caller claims about itself.
MAX_CLAIM = 1000

# Lines that enqueue writes, and lines that only the releaser writes; each once, but for Recipient and Failed.
SUBMITTED = (
    "Layout", "Vhost", "Sender", "Recipient", "Arrived", "Uid", "Cwd", "Program", "Script", "Script-Filename", "Notify",
    "Message-Id",
)  # fmt: skip
VERIFIED = ("Queue-Id", "Source", "Owner", "Picked-Up", "Held", "Reason", "Verified", "Failed")
MANY = ("Recipient", "Failed")
# What the fields of Envelope are called, by line: all that can be told, and of these what a caller can claim.
_ATTRIBUTES = {key: key.lower().replace("-", "_") for key in (*SUBMITTED[1:], *VERIFIED)}
_CLAIMED = frozenset(SUBMITTED[1:])

_WIDE = r"\u00a0-\ud7ff\ue000-\U0010ffff"
_ATEXT = rf"[A-Za-z0-9!#$%&'*+/=?^_`{{|}}~{_WIDE}-]"
# Dots also where RFC 5321 has none, since some providers do.
_LOCAL = rf"(?:(?:{_ATEXT}|\.)+|\"(?:[ !#-\[\]-~{_WIDE}]|\\[ -~])*\")"
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?"
_DOMAIN = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Za-z:.]+\])"
_VERSION = re.compile(r"Layout: ([1-9][0-9]{0,5})\Z")
_ADDRESS = re.compile(rf"{_LOCAL}(?:@{_DOMAIN})?\Z")
# RFC 3461 section 4.1, but for "success".
_NOTIFY = re.compile(r"(?:never|failure|delay|failure,delay)\Z")


class NoLayout(ValueError):
    """The bytes are no file of any layout."""


class NewerLayout(ValueError):
    """The bytes are of a layout newer than this program."""


@dataclass(frozen=True)
class Envelope:
    """Who, to whom, when, and what is known of the origin. Times are ISO 8601 in UTC, as written.

    What is not under "verified" is a claim of the process that submitted it.
    """

    vhost: str
    recipients: tuple[str, ...]
    # None: the caller gave none. Empty: the null sender.
    sender: str | None = None
    arrived: str = ""
    uid: str = ""
    cwd: str = ""
    program: str = ""
    # PHP's own header, and the variable of a CGI program's environment.
    script: str = ""
    script_filename: str = ""
    # Of what the MTA shall tell the sender; empty: as it does without being asked.
    notify: str = ""
    message_id: str = ""
    # Verified: written by the releaser alone.
    queue_id: str = ""
    source: str = ""
    owner: str = ""
    picked_up: str = ""
    held: str = ""
    reason: str = ""
    # "no" where the vhost is only claimed.
    verified: str = ""
    failed: tuple[str, ...] = field(default=())

    @property
    def origin(self) -> str:
        """The script as well as it is known: the page that was called, and the file that PHP names, or else the program."""
        if self.script_filename and self.script:
            return f"{self.script_filename} ({self.script})"[:MAX_CLAIM]
        return self.script_filename or self.script or self.program

    def with_(self, **changes: object) -> "Envelope":
        return replace(self, **changes)  # type: ignore[arg-type]

    def format(self) -> bytes:
        """The lines, with the empty line that ends them."""
        lines = [("Layout", str(layout.LAYOUT)), ("Vhost", self.vhost)]
        if self.sender is not None:
            lines.append(("Sender", self.sender))
        lines += [("Recipient", recipient) for recipient in self.recipients]
        for key in (*SUBMITTED[4:], *VERIFIED[:-1]):
            value = getattr(self, _ATTRIBUTES[key])
            if value:
                lines.append((key, value))
        lines += [("Failed", words) for words in self.failed]
        return "".join(f"{key}: {one_line(value)}\n" for key, value in lines).encode() + b"\n"


def parse(text: bytes, verified: bool) -> Envelope:
    """The envelope that TEXT, up to and without the empty line, spells; VERIFIED lines only where they are allowed.

    Raises NewerLayout, NoLayout.
    """
    try:
        lines = text.decode().split("\n")
    except UnicodeDecodeError:
        raise NoLayout("the envelope is not UTF-8") from None
    first = _VERSION.match(lines[0])
    if not first:
        raise NoLayout("the first line is not 'Layout: N'")
    version = int(first[1])
    if version > layout.LAYOUT:
        raise NewerLayout(f"layout {version} is newer than {layout.LAYOUT}, which this program reads")
    known = _ATTRIBUTES if verified else _CLAIMED
    # Nearly always none has what cannot be printed, and then none has a control character.
    printable = "".join(lines).isprintable()
    values: dict[str, list[str]] = {}
    for line in lines[1:]:
        key, colon, value = line.partition(": ")
        if not colon or key not in known:
            raise NoLayout(f"unknown envelope line {line[:60]!r}")
        if not printable and one_line(value) != value:
            raise NoLayout(f"a control character in the envelope line {key}")
        if key in values and key not in MANY:
            raise NoLayout(f"the envelope line {key} stands there twice")
        values.setdefault(key, []).append(value)
    sender = values.pop("Sender", [None])[0]
    recipients = values.pop("Recipient", [])
    failed = values.pop("Failed", [])
    single = {_ATTRIBUTES[key]: value[0][:MAX_CLAIM] for key, value in values.items()}
    vhost = single.pop("vhost", "")
    if not layout.is_vhost(vhost):
        raise NoLayout("no valid vhost in the envelope")
    if not 0 < len(recipients) <= MAX_RECIPIENTS:
        raise NoLayout(f"{len(recipients)} recipients in the envelope, between 1 and {MAX_RECIPIENTS} are allowed")
    if "notify" in single and not _NOTIFY.match(single["notify"]):
        raise NoLayout("the envelope line Notify is none of never, failure, delay")
    for address in recipients + ([sender] if sender else []):
        if not is_address(address):
            raise NoLayout("an address in the envelope that no MTA takes")
    return Envelope(vhost=vhost, recipients=tuple(recipients), sender=sender, failed=tuple(failed), **single)


def is_address(text: str) -> bool:
    """The one strict grammar for what may stand in MAIL FROM and RCPT TO: RFC 5321 section 4.1.2, the domain optional.

    Nor anything that cannot be seen, as enqueue has it: whom a mail goes to is read by people.
    """
    # The length first: the expression needs ninety bytes of memory for each character.
    return len(text) <= 320 and text.isprintable() and bool(_ADDRESS.match(text)) and len(text.encode()) <= 320


def one_mailbox(address: str) -> bool:
    """Whether the MTA delivers ADDRESS to that one mailbox as far as can be known.

    It has a domain, and before that something without `%`, `!` and `@`: Postfix looks inside quotes for these where the
    domain is its own (resolve_dequoted_address), and delivers what is empty to MAILER-DAEMON.
    """
    local, domain = split(address)
    return bool(domain) and local != '""' and not set("%!@") & set(local)


def split(address: str) -> tuple[str, str]:
    """Local part and domain of ADDRESS, the domain empty where there is none; an @ inside quotes belongs to the local part."""
    at = address.find("@", address.rfind('"') + 1) if address.startswith('"') else address.rfind("@")
    return (address, "") if at < 0 else (address[:at], address[at + 1 :])


def one_line(value: str) -> str:
    """VALUE without control characters (C0, DEL, C1), as an envelope value must be."""
    if value.isprintable():
        return value
    return "".join("?" if c < " " or "\x7f" <= c <= "\x9f" else c for c in value)
