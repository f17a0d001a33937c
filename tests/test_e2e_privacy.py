"""Privacy: subjects and recipients that the log does not keep, and addresses that it is told to forget, in ledger and MySQL."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import Host, text
from mariadb import PASSWORD, MariaDB
from servers import YES, Scripted

pytestmark = pytest.mark.server

VHOST = "www.a.example"
WHO = "Some.Body@x.example"


def answer(line: bytes) -> bytes | None:
    if line.lower().startswith(b"rcpt to:<refused@"):
        return b"550 5.1.1 <refused@x.example>: no such user, ask postmaster@x.example"
    return YES


@pytest.fixture(scope="module")
def server() -> Iterator[MariaDB]:
    with MariaDB() as running:
        yield running


@pytest.fixture
def host(server: MariaDB, tmp_path: Path) -> Iterator[Host]:
    password = tmp_path / "password"
    password.write_text(PASSWORD)
    password.chmod(0o600)
    section = f'[mysql]\nhost = "127.0.0.1"\nport = {server.port}\npassword_file = "{password}"\n'
    server.root("DROP TABLE IF EXISTS mail_log, mail_log_schema")
    with Scripted(answer) as mta, Host(mta.url, default=["3/1h"], extra=section) as made:
        made.section = section  # type: ignore[attr-defined]
        made.cli("vhost", "add", VHOST)
        made.cli("log", "init", "--user", "creator", "--password-file", str(password))
        yield made


def everything(host: Host, server: MariaDB) -> str:
    """All that the log has, in ledger and MySQL."""
    return json.dumps([host.json("log", "--source", "ledger"), [list(map(str, row)) for row in server.rows()]]).lower()


def send(host: Host, server: MariaDB) -> None:
    host.send(VHOST, message=text(WHO, "other@x.example", subject="very private"))
    host.send(VHOST, message=text("refused@x.example", subject="refused"))
    host.send(VHOST, message=text(WHO, subject="held, private"))
    host.wait(lambda: host.held(), "the last one is held")
    host.wait_for_row("failed")
    host.wait(lambda: len(server.rows()) == len(host.rows()), "all is shipped")


@pytest.mark.parametrize("source", ["ledger", "mysql"])
def test_privacy_of_the_log(host: Host, server: MariaDB, source: str) -> None:
    """Nothing tells who has got mail, nor about what; an exact address is found all the same, in any case."""
    section = host.section  # type: ignore[attr-defined]
    host.configure(extra=f'{section}[log]\nlog_subject = "none"\nlog_recipients = "hash"\n')
    with host.running():
        send(host, server)
        log = everything(host, server)
        assert not any(word in log for word in ("some.body", "other@", "refused@", "postmaster@", "private"))
        assert "@x.example" in log and "no such user" in log
        for name in (WHO, WHO.lower(), WHO.upper()):
            events = [row["event"] for row in host.json("log", "--source", source, "--recipient", name)]
            assert events == ["released", "held"]
            assert "taken by the MTA" in host.cli("trace", "--source", source, name).stdout
        assert {row["name"] for row in host.json("top", "--by", "domain", "--source", source)} == {"x.example"}
        # The mail itself is as it was.
        assert host.json("hold", "list")[0]["recipients"] == [WHO]
        # Back to plain with a reload; what was written stays as it is.
        host.configure(extra=section)
        host.wait_for_log("loaded")
        host.send(VHOST, message=text("plain@x.example", subject="plainly"))
        host.wait(lambda: len(host.held()) == 2, "it is held")
        assert "plain@x.example" in json.dumps(host.rows()) and "some.body" not in json.dumps(host.rows()).lower()
    # Another ledger's hashes are others.
    with Host() as another:
        another.add(VHOST)
        keys = {_key(each) for each in (host, another)}
        assert len(keys) == 2 and all(len(key) == 64 for key in keys)


def _key(host: Host) -> str:
    with sqlite3.connect(host.state / "ledger.sqlite") as book:
        return str(book.execute("SELECT value FROM meta WHERE key = 'privacy_key'").fetchone()[0])


@pytest.mark.parametrize("how", ["plain", "hash"])
def test_forgotten_address(host: Host, server: MariaDB, how: str) -> None:
    """Nothing of it is left in log, ledger and MySQL; the counts are what they were, and mail that still lies here is named."""
    section = host.section  # type: ignore[attr-defined]
    host.configure(extra=f'{section}[log]\nlog_recipients = "{how}"\n')
    with host.running():
        send(host, server)
        before = [row["event"] for row in host.rows()]
        assert host.cli("log", "forget", WHO, check=False).returncode == 64
        said = host.cli("log", "forget", WHO.upper(), "--yes").stdout
        (held,) = host.held()
        assert "forgotten in 2 rows" in said and held in said
        host.cli("log", "forget", "refused@x.example", "--yes")
        log = everything(host, server)
        assert "some.body" not in log and "held, private" not in log and "<refused@" not in log
        assert log.count("(forgotten)") == 6 and "no such user" not in log
        assert [row["event"] for row in host.rows()] == before and len(server.rows()) == len(before)
        assert host.json("log", "--recipient", WHO) == []
        assert "other@x.example" in log or how == "hash"
        host.cli("hold", "delete", held, "--yes")
        host.wait_for_row("deleted")
        # MySQL is away: what is missing is said, and done with the next try.
        server.stop()
        try:
            run = host.cli("log", "forget", "other@x.example", "--yes", check=False)
            assert run.returncode == 1 and "run this again" in run.stderr
        finally:
            server.start()
        host.cli("log", "forget", "other@x.example", "--yes")
        assert "other@" not in everything(host, server)
    with sqlite3.connect(host.state / "ledger.sqlite") as book:
        ended = json.dumps(book.execute("SELECT * FROM message WHERE state IN ('done', 'unknown')").fetchall()).lower()
    assert "other@" not in ended


@pytest.mark.parametrize("journal", ["ids", "addresses"])
def test_addresses_in_the_journal(host: Host, server: MariaDB, journal: str) -> None:
    """Queue ids alone, whatever the MTA says in its replies; or a line for each message that was asked for."""
    host.configure(extra=host.section + f'[log]\njournal = "{journal}"\n')  # type: ignore[attr-defined]
    with host.running():
        send(host, server)
    lines = [line for line in host.log().splitlines() if "@" in line]
    if journal == "ids":
        assert not lines
        return
    assert [line.partition("INFO: ")[2].partition(" ")[2].partition("from=")[2] for line in lines] == [
        f"<root@{os.uname().nodename}> to=<{WHO}>,<other@x.example>", f"<root@{os.uname().nodename}> to=<refused@x.example>",
        f"<root@{os.uname().nodename}> to=<{WHO}>",
    ]  # fmt: skip


def test_addresses_in_the_journal_are_those_of_what_is_logged(host: Host) -> None:
    """Also where a message is looked at twice, since it is held only when what is before it is out: one line, one queue id."""
    host.configure(default=["1/1h"], extra=host.section + '[log]\njournal = "addresses"\n')  # type: ignore[attr-defined]
    for _ in range(3):
        host.send(VHOST, message=text(WHO))
    with host.running():
        host.wait(lambda: len(host.rows("released", "held")) == 3, "all are decided")
    named = [line.partition("INFO: ")[2].partition(":")[0] for line in host.log().splitlines() if "from=" in line]
    assert sorted(named) == sorted(row["queue_id"] for row in host.rows("released", "held"))
