"""Taking up what an earlier run, or a crash, has left: files and ledger are brought to agree, row by row of the page."""

import io
import os
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from releaser import envelope, layout, maillog, mailqueue, message, pickup
from releaser.batch import Batch
from releaser.incidents import NOTICE
from releaser.ledger import ACTIVE, CORRUPT, DONE, FAILED, HELD, TRASHED, UNKNOWN, Ledger, Row, utc
from releaser.maillog import LOG

UNREADABLE = (OSError, envelope.NoLayout, envelope.NewerLayout)


@dataclass
class TakenUp:
    """What is to be gone on with."""

    # By vhost and name in new/: open attempts, and outcomes whose file could not be removed.
    known: dict[tuple[str, str], Row] = field(default_factory=dict)
    # Queue ids whose file in new/ has gone without the ledger knowing.
    removed: list[str] = field(default_factory=list)
    # Messages in active/: when to try them, and which.
    retries: list[tuple[float, str]] = field(default_factory=list)


def take_up(spool: str, book: Ledger, alive: Callable[[], None] = lambda: None) -> TakenUp:
    """Bring SPOOL and BOOK to agree. Before anything else runs on either. ALIVE is called again and again meanwhile."""
    mailqueue.remove_partial(spool)
    _adopt(spool, book, alive)
    _adopt_corrupt(spool, book)
    _remove_unrecorded_failures(spool, book)
    _move_into_place(spool, book)
    return _unfinished(spool, book)


def place(spool: str, row: Row, sync: bool = True) -> None:
    """Let the file of ROW lie where its state says: a crash can come between a commit and the rename behind it.

    The ledger says so for good; without SYNC the caller makes the rename durable, together with others.
    """
    source, target = {HELD: ("trash", "hold"), TRASHED: ("hold", "trash"), ACTIVE: ("hold", "active")}[row.state]
    # Its vhost may have been stopped while it waited for the MTA; and what the MTA has refused can be decided, too.
    other = "active" if row.state == HELD else "failed"
    if os.path.exists(layout.path(spool, other, row.queue_id)):
        source = other
    try:
        mailqueue.move(spool, row.queue_id, source, target, sync)
    except FileNotFoundError as error:
        missing = f"its file is missing: {error.strerror}; run: secure-sendmail check"
        LOG.error(maillog.unknown(row.queue_id, row.vhost, missing))
    except OSError as error:
        LOG.error(maillog.left_for_start(error))


def close_missing(spool: str, book: Ledger) -> list[str]:
    """End the held, deleted, refused and corrupt messages whose file is nowhere any more; say which."""
    said = []
    batch = Batch(book)
    for state, name in ((HELD, "hold"), (TRASHED, "trash"), (FAILED, "failed"), (CORRUPT, "corrupt")):
        for queue_id in set(book.queue_ids(state)) - set(mailqueue.listing(spool, name)):
            row = book.row(queue_id)
            if row is not None and not any(os.path.lexists(layout.path(spool, queue, queue_id)) for queue in layout.QUEUES):
                close_unknown(batch, row, f"{name}/{queue_id} has gone")
                said.append(f"{queue_id}: {name}/{queue_id} has gone, its outcome is unknown")
    batch.commit()
    return said


def close_unknown(batch: Batch, row: Row, reason: str) -> None:
    """Nobody knows what became of the attempt, and the message has gone: it ends, and still counts."""
    batch.log_all("unknown", row, reason)
    row.state, row.attempt_open, row.source = UNKNOWN, 0, None
    if row.limited and row.counted_at is None:
        row.counted_at = batch.now()
    batch.put(row)
    LOG.error(maillog.unknown(row.queue_id, row.vhost, reason))


def _adopt(spool: str, book: Ledger, alive: Callable[[], None]) -> None:
    """Files without a row: copies whose commit a crash prevented, or all there is where a ledger was lost."""
    known = set(book.queue_ids(HELD, TRASHED, ACTIVE))
    for name in ("hold", "active", "trash", "failed"):
        for queue_id in mailqueue.listing(spool, name):
            alive()
            recorded = None if queue_id in known or name in ("hold", "active") else book.row(queue_id)
            if queue_id not in known and (recorded is None or recorded.state == DONE):
                try:
                    _adopt_one(spool, book, name, queue_id)
                except sqlite3.Error:
                    raise
                except Exception as error:
                    # One file cannot stop the start; it stays where it is.
                    unreadable = f"{name}/{queue_id} has no record and cannot be read: {error!r}"
                    LOG.error(maillog.unknown(queue_id, "", unreadable), exc_info=not isinstance(error, UNREADABLE))


def _adopt_one(spool: str, book: Ledger, name: str, queue_id: str) -> None:
    found, stream = mailqueue.read(layout.path(spool, name, queue_id))
    with stream:
        begin = stream.tell()
        size = stream.seek(0, io.SEEK_END) - begin
        stream.seek(begin)
        try:
            subject = message.read_header(iter(partial(stream.read, pickup.CHUNK), b"")).text("subject")
        except message.HeaderTooLong:
            subject = ""
    drops = (layout.maildrop(spool, found.vhost), layout.maildrop(spool, layout.UNREGISTERED))
    original = bool(found.source) and any(os.path.lexists(f"{drop}/new/{found.source}") for drop in drops)
    recorded = book.row(queue_id)
    ended = recorded is not None and recorded.state in (DONE, FAILED)
    again = original or (found.reason == NOTICE and any(incident.notified_at is None for incident in book.incidents()))
    if ended or (again and recorded is None):
        # The message has ended, or its original is still in new/, or it is a notice that is still due: a leftover.
        mailqueue.remove(spool, name, queue_id)
        return
    if name == "active":
        mailqueue.move(spool, queue_id, name, "hold")
    row = Row(
        queue_id=queue_id, vhost=found.vhost, state={"trash": TRASHED, "failed": FAILED}.get(name, HELD), source=None, digest="",
        recipients=len(found.recipients), remaining=list(found.recipients), sender=found.sender or "", size=size,
        arrived_at=found.arrived, picked_up_at=found.picked_up, held_at=found.held or utc(time.time()),
        uid=int(found.owner) if found.owner.isdecimal() else os.geteuid(), verified=int(found.verified != "no"),
        message_id=found.message_id, subject=subject, script=found.origin, cwd=found.cwd, refused=[],
        reason=found.reason or "found without a record: it may have been sent already",
    )  # fmt: skip
    batch = Batch(book)
    batch.log_all({TRASHED: "deleted", FAILED: "failed"}.get(row.state, "held"), row, row.reason)
    if row.state == FAILED:
        row.refused = [(address, words) for address, _, words in (line.partition(" ") for line in found.failed)]
        row.remaining = []
    batch.put(row)
    batch.commit()
    LOG.warning(maillog.adopted(queue_id, row.vhost, row.recipients, row.state, row.reason))


def _remove_unrecorded_failures(spool: str, book: Ledger) -> None:
    """Copies in failed/ whose commit a crash prevented: the message is still to be tried."""
    for queue_id in set(mailqueue.listing(spool, "failed")) - set(book.queue_ids(FAILED)):
        row = book.row(queue_id)
        if row is not None and row.decision in ("release", "delete") and not _is_elsewhere(spool, queue_id):
            # S10 -> S5, S10 -> S11: a crash came before the rename.
            place(spool, row)
        elif row is not None:
            mailqueue.remove(spool, "failed", queue_id)


def _is_elsewhere(spool: str, queue_id: str) -> bool:
    return any(os.path.lexists(layout.path(spool, queue, queue_id)) for queue in layout.QUEUES if queue != "failed")


def _move_into_place(spool: str, book: Ledger) -> None:
    for state, name in ((HELD, "hold"), (TRASHED, "trash")):
        for queue_id in set(book.queue_ids(state)) - set(mailqueue.listing(spool, name)):
            row = book.row(queue_id)
            if row is not None:
                place(spool, row)


def _unfinished(spool: str, book: Ledger) -> TakenUp:
    """Open attempts: those with a copy in active/ are tried again, those whose file has gone are closed, still counted."""
    found = TakenUp()
    batch = Batch(book)
    for row in book.rows("source IS NOT NULL"):
        if row.state == ACTIVE and row.deferred_at is None and row.decision is None:
            continue
        # The outcome is durable, the unlink behind it was not.
        try:
            if pickup.is_same(_new(spool, row), row.digest):
                os.unlink(_new(spool, row))
        except OSError as error:
            LOG.error(maillog.left(row.vhost, row.source or "", f"cannot be removed: {error.strerror}"))
            found.known[row.maildrop, row.source or ""] = row
            continue
        found.removed.append(row.queue_id)
    for row in book.rows("state = 'active'"):
        if row.decision == "release" and not os.path.exists(layout.path(spool, "active", row.queue_id)):
            place(spool, row)
        copied = os.path.exists(layout.path(spool, "active", row.queue_id))
        first = row.source is not None and row.deferred_at is None and row.decision is None
        try:
            same = first and pickup.is_same(_new(spool, row), row.digest)
        except OSError as error:
            # Its owner can have a lease on it. It is compared again when it is read: nothing is decided here.
            LOG.error(maillog.left(row.vhost, row.source or "", f"cannot be compared: {error.strerror}"))
            found.known[row.maildrop, row.source or ""] = row
            continue
        if same:
            # S4 -> S3: it is read again from new/, and the copy of a larger message is made again.
            mailqueue.remove(spool, "active", row.queue_id)
            found.known[row.maildrop, row.source or ""] = row
        elif copied:
            found.retries.append((row.next_try or 0.0, row.queue_id))
        elif first and not os.path.isdir(os.path.dirname(_new(spool, row))):
            # The maildrop is not there; if it comes back, the message is known.
            found.known[row.maildrop, row.source or ""] = row
        else:
            close_unknown(batch, row, "its file has gone")
    batch.commit()
    return found


def _adopt_corrupt(spool: str, book: Ledger) -> None:
    """Files in corrupt/ without a row: a crash came between the rename and the commit."""
    batch = Batch(book)
    for queue_id in set(mailqueue.listing(spool, "corrupt")) - set(book.queue_ids(CORRUPT)):
        status = os.lstat(layout.path(spool, "corrupt", queue_id))
        corrupt(batch, queue_id, "", status, "found without a record")
    batch.commit()


def corrupt(batch: Batch, queue_id: str, vhost: str, status: os.stat_result, reason: str) -> None:
    """Record a file that was moved to corrupt/."""
    row = Row(
        queue_id=queue_id, vhost=vhost, state=CORRUPT, source=None, digest="", recipients=0, remaining=[], sender="",
        size=status.st_size, arrived_at=utc(status.st_ctime), picked_up_at=utc(time.time()), uid=status.st_uid,
        verified=int(vhost != layout.UNREGISTERED), message_id="", subject="", script="", cwd="", reason=reason, refused=[],
        limited=0,
    )  # fmt: skip
    batch.put(row)
    batch.log("corrupt", row, [("", reason, "")])


def _new(spool: str, row: Row) -> str:
    return f"{layout.maildrop(spool, row.maildrop)}/new/{row.source}"
