"""A person reviews held mail with the real command; the MTA is a maildir."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import pytest
from host import COMMAND, Host, smtp, subject, text
from servers import Sink

A, B = "www.a.example", "www.b.example"
UNKNOWN = "0660E2E85F2C029E9"


@pytest.fixture
def strict() -> Iterator[Host]:
    """An installation that holds everything, with a running releaser."""
    with Host(default=["0/1h"]) as host:
        host.add(A, B)
        with host.running():
            yield host


def hold(host: Host, *subjects: str, vhost: str = A, to: str = "one@x.example", words: Sequence[str] = ()) -> list[str]:
    """Sends messages that are held; the queue ids in the same order."""
    before = set(host.held())
    for each in subjects:
        host.send(vhost, *words, message=text(to, subject=each))
    host.wait(lambda: len(host.held()) == len(before) + len(subjects), "all are held")
    host.wait_until_idle()
    new = {row["subject"]: row["queue_id"] for row in host.json("hold", "list") if row["queue_id"] not in before}
    return [new[each] for each in subjects]


def test_review_lists_and_shows(strict: Host) -> None:
    """A held mail is listed, and shown as a person and as a program wants it."""
    strict.send(A, "boss@a.example", "-t", message=text("one@x.example", "two@x.example", subject="Invoice", body="Pay.\n"))
    strict.wait(strict.held, "it is held")
    strict.wait_until_idle()
    (row,) = strict.json("hold", "list")
    queue_id = row["queue_id"]
    assert strict.ls() == [f"hold/{queue_id}"]
    listed = strict.cli("hold", "list").stdout
    for word in (queue_id, A, "boss@a.example", "one@x.example", "Invoice", "0/1h"):
        assert word in listed
    shown = strict.json("hold", "show", queue_id)
    assert (shown["queue_id"], shown["vhost"], shown["subject"]) == (queue_id, A, "Invoice")
    assert (shown["sender"], shown["recipients"]) == ("boss@a.example", ["one@x.example", "two@x.example"])
    raw = strict.cli("hold", "show", "--raw", queue_id, text=False).stdout
    assert raw.startswith(f"X-Domain: {A}\n".encode()) and raw.endswith(b"\n\nPay.\n") and b"\r" not in raw
    assert row["size"] == shown["size"] == len(raw)
    for_people = strict.cli("hold", "show", queue_id).stdout
    for word in (A, "boss@a.example", "two@x.example", "Invoice", "Pay.", "0/1h"):
        assert word in for_people


def test_review_releases_what_was_shown(strict: Host) -> None:
    """A released mail goes out once, byte for byte as it was shown, whatever the limits say; the log names the actor."""
    wanted, other = hold(strict, "wanted", "other")
    raw = strict.cli("hold", "show", "--raw", wanted, text=False).stdout
    run = strict.cli("hold", "release", wanted, "--why", "a customer's order")
    assert "1" in run.stdout
    (mail,) = strict.wait_for_mail(1)
    assert mail.read_bytes() == raw
    strict.wait_until_idle()
    assert strict.ls() == [f"hold/{other}"]
    assert len(strict.mail()) == 1
    (row,) = strict.rows("released")
    assert (row["queue_id"], row["subject"]) == (wanted, "wanted")
    decisions = [row for row in strict.rows() if row["queue_id"] == wanted and row["actor"]]
    assert any("a customer's order" in row["reason"] for row in decisions)


def test_review_release_is_not_counted() -> None:
    """Mail that a person releases uses nothing of the limit."""
    with Host(default=["2/1h"]) as host:
        host.add(A)
        with host.running():
            to_all = "a@x.example, b@x.example, c@x.example"
            (queue_id,) = hold(host, "held", to=to_all)
            host.cli("hold", "release", queue_id)
            host.wait_for_mail(1)
            host.wait_until_idle()
            assert [window["used"] for window in host.json("limits", "show", A)["windows"]] == [0]
            host.send(A, message=text("a@x.example, b@x.example", subject="later"))
            host.wait_for_mail(2)
            assert host.subjects() == ["held", "later"]


def test_review_deletes_and_undeletes(strict: Host) -> None:
    """A deleted mail is in the trash and not listed; undeleted, it is held again as it was, and can be released."""
    bad, good = hold(strict, "bad", "good")
    raw = strict.cli("hold", "show", "--raw", bad, text=False).stdout
    strict.cli("hold", "delete", bad, "--yes", "--why", "spam")
    strict.wait(lambda: strict.ls() == [f"hold/{good}", f"trash/{bad}"], "it is in the trash")
    assert strict.held() == [good]
    assert strict.held("--deleted") == [bad]
    assert [(row["queue_id"], row["subject"]) for row in strict.rows("deleted")] == [(bad, "bad")]
    assert "spam" in strict.rows("deleted")[0]["reason"]
    strict.cli("hold", "undelete", bad)
    strict.wait(lambda: strict.ls() == sorted([f"hold/{good}", f"hold/{bad}"]), "it is held again")
    assert sorted(strict.held()) == sorted([bad, good])
    assert strict.held("--deleted") == []
    assert strict.cli("hold", "show", "--raw", bad, text=False).stdout == raw
    strict.cli("hold", "release", bad)
    (mail,) = strict.wait_for_mail(1)
    assert mail.read_bytes() == raw


def test_review_deleted_mail_cannot_be_released(strict: Host) -> None:
    """Releasing what is in the trash says so, ends with 1 and sends nothing; so does undeleting what is held."""
    bad, good = hold(strict, "bad", "good")
    strict.cli("hold", "delete", bad, "--yes")
    strict.wait(lambda: f"trash/{bad}" in strict.ls(), "it is in the trash")
    for words in (("release", bad), ("delete", bad, "--yes"), ("undelete", good)):
        run = strict.cli("hold", *words, check=False)
        assert run.returncode == 1 and words[1] in run.stderr, words
    strict.wait_until_idle()
    assert strict.ls() == [f"hold/{good}", f"trash/{bad}"]
    assert strict.mail() == []


def test_review_release_twice_sends_once(strict: Host) -> None:
    """Releasing what is released already says so, ends with 1 and sends nothing."""
    (queue_id,) = hold(strict, "once")
    strict.cli("hold", "release", queue_id)
    strict.wait_for_mail(1)
    strict.wait_until_idle()
    for words in (("release", queue_id), ("delete", queue_id, "--yes"), ("undelete", queue_id)):
        run = strict.cli("hold", *words, check=False)
        assert run.returncode == 1
        assert queue_id in run.stderr and "released" in run.stderr
        assert run.stderr.count("\n") == 1
    strict.wait_until_idle()
    assert (len(strict.mail()), strict.ls()) == (1, [])
    assert len(strict.rows("released")) == 1


@pytest.mark.parametrize("running", [True, False], ids=["running", "releaser-down"])
def test_review_two_releases_at_once_send_once(strict: Host, running: bool) -> None:
    """Of two commands that release the same mail at the same time one does it and the other says so; it goes out once."""
    ids = hold(strict, *(f"mail {number}" for number in range(6)))
    if not running:
        assert strict.stop() == 0
    for queue_id in ids:
        words = [str(COMMAND), "--config", str(strict.config), "hold", "release", queue_id]
        both = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        ends = sorted((run.wait(60), run.communicate()[1]) for run in both)
        assert [status for status, _ in ends] == [0, 1]
        assert queue_id in ends[1][1]
    if not running:
        assert strict.mail() == []
        strict.start()
    strict.wait_for_mail(6)
    strict.wait_until_idle()
    assert strict.subjects() == [f"mail {number}" for number in range(6)]
    assert (strict.ls(), len(strict.rows("released"))) == ([], 6)


def test_review_release_and_delete_at_once_do_one_of_them(strict: Host) -> None:
    """Of a release and a delete at the same time one wins; the mail is sent or in the trash, never both."""
    ids = hold(strict, *(f"mail {number}" for number in range(6)))

    def decide(words: Sequence[str]) -> int:
        return strict.cli("hold", *words, check=False).returncode

    released = 0
    for number, queue_id in enumerate(ids):
        pair = [("release", queue_id), ("delete", queue_id, "--yes")]
        with ThreadPoolExecutor(2) as pool:
            statuses = list(pool.map(decide, pair if number % 2 else pair[::-1]))
        assert sorted(statuses) == [0, 1]
        released += statuses[0 if number % 2 else 1] == 0
    strict.wait(lambda: not any(name.startswith("hold/") for name in strict.ls()), "all are carried out")
    strict.wait_until_idle()
    assert len(strict.mail()) == released
    assert len(strict.ls()) == len(ids) - released
    assert all(name.startswith("trash/") for name in strict.ls())


def test_review_with_the_releaser_down_is_carried_out_at_its_start(strict: Host) -> None:
    """Decisions are recorded, and said to be only that, while the releaser is down; it carries them out at its start."""
    send, drop, stay = hold(strict, "send", "drop", "stay")
    assert strict.stop() == 0
    for words in (("release", send), ("delete", drop, "--yes")):
        run = strict.cli("hold", *words)
        assert re.search(r"recorded.*; the releaser is not running", run.stdout + run.stderr)
    assert strict.cli("hold", "release", send, check=False).returncode == 1
    assert strict.ls() == sorted(f"hold/{queue_id}" for queue_id in (send, drop, stay))
    assert strict.mail() == []
    strict.start()
    strict.wait_for_mail(1)
    strict.wait(lambda: strict.ls() == [f"hold/{stay}", f"trash/{drop}"], "both are carried out")
    assert strict.subjects() == ["send"]
    assert strict.json("status")["held"] == 1


def test_review_unknown_id(strict: Host) -> None:
    """An id that no message has ends with 1, on every verb; the known ones beside it are done all the same."""
    (queue_id,) = hold(strict, "known")
    for words in (("show",), ("release",), ("delete", "--yes"), ("undelete",)):
        run = strict.cli("hold", *words, UNKNOWN, check=False)
        assert (run.returncode, run.stderr.count("\n")) == (1, 1), words
        assert UNKNOWN in run.stderr
    assert strict.ls() == [f"hold/{queue_id}"]
    run = strict.cli("hold", "release", UNKNOWN, queue_id, check=False)
    assert (run.returncode, UNKNOWN in run.stderr) == (1, True)
    strict.wait_for_mail(1)
    assert strict.subjects() == ["known"]


NO_IDS = ["xx", "../../etc/passwd", "0660E2E85F2C029E", "0660e2e85f2c029e9", "0660E2E85F2C029E9\n", ""]


def test_review_bad_id(strict: Host) -> None:
    """What cannot be an id is a mistake in usage: 64, one line, and nothing is done, not even to the good one beside it."""
    (queue_id,) = hold(strict, "stays")
    for words in (("list",), ("release", "--yes"), ("delete", "--yes"), ("undelete", "--yes")):
        for bad in NO_IDS if words[0] == "release" else NO_IDS[:2]:
            run = strict.cli("hold", *words, "--", queue_id, bad, check=False)
            assert (run.returncode, run.stdout, run.stderr.count("\n")) == (64, "", 1), (words, bad, run.stderr)
    strict.wait_until_idle()
    assert strict.ls() == [f"hold/{queue_id}"]
    assert strict.held() == [queue_id]


def test_review_show_of_a_bad_id(strict: Host) -> None:
    """What cannot be an id is a mistake in usage for `hold show` too."""
    for bad in NO_IDS:
        run = strict.cli("hold", "show", "--", bad, check=False)
        assert (run.returncode, run.stdout, run.stderr.count("\n")) == (64, "", 1), (bad, run.stderr)


def test_review_of_a_selection_asks_first(strict: Host) -> None:
    """Without --yes and without a terminal nothing is done to a selection: 64, and no prompt."""
    ids = hold(strict, "one", "two")
    everything = sorted(f"hold/{queue_id}" for queue_id in ids)
    for words in (("delete", "--all"), ("release", "--all"), ("delete", "--vhost", A), ("release", "--reason", "limit")):
        run = strict.cli("hold", *words, check=False)
        assert run.returncode == 64, words
        assert "--yes" in run.stderr
    # A yes on standard input is not a terminal's.
    run = strict.cli("hold", "delete", "--all", check=False, stdin=None, input="y\nyes\n")
    assert run.returncode == 64
    # And without any filter nothing is selected at all.
    for verb in ("release", "delete", "undelete"):
        assert strict.cli("hold", verb, "--yes", check=False).returncode == 64
    strict.wait_until_idle()
    assert (strict.ls(), strict.mail()) == (everything, [])
    assert sorted(strict.held()) == sorted(ids)


def test_review_of_all(strict: Host) -> None:
    """delete --all --yes, undelete --all and release --all --yes do it to all."""
    ids = sorted(hold(strict, "one", "two") + hold(strict, "three", vhost=B))
    strict.cli("hold", "delete", "--all", "--yes")
    strict.wait(lambda: strict.ls() == [f"trash/{queue_id}" for queue_id in ids], "all are in the trash")
    strict.cli("hold", "undelete", "--all", "--yes")
    strict.wait(lambda: strict.ls() == [f"hold/{queue_id}" for queue_id in ids], "all are held again")
    strict.cli("hold", "release", "--all", "--yes")
    strict.wait_for_mail(3)
    strict.wait_until_idle()
    assert (strict.subjects(), strict.ls()) == (["one", "three", "two"], [])


def test_review_dry_run(strict: Host) -> None:
    """--dry-run says how many it would be, asks for nothing, and changes nothing."""
    ids = hold(strict, "one", "two", "three")
    trashed = ids.pop()
    strict.cli("hold", "delete", trashed, "--yes")
    strict.wait(lambda: f"trash/{trashed}" in strict.ls(), "one is in the trash")
    before = (strict.ls(), strict.rows(), strict.held())
    for words, count in (
        (("release", "--all"), 2),
        (("delete", "--vhost", A), 2),
        (("release", ids[0]), 1),
        (("undelete", "--all"), 1),
    ):
        run = strict.cli("hold", *words, "--dry-run")
        assert str(count) in run.stdout, (words, run.stdout)
    assert strict.stop() == 0
    strict.start()
    strict.wait_until_idle()
    assert (strict.ls(), strict.rows(), strict.held()) == before
    assert strict.mail() == []


def test_review_filters(strict: Host) -> None:
    """--vhost, --sender, --recipient, --reason, --since and --until select, alone and together, on every verb."""
    (one,) = hold(strict, "one", to="Ann <ann@x.example>", words=["boss@a.example"])
    (two,) = hold(strict, "two", to="bob@x.example, ann@y.example", words=["shop@a.example"])
    (three,) = hold(strict, "three", vhost=B, to="bob@x.example", words=["boss@b.example"])
    (four,) = hold(strict, "four", vhost=B, to="a%b@x.example", words=["boss@b.example"])
    assert strict.held() == [one, two, three, four]
    held_at = {row["queue_id"]: datetime.fromisoformat(row["held_at"]) for row in strict.json("hold", "list")}
    between = (held_at[two] + (held_at[three] - held_at[two]) / 2).isoformat().replace("+00:00", "Z")
    an_hour_later = (held_at[four] + timedelta(hours=1)).isoformat().replace("+00:00", "Z")
    selections: list[tuple[list[str], list[str]]] = [
        (["--vhost", A], [one, two]),
        (["--vhost", "www.?.example"], [one, two, three, four]),
        (["--vhost", "nobody.example"], []),
        (["--sender", "boss@a.example"], [one]),
        (["--sender", "boss@*"], [one, three, four]),
        (["--recipient", "ann@x.example"], [one]),
        (["--recipient", "ann@*"], [one, two]),
        (["--recipient", "bob@x.example"], [two, three]),
        (["--reason", "0/1h"], [one, two, three]),
        (["--reason", "no such reason"], []),
        (["--since", between], [three, four]),
        (["--until", between], [one, two]),
        (["--since", "1h"], [one, two, three, four]),
        (["--until", "1h"], []),
        (["--since", an_hour_later], []),
        (["--until", an_hour_later], [one, two, three, four]),
        (["--vhost", A, "--recipient", "bob@*"], [two]),
        (["--sender", "boss@*", "--since", between, "--reason", "0/1h"], [three]),
        ([two, four], [two, four]),
        ([two, four, "--vhost", A], [two]),
        (["--all"], [one, two, three, four]),
    ]
    for words, expected in selections:
        assert strict.held(*words) == expected, words
    # A decision selects with the same words.
    for words, expected in selections[::3]:
        run = strict.cli("hold", "delete", "--dry-run", *words)
        assert str(len(expected) or "no") in run.stdout.lower(), (words, run)
    assert [row["queue_id"] for row in strict.json("log", "--vhost", B)] == [three, four]
    assert [row["queue_id"] for row in strict.json("log", "--recipient", "bob@*")] == [two, three]
    assert [row["queue_id"] for row in strict.json("log", one)] == [one]
    strict.cli("hold", "delete", "--sender", "boss@*", "--until", between, "--yes")
    strict.wait(lambda: strict.held() == [two, three, four], "the first is deleted")
    strict.cli("hold", "release", "--recipient", "bob@*", "--yes")
    strict.wait_for_mail(2)
    strict.wait_until_idle()
    assert strict.subjects() == ["three", "two"]
    assert strict.ls() == [f"hold/{four}", f"trash/{one}"]


def test_review_filters_by_script(strict: Host) -> None:
    """--script selects by what PHP says of the script."""
    for script in ("33:contact.php", "33:order.php"):
        strict.send(A, message=text("one@x.example", subject=script, headers=f"X-PHP-Originating-Script: {script}\n"))
    strict.wait(lambda: len(strict.held()) == 2, "both are held")
    (row,) = strict.json("hold", "list", "--script", "contact")
    assert (row["subject"], row["script"]) == ("33:contact.php", "33:contact.php")


@pytest.mark.parametrize("words", [["--since", "soon"], ["--until", "2026-13-01"], ["--nonsense"], ["--since"]])
def test_review_bad_filter(strict: Host, words: list[str]) -> None:
    """A filter that is none selects nothing and does nothing: 64."""
    (queue_id,) = hold(strict, "stays")
    for verb in (["list"], ["release", "--yes"], ["delete", "--yes"]):
        run = strict.cli("hold", *verb, *words, check=False)
        assert (run.returncode, run.stdout) == (64, ""), run
    strict.wait_until_idle()
    assert strict.ls() == [f"hold/{queue_id}"]


def test_review_decides_many_in_one_go(strict: Host) -> None:
    """A selection of a hundred is released as one decision; each goes out once."""
    count = 100
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: strict.send(A, message=text("a@x.example", subject=f"mail {number}")), range(count)))
    strict.wait(lambda: len(strict.held()) == count, "all are held", timeout=60)
    strict.wait_until_idle()
    raw = {path.name: path.read_bytes().partition(b"\n\n")[2] for path in (strict.spool / "hold").iterdir()}
    assert str(count) in strict.cli("hold", "release", "--vhost", A, "--yes").stdout
    mail = strict.wait_for_mail(count)
    strict.wait_until_idle()
    assert sorted(path.read_bytes() for path in mail) == sorted(raw.values())
    assert len({subject(path.read_bytes()) for path in mail}) == count
    assert strict.ls() == []


@pytest.mark.server
def test_review_of_what_the_mta_has_refused() -> None:
    """It is listed with the MTA's words, released to whom was refused only, and deleted and undeleted as held mail is."""
    with Sink(["-f", "RCPT"]) as sink, Host(mta=smtp(sink.port)) as host:
        host.add(A)
        with host.running():
            for name in ("again", "gone"):
                host.send(A, message=text(f"{name}@x.example", "two@x.example", subject=name))
            listed = {row["subject"]: row for row in host.wait(lambda: failed(host, 2), "both have failed")}
            assert host.held() == [] and "nothing is held" in host.cli("hold", "list").stdout
            for name, row in listed.items():
                assert row["recipients"] == [f"{name}@x.example", "two@x.example"] and row["reason"].startswith("500 ")
                assert row["queue_id"] in host.cli("hold", "list", "--failed").stdout
            assert [row["subject"] for row in host.json("hold", "list", "--failed", "--recipient", "again@*")] == ["again"]
            assert len(host.json("hold", "list", "--failed", "--reason", "command failed")) == 2
            again, gone = (listed[name]["queue_id"] for name in ("again", "gone"))
            # A selection without --failed is of held mail.
            assert "no mail to release" in host.cli("hold", "release", "--all", "--yes").stdout
            assert host.cli("hold", "undelete", "--failed", "--all", "--yes", check=False).returncode == 64
            host.cli("hold", "delete", "--failed", "--recipient", "gone@*", "--yes", "--why", "spam")
            host.wait_for_ls(f"failed/{again}", f"trash/{gone}")
            host.cli("hold", "undelete", gone, "--yes")
            host.wait_for_ls(f"failed/{again}", f"hold/{gone}")
            # Refused once more, and then taken.
            host.cli("hold", "release", again)
            host.wait(lambda: len(host.rows("failed")) == 6, "it was refused again")
            host.wait_for_ls(f"failed/{again}", f"hold/{gone}")
            sink.stop()
            sink.options = []
            sink.start()
            host.cli("hold", "release", again, gone)
            delivered = sink.wait(2)
            host.wait_until_idle()
            assert host.ls() == []
    assert sorted(subject(each.data) for each in delivered) == ["again", "gone"]
    assert all(len(each.recipients) == 2 for each in delivered)


def failed(host: Host, count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = host.json("hold", "list", "--failed")
    return rows if len(rows) == count else []


@pytest.mark.server
@pytest.mark.parametrize(("decision", "place"), [("release", "active"), ("delete", "trash")])
def test_review_of_what_the_mta_has_refused_and_a_crash(decision: str, place: str) -> None:
    """A decision that is durable, whose rename a crash has prevented, is carried out by the next start: nothing is lost."""
    with Sink(["-f", "RCPT"]) as sink, Host(mta=smtp(sink.port)) as host:
        host.add(A)
        with host.running():
            host.send(A)
            (row,) = host.wait(lambda: failed(host, 1), "it has failed")
        queue_id = row["queue_id"]
        host.cli("hold", decision, queue_id, "--yes")
        sink.stop()
        # As the commit leaves it: all but the rename.
        state = {"release": "active", "delete": "trashed"}[decision]
        code = (
            "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); "
            "db.execute(\"UPDATE message SET state = ?, executed_at = 'now', refused = '[]', limited = 0, "
            'remaining = \'[\\"one@x.example\\"]\'", (sys.argv[2],)); db.commit()'
        )
        subprocess.run([sys.executable, "-c", code, host.state / "ledger.sqlite", state], check=True)
        assert host.ls() == [f"failed/{queue_id}"]
        with host.running():
            host.wait_for_ls(f"{place}/{queue_id}")
