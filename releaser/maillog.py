"""Every sentence of the daemon's log, a function each: queue id first, then key=value.

No addresses but where they are asked for: the log tables have them.
"""

import logging
import os
import re
import sys

from releaser.visible import visible

LOG = logging.getLogger("secure-sendmail")
# Recipients of a message in a line.
NAMED = 50


def start() -> None:
    """Log to standard error, from where systemd takes it to the journal."""
    handler = logging.StreamHandler(sys.stderr)
    # The journal has the name and the number itself.
    name = "" if os.environ.get("JOURNAL_STREAM") else "secure-sendmail-releaser[%(process)d]: "
    handler.setFormatter(logging.Formatter(f"{name}%(levelname)s: %(message)s"))
    # A line for each message: what no line says is not looked up.
    logging.logThreads = logging.logMultiprocessing = False
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)


def addresses(queue_id: str, sender: str, recipients: list[str]) -> str:
    more = f",… {len(recipients)} in all" if len(recipients) > NAMED else ""
    return f"{queue_id}: from={visible(f'<{sender}>')} to={visible(','.join(f'<{each}>' for each in recipients[:NAMED]))}{more}"


def released(queue_id: str, vhost: str, sent: int, attempt: int, note: str) -> str:
    return f"{queue_id}: released vhost={vhost} recipients={sent} attempt={attempt}{_note(note)}"


def held(queue_id: str, vhost: str, recipients: int, reason: str) -> str:
    return f"{queue_id}: held vhost={vhost} recipients={recipients} reason={reason!r}"


def adopted(queue_id: str, vhost: str, recipients: int, state: str, reason: str) -> str:
    return f"{queue_id}: {state}, found without a record vhost={vhost} recipients={recipients} reason={reason!r}"


def observed(queue_id: str, vhost: str, recipients: int, reason: str) -> str:
    return f"{queue_id}: would have been held vhost={vhost} recipients={recipients} reason={reason!r}"


def deferred(queue_id: str, vhost: str, recipients: int, seconds: float, words: str) -> str:
    return f"{queue_id}: deferred vhost={vhost} recipients={recipients} next_try={seconds:.0f}s " + _reply(words)


def failed(queue_id: str, vhost: str, recipients: int, words: str) -> str:
    return f"{queue_id}: failed vhost={vhost} recipients={recipients} " + _reply(words)


def corrupt(queue_id: str, vhost: str, name: str, reason: str) -> str:
    return f"{queue_id}: corrupt vhost={vhost} name={name!r} reason={reason!r}"


def many_names(vhost: str, name: str) -> str:
    return f"a file with many names in new/: those beyond two are removed vhost={vhost}, the first of them name={name!r}"


def left_more(vhost: str, reason: str) -> str:
    return f"left in new/ vhost={vhost} and more than can be named, the last for reason={reason!r}"


def left(vhost: str, name: str, reason: str) -> str:
    return f"left in new/ vhost={vhost} name={name!r} reason={reason!r}"


def maildrop(vhost: str, what: str, reason: str) -> str:
    return f"maildrop vhost={vhost} {what}: {reason}"


def again(queue_id: str, vhost: str, attempt: int) -> str:
    return f"{queue_id}: sent again, the outcome of the last attempt is not known vhost={vhost} attempt={attempt}"


def unknown(queue_id: str, vhost: str, reason: str) -> str:
    return f"{queue_id}: outcome unknown vhost={vhost} reason={reason!r}"


def decided(queue_id: str, vhost: str, decision: str, actor: str) -> str:
    return f"{queue_id}: {decision} vhost={vhost} actor={actor!r}"


def mta_down(words: str, seconds: float) -> str:
    return f"no connection to the MTA, mail waits next_try={seconds:.0f}s reason={words!r}"


def sender_lost(words: str) -> str:
    return f"{words}; what it had begun is tried again"


def shipper_lost() -> str:
    return "the process that ships the log to MySQL has ended; the daemon itself goes on with it until its next start"


def mta_up() -> str:
    return "the MTA is back"


def reloaded(file: str) -> str:
    return f"configuration loaded file={file}"


def not_reloaded(error: str) -> str:
    return f"configuration not loaded, the last good one stays: {error}"


def taken_over(old: str, new: str) -> str:
    return f"renamed vhost={new} was={old}"


def internal(queue_id: str, vhost: str, error: Exception) -> str:
    return f"{queue_id}: internal error, what the MTA has said is written down all the same vhost={vhost} error={error!r}"


def undecided(queue_id: str, vhost: str, error: Exception) -> str:
    return f"{queue_id}: internal error, the decision waits vhost={vhost} error={error!r}"


def collected(where: str, rows: int, retention: int) -> str:
    return f"{rows} rows of {where} were older than {retention} s, deleted"


def expired(queue_id: str, vhost: str, queue: str) -> str:
    return f"{queue_id}: expired vhost={vhost} queue={queue}"


def left_for_start(error: Exception) -> str:
    return f"a file could not be moved or removed, the next start sees to it: {error}"


def no_room(error: Exception) -> str:
    return f"no mail is taken until there is room again: {error}; mail stays in the maildrops, and nothing is lost"


def room_again() -> str:
    return "there is room again, mail is taken as before"


def door_closed(vhost: str, messages: int, size: int) -> str:
    return f"door closed, what is submitted stays in new/ vhost={vhost} messages={messages} bytes={size}"


def door_opened(vhost: str) -> str:
    return f"door open again vhost={vhost}"


def rejected(vhost: str, messages: int) -> str:
    return f"refused at the door, as enqueue has counted vhost={vhost} messages={messages}"


def not_taken(vhost: str, maildrop: str) -> str:
    return f"not taken from new/ until mail is released or deleted, or the cap is raised vhost={vhost} maildrop={maildrop}"


def no_space(reason: str) -> str:
    return f"{reason}: all doors are closed, no mail is taken until there is room again; nothing is lost"


def flooded(vhost: str, seconds: int) -> str:
    return f"bells are rung more often than mail can come, not listened to for {seconds} s; most are of vhost={vhost}"


def observing(sections: list[str]) -> str:
    return f'over_limit is "observe", mail over a limit is sent: {", ".join(sections)}'


def log_is_down(words: str, rows: int | None) -> str:
    waiting = f" rows_waiting={rows}" if rows is not None else ""
    return f"MySQL does not take the log, mail goes on{waiting} reason={words!r}"


def error_log_not_written(reason: str) -> str:
    return f"the error log cannot be written reason={reason!r}"


def notice_not_sent(reason: str) -> str:
    return f"the notice of an incident cannot be stored reason={reason!r}"


def log_is_back() -> str:
    return "MySQL takes the log again"


def log_row_poor(seq: str, what: str, more: int, words: str) -> str:
    others = f", and {more} rows before it" if more else ""
    return f"MySQL refused log row {seq}{others} for its content, shipped {what} reason={words!r}"


def outbox_half(size: int, most: int) -> str:
    return f"more than half of outbox_max waits for MySQL bytes={size} outbox_max={most}"


def outbox_full(rows: int, remain: int, most: int) -> str:
    return f"outbox_max is reached, the oldest rows that wait for MySQL are summarised rows={rows} now={remain} outbox_max={most}"


def node_moved(old: str, new: str) -> str:
    return f"the ledger of node {old} has come to another machine, and goes on as node {new}"


def node_taken(old: str, new: str) -> str:
    return (
        f"MySQL has rows of node {old} that this ledger does not know: it was restored or copied, and goes on as node {new}; "
        f"no row is lost. When those of {old} are not needed any more: secure-sendmail log gc --node {old}"
    )


def started(spool: str, vhosts: int, mta: str) -> str:
    return f"started spool={spool} vhosts={vhosts} mta={mta}"


def stopped() -> str:
    return "stopped"


def _reply(words: str) -> str:
    """The MTA's words, without the recipient that they often repeat."""
    return "reply=" + repr(re.sub(r"[^\s<>]+@[^\s<>]+", "…", words))


def _note(note: str) -> str:
    return f" note={note!r}" if note else ""
