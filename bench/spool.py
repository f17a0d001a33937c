"""Mail by the thousand, and vhosts: copies of what the real commands have made, in a spool or in Postfix's maildrop."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from host import Host
from servers import Postfix

_number = count()
_NAME = re.compile(r"([0-9]+)\.[0-9]{6}\.(P[0-9]+)\.[0-9a-f]{24},S=([0-9]+)\Z")
_ARRIVED = re.compile(rb"(?m)^Arrived: .*$")
_BELL = re.compile(r"(?m)^Bell: ([0-9a-f]{32})$")


class Template:
    """A message as enqueue has stored it for a vhost, to be submitted again and again under other names."""

    def __init__(self, host: Host, vhost: str, message: bytes) -> None:
        """Leaves nothing in the maildrop. The releaser must not run."""
        drop = host.spool / "vhosts" / vhost
        before = set(os.listdir(drop / "new"))
        host.send(vhost, message=message)
        (stored,) = set(os.listdir(drop / "new")) - before
        name = _NAME.match(stored)
        assert name is not None
        self._whole, (_, self._pid, self._size) = stored.partition(",")[0].encode(), name.groups()
        self._data = (drop / "new" / stored).read_bytes()
        (drop / "new" / stored).unlink()
        self._new, self._tmp = f"{drop}/new", f"{drop}/tmp/bench"
        bell = _BELL.search((drop / "policy").read_text())
        assert bell is not None
        self._bell = f"{host.spool}/wake/{bell[1]}"

    def submit(self, ring: bool = True) -> None:
        """As enqueue does it, but for the sync."""
        now = time.time()
        name = f"{int(now):010d}.{int(now % 1 * 1e6):06d}.{self._pid}.{next(_number):024x}"
        arrived = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ").encode()
        data = _ARRIVED.sub(b"Arrived: " + arrived, self._data, count=1).replace(self._whole, name.encode())
        with open(self._tmp, "wb") as stream:
            stream.write(data)
        os.rename(self._tmp, f"{self._new}/{name},S={self._size}")
        if ring:
            os.utime(self._bell)

    def waiting(self) -> bool:
        """Whether anything is in the maildrop."""
        return bool(os.listdir(self._new))


def submit(host: Host, vhost: str, number: int, message: bytes) -> None:
    """NUMBER messages into new/ of VHOST, without ringing."""
    template = Template(host, vhost, message)
    for _ in range(number):
        template.submit(ring=False)


def add_vhosts(host: Host, names: Sequence[str]) -> None:
    """Maildrops: the first as `vhost add` makes it, the others copies of it with bells of their own."""
    host.add(names[0])
    first = host.spool / "vhosts" / names[0]
    text = (first / "policy").read_text()
    bell = _BELL.search(text)
    assert bell is not None
    for name in names[1:]:
        own = secrets.token_hex(16)
        os.mkfifo(host.spool / "wake" / own, (host.spool / "wake" / bell[1]).stat().st_mode & 0o777)
        drop = first.with_name(name)
        for path in (drop, drop / "tmp", drop / "new"):
            path.mkdir()
            shutil.copymode(first / path.relative_to(drop), path)
        (drop / "policy").write_text(text.replace(bell[1], own).replace(names[0], name))


def submit_to_postfix(postfix: Postfix, number: int, message: bytes) -> None:
    """NUMBER messages into the maildrop of a Postfix that is stopped: one of its sendmail command, and copies of it."""
    maildrop = postfix.directory / "queue/maildrop"
    before = set(os.listdir(maildrop))
    subprocess.run([postfix.sendmail(), "-t", "-i"], input=message, check=True, stderr=subprocess.DEVNULL)
    (first,) = set(os.listdir(maildrop)) - before
    data, mode = (maildrop / first).read_bytes(), (maildrop / first).stat().st_mode
    for _ in range(number - 1):
        path = Path(maildrop, f"{next(_number) + 0x10000000:X}")
        path.write_bytes(data)
        # By the owner's bits Postfix knows that it is whole.
        path.chmod(mode)
