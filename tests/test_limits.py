"""Sliding windows against brute force: no interval (t - W, t] holds more than N, and nothing else is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from releaser import limits
from releaser.limits import Account

PROPERTY = settings(max_examples=300, derandomize=False, print_blob=True, deadline=None)

EXAMPLE = ["3/10s", "5/30s"]


def account(texts: list[str], per_message: bool = False) -> Account:
    return Account(limits.parse(texts), per_message)


def send(to: Account, recipients: int, now: float, queue_id: str = "q") -> bool:
    """Send a message at NOW if the limits allow it."""
    if to.exceeded(recipients, now):
        return False
    to.reserve(queue_id, recipients)
    to.confirm(queue_id, now, recipients)
    return True


def reason(of: Account, recipients: int, now: float) -> str:
    excess = of.exceeded(recipients, now)
    return excess.reason if excess else ""


# The oracle: all that was ever sent, and all that is under way, looked through for each question.


class Oracle:
    def __init__(self, texts: list[str], per_message: bool) -> None:
        units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
        parts = [text.split("/") for text in texts]
        self.windows = [(int(count), int(span[:-1]) * units[span[-1]]) for count, span in parts]
        self.per_message = per_message
        self.sent: list[tuple[float, int]] = []
        self.open: dict[str, int] = {}

    def amount(self, recipients: int) -> int:
        return 1 if self.per_message else recipients

    def used(self, now: float, seconds: int) -> int:
        """What the interval (now - seconds, now] holds, with what is under way."""
        return sum(n for stamp, n in self.sent if now - seconds < stamp <= now) + sum(self.open.values())

    def over(self, recipients: int, now: float) -> list[int]:
        """The seconds of the windows that RECIPIENTS more would exceed."""
        return [w for n, w in self.windows if self.used(now, w) + self.amount(recipients) > n]

    def larger(self, recipients: int) -> bool:
        """Whether no waiting would help."""
        return any(self.amount(recipients) > n for n, _ in self.windows)

    def held(self) -> bool:
        """Whether no interval that ends with a message holds more than it may; no other can hold more."""
        return all(
            sum(n for stamp, n in self.sent if end - seconds < stamp <= end) <= most
            for most, seconds in self.windows
            for end, _ in self.sent
        )


TEXTS = st.lists(
    st.builds("{}/{}{}".format, st.integers(0, 12), st.integers(1, 20), st.sampled_from(["s", "s", "s", "m"])),
    min_size=1, max_size=4,
)  # fmt: skip
# Quarters of a second are exact, so that the ends of the intervals are.
STEPS = st.integers(0, 40).map(lambda quarters: quarters / 4)
MOVES = st.lists(
    st.tuples(STEPS, st.integers(1, 6), st.sampled_from(["send", "begin", "begin", "confirm", "cancel", "ask"])), max_size=60
)


@PROPERTY
@given(TEXTS, st.booleans(), MOVES)
def test_oracle(texts: list[str], per_message: bool, moves: list[tuple[float, int, str]]) -> None:
    """Allowed is exactly what brute force over all intervals allows, with messages sent, under way, and given back."""
    real, oracle = account(texts, per_message), Oracle(texts, per_message)
    recipients_of: dict[str, int] = {}
    now = 1_800_000_000.0
    for number, (step, recipients, move) in enumerate(moves):
        now += step
        queue_id = str(number)
        if move in ("send", "begin", "ask"):
            excess = real.exceeded(recipients, now)
            over = oracle.over(recipients, now)
            assert bool(excess) == bool(over)
            if excess:
                assert oracle.larger(recipients) or excess.limit.seconds == max(over)
                assert excess.used == oracle.used(now, excess.limit.seconds) and excess.asked == oracle.amount(recipients)
                assert excess.used + excess.asked > excess.limit.count
            elif move != "ask":
                real.reserve(queue_id, recipients)
                oracle.open[queue_id] = oracle.amount(recipients)
                recipients_of[queue_id] = recipients
        if move == "send" and queue_id in oracle.open:
            finish(real, oracle, queue_id, now, recipients)
        elif move == "confirm" and oracle.open:
            oldest = next(iter(oracle.open))
            finish(real, oracle, oldest, now, recipients_of[oldest])
        elif move == "cancel" and oracle.open:
            oldest = next(iter(oracle.open))
            real.cancel(oldest)
            del oracle.open[oldest]
        assert [used for _, used in real.used(now)] == [oracle.used(now, seconds) for _, seconds in oracle.windows]
    for queue_id in list(oracle.open):
        finish(real, oracle, queue_id, now, recipients_of[queue_id])
    assert oracle.held()


def finish(real: Account, oracle: Oracle, queue_id: str, now: float, recipients: int) -> None:
    real.confirm(queue_id, now, recipients)
    oracle.sent.append((now, oracle.open.pop(queue_id)))


SENT = st.lists(st.tuples(STEPS, st.integers(1, 6)), max_size=60)


@PROPERTY
@given(TEXTS, st.booleans(), SENT)
def test_rebuilt_account_is_the_same(texts: list[str], per_message: bool, steps: list[tuple[float, int]]) -> None:
    """An account made from what was sent answers as the one that lived through it, at that moment and later."""
    live = account(texts, per_message)
    now, entries = 0.0, []
    for step, recipients in steps:
        now += step
        if send(live, recipients, now):
            entries.append((now, recipients, ""))
    rebuilt = Account(limits.parse(texts), per_message, entries)
    for later in (0, 1, 5, 10, 100, 10_000):
        assert rebuilt.used(now + later) == live.used(now + later)
        assert rebuilt.exceeded(3, now + later) == live.exceeded(3, now + later)


@PROPERTY
@given(TEXTS, SENT)
def test_several_windows_are_each_of_them(texts: list[str], steps: list[tuple[float, int]]) -> None:
    """All windows together refuse what at least one of them alone would refuse after the same history, no more, no less."""
    together = account(texts)
    alone = [account([text]) for text in texts]
    now = 0.0
    for step, recipients in steps:
        now += step
        assert bool(together.exceeded(recipients, now)) == any(each.exceeded(recipients, now) for each in alone)
        if send(together, recipients, now):
            for each in alone:
                each.confirm("q", now, recipients)


def test_example() -> None:
    """Under 3/10s and 5/30s three go out, then none; after 10 s two more; then the long window holds until 30 s."""
    sent = account(EXAMPLE)
    assert [send(sent, 1, 0.0) for _ in range(5)] == [True, True, True, False, False]
    assert reason(sent, 1, 0.0) == "over limit 3/10s (3 used, 1 asked)"
    assert not send(sent, 1, 9.999)
    assert [send(sent, 1, 10.0) for _ in range(3)] == [True, True, False]
    assert reason(sent, 1, 10.0) == "over limit 5/30s (5 used, 1 asked)"
    assert not send(sent, 1, 29.999)
    assert [send(sent, 1, 30.0) for _ in range(4)] == [True, True, True, False]
    assert reason(sent, 1, 30.0) == "over limit 5/30s (5 used, 1 asked)"


def test_no_double_burst() -> None:
    """Around the end of a window there are no two full bursts, as with fixed windows."""
    sent = account(["10/60s"])
    assert sum(send(sent, 1, 59.0) for _ in range(20)) == 10
    assert sum(send(sent, 1, 60.0) for _ in range(20)) == 0
    assert sum(send(sent, 1, 118.75) for _ in range(20)) == 0
    assert sum(send(sent, 1, 119.0) for _ in range(20)) == 10


def test_first_message_of_a_window() -> None:
    """The first message counts with all its recipients, after an idle day too."""
    sent = account(["100/1h"])
    assert send(sent, 100, 0.0) and not send(sent, 1, 1.0)
    assert send(sent, 100, 86_400.0) and not send(sent, 1, 86_401.0)


def test_reservation_counts_as_now() -> None:
    """A message under way counts until its reply, however long that takes, and from its reply on as of then."""
    sent = account(["3/10s"])
    sent.reserve("a", 3)
    assert reason(sent, 1, 0.0) == reason(sent, 1, 1000.0) == "over limit 3/10s (3 used, 1 asked)"
    sent.confirm("a", 1000.0, 3)
    assert sent.exceeded(1, 1009.75) and not sent.exceeded(3, 1010.0)


def test_parallel_messages_do_not_overshoot() -> None:
    """Of twenty messages that start at once under a limit of ten, ten go out."""
    sent = account(["10/1h"])
    out = 0
    for number in range(20):
        if not sent.exceeded(1, 0.0):
            sent.reserve(str(number), 1)
            out += 1
    assert out == 10


def test_cancel_gives_back() -> None:
    """Where nothing was sent the reservation is given back, wholly and once."""
    sent = account(["3/10s"])
    sent.reserve("a", 2)
    sent.reserve("b", 1)
    assert sent.exceeded(1, 0.0)
    sent.cancel("a")
    sent.cancel("a")
    assert not sent.exceeded(2, 0.0) and sent.exceeded(3, 0.0)
    sent.cancel("never reserved")
    assert [used for _, used in sent.used(0.0)] == [1]


def test_held_mail_does_not_count() -> None:
    """Asking is not counting: what is refused a hundred times leaves the windows as they are."""
    sent = account(EXAMPLE)
    assert all(sent.exceeded(4, float(second)) for second in range(100))
    assert send(sent, 3, 100.0)


@pytest.mark.parametrize(("recipients", "texts", "expected"), [
    (4, ["3/10s"], "larger than limit 3/10s (4 asked)"),
    (6, ["3/10s", "5/30s"], "larger than limit 5/30s (6 asked)"),
    (4, ["3/10s", "5/30s"], "larger than limit 3/10s (4 asked)"),
    (500, ["100/1h", "1000/1d"], "larger than limit 100/1h (500 asked)"),
    (1, ["0/1h"], "larger than limit 0/1h (1 asked)"),
    (3, ["3/10s"], ""),
])  # fmt: skip
def test_larger_than_the_limit(recipients: int, texts: list[str], expected: str) -> None:
    """A message that no waiting will ever let through says so, and blocks nobody behind it."""
    sent = account(texts)
    assert reason(sent, recipients, 0.0) == expected
    assert texts == ["0/1h"] or send(sent, 1, 0.0)


def test_larger_than_one_limit_and_over_another() -> None:
    """That a message is larger than a limit is the reason that counts, beside a longer window that is merely full."""
    sent = account(["3/10s", "10/1h"])
    for second in range(0, 90, 10):
        assert send(sent, 1, float(second))
    assert reason(sent, 4, 100.0) == "larger than limit 3/10s (4 asked)"


def test_unlimited() -> None:
    """["unlimited"] allows everything, "0/1h" nothing."""
    assert not account(["unlimited"]).exceeded(10**9, 0.0)
    assert account(["0/1h"]).exceeded(1, 0.0) and account(["0/1h"], per_message=True).exceeded(1, 10.0**9)


def test_messages_or_recipients() -> None:
    """A message for ten counts ten, or one where messages are counted."""
    assert [send(account(["5/1h"]), 10, 0.0), send(account(["5/1h"], per_message=True), 10, 0.0)] == [False, True]
    sent = account(["2/1h"], per_message=True)
    assert [send(sent, 10, 0.0), send(sent, 1, 0.0), send(sent, 1, 0.0)] == [True, True, False]


GOOD = [
    (["50/5m"], [(50, 300)]),
    (["3/10s", "5/30s"], [(3, 10), (5, 30)]),
    (["0/1h"], [(0, 3600)]),
    (["500/1d"], [(500, 86400)]),
    (["100/90m", "1/1s"], [(100, 5400), (1, 1)]),
    (["unlimited"], []),
]


@pytest.mark.parametrize(("texts", "expected"), GOOD)
def test_good_limits(texts: list[str], expected: list[tuple[int, int]]) -> None:
    """A limit is a count, a slash, a number and s, m, h or d; it keeps the spelling of the configuration."""
    found = limits.parse(texts)
    assert [(limit.count, limit.seconds) for limit in found] == expected
    assert [limit.text for limit in found] == [text for text in texts if text != "unlimited"]


BAD = [
    [""], ["50"], ["50/"], ["/5m"], ["50/5"], ["50/m"], ["50/0m"], ["50/5x"], ["50/5M"], ["50/5m "], [" 50/5m"], ["50 / 5m"],
    ["-1/5m"],
    ["5.5/5m"], ["50/5.5m"], ["50/-5m"], ["50/5m\n"], ["５０/5m"], ["1e3/5m"], ["50/5min"], ["50/5m/1h"], ["50/5m,100/1h"],
    ["unlimited", "50/5m"], ["50/5m", "unlimited"], ["unlimited", "unlimited"], ["Unlimited"], ["none"], ["50/05m"], [],
]  # fmt: skip


@pytest.mark.parametrize("texts", BAD)
def test_bad_limits(texts: list[str]) -> None:
    """Anything else is an error that shows what was found and what is allowed."""
    with pytest.raises(ValueError) as error:
        limits.parse(texts)
    assert "unlimited" in str(error.value)
    assert not texts or any(repr(text) in str(error.value) for text in texts)


@pytest.mark.timeout(20)
def test_many_entries() -> None:
    """The time for an answer does not grow with what was sent: 100,000 messages in one window take no 10 s."""
    sent = account(["1000000/1d", "900000/1h"])
    assert all(send(sent, 1, number / 100) for number in range(100_000))
    assert [used for _, used in sent.used(1000.0)] == [100_000, 100_000]


@PROPERTY
@given(
    texts=st.sampled_from([["3/10s"], ["3/10s", "5/30s"], ["0/1h"], ["unlimited"]]),
    per_message=st.booleans(),
    sent=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 8)), max_size=12),
    under_way=st.integers(0, 2),
)
def test_time_when_one_fits_again(texts: list[str], per_message: bool, sent: list[tuple[int, int]], under_way: int) -> None:
    """At that time one recipient fits, a moment before it does not, and the limit that is named is in its way."""
    one, now = account(texts, per_message), 1000.0
    for recipients, pause in sent:
        now += pause
        send(one, recipients, now)
    reserved = under_way and not one.exceeded(under_way, now)
    if reserved:
        one.reserve("under way", under_way)
    when, limit = one.fits_at(now)
    excess = one.exceeded(1, now)
    assert (limit is None) == (excess is None) == (when == now)
    if limit is None or limit.count == 0:
        assert limit is None or when == float("inf")
        return
    if reserved:
        # What was under way has got its reply at once.
        one.confirm("under way", now, under_way)
    assert one.exceeded(1, when - 0.01) is not None
    assert one.exceeded(1, when) is None


VHOSTS = ("a", "b", "c", "made up", "made up too")


def one_of_them(vhost: str) -> str:
    """The share of a vhost: names that nobody knows are one."""
    return "" if vhost.startswith("made up") else vhost


@PROPERTY
@given(
    texts=TEXTS,
    moves=st.lists(st.tuples(STEPS, st.integers(1, 4), st.sampled_from(VHOSTS), st.booleans()), max_size=60),
)
def test_shares_of_one_limit(texts: list[str], moves: list[tuple[float, int, str, bool]]) -> None:
    """Refused is exactly who would exceed a window and, in it, the limit divided by those who have mail in it and himself;
    and those of N shares never have more than 1 + 1/2 + ... + 1/N times the limit."""
    parsed = limits.parse(texts)
    real = Account(parsed, False, whose="uid 33", share=one_of_them)
    sent: list[tuple[float, int, str]] = []
    under_way: dict[str, tuple[int, str]] = {}
    now = 0.0
    for number, (step, recipients, vhost, ends) in enumerate(moves):
        now += step
        mine, over = one_of_them(vhost), []
        for limit in parsed:
            used = [(amount, share) for stamp, amount, share in sent if now - limit.seconds < stamp]
            used += under_way.values()
            fair = limit.count // len({mine, *(share for _, share in used)})
            total, own = sum(amount for amount, _ in used), sum(amount for amount, share in used if share == mine)
            if total + recipients > limit.count and own + recipients > fair:
                over.append(limit)
        excess = real.exceeded(recipients, now, vhost)
        assert (excess.limit in over) if excess else not over
        if excess:
            assert "of uid 33" in excess.reason
            continue
        real.reserve(str(number), recipients, vhost)
        under_way[str(number)] = recipients, mine
        if ends:
            for queue_id, (amount, share) in under_way.items():
                real.confirm(queue_id, now, amount, share or "made up")
                sent.append((now, amount, share))
            under_way.clear()
        for limit in parsed:
            used = [(amount, share) for stamp, amount, share in sent if now - limit.seconds < stamp] + [*under_way.values()]
            names = len({share for _, share in used})
            assert sum(amount for amount, _ in used) <= limit.count * sum(1 / n for n in range(1, names + 1)) + 1e-9


def test_one_that_sends_all_it_can_does_not_stop_the_others() -> None:
    """It has used up the limit of all; each of the others still has its share, names that are made up one together."""
    shared = Account(limits.parse(["12/1h"]), False, whose="uid 33", share=one_of_them)

    def sends(vhost: str, messages: int) -> int:
        out = 0
        for number in range(messages):
            if not shared.exceeded(1, 0.0, vhost):
                shared.confirm(f"{vhost} {number}", 0.0, 1, vhost)
                out += 1
        return out

    assert [sends("a", 100), sends("b", 4), sends("b", 100), sends("a", 1)] == [12, 4, 2, 0]
    assert [sends(f"made up {number}", 1) for number in range(6)] == [1, 1, 1, 1, 0, 0]
    excess = shared.exceeded(1, 0.0, "b")
    assert excess and excess.reason == "over limit 12/1h (22 used, 1 asked) of uid 33, and above its share, 4"
