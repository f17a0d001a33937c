"""A message at which our own code fails, by an error or by the end of the whole process, before it is sent or behind that."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from host import BIN, Host, text
from servers import YES, Scripted

VHOST = "www.a.example"

# The real daemon with one mistake: it cannot stand a Subject of POISON.
BROKEN = """
import os, sys
from releaser import daemon, message
text = message.Header.text
def broken(self, name):
    if b"POISON" in b"".join(raw for _, raw in self.fields):
        {mistake}
    return text(self, name)
message.Header.text = broken
daemon.main()
"""
MISTAKES = {"raises": "raise ZeroDivisionError", "runs out of memory": "raise MemoryError", "dies": "os.kill(os.getpid(), 9)"}


def run(host: Host, mistake: str) -> subprocess.CompletedProcess[bytes]:
    """Everything that can be done now, as `--once` does it."""
    code = BROKEN.format(mistake=MISTAKES[mistake])
    command = [BIN / "python", "-c", code, "--config", host.config, "--once"]
    return subprocess.run(command, capture_output=True, timeout=60)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_poison_is_set_aside_after_three_attempts(mistake: str) -> None:
    """It is tried three times, over restarts; then it lies in corrupt/ with the reason, and the mail behind it goes out."""
    with Host() as host:
        host.add(VHOST)
        host.send(VHOST, message=text("one@x.example", subject="POISON"))
        host.send(VHOST, message=text("one@x.example", subject="good"))
        for attempt in (1, 2, 3):
            ended = run(host, mistake)
            assert ended.returncode == (-9 if mistake == "dies" else 0), ended.stderr
            assert sum(name.startswith("vhosts/") for name in host.ls()) >= 1, attempt
        assert run(host, mistake).returncode == 0
        assert host.subjects() == ["good"]
        (left,) = host.ls()
        assert re.match(r"corrupt/[0-9A-F]{17}$", left)
        (row,) = host.rows("corrupt")
        assert "failed at it 3 times" in row["reason"]
        # With the mistake mended, what is set aside is still there for a person, and the releaser has forgotten the rest.
        host.releaser("--once")
        assert host.ls() == [left] and host.json("status")["corrupt"] == 1


def test_poison_is_not_who_was_there_when_the_daemon_was_killed() -> None:
    """kill -9 while nothing is being read blames no message, however often."""
    with Host() as host:
        host.add(VHOST)
        for number in range(4):
            host.start()
            host.send(VHOST, message=text("one@x.example", subject=str(number)))
            host.wait_for_mail(number + 1)
            host.wait_until_idle()
            host.kill()
        assert (host.state / "in-hand").read_bytes().strip(b"\0") == b""
        assert host.rows("corrupt") == []


def test_poison_of_an_unwritable_name(tmp_path: Path) -> None:
    """The longest name with the longest maildrop fits into what is written down."""
    code = (
        "import sys; from releaser.poison import InHand, SIZE; from releaser.ledger import Ledger; "
        "d, e = sys.argv[1], ('v' * 253, b'\\xff' * 255); hand = InHand(d, Ledger(d, create=True)); hand.begin(*e); "
        "again = InHand(d, Ledger(d)); assert Ledger(d).poison() == {e: 1}; assert len(e[0]) + 1 + len(e[1]) < SIZE"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)


# The real daemon with a mistake in {name} of {owner}, for messages with the Subject POISON.
BROKEN_BEHIND = """
import os
from releaser import daemon
from releaser.{module} import {owner}
work = {owner}.{name}
def broken(self, *args, **words):
    found = [getattr(each, "row", each) for each in args]
    if any(getattr(row, "subject", "") == "POISON" for row in found):
        {mistake}
    return work(self, *args, **words)
{owner}.{name} = broken
daemon.main()
"""


def answers(line: bytes) -> bytes | None:
    """The MTA refuses some recipients for good, and some for now."""
    return {b"RCPT TO:<no": b"550 no", b"RCPT TO:<later": b"450 later"}.get(line.partition(b"@")[0], YES)


def run_broken(host: Host, name: str, mistake: str, module: str = "handover", owner: str = "HandOver") -> int:
    code = BROKEN_BEHIND.format(name=name, mistake=MISTAKES[mistake], module=module, owner=owner)
    command = [BIN / "python", "-c", code, "--config", host.config, "--once"]
    return subprocess.run(command, capture_output=True, timeout=60).returncode


def due(host: Host) -> None:
    """The time has come for what is to be tried again."""
    with sqlite3.connect(host.state / "ledger.sqlite") as book:
        book.execute("UPDATE message SET next_try = 0")


@pytest.mark.parametrize(
    ("name", "mistake", "size"),
    [
        ("_outcome", "raises", 10),
        ("_outcome", "runs out of memory", 1_500_000),
        ("_end", "raises", 10),
        ("_ended", "runs out of memory", 1_500_000),
        ("_defer", "raises", 1_500_000),
        ("_copy", "raises", 10),
    ],
)
def test_poison_behind_the_reply_is_not_sent_again(name: str, mistake: str, size: int) -> None:
    """Who has it has it once, whatever fails; the rest is tried three times, and set aside; others' mail flows."""
    to = ("yes@x.example", "no@x.example", *([] if name.startswith("_end") else ["later@x.example"]))
    # It counts once: one more fits.
    with Scripted(answers) as server, Host(mta=server.url, default=[f"{len(to) + 1}/1h"]) as host:
        host.add(VHOST)
        host.send(VHOST, message=text(*to, subject="POISON", body="x" * 70 + "\n" + "y\n" * (size // 2)))
        host.send(VHOST, message=text("good@x.example", subject="good"))
        for _ in range(4):
            assert run_broken(host, name, mistake) == 0
        assert server.copies == Counter({"yes@x.example": 1, "good@x.example": 1})
        (left,) = host.ls()
        assert left.startswith("corrupt/")
        log = Counter((row["event"], row["recipient"].partition("@")[0]) for row in host.rows() if row["event"] != "corrupt")
        wanted = {("released", "yes"): 1, ("released", "good"): 1, ("failed", "no"): 1}
        assert log == {**wanted, **({} if name.startswith("_end") else {("unknown", "later"): 1})}
        assert server.count(b"RCPT TO:<no") == 1
        assert host.releaser("--once").returncode == 0
        assert host.ls() == [left] and server.copies["yes@x.example"] == 1


def test_poison_behind_the_reply_is_no_worry_where_all_have_it() -> None:
    """Nothing is left to do but to forget it."""
    with Scripted() as server, Host(mta=server.url) as host:
        host.add(VHOST)
        host.send(VHOST, message=text("yes@x.example", subject="POISON"))
        assert run_broken(host, "_settle", "raises") == 0
        assert (host.ls(), server.copies) == ([], Counter({"yes@x.example": 1}))
        assert [row["event"] for row in host.rows()] == ["released"]


@pytest.mark.parametrize("name", ["_outcome", "_defer", "_retry_one"])
def test_poison_in_active_is_held(name: str) -> None:
    """What has waited for the MTA is held, with that reason, when our own code has failed at it three times."""
    replies = {b"RCPT TO:<later": b"450 later", b"RCPT TO:<no": b"450 later"}
    with Scripted(lambda line: replies.get(line.partition(b"@")[0], YES)) as server, Host(mta=server.url) as host:
        host.add(VHOST)
        host.send(VHOST, message=text("later@x.example", "no@x.example", subject="POISON"))
        assert host.releaser("--once").returncode == 0
        (left,) = host.ls()
        assert left.startswith("active/")
        replies[b"RCPT TO:<no"] = b"550 no"
        for _ in range(4):
            due(host)
            assert run_broken_at(host, name) == 0
        (held,) = host.held()
        assert host.ls() == [f"hold/{held}"]
        (row,) = [row for row in host.rows("held") if row["recipient"] == "later@x.example"]
        assert "failed at it 3 times" in row["reason"]
        replies.clear()
        host.cli("hold", "release", held)
        assert host.releaser("--once").returncode == 0
        # Those that the MTA has refused stay where their words are.
        assert server.copies["later@x.example"] == 1 and host.ls() == [f"failed/{held}" for _ in host.rows("failed")]


def run_broken_at(host: Host, name: str) -> int:
    """The daemon that fails whenever it comes to NAME."""
    code = (
        "from releaser import daemon\nfrom releaser.handover import HandOver\n"
        f"def broken(*_, **__):\n    raise ZeroDivisionError\nHandOver.{name} = broken\ndaemon.main()\n"
    )
    return subprocess.run(
        [BIN / "python", "-c", code, "--config", host.config, "--once"], capture_output=True, timeout=60
    ).returncode


@pytest.mark.parametrize(
    ("name", "mistake"), [("_outcome", "dies"), ("_put_down", "raises"), ("_put_down", "runs out of memory")]
)
def test_poison_that_ends_the_daemon_behind_the_reply(name: str, mistake: str) -> None:
    """Nobody knows then what the MTA has said: it is sent again, and said so, but not for ever; then it is set aside."""
    with Scripted() as server, Host(mta=server.url) as host:
        host.add(VHOST)
        host.send(VHOST, message=text("yes@x.example", subject="POISON"))
        host.send(VHOST, message=text("good@x.example", subject="good"))
        for _ in range(3):
            assert run_broken(host, name, mistake) != 0
        assert run_broken(host, name, mistake) == 0
        assert server.copies == Counter({"yes@x.example": 3, "good@x.example": 1})
        (left,) = host.ls()
        assert left.startswith("corrupt/")
        log = Counter((row["event"], row["recipient"].partition("@")[0]) for row in host.rows() if row["event"] != "corrupt")
        assert log == {("unknown", "yes"): 1, ("released", "good"): 1}


def test_poison_among_decisions_stops_no_other() -> None:
    """A decision that our own code cannot carry out waits; the others are carried out, and it is, with the mistake mended."""
    with Host(default=["0/1h"]) as host:
        host.add(VHOST)
        for subject in ("POISON", "good"):
            host.send(VHOST, message=text("one@x.example", subject=subject))
        assert host.releaser("--once").returncode == 0
        host.cli("hold", "release", "--all", "--yes")
        assert run_broken(host, "_carry_out", "raises", "release", "Releaser") == 0
        assert host.subjects() == ["good"] and len(host.held()) == 1
        assert host.releaser("--once").returncode == 0
        assert host.subjects() == ["POISON", "good"] and host.ls() == []


def test_poison_without_a_record_stops_no_start() -> None:
    """A held file that our own code fails at, with the ledger lost: it stays, said, and the others are held as before."""
    with Host(default=["0/1h"]) as host:
        host.add(VHOST)
        for subject in ("POISON", "good"):
            host.send(VHOST, message=text("one@x.example", subject=subject))
        assert host.releaser("--once").returncode == 0
        for file in host.state.iterdir():
            file.unlink()
        assert run(host, "raises").returncode == 0
        assert len(host.held()) == 1 and len(host.ls()) == 2
        assert host.releaser("--once").returncode == 0
        assert len(host.held()) == 2
