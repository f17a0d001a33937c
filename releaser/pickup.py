"""Reading the maildrop: look before believing, read once, hand on the bytes as they will be sent."""

import errno
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from itertools import islice

from releaser import envelope, layout, message
from releaser.room import LACKS

# Up to this many bytes a message stays in memory; a larger one is copied to disk first and streamed.
SMALL = 1 << 20
CHUNK = 1 << 18
# Of a file that is no message, or that has to wait: one in tmp/, one in new/.
MOST_NAMES = 2

# Errors at opening that are the file's own and do not pass: a symbolic link, a device or socket, no right to read.
OF_THE_FILE = (errno.ELOOP, errno.ENXIO, errno.EACCES, errno.EPERM)


class Corrupt(Exception):
    """No message; it belongs into corrupt/. The text says why."""


class NotYet(Exception):
    """Not to be read now; it stays in new/. The text says why."""


class Submitted:
    """A file in new/, opened and judged: its owner, its envelope, its header, and the rest still to be read.

    Raises FileNotFoundError, Corrupt, NotYet, and OSError where there is no room to open it.
    """

    def __init__(self, spool: str, maildrop: str, name: bytes, max_size: int) -> None:
        """MAX_SIZE is the largest message in bytes."""
        self.maildrop = maildrop
        self.name = name
        claimed = layout.submitted_size(name)
        if claimed is None:
            raise Corrupt("not named as a submitted message is")
        self.path = os.fsencode(layout.maildrop(spool, maildrop)) + b"/new/" + name
        try:
            # Never through a symbolic link, and never waiting for the other end of a FIFO or a lease.
            self._fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise
        except OSError as error:
            # What the file itself is cannot pass; anything else does.
            if error.errno in LACKS:
                raise
            if error.errno in OF_THE_FILE:
                raise Corrupt(f"cannot be opened: {error.strerror}") from None
            raise NotYet(f"cannot be opened now: {error.strerror}") from None
        try:
            self.status = os.fstat(self._fd)
            self._judge(claimed, max_size)
            self._digest = hashlib.sha256()
            self._read_head()
        except BaseException:
            self.close()
            raise

    def _judge(self, claimed: int, max_size: int) -> None:
        if not stat.S_ISREG(self.status.st_mode):
            raise Corrupt("not a regular file")
        if self.status.st_size > max_size + envelope.MAX_ENVELOPE:
            # It may have been accepted under another limit: it is not lost, and its owner's quota pays for it.
            raise NotYet(f"larger than max_message_size ({self.status.st_size} bytes); raise that, or remove the file")
        if self.status.st_size != claimed:
            # The change time, which the owner cannot set.
            if time.time() - self.status.st_ctime < layout.INCOMPLETE_MAX_AGE:
                raise NotYet(f"{self.status.st_size} bytes, its name says {claimed}")
            raise Corrupt(f"{self.status.st_size} bytes, its name says {claimed}")

    def _read_head(self) -> None:
        raw = self._raw()
        head = b""
        while (end := head.find(b"\n\n")) < 0:
            chunk = next(raw, b"")
            if not chunk or len(head) > envelope.MAX_ENVELOPE:
                raise Corrupt("the envelope has no end")
            head += chunk
        try:
            self.envelope = envelope.parse(head[:end], verified=False)
        except envelope.NewerLayout as error:
            raise NotYet(str(error)) from None
        except envelope.NoLayout as error:
            raise Corrupt(str(error)) from None
        # Bytes of message, tag included as enqueue wrote it.
        self.message_size = self.status.st_size - end - 2
        self._rest = message.canonical(_after(head[end + 2 :], raw))
        try:
            self.header = message.read_header(self._rest)
        except message.HeaderTooLong as error:
            raise Corrupt(str(error)) from None

    def chunks(self, tag: tuple[tuple[str, str], ...], message_id: str) -> Iterator[bytes]:
        """The message as it will be sent, once. Raises NotYet when the file is shorter than it was."""
        yield self.header.tagged(tag, message_id)
        yield from self._rest

    @property
    def small(self) -> bool:
        return self.status.st_size <= SMALL

    def digest(self) -> str:
        """SHA-256 of all bytes of the file, once chunks() has been read to its end."""
        return self._digest.hexdigest()

    def same_bytes(self, digest: str) -> bool:
        """Whether the file has this digest; reads all of it, chunks() can still be read afterwards."""
        return _digest(self._fd, self.status.st_size) == digest

    def is_at(self, path: str) -> bool:
        """Whether PATH is still this file: its inode is not used again while it is open."""
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return False
        return (status.st_dev, status.st_ino) == (self.status.st_dev, self.status.st_ino)

    def close(self) -> None:
        """Close the file; once is enough."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def detach(self) -> int:
        """The descriptor, which is the caller's from now on."""
        fd, self._fd = self._fd, -1
        return fd

    def _raw(self) -> Iterator[bytes]:
        left = self.status.st_size
        while left:
            chunk = os.read(self._fd, min(CHUNK, left))
            if not chunk:
                raise NotYet("the file became shorter while it was read")
            self._digest.update(chunk)
            left -= len(chunk)
            yield chunk


def is_same(path: str, digest: str) -> bool:
    """Whether the file in new/ at PATH is whole, by its name, and has DIGEST. Raises OSError where that cannot be known."""
    claimed = layout.submitted_size(os.path.basename(os.fsencode(path)))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, *OF_THE_FILE):
            return False
        raise
    try:
        status = os.fstat(fd)
        return stat.S_ISREG(status.st_mode) and status.st_size == claimed and _digest(fd, claimed) == digest
    finally:
        os.close(fd)


def _digest(fd: int, size: int) -> str:
    """SHA-256 of the first SIZE bytes: a file may grow while it is read."""
    whole = hashlib.sha256()
    position = 0
    while position < size and (chunk := os.pread(fd, min(CHUNK, size - position), position)):
        whole.update(chunk)
        position += len(chunk)
    return whole.hexdigest()


def _after(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from rest


def names(spool: str, vhost: str, most: int) -> set[bytes]:
    """The names in the vhost's new/, MOST of them where there are more; dot files are nobody's. Raises OSError."""
    with os.scandir(os.fsencode(layout.maildrop(spool, vhost)) + b"/new") as entries:
        return set(islice((entry.name for entry in entries if not entry.name.startswith(b".")), most))


def remove_name(path: str) -> bool:
    """Unlink PATH where its file has so many other names that they were made to be many; whether it did.

    A name costs its owner nothing, whatever his quota, and us the time to look at it.
    """
    try:
        status = os.lstat(path)
        if stat.S_ISDIR(status.st_mode) or status.st_nlink <= MOST_NAMES:
            return False
        os.unlink(path)
    except OSError:
        return False
    return True


def remove_leftovers(spool: str, vhost: str, now: float) -> Iterator[int]:
    """Unlink the regular files in tmp/ that have been unchanged for TMP_MAX_AGE: an entry at each step, 1 where it was one."""
    with os.scandir(os.fsencode(layout.maildrop(spool, vhost)) + b"/tmp") as entries:
        for entry in entries:
            old = False
            try:
                status = entry.stat(follow_symlinks=False)
                old = stat.S_ISREG(status.st_mode) and now - status.st_ctime > layout.TMP_MAX_AGE
                if old:
                    os.unlink(entry.path)
            except FileNotFoundError:
                # Its writer has ended meanwhile.
                pass
            yield int(old)
