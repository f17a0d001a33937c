"""The soak: random senders, hostile acts, kills, faults of the MTA, of MySQL and of the disks; then a reckoning of every mail.

What is counted is what the customers have been told, what the MTA has seen with its own clock, the log of the ledger, that of
MariaDB, and the files in the spool; the five must agree. The acts come of a seed; what meets what does not.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import signal
import stat
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from host import smtp
from mariadb import PASSWORD, MariaDB
from servers import HANG_UP, YES, Recorder, Transaction, free_port
from system import DAEMON, PYTHON, System
from test_e2e_flood import of_process
from test_e2e_mysql_outage import rows_of
from test_e2e_room import fill, small

from releaser import limits


@dataclass(frozen=True)
class Vhost:
    """What is counted, and what happens to mail over which limits; the user who has the vhost, if it has a maildrop."""

    limits: tuple[str, ...]
    over_limit: str = "hold"
    count: str = "recipients"
    user: str = ""


# Of seconds, so that each is reached again and again.
DEFAULT = ("6/3s", "20/15s")
VHOSTS = {
    "www.hold.example": Vhost(("6/3s", "15/10s"), user="c1"),
    "www.reject.example": Vhost(("5/4s",), "reject", user="c1"),
    "www.messages.example": Vhost(("4/3s",), count="messages", user="c2"),
    "www.observe.example": Vhost(("3/3s",), "observe", user="c2"),
    # In the shared maildrop.
    "www.shop.example": Vhost(DEFAULT),
    "www.forum.example": Vhost(DEFAULT),
}
SHARED = "_unregistered"
CUSTOMERS = {
    "c1": ["www.hold.example", "www.reject.example"],
    "c2": ["www.messages.example", "www.observe.example"],
    "12345": ["www.shop.example", "www.forum.example"],
    "12346": ["www.shop.example"],
}

# Seconds: between two acts, on average; that a fault lasts, at most; in which all is done when there are no faults any more.
PAUSE, LASTS, QUIET = 1.2, 6.0, 300.0
# An MTA that stalls, in seconds, and how likely it misbehaves at each command while it is in the mood.
STALL, MOODY = 2.5, 0.06
# So long behind the end of a full disk the releaser may still say that it could not start.
FULL = 30.0
# The part of a core that an idle releaser may use.
IDLE = 0.3


class Moody:
    """What the MTA answers: 550 for ever to "bad", 451 once to "grey", and what comes to its mind while it is in the mood."""

    def __init__(self, pick: random.Random) -> None:
        self.pick, self.bad, self.greylisted = pick, False, set[str]()

    def turn(self, bad: bool) -> None:
        self.bad = bad

    def __call__(self, verb: bytes, address: str) -> bytes | None:
        if verb == b"RCPT" and "@bad." in address:
            return b"550 5.1.1 no such user"
        if verb == b"RCPT" and "@grey." in address and address not in self.greylisted:
            self.greylisted.add(address)
            return b"451 4.7.1 come back later"
        if verb == b".":
            # So that there is always something in flight.
            time.sleep(self.pick.choice((0, 0, 0.02, 0.4)))
        if not self.bad or self.pick.random() > MOODY:
            return YES
        answers = [HANG_UP, b"451 4.3.0 not now", b"421 4.3.2 going down", b"554 5.6.0 I do not like it", YES]
        answer = self.pick.choice(answers)
        if answer is YES:
            time.sleep(self.pick.uniform(0, STALL))
        return answer


class SmallDisks(System):
    """Spool and state are file systems that can be filled."""

    def __init__(self, size: str, mta: str) -> None:
        self.size, self._mounts = size, ExitStack()
        super().__init__(mta)

    def _make_namespace(self) -> int:
        for directory in (self.spool, self.state):
            self._mounts.enter_context(small(directory, self.size, inodes=0))
        os.chown(self.state, self.uids[DAEMON], self.uids[DAEMON])
        self.state.chmod(0o700)
        return super()._make_namespace()

    def close(self) -> None:
        # In the namespaces they are mounted until those end.
        self._mounts.close()
        super().close()


@dataclass
class Evidence:
    """What there is to reckon with. A token, which is in every address, is the name of a message."""

    # What the customers have said.
    told: list[dict[str, Any]]
    transactions: list[Transaction]
    # The log of the ledger, and that of MariaDB.
    ledger: list[dict[str, Any]]
    mysql: list[dict[str, Any]]
    # The recipients in each copy, by queue and queue id; the bytes in corrupt/; the names in new/.
    files: dict[str, dict[str, set[str]]]
    corrupt: list[bytes]
    left: set[str]
    # When the releaser has ended without having finished, and when the release of a message was decided.
    ends: list[float]
    reviewed: dict[str, list[float]]


class Soak:
    """One run. The n-th act is the same for the same seed, and so is what each customer sends; times are the machine's."""

    def __init__(self, seed: str, minutes: float) -> None:
        self.seed, self.minutes = seed, minutes
        self.acts: Counter[str] = Counter()
        self.ends: list[float] = []
        self.reviewed: defaultdict[str, list[float]] = defaultdict(list)
        self.problems: list[str] = []
        # What is under a fault, and how that is ended; and what is to be done later.
        self.faults: dict[str, Callable[[], object]] = {}
        self.due: list[tuple[float, Callable[[], object]]] = []
        # Whether somebody has sent a signal to the releaser, and until when it may end because a disk is full.
        self.asked, self.full_until = False, 0.0

    def run(self) -> Evidence:
        with ExitStack() as stack:
            self.server = stack.enter_context(MariaDB())
            self.mood = Moody(random.Random(f"{self.seed}/mta"))
            self.mta = stack.enter_context(Recorder(self.mood, free_port()))
            self.system = stack.enter_context(SmallDisks(f"{32 + int(16 * self.minutes)}m", smtp(self.mta.port)))
            self.pool = stack.enter_context(ThreadPoolExecutor(2))
            self.install()
            self.system.launch()
            customers = [stack.enter_context(self.customer(name)) for name in CUSTOMERS]
            self.work()
            self.come_to_rest(customers)
            return self.evidence()

    def install(self) -> None:
        system, ours = self.system, {name: vhost for name, vhost in VHOSTS.items() if vhost.user}
        password = system.config.parent / "mysql.password"
        password.write_text(PASSWORD + "\n")
        password.chmod(0o600)
        os.chown(password, system.uids[DAEMON], system.uids[DAEMON])
        self.tables = f'[mysql]\nhost = "127.0.0.1"\nport = {self.server.port}\npassword_file = "{password}"\n'
        for name, vhost in ours.items():
            keys = {"limits": vhost.limits, "over_limit": vhost.over_limit, "count": vhost.count}
            lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
            self.tables += f'[vhosts."{name}"]\n{lines}'
        self.configure("0", 10_000)
        for name, vhost in ours.items():
            system.register(name, vhost.user)
        system.cli("vhost", "add", "--unregistered")
        system.cli("log", "init", "--user", "creator", "--password-file", str(password))

    def configure(self, min_free: str, most: int) -> None:
        extra = f'min_free = "{min_free}"\nhold_max_messages = {most}\n{self.tables}'
        self.system.configure(default=DEFAULT, extra=extra)

    @contextmanager
    def customer(self, user: str) -> Iterator[subprocess.Popen[bytes]]:
        system = self.system
        facts = {
            "name": f"u{user}",
            "seed": self.seed,
            "enqueue": [str(system.programs / "secure-sendmail-enqueue"), "--spool", str(system.spool)],
            "spool": str(system.spool),
            "maildrops": {name: name if VHOSTS[name].user else SHARED for name in CUSTOMERS[user]},
            "registered": "www.messages.example" if user == "c1" else "www.hold.example",
        }
        code = (Path(__file__).parent / "soak_customer.py").read_text()
        command = system.words([PYTHON, "-c", code, json.dumps(facts)], user)
        with (system.directory / f"told.{user}").open("ab") as said:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said)
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    # The acts.

    def plan(self) -> Iterator[tuple[int, str, str, Callable[[], object], Callable[[], object]]]:
        """How often something happens; what is under that fault, so that it has one at a time; its name, begin and end."""
        system, mta, server, mood, none = self.system, self.mta, self.server, self.mood, lambda: None
        for weight, *numbers in ((14, signal.SIGKILL), (5, signal.SIGTERM), (3, signal.SIGTERM, signal.SIGTERM)):
            yield weight, "", " and ".join(number.name for number in numbers), partial(self.signal, numbers), none
        yield 6, "mta", "MTA stopped", mta.close, mta.start
        yield 10, "mood", "MTA in a bad mood", partial(mood.turn, True), partial(mood.turn, False)
        for disk in (system.spool, system.state):
            yield 5, disk.name, f"{disk.name} full", partial(self.fill, disk), (disk / "ballast").unlink
        yield 3, "mysql", "MySQL stopped", server.stop, self.start_mysql
        yield 3, "mysql", "MySQL killed", self.kill_mysql, self.start_mysql
        yield 2, "mysql", "MySQL frozen", partial(server.signal, signal.SIGSTOP), partial(server.signal, signal.SIGCONT)
        read_only = "SET GLOBAL read_only = "
        yield 2, "mysql", "MySQL read-only", partial(server.root, f"{read_only}1"), partial(server.root, f"{read_only}0")
        for vhost in VHOSTS:
            yield 1, "vhost", "vhost stopped", partial(self.command, "stop", vhost, "--why", "soak"), partial(self.resume, vhost)
        for settings in (("0", 10_000), ("1M", 10_000), ("0", 50)):
            yield 2, "", "reload", partial(self.configure, *settings), none
        for weight, *verb in ((15, "release"), (6, "release", "--failed"), (7, "delete"), (7, "undelete", "--deleted")):
            yield weight, "", " ".join(verb), partial(self.review, *verb), none

    def work(self) -> None:
        """All that happens at random."""
        plan = list(self.plan())
        end, next_act, number = time.monotonic() + 60 * self.minutes, 0.0, 0
        while time.monotonic() < end:
            if time.monotonic() >= next_act:
                self.pick = random.Random(f"{self.seed}/{number}")
                ((_, fault, name, begin, finish),) = self.pick.choices(plan, [act[0] for act in plan])
                lasts, pause = self.pick.uniform(0.3, LASTS), self.pick.expovariate(1 / PAUSE)
                if fault not in self.faults:
                    self.acts[name] += 1
                    begin()
                    if fault:
                        self.faults[fault] = finish
                        self.later(lasts, partial(self.mend, fault))
                number, next_act = number + 1, time.monotonic() + pause
            self.go_on()

    def go_on(self) -> None:
        """What was put off, and what the service manager does."""
        now = time.monotonic()
        due, self.due = [what for at, what in self.due if at <= now], [(at, what) for at, what in self.due if at > now]
        for what in due:
            what()
        if self.system.started and not self.system.alive():
            status = self.system.ended()
            expected = {0, -signal.SIGKILL, -signal.SIGTERM, os.EX_SOFTWARE} if self.asked else set[int]()
            if status not in expected | ({os.EX_IOERR} if now < self.full_until else set()):
                self.problems.append(f"the releaser has ended with {status}: {self.system.log()[-3000:]}")
            if status:
                self.ends.append(time.time())
            self.asked = False
            self.later(random.Random(f"{self.seed}/end{len(self.ends)}").uniform(0, 1), self.system.launch)
        time.sleep(0.05)

    def later(self, seconds: float, what: Callable[[], object]) -> None:
        self.due.append((time.monotonic() + seconds, what))

    def mend(self, fault: str) -> None:
        self.faults.pop(fault)()

    def signal(self, numbers: Sequence[signal.Signals]) -> None:
        for number in numbers:
            try:
                os.kill(self.system.pid, number)
                self.asked = True
            except (ProcessLookupError, ValueError, IndexError):
                # It has ended, or has not been started again yet.
                return
            time.sleep(self.pick.uniform(0, 0.1))

    def fill(self, disk: Path) -> None:
        self.full_until = time.monotonic() + LASTS + FULL
        fill(disk / "ballast")

    def kill_mysql(self) -> None:
        self.server.signal(signal.SIGKILL)
        self.server.stop()

    def start_mysql(self) -> None:
        try:
            self.server.start()
        except TimeoutError:
            # The machine has much to do.
            self.later(1, self.start_mysql)

    def resume(self, vhost: str) -> None:
        run = self.command("resume", vhost)
        if run.returncode and "is not stopped" not in run.stderr:
            # Where the disk is full, nothing can be decided; so it may have been with the stop.
            self.later(1, partial(self.resume, vhost))

    def review(self, verb: str, *flags: str) -> None:
        job = self.pool.submit(self.decide, self.pick, verb, *flags)
        job.add_done_callback(lambda job: self.problems.append(f"{job.exception()!r}") if job.exception() else None)

    def decide(self, pick: random.Random, verb: str, *flags: str) -> None:
        """What a person does with some of what there is."""
        listed = self.command("hold", "list", "--json", *flags)
        rows = json.loads(listed.stdout) if listed.returncode == 0 else []
        chosen = pick.sample(rows, min(len(rows), pick.randrange(1, 15)))
        for row in chosen if verb == "release" else ():
            self.reviewed[token(row["sender"])].append(time.time())
        if chosen:
            self.command("hold", verb, *(row["queue_id"] for row in chosen), "--why", "soak", "--yes")

    def command(self, *words: str) -> subprocess.CompletedProcess[Any]:
        run = self.system.cli(*words, check=False)
        if "Traceback" in run.stderr:
            self.problems.append(f"{words}: {run.stderr}")
        return run

    # The end.

    def come_to_rest(self, customers: list[subprocess.Popen[bytes]]) -> None:
        """Takes all faults away; everything is decided within a bounded time, and the releaser is up and idle."""
        for customer in customers:
            assert customer.stdin is not None
            customer.stdin.close()
        while self.faults:
            self.faults.popitem()[1]()
        self.due = [(at, what) for at, what in self.due if getattr(what, "func", None) != self.mend]
        self.configure("0", 1_000_000)
        assert [customer.wait(60) for customer in customers] == [0] * len(customers)
        self.pool.shutdown()
        end = time.monotonic() + QUIET
        while not self.quiet():
            if time.monotonic() > end:
                self.problems.append(f"not at rest within {QUIET} s: {self.system.report()}")
                return
            self.go_on()
        used = of_process(self.system.pid)[0]
        time.sleep(2)
        used = (of_process(self.system.pid)[0] - used) / 2
        if used > IDLE:
            self.problems.append(f"at rest it uses {used} of a core")
        found = json.loads(self.command("check", "--json").stdout)
        # Its own MTA is one that customers can reach.
        usual = re.compile(rf'over_limit is "observe"|.* port {self.mta.port} of 127\.0\.0\.1 answers him|.* has no quotas')
        warnings = [each for each in found["warnings"] if not usual.match(each)]
        if found["problems"] or warnings:
            self.problems.append(f"check: {found}")
        # Of an enqueue that was killed there is a file in tmp/, for a day and a half.
        leftover = [path for path in self.system.spool.glob("vhosts/*/tmp/*") if not path.name.startswith("refused.")]
        if len(leftover) > sum(1 for each in self.told() if each.get("status", 0) < 0):
            self.problems.append(f"left in tmp/: {leftover}")
        # watchdog 2.2.1 can end a thread of its own so when it is stopped amid a flood of bells; the next watch is a new one.
        tracebacks = re.findall(r"Traceback.*\n(?: .*\n)+.*", self.system.log())
        self.problems += [f"in the log: {each}" for each in tracebacks if "/watchdog/observers/" not in each]

    def quiet(self) -> bool:
        """Nothing is on its way any more, and MariaDB has it all."""
        if self.due or not self.system.alive() or any((self.system.spool / "active").iterdir()):
            return False
        stay = {each["token"] for each in self.told() if each["act"] == "stays"}
        if names(self.system) - stay:
            return False
        status = self.command("status", "--json")
        found = json.loads(status.stdout) if status.returncode == 0 else {}
        return bool(found) and found["running"] and not found["outbox"] and not found["stopped"]

    def told(self) -> list[dict[str, Any]]:
        lines = [line for user in CUSTOMERS for line in (self.system.directory / f"told.{user}").read_text().splitlines()]
        return [json.loads(line) for line in lines]

    def evidence(self) -> Evidence:
        spool = self.system.spool
        copies = {name: {path.name: recipients(path) for path in (spool / name).iterdir()} for name in set(PLACES.values())}
        corrupt = [path.read_bytes() if stat.S_ISREG(path.lstat().st_mode) else b"" for path in (spool / "corrupt").iterdir()]
        ledger, mysql = self.system.json("log", "--source", "ledger"), rows_of(self.server)
        return Evidence(
            self.told(), self.mta.transactions, ledger, mysql, copies, corrupt, names(self.system), self.ends, dict(self.reviewed)
        )


def names(system: System) -> set[str]:
    """What lies in the maildrops, by name."""
    return {path.name for path in system.spool.glob("vhosts/*/new/*") if not path.name.startswith(".")}


def recipients(path: Path) -> set[str]:
    head = path.read_bytes().partition(b"\n\n")[0].decode()
    return {line.removeprefix("Recipient: ") for line in head.split("\n") if line.startswith("Recipient: ")}


def token(address: str) -> str:
    return address.partition("@")[0]


# The reckoning.

# What may follow an event of a recipient of a message; "" is before the first.
ON_ITS_WAY = {"deferred", "retried", "released", "failed", "held"}
NEXT = {
    "": {*ON_ITS_WAY, "unknown"},
    "deferred": ON_ITS_WAY,
    "retried": ON_ITS_WAY,
    "held": {*ON_ITS_WAY - {"held"}, "deleted"},
    "failed": {*ON_ITS_WAY - {"held"}, "deleted"},
    "deleted": {"undeleted"},
    "undeleted": {*ON_ITS_WAY - {"held"}, "deleted"},
    "released": set[str](),
    "unknown": set[str](),
}
PLACES = {"held": "hold", "undeleted": "hold", "failed": "failed", "deleted": "trash"}
OF_MAIL = {"sent", "rewritten", "forged"}


class Reckoning:
    """Compares all that there is; `problems` has a line for whatever does not add up, `counts` what there was."""

    def __init__(self, found: Evidence) -> None:
        self.found = found
        self.problems: list[str] = []
        self.counts: Counter[str] = Counter()
        self.told = {each["token"]: each for each in found.told if each["act"] in OF_MAIL}
        # The events of each recipient, by token and queue id, in order.
        self.events: defaultdict[str, defaultdict[str, defaultdict[str, list[str]]]]
        self.events = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        self.stopped = set[str]()
        for row in found.ledger:
            if row["queue_id"] and row["event"] != "corrupt":
                self.events[token(row["sender"])][row["queue_id"]][row["recipient"]].append(row["event"])
                if row["reason"].startswith("stopped by"):
                    self.stopped.add(row["queue_id"])
        self.transactions: defaultdict[str, list[Transaction]] = defaultdict(list)
        for transaction in found.transactions:
            self.transactions[token(transaction.sender)].append(transaction)
        self.mail()
        self.copies()
        self.deliveries()
        self.limits()
        self.junk()
        if found.ledger != found.mysql:
            differ = [pair for pair in zip(found.ledger, found.mysql, strict=False) if pair[0] != pair[1]][:3]
            self.say("MySQL", f"{len(found.ledger)} rows in the ledger, {len(found.mysql)} there; {differ}")

    def say(self, name: str, words: str) -> None:
        seen = [(each.began, each.taken, each.recipients, each.replied) for each in self.transactions.get(name, [])]
        self.problems.append(f"{name}: {words}; told {self.told.get(name)}; log {self.events.get(name)}; MTA {seen}")

    def mail(self) -> None:
        """Each mail that was accepted has one outcome for each recipient, each that was refused none, and there is no other."""
        corrupt = b"\n".join(self.found.corrupt)
        for name in (self.events.keys() | self.transactions.keys()) - self.told.keys():
            self.say(name, "from nowhere")
        for name, told in self.told.items():
            there, status = len(self.events[name]), told["status"]
            aside = f"Sender: {name}@".encode() in corrupt
            # Who is killed behind the commit has not told his caller; the rest of a rewritten one can be another message.
            least, most = (0, 1) if status == -signal.SIGKILL else (1, 1) if status == 0 else (0, 0)
            most += told["act"] == "rewritten"
            self.counts["accepted" if least else "killed" if most else "refused"] += 1
            if not least <= there + aside <= most:
                self.say(name, f"status {status}, {there} messages")
            if not most and self.transactions[name]:
                self.say(name, "refused, and sent")
            for queue_id, of_recipients in self.events[name].items():
                if of_recipients.keys() != set(told["recipients"]):
                    self.say(name, f"{queue_id}: other recipients")
                for recipient, events in of_recipients.items():
                    self.course(name, recipient, events)
            self.counts["aside"] += aside

    def course(self, name: str, recipient: str, events: list[str]) -> None:
        """What the log says of a recipient is a course that a message can take, to its end."""
        for before, event in zip(["", *events], events, strict=False):
            if event not in NEXT[before]:
                self.say(name, f"{recipient}: {event} behind {before or 'nothing'}")
            if before in PLACES and event in ON_ITS_WAY and name not in self.found.reviewed:
                self.say(name, f"{recipient}: {event} behind {before}, and nobody has released it")
        if events.count("failed") > 1 + len(self.found.reviewed.get(name, [])):
            self.say(name, f"{recipient}: refused too often")
        if events[-1] in ("deferred", "retried") or (events[-1] == "unknown" and self.told[name]["act"] != "rewritten"):
            self.say(name, f"{recipient}: no outcome")
        self.counts[events[-1]] += 1

    def copies(self) -> None:
        """What is held, deleted or refused lies where the log says, once, for those recipients, and nothing else does."""
        there = {(queue, queue_id): found for queue, copies in self.found.files.items() for queue_id, found in copies.items()}
        logged, names = {}, {}
        for name, messages in self.events.items():
            for queue_id, of_recipients in messages.items():
                names[queue_id] = name
                found = {recipient: PLACES[events[-1]] for recipient, events in of_recipients.items() if events[-1] in PLACES}
                # While others of its recipients wait for a person, those that were refused wait with them.
                for queue in [queue for queue in ("hold", "trash", "failed") if queue in found.values()][:1]:
                    logged[queue, queue_id] = {recipient for recipient in found if found[recipient] == queue}
        for place in there.keys() | logged.keys():
            if there.get(place) != logged.get(place):
                self.say(names.get(place[1], ""), f"{place} has {there.get(place)}, by the log {logged.get(place)}")

    def deliveries(self) -> None:
        """What was released is what the MTA has, as it was sent; whatever it has twice is `retried`, and for a reason."""
        for name, told in self.told.items():
            got: defaultdict[tuple[str, str], list[Transaction]] = defaultdict(list)
            for each in self.transactions[name]:
                if each.taken:
                    text = hashlib.sha256(each.data.partition(b"\r\n\r\n")[2].replace(b"\r\n", b"\n")).hexdigest()
                    if text != told["text"] and told["act"] != "rewritten":
                        self.say(name, "another text")
                    if told["act"] == "forged" and name not in self.found.reviewed:
                        self.say(name, "another's vhost claimed, and sent")
                    if told["act"] != "forged" and not each.data.startswith(f"X-Domain: {told['vhost']}\r\n".encode()):
                        self.say(name, f"tagged {each.data[:80]!r}")
                    for recipient in each.recipients:
                        got[recipient, text].append(each)
            log = {(r, event) for of in self.events[name].values() for r, events in of.items() for event in events}
            have = {recipient for recipient, _ in got}
            for recipient in {r for r, event in log if event == "released"} - have:
                self.say(name, f"{recipient}: released, and the MTA has never got it")
            for recipient in have - {r for r, event in log if event == "released"}:
                # The reply was lost; then it was refused, which is `retried`, or stopped before it was tried again, or what
                # was sent had gone from the maildrop: its sender had rewritten it.
                rewritten = told["act"] == "rewritten" and (recipient, "unknown") in log
                if (recipient, "retried") not in log and not rewritten and not self.stopped & self.events[name].keys():
                    self.say(name, f"{recipient}: the MTA has it, and it was never released")
            for (recipient, _), copies in got.items():
                self.counts["copies too many"] += len(copies) - 1
                if len(copies) > 1 and (recipient, "retried") not in log:
                    self.say(name, f"{recipient}: {len(copies)} copies, not retried")
                for first, second in itertools.pairwise(copies):
                    if first.replied and not any(first.taken <= end <= second.taken for end in self.found.ends):
                        self.say(name, f"{recipient}: sent again without a reason")

    def limits(self) -> None:
        """In no interval (t - W, t] of the MTA's clock more than N, for each vhost, and each uid in the shared maildrop.

        There is no slack. What counts is a message's first transaction that the MTA has answered: it lies between the
        decision, from which on the message counts as now, and the stamp behind the reply. So whatever is still in the
        interval when the last of it is decided has counted then. A message that the MTA has put off is not counted again when
        it comes once more, nor one that a person has released, nor a second copy; and one with recipients that were refused
        counts whole.
        """
        sent: defaultdict[str, list[tuple[float, int, str]]] = defaultdict(list)
        for name, told in self.told.items():
            reviewed = min(self.found.reviewed.get(name, []), default=float("inf"))
            first = next(iter(self.transactions[name]), None)
            if first is not None and (at := first.taken if first.replied else first.began) < reviewed:
                for account in (told["vhost"], *([f"uid {told['uid']}"] if not VHOSTS[told["vhost"]].user else [])):
                    per_message = VHOSTS[told["vhost"]].count == "messages"
                    sent[account].append((at, 1 if per_message else len(told["recipients"]), name))
        for account, entries in sent.items():
            vhost = VHOSTS.get(account, Vhost(DEFAULT))
            for limit in limits.parse(list(vhost.limits)) if vhost.over_limit != "observe" else ():
                for used, window in windows(sorted(entries), limit.seconds):
                    self.counts["limits reached"] += used == limit.count
                    if used > limit.count:
                        self.say(account, f"{used} in {limit.text}: {window}")

    def junk(self) -> None:
        """What was no message has been put aside, once, what cannot be judged lies where it lay, and no refusal is made up."""
        junk, stay = (sum(1 for each in self.found.told if each["act"] == act) for act in ("junk", "stays"))
        rows = sum(1 for row in self.found.ledger if row["event"] == "corrupt")
        self.counts.update(corrupt=rows)
        if not junk + self.counts["aside"] == rows == len(self.found.corrupt):
            words = f"{junk} made, {self.counts['aside']} more put aside, {rows} logged, {len(self.found.corrupt)} there"
            self.say("corrupt", words)
        # Who is killed at the door may have been counted there.
        refused = sum(1 for told in self.told.values() if told["status"] == os.EX_UNAVAILABLE or told["status"] < 0)
        counted = sum(int(row["reason"].split()[0]) for row in self.found.ledger if row["event"] == "rejected")
        if counted > refused:
            self.say("rejected", f"{counted}, of {refused} that were refused")
        if len(self.found.left) != stay:
            self.say("new", f"{stay} that stay, {self.found.left}")


def windows(entries: list[tuple[float, int, str]], seconds: int) -> Iterator[tuple[int, list[tuple[float, int, str]]]]:
    """What was used in the interval of so many SECONDS up to each of ENTRIES, which are when, how much and what; and these."""
    first = 0
    for last, entry in enumerate(entries, 1):
        while entries[first][0] <= entry[0] - seconds:
            first += 1
        yield sum(amount for _, amount, _ in entries[first:last]), entries[first:last]
