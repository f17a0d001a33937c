"""The log of record in a real MariaDB, column by column, against what was sent, on the wire and in Postfix's own words."""

from __future__ import annotations

import datetime
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from host import smtp
from mariadb import PASSWORD, MariaDB
from servers import Message, Postfix, Wire
from system import DAEMON, System

pytestmark = pytest.mark.server

VHOST = "www.c1.example"
SENDER = "bounce@c1.example"
SCHEMA = Path(__file__).parent.parent / "config/schema.sql"


@pytest.fixture
def server() -> Iterator[MariaDB]:
    with MariaDB() as running:
        yield running


@pytest.fixture
def relay(postfix: Postfix) -> Iterator[Wire]:
    with Wire(postfix.port) as relay:
        yield relay


@pytest.fixture
def system(server: MariaDB, relay: Wire) -> Iterator[System]:
    """A customer's vhost that may send to four recipients; the tables are made."""
    with System(mta=smtp(relay.port), default=["4/1h"]) as made:
        password = made.config.parent / "mysql.password"
        password.write_text(PASSWORD + "\n")
        password.chmod(0o600)
        os.chown(password, made.uids[DAEMON], made.uids[DAEMON])
        made.configure(extra=f'[mysql]\nhost = "127.0.0.1"\nport = {server.port}\npassword_file = "{password}"\n')
        made.register(VHOST, "c1")
        made.cli("log", "init", "--user", "creator", "--password-file", str(password))
        yield made


def message(number: int, to: list[str], subject: str, script: str) -> bytes:
    return (
        f"From: user@c1.example\nTo: {', '.join(to)}\nSubject: {subject}\nMessage-ID: <{number}@c1.example>\n"
        f"Date: Sun, 22 Nov 2026 19:36:07 +0000\nX-PHP-Originating-Script: {script}\n\ntext {number}\n"
    ).encode()


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(tzinfo=None)


def rows_of(server: MariaDB) -> list[dict[str, Any]]:
    names = [str(column[0]) for column in server.root("SHOW COLUMNS FROM mail_log WHERE extra NOT LIKE '%GENERATED%'")]
    return [dict(zip(names, row, strict=True)) for row in server.rows(", ".join(names))]


def size_on_the_wire(message: Message) -> int:
    """With the line ends of a file."""
    return len(message.data.replace(b"\r\n", b"\n"))


def test_mail_log_says_what_was_sent_held_released_and_deleted(
    system: System, server: MariaDB, relay: Wire, postfix: Postfix
) -> None:
    """A mail to three goes out, one is held and released by alice, one is held and deleted by her: every column of it."""
    mails = {
        1: (["one@x.example", "two@x.example", "three@x.example"], "Grüße 😀", "58002:contact.php"),
        2: (["four@x.example", "five@x.example"], "held and released", "58002:shop.php"),
        3: (["six@x.example"], "sent, for there is room for one", "58002:contact.php"),
        4: (["seven@x.example", "eight@x.example"], "held and deleted", "58002:shop.php"),
    }
    cwd = system.directory / "lib"
    sent_between: dict[int, list[datetime.datetime]] = {}
    with system.running():
        for number, (to, subject, script) in mails.items():
            sent_between[number] = [now()]
            run = system.enqueue(VHOST, SENDER, "-t", "-i", message=message(number, to, subject, script), user="c1", cwd=cwd)
            assert (run.returncode, run.stdout) == (0, b"")
            sent_between[number].append(now())
        system.wait(lambda: len(system.rows()) == 8, "all are sent or held")
        first, second = system.held()
        held_sizes = {
            number: len(system.cli("hold", "show", "--raw", queue_id, text=False).stdout)
            for number, queue_id in ((2, first), (4, second))
        }
        system.sudo("hold", "release", first, "--why", "known customer")
        system.sudo("hold", "delete", second, "--yes", "--why", "spam")
        on_wire = relay.wait(3)
        system.wait(lambda: system.json("status")["outbox"] == 0 and len(system.rows()) == 12, "all is shipped")
    end = now()
    rows = rows_of(server)
    # Every column that the schema has is looked at below.
    assert set(rows[0]) == {
        "node", "seq", "host", "logged_at", "arrived_at", "event", "queue_id", "message_id", "vhost", "uid", "verified",
        "sender", "recipient", "size", "subject", "script", "cwd", "reason", "mta_queue_id", "actor",
    }  # fmt: skip
    assert all(re.search(rf"^ +{name} ", SCHEMA.read_text(), re.MULTILINE) for name in rows[0])
    numbers = {f"<{number}@c1.example>": number for number in mails}
    wired = {numbers[re.search(r"^Message-ID: (\S+)", m.data.decode(), re.MULTILINE)[1]]: m for m in on_wire}  # type: ignore[index]
    assert {number: sorted(m.recipients) for number, m in wired.items()} == {n: sorted(mails[n][0]) for n in (1, 2, 3)}

    # What is the same in every row, and what is the same in every row of a message.
    assert [row["seq"] for row in rows] == list(range(1, 13))
    (node,) = {row["node"] for row in rows}
    assert re.fullmatch(r"[0-9a-f]{16}", node)
    assert {row["host"] for row in rows} == {socket.gethostname()}
    assert {(row["vhost"], row["sender"], row["cwd"]) for row in rows} == {(VHOST, SENDER, str(cwd))}
    assert {(row["uid"], row["verified"]) for row in rows} == {(system.uids["c1"], 1)}
    by_number = {number: [row for row in rows if numbers[row["message_id"]] == number] for number in mails}
    for number, (_, subject, script) in mails.items():
        size = size_on_the_wire(wired[number]) if number in wired else held_sizes[number]
        of_message = {(row["subject"], row["script"], row["size"]) for row in by_number[number]}
        assert of_message == {(subject, script, size)}
        (queue_id,) = {row["queue_id"] for row in by_number[number]}
        assert re.fullmatch(r"[0-9A-F]{17}", queue_id)
        (arrived_at,) = {row["arrived_at"] for row in by_number[number]}
        assert sent_between[number][0] <= arrived_at <= sent_between[number][1]
        assert all(arrived_at <= row["logged_at"] <= end for row in by_number[number])
    assert [row["logged_at"] for row in rows] == sorted(row["logged_at"] for row in rows)
    assert {row["queue_id"] for row in by_number[2]} == {first} and {row["queue_id"] for row in by_number[4]} == {second}
    assert held_sizes[2] == size_on_the_wire(wired[2])

    # Postfix's queue ids, as it answered and as its own log has them.
    ids = {number: re.search(r"queued as (\S+)", m.reply)[1] for number, m in wired.items()}  # type: ignore[index]
    assert len(set(ids.values())) == 3 and all(f"{queue_id}: " in postfix.log() for queue_id in ids.values())

    # What happened to whom, in order.
    def story(number: int) -> list[tuple[str, str, str, str, str]]:
        return [
            (row["event"], row["recipient"], row["mta_queue_id"], row["actor"], row["reason"] if row["actor"] else "")
            for row in by_number[number]
        ]

    by_hand = "released by hand: known customer"
    assert story(1) == [("released", to, ids[1], "", "") for to in mails[1][0]]
    assert story(3) == [("released", to, ids[3], "", "") for to in mails[3][0]]
    assert story(2) == [
        *(("held", to, "", "", "") for to in mails[2][0]),
        *(("released", to, ids[2], "root (alice)", by_hand) for to in mails[2][0]),
    ]
    assert story(4) == [
        *(("held", to, "", "", "") for to in mails[4][0]),
        *(("deleted", to, "", "root (alice)", "spam") for to in mails[4][0]),
    ]
    assert {row["reason"] for row in rows if row["event"] == "released" and not row["actor"]} == {""}
    assert all("4/1h" in row["reason"] for row in rows if row["event"] == "held")


def test_mail_log_names_who_stopped_and_resumed(system: System, server: MariaDB) -> None:
    """A vhost that alice has stopped has its mail held, also over a restart; both are in the log, with her name."""
    with system.running():
        system.sudo("stop", VHOST, "--why", "broken into")
        system.send(VHOST, "-t", message=message(1, ["one@x.example"], "stopped", "58002:shop.php"))
        system.wait(lambda: len(system.held()) == 1, "it is held")
    with system.running():
        system.send(VHOST, "-t", message=message(2, ["one@x.example"], "still stopped", "58002:shop.php"))
        system.wait(lambda: len(system.held()) == 2, "it is held")
        system.cli("resume", VHOST)
        system.send(VHOST, "-t", message=message(3, ["one@x.example"], "resumed", "58002:shop.php"))
        system.wait(lambda: system.rows("released"), "it is sent")
        system.wait(lambda: system.json("status")["outbox"] == 0, "all is shipped")
    told = [(row["event"], row["vhost"], row["actor"], row["subject"]) for row in rows_of(server)]
    assert told == [
        ("stopped", VHOST, "root (alice)", ""),
        ("held", VHOST, "", "stopped"),
        ("held", VHOST, "", "still stopped"),
        ("resumed", VHOST, "root", ""),
        ("released", VHOST, "", "resumed"),
    ]
    reasons = {row["event"]: row["reason"] for row in rows_of(server)}
    assert reasons["held"].startswith("stopped") and "broken into" in reasons["held"] + reasons["stopped"]
