"""No room: on the disk, of inodes, in the error log, among the open files, in memory.

Nothing is lost or sent twice, and it goes on by itself.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from host import Host, smtp, subject, text
from servers import Sink

pytestmark = pytest.mark.server

VHOST = "www.a.example"
# Work goes on to the last byte.
UNWATCHED = 'min_free = "0"\n'
NO_ROOM = "no mail is taken until there is room again"


@contextmanager
def small(directory: Path, size: str = "4m", inodes: int = 5000) -> Iterator[Path]:
    """Makes DIRECTORY a file system that is soon full; gives the path of a ballast file on it, which is empty."""
    directory.mkdir(mode=0o711, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes={inodes},mode=0711", "tmpfs", str(directory)]
    subprocess.run(command, check=True)
    try:
        yield directory / "ballast"
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(ballast: Path) -> None:
    """Leaves no byte."""
    with ballast.open("ab", buffering=0) as stream, pytest.raises(OSError, match="No space left"):
        while True:
            stream.write(b"x" * 1000)


def fill_inodes(ballast: Path) -> None:
    """Leaves no inode."""
    ballast.mkdir()
    with pytest.raises(OSError, match="No space left"):
        for number in itertools.count():
            (ballast / str(number)).touch()


def said(host: Host) -> int:
    return host.log().count(NO_ROOM)


def test_no_room_in_the_spool_for_what_is_held() -> None:
    """Mail over the limit stays in new/ until its copy can be made; that is said once, and other mail waits with it."""
    with Host(default=["1/1h"], extra=UNWATCHED) as host, small(host.spool) as ballast:
        host.add(VHOST)
        for number in range(3):
            host.send(VHOST, message=text("one@x.example", subject=str(number)))
        fill(ballast)
        with host.running():
            host.wait_for_mail(1)
            host.wait_for_log(NO_ROOM)
            # Some tries later.
            host.wait(lambda: len(host.ls()) == 2, "two are left in new/")
            assert all(name.startswith("vhosts/") for name in host.ls() if name != "ballast")
            # What has gone out has left room.
            fill(ballast)
            assert host.enqueue(VHOST).returncode in (73, 74)
            ballast.unlink()
            host.wait(lambda: len(host.held()) == 2, "they are held")
            host.wait_until_idle()
            assert host.is_running() and said(host) == 1
        assert Counter(row["event"] for row in host.rows()) == {"released": 1, "held": 2}
        assert [name.partition("/")[0] for name in host.ls()] == ["hold", "hold"]


@pytest.mark.parametrize("end", ["goes on", "is killed"])
@pytest.mark.parametrize("size", [100, 1_500_000])
def test_no_room_in_the_spool_for_what_the_mta_has_refused(sink: Sink, size: int, end: str) -> None:
    """What the MTA has said is written down at once: it is not asked again, also by the next releaser."""
    sink.stop()
    sink.options = ["-f", "DATA"]
    sink.start()
    with Host(mta=smtp(sink.port), extra=UNWATCHED) as host, small(host.spool, "6m") as ballast:
        host.add(VHOST)
        host.send(VHOST, message=text("one@x.example", "two@x.example", body="x" * size + "\n"))
        if size < 1 << 20:
            fill(ballast)
        else:
            # Room for the copy in active/, and not for another in failed/.
            with ballast.open("wb") as stream:
                stream.write(bytes((6 << 20) - 2 * size - 400_000))
        with host.running():
            host.wait_for_log(NO_ROOM)
            if end == "is killed":
                host.kill()
                host.start()
                host.wait(lambda: said(host) == 2, "the next one has no room either")
            ballast.unlink()
            host.wait(lambda: [n.partition("/")[0] for n in host.ls()] == ["failed"], "it lies in failed/")
            host.wait_until_idle()
        assert Counter((row["event"], row["recipient"]) for row in host.rows()) == {
            ("failed", "one@x.example"): 1,
            ("failed", "two@x.example"): 1,
        }
        assert len(host.log().split(" failed ")) == 2


def test_no_room_in_the_spool_for_what_the_mta_has_deferred(sink: Sink) -> None:
    """Deferred mail stays in new/ where it cannot be copied, and goes out from there."""
    sink.stop()
    sink.options = ["-r", "RCPT"]
    sink.start()
    with Host(mta=smtp(sink.port), extra=UNWATCHED) as host, small(host.spool) as ballast:
        host.add(VHOST)
        host.send(VHOST)
        fill(ballast)
        with host.running():
            host.wait_for_log(NO_ROOM)
            assert [name.partition("/")[0] for name in host.ls() if name != "ballast"] == ["vhosts"]
            ballast.unlink()
            host.wait(lambda: [n.partition("/")[0] for n in host.ls()] == ["active"], "it waits in active/")
            sink.stop()
            sink.options = []
            sink.start()
            assert sink.wait(1, timeout=40)
            host.wait_until_idle()
        assert Counter(row["event"] for row in host.rows()) == {"deferred": 1, "released": 1}


def test_no_room_in_the_ledger(sink: Sink) -> None:
    """No mail is begun that cannot be written down; what the MTA says meanwhile waits until it can be, and nothing spins."""
    sink.stop()
    sink.options = ["-W", ".:4"]
    sink.start()
    with Host(mta=smtp(sink.port)) as host, small(host.state, "3m") as ballast:
        host.add(VHOST, "www.b.example")
        with host.running():
            host.send(VHOST, message=text("one@x.example", subject="under way"))
            time.sleep(1)
            host.send("www.b.example", message=text("one@x.example", subject="under way, behind it"))
            host.wait(lambda: host.rows() == [] and len(sink.messages()) == 2, "the MTA has both", timeout=40)
            fill(ballast)
            for number in range(3):
                host.send(VHOST, message=text("one@x.example", subject=str(number)))
            host.wait_for_log(NO_ROOM)
            assert len(host.ls()) == 5 and len(sink.messages()) == 2
            # The MTA has answered by then, to one behind the other.
            time.sleep(5)
            before = host.cpu
            time.sleep(3)
            assert host.cpu - before < 0.6
            ballast.unlink()
            sink.wait(5, timeout=60)
            host.wait_until_idle(60)
            assert host.is_running() and said(host) == 1
        assert Counter(row["event"] for row in host.rows()) == {"released": 5}
        assert len(sink.messages()) == 5 and host.ls() == []


def test_no_room_among_the_open_files() -> None:
    """Too many open files: mail waits in new/, and goes out when there may be more."""
    with Host() as host:
        host.add(VHOST)
        with host.running():
            host.send(VHOST)
            host.wait_for_mail(1)
            host.wait_until_idle()
            open_now = len(list(Path(f"/proc/{host.pid}/fd").iterdir()))
            subprocess.run(["prlimit", f"--pid={host.pid}", f"--nofile={open_now}:4096"], check=True)
            host.send(VHOST)
            host.wait_for_log(NO_ROOM)
            assert len(host.mail()) == 1
            subprocess.run(["prlimit", f"--pid={host.pid}", "--nofile=1024:4096"], check=True)
            host.wait_for_mail(2)
            host.wait_until_idle()
            assert host.is_running() and said(host) == 1
        assert Counter(row["event"] for row in host.rows()) == {"released": 2}


def test_no_inode_in_the_spool_for_what_is_held() -> None:
    """The same as without space; enqueue says 73."""
    with Host(default=["1/1h"], extra=UNWATCHED) as host, small(host.spool, inodes=100) as ballast:
        host.add(VHOST)
        for number in range(3):
            host.send(VHOST, message=text("one@x.example", subject=str(number)))
        fill_inodes(ballast)
        with host.running():
            host.wait_for_mail(1)
            host.wait_for_log(NO_ROOM)
            # What has gone out has left one.
            (ballast / "last").touch()
            assert host.enqueue(VHOST).returncode == 73
            subprocess.run(["rm", "-r", ballast], check=True)
            host.wait(lambda: len(host.held()) == 2, "they are held")
            host.wait_until_idle()
            assert host.is_running() and said(host) == 1
        assert Counter(row["event"] for row in host.rows()) == {"released": 1, "held": 2}


def test_no_inode_for_the_ledger() -> None:
    """A releaser that runs needs none; one that is started says so and ends with 74, until there is one."""
    with Host() as host, small(host.state, inodes=20) as ballast:
        host.add(VHOST)
        with host.running():
            fill_inodes(ballast)
            host.send(VHOST)
            host.wait_for_mail(1)
            host.wait_until_idle()
        host.send(VHOST)
        fill_inodes(host.state / "more")
        run = host.releaser("--once")
        assert run.returncode == 74 and len(run.stderr.splitlines()) == 1, run
        assert [name.partition("/")[0] for name in host.ls()] == ["vhosts"]
        subprocess.run(["rm", "-r", ballast, host.state / "more"], check=True)
        with host.running():
            host.wait_for_mail(2)
            host.wait_until_idle()
        assert Counter(row["event"] for row in host.rows()) == {"released": 2}


@pytest.mark.parametrize("what", ["space", "inode"])
def test_no_room_for_the_error_log(what: str) -> None:
    """The warning is on stderr alone, that it is there is said once, and mail is held as before; later ones are written."""
    vhosts = [VHOST, "www.b.example", "www.c.example"]
    with Host(default=["0/1h"]) as host:
        log = host.directory / "log"
        host.configure(extra=f'[log]\nerror_log = "{log}/error.log"\n')
        host.add(*vhosts)
        with small(log, inodes=20) as ballast:
            (fill if what == "space" else fill_inodes)(ballast)
            with host.running():
                for vhost in vhosts[:2]:
                    host.send(vhost)
                    host.wait_for_log(f"domain {vhost}: exceeded limit")
                host.wait(lambda: len(host.held()) == 2, "both are held")
                assert host.log().count("the error log cannot be written") == 1
                subprocess.run(["rm", "-r", ballast], check=True)
                host.send(vhosts[2])
                host.wait(lambda: len(host.held()) == 3, "the third is held")
                host.wait_until_idle()
                assert host.is_running()
            (line,) = (log / "error.log").read_text().splitlines()
            assert f"domain {vhosts[2]}: exceeded limit" in line


@pytest.mark.parametrize("kind", ("maildir", "smtp"))
def test_no_room_in_memory(kind: str, sink: Sink) -> None:
    """A message that there is no memory for stays in new/, others go out, and it does when there is; nothing ends."""
    with Host(mta=smtp(sink.port) if kind == "smtp" else "") as host:

        def subjects() -> list[str]:
            return sorted(subject(message.data) for message in sink.messages()) if kind == "smtp" else host.subjects()

        def wait_for(count: int) -> None:
            host.wait(lambda: len(subjects()) == count, f"{count} messages have arrived")

        host.add(VHOST, "www.b.example")
        with host.running():
            host.send(VHOST)
            wait_for(1)
            host.wait_until_idle()
            status = Path(f"/proc/{host.pid}/status").read_text()
            size = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize:"))
            # A quarter of what the message needs.
            subprocess.run(["prlimit", f"--pid={host.pid}", f"--as={size * 1024 + 500_000}:"], check=True)
            host.send(VHOST, message=text("one@x.example", subject="large", body="x" * 70 + "\n" + "y" * 1_000_000 + "\n"))
            host.wait_for_log("MemoryError")
            host.send("www.b.example", message=text("one@x.example", subject="small"))
            wait_for(2)
            assert subjects() == ["small", "subject"] and host.is_running()
            subprocess.run(["prlimit", f"--pid={host.pid}", "--as=unlimited:"], check=True)
            os.utime(host.spool / "wake/control")
            wait_for(3)
            host.wait_until_idle()
        assert Counter(row["event"] for row in host.rows()) == {"released": 3}
