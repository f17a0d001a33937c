"""The clock of windows, retries and incidents: seconds since 1970 that no step of the machine's clock changes."""

import math
import time


class Clock:
    """Begins with the machine's time, is carried on by CLOCK_BOOTTIME, which nobody sets, and never goes back.

    It goes on over the restarts of a program. Where the machine itself was started anew, CLOCK_BOOTTIME is behind what it
    was: then it begins again with the machine's time, or with the last of its own where that is later.
    """

    def __init__(self, kept: str) -> None:
        """KEPT is what an earlier one had as its text; empty: there was none."""
        begun, latest = (float(word) for word in kept.split()) if kept else (-math.inf, -math.inf)
        since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        # Seconds that have passed where only the machine's clock says so, which was perhaps wrong when it was started.
        self.leap = 0.0
        if begun + since_boot < latest or begun == -math.inf:
            begun = max(time.time(), latest) - since_boot
            self.leap = begun + since_boot - latest if latest > -math.inf else 0.0
        self._begun = begun

    def now(self) -> float:
        return self._begun + time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall(self, stamp: float) -> float:
        """STAMP of this clock as the machine's own has it now, for people to read."""
        return stamp + (time.time() - self.now())

    def __str__(self) -> str:
        return f"{self._begun!r} {self.now()!r}"
