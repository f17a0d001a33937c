"""The log's shipper in a process of its own: mail does not share the interpreter with it."""

import os
import signal
import socket
from functools import partial

from releaser import child, maillog
from releaser.config import Config, Mysql
from releaser.maillog import LOG
from releaser.mysql_log import Shipper

# Of the configuration: [mysql], state, error_log and spool.
Told = tuple[Mysql | None, str, str | None, str]


class Shipping:
    """A shipper at most, for the configuration that was told last.

    In a child that was made before the ledger was opened; where that has been killed, or was never made since no log in
    MySQL was configured then, in a thread until the next start.
    """

    def __init__(self, apart: bool) -> None:
        """APART: in a child."""
        self._pid = 0
        self._socket: socket.socket | None = None
        if apart:
            self._pid, self._socket = child.fork(_work)
        self._shipper: Shipper | None = None
        self._told: Told | None = None

    def use(self, settings: Config) -> None:
        """Ship the log to where SETTINGS say, and no longer to where it went before."""
        self._told = settings.mysql, settings.state, settings.error_log, settings.spool
        self._tell()

    def check(self) -> None:
        """See that it is still there."""
        if self._socket is not None and child.can_be_read(self._socket, 0):
            # It never says anything: so it has ended.
            self._let_go()
            LOG.error(maillog.shipper_lost())
            self._tell()

    def stop(self, patience: float) -> None:
        """Ship what is there if MySQL takes it, for at most PATIENCE seconds, and end."""
        if self._shipper is not None:
            self._shipper.stop(patience)
        if self._socket is not None:
            try:
                child.send(self._socket, patience)
            except OSError:
                # It has ended; the rows are safe in the ledger.
                pass
            if not child.can_be_read(self._socket, patience + 1):
                os.kill(self._pid, signal.SIGKILL)
            self._let_go()

    def _tell(self) -> None:
        if self._told is None:
            return
        if self._socket is None:
            self._shipper = _another(self._shipper, self._told)
            return
        try:
            child.send(self._socket, self._told)
        except OSError:
            self.check()

    def _let_go(self) -> None:
        assert self._socket is not None
        self._socket.close()
        self._socket = None
        os.waitpid(self._pid, 0)


def _another(before: Shipper | None, told: Told) -> Shipper | None:
    if before is not None:
        # MySQL may be slow to answer, and nobody waits for it: the next one does.
        before.stop(0)
    server, state, error_log, spool = told
    return None if server is None else Shipper(server, state, error_log, spool)


def _work(parent: socket.socket) -> None:
    shipper: Shipper | None = None
    for told in iter(partial(child.receive, parent), child.GONE):
        if not isinstance(told, tuple):
            if shipper is not None:
                shipper.stop(told)
            return
        shipper = _another(shipper, told)
