"""Garbage collection on this host: what the ledger, trash/ and failed/ have kept for longer than [retention] says.

A little at a time between rounds of the engine, in its thread: nobody has to wait for a lock, and mail for no more than
one step. The rows in MySQL are collected by who ships them.
"""

import time
from collections.abc import Iterator

from releaser import errorlog, maillog, mailqueue
from releaser.config import Config
from releaser.door import Door
from releaser.ledger import FAILED, TRASHED, Ledger
from releaser.maillog import LOG

# Seconds between collections, and between the steps of one.
INTERVAL, REST = 3600, 0.05
# Rows of the ledger that one step looks at, and messages, each of which is a file, too.
ROWS, MESSAGES = 200, 50
# What a message has counted for is kept at least a day, so that a longer window begins with what it should.
LEAST = 86400


class Collector:
    """One for each engine."""

    def __init__(self, config: Config, book: Ledger, door: Door) -> None:
        self.config = config
        self._ledger = book
        self._door = door
        self._steps: Iterator[None] | None = None
        # When there is something to do again, by the clock of the ledger.
        self.next = 0.0

    @property
    def busy(self) -> bool:
        """Whether a collection has begun and not ended."""
        return self._steps is not None

    def step(self) -> None:
        """Do a little of what is due. Raises OSError, sqlite3.Error; the next collection begins again."""
        now = self._ledger.clock.now()
        if now < self.next:
            return
        steps, self._steps, self.next = self._steps or self._collect(), None, now + INTERVAL
        for _ in steps:
            self._steps, self.next = steps, now + REST
            return

    def _collect(self) -> Iterator[None]:
        yield from self._collect_log()
        yield from self._collect_messages()
        yield from self._collect_queue("trash", TRASHED, self.config.keep_trash)
        yield from self._collect_queue("failed", FAILED, self.config.keep_failed)

    def _collect_log(self) -> Iterator[None]:
        keep, shipped, gone = self.config.keep_ledger, self.config.mysql is not None, 0
        before = self._ledger.ago(keep)
        position: tuple[str, int] | None = ("", 0)
        while position is not None:
            position, rows = self._ledger.collect_log(before, position, shipped, ROWS)
            gone += rows
            if position is not None:
                yield
        if gone:
            LOG.info(maillog.collected("the ledger", gone, keep))
            if not shipped:
                self._tell(f"{gone} rows", keep)

    def _collect_messages(self) -> Iterator[None]:
        keep = max(self.config.keep_ledger, self.config.longest, LEAST)
        before, counted = self._ledger.ago(keep), self._ledger.clock.now() - keep
        position: int | None = 0
        while position is not None:
            position = self._ledger.collect_messages(before, counted, position, ROWS)
            if position is not None:
                yield
        self._ledger.collect_incidents(counted)

    def _collect_queue(self, queue: str, state: str, keep: int) -> Iterator[None]:
        """S10 -> S1, S11 -> S1."""
        before, gone = self._ledger.ago(keep), 0
        position: str | None = ""
        while position is not None:
            reason = f"{queue}/ has kept it for {errorlog.span(keep)}"
            position, rows = self._ledger.expire(state, before, position, MESSAGES, reason)
            for row in rows:
                if state == FAILED:
                    self._door.add(row, -1)
                try:
                    mailqueue.remove(self.config.spool, queue, row.queue_id)
                except OSError as error:
                    LOG.error(maillog.left_for_start(error))
                LOG.info(maillog.expired(row.queue_id, row.vhost, queue))
            gone += len(rows)
            if position is not None:
                yield
        if gone:
            self._tell(f"{gone} messages in {queue}/", keep)

    def _tell(self, what: str, keep: int) -> None:
        line = errorlog.collected(time.time(), what, keep)
        errorlog.tell(self.config.error_log, line, (self.config.spool, self.config.state))
