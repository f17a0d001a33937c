"""Whether customers can submit mail past us: what check warns of. Tried as they would, with nothing sent."""

import os
import socket
import subprocess
from collections.abc import Callable, Iterable

from releaser import identity, layout
from releaser.config import Config

COMMANDS = ("/usr/sbin/sendmail", "/usr/sbin/sendmail.distrib", "/usr/lib/sendmail", "/usr/sbin/exim4")
SHARED = "www-data"
# So many uids are tried; what holds for some holds for all.
MOST = 3
# Seconds that one try may take.
PATIENCE = 5


def ways(settings: Config) -> list[str]:
    """A sentence for each way past us. Must be root, who alone can be each of the customers for a moment."""
    said = []
    for uid in _customers(settings):
        who = f"{identity.user(uid)} can submit mail past php-secure-sendmail"
        for host, port in dict.fromkeys((("127.0.0.1", 25), *_server(settings))):
            if _as(uid, lambda host=host, port=port: _greets(host, port)):  # type: ignore[misc]
                said.append(f"{who}: port {port} of {host} answers him; see mta/nftables.conf of the documentation")
        for command in {os.path.realpath(path) for path in COMMANDS if os.path.exists(path)}:
            if _as(uid, lambda command=command: _takes(command)):  # type: ignore[misc]
                said.append(f"{who}: {command} takes it; see mta/postfix.cf and mta/exim.conf of the documentation")
    return said


def _customers(settings: Config) -> list[int]:
    found: list[int] = []
    if os.path.isdir(layout.maildrop(settings.spool, layout.UNREGISTERED)):
        import pwd

        found += [entry.pw_uid for entry in pwd.getpwall() if entry.pw_name == SHARED]
    for vhost in settings.registered:
        found += [uid for uid in settings.uids(vhost) if uid]
    return list(dict.fromkeys(found))[:MOST]


def _server(settings: Config) -> Iterable[tuple[str, int]]:
    scheme, _, rest = settings.mta_url.partition("://")
    if scheme == "smtp":
        host, _, port = rest.rpartition(":")
        yield host.strip("[]"), int(port)


def _greets(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=PATIENCE) as connection:
            connection.settimeout(PATIENCE)
            return connection.recv(4) == b"220 "
    except OSError:
        return False


def _takes(command: str) -> bool:
    """Whether COMMAND gets as far as to miss a recipient. A message without any is sent by none."""
    try:
        run = subprocess.run([command, "-i", "-t"], stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, cwd="/")
    except (OSError, subprocess.TimeoutExpired):
        return False
    said = (run.stdout + run.stderr).decode("utf-8", "replace").lower()
    return "recipient" in said and "secure-sendmail-enqueue" not in said


def _as(uid: int, question: Callable[[], bool]) -> bool:
    """The answer of a child process that is UID and nothing else."""
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(uid)
            os._exit(0 if question() else 1)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
