"""The README's first installation, word for word, on a Debian on which nothing of ours is installed."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from clean_root import PATH, REPOSITORY, CleanRoot
from host import PATIENCE, ROOT, subject
from notify_socket import Listener
from servers import Sink

SYSTEM = "/usr/local/lib/systemd/system"
SPOOL_MOUNT = "var-spool-php\\x2dsecure\\x2dsendmail.mount"
RELEASER = "secure-sendmail-releaser.service"
CONFIG = "/etc/php-secure-sendmail/releaser.toml"
SPOOL = "/var/spool/php-secure-sendmail"
ENQUEUE = "/usr/local/bin/secure-sendmail-enqueue"


def steps() -> list[str]:
    """The blocks that the README says to type, in order."""
    section = (ROOT / "README.md").read_text().partition("\n## First installation on Debian 12\n")[2].partition("\n## ")[0]
    return re.findall(r"^```sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


def step(words: str) -> str:
    """The one block with those words."""
    (found,) = (block for block in steps() if words in block)
    return found


def settings(text: str) -> dict[str, str]:
    """The keys of a unit."""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line and line[0] not in "#[;")


class Service:
    """The releaser as systemd would run it: what the unit says to start, as whom, and how to reload it."""

    def __init__(self, root: CleanRoot) -> None:
        self._root = root
        self.unit = settings(root.path(f"{SYSTEM}/{RELEASER}").read_text())
        self.listener = Listener(f"@pss-test-{os.getpid()}-{time.monotonic_ns()}")
        become = ["setpriv", "--reuid", self.unit["User"], "--regid", self.unit["Group"], "--init-groups", "--no-new-privs"]
        words = [*become, "/bin/sh", "-c", f'umask {self.unit["UMask"]}; exec "$@"', "sh", self.unit["ExecStart"]]
        with (root.path("/var/log/journal-of-the-test")).open("ab") as log:
            environment = {"PATH": PATH, "LANG": "C.UTF-8", "NOTIFY_SOCKET": self.listener.address}
            self._process = subprocess.Popen(root.words(*words), stdout=log, stderr=log, env=environment)
        self.listener.wait("READY=1")

    def log(self) -> str:
        return self._root.path("/var/log/journal-of-the-test").read_text()

    @property
    def pid(self) -> str:
        """Its number in there."""
        found = self._root.run("pgrep", "-o", "-u", self.unit["User"], "-f", self.unit["ExecStart"]).stdout.split()
        assert len(found) == 1
        return found[0]

    def reload(self) -> None:
        self._root.run("/bin/sh", "-c", self.unit["ExecReload"].replace("$MAINPID", self.pid))
        self.listener.wait("RELOADING=1")
        self.listener.wait("READY=1")

    def stop(self) -> None:
        self._root.run("kill", "-TERM", self.pid)
        assert self._process.wait(PATIENCE) == 0

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self.listener.close()


def mount(root: CleanRoot, name: str) -> None:
    """What systemd does to start a mount unit."""
    unit = settings(root.path(f"{SYSTEM}/{name}").read_text())
    root.run("mount", unit["What"], unit["Where"], "-t", unit["Type"], "-o", unit["Options"])


@contextmanager
def installed() -> Iterator[CleanRoot]:
    """A host with the customer c1, and the first step done: the spool is mounted."""
    with CleanRoot() as root:
        root.run("useradd", "--create-home", "c1")
        root.run("useradd", "--create-home", "c2")
        root.copy_repository()
        root.shell(step("make install"))
        assert (
            root.path(
                "/etc/systemd/system/local-fs.target.wants",
            )
            .joinpath(SPOOL_MOUNT)
            .is_symlink()
        )
        mount(root, SPOOL_MOUNT)
        yield root


def wait(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def mode(root: CleanRoot, path: str) -> str:
    """Mode, owner and group."""
    return root.run("stat", "-c", "%a %U:%G", path).stdout.strip()


@pytest.mark.server
@pytest.mark.timeout(400)
def test_install_as_the_readme_says(sink: Sink) -> None:
    """A person who types what the README says has a working limiter: c1's mail goes out, by a daemon that is not root."""
    with installed() as root:
        (options,) = [set(words[3].split(",")) for words in mounts(root) if words[1] == SPOOL]
        assert {"nosuid", "nodev", "noexec"} <= options
        assert mode(root, SPOOL) == "711 root:root"
        assert mode(root, "/var/lib/php-secure-sendmail") == "700 secure-sendmail:secure-sendmail"
        assert mode(root, "/var/log/php-secure-sendmail") == "2750 secure-sendmail:adm"

        root.shell(step("cat > /etc/php-secure-sendmail/releaser.toml"))
        assert mode(root, CONFIG) == "640 root:secure-sendmail"
        assert mode(root, "/etc/php-secure-sendmail") == "750 root:secure-sendmail"
        assert root.run("runuser", "-u", "c1", "--", "cat", CONFIG, check=False).returncode != 0
        # The one thing that is not as the README has it: the port of the MTA.
        root.run("sed", "-i", f"s/127.0.0.1:25/127.0.0.1:{sink.port}/", CONFIG)

        said = root.shell(step("vhost add www.example.com"))
        for example in ("php-fpm.conf", "apache.conf"):
            line = f'"{ENQUEUE} www.example.com -t -i"'
            assert line in said and line in root.path(f"/usr/local/share/doc/php-secure-sendmail/{example}").read_text()
        assert root.path("/etc/systemd/system/multi-user.target.wants").joinpath(RELEASER).is_symlink()
        assert root.run("systemd-analyze", "verify", "--man=no", RELEASER, SPOOL_MOUNT).stdout == ""
        service = Service(root)
        try:
            use(root, service, sink)
        except BaseException as error:
            error.add_note(service.log())
            raise
        finally:
            service.close()


def mounts(root: CleanRoot) -> list[list[str]]:
    return [line.split() for line in root.run("cat", "/proc/self/mounts").stdout.splitlines()]


def use(root: CleanRoot, service: Service, sink: Sink) -> None:
    said = root.shell(step("runuser -u c1"))
    (message,) = sink.wait(1, timeout=PATIENCE)
    assert (subject(message.data), message.recipients) == ("It works", ["you@example.com"])
    assert b"X-Domain: www.example.com\nX-Complaints-To: abuse@host.example\n" in message.data
    assert "is running" in said and "observe" in said
    wait(lambda: "released" in root.shell("secure-sendmail log"), "the log says that it is released")

    # The daemon is its own user, and has no right to be another.
    status = root.run("cat", f"/proc/{service.pid}/status").stdout
    uid = root.run("id", "-u", "secure-sendmail").stdout.strip()
    assert re.findall(r"^Uid:\t(.*)$", status, re.MULTILINE) == ["\t".join([uid] * 4)]
    assert re.findall(r"^CapEff:\t(.*)$", status, re.MULTILINE) == ["0" * 16]

    # Another customer's websites use the shared maildrop, and cannot use that of c1.
    letter = "To: two@example.com\nSubject: {}\n\nHello.\n"
    send = "printf '%s' '{}' | runuser -u c2 -- " + ENQUEUE + " {} -t -i"
    root.shell(send.format(letter.format("shared"), "www.example.org"))
    assert root.run("/bin/sh", "-c", send.format(letter.format("forged"), "www.example.com"), check=False).returncode == 77
    assert [subject(each.data) for each in sink.wait(2, timeout=PATIENCE)] == ["It works", "shared"]

    # From observe to hold, without a restart; and a reload as systemctl makes it.
    root.shell(step('over_limit = "hold"'))
    assert mode(root, CONFIG) == "640 root:secure-sendmail"
    service.listener.wait("RELOADING=1")
    service.listener.wait("READY=1")
    service.reload()
    assert "observe" not in root.shell("secure-sendmail status")
    root.run("sed", "-i", 's|^default = .*|default = ["0/1h"]|', CONFIG)
    service.listener.wait("RELOADING=1")
    service.listener.wait("READY=1")
    root.shell(send.replace("c2", "c1").format(letter.format("over"), "www.example.com"))
    wait(lambda: "over" in root.shell("secure-sendmail hold list"), "it is held")
    assert len(sink.messages()) == 2

    # logrotate may do what its configuration says, as that user; the daemon's next line makes no trouble.
    log = "/var/log/php-secure-sendmail/error.log"
    root.run("runuser", "-u", "secure-sendmail", "--", "/bin/sh", "-c", f"umask 077; echo line > {log}")
    root.run("logrotate", "--force", "/etc/logrotate.d/php-secure-sendmail")
    assert (root.path(f"{log}.1").read_text(), root.path(log).read_text()) == ("line\n", "")
    assert mode(root, log) == "640 secure-sendmail:adm"

    # An upgrade while it runs, and all steps again, change nothing that is there.
    root.run("/bin/sh", "-c", f"cd {REPOSITORY} && make install && systemd-sysusers php-secure-sendmail.conf && "
             "systemd-tmpfiles --create php-secure-sendmail.conf")  # fmt: skip
    assert 'default = ["0/1h"]' in root.path(CONFIG).read_text()
    assert mode(root, SPOOL) == "711 root:root"
    root.shell("secure-sendmail check")
    root.shell("secure-sendmail hold release --all --yes")
    assert [subject(each.data) for each in sink.wait(3, timeout=PATIENCE)][2] == "over"
    service.stop()
    assert service.listener.words()[-1] == "STOPPING=1"

    # What is uninstalled is not mail.
    root.run("make", "-C", REPOSITORY, "uninstall")
    left = root.run("find", "/usr/local", "/etc/logrotate.d", "-name", "*secure*").stdout
    assert left == ""
    assert root.path(CONFIG).exists() and root.path(f"{SPOOL}/vhosts/www.example.com").is_dir()
    assert list(root.path("/var/lib/php-secure-sendmail").iterdir())


@pytest.mark.server
def test_install_examples_for_php(tmp_path: Path) -> None:
    """Apache and php-fpm take the examples as they are, and php-fpm reads in its own the line that is meant."""
    (php,) = Path("/usr/lib/apache2/modules").glob("libphp*.so")
    modules = {"mpm_prefork_module": "mod_mpm_prefork.so", "authz_core_module": "mod_authz_core.so", "php_module": php.name}
    lines = [f"LoadModule {name} {php.parent}/{file}" for name, file in modules.items()]
    apache = tmp_path / "apache.conf"
    apache.write_text(
        "\n".join(
            [f"ServerRoot {tmp_path}", "ServerName localhost", "ErrorLog log", *lines, f"Include {ROOT}/config/apache.conf", ""]
        )
    )
    run = subprocess.run(["apache2", "-t", "-f", apache], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "Syntax OK\n")
    (fpm,) = Path("/usr/sbin").glob("php-fpm*")
    pool = tmp_path / "pool.conf"
    # What every pool has besides, and a user that is there.
    rest = f"\nlisten = {tmp_path}/socket\npm = static\npm.max_children = 1\n"
    pool.write_text("[global]\n" + (ROOT / "config/php-fpm.conf").read_text().replace("user = c1", "user = nobody") + rest)
    run = subprocess.run([fpm, "-tt", "-n", "-y", pool], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and "test is successful" in run.stderr
    assert f"php_admin_value[sendmail_path] = {ENQUEUE} www.example.com -t -i\n" in run.stderr


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package's tree, made by whoever runs the tests, with an umask that takes everything away."""
    directory = tmp_path_factory.mktemp("package") / "tree"
    subprocess.run(
        ["sh", "-c", 'umask 077; make --silent install PREFIX=/usr DESTDIR="$1"', "sh", directory], cwd=ROOT, check=True
    )
    return directory


def test_install_into_a_package(staged: Path) -> None:
    """With DESTDIR everything lies below it, can be read by everybody but the configuration, and names no other directory."""
    files = [path for path in staged.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 60
    # What the enqueue command is started through is the system's Python, of whichever version.
    (link,) = (path for path in staged.rglob("*") if path.is_symlink())
    assert (link.name, str(link.readlink())) == ("python3", "/usr/bin/python3")
    modes = {path.relative_to(staged).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in files}
    assert {name: mode for name, mode in modes.items() if mode not in (0o644, 0o755)} == {
        "etc/php-secure-sendmail/releaser.toml": 0o640
    }
    assert {name for name, mode in modes.items() if mode == 0o755} == {
        f"usr/bin/secure-sendmail{name}" for name in ("", "-releaser", "-enqueue")
    }
    assert all(str(staged).encode() not in path.read_bytes() for path in files)
    assert all(b"/usr/local" not in path.read_bytes() for path in files if path.suffix in (".conf", ".service", ".mount", ""))
    assert not list(staged.rglob("site-packages")) and not list(staged.rglob("dist-packages"))
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o755 == 0o755 for path in staged.rglob("*")
               if path.is_dir() and "etc/php" not in path.as_posix())  # fmt: skip


def test_install_has_what_the_repository_has(staged: Path) -> None:
    """Every module of both packages is there as it is here, compiled so that it is never compiled again; and the schema."""
    library = staged / "usr/lib/php-secure-sendmail"
    here = {
        path.relative_to(ROOT): path.read_bytes() for name in ("enqueue", "releaser") for path in ROOT.glob(f"{name}/**/*.py")
    }
    there = {path.relative_to(library): path.read_bytes() for path in library.rglob("*.py")}
    assert there == here
    for module in here:
        (compiled,) = (library / module).parent.glob(f"__pycache__/{module.stem}.*.pyc")
        # PEP 552: a hash of the source that is not checked.
        assert int.from_bytes(compiled.read_bytes()[4:8], "little") == 1
    schemas = sorted((ROOT / "config").glob("schema*.sql"))
    assert len(schemas) == 2
    assert [file.read_bytes() for file in sorted((library / "config").iterdir())] == [file.read_bytes() for file in schemas]


def test_install_again_leaves_no_old_module(staged: Path) -> None:
    """An upgrade takes away what is no longer there, and keeps the configuration."""
    old = staged / "usr/lib/php-secure-sendmail/releaser/gone.py"
    old.touch()
    config = staged / "etc/php-secure-sendmail/releaser.toml"
    config.write_text("# mine\n")
    subprocess.run(["make", "--silent", "install", "PREFIX=/usr", f"DESTDIR={staged}"], cwd=ROOT, check=True)
    assert not old.exists()
    assert config.read_text() == "# mine\n"
    assert [path.name for path in (staged / "usr/lib").iterdir() if "secure" in path.name] == ["php-secure-sendmail"]
