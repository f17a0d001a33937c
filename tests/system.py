"""A host with accounts for the end-to-end tests: root's spool, customers with uids of their own, and an administrator.

The accounts exist in a mount namespace only, never on this machine; everything in it runs in a pid namespace whose first
process reads from the test run, so that whatever a System starts ends with it, also where the test run is killed.
Needs root.
"""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import subprocess
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from host import PATIENCE, ROOT, Host, text

# Debian's own, with Debian's own libraries. The one of .venv may lie in a home directory that customers cannot enter.
PYTHON = "/usr/bin/python3"

DAEMON = "secure-sendmail"
CUSTOMERS = ("c1", "c2")
ADMINISTRATOR = "alice"
# Where Debian's Apache runs.
SHARED = "www-data"

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Ends at the end of its input, which is the end of the test run, however that ends. $1 is the script of the first
# process inside, $2 the directory.
NAMESPACE = 'unshare --mount --pid --fork --propagation private /bin/sh -c "$1" init "$2"; rm -rf -- "$2"'

# The first process in the namespaces, with whose end the kernel kills all others. $1 is the directory. It says its number
# outside, which the /proc of outside knows.
INIT = """set -e
read -r pid _ < /proc/self/stat
mount -t proc proc /proc
for file in passwd group shadow gshadow sudoers; do
    mount --bind "$1/accounts/$file" "/etc/$file"
done
if [ -d "$1/spool" ]; then
    mount --bind "$1/spool" "$1/spool"
    mount -o remount,bind,nosuid,nodev,noexec "$1/spool"
fi
echo "$pid"
read -r _
"""

COMMAND_SCRIPT = """#!{python} -Is
import sys

sys.path.insert(0, "{library}")
from {module} import main

main()
"""

SUDOERS = f"""Defaults env_reset
Defaults secure_path="{PATH}"
root ALL=(ALL:ALL) ALL
{ADMINISTRATOR} ALL=(ALL:ALL) NOPASSWD: ALL
"""


class System(Host):
    """An installation as a package makes it; `vhost add` has still to be run. Its commands run as root unless told otherwise.

    `spool_is_there`: SPOOL exists as a mount of its own, as on a real host; else `vhost add` makes it. `members` are the
    further members of our accounts' groups, and of groups of their own: {"c2": ["www-data"]} is what some panels do.
    """

    def __init__(
        self,
        mta: str = "",
        default: Sequence[str] = ("unlimited",),
        extra: str = "",
        spool_is_there: bool = True,
        members: dict[str, list[str]] | None = None,
    ) -> None:
        self.uids: dict[str, int] = {}
        super().__init__(mta, default, extra)
        self.programs = self.directory / "bin"
        self.logs = self.directory / "log"
        self.error_log = self.logs / "error.log"
        self._install()
        self.uids = self._make_accounts(members or {})
        # Root's, and for the daemon's group to read; there can be a password in it.
        (self.config.parent / "vhosts.d").mkdir()
        for path in (self.config.parent, self.config.parent / "vhosts.d", self.config):
            os.chown(path, 0, self.uids[DAEMON])
            path.chmod(0o750 if path.is_dir() else 0o640)
        # Where the daemon itself may make files, as it may below /var/log/php-secure-sendmail.
        for directory in (self.logs, self.maildir):
            directory.mkdir(mode=0o755)
            os.chown(directory, self.uids[DAEMON], self.uids[DAEMON])
        if spool_is_there:
            self.spool.mkdir(mode=0o711)
        self._init = self._make_namespace()

    def write(self, toml: str) -> None:
        super().write(toml)
        if self.uids:
            os.chown(self.config, 0, self.uids[DAEMON])
            self.config.chmod(0o640)

    # Whatever runs on it.

    def words(self, command: Sequence[str | Path], user: str = "root", cwd: str | Path = "/") -> list[str]:
        """The command line that runs a command in there as a user with his groups; a number is a uid without account."""
        namespaces = [
            f"--{name}=/proc/{self._init}/{file}" for name, file in (("mount", "ns/mnt"), ("pid", "ns/pid"), ("root", "root"))
        ]
        enter = ["nsenter", *namespaces, "--", "env", "-C", str(cwd)]
        if user.isdigit():
            become = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", "--"]
        else:
            # A user's private group has his name.
            become = ["setpriv", "--reuid", user, "--regid", user, "--init-groups", "--"]
        return [*enter, *([] if user == "root" else become), *map(str, command)]

    def run(self, *command: str | Path, user: str = "root", **options: Any) -> subprocess.CompletedProcess[Any]:
        """Runs a command in there, in directory `cwd`; the other options are Popen's."""
        if "input" not in options:
            options.setdefault("stdin", subprocess.DEVNULL)
        if "stdout" not in options:
            options["capture_output"] = True
        options = {"text": True, "timeout": 60, "env": {"PATH": PATH, "LANG": "C.UTF-8"}, **options}
        return subprocess.run(self.words(command, user, options.pop("cwd", "/")), **options)

    def cli(self, *words: str, check: bool = True, user: str = "root", **options: Any) -> subprocess.CompletedProcess[Any]:
        run = self.run(self.programs / "secure-sendmail", "--config", self.config, *words, user=user, **options)
        if check:
            assert run.returncode == 0, f"{words} ended with {run.returncode}: {run.stdout}{run.stderr}"
        return run

    def sudo(self, *words: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[Any]:
        """The administrator's command as she types it."""
        command = ["sudo", "-n", str(self.programs / "secure-sendmail"), "--config", str(self.config)]
        run = self.run(*command, *words, user=ADMINISTRATOR, **options)
        if check:
            assert run.returncode == 0, f"{words} ended with {run.returncode}: {run.stdout}{run.stderr}"
        return run

    def python(self, code: str, *words: str | Path, user: str, **options: Any) -> str:
        """What a program prints that a user has written, with the shortest way to the kernel; it must end in good order."""
        run = self.run(PYTHON, "-c", code, *words, user=user, **options)
        assert run.returncode == 0, run.stderr
        return str(run.stdout)

    def register(self, vhost: str, *users: str, group: str = "") -> None:
        """`vhost add` with these users."""
        words = [word for user in users for word in ("--user", user)]
        self.cli("vhost", "add", vhost, *words, *(["--group", group] if group else []))

    def enqueue(
        self, vhost: str, *words: str | bytes, message: bytes | None = None, user: str = "c1", **options: Any
    ) -> subprocess.CompletedProcess[bytes]:
        command = [str(self.programs / "secure-sendmail-enqueue"), "--spool", str(self.spool), vhost, *map(os.fsdecode, words)]
        message = text("one@x.example") if message is None else message
        return self.run(*command, user=user, input=message, text=False, **options)

    def send(self, vhost: str, *words: str, message: bytes | None = None, user: str = "c1") -> None:
        run = self.enqueue(vhost, *words, message=message, user=user)
        # All that comes through the shared maildrop is told of that one, too.
        told = tuple(f"] [secure-sendmail] domain {name}: exceeded" for name in (vhost, "_unregistered"))
        warned = all(any(words in line for words in told) for line in run.stderr.decode().splitlines())
        assert (run.returncode, run.stdout, warned) == (0, b"", True), run.stderr

    def submit(self, vhost: str, user: str, subject: str = "subject") -> None:
        """send() for the tests that only tell messages apart."""
        self.send(vhost, "-t", message=text("one@x.example", subject=subject), user=user)

    def sendmail_path(self, vhost: str, *words: str) -> str:
        return " ".join([str(self.programs / "secure-sendmail-enqueue"), "--spool", str(self.spool), vhost, *words])

    # The releaser.

    def launch(self, user: str = "root") -> subprocess.Popen[bytes]:
        assert not self._processes, "the releaser is started already"
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                self.words([self.programs / "secure-sendmail-releaser", "--config", self.config], user),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": PATH, "LANG": "C.UTF-8"},
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    @property
    def pid(self) -> int:
        """The releaser's number outside; the process that was started is its parent, nsenter."""
        return child(self._processes[0].pid)

    def ended(self, timeout: float = PATIENCE) -> int:
        status = self._processes[0].wait(timeout)
        self._processes.clear()
        return status

    def releaser(self, *words: str, user: str = "root", **options: Any) -> subprocess.CompletedProcess[str]:
        program = self.programs / "secure-sendmail-releaser"
        return self.run(program, "--config", self.config, *words, user=user, **{"timeout": PATIENCE, **options})

    # Making it.

    def _install(self) -> None:
        library = self.directory / "lib"
        for name in ("enqueue", "releaser", "config"):
            shutil.copytree(ROOT / name, library / name, ignore=shutil.ignore_patterns("__pycache__"))
        self.programs.mkdir(mode=0o755)
        template = (ROOT / "enqueue/secure-sendmail-enqueue.in").read_text()
        scripts = {
            "secure-sendmail-enqueue": template.replace("@START@", f"{self.directory}/start/python3").replace(
                "@LIBRARY@", str(library)
            ),
            "secure-sendmail": COMMAND_SCRIPT.format(python=PYTHON, library=library, module="releaser.cli.main"),
            "secure-sendmail-releaser": COMMAND_SCRIPT.format(python=PYTHON, library=library, module="releaser.daemon"),
        }
        for name, script in scripts.items():
            (self.programs / name).write_text(script)
            (self.programs / name).chmod(0o755)
        subprocess.run([PYTHON, "-I", library / "enqueue/bundle.py", self.directory / "start"], check=True)
        subprocess.run([PYTHON, "-m", "compileall", "-q", library], check=True)
        subprocess.run(["chmod", "-R", "u=rwX,go=rX", library], check=True)

    def _make_accounts(self, members: dict[str, list[str]]) -> dict[str, int]:
        """Writes the copies of the account files; the uids of our accounts, which are their private groups' gids too."""
        directory = self.directory / "accounts"
        directory.mkdir(mode=0o755)
        names = (DAEMON, *CUSTOMERS, ADMINISTRATOR)
        taken = {entry.pw_uid for entry in pwd.getpwall()} | {entry.gr_gid for entry in grp.getgrall()}
        free = (number for number in range(58001, 59000) if number not in taken)
        uids = {name: next(free) for name in names}
        shells = {name: "/usr/sbin/nologin" if name == DAEMON else "/bin/sh" for name in names}
        ours = {
            "passwd": [f"{name}:x:{uid}:{uid}::/nonexistent:{shells[name]}" for name, uid in uids.items()],
            "group": [f"{name}:x:{uid}:" for name, uid in uids.items()],
            "shadow": [f"{name}:*:19000:0:99999:7:::" for name in names],
            "gshadow": [f"{name}:!::" for name in names],
        }
        for file, lines in ours.items():
            original = Path("/etc", file)
            # Where the machine has accounts of these names, they are others in there.
            kept = [line for line in original.read_text().splitlines() if line.split(":")[0] not in names]
            if file == "group":
                kept = [line for line in kept if line.split(":")[0] not in members]
                lines = [f"{line}{','.join(members.get(line.split(':')[0], []))}" for line in lines]
                lines += [f"{name}:x:{next(free)}:{','.join(members[name])}" for name in members if name not in names]
            copy = directory / file
            copy.write_text("\n".join([*kept, *lines]) + "\n")
            shutil.copymode(original, copy)
            os.chown(copy, original.stat().st_uid, original.stat().st_gid)
        (directory / "sudoers").write_text(SUDOERS)
        (directory / "sudoers").chmod(0o440)
        return uids

    def _make_namespace(self) -> int:
        """The number of the first process in the namespaces."""
        process = subprocess.Popen(
            ["/bin/sh", "-c", NAMESPACE, "system", INIT, self.directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._end = weakref.finalize(self, _end, process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "the namespaces could not be made; what is printed above says why"
        return int(line)

    def close(self) -> None:
        self._end()
        super().close()


def child(parent: int) -> int:
    """The one child of a process."""
    (found,) = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True).stdout.split()
    return int(found)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.communicate()
