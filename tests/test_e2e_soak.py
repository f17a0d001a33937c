"""Two minutes of the soak of `make soak`: nothing is lost, sent twice without a word, or sent beyond a limit."""

from __future__ import annotations

import os
import random

import pytest
from soak import Reckoning, Soak

pytestmark = pytest.mark.server

# The same plan every time; `make soak` makes another one.
SEED = os.environ.get("SOAK_SEED", "20261123").replace("random", str(random.randrange(1 << 32)))
MINUTES = float(os.environ.get("SOAK_MINUTES") or 2)


@pytest.mark.timeout(60 * MINUTES + 600)
def test_soak() -> None:
    """Whatever happens at random, every mail that was accepted is out, held, refused or put aside, and logged, once."""
    print(f"SEED={SEED} MINUTES={MINUTES:g}", flush=True)
    soak = Soak(SEED, MINUTES)
    reckoning = Reckoning(soak.run())
    print(dict(soak.acts), dict(reckoning.counts))
    problems = soak.problems + reckoning.problems
    assert not problems, f"SEED={SEED}: {len(problems)} problems\n" + "\n".join(problems[:20])
