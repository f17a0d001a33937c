"""MySQL fails in each way that it can, in turn, while PHP's command goes on sending: mail is out meanwhile, the log whole."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pymysql
import pytest
from host import Host, smtp, subject, text
from mariadb import GRANTS, PASSWORD, MariaDB
from mysql_proxy import Proxy
from servers import Sink
from test_e2e_mysql_outage import kill, logging_to, make_tables, password, rows_of, server

__all__ = ["password", "server"]

pytestmark = [pytest.mark.server, pytest.mark.timeout(1200)]

VHOSTS = [f"www.v{number}.example" for number in range(4)]
# Mails that must go out while a fault holds.
MEANWHILE = 12
USER = "secure_sendmail@'%'"


class Load:
    """Sends mail after mail, from several threads, until it is told to stop; all must be accepted."""

    def __init__(self, host: Host, sink: Sink) -> None:
        self._host, self._sink = host, sink
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.sent: list[str] = []
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._send, args=(number,)) for number in range(2)]
        for thread in self._threads:
            thread.start()

    def _send(self, number: int) -> None:
        count = 0
        while not self._stop.wait(0.1):
            count += 1
            name = f"mail {number}.{count}"
            try:
                self._host.send(VHOSTS[count % len(VHOSTS)], message=text("one@x.example", "two@x.example", subject=name))
            except BaseException as error:
                self._errors.append(error)
                return
            with self._lock:
                self.sent.append(name)

    def all_out(self) -> None:
        """As many more as there must be are sent, and all that were until then are with the MTA."""
        until = len(self.sent) + MEANWHILE
        self._host.wait(lambda: len(self.sent) >= until or self._errors, "more mail was accepted")
        assert not self._errors, self._errors
        wanted = set(self.sent)
        self._host.wait(lambda: wanted <= {subject(each.data) for each in self._sink.messages()}, "all mail is out")

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self._errors, self._errors


Fault = Callable[[MariaDB, Proxy], Iterator[None]]


def stopped(server: MariaDB, proxy: Proxy) -> Iterator[None]:
    server.stop()
    yield
    server.start()


def killed(server: MariaDB, proxy: Proxy) -> Iterator[None]:
    kill(server)
    yield
    server.start()


def frozen(server: MariaDB, proxy: Proxy) -> Iterator[None]:
    server.signal(signal.SIGSTOP)
    yield
    server.signal(signal.SIGCONT)


def mute(server: MariaDB, proxy: Proxy) -> Iterator[None]:
    """It accepts, and never greets."""
    proxy.mute = True
    proxy.hang_up()
    yield
    proxy.mute = False
    proxy.hang_up()


def read_only(server: MariaDB, proxy: Proxy) -> Iterator[None]:
    server.root("SET GLOBAL read_only = 1")
    yield
    server.root("SET GLOBAL read_only = 0")


def table_missing(server: MariaDB, proxy: Proxy) -> Iterator[None]:
    server.root("RENAME TABLE mail_log TO away")
    yield
    server.root("RENAME TABLE away TO mail_log")


def both_tables_missing(server: MariaDB, proxy: Proxy) -> Iterator[None]:
    server.root("RENAME TABLE mail_log TO away, mail_log_schema TO away_schema")
    yield
    server.root("RENAME TABLE away TO mail_log, away_schema TO mail_log_schema")


def database_missing(server: MariaDB, proxy: Proxy) -> Iterator[None]:
    server.root("CREATE DATABASE other")
    server.root("RENAME TABLE mail_log TO other.mail_log, mail_log_schema TO other.mail_log_schema")
    server.root("DROP DATABASE secure_sendmail")
    yield
    server.root("CREATE DATABASE secure_sendmail CHARACTER SET utf8mb4", database=None)
    server.root("RENAME TABLE other.mail_log TO mail_log, other.mail_log_schema TO mail_log_schema")
    server.root("DROP DATABASE other")


def not_granted(server: MariaDB, proxy: Proxy) -> Iterator[None]:
    server.root(f"REVOKE INSERT ON secure_sendmail.* FROM {USER}")
    proxy.hang_up()
    yield
    server.root(f"GRANT {GRANTS} ON secure_sendmail.* TO {USER}")


def denied(server: MariaDB, proxy: Proxy) -> Iterator[None]:
    server.root(f"ALTER USER {USER} IDENTIFIED BY 'another'")
    proxy.hang_up()
    yield
    server.root(f"ALTER USER {USER} IDENTIFIED BY '{PASSWORD}'")


def too_many_connections(server: MariaDB, proxy: Proxy) -> Iterator[None]:
    server.root("SET GLOBAL max_connections = 10")
    proxy.hang_up()
    with ExitStack() as taken:
        while True:
            try:
                taken.enter_context(pymysql.connect(host="127.0.0.1", port=server.port, user="creator", password=PASSWORD))
            except pymysql.MySQLError as error:
                if error.args[0] != 1040:
                    raise
                if not any(row[0] == "secure_sendmail" for row in server.root("SELECT user FROM information_schema.processlist")):
                    break
                proxy.hang_up()
        yield
    server.root("SET GLOBAL max_connections = 151")


def table_locked(server: MariaDB, proxy: Proxy) -> Iterator[None]:
    with pymysql.connect(unix_socket=str(server.socket), user="root", database="secure_sendmail") as other:
        other.cursor().execute("LOCK TABLES mail_log WRITE")
        yield


def rows_locked(server: MariaDB, proxy: Proxy) -> Iterator[None]:
    """A lock wait timeout."""
    with pymysql.connect(unix_socket=str(server.socket), user="root", database="secure_sendmail") as other:
        other.begin()
        other.cursor().execute("SELECT * FROM mail_log FOR UPDATE")
        yield


def says(number: int) -> Fault:
    """The server refuses each INSERT with that error: what cannot be had otherwise in a test, or in MariaDB at all."""

    def fault(server: MariaDB, proxy: Proxy) -> Iterator[None]:
        server.root(
            f"CREATE TRIGGER says BEFORE INSERT ON mail_log FOR EACH ROW "
            f"SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = {number}, MESSAGE_TEXT = 'error {number}'"
        )
        yield
        server.root("DROP TRIGGER says")

    fault.__name__ = f"says_{number}"
    return fault


def small_packets(server: MariaDB, proxy: Proxy) -> Iterator[None]:
    """The server takes one row at a time, and says so."""
    (before,) = server.root("SELECT @@max_allowed_packet")[0]
    server.root("SET GLOBAL net_buffer_length = 2048")
    server.root("SET GLOBAL max_allowed_packet = 2048")
    proxy.hang_up()
    yield
    server.root(f"SET GLOBAL max_allowed_packet = {before}")
    proxy.hang_up()


def small_packets_unsaid(server: MariaDB, proxy: Proxy) -> Iterator[None]:
    """What is between takes three rows at a time, and hangs up without a word."""
    server.root("SET GLOBAL read_only = 1")
    time.sleep(3)
    proxy.longest = 2500
    server.root("SET GLOBAL read_only = 0")
    yield
    proxy.longest = 1 << 30


def answer_lost(server: MariaDB, proxy: Proxy) -> Iterator[None]:
    """What was sent is committed, and nobody hears of it."""
    proxy.lose = 5
    yield
    # One loss at a time: the log is through again behind each.
    until = time.monotonic() + 60
    while proxy.lose and time.monotonic() < until:
        time.sleep(0.05)
    assert proxy.lose == 0


def slow(server: MariaDB, proxy: Proxy) -> Iterator[None]:
    proxy.delay = 1
    yield
    proxy.delay = 0


# The faults, and what the log and `status` say of each; nothing where the log gets through.
FAULTS: list[tuple[Fault, str]] = [
    (stopped, "onnect"),
    (killed, "onnect"),
    (frozen, "timed out"),
    (mute, "timed out"),
    (read_only, r"read-only.*\(1290\)"),
    (table_missing, r"\(1146\); run: secure-sendmail log init"),
    (both_tables_missing, r"\(1146\); run: secure-sendmail log init"),
    (database_missing, r"\(1049\)"),
    (not_granted, r"\(1142\); GRANT INSERT, SELECT, DELETE"),
    (denied, r"\(1045\)"),
    (too_many_connections, r"\(1040\)"),
    (table_locked, r"\(1205\)"),
    (rows_locked, r"\(1205\)"),
    # Disk full, table full, deadlock, no partition, read-only mode of MySQL, too many connections of the user.
    *((says(number), rf"\({number}\)") for number in (1021, 1114, 1213, 1526, 1836, 1203)),
    (small_packets, ""),
    (small_packets_unsaid, ""),
    (answer_lost, ""),
    (slow, ""),
]  # fmt: skip


def test_chaos_of_mysql(server: MariaDB, sink: Sink, password: Path) -> None:
    """Each fault holds until all mail that came meanwhile is out and the fault is said; at the end no row is missing or twice."""
    with Host(mta=smtp(sink.port)) as host, Proxy(server.port) as proxy:
        host.configure(extra=logging_to(server, password).replace(str(server.port), str(proxy.port)))
        make_tables(host, password)
        host.add(*VHOSTS)
        with host.running():
            load, begun = Load(host, sink), time.monotonic()
            try:
                for fault, said in FAULTS:
                    with context(fault.__name__):
                        under_fault(fault, said, host, load, server, proxy)
            finally:
                load.stop()
            host.wait_until_idle()
            host.wait(lambda: host.json("status")["outbox"] == 0, "the rows are shipped", timeout=70)
            assert host.json("status")["log_waits"] == {} and "the log waits" not in host.cli("status").stdout
        assert Counter(subject(each.data) for each in sink.messages()) == Counter(load.sent)
        logged = rows_of(server)
        assert logged == host.rows()
        assert [row["seq"] for row in logged] == list(range(1, 2 * len(load.sent) + 1))
        assert Counter(row["subject"] for row in logged) == {name: 2 for name in load.sent}
        assert {row["event"] for row in logged} == {"released"}
        assert "Traceback" not in host.log()
        # One line a minute at most.
        assert 1 <= host.log().count("MySQL does not take the log") <= (time.monotonic() - begun) / 60 + 1


@contextmanager
def context(name: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note(f"while MySQL is {name}")
        raise


def under_fault(fault: Fault, said: str, host: Host, load: Load, server: MariaDB, proxy: Proxy) -> None:
    before = time.monotonic()
    steps = fault(server, proxy)
    next(steps)
    load.all_out()
    if said:
        host.wait(lambda: re.search(said, host.json("status")["log_waits"].get("reason", "")), "status says it", timeout=90)
        assert re.search(r"the log waits: MySQL has taken none since \d{4}-.*" + said, host.cli("status").stdout)
        assert host.json("status")["outbox"] > 0
        load.all_out()
    else:
        through(host, server)
    next(steps, None)
    # The next one begins with a log that gets through.
    through(host, server)
    print(f"{fault.__name__}: {time.monotonic() - before:.0f} s, {len(load.sent)} mails so far")


def through(host: Host, server: MariaDB) -> None:
    """What is logged by now is in MySQL, and the log waits no more."""
    (last,) = [row["seq"] for row in host.json("log", "--source", "ledger", "--last", "1")]
    query = f"SELECT 1 FROM mail_log WHERE seq = {last}"
    host.wait(lambda: server.root(query) and not host.json("status")["log_waits"], "the log gets through", timeout=90)
