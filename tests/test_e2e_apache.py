"""Websites on a real Apache, PHP as its module and in php-fpm pools: mail out, over the limit, and who is told."""

from __future__ import annotations

import pwd
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import smtp, subject
from servers import Message, Sink, wait_until
from system import SHARED, System
from web import Web

pytestmark = pytest.mark.server

# One shares www-data with whoever is not registered, one is www-data's alone, and two are customers' with a pool each.
SHARED_SITE, OWN_SITE, C1, C2 = "www.shared.example", "www.own.example", "www.c1.example", "www.c2.example"
POOLS = {SHARED_SITE: "", OWN_SITE: "", C1: "c1", C2: "c2"}
LIMIT = 4
NOTIFY = "postmaster@host.example"
STAMP = r"\[([A-Z][a-z]{2} [A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \d{4})\]"


class Site:
    """A host with the four websites, all of one limit; each website has an error log of its own but the shared one."""

    def __init__(self, sink: Sink, limit: str = f"{LIMIT}/1h", notify: str = f'notify = "{NOTIFY}"\n') -> None:
        self.sink = sink
        self.system = System(mta=smtp(sink.port), default=[limit])
        logs = {vhost: self.system.logs / f"{vhost}.log" for vhost in (OWN_SITE, C1, C2)}
        sections = "".join(f'[vhosts."{vhost}"]\nerror_log = "{path}"\n' for vhost, path in logs.items())
        self.system.configure(extra=f'{notify}[log]\nerror_log = "{self.system.error_log}"\n{sections}')
        self.system.register(OWN_SITE, SHARED)
        self.system.register(C1, "c1")
        self.system.register(C2, "c2")
        self.system.cli("vhost", "add", "--unregistered")
        self.error_logs = {SHARED_SITE: self.system.error_log, **logs}
        self.web = Web(self.system)
        for vhost, pool in POOLS.items():
            self.web.site(vhost, self.system.sendmail_path(vhost, f"user@{vhost}", "-t", "-i"), pool)

    def mail(self, vhost: str, subject: str, page: str = "mail.php") -> None:
        """A visitor's request, on which the page sends a mail that is accepted."""
        kind = "fpm-fcgi" if POOLS[vhost] else "apache2handler"
        uid = self.system.uids.get(POOLS[vhost], pwd.getpwnam(SHARED).pw_uid)
        assert self.web.get(vhost, page, subject=subject) == f"{kind} {uid} accepted\n"

    def lines(self, vhost: str) -> list[str]:
        """What stands in the vhost's error log, of that vhost."""
        log = self.error_logs[vhost]
        return [line for line in log.read_text().splitlines() if f" domain {vhost}: " in line] if log.exists() else []

    def in_apaches_log(self, line: str) -> int:
        """How many lines of Apache's own error log are exactly that."""
        return self.web.error_log().splitlines().count(line)


@pytest.fixture
def site(sink: Sink) -> Iterator[Site]:
    made = Site(sink)
    with made.system, made.web, made.system.running():
        yield made


def notices(sink: Sink) -> list[Message]:
    return [message for message in sink.messages() if message.recipients == [NOTIFY]]


def warning(vhost: str, window: str) -> str:
    return rf"{STAMP} \[secure-sendmail\] domain {vhost}: exceeded limit for {window}: mail over the limit is held for review"


def test_apache_mail_of_every_kind_of_site_arrives(site: Site) -> None:
    """A request's mail arrives with its site's tag, and is logged under the uid that the kernel knows."""
    for vhost in POOLS:
        site.mail(vhost, f"mail of {vhost}")
    messages = site.sink.wait(4)
    tags = {subject(message.data): message.data.partition(b"\n")[0].decode() for message in messages}
    assert tags == {f"mail of {vhost}": f"X-Domain: {vhost}" for vhost in POOLS}
    assert {message.sender for message in messages} == {f"user@{vhost}" for vhost in POOLS}
    site.system.wait_until_idle()
    www_data = pwd.getpwnam(SHARED).pw_uid
    uids = {row["vhost"]: (row["event"], row["uid"], row["verified"], row["script"]) for row in site.system.rows()}
    assert uids == {
        SHARED_SITE: ("released", www_data, 0, "0:mail.php"),
        OWN_SITE: ("released", www_data, 1, "0:mail.php"),
        C1: ("released", site.system.uids["c1"], 1, "0:mail.php"),
        C2: ("released", site.system.uids["c2"], 1, "0:mail.php"),
    }


def test_apache_site_over_its_limit_is_held_and_told(site: Site) -> None:
    """The site's error log has the warning once, Apache's own at each mail from the next on, the administrator one mail."""
    over = (SHARED_SITE, OWN_SITE, C1)
    begun = int(time.time())
    for vhost in over:
        for number in range(LIMIT + 1):
            site.mail(vhost, f"{number} of {vhost}", "shop.php")
    site.system.wait(lambda: all(site.lines(vhost) for vhost in over), "the warnings are there")
    lines = {vhost: site.lines(vhost)[0] for vhost in over}
    for vhost, line in lines.items():
        told = re.fullmatch(warning(re.escape(vhost), rf"60 minutes \({LIMIT}\)"), line)
        assert told, line
        assert begun <= time.mktime(time.strptime(told[1])) <= time.time()
        # The mail that was the first over the limit was told nothing, nor was anyone else.
        assert site.in_apaches_log(line) == 0
    for vhost in over:
        site.mail(vhost, f"next of {vhost}")
        site.mail(vhost, f"last of {vhost}")
    site.mail(C2, "of a site that is within its limits")
    for vhost in (SHARED_SITE, OWN_SITE):
        assert site.in_apaches_log(lines[vhost]) == 2, site.web.error_log()
    assert C1 not in site.web.error_log() and C2 not in site.web.error_log()
    site.system.wait(lambda: len(site.system.held()) == 9, "what is over the limit is held")
    assert {vhost: len(site.system.held("--vhost", vhost)) for vhost in over} == dict.fromkeys(over, 3)
    # One mail for each incident, when the worst of it is known.
    site.system.wait(lambda: len(notices(site.sink)) == 3, "the administrator has a mail for each")
    for vhost in over:
        (notice,) = [message for message in notices(site.sink) if vhost.encode() in message.data]
        assert notice.sender == ""
        text = notice.data.partition(b"\n\n")[2].decode()
        assert f"{LIMIT}/1h" in text or f"60 minutes ({LIMIT})" in text
        assert re.search(r"(?<![\d/])3(?![\d/])", text), text
        assert "shop.php" in text and "mail.php" not in text
        assert re.search(rf"secure-sendmail .*hold list .*{re.escape(vhost)}", text)
    # More of the same is nothing new.
    for vhost in over:
        site.mail(vhost, f"once more of {vhost}")
    site.system.wait(lambda: len(site.system.held()) == 12, "what is over the limit is held")
    site.system.wait_until_idle()
    assert {vhost: site.lines(vhost) for vhost in over} == {vhost: [line] for vhost, line in lines.items()}
    assert (site.lines(C2), len(notices(site.sink))) == ([], 3)
    # The host's own error log has the warnings of all.
    warned = [line for line in site.system.error_log.read_text().splitlines() if "exceeded limit" in line]
    assert sorted(warned) == sorted(lines.values())
    sent = sorted(subject(message.data) for message in site.sink.messages() if message.recipients != [NOTIFY])
    within = [f"{number} of {vhost}" for vhost in over for number in range(LIMIT)]
    assert sent == sorted([*within, "of a site that is within its limits"])


def test_apache_incident_ends(sink: Sink) -> None:
    """When nothing was over a limit for the length of the window, that is told with the number held, and scripts hear no more."""
    site = Site(sink, "2/5s", notify="")
    with site.system, site.web, site.system.running():
        for number in range(3):
            site.mail(OWN_SITE, f"mail {number}")
        site.system.wait(lambda: site.lines(OWN_SITE), "the warning is there")
        site.mail(OWN_SITE, "mail 3")
        (line,) = site.lines(OWN_SITE)
        told = re.fullmatch(warning(re.escape(OWN_SITE), r"5 seconds \(2\)"), line)
        assert told, line
        assert site.in_apaches_log(line) == 1
        end = site.system.wait(lambda: site.lines(OWN_SITE)[1:], "the end of the incident is told")
        held = len(site.system.held())
        within = rf"{STAMP} \[secure-sendmail\] domain {re.escape(OWN_SITE)}: within its limits again "
        assert re.fullmatch(within + rf"\({held} messages held since {re.escape(told[1])}\)", end[0]), end
        assert held == 2
        site.mail(OWN_SITE, "mail 4")
        wait_until(lambda: len(sink.messages()) == 3, 10, "mail goes out again")
        assert site.in_apaches_log(line) == 1
        assert "within its limits" not in site.web.error_log()


def test_apache_error_log_of_a_customer_is_not_made(sink: Sink) -> None:
    """The daemon makes no file outside a directory of its own, and follows no link there; its own log says the warning."""
    with System(mta=smtp(sink.port), default=["0/1h"]) as system:
        home = system.directory / "home"
        home.mkdir(mode=0o755)
        (home / "c1").mkdir(mode=0o777)
        (home / "c1").chmod(0o777)
        secret = system.logs / "secret"
        logs = {C1: home / "c1/error.log", C2: home / "c1/link.log"}
        sections = "".join(f'[vhosts."{vhost}"]\nerror_log = "{path}"\n' for vhost, path in logs.items())
        system.configure(extra=f'[log]\nerror_log = "{system.error_log}"\n{sections}')
        system.register(C1, "c1")
        system.register(C2, "c2")
        system.python("import os, sys; os.symlink(*sys.argv[1:])", secret, logs[C2], user="c1")
        with system.running():
            system.send(C1, "-t", user="c1")
            system.send(C2, "-t", user="c2")

            def told() -> list[str]:
                lines = Path(system.error_log).read_text().splitlines() if system.error_log.exists() else []
                return [line for line in lines if "exceeded limit" in line]

            system.wait(lambda: len(told()) == 2, "both are told")
        assert not logs[C1].exists() and not secret.exists()
