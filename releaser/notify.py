"""What the service manager is told (sd_notify(3)): a datagram for each state, and nothing where nobody asked for it."""

import math
import os
import socket
import time

# A service manager that is itself busy for so many seconds does not stop mail.
TIMEOUT = 5


class Notify:
    """The daemon's words to whoever started it. They never fail: a daemon that cannot say how it is goes on."""

    def __init__(self) -> None:
        # Out of the environment, so that no program that we start speaks for us.
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        usec, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
        asked = usec.isdecimal() and int(usec) > 0 and pid in ("", str(os.getpid()))
        # Seconds between two signs of life, and the longest wait of a loop that gives them. One that comes a moment too
        # early to count is then followed by one after half of the time that is allowed.
        self.interval = int(usec) / 4e6 if asked else math.inf
        self._next_sign = 0.0 if asked else math.inf

    def ready(self) -> None:
        self._say("READY=1")

    def reloading(self) -> None:
        self._say(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._say("STOPPING=1")

    def status(self, text: str) -> None:
        """What `systemctl status` shows, in one line."""
        self._say("STATUS=" + " ".join(text.split()))

    def alive(self) -> None:
        """A sign of life, at most one in an interval. For the loop that does the work, so that it says that work goes on."""
        now = time.monotonic()
        if now >= self._next_sign:
            self._next_sign = now + self.interval
            self._say("WATCHDOG=1")

    def _say(self, words: str) -> None:
        if not self._address.startswith(("/", "@")):
            return
        # The kernel's own name for an abstract socket begins with NUL.
        address = self._address.replace("@", "\0", 1) if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(TIMEOUT)
                sender.sendto(words.encode("utf-8", "replace"), address)
        except (OSError, ValueError):
            pass
