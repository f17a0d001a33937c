"""Mail by the thousand: copies of what the real commands have stored, in a spool or in Postfix's maildrop."""

from __future__ import annotations

import os
import re
import subprocess
import time
from itertools import count
from pathlib import Path

from host import Host
from servers import Postfix

_number = count()
_NAME = re.compile(rb"[0-9]+\.[0-9]{6}\.P[0-9]+\.[0-9a-f]{24}")


def submit(host: Host, vhost: str, number: int, message: bytes) -> None:
    """NUMBER messages into new/ of VHOST: one that enqueue stores, and copies of it under names and Message-IDs of their own."""
    new = host.spool / "vhosts" / vhost / "new"
    before = set(os.listdir(new))
    host.send(vhost, message=message)
    (first,) = set(os.listdir(new)) - before
    data = (new / first).read_bytes()
    name = _NAME.match(first.encode())
    assert name is not None
    second, rest = first.split(".", 1)
    del second
    size = first.rpartition("=")[2]
    digits = len(first.split(".")[0])
    for _ in range(number - 1):
        now = time.time()
        own = f"{int(now):0{digits}d}.{int(now % 1 * 1e6):06d}.{rest.split('.')[1]}.{next(_number):024x}"
        (new / f"{own},S={size}").write_bytes(data.replace(name[0], own.encode()))


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
