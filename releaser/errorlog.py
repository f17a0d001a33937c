"""The error logs that administrators and customers read, in the original tool's words."""

import os
import stat
import time

from releaser import maillog
from releaser.limits import Limit
from releaser.maillog import LOG

PREFIX = "[secure-sendmail]"


class NotWritten(OSError):
    """The line could not be written; the text says why."""


def collected(now: float, what: str, retention: int) -> str:
    """The line that garbage collection writes of WHAT it deleted; RETENTION in seconds, NOW since 1970."""
    return f"{_stamp(now)} {PREFIX} GC was run ({what} older than {span(retention)} deleted)"


def exceeded(now: float, vhost: str, limit: Limit, over_limit: str) -> str:
    """The warning that the original wrote, and behind it what becomes of the mail. NOW in seconds since 1970."""
    span = f"{limit.seconds // 60} minutes" if limit.seconds % 60 == 0 else f"{limit.seconds} seconds"
    becomes = {
        "hold": "mail over the limit is held for review",
        "observe": 'mail over the limit is sent all the same, over_limit is "observe"',
        "reject": "mail over the limit is refused",
    }[over_limit]
    return f"{_stamp(now)} {PREFIX} domain {vhost}: exceeded limit for {span} ({limit.count}): {becomes}"


def ended(now: float, vhost: str, messages: int, over_limit: str, since: float) -> str:
    """The line at the end of an incident that began SINCE."""
    became = {"hold": "held", "observe": "would have been held", "reject": "refused or held"}[over_limit]
    count = f"{messages} message{'' if messages == 1 else 's'} {became}"
    return f"{_stamp(now)} {PREFIX} domain {vhost}: within its limits again ({count} since {_asctime(since)})"


def append(path: str, line: str, not_inside: tuple[str, ...]) -> None:
    """Add LINE to the regular file PATH, reached without following a link; made only in a directory of our own.

    Raises NotWritten, also for a path inside one of NOT_INSIDE.
    """
    try:
        fd = _open(path, not_inside, create=True)
    except OSError as error:
        raise NotWritten(f"{path}: {error.strerror or error}") from None
    data = line.encode() + b"\n"
    try:
        written = os.write(fd, data)
    except OSError as error:
        raise NotWritten(f"{path}: {error.strerror or error}") from None
    finally:
        os.close(fd)
    if written < len(data):
        raise NotWritten(f"{path}: there was room for a part of the line only")


def tell(path: str | None, line: str, not_inside: tuple[str, ...]) -> None:
    """append(), where PATH is configured; that it could not be written is said in the daemon's own log."""
    try:
        if path is not None:
            append(path, line, not_inside)
    except NotWritten as error:
        LOG.error(maillog.error_log_not_written(str(error)))


def problem(path: str, not_inside: tuple[str, ...]) -> str | None:
    """Why append() would fail, as far as that can be known without writing."""
    try:
        os.close(_open(path, not_inside, create=False))
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return None


def _open(path: str, not_inside: tuple[str, ...], create: bool) -> int:
    """PATH, for appending; without CREATE /dev/null where it would be made. Raises OSError."""
    closed = {(status.st_dev, status.st_ino) for status in map(os.stat, not_inside)}
    *parents, name = path.strip("/").split("/")
    way = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for parent in parents:
            inner = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=way)
            os.close(way)
            way = inner
            status = os.fstat(way)
            if parent == ".." or (status.st_dev, status.st_ino) in closed:
                raise NotWritten(f"an error log must not lie in {' or '.join(not_inside)}, nor be named with '..'")
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        ours = os.fstat(way).st_uid == os.geteuid()
        try:
            fd = os.open(name, flags | (os.O_CREAT if ours and create else 0), 0o640, dir_fd=way)
        except FileNotFoundError:
            if ours and not create:
                return os.open(os.devnull, flags)
            raise
    finally:
        os.close(way)
    status = os.fstat(fd)
    # A second name could be that of a file that is meant for something else.
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(fd)
        raise NotWritten("not a regular file with one name")
    if status.st_uid == os.geteuid() and not status.st_size:
        # Whatever the umask is: for the group of the directory's log readers.
        os.fchmod(fd, 0o640)
    return fd


def _asctime(now: float) -> str:
    return time.asctime(time.localtime(now))


def _stamp(now: float) -> str:
    return f"[{_asctime(now)}]"


def span(seconds: int) -> str:
    """In words."""
    return f"{seconds // 3600} hours" if seconds % 3600 == 0 else f"{seconds} seconds"
