"""Hand-over to the MTA: SMTP, its sendmail command, or a maildir; in threads that only read the message they are given."""

import io
import math
import os
import queue
import re
import select
import signal
import smtplib
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import BinaryIO, Protocol

# Sessions at once. One vhost uses one at a time, which keeps its mail in order.
SESSIONS = 4
# Messages in one session: some servers take no more than a hundred, and Exim only queues what comes after the tenth.
MESSAGES_PER_SESSION, MESSAGES_FOR_EXIM = 100, 10
# RFC 5321 section 4.5.3.1.8: a server takes at least 100 recipients in one transaction.
RECIPIENTS_PER_TRANSACTION = 100
# An unused session is closed after this many seconds.
IDLE = 5
# Seconds to wait for a connection, a reply, and the reply to the final dot (RFC 5321 section 4.5.3.2).
CONNECT_TIMEOUT, REPLY_TIMEOUT, DOT_TIMEOUT = 30, 300, 600
# Seconds that a sendmail command may take, and then to end in good order before it is killed.
SENDMAIL_TIMEOUT, SENDMAIL_GRACE = 300, 5
SENDMAIL_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
# A sendmail command that ends with one of these refuses this message, or its recipient, for good. With any other status
# the message is tried again until give_up: 75 is all that Postfix's says of any error, 1 all that Exim's says, and most
# of the others speak of the host.
SENDMAIL_REFUSALS = (os.EX_DATAERR, os.EX_NOUSER)

# No other chunk is the same, since a line of one dot has two on the wire.
FINAL_DOT = b".\r\n"

# How it greets, and how it says that it has a message, of which an administrator may have changed one.
_EXIM = re.compile(r"220 .*\bExim\b|250 OK id=")
_QUEUED = re.compile(r"queued as ([0-9A-Za-z]+)|\bid=([0-9A-Za-z-]+)")


class Kind(Enum):
    SENT = "sent"
    TEMPFAIL = "tempfail"
    PERMFAIL = "permfail"
    # The final dot went out and no reply came back.
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Outcome:
    """What became of one recipient, in the MTA's words."""

    recipient: str
    kind: Kind
    words: str
    mta_queue_id: str = ""


@dataclass(frozen=True)
class Job:
    """A message for some recipients; MESSAGE opens its bytes, lines ended by LF."""

    queue_id: str
    sender: str
    recipients: tuple[str, ...]
    message: Callable[[], BinaryIO]
    size: int
    ascii_only: bool
    # Mail of one maildrop goes one after the other.
    maildrop: str = ""
    # What the sender is to be told (RFC 3461 section 4.1); empty: what the MTA does without being asked.
    notify: str = ""


class Unreachable(Exception):
    """No MTA to talk to; nothing of the message was handed over. The text says why."""


class Session(Protocol):
    def send(self, job: Job) -> list[Outcome]:
        """Hand JOB over; an outcome for each of its recipients. Raises Unreachable."""

    def close(self) -> None: ...


class SmtpSession:
    """A client of one SMTP server, connected when needed (RFC 5321)."""

    def __init__(self, host: str, port: int, learn_size: Callable[[int], None]) -> None:
        self._host, self._port = host, port
        self._learn_size = learn_size
        self._smtp: smtplib.SMTP | None = None
        self._sent = 0
        self._most = MESSAGES_PER_SESSION
        self._dot_sent = False
        # Whether all commands of the transaction have been sent, and only their replies are still to be read.
        self._asked = False

    def send(self, job: Job) -> list[Outcome]:
        self._dot_sent = False
        if self._sent >= self._most:
            self.close()
        smtp, code, words = self._mail(job)
        outcomes: dict[str, Outcome] = {}
        try:
            if code // 100 == 2:
                self._transaction(smtp, job, outcomes)
            else:
                _all(job.recipients, code, words, outcomes)
        except (smtplib.SMTPException, OSError, ValueError) as error:
            # Before the final dot nothing was accepted; behind it nobody knows. Either way it is tried again.
            kind = Kind.UNKNOWN if self._dot_sent else Kind.TEMPFAIL
            for recipient in job.recipients:
                outcomes.setdefault(recipient, Outcome(recipient, kind, _words(error)))
        self._sent += 1
        if any(outcome.kind is not Kind.SENT for outcome in outcomes.values()):
            # After any error a new session, so that no state of this one meets the next message.
            self.close()
        return [outcomes[recipient] for recipient in job.recipients]

    def close(self) -> None:
        if self._smtp is not None:
            try:
                _socket(self._smtp).settimeout(5)
                self._smtp.quit()
            except (smtplib.SMTPException, OSError):
                # The server has ended the session first, which is as good.
                self._smtp.close()
            self._smtp = None
            self._sent = 0

    def _mail(self, job: Job) -> tuple[smtplib.SMTP, int, str]:
        """The reply to MAIL. A session that the server has closed meanwhile is opened again, once."""
        if self._smtp is not None:
            try:
                code, words = self._sender(self._smtp, job)
                if code != 421:
                    return self._smtp, code, words
            except (smtplib.SMTPException, OSError):
                pass
            self.close()
        try:
            smtp = self._connect()
            code, words = self._sender(smtp, job)
        except Unreachable:
            self.close()
            raise
        except (smtplib.SMTPException, OSError) as error:
            self.close()
            raise Unreachable(_words(error)) from None
        if code == 421:
            self.close()
            raise Unreachable(words)
        return smtp, code, words

    def _connect(self) -> smtplib.SMTP:
        # local_hostname is given, since smtplib would ask the name service for it.
        smtp = self._smtp = smtplib.SMTP(local_hostname=os.uname().nodename, timeout=CONNECT_TIMEOUT)
        code, reply = smtp.connect(self._host, self._port)
        if code != 220:
            raise Unreachable(_reply(code, reply))
        self._look_for_exim(_reply(code, reply))
        # Or the final dot would wait for the server's delayed acknowledgement, 40 ms a message.
        _socket(smtp).setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        smtp.command_encoding = "utf-8"
        code, reply = smtp.ehlo()
        if code != 250:
            code, reply = smtp.helo()
        if code != 250:
            raise Unreachable(_reply(code, reply))
        _socket(smtp).settimeout(REPLY_TIMEOUT)
        announced = smtp.esmtp_features.get("size", "")
        # RFC 1870 section 3: up to 20 digits.
        self._learn_size(int(announced) if re.fullmatch("[0-9]{1,20}", announced) else 0)
        self._sent = 0
        return smtp

    def _sender(self, smtp: smtplib.SMTP, job: Job) -> tuple[int, str]:
        # Of an earlier session that has ended meanwhile, whatever it was asked.
        self._asked = False
        if not self._takes(smtp, job.sender):
            return 553, "the MTA does not offer SMTPUTF8, which the sender's address needs"
        if smtp.has_extn("pipelining"):
            # In one packet instead of three, each of which would be waited for (RFC 2920).
            recipients = [self._rcpt(smtp, address, job) for address in job.recipients if self._takes(smtp, address)]
            lines = "".join(f"{line}\r\n" for line in (self._mail_from(smtp, job), *recipients, "DATA"))
            if lines.count("\r") + lines.count("\n") != 2 * (len(recipients) + 2):
                # As smtplib does: no address becomes a command.
                raise ValueError("the envelope has the end of a line in an address")
            _socket(smtp).sendall(lines.encode())
            self._asked = True
        return self._command(smtp, self._mail_from(smtp, job))

    def _mail_from(self, smtp: smtplib.SMTP, job: Job) -> str:
        words = [f"MAIL FROM:<{job.sender}>"]
        if smtp.has_extn("size"):
            words.append(f"SIZE={job.size}")
        if not job.ascii_only and smtp.has_extn("8bitmime"):
            words.append("BODY=8BITMIME")
        if not all(address.isascii() for address in (job.sender, *job.recipients)) and smtp.has_extn("smtputf8"):
            words.append("SMTPUTF8")
        return " ".join(words)

    def _transaction(self, smtp: smtplib.SMTP, job: Job, outcomes: dict[str, Outcome]) -> None:
        accepted = []
        for recipient in job.recipients:
            code, words = 553, "the MTA does not offer SMTPUTF8, which this address needs"
            if self._takes(smtp, recipient):
                code, words = self._command(smtp, self._rcpt(smtp, recipient, job))
            if code // 100 == 2:
                accepted.append(recipient)
            else:
                _all([recipient], code, words, outcomes)
        if not accepted:
            # Should DATA have been sent already, the session ends without a final dot: nothing is handed over.
            return
        code, words = self._command(smtp, "DATA")
        if code != 354:
            # Nothing was handed over, also where the reply is a yes.
            _all(accepted, code if code // 100 == 5 else 451, f"to DATA: {words}", outcomes)
            return
        last = b""
        with job.message() as stream:
            for chunk in on_the_wire(stream):
                if chunk != FINAL_DOT:
                    if last:
                        _socket(smtp).sendall(last)
                    last = chunk
        # With the final dot, so that a small message is one packet.
        view = memoryview(last + FINAL_DOT)
        while view:
            view = view[_socket(smtp).send(view) :]
        # Had the last of these failed, the end of the dot would not have left us.
        self._dot_sent = True
        _socket(smtp).settimeout(DOT_TIMEOUT)
        code, reply = smtp.getreply()
        _socket(smtp).settimeout(REPLY_TIMEOUT)
        if code // 100 not in (2, 4, 5):
            # Torn or none at all: the message may have been taken.
            raise smtplib.SMTPServerDisconnected(f"no reply to the final dot: {_reply(code, reply)}")
        words = _reply(code, reply)
        self._look_for_exim(words)
        _all(accepted, code, words, outcomes)

    def _look_for_exim(self, words: str) -> None:
        if _EXIM.match(words):
            self._most = MESSAGES_FOR_EXIM

    def _takes(self, smtp: smtplib.SMTP, recipient: str) -> bool:
        return recipient.isascii() or smtp.has_extn("smtputf8")

    def _rcpt(self, smtp: smtplib.SMTP, recipient: str, job: Job) -> str:
        option = f" NOTIFY={job.notify}" if job.notify and smtp.has_extn("dsn") else ""
        return f"RCPT TO:<{recipient}>{option}"

    def _command(self, smtp: smtplib.SMTP, line: str) -> tuple[int, str]:
        """The reply to LINE, which is sent unless that was done already."""
        if not self._asked:
            smtp.putcmd(line)
        code, reply = smtp.getreply()
        return code, _reply(code, reply)


class SendmailSession:
    """The MTA's sendmail command, run once for each transaction."""

    def __init__(self, program: str) -> None:
        self._program = program

    def send(self, job: Job) -> list[Outcome]:
        sender, recipients = job.sender or "<>", (recipient.encode() for recipient in job.recipients)
        # Words, never a shell. The envelope is all that counts (no -t), a dot ends nothing (-i), and errors are told
        # here, not in a mail to the sender (-oep). Behind -f and -- nothing is an option, whatever it begins with.
        command = [self._program.encode(), b"-i", b"-oep", b"-f", sender.encode(), b"--", *recipients]
        try:
            stdin = _as_file(job.message)
        except OSError as error:
            return [Outcome(recipient, Kind.TEMPFAIL, _words(error)) for recipient in job.recipients]
        try:
            process = subprocess.Popen(
                command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0, cwd="/",
                env=SENDMAIL_ENVIRONMENT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise Unreachable(f"{self._program}: {error.strerror}") from None
        finally:
            os.close(stdin)
        kind, words = _ended(process)
        return [Outcome(recipient, kind, words) for recipient in job.recipients]

    def close(self) -> None:
        pass


class MaildirSession:
    """Delivery into a maildir, to try things out: DIR/{tmp,new,cur} are made, one file per message."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def send(self, job: Job) -> list[Outcome]:
        name = f"{int(time.time())}.{job.queue_id}_{os.getpid()}.{os.uname().nodename}"
        temporary = f"{self._directory}/tmp/{name}"
        try:
            for part in ("tmp", "new", "cur"):
                os.makedirs(f"{self._directory}/{part}", mode=0o700, exist_ok=True)
            with open(temporary, "xb") as target, job.message() as stream:
                while chunk := stream.read(1 << 16):
                    target.write(chunk)
                target.flush()
                os.fsync(target.fileno())
            os.rename(temporary, f"{self._directory}/new/{name}")
            directory = os.open(f"{self._directory}/new", os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(directory)
            os.close(directory)
        except OSError as error:
            raise Unreachable(f"{self._directory}: {error.strerror}") from None
        return [Outcome(recipient, Kind.SENT, f"stored as {name}", name) for recipient in job.recipients]

    def close(self) -> None:
        pass


# None: the job was not begun.
Result = list[Outcome] | Unreachable | None
Results = queue.SimpleQueue[tuple[Job, Result]]


class Senders:
    """SESSIONS threads, each with one session; jobs go in, (job, result) come out.

    The maildrops are served in turn, a job of each; the jobs of one go one after the other, in order.
    """

    def __init__(self, url: str, wake: Callable[[], None], results: "Results") -> None:
        """RESULTS outlives a change of the MTA, when the old senders still end what they have begun."""
        self.url = url
        self._results = results
        # What the MTA announces with SIZE; 0: no limit known.
        self.max_size = 0
        self._wake = wake
        # A maildrop is in turn, or with a thread, as long as it is in here.
        self._waiting: dict[str, deque[Job]] = {}
        self._turn: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._ending = False
        # Seconds that a session needs for a message, lately.
        self.pace = math.inf
        self._threads = [threading.Thread(target=self._run, name=f"sender-{n}", daemon=True) for n in range(SESSIONS)]
        for thread in self._threads:
            thread.start()

    def send(self, job: Job) -> None:
        with self._lock:
            if job.maildrop in self._waiting:
                self._waiting[job.maildrop].append(job)
                return
            self._waiting[job.maildrop] = deque([job])
        self._turn.put(job.maildrop)

    def give_back(self, result: Result = None) -> None:
        """Let RESULT be that of all jobs that no session has begun with."""
        with self._lock:
            for waiting in self._waiting.values():
                while waiting:
                    self._results.put((waiting.popleft(), result))

    def stop(self) -> None:
        """Let the threads end when their jobs are done."""
        with self._lock:
            self._ending = True
        for _ in self._threads:
            self._turn.put(None)

    def flush(self) -> None:
        """Everything has been handed to the threads already."""

    def collect(self) -> None:
        """The threads pass on their results themselves."""

    @property
    def descriptors(self) -> list[int]:
        """Nothing is to be waited for: the threads wake."""
        return []

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _session(self) -> Session:
        scheme, _, rest = self.url.partition(":")
        if scheme == "maildir":
            return MaildirSession(rest)
        if scheme == "sendmail":
            return SendmailSession(rest)
        host, _, port = rest.removeprefix("//").rpartition(":")
        return SmtpSession(host.strip("[]"), int(port), self._learn_size)

    def _learn_size(self, size: int) -> None:
        self.max_size = size

    def _run(self) -> None:
        session = self._session()
        while True:
            try:
                name = self._turn.get(timeout=IDLE)
            except queue.Empty:
                session.close()
                continue
            if name is None:
                session.close()
                return
            while self._next(session, name):
                pass

    def _next(self, session: Session, name: str) -> bool:
        """Do the next job of the maildrop NAME; whether this thread has to do another, since no other will."""
        with self._lock:
            waiting = self._waiting[name]
            if not waiting:
                del self._waiting[name]
                return False
            job = waiting.popleft()
        began = time.monotonic()
        result = self._do(session, job)
        seconds = time.monotonic() - began
        self.pace = seconds if self.pace == math.inf else self.pace * 0.9 + seconds * 0.1
        self._results.put((job, result))
        if isinstance(result, Unreachable):
            # None of them may overtake this one.
            self.give_back(result)
        self._wake()
        with self._lock:
            if not waiting:
                del self._waiting[name]
            elif not self._ending:
                self._turn.put(name)
            return bool(waiting) and self._ending

    def _do(self, session: Session, job: Job) -> Result:
        try:
            return session.send(job)
        except Unreachable as error:
            return error
        except Exception as error:
            # A mistake of ours with one message must not end the thread: the message waits and is tried again.
            session.close()
            words = f"internal error: {error!r}"
            return [Outcome(recipient, Kind.TEMPFAIL, words) for recipient in job.recipients]


def _as_file(message: Callable[[], BinaryIO]) -> int:
    """A descriptor from which a command reads the message.

    Not a pipe: where its writer is killed, what has been written by then would be taken for the whole message.
    """
    with message() as stream:
        try:
            fd = os.dup(stream.fileno())
        except io.UnsupportedOperation:
            # What is in memory is small.
            fd = os.memfd_create("message")
            with open(fd, "wb", closefd=False) as copy:
                copy.write(stream.read())
            os.lseek(fd, 0, os.SEEK_SET)
        else:
            # The stream has read ahead.
            os.lseek(fd, stream.tell(), os.SEEK_SET)
    return fd


def _ended(process: subprocess.Popen[bytes]) -> tuple[Kind, str]:
    """What the end of a sendmail command means, and its last words. One that takes too long is ended, with its children."""
    ended = os.pidfd_open(process.pid)
    try:
        in_time, said = _listen(process, ended)
        if not in_time:
            # It may still take back what it has begun, as Postfix's does.
            _signal_group(process, signal.SIGTERM)
            _ready((ended,), SENDMAIL_GRACE)
            _signal_group(process, signal.SIGKILL)
    finally:
        os.close(ended)
    try:
        status = process.wait(SENDMAIL_GRACE)
    except subprocess.TimeoutExpired:
        # It runs as another user and is not ours to kill. It has the whole message, and ends when it ends.
        status = None
    lines = said.decode("utf-8", "replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "without a word")[:500]
    if not in_time or status is None:
        return Kind.UNKNOWN, f"no end in {SENDMAIL_TIMEOUT} seconds: {last}"
    if status < 0 or status > 128:
        # A shell says with 128 and more that what it ran was killed.
        return Kind.UNKNOWN, f"killed by signal {-status if status < 0 else status - 128}: {last}"
    kind = Kind.PERMFAIL if status in SENDMAIL_REFUSALS else Kind.TEMPFAIL if status else Kind.SENT
    return kind, f"status {status}: {last}"


def _listen(process: subprocess.Popen[bytes], ended: int) -> tuple[bool, bytes]:
    """Wait for the end of PROCESS, of which ENDED tells; return whether it has come in time, and the end of what was said."""
    assert process.stdout is not None
    said, over = b"", False
    until = time.monotonic() + SENDMAIL_TIMEOUT
    with process.stdout as output:
        os.set_blocking(output.fileno(), False)
        waited_for: tuple[int, ...] = (output.fileno(), ended)
        # The end of the output is not waited for: what a command leaves running behind it may hold that open.
        while not over and (left := until - time.monotonic()) > 0:
            over = ended in _ready(waited_for, left)
            chunk = output.read(1 << 16)
            if chunk == b"":
                waited_for = (ended,)
            said = (said + (chunk or b""))[-4096:]
    return over, said


def _ready(descriptors: Iterable[int], seconds: float) -> set[int]:
    """Those that can be read, or whose process has ended, within SECONDS."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(seconds * 1000)}


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def _socket(smtp: smtplib.SMTP) -> socket.socket:
    if smtp.sock is None:
        raise smtplib.SMTPServerDisconnected("the connection has ended")
    return smtp.sock


def on_the_wire(stream: BinaryIO) -> Iterator[bytes]:
    """The bytes for DATA: CRLF line ends, leading dots doubled, the final dot (RFC 5321 section 4.5.2).

    STREAM has LF line ends and no CR, and ends with LF: so no line of it can be the final dot.
    """
    line_start = True
    while chunk := stream.read(1 << 16):
        if line_start and chunk.startswith(b"."):
            chunk = b"." + chunk
        line_start = chunk.endswith(b"\n")
        yield chunk.replace(b"\n.", b"\n..").replace(b"\n", b"\r\n")
    yield FINAL_DOT


def _all(recipients: Iterable[str], code: int, words: str, outcomes: dict[str, Outcome]) -> None:
    kind = {2: Kind.SENT, 5: Kind.PERMFAIL}.get(code // 100, Kind.TEMPFAIL)
    queued = _QUEUED.search(words) if kind is Kind.SENT else None
    mta_queue_id = (queued[1] or queued[2]) if queued else ""
    for recipient in recipients:
        outcomes[recipient] = Outcome(recipient, kind, words, mta_queue_id)


def _reply(code: int, reply: bytes) -> str:
    return f"{code} {reply.decode('utf-8', 'replace')}".replace("\n", " ")[:500]


def _words(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no reply in time"
    if isinstance(error, (OSError, socket.gaierror)) and error.strerror:
        return str(error.strerror)
    return str(error)[:500] or type(error).__name__
