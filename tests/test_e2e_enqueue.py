"""The real enqueue command: what it refuses and how, what it stands, and what it loads. No releaser runs."""

from __future__ import annotations

import os
import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from host import ENQUEUE, Host, text

VHOST = "www.a.example"
USAGE, DATAERR, UNAVAILABLE, CANTCREAT, IOERR, CONFIG = 64, 65, 69, 73, 74, 78


@pytest.fixture(scope="module")
def installation() -> Iterator[Host]:
    with Host() as installation:
        installation.add(VHOST)
        yield installation


@pytest.fixture
def host(installation: Host) -> Iterator[Host]:
    """One installation for the tests that leave nothing but mail in it; the mail is removed behind each."""
    yield installation
    for name in installation.ls():
        (installation.spool / name).unlink()


@pytest.fixture
def own_host() -> Iterator[Host]:
    """An installation of the test's own."""
    with Host() as installation:
        installation.add(VHOST)
        yield installation


def refused(host: Host, run: subprocess.CompletedProcess[bytes], status: int) -> None:
    """The documented status, one line of text on standard error, nothing on standard output, nothing in the spool."""
    assert run.returncode == status, run
    assert is_one_line(run.stderr), run.stderr
    assert not run.stdout
    assert host.ls() == []


def is_one_line(said: bytes) -> bool:
    line = said.decode().removesuffix("\n")
    return bool(line) and line.isprintable() and said.endswith(b"\n")


def stored(host: Host, vhost: str = VHOST) -> bytes:
    """The one message in new/, beside which there is nothing."""
    (name,) = host.ls()
    path = host.spool / name
    match = re.fullmatch(rf"vhosts/{re.escape(vhost)}/new/\d+\.\d{{6}}\.P\d+\.[0-9a-f]{{24}},S=(\d+)", name)
    assert match and int(match[1]) == path.stat().st_size
    assert path.stat().st_mode & 0o7777 == 0o640
    return path.read_bytes()


def accepted(host: Host, run: subprocess.CompletedProcess[bytes]) -> bytes:
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")
    return stored(host)


@pytest.mark.parametrize(
    "vhost",
    [
        "../../tmp",
        "..",
        ".",
        "/tmp",
        "www.a.example/../www.a.example",
        "www.a.example\nX-Domain: forged.example",
        "www.a.example\n",
        "www.a.example\r",
        "x" * 300,
        ".".join(["label"] * 50),
        "www.a.example.",
        ".a.example",
        "www..example",
        "-www.a.example",
        "www_a.example",
        "www a.example",
        "www.ä.example",
        "*",
        "",
    ],
)
def test_enqueue_refuses_what_is_no_vhost(host: Host, vhost: str) -> None:
    """A VHOST that is no host name is a mistake in usage, and becomes no path."""
    refused(host, host.enqueue(vhost, "-t"), USAGE)


def test_enqueue_knows_only_what_was_added(host: Host) -> None:
    """A vhost without a maildrop, and a spool that is not there: 78, and neither is made."""
    refused(host, host.enqueue("www.c.example", "-t"), CONFIG)
    assert not (host.spool / "vhosts/www.c.example").exists()
    missing = host.directory / "missing"
    words = [str(ENQUEUE), "--spool", str(missing), VHOST, "-t"]
    refused(host, subprocess.run(words, input=text("one@x.example"), capture_output=True), CONFIG)
    assert not missing.exists()


def test_enqueue_needs_a_maildrop_that_is_whole(own_host: Host) -> None:
    """Without tmp/ no file can be made: 73. Nobody but `vhost add` makes directories."""
    tmp = own_host.spool / "vhosts" / VHOST / "tmp"
    tmp.rmdir()
    refused(own_host, own_host.enqueue(VHOST, "-t"), CANTCREAT)
    assert not tmp.exists()


def test_enqueue_fails_where_it_cannot_submit(own_host: Host) -> None:
    """Without new/ the rename fails: 74, and tmp/ is empty again."""
    new = own_host.spool / "vhosts" / VHOST / "new"
    new.rmdir()
    refused(own_host, own_host.enqueue(VHOST, "-t"), IOERR)
    assert not new.exists()


@pytest.mark.parametrize(
    "message",
    [
        b"Subject: nobody\n\nbody\n",
        b"To: undisclosed-recipients:;\nSubject: nobody\n\nbody\n",
        b"To:\nCc: \nBcc:\n\nbody\n",
        b"To: <>\n\nbody\n",
        b"\nTo: one@x.example\n\nbody\n",
        b"\n",
    ],
)
@pytest.mark.parametrize("words", [[], ["-t"], ["user@a.example", "-t", "-i"]], ids=["bare", "-t", "documented"])
def test_enqueue_needs_a_recipient(host: Host, message: bytes, words: list[str]) -> None:
    """A message to nobody is refused with 65."""
    refused(host, host.enqueue(VHOST, *words, message=message), DATAERR)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"To: one@x\0.example\n\nbody\n",
        b"To: one@x.example\nSubject: a\0b\n\nbody\n",
        b'To: "open <one@x.example>, two@x.example\n\nbody\n',
    ],
    ids=["empty", "nul-in-recipient", "nul-in-header", "ambiguous"],
)
def test_enqueue_refuses_bad_data(host: Host, message: bytes) -> None:
    """No message at all, a NUL in the header, and recipients that can be read in two ways: 65."""
    refused(host, host.enqueue(VHOST, "-t", message=message), DATAERR)


@pytest.mark.parametrize("words", [["one@x.example"], ["-i", "one@x.example"], []], ids=["argument", "-i", "bare"])
def test_enqueue_needs_a_message(host: Host, words: list[str]) -> None:
    """An empty standard input is no message, also where the recipients are known."""
    refused(host, host.enqueue(VHOST, "user@a.example", *words, message=b""), DATAERR)


@pytest.mark.parametrize(
    "words",
    [
        ["-Z"],
        ["--foo"],
        ["-bp"],
        ["-bd"],
        ["-bv", "one@x.example"],
        ["-bi"],
        ["-q10m"],
        ["-q"],
        ["-f"],
        ["-r", "a\nb@a.example"],
        ["-f", "a\rb@a.example"],
        ["-fuser@a.example\nRecipient: two@x.example"],
        ["-f", "x" * 400 + "@a.example"],
    ],
    ids=lambda words: " ".join(words)[:20].encode("unicode_escape").decode(),
)
def test_enqueue_refuses_usage(host: Host, words: list[str]) -> None:
    """Unknown options, modes that are not offered, and senders that are none: 64, never success with the mail unread."""
    refused(host, host.enqueue(VHOST, "-t", *words), USAGE)


def test_enqueue_without_arguments(host: Host) -> None:
    """Without a vhost: 64."""
    for words in ([], ["--spool"], ["--spool", host.spool], ["-t", "-i"]):
        refused(host, subprocess.run([ENQUEUE, *words], input=text("one@x.example"), capture_output=True), USAGE)


def test_enqueue_takes_spool_only_as_the_first_argument(host: Host) -> None:
    """--spool behind the vhost is an unknown option, so that a script cannot redirect the mail."""
    with Host() as other:
        other.add(VHOST)
        refused(host, host.enqueue(VHOST, "--spool", str(other.spool), "-t"), USAGE)
        refused(host, host.enqueue(VHOST, "-t", "--spool", str(other.spool)), USAGE)
        assert other.ls() == []


def test_enqueue_answers_the_smtp_mode(host: Host) -> None:
    """-bs is refused in SMTP's own words, so that the caller does not wait for a greeting, and with 64."""
    for words in (["-bs"], ["-bs", "-i"]):
        # The caller waits for the greeting with its end open.
        run = subprocess.Popen(
            [ENQUEUE, "--spool", host.spool, VHOST, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert run.wait(60) == USAGE
        out, error = run.communicate()
        assert re.fullmatch(rb"421 [ -~]+\r\n", out)
        assert is_one_line(error)
        assert host.ls() == []


def closing(*descriptors: int) -> Callable[[], None]:
    def close() -> None:
        for descriptor in descriptors:
            os.close(descriptor)

    return close


def test_enqueue_without_standard_input(host: Host) -> None:
    """A closed standard input is no message: refused in one line, and no file takes its place."""
    run = host.enqueue(VHOST, "user@a.example", "one@x.example", stdin=subprocess.DEVNULL, preexec_fn=closing(0))
    assert run.returncode in (DATAERR, IOERR)
    refused(host, run, run.returncode)


@pytest.mark.parametrize("descriptors", [(1,), (2,), (1, 2)], ids=["stdout", "stderr", "both"])
def test_enqueue_without_standard_output_or_error(host: Host, descriptors: tuple[int, ...]) -> None:
    """Closed standard output and error change nothing; what would have been said does not get into the message."""
    run = host.enqueue(VHOST, "-t", preexec_fn=closing(*descriptors))
    assert run.returncode == 0
    plain = stored(host)
    assert plain.endswith(b"\n\nbody\n")
    (name,) = host.ls()
    (host.spool / name).unlink()
    for words, message, status in (
        (["-Z"], None, USAGE),
        (["-bs"], None, USAGE),
        (["-t"], b"Subject: nobody\n\nbody\n", DATAERR),
        (["-t"], b"", DATAERR),
    ):
        run = host.enqueue(VHOST, *words, message=message, preexec_fn=closing(*descriptors))
        assert (run.returncode, host.ls()) == (status, []), words
        assert run.stdout == b"" or words == ["-bs"]
        assert run.stderr == b"" if 2 in descriptors else is_one_line(run.stderr)


def test_enqueue_with_broken_pipes(host: Host) -> None:
    """Standard error and output whose readers have gone change no exit status."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert host.enqueue(VHOST, "-Z", stdout=writer, stderr=writer).returncode == USAGE
        assert host.enqueue(VHOST, "-bs", stdout=writer, stderr=writer).returncode == USAGE
        assert host.ls() == []
        assert host.enqueue(VHOST, "-t", stdout=writer, stderr=writer).returncode == 0
        stored(host)
    finally:
        os.close(writer)


def limiting(which: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(which, (value, value))


def test_enqueue_under_a_file_size_limit(host: Host) -> None:
    """Where the caller's limit ends the file early: 74, no signal, nothing left. A smaller message goes through."""
    big = text("one@x.example", body="x" * 70 + "\n" * 10_000)
    refused(host, host.enqueue(VHOST, "-t", message=big, preexec_fn=limiting(resource.RLIMIT_FSIZE, 4096)), IOERR)
    refused(host, host.enqueue(VHOST, "-t", message=big, preexec_fn=limiting(resource.RLIMIT_FSIZE, 0)), IOERR)
    accepted(host, host.enqueue(VHOST, "-t", preexec_fn=limiting(resource.RLIMIT_FSIZE, 4096)))


def test_enqueue_under_a_limit_of_open_files(host: Host) -> None:
    """With next to no file descriptors the mail is accepted, or refused in one line with a documented status."""
    for most in (5, 6, 7, 8):
        run = host.enqueue(VHOST, "-t", preexec_fn=limiting(resource.RLIMIT_NOFILE, most))
        if run.returncode == 0:
            stored(host)
            (host.spool / host.ls()[0]).unlink()
        else:
            assert run.returncode in (CANTCREAT, IOERR, CONFIG), run
            refused(host, run, run.returncode)


def test_enqueue_refuses_what_is_too_large() -> None:
    """max_message_size reaches enqueue by the policy: larger is refused with 69, as large as that is accepted."""
    with Host(extra='max_message_size = "10K"\n') as host:
        host.add(VHOST)
        host.start()
        assert host.stop() == 0
        policy = (host.spool / "vhosts" / VHOST / "policy").read_text()
        assert "\nMax-Size: 10240\n" in policy
        refused(host, host.enqueue(VHOST, "-t", message=text("one@x.example", body="x" * 11_000 + "\n")), UNAVAILABLE)
        # Far larger, and never read to its end.
        refused(host, host.enqueue(VHOST, "-t", message=text("one@x.example", body="x\n" * 5_000_000)), UNAVAILABLE)
        accepted(host, host.enqueue(VHOST, "-t", message=text("one@x.example", body="x" * 9_000 + "\n")))


def test_enqueue_without_a_policy(own_host: Host) -> None:
    """An absent, torn or newer policy does not stop mail."""
    policy = own_host.spool / "vhosts" / VHOST / "policy"
    whole = policy.read_bytes()
    half, newer, torn = whole[: len(whole) // 2], whole.replace(b"Policy: 1", b"Policy: 2"), b"Policy: 1\nMax-Size: 1\n"
    for content in (None, b"", half, newer, torn, b"\xff\0\n" * 100):
        policy.unlink(missing_ok=True)
        if content is not None:
            policy.write_bytes(content)
        accepted(own_host, own_host.enqueue(VHOST, "-t"))
        (own_host.spool / own_host.ls()[0]).unlink()


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A directory of modules that end whoever imports them with 99."""
    for name in ("os", "sys", "io", "re", "site", "sitecustomize", "usercustomize", "enqueue", "syslog", "errno", "encodings"):
        (tmp_path / f"{name}.py").write_text("import posix; posix._exit(99)\n")
    return tmp_path


def test_enqueue_believes_no_environment(host: Host, evil: Path) -> None:
    """What a customer puts into the environment or the working directory is not loaded."""
    environment = {
        "PATH": "/nonexistent",
        "PYTHONPATH": str(evil),
        "PYTHONHOME": str(evil),
        "PYTHONSTARTUP": str(evil / "os.py"),
        "PYTHONUSERBASE": str(evil),
        "PYTHONINSPECT": "1",
        "PYTHONWARNINGS": "error",
        "PYTHONDEVMODE": "1",
        "PYTHONVERBOSE": "1",
        "HOME": str(evil),
        "TZ": "No/Such",
    }
    accepted(host, host.enqueue(VHOST, "-t", env=environment, cwd=evil))


def test_enqueue_in_an_empty_environment(host: Host) -> None:
    """env -i is enough."""
    accepted(host, host.enqueue(VHOST, "-t", env={}))


def test_enqueue_under_any_umask(own_host: Host) -> None:
    """The umask of the caller does not decide who can read the mail: it is sent, not stuck."""
    for umask in (0o777, 0o000):
        accepted(own_host, own_host.enqueue(VHOST, "-t", umask=umask))
        (own_host.spool / own_host.ls()[0]).unlink()
    own_host.send(VHOST)
    with own_host.running():
        own_host.wait_for_mail(1)


def test_enqueue_in_a_deleted_directory(host: Host, tmp_path: Path) -> None:
    """A working directory that is gone does not matter."""
    gone = tmp_path / "gone"
    gone.mkdir()
    words = 'rmdir "$PWD" && exec "$@"'
    run = subprocess.run(
        ["/bin/sh", "-c", words, "sh", ENQUEUE, "--spool", host.spool, VHOST, "-t"],
        input=text("one@x.example"),
        capture_output=True,
        cwd=gone,
    )
    accepted(host, run)
    assert not gone.exists()


@pytest.mark.parametrize("locale", ["C", "POSIX", "C.UTF-8", "no_SUCH.locale"])
def test_enqueue_under_any_locale(host: Host, locale: str) -> None:
    """Arguments that are UTF-8, or not even that, are taken as bytes under every locale."""
    message = b"To: one@x.example\nSubject: f\xc3\xbcr Sie\n\nGr\xc3\xbc\xc3\x9fe\n"
    environment = {"LANG": locale, "LC_ALL": locale}
    content = accepted(host, host.enqueue(VHOST, "-F", "Jörg", "-t", message=message, env=environment))
    assert content.endswith(b"\n\nGr\xc3\xbc\xc3\x9fe\n")
    assert b"\nSubject: f\xc3\xbcr Sie\n" in content
    (host.spool / host.ls()[0]).unlink()
    accepted(host, host.enqueue(VHOST, "-F", b"J\xf6rg", "-t", message=message, env=environment))


def test_enqueue_keeps_no_descriptor_of_its_caller(host: Host, tmp_path: Path) -> None:
    """Open files that the caller leaves behind, a listening socket say, are no obstacle."""
    with (tmp_path / "open").open("w") as file:
        accepted(host, host.enqueue(VHOST, "-t", pass_fds=[file.fileno()]))


def test_enqueue_message_as_documented(host: Host) -> None:
    """The file is envelope, empty line, and the message with our two fields first; line ends are LF."""
    message = b"To: one@x.example\r\nSubject: s\rX: y\r\nCc: two@x.example\r\n\r\nfirst\rsecond\r\nthird"
    content = accepted(host, host.enqueue(VHOST, "user@a.example", "-t", message=message))
    envelope, _, mail = content.partition(b"\n\n")
    lines = envelope.decode().split("\n")
    assert lines[:5] == [
        "Layout: 2",
        f"Vhost: {VHOST}",
        "Sender: user@a.example",
        "Recipient: one@x.example",
        "Recipient: two@x.example",
    ]
    others = {line.partition(":")[0] for line in lines[5:]}
    assert others <= {"Arrived", "Uid", "Cwd", "Program", "Script", "Script-Filename", "Notify", "Message-Id"}
    header, _, body = mail.partition(b"\n\n")
    assert body == b"first\nsecond\nthird\n"
    assert [line.partition(b":")[0] for line in header.split(b"\n")[:2]] == [b"X-Domain", b"X-Complaints-To"]
    assert b"\r" not in content


@pytest.mark.parametrize(
    ("words", "sender", "recipients"),
    [
        ([], None, ["to@x.example"]),
        (["user@a.example"], "user@a.example", ["to@x.example"]),
        (["user@a.example", "-t", "-i"], "user@a.example", ["to@x.example"]),
        (["user@a.example", "-i", "two@x.example"], "user@a.example", ["two@x.example"]),
        (["user@a.example", "-t", "two@x.example"], "user@a.example", ["two@x.example", "to@x.example"]),
        (["user@a.example", "two@x.example"], None, ["user@a.example", "two@x.example"]),
        (["-t", "-i", "-fbounce@a.example"], "bounce@a.example", ["to@x.example"]),
        (["user@a.example", "-t", "-f", "bounce@a.example"], "bounce@a.example", ["to@x.example"]),
        (["-ti", "-f", ""], "", ["to@x.example"]),
        (["-oi", "-odb", "-oem", "-B8BITMIME", "-FCron", "--", "two@x.example"], None, ["two@x.example"]),
        (["-OQueueDirectory=/tmp", "-X/tmp/no-such-log", "-t"], None, ["to@x.example"]),
    ],
    ids=lambda value: " ".join(value) or "none" if isinstance(value, list) else str(value),
)
def test_enqueue_understands_its_callers(host: Host, words: list[str], sender: str | None, recipients: list[str]) -> None:
    """Command lines of PHP, its libraries and cron mean what they mean to sendmail."""
    content = accepted(host, host.enqueue(VHOST, *words, message=text("to@x.example")))
    lines = content.partition(b"\n\n")[0].decode().split("\n")
    assert sorted(line[11:] for line in lines if line.startswith("Recipient: ")) == sorted(recipients)
    # An empty value stands without the space, or with it.
    senders = [line.removeprefix("Sender:").strip() for line in lines if line.startswith("Sender:")]
    assert senders == ([] if sender is None else [sender])
    assert not Path("/tmp/no-such-log").exists()


def interpreter() -> list[str]:
    """The interpreter that the shipped script names."""
    program, options = ENQUEUE.read_text().splitlines()[0].removeprefix("#!").split()
    return [program, options]


@pytest.fixture
def imported() -> Iterator[Callable[..., set[str]]]:
    def run(host: Host, *words: str, message: bytes) -> set[str]:
        command = [*interpreter(), "-X", "importtime", str(ENQUEUE), "--spool", str(host.spool), VHOST, *words]
        done = subprocess.run(command, input=message, capture_output=True, timeout=60)
        assert done.returncode == 0, done
        return {line.rpartition("|")[2].strip() for line in done.stderr.decode().splitlines() if line.startswith("import time:")}

    yield run


FORBIDDEN = {"re", "email", "argparse", "json", "logging", "socket", "subprocess", "pathlib", "tempfile", "tomllib", "random"}


def test_enqueue_loads_little(host: Host, imported: Callable[..., set[str]]) -> None:
    """An accepted message is accepted without the modules that take longest to load."""
    message = text("Ann <one@x.example>", subject="=?utf-8?Q?f=C3=BCr?=", headers="Bcc: two@x.example\nX-Domain: forged\n")
    loaded = imported(host, "user@a.example", "-t", "-i", message=message)
    assert stored(host)
    # The list is one, and has what must be loaded.
    assert {"posix", "enqueue.main"} <= loaded
    roots = {name.partition(".")[0] for name in loaded}
    assert not roots & FORBIDDEN
    assert not roots & {"releaser", "site", "watchdog", "pymysql", "click", "rich"}


def test_enqueue_modules_at_its_end(host: Host) -> None:
    """sys.modules says the same at the very end of a run that has accepted a message."""
    report = host.directory / "modules"
    stub = host.directory / "stub"
    # The shipped script, with one line in front: what is there when the process ends, by whatever way it ends.
    spy = (
        "import posix, sys\n"
        "def tell(status, end=posix._exit):\n"
        f"    descriptor = posix.open({str(report)!r}, posix.O_WRONLY | posix.O_CREAT, 0o600)\n"
        "    posix.write(descriptor, ' '.join(sys.modules).encode())\n"
        "    end(status)\n"
        "posix._exit = tell\n"
    )
    stub.write_text(spy + ENQUEUE.read_text() + "\ntell(0)\n")
    run: Any = subprocess.run(
        [*interpreter(), stub, "--spool", host.spool, VHOST, "-t"], input=text("one@x.example"), capture_output=True
    )
    accepted(host, run)
    loaded = set(report.read_text().split())
    assert "enqueue.main" in loaded
    assert not {name.partition(".")[0] for name in loaded} & FORBIDDEN
