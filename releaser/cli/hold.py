"""secure-sendmail hold: review of what the releaser holds."""

import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

import click
from rich.progress import Progress

from releaser import envelope, identity, layout, mailqueue
from releaser.cli import output
from releaser.cli.context import Context, Failed, json_option, pass_context, ring
from releaser.cli.select import Filters, filters
from releaser.ledger import ACTIVE, CORRUPT, DECISIONS, DONE, FAILED, HELD, TRASHED, UNKNOWN, Row

ONE_RECIPIENT = "EXISTS (SELECT 1 FROM json_each(remaining) WHERE lower(value) GLOB ?)"
ONE_REFUSED = "EXISTS (SELECT 1 FROM json_each(refused) WHERE lower(json_extract(value, '$[0]')) GLOB ?)"
QUEUE_OF = {HELD: "hold", TRASHED: "trash", FAILED: "failed", CORRUPT: "corrupt", ACTIVE: "active"}
# How long a verb waits for the releaser to carry out what it has recorded, in seconds.
PATIENCE = 10
SHOWN_LINES = 40
# Decisions are said one by one up to this many.
ROWS_SAID = 20


@click.group()
def hold() -> None:
    """Review held mail."""


@hold.command("list")
@filters
@json_option
@click.option("--deleted", is_flag=True, help="List what was deleted and can be undeleted.")
@click.option("--failed", is_flag=True, help="List what the MTA has refused for good.")
@pass_context
def list_(context: Context, chosen: Filters, as_json: bool, deleted: bool, failed: bool) -> None:
    """List held mail, oldest first."""
    if deleted and failed:
        raise click.UsageError("--deleted or --failed, not both")
    rows = _pages(context, chosen, TRASHED if deleted else FAILED if failed else HELD)
    if as_json:
        output.as_json([_facts(row) for row in rows])
        return
    columns = ["QUEUE ID", "SINCE", "VHOST", "REASON", "SENDER", "RECIPIENTS", "SIZE", "SUBJECT", "SCRIPT (CLAIMED)"]
    output.table(
        columns,
        (
            [row.queue_id, (row.held_at or row.picked_up_at)[:19] + "Z", row.vhost, _why(row), row.sender or "<>",
             _few(row.concerned), row.size, row.subject, row.script]
            for row in rows
        ),
        "nothing is deleted" if deleted else "nothing has failed" if failed else "nothing is held",
    )  # fmt: skip


@hold.command()
@click.argument("queue_id", metavar="ID")
@click.option("--raw", is_flag=True, help="Write the message itself, byte for byte as it would be sent (lines ended by LF).")
@json_option
@pass_context
def show(context: Context, queue_id: str, raw: bool, as_json: bool) -> None:
    """Show one message."""
    if not layout.is_queue_id(queue_id):
        raise click.BadParameter(f"{queue_id[:40]!r} is not a queue id such as 06437E2A4F1B2C0A1")
    row = context.ledger.row(queue_id)
    if row is None:
        raise Failed(f"no message {queue_id!r}")
    if as_json:
        output.as_json({**_facts(row), "state": row.state, "cwd": row.cwd, "uid": row.uid, "verified": bool(row.verified),
                        "message_id": row.message_id, "arrived_at": row.arrived_at, "actor": row.actor})  # fmt: skip
        return
    if row.state not in QUEUE_OF:
        raise Failed(f"{queue_id}: {_ended(row)}; its text is gone")
    path = layout.path(context.spool, QUEUE_OF[row.state], queue_id)
    try:
        if row.state == CORRUPT:
            raise Failed(f"{queue_id}: corrupt ({row.reason}); the file is {path}")
        found, stream = mailqueue.read(path)
    except (OSError, envelope.NoLayout, envelope.NewerLayout) as error:
        raise Failed(f"{path}: {error}; run: secure-sendmail check") from None
    with stream:
        if raw:
            shutil.copyfileobj(stream, sys.stdout.buffer)
            sys.stdout.buffer.flush()
            return
        facts = [
            ("state", row.state), ("vhost", row.vhost if row.verified else f"{row.vhost} (claimed)"),
            ("reason", row.reason), ("sender", row.sender or "<>"),
            *(("recipient", recipient) for recipient in found.recipients), *(("failed", words) for words in found.failed),
            ("held at", row.held_at or ""), ("arrived", row.arrived_at), ("uid", row.uid), ("script (claimed)", row.script),
            ("cwd (claimed)", row.cwd), ("program (claimed)", found.program), ("size", row.size),
        ]  # fmt: skip
        for key, value in facts:
            output.say(f"{key + ':':18} {value}")
        print()
        for number, line in enumerate(iter(lambda: stream.readline(2000), b"")):
            if number == SHOWN_LINES:
                output.say(f"… (all of it: secure-sendmail hold show {queue_id} --raw)")
                break
            output.say(line.decode("utf-8", "replace").rstrip("\n"))


def _verb(name: str, text: str) -> None:
    @hold.command(name, help=text)
    @filters
    @click.option("--failed", is_flag=True, help="Of what the MTA has refused, instead of what is held; not needed with ids.")
    @click.option("--why", default="", metavar="TEXT", help="The reason, for the log.")
    @click.option("--dry-run", is_flag=True, help="Only say what would be done.")
    @click.option("--yes", is_flag=True, help="Do not ask.")
    @pass_context
    def verb(context: Context, chosen: Filters, failed: bool, why: str, dry_run: bool, yes: bool) -> None:
        _decide(context, name, chosen, failed, why, dry_run, yes)


_verb("release", "Send held mail now, or once more what the MTA has refused.")
_verb("delete", "Put held or refused mail into the trash; undelete takes it back.")
_verb("undelete", "Take deleted mail back into the hold queue.")


def _decide(context: Context, decision: str, chosen: Filters, failed: bool, why: str, dry_run: bool, yes: bool) -> None:
    if not chosen.ids and not chosen.given and not chosen.everything:
        raise click.UsageError(f"which mail? Give ids, a filter, or --all: secure-sendmail hold {decision} --help")
    states = DECISIONS[decision]
    if failed and FAILED not in states:
        raise click.UsageError(f"--failed: what the MTA has refused is released or deleted, not {decision}d")
    if failed:
        states = (FAILED,)
    elif not chosen.ids:
        states = states[:1]
    rows = _select(context, chosen, *states)
    others = [queue_id for queue_id in chosen.ids if queue_id not in {row.queue_id for row in rows}]
    refused = [sentence for queue_id in dict.fromkeys(others) if (sentence := _refusal(context, queue_id, decision))]
    for sentence in refused:
        output.complain(sentence)
    if rows:
        by_vhost = {vhost: sum(1 for row in rows if row.vhost == vhost) for vhost in sorted({row.vhost for row in rows})}
        output.say(f"{decision}: {_messages(len(rows))} ({', '.join(f'{v}: {n}' for v, n in by_vhost.items())})")
    elif not refused:
        output.say(f"no mail to {decision}")
    if rows and not dry_run:
        # Mail named one by one and sent on needs no second word; a selection, and anything removed, does.
        if decision == "delete" or chosen.given or chosen.everything:
            output.confirm(f"hold {decision}", f"{decision}?", yes)
        done = context.ledger.decide(decision, [row.queue_id for row in rows], identity.actor(), why)
        ring(context.spool)
        taken = {row.queue_id for row in rows} - set(done)
        for queue_id in sorted(taken):
            refused.append(_refusal(context, queue_id, decision) or f"{queue_id}: decided by someone else meanwhile")
            output.complain(refused[-1])
        _follow(context, decision, done)
    if refused:
        raise click.exceptions.Exit(1)


def _follow(context: Context, decision: str, queue_ids: list[str]) -> None:
    """Say what became of the decisions, waiting a little for the releaser."""
    if not queue_ids:
        return
    if not context.running:
        output.say("recorded; the releaser is not running")
        return
    waiting = set(queue_ids)
    started = last = time.monotonic()
    with Progress(disable=not sys.stdout.isatty(), transient=True) as progress:
        bar = None
        while waiting and time.monotonic() - last < PATIENCE:
            before, asked = len(waiting), time.monotonic()
            waiting &= set(context.ledger.undone(decision))
            asking = time.monotonic() - asked
            if len(waiting) < before:
                last = time.monotonic()
            if bar is None and time.monotonic() - started > 1:
                bar = progress.add_task(decision, total=len(queue_ids))
            if bar is not None:
                progress.update(bar, completed=len(queue_ids) - len(waiting))
            if waiting:
                # The releaser needs the time more than the bar does.
                time.sleep(max(0.02, 5 * asking))
    for queue_id in queue_ids[:ROWS_SAID]:
        row = context.ledger.row(queue_id)
        if row is not None:
            output.say(f"{row.queue_id}: {_ended(row)}")
    if len(queue_ids) > ROWS_SAID:
        more = f", {_messages(len(waiting))} not yet through" if waiting else ""
        output.say(f"… and {len(queue_ids) - ROWS_SAID} more{more}")
    lost = [row for row in map(context.ledger.row, queue_ids[:ROWS_SAID]) if row is not None and row.state == UNKNOWN]
    if lost:
        raise click.exceptions.Exit(1)


def _refusal(context: Context, queue_id: str, decision: str) -> str:
    """Why QUEUE_ID cannot be decided so; empty where it can, and only the filter leaves it out."""
    row = context.ledger.row(queue_id)
    if row is None:
        return f"{queue_id}: no such message"
    if row.state in DECISIONS[decision]:
        pending = row.decision and row.executed_at is None
        return f"{queue_id}: {row.decision} is recorded already, by {row.actor}" if pending else ""
    already = "already " if row.decision == decision else ""
    return f"{queue_id}: not {decision}d now, it is {already}{_ended(row)}"


def _ended(row: Row) -> str:
    """What has become of ROW, in a sentence."""
    by = f" by {row.actor} at {row.executed_at}" if row.decision and row.executed_at else ""
    if row.decision and not row.executed_at:
        return f"{row.decision} is recorded, by {row.actor}"
    if row.state == ACTIVE:
        way = "deferred by the MTA, is tried again" if row.deferred_at else "on its way to the MTA"
        return f"released{by}, {way}" if row.decision == "release" else way
    if row.state == DONE:
        return f"released{by}, sent" if row.decision == "release" else "sent"
    return {
        HELD: f"back in the hold queue{by}" if row.decision == "undelete" else "held",
        TRASHED: f"deleted{by}",
        FAILED: f"refused by the MTA{by and ', released' + by}",
        CORRUPT: f"corrupt: {row.reason}",
    }.get(row.state, "its outcome is unknown")


def _select(context: Context, chosen: Filters, *states: str) -> list[Row]:
    rows = []
    for state in states:
        where, values = _condition(chosen, state)
        rows += context.ledger.rows(where, *values)
    return rows


def _pages(context: Context, chosen: Filters, state: str) -> Iterator[Row]:
    """What _select() finds, as it is read: whoever reads it slowly keeps no transaction open."""
    where, values = _condition(chosen, state)
    last = ""
    while page := context.ledger.rows(f"{where} AND queue_id > ?", *values, last, most=output.PAGE):
        yield from page
        last = page[-1].queue_id


def _condition(chosen: Filters, state: str) -> tuple[str, list[object]]:
    # When it failed is in the log alone.
    columns = ("picked_up_at", ONE_REFUSED, "refused") if state == FAILED else ("held_at", ONE_RECIPIENT)
    condition, values = chosen.condition(*columns)
    return f"state = ? AND {condition}", [state, *values]


def _why(row: Row) -> str:
    return row.refused[-1][1] if row.state == FAILED and row.refused else row.reason


def _facts(row: Row) -> dict[str, Any]:
    return {
        "queue_id": row.queue_id,
        "vhost": row.vhost,
        "reason": _why(row),
        "sender": row.sender,
        "recipients": row.concerned,
        "size": row.size,
        "subject": row.subject,
        "script": row.script,
        "held_at": row.held_at,
    }


def _few(recipients: list[str]) -> str:
    shown = ", ".join(recipients[:3])
    return f"{shown} and {len(recipients) - 3} more" if len(recipients) > 3 else shown


def _messages(count: int) -> str:
    return f"{count} message" if count == 1 else f"{count} messages"
