"""Who we are, and whether the spool and the state are ours: private mode."""

import os
import pwd


class NotOurs(Exception):
    """The spool or the state belongs to someone else, or does not exist; the text says what to do."""


def check(spool: str, state: str) -> None:
    """Raise NotOurs unless SPOOL and STATE exist and belong to this process's uid."""
    for directory in (spool, state):
        try:
            owner = os.stat(directory).st_uid
        except OSError as error:
            raise NotOurs(f"{directory}: {error.strerror}; run: secure-sendmail vhost add VHOST") from None
        if owner != os.geteuid():
            raise NotOurs(f"{directory}: belongs to {user(owner)}, this is {user(os.geteuid())}; run this as {user(owner)}")


def user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def actor() -> str:
    """Who decides: the real user, and in brackets the login or sudo user where that is another.

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
