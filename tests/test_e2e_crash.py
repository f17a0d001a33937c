"""kill -9 and an MTA that is away, under load: nothing is lost, and what is sent twice is said to be."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from host import Host, smtp, subject, text
from servers import Postfix, Sink

pytestmark = pytest.mark.server

VHOSTS = [f"www{number}.a.example" for number in range(5)]


def message_id(data: bytes) -> str:
    match = re.search(rb"^Message-ID: (<[^\n]*>)$", data.partition(b"\n\n")[0], re.MULTILINE)
    assert match, data
    return match[1].decode()


@contextmanager
def sending(host: Host, count: int, vhosts: list[str]) -> Iterator[list[Future[None]]]:
    """Sends that many messages in the background, from two processes at a time; all have been accepted at the end."""
    with ThreadPoolExecutor(2) as pool:
        sent = [
            pool.submit(host.send, vhosts[number % len(vhosts)], message=text("one@x.example", subject=f"mail {number}"))
            for number in range(count)
        ]
        yield sent
        for each in sent:
            each.result()


def process_of(server: Sink) -> int:
    """The process group of a server, for signals."""
    return server._processes[0].server.pid


def test_crash_under_load_loses_nothing() -> None:
    """Killed four times amid 300 mails of several vhosts: all arrive; what arrives twice has a row `retried`."""
    count = 300
    # Now and then an answer takes a second, so that there is always something in flight.
    with Sink(options=["-W", ".:1:3"]) as sink, Host(mta=smtp(sink.port)) as host:
        host.add(*VHOSTS)
        with sending(host, count // 2, VHOSTS):
            pass
        host.start()
        with sending(host, count, VHOSTS) as sent:
            # Half of the subjects come a second time, with another Message-ID.
            for threshold in (30, 110, 190, 270):
                sink.wait(threshold, timeout=60)
                # The sink has messages of which it has not told the releaser.
                os.kill(process_of(sink), signal.SIGSTOP)
                host.kill()
                os.kill(process_of(sink), signal.SIGCONT)
                host.start()
            assert len(sent) == count
        host.wait_until_idle(60)
        arrived = Counter(message_id(message.data) for message in sink.messages())
        assert len(arrived) == count + count // 2
        assert {subject(message.data) for message in sink.messages()} == {f"mail {number}" for number in range(count)}
        copies = {(message_id(message.data), message.data) for message in sink.messages()}
        assert len(copies) == len(arrived)
        twice = {name for name, times in arrived.items() if times > 1}
        assert twice <= {row["message_id"] for row in host.rows("retried")}
        assert Counter(row["message_id"] for row in host.rows("released")) == dict.fromkeys(arrived, 1)
        assert host.ls() == []
        assert host.stop() == 0


def test_crash_at_random_points_loses_nothing() -> None:
    """Killed again and again as soon as it is at work, with a quick sink: every mail arrives, nothing is left."""
    count = 200
    with Sink() as sink, Host(mta=smtp(sink.port)) as host:
        host.add(*VHOSTS)
        with sending(host, count, VHOSTS) as sent:
            sent[40].result()
            for number in range(12):
                process = host.launch()
                before = len(sink.messages())
                end = time.monotonic() + 10
                while len(sink.messages()) == before and len(sent) and time.monotonic() < end and host.ls():
                    time.sleep(0.003 * (number % 4))
                assert process.poll() is None
                host.kill()
        host.start()
        host.wait_until_idle(60)
        arrived = Counter(message_id(message.data) for message in sink.messages())
        subjects = {subject(message.data) for message in sink.messages()}
        # Three of the kills may have met the same mail in hand, and then nobody knows that it was not what ended the daemon.
        aside = {subject(path.read_bytes().partition(b"\n\n")[2]) for path in (host.spool / "corrupt").iterdir()}
        assert subjects | aside == {f"mail {number}" for number in range(count)}
        assert len(arrived) == len(subjects) and len(aside) <= 2
        twice = {name for name, times in arrived.items() if times > 1}
        assert twice <= {row["message_id"] for row in host.rows("retried")}
        assert len(host.ls()) == len(aside) == len({row["queue_id"] for row in host.rows("corrupt")})
        assert host.stop() == 0


def test_crash_loosens_no_limit() -> None:
    """Killed amid 200 mails of two vhosts with a limit of 40 each: exactly 40 different ones of each go out."""
    with Sink(options=["-W", ".:1:4"]) as sink, Host(mta=smtp(sink.port), default=["40/1h"]) as host:
        vhosts = VHOSTS[:2]
        host.add(*vhosts)
        with sending(host, 200, vhosts):
            host.start()
            for threshold in (10, 35, 60):
                sink.wait(threshold, timeout=60)
                host.kill()
                host.start()
        host.wait_until_idle(60)
        arrived = {message_id(message.data) for message in sink.messages()}
        assert len(arrived) == 80
        assert Counter(row["vhost"] for row in host.rows("released")) == dict.fromkeys(vhosts, 40)
        held = host.json("hold", "list")
        assert Counter(row["vhost"] for row in held) == dict.fromkeys(vhosts, 60)
        assert len(host.ls()) == 120
        # What is held is none of what has been sent.
        names = {host.json("hold", "show", row["queue_id"])["message_id"] for row in held[:10]}
        assert not names & arrived
        host.kill()
        host.start()
        assert len(host.ls()) == 120
        assert host.stop() == 0


def test_crash_amid_decisions() -> None:
    """Killed while a hundred decisions are carried out: each mail is sent, and not held any more."""
    with Sink(options=["-W", ".:1:5"]) as sink, Host(mta=smtp(sink.port), default=["0/1h"]) as host:
        host.add(*VHOSTS)
        with sending(host, 100, VHOSTS), host.running():
            host.wait(lambda: len(host.held()) == 100, "all are held", 60)
        host.cli("hold", "release", "--all", "--yes")
        assert sink.messages() == []
        host.start()
        for threshold in (10, 50):
            sink.wait(threshold, timeout=60)
            host.kill()
            host.start()
        host.wait(lambda: host.ls() == [], "all are out", 60)
        arrived = Counter(message_id(message.data) for message in sink.messages())
        assert {subject(message.data) for message in sink.messages()} == {f"mail {number}" for number in range(100)}
        twice = {name for name, times in arrived.items() if times > 1}
        assert twice <= {row["message_id"] for row in host.rows("retried")}
        assert host.stop() == 0


def accepted_by(postfix: Postfix) -> list[str]:
    """The Message-IDs of the messages that Postfix took, in the order in which their transactions began."""
    log = postfix.log()
    ids = dict(re.findall(r"postfix/cleanup\[\d+\]: (\w+): message-id=(<\S+>)", log))
    return [ids[queue_id] for queue_id in re.findall(r"postfix/smtpd\[\d+\]: (\w+): client=", log) if queue_id in ids]


def test_mta_away(sink: Sink, postfix: Postfix) -> None:
    """50 mails while Postfix is stopped: accepted, kept, and handed over in order of arrival when it is back."""
    with Host(mta=smtp(postfix.port)) as host:
        vhosts = VHOSTS[:2]
        host.add(*vhosts)
        with host.running():
            host.send(vhosts[0], message=text("one@x.example", subject="before"))
            sink.wait(1)
            host.wait_until_idle()
            postfix.stop()
            for number in range(50):
                host.send(vhosts[number % 2], message=text("one@x.example", subject=f"mail {number}"))
            waiting = [name for name in host.ls() if name.startswith("vhosts/")]
            assert len(waiting) == 50
            assert host.is_running()
            assert host.rows("failed", "held") == []
            postfix.start()
            sink.wait(51, timeout=60)
            host.wait_until_idle()
            assert sorted(subject(message.data) for message in sink.messages()) == sorted(
                ["before", *(f"mail {number}" for number in range(50))]
            )
            order = accepted_by(postfix)[1:]
            rows = {row["message_id"]: row for row in host.rows("released")}
            assert sorted(order) == sorted(name for name, row in rows.items() if row["subject"] != "before")
            for index, vhost in enumerate(vhosts):
                subjects = [rows[name]["subject"] for name in order if rows[name]["vhost"] == vhost]
                assert subjects == [f"mail {number}" for number in range(index, 50, 2)]
            # Its log can be searched for what ours says.
            assert all(row["mta_queue_id"] in postfix.log() for row in rows.values())


def test_mta_away_when_the_releaser_starts(sink: Sink) -> None:
    """Started before the MTA, with mail waiting: it waits, says so, and does not fill its log."""
    sink.stop()
    with Host(mta=smtp(sink.port)) as host:
        host.add(*VHOSTS)
        for number in range(20):
            host.send(VHOSTS[number % 5], message=text("one@x.example", subject=f"mail {number}"))
        with host.running():
            line = host.wait_for_log(f":{sink.port}")
            host.wait(lambda: [each for each in host.log().splitlines() if "started" not in each], "it says so")
            assert line
            assert len(host.ls()) == 20
            time.sleep(2)
            assert len(host.log().splitlines()) < 20
            sink.start()
            sink.wait(20, timeout=60)
            host.wait_until_idle()
            assert len(sink.messages()) == 20
