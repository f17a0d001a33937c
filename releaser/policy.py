"""The policy file: what the releaser tells enqueue about a vhost. Advisory; grammar: spool_layout.md."""

import os

from releaser import layout
from releaser.config import Config

VERSION = 1


def render(config: Config, vhost: str, bell: str, max_size: int) -> bytes:
    """The policy of VHOST; MAX_SIZE is the largest message in bytes."""
    settings = config.vhost(vhost)
    lines = [
        ("Policy", str(VERSION)),
        ("Bell", bell),
        ("Max-Size", str(max_size)),
        ("Domain-Header", config.domain_header),
        ("Complaints-Header", config.complaints_header),
        ("Complaints-To", config.complaints_to),
    ]
    if settings.sender:
        lines.append(("Sender", settings.sender))
    lines.append(("End", str(VERSION)))
    return "".join(f"{key}: {value}\n" for key, value in lines).encode()


def bell(spool: str, vhost: str) -> str | None:
    """The name of the vhost's bell, as its policy has it."""
    for line in _read(spool, vhost).split(b"\n"):
        if line.startswith(b"Bell: "):
            name = line[6:].decode("ascii", "replace")
            return name if layout.is_bell(name) else None
    return None


def write(spool: str, vhost: str, text: bytes) -> None:
    """Replace the policy where TEXT differs; not synced, since an absent one only costs a bell. Raises OSError."""
    if _read(spool, vhost) == text:
        return
    path = f"{layout.maildrop(spool, vhost)}/policy"
    with open(f"{path}.new", "wb") as stream:
        stream.write(text)
    os.chmod(f"{path}.new", 0o640)
    os.rename(f"{path}.new", path)


def _read(spool: str, vhost: str) -> bytes:
    try:
        with open(f"{layout.maildrop(spool, vhost)}/policy", "rb") as stream:
            return stream.read(65536)
    except OSError:
        # What cannot be read is written again, or said when that fails.
        return b""
