"""What it costs when there are many: vhosts, held messages, rows in the ledger. The cost of a message must not grow with any."""

from __future__ import annotations

import os
import random
import re
import sqlite3
import subprocess
import time
from contextlib import closing
from pathlib import Path

from host import COMMAND, Host, smtp
from latency import took
from measure import Bench, cpu_of_group, percentile, resident_of_group, table
from release import MESSAGE, Counter
from spool import Template, add_vhosts

VHOSTS, HELD, HELD_IN_FULL = (10, 1_000, 10_000), (0, 100_000), (1_000_000,)
ROWS, ROWS_IN_FULL = (0, 500_000), (5_000_000,)
# Mails that are sent to be timed, one by one and at once; seconds that an idle releaser is watched.
ONE_BY_ONE, AT_ONCE, WATCHED = 40, 2_000, 10
PAGE = 20


def measure(bench: Bench) -> None:
    head = ["", "start s", "MB", "idle CPU %", "a mail ms", "p99 ms", "messages/s", "page s", "decided s"]
    rows = []
    for vhosts in VHOSTS:
        rows.append(_one(bench, f"{vhosts} vhosts", vhosts=vhosts))
    for held in HELD + (HELD_IN_FULL if bench.full else ()):
        rows.append(_one(bench, f"{held} held", held=held))
    for ledger in ROWS + (ROWS_IN_FULL if bench.full else ()):
        rows.append(_one(bench, f"{ledger} in the ledger", ledger=ledger))
    table(head, rows)


def _one(bench: Bench, name: str, vhosts: int = 10, held: int = 0, ledger: int = 0) -> list[str]:
    names = [f"www.v{number}.example" for number in range(vhosts)]
    many = f'hold_max_messages = {max(held, 1) * 2}\nhold_max_bytes = "1000G"\n'
    with Counter() as sink, Host(mta=smtp(sink.port), extra=many) as host:
        add_vhosts(host, names)
        some = [Template(host, vhost, MESSAGE) for vhost in random.sample(names, 10)]
        if held or ledger:
            _one_held(host, some[0])
            _multiply(host, held, ledger)
        began = time.perf_counter()
        host.launch()
        host.wait_for_log("started spool=", 600)
        start = time.perf_counter() - began
        host.wait(host.is_running, "the releaser is running")
        time.sleep(2)
        cpu = cpu_of_group(host.pid)
        time.sleep(WATCHED)
        idle = (cpu_of_group(host.pid) - cpu) / WATCHED * 100
        memory = resident_of_group(host.pid)
        milliseconds, rate = _mails(host, some, sink)
        page = _first_page(host)
        decided = _decide(host, held) if held else 0.0
        assert host.stop(120) == 0
    found = {
        "start, s": start, "MB": memory, "idle CPU, %": idle, "a mail, ms": percentile(milliseconds, 0.5),
        "a mail p99, ms": percentile(milliseconds, 0.99), "messages/s": rate, "first page, s": page, "all decided, s": decided,
    }  # fmt: skip
    for what, value in found.items():
        bench.note(f"scale: {name}: {what}", value)
    return [name, *(f"{value:.{digits}f}" for value, digits in zip(found.values(), (2, 0, 1, 1, 1, 0, 2, 1), strict=True))]


def _one_held(host: Host, template: Template) -> None:
    """One message that the releaser holds, by a limit that is taken back."""
    host.configure(default=["0/1h"])
    template.submit()
    assert host.releaser("--once").returncode == 0
    assert len(host.held()) == 1
    host.configure(default=["unlimited"])


def _multiply(host: Host, held: int, ledger: int) -> None:
    """Make of the one held message so many, and of its row so many that have ended, with a row each in the log."""
    (first,) = host.held()
    with closing(sqlite3.connect(host.state / "ledger.sqlite", isolation_level=None)) as book:
        columns = {table: [row[1] for row in book.execute(f"PRAGMA table_info({table})")] for table in ("message", "mail_log")}

        def copy(table: str, number: int, prefix: str, changed: dict[str, str]) -> None:
            own = {"queue_id": f"printf('{prefix}%011X', n)", **changed}
            names = [column for column in columns[table] if column != "seq"]
            book.execute(
                f"WITH RECURSIVE counted(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM counted WHERE n < {number}) "
                f"INSERT INTO {table} ({', '.join(names)}) SELECT {', '.join(own.get(name, name) for name in names)} "
                f"FROM counted, (SELECT * FROM {table} WHERE queue_id = ?)",
                (first,),
            )

        book.execute("BEGIN")
        for table in ("message", "mail_log"):
            if held > 1:
                copy(table, held - 1, "066000", {})
            if ledger:
                # Of a vhost that sends nothing more, spread over a week.
                at = "1790000000 + n % 604800" if table == "message" else "''"
                ended = {"state": "'done'", "counted_at": at, "vhost": "'www.old.example'", "maildrop": "'www.old.example'"}
                copy(table, ledger, "055000", ended)
        book.execute("COMMIT")
        ids = [row[0] for row in book.execute("SELECT queue_id FROM message WHERE state = 'held' AND queue_id <> ?", (first,))]
    data = (host.spool / "hold" / first).read_bytes()
    for queue_id in ids:
        Path(host.spool, "hold", queue_id).write_bytes(data.replace(first.encode(), queue_id.encode()))
    os.sync()


def _mails(host: Host, templates: list[Template], sink: Counter) -> tuple[list[float], float]:
    """Milliseconds that a mail takes by itself, and messages a second where there are many."""
    before = host.state / "ledger.sqlite"
    with closing(sqlite3.connect(before)) as book:
        (last,) = book.execute("SELECT coalesce(max(seq), 0) FROM mail_log").fetchone()
    for number in range(ONE_BY_ONE):
        templates[number % len(templates)].submit()
        time.sleep(0.05)
    host.wait(lambda: sink.count >= ONE_BY_ONE, "the mails are out", 60)
    began = time.perf_counter()
    for number in range(AT_ONCE):
        templates[number % len(templates)].submit(ring=number % 100 == 0)
    for template in templates:
        template.submit()
    wanted = ONE_BY_ONE + AT_ONCE + len(templates)
    while sink.count < wanted:
        assert time.perf_counter() - began < 120
        time.sleep(0.005)
    rate = (wanted - ONE_BY_ONE) / (time.perf_counter() - began)
    time.sleep(0.2)
    with closing(sqlite3.connect(before)) as book:
        found = book.execute(
            "SELECT logged_at, arrived_at FROM mail_log WHERE seq > ? AND event = 'released' ORDER BY seq LIMIT ?",
            (last, ONE_BY_ONE),
        )
        return [took(dict(zip(("logged_at", "arrived_at"), row, strict=True))) for row in found], rate


def _first_page(host: Host) -> float:
    """Seconds until `hold list` has printed as much as a terminal shows."""
    began = time.perf_counter()
    words = [COMMAND, "--config", host.config, "hold", "list"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        for _ in range(PAGE):
            process.stdout.readline()
        seconds = time.perf_counter() - began
        process.kill()
    return seconds


def _decide(host: Host, held: int) -> float:
    """Seconds to delete all that is held, until every file lies in trash/."""
    began = time.perf_counter()
    run = host.cli("hold", "delete", "--all", "--why", "bench", "--yes", timeout=3600)
    assert re.search(f"delete: {held} message", run.stdout), run.stdout[:500]
    host.wait(lambda: len(os.listdir(host.spool / "trash")) == held, "all are in trash/", 3600)
    return time.perf_counter() - began
