"""secure-sendmail log show, top, trace: what became of the mail."""

import csv
import json
import re
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

import click

from releaser import layout, logbook
from releaser.cli import output
from releaser.cli.context import Context, Failed, json_option, pass_context
from releaser.cli.select import Filters, filters
from releaser.ledger import ACTIVE, CORRUPT, FAILED, HELD, LOG_COLUMNS, TRASHED, Row
from releaser.logbook import InLedger, InMysql, Source
from releaser.mysql_log import LogError
from releaser.visible import visible

SHOWN = [
    "logged_at", "event", "queue_id", "vhost", "sender", "recipient", "subject", "script", "reason", "mta_queue_id", "actor",
]  # fmt: skip
# Rows of a page; messages that trace tells of.
PAGE, TRACED = 100, 10
# Seconds between looks for new rows.
FOLLOW = 1
DAY = 86400
# What stands before that which a spreadsheet takes for the begin of a formula; some take the wide forms, too.
_FORMULA = re.compile(r"""(?:^|;)(?=[\s"]*[=+\-@'\uff1d\uff0b\uff0d\uff20])""")
BY = ("vhost", "script", "sender", "domain", "recipient")


class _DefaultGroup(click.Group):
    """A group whose verb `show` need not be named: `log --vhost V` is `log show --vhost V`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ("-h", "--help")):
            args = ["show", *args]
        return super().parse_args(ctx, args)


@click.group("log", cls=_DefaultGroup)
def log_() -> None:
    """What became of every mail.

    `show` need not be named: `log --vhost V` is `log show --vhost V`; `log show --help` has the filters.
    """


source_option = click.option(
    "--source", "wanted", type=click.Choice(["mysql", "ledger"]), help="Default: mysql where it is configured and answers."
)


def _source(context: Context, wanted: str | None) -> Source:
    """MySQL where that is configured and answers, unless the ledger is WANTED. Raises Failed."""
    server = context.config.mysql
    if wanted == "mysql" and server is None:
        raise Failed(f"{context.file}: no [mysql] section: the ledger keeps the log")
    if server is None or wanted == "ledger":
        return InLedger(context.ledger)
    # Its password is the releaser's.
    context.settle()
    try:
        return InMysql(server)
    except LogError as error:
        if wanted == "mysql":
            raise Failed(f"MySQL: {error}") from None
        output.complain(f"MySQL: {error}; this is from the ledger of this host, which keeps less")
        return InLedger(context.ledger)


@log_.command("show")
@filters
@click.option("--event", metavar="NAME", help="Only this event: released, held, deferred, failed, deleted, …")
@click.option("--last", type=click.IntRange(1, 10**9), metavar="N", help=f"Only the last N rows; default for people: {PAGE}.")
@click.option("--page", type=click.IntRange(1, 10**6), metavar="K", help="The K-th page of so many rows, from the newest.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is logged on this host, until interrupted.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV that a spreadsheet takes for text.")
@source_option
@json_option
@pass_context
def log_show(
    context: Context, chosen: Filters, event: str | None, last: int | None, page: int | None, follow: bool, as_csv: bool,
    wanted: str | None, as_json: bool,
) -> None:  # fmt: skip
    """A row per event and recipient. Oldest first."""
    if (as_csv and as_json) or (follow and (page or wanted == "mysql")):
        raise click.UsageError("--csv and --json exclude each other, and so does --follow with --page and --source mysql")
    if follow:
        _follow(context, chosen, event, last, _line(as_csv, as_json))
        return
    source = _source(context, wanted)
    condition, values = chosen.log_condition(source, context.ledger.privacy.hashed, event)
    # A program wants all, a person does not.
    if last is None and (page is not None or not (as_json or as_csv or chosen.everything)):
        last = PAGE
    try:
        if last is None:
            rows: Iterable[dict[str, Any]] = logbook.everything(source, condition, values)
        else:
            rows = logbook.newest(source, condition, values, last, last * ((page or 1) - 1))
        if as_json:
            output.as_json_array(rows)
        elif as_csv:
            write = _line(as_csv, as_json)
            for row in rows:
                write(row)
        else:
            _show(source, list(rows), last, page or 1)
    except LogError as error:
        raise Failed(f"MySQL: {error}") from None


def _show(source: Source, rows: list[dict[str, Any]], last: int | None, page: int) -> None:
    output.table([name.upper() for name in SHOWN], ([row[name] for name in SHOWN] for row in rows), "nothing is logged")
    older = f"; for what is older: --page {page + 1}" if len(rows) == last else ""
    output.say(f"from {source.name}{older}")


def _follow(
    context: Context, chosen: Filters, event: str | None, last: int | None, write: Callable[[dict[str, Any]], None]
) -> None:
    source = InLedger(context.ledger)
    condition, values = chosen.log_condition(source, context.ledger.privacy.hashed, event)
    shown = 0
    rows = logbook.newest(source, condition, values, last or 10)
    try:
        while True:
            for row in rows:
                write(row)
                shown = max(shown, row["seq"])
            sys.stdout.flush()
            time.sleep(FOLLOW)
            rows = list(logbook.everything(source, f"{condition} AND seq > ?", [*values, shown]))
    except KeyboardInterrupt:
        return


def _line(as_csv: bool, as_json: bool) -> Callable[[dict[str, Any]], None]:
    """What prints one row."""
    if as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(LOG_COLUMNS)
        return lambda row: writer.writerow([_cell(row[name]) for name in LOG_COLUMNS])
    if as_json:
        return lambda row: print(json.dumps(row))
    names = [name for name in SHOWN if name not in ("subject", "script")]
    return lambda row: print("  ".join(visible(str(row[name])) for name in names if row[name]))


def _cell(value: object) -> object:
    """VALUE as a spreadsheet shows it: what begins as a formula does would be one; also behind a semicolon, at which those of
    many countries begin a cell, whatever is quoted."""
    if value is None or isinstance(value, int):
        return value
    return _FORMULA.sub(r"\g<0>'", visible(str(value)))


@click.command()
@click.option(
    "--by", type=click.Choice(BY), default="vhost", show_default=True, help="What is counted for; domain: of the recipients."
)
@filters
@click.option("--most", type=click.IntRange(1, 10**6), default=10, show_default=True, metavar="N", help="So many of them.")
@source_option
@json_option
@pass_context
def top(context: Context, by: str, chosen: Filters, most: int, wanted: str | None, as_json: bool) -> None:
    """Who sends most, in the last day or between --since and --until.

    MESSAGES are counted once; RELEASED, HELD and FAILED are recipients.
    """
    source = _source(context, wanted)
    condition, values = chosen.log_condition(source, context.ledger.privacy.hashed)
    if chosen.since is None and chosen.until is None and not chosen.everything:
        condition, values = f"{condition} AND logged_at >= ?", [*values, source.time(time.time() - DAY)]
    try:
        found = logbook.top(source, by, condition, values, most)
    except LogError as error:
        raise Failed(f"MySQL: {error}") from None
    if as_json:
        output.as_json(found)
        return
    columns = ("messages", "released", "held", "failed")
    output.table(
        [*(name.upper() for name in columns), by.upper()],
        ([*(of[name] for name in columns), of["name"] or "(none)"] for of in found),
        "nothing was sent in that time",
    )
    output.say(f"from {source.name}")


@click.command()
@click.argument("what", metavar="ADDRESS|QUEUE-ID|MESSAGE-ID")
@click.option("--last", type=click.IntRange(1, 10**4), default=TRACED, show_default=True, metavar="N", help="So many messages.")
@source_option
@json_option
@pass_context
def trace(context: Context, what: str, last: int, wanted: str | None, as_json: bool) -> None:
    """What became of a mail, in sentences.

    By a recipient's address, by our queue id or the MTA's, or by the Message-ID, with or without its brackets.
    """
    source = _source(context, wanted)
    try:
        ids = _messages(source, what, context.ledger.privacy.hashed(what), last)
        rows = _rows_of(source, ids)
    except LogError as error:
        raise Failed(f"MySQL: {error}") from None
    stories = [(queue_id, [row for row in rows if row["queue_id"] == queue_id]) for queue_id in ids]
    if as_json:
        output.as_json([{"queue_id": queue_id, "now": _now(context, queue_id), "events": events} for queue_id, events in stories])
    elif not stories:
        output.say(
            f"{source.name} knows of no mail of {what}: it was not submitted here, is not picked up yet (status counts what is "
            "queued), or is older than the log"
        )
    for queue_id, events in stories if not as_json else ():
        for sentence in _story(events):
            output.say(sentence)
        now = _now(context, queue_id)
        if now:
            output.say(f"  now         {now}")
    if not stories:
        raise click.exceptions.Exit(1)
    if not as_json:
        more = f"; the last {last} messages, for more: --last {last * 10}" if len(ids) == last else ""
        output.say(f"from {source.name}{more}")


def _messages(source: Source, what: str, hashed: str, most: int) -> list[str]:
    """The queue ids of the last MOST messages that WHAT, or HASHED in its place, means, oldest first."""
    if layout.is_queue_id(what):
        conditions = [("queue_id = ?", [what])]
    elif what.startswith("<"):
        conditions = [("message_id = ?", [what])]
    elif "@" in what:
        address = f"{source.lower('recipient')} IN (?, ?)"
        conditions = [(address, [what.lower(), hashed]), ("message_id = ?", [f"<{what}>"])]
    else:
        conditions = [("mta_queue_id = ?", [what])]
    for condition, values in conditions:
        sql = f"SELECT queue_id, max(logged_at) AS latest FROM mail_log WHERE {condition} AND queue_id <> '' GROUP BY queue_id"
        found = list(source.select(f"{sql} ORDER BY latest DESC LIMIT ?", [*values, most]))
        if found:
            return [row["queue_id"] for row in found][::-1]
    return []


def _rows_of(source: Source, ids: list[str]) -> list[dict[str, Any]]:
    if not ids:
        return []
    return list(logbook.everything(source, f"queue_id IN ({', '.join('?' * len(ids))})", ids))


def _story(events: list[dict[str, Any]]) -> Iterable[str]:
    """What the log has of one message; events of several recipients at one time are one sentence."""
    first = events[0]
    origin = f", by {first['script']}" if first["script"] else ""
    claimed = "" if first["verified"] else " (which it only claims)"
    yield f"{first['queue_id']}  {first['vhost']}{claimed}, uid {first['uid']}{origin}"
    yield f"  subject     {first['subject'] or '(none)'}"
    yield f"  sender      {first['sender'] or '<>'}"
    yield f"  Message-ID  {first['message_id']}"
    if first["arrived_at"]:
        yield f"  {_at(first['arrived_at'])}  accepted from the script"
    told: list[tuple[dict[str, Any], list[str]]] = []
    for event in events:
        same = ("logged_at", "event", "reason", "mta_queue_id", "actor")
        if told and all(told[-1][0][name] == event[name] for name in same):
            told[-1][1].append(event["recipient"])
        else:
            told.append((event, [event["recipient"]]))
    for event, recipients in told:
        shown = ", ".join(recipients[:5]) + (f" and {len(recipients) - 5} more" if len(recipients) > 5 else "")
        yield (
            f"  {_at(event['logged_at'])}  {shown}: {_sentence(event)}"
            if shown
            else f"  {_at(event['logged_at'])}  {_sentence(event)}"
        )


def _at(text: str) -> str:
    return f"{text[:10]} {text[11:19]}Z"


def _sentence(event: dict[str, Any]) -> str:
    reason, actor, queue_id = event["reason"], event["actor"], event["mta_queue_id"]
    why = f": {reason}" if reason else ""
    by = f" by {actor}" if actor else ""
    if event["event"] == "released":
        next_step = f"taken by the MTA as {queue_id}; look for that in the MTA's log" if queue_id else "taken by the MTA"
        return f"{next_step} ({reason}{by})" if reason or by else next_step
    return {
        "held": f"held for review{by}{why}",
        "deferred": f"the MTA does not take it now, it is tried again{why}",
        "failed": f"refused by the MTA{why}",
        "retried": f"tried again, it may have gone out twice{why}",
        "unknown": f"nobody knows whether it went out{why}",
        "deleted": f"deleted{by}{why}",
        "undeleted": f"back in the hold queue{by}{why}",
        "corrupt": f"no message that could be read, put aside in corrupt/{why}",
    }.get(event["event"], f"{event['event']}{by}{why}")


def _now(context: Context, queue_id: str) -> str:
    """What can still become of it, of which only the ledger knows; empty where it has ended, or is another host's."""
    row = context.ledger.row(queue_id)
    if row is None:
        return ""
    return _waits(row, context)


def _waits(row: Row, context: Context) -> str:
    pending = f"{row.decision} is recorded, by {row.actor}" if row.decision and row.executed_at is None else ""
    if row.state == ACTIVE and row.next_try is not None:
        stamp = datetime.utcfromtimestamp(context.ledger.clock.wall(row.next_try)).isoformat(sep=" ", timespec="seconds")
        return f"waits for the MTA, next try {stamp}Z"
    return {
        ACTIVE: "on its way to the MTA",
        HELD: pending or f"held; secure-sendmail hold show {row.queue_id}, then hold release or hold delete",
        TRASHED: pending or f"deleted; secure-sendmail hold undelete {row.queue_id} brings it back",
        FAILED: pending or f"kept in failed/; secure-sendmail hold release {row.queue_id} tries it again",
        CORRUPT: "in corrupt/",
    }.get(row.state, "")
