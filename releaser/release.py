"""The engine: every message's way from new/ to its outcome, one transaction of the ledger per round.

Order, for every message: durable attempt, then DATA, then durable outcome, then unlink. Nothing here runs in another
thread; the senders only get bytes and give outcomes. Rows S1.. are those of spool_layout.md.
"""

import heapq
import io
import os
import pwd
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO

from releaser import envelope, layout, ledger, limits, maillog, mailqueue, mta, pickup, policy
from releaser.config import Config, VhostSettings
from releaser.ledger import ACTIVE, CORRUPT, DONE, FAILED, HELD, TRASHED, UNKNOWN, Ledger, Row
from releaser.maillog import LOG
from releaser.mta import Job, Kind, Outcome, Senders, Unreachable

# At most so many names of one vhost are looked at in one go, and so many messages decided in one round.
LISTED = 10_000
ROUND = 100
# Seconds between tries while there is no MTA, doubled from the first to the second.
MTA_BACKOFF = (1, 30)
# Seconds between tries of a message that the MTA defers, likewise.
MESSAGE_BACKOFF = (10, 3600)


@dataclass
class Maildrop:
    """What the engine knows of a vhost's new/."""

    bell: str | None = None
    names: deque[bytes] = field(default_factory=deque)
    # To be listed as soon as NAMES is empty.
    dirty: bool = False
    # Whether it waits for its turn.
    waiting: bool = False
    changed_ns: int = 0
    # Taken up and not yet removed from new/: never listed again, or they would be decided twice.
    taken: set[bytes] = field(default_factory=set)
    # Names already complained about.
    left: set[bytes] = field(default_factory=set)


@dataclass
class Flight:
    """A message with the senders."""

    row: Row
    message: Callable[[], BinaryIO]
    ascii_only: bool
    # The inode of the file in new/ that it was read from; 0 where it comes from active/.
    inode: int = 0
    # An earlier attempt has no known outcome: this one may make a duplicate.
    again: bool = False


class Batch:
    """What one round writes together, and what may happen only when that is durable."""

    def __init__(self) -> None:
        self.writes: list[Callable[[], None]] = []
        self.after: list[Callable[[], None]] = []


class Releaser:
    """Takes mail from the maildrops and sees it through. step() does all that can be done now."""

    def __init__(self, config: Config, book: Ledger, wake: Callable[[], None]) -> None:
        self.config = config
        self._ledger = book
        self._wake = wake
        self.senders = Senders(config.mta_url, wake)
        self._spool = config.spool
        self._maildrops: dict[str, Maildrop] = {}
        self._bells: dict[str, str] = {}
        self._accounts: dict[str, limits.Account] = {}
        self._flights: dict[str, Flight] = {}
        self._busy: set[str] = set()
        self._turn: deque[str] = deque()
        # Files in new/ that the ledger knows: an open attempt, or an outcome whose file is still to be removed.
        self._known: dict[tuple[str, str], Row] = {}
        self._removed: list[str] = []
        self._retries: list[tuple[float, str]] = []
        self._mta_down_until = 0.0
        self._mta_backoff = 0.0
        self._announced_size = 0
        self._decisions_wait = True
        self._next_scan = 0.0
        self._next_cleaning = 0.0

    # What the daemon calls.

    def start(self) -> None:
        """Take up what an earlier run, or a crash, has left."""
        mailqueue.remove_partial(self._spool)
        for row in self._ledger.rows("source IS NOT NULL"):
            self._known[row.vhost, row.source or ""] = row
        self._adopt()
        self._remove_unrecorded_failures()
        self._move_into_place()
        self._close_lost()
        self.scan()

    def scan(self) -> None:
        """Look at every maildrop, also those made since the last time, whether or not a bell was heard."""
        now = time.time()
        self._next_scan = now + layout.SCAN_INTERVAL
        self._decisions_wait = True
        found = {name for name in os.listdir(f"{self._spool}/vhosts") if layout.is_vhost(name)}
        for vhost in self._maildrops.keys() - found:
            self._forget(vhost)
        for vhost in found:
            drop = self._maildrops.get(vhost) or self._add(vhost)
            try:
                changed = os.stat(f"{layout.maildrop(self._spool, vhost)}/new").st_mtime_ns
            except OSError as error:
                LOG.error(maillog.left(vhost, "", str(error)))
                continue
            # A file can arrive in the same tick of the clock as the last listing, hence the two seconds.
            if changed + 2_000_000_000 > drop.changed_ns or drop.left:
                self._mark(vhost, drop)
        if now >= self._next_cleaning:
            self._next_cleaning = now + 3600
            self._clean(now)

    def rung(self, bells: set[str]) -> None:
        """Mark what BELLS stand for to be looked at."""
        if layout.CONTROL_BELL in bells:
            self.scan()
        for bell in bells:
            vhost = self._bells.get(bell)
            if vhost is not None:
                self._mark(vhost, self._maildrops[vhost])

    def reload(self, config: Config) -> None:
        """Let CONFIG decide from now on; the usage of the windows comes from the ledger again."""
        if config.mta_url != self.config.mta_url:
            self.finish()
            self.senders.stop()
            self.senders = Senders(config.mta_url, self._wake)
            self._mta_down_until = self._mta_backoff = 0.0
        self.config = config
        self._accounts = {}
        self._write_policies()

    def step(self) -> float:
        """Do all that can be done now; return the seconds until something more could be, unless a bell or a result comes."""
        now = time.time()
        batch = Batch()
        self._take_results(batch)
        self._carry_out_decisions(batch)
        if now >= self._mta_down_until:
            self._retry(batch, now)
            self._pick_up(batch)
        self._commit(batch)
        if self.senders.max_size != self._announced_size:
            self._announced_size = self.senders.max_size
            self._write_policies()
        if now >= self._next_scan:
            self.scan()
        return self._pause()

    @property
    def idle(self) -> bool:
        """Nothing is left that could be done now."""
        now = time.time()
        work = bool(self._turn) or bool(self._retries and self._retries[0][0] <= now)
        return not self._flights and not self._decisions_wait and (not work or self._mta_down_until > now)

    def finish(self) -> None:
        """Wait for what is in flight, and make its outcome durable."""
        while self._flights:
            batch = Batch()
            self._take_results(batch)
            self._commit(batch)
            time.sleep(0.01)
        self._commit(Batch())

    # Maildrops.

    def _add(self, vhost: str) -> Maildrop:
        drop = Maildrop(bell=policy.bell(self._spool, vhost))
        if drop.bell is None:
            LOG.warning(maillog.left(vhost, "policy", "no bell: found by scanning only; run: secure-sendmail check"))
        else:
            self._bells[drop.bell] = vhost
        self._maildrops[vhost] = drop
        self._write_policy(vhost, drop)
        return drop

    def _forget(self, vhost: str) -> None:
        drop = self._maildrops.pop(vhost)
        self._bells.pop(drop.bell or "", None)
        if drop.waiting:
            self._turn.remove(vhost)

    def _mark(self, vhost: str, drop: Maildrop) -> None:
        drop.dirty = True
        if not drop.waiting:
            drop.waiting = True
            self._turn.append(vhost)

    def _write_policies(self) -> None:
        for vhost, drop in self._maildrops.items():
            self._write_policy(vhost, drop)

    def _write_policy(self, vhost: str, drop: Maildrop) -> None:
        if drop.bell is None:
            return
        try:
            policy.write(self._spool, vhost, policy.render(self.config, vhost, drop.bell, self._max_size(vhost)))
        except OSError as error:
            # enqueue goes on with the last one, or with its defaults.
            LOG.error(maillog.left(vhost, "policy", str(error)))

    def _max_size(self, vhost: str) -> int:
        """The largest message in bytes: the configured one, and not more than the MTA takes with our tag."""
        configured = self.config.vhost(vhost).max_message_size
        tag = sum(len(name) + len(value) + 4 for name, value in self.config.tag(vhost))
        announced = self.senders.max_size
        return min(configured, max(announced - tag, 0)) if announced else configured

    def _list(self, vhost: str, drop: Maildrop) -> None:
        drop.dirty = False
        drop.changed_ns = time.time_ns()
        try:
            listed = pickup.names(self._spool, vhost, LISTED)
        except OSError as error:
            LOG.error(maillog.left(vhost, "new", str(error)))
            return
        drop.names = deque(name for name in listed if name not in drop.taken)
        drop.left &= set(listed)

    def _clean(self, now: float) -> None:
        for vhost in self._maildrops:
            try:
                pickup.remove_leftovers(self._spool, vhost, now)
            except OSError as error:
                LOG.error(maillog.left(vhost, "tmp", str(error)))

    # From new/ to a decision.

    def _pick_up(self, batch: Batch) -> None:
        """Decide messages, the vhosts in turn, until the senders have enough to do or the round is full."""
        for _ in range(ROUND):
            vhost = self._next_vhost() if len(self._flights) < self._capacity() else None
            if vhost is None:
                return
            drop = self._maildrops[vhost]
            name = drop.names.popleft()
            try:
                self._take(batch, vhost, name)
            except pickup.NotYet as error:
                self._leave(vhost, drop, name, str(error))
            except Exception as error:
                # One message cannot stop the mail of all others; it stays in new/, where a person finds it.
                if name not in drop.left:
                    drop.left.add(name)
                    LOG.exception(maillog.left(vhost, os.fsdecode(name), f"internal error: {error!r}"))

    def _leave(self, vhost: str, drop: Maildrop, name: bytes, reason: str) -> None:
        """Say once that a file stays in new/."""
        if name not in drop.left:
            drop.left.add(name)
            LOG.warning(maillog.left(vhost, os.fsdecode(name), reason))

    def _next_vhost(self) -> str | None:
        """The next vhost in turn that has mail and none in flight."""
        for _ in range(len(self._turn)):
            vhost = self._turn.popleft()
            drop = self._maildrops[vhost]
            if vhost not in self._busy:
                if drop.dirty and not drop.names:
                    self._list(vhost, drop)
                if not drop.names:
                    drop.waiting = False
                    continue
            self._turn.append(vhost)
            if vhost not in self._busy:
                return vhost
        return None

    def _capacity(self) -> int:
        # While it is not known that the MTA is back, one message finds out.
        return 1 if self._mta_backoff else mta.SESSIONS

    def _take(self, batch: Batch, vhost: str, name: bytes) -> None:
        settings = self.config.vhost(vhost)
        drop = self._maildrops[vhost]
        try:
            # In private mode the one uid that owns the spool is the one that submits.
            submitted = pickup.Submitted(self._spool, vhost, name, frozenset((os.geteuid(),)), settings.max_message_size)
        except FileNotFoundError:
            return
        except pickup.Corrupt as error:
            self._corrupt(batch, vhost, name, str(error))
            return
        drop.taken.add(name)
        try:
            self._decide(batch, submitted, settings)
        except BaseException:
            drop.taken.discard(name)
            raise
        finally:
            submitted.close()

    def _decide(self, batch: Batch, submitted: pickup.Submitted, settings: VhostSettings) -> None:
        vhost, source = submitted.vhost, submitted.name.decode()
        known = self._known.get((vhost, source))
        if known is not None and submitted.same_bytes(known.digest):
            if known.state != ACTIVE or known.deferred_at is not None:
                # The unlink that a crash, or the file system, has prevented.
                batch.after.append(partial(self._remove_source, known, submitted.status.st_ino))
                return
            known.attempts += 1
            self._send(batch, known, submitted, again=True)
            return
        if known is not None:
            self._close_unknown(batch, known, "another message has its name")
        row = self._new_row(submitted)
        reason, counted = self._verdict(submitted, row, settings)
        if reason and not (counted and settings.over_limit == "observe"):
            self._hold(batch, row, submitted, reason)
            return
        if reason:
            LOG.warning(maillog.observed(row.queue_id, vhost, row.recipients, reason))
            row.reason = f"observed: {reason}"
        row.attempts = 1
        self._send(batch, row, submitted)
        self._account(vhost).reserve(row.queue_id, row.recipients)

    def _verdict(self, submitted: pickup.Submitted, row: Row, settings: VhostSettings) -> tuple[str, bool]:
        """Why the message is to be held, empty if it is not; and whether that is because of a limit."""
        claimed = submitted.envelope.vhost
        if claimed != row.vhost:
            return f"claims to be from {claimed}", False
        if row.size > self._max_size(row.vhost):
            return f"larger than {self._max_size(row.vhost)} bytes", False
        for recipient in row.remaining:
            if not envelope.one_mailbox(recipient):
                return "ambiguous recipient: without a domain, or with % or !, the MTA may take it for many", False
        excess = self._account(row.vhost).exceeded(row.recipients, time.time())
        return (excess.reason, True) if excess else ("", False)

    def _new_row(self, submitted: pickup.Submitted) -> Row:
        found, status = submitted.envelope, submitted.status
        queue_id = layout.new_queue_id()
        settings = self.config.vhost(submitted.vhost)
        sender = found.sender if found.sender is not None else settings.sender or _login(status.st_uid)
        # A recipient named twice is one; enqueue has seen to that, but who writes into new/ need not.
        recipients = list({_comparable(address): address for address in found.recipients}.values())
        return Row(
            queue_id=queue_id,
            vhost=submitted.vhost,
            state=ACTIVE,
            source=submitted.name.decode(),
            digest="",
            recipients=len(recipients),
            remaining=recipients,
            sender=sender,
            size=submitted.message_size,
            arrived_at=found.arrived or ledger.utc(status.st_ctime),
            picked_up_at=ledger.utc(time.time()),
            uid=status.st_uid,
            verified=1,
            message_id=submitted.header.text("message-id") or f"<{queue_id}@{submitted.vhost}>",
            subject=submitted.header.text("subject"),
            script=found.script,
            cwd=found.cwd,
            reason="",
            refused=[],
        )

    def _head(self, submitted: pickup.Submitted, row: Row) -> bytes:
        """The envelope of our copy: what was claimed, and what is verified."""
        return submitted.envelope.with_(
            vhost=row.vhost,
            sender=row.sender,
            recipients=tuple(row.remaining),
            queue_id=row.queue_id,
            source=row.source or "",
            owner=str(row.uid),
            picked_up=row.picked_up_at,
            held=row.held_at or "",
            reason=row.reason,
            message_id=row.message_id,
        ).format()

    def _chunks(self, submitted: pickup.Submitted, row: Row) -> Iterator[bytes]:
        return submitted.chunks(self.config.tag(row.vhost), row.message_id)

    def _hold(self, batch: Batch, row: Row, submitted: pickup.Submitted, reason: str) -> None:
        """S3 -> S6."""
        row.state, row.reason, row.held_at = HELD, reason, ledger.utc(time.time())
        row.size, _ = mailqueue.store(self._spool, "hold", row.queue_id, self._head(submitted, row), self._chunks(submitted, row))
        row.digest = submitted.digest()
        self._put(batch, row)
        self._log(batch, "held", row, reason)
        batch.after.append(partial(self._remove_source, row, submitted.status.st_ino))
        LOG.warning(maillog.held(row.queue_id, row.vhost, row.recipients, reason))

    def _send(self, batch: Batch, row: Row, submitted: pickup.Submitted, again: bool = False) -> None:
        """Make the attempt durable, then let it begin. Larger messages are copied first: S3 -> S4."""
        chunks = self._chunks(submitted, row)
        if submitted.small:
            data = b"".join(chunks)
            flight = Flight(row, partial(io.BytesIO, data), data.isascii(), submitted.status.st_ino, again)
            row.size = len(data)
        else:
            head = self._head(submitted, row)
            row.size, ascii_only = mailqueue.store(self._spool, "active", row.queue_id, head, chunks)
            flight = Flight(row, partial(self._open, row.queue_id), ascii_only, submitted.status.st_ino, again)
        row.digest = submitted.digest()
        row.attempt_open = 1
        self._begin(batch, flight)

    def _corrupt(self, batch: Batch, vhost: str, name: bytes, reason: str) -> None:
        """S3 -> S12: moved by rename, so that the quota of who wrote it still pays for it."""
        drop = self._maildrops[vhost]
        queue_id = layout.new_queue_id()
        shown = os.fsdecode(name).encode("utf-8", "backslashreplace").decode()
        source = os.fsencode(layout.maildrop(self._spool, vhost)) + b"/new/" + name
        try:
            status = os.lstat(source)
            os.rename(source, layout.path(self._spool, "corrupt", queue_id))
        except OSError as error:
            if name not in drop.left:
                drop.left.add(name)
                LOG.error(maillog.left(vhost, shown, f"{reason}; cannot be moved to corrupt/: {error.strerror}"))
            return
        row = Row(
            queue_id=queue_id, vhost=vhost, state=CORRUPT, source=None, digest="", recipients=0, remaining=[], sender="",
            size=status.st_size, arrived_at=ledger.utc(status.st_ctime), picked_up_at=ledger.utc(time.time()),
            uid=status.st_uid, verified=1, message_id="", subject="", script="", cwd="", reason=f"{reason}; name {shown}",
            refused=[], limited=0,
        )  # fmt: skip
        self._put(batch, row)
        batch.writes.append(partial(self._ledger.log, "corrupt", row, time.time(), [("", row.reason, "")]))
        LOG.warning(maillog.corrupt(queue_id, vhost, shown, reason))

    # Flights: from a durable attempt to a durable outcome.

    def _begin(self, batch: Batch, flight: Flight) -> None:
        row = flight.row
        self._flights[row.queue_id] = flight
        self._busy.add(row.vhost)
        self._put(batch, row)
        batch.after.append(partial(self._dispatch, flight))

    def _dispatch(self, flight: Flight) -> None:
        row = flight.row
        recipients = tuple(row.remaining[: mta.RECIPIENTS_PER_TRANSACTION])
        self.senders.send(Job(row.queue_id, row.sender, recipients, flight.message, row.size, flight.ascii_only))

    def _take_results(self, batch: Batch) -> None:
        while not self.senders.results.empty():
            job, result = self.senders.results.get()
            flight = self._flights.pop(job.queue_id)
            self._busy.discard(flight.row.vhost)
            if isinstance(result, Unreachable):
                self._unreachable(batch, flight, str(result))
            else:
                if self._mta_backoff:
                    self._mta_backoff = 0
                    LOG.warning(maillog.mta_up())
                self._outcome(batch, flight, result)

    def _unreachable(self, batch: Batch, flight: Flight, words: str) -> None:
        """Nothing was handed over: the reservation is given back, the mail stays where it is, all mail waits."""
        row = flight.row
        first, most = MTA_BACKOFF
        if not self._mta_backoff or time.time() >= self._mta_down_until:
            self._mta_backoff = min(max(self._mta_backoff * 2, first), most)
            self._mta_down_until = time.time() + self._mta_backoff
            LOG.error(maillog.mta_down(words, self._mta_backoff))
        if not flight.inode:
            row.attempts -= 1
            row.attempt_open = 0
            row.next_try = self._mta_down_until
            self._put(batch, row)
            heapq.heappush(self._retries, (row.next_try, row.queue_id))
            return
        drop = self._maildrops.get(row.vhost)
        if drop is not None:
            name = (row.source or "").encode()
            drop.taken.discard(name)
            drop.names.appendleft(name)
            self._mark(row.vhost, drop)
        if flight.again:
            # An earlier attempt may have succeeded: it stays open, and counted.
            row.attempts -= 1
            return
        self._account(row.vhost).cancel(row.queue_id)
        batch.writes.append(partial(self._ledger.remove, row.queue_id))
        batch.after.append(partial(mailqueue.remove, self._spool, "active", row.queue_id))

    def _outcome(self, batch: Batch, flight: Flight, outcomes: list[Outcome]) -> None:
        row, now = flight.row, time.time()
        if flight.again:
            flight.again = False
            self._log(batch, "retried", row, f"attempt {row.attempts}: the outcome of the last is not known")
            LOG.warning(maillog.again(row.queue_id, row.vhost, row.attempts))
        if row.limited and row.counted_at is None:
            row.counted_at = now
            self._account(row.vhost).confirm(row.queue_id, now, row.recipients)
        sent = [outcome for outcome in outcomes if outcome.kind is Kind.SENT]
        deferred = [outcome for outcome in outcomes if outcome.kind is Kind.TEMPFAIL]
        failed = [outcome for outcome in outcomes if outcome.kind is Kind.PERMFAIL]
        if row.deferred_at is not None and now - row.deferred_at > self.config.give_up:
            failed += [Outcome(o.recipient, Kind.PERMFAIL, f"given up: {o.words}") for o in deferred]
            deferred = []
        tried = {outcome.recipient for outcome in outcomes}
        untried = [recipient for recipient in row.remaining if recipient not in tried]
        row.remaining = untried + [outcome.recipient for outcome in deferred]
        row.refused += [(outcome.recipient, outcome.words) for outcome in failed]
        if sent:
            actor = (row.actor or "") if row.decision == "release" else ""
            by_hand = f"released by hand: {row.why}".removesuffix(": ") if actor else row.reason
            self._log_each(batch, "released", row, [(o.recipient, by_hand, o.mta_queue_id) for o in sent], actor)
            LOG.info(maillog.released(row.queue_id, row.vhost, len(sent), row.attempts, by_hand))
        if failed:
            self._log_each(batch, "failed", row, [(o.recipient, o.words, "") for o in failed])
            LOG.warning(maillog.failed(row.queue_id, row.vhost, len(failed), failed[0].words))
        if untried:
            # A server takes so many recipients at a time; the rest of this message follows at once.
            self._begin(batch, flight)
        elif deferred:
            self._defer(batch, flight, deferred, now)
        else:
            self._end(batch, flight)

    def _defer(self, batch: Batch, flight: Flight, deferred: list[Outcome], now: float) -> None:
        """S3, S4 or S5 -> S5: only this message waits, in active/."""
        row = flight.row
        if row.deferred_at is None:
            row.deferred_at = now
            self._log_each(batch, "deferred", row, [(o.recipient, o.words, "") for o in deferred])
        first, most = MESSAGE_BACKOFF
        pause = min(first * 2 ** min(row.attempts - 1, 20), most)
        row.next_try = now + pause
        row.attempt_open = 0
        if not os.path.exists(layout.path(self._spool, "active", row.queue_id)):
            self._copy("active", flight, ())
        self._put(batch, row)
        heapq.heappush(self._retries, (row.next_try, row.queue_id))
        if flight.inode:
            batch.after.append(partial(self._remove_source, row, flight.inode))
        LOG.warning(maillog.deferred(row.queue_id, row.vhost, len(deferred), pause, deferred[0].words))

    def _end(self, batch: Batch, flight: Flight) -> None:
        """S3, S4 or S5 -> S1, or S10 where the MTA has refused recipients for good."""
        row = flight.row
        row.attempt_open, row.next_try = 0, None
        row.state = FAILED if row.refused else DONE
        if row.refused:
            self._copy("failed", flight, tuple(f"{address} {words}" for address, words in row.refused))
        self._put(batch, row)
        if flight.inode:
            batch.after.append(partial(self._remove_source, row, flight.inode))
        batch.after.append(partial(mailqueue.remove, self._spool, "active", row.queue_id))

    def _copy(self, target: str, flight: Flight, failed: tuple[str, ...]) -> None:
        row = flight.row
        recipients = tuple(row.remaining) or tuple(address for address, _ in row.refused)
        head = envelope.Envelope(
            vhost=row.vhost, recipients=recipients, sender=row.sender, arrived=row.arrived_at, cwd=row.cwd, script=row.script,
            message_id=row.message_id, queue_id=row.queue_id, source=row.source or "", owner=str(row.uid),
            picked_up=row.picked_up_at, reason=row.reason, failed=failed,
        ).format()  # fmt: skip
        with flight.message() as stream:
            mailqueue.store(self._spool, target, row.queue_id, head, iter(partial(stream.read, pickup.CHUNK), b""))

    def _retry(self, batch: Batch, now: float) -> None:
        while self._retries and self._retries[0][0] <= now and len(self._flights) < self._capacity():
            _, queue_id = heapq.heappop(self._retries)
            row = self._ledger.row(queue_id)
            if row is None or row.state != ACTIVE or queue_id in self._flights:
                continue
            try:
                ascii_only = self._ascii_only(queue_id)
            except (OSError, envelope.NoLayout, envelope.NewerLayout) as error:
                self._close_unknown(batch, row, f"cannot read active/{queue_id}: {error}")
                continue
            if queue_id in self._removed:
                row.source = None
            again = bool(row.attempt_open)
            row.attempts += 1
            row.attempt_open = 1
            self._begin(batch, Flight(row, partial(self._open, queue_id), ascii_only, again=again))

    def _open(self, queue_id: str) -> BinaryIO:
        return mailqueue.read(layout.path(self._spool, "active", queue_id))[1]

    def _ascii_only(self, queue_id: str) -> bool:
        with self._open(queue_id) as stream:
            return all(chunk.isascii() for chunk in iter(partial(stream.read, pickup.CHUNK), b""))

    def _remove_source(self, row: Row, inode: int) -> None:
        """Unlink new/NAME, if it is still the file that was read; durable outcomes make doing it again harmless."""
        assert row.source is not None
        path = self._new(row.vhost, row.source)
        try:
            if os.lstat(path).st_ino == inode:
                os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._known[row.vhost, row.source] = row
            LOG.error(maillog.left(row.vhost, row.source, f"cannot be removed: {error.strerror}"))
            return
        self._known.pop((row.vhost, row.source), None)
        if row.vhost in self._maildrops:
            self._maildrops[row.vhost].taken.discard(row.source.encode())
        self._removed.append(row.queue_id)
        row.source = None

    # Decisions of a person: S7 -> S5, S7 -> S11, S11 -> S7.

    def _carry_out_decisions(self, batch: Batch) -> None:
        if not self._decisions_wait:
            return
        decided = self._ledger.decided()
        self._decisions_wait = len(decided) > ROUND
        for row in decided[:ROUND]:
            decision, actor = row.decision or "", row.actor or ""
            row.executed_at = ledger.utc(time.time())
            if decision == "release":
                row.state, row.limited, row.next_try = ACTIVE, 0, time.time()
                batch.after.append(partial(heapq.heappush, self._retries, (row.next_try, row.queue_id)))
            else:
                row.state = TRASHED if decision == "delete" else HELD
                self._log(batch, f"{decision}d", row, row.why, actor)
            self._put(batch, row)
            batch.after.insert(0, partial(self._put_in_place, row))
            LOG.info(maillog.decided(row.queue_id, row.vhost, decision, actor))

    def _put_in_place(self, row: Row) -> None:
        """Let the file of ROW lie where its state says; a crash can have come between the commit and the rename."""
        source, target = {HELD: ("trash", "hold"), TRASHED: ("hold", "trash"), ACTIVE: ("hold", "active")}[row.state]
        try:
            mailqueue.move(self._spool, row.queue_id, source, target)
        except OSError as error:
            LOG.error(
                maillog.unknown(row.queue_id, row.vhost, f"its file is missing: {error.strerror}; run: secure-sendmail check")
            )

    # Start-up.

    def _adopt(self) -> None:
        """Files in hold/ and active/ without a row: copies whose commit a crash prevented, or a ledger that was lost."""
        known = set(self._ledger.queue_ids(HELD, TRASHED, ACTIVE))
        for name in ("hold", "active"):
            for queue_id in mailqueue.listing(self._spool, name):
                if queue_id not in known:
                    try:
                        self._adopt_one(name, queue_id)
                    except (OSError, envelope.NoLayout, envelope.NewerLayout) as error:
                        LOG.error(maillog.unknown(queue_id, "", f"{name}/{queue_id} has no record and cannot be read: {error}"))

    def _remove_unrecorded_failures(self) -> None:
        """Copies in failed/ whose commit a crash prevented: the message is still to be tried."""
        for queue_id in set(mailqueue.listing(self._spool, "failed")) - set(self._ledger.queue_ids(FAILED)):
            if self._ledger.row(queue_id) is not None:
                mailqueue.remove(self._spool, "failed", queue_id)

    def _adopt_one(self, name: str, queue_id: str) -> None:
        found, stream = mailqueue.read(layout.path(self._spool, name, queue_id))
        with stream:
            size = stream.seek(0, io.SEEK_END)
        original = bool(found.source) and os.path.lexists(self._new(found.vhost, found.source))
        if original or self._ledger.row(queue_id) is not None:
            # The original is still in new/, or the message has ended: the copy is a leftover.
            mailqueue.remove(self._spool, name, queue_id)
        else:
            self._adopt_as_held(name, queue_id, found, size)

    def _adopt_as_held(self, name: str, queue_id: str, found: envelope.Envelope, size: int) -> None:
        if name != "hold":
            mailqueue.move(self._spool, queue_id, name, "hold")
        row = Row(
            queue_id=queue_id, vhost=found.vhost, state=HELD, source=None, digest="", recipients=len(found.recipients),
            remaining=list(found.recipients), sender=found.sender or "", size=size, arrived_at=found.arrived,
            picked_up_at=found.picked_up, held_at=found.held or ledger.utc(time.time()),
            uid=int(found.owner) if found.owner.isdigit() else os.geteuid(), verified=1, message_id=found.message_id,
            subject="", script=found.script, cwd=found.cwd, refused=[],
            reason=found.reason or "found without a record: it may have been sent already",
        )  # fmt: skip
        with self._ledger.transaction():
            self._ledger.put(row)
            self._ledger.log("held", row, time.time(), [(r, row.reason, "") for r in row.remaining])
        LOG.warning(maillog.held(queue_id, row.vhost, row.recipients, row.reason))

    def _move_into_place(self) -> None:
        for state, name in ((HELD, "hold"), (TRASHED, "trash")):
            for queue_id in set(self._ledger.queue_ids(state)) - set(mailqueue.listing(self._spool, name)):
                row = self._ledger.row(queue_id)
                assert row is not None
                self._put_in_place(row)

    def _close_lost(self) -> None:
        """Open attempts: those with a copy in active/ are tried again, those whose file has gone are closed, still counted."""
        batch = Batch()
        for row in list(self._known.values()):
            if row.state != ACTIVE and not os.path.lexists(self._new(row.vhost, row.source or "")):
                self._known.pop((row.vhost, row.source or ""))
                self._removed.append(row.queue_id)
        for row in self._ledger.rows("state = 'active'"):
            if row.decision == "release" and not os.path.exists(layout.path(self._spool, "active", row.queue_id)):
                self._put_in_place(row)
            copied = os.path.exists(layout.path(self._spool, "active", row.queue_id))
            first = row.source is not None and row.deferred_at is None and row.decision is None
            if first and os.path.lexists(self._new(row.vhost, row.source or "")):
                # S4 -> S3: it is read again from new/, and the copy of a larger message is made again.
                mailqueue.remove(self._spool, "active", row.queue_id)
            elif copied:
                heapq.heappush(self._retries, (row.next_try or 0.0, row.queue_id))
            else:
                self._close_unknown(batch, row, "its file has gone")
        self._commit(batch)

    def _close_unknown(self, batch: Batch, row: Row, reason: str) -> None:
        if row.state == ACTIVE:
            self._log(batch, "unknown", row, reason)
            row.state = UNKNOWN
            if row.limited and row.counted_at is None:
                row.counted_at = time.time()
                self._account(row.vhost).confirm(row.queue_id, row.counted_at, row.recipients)
            LOG.error(maillog.unknown(row.queue_id, row.vhost, reason))
        if row.source is not None:
            self._known.pop((row.vhost, row.source), None)
            row.source = None
        row.attempt_open = 0
        self._put(batch, row)

    # Small things.

    def _new(self, vhost: str, source: str) -> str:
        return f"{layout.maildrop(self._spool, vhost)}/new/{source}"

    def _account(self, vhost: str) -> limits.Account:
        account = self._accounts.get(vhost)
        if account is None:
            settings = self.config.vhost(vhost)
            longest = max((limit.seconds for limit in settings.limits), default=0)
            entries = self._ledger.usage(vhost, time.time() - longest) if longest else []
            account = limits.Account(settings.limits, settings.count == "messages", entries)
            for queue_id, recipients in self._ledger.reserved(vhost):
                account.reserve(queue_id, recipients)
            self._accounts[vhost] = account
        return account

    def _put(self, batch: Batch, row: Row) -> None:
        batch.writes.append(partial(self._ledger.put, row))

    def _log(self, batch: Batch, event: str, row: Row, reason: str, actor: str = "") -> None:
        self._log_each(batch, event, row, [(recipient, reason, "") for recipient in row.remaining], actor)

    def _log_each(self, batch: Batch, event: str, row: Row, recipients: list[tuple[str, str, str]], actor: str = "") -> None:
        batch.writes.append(partial(self._ledger.log, event, row, time.time(), recipients, actor))

    def _commit(self, batch: Batch) -> None:
        removed, self._removed = self._removed, []
        if batch.writes or removed:
            with self._ledger.transaction():
                self._ledger.source_gone(removed)
                for write in batch.writes:
                    write()
        for action in batch.after:
            action()

    def _pause(self) -> float:
        now = time.time()
        if self._decisions_wait:
            return 0
        due = [self._next_scan]
        if self._mta_down_until > now:
            due.append(self._mta_down_until)
        elif len(self._flights) < self._capacity():
            if self._retries:
                due.append(self._retries[0][0])
            if any(vhost not in self._busy for vhost in self._turn):
                return 0
        return max(0.0, min(due) - now)


def _comparable(address: str) -> str:
    local, at, domain = address.rpartition("@")
    return local + at + domain.lower()


def _login(uid: int) -> str:
    """The envelope sender where neither caller nor configuration gives one, as every sendmail command makes it."""
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = f"uid{uid}"
    return f"{user}@{os.uname().nodename}"
