"""One vhost has 50,000 messages queued; each of 100 others sends one mail: how long that takes to the MTA's reply."""

from __future__ import annotations

from host import Host, smtp
from latency import took
from measure import Bench, percentile, table
from release import MESSAGE, Counter
from spool import Template, add_vhosts, submit

QUEUED = 50_000
OTHERS = [f"www.other{number}.example" for number in range(100)]


def measure(bench: Bench) -> None:
    with Counter() as sink, Host(mta=smtp(sink.port)) as host:
        add_vhosts(host, ["www.many.example", *OTHERS])
        submit(host, "www.many.example", QUEUED, MESSAGE)
        templates = [Template(host, vhost, MESSAGE) for vhost in OTHERS]
        host.launch()
        host.wait(lambda: sink.count > 1000, "mail flows")
        for template in templates:
            template.submit()
        host.wait(lambda: not any(template.waiting() for template in templates), "the others' mail has gone", 120)
        left = QUEUED + len(OTHERS) - sink.count
        assert left > 0, "the many had gone before the others came"
        found = [took(row) for row in host.rows("released") if row["vhost"] in OTHERS]
        host.kill()
    rows = [[f"{left} of {QUEUED} still queued", *(f"{percentile(found, share):.0f}" for share in (0.5, 0.99, 1.0))]]
    table(["ms", "median", "p99", "most"], rows)
    bench.note("fairness: the slowest of 100 others, ms", max(found))
