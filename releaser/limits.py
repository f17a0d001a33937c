"""Sliding-window log: at most N recipients, or messages, in any interval (t - W, t], for every window at once.

Pure: time is an argument, in seconds; nothing here reads a clock or a file.
"""

import math
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LIMIT = re.compile(r"([0-9]{1,9})/([1-9][0-9]{0,6})([smhd])\Z")


@dataclass(frozen=True)
class Limit:
    """At most COUNT in any SECONDS; TEXT is how the configuration spells it."""

    count: int
    seconds: int
    text: str


@dataclass(frozen=True)
class Excess:
    """The limit that ASKED more, on top of USED, would exceed; WHOSE, where it is not a vhost's."""

    limit: Limit
    used: int
    asked: int
    whose: str = ""

    @property
    def reason(self) -> str:
        of = f" of {self.whose}" if self.whose else ""
        if self.asked > self.limit.count:
            return f"larger than limit {self.limit.text} ({self.asked} asked){of}"
        return f"over limit {self.limit.text} ({self.used} used, {self.asked} asked){of}"


def parse(texts: list[str]) -> tuple[Limit, ...]:
    """The limits that TEXTS spell, such as ["50/5m", "200/1h"]; none for ["unlimited"]. Raises ValueError."""
    if texts == ["unlimited"]:
        return ()
    if not texts:
        raise ValueError('an empty list; write ["unlimited"] for no limit')
    found = []
    for text in texts:
        match = _LIMIT.match(text)
        if not match:
            raise ValueError(
                f'{text!r} is not of the form "50/5m" (a count, a slash, a number and s, m, h or d), nor alone "unlimited"'
            )
        found.append(Limit(int(match[1]), int(match[2]) * UNITS[match[3]], text))
    return tuple(found)


class Window:
    """What was used within one limit's seconds."""

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self._entries: deque[tuple[float, int]] = deque()
        self._total = 0

    def add(self, stamp: float, amount: int) -> None:
        self._entries.append((stamp, amount))
        self._total += amount

    def used(self, now: float) -> int:
        while self._entries and self._entries[0][0] <= now - self.limit.seconds:
            self._total -= self._entries.popleft()[1]
        return self._total

    def fits_at(self, now: float, reserved: int) -> float:
        """When one more fits, with RESERVED counted as of NOW; NOW if it does already, infinity if it never will."""
        excess = self.used(now) + reserved + 1 - self.limit.count
        if excess <= 0:
            return now
        if not self.limit.count:
            return math.inf
        for stamp, amount in self._entries:
            excess -= amount
            if excess <= 0:
                return stamp + self.limit.seconds
        return now + self.limit.seconds


class Account:
    """The usage of one vhost: an entry per message sent, and the reservations of those in flight, which count as now."""

    def __init__(
        self, limits: tuple[Limit, ...], per_message: bool, entries: Iterable[tuple[float, int]] = (), whose: str = ""
    ) -> None:
        """ENTRIES are (stamp, recipients) in order of time; WHOSE it is, where it is not a vhost's."""
        self._whose = whose
        self.windows = [Window(limit) for limit in limits]
        self._per_message = per_message
        self._open: dict[str, int] = {}
        for stamp, recipients in entries:
            self._add(stamp, recipients)

    def exceeded(self, recipients: int, now: float) -> Excess | None:
        """The window that RECIPIENTS more would exceed at NOW; None if all windows allow it.

        Of several the longest; but one that the message exceeds all by itself, whatever was used, comes first.
        """
        asked = self._amount(recipients)
        reserved = sum(self._open.values())
        over = [
            Excess(window.limit, used, asked, self._whose)
            for window in self.windows
            if (used := window.used(now) + reserved) + asked > window.limit.count
        ]
        return max(over, key=lambda excess: (asked > excess.limit.count, excess.limit.seconds), default=None)

    def fits_at(self, now: float) -> tuple[float, Limit | None]:
        """When one recipient, or message, fits again, infinity for never, and the limit that is in its way until then.

        NOW and None if it fits already. What is under way counts as of NOW, so that it can be sooner, where it fails.
        """
        reserved = sum(self._open.values())
        waits = [(window.fits_at(now, reserved), window.limit) for window in self.windows]
        when, limit = max(waits, key=lambda wait: wait[0], default=(now, None))
        return (when, limit) if when > now else (now, None)

    def reserve(self, queue_id: str, recipients: int) -> None:
        """Count a message as now until it is confirmed or cancelled."""
        self._open[queue_id] = self._amount(recipients)

    def confirm(self, queue_id: str, stamp: float, recipients: int) -> None:
        """The final reply came at STAMP: from now on the message counts as of then."""
        self._open.pop(queue_id, None)
        self._add(stamp, recipients)

    def cancel(self, queue_id: str) -> None:
        """Nothing was sent: give the reservation back."""
        self._open.pop(queue_id, None)

    def used(self, now: float) -> list[tuple[Limit, int]]:
        reserved = sum(self._open.values())
        return [(window.limit, window.used(now) + reserved) for window in self.windows]

    def _add(self, stamp: float, recipients: int) -> None:
        for window in self.windows:
            window.add(stamp, self._amount(recipients))

    def _amount(self, recipients: int) -> int:
        return 1 if self._per_message else recipients
