"""The configuration is read again while the releaser runs; a mistake in it changes nothing."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest
from host import Host, text

VHOST = "www.a.example"

# A mistake, and the words that the sentence about it must have: where it is, and what is allowed.
MISTAKES = {
    "unknown key": ('[limits]\ndefualt = ["9/1h"]\n', ["defualt", "default", "over_limit"]),
    "unknown table": ('[limit]\ndefault = ["9/1h"]\n', ["limit", "limits"]),
    "bad window": ('[limits]\ndefault = ["9/1x"]\n', ["default", "9/1x", "50/5m"]),
    "bad count": ('[limits]\ndefault = ["9/1h"]\ncount = "mails"\n', ["count", "mails", "recipients", "messages"]),
    "bad over_limit": ('[limits]\ndefault = ["9/1h"]\nover_limit = "drop"\n', ["over_limit", "drop", "hold", "observe"]),
    "not a list": ("[limits]\ndefault = 9\n", ["default", "9"]),
    "bad size": ('[limits]\ndefault = ["9/1h"]\nmax_message_size = "large"\n', ["max_message_size", "large", "50M"]),
    "bad url": ('[limits]\ndefault = ["9/1h"]\n[mta]\nurl = "http://127.0.0.1"\n', ["url", "http://127.0.0.1", "smtp://"]),
    "bad vhost": ('[limits]\ndefault = ["9/1h"]\n[vhosts."not a host"]\nlimits = ["9/1h"]\n', ["vhosts", "not a host"]),
    "key of a vhost": (f'[limits]\ndefault = ["9/1h"]\n[vhosts."{VHOST}"]\nlimit = ["9/1h"]\n', ["limit", "limits", VHOST]),
    "broken": ('[limits]\ndefault = ["9/1h"\n[vhosts]\n', ["line"]),
}


def configuration(host: Host, tables: str) -> str:
    mta = "" if "[mta]" in tables else f'[mta]\nurl = "maildir:{host.maildir}"\n'
    return f'spool = "{host.spool}"\nstate = "{host.state}"\n{mta}{tables}'


@pytest.fixture
def limited() -> Iterator[Host]:
    """An installation whose vhost has used up its limit of one."""
    with Host(default=["1/1h"]) as host:
        host.add(VHOST)
        with host.running():
            host.send(VHOST, message=text("one@x.example", subject="first"))
            host.wait_for_mail(1)
            host.wait_until_idle()
            yield host


def by_change(host: Host) -> None:
    """The releaser sees by itself that the file has changed."""


def by_signal(host: Host) -> None:
    host.signal(signal.SIGHUP)


@pytest.mark.parametrize("notice", [by_change, by_signal])
def test_reload_of_a_valid_change(limited: Host, notice: Callable[[Host], None]) -> None:
    """A changed limit takes effect without a restart; what was used counts against the new one."""
    limited.configure(default=["2/1h"])
    notice(limited)
    limited.wait(lambda: limited.json("limits", "show", VHOST)["windows"][0]["text"] == "2/1h", "the command knows it")
    wait_for_reload(limited)
    for number in (2, 3):
        limited.send(VHOST, message=text("one@x.example", subject=f"mail {number}"))
    limited.wait(lambda: len(limited.held()) == 1, "one is held")
    limited.wait_until_idle()
    assert limited.subjects() == ["first", "mail 2"]
    assert "2/1h" in limited.json("hold", "list")[0]["reason"]


def wait_for_reload(host: Host) -> None:
    """Until the releaser says that it has read the configuration again, or has found a mistake in it."""
    host.wait(lambda: any("releaser.toml" in line or "config" in line.lower() for line in behind_start(host)), "it is read")


def behind_start(host: Host) -> list[str]:
    lines = host.log().splitlines()
    starts = [number for number, line in enumerate(lines) if "started" in line]
    return lines[starts[-1] + 1 :]


@pytest.mark.parametrize("notice", [by_change, by_signal])
@pytest.mark.parametrize("mistake", ["unknown key", "bad window", "broken"])
def test_reload_of_a_mistake_changes_nothing(limited: Host, mistake: str, notice: Callable[[Host], None]) -> None:
    """A mistake keeps the old limits and is logged with file, key and what is allowed; mended, it takes effect."""
    tables, words = MISTAKES[mistake]
    limited.write(configuration(limited, tables))
    notice(limited)
    line = limited.wait_for_log("releaser.toml")
    for word in (str(limited.config), *words):
        assert word in line
    limited.send(VHOST, message=text("one@x.example", subject="second"))
    limited.wait_until_idle()
    assert limited.subjects() == ["first"]
    start = len(limited.log())
    limited.configure(default=["2/1h"])
    notice(limited)
    # The message that has been held stays so; only the next one has room.
    limited.wait(lambda: limited.log()[start:], "the releaser says something of it")
    limited.send(VHOST, message=text("one@x.example", subject="third"))
    limited.wait_until_idle()
    assert limited.subjects() == ["first", "third"]
    assert [row["subject"] for row in limited.json("hold", "list")] == ["second"]


def test_reload_of_any_mistake_is_one_sentence(limited: Host) -> None:
    """Every kind of mistake is told from the others at reload, and none ends the releaser or loosens the limit."""
    for mistake, (tables, words) in MISTAKES.items():
        start = len(limited.log())
        limited.write(configuration(limited, tables))
        limited.signal(signal.SIGHUP)
        # The mistake before may be told twice, by the signal and by the changed file.
        limited.wait(
            lambda start=start, words=words: any(  # type: ignore[misc]
                all(word in line for word in words) for line in limited.log()[start:].splitlines()
            ),
            f"the log tells of {mistake}",
        )
    limited.send(VHOST, message=text("one@x.example", subject="second"))
    limited.wait_until_idle()
    assert limited.subjects() == ["first"]


def test_reload_of_a_file_that_has_gone(limited: Host) -> None:
    """Without its configuration the releaser goes on with the last good one."""
    kept = limited.config.read_text()
    limited.config.unlink()
    limited.signal(signal.SIGHUP)
    limited.wait_for_log("releaser.toml")
    limited.send(VHOST, message=text("one@x.example", subject="second"))
    limited.wait_until_idle()
    assert limited.subjects() == ["first"]
    limited.write(kept)


def test_reload_of_a_file_of_one_vhost(limited: Host) -> None:
    """A file of vhosts.d counts like a table of the configuration; the same key in both is a mistake."""
    directory = limited.config.parent / "vhosts.d"
    directory.mkdir(exist_ok=True)
    directory.chmod(0o700)
    file = directory / f"{VHOST}.toml"
    file.write_text('limits = ["2/1h"]\n')
    limited.signal(signal.SIGHUP)
    limited.wait(lambda: limited.json("limits", "show", VHOST)["windows"][0]["text"] == "2/1h", "the command knows it")
    limited.wait(lambda: behind_start(limited)[-1:] and "released" not in behind_start(limited)[-1], "it is read")
    limited.send(VHOST, message=text("one@x.example", subject="second"))
    limited.wait_for_mail(2)
    start = len(limited.log())
    limited.configure(extra=f'[vhosts."{VHOST}"]\nlimits = ["9/1h"]\n')
    limited.signal(signal.SIGHUP)
    line = limited.wait_for_log("limits", start=start)
    assert f"{VHOST}.toml" in line and "limits" in line
    limited.send(VHOST, message=text("one@x.example", subject="third"))
    limited.wait_until_idle()
    assert limited.subjects() == ["first", "second"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_start_with_a_mistake(mistake: str) -> None:
    """At the start a mistake stops releaser and command with 78 and one sentence: file, key, what is allowed."""
    tables, words = MISTAKES[mistake]
    with Host() as host:
        host.add(VHOST)
        host.send(VHOST)
        before = host.ls()
        host.write(configuration(host, tables))
        for run in (host.releaser(), host.releaser("--once"), host.cli("status", check=False)):
            assert (run.returncode, run.stdout, run.stderr.count("\n")) == (78, "", 1), run
            for word in (str(host.config), *words):
                assert word in run.stderr
        assert host.ls() == before


def test_start_with_a_configuration_that_others_can_write() -> None:
    """A configuration that anybody could have written is not believed."""
    with Host() as host:
        host.add(VHOST)
        for path, mode in ((host.config, 0o666), (host.config.parent, 0o777)):
            kept = path.stat().st_mode
            path.chmod(mode)
            run = host.releaser("--once")
            assert (run.returncode, run.stderr.count("\n")) == (78, 1), run
            assert str(path) in run.stderr
            path.chmod(kept)
        assert host.releaser("--once").returncode == 0


def test_start_without_a_configuration() -> None:
    """No such file is a sentence and 78."""
    with Host() as host:
        host.config.unlink()
        for run in (host.releaser(), host.cli("status", check=False)):
            assert (run.returncode, run.stdout, run.stderr.count("\n")) == (78, "", 1), run
            assert str(host.config) in run.stderr
