"""Ledgers that are new, restored, copied or retired, at one MariaDB: no row is taken for another, and none is there twice."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from host import Host, text
from mariadb import MariaDB
from test_e2e_mysql_outage import VHOST, logging, password, server

__all__ = ["logging", "password", "server"]

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

ANOTHER_MACHINE = "0123456789abcdef0123456789abcdef"


def send(host: Host, *names: str) -> None:
    for name in names:
        host.send(VHOST, message=text("a@x.example", subject=name))
    host.wait(lambda: {row["subject"] for row in host.rows()} >= set(names), "they are logged")


def shipped(host: Host) -> None:
    host.wait(lambda: host.json("status")["outbox"] == 0, "all rows are shipped", timeout=70)


def subjects(server: MariaDB) -> Counter[str]:
    return Counter(str(row[0]) for row in server.rows("subject"))


def once(*names: str) -> Counter[str]:
    return Counter(dict.fromkeys(names, 1))


def nodes(server: MariaDB) -> dict[str, list[str]]:
    """The subjects of each node, in its order; the nodes as their first rows came."""
    found: dict[str, list[str]] = {}
    for node, name in server.root("SELECT node, subject FROM mail_log ORDER BY node, seq"):
        found.setdefault(node, []).append(name)
    return found


@contextmanager
def backup(host: Host) -> Iterator[Path]:
    """The ledger as it is now, of a releaser that has ended."""
    copy = host.directory / "backup"
    shutil.copytree(host.state, copy)
    yield copy
    shutil.rmtree(copy)


def restore(host: Host, copy: Path) -> None:
    shutil.rmtree(host.state)
    shutil.copytree(copy, host.state)


@pytest.mark.parametrize("waits", [False, True], ids=["shipped", "waiting"])
@pytest.mark.parametrize("since", [2, 6])
def test_node_of_a_restored_ledger(logging: Host, server: MariaDB, since: int, waits: bool) -> None:
    """MySQL has rows that it does not know, more or fewer than it writes itself until it sees them: it goes on as another."""
    with logging.running():
        send(logging, "1", "2")
        shipped(logging)
        if waits:
            server.stop()
            send(logging, "3", "4")
    before = ("1", "2", "3", "4") if waits else ("1", "2")
    with backup(logging) as copy:
        if waits:
            server.start()
        with logging.running():
            shipped(logging)
            send(logging, *(f"lost {number}" for number in range(since)))
            shipped(logging)
        restore(logging, copy)
    server.stop()
    with logging.running():
        send(logging, "new 1", "new 2", "new 3", "new 4")
        server.start()
        shipped(logging)
        send(logging, "new 5")
        shipped(logging)
    lost = [f"lost {number}" for number in range(since)]
    new = [f"new {number}" for number in range(1, 6)]
    assert subjects(server) == once(*before, *lost, *new)
    assert sorted(nodes(server).values()) == sorted([[*before, *lost], new])
    (line,) = [line for line in logging.log().splitlines() if "does not know" in line]
    old = next(node for node, names in nodes(server).items() if "1" in names)
    assert f"log gc --node {old}" in line
    assert {row["node"] for row in logging.json("log", "--source", "ledger", "--last", "5")} == set(nodes(server)) - {old}


def test_node_of_a_lost_ledger(logging: Host, server: MariaDB) -> None:
    """A new one counts from 1 again, and is another node."""
    with logging.running():
        send(logging, "1", "2")
        shipped(logging)
    for file in logging.state.iterdir():
        file.unlink()
    with logging.running():
        send(logging, "3")
        shipped(logging)
    assert sorted(nodes(server).values()) == [["1", "2"], ["3"]]
    assert {row[0] for row in server.rows("seq")} == {1, 2}


def copy_of(host: Host) -> Host:
    """Another host with the same configuration, ledger and vhost."""
    other = Host(extra=host._extra)
    other.add(VHOST)
    shutil.rmtree(other.state)
    shutil.copytree(host.state, other.state)
    return other


def on_another_machine(host: Host, directory: Path) -> None:
    """Have the releaser of HOST see another /etc/machine-id."""
    machine = directory / "machine-id"
    machine.write_text(f"{ANOTHER_MACHINE}\n")
    script = f'mount --bind {machine} /etc/machine-id && exec "$@"'
    host.through = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]


@pytest.mark.parametrize("first", ["original", "copy"])
@pytest.mark.parametrize("machine", ["another", "the same"])
def test_node_of_a_copied_ledger(logging: Host, server: MariaDB, tmp_path: Path, first: str, machine: str) -> None:
    """Two releasers have the same ledger, with rows that wait: each row arrives once, and the two are told apart."""
    with logging.running():
        send(logging, "1")
        shipped(logging)
        server.stop()
        send(logging, "2", "3")
    with copy_of(logging) as other:
        if machine == "another":
            on_another_machine(other, tmp_path)
        with logging.running(), other.running():
            send(logging, "original 1", "original 2")
            send(other, "copy 1", "copy 2", "copy 3")
        server.start()
        for each in (logging, other) if first == "original" else (other, logging):
            with each.running():
                shipped(each)
        with logging.running(), other.running():
            for number in range(3, 6):
                send(logging, f"original {number}")
                send(other, f"copy {number + 1}")
            shipped(logging)
            shipped(other)
        originals, copies = [f"original {n}" for n in range(1, 6)], [f"copy {n}" for n in range(1, 7)]
        assert subjects(server) == once("1", "2", "3", *originals, *copies)
        of_first, of_other = (originals, copies) if machine == "another" or first == "original" else (copies, originals)
        assert sorted(nodes(server).values()) == sorted([["1", "2", "3", *of_first], of_other])
        assert ("has come to another machine" in other.log()) == (machine == "another")
        assert "does not know" not in logging.log() or machine == "the same"


def test_node_of_a_ledger_on_another_machine(logging: Host, server: MariaDB, tmp_path: Path) -> None:
    """A host is installed anew with its state: what waited arrives, what comes is another node's, and so it stays."""
    server.stop()
    with logging.running():
        send(logging, "1", "2")
    on_another_machine(logging, tmp_path)
    server.start()
    for number in ("3", "4"):
        with logging.running():
            send(logging, number)
            shipped(logging)
    assert sorted(nodes(server).values()) == [["1", "2"], ["3", "4"]]
    assert logging.log().count("has come to another machine") == 1
    with sqlite3.connect(logging.state / "ledger.sqlite") as book:
        (machine,) = book.execute("SELECT value FROM meta WHERE key = 'machine'").fetchone()
    assert ANOTHER_MACHINE not in machine


def test_node_of_a_retired_host(logging: Host, server: MariaDB) -> None:
    """`log gc --node` counts, asks, and deletes its rows in small batches; of the own node only by age, held mail never."""
    logging.configure(default=["1/1h"])
    with logging.running():
        send(logging, "1", "held")
        shipped(logging)
    columns = "host, logged_at, arrived_at, event, message_id, vhost, uid, verified, sender, recipient, size, subject, script, cwd, reason, mta_queue_id, actor"  # noqa: E501
    for node, name in (("00000000000000aa", "retired"), ("00000000000000bb", "other")):
        server.root(
            f"INSERT INTO mail_log (node, seq, queue_id, {columns}) SELECT '{node}', n.seq, 'gone', "
            f"{columns.replace('subject', repr(name))} FROM mail_log, seq_1_to_1800 AS n WHERE mail_log.subject = '1'"
        )
    own = logging.rows()[0]["node"]

    def gc(*words: str) -> tuple[int, str]:
        run = logging.cli("log", "gc", *words, check=False)
        return run.returncode, run.stdout + run.stderr

    def counts() -> dict[str, int]:
        return dict(server.root("SELECT subject, COUNT(*) FROM mail_log GROUP BY subject"))

    everything = {"1": 1, "held": 1, "retired": 1800, "other": 1800}
    retired = ("--node", "00000000000000aa")
    status, said = gc(*retired)
    assert status == os.EX_USAGE and "needs --yes" in said and "1800 rows of node 00000000000000aa, host " in said
    assert gc(*retired, "--dry-run")[0] == 0 and counts() == everything
    assert gc(*retired, "--until", "1h", "--yes")[0] == 0 and counts() == everything
    deletes = int(server.root("SHOW GLOBAL STATUS LIKE 'Com_delete'")[0][1])
    status, said = gc(*retired, "--yes")
    assert status == 0 and "1800 rows deleted" in said and counts() == {"1": 1, "held": 1, "other": 1800}
    # In small batches.
    assert int(server.root("SHOW GLOBAL STATUS LIKE 'Com_delete'")[0][1]) - deletes == 9
    assert gc(*retired, "--yes") == (0, "secure_sendmail has no such rows of node 00000000000000aa\n")
    status, said = gc("--node", own, "--yes")
    assert status == 1 and "own node" in said and counts() == {"1": 1, "held": 1, "other": 1800}
    assert gc("--node", own, "--until", "1h", "--yes")[0] == 0 and counts() == {"1": 1, "held": 1, "other": 1800}
    server.root("UPDATE mail_log SET logged_at = UTC_TIMESTAMP(6) - INTERVAL 2 HOUR")
    status, said = gc("--node", own, "--until", "1h", "--yes")
    assert status == 0 and re.search(r"2 rows of node.*\n1 rows deleted", said) and counts() == {"held": 1, "other": 1800}
