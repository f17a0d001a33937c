"""What the log keeps of a mail's subject and recipients: as they are, or a keyed hash that an exact address still finds."""

import hashlib
import hmac
import re
from dataclasses import dataclass

FORGOTTEN = "(forgotten)"
# Hexadecimal digits of a hash.
DIGITS = 32
# What looks like an address to people; its local part may be quoted, or have an apostrophe in it.
_ADDRESS = re.compile(r"""(?:"(?:\\.|[^"\\])*"|[^\s<>()"',;@][^\s<>()",;@]*)@[^\s<>"',;@]*[\w\]]""")


@dataclass(frozen=True)
class Privacy:
    """How rows are written. The key is this ledger's own; the domain of a recipient is kept as it is."""

    key: bytes = b""
    subject: bool = True
    recipients: bool = True

    def hashed(self, address: str) -> str:
        """What stands for ADDRESS, in whatever case it is written."""
        name, at, domain = address.lower().rpartition("@")
        digest = hmac.new(self.key, address.lower().encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()
        return f"hash:{digest[:DIGITS]}{at}{domain if at else ''}" if name else f"hash:{digest[:DIGITS]}"

    def row(self, recipient: str, reason: str, subject: str) -> tuple[str, str, str]:
        """RECIPIENT, REASON and SUBJECT as the log is to have them."""
        if not self.recipients and recipient:
            # The MTA repeats it, and whoever else it knows by then, in its words.
            reason = _ADDRESS.sub(lambda found: self.hashed(found[0]), reason)
            recipient = self.hashed(recipient)
        return recipient, reason, subject if self.subject else ""
