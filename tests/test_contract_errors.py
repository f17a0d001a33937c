"""Any call that changes a disk fails once: nothing is lost or sent twice, the releaser goes on, and who calls is told."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import Forks
from test_contract_crash import LARGE, OTHER, VHOST, Run, Scenario, Site, outcome

pytestmark = pytest.mark.server

# In turn. The first is also what a file system without inodes says; what SQLite makes of the last is a MemoryError.
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENOMEM)
# It does not wait long for room. And a rename that comes when it has started, and is seen at its next scan.
SOON = "from releaser import release, room; room.PAUSE = release.PAUSE = 0.01\n"
RENAMED = """
from releaser import release
there, step, asked, steps = release.Releaser._is_renamed, release.Releaser.step, [], []
def meanwhile(self, *names):
    asked.append(names)
    return len(asked) > 2 and there(self, *names)
def stepped(self):
    steps.append(self)
    if len(steps) < 6:
        self._next_scan = 0
    return step(self)
release.Releaser._is_renamed, release.Releaser.step = meanwhile, stepped
"""
CANTCREAT, IOERR = os.EX_CANTCREAT, os.EX_IOERR


def failing_everywhere(site: Site, what: Run) -> int:
    """Let each call of WHAT fail, start it again, and see that all is as if none had; how many calls that were.

    Behind this the site is as WHAT has left it.
    """
    before = site.save()
    site.server.messages.clear()
    done = site.run(what, at=-1, how=errno.EIO)
    assert done.status == 0, done
    behind = site.save()
    site.run(site.releaser(SOON))
    wanted, copies = site.reckon(), site.copies()
    number, failed = 0, True
    while failed:
        number += 1
        error = ERRORS[number % len(ERRORS)]
        site.restore(before)
        run = site.run(what, number, error)
        failed = len(run.calls) >= number
        point = f"{what.program} {what.words[2:]}: {errno.errorcode[error]} at call {number} of {run.calls}\n{run.stderr}"
        assert "Traceback" not in run.stderr, point
        if what.program == "releaser":
            # Before it is up it says why it cannot be; afterwards nothing ends it.
            assert run.status == 0 or (run.status == IOERR and ": started " not in run.stderr), point
        else:
            assert run.status in (0, 1) and (run.status == 0) <= ("secure-sendmail: " not in run.stderr), point
            again = site.run(what)
            assert again.status in what.statuses, (point, again)
        for _ in range(2):
            assert site.run(site.releaser(SOON)).status == 0, point
        assert site.reckon() == wanted, point
        assert site.copies() == copies, point
    site.restore(behind)
    return number - 1


def sent_and_held(site: Site) -> Scenario:
    site.configure("4/1h")
    for subject, size in (("one", 10), ("two", LARGE), ("three", 10)):
        site.send(subject, size=size)
    site.send("a", "b")
    yield site.releaser(SOON)
    outcome(site, "hold", released="one two three", held="a b")
    assert site.reckon().counted == 3


def deferred_and_refused(site: Site) -> Scenario:
    site.replies = {b"later": b"450 later", b"no": b"550 no"}
    site.send("yes", "no", "later")
    site.send("no", size=LARGE)
    yield site.releaser(SOON)
    site.replies[b"later"] = b"550 no more"
    site.sql("UPDATE message SET next_try = 0 WHERE next_try IS NOT NULL")
    yield site.releaser(SOON)
    outcome(site, "failed failed", released="yes", failed="no later no", deferred="later")


def decided(site: Site) -> Scenario:
    site.configure("0/1h")
    site.send("a")
    assert site.run(site.releaser()).status == 0
    for decision in ("delete", "undelete", "release"):
        yield site.command("hold", decision, "--all", "--yes")
        yield site.releaser(SOON)
    outcome(site, held="a", deleted="a", undeleted="a", released="a")


def renamed(site: Site) -> Scenario:
    site.configure("1/1h")
    for subject in ("a", "b"):
        site.send(subject)
    assert site.run(site.releaser()).status == 0
    assert site.run(site.command("vhost", "rename", VHOST, OTHER)).status == 0
    yield site.releaser(SOON + RENAMED)
    outcome(site, "hold", released="a", held="b", renamed=".")
    assert site.sql("SELECT DISTINCT vhost, maildrop FROM message") == [(OTHER, OTHER)]


def vhosts(site: Site) -> Scenario:
    yield site.command("vhost", "add", OTHER)
    yield site.command("vhost", "rename", OTHER, "www.c.example")
    yield site.releaser(SOON)
    yield site.command("vhost", "remove", "www.c.example", "--yes")


@pytest.mark.parametrize(
    "scenario", [sent_and_held, deferred_and_refused, decided, renamed, vhosts], ids=lambda each: each.__name__
)
def test_each_call_fails_once(scenario: Callable[[Site], Scenario], tmp_path: Path) -> None:
    """No space, no quota, a broken disk, too many open files, no memory: whichever call meets it."""
    with Forks(tmp_path) as forks, Site(tmp_path, forks) as site:
        assert sum([failing_everywhere(site, what) for what in scenario(site)]) > 5


# The status of enqueue where a call of that name fails; what it does not need, it does without.
STATUSES = {"open": (0, CANTCREAT, IOERR), "write": (IOERR,), "fchmod": (IOERR,), "rename": (IOERR,), "fsync": (IOERR,)}


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
def test_each_call_of_enqueue_fails_once(error: int, tmp_path: Path) -> None:
    """0 and the mail is submitted, or 73 or 74, one line, and nothing is left."""
    with Forks(tmp_path) as forks, Site(tmp_path, forks) as site:
        saved, what, number, met = site.save(), site.enqueue("a"), 0, set()
        while True:
            number += 1
            site.restore(saved)
            run = site.run(what, number, error)
            if len(run.calls) < number:
                break
            call = run.calls[number - 1]
            point = f"{errno.errorcode[error]} at call {number} of {run.calls}: {run.status}\n{run.stderr}"
            assert run.status in STATUSES[call], point
            met.add((call, run.status))
            assert " ".join(site.reckon().files.elements()) == ("new" if run.status == 0 else ""), point
            assert len(run.stderr.splitlines()) == (run.status != 0), point
        assert run.status == 0
        assert {(name, IOERR) for name in STATUSES} | {("open", CANTCREAT), ("open", 0)} == met
