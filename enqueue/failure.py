"""Every way in which enqueue can fail: one sentence and one status."""

import os

# The statuses of sysexits.h that enqueue uses; spool_layout.md has the table.
# Never 75: PHP 8.5 takes it for success.
USAGE = os.EX_USAGE
DATAERR = os.EX_DATAERR
UNAVAILABLE = os.EX_UNAVAILABLE
CANTCREAT = os.EX_CANTCREAT
IOERR = os.EX_IOERR
NOPERM = os.EX_NOPERM
CONFIG = os.EX_CONFIG


class Failure(Exception):
    """The message is not accepted; nothing of it is left in new/."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence
