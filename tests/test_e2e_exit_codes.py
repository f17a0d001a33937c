"""The exit status of the real enqueue command: each one of the page, under whatever a caller leaves to its child."""

from __future__ import annotations

import os
import re
import resource
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import page
import pytest
from host import ENQUEUE, Host, text

VHOST = "www.a.example"
OK, USAGE, DATAERR, UNAVAILABLE, CANTCREAT, IOERR, NOPERM, CONFIG = 0, 64, 65, 69, 73, 74, 77, 78
STATUSES = {int(row[0]) for row in page.table(page.text(), "statuses")}

# A call that ends with each status: the vhost, the words behind it, and the message.
MESSAGE = text("one@x.example", body="0123456789\n" * 400)
CALLS: dict[int, tuple[str, list[str | bytes], bytes]] = {
    OK: (VHOST, ["-t"], MESSAGE),
    USAGE: (VHOST, ["-t", "-Z"], MESSAGE),
    DATAERR: (VHOST, ["-t"], b"Subject: nobody\n\nbody\n"),
    UNAVAILABLE: ("www.small.example", ["-t"], MESSAGE),
    CANTCREAT: ("www.no-tmp.example", ["-t"], MESSAGE),
    IOERR: ("www.no-new.example", ["-t"], MESSAGE),
    NOPERM: ("www.closed.example", ["-t"], MESSAGE),
    CONFIG: ("www.missing.example", ["-t"], MESSAGE),
}
MANY = [f"user{number}@x.example" for number in range(2000)]


@pytest.fixture(scope="module")
def installation() -> Iterator[Host]:
    """A vhost for each status that one vhost cannot have."""
    with Host() as installation:
        names = {vhost for vhost, _, _ in CALLS.values()} - {"www.missing.example"}
        installation.add(*sorted(names))
        vhosts = installation.spool / "vhosts"
        (vhosts / "www.small.example/policy").write_text("Policy: 1\nMax-Size: 10\nEnd: 1\n")
        (vhosts / "www.no-tmp.example/tmp").rmdir()
        (vhosts / "www.no-new.example/new").rmdir()
        closed = vhosts / "www.closed.example"
        if os.getuid() == 0:
            # Root is a customer in its own spool only.
            os.chown(closed, 12345, 12345)
        else:
            closed.chmod(0)
        yield installation
        if os.getuid() != 0:
            closed.chmod(0o700)


@pytest.fixture
def evil(tmp_path: Path) -> dict[str, str]:
    """An environment that would have Python load a customer's modules, or talk."""
    for name in ("os", "posix", "sys", "time", "site", "sitecustomize", "usercustomize", "enqueue", "socket"):
        (tmp_path / f"{name}.py").write_text("import posix; posix._exit(99)\n")
    here = str(tmp_path)
    return {
        "PYTHONPATH": here, "PYTHONHOME": here, "PYTHONSTARTUP": f"{here}/os.py", "PYTHONUSERBASE": here, "PYTHONINSPECT": "1",
        "PYTHONWARNINGS": "error,bad::::x", "PYTHONDEVMODE": "1", "PYTHONMALLOC": "debug", "PYTHONFAULTHANDLER": "1",
        "PYTHONIOENCODING": "no-such", "PYTHONHASHSEED": "x", "PYTHONTRACEMALLOC": "x", "PYTHONPROFILEIMPORTTIME": "1",
        "PYTHONVERBOSE": "3", "PYTHONINTMAXSTRDIGITS": "x", "PYTHONUTF8": "x", "PYTHONPLATLIBDIR": here,
    }  # fmt: skip


def found(host: Host) -> list[str]:
    """All that is in the spool; os.walk() tells nobody that a closed directory was not read."""
    return sorted(os.path.join(place, name) for place, dirs, files in os.walk(host.spool) for name in (*dirs, *files))


def call(host: Host, status: int, *words: str | bytes, **options: Any) -> subprocess.CompletedProcess[bytes]:
    vhost, own, message = CALLS[status]
    if "stdin" not in options:
        options["input"] = message
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 30, **options}
    return subprocess.run([ENQUEUE, "--spool", host.spool, vhost, *words, *own], **options)


def matrix(host: Host, *words: str | bytes, but: dict[int, int] | None = None, **options: Any) -> None:
    """Each call ends with its status, or the one that `but` has for it; its word on it is one line, or none for success."""
    before = found(host)
    for status in CALLS:
        run = call(host, status, *words, **options)
        wanted = (but or {}).get(status, status)
        assert run.returncode == wanted, run
        assert not run.stdout
        lines = (run.stderr or b"").splitlines(keepends=True)
        if run.stderr is not None and options.get("stderr") is None:
            assert len(lines) == bool(wanted), run
            assert all(line.startswith(b"secure-sendmail-enqueue: ") and line.endswith(b"\n") for line in lines), run
        added = [Path(name) for name in found(host) if name not in before]
        assert [path.parent.name for path in added] == ["new"] * (wanted == OK), added
        for path in added:
            assert path.read_bytes().endswith(b"\n\n" + MESSAGE.partition(b"\n\n")[2])
            path.unlink()


def closing(*descriptors: int) -> Callable[[], None]:
    return lambda: [os.close(descriptor) for descriptor in descriptors] and None


def limiting(which: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(which, (value, value))


def test_statuses_of_the_page() -> None:
    """The calls here are all that the page names."""
    assert set(CALLS) == STATUSES


def test_statuses_under_the_umask(installation: Host) -> None:
    """No umask decides on anything."""
    for umask in (0o777, 0o077, 0):
        matrix(installation, umask=umask)


@pytest.mark.parametrize("closed", [c for n in (1, 2, 3) for c in combinations((0, 1, 2), n)], ids=lambda c: "".join(map(str, c)))
def test_statuses_with_closed_descriptors(installation: Host, closed: tuple[int, ...]) -> None:
    """Without standard input there is no message, and that is 74 where it comes to reading; the others change nothing."""
    unread = dict.fromkeys((OK, DATAERR, UNAVAILABLE, CANTCREAT), IOERR) if 0 in closed else {}
    if 0 in closed and os.getuid() != 0:
        # The gate is found closed when the file is made.
        unread[NOPERM] = IOERR
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL} if 0 in closed else {}
    if 2 in closed:
        options["stderr"] = subprocess.DEVNULL
    matrix(installation, preexec_fn=closing(*closed), but=unread, **options)


def test_statuses_where_nobody_listens(installation: Host) -> None:
    """Standard output and error may be pipes without a reader, full, or for reading only."""
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "wb") as full, open("/dev/null", "rb") as unwritable:
        for nowhere in (writer, full, unwritable):
            matrix(installation, stdout=nowhere, stderr=nowhere)
            for words in (["-bs"], ["--help"]):
                run = subprocess.run([ENQUEUE, *words], stdout=nowhere, stderr=nowhere, timeout=30)
                assert run.returncode == USAGE
    os.close(writer)


def test_statuses_with_an_unreadable_message(installation: Host) -> None:
    """A standard input that is for writing only, or without data for now: 74. A directory is the interpreter's to refuse."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    before = found(installation)
    for stdin in (os.open("/dev/null", os.O_WRONLY), reader, os.open("/", os.O_RDONLY)):
        run = call(installation, OK, stdin=stdin)
        assert found(installation) == before
        if not stat.S_ISDIR(os.fstat(stdin).st_mode):
            assert (run.returncode, len(run.stderr.splitlines())) == (IOERR, 1)
        assert run.returncode not in (0, 75)
        os.close(stdin)
    os.close(writer)


def test_statuses_in_a_deleted_directory(installation: Host, tmp_path: Path) -> None:
    """The working directory may be gone."""
    gone = tmp_path / "gone"

    def enter() -> None:
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()

    matrix(installation, preexec_fn=enter)


def test_statuses_under_any_environment(installation: Host, evil: dict[str, str]) -> None:
    """None at all, one against Python, one of 100 KB, and locales that the arguments do not fit."""
    for environment in (
        {},
        evil,
        {"X": "y" * 100_000},
        {"LANG": "C"},
        {"LC_ALL": "POSIX"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"LC_ALL": "no_SUCH.locale"},
    ):
        matrix(installation, "-F", "Jörg", env=environment)
        matrix(installation, b"-FJ\xf6rg\xff\xed\xb2\x80", env=environment)


def test_statuses_of_a_bad_argument_that_is_no_text(installation: Host) -> None:
    """What is refused is said in one line of UTF-8, whatever the bytes and the locale."""
    before = found(installation)
    for word in (b"-\xff", b"--\xffoo\n", b"-f\xff\n@x", b"-b\xff", b"a\xff@x.example"):
        for locale in ("C", "C.UTF-8"):
            run = installation.enqueue(VHOST, "-i", word, env={"LC_ALL": locale})
            assert run.returncode == (USAGE if word.startswith(b"-") else DATAERR), run
            assert re.fullmatch(r"secure-sendmail-enqueue: [^\n]+\n", run.stderr.decode())
            assert run.stderr.decode().strip().isprintable()
    assert found(installation) == before


def test_statuses_under_limits(installation: Host) -> None:
    """Files of no bytes end in 74; with five descriptors and a stack of 256 KB everything is as ever."""
    written = dict.fromkeys((OK,), IOERR)
    matrix(installation, preexec_fn=limiting(resource.RLIMIT_FSIZE, 0), but=written)
    matrix(installation, preexec_fn=limiting(resource.RLIMIT_FSIZE, 1024), but=written)
    matrix(installation, preexec_fn=limiting(resource.RLIMIT_STACK, 256 << 10))
    for most in (5, 10):
        matrix(installation, preexec_fn=limiting(resource.RLIMIT_NOFILE, most))
    # The fourth is the vhost's directory, so that no file can be made.
    unmade = dict.fromkeys((OK, UNAVAILABLE, IOERR), CANTCREAT)
    matrix(installation, preexec_fn=limiting(resource.RLIMIT_NOFILE, 4), but=unmade)


def test_statuses_where_memory_ends(installation: Host) -> None:
    """Wherever memory ends, nothing is stored without 0, and from where the interpreter starts, all statuses are ours."""
    python, options = ENQUEUE.read_text().splitlines()[0].removeprefix("#!").split()
    new = installation.spool / "vhosts" / VHOST / "new"
    tmp = new.with_name("tmp")

    def starts(size: int) -> bool:
        run = [python, options, "-c", "import os, sys, time"]
        try:
            limit = limiting(resource.RLIMIT_AS, size)
            return subprocess.run(run, capture_output=True, preexec_fn=limit, timeout=10).returncode == 0
        except subprocess.TimeoutExpired:
            # With some limits the interpreter itself runs in a circle for ever.
            return False

    least = max(size for size in range(8 << 20, 24 << 20, 128 << 10) if not starts(size)) + (128 << 10)
    accepted = []
    for size in range(least, least + (4 << 20), 64 << 10):
        for words in (["-t"], ["-t", "-X/tmp/log", "-Cfile"], ["-Z"]):
            run = installation.enqueue(VHOST, *words, preexec_fn=limiting(resource.RLIMIT_AS, size))
            stored = list(new.iterdir())
            assert len(stored) == (run.returncode == 0), (size, run)
            assert not list(tmp.iterdir())
            assert run.returncode in STATUSES and run.stderr.count(b"\n") <= 1, (size, run)
            accepted += [size for _ in stored]
            for path in stored:
                path.unlink()
    assert accepted


def test_statuses_under_signals(installation: Host) -> None:
    """Signals that the caller ignores, blocks or leaves at their default change no status."""

    def ignore() -> None:
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def default() -> None:
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)

    def block() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))

    for prepare in (ignore, default, block):
        matrix(installation, preexec_fn=prepare, restore_signals=False)


@pytest.mark.server
def test_success_is_not_interrupted(installation: Host) -> None:
    """Ctrl-C that comes with the rename or the sync behind it takes nothing back: the mail is stored, and 0 says so."""
    # The interpreter renames, too, where it has to compile our modules.
    call(installation, USAGE)
    before = found(installation)
    for calls in ("rename,renameat,renameat2", "fsync", "utimensat,exit_group"):
        trace = ["strace", "-qq", "-o", "/dev/null", "-e", f"trace={calls}", "-e", f"inject={calls}:signal=SIGINT"]
        run = subprocess.run(
            [*trace, ENQUEUE, "--spool", installation.spool, VHOST, "-t"], input=MESSAGE, capture_output=True, timeout=30
        )
        assert (run.returncode, run.stderr) == (0, b"")
        (name,) = set(found(installation)) - set(before)
        assert Path(name).parent.name == "new"
        Path(name).unlink()


def test_statuses_with_many_recipients(installation: Host) -> None:
    """Two thousand recipients as arguments are that many in the envelope, or the status that it is without them."""
    before = found(installation)
    for status, (vhost, _, message) in CALLS.items():
        words = ["-Z"] if status == USAGE else ["-i", "--", *MANY, *(["a@b@c"] if status == DATAERR else [])]
        run = installation.enqueue(vhost, *words, message=message)
        assert run.returncode == status, run
        assert run.stderr.count(b"\n") == bool(status)
        for name in set(found(installation)) - set(before):
            assert re.findall(r"^Recipient: (.*)$", Path(name).read_text(), re.MULTILINE) == MANY
            assert status == OK
            Path(name).unlink()
    assert found(installation) == before
