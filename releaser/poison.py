"""Messages at which our own code fails: tried three times, each counted before it begins, then set aside for a person.

From new/ into corrupt/, from active/ into hold/. What the MTA has said of them is in the log all the same.
"""

import os

from releaser.ledger import Ledger

# So often a message may end the daemon, or raise what nobody expects, before it is set aside.
ATTEMPTS = 3
WHY = f"our own code has failed at it {ATTEMPTS} times, see the daemon's log"

FILE = "in-hand"
# A maildrop's name, a slash and the name of a file.
SIZE = 1024


class InHand:
    """The message that is being worked on, written down before that begins: a maildrop, and the name of its file in new/,
    or, for one that lies in active/, its queue id.

    STATE/in-hand outlives the daemon, not the machine, and so costs no sync: what ends the daemon is counted by the next one.
    """

    def __init__(self, state: str, book: Ledger) -> None:
        """Raises OSError, sqlite3.Error."""
        self._failures = book.poison()
        self._begun = False
        self._fd = os.open(f"{state}/{FILE}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        maildrop, _, name = os.read(self._fd, SIZE).rstrip(b"\0").partition(b"/")
        # Before it is counted: better once too seldom than twice.
        os.pwrite(self._fd, bytes(SIZE), 0)
        if name:
            with book.transaction():
                book.put_poison(maildrop.decode(), name, self.failed(maildrop.decode(), name))

    def may(self, maildrop: str, name: bytes) -> bool:
        """Whether to begin with a message; not where it has failed too often."""
        return self._failures.get((maildrop, name), 0) < ATTEMPTS

    def begin(self, maildrop: str, name: bytes) -> None:
        """It is in hand, and nothing else is. Raises OSError."""
        self._begun = True
        os.pwrite(self._fd, (maildrop.encode() + b"/" + name).ljust(SIZE, b"\0"), 0)

    def done(self) -> None:
        """Nothing is in hand any more."""
        if not self._begun:
            return
        self._begun = False
        try:
            os.pwrite(self._fd, bytes(SIZE), 0)
        except OSError:
            # Should the daemon be ended before the next message, this one is counted once too often.
            pass

    def failed(self, maildrop: str, name: bytes) -> int:
        """Count a failure at this message; how many it has had, which the ledger is to be told."""
        failures = self._failures[maildrop, name] = self._failures.get((maildrop, name), 0) + 1
        return failures

    def forget(self, maildrop: str, name: bytes) -> None:
        """It was set aside, and its name may be another's some day."""
        self._failures.pop((maildrop, name), None)
