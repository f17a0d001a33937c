"""The releaser's own directories: copies made whole or not at all, moved by rename, never changed. Rows: spool_layout.md."""

import os
import shutil
import stat
from collections.abc import Iterable
from typing import BinaryIO

from releaser import envelope, layout

# Ours are longer than those that are submitted: a recipient of the longest kind can have the MTA's words beside it.
MAX_ENVELOPE = 8 * envelope.MAX_ENVELOPE


def store(spool: str, queue: str, queue_id: str, head: bytes, chunks: Iterable[bytes]) -> tuple[int, bool]:
    """Make HEAD and CHUNKS durable as QUEUE/QUEUE_ID; return the size of CHUNKS and whether they are all ASCII.

    Raises OSError with nothing left behind but perhaps a dot file, which start-up removes.
    """
    partial = layout.partial(spool, queue, queue_id)
    size, ascii_only = 0, True
    try:
        with open(partial, "wb") as stream:
            stream.write(head)
            for chunk in chunks:
                stream.write(chunk)
                size += len(chunk)
                ascii_only = ascii_only and chunk.isascii()
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(partial, layout.path(spool, queue, queue_id))
        sync_directory(f"{spool}/{queue}")
    except BaseException:
        for path in (partial, layout.path(spool, queue, queue_id)):
            if os.path.exists(path):
                os.unlink(path)
        raise
    return size, ascii_only


def replace(spool: str, queue: str, queue_id: str, head: bytes, message: BinaryIO) -> None:
    """Give QUEUE/QUEUE_ID another head; MESSAGE is read from where it is. Raises OSError, and then it is as it was."""
    partial = layout.partial(spool, queue, queue_id)
    try:
        with open(partial, "wb") as stream:
            stream.write(head)
            shutil.copyfileobj(message, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(partial, layout.path(spool, queue, queue_id))
    except BaseException:
        if os.path.exists(partial):
            os.unlink(partial)
        raise


def read(path: str) -> tuple[envelope.Envelope, BinaryIO]:
    """The envelope of a file in one of our directories, and the file, to be read from the message's first byte on.

    Raises OSError, envelope.NoLayout, envelope.NewerLayout.
    """
    # What lies there is a regular file of ours, unless someone has taken our place: never a link, and never to wait for.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    stream = os.fdopen(fd, "rb")
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise envelope.NoLayout("not a regular file")
        head = b""
        while (end := head.find(b"\n\n")) < 0:
            chunk = stream.read(1 << 16)
            if not chunk or len(head) > MAX_ENVELOPE:
                raise envelope.NoLayout("the envelope has no end")
            head += chunk
        found = envelope.parse(head[:end], verified=True)
        stream.seek(end + 2)
    except BaseException:
        stream.close()
        raise
    return found, stream


def message(path: str) -> BinaryIO:
    """The message of a file, as read() gives it."""
    return read(path)[1]


def move(spool: str, queue_id: str, source: str, target: str, sync: bool = True) -> None:
    """Rename a message from SOURCE to TARGET; done already is fine. Where it is not to SYNC, its caller does, for many."""
    try:
        os.rename(layout.path(spool, source, queue_id), layout.path(spool, target, queue_id))
    except FileNotFoundError:
        if not os.path.exists(layout.path(spool, target, queue_id)):
            raise
    if sync:
        sync_directory(f"{spool}/{target}")


def remove(spool: str, queue: str, queue_id: str) -> None:
    """Unlink a message; gone already is fine."""
    try:
        os.unlink(layout.path(spool, queue, queue_id))
    except FileNotFoundError:
        pass


def listing(spool: str, queue: str) -> list[str]:
    """The queue ids in QUEUE, in order."""
    return sorted(name for name in os.listdir(f"{spool}/{queue}") if layout.is_queue_id(name))


def remove_partial(spool: str) -> None:
    """Remove the copies that a crash left half written."""
    for queue in layout.QUEUES:
        for name in os.listdir(f"{spool}/{queue}"):
            if name.startswith(".") and layout.is_queue_id(name[1:]):
                os.unlink(layout.partial(spool, queue, name[1:]))


def sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
