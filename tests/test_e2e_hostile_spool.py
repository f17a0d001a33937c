"""What a customer can do with his own maildrop, under a uid of his own: faults.md, Hostile spool.

After each attack another customer's mail goes out at once, nothing of his can be reached, and the releaser is up and idle.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from host import smtp, subject
from servers import YES, Scripted
from system import PYTHON, System
from test_e2e_flood import of_process
from test_e2e_gate import C1, C2, PROBE, UNREGISTERED, entries

pytestmark = pytest.mark.server

# Another vhost of c2's, whose mail is held.
HELD = "held.c2.example"
# Seconds in which another vhost's mail is out, and the part of a core that an idle releaser may use.
AT_ONCE, IDLE = 5.0, 0.3

# In front of each attack: what a customer needs to write into his own maildrop, in which he is.
TOOLS = """
import fcntl, os, socket, sys, time

os.umask(0o022)
os.chdir(sys.argv[1])

def name(size, second=1795376167):
    return f"{second}.000000.P{os.getpid()}.{os.urandom(12).hex()},S={size}"

def mail(subject, body="text", lines=""):
    head = f"Layout: 2\\nVhost: www.c1.example\\nSender: user@c1.example\\nRecipient: one@x.example\\n{lines}\\n"
    return f"{head}To: one@x.example\\nSubject: {subject}\\n\\n{body}\\n".encode()

def put(path, content, mode=0o640):
    with open(path, "xb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)

def ring():
    with open("policy") as policy:
        bell = dict(line.split(": ", 1) for line in policy.read().splitlines())["Bell"]
    os.utime("../../wake/" + bell)
"""


@pytest.fixture
def system() -> Iterator[System]:
    """Two customers; c2 has mail that is held, and a message that he is writing. The releaser is not started."""
    with installed() as made:
        yield made


@contextmanager
def installed(mta: str = "", default: str = "unlimited") -> Iterator[System]:
    with System(mta, [default], f'[vhosts."{HELD}"]\nlimits = ["0/1h"]\n') as made:
        made.register(C1, "c1")
        made.register(C2, "c2")
        made.register(HELD, "c2")
        made.submit(HELD, "c2", "held")
        made.python("open(__import__('sys').argv[1], 'w').write('half')", drop(made, C2) / "tmp/half", user="c2")
        yield made


def drop(system: System, vhost: str = C1) -> Path:
    return system.spool / "vhosts" / vhost


def attack(system: System, code: str, *words: str, user: str = "c1") -> str:
    """What the customer's program prints; it rings when it has done its work."""
    top, bell = "\ntop = os.open('.', os.O_PATH)\n", "\nos.fchdir(top)\nring()\n"
    return system.python(TOOLS + top + code + bell, drop(system), *words, user=user)


@contextmanager
def attacking(system: System, code: str) -> Iterator[subprocess.Popen[bytes]]:
    """The customer's program runs until the end of its input; it has got to its `print` when this begins."""
    command = system.words([PYTHON, "-uc", TOOLS + code, drop(system)], "c1")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            assert process.stdout.readline(), "the attack has failed"
            yield process
        finally:
            process.stdin.close()
            assert process.wait(20) == 0


def all_is_well(system: System) -> None:
    """Another vhost's mail goes out, nothing of its customer's can be reached, and the releaser is up and idle."""
    begin, number = time.monotonic(), len(system.subjects())
    subject = f"good {number}"
    system.submit(C2, "c2", subject)
    system.wait(lambda: subject in system.subjects(), "another vhost's mail is out", AT_ONCE)
    assert time.monotonic() - begin < AT_ONCE
    system.wait(lambda: len(list((system.spool / "hold").iterdir())) >= 1, "there is something to be reached")
    queues = [path for queue in ("active", "hold", "failed", "corrupt", "trash") for path in shallow(system.spool / queue)]
    foreign = [*queues, *entries(drop(system, C2)), *entries(drop(system, HELD)), *entries(system.state)]
    done = json.loads(system.python(PROBE, user="c1", input=json.dumps(foreign)))
    assert done == {"listed": [], "read": [], "written": [], "moved": []}
    assert (drop(system, C2) / "tmp/half").read_text() == "half"
    assert [row["subject"] for row in system.json("hold", "list", "--vhost", HELD)] == ["held"]
    assert "Traceback" not in system.cli("check", check=False).stderr + system.log()
    assert system.is_running()
    before = of_process(system.pid)[0]
    time.sleep(0.5)
    assert (of_process(system.pid)[0] - before) / 0.5 < IDLE


def test_spool_check_can_fail(system: System) -> None:
    """The check that follows each attack sees a gate that is open."""
    with system.running():
        all_is_well(system)
        drop(system, C2).chmod(0o2711)
        (drop(system, C2) / "tmp").chmod(0o3777)
        with pytest.raises(AssertionError, match=r"www\.c2\.example/tmp"):
            all_is_well(system)


def shallow(queue: Path) -> list[str]:
    """A directory and its entries, not what is in those."""
    return [str(queue), *(str(path) for path in queue.iterdir())]


def corrupt(system: System) -> list[Path]:
    return list((system.spool / "corrupt").iterdir())


def wait_for_outcome(system: System, count: int) -> None:
    system.wait(lambda: len(of_c1(system)) >= count, f"{count} outcomes in the log")


def of_c1(system: System) -> list[tuple[str, str]]:
    """Event and subject of each row of the attacker's vhost."""
    return [(row["event"], row["subject"]) for row in system.rows() if row["vhost"] == C1]


REWRITTEN = """
size = int(sys.stdin.readline())
content = mail("as it was", "original " * (size // 9))
path = name(len(content))
file = open("tmp/it", "xb", buffering=0)
os.fchmod(file.fileno(), 0o640)
file.write(content)
os.rename("tmp/it", "new/" + path)
ring()
print("there")
sys.stdin.readline()
file.seek(0)
file.write(content.replace(b"original", b"FORGED!!").replace(b"one@x.example", b"two@x.example"))
os.fchmod(file.fileno(), 0)
print("rewritten")
sys.stdin.read()
"""


@pytest.mark.parametrize("size", [900, 1_800_000], ids=["small", "large"])
@pytest.mark.parametrize("limit", ["0/1h", "unlimited"], ids=["held", "in-flight"])
def test_spool_file_rewritten_after_it_was_read(size: int, limit: str) -> None:
    """Through a descriptor that is still open nothing changes of what is held, shown, sent and counted."""
    let_go = [False]

    def answer(command: bytes) -> bytes | None:
        while command.startswith(b"MAIL FROM:<user@c1.example>") and not let_go[0]:
            time.sleep(0.02)
        return YES

    with Scripted(answer) as server, installed(smtp(server.port), limit) as system, system.running():
        command = system.words([PYTHON, "-uc", TOOLS + REWRITTEN, drop(system)], "c1")
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(f"{size}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "there\n"
            if limit == "unlimited":
                system.wait(lambda: server.count(b"MAIL FROM:<user@c1.example>"), "it is with the MTA", 45)
            else:
                system.wait(lambda: of_c1(system), "it is held", 45)
            process.stdin.write("now\n")
            process.stdin.flush()
            assert process.stdout.readline() == "rewritten\n"
            if limit == "0/1h":
                (queue_id,) = system.held("--vhost", C1)
                assert "FORGED" not in system.cli("hold", "show", "--raw", queue_id).stdout
                let_go[0] = True
                system.cli("hold", "release", queue_id)
            let_go[0] = True
            system.wait(lambda: server.copies["one@x.example"], "it is sent")
            system.wait(lambda: not list((drop(system) / "new").iterdir()), "it has left new/")
            (message,) = server.messages
            assert message.recipients == ["one@x.example"] and subject(message.data) == "as it was"
            assert b"FORGED" not in message.data and message.data.count(b"original ") == size // 9
            process.stdin.close()
            assert process.wait() == 0
        assert Counter(event for event, _ in of_c1(system))["released"] == 1


def test_spool_hard_links(system: System) -> None:
    """Each name of one file is a message, counted as one; names elsewhere stay, and another's file cannot be linked."""
    code = """
content = mail("linked")
put("tmp/kept", content)
for _ in range(5):
    os.link("tmp/kept", "new/" + name(len(content)))
for other in sys.argv[2:]:
    try:
        os.link(other, "new/" + name(4))
        print(other)
    except OSError:
        pass
"""
    ours = [path for path in entries(drop(system, C2)) if os.path.isfile(path)]
    with system.running():
        assert attack(system, code, *ours, "/etc/passwd", str(system.config)) == ""
        wait_for_outcome(system, 5)
        all_is_well(system)
        assert of_c1(system) == [("released", "linked")] * 5
        assert (drop(system) / "tmp/kept").exists() and list((drop(system) / "new").iterdir()) == []


THINGS = {
    "symbolic-link": "os.symlink('/etc/shadow', path)",
    "link-to-another's-mail": "os.symlink(f'../../www.c2.example/tmp/half', path)",
    "fifo": "os.mkfifo(path)",
    "socket": "socket.socket(socket.AF_UNIX).bind(path)",
    "directory": "os.mkdir(path)",
    "open-directory": "os.mkdir(path); os.chmod(path, 0o777); os.mkdir(path + '/in'); put(path + '/in/file', b'x')",
    "mode-000": "put(path, mail('closed'), 0)",
    "own-group": "put(path, mail('closed')); os.chown(path, -1, os.getgid())",
    "executable": "put(path, mail('set-id')[:60], 0o6777)",
}


@pytest.mark.parametrize("good_name", [True, False], ids=["good-name", "odd-name"])
def test_spool_things_that_are_no_file(system: System, good_name: bool) -> None:
    """Links, FIFOs, sockets, devices, directories and closed files are put aside as they are, and opened by nobody."""
    for kind, number in (("null", 3), ("zero", 5)):
        device = drop(system) / f"tmp/{kind}"
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, number))
        os.chown(device, system.uids["c1"], system.uids["c1"])
    code = "\n".join(
        f"path = name({60 if each == 'executable' else 4}) if {good_name} else {each!r}\n"
        f"os.chdir('new')\n{THINGS[each]}\nos.chdir('..')"
        for each in THINGS
    )
    code += f"\nfor each in ('null', 'zero'): os.rename('tmp/' + each, 'new/' + (name(4) if {good_name} else each))"
    with system.running():
        attack(system, code)
        count = len(THINGS) + 2
        # A directory that belongs to another can be moved by him alone, unless he has opened it to everyone.
        system.wait(lambda: len(corrupt(system)) == count - 1, "they are put aside")
        all_is_well(system)
        (left,) = (drop(system) / "new").iterdir()
        assert left.is_dir() and system.json("status")["corrupt"] == count - 1
        kinds = Counter(stat.S_IFMT(path.lstat().st_mode) for path in corrupt(system))
        assert kinds == {
            stat.S_IFLNK: 2, stat.S_IFIFO: 1, stat.S_IFSOCK: 1, stat.S_IFDIR: 1, stat.S_IFREG: 3, stat.S_IFCHR: 2,
        }  # fmt: skip
        # It can be told, and mended by root.
        assert system.log().count("left in new/") == 1


def test_spool_full_directories(system: System) -> None:
    """Directories with something in them, and one that is 1,500 deep, stay and are said once; so they do at the next start."""
    code = """
for number in range(3):
    path = "new/" + name(4096)
    os.mkdir(path)
    put(path + "/file", b"x")
os.chdir("new")
for _ in range(1500):
    os.mkdir("d")
    os.chdir("d")
"""
    with system.running():
        attack(system, code)
        all_is_well(system)
        assert system.log().count("left in new/") == 4
        begin = time.monotonic()
        assert system.stop() == 0
        system.start()
        assert time.monotonic() - begin < 10
        all_is_well(system)
        assert len(list((drop(system) / "new").iterdir())) == 4
    # Deeper than a path can be long.
    subprocess.run(["rm", "-rf", drop(system)], check=True)


def test_spool_customer_in_a_directory_that_was_put_aside(system: System) -> None:
    """Who is in a directory while it is moved to corrupt/ finds nothing there but what is his."""
    code = """
os.mkdir("new/open")
os.chmod("new/open", 0o777)
# Before it is rung for, or it may be gone.
inside = os.open("new/open", os.O_RDONLY)
ring()
os.fchdir(inside)
print("there")
sys.stdin.readline()
seen = []
for way in (lambda: os.listdir(".."), lambda: open("../x", "x"), lambda: os.listdir("../../hold"), lambda: os.mkdir("../y")):
    try:
        seen.append(way())
    except OSError:
        pass
for other in sys.stdin.read().split():
    try:
        seen.append(open("../../" + other, "rb"))
    except OSError:
        pass
sys.exit(len(seen))
"""
    with system.running(), attacking(system, code) as process:
        system.wait(lambda: len(corrupt(system)) == 1, "it is put aside", 45)
        all_is_well(system)
        assert process.stdin is not None
        (held,) = system.held()
        process.stdin.write(f"\nhold/{held}\n".encode())


def test_spool_sparse_file(system: System) -> None:
    """A file of 8 TB without a byte on the disk is not read, and stays, said once."""
    code = """
path = "new/" + name(8 << 40)
put(path, b"")
os.truncate(path, 8 << 40)
put("new/" + name(100), b"")
"""
    with system.running():
        attack(system, code)
        all_is_well(system)
        assert of_process(system.pid)[1] < 200 << 20
        assert sorted(path.stat().st_size for path in (drop(system) / "new").iterdir()) == [0, 8 << 40]


def test_spool_files_of_others_renamed_in(system: System) -> None:
    """A file that root has made in a customer's directory does not become root's mail: the spool is a border."""
    home = system.directory / "home"
    home.mkdir()
    os.chown(home, system.uids["c1"], system.uids["c1"])
    # Root writes a log of the customer's into a directory of the customer's; in the spool, too, if he has found one there.
    code = """
for place, target in ((sys.argv[2], "new/"), ("tmp/d", "new/")):
    for how in (os.rename, os.link):
        try:
            source = f"{place}/{how.__name__}.log"
            how(source, target + name(os.stat(source).st_size))
            print(place, how.__name__)
        except OSError as error:
            print(place, error.strerror)
"""
    attack(system, "os.mkdir('tmp/d')")
    maker = "for place in sys.argv[2:]:\n  for file in ('rename', 'link'): put(f'{place}/{file}.log', mail('of root'))"
    attack(system, maker, str(home), "tmp/d", user="root")
    # And out: into his own directory, where he could do as he likes with what another has written.
    attack(system, "put('tmp/mine', b'x')")
    out = "try: os.rename('tmp/d', sys.argv[2] + '/d')\nexcept OSError as error: print(error.strerror)"
    with system.running():
        assert attack(system, code, str(home)).splitlines()[:2] == [f"{home} Invalid cross-device link"] * 2
        assert attack(system, out, str(home)) == "Invalid cross-device link\n"
        wait_for_outcome(system, 1)
        all_is_well(system)
        # What root himself has written in the spool is root's.
        assert of_c1(system) == [("held", "of root")]
        assert [row["verified"] for row in system.rows("held") if row["vhost"] == C1] == [0]


def test_spool_lease_and_slow_writer(system: System) -> None:
    """A file with a lease, and one that is still being written, wait without anybody waiting for them; then they are sent."""
    code = """
leased, slow = mail("leased"), mail("slow")
first = "new/" + name(len(leased))
put(first, leased)
fd = os.open(first, os.O_RDWR)
import signal
signal.signal(signal.SIGIO, signal.SIG_IGN)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
second = open("new/" + name(len(slow)), "xb", buffering=0)
os.fchmod(second.fileno(), 0o640)
second.write(slow[:60])
ring()
print("there")
sys.stdin.read()
second.write(slow[60:])
"""
    with attacking(system, code):
        system.start()
        all_is_well(system)
        assert (of_c1(system), len(corrupt(system))) == ([], 0)
        assert system.log().count("left in new/") == 2
    assert system.stop() == 0
    with system.running():
        wait_for_outcome(system, 2)
        all_is_well(system)
        assert sorted(of_c1(system)) == [("released", "leased"), ("released", "slow")]


def test_spool_times_that_are_set(system: System) -> None:
    """Files of 1970 and 2099, by name and by time, come in the order of their names, and arrive now; no window is moved."""
    code = """
for subject, second, stamp in (("2099", 4070908800, 4070908800), ("1970", 0, 0), ("now", 1795376167, 0)):
    content = mail(subject)
    path = "new/" + name(len(content), second)
    put(path, content)
    os.utime(path, (stamp, stamp))
"""
    attack(system, code)
    with system.running():
        wait_for_outcome(system, 3)
        all_is_well(system)
        assert [name for _, name in of_c1(system)] == ["1970", "now", "2099"]
        arrived = {row["arrived_at"][:4] for row in system.rows("released") if row["vhost"] == C1}
        assert arrived == {time.strftime("%Y", time.gmtime())}


NAMES = (
    "b'a\\nb', b'a..,S=4', b'-rf', b'\\xff\\xfe', b'x' * 255, b'\\x1b[31m', good + b'\\n', good[:-1] + b'9' * 30, "
    "good.replace(b',S=', b',S=-'), good.replace(b',S=', b',S=0x'), b'$(id)', b'0660E2E85F2C029E9'"
)


def test_spool_names(system: System) -> None:
    """Names with line ends, `..`, bytes that are no UTF-8, 255 bytes or a leading dash are put aside under a name of ours."""
    code = f"""
good = name(4).encode()
names = [{NAMES}]
for each in names:
    put(b"new/" + each, b"junk")
put("new/.hidden", b"junk")
put("new/...", b"junk")
put("new/..,S=4", b"junk")
print(len(names))
"""
    with system.running():
        count = int(attack(system, code))
        system.wait(lambda: len(corrupt(system)) == count, "all are put aside", 45)
        all_is_well(system)
        assert sorted(path.name for path in (drop(system) / "new").iterdir()) == ["..,S=4", "...", ".hidden"]
        assert all(path.name.isalnum() and len(path.name) == 17 for path in corrupt(system))
        assert not {"\x1b", "\udcff"} & set(system.log())


def test_spool_name_used_again(system: System) -> None:
    """A name whose message has its outcome stands for another message as soon as another file has it, the same bytes or not."""
    code = """
content = mail(sys.argv[2])
put("new/1795376167.000000.P1." + "a" * 24 + f",S={len(content)}", content)
"""
    with system.running():
        for number, word in enumerate(("one", "two", "two")):
            attack(system, code, word)
            wait_for_outcome(system, number + 1)
            system.wait(lambda: not list((drop(system) / "new").iterdir()), "it has left new/")
        all_is_well(system)
        assert Counter(of_c1(system))["released", "one"] == 1 and Counter(of_c1(system))["released", "two"] == 2
        assert len({row["queue_id"] for row in system.rows("released")}) == len(system.rows("released"))


def test_spool_file_that_cannot_be_removed(system: System) -> None:
    """A file that the releaser may not unlink is sent once, also over a restart, and is removed when that can be done."""
    attack(system, "content = mail('once')\nput('new/' + name(len(content)), content)")
    (path,) = (drop(system) / "new").iterdir()
    subprocess.run(["chattr", "+i", path], check=True)
    try:
        with system.running():
            wait_for_outcome(system, 1)
            all_is_well(system)
        with system.running():
            all_is_well(system)
            assert of_c1(system) == [("released", "once")] and path.exists()
            assert system.log().count("cannot be removed") >= 1
    finally:
        subprocess.run(["chattr", "-i", path], check=True)
    with system.running():
        system.wait(lambda: not path.exists(), "it is removed")
        all_is_well(system)
        assert of_c1(system) == [("released", "once")]


def test_spool_junk(system: System) -> None:
    """100,000 files that are no messages keep another vhost's mail no longer than one."""
    with system.running():
        attack(system, "for number in range(100_000): put(f'new/junk{number}', b'')")
        for number in range(5):
            begin = time.monotonic()
            system.submit(C2, "c2", f"beside {number}")
            system.wait(lambda found=f"beside {number}": found in system.subjects(), "another vhost's mail is out")
            assert time.monotonic() - begin < AT_ONCE
        system.wait(lambda: not list((drop(system) / "new").iterdir()), "all are put aside", 300)
        all_is_well(system)
        assert system.json("status")["corrupt"] == 100_000


def test_spool_files_that_change_while_they_are_read(system: System) -> None:
    """Files that grow and shrink all the time are whole messages or wait; when they stop, each has been sent once."""
    code = """
content = {number: mail(f"mail {number}", "x" * 79 + "\\n" + ("y" * 79 + "\\n") * 9000) for number in range(12)}
files = []
for each in content.values():
    file = open("new/" + name(len(each)), "xb", buffering=0)
    os.fchmod(file.fileno(), 0o640)
    file.write(each)
    files.append((file, each))
ring()
print("there")
until = time.monotonic() + 2
while time.monotonic() < until:
    for file, each in files:
        os.ftruncate(file.fileno(), len(each) // 2)
        os.pwrite(file.fileno(), b"z" * 4096, len(each))
        os.pwrite(file.fileno(), each, 0)
        os.ftruncate(file.fileno(), len(each))
sys.stdin.read()
"""
    system.start()
    with attacking(system, code):
        all_is_well(system)
        time.sleep(1)
    assert system.stop() == 0
    with system.running():
        wait_for_outcome(system, 12)
        all_is_well(system)
        assert Counter(of_c1(system)) == {("released", f"mail {number}"): 1 for number in range(12)}
        for path in system.mail():
            if b"Subject: mail " in path.read_bytes():
                assert path.read_bytes().count(b"y" * 79 + b"\n") + path.read_bytes().count(b"\0") > 0


def test_spool_shared_maildrop(system: System) -> None:
    """In the maildrop that all share a customer can neither list the others' mail nor take it away, nor make one's his own."""
    system.cli("vhost", "add", "--unregistered")
    system.submit("www.nobody.example", "12345", "another's")
    code = """
seen = []
for way in (
    lambda: os.listdir("new"), lambda: open(sys.argv[2], "rb").read(), lambda: os.unlink(sys.argv[2]),
    lambda: os.rename(sys.argv[2], "new/x"), lambda: os.link(sys.argv[2], "new/x"), lambda: os.chmod(sys.argv[2], 0o666),
    lambda: os.rename("new", "gone"), lambda: os.unlink("policy"), lambda: put("x", b"x"),
):
    try:
        seen.append(way())
    except OSError:
        pass
print(len(seen))
"""
    (path,) = (drop(system, UNREGISTERED) / "new").iterdir()
    for place in (UNREGISTERED, C2):
        run = system.run(PYTHON, "-c", TOOLS + code, drop(system, place), path, user="c1")
        assert run.stdout in ("0\n", "") and (run.returncode == 0) == (place == UNREGISTERED)
    with system.running():
        system.wait(lambda: "another's" in system.subjects(), "it is sent")
        all_is_well(system)
