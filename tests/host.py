"""A private installation for the end-to-end tests: the three real commands on a spool of their own under /tmp.

Standard library only. Whatever a Host starts ends with it, also where a test fails or the test run is killed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / ".venv/bin"
ENQUEUE = BIN / "secure-sendmail-enqueue"
RELEASER = BIN / "secure-sendmail-releaser"
COMMAND = BIN / "secure-sendmail"
QUEUES = ("active", "hold", "failed", "corrupt", "trash")

# How long something may take that is done at once on an idle machine.
PATIENCE = 30.0

# Waits for the end of its input, which is the end of the test run, however that ends. $1 is a process group.
WATCH = 'read -r _; kill -s KILL -- "-$1"; rm -rf -- "$2"'


def text(*to: str, subject: str = "subject", body: str = "body\n", headers: str = "") -> bytes:
    """A message as a script writes it; with LF line ends."""
    return f"To: {', '.join(to)}\nSubject: {subject}\n{headers}\n{body}".encode()


def smtp(port: int) -> str:
    """The MTA on that loopback port, as the configuration names it."""
    return f"smtp://127.0.0.1:{port}"


class Host:
    """Spool, state, configuration and maildir of one test, and the commands that work on them.

    `extra` is TOML that goes on behind the default of [limits]: first further keys of [limits], then other tables.
    """

    def __init__(self, mta: str = "", default: Sequence[str] = ("unlimited",), extra: str = "") -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="pss-host-", dir="/tmp"))
        # The servers that tests start beside it run as other users, who must be able to come in.
        self.directory.chmod(0o755)
        self.config = self.directory / "etc/releaser.toml"
        self.spool = self.directory / "spool"
        self.state = self.directory / "state"
        self.maildir = self.directory / "mail"
        self._log = self.directory / "releaser.log"
        self._mta = mta or f"maildir:{self.maildir}"
        self._default = list(default)
        self._extra = extra
        # What the releaser and enqueue are started through, such as env with its settings.
        self.through: list[str | Path] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._finalizer = weakref.finalize(self, _remove, self._processes, self.directory)
        self.config.parent.mkdir(mode=0o700)
        self.configure()

    def configure(self, mta: str | None = None, default: Sequence[str] | None = None, extra: str | None = None) -> None:
        """Writes the configuration anew; what is not given stays as it was."""
        self._mta = self._mta if mta is None else mta
        self._default = self._default if default is None else list(default)
        self._extra = self._extra if extra is None else extra
        self.write(
            f'spool = "{self.spool}"\nstate = "{self.state}"\n\n[mta]\nurl = "{self._mta}"\n\n'
            f"[limits]\ndefault = {json.dumps(self._default)}\n{self._extra}"
        )

    def write(self, toml: str) -> None:
        """Replaces the configuration as an editor does: by a new file of the same name."""
        new = self.config.with_suffix(".new")
        new.write_text(toml)
        new.rename(self.config)

    # Mail in.

    def add(self, *vhosts: str) -> None:
        for vhost in vhosts:
            self.cli("vhost", "add", vhost)

    def enqueue(
        self, vhost: str, *words: str | bytes, message: bytes | None = None, **options: Any
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs the real command; the options are Popen's. Whoever gives `stdin` gives no message."""
        if "stdin" not in options:
            options["input"] = text("one@x.example") if message is None else message
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 60, **options}
        return subprocess.run([*self.through, ENQUEUE, "--spool", self.spool, vhost, *words], **options)

    def send(self, vhost: str, *words: str, message: bytes | None = None) -> None:
        """Enqueues a message that must be accepted without a word, but for the warning that the vhost is over its limits."""
        run = self.enqueue(vhost, *words, message=message)
        warned = all(f"] [secure-sendmail] domain {vhost}: exceeded" in line for line in run.stderr.decode().splitlines())
        assert (run.returncode, run.stdout, warned) == (0, b"", True), run.stderr

    def sendmail_path(self, vhost: str, *words: str) -> str:
        """The value of PHP's setting of that name."""
        return shlex.join([str(ENQUEUE), "--spool", str(self.spool), vhost, *words])

    def php(self, code: str, sendmail_path: str, *settings: str) -> subprocess.CompletedProcess[bytes]:
        """Runs the real php; settings as "mail.add_x_header=On"."""
        program = shutil.which("php")
        assert program, "php is not installed; tests/packages.sh installs it"
        words = [word for setting in (f"sendmail_path={sendmail_path}", *settings) for word in ("-d", setting)]
        return subprocess.run([program, "-n", *words, "-r", code], capture_output=True, timeout=60, cwd=self.directory)

    # The releaser.

    def start(self) -> None:
        """Starts the releaser, and returns when the command says that it is running."""
        process = self.launch()
        self.wait(lambda: process.poll() is not None or self.is_running(), "the releaser is running")
        assert process.returncode is None, f"the releaser ended with {process.returncode}: {self.log()[-2000:]}"

    def launch(self) -> subprocess.Popen[bytes]:
        """Starts the releaser, and does not wait."""
        assert not self._processes, "the releaser is started already"
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [*self.through, RELEASER, "--config", self.config],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        watcher = subprocess.Popen(
            ["/bin/sh", "-c", WATCH, "watcher", str(process.pid), str(self.directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._processes += [process, watcher]
        return process

    @property
    def pid(self) -> int:
        return self._processes[0].pid

    @property
    def cpu(self) -> float:
        """Seconds of processor time that the releaser has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def is_running(self) -> bool:
        status = self.cli("status", "--json", check=False)
        return status.returncode == 0 and bool(json.loads(status.stdout)["running"])

    def stop(self, timeout: float = PATIENCE) -> int:
        """Asks the releaser to end, as systemd does; its exit status."""
        self.signal(signal.SIGTERM)
        return self.ended(timeout)

    def kill(self) -> None:
        """kill -9."""
        self.signal(signal.SIGKILL)
        self.ended()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    @property
    def started(self) -> bool:
        """Whether there is a releaser whose end nobody has waited for."""
        return bool(self._processes)

    def alive(self) -> bool:
        return self.started and self._processes[0].poll() is None

    def ended(self, timeout: float = PATIENCE) -> int:
        """Waits for the releaser's end; its exit status."""
        process, watcher = self._processes
        status = process.wait(timeout)
        watcher.kill()
        watcher.communicate()
        self._processes.clear()
        return status

    def releaser(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs another releaser on this installation, which must end by itself."""
        options = {"capture_output": True, "text": True, "timeout": PATIENCE, **options}
        return subprocess.run([RELEASER, "--config", self.config, *words], **options)

    def log(self) -> str:
        """What the releaser has written so far, in all its runs."""
        return self._log.read_text(errors="surrogateescape") if self._log.exists() else ""

    # The administrator's command.

    def cli(self, *words: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[Any]:
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 60, **options}
        run = subprocess.run([COMMAND, "--config", self.config, *words], **options)
        if check:
            assert run.returncode == 0, f"{words} ended with {run.returncode}: {run.stdout}{run.stderr}"
        return run

    def json(self, *words: str) -> Any:
        return json.loads(self.cli(*words, "--json").stdout)

    def held(self, *words: str) -> list[str]:
        """The queue ids of held mail, oldest first."""
        return [row["queue_id"] for row in self.json("hold", "list", *words)]

    def rows(self, *events: str) -> list[dict[str, Any]]:
        """The rows of the log, oldest first; where events are named, only theirs."""
        return [row for row in self.json("log", "--source", "ledger") if not events or row["event"] in events]

    # What there is.

    def ls(self) -> list[str]:
        """Everything in the queues and the maildrops, as "hold/0660E30058D6E412A"."""
        found = [path for queue in QUEUES for path in (self.spool / queue).iterdir()]
        for vhost in (self.spool / "vhosts").iterdir():
            found += [path for name in ("tmp", "new") for path in self._entries(vhost / name)]
        return sorted(str(path.relative_to(self.spool)) for path in found)

    @staticmethod
    def _entries(directory: Path) -> list[Path]:
        # A test may have removed the directory.
        return list(directory.iterdir()) if directory.exists() else []

    def mail(self) -> list[Path]:
        """The messages that the MTA has, where it is the maildir; in the order of its names."""
        new = self.maildir / "new"
        return sorted(new.iterdir()) if new.exists() else []

    def subjects(self) -> list[str]:
        """The subjects of the messages that the maildir has, sorted."""
        return sorted(subject(path.read_bytes()) for path in self.mail())

    def wait(self, condition: Callable[[], Any], what: str, timeout: float = PATIENCE) -> Any:
        """The condition's first true value; TimeoutError, with the releaser's last words, when it has none in time."""
        end = time.monotonic() + timeout
        while not (value := condition()):
            if time.monotonic() > end:
                raise TimeoutError(f"not within {timeout:g} s: {what}\n{self.report()}")
            time.sleep(0.05)
        return value

    def wait_for_mail(self, count: int, timeout: float = PATIENCE) -> list[Path]:
        self.wait(lambda: len(self.mail()) >= count, f"{count} messages in the maildir", timeout)
        return self.mail()

    def wait_for_row(self, event: str, timeout: float = PATIENCE) -> None:
        self.wait(lambda: self.rows(event), f"the log has a row {event}", timeout)

    def wait_for_ls(self, *names: str, timeout: float = PATIENCE) -> None:
        """Until exactly these are there."""
        self.wait(lambda: self.ls() == sorted(names), f"there are {names}", timeout)

    def wait_until_idle(self, timeout: float = PATIENCE) -> None:
        """Until nothing is on its way: neither in a maildrop nor in the active queue."""

        def idle() -> bool:
            return not any(name.startswith(("vhosts/", "active/")) for name in self.ls())

        self.wait(idle, "maildrops and active queue are empty", timeout)

    def wait_for_log(self, words: str, timeout: float = PATIENCE, start: int = 0) -> str:
        """The first line with those words in what the releaser has written behind `start`."""

        def found() -> str:
            return next((line for line in self.log()[start:].splitlines() if words in line), "")

        line: str = self.wait(found, f"the releaser says {words!r}", timeout)
        return line

    def report(self) -> str:
        """What a person wants to see when a test has failed."""
        return f"spool: {self.ls() if self.spool.exists() else 'none'}\nreleaser: ...{self.log()[-3000:]}"

    @contextmanager
    def running(self) -> Iterator[Self]:
        """A releaser that must end in good order, unless the test has ended it."""
        self.start()
        yield self
        if self._processes:
            assert self.stop() == 0

    def close(self) -> None:
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            try:
                error.add_note(self.report())
            except OSError as unreadable:
                error.add_note(f"spool: {unreadable}")
        self.close()


def subject(message: bytes) -> str:
    """The Subject of a message, as it stands there."""
    header = message.replace(b"\r\n", b"\n").partition(b"\n\n")[0]
    return next(line[9:].decode() for line in header.split(b"\n") if line.startswith(b"Subject: "))


def _remove(processes: list[subprocess.Popen[bytes]], directory: Path) -> None:
    for process in processes:
        process.kill()
        process.communicate()
    processes.clear()
    shutil.rmtree(directory, ignore_errors=True)
