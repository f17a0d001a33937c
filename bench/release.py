"""The releaser from spool to sink, against Postfix from its maildrop to the same sink."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from host import Host, smtp, text
from mariadb import PASSWORD, MariaDB
from measure import cpu_of_group, machine, resident_of_group, spread, table
from servers import HOST, POSTFIX, SINK_USER, Postfix, Sink, _is_listening
from spool import submit, submit_to_postfix

VHOSTS = 20
# So that Postfix is at its best: no pause between messages, and as many of each process as it can use.
AT_ITS_BEST = {
    "in_flow_delay": "0",
    "default_process_limit": "200",
    "qmgr_message_active_limit": "20000",
    "initial_destination_concurrency": "20",
    "default_destination_concurrency_limit": "50",
    "smtp_connection_cache_destinations": f"[{HOST}]",
}


class Counter(Sink):
    """An smtp-sink that keeps nothing and counts."""

    def start(self) -> None:
        program = str(POSTFIX / "usr/sbin/smtp-sink")
        self._start([program, "-u", SINK_USER, "-c", f"{HOST}:{self.port}", "1000"], lambda: _is_listening(self.port), {})

    @property
    def count(self) -> int:
        """The messages that it has taken."""
        with open(self.directory / "stderr", "rb") as said:
            said.seek(max(0, os.fstat(said.fileno()).st_size - 200))
            last = said.read().rpartition(b"mesg=")[2]
        return int(last.split()[0]) if last.strip() else 0
