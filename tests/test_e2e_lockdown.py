"""No way past us: the snippets of config/mta/ on a real Postfix and the real firewall, in a network of the test's own."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import ROOT, smtp, text
from servers import LIBRARIES, MAIL_OWNER, POSTFIX, Exim, Postfix, Sink
from system import System

pytestmark = pytest.mark.server

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1
CONFIG = ROOT / "config/mta"

# What a script of a customer's does. It prints what the server says, or why it is not reached.
CONNECT = """
import smtplib, sys
try:
    with smtplib.SMTP("127.0.0.1", int(sys.argv[1]), "localhost", timeout=10) as server:
        print(server.sendmail("c1@a.example", ["victim@x.example"], "Subject: past\\n\\n"))
except OSError as error:
    print(type(error).__name__)
"""


@pytest.fixture
def network() -> Iterator[None]:
    """A loopback interface that only this test and what it starts has."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as before:
        assert libc.unshare(CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            with socket.socket() as any_socket:
                fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))
            yield
        finally:
            assert libc.setns(before.fileno(), CLONE_NEWNET) == 0


def commands(postfix: Postfix, directory: Path) -> None:
    """Postfix's sendmail and postdrop with their libraries where every user can run them, wherever this checkout lies."""
    shutil.copytree(LIBRARIES, directory / "lib", ignore=shutil.ignore_patterns("sbin"))
    for name in ("sendmail", "postdrop"):
        shutil.copy(POSTFIX / "usr/sbin" / name, directory / name)
    subprocess.run(["chmod", "-R", "a+rX", directory], check=True)
    postfix.stop()
    postfix.parameters |= {"command_directory": str(directory)}
    postfix.start()


def test_customers_reach_no_mta_and_the_releaser_does(network: None, tmp_path: Path) -> None:
    """With the two snippets the sendmail command and the port refuse a vhost's user, and check has nothing to warn of."""
    closed = dict(
        line.split(" = ", 1) for line in (CONFIG / "postfix.cf").read_text().splitlines() if line and not line.startswith("#")
    )
    with Sink() as sink, Postfix(sink.port) as postfix, System(mta=smtp(postfix.port)) as system:
        programs = system.directory / "sbin"
        programs.mkdir(mode=0o755)
        commands(postfix, programs)
        environment = f"MAIL_CONFIG={postfix.directory}/config LD_LIBRARY_PATH={programs}/lib"
        (programs / "sendmail.sh").write_text(f'#!/bin/sh\nexec env {environment} {programs}/sendmail "$@"\n')
        (programs / "sendmail.sh").chmod(0o755)
        system.register("www.c1.example", "c1")
        before = system.cli("check").stdout
        assert f"c1 can submit mail past php-secure-sendmail: port {postfix.port}" in before
        assert "{}" in system.python(CONNECT, str(postfix.port), user="c1")
        sink.wait(1)

        rules = (CONFIG / "nftables.conf").read_text().replace("dport 25 ", f"dport {postfix.port} ")
        (system.directory / "rules").write_text(rules.replace('"postfix"', f'"{MAIL_OWNER}"'))
        load = system.run("/usr/sbin/nft", "-f", system.directory / "rules")
        assert load.returncode == 0, load.stderr
        postfix.stop()
        postfix.parameters |= closed
        postfix.start()
        # As a Debian host has it; nothing else of it is needed from now on.
        (programs / "all").mkdir(mode=0o755)
        (programs / "all/sendmail").symlink_to("../sendmail.sh")
        assert system.run("mount", "--bind", programs / "all", "/usr/sbin").returncode == 0

        assert system.python(CONNECT, str(postfix.port), user="c1") == "ConnectionRefusedError\n"
        message = "To: victim@x.example\n\npast\n"
        for command in ([programs / "sendmail.sh", "-t", "-i"], ["env", *environment.split(), programs / "postdrop"]):
            run = system.run(*command, user="c1", input=message)
            assert run.returncode != 0 and "is not allowed to submit mail" in run.stderr, run
        after = system.cli("check").stdout
        assert "past php-secure-sendmail" not in after, after

        with system.running():
            system.send("www.c1.example", "-t", message=text("one@x.example"))
            delivered = sink.wait(2)
        assert [each.recipients for each in delivered] == [["victim@x.example"], ["one@x.example"]]


def test_check_says_that_the_command_is_open(network: None, tmp_path: Path) -> None:
    """Where Postfix's command takes mail of everyone, as it does when it is installed, check says so."""
    with Sink() as sink, Postfix(sink.port) as postfix, System(mta=smtp(postfix.port)) as system:
        programs = system.directory / "sbin"
        programs.mkdir(mode=0o755)
        commands(postfix, programs)
        environment = f"MAIL_CONFIG={postfix.directory}/config LD_LIBRARY_PATH={programs}/lib"
        (programs / "all").mkdir(mode=0o755)
        (programs / "all/sendmail").write_text(f'#!/bin/sh\nexec env {environment} {programs}/sendmail "$@"\n')
        (programs / "all/sendmail").chmod(0o755)
        # What the set-gid bit of postdrop is for, which it cannot have where its libraries are elsewhere than in /usr/lib.
        (postfix.directory / "queue/maildrop").chmod(0o1777)
        system.register("www.c1.example", "c1")
        assert system.run("mount", "--bind", programs / "all", "/usr/sbin").returncode == 0
        assert "c1 can submit mail past php-secure-sendmail: /usr/sbin/sendmail takes it" in system.cli("check").stdout


def test_exim_snippet_is_exims(sink: Sink) -> None:
    """Exim reads the snippet, and its condition holds for those whom it names and nobody else."""
    with Exim(sink.port) as exim:
        file = exim.directory / "exim.conf"
        main, _, acl = (CONFIG / "exim.conf").read_text().replace("NNN:NNN", "4711:4712").partition("\nacl_secure_sendmail:")
        file.write_text(f"{main}\n{file.read_text()}\nbegin acl\nacl_secure_sendmail:{acl}")
        assert subprocess.run([exim.sendmail(), "-bV"], capture_output=True).returncode == 0
        condition = acl.partition("condition = ")[2].partition("\n")[0]
        for uid, expected in (("0", "true"), ("4711", "true"), ("4712", "true"), ("33", "false"), ("471", "false")):
            asked = condition.replace("$caller_uid", uid).removeprefix("${if").removesuffix("}")
            said = subprocess.run([exim.sendmail(), "-be", f"${{if {asked} {{true}}{{false}}}}"], capture_output=True, text=True)
            assert said.stdout == f"{expected}\n", said
