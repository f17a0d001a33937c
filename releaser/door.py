"""The door: whose mail enqueue is to refuse, and what is not taken where someone writes past it; the caps behind it.

A refusal is a line of the policy (spool_layout.md) and so advisory: what is submitted all the same stays in new/ where a
cap is reached, and is held where only a limit is.
"""

import math
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice

from releaser import layout, maillog
from releaser.config import Config, VhostSettings
from releaser.ledger import Ledger, Row
from releaser.limits import Account, Limit
from releaser.maillog import LOG

# With fewer free inodes than this there is no room either, where the file system counts them.
MIN_INODES = 1000
# Bytes that a recipient counts for hold_max_bytes: its line in the envelope, and its rows in the log.
RECIPIENT_SIZE = 1000
# In the shared maildrop a uid may have so many times what a name may: each of its names can be made up.
SHARED_TIMES = 10
# Bytes of refusals in one policy; enqueue reads no more than 64 KiB, and warnings have 32 of them.
REFUSALS_SIZE = 24 << 10
# The most refusals that are believed of a uid at one scan, the most uids, and the entries of tmp/ that are looked through.
MAX_REFUSED, MAX_UIDS, LOOKED_THROUGH = 1_000_000, 100, 10_000

# A maildrop, and the vhost that the mail in it is from; or, in the shared one, whose it is.
Key = tuple[str, str]


class Door:
    """Which doors are closed, and why. The counts are the ledger's, kept up as copies come and go."""

    def __init__(self, config: Config, book: Ledger) -> None:
        self.config = config
        self._ledger = book
        # Messages and bytes in our directories.
        self._kept: dict[Key, tuple[int, int]] = {}
        # Where a cap is reached, or a limit until then, by the clock of the ledger: the sentence for who sends.
        self._full: dict[Key, str] = {}
        self._over: dict[Key, tuple[str, float]] = {}
        # Whose mail waits behind a closed door, said already.
        self._said: set[Key] = set()
        self._lack = ""
        # Maildrops whose policy is to be written, and those whose mail can be taken again.
        self._changed: set[str] = set()
        self._opened: set[str] = set()
        self._all_changed = False
        # Where refusals may have been counted since the last scan, None: everywhere; and the limits that were reached.
        self._closed_lately: set[str] | None = None
        self.limits_lately: dict[Key, Limit] = {}

    # What is kept, against the caps.

    def load(self) -> None:
        """Count from the ledger again, and compare with what the configuration allows."""
        self._kept = {}
        for maildrop, vhost, uid, count, size in self._ledger.kept(RECIPIENT_SIZE):
            for key in _keys(maildrop, vhost, uid):
                kept = self._kept.get(key, (0, 0))
                self._kept[key] = kept[0] + count, kept[1] + size
        least, least_bytes = self.config.least_caps
        # Names can be made up: most have nothing that is worth a look at their settings.
        near = {key for key, (count, size) in self._kept.items() if count >= least or size >= least_bytes}
        for key in near.union(self._full):
            self._judge(key)

    def add(self, row: Row, times: int = 1) -> None:
        """A copy of ROW was made in our directories; with TIMES -1 it has gone."""
        for key in _keys(row.maildrop, row.vhost, row.uid):
            count, size = self._kept.get(key, (0, 0))
            self._kept[key] = count + times, size + times * (row.size + RECIPIENT_SIZE * row.recipients)
            self._judge(key)

    def _judge(self, key: Key) -> None:
        (count, size), settings = self._kept.get(key, (0, 0)), self.settings(key)
        times = SHARED_TIMES if layout.is_of_uid(key[1]) else 1
        most, most_bytes = times * settings.hold_max_messages, times * settings.hold_max_bytes
        whose = f"mail of {key[1].replace(':', ' ')}"
        until = "no more is accepted until some of it is released or deleted"
        sentence = ""
        if count >= most:
            sentence = f"{whose} waits here already, {most} messages of it (hold_max_messages): {until}"
        elif size >= most_bytes:
            sentence = f"{whose} waits here already, {most_bytes} bytes of it (hold_max_bytes): {until}"
        if sentence == self._full.get(key, ""):
            return
        self._changed.add(key[0])
        if sentence:
            if key not in self._full:
                LOG.error(maillog.door_closed(key[1], count, size))
            self._full[key] = sentence
        else:
            del self._full[key]
            self._said.discard(key)
            self._opened.add(key[0])
            LOG.warning(maillog.door_opened(key[1]))

    def settings(self, key: Key) -> VhostSettings:
        """What holds for the mail of KEY."""
        maildrop, vhost = key
        return self.config.unregistered(vhost) if maildrop == layout.UNREGISTERED else self.config.vhost(vhost)

    def is_shut(self, name: str) -> bool:
        """Whether nothing is taken from the maildrop NAME."""
        return (name, name) in self._full

    def keeps_out(self, row: Row) -> bool:
        """Whether a message as ROW is not taken from its maildrop; says so where it is the first."""
        closed = [key for key in _keys(row.maildrop, row.vhost, row.uid) if key in self._full]
        for key in closed:
            self.waits(*key)
        return bool(closed)

    def waits(self, maildrop: str, vhost: str) -> None:
        """Mail of VHOST waits in MAILDROP behind the closed door: say so once."""
        if (maildrop, vhost) not in self._said:
            self._said.add((maildrop, vhost))
            LOG.error(maillog.not_taken(vhost, maildrop))

    def unsaid(self) -> list[str]:
        """The closed maildrops of which nobody was told yet that mail waits in them."""
        return [key[1] for key in self._full if key[0] == key[1] and key not in self._said]

    # Room.

    @property
    def room(self) -> bool:
        """Whether the spool's file system had room when it was looked at last."""
        return not self._lack

    def look_at_room(self) -> None:
        """Look at the spool's file system. Once there was no room, an eighth more than min_free is wanted."""
        least = self.config.min_free
        lack = lacking(self.config.spool, least + least // 8 if self._lack else least)
        if bool(lack) != bool(self._lack):
            self._all_changed = True
            if lack:
                LOG.error(maillog.no_space(lack))
            else:
                LOG.warning(maillog.room_again())
        self._lack = lack

    # Limits, where over_limit is "reject".

    def judge_limits(self, key: Key, account: Callable[[], Account], now: float) -> None:
        """Close the door of KEY until its ACCOUNT has room for one recipient, or open it."""
        when, limit = account().fits_at(now) if self.settings(key).over_limit == "reject" else (now, None)
        closed = None
        if limit is not None:
            # Never in the second in which it fits, of which only a part is behind it.
            until = math.floor(when) + 1 if when < math.inf else math.inf
            shown = round(self._ledger.clock.wall(until)) if until < math.inf else 0
            times = f" until {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(shown))}" if shown else ""
            closed = f"{key[1]} has reached its limit of {limit.text}: no more mail of it is accepted{times}", until
            self.limits_lately[key] = limit
        if closed != self._over.get(key):
            self._changed.add(key[0])
            self._over.pop(key, None)
            if closed is not None:
                self._over[key] = closed

    @property
    def over(self) -> list[Key]:
        """Whose mail is refused for a limit."""
        return list(self._over)

    def forget_limits(self) -> None:
        """Nothing is known of limits any more: names and windows have changed."""
        self._changed |= {key[0] for key in self._over}
        self._over = {}

    def due(self, now: float) -> list[Key]:
        """Those of over that may be within their limits by now."""
        return [key for key, (_, until) in self._over.items() if until <= now]

    @property
    def next(self) -> float:
        """When a limit lets mail through again, by the clock of the ledger."""
        return min((until for _, until in self._over.values()), default=math.inf)

    # What the policies say.

    def refusals(self, maildrop: str) -> list[tuple[str, str]]:
        """(vhost, sentence) for the policy of MAILDROP, as far as they have room there."""
        if self._lack:
            return [(maildrop, "this host has no room for more mail now: try again later")]
        found: dict[str, str] = {}
        room = REFUSALS_SIZE
        for (drop, vhost), sentence in [*self._full.items(), *((key, words) for key, (words, _) in self._over.items())]:
            if drop == maildrop and vhost not in found:
                room -= len(vhost) + len(sentence) + 12
                if room < 0:
                    break
                found[vhost] = sentence
        return list(found.items())

    def until(self, maildrop: str) -> float:
        """When the first of the refusals for MAILDROP ends by itself, by the clock of the ledger."""
        return min((until for (drop, _), (_, until) in self._over.items() if drop == maildrop), default=math.inf)

    @property
    def closed(self) -> set[str] | None:
        """The maildrops whose policies refuse somebody; None: all."""
        return None if self._lack else {key[0] for key in (*self._full, *self._over)}

    def changes(self) -> tuple[set[str] | None, set[str]]:
        """The maildrops whose policy is to be written now, None for all, and those that can be taken from again."""
        changed, opened = None if self._all_changed else self._changed, self._opened
        if self._closed_lately is not None:
            self._closed_lately = None if changed is None else self._closed_lately | changed
        self._changed, self._opened, self._all_changed = set(), set(), False
        return changed, opened

    # What enqueue has counted.

    def refused(self, maildrops: Iterable[str]) -> dict[str, dict[int, int]]:
        """What was refused at the doors of MAILDROPS since the last scan, by the uid that claims it, where any was."""
        lately, self._closed_lately = self._closed_lately, self.closed
        found = {}
        for name in maildrops:
            if lately is None or name in lately:
                try:
                    counts = take_refused(self.config.spool, name)
                except OSError as error:
                    LOG.error(maillog.maildrop(name, "tmp", error.strerror or str(error)))
                    continue
                if counts:
                    found[name] = counts
        return found


def _keys(maildrop: str, vhost: str, uid: int) -> list[Key]:
    """What a message counts for."""
    return [(maildrop, vhost), *([(maildrop, layout.of_uid(uid))] if maildrop == layout.UNREGISTERED else [])]


def lacking(spool: str, min_free: int) -> str:
    """What the file system of SPOOL has too little of, in words; MIN_FREE in bytes, 0: it is not looked at."""
    if not min_free:
        return ""
    try:
        found = os.statvfs(spool)
    except OSError:
        # What is wrong with it is said where it is worked on.
        return ""
    if found.f_bavail * found.f_frsize < min_free:
        return f"fewer than {min_free} bytes are free (min_free)"
    if found.f_files and found.f_favail < MIN_INODES:
        return f"fewer than {MIN_INODES} inodes are free"
    return ""


def take_refused(spool: str, maildrop: str) -> dict[int, int]:
    """Remove the counts of refusals from tmp/ of MAILDROP; return the largest of them, by uid. Raises OSError.

    Whatever lies there is a customer's: it is judged by lstat, and never opened.
    """
    found: Counter[int] = Counter()
    directory = f"{layout.maildrop(spool, maildrop)}/tmp"
    with os.scandir(directory) as entries:
        names = [entry.name for entry in islice(entries, LOOKED_THROUGH) if entry.name.startswith(layout.REFUSED)]
    for name in names:
        try:
            status = os.lstat(f"{directory}/{name}")
            if stat.S_ISDIR(status.st_mode):
                continue
            os.unlink(f"{directory}/{name}")
        except FileNotFoundError:
            continue
        if stat.S_ISREG(status.st_mode) and status.st_size and name == f"{layout.REFUSED}{status.st_uid}":
            found[status.st_uid] = min(status.st_size, MAX_REFUSED)
    return dict(found.most_common(MAX_UIDS))
