"""Paths that nobody but their owners can change: what root follows, and what a configuration lies on."""

import errno
import grp
import os
import pwd
import stat
import time
from collections.abc import Container
from functools import lru_cache

# As many symbolic links as the kernel follows.
MAX_LINKS = 40

# Seconds after which the accounts are read again.
ACCOUNTS_AGE = 60


class Untrusted(Exception):
    """Someone else could write it, or put another in the place of it; the text says what, and what to do."""


def check(path: str, owners: Container[int]) -> None:
    """Raise Untrusted where a uid that is not of OWNERS can change PATH, or anything on the way to it.

    Every directory and every symbolic link is looked at, since whoever can change one of them can. Sticky directories
    may be writable. Raises OSError where PATH does not exist.
    """
    found, todo, links = "", os.path.abspath(path).split("/"), 0
    while todo:
        name = todo.pop(0)
        if name in ("", ".") and found:
            continue
        if name == "..":
            found = os.path.dirname(found)
            continue
        found = f"{found}/{name}" if found != "/" else f"/{name}"
        status = os.lstat(found)
        if status.st_uid not in owners:
            raise Untrusted(f"{found}: owned by uid {status.st_uid}; it must belong to root or to uid {os.geteuid()}")
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if links > MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            target = os.readlink(found)
            found = "" if target.startswith("/") else os.path.dirname(found)
            todo = target.split("/") + todo
            continue
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        foreign_group = status.st_mode & stat.S_IWGRP and not _private_group(status.st_gid, status.st_uid)
        if not sticky and (status.st_mode & stat.S_IWOTH or foreign_group):
            raise Untrusted(f"{found}: writable by others (mode {stat.S_IMODE(status.st_mode):04o}); run: chmod go-w {found}")


def members(gid: int) -> set[int]:
    """The uids of group GID: those that are listed in it, and those whose own group it is."""
    found = set(_accounts(int(time.monotonic()) // ACCOUNTS_AGE).get(gid, ()))
    try:
        listed = grp.getgrgid(gid).gr_mem
    except KeyError:
        return found
    for name in listed:
        try:
            found.add(pwd.getpwnam(name).pw_uid)
        except KeyError:
            # A name without an account can enter nothing.
            continue
    return found


def own_group(uid: int) -> int | None:
    """The group of the account UID; None where there is no account."""
    try:
        return pwd.getpwuid(uid).pw_gid
    except KeyError:
        return None


@lru_cache(maxsize=1)
def _accounts(_when: int) -> dict[int, set[int]]:
    """By gid the uids of the accounts whose own group it is; read once for as many vhosts as there are."""
    found: dict[int, set[int]] = {}
    for entry in pwd.getpwall():
        found.setdefault(entry.pw_gid, set()).add(entry.pw_uid)
    return found


def _private_group(gid: int, uid: int) -> bool:
    """Whether group GID is root's, or has no member besides UID."""
    if gid == 0:
        return True
    try:
        pwd.getpwuid(uid)
        grp.getgrgid(gid)
    except KeyError:
        return False
    return members(gid) <= {uid}
