"""The spool's directories, names and timers, as spool_layout.md documents them."""

import os
import re
import time
from functools import lru_cache
from typing import NamedTuple

# The layout that this program writes; it reads every one up to it.
LAYOUT = 2


class Place(NamedTuple):
    """A directory, FIFO or file: "root", "releaser" or "customer" as owner and group, and its mode.

    In private mode everything is one uid's, and of the mode only what it says of the owner holds.
    """

    owner: str
    group: str
    mode: int


SPOOL = Place("root", "root", 0o711)
STATE = Place("releaser", "releaser", 0o700)
# Below SPOOL. Made by `secure-sendmail vhost add`, compared by `check`.
DIRECTORIES = {
    "vhosts": Place("root", "releaser", 0o751),
    "wake": Place("root", "releaser", 0o751),
    "active": Place("releaser", "releaser", 0o700),
    "hold": Place("releaser", "releaser", 0o700),
    "failed": Place("releaser", "releaser", 0o700),
    "corrupt": Place("releaser", "releaser", 0o700),
    "trash": Place("releaser", "releaser", 0o700),
}
# The gate, which lets one group or the users of an ACL through; nobody can list what lies behind it.
VHOST_DIRECTORIES = {
    "": Place("releaser", "customer", 0o2710),
    "tmp": Place("releaser", "releaser", 0o3733),
    "new": Place("releaser", "releaser", 0o3733),
}
BELL = Place("releaser", "customer", 0o620)
POLICY_MODE = 0o644
# The shared maildrop of all vhosts that have none of their own: a name that no vhost can have, open to everyone.
UNREGISTERED = "_unregistered"
UNREGISTERED_GATE = Place("releaser", "releaser", 0o2711)
UNREGISTERED_BELL = Place("releaser", "releaser", 0o622)
QUEUES = ("active", "hold", "failed", "corrupt", "trash")

# enqueue counts in tmp/REFUSED<uid>, a byte each, what it has refused at the door.
REFUSED = "refused."

# The bell that the administrator's command rings; a vhost's own has a random name.
CONTROL_BELL = "control"
CONTROL_BELL_PLACE = Place("releaser", "releaser", 0o600)

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


@lru_cache(20_000)
def is_maildrop(text: str) -> bool:
    """The name of a directory below vhosts/."""
    return text == UNREGISTERED or is_vhost(text)


def of_uid(uid: int) -> str:
    """How a policy names all that UID submits through the shared maildrop; no vhost can have such a name."""
    return f"uid:{uid}"


def is_of_uid(text: str) -> bool:
    return text.startswith("uid:")


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


def maildrop(spool: str, name: str) -> str:
    """The directory of vhost NAME, or the shared one. Raises ValueError on what is no host name."""
    if not is_maildrop(name):
        raise ValueError(f"{name[:80]!r} is not a host name such as www.example.com")
    return f"{spool}/vhosts/{name}"
