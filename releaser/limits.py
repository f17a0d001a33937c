"""Sliding-window log: at most N recipients, or messages, in any interval (t - W, t], for every window at once.

Pure: time is an argument, in seconds; nothing here reads a clock or a file.
"""

import math
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable
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
    """The limit that ASKED more, on top of USED, would exceed; WHOSE, where it is not a vhost's, and the FAIR share of it
    that the vhost has then."""

    limit: Limit
    used: int
    asked: int
    whose: str = ""
    fair: int | None = None

    @property
    def reason(self) -> str:
        of = f" of {self.whose}" if self.whose else ""
        if self.fair is not None and self.fair < self.limit.count:
            of += f", and above its share, {self.fair}"
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
        self._entries: deque[tuple[float, int, str]] = deque()
        self._total = 0
        # What each share has of it; those that have nothing are not there.
        self.shares: Counter[str] = Counter()

    def add(self, stamp: float, amount: int, share: str) -> None:
        self._entries.append((stamp, amount, share))
        self._total += amount
        self.shares[share] += amount

    def used(self, now: float) -> int:
        while self._entries and self._entries[0][0] <= now - self.limit.seconds:
            _, amount, share = self._entries.popleft()
            self._total -= amount
            self.shares[share] -= amount
            if not self.shares[share]:
                del self.shares[share]
        return self._total

    def fits_at(self, now: float, reserved: int) -> float:
        """When one more fits, with RESERVED counted as of NOW; NOW if it does already, infinity if it never will."""
        excess = self.used(now) + reserved + 1 - self.limit.count
        if excess <= 0:
            return now
        if not self.limit.count:
            return math.inf
        for stamp, amount, _ in self._entries:
            excess -= amount
            if excess <= 0:
                return stamp + self.limit.seconds
        return now + self.limit.seconds


class Account:
    """The usage of one vhost: an entry per message sent, and the reservations of those in flight, which count as now.

    Or that of several, where it is given SHARE, which says for a vhost whose share its mail is. Above its limit every share
    that has mail in the window still has as much as if the limit were divided among them: one that sends all it can does
    not stop the others, and they can exceed the limit together.
    """

    def __init__(
        self,
        limits: tuple[Limit, ...],
        per_message: bool,
        entries: Iterable[tuple[float, int, str]] = (),
        whose: str = "",
        share: Callable[[str], str] | None = None,
    ) -> None:
        """ENTRIES are (stamp, recipients, vhost) in order of time; WHOSE it is, where it is not a vhost's."""
        self._whose = whose
        self._share = share
        self.windows = [Window(limit) for limit in limits]
        self._per_message = per_message
        self._open: dict[str, tuple[int, str]] = {}
        for stamp, recipients, vhost in entries:
            self._add(stamp, recipients, vhost)

    def exceeded(self, recipients: int, now: float, vhost: str = "") -> Excess | None:
        """The window that RECIPIENTS more of VHOST would exceed at NOW; None if all windows allow it.

        Of several the longest; but one that the message exceeds all by itself, whatever was used, comes first.
        """
        asked = self._amount(recipients)
        reserved = self._reserved
        over = [
            Excess(window.limit, used, asked, self._whose, fair)
            for window in self.windows
            if (used := window.used(now) + reserved) + asked > window.limit.count
            and ((fair := self._fair(window, vhost)) is None or self._used_by(window, vhost) + asked > fair)
        ]
        return max(over, key=lambda excess: (asked > excess.limit.count, excess.limit.seconds), default=None)

    def _fair(self, window: Window, vhost: str) -> int | None:
        if self._share is None:
            return None
        shares = {*window.shares, *(share for _, share in self._open.values()), self._share(vhost)}
        return window.limit.count // len(shares)

    def _used_by(self, window: Window, vhost: str) -> int:
        mine = self._share(vhost) if self._share else ""
        return window.shares[mine] + sum(amount for amount, share in self._open.values() if share == mine)

    def fits_at(self, now: float) -> tuple[float, Limit | None]:
        """When one recipient, or message, fits again, infinity for never, and the limit that is in its way until then.

        NOW and None if it fits already. What is under way counts as of NOW, so that it can be sooner, where it fails.
        """
        reserved = self._reserved
        waits = [(window.fits_at(now, reserved), window.limit) for window in self.windows]
        when, limit = max(waits, key=lambda wait: wait[0], default=(now, None))
        return (when, limit) if when > now else (now, None)

    def reserve(self, queue_id: str, recipients: int, vhost: str = "") -> None:
        """Count a message as now until it is confirmed or cancelled."""
        self._open[queue_id] = self._amount(recipients), self._share(vhost) if self._share else ""

    def confirm(self, queue_id: str, stamp: float, recipients: int, vhost: str = "") -> None:
        """The final reply came at STAMP: from now on the message counts as of then."""
        self._open.pop(queue_id, None)
        self._add(stamp, recipients, vhost)

    def cancel(self, queue_id: str) -> None:
        """Nothing was sent: give the reservation back."""
        self._open.pop(queue_id, None)

    def used(self, now: float) -> list[tuple[Limit, int]]:
        reserved = self._reserved
        return [(window.limit, window.used(now) + reserved) for window in self.windows]

    @property
    def _reserved(self) -> int:
        return sum(amount for amount, _ in self._open.values())

    def _add(self, stamp: float, recipients: int, vhost: str) -> None:
        share = self._share(vhost) if self._share else ""
        for window in self.windows:
            window.add(stamp, self._amount(recipients), share)

    def _amount(self, recipients: int) -> int:
        return 1 if self._per_message else recipients
