"""What the enqueue command does on a full file system, and as a user to whom the maildrop is closed. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from host import ROOT, Host, text

# These file systems are smaller than what is to stay free by default.
UNWATCHED = 'min_free = "0"\n'

pytestmark = pytest.mark.server

VHOST = "www.a.example"
USAGE, CANTCREAT, IOERR, NOPERM, CONFIG = 64, 73, 74, 77, 78

# Nobody's.
STRANGER = "12345"


@contextmanager
def small_file_system(path: Path, options: str) -> Iterator[None]:
    path.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"{options},mode=0700", "pss-test", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def refused(run: subprocess.CompletedProcess[bytes], status: int) -> None:
    assert run.returncode == status, run
    assert run.stdout == b""
    line = run.stderr.decode().removesuffix("\n")
    assert line.isprintable() and run.stderr.endswith(b"\n"), run.stderr


def test_enqueue_on_a_full_spool() -> None:
    """A message that does not fit is refused with 74 and leaves nothing; when there is room again, mail goes through."""
    with Host(extra=UNWATCHED) as host, small_file_system(host.spool, "size=256k"):
        host.add(VHOST)
        big = text("one@x.example", body="0123456789\n" * 100_000)
        refused(host.enqueue(VHOST, "-t", message=big), IOERR)
        assert host.ls() == []
        host.send(VHOST)
        (first,) = host.ls()
        # Now without any room at all.
        filler = host.spool / "filler"
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(bytes(1_000_000))
        for message in (None, big):
            refused(host.enqueue(VHOST, "-t", message=message), IOERR)
            assert host.ls() == [first]
        filler.unlink()
        host.send(VHOST, message=text("one@x.example", subject="later"))
        with host.running():
            host.wait_for_mail(2)
        assert host.subjects() == ["later", "subject"]


def test_enqueue_without_inodes() -> None:
    """Where no file can be made: 73."""
    with Host(extra=UNWATCHED) as host, small_file_system(host.spool, "size=1m,nr_inodes=40"):
        host.add(VHOST)
        fillers = []
        with pytest.raises(OSError, match="No space left"):
            for number in range(100):
                fillers.append(host.spool / f"filler {number}")
                fillers[-1].touch()
        refused(host.enqueue(VHOST, "-t"), CANTCREAT)
        assert host.ls() == []
        fillers[0].unlink()
        host.send(VHOST)
        assert len(host.ls()) == 1


def test_releaser_on_a_full_spool_loses_nothing() -> None:
    """Mail that cannot be held for want of room waits in new/ and is held when there is room."""
    with Host(default=["0/1h"], extra=UNWATCHED) as host, small_file_system(host.spool, "size=512k"):
        host.add(VHOST)
        message = text("one@x.example", body="0123456789\n" * 5_000)
        for _ in range(4):
            host.send(VHOST, message=message)
        filler = host.spool / "filler"
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(bytes(1_000_000))
        host.start()
        host.wait_for_log("No space left")
        assert [name for name in host.ls() if name.startswith("vhosts/")]
        assert host.is_running()
        filler.unlink()
        # Saves the test the wait for the next scan.
        assert host.stop() == 0
        host.start()
        host.wait_until_idle()
        assert (len(host.held()), len(host.ls()), host.mail()) == (4, 4, [])
        for queue_id in host.held():
            raw = host.cli("hold", "show", "--raw", queue_id, text=False).stdout
            assert raw.endswith(message.partition(b"\n\n")[2])
        assert host.stop() == 0


@pytest.fixture
def stranger() -> Iterator[Path]:
    """The shipped script and its package where every user can read them, for the system's own interpreter."""
    with tempfile.TemporaryDirectory(prefix="pss-stranger-", dir="/tmp") as name:
        directory = Path(name)
        shutil.copytree(ROOT / "enqueue", directory / "enqueue", ignore=shutil.ignore_patterns("__pycache__"))
        template = (ROOT / "enqueue/secure-sendmail-enqueue.in").read_text()
        script = directory / "secure-sendmail-enqueue"
        script.write_text(template.replace("@START@", "/usr/bin/python3").replace("@LIBRARY@", name))
        subprocess.run(["chmod", "-R", "a+rX", directory], check=True)
        yield script


def enqueue_as_stranger(script: Path, host: Host, vhost: str) -> subprocess.CompletedProcess[bytes]:
    become = ["setpriv", "--reuid", STRANGER, "--regid", STRANGER, "--clear-groups", "--"]
    words = [*become, "/usr/bin/python3", "-IS", str(script), "--spool", str(host.spool), vhost, "-t"]
    return subprocess.run(words, input=text("one@x.example"), capture_output=True, timeout=60)


def test_enqueue_at_a_closed_gate(host: Host, stranger: Path) -> None:
    """A user to whom the spool or the vhost is closed is refused with 77, whichever directory closes it."""
    vhosts = host.spool / "vhosts"
    for opened in ((), (host.spool,), (host.spool, vhosts)):
        for path in opened:
            path.chmod(0o711)
        refused(enqueue_as_stranger(stranger, host, VHOST), NOPERM)
        assert host.ls() == []
    # Where he may look, he learns that there is none.
    refused(enqueue_as_stranger(stranger, host, "www.c.example"), CONFIG)


def test_enqueue_as_another_user_behind_an_open_gate(host: Host, stranger: Path) -> None:
    """The same script as the same user is accepted where the gate lets him in, so it is the gate that refuses."""
    gate = host.spool / "vhosts" / VHOST
    for path in (host.spool, gate.parent, gate):
        path.chmod(0o711)
    for name in ("tmp", "new"):
        (gate / name).chmod(0o3777)
    (gate / "policy").chmod(0o644)
    run = enqueue_as_stranger(stranger, host, VHOST)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")
    (name,) = host.ls()
    assert name.startswith(f"vhosts/{VHOST}/new/")
    assert (host.spool / name).stat().st_uid == int(STRANGER)


@pytest.fixture
def bundled(stranger: Path) -> Path:
    """The shipped script with what `make install` makes: all modules in one file, and a start for the interpreter."""
    library = stranger.parent
    stranger.write_text(stranger.read_text().replace("/usr/bin/python3", f"{library}/start/python3"))
    stranger.chmod(0o755)
    subprocess.run(["/usr/bin/python3", "-I", library / "enqueue/bundle.py", library / "start"], check=True)
    return next(library.glob("enqueue/__pycache__/program.cpython-*[0-9]"))


def run_as_root(
    bundled: Path, host: Host, *recipients: str | bytes, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    script = bundled.parents[2] / "secure-sendmail-enqueue"
    words = [script, "--spool", host.spool, VHOST, "-i", *(recipients or ["-t"])]
    return subprocess.run(words, input=text("one@x.example"), capture_output=True, timeout=60, env=environment)


def test_enqueue_starts_from_one_file(host: Host, bundled: Path) -> None:
    """What `make install` makes of all modules is all that is needed; without it the modules are."""
    modules = bundled.parents[1]
    aside = modules.with_name("aside")
    aside.mkdir()
    for module in modules.glob("*.py"):
        module.rename(aside / module.name)
    run = run_as_root(bundled, host)
    assert (run.returncode, run.stderr) == (0, b"") and len(host.ls()) == 1
    run = subprocess.run([bundled.parents[2] / "secure-sendmail-enqueue", "--help"], capture_output=True, timeout=60)
    assert run.returncode == USAGE and b"\nUsage: secure-sendmail-enqueue " in run.stderr
    # As after an upgrade of the interpreter.
    bundled.rename(bundled.with_suffix(".cpython-399"))
    assert run_as_root(bundled, host).returncode == CONFIG
    for module in aside.iterdir():
        module.rename(modules / module.name)
    assert run_as_root(bundled, host).returncode == 0 and len(host.ls()) == 2
    assert run_as_root(bundled, host, "one@bücher.example").returncode == 0 and len(host.ls()) == 3


def test_enqueue_with_a_broken_file_says_so(host: Host, bundled: Path) -> None:
    """A half of it is no installation: 78, and nothing is left behind."""
    os.truncate(bundled, 1000)
    run = run_as_root(bundled, host)
    assert run.returncode == CONFIG and run.stderr.startswith(b"secure-sendmail-enqueue: not installed correctly: ")
    assert host.ls() == []


def test_enqueue_starts_with_utf8_alone(host: Host, bundled: Path) -> None:
    """What else there is of codecs is loaded for those who need it, from the interpreter's own library."""
    python = bundled.parents[2] / "start/python3"
    loaded = "print('encodings.aliases' in sys.modules)"
    program = f"import sys; {loaded}; 'ü'.encode('koi8-r', 'ignore'); {loaded}"
    run = subprocess.run([python, "-IS", "-c", program], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "False\nTrue\n", "")
    run = run_as_root(bundled, host, "one@bücher.example")
    assert (run.returncode, run.stderr) == (0, b"")
    # As packages for Debian have links; and as somebody who makes a chroot may copy them.
    program = python.readlink()
    for make in (lambda: python.symlink_to(os.path.relpath(program, python.parent)), lambda: shutil.copyfile(program, python)):
        python.unlink()
        make()
        python.chmod(0o755)
        run = run_as_root(bundled, host, "one@bücher.example")
        assert (run.returncode, run.stderr) == (0, b"")
    assert len(host.ls()) == 3
    assert all(b"\nRecipient: one@xn--bcher-kva.example\n" in (host.spool / name).read_bytes() for name in host.ls())


def test_enqueue_without_a_standard_input(host: Host, bundled: Path) -> None:
    """The file that it is started from is not taken for the message."""
    script = bundled.parents[2] / "secure-sendmail-enqueue"
    words = ["/bin/sh", "-c", 'exec "$@" <&-', "sh", script, "--spool", host.spool, VHOST, "one@x.example", "-i"]
    run = subprocess.run(words, capture_output=True, timeout=60)
    assert run.returncode == IOERR and b"cannot read the message from standard input" in run.stderr
    assert host.ls() == []


# With codecs that the interpreter has in its library, and in a file to be loaded from there; and what there is without any.
LOCALES = {"de_DE.ISO-8859-15": "iso8859-15", "ja_JP.EUC-JP": "euc_jp", "C.UTF-8": "utf-8", "POSIX": "utf-8", "no@body": "utf-8"}


@pytest.mark.parametrize("locale", LOCALES)
def test_enqueue_in_any_locale(host: Host, bundled: Path, tmp_path: Path, locale: str) -> None:
    """Python takes its arguments for text of the caller's locale, and ends where it does not find the codec for that."""
    environment = {"LC_ALL": locale}
    if LOCALES[locale] != "utf-8":
        language, _, characters = locale.partition(".")
        subprocess.run(["localedef", "-i", language, "-f", characters, tmp_path / locale], check=True)
        environment["LOCPATH"] = str(tmp_path)
    words = [bundled.parents[2] / "start/python3", "-IS", "-c", "import sys; print(sys.getfilesystemencoding())"]
    run = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)
    assert (run.stdout, run.stderr) == (f"{LOCALES[locale]}\n", "")
    for recipient in ("one@bücher.example".encode(), b"two@x.example"):
        run = run_as_root(bundled, host, recipient, environment=environment)
        assert (run.returncode, run.stderr) == (0, b"")
    found = b"".join((host.spool / name).read_bytes() for name in host.ls())
    assert found.count(b"\nRecipient: one@xn--bcher-kva.example\n") == found.count(b"\nRecipient: two@x.example\n") == 1
