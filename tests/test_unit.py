"""The systemd unit, as it is installed, and what the releaser tells systemd."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import PATIENCE, ROOT, Host, smtp, text
from notify_socket import Listener
from servers import Sink
from system import DAEMON, PATH, System, child

from releaser.notify import Notify

VHOST = "www.a.example"
UNIT = "secure-sendmail-releaser.service"
SPOOL = "/var/spool/php-secure-sendmail"


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """A notify socket of either kind, in the environment of what is started."""
    found = Listener(str(tmp_path / "notify") if request.param == "path" else f"@pss-test-{os.getpid()}-{time.monotonic_ns()}")
    monkeypatch.setenv("NOTIFY_SOCKET", found.address)
    yield found
    found.close()


def longest_gap(times: list[float]) -> float:
    return max(later - earlier for earlier, later in itertools.pairwise(times))


def test_unit_is_told_of_start_reload_and_end(host: Host, listener: Listener) -> None:
    """READY=1 when it works, RELOADING and READY around a reload, STOPPING=1 at the end, and no sign of life unasked."""
    host.launch()
    listener.wait("READY=1")
    host.wait_for_log("started")
    assert listener.words() == ["READY=1"]
    before = time.monotonic_ns() // 1000
    host.signal(signal.SIGHUP)
    listener.wait("RELOADING=1")
    listener.wait("READY=1")
    reloading = next(words for words in listener.words() if words.startswith("RELOADING"))
    (stamp,) = re.findall(r"\ARELOADING=1\nMONOTONIC_USEC=(\d+)\Z", reloading)
    assert before <= int(stamp) <= time.monotonic_ns() // 1000
    host.signal(signal.SIGTERM)
    assert host.ended() == 0
    assert [words.partition("\n")[0] for words in listener.words()] == [
        "READY=1",
        "RELOADING=1",
        "STATUS=",
        "READY=1",
        "STOPPING=1",
    ]


def test_unit_is_told_of_a_configuration_that_cannot_be_used(host: Host, listener: Listener) -> None:
    """After a reload that failed the service is ready all the same, and its status says what is wrong; until it is right."""
    good = host.config.read_text()
    host.launch()
    listener.wait("READY=1")
    host.write("[mta]\nurl = 25\n")
    listener.wait("RELOADING=1")
    listener.wait("STATUS=the last good configuration holds: ")
    assert "[mta] url" in listener.heard[-1][1]
    listener.wait("READY=1")
    host.write(good)
    listener.wait("STATUS=")
    listener.wait("READY=1")
    assert host.stop() == 0


def test_unit_is_told_that_work_goes_on(host: Host, listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sign of life at least twice in the time that systemd waits, also of an idle releaser; and not at every step."""
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    host.launch()
    listener.wait("READY=1")
    listener.wait("WATCHDOG=1")
    idle = listener.signs(4)
    assert longest_gap(idle) <= 1
    for number in range(20):
        host.send(VHOST, message=text("one@x.example", subject=f"mail {number}"))
    busy = listener.signs(3)
    assert longest_gap(busy) <= 1
    assert len(busy) - 2 <= 3 / 0.5 + 1
    assert host.stop() == 0
    assert len(host.mail()) == 20


def test_unit_is_told_nothing_for_another_process(host: Host, listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the watchdog is meant for another process, or is not a time, there is no sign of life."""
    for usec, pid in (("200000", str(os.getpid())), ("0", ""), ("soon", "")):
        monkeypatch.setenv("WATCHDOG_USEC", usec)
        monkeypatch.setenv("WATCHDOG_PID", pid)
        host.launch()
        listener.wait("READY=1")
        assert len(listener.signs(1)) == 2
        assert host.stop() == 0
    assert "WATCHDOG=1" not in listener.words()


@pytest.mark.server
def test_unit_is_told_that_it_finishes(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the MTA takes its time behind the final dot, the releaser that is to end shows that it lives."""
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    with Sink(options=["-W", ".:5"]) as sink, Host(mta=smtp(sink.port)) as host:
        host.add(VHOST)
        host.launch()
        listener.wait("READY=1")
        host.send(VHOST)
        sink.wait(1)
        host.signal(signal.SIGTERM)
        listener.wait("STOPPING=1")
        assert longest_gap(listener.signs(3)) <= 1
        assert host.alive()
        assert host.ended() == 0
        assert [row["event"] for row in host.rows()] == ["released"]


def test_unit_is_ready_before_its_backlog(host: Host, listener: Listener) -> None:
    """Who waits for the service to start does not wait for the mail of a week."""
    host.send(VHOST)
    new = host.spool / "vhosts" / VHOST / "new"
    (first,) = new.iterdir()
    for number in range(1500):
        shutil.copy(first, new / first.name.replace(".P", f".P{number}", 1))
    host.launch()
    listener.wait("READY=1")
    assert len(host.mail()) < 1500
    assert host.stop() == 0


def test_unit_is_not_ready_where_it_cannot_work(host: Host, listener: Listener) -> None:
    """A releaser whose spool another one has, or without a configuration, is never ready."""
    with pytest.MonkeyPatch.context() as quiet:
        quiet.delenv("NOTIFY_SOCKET")
        host.start()
    assert host.releaser().returncode == 69
    assert host.stop() == 0
    host.write("spool = 5\n")
    assert host.releaser().returncode == 78
    assert listener.words() == []


@pytest.mark.parametrize("address", ["/nowhere/notify", "@nobody-listens", "notify", "vsock:2:1", "/" + "x" * 200, ""])
def test_unit_that_does_not_listen(host: Host, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Where nobody listens, or at no address that we know, the releaser works as ever."""
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with host.running():
        host.send(VHOST)
        host.wait_for_mail(1)


def test_unit_is_told_by_the_releaser_alone(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the releaser starts has nothing in its environment to speak for it with."""
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    notify = Notify()
    assert notify.interval == 0.25
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & os.environ.keys()
    notify.status("two\nlines \ud800")
    assert listener.words() == ["STATUS=two lines ?"]


# The unit itself.


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make install` puts into a package."""
    directory = tmp_path_factory.mktemp("staged")
    subprocess.run(["make", "--silent", "install", f"DESTDIR={directory}"], cwd=ROOT, check=True)
    return directory


def settings(path: Path) -> list[tuple[str, str]]:
    """The keys of a unit and their values, in order."""
    lines = [line for line in path.read_text().splitlines() if line and line[0] not in "#[;"]
    return [(key, value) for key, _, value in (line.partition("=") for line in lines)]


def unit(staged: Path) -> Path:
    return staged / "usr/local/lib/systemd/system" / UNIT


def beside(staged: Path, *words: str, etc: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs WORDS where what is staged is installed, in a mount namespace of its own."""
    layers = {"/usr/local": staged / "usr/local", **({"/etc": etc} if etc else {})}
    mounts = [f"mount -t overlay overlay -o lowerdir={layer}:{place} {place}" for place, layer in layers.items()]
    inner = " && ".join([*mounts, 'exec "$@"'])
    words = ("unshare", "-m", "/bin/sh", "-c", inner, "sh", *words)
    return subprocess.run(words, capture_output=True, text=True, timeout=60, env={**os.environ, "LC_ALL": "C"})


@pytest.mark.server
@pytest.mark.parametrize("with_drop_in", [False, True])
def test_unit_is_clean(staged: Path, tmp_path: Path, with_drop_in: bool) -> None:
    """systemd finds nothing to say about the unit and the mount, installed, with and without the drop-in."""
    if with_drop_in:
        drop_in = tmp_path / f"systemd/system/{UNIT}.d/sendmail.conf"
        drop_in.parent.mkdir(parents=True)
        shutil.copy(staged / "usr/local/share/doc/php-secure-sendmail/sendmail-setgid.conf", drop_in)
    mounts = [path.name for path in (staged / "usr/local/lib/systemd/system").glob("*.mount")]
    assert len(mounts) == 1
    run = beside(staged, "systemd-analyze", "verify", "--man=no", UNIT, *mounts, etc=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.server
def test_unit_that_is_not_clean_is_seen(staged: Path, tmp_path: Path) -> None:
    """The check sees a wrong key in the drop-in: it looks at what it is given."""
    drop_in = tmp_path / f"systemd/system/{UNIT}.d/wrong.conf"
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[Service]\nNoNewPriviledges=no\n")
    assert "NoNewPriviledges" in beside(staged, "systemd-analyze", "verify", "--man=no", UNIT, etc=tmp_path).stderr


@pytest.mark.server
def test_unit_exposes_little(staged: Path) -> None:
    """The overall exposure, as systemd counts it from 0 to 10, is below 2."""
    words = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit(staged))]
    run = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    (exposure,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", run.stdout)
    assert 0 < float(exposure) < 2.0


def test_unit_leaves_owners_alone(staged: Path) -> None:
    """Nothing in the unit changes owners in the spool, or hides who they are."""
    keys = {key for key, _ in settings(unit(staged))}
    assert "ProtectSystem" in keys
    assert not keys & {"StateDirectory", "LogsDirectory", "CacheDirectory", "RuntimeDirectory", "DynamicUser", "PrivateUsers"}
    lines = (staged / "usr/local/lib/tmpfiles.d/php-secure-sendmail.conf").read_text().splitlines()
    rules = [line.split() for line in lines if line and not line.startswith("#")]
    assert {rule[0] for rule in rules} == {"d", "z"}
    assert [rule[1] for rule in rules if rule[1].startswith(SPOOL)] == [SPOOL]
    assert {rule[5] for rule in rules} == {"-"}


def test_unit_runs_what_is_installed(staged: Path) -> None:
    """The unit starts the installed program as its own user, restarts it for ever, and writes where mail and ledger are."""
    found = settings(unit(staged))
    values = dict(found)
    program = staged / values["ExecStart"].lstrip("/")
    assert os.access(program, os.X_OK)
    assert (values["User"], values["Group"]) == ("secure-sendmail", "secure-sendmail")
    assert (values["Restart"], values["StartLimitIntervalSec"]) == ("always", "0")
    assert SPOOL in values["ReadWritePaths"].split() and SPOOL in values["RequiresMountsFor"].split()
    sysusers = (staged / "usr/local/lib/sysusers.d/php-secure-sendmail.conf").read_text()
    assert "\nu secure-sendmail - " in sysusers


@pytest.mark.server
def test_unit_of_the_spool(staged: Path) -> None:
    """The spool is mounted on itself, without set-uid, devices and programs; the unit has the name that systemd wants."""
    words = ["systemd-escape", "-p", "--suffix=mount", SPOOL]
    name = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    values = dict(settings(staged / "usr/local/lib/systemd/system" / name))
    assert (values["What"], values["Where"]) == (SPOOL, SPOOL)
    assert set(values["Options"].split(",")) == {"bind", "nosuid", "nodev", "noexec"}
    assert values["WantedBy"] == "local-fs.target"


# What means NoNewPrivileges=yes where User= is set, as systemd.exec(5) of systemd 252 lists it.
IMPLY = {
    "DynamicUser", "LockPersonality", "MemoryDenyWriteExecute", "PrivateDevices", "ProtectClock", "ProtectHostname",
    "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables", "RestrictAddressFamilies", "RestrictNamespaces",
    "RestrictRealtime", "RestrictSUIDSGID", "SystemCallArchitectures", "SystemCallFilter", "SystemCallLog",
    "NoNewPrivileges",
}  # fmt: skip


def test_unit_with_drop_in_gives_new_privileges(staged: Path) -> None:
    """Whatever of the unit would keep a set-gid postdrop from its group is taken back in the drop-in, and nothing else."""
    drop_in = dict(settings(ROOT / "config/systemd/sendmail-setgid.conf"))
    taken_back = {key for key, value in drop_in.items() if value in ("", "no")}
    assert taken_back == {key for key, _ in settings(unit(staged))} & IMPLY
    assert drop_in.keys() - taken_back == {"KillMode", "ReadWritePaths"}


def expanded(names: list[str]) -> set[str]:
    """The system calls that the words of SystemCallFilter= stand for."""
    found: set[str] = set()
    for name in names:
        if not name.startswith("@"):
            found.add(name)
            continue
        run = subprocess.run(["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True)
        words = [line.strip() for line in run.stdout.splitlines()[1:]]
        found |= expanded([word for word in words if word and not word.startswith("#")])
    return found


@pytest.mark.server
def test_unit_allows_what_the_releaser_does(staged: Path, sink: Sink) -> None:
    """Every system call of a working day is one that the unit allows, and no memory is both written and executed."""
    allowed: set[str] = set()
    for key, value in settings(unit(staged)):
        if key == "SystemCallFilter":
            names = expanded(value.removeprefix("~").split())
            allowed = allowed - names if value.startswith("~") else allowed | names
    assert {"read", "inotify_add_watch"} <= allowed and not {"ptrace", "setuid", "fchown"} & allowed
    with System(mta=smtp(sink.port), default=["3/1h"]) as host:
        # As tmpfiles.d makes it: vhosts' files there belong to the same group.
        os.chown(host.config.parent, 0, host.uids[DAEMON])
        host.configure(extra=f'[log]\nerror_log = "{host.error_log}"\n')
        host.register(VHOST, "c1")
        trace, log = host.logs / "trace", host.logs / "stderr"
        words = ["strace", "-f", "-qq", "-o", trace, host.programs / "secure-sendmail-releaser", "--config", host.config]
        with log.open("wb") as stderr:
            process = subprocess.Popen(host.words(words, DAEMON), stderr=stderr, cwd="/", env={"PATH": PATH})
        host.send(VHOST, message=text("one@x.example", subject="small"))
        host.send(VHOST, message=text("one@x.example", subject="large", body="0123456789\n" * 200_000))
        sink.wait(2, timeout=PATIENCE)
        host.send(VHOST, message=text("one@x.example", "two@x.example", subject="over"))
        host.wait(host.held, "the third is held")
        host.cli("hold", "release", *host.held())
        sink.wait(3, timeout=PATIENCE)
        host.configure(default=["unlimited"], mta=f"sendmail:{shutil.which('true')}")
        host.wait(lambda: "configuration loaded" in log.read_text(), "the other MTA is known")
        assert host.enqueue(VHOST, message=text("one@x.example", subject="command")).returncode == 0
        host.wait(lambda: len(host.rows("released")) == 5, "the command has it")
        host.configure(default=["0/1h"], mta=f"maildir:{host.maildir}")
        host.wait(lambda: log.read_text().count("configuration loaded") == 2, "the maildir is known")
        assert host.enqueue(VHOST, message=text("one@x.example", subject="maildir")).returncode == 0
        host.wait(host.held, "it is over the limit")
        host.cli("hold", "release", *host.held())
        host.wait_for_mail(1)
        # strace runs the releaser, and nsenter strace.
        os.kill(child(child(process.pid)), signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        assert host.error_log.exists()
        lines = trace.read_text(errors="replace").splitlines()
    calls = {match[1] for line in lines if (match := re.match(r"\d+ +([a-z_0-9]+)\(", line))}
    assert {"fsync", "rename", "inotify_add_watch", "connect", "execve"} <= calls
    assert calls - allowed == set()
    assert [line for line in lines if re.search(r"\bmmap\(.*PROT_WRITE\|PROT_EXEC|\bmprotect\(.*PROT_EXEC", line)] == []
