"""Many vhosts' mail at once while MariaDB comes and goes, and old rows collected: the real commands and servers."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from host import Host, smtp, subject, text
from mariadb import PASSWORD, MariaDB
from servers import Message, Sink

from releaser.ledger import LOG_COLUMNS
from releaser.mysql_log import LOCK

pytestmark = pytest.mark.server

VHOST = "www.a.example"
VHOSTS = [f"www.v{number:02}.example" for number in range(20)]
EACH = 10
LIMIT = 7
SENDERS = 8
STAMP = r"\[[A-Z][a-z]{2} [A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \d{4}\]"


@pytest.fixture
def server() -> Iterator[MariaDB]:
    with MariaDB() as running:
        yield running


@pytest.fixture
def password(tmp_path: Path) -> Path:
    file = tmp_path / "password"
    file.write_text(PASSWORD + "\n")
    file.chmod(0o600)
    return file


def logging_to(server: MariaDB, password: Path, more: str = "") -> str:
    """The configuration's section [mysql], and more."""
    return f'[mysql]\nhost = "127.0.0.1"\nport = {server.port}\npassword_file = "{password}"\n{more}'


def make_tables(host: Host, password: Path) -> None:
    host.cli("log", "init", "--user", "creator", "--password-file", str(password))


@pytest.fixture
def logging(server: MariaDB, password: Path) -> Iterator[Host]:
    """An installation that logs to that server, tables made, with a vhost; the releaser is not started."""
    with Host(extra=logging_to(server, password)) as host:
        make_tables(host, password)
        host.add(VHOST)
        yield host


def rows_of(server: MariaDB) -> list[dict[str, object]]:
    """The rows in MariaDB, times as the command prints them."""
    found = [dict(zip(LOG_COLUMNS, row, strict=True)) for row in server.rows(", ".join(LOG_COLUMNS))]
    for row in found:
        for name in ("logged_at", "arrived_at"):
            row[name] = row[name].isoformat(timespec="microseconds") + "Z"
    return found


def per_vhost(messages: list[Message]) -> Counter[str]:
    """How many messages of each vhost there are, by the tag that the MTA has seen."""
    return Counter(message.data.partition(b"X-Domain: ")[2].partition(b"\n")[0].decode() for message in messages)


def collections(error_log: Path) -> list[str]:
    """The lines of an error log that tell of garbage collection."""
    return [line for line in error_log.read_text().splitlines() if "GC was run" in line] if error_log.exists() else []


def kill(server: MariaDB) -> None:
    server.signal(signal.SIGKILL)
    server.stop()


@pytest.mark.parametrize("end", [MariaDB.stop, kill], ids=["stopped", "killed"])
def test_outage_of_mysql_in_the_middle_of_many(
    server: MariaDB, sink: Sink, password: Path, end: Callable[[MariaDB], None]
) -> None:
    """200 mails of 20 vhosts, 8 at once: all are out or held, exactly, before MySQL is back, and then logged once."""
    with Host(mta=smtp(sink.port), default=[f"{LIMIT}/1h"], extra=logging_to(server, password)) as host:
        make_tables(host, password)
        host.add(*VHOSTS)

        def send(number: int) -> None:
            host.send(VHOSTS[number % len(VHOSTS)], message=text("one@x.example", subject=f"mail {number}"))

        count = EACH * len(VHOSTS)
        with host.running(), ThreadPoolExecutor(SENDERS) as pool:
            first = [pool.submit(send, number) for number in range(count // 2)]
            host.wait(lambda: server.rows("seq"), "the first rows are in MySQL")
            end(server)
            later = [pool.submit(send, number) for number in range(count // 2, count)]
            for job in (*first, *later):
                job.result()
            host.wait(lambda: len(host.rows()) == count, "every mail is sent or held")
            host.wait_until_idle()
            out = count // EACH * LIMIT
            # MySQL is still down.
            assert len(sink.wait(out)) == out
            assert host.json("status")["outbox"] >= count // 2
            server.start()
            host.wait(lambda: host.json("status")["outbox"] == 0, "the rows are shipped", timeout=70)
        assert per_vhost(sink.messages()) == dict.fromkeys(VHOSTS, LIMIT)
        assert len({subject(message.data) for message in sink.messages()}) == out
        logged = rows_of(server)
        assert logged == host.rows()
        assert [row["seq"] for row in logged] == list(range(1, count + 1))
        assert len({row["queue_id"] for row in logged}) == count
        outcomes = Counter((row["vhost"], row["event"]) for row in logged)
        assert outcomes == {(v, event): n for v in VHOSTS for event, n in (("released", LIMIT), ("held", EACH - LIMIT))}
        assert len(host.held()) == count - out
        assert {host.json("limits", "show", vhost)["windows"][0]["used"] for vhost in VHOSTS} == {LIMIT}


def test_releaser_collects_old_rows(server: MariaDB, password: Path) -> None:
    """At its start it deletes 1,000 rows older than retention, and says so; those of held mail stay, and mail goes on."""
    vhost = VHOSTS[0]
    limits = 'count = "messages"\n'
    with Host(default=["2/1h"]) as host:
        error_log = host.directory / "log/error.log"
        error_log.parent.mkdir(mode=0o700)
        section = logging_to(server, password, f'retention = "2h"\n[log]\nerror_log = "{error_log}"\n')
        host.configure(extra=limits + section)
        make_tables(host, password)
        host.add(vhost)
        with host.running():
            for count, rows in ((1000, 1000), (1, 1001), (1, 1002)):
                host.send(vhost, message=text(*(f"r{number}@x.example" for number in range(count))))
                host.wait(lambda rows=rows: len(server.rows("seq")) == rows, "the rows are in MySQL")
        assert collections(error_log) == []
        # The second mail's row is two minutes younger than the others.
        server.root("UPDATE mail_log SET logged_at = UTC_TIMESTAMP(6) - INTERVAL 121 MINUTE")
        server.root("UPDATE mail_log SET logged_at = UTC_TIMESTAMP(6) - INTERVAL 119 MINUTE WHERE seq = 1001")
        with host.running():
            (line,) = host.wait(lambda: collections(error_log), "the collection is told")
            assert server.rows("seq, event") == [(1001, "released"), (1002, "held")]
            host.send(vhost)
            host.wait(lambda: server.rows("seq, event")[2:] == [(1003, "held")], "the next one is logged")
        assert re.fullmatch(STAMP + r" \[secure-sendmail\] GC was run \(1000 rows older than 2 hours deleted\)", line)
        assert collections(error_log) == [line]


def test_process_that_ships_is_killed(logging: Host, server: MariaDB) -> None:
    """kill -9 of the process that ships: mail does not notice, and what is logged meanwhile arrives, once."""
    with logging.running():
        logging.send(VHOST, message=text("one@x.example"))
        logging.wait(lambda: len(rows_of(server)) == 1, "the row is in MySQL")
        (child,) = Path(f"/proc/{logging.pid}/task/{logging.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        logging.send(VHOST, message=text("two@x.example"))
        logging.wait_for_mail(2)
        # It is looked for every 30 seconds, and when the configuration is loaded.
        os.kill(logging.pid, signal.SIGHUP)
        logging.wait_for_log("ships the log to MySQL has ended")
        logging.wait(lambda: len(rows_of(server)) == 2, "both rows are in MySQL")
        logging.send(VHOST, message=text("three@x.example"))
        logging.wait(lambda: len(rows_of(server)) == 3, "all rows are in MySQL")
    assert [row["recipient"] for row in rows_of(server)] == ["one@x.example", "two@x.example", "three@x.example"]


def test_one_ships_at_a_time(logging: Host, server: MariaDB) -> None:
    """While another process, such as one of a daemon that was killed, still ships, no second one does; mail goes on."""
    with logging.running():
        logging.send(VHOST, message=text("one@x.example"))
        logging.wait(lambda: len(rows_of(server)) == 1, "the row is in MySQL")
    with open(logging.state / LOCK) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        logging.start()
        logging.send(VHOST, message=text("two@x.example"))
        logging.wait_for_mail(2)
        logging.wait_for_row("released")
        time.sleep(3)
        assert len(rows_of(server)) == 1
    logging.wait(lambda: len(rows_of(server)) == 2, "both rows are in MySQL")
    assert logging.stop() == 0
