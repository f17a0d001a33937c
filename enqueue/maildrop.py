"""The vhost's maildrop: the steps that make a message durable, and the bell that says so. Rows: spool_layout.md."""

import posix

from enqueue.failure import CANTCREAT, CONFIG, IOERR, NOPERM, UNAVAILABLE, Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

POLICY_VERSION = b"1"
DEFAULT_MAX_SIZE = 50 << 20
# The shared maildrop of all vhosts that have none of their own.
UNREGISTERED = "_unregistered"
# Counts in tmp/REFUSED<uid>, a byte each, what was refused at the door.
REFUSED = "refused."
# Seconds that a policy speaks for at most.
MOST_UNTIL = 3600
HEX = frozenset("0123456789abcdef")


class Policy:
    """What the releaser tells enqueue about a vhost. Advisory: absent or torn, the defaults hold and mail is accepted."""

    def __init__(self, text: bytes = b"") -> None:
        lines = dict(line.split(b": ", 1) for line in text.split(b"\n") if b": " in line)
        if lines.get(b"Policy") != POLICY_VERSION or lines.get(b"End") != POLICY_VERSION:
            lines = {}
        until = lines.get(b"Until", b"")
        self.until = int(until) if until.isdigit() else 0
        self._lines = text.split(b"\n") if lines else []
        host = posix.uname().nodename.encode("ascii", "replace")
        size = lines.get(b"Max-Size", b"")
        bell = lines.get(b"Bell", b"").decode("ascii", "replace")
        self.bell = bell if bell and HEX.issuperset(bell) else ""
        self.max_size = int(size) if size.isdigit() else DEFAULT_MAX_SIZE
        self.sender = lines.get(b"Sender", b"")
        self.tag = [
            (lines.get(b"Domain-Header", b"X-Domain"), b""),
            (lines.get(b"Complaints-Header", b"X-Complaints-To"), lines.get(b"Complaints-To", b"abuse@" + host)),
        ]

    def warning(self, vhost: str, now: float) -> bytes:
        """The line that the releaser wants said to who sends as VHOST; empty where there is none, or it is too old."""
        return self._said(b"Warning: ", vhost, now)

    def refusal(self, vhost: str, now: float) -> bytes:
        """Why no mail of VHOST is to be accepted; empty where it is, or where that is too old."""
        return self._said(b"Refuse: ", vhost, now)

    def _said(self, of: bytes, vhost: str, now: float) -> bytes:
        # What is said of the shared maildrop is said to everyone who uses it, or to all that this user sends through it.
        for name in (vhost, f"uid:{posix.geteuid()}", UNREGISTERED):
            key = of + name.encode() + b" "
            found = [line[len(key) :] for line in self._lines if line.startswith(key)]
            # The releaser never says so of more than an hour: the clock was put back.
            if found and now < self.until <= now + MOST_UNTIL:
                return found[-1]
        return b""


class Maildrop:
    """SPOOL/vhosts/VHOST, opened as one descriptor that every later step is relative to.

    Raises Failure: CONFIG where it does not exist, NOPERM where this user may not enter.
    """

    def __init__(self, spool: str, vhost: str) -> None:
        self.spool = spool
        self.vhost = vhost
        try:
            self._gate = self._open(vhost)
        except OSError as error:
            import errno

            if error.errno == errno.EACCES:
                raise self._closed() from None
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise Failure(IOERR, f"cannot open the maildrop of {vhost} under {spool}: {error.strerror}") from None
            raise Failure(
                CONFIG,
                f"no maildrop for {vhost} under {spool}: {error.strerror}; "
                f"the administrator runs: secure-sendmail vhost add {vhost} --user NAME, or, once for all: "
                "secure-sendmail vhost add --unregistered",
            ) from None
        if posix.getuid() == 0 and posix.fstat(self._gate).st_uid != 0:
            # Root comes through every gate; only where the spool is its own is it a customer.
            raise self._closed()

    def _open(self, vhost: str) -> int:
        """The vhost's directory, or the shared one where it does not exist; never where it is only closed."""
        flags = posix.O_PATH | posix.O_DIRECTORY | posix.O_NOFOLLOW | posix.O_CLOEXEC
        try:
            return posix.open(f"{self.spool}/vhosts/{vhost}", flags)
        except FileNotFoundError:
            return posix.open(f"{self.spool}/vhosts/{UNREGISTERED}", flags)

    def policy(self) -> Policy:
        try:
            fd = posix.open("policy", posix.O_RDONLY | posix.O_NOFOLLOW | posix.O_CLOEXEC, dir_fd=self._gate)
        except OSError:
            return Policy()
        try:
            return Policy(posix.read(fd, 65536))
        except (OSError, ValueError):
            return Policy()
        finally:
            posix.close(fd)

    def drop(self, name: str, head: bytes, chunks: "Iterator[bytes]", max_size: int) -> None:
        """Make HEAD and CHUNKS durable as new/NAME,S=<bytes>; return only when they are.

        Raises Failure with nothing left in new/: CANTCREAT, IOERR, or UNAVAILABLE above MAX_SIZE bytes of message.
        """
        temporary = f"tmp/{name}"
        fd = self._create(temporary)
        try:
            size = self._write(fd, head, chunks, max_size)
            submitted = f"new/{name},S={size}"
            # At that instant the message has been submitted.
            posix.rename(temporary, submitted, src_dir_fd=self._gate, dst_dir_fd=self._gate)
        except OSError as error:
            self._unlink(temporary)
            raise Failure(IOERR, f"cannot write {temporary} of {self.vhost}: {error.strerror}") from None
        except BaseException:
            self._unlink(temporary)
            raise
        self._sync(fd, submitted)

    def ring(self, bell: str) -> None:
        """Tell the releaser that mail is there. Tried once: if it fails, the releaser's scan finds the mail."""
        if bell:
            try:
                posix.utime(f"{self.spool}/wake/{bell}")
            except OSError:
                pass

    def count_refusal(self) -> None:
        """Add a byte to the count that the releaser's scan finds. Raises OSError, which changes nothing."""
        import stat

        flags = posix.O_WRONLY | posix.O_APPEND | posix.O_NOFOLLOW | posix.O_NONBLOCK | posix.O_NOCTTY | posix.O_CLOEXEC
        name = f"tmp/{REFUSED}{posix.getuid()}"
        try:
            fd = posix.open(name, flags, dir_fd=self._gate)
        except FileNotFoundError:
            fd = posix.open(name, flags | posix.O_CREAT | posix.O_EXCL, 0o640, dir_fd=self._gate)
            posix.fchmod(fd, 0o640)
        try:
            status = posix.fstat(fd)
            # Everybody may make a file of that name: never write into another's, or into one of another name.
            if stat.S_ISREG(status.st_mode) and status.st_uid == posix.getuid() and status.st_nlink == 1:
                posix.write(fd, b"\n")
        finally:
            posix.close(fd)

    def _create(self, temporary: str) -> int:
        flags = posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_NOFOLLOW | posix.O_CLOEXEC
        try:
            return posix.open(temporary, flags, 0o600, dir_fd=self._gate)
        except OSError as error:
            import errno

            if error.errno == errno.EACCES and not self._may_enter():
                raise self._closed() from None
            raise Failure(CANTCREAT, f"cannot create {temporary} of {self.vhost}: {error.strerror}") from None

    def _may_enter(self) -> bool:
        try:
            posix.stat("tmp", dir_fd=self._gate)
        except PermissionError:
            return False
        except OSError:
            pass
        return True

    def _closed(self) -> Failure:
        return Failure(NOPERM, f"user {posix.getuid()} may not send as {self.vhost}: its maildrop is closed to this user")

    def _write(self, fd: int, head: bytes, chunks: "Iterator[bytes]", max_size: int) -> int:
        size = 0
        data = head
        for chunk in chunks:
            size += len(chunk)
            if size > max_size:
                raise Failure(UNAVAILABLE, f"the message is larger than {max_size} bytes")
            data += chunk
            _write_all(fd, data)
            data = b""
        # Group read for the releaser; the caller's umask may have taken every bit away.
        posix.fchmod(fd, 0o640)
        return size + len(head)

    def _sync(self, fd: int, submitted: str) -> None:
        """Make bytes and name durable with one call; spool_layout.md says on which file systems it does both."""
        try:
            posix.fsync(fd)
        except OSError as error:
            try:
                posix.unlink(submitted, dir_fd=self._gate)
            except FileNotFoundError:
                # The releaser has read it already: it is accepted.
                return
            except OSError:
                pass
            raise Failure(IOERR, f"cannot sync {submitted} of {self.vhost}: {error.strerror}") from None

    def _unlink(self, path: str) -> None:
        # What cannot be removed is a leftover in tmp/, which the releaser removes later.
        try:
            posix.unlink(path, dir_fd=self._gate)
        except OSError:
            pass


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[posix.write(fd, view) :]
