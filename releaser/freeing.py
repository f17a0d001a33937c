"""Files without a name are closed, and so freed, by a thread: a file system may need longer for that than we for the mail."""

import os
import queue
import socket
import threading

# Descriptors that one message between sockets can carry (SCM_MAX_FD).
MOST = 253


class Freeing:
    """Descriptors go in, and are closed some time.

    They go in parcels, each of which a single system call frees: a thread that called close() for every file would wait for the
    interpreter, and be waited for, each time.
    """

    def __init__(self) -> None:
        self._descriptors: list[int] = []
        self._parcels: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        threading.Thread(target=self._free, name="freeing", daemon=True).start()

    def add(self, descriptor: int) -> None:
        """It belongs to us from now on, and is closed some time behind the next flush(); less than 0: there is none."""
        if descriptor >= 0:
            self._descriptors.append(descriptor)
        if len(self._descriptors) == MOST:
            self.flush()

    def flush(self) -> None:
        if not self._descriptors:
            return
        descriptors, self._descriptors = self._descriptors, []
        parcel = _packed(descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        # Only now, or the last to close them could be we.
        if parcel is not None:
            self._parcels.put(parcel)

    def _free(self) -> None:
        while True:
            self._parcels.get().close()


def _packed(descriptors: list[int]) -> socket.socket | None:
    """A socket in which DESCRIPTORS wait to be read, which nobody will; None where there is no room for that."""
    try:
        ours, parcel = socket.socketpair()
        with ours:
            socket.send_fds(ours, [b"\0"], descriptors)
        return parcel
    except (OSError, MemoryError):
        return None
