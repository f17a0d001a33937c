"""secure-sendmail check: whether spool, ledger and configuration agree, and the releaser and the MTA are there."""

import logging
import os
import pwd
import socket
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import click

from releaser import config, daemon, door, errorlog, identity, layout, ledger, mailqueue, mysql_log, policy, provision, startup
from releaser.cli import filesystem, lockdown, output
from releaser.cli.context import Context, json_option, pass_context
from releaser.cli.vhost import who_works
from releaser.identity import Identity
from releaser.layout import Place
from releaser.ledger import CORRUPT, FAILED, HELD, TRASHED, Ledger, LedgerError
from releaser.maillog import LOG
from releaser.provision import ALL, Gate, Refused, Spool

REPAIR = "run: secure-sendmail check --repair"
AWAY = f"move it away, and {REPAIR}"


@dataclass
class Found:
    """What needs repair, what a person should know, and what was mended."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)

    def add(self, other: dict[str, list[str]]) -> None:
        for name, sentences in other.items():
            getattr(self, name).extend(sentences)


@click.command()
@click.option("--repair", is_flag=True, help="Mend what can be mended without guessing.")
@json_option
@pass_context
def check(context: Context, repair: bool, as_json: bool) -> None:
    """Say what needs repair. Exit status 1 if anything does; warnings alone are 0."""
    # What the releaser would log at its start is said below.
    LOG.addHandler(logging.NullHandler())
    found = Found()
    if os.geteuid() == 0:
        found.warnings += lockdown.ways(context.config)
    who = _settle(context, repair)
    names = Outside(context.config, who, repair, found).look()
    # As the releaser's user: what lies in the queues is its own.
    found.add(identity.run_as(who, lambda: vars(Inside(context.config, who, repair).look(names))))
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


def _settle(context: Context, repair: bool) -> Identity:
    """Whose the spool is to be; be the releaser's user from now on, with REPAIR root. Raises NotOurs."""
    settings = context.config
    who = _shared(settings)
    if who is None:
        return who_works(settings) if repair else context.settle()
    if repair and os.geteuid() != 0:
        raise identity.NotOurs(f"{settings.spool}: this is {identity.user(os.geteuid())}; run this as root")
    if os.geteuid() == 0 and not repair:
        identity.become(who)
    return who


def _shared(settings: config.Config) -> Identity | None:
    """The releaser's identity where the spool is one for many, also where SPOOL or STATE has been given to someone else.

    Its vhosts with users, and the owner of what lies in it, still tell.
    """
    try:
        account = pwd.getpwnam(identity.USER)
    except KeyError:
        return None
    if os.geteuid() not in (0, account.pw_uid):
        return None
    for directory in (settings.spool, settings.state):
        identity.check_way(directory)
    try:
        private = identity.of(settings.spool, settings.state).private
    except identity.NotOurs:
        # What has been given away is looked at here.
        private = True
    owner, inner = _owner(settings.spool), _owner(f"{settings.spool}/active")
    given_away = inner == account.pw_uid and owner != account.pw_uid
    # Where nothing is made yet, there is nothing to look at.
    if settings.registered or given_away or (owner is not None and not private):
        return Identity(account.pw_uid, account.pw_gid, private=False)
    return None


def _owner(path: str) -> int | None:
    try:
        return os.lstat(path).st_uid
    except OSError:
        return None


class Outside:
    """SPOOL and STATE themselves, and the directories down to the maildrops; with REPAIR as root on a spool for many.

    What the customers have made in the maildrops is not looked at.
    """

    def __init__(self, settings: config.Config, who: Identity, repair: bool, found: Found) -> None:
        self.settings = settings
        self.who = who
        self.repair = repair
        self.found = found

    def look(self) -> list[str] | None:
        """The names of the maildrops; None where they cannot be seen."""
        settings = self.settings
        for path, place in ((settings.spool, layout.SPOOL), (settings.state, layout.STATE)):
            if self.repair and not os.path.lexists(path):
                provision.make_top(path, place, self.who)
                self.found.mended.append(f"{path}: did not exist")
        with self._opened(None, settings.state, settings.state, layout.STATE):
            pass
        with self._opened(None, settings.spool, settings.spool, layout.SPOOL) as top:
            if top < 0:
                return None
            with Spool(settings.spool, self.who) as self.spool:
                for name in layout.QUEUES:
                    with self._opened(top, name, f"{settings.spool}/{name}", layout.DIRECTORIES[name]):
                        pass
                places = layout.DIRECTORIES
                with (
                    self._opened(top, "vhosts", f"{settings.spool}/vhosts", places["vhosts"], listed=True) as vhosts,
                    self._opened(top, "wake", f"{settings.spool}/wake", places["wake"], listed=True) as wake,
                ):
                    return self._maildrops(vhosts, wake) if vhosts >= 0 and wake >= 0 else None

    def _maildrops(self, vhosts: int, wake: int) -> list[str]:
        path = f"{self.settings.spool}/vhosts"
        entries = _names(vhosts)
        for name in sorted(set(self.settings.registered) - entries):
            self._without_maildrop(name)
        gates = {}
        for name in sorted(filter(layout.is_maildrop, _names(vhosts))):
            gates[name] = self._maildrop(vhosts, name)
        for name in sorted(entries - gates.keys()):
            left = name.startswith(".") and name.endswith((".new", ".removed"))
            why = "left by a vhost add or remove that was interrupted; give that again, or" if left else "no vhost's;"
            self.found.warnings.append(f"{path}/{name}: {why} remove it")
        bells, inner = identity.run_as(self.who, lambda: self._bells(list(gates)))
        self.found.add(inner)
        for name, bell in bells.items():
            gate, place = gates[name], layout.UNREGISTERED_BELL if name == layout.UNREGISTERED else layout.BELL
            if gate is not None:
                self._bell(wake, bell, place, gate)
        self._bell(wake, layout.CONTROL_BELL, layout.CONTROL_BELL_PLACE, ALL)
        if len(bells) == len(gates):
            for name in sorted(_names(wake) - {layout.CONTROL_BELL, *bells.values()}):
                self.found.warnings.append(f"{self.settings.spool}/wake/{name}: no vhost's bell; remove it")
        return sorted(gates)

    def _maildrop(self, vhosts: int, name: str) -> Gate | None:
        """Judge the directories of NAME; the gate that it is to have, None where that is not known."""
        path, shared = layout.maildrop(self.settings.spool, name), name == layout.UNREGISTERED
        try:
            group = os.stat(name, dir_fd=vhosts, follow_symlinks=False).st_gid
        except FileNotFoundError:
            # It has been removed in this moment.
            return None
        gate = ALL if shared else self._gate(name, group)
        place = layout.UNREGISTERED_GATE if shared else layout.VHOST_DIRECTORIES[""]
        with self._opened(vhosts, name, path, place, gate) as top:
            for part in ("tmp", "new") if top >= 0 else ():
                with self._opened(top, part, f"{path}/{part}", layout.VHOST_DIRECTORIES[part]):
                    pass
        return gate

    def _gate(self, name: str, group: int | None) -> Gate | None:
        if self.who.private:
            return ALL
        file = config.vhost_file(self.settings.file, name)
        users = self.settings.vhost(name).users
        if users is None:
            self.found.problems.append(
                f'{file}: names no users, all mail of {name} is held; write users = ["NAME"] into it, and {REPAIR}'
            )
            return None
        try:
            return provision.gate(users, group)
        except Refused as error:
            self.found.problems.append(f"{file}: {error}; edit it, and {REPAIR}; or run: secure-sendmail vhost remove {name}")
            return None

    def _without_maildrop(self, name: str) -> None:
        """Make the maildrop of NAME, which has users, or say that it is missing."""
        file, path = config.vhost_file(self.settings.file, name), layout.maildrop(self.settings.spool, name)
        # One link is the rule, and saves comparing all with all.
        for other in self.settings.registered if os.stat(file).st_nlink > 1 else ():
            if other != name and os.path.samefile(config.vhost_file(self.settings.file, other), file):
                self.found.problems.append(f"{file}: left by a rename from or to {other} that was interrupted; remove it")
                return
        if not self.repair:
            self.found.problems.append(f"{path}: does not exist, and {file} does; remove that, or {REPAIR}")
            return
        gate = self._gate(name, None)
        if gate is not None:
            bell = os.urandom(16).hex()
            text = policy.render(self.settings, name, bell, self.settings.vhost(name).max_message_size)
            try:
                self.spool.rename_maildrop(self.spool.make_maildrop(name, gate, bell, text), name)
                self.found.mended.append(f"{path}: did not exist")
            except OSError as error:
                self.found.problems.append(f"{path}: does not exist, and cannot be made: {error.strerror or error}")

    def _bells(self, names: list[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
        """The bells that the policies name, and what was found of these; for the releaser's user, whose they are."""
        bells, found = {}, Found()
        for name in names:
            path = f"{layout.maildrop(self.settings.spool, name)}/policy"
            try:
                if not stat.S_ISREG(os.lstat(path).st_mode):
                    found.problems.append(f"{path}: is no regular file; {AWAY}")
                    continue
            except FileNotFoundError:
                if not os.path.isdir(os.path.dirname(path)):
                    # The vhost has been removed in this moment.
                    continue
            except OSError:
                # The directory cannot be entered, which is said.
                continue
            bell = policy.bell(self.settings.spool, name)
            if bell is None and not self.repair:
                found.problems.append(f"{path}: names no bell, mail is found by scanning only; {REPAIR}")
                continue
            if bell is None:
                bell = os.urandom(16).hex()
                text = policy.render(self.settings, name, bell, self.settings.vhost(name).max_message_size)
                try:
                    policy.write(self.settings.spool, name, text)
                except OSError as error:
                    found.problems.append(f"{path}: names no bell, and cannot be written: {error.strerror}")
                    continue
                found.mended.append(f"{path}: named no bell")
            bells[name] = bell
        return bells, vars(found)

    def _bell(self, wake: int, name: str, place: Place, gate: Gate) -> None:
        with self._opened(wake, name, f"{self.settings.spool}/wake/{name}", place, gate, bell=True):
            pass

    @contextmanager
    def _opened(
        self, parent: int | None, name: str, path: str, place: Place, gate: Gate | None = ALL, bell: bool = False,
        listed: bool = False,
    ) -> Iterator[int]:  # fmt: skip
        """Judge the directory or bell NAME in PARENT, and mend it; its descriptor, or -1 where one cannot look into it.

        Without a GATE, which is not known, its rights are not judged. LISTED: to look into it is to list it.
        """
        fd = -1
        try:
            fd = self._look(parent, name, path, place, gate, bell)
            if fd >= 0 and not bell and not os.access(f"/proc/self/fd/{fd}", os.X_OK | (os.R_OK if listed else 0)):
                self.found.problems.append(f"{path}: what lies in it is not looked at")
                os.close(fd)
                fd = -1
            yield fd
        finally:
            if fd >= 0:
                os.close(fd)

    def _look(self, parent: int | None, name: str, path: str, place: Place, gate: Gate | None, bell: bool) -> int:
        try:
            fd = os.open(name, provision.LOOK, dir_fd=parent)
        except FileNotFoundError:
            if not self.repair or parent is None or gate is None:
                self.found.problems.append(f"{path}: does not exist; {REPAIR}")
                return -1
            try:
                (self.spool.make_bell if bell else self.spool.make_directory)(parent, name, place, gate)
                fd = os.open(name, provision.LOOK, dir_fd=parent)
            except OSError as error:
                self.found.problems.append(f"{path}: does not exist, and cannot be made: {error.strerror}")
                return -1
            self.found.mended.append(f"{path}: did not exist")
        except OSError as error:
            self.found.problems.append(f"{path}: {error.strerror}")
            return -1
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISFIFO(mode) if bell else stat.S_ISDIR(mode)):
            self.found.problems.append(f"{path}: is no {'FIFO' if bell else 'directory'}; {AWAY}")
            os.close(fd)
            return -1
        right = provision.wanted(place, self.who, gate or ALL)
        wrong = provision.wrong(provision.rights(fd), right, any_group=self.who.private) if gate is not None else ""
        if wrong and not self.repair:
            self.found.problems.append(f"{path}: {wrong}; {REPAIR}")
        elif wrong:
            try:
                provision.give(fd, right)
                self.found.mended.append(f"{path}: {wrong}")
            except OSError as error:
                self.found.problems.append(f"{path}: {wrong}, and cannot be mended: {error.strerror}")
        return fd


class Inside:
    """What the releaser's user sees: the configuration, the index against the files, and who answers."""

    def __init__(self, settings: config.Config, who: Identity, repair: bool) -> None:
        self.settings = settings
        self.who = who
        self.repair = repair
        self.found = Found()

    def look(self, names: list[str] | None) -> Found:
        """NAMES are those of the maildrops, None where they are not known."""
        self._configuration()
        self._owners()
        running = daemon.running(self.settings.spool)
        book = self._ledger()
        if book is not None:
            try:
                self._index(book, running)
                if self.settings.mysql is not None:
                    self.found.warnings += mysql_log.waiting(book.waits(), book.outbox())
            except sqlite3.Error as error:
                self._unusable(str(error))
        if self.repair:
            try:
                # The bells may be new ones.
                os.utime(f"{self.settings.spool}/wake/{layout.CONTROL_BELL}")
            except OSError:
                # Its scan finds all of this, too.
                pass
        self._warnings(names, running)
        return self.found

    def _configuration(self) -> None:
        try:
            config.load(self.settings.file)
        except config.ConfigError as error:
            user = identity.user(self.who.uid)
            closed = [path for path in self._files() if not os.access(path, os.R_OK)]
            hints = [
                f"chown root:{user} {path} && chmod {'0750' if os.path.isdir(path) else '0640'} {path}" for path in closed[:1]
            ]
            self.found.problems.append("; ".join([f"{error}, for {user}, who runs the releaser", *(f"run: {h}" for h in hints)]))

    def _files(self) -> list[str]:
        """The configuration's directories and files, the way to it first."""
        file = self.settings.file
        files = [config.vhost_file(file, name) for name in self.settings.registered]
        return [os.path.dirname(os.path.abspath(file)), file, *filter(os.path.lexists, [config.vhosts_directory(file), *files])]

    def _owners(self) -> None:
        """Whether the files of queues and state are the releaser's; one in corrupt/ is its writer's."""
        spool, user = self.settings.spool, identity.user(self.who.uid)
        for directory in (self.settings.state, *(f"{spool}/{queue}" for queue in layout.QUEUES if queue != "corrupt")):
            try:
                paths = sorted(f"{directory}/{name}" for name in os.listdir(directory))
            except OSError:
                # What is wrong with the directory is said.
                continue
            for path in paths:
                owner = _owner(path)
                if owner not in (None, self.who.uid):
                    self.found.problems.append(
                        f"{path.removeprefix(f'{spool}/')}: belongs to {identity.user(owner)}, must belong to {user}; "
                        f"run: chown -h {user}: {path}"
                    )

    def _ledger(self) -> Ledger | None:
        path = self._ledger_path
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            if not self.repair:
                self.found.problems.append(f"{path}: does not exist; {REPAIR}")
                return None
            status = None
        except OSError:
            # What is wrong with STATE is said.
            return None
        if status is not None and not stat.S_ISREG(status.st_mode):
            self._unusable("is no regular file")
        elif status is None or status.st_uid == self.who.uid:
            try:
                book = Ledger(self.settings.state, create=status is None)
                if status is None:
                    self.found.mended.append(f"ledger made: {path}")
                return book
            except LedgerError as error:
                if type(error.__context__) is sqlite3.DatabaseError:
                    self._unusable(str(error.__context__))
                else:
                    self.found.problems.append(str(error))
        return None

    @property
    def _ledger_path(self) -> str:
        return f"{self.settings.state}/{ledger.FILE}"

    def _unusable(self, reason: str) -> None:
        again = "which makes a new one from the held files (what was counted is forgotten)"
        self.found.problems.append(f"{self._ledger_path}: {reason}; {AWAY}, {again}")

    def _index(self, book: Ledger, running: bool) -> None:
        """The ledger against the files; taken up as by the releaser at its start, with --repair, if that does not run."""
        differ, unreadable = self._compared(book)
        if differ and self.repair and running:
            differ.append("the index is the releaser's while it runs: stop it, run this again, and start it")
        elif differ and self.repair:
            before = differ
            try:
                with ExitStack() as locks:
                    for directory in (f"{self.settings.spool}/active", self.settings.state):
                        locks.callback(os.close, daemon.lock(directory))
                    startup.take_up(self.settings.spool, book)
                    self.found.mended += startup.close_missing(self.settings.spool, book)
            except (daemon.Stop, OSError) as error:
                self.found.problems.append(f"the index cannot be mended: {error}")
            differ, unreadable = self._compared(book)
            self.found.mended += [sentence.partition(";")[0] for sentence in before if sentence not in differ]
        self.found.problems += differ + unreadable

    def _compared(self, book: Ledger) -> tuple[list[str], list[str]]:
        """What differs, and files that nobody can take up."""
        spool = self.settings.spool
        differ, unreadable = [], []
        for state, queue in ((HELD, "hold"), (TRASHED, "trash"), (FAILED, "failed"), (CORRUPT, "corrupt")):
            try:
                known, files = set(book.queue_ids(state)), set(mailqueue.listing(spool, queue))
            except OSError:
                # What is wrong with the directory is said.
                continue
            # A decision that is being carried out shows here for an instant.
            for queue_id in sorted(known - files):
                row = book.row(queue_id)
                if row is not None and row.state == state and not os.path.lexists(layout.path(spool, queue, queue_id)):
                    differ.append(f"{queue_id}: {state} in the ledger, but {queue}/{queue_id} does not exist")
            for queue_id in sorted(files - known):
                row, path = book.row(queue_id), layout.path(spool, queue, queue_id)
                if (row is not None and row.state == state) or not os.path.lexists(path):
                    continue
                try:
                    if queue != "corrupt":
                        mailqueue.read(path)[1].close()
                    differ.append(f"{queue}/{queue_id}: not in the ledger; the releaser takes it up at its next start")
                except startup.UNREADABLE as error:
                    reason = error.strerror if isinstance(error, OSError) else error
                    unreadable.append(f"{queue}/{queue_id}: cannot be read ({reason}); look at it, and move it out of the spool")
        return differ, unreadable

    def _warnings(self, names: list[str] | None, running: bool) -> None:
        settings, warnings = self.settings, self.found.warnings
        if not running:
            warnings.append("the releaser is not running: mail waits in the maildrops")
        if names == []:
            warnings.append("no vhosts; run: secure-sendmail vhost add VHOST")
        if not self.who.private:
            warnings += filesystem.warnings(settings.spool)
        warnings += filesystem.of_mysql(settings)
        lack = door.lacking(settings.spool, settings.min_free)
        if lack:
            warnings.append(f"{settings.spool}: {lack}: all mail is refused until there is room again")
        for name in names or () if not lack else ():
            for vhost, sentence in policy.refusals(settings.spool, name, time.time()):
                warnings.append(f"mail of {vhost} is refused: {sentence}")
        scheme, _, rest = settings.mta_url.partition(":")
        if scheme == "smtp":
            _smtp(settings.mta_url, rest.removeprefix("//"), warnings)
        if scheme == "sendmail" and not (os.path.isfile(rest) and os.access(rest, os.X_OK)):
            warnings.append(
                f"{settings.mta_url}: there is no such program that {identity.user(self.who.uid)} can run: mail waits"
            )
        observed = [name for name in names or () if settings.vhost(name).over_limit == "observe"]
        if observed:
            warnings.append(f'over_limit is "observe", mail over a limit is sent: {", ".join(observed)}')
        logs = [settings.error_log, *(settings.vhost(name).error_log for name in names or ())]
        for path in dict.fromkeys(filter(None, logs)):
            problem = errorlog.problem(path, (settings.spool, settings.state))
            if problem is not None:
                warnings.append(f"{problem}; warnings do not reach it")


def _names(directory: int) -> set[str]:
    return set(os.listdir(f"/proc/self/fd/{directory}"))


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
