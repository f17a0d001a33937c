"""Every documented transition is executed on a real directory, and nothing else ever happens to one.

Each scenario runs the real code with the real MTA; every call that changes what lies where is recorded with the state
before and behind it. What all scenarios together did must be what the page says: documented == done.
"""

import errno
import os
import posix
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import page
import pytest
from servers import Sink, free_port

from enqueue import main as enqueue_main
from enqueue import options
from enqueue.failure import Failure
from enqueue.maildrop import Maildrop
from releaser import config, handover, incidents, layout, pickup, release
from releaser.cli.main import run
from releaser.ledger import Ledger
from releaser.maildrops import Maildrops

pytestmark = pytest.mark.server

VHOST = "www.a.example"
LARGE = b"x" * 70 + b"\n"
QUEUES = ("active", "hold", "failed", "trash", "corrupt")
Step = tuple[str, str, str, str]


class Spool:
    """A spool with one vhost, the calls recorded, and the means to drive one message through it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, states: dict[frozenset[str], str]) -> None:
        self.root = root
        self.spool = root / "spool"
        self.file = root / "etc/releaser.toml"
        self.steps: list[Step] = []
        self._states = states
        self._who = "releaser"
        (root / "etc").mkdir(mode=0o700)
        self.configure(f"maildir:{root}/mail")
        assert run(["--config", str(self.file), "vhost", "add", VHOST]) == 0
        for name in ("open", "rename", "unlink"):
            recorded = self._recorded(name, getattr(os, name))
            # enqueue calls the same without the module os.
            monkeypatch.setattr(os, name, recorded)
            monkeypatch.setattr(posix, name, recorded)
        monkeypatch.setattr(handover, "MESSAGE_BACKOFF", (0, 0))

    def configure(self, url: str, limit: str = "unlimited", extra: str = "") -> None:
        self.file.write_text(
            f'spool = "{self.spool}"\nstate = "{self.root}/state"\n[mta]\nurl = "{url}"\n[limits]\ndefault = ["{limit}"]\n{extra}'
        )

    def state(self) -> str:
        """The documented state that the directories show; an undocumented one is a failure."""
        found = {part for part in ("tmp", "new") if any((self.spool / "vhosts" / VHOST / part).iterdir())}
        found |= {queue for queue in QUEUES if any(not p.name.startswith(".") for p in (self.spool / queue).iterdir())}
        assert frozenset(found) in self._states, f"an undocumented state: {sorted(found)}"
        return self._states[frozenset(found)]

    def _recorded(self, name: str, call: Callable[..., object]) -> Callable[..., object]:
        def recorded(*args: object, **kwargs: object) -> object:
            before = self.state()
            result = call(*args, **kwargs)
            after = self.state()
            if after != before:
                places = [Path(os.fsdecode(a)).parent.name for a in args[: 2 if name == "rename" else 1]]  # type: ignore[arg-type]
                self.steps.append((before, after, self._who, " ".join([name, *places])))
            return result

        return recorded

    def submit(self, size: int = 1, max_size: int = 10 << 20) -> None:
        """enqueue's own steps, in this process so that they are recorded."""
        self._who = "enqueue"
        try:
            head = enqueue_main.envelope(options.parse([VHOST]), b"s@a.example", [b"r@x.example"], 1.0, b"<1@a>", None)
            name = f"1795376167.011099.P3395.{os.urandom(12).hex()}"
            body = b"To: r@x.example\n\n" + LARGE * size
            Maildrop(str(self.spool), VHOST).drop(name, head, iter([body]), max_size)
        finally:
            self._who = "releaser"

    @contextmanager
    def releaser(self, dies_at_commit: int = 0) -> Iterator[release.Releaser]:
        """A started releaser; its N-th commit can fail as a crash would have it: nothing of it is in the ledger."""
        ledger = Ledger(str(self.root / "state"), create=True)
        if dies_at_commit:
            ledger = Dying(str(self.root / "state"), dies_at_commit)
        engine = release.Releaser(config.load(str(self.file)), ledger, lambda: None)
        try:
            engine.start()
            yield engine
        finally:
            engine._handover.senders.stop()
            ledger.close()

    def work(self, dies_at_commit: int = 0) -> None:
        """Let the releaser do all that can be done now."""
        with self.releaser(dies_at_commit) as engine:
            deadline = time.monotonic() + 20
            while not engine.idle and time.monotonic() < deadline:
                engine.step()
                time.sleep(0.005)
            engine.step()
            assert time.monotonic() < deadline

    def decide(self, decision: str, *words: str) -> None:
        assert run(["--config", str(self.file), "hold", decision, "--all", "--yes", *words]) == 0


class Crash(BaseException):
    """No error that anybody handles."""


class Dying(Ledger):
    def __init__(self, state: str, commits: int) -> None:
        super().__init__(state)
        self._left = commits

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self._left -= 1
        if not self._left:
            raise Crash
        with super().transaction():
            yield


def crashing(*_: object) -> None:
    raise Crash


def crash(spool: Spool, commit: int) -> None:
    with pytest.raises(Crash):
        spool.work(dies_at_commit=commit)


# What is larger than pickup.SMALL is copied first.
BIG = pickup.SMALL // len(LARGE) + 1


def accepted(spool: Spool) -> None:
    spool.submit()
    spool.work()
    assert spool.state() == "S1"


def refused_at_the_door(spool: Spool) -> None:
    with pytest.raises(Failure):
        spool.submit(max_size=1)


def sync_fails(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch, pytest.raises(Failure):
        patch.setattr(posix, "fsync", broken)
        spool.submit()


def writer_gone(spool: Spool) -> None:
    drop = Maildrop(str(spool.spool), VHOST)
    spool._who = "enqueue"
    drop._create("tmp/1795376167.011099.P3395.2bad27e5dbb62169d779a57a")
    spool._who = "releaser"
    assert not any(pickup.remove_leftovers(str(spool.spool), VHOST, time.time() + layout.TMP_MAX_AGE - 60))
    assert sum(pickup.remove_leftovers(str(spool.spool), VHOST, time.time() + layout.TMP_MAX_AGE + 60)) == 1


def large(spool: Spool) -> None:
    spool.submit(BIG)
    spool.work()
    assert spool.state() == "S1"


def large_without_mta(spool: Spool) -> None:
    spool.configure(f"smtp://127.0.0.1:{free_port()}")
    spool.submit(BIG)
    spool.work()
    assert spool.state() == "S3"


def held(spool: Spool) -> None:
    spool.configure(f"maildir:{spool.root}/mail", "0/1h")
    spool.submit()
    spool.work()
    for decision, state in (("delete", "S11"), ("undelete", "S7"), ("release", "S1")):
        spool.decide(decision)
        spool.work()
        assert spool.state() == state


def hold_not_recorded(spool: Spool) -> None:
    spool.configure(f"maildir:{spool.root}/mail", "0/1h")
    spool.submit()
    crash(spool, 1)
    assert spool.state() == "S6"
    spool.work()
    assert spool.state() == "S7"


def no_message(spool: Spool) -> None:
    spool._who = "enqueue"
    (spool.spool / "vhosts" / VHOST / "new/junk").write_text("junk")
    spool._who = "releaser"
    spool.work()
    assert spool.state() == "S12"


def large_not_finished(spool: Spool) -> None:
    spool.submit(BIG)
    crash(spool, 1)
    assert spool.state() == "S4"
    spool.work()
    assert spool.state() == "S1"


def refused(spool: Spool) -> None:
    with Sink(["-f", "RCPT"]) as sink:
        spool.configure(f"smtp://127.0.0.1:{sink.port}")
        spool.submit()
        spool.work()
    assert spool.state() == "S10"


def refused_then_decided(spool: Spool) -> None:
    with Sink(["-f", "RCPT"]) as sink:
        spool.configure(f"smtp://127.0.0.1:{sink.port}")
        spool.submit()
        spool.work()
        sink.stop()
        sink.options = []
        sink.start()
        spool.decide("release", "--failed")
        spool.work()
    assert spool.state() == "S1"


def refused_then_deleted(spool: Spool) -> None:
    refused(spool)
    spool.decide("delete", "--failed")
    spool.work()
    assert spool.state() == "S11"


def expired(spool: Spool) -> None:
    for queue in ("trash", "failed"):
        refused(spool)
        if queue == "trash":
            spool.decide("delete", "--failed")
            spool.work()
        spool.configure(f"maildir:{spool.root}/mail", extra=f'[retention]\n{queue} = "1s"\n')
        time.sleep(1.1)
        spool.work()
        assert spool.state() == "S1"


def refused_not_recorded(spool: Spool) -> None:
    with Sink(["-f", "RCPT"]) as sink:
        spool.configure(f"smtp://127.0.0.1:{sink.port}")
        spool.submit()
        crash(spool, 2)
        assert spool.state() == "S8"
        spool.work()
    assert spool.state() == "S10"


def large_refused(spool: Spool) -> None:
    with Sink(["-f", "RCPT"]) as sink:
        spool.configure(f"smtp://127.0.0.1:{sink.port}")
        spool.submit(BIG)
        crash(spool, 2)
        assert spool.state() == "S13"
        spool.work()
    assert spool.state() == "S10"


def large_refused_not_removed(spool: Spool) -> None:
    with Sink(["-f", "RCPT"]) as sink, pytest.MonkeyPatch.context() as patch:
        spool.configure(f"smtp://127.0.0.1:{sink.port}")
        spool.submit(BIG)
        patch.setattr(Maildrops, "remove", crashing)
        with pytest.raises(Crash):
            spool.work()
    assert spool.state() == "S13"
    spool.work()
    assert spool.state() == "S10"


def notice(spool: Spool) -> None:
    spool.configure(f"maildir:{spool.root}/mail", "0/1h", 'over_limit = "observe"\nnotify = "admin@x.example"\n')
    spool.submit()
    spool.work()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(incidents, "NOTICE_DELAY", 0)
        spool.work()
    assert spool.state() == "S1" and len(list((spool.root / "mail/new").iterdir())) == 2


def deferred_then_refused(spool: Spool) -> None:
    with Sink(["-r", "RCPT"]) as sink:
        spool.configure(f"smtp://127.0.0.1:{sink.port}")
        spool.submit()
        with spool.releaser() as engine:
            deadline = time.monotonic() + 20
            while spool.state() != "S5" and time.monotonic() < deadline:
                engine.step()
            engine.finish()
        sink.stop()
        sink.options = ["-f", "RCPT"]
        sink.start()
        crash(spool, 2)
        assert spool.state() == "S9"
        spool.work()
    assert spool.state() == "S10"


def ledger_lost(spool: Spool) -> None:
    with Sink(["-r", "RCPT"]) as sink:
        spool.configure(f"smtp://127.0.0.1:{sink.port}")
        spool.submit()
        with spool.releaser() as engine:
            deadline = time.monotonic() + 20
            while spool.state() != "S5" and time.monotonic() < deadline:
                engine.step()
            engine.finish()
    for file in (spool.root / "state").iterdir():
        file.unlink()
    spool.work()
    assert spool.state() == "S7"


SCENARIOS = (
    accepted, refused_at_the_door, writer_gone, large, large_without_mta, held, hold_not_recorded, no_message,
    large_not_finished, refused, refused_then_decided, refused_then_deleted, refused_not_recorded, expired,
    large_refused, large_refused_not_removed, notice, deferred_then_refused, ledger_lost,
)  # fmt: skip


def documented(text: str) -> set[Step]:
    return {(row[0], row[1], row[2], row[3]) for row in page.table(text, "transitions")}


def test_documented_transitions_are_those_that_happen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """documented == done; and with a row of the page removed, or a state, the comparison fails."""
    done: set[Step] = set()
    states = page.queues_of(page.text())
    for scenario in (*SCENARIOS, sync_fails):
        (tmp_path / scenario.__name__).mkdir()
        with monkeypatch.context() as patch:
            spool = Spool(tmp_path / scenario.__name__, patch, states)
            if scenario is sync_fails:
                sync_fails(spool, patch)
            else:
                scenario(spool)  # type: ignore[call-arg]
            if scenario is no_message:
                # The test itself, not enqueue, wrote the file.
                assert spool.steps[0][2] == "releaser"
            done.update(spool.steps)
    assert documented(page.text()) == done
    for number in range(len(page.table(page.text(), "transitions"))):
        assert documented(page.without_row(page.text(), "transitions", number)) != done
    reached = {step[0] for step in done} | {step[1] for step in done}
    assert set(states.values()) == reached
    assert set(page.queues_of(page.without_row(page.text(), "states", 3)).values()) != reached
