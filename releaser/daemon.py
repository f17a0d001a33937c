"""secure-sendmail-releaser - release mail to the MTA, or hold it

Usage: secure-sendmail-releaser [--config FILE] [--once]

Takes mail from the vhosts' maildrops, counts it against their limits, hands it to the MTA or holds it for review, and
keeps the ledger. Woken by bells; looks every 30 seconds anyway. With --once it does all that can be done now, and ends.

SIGTERM and SIGINT finish what is in flight; a second one ends at once. SIGHUP, or a change of the configuration, loads
it again; a mistake in it is logged and the last good one stays.

Security: runs as user secure-sendmail, which it becomes where root starts it, and believes nothing that a customer
writes. In private mode, where one user owns spool and state, it runs as that one.

Exit status: 0 done; 64 usage; 69 another releaser works on this spool; 74 the spool or the ledger cannot be read or
written; 78 the configuration cannot be used.

Files: /etc/php-secure-sendmail/releaser.toml and vhosts.d/ beside it.
"""

import fcntl
import os
import signal
import sqlite3
import sys
import time
from types import FrameType

from releaser import config, identity, layout, maillog
from releaser.ledger import Ledger, LedgerError
from releaser.maillog import LOG
from releaser.notify import Notify
from releaser.release import Releaser
from releaser.shipping import Shipping
from releaser.watch import Wake, Watch

# A probe of `secure-sendmail status` holds the lock for an instant.
LOCK_TRIES = 20
# While nothing is watched, every maildrop is looked at after so many seconds.
LOOK_INTERVAL = 1
# At the end, MySQL has so many seconds to take what is left of the log; the rest is shipped after the next start.
LAST_ROWS = 10


class Stop(Exception):
    """The daemon cannot run: a status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def main() -> None:
    try:
        file, once = _arguments(sys.argv[1:])
        sys.exit(Daemon(file, once).run())
    except Stop as stop:
        print(f"secure-sendmail-releaser: {stop}", file=sys.stderr)
        sys.exit(stop.status)


def _arguments(words: list[str]) -> tuple[str, bool]:
    file, once = config.DEFAULT_FILE, False
    while words:
        word = words.pop(0)
        if word == "--help":
            print(__doc__.strip())
            sys.exit(0)
        if word == "--once":
            once = True
        elif word.startswith("--config="):
            file = word.removeprefix("--config=")
        elif word == "--config" and words:
            file = words.pop(0)
        else:
            raise Stop(os.EX_USAGE, f"bad argument {word!r}; usage: secure-sendmail-releaser [--config FILE] [--once]")
    return file, once


class Daemon:
    """One run on one spool."""

    def __init__(self, file: str, once: bool) -> None:
        self._file = file
        self._once = once
        self._wake = Wake()
        self._notify = Notify()
        self._stopping = False
        self._reload = False
        self._watch: Watch | None = None

    def run(self) -> int:
        """Work until told to stop; return the exit status. Raises Stop."""
        os.umask(0o077)
        try:
            settings = config.load(self._file)
            started_as_root = os.geteuid() == 0
            self._identity = identity.settle(settings.spool, settings.state)
            if started_as_root and os.geteuid() != 0:
                # It is read again whenever it changes: better to fail now than then.
                settings = config.load(self._file)
        except (config.ConfigError, identity.NotOurs) as error:
            raise Stop(os.EX_CONFIG, str(error)) from None
        # Held until the process ends, however it ends.
        locks = [lock(f"{settings.spool}/active"), lock(settings.state)]
        try:
            return self._work(settings)
        except (OSError, sqlite3.Error, LedgerError) as error:
            raise Stop(os.EX_IOERR, f"{settings.spool}: {error}") from error
        finally:
            for fd in locks:
                os.close(fd)

    def _work(self, settings: config.Config) -> int:
        maillog.start()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._signal)
        self._wake.wake_on_signals()
        # Taken before the first scan, so that a change made meanwhile is seen.
        self._signature = config.signature(self._file)
        # Before the ledger is open.
        self._shipping = Shipping(apart=settings.mysql is not None)
        book = Ledger(settings.state, create=True)
        if book.former_node:
            LOG.warning(maillog.node_moved(book.former_node, book.node))
        releaser = Releaser(settings, book, self._wake.nudge, self._identity.private)
        self._shipping.use(settings)
        if not self._once:
            self._start_watch(settings)
        # What is found at the start may take long; mail is taken by enqueue all the while.
        self._notify.ready()
        releaser.start(self._notify.alive)
        LOG.info(maillog.started(settings.spool, releaser.vhosts, settings.mta_url))
        _say_observed(settings)
        self._loop(releaser)
        self._notify.stopping()
        releaser.stop(self._notify.alive)
        self._shipping.stop(LAST_ROWS)
        if self._watch is not None:
            self._watch.stop()
        LOG.info(maillog.stopped())
        return 0

    def _loop(self, releaser: Releaser) -> None:
        next_check = time.monotonic() + layout.SCAN_INTERVAL
        next_look = 0.0
        while not self._stopping:
            self._notify.alive()
            bells, touched = self._wake.take()
            if self._watch is not None and self._watch.loudest is not None:
                LOG.error(maillog.flooded(releaser.vhost_of(self._watch.loudest), layout.SCAN_INTERVAL))
                # The next check begins again.
                self._watch.stop()
                self._watch, next_check = None, time.monotonic() + layout.SCAN_INTERVAL
            # The command rings when it has made a vhost: its users are known before its mail is looked at.
            if self._reload or touched or layout.CONTROL_BELL in bells or time.monotonic() >= next_check:
                next_check = time.monotonic() + layout.SCAN_INTERVAL
                self._check(releaser)
            releaser.rung(bells)
            if self._watch is None and not self._once and time.monotonic() >= next_look:
                next_look = time.monotonic() + LOOK_INTERVAL
                releaser.look()
            pause = releaser.step()
            if self._once and releaser.idle:
                return
            if pause > 0 and not self._stopping:
                interval = layout.SCAN_INTERVAL if self._watch is not None else LOOK_INTERVAL
                self._wake.wait(min(pause, interval, self._notify.interval), releaser.descriptors)

    def _check(self, releaser: Releaser) -> None:
        """Load the configuration again where it has changed, and see that the watch lives."""
        if not self._once and (self._watch is None or not self._watch.alive()):
            if self._watch is not None:
                LOG.error("watching has stopped by itself; started again")
                self._watch.stop()
            self._start_watch(releaser.config)
            releaser.scan()
        self._shipping.check()
        try:
            signature = config.signature(self._file)
            if not self._reload and signature == self._signature:
                return
            self._reload, self._signature = False, signature
            self._notify.reloading()
            loaded = config.load(self._file)
            for name in ("spool", "state"):
                if getattr(loaded, name) != getattr(releaser.config, name):
                    raise config.ConfigError(f"{self._file}: {name}: cannot be changed while the releaser runs; restart it")
        except config.ConfigError as error:
            LOG.error(maillog.not_reloaded(str(error)))
            self._notify.status(f"the last good configuration holds: {error}")
            self._notify.ready()
            return
        if (loaded.mysql, loaded.error_log) != (releaser.config.mysql, releaser.config.error_log):
            self._shipping.use(loaded)
        releaser.reload(loaded)
        LOG.info(maillog.reloaded(self._file))
        _say_observed(loaded)
        self._notify.status("")
        self._notify.ready()

    def _start_watch(self, settings: config.Config) -> None:
        directories = [os.path.dirname(os.path.abspath(self._file))]
        if os.path.isdir(config.vhosts_directory(self._file)):
            directories.append(config.vhosts_directory(self._file))
        self._watch = None
        try:
            self._watch = Watch(settings.spool, directories, self._wake)
        except OSError as error:
            LOG.error(f"cannot watch: {error}; every maildrop is looked at each {LOOK_INTERVAL} s instead")

    def _signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._reload = True
        elif self._stopping:
            # What is in flight is closed by the next start.
            os._exit(os.EX_SOFTWARE)
        else:
            self._stopping = True


def _say_observed(settings: config.Config) -> None:
    if settings.observed:
        LOG.warning(maillog.observing(settings.observed))


def lock(directory: str) -> int:
    """Hold DIRECTORY for this process; return the descriptor. Raises Stop when another releaser holds it."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise Stop(os.EX_IOERR, f"{directory}: {error.strerror}; run: secure-sendmail vhost add VHOST") from None
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            time.sleep(0.05)
    os.close(fd)
    raise Stop(os.EX_UNAVAILABLE, f"another releaser works on {directory}; stop it first")


def running(spool: str) -> bool:
    """Whether a releaser works on SPOOL."""
    try:
        fd = os.open(f"{spool}/active", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


if __name__ == "__main__":
    main()
