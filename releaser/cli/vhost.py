"""secure-sendmail vhost, stop, resume: the maildrops, and who may use them."""

import os
import shlex
import sys
import time
from typing import Any

import click

from releaser import config, identity, layout, limits, policy, provision
from releaser.cli import output
from releaser.cli.context import Context, Failed, json_option, pass_context
from releaser.ledger import ACTIVE, FAILED, HELD, Ledger
from releaser.provision import Gate, Spool

# How long `vhost remove` waits for mail that the releaser is just handing over, in seconds.
PATIENCE = 10


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
    """Make the maildrop of VHOST, and whatever of the spool and the state is missing."""
    if unregistered == bool(name) or (unregistered and (users or group)):
        raise click.UsageError("give a VHOST with its --user, or alone --unregistered")
    name = layout.UNREGISTERED if unregistered else _vhost(name)
    settings = context.config
    who = who_works(settings)
    if users and who.private:
        raise click.UsageError(f"{settings.state} belongs to {identity.user(who.uid)}, who alone submits there: leave out --user")
    if not users and not who.private and not unregistered:
        raise click.UsageError("--user is missing: who sends as this vhost, such as the user of its php-fpm pool")
    gate = provision.gate(users, provision.group(group)) if users else Gate()
    provision.make_spool(settings.spool, settings.state, who)
    # With an empty ledger every listing works before the releaser's first start.
    identity.run_as(who, lambda: Ledger(settings.state, create=True).close())
    with Spool(settings.spool, who) as spool:
        target = layout.maildrop(settings.spool, name)
        with spool.inside("vhosts") as vhosts:
            if provision.exists(vhosts, name):
                raise Failed(f"{target}: exists already")
        _nothing_pending(settings, who, name)
        if users:
            config.write_vhost_file(context.file, name, users, who.gid)
        bell = os.urandom(16).hex()
        text = policy.render(settings, name, bell, settings.vhost(name).max_message_size)
        spool.rename_maildrop(spool.make_maildrop(name, gate, bell, text), name)
    _ring(settings, who)
    output.say(f"made {target}")
    if gate.uids:
        output.say("its gate is an access control list, since the user's group has other members")
    output.say(f'php_admin_value sendmail_path "{_sendmail_path(settings, name)}"')


@vhost.command("list")
@json_option
@pass_context
def list_(context: Context, as_json: bool) -> None:
    """List the vhosts that have a maildrop."""
    found: list[dict[str, Any]] = []
    for name in context.vhosts():
        settings = context.settings(name)
        found.append({"name": name, "users": list(settings.users or ()), "limits": _texts(settings.limits),
                      "count": settings.count, "over_limit": settings.over_limit, "queued": queued(context, name)})  # fmt: skip
    if as_json:
        output.as_json(found)
        return
    output.table(
        ["VHOST", "USERS", "LIMITS", "COUNTS", "OVER LIMIT", "QUEUED"],
        ([v["name"], ", ".join(v["users"]), ", ".join(v["limits"]), v["count"], v["over_limit"], v["queued"]] for v in found),
        "no vhosts; run: secure-sendmail vhost add VHOST",
    )


@vhost.command()
@click.argument("old", metavar="OLD")
@click.argument("new", metavar="NEW")
@pass_context
def rename(context: Context, old: str, new: str) -> None:
    """Give a vhost another name; its windows, held mail and users stay with it."""
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
        # First the releaser is told, so that it never takes NEW for a vhost without a past.
        by = identity.actor()
        _nothing_pending(settings, who, old)
        _nothing_pending(settings, who, new)
        identity.run_as(who, lambda: Ledger(settings.state).rename(old, new, by))
        if os.path.lexists(old_file) and not begun:
            # In both places while the maildrop changes its name, so that its users are known under either.
            os.link(old_file, new_file)
        spool.rename_maildrop(old, new)
        if os.path.lexists(old_file):
            os.unlink(old_file)
    _ring(settings, who)
    output.say(f"renamed {old} to {new}" + _releaser_note(context, who))
    if config.names(context.file, old):
        output.say(f'{context.file}: now rename [vhosts."{old}"] there, too')
    output.say(f'php_admin_value sendmail_path "{_sendmail_path(settings, new)}"')


@vhost.command()
@click.argument("name", metavar="VHOST")
@click.option("--keep-mail", is_flag=True, help="What is held or waits for the MTA stays where it is, for review.")
@click.option("--delete-mail", is_flag=True, help="Delete what waits in the maildrop; put held mail into the trash.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_context
def remove(context: Context, name: str, keep_mail: bool, delete_mail: bool, yes: bool) -> None:
    """Remove the maildrop of VHOST; while mail of it exists, only when told what to do with that."""
    if keep_mail and delete_mail:
        raise click.UsageError("either --keep-mail or --delete-mail")
    name = name if name == layout.UNREGISTERED else _vhost(name)
    settings = context.config
    who = _existing(settings)
    with Spool(settings.spool, who) as spool:
        with spool.inside("vhosts") as vhosts:
            if not provision.exists(vhosts, name):
                raise Failed(f"no vhost {name!r}; run: secure-sendmail vhost list")
        _nothing_pending(settings, who, name)
        mail = _mail(settings, who, name)
        what = ", ".join(f"{count} {kind}" for kind, count in mail.items() if count and kind in ("waiting", ACTIVE, HELD, FAILED))
        if what and not (keep_mail or delete_mail):
            raise Failed(f"{name} has mail: {what}; decide it first, or add --keep-mail or --delete-mail")
        output.say(f"remove: the maildrop of {name}" + (f" ({what})" if what else ""))
        if not yes:
            if not sys.stdin.isatty():
                raise click.UsageError("without a terminal, this vhost remove needs --yes")
            click.confirm("remove?", abort=True)
        _close(spool, name, lambda: _settled(settings, who, name, delete_mail))
        bell = identity.run_as(who, lambda: policy.bell(settings.spool, name))
        spool.rename_maildrop(name, f".{name}.removed")
        with spool.inside("vhosts") as vhosts:
            removed = provision.remove_tree(vhosts, f".{name}.removed")
        if bell:
            spool.remove_bell(bell)
        try:
            os.unlink(config.vhost_file(context.file, name))
        except FileNotFoundError:
            pass
    if delete_mail:
        by = identity.actor()
        identity.run_as(who, lambda: Ledger(settings.state).delete_held(name, by, f"vhost remove {name}"))
    _ring(settings, who)
    # The policy is a file, too.
    output.say(f"removed {name}" + (f", with {removed - 1} files of its maildrop" if delete_mail and removed > 1 else ""))


@click.command()
@click.argument("name", metavar="VHOST")
@click.option("--why", required=True, metavar="TEXT", help="The reason, for the log.")
@pass_context
def stop(context: Context, name: str, why: str) -> None:
    """Hold everything of VHOST from now on."""
    name = context.known_vhost(name)
    if not context.ledger.stop(name, identity.actor(), why):
        raise Failed(f"{name}: {context.ledger.stopped(name)} already")
    context.ring()
    output.say(f"{name}: stopped, everything is held from now on" + ("" if context.running else "; the releaser is not running"))


@click.command()
@click.argument("name", metavar="VHOST")
@click.option("--why", default="", metavar="TEXT", help="The reason, for the log.")
@pass_context
def resume(context: Context, name: str, why: str) -> None:
    """End a stop; what was held meanwhile stays held until it is released."""
    name = name.lower()
    if not context.ledger.resume(name, identity.actor(), why):
        raise Failed(f"{name}: is not stopped; run: secure-sendmail status")
    context.ring()
    output.say(f"{name}: resumed" + ("" if context.running else "; the releaser is not running"))


def queued(context: Context, name: str) -> int:
    """How many files wait in the maildrop's new/; where there is none, `check` says so."""
    return _queued(context.spool, name)


def _queued(spool: str, name: str) -> int:
    try:
        with os.scandir(f"{layout.maildrop(spool, name)}/new") as entries:
            return sum(1 for entry in entries if not entry.name.startswith("."))
    except OSError:
        return 0


def _vhost(name: str) -> str:
    name = name.lower()
    if not layout.is_vhost(name):
        raise click.UsageError(f"{name[:80]!r} is not a host name such as www.example.com")
    return name


def who_works(settings: config.Config) -> identity.Identity:
    """Who is to own spool and state; whether this process may make them so. Raises NotOurs."""
    who = identity.of(settings.spool, settings.state)
    if os.geteuid() not in (0 if not who.private else who.uid,):
        wanted = identity.user(who.uid) if who.private else "root"
        raise identity.NotOurs(f"{settings.state}: this is {identity.user(os.geteuid())}; run this as {wanted}")
    return who


def _existing(settings: config.Config) -> identity.Identity:
    who = who_works(settings)
    for directory in (settings.spool, settings.state):
        if not os.path.isdir(directory):
            raise identity.NotOurs(f"{directory}: No such file or directory; run: secure-sendmail vhost add VHOST")
    return who


def _nothing_pending(settings: config.Config, who: identity.Identity, name: str) -> None:
    """Forget a rename of NAME that was begun and not done; refuse while the releaser has not carried one over. Raises Failed."""

    def look() -> str:
        book = Ledger(settings.state)
        for old, new in book.renames():
            if name in (old, new):
                if os.path.isdir(layout.maildrop(settings.spool, new)) and not os.path.isdir(
                    layout.maildrop(settings.spool, old)
                ):
                    return f"{old} was renamed to {new}, which the releaser has not carried over yet; start it first"
                book.cancel_rename(old, new)
        return ""

    pending = identity.run_as(who, look)
    if pending:
        raise Failed(pending)


def _mail(settings: config.Config, who: identity.Identity, name: str) -> dict[str, int]:
    def count() -> dict[str, int]:
        return {"waiting": _queued(settings.spool, name), **Ledger(settings.state).mail_of(name)}

    found: dict[str, int] = identity.run_as(who, count)
    return found


def _settled(settings: config.Config, who: identity.Identity, name: str, delete_mail: bool) -> str:
    """Why the maildrop cannot be taken away yet; empty where it can."""
    mail = _mail(settings, who, name)
    if mail["waiting"] and not delete_mail:
        return f"{mail['waiting']} messages wait in its maildrop; start the releaser, which takes them, and run this again"
    if mail["in flight"]:
        return f"{mail['in flight']} messages are with the MTA; run this again"
    return ""


def _close(spool: Spool, name: str, obstacle: Any) -> None:
    """Close the gate, and wait until nothing of the maildrop is needed any more. Raises Failed with the gate open again."""
    with spool.inside("vhosts") as vhosts:
        gate = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=vhosts)
    try:
        mode = os.fstat(gate).st_mode & 0o7777
        os.fchmod(gate, 0o700)
        end = time.monotonic() + PATIENCE
        while (why := obstacle()) and time.monotonic() < end:
            time.sleep(0.1)
        if why:
            os.fchmod(gate, mode)
            raise Failed(f"{name}: {why}")
    finally:
        os.close(gate)


def _ring(settings: config.Config, who: identity.Identity) -> None:
    def ring() -> None:
        try:
            os.utime(f"{settings.spool}/wake/{layout.CONTROL_BELL}")
        except OSError:
            # Its scan finds it, too.
            pass

    identity.run_as(who, ring)


def _releaser_note(context: Context, who: identity.Identity) -> str:
    return "" if identity.run_as(who, lambda: context.is_running(context.config.spool)) else "; the releaser is not running"


def _texts(found: tuple[limits.Limit, ...]) -> list[str]:
    return [limit.text for limit in found] or ["unlimited"]


def _sendmail_path(settings: config.Config, name: str) -> str:
    """PHP's setting for vhost NAME; every vhost gives its own name also to the shared maildrop."""
    shown = "VHOST" if name == layout.UNREGISTERED else name
    spool = [] if settings.spool == config.SECTIONS[""]["spool"].default else ["--spool", settings.spool]
    return f"{shlex.join([_enqueue(), *spool, shown])} -t -i"


def _enqueue() -> str:
    """The enqueue command that was installed beside this one."""
    beside = os.path.join(os.path.dirname(os.path.realpath(sys.argv[0])), "secure-sendmail-enqueue")
    return beside if os.path.exists(beside) else "secure-sendmail-enqueue"
