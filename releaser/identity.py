"""Who we are and whom we work as: on a host with customers the spool is root's and the releaser its own user; in
private mode one uid owns everything and submits."""

import json
import os
import pwd
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from releaser import trusted

# Whom root becomes before it opens anything in spool or state.
USER = "secure-sendmail"


class NotOurs(Exception):
    """The spool or the state is not as it must be, or belongs to someone else; the text says what to do."""


class ChildFailed(Exception):
    """What was done under another uid failed; the text says why."""


@dataclass(frozen=True)
class Identity:
    """The releaser's uid and gid; PRIVATE: spool and state belong to that one uid."""

    uid: int
    gid: int
    private: bool


def of(spool: str, state: str) -> Identity:
    """Whose SPOOL and STATE are, or, as far as they are missing, are to be.

    Raises NotOurs, also where someone else could put other directories in their place.
    """
    check_way(spool)
    check_way(state)
    owner, root = _owner(state), _owner(spool)
    try:
        account = pwd.getpwnam(USER)
    except KeyError:
        account = None
    if owner is None:
        owner = account.pw_uid if account and os.geteuid() == 0 and root in (None, 0) else os.geteuid()
    if account and owner == account.pw_uid and root in (None, 0) and owner != 0:
        return Identity(account.pw_uid, account.pw_gid, private=False)
    if account and owner == 0 and _owner(f"{spool}/active") == account.pw_uid:
        # As a restore leaves it. Nothing makes a spool of many customers a private one.
        raise NotOurs(f"{state}: belongs to root, but {spool} is {USER}'s; run: chown -R {USER}: {state}")
    return Identity(owner, os.getegid() if owner == os.geteuid() else -1, private=True)


def settle(spool: str, state: str) -> Identity:
    """Become who works on SPOOL and STATE, which must be there. Raises NotOurs."""
    # Asked for now: afterwards nobody could tell.
    actor()
    found = of(spool, state)
    for directory in (spool, state):
        owner = _owner(directory)
        if owner is None:
            raise NotOurs(f"{directory}: No such file or directory; run: secure-sendmail vhost add --help")
        wanted = 0 if directory == spool and not found.private else found.uid
        if owner != wanted:
            who = f"belongs to {user(owner)}, must belong to {user(wanted)}"
            raise NotOurs(f"{directory}: {who}; run: chown {user(wanted)}: {directory}")
    if os.geteuid() == 0 and not found.private:
        become(found)
    if os.geteuid() != found.uid:
        wanted_user = user(found.uid) if found.private else f"root or {USER}"
        raise NotOurs(f"{state}: belongs to {user(found.uid)}, this is {user(os.geteuid())}; run this as {wanted_user}")
    return found


def become(identity: Identity) -> None:
    """Give up root for good."""
    os.initgroups(USER, identity.gid)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    os.setresuid(identity.uid, identity.uid, identity.uid)


def run_as(identity: Identity, work: Callable[[], Any]) -> Any:
    """What WORK returns, which JSON must be able to carry; a child does it that has become IDENTITY. Raises ChildFailed.

    So root itself opens nothing that another uid could have put in its way.
    """
    if os.geteuid() == identity.uid:
        return work()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            become(identity)
            try:
                answer = {"result": work()}
            except Exception as error:
                answer = {"error": str(error) or type(error).__name__}
            with os.fdopen(writer, "w", encoding="utf-8") as stream:
                json.dump(answer, stream)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8", errors="replace") as stream:
        text = stream.read()
    os.waitpid(child, 0)
    answer = json.loads(text) if text else {"error": f"a child of user {user(identity.uid)} ended without an answer"}
    if "error" in answer:
        raise ChildFailed(answer["error"])
    return answer["result"]


def user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


@cache
def actor() -> str:
    """Who decides: the real user at the first call, and in brackets the login or sudo user where that is another.

    SUDO_USER is believed only when the real uid is 0, since anyone else can set it.
    """
    real = user(os.getuid())
    origin = os.environ.get("SUDO_USER", "") if os.getuid() == 0 else ""
    if not origin:
        try:
            with open("/proc/self/loginuid", encoding="ascii") as stream:
                login = int(stream.read())
            # 4294967295: this process has no login.
            origin = user(login) if login != 2**32 - 1 else ""
        except (OSError, ValueError):
            origin = ""
    return f"{real} ({origin})" if origin and origin != real else real


def _owner(directory: str) -> int | None:
    try:
        return os.stat(directory).st_uid
    except FileNotFoundError:
        return None
    except OSError as error:
        raise NotOurs(f"{directory}: {error.strerror}") from None


def check_way(directory: str) -> None:
    """Root follows no path to DIRECTORY that someone else can change; another uid can only harm itself."""
    if os.geteuid() != 0:
        return
    if os.path.islink(directory):
        raise NotOurs(f"{directory}: a symbolic link; name the directory itself in the configuration")
    parent = os.path.dirname(directory)
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    try:
        trusted.check(parent, (0,))
    except (trusted.Untrusted, OSError) as error:
        raise NotOurs(f"{directory}: {error}") from None
