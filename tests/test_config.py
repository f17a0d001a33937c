"""The configuration: the shipped file lists every key with its default, and a mistake is named, never passed over."""

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from releaser import config, envelope, limits
from releaser.config import ConfigError

SHIPPED = Path(__file__).parent.parent / "config/releaser.toml"


def uncommented() -> str:
    """The shipped file with `#key = value` and `#[section]` taken for what they stand for; prose has a space behind the #."""
    return re.sub(r"(?m)^#(?=[a-z_]+ = |\[)", "", SHIPPED.read_text())


def documented_defaults() -> dict[str, dict[str, Any]]:
    """Key and value of every line behind a line `# Default:`, by section."""
    found: dict[str, dict[str, Any]] = {"": {}}
    section, expected = "", False
    for line in SHIPPED.read_text().splitlines():
        if heading := re.match(r"#?\[([a-z]+)\]$", line):
            section = heading[1]
            found[section] = {}
        if expected:
            found[section] |= tomllib.loads(line.removeprefix("#"))
        expected = line == "# Default:"
    return {section: defaults for section, defaults in found.items() if defaults}


def write(directory: Path, text: str, **vhosts: str) -> Path:
    """A configuration, and files in vhosts.d by their name without .toml; `_` in it stands for a dot."""
    file = directory / "releaser.toml"
    file.write_text(text)
    file.chmod(0o600)
    for name, keys in vhosts.items():
        (directory / "vhosts.d").mkdir(mode=0o700, exist_ok=True)
        (directory / "vhosts.d" / f"{name.replace('_', '.')}.toml").write_text(keys)
    return file


def load(directory: Path, text: str, **vhosts: str) -> config.Config:
    return config.load(str(write(directory, text, **vhosts)))


def mistake(directory: Path, text: str, **vhosts: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(directory, text, **vhosts)
    assert "\n" not in str(error.value)
    return str(error.value)


# The shipped file.


def test_shipped_file_lists_every_key() -> None:
    """Keys of the file == keys of the code, in each section, and in [vhosts."V"]."""
    document = tomllib.loads(uncommented())
    vhosts = document.pop("vhosts")
    sections = {name: set(table) for name, table in document.items() if isinstance(table, dict)}
    sections[""] = {name for name, value in document.items() if not isinstance(value, dict)}
    assert sections == {section: set(keys) for section, keys in config.SECTIONS.items()}
    (keys,) = vhosts.values()
    # The users of a vhost are in its own file alone.
    assert set(keys) | {"users"} == set(config.VHOST_KEYS)


def test_shipped_file_has_the_defaults() -> None:
    """Defaults of the file == defaults of the code."""
    known = {
        section: {key: spec.default for key, spec in keys.items() if spec.default is not None}
        for section, keys in config.SECTIONS.items()
    }
    known = {section: keys for section, keys in known.items() if keys}
    assert documented_defaults() == known


def test_shipped_file_is_all_comments(tmp_path: Path) -> None:
    """As shipped the file sets nothing, and says the same as an empty one and as one with every default written out."""
    assert all(value == {} for value in tomllib.loads(SHIPPED.read_text()).values())
    everything = uncommented()
    without_vhosts = everything[: everything.index("[vhosts.")]
    found = [load(tmp_path, text) for text in ("", SHIPPED.read_text(), without_vhosts)]
    assert repr(found[0]) == repr(found[1]) == repr(found[2])
    assert found[0].vhost("a.example") == found[1].vhost("a.example") == found[2].vhost("a.example")


def test_shipped_file_loads_uncommented(tmp_path: Path) -> None:
    """Every line of the shipped file can be uncommented as it stands."""
    found = load(tmp_path, uncommented())
    assert (found.spool, found.state) == ("/var/spool/php-secure-sendmail", "/var/lib/php-secure-sendmail")
    assert (found.mta_url, found.give_up) == ("smtp://127.0.0.1:25", 5 * 86400)
    assert (found.domain_header, found.complaints_header) == ("X-Domain", "X-Complaints-To")
    example = found.vhost("www.example.com")
    assert [limit.text for limit in example.limits] == ["500/1h"] and example.sender == "user1@example.com"


def test_defaults_of_a_vhost(tmp_path: Path) -> None:
    """Without any configuration a vhost has the design's limits."""
    assert load(tmp_path, "").vhost("www.example.com") == config.VhostSettings(
        limits=limits.parse(["50/5m", "100/30m", "200/1h", "500/1d"]),
        count="recipients",
        over_limit="hold",
        max_message_size=50 * 1024 * 1024,
        hold_max_messages=10000,
        hold_max_bytes=1 << 30,
        sender=None,
        sender_policy=None,
        sender_domains=None,
        error_log=None,
        users=None,
    )


def test_hostname_is_replaced(tmp_path: Path) -> None:
    """HOSTNAME in complaints_to stands for this host's name, in the default too."""
    host = os.uname().nodename
    assert load(tmp_path, "").complaints_to == f"abuse@{host}"
    assert load(tmp_path, '[tag]\ncomplaints_to = "http://HOSTNAME/abuse"\n').complaints_to == f"http://{host}/abuse"
    assert load(tmp_path, "").tag("www.v.example") == (("X-Domain", "www.v.example"), ("X-Complaints-To", f"abuse@{host}"))


# Values.

GOOD = [
    ('spool = "/srv/spool/"', "spool", "/srv/spool"),
    ('state = "/srv/state"', "state", "/srv/state"),
    ('[mta]\nurl = "smtp://127.0.0.1:25"', "mta_url", "smtp://127.0.0.1:25"),
    ('[mta]\nurl = "smtp://mail.example.com:2525"', "mta_url", "smtp://mail.example.com:2525"),
    ('[mta]\nurl = "smtp://[::1]:25"', "mta_url", "smtp://[::1]:25"),
    ('[mta]\nurl = "maildir:/tmp/mail"', "mta_url", "maildir:/tmp/mail"),
    ('[mta]\ngive_up = "90s"', "give_up", 90),
    ('[mta]\ngive_up = "90m"', "give_up", 5400),
    ('[mta]\ngive_up = "12h"', "give_up", 43200),
    ('[tag]\ndomain_header = "X-Vhost"', "domain_header", "X-Vhost"),
]


@pytest.mark.parametrize(("text", "name", "expected"), GOOD)
def test_good_value(tmp_path: Path, text: str, name: str, expected: object) -> None:
    """A value is read once, into what the program works with."""
    assert getattr(load(tmp_path, text), name) == expected


SIZES = [("1", 1), ("500K", 500 * 1024), ("50M", 50 * 1024**2), ("1G", 1024**3)]


@pytest.mark.parametrize(("text", "expected"), SIZES)
def test_size(tmp_path: Path, text: str, expected: int) -> None:
    """K, M and G are powers of 1024."""
    assert load(tmp_path, f'[limits]\nmax_message_size = "{text}"').vhost("a").max_message_size == expected


# What is in the file; the key that the error names; what was found; what is allowed.
BAD = [
    ("spol = 1", "spol", "spol", "spool"),
    ("[lmits]", "lmits", "lmits", "limits"),
    ("[mta]\nurrl = 1", "[mta] urrl", "urrl", "give_up"),
    ("[tag]\nX = 1", "[tag] X", "X", "domain_header"),
    ("[limits]\nlimits = []", "[limits] limits", "limits", "over_limit"),
    ("[limits.a]\nb = 1", "[limits] a", "a", "over_limit"),
    ('"" = 1', "", "", "spool"),
    ("mta = 5", "mta", "5", "[mta]"),
    ("limits = ['1/1h']", "limits", "1/1h", "[limits]"),
    ("vhosts = 5", "vhosts", "5", "[vhosts]"),
    ("[[tag]]", "tag", "{}", "[tag]"),
    ("[spool]", "spool", "{}", "string"),
    ("[vhosts]\nlimits = ['1/1h']", 'vhosts."limits"', "1/1h", "table"),
    ('[vhosts."a.example"]\nlimit = []', '[vhosts."a.example"] limit', "limit", "over_limit"),
    ('[vhosts."a.example"]\ndefault = []', '[vhosts."a.example"] default', "default", "limits"),
    ('[vhosts."A.example"]', "A.example", "A.example", "lower case"),
    ('[vhosts."a..example"]', "a..example", "a..example", "host name"),
    ('[vhosts."../a"]', "../a", "../a", "host name"),
    ('[vhosts."[ab].example"]', "[ab].example", "[ab].example", "*.example.com"),
    ('[vhosts.""]', "vhosts", "''", "host name"),
    ('spool = "relative"', "spool", "relative", "absolute"),
    ('spool = "/"', "spool", "'/'", "absolute"),
    ('spool = ""', "spool", "''", "absolute"),
    ("spool = 5", "spool", "5", "string"),
    ('state = "/a\\nb"', "state", "\\n", "printable"),
    ('[mta]\nurl = "smtp://127.0.0.1"', "[mta] url", "smtp://127.0.0.1", "smtp://HOST:PORT"),
    ('[mta]\nurl = "smtp://127.0.0.1:0"', "[mta] url", ":0", "smtp://HOST:PORT"),
    ('[mta]\nurl = "smtp://127.0.0.1:65536"', "[mta] url", "65536", "smtp://HOST:PORT"),
    ('[mta]\nurl = "smtp://:25"', "[mta] url", "smtp://:25", "smtp://HOST:PORT"),
    ('[mta]\nurl = "smtp:127.0.0.1:25"', "[mta] url", "smtp:127", "smtp://HOST:PORT"),
    ('[mta]\nurl = "smtp://h:²"', "[mta] url", "²", "smtp://HOST:PORT"),
    ('[mta]\nurl = "lmtp://127.0.0.1:24"', "[mta] url", "lmtp", "maildir:DIR"),
    ('[mta]\nurl = "maildir:mail"', "[mta] url", "maildir:mail", "absolute"),
    ('[mta]\nurl = "maildir:/"', "[mta] url", "maildir:/", "absolute"),
    ('[mta]\nurl = "127.0.0.1:25"', "[mta] url", "127.0.0.1:25", "smtp://HOST:PORT"),
    ("[mta]\nurl = 25", "[mta] url", "25", "string"),
    ('[mta]\nurl = "sendmail:sendmail"', "[mta] url", "sendmail:sendmail", "absolute"),
    ('[mta]\nurl = "sendmail:/usr/sbin/"', "[mta] url", "sendmail:/usr/sbin/", "PROGRAM"),
    ('[mta]\nurl = "sendmail:/usr/sbin/sendmail -t"', "[mta] url", "sendmail -t", "the path of the program alone"),
    ('[mta]\ngive_up = "5"', "[mta] give_up", "'5'", '"5d"'),
    ('[mta]\ngive_up = "5w"', "[mta] give_up", "5w", '"5d"'),
    ('[mta]\ngive_up = "0d"', "[mta] give_up", "0d", '"5d"'),
    ('[mta]\ngive_up = "-5d"', "[mta] give_up", "-5d", '"5d"'),
    ('[mta]\ngive_up = "5 d"', "[mta] give_up", "5 d", '"5d"'),
    ("[mta]\ngive_up = 5", "[mta] give_up", "5", "string"),
    ('[tag]\ndomain_header = "X Domain"', "[tag] domain_header", "X Domain", "X-Domain"),
    ('[tag]\ndomain_header = "X-Domain:"', "[tag] domain_header", "X-Domain:", "header name"),
    ('[tag]\ncomplaints_header = ""', "[tag] complaints_header", "''", "header name"),
    ('[tag]\ncomplaints_header = "X-\\n"', "[tag] complaints_header", "\\n", "printable"),
    ('[tag]\ncomplaints_to = "a\\nBcc: b@x.y"', "[tag] complaints_to", "\\n", "printable"),
    ("[tag]\ncomplaints_to = 5", "[tag] complaints_to", "5", "string"),
    ("[limits]\ndefault = '50/5m'", "[limits] default", "50/5m", "list"),
    ("[limits]\ndefault = 50", "[limits] default", "50", "list"),
    ("[limits]\ndefault = [50]", "[limits] default", "50", "list"),
    ("[limits]\ndefault = []", "[limits] default", "empty", "unlimited"),
    ("[limits]\ndefault = ['50/5']", "[limits] default", "50/5", "50/5m"),
    ("[limits]\ndefault = ['unlimited', '1/1h']", "[limits] default", "unlimited", "50/5m"),
    ("[limits]\ncount = 'mails'", "[limits] count", "mails", '"recipients" or "messages"'),
    ("[limits]\ncount = true", "[limits] count", "True", '"recipients" or "messages"'),
    ("[limits]\ncount = ['messages']", "[limits] count", "messages", '"recipients" or "messages"'),
    ("[limits]\nover_limit = 'drop'", "[limits] over_limit", "drop", '"hold" or "observe"'),
    ("[limits]\nover_limit = 'pace'", "[limits] over_limit", "not built yet", '"hold" or "observe" or "reject"'),
    ("[limits]\nhold_max_messages = 0", "[limits] hold_max_messages", "0", "1 to"),
    ("[limits]\nhold_max_messages = '10'", "[limits] hold_max_messages", "'10'", "a number"),
    ("[limits]\nhold_max_bytes = '0'", "[limits] hold_max_bytes", "'0'", '"1G"'),
    ("[limits]\nmin_free = 0", "[limits] min_free", "0", "string"),
    ('[vhosts."a.example"]\nmin_free = "1"', '[vhosts."a.example"] min_free', "min_free", "hold_max_bytes"),
    ("[limits]\nmax_message_size = '50MB'", "[limits] max_message_size", "50MB", '"50M"'),
    ("[limits]\nmax_message_size = '0'", "[limits] max_message_size", "0", '"50M"'),
    ("[limits]\nmax_message_size = '50m'", "[limits] max_message_size", "50m", '"50M"'),
    ("[limits]\nmax_message_size = 52428800", "[limits] max_message_size", "52428800", "string"),
    ("[limits]\nnotify = 'nobody'", "[limits] notify", "'nobody'", "not a mail address"),
    ("[limits]\nshared_uid = []", "[limits] shared_uid", "an empty list", "unlimited"),
    ("[mysql]\nhost = 1", "[mysql] host", "1", "string"),
    ("[mysql]\nport = 'x'", "[mysql] port", "'x'", "1 to 65535"),
    ("[mysql]\nport = true", "[mysql] port", "True", "1 to 65535"),
    ("[mysql]\npassword = 'x'", "[mysql] password", "unknown key", "password_file"),
    ("[mysql]\npassword_file = 'relative'", "[mysql] password_file", "'relative'", "absolute"),
    ("[mysql]\nretention = '7'", "[mysql] retention", "'7'", "12h"),
    ("[log]\nerror_log = '/e/'", "[log] error_log", "'/e/'", "absolute"),
    ('[vhosts."a.example"]\nerror_log = "e"', '[vhosts."a.example"] error_log', "'e'", "absolute"),
    ('[vhosts."a.example"]\nusers = ["u"]', '[vhosts."a.example"] users', "vhosts.d", "vhost add"),
    ('[vhosts."a.example"]\nsender_policy = "deny"', '[vhosts."a.example"] sender_policy', "deny", '"allow"'),
    ('[vhosts."a.example"]\nsender_domains = "a.example"', '[vhosts."a.example"] sender_domains', "a.example", "list"),
    ('[vhosts."a.example"]\nsender_domains = ["A.example"]', '[vhosts."a.example"] sender_domains', "A.example", "lower case"),
    ('[vhosts."a.example"]\nsender = "nobody"', '[vhosts."a.example"] sender', "nobody", "mail address"),
    ('[vhosts."a.example"]\nsender = "a b@x.y"', '[vhosts."a.example"] sender', "a b@x.y", "mail address"),
    ('[vhosts."a.example"]\nsender = "a@x.y>"', '[vhosts."a.example"] sender', "a@x.y>", "mail address"),
    ('[vhosts."a.example"]\nsender = "Jane <a@x.y>"', '[vhosts."a.example"] sender', "Jane <a@x.y>", "mail address"),
    ('[vhosts."a.example"]\nsender = ""', '[vhosts."a.example"] sender', "''", "mail address"),
    ('[vhosts."a.example"]\nlimits = ["x"]', '[vhosts."a.example"] limits', "x", "50/5m"),
    ('[vhosts."*.example"]\ncount = "x"', '[vhosts."*.example"] count', "x", "recipients"),
]


@pytest.mark.parametrize(("text", "key", "found", "allowed"), BAD)
def test_mistake_is_named(tmp_path: Path, text: str, key: str, found: str, allowed: str) -> None:
    """Every mistake is an error that names the file, the key, what was found and what is allowed."""
    error = mistake(tmp_path, text)
    assert error.startswith(f"{tmp_path}/releaser.toml: ")
    rest = error.removeprefix(f"{tmp_path}/releaser.toml: ")
    assert key in rest and found in rest and allowed in rest


@pytest.mark.parametrize(("text", "line"), [
    ("spool = ", 1), ("\n\n[mta\n", 3), ("[mta]\nurl = smtp\n", 2), ("[mta]\n[mta]\n", 2), ("a = 1\na = 2\n", 2),
    ("\nspool = '/a\n", 2),
])  # fmt: skip
def test_syntax_error_has_its_line(tmp_path: Path, text: str, line: int) -> None:
    """What is no TOML is an error that names file and line."""
    error = mistake(tmp_path, text)
    assert error.startswith(f"{tmp_path}/releaser.toml: ")
    assert f"line {line}" in error or "end of document" in error


def test_no_utf8(tmp_path: Path) -> None:
    """A file in Latin-1 is an error that names it, not a traceback."""
    file = write(tmp_path, "")
    file.write_bytes(b"# J\xf6rg\n")
    with pytest.raises(ConfigError, match=r"releaser\.toml: "):
        config.load(str(file))


def test_missing_file(tmp_path: Path) -> None:
    """A file that is not there is an error that names it."""
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        config.load(str(tmp_path / "none.toml"))


# vhosts.d.


def test_vhosts_directory(tmp_path: Path) -> None:
    """A file in vhosts.d is the vhost of its name; the same vhost in the main file is merged with it key by key."""
    found = load(
        tmp_path,
        '[vhosts."a.example"]\ncount = "messages"\n',
        a_example='limits = ["7/1h"]\n',
        b_example='sender = "b@b.example"',
    )
    assert (found.vhost("a.example").count, found.vhost("a.example").limits) == ("messages", limits.parse(["7/1h"]))
    assert found.vhost("b.example").sender == "b@b.example"


def test_key_in_both_places(tmp_path: Path) -> None:
    """The same key in [vhosts] and in vhosts.d is an error that names both files, also where the values agree."""
    error = mistake(tmp_path, '[vhosts."a.example"]\ncount = "messages"\n', a_example='count = "messages"\n')
    assert error.startswith(f"{tmp_path}/vhosts.d/a.example.toml: count: ")
    assert f"{tmp_path}/releaser.toml" in error and '[vhosts."a.example"]' in error


BAD_VHOST_FILES = [
    ("limit = []", "limit", "limit", "over_limit"),
    ("limits = []", "limits", "empty", "unlimited"),
    ("error_log = '/e/'", "error_log", "'/e/'", "absolute"),
    ("users = []", "users", "[]", "list of user names"),
    ("users = ['a b']", "users", "'a b'", "list of user names"),
    ("[limits]\ndefault = []", "limits", "default", "list"),
    ("sender = 'x'", "sender", "x", "mail address"),
    ("count = ", "TOML", "line 1", ""),
]


@pytest.mark.parametrize(("text", "key", "found", "allowed"), BAD_VHOST_FILES)
def test_mistake_in_a_vhost_file(tmp_path: Path, text: str, key: str, found: str, allowed: str) -> None:
    """A mistake in vhosts.d names that file."""
    error = mistake(tmp_path, "", a_example=text)
    assert error.startswith(f"{tmp_path}/vhosts.d/a.example.toml: ")
    rest = error.removeprefix(f"{tmp_path}/vhosts.d/a.example.toml: ")
    assert key in rest and (found in rest or "end of document" in rest) and allowed in rest


@pytest.mark.parametrize("name", ["A.example", "a..example", "a example", "*.example", "-a", "ü.example", "a" * 64])
def test_bad_name_in_vhosts_directory(tmp_path: Path, name: str) -> None:
    """A file in vhosts.d that is not named as a vhost is an error that names it."""
    write(tmp_path, "", good="")
    (tmp_path / f"vhosts.d/{name}.toml").write_text("")
    error = mistake(tmp_path, "")
    assert f"{tmp_path}/vhosts.d/{name}.toml" in error and "host name" in error


def test_other_names_in_vhosts_directory(tmp_path: Path) -> None:
    """What an editor leaves in vhosts.d is nobody's: dot files, and what does not end in .toml."""
    write(tmp_path, "", good="")
    for name in (".a.example.toml", "a.example.toml~", "a.example.toml.dpkg-old", "README"):
        (tmp_path / "vhosts.d" / name).write_text("no TOML")
    assert load(tmp_path, "").vhost("a.example").count == "recipients"


# Precedence.

PRECEDENCE = """
[limits]
default = ["1/1h"]
max_message_size = "1M"
[vhosts."*.b.example"]
limits = ["2/1h"]
[vhosts."*.example"]
limits = ["3/1h"]
count = "messages"
[vhosts."www.b.example"]
over_limit = "observe"
[vhosts."a?.example"]
over_limit = "observe"
[vhosts."www.a.example"]
limits = ["4/1h"]
"""

VHOSTS = [
    # Limits, count, over_limit.
    ("other.test", "1/1h", "recipients", "hold"),
    ("www.a.example", "4/1h", "messages", "hold"),
    ("ftp.a.example", "3/1h", "messages", "hold"),
    ("www.b.example", "2/1h", "messages", "observe"),
    ("x.b.example", "2/1h", "messages", "hold"),
    ("x.y.b.example", "2/1h", "messages", "hold"),
    ("b.example", "3/1h", "messages", "hold"),
    ("aa.example", "3/1h", "messages", "observe"),
    ("example", "1/1h", "recipients", "hold"),
    ("www.a.example.test", "1/1h", "recipients", "hold"),
]


@pytest.mark.parametrize(("vhost", "limit", "count", "over_limit"), VHOSTS)
def test_precedence(tmp_path: Path, vhost: str, limit: str, count: str, over_limit: str) -> None:
    """For each key: the exact name, then the first pattern in file order that has the key, then [limits]."""
    found = load(tmp_path, PRECEDENCE).vhost(vhost)
    assert ([each.text for each in found.limits], found.count, found.over_limit) == ([limit], count, over_limit)
    assert found.max_message_size == 1024**2


def test_vhost_file_before_patterns(tmp_path: Path) -> None:
    """vhosts.d is an exact name: it wins over patterns."""
    found = load(tmp_path, PRECEDENCE, x_b_example='limits = ["unlimited"]\n')
    assert found.vhost("x.b.example").limits == () and found.vhost("x.b.example").count == "messages"


# Who may write it.


@pytest.mark.parametrize("mode", [0o602, 0o606, 0o666, 0o777, 0o622])
def test_file_writable_by_all(tmp_path: Path, mode: int) -> None:
    """A configuration that anyone may write is refused, and the error says how to mend it."""
    file = write(tmp_path, "")
    file.chmod(mode)
    with pytest.raises(ConfigError, match=rf"releaser\.toml: .*{mode:04o}.*chmod go-w {file}"):
        config.load(str(file))


def test_vhost_file_writable_by_all(tmp_path: Path) -> None:
    """The files in vhosts.d are held to the same."""
    write(tmp_path, "", a_example="")
    (tmp_path / "vhosts.d/a.example.toml").chmod(0o606)
    assert "a.example.toml" in mistake(tmp_path, "")


@pytest.mark.parametrize("which", ["etc", "etc/pss", "etc/pss/vhosts.d"])
def test_directory_writable_by_all(tmp_path: Path, which: str) -> None:
    """A directory that anyone may write is refused, here or further up; a sticky one is not."""
    (tmp_path / "etc").mkdir(mode=0o700)
    (tmp_path / "etc/pss").mkdir(mode=0o700)
    file = write(tmp_path / "etc/pss", "", a_example="")
    (tmp_path / which).chmod(0o777)
    with pytest.raises(ConfigError, match="writable by others"):
        config.load(str(file))
    (tmp_path / which).chmod(0o1777)
    assert config.load(str(file)).vhost("a").count == "recipients"


def test_link_in_a_directory_that_anyone_may_write(tmp_path: Path) -> None:
    """A symbolic link is only as safe as the directory that it is in: whoever can replace it chooses the configuration."""
    (tmp_path / "safe").mkdir(mode=0o700)
    (tmp_path / "open").mkdir(mode=0o700)
    file = write(tmp_path / "safe", "")
    (tmp_path / "open/releaser.toml").symlink_to(file)
    assert config.load(str(tmp_path / "open/releaser.toml")).file.endswith("releaser.toml")
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigError, match="writable by others"):
        config.load(str(tmp_path / "open/releaser.toml"))


@pytest.mark.server
def test_group_with_other_members(tmp_path: Path) -> None:
    """A file or directory that a group may write is refused where that group is not the owner's alone."""
    (tmp_path / "etc").mkdir(mode=0o700)
    file = write(tmp_path / "etc", "")
    for path, mode in ((file, 0o660), (tmp_path / "etc", 0o770)):
        os.chown(path, -1, 12345)
        path.chmod(mode)
        with pytest.raises(ConfigError, match=f"{path}: writable by others"):
            config.load(str(file))
        path.chmod(mode & 0o750)
        assert config.load(str(file)).file == str(file)


@pytest.mark.server
@pytest.mark.parametrize("which", ["etc/releaser.toml", "etc", "etc/vhosts.d", "etc/vhosts.d/a.example.toml"])
def test_foreign_owner(tmp_path: Path, which: str) -> None:
    """A file or directory of the configuration that belongs to somebody else is refused; the error names both uids."""
    (tmp_path / "etc").mkdir(mode=0o700)
    file = write(tmp_path / "etc", "", a_example="")
    os.chown(tmp_path / which, 12345, -1)
    with pytest.raises(ConfigError) as error:
        config.load(str(file))
    assert f"{tmp_path / which}: " in str(error.value) and "12345" in str(error.value) and "root" in str(error.value)


def test_sender_is_an_envelope_address(tmp_path: Path) -> None:
    """What the configuration takes for a sender, the envelope does too."""
    for address in ("user1@example.com", '"a b"@example.com', "a+b@[192.0.2.1]", "jörg@example.com"):
        found = load(tmp_path, f"[vhosts.\"a.example\"]\nsender = '{address}'\n").vhost("a.example").sender
        assert found == address and envelope.is_address(address)
