"""The socket on which systemd hears what a service says of itself."""

from __future__ import annotations

import socket
import time

from host import PATIENCE


class Listener:
    """The socket that systemd gives a service, and what came in there, with the time."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0"))
        self.heard: list[tuple[float, str]] = []

    def words(self) -> list[str]:
        """Everything so far, in order."""
        self._socket.setblocking(False)
        try:
            while True:
                self._hear()
        except BlockingIOError:
            return [words for _, words in self.heard]

    def wait(self, words: str, timeout: float = PATIENCE) -> None:
        """Until a datagram begins with WORDS that has not been waited for."""
        end = time.monotonic() + timeout
        while True:
            self._socket.settimeout(max(end - time.monotonic(), 0.001))
            if self._hear().startswith(words):
                return

    def signs(self, seconds: float) -> list[float]:
        """The times of the signs of life of the next SECONDS, between the times when they begin and end."""
        begin = time.monotonic()
        times = [begin]
        while (left := begin + seconds - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                if self._hear() == "WATCHDOG=1":
                    times.append(time.monotonic())
            except TimeoutError:
                pass
        return [*times, begin + seconds]

    def _hear(self) -> str:
        words = self._socket.recv(65536).decode()
        self.heard.append((time.monotonic(), words))
        return words

    def close(self) -> None:
        self._socket.close()
