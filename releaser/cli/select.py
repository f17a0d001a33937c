"""One filter vocabulary for every verb, as options and as an SQL condition."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import click

from releaser import config, layout
from releaser.ledger import utc
from releaser.logbook import Source, like

# The last one of the year 9999.
LAST_SECOND = 253_402_300_799


@dataclass(frozen=True)
class Filters:
    """What the caller selects; all that is given must hold."""

    ids: tuple[str, ...]
    vhost: str | None
    sender: str | None
    recipient: str | None
    script: str | None
    reason: str | None
    since: float | None
    until: float | None
    everything: bool

    @property
    def given(self) -> bool:
        """Whether a filter besides ids and --all is given."""
        texts = (self.vhost, self.sender, self.recipient, self.script, self.reason)
        return any(text is not None for text in (*texts, self.since, self.until))

    def log_condition(self, source: Source, hashed: Callable[[str], str], event: str | None = None) -> tuple[str, list[object]]:
        """The SQL condition on rows of the log, for SOURCE, and its values; HASHED gives what may stand for a recipient."""
        parts, values = ["1 = 1"], list[object]()
        if self.ids:
            parts.append(f"queue_id IN ({', '.join('?' * len(self.ids))})")
            values += self.ids
        for column, text, inside in (
            ("vhost", self.vhost, False),
            ("sender", self.sender, False),
            ("recipient", self.recipient, False),
            ("script", self.script, True),
            ("reason", self.reason, True),
            ("event", event, False),
        ):
            if text is None:
                continue
            # Names of vhosts and events are in lower case as they are.
            name = column if column in ("vhost", "event") else source.lower(column)
            if inside or "*" in text or "?" in text:
                parts.append(f"{name} LIKE ? ESCAPE '!'")
                values.append(like(text, inside))
            elif column == "recipient":
                parts.append(f"{name} IN (?, ?)")
                values += [text.lower(), hashed(text)]
            else:
                parts.append(f"{name} = ?")
                values.append(text.lower())
        for operator, stamp in ((">=", self.since), ("<=", self.until)):
            if stamp is not None:
                parts.append(f"logged_at {operator} ?")
                values.append(source.time(stamp))
        return " AND ".join(parts), values

    def condition(self, time_column: str, recipient: str, reason: str = "reason") -> tuple[str, list[object]]:
        """The SQL condition and its values. RECIPIENT is an SQL condition on one recipient, with a place for its pattern."""
        parts, values = ["1"], []
        if self.ids:
            parts.append(f"queue_id IN ({', '.join('?' * len(self.ids))})")
            values += list(self.ids)
        for column, text, inside in (
            ("vhost", self.vhost, False),
            ("sender", self.sender, False),
            ("script", self.script, True),
            (reason, self.reason, True),
        ):
            if text is not None:
                parts.append(f"lower({column}) GLOB ?")
                values.append(_glob(f"*{text}*" if inside else text))
        if self.recipient is not None:
            parts.append(recipient)
            values.append(_glob(self.recipient))
        for operator, stamp in ((">=", self.since), ("<=", self.until)):
            if stamp is not None:
                parts.append(f"{time_column} {operator} ?")
                values.append(utc(stamp))
        return " AND ".join(parts), list(values)


def filters(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Give VERB the filter options, and their values as its argument `chosen`."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        names = ("ids", "vhost", "sender", "recipient", "script", "reason", "since", "until", "everything")
        chosen = Filters(**{name: kwargs.pop(name) for name in names})
        return verb(*args, chosen=chosen, **kwargs)

    wrapped.__name__, wrapped.__doc__ = verb.__name__, verb.__doc__
    wrapped.__click_params__ = getattr(verb, "__click_params__", [])  # type: ignore[attr-defined]
    for option in reversed(
        (
            click.argument("ids", nargs=-1, callback=_ids, metavar="[ID]..."),
            click.option("--vhost", metavar="NAME", help="Of this vhost; * and ? match anything."),
            click.option("--sender", metavar="ADDRESS", help="With this envelope sender; * and ?."),
            click.option("--recipient", metavar="ADDRESS", help="With this recipient among others; * and ?."),
            click.option("--script", metavar="TEXT", help="With TEXT in the script's name."),
            click.option("--reason", metavar="TEXT", help="With TEXT in the reason."),
            click.option(
                "--since",
                metavar="TIME",
                callback=time_,
                help="From then on: 2026-05-01, 2026-05-01T14:00, or 2h ago as 2h.",
            ),
            click.option("--until", metavar="TIME", callback=time_, help="Until then."),
            click.option("--all", "everything", is_flag=True, help="All of them."),
        )
    ):
        wrapped = option(wrapped)
    return wrapped


def _glob(text: str) -> str:
    return text.lower().replace("[", "[[]")


def _ids(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if not layout.is_queue_id(value):
            raise click.BadParameter(f"{value[:40]!r} is not a queue id such as 06437E2A4F1B2C0A1")
    return values


def time_(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    """Seconds since 1970 of an option's VALUE: a time, or a span that ends now."""
    if value is None:
        return None
    try:
        return time.time() - config.duration(value)
    except ValueError:
        pass
    try:
        # Times compare as text, which holds for years of four digits.
        return min(max(datetime.fromisoformat(value).timestamp(), 0), LAST_SECOND)
    except (ValueError, OverflowError):
        raise click.BadParameter(f"{value!r} is neither a time such as 2026-05-01T14:00 nor a span such as 2h") from None
