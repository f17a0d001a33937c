"""Everything that is said to MySQL, as a real server has heard it, in words that MySQL 8 has as well as MariaDB.

What no parser can tell is listed in README: whether both mean the same by it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlglot
from host import Host, text
from mariadb import MariaDB
from sqlglot import exp
from test_e2e_mysql_outage import logging_to, make_tables, password, server

__all__ = ["password", "server"]

ROOT = Path(__file__).parent.parent
VHOST = "www.a.example"
# The modules that have SQL for MySQL.
MODULES = ("releaser/mysql_log.py", "releaser/logbook.py", "releaser/cli/log.py", "releaser/cli/filesystem.py")
STATEMENT = re.compile(r"(SELECT|INSERT|DELETE|UPDATE|SET|ALTER|CREATE|DROP|REPLACE) ")

# Functions and variables that the manual of MySQL 8.0 has, of those that are used.
FUNCTIONS = {"COUNT", "MAX", "SUM", "LOWER", "SUBSTRING_INDEX", "GET_LOCK", "CASE", "IF", "AND", "OR", "NOT"}
VARIABLES = {"max_allowed_packet", "datadir"}
SETTINGS = {"time_zone", "sql_mode", "innodb_lock_wait_timeout", "lock_wait_timeout", "autocommit"}
# Words that MySQL 8 keeps for itself and MariaDB does not: no name of ours. From its manual, "Keywords and Reserved Words".
RESERVED = {
    "cube", "cume_dist", "dense_rank", "empty", "except", "first_value", "function", "grouping", "groups",
    "intersect", "json_table", "lag", "last_value", "lateral", "lead", "library", "manual", "nth_value",
    "ntile", "of", "over", "parallel", "percent_rank", "qualify", "rank", "recursive", "row_number",
    "stored", "system", "tablesample", "virtual", "window",
}  # fmt: skip


def parsed(statement: str) -> exp.Expression:
    """The tree of STATEMENT; an AssertionError where it has what MySQL has not."""
    try:
        tree = sqlglot.parse_one(statement, read="mysql")
    except sqlglot.errors.ParseError as error:
        raise AssertionError(f"{statement}: {error}") from None
    plain = isinstance(tree, exp.Commit | exp.Transaction)
    assert plain or isinstance(tree, exp.Select | exp.Insert | exp.Delete | exp.Create | exp.Alter | exp.Set), statement
    for node in tree.walk():
        assert not isinstance(node, exp.Command | exp.Returning), statement
        if isinstance(node, exp.Func):
            name = node.name if isinstance(node, exp.Anonymous) else node.sql_names()[0]
            assert name.upper() in FUNCTIONS, f"{name}: {statement}"
        if isinstance(node, exp.SessionParameter):
            assert node.name.lower() in VARIABLES, statement
        if isinstance(node, exp.Identifier) and not node.args.get("quoted"):
            assert node.name.lower() not in RESERVED, f"{node.name}: {statement}"
        if isinstance(node, exp.EngineProperty):
            assert node.name == "InnoDB", statement
        if isinstance(node, exp.SetItem) and isinstance(node.this, exp.EQ):
            assert node.this.this.name.lower() in SETTINGS, statement
    if isinstance(tree, exp.Create):
        assert not tree.args.get("replace"), statement
    if isinstance(tree, exp.Alter):
        # MariaDB alone can add what is not there, and drop what is.
        assert not re.search(r"\bIF\s+(NOT\s+)?EXISTS\b", statement, re.IGNORECASE), statement
    return tree


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM mail_log WHERE seq = 1 RETURNING seq", "CREATE OR REPLACE TABLE t (a INT)", "SELECT NEXT VALUE FOR s",
        "ALTER TABLE mail_log ADD COLUMN IF NOT EXISTS a INT", "SELECT seq FROM mail_log LIMIT 1 ROWS EXAMINED 5",
        "CREATE TABLE t (a INT) ENGINE = Aria", "SET STATEMENT max_statement_time = 1 FOR SELECT 1", "CREATE TABLE t (a INET6)",
        "SELECT JSON_DETAILED('{}')", "SELECT COUNT(*) AS rank FROM mail_log", "SET max_statement_time = 1",
        "SELECT @@version_ssl", "garbage here", "DROP TABLE mail_log WAIT 5",
    ],
)  # fmt: skip
def test_what_mysql_has_not_is_found(statement: str) -> None:
    with pytest.raises(AssertionError):
        parsed(statement)


def in_source() -> Iterator[tuple[str, re.Pattern[str]]]:
    """Where each statement of the modules stands, and what it looks like when a server hears it."""
    for module in MODULES:
        for node in ast.walk(ast.parse((ROOT / module).read_text())):
            parts: list[str | None] = []
            if isinstance(node, ast.JoinedStr):
                parts = [each.value if isinstance(each, ast.Constant) else None for each in node.values]  # type: ignore[misc]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [node.value]
            if not parts or not STATEMENT.match(parts[0] or ""):
                continue
            pattern = ".*".join(re.sub(r"%s|\\\?", ".*", re.escape(part)) if part is not None else "" for part in parts)
            yield f"{module}:{node.lineno}: {parts[0]}", re.compile(pattern, re.DOTALL)


@pytest.mark.server
@pytest.mark.timeout(300)
def test_everything_that_mysql_hears(server: MariaDB, password: Path) -> None:
    """Every verb and the releaser; each statement of the source is heard, and all that is heard is MySQL's."""
    server.root("SET GLOBAL log_output = 'TABLE', GLOBAL general_log = ON")
    as_creator = ("--user", "creator", "--password-file", str(password))
    with Host(default=["3/1h"], extra=logging_to(server, password, 'retention = "1h"\n')) as host:
        make_tables(host, password)
        host.cli("log", "migrate", *as_creator)
        version_1(server)
        host.cli("log", "migrate", *as_creator)
        host.add(VHOST)
        with host.running():
            for number in range(5):
                host.send(VHOST, message=text(f"r{number}@x.example", subject=f"mail {number}"))
            host.wait(lambda: len(server.rows()) == 5, "all is shipped")
        # Of another ledger with this node, as after a restore; refused for what it has; long ago.
        columns = ", ".join(name for (name,) in server.root(COLUMNS) if name != "seq")
        server.root(f"INSERT INTO mail_log (seq, {columns}) SELECT 7, {columns} FROM mail_log WHERE seq = 1")
        server.root("ALTER TABLE mail_log ADD CONSTRAINT short CHECK (CHAR_LENGTH(subject) < 20)")
        server.root("UPDATE mail_log SET logged_at = '2020-01-01' WHERE seq < 3")
        with host.running():
            host.send(VHOST, message=text("r@x.example", subject="x" * 100))
            host.send(VHOST, message=text("r@x.example", subject="short"))
            host.wait(lambda: len(host.rows()) == 7 and not host.json("status")["outbox"], "all is shipped", timeout=60)
            host.wait(lambda: not server.root("SELECT 1 FROM mail_log WHERE logged_at < '2021-01-01'"), "old rows go", timeout=60)
        row = host.json("log", "--last", "1")[0]
        for words in (
            ["--last", "2", "--page", "2"], ["--sender", "a@b.example"], ["--sender", "*@b.example", "--reason", "x"],
            ["--recipient", "r@x.example", "--event", "held"],
            ["--vhost", "*.example", "--script", "x", "--since", "1d", "--until", "1m"],
            [row["queue_id"], "--csv"],
        ):  # fmt: skip
            host.cli("log", "show", *words)
        for by in ("vhost", "script", "sender", "domain", "recipient"):
            host.cli("top", "--by", by)
        for what in ("r@x.example", row["queue_id"], row["message_id"], "4ABCDEF"):
            host.cli("trace", what, check=False)
        host.cli("check")
        host.cli("log", "forget", "r@x.example", "--yes")
        host.cli("log", "gc", "--node", row["node"], "--until", "1s", "--yes")
    heard = [
        str(found[0], "utf-8") if isinstance(found[0], bytes) else str(found[0])
        for found in server.root(
            "SELECT argument FROM mysql.general_log WHERE command_type = 'Query' AND user_host NOT LIKE 'root%'"
        )
    ]
    assert len(heard) > 100
    for statement in dict.fromkeys(heard):
        parsed(statement)
    missing = [where for where, pattern in in_source() if not any(pattern.match(statement) for statement in heard)]
    assert not missing
    assert len(list(in_source())) >= 15
    # In files, for those who run them by hand.
    for file in sorted((ROOT / "config").glob("schema*.sql")):
        for statement in re.sub(r"^\s*--.*$", "", file.read_text(), flags=re.MULTILINE).split(";"):
            assert not statement.strip() or parsed(statement)


COLUMNS = "SELECT column_name FROM information_schema.columns WHERE table_name = 'mail_log' AND generation_expression IS NULL"


def version_1(server: MariaDB) -> None:
    """Make the tables what version 1 has made."""
    server.root(
        "ALTER TABLE mail_log DROP KEY mail_log_event, DROP KEY mail_log_sender, DROP KEY mail_log_recipient_lower, "
        "DROP KEY mail_log_message_id, DROP KEY mail_log_mta_queue_id, ADD KEY mail_log_recipient (recipient(191))"
    )
    server.root("ALTER TABLE mail_log DROP COLUMN sender_lower, DROP COLUMN recipient_lower")
    server.root("DELETE FROM mail_log_schema")
    server.root("INSERT INTO mail_log_schema VALUES (1)")
