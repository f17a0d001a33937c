"""Children of the daemon: each has one end of a socket and no file of ours, and ends when the daemon ends, however that ends."""

import gc
import os
import pickle
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

LENGTH = struct.Struct("!I")
# More descriptors than any process has.
DESCRIPTORS = 1 << 20
# What receive() says when the other side has ended.
GONE = object()


def fork(work: Callable[[socket.socket], None]) -> tuple[int, socket.socket]:
    """A child that does WORK with its end of a socket, and then ends; its pid and our end. Raises OSError.

    What it shall open must not be open here yet: SQLite takes locks that it believes to have.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    status = os.EX_OK
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        # Nor may a signal write into a descriptor that is another file's by then.
        signal.set_wakeup_fd(-1)
        os.closerange(3, theirs.fileno())
        os.closerange(theirs.fileno() + 1, DESCRIPTORS)
        # Nothing that the parent had may be collected here, and close a descriptor that is another file's by then.
        gc.freeze()
        work(theirs)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = os.EX_SOFTWARE
    finally:
        os._exit(status)


def send(target: socket.socket, what: Any) -> None:
    """Raises OSError where the other side has ended."""
    data = pickle.dumps(what, pickle.HIGHEST_PROTOCOL)
    target.sendall(LENGTH.pack(len(data)) + data)


def can_be_read(source: socket.socket, seconds: float | None = None) -> bool:
    """Whether receive() has something to read, or the other side has ended, within SECONDS; None: some time."""
    poll = select.poll()
    poll.register(source, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def receive(source: socket.socket) -> Any:
    """What send() has sent; GONE where the other side has ended."""
    try:
        head = source.recv(LENGTH.size, socket.MSG_WAITALL)
        if len(head) < LENGTH.size:
            return GONE
        (length,) = LENGTH.unpack(head)
        data = bytearray(length)
        view = memoryview(data)
        while view:
            count = source.recv_into(view)
            if not count:
                return GONE
            view = view[count:]
        return pickle.loads(data)
    except OSError:
        return GONE
