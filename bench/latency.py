"""From the rename that submits a mail to the MTA's reply to its final dot, as the log has it: idle, and at half of the most."""

from __future__ import annotations

import time
from datetime import datetime

from host import Host, smtp
from measure import Bench, percentile, table
from release import MESSAGE, OURS, VHOSTS, Counter
from spool import Template, add_vhosts

IDLE, IDLE_IN_FULL, PAUSE = 100, 500, 0.05
# Seconds under load, and what is taken for the most where it was not measured in this run, messages a second.
LOADED, LOADED_IN_FULL, MOST = 5, 30, 1000


def measure(bench: Bench) -> None:
    most = bench.found.get(f"release: {OURS}, messages/s", MOST)
    with Counter() as sink, Host(mta=smtp(sink.port)) as host:
        add_vhosts(host, VHOSTS)
        templates = [Template(host, vhost, MESSAGE) for vhost in VHOSTS]
        host.start()
        host.wait_until_idle()
        idle = _latencies(host, templates, IDLE_IN_FULL if bench.full else IDLE, PAUSE)
        loaded = _latencies(host, templates, int(most / 2 * (LOADED_IN_FULL if bench.full else LOADED)), 2 / most)
        assert host.stop() == 0
    rows = []
    for name, found in (("idle", idle), (f"at {most / 2:.0f} messages/s", loaded)):
        rows.append([name, str(len(found)), *(f"{percentile(found, share):.1f}" for share in (0.5, 0.9, 0.99, 1.0))])
        for title, share in (("median", 0.5), ("p99", 0.99)):
            bench.note(f"latency: {'half of the most' if found is loaded else 'idle'}, {title}, ms", percentile(found, share))
    table(["ms", "messages", "median", "p90", "p99", "most"], rows)


def _latencies(host: Host, templates: list[Template], number: int, pause: float) -> list[float]:
    """Milliseconds that each of NUMBER messages took, submitted every PAUSE seconds to the vhosts in turn."""
    before = {row["queue_id"] for row in host.rows("released")}
    due = time.monotonic()
    for n in range(number):
        time.sleep(max(0.0, due - time.monotonic()))
        templates[n % len(templates)].submit()
        due += pause
    host.wait_until_idle(timeout=120)
    return [took(row) for row in host.rows("released") if row["queue_id"] not in before]


def took(row: dict[str, str]) -> float:
    """Milliseconds from the moment that a message says it was submitted to the one when the MTA's reply was written down."""
    return (_stamp(row["logged_at"]) - _stamp(row["arrived_at"])) * 1000


def _stamp(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
