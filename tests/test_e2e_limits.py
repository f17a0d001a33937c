"""Limits: what goes out, what is held and why, on the real commands with a maildir as the MTA."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from host import ENQUEUE, Host, text

VHOST = "www.a.example"


def several(host: Host, vhost: str, count: int, recipients: int = 1, name: str = "mail") -> None:
    """Sends that many messages, one after the other, with subjects "mail 1" and so on."""
    to = [f"{letter}@x.example" for letter in "abcdefghij"[:recipients]]
    for number in range(1, count + 1):
        host.send(vhost, message=text(*to, subject=f"{name} {number}"))


def settled(host: Host, count: int) -> Counter[str]:
    """Waits until so many messages have an outcome; how many were released and held."""

    def outcomes() -> dict[str, str]:
        return {row["queue_id"]: row["event"] for row in host.rows("released", "held")}

    host.wait(lambda: len(outcomes()) >= count, f"{count} messages have an outcome")
    host.wait_until_idle()
    return Counter(outcomes().values())


def stamp(row: dict[str, Any]) -> float:
    return datetime.fromisoformat(row["logged_at"]).timestamp()


def wait_for_time(host: Host, time: float) -> None:
    host.wait(lambda: datetime.now(UTC).timestamp() > time, "the window has passed", timeout=40)


def check_windows(rows: list[dict[str, Any]], *windows: tuple[int, float, str]) -> None:
    """Each released recipient was within all windows, and each held one was over the window that its reason names."""
    sent: list[float] = []
    for row in rows:
        now = stamp(row)
        over = [name for most, length, name in windows if sum(now - length < each for each in sent) + 1 > most]
        if row["event"] == "released":
            assert not over, (row, sent)
            sent.append(now)
        else:
            assert over and over[0] in row["reason"], (row, sent)


def test_limits_of_two_windows_hold_and_free_up() -> None:
    """3 in 10 s and 5 in 30 s: three go out, later two more, then the long window holds; a restart changes nothing."""
    with Host(default=["3/10s", "5/30s"]) as host:
        host.add(VHOST)
        host.start()
        several(host, VHOST, 5, name="first")
        assert settled(host, 5) == {"released": 3, "held": 2}
        assert host.subjects() == ["first 1", "first 2", "first 3"]
        assert all("3/10s" in row["reason"] for row in host.rows("held"))
        # Restarted within the short window, once in good order and once not.
        assert host.stop() == 0
        host.start()
        several(host, VHOST, 1, name="second")
        settled(host, 6)
        host.kill()
        host.start()
        several(host, VHOST, 1, name="third")
        settled(host, 7)
        released = host.rows("released")
        check_windows(host.rows("released", "held"), (3, 10, "3/10s"), (5, 30, "5/30s"))
        assert len(released) == 3
        wait_for_time(host, stamp(released[-1]) + 10)
        several(host, VHOST, 4, name="fourth")
        assert settled(host, 11)["released"] == 5
        assert host.subjects()[3:] == ["fourth 1", "fourth 2"]
        assert all("5/30s" in row["reason"] for row in host.rows("held")[-2:])
        host.kill()
        host.start()
        several(host, VHOST, 1, name="fifth")
        assert settled(host, 12)["released"] == 5
        check_windows(host.rows("released", "held"), (3, 10, "3/10s"), (5, 30, "5/30s"))
        # The long window is a sliding one: it frees up with the first that leaves it.
        wait_for_time(host, stamp(released[-1]) + 30)
        several(host, VHOST, 1, name="sixth")
        assert settled(host, 13)["released"] == 6
        assert "sixth 1" in host.subjects()
        # What is held is not sent because a window opens.
        assert len(host.held()) == 7
        assert host.stop() == 0


@pytest.mark.parametrize("end", [Host.stop, Host.kill], ids=["stop", "kill"])
def test_limits_survive_a_restart(end: Callable[[Host], object]) -> None:
    """What went out before the releaser ended still counts when it is back, and what came in between is held."""
    with Host(default=["3/1h"]) as host:
        host.add(VHOST)
        host.start()
        several(host, VHOST, 2, name="before")
        assert settled(host, 2) == {"released": 2}
        end(host)
        several(host, VHOST, 2, name="between")
        host.start()
        assert settled(host, 4) == {"released": 3, "held": 1}
        end(host)
        host.start()
        several(host, VHOST, 1, name="after")
        assert settled(host, 5) == {"released": 3, "held": 2}
        assert host.subjects() == ["before 1", "before 2", "between 1"]
        assert [window["used"] for window in host.json("limits", "show", VHOST)["windows"]] == [3]


def test_limits_count_recipients() -> None:
    """A mail to five uses five; the next one is held."""
    with Host(default=["5/1h"]) as host:
        host.add(VHOST)
        with host.running():
            several(host, VHOST, 1, recipients=5, name="five")
            several(host, VHOST, 1, name="one")
            assert settled(host, 2) == {"released": 1, "held": 1}
            assert host.subjects() == ["five 1"]
            assert len(host.rows("released")) == 5


def test_limits_hold_a_mail_larger_than_the_limit_and_go_on() -> None:
    """A mail to more than the limit allows is held at once; it uses nothing, and blocks nothing."""
    with Host(default=["5/1h"]) as host:
        host.add(VHOST)
        with host.running():
            several(host, VHOST, 1, recipients=6, name="six")
            several(host, VHOST, 1, recipients=5, name="five")
            assert settled(host, 2) == {"held": 1, "released": 1}
            assert host.subjects() == ["five 1"]
            (held,) = host.json("hold", "list")
            assert (held["subject"], len(held["recipients"])) == ("six 1", 6)
            assert "5/1h" in held["reason"]


def test_limits_hold_only_what_does_not_fit() -> None:
    """A mail that would exceed the limit is held whole, and a smaller one behind it still goes out."""
    with Host(default=["5/1h"]) as host:
        host.add(VHOST)
        with host.running():
            several(host, VHOST, 1, recipients=3, name="three")
            several(host, VHOST, 1, recipients=3, name="again")
            several(host, VHOST, 1, recipients=2, name="two")
            assert settled(host, 3) == {"released": 2, "held": 1}
            assert host.subjects() == ["three 1", "two 1"]


def test_limits_count_a_repeated_recipient_once() -> None:
    """The same recipient in To:, Cc: and Bcc: is one: counted once, and sent to once."""
    with Host(default=["2/1h"]) as host:
        host.add(VHOST)
        with host.running():
            message = text("a@x.example", "a@X.example", headers="Cc: a@x.example\nBcc: <a@x.example>, b@x.example\n")
            host.send(VHOST, message=message)
            settled(host, 1)
            assert sorted(row["recipient"].lower() for row in host.rows("released")) == ["a@x.example", "b@x.example"]


@pytest.mark.parametrize(
    ("words", "message", "count"),
    [
        (["-t"], "To: " + ",\n\t".join(f"r{number}@x.example" for number in range(200)) + "\n\ntext\n", 200),
        (["-i", "a@x.example", "b@x.example,c@x.example"], "To: nobody@x.example\n\ntext\n", 3),
        (["-t", "A <a@X.example>"], "To: a@x.example\nCc: (a) a@x.EXAMPLE\nBcc: <a@x.example>\n\ntext\n", 1),
    ],
    ids=["folded", "arguments", "the same"],
)
def test_limits_count_what_the_command_is_told(words: list[str], message: str, count: int) -> None:
    """Recipients on 200 lines are 200, three in the arguments three, and one that is named everywhere is one."""
    with Host(default=[f"{count}/1h"]) as host:
        host.add(VHOST)
        host.send(VHOST, *words, message=message.encode())
        assert host.releaser("--once").returncode == 0
        assert host.json("limits", "show", VHOST)["windows"][0]["used"] == count
        assert len({row["recipient"] for row in host.rows("released")}) == len(host.rows("released")) == count


def test_limits_count_messages() -> None:
    """With count = "messages" a mail to five is one."""
    with Host(default=["2/1h"], extra='count = "messages"\n') as host:
        host.add(VHOST)
        with host.running():
            several(host, VHOST, 3, recipients=5)
            assert settled(host, 3) == {"released": 2, "held": 1}
            assert host.json("limits", "show", VHOST)["count"] == "messages"


def test_limits_unlimited() -> None:
    """A vhost that is unlimited sends all, while the default holds for others."""
    with Host(default=["1/1h"], extra=f'[vhosts."{VHOST}"]\nlimits = ["unlimited"]\n') as host:
        host.add(VHOST, "www.b.example")
        with host.running():
            several(host, VHOST, 10, recipients=5, name="free")
            several(host, "www.b.example", 2, name="limited")
            assert settled(host, 12) == {"released": 11, "held": 1}
            assert [row["vhost"] for row in host.json("hold", "list")] == ["www.b.example"]


def test_limits_of_zero_hold_everything() -> None:
    """ "0/1h" sends nothing, and loses nothing."""
    with Host(default=["0/1h"]) as host:
        host.add(VHOST)
        with host.running():
            several(host, VHOST, 3)
            assert settled(host, 3) == {"held": 3}
            assert (host.mail(), len(host.held())) == ([], 3)
            assert all("0/1h" in row["reason"] for row in host.rows("held"))


def test_limits_observe_sends_all_and_says_what_it_would_hold() -> None:
    """With over_limit = "observe" all goes out; log and releaser name what would have been held, status that it is on."""
    with Host(default=["2/1h"], extra='over_limit = "observe"\n') as host:
        host.add(VHOST)
        with host.running():
            several(host, VHOST, 4)
            assert settled(host, 4) == {"released": 4}
            assert (len(host.mail()), host.held()) == (4, [])
            reasons = [row["reason"] for row in host.rows("released")]
            assert ["2/1h" in reason for reason in reasons] == [False, False, True, True]
            over = [row["queue_id"] for row in host.rows("released")[2:]]
            lines = [line for line in host.log().splitlines() if "2/1h" in line]
            assert all(any(queue_id in line for line in lines) for queue_id in over)
            assert VHOST in str(host.json("status")["observe"])


def test_limits_observed_mail_counts() -> None:
    """What "observe" sends is counted, so that the limit holds at once when it is switched to "hold"."""
    with Host(default=["2/1h"], extra='over_limit = "observe"\n') as host:
        host.add(VHOST)
        with host.running():
            several(host, VHOST, 2)
            settled(host, 2)
        host.configure(extra="")
        with host.running():
            several(host, VHOST, 1)
            assert settled(host, 3) == {"released": 2, "held": 1}


PATTERNS = """
[vhosts."*.a.example"]
limits = ["2/1h"]

[vhosts."w*.example"]
limits = ["9/1h"]
count = "messages"

[vhosts."*.b.example"]
limits = ["3/1h"]

[vhosts."www.a.example"]
max_message_size = "1M"

[vhosts."shop.a.example"]
limits = ["4/1h"]
count = "recipients"

[vhosts."www.b.example"]
count = "recipients"
"""


@pytest.mark.parametrize(
    ("vhost", "window", "count", "released"),
    [
        # Not named at all.
        ("www.c.test", "1/1h", "recipients", 0),
        # The exact entry has neither key; the first pattern has one of them.
        ("www.a.example", "2/1h", "messages", 2),
        # The exact entry decides both, whatever stands before it.
        ("shop.a.example", "4/1h", "recipients", 2),
        # Only a pattern; the other key comes from [limits].
        ("mail.b.example", "3/1h", "recipients", 1),
        # The first pattern in file order; the count of the exact entry.
        ("www.b.example", "9/1h", "recipients", 3),
    ],
)
def test_limits_are_looked_up_key_by_key(vhost: str, window: str, count: str, released: int) -> None:
    """For each key the exact name decides, then the first pattern in the file that has the key, then [limits]."""
    with Host(default=["1/1h"], extra=PATTERNS) as host:
        host.add(vhost)
        with host.running():
            shown = host.json("limits", "show", vhost)
            assert ([each["text"] for each in shown["windows"]], shown["count"]) == ([window], count)
            several(host, vhost, 3, recipients=2)
            assert settled(host, 3)["released"] == released


def test_limits_of_one_vhost_are_not_anothers() -> None:
    """Two vhosts under the same default have a limit each."""
    with Host(default=["2/1h"]) as host:
        host.add(VHOST, "www.b.example")
        with host.running():
            several(host, VHOST, 3, name="a")
            several(host, "www.b.example", 3, name="b")
            assert settled(host, 6) == {"released": 4, "held": 2}
            assert host.subjects() == ["a 1", "a 2", "b 1", "b 2"]


@pytest.mark.parametrize("running", [True, False], ids=["running", "piled-up"])
def test_limits_are_exact_with_many_senders_at_once(running: bool) -> None:
    """Of 20 that are enqueued at the same time exactly 10 go out, the releaser running or finding them all there."""
    with Host(default=["10/1h"]) as host:
        host.add(VHOST)
        if running:
            host.start()
        senders = [
            subprocess.Popen([ENQUEUE, "--spool", host.spool, VHOST], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
            for _ in range(20)
        ]
        # All have been started before the first one gets its message.
        for number, sender in enumerate(senders):
            assert sender.stdin
            sender.stdin.write(text("a@x.example", subject=f"at once {number}"))
            sender.stdin.flush()
        for sender in senders:
            assert (sender.communicate(timeout=60)[1], sender.returncode) == (b"", 0)
        if not running:
            host.start()
        assert settled(host, 20) == {"released": 10, "held": 10}
        assert (len(host.mail()), len(host.held()), len(host.ls())) == (10, 10, 10)
        assert host.stop() == 0


def test_limits_of_piled_up_mail_follow_the_order_of_arrival() -> None:
    """What was enqueued first goes out, when more than the limit has piled up while the releaser was down."""
    with Host(default=["4/1h"]) as host:
        host.add(VHOST)
        several(host, VHOST, 9)
        with host.running():
            assert settled(host, 9) == {"released": 4, "held": 5}
            assert host.subjects() == [f"mail {number}" for number in (1, 2, 3, 4)]
            assert [row["subject"] for row in host.json("hold", "list")] == [f"mail {number}" for number in (5, 6, 7, 8, 9)]
