"""The door: caps on what is kept of a vhost, room in the file system, over_limit = "reject"; and who tries to get round it."""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import Host, text
from system import System
from test_e2e_room import small

pytestmark = pytest.mark.server

VHOST, OTHER, THIRD = "www.a.example", "www.b.example", "www.c.example"
SHARED = "_unregistered"
# What the administrator's verbs want where nobody can be asked.
WORDS = {"delete": ("--yes", "--why", "spam"), "release": ("--yes",)}


def scan(host: Host) -> None:
    """Has the releaser look at everything, as it does by itself every 30 seconds."""
    os.utime(host.spool / "wake/control")


def count_of(host: Host, queue: str) -> int:
    return sum(1 for name in host.ls() if name.startswith(queue))


def refusals(host: Host, maildrop: str = VHOST) -> list[str]:
    lines = (host.spool / "vhosts" / maildrop / "policy").read_text().splitlines()
    return [line.removeprefix("Refuse: ") for line in lines if line.startswith("Refuse: ")]


def closed(host: Host, maildrop: str = VHOST) -> None:
    host.wait(lambda: refusals(host, maildrop), f"the door of {maildrop} is closed")


def opened(host: Host, maildrop: str = VHOST) -> None:
    host.wait(lambda: not refusals(host, maildrop), f"the door of {maildrop} is open")


def refused(run: subprocess.CompletedProcess[bytes], words: str) -> bool:
    """Whether enqueue has ended with 69 and one line that has these words; False where it has accepted the mail."""
    if run.returncode == 0:
        return False
    (line,) = run.stderr.decode().splitlines()
    assert run.returncode == 69 and line.startswith("secure-sendmail-enqueue: ") and words in line, run
    return True


def slip_past(host: Host, maildrop: str, vhost: str = "", count: int = 1, size: int = 0, uid: int = -1) -> None:
    """Writes mail into new/ as whoever ignores the policy does."""
    vhost = vhost or maildrop
    head = f"Layout: 2\nVhost: {vhost}\nRecipient: one@x.example\n\nSubject: past the door\n\n".encode()
    data = head + b"x" * size + b"\n"
    for _ in range(count):
        name = f"{int(time.time())}.000000.P1.{os.urandom(12).hex()},S={len(data)}"
        new = host.spool / "vhosts" / maildrop / "new"
        (new / f".{name}").write_bytes(data)
        os.chown(new / f".{name}", uid, -1)
        (new / f".{name}").rename(new / name)
    if host.alive():
        scan(host)


@pytest.fixture
def capped() -> Iterator[Host]:
    """Nothing is sent, and three messages of a vhost are kept."""
    with Host(default=["0/1h"], extra="hold_max_messages = 3\n") as host:
        host.add(VHOST, OTHER)
        with host.running():
            yield host


def test_runaway_loop_stops_at_the_cap(capped: Host) -> None:
    """enqueue says so; no other vhost's mail is refused; nothing that was accepted is lost; it is in status, check and log."""
    host, accepted = capped, 0
    for _ in range(200):
        if refused(host.enqueue(VHOST), "(hold_max_messages)"):
            break
        accepted += 1
    else:
        pytest.fail("it is never refused")
    host.wait(lambda: count_of(host, "hold/") == 3, "three are held")
    assert count_of(host, f"vhosts/{VHOST}/new") == accepted - 3
    host.send(OTHER)
    host.wait(lambda: count_of(host, "hold/") == 4, "the other's is held")
    (entry,) = host.json("status")["refused"]
    assert entry["vhost"] == VHOST and f"refused: mail of {VHOST}: " in host.cli("status").stdout
    assert f"mail of {VHOST} is refused: " in host.cli("check").stdout
    for _ in range(4):
        assert refused(host.enqueue(VHOST), VHOST)
    scan(host)
    host.wait_for_row("rejected")
    (row,) = host.rows("rejected")
    assert (row["vhost"], row["recipient"], row["queue_id"]) == (VHOST, "", "")
    assert row["reason"].startswith("5 messages refused at the door")
    assert host.log().count("door closed") == 1
    assert not (host.spool / "vhosts" / VHOST / f"tmp/refused.{os.geteuid()}").exists()


@pytest.mark.parametrize("verb", ["delete", "release"])
def test_door_opens_when_there_is_less(capped: Host, verb: str) -> None:
    """What has waited in new/ is taken by itself, and the next mail is accepted."""
    host = capped
    slip_past(host, VHOST, count=5)
    closed(host)
    scan(host)
    assert VHOST in host.wait_for_log("not taken from new/")
    host.cli("hold", verb, *host.held()[:2], *WORDS[verb])
    host.wait(lambda: count_of(host, f"vhosts/{VHOST}/new") == 0, "what has waited is taken")
    host.wait(lambda: count_of(host, "hold/") == 3, "and held")
    host.cli("hold", verb, host.held()[0], *WORDS[verb])
    opened(host)
    host.send(VHOST)
    closed(host)
    assert Counter(row["event"] for row in host.rows("held", "rejected")) == {"held": 6}


def test_who_ignores_the_policy_gains_nothing(capped: Host) -> None:
    """What is written past the door stays in new/, whatever the bell does; others' mail is not delayed."""
    host = capped
    slip_past(host, VHOST, count=50)
    closed(host)
    bell = next(line for line in (host.spool / "vhosts" / VHOST / "policy").read_text().splitlines() if line.startswith("Bell"))
    for _ in range(5):
        slip_past(host, VHOST)
        os.utime(host.spool / "wake" / bell.removeprefix("Bell: "))
        scan(host)
    host.send(OTHER)
    host.wait(lambda: count_of(host, "hold/") == 4, "the other's is held")
    assert count_of(host, f"vhosts/{VHOST}/new") == 52
    scan(host)
    host.wait_for_log("not taken from new/")
    assert host.log().count("not taken from new/") == 1


def test_door_opens_when_the_cap_is_raised(capped: Host) -> None:
    """For the one vhost whose cap it is, by its own setting, at once."""
    host = capped
    for vhost in (VHOST, OTHER):
        slip_past(host, vhost, count=5)
        closed(host, vhost)
    host.configure(extra=f'hold_max_messages = 3\n[vhosts."{VHOST}"]\nhold_max_messages = 6\n')
    opened(host)
    host.wait(lambda: count_of(host, "hold/") == 8, "all of it is held")
    assert refusals(host, OTHER) and count_of(host, f"vhosts/{OTHER}/new") == 2


def test_cap_outlives_a_restart(capped: Host) -> None:
    """The next releaser counts what lies there, and takes no more; without one the door stays closed for an hour at most."""
    host = capped
    slip_past(host, VHOST, count=5)
    closed(host)
    assert host.stop() == 0
    policy = (host.spool / "vhosts" / VHOST / "policy").read_text()
    until = int(policy.split("Until: ")[1].split("\n")[0])
    assert time.time() < until <= time.time() + 3600
    assert refused(host.enqueue(VHOST), VHOST)
    host.start()
    closed(host)
    host.wait_for_row("rejected")
    assert count_of(host, "hold/") == 3 and count_of(host, f"vhosts/{VHOST}/new") == 2


def test_old_refusal_holds_no_longer(capped: Host) -> None:
    """Behind Until the door is open, whatever the policy says."""
    host = capped
    slip_past(host, VHOST, count=3)
    closed(host)
    assert host.stop() == 0
    policy = host.spool / "vhosts" / VHOST / "policy"
    lines = policy.read_text().splitlines()
    policy.write_text("\n".join(f"Until: {int(time.time())}" if line.startswith("Until") else line for line in lines) + "\n")
    host.send(VHOST)
    assert host.json("status")["refused"] == []


def test_cap_in_bytes() -> None:
    """A vhost whose messages are large reaches that one first."""
    with Host(default=["0/1h"], extra='hold_max_bytes = "500K"\n') as host:
        host.add(VHOST)
        with host.running():
            for _ in range(3):
                slip_past(host, VHOST, size=200_000)
            closed(host)
            slip_past(host, VHOST)
            scan(host)
            host.wait_for_log("not taken from new/")
            assert refused(host.enqueue(VHOST), "(hold_max_bytes)")
            assert count_of(host, "hold/") == 3 and count_of(host, f"vhosts/{VHOST}/new") == 1
            host.cli("hold", "delete", host.held()[0], *WORDS["delete"])
            host.wait(lambda: count_of(host, f"vhosts/{VHOST}/new") == 0, "it is taken")


def test_what_is_sent_or_refused_by_the_mta_is_counted_as_long_as_it_lies_here() -> None:
    """Mail that passes through is none of it, and mail in failed/ is."""
    program = 'case "$*" in *bad@*) exit 67;; esac; cat > /dev/null'
    with Host(extra="hold_max_messages = 2\n") as host:
        script = host.directory / "sendmail"
        script.write_text(f"#!/bin/sh\n{program}\n")
        script.chmod(0o755)
        host.configure(mta=f"sendmail:{script}")
        host.add(VHOST)
        with host.running():
            for _ in range(4):
                host.send(VHOST)
            host.wait_until_idle()
            assert refusals(host) == []
            for _ in range(2):
                host.send(VHOST, message=text("bad@x.example"))
            host.wait(lambda: count_of(host, "failed/") == 2, "two are refused by the MTA")
            closed(host)
            scan(host)
            host.cli("hold", "delete", *[name.partition("/")[2] for name in host.ls()][:1], *WORDS["delete"])
            opened(host)
            scan(host)
            time.sleep(0.5)
            assert refusals(host) == []


def test_no_room_in_the_file_system() -> None:
    """Every door is closed and nothing is taken until there is room again; it is said once, and by check."""
    with Host(extra='min_free = "1M"\n') as host, small(host.spool, "8m", inodes=3000) as ballast:
        host.add(VHOST, OTHER)
        with host.running():
            host.send(VHOST)
            host.wait_for_mail(1)
            host.wait_until_idle()
            ballast.write_bytes(bytes(15 << 19))
            scan(host)
            for vhost in (VHOST, OTHER):
                closed(host, vhost)
                assert refused(host.enqueue(vhost), "no room")
            slip_past(host, VHOST, count=2)
            scan(host)
            assert "min_free" in host.cli("check").stdout
            assert len(host.json("status")["refused"]) == 2
            time.sleep(3)
            assert len(host.mail()) == 1 and count_of(host, f"vhosts/{VHOST}/new") == 2
            assert host.log().count("all doors are closed") == 1
            ballast.unlink()
            for vhost in (VHOST, OTHER):
                opened(host, vhost)
            host.wait_for_mail(3)
            host.send(OTHER)
            host.wait_for_mail(4)


def test_no_room_for_inodes() -> None:
    """So it is with fewer than 1,000 free inodes; and --once ends all the same."""
    with Host(extra='min_free = "1"\n') as host, small(host.spool, "8m", inodes=500):
        host.add(VHOST)
        host.send(VHOST)
        assert host.releaser("--once").returncode == 0
        assert refused(host.enqueue(VHOST), "no room") and host.mail() == []
        host.configure(extra='min_free = "0"\n')
        assert host.releaser("--once").returncode == 0
        assert len(host.mail()) == 1


def test_reject() -> None:
    """Over its limit a vhost is told so, with the limit; afterwards the door is open again. What was accepted went out."""
    with Host(default=["3/10s"], extra='over_limit = "reject"\n') as host:
        host.add(VHOST, OTHER)
        with host.running():
            sent = []
            for number in range(30):
                if refused(host.enqueue(VHOST, message=text("one@x.example", subject=str(number))), "limit of 3/10s"):
                    break
                sent.append(str(number))
            first = time.time()
            closed(host)
            host.send(OTHER)
            held = len(host.held())
            host.wait(lambda: len(host.mail()) == 4, "three have gone out, and the other's one")
            opened(host)
            assert 3 < time.time() - first < 15
            for number in (100, 101, 102):
                host.send(VHOST, message=text("one@x.example", subject=str(number)))
                sent.append(str(number))
            scan(host)
            host.wait_for_row("rejected")
            host.wait(lambda: len(host.mail()) + len(host.held()) == len(sent) + 1, "nothing is lost")
            assert len(sent) - 6 == held
            assert [row["vhost"] for row in host.rows("rejected")] == [VHOST]
            (incident,) = [found for found in host.json("status")["incidents"] if found["vhost"] == VHOST] or [None]
            host.wait(lambda: "refused or held" in host.log(), "the incident ends")
        assert "exceeded limit for 10 seconds (3): mail over the limit is refused" in host.log() and incident


def test_reject_holds_what_is_past_the_door() -> None:
    """Also where someone does not ask; and where "observe" follows, the door opens."""
    with Host(default=["2/1h"], extra='over_limit = "reject"\n') as host:
        host.add(VHOST)
        with host.running():
            slip_past(host, VHOST, count=5)
            host.wait(lambda: count_of(host, "hold/") == 3, "three are held")
            closed(host)
            assert refused(host.enqueue(VHOST), "limit of 2/1h")
            host.configure(extra='over_limit = "observe"\n')
            opened(host)
            host.send(VHOST)
            host.wait_for_mail(3)


@pytest.fixture
def system() -> Iterator[System]:
    with System(default=["0/1h"], extra="hold_max_messages = 2\n") as installation:
        installation.register(VHOST, "c1")
        installation.cli("vhost", "add", "--unregistered")
        with installation.running():
            yield installation


def test_names_in_the_shared_maildrop(system: System) -> None:
    """A name's refusal is that name's alone; what waits for it delays no other, and is taken when there is less."""
    slip_past(system, SHARED, OTHER, count=6)
    closed(system, SHARED)
    assert [line.split()[0] for line in refusals(system, SHARED)] == [OTHER]
    assert refused(system.enqueue(OTHER, user="c2"), OTHER)
    assert system.enqueue(THIRD, user="c2").returncode == 0
    assert system.enqueue(VHOST, user="c1").returncode == 0
    system.wait(lambda: count_of(system, "hold/") == 4, "theirs is held")
    assert count_of(system, f"vhosts/{SHARED}/new") == 4
    scan(system)
    system.wait_for_row("rejected")
    (row,) = system.rows("rejected")
    assert (row["vhost"], row["uid"], row["verified"]) == (SHARED, system.uids["c2"], 0)
    system.cli("hold", "delete", "--vhost", OTHER, *WORDS["delete"])
    system.wait(lambda: count_of(system, f"vhosts/{SHARED}/new") == 2, "two more are taken")


def test_foreign_claim_closes_nobody_s_door(system: System) -> None:
    """Who claims in the shared maildrop to be a vhost that has one of its own fills its own share alone."""
    slip_past(system, SHARED, VHOST, count=5)
    closed(system, SHARED)
    assert refusals(system) == [] and system.enqueue(VHOST, user="c1").returncode == 0


def test_uid_has_a_cap_in_the_shared_maildrop(system: System) -> None:
    """Names can be made up: beyond ten times a vhost's cap the door is closed for who has, whatever he claims, and for nobody
    else."""
    for number in range(25):
        slip_past(system, SHARED, f"w{number}.example", uid=system.uids["c2"])
    whose = f"uid:{system.uids['c2']}"
    system.wait(lambda: any(line.startswith(f"{whose} ") for line in refusals(system, SHARED)), "it is closed for him")
    assert refused(system.enqueue("w99.example", user="c2"), f"uid {system.uids['c2']}")
    assert count_of(system, "hold/") == 20 and count_of(system, f"vhosts/{SHARED}/new") == 5
    assert system.enqueue(VHOST, user="c1").returncode == system.enqueue("w99.example", user="c1").returncode == 0
    system.wait(lambda: count_of(system, "hold/") == 22, "theirs is held as ever")
    assert any(f"mail of {whose}" in line for line in system.cli("status").stdout.splitlines())
    # Any of his that is held; which of them are was chance.
    theirs = (VHOST, "w99.example")
    his = next(row["queue_id"] for row in system.json("hold", "list") if row["vhost"] not in theirs)
    system.cli("hold", "delete", his, *WORDS["delete"])
    system.wait(lambda: count_of(system, f"vhosts/{SHARED}/new") == 4, "one more is taken")


def test_refusals_are_counted_for_whose_they_are(system: System) -> None:
    """Who claims ever so many in the shared maildrop has them as his own: the others' are said to be as many as they are."""
    slip_past(system, SHARED, OTHER, count=3)
    closed(system, SHARED)
    tmp = system.spool / "vhosts" / SHARED / "tmp"
    system.python(HOSTILE, tmp, "sparse", "900000", user="c1")
    assert refused(system.enqueue(OTHER, user="c2"), OTHER)
    scan(system)
    system.wait(lambda: len(system.rows("rejected")) == 2, "there is a row for each")
    said = {row["uid"]: row["reason"].split()[0] for row in system.rows("rejected")}
    assert said == {system.uids["c1"]: "900000", system.uids["c2"]: "1"}


HOSTILE = """
import os, sys
name = f"{sys.argv[1]}/refused.{os.getuid()}"
kind = sys.argv[2]
if kind == "sparse":
    os.truncate(os.open(name, os.O_WRONLY | os.O_CREAT), int(sys.argv[3]))
elif kind == "symlink":
    os.symlink("/etc/passwd", name)
elif kind == "directory":
    os.mkdir(name)
elif kind == "fifo":
    os.mkfifo(name)
elif kind == "another's":
    os.truncate(os.open(f"{sys.argv[1]}/refused.0", os.O_WRONLY | os.O_CREAT), 7)
"""


@pytest.mark.parametrize("kind", ["sparse", "symlink", "directory", "fifo", "another's"])
def test_hostile_count(kind: str) -> None:
    """Whatever a customer makes there is a claim at most: the releaser goes on, and enqueue refuses all the same."""
    with System(default=["0/1h"], extra="hold_max_messages = 1\n") as system:
        system.register(VHOST, "c1")
        tmp = system.spool / "vhosts" / VHOST / "tmp"
        size = _largest(tmp)
        with system.running():
            slip_past(system, VHOST)
            closed(system)
            system.python(HOSTILE, tmp, kind, str(size), user="c1")
            assert refused(system.enqueue(VHOST), VHOST)
            scan(system)
            left = [f"vhosts/{VHOST}/tmp/refused.{system.uids['c1']}"] if kind == "directory" else []
            system.wait(lambda: [name for name in system.ls() if "/tmp/" in name] == left, "it was looked at")
            assert refused(system.enqueue(VHOST), VHOST)
            scan(system)
            wanted = {"sparse": ["1000000 ", "1 "], "directory": []}.get(kind, ["1 "])
            if kind == "another's":
                wanted = ["1 ", "1 "]
            system.wait(lambda: len(system.rows("rejected")) >= len(wanted), "the rows are there")
            assert [row["reason"].split("messages")[0].split("message")[0] for row in system.rows("rejected")] == wanted
            assert system.is_running()


def _largest(directory: Path) -> int:
    """The size of the largest sparse file that the file system of DIRECTORY takes, 8 TB where it can."""
    size, path = 8 << 40, directory / "probe"
    while True:
        try:
            with path.open("wb") as stream:
                stream.truncate(size)
            return size
        except OSError:
            size //= 2
        finally:
            path.unlink(missing_ok=True)
