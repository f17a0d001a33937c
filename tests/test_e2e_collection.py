"""Garbage collection of the ledger, trash/ and failed/: what is old goes, what somebody still needs stays."""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pymysql
import pytest
from host import Host, text
from mariadb import MariaDB
from servers import Scripted
from test_e2e_mysql_outage import logging_to, make_tables, password, server

__all__ = ["password", "server"]

pytestmark = pytest.mark.server

VHOST = "www.a.example"
LONG_AGO = "2020-01-01T00:00:00.000000Z"
# Every time that a row of the ledger has, put back.
AGE = (
    f"UPDATE mail_log SET logged_at = '{LONG_AGO}'",
    f"UPDATE message SET arrived_at = '{LONG_AGO}', picked_up_at = '{LONG_AGO}', counted_at = counted_at - 1e8, "
    f"held_at = CASE WHEN held_at IS NULL THEN NULL ELSE '{LONG_AGO}' END, "
    f"executed_at = CASE WHEN executed_at IS NULL THEN NULL ELSE '{LONG_AGO}' END",
    "UPDATE incident SET opened_at = 1, last_at = 1, ended_at = 1, notified_at = 1 WHERE ended_at IS NOT NULL",
)
STAMP = r"\[[A-Z][a-z]{2} [A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \d{4}\] \[secure-sendmail\]"


def answer(line: bytes) -> bytes | None:
    return b"550 5.1.1 nobody\r\n" if b"refused" in line else None


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with Scripted(answer) as mta, Host(mta.url, default=["3/1h"], extra=f'[log]\nerror_log = "{tmp_path}/error.log"\n') as made:
        made.add(VHOST)
        yield made


def ledger(host: Host, *statements: str) -> list[tuple[object, ...]]:
    with sqlite3.connect(host.state / "ledger.sqlite", timeout=30) as book:
        return [row for statement in statements for row in book.execute(statement).fetchall()]


def fill(host: Host) -> None:
    """One released, one refused, one held, one deleted."""
    with host.running():
        host.send(VHOST, message=text("released@x.example", subject="released"))
        host.send(VHOST, message=text("refused@x.example", subject="refused"))
        host.wait_for_row("failed")
        host.send(VHOST, message=text("a@x.example", "b@x.example", subject="deleted"))
        host.send(VHOST, message=text("c@x.example", "d@x.example", subject="held"))
        host.wait(lambda: len(host.held()) == 2, "two are held")
        (deleted,) = [each["queue_id"] for each in host.json("hold", "list") if each["subject"] == "deleted"]
        host.cli("hold", "delete", deleted, "--yes")
        host.wait_for_row("deleted")


def test_what_is_old_goes(host: Host, tmp_path: Path) -> None:
    """Rows and messages that have ended, trash/ and failed/, each said in the error log; what is held stays with its rows."""
    fill(host)
    before = Counter(row["event"] for row in host.rows())
    assert before == Counter(released=1, failed=1, held=4, deleted=2)
    assert sorted(path.split("/")[0] for path in host.ls()) == ["failed", "hold", "trash"]
    ledger(host, *AGE)
    with host.running():
        host.wait(lambda: [path.split("/")[0] for path in host.ls()] == ["hold"], "trash and failed are collected")
    rows = host.rows()
    assert Counter((row["event"], row["subject"]) for row in rows) == {
        ("held", "held"): 2, ("held", "deleted"): 2, ("deleted", "deleted"): 2, ("failed", "refused"): 1,
        ("expired", "deleted"): 2, ("expired", "refused"): 1,
    }  # fmt: skip
    assert {row["reason"] for row in rows if row["event"] == "expired"} == {
        "trash/ has kept it for 720 hours", "failed/ has kept it for 720 hours",
    }  # fmt: skip
    lines = (tmp_path / "error.log").read_text()
    for what in ("1 rows older than 168 hours", r"1 messages in trash/ older than 720 hours", "1 messages in failed/ older than"):
        assert re.search(rf"^{STAMP} GC was run \({what}.*deleted\)$", lines, re.MULTILINE), what
    # The next time the rows of what is no more go, too.
    ledger(host, *AGE)
    with host.running():
        host.wait(lambda: {row["subject"] for row in host.rows()} == {"held"}, "the rest is collected")
    assert Counter(found[0] for found in ledger(host, "SELECT state FROM message")) == {"held": 1}
    assert host.json("hold", "show", host.held()[0])["subject"] == "held"
    assert "nothing needs repair" in host.cli("check").stdout


def test_what_counts_for_a_window_stays(host: Host) -> None:
    """Its rows are old, its usage is not: the limit holds."""
    host.configure(default=["2/60d"], extra='[retention]\nledger = "1s"\n')
    with host.running():
        host.send(VHOST, message=text("a@x.example", subject="first"))
        host.send(VHOST, message=text("b@x.example", subject="second"))
        host.wait(lambda: len(host.rows("released")) == 2, "both are out")
    stamps = AGE[1].replace("counted_at - 1e8", "counted_at - 86400 * 50")
    ledger(host, AGE[0], stamps)
    with host.running():
        host.wait(lambda: not host.rows(), "the log is collected")
        host.send(VHOST, message=text("c@x.example", subject="third"))
        host.wait(lambda: len(host.held()) == 1, "the third is held")
    assert host.json("limits", "show", VHOST)["windows"][0]["used"] == 2
    ledger(host, stamps)
    with host.running():
        host.wait(lambda: not ledger(host, "SELECT 1 FROM message WHERE state = 'done'"), "they are forgotten, 100 days later")
        host.send(VHOST, message=text("d@x.example", subject="fourth"))
        host.wait(lambda: len(host.rows("released")) == 1, "there is room again")


def test_what_mysql_has_not_stays(server: MariaDB, password: Path) -> None:
    """The ledger's rows wait for MySQL however old they are; what it has goes."""
    with Host(extra=logging_to(server, password, 'retention = "876000h"\n')) as host:
        make_tables(host, password)
        host.add(VHOST)
        with host.running():
            host.send(VHOST, message=text("a@x.example", subject="shipped"))
            host.wait(lambda: len(host.rows()) == 1 and host.json("status")["outbox"] == 0, "it is shipped")
            server.stop()
            host.send(VHOST, message=text("a@x.example", subject="waits"))
            host.wait(lambda: len(host.rows()) == 2, "it waits")
        ledger(host, *AGE)
        with host.running():
            host.wait(lambda: [row["subject"] for row in host.rows()] == ["waits"], "what is shipped is collected")
            server.start()
            host.wait(lambda: host.json("status")["outbox"] == 0, "it is shipped", timeout=70)
        assert [row[0] for row in server.rows("subject")] == ["shipped", "waits"]


@pytest.mark.parametrize("locking", ["", "FOR UPDATE"], ids=["read", "locked"])
def test_collection_beside_an_open_transaction(server: MariaDB, password: Path, locking: str) -> None:
    """Somebody reads the old rows, or has locked one, and goes for lunch: mail is out at once, and new rows arrive."""
    with Host(extra=logging_to(server, password)) as host:
        make_tables(host, password)
        host.add(VHOST)
        with host.running():
            host.send(VHOST, message=text("a@x.example", subject="old"))
            host.wait(lambda: len(server.rows()) == 1, "it is shipped")
        server.root(f"UPDATE mail_log SET logged_at = '{LONG_AGO[:19]}'")
        lunch = pymysql.connect(unix_socket=str(server.socket), user="root", database="secure_sendmail", autocommit=False)
        with lunch, lunch.cursor() as cursor:
            cursor.execute(f"SELECT * FROM mail_log WHERE node = '{host.rows()[0]['node']}' AND seq = 1 {locking}")
            with host.running():
                host.send(VHOST, message=text("a@x.example", subject="new"))
                host.wait_for_mail(2)
                host.wait(lambda: "new" in [row[0] for row in server.rows("subject")], "it is in MySQL", timeout=60)
                if not locking:
                    host.wait(lambda: server.rows("subject") == [("new",)], "the old one is collected")
                lunch.rollback()
                # What was locked is collected the next time, an hour later.
                assert host.json("status")["outbox"] == 0


def test_undelete_that_waits_is_carried_out(host: Host) -> None:
    """A person wants it back while the releaser is down, and it is older than trash/ keeps things."""
    fill(host)
    (deleted,) = [each["queue_id"] for each in host.json("hold", "list", "--deleted")]
    ledger(host, *AGE)
    host.cli("hold", "undelete", deleted, "--yes")
    with host.running():
        host.wait(lambda: deleted in host.held(), "it is back")
    assert not [row for row in host.rows("expired") if row["queue_id"] == deleted]


def test_many_old_rows_delay_nobody(host: Host) -> None:
    """200,000 rows and 100,000 messages that have ended go while mail goes out; and a clock ahead makes nothing old."""
    fill(host)
    columns = "node, host, arrived_at, event, message_id, vhost, uid, verified, sender, recipient, size, subject, script, cwd, reason, mta_queue_id, actor"  # noqa: E501
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200000)"
    ledger(
        host,
        f"{numbers} INSERT INTO mail_log (logged_at, queue_id, {columns}) "
        f"SELECT '{LONG_AGO}', printf('%017X', i), {columns} FROM n, (SELECT {columns} FROM mail_log WHERE event = 'released')",
        f"{numbers} INSERT INTO message (queue_id, picked_up_at, vhost, state, digest, recipients, remaining, sender, size, "
        "arrived_at, uid, verified, message_id, subject, script, cwd, reason, maildrop) "
        f"SELECT printf('%017X', i), '{LONG_AGO}', 'www.z.example', 'done', '', 1, '[]', '', 1, '{LONG_AGO}', 0, 1, '', '', '', "
        "'', '', 'www.z.example' FROM n LIMIT 100000",
    )
    host.configure(default=["unlimited"])
    with host.running():
        for number in range(20):
            host.send(VHOST, message=text("a@x.example", subject=f"meanwhile {number}"))
        host.wait(lambda: len(host.rows("released")) >= 21, "they are out")
        left = ledger(host, "SELECT count(*) FROM message WHERE vhost = 'www.z.example'")
        assert left[0][0] == 100_000
        host.wait(
            lambda: not ledger(host, "SELECT 1 FROM message WHERE vhost = 'www.z.example' LIMIT 1"), "all are gone", timeout=110
        )
    assert not [row for row in host.rows() if row["logged_at"] == LONG_AGO]
    assert Counter(row["event"] for row in host.rows()) == Counter(released=21, failed=1, held=4, deleted=2)
