"""calling.md, Options, Envelope sender and Origin: every row with the real command."""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import page
import pytest
from host import ENQUEUE, ROOT, Host, smtp, text
from servers import Postfix, Sink, Wire
from system import System

VHOST = "www.a.example"
LOGIN = f"{pwd.getpwuid(os.getuid()).pw_name}@{os.uname().nodename}"

OPTIONS = [
    (words, int(status))
    for cell, status, _ in page.table(page.text("calling.md"), "options")
    for words in re.findall(r"[^`]+", cell)
    if words.strip()
]
SENDERS = page.table(page.text("calling.md"), "senders")


@pytest.fixture(scope="module")
def site() -> Iterator[Host]:
    """An installation for many calls; nothing releases what they submit."""
    with Host() as host:
        host.add(VHOST)
        yield host


def submitted(site: Host) -> list[Path]:
    return list((site.spool / "vhosts" / VHOST / "new").iterdir())


@pytest.mark.parametrize(("words", "status"), OPTIONS, ids=[words for words, _ in OPTIONS])
def test_option(site: Host, words: str, status: int) -> None:
    """Each option of the page ends as the page says, whether it stands behind the vhost or in front of it."""
    for before, after in (([], shlex.split(words)), (shlex.split(words), [])):
        # A value that is missing would be the next word.
        if status and before and before[-1] in ("-f", "-r", "-F", "-N", "-o", "-O", "-B", "-X", "-C", "-b"):
            continue
        run = subprocess.run(
            [ENQUEUE, "--spool", site.spool, *before, VHOST, *after], input=text("one@x.example"), capture_output=True, timeout=60
        )
        assert run.returncode == status, run
        answer = b"421 SMTP on standard input is not offered; call with -t -i\r\n" if words in ("-bs", "-b s") else b""
        assert run.stdout == answer
        assert len(run.stderr.splitlines()) == bool(status)
        files = submitted(site)
        assert len(files) == (not status)
        for path in files:
            assert "\nRecipient: one@x.example\n" in path.read_text()
            path.unlink()


def test_option_values_are_taken_by_their_option(site: Host) -> None:
    """No value of an option is a recipient, and no option the value of another."""
    for words, status in OPTIONS:
        if not status and words != "--":
            site.send(VHOST, *shlex.split(words), "-t", "-i", "--", "two@x.example", message=text("one@x.example"))
            (path,) = submitted(site)
            assert re.findall(r"^Recipient: (.*)$", path.read_text(), re.MULTILINE) == ["two@x.example", "one@x.example"], words
            path.unlink()


def test_options_that_name_a_file_are_told_to_syslog(site: Host, tmp_path: Path) -> None:
    """-C and -X are ignored, and who looks at syslog hears of it; the file is neither read nor made."""
    code = f'exec unshare -m sh -c \'mount --bind {tmp_path} /dev && exec "$@"\' sh "$@"'
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(str(tmp_path / "log"))
        log.settimeout(10)
        (tmp_path / "null").symlink_to("/proc/self/fd/0")
        words = [ENQUEUE, "--spool", site.spool, VHOST, "-t", f"-X{tmp_path}/made", f"-C{tmp_path}/made"]
        run = subprocess.run(["sh", "-c", code, "sh", *words], input=text("one@x.example"), capture_output=True, timeout=60)
        assert (run.returncode, run.stderr) == (0, b"")
        said = [log.recv(1000).decode() for _ in "XC"]
    for line, flag in zip(said, "XC", strict=True):
        assert re.fullmatch(rf"<20>secure-sendmail-enqueue\[\d+\]: vhost {VHOST}, uid \d+: option -{flag} .* ignored", line)
    assert not (tmp_path / "made").exists()
    (path,) = submitted(site)
    path.unlink()


def test_full_name_is_cut(site: Host) -> None:
    """A -F of any length makes no line that an MTA would break, and the sender stays on it."""
    for name in ("x" * 100_000, "ä" * 50_000, 'a\\"' * 30_000):
        site.send(VHOST, "-t", "-f", "user@a.example", "-F", name)
        (path,) = submitted(site)
        (line,) = re.findall(r"^From: .*$", path.read_text(), re.MULTILINE)
        assert len(line) < 998 and line.endswith(" <user@a.example>")
        path.unlink()


def test_spool_that_is_not_the_first_word(site: Host) -> None:
    """Behind another option, where Nodemailer and s-nail would put it, --spool is refused with a word on why."""
    run = subprocess.run([ENQUEUE, "-i", "--spool", site.spool, VHOST], input=text("one@x.example"), capture_output=True)
    assert (run.returncode, run.stderr) == (64, b"secure-sendmail-enqueue: --spool must be the first word\n")


@pytest.mark.server
def test_options_open_no_path_and_reach_no_command(site: Host, tmp_path: Path) -> None:
    """Whatever path or command the values of all options name: no file of that name is looked at, no process begun."""
    evil = tmp_path / "evil"
    values = [f"-{flag}{evil}" for flag in "ABCFLNORVXdehop"] + [f"-oQ{evil}", f"-oC{evil}", f"-ODataFileBufferSize={evil}"]
    values += [f"-f|{evil}", f"-X|{evil}", f"-C$({evil})", f"-O`{evil}`"]
    trace = tmp_path / "trace"
    strace = ["strace", "-f", "-qq", "-s", "999", "-e", "trace=%file,%process,%network", "-o", trace]
    command = [ENQUEUE, "--spool", site.spool, VHOST, *values, "-t"]
    run = subprocess.run([*strace, *command], input=text("one@x.example"), capture_output=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")
    calls = trace.read_text().splitlines()
    assert not [line for line in calls if "evil" in line and " execve(" not in line]
    assert not [line for line in calls if re.search(r" (clone3?|fork|vfork)\(", line)]
    assert sum(" execve(" in line for line in calls) == 1
    assert not [line for line in calls if "AF_INET" in line]
    (path,) = submitted(site)
    path.unlink()


@pytest.mark.server
def test_notify_reaches_an_mta_that_offers_it(postfix: Postfix) -> None:
    """-N is passed on, without "success", to an MTA with DSN, also from the hold queue."""
    with Wire(postfix.port) as wire:
        with Host(mta=smtp(wire.port), default=["3/1h"]) as host:
            host.add(VHOST)
            with host.running():
                for words in (["-N", "never"], ["-Nsuccess,FAILURE"], [], ["-N", "delay,failure"]):
                    host.send(VHOST, *words, "-t", message=text("one@x.example"))
                (held,) = host.wait(lambda: host.json("hold", "list"), "the last one is held")
                host.cli("hold", "release", held["queue_id"])
                host.wait_until_idle()
        wire.wait(4)
        said = b"".join(bytes(connection.client) for connection in wire.connections)
    commands = re.findall(rb"^RCPT TO:<one@x.example>(.*)\r\n", said, re.MULTILINE)
    # They may have gone through several connections.
    assert sorted(commands) == sorted([b" NOTIFY=never", b" NOTIFY=failure", b"", b" NOTIFY=failure,delay"])


@pytest.mark.server
def test_notify_reaches_no_other_mta() -> None:
    """An MTA that offers no DSN gets the recipient alone."""
    with Sink(options=["-N"]) as sink, Wire(sink.port) as wire, Host(mta=smtp(wire.port)) as host:
        host.add(VHOST)
        with host.running():
            host.send(VHOST, "-N", "never", "-t", message=text("one@x.example"))
            wire.wait(1)
    assert b"RCPT TO:<one@x.example>\r\n" in wire.connections[0].client


@pytest.mark.parametrize("row", SENDERS, ids=lambda row: " ".join(row))
def test_sender(row: list[str]) -> None:
    """The envelope sender of each row of the page is what the MTA is given, and what the log has."""
    policy, configured, words, expected = row
    keys = f'sender_policy = "{policy}"\n'
    if policy == "own-domains":
        keys += 'sender_domains = ["listed.example"]\n'
    if configured != "none":
        keys += f'sender = "{configured}"\n'
    given = [] if words == "nothing" else shlex.split(words.strip("`"))
    with Host(default=["0/1h"], extra=f'[vhosts."{VHOST}"]\n{keys}') as host:
        host.add(VHOST)
        host.send(VHOST, *given, message=text("one@x.example"))
        assert host.releaser("--once").returncode == 0
        (held,) = host.json("hold", "list")
        (logged,) = host.rows("held")
    sender = {"the null sender": "", "LOGIN@HOST": LOGIN}.get(expected, expected)
    assert held["sender"] == logged["sender"] == sender


@pytest.mark.parametrize("by_signal", [True, False], ids=["SIGHUP", "change"])
def test_sender_after_a_reload(by_signal: bool) -> None:
    """A policy holds for what is taken from then on; held mail is released with the sender that it was held with."""

    def settings(policy: str, limit: str) -> str:
        return f'[vhosts."{VHOST}"]\nlimits = ["{limit}"]\nsender = "new@a.example"\nsender_policy = "{policy}"\n'

    with Host(extra=settings("allow", "0/1h")) as host:
        host.add(VHOST)
        with host.running():
            host.send(VHOST, "-t", "-f", "given@b.example")
            host.wait(host.held, "it is held")
            start = len(host.log())
            host.configure(extra=settings("force", "unlimited"))
            if by_signal:
                host.signal(signal.SIGHUP)
            host.wait_for_log("releaser.toml", start=start)
            host.send(VHOST, "-t", "-f", "given@b.example")
            host.wait(lambda: host.rows("released"), "the second one is sent")
            host.cli("hold", "release", *host.held())
            host.wait(lambda: len(host.rows("released")) == 2, "the first one is sent")
        assert [row["sender"] for row in host.rows("released")] == ["new@a.example", "given@b.example"]


def test_sender_in_the_shared_maildrop() -> None:
    """There the settings of the name that is claimed decide, also those of a pattern; where none has any, the uid does."""
    extra = (
        '[vhosts."www.claimed.example"]\nsender = "user1@claimed.example"\nsender_policy = "force"\n'
        '[vhosts."*.own.example"]\nsender = "user1@own.example"\nsender_policy = "own-domains"\n'
    )
    with Host(default=["0/1h"], extra=extra) as host:
        host.add(VHOST)
        host.cli("vhost", "add", "--unregistered")
        for vhost in ("www.claimed.example", "www.own.example", "www.other.example"):
            host.enqueue(vhost, "-t", "-f", "given@b.example")
            host.enqueue(vhost, "-t")
        assert host.releaser("--once").returncode == 0
        senders = {(row["vhost"], row["sender"]) for row in host.rows("held")}
    assert senders == {
        ("www.claimed.example", "user1@claimed.example"),
        ("www.own.example", "user1@own.example"),
        ("www.other.example", "given@b.example"),
        ("www.other.example", LOGIN),
    }


@pytest.mark.server
def test_sender_of_a_claimed_name() -> None:
    """Who claims a name in the shared maildrop has not made its domain his own."""
    with System(extra='[vhosts."*"]\nsender_policy = "own-domains"\nsender = "safe@mail.example"\n') as system:
        system.cli("vhost", "add", "--unregistered")
        system.cli("vhost", "add", "www.c1.example", "--user", "c1")
        for vhost, sender in (("bank.example", "ceo@bank.example"), ("www.c1.example", "user@c1.example")):
            system.send(vhost, "-f", sender, "-t", message=text("one@x.example"))
        system.releaser("--once")
        senders = {row["vhost"]: row["sender"] for row in system.rows()}
    assert senders == {"bank.example": "safe@mail.example", "www.c1.example": "user@c1.example"}


# What a caller may claim: bytes that a terminal obeys, that are no UTF-8, that end a line, that are markup.
HOSTILE = b"/home/\x1b[31mred\xff\xfe\n[/b]\xe2\x80\xae\x9b/x.php"


@pytest.mark.parametrize(
    ("environment", "header", "origin"),
    [
        ({}, b"", "PYTHON"),
        ({}, b"X-PHP-Originating-Script: 1000:mailer.php\n", "1000:mailer.php"),
        ({"SCRIPT_FILENAME": "/var/www/a/index.php"}, b"", "/var/www/a/index.php"),
        ({"SCRIPT_FILENAME": "/var/www/a/index.php"}, b"X-PHP-Originating-Script: 1000:mailer.php\n",
         "/var/www/a/index.php (1000:mailer.php)"),
    ],
    ids=["program", "header", "page", "both"],
)  # fmt: skip
def test_origin(environment: dict[str, str], header: bytes, origin: str, tmp_path: Path) -> None:
    """The script is recorded as well as it is known, and shown wherever held mail is; every mark of it says: claimed."""
    with Host(default=["0/1h"]) as host:
        host.add(VHOST)
        # The parent is the interpreter that runs this test.
        run = host.enqueue(VHOST, "-t", message=header + text("one@x.example"), env=environment, cwd=tmp_path)
        assert run.returncode == 0
        assert host.releaser("--once").returncode == 0
        (held,) = host.json("hold", "list")
        shown = host.cli("hold", "show", held["queue_id"]).stdout
        facts = json.loads(host.cli("hold", "show", held["queue_id"], "--json").stdout)
        (logged,) = host.rows("held")
        program = os.readlink(f"/proc/{os.getpid()}/exe")
        expected = program if origin == "PYTHON" else origin
        assert held["script"] == facts["script"] == logged["script"] == expected
        assert (facts["cwd"], logged["cwd"]) == (str(tmp_path), str(tmp_path))
        assert expected in host.cli("hold", "list").stdout and expected in host.cli("log").stdout
        assert re.search(rf"^script \(claimed\): +{re.escape(expected)}$", shown, re.MULTILINE)
        assert re.search(rf"^cwd \(claimed\): +{re.escape(str(tmp_path))}$", shown, re.MULTILINE)
        assert re.search(rf"^program \(claimed\): +{re.escape(program)}$", shown, re.MULTILINE)
        assert host.held("--script", expected[-9:]) == [held["queue_id"]]


def test_origin_of_a_hostile_caller(tmp_path: Path) -> None:
    """Whatever a caller claims, no control character and no broken text reaches a terminal, a log or the spool."""
    directory = os.fsencode(tmp_path) + b"/\x1b[31m\xff\xe2\x80\xae"
    os.mkdir(directory)
    with Host(default=["0/1h"]) as host:
        host.add(VHOST)
        header = b"X-PHP-Originating-Script: " + HOSTILE.replace(b"\n", b"\n ") + b"\n"
        program = directory + b"/[b]\n\x9b2J"
        shutil.copy("/bin/sh", program)
        run = subprocess.run(
            [program, "-c", '"$@"; exit $?', "sh", ENQUEUE, "--spool", host.spool, VHOST, "-t"],
            input=header + text("one@x.example"), capture_output=True, env={b"SCRIPT_FILENAME": HOSTILE}, cwd=directory,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert host.releaser("--once").returncode == 0
        (held,) = host.json("hold", "list")
        everything = [
            host.cli("hold", "list").stdout, host.cli("hold", "show", held["queue_id"]).stdout, host.cli("log").stdout, host.log()
        ]  # fmt: skip
        assert re.search(r"^program \(claimed\): .*/\[b\]", everything[1], re.MULTILINE)
        stored = (host.spool / "hold" / held["queue_id"]).read_bytes()
    for said in (*everything, stored.partition(b"\n\n")[0].decode()):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", said)
    for said in everything:
        assert "\u202e" not in said and "\udcff" not in said
    assert "red" in held["script"] and held["script"].isprintable()


def test_installed_page_is_the_page() -> None:
    """`make install` brings the page that the README links."""
    assert "calling.md" in (ROOT / "Makefile").read_text() and "(calling.md)" in (ROOT / "README.md").read_text()
