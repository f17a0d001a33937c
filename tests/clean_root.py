"""A Debian on which nothing of ours is installed, to try out what the README says.

It is a copy of the one that tests/packages.sh has made, in namespaces of its own: what is installed, mounted, started and
written there is in memory, and has gone when the first process in there ends, which is when the test run ends, however
that ends. systemd does not run in there. Needs root.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from host import ROOT

BASE = ROOT / ".cache/debian/root"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
REPOSITORY = "/root/php-secure-sendmail"

NAMESPACE = 'unshare --mount --pid --fork --propagation private /bin/sh -c "$1" init "$2" "$3"; rmdir -- "$2"'

# The first process in the namespaces; it stays outside of the root, by which systemctl knows that no systemd runs there.
# $1 is an empty directory, $2 the base. It says its number outside, which the /proc of outside knows.
INIT = """set -e
read -r pid _ < /proc/self/stat
mount -t tmpfs -o mode=0755 tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" "$1/root"
mount -t proc proc "$1/root/proc"
mount --rbind /dev "$1/root/dev"
cp -L /etc/resolv.conf /etc/hosts "$1/root/etc/"
echo "$pid"
read -r _
"""


class CleanRoot:
    """The root directory, and the commands that run in it. As a context manager, there from start to close."""

    def __init__(self) -> None:
        assert BASE.is_dir(), f"{BASE} is missing; tests/packages.sh makes it"
        self._directory = tempfile.mkdtemp(prefix="pss-root-", dir="/tmp")
        process = subprocess.Popen(
            ["/bin/sh", "-c", NAMESPACE, "root", INIT, self._directory, BASE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._end = weakref.finalize(self, process.communicate)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "the namespaces could not be made; what is printed above says why"
        self._init = int(line)

    def path(self, name: str) -> Path:
        """A file in there, as it is reached from outside."""
        return Path(f"/proc/{self._init}/root{self._directory}/root{name}")

    def words(self, *command: str) -> list[str]:
        """The command line that runs a command in there."""
        enter = [
            f"--{name}=/proc/{self._init}/{file}" for name, file in (("mount", "ns/mnt"), ("pid", "ns/pid"), ("root", "root"))
        ]
        return ["nsenter", *enter, "--", "chroot", f"{self._directory}/root", *command]

    def run(self, *command: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs a command in there, as root, with both of its outputs in one."""
        settings = {"stdin": subprocess.DEVNULL, "timeout": 240, "cwd": "/", "env": ENVIRONMENT, **options}
        settings |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        run = subprocess.run(self.words(*command), **settings)
        assert not check or run.returncode == 0, f"{command} ended with {run.returncode}: {run.stdout}"
        return run

    def copy_repository(self) -> None:
        """What is in version control or could be, as a person has it who has fetched it."""
        names = ("__pycache__", ".git", ".venv", ".cache", ".*_cache", ".hypothesis", "*.egg-info", "var")
        shutil.copytree(ROOT, self.path(REPOSITORY), ignore=shutil.ignore_patterns(*names))

    def shell(self, script: str) -> str:
        """Runs lines as they would be typed in the repository, up to the first that fails; what they print.

        But for --now: systemctl enables in there, and cannot start.
        """
        script = script.replace("systemctl enable --now", "systemctl enable")
        return self.run("/bin/bash", "-euo", "pipefail", "-c", f"cd {REPOSITORY}\n{script}").stdout

    def close(self) -> None:
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
