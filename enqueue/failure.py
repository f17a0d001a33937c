"""Every way in which enqueue can fail: one sentence and one status."""

import posix

# The statuses of sysexits.h that enqueue uses; spool_layout.md has the table.
# Never 75: PHP 8.5 takes it for success.
USAGE = posix.EX_USAGE
DATAERR = posix.EX_DATAERR
UNAVAILABLE = posix.EX_UNAVAILABLE
CANTCREAT = posix.EX_CANTCREAT
IOERR = posix.EX_IOERR
NOPERM = posix.EX_NOPERM
CONFIG = posix.EX_CONFIG


class Failure(Exception):
    """The message is not accepted; nothing of it is left in new/."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence
