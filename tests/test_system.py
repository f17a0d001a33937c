"""The host with accounts that the other tests rely on: it is what it says, and touches nothing of this machine."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import wait_until
from system import ADMINISTRATOR, CUSTOMERS, DAEMON, SHARED, System
from web import Web

pytestmark = pytest.mark.server

# Each call: its arguments to a file, its message to another.
RECORDER = """#!/bin/sh
echo "$@" > {directory}/$(id -un).words
cat > {directory}/$(id -un).message
echo "a word to standard error" >&2
"""


@pytest.fixture
def system() -> Iterator[System]:
    with System() as made:
        yield made


def test_accounts_are_in_there_only(system: System) -> None:
    """Users have their own groups and nobody else's, and this machine knows none of them."""
    before = Path("/etc/passwd").read_bytes()
    for name in (DAEMON, *CUSTOMERS, ADMINISTRATOR):
        uid = system.uids[name]
        assert system.run("id", user=name).stdout == f"uid={uid}({name}) gid={uid}({name}) groups={uid}({name})\n"
        assert uid not in {entry.pw_uid for entry in pwd.getpwall()}
    assert system.run("id", "-u", user="12345").stdout == "12345\n"
    assert system.run("id", "-un", user=SHARED).stdout == f"{SHARED}\n"
    assert Path("/etc/passwd").read_bytes() == before


def test_members_of_a_foreign_group() -> None:
    """Panels that put www-data into a customer's group can be had."""
    with System(members={"c2": [SHARED]}) as system:
        assert system.run("id", "-Gn", user=SHARED).stdout.split() == [SHARED, "c2"]
        assert system.run("id", "-Gn", user="c2").stdout.split() == ["c2"]


def test_administrator_alone_has_sudo(system: System) -> None:
    """sudo makes alice root, knows who she is, and refuses a customer."""
    run = system.run("sudo", "-n", "sh", "-c", "echo $(id -u) $SUDO_USER", user=ADMINISTRATOR)
    assert (run.returncode, run.stdout, run.stderr) == (0, "0 alice\n", "")
    refused = system.run("sudo", "-n", "id", user="c1")
    assert (refused.returncode, refused.stdout) == (1, "")


def test_spool_is_a_mount_of_its_own(system: System) -> None:
    """Nothing can be renamed into the spool or executed there, as in production."""
    options = system.run("findmnt", "-no", "OPTIONS", system.spool).stdout.split(",")
    assert {"nosuid", "nodev", "noexec"} <= set(options)
    (system.directory / "file").touch()
    run = system.run("sh", "-c", f'exec python3 -c \'import os; os.rename("{system.directory}/file", "{system.spool}/file")\'')
    assert "Invalid cross-device link" in run.stderr
    assert subprocess.run(["findmnt", system.spool], capture_output=True).stdout == b""


def test_commands_run_as_every_user(system: System) -> None:
    """A customer can run enqueue, and root and alice the administrator's command, wherever this tree lies."""
    assert system.enqueue("www.a.example", "-t", user="c1").returncode == 78
    assert system.cli("--help").stdout == system.sudo("--help").stdout
    assert system.releaser("--help").returncode == 0


def test_nothing_survives_a_killed_test_run(tmp_path: Path) -> None:
    """Processes and files of a System end with the process that made it, however that ends."""
    code = f"""
import subprocess, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from system import System
made = System()
sleeping = subprocess.Popen(made.words(["sleep", "1000"]))
print(made._init, made.directory, flush=True)
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as run:
        try:
            assert run.stdout is not None
            init, directory = run.stdout.readline().split()

            def inside() -> list[str]:
                return subprocess.run(["pgrep", "--ns", init, "--nslist", "pid"], capture_output=True, text=True).stdout.split()

            wait_until(lambda: len(inside()) == 2, 10, "the first process and the other are there")
            assert Path(directory, "accounts").is_dir()
            children = inside()
        finally:
            run.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in children), 10, "they have ended")
    wait_until(lambda: not os.path.exists(directory), 10, "the files have gone")


def test_web_runs_php_as_module_and_in_pools(system: System) -> None:
    """Apache's PHP runs as www-data, the pools' as their users; each site has its own sendmail_path, whose errors are kept."""
    recorder = system.programs / "recorder"
    recorder.write_text(RECORDER.format(directory=system.maildir))
    recorder.chmod(0o755)
    system.maildir.chmod(0o1777)
    web = Web(system)
    for vhost, pool in (("www.m.example", ""), ("www.c1.example", "c1"), ("www.c2.example", "c2")):
        web.site(vhost, f"{recorder} {vhost} -t", pool)
    with web:
        for vhost, user, kind in (("www.m.example", SHARED, "apache2handler"), ("www.c1.example", "c1", "fpm-fcgi"),
                                  ("www.c2.example", "c2", "fpm-fcgi")):  # fmt: skip
            uid = system.run("id", "-u", user).stdout.strip()
            assert web.get(vhost, subject=user) == f"{kind} {uid} accepted\n"
            assert (system.maildir / f"{user}.words").read_text() == f"{vhost} -t\n"
            message = (system.maildir / f"{user}.message").read_text()
            assert f"Subject: {user}\n" in message and "X-PHP-Originating-Script: 0:mail.php" in message
        assert web.error_log().count("a word to standard error") == 1
    assert system.run("pgrep", "apache2|php-fpm").stdout == ""
