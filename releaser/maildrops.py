"""All maildrops: which have mail, whose turn it is, what was taken from them, their bells and policies."""

import errno
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from releaser import layout, maillog, pickup, policy
from releaser.freeing import Freeing
from releaser.ledger import Row
from releaser.maillog import LOG
from releaser.room import LACKS

# At most so many names of one vhost are looked at in one go, and of those that were left, at every scan.
LISTED, LEFT = 10_000, 1_000
# The names that are looked through for these, beside those that are known to stay.
LOOKED_THROUGH = 100_000
# So many that were left are named in the daemon's log, of each maildrop.
NAMED = 100
# Seconds between two looks for leftovers in tmp/, and those that one scan goes on with it.
CLEANING, CLEANING_SECONDS = 3600, 0.1


@dataclass
class Maildrop:
    """What is known of a vhost's new/."""

    bell: str | None = None
    names: deque[bytes] = field(default_factory=deque)
    # To be listed as soon as NAMES is empty.
    dirty: bool = False
    # Whether it waits for its turn.
    waiting: bool = False
    listed_ns: int = 0
    # When it was changed last before that.
    changed_ns: int = 0
    # Of new/: another one means that the vhost was removed and made again; so does another bell in a policy that is
    # not the one we last saw.
    inode: int = 0
    policy: tuple[int, int] = (0, 0)
    # Names that were left where they are: complained about once, and looked at behind all others, when AGAIN is set.
    left: set[bytes] = field(default_factory=set)
    again: bool = False
    # Whether files with many names were met in it, said already.
    many_names: bool = False
    # Names that wait until a door opens, in the shared maildrop.
    shut_out: set[bytes] = field(default_factory=set)


class Maildrops:
    """The maildrops below SPOOL/vhosts, in turn."""

    def __init__(self, spool: str, policy_of: Callable[[str, str], bytes]) -> None:
        """POLICY_OF makes the policy of (vhost, bell)."""
        self._spool = spool
        self._policy_of = policy_of
        self._drops: dict[str, Maildrop] = {}
        self._bells: dict[str, str] = {}
        self._turn: deque[str] = deque()
        # Taken up and not yet removed from new/: never listed again, or they would be decided twice.
        self._taken: set[tuple[str, bytes]] = set()
        self._next_cleaning = 0.0
        # What is left of the look that was begun last.
        self._cleaning: Iterator[None] = iter(())
        # Whether the last policy could not be written for want of room.
        self._no_room = False
        # Maildrops that have been renamed, until what is known of the old name is carried over.
        self.frozen: set[str] = set()
        # Files in new/ that the ledger knows: an open attempt, or an outcome whose file is still to be removed.
        self.known: dict[tuple[str, str], Row] = {}
        # Queue ids whose file in new/ has been removed since the ledger was told last.
        self.removed: list[str] = []
        self._freeing = Freeing()

    def __len__(self) -> int:
        return len(self._drops)

    def __contains__(self, name: str) -> bool:
        return name in self._drops

    def scan(self) -> None:
        """Look at every maildrop, also those made since the last time, whether or not a bell was heard."""
        with os.scandir(f"{self._spool}/vhosts") as entries:
            found = {e.name for e in entries if layout.is_maildrop(e.name) and e.is_dir(follow_symlinks=False)}
        for vhost in self._drops.keys() - found:
            self._forget(vhost)
        for vhost in found:
            try:
                status = os.stat(f"{layout.maildrop(self._spool, vhost)}/new")
            except OSError as error:
                self._complain(vhost, "new", error)
                continue
            drop = self._drops.get(vhost)
            if drop is not None and (drop.inode != status.st_ino or self._has_another_bell(vhost, drop)):
                self._forget(vhost)
                drop = None
            if drop is None:
                drop = self._add(vhost, status.st_ino)
            drop.again = bool(drop.left)
            # A file can arrive in the same tick of the clock as the last listing, hence the two seconds.
            fresh = abs(drop.listed_ns - drop.changed_ns) < 2_000_000_000
            if status.st_mtime_ns != drop.changed_ns or fresh or drop.again:
                self._mark(vhost, drop)
        self._clean()

    def rung(self, bells: set[str]) -> None:
        """Mark the vhosts that BELLS stand for."""
        for bell in bells:
            vhost = self._bells.get(bell)
            if vhost is not None:
                self._mark(vhost, self._drops[vhost])

    def vhost_of(self, bell: str) -> str:
        """The vhost that BELL stands for; BELL itself where it is nobody's."""
        return self._bells.get(bell, bell)

    def next(self, busy: Callable[[str], bool]) -> tuple[str, bytes] | None:
        """The next vhost in turn that has mail and is not BUSY, which is asked of each, and its first name.

        Raises OSError where there is no room.
        """
        for _ in range(len(self._turn)):
            vhost = self._turn.popleft()
            drop = self._drops[vhost]
            if busy(vhost) or vhost in self.frozen:
                self._turn.append(vhost)
                continue
            if drop.dirty and not drop.names:
                self._list(vhost, drop)
            if drop.names:
                self._turn.append(vhost)
                return vhost, drop.names.popleft()
            drop.waiting = False
        return None

    def waiting(self, busy: Callable[[str], bool]) -> bool:
        """Whether a vhost that is not BUSY may have mail."""
        return any(not busy(vhost) and vhost not in self.frozen for vhost in self._turn)

    def has_mail(self, vhost: str) -> bool:
        """Whether something lies in its new/."""
        try:
            return bool(pickup.names(self._spool, vhost, 1))
        except OSError:
            # It is said when it is listed.
            return False

    def take(self, vhost: str, name: bytes) -> None:
        """NAME is being decided: it is not listed again until it is given back or removed."""
        self._taken.add((vhost, name))

    def give_back(self, vhost: str, name: bytes) -> None:
        """NAME is to be decided again, before all others of its vhost."""
        self._taken.discard((vhost, name))
        drop = self._drops.get(vhost)
        if drop is not None:
            # Others of it may have been given back before.
            place = next((n for n, other in enumerate(drop.names) if other > name), len(drop.names))
            drop.names.insert(place, name)
            self._mark(vhost, drop)

    def remove_name(self, vhost: str, name: bytes) -> bool:
        """NAME is of no use: remove it where it is one of many that were made for one file; whether it was."""
        shown = os.fsdecode(name)
        if (vhost, shown) in self.known or not pickup.remove_name(f"{layout.maildrop(self._spool, vhost)}/new/{shown}"):
            return False
        self._taken.discard((vhost, name))
        drop = self._drops.get(vhost)
        if drop is not None and not drop.many_names:
            drop.many_names = True
            LOG.warning(maillog.many_names(vhost, shown))
        return True

    def leave(self, vhost: str, name: bytes, reason: str, trace: bool = False) -> None:
        """NAME stays in new/ and is looked at again with the next scan; say so once."""
        self._taken.discard((vhost, name))
        drop = self._drops.get(vhost)
        if drop is not None and name not in drop.left:
            drop.left.add(name)
            if len(drop.left) < NAMED:
                LOG.warning(maillog.left(vhost, os.fsdecode(name), reason), exc_info=trace)
            elif len(drop.left) == NAMED:
                LOG.warning(maillog.left_more(vhost, reason))

    def shut_out(self, vhost: str, name: bytes) -> None:
        """NAME stays in new/ until a door of this maildrop opens."""
        self._taken.discard((vhost, name))
        drop = self._drops.get(vhost)
        if drop is not None:
            drop.shut_out.add(name)

    def open(self, vhost: str) -> None:
        """A door of this maildrop has opened: look at all that waits in it."""
        drop = self._drops.get(vhost)
        if drop is not None:
            drop.shut_out.clear()
            self._mark(vhost, drop)

    def path(self, row: Row) -> str:
        """The file in new/ that ROW was read from."""
        return f"{layout.maildrop(self._spool, row.maildrop)}/new/{row.source}"

    def remove(self, row: Row, original: pickup.Submitted) -> None:
        """Unlink new/NAME, if it is still the file that was read; durable outcomes make doing it again harmless."""
        if row.source is None:
            return
        key, path = (row.maildrop, row.source), self.path(row)
        there = original.is_at(path)
        try:
            if there:
                os.unlink(path)
            elif not os.path.isdir(os.path.dirname(path)):
                raise FileNotFoundError(errno.ENOENT, "its maildrop is not there")
        except OSError as error:
            # It is known from now on: when it is met again, it is only removed.
            self.known[key] = row
            self._taken.discard((row.maildrop, row.source.encode()))
            LOG.error(maillog.left(row.maildrop, row.source, f"cannot be removed: {error.strerror}"))
            return
        finally:
            self._freeing.add(original.detach())
        self.known.pop(key, None)
        self._taken.discard((row.maildrop, row.source.encode()))
        drop = self._drops.get(row.maildrop)
        if drop is not None and not there:
            # Another file may have its name.
            self._mark(row.maildrop, drop)
        self.removed.append(row.queue_id)
        row.source = None

    def free(self) -> None:
        """Let go of the files that were removed."""
        self._freeing.flush()

    def carry_over(self, old: str, new: str) -> None:
        """What is known of OLD's files is known of NEW's, which are the same files."""
        for key in [key for key in self.known if key[0] == old]:
            row = self.known.pop(key)
            row.maildrop, row.vhost = new, new if row.vhost == old else row.vhost
            self.known[new, key[1]] = row
        self._taken = {taken for taken in self._taken if taken[0] != old}
        self.frozen.discard(new)

    def write_policy(self, name: str) -> None:
        """Write the policy of NAME, of the shared maildrop where it has none."""
        name = name if name in self._drops else layout.UNREGISTERED
        if name in self._drops:
            self._write_policy(name, self._drops[name])

    def write_policies(self) -> None:
        for vhost, drop in self._drops.items():
            self._write_policy(vhost, drop)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._drops))

    def _add(self, vhost: str, inode: int) -> Maildrop:
        drop = self._drops[vhost] = Maildrop(bell=policy.bell(self._spool, vhost), inode=inode)
        if drop.bell is None:
            LOG.warning(maillog.maildrop(vhost, "policy", "no bell: mail is found by scanning only; run: secure-sendmail check"))
        else:
            self._bells[drop.bell] = vhost
            self._write_policy(vhost, drop)
        return drop

    def _has_another_bell(self, vhost: str, drop: Maildrop) -> bool:
        """Look at a policy that was written since the last scan; one that is missing is written again."""
        try:
            status = os.stat(f"{layout.maildrop(self._spool, vhost)}/policy")
        except OSError:
            self._write_policy(vhost, drop)
            return False
        seen, drop.policy = drop.policy, (status.st_ino, status.st_mtime_ns)
        return seen != drop.policy and policy.bell(self._spool, vhost) not in (None, drop.bell)

    def _forget(self, vhost: str) -> None:
        drop = self._drops.pop(vhost)
        self._bells.pop(drop.bell or "", None)
        if drop.waiting:
            self._turn.remove(vhost)

    def _mark(self, vhost: str, drop: Maildrop) -> None:
        drop.dirty = True
        if not drop.waiting:
            drop.waiting = True
            self._turn.append(vhost)

    def _list(self, vhost: str, drop: Maildrop) -> None:
        drop.listed_ns = time.time_ns()
        try:
            drop.changed_ns = os.stat(f"{layout.maildrop(self._spool, vhost)}/new").st_mtime_ns
            most = LOOKED_THROUGH + len(drop.left) + len(drop.shut_out)
            listed = pickup.names(self._spool, vhost, most)
        except OSError as error:
            if error.errno in LACKS:
                # It keeps its turn.
                self._turn.appendleft(vhost)
                raise
            drop.dirty = False
            self._complain(vhost, "new", error)
            return
        whole = len(listed) < most
        if whole:
            drop.left &= listed
            drop.shut_out &= listed
        new = sorted(name for name in listed - drop.left - drop.shut_out if (vhost, name) not in self._taken)
        # In order of the time that they claim.
        drop.names = deque(new[:LISTED])
        drop.dirty = len(new) > LISTED or not whole
        if drop.again:
            drop.names += random.sample(sorted(drop.left), min(len(drop.left), LEFT))
            drop.again = False

    def _write_policy(self, vhost: str, drop: Maildrop) -> None:
        if drop.bell is None:
            return
        try:
            policy.write(self._spool, vhost, self._policy_of(vhost, drop.bell))
        except OSError as error:
            # enqueue goes on with the last one, or with its defaults. Where there is no room, once is enough for all.
            if error.errno not in LACKS or not self._no_room:
                self._complain(vhost, "policy", error)
            self._no_room = error.errno in LACKS
        else:
            self._no_room = False

    def _clean(self) -> None:
        """Look for leftovers, for CLEANING_SECONDS; what is left then waits for the next scan."""
        begin = time.monotonic()
        if begin >= self._next_cleaning:
            self._next_cleaning, self._cleaning = begin + CLEANING, chain(self._cleaning, self._clean_all())
        for _ in self._cleaning:
            if time.monotonic() > begin + CLEANING_SECONDS:
                return

    def _clean_all(self) -> Iterator[None]:
        for vhost in self:
            try:
                for _ in pickup.remove_leftovers(self._spool, vhost, time.time()):
                    yield
            except OSError as error:
                self._complain(vhost, "tmp", error)

    def _complain(self, vhost: str, what: str, error: OSError) -> None:
        # A vhost that was renamed or removed meanwhile is none to complain about.
        if os.path.isdir(layout.maildrop(self._spool, vhost)):
            LOG.error(maillog.maildrop(vhost, what, error.strerror or str(error)))
