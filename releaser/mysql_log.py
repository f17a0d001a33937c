"""The log of record: rows of the ledger shipped to MySQL in order, exactly once, by a thread that mail never waits for.

The only module that imports PyMySQL. MySQL being down, slow, read-only or full never touches mail: rows wait in the
ledger, and one line a minute says how many.
"""

import fcntl
import os
import re
import sqlite3
import ssl
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from typing import Any

import pymysql
import pymysql.cursors

from releaser import errorlog, maillog
from releaser.config import Mysql
from releaser.ledger import LOG_COLUMNS, Ledger, utc
from releaser.maillog import LOG

SCHEMA_VERSION = 2
# Versions of the tables that rows can be added to: the later one has other indexes.
SHIPPABLE = (1, 2)
# Beside the ledger: held by whoever ships.
LOCK = "shipping"
# Rows in one INSERT at most, and the share of max_allowed_packet that its text may take.
BATCH_ROWS = 500
PACKET_SHARE = 4
# Seconds: to connect, for a reply, between looks for new rows, between tries while it is down, between collections.
CONNECT_TIMEOUT, REPLY_TIMEOUT, POLL, BACKOFF, COLLECTION = 5, 30, 1, (1, 60), 3600
# Seconds that MySQL itself waits for a lock, so that it says so before REPLY_TIMEOUT.
LOCK_TIMEOUT = 20
# Seconds between two lines of one kind that say what is wrong, and between two looks at how much waits.
COMPLAINT = 60
# Rows that garbage collection deletes in one statement, and the seconds it rests behind each, at least and at most: as long as
# that took, since the server still has to write to its disk what each row had in every index.
COLLECTED_ROWS, COLLECTION_REST, LONGEST_REST = 200, 0.03, 1
# Rows of which the bytes are added up together, and those that outbox_max makes few of in one transaction.
COUNTED_ROWS, SUMMARISED_ROWS = 1000, 500
# So often the connection is lost at one row alone before that counts as MySQL's answer to its content.
LAST_TRIES = 3

# MySQL's errors for a row's content. Null, out of range, cut, wrong value, bad string, too long, a function's value, no such
# character; what a trigger or a CHECK of the administrator's own says. In MySQL and in MariaDB.
CONTENT_ERRORS = frozenset((1048, 1264, 1265, 1292, 1300, 1366, 1406, 1411, 1644, 1977, 3819, 3988, 4025))
# The connection is lost, or was closed because of what was sent.
TOO_LARGE = 1153
GONE_ERRORS = frozenset((2006, 2013, TOO_LARGE))
DUPLICATE = 1062
# A column or a key of that name is there, or was dropped.
DONE_ALREADY = (1060, 1061, 1091)
# Seconds that changing a table of millions of rows may take.
ALTER_TIMEOUT = 6 * 3600
# What is left of a row that was refused.
BARE, STUB = "in plain ASCII", "without its text, which the ledger has"
# What to do, where that is not the server's administrator's to know.
ADVICE = {
    1146: "run: secure-sendmail log init",
    1054: "run: secure-sendmail log migrate",
    1142: "GRANT INSERT, SELECT, DELETE on the log's tables",
}

# Characters that the columns of config/schema.sql hold.
WIDTHS = {
    "host": 255, "event": 16, "queue_id": 32, "message_id": 255, "vhost": 255, "sender": 320, "recipient": 320,
    "subject": 255, "script": 1000, "cwd": 1000, "reason": 1000, "mta_queue_id": 255, "actor": 255,
}  # fmt: skip

_TIME = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2})T([0-9:]{8}\.[0-9]{6})Z\Z")


class LogError(Exception):
    """MySQL cannot be used as it is set up; the text says why."""


def connect(server: Mysql, patience: int = REPLY_TIMEOUT) -> "pymysql.connections.Connection[Any]":
    """A session in UTC that commits each statement, and waits PATIENCE seconds for each answer. Raises LogError."""
    if patience > REPLY_TIMEOUT:
        # A server that does not answer at all is known sooner.
        _close(connect(server))
    try:
        return pymysql.connect(
            host=server.host,
            port=server.port,
            unix_socket=server.unix_socket,
            user=server.user,
            password=_password(server.password_file),
            database=server.database,
            charset="utf8mb4",
            connect_timeout=CONNECT_TIMEOUT,
            read_timeout=patience,
            write_timeout=patience,
            autocommit=True,
            # A certificate of the server's own making is only believed where its authority is configured.
            ssl=ssl.create_default_context(cafile=server.tls_ca) if server.tls_ca else None,
            ssl_disabled=server.tls_ca is None,
            init_command="SET time_zone = '+00:00', sql_mode = 'STRICT_ALL_TABLES', "
            f"innodb_lock_wait_timeout = {LOCK_TIMEOUT}, lock_wait_timeout = {LOCK_TIMEOUT}",
        )
    except LogError:
        raise
    except RuntimeError as error:
        # Not one of PyMySQL's own errors: an authentication method wants a package that is not there.
        package = next((name for name in ("cryptography", "pynacl") if name in str(error).lower()), "")
        raise LogError(f"{words(error)}; {_WANTED[package]}" if package else words(error)) from None
    except Exception as error:
        raise LogError(words(error)) from None


_WANTED = {
    "cryptography": "install it (Debian: python3-cryptography), or set unix_socket or tls_ca in [mysql]: then the user's "
    "caching_sha2_password needs none",
    "pynacl": "install it (Debian: python3-nacl), or identify the user by another method than ed25519",
}


def statements(schema: str) -> list[str]:
    """The statements of config/schema.sql."""
    without_comments = re.sub(r"^\s*--.*$", "", schema, flags=re.MULTILINE)
    return [text.strip() for text in without_comments.split(";") if text.strip()]


def initialise(server: Mysql, schema: str) -> int:
    """Run SCHEMA in the log's database, where what it makes is not there; return its version. Raises LogError."""
    with _alone(server) as connection:
        for statement in statements(schema):
            _do(connection, statement)
        return version_of(connection)


def migrate(server: Mysql, steps: dict[int, str]) -> list[int]:
    """Carry out those of STEPS, each the SQL that leads to its version, that are ahead; return them. Raises LogError."""
    made = []
    with _alone(server) as connection:
        for version in sorted(set(steps) - set(range(version_of(connection) + 1))):
            for statement in statements(steps[version]):
                try:
                    _do(connection, statement)
                except pymysql.MySQLError as error:
                    # An earlier run has come so far.
                    if error.args[0] not in DONE_ALREADY:
                        raise
            made.append(version)
    return made


@contextmanager
def _alone(server: Mysql) -> Iterator[Any]:
    """A session for those who change tables, one at a time. Raises LogError."""
    connection = connect(server, ALTER_TIMEOUT)
    try:
        if _one(connection, "SELECT GET_LOCK(%s, %s)", f"{server.database}.mail_log", LOCK_TIMEOUT) != 1:
            raise LogError("somebody else changes the tables")
        yield connection
    except pymysql.MySQLError as error:
        raise LogError(words(error)) from None
    finally:
        _close(connection)


def version_of(connection: Any) -> int:
    """The version of the tables. Raises pymysql.MySQLError."""
    return int(_one(connection, "SELECT MAX(version) FROM mail_log_schema") or 0)


def words(error: BaseException) -> str:
    """What MySQL, or the way to it, said."""
    if isinstance(error, pymysql.MySQLError) and len(error.args) == 2:
        # Its own words have the system's in them as Python writes these.
        advice = f"; {ADVICE[error.args[0]]}" if error.args[0] in ADVICE else ""
        return f"{re.sub(r'.Errno [0-9]+. ', '', str(error.args[1]))} ({error.args[0]}){advice}"
    return str(error) or type(error).__name__


def waiting(facts: dict[str, Any], rows: int) -> list[str]:
    """How it is that ROWS of the log wait, by what Shipper has left in the ledger: a sentence each."""
    said = []
    if "reason" in facts:
        said.append(f"the log waits: MySQL has taken none since {facts['since'][:19]}Z, rows {rows}: {facts['reason']}")
    if "bytes" in facts:
        said.append(f"the log waits: {facts['bytes']} bytes are more than half of outbox_max")
    if facts.get("summarised"):
        said.append(f"outbox_max was reached: of {facts['summarised']} rows that waited longest only the number is left")
    return said


def _password(file: str | None) -> str:
    if file is None:
        return ""
    try:
        status = os.stat(file)
        if status.st_mode & (stat.S_IRWXO | stat.S_IWGRP):
            raise LogError(f"{file}: readable by others (mode {stat.S_IMODE(status.st_mode):04o}); run: chmod 0600 {file}")
        with open(file, encoding="utf-8") as stream:
            return stream.read().rstrip("\r\n")
    except OSError as error:
        raise LogError(f"{file}: {error.strerror}") from None


class Smaller(Exception):
    """The connection was lost with a batch on its way: perhaps that was too large, and half of it goes through."""


class Shipper:
    """A thread that ships what the ledger's log has, and collects what is older than retention.

    What `status` says of it lies in the ledger while rows wait: since when, and reason, where MySQL takes none; about how many
    bytes, where that is more than half of outbox_max; and how many rows outbox_max has summarised.
    """

    def __init__(self, server: Mysql, state: str, error_log: str | None, spool: str) -> None:
        self._server = server
        self._state = state
        self._error_log = error_log
        self._not_inside = (spool, state)
        self._wake = threading.Event()
        self._ending = self._abandoned = False
        # The rows of one INSERT by now, and the row at which alone the connection was lost, and how often.
        self._most = BATCH_ROWS
        self._lost: tuple[int, int] = (0, 0)
        # Whose rows were compared with MySQL's in this connection.
        self._settled = ""
        self._packet = 0
        # Whether rows have arrived since the last failure.
        self._progress = False
        self._facts: dict[str, Any] = {}
        self._size = Size()
        # outbox_max has made fewer of what is up to this seq.
        self._summarised = 0
        self._said = Said()
        self._thread = threading.Thread(target=self._run, name="mysql-log", daemon=True)
        self._thread.start()

    def stop(self, patience: float) -> None:
        """Ship what is there if MySQL takes it, for at most PATIENCE seconds, and end; with none what waits is another's."""
        self._ending, self._abandoned = True, not patience
        self._wake.set()
        self._thread.join(patience)

    def _run(self) -> None:
        lock = -1
        book: Ledger | None = None
        connection: Any = None
        backoff, collected = 0.0, 0.0
        while True:
            ending = self._ending
            pause: float = POLL
            try:
                if lock < 0:
                    lock = self._lock()
                    if self._abandoned:
                        break
                if book is None:
                    book = Ledger(self._state)
                    self._facts = book.waits()
                if connection is None:
                    connection = connect(self._server)
                    self._begin(connection)
                self._ship_all(book, connection)
                backoff = 0
                self._took_all(book)
                if not collected or time.monotonic() - collected >= COLLECTION:
                    collected = time.monotonic()
                    retention, between = self._server.retention, partial(self._ship_all, book, connection)
                    collect(book, connection, retention, self._error_log, self._not_inside, between)
            except Smaller:
                _close(connection)
                connection = None
                continue
            except Exception as error:
                # Whatever it is, the rows are safe in the ledger, and mail does not wait.
                if connection is not None:
                    _close(connection)
                    connection = None
                first, most = BACKOFF
                pause = backoff = first if self._progress else min(max(backoff * 2, first), most)
                self._progress = False
                self._took_none(book, error)
            if ending:
                break
            self._wake.wait(pause)
            self._wake.clear()
        if connection is not None:
            _close(connection)
        if book is not None:
            book.close()
        if lock >= 0:
            os.close(lock)

    def _lock(self) -> int:
        """There are never two at work: one that was told to end may still wait for MySQL. Raises OSError."""
        fd = os.open(f"{self._state}/{LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _begin(self, connection: Any) -> None:
        version = version_of(connection)
        if version not in SHIPPABLE:
            what = "upgrade it" if version > SCHEMA_VERSION else "run: secure-sendmail log init"
            raise LogError(f"the tables are of version {version}, this program's are of {SCHEMA_VERSION}; {what}")
        self._packet = int(_one(connection, "SELECT @@max_allowed_packet"))
        self._settled = ""

    def _took_all(self, book: Ledger) -> None:
        """Nothing waits."""
        self._size = Size()
        if self._facts:
            self._facts = {}
            book.set_waits({})
        if self._said.down:
            self._said.down = False
            LOG.warning(maillog.log_is_back())

    def _took_none(self, book: Ledger | None, error: BaseException) -> None:
        """Say so, at most once a minute, and leave it where `status` finds it."""
        rows: int | None = None
        try:
            if book is not None:
                reason = words(error)
                if self._facts.get("reason") != reason:
                    self._facts = {"since": utc(time.time()), **self._facts, "reason": reason}
                    book.set_waits(self._facts)
                self._see_to_size(book)
                if self._said.may("down"):
                    rows = book.outbox()
        except sqlite3.Error as unwritten:
            # There is no room in the ledger itself, which mail waits for, too.
            error = unwritten
        if rows is not None or self._said.may("down"):
            self._said.down = True
            self._said.now("down")
            LOG.error(maillog.log_is_down(words(error), rows))

    def _see_to_size(self, book: Ledger) -> None:
        """Say that half of outbox_max waits; beyond it, make fewer rows of the oldest that wait, but for those in doubt."""
        most = self._server.outbox_max
        size = self._size.look(book)
        if size * 2 < most:
            return
        if self._said.may("half"):
            self._said.now("half")
            LOG.error(maillog.outbox_half(size, most))
        if size > most:
            # Of one batch nobody knows whether MySQL has it: it must not change.
            first = book.unshipped(BATCH_ROWS)
            floor = int(first[-1]["seq"])
            self._summarised = max(floor, self._summarised)
            looked = gone = freed = 0
            while size - freed > most // 10 * 9:
                self._summarised, rows, fewer, smaller = book.summarise(self._summarised, floor, SUMMARISED_ROWS)
                looked, gone, freed = looked + rows, gone + fewer, freed + smaller
                if rows < SUMMARISED_ROWS:
                    break
                time.sleep(COLLECTION_REST)
            if gone:
                self._facts["summarised"] = int(self._facts.get("summarised", 0)) + gone
                LOG.error(maillog.outbox_full(looked, looked - gone, most))
                self._size = Size()
                size = self._size.look(book)
        self._facts["bytes"] = size
        book.set_waits(self._facts)

    def _settle(self, book: Ledger, connection: Any, node: str) -> None:
        """What MySQL has of NODE behind what is known to be there: rows whose answer was lost, or those of another ledger.

        Rows go in order, so the last one that is the same tells what is there. One that is not the same, or that this ledger
        does not have at all, was written by the ledger that this one was restored or copied from, or by such a copy: what
        waits goes under a node that nobody else is.
        """
        sql = "SELECT seq, logged_at, event, queue_id FROM mail_log WHERE node = %s AND seq > %s ORDER BY seq LIMIT %s"
        self._settled = node
        while there := _all(connection, sql, node, book.shipped(), BATCH_ROWS):
            ours = {seq: [_time_of(facts[0]), *facts[1:]] for seq, *facts in book.log_facts(node, [row[0] for row in there])}
            same = [ours.get(seq) == facts for seq, *facts in there]
            first = same.index(False) if False in same else len(there)
            if first:
                self._arrived(book, int(there[first - 1][0]))
            if first < len(there):
                if node == book.node:
                    LOG.error(maillog.node_taken(node, book.new_node()))
                while book.give_node(node, book.shipped()):
                    time.sleep(COLLECTION_REST)
                return

    def _ship_all(self, book: Ledger, connection: Any) -> None:
        while self._ship(book, connection) and not self._abandoned:
            if self._said.may("size"):
                self._said.now("size")
                self._see_to_size(book)

    def _ship(self, book: Ledger, connection: Any) -> bool:
        """Ship one batch; return whether there may be more."""
        most = self._most
        rows = book.unshipped(most)
        if not rows:
            return False
        node, seq = rows[0]["node"], int(rows[0]["seq"])
        if node != self._settled:
            self._settle(book, connection, node)
            return True
        batch: list[tuple[object, ...]] = []
        room = self._packet // PACKET_SHARE
        for row in rows:
            values = row_values(row)
            room -= sum(4 * len(value) if isinstance(value, str) else 20 for value in values) + 100
            if row["node"] != node or (batch and room < 0):
                break
            batch.append(values)
        try:
            self._put(connection, batch)
        except pymysql.MySQLError as error:
            number = error.args[0] if error.args else None
            if number == DUPLICATE:
                # Of an INSERT whose answer was lost, or of another ledger: what was committed meanwhile can be seen now.
                self._settle(book, connection, node)
                if book.unshipped(1) == rows[:1]:
                    raise
                return True
            if number in GONE_ERRORS and len(batch) > 1:
                self._most = len(batch) // 2
                raise Smaller from error
            if number in GONE_ERRORS:
                times = self._lost[1] if self._lost[0] == seq else 0
                self._lost = seq, max(times + 1, LAST_TRIES if number == TOO_LARGE else 0)
                if number == TOO_LARGE and not times:
                    raise Smaller from error
            raise
        self._most = min(most * 2, BATCH_ROWS)
        self._arrived(book, int(str(batch[-1][_SEQ])))
        return len(batch) < len(rows) or len(rows) == most

    def _arrived(self, book: Ledger, seq: int) -> None:
        book.set_shipped(seq)
        self._progress = True

    def _put(self, connection: Any, batch: list[tuple[object, ...]]) -> None:
        """All of BATCH, or none of it. Where its content is refused, each row is tried on its own, then poorer and poorer."""
        if self._lost[0] == batch[0][_SEQ] and self._lost[1] >= LAST_TRIES:
            _insert(connection, [_stub(batch[0])])
            self._say_poor(batch[0], STUB, "the connection is lost at it each time")
            del batch[1:]
            return
        try:
            _insert(connection, batch)
            return
        except pymysql.MySQLError as error:
            if not _is_content(error):
                raise
        connection.begin()
        for values in batch:
            try:
                _insert(connection, [values])
            except pymysql.MySQLError as error:
                if not _is_content(error):
                    raise
                self._put_poor(connection, values, words(error))
        connection.commit()

    def _put_poor(self, connection: Any, values: tuple[object, ...], why: str) -> None:
        """One row that MySQL refuses for its content must not stop the rest: in plain ASCII, or without what was claimed."""
        try:
            _insert(connection, [_bare(values)])
            self._say_poor(values, BARE, why)
        except pymysql.MySQLError as error:
            if not _is_content(error):
                raise
            # Where this is refused, too, it is not for what is in it.
            _insert(connection, [_stub(values)])
            self._say_poor(values, STUB, words(error))

    def _say_poor(self, values: tuple[object, ...], what: str, why: str) -> None:
        if self._said.may("poor"):
            LOG.error(maillog.log_row_poor(str(values[_SEQ]), what, self._said.now("poor"), why))


class Said:
    """What was said lately: each kind of line at most once in COMPLAINT seconds."""

    def __init__(self) -> None:
        # Whether it was said that MySQL takes no log, and not yet that it does again.
        self.down = False
        self._at: dict[str, float] = {}
        self._withheld: Counter[str] = Counter()

    def may(self, kind: str) -> bool:
        """Whether a line of KIND may be said now; where not, that is counted."""
        may = kind not in self._at or time.monotonic() - self._at[kind] >= COMPLAINT
        self._withheld[kind] += not may
        return may

    def now(self, kind: str) -> int:
        """One is; return how many before it were not."""
        self._at[kind] = time.monotonic()
        return self._withheld.pop(kind, 0)


class Size:
    """About how many bytes wait, added up of so many rows at a time, each looked at once."""

    def __init__(self) -> None:
        # (last seq, rows, bytes), in order; all but the last have COUNTED_ROWS.
        self._parts: list[tuple[int, int, int]] = []

    def look(self, book: Ledger) -> int:
        """Bytes of what waits."""
        shipped = book.shipped()
        self._parts = [part for part in self._parts if part[0] > shipped and part[1] == COUNTED_ROWS]
        more = True
        while more:
            part = book.log_size(self._parts[-1][0] if self._parts else shipped, COUNTED_ROWS)
            self._parts.append(part)
            more = part[1] == COUNTED_ROWS
        return sum(part[2] for part in self._parts)


def collect(
    book: Ledger, connection: Any, retention: int, error_log: str | None, not_inside: tuple[str, ...],
    between: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Delete our rows older than RETENTION seconds, in small batches, those of mail that still lies here excepted.

    BETWEEN them is time for something else.
    """
    before = book.ago(retention)
    deleted = 0
    for rows in delete(book, connection, book.node, before):
        deleted += rows
        between()
    if deleted:
        line = errorlog.collected(time.time(), f"{deleted} rows", retention)
        LOG.info(line)
        errorlog.tell(error_log, line, not_inside)


def delete(book: Ledger, connection: Any, node: str, before: str) -> Iterator[int]:
    """Delete the rows of NODE that were logged before then, but for those of mail that still lies here: how many, by and by.

    Each batch is a transaction of its own, on rows that were looked up before: whoever inserts waits for none.
    """
    position = ("1970-01-01", 0)
    while True:
        found = _all(
            connection,
            "SELECT seq, queue_id, logged_at FROM mail_log WHERE node = %s AND logged_at < %s "
            "AND (logged_at > %s OR logged_at = %s AND seq > %s) ORDER BY logged_at, seq LIMIT %s",
            node, _sql_time(before), position[0], position[0], position[1], COLLECTED_ROWS,
        )  # fmt: skip
        if not found:
            return
        position = (str(found[-1][2]), int(found[-1][0]))
        kept = book.unfinished([row[1] for row in found])
        old = [int(row[0]) for row in found if row[1] not in kept]
        if old:
            places, began = ", ".join(["%s"] * len(old)), time.monotonic()
            gone = _do(connection, f"DELETE FROM mail_log WHERE node = %s AND seq IN ({places})", node, *old)
            took = time.monotonic() - began
            yield gone
            time.sleep(min(max(took, COLLECTION_REST), LONGEST_REST))
        else:
            yield 0


class Retired:
    """The rows of a node, for a person to delete. Raises LogError."""

    def __init__(self, server: Mysql, book: Ledger, node: str, before: str) -> None:
        self._book, self._node, self._before = book, node, before
        self._connection = connect(server)
        with self._errors():
            sql = "SELECT COUNT(*), MAX(host), MAX(logged_at) FROM mail_log WHERE node = %s AND logged_at < %s"
            found = _all(self._connection, sql, node, _sql_time(before))[0]
        self.rows, self.host, self.last = int(found[0]), str(found[1]), str(found[2])

    def delete(self) -> Iterator[int]:
        """Do so; how many are gone, by and by."""
        with self._errors():
            yield from delete(self._book, self._connection, self._node, self._before)

    def close(self) -> None:
        _close(self._connection)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except pymysql.MySQLError as error:
            raise LogError(words(error)) from None


def row_values(row: dict[str, Any]) -> tuple[object, ...]:
    """A log row as MySQL takes it: valid UTF-8 without NUL, cut to the columns, times without zone."""
    values: list[object] = []
    for name in LOG_COLUMNS:
        value = row[name]
        if name in ("logged_at", "arrived_at"):
            value = _sql_time(str(value))
        elif isinstance(value, str):
            value = value.encode("utf-8", "replace").decode().replace("\0", "")
            value = value[: WIDTHS.get(name, len(value))]
        values.append(value)
    return tuple(values)


_SEQ = LOG_COLUMNS.index("seq")


def _is_content(error: pymysql.MySQLError) -> bool:
    return bool(error.args) and error.args[0] in CONTENT_ERRORS


def _stub(values: Sequence[object]) -> tuple[object, ...]:
    """The row with what our own programs have made, and without all else."""
    keep = ("node", "seq", "logged_at", "event", "queue_id", "vhost", "verified", "size")
    found = dict(zip(LOG_COLUMNS, values, strict=True))
    found |= {name: "" if isinstance(value, str) else None for name, value in found.items() if name not in keep}
    return tuple((found | {"arrived_at": None, "uid": None, "reason": "refused for its content, see the ledger"}).values())


def _time_of(text: str) -> datetime | None:
    """A time of the ledger as MySQL answers it."""
    found = _sql_time(text)
    return datetime.fromisoformat(found) if found else None


def _bare(values: Sequence[object]) -> tuple[object, ...]:
    """The row with what could have been refused reduced to plain ASCII."""
    keep = ("node", "seq", "logged_at")
    return tuple(
        value if name in keep or not isinstance(value, str) else value.encode("ascii", "replace").decode()
        for name, value in zip(LOG_COLUMNS, values, strict=True)
    )


def _sql_time(text: str) -> str | None:
    match = _TIME.match(text)
    return f"{match[1]} {match[2]}" if match else None


def _insert(connection: Any, batch: list[tuple[object, ...]]) -> None:
    places = f"({', '.join(['%s'] * len(LOG_COLUMNS))})"
    sql = f"INSERT INTO mail_log ({', '.join(LOG_COLUMNS)}) VALUES {', '.join([places] * len(batch))}"
    _do(connection, sql, *[value for values in batch for value in values])


def _do(connection: Any, sql: str, *values: object) -> int:
    with connection.cursor() as cursor:
        return int(cursor.execute(sql, values))


def _all(connection: Any, sql: str, *values: object) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(sql, values)
        return list(cursor.fetchall())


def forget(connection: Any, address: str, hashed: str, forgotten: str) -> int:
    """Put FORGOTTEN in place of ADDRESS, or of its HASHED form, in the rows of all hosts; how many. Raises LogError.

    A row is deleted and added again, for which no right is needed that the releaser has not.
    """
    changed = 0
    try:
        for column in (LOG_COLUMNS.index("recipient"), LOG_COLUMNS.index("sender")):
            name = LOG_COLUMNS[column]
            sql = f"SELECT {', '.join(LOG_COLUMNS)} FROM mail_log WHERE {name}_lower IN (%s, %s) LIMIT %s"
            while rows := _all(connection, sql, address.lower(), hashed, BATCH_ROWS):
                rewritten = []
                for row in rows:
                    values = list(row)
                    values[column], values[LOG_COLUMNS.index("subject")] = forgotten, ""
                    reason = values[LOG_COLUMNS.index("reason")]
                    if address.lower() in reason.lower() or hashed in reason:
                        values[LOG_COLUMNS.index("reason")] = ""
                    rewritten.append(tuple(values))
                connection.begin()
                for row in rows:
                    _do(connection, "DELETE FROM mail_log WHERE node = %s AND seq = %s", *row[:2])
                _insert(connection, rewritten)
                connection.commit()
                changed += len(rows)
    except pymysql.MySQLError as error:
        raise LogError(words(error)) from None
    return changed


def select(connection: Any, sql: str, values: Sequence[object]) -> Iterator[dict[str, Any]]:
    """The rows that SQL picks, as they come: there may be millions. Raises LogError."""
    try:
        with connection.cursor(pymysql.cursors.SSDictCursor) as cursor:
            cursor.execute(sql, tuple(values))
            yield from cursor.fetchall_unbuffered()
    except pymysql.MySQLError as error:
        raise LogError(words(error)) from None


def _one(connection: Any, sql: str, *values: object) -> Any:
    return _all(connection, sql, *values)[0][0]


def _close(connection: Any) -> None:
    try:
        connection.close()
    except (pymysql.MySQLError, OSError):
        pass
