"""The fuzz target of `make fuzz`, shortly, and that it finds what it looks for."""

from __future__ import annotations

import fuzz
import pytest

from enqueue import message as writer
from releaser import message, mta

# Printed with a failure as part of its name.
SEED = 20260501


def test_fuzz_target_holds() -> None:
    """The seeds, and a few thousand inputs made of them."""
    for data in [*fuzz.SEEDS, *fuzz.mutations(SEED, 3000)]:
        try:
            fuzz.one_input(data)
        except BaseException as error:
            raise AssertionError(f"input {data!r}") from error


@pytest.mark.parametrize(
    ("module", "name", "broken"),
    [
        (writer, "ALWAYS_DROPPED", frozenset()),
        (message, "ALWAYS_DROPPED", frozenset()),
        (message, "canonical", iter),
        (mta, "FINAL_DOT", b"\r\n.\r\n"),
    ],
)
def test_fuzz_target_sees(monkeypatch: pytest.MonkeyPatch, module: object, name: str, broken: object) -> None:
    """A mistake in the code under it is found."""
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(AssertionError):
        for data in fuzz.SEEDS:
            fuzz.one_input(data)
