"""Start, end and company of the releaser; the MTA is a maildir."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from host import RELEASER, Host, text

VHOST = "www.a.example"


def test_daemon_has_its_spool_for_itself(host: Host) -> None:
    """A second releaser refuses with 69 and a sentence while the first goes on; after kill -9 the next starts at once."""
    host.start()
    first = host.pid
    for words in ([], ["--once"]):
        run = host.releaser(*words)
        assert (run.returncode, run.stdout, run.stderr.count("\n")) == (69, "", 1), run
        assert "releaser" in run.stderr
    host.send(VHOST)
    host.wait_for_mail(1)
    assert host.pid == first
    host.kill()
    assert host.json("status")["running"] is False
    host.start()
    host.send(VHOST)
    host.wait_for_mail(2)
    assert host.stop() == 0


def test_daemon_is_alone_whatever_its_state_directory(host: Host) -> None:
    """Another configuration with the same spool makes no second releaser of it."""
    with host.running():
        other = host.config.with_name("other.toml")
        other.write_text(host.config.read_text().replace(str(host.state), f"{host.state}2"))
        (host.directory / "state2").mkdir(mode=0o700)
        words = [str(RELEASER), "--config", str(other), "--once"]
        run = subprocess.run(words, capture_output=True, text=True, timeout=30)
        assert (run.returncode, run.stderr.count("\n")) == (69, 1), run


def test_daemon_ends_at_once_when_idle(host: Host) -> None:
    """SIGTERM and SIGINT end an idle releaser with 0, and status says that it is not running."""
    for number in (signal.SIGTERM, signal.SIGINT):
        host.start()
        assert host.json("status")["running"] is True
        host.signal(number)
        assert host.ended() == 0
        assert host.json("status")["running"] is False


def test_daemon_once(host: Host) -> None:
    """--once sends what is there, holds what is over, and ends with 0, also where mail stays held."""
    host.configure(default=["2/1h"])
    for number in range(3):
        host.send(VHOST, message=text("one@x.example", subject=f"mail {number}"))
    run = host.releaser("--once")
    assert run.returncode == 0, run
    assert host.subjects() == ["mail 0", "mail 1"]
    (queue_id,) = host.held()
    assert host.ls() == [f"hold/{queue_id}"]
    assert host.releaser("--once").returncode == 0
    host.cli("hold", "release", queue_id)
    assert host.releaser("--once").returncode == 0
    assert (host.subjects(), host.ls()) == (["mail 0", "mail 1", "mail 2"], [])


def test_daemon_takes_up_a_vhost_that_is_added_while_it_runs(host: Host) -> None:
    """A vhost added to a running installation is served without a restart."""
    with host.running():
        host.add("www.new.example")
        host.send("www.new.example", message=text("one@x.example", subject="new"))
        host.wait_for_mail(1, timeout=45)
        assert host.subjects() == ["new"]
        assert "www.new.example" in [vhost["name"] for vhost in host.json("vhost", "list")]


def test_daemon_finds_mail_without_a_bell(host: Host) -> None:
    """Mail that rang no bell is found by the scan."""
    with host.running():
        (host.spool / "vhosts" / VHOST / "policy").unlink()
        host.send(VHOST)
        host.wait_for_mail(1, timeout=45)


# Another thread gets the signals, as it is where one arrives in the instant before the main thread begins to wait.
ELSEWHERE = """
import runpy, signal, sys, threading, time
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_daemon_hears_a_signal_however_it_waits(host: Host) -> None:
    """A signal does not wait for the next scan, although it has interrupted no system call of the main thread."""
    host.through = [sys.executable, "-c", ELSEWHERE]
    host.start()
    host.wait_for_log("started")
    host.signal(signal.SIGHUP)
    host.wait_for_log("configuration loaded", timeout=10)
    assert host.stop(timeout=10) == 0


def test_daemon_sleeps_when_there_is_nothing_to_do(host: Host) -> None:
    """An idle releaser uses next to no processor time, also with held mail and an MTA that has deferred nothing."""
    host.configure(default=["0/1h"])
    host.send(VHOST)
    with host.running():
        host.wait(host.held, "it is held")
        host.wait_until_idle()

        before = host.cpu
        time.sleep(3)
        assert host.cpu - before < 0.6


def test_daemon_removes_what_its_crash_left(host: Host) -> None:
    """A copy that was being written when the releaser was killed is nobody's, and is gone after the next start."""
    for queue in ("active", "hold", "failed"):
        (host.spool / queue / ".0660E2E85F2C029E9").write_bytes(b"Layout: 1\nVhost: www.a.")
    host.send(VHOST)
    with host.running():
        host.wait_for_mail(1)
        host.wait_until_idle()
        host.wait(lambda: host.ls() == [], "the leftovers are gone")


def test_daemon_leaves_alone_what_is_being_written(host: Host) -> None:
    """A file in tmp/ is its writer's, however odd its name and time: nothing of it is sent, and it stays."""
    tmp = host.spool / "vhosts" / VHOST / "tmp"
    for name in ("1795376167.011099.P3395.2bad27e5dbb62169d779a57a", "1000000000.000000.P1.000000000000000000000000", "odd"):
        (tmp / name).write_bytes(b"Layout: 1\n")
        os.utime(tmp / name, (1, 1))
    host.send(VHOST)
    with host.running():
        host.wait_for_mail(1)
        host.wait(lambda: len(host.ls()) == 3, "the other is out")
        assert len(list(tmp.iterdir())) == 3
