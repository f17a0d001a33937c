"""A vhost over its limits: told once, where people look, until it is over; one notice by mail; stop and resume."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import Host, smtp, text
from servers import Sink, wait_until

pytestmark = pytest.mark.server

VHOST, OTHER = "www.a.example", "www.b.example"
STAMP = r"\[\w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d \d{4}\]"
WARNING = re.compile(
    STAMP
    + r" \[secure-sendmail\] domain www\.a\.example: exceeded limit for 60 minutes \(2\): mail over the limit is held for review"
)
QUIET = 3


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def logs(host: Host) -> Path:
    """A directory for error logs, and a configuration that names one for all and one of the vhost."""
    logs = host.directory / "logs"
    logs.mkdir()
    host.configure(
        default=["2/1h"], extra=f'[log]\nerror_log = "{logs}/error.log"\n[vhosts."{VHOST}"]\nerror_log = "{logs}/a.log"\n'
    )
    return logs


def test_warning_is_written_once_and_repeated_to_the_sender(host: Host, logs: Path) -> None:
    """The original's line, once, in both logs; each further mail of that vhost is accepted and told so; no other's is."""
    with host.running():
        first = [host.enqueue(VHOST) for _ in range(3)]
        assert [(run.returncode, run.stderr) for run in first[:2]] == [(0, b""), (0, b"")]
        host.wait(lambda: len(host.held()) == 1, "one is held")
        host.wait(lambda: lines(logs / "error.log"), "the warning is written")
        told = [host.enqueue(VHOST) for _ in range(2)]
        host.send(OTHER)
        host.wait(lambda: len(host.held()) == 3, "all over the limit are held")
    (warning,) = lines(logs / "error.log")
    assert WARNING.fullmatch(warning) and lines(logs / "a.log") == [warning]
    assert [(run.returncode, run.stderr.decode()) for run in told] == [(0, f"{warning}\n")] * 2
    assert host.log().count(warning) == 1
    (incident,) = host.json("status")["incidents"]
    assert (incident["vhost"], incident["limit"], incident["held"]) == (VHOST, "2/1h", 3)


def test_warning_outlives_a_restart(host: Host, logs: Path) -> None:
    """A restart begins no second incident: nothing is written again, and enqueue still says it."""
    with host.running():
        for _ in range(3):
            host.enqueue(VHOST)
        host.wait(lambda: lines(logs / "error.log"), "the warning is written")
    with host.running():
        run = host.enqueue(VHOST)
        host.wait(lambda: len(host.held()) == 2, "it is held")
    assert run.stderr.decode().splitlines() == lines(logs / "error.log") == lines(logs / "a.log")
    assert len(lines(logs / "error.log")) == 1


def test_end_of_an_incident_is_told(host: Host, logs: Path) -> None:
    """When nothing was over the limit for the length of the longest window, that is written, and enqueue is silent again."""
    host.configure(default=[f"1/{QUIET}s", "1/1s"])
    with host.running():
        for _ in range(3):
            host.send(VHOST)
        host.wait(lambda: len(host.held()) == 2, "two are held")
        host.wait(lambda: len(lines(logs / "error.log")) == 2, "the end is written")
        run = host.enqueue(VHOST)
        host.wait(lambda: host.rows("released")[1:], "mail goes out again")
        for _ in range(2):
            host.send(VHOST)
        host.wait(lambda: len(lines(logs / "error.log")) >= 3, "another incident is another warning")
    begin, end = lines(logs / "error.log")[:2]
    assert f"exceeded limit for {QUIET} seconds (1): " in begin
    since = re.match(rf"({STAMP})", begin)[1][1:-1]  # type: ignore[index]
    wanted = rf"{STAMP} \[secure-sendmail\] domain www\.a\.example: within its limits again \(2 messages held since {since}\)"
    assert re.fullmatch(wanted, end) and lines(logs / "a.log")[:2] == [begin, end]
    assert (run.returncode, run.stderr) == (0, b"")
    assert time.mktime(time.strptime(end[1:25])) - time.mktime(time.strptime(begin[1:25])) >= QUIET - 1


def test_observed_incident_says_that_mail_is_sent(host: Host, logs: Path) -> None:
    """With over_limit = "observe" the same line says so, and everything goes out."""
    host.configure(default=["2/1h"], extra=f'over_limit = "observe"\n[log]\nerror_log = "{logs}/error.log"\n')
    with host.running():
        for _ in range(4):
            host.send(VHOST)
        host.wait_for_mail(4)
        host.wait(lambda: host.json("status")["incidents"][:1], "the incident is open")
        (incident,) = host.json("status")["incidents"]
    (warning,) = lines(logs / "error.log")
    assert warning.endswith('(2): mail over the limit is sent all the same, over_limit is "observe"')
    assert incident["held"] == 2 and host.held() == []


def test_incident_begins_anew_when_something_else_becomes_of_the_mail(host: Host, logs: Path) -> None:
    """From "observe" to "hold", as the installation has it: what is said is what is done, in the logs and by enqueue."""
    toml = f'[log]\nerror_log = "{logs}/error.log"\n'
    host.configure(default=["1/1h"], extra=f'over_limit = "observe"\n{toml}')
    with host.running():
        for _ in range(2):
            host.send(VHOST)
        host.wait_for_mail(2)
        host.configure(extra=f'over_limit = "hold"\n{toml}')
        host.wait_for_log("configuration loaded")
        host.send(VHOST)
        host.wait(lambda: len(host.held()) == 1, "it is held")
        host.wait(lambda: len(lines(logs / "error.log")) == 3, "the first has ended, another has begun")
        told = host.enqueue(VHOST).stderr.decode()
    observed, end, held = lines(logs / "error.log")
    assert "sent all the same" in observed and "(1 message would have been held since" in end
    assert held.endswith("mail over the limit is held for review") and told == f"{held}\n"


def test_incident_ends_by_the_vhosts_own_windows(host: Host, logs: Path) -> None:
    """A long default window keeps no incident open of a vhost whose own windows are short."""
    toml = f'[log]\nerror_log = "{logs}/error.log"\n[vhosts."{VHOST}"]\nlimits = ["1/2s"]\n'
    host.configure(default=["100/1d"], extra=toml)
    with host.running():
        for _ in range(2):
            host.send(VHOST)
        host.wait(lambda: len(lines(logs / "error.log")) == 2, "it has begun and ended")
    assert "within its limits again (1 message held since" in lines(logs / "error.log")[1]


@pytest.mark.parametrize("path", ["missing/error.log", "spool/error.log"])
def test_error_log_that_cannot_be_written_stops_nothing(host: Host, logs: Path, path: str) -> None:
    """Then the other log alone has the line; it is said once, and `check` warns of it."""
    host.configure(extra=f'[log]\nerror_log = "{host.directory}/{path}"\n[vhosts."{VHOST}"]\nerror_log = "{logs}/a.log"\n')
    with host.running():
        for _ in range(5):
            host.enqueue(VHOST)
        host.wait(lambda: len(host.held()) == 3, "three are held")
        host.wait(lambda: lines(logs / "a.log"), "the vhost's own log has it")
        assert path in host.cli("check").stdout
    assert WARNING.fullmatch(lines(logs / "a.log")[0])
    assert len([line for line in host.log().splitlines() if "error log cannot be written" in line]) == 1
    assert list(host.spool.glob("*.log")) == []


@pytest.fixture
def notified(host: Host, sink: Sink) -> Iterator[Host]:
    host.configure(mta=smtp(sink.port), default=["2/1h"], extra='notify = "postmaster@host.example"\n')
    with host.running():
        yield host


def test_notice_is_one_mail_per_incident(notified: Host, sink: Sink) -> None:
    """It says which vhost, which limit, how many, which script, and what to type; the limits do not hold it."""
    for number in range(5):
        message = text("one@x.example", subject=str(number), headers="X-PHP-Originating-Script: 33:shop.php\n")
        notified.enqueue(VHOST, "-f", "s@a.example", message=message)
    notified.send(OTHER)
    wait_until(lambda: any(m.recipients == ["postmaster@host.example"] for m in sink.messages()), 30, "the notice is sent")
    time.sleep(2)
    (notice,) = [m for m in sink.messages() if m.recipients == ["postmaster@host.example"]]
    assert notice.sender == ""
    told = notice.data.decode()
    assert "exceeded limit for 60 minutes (2)" in told and "Limit:      2/1h" in told and "3 messages until now" in told
    assert (
        "shop.php" in told and f"secure-sendmail hold list --vhost {VHOST}" in told and "Auto-Submitted: auto-generated" in told
    )
    assert len(sink.messages()) == 2 + 1 + 1
    (row,) = [row for row in notified.rows("released") if row["recipient"] == "postmaster@host.example"]
    assert (row["sender"], row["reason"]) == ("", "notice of an incident")


def test_notices_beyond_an_hours_share_are_summarised(host: Host, sink: Sink) -> None:
    """Of 25 vhosts over their limits at once, 19 have a notice of their own and the twentieth tells of all others."""
    names = [f"v{number:02}.example" for number in range(25)]
    host.add(*names)
    host.configure(mta=smtp(sink.port), default=["0/1h"], extra='notify = "postmaster@host.example"\n')
    with host.running():
        for name in names:
            host.enqueue(name)
        wait_until(lambda: len(sink.messages()) == 20, 60, "twenty notices")
        time.sleep(2)
    found = [m.data.decode() for m in sink.messages()]
    assert len(found) == 20
    mentioned = [[name for name in names if f"domain {name}: " in told] for told in found]
    assert sorted(map(len, mentioned)) == [1] * 19 + [6]
    assert sorted(name for group in mentioned for name in group) == names


def test_no_notice_without_an_address(host: Host, sink: Sink) -> None:
    """Without `notify` nothing is sent, also not later, when it is set."""
    host.configure(mta=smtp(sink.port), default=["0/1h"])
    with host.running():
        host.enqueue(VHOST)
        host.wait(lambda: host.held(), "it is held")
        noticed = "SELECT notified_at FROM incident"
        host.wait(lambda: sqlite3.connect(host.state / "ledger.sqlite").execute(noticed).fetchone()[0], "its time has come")
        host.configure(extra='notify = "postmaster@host.example"\n')
        host.wait_for_log("configuration loaded")
        time.sleep(2)
    assert sink.messages() == []


def test_stop_holds_also_what_waits_for_the_mta(host: Host) -> None:
    """Mail that the MTA has deferred is held with the rest once its vhost is stopped, and is sent when it is released."""
    with Sink(["-r", "RCPT"]) as refusing:
        host.configure(mta=smtp(refusing.port))
        with host.running():
            host.send(VHOST)
            host.wait_for_row("deferred")
            host.cli("stop", VHOST, "--why", "broken into")
            assert host.cli("stop", VHOST, "--why", "again", check=False).returncode == 1
            host.send(VHOST)
            host.wait(lambda: len(host.held()) == 2, "both are held")
            assert [row["reason"] for row in host.json("hold", "list")] == ["stopped by root: broken into"] * 2
            assert host.json("status")["stopped"][0]["vhost"] == VHOST and "broken into" in host.cli("status").stdout
            refusing.stop()
            refusing.options = []
            refusing.start()
            host.cli("resume", VHOST)
            assert host.cli("resume", VHOST, check=False).returncode == 1
            time.sleep(1)
            assert len(host.held()) == 2
            host.cli("hold", "release", "--all", "--yes")
            wait_until(lambda: len(refusing.messages()) == 2, 60, "both are sent")


def test_stop_wants_a_reason_and_a_vhost(host: Host) -> None:
    """Without --why it is a usage error; of an unknown vhost there is nothing to stop."""
    assert host.cli("stop", VHOST, check=False).returncode == 64
    unknown = host.cli("stop", "www.unknown.example", "--why", "x", check=False)
    assert unknown.returncode == 1 and "no vhost" in unknown.stderr
    recorded = host.cli("stop", VHOST, "--why", "x")
    assert "the releaser is not running" in recorded.stdout
