"""Programs and files of different versions meet: nothing is lost, nothing taken for corrupt, and there is a way back."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
from host import Host, text

from releaser.ledger import SCHEMA_1, SCHEMAS, VERSION

VHOST = "www.a.example"


def book(host: Host) -> sqlite3.Connection:
    return sqlite3.connect(host.state / "ledger.sqlite", isolation_level=None)


def version(path: Path) -> int:
    with sqlite3.connect(path) as found:
        return int(found.execute("PRAGMA user_version").fetchone()[0])


def test_upgrade_and_an_older_program() -> None:
    """It says that the ledger is newer and ends, with mail accepted all the while; the newer program goes on with all of it."""
    with Host(default=["1/1h"]) as host:
        host.add(VHOST)
        with host.running():
            for number in range(2):
                host.send(VHOST, message=text("one@x.example", subject=f"before {number}"))
            host.wait(lambda: host.held(), "the second is held")
        with book(host) as ledger:
            ledger.execute(f"PRAGMA user_version = {VERSION + 1}")
        before = host.ls()
        run = host.releaser()
        assert run.returncode == os.EX_IOERR and f"version {VERSION + 1} is newer than {VERSION}" in run.stderr
        assert "upgrade" in run.stderr and "Traceback" not in run.stderr
        host.send(VHOST, message=text("one@x.example", subject="meanwhile"))
        assert host.ls()[:-1] == before and version(host.state / "ledger.sqlite") == VERSION + 1
        with book(host) as ledger:
            ledger.execute(f"PRAGMA user_version = {VERSION}")
        with host.running():
            host.wait(lambda: len(host.held()) == 2, "what came meanwhile is counted as ever")
            host.cli("hold", "release", "--all", "--yes")
            host.wait_for_mail(3)
        assert host.subjects() == ["before 0", "before 1", "meanwhile"] and host.json("status")["corrupt"] == 0


@pytest.mark.parametrize("made_by", range(1, VERSION))
def test_upgrade_of_a_ledger_and_of_held_mail(made_by: int) -> None:
    """What an older program holds and has counted is held and counted by this one; the older ledger is kept beside it."""
    with Host(default=["1/1h"]) as host:
        host.add(VHOST)
        with host.running():
            for number in range(2):
                host.send(VHOST, message=text("one@x.example", subject=f"before {number}"))
            host.wait(lambda: host.held(), "the second is held")
        _as_made_by(host, made_by)
        with host.running():
            host.send(VHOST, message=text("one@x.example", subject="after"))
            host.wait(lambda: len(host.held()) == 2, "the first one counts")
            host.cli("hold", "release", "--all", "--yes")
            host.wait_for_mail(3)
            host.wait_until_idle()
        assert [row["event"] for row in host.rows()] == ["released", "held", "held", "released", "released"]
        assert version(host.state / "ledger.sqlite") == VERSION
        assert version(host.state / f"ledger.sqlite.{made_by}") == made_by
        with sqlite3.connect(host.state / f"ledger.sqlite.{made_by}") as kept:
            assert kept.execute("SELECT count(*) FROM message WHERE state = 'held'").fetchone() == (1,)


def _as_made_by(host: Host, made_by: int) -> None:
    """The ledger with the same content in the tables of that version; and, of version 1, held files in layout 1."""
    path = host.state / "ledger.sqlite"
    new = path.with_suffix(".old")
    with sqlite3.connect(new) as old:
        old.executescript("".join(SCHEMAS[:made_by]) + f"PRAGMA user_version = {made_by};")
        old.execute("ATTACH ? AS now", (str(path),))
        tables = "SELECT name FROM main.sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        for (table,) in list(old.execute(tables)):
            columns = ", ".join(found[1] for found in old.execute(f"PRAGMA main.table_info({table})"))
            old.execute(f"INSERT INTO main.{table} ({columns}) SELECT {columns} FROM now.{table}")
        # What no older program has written.
        old.execute("DELETE FROM main.meta WHERE key = 'clock'")
    for leftover in ("", "-wal", "-shm"):
        Path(f"{path}{leftover}").unlink(missing_ok=True)
    new.rename(path)
    if made_by == 1:
        assert "maildrop" not in SCHEMA_1
        for held in (host.spool / "hold").iterdir():
            content = held.read_bytes()
            assert content.startswith(b"Layout: 2\n")
            lines = [line for line in content.partition(b"\n\n")[0].split(b"\n") if not line.startswith((b"Script-F", b"Notify"))]
            held.write_bytes(b"\n".join(lines).replace(b"Layout: 2", b"Layout: 1") + b"\n\n" + content.partition(b"\n\n")[2])
