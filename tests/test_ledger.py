"""Times as the ledger writes them, and a ledger that cannot be used."""

import sqlite3
from pathlib import Path

import pytest

from releaser.ledger import Ledger, LedgerError, is_utc, utc


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
