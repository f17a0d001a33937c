"""A process ended before its n-th call, for every n, leaves a documented state, and the next start makes it good."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import page
import pytest
from forks import ENDED, EXIT, KILL, Ended, Forks
from host import text
from servers import YES, Answer, Scripted, free_port, wait_until

from releaser import pickup
from releaser.cli.main import run
from releaser.ledger import SCHEMA_1, VERSION

ROOT = Path(__file__).parent.parent
VHOST, OTHER = "www.a.example", "www.b.example"

# Ends the process before the n-th of the calls that change a disk; prints how many there were if it lives.
DIES = """
import posix, sys
sys.path.insert(0, sys.argv.pop(1))
left = int(sys.argv.pop(1))
def dying(call):
    def counted(*args, **kwargs):
        global left
        left -= 1
        if not left:
            posix._exit(99)
        return call(*args, **kwargs)
    return counted
for name in ("open", "write", "fchmod", "fsync", "rename", "unlink"):
    setattr(posix, name, dying(getattr(posix, name)))
"""
ENQUEUE = DIES + "from enqueue.main import main\nmain()\n"


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
    assert done.stderr == b"" or done.returncode not in (0, *ENDED)
    return done.returncode


def releaser(file: Path) -> int:
    words = [sys.executable, "-m", "releaser.daemon", "--config", file, "--once"]
    return subprocess.run(words, capture_output=True, cwd=ROOT).returncode


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
        assert status in (0, *ENDED)
        ends.append((status, states[found]))
        if states[found] == "S3":
            assert releaser(file) == 0
            assert len(list((root / "mail/new").iterdir())) == 1
        if status == 0:
            break
    assert ends[-1] == (0, "S3")
    # Each state on the way was really seen: before the first file, with one half written, and submitted but unanswered.
    assert {state for status, state in ends if status in ENDED} == {"S1", "S2", "S3"}


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
import posix, sys
sys.path.insert(0, sys.argv.pop(1))
def noted(name, call):
    def note(*args, **kwargs):
        result = call(*args, **kwargs)
        calls.append(name + (f" {args[0]}" if name in ("write", "fsync") else ""))
        return result
    return note
calls = []
for name in ("write", "rename", "fsync", "utime"):
    setattr(posix, name, noted(name, getattr(posix, name)))
end = posix._exit
def ended(status):
    sys.stdout.write("\\n".join(calls))
    sys.stdout.flush()
    end(status)
posix._exit = ended
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


# What passes in the child: time. The first is for what is due later, the second for what is old.
SOON = "from releaser import incidents; incidents.NOTICE_DELAY = 0"
OLD = "from releaser import layout; layout.TMP_MAX_AGE = -1"
# Our own code cannot stand this Subject.
POISON = """
from releaser import message
text = message.Header.text
def broken(self, name):
    if b"POISON" in b"".join(raw for _, raw in self.fields):
        raise ZeroDivisionError
    return text(self, name)
message.Header.text = broken
"""
NO_SYNC = """
import errno, os
def broken(_fd):
    raise OSError(errno.EIO, os.strerror(errno.EIO))
os.fsync = broken
"""


@dataclass(frozen=True)
class Run:
    """A program as somebody starts it."""

    program: str
    words: tuple[str | Path, ...]
    stdin: bytes = b""
    code: str = ""
    # What it may end with when it is started again and finds the work done.
    statuses: tuple[int, ...] = (0,)
    # So often the releaser is started behind it until all is done; and whether it works on before a command is given again.
    behind: int = 1
    meanwhile: bool = True
    # What it ends with the first time.
    status: int = 0
    # What happens then.
    then: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Reckoning:
    """What can be told from outside: every row of the log but `retried`, where files lie, what counts for the limits.

    Rows about a vhost count once: `removed` can be there twice, and what enqueue has counted can be lost.
    """

    log: Counter[tuple[str, str]]
    files: Counter[str]
    states: Counter[str]
    counted: int
    others: str


class Server(Scripted):
    """One that can be waited for: what a client that was ended has sent may still be read."""

    def __init__(self, answer: Answer) -> None:
        self.ended: list[socket.socket] = []
        super().__init__(answer)

    def _serve(self, connection: socket.socket) -> None:
        try:
            super()._serve(connection)
        finally:
            self.ended.append(connection)


class Site:
    """An installation that can be put back to what it was, in front of a mail server that answers as the scenario says."""

    def __init__(self, directory: Path, forks: Forks) -> None:
        self.root = directory / "site"
        self.spool, self.state = self.root / "spool", self.root / "state"
        self.file = self.root / "etc/releaser.toml"
        self._forks = forks
        self._saved = 0
        # What the server says to recipients of that name.
        self.replies: dict[bytes, bytes] = {}
        self.server = Server(self._answer)
        self.file.parent.mkdir(mode=0o700, parents=True)
        self.configure()
        assert run(["--config", str(self.file), "vhost", "add", VHOST]) == 0
        # Steps of the message through the spool, in runs that were ended before each call; and whether there is one message.
        self.crossed: set[Step] = set()
        self.one_message = True
        self.ends = 0

    def configure(self, limit: str = "unlimited", mta: str = "", extra: str = "") -> None:
        self.file.write_text(
            f'spool = "{self.spool}"\nstate = "{self.state}"\n[mta]\nurl = "{mta or self.server.url}"\n'
            f'[limits]\ndefault = ["{limit}"]\n{extra}'
        )

    def _answer(self, line: bytes) -> bytes | None:
        return self.replies.get(line.partition(b"<")[2].partition(b"@")[0], YES) if line.startswith(b"RCPT") else YES

    # What somebody runs.

    def enqueue(self, *to: str, size: int = 10, subject: str = "subject", code: str = "", status: int = 0) -> Run:
        message = text(*(f"{each}@x.example" for each in to), subject=subject, body="text text\n" * (size // 10))
        words = ("--spool", self.spool, VHOST, "s@a.example", "-t")
        return Run("enqueue", words, message, code, status=status, statuses=(status,), behind=0)

    def command(self, *words: str, behind: int = 1, meanwhile: bool = True) -> Run:
        return Run("command", ("--config", self.file, *words), statuses=(0, 1), behind=behind, meanwhile=meanwhile)

    def releaser(self, code: str = "", behind: int = 1, then: Callable[[], None] = lambda: None) -> Run:
        return Run("releaser", ("--config", self.file, "--once"), code=code, behind=behind, then=then)

    def send(self, *to: str, size: int = 10, subject: str = "subject") -> None:
        """A mail that is accepted."""
        assert self.run(self.enqueue(*to, size=size, subject=subject)).status == 0

    def run(self, what: Run, at: int = 0, how: str | int = EXIT) -> Ended:
        ended = self._forks.run(what.program, *what.words, spool=self.spool, stdin=what.stdin, at=at, how=how, code=what.code)
        wait_until(lambda: len(self.server.ended) == self.server.connections, 30, "the server has seen the end")
        return ended

    def sql(self, statement: str) -> list[tuple[object, ...]]:
        if not (self.state / "ledger.sqlite").exists():
            return []
        with sqlite3.connect(self.state / "ledger.sqlite") as book:
            return book.execute(statement).fetchall()

    # Time back.

    def save(self) -> Path:
        self._saved += 1
        saved = self.root.parent / f"saved {self._saved}"
        subprocess.run(["cp", "-a", self.root, saved], check=True)
        return saved

    def restore(self, saved: Path) -> None:
        subprocess.run(["sh", "-c", 'rm -rf "$1" && cp -a "$2" "$1"', "sh", self.root, saved], check=True)
        self.server.messages.clear()

    # What came of it.

    def reckon(self) -> Reckoning:
        rows = self.sql("SELECT event, recipient FROM mail_log WHERE event NOT IN ('retried', 'rejected', 'removed')")
        rows += self.sql("SELECT DISTINCT event, recipient FROM mail_log WHERE event = 'removed'")
        places = [path for queue in ("active", "hold", "failed", "trash", "corrupt") for path in (self.spool / queue).iterdir()]
        places += [path for part in ("tmp", "new") for path in (self.spool / "vhosts").glob(f"*/{part}/*")]
        states = [str(state) for (state,) in self.sql("SELECT state FROM message")]
        ((counted,),) = self.sql("SELECT coalesce(sum(recipients), 0) FROM message WHERE counted_at IS NOT NULL")
        others = sorted(path.name for path in (self.spool / "vhosts").iterdir())
        others += sorted(path.name for path in self.state.iterdir() if "-" not in path.name)
        return Reckoning(
            Counter((str(event), str(recipient).partition("@")[0]) for event, recipient in rows),
            Counter(path.parent.name for path in places), Counter(states), int(str(counted)), " ".join(others),
        )  # fmt: skip

    def copies(self) -> Counter[str]:
        """What each recipient has got since the site was put back."""
        return Counter({address.partition("@")[0]: number for address, number in self.server.copies.items()})

    def retried(self) -> Counter[str]:
        rows = self.sql("SELECT recipient FROM mail_log WHERE event = 'retried'")
        return Counter(str(recipient).partition("@")[0] for (recipient,) in rows)

    def rejected(self) -> int:
        """The rows about refusals at the door."""
        return len(self.sql("SELECT 1 FROM mail_log WHERE event = 'rejected'"))

    # The test.

    def ended_everywhere(self, what: Run, ends: int = 1) -> None:
        """End WHAT before each of its calls, start it again, and see that all is as if it had never been ended.

        Behind this the site is as WHAT has left it. Where a start behind an end does something else than has been done so
        far, that start is ended everywhere, too: so a message meets two ENDS. Three of them, and it would be set aside.
        """
        before = self.save()
        self.server.messages.clear()
        told = self.retried()
        done = self.run(what)
        assert done.status == what.status, done
        behind = self.save()
        self._behind(what)
        wanted, copies = self.reckon(), self.copies()
        self.crossed.update(done.steps)
        lived = False
        for number in range(1, 2 * len(done.calls) + 50):
            self.restore(before)
            ended = self.run(what, number, (EXIT, KILL)[number % 2])
            lived = ended.status == what.status
            if lived:
                break
            point = f"{what.program} {what.words[2:]} ended before call {number} of {ended.calls}\n{ended.stderr}"
            assert ended.status in ENDED, point
            self.ends += 1
            if what.program == "enqueue":
                # Nobody was told that it is accepted: whoever called sends it again, or does not.
                continue
            half = self.save()
            if what.program == "command" and what.meanwhile:
                # The releaser works on meanwhile, and the administrator sees to it later.
                self._behind(what)
            again = self.run(what)
            assert again.status in what.statuses, (point, again)
            self._behind(what)
            assert self.reckon() == wanted, (point, again.stderr)
            # What enqueue has counted is a claim: a crash can lose it.
            assert self.rejected() <= 1, point
            got, may = self.copies(), self.retried() - told
            assert not copies - got, point
            assert not got - copies - may, (point, got, may)
            new = self.one_message and not self.crossed.issuperset(again.steps)
            if new and what.program == "releaser" and ends == 1:
                self.restore(half)
                self.ended_everywhere(what, ends + 1)
        assert lived
        self.restore(behind)

    def _behind(self, what: Run) -> None:
        what.then()
        for _ in range(what.behind if what.program != "enqueue" else 0):
            done = self.run(self.releaser(what.code if what.program == "releaser" else ""))
            assert done.status == 0, done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.server.close()


# A scenario says what is run, and has it ended everywhere; the next begins where the one before has led undisturbed. What
# has become of it then is said outright, too.
Scenario = Iterator[Run]
Step = tuple[frozenset[str], frozenset[str], str, str]
LARGE = pickup.SMALL + 10


def outcome(site: Site, files: str = "", **events: str) -> None:
    """What lies where, and whose rows the log has."""
    found = site.reckon()
    assert sorted(found.files.elements()) == sorted(files.split())
    # A dot for no recipient.
    assert found.log == Counter((event, name.strip(".")) for event, names in events.items() for name in names.split())


def sent(site: Site) -> Scenario:
    site.configure("10/1h")
    yield site.enqueue("a", "b")
    yield site.releaser()
    outcome(site, released="a b")
    assert site.reckon().counted == 2


def not_accepted(site: Site) -> Scenario:
    site.configure(extra='max_message_size = "1K"\n')
    assert site.run(site.releaser()).status == 0
    yield site.enqueue("a", size=5000, status=os.EX_UNAVAILABLE)
    yield site.enqueue("a", code=NO_SYNC, status=os.EX_IOERR)
    outcome(site)


def left_in_tmp(site: Site) -> Scenario:
    (site.spool / "vhosts" / VHOST / "tmp/1795376167.011099.P3395.2bad27e5dbb62169d779a57a").write_text("half")
    yield site.releaser(OLD)
    outcome(site)


def no_message(site: Site) -> Scenario:
    (site.spool / "vhosts" / VHOST / "new/junk").write_text("junk")
    yield site.releaser()
    outcome(site, "corrupt", corrupt=".")


def large(site: Site) -> Scenario:
    site.send("a", size=LARGE)
    site.configure(mta=f"smtp://127.0.0.1:{free_port()}")
    yield site.releaser(then=site.configure)
    outcome(site, "new")
    site.configure()
    yield site.releaser()
    outcome(site, released="a")


def held_and_decided(site: Site) -> Scenario:
    site.configure("1/1h")
    site.send("a", "b")
    yield site.releaser()
    outcome(site, "hold", held="a b")
    for decision, files in (("delete", "trash"), ("undelete", "hold"), ("release", "")):
        yield site.command("hold", decision, "--all", "--yes")
        yield site.releaser()
        assert " ".join(site.reckon().files) == files
    outcome(site, held="a b", deleted="a b", undeleted="a b", released="a b")
    assert site.reckon().counted == 0


def deferred_and_refused(site: Site) -> Scenario:
    site.replies = {b"later": b"450 later", b"no": b"550 no"}
    site.send("yes", "no", "later")
    yield site.releaser()
    outcome(site, "active", released="yes", failed="no", deferred="later")
    site.replies[b"later"] = b"550 no more"
    site.sql("UPDATE message SET next_try = 0")
    yield site.releaser()
    outcome(site, "failed", released="yes", failed="no later", deferred="later")
    assert site.reckon().counted == 3
    site.replies.clear()
    yield site.command("hold", "release", "--failed", "--all", "--yes")
    yield site.releaser()
    outcome(site, released="yes no later", failed="no later", deferred="later")


def deferred_and_taken(site: Site) -> Scenario:
    site.replies = {b"later": b"450 later"}
    site.send("yes", "later", size=LARGE)
    assert site.run(site.releaser()).status == 0
    outcome(site, "active", released="yes", deferred="later")
    site.replies.clear()
    site.sql("UPDATE message SET next_try = 0")
    yield site.releaser()
    outcome(site, released="yes later", deferred="later")


def refused(site: Site, size: int = 10) -> Scenario:
    site.replies = {b"no": b"550 no"}
    site.send("no", size=size)
    yield site.releaser()
    outcome(site, "failed", failed="no")
    yield site.command("hold", "delete", "--failed", "--all", "--yes")
    yield site.releaser()
    outcome(site, "trash", failed="no", deleted="no")


def large_refused(site: Site) -> Scenario:
    yield from refused(site, LARGE)


def expired(site: Site) -> Scenario:
    """What was deleted, and what was refused, long ago."""
    long_ago = "2020-01-01T00:00:00.000000Z"
    aged = f"UPDATE message SET held_at = NULL, picked_up_at = '{long_ago}', executed_at = '{long_ago}'"
    site.configure("0/1h")
    site.send("a")
    assert site.run(site.releaser()).status == 0
    assert site.run(site.command("hold", "delete", "--all", "--yes")).status == 0
    assert site.run(site.releaser()).status == 0
    site.sql(aged)
    yield site.releaser()
    outcome(site, held="a", deleted="a", expired="a")
    site.configure()
    site.replies = {b"no": b"550 no"}
    site.send("no")
    assert site.run(site.releaser()).status == 0
    site.sql(aged)
    yield site.releaser()
    outcome(site, held="a", deleted="a", failed="no", expired="a no")
    assert site.reckon().counted == 1


def stopped_while_deferred(site: Site) -> Scenario:
    site.replies = {b"later": b"450 later"}
    site.send("later")
    assert site.run(site.releaser()).status == 0
    site.sql("UPDATE message SET next_try = 0")
    yield site.command("stop", VHOST, "--why", "broken into", meanwhile=False)
    yield site.releaser()
    assert site.run(site.command("resume", VHOST)).status == 0
    outcome(site, "hold", deferred="later", held="later", stopped=".", resumed=".")


def ledger_lost(site: Site) -> Scenario:
    site.replies = {b"later": b"450 later"}
    site.send("later")
    assert site.run(site.releaser()).status == 0
    for file in site.state.iterdir():
        file.unlink()
    yield site.releaser()
    outcome(site, "hold", held="later")


def notice(site: Site) -> Scenario:
    site.configure("0/1h", extra='over_limit = "observe"\nnotify = "admin@x.example"\n')
    site.send("a")
    assert site.run(site.releaser()).status == 0
    yield site.releaser(SOON)
    outcome(site, released="a admin")
    assert site.sql("SELECT count(*) FROM incident WHERE notified_at IS NOT NULL") == [(1,)]


TRACED: tuple[Callable[[Site], Scenario], ...] = (
    sent, not_accepted, left_in_tmp, no_message, large, held_and_decided, deferred_and_refused, deferred_and_taken, refused,
    large_refused, expired, stopped_while_deferred, ledger_lost, notice,
)  # fmt: skip


def several(site: Site) -> Scenario:
    site.configure("3/1h")
    for subject, size in (("one", 10), ("two", LARGE), ("three", 10)):
        site.send(subject, size=size)
    site.send("a", "b")
    yield site.releaser()
    outcome(site, "hold", released="one two three", held="a b")


def poison(site: Site) -> Scenario:
    site.send("bad", subject="POISON")
    site.send("good")
    yield site.releaser(POISON, behind=4)
    for _ in range(3):
        assert site.run(site.releaser(POISON)).status == 0
    outcome(site, "corrupt", released="good", corrupt=".")


def capped(site: Site) -> Scenario:
    site.configure("0/1h", extra="hold_max_messages = 1\n")
    for subject in ("a", "b"):
        site.send(subject)
    yield site.releaser()
    outcome(site, "hold new", held="a")
    yield site.command("hold", "delete", "--all", "--yes", behind=2)
    yield site.releaser()
    outcome(site, "trash hold", held="a b", deleted="a")


def refused_at_the_door(site: Site) -> Scenario:
    site.configure("1/1h", extra='over_limit = "reject"\n')
    site.send("a")
    assert site.run(site.releaser()).status == 0
    for _ in range(3):
        assert site.run(site.enqueue("b")).status == os.EX_UNAVAILABLE
    yield site.releaser()
    outcome(site, released="a")
    assert site.rejected() == 1


def renamed(site: Site) -> Scenario:
    site.configure("1/1h")
    site.send("a")
    site.send("b")
    assert site.run(site.releaser()).status == 0
    yield site.command("vhost", "rename", VHOST, OTHER)
    yield site.releaser()
    outcome(site, "hold", released="a", held="b", renamed=".")
    assert site.sql("SELECT DISTINCT vhost, maildrop FROM message") == [(OTHER, OTHER)]
    assert site.reckon().counted == 1


def added_and_removed(site: Site) -> Scenario:
    yield site.command("vhost", "add", OTHER)
    assert site.run(site.command("check")).status == 0
    site.configure("0/1h")
    site.send("a")
    assert site.run(site.releaser()).status == 0
    site.send("b")
    yield site.command("vhost", "remove", VHOST, "--delete-mail", "--yes", meanwhile=False)
    assert site.run(site.releaser()).status == 0
    outcome(site, "trash", held="a", deleted="a", removed=".")


def repaired(site: Site) -> Scenario:
    site.configure("0/1h")
    for subject in ("a", "b", "c", "d"):
        site.send(subject)
    assert site.run(site.releaser()).status == 0
    first, second, third, _ = (path.name for path in sorted((site.spool / "hold").iterdir()))
    site.sql(f"DELETE FROM message WHERE queue_id = '{first}'")
    (site.spool / "hold" / second).unlink()
    (site.spool / "hold" / third).rename(site.spool / "trash" / third)
    (site.spool / "corrupt" / "0660E2E85F2C029E9").write_text("junk")
    (site.spool / "wake/control").unlink()
    yield site.command("check", "--repair")
    assert "nothing needs repair" in site.run(site.command("check")).stderr
    outcome(site, "hold hold hold corrupt", held="a a b c d", unknown="b", corrupt=".")


def migrated(site: Site) -> Scenario:
    for file in site.state.iterdir():
        file.unlink()
    columns = (
        "queue_id, vhost, state, source, digest, counted_at, recipients, remaining, sender, size, arrived_at, picked_up_at, "
        "uid, verified, message_id, subject, script, cwd, reason"
    )
    with sqlite3.connect(site.state / "ledger.sqlite") as book:
        book.executescript(SCHEMA_1 + "PRAGMA user_version = 1; INSERT INTO meta VALUES ('node', '0123456789abcdef');")
        book.execute(
            f"INSERT INTO message ({columns}) VALUES ('{'1' * 17}', '{VHOST}', 'done', NULL, '', 5.0, 3, '[]', 's@a.example', 9, "
            "'', '9999', 0, 1, '<1@a>', 'subject', '', '', '')"
        )
    yield site.releaser()
    assert site.sql("PRAGMA user_version") == [(VERSION,)]
    assert (site.reckon().counted, site.reckon().states) == (3, Counter(done=1))
    with sqlite3.connect(site.state / "ledger.sqlite.1") as kept:
        assert kept.execute("SELECT count(*) FROM message").fetchone() == (1,)


SCENARIOS = (*TRACED, several, poison, capped, refused_at_the_door, renamed, added_and_removed, repaired, migrated)


def ended_everywhere(scenario: Callable[[Site], Scenario], directory: Path) -> Site:
    with Forks(directory) as forks, Site(directory, forks) as site:
        site.one_message = scenario in TRACED
        for what in scenario(site):
            site.ended_everywhere(what)
    return site


@pytest.fixture(scope="module")
def crossed() -> dict[str, set[Step]]:
    """The steps of the scenarios that have been run."""
    return {}


@pytest.mark.server
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_ended_before_each_call(scenario: Callable[[Site], Scenario], tmp_path: Path, crossed: dict[str, set[Step]]) -> None:
    """After a start every recipient has one outcome in the log, and what was sent twice is `retried`; usage counts once."""
    site = ended_everywhere(scenario, tmp_path)
    assert site.ends >= 3
    crossed[scenario.__name__] = site.crossed if site.one_message else set()


def documented(text: str) -> set[Step]:
    queues = {state: found for found, state in page.queues_of(text).items()}
    return {(queues[row[0]], queues[row[1]], row[2], row[3]) for row in page.table(text, "transitions")}


@pytest.mark.server
def test_documented_transitions_are_those_that_were_ended(tmp_path: Path, crossed: dict[str, set[Step]]) -> None:
    """documented == ended before and behind; and with any row of the page removed the comparison fails."""
    for scenario in TRACED:
        if scenario.__name__ not in crossed:
            directory = tmp_path / scenario.__name__
            directory.mkdir()
            crossed[scenario.__name__] = ended_everywhere(scenario, directory).crossed
    found = set().union(*crossed.values())
    assert found == documented(page.text())
    for number in range(len(page.table(page.text(), "transitions"))):
        assert documented(page.without_row(page.text(), "transitions", number)) != found
