"""The ledger: the durable local truth about attempts, outcomes, usage, held mail, decisions and the log.

One SQLite file, write-ahead log, synchronous=FULL. The daemon is the only one that moves a message from state to
state; the command writes decisions, each as one compare-and-set.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import socket
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from functools import lru_cache
from operator import attrgetter
from typing import Any

from releaser.clock import Clock
from releaser.privacy import FORGOTTEN, Privacy
from releaser.visible import visible

FILE = "ledger.sqlite"

# States of a message. The directory that holds it: ACTIVE new/ or active/, HELD hold/, TRASHED trash/, FAILED failed/,
# CORRUPT corrupt/; DONE and UNKNOWN none.
ACTIVE, HELD, TRASHED, FAILED, CORRUPT, DONE, UNKNOWN = (
    "active",
    "held",
    "trashed",
    "failed",
    "corrupt",
    "done",
    "unknown",
)

# What a person can decide, and the states it applies to.
DECISIONS = {"release": (HELD, FAILED), "delete": (HELD, FAILED), "undelete": (TRASHED,)}

SCHEMA_1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE message (
    queue_id TEXT PRIMARY KEY,
    vhost TEXT NOT NULL,
    state TEXT NOT NULL,
    -- The name in new/ while a file may still be there, and the SHA-256 of the bytes that were read from it.
    source TEXT,
    digest TEXT NOT NULL,
    -- Attempts begun; attempt_open is 1 from before the first byte goes to the MTA until its outcome is known.
    attempts INTEGER NOT NULL DEFAULT 0,
    attempt_open INTEGER NOT NULL DEFAULT 0,
    -- Seconds since 1970: when to try again, and when it was first deferred.
    next_try REAL,
    deferred_at REAL,
    -- Usage of the windows: the time of the final reply. Absent and limited = 1: a reservation.
    limited INTEGER NOT NULL DEFAULT 1,
    counted_at REAL,
    recipients INTEGER NOT NULL,
    -- JSON arrays: whom it still has to be sent to, and [recipient, words] of those that the MTA refused.
    remaining TEXT NOT NULL,
    refused TEXT NOT NULL DEFAULT '[]',
    sender TEXT NOT NULL,
    size INTEGER NOT NULL,
    arrived_at TEXT NOT NULL,
    picked_up_at TEXT NOT NULL,
    held_at TEXT,
    uid INTEGER NOT NULL,
    verified INTEGER NOT NULL,
    message_id TEXT NOT NULL,
    subject TEXT NOT NULL,
    script TEXT NOT NULL,
    cwd TEXT NOT NULL,
    reason TEXT NOT NULL,
    actor TEXT,
    -- A person's decision that the releaser has not carried out yet, or the last one it has.
    decision TEXT,
    executed_at TEXT,
    why TEXT NOT NULL DEFAULT ''
);
CREATE INDEX message_usage ON message (vhost, counted_at) WHERE counted_at IS NOT NULL;
CREATE INDEX message_unfinished ON message (state, queue_id) WHERE state NOT IN ('done', 'unknown');
CREATE INDEX message_source ON message (queue_id) WHERE source IS NOT NULL;
CREATE INDEX message_decision ON message (queue_id) WHERE decision IS NOT NULL AND executed_at IS NULL;
CREATE TABLE mail_log (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    node TEXT NOT NULL,
    host TEXT NOT NULL,
    logged_at TEXT NOT NULL,
    arrived_at TEXT NOT NULL,
    event TEXT NOT NULL,
    queue_id TEXT NOT NULL,
    message_id TEXT NOT NULL,
    vhost TEXT NOT NULL,
    uid INTEGER,
    verified INTEGER NOT NULL,
    sender TEXT NOT NULL,
    recipient TEXT NOT NULL,
    size INTEGER NOT NULL,
    subject TEXT NOT NULL,
    script TEXT NOT NULL,
    cwd TEXT NOT NULL,
    reason TEXT NOT NULL,
    mta_queue_id TEXT NOT NULL,
    actor TEXT NOT NULL
);
CREATE INDEX mail_log_queue_id ON mail_log (queue_id);
CREATE INDEX mail_log_logged_at ON mail_log (logged_at);
"""

# The directory below vhosts/ that it came from, where that is not the vhost's own; incidents; decisions about vhosts.
SCHEMA_2 = """
ALTER TABLE message ADD COLUMN maildrop TEXT NOT NULL DEFAULT '';
UPDATE message SET maildrop = vhost;
CREATE INDEX message_usage_of_uid ON message (uid, counted_at) WHERE verified = 0 AND counted_at IS NOT NULL;
CREATE TABLE incident (
    id INTEGER PRIMARY KEY,
    vhost TEXT NOT NULL,
    -- Seconds since 1970: the first and the last mail over a limit, the end, and when the notice was sent.
    opened_at REAL NOT NULL,
    last_at REAL NOT NULL,
    ended_at REAL,
    notified_at REAL,
    -- Mail over the limit; 1 where over_limit is "observe", and it was sent.
    held INTEGER NOT NULL,
    observed INTEGER NOT NULL,
    limit_text TEXT NOT NULL,
    warning TEXT NOT NULL
);
CREATE INDEX incident_unfinished ON incident (id) WHERE ended_at IS NULL OR notified_at IS NULL;
CREATE INDEX incident_notified ON incident (notified_at) WHERE notified_at IS NOT NULL;
CREATE TABLE stopped (
    vhost TEXT PRIMARY KEY,
    since TEXT NOT NULL,
    actor TEXT NOT NULL,
    why TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE renamed (
    id INTEGER PRIMARY KEY,
    old TEXT NOT NULL,
    new TEXT NOT NULL,
    actor TEXT NOT NULL,
    executed_at TEXT
);
"""

# Messages at which our own code has failed: the name in new/, and how often.
SCHEMA_3 = """
CREATE TABLE poison (
    maildrop TEXT NOT NULL,
    name BLOB NOT NULL,
    failures INTEGER NOT NULL,
    PRIMARY KEY (maildrop, name)
) WITHOUT ROWID;
"""

# What counts for the caps of a vhost: copies that lie in active/, hold/ and failed/. Mail that only passes through is in
# no index of its own.
KEPT = "(state IN ('held', 'failed') OR state = 'active' AND (deferred_at IS NOT NULL OR decision IS NOT NULL))"
# The windows of a uid see all its mail; the clock is not behind what was counted by the machine's.
SCHEMA_4 = f"""
CREATE INDEX message_kept ON message (maildrop, vhost, uid, size, recipients) WHERE {KEPT};
DROP INDEX message_usage_of_uid;
CREATE INDEX message_usage_of_uid ON message (uid, counted_at) WHERE counted_at IS NOT NULL;
INSERT INTO meta SELECT 'clock', '0.0 ' || max(counted_at) FROM message HAVING max(counted_at) IS NOT NULL;
"""

# Each makes, of the version before it, the version that is its place here.
SCHEMAS = (SCHEMA_1, SCHEMA_2, SCHEMA_3, SCHEMA_4)
VERSION = len(SCHEMAS)

# What the partial index on states says; a query repeats it, or the index is not used.
UNFINISHED = "state NOT IN ('done', 'unknown')"

_UTC = re.compile(r"[1-9][0-9]{3}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z\Z")

# A message's texts are in the log once for each recipient: the characters of each text in all of its rows, and in one at least.
TEXTS, TEXT_LEAST = 100_000, 100

LOG_COLUMNS = [
    "node",
    "seq",
    "host",
    "logged_at",
    "arrived_at",
    "event",
    "queue_id",
    "message_id",
    "vhost",
    "uid",
    "verified",
    "sender",
    "recipient",
    "size",
    "subject",
    "script",
    "cwd",
    "reason",
    "mta_queue_id",
    "actor",
]


# Those that are text, and those that a caller has claimed.
_TEXT = [name for name in LOG_COLUMNS if name not in ("seq", "uid", "verified", "size")]
_CLAIMED = ("message_id", "sender", "subject", "script", "cwd")

# Messages that are from or to an address, in lower case, by the column that has it.
_CONCERNS = {
    "sender": "lower(sender) = ?",
    "remaining": "remaining <> '[]' AND EXISTS (SELECT 1 FROM json_each(remaining) WHERE lower(value) = ?)",
    "refused": "refused <> '[]' AND EXISTS (SELECT 1 FROM json_each(refused) WHERE lower(json_extract(value, '$[0]')) = ?)",
}

# Rows that one transaction collects, rewrites, or gives another node, at most; the seconds of rest behind each that rewrites.
COLLECTED, REWRITE_REST = 500, 0.05
# Seconds for which a machine may have been off before its clock is doubted, and for which it is.
DOUBT = 86400
# What a row of the log takes besides its text, about, indexes included.
ROW_SIZE = 150


class LedgerError(Exception):
    """The ledger cannot be opened; the text says why and what to do."""


@dataclass
class Row:
    """A message in the ledger; the columns of table message, remaining and refused decoded."""

    queue_id: str
    vhost: str
    state: str
    source: str | None
    digest: str
    recipients: int
    remaining: list[str]
    sender: str
    size: int
    arrived_at: str
    picked_up_at: str
    uid: int
    verified: int
    message_id: str
    subject: str
    script: str
    cwd: str
    reason: str
    refused: list[tuple[str, str]]
    attempts: int = 0
    attempt_open: int = 0
    next_try: float | None = None
    deferred_at: float | None = None
    limited: int = 1
    counted_at: float | None = None
    held_at: str | None = None
    actor: str | None = None
    decision: str | None = None
    executed_at: str | None = None
    why: str = ""
    # The directory below vhosts/ that it came from.
    maildrop: str = ""

    def __post_init__(self) -> None:
        self.maildrop = self.maildrop or self.vhost

    @property
    def concerned(self) -> list[str]:
        """Whom the message can still go to: those it waits for, or, where none is left, those that the MTA has refused."""
        return self.remaining or [address for address, _ in self.refused]


_COLUMNS = tuple(field.name for field in fields(Row))
_LOGGED = [name for name in LOG_COLUMNS if name != "seq"]
# Another connection may give the ledger another node.
_LOG = (
    f"INSERT INTO mail_log ({', '.join(_LOGGED)}) "
    f"VALUES ((SELECT value FROM meta WHERE key = 'node'), {', '.join('?' * (len(_LOGGED) - 1))})"
)
_VALUES = attrgetter(*_COLUMNS)
_JSON = (_COLUMNS.index("remaining"), _COLUMNS.index("refused"))
_PUT = (
    f"INSERT INTO message ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))}) "
    f"ON CONFLICT (queue_id) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _COLUMNS[1:])}"
)


@dataclass
class Incident:
    """Mail of a vhost over its limits; the columns of table incident. Times are seconds since 1970."""

    vhost: str
    opened_at: float
    last_at: float
    observed: int
    limit_text: str
    warning: str
    held: int = 1
    ended_at: float | None = None
    notified_at: float | None = None
    id: int | None = None


_INCIDENT_COLUMNS = tuple(field.name for field in fields(Incident))


def utc(stamp: float) -> str:
    """ISO 8601 in UTC with microseconds, for a time in seconds since 1970; not before that, since years of fewer digits would
    be later ones to whoever compares texts."""
    stamp = max(stamp, 0.0)
    return f"{_seconds(math.floor(stamp))}.{int(stamp % 1 * 1e6):06d}Z"


@lru_cache(16)
def _seconds(stamp: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(stamp))


def is_utc(text: str) -> bool:
    """Whether TEXT is a time as utc() writes it."""
    try:
        return bool(_UTC.match(text) and datetime.fromisoformat(text))
    except ValueError:
        return False


class Ledger:
    """An open ledger. One per thread. Times in logged_at, arrived_at, held_at and executed_at are ISO 8601 in UTC, by the
    machine's clock; stamps, in seconds, are by the ledger's own."""

    def __init__(self, state: str, create: bool = False) -> None:
        """Open STATE/ledger.sqlite, made where CREATE. Raises LedgerError."""
        path = f"{state}/{FILE}"
        if not create and not os.path.exists(path):
            raise LedgerError(f"{path}: no ledger; run: secure-sendmail vhost add VHOST")
        try:
            self._db = sqlite3.connect(path, timeout=30, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            # SQLite's own knows ASCII only, and addresses are not.
            self._db.create_function("lower", 1, str.lower, deterministic=True)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._open(path)
        except sqlite3.Error as error:
            raise LedgerError(f"{path}: {error}") from None
        self.former_node = self._know_machine() if create else ""
        # What the stamps of windows, retries and incidents are measured by.
        self.clock = Clock(self._meta("clock"))
        if create and self.clock.leap > DOUBT:
            with self.transaction():
                self._set_meta("nothing_old_until", repr(self.clock.now() + DOUBT))
        self._host = socket.gethostname()
        # What the log keeps; whoever writes says so.
        self.privacy = Privacy(bytes.fromhex(self._meta("privacy_key")))

    def _open(self, path: str) -> None:
        found = self._db.execute("PRAGMA user_version").fetchone()[0]
        if found > VERSION:
            raise LedgerError(f"{path}: version {found} is newer than {VERSION}, which this program knows; upgrade it")
        if found < VERSION:
            if found:
                self._keep(path, found)
            node = f"INSERT INTO meta VALUES ('node', '{os.urandom(8).hex()}');" if not found else ""
            key = f"INSERT OR IGNORE INTO meta VALUES ('privacy_key', '{os.urandom(32).hex()}');"
            try:
                self._db.executescript(
                    f"BEGIN IMMEDIATE; {''.join(SCHEMAS[found:])} {node} {key} PRAGMA user_version = {VERSION}; COMMIT;"
                )
            except sqlite3.OperationalError:
                # Another process has made it in this moment.
                if self._db.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                    raise
                self._db.execute("ROLLBACK")
            os.chmod(path, 0o600)

    def _know_machine(self) -> str:
        """Where the ledger has come to another machine, log under another node: the former one's may go on as it is.

        What waits for MySQL keeps the former node, under which it arrives once, whoever ships it. Return that node.
        """
        machine, known = _machine(), self._meta("machine")
        if not machine or machine == known:
            return ""
        with self.transaction():
            former = self.node if known else ""
            self._set_meta("machine", machine)
            if former:
                self._set_meta("node", os.urandom(8).hex())
        return former

    def _keep(self, path: str, version: int) -> None:
        """Keep the ledger as it is, for a return to the program that made it."""
        kept = f"{path}.{version}"
        with contextlib.closing(sqlite3.connect(f"{kept}.new")) as target:
            self._db.backup(target)
        os.chmod(f"{kept}.new", 0o600)
        os.replace(f"{kept}.new", kept)

    def _meta(self, key: str) -> str:
        found = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return str(found[0]) if found else ""

    def close(self) -> None:
        self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside becomes durable together, or not at all."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            # A full disk has ended it already.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    # What the daemon writes, inside a transaction.

    def keep_time(self) -> None:
        """Let the clock never be behind what is written now."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES ('clock', ?)", (str(self.clock),))

    def put(self, row: Row) -> None:
        """Write ROW, new or known. The command writes to held and trashed rows only, and the daemon puts these only to
        carry out what it has read there."""
        values = list(_VALUES(row))
        for place in _JSON:
            values[place] = json.dumps(values[place]) if values[place] else "[]"
        self._db.execute(_PUT, values)

    def remove(self, queue_id: str) -> None:
        """Forget an attempt that never reached the MTA."""
        self._db.execute("DELETE FROM message WHERE queue_id = ?", (queue_id,))

    def source_gone(self, queue_ids: Iterable[str]) -> None:
        self._db.executemany("UPDATE message SET source = NULL WHERE queue_id = ?", [(q,) for q in queue_ids])

    def log(self, event: str, row: Row, now: float, recipients: Iterable[tuple[str, str, str]], actor: str = "") -> None:
        """A log row per recipient; RECIPIENTS are (recipient, reason, MTA queue id)."""
        recipients = list(recipients)
        most = max(TEXT_LEAST, TEXTS // max(len(recipients), 1))
        # People read these in MySQL with whatever they have.
        message_id, script, cwd = (visible(text)[:most] for text in (row.message_id, row.script, row.cwd))
        written = []
        for recipient, reason, mta_queue_id in recipients:
            recipient, reason, subject = self.privacy.row(recipient, visible(reason), visible(row.subject)[:most])
            written.append(
                (
                    self._host, utc(now), row.arrived_at, event, row.queue_id, message_id, row.vhost, row.uid,
                    row.verified, row.sender, recipient, row.size, subject, script, cwd, reason, mta_queue_id,
                    visible(actor),
                )
            )  # fmt: skip
        self._db.executemany(_LOG, written)

    def forget(self, address: str) -> int:
        """Forget who ADDRESS is in the log and in what has ended; return the number of log rows.

        What is to be changed is looked for without a lock, and changed in small transactions: mail does not wait.
        """
        lower, hashed = address.lower(), self.privacy.hashed(address)
        whose = "(lower({0}) = :lower OR {0} = :hashed)"
        recipient, sender = whose.format("recipient"), whose.format("sender")
        found = self._db.execute(f"SELECT seq FROM mail_log WHERE {recipient} OR {sender}", {"lower": lower, "hashed": hashed})
        rows = [row[0] for row in found]
        self._rewrite(
            "mail_log", "seq", rows,
            f"recipient = CASE WHEN {recipient} THEN :forgotten ELSE recipient END, "
            f"sender = CASE WHEN {sender} THEN :forgotten ELSE sender END, subject = '', "
            "reason = CASE WHEN instr(lower(reason), :lower) OR instr(reason, :hashed) THEN '' ELSE reason END",
            lower=lower, hashed=hashed,
        )  # fmt: skip
        changes = {"sender": ":forgotten", "remaining": "'[]'", "refused": "'[]'"}
        for column, changed in changes.items():
            sql = f"SELECT queue_id FROM message WHERE state IN ('done', 'unknown') AND {_CONCERNS[column]}"
            ended = [row[0] for row in self._db.execute(sql, (lower,))]
            self._rewrite("message", "queue_id", ended, f"{column} = {changed}, subject = ''")
        return len(rows)

    def _rewrite(self, table: str, key: str, values: Sequence[object], changes: str, **named: str) -> None:
        """Make CHANGES to the rows of TABLE whose KEY is one of VALUES."""
        sql = f"UPDATE {table} SET {changes} WHERE {key} = :value"
        for first in range(0, len(values), COLLECTED):
            with self.transaction():
                chunk = values[first : first + COLLECTED]
                self._db.executemany(sql, [{"value": value, "forgotten": FORGOTTEN, **named} for value in chunk])
            time.sleep(REWRITE_REST)

    def lies_here(self, address: str) -> list[str]:
        """Messages to or from ADDRESS that are in one of our directories, which are not forgotten."""
        sql = f"SELECT queue_id FROM message WHERE {UNFINISHED} AND ({' OR '.join(_CONCERNS.values())}) ORDER BY queue_id"
        return [found[0] for found in self._db.execute(sql, [address.lower()] * len(_CONCERNS))]

    # What the daemon reads.

    def rows(self, where: str, *values: object, most: int = -1) -> list[Row]:
        """The messages that the SQL condition WHERE picks, by queue id; no more than MOST where given."""
        if "state =" in where:
            where = f"{where} AND {UNFINISHED}"
        sql = f"SELECT {', '.join(_COLUMNS)} FROM message WHERE {where} ORDER BY queue_id LIMIT {most}"
        return [_row(found) for found in self._db.execute(sql, values)]

    def row(self, queue_id: str) -> Row | None:
        found = self.rows("queue_id = ?", queue_id)
        return found[0] if found else None

    def queue_ids(self, *states: str) -> list[str]:
        """The messages in any of STATES."""
        sql = f"SELECT queue_id FROM message WHERE state IN ({', '.join('?' * len(states))}) AND {UNFINISHED}"
        return [found[0] for found in self._db.execute(sql, states)]

    def kept(self, recipient_size: int) -> list[tuple[str, str, int, int, int]]:
        """(maildrop, vhost, uid, messages, bytes) of what lies in our directories; a recipient counts RECIPIENT_SIZE."""
        sql = (
            "SELECT maildrop, vhost, uid, count(*), sum(size + ? * recipients) FROM message INDEXED BY message_kept "
            f"WHERE {KEPT} GROUP BY maildrop, vhost, uid"
        )
        return [(found[0], found[1], found[2], found[3], found[4]) for found in self._db.execute(sql, (recipient_size,))]

    def decided(self, most: int) -> list[Row]:
        """MOST messages with a decision that is not carried out yet."""
        return self.rows("decision IS NOT NULL AND executed_at IS NULL", most=most)

    def usage(self, column: str, value: str | int, since: float) -> list[tuple[float, int, str, str]]:
        """(stamp, recipients, vhost, maildrop) of what was sent after SINCE, where COLUMN, vhost or uid, is VALUE, in order."""
        sql = (
            f"SELECT counted_at, recipients, vhost, maildrop FROM message WHERE {column} = ? AND counted_at > ? "
            "AND counted_at IS NOT NULL ORDER BY counted_at"
        )
        return [(found[0], found[1], found[2], found[3]) for found in self._db.execute(sql, (value, since))]

    def reserved(self, column: str, value: str | int) -> list[tuple[str, int, str, str]]:
        """(queue id, recipients, vhost, maildrop) of such messages that are under way and count as now."""
        sql = (
            f"SELECT queue_id, recipients, vhost, maildrop FROM message WHERE state = 'active' AND {column} = ? AND limited "
            f"AND counted_at IS NULL AND {UNFINISHED}"
        )
        return [(found[0], found[1], found[2], found[3]) for found in self._db.execute(sql, (value,))]

    def poison(self) -> dict[tuple[str, bytes], int]:
        """How often our own code has failed at a file in new/, by maildrop and name."""
        return {(found[0], found[1]): found[2] for found in self._db.execute("SELECT maildrop, name, failures FROM poison")}

    def put_poison(self, maildrop: str, name: bytes, failures: int) -> None:
        """Write down that number, inside a transaction; 0 forgets it."""
        self._db.execute("DELETE FROM poison WHERE maildrop = ? AND name = ?", (maildrop, name))
        if failures:
            self._db.execute("INSERT INTO poison VALUES (?, ?, ?)", (maildrop, name, failures))

    # Incidents.

    def put_incident(self, incident: Incident) -> None:
        """Write INCIDENT, which has its id from then on."""
        values = [getattr(incident, name) for name in _INCIDENT_COLUMNS]
        # With its id also where it has one: the transaction that gave it may have been undone.
        sql = f"INSERT OR REPLACE INTO incident ({', '.join(_INCIDENT_COLUMNS)}) VALUES ({', '.join('?' * len(values))})"
        incident.id = self._db.execute(sql, values).lastrowid

    def incidents(self) -> list[Incident]:
        """Those that have not ended, or of which no notice was sent, oldest first."""
        sql = f"SELECT {', '.join(_INCIDENT_COLUMNS)} FROM incident WHERE ended_at IS NULL OR notified_at IS NULL ORDER BY id"
        return [Incident(**dict(found)) for found in self._db.execute(sql)]

    def notices(self, since: float) -> int:
        """How many notices were sent after SINCE; those of one summary have one time."""
        sql = "SELECT count(DISTINCT notified_at) FROM incident WHERE notified_at > ?"
        return int(self._db.execute(sql, (since,)).fetchone()[0])

    def top_script(self, vhost: str, since: float) -> tuple[str, int] | None:
        """The script, as claimed, that most of VHOST's messages logged after SINCE name, and how many."""
        sql = (
            "SELECT script, count(DISTINCT queue_id) AS messages FROM mail_log WHERE logged_at >= ? AND vhost = ? "
            "AND script <> '' GROUP BY script ORDER BY messages DESC LIMIT 1"
        )
        found = self._db.execute(sql, (utc(since), vhost)).fetchone()
        return (found[0], found[1]) if found else None

    # Decisions about vhosts.

    def stopped(self, vhost: str) -> str | None:
        """Why, and by whom, everything of VHOST is held; None where it is not."""
        found = self._db.execute("SELECT actor, why FROM stopped WHERE vhost = ?", (vhost,)).fetchone()
        return f"stopped by {found[0]}: {found[1]}" if found else None

    def stops(self) -> list[dict[str, Any]]:
        """The vhosts that are stopped: vhost, since, actor, why."""
        return [dict(found) for found in self._db.execute("SELECT vhost, since, actor, why FROM stopped ORDER BY vhost")]

    def stop(self, vhost: str, actor: str, why: str) -> bool:
        """Hold everything of VHOST from now on; whether it was not stopped before."""
        with self.transaction():
            now = time.time()
            sql = "INSERT OR IGNORE INTO stopped (vhost, since, actor, why) VALUES (?, ?, ?, ?)"
            if not self._db.execute(sql, (vhost, utc(now), actor, why)).rowcount:
                return False
            self._log_vhost("stopped", vhost, now, why, actor)
        return True

    def resume(self, vhost: str, actor: str, why: str) -> bool:
        """End a stop; whether there was one."""
        with self.transaction():
            if not self._db.execute("DELETE FROM stopped WHERE vhost = ?", (vhost,)).rowcount:
                return False
            self._log_vhost("resumed", vhost, time.time(), why, actor)
        return True

    def rename(self, old: str, new: str, actor: str) -> None:
        """Let the releaser carry what it knows of OLD over to NEW as soon as the maildrop has that name."""
        with self.transaction():
            if not self._db.execute(
                "SELECT 1 FROM renamed WHERE old = ? AND new = ? AND executed_at IS NULL", (old, new)
            ).fetchone():
                self._db.execute("INSERT INTO renamed (old, new, actor) VALUES (?, ?, ?)", (old, new, actor))

    def cancel_rename(self, old: str, new: str) -> None:
        with self.transaction():
            self._db.execute("DELETE FROM renamed WHERE old = ? AND new = ? AND executed_at IS NULL", (old, new))

    def renames(self) -> list[tuple[str, str]]:
        """(old, new) of what is to be carried over, in order."""
        sql = "SELECT old, new FROM renamed WHERE executed_at IS NULL ORDER BY id"
        return [(found[0], found[1]) for found in self._db.execute(sql)]

    def former_names(self, vhost: str) -> set[str]:
        """The names that VHOST had before."""
        sql = (
            "WITH RECURSIVE former(name) AS (SELECT old FROM renamed WHERE new = ? UNION "
            "SELECT old FROM renamed JOIN former ON new = name) SELECT name FROM former"
        )
        return {found[0] for found in self._db.execute(sql, (vhost,))}

    def carry_over(self, old: str, new: str) -> None:
        """Give everything that is under way, held or counted of OLD to NEW; the log keeps the names of its time."""
        with self.transaction():
            changes = "vhost = ?, maildrop = CASE maildrop WHEN ? THEN ? ELSE maildrop END"
            for where in ("counted_at IS NOT NULL", UNFINISHED):
                self._db.execute(f"UPDATE message SET {changes} WHERE vhost = ? AND {where}", (new, old, new, old))
            warning = f"domain {old}:", f"domain {new}:"
            self._db.execute(
                "UPDATE incident SET vhost = ?, warning = replace(warning, ?, ?) WHERE vhost = ?", (new, *warning, old)
            )
            self._db.execute("UPDATE OR IGNORE stopped SET vhost = ? WHERE vhost = ?", (new, old))
            self._db.execute("DELETE FROM stopped WHERE vhost = ?", (old,))
            pending = "old = ? AND new = ? AND executed_at IS NULL"
            found = self._db.execute(f"SELECT actor FROM renamed WHERE {pending}", (old, new)).fetchone()
            now = time.time()
            self._db.execute(f"UPDATE renamed SET executed_at = ? WHERE {pending}", (utc(now), old, new))
            self._log_vhost("renamed", new, now, f"was {old}", found[0] if found else "")

    def removed(self, vhost: str, reason: str, actor: str) -> None:
        """Log that VHOST was removed; it is not stopped any more."""
        with self.transaction():
            self._db.execute("DELETE FROM stopped WHERE vhost = ?", (vhost,))
            self._log_vhost("removed", vhost, time.time(), reason, actor)

    def _log_vhost(self, event: str, vhost: str, now: float, reason: str, actor: str) -> None:
        """A log row about a vhost itself."""
        self.log(event, about(vhost, now, reason, os.getuid()), now, [("", reason, "")], actor)

    def mail_of(self, vhost: str) -> dict[str, int]:
        """The number of messages in each state that is not final, and how many are with the MTA; of VHOST, or of the
        maildrop of that name."""
        with_mta = "sum(state = 'active' AND attempt_open AND deferred_at IS NULL)"
        sql = f"SELECT state, count(*), {with_mta} FROM message WHERE {UNFINISHED} AND (vhost = ? OR maildrop = ?) GROUP BY state"
        found = list(self._db.execute(sql, (vhost, vhost)))
        return {row[0]: row[1] for row in found} | {"in flight": sum(row[2] for row in found)}

    # What is shipped to MySQL: the rows of mail_log behind the last one that is known to be there.

    def _set_meta(self, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    @property
    def node(self) -> str:
        """What the log's rows are numbered by, together with seq."""
        return self._meta("node")

    def new_node(self) -> str:
        """Another id for all rows from now on."""
        with self.transaction():
            self._set_meta("node", os.urandom(8).hex())
        return self.node

    def give_node(self, old: str, after: int) -> bool:
        """Give some rows of OLD behind seq AFTER the id that is ours; whether there may be more."""
        sql = (
            "UPDATE mail_log SET node = ? WHERE seq IN (SELECT seq FROM mail_log WHERE seq > ? AND node = ? ORDER BY seq LIMIT ?)"
        )
        with self.transaction():
            return self._db.execute(sql, (self.node, after, old, COLLECTED)).rowcount == COLLECTED

    def shipped(self) -> int:
        return int(self._meta("shipped") or 0)

    def set_shipped(self, seq: int) -> None:
        """Everything up to SEQ is in MySQL; what is there does not become less."""
        with self.transaction():
            self._set_meta("shipped", str(max(seq, self.shipped())))

    def unshipped(self, most: int) -> list[dict[str, Any]]:
        """The next rows of the outbox, in order."""
        return self.logged(self.shipped(), most)

    def logged(self, after: int, most: int) -> list[dict[str, Any]]:
        """The rows behind seq AFTER, in order, no more than MOST."""
        sql = f"SELECT {', '.join(LOG_COLUMNS)} FROM mail_log WHERE seq > ? ORDER BY seq LIMIT ?"
        return [dict(found) for found in self._db.execute(sql, (after, most))]

    def log_facts(self, node: str, numbers: list[int]) -> list[tuple[int, str, str, str]]:
        """(seq, logged_at, event, queue_id) of those rows of NODE with NUMBERS that are here."""
        places = ", ".join("?" * len(numbers))
        sql = f"SELECT seq, logged_at, event, queue_id FROM mail_log WHERE node = ? AND seq IN ({places})"
        return [(found[0], found[1], found[2], found[3]) for found in self._db.execute(sql, (node, *numbers))]

    def outbox(self) -> int:
        """How many rows wait to be shipped."""
        return int(self._db.execute("SELECT count(*) FROM mail_log WHERE seq > ?", (self.shipped(),)).fetchone()[0])

    def log_size(self, after: int, most: int) -> tuple[int, int, int]:
        """(last seq, rows, about how many bytes) of the MOST rows behind seq AFTER."""
        text = " + ".join(f"length({name})" for name in _TEXT)
        inner = f"SELECT seq, {text} AS text FROM mail_log WHERE seq > ? ORDER BY seq LIMIT ?"
        sql = f"SELECT max(seq), count(*), sum(text) FROM ({inner})"
        found = self._db.execute(sql, (after, most)).fetchone()
        return found[0] or after, found[1], (found[2] or 0) + found[1] * ROW_SIZE

    def waits(self) -> dict[str, Any]:
        """How it is that the log waits for MySQL; empty: it does not. Keys: Shipper."""
        return dict(json.loads(self._meta("log_waits") or "{}"))

    def set_waits(self, facts: dict[str, Any]) -> None:
        with self.transaction():
            self._set_meta("log_waits", json.dumps(facts))

    def summarise(self, after: int, floor: int, most: int) -> tuple[int, int, int, int]:
        """Make, of the MOST rows behind seq AFTER, one for each vhost, event and hour, whose size is their number.

        Such rows behind seq FLOOR are added to. Rows about a vhost itself stay as they are. Return the last seq looked at,
        how many rows there were, how many have gone, and about how many bytes.
        """
        earlier_one = (
            "SELECT seq, size FROM mail_log INDEXED BY mail_log_queue_id WHERE queue_id = '' AND size > 0 "
            "AND seq > ? AND seq <= ? AND node = ? AND vhost = ? AND event = ? AND logged_at >= ? AND logged_at < ?"
        )
        emptied = ", ".join(f"{name} = ''" for name in (*_CLAIMED, "queue_id", "recipient", "mta_queue_id", "actor"))
        with self.transaction():
            found = self.logged(after, most)
            groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
            for row in found:
                if row["queue_id"] or row["size"]:
                    groups.setdefault((row["node"], row["vhost"], row["event"], row["logged_at"][:13]), []).append(row)
            gone: list[dict[str, Any]] = []
            for (*key, hour), rows in groups.items():
                earlier = self._db.execute(earlier_one, (floor, after, *key, hour, f"{hour}~")).fetchone()
                count = sum(1 if row["queue_id"] else row["size"] for row in rows) + (earlier["size"] if earlier else 0)
                kept = earlier["seq"] if earlier else rows[-1]["seq"]
                gone += [row for row in rows if row["seq"] != kept]
                reason = f"summary: {count} rows of this hour, of which outbox_max has left the number"
                sql = f"UPDATE mail_log SET {emptied}, uid = NULL, size = ?, reason = ? WHERE seq = ?"
                self._db.execute(sql, (count, reason, kept))
            self._db.executemany("DELETE FROM mail_log WHERE seq = ?", [(row["seq"],) for row in gone])
        size = sum(ROW_SIZE + sum(len(row[name]) for name in _TEXT) for row in gone)
        return (found[-1]["seq"] if found else after), len(found), len(gone), size

    def unfinished(self, queue_ids: list[str]) -> set[str]:
        """Those of QUEUE_IDS whose mail still lies in one of our directories."""
        places = ", ".join("?" * len(queue_ids))
        sql = f"SELECT queue_id FROM message WHERE state NOT IN ('done', 'unknown') AND queue_id IN ({places})"
        return {found[0] for found in self._db.execute(sql, queue_ids)}

    def ago(self, seconds: float) -> str:
        """So long ago, for what is to be collected. A clock that was put forward while we run makes nothing old, nor does one
        that is ahead when the machine is started, until somebody has had the time to put it right."""
        now = self.clock.now()
        return utc(min(time.time(), now) - seconds if now >= float(self._meta("nothing_old_until") or 0) else 0)

    # Garbage collection, a little at a time: each method goes on behind the position that the last one returned, None: done.

    def collect_log(self, before: str, position: tuple[str, int], shipped: bool, most: int) -> tuple[tuple[str, int] | None, int]:
        """Look at MOST rows of the log from BEFORE then, and delete those of mail that lies here no more; how many.

        SHIPPED: only what is in MySQL.
        """
        sql = (
            "SELECT logged_at, seq, EXISTS (SELECT 1 FROM message WHERE message.queue_id = mail_log.queue_id AND "
            f"{UNFINISHED}) AS kept FROM mail_log WHERE logged_at < ? AND (logged_at, seq) > (?, ?) "
            "ORDER BY logged_at, seq LIMIT ?"
        )
        found = self._db.execute(sql, (before, *position, most)).fetchall()
        last = self.shipped() if shipped else None
        old = [row["seq"] for row in found if not row["kept"] and (last is None or row["seq"] <= last)]
        self._delete("mail_log", "seq", old)
        return (found[-1]["logged_at"], found[-1]["seq"]) if len(found) == most else None, len(old)

    def collect_messages(self, before: str, counted: float, position: int, most: int) -> int | None:
        """Look at MOST messages, and forget those from BEFORE then that have ended and count for no window since COUNTED."""
        sql = "SELECT rowid, state, source, picked_up_at, counted_at FROM message WHERE rowid > ? ORDER BY rowid LIMIT ?"
        found = self._db.execute(sql, (position, most)).fetchall()
        old = [
            row["rowid"]
            for row in found
            if row["state"] in (DONE, UNKNOWN) and row["source"] is None and row["picked_up_at"] < before
            and (row["counted_at"] is None or row["counted_at"] < counted)
        ]  # fmt: skip
        self._delete("message", "rowid", old)
        # They are in the order in which they were picked up, but for those from before the clock was put back.
        more = len(found) == most and any(not before <= row["picked_up_at"] <= utc(time.time()) for row in found)
        return found[-1]["rowid"] if more else None

    def expire(self, state: str, before: str, position: str, most: int, reason: str) -> tuple[str | None, list[Row]]:
        """Look at MOST messages in STATE, and end those that are there since BEFORE then and are not to be moved: which."""

        def old(row: Row) -> bool:
            since = max(row.executed_at or "", row.held_at or "", row.picked_up_at)
            return row.state == state and (row.decision is None or row.executed_at is not None) and since < before

        found = self.rows("state = ? AND queue_id > ?", state, position, most=most)
        ended = []
        if any(map(old, found)):
            with self.transaction():
                # A person may have decided meanwhile.
                for row in filter(old, self.rows("state = ? AND queue_id > ?", state, position, most=most)):
                    self.log("expired", row, time.time(), [(recipient, reason, "") for recipient in row.concerned])
                    row.state = DONE
                    self.put(row)
                    ended.append(row)
        return found[-1].queue_id if len(found) == most else None, ended

    def collect_incidents(self, before: float) -> None:
        """Forget incidents that were over and told of BEFORE then, by the clock of the ledger."""
        old = self._db.execute("SELECT id FROM incident WHERE ended_at < ? AND notified_at < ?", (before, before))
        self._delete("incident", "id", [row["id"] for row in old])

    def _delete(self, table: str, key: str, values: list[int]) -> None:
        if values:
            with self.transaction():
                self._db.executemany(f"DELETE FROM {table} WHERE {key} = ?", [(value,) for value in values])

    # What the command uses.

    def decide(self, decision: str, queue_ids: list[str], actor: str, why: str) -> list[str]:
        """Record DECISION on those of QUEUE_IDS that are in one of its states and undecided; return these."""
        done = []
        states = DECISIONS[decision]
        sql = (
            "UPDATE message SET decision = ?, executed_at = NULL, actor = ?, why = ? WHERE queue_id = ? "
            f"AND state IN ({', '.join('?' * len(states))}) AND (decision IS NULL OR executed_at IS NOT NULL)"
        )
        with self.transaction():
            for queue_id in queue_ids:
                changed = self._db.execute(sql, (decision, actor, why, queue_id, *states))
                if changed.rowcount == 1:
                    done.append(queue_id)
        return done

    def delete_held(self, vhost: str, actor: str, why: str) -> int:
        """Decide to delete all held mail of VHOST, or of the maildrop of that name; return how many."""
        sql = f"SELECT queue_id FROM message WHERE {UNFINISHED} AND state = 'held' AND (vhost = ? OR maildrop = ?)"
        return len(self.decide("delete", [found[0] for found in self._db.execute(sql, (vhost, vhost))], actor, why))

    def undone(self, decision: str) -> list[str]:
        """Messages for which DECISION is recorded but not carried out; for a release, until the MTA's first answer."""
        waits = "executed_at IS NULL"
        if decision == "release":
            waits = "(executed_at IS NULL OR state = 'active' AND deferred_at IS NULL)"
        sql = f"SELECT queue_id FROM message WHERE {UNFINISHED} AND decision = ? AND {waits}"
        return [found[0] for found in self._db.execute(sql, (decision,))]

    def counts(self) -> dict[str, int]:
        """The number of messages in each state that is not final."""
        sql = "SELECT state, count(*) FROM message WHERE state NOT IN ('done', 'unknown') GROUP BY state"
        return {found[0]: found[1] for found in self._db.execute(sql)}

    def held_by_vhost(self) -> dict[str, int]:
        sql = f"SELECT vhost, count(*) FROM message WHERE state = 'held' AND {UNFINISHED} GROUP BY vhost"
        return {found[0]: found[1] for found in self._db.execute(sql)}

    def select(self, sql: str, values: Sequence[object]) -> Iterator[dict[str, Any]]:
        """The rows that SQL picks, one by one."""
        for found in self._db.execute(sql, values):
            yield dict(found)


def _machine() -> str:
    """What tells this machine from others; empty: nothing does. The id itself is nobody's business."""
    try:
        with open("/etc/machine-id", "rb") as stream:
            machine = stream.read(64).strip()
    except OSError:
        return ""
    return hashlib.sha256(b"php-secure-sendmail " + machine).hexdigest()[:16] if len(machine) == 32 else ""


def about(vhost: str, now: float, reason: str, uid: int, verified: int = 1) -> Row:
    """What a log row about a vhost itself is made of: no message."""
    return Row(
        queue_id="", vhost=vhost, state=DONE, source=None, digest="", recipients=0, remaining=[], sender="", size=0,
        arrived_at=utc(now), picked_up_at=utc(now), uid=uid, verified=verified, message_id="", subject="", script="",
        cwd="", reason=reason, refused=[],
    )  # fmt: skip


def _row(found: sqlite3.Row) -> Row:
    values = dict(found)
    values["remaining"] = json.loads(values["remaining"])
    values["refused"] = [(address, words) for address, words in json.loads(values["refused"])]
    return Row(**values)
