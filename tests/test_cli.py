"""The command on odd input: the documented status, one clear sentence, never a traceback."""

import os
import subprocess
from pathlib import Path

import pytest
from host import Host

COMMAND = Path(__file__).parent.parent / ".venv/bin/secure-sendmail"


def run(host: Host, *words: str | bytes, closed: str = "") -> subprocess.CompletedProcess[bytes]:
    """The real command; CLOSED is a redirection of the shell."""
    argv = [str(COMMAND), "--config", str(host.config), *words]
    if closed:
        argv = ["/bin/sh", "-c", f'exec "$@" {closed}', "sh", *argv]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True)
    assert b"Traceback" not in done.stderr + done.stdout
    return done


@pytest.fixture(scope="module")
def held() -> object:
    """A vhost with one held mail; the releaser has run and is down."""
    with Host(default=["0/1h"]) as host:
        host.add("www.a.example")
        host.send("www.a.example")
        with host.running():
            host.wait(lambda: len(host.held()) == 1, "it is held")
        yield host


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["hold", "list", "--vhost", b"\xff"], 64, b"not UTF-8"),
        (["hold", "release", "--all", "--yes", "--why", b"\xff"], 64, b"not UTF-8"),
        (["log", "--event", b"\xff"], 64, b"not UTF-8"),
        (["log", "--last", "9" * 20], 64, b"--last"),
        (["log", "--since", "yesterday"], 64, b"yesterday"),
        (["hold", "list", "xx"], 64, b"not a queue id"),
        (["hold", "show", "../../etc/passwd"], 64, b"not a queue id"),
        (["hold", "show", "0" * 17], 1, b"no message"),
        (["hold", "release", "0" * 17], 1, b"no such message"),
        (["hold", "release"], 64, b"which mail"),
        (["hold", "delete", "--all"], 64, b"--yes"),
        (["hold"], 64, b"Usage"),
        (["nonsense"], 64, b"nonsense"),
        (["vhost", "add", "../../x"], 64, b"not a host name"),
        (["vhost", "add", "www.a.example"], 1, b"exists already"),
        (["limits", "show", "www.nobody.example"], 1, b"no vhost"),
    ],
)
def test_bad_words(held: Host, words: list[str | bytes], status: int, says: bytes) -> None:
    """Usage is 64, what does not exist is 1, and the sentence names it."""
    done = run(held, *words)
    assert done.returncode == status
    assert says in done.stderr
    assert len(held.held()) == 1


@pytest.mark.parametrize("words", [["hold", "list"], ["status"], ["log"], ["hold", "list", "--json"]])
def test_closed_streams(held: Host, words: list[str]) -> None:
    """A closed stdin, stdout or stderr, or a reader that has had enough, is no failure."""
    for closed in (">&-", "2>&-", "<&-", ">&- 2>&- <&-"):
        assert run(held, *words, closed=closed).returncode == 0
    gone, writes = os.pipe()
    os.close(gone)
    argv = [str(COMMAND), "--config", str(held.config), *words]
    done = subprocess.run(argv, stdout=writes, stderr=subprocess.PIPE)
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, b"")


def test_closed_stdin_is_no_consent(held: Host) -> None:
    """Where nobody can be asked, a selection is not deleted."""
    done = run(held, "hold", "delete", "--all", closed="<&-")
    assert (done.returncode, len(held.held())) == (64, 1)


@pytest.mark.parametrize("since", ["9999-12-31T23:59:59-23:59", "9999-12-31"])
def test_far_future_selects_nothing(held: Host, since: str) -> None:
    """A time behind the year 9999 does not compare as one before 1970."""
    assert run(held, "hold", "list", "--since", since, "--json").stdout.strip() == b"[]"


def test_missing_directories_do_not_hide_the_rest(tmp_path: Path) -> None:
    """status and vhost list work where a vhost's new/ is gone; check says that it is, with 1."""
    with Host() as host:
        host.add("www.a.example", "www.b.example")
        (host.spool / "vhosts/www.a.example/new").rmdir()
        assert [vhost["name"] for vhost in host.json("status")["vhosts"]] == ["www.a.example", "www.b.example"]
        assert run(host, "vhost", "list").returncode == 0
        done = run(host, "check")
        assert done.returncode == 1 and b"www.a.example/new" in done.stdout


def test_the_printed_line_is_what_php_needs() -> None:
    """vhost add prints the setting with the command that was installed, the spool and -t -i."""
    with Host() as host:
        done = run(host, "vhost", "add", "www.c.example")
        command = f"{COMMAND.parent / 'secure-sendmail-enqueue'} --spool {host.spool} www.c.example -t -i"
        assert done.stdout.decode().splitlines()[-2:] == [
            f'Apache:  php_admin_value sendmail_path "{command}"',
            f'php-fpm: php_admin_value[sendmail_path] = "{command}"',
        ]


def helps(*words: str) -> list[tuple[str, ...]]:
    """WORDS and all verbs below them, as the help lists them; each help is checked on the way."""
    done = subprocess.run([COMMAND, *words, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 120
    _, _, commands = done.stdout.partition("\nCommands:\n")
    verbs = [line.split(maxsplit=1) for line in commands.splitlines()]
    # Every verb is told in a whole sentence.
    assert all(len(verb) == 2 and verb[1].endswith(".") and "..." not in verb[1] for verb in verbs), done.stdout
    return [words, *(found for verb, _ in verbs for found in helps(*words, verb))]


def test_help_of_every_verb() -> None:
    """Every verb has a help that ends with 0, is not cut short, and fits; those of the other two commands fit as well."""
    assert {("hold", "release"), ("log", "init"), ("vhost", "rename"), ("check",)} <= set(helps())
    for name, status in (("secure-sendmail-releaser", 0), ("secure-sendmail-enqueue", 64)):
        done = subprocess.run([COMMAND.with_name(name), "--help"], capture_output=True, text=True)
        assert done.returncode == status
        said = (done.stdout + done.stderr).splitlines()
        assert said[0].startswith(f"{name} - ") and max(map(len, said)) <= 120
        assert any(line.startswith("Exit status: 0") for line in said)
