"""Times as the ledger writes them, and a ledger that cannot be used."""

import sqlite3
import time
from pathlib import Path

import pytest

from releaser.door import RECIPIENT_SIZE
from releaser.ledger import SCHEMA_1, VERSION, Ledger, LedgerError, about, is_utc, utc


@pytest.mark.parametrize("stamp", [0.0, 1795376167.011099, 951782400.5, 4102444799.999999])
def test_time_is_recognised(stamp: float) -> None:
    """What utc() writes is a time."""
    assert is_utc(utc(stamp))


@pytest.mark.parametrize(
    "text",
    ["", "yesterday", "2026-11-22", "2026-11-22T19:36:07.011099", "2026-13-22T19:36:07.011099Z", "2026-11-22T25:36:07.011099Z",
     "2026-11-22T19:36:07,011099Z", "2026-11-22T19:36:07.011099Z ", "\u0662026-11-22T19:36:07.011099Z", "9" * 27],
)  # fmt: skip
def test_anything_else_is_no_time(text: str) -> None:
    """A customer writes what he likes into the envelope; only a time becomes the time of arrival."""
    assert not is_utc(text)


def test_newer_ledger_is_refused(tmp_path: Path) -> None:
    """A ledger of a newer version is not touched, and the sentence says what to do."""
    Ledger(str(tmp_path), create=True).close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as book:
        book.execute("PRAGMA user_version = 99")
    with pytest.raises(LedgerError, match=r"version 99 is newer than [0-9].*upgrade"):
        Ledger(str(tmp_path))


def test_missing_ledger_is_named(tmp_path: Path) -> None:
    """The command never makes a ledger where there is none, but says how one is made."""
    with pytest.raises(LedgerError, match=r"no ledger.*vhost add"):
        Ledger(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_ledger_of_version_1_is_taken_over(tmp_path: Path) -> None:
    """Its mail, its usage and its log are what they were; and a second start finds the version that the first has made."""
    columns = (
        "queue_id, vhost, state, source, digest, counted_at, recipients, remaining, sender, size, arrived_at, picked_up_at, "
        "uid, verified, message_id, subject, script, cwd, reason"
    )
    with sqlite3.connect(tmp_path / "ledger.sqlite") as book:
        book.executescript(SCHEMA_1 + "PRAGMA user_version = 1; INSERT INTO meta VALUES ('node', '0123456789abcdef');")
        for queue_id, state, counted_at in (("0" * 17, "held", None), ("1" * 17, "done", 5.0)):
            values = (queue_id, "www.a.example", state, None, "", counted_at, 3, '["r@x.example"]', "s@a.example", 9,
                      utc(1), utc(2), 33, 1, "<1@a>", "subject", "", "", "over limit")  # fmt: skip
            book.execute(f"INSERT INTO message ({columns}) VALUES ({', '.join('?' * len(values))})", values)
    for _ in range(2):
        ledger = Ledger(str(tmp_path))
        assert ledger.node == "0123456789abcdef"
        (row,) = ledger.rows("state = 'held'")
        assert (row.queue_id, row.maildrop, row.remaining, row.reason) == (
            "0" * 17,
            "www.a.example",
            ["r@x.example"],
            "over limit",
        )
        assert ledger.usage("vhost", "www.a.example", 0) == [(5.0, 3, "www.a.example", "www.a.example")]
        assert ledger.incidents() == [] and ledger.stops() == [] and ledger.renames() == []
        ledger.close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as book:
        assert book.execute("PRAGMA user_version").fetchone() == (VERSION,)
    # As it was, for whom it was made.
    with sqlite3.connect(tmp_path / "ledger.sqlite.1") as kept:
        assert kept.execute("PRAGMA user_version").fetchone() == (1,)
        assert kept.execute("SELECT count(*) FROM message").fetchone() == (2,)
    assert (tmp_path / "ledger.sqlite.1").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("recipients", "shown"), [(1, 1000), (100, 1000), (10_000, 100)])
def test_log_is_no_larger_than_what_the_caps_count(tmp_path: Path, recipients: int, shown: int) -> None:
    """Texts of a thousand characters, which a customer writes once, are not in the log ten thousand times."""
    book = Ledger(str(tmp_path), create=True)
    row = about("www.a.example", 0, "", 1000)
    row.queue_id, row.sender = "0" * 17, "s@a.example"
    row.script, row.cwd, row.subject, row.message_id = "p" * 1000, "c" * 1000, "s" * 255, "m" * 255
    with book.transaction():
        book.log(
            "held", row, 0, ((f"r{number}@x.example", "over limit 50/5m (50 used, 1 asked)", "") for number in range(recipients))
        )
    logged = list(book.select("SELECT * FROM mail_log WHERE event = 'held'", []))
    assert len(logged) == recipients and {len(each["script"]) for each in logged} == {shown}
    book.close()
    if recipients > 1000:
        assert (tmp_path / "ledger.sqlite").stat().st_size < recipients * RECIPIENT_SIZE


def test_times_before_1970_are_not_later(tmp_path: Path) -> None:
    """Whoever keeps things for a thousand years, "9999999h", keeps them: texts of three digits' years are not compared."""
    for years in (56, 1027, 1140, 2026, 5000):
        before = utc(time.time() - years * 366 * 86400)
        assert before < "2026"
    ledger = Ledger(str(tmp_path), create=True)
    with ledger.transaction():
        ledger.log("released", about("www.a.example", time.time(), "", 33), time.time(), [("r@x.example", "", "")])
    assert ledger.collect_log(utc(time.time() - 9_999_999 * 3600), ("", 0), False, 200) == (None, 0)


def test_messages_behind_those_of_a_clock_that_was_ahead_are_collected(tmp_path: Path) -> None:
    """Those with a time that is still to come hide nothing that is old; and what is new ends the search."""
    ledger, now = Ledger(str(tmp_path), create=True), time.time()
    with ledger.transaction():
        for number, stamp in enumerate([now + 1e8] * 300 + [now - 1e8] * 300 + [now - 10] * 300):
            row = about("www.a.example", stamp, "", 33)
            row.queue_id = f"{number:017X}"
            ledger.put(row)
    position: int | None = 0
    steps = 0
    while position is not None:
        position, steps = ledger.collect_messages(utc(now - 86400), now, position, 100), steps + 1
    left = ledger.select("SELECT count(*) AS n, min(picked_up_at) AS first FROM message", ())
    assert list(left) == [{"n": 600, "first": utc(now - 10)}]
    assert steps == 7


def test_address_that_is_not_ascii_is_forgotten(tmp_path: Path) -> None:
    """In whatever case it is written, in the log and in what has ended; mail that lies here is named."""
    ledger = Ledger(str(tmp_path), create=True)
    with ledger.transaction():
        for queue_id, state, row_of in (
            ("0" * 17, "done", {"sender": "Ürsel@x.example"}), ("1" * 17, "done", {"refused": [("ÜRSEL@x.example", "550 no")]}),
            ("2" * 17, "held", {"remaining": ["a@x.example", "ürsel@x.example"]}), ("3" * 17, "held", {"sender": "b@x.example"}),
        ):  # fmt: skip
            row = about("www.a.example", time.time(), "", 33)
            row.queue_id, row.state = queue_id, state
            for name, value in row_of.items():
                setattr(row, name, value)
            ledger.put(row)
            ledger.log("failed", row, time.time(), [("Ürsel@X.example", "550 ÜRSEL@x.example", ""), ("c@x.example", "", "")])
    assert ledger.lies_here("ürsel@X.EXAMPLE") == ["2" * 17]
    # The other recipient's row has it as sender.
    assert ledger.forget("ürSEL@x.example") == 5
    (texts,) = ledger.select("SELECT group_concat(recipient || sender || reason) AS log FROM mail_log", ())
    (ended,) = ledger.select("SELECT group_concat(sender || refused) AS of FROM message WHERE state = 'done'", ())
    assert "rsel" not in f"{texts}{ended}".lower()
    assert len(list(ledger.select("SELECT 1 FROM mail_log WHERE recipient = '(forgotten)'", ()))) == 4
    assert ledger.forget("ürSEL@x.example") == 0


def test_mail_does_not_wait_while_an_address_is_forgotten(tmp_path: Path) -> None:
    """What is to be changed is looked for without the lock that the releaser writes under."""
    ledger, releaser = Ledger(str(tmp_path), create=True), Ledger(str(tmp_path))
    with ledger.transaction():
        ledger.log("released", about("www.a.example", time.time(), "", 33), time.time(), [("r@x.example", "", "")])
    releaser._db.execute("PRAGMA busy_timeout = 0")
    looked = []

    def lower(text: str) -> str:
        with releaser.transaction():
            releaser.keep_time()
        looked.append(text)
        return text.lower()

    ledger._db.create_function("lower", 1, lower)
    assert ledger.forget("nobody@x.example") == 0
    assert looked


def test_machine_that_starts_with_a_clock_ahead_makes_nothing_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a day, also over restarts; a machine that was off for a night collects at once."""
    now = time.time()

    def started(off: float, up: float, how: str) -> str:
        """What is a week old where the machine, started after OFF seconds by its clock, is up for so many."""
        monkeypatch.setattr(time, "time", lambda: now + off + up)
        monkeypatch.setattr(time, "clock_gettime", lambda _: 10.0 + up)
        ledger = Ledger(str(tmp_path), create=how == "releaser")
        found = ledger.ago(7 * 86400)
        if how == "releaser":
            monkeypatch.setattr(time, "clock_gettime", lambda _: 1010.0 + up)
            with ledger.transaction():
                ledger.keep_time()
        ledger.close()
        return found

    assert started(0, 1000, "releaser") > "2026"
    assert started(40000, 0, "releaser") == utc(now + 40000 - 7 * 86400)
    for up, how in ((0, "releaser"), (5, "command"), (3600, "releaser"), (86000, "command")):
        assert started(3e9, up, how) == utc(0)
    assert started(3e9, 86500, "releaser") == utc(now + 3e9 + 86500 - 7 * 86400)
