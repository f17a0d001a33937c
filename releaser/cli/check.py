"""secure-sendmail check: whether spool, ledger and configuration agree, and the releaser and the MTA are there."""

import os
import socket
import stat

import click

from releaser import layout, mailqueue, policy
from releaser.cli import output
from releaser.cli.context import Context, json_option, pass_context
from releaser.ledger import CORRUPT, FAILED, HELD, TRASHED


@click.command()
@json_option
@pass_context
def check(context: Context, as_json: bool) -> None:
    """Say what needs repair. Exit status 1 if anything does; warnings alone are 0."""
    names = context.vhosts()
    problems = _directories(context, names) + _bells(context, names)
    if not problems:
        problems += _index(context)
    warnings = _warnings(context, names)
    if as_json:
        output.as_json({"problems": problems, "warnings": warnings})
    else:
        for kind, sentences in (("problem", problems), ("warning", warnings)):
            for sentence in sentences:
                output.say(f"{kind}: {sentence}")
        if not problems:
            output.say("nothing needs repair")
    if problems:
        raise click.exceptions.Exit(1)


def _directories(context: Context, names: list[str]) -> list[str]:
    wanted = {f"{context.spool}/{name}": mode for name, mode in layout.DIRECTORIES.items()}
    for name in names:
        for part, mode in layout.VHOST_DIRECTORIES.items():
            wanted[f"{layout.maildrop(context.spool, name)}/{part}".rstrip("/")] = mode
    found = []
    for path, mode in wanted.items():
        try:
            status = os.lstat(path)
        except OSError as error:
            found.append(f"{path}: {error.strerror}; run: secure-sendmail vhost add VHOST")
            continue
        if not stat.S_ISDIR(status.st_mode):
            found.append(f"{path}: not a directory")
        elif status.st_uid != os.geteuid():
            found.append(f"{path}: belongs to uid {status.st_uid}, must belong to uid {os.geteuid()}")
        elif stat.S_IMODE(status.st_mode) != mode:
            found.append(f"{path}: mode {stat.S_IMODE(status.st_mode):04o}, must be {mode:04o}; run: chmod {mode:04o} {path}")
    return found


def _bells(context: Context, names: list[str]) -> list[str]:
    found = []
    bells = {layout.CONTROL_BELL: "the command"}
    for name in names:
        bell = policy.bell(context.spool, name)
        if bell is None:
            found.append(f"{layout.maildrop(context.spool, name)}/policy: names no bell; mail is found by scanning only")
        else:
            bells[bell] = name
    for bell, owner in bells.items():
        path = f"{context.spool}/wake/{bell}"
        try:
            if not stat.S_ISFIFO(os.lstat(path).st_mode):
                found.append(f"{path}: the bell of {owner} is not a FIFO")
        except OSError as error:
            found.append(f"{path}: the bell of {owner}: {error.strerror}; run: mkfifo -m 0600 {path}")
    return found


def _index(context: Context) -> list[str]:
    found = []
    for state, queue in ((HELD, "hold"), (TRASHED, "trash"), (FAILED, "failed"), (CORRUPT, "corrupt")):
        known, files = set(context.ledger.queue_ids(state)), set(mailqueue.listing(context.spool, queue))
        # A decision that is being carried out shows here for an instant.
        for queue_id in sorted(known - files):
            row = context.ledger.row(queue_id)
            if row is not None and row.state == state and not os.path.exists(layout.path(context.spool, queue, queue_id)):
                found.append(f"{queue_id}: {state} in the ledger, but {queue}/{queue_id} does not exist")
        for queue_id in sorted(files - known):
            row = context.ledger.row(queue_id)
            if (row is None or row.state != state) and os.path.exists(layout.path(context.spool, queue, queue_id)):
                found.append(f"{queue}/{queue_id}: not in the ledger; the releaser takes it up at its next start")
    return found


def _warnings(context: Context, names: list[str]) -> list[str]:
    found = []
    if not context.running:
        found.append("the releaser is not running: mail waits in the maildrops")
    if not names:
        found.append("no vhosts; run: secure-sendmail vhost add VHOST")
    scheme, _, rest = context.config.mta_url.partition("://")
    if scheme == "smtp":
        host, _, port = rest.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as connection:
                connection.settimeout(5)
                banner = connection.recv(512)
                connection.sendall(b"QUIT\r\n")
            if not banner.startswith(b"220"):
                found.append(f"{context.config.mta_url}: answers {banner[:80]!r}, no SMTP server's 220")
        except OSError as error:
            found.append(f"{context.config.mta_url}: {error.strerror or error}: mail waits until the MTA is there")
    observed = [name for name in names if context.config.vhost(name).over_limit == "observe"]
    if observed:
        found.append(f'over_limit is "observe", mail over a limit is sent: {", ".join(observed)}')
    return found
