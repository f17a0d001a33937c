"""The engine: what becomes of every message in the maildrops. One round is one transaction of the ledger.

Nothing here runs in another thread; the senders only get bytes and give outcomes. Rows S1.. are those of
spool_layout.md.
"""

import io
import os
import pwd
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from releaser import (
    envelope,
    identity,
    layout,
    ledger,
    limits,
    maillog,
    mailqueue,
    message,
    pickup,
    poison,
    policy,
    startup,
    usage,
)
from releaser.batch import Batch
from releaser.collector import Collector
from releaser.config import Config, VhostSettings
from releaser.door import Door, Key
from releaser.handover import Flight, HandOver, verified
from releaser.incidents import Incidents
from releaser.ledger import ACTIVE, FAILED, HELD, TRASHED, Ledger, Row
from releaser.maildrops import Maildrops
from releaser.maillog import LOG
from releaser.room import PAUSE, Room

# At most so many messages, and so many decisions, in one round.
ROUND = 100
# Other vhosts' mail waits no longer than this, and one message, for the mail of one that is held.
ROUND_SECONDS = 0.05
# Seconds to make what the MTA has said last durable, at the end, where there is no room.
LAST_TRIES = 30
# Seconds after which the ledger is told the time, also where nothing else is written: by that it sees that the machine was
# started anew.
KEEPING = 3600
# Where a decision brings a message.
PLACE = {ACTIVE: "active", HELD: "hold", TRASHED: "trash", FAILED: "failed"}
# Accounts that are kept in memory from scan to scan.
MOST_ACCOUNTS = 20_000
# Incidents at once of vhosts that nobody has configured.
MADE_UP = 50


class InTurn(Exception):
    """A message is held only behind all that is in flight of its maildrop: what comes back from there may make room."""


class ShutOut(Exception):
    """The door of this vhost is closed: its mail stays in new/."""


class Releaser:
    """Takes mail from the maildrops and sees it through. step() does all that can be done now."""

    def __init__(self, config: Config, book: Ledger, wake: Callable[[], None], private: bool = True) -> None:
        """WAKE is called, from any thread, when there is something for step() to do; PRIVATE: one uid owns everything."""
        self.config = config
        self._private = private
        self._ledger = book
        self._use_privacy()
        self._now = book.clock.now
        self._spool = config.spool
        # By vhost, and by uid where several names share one.
        self._accounts: dict[str | int, limits.Account] = {}
        self._room = Room()
        self._incidents = Incidents(config, book, self._settings)
        self._door = Door(config, book)
        self._collector = Collector(config, book, self._door)
        # What a uid's mail is from, as of the last scan: otherwise /etc/passwd would be read for each message.
        self._logins: dict[int, str] = {}
        # Whose mail was counted or held since their limits were looked at for the door.
        self._moved: set[Key] = set()
        self._drops = Maildrops(config.spool, self._policy)
        self._in_hand = poison.InHand(config.state, book)
        self._handover = HandOver(
            config.spool, book, self._drops, self._accounts_of, self._room, self._door, self._in_hand, wake, config.mta_url,
            config.give_up,
        )  # fmt: skip
        self._announced_size = 0
        # What the ledger has had no room for, in order: nothing else happens before.
        self._unwritten: list[Batch] = []
        # Whether the ledger had no room since the accounts were built.
        self._late = False
        self._decisions_wait = True
        self._next_scan = 0.0
        self._next_keeping = self._now() + KEEPING

    # What the daemon calls.

    def start(self, alive: Callable[[], None] = lambda: None) -> None:
        """Take up what an earlier run, or a crash, has left. ALIVE is called again and again meanwhile."""
        for old, new in self._ledger.renames():
            if self._is_renamed(old, new):
                self._ledger.carry_over(old, new)
                self._incidents.load()
        taken_up = startup.take_up(self._spool, self._ledger, alive)
        self._drops.known.update(taken_up.known)
        self._drops.removed += taken_up.removed
        for stamp, queue_id in taken_up.retries:
            self._handover.later(stamp, queue_id)
        self.scan()

    def scan(self) -> None:
        """Look at everything, whether or not a bell was heard."""
        self._next_scan = self._now() + layout.SCAN_INTERVAL
        with self._as_far_as_there_is_room():
            self._scan()

    def _scan(self) -> None:
        if len(self._accounts) > MOST_ACCOUNTS:
            # Names can be made up without end. The ledger has all that they know.
            self._accounts = {}
        self._logins = {}
        self._door.look_at_room()
        self._door.load()
        self.look()
        self._carry_over()
        if layout.UNREGISTERED not in self._drops and not self._drops.frozen:
            batch = Batch(self._ledger)
            self._incidents.close([vhost for vhost in self._incidents.vhosts if vhost not in self._drops], batch)
            self._commit(batch)
        self._close_vanished()
        self._log_refused()
        self._moved |= {*self._door.over, *((name, name) for name in self._incidents.vhosts if name in self._drops)}
        self._see_to_door()
        closed = self._door.closed
        told = {name if name in self._drops else layout.UNREGISTERED for name in self._incidents.vhosts}
        for name in self._drops if closed is None else told | closed:
            # So that enqueue goes on to repeat the warning, and to refuse.
            self._drops.write_policy(name)
        for name in self._door.unsaid():
            if self._drops.has_mail(name):
                self._door.waits(name, name)
        if self._now() >= self._next_keeping:
            with self._ledger.transaction():
                self._ledger.keep_time()
            self._next_keeping = self._now() + KEEPING

    def look(self) -> None:
        """Look at every maildrop, and for decisions: what the bells would have told of."""
        self._decisions_wait = True
        try:
            self._drops.scan()
        except OSError as error:
            if not self._room.lacks(error):
                raise

    def vhost_of(self, bell: str) -> str:
        """Whose bell it is."""
        return self._drops.vhost_of(bell)

    def rung(self, bells: set[str]) -> None:
        """Look at what BELLS stand for."""
        if layout.CONTROL_BELL in bells:
            self.scan()
        self._drops.rung(bells)

    def reload(self, config: Config) -> None:
        """Let CONFIG decide from now on; the usage of the windows comes from the ledger again."""
        if config.mta_url != self.config.mta_url:
            self._handover.use(config.mta_url)
        self.config = config
        self._use_privacy()
        self._handover.give_up = config.give_up
        known = {(name if name in self._drops else layout.UNREGISTERED, name) for name in self._accounts if isinstance(name, str)}
        self._accounts = {}
        self._incidents.config = self._door.config = self._collector.config = config
        self._door.look_at_room()
        self._door.load()
        self._moved |= {*self._door.over, *known}
        self._see_to_door()
        self._drops.write_policies()

    def step(self) -> float:
        """Do all that can be done now; return the seconds until something more could be, unless a bell or a result comes."""
        if not self._write():
            return PAUSE
        self._door.look_at_room()
        batch = Batch(self._ledger)
        # Whatever fails here ends the daemon: what has been taken and not written down, nobody would wait for any more.
        self._handover.take_results(batch)
        with self._as_far_as_there_is_room():
            self._work(batch)
        self._commit(batch)
        with self._as_far_as_there_is_room():
            self._see_to_door()
            if self._handover.senders.max_size != self._announced_size:
                self._announced_size = self._handover.senders.max_size
                self._drops.write_policies()
            if self._now() >= self._next_scan:
                self.scan()
            elif self._drops.frozen:
                self._carry_over()
            self._collector.step()
        return self._pause()

    @contextmanager
    def _as_far_as_there_is_room(self) -> Iterator[None]:
        """What is done until room is lacking stays done; the rest is, with the next round or scan, when there is some."""
        try:
            yield
        except (OSError, sqlite3.OperationalError, MemoryError) as error:
            if not self._room.lacks(error):
                raise

    def _work(self, batch: Batch) -> None:
        self._carry_out_decisions(batch)
        ended, notices = self._incidents.step(batch)
        for vhost in ended:
            batch.then(partial(self._drops.write_policy, vhost))
        for queue_id in notices:
            batch.then(partial(self._handover.later, 0.0, queue_id))
        if self._now() >= self._handover.down_until and self._room.there:
            # New mail finds out whether the MTA is back: what waits in active/ may be what it hangs up on.
            first, second = self._handover.retry, self._pick_up
            if self._handover.probing:
                first, second = second, first
            first(batch)
            second(batch)

    def _use_privacy(self) -> None:
        config = self.config
        self._ledger.privacy = replace(self._ledger.privacy, subject=config.log_subject, recipients=config.log_recipients)

    @property
    def descriptors(self) -> list[int]:
        """What can be read when there is something for step() to do, beside what WAKE was called for."""
        # While there is no room to write down what the MTA has said, that is left where it is.
        return [] if self._unwritten else self._handover.descriptors

    @property
    def vhosts(self) -> int:
        return len(self._drops)

    @property
    def idle(self) -> bool:
        """Nothing is left that could be done now."""
        now, retry = self._now(), self._handover.next_retry
        work = (self._door.room and self._drops.waiting(self._door.is_shut)) or (retry is not None and retry <= now)
        if self._handover.in_flight or self._decisions_wait or self._collector.busy:
            return False
        return not work or self._handover.down_until > now

    def finish(self, alive: Callable[[], None] = lambda: None) -> None:
        """Wait for what is in flight, and make its outcome durable. ALIVE is called again and again meanwhile."""
        self._handover.senders.give_back()
        while self._handover.in_flight:
            alive()
            batch = Batch(self._ledger)
            self._handover.take_results(batch)
            self._commit(batch)
            time.sleep(0.01)
        self._commit(Batch(self._ledger))
        until = time.monotonic() + LAST_TRIES
        while not self._write():
            if time.monotonic() > until:
                raise sqlite3.OperationalError("no room for what the MTA has said last; its mail may be sent again")
            alive()
            time.sleep(PAUSE)

    def stop(self, alive: Callable[[], None] = lambda: None) -> None:
        """Finish, and end the senders."""
        self.finish(alive)
        self._handover.senders.stop()
        self._handover.senders.join()

    def _pause(self) -> float:
        now = self._now()
        due = [self._next_scan, self._incidents.next, self._door.next, self._collector.next]
        if not self._room.there or self._unwritten:
            return PAUSE
        if self._decisions_wait:
            return 0
        if self._handover.down_until > now:
            due.append(self._handover.down_until)
        elif self._handover.room:
            if not self._door.room:
                due.append(now + PAUSE)
            elif self._drops.waiting(self._is_busy):
                return 0
            if self._handover.next_retry is not None:
                due.append(self._handover.next_retry)
        return max(0.0, min(due) - now)

    def _commit(self, batch: Batch) -> None:
        removed, self._drops.removed = self._drops.removed, []
        batch.sources_gone(removed)
        self._unwritten.append(batch)
        self._write()

    def _write(self) -> bool:
        """Make durable what waits for it; whether there was room for all of it."""
        while self._unwritten:
            try:
                self._unwritten[0].commit()
            except (sqlite3.OperationalError, MemoryError) as error:
                self._room.lacks(error)
                self._late = True
                return False
            self._unwritten.pop(0)
            self._handover.senders.flush()
            self._drops.free()
        if self._late:
            # An account that was built meanwhile knows only half of what was under way.
            self._late, self._accounts = False, {}
        return True

    # The door.

    def _see_to_door(self) -> None:
        """Close and open the doors as limits and caps say by now."""
        now = self._now()
        moved, self._moved = self._moved.union(self._door.due(now)), set()
        for key in moved:
            # A vhost's own mail is counted as such, whoever else claims its name.
            if key[0] == key[1] or key[1] not in self._drops:
                self._door.judge_limits(key, partial(self._account, key[1]), now)
        changed, opened = self._door.changes()
        for name in self._drops if changed is None else changed:
            if name in self._drops:
                self._drops.write_policy(name)
        for name in opened:
            self._drops.open(name)

    def _log_refused(self) -> None:
        """Write down what enqueue says that it has refused, as the claim that it is."""
        batch, limits_lately = Batch(self._ledger), self._door.limits_lately
        self._door.limits_lately = {}
        for name, counts in self._door.refused(self._drops).items():
            for uid, count in counts.items():
                reason = f"{count} message{'' if count == 1 else 's'} refused at the door, as enqueue has counted"
                row = ledger.about(name, time.time(), reason, uid, int(name != layout.UNREGISTERED))
                batch.log("rejected", row, [("", reason, "")])
            number = sum(counts.values())
            LOG.warning(maillog.rejected(name, number))
            limit = limits_lately.get((name, name))
            if limit is not None:
                self._incidents.over(batch, name, limit, "reject", number)
        self._commit(batch)

    # From new/ to a decision.

    def _is_busy(self, name: str) -> bool:
        """Whether nothing is taken from the maildrop NAME now."""
        return self._handover.is_full(name) or self._door.is_shut(name)

    def _pick_up(self, batch: Batch) -> None:
        """Decide messages, the vhosts in turn, until the senders have enough to do or the round is full."""
        try:
            self._pick_up_in_turn(batch)
        finally:
            self._in_hand.done()

    def _pick_up_in_turn(self, batch: Batch) -> None:
        until = time.monotonic() + ROUND_SECONDS
        for _ in range(ROUND):
            if time.monotonic() > until or not self._door.room:
                return
            try:
                found = self._drops.next(self._is_busy) if self._handover.room else None
            except OSError as error:
                self._room.lacks(error)
                return
            if found is None:
                return
            vhost, name = found
            if not self._in_hand.may(vhost, name):
                self._set_aside(batch, vhost, name)
                continue
            try:
                self._in_hand.begin(vhost, name)
                self._take(batch, vhost, name)
            except ShutOut:
                self._drops.shut_out(vhost, name)
            except InTurn:
                self._drops.give_back(vhost, name)
                self._handover.wait_for(vhost)
            except pickup.NotYet as error:
                if not self._drops.remove_name(vhost, name):
                    self._drops.leave(vhost, name, str(error))
            except sqlite3.OperationalError as error:
                self._room.lacks(error)
                self._drops.give_back(vhost, name)
                return
            except OSError as error:
                if self._room.lacks(error):
                    self._drops.give_back(vhost, name)
                    return
                self._drops.leave(vhost, name, str(error), trace=True)
            except Exception as error:
                # One message cannot stop the mail of all others; it stays in new/, and is tried again with the next scans.
                self._drops.leave(vhost, name, f"internal error: {error!r}", trace=True)
                batch.put_poison(vhost, name, self._in_hand.failed(vhost, name))

    def _set_aside(self, batch: Batch, vhost: str, name: bytes) -> None:
        """S3 -> S12: our own code fails at it. Those whom it is still to be sent to are in the log."""
        known = self._drops.known.get((vhost, os.fsdecode(name)))
        if known is not None:
            # S4 -> S3, S8 -> S3: copies that were made before it failed.
            mailqueue.remove(self._spool, "active", known.queue_id)
            mailqueue.remove(self._spool, "failed", known.queue_id)
        if self._corrupt(batch, vhost, name, poison.WHY):
            self._in_hand.forget(vhost, name)
            batch.put_poison(vhost, name, 0)
            if known is not None:
                self._replaced(batch, known, poison.WHY)

    def _take(self, batch: Batch, vhost: str, name: bytes) -> None:
        settings = self._settings(vhost)
        try:
            submitted = pickup.Submitted(self._spool, vhost, name, settings.max_message_size)
        except FileNotFoundError:
            return
        except pickup.Corrupt as error:
            if not self._drops.remove_name(vhost, name):
                self._corrupt(batch, vhost, name, str(error))
            return
        self._drops.take(vhost, name)
        try:
            self._decide(batch, submitted)
        except BaseException:
            submitted.close()
            raise

    def _decide(self, batch: Batch, submitted: pickup.Submitted) -> None:
        key = submitted.maildrop, submitted.name.decode()
        known = self._drops.known.get(key)
        if known is not None and submitted.same_bytes(known.digest):
            if known.state != ACTIVE or known.deferred_at is not None or known.decision is not None:
                # The unlink that the file system has prevented.
                batch.then(partial(self._drops.remove, known, submitted))
                return
            # Of one of which all is said only the copy in failed/ is missing.
            stopped = self._handover.stopped(known) if known.remaining else None
            if stopped is not None:
                if (known.attempt_open or len(known.remaining) < known.recipients) and known.counted_at is None:
                    # Some have it, or may have it.
                    known.counted_at = self._now()
                    for account in self._accounts_of(known):
                        account.confirm(known.queue_id, known.counted_at, known.recipients, known.vhost)
                # S4 -> S3, where there is a copy.
                mailqueue.remove(self._spool, "active", known.queue_id)
                self._hold(batch, known, submitted, stopped)
                return
            known.attempts += 1
            self._send(batch, known, submitted, again=bool(known.attempt_open))
            return
        if known is not None:
            self._replaced(batch, known)
        row = self._new_row(submitted)
        self._let_in(row)
        settings = self._settings(row.vhost)
        reason, excess = self._verdict(submitted, row)
        held = bool(reason) and not (excess and settings.over_limit == "observe")
        if held and row.maildrop in self._handover.busy:
            raise InTurn(row.vhost)
        if self.config.journal_addresses:
            LOG.info(maillog.addresses(row.queue_id, row.sender, row.remaining))
        if held:
            self._hold(batch, row, submitted, reason)
        if excess is not None:
            told = self._told(row, excess)
            if self._incidents.over(batch, told, excess.limit, settings.over_limit):
                batch.then(partial(self._drops.write_policy, told))
        if held:
            return
        if reason:
            LOG.warning(maillog.observed(row.queue_id, row.vhost, row.recipients, reason))
            row.reason = f"observed: {reason}"
        row.attempts = 1
        self._send(batch, row, submitted)
        for account in self._accounts_of(row):
            account.reserve(row.queue_id, row.recipients, row.vhost)

    def _let_in(self, row: Row) -> None:
        """Raise ShutOut where the door of ROW's vhost is closed."""
        if self._door.keeps_out(row):
            raise ShutOut(row.vhost)
        self._moved.add((row.maildrop, row.vhost))

    def _verdict(self, submitted: pickup.Submitted, row: Row) -> tuple[str, limits.Excess | None]:
        """Why the message is to be held, empty if it is not; and the limit, where that is the reason."""
        reason = self._handover.stopped(row) or self._not_theirs(submitted, row)
        if reason:
            return reason, None
        if row.size > self._max_size(row.vhost):
            return f"larger than {self._max_size(row.vhost)} bytes", None
        if submitted.header.longest > message.MAX_FIELD:
            return (
                f"a header field of {submitted.header.longest} bytes: of more than {message.MAX_FIELD} the MTA may drop a part",
                None,
            )
        if not all(envelope.one_mailbox(recipient) for recipient in row.remaining):
            return "ambiguous recipient: without a domain or a name, or with %, ! or two @, the MTA may take it for others", None
        for account in self._accounts_of(row):
            excess = account.exceeded(row.recipients, self._now(), row.vhost)
            if excess is not None:
                return excess.reason, excess
        return "", None

    def _told(self, row: Row, excess: limits.Excess) -> str:
        """Whose incident it is: names can be made up in the shared maildrop, and all beyond some are one."""
        if row.maildrop != layout.UNREGISTERED or self.config.has_section(row.vhost) or row.vhost in self._incidents.vhosts:
            return row.vhost
        made_up = sum(1 for vhost in self._incidents.vhosts if vhost not in self._drops)
        return layout.UNREGISTERED if excess.whose or made_up >= MADE_UP else row.vhost

    def _not_theirs(self, submitted: pickup.Submitted, row: Row) -> str | None:
        """Why what the message claims to be is not what the kernel says; None where it is, or where nothing can be said."""
        claimed = submitted.envelope.vhost
        if submitted.maildrop == layout.UNREGISTERED:
            registered = claimed in self._drops or self.config.has_users(claimed)
            if registered and row.uid not in self._uids(claimed):
                return f"claims to be from {claimed}, which uid {row.uid} is no user of"
            if row.uid in (0, os.geteuid()) and not self._private:
                return f"submitted by {identity.user(row.uid)}, which is no customer"
            return None
        if claimed != row.vhost and claimed not in self._ledger.former_names(row.vhost):
            return f"claims to be from {claimed}"
        if not row.verified:
            return f"submitted by uid {row.uid}, which is no user of {row.vhost}"
        return None

    def _uids(self, vhost: str) -> frozenset[int]:
        """Who may submit as VHOST: its users, never root nor ourselves; in private mode the one uid that there is."""
        if self._private:
            return frozenset((os.geteuid(),))
        return self.config.uids(vhost) - {0, os.geteuid()}

    def _new_row(self, submitted: pickup.Submitted) -> Row:
        found, status = submitted.envelope, submitted.status
        queue_id = layout.new_queue_id()
        # In the shared maildrop the claim is all there is.
        vhost = found.vhost if submitted.maildrop == layout.UNREGISTERED else submitted.maildrop
        sender = self.config.vhost(vhost).envelope_sender(
            vhost if submitted.maildrop == vhost else None, found.sender, partial(self._login, status.st_uid)
        )
        # A recipient named twice is one; enqueue has seen to that, but who writes into new/ need not.
        recipients = list({_comparable(address): address for address in found.recipients}.values())
        return Row(
            queue_id=queue_id,
            vhost=vhost,
            maildrop=submitted.maildrop,
            state=ACTIVE,
            source=submitted.name.decode(),
            digest="",
            recipients=len(recipients),
            remaining=recipients,
            sender=sender,
            size=submitted.message_size,
            arrived_at=found.arrived if ledger.is_utc(found.arrived) else ledger.utc(status.st_ctime),
            picked_up_at=ledger.utc(time.time()),
            uid=status.st_uid,
            verified=int(vhost == submitted.maildrop and status.st_uid in self._uids(vhost)),
            message_id=submitted.header.message_id or f"<{queue_id}@{vhost}>",
            subject=submitted.header.text("subject"),
            script=found.origin,
            cwd=found.cwd,
            reason="",
            refused=[],
        )

    def _replaced(self, batch: Batch, known: Row, why: str = "another message has its name") -> None:
        """A message that the ledger knows has gone from new/, and WHY."""
        self._drops.known.pop((known.maildrop, known.source or ""))
        if known.state == ACTIVE and known.deferred_at is None and known.decision is None:
            self._close(batch, known, why)
        else:
            self._drops.removed.append(known.queue_id)

    def _close(self, batch: Batch, row: Row, reason: str) -> None:
        """End an attempt whose message has gone; it counts from now on."""
        accounts, reserved = self._accounts_of(row), row.limited and row.counted_at is None
        startup.close_unknown(batch, row, reason)
        if reserved:
            for account in accounts:
                account.confirm(row.queue_id, row.counted_at or self._now(), row.recipients, row.vhost)

    def _close_vanished(self) -> None:
        """Open attempts of an earlier run whose file its owner has removed before it was read again."""
        batch = Batch(self._ledger)
        for key, row in list(self._drops.known.items()):
            open_attempt = row.state == ACTIVE and row.deferred_at is None and row.decision is None
            # Without its directory nothing is known of the file.
            gone = os.path.isdir(os.path.dirname(self._drops.path(row))) and not os.path.lexists(self._drops.path(row))
            if open_attempt and gone and not self._handover.flies(row.queue_id):
                self._drops.known.pop(key)
                self._close(batch, row, "its file has gone")
        self._commit(batch)

    def _hold(self, batch: Batch, row: Row, submitted: pickup.Submitted, reason: str) -> None:
        """S3 -> S6."""
        row.reason, row.held_at = reason, ledger.utc(time.time())
        # Where there is no room for the copy, nothing has been decided.
        self._store(row, submitted, "hold")
        row.state = HELD
        self._door.add(row)
        if row.limited and row.counted_at is None:
            for account in self._accounts_of(row):
                account.cancel(row.queue_id)
        batch.put(row)
        batch.log_all("held", row, reason)
        batch.then(partial(self._drops.remove, row, submitted))
        LOG.warning(maillog.held(row.queue_id, row.vhost, row.recipients, reason))

    def _send(self, batch: Batch, row: Row, submitted: pickup.Submitted, again: bool = False) -> None:
        """Begin an attempt. A small message needs no copy on disk; a larger one is copied first: S3 -> S4."""
        if submitted.small:
            data = b"".join(self._chunks(submitted, row))
            row.size, row.digest = len(data), submitted.digest()
            flight = Flight(row, submitted.envelope, partial(io.BytesIO, data), data.isascii(), submitted, again)
        else:
            ascii_only = self._store(row, submitted, "active")
            flight = Flight(row, submitted.envelope, self._handover.in_active(row.queue_id), ascii_only, submitted, again)
        self._handover.begin(batch, flight)

    def _store(self, row: Row, submitted: pickup.Submitted, target: str) -> bool:
        """Copy the message into our directory TARGET; return whether it is all ASCII."""
        # No recipient remains where the MTA has refused all, and there was no room for the copy in failed/.
        head = verified(submitted.envelope, row, row.concerned)
        chunks = self._chunks(submitted, row)
        row.size, ascii_only = mailqueue.store(self._spool, target, row.queue_id, head.format(), chunks)
        row.digest = submitted.digest()
        return ascii_only

    def _chunks(self, submitted: pickup.Submitted, row: Row) -> Iterator[bytes]:
        return submitted.chunks(self.config.tag(row.vhost), row.message_id)

    def _corrupt(self, batch: Batch, vhost: str, name: bytes, reason: str) -> bool:
        """S3 -> S12: moved by rename, so that the quota of who wrote it still pays for it. Whether it was moved."""
        queue_id = layout.new_queue_id()
        shown = os.fsdecode(name).encode("utf-8", "backslashreplace").decode()
        source = os.fsencode(layout.maildrop(self._spool, vhost)) + b"/new/" + name
        try:
            status = os.lstat(source)
            os.rename(source, layout.path(self._spool, "corrupt", queue_id))
        except OSError as error:
            self._drops.leave(vhost, name, f"{reason}; cannot be moved to corrupt/: {error.strerror}")
            return False
        startup.corrupt(batch, queue_id, vhost, status, f"{reason}; name {shown}")
        LOG.warning(maillog.corrupt(queue_id, vhost, shown, reason))
        return True

    # Decisions of a person: S7 -> S5, S7 -> S11, S11 -> S7, S10 -> S5, S10 -> S11.

    def _carry_out_decisions(self, batch: Batch) -> None:
        if not self._decisions_wait:
            return
        decided = self._ledger.decided(ROUND)
        self._decisions_wait = len(decided) == ROUND
        for row in decided:
            part = Batch(self._ledger)
            try:
                self._carry_out(part, row)
            except Exception as error:
                # It is tried again with the next scan, and the others' decisions do not wait for it.
                LOG.error(maillog.undecided(row.queue_id, row.vhost, error), exc_info=True)
            else:
                batch.add(part)
        for target in {PLACE[row.state] for row in decided}:
            batch.then(partial(mailqueue.sync_directory, f"{self._spool}/{target}"))

    def _carry_out(self, batch: Batch, row: Row) -> None:
        decision, actor = row.decision or "", row.actor or ""
        row.executed_at = ledger.utc(time.time())
        batch.then(partial(startup.place, self._spool, row, sync=False))
        if not row.remaining:
            # What the MTA has refused is told to it again.
            row.remaining, row.refused = row.concerned, []
        if decision == "release":
            row.deferred_at = None
            row.state, row.limited, row.next_try = ACTIVE, 0, self._now()
            batch.then(partial(self._handover.later, row.next_try, row.queue_id))
        else:
            row.state = TRASHED if decision == "delete" else HELD
            self._door.add(row, -1 if decision == "delete" else 1)
            batch.log_all(f"{decision}d", row, row.why, actor)
        batch.put(row)
        LOG.info(maillog.decided(row.queue_id, row.vhost, decision, actor))

    def _login(self, uid: int) -> str:
        """The envelope sender where neither caller nor configuration gives one, as every sendmail command makes it."""
        found = self._logins.get(uid)
        if found is None:
            try:
                user = pwd.getpwuid(uid).pw_name
            except KeyError:
                user = f"uid{uid}"
            found = self._logins[uid] = f"{user}@{os.uname().nodename}"
        return found

    # What the configuration says.

    def _settings(self, vhost: str) -> VhostSettings:
        """What holds for VHOST, for one without a maildrop of its own where that is only claimed."""
        own = vhost in self._drops and vhost != layout.UNREGISTERED
        return self.config.vhost(vhost) if own else self.config.unregistered(vhost)

    def _accounts_of(self, row: Row) -> list[limits.Account]:
        """The accounts that ROW counts for: its vhost's, and its uid's where the vhost is only claimed or shares the uid."""
        found = [self._account(row.vhost)]
        if not self._private and (row.maildrop == layout.UNREGISTERED or self.config.shares_uid(row.vhost, row.uid)):
            found.append(self._account_of_uid(row.uid))
        return found

    def _account(self, vhost: str) -> limits.Account:
        account = self._accounts.get(vhost)
        if account is None:
            account = self._accounts[vhost] = usage.account(self._ledger, vhost, self._settings(vhost))
        return account

    def _account_of_uid(self, uid: int) -> limits.Account:
        account = self._accounts.get(uid)
        if account is None:
            account = self._accounts[uid] = usage.account_of_uid(self._ledger, uid, self.config)
        return account

    def _is_renamed(self, old: str, new: str) -> bool:
        """Whether the maildrop OLD has the name NEW by now."""
        return os.path.isdir(layout.maildrop(self._spool, new)) and not os.path.lexists(layout.maildrop(self._spool, old))

    def _carry_over(self) -> None:
        """Let renamed vhosts keep their windows, held mail and stops, as soon as nothing of them is with the MTA."""
        for old, new in self._ledger.renames():
            if not self._is_renamed(old, new):
                continue
            if old in self._handover.busy:
                self._drops.frozen.add(new)
                continue
            self._ledger.carry_over(old, new)
            self._drops.carry_over(old, new)
            self._handover.carry_over(old, new)
            self._incidents.load()
            self._accounts = {}
            self._door.forget_limits()
            self._door.load()
            self._drops.write_policies()
            LOG.warning(maillog.taken_over(old, new))

    def _policy(self, vhost: str, bell: str) -> bytes:
        vhosts = [vhost]
        if vhost == layout.UNREGISTERED:
            vhosts += [name for name in self._incidents.vhosts if name not in self._drops]
        warnings, refusals = self._incidents.warnings(vhosts), self._door.refusals(vhost)
        now, until = time.time(), self._ledger.clock.wall(self._door.until(vhost))
        return policy.render(self.config, vhost, bell, self._max_size(vhost), warnings, now, refusals, until)

    def _max_size(self, vhost: str) -> int:
        """The largest message in bytes: the configured one, and not more than the MTA takes with our tag."""
        configured = self._settings(vhost).max_message_size
        tag = sum(len(name) + len(value) + 4 for name, value in self.config.tag(vhost))
        announced = self._handover.senders.max_size
        return min(configured, max(announced - tag, 0)) if announced else configured


def _comparable(address: str) -> tuple[str, str]:
    local, domain = envelope.split(address)
    return local, domain.lower()
