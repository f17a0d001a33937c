"""Messages at which our own code fails: tried three times, each counted before it begins, then set aside for a person."""

import os

from releaser.ledger import Ledger

# So often a message may end the daemon, or raise what nobody expects, before it is set aside.
ATTEMPTS = 3

FILE = "in-hand"
# A maildrop's name, a slash and the name of a file.
SIZE = 1024


class InHand:
    """The message that is being read and judged, written down before that begins.

    STATE/in-hand outlives the daemon, not the machine, and so costs no sync: what ends the daemon is counted by the next one.
    """

    def __init__(self, state: str, book: Ledger) -> None:
        """Raises OSError, sqlite3.Error."""
        self._failures = book.poison()
        self._fd = os.open(f"{state}/{FILE}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        maildrop, _, name = os.read(self._fd, SIZE).rstrip(b"\0").partition(b"/")
        if name:
            with book.transaction():
                book.put_poison(maildrop.decode(), name, self.failed(maildrop.decode(), name))
        self.done()

    def may(self, maildrop: str, name: bytes) -> bool:
        """Begin with a message, unless it has failed too often."""
        if self._failures.get((maildrop, name), 0) >= ATTEMPTS:
            return False
        os.pwrite(self._fd, (maildrop.encode() + b"/" + name).ljust(SIZE, b"\0"), 0)
        return True

    def done(self) -> None:
        """Nothing is in hand."""
        os.pwrite(self._fd, bytes(SIZE), 0)

    def failed(self, maildrop: str, name: bytes) -> int:
        """Count a failure at this message; how many it has had, which the ledger is to be told."""
        failures = self._failures[maildrop, name] = self._failures.get((maildrop, name), 0) + 1
        return failures

    def forget(self, maildrop: str, name: bytes) -> None:
        """It was set aside, and its name may be another's some day."""
        self._failures.pop((maildrop, name), None)
