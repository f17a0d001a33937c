"""The accounts of the vhosts, built from the ledger, so that stopping the daemon never resets a limit."""

import time

from releaser.config import VhostSettings
from releaser.ledger import Ledger
from releaser.limits import Account


def account(book: Ledger, vhost: str, settings: VhostSettings) -> Account:
    """The account of VHOST: what its longest window still sees, and the reservations of what is under way."""
    longest = max((limit.seconds for limit in settings.limits), default=0)
    entries = book.usage(vhost, time.time() - longest) if longest else []
    found = Account(settings.limits, settings.count == "messages", entries)
    for queue_id, recipients in book.reserved(vhost):
        found.reserve(queue_id, recipients)
    return found
