"""releaser.toml and vhosts.d/*.toml: every key with its default, read once, with an error that names file and key."""

import errno
import json
import os
import pwd
import re
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from releaser import envelope, layout, limits, trusted

DEFAULT_FILE = "/etc/php-secure-sendmail/releaser.toml"

# Seconds after which the uids of a vhost's users are looked up again.
UIDS_AGE = 60

_DURATION = re.compile(r"([1-9][0-9]{0,6})([smhd])\Z")
_SIZE = re.compile(r"([1-9][0-9]{0,8})([KMG]?)\Z")
# What useradd, a directory service or a number can be; nothing that would end a field or a line.
_USER = re.compile(r"[^\s:/,\"]{1,255}\Z")
# The highest uid; the one above it means none.
MAX_UID = 2**32 - 2
_HEADER = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,60}\Z")


class ConfigError(Exception):
    """The configuration cannot be used; the text names file, key, what was found and what is allowed."""


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{value!r} is not a string of printable characters")
    return value


def _directory(value: object) -> str:
    text = _text(value)
    if not text.startswith("/") or text.rstrip("/") == "":
        raise ValueError(f"{text!r} is not an absolute path to a directory")
    return text.rstrip("/")


def duration(value: object) -> int:
    """Seconds of a text such as "90s", "5m", "12h", "5d". Raises ValueError."""
    match = _DURATION.match(_text(value))
    if not match:
        raise ValueError(f'{value!r} is not a duration such as "90s", "5m", "12h" or "5d"')
    return int(match[1]) * limits.UNITS[match[2]]


def size(value: object) -> int:
    """Bytes of a text such as "500K", "50M", "1G" (powers of 1024). Raises ValueError."""
    match = _SIZE.match(_text(value))
    if not match:
        raise ValueError(f'{value!r} is not a size such as "500K", "50M" or "1G"')
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


def _size_or_none(value: object) -> int:
    return 0 if value == "0" else size(value)


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 10**9:
        raise ValueError(f"{value!r} is not a number from 1 to 999999999")
    return value


def _url(value: object) -> str:
    text = _text(value)
    scheme, _, rest = text.partition(":")
    if scheme == "maildir" and rest.startswith("/") and rest.strip("/"):
        return text.rstrip("/")
    if scheme == "sendmail" and rest.startswith("/") and not rest.endswith("/"):
        if any(character.isspace() for character in rest):
            raise ValueError(f"{text!r}: the path of the program alone; the releaser gives it its options")
        return text
    host, _, port = rest.removeprefix("//").rpartition(":")
    if scheme == "smtp" and rest.startswith("//") and host and port.isascii() and port.isdigit() and 0 < int(port) < 65536:
        return text
    raise ValueError(f"{text!r} is none of smtp://HOST:PORT, sendmail:PROGRAM and maildir:DIR with an absolute path")


def _header(value: object) -> str:
    if not _HEADER.match(_text(value)):
        raise ValueError(f'{value!r} is not a header name such as "X-Domain"')
    return str(value)


def _limits(value: object) -> tuple[limits.Limit, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f'{value!r} is not a list of limits such as ["50/5m", "200/1h"]')
    return limits.parse(value)


def _address(value: object) -> str:
    if not envelope.is_address(_text(value)) or not envelope.split(str(value))[1]:
        raise ValueError(f"{value!r} is not a mail address")
    return str(value)


def _domains(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and layout.is_vhost(item) for item in value):
        raise ValueError(f'{value!r} is not a list of domains in lower case such as ["example.com"], xn-- for international ones')
    return tuple(value)


def users(value: object) -> tuple[str, ...]:
    """The names in a list of users, each once. Raises ValueError."""
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and _is_user(item) for item in value):
        raise ValueError(f'{value!r} is not a list of user names such as ["customer1"]')
    return tuple(dict.fromkeys(value))


def _is_user(text: str) -> bool:
    return bool(_USER.match(text)) and text.isprintable()


def _one_of(allowed: tuple[str, ...], later: tuple[str, ...] = ()) -> Callable[[object], str]:
    def parse(value: object) -> str:
        names = " or ".join(f'"{name}"' for name in allowed)
        if value in later:
            raise ValueError(f'"{value}" is not built yet; allowed: {names}')
        if value not in allowed:
            raise ValueError(f"{value!r} is not allowed; allowed: {names}")
        return str(value)

    return parse


def _port(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 65536:
        raise ValueError(f"{value!r} is not a port: a number from 1 to 65535")
    return value


def _file(value: object) -> str:
    text = _text(value)
    if not text.startswith("/") or text.endswith("/"):
        raise ValueError(f"{text!r} is not an absolute path to a file")
    return text


@dataclass(frozen=True)
class Key:
    """A key of the configuration: its parser, and its default in the file's own spelling (None: no default)."""

    parse: Callable[[object], Any]
    default: object


_COUNT = _one_of(("recipients", "messages"))
_OVER_LIMIT = _one_of(("hold", "observe", "reject"), later=("pace",))
_SENDER_POLICY = _one_of(("allow", "force", "own-domains"))

SECTIONS: dict[str, dict[str, Key]] = {
    "": {
        "spool": Key(_directory, "/var/spool/php-secure-sendmail"),
        "state": Key(_directory, "/var/lib/php-secure-sendmail"),
    },
    "mta": {
        "url": Key(_url, "smtp://127.0.0.1:25"),
        "give_up": Key(duration, "5d"),
    },
    "tag": {
        "domain_header": Key(_header, "X-Domain"),
        "complaints_header": Key(_header, "X-Complaints-To"),
        "complaints_to": Key(_text, "abuse@HOSTNAME"),
    },
    "limits": {
        "default": Key(_limits, ["50/5m", "100/30m", "200/1h", "500/1d"]),
        "shared_uid": Key(_limits, None),
        "count": Key(_COUNT, "recipients"),
        "over_limit": Key(_OVER_LIMIT, "hold"),
        "max_message_size": Key(size, "50M"),
        "hold_max_messages": Key(_number, 10000),
        "hold_max_bytes": Key(size, "1G"),
        "min_free": Key(_size_or_none, "64M"),
        "notify": Key(_address, None),
    },
    "mysql": {
        "host": Key(_text, "127.0.0.1"),
        "port": Key(_port, 3306),
        "unix_socket": Key(_file, None),
        "user": Key(_text, "secure_sendmail"),
        "password_file": Key(_file, None),
        "database": Key(_text, "secure_sendmail"),
        "tls_ca": Key(_file, None),
        "retention": Key(duration, "168h"),
        "outbox_max": Key(size, "2G"),
    },
    "log": {
        "error_log": Key(_file, None),
        "log_subject": Key(_one_of(("plain", "none")), "plain"),
        "log_recipients": Key(_one_of(("plain", "hash")), "plain"),
        "journal": Key(_one_of(("ids", "addresses")), "ids"),
    },
    "retention": {
        "ledger": Key(duration, "168h"),
        "trash": Key(duration, "30d"),
        "failed": Key(duration, "30d"),
    },
}

# So many vhosts beside those that are configured by name have their settings kept.
MOST_FOUND = 10_000

# Keys of [vhosts."V"] and vhosts.d/V.toml, and the key that holds where they are absent.
VHOST_KEYS = {
    "limits": Key(_limits, ("limits", "default")),
    "count": Key(_COUNT, ("limits", "count")),
    "over_limit": Key(_OVER_LIMIT, ("limits", "over_limit")),
    "max_message_size": Key(size, ("limits", "max_message_size")),
    "hold_max_messages": Key(_number, ("limits", "hold_max_messages")),
    "hold_max_bytes": Key(size, ("limits", "hold_max_bytes")),
    "sender": Key(_address, None),
    "sender_policy": Key(_SENDER_POLICY, None),
    "sender_domains": Key(_domains, None),
    "error_log": Key(_file, None),
    # In vhosts.d/V.toml alone.
    "users": Key(users, None),
}

NOT_BUILT = {
    "limits": ("pace_max",),
}


@dataclass(frozen=True)
class VhostSettings:
    """What holds for one vhost."""

    limits: tuple[limits.Limit, ...]
    count: str
    over_limit: str
    max_message_size: int
    # Of what lies in our directories.
    hold_max_messages: int
    hold_max_bytes: int
    sender: str | None
    sender_policy: str | None
    sender_domains: tuple[str, ...] | None
    error_log: str | None
    # Who may submit; None: nobody but in private mode.
    users: tuple[str, ...] | None

    def envelope_sender(self, vhost: str | None, given: str | None, login: Callable[[], str]) -> str:
        """The sender for a message whose caller has GIVEN one, or None; LOGIN says it where nobody else does.

        VHOST is None where it is only claimed: a name that anyone can claim gives the right to no domain.
        """
        if given is not None and self._may_send_as(vhost, given):
            return given
        return self.sender or login()

    def _may_send_as(self, vhost: str | None, address: str) -> bool:
        if self.sender_policy != "own-domains" or not address:
            return self.sender_policy != "force"
        domains = {*(self.sender_domains or ())}
        if vhost is not None:
            domains |= {vhost, vhost.removeprefix("www.")}
        if self.sender:
            domains.add(envelope.split(self.sender)[1].lower())
        return envelope.split(address)[1].lower() in domains

    @property
    def longest(self) -> int:
        """The seconds of the longest window."""
        return max((limit.seconds for limit in self.limits), default=0)


@dataclass(frozen=True)
class Mysql:
    """Where the log of record is; retention in seconds."""

    host: str
    port: int
    unix_socket: str | None
    user: str
    password_file: str | None
    database: str
    tls_ca: str | None
    retention: int
    # Bytes of rows that wait.
    outbox_max: int


@dataclass(frozen=True)
class Config:
    """One consistent configuration; a reload makes a new one."""

    file: str
    spool: str
    state: str
    mta_url: str
    give_up: int
    domain_header: str
    complaints_header: str
    complaints_to: str
    error_log: str | None
    # Whether the log has them as they are.
    log_subject: bool
    log_recipients: bool
    # Whether the daemon's own log names senders and recipients.
    journal_addresses: bool
    # Of a uid that several vhosts share, together.
    shared_uid: tuple[limits.Limit, ...] | None
    # Bytes; 0: the file system is not looked at.
    min_free: int
    # Seconds that the ledger keeps its log and what has ended, and trash/ and failed/ their messages.
    keep_ledger: int
    keep_trash: int
    keep_failed: int
    # Whom one mail per incident goes to.
    notify: str | None
    # None: the ledger alone keeps the log.
    mysql: Mysql | None
    _sections: dict[str, dict[str, Any]] = field(repr=False)
    # By exact name, and in file order by pattern; values already parsed.
    _exact: dict[str, dict[str, Any]] = field(repr=False)
    _patterns: dict[str, dict[str, Any]] = field(repr=False)
    # What was looked up already.
    _found: dict[str, VhostSettings] = field(default_factory=dict, init=False, repr=False)
    _uids: dict[str, tuple[float, dict[str, int]]] = field(default_factory=dict, init=False, repr=False)
    _sharers: Counter[str] = field(default_factory=Counter, init=False, repr=False)

    def uids(self, vhost: str) -> frozenset[int]:
        """The uids of the vhost's users, as far as they exist."""
        return frozenset(self._users(vhost).values())

    def shares_uid(self, vhost: str, uid: int) -> bool:
        """Whether UID has a limit that VHOST shares with other vhosts that have the same user, by the same name."""
        return self.shared_uid is not None and any(
            found == uid and self.sharers(user) > 1 for user, found in self._users(vhost).items()
        )

    def sharers(self, user: str) -> int:
        """How many vhosts have USER, by that name, among their users."""
        if not self._sharers:
            self._sharers.update(user for keys in self._exact.values() for user in keys.get("users", ()))
        return self._sharers[user]

    def _users(self, vhost: str) -> dict[str, int]:
        """The uids of the vhost's users, by name, as far as they exist."""
        now = time.monotonic()
        looked_up, found = self._uids.get(vhost, (-UIDS_AGE, {}))
        if now - looked_up >= UIDS_AGE:
            found = {user: uid for user in self.vhost(vhost).users or () if (uid := uid_of(user)) is not None}
            self._uids[vhost] = now, found
        return found

    @property
    def registered(self) -> list[str]:
        """The vhosts that have users of their own."""
        return [name for name, keys in self._exact.items() if "users" in keys]

    def has_users(self, name: str) -> bool:
        """Whether the vhost has users of its own."""
        return "users" in self._exact.get(name, {})

    def has_section(self, name: str) -> bool:
        """Whether the vhost is configured by name."""
        return name in self._exact

    @property
    def of_uids(self) -> VhostSettings:
        """The settings of a uid that several names share: limits and count are its."""
        settings = self.unregistered(layout.UNREGISTERED)
        return settings if self.shared_uid is None else replace(settings, limits=self.shared_uid)

    def unregistered(self, name: str) -> VhostSettings:
        """The settings of a vhost that only claims its NAME: never more than the default limits."""
        settings, default = self.vhost(name), self._sections["limits"]
        return replace(
            settings,
            limits=tuple(dict.fromkeys((*settings.limits, *default["default"]))),
            count=default["count"],
            over_limit=settings.over_limit if default["over_limit"] == "observe" else default["over_limit"],
            max_message_size=min(settings.max_message_size, default["max_message_size"]),
            hold_max_messages=min(settings.hold_max_messages, default["hold_max_messages"]),
            hold_max_bytes=min(settings.hold_max_bytes, default["hold_max_bytes"]),
        )

    def vhost(self, name: str) -> VhostSettings:
        """The settings of vhost NAME, key by key: its exact entry, then the first pattern that has the key, then [limits]."""
        settings = self._found.get(name)
        if settings is None:
            if len(self._found) >= MOST_FOUND + len(self._exact):
                # Names can be made up without end.
                self._found.clear()
            sources = [self._exact.get(name, {})]
            sources += [keys for pattern, keys in self._patterns.items() if fnmatchcase(name, pattern)]
            values: dict[str, Any] = {}
            for key, spec in VHOST_KEYS.items():
                section, global_key = spec.default if isinstance(spec.default, tuple) else ("", "")
                fallback = self._sections[section][global_key] if section else None
                values[key] = next((source[key] for source in sources if key in source), fallback)
            settings = self._found[name] = VhostSettings(**values)
        return settings

    @property
    def longest(self) -> int:
        """The seconds of the longest window of all."""
        named = (keys["limits"] for keys in (*self._exact.values(), *self._patterns.values()) if "limits" in keys)
        found = (self._sections["limits"]["default"], self.shared_uid or (), *named)
        return max((limit.seconds for each in found for limit in each), default=0)

    @property
    def least_caps(self) -> tuple[int, int]:
        """The smallest hold_max_messages and hold_max_bytes that hold for anyone."""
        messages, size = "hold_max_messages", "hold_max_bytes"
        sources = [self._sections["limits"], *self._exact.values(), *self._patterns.values()]
        return min(s[messages] for s in sources if messages in s), min(s[size] for s in sources if size in s)

    @property
    def observed(self) -> list[str]:
        """The sections in which over_limit is "observe"."""
        named = {**self._exact, **self._patterns}
        found = [f'vhosts."{name}"' for name, keys in named.items() if keys.get("over_limit") == "observe"]
        return ["limits", *found] if self._sections["limits"]["over_limit"] == "observe" else found

    def tag(self, vhost: str) -> tuple[tuple[str, str], ...]:
        """The header fields that every message of VHOST begins with."""
        return ((self.domain_header, vhost), (self.complaints_header, self.complaints_to))


def load(file: str) -> Config:
    """Read FILE and vhosts.d/*.toml beside it. Raises ConfigError."""
    document = _read(file)
    for section in document:
        if not section or section not in (*SECTIONS, *SECTIONS[""], "vhosts"):
            raise _unknown(file, "", section, [*SECTIONS[""], *filter(None, SECTIONS), "vhosts"])
    sections: dict[str, dict[str, Any]] = {}
    for section, keys in SECTIONS.items():
        found = _table(file, section, document.get(section, {})) if section else document
        if section:
            for key in found:
                if key not in keys:
                    raise _unknown(file, section, key, list(keys))
        sections[section] = {}
        for key, spec in keys.items():
            value = found.get(key, spec.default)
            sections[section][key] = None if value is None else _value(file, section, key, spec, value)
    exact, patterns = _vhosts(file, _table(file, "vhosts", document.get("vhosts", {})))
    tag = sections["tag"]
    return Config(
        file=file,
        spool=sections[""]["spool"],
        state=sections[""]["state"],
        mta_url=sections["mta"]["url"],
        give_up=sections["mta"]["give_up"],
        domain_header=tag["domain_header"],
        complaints_header=tag["complaints_header"],
        complaints_to=tag["complaints_to"].replace("HOSTNAME", os.uname().nodename),
        error_log=sections["log"]["error_log"],
        log_subject=sections["log"]["log_subject"] == "plain",
        log_recipients=sections["log"]["log_recipients"] == "plain",
        journal_addresses=sections["log"]["journal"] == "addresses",
        shared_uid=sections["limits"]["shared_uid"],
        min_free=sections["limits"]["min_free"],
        keep_ledger=sections["retention"]["ledger"],
        keep_trash=sections["retention"]["trash"],
        keep_failed=sections["retention"]["failed"],
        notify=sections["limits"]["notify"],
        mysql=Mysql(**sections["mysql"]) if "mysql" in document else None,
        _sections=sections,
        _exact=exact,
        _patterns=patterns,
    )


def uid_of(user: str) -> int | None:
    """The uid of the account USER, which may also be a number; None where there is no such account."""
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        return int(user) if user.isascii() and user.isdecimal() and int(user) <= MAX_UID else None


def signature(file: str) -> tuple[tuple[str, int, int, int], ...]:
    """What changes when a configuration file is written, added, replaced or removed."""
    found = []
    for path in [file, *_vhost_files(file)]:
        try:
            status = os.stat(path)
        except OSError:
            continue
        found.append((path, status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(found)


def vhost_file(file: str, vhost: str) -> str:
    """The file of VHOST in vhosts.d beside FILE."""
    return os.path.join(vhosts_directory(file), f"{vhost}.toml")


def write_vhost_file(file: str, vhost: str, names: Sequence[str], gid: int) -> bool:
    """Write the file of a new vhost, for the group GID to read; whether there was none that says the same.

    Raises ConfigError, OSError.
    """
    path = vhost_file(file, vhost)
    if os.path.lexists(path):
        keys = _vhost(path, "", _read(path))
        if keys.get("users") != tuple(names):
            raise ConfigError(f"{path}: exists already, with users {list(keys.get('users', ()))}; remove it, or edit it")
        return False
    directory = vhosts_directory(file)
    if not os.path.isdir(directory):
        os.mkdir(directory, 0o750)
        os.chown(directory, -1, gid)
    fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
    with os.fdopen(fd, "w", encoding="utf-8") as stream:
        os.fchown(fd, -1, gid)
        stream.write(f"users = {json.dumps(list(names), ensure_ascii=False)}\n")
        stream.flush()
        os.fsync(fd)
    os.rename(f"{path}.new", path)
    return True


def has_section(file: str, vhost: str) -> bool:
    """Whether FILE itself has a section for VHOST. Raises ConfigError."""
    return vhost in _table(file, "vhosts", _read(file).get("vhosts", {}))


def vhosts_directory(file: str) -> str:
    return os.path.join(os.path.dirname(os.path.abspath(file)), "vhosts.d")


def _vhost_files(file: str) -> list[str]:
    directory = vhosts_directory(file)
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror}") from None
    return [os.path.join(directory, name) for name in names if name.endswith(".toml") and not name.startswith(".")]


def _vhosts(file: str, tables: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    exact: dict[str, dict[str, Any]] = {}
    patterns: dict[str, dict[str, Any]] = {}
    for name, table in tables.items():
        section = f'vhosts."{name}"'
        if layout.is_vhost(name):
            exact[name] = _vhost(file, section, _table(file, section, table))
        elif layout.is_vhost(re.sub(r"[*?]", "a", name)):
            patterns[name] = _vhost(file, section, _table(file, section, table))
        else:
            raise ConfigError(
                f'{file}: [{section}]: {name!r} is neither a host name in lower case nor a pattern such as "*.example.com"'
            )
    for path in _vhost_files(file):
        name = os.path.basename(path).removesuffix(".toml")
        if not layout.is_vhost(name):
            raise ConfigError(f"{path}: {name!r} is not a host name in lower case; rename or remove the file")
        keys = _vhost(path, "", _read(path))
        both = sorted(keys.keys() & exact.get(name, {}).keys())
        if both:
            raise ConfigError(f'{path}: {both[0]}: also set in {file} [vhosts."{name}"]; keep one of the two')
        exact[name] = exact.get(name, {}) | keys
    return exact, patterns


def _vhost(file: str, section: str, table: dict[str, Any]) -> dict[str, Any]:
    for key in table:
        if section and key == "users":
            raise ConfigError(f"{file}: {_where(section, key)}: belongs into vhosts.d, where secure-sendmail vhost add writes it")
        if key not in VHOST_KEYS:
            raise _unknown(file, section, key, list(VHOST_KEYS))
    return {key: _value(file, section, key, VHOST_KEYS[key], value) for key, value in table.items()}


def _value(file: str, section: str, key: str, spec: Key, value: object) -> Any:
    try:
        return spec.parse(value)
    except ValueError as error:
        raise ConfigError(f"{file}: {_where(section, key)}: {error}") from None


def _table(file: str, section: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: {section}: {value!r} is not a table; write [{section}] and its keys below it")
    return value


def _unknown(file: str, section: str, key: str, allowed: list[str]) -> ConfigError:
    if key in NOT_BUILT.get(section, ()):
        return ConfigError(f"{file}: {_where(section, key)}: not built yet; remove it")
    return ConfigError(f"{file}: {_where(section, key)}: unknown key; allowed: {', '.join(allowed)}")


def _where(section: str, key: str) -> str:
    return f"[{section}] {key}" if section else key


def _read(file: str) -> dict[str, Any]:
    try:
        trusted.check(file, (0, os.geteuid()))
        with open(file, "rb") as stream:
            return tomllib.load(stream)
    except trusted.Untrusted as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        hint = {
            errno.ENOENT: "; write it, or name another with --config FILE",
            errno.EACCES: "; run this as root",
        }.get(error.errno or 0, "")
        raise ConfigError(f"{file}: {error.strerror}{hint}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None
