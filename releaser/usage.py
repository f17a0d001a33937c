"""The accounts of vhosts and uids, built from the ledger, so that stopping the daemon never resets a limit."""

from collections.abc import Callable

from releaser import layout
from releaser.config import Config, VhostSettings
from releaser.ledger import Ledger
from releaser.limits import Account


def account(book: Ledger, vhost: str, settings: VhostSettings) -> Account:
    """The account of VHOST: what its longest window still sees, and the reservations of what is under way."""
    return _account(book, "vhost", vhost, settings, "", None, lambda maildrop: True)


def account_of_uid(book: Ledger, uid: int, config: Config) -> Account:
    """The account of UID, shared by its vhosts; all names that the configuration does not know are one.

    Without a limit for shared uids it is only for what comes through the shared maildrop, whatever that claims to be.
    """
    settings = config.of_uids

    def is_seen(maildrop: str) -> bool:
        return config.shared_uid is not None or maildrop == layout.UNREGISTERED

    def share(vhost: str) -> str:
        return vhost if config.has_section(vhost) else ""

    return _account(book, "uid", uid, settings, f"uid {uid}", share, is_seen)


def _account(
    book: Ledger,
    column: str,
    value: str | int,
    settings: VhostSettings,
    whose: str,
    share: Callable[[str], str] | None,
    is_seen: Callable[[str], bool],
) -> Account:
    usage = book.usage(column, value, book.clock.now() - settings.longest) if settings.longest else []
    entries = [(stamp, recipients, vhost) for stamp, recipients, vhost, maildrop in usage if is_seen(maildrop)]
    found = Account(settings.limits, settings.count == "messages", entries, whose, share)
    for queue_id, recipients, vhost, maildrop in book.reserved(column, value):
        if is_seen(maildrop):
            found.reserve(queue_id, recipients, vhost)
    return found
