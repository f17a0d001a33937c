"""Root's vhost verbs and `check --repair` on a spool for many, and who the commands are while they work."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from host import Host, text
from system import ADMINISTRATOR, DAEMON, SHARED, System

pytestmark = pytest.mark.server

OLD, NEW, OTHER = "www.old.example", "www.new.example", "www.other.example"
USAGE, NOPERM, CONFIG = 64, 77, 78

# A line of strace: the call, and what it was called with.
CALL = re.compile(r"^\d+ +(?P<name>\w+)\((?P<arguments>.*)")


@pytest.fixture
def system() -> Iterator[System]:
    """Two vhosts that may send two mails, and have sent three: one is held of each. The releaser runs."""
    with System(default=["2/1h"]) as made:
        made.register(OLD, "c1")
        made.register(OTHER, "c2")
        with made.running():
            for vhost, user in ((OLD, "c1"), (OTHER, "c2")):
                for number in range(3):
                    made.submit(vhost, user, f"{user} {number}")
            made.wait(lambda: len(made.held()) == 2, "one is held of each")
            made.wait_until_idle()
            yield made


def users_of(system: System, vhost: str) -> list[str]:
    return list(tomllib.loads((system.config.parent / f"vhosts.d/{vhost}.toml").read_text())["users"])


def used(system: System, vhost: str) -> list[int]:
    return [window["used"] for window in system.json("limits", "show", vhost)["windows"]]


def is_held(system: System, subject: str) -> bool:
    return subject in [row["subject"] for row in system.json("hold", "list")]


def test_rename_keeps_windows_held_mail_and_users(system: System) -> None:
    """Under the new name the vhost is what it was; the old one is no vhost any more."""
    held = system.held("--vhost", OLD)
    system.cli("vhost", "rename", OLD, NEW)
    assert (users_of(system, NEW), used(system, NEW), system.held("--vhost", NEW)) == (["c1"], [2], held)
    assert not (system.config.parent / f"vhosts.d/{OLD}.toml").exists()
    assert sorted(vhost["name"] for vhost in system.json("vhost", "list")) == [NEW, OTHER]
    assert system.enqueue(OLD, "-t", user="c1").returncode == CONFIG
    assert system.enqueue(NEW, "-t", user="c2").returncode == NOPERM
    # What is said of the limit may name the vhost as it was called when it went over.
    assert system.enqueue(NEW, "-t", user="c1", message=text("one@x.example", subject="over the limit still")).returncode == 0
    system.wait(lambda: len(system.held("--vhost", NEW)) == 2, "the window is as full as it was")
    system.cli("hold", "release", held[0])
    system.wait(lambda: "c1 2" in system.subjects(), "what was held is sent")
    (sent,) = [path.read_bytes() for path in system.mail() if b"Subject: c1 2\n" in path.read_bytes()]
    assert re.findall(rb"^X-Domain: (.*)$", sent, re.MULTILINE) in ([OLD.encode()], [NEW.encode()])
    assert system.cli("check").returncode == 0


def test_rename_is_refused_where_it_would_mix(system: System) -> None:
    """An unknown name, a name that another vhost has, and what is no host name change nothing."""
    for words, status in (((OLD, OTHER), 1), ((NEW, "www.newer.example"), 1), ((OLD, "not_a_host"), USAGE), ((OLD,), USAGE)):
        assert system.cli("vhost", "rename", *words, check=False).returncode == status, words
    assert sorted(vhost["name"] for vhost in system.json("vhost", "list")) == [OLD, OTHER]
    assert (users_of(system, OLD), users_of(system, OTHER)) == (["c1"], ["c2"])
    assert len(system.held()) == 2
    system.cli("check")


def test_remove_asks_what_becomes_of_the_mail(system: System) -> None:
    """While mail is held it is refused, naming both ways; without a terminal it wants --yes; then nothing has changed."""
    refused = system.cli("vhost", "remove", OLD, "--yes", check=False)
    assert refused.returncode == 1
    assert "--keep-mail" in refused.stderr and "--delete-mail" in refused.stderr
    assert system.cli("vhost", "remove", OLD, "--keep-mail", check=False).returncode == USAGE
    assert system.cli("vhost", "remove", OLD, "--keep-mail", "--delete-mail", "--yes", check=False).returncode == USAGE
    assert system.cli("vhost", "remove", NEW, "--yes", check=False).returncode == 1
    assert sorted(vhost["name"] for vhost in system.json("vhost", "list")) == [OLD, OTHER]
    assert len(system.held()) == 2
    system.submit(OLD, "c1")


@pytest.mark.parametrize("word", ["--keep-mail", "--delete-mail"])
def test_remove_keeps_or_deletes_the_mail(system: System, word: str) -> None:
    """The vhost is gone and its user is refused; its held mail is there to be released, or is not; others are as before."""
    system.cli("vhost", "remove", OLD, word, "--yes")
    assert [vhost["name"] for vhost in system.json("vhost", "list")] == [OTHER]
    assert not (system.spool / "vhosts" / OLD).exists()
    assert not (system.config.parent / f"vhosts.d/{OLD}.toml").exists()
    assert system.enqueue(OLD, "-t", user="c1").returncode == CONFIG
    held = system.held("--vhost", OLD)
    if word == "--keep-mail":
        assert len(held) == 1
        system.cli("hold", "release", held[0])
        system.wait(lambda: "c1 2" in system.subjects(), "what was kept is sent")
    else:
        assert held == []
        assert not [path for path in (system.spool / "hold").iterdir() if b"c1 2" in path.read_bytes()]
    assert len(system.held("--vhost", OTHER)) == 1
    system.submit(OTHER, "c2")
    system.cli("check")
    # Its name can be had again, by another.
    system.register(OLD, "c2")
    assert system.enqueue(OLD, "-t", user="c1").returncode == NOPERM
    system.submit(OLD, "c2")


def test_removed_vhosts_waiting_mail_is_not_lost(system: System) -> None:
    """Mail that waits in new/ while nobody takes it counts as mail too."""
    assert system.stop() == 0
    system.register("www.waits.example", "c1")
    system.submit("www.waits.example", "c1")
    assert system.cli("vhost", "remove", "www.waits.example", "--yes", check=False).returncode == 1
    assert len([name for name in system.ls() if name.startswith("vhosts/www.waits.example/new/")]) == 1


def test_check_repairs_what_is_broken(system: System) -> None:
    """Wrong modes and owners, and missing directories and bells, are named, and set right on request; mail goes on."""
    drop = system.spool / "vhosts" / OLD
    (bell,) = re.findall("^Bell: (.*)$", (drop / "policy").read_text(), re.MULTILINE)
    wanted = {
        path: (os.lstat(path).st_mode, os.lstat(path).st_uid, os.lstat(path).st_gid)
        for path in (drop, drop / "tmp", drop / "new", system.spool / "wake" / bell, system.spool / "wake", system.spool)
    }
    damages: dict[str, Callable[[], object]] = {
        "gate open to all": lambda: drop.chmod(0o777),
        "new/ of a customer": lambda: os.chown(drop / "new", system.uids["c1"], 0),
        "tmp/ gone": lambda: (drop / "tmp").rmdir(),
        "bell gone": lambda: (system.spool / "wake" / bell).unlink(),
        "bell deaf": lambda: (system.spool / "wake" / bell).chmod(0o600),
        "wake/ closed": lambda: (system.spool / "wake").chmod(0o700),
        "SPOOL writable": lambda: system.spool.chmod(0o777),
    }
    for name, damage in damages.items():
        damage()
        found = system.cli("check", check=False)
        assert found.returncode == 1 and "check --repair" in found.stdout, (name, found)
        system.cli("check", "--repair")
        system.cli("check")
        now = {path: (os.lstat(path).st_mode, os.lstat(path).st_uid, os.lstat(path).st_gid) for path in wanted}
        assert now == wanted, name
        system.submit(OLD, "c1", name)
        system.wait(partial(is_held, system, name), f"it is taken after: {name}")


def test_commands_are_not_root_when_they_open_the_spool(system: System) -> None:
    """Root's command has become the daemon's user, with his groups and nothing else, before its first look at mail or ledger."""
    trace = system.directory / "trace"
    (held,) = system.held("--vhost", OLD)
    for words in (["status"], ["hold", "list"], ["hold", "show", held], ["hold", "release", held], ["log"], ["check"]):
        command = [str(system.programs / "secure-sendmail"), "--config", str(system.config), *words]
        calls = "trace=%file,setuid,setgid,setgroups,setresuid,setresgid,setreuid,setregid"
        run = system.run("strace", "-f", "-qq", "-e", calls, "-o", trace, *command)
        assert run.returncode == 0, run.stderr
        lines = [match for line in trace.read_text().splitlines() if (match := CALL.match(line))]
        touched = [
            i
            for i, line in enumerate(lines)
            if f'"{system.spool}/' in line["arguments"] or f'"{system.state}' in line["arguments"]
        ]
        became = [i for i, line in enumerate(lines) if line["name"] in ("setuid", "setresuid", "setreuid")
                  and str(system.uids[DAEMON]) in line["arguments"]]  # fmt: skip
        groups = [i for i, line in enumerate(lines) if line["name"] == "setgroups"]
        assert touched and became and groups, words
        opened = [
            i for i in touched if lines[i]["name"] in ("open", "openat", "openat2", "unlink", "rename", "mkdir", "chmod", "chown")
        ]
        assert groups[0] < became[0] < min(opened), (words, lines[min(opened)][0])


@pytest.mark.parametrize("user", ["root", DAEMON])
def test_releaser_is_never_root(user: str) -> None:
    """Started by root or by its own user, it runs as that user alone: four uids, four gids, no groups, no capabilities."""
    with System() as system:
        system.register(OLD, "c1")
        process = system.launch(user)
        system.wait(lambda: process.poll() is not None or system.is_running(), "it runs")
        facts = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{system.pid}/status").read_text().splitlines() if ":\t" in line
        )
        daemon = str(system.uids[DAEMON])
        assert facts["Uid"].split() == [daemon] * 4 and facts["Gid"].split() == [daemon] * 4
        assert facts["Groups"].split() in ([], [daemon])
        assert [int(facts[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [0, 0, 0, 0]
        system.submit(OLD, "c1")
        system.wait_for_mail(1)
        assert system.stop() == 0


def test_others_can_neither_look_nor_decide(system: System) -> None:
    """A customer, www-data, and alice without sudo learn nothing from the commands, and change nothing."""
    (held,) = system.held("--vhost", OLD)
    for user in ("c1", SHARED, ADMINISTRATOR):
        for words in (["status"], ["hold", "list"], ["hold", "show", held], ["hold", "release", held], ["log"], ["check"],
                      ["vhost", "add", NEW, "--user", "c1"], ["vhost", "remove", OTHER, "--delete-mail", "--yes"],
                      ["stop", OTHER, "--why", "envy"]):  # fmt: skip
            run = system.cli(*words, user=user, check=False)
            assert run.returncode in (1, CONFIG) and run.stdout == "", (user, words, run)
            assert "c1 2" not in run.stderr and "Traceback" not in run.stderr
        assert system.releaser("--once", user=user).returncode in (CONFIG, 74)
    assert len(system.held()) == 2
    assert sorted(vhost["name"] for vhost in system.json("vhost", "list")) == [OLD, OTHER]


def test_stopped_vhost_is_held_until_resumed(system: System) -> None:
    """All mail of a stopped vhost is held, none of another's, whoever asks a stopped one again; status says so."""
    system.cli("stop", OTHER, "--why", "broken into")
    assert system.stop() == 0
    system.start()
    system.submit(OTHER, "c2", "stopped")
    system.wait(lambda: len(system.held("--vhost", OTHER)) == 2, "it is held")
    reasons = {row["subject"]: row["reason"] for row in system.json("hold", "list", "--vhost", OTHER)}
    assert reasons["stopped"].startswith("stopped")
    assert OTHER in system.cli("status").stdout
    system.register(NEW, "c2")
    system.submit(NEW, "c2", "of another vhost")
    system.wait(lambda: "of another vhost" in system.subjects(), "it is sent")
    system.cli("resume", OTHER)
    (held,) = [row["queue_id"] for row in system.json("hold", "list") if row["subject"] == "stopped"]
    system.cli("hold", "release", held)
    system.wait(lambda: "stopped" in system.subjects(), "it is sent")
    told = [(row["event"], row["vhost"], row["actor"]) for row in system.rows("stopped", "resumed")]
    assert told == [("stopped", OTHER, "root"), ("resumed", OTHER, "root")]


@pytest.mark.parametrize(
    "words",
    [
        ["--user", "99999999999"],
        ["--user", "4294967295"],
        ["--user", "no such"],
        ["--user", "a,b"],
        ["--user", "\u0663"],
        ["--user", "root"],
        ["--user", "nobody-here"],
        ["--user", DAEMON],
        ["--user", "c1", "--group", "99999999999"],
        ["--user", "c1", "--group", "no-group-here"],
    ],
)
def test_add_of_nobody_leaves_nothing(system: System, words: list[str]) -> None:
    """A user or group that cannot be one is refused in a sentence, and neither a file nor a bell nor a maildrop stays."""

    def everything() -> list[str]:
        places = (system.spool / "vhosts", system.spool / "wake", system.config.parent / "vhosts.d")
        return sorted(str(path) for place in places for path in place.iterdir())

    before = everything()
    run = system.cli("vhost", "add", NEW, *words, check=False)
    assert run.returncode in (1, USAGE) and "Traceback" not in run.stderr and run.stderr.startswith("secure-sendmail: ")
    assert everything() == before
    assert system.cli("check").returncode == 0


def test_interrupted_remove_opens_the_gate_again(system: System) -> None:
    """Ctrl-C while it waits for the releaser ends it in a sentence; the customer's next mail is accepted."""
    assert system.stop() == 0
    system.send(OLD, "-t", user="c1")
    words = ["vhost", "remove", OLD, "--keep-mail", "--yes"]
    command = system.words([system.programs / "secure-sendmail", "--config", system.config, *words])
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    gate = system.spool / "vhosts" / OLD
    system.wait(lambda: gate.stat().st_mode & 0o7777 == 0o700, "the gate is closed")
    assert system.enqueue(OLD, "-t", user="c1").returncode == NOPERM
    # Its parent is nsenter, which waits for it and ends as it does.
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said.splitlines()[-1:]) == (130, [b"secure-sendmail: interrupted"])
    assert gate.stat().st_mode & 0o7777 == 0o2710
    system.send(OLD, "-t", user="c1")


def test_root_without_the_daemons_account_is_told(tmp_path: Path) -> None:
    """Before the account is made, root does not get a private spool that no customer could use."""
    tmp_path.chmod(0o755)
    with Host() as host:
        run = host.cli("vhost", "add", NEW, "--user", "nobody", check=False)
        assert run.returncode == 1 and "systemd-sysusers" in run.stderr and not host.spool.exists()
        assert host.cli("vhost", "add", "--unregistered", check=False).returncode == 1
