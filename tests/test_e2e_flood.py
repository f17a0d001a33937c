"""What a customer does to be heard more than others, or to wear the releaser out; the MTA is a maildir."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from host import Host, text
from system import PYTHON, System

pytestmark = pytest.mark.server

# Rings the bells of its arguments in turn, as fast as it can, for as many seconds as the first argument says.
FLOOD = """
import os, sys, time
until = time.monotonic() + float(sys.argv[1])
while time.monotonic() < until:
    for _ in range(1000):
        for bell in sys.argv[2:]:
            os.utime(bell)
"""


def bell(host: Host, vhost: str) -> str:
    """The path of a vhost's bell, which its users read in its policy."""
    policy = (host.spool / "vhosts" / vhost / "policy").read_text()
    return str(host.spool / "wake" / dict(line.split(": ", 1) for line in policy.splitlines())["Bell"])


def of_process(pid: int) -> tuple[float, int]:
    """The seconds of processor time that a process has used, and the bytes that it has in memory."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), int(fields[21]) * os.sysconf("SC_PAGE_SIZE")


def others_are_served(host: Host, flood: list[str], **options: str) -> None:
    """While FLOOD runs, mail of www.c2.example goes out, and the releaser neither grows nor burns a core."""
    with host.running(), subprocess.Popen(flood) as flooding:
        # Until the releaser has had enough.
        time.sleep(3)
        before, started = of_process(host.pid)[0], time.monotonic()
        slowest = 0.0
        for number in range(5):
            begin = time.monotonic()
            host.send("www.c2.example", message=text("one@x.example", subject=str(number)), **options)
            host.wait_for_mail(number + 1)
            slowest = max(slowest, time.monotonic() - begin)
        used, size = of_process(host.pid)
        share = (used - before) / (time.monotonic() - started)
        assert flooding.poll() is None, "the flood has ended too early to prove anything"
        assert slowest < 5 and share < 0.5 and size < 200 << 20, (slowest, share, size)
        assert re.search(r"bells are rung more often than mail can come.* vhost=(one|two)[.]c1[.]example", host.log())
        assert flooding.wait(60) == 0


def test_flood_of_bells_by_a_customer() -> None:
    """Two bells rung in turn without end by one customer cost another neither his mail nor its time."""
    with System() as system:
        for vhost, user in (("one.c1.example", "c1"), ("two.c1.example", "c1"), ("www.c2.example", "c2")):
            system.register(vhost, user)
        system.releaser("--once")
        bells = [bell(system, "one.c1.example"), bell(system, "two.c1.example")]
        others_are_served(system, system.words([PYTHON, "-c", FLOOD, "15", *bells], user="c1"), user="c2")


def test_flood_of_bells_in_private_mode() -> None:
    """The same with the newest watchdog, where one uid is everybody."""
    with Host() as host:
        host.add("one.c1.example", "two.c1.example", "www.c2.example")
        host.releaser("--once")
        bells = [bell(host, "one.c1.example"), bell(host, "two.c1.example")]
        others_are_served(host, [sys.executable, "-c", FLOOD, "15", *bells])


NAMES = """
import os, sys
drop, number = sys.argv[1], int(sys.argv[2])
# One that has to wait for ever, and one that is no message.
for size, claimed in ((80 << 20, 80 << 20), (5, 5)):
    base = f"{drop}/tmp/base{size}"
    with open(base, "wb") as file:
        file.truncate(size)
        os.fchmod(file.fileno(), 0o640)
    for each in range(number):
        os.link(base, f"{drop}/new/1000000000.{each:06}.P1.{size:024x},S={claimed}")
"""


def test_flood_of_names() -> None:
    """Two files with 60,000 names are two files, in the customer's quota and for us; and nobody waits meanwhile."""
    with System() as system:
        for vhost, user in (("www.c1.example", "c1"), ("www.c2.example", "c2")):
            system.register(vhost, user)
        system.python(NAMES, system.spool / "vhosts/www.c1.example", "30000", user="c1")
        with system.running():
            for number in range(3):
                begin = time.monotonic()
                system.send("www.c2.example", message=text("one@x.example", subject=str(number)), user="c2")
                system.wait_for_mail(number + 1)
                assert time.monotonic() - begin < 2
            system.wait(lambda: len(system.ls()) == 4, "each has two names, one in tmp/")
            system.send("www.c1.example", message=text("one@x.example", subject="3"), user="c1")
            system.wait_for_mail(4)
            assert system.log().count("a file with many names") == 1 and len(system.rows("corrupt")) == 1


def test_flood_of_files_that_stay() -> None:
    """12,000 files with early names that can only be left where they are keep nobody's mail in the shared maildrop waiting."""
    with System() as system:
        system.cli("vhost", "add", "--unregistered")
        code = """
import os, sys
os.chdir(sys.argv[1])
for number in range(12_000):
    content = b"Layout: 99\\n\\n"
    with open(f"1000000000.{number:06}.P1.{0:024x},S={len(content)}", "wb") as file:
        file.write(content)
        os.fchmod(file.fileno(), 0o640)
"""
        system.python(code, system.spool / "vhosts/_unregistered/new", user="c1")
        with system.running():
            for number in range(3):
                system.send("www.c2.example", message=text("one@x.example", subject=str(number)), user="c2")
                begin = time.monotonic()
                system.wait_for_mail(number + 1)
            # The first one waits until all of them have been looked at once.
            assert time.monotonic() - begin < 5
            assert len(system.ls()) == 12_000 and len(system.log().splitlines()) < 200
