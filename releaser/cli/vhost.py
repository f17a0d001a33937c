"""secure-sendmail vhost: the maildrops. In private mode, where one uid owns everything and submits."""

import os
import shlex
import shutil
import sys

import click

from releaser import config, layout, limits, policy, private
from releaser.cli import output
from releaser.cli.context import Context, Failed, json_option, pass_context
from releaser.ledger import Ledger


@click.group()
def vhost() -> None:
    """Maildrops of vhosts."""


@vhost.command()
@click.argument("name", metavar="VHOST")
@pass_context
def add(context: Context, name: str) -> None:
    """Make the maildrop of VHOST, and whatever of the spool and the state is missing."""
    name = name.lower()
    if not layout.is_vhost(name):
        raise click.UsageError(f"{name[:80]!r} is not a host name such as www.example.com")
    settings = context.config
    _make_spool(settings)
    target = layout.maildrop(settings.spool, name)
    if os.path.exists(target):
        raise Failed(f"{target}: exists already")
    bell = os.urandom(16).hex()
    os.mkfifo(f"{settings.spool}/wake/{bell}", 0o600)
    # Built aside and renamed, so that enqueue never sees half a maildrop.
    staging = f"{settings.spool}/vhosts/.{name}.new"
    shutil.rmtree(staging, ignore_errors=True)
    for part, mode in layout.VHOST_DIRECTORIES.items():
        os.mkdir(f"{staging}/{part}" if part else staging, mode)
    text = policy.render(settings, name, bell, settings.vhost(name).max_message_size)
    with open(f"{staging}/policy", "wb") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.rename(staging, target)
    context.ring()
    output.say(f"made {target}")
    output.say(f'php_admin_value sendmail_path "{shlex.join([_enqueue(), "--spool", settings.spool, name])} -t -i"')


@vhost.command("list")
@json_option
@pass_context
def list_(context: Context, as_json: bool) -> None:
    """List the vhosts that have a maildrop."""
    found = []
    for name in context.vhosts():
        settings = context.config.vhost(name)
        found.append({"name": name, "limits": _texts(settings.limits), "count": settings.count,
                      "over_limit": settings.over_limit, "queued": queued(context, name)})  # fmt: skip
    if as_json:
        output.as_json(found)
        return
    output.table(
        ["VHOST", "LIMITS", "COUNTS", "OVER LIMIT", "QUEUED"],
        (
            [
                v["name"],
                ", ".join(_texts(context.config.vhost(str(v["name"])).limits)),
                v["count"],
                v["over_limit"],
                v["queued"],
            ]
            for v in found
        ),
        "no vhosts; run: secure-sendmail vhost add VHOST",
    )


def queued(context: Context, name: str) -> int:
    """How many files wait in the vhost's new/; where there is none, `check` says so."""
    try:
        with os.scandir(f"{layout.maildrop(context.spool, name)}/new") as entries:
            return sum(1 for entry in entries if not entry.name.startswith("."))
    except OSError:
        return 0


def _texts(found: tuple[limits.Limit, ...]) -> list[str]:
    return [limit.text for limit in found] or ["unlimited"]


def _enqueue() -> str:
    """The enqueue command that was installed beside this one."""
    beside = os.path.join(os.path.dirname(os.path.realpath(sys.argv[0])), "secure-sendmail-enqueue")
    return beside if os.path.exists(beside) else "secure-sendmail-enqueue"


def _make_spool(settings: config.Config) -> None:
    os.umask(0o077)
    for directory in (settings.spool, settings.state):
        os.makedirs(directory, mode=0o700, exist_ok=True)
    private.check(settings.spool, settings.state)
    # With an empty ledger every listing works before the releaser's first start.
    Ledger(settings.state, create=True).close()
    for name, mode in layout.DIRECTORIES.items():
        try:
            os.mkdir(f"{settings.spool}/{name}", mode)
        except FileExistsError:
            pass
    try:
        os.mkfifo(f"{settings.spool}/wake/{layout.CONTROL_BELL}", 0o600)
    except FileExistsError:
        pass
