"""Whether there is room to work: on the disk, among the open files, in memory."""

import errno
import sqlite3
import time

from releaser import maillog
from releaser.maillog import LOG

# What passes when somebody makes room, or mends the file system; until then it holds for every message alike.
LACKS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EROFS, errno.EIO, errno.ENOMEM, errno.ENOLCK))
# Seconds until it is tried again, and without a lack until it is over.
PAUSE, OVER = 2, 60


class Room:
    """After an error that only more room can mend, nothing is begun for PAUSE seconds; said once, and when it is over."""

    def __init__(self) -> None:
        self._until = 0.0
        self._said = False

    def lacks(self, error: Exception) -> bool:
        """Whether ERROR is one that passes with more room. Then it is said, and work waits."""
        passes = isinstance(error, (sqlite3.OperationalError, MemoryError))
        if not passes and not (isinstance(error, OSError) and error.errno in LACKS):
            return False
        self._until = time.monotonic() + PAUSE
        if not self._said:
            self._said = True
            LOG.error(maillog.no_room(error))
        return True

    @property
    def there(self) -> bool:
        """Whether something may be begun."""
        if self._said and time.monotonic() > self._until + OVER:
            self._said = False
            LOG.warning(maillog.room_again())
        return time.monotonic() >= self._until
