"""The MTA's own sendmail command, Postfix's and Exim's: what arrives, what is refused, and what set-gid postdrop needs."""

from __future__ import annotations

import json
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from host import PATIENCE, ROOT, Host, subject, text
from servers import LIBRARIES, POSTFIX, SETGID_GROUP, Exim, Postfix, Sink

pytestmark = pytest.mark.server

VHOST = "www.a.example"
SIZE_LIMIT = 4_000_000
# Postfix bounces mail to an address that begins with a hyphen, unless it is told not to.
HYPHENS = {"allow_min_user": "yes"}
# An account that every Debian has and nothing uses; not one of those that the servers use.
USER = "games"


@pytest.fixture(params=["postfix", "exim"])
def site(request: pytest.FixtureRequest, sink: Sink) -> Iterator[Host]:
    """A running installation whose MTA is a sendmail command, which passes mail on to the sink."""
    mta = Postfix(sink.port, SIZE_LIMIT, HYPHENS) if request.param == "postfix" else Exim(sink.port, SIZE_LIMIT)
    with mta, Host(mta=f"sendmail:{mta.sendmail()}") as host:
        host.add(VHOST)
        with host.running():
            yield host


def body(data: bytes) -> bytes:
    return data.partition(b"\n\n")[2]


def test_sendmail_hands_over_what_was_sent(site: Host, sink: Sink) -> None:
    """Odd addresses, lines of one dot and 8-bit text arrive as they were sent, once, in the envelope and with our tags."""
    recipients = ['"a b"@x.example', "-oX@x.example", "o'hara@x.example", "a+b=c@x.example"]
    lines = "From here on\n.\n..two\n-t\nGr\u00fc\u00dfe\n" + "long " * 190 + "\n"
    site.send(
        VHOST, "-f", "-C@a.example", "-t", message=text(*recipients, subject="odd", headers="Bcc: two@x.example\n", body=lines)
    )
    (message,) = sink.wait(1, timeout=30)
    assert sorted(message.recipients) == sorted([*recipients, "two@x.example"])
    assert message.sender == "-C@a.example"
    assert body(message.data) == lines.encode()
    assert b"\nX-Domain: www.a.example\n" in message.data
    site.wait_until_idle()
    assert sorted(row["recipient"] for row in site.rows("released")) == sorted(message.recipients)
    assert (site.ls(), site.rows("deferred", "failed", "retried")) == ([], [])


def test_sendmail_null_sender(site: Host, sink: Sink) -> None:
    """The null sender is handed over as that, and no process's user in its place."""
    site.send(VHOST, "-f", "", "-t")
    (message,) = sink.wait(1, timeout=30)
    assert message.sender == ""


def test_sendmail_large_message(site: Host, sink: Sink) -> None:
    """A message of 3 MB arrives whole."""
    lines = b"".join(b"%d %s\n" % (number, b".:x"[number % 3 : number % 3 + 1] * 60) for number in range(45_000))
    site.send(VHOST, message=text("one@x.example").removesuffix(b"body\n") + lines)
    (message,) = sink.wait(1, timeout=30)
    assert body(message.data) == lines


def test_sendmail_many_recipients_and_messages(site: Host, sink: Sink) -> None:
    """250 recipients of one mail get it once each, and the mails behind it come too."""
    recipients = [f"user{number}@x.example" for number in range(250)]
    site.send(VHOST, message=text("one@x.example", subject="many", headers=f"Bcc: {', '.join(recipients)}\n"))
    for number in range(10):
        site.send(VHOST, message=text("one@x.example", subject=f"mail {number}"))
    site.wait_until_idle()

    def got() -> Counter[tuple[str, str]]:
        return Counter((subject(each.data), address) for each in sink.messages() for address in each.recipients)

    expected = [("many", address) for address in ["one@x.example", *recipients]]
    expected += [(f"mail {number}", "one@x.example") for number in range(10)]
    site.wait(lambda: len(got()) == len(expected), "all have arrived")
    assert got() == Counter(expected)


def test_sendmail_refusal_ends(site: Host, sink: Sink) -> None:
    """A message that the command never takes is tried until give_up, then lies in failed/ with the command's words."""
    words = "too big"
    site.configure(extra="")
    site.write(site.config.read_text().replace("[mta]\n", '[mta]\ngive_up = "1s"\n'))
    site.wait_for_log("loaded")
    site.send(VHOST, "-f", "", message=text("one@x.example", subject="large", body="0123456789\n" * 500_000))
    site.send(VHOST, message=text("one@x.example", subject="small"))
    site.wait_for_row("deferred")
    (row,) = site.rows("deferred")
    assert words in row["reason"] and row["reason"].startswith("status ")
    site.wait_for_row("failed", timeout=60)
    site.wait_until_idle()
    (row,) = site.rows("failed")
    assert words in row["reason"] and row["reason"].startswith("given up: status ")
    assert site.ls() == [f"failed/{row['queue_id']}"]
    assert [subject(message.data) for message in sink.wait(1)] == ["small"]


def test_sendmail_that_is_not_there(sink: Sink) -> None:
    """Without the command mail waits where it is, and goes out when the command is there."""
    with Postfix(sink.port) as postfix, Host(mta=f"sendmail:{postfix.directory}/later") as host:
        host.add(VHOST)
        with host.running():
            host.send(VHOST)
            assert "No such file" in host.wait_for_log("no connection to the MTA")
            assert (len(host.ls()), host.rows("deferred", "failed")) == (1, [])
            postfix.sendmail().rename(postfix.directory / "later")
            sink.wait(1, timeout=60)
            host.wait_until_idle()
            assert len(host.rows("released")) == 1


class SetgidPostfix:
    """A Postfix as it is installed: postdrop is set-gid, and configuration and libraries are where the programs expect them.

    What it adds to /etc and /usr/lib is seen by what command() runs, in a mount namespace that ends with it.
    """

    def __init__(self, sink: Sink) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="pss-", dir="/tmp"))
        self.directory.chmod(0o755)
        programs = self.directory / "sbin"
        programs.mkdir()
        for name in ("sendmail", "postdrop"):
            shutil.copy(POSTFIX / "usr/sbin" / name, programs / name)
        shutil.chown(programs / "postdrop", "root", SETGID_GROUP)
        (programs / "postdrop").chmod(0o2555)
        self.postfix = Postfix(sink.port, parameters={"command_directory": str(programs)})
        self.sendmail = programs / "sendmail"

    def __enter__(self) -> SetgidPostfix:
        self.postfix.__enter__()
        shutil.copytree(self.postfix.directory / "config", self.directory / "etc/postfix")
        (self.directory / "etc").chmod(0o755)
        return self

    def __exit__(self, *_: object) -> None:
        self.postfix.close()
        shutil.rmtree(self.directory)

    def command(self, *words: str | Path, no_new_privs: bool = False) -> list[str]:
        """The command line that runs WORDS as USER beside this Postfix."""
        layers = {"/etc": self.directory / "etc", "/usr/lib": LIBRARIES.parent}
        mounts = [f"mount -t overlay overlay -o lowerdir={layer}:{place} {place}" for place, layer in layers.items()]
        account = pwd.getpwnam(USER)
        become = f"setpriv --reuid {account.pw_uid} --regid {account.pw_gid} --clear-groups"
        become += " --no-new-privs" if no_new_privs else ""
        inner = " && ".join([*mounts, f'exec {become} "$@"'])
        return ["unshare", "-m", "/bin/sh", "-c", inner, "sh", *map(str, words)]


# The releaser, but for a sendmail command that it waits 3 seconds for.
IMPATIENT = "from releaser import daemon, mta; mta.SENDMAIL_TIMEOUT = 3; daemon.main()"


def test_sendmail_set_gid(sink: Sink) -> None:
    """Without new privileges postdrop cannot store the mail, which waits; with them, as the drop-in allows, it goes out."""
    with SetgidPostfix(sink) as mta, Host(mta=f"sendmail:{mta.sendmail}") as host:
        # USER has this installation to itself, and may not come into the directory of the repository.
        library = host.directory / "lib"
        for package in ("enqueue", "releaser"):
            shutil.copytree(ROOT / package, library / package, ignore=shutil.ignore_patterns("__pycache__"))
        python = ("env", f"PYTHONPATH={library}", "/usr/bin/python3")
        command = (*python, "-m", "releaser.cli.main", "--config", host.config)
        enqueue = (*python, "-c", "from enqueue.main import main; main()", "--spool", host.spool)
        for path in (host.directory, host.config.parent, host.config):
            shutil.chown(path, USER)

        def run(*words: str | Path, **options: Any) -> str:
            options = {"capture_output": True, "text": True, "timeout": PATIENCE, **options}
            done = subprocess.run(mta.command(*words), **options)
            assert done.returncode == 0, done
            return str(done.stdout)

        @contextmanager
        def releaser(no_new_privs: bool) -> Iterator[None]:
            words = (*python, "-c", IMPATIENT, "--config", host.config)
            with (host.directory / "releaser.log").open("ab") as log:
                process = subprocess.Popen(mta.command(*words, no_new_privs=no_new_privs), stdout=log, stderr=log)
            try:
                yield
                process.send_signal(signal.SIGTERM)
                assert process.wait(PATIENCE) == 0
            finally:
                process.kill()
                process.wait()

        def rows(event: str) -> list[dict[str, Any]]:
            return list(json.loads(run(*command, "log", "--event", event, "--json")))

        run(*command, "vhost", "add", VHOST)
        run(*enqueue, VHOST, input=text("one@x.example", subject="set-gid").decode())
        with releaser(no_new_privs=True):
            host.wait(lambda: rows("deferred"), "it is deferred")
        (row,) = rows("deferred")
        assert "maildrop" in row["reason"] and "Permission denied" in row["reason"]
        assert (sink.messages(), host.ls()) == ([], [f"active/{row['queue_id']}"])
        with releaser(no_new_privs=False):
            (message,) = sink.wait(1, timeout=PATIENCE)
            host.wait(lambda: rows("released"), "it is released")
        assert subject(message.data) == "set-gid"
        assert (host.ls(), len(sink.messages())) == ([], 1)
