"""Two minutes of the soak of `make soak`: nothing is lost, sent twice without a word, or sent beyond a limit.

SOAK_SEED (`random` for a new one) and SOAK_MINUTES are read from the environment, and a failure says which to give.
"""

from __future__ import annotations

import copy
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from servers import Transaction
from soak import Evidence, Reckoning, Soak, token

# The same plan every time; `make soak` makes another one.
SEED = os.environ.get("SOAK_SEED", "20261123").replace("random", str(random.randrange(1 << 32)))
MINUTES = float(os.environ.get("SOAK_MINUTES") or 2)

pytestmark = [pytest.mark.server, pytest.mark.timeout(60 * MINUTES + 600)]


@pytest.fixture(scope="module")
def soak() -> Iterator[tuple[Soak, Evidence]]:
    print(f"\nSEED={SEED} MINUTES={MINUTES:g}", flush=True)
    made = Soak(SEED, MINUTES)
    yield made, made.run()


def test_soak(soak: tuple[Soak, Evidence]) -> None:
    """Whatever happens at random, every mail that was accepted is out, held, refused or put aside, and logged, once."""
    made, found = soak
    reckoning = Reckoning(found)
    print(dict(made.acts), dict(reckoning.counts))
    # Or there would be nothing to reckon up.
    assert all(reckoning.counts[each] for each in ("released", "held", "failed", "corrupt", "refused", "limits reached"))
    problems = made.problems + reckoning.problems
    assert not problems, f"SEED={SEED} MINUTES={MINUTES:g}: {len(problems)} problems\n" + "\n".join(problems[:20])


def delivered(found: Evidence) -> Transaction:
    """A mail that was sent once and at once."""
    sent = {each["token"] for each in found.told if each["act"] == "sent" and each["status"] == 0} - found.reviewed.keys()
    tries = Counter(each.sender for each in found.transactions)
    return next(t for t in found.transactions if t.replied and tries[t.sender] == 1 and token(t.sender) in sent)


def forget_delivery(found: Evidence) -> None:
    found.transactions.remove(delivered(found))


def deliver_again(found: Evidence) -> None:
    found.transactions.append(delivered(found))


def deliver_again_behind_a_kill(found: Evidence) -> None:
    first = delivered(found)
    found.transactions.append(replace(first, taken=first.taken + 2))
    found.ends.append(first.taken + 1)


def deliver_to_nobody(found: Evidence) -> None:
    delivered(found).sender = "nobody@sender.example"


def deliver_what_was_refused(found: Evidence) -> None:
    name = token(delivered(found).sender)
    next(each for each in found.told if each["token"] == name)["status"] = 69


def deliver_all_at_once(found: Evidence) -> None:
    for each in found.transactions:
        each.began = each.taken = 1.0


def change_a_text(found: Evidence) -> None:
    delivered(found).data += b"more\r\n"


def lose_a_held_mail(found: Evidence) -> None:
    found.files["hold"].popitem()


def lose_what_was_accepted(found: Evidence) -> None:
    found.told.append({**next(each for each in found.told if each["act"] == "sent"), "token": "lost", "status": 0})


def log_an_outcome_twice(found: Evidence) -> None:
    found.ledger.append(next(row for row in found.ledger if row["event"] == "released"))


def log_in_one_place_only(found: Evidence) -> None:
    found.mysql.pop()


def release_by_nobody(found: Evidence) -> None:
    assert found.reviewed
    found.reviewed.clear()


def refuse_more_than_came(found: Evidence) -> None:
    row = next(row for row in found.ledger if row["event"] == "released")
    found.ledger.append({**row, "event": "rejected", "queue_id": "", "reason": "100000 messages refused"})


def put_aside_too_much(found: Evidence) -> None:
    found.corrupt.append(b"")


LIES: dict[Callable[[Evidence], None], str] = {
    forget_delivery: "the MTA has never got it",
    deliver_again: "sent again without a reason",
    deliver_again_behind_a_kill: "not retried",
    deliver_to_nobody: "from nowhere",
    deliver_what_was_refused: "refused, and sent",
    deliver_all_at_once: " in 6/3s",
    change_a_text: "another text",
    lose_a_held_mail: "has None, by the log",
    lose_what_was_accepted: "lost: status 0, 0 messages",
    log_an_outcome_twice: "released behind released",
    log_in_one_place_only: "rows in the ledger",
    release_by_nobody: "nobody has released it",
    put_aside_too_much: "put aside",
    refuse_more_than_came: "that were refused",
}


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_soak_reckoning_sees(soak: tuple[Soak, Evidence], lie: Callable[[Evidence], None]) -> None:
    """What is not as it was is found."""
    changed = copy.deepcopy(soak[1])
    lie(changed)
    assert any(LIES[lie] in problem for problem in Reckoning(changed).problems)
