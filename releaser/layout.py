"""The spool's directories, names and timers, as spool_layout.md documents them."""

import os
import re
import time

# The layout that this program writes; it reads every one up to it.
LAYOUT = 1

# Below SPOOL, with their modes in private mode. Made by `secure-sendmail vhost add`, compared by `check`.
DIRECTORIES = {
    "vhosts": 0o700,
    "wake": 0o700,
    "active": 0o700,
    "hold": 0o700,
    "failed": 0o700,
    "corrupt": 0o700,
    "trash": 0o700,
}
VHOST_DIRECTORIES = {"": 0o700, "tmp": 0o700, "new": 0o700}
QUEUES = ("active", "hold", "failed", "corrupt", "trash")

# The bell that the administrator's command rings; a vhost's own has a random name.
CONTROL_BELL = "control"

# Woken: look at once. Not woken: look every SCAN_INTERVAL seconds anyway. Never spin.
SCAN_INTERVAL = 30
# A file in tmp/ this many seconds unchanged has lost its writer.
TMP_MAX_AGE = 36 * 3600
# A file in new/ that is not as long as its name says may still be written for this many seconds.
INCOMPLETE_MAX_AGE = 600

_QUEUE_ID = re.compile(r"[0-9A-F]{17}\Z")
_SUBMITTED = re.compile(rb"[0-9]{1,12}\.[0-9]{6}\.P[0-9]{1,10}\.[0-9a-f]{24},S=([0-9]{1,15})\Z")
_BELL = re.compile(r"[0-9a-f]{32}\Z")
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_VHOST = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*\Z")


def new_queue_id() -> str:
    """A queue id: microseconds since 1970 and 12 random bits, in 17 upper-case hexadecimal digits; sorts by time."""
    return f"{time.time_ns() // 1000:014X}{os.urandom(2).hex()[:3].upper()}"


def is_queue_id(text: str) -> bool:
    return bool(_QUEUE_ID.match(text))


def is_vhost(text: str) -> bool:
    """A host name (RFC 1123) in lower case, at most 253 characters, no trailing dot."""
    return bool(_VHOST.match(text))


def is_bell(text: str) -> bool:
    return bool(_BELL.match(text))


def submitted_size(name: bytes) -> int | None:
    """The size that a name in new/ claims, in bytes; None when it is no such name."""
    match = _SUBMITTED.match(name)
    return int(match[1]) if match else None


def path(spool: str, queue: str, queue_id: str) -> str:
    """The only place that joins a queue id to a path. Raises ValueError on what is no queue id."""
    if queue not in QUEUES or not is_queue_id(queue_id):
        raise ValueError(f"{queue_id[:40]!r} is not a queue id")
    return f"{spool}/{queue}/{queue_id}"


def partial(spool: str, queue: str, queue_id: str) -> str:
    """The name of a copy that is still being written: a dot file, which no reader looks at."""
    return f"{spool}/{queue}/.{os.path.basename(path(spool, queue, queue_id))}"


def maildrop(spool: str, vhost: str) -> str:
    """The vhost's directory. Raises ValueError on what is no host name."""
    if not is_vhost(vhost):
        raise ValueError(f"{vhost[:80]!r} is not a host name such as www.example.com")
    return f"{spool}/vhosts/{vhost}"
