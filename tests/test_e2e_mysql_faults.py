"""What MySQL refuses, and what it cannot store, one by one, in a real MariaDB: rows, logins, packets, disks."""

from __future__ import annotations

import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from host import Host, text
from mariadb import PASSWORD, MariaDB
from mysql_proxy import Proxy
from servers import HOST, free_port
from test_e2e_mysql_outage import VHOST, logging, logging_to, make_tables, password, rows_of, server
from test_e2e_room import fill, small

__all__ = ["logging", "password", "server"]

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

GREEK = "Γειά \U0001f600"


@pytest.fixture
def proxied(server: MariaDB, password: Path) -> Iterator[tuple[Host, Proxy]]:
    """The same with a proxy on the way."""
    with Proxy(server.port) as proxy, Host() as host:
        host.configure(extra=logging_to(server, password).replace(str(server.port), str(proxy.port)))
        make_tables(host, password)
        host.add(VHOST)
        yield host, proxy


def shipped(host: Host, rows: int) -> None:
    """Wait until there are so many rows, and none waits."""
    host.wait(lambda: len(host.rows()) == rows and host.json("status")["outbox"] == 0, f"{rows} rows are shipped", 90)


def three(host: Host, second: bytes) -> None:
    """A mail, one that MySQL does not like, another."""
    for message in (text("a@x.example", subject="first"), second, text("a@x.example", subject="third")):
        host.send(VHOST, message=message)


def greek(size: int = 1) -> bytes:
    return text("a@x.example", subject=GREEK, headers=f"X-PHP-Originating-Script: 33:{'x' * size}.php\n")


# What an administrator, or an older server, has made of the table; what becomes of a subject in it.
TABLES = [
    ("ALTER TABLE mail_log MODIFY subject VARCHAR(255) CHARACTER SET utf8mb3 NOT NULL", "???? ?"),
    ("ALTER TABLE mail_log MODIFY subject VARCHAR(255) CHARACTER SET latin1 NOT NULL", "???? ?"),
    ("ALTER TABLE mail_log MODIFY subject VARCHAR(5) CHARACTER SET utf8mb4 NOT NULL", ""),
    ("ALTER TABLE mail_log ADD CONSTRAINT short CHECK (CHAR_LENGTH(subject) < 6)", ""),
    ("CREATE TRIGGER picky BEFORE INSERT ON mail_log FOR EACH ROW IF CHAR_LENGTH(NEW.subject) > 5 THEN "
     "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'too long for me'; END IF", ""),
]  # fmt: skip


@pytest.mark.parametrize(("table", "becomes"), TABLES, ids=["utf8mb3", "latin1", "narrow", "check", "trigger"])
def test_row_that_is_refused_for_its_content(logging: Host, server: MariaDB, table: str, becomes: str) -> None:
    """It arrives plainer, said once; those before and behind it as they are; and the ledger has all of it."""
    server.root(table)
    three(logging, greek())
    with logging.running():
        shipped(logging, 3)
    assert server.rows("seq, subject") == [(1, "first"), (2, becomes), (3, "third")]
    assert [row["subject"] for row in logging.rows()] == ["first", GREEK, "third"]
    assert [row[0] for row in server.rows("event")] == ["released"] * 3
    lines = [line for line in logging.log().splitlines() if "for its content" in line]
    assert len(lines) == 1 and "log row 2" in lines[0] and logging.log().count("MySQL does not take") == 0


def test_many_rows_that_are_refused_are_one_line(logging: Host, server: MariaDB) -> None:
    """A table that takes no emoji, and a hundred of them."""
    server.root(TABLES[0][0])
    logging.send(VHOST, message=text(*(f"r{number}@x.example" for number in range(100)), subject=GREEK))
    with logging.running():
        shipped(logging, 100)
    assert Counter(server.rows("subject")) == {("???? ?",): 100}
    assert logging.log().count("for its content") == 1


def test_table_that_takes_no_row_at_all(logging: Host, server: MariaDB) -> None:
    """A refusal that is not of this row's content is none of the row: it waits whole until the table is mended."""
    server.root("CREATE TRIGGER picky BEFORE INSERT ON mail_log FOR EACH ROW SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'closed'")
    three(logging, greek())
    with logging.running():
        logging.wait(lambda: "closed (1644)" in logging.json("status")["log_waits"].get("reason", ""), "it waits")
        assert server.rows() == []
        server.root("DROP TRIGGER picky")
        shipped(logging, 3)
    assert rows_of(server) == logging.rows()


def test_row_larger_than_max_allowed_packet(logging: Host, server: MariaDB) -> None:
    """The row arrives without its text, said once; the others as they are."""
    # The one holds only above the other.
    server.root("SET GLOBAL net_buffer_length = 1024")
    server.root("SET GLOBAL max_allowed_packet = 1024")
    three(logging, greek(900))
    with logging.running():
        shipped(logging, 3)
    assert server.rows("seq, subject, queue_id <> ''") == [(1, "first", 1), (2, "", 1), (3, "third", 1)]
    assert len(re.findall("log row 2 for its content, shipped without its text", logging.log())) == 1


def test_row_at_which_the_connection_is_lost(server: MariaDB, proxied: tuple[Host, Proxy]) -> None:
    """What is between closes the connection without a word, each time: halved, then set aside, and the rest goes through."""
    host, proxy = proxied
    proxy.longest = 1300
    for number in range(20):
        host.send(VHOST, message=greek(900) if number == 7 else text("a@x.example", subject=f"mail {number}"))
    with host.running():
        shipped(host, 20)
    assert server.rows("subject") == [("",) if number == 7 else (f"mail {number}",) for number in range(20)]
    assert host.log().count("for its content") == 1


def test_answers_that_are_lost(server: MariaDB, proxied: tuple[Host, Proxy]) -> None:
    """Each INSERT is carried out, and the first ten answers never come: every row is there once."""
    host, proxy = proxied
    proxy.lose = 10
    with host.running():
        for number in range(10):
            host.send(VHOST, message=text("a@x.example", subject=f"mail {number}"))
            host.wait(lambda: len(server.rows()) == number + 1, "it is in MySQL")  # noqa: B023
        shipped(host, 10)
    assert proxy.lose == 0
    assert rows_of(server) == host.rows()


@pytest.mark.parametrize("kept", ["disk", "table"])
def test_full(password: Path, kept: str) -> None:
    """The server's disk, or its table space, is full: mail is out, rows wait, and arrive when there is room."""
    with MariaDB() as server, Host() as host, small(server.directory / "small", "64m") as ballast:
        server.stop()
        space = server.directory / "small/log"
        space.mkdir()
        space.chmod(0o777)
        if kept == "table":
            server.options = ["--innodb-file-per-table=0", "--innodb-data-file-path=ibdata1:12M;ibdata2:1M"]
        server.start()
        host.configure(extra=logging_to(server, password))
        make_tables(host, password)
        if kept == "disk":
            schema = server.root("SHOW CREATE TABLE mail_log")[0][1]
            server.root("DROP TABLE mail_log")
            server.root(f"{schema} DATA DIRECTORY = '{space}'")
            fill(ballast)
        else:
            server.root("CREATE TABLE ballast (number INT PRIMARY KEY AUTO_INCREMENT, text LONGBLOB)")
            with pytest.raises(Exception, match="full"):
                while True:
                    server.root("INSERT INTO ballast (text) VALUES (REPEAT('x', 1000000))")
            with pytest.raises(Exception, match="full"):
                while True:
                    server.root("INSERT INTO ballast (text) VALUES (REPEAT('x', 20000))")
        host.add(VHOST)
        with host.running():
            rows = 0
            for number in range(10):
                host.send(VHOST, message=text(*(f"r{each}@x.example" for each in range(500)), subject=f"mail {number}"))
                rows += 500
            host.wait_for_mail(10)
            host.wait(lambda: re.search("1114|1021|full", host.json("status")["log_waits"].get("reason", "")), "it waits", 90)
            if kept == "disk":
                ballast.unlink()
            else:
                server.stop()
                server.options[1] += ";ibdata3:20M"
                server.start()
            shipped(host, rows)
        assert rows_of(server) == host.rows()


# Logins that PyMySQL cannot do as it is installed.


def test_login_with_ed25519(logging: Host, server: MariaDB) -> None:
    """PyMySQL raises what is none of its own errors: it is said what is missing, mail goes on, rows wait."""
    server.root("INSTALL SONAME 'auth_ed25519'")
    server.root(f"ALTER USER secure_sendmail@'%' IDENTIFIED VIA ed25519 USING PASSWORD('{PASSWORD}')")
    with logging.running():
        logging.send(VHOST)
        logging.wait_for_mail(1)
        reason = logging.wait(lambda: logging.json("status")["log_waits"].get("reason"), "it is said")
        assert "python3-nacl" in reason and reason in logging.log()
        server.root(f"ALTER USER secure_sendmail@'%' IDENTIFIED BY '{PASSWORD}'")
        shipped(logging, 1)


def caching_sha2(listener: socket.socket) -> None:
    """A server as MySQL 8 begins a session in the open: it wants the whole password, encrypted with its public key."""

    def packet(number: int, body: bytes) -> bytes:
        return len(body).to_bytes(3, "little") + bytes([number]) + body

    greeting = (
        b"\x0a8.4.0\0" + bytes(4) + b"12345678\0" + (0xFFFF & ~0x0800).to_bytes(2, "little") + b"\xff\x02\0"
        + (0x0008 | 0x0020).to_bytes(2, "little") + b"\x15" + bytes(10) + b"123456789012\0" + b"caching_sha2_password\0"
    )  # fmt: skip
    with suppress(OSError):
        while True:
            with listener.accept()[0] as client:
                client.sendall(packet(0, greeting))
                client.recv(4096)
                client.sendall(packet(2, b"\x01\x04"))
                client.recv(4096)
                client.sendall(packet(4, b"\x01-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n"))
                client.recv(4096)


def test_login_with_caching_sha2_password(logging: Host, password: Path) -> None:
    """MySQL 8's own method in the open: `log init` and `status` say in a sentence what is missing, and mail goes on."""
    with closing(socket.create_server((HOST, free_port()))) as listener:
        threading.Thread(target=caching_sha2, args=(listener,), daemon=True).start()
        port = listener.getsockname()[1]
        logging.configure(extra=f'[mysql]\nport = {port}\npassword_file = "{password}"\n')
        with logging.running():
            logging.send(VHOST)
            logging.wait_for_mail(1)
            reason = logging.wait(lambda: logging.json("status")["log_waits"].get("reason"), "it is said")
        assert "python3-cryptography" in reason and "tls_ca" in reason
        run = logging.cli("log", "init", check=False)
        assert run.returncode == 1 and "python3-cryptography" in run.stderr and "Traceback" not in run.stderr


def test_reload_and_end_while_the_server_is_frozen(logging: Host, server: MariaDB, password: Path) -> None:
    """Mail does not wait while another [mysql] is taken up, or a releaser ends, whatever MySQL does; no row is lost."""
    with logging.running():
        logging.send(VHOST)
        shipped(logging, 1)
        server.signal(signal.SIGSTOP)
        try:
            logging.send(VHOST)
            time.sleep(2)
            for retention in ("100h", "101h"):
                begun = time.monotonic()
                logging.configure(extra=logging_to(server, password, f'retention = "{retention}"\n'))
                logging.send(VHOST)
                logging.wait(lambda: len(logging.json("log", "--source", "ledger", "--last", "9")) >= 3, "mail is sent")
                logging.wait(lambda: "configuration loaded" in logging.log(), "it is loaded")
            logging.wait_for_mail(4)
            # One that waited for MySQL would take the time of its answers, twice.
            assert time.monotonic() - begun < 25
        finally:
            server.signal(signal.SIGCONT)
        shipped(logging, 4)
    assert rows_of(server) == logging.rows()


# outbox_max.


def sums(rows: list[dict[str, Any]]) -> Counter[tuple[str, str]]:
    """How many rows of each vhost and event, those of which only the number is left included."""
    found: Counter[tuple[str, str]] = Counter()
    for row in rows:
        found[row["vhost"], row["event"]] += row["size"] if not row["queue_id"] and row["size"] else 1
    return found


def test_outbox_max(server: MariaDB, password: Path) -> None:
    """At half it is said; beyond it the oldest rows become their number, for each vhost, event and hour, and no count changes."""
    others = "www.b.example"
    most = 2_000_000
    with Host(default=["3000/1h"], extra=logging_to(server, password, f'outbox_max = "{most}"\n')) as host:
        make_tables(host, password)
        host.add(VHOST, others)
        server.stop()
        sent: Counter[tuple[str, str]] = Counter()
        with host.running():

            def send(mails: int) -> None:
                for number in range(mails):
                    vhost = (VHOST, others)[number % 2]
                    host.send(vhost, message=text(*(f"r{each}@{'x' * 50}.example" for each in range(250)), subject="s" * 60))
                    sent[vhost, "released" if sent[vhost, "released"] < 3000 else "held"] += 250
                host.wait(lambda: sums(host.rows()) == sent, "all are logged")

            host.cli("stop", "www.c.example", "--why", "a row about a vhost", check=False)
            send(12)
            half = host.wait(lambda: host.json("status")["log_waits"].get("bytes"), "half is said", timeout=90)
            assert most // 2 < half <= most and host.json("status")["log_waits"].get("summarised") is None
            assert "more than half of outbox_max" in host.log() and "outbox_max" in host.cli("status").stdout
            assert any("outbox_max" in each for each in host.json("check")["warnings"])
            send(20)
            summarised = host.wait(lambda: host.json("status")["log_waits"].get("summarised"), "they are summarised", timeout=120)
            assert "outbox_max is reached" in host.log() and f"of {summarised} rows" in host.cli("status").stdout
            send(4)
            assert host.json("status")["log_waits"]["bytes"] <= most
            server.start()
            host.wait(lambda: host.json("status")["outbox"] == 0, "the rows are shipped", timeout=90)
            assert host.json("status")["log_waits"] == {}
        logged = rows_of(server)
        assert logged == host.rows()
        assert sums(logged) == sent and sum(sent.values()) == len(logged) + int(
            sum(row["size"] - 1 for row in logged if not row["queue_id"])
        )
        # A batch of which nobody could know whether MySQL has it stays as it is.
        assert all(row["queue_id"] for row in logged[:500])
        few = [row for row in logged if not row["queue_id"]]
        assert few and all(row["reason"].startswith(f"summary: {row['size']} rows") for row in few)
        hours = Counter((row["vhost"], row["event"], row["logged_at"][:13]) for row in few)
        assert set(hours.values()) == {1}
        assert logged == sorted(logged, key=lambda row: row["seq"])
