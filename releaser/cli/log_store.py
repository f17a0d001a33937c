"""secure-sendmail log init, migrate, gc, forget: the tables in MySQL, and what is taken out of the log."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import click

from releaser import mysql_log
from releaser.cli import output
from releaser.cli.context import Context, Failed, pass_context
from releaser.cli.select import time_
from releaser.config import Mysql
from releaser.ledger import utc
from releaser.logbook import InMysql
from releaser.mysql_log import SCHEMA_VERSION, LogError, Retired

DIRECTORY = Path(__file__).resolve().parents[2] / "config"
# Seconds that rows on their way to MySQL have to arrive.
PATIENCE = 30
# Behind every time that a row can have.
LAST = "9999-12-31T23:59:59.999999Z"


def _tables(verb: Callable[..., None]) -> Callable[..., None]:
    """Give VERB the options of those that make tables."""
    for option in (
        click.option("--password-file", metavar="FILE", help="That user's password."),
        click.option("--user", metavar="NAME", help="Another MySQL user than the configured one, who may do that."),
        click.option("--print", "only_print", is_flag=True, help="Print the SQL, and do nothing."),
    ):
        verb = option(verb)
    return verb


@click.command("init")
@_tables
@pass_context
def log_init(context: Context, only_print: bool, user: str | None, password_file: str | None) -> None:
    """Make the tables in the configured database. Safe to run again."""
    schema = _read("schema.sql")
    if only_print:
        click.echo(schema, nl=False)
        return
    server = _server(context, user, password_file)
    try:
        version = mysql_log.initialise(server, schema)
    except LogError as error:
        output.complain(f"{server.database}: {error}; let a user who may create tables run this:")
        click.echo(schema, nl=False)
        raise click.exceptions.Exit(1) from None
    output.say(f"the tables of the log are in {server.database}")
    if version < SCHEMA_VERSION:
        output.say(f"they are of version {version}, this program's are of {SCHEMA_VERSION}; run: secure-sendmail log migrate")


@click.command("migrate")
@_tables
@pass_context
def log_migrate(context: Context, only_print: bool, user: str | None, password_file: str | None) -> None:
    """Bring older tables up to this version. Safe to run again, also after an end halfway, and while mail goes out.

    Rows wait in the ledgers of all hosts meanwhile.
    """
    steps = {version: _read(f"schema.{version}.sql") for version in range(2, SCHEMA_VERSION + 1)}
    if only_print:
        for text in steps.values():
            click.echo(text, nl=False)
        return
    server = _server(context, user, password_file)
    try:
        made = mysql_log.migrate(server, steps)
    except LogError as error:
        raise Failed(f"{server.database}: {error}; that user needs CREATE, ALTER, INDEX, INSERT and SELECT") from None
    for version in made:
        output.say(f"{server.database}: the tables of the log are of version {version} now")
    if not made:
        output.say(f"{server.database}: the tables of the log are of this program's version already")


def _read(name: str) -> str:
    try:
        return (DIRECTORY / name).read_text(encoding="utf-8")
    except OSError as error:
        raise Failed(f"{DIRECTORY / name}: {error.strerror}") from None


def _server(context: Context, user: str | None, password_file: str | None) -> Mysql:
    server = context.config.mysql
    if server is None:
        raise Failed(f"{context.file}: no [mysql] section: the ledger keeps the log, and needs no tables")
    return server if user is None else replace(server, user=user, password_file=password_file)


@click.command("forget")
@click.argument("address")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_context
def log_forget(context: Context, address: str, yes: bool) -> None:
    """Take a recipient's or sender's ADDRESS out of the log, for good.

    Its rows stay, with (forgotten) in its place and without a subject: in the ledger, in what waits for MySQL, and in MySQL.
    Mail to or from it that still lies here is named, and stays.
    """
    if "@" not in address:
        raise click.UsageError(f"{address[:80]!r} is not an address")
    output.confirm("log forget", f"forget {address} in the log?", yes)
    book, server = context.ledger, context.config.mysql
    count = book.forget(address)
    if server is not None:
        # What was on its way meanwhile has arrived by then.
        until = time.monotonic() + PATIENCE
        while book.outbox() and context.running and time.monotonic() < until:
            time.sleep(0.1)
        try:
            count = max(count, InMysql(server).forget(address, book.privacy.hashed(address)))
        except LogError as error:
            raise Failed(f"MySQL: {error}; it is forgotten in the ledger alone, run this again") from None
    output.say(f"forgotten in {count} row{'' if count == 1 else 's'} of the log")
    here = book.lies_here(address)
    if here:
        output.say(f"mail to or from {address} still lies here, hold delete removes it: {' '.join(here)}")


@click.command("gc")
@click.option("--node", metavar="NODE", required=True, help="Whose rows: the first column of the table in MySQL.")
@click.option("--until", metavar="TIME", callback=time_, help="Only those logged until then: 2026-05-01, or 30d ago as 30d.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_context
def log_gc(context: Context, node: str, until: float | None, dry_run: bool, yes: bool) -> None:
    """Delete a retired host's rows from MySQL.

    Or those of a ledger that was replaced. Of a host that works, this one among them, only with --until; the rows of mail that
    still lies here always stay.
    """
    server, book = context.config.mysql, context.ledger
    if server is None:
        raise Failed(f"{context.file}: no [mysql] section: the ledger keeps the log, of this host alone")
    if node == book.node and until is None:
        raise Failed(f"{node} is this host's own node; say with --until which of its rows, such as --until 30d")
    try:
        with closing(Retired(server, book, node, utc(until) if until is not None else LAST)) as retired:
            if not retired.rows:
                output.say(f"{server.database} has no such rows of node {node}")
                return
            output.say(f"{retired.rows} rows of node {node}, host {retired.host}, the last of {retired.last[:19]}Z")
            if dry_run:
                return
            output.confirm("log gc", "delete?", yes)
            output.say(f"{sum(retired.delete())} rows deleted")
    except LogError as error:
        raise Failed(f"{server.database}: {error}") from None


VERBS = (log_init, log_migrate, log_gc, log_forget)
