"""Hand-over: from a durable attempt to a durable outcome, with the retries of messages and of the MTA as a whole.

Order, for every message: durable attempt, then DATA, then durable outcome, then unlink. Rows S1.. are those of
spool_layout.md.
"""

import heapq
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import BinaryIO

from releaser import envelope, layout, maillog, mailqueue, mta, pickup, poison, sender, startup
from releaser.batch import Batch
from releaser.door import Door
from releaser.ledger import ACTIVE, DONE, FAILED, HELD, Ledger, Row, utc
from releaser.limits import Account
from releaser.maildrops import Maildrops
from releaser.maillog import LOG
from releaser.mta import Job, Kind, Outcome, Unreachable
from releaser.room import Room

# So much is begun ahead of the sessions: what they have taken in so many seconds lately, messages and bytes at most. Ahead,
# so that one commit serves many; no more, so that after a crash little is retried that the MTA has never seen.
AHEAD_SECONDS, AHEAD_MESSAGES, AHEAD_BYTES = 0.05, 96, 8 << 20
# Seconds between tries while there is no MTA, doubled from the first to the second.
MTA_BACKOFF = (1, 30)
# Seconds between tries of a message that the MTA defers, likewise.
MESSAGE_BACKOFF = (10, 3600)


@dataclass
class Flight:
    """A message with the senders."""

    row: Row
    # The envelope that came with it, for what the ledger does not have.
    head: envelope.Envelope
    message: Callable[[], BinaryIO]
    ascii_only: bool
    # The file in new/ that it was read from, kept open until it is removed; None where it comes from active/.
    original: pickup.Submitted | None = None
    # An earlier attempt has no known outcome: this one may make a duplicate.
    again: bool = False
    # Whom this attempt has still to try, and whom the MTA has deferred in it.
    untried: list[str] = field(default_factory=list)
    deferred: list[Outcome] = field(default_factory=list)
    # Whether the MTA has answered in this attempt.
    answered: bool = False

    @property
    def key(self) -> tuple[str, bytes]:
        """What its failures are counted by: its maildrop, and its name in new/, or its queue id where it lies in active/."""
        name = self.row.source if self.original is not None and self.row.source else self.row.queue_id
        return self.row.maildrop, name.encode()

    def copy(self) -> "Flight":
        """As it is now, whatever becomes of it; not by copy.copy(), which takes longer."""
        found, row = object.__new__(Flight), object.__new__(Row)
        row.__dict__ = self.row.__dict__ | {"remaining": [*self.row.remaining], "refused": [*self.row.refused]}
        found.__dict__ = self.__dict__ | {"row": row, "untried": [*self.untried], "deferred": [*self.deferred]}
        return found


class HandOver:
    """What is with the MTA, and what waits for it."""

    def __init__(
        self,
        spool: str,
        book: Ledger,
        drops: Maildrops,
        accounts: Callable[[Row], list[Account]],
        room: Room,
        door: Door,
        in_hand: poison.InHand,
        wake: Callable[[], None],
        mta_url: str,
        give_up: int,
    ) -> None:
        """GIVE_UP: seconds until a deferred message is put into failed/."""
        self._wake = wake
        self._results: mta.Results = mta.Results()
        self.senders = sender.start(mta_url, wake, self._results)
        # Those for another MTA than now's, with what they have begun.
        self._former: list[mta.Senders | sender.Process] = []
        self.give_up = give_up
        # Maildrops with messages in flight, and how many. The senders keep these in order.
        self.busy: Counter[str] = Counter()
        # Of these, those that wait until nothing of theirs is in flight, or it would overtake what is.
        self._alone: set[str] = set()
        self._spool = spool
        self._ledger = book
        self._now = book.clock.now
        self._drops = drops
        self._accounts = accounts
        self._room = room
        self._door = door
        self._in_hand = in_hand
        # Whose outcome is in the ledger, and for whose copy there was no room: the message lies where it lay.
        self._unsettled: list[Flight] = []
        self._flights: dict[str, Flight] = {}
        self._bytes = 0
        # What waits for its time, and, by vhost, what is due and waits for its turn.
        self._retries: list[tuple[float, str]] = []
        self._due: dict[str, deque[str]] = {}
        self._down_until = 0.0
        self._backoff = 0.0

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    def flies(self, queue_id: str) -> bool:
        return queue_id in self._flights

    @property
    def descriptors(self) -> list[int]:
        """What can be read when there is something for take_results()."""
        return [descriptor for each in (*self._former, self.senders) for descriptor in each.descriptors]

    @property
    def down_until(self) -> float:
        """Until then, by the clock of the ledger, the MTA is left alone."""
        return self._down_until

    @property
    def room(self) -> bool:
        """Whether another message may be begun. While it is not known that the MTA is back, one finds out."""
        if len(self._flights) < mta.SESSIONS:
            return not (self._backoff and self._flights)
        return len(self._flights) < self._depth and self._bytes < AHEAD_BYTES

    def is_full(self, name: str) -> bool:
        """Whether no other message of the maildrop NAME may be begun."""
        count = self.busy.get(name, 0)
        return bool(count) and (name in self._alone or count >= max(self._depth // mta.SESSIONS, 1))

    def wait_for(self, name: str) -> None:
        """Let no other message of the maildrop NAME be begun until nothing of it is in flight."""
        self._alone.add(name)

    @property
    def _depth(self) -> int:
        """How many messages may be in flight."""
        return mta.SESSIONS + min(int(AHEAD_SECONDS * mta.SESSIONS / max(self.senders.pace, 1e-6)), AHEAD_MESSAGES)

    @property
    def next_retry(self) -> float | None:
        """When something in active/ can be tried, by the clock of the ledger; None: nothing waits but for a vhost in flight."""
        if self._may_retry and not all(map(self.is_full, self._due)):
            return 0.0
        return self._retries[0][0] if self._retries else None

    @property
    def probing(self) -> bool:
        """Whether it is not known that the MTA is back."""
        return bool(self._backoff)

    @property
    def _may_retry(self) -> bool:
        """Half of the sessions are left for new mail."""
        return sum(1 for flight in self._flights.values() if flight.original is None) < max(self._depth // 2, 1)

    def use(self, url: str) -> None:
        """Another MTA: nothing is known of it yet. What is in flight ends where it was begun."""
        self.senders.give_back()
        self.senders.stop()
        self._former.append(self.senders)
        self._alone |= self.busy.keys()
        self.senders = sender.start(url, self._wake, self._results)
        self._down_until = self._backoff = 0.0

    def carry_over(self, old: str, new: str) -> None:
        """What waits for OLD's turn waits for NEW's."""
        if old in self._due:
            self._due.setdefault(new, deque()).extend(self._due.pop(old))

    def later(self, stamp: float, queue_id: str) -> None:
        """Try the message in active/ at STAMP, by the clock of the ledger."""
        heapq.heappush(self._retries, (stamp, queue_id))

    def begin(self, batch: Batch, flight: Flight) -> None:
        """Make the attempt durable, then let it begin."""
        if not flight.row.remaining:
            # All is said already: a crash came before its copy could be made.
            self._settle(batch, flight)
            return
        flight.row.attempt_open = 1
        if not flight.untried:
            flight.untried = list(flight.row.remaining)
        if flight.answered or len(flight.untried) > mta.RECIPIENTS_PER_TRANSACTION:
            self._alone.add(flight.row.maildrop)
        self._flights[flight.row.queue_id] = flight
        self._bytes += flight.row.size
        self.busy[flight.row.maildrop] += 1
        batch.put(flight.row)
        batch.then(partial(self._dispatch, flight))

    def retry(self, batch: Batch) -> None:
        """Begin again what waits in active/ and is due, the maildrops in turn."""
        while self._retries and self._retries[0][0] <= self._now():
            _, queue_id = heapq.heappop(self._retries)
            row = self._ledger.row(queue_id)
            if row is not None and row.state == ACTIVE:
                self._due.setdefault(row.maildrop, deque()).append(queue_id)
        for name in list(self._due):
            if not self.room or not self._may_retry:
                return
            if not self.is_full(name):
                waiting = self._due.pop(name)
                self._retry_guarded(batch, name, waiting.popleft())
                if waiting:
                    # Behind the others.
                    self._due[name] = waiting

    def _retry_guarded(self, batch: Batch, maildrop: str, queue_id: str) -> None:
        """_retry_one(), which cannot stop the mail of all others, and what it fails at is tried again."""
        part, key = Batch(self._ledger), (maildrop, queue_id.encode())
        try:
            self._in_hand.begin(*key)
            if self._in_hand.may(*key):
                self._retry_one(part, queue_id)
            else:
                self._set_aside(part, maildrop, queue_id)
        except Exception as error:
            self.later(self._now() + MESSAGE_BACKOFF[0], queue_id)
            if not isinstance(error, MemoryError) and self._room.lacks(error):
                return
            LOG.error(maillog.internal(queue_id, maildrop, error), exc_info=True)
            batch.put_poison(*key, self._in_hand.failed(*key))
        else:
            batch.add(part)
        finally:
            self._in_hand.done()

    def _set_aside(self, batch: Batch, maildrop: str, queue_id: str) -> None:
        row = self._ledger.row(queue_id)
        if row is not None and row.state == ACTIVE:
            mailqueue.remove(self._spool, "failed", queue_id)
            self._hold(batch, row, poison.WHY)
        self._in_hand.forget(maildrop, queue_id.encode())
        batch.put_poison(maildrop, queue_id.encode(), 0)

    def _retry_one(self, batch: Batch, queue_id: str) -> None:
        row = self._ledger.row(queue_id)
        if row is None or row.state != ACTIVE or queue_id in self._flights:
            return
        stopped = self.stopped(row) if row.decision != "release" and row.remaining else None
        if stopped is not None:
            self._hold(batch, row, stopped)
            return
        try:
            head, stream = mailqueue.read(layout.path(self._spool, "active", queue_id))
            with stream:
                ascii_only = all(chunk.isascii() for chunk in iter(partial(stream.read, pickup.CHUNK), b""))
        except FileNotFoundError:
            if row.decision == "release" and os.path.exists(layout.path(self._spool, "hold", queue_id)):
                startup.place(self._spool, row)
                self.later(self._now() + MESSAGE_BACKOFF[0], queue_id)
            else:
                startup.close_unknown(batch, row, f"active/{queue_id} has gone")
            return
        except startup.UNREADABLE as error:
            # It may be readable later, or by a newer program; nothing is lost by waiting.
            LOG.error(maillog.unknown(queue_id, row.vhost, f"active/{queue_id} cannot be read now: {error}"))
            self.later(self._now() + MESSAGE_BACKOFF[0 if isinstance(error, OSError) else 1], queue_id)
            return
        if queue_id in self._drops.removed:
            row.source = None
        again = bool(row.attempt_open)
        row.attempts += 1
        self.begin(batch, Flight(row, head, self.in_active(queue_id), ascii_only, again=again))

    def stopped(self, row: Row) -> str | None:
        """Why ROW is to be held whatever its limits say: its vhost was stopped, or the maildrop that it came from."""
        found = self._ledger.stopped(row.vhost)
        return found or (self._ledger.stopped(row.maildrop) if row.maildrop != row.vhost else None)

    def _hold(self, batch: Batch, row: Row, reason: str) -> None:
        """S5 -> S7: its vhost was stopped while it waited for the MTA, or our own code fails at it."""
        row.reason, row.held_at = reason, utc(time.time())
        try:
            # The copy may have been made for more than those who still have to get it.
            head, stream = mailqueue.read(layout.path(self._spool, "active", row.queue_id))
            with stream:
                mailqueue.replace(self._spool, "active", row.queue_id, verified(head, row, row.remaining).format(), stream)
        except startup.UNREADABLE as error:
            if isinstance(error, OSError) and self._room.lacks(error):
                self.later(self._now() + MESSAGE_BACKOFF[0], row.queue_id)
                return
        row.state, row.next_try = HELD, None
        # Once released, it has all its time again.
        row.deferred_at = None
        batch.put(row)
        batch.log_all("held", row, reason)
        batch.then(partial(startup.place, self._spool, row))
        LOG.warning(maillog.held(row.queue_id, row.vhost, len(row.remaining), reason))

    def in_active(self, queue_id: str) -> Callable[[], BinaryIO]:
        """What opens the message of a file in active/, in another process, too. It raises what mailqueue.read() does."""
        return partial(mailqueue.message, layout.path(self._spool, "active", queue_id))

    def take_results(self, batch: Batch) -> None:
        """Write down what the senders have said meanwhile."""
        if self._unsettled and self._room.there:
            unsettled, self._unsettled = self._unsettled, []
            for flight in unsettled:
                self._leave_turn(flight.row.maildrop)
                self._guarded(batch, flight, self._settle, [])
        for each in (*self._former, self.senders):
            each.collect()
        self._former = [each for each in self._former if each.descriptors]
        while not self._results.empty():
            job, result = self._results.get()
            flight = self._flights[job.queue_id]
            self._landed(flight)
            if result is None or isinstance(result, Unreachable):
                if result is not None:
                    self._is_down(str(result))
                self._not_begun(batch, flight)
                continue
            if self._backoff:
                self._backoff = 0
                LOG.warning(maillog.mta_up())
            self._guarded(batch, flight, partial(self._outcome, outcomes=result), result)
        self._in_hand.done()

    def _guarded(self, batch: Batch, flight: Flight, work: Callable[[Batch, Flight], None], outcomes: list[Outcome]) -> None:
        """WORK on what the MTA has said, which is written down also where our own code fails at it.

        Were it not, the message would be sent again, by the next daemon too, and again. Should writing it down fail, too,
        that ends the daemon with the message in hand: so it is counted, and set aside after three of these.
        """
        before = flight.copy()
        part = Batch(self._ledger)
        try:
            self._in_hand.begin(*flight.key)
        except OSError:
            # Only the end of the whole daemon would not be counted.
            pass
        try:
            work(part, flight)
        except Exception as error:
            LOG.error(maillog.internal(flight.row.queue_id, flight.row.vhost, error), exc_info=True)
            # What is counted in memory is counted.
            before.row.counted_at = flight.row.counted_at
            part = Batch(self._ledger)
            self._put_down(part, before, [replace(each, words=ascii(each.words)[1:-1], mta_queue_id="") for each in outcomes])
            self._leave(part, before)
        batch.add(part)

    def _leave(self, batch: Batch, flight: Flight) -> None:
        """Where our own code has failed at what is left to do: nothing where all have the message, else that again, later."""
        row, key = flight.row, flight.key
        if row.queue_id in self._flights:
            self._landed(flight)
        row.attempt_open = int(any(outcome.kind is Kind.UNKNOWN for outcome in flight.deferred))
        if not row.remaining and not row.refused:
            self._ended(batch, flight)
            return
        batch.put_poison(*key, self._in_hand.failed(*key))
        if flight.original is None:
            row.next_try = self._now() + MESSAGE_BACKOFF[0]
            batch.then(partial(self.later, row.next_try, row.queue_id))
        else:
            flight.original.close()
            self._drops.known[row.maildrop, row.source or ""] = row
            self._drops.leave(row.maildrop, key[1], "an internal error behind the MTA's reply")
        batch.put(row)

    def _dispatch(self, flight: Flight) -> None:
        row = flight.row
        recipients = tuple(flight.untried[: mta.RECIPIENTS_PER_TRANSACTION])
        self.senders.send(
            Job(
                row.queue_id, row.sender, recipients, flight.message, row.size, flight.ascii_only, row.maildrop,
                flight.head.notify,
            )
        )  # fmt: skip

    def _landed(self, flight: Flight) -> None:
        """It is in flight no more."""
        del self._flights[flight.row.queue_id]
        self._bytes -= flight.row.size
        self._leave_turn(flight.row.maildrop)

    def _leave_turn(self, name: str) -> None:
        """The maildrop NAME has one message less under way."""
        self.busy[name] -= 1
        if not self.busy[name]:
            del self.busy[name]
            self._alone.discard(name)

    def _is_down(self, words: str) -> None:
        """There is no MTA to talk to: all mail waits."""
        first, most = MTA_BACKOFF
        if not self._backoff or self._now() >= self._down_until:
            self._backoff = min(max(self._backoff * 2, first), most)
            self._down_until = self._now() + self._backoff
            LOG.error(maillog.mta_down(words, self._backoff))

    def _not_begun(self, batch: Batch, flight: Flight) -> None:
        """Nothing was handed over in this attempt: the mail stays where it is."""
        row = flight.row
        # Nothing of this message has ever reached the MTA.
        untouched = not flight.answered and (row.maildrop, row.source) not in self._drops.known
        row.attempts -= 1
        unclear = any(outcome.kind is Kind.UNKNOWN for outcome in flight.deferred)
        row.attempt_open = int(flight.again or unclear)
        if flight.original is None:
            # A little later than the others, so that a message at which the MTA hangs up is not what finds out again.
            row.next_try = max(self._down_until, self._now()) + 1
            batch.put(row)
            batch.then(partial(self.later, row.next_try, row.queue_id))
            return
        flight.original.close()
        if untouched:
            # S4 -> S3 for a larger one, and the reservation is given back.
            for account in self._accounts(row):
                account.cancel(row.queue_id)
            batch.forget(row.queue_id)
            batch.then(partial(mailqueue.remove, self._spool, "active", row.queue_id))
        else:
            # Some recipients have it, or may have it: it is still this message when it is read again.
            self._drops.known[row.maildrop, row.source or ""] = row
            batch.put(row)
        self._drops.give_back(row.maildrop, (row.source or "").encode())

    def _outcome(self, batch: Batch, flight: Flight, outcomes: list[Outcome]) -> None:
        self._put_down(batch, flight, outcomes)
        if flight.untried:
            # A server takes so many recipients at a time; the rest of this message follows at once.
            self.begin(batch, flight)
            return
        self._settle(batch, flight)

    def _put_down(self, batch: Batch, flight: Flight, outcomes: list[Outcome]) -> None:
        """What the MTA has said, in the row and in the log."""
        row, now = flight.row, self._now()
        flight.answered = True
        if flight.again and outcomes:
            flight.again = False
            batch.log_all("retried", row, f"attempt {row.attempts}: the outcome of the last is not known")
            LOG.warning(maillog.again(row.queue_id, row.vhost, row.attempts))
        sent = [outcome for outcome in outcomes if outcome.kind is Kind.SENT]
        failed = [outcome for outcome in outcomes if outcome.kind is Kind.PERMFAIL]
        deferred = [outcome for outcome in outcomes if outcome.kind in (Kind.TEMPFAIL, Kind.UNKNOWN)]
        if row.deferred_at is not None and now - row.deferred_at > self.give_up:
            failed += [Outcome(o.recipient, Kind.PERMFAIL, f"given up: {o.words}") for o in deferred]
            deferred = []
        ended = {outcome.recipient for outcome in sent + failed}
        row.remaining = [recipient for recipient in row.remaining if recipient not in ended]
        row.refused += [(outcome.recipient, outcome.words) for outcome in failed]
        flight.deferred += deferred
        flight.untried = flight.untried[len(outcomes) :]
        if sent:
            actor = (row.actor or "") if row.decision == "release" else ""
            note = f"released by hand: {row.why}".removesuffix(": ") if actor else row.reason
            batch.log("released", row, [(o.recipient, note, o.mta_queue_id) for o in sent], actor)
            LOG.info(maillog.released(row.queue_id, row.vhost, len(sent), row.attempts, note))
        if failed:
            batch.log("failed", row, [(o.recipient, o.words, "") for o in failed])
            LOG.warning(maillog.failed(row.queue_id, row.vhost, len(failed), failed[0].words))
        if flight.untried:
            return
        if row.limited and row.counted_at is None:
            row.counted_at = now
            for account in self._accounts(row):
                account.confirm(row.queue_id, now, row.recipients, row.vhost)
        # Without a reply to the final dot the next attempt may make a duplicate, and says so.
        row.attempt_open = int(any(outcome.kind is Kind.UNKNOWN for outcome in flight.deferred))

    def _settle(self, batch: Batch, flight: Flight) -> None:
        """Bring the message to where its outcome says, or leave it where it is until there is room for that."""
        row = flight.row
        try:
            if row.remaining:
                self._defer(batch, flight, self._now())
            else:
                self._end(batch, flight)
        except OSError as error:
            if not self._room.lacks(error):
                raise
            self._unsettled.append(flight)
            # Its maildrop waits with it, or its file in new/ would be met again.
            self.busy[row.maildrop] += 1
            self._alone.add(row.maildrop)
            batch.put(row)

    def _defer(self, batch: Batch, flight: Flight, now: float) -> None:
        """S3, S4 or S5 -> S5: only this message waits, in active/."""
        row, deferred = flight.row, flight.deferred
        if not os.path.exists(layout.path(self._spool, "active", row.queue_id)):
            self._copy("active", flight, row.remaining)
        if row.deferred_at is None and flight.original is not None:
            self._door.add(row)
        if row.deferred_at is None:
            row.deferred_at = now
            batch.log("deferred", row, [(o.recipient, o.words, "") for o in deferred])
        first, most = MESSAGE_BACKOFF
        pause = min(first * 2 ** min(row.attempts - 1, 20), most)
        row.next_try = now + pause
        batch.put(row)
        batch.then(partial(self.later, row.next_try, row.queue_id))
        if flight.original is not None:
            batch.then(partial(self._drops.remove, row, flight.original))
        LOG.warning(maillog.deferred(row.queue_id, row.vhost, len(deferred), pause, deferred[0].words))

    def _end(self, batch: Batch, flight: Flight) -> None:
        """S3, S4 or S5 -> S1, or S10 where the MTA has refused recipients for good."""
        row = flight.row
        if row.refused:
            self._copy("failed", flight, [address for address, _ in row.refused])
        if bool(row.refused) != (flight.original is None):
            # One more of our copies, or, of those that were in active/, one less.
            self._door.add(row, 1 if row.refused else -1)
        self._ended(batch, flight)

    def _ended(self, batch: Batch, flight: Flight) -> None:
        row = flight.row
        row.next_try = None
        row.state = FAILED if row.refused else DONE
        batch.put(row)
        if flight.original is not None:
            batch.then(partial(self._drops.remove, row, flight.original))
        if flight.original is None or not flight.original.small or row.attempts > 1:
            # A small one, tried for the first time, has never been there.
            batch.then(partial(mailqueue.remove, self._spool, "active", row.queue_id))

    def _copy(self, target: str, flight: Flight, recipients: list[str]) -> None:
        head = verified(flight.head, flight.row, recipients)
        with flight.message() as stream:
            chunks = iter(partial(stream.read, pickup.CHUNK), b"")
            mailqueue.store(self._spool, target, flight.row.queue_id, head.format(), chunks)


def verified(head: envelope.Envelope, row: Row, recipients: list[str]) -> envelope.Envelope:
    """HEAD with what the releaser knows of the message, for RECIPIENTS."""
    return head.with_(
        vhost=row.vhost, recipients=tuple(recipients), sender=row.sender, arrived=row.arrived_at, message_id=row.message_id,
        queue_id=row.queue_id, source=row.source or "", owner=str(row.uid), picked_up=row.picked_up_at, held=row.held_at or "",
        reason=row.reason, verified="" if row.verified else "no",
        failed=tuple(f"{address} {words}" for address, words in row.refused),
    )  # fmt: skip
