"""The log of record: rows of the ledger shipped to MySQL in order, exactly once, by a thread that mail never waits for.

The only module that imports PyMySQL. MySQL being down, slow, read-only or full never touches mail: rows wait in the
ledger, and one line a minute says how many.
"""

import os
import re
import ssl
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pymysql
import pymysql.cursors

from releaser import errorlog, maillog
from releaser.config import Mysql
from releaser.ledger import LOG_COLUMNS, Ledger, utc
from releaser.maillog import LOG

SCHEMA_VERSION = 1
# Rows in one INSERT at most, and the share of max_allowed_packet that its text may take.
BATCH_ROWS = 500
PACKET_SHARE = 4
# Seconds: to connect, for a reply, between looks for new rows, between tries while it is down, between collections.
CONNECT_TIMEOUT, REPLY_TIMEOUT, POLL, BACKOFF, COLLECTION = 5, 30, 1, (1, 60), 3600
# Seconds between two lines that say MySQL is down.
COMPLAINT = 60
# Rows that garbage collection deletes in one statement, and the seconds it rests behind each.
COLLECTED_ROWS, COLLECTION_REST = 1000, 0.05

# MySQL's errors for a row's content, in server/errmsg order: null, out of range, wrong value, too long, bad string.
CONTENT_ERRORS = frozenset((1048, 1264, 1292, 1366, 1406))

# Characters that the columns of config/schema.sql hold.
WIDTHS = {
    "host": 255, "event": 16, "queue_id": 32, "message_id": 255, "vhost": 255, "sender": 320, "recipient": 320,
    "subject": 255, "script": 1000, "cwd": 1000, "reason": 1000, "mta_queue_id": 255, "actor": 255,
}  # fmt: skip

_TIME = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2})T([0-9:]{8}\.[0-9]{6})Z\Z")


class LogError(Exception):
    """MySQL cannot be used as it is set up; the text says why."""


def connect(server: Mysql) -> "pymysql.connections.Connection[Any]":
    """A session in UTC that commits each statement. Raises LogError."""
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
            read_timeout=REPLY_TIMEOUT,
            write_timeout=REPLY_TIMEOUT,
            autocommit=True,
            # A certificate of the server's own making is only believed where its authority is configured.
            ssl=ssl.create_default_context(cafile=server.tls_ca) if server.tls_ca else None,
            ssl_disabled=server.tls_ca is None,
            init_command="SET time_zone = '+00:00', sql_mode = 'STRICT_ALL_TABLES'",
        )
    except LogError:
        raise
    except Exception as error:
        # PyMySQL raises RuntimeError too, where an authentication method needs a package that is not there.
        raise LogError(words(error)) from None


def statements(schema: str) -> list[str]:
    """The statements of config/schema.sql."""
    without_comments = re.sub(r"^\s*--.*$", "", schema, flags=re.MULTILINE)
    return [text.strip() for text in without_comments.split(";") if text.strip()]


def initialise(server: Mysql, schema: str) -> None:
    """Run SCHEMA in the log's database. Raises LogError."""
    connection = connect(server)
    try:
        for statement in statements(schema):
            _do(connection, statement)
    except pymysql.MySQLError as error:
        raise LogError(words(error)) from None
    finally:
        _close(connection)


def words(error: BaseException) -> str:
    """What MySQL, or the way to it, said."""
    if isinstance(error, pymysql.MySQLError) and len(error.args) == 2:
        # Its own words have the system's in them as Python writes these.
        return f"{re.sub(r'.Errno [0-9]+. ', '', str(error.args[1]))} ({error.args[0]})"
    return str(error) or type(error).__name__


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


class Shipper:
    """A thread that ships what the ledger's log has, and collects what is older than retention."""

    def __init__(self, server: Mysql, state: str, error_log: str | None, spool: str) -> None:
        self._server = server
        self._state = state
        self._error_log = error_log
        self._not_inside = (spool, state)
        self._wake = threading.Event()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="mysql-log", daemon=True)
        self._thread.start()

    def stop(self, patience: float) -> None:
        """Ship what is there if MySQL takes it, for at most PATIENCE seconds, and end."""
        self._ending = True
        self._wake.set()
        self._thread.join(patience)

    def _run(self) -> None:
        book = Ledger(self._state)
        connection: Any = None
        backoff, complained, collected = 0.0, 0.0, 0.0
        while True:
            ending = self._ending
            try:
                if connection is None:
                    connection = connect(self._server)
                    self._settle(book, connection)
                    packet = _one(connection, "SELECT @@max_allowed_packet")
                while self._ship(book, connection, int(packet)):
                    pass
                if backoff:
                    LOG.warning(maillog.log_is_back())
                backoff = 0
                if not collected or time.monotonic() - collected >= COLLECTION:
                    collected = time.monotonic()
                    collect(book, connection, self._server.retention, self._error_log, self._not_inside)
            except Exception as error:
                # Whatever it is, the rows are safe in the ledger, and mail does not wait.
                if connection is not None:
                    _close(connection)
                    connection = None
                first, most = BACKOFF
                backoff = min(max(backoff * 2, first), most)
                if time.monotonic() - complained >= COMPLAINT or not complained:
                    complained = time.monotonic()
                    LOG.error(maillog.log_is_down(words(error), book.outbox()))
            if ending:
                break
            self._wake.wait(backoff or POLL)
            self._wake.clear()
        if connection is not None:
            _close(connection)
        book.close()

    def _settle(self, book: Ledger, connection: Any) -> None:
        """Where an INSERT's answer was lost, MySQL knows whether it happened: rows go in order, so its last one tells."""
        version = _one(connection, "SELECT MAX(version) FROM mail_log_schema")
        if version != SCHEMA_VERSION:
            raise LogError(f"schema version {version}, this program needs {SCHEMA_VERSION}; run: secure-sendmail log init")
        there = _one(connection, "SELECT MAX(seq) FROM mail_log WHERE node = %s", book.node)
        if there is not None and int(there) > book.shipped():
            book.set_shipped(int(there))

    def _ship(self, book: Ledger, connection: Any, packet: int) -> bool:
        """Ship one batch; return whether there may be more."""
        rows = book.unshipped(BATCH_ROWS)
        batch: list[tuple[object, ...]] = []
        room = packet // PACKET_SHARE
        for row in rows:
            values = row_values(row)
            room -= sum(4 * len(value) if isinstance(value, str) else 20 for value in values) + 100
            if batch and room < 0:
                break
            batch.append(values)
        if not batch:
            return False
        try:
            _insert(connection, batch)
        except pymysql.MySQLError as error:
            if not error.args or error.args[0] not in CONTENT_ERRORS:
                raise
            # One row that MySQL refuses for its content must not stop the rest: each on its own, the bad ones bare.
            self._one_by_one(connection, batch)
        book.set_shipped(int(str(batch[-1][LOG_COLUMNS.index("seq")])))
        return len(batch) < len(rows) or len(rows) == BATCH_ROWS

    def _one_by_one(self, connection: Any, batch: list[tuple[object, ...]]) -> None:
        connection.begin()
        for values in batch:
            try:
                _insert(connection, [values])
            except pymysql.MySQLError as error:
                if not error.args or error.args[0] not in CONTENT_ERRORS:
                    raise
                LOG.error(maillog.log_row_bare(str(values[LOG_COLUMNS.index("seq")]), words(error)))
                _insert(connection, [_bare(values)])
        connection.commit()


def collect(book: Ledger, connection: Any, retention: int, error_log: str | None, not_inside: tuple[str, ...]) -> None:
    """Delete our rows older than RETENTION seconds, in small batches, those of mail that still lies here excepted."""
    before = utc(time.time() - retention)
    deleted, position = 0, ("1970-01-01", 0)
    while True:
        found = _all(
            connection,
            "SELECT seq, queue_id, logged_at FROM mail_log WHERE node = %s AND logged_at < %s "
            "AND (logged_at > %s OR logged_at = %s AND seq > %s) ORDER BY logged_at, seq LIMIT %s",
            book.node, _sql_time(before), position[0], position[0], position[1], COLLECTED_ROWS,
        )  # fmt: skip
        if not found:
            break
        position = (str(found[-1][2]), int(found[-1][0]))
        kept = book.unfinished([row[1] for row in found])
        old = [int(row[0]) for row in found if row[1] not in kept]
        if old:
            places = ", ".join(["%s"] * len(old))
            deleted += _do(connection, f"DELETE FROM mail_log WHERE node = %s AND seq IN ({places})", book.node, *old)
            time.sleep(COLLECTION_REST)
    book.collect(before)
    if deleted:
        line = errorlog.collected(time.time(), deleted, retention)
        LOG.info(line)
        if error_log:
            try:
                errorlog.append(error_log, line, not_inside)
            except errorlog.NotWritten as error:
                LOG.error(maillog.error_log_not_written(str(error)))


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
            sql = f"SELECT {', '.join(LOG_COLUMNS)} FROM mail_log WHERE lower({name}) = %s OR {name} = %s LIMIT %s"
            while rows := _all(connection, sql, address.lower(), hashed, BATCH_ROWS):
                rewritten = []
                for row in rows:
                    values = list(row)
                    values[column], values[LOG_COLUMNS.index("subject")] = forgotten, ""
                    if address.lower() in values[LOG_COLUMNS.index("reason")].lower():
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
