"""The policy file: what the releaser tells enqueue about a vhost. Advisory; grammar: spool_layout.md."""

import math
import os
from collections.abc import Sequence

from releaser import layout
from releaser.config import Config

VERSION = 1
# Seconds.
UNTIL_STEP = 1800


def render(
    config: Config, name: str, bell: str, max_size: int, warnings: Sequence[tuple[str, str]] = (), now: float = 0,
    refusals: Sequence[tuple[str, str]] = (), until: float = math.inf,
) -> bytes:  # fmt: skip
    """The policy of the maildrop NAME; MAX_SIZE is the largest message in bytes.

    WARNINGS and REFUSALS are (vhost, sentence): they hold until an hour after NOW at most, half an hour at least, and no
    longer than UNTIL. Times are seconds since 1970.
    """
    lines = [
        ("Policy", str(VERSION)),
        ("Bell", bell),
        ("Max-Size", str(max_size)),
        ("Domain-Header", config.domain_header),
        ("Complaints-Header", config.complaints_header),
        ("Complaints-To", config.complaints_to),
    ]
    sender = config.vhost(name).sender if name != layout.UNREGISTERED else None
    if sender:
        lines.append(("Sender", sender))
    if warnings or refusals:
        # In steps of half an hour, so that the file changes no more often.
        lines.append(("Until", str(round(min(int(now) // UNTIL_STEP * UNTIL_STEP + 2 * UNTIL_STEP, until)))))
        lines += [("Warning", f"{vhost} {line}") for vhost, line in warnings]
        lines += [("Refuse", f"{vhost} {sentence}") for vhost, sentence in refusals]
    lines.append(("End", str(VERSION)))
    return "".join(f"{key}: {value}\n" for key, value in lines).encode()


def bell(spool: str, vhost: str) -> str | None:
    """The name of the vhost's bell, as its policy has it."""
    for line in _read(spool, vhost).split(b"\n"):
        if line.startswith(b"Bell: "):
            name = line[6:].decode("ascii", "replace")
            return name if layout.is_bell(name) else None
    return None


def refusals(spool: str, name: str, now: float) -> list[tuple[str, str]]:
    """(vhost, sentence) of what enqueue refuses at NOW, as the policy of the maildrop NAME has it."""
    lines = [line.partition(": ") for line in _read(spool, name).decode("utf-8", "replace").split("\n")]
    if not any(key == "Until" and value.isdecimal() and now < int(value) for key, _, value in lines):
        return []
    return [(value.partition(" ")[0], value.partition(" ")[2]) for key, _, value in lines if key == "Refuse"]


def write(spool: str, vhost: str, text: bytes) -> None:
    """Replace the policy where TEXT differs; not synced, since an absent one only costs a bell. Raises OSError."""
    if _read(spool, vhost) == text:
        return
    path = f"{layout.maildrop(spool, vhost)}/policy"
    try:
        os.unlink(f"{path}.new")
    except FileNotFoundError:
        pass
    fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as stream:
        stream.write(text)
        os.fchmod(fd, layout.POLICY_MODE)
    os.rename(f"{path}.new", path)


def _read(spool: str, vhost: str) -> bytes:
    try:
        # Non-blocking: it could be anything if someone has taken our place.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(f"{layout.maildrop(spool, vhost)}/policy", flags), "rb") as stream:
            return stream.read(65536) or b""
    except OSError:
        # What cannot be read is written again, or said when that fails.
        return b""
