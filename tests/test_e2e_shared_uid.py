"""Many vhosts of one uid, as with mod_php: a limit for all of them together, and shares for each, on the real commands."""

from __future__ import annotations

from collections import Counter

from host import text
from system import SHARED, System

ONE, TWO, THREE, OWN = "www.one.example", "www.two.example", "www.three.example", "www.own.example"


def burst(system: System, vhost: str, messages: int, recipients: int = 1, user: str = SHARED) -> None:
    to = [f"r{number}@x.example" for number in range(recipients)]
    for number in range(messages):
        system.send(vhost, "-t", message=text(*to, subject=f"{vhost} {number}"), user=user)


def settled(system: System) -> tuple[Counter[str], Counter[str]]:
    """Recipients that were released and held so far, by vhost, when nothing is on its way."""
    system.wait_until_idle()
    return (
        Counter(row["vhost"] for row in system.rows("released")),
        Counter(row["vhost"] for row in system.rows("held")),
    )


def test_shared_uid_is_shared_fairly() -> None:
    """One vhost of the uid uses up all; the others still have their shares, made-up names one of all, a restart changes
    nothing; and a vhost with a uid of its own has nothing to do with it."""
    with System(extra='shared_uid = ["12/1h"]\n') as system:
        for vhost in (ONE, TWO, THREE):
            system.register(vhost, SHARED)
        system.register(OWN, "c1")
        system.cli("vhost", "add", "--unregistered")
        with system.running():
            burst(system, ONE, 15)
            burst(system, OWN, 15, user="c1")
            assert settled(system) == ({ONE: 12, OWN: 15}, {ONE: 3})
            burst(system, TWO, 4)
            burst(system, TWO, 1, recipients=3)
            burst(system, TWO, 1, recipients=2)
            burst(system, TWO, 1)
            # Half of it, since two have sent; the one with too many recipients stops no smaller one behind it.
            assert settled(system) == ({ONE: 12, OWN: 15, TWO: 6}, {ONE: 3, TWO: 4})
            (reason,) = {row["reason"] for row in system.rows("held") if row["vhost"] == ONE}
            assert reason == f"over limit 12/1h (12 used, 1 asked) of uid {33 if SHARED == 'www-data' else SHARED}"
            shown = system.json("limits", "show", TWO)["shared"]
            assert [(of["user"], of["vhosts"], of["windows"][0]["used"]) for of in shown] == [(SHARED, 3, 18)]
            assert system.json("limits", "show", OWN)["shared"] == []
            assert f"{SHARED}, a user of 3 vhosts" in system.cli("limits", "show", TWO).stdout
        with system.running():
            # A third, and all names that nobody knows are the fourth share.
            burst(system, THREE, 5)
            for number in range(5):
                burst(system, f"www.n{number}.example", 1)
            burst(system, ONE, 1)
            released, held = settled(system)
        assert {name: count for name, count in released.items() if not name.startswith("www.n")} == {
            ONE: 12,
            OWN: 15,
            TWO: 6,
            THREE: 4,
        }
        assert sum(count for name, count in released.items() if name.startswith("www.n")) == 3
        assert (held[ONE], held[THREE]) == (4, 1)
        assert any("above its share, 3" in row["reason"] for row in system.rows("held"))


def test_shared_uid_comes_with_a_reload() -> None:
    """What was sent before the limit was configured counts, and without it nothing is shared."""
    with System() as system:
        for vhost in (ONE, TWO):
            system.register(vhost, SHARED)
        with system.running():
            burst(system, ONE, 5)
            assert settled(system) == ({ONE: 5}, {})
            system.configure(extra='shared_uid = ["4/1h"]\n')
            system.wait_for_log("loaded")
            burst(system, ONE, 1)
            burst(system, TWO, 3)
            assert settled(system) == ({ONE: 5, TWO: 2}, {ONE: 1, TWO: 1})
