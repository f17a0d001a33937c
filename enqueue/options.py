"""The command line, as sendmail's callers write it: POSIX order, joined and separate values, grouped flags."""

import posix

from enqueue.failure import USAGE, Failure

DEFAULT_SPOOL = "/var/spool/php-secure-sendmail"

# Flags that take a value, joined or as the next word. Apart from F, f, N and r the value is skipped and never looked
# at: no option opens a path or reaches another command.
WITH_VALUE = frozenset("ABCFLNORVXdefhopr")
IGNORED = frozenset("GUcimntvx")
# Flags that name a file for the MTA, which nobody but an attacker gives here.
SUSPECT = "CX"

# What -N can ask for. Not "success": the MTA would send a mail for each that is delivered, which nobody counts.
NOTIFY = ("never", "failure", "delay")

LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")


class Call:
    """What the caller asked for."""

    def __init__(self) -> None:
        self.spool = DEFAULT_SPOOL
        self.vhost = ""
        # None where neither SENDER nor -f nor -r was given.
        self.sender: str | None = None
        self.full_name = ""
        # What -N asks for, as RFC 3461 section 4.1 spells it; empty: the MTA's default.
        self.notify = ""
        # The options given that are of SUSPECT.
        self.suspect = ""
        self.from_header = False
        self.recipients: list[str] = []


def parse(argv: list[str]) -> Call:
    """Read the words after the program's name.

    Raises Failure(USAGE) for an unknown option, a missing value, a mode that is not offered, a bad vhost.
    """
    call = Call()
    words = list(argv)
    if words[:1] == ["--spool"]:
        if len(words) < 2 or not words[1]:
            raise Failure(USAGE, "--spool needs a directory")
        call.spool = words[1]
        del words[:2]
    leading, ended = _options(call, words)
    if not words:
        raise Failure(USAGE, "no vhost: usage: secure-sendmail-enqueue [--spool DIR] VHOST [SENDER] -t -i")
    call.vhost = vhost_name(words.pop(0))
    if not leading and words and not _is_option(words[0]) and (len(words) == 1 or _is_option(words[1])):
        # -f and -r, read below, win over this word.
        call.sender = words.pop(0)
    if not ended:
        _options(call, words)
    call.recipients = words
    if not call.recipients:
        call.from_header = True
    return call


def vhost_name(word: str) -> str:
    """WORD in lower case, if it is a host name (RFC 1123, at most 253 characters, no trailing dot)."""
    name = word.lower()
    labels = name.split(".")
    good = (
        word.isascii()
        and len(name) <= 253
        and all(
            label and len(label) <= 63 and label[0] != "-" and label[-1] != "-" and LETTERS.issuperset(label.replace("-", ""))
            for label in labels
        )
    )
    if not good:
        raise Failure(USAGE, f"bad vhost {word[:80]!r}: it must be a host name such as www.example.com")
    return name


def _is_option(word: str) -> bool:
    return word.startswith("-") and word != "-"


def _options(call: Call, words: list[str]) -> tuple[bool, bool]:
    """Take the options off the front of WORDS; say whether there were any, and whether `--` has ended them for good."""
    any_option = False
    while words and _is_option(words[0]):
        any_option = True
        word = words.pop(0)
        if word == "--":
            return True, True
        _flags(call, word, words)
    return any_option, False


def _flags(call: Call, word: str, words: list[str]) -> None:
    if word == "--spool":
        raise Failure(USAGE, "--spool must be the first word")
    if word.startswith("--"):
        raise Failure(USAGE, f"unknown option {word[:80]!r}")
    position = 1
    while position < len(word):
        flag = word[position]
        position += 1
        if flag == "t":
            call.from_header = True
        elif flag in WITH_VALUE:
            if position < len(word):
                value = word[position:]
            elif words:
                value = words.pop(0)
            else:
                raise Failure(USAGE, f"option -{flag} needs a value")
            if flag in "fr":
                call.sender = value
            elif flag == "F":
                call.full_name = value
            elif flag == "N":
                call.notify = _notify(value)
            elif flag in SUSPECT:
                call.suspect += flag
            return
        elif flag == "b":
            _mode(word[position:] or (words.pop(0) if words else ""))
            return
        elif flag in "qI":
            raise Failure(USAGE, f"-{flag} is not offered: this command only accepts mail; use the MTA's own command")
        elif flag not in IGNORED:
            raise Failure(USAGE, f"unknown option {'-' + flag!r}")


def _notify(value: str) -> str:
    """What is asked for, without "success"; empty where VALUE is no such list, as Postfix passes over it."""
    words = {word.strip() for word in value.lower().split(",")}
    if not words <= {*NOTIFY, "success"} or ("never" in words and len(words) > 1):
        return ""
    return ",".join(word for word in NOTIFY if word in words)


def _mode(mode: str) -> None:
    if mode == "m":
        return
    if mode == "s":
        # The caller waits for a 220 banner; without an answer it would hang.
        try:
            posix.write(1, b"421 SMTP on standard input is not offered; call with -t -i\r\n")
        except OSError:
            pass
    raise Failure(USAGE, f"mode -b{mode[:20]} is not offered: call with -t -i and the message on standard input")
