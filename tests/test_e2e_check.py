"""`check` names every damage in words that say what to do, `check --repair` mends what root can, and mail goes on."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from host import Host
from mariadb import PASSWORD, MariaDB
from system import DAEMON, SHARED, System
from test_e2e_room import small

from releaser.cli import filesystem

pytestmark = pytest.mark.server

C1, C2, BOTH = "www.c1.example", "www.c2.example", "www.both.example"
GARBAGE = "0660E2E85F2C029E9"
HELD = b"""\
Layout: 1
Vhost: www.a.example
Sender: user@a.example
Recipient: one@x.example
Arrived: 2026-11-22T19:36:07.011099Z
Picked-Up: 2026-11-22T19:36:07.011099Z

To: one@x.example

Text.
"""
REPAIR = "run: secure-sendmail check --repair"


@pytest.fixture
def system() -> Iterator[System]:
    """One vhost by a group, one by an access control list, one mail held; the releaser does not run."""
    with System(default=["1/1h"]) as made:
        made.register(C1, "c1")
        made.register(BOTH, "c2", "c1")
        for subject in ("sent", "held"):
            made.submit(C1, "c1", subject)
        made.releaser("--once")
        yield made


def found(system: Host, *words: str) -> dict[str, list[str]]:
    """What `check` finds; its exit status says whether that are problems, and nothing else is printed."""
    run = system.cli("check", *words, "--json", check=False)
    assert run.stderr == ""
    said: dict[str, list[str]] = json.loads(run.stdout)
    assert run.returncode == (1 if said["problems"] else 0)
    assert "[Errno" not in run.stdout
    return said


def bell(system: System, vhost: str) -> Path:
    (line,) = [line for line in (system.spool / f"vhosts/{vhost}/policy").read_text().splitlines() if line.startswith("Bell: ")]
    return system.spool / "wake" / line.removeprefix("Bell: ")


def vhost_file(system: System, vhost: str) -> Path:
    return system.config.parent / f"vhosts.d/{vhost}.toml"


def acl(system: System, path: Path) -> list[str]:
    run = system.run("getfacl", "-cEp", path)
    return [entry for entry in run.stdout.split() if entry.startswith("user:")]


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    make(path)


def test_everything_is_in_order(system: System) -> None:
    """Root and the releaser's own user find nothing to repair, and --repair changes nothing."""
    for user in ("root", DAEMON):
        run = system.cli("check", user=user)
        assert "problem" not in run.stdout and "nothing needs repair" in run.stdout, run.stdout
    assert found(system)["problems"] == []
    said = found(system, "--repair")
    assert (said["problems"], said["mended"]) == ([], [])
    assert len(system.held()) == 1


def test_what_is_mended(system: System) -> None:
    """Each damage is named with what is wrong and how to mend it, then mended, and what was wrong is said again."""
    drop, spool, state = system.spool / "vhosts" / C1, system.spool, system.state
    wake = spool / "wake"
    c1 = system.uids["c1"]
    # What it is called, what is done, and what has to be said of it.
    damages: list[tuple[Callable[[], object], str]] = [
        (lambda: drop.chmod(0o777), f"{drop}: mode 0777, must be 2710"),
        (lambda: os.chown(drop, 0, 0), f"{drop}: belongs to root:root, must belong to {DAEMON}:c1"),
        (lambda: os.chown(drop / "new", c1, c1), f"{drop}/new: belongs to c1:c1, must belong to {DAEMON}:{DAEMON}"),
        (lambda: (drop / "tmp").rmdir(), f"{drop}/tmp: "),
        (lambda: (drop / "policy").write_text("nothing"), f"{drop}/policy: name"),
        (lambda: (drop / "policy").unlink(), f"{drop}/policy: name"),
        (lambda: bell(system, C1).unlink(), "wake/"),
        (lambda: bell(system, C1).chmod(0o666), "mode 0666, must be 0620"),
        (lambda: os.chown(bell(system, C1), 0, 0), f"belongs to root:root, must belong to {DAEMON}:c1"),
        (lambda: system.run("setfacl", "-m", "u:www-data:x", drop), f"lets in {SHARED} (1)"),
        (lambda: system.run("setfacl", "-x", "u:c1", bell(system, BOTH)), "must let in c1 (2), c2 (2)"),
        (lambda: system.run("setfacl", "-b", spool / "vhosts" / BOTH), "must let in c1 (1), c2 (1)"),
        (lambda: (wake / "control").unlink(), f"{wake}/control: "),
        (lambda: shutil.rmtree(wake), f"{wake}: "),
        (lambda: (spool / "failed").rmdir(), f"{spool}/failed: "),
        (lambda: spool.chmod(0o777), f"{spool}: mode 0777, must be 0711"),
        (lambda: spool.chmod(0o700), f"{spool}: mode 0700, must be 0711"),
        (lambda: os.chown(spool, c1, c1), f"{spool}: belongs to c1:c1, must belong to root:root"),
        (lambda: os.chown(spool, system.uids[DAEMON], 0), f"{spool}: belongs to {DAEMON}:root, must belong to root:root"),
        (lambda: os.chown(state, 0, 0), f"{state}: belongs to root:root, must belong to {DAEMON}:{DAEMON}"),
        (lambda: os.chown(state, c1, c1), f"{state}: belongs to c1:c1, must belong to {DAEMON}:{DAEMON}"),
        (lambda: state.chmod(0o755), f"{state}: mode 0755, must be 0700"),
        (lambda: shutil.rmtree(spool / "vhosts" / BOTH), f"{spool}/vhosts/{BOTH}: "),
        (lambda: [path.unlink() for path in state.iterdir()], "ledger"),
    ]
    for number, (damage, words) in enumerate(damages):
        damage()
        said = found(system)
        (problem,) = [each for each in said["problems"] if words in each] or [str(said)]
        assert words in problem and REPAIR in problem, (number, said)
        said = found(system, "--repair")
        assert said["problems"] == [] and any(words in each for each in said["mended"]), (number, said)
        said = found(system)
        assert (said["problems"], said["mended"]) == ([], []), (number, said)
    assert acl(system, bell(system, BOTH)) == ["user::rw-", "user:c1:-w-", "user:c2:-w-"]
    assert len(system.held()) == 1
    with system.running():
        system.submit(C1, "c1", "after")
        system.wait(lambda: len(system.held()) == 1 and "after" in system.subjects(), "it is taken")


def test_what_a_person_has_to_mend(system: System) -> None:
    """What root must not touch, or would have to guess, is one clear sentence each, before and after --repair."""
    drop, spool, state = system.spool / "vhosts" / C1, system.spool, system.state
    (held,) = system.held()
    kept = system.directory / "kept"
    policy = (drop / "policy").read_bytes()
    away = "move it away, and run: secure-sendmail check --repair"
    mail = f"run: chown -h {DAEMON}: {spool}/hold/{held}"
    file = vhost_file(system, C1)
    daemon = system.uids[DAEMON]

    def restore_policy(path: Path) -> None:
        path.write_bytes(policy)
        os.chown(path, daemon, daemon)
        path.chmod(0o644)

    def restore_mode(path: Path, mode: int) -> Callable[[], None]:
        return lambda: path.chmod(mode)

    def rename_back() -> None:
        (drop.unlink if drop.is_symlink() else drop.rmdir)()
        kept.rename(drop)

    # The damage, what is said of it, and what a person does about it.
    damages: list[tuple[Callable[[], object], str, Callable[[], object]]] = [
        (lambda: os.chown(spool / "hold" / held, 0, 0), f"hold/{held}: belongs to root, must belong to {DAEMON}; {mail}",
         lambda: os.chown(spool / "hold" / held, daemon, daemon)),
        (lambda: os.chown(state / "ledger.sqlite", 0, 0), f"{state}/ledger.sqlite: belongs to root, must belong to {DAEMON}; ",
         lambda: os.chown(state / "ledger.sqlite", daemon, daemon)),
        (lambda: (spool / "hold" / GARBAGE).write_text("garbage") and os.chown(spool / "hold" / GARBAGE, daemon, daemon),
         f"hold/{GARBAGE}: cannot be read (", lambda: (spool / "hold" / GARBAGE).unlink()),
        (lambda: replaced(drop / "policy", Path.mkdir), f"{drop}/policy: is no regular file; {away}",
         lambda: replaced(drop / "policy", restore_policy)),
        (lambda: replaced(bell(system, C1), Path.touch), f"is no FIFO; {away}", lambda: bell(system, C1).unlink()),
        (lambda: replaced(drop / "new", Path.touch), f"{drop}/new: is no directory; {away}", lambda: (drop / "new").unlink()),
        (lambda: replaced(spool / "wake", Path.touch), f"{spool}/wake: is no directory; {away}",
         lambda: (spool / "wake").unlink()),
        (lambda: (drop.rename(kept), drop.symlink_to(kept)), f"{drop}: is no directory; {away}", rename_back),
        (lambda: file.rename(kept), f'{file}: names no users, all mail of {C1} is held; write users = ["NAME"] into it',
         lambda: kept.rename(file)),
        (lambda: file.write_text('users = ["nobody-of-that-name"]'), f"{file}: there is no user 'nobody-of-that-name'; edit it",
         lambda: file.write_text('users = ["c1"]')),
        (lambda: os.link(file, vhost_file(system, C2)), f"{vhost_file(system, C2)}: left by a rename from or to {C1}",
         lambda: vhost_file(system, C2).unlink()),
        (lambda: file.chmod(0o600), f"{file}: Permission denied", restore_mode(file, 0o640)),
        (lambda: system.config.chmod(0o600), f"run: chown root:{DAEMON} {system.config} && chmod 0640 {system.config}",
         restore_mode(system.config, 0o640)),
        (lambda: file.parent.chmod(0o700), f"run: chown root:{DAEMON} {file.parent} && chmod 0750 {file.parent}",
         restore_mode(file.parent, 0o750)),
    ]  # fmt: skip
    for number, (damage, words, mended_by) in enumerate(damages):
        damage()
        for options in ((), ("--repair",)):
            said = found(system, *options)
            assert len(said["problems"]) == 1 and words in said["problems"][0], (number, options, said)
            assert said["mended"] == [], (number, said)
            # A problem hides no warning.
            assert "the releaser is not running: mail waits in the maildrops" in said["warnings"]
        mended_by()
        assert found(system, "--repair")["problems"] == [], number
        assert found(system)["problems"] == [], number
    assert len(system.held()) == 1


def test_ledger_that_is_none(system: System) -> None:
    """It is moved away by a person, and a new one is made from the held files."""
    (held,) = system.held()
    path = system.state / "ledger.sqlite"
    for name in ("-wal", "-shm"):
        (system.state / f"ledger.sqlite{name}").unlink(missing_ok=True)
    path.write_bytes(b"garbage" * 1000)
    for options in ((), ("--repair",)):
        (problem,) = found(system, *options)["problems"]
        assert problem.startswith(f"{path}: file is not a database; move it away, and {REPAIR}, which makes a new one"), problem
    path.unlink()
    said = found(system, "--repair")
    assert said["problems"] == [] and f"ledger made: {path}" in said["mended"]
    assert any(each.startswith(f"hold/{held}: not in the ledger") for each in said["mended"])
    assert system.held() == [held]


def test_closed_spool_is_said_once(system: System) -> None:
    """Behind a directory that is closed nothing is looked at, which is said, and not of each thing that lies there."""
    system.spool.chmod(0o700)
    assert [each.partition(";")[0] for each in found(system)["problems"]] == [
        f"{system.spool}: mode 0700, must be 0711",
        f"{system.spool}: what lies in it is not looked at",
    ]


def test_users_may_change(system: System) -> None:
    """Where the users of a vhost change, --repair lets in the new ones, and no others, at the gate and at the bell."""
    file, drop = vhost_file(system, C1), system.spool / "vhosts" / C1
    for users, admitted in ((["c1", "c2"], {"c1", "c2"}), (["c2"], {"c2"}), (["c2", "c1"], {"c1", "c2"}), (["c1"], {"c1"})):
        file.write_text(f"users = {json.dumps(users)}\n")
        assert len(found(system)["problems"]) == 2
        assert len(found(system, "--repair")["mended"]) == 2
        assert found(system)["problems"] == []
        for user in ("c1", "c2", SHARED):
            ring = ("python3", "-c", "import os, sys; os.utime(sys.argv[1])", str(bell(system, C1)))
            may = (system.run("test", "-x", drop, user=user).returncode, system.run(*ring, user=user).returncode)
            assert may == ((0, 0) if user in admitted else (1, 1)), (users, user)


def test_gates_of_any_form_are_in_order() -> None:
    """Whatever group `vhost add` is given, `check` finds the gate that it has made right; and who is no customer is refused."""
    with System(members={"c2": [SHARED], "both": ["c1", "c2"]}) as system:
        forms = ((["c1"], ""), (["c1"], "c2"), (["c1"], "nogroup"), (["c1", "c2"], "both"), (["c2", "c1"], ""), (["c2"], "12345"))
        for number, (users, group) in enumerate(forms):
            system.register(f"www.form{number}.example", *users, group=group)
        assert found(system)["problems"] == []
        for users, group in (([DAEMON], ""), (["root"], ""), (["c1"], "4294967295"), (["c1"], "١٢"), (["c1"], "none")):
            words = [word for user in users for word in ("--user", user)]
            run = system.cli("vhost", "add", C1, *words, *(["--group", group] if group else []), check=False)
            assert run.returncode == 1 and "Traceback" not in run.stderr, run


def test_warnings(system: System) -> None:
    """What is left over, and an MTA that is not there, is said, and needs no repair."""
    (system.spool / "vhosts/.www.c9.example.new").mkdir()
    (system.spool / "vhosts/strange name").touch()
    os.mkfifo(system.spool / "wake" / ("0" * 32))
    system.configure(mta="sendmail:/usr/sbin/not-there")
    for options in ((), ("--repair",)):
        said = found(system, *options)
        assert said["problems"] == []
        for words in ("vhosts/.www.c9.example.new: left", "vhosts/strange name: no vhost's", f"wake/{'0' * 32}: no vhost's",
                      "sendmail:/usr/sbin/not-there: there is no such program"):  # fmt: skip
            assert any(words in each for each in said["warnings"]), (words, said)


def test_spool_that_is_no_mount_is_said(system: System) -> None:
    """On a file system that it shares, a customer could rename another's file into a maildrop, and be that other."""
    words = "no mount of its own"
    assert not any(words in each for each in found(system)["warnings"])
    with System(spool_is_there=False) as shared:
        shared.register(C1, "c1")
        assert any(each.startswith(f"{shared.spool}: {words}") for each in found(shared)["warnings"])


def test_place_of_the_spool_is_judged(system: System, tmp_path: Path) -> None:
    """That the disk of the system, and of MySQL's data, is shared is said, and that no customer has a quota there."""
    at_first = "\n".join(found(system)["warnings"])
    assert f"{system.spool}: on the file system of /" in at_first and f"{system.spool}: its file system has no quotas" in at_first
    assert "mysql" not in at_first.lower()
    password = tmp_path / "password"
    password.write_text(PASSWORD)
    password.chmod(0o600)
    with MariaDB() as server, Host() as host:
        section = f'[mysql]\nhost = "127.0.0.1"\nport = {server.port}\npassword_file = "{password}"\n'
        host.configure(extra=section)
        host.add(C1)
        said = "\n".join(found(host)["warnings"])
        assert f"{host.spool}: on the file system of MySQL's data, {server.data}" in said
        assert "run: secure-sendmail log init" in said
        # What one user owns alone is a trial: nobody else can fill it.
        assert "file system of /" not in said and "quotas" not in said
        shutil.rmtree(host.spool)
        with small(host.spool):
            host.add(C1)
            assert "file system" not in "\n".join(found(host)["warnings"])
        server.stop()
        (said,) = [each for each in found(host)["warnings"] if "[mysql]" in each]
        assert "the log waits in the ledger" in said


MOUNTS = """\
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 27 8:1 / /srv rw,relatime - xfs /dev/sda1 rw,attr2,inode64,noquota
31 27 8:2 / /srv/mail\\040spool rw - ext4 /dev/sda2 rw,quota,usrquota,data=ordered
32 27 0:40 / /srv/pool rw - btrfs /dev/sdb rw,subvol=/
33 31 8:2 /x /srv/mail\\040spool/x rw - tmpfs none rw,size=4m
"""


@pytest.mark.parametrize(("path", "point", "quota"), [
    ("/var/spool", "/", False), ("/srv", "/srv", False), ("/srv/mail", "/srv", False),
    ("/srv/mail spool", "/srv/mail spool", True), ("/srv/mail spool/y", "/srv/mail spool", True),
    ("/srv/mail spool/x", "/srv/mail spool/x", False),
])  # fmt: skip
def test_mount_of_a_path(path: str, point: str, quota: bool) -> None:
    """The one whose mount point is nearest above, and its options, as the kernel writes them."""
    mount = filesystem._mount_of(path, MOUNTS)
    assert (mount.point, bool(mount.options & filesystem.QUOTAS)) == (point, quota)


def test_repair_rings(system: System) -> None:
    """The releaser looks at once: the bells may be new ones."""
    control = system.spool / "wake/control"
    os.utime(control, (0, 0))
    found(system)
    assert control.stat().st_mtime == 0
    found(system, "--repair")
    assert control.stat().st_mtime != 0


def test_private_mode() -> None:
    """What one uid owns is judged and mended as that uid's; while another has the lock, that is a problem, and said."""
    with Host() as host:
        host.add("www.a.example")
        drop = host.spool / "vhosts/www.a.example"
        assert found(host)["problems"] == []
        for path, mode in ((host.spool, 0o755), (host.state, 0o755), (drop, 0o711), (drop / "new", 0o777)):
            path.chmod(mode)
            assert [each for each in found(host)["problems"] if f"mode {mode:04o}, must be 0700" in each]
            assert len(found(host, "--repair")["mended"]) == 1
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
        shutil.rmtree(host.spool / "wake")
        assert found(host, "--repair")["problems"] == [] and found(host)["problems"] == []
        (host.state / "ledger.sqlite").rename(host.directory / "ledger")
        for name in ("hold", "trash"):
            (host.spool / name / GARBAGE).write_bytes(HELD)
        locked = os.open(host.state, os.O_RDONLY)
        fcntl.flock(locked, fcntl.LOCK_EX)
        said = found(host, "--repair")
        assert any("another releaser works on" in each for each in said["problems"])
        os.close(locked)
        (host.spool / "trash" / GARBAGE).unlink()
        assert found(host, "--repair")["problems"] == []
        assert host.held() == [GARBAGE]


def test_private_mode_of_a_customer() -> None:
    """A user's own spool is his, without an account for the releaser."""
    with System(spool_is_there=False) as system:
        home = system.directory / "home"
        home.mkdir()
        (home / "releaser.toml").write_text(f'spool = "{home}/spool"\nstate = "{home}/state"\n[mta]\nurl = "maildir:{home}/m"\n')
        for path in (home, home / "releaser.toml"):
            os.chown(path, system.uids["c1"], system.uids["c1"])
        command = [system.programs / "secure-sendmail", "--config", home / "releaser.toml"]
        assert system.run(*command, "vhost", "add", C1, user="c1").returncode == 0
        (home / "spool/wake").chmod(0o755)
        assert system.run(*command, "check", user="c1").returncode == 1
        run = system.run(*command, "check", "--repair", user="c1")
        assert run.returncode == 0 and "wake: mode 0755, must be 0700" in run.stdout, run
