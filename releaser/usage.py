"""The accounts of the vhosts, built from the ledger, so that stopping the daemon never resets a limit."""

import time

from releaser.config import VhostSettings
from releaser.ledger import Ledger
from releaser.limits import Account


def account(book: Ledger, vhost: str, settings: VhostSettings) -> Account:
    """The account of VHOST: what its longest window still sees, and the reservations of what is under way."""
    entries = book.usage(vhost, time.time() - settings.longest) if settings.longest else []
    found = Account(settings.limits, settings.count == "messages", entries)
    for queue_id, recipients in book.reserved(vhost):
        found.reserve(queue_id, recipients)
    return found


def account_of_uid(book: Ledger, uid: int, settings: VhostSettings) -> Account:
    """The account of all that UID sends through the shared maildrop, whatever it claims to be."""
    entries = book.usage_of_uid(uid, time.time() - settings.longest) if settings.longest else []
    found = Account(settings.limits, settings.count == "messages", entries, f"uid {uid}")
    for queue_id, recipients in book.reserved_of_uid(uid):
        found.reserve(queue_id, recipients)
    return found
