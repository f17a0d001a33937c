"""The error logs that administrators and customers read, in the original tool's words."""

import os
import stat
import time

PREFIX = "[secure-sendmail]"


class NotWritten(OSError):
    """The line could not be written; the text says why."""


def collected(now: float, rows: int, retention: int) -> str:
    """The line that garbage collection writes; RETENTION in seconds, NOW since 1970."""
    return f"[{time.asctime(time.localtime(now))}] {PREFIX} GC was run ({rows} rows older than {_span(retention)} deleted)"


def append(path: str, line: str, not_inside: tuple[str, ...]) -> None:
    """Add LINE to the regular file PATH, reached without following a link; made only in a directory of our own.

    Raises NotWritten, also for a path below one of NOT_INSIDE.
    """
    if any(f"{path}/".startswith(f"{directory}/") for directory in not_inside) or "/../" in path:
        raise NotWritten(f"{path}: an error log must not lie in {' or '.join(not_inside)}")
    *parents, name = path.strip("/").split("/")
    directory = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for parent in parents:
            inner = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            os.close(directory)
            directory = inner
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        if os.fstat(directory).st_uid == os.geteuid():
            flags |= os.O_CREAT
        fd = os.open(name, flags, 0o640, dir_fd=directory)
    except OSError as error:
        raise NotWritten(f"{path}: {error.strerror}") from None
    finally:
        os.close(directory)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise NotWritten(f"{path}: not a regular file")
        os.write(fd, line.encode() + b"\n")
    except OSError as error:
        raise NotWritten(f"{path}: {error.strerror or error}") from None
    finally:
        os.close(fd)


def _span(seconds: int) -> str:
    return f"{seconds // 3600} hours" if seconds % 3600 == 0 else f"{seconds} seconds"
