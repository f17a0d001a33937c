"""spool_layout.md == writer == reader, in both directions, and proof that the comparison can fail."""

import os
import posix
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import page
import pytest

from enqueue import failure, maildrop, options
from enqueue import main as writer
from enqueue.maildrop import Policy
from releaser import config, door, envelope, layout, ledger, policy
from releaser.cli.main import run

ROOT = Path(__file__).parent.parent


def installed(tmp_path: Path, extra: str = "") -> Path:
    """A configuration whose spool has the vhost www.a.example, made by the real command."""
    (tmp_path / "etc").mkdir(mode=0o700)
    file = tmp_path / "etc/releaser.toml"
    file.write_text(
        f'spool = "{tmp_path}/spool"\nstate = "{tmp_path}/state"\n[mta]\nurl = "maildir:{tmp_path}/mail"\n'
        f'[tag]\ncomplaints_to = "abuse@host.example"\n{extra}'
    )
    assert run(["--config", str(file), "vhost", "add", "www.a.example"]) == 0
    return file


OWNERS = {"root": "root", "releaser": "secure-sendmail", "customer": "CUSTOMER"}


def directories(text: str, _tmp: Path) -> tuple[object, object]:
    documented = {row[0]: (int(row[2], 8), row[3]) for row in page.table(text, "directories")}
    places = {".": layout.SPOOL, **layout.DIRECTORIES, f"vhosts/{layout.UNREGISTERED}": layout.UNREGISTERED_GATE}
    places |= {f"vhosts/V/{part}".rstrip("/"): place for part, place in layout.VHOST_DIRECTORIES.items()}
    return documented, {name: (place.mode, f"{OWNERS[place.owner]}:{OWNERS[place.group]}") for name, place in places.items()}


def directories_made(text: str, tmp_path: Path) -> tuple[object, object]:
    file = installed(tmp_path)
    assert run(["--config", str(file), "vhost", "add", "--unregistered"]) == 0
    spool = tmp_path / "spool"
    found = {".": stat.S_IMODE(spool.stat().st_mode)}
    for root, names, _ in os.walk(spool):
        for name in names:
            path = Path(root) / name
            shown = str(path.relative_to(spool)).replace("www.a.example", "V")
            found[shown] = stat.S_IMODE(path.stat().st_mode)
    inside = {f"vhosts/{layout.UNREGISTERED}/{part}" for part in ("tmp", "new")}
    assert "directories are 0700" in text
    return {row[0]: 0o700 for row in page.table(text, "directories")} | dict.fromkeys(inside, 0o700), found


def envelope_keys(text: str, _tmp: Path) -> tuple[object, object]:
    rows = page.table(text, "envelope")
    documented = [[r[0] for r in rows if r[1] == who] for who in ("enqueue", "releaser")]
    many = [r[0] for r in rows if r[2].endswith("-")]
    return (documented, many), ([list(envelope.SUBMITTED), list(envelope.VERIFIED)], list(envelope.MANY))


def envelope_written(text: str, _tmp: Path) -> tuple[object, object]:
    call = options.parse(["-N", "never", "a.example"])
    posix.environ[b"SCRIPT_FILENAME"] = b"/page.php"
    written = writer.envelope(call, b"s@x", [b"r@x"], 1.0, b"<1@x>", b"script").decode()
    del posix.environ[b"SCRIPT_FILENAME"]
    keys = [line.split(":")[0] for line in written.splitlines() if line]
    return [r[0] for r in page.table(text, "envelope") if r[1] == "enqueue"], keys


def timers(text: str, _tmp: Path) -> tuple[object, object]:
    documented = {row[0]: int(row[1]) for row in page.table(text, "timers")}
    known = {n: v for n, v in vars(layout).items() if n.endswith(("_AGE", "_INTERVAL"))}
    return documented, known


def statuses(text: str, _tmp: Path) -> tuple[object, object]:
    documented = {row[1]: int(row[0]) for row in page.table(text, "statuses") if row[1]}
    return documented, {n: v for n, v in vars(failure).items() if n.isupper()}


# What the releaser says of a vhost over its limit, at the page's time.
WARNING = (
    "www.a.example",
    "[Thu Apr 27 20:28:36 2006] [secure-sendmail] domain www.a.example: exceeded limit for 1 minutes (10): "
    "mail over the limit is held for review",
)


# What it says of one that has reached a cap.
REFUSAL = (
    "www.a.example",
    "mail of www.a.example waits here already, 10000 messages of it (hold_max_messages): "
    "no more is accepted until some of it is released or deleted",
)


def policy_written(text: str, tmp_path: Path) -> tuple[object, object]:
    file = installed(tmp_path, '[vhosts."www.a.example"]\nsender = "user1@example.com"\n')
    found = policy.render(
        config.load(str(file)), "www.a.example", "5f0c8d1e9a7b4c3d2e1f0a9b8c7d6e5f", 52428800, [WARNING], 1146162516.0, [REFUSAL]
    )
    return page.fence(text, "policy"), found.decode()


def policy_read(text: str, _tmp: Path) -> tuple[object, object]:
    lines = dict(line.split(": ", 1) for line in page.fence(text, "policy").splitlines())
    found = Policy(page.fence(text, "policy").encode())
    documented = (lines["Bell"], int(lines["Max-Size"]), lines["Sender"], lines["Domain-Header"], lines["Complaints-Header"],
                  lines["Complaints-To"], lines["Policy"], lines["End"], int(lines["Until"]), lines["Warning"], lines["Refuse"],
                  "")  # fmt: skip
    read = (found.bell, found.max_size, found.sender.decode(), found.tag[0][0].decode(), found.tag[1][0].decode(),
            found.tag[1][1].decode(), str(policy.VERSION), str(policy.VERSION), found.until,
            "www.a.example " + found.warning("www.a.example", found.until - 1).decode(),
            "www.a.example " + found.refusal("www.a.example", found.until - 1).decode(),
            "".join(say("www.a.example", found.until).decode() + say("www.b.example", 0).decode()
                    for say in (found.warning, found.refusal)))  # fmt: skip
    return documented, read


def names(text: str, _tmp: Path) -> tuple[object, object]:
    rows = {row[0]: row[2] for row in page.table(text, "names")}
    good = (
        layout.submitted_size(rows["in `new/"].encode()),
        layout.submitted_size(rows["in `tmp/"].encode()),
        layout.is_queue_id(rows["queue id"]),
        layout.is_bell(rows["bell"]),
        len(rows),
    )
    return (480, None, True, True, 4), good


# The writer's process with its clock, pid and caller fixed; everything else is as it is installed.
FIXED = """
import posix, sys, time
sys.path.insert(0, sys.argv.pop(1))
from enqueue import main
time.time = lambda: 1795376167.011099
posix.getpid, posix.getuid = lambda: 3395, lambda: 33
random, posix.urandom = posix.urandom, lambda n: bytes.fromhex("2bad27e5dbb62169d779a57a")
main._directory, main._parent = lambda: b"/var/www/a", lambda: b"/usr/bin/php8.2"
main.main()
"""


def example_written(text: str, tmp_path: Path) -> tuple[object, object]:
    installed(tmp_path)
    words = ["--spool", tmp_path / "spool", "www.a.example", "user@a.example", "-t", "two@x.example"]
    run_ = subprocess.run(
        [sys.executable, "-IS", "-c", FIXED, ROOT, *words],
        input=b"To: one@x.example\r\nX-PHP-Originating-Script: 33:contact.php\r\n\r\nText.\r\n",
        capture_output=True,
    )  # fmt: skip
    assert (run_.returncode, run_.stderr) == (0, b"")
    (file,) = (tmp_path / "spool/vhosts/www.a.example/new").iterdir()
    documented = page.fence(text, "example")
    head, body = file.read_text().split("\n\n", 1)
    recipients = [line for line in head.split("\n") if line.startswith("Recipient: ")]
    # Recipients given as arguments come first; the page lists them by name.
    return documented, head.replace("\n".join(recipients), "\n".join(sorted(recipients))) + "\n\n" + body


def example_name(text: str, tmp_path: Path) -> tuple[object, object]:
    example_written(text, tmp_path)
    (file,) = (tmp_path / "spool/vhosts/www.a.example/new").iterdir()
    stem = page.table(text, "names")[0][2]
    return f"{stem},S={file.stat().st_size}", file.name


def example_read(text: str, _tmp: Path) -> tuple[object, object]:
    head = page.fence(text, "example").split("\n\n")[0]
    found = envelope.parse(head.encode(), verified=False)
    lines = [line.split(": ", 1) for line in head.splitlines()]
    documented = {key: value for key, value in lines if key not in ("Layout", "Recipient")}
    read = {key: getattr(found, key.lower().replace("-", "_")) for key in documented}
    return (documented, [v for k, v in lines if k == "Recipient"], dict(lines)["Layout"]), (
        read,
        list(found.recipients),
        str(layout.LAYOUT),
    )


def refusals(text: str, tmp_path: Path) -> tuple[object, object]:
    """Where refusals are counted, and that the sentence is the one of a vhost that has reached the default cap."""
    (documented,) = re.findall(r"in `tmp/(\w+\.)<uid>`", text)
    lines = page.fence(text, "policy").splitlines()
    sentences = [line.split(": ", 1)[1] for line in lines if line.startswith("Refuse: ")]
    file = config.load(str(installed(tmp_path)))
    book = ledger.Ledger(file.state)
    kept = door.Door(file, book)
    row = ledger.about("www.a.example", 0.0, "", 0)
    for _ in range(file.vhost("www.a.example").hold_max_messages):
        assert kept.refusals("www.a.example") == []
        kept.add(row)
    book.close()
    return (documented, documented, sentences), (
        maildrop.REFUSED,
        layout.REFUSED,
        [" ".join(refusal) for refusal in kept.refusals("www.a.example")],
    )


Comparison = Callable[[str, Path], tuple[object, object]]
COMPARISONS: dict[Comparison, str] = {
    directories: "directories",
    directories_made: "directories",
    envelope_keys: "envelope",
    envelope_written: "envelope",
    timers: "timers",
    statuses: "statuses",
    policy_written: "policy",
    policy_read: "policy",
    refusals: "policy",
    names: "names",
    example_written: "example",
    example_name: "names",
    example_read: "example",
}


@pytest.mark.parametrize("compare", COMPARISONS, ids=lambda c: c.__name__)
def test_page_and_code_agree(compare: Comparison, tmp_path: Path) -> None:
    """What the page says is what the code does, no more and no less."""
    documented, implemented = compare(page.text(), tmp_path)
    assert documented == implemented


@pytest.mark.parametrize("compare", COMPARISONS, ids=lambda c: c.__name__)
def test_comparison_sees_a_missing_row(compare: Comparison, tmp_path: Path) -> None:
    """On a copy of the page with a row removed the same comparison fails: the checker has not gone blind."""
    # The first row of the statuses is 0, which has no name in the code; of the policy's, one comparison reads Refuse alone.
    shortened = page.without_row(page.text(), COMPARISONS[compare], {statuses: 1, refusals: 9}.get(compare, 0))
    assert shortened != page.text()
    try:
        documented, implemented = compare(shortened, tmp_path)
    except (KeyError, ValueError, IndexError, AssertionError):
        return
    assert documented != implemented


def test_every_marked_section_is_compared() -> None:
    """Nothing is marked as read by tests that no test reads."""
    marked = set(re.findall(r"read by tests/: ([a-z]+)", page.text()))
    assert marked == set(COMPARISONS.values()) | {"states", "transitions"}


def test_modes_of_files(tmp_path: Path) -> None:
    """Bells, policy and submitted files have the modes that the page names below the directories."""
    file = installed(tmp_path)
    spool = tmp_path / "spool"
    message = b"To: a@x.example\n\ntext\n"
    enqueue = [sys.executable, "-IS", "-c", FIXED, ROOT, "--spool", spool, "www.a.example"]
    assert subprocess.run(enqueue, input=message, umask=0o777).returncode == 0
    assert config.load(str(file)).spool == str(spool)
    (submitted,) = (spool / "vhosts/www.a.example/new").iterdir()
    modes = {stat.S_IMODE(bell.stat().st_mode) for bell in (spool / "wake").iterdir()}
    assert modes == {0o600} and stat.S_IMODE(submitted.stat().st_mode) == 0o640
    assert "mode 0640" in page.text() and "a bell 0600" in page.text()
