"""`log init` and `log migrate`: tables of another version, older and newer, and a releaser at work meanwhile."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from host import Host, text
from mariadb import MariaDB
from test_e2e_mysql_outage import VHOST, logging, logging_to, password, rows_of, server
from test_mysql_dialect import version_1

__all__ = ["logging", "password", "server"]

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]


def table(server: MariaDB) -> object:
    return server.root("SHOW CREATE TABLE mail_log")


def migrate(host: Host, password: Path) -> str:
    return str(host.cli("log", "migrate", "--user", "creator", "--password-file", str(password)).stdout)


def by_name(server: MariaDB) -> tuple[set[object], set[object]]:
    """Columns and keys, in whatever order an ALTER has left them."""
    columns = (
        "SELECT column_name, column_type, collation_name, is_nullable, generation_expression FROM information_schema.columns"
    )
    keys = "SELECT index_name, seq_in_index, column_name, sub_part FROM information_schema.statistics"
    where = "WHERE table_name = 'mail_log' AND table_schema = 'secure_sendmail'"
    return set(server.root(f"{columns} {where}")), set(server.root(f"{keys} {where}"))


def test_migrated_tables_are_as_new_ones(logging: Host, server: MariaDB, password: Path) -> None:
    """From version 1, at the first attempt, at the second, and from every point at which one can have ended."""
    new = by_name(server)
    assert "already" in migrate(logging, password) and by_name(server) == new
    version_1(server)
    assert by_name(server) != new
    assert "version 2 now" in migrate(logging, password) and by_name(server) == new
    assert "already" in migrate(logging, password)
    steps = logging.cli("log", "migrate", "--print").stdout
    statements = [text for text in (part.strip() for part in steps.split(";")) if text]
    assert len(statements) >= 4 and steps == (Path(__file__).parent.parent / "config/schema.2.sql").read_text()
    for ended in range(len(statements)):
        version_1(server)
        for statement in statements[:ended]:
            server.root(statement)
        assert "version 2 now" in migrate(logging, password) and by_name(server) == new


def test_migrated_while_mail_goes_out(logging: Host, server: MariaDB, password: Path) -> None:
    """Two hosts ship, two administrators migrate at the same time, twice: every row is there once, and nobody waited."""
    version_1(server)
    with Host(extra=logging_to(server, password)) as other:
        other.add(VHOST)
        with logging.running(), other.running(), ThreadPoolExecutor(4) as pool:

            def send(host: Host) -> None:
                for number in range(60):
                    host.send(VHOST, message=text(f"r{number}@x.example"))

            sending = [pool.submit(send, host) for host in (logging, other)]
            logging.wait(lambda: len(server.rows()) > 20, "rows arrive in tables of version 1")
            said = [each.result() for each in [pool.submit(migrate, logging, password) for _ in range(2)]]
            assert sorted("already" in text for text in said) == [False, True]
            for each in sending:
                each.result()
            for host in (logging, other):
                host.wait(lambda: host.json("status")["outbox"] == 0 and len(host.rows()) == 60, "all is shipped", timeout=60)  # noqa: B023
        assert len(server.rows()) == 120
        nodes = {str(row["node"]) for row in rows_of(server)}
        assert [[row for row in rows_of(server) if row["node"] == node] for node in sorted(nodes)] == sorted(
            (host.rows() for host in (logging, other)), key=lambda rows: str(rows[0]["node"])
        )
        assert "Traceback" not in logging.log() + other.log()


def test_older_tables_are_said(logging: Host, server: MariaDB, password: Path) -> None:
    """Rows go into them; what needs more says what to run; and so do `check` and `log init`, which leaves them as they are."""
    version_1(server)
    before = table(server)
    with logging.running():
        logging.send(VHOST)
        logging.wait(lambda: len(server.rows()) == 1, "it is shipped")
    assert any("run: secure-sendmail log migrate" in each for each in logging.json("check")["warnings"])
    said = logging.cli("log", "init", "--user", "creator", "--password-file", str(password)).stdout
    assert "run: secure-sendmail log migrate" in said and table(server) == before
    traced = logging.cli("trace", "r@x.example", "--source", "mysql", check=False)
    assert traced.returncode == 1 and "run: secure-sendmail log migrate" in traced.stderr and "Traceback" not in traced.stderr
    assert logging.cli("log", "--last", "1", "--source", "mysql").returncode == 0


def test_newer_tables_are_left_alone(logging: Host, server: MariaDB, password: Path) -> None:
    """Rows wait for the newer program, mail does not."""
    server.root("INSERT INTO mail_log_schema VALUES (3)")
    with logging.running():
        logging.send(VHOST)
        logging.wait_for_mail(1)
        logging.wait(lambda: "upgrade it" in logging.json("status")["log_waits"].get("reason", ""), "it is said")
    assert server.rows() == [] and "already" in migrate(logging, password)


def test_migration_without_the_rights(logging: Host, server: MariaDB) -> None:
    """It says which are needed, and changes nothing."""
    version_1(server)
    before = table(server)
    refused = logging.cli("log", "migrate", check=False)
    assert refused.returncode == 1 and "needs CREATE, ALTER, INDEX, INSERT and SELECT" in refused.stderr
    assert table(server) == before and server.root("SELECT version FROM mail_log_schema") == [(1,)]


def test_tables_made_and_migrated_by_who_is_root_on_the_host(logging: Host, server: MariaDB) -> None:
    """The README's way where no user of MySQL that may create tables has a password: what --print prints."""
    page = " ".join((Path(__file__).parent.parent / "README.md").read_text().split())

    def typed(verb: str, *options: str) -> int:
        assert f"secure-sendmail log {verb} --print | {' '.join(['mariadb', *options, 'secure_sendmail'])}" in page
        client = ["mariadb", "--no-defaults", f"--socket={server.socket}", "--user=root", *options, "secure_sendmail"]
        printed = logging.cli("log", verb, "--print").stdout
        return subprocess.run(client, input=printed, text=True, capture_output=True, timeout=60).returncode

    new = by_name(server)
    server.root("DROP TABLE mail_log, mail_log_schema")
    for _ in range(2):
        assert typed("init") == 0 and by_name(server) == new
    version_1(server)
    for _ in range(2):
        assert typed("migrate", "--force") in (0, 1) and by_name(server) == new
        assert server.root("SELECT MAX(version) FROM mail_log_schema") == [(2,)]
