"""secure-sendmail check: whether spool, ledger and configuration agree, and the releaser and the MTA are there."""

import os
import socket
import stat
from dataclasses import dataclass, field

import click

from releaser import config, daemon, errorlog, identity, layout, mailqueue, policy, provision, startup
from releaser.cli import output
from releaser.cli.context import Context, json_option, pass_context
from releaser.cli.vhost import who_works
from releaser.ledger import CORRUPT, FAILED, HELD, TRASHED, Ledger
from releaser.provision import Spool


@dataclass
class Found:
    """What needs repair, what a person should know, and what was mended."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)


@click.command()
@click.option("--repair", is_flag=True, help="Mend what can be mended without guessing.")
@json_option
@pass_context
def check(context: Context, repair: bool, as_json: bool) -> None:
    """Say what needs repair. Exit status 1 if anything does; warnings alone are 0."""
    settings = context.config
    who = who_works(settings) if repair else context.settle()
    found = Found()
    if repair:
        provision.make_spool(settings.spool, settings.state, who)
        identity.run_as(who, lambda: Ledger(settings.state, create=True).close())
    with Spool(settings.spool, who) as spool:
        _directories(spool, settings, repair, found)
    if not found.problems:
        # As the releaser's user: what lies in the queues is its own.
        inner = identity.run_as(who, lambda: vars(_inside(settings, repair)))
        found.problems += inner["problems"]
        found.mended += inner["mended"]
        found.warnings += inner["warnings"]
    if as_json:
        output.as_json(vars(found))
    else:
        for kind, sentences in (("mended", found.mended), ("problem", found.problems), ("warning", found.warnings)):
            for sentence in sentences:
                output.say(f"{kind}: {sentence}")
        if not found.problems:
            output.say("nothing needs repair")
    if found.problems:
        raise click.exceptions.Exit(1)


def _directories(spool: Spool, settings: config.Config, repair: bool, found: Found) -> None:
    """Owners, groups and modes from SPOOL down to the maildrops; what the customers have made there is not looked at."""
    _directory(spool, ".", spool.fd, settings.spool, layout.SPOOL, None, repair, found)
    opened: dict[str, int] = {}
    for name, place in layout.DIRECTORIES.items():
        opened[name] = _entry(spool, spool.fd, name, f"{settings.spool}/{name}", place, None, repair, found)
    try:
        if opened["vhosts"] >= 0 and opened["wake"] >= 0:
            for name in sorted(name for name in os.listdir(opened["vhosts"]) if layout.is_maildrop(name)):
                _maildrop(spool, opened["vhosts"], opened["wake"], name, settings, repair, found)
            _bell(spool, opened["wake"], layout.CONTROL_BELL, layout.CONTROL_BELL_PLACE, provision.Gate(), repair, found)
            for name in sorted(set(settings.registered) - set(os.listdir(opened["vhosts"]))):
                found.problems.append(
                    f"{config.vhost_file(settings.file, name)}: {name} has no maildrop; remove the file, or run: "
                    f"secure-sendmail vhost add {name} --user {' --user '.join(settings.vhost(name).users or ())}"
                )
    finally:
        for fd in opened.values():
            if fd >= 0:
                os.close(fd)


def _maildrop(spool: Spool, vhosts: int, wake: int, name: str, settings: config.Config, repair: bool, found: Found) -> None:
    path, shared = layout.maildrop(settings.spool, name), name == layout.UNREGISTERED
    place = layout.UNREGISTERED_GATE if shared else layout.VHOST_DIRECTORIES[""]
    gate: provision.Gate | None = provision.Gate()
    if not shared and not spool.identity.private:
        try:
            gate = _gate(vhosts, name, settings)
        except provision.Refused as error:
            found.problems.append(f"{path}: {error}; run: secure-sendmail vhost remove {name}, or edit its file in vhosts.d")
            gate = None
    fd = _entry(spool, vhosts, name, path, place, gate, repair and gate is not None, found, gate is not None)
    if fd < 0:
        return
    try:
        for part in ("tmp", "new"):
            inner = _entry(spool, fd, part, f"{path}/{part}", layout.VHOST_DIRECTORIES[part], None, repair, found)
            if inner >= 0:
                os.close(inner)
    finally:
        os.close(fd)
    if gate is None:
        return
    bell = identity.run_as(spool.identity, lambda: policy.bell(settings.spool, name))
    if bell is None and repair:
        bell = os.urandom(16).hex()
        text = policy.render(settings, name, bell, settings.vhost(name).max_message_size)
        identity.run_as(spool.identity, lambda: policy.write(settings.spool, name, text))
        found.mended.append(f"{path}/policy: written")
    if bell is None:
        found.problems.append(
            f"{path}/policy: names no bell, mail is found by scanning only; run: secure-sendmail check --repair"
        )
        return
    _bell(spool, wake, bell, layout.UNREGISTERED_BELL if shared else layout.BELL, gate, repair, found)


def _gate(vhosts: int, name: str, settings: config.Config) -> provision.Gate:
    """The gate that the vhost is to have: as it is, where its group still has no others in it. Raises Refused."""
    users = settings.vhost(name).users
    if users is None:
        raise provision.Refused(f"no users in {config.vhost_file(settings.file, name)}: all its mail is held")
    try:
        group = os.stat(name, dir_fd=vhosts, follow_symlinks=False).st_gid
    except OSError:
        group = None
    first = provision.gate(users, group)
    return first if first.gid is not None else provision.gate(users, None)


def _entry(
    spool: Spool, parent: int, name: str, path: str, place: layout.Place, gate: provision.Gate | None, repair: bool,
    found: Found, judge: bool = True,
) -> int:  # fmt: skip
    """Judge the directory NAME in PARENT; its descriptor, or -1 where there is none."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        try:
            fd = os.open(name, flags, dir_fd=parent)
        except FileNotFoundError:
            if not repair:
                raise
            spool.make_directory(parent, name, place, gate)
            found.mended.append(f"{path}: made")
            fd = os.open(name, flags, dir_fd=parent)
        except PermissionError:
            # Whom it belongs to can be seen all the same.
            fd = os.open(name, flags | os.O_PATH, dir_fd=parent)
    except OSError as error:
        hint = "; run: secure-sendmail check --repair" if isinstance(error, FileNotFoundError) else ": not a directory of ours"
        found.problems.append(f"{path}: {error.strerror}{hint}")
        return -1
    if judge:
        _directory(spool, name, fd, path, place, gate, repair, found)
    return fd


def _directory(
    spool: Spool, name: str, fd: int, path: str, place: layout.Place, gate: provision.Gate | None, repair: bool, found: Found
) -> None:
    status = os.fstat(fd)
    uid, gid, mode = provision.wanted(place, spool.identity, gate)
    users = gate.uids if gate is not None and not spool.identity.private else ()
    wrong = []
    if (status.st_uid, status.st_gid) != (uid, gid) and not (spool.identity.private and status.st_uid == uid):
        wrong.append(f"belongs to {status.st_uid}:{status.st_gid}, must belong to {uid}:{gid}")
    if stat.S_IMODE(status.st_mode) != mode:
        wrong.append(f"mode {stat.S_IMODE(status.st_mode):04o}, must be {mode:04o}")
    if provision.acl_users(fd) != users:
        wrong.append(f"its access control list names {list(provision.acl_users(fd))}, must name {list(users)}")
    if not wrong:
        return
    if not repair:
        found.problems.append(f"{path}: {', '.join(wrong)}; run: secure-sendmail check --repair")
        return
    spool.give(fd, place, gate)
    found.mended.append(f"{path}: {', '.join(wrong)}")


def _bell(spool: Spool, wake: int, name: str, place: layout.Place, gate: provision.Gate, repair: bool, found: Found) -> None:
    path = f"{spool.path}/wake/{name}"
    uid, gid, mode = provision.wanted(place, spool.identity, gate)
    mode = layout.BELL_PRIVATE_MODE if spool.identity.private else mode
    try:
        status = os.stat(name, dir_fd=wake, follow_symlinks=False)
    except OSError as error:
        if not repair:
            found.problems.append(f"{path}: {error.strerror}; run: secure-sendmail check --repair")
            return
        spool.make_bell(wake, name, place, gate)
        found.mended.append(f"{path}: made")
        return
    if not stat.S_ISFIFO(status.st_mode):
        found.problems.append(f"{path}: not a FIFO; remove it, and run: secure-sendmail check --repair")
        return
    owned = status.st_uid == uid and (status.st_gid == gid or spool.identity.private)
    if owned and stat.S_IMODE(status.st_mode) == mode:
        return
    if repair:
        spool.give_bell(wake, name, place, gate)
        found.mended.append(f"{path}: owner and mode")
    else:
        found.problems.append(f"{path}: wrong owner or mode; run: secure-sendmail check --repair")


def _inside(settings: config.Config, repair: bool) -> Found:
    """What the releaser's user sees: the index against the files, and who answers."""
    found = Found()
    book = Ledger(settings.state)
    running = daemon.running(settings.spool)
    found.problems += _index(settings.spool, book)
    if found.problems and repair:
        if running:
            found.problems.append("the index is the releaser's while it runs: stop it, run this again, and start it")
        else:
            locks = [daemon.lock(f"{settings.spool}/active"), daemon.lock(settings.state)]
            startup.take_up(settings.spool, book)
            found.mended += [f"{sentence}: mended" for sentence in found.problems]
            found.mended += startup.close_missing(settings.spool, book)
            found.problems = _index(settings.spool, book)
            for fd in locks:
                os.close(fd)
    _warnings(settings, running, found)
    return found


def _index(spool: str, book: Ledger) -> list[str]:
    found = []
    for state, queue in ((HELD, "hold"), (TRASHED, "trash"), (FAILED, "failed"), (CORRUPT, "corrupt")):
        known, files = set(book.queue_ids(state)), set(mailqueue.listing(spool, queue))
        # A decision that is being carried out shows here for an instant.
        for queue_id in sorted(known - files):
            row = book.row(queue_id)
            if row is not None and row.state == state and not os.path.lexists(layout.path(spool, queue, queue_id)):
                found.append(f"{queue_id}: {state} in the ledger, but {queue}/{queue_id} does not exist")
        for queue_id in sorted(files - known):
            row = book.row(queue_id)
            if (row is None or row.state != state) and os.path.lexists(layout.path(spool, queue, queue_id)):
                found.append(f"{queue}/{queue_id}: not in the ledger; the releaser takes it up at its next start")
    return found


def _warnings(settings: config.Config, running: bool, found: Found) -> None:
    names = sorted(name for name in os.listdir(f"{settings.spool}/vhosts") if layout.is_maildrop(name))
    if not running:
        found.warnings.append("the releaser is not running: mail waits in the maildrops")
    if not names:
        found.warnings.append("no vhosts; run: secure-sendmail vhost add VHOST")
    scheme, _, rest = settings.mta_url.partition("://")
    if scheme == "smtp":
        _smtp(settings.mta_url, rest, found.warnings)
    observed = [name for name in names if settings.vhost(name).over_limit == "observe"]
    if observed:
        found.warnings.append(f'over_limit is "observe", mail over a limit is sent: {", ".join(observed)}')
    logs = [settings.error_log, *(settings.vhost(name).error_log for name in names)]
    for path in dict.fromkeys(filter(None, logs)):
        problem = errorlog.problem(path, (settings.spool, settings.state))
        if problem is not None:
            found.warnings.append(f"{problem}; warnings do not reach it")


def _smtp(url: str, rest: str, warnings: list[str]) -> None:
    host, _, port = rest.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as connection:
            connection.settimeout(5)
            banner = connection.recv(512)
            connection.sendall(b"QUIT\r\n")
        if not banner.startswith(b"220"):
            warnings.append(f"{url}: answers {banner[:80]!r}, no SMTP server's 220")
    except OSError as error:
        warnings.append(f"{url}: {error.strerror or error}: mail waits until the MTA is there")
