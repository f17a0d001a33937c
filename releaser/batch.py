"""What one round of the engine writes together, and what may happen only when that is durable."""

import time
from collections.abc import Callable, Iterable
from functools import partial

from releaser import maillog
from releaser.ledger import Incident, Ledger, Row
from releaser.maillog import LOG


class Batch:
    """Writes for one transaction of the ledger, and the actions behind its commit, in order."""

    def __init__(self, book: Ledger) -> None:
        self._ledger = book
        self._writes: list[Callable[[], None]] = []
        self._after: list[Callable[[], None]] = []

    def now(self) -> float:
        """The time by the clock of the ledger."""
        return self._ledger.clock.now()

    def add(self, other: "Batch") -> None:
        """Do what OTHER was to do, behind what is there."""
        self._writes += other._writes
        self._after += other._after

    def put(self, row: Row) -> None:
        """Write ROW as it is when the batch is committed."""
        self._writes.append(partial(self._ledger.put, row))

    def put_incident(self, incident: Incident) -> None:
        self._writes.append(partial(self._ledger.put_incident, incident))

    def put_poison(self, maildrop: str, name: bytes, failures: int) -> None:
        self._writes.append(partial(self._ledger.put_poison, maildrop, name, failures))

    def forget(self, queue_id: str) -> None:
        self._writes.append(partial(self._ledger.remove, queue_id))

    def sources_gone(self, queue_ids: list[str]) -> None:
        if queue_ids:
            self._writes.insert(0, partial(self._ledger.source_gone, queue_ids))

    def log(self, event: str, row: Row, recipients: Iterable[tuple[str, str, str]], actor: str = "") -> None:
        """A log row for each of RECIPIENTS: (recipient, reason, MTA queue id)."""
        self._writes.append(partial(self._ledger.log, event, row, time.time(), list(recipients), actor))

    def log_all(self, event: str, row: Row, reason: str, actor: str = "") -> None:
        """A log row for every recipient whom the message still has to be sent to."""
        self.log(event, row, [(recipient, reason, "") for recipient in row.remaining], actor)

    def then(self, action: Callable[[], None]) -> None:
        """Let ACTION happen when everything is durable."""
        self._after.append(action)

    def commit(self) -> None:
        """Write, then act. Raises sqlite3.Error or MemoryError with nothing written, and may then be called again."""
        if self._writes:
            with self._ledger.transaction():
                self._ledger.keep_time()
                for write in self._writes:
                    write()
            self._writes = []
        while self._after:
            try:
                self._after[0]()
            except MemoryError:
                raise
            except Exception as error:
                # What is durable holds; the next start brings the file to where it belongs.
                LOG.error(maillog.left_for_start(error), exc_info=not isinstance(error, OSError))
            self._after.pop(0)
