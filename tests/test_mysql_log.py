"""The log in a real MariaDB: every row once, in order, whatever MySQL does meanwhile, and mail that never waits for it."""

import datetime
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import ENDED, EXIT, KILL, Forks
from host import Host
from mariadb import PASSWORD, MariaDB
from test_contract_crash import Site

from releaser import config, mysql_log
from releaser.ledger import LOG_COLUMNS, Ledger

pytestmark = pytest.mark.server

VHOST = "www.a.example"


@pytest.fixture(scope="module")
def server() -> Iterator[MariaDB]:
    with MariaDB() as running:
        yield running


@pytest.fixture
def host(server: MariaDB, tmp_path: Path) -> Iterator[Host]:
    """An installation that logs to an empty MariaDB with the tables made."""
    server.root("DROP TABLE IF EXISTS mail_log, mail_log_schema")
    with logging_to(server, tmp_path) as made:
        made.cli("log", "init", "--user", "creator", "--password-file", str(tmp_path / "password"))
        yield made


def logging_to(server: MariaDB, tmp_path: Path, more: str = "", default: list[str] | None = None) -> Host:
    password = tmp_path / "password"
    password.write_text(PASSWORD + "\n")
    password.chmod(0o600)
    section = f'[mysql]\nhost = "127.0.0.1"\nport = {server.port}\npassword_file = "{password}"\n{more}'
    made = Host(default=default or ["2/1h"], extra=section)
    return made


def shipped(host: Host, server: MariaDB) -> None:
    """Wait until the outbox is empty."""
    host.wait(lambda: host.json("status")["outbox"] == 0 and host.json("status")["queued"] == 0, "all rows are shipped")


def test_rows_are_those_of_the_ledger(host: Host, server: MariaDB) -> None:
    """Column by column, for a mail to three recipients, one held and released by hand, one deleted."""
    host.add(VHOST)
    with host.running():
        for to in ("a@x.example", "b@x.example", "c@x.example, d@x.example"):
            host.send(VHOST, "s@a.example", message=f"To: {to}\nSubject: Gr\u00fc\u00dfe \U0001f600\n\ntext\n".encode())
        host.wait(lambda: len(host.held()) == 1, "one is held")
        host.cli("hold", "release", host.held()[0], "--why", "known customer")
        shipped(host, server)
    ledger = host.json("log")
    found = [dict(zip(LOG_COLUMNS, row, strict=True)) for row in server.rows(", ".join(LOG_COLUMNS))]
    for row in found:
        for name in ("logged_at", "arrived_at"):
            row[name] = row[name].isoformat(timespec="microseconds") + "Z"
    assert found == ledger
    assert [row["event"] for row in found] == ["released"] * 2 + ["held"] * 2 + ["released"] * 2
    assert {row["actor"] for row in found[-2:]} != {""}


def test_init_is_safe_to_run_again_and_says_what_is_refused(host: Host, server: MariaDB, tmp_path: Path) -> None:
    """A second run changes nothing; without the right to create it exits 1 and prints the SQL; --print only prints."""
    before = server.root("SHOW CREATE TABLE mail_log")
    host.cli("log", "init", "--user", "creator", "--password-file", str(tmp_path / "password"))
    assert server.root("SHOW CREATE TABLE mail_log") == before
    assert server.root("SELECT version FROM mail_log_schema") == [(2,)]
    refused = host.cli("log", "init", check=False)
    schema = (Path(__file__).parent.parent / "config/schema.sql").read_text()
    assert refused.returncode == 1 and refused.stdout == schema and "denied" in refused.stderr
    assert host.cli("log", "init", "--print").stdout == schema


def test_stopped_and_started_again(host: Host, server: MariaDB) -> None:
    """While MySQL is down mail goes out, rows wait and one line says how many; then each arrives once, in order."""
    host.add(VHOST, "www.b.example")
    with host.running():
        host.send(VHOST)
        shipped(host, server)
        server.stop()
        for number in range(10):
            host.send("www.b.example" if number % 2 else VHOST)
        host.wait(lambda: len(host.json("log")) == 11, "all are sent or held without MySQL")
        host.wait(lambda: "rows_waiting=" in host.log(), "the log says that rows wait")
        assert host.json("status")["outbox"] == 10
        server.start()
        host.wait(lambda: host.json("status")["outbox"] == 0, "the rows are shipped", timeout=60)
        assert len(re.findall("MySQL does not take the log", host.log())) == 1
    assert [row[0] for row in server.rows("seq")] == list(range(1, 12))


def test_frozen_server_delays_no_mail(host: Host, server: MariaDB) -> None:
    """A MySQL that answers nothing holds up nothing; when it goes on, no row is there twice."""
    host.add(VHOST)
    with host.running():
        server.signal(signal.SIGSTOP)
        try:
            host.send(VHOST)
            host.wait(lambda: [row["event"] for row in host.json("log")] == ["released"], "mail is sent")
        finally:
            server.signal(signal.SIGCONT)
        shipped(host, server)
    assert [row[0] for row in server.rows("seq")] == [1]


def test_killed_between_insert_and_note(host: Host, server: MariaDB) -> None:
    """Rows that MySQL has, but the ledger does not know of, are not shipped again."""
    host.add(VHOST)
    with host.running():
        host.send(VHOST)
        shipped(host, server)
    ledger = Ledger(str(host.state))
    ledger._set_meta("shipped", "0")
    ledger.close()
    with host.running():
        host.send(VHOST)
        host.wait(lambda: len(host.json("log")) == 2, "the second is logged")
        shipped(host, server)
    assert [row[0] for row in server.rows("seq")] == [1, 2]


def test_once_ships_the_log(host: Host, server: MariaDB) -> None:
    """--once ends with the rows in MySQL."""
    host.add(VHOST)
    host.send(VHOST)
    assert host.releaser("--once").returncode == 0
    assert [row[0] for row in server.rows("event")] == ["released"]


def test_hostile_text_is_shipped(host: Host, server: MariaDB) -> None:
    """Bytes that are no UTF-8, NUL, overlong text and a time that is none make no row that stops the others."""
    host.add(VHOST)
    with host.running():
        subject = b"\xff\xfe=?utf-8?b?AAAA?= " + b"\xf0\x9f\x98\x80" * 2000
        script = b"X-PHP-Originating-Script: " + b"\xff" * 3000
        host.send(VHOST, message=b"To: a@x.example\nSubject: " + subject + b"\n" + script + b"\n\ntext\n")
        host.send(VHOST, message=b"To: a@x.example\nSubject: next\n\ntext\n")
        host.wait(lambda: len(host.json("log")) == 2, "both are logged")
        shipped(host, server)
    assert [row[0] for row in server.rows("seq")] == [1, 2]


def test_hostile_origin_is_text(host: Host, server: MariaDB, tmp_path: Path) -> None:
    """Page, header and directory of a hostile caller are in MySQL what they are in the ledger: text that can be shown."""
    hostile = b"/x'; DROP TABLE mail_log; -- \\\x1b[31m\xff\xe2\x80\xae[b]\x9b\n%s"
    directory = os.fsencode(tmp_path) + hostile
    os.mkdir(directory)
    host.add(VHOST)
    script = b"X-PHP-Originating-Script: 33:" + hostile.replace(b"\n", b"\n ") + b"\n"
    message = script + b"To: a@x.example\n\ntext\n"
    assert host.enqueue(VHOST, "-t", message=message, env={b"SCRIPT_FILENAME": hostile}, cwd=directory).returncode == 0
    assert host.releaser("--once").returncode == 0
    (logged,) = host.json("log")
    assert server.rows("script, cwd") == [(logged["script"], logged["cwd"])]
    for text in (logged["script"], logged["cwd"]):
        assert "DROP TABLE" in text and text.isprintable()


def test_password_that_others_can_read_is_refused(host: Host, server: MariaDB, tmp_path: Path) -> None:
    """The sentence names the file, its mode and what to run; mail goes on."""
    (tmp_path / "password").chmod(0o644)
    host.add(VHOST)
    with host.running():
        host.send(VHOST)
        host.wait(lambda: "readable by others" in host.log(), "it is said")
        host.wait(lambda: len(host.json("log")) == 1, "mail goes on")
    assert f"chmod 0600 {tmp_path}/password" in host.log()
    assert PASSWORD not in host.log()
    assert server.rows() == []


def test_tables_without_a_version_are_refused(host: Host, server: MariaDB) -> None:
    """Rows wait, and the sentence says what to run."""
    server.root("DELETE FROM mail_log_schema")
    host.add(VHOST)
    with host.running():
        host.send(VHOST)
        host.wait(
            lambda: "the tables are of version 0, this program's are of 2; run: secure-sendmail log init" in host.log(),
            "it is said",
        )
    assert server.rows() == []


def test_old_rows_are_collected(host: Host, server: MariaDB, tmp_path: Path) -> None:
    """1,000 rows older than retention go, those of held mail and of other nodes stay, and the line is logged."""
    host.add(VHOST)
    with host.running():
        for _ in range(3):
            host.send(VHOST)
        host.wait(lambda: len(host.held()) == 1, "the third is held")
        shipped(host, server)
    old = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=200)).strftime("%Y-%m-%d %H:%M:%S")
    server.root(f"UPDATE mail_log SET logged_at = '{old}'")
    columns = [name for name in LOG_COLUMNS if name not in ("node", "seq", "queue_id")]
    picked = ", ".join(columns)
    server.root(
        f"INSERT INTO mail_log (node, seq, queue_id, {picked}) SELECT node, n.seq + 100, 'gone', {picked} FROM mail_log, "
        f"(SELECT seq FROM seq_1_to_997) AS n WHERE mail_log.seq = 1"
    )
    server.root(f"INSERT INTO mail_log (node, seq, queue_id, {picked}) SELECT 'another', 1, 'x', {picked} FROM mail_log LIMIT 1")
    server.root("UPDATE mail_log SET logged_at = UTC_TIMESTAMP(6) WHERE seq = 1097")
    error_log = tmp_path / "error.log"
    settings = config.load(str(host.config)).mysql
    assert settings is not None
    ledger = Ledger(str(host.state))
    connection = mysql_log.connect(settings)
    mysql_log.collect(ledger, connection, settings.retention, str(error_log), ())
    connection.close()
    ledger.close()
    left = server.root("SELECT node, event, seq FROM mail_log ORDER BY seq, node")
    assert sorted((event, seq) for _, event, seq in left) == [("held", 3), ("released", 1), ("released", 1097)]
    line = error_log.read_text()
    stamp = r"\[[A-Z][a-z]{2} [A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \d{4}\]"
    assert re.fullmatch(stamp + r" \[secure-sendmail\] GC was run \(998 rows older than 168 hours deleted\)\n", line)
    assert time.time() - os.stat(error_log).st_mtime < 60
    assert subprocess.run(["test", "-f", error_log]).returncode == 0


def test_clock_ahead_makes_no_row_old(host: Host, server: MariaDB, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's clock is put years ahead while the releaser runs: what MySQL has stays there."""
    host.add(VHOST)
    host.send(VHOST)
    assert host.releaser("--once").returncode == 0
    settings = config.load(str(host.config)).mysql
    assert settings is not None
    ledger, connection, now = Ledger(str(host.state)), mysql_log.connect(settings), time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e9)
    mysql_log.collect(ledger, connection, settings.retention, None, ())
    assert len(server.rows()) == 1
    monkeypatch.setattr(ledger.clock, "now", time.time)
    mysql_log.collect(ledger, connection, settings.retention, None, ())
    assert server.rows() == []
    connection.close()
    ledger.close()


# What is counted is what the process itself does: it ships in a thread, as it does where that of its own was killed.
SHIPPED_HERE = "from releaser import daemon; there = daemon.Shipping; daemon.Shipping = lambda apart: there(apart=False)"


def test_ended_before_each_statement(server: MariaDB, tmp_path: Path) -> None:
    """The releaser ends before any statement to MySQL, or commit, while it ships and collects: each row is there once."""
    server.root("DROP TABLE IF EXISTS mail_log, mail_log_schema")
    (tmp_path / "password").write_text(PASSWORD + "\n")
    (tmp_path / "password").chmod(0o600)
    section = f'[mysql]\nhost = "127.0.0.1"\nport = {server.port}\npassword_file = "{tmp_path}/password"\n'
    with Forks(tmp_path) as forks, Site(tmp_path, forks) as site:
        site.configure("2/1h", extra=section)
        init = ("log", "init", "--user", "creator", "--password-file", str(tmp_path / "password"))
        assert site.run(site.command(*init)).status == 0
        for name in ("a", "b", "c"):
            site.send(name)
        assert site.run(site.releaser()).status == 0
        assert [row[0] for row in server.rows("recipient")] == [f"{name}@x.example" for name in "abc"]
        # Two were sent long ago, one is held; two more are not shipped yet.
        site.sql("UPDATE mail_log SET logged_at = '2020-01-01T00:00:00.000000Z'")
        server.root("UPDATE mail_log SET logged_at = '2020-01-01'")
        for name in ("d", "e"):
            site.send(name)
        site.configure("2/1h", extra='[retention]\nledger = "876000h"\n')
        assert site.run(site.releaser()).status == 0
        site.configure("2/1h", extra=section)
        saved, ends = site.save(), 0
        columns = ", ".join(LOG_COLUMNS)
        server.root(f"CREATE OR REPLACE TABLE saved AS SELECT {columns} FROM mail_log")
        for number in range(1, 200):
            site.restore(saved)
            server.root("DELETE FROM mail_log")
            server.root(f"INSERT INTO mail_log ({columns}) SELECT {columns} FROM saved")
            ended = site.run(site.releaser(SHIPPED_HERE), number, (EXIT, KILL)[number % 2])
            if ended.status == 0:
                break
            ends += 1
            point = f"ended before call {number} of {ended.calls}\n{ended.stderr}"
            assert ended.status in ENDED, point
            assert site.run(site.releaser()).status == 0, point
            for rows in (server.rows("event, recipient"), site.sql("SELECT event, recipient FROM mail_log ORDER BY seq")):
                assert rows == [("held", f"{name}@x.example") for name in "cde"], point
        assert ended.calls.count("query") > 5 and ended.calls.count("COMMIT") >= 2 and ends > 8
