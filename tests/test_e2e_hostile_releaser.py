"""Root's commands on a spool whose daemon has been taken over: whatever it plants, root reads, writes and makes nothing else.

The daemon's uid owns the maildrops, the queues' contents, the bells and the ledger. What is root's alone stands for
everything on the machine that it must not reach.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import stat
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from host import text
from servers import wait_until
from system import DAEMON, PYTHON, System

pytestmark = pytest.mark.server

# Nobody else can read it, so whoever is told it was told by root.
SECRET = "c9c4b1f0 is a secret of root"

# What the daemon does to a maildrop $1, with $2 the directory that is root's alone.
PLANTS = {
    "tmp-link": "os.rename('tmp', 'was-tmp'); os.symlink(f'{root}/tree', 'tmp')",
    "new-link": "os.rename('new', 'was-new'); os.symlink(f'{root}/tree', 'new')",
    "both-gone": "os.rename('tmp', 'was-tmp'); os.rename('new', 'was-new')",
    "new-fifo": "os.rename('new', 'was-new'); os.mkfifo('new')",
    "new-file": "os.rename('new', 'was-new'); open('new', 'x').close()",
    "policy-link": "os.unlink('policy'); os.symlink(f'{root}/policy', 'policy')",
    "policy-link-to-none": "os.unlink('policy'); os.symlink(f'{root}/tree/made', 'policy')",
    "policy-fifo": "os.unlink('policy'); os.mkfifo('policy')",
    "policy-directory": "os.unlink('policy'); os.mkdir('policy'); os.symlink(f'{root}/secret', 'policy/in')",
    "policy-hard-link": "os.unlink('policy'); os.link(own, 'policy')",
    "policy-new-fifo": "os.unlink('policy'); os.mkfifo('policy.new')",
    "policy-new-link": "os.unlink('policy'); os.symlink(f'{root}/tree/made', 'policy.new')",
    "bell-above": "open('policy', 'w').write(f'Policy: 1\\nBell: ../../..{root}/secret\\nEnd: 1\\n')",
    "bell-absolute": "open('policy', 'w').write(f'Policy: 1\\nBell: {root}/secret\\nEnd: 1\\n')",
    "mail-link": "os.symlink(f'{root}/message', f'new/{name}'); os.symlink(f'{root}/tree', 'new/tree')",
    "mail-fifo": "os.mkfifo(f'new/{name}')",
    "mail-deep": "os.chdir('new'); [(os.mkdir('d'), os.chdir('d')) for _ in range(2000)]; os.symlink(root, 'd')",
    "set-id": "os.chmod('.', 0o6777); os.chmod('tmp', 0o6777); os.chmod('policy', 0o6777)",
    "nobody-may": "os.chmod('tmp', 0); os.chmod('new', 0); os.chmod('policy', 0); os.chmod('.', 0)",
}
PLANT = """
import os, sys

drop, root, own, name = sys.argv[1:5]
os.umask(0)
os.chdir(drop)
exec(sys.argv[5])
"""

# The same for a queue $1 and three queue ids that nobody knows, and for the held mail $1.
BESIDE = """
import os, sys

queue, root, *ids = sys.argv[1:]
os.chdir(queue)
os.symlink(f"{root}/message", ids[0])
os.mkfifo(ids[1])
os.mkdir(ids[2])
os.symlink(root, f"{ids[2]}/in")
"""
INSTEAD = """
import os, sys

mail, root, plant = sys.argv[1:]
if os.path.isdir(mail):
    os.rmdir(mail)
else:
    os.unlink(mail)
exec(plant)
"""

# As fast as it can, tmp/, new/ and policy are what they should be, and links to what is root's.
SWAPPER = """
import ctypes, os, sys

libc = ctypes.CDLL(None, use_errno=True)
drop, root = sys.argv[1:3]
os.chdir(drop)
for name, target in (("tmp", "tree"), ("new", "tree"), ("policy", "policy")):
    os.symlink(f"{root}/{target}", f"{name}.link")
while True:
    for name in ("tmp", "new", "policy"):
        # AT_FDCWD, RENAME_EXCHANGE
        if libc.renameat2(-100, name.encode(), -100, f"{name}.link".encode(), 2) and not os.path.lexists(name):
            sys.exit(0)
"""

# What the daemon does to the state directory $1; $2 is the directory that is root's alone.
LEDGERS = {
    "link": "os.unlink('ledger.sqlite'); os.symlink(f'{root}/ledger.sqlite', 'ledger.sqlite')",
    "link-to-secret": "os.unlink('ledger.sqlite'); os.symlink(f'{root}/secret', 'ledger.sqlite')",
    "link-to-none": "os.unlink('ledger.sqlite'); os.symlink(f'{root}/tree/made', 'ledger.sqlite')",
    "beside": "[os.symlink(f'{root}/tree/made', f'ledger.sqlite-{end}') for end in ('wal', 'shm', 'journal') "
    "if not os.path.lexists(f'ledger.sqlite-{end}')]",
    "fifo": "os.unlink('ledger.sqlite'); os.mkfifo('ledger.sqlite')",
    "directory": "os.unlink('ledger.sqlite'); os.mkdir('ledger.sqlite')",
    "names": "import sqlite3; book = sqlite3.connect('ledger.sqlite'); "
    "book.execute('UPDATE message SET vhost = ?, source = ?', (f'../../..{root}', f'../../../..{root}/secret')); book.commit()",
}


@pytest.fixture
def system() -> Iterator[System]:
    """A spool with held mail of www.held.example; beside it what is root's alone."""
    # Without a mount of its own the spool has no border that would keep a link out.
    with System(default=["0/1h"], spool_is_there=False) as made:
        made.register("www.held.example", "c1")
        made.send("www.held.example", "-t", user="c1", message=text("one@x.example", subject="held"))
        with made.running():
            made.wait(lambda: len(made.held()) == 1, "it is held")
        make_roots_own(made)
        yield made


def roots_own(system: System) -> Path:
    return system.directory / "root"


def make_roots_own(system: System) -> None:
    """A directory like any other of root's, with files that a program which is led there would take for its own."""
    root = roots_own(system)
    (root / "tree/inner").mkdir(parents=True)
    (root / "tree/inner/file").write_text(SECRET)
    (root / "secret").write_text(SECRET + "\n")
    (root / "policy").write_text(f"Policy: 1\nBell: {'0' * 32}\nComplaints-To: {SECRET}\nEnd: 1\n")
    # A message as in hold/, and one as in new/.
    (held,) = (system.spool / "hold").iterdir()
    (root / "message").write_bytes(held.read_bytes().replace(b"\n\n", f"\n\nX-Secret: {SECRET}\n".encode(), 1))
    shutil.copy(system.state / "ledger.sqlite", root / "ledger.sqlite")
    with contextlib.closing(sqlite3.connect(root / "ledger.sqlite")) as book, book:
        book.execute("PRAGMA journal_mode = DELETE")
        book.execute("UPDATE message SET subject = ?, reason = ?", (SECRET, SECRET))
    for path in (root, *root.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
        # Read later than written, a file's time of access moves, on file systems that are mounted as Debian mounts them.
        os.utime(path, (0, 1_000_000_000), follow_symlinks=False)


def seen(system: System) -> dict[str, tuple[object, ...]]:
    """All that is to be known of what is root's alone, without a trace of having looked."""
    found: dict[str, tuple[object, ...]] = {}

    def look(path: Path) -> None:
        status = path.lstat()
        content: object = None
        if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
            fd = os.open(path, os.O_RDONLY | os.O_NOATIME)
            content = tuple(sorted(os.listdir(fd))) if stat.S_ISDIR(status.st_mode) else os.read(fd, 1 << 20)
            os.close(fd)
        found[str(path)] = (
            oct(status.st_mode), status.st_uid, status.st_gid, status.st_nlink, status.st_ino,
            status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns, content,
        )  # fmt: skip
        if stat.S_ISDIR(status.st_mode):
            for name in content if isinstance(content, tuple) else ():
                look(path / name)

    look(roots_own(system))
    return found


def told(system: System) -> list[str]:
    """The files that the daemon's uid can read and that have the secret in them."""
    places = (system.spool, system.state, system.logs, system.config.parent, system.maildir)
    return subprocess.run(["grep", "-rlsD", "skip", SECRET, *places], capture_output=True, text=True).stdout.split()


def as_root(system: System, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs the command, which ends in good order, whatever its status, and tells no secret."""
    run = system.cli(*words, check=False, timeout=20)
    assert run.returncode in (0, 1, 64, 78), (words, run)
    assert SECRET not in run.stdout + run.stderr, (words, run)
    assert "Traceback" not in run.stderr, (words, run)
    return run


def swaps(drop: Path) -> bool:
    """Whether the swapper has made its last link, whatever its name is at the moment."""
    return any((drop / name).is_symlink() for name in ("policy", "policy.link"))


def everything_on(system: System, vhost: str) -> None:
    """What an administrator may do with a vhost, its end included."""
    as_root(system, "vhost", "add", vhost, "--user", "c1")
    as_root(system, "vhost", "rename", vhost, f"renamed-{vhost}")
    left = [name for name in (vhost, f"renamed-{vhost}") if os.path.lexists(system.spool / "vhosts" / name)]
    assert left
    for name in left:
        as_root(system, "vhost", "remove", name, "--delete-mail", "--yes")


def everything_at_all(system: System, held: str) -> None:
    """What an administrator may look at, and what he may repair."""
    for words in (
        ["check"], ["check", "--repair"], ["check"], ["status"], ["vhost", "list"], ["hold", "list"], ["hold", "show", held],
        ["hold", "show", "--raw", held], ["log"], ["stop", "www.held.example", "--why", "test"],
    ):  # fmt: skip
        as_root(system, *words)


def test_hostile_daemon_is_seen_when_it_succeeds(system: System) -> None:
    """The control: each kind of access that the other tests exclude changes what they compare."""
    before = seen(system)
    assert seen(system) == before and told(system) == []
    root = roots_own(system)
    for name, attempt in (
        ("secret", lambda: (root / "secret").read_text()),
        ("tree", lambda: os.listdir(root / "tree")),
        ("policy", lambda: os.chmod(root / "policy", 0o600)),
        ("ledger.sqlite", lambda: os.chown(root / "ledger.sqlite", 0, 0)),
        ("tree/inner", lambda: (root / "tree/inner/made").touch()),
        ("message", lambda: os.utime(root / "message", (0, 1_000_000_000))),
    ):
        before = seen(system)
        attempt()
        assert seen(system)[str(root / name)] != before[str(root / name)], name
    shutil.copy(root / "secret", system.state / "copy")
    assert told(system) == [str(system.state / "copy")]


def test_hostile_daemon_plants_in_maildrops(system: System) -> None:
    """Links, FIFOs, directories and forged bells in place of a maildrop's parts lead root nowhere."""
    name = "1795376167.011099.P3395.2bad27e5dbb62169d779a57a,S=480"
    (held,) = system.held()
    vhosts = {f"{plant}.example": code for plant, code in PLANTS.items()}
    for vhost, code in vhosts.items():
        system.register(vhost, "c1")
        drop = system.spool / "vhosts" / vhost
        system.python(PLANT, drop, roots_own(system), system.state / "ledger.sqlite", name, code, user=DAEMON)
    before = seen(system)
    everything_at_all(system, held)
    assert seen(system) == before
    for vhost in vhosts:
        everything_on(system, vhost)
        assert seen(system) == before, vhost
    assert told(system) == []
    # What nobody has touched works as ever.
    system.register("www.c2.example", "c2")
    system.send("www.c2.example", "-t", user="c2")


def test_hostile_daemon_links_roots_file_for_the_policy(system: System) -> None:
    """A file of root's that has a second name in a maildrop is neither given away nor opened to others."""
    (held,) = system.held()
    policy = system.spool / "vhosts/www.held.example/policy"
    # Where the kernel lets everyone link everyone's files, the daemon itself could do this.
    policy.unlink()
    os.link(roots_own(system) / "secret", policy)
    status = (roots_own(system) / "secret").stat()
    everything_at_all(system, held)
    as_root(system, "vhost", "add", "www.held.example", "--user", "c1")
    as_root(system, "vhost", "rename", "www.held.example", "www.renamed.example")
    now = (roots_own(system) / "secret").stat()
    assert (now.st_mode, now.st_uid, now.st_gid, now.st_mtime_ns) == (status.st_mode, 0, 0, status.st_mtime_ns)
    assert (roots_own(system) / "secret").read_text() == SECRET + "\n"


def test_hostile_daemon_plants_in_the_queues(system: System) -> None:
    """A link, a FIFO and a directory in place of held mail, and beside what is in a queue, lead root nowhere."""
    (held,) = system.held()
    root = roots_own(system)
    others = [f"{held[:-1]}{digit}" for digit in "0123456789ABCDEF" if digit != held[-1]][:3]
    for queue in ("active", "hold", "failed", "corrupt", "trash"):
        system.python(BESIDE, system.spool / queue, root, *others, user=DAEMON)
    before = seen(system)
    for plant in ("os.symlink(f'{root}/message', mail)", "os.mkfifo(mail)", "os.mkdir(mail)"):
        system.python(INSTEAD, system.spool / "hold" / held, root, plant, user=DAEMON)
        everything_at_all(system, held)
        for queue_id in others:
            as_root(system, "hold", "show", "--raw", queue_id)
        assert seen(system) == before, plant
    everything_on(system, "www.held.example")
    assert seen(system) == before
    assert told(system) == []


@pytest.mark.parametrize("plant", LEDGERS)
def test_hostile_daemon_plants_a_ledger(system: System, plant: str) -> None:
    """A ledger that is a link, a FIFO or full of foreign paths is opened by nobody who could do more than the daemon."""
    (held,) = system.held()
    code = "import os, sys\nos.chdir(sys.argv[1])\nroot = sys.argv[2]\nexec(sys.argv[3])"
    system.python(code, system.state, roots_own(system), LEDGERS[plant], user=DAEMON)
    before = seen(system)
    for words in (["status"], ["check"], ["check", "--repair"], ["hold", "show", "--raw", held]):
        as_root(system, *words)
    everything_on(system, "www.held.example")
    # Started by root, the daemon is no longer root when it opens the ledger.
    run = system.releaser("--once")
    assert SECRET not in run.stdout + run.stderr
    assert seen(system) == before
    assert told(system) == []


def test_hostile_daemon_swaps_while_root_works(system: System) -> None:
    """Parts of a maildrop that become links to what is root's and back, all the time, lead root nowhere."""
    before = seen(system)
    for number in range(4):
        vhost = f"www.swapped{number}.example"
        system.register(vhost, "c1")
        drop = system.spool / "vhosts" / vhost
        swapper = subprocess.Popen(system.words([PYTHON, "-c", SWAPPER, drop, roots_own(system)], DAEMON))
        try:
            wait_until(partial(swaps, drop), 10, "it swaps")
            for words in (["check", "--repair"], ["vhost", "list"], ["check", "--repair"]):
                as_root(system, *words)
            everything_on(system, vhost)
        finally:
            subprocess.run(["pkill", "-KILL", "-P", str(swapper.pid)])
            swapper.wait()
        assert seen(system) == before
    assert told(system) == []
