"""Where the spool lies: what check warns of, because one customer could harm the others there."""

import os
import re
from dataclasses import dataclass

from releaser import mysql_log
from releaser.config import Config

MOUNTS = "/proc/self/mountinfo"
# The kinds of file systems whose quotas their mount options tell of, and these options. Others count in ways of their own.
KINDS = frozenset(("ext2", "ext3", "ext4", "xfs", "tmpfs", "f2fs", "jfs"))
QUOTAS = frozenset(("quota", "usrquota", "grpquota", "prjquota", "uquota", "gquota", "pquota", "usrjquota", "grpjquota"))
LOCAL = frozenset(("localhost", "127.0.0.1", "::1"))


@dataclass(frozen=True)
class Mount:
    """What proc(5) says of a mount: where it is, the kind of its file system, and the options of that."""

    point: str
    kind: str
    options: frozenset[str]


def warnings(spool: str) -> list[str]:
    """A sentence for each way in which SPOOL's place lets one customer harm the others."""
    said = []
    with open(MOUNTS, encoding="utf-8", errors="surrogateescape") as stream:
        mount = _mount_of(spool, stream.read())
    if mount.point != os.path.realpath(spool):
        said.append(
            f"{spool}: no mount of its own: whoever can move a file of another user into a maildrop has it sent as that user's; "
            "bind it to itself, nosuid,nodev,noexec, as the installation's mount unit does"
        )
    if os.path.isdir(spool) and _device(spool) == _device("/"):
        said.append(
            f"{spool}: on the file system of /: mail that fills it fills that, and what else fills that stops mail; "
            "better on one of its own"
        )
    if mount.kind in KINDS and not mount.options & QUOTAS:
        said.append(
            f"{spool}: its file system has no quotas: one customer can fill it, and then all mail is refused; "
            "mount it with usrquota, and give each customer a quota: setquota(8)"
        )
    return said


def of_mysql(settings: Config) -> list[str]:
    """A sentence where MySQL cannot be reached, has older tables than it could have, or its data where the spool is."""
    server = settings.mysql
    if server is None:
        return []
    said, data = [], ""
    try:
        with mysql_log.connect(server) as session, session.cursor() as cursor:
            cursor.execute("SELECT @@datadir")
            found = cursor.fetchone()
            data = str(found[0]) if found else ""
            version = mysql_log.version_of(session)
        if version < mysql_log.SCHEMA_VERSION:
            said.append(f"[mysql]: the tables are of version {version}, an older one; run: secure-sendmail log migrate")
    except Exception as error:
        said.append(f"[mysql]: {mysql_log.words(error)}: the log waits in the ledger")
    local = server.unix_socket is not None or server.host in LOCAL
    if local and os.path.isdir(data) and os.path.isdir(settings.spool) and _device(data) == _device(settings.spool):
        said.append(f"{settings.spool}: on the file system of MySQL's data, {data}: each can fill it for the other")
    return said


def _device(path: str) -> int:
    return os.stat(path).st_dev


def _mount_of(path: str, mounts: str) -> Mount:
    """The mount that PATH lies in, of the lines of MOUNTS."""
    # White space in them is octal. The last mount of a point hides those before.
    found, wanted = Mount("/", "", frozenset()), os.path.realpath(path)
    for line in mounts.splitlines():
        words, _, rest = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), words.split(" ")[4])
        kind, _, options = rest.split(" ", 2)
        if (wanted == point or wanted.startswith(point.rstrip("/") + "/")) and len(point) >= len(found.point):
            found = Mount(point, kind, frozenset(option.partition("=")[0] for option in options.split(",")))
    return found
