"""The engine: what becomes of every message in the maildrops. One round is one transaction of the ledger.

Nothing here runs in another thread; the senders only get bytes and give outcomes. Rows S1.. are those of
spool_layout.md.
"""

import io
import os
import pwd
import time
from collections.abc import Callable, Iterator
from functools import partial

from releaser import envelope, layout, ledger, limits, maillog, mailqueue, pickup, policy, startup, usage
from releaser.batch import Batch
from releaser.config import Config, VhostSettings
from releaser.handover import Flight, HandOver
from releaser.ledger import ACTIVE, HELD, TRASHED, Ledger, Row
from releaser.maildrops import Maildrops
from releaser.maillog import LOG

# At most so many messages, and so many decisions, in one round.
ROUND = 100
# Other vhosts' mail waits no longer than this, and one message, for the mail of one that is held.
ROUND_SECONDS = 0.05


class Releaser:
    """Takes mail from the maildrops and sees it through. step() does all that can be done now."""

    def __init__(self, config: Config, book: Ledger, wake: Callable[[], None]) -> None:
        """WAKE is called, from any thread, when there is something for step() to do."""
        self.config = config
        self._ledger = book
        self._spool = config.spool
        self._accounts: dict[str, limits.Account] = {}
        self._drops = Maildrops(config.spool, self._policy)
        self._handover = HandOver(config.spool, book, self._drops, self._account, wake, config.mta_url, config.give_up)
        self._announced_size = 0
        self._decisions_wait = True
        self._next_scan = 0.0

    # What the daemon calls.

    def start(self) -> None:
        """Take up what an earlier run, or a crash, has left."""
        taken_up = startup.take_up(self._spool, self._ledger)
        self._drops.known.update(taken_up.known)
        self._drops.removed += taken_up.removed
        for stamp, queue_id in taken_up.retries:
            self._handover.later(stamp, queue_id)
        self.scan()

    def scan(self) -> None:
        """Look at everything, whether or not a bell was heard."""
        self._next_scan = time.time() + layout.SCAN_INTERVAL
        self._decisions_wait = True
        self._drops.scan()
        self._close_vanished()

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
        self._handover.give_up = config.give_up
        self._accounts = {}
        self._drops.write_policies()

    def step(self) -> float:
        """Do all that can be done now; return the seconds until something more could be, unless a bell or a result comes."""
        batch = Batch(self._ledger)
        self._handover.take_results(batch)
        self._carry_out_decisions(batch)
        if time.time() >= self._handover.down_until:
            # New mail finds out whether the MTA is back: what waits in active/ may be what it hangs up on.
            first, second = self._handover.retry, self._pick_up
            if self._handover.probing:
                first, second = second, first
            first(batch)
            second(batch)
        self._commit(batch)
        if self._handover.senders.max_size != self._announced_size:
            self._announced_size = self._handover.senders.max_size
            self._drops.write_policies()
        if time.time() >= self._next_scan:
            self.scan()
        return self._pause()

    @property
    def vhosts(self) -> int:
        return len(self._drops)

    @property
    def idle(self) -> bool:
        """Nothing is left that could be done now."""
        now, retry = time.time(), self._handover.next_retry
        work = self._drops.waiting(()) or (retry is not None and retry <= now)
        return not self._handover.in_flight and not self._decisions_wait and (not work or self._handover.down_until > now)

    def finish(self) -> None:
        """Wait for what is in flight, and make its outcome durable."""
        while self._handover.in_flight:
            batch = Batch(self._ledger)
            self._handover.take_results(batch)
            self._commit(batch)
            time.sleep(0.01)
        self._commit(Batch(self._ledger))

    def stop(self) -> None:
        """Finish, and end the senders."""
        self.finish()
        self._handover.senders.stop()
        self._handover.senders.join()

    def _pause(self) -> float:
        now = time.time()
        due = [self._next_scan]
        if self._decisions_wait:
            return 0
        if self._handover.down_until > now:
            due.append(self._handover.down_until)
        elif self._handover.room:
            if self._drops.waiting(self._handover.busy):
                return 0
            if self._handover.next_retry is not None:
                due.append(self._handover.next_retry)
        return max(0.0, min(due) - now)

    def _commit(self, batch: Batch) -> None:
        removed, self._drops.removed = self._drops.removed, []
        batch.sources_gone(removed)
        batch.commit()

    # From new/ to a decision.

    def _pick_up(self, batch: Batch) -> None:
        """Decide messages, the vhosts in turn, until the senders have enough to do or the round is full."""
        until = time.monotonic() + ROUND_SECONDS
        for _ in range(ROUND):
            if time.monotonic() > until:
                return
            found = self._drops.next(self._handover.busy) if self._handover.room else None
            if found is None:
                return
            vhost, name = found
            try:
                self._take(batch, vhost, name)
            except pickup.NotYet as error:
                self._drops.leave(vhost, name, str(error))
            except Exception as error:
                # One message cannot stop the mail of all others; it stays in new/, where a person finds it.
                self._drops.leave(vhost, name, f"internal error: {error!r}", trace=True)

    def _take(self, batch: Batch, vhost: str, name: bytes) -> None:
        settings = self.config.vhost(vhost)
        try:
            # In private mode the one uid that owns the spool is the one that submits.
            submitted = pickup.Submitted(self._spool, vhost, name, frozenset((os.geteuid(),)), settings.max_message_size)
        except FileNotFoundError:
            return
        except pickup.Corrupt as error:
            self._corrupt(batch, vhost, name, str(error))
            return
        self._drops.take(vhost, name)
        try:
            self._decide(batch, submitted, settings)
        except BaseException:
            submitted.close()
            raise

    def _decide(self, batch: Batch, submitted: pickup.Submitted, settings: VhostSettings) -> None:
        key = submitted.vhost, submitted.name.decode()
        known = self._drops.known.get(key)
        if known is not None and submitted.same_bytes(known.digest):
            if known.state != ACTIVE or known.deferred_at is not None or known.decision is not None:
                # The unlink that the file system has prevented.
                batch.then(partial(self._drops.remove, known, submitted))
                return
            known.attempts += 1
            self._send(batch, known, submitted, again=bool(known.attempt_open))
            return
        if known is not None:
            self._replaced(batch, known)
        row = self._new_row(submitted)
        reason, limited = self._verdict(submitted, row, settings)
        if reason and not (limited and settings.over_limit == "observe"):
            self._hold(batch, row, submitted, reason)
            return
        if reason:
            LOG.warning(maillog.observed(row.queue_id, row.vhost, row.recipients, reason))
            row.reason = f"observed: {reason}"
        row.attempts = 1
        self._send(batch, row, submitted)
        self._account(row.vhost).reserve(row.queue_id, row.recipients)

    def _verdict(self, submitted: pickup.Submitted, row: Row, settings: VhostSettings) -> tuple[str, bool]:
        """Why the message is to be held, empty if it is not; and whether that is because of a limit."""
        claimed = submitted.envelope.vhost
        if claimed != row.vhost:
            return f"claims to be from {claimed}", False
        if row.size > self._max_size(row.vhost):
            return f"larger than {self._max_size(row.vhost)} bytes", False
        if not all(envelope.one_mailbox(recipient) for recipient in row.remaining):
            return "ambiguous recipient: without a domain, or with % or !, the MTA may take it for many", False
        excess = self._account(row.vhost).exceeded(row.recipients, time.time())
        return (excess.reason, True) if excess else ("", False)

    def _new_row(self, submitted: pickup.Submitted) -> Row:
        found, status = submitted.envelope, submitted.status
        queue_id = layout.new_queue_id()
        sender = found.sender
        if sender is None:
            sender = self.config.vhost(submitted.vhost).sender or _login(status.st_uid)
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
            arrived_at=found.arrived if ledger.is_utc(found.arrived) else ledger.utc(status.st_ctime),
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

    def _replaced(self, batch: Batch, known: Row) -> None:
        """Another message has the name of one that the ledger knows: that one has gone."""
        self._drops.known.pop((known.vhost, known.source or ""))
        if known.state == ACTIVE and known.deferred_at is None and known.decision is None:
            self._close(batch, known, "another message has its name")
        else:
            self._drops.removed.append(known.queue_id)

    def _close(self, batch: Batch, row: Row, reason: str) -> None:
        """End an attempt whose message has gone; it counts from now on."""
        account, reserved = self._account(row.vhost), row.limited and row.counted_at is None
        startup.close_unknown(batch, row, reason)
        if reserved:
            account.confirm(row.queue_id, row.counted_at or time.time(), row.recipients)

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
        row.state, row.reason, row.held_at = HELD, reason, ledger.utc(time.time())
        self._store(row, submitted, "hold")
        batch.put(row)
        batch.log_all("held", row, reason)
        batch.then(partial(self._drops.remove, row, submitted))
        LOG.warning(maillog.held(row.queue_id, row.vhost, row.recipients, reason))

    def _send(self, batch: Batch, row: Row, submitted: pickup.Submitted, again: bool = False) -> None:
        """Begin an attempt. A small message needs no copy on disk; a larger one is copied first: S3 -> S4."""
        if submitted.small:
            data = b"".join(self._chunks(submitted, row))
            row.size, row.digest = len(data), submitted.digest()
            flight = Flight(row, partial(io.BytesIO, data), data.isascii(), submitted, again)
        else:
            ascii_only = self._store(row, submitted, "active")
            flight = Flight(row, partial(self._handover.open, row.queue_id), ascii_only, submitted, again)
        self._handover.begin(batch, flight)

    def _store(self, row: Row, submitted: pickup.Submitted, target: str) -> bool:
        """Copy the message into our directory TARGET; return whether it is all ASCII."""
        head = submitted.envelope.with_(
            vhost=row.vhost, sender=row.sender, recipients=tuple(row.remaining), queue_id=row.queue_id,
            source=row.source or "", owner=str(row.uid), picked_up=row.picked_up_at, held=row.held_at or "",
            reason=row.reason, message_id=row.message_id,
        )  # fmt: skip
        chunks = self._chunks(submitted, row)
        row.size, ascii_only = mailqueue.store(self._spool, target, row.queue_id, head.format(), chunks)
        row.digest = submitted.digest()
        return ascii_only

    def _chunks(self, submitted: pickup.Submitted, row: Row) -> Iterator[bytes]:
        return submitted.chunks(self.config.tag(row.vhost), row.message_id)

    def _corrupt(self, batch: Batch, vhost: str, name: bytes, reason: str) -> None:
        """S3 -> S12: moved by rename, so that the quota of who wrote it still pays for it."""
        queue_id = layout.new_queue_id()
        shown = os.fsdecode(name).encode("utf-8", "backslashreplace").decode()
        source = os.fsencode(layout.maildrop(self._spool, vhost)) + b"/new/" + name
        try:
            status = os.lstat(source)
            os.rename(source, layout.path(self._spool, "corrupt", queue_id))
        except OSError as error:
            self._drops.leave(vhost, name, f"{reason}; cannot be moved to corrupt/: {error.strerror}")
            return
        startup.corrupt(batch, queue_id, vhost, status, f"{reason}; name {shown}")
        LOG.warning(maillog.corrupt(queue_id, vhost, shown, reason))

    # Decisions of a person: S7 -> S5, S7 -> S11, S11 -> S7.

    def _carry_out_decisions(self, batch: Batch) -> None:
        if not self._decisions_wait:
            return
        decided = self._ledger.decided(ROUND)
        self._decisions_wait = len(decided) == ROUND
        for row in decided:
            decision, actor = row.decision or "", row.actor or ""
            row.executed_at = ledger.utc(time.time())
            batch.then(partial(startup.place, self._spool, row))
            if decision == "release":
                row.state, row.limited, row.next_try = ACTIVE, 0, time.time()
                batch.then(partial(self._handover.later, row.next_try, row.queue_id))
            else:
                row.state = TRASHED if decision == "delete" else HELD
                batch.log_all(f"{decision}d", row, row.why, actor)
            batch.put(row)
            LOG.info(maillog.decided(row.queue_id, row.vhost, decision, actor))

    # What the configuration says.

    def _account(self, vhost: str) -> limits.Account:
        account = self._accounts.get(vhost)
        if account is None:
            account = self._accounts[vhost] = usage.account(self._ledger, vhost, self.config.vhost(vhost))
        return account

    def _policy(self, vhost: str, bell: str) -> bytes:
        return policy.render(self.config, vhost, bell, self._max_size(vhost))

    def _max_size(self, vhost: str) -> int:
        """The largest message in bytes: the configured one, and not more than the MTA takes with our tag."""
        configured = self.config.vhost(vhost).max_message_size
        tag = sum(len(name) + len(value) + 4 for name, value in self.config.tag(vhost))
        announced = self._handover.senders.max_size
        return min(configured, max(announced - tag, 0)) if announced else configured


def _comparable(address: str) -> tuple[str, str]:
    local, domain = envelope.split(address)
    return local, domain.lower()


def _login(uid: int) -> str:
    """The envelope sender where neither caller nor configuration gives one, as every sendmail command makes it."""
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = f"uid{uid}"
    return f"{user}@{os.uname().nodename}"
