"""The machine's clock put forward and back a day under the running commands, reboots and days that pass.

The clock that is put is libfaketime's, the same for the releaser and enqueue; days pass, and machines start anew, by time
namespaces of the kernel, in which CLOCK_BOOTTIME has another begin. Needs root.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Self

import pytest
from host import Host, smtp, text
from servers import YES, Answer, Scripted, Sink, free_port

# One with a window that no test outlasts, and one with a window of so many seconds.
VHOST, QUICK = "www.a.example", "www.quick.example"
WINDOW = 5
DAY = 86400


class Clocked(Host):
    """An installation whose programs have a clock that can be put."""

    def __init__(self, mta: str = "", default: tuple[str, ...] = ("3/1h",), extra: str = "") -> None:
        super().__init__(mta, default, f'{extra}[vhosts."{QUICK}"]\nlimits = ["3/{WINDOW}s"]\n')
        (library,) = Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
        self._control = self.directory / "clock"
        self.put_clock(0)
        self._settings: list[str | Path] = [
            "env",
            f"LD_PRELOAD={library}",
            f"FAKETIME_TIMESTAMP_FILE={self._control}",
            "FAKETIME_NO_CACHE=1",
            "FAKETIME_DONT_FAKE_MONOTONIC=1",
        ]
        self.through = self._settings
        self.add(VHOST, QUICK)

    def put_clock(self, seconds: int) -> None:
        """The clock differs by so much from the machine's."""
        new = self._control.with_suffix(".new")
        new.write_text(f"{seconds:+}\n")
        new.rename(self._control)

    @contextmanager
    def later(self, seconds: int) -> Iterator[Self]:
        """A releaser for which so much time has passed since the machine was started."""
        words = ["unshare", "--time", "--boottime", str(seconds), "--fork", "sh", "-c", "echo ready; read -r _"]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None and holder.stdout.readline() == b"ready\n"
            try:
                self.through = ["nsenter", f"--time=/proc/{holder.pid}/ns/time_for_children", *self._settings]
                with self.running():
                    yield self
            finally:
                self.through = self._settings

    def sends(self, messages: int, vhost: str = VHOST) -> list[str]:
        """What becomes of so many more."""
        before = len(self.rows("released", "held"))
        for number in range(messages):
            self.send(vhost, message=text("one@x.example", subject=str(number)))
        self.wait(lambda: len(self.rows("released", "held")) == before + messages, "each has an outcome")
        self.wait_until_idle()
        return [row["event"] for row in self.rows("released", "held")[before:]]


@pytest.mark.parametrize("step", [-DAY, DAY])
def test_clock_is_put(step: int) -> None:
    """What was sent still counts, no longer than the window, also for the releaser's next start; bells are not needed, and
    the log has the time that the machine says."""
    with Clocked() as host:
        with host.running():
            assert host.sends(4) == ["released"] * 3 + ["held"]
            assert host.sends(3, QUICK) == ["released"] * 3
            counted = time.monotonic()
            host.put_clock(step)
            assert host.sends(1) == ["held"]
            logged = datetime.fromisoformat(host.rows("held")[-1]["logged_at"]).timestamp()
            assert abs(logged - time.time() - step) < 3600
            assert host.json("limits", "show", VHOST)["windows"][0]["used"] == 3
            host.wait(lambda: time.monotonic() > counted + WINDOW, "the window has passed")
            assert host.sends(3, QUICK) == ["released"] * 3
            counted = time.monotonic()
        with host.running():
            assert host.sends(1) == ["held"]
            host.wait(lambda: time.monotonic() > counted + WINDOW, "the window has passed")
            assert host.sends(3, QUICK) == ["released"] * 3
            # Without a bell, as where it was lost: found by the next scan.
            place = host.spool / "vhosts" / VHOST
            policy = (place / "policy").read_bytes()
            (place / "policy").write_bytes(b"")
            host.send(VHOST, message=text("one@x.example", subject="no bell"))
            (place / "policy").write_bytes(policy)
            host.wait(lambda: len(host.rows("held")) == 4, "it was found", timeout=60)


def test_clock_is_put_while_mail_waits_for_the_mta() -> None:
    """Deferred mail is tried again after the seconds that were said, whatever the clock says meanwhile."""
    replies = iter([b"451 later"])
    with Scripted(answer_dot_with(replies)) as server, Clocked(server.url) as host, host.running():
        host.send(VHOST)
        host.wait_for_row("deferred")
        host.put_clock(-DAY)
        host.wait_for_row("released", timeout=60)
        host.put_clock(DAY)
        host.send(VHOST)
        host.wait(lambda: len(host.rows("released")) == 2, "the next one is sent")
    assert len(server.messages) == 2


def test_clock_is_put_while_there_is_no_mta() -> None:
    """The MTA is found again within its half minute."""
    port = free_port()
    with Clocked(smtp(port)) as host, host.running():
        host.send(VHOST)
        host.wait_for_log("no connection to the MTA")
        host.put_clock(-DAY)
        with Sink(port=port):
            host.wait_for_row("released", timeout=60)


def test_clock_is_put_back_before_a_closed_door() -> None:
    """A policy of yesterday's tomorrow is not believed: with no releaser the door is open at once, not a day later."""
    with Clocked(default=(f"1/{DAY}s",), extra='over_limit = "reject"\n') as host:
        with host.running():
            assert host.sends(1) == ["released"]
            host.wait(lambda: host.enqueue(VHOST).returncode == 69, "the door is closed")
        host.put_clock(-DAY)
        assert host.enqueue(VHOST).returncode == 0
        with host.running():
            host.wait(lambda: host.enqueue(VHOST).returncode == 69, "the door is closed again")


@pytest.mark.parametrize("step", [-DAY, 0])
def test_clock_of_a_machine_that_was_started_anew(step: int) -> None:
    """What was sent before counts for its window, and for no longer, however wrong the clock is then."""
    with Clocked() as host:
        with host.later(DAY):
            assert host.sends(4) == ["released"] * 3 + ["held"]
            assert host.sends(3, QUICK) == ["released"] * 3
            counted = time.monotonic()
        host.put_clock(step)
        for _ in range(2):
            with host.running():
                assert host.sends(1) == ["held"]
        with host.running():
            host.wait(lambda: time.monotonic() > counted + WINDOW, "the window has passed")
            assert host.sends(3, QUICK) == ["released"] * 3


def test_clock_of_days_at_an_mta_that_defers() -> None:
    """Each start tries what is due, and after give_up, five days, the mail is kept in failed/ with the MTA's words."""
    with Scripted(answer_dot_with(iter(lambda: b"451 still not", b""))) as server, Clocked(server.url) as host:
        with host.running():
            host.send(VHOST)
            host.wait_for_row("deferred")
        for days in (1, 4):
            with host.later(days * DAY):
                host.wait_for_log("451 still not", start=len(host.log()))
        assert [row["event"] for row in host.rows()] == ["deferred"]
        with host.later(5 * DAY + 60):
            host.wait_for_row("failed")
        (row,) = host.rows("failed")
        assert row["reason"] == "given up: 451 still not"
        (failed,) = host.json("hold", "list", "--failed")
        assert failed["queue_id"] == row["queue_id"]
        assert not server.messages


def test_clock_of_days_without_an_mta() -> None:
    """Nothing is given up that the MTA was never asked for: it goes out when the MTA is back, whenever that is."""
    port = free_port()
    with Clocked(smtp(port)) as host:
        for days in (0, 1, 9):
            with host.later(days * DAY):
                host.send(VHOST, message=text("one@x.example", subject=f"day {days}"))
                host.wait_for_log("no connection to the MTA", start=len(host.log()))
        with Sink(port=port), host.later(10 * DAY):
            host.wait(lambda: len(host.rows("released")) == 3, "all are sent", timeout=60)
        assert {row["event"] for row in host.rows()} == {"released"}


def answer_dot_with(replies: Iterator[bytes]) -> Answer:
    """A server that takes everything, once it has given those at the final dot."""

    def answer(line: bytes) -> bytes | None:
        return next(replies, YES) if line == b"." else YES

    return answer
