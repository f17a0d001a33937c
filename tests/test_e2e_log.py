"""What people ask the log: filters, pages, CSV, following, top and trace, out of MySQL and out of the ledger alike."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from host import COMMAND, Host, text
from mariadb import PASSWORD, MariaDB
from servers import YES, Scripted

pytestmark = pytest.mark.server

A, B = "www.a.example", "www.b.example"
FORMULA = '=HYPERLINK("http://evil.example","click")'
SOURCES = ("ledger", "mysql")


def answer(line: bytes) -> bytes | None:
    for word, reply in ((b"RCPT TO:<no@", b"550 no such user"), (b"RCPT TO:<later@", b"451 greylisted")):
        if line.startswith(word):
            return reply
    return b"250 2.0.0 Ok: queued as 4F9A1C2D" if line == b"." else YES


@pytest.fixture(scope="module")
def server() -> Iterator[MariaDB]:
    with MariaDB() as running:
        yield running


@pytest.fixture(scope="module")
def host(server: MariaDB, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Mail of two vhosts: sent, held, deleted, refused, put off; all of it in MySQL, too."""
    password = tmp_path_factory.mktemp("secret") / "password"
    password.write_text(PASSWORD)
    password.chmod(0o600)
    section = f'[mysql]\nhost = "127.0.0.1"\nport = {server.port}\npassword_file = "{password}"\n'
    with Scripted(answer) as mta, Host(mta.url, default=["6/1h"], extra=section) as made:
        made.cli("vhost", "add", A)
        made.cli("vhost", "add", B)
        made.cli("log", "init", "--user", "creator", "--password-file", str(password))
        made.start()
        script = "X-PHP-Originating-Script: 33:mailer_50%.php\n"
        made.send(
            A, message=text("One@X.example", "two@y.example", subject="both", headers=f"{script}Message-ID: <m1@a.example>\n")
        )
        made.send(A, message=text("no@x.example", subject="refused"))
        made.send(A, message=text("later@x.example", subject=FORMULA))
        made.wait_for_row("deferred")
        made.send(B, message=text("one@x.example", subject="from b"))
        for number in range(4):
            made.send(A, message=text("one@x.example", subject=f"burst {number}"))
        made.wait(lambda: len(made.held()) == 2, "what is over the limit is held")
        made.cli("hold", "delete", made.held()[0], "--yes", "--why", "spam, +1")
        made.wait_for_row("deleted")
        made.wait(lambda: len(server.rows()) == len(made.rows()), "all is shipped")
        yield made
        made.stop()


def log(host: Host, source: str, *words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = host.json("log", "--source", source, *words)
    return found


def test_log_is_the_same_out_of_both(host: Host) -> None:
    """Row by row and column by column; MySQL is asked where it is configured, and the answer says whom it is from."""
    assert log(host, "mysql") == log(host, "ledger") == host.json("log")
    assert len(log(host, "ledger")) >= 10
    assert host.cli("log").stdout.splitlines()[-1].strip() == "from MySQL (127.0.0.1)"
    assert "from the ledger of this host" in host.cli("log", "--source", "ledger").stdout


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("words", "expected"), [
    (["--vhost", A, "--event", "released"], 4),
    (["--vhost", "WWW.B.example"], 1),
    (["--vhost", "www.?.example", "--event", "held"], 2),
    (["--vhost", "*_*"], 0),
    (["--recipient", "one@x.example", "--event", "released"], 4),
    (["--recipient", "ONE@*", "--event", "released"], 4),
    (["--recipient", "%@x.example"], 0),
    (["--script", "mailer_50%"], 2),
    (["--script", "mailer!50"], 0),
    (["--reason", "6/1h", "--event", "held"], 2),
    (["--reason", "GREYLISTED"], 1),
    (["--sender", "nobody@*"], 0),
    (["--since", "1h", "--event", "failed"], 1),
    (["--until", "1h"], 0),
    (["--since", "2020-01-01", "--until", "2020-01-02"], 0),
])  # fmt: skip
def test_filters(host: Host, source: str, words: list[str], expected: int) -> None:
    """The same rows out of both, whatever a pattern of SQL would make of the words."""
    assert len(log(host, source, *words)) == expected


@pytest.mark.parametrize("source", SOURCES)
def test_pages(host: Host, source: str) -> None:
    """Page by page from the newest, each oldest first, is all of it."""
    everything = log(host, source)
    pages = [log(host, source, "--last", "4", "--page", str(page)) for page in range(1, 6)]
    assert [row for page in reversed(pages) for row in page] == everything
    assert log(host, source, "--last", "3") == everything[-3:]
    shown = host.cli("log", "--source", source, "--last", "4").stdout
    assert "--page 2" in shown and len([line for line in shown.splitlines() if "Z" in line]) >= 4
    assert host.cli("log", "--page", "2", "--follow", check=False).returncode == 64
    assert host.cli("log", "--source", "mysql", "--follow", check=False).returncode == 64


@pytest.mark.parametrize("source", SOURCES)
def test_csv_is_text_to_a_spreadsheet(host: Host, source: str) -> None:
    """Every row, with the names of the columns; nothing that a customer writes begins as a formula does."""
    rows = list(csv.DictReader(io.StringIO(host.cli("log", "--source", source, "--csv").stdout)))
    assert [row["seq"] for row in rows] == [str(row["seq"]) for row in log(host, source)]
    (formula,) = {row["subject"] for row in rows if "HYPERLINK" in row["subject"]}
    assert formula == f"'{FORMULA}"
    assert not any(value.startswith(("=", "+", "-", "@")) for row in rows for value in row.values())
    assert host.cli("log", "--csv", "--json", check=False).returncode == 64


@pytest.mark.parametrize("source", SOURCES)
def test_top(host: Host, source: str) -> None:
    """Who sends most, by what is asked; messages once, recipients as they ended."""

    def top(*words: str) -> dict[str, tuple[int, ...]]:
        rows = host.json("top", "--source", source, "--until", "2099-01-01", *words)
        return {row["name"]: (row["messages"], row["released"], row["held"], row["failed"]) for row in rows}

    by_vhost = top()
    assert next(iter(by_vhost)) == A and by_vhost[A] == (7, 4, 2, 1)
    assert top("--by", "domain")["y.example"] == (1, 1, 0, 0)
    (script,) = [name for name in top("--by", "script", "--vhost", A) if "mailer_50%.php" in name]
    assert top("--by", "script", "--vhost", A)[script] == (1, 2, 0, 0)
    assert list(top("--most", "1")) == [A]
    assert host.json("top", "--until", "2020-01-01") == []
    shown = host.cli("top", "--source", source).stdout
    assert A in shown and "MESSAGES" in shown


@pytest.mark.parametrize("source", SOURCES)
def test_trace(host: Host, source: str) -> None:
    """By each name that a mail has, in sentences that say what to look for next."""

    def trace(what: str) -> str:
        return str(host.cli("trace", "--source", source, what).stdout)

    rows = log(host, source)
    both = next(row for row in rows if row["subject"] == "both")
    for what in (both["queue_id"], "<m1@a.example>", "m1@a.example", "two@y.example", "TWO@Y.example"):
        said = trace(what)
        assert f"{both['queue_id']}  {A}" in said and "taken by the MTA as 4F9A1C2D; look for that in the MTA's log" in said
        assert said.count("accepted from the script") == 1
    assert "mailer_50%.php" in trace(both["queue_id"])
    assert "refused by the MTA: 550 no such user" in trace("no@x.example") and "hold release" in trace("no@x.example")
    assert "the MTA does not take it now, it is tried again: 451 greylisted" in trace("later@x.example")
    assert "waits for the MTA, next try 2" in trace("later@x.example")
    said = trace("one@x.example")
    assert "held for review: over limit 6/1h" in said and "deleted by root: spam, +1" in said
    assert "hold undelete" in said and "then hold release or hold delete" in said
    assert trace("4F9A1C2D").count(" subject ") > host.cli("trace", "--last", "2", "4F9A1C2D").stdout.count(" subject ") == 2
    (story,) = host.json("trace", "m1@a.example")
    assert story["queue_id"] == both["queue_id"] and [event["event"] for event in story["events"]] == ["released"] * 2
    unknown = host.cli("trace", "--source", source, "nobody@nowhere.example", check=False)
    assert unknown.returncode == 1 and "knows of no mail of nobody@nowhere.example" in unknown.stdout


def test_log_without_mysql(host: Host, server: MariaDB, tmp_path: Path) -> None:
    """Where MySQL is away the ledger answers, and that is said; who wants MySQL alone is told why not."""
    rows = log(host, "ledger")
    server.stop()
    try:
        run = host.cli("log", "--json")
        assert json.loads(run.stdout) == rows
        assert "MySQL: " in run.stderr and "from the ledger of this host" in run.stderr
        run = host.cli("log", "--source", "mysql", check=False)
        assert run.returncode == 1 and "MySQL: " in run.stderr and "Traceback" not in run.stderr
        assert "4F9A1C2D" in host.cli("trace", "m1@a.example").stdout
    finally:
        server.start()
    with Host() as plain:
        plain.add(A)
        run = plain.cli("log", "--source", "mysql", check=False)
        assert run.returncode == 1 and "no [mysql] section" in run.stderr


def test_follow(host: Host) -> None:
    """What is logged from now on is printed as it comes, until interrupted."""
    command = [COMMAND, "--config", host.config, "log", "-f", "--json", "--last", "1", "--vhost", B]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None and following.stderr is not None
        try:
            assert json.loads(following.stdout.readline())["subject"] == "from b"
            host.send(A, message=text("later@x.example", subject="another's"))
            host.send(B, message=text("two@x.example", subject="followed"))
            row = json.loads(following.stdout.readline())
            assert (row["subject"], row["vhost"]) == ("followed", B)
        finally:
            following.send_signal(signal.SIGINT)
        assert following.wait(30) == 0 and following.stderr.read() == ""
