"""The log as people ask for it: out of MySQL, the log of record, or out of this host's ledger.

Both are asked the same SQL, with ? for each value; it uses nothing that SQLite, MySQL and MariaDB do not share.
"""

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, Protocol

from releaser import mysql_log
from releaser.config import Mysql
from releaser.ledger import LOG_COLUMNS, Ledger, utc
from releaser.privacy import FORGOTTEN

# Seconds that MySQL may take for what a person asks.
PATIENCE = 600
# What tells of mail that someone has sent, among the events of the log.
OF_MAIL = ("released", "held", "deferred", "failed", "unknown")


class Source(Protocol):
    """Where the rows come from."""

    # In words.
    name: str
    # The order of its rows, oldest first, as SQL.
    order: tuple[str, ...]
    # The domain of a recipient, in lower case, as SQL.
    domain: str

    def lower(self, column: str) -> str:
        """What COLUMN has, in lower case, as SQL."""

    def time(self, stamp: float) -> str:
        """STAMP, in seconds since 1970, as logged_at is compared with."""

    def select(self, sql: str, values: Sequence[object]) -> Iterator[dict[str, Any]]:
        """The rows that SQL picks, one by one; times are ISO 8601 in UTC. Raises LogError, sqlite3.Error."""


class InLedger:
    """The log of this host, as long as the ledger keeps it."""

    name = "the ledger of this host"
    order: tuple[str, ...] = ("seq",)
    # What is behind the last @: the end without it is what rtrim takes away.
    domain = "lower(substr(recipient, length(rtrim(recipient, replace(recipient, '@', ''))) + 1))"

    def __init__(self, book: Ledger) -> None:
        self._book = book

    def lower(self, column: str) -> str:
        return f"lower({column})"

    def time(self, stamp: float) -> str:
        return utc(stamp)

    def select(self, sql: str, values: Sequence[object]) -> Iterator[dict[str, Any]]:
        return self._book.select(sql, values)


class InMysql:
    """The log of all hosts that write into one table."""

    order: tuple[str, ...] = ("logged_at", "node", "seq")
    domain = "lower(substring_index(recipient, '@', -1))"

    def __init__(self, server: Mysql) -> None:
        """Raises LogError."""
        self.name = f"MySQL ({server.unix_socket or server.host})"
        self._connection = mysql_log.connect(server, PATIENCE)

    def lower(self, column: str) -> str:
        return f"{column}_lower" if column in ("sender", "recipient") else f"lower({column})"

    def time(self, stamp: float) -> str:
        return utc(stamp).replace("T", " ").removesuffix("Z")

    def forget(self, address: str, hashed: str) -> int:
        """Forget who ADDRESS is; return the number of rows. Raises LogError."""
        return mysql_log.forget(self._connection, address, hashed, FORGOTTEN)

    def select(self, sql: str, values: Sequence[object]) -> Iterator[dict[str, Any]]:
        for found in mysql_log.select(self._connection, sql.replace("?", "%s"), values):
            yield {name: _plain(value) for name, value in found.items()}


def _plain(value: object) -> object:
    return value.isoformat(timespec="microseconds") + "Z" if isinstance(value, datetime) else value


def newest(source: Source, where: str, values: Sequence[object], most: int, skip: int = 0) -> list[dict[str, Any]]:
    """MOST rows that the condition WHERE picks, behind the SKIP newest of them; oldest first."""
    order = ", ".join(f"{column} DESC" for column in source.order)
    sql = f"SELECT {', '.join(LOG_COLUMNS)} FROM mail_log WHERE {where} ORDER BY {order} LIMIT ? OFFSET ?"
    return list(source.select(sql, [*values, most, skip]))[::-1]


def everything(source: Source, where: str, values: Sequence[object]) -> Iterator[dict[str, Any]]:
    """All rows that the condition WHERE picks, oldest first."""
    sql = f"SELECT {', '.join(LOG_COLUMNS)} FROM mail_log WHERE {where} ORDER BY {', '.join(source.order)}"
    return source.select(sql, values)


def top(source: Source, by: str, where: str, values: Sequence[object], most: int) -> list[dict[str, Any]]:
    """The MOST busy of what BY names, a column or "domain", among the rows that the condition WHERE picks.

    Each: name, messages, and the recipients that were released, held and failed.
    """
    name = source.domain if by == "domain" else by
    counts = ", ".join(
        f"sum(CASE WHEN event = '{event}' THEN 1 ELSE 0 END) AS {event}" for event in ("released", "held", "failed")
    )
    events = ", ".join(f"'{event}'" for event in OF_MAIL)
    sql = (
        f"SELECT {name} AS name, count(DISTINCT queue_id) AS messages, {counts} FROM mail_log "
        f"WHERE {where} AND event IN ({events}) GROUP BY {name} ORDER BY messages DESC, name LIMIT ?"
    )
    return [
        {key: value if key == "name" else int(value) for key, value in found.items()}
        for found in source.select(sql, [*values, most])
    ]


def like(text: str, inside: bool = False) -> str:
    """TEXT, in which * and ? match anything, as a pattern for LIKE ... ESCAPE '!', in lower case."""
    pattern = re.sub(r"[!%_]", r"!\g<0>", text.lower()).replace("*", "%").replace("?", "_")
    return f"%{pattern}%" if inside else pattern
