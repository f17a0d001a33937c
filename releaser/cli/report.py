"""secure-sendmail status, limits: what is going on."""

import time
from typing import Any

import click

from releaser import mysql_log, policy, usage
from releaser.cli import output
from releaser.cli.context import Context, json_option, pass_context
from releaser.cli.vhost import queued
from releaser.config import uid_of
from releaser.ledger import ACTIVE, CORRUPT, FAILED, HELD, utc
from releaser.limits import Account


@click.command()
@json_option
@pass_context
def status(context: Context, as_json: bool) -> None:
    """Counts of the queues, and each vhost's windows."""
    counts = context.ledger.counts()
    held = context.ledger.held_by_vhost()
    names = context.vhosts
    facts: dict[str, Any] = {
        "running": context.running,
        "queued": sum(queued(context.spool, name) for name in names),
        "active": counts.get(ACTIVE, 0),
        "held": counts.get(HELD, 0),
        "failed": counts.get(FAILED, 0),
        "corrupt": counts.get(CORRUPT, 0),
        # Without a [mysql] section the ledger keeps the log itself, and nothing waits.
        "outbox": context.ledger.outbox() if context.config.mysql else 0,
        "log_waits": context.ledger.waits() if context.config.mysql else {},
        "observe": [name for name in names if context.settings(name).over_limit == "observe"],
        "stopped": context.ledger.stops(),
        "refused": [
            {"vhost": vhost, "sentence": sentence}
            for name in names
            for vhost, sentence in policy.refusals(context.spool, name, time.time())
        ],
        "incidents": [
            {
                "vhost": incident.vhost,
                "since": utc(context.ledger.clock.wall(incident.opened_at)),
                "limit": incident.limit_text,
                "held": incident.held,
            }
            for incident in context.ledger.incidents()
            if incident.ended_at is None
        ],
        "vhosts": [
            {"name": name, "held": held.get(name, 0), "windows": windows(context, name)}
            # Also those that have mail here, and no maildrop of their own.
            for name in sorted({*names, *held})
        ],
    }
    if as_json:
        output.as_json(facts)
        return
    output.say("the releaser is running" if facts["running"] else "the releaser is not running")
    if facts["observe"]:
        output.say(f'over_limit is "observe", mail over a limit is sent: {", ".join(facts["observe"])}')
    for sentence in mysql_log.waiting(facts["log_waits"], facts["outbox"]):
        output.say(sentence)
    for stop in facts["stopped"]:
        output.say(f"stopped: {stop['vhost']} since {stop['since'][:19]}Z by {stop['actor']}: {stop['why']}")
    for refused in facts["refused"]:
        output.say(f"refused: mail of {refused['vhost']}: {refused['sentence']}")
    for incident in facts["incidents"]:
        count = f"{incident['held']} over limit {incident['limit']}"
        output.say(f"incident: {incident['vhost']} since {incident['since'][:19]}Z, {count}")
    output.say("  ".join(f"{name} {facts[name]}" for name in ("queued", "active", "held", "failed", "corrupt", "outbox")))
    output.table(
        ["VHOST", "HELD", "USED"],
        (
            [v["name"], v["held"], "  ".join(f"{w['used']} of {w['text']}" for w in v["windows"]) or "unlimited"]
            for v in facts["vhosts"]
        ),
        "no vhosts; run: secure-sendmail vhost add VHOST",
    )


@click.group("limits")
def limits_() -> None:
    """Limits of vhosts."""


@limits_.command("show")
@click.argument("name", metavar="VHOST")
@json_option
@pass_context
def limits_show(context: Context, name: str, as_json: bool) -> None:
    """Every window of VHOST, with what is used of it now.

    With [limits] shared_uid also those of the users that it shares with other vhosts.
    """
    name = context.known_vhost(name)
    settings, found, shared = context.settings(name), windows(context, name), shared_windows(context, name)
    if as_json:
        facts = {"vhost": name, "count": settings.count, "over_limit": settings.over_limit, "windows": found, "shared": shared}
        output.as_json(facts)
        return
    output.say(f"{name}: counts {settings.count}, over the limit: {settings.over_limit}")
    _table(found)
    for of in shared:
        output.say(f"shared_uid: {of['user']}, a user of {of['vhosts']} vhosts; above it each has its share")
        _table(of["windows"])


def _table(found: list[dict[str, Any]]) -> None:
    output.table(["LIMIT", "USED", "LEFT"], ([w["text"], w["used"], max(w["limit"] - w["used"], 0)] for w in found), "unlimited")


def windows(context: Context, name: str) -> list[dict[str, Any]]:
    """The windows of vhost NAME as the releaser counts them: limit, seconds, used, and the configuration's text."""
    return _windows(context, usage.account(context.ledger, name, context.settings(name)))


def shared_windows(context: Context, name: str) -> list[dict[str, Any]]:
    """Those of each user of vhost NAME whose limit it shares: user, uid, the number of its vhosts, and windows."""
    config = context.config
    return [
        {
            "user": user,
            "uid": uid,
            "vhosts": config.sharers(user),
            "windows": _windows(context, usage.account_of_uid(context.ledger, uid, config)),
        }
        for user in context.settings(name).users or ()
        if (uid := uid_of(user)) is not None and config.shares_uid(name, uid) and config.sharers(user) > 1
    ]


def _windows(context: Context, account: Account) -> list[dict[str, Any]]:
    used = account.used(context.ledger.clock.now())
    return [{"limit": limit.count, "seconds": limit.seconds, "used": n, "text": limit.text} for limit, n in used]
