"""Incidents: a vhost over its limits, told once. The warning, its end, and one notice by mail to the administrator."""

import os
import time
from collections.abc import Callable
from email.utils import formatdate

from releaser import errorlog, layout, maillog, mailqueue
from releaser.batch import Batch
from releaser.config import Config, VhostSettings
from releaser.envelope import Envelope
from releaser.ledger import ACTIVE, Incident, Ledger, Row, utc
from releaser.limits import Limit
from releaser.maillog import LOG

# Seconds from the first mail over a limit to the notice, so that its numbers mean something.
NOTICE_DELAY = 10
# Notices in an hour; the last of them waits a little, and is a summary of all that are due by then.
NOTICES, NOTICES_SECONDS, SUMMARY_DELAY = 20, 3600, 30
# Incidents that a summary describes, and those that it names.
DESCRIBED, NAMED = 20, 200
# Bytes of warnings in one policy, the latest; the shared maildrop can have many, and enqueue reads no more than 64 KiB.
WARNINGS_SIZE = 32 << 10
# The reason of a notice's own message.
NOTICE = "notice of an incident"
# What becomes of mail over a limit; its place here is an incident's `observed`.
OVER_LIMIT = ("hold", "observe", "reject")


class Incidents:
    """Those that are open, and what is still to be said about them."""

    def __init__(self, config: Config, book: Ledger, settings: Callable[[str], VhostSettings]) -> None:
        """SETTINGS says what holds for a vhost."""
        self.config = config
        self._ledger = book
        self._clock = book.clock
        self._settings = settings
        # Error logs that could not be written, said already.
        self._failed: set[str] = set()
        self.load()

    def load(self) -> None:
        """Take them from the ledger."""
        found = self._ledger.incidents()
        self._open = {incident.vhost: incident for incident in found if incident.ended_at is None}
        self._unnoticed = [incident for incident in found if incident.notified_at is None]
        # When step() has something to do, by the clock of the ledger.
        self.next = 0.0

    def over(self, batch: Batch, vhost: str, limit: Limit, over_limit: str, messages: int = 1) -> bool:
        """So many more MESSAGES of VHOST are over LIMIT; return whether that opens an incident."""
        now = self._clock.now()
        incident = self._open.get(vhost)
        if incident is not None and incident.observed != OVER_LIMIT.index(over_limit):
            # Something else becomes of the mail from now on.
            self._end(batch, vhost, now)
            incident = None
        opened = incident is None
        if incident is None:
            warning = errorlog.exceeded(time.time(), vhost, limit, over_limit)
            incident = Incident(vhost, now, now, OVER_LIMIT.index(over_limit), limit.text, warning, messages)
            self._open[vhost] = incident
            self._unnoticed.append(incident)
            self._tell(vhost, warning)
        else:
            incident.last_at = now
            incident.held += messages
        self.next = 0.0
        batch.put_incident(incident)
        return opened

    def warnings(self, vhosts: list[str]) -> list[tuple[str, str]]:
        """(vhost, warning) of the open incidents of VHOSTS, as far as they have room in a policy."""
        found, room = [], WARNINGS_SIZE
        for name in reversed([name for name in vhosts if name in self._open]):
            room -= len(name) + len(self._open[name].warning) + 20
            if room < 0:
                break
            found.append((name, self._open[name].warning))
        return found

    @property
    def vhosts(self) -> list[str]:
        """The vhosts that have an open incident."""
        return list(self._open)

    def step(self, batch: Batch) -> tuple[list[str], list[str]]:
        """End what is over, send what is due; return the vhosts whose incident has ended, and the notices' queue ids."""
        now = self._clock.now()
        if now < self.next:
            return [], []
        ended = [name for name, incident in self._open.items() if incident.last_at + self._quiet(name) <= now]
        for name in ended:
            self._end(batch, name, now)
        notices = self._notices(batch, now)
        due = [incident.last_at + self._quiet(name) for name, incident in self._open.items()]
        for incident in self._unnoticed:
            soon = incident.opened_at + NOTICE_DELAY
            # Behind that time it waits for the hour's allowance.
            due.append(soon if soon > now else now + layout.SCAN_INTERVAL)
        self.next = min(due, default=now + layout.SCAN_INTERVAL)
        return ended, notices

    def close(self, vhosts: list[str], batch: Batch) -> None:
        """End the incidents of VHOSTS, which have gone."""
        for vhost in vhosts:
            self._end(batch, vhost, self._clock.now())

    def _end(self, batch: Batch, vhost: str, now: float) -> None:
        incident = self._open.pop(vhost)
        incident.ended_at = now
        opened, ended = self._clock.wall(incident.opened_at), self._clock.wall(now)
        self._tell(vhost, errorlog.ended(ended, vhost, incident.held, OVER_LIMIT[incident.observed], opened))
        batch.put_incident(incident)

    def _quiet(self, vhost: str) -> int:
        """The seconds without mail over a limit after which the vhost's incident has ended."""
        return self._settings(vhost).longest

    def _tell(self, vhost: str, line: str) -> None:
        LOG.warning(line)
        own = self.config.vhost(vhost).error_log
        for path in dict.fromkeys(filter(None, (self.config.error_log, own))):
            try:
                errorlog.append(path, line, (self.config.spool, self.config.state))
                self._failed.discard(path)
            except OSError as error:
                if path not in self._failed:
                    self._failed.add(path)
                    LOG.error(maillog.error_log_not_written(str(error)))

    def _notices(self, batch: Batch, now: float) -> list[str]:
        due = [incident for incident in self._unnoticed if incident.opened_at + NOTICE_DELAY <= now]
        if not due:
            return []
        notify, sent = self.config.notify, []
        if notify is None:
            self._mark(batch, due, now)
            return []
        left = NOTICES - self._ledger.notices(now - NOTICES_SECONDS)
        while due and left > 0:
            if left == 1 and due[0].opened_at + SUMMARY_DELAY > now:
                break
            together, due = (due[:1], due[1:]) if left > 1 else (due, [])
            # Each notice has a time of its own, by which they are counted.
            now += 1e-6
            try:
                sent.append(self._send(batch, notify, together, now))
            except OSError as error:
                # Mail goes on; the notice is tried again.
                LOG.error(maillog.notice_not_sent(error.strerror or str(error)))
                break
            self._mark(batch, together, now)
            left -= 1
        return sent

    def _mark(self, batch: Batch, incidents: list[Incident], now: float) -> None:
        for incident in incidents:
            incident.notified_at = now
            self._unnoticed.remove(incident)
            batch.put_incident(incident)

    def _send(self, batch: Batch, notify: str, incidents: list[Incident], now: float) -> str:
        """Put a notice into active/, from where it goes to the MTA, outside all limits."""
        queue_id, host, arrived = layout.new_queue_id(), os.uname().nodename.lower(), time.time()
        vhost = host if layout.is_vhost(host) else "localhost"
        message_id = f"<{queue_id}@{vhost}>"
        subject, text = self._text(incidents)
        header = (
            f"Date: {formatdate(arrived)}\nFrom: secure-sendmail <{notify}>\nTo: {notify}\nSubject: {subject}\n"
            f"Message-ID: {message_id}\nAuto-Submitted: auto-generated\nMIME-Version: 1.0\n"
            "Content-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: 8bit\n\n"
        )
        row = Row(
            queue_id=queue_id, vhost=vhost, state=ACTIVE, source=None, digest="", recipients=1, remaining=[notify], sender="",
            size=0, arrived_at=utc(arrived), picked_up_at=utc(arrived), uid=os.geteuid(), verified=1, message_id=message_id,
            subject=subject, script="", cwd="", reason=NOTICE, refused=[], limited=0, next_try=now,
        )  # fmt: skip
        head = Envelope(vhost=vhost, recipients=(notify,), sender="", arrived=row.arrived_at, message_id=message_id,
                        queue_id=queue_id, owner=str(row.uid), picked_up=row.picked_up_at, reason=row.reason)  # fmt: skip
        row.size, _ = mailqueue.store(self.config.spool, "active", queue_id, head.format(), [(header + text).encode()])
        batch.put(row)
        return queue_id

    def _text(self, incidents: list[Incident]) -> tuple[str, str]:
        """Subject and text of a notice."""
        words = ("held for review", "sent all the same", "refused")
        becomes = [words[incident.observed] for incident in incidents]
        host = os.uname().nodename
        subject = f"{host}: {len(incidents)} vhosts over their limits"
        if len(incidents) == 1:
            subject = f"{host}: {incidents[0].vhost} is over its limit, mail is {becomes[0]}"
        parts = []
        for incident, what in zip(incidents[:DESCRIBED], becomes, strict=False):
            top = self._ledger.top_script(incident.vhost, self._clock.wall(incident.opened_at) - NOTICES_SECONDS)
            script = f"{_ascii(top[0])} ({top[1]} messages in an hour; what they say of themselves)" if top else "not known"
            review = f"limits show {incident.vhost}" if incident.observed else f"hold list --vhost {incident.vhost}"
            if incident.vhost == layout.UNREGISTERED:
                review = "hold list --reason 'of uid'"
            parts.append(
                f"{incident.warning}\n\n"
                f"Host:       {host}\n"
                f"Limit:      {incident.limit_text}\n"
                f"Over it:    {incident.held} message{'' if incident.held == 1 else 's'} until now, {what}\n"
                f"Top script: {script}\n"
                f"Review:     secure-sendmail {review}\n"
                f'Stop all:   secure-sendmail stop {incident.vhost} --why "..."\n'
            )
        if len(incidents) > DESCRIBED:
            others = ", ".join(incident.vhost for incident in incidents[DESCRIBED:NAMED])
            parts.append(f"And {len(incidents) - DESCRIBED} others: {others}{' ...' if len(incidents) > NAMED else ''}\n")
        return subject, "\n\n".join(parts) + "\nThis is the only notice of each until it has ended.\n"


def _ascii(text: str) -> str:
    """TEXT as it may stand in a mail to an administrator: a customer wrote it."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)[:200]
