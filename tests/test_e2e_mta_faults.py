"""What an MTA can do to the mail that it is handed: faults.md, The MTA.

After each fault every recipient has one final outcome in the log, has got the message once (or again with a row `retried`,
where nobody can know), and nothing is left in the spool that should not be.
"""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
from host import Host, smtp, subject, text
from servers import END, HANG_UP, HOST, YES, Postfix, Scripted, Sink

from releaser.mta import Job, Kind, SmtpSession

pytestmark = pytest.mark.server

A, B = "www.a.example", "www.b.example"

# What the MTA says once, and then what it should have said.
TROUBLES = {
    "hangs-up": HANG_UP,
    "says-421": b"421 4.3.2 shutting down\r\n" + END,
    "half-a-reply": b"250-half of it\r\n" + END,
    "half-a-line": b"25" + END,
    "long-line": b"250 " + b"x" * 100_000,
    "no-reply": b"what?",
    "odd-code": b"777 lucky",
}
REFUSALS = {"now": b"451 4.3.0 not now", "full": b"452 4.3.1 no room", "never": b"554 5.7.1 never"}
# To DATA: nothing has been taken, whatever this means.
YES_TO_DATA = {"yes": b"250 ok"}
PHASES = ("MAIL", "RCPT", "DATA", "dot")


@contextmanager
def site(server: Scripted | Sink | Postfix, *vhosts: str) -> Iterator[Host]:
    with Host(mta=smtp(server.port)) as host:
        host.add(*(vhosts or (A,)))
        yield host


def outcomes(host: Host) -> Counter[tuple[str, str]]:
    """How often each recipient, by name, has which final outcome."""
    return Counter((row["recipient"].partition("@")[0], row["event"]) for row in host.rows("released", "failed", "unknown"))


def in_phase(command: bytes) -> str:
    return "dot" if command == b"." else command[:4].decode().upper()


class OfTheSender:
    """Answers each transaction as its sender says: user@PHASE.TROUBLE.example meets this trouble there, the first time."""

    def __init__(self) -> None:
        self.met: set[str] = set()
        self.sender = ""

    def __call__(self, command: bytes) -> bytes | None:
        if command.startswith(b"MAIL FROM:"):
            self.sender = command.partition(b"@")[2].partition(b">")[0].decode()
        phase, _, trouble = self.sender.removesuffix(".example").partition(".")
        if phase != in_phase(command) or (self.sender in self.met and trouble != "never"):
            return YES
        self.met.add(self.sender)
        return {**TROUBLES, **REFUSALS, **YES_TO_DATA}.get(trouble)


@pytest.mark.parametrize("pipelining", [False, True], ids=["one-by-one", "pipelining"])
def test_mta_fails_at_each_command(pipelining: bool) -> None:
    """A refusal, a hang-up, 421 and half, long or odd replies at any command cost a message time, and no other its way."""
    every = [(phase, trouble) for phase in PHASES for trouble in (*TROUBLES, *REFUSALS)] + [("DATA", "yes")]
    # One vhost has one message with the MTA at a time, so that the server knows whose command it answers.
    with Scripted(OfTheSender(), pipelining=pipelining) as server, site(server) as host:
        for phase, trouble in every:
            message = text(*(f"{name}-{phase}-{trouble}@x.example" for name in ("one", "two")))
            host.send(A, "-t", f"-fuser@{phase}.{trouble}.example", message=message)
        host.send(A, message=text("good@x.example"))
        with host.running():
            host.wait(lambda: len(outcomes(host)) == 2 * len(every) + 1, "each recipient has its outcome", 60)
            wanted = {(f"{name}-{phase}-{trouble}", "failed" if trouble == "never" else "released"): 1
                      for phase, trouble in every for name in ("one", "two")}  # fmt: skip
            assert outcomes(host) == {**wanted, ("good", "released"): 1}
            host.wait_until_idle()
            assert [name.partition("/")[0] for name in host.ls()] == ["failed"] * len(PHASES)
            # The server has some of them twice, only where its final word was none, and the log says so.
            got = Counter({address.partition("@")[0]: times for address, times in server.copies.items()})
            assert set(got) == {name for name, event in outcomes(host) if event == "released"}
            unclear = {f"{name}-dot-{trouble}" for trouble in TROUBLES if trouble != "says-421" for name in ("one", "two")}
            assert {row["recipient"].partition("@")[0] for row in host.rows("retried")} == unclear
            assert {name for name, times in got.items() if times > 1} <= unclear and max(got.values()) == 2
            assert host.is_running()


def test_mta_that_offers_pipelining_no_more() -> None:
    """What a session is asked is what this one offers, not what the one before it did, which the server has ended."""
    greeted: list[bytes] = []

    def answer(command: bytes) -> bytes | None:
        if command.startswith(b"ehlo"):
            greeted.append(command)
            return YES if len(greeted) == 1 else b"502 5.5.1 no such command"
        # The first session takes one message, and ends at the second.
        return HANG_UP if len(greeted) == 1 and command.startswith(b"MAIL") and server.messages else YES

    with Scripted(answer, pipelining=True) as server:
        session = SmtpSession(HOST, server.port, lambda size: None)
        for recipient in ("one@x.example", "two@x.example"):
            (outcome,) = session.send(Job("id", "user@x.example", (recipient,), partial(io.BytesIO, b"text\n"), 5, True))
            assert outcome.kind is Kind.SENT
        session.close()
        assert sorted(server.copies) == ["one@x.example", "two@x.example"]
        assert server.count(b"helo") == 1


def test_mta_fails_at_banner_and_ehlo() -> None:
    """An MTA that greets with anything but a greeting is away: all mail waits where it is, and goes out when it is back."""
    long = b"220 " + b"x" * 100_000
    troubles = [HANG_UP, b"421 4.3.2 busy\r\n" + END, b"554 5.3.2 closed", b"220-half\r\n" + END, b"what?", long]
    greetings: list[bytes | None] = []
    replies: list[bytes | None] = []
    for trouble in troubles:
        # Every other connection is a good one, which ends behind its first message: what is short is the wait for it.
        greetings += [trouble, YES, YES]
        replies += [trouble if trouble != long else b"250-test\r\n250 SIZE 9\xb2", YES]
    answers = list(reversed(replies))

    def answer(command: bytes) -> bytes | None:
        if command.startswith(b"ehlo"):
            return answers.pop() if answers else YES
        return b"250 ok\r\n" + END if command == b"." else YES

    with Scripted(answer, lambda: greetings.pop(0) if greetings else YES) as server, site(server) as host, host.running():
        for number in range(16):
            host.send(A, message=text(f"r{number}@x.example"))
        host.wait(lambda: len(outcomes(host)) == 16, "all are out", 60)
        assert outcomes(host) == {(f"r{number}", "released"): 1 for number in range(16)}
        assert server.copies == {f"r{number}@x.example": 1 for number in range(16)}
        assert server.connections > 16 and host.rows("retried", "failed", "deferred") == []
        host.wait_until_idle()
        assert host.ls() == []


def test_mta_whose_banner_never_comes() -> None:
    """While the MTA says nothing, mail is accepted and waits, and status answers; nothing is lost when it wakes."""
    silent = [True]

    def greet() -> bytes | None:
        while silent[0]:
            time.sleep(0.05)
        return YES

    with Scripted(greet=greet) as server, site(server, A, B) as host, host.running():
        for number in range(3):
            host.send(A, message=text(f"a{number}@x.example"))
            host.send(B, message=text(f"b{number}@x.example"))
        host.wait(lambda: server.connections, "it has been called")
        time.sleep(2)
        assert len(host.ls()) == host.json("status")["queued"] == 6 and host.rows() == []
        silent[0] = False
        host.wait(lambda: len(outcomes(host)) == 6, "all are out")
        assert set(server.copies.values()) == {1} and set(outcomes(host).values()) == {1}
        host.wait_until_idle()
        assert host.ls() == []


def test_mta_answers_each_recipient_in_its_own_way() -> None:
    """Of one message some recipients are taken, some for now not, some never: each has its own outcome, each once."""
    greylisted = {b"later0", b"later1"}

    def answer(command: bytes) -> bytes | None:
        name = command.partition(b"<")[2].partition(b"@")[0]
        if not command.startswith(b"RCPT") or name.startswith(b"good"):
            return YES
        if name.startswith(b"never"):
            return b"550 5.1.1 no such user"
        if name in greylisted:
            greylisted.discard(name)
            return b"451 4.7.1 greylisted"
        return YES

    with Scripted(answer) as server, site(server, A, B) as host, host.running():
        names = ["good0", "never0", "later0", "good1", "later1", "never1"]
        host.send(A, message=text(*(f"{name}@x.example" for name in names), subject="mixed"))
        host.wait_for_row("deferred")
        assert outcomes(host) == {(name, event): 1 for name, event in (
            ("good0", "released"), ("good1", "released"), ("never0", "failed"), ("never1", "failed"),
        )}  # fmt: skip
        # Nobody waits for the greylisted ones, the same vhost neither.
        for vhost in (A, B):
            host.send(vhost, message=text(f"next@{vhost}"))
        host.wait(lambda: outcomes(host)["next", "released"] == 2, "mail behind it is out", 5)
        host.wait(lambda: len(outcomes(host)) == 7, "the greylisted ones follow", 30)
        host.wait_until_idle()
        assert {name: server.copies[f"{name}@x.example"] for name in names} == {
            "good0": 1, "good1": 1, "later0": 1, "later1": 1, "never0": 0, "never1": 0,
        }  # fmt: skip
        assert len({message.data for message in server.messages if subject(message.data.replace(b"\r\n", b"\n")) == "mixed"}) == 1
        (failed,) = host.ls()
        recipients = [line for line in (host.spool / failed).read_text().split("\n") if line.startswith("Failed: ")]
        assert [line.split()[1] for line in recipients] == ["never0@x.example", "never1@x.example"]


def test_mta_stalls_behind_the_final_dot() -> None:
    """Its answer is waited for, and other vhosts' mail goes on meanwhile; nothing is sent twice."""

    stalls = [True]

    def answer(command: bytes) -> bytes | None:
        if command == b"." and stalls:
            stalls.clear()
            time.sleep(4)
        return YES

    with Scripted(answer) as server, site(server, A, B) as host, host.running():
        host.send(A, message=text("slow@x.example"))
        host.wait(lambda: server.count(b"DATA"), "it is with the MTA")
        host.send(B, message=text("quick@x.example"))
        host.wait(lambda: outcomes(host), "another vhost's mail is out", 3.5)
        assert outcomes(host) == {("quick", "released"): 1}
        host.wait(lambda: len(outcomes(host)) == 2, "the answer has come")
        host.wait_until_idle()
        assert server.copies == {"slow@x.example": 1, "quick@x.example": 1} and host.ls() == []


def test_mta_takes_so_many_messages_of_a_connection() -> None:
    """421 instead of the fourth message of a connection: another connection is made, and nothing is deferred for it."""
    taken = [0]

    def answer(command: bytes) -> bytes | None:
        if command.startswith(b"ehlo"):
            taken[0] = 0
        if command.startswith(b"MAIL"):
            taken[0] += 1
            if taken[0] > 3:
                return b"421 4.7.0 too many messages in this connection\r\n" + END
        return YES

    with Scripted(answer) as server, site(server) as host:
        for number in range(10):
            host.send(A, message=text(f"r{number}@x.example"))
        with host.running():
            host.wait(lambda: len(outcomes(host)) == 10, "all are out", 20)
            assert outcomes(host) == {(f"r{number}", "released"): 1 for number in range(10)}
            assert set(server.copies.values()) == {1} and server.connections < 10
            assert host.rows("deferred", "retried") == [] and host.ls() == []
            assert "next_try" not in host.log()


def rejecting(relay: Sink) -> Postfix:
    """A Postfix that knows nobody at bad.example, and ends a session after 20 errors, as every Postfix does."""
    return Postfix(
        relay.port,
        parameters={
            "smtpd_recipient_restrictions": "check_recipient_access inline:{ bad.example=REJECT }, permit_mynetworks, reject",
            "smtpd_hard_error_limit": "20",
            "smtpd_error_sleep_time": "0",
        },
    )


def test_mta_ends_a_session_after_many_errors(sink: Sink) -> None:
    """30 bad recipients of one vhost, for which Postfix hangs up, spoil no other's mail, nor the good one beside them."""
    with rejecting(sink) as postfix, site(postfix, A, B) as host, host.running():
        bad = [f"b{number}@bad.example" for number in range(30)]
        host.send(A, message=text(*bad, "last@x.example", subject="mixed"))
        for number in range(5):
            host.send(B, message=text(f"g{number}@x.example", subject="good"))
        host.wait(lambda: len([name for name, _ in outcomes(host) if name[0] == "g"]) == 5, "the other's mail is out", 5)
        host.wait(lambda: len(outcomes(host)) == 36, "each recipient has its outcome", 40)
        wanted: dict[tuple[str, str], int] = {(f"b{number}", "failed"): 1 for number in range(30)}
        wanted |= {(f"g{number}", "released"): 1 for number in range(5)} | {("last", "released"): 1}
        assert outcomes(host) == wanted
        host.wait_until_idle()
        delivered = sink.wait(6)
        assert Counter(each for message in delivered for each in message.recipients) == dict.fromkeys(
            [*(f"g{number}@x.example" for number in range(5)), "last@x.example"], 1
        )
        (failed,) = host.ls()
        assert failed.startswith("failed/")
