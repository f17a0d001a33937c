"""The releaser when the MTA, the file system, a person and a customer do things at the worst moment.

Most tests drive the engine in this process, in front of a mail server that answers as the test says; some run the real
commands.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from host import Host, text
from servers import HANG_UP, YES, Answer, always_yes
from servers import Scripted as Server

from releaser import config, handover, layout, maildrops, mailqueue, pickup, policy, release, usage
from releaser.batch import Batch
from releaser.cli.main import run
from releaser.ledger import CORRUPT, HELD, Ledger

A, B, C = "www.a.example", "www.b.example", "www.c.example"
MANY = [f"r{number}@x.example" for number in range(150)]
THIRTY = MANY[:30]
LARGE = b"y" * 70 + b"\n"
ONE_MORE_MIB = pickup.SMALL // len(LARGE) + 1


class Crash(BaseException):
    """The process ends here."""


class Site:
    """A spool with its vhosts and configuration, and the engine in this process."""

    def __init__(self, root: Path, url: str, default: str = "unlimited", vhosts: Sequence[str] = (A,), extra: str = "") -> None:
        self.root = root
        self.spool = root / "spool"
        self.file = root / "etc/releaser.toml"
        self.file.parent.mkdir(mode=0o700, parents=True)
        self.configure(url, default, extra)
        self.cli(*(("vhost", "add", vhost) for vhost in vhosts))

    def configure(self, url: str, default: str = "unlimited", extra: str = "") -> None:
        places = f'spool = "{self.spool}"\nstate = "{self.root}/state"\n'
        self.file.write_text(f'{places}[mta]\nurl = "{url}"\n[limits]\ndefault = ["{default}"]\n{extra}')

    def load(self) -> config.Config:
        return config.load(str(self.file))

    def cli(self, *commands: Sequence[str]) -> None:
        for words in commands:
            assert run(["--config", str(self.file), *words]) == 0

    def decide(self, decision: str) -> None:
        self.cli(("hold", decision, "--all", "--yes"))

    def put(
        self, vhost: str = A, to: Sequence[str] = ("r@x.example",), body: bytes = b"body\n", sender: str = "", name: str = ""
    ) -> Path:
        """A submitted message, whole at once; its file."""
        head = [f"Layout: 1\nVhost: {vhost}\nSender: {sender or f's@{vhost}'}\n", *(f"Recipient: {each}\n" for each in to)]
        content = "".join(head).encode() + b"\nSubject: s\nMessage-ID: <1@a>\n\n" + body
        now = time.time()
        name = name or f"{int(now)}.{int(now % 1 * 1e6):06d}.P1.{os.urandom(12).hex()},S={len(content)}"
        assert layout.submitted_size(name.encode()) == len(content)
        temporary = self.spool / "vhosts" / vhost / "tmp" / name
        temporary.write_bytes(content)
        return temporary.rename(self.spool / "vhosts" / vhost / "new" / name)

    @contextmanager
    def engine(self) -> Iterator[release.Releaser]:
        """An engine before its start. When it ends in good order or by a crash, nothing of it works on."""
        self.ledger = Ledger(str(self.root / "state"), create=True)
        engine = release.Releaser(self.load(), self.ledger, lambda: None)
        try:
            yield engine
        finally:
            engine._handover.senders.stop()
            self.ledger.close()

    @contextmanager
    def started(self) -> Iterator[release.Releaser]:
        with self.engine() as engine:
            engine.start()
            yield engine

    def rows(self) -> list[dict[str, Any]]:
        """The messages that the ledger knows, oldest first."""
        return self._query("SELECT * FROM message ORDER BY queue_id")

    def states(self) -> list[str]:
        return sorted(row["state"] for row in self.rows())

    def log(self, *events: str) -> list[tuple[str, str]]:
        """(event, recipient) of the log; where events are named, only theirs."""
        found = [(row["event"], row["recipient"]) for row in self._query("SELECT * FROM mail_log ORDER BY seq")]
        return [row for row in found if not events or row[0] in events]

    def ls(self) -> list[str]:
        """The directories that have something, once for each file or directory in them."""
        found = [path for queue in layout.QUEUES for path in (self.spool / queue).iterdir()]
        found += [path for part in ("tmp", "new") for path in (self.spool / "vhosts").glob(f"*/{part}/*")]
        return sorted(path.parent.name for path in found)

    def _query(self, sql: str) -> list[dict[str, Any]]:
        book = sqlite3.connect(self.root / "state/ledger.sqlite")
        book.row_factory = sqlite3.Row
        try:
            return [dict(row) for row in book.execute(sql)]
        finally:
            book.close()


def work(engine: release.Releaser, until: Callable[[], object], what: str, timeout: float = 8.0) -> None:
    """Lets the engine work until the condition holds."""
    end = time.monotonic() + timeout
    while not until():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout} s: {what}")
        engine.step()
        time.sleep(0.002)


def settle(engine: release.Releaser, timeout: float = 8.0) -> None:
    """Lets the engine do all that can be done now."""
    engine.step()
    work(engine, lambda: engine.idle, "nothing is left that could be done now", timeout)
    engine.step()


@contextmanager
def crash(monkeypatch: pytest.MonkeyPatch, durable: bool = True) -> Iterator[None]:
    """What is inside ends as the process would with its next commit: where that is durable, what follows it is not done."""
    commit = Batch.commit

    def ended(batch: Batch) -> None:
        if batch._writes:
            batch._after.clear()
            if durable:
                commit(batch)
            raise Crash
        commit(batch)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Batch, "commit", ended)
        yield


@contextmanager
def once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: int, when: Callable[..., bool]) -> Iterator[list[Any]]:
    """Inside, the first call of owner.name to whose arguments the condition applies fails; the list has it then."""
    call, failed = getattr(owner, name), list[Any]()

    def failing(*args: Any, **kwargs: Any) -> Any:
        if not failed and when(*args):
            failed.append(args)
            raise OSError(error, os.strerror(error))
        return call(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        yield failed


def used(engine: release.Releaser, vhost: str = A) -> int:
    """Usage of the first limit, in memory."""
    return engine._account(vhost).used(engine._ledger.clock.now())[0][1]


def used_by_the_ledger(engine: release.Releaser, vhost: str = A) -> int:
    """The same, as a start would find it."""
    return usage.account(engine._ledger, vhost, engine.config.vhost(vhost)).used(engine._ledger.clock.now())[0][1]


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is deferred is tried again after some tenths of a second."""
    monkeypatch.setattr(handover, "MESSAGE_BACKOFF", (0.3, 0.3))


def refusing(verb: bytes, words: bytes) -> Answer:
    return lambda command: words if command.startswith(verb) else YES


def first_time(wanted: bytes, words: bytes | None) -> Answer:
    """Answers the first command that begins so with those words, and takes everything else."""
    seen: list[bytes] = []

    def answer(command: bytes) -> bytes | None:
        if command.startswith(wanted):
            seen.append(command)
            return words if len(seen) == 1 else YES
        return YES

    return answer


def deferred(site: Site, engine: release.Releaser) -> None:
    """Until the one message waits in active/."""
    work(engine, lambda: site.ls() == ["active"] and not engine._handover.in_flight, "the message is deferred")
    assert [row["deferred_at"] is not None for row in site.rows()] == [True]


# Deferral.


@pytest.mark.parametrize("verb, words", [(b"RCPT", b"450 4.1.2 no such domain"), (b"MAIL", b"452 4.3.1 disk full")])
def test_many_recipients_are_deferred_as_one(server: Server, verb: bytes, words: bytes) -> None:
    """More recipients than one transaction takes, all deferred: each is tried once, then the message waits; SIGTERM ends."""
    server.answer = refusing(verb, words)
    with Host(mta=server.url) as host:
        host.add(A)
        host.send(A, message=text(*MANY))
        host.start()
        host.wait(lambda: len(host.rows("deferred")) >= len(MANY), "all recipients are deferred")
        # Nothing else happens before the backoff has passed.
        time.sleep(1)
        assert sorted(row["recipient"] for row in host.rows()) == sorted(MANY)
        assert {row["event"] for row in host.rows()} == {"deferred"}
        assert server.count(b"MAIL") == 2 and server.count(b"DATA") == 0
        assert server.connections <= 3
        assert host.stop(timeout=5) == 0
        book = sqlite3.connect(host.state / "ledger.sqlite")
        ((attempts, pause),) = book.execute("SELECT attempts, next_try - deferred_at FROM message")
        book.close()
        assert (attempts, round(pause)) == (1, handover.MESSAGE_BACKOFF[0])
        assert "next_try=10s" in host.log()
        assert [name.partition("/")[0] for name in host.ls()] == ["active"]


# A file system that fails for a moment.


@pytest.mark.parametrize("restart", [False, True], ids=["same-run", "restart"])
def test_deferred_mail_outlives_a_failed_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server, soon: None, restart: bool
) -> None:
    """Too many open files when a deferred message is taken up again: it waits, and goes out later, once."""
    server.answer = refusing(b"RCPT", b"451 later")
    site = Site(tmp_path, server.url)
    site.put()
    with site.started() as engine:
        deferred(site, engine)
        server.answer = always_yes
        with once(monkeypatch, mailqueue, "read", errno.EMFILE, lambda path: "/active/" in path) as failed:
            work(engine, lambda: failed, "the file cannot be opened")
        assert (site.states(), site.ls(), server.messages) == (["active"], ["active"], [])
        if not restart:
            work(engine, lambda: server.messages, "the message goes out")
            settle(engine)
    if restart:
        with site.started() as engine:
            work(engine, lambda: server.messages, "the message goes out after the restart")
            settle(engine)
    assert (site.states(), site.ls(), len(server.messages)) == (["done"], [], 1)
    assert site.log() == [("deferred", "r@x.example"), ("released", "r@x.example")]


@pytest.mark.parametrize("restart", [False, True], ids=["same-run", "restart"])
def test_released_mail_outlives_a_failed_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server, soon: None, restart: bool
) -> None:
    """A rename that fails when a person releases a message: it stays where it is, and goes out later, once."""
    site = Site(tmp_path, server.url, "0/1h")
    site.put()
    with site.started() as engine:
        settle(engine)
        assert site.ls() == ["hold"]
        site.decide("release")
        engine.scan()
        with once(monkeypatch, os, "rename", errno.EMFILE, lambda source, _: "/hold/" in os.fsdecode(source)) as failed:
            engine.step()
        assert failed
        # The attempt that finds no file.
        for _ in range(3):
            engine.step()
        assert site.states() == ["active"]
        assert site.ls() in (["hold"], ["active"])
        if not restart:
            work(engine, lambda: server.messages, "the message goes out")
            settle(engine)
    if restart:
        with site.started() as engine:
            work(engine, lambda: server.messages, "the message goes out after the restart")
            settle(engine)
    assert (site.states(), site.ls(), len(server.messages)) == (["done"], [], 1)
    assert site.log("unknown") == []


def test_newer_layout_in_active_waits_for_its_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server, soon: None
) -> None:
    """A file in active/ that a newer program wrote stays and is not closed, over restarts; readable again, it goes out."""
    server.answer = refusing(b"RCPT", b"451 later")
    site = Site(tmp_path, server.url)
    site.put()
    with site.started() as engine:
        deferred(site, engine)
        engine.stop()
    server.answer = always_yes
    (file,) = (site.spool / "active").iterdir()
    content = file.read_bytes()
    file.write_bytes(content.replace(b"Layout: 2\n", b"Layout: 3\n", 1))
    reads: list[str] = []
    read = mailqueue.read

    def counted(path: str) -> Any:
        reads.append(path)
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(mailqueue, "read", counted)
        for count in (1, 2):
            with site.started() as engine:
                work(engine, lambda count=count: len(reads) >= count, "it is tried again")  # type: ignore[misc]
                settle(engine)
            assert (site.states(), site.ls(), server.messages) == (["active"], ["active"], [])
    file.write_bytes(content)
    with site.started() as engine:
        work(engine, lambda: server.messages, "the message goes out")
        settle(engine)
    assert (site.states(), site.ls(), len(server.messages)) == (["done"], [], 1)


def test_file_in_new_that_cannot_be_opened_now_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    """Too many open files when a message is picked up: it stays in new/, and goes out a little later."""
    site = Site(tmp_path, server.url)
    site.put()
    with site.started() as engine:
        with once(monkeypatch, os, "open", errno.EMFILE, lambda path, *_: b"/new/" in os.fsencode(path)) as failed:
            settle(engine)
        assert failed
    assert (site.ls(), len(server.messages), site.log()) == ([], 1, [("released", "r@x.example")])


def test_copy_whose_directory_cannot_be_synced_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mailqueue.store() leaves neither a dot file nor the final name when the sync of the directory fails."""
    (tmp_path / "hold").mkdir()
    queue_id = layout.new_queue_id()
    fsync = os.fsync

    def failing(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            assert os.listdir(tmp_path / "hold") == [queue_id]
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            mailqueue.store(str(tmp_path), "hold", queue_id, b"Layout: 1\n\n", iter([b"text\n"]))
    assert os.listdir(tmp_path / "hold") == []
    assert mailqueue.store(str(tmp_path), "hold", queue_id, b"Layout: 1\n\n", iter([b"text\n"])) == (5, True)
    assert os.listdir(tmp_path / "hold") == [queue_id]


def test_hold_whose_directory_cannot_be_synced_is_held_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    """The sync of hold/ fails once: the message stays in new/ and is held a little later, and once after a restart."""
    site = Site(tmp_path, server.url, "0/1h")
    site.put()
    with site.started() as engine:
        with once(monkeypatch, mailqueue, "sync_directory", errno.EIO, lambda path: path.endswith("/hold")) as failed:
            settle(engine)
        assert failed
    with site.started() as engine:
        settle(engine)
    assert (site.ls(), site.states(), site.log()) == (["hold"], ["held"], [("held", "r@x.example")])


# What enqueue has accepted.


@pytest.mark.parametrize("lowered", [False, True], ids=["without-policy", "limit-lowered"])
def test_mail_larger_than_the_limit_waits_in_new(lowered: bool) -> None:
    """Accepted under another limit, a message that is too large stays in new/, and goes out when the limit is raised."""
    small, large = 'max_message_size = "1M"\n', 'max_message_size = "10M"\n'
    with Host(extra=large if lowered else small) as host:
        host.add(A)
        if lowered:
            host.configure(extra=small)
        else:
            (host.spool / "vhosts" / A / "policy").unlink()
        host.send(A, message=text("one@x.example", body="x\n" * 3_000_000))
        for _ in range(2):
            assert host.releaser("--once").returncode == 0
            (left,) = host.ls()
            assert left.startswith(f"vhosts/{A}/new/")
        assert (host.mail(), host.rows()) == ([], [])
        host.configure(extra=large)
        assert host.releaser("--once").returncode == 0
        assert (len(host.mail()), host.ls()) == (1, [])


def test_enqueue_takes_as_many_recipients_as_the_releaser() -> None:
    """10,001 recipients are refused with 65 and a sentence; 10,000 are accepted, and are no corrupt file."""
    with Host(default=["0/1h"]) as host:
        host.add(A)
        addresses = [f"r{number}@x.example" for number in range(10_001)]
        refused = host.enqueue(A, *addresses)
        assert (refused.returncode, refused.stderr.count(b"\n")) == (65, 1)
        assert b"10001 recipients" in refused.stderr
        assert host.ls() == []
        host.send(A, *addresses[1:])
        assert host.releaser("--once").returncode == 0
        (held,) = host.ls()
        assert held.startswith("hold/")
        assert len(host.rows("held")) == 10_000


def test_file_in_corrupt_is_recorded_after_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    """A crash between the rename into corrupt/ and its commit: the next start records the file, once."""
    site = Site(tmp_path, server.url)
    (site.spool / "vhosts" / A / "new/junk").write_text("junk")
    with site.started() as engine, crash(monkeypatch, durable=False):
        settle(engine)
    assert (site.ls(), site.rows()) == (["corrupt"], [])
    for _ in range(2):
        with site.started() as engine:
            settle(engine)
        (row,) = site.rows()
        assert row["state"] == CORRUPT
        assert [path.name for path in (site.spool / "corrupt").iterdir()] == [row["queue_id"]]
        assert site.log() == [("corrupt", "")]
        site.cli(("check",))


# What the MTA has said, and what it has not.


def test_message_without_a_final_reply_is_tried_again(tmp_path: Path, server: Server, soon: None) -> None:
    """The server takes the message and hangs up: it is sent again, with the same Message-ID, and the log says so first."""
    server.answer = first_time(b".", HANG_UP)
    site = Site(tmp_path, server.url)
    site.put(to=("a@x.example", "b@x.example"))
    with site.started() as engine:
        work(engine, lambda: len(server.messages) == 2, "it is tried again")
        settle(engine)
    assert (site.states(), site.ls()) == (["done"], [])
    assert server.copies == {"a@x.example": 2, "b@x.example": 2}
    assert len({re.findall(rb"(?m)^Message-ID: .*$", message.data)[0] for message in server.messages}) == 1
    assert [event for event, _ in site.log("retried", "released")] == ["retried", "retried", "released", "released"]
    for event in ("retried", "released"):
        assert sorted(site.log(event)) == [(event, "a@x.example"), (event, "b@x.example")]


def test_only_the_unclear_batch_is_tried_again(tmp_path: Path, server: Server, soon: None) -> None:
    """Of more recipients than one transaction takes, only those without a final reply are sent to again."""
    server.answer = first_time(b".", HANG_UP)
    site = Site(tmp_path, server.url)
    site.put(to=MANY)
    with site.started() as engine:
        work(engine, lambda: len(server.messages) >= 3, "it is tried again")
        settle(engine)
    assert [message.recipients for message in server.messages] == [MANY[:100], MANY[100:], MANY[:100]]
    assert [recipient for _, recipient in site.log("retried")] == MANY[:100]
    assert sorted(site.log("released")) == sorted(("released", recipient) for recipient in MANY)
    released = [event for event, recipient in site.log("retried", "released") if recipient in MANY[:100]]
    assert released == ["retried"] * 100 + ["released"] * 100
    assert site.states() == ["done"]


def test_usage_is_as_of_the_final_reply(tmp_path: Path, server: Server) -> None:
    """A message of several transactions counts from its last reply on, and as now until then."""
    replies: list[float] = []

    def answer(command: bytes) -> bytes | None:
        if command == b".":
            if replies:
                time.sleep(1)
            replies.append(time.time())
        return YES

    server.answer = answer
    site = Site(tmp_path, server.url, "150/1h")
    site.put(to=MANY)
    with site.started() as engine:
        work(engine, lambda: len(site.log("released")) == 100, "the first batch is sent")
        assert [row["counted_at"] for row in site.rows()] == [None]
        assert used(engine) == used_by_the_ledger(engine) == len(MANY)
        settle(engine)
        assert used(engine) == used_by_the_ledger(engine) == len(MANY)
        stamps = [stamp for stamp, *_ in engine._account(A).windows[0]._entries]
    (row,) = site.rows()
    assert row["counted_at"] >= replies[1] > replies[0] + 1
    assert stamps == [row["counted_at"]]


@pytest.mark.parametrize("tries", [1, 3])
@pytest.mark.parametrize("first", [b"451 later", YES], ids=["deferred", "taken"])
def test_usage_while_the_mta_goes_away_between_two_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server, first: bytes | None, tries: int
) -> None:
    """The MTA goes away behind the first batch, for one try or more: memory and ledger agree, and nothing counts twice."""
    monkeypatch.setattr(handover, "MTA_BACKOFF", (0.2, 0.2))
    away = threading.Event()
    away.set()

    def answer(command: bytes) -> bytes | None:
        if not command.startswith(b"MAIL"):
            return YES
        return first if server.count(b"MAIL") == 1 else b"421 closing" if away.is_set() else YES

    server.answer = answer
    site = Site(tmp_path, server.url, "300/1h")
    site.put(to=MANY)
    with site.started() as engine:
        work(engine, lambda: server.count(b"MAIL") > tries and not engine._handover.in_flight, "the MTA is away")
        assert used(engine) == used_by_the_ledger(engine) == len(MANY)
        away.clear()
        work(engine, lambda: len(server.copies) == len(MANY), "all recipients have it")
        settle(engine)
        assert used(engine) == used_by_the_ledger(engine) == len(MANY)
        # Just what the limit leaves.
        site.put(to=MANY)
        engine.scan()
        settle(engine)
    assert site.states() == ["done", "done"]
    assert set(server.copies.values()) == {2}


def test_what_was_sent_before_the_mta_went_away_is_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    """The MTA takes the first batch, and is then away for several tries and a restart: the rest follows, and only that."""
    monkeypatch.setattr(handover, "MTA_BACKOFF", (0.2, 0.2))
    away = threading.Event()
    away.set()

    def answer(command: bytes) -> bytes | None:
        return b"421 closing" if command.startswith(b"MAIL") and away.is_set() and server.messages else YES

    server.answer = answer
    site = Site(tmp_path, server.url, "300/1h")
    site.put(to=MANY)
    with site.started() as engine:
        work(engine, lambda: server.count(b"MAIL") > 3 and not engine._handover.in_flight, "the MTA is away")
    away.clear()
    with site.started() as engine:
        work(engine, lambda: len(server.copies) == len(MANY), "all recipients have it")
        settle(engine)
    assert [message.recipients for message in server.messages] == [MANY[:100], MANY[100:]]
    assert site.log() == [("released", recipient) for recipient in MANY]


@pytest.mark.parametrize("number", [1, 2])
def test_message_that_the_mta_hangs_up_on_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server, number: int
) -> None:
    """The MTA says 421 to MAIL of a released message, or of two: mail of other vhosts goes out beside it."""
    monkeypatch.setattr(handover, "MTA_BACKOFF", (1, 4))
    server.answer = refusing(b"MAIL FROM:<poison@", b"421 4.7.0 go away")
    site = Site(tmp_path, server.url, vhosts=(A, B), extra=f'[vhosts."{A}"]\nlimits = ["0/1h"]\n')
    for _ in range(number):
        site.put(sender="poison@a.example")
    with site.started() as engine:
        settle(engine)
        site.decide("release")
        engine.scan()
        work(engine, lambda: server.count(b"MAIL FROM:<poison@") == 1, "the released one is tried")
        for _ in range(5):
            site.put(B)
        engine.scan()
        work(engine, lambda: site.states().count("done") == 5, "the others go out")
    assert {message.sender for message in server.messages} == {f"s@{B}"}
    assert site.states().count("active") == number


# Turns.


def test_released_mail_leaves_room_for_new_mail(tmp_path: Path, server: Server) -> None:
    """A new message of another vhost does not wait for the many that a person has released."""
    many = 60

    def slow(command: bytes) -> bytes | None:
        if command == b".":
            time.sleep(0.02)
        return YES

    server.answer = slow
    site = Site(tmp_path, server.url, vhosts=(A, B), extra=f'[vhosts."{A}"]\nlimits = ["0/1h"]\n')
    for _ in range(many):
        site.put()
    with site.started() as engine:
        settle(engine)
        site.decide("release")
        engine.scan()
        work(engine, lambda: len(server.messages) >= 5, "the first of them are sent")
        site.put(B)
        engine.scan()
        work(engine, lambda: len(server.messages) == many + 1, "all are sent")
    senders = [message.sender for message in server.messages]
    assert senders.index(f"s@{B}") < many // 2


def test_due_mail_that_waits_for_its_turn_costs_nothing(tmp_path: Path, server: Server) -> None:
    """While the MTA thinks about released mail, and more of another vhost waits, the engine asks for a pause, not to go on."""
    thinks = threading.Event()

    def slow(command: bytes) -> bytes | None:
        if command == b".":
            thinks.wait(8)
        return YES

    server.answer = slow
    site = Site(tmp_path, server.url, "0/1h", vhosts=(A, B, C))
    for vhost in (A, B, C):
        site.put(vhost)
    with site.started() as engine:
        settle(engine)
        site.decide("release")
        engine.scan()
        work(engine, lambda: engine._handover.in_flight >= 2, "some are with the MTA")
        for _ in range(5):
            pause = engine.step()
        assert pause > 0
        thinks.set()
        work(engine, lambda: len(server.messages) == 3, "all are sent")


def test_reload_to_another_mta_waits_for_nothing(tmp_path: Path, server: Server) -> None:
    """With a message in flight at a slow MTA, another one is used at once; each message is delivered once."""
    thinks = threading.Event()

    def slow(command: bytes) -> bytes | None:
        if command == b".":
            thinks.wait(5)
        return YES

    server.answer = slow
    site = Site(tmp_path, server.url, vhosts=(A, B))
    site.put(A)
    with Server() as other, site.started() as engine:
        work(engine, lambda: server.count(b"DATA"), "the first is in flight")
        site.configure(other.url)
        begin = time.monotonic()
        engine.reload(site.load())
        assert time.monotonic() - begin < 1
        site.put(B)
        engine.scan()
        work(engine, lambda: other.messages, "the second is delivered by the other MTA", timeout=3)
        assert (server.messages, engine._handover.in_flight > 0) == ([], True)
        thinks.set()
        settle(engine)
        engine.stop()
        assert [message.sender for message in server.messages] == [f"s@{A}"]
        assert [message.sender for message in other.messages] == [f"s@{B}"]
    assert (site.states(), site.ls()) == (["done", "done"], [])
    assert len(site.log("released")) == len(site.log()) == 2


# Names, files and directories that change under the releaser.


@pytest.mark.parametrize("crashes", [1, 2])
def test_held_mail_whose_original_stayed_is_sent_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server, crashes: int
) -> None:
    """Crashes behind the hold, and behind the release that follows while the releaser is down: it is sent exactly once."""
    site = Site(tmp_path, server.url, "0/1h")
    site.put()
    with site.started() as engine, crash(monkeypatch):
        settle(engine)
    assert site.ls() == ["hold", "new"]
    site.decide("release")
    if crashes == 2:
        with site.started() as engine, crash(monkeypatch):
            settle(engine)
        assert (site.states(), "hold" in site.ls()) == (["active"], True)
    for _ in range(2):
        with site.started() as engine:
            settle(engine)
            engine.scan()
            settle(engine)
    assert (len(server.messages), site.ls(), site.states()) == (1, [], ["done"])
    assert site.log() == [("held", "r@x.example"), ("released", "r@x.example")]


@pytest.mark.parametrize("how", ["replaced", "removed-before-start", "removed-behind-start"])
def test_attempt_that_nobody_can_finish_leaves_no_reservation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server, how: str
) -> None:
    """An open attempt whose file has gone counts as of now, and no longer than that: behind the window, mail flows."""
    site = Site(tmp_path, server.url, "40/1s")
    file = site.put(to=THIRTY)
    with site.started() as engine, crash(monkeypatch):
        settle(engine)
    assert (site.states(), server.messages) == (["active"], [])
    if how != "removed-behind-start":
        file.unlink()
    if how == "replaced":
        site.put(to=THIRTY, body=b"ydob\n", name=file.name)
    with site.engine() as engine:
        engine.start()
        if how == "removed-behind-start":
            file.unlink()
            settle(engine)
            engine.scan()
        settle(engine)
        assert "unknown" in site.states()
        assert len(site.log("unknown")) == len(THIRTY)
        work(engine, lambda: used(engine) == 0, "the window has passed", timeout=3)
        assert used_by_the_ledger(engine) == 0
        before = len(server.messages)
        site.put(to=THIRTY, body=b"later\n")
        engine.scan()
        settle(engine)
        assert server.bodies[before:] == [b"later"]


def test_name_used_again_while_its_message_is_in_flight(tmp_path: Path, server: Server) -> None:
    """A file that replaces the one in flight, even with its inode, is a message of its own, and is sent."""
    thinks = threading.Event()

    def slow(command: bytes) -> bytes | None:
        if command == b".":
            thinks.wait(5)
        return YES

    server.answer = slow
    site = Site(tmp_path, server.url)
    file = site.put(body=b"first\n")
    with site.started() as engine:
        work(engine, lambda: server.count(b"DATA"), "it is in flight")
        content = file.read_bytes()
        file.unlink()
        # Made in place: the next inode is most often the one that has just become free.
        file.write_bytes(content.replace(b"first\n", b"other\n"))
        engine.scan()
        engine.step()
        thinks.set()
        work(engine, lambda: len(server.messages) >= 2, "the second one is sent", timeout=3)
        engine.scan()
        settle(engine)
    assert server.bodies == [b"first", b"other"]
    assert (site.ls(), site.states()) == ([], ["done", "done"])


def test_large_message_replaced_before_a_crash_is_sent_from_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    """The copy of a large message is sent although its original was replaced; the replacement is a message of its own."""
    site = Site(tmp_path, server.url)
    file = site.put(body=LARGE * ONE_MORE_MIB)
    with site.started() as engine, crash(monkeypatch):
        settle(engine)
    assert site.ls() == ["active", "new"]
    file.unlink()
    site.put(body=LARGE.replace(b"y", b"q") * ONE_MORE_MIB, name=file.name)
    for _ in range(2):
        with site.started() as engine:
            settle(engine)
        assert sorted(server.bodies) == [b"q" * 70, b"y" * 70]
        assert (site.ls(), site.states()) == ([], ["done", "done"])


@pytest.mark.parametrize("back", ["behind-the-reply", "before-the-reply"])
def test_vhost_moved_aside_and_back_sends_nothing_twice(tmp_path: Path, server: Server, back: str) -> None:
    """A vhost whose directory goes and comes back while its message is in flight: the message is sent once."""
    thinks = threading.Event()

    def slow(command: bytes) -> bytes | None:
        if command == b".":
            thinks.wait(5)
        return YES

    server.answer = slow
    site = Site(tmp_path, server.url)
    file = site.put()
    with site.started() as engine:
        work(engine, lambda: server.count(b"DATA"), "it is in flight")
        directory, aside = file.parent.parent, tmp_path / "aside"
        directory.rename(aside)
        engine.scan()
        engine.step()
        if back == "behind-the-reply":
            thinks.set()
            work(engine, lambda: not engine._handover.in_flight, "the reply is there")
        aside.rename(directory)
        engine.scan()
        engine.step()
        thinks.set()
        for _ in range(2):
            settle(engine)
            engine.scan()
        settle(engine)
    with site.started() as engine:
        settle(engine)
    assert (len(server.messages), site.ls()) == (1, [])
    assert site.log() == [("released", "r@x.example")]


@pytest.mark.parametrize("inode", ["another-inode", "same-inode"])
def test_vhost_made_again_between_scans_has_its_new_bell(tmp_path: Path, server: Server, inode: str) -> None:
    """A vhost that was removed and made again: its new bell is heard behind the next scan, and a reload keeps it.

    Also where the file system gives its directory the inode that has just become free.
    """
    site = Site(tmp_path, server.url)
    directory, kept = site.spool / "vhosts" / A, tmp_path / "kept"
    with site.started() as engine:
        settle(engine)
        old = policy.bell(str(site.spool), A)
        (directory / "new").rename(kept)
        before = kept.stat().st_ino
        shutil.rmtree(directory)
        site.cli(("vhost", "add", A))
        if inode == "same-inode":
            (directory / "new").rmdir()
            kept.rename(directory / "new")
        assert ((directory / "new").stat().st_ino == before) == (inode == "same-inode")
        new = policy.bell(str(site.spool), A)
        assert new is not None and new != old
        engine.scan()
        settle(engine)
        site.put()
        # No scan, only the bell.
        engine.rung({new})
        settle(engine)
        assert len(server.messages) == 1
        engine.reload(site.load())
        assert policy.bell(str(site.spool), A) == new


def test_plain_file_among_the_vhosts_is_passed_over(host: Host) -> None:
    """A plain file in vhosts/ that is named like a host ends no running releaser, and keeps none from starting."""
    plain = host.spool / "vhosts/www.plain.example"
    host.start()
    pid = host.pid
    plain.write_text("notes\n")
    # Rings the bell behind which everything is looked at.
    host.add(C)
    host.send(C)
    host.wait_for_mail(1)
    assert host.alive() and host.pid == pid
    assert host.stop() == 0
    host.send(A)
    host.start()
    host.wait_for_mail(2)
    assert host.stop() == 0
    assert plain.read_text() == "notes\n"


# The ledger.


class Recorder:
    """A connection that keeps every statement with one set of its values."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.statements: dict[str, Any] = {}

    def execute(self, sql: str, values: Any = ()) -> sqlite3.Cursor:
        self.statements[sql] = values
        return self._connection.execute(sql, values)

    def executemany(self, sql: str, many: Any) -> sqlite3.Cursor:
        many = list(many)
        if many:
            self.statements[sql] = many[0]
        return self._connection.executemany(sql, many)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def plans(self) -> dict[str, list[str]]:
        """How SQLite finds the messages, by statement."""
        return {
            sql: [row["detail"] for row in self._connection.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
            for sql, values in self.statements.items()
            if re.search(r"\b(FROM|INTO|UPDATE) message\b", sql)
        }


def reads_everything(step: str) -> bool:
    """Whether a step of a plan goes through all messages: an index that is not partial has them all too."""
    return step.startswith("SCAN message") and (" INDEX " not in step or "sqlite_autoindex" in step)


def test_no_statement_goes_through_all_messages(tmp_path: Path, server: Server, soon: None) -> None:
    """Whatever the releaser asks the ledger for, per message, scan, decision, reload or start, it finds with an index."""
    server.answer = first_time(b"RCPT", b"451 later")
    site = Site(tmp_path, server.url, "1/1h", vhosts=(A, B))
    (site.spool / "vhosts" / B / "new/junk").write_text("junk")
    site.put()
    with site.engine() as engine:
        recorder = Recorder(site.ledger._db)
        site.ledger._db = recorder  # type: ignore[assignment]
        engine.start()
        work(engine, lambda: server.messages, "the deferred one is sent")
        for decision in ("delete", "undelete", "release"):
            site.put()
            engine.scan()
            settle(engine)
            site.decide(decision)
            engine.scan()
            settle(engine)
        engine.reload(site.load())
        engine._account(A)
        site.ledger.queue_ids(HELD)
        site.ledger.queue_ids("held", "trashed", "active")
        site.ledger.rows("state = ? AND 1", HELD)
        site.ledger.rows("source IS NOT NULL")
        site.ledger.undone("release")
        site.ledger.undone("delete")
        site.ledger.counts()
        site.ledger.held_by_vhost()
        site.ledger.decide("release", [layout.new_queue_id()], "somebody", "")
        plans = recorder.plans()
        # A query that no index helps is recognised as one.
        recorder.statements = {
            "SELECT queue_id FROM message WHERE sender = ?": ("s",),
            "SELECT queue_id FROM message WHERE sender = ? ORDER BY queue_id": ("s",),
        }
        assert all(any(map(reads_everything, plan)) for plan in recorder.plans().values())
    assert sorted(set(site.states())) == ["corrupt", "done"]
    for words in ("source IS NOT NULL", "decision IS NOT NULL", "counted_at > ?", "AND limited AND", "count(*)", "state IN",
                  "state = 'active'", "queue_id = ?", "INSERT INTO", "UPDATE message SET source", "decision = ?"):  # fmt: skip
        assert any(words in sql for sql in plans), words
    assert {sql: plan for sql, plan in plans.items() if any(map(reads_everything, plan))} == {}


@pytest.mark.parametrize("limit", ["0/1h", "unlimited"], ids=["held", "sent"])
def test_error_while_an_original_is_compared_decides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server, limit: str
) -> None:
    """An error at the start after a crash, such as a lease that its owner has on the file: others' mail goes on, nothing is
    decided, and the file is still known when it can be read."""
    site = Site(tmp_path, server.url, limit)
    site.put()
    with site.started() as engine, crash(monkeypatch):
        engine.step()
    before = site.ls(), site.states(), site.log()

    def of_the_original(path: object, *_args: object, **_keywords: object) -> bool:
        return "/new/" in os.fsdecode(path)  # type: ignore[arg-type]

    with once(monkeypatch, os, "open", errno.EWOULDBLOCK, of_the_original), site.started():
        pass
    assert (site.ls(), site.states(), site.log()) == before
    with site.started() as engine:
        settle(engine)
    if limit == "unlimited":
        assert [event for event, _ in site.log()] == ["retried", "released"]
    else:
        assert (site.ls(), [event for event, _ in site.log()]) == (["hold"], ["held"])


def test_maildrop_that_is_away_for_a_scan_keeps_its_open_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    """The MTA goes away behind the first batch, the vhost's directory for one scan: the rest follows, and only that."""
    monkeypatch.setattr(handover, "MTA_BACKOFF", (0.2, 0.2))
    away = threading.Event()
    away.set()

    def answer(command: bytes) -> bytes | None:
        return b"421 closing" if command.startswith(b"MAIL") and away.is_set() and server.messages else YES

    server.answer = answer
    site = Site(tmp_path, server.url)
    site.put(to=MANY)
    directory, aside = tmp_path / "spool/vhosts" / A, tmp_path / "aside"
    with site.started() as engine:
        work(engine, lambda: server.count(b"MAIL") > 1 and not engine._handover.in_flight, "the MTA is away")
        directory.rename(aside)
        engine.scan()
        aside.rename(directory)
        engine.scan()
        away.clear()
        work(engine, lambda: len(server.copies) == len(MANY), "all recipients have it")
        settle(engine)
    assert [message.recipients for message in server.messages] == [MANY[:100], MANY[100:]]


def test_stop_keeps_counted_what_was_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    """The MTA goes away behind the first batch, and the vhost is stopped: the rest is held, and nothing is given back."""
    monkeypatch.setattr(handover, "MTA_BACKOFF", (0.2, 0.2))
    server.answer = lambda command: b"421 closing" if command.startswith(b"MAIL") and server.messages else YES
    site = Site(tmp_path, server.url, "150/1h")
    site.put(to=MANY)
    with site.started() as engine:
        work(engine, lambda: server.count(b"MAIL") > 1 and not engine._handover.in_flight, "the MTA is away")
        assert site.ledger.stop(A, "root", "broken into")
        server.answer = lambda _: YES
        work(engine, lambda: site.states() == ["held"], "the rest is held")
        assert (used(engine), used_by_the_ledger(engine)) == (len(MANY), len(MANY))
        (row,) = site.ledger.rows("state = 'held'")
        assert row.remaining == MANY[100:]
    assert [message.recipients for message in server.messages] == [MANY[:100]]


def test_refused_recipients_are_kept_whatever_a_person_does_with_the_others(tmp_path: Path, server: Server) -> None:
    """One is refused, the other deferred, then held by a stop and released: the message ends in failed/, for the first."""
    answers = {b"RCPT TO:<bad@": b"550 no such user", b"RCPT TO:<late@": b"451 later"}
    server.answer = lambda command: next((words for begin, words in answers.items() if command.startswith(begin)), YES)
    site = Site(tmp_path, server.url)
    site.put(to=("bad@x.example", "late@x.example"))
    with site.started() as engine:
        deferred(site, engine)
        (row,) = site.ledger.rows("state = 'active'")
        site.ledger.stop(A, "root", "broken into")
        engine._handover.later(0.0, row.queue_id)
        work(engine, lambda: site.states() == ["held"], "the other is held")
        site.ledger.resume(A, "root", "")
        del answers[b"RCPT TO:<late@"]
        site.decide("release")
        engine.scan()
        work(engine, lambda: server.messages, "it is sent")
        settle(engine)
        assert (site.states(), site.ls()) == (["failed"], ["failed"])
        (row,) = site.ledger.rows("state = 'failed'")
        assert (row.remaining, [address for address, _ in row.refused]) == ([], ["bad@x.example"])
    assert server.copies == {"late@x.example": 1}
    assert sorted(site.log("failed", "released")) == [("failed", "bad@x.example"), ("released", "late@x.example")]


def test_reload_while_the_ledger_has_no_room_leaves_no_reservation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    """What was confirmed before it could be written down counts once behind a reload, and no longer than its window."""
    site = Site(tmp_path, server.url, "1/1s")
    put, full = Ledger.put, [False]

    def no_room(book: Ledger, row: Any) -> None:
        if full[0]:
            raise sqlite3.OperationalError("database or disk is full")
        put(book, row)

    monkeypatch.setattr(Ledger, "put", no_room)
    monkeypatch.setattr(release, "PAUSE", 0.1)
    monkeypatch.setattr("releaser.room.PAUSE", 0.1)
    site.put()
    with site.started() as engine:
        work(engine, lambda: engine._handover.in_flight, "it is with the MTA")
        full[0] = True
        work(engine, lambda: engine._unwritten, "the outcome cannot be written")
        engine.reload(site.load())
        assert used(engine) == 1
        full[0] = False
        work(engine, lambda: site.states() == ["done"], "it can")
        time.sleep(1.1)
        assert (used(engine), used_by_the_ledger(engine)) == (0, 0)


@pytest.mark.parametrize("full", [False, True], ids=["room", "no-room"])
def test_deferred_mail_that_is_held_names_those_who_have_not_got_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server, soon: None, full: bool
) -> None:
    """A large message was copied for two; one has it when its vhost is stopped. The held copy is for the other alone."""
    server.answer = refusing(b"RCPT TO:<late@", b"451 later")
    monkeypatch.setattr("releaser.room.PAUSE", 0.1)
    site = Site(tmp_path, server.url)
    site.put(to=("now@x.example", "late@x.example"), body=LARGE * ONE_MORE_MIB)
    with site.started() as engine:
        deferred(site, engine)
        (row,) = site.ledger.rows("state = 'active'")
        site.ledger.stop(A, "root", "broken into")
        with once(monkeypatch, os, "fsync", errno.ENOSPC, lambda _: full) as failed:
            engine._handover.later(0.0, row.queue_id)
            work(engine, lambda: site.ls() == ["hold"] and site.states() == ["held"], "it is held")
        assert len(failed) == full
        head, stream = mailqueue.read(str(site.spool / "hold" / row.queue_id))
        assert head.recipients == ("late@x.example",) and "broken into" in head.reason
        with stream:
            assert stream.read().endswith(LARGE * ONE_MORE_MIB)
        events = [("released", "now@x.example"), ("deferred", "late@x.example"), ("held", "late@x.example")]
        assert site.log("released", "deferred", "held") == events


@pytest.mark.parametrize("first", ["refused", "deferred"])
def test_stop_does_not_hold_what_the_mta_has_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server, soon: None, first: str
) -> None:
    """All is said of a message, there was no room for its copy in failed/, and its vhost is stopped: it still gets there."""
    server.answer = first_time(b"RCPT", b"451 later") if first == "deferred" else refusing(b"RCPT", b"550 no")
    site = Site(tmp_path, server.url)
    site.put()
    with site.started() as engine:
        if first == "deferred":
            deferred(site, engine)
            server.answer = refusing(b"RCPT", b"550 no")
        with once(monkeypatch, mailqueue, "store", errno.ENOSPC, lambda _spool, queue, *_: queue == "failed") as failed:
            work(engine, lambda: failed and site.log("failed"), "it is refused, and there is no room")
    assert site.states() == ["active"]
    with site.started() as engine:
        site.ledger.stop(A, "root", "broken into")
        work(engine, lambda: site.ls() == ["failed"] and site.states() == ["failed"], "it is in failed/")
    assert site.log("failed", "held") == [("failed", "r@x.example")]


def test_leftovers_are_removed_a_little_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    """However many lie in tmp/, and whatever comes and goes there, a scan goes on with them for an instant, the next too."""
    site = Site(tmp_path, server.url)
    for number in range(20):
        (site.spool / "vhosts" / A / f"tmp/old{number}").touch()
    monkeypatch.setattr(layout, "TMP_MAX_AGE", -60)
    monkeypatch.setattr(maildrops, "CLEANING_SECONDS", -1)
    with site.started() as engine:
        assert len(site.ls()) == 19
        while len(site.ls()) > 10:
            engine.scan()
        for path in (site.spool / "vhosts" / A / "tmp").iterdir():
            # Seen by now, and gone before its turn.
            path.unlink()
            (path.parent / f"{path.name}.later").touch()
        (site.spool / "vhosts" / A / "tmp/last").touch()
        monkeypatch.setattr(maildrops, "CLEANING_SECONDS", 10)
        engine.scan()
        engine._drops._next_cleaning = 0
        engine.scan()
        assert site.ls() == []


def test_accounts_that_are_forgotten_loosen_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    """Memory has a few of them at a time: what was sent, and what is with the MTA, counts all the same."""
    monkeypatch.setattr(release, "MOST_ACCOUNTS", 1)
    monkeypatch.setattr(config, "MOST_FOUND", 1)
    vhosts = (A, B, C)
    waiting = threading.Event()
    server.answer = lambda _: YES if waiting.wait(8) else None
    site = Site(tmp_path, server.url, default="2/1h", vhosts=vhosts)
    with site.started() as engine:
        for vhost in vhosts:
            site.put(vhost)
        engine.scan()
        work(engine, lambda: engine._handover.in_flight, "some are with the MTA")
        for _ in range(3):
            for vhost in vhosts:
                site.put(vhost)
            engine.scan()
            engine.step()
            assert len(engine._accounts) <= len(vhosts)
        waiting.set()
        settle(engine)
        engine.scan()
        settle(engine)
        assert site.states() == ["done"] * 6 + ["held"] * 6 and len(server.messages) == 6


def test_quiet_days_before_a_reboot_are_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    """Last written to soon after a start, then a quiet week: a start that is a little slower is one all the same."""
    boottime, started, real = time.CLOCK_BOOTTIME, time.time(), time.clock_gettime
    since_boot = [60.0]
    monkeypatch.setattr(time, "clock_gettime", lambda which: since_boot[0] if which == boottime else real(which))
    monkeypatch.setattr(time, "time", lambda: started + since_boot[0])
    site = Site(tmp_path, server.url)
    site.put()
    with site.started() as engine:
        settle(engine)
        since_boot[0] += 7 * 86400
        engine.step()
    monkeypatch.setattr(time, "time", lambda: started + 7 * 86400 + since_boot[0])
    since_boot[0] = 70.0
    with site.engine():
        assert abs(ledger_time(site) - time.time()) < 60


def ledger_time(site: Site) -> float:
    """What the ledger takes for the time."""
    return site.ledger.clock.now()
