"""secure-sendmail vhost, stop, resume: the maildrops, and who may use them."""

import os
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import click

from releaser import config, daemon, identity, layout, limits, policy, provision
from releaser.cli import output
from releaser.cli.context import Context, Failed, json_option, pass_context, ring
from releaser.ledger import ACTIVE, FAILED, HELD, Ledger
from releaser.provision import Gate, Spool

# How long `vhost remove` waits for mail that the releaser is just handing over, in seconds.
PATIENCE = 10
NOT_RUNNING = "; the releaser is not running"


@click.group()
def vhost() -> None:
    """Maildrops of vhosts."""


@vhost.command()
@click.argument("name", metavar="[VHOST]", default="")
@click.option("--user", "users", multiple=True, metavar="NAME", help="Who sends as VHOST; may be given again.")
@click.option("--group", metavar="NAME", help="The users' group, if it is not the first one's own.")
@click.option("--unregistered", is_flag=True, help="Make the one shared maildrop, for all vhosts that are not added.")
@pass_context
def add(context: Context, name: str, users: tuple[str, ...], group: str | None, unregistered: bool) -> None:
    """Make the maildrop of VHOST. Whatever of the spool and the state is missing is made, too."""
    if unregistered == bool(name) or (unregistered and (users or group)):
        raise click.UsageError("give a VHOST, with --user NAME where customers have users of their own, or alone --unregistered")
    name = layout.UNREGISTERED if unregistered else _vhost(name)
    settings = context.config
    who = who_works(settings)
    if (users or unregistered) and who.private and os.geteuid() == 0 and not os.path.isdir(settings.state):
        raise Failed(
            f"there is no user {identity.USER}; make it (systemd-sysusers php-secure-sendmail.conf), or, for a spool that root "
            f"alone uses, first: mkdir -m 700 {shlex.quote(settings.state)}"
        )
    if users and who.private:
        raise click.UsageError(f"{settings.state} belongs to {identity.user(who.uid)}, who alone submits there: leave out --user")
    if not users and not who.private and not unregistered:
        raise click.UsageError("--user is missing: who sends as this vhost, such as the user of its php-fpm pool")
    gate = Gate()
    if users:
        try:
            users = config.users(list(users))
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        gate = provision.gate(users, provision.group(group))
    provision.make_spool(settings.spool, settings.state, who)
    # With an empty ledger every listing works before the releaser's first start.
    identity.run_as(who, lambda: Ledger(settings.state, create=True).close())
    with Spool(settings.spool, who) as spool:
        target = layout.maildrop(settings.spool, name)
        with spool.inside("vhosts") as vhosts:
            if provision.exists(vhosts, name):
                raise Failed(f"{target}: exists already")
        _nothing_pending(settings, who, name)
        written = bool(users) and config.write_vhost_file(context.file, name, users, who.gid)
        bell = os.urandom(16).hex()
        try:
            text = policy.render(settings, name, bell, settings.vhost(name).max_message_size)
            spool.rename_maildrop(spool.make_maildrop(name, gate, bell, text), name)
        except BaseException:
            spool.remove_bell(bell)
            if written:
                os.unlink(config.vhost_file(context.file, name))
            raise
    identity.run_as(who, partial(_ring, settings.spool))
    output.say(f"made {target}")
    if gate.uids:
        output.say("its gate is an access control list: no group has exactly these users")
    _say_lines(settings, name)


@vhost.command("list")
@json_option
@pass_context
def list_(context: Context, as_json: bool) -> None:
    """List the vhosts that have a maildrop."""
    found: list[dict[str, Any]] = []
    for name in context.vhosts:
        settings = context.settings(name)
        found.append({"name": name, "users": list(settings.users or ()), "limits": _texts(settings.limits),
                      "count": settings.count, "over_limit": settings.over_limit,
                      "queued": queued(context.spool, name)})  # fmt: skip
    if as_json:
        output.as_json(found)
        return
    output.table(
        ["VHOST", "USERS", "LIMITS", "COUNTS", "OVER LIMIT", "QUEUED"],
        ([v["name"], ", ".join(v["users"]), ", ".join(v["limits"]), v["count"], v["over_limit"], v["queued"]] for v in found),
        "no vhosts; run: secure-sendmail vhost add --help",
    )


@vhost.command()
@click.argument("old", metavar="OLD")
@click.argument("new", metavar="NEW")
@pass_context
def rename(context: Context, old: str, new: str) -> None:
    """Give a vhost another name. Its windows, held mail and users stay with it."""
    old, new = _vhost(old), _vhost(new)
    settings = context.config
    who = _existing(settings)
    old_file, new_file = config.vhost_file(context.file, old), config.vhost_file(context.file, new)
    with Spool(settings.spool, who) as spool:
        with spool.inside("vhosts") as vhosts:
            if not provision.exists(vhosts, old):
                raise Failed(f"no vhost {old!r}; run: secure-sendmail vhost list")
            # An interrupted rename has left the same file under both names.
            begun = os.path.lexists(new_file) and os.path.lexists(old_file) and os.path.samefile(old_file, new_file)
            if provision.exists(vhosts, new) or (os.path.lexists(new_file) and not begun):
                raise Failed(f"{new}: exists already")
        _nothing_pending(settings, who, old)
        _nothing_pending(settings, who, new)
        # First the releaser is told, so that it never takes NEW for a vhost without a past.
        by = identity.actor()
        identity.run_as(who, lambda: Ledger(settings.state).rename(old, new, by))
        if os.path.lexists(old_file) and not begun:
            # In both places while the maildrop changes its name, so that its users are known under either.
            os.link(old_file, new_file)
        spool.rename_maildrop(old, new)
        if os.path.lexists(old_file):
            os.unlink(old_file)
    running = identity.run_as(who, partial(_ring, settings.spool))
    output.say(f"renamed {old} to {new}" + ("" if running else NOT_RUNNING))
    if config.has_section(context.file, old):
        output.say(f'{context.file}: now rename [vhosts."{old}"] there, too; until then the default limits hold')
    output.say(f"tell PHP at once, until then mail of {old} is refused:")
    _say_lines(settings, new)


@vhost.command()
@click.argument("name", metavar="VHOST")
@click.option("--keep-mail", is_flag=True, help="What is held or waits for the MTA stays where it is.")
@click.option(
    "--delete-mail",
    is_flag=True,
    help="Delete what waits in the maildrop, put held mail into the trash. What the MTA has deferred is still tried, "
    "what it has refused stays in failed/.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_context
def remove(context: Context, name: str, keep_mail: bool, delete_mail: bool, dry_run: bool, yes: bool) -> None:
    """Remove the maildrop of VHOST. While mail of it exists, only when told what to do with that."""
    if keep_mail and delete_mail:
        raise click.UsageError("either --keep-mail or --delete-mail")
    name = name if name == layout.UNREGISTERED else _vhost(name)
    settings = context.config
    who = _existing(settings)
    aside = f".{name}.removed"
    with Spool(settings.spool, who) as spool:
        with spool.inside("vhosts") as vhosts:
            there, begun = provision.exists(vhosts, name), provision.exists(vhosts, aside)
        if not there and not begun:
            raise Failed(f"no vhost {name!r}; run: secure-sendmail vhost list")
        _nothing_pending(settings, who, name)
        mail = _mail(settings, who, name)
        what = ", ".join(f"{count} {kind}" for kind, count in mail.items() if count and kind in ("waiting", ACTIVE, HELD, FAILED))
        if what and not (keep_mail or delete_mail):
            raise Failed(f"{name} has mail: {what}; decide it first, or add --keep-mail or --delete-mail")
        output.say(f"remove: the maildrop of {name}" + (f" ({what})" if what else ""))
        if dry_run:
            return
        output.confirm("vhost remove", "remove?", yes)
        if not there:
            # A remove that was interrupted is done again: the directory is the last that goes.
            spool.rename_maildrop(aside, name)
        elif begun:
            with spool.inside("vhosts") as vhosts:
                provision.remove_tree(vhosts, aside)
        mode = _close(spool, name, lambda: _obstacle(settings, who, name, delete_mail))
        bell = identity.run_as(who, lambda: policy.bell(settings.spool, name))
        spool.rename_maildrop(name, aside)
        if not delete_mail and identity.run_as(who, lambda: _files(f"{settings.spool}/vhosts/{aside}/new")):
            # In private mode no gate keeps its one user out.
            spool.rename_maildrop(aside, name)
            _set_mode(spool, name, mode)
            raise Failed(f"{name}: mail has come in meanwhile; run this again")
        if bell and layout.is_bell(bell):
            spool.remove_bell(bell)
        try:
            os.unlink(config.vhost_file(context.file, name))
        except FileNotFoundError:
            pass
        by = identity.actor()
        if delete_mail:
            identity.run_as(who, lambda: Ledger(settings.state).delete_held(name, by, f"vhost remove {name}"))
        parts = [f"{settings.spool}/vhosts/{aside}/{part}" for part in ("tmp", "new")]
        files = identity.run_as(who, lambda: sum(map(_files, parts)))
        deleted = f"{files} file{'' if files == 1 else 's'} of its maildrop deleted" if files else ""
        identity.run_as(who, lambda: Ledger(settings.state).removed(name, deleted, by))
        with spool.inside("vhosts") as vhosts:
            provision.remove_tree(vhosts, aside)
    identity.run_as(who, partial(_ring, settings.spool))
    output.say(f"removed {name}" + (f", {deleted}" if deleted else ""))


@click.command()
@click.argument("name", metavar="VHOST")
@click.option("--why", required=True, metavar="TEXT", help="The reason, for the log.")
@pass_context
def stop(context: Context, name: str, why: str) -> None:
    """Hold everything of VHOST from now on. Of _unregistered: everything that comes through the shared maildrop."""
    if not why.strip():
        raise click.UsageError("--why is empty: say for the log why it is stopped")
    name = context.known_vhost(name)
    if not context.ledger.stop(name, identity.actor(), why):
        raise Failed(f"{name}: is {context.ledger.stopped(name)}, already")
    ring(context.spool)
    claimed = "it has no maildrop of its own: what claims this name through the shared one" if name not in context.vhosts else ""
    output.say(f"{name}: stopped, {claimed or 'everything'} is held from now on" + ("" if context.running else NOT_RUNNING))


@click.command()
@click.argument("name", metavar="VHOST")
@click.option("--why", default="", metavar="TEXT", help="The reason, for the log.")
@pass_context
def resume(context: Context, name: str, why: str) -> None:
    """End a stop. What was held meanwhile stays held until it is released."""
    name = name.lower()
    if not context.ledger.resume(name, identity.actor(), why):
        raise Failed(f"{name}: is not stopped; run: secure-sendmail status")
    ring(context.spool)
    output.say(f"{name}: resumed" + ("" if context.running else NOT_RUNNING))


def queued(spool: str, name: str) -> int:
    """How many files wait in the maildrop's new/; where there is none, `check` says so."""
    try:
        return _files(f"{layout.maildrop(spool, name)}/new")
    except OSError:
        return 0


def _files(directory: str) -> int:
    try:
        with os.scandir(directory) as entries:
            return sum(1 for entry in entries if not entry.name.startswith("."))
    except FileNotFoundError:
        return 0


def who_works(settings: config.Config) -> identity.Identity:
    """Who is to own spool and state; only who may make them so gets an answer. Raises NotOurs."""
    who = identity.of(settings.spool, settings.state)
    wanted = who.uid if who.private else 0
    if os.geteuid() != wanted:
        raise identity.NotOurs(f"{settings.state}: this is {identity.user(os.geteuid())}; run this as {identity.user(wanted)}")
    return who


def _vhost(name: str) -> str:
    name = name.lower()
    if not layout.is_vhost(name):
        raise click.UsageError(f"{name[:80]!r} is not a host name such as www.example.com")
    return name


def _existing(settings: config.Config) -> identity.Identity:
    who = who_works(settings)
    for directory in (settings.spool, settings.state):
        if not os.path.isdir(directory):
            raise identity.NotOurs(f"{directory}: No such file or directory; run: secure-sendmail check --repair")
    return who


def _nothing_pending(settings: config.Config, who: identity.Identity, name: str) -> None:
    """Forget a rename of NAME that was begun and not done; refuse while the releaser has not carried one over. Raises Failed."""

    def look() -> str:
        book = Ledger(settings.state)
        for old, new in book.renames():
            if name in (old, new):
                old_there, new_there = (os.path.isdir(layout.maildrop(settings.spool, part)) for part in (old, new))
                if new_there and not old_there:
                    return f"{old} was renamed to {new}, which the releaser has not carried over yet; start it first"
                book.cancel_rename(old, new)
        return ""

    pending = identity.run_as(who, look)
    if pending:
        raise Failed(pending)


def _mail(settings: config.Config, who: identity.Identity, name: str) -> dict[str, int]:
    def count() -> dict[str, int]:
        return {"waiting": _files(f"{layout.maildrop(settings.spool, name)}/new"), **Ledger(settings.state).mail_of(name)}

    found: dict[str, int] = identity.run_as(who, count)
    return found


def _obstacle(settings: config.Config, who: identity.Identity, name: str, delete_mail: bool) -> str:
    """Why the maildrop cannot be taken away yet; empty where it can."""
    mail = _mail(settings, who, name)
    if mail["waiting"] and not delete_mail:
        return (
            f"{_messages(mail['waiting'])} wait in its maildrop, which the releaser has not taken (does it run, does the MTA "
            "answer? secure-sendmail check); run this again, or with --delete-mail"
        )
    if mail["in flight"]:
        return f"{_messages(mail['in flight'])} are with the MTA; run this again"
    return ""


def _messages(count: int) -> str:
    return f"{count} message" if count == 1 else f"{count} messages"


def _close(spool: Spool, name: str, obstacle: Callable[[], str]) -> int:
    """Close the gate, and wait until nothing of the maildrop is needed any more; return the mode that it had.

    Raises Failed; the gate is open again then.
    """
    mode = _set_mode(spool, name, 0o700)
    try:
        end = time.monotonic() + PATIENCE
        while (why := obstacle()) and time.monotonic() < end:
            time.sleep(0.1)
        if why:
            raise Failed(f"{name}: {why}")
    except BaseException:
        _set_mode(spool, name, mode)
        raise
    return mode


def _set_mode(spool: Spool, name: str, mode: int) -> int:
    """Give the gate of NAME another mode; return the one that it had."""
    with spool.inside("vhosts") as vhosts:
        gate = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=vhosts)
    try:
        before = os.fstat(gate).st_mode & 0o7777
        os.fchmod(gate, mode)
    finally:
        os.close(gate)
    return before


def _ring(spool: str) -> bool:
    """Wake the releaser; whether there is one."""
    ring(spool)
    return daemon.running(spool)


def _texts(found: tuple[limits.Limit, ...]) -> list[str]:
    return [limit.text for limit in found] or ["unlimited"]


def _say_lines(settings: config.Config, name: str) -> None:
    """PHP's setting for vhost NAME; with the shared maildrop every vhost gives its own name."""
    shown = "VHOST" if name == layout.UNREGISTERED else name
    spool = [] if settings.spool == config.SECTIONS[""]["spool"].default else ["--spool", settings.spool]
    line = f"{shlex.join([_enqueue(), *spool, shown])} -t -i"
    output.say(f'Apache:  php_admin_value sendmail_path "{line}"')
    output.say(f'php-fpm: php_admin_value[sendmail_path] = "{line}"')


def _enqueue() -> str:
    """The enqueue command that was installed beside this one."""
    beside = os.path.join(os.path.dirname(os.path.realpath(sys.argv[0])), "secure-sendmail-enqueue")
    return beside if os.path.exists(beside) else "secure-sendmail-enqueue"
