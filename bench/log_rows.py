"""Millions of rows in the log: what `trace` and `log` take, decisions beside a full ledger, and garbage collection.

In the long run 5,000,000 rows in MySQL and in the ledger, of which 1,000,000 are collected; else a twentieth of that.
"""

from __future__ import annotations

import sqlite3
import statistics
import threading
import time
from collections.abc import Callable, Sequence

from host import Host, smtp
from mariadb import MariaDB
from measure import Bench, percentile, spread, table
from release import MESSAGE, Counter, _until, log_section, logging_server, make_tables
from spool import submit
from test_mysql_dialect import version_1

from releaser import config, mysql_log
from releaser.collector import Collector
from releaser.door import Door
from releaser.ledger import LOG_COLUMNS, Ledger

ROWS, OLD = 5_000_000, 1_000_000
IN_SHORT = 20
# Rows that one statement makes.
CHUNK = 100_000
MESSAGES, VHOSTS = 4_000, [f"www.v{number}.example" for number in range(10)]
# Seconds between the single inserts whose times are taken, and the time that they are taken for without a collection.
BETWEEN, WITHOUT, WITHOUT_IN_FULL = 0.005, 20, 300
# Milliseconds that no insert may take longer for a collection.
BAR = 100
HELD_EVERY, FAILED_EVERY = 20, 1000
NODE = "00000000000000aa"

# A row of number n, the same in SQLite and MariaDB but for how text is put together: addresses, vhosts and ids as spread as in
# a busy week of a host with 1,000 vhosts. The oldest fifth is older than retention.
FACTS = {
    "node": f"'{NODE}'",
    "host": "'host.example'",
    "event": f"CASE WHEN n % {FAILED_EVERY} = 7 THEN 'failed' WHEN n % {HELD_EVERY} = 3 THEN 'held' ELSE 'released' END",
    "uid": "1000 + n % 1000",
    "verified": "1",
    "size": "2000 + n % 5000",
    "subject": "'Your order has been received, thank you'",
    "cwd": "'/var/www/html'",
    "reason": "''",
    "actor": "''",
}


def measure(bench: Bench) -> None:
    rows, old = (ROWS, OLD) if bench.full else (ROWS // IN_SHORT, OLD // IN_SHORT)
    _in_mysql(bench, rows, old)
    _in_ledger(bench, rows, old)


# MySQL.


def _in_mysql(bench: Bench, rows: int, old: int) -> None:
    with logging_server() as log, Host(extra=log_section(log)) as host:
        make_tables(host, log)
        host.add(VHOSTS[0])
        # Fewer keys, and so filled in minutes.
        version_1(log)
        began = time.perf_counter()
        for first in range(0, rows, CHUNK):
            log.root(_fill_mysql(first, min(CHUNK, rows - first), rows, old))
        size = "SELECT round((data_length + index_length) / 1e6) FROM information_schema.tables WHERE table_name = 'mail_log'"
        filled = time.perf_counter()
        host.cli("log", "migrate", "--user", "creator", "--password-file", str(log.directory / "creator.password"), timeout=3600)
        migrated = time.perf_counter() - filled
        log.root("ANALYZE TABLE mail_log")
        print(
            f"  MySQL: {rows} rows in {filled - began:.0f} s, log migrate {migrated:.0f} s, {log.root(size)[0][0]} MB\n",
            flush=True,
        )
        _ask(bench, host, "MySQL", rows)
        _collect_mysql(bench, host, log, old)


def _fill_mysql(first: int, count: int, rows: int, old: int) -> str:
    # The shares are those of time: what is old was logged between 300 and 200 hours ago, the rest in the last 100.
    age = f"CASE WHEN n < {old} THEN 300 - 100 * n / {old} ELSE 100 - 100 * (n - {old}) / {rows - old} END"
    facts = FACTS | {
        "seq": "n + 1",
        "logged_at": f"UTC_TIMESTAMP(6) - INTERVAL ROUND(3600 * ({age})) SECOND",
        "arrived_at": "UTC_TIMESTAMP(6) - INTERVAL 1 HOUR",
        "queue_id": "LPAD(HEX(n), 17, '0')",
        "message_id": "CONCAT('<', MD5(n), '@www.v', n % 1000, '.example>')",
        "vhost": "CONCAT('www.v', n % 1000, '.example')",
        "sender": "CONCAT('User', n % 3000, '@v', n % 1000, '.example')",
        "recipient": "CONCAT(SUBSTR(MD5(n * 7 % 1500000), 1, 10), '@d', n * 7 % 20000, '.Example')",
        "script": "CONCAT('/var/www/v', n % 1000, '/send.php')",
        "mta_queue_id": "UPPER(SUBSTR(MD5(n + 0.5), 1, 11))",
    }
    values = ", ".join(facts[name] for name in LOG_COLUMNS)
    columns = ", ".join(LOG_COLUMNS)
    return (
        f"INSERT INTO mail_log ({columns}) SELECT {values} FROM (SELECT seq + {first} AS n FROM seq_0_to_{count - 1}) AS numbers"
    )


def _ask(bench: Bench, host: Host, source: str, rows: int) -> None:
    """Whole commands, interpreter and all, as a person waits for them."""
    number = rows // 2 + 1
    facts = {
        key: _fact(host, source, number, key)
        for key in ("queue_id", "message_id", "mta_queue_id", "recipient", "sender", "vhost")
    }
    asked: list[tuple[str, Sequence[str]]] = [
        ("trace ADDRESS", ["trace", facts["recipient"]]),
        ("trace an address that is nowhere", ["trace", "nobody@nowhere.example"]),
        ("trace QUEUE-ID", ["trace", facts["queue_id"]]),
        ("trace MESSAGE-ID", ["trace", facts["message_id"]]),
        ("trace the MTA's id", ["trace", facts["mta_queue_id"]]),
        ("log, the last page", ["log"]),
        ("log --page 50", ["log", "--page", "50"]),
        ("log --vhost V", ["log", "--vhost", facts["vhost"]]),
        ("log --recipient ADDRESS", ["log", "--recipient", facts["recipient"]]),
        ("log --sender ADDRESS", ["log", "--sender", facts["sender"]]),
        ("log --event failed", ["log", "--event", "failed"]),
        ("log --event deleted, of which there is none", ["log", "--event", "deleted"]),
        ("log --vhost V --event failed --since 2d", ["log", "--vhost", facts["vhost"], "--event", "failed", "--since", "2d"]),
        ("log --sender '*@DOMAIN' --since 1h", ["log", "--sender", "*@v5.example", "--since", "1h"]),
        ("log --sender '*@nowhere', all the time", ["log", "--sender", "*@nowhere.example"]),
        ("log --reason TEXT, all the time", ["log", "--reason", "no such text"]),
        ("top", ["top"]),
    ]
    lines = []
    for what, words in asked:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            host.cli(*words, "--source", source.lower(), check=False, timeout=300)
            times.append(time.perf_counter() - began)
        bench.note(f"log_rows: {source}, {what}, s", statistics.median(times))
        lines.append([what, f"{statistics.median(times):.2f}"])
    table([f"{source}, {rows} rows", "seconds"], lines)


def _fact(host: Host, source: str, number: int, column: str) -> str:
    rows = host.json("log", "--source", source.lower(), "--last", "1", f"{number:017X}")
    return str(rows[0][column])


def _collect_mysql(bench: Bench, host: Host, log: MariaDB, old: int) -> None:
    """One row inserted each few milliseconds, before and while our own collection deletes the old ones."""
    settings = config.load(str(host.config)).mysql
    assert settings is not None
    book = Ledger(str(host.state), create=True)
    collecting, deleted = mysql_log.connect(settings), 0
    (oldest,) = log.root("SELECT UTC_TIMESTAMP(6) - INTERVAL 150 HOUR")[0]
    before = oldest.isoformat(timespec="microseconds") + "Z"
    done = threading.Event()
    # The disk is slow now and then without any collection, too, which only a long look shows.
    without = WITHOUT_IN_FULL if bench.full else WITHOUT
    calm = _insert_until(settings, lambda began: time.perf_counter() - began > without)

    def collect() -> None:
        nonlocal deleted
        own = Ledger(str(host.state))
        deleted = sum(mysql_log.delete(own, collecting, NODE, before))
        own.close()
        done.set()

    began = time.perf_counter()
    threading.Thread(target=collect, daemon=True).start()
    busy = _insert_until(settings, lambda _: done.is_set())
    took = time.perf_counter() - began
    assert deleted == old, deleted
    book.close()
    _say_inserts(bench, f"MySQL, {deleted} rows collected in {took:.0f} s", calm, busy)


def _insert_until(settings: config.Mysql, over: Callable[[float], bool]) -> list[float]:
    """Milliseconds of single inserts, one at a time."""
    connection = mysql_log.connect(settings)
    with connection.cursor() as cursor:
        cursor.execute("SELECT MAX(seq) FROM mail_log WHERE node = 'bench'")
        found = cursor.fetchone()
        number = int((found[0] if found else 0) or 0)
        values = ["bench", 0, "host.example", "2026-01-01", None, "released", "", "", "", 1, 1, "", "", 1, "", "", "", "", "", ""]
        sql = f"INSERT INTO mail_log ({', '.join(LOG_COLUMNS)}) VALUES ({', '.join(['%s'] * len(LOG_COLUMNS))})"
        times, began = [], time.perf_counter()
        while not over(began):
            number += 1
            values[1], values[6] = number, f"{number:017X}"
            start = time.perf_counter()
            cursor.execute(sql, values)
            times.append((time.perf_counter() - start) * 1000)
            time.sleep(BETWEEN)
    connection.close()
    return times


def _say_inserts(bench: Bench, what: str, calm: list[float], busy: list[float]) -> None:
    rows = []
    for name, times in (("before", calm), ("meanwhile", busy)):
        slow = str(sum(1 for each in times if each > BAR))
        rows.append([name, str(len(times)), spread(times).text(), f"{percentile(times, 0.999):.1f}", f"{max(times):.1f}", slow])
        bench.note(f"log_rows: {what.partition(',')[0]}, slowest insert {name}, ms", max(times))
    table([what, "inserts", "ms, median (5..95 %)", "99.9 %", "slowest", f"above {BAR}"], rows)


# The ledger.


def _in_ledger(bench: Bench, rows: int, old: int) -> None:
    with Host() as full, Host() as empty:
        for host in (full, empty):
            host.add(*VHOSTS)
        Ledger(str(full.state), create=True).close()
        began = time.perf_counter()
        _fill_ledger(full, rows, old)
        size = sum(file.stat().st_size for file in full.state.iterdir()) / 1e6
        print(
            f"  ledger: {rows} rows of the log and {rows} messages in {time.perf_counter() - began:.0f} s, {size:.0f} MB\n",
            flush=True,
        )
        _ask(bench, full, "ledger", rows)
        _collect_ledger(bench, full, old)
        _decide(bench, full, empty)


def _fill_ledger(host: Host, rows: int, old: int) -> None:
    """The same rows, and as many messages that have ended."""
    now = int(time.time())
    age = f"CASE WHEN n < {old} THEN 300 - 100.0 * n / {old} ELSE 100 - 100.0 * (n - {old}) / {rows - old} END"
    iso = f"strftime('%Y-%m-%dT%H:%M:%S', {now} - 3600 * ({age}), 'unixepoch') || '.000000Z'"
    mixed = "printf('%08x', (n * 2654435761) % 4294967296)"
    facts = FACTS | {
        "logged_at": iso,
        "arrived_at": iso,
        "queue_id": "printf('%017X', n)",
        "message_id": f"'<' || {mixed} || '@www.v' || (n % 1000) || '.example>'",
        "vhost": "'www.v' || (n % 1000) || '.example'",
        "sender": "'User' || (n % 3000) || '@v' || (n % 1000) || '.example'",
        "recipient": "printf('%08x', (n * 7 % 1500000 * 2654435761) % 4294967296) || '@d' || (n * 7 % 20000) || '.Example'",
        "script": "'/var/www/v' || (n % 1000) || '/send.php'",
        "mta_queue_id": f"upper({mixed})",
    }
    columns = [name for name in LOG_COLUMNS if name != "seq"]
    message = {
        name: facts[name] for name in ("queue_id", "vhost", "sender", "uid", "verified", "message_id", "subject", "script")
    }
    message |= {name: "''" for name in ("digest", "cwd", "reason")} | {name: iso for name in ("arrived_at", "picked_up_at")}
    message |= {"maildrop": facts["vhost"], "state": "'done'", "counted_at": f"{now} - 3600 * ({age})", "recipients": "1"}
    message |= {"remaining": "'[]'", "size": "2000"}
    with sqlite3.connect(host.state / "ledger.sqlite", isolation_level=None) as book:
        book.execute("PRAGMA synchronous = OFF")
        for first in range(0, rows, CHUNK):
            last = min(first + CHUNK, rows) - 1
            numbers = f"WITH RECURSIVE numbers (n) AS (SELECT {first} UNION ALL SELECT n + 1 FROM numbers WHERE n < {last})"
            values = ", ".join(facts[name] for name in columns)
            book.execute(f"{numbers} INSERT INTO mail_log ({', '.join(columns)}) SELECT {values} FROM numbers")
            book.execute(
                f"{numbers} INSERT INTO message ({', '.join(message)}) SELECT {', '.join(message.values())} FROM numbers"
            )
        book.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _decide(bench: Bench, full: Host, empty: Host) -> None:
    """The same messages through each, in turn; start and collection left out."""
    found: dict[str, list[float]] = {"empty": [], "full": []}
    for _ in range(7 if bench.full else 3):
        for name, host in (("empty", empty), ("full", full)):
            for vhost in VHOSTS:
                submit(host, vhost, MESSAGES // len(VHOSTS), MESSAGE)
            with Counter() as sink:
                host.configure(mta=smtp(sink.port))
                host.launch()
                found[name].append(_until(sink, MESSAGES, host.pid).rate)
                host.stop()
    ratios = spread([full / empty for full, empty in zip(found["full"], found["empty"], strict=True)])
    bench.note("log_rows: messages/s with a full ledger, times those with an empty one", ratios.median)
    rows = [[f"ledger {name}", spread(rates).text(".0f")] for name, rates in found.items()]
    table(["", "messages/s, median (5..95 %)"], [*rows, ["full / empty, pair by pair", ratios.text()]])


def _collect_ledger(bench: Bench, host: Host, old: int) -> None:
    """Steps of the collection, and what a row costs that is written between them, as the engine writes it."""
    settings = config.load(str(host.config))
    book = Ledger(str(host.state), create=True)
    collector = Collector(settings, book, Door(settings, book))
    row = book.rows("queue_id = ?", f"{1:017X}")[0]

    def write(number: int) -> float:
        start = time.perf_counter()
        with book.transaction():
            book.log("released", row, time.time(), [(f"r{number}@x.example", "", "")])
        return (time.perf_counter() - start) * 1000

    calm = [write(number) for number in range(2000)]
    busy, steps, began = [], [], time.perf_counter()
    while not steps or collector.busy:
        start = time.perf_counter()
        collector.next = 0
        collector.step()
        steps.append((time.perf_counter() - start) * 1000)
        busy.append(steps[-1] + write(len(steps)))
    took = time.perf_counter() - began
    assert not list(book.select("SELECT 1 FROM mail_log WHERE seq <= ? LIMIT 1", [old]))
    book.close()
    _say_inserts(bench, f"ledger, {old} rows and messages collected in {took:.0f} s without a rest", calm, busy)
