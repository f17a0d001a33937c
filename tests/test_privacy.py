"""What of a recipient is left in a row of the log where it keeps hashes."""

import time

import pytest

from releaser.privacy import Privacy

PRIVACY = Privacy(b"key", recipients=False)


@pytest.mark.parametrize(
    "address",
    ["bob@x.example", "o'brien@x.example", '"john.doe"@x.example', '"a b"@x.example', '"a@b"@x.example', r'"a\"b"@x.example',
     "Ürsel@x.example", "a+b.c*d@x.example", "a@[IPv6:::1]"],
)  # fmt: skip
def test_recipient_in_the_words_of_the_mta(address: str) -> None:
    """It is what it is in its own column, in any case; and so is any other address there."""
    said = f'550 5.1.1 <{address}>: no such user ({address.upper()}), {address}: ask <"John Doe"@y.example>, <o\'neil@y.example>'
    recipient, reason, _ = PRIVACY.row(address, said, "")
    others = PRIVACY.hashed('"John Doe"@y.example'), PRIVACY.hashed("o'neil@y.example")
    assert recipient == PRIVACY.hashed(address)
    assert reason == f"550 5.1.1 <{recipient}>: no such user ({recipient}), {recipient}: ask <{others[0]}>, <{others[1]}>"


def test_long_words_take_no_time() -> None:
    """As much as the log has of a reply, of nothing that ends an address."""
    begun = time.process_time()
    for said in ("a" * 500, '"' * 500, '"a' * 250, "\\" * 500, "@" * 500, '"\\' * 250):
        assert PRIVACY.row("bob@x.example", said, "")[1] == said
    assert time.process_time() - begun < 0.5
