"""Real mail servers for the tests: Postfix, its smtp-sink, Exim, and a relay that records what passes on the wire.

Everything listens on the loopback address only, runs out of the cache that tests/packages.sh fills, and keeps its
files in a directory of its own under /tmp.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

HOST = "127.0.0.1"
POSTFIX = Path(__file__).resolve().parent.parent / ".cache/debian/postfix"
LIBRARIES = POSTFIX / "usr/lib/postfix"
EXIM = POSTFIX.parent / "exim4-daemon-light/usr/sbin/exim4"

# Accounts that every Debian has and nothing uses. Postfix wants a user and a group that share their ids with nobody.
MAIL_OWNER = "list"
SETGID_GROUP = "irc"
SINK_USER = "nobody"
# Exim runs as the user of this name, whose entry it sees in a passwd file of its own.
EXIM_USER = "Debian-exim"
EXIM_UID = 64000

# Waits for the end of its input, which is the end of the test run, however that ends. $1 is a process group.
WATCH = 'read -r _; kill -s TERM -- "-$1"; sleep 1; kill -s KILL -- "-$1"; rm -rf -- "$2"'

START_TIMEOUT = 10.0
STOP_TIMEOUT = 10.0

_given_ports: set[int] = set()


def free_port() -> int:
    """A loopback port that nothing uses, and that this function never gives again."""
    # Outside the range from which the kernel takes the ports of clients. In it, a client that tries a stopped server
    # again and again may be given the server's own port, and then talks to itself.
    lowest_of_clients = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(10000, lowest_of_clients)
        if port in _given_ports:
            continue
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        _given_ports.add(port)
        return port


def wait_until(condition: Callable[[], bool], timeout: float, what: str) -> None:
    """Returns when the condition holds; TimeoutError when it does not in time."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout} s: {what}")
        time.sleep(0.02)


@dataclass(frozen=True)
class Message:
    """A message that has been sent up to its final dot."""

    sender: str
    recipients: list[str]
    data: bytes
    # What stood behind the sender's address in MAIL, as SIZE=100 BODY=8BITMIME.
    mail_options: str = ""
    # The server's answer to the final dot, empty if none came. Only a Wire sees it.
    reply: str = ""


@dataclass(frozen=True)
class _Process:
    server: subprocess.Popen[bytes]
    # A shell that ends the server should the test run be killed.
    watcher: subprocess.Popen[bytes]


class _Server:
    """A server process with a directory that lasts until close(). As a context manager, runs from start to close."""

    def __init__(self, port: int | None) -> None:
        self.port = port or free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="pss-", dir="/tmp"))
        # The servers change to other users, who must be able to come in.
        self.directory.chmod(0o755)
        self._processes: list[_Process] = []
        # Also runs when the interpreter ends, so that nothing stays behind when a test forgets close() or fails.
        self._finalizer = weakref.finalize(self, _remove, self._processes, self.directory)

    def _start(self, command: Sequence[str], is_up: Callable[[], bool], environment: Mapping[str, str]) -> None:
        if self._processes:
            raise RuntimeError("already started")
        if _is_listening(self.port):
            raise RuntimeError(f"port {self.port} is in use")
        with open(self.directory / "stderr", "ab") as stderr:
            server = subprocess.Popen(
                command,
                cwd=self.directory,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LD_LIBRARY_PATH": str(LIBRARIES), **environment},
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                # Its own process group, so that stop() reaches its children and nobody else.
                start_new_session=True,
            )
        watcher = subprocess.Popen(
            ["/bin/sh", "-c", WATCH, "watcher", str(server.pid), str(self.directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._processes.append(_Process(server, watcher))
        try:
            wait_until(lambda: server.poll() is not None or is_up(), START_TIMEOUT, f"{command[0]} starts")
            if server.returncode is not None:
                raise RuntimeError(f"{command[0]} ended with {server.returncode}")
        except BaseException as error:
            error.add_note((self.directory / "stderr").read_text(errors="replace") + self.log())
            self.stop()
            raise

    def start(self) -> None:
        raise NotImplementedError

    def log(self) -> str:
        """The server's log from the first start on."""
        try:
            return (self.directory / "log").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def stop(self) -> None:
        """Ends the server, if it runs. Its files stay, and start() goes on with them on the same port."""
        _end(self._processes)
        wait_until(lambda: not _is_listening(self.port), STOP_TIMEOUT, f"port {self.port} becomes free")

    def close(self) -> None:
        """Ends the server and removes its files."""
        self._finalizer()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Sink(_Server):
    """Postfix's smtp-sink: takes every message, or refuses as its options say.

    The options (see smtp-sink(1)) may be changed while it is stopped.
    """

    def __init__(self, options: Sequence[str] = (), port: int | None = None) -> None:
        super().__init__(port)
        self.options = list(options)
        self._separator = f"message {secrets.token_hex(16)}\n"
        self._dump = self.directory / "mail" / "dump"
        self._dump.parent.mkdir()
        if os.getuid() == 0:
            shutil.chown(self._dump.parent, SINK_USER)

    def start(self) -> None:
        user = ["-u", SINK_USER] if os.getuid() == 0 else []
        # With -D smtp-sink appends whole messages, in the order of their final dots. (With -d there is a file per
        # message with a random name, from the first line of the message on.)
        keep = ["-S", self._separator, "-D", str(self._dump)]
        program = str(POSTFIX / "usr/sbin/smtp-sink")
        self._start(
            [program, *user, *keep, *self.options, f"{HOST}:{self.port}", "100"],
            # A connection would count for -n, and be refused with -q CONNECT.
            lambda: _is_listening(self.port),
            {},
        )

    def messages(self) -> list[Message]:
        """The messages so far, in the order of arrival.

        Also those whose final dot smtp-sink answered with a refusal or not at all. smtp-sink keeps neither the kind of
        the line ends (all are LF here) nor bare CRs, and writes what is not ASCII in an address as "?": see Wire.
        """
        if not self._dump.exists():
            return []
        content = self._dump.read_bytes()
        # smtp-sink has the file open only while it appends a message, in several writes if it is a large one.
        while self._is_appending() or len(content) != self._dump.stat().st_size:
            time.sleep(0.002)
            content = self._dump.read_bytes()
        return [_dumped_message(part) for part in content.split(self._separator.encode())[1:]]

    def wait(self, count: int, timeout: float = 10.0) -> list[Message]:
        """Waits until there are at least so many messages, and returns all."""
        wait_until(lambda: len(self.messages()) >= count, timeout, f"{count} messages at the sink")
        return self.messages()

    def _is_appending(self) -> bool:
        for process in self._processes:
            for descriptor in Path(f"/proc/{process.server.pid}/fd").glob("*"):
                try:
                    if descriptor.readlink() == self._dump:
                        return True
                except FileNotFoundError:
                    # Closed in the meantime.
                    pass
        return False


class Postfix(_Server):
    """A private Postfix that takes mail from this machine and sends all of it to one other loopback port.

    Must be started by root. The parameters (as in main.cf) may be changed while it is stopped.
    """

    def __init__(
        self,
        relay_port: int,
        message_size_limit: int = 10_240_000,
        parameters: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        super().__init__(port)
        self.relay_port = relay_port
        self.parameters = {"message_size_limit": str(message_size_limit), **(parameters or {})}
        for name in ("config", "data", "queue"):
            (self.directory / name).mkdir()
            # Whatever the umask is.
            (self.directory / name).chmod(0o755)
        shutil.chown(self.directory / "data", MAIL_OWNER)
        self._make_queue()

    def start(self) -> None:
        """Returns when the server greets."""
        config = self.directory / "config"
        (config / "main.cf").write_text("".join(f"{name} = {value}\n" for name, value in self._main_cf().items()))
        # Postfix waits until a main.cf is older than a second, lest somebody be writing it.
        an_hour_ago = time.time() - 3600
        os.utime(config / "main.cf", (an_hour_ago, an_hour_ago))
        (config / "master.cf").write_text(MASTER_CF.format(host=HOST, port=self.port))
        # With these two, errors in main.cf reach the log too.
        environment = {"POSTLOG_SERVICE": str(self.directory / "queue/public/postlog"), "POSTLOG_HOSTNAME": "mta"}
        self._start([str(LIBRARIES / "sbin/master"), "-d", "-c", str(config)], self._greets, environment)

    def sendmail(self) -> Path:
        """This Postfix's sendmail command, for root: everybody else needs postdrop set-gid, and so its own libraries."""
        environment = f"MAIL_CONFIG={self.directory}/config LD_LIBRARY_PATH={LIBRARIES}"
        return _script(self.directory / "sendmail", f'exec env {environment} {POSTFIX}/usr/sbin/sendmail "$@"\n')

    def _main_cf(self) -> dict[str, str]:
        return {
            "compatibility_level": "3.6",
            "queue_directory": str(self.directory / "queue"),
            "data_directory": str(self.directory / "data"),
            "maillog_file": str(self.directory / "log"),
            "maillog_file_prefixes": str(self.directory),
            "meta_directory": str(self.directory / "config"),
            "command_directory": str(POSTFIX / "usr/sbin"),
            "daemon_directory": str(LIBRARIES / "sbin"),
            "shlib_directory": str(LIBRARIES),
            # The programs look for their libraries in the directories of an installed Postfix.
            "import_environment": "MAIL_CONFIG POSTLOG_SERVICE POSTLOG_HOSTNAME TZ LANG=C LD_LIBRARY_PATH",
            "export_environment": "MAIL_CONFIG TZ LANG LD_LIBRARY_PATH",
            "mail_owner": MAIL_OWNER,
            "setgid_group": SETGID_GROUP,
            "myhostname": "mta.test",
            "mydestination": "",
            "alias_maps": "",
            "alias_database": "",
            "local_recipient_maps": "",
            "inet_interfaces": HOST,
            "inet_protocols": "ipv4",
            "mynetworks": "127.0.0.0/8",
            "smtpd_relay_restrictions": "permit_mynetworks, reject",
            "relayhost": f"[{HOST}]:{self.relay_port}",
            # No question leaves the machine, and no message about the tests' errors is sent.
            "smtp_dns_support_level": "disabled",
            "smtpd_peername_lookup": "no",
            "notify_classes": "",
            **self.parameters,
        }

    def _make_queue(self) -> None:
        mails = ("incoming", "active", "deferred", "hold", "corrupt", "saved")
        others = ("bounce", "defer", "flush", "private", "trace")
        for name, mode in {**dict.fromkeys(mails + others, 0o700), "maildrop": 0o730, "public": 0o710}.items():
            path = self.directory / "queue" / name
            path.mkdir()
            shutil.chown(path, MAIL_OWNER, SETGID_GROUP)
            path.chmod(mode)
        # This one stays root's.
        (self.directory / "queue" / "pid").mkdir()

    def _greets(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), timeout=START_TIMEOUT) as connection:
                return connection.recv(4) == b"220 "
        except OSError:
            return False


class Exim:
    """A private Exim without a daemon: its command takes a message and at once sends it on to a loopback port.

    Must be used by root, for whom the binary needs no set-uid bit to accept a configuration of ours.
    """

    def __init__(self, relay_port: int, message_size_limit: int = 10_240_000) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="pss-", dir="/tmp"))
        self.directory.chmod(0o755)
        self._finalizer = weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)
        for name in ("spool", "logs"):
            (self.directory / name).mkdir()
            os.chown(self.directory / name, EXIM_UID, EXIM_UID)
        for name, rest in (("passwd", f"{EXIM_UID}::/:/bin/false"), ("group", "")):
            accounts = Path("/etc", name).read_text() + f"{EXIM_USER}:x:{EXIM_UID}:{rest}\n"
            (self.directory / name).write_text(accounts)
        # It runs itself again as its user, who may not come into the directory of the cache.
        self._program = self.directory / "exim"
        shutil.copy(EXIM, self._program)
        size = str(message_size_limit)
        configuration = EXIM_CONF.format(program=self._program, directory=self.directory, size=size, host=HOST, port=relay_port)
        (self.directory / "exim.conf").write_text(configuration)

    def sendmail(self) -> Path:
        """Exim's sendmail command. The files of the accounts are its own in a mount namespace that ends with it."""
        mounts = " && ".join(f"mount --bind {self.directory}/{name} /etc/{name}" for name in ("passwd", "group"))
        inner = f'{mounts} && exec {self._program} -C {self.directory}/exim.conf "$@"'
        return _script(self.directory / "sendmail", f"exec unshare -m /bin/sh -c '{inner}' sendmail \"$@\"\n")

    def log(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted((self.directory / "logs").iterdir()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._finalizer()


class EximServer(_Server):
    """A private Exim that takes mail on a loopback port, and at once sends it on to another."""

    def __init__(self, relay_port: int, option: str) -> None:
        """OPTION: a line of its configuration."""
        super().__init__(None)
        self._exim = Exim(relay_port)
        configuration = self._exim.directory / "exim.conf"
        configuration.write_text(f"{option}\n{configuration.read_text()}")

    def start(self) -> None:
        command = [str(self._exim.sendmail()), "-bdf", "-oX", f"[{HOST}]:{self.port}"]
        self._start(command, lambda: _is_listening(self.port), {})

    def log(self) -> str:
        return self._exim.log()


EXIM_CONF = """\
exim_path = {program}
spool_directory = {directory}/spool
log_file_path = {directory}/logs/%s
primary_hostname = mta.test
keep_environment =
message_size_limit = {size}
acl_smtp_rcpt = accept
begin routers
relay:
  driver = manualroute
  transport = smtp
  route_list = * {host}
  self = send
begin transports
smtp:
  driver = smtp
  port = {port}
  allow_localhost
begin retry
* * F,2h,1s
"""


MASTER_CF = """\
{host}:{port} inet n - n - - smtpd
pickup unix n - n 60 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
smtp unix - - n - - smtp
relay unix - - n - - smtp
showq unix n - n - - showq
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
postlog unix-dgram n - n - 1 postlogd
"""


@dataclass
class Connection:
    """What passed on one connection through a Wire, byte by byte."""

    client: bytearray = field(default_factory=bytearray)
    server: bytearray = field(default_factory=bytearray)


class Wire:
    """A relay in front of a server on another loopback port: changes nothing, and records both directions.

    A byte is recorded before it is passed on, so what a client has been answered is there to be looked at.
    """

    def __init__(self, target_port: int) -> None:
        self.port = free_port()
        self.target_port = target_port
        self.connections: list[Connection] = []
        self._listener: socket.socket | None = None
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()

    def start(self) -> None:
        self._listener = socket.create_server((HOST, self.port), backlog=100)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        """Ends the relay and its connections. The record stays, and start() goes on with it on the same port."""
        with self._lock:
            listener, self._listener = self._listener, None
            sockets = list(self._sockets)
        if listener is not None:
            # Wakes the thread in accept(), which close() would not.
            _shut(listener, socket.SHUT_RDWR)
            listener.close()
        for each in sockets:
            _shut(each, socket.SHUT_RDWR)

    close = stop

    def messages(self) -> list[Message]:
        """The messages of all connections, bytes as on the wire but for the dots that SMTP adds at line starts.

        The recipients are those that the server took. Ordered by connection, then by the order in it.
        """
        return [message for connection in list(self.connections) for message in _messages_on_wire(connection)]

    def wait(self, count: int, timeout: float = 10.0) -> list[Message]:
        """Waits until there are at least so many answered messages, and returns all messages."""
        wait_until(
            lambda: sum(1 for message in self.messages() if message.reply) >= count,
            timeout,
            f"{count} messages on the wire",
        )
        return self.messages()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(listener, client), daemon=True).start()

    def _relay(self, listener: socket.socket, client: socket.socket) -> None:
        with client:
            try:
                server = socket.create_connection((HOST, self.target_port))
            except OSError:
                # The client sees a connection that ends at once, the nearest thing to the server's refusal.
                return
            with server:
                connection = Connection()
                with self._lock:
                    if self._listener is not listener:
                        return
                    self.connections.append(connection)
                    self._sockets |= {client, server}
                back = threading.Thread(target=_pass_on, args=(server, client, connection.server), daemon=True)
                back.start()
                _pass_on(client, server, connection.client)
                back.join()
                with self._lock:
                    self._sockets -= {client, server}


# What a Scripted server answers instead of words: it ends the connection.
HANG_UP = b""
# Takes the command, or the message, in its usual words.
YES = None
# At the end of a reply: these bytes are sent as they are, and then the connection ends.
END = b"\0"
Answer = Callable[[bytes], "bytes | None"]


def always_yes(_command: bytes) -> bytes | None:
    return YES


class Scripted:
    """A mail server that answers every command, and the final dot as b".", as `answer` says; it greets as `greet` says.

    What it answers with 2xx, or not at all, at the final dot it has taken. With `pipelining` it offers that, and refuses what is
    behind a refused command without being asked.
    """

    def __init__(
        self,
        answer: Answer = always_yes,
        greet: Callable[[], bytes | None] = lambda: YES,
        port: int = 0,
        pipelining: bool = False,
    ) -> None:
        self.answer, self.greet = answer, greet
        self.pipelining = pipelining
        self.messages: list[Message] = []
        self.commands: list[bytes] = []
        self.connections = 0
        self.port = port
        self.start()

    def start(self) -> None:
        """Listens, also again after close()."""
        self._listener = socket.create_server((HOST, self.port), backlog=100)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"smtp://{HOST}:{self.port}"

    @property
    def bodies(self) -> list[bytes]:
        """The first line of each message's text."""
        return [message.data.partition(b"\r\n\r\n")[2].partition(b"\r\n")[0] for message in self.messages]

    @property
    def copies(self) -> Counter[str]:
        """How often each recipient has got something."""
        return Counter(recipient for message in self.messages for recipient in message.recipients)

    def count(self, verb: bytes) -> int:
        return sum(1 for command in self.commands if command.startswith(verb))

    def close(self) -> None:
        # Wakes the thread in accept().
        _shut(self._listener, socket.SHUT_RDWR)
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sender, recipients, begun = "", list[str](), False
        with connection, connection.makefile("rb") as lines:
            try:
                greeting = self.greet()
                if not _said(connection, b"220 test" if greeting is YES else greeting):
                    return
                while line := lines.readline().strip():
                    self.commands.append(line)
                    early = self.pipelining and not (recipients if line == b"DATA" else begun or line[:4] != b"RCPT")
                    reply = b"503 5.5.1 not yet" if early else self.answer(line)
                    usual = b"250 ok"
                    if line.startswith(b"ehlo"):
                        usual = b"250-test\r\n" + b"250-PIPELINING\r\n" * self.pipelining + b"250 8BITMIME"
                    elif line.startswith(b"MAIL FROM:"):
                        sender, recipients, begun = _split_path(line.decode().partition(":")[2])[0], [], reply is YES
                    elif line.startswith(b"RCPT TO:") and reply is YES:
                        recipients.append(_split_path(line.decode().partition(":")[2])[0])
                    elif line == b"DATA" and reply is YES:
                        connection.sendall(b"354 go on\r\n")
                        data = _up_to_final_dot(lines)
                        if data is None:
                            return
                        reply = self.answer(b".")
                        if not reply or reply.startswith(b"2"):
                            self.messages.append(Message(sender, recipients, data))
                    if not _said(connection, usual if reply is YES else reply):
                        return
            except OSError:
                # The client has ended the connection.
                pass


@dataclass
class Transaction:
    """What a Recorder has seen from MAIL on, which it has answered. Times are seconds since 1970."""

    sender: str
    # Before MAIL was answered.
    began: float
    # Those that it has taken; when it had the final dot, if it has taken the message; and the message.
    recipients: list[str] = field(default_factory=list)
    taken: float = 0.0
    data: bytes = b""
    # Whether the client has been told so.
    replied: bool = False


class Recorder(Scripted):
    """A mail server that keeps every transaction, and answers b"MAIL", b"RCPT", b"DATA" and b"." as `judge` says.

    It is given the address of MAIL or RCPT, behind that MAIL's. close() ends the connections, too.
    """

    def __init__(self, judge: Callable[[bytes, str], bytes | None], port: int) -> None:
        self.judge = judge
        self.transactions: list[Transaction] = []
        self._open: set[socket.socket] = set()
        super().__init__(port=port)

    def close(self) -> None:
        super().close()
        for connection in list(self._open):
            _shut(connection, socket.SHUT_RDWR)

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._open.add(connection)
        try:
            with connection, connection.makefile("rb") as lines:
                if _said(connection, b"220 test"):
                    self._converse(connection, lines)
        except OSError:
            # The connection has been ended, by the client or by close().
            pass
        finally:
            self._open.discard(connection)

    def _converse(self, connection: socket.socket, lines: BinaryIO) -> None:
        current = Transaction("", 0.0)
        while line := lines.readline().strip():
            verb, reply = line[:4].upper(), YES
            if verb == b"MAIL":
                sender = _split_path(line.decode().partition(":")[2])[0]
                reply = self.judge(verb, sender)
                current = Transaction(sender, time.time())
            elif verb == b"RCPT":
                recipient = _split_path(line.decode().partition(":")[2])[0]
                reply = self.judge(verb, recipient)
                if reply is YES:
                    current.recipients.append(recipient)
            elif verb == b"DATA":
                reply = self.judge(verb, current.sender)
                if reply is YES:
                    connection.sendall(b"354 go on\r\n")
                    if not self._take(current, lines):
                        return
                    received = time.time()
                    reply = self.judge(b".", current.sender)
                    if not reply or reply.startswith(b"2"):
                        # What it does not answer it has taken all the same.
                        current.taken = received
            usual = b"250-test\r\n250 8BITMIME" if verb == b"EHLO" else b"250 ok"
            if not _said(connection, usual if reply is YES else reply):
                return
            if verb == b"MAIL" and (reply is YES or not reply.startswith(b"421")):
                self.transactions.append(current)
            current.replied = bool(current.taken)

    @staticmethod
    def _take(current: Transaction, lines: BinaryIO) -> bool:
        """Reads the message; whether it has come to its end."""
        read = []
        while (line := lines.readline()) != b".\r\n":
            if not line.endswith(b"\n"):
                return False
            read.append(line[1:] if line.startswith(b".") else line)
        current.data = b"".join(read)
        return True


def _up_to_final_dot(lines: BinaryIO) -> bytes | None:
    """The lines of a message as they are on the wire; None where the client ends before the last."""
    read = []
    while (line := lines.readline()) != b".\r\n":
        if not line.endswith(b"\n"):
            return None
        read.append(line)
    return b"".join(read)


def _said(connection: socket.socket, reply: bytes) -> bool:
    """Sends the reply; whether the connection goes on behind it."""
    if reply == HANG_UP or reply.endswith(END):
        connection.sendall(reply.removesuffix(END))
        return False
    connection.sendall(reply + b"\r\n")
    return True


def _script(path: Path, text: str) -> Path:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def _is_listening(port: int) -> bool:
    # Each line: number, local address as hex ADDRESS:PORT, remote address, state (0A is LISTEN).
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state = line.split()[:4]
        if state == "0A" and int(local.rpartition(":")[2], 16) == port:
            return True
    return False


def _end(processes: list[_Process]) -> None:
    while processes:
        process = processes.pop()
        process.watcher.kill()
        process.watcher.communicate()
        _signal_group(process.server, signal.SIGTERM)
        try:
            process.server.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            pass
        # Whatever of its children has not followed it.
        _signal_group(process.server, signal.SIGKILL)
        process.server.wait()


def _signal_group(leader: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(leader.pid, number)
    except ProcessLookupError:
        # All have ended.
        pass


def _remove(processes: list[_Process], directory: Path) -> None:
    _end(processes)
    shutil.rmtree(directory, ignore_errors=True)


def _dumped_message(part: bytes) -> Message:
    # The headers of smtp-sink itself end with a Received of three lines; behind the message stands an empty line.
    match = re.fullmatch(rb"((?:X-[^\n]*\n)+)Received: [^\n]*\n\t[^\n]*\n\t[^\n]*\n(.*)\n", part, re.DOTALL)
    if match is None:
        raise ValueError(f"not a message of smtp-sink: {part!r}")
    headers = match[1].decode("ascii", "surrogateescape").removesuffix("\n").split("\n")
    fields = [header.partition(": ")[::2] for header in headers]
    sender, mail_options = next(_split_path(value) for name, value in fields if name == "X-Mail-Args")
    recipients = [_split_path(value)[0] for name, value in fields if name == "X-Rcpt-Args"]
    return Message(sender, recipients, match[2], mail_options)


def _messages_on_wire(connection: Connection) -> list[Message]:
    """The messages of one connection, told from the commands and the replies to them."""
    messages = []
    sender = mail_options = ""
    recipients: list[str] = []
    replies = re.findall(rb"^(?:\d{3}-.*\n)*(\d{3}(?: .*)?)\r\n", bytes(connection.server), re.MULTILINE)
    # The first is the greeting.
    later_replies = iter(reply.decode("utf-8", "surrogateescape") for reply in replies[1:])
    rest = bytes(connection.client)
    while b"\r\n" in rest:
        line, _, rest = rest.partition(b"\r\n")
        reply = next(later_replies, "")
        verb, _, argument = line.decode("utf-8", "surrogateescape").partition(":")
        if verb.upper() == "MAIL FROM" and reply.startswith("2"):
            sender, mail_options = _split_path(argument)
            recipients = []
        elif verb.upper() == "RCPT TO" and reply.startswith("2"):
            recipients.append(_split_path(argument)[0])
        elif verb.upper() == "DATA" and reply.startswith("3"):
            # The line end of DATA is put back, for the message that is only a dot.
            content, dot, rest = (b"\r\n" + rest).partition(b"\r\n.\r\n")
            if not dot:
                break
            data = (content + b"\r\n").replace(b"\r\n.", b"\r\n").removeprefix(b"\r\n")
            messages.append(Message(sender, recipients, data, mail_options, next(later_replies, "")))
            recipients = []
    return messages


def _split_path(argument: str) -> tuple[str, str]:
    """Splits the argument of MAIL or RCPT into the address and the options behind it."""
    match = re.fullmatch(r'\s*<((?:"(?:\\.|[^"\\])*"|[^">])*)>\s*(.*)', argument, re.DOTALL)
    if match is None:
        raise ValueError(f"not a path in angle brackets: {argument!r}")
    return match[1], match[2]


def _pass_on(source: socket.socket, target: socket.socket, record: bytearray) -> None:
    try:
        while data := source.recv(65536):
            record += data
            target.sendall(data)
    except OSError:
        # One of them has gone without a farewell; the other side learns it as the end of the connection.
        _shut(source, socket.SHUT_RD)
    _shut(target, socket.SHUT_WR)


def _shut(connection: socket.socket, how: int) -> None:
    try:
        connection.shutdown(how)
    except OSError:
        # It is shut already.
        pass
