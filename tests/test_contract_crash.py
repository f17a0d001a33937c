"""A process ended before its n-th call, for every n, leaves a documented state, and the next start makes it good."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import page
import pytest

from releaser.cli.main import run

ROOT = Path(__file__).parent.parent
VHOST = "www.a.example"
ENDED = 99

# Ends the process before the n-th of the calls that change a disk; prints how many there were if it lives.
DIES = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
left = int(sys.argv.pop(1))
def dying(call):
    def counted(*args, **kwargs):
        global left
        left -= 1
        if not left:
            os._exit(99)
        return call(*args, **kwargs)
    return counted
for name in ("open", "write", "fchmod", "fsync", "rename", "unlink"):
    setattr(os, name, dying(getattr(os, name)))
"""
ENQUEUE = DIES + "from enqueue.main import main\nmain()\n"
RELEASER = (
    DIES
    + """
from releaser.ledger import Ledger
from releaser.mta import Senders
Ledger.transaction = dying(Ledger.transaction)
Senders.send = dying(Senders.send)
from releaser.handover import HandOver
HandOver.take_results = dying(HandOver.take_results)
from releaser.daemon import main
main()
"""
)


def installed(root: Path) -> Path:
    (root / "etc").mkdir(mode=0o700, parents=True)
    file = root / "etc/releaser.toml"
    file.write_text(
        f'spool = "{root}/spool"\nstate = "{root}/state"\n[mta]\nurl = "maildir:{root}/mail"\n[limits]\ndefault = ["3/1h"]\n'
    )
    assert run(["--config", str(file), "vhost", "add", VHOST]) == 0
    return file


def enqueue(root: Path, message: bytes, dies: int = 0) -> int:
    words = [sys.executable, "-IS", "-c", ENQUEUE, ROOT, str(dies), "--spool", root / "spool", VHOST, "s@a.example", "-t"]
    done = subprocess.run(words, input=message, capture_output=True)
    assert done.stderr == b"" or done.returncode not in (0, ENDED)
    return done.returncode


def releaser(file: Path, dies: int = 0) -> int:
    words = [sys.executable, "-c", RELEASER, ROOT, str(dies), "--config", str(file), "--once"]
    return subprocess.run(words, capture_output=True).returncode


def log(file: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    capsys.readouterr()
    assert run(["--config", str(file), "log", "--json"]) == 0
    rows: list[dict[str, str]] = json.loads(capsys.readouterr().out)
    return rows


def test_enqueue_ended_before_each_call(tmp_path: Path) -> None:
    """The directory shows a documented state; 0 is answered only when the message is submitted, and then it goes out."""
    states = page.queues_of(page.text())
    ends = []
    for number in range(1, 100):
        root = tmp_path / str(number)
        file = installed(root)
        status = enqueue(root, b"To: a@x.example\n\ntext\n", dies=number)
        found = frozenset(part for part in ("tmp", "new") if any((root / "spool/vhosts" / VHOST / part).iterdir()))
        assert found in states
        assert status in (0, ENDED)
        ends.append((status, states[found]))
        if states[found] == "S3":
            assert releaser(file) == 0
            assert len(list((root / "mail/new").iterdir())) == 1
        if status == 0:
            break
    assert ends[-1] == (0, "S3")
    # Each state on the way was really seen: before the first file, with one half written, and submitted but unanswered.
    assert {state for status, state in ends if status == ENDED} == {"S1", "S2", "S3"}


# The caller's terminal, or its time limit, tells the process to end behind the commit.
SIGNALLED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
number = int(sys.argv.pop(1))
fsync = os.fsync
def signalled(fd):
    os.kill(os.getpid(), number)
    fsync(fd)
os.fsync = signalled
from enqueue.main import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGXCPU])
def test_enqueue_told_to_end_behind_the_commit(tmp_path: Path, number: signal.Signals) -> None:
    """A message that is submitted is answered with 0: who is told that it failed sends it again."""
    installed(tmp_path)
    words = [sys.executable, "-IS", "-c", SIGNALLED, ROOT, str(int(number)), "--spool", tmp_path / "spool", VHOST, "-t"]
    done = subprocess.run(words, input=b"To: a@x.example\n\ntext\n", capture_output=True)
    assert len(list((tmp_path / "spool/vhosts" / VHOST / "new").iterdir())) == 1
    assert (done.returncode, done.stderr) == (0, b"")


# Notes the calls that durability rests on, with the descriptor where they have one.
NOTES = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
def noted(name, call):
    def note(*args, **kwargs):
        result = call(*args, **kwargs)
        calls.append(name + (f" {args[0]}" if name in ("write", "fsync") else ""))
        return result
    return note
calls = []
for name in ("write", "rename", "fsync", "utime"):
    setattr(os, name, noted(name, getattr(os, name)))
end = os._exit
def ended(status):
    sys.stdout.write("\\n".join(calls))
    sys.stdout.flush()
    end(status)
os._exit = ended
from enqueue.main import main
main()
"""


def test_the_file_is_synced_behind_the_rename(tmp_path: Path) -> None:
    """The order that durability rests on: write, rename, fsync of the same descriptor, then the bell."""
    installed(tmp_path)
    words = [sys.executable, "-IS", "-c", NOTES, ROOT, "--spool", tmp_path / "spool", VHOST]
    done = subprocess.run(words, input=b"To: a@x.example\n\ntext\n", capture_output=True)
    written, renamed, synced, rung = done.stdout.decode().split("\n")
    assert (renamed, rung) == ("rename", "utime")
    assert written.split()[0] == "write" and synced == f"fsync {written.split()[1]}"


def test_releaser_ended_before_each_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything accepted is out exactly once or held, but for the documented duplicate; each outcome is logged once."""
    template = tmp_path / "template"
    file = installed(template)
    body = {"one": b"small", "two": b"x" * 70 + b"\n" + (b"y" * 70 + b"\n") * 16000, "three": b"small too"}
    for subject, text in body.items():
        assert enqueue(template, b"To: a@x.example\nSubject: " + subject.encode() + b"\n\n" + text + b"\n") == 0
    held = b"To: a@x.example, b@x.example\nSubject: held\n\ntext\n"
    assert enqueue(template, held) == 0
    lived = False
    seen = set()
    for number in range(1, 200):
        root = tmp_path / str(number)
        subprocess.run(["cp", "-a", template, root], check=True)
        file = root / "etc/releaser.toml"
        file.write_text(file.read_text().replace(str(template), str(root)))
        status = releaser(file, dies=number)
        assert status in (0, ENDED)
        lived = status == 0
        if not lived:
            assert releaser(file) == 0
        rows = log(file, capsys)
        delivered = sorted(
            path.read_bytes().split(b"Subject: ")[1].split(b"\n")[0].decode() for path in (root / "mail/new").iterdir()
        )
        again = [row["subject"] for row in rows if row["event"] == "retried"]
        twice = [subject for subject in body if delivered.count(subject) > 1]
        assert set(delivered) == set(body), number
        assert all(delivered.count(subject) <= 2 for subject in body) and set(twice) <= set(again), number
        assert sorted(row["subject"] for row in rows if row["event"] == "released") == sorted(body), number
        assert [row["recipient"] for row in rows if row["event"] == "held"] == ["a@x.example", "b@x.example"], number
        left = [str(p.relative_to(root / "spool")) for p in (root / "spool").rglob("*") if p.is_file() and p.name != "policy"]
        assert len(left) == 1 and left[0].startswith("hold/"), (number, left)
        seen.add(tuple(again))
        subprocess.run(["rm", "-rf", root], check=True)
        if lived:
            break
    assert lived
    # Some of the ends did come between DATA and the outcome, or nothing was shown.
    assert len(seen) > 1
    assert os.path.exists(template)
