"""A message at which our own code fails, by an error or by the end of the whole process; the MTA is a maildir."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from host import BIN, Host, text

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
        "d, e = sys.argv[1], ('v' * 253, b'\\xff' * 255); hand = InHand(d, Ledger(d, create=True)); assert hand.may(*e); "
        "again = InHand(d, Ledger(d)); assert Ledger(d).poison() == {e: 1}; assert len(e[0]) + 1 + len(e[1]) < SIZE"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
