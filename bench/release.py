"""The releaser from spool to sink, against Postfix from its maildrop to the same sink: the same messages, runs in turn."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from host import Host, smtp, text
from mariadb import PASSWORD, MariaDB
from measure import Bench, cpu_of_group, resident_of_group, spread, table
from servers import HOST, POSTFIX, SINK_USER, Postfix, Sink, _is_listening
from spool import submit, submit_to_postfix

VHOSTS = [f"www.v{number}.example" for number in range(20)]
MESSAGES, ROUNDS, ROUNDS_IN_FULL = 5_000, 2, 7
# 1 KB, in lines as people write them.
MESSAGE = text("one@x.example", body=("x" * 71 + "\n") * 14)
# No pause between messages, as many processes and sessions as it can use, and sessions kept open: Postfix at its best. With
# fewer or more of either it is no faster on a machine of two cores.
AT_ITS_BEST = {
    "in_flow_delay": "0",
    "default_process_limit": "200",
    "qmgr_message_active_limit": "20000",
    "initial_destination_concurrency": "20",
    "default_destination_concurrency_limit": "50",
    "smtp_connection_cache_destinations": f"[{HOST}]",
}
POSTFIX_NAME, OURS, LOGGED = "Postfix, maildrop to sink", "releaser, spool to sink", "releaser, with the log in MySQL"


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


@dataclass
class Rate:
    """Messages a second, microseconds of CPU of each, and MB when the last had gone."""

    rate: float
    cpu: float
    memory: float


def measure(bench: Bench) -> None:
    rounds = ROUNDS_IN_FULL if bench.full else ROUNDS
    print(f"  {MESSAGES} messages of {len(VHOSTS)} vhosts, {len(MESSAGE)} bytes each, {rounds} rounds; Postfix at its best:")
    print(f"  {', '.join(f'{name}={value}' for name, value in AT_ITS_BEST.items())}\n", flush=True)
    found: dict[str, list[Rate]] = {POSTFIX_NAME: [], OURS: [], LOGGED: []}
    shipped = []
    with logging_server() as log:
        for _ in range(rounds):
            found[POSTFIX_NAME].append(_postfix())
            found[OURS].append(_releaser())
            log.root("DROP TABLE IF EXISTS mail_log, mail_log_schema")
            found[LOGGED].append(_releaser(log))
            shipped.append(_wait_for_rows(log))
    _say(bench, found)
    print(f"  The last row was in MySQL {spread(shipped).text()} s behind the last message.\n")


def _say(bench: Bench, found: dict[str, list[Rate]]) -> None:
    rows = []
    for name, rates in found.items():
        ratio = spread([each.rate / other.rate for each, other in zip(rates, found[POSTFIX_NAME], strict=True)])
        rate, cpu, memory = (spread([getattr(each, what) for each in rates]) for what in ("rate", "cpu", "memory"))
        rows.append([name, rate.text(".0f"), ratio.text(), f"{cpu.median:.0f}", f"{memory.median:.0f}"])
        bench.note(f"release: {name}, messages/s", rate.median)
        bench.note(f"release: {name}, times Postfix", ratio.median)
        bench.note(f"release: {name}, CPU us/message", cpu.median)
    table(["", "messages/s, median (5..95 %)", "ratio pair by pair", "CPU us each", "MB"], rows)


def _postfix() -> Rate:
    with Counter() as sink:
        postfix = Postfix(sink.port, parameters=AT_ITS_BEST)
        # It writes its configuration when it starts, and its maildrop is filled while it stands still.
        postfix.start()
        postfix.stop()
        submit_to_postfix(postfix, MESSAGES, MESSAGE)
        os.sync()
        with postfix:
            return _until(sink, MESSAGES, postfix._processes[0].server.pid)


def _releaser(log: MariaDB | None = None) -> Rate:
    with Counter() as sink, Host(mta=smtp(sink.port), extra=log_section(log) if log else "") as host:
        host.add(*VHOSTS)
        if log:
            make_tables(host, log)
        for vhost in VHOSTS:
            submit(host, vhost, MESSAGES // len(VHOSTS), MESSAGE)
        os.sync()
        host.launch()
        found = _until(sink, MESSAGES, host.pid)
        assert host.stop() == 0
        assert len(host.ls()) == 0
        return found


def _until(sink: Counter, count: int, leader: int) -> Rate:
    """From the first message that the sink has to the last of COUNT; the processes are those of the group of LEADER."""
    while not (first := sink.count):
        time.sleep(0.001)
    began, cpu = time.perf_counter(), cpu_of_group(leader)
    deadline = began + 120
    while sink.count < count:
        assert time.perf_counter() < deadline, f"{sink.count} of {count} messages in 120 s"
        time.sleep(0.005)
    took = time.perf_counter() - began
    used, memory = cpu_of_group(leader) - cpu, resident_of_group(leader)
    return Rate((count - first) / took, used / (count - first) * 1e6, memory)


@contextmanager
def logging_server() -> Iterator[MariaDB]:
    """A MariaDB, and the passwords of its users in files."""
    log = MariaDB()
    log.directory.chmod(0o755)
    with log:
        for name in ("releaser", "creator"):
            path = log.directory / f"{name}.password"
            path.write_text(PASSWORD)
            path.chmod(0o600)
        yield log


def log_section(log: MariaDB) -> str:
    return (
        f'[mysql]\nhost = "{HOST}"\nport = {log.port}\nuser = "secure_sendmail"\ndatabase = "secure_sendmail"\n'
        f'password_file = "{log.directory}/releaser.password"\n'
    )


def make_tables(host: Host, log: MariaDB) -> None:
    host.cli("log", "init", "--user", "creator", "--password-file", str(Path(log.directory, "creator.password")))


def _wait_for_rows(log: MariaDB) -> float:
    """Seconds until all rows are there. The releaser has ended: what it had not shipped by then it never will."""
    began = time.perf_counter()
    while (rows := log.root("SELECT count(*) FROM mail_log")[0][0]) < MESSAGES:
        assert time.perf_counter() - began < 30, f"{rows} rows of {MESSAGES}"
        time.sleep(0.01)
    return time.perf_counter() - began
