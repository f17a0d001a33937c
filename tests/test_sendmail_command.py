"""The session that runs a sendmail command: what the command is given, and what each of its ends means."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from releaser import mta
from releaser.mta import Job, Kind, Outcome, SendmailSession, Unreachable

SMALL = b"Subject: a\n\n.\n..\nbody\n"


def job(*recipients: str, sender: str = "user@a.example", message: bytes = SMALL) -> Job:
    """What the releaser hands over; a message that it has in memory."""
    to = recipients or ("one@x.example",)
    return Job("0660E2E85F2C029E9", sender, to, lambda: io.BytesIO(message), len(message), message.isascii())


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], str]:
    """Makes a shell script with that text, which is started in / and finds its directory as $D."""

    def make(script: str) -> str:
        path = tmp_path / "sendmail"
        path.write_text(f"#!/bin/sh\nD={tmp_path}\n{script}\n")
        path.chmod(0o755)
        return str(path)

    return make


def only(outcomes: list[Outcome]) -> Outcome:
    (outcome,) = outcomes
    return outcome


@pytest.mark.parametrize("sender, given", [("user@a.example", "user@a.example"), ("", "<>"), ("-C/tmp@a.example",) * 2])
def test_command_is_given_words(program: Callable[[str], str], tmp_path: Path, sender: str, given: str) -> None:
    """The command line is fixed but for the addresses, and no address is an option or more than one word."""
    to = ("-oX@x.example", '"a $(id) b"@x.example', "o'hara@x.example", "b\u00fcro@x.example")
    outcomes = SendmailSession(program('printf "%s\\n" "$@" >$D/words; cat >$D/message')).send(job(*to, sender=sender))
    assert outcomes == [Outcome(address, Kind.SENT, "status 0: without a word") for address in to]
    assert (tmp_path / "words").read_text().split("\n") == ["-i", "-oep", "-f", given, "--", *to, ""]
    assert (tmp_path / "message").read_bytes() == SMALL


def test_command_has_an_environment_of_its_own(
    program: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the releaser's environment, descriptors, directory or terminal reaches the command."""
    monkeypatch.setenv("LD_PRELOAD_OF_OURS", "1")
    script = (
        "env >$D/environment; pwd >$D/directory; ls /proc/self/fd >$D/descriptors; "
        "cut -d' ' -f5,6 /proc/$$/stat >$D/session; echo $$ >$D/pid"
    )
    SendmailSession(program(script)).send(job())
    environment = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines())
    # The shell itself adds PWD and its like.
    assert {name: environment[name] for name in environment.keys() - {"PWD", "OLDPWD", "_", "SHLVL"}} == {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C",
    }
    assert (tmp_path / "directory").read_text() == "/\n"
    # 3 is the directory that ls reads.
    assert (tmp_path / "descriptors").read_text().split() == ["0", "1", "2", "3"]
    pid = (tmp_path / "pid").read_text().strip()
    assert (tmp_path / "session").read_text().split() == [pid, pid]


def test_command_reads_a_large_message_from_its_file(program: Callable[[str], str], tmp_path: Path) -> None:
    """A message on disk is read from there, from its first byte on, and not held in memory."""
    body = b"".join(b"%d\n" % number for number in range(3_000_000))
    stored = tmp_path / "stored"
    stored.write_bytes(b"Layout: 1\n\n" + body)

    def message() -> io.BufferedReader:
        stream = stored.open("rb")
        # As mailqueue.read() does: read ahead, and back to where the message begins.
        stream.read(1 << 16)
        stream.seek(11)
        return stream

    large = Job("0660E2E85F2C029E9", "", ("one@x.example",), message, len(body), True)
    session = SendmailSession(program("readlink /proc/self/fd/0 >$D/stdin; cat >$D/message"))
    assert only(session.send(large)).kind is Kind.SENT
    assert (tmp_path / "message").read_bytes() == body
    assert (tmp_path / "stdin").read_text().strip() == str(stored)


def test_command_that_reads_nothing(program: Callable[[str], str]) -> None:
    """A command that ends without having read the message is believed."""
    assert only(SendmailSession(program("exit 0")).send(job(message=SMALL * 50_000))).kind is Kind.SENT
    assert only(SendmailSession(program("exit 75")).send(job(message=SMALL * 50_000))).kind is Kind.TEMPFAIL


@pytest.mark.parametrize("status", [0, 1, 2, *range(64, 79), 100, 111, 126, 127])
def test_command_statuses(program: Callable[[str], str], status: int) -> None:
    """0 is sent, 65 and 67 are refused for good, and every other status is tried again, in the command's last words."""
    session = SendmailSession(program(f"echo first >&2; echo 'sendmail: the last' >&2; echo >&2; exit {status}"))
    kind = {0: Kind.SENT, 65: Kind.PERMFAIL, 67: Kind.PERMFAIL}.get(status, Kind.TEMPFAIL)
    words = f"status {status}: sendmail: the last"
    assert session.send(job("one@x.example", "two@x.example")) == [
        Outcome("one@x.example", kind, words),
        Outcome("two@x.example", kind, words),
    ]


@pytest.mark.parametrize("end", ["kill -9 $$", "kill -TERM $$", "exit 137", "exit 143"])
def test_command_that_is_killed(program: Callable[[str], str], end: str) -> None:
    """After death by a signal, of the command or of what a shell ran for it, nobody knows what became of the message."""
    outcome = only(SendmailSession(program(end)).send(job()))
    assert (outcome.kind, outcome.words.split(":")[0][:16]) == (Kind.UNKNOWN, "killed by signal")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie whose parent has not looked is gone as well.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_command_that_hangs(program: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that takes too long is ended with all that it has started, whatever it does with signals."""
    monkeypatch.setattr(mta, "SENDMAIL_TIMEOUT", 1)
    monkeypatch.setattr(mta, "SENDMAIL_GRACE", 0.5)
    script = "trap '' TERM; echo waiting for the disk; sh -c 'trap \"\" TERM; echo $$ >'$D'/child; while :; do sleep 60; done'"
    started = time.monotonic()
    outcome = only(SendmailSession(program(script)).send(job()))
    assert 1 <= time.monotonic() - started < 10
    assert (outcome.kind, outcome.words) == (Kind.UNKNOWN, "no end in 1 seconds: waiting for the disk")
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_command_may_take_back_what_it_has_begun(
    program: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that takes too long is asked to end before it is killed."""
    monkeypatch.setattr(mta, "SENDMAIL_TIMEOUT", 1)
    script = "trap 'rm $D/begun; exit 75' TERM; touch $D/begun; sleep 60 & wait"
    assert only(SendmailSession(program(script)).send(job())).kind is Kind.UNKNOWN
    assert not (tmp_path / "begun").exists()


def test_command_that_leaves_a_process_behind(program: Callable[[str], str], tmp_path: Path) -> None:
    """A delivery that goes on behind the command, and holds its output open, is not waited for and not ended."""
    started = time.monotonic()
    outcome = only(SendmailSession(program("echo queued; sleep 30 & echo $! >$D/child; exit 0")).send(job()))
    assert time.monotonic() - started < 10
    assert (outcome.kind, outcome.words) == (Kind.SENT, "status 0: queued")
    child = int((tmp_path / "child").read_text())
    assert alive(child)
    os.kill(child, signal.SIGKILL)


def test_command_that_says_too_much(program: Callable[[str], str]) -> None:
    """Any amount of output is read, so that the command can end, and its last line is kept, shortened."""
    script = "head -c 20000000 /dev/zero | tr '\\0' x; echo; head -c 3000 /dev/zero | tr '\\0' y; exit 69"
    outcome = only(SendmailSession(program(script)).send(job()))
    assert (outcome.kind, outcome.words) == (Kind.TEMPFAIL, "status 69: " + "y" * 500)


def test_command_that_closes_its_output(program: Callable[[str], str]) -> None:
    """A command that has closed its output is waited for without turning in circles."""
    used = time.thread_time()
    outcome = only(SendmailSession(program("exec >&- 2>&-; sleep 1; exit 67")).send(job()))
    assert outcome.kind is Kind.PERMFAIL
    assert time.thread_time() - used < 0.5


def test_command_that_is_not_there(tmp_path: Path) -> None:
    """Without a program that can be run nothing is handed over, as with an MTA that is down."""
    text_file = tmp_path / "text"
    text_file.write_text("#!/bin/sh\n")
    no_interpreter = tmp_path / "script"
    no_interpreter.write_text("#!/nowhere/sh\n")
    no_interpreter.chmod(0o755)
    for path in (tmp_path / "none", text_file, no_interpreter, tmp_path):
        with pytest.raises(Unreachable, match=str(path)):
            SendmailSession(str(path)).send(job())


def test_command_and_a_message_that_cannot_be_read(program: Callable[[str], str]) -> None:
    """A message that cannot be read waits alone: the MTA is not taken to be down."""

    def message() -> io.BytesIO:
        raise FileNotFoundError(2, "No such file or directory")

    unreadable = Job("0660E2E85F2C029E9", "", ("one@x.example",), message, 1, True)
    assert only(SendmailSession(program("exit 0")).send(unreadable)).kind is Kind.TEMPFAIL


def test_command_is_given_the_whole_message_or_none(program: Callable[[str], str], tmp_path: Path) -> None:
    """kill -9 of the releaser while the command reads: the command has the message whole, never a part of it."""
    path = program("touch $D/reading; sleep 1; cat >$D/part; mv $D/part $D/message")
    large = tmp_path / "large"
    large.write_bytes(SMALL * 100_000)
    code = (
        "import sys; from releaser.mta import Job, SendmailSession\n"
        "SendmailSession(sys.argv[1]).send(Job('i', '', ('one@x.example',), lambda: open(sys.argv[2], 'rb'), 1, True))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, path, large], cwd=Path(__file__).parent.parent)
    deadline = time.monotonic() + 20
    while not (tmp_path / "reading").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    while not (tmp_path / "message").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (tmp_path / "message").read_bytes() == SMALL * 100_000
