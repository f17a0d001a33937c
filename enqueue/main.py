"""secure-sendmail-enqueue - accept a message for a vhost (PHP's sendmail_path)

Usage: secure-sendmail-enqueue [--spool DIR] VHOST [SENDER] [sendmail options] [recipients...] < message

Reads a message from standard input, takes its recipients from the arguments and, with -t or without recipients, from
To:, Cc: and Bcc:, tags it with its vhost, and stores it in the vhost's maildrop, from where the releaser sends it or
holds it. -i is always on: a line with a lone dot is text. -f and -r give the envelope sender, as SENDER does.

Security: runs as the caller. Opens the maildrop and nothing else: no network, no database, no secret. What it records
about its caller is a claim; the releaser trusts the directory and the file's owner only.

Exit status: 0 only when the message is durable in the maildrop. 64 usage or a mode that is not offered; 65 no or
ambiguous recipients, or no message; 69 too large, or the vhost's mail is refused for now; 73 cannot create in tmp/;
74 a later read, write, sync or rename failed; 77 the maildrop is closed to this user; 78 there is no such spool or
vhost. Each failure is one line on standard error and in syslog, and nothing is left in new/.

Files: DIR/vhosts/VHOST/{tmp,new,policy}, DIR/wake; DIR is /var/spool/php-secure-sendmail.
"""

# The modules behind `signal` and `os`: these would take a seventh of the time of the whole process.
import _signal  # type: ignore[import-not-found]
import posix
import sys
import time

from enqueue import address, message, options
from enqueue.failure import DATAERR, IOERR, UNAVAILABLE, USAGE, Failure
from enqueue.maildrop import Maildrop, Policy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

LAYOUT = b"2"
READ_SIZE = 1 << 16
MAX_RECIPIENTS = 10_000


def main() -> None:
    """Run, say what failed in one line, and end the process with its status: no traceback, no flush that could fail."""
    status = IOERR
    try:
        status, sentence = _run(sys.argv[1:])
        if sentence:
            _complain(sentence)
    finally:
        # Also where the memory left is too little to complain.
        posix._exit(status)


def _run(argv: list[str]) -> tuple[int, str]:
    """The exit status, and what failed."""
    try:
        # The caller is PHP: its descriptors, and a umask that may be 0777, are not ours.
        posix.closerange(3, 1 << 20)
        posix.umask(0o077)
        _hold_standard_descriptors()
        if argv == ["--help"]:
            _write_error((__doc__ or "").encode())
            return USAGE, ""
        enqueue(argv)
    except Failure as failure:
        return failure.status, failure.sentence
    except MemoryError:
        return IOERR, "out of memory"
    except BaseException as error:
        return IOERR, f"internal error: {type(error).__name__}: {error}"
    return 0, ""


def enqueue(argv: list[str]) -> None:
    """Accept the message on descriptor 0 for the vhost that ARGV names. Raises Failure."""
    call = options.parse(argv)
    maildrop = Maildrop(call.spool, call.vhost)
    policy = maildrop.policy()
    _knock(maildrop, policy)
    mail = message.Message(_read)
    sender = _sender(call.sender)
    recipients = _recipients(call, mail)
    now = time.time()
    name = f"{int(now)}.{int(now % 1 * 1e6):06d}.P{posix.getpid()}.{posix.urandom(12).hex()}"
    message_id = mail.first(b"message-id") or f"<{name}@{call.vhost}>".encode()
    head = envelope(call, sender, recipients, now, message_id, mail.first(b"x-php-originating-script"))
    policy.tag[0] = (policy.tag[0][0], call.vhost.encode())
    missing = [
        (b"Date", time.strftime("%a, %d %b %Y %H:%M:%S +0000", time.gmtime(now)).encode()),
        # Whose it is without one is not looked up where there is one.
        (b"From", b"" if mail.first(b"from") else _from(call.full_name, sender or policy.sender or _login())),
        (b"Message-ID", message_id),
    ]
    maildrop.drop(name, head, _seen_through(mail.chunks(policy.tag, missing)), policy.max_size)
    try:
        _tell(call, maildrop, policy, now)
    except BaseException:
        # The mail is accepted, and the releaser's scan finds it: nothing turns that into a failure any more.
        pass


def _knock(maildrop: Maildrop, policy: Policy) -> None:
    """Raise Failure where the releaser wants no mail of this vhost now, and count it."""
    refusal = policy.refusal(maildrop.vhost, time.time())
    if not refusal:
        return
    try:
        maildrop.count_refusal()
    except OSError:
        # It is refused all the same, and only the log has one less.
        pass
    raise Failure(UNAVAILABLE, refusal.decode("utf-8", "replace"))


def _tell(call: options.Call, maildrop: Maildrop, policy: Policy, now: float) -> None:
    """Ring for the releaser, and say what somebody wants to hear of a message that is accepted."""
    maildrop.ring(policy.bell)
    warning = policy.warning(call.vhost, now)
    if warning:
        # Accepted all the same. mod_php passes it on to Apache's error log.
        _write_error(_printable(warning.decode("utf-8", "replace")) + b"\n")
    for flag in call.suspect:
        _to_syslog(f"vhost {call.vhost}, uid {posix.getuid()}: option -{flag} names a file for the MTA; ignored".encode())


def envelope(
    call: options.Call, sender: bytes | None, recipients: list[bytes], now: float, message_id: bytes, script: bytes | None
) -> bytes:
    """The envelope lines of spool_layout.md, with the empty line that ends them."""
    lines = [b"Layout: " + LAYOUT, b"Vhost: " + call.vhost.encode()]
    if sender is not None:
        lines.append(b"Sender: " + sender)
    lines += [b"Recipient: " + recipient for recipient in recipients]
    arrived = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06d}Z"
    claims = [
        (b"Arrived: ", arrived.encode()),
        (b"Uid: ", str(posix.getuid()).encode()),
        (b"Cwd: ", _directory()),
        (b"Program: ", _parent()),
        (b"Script: ", script or b""),
        # Of a CGI program's environment; mod_php and php-fpm keep it to themselves.
        (b"Script-Filename: ", posix.environ.get(b"SCRIPT_FILENAME", b"")),
        (b"Notify: ", call.notify.encode()),
        (b"Message-Id: ", message_id),
    ]
    lines += [key + _one_line(value) for key, value in claims if value]
    return b"\n".join(lines) + b"\n\n"


def _seen_through(chunks: "Iterator[bytes]") -> "Iterator[bytes]":
    """CHUNKS; from their end on no signal makes a failure of what is then submitted, lest the caller send it again."""
    yield from chunks
    _signal.pthread_sigmask(_signal.SIG_BLOCK, _signal.valid_signals())


def _recipients(call: options.Call, mail: message.Message) -> list[bytes]:
    found = []
    for word in call.recipients:
        named = message.lexed(encoded(word), "the arguments")
        if not named:
            # Postfix would send it to its postmaster.
            raise Failure(DATAERR, f"nobody is named by the argument {word[:80]!r}")
        found += named
    if call.from_header:
        found += mail.recipients()
    if not found:
        where = "To, Cc or Bcc" if call.from_header else "the arguments"
        raise Failure(DATAERR, f"no recipients in {where}")
    found = address.unique(found)
    if len(found) > MAX_RECIPIENTS:
        raise Failure(DATAERR, f"{len(found)} recipients, at most {MAX_RECIPIENTS} are allowed: send it in parts")
    return found


def _sender(word: str | None) -> bytes | None:
    """The envelope sender: empty for the null sender, None where none was given."""
    if word is None:
        return None
    try:
        found = address.mailboxes(encoded(word))
    except address.Ambiguous as error:
        raise Failure(USAGE, f"bad envelope sender {word[:80]!r}: {error}") from None
    return found[0] if found else b""


def _from(full_name: str, sender: bytes) -> bytes:
    """The value of a From: field for a message that has none."""
    name = "".join(c for c in encoded(full_name).decode("utf-8", "replace") if c.isprintable()).encode()
    if name.isascii():
        # A line has at most 998 characters (RFC 5322 section 2.1.1), and the sender wants to be on it.
        name = name[:200]
    if not name:
        return sender
    if name.isascii():
        return b'"' + name.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'" <' + sender + b">"
    # RFC 2047: an encoded word has at most 75 characters, so at most 45 bytes of text here.
    import binascii

    cut = name[:45].decode("utf-8", "ignore").encode()
    return b"=?utf-8?b?" + binascii.b2a_base64(cut, newline=False) + b"?= <" + sender + b">"


def _login() -> bytes:
    import pwd

    try:
        user = pwd.getpwuid(posix.getuid()).pw_name
    except KeyError:
        user = f"uid{posix.getuid()}"
    return f"{user}@{posix.uname().nodename}".encode("ascii", "replace")


def _directory() -> bytes:
    try:
        return posix.getcwdb()
    except OSError:
        return b""


def _parent() -> bytes:
    process = f"/proc/{posix.getppid()}".encode()
    try:
        return posix.readlink(process + b"/exe")
    except OSError:
        pass
    try:
        # A server that was root has let only its name be read.
        fd = posix.open(process + b"/comm", posix.O_RDONLY)
        try:
            return posix.read(fd, 100).strip()
        finally:
            posix.close(fd)
    except OSError:
        return b""


def encoded(word: str) -> bytes:
    """An argument as it was given."""
    return word.encode(sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())


def _one_line(value: bytes) -> bytes:
    """VALUE as an envelope value: UTF-8, no control characters, at most 1,000 bytes."""
    text = value[:1000].decode("utf-8", "replace")
    return (text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)).encode()


def _read() -> bytes:
    try:
        return posix.read(0, READ_SIZE)
    except OSError as error:
        raise Failure(IOERR, f"cannot read the message from standard input: {error.strerror}") from None


def _hold_standard_descriptors() -> None:
    """Keep 0, 1 and 2 from becoming a file of the spool where the caller has closed them."""
    for fd in (0, 1, 2):
        try:
            posix.fstat(fd)
        except OSError:
            # 0 is opened for writing only, so that reading the message from it fails and says so.
            posix.open("/dev/null", posix.O_WRONLY)


def _complain(sentence: str) -> None:
    """One line on standard error, and to syslog, since php-fpm throws standard error away."""
    text = _printable(sentence)
    _write_error(b"secure-sendmail-enqueue: " + text + b"\n")
    _to_syslog(text)


def _to_syslog(text: bytes) -> None:
    try:
        # The module behind `socket`, which takes longer to load than everything else, and memory that there may not be.
        import _socket

        log = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_NONBLOCK)
        # <20> is facility mail, severity warning (RFC 5424 section 6.2.1). The end of the process closes it.
        log.sendto(b"<20>secure-sendmail-enqueue[%d]: " % posix.getpid() + text, "/dev/log")
    except (OSError, ImportError):
        pass


def _printable(sentence: str) -> bytes:
    return "".join(c if c.isprintable() else "?" for c in sentence).encode("utf-8", "replace")


def _write_error(line: bytes) -> None:
    try:
        posix.write(2, line)
    except OSError:
        pass
