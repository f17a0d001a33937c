"""Runs the real programs in children that are ended before their n-th call that changes a disk, or for which it fails.

The children are forks of one process that has loaded the programs, so that thousands of them take a minute. That process
runs this file; the tests use Forks.
"""

from __future__ import annotations

import builtins
import errno
import functools
import itertools
import json
import os
import posix
import signal
import sqlite3
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parent.parent
# How a child is ended: it says so itself, or the kernel does.
EXIT, KILL = "exit", "kill"
ENDED = (99, -signal.SIGKILL)
QUEUES = ("active", "hold", "failed", "trash", "corrupt")
# Calls that change a disk; of those that open a file, the ones for writing. Bells are left out: nothing rests on them.
CHANGES = ("write", "pwrite", "fchmod", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "mkfifo", "link",
           "chown", "fchown", "chmod", "setxattr")  # fmt: skip
# Statements behind which something is durable: all of a transaction, and each part of a migration.
DURABLE = ("COMMIT", "CREATE", "ALTER")
SECONDS = 60


@dataclass(frozen=True)
class Ended:
    """How a child has ended, and what it did until then."""

    status: int
    stderr: str
    # The calls counted, one name each.
    calls: list[str]
    # (directories that had the message before, those behind, who, call), of the calls that changed these.
    steps: list[tuple[frozenset[str], frozenset[str], str, str]]


class Forks:
    """The process that forks. run() returns when the child has ended."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def run(
        self, program: str, *words: str | Path, spool: Path, stdin: bytes = b"", at: int = 0, how: str | int = EXIT,
        code: str = "",
    ) -> Ended:  # fmt: skip
        """PROGRAM is "enqueue", "releaser" or "command". HOW it is ended AT its n-th call, or the errno that this one gets.

        CODE is run in the child before the program: a mistake, or another interval.
        """
        notes = self._directory / "notes"
        for suffix in ("in", "out", "calls"):
            notes.with_suffix(f".{suffix}").write_bytes(stdin if suffix == "in" else b"")
        request = {"program": program, "words": list(map(str, words)), "spool": str(spool), "notes": str(notes), "at": at,
                   "how": how, "code": code}  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        found = [json.loads(line) for line in notes.with_suffix(".calls").read_text().splitlines()]
        steps = [(frozenset(each[0]), frozenset(each[1]), each[2], each[3]) for each in found if isinstance(each, list)]
        calls = [each for each in found if isinstance(each, str)]
        return Ended(status, notes.with_suffix(".out").read_text(errors="replace"), calls, steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # The end of its input is its end.
        self._process.communicate()


# The rest runs in the process that forks, and in its children.


def serve() -> None:
    import enqueue.main
    import releaser.cli.main
    import releaser.daemon

    programs = {
        "enqueue": enqueue.main.main,
        "releaser": releaser.daemon.main,
        "command": releaser.cli.main.main,
    }
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            # A child that hangs is a failure, and no endless test.
            signal.alarm(SECONDS)
            _be(programs[request["program"]], request)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _be(main: Callable[[], None], request: dict[str, Any]) -> None:
    """The program MAIN as REQUEST wants it; does not return."""
    status = 70
    try:
        os.dup2(os.open(f"{request['notes']}.in", os.O_RDONLY), 0)
        for fd in (1, 2):
            os.dup2(os.open(f"{request['notes']}.out", os.O_WRONLY | os.O_APPEND), fd)
        sys.argv = [request["program"], *request["words"]]
        _Counted(request).patch()
        exec(request["code"], {})
        # enqueue does without the module os, and calls what that has from there.
        for name in dir(posix):
            if not name.startswith("_") and callable(getattr(os, name, None)):
                setattr(posix, name, getattr(os, name))
        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class _Counted:
    """Counts the calls of this process, and ends it, or has one fail, before the one that is wanted."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._at, self._how = request["at"], request["how"]
        self._spool = request["spool"]
        self._program = request["program"]
        self._who = "enqueue" if self._program == "enqueue" else "releaser"
        self._notes = f"{request['notes']}.calls"
        self._open, self._write, self._close, self._listdir = os.open, os.write, os.close, os.listdir
        # Threads count together.
        self._numbers = itertools.count(1)
        self._process = os.getpid()

    def patch(self) -> None:
        from pymysql.connections import Connection

        from releaser.handover import HandOver
        from releaser.ledger import Ledger
        from releaser.mta import Senders
        from releaser.sender import Process

        for name in CHANGES:
            setattr(os, name, self._watched(name, getattr(os, name), lambda *_, **__: True))
        # enqueue's few opens all count: whichever fails, its caller is to be told.
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        os.open = self._watched("open", os.open, lambda _path, flags, *_, **__: self._who == "enqueue" or flags & writes)
        builtins.open = self._watched("open", open, lambda _path, mode="r", *_, **__: mode[0] in "wxa")
        # What the MTA is given, and what it has said.
        for owner, name in ((Senders, "send"), (Process, "send"), (HandOver, "_outcome"), (HandOver, "_not_begun")):
            setattr(owner, name, self._watched(name, getattr(owner, name), lambda *_, **__: isinstance(self._how, str)))
        if isinstance(self._how, str):
            # What MySQL is asked.
            Connection.query = self._watched("query", Connection.query, lambda *_, **__: True)  # type: ignore[method-assign]
            sqlite3.connect = self._traced(sqlite3.connect)
        else:
            Ledger.transaction = self._watched("transaction", Ledger.transaction, lambda *_: True)  # type: ignore[method-assign]

    def _count(self, name: str) -> None:
        if os.getpid() != self._process:
            # The process that talks to the MTA, which ends with this one.
            return
        number = next(self._numbers)
        self._note(name)
        if number != self._at:
            return
        if self._how == EXIT:
            os._exit(ENDED[0])
        if self._how == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "transaction" and self._how == errno.ENOMEM and self._program == "releaser":
            raise MemoryError
        if name == "transaction":
            raise sqlite3.OperationalError("database or disk is full")
        raise OSError(self._how, os.strerror(self._how))

    def _watched(self, name: str, call: Callable[..., Any], counts: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not counts(*args, **kwargs):
                return call(*args, **kwargs)
            self._count(name)
            if name not in ("open", "rename", "unlink"):
                return call(*args, **kwargs)
            before = self._state()
            result = call(*args, **kwargs)
            behind = self._state()
            if behind != before:
                places = [os.path.basename(os.path.dirname(os.fsdecode(path))) for path in args[: 2 if name == "rename" else 1]]
                self._note([sorted(before), sorted(behind), self._who, " ".join([name, *places])])
            return result

        return watched

    def _traced(self, connect: Callable[..., sqlite3.Connection]) -> Callable[..., sqlite3.Connection]:
        def said(statement: str) -> None:
            if statement.lstrip().startswith(DURABLE):
                self._count(statement.split()[0])

        def traced(*args: Any, **kwargs: Any) -> sqlite3.Connection:
            connection = connect(*args, **kwargs)
            connection.set_trace_callback(said)
            return connection

        return traced

    def _state(self) -> set[str]:
        """The directories that have something."""
        places = {queue: f"{self._spool}/{queue}" for queue in QUEUES}
        found = {name for name, path in places.items() if self._there(path)}
        vhosts = f"{self._spool}/vhosts"
        for vhost in self._listdir(vhosts) if os.path.isdir(vhosts) else ():
            found |= {part for part in ("tmp", "new") if self._there(f"{vhosts}/{vhost}/{part}")}
        return found

    def _there(self, directory: str) -> bool:
        try:
            return any(not name.startswith(".") for name in self._listdir(directory))
        except FileNotFoundError:
            return False

    def _note(self, what: object) -> None:
        # Opened each time: enqueue closes whatever it has not opened itself.
        fd = self._open(self._notes, os.O_WRONLY | os.O_APPEND)
        self._write(fd, json.dumps(what).encode() + b"\n")
        self._close(fd)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    serve()
