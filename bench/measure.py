"""Timing, spread, memory and the machine: what every measurement needs, and the lines that it prints."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Run:
    """Processes and all that they have started, from fork to exit: seconds, and seconds of CPU."""

    wall: float
    cpu: float


@dataclass
class Bench:
    """One run of the benchmark: whether it is the long one, and what was found, by what it is."""

    full: bool = False
    found: dict[str, float] = field(default_factory=dict)

    def note(self, what: str, value: float) -> None:
        self.found[what] = round(value, 4)


@dataclass(frozen=True)
class Spread:
    """The median of some numbers, and between which of them nine of ten lie."""

    median: float
    low: float
    high: float

    def text(self, form: str = ".2f") -> str:
        return f"{self.median:{form}} ({self.low:{form}}..{self.high:{form}})"


def spread(numbers: Sequence[float]) -> Spread:
    ordered = sorted(numbers)
    last = len(ordered) - 1
    return Spread(statistics.median(ordered), ordered[round(last * 0.05)], ordered[round(last * 0.95)])


def percentile(numbers: Sequence[float], share: float) -> float:
    ordered = sorted(numbers)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def cpu_of(pid: int) -> float:
    """Seconds of CPU that a process has used, its ended children's included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / TICKS


def cpu_of_group(leader: int) -> float:
    """Seconds of CPU of all processes of a group that run now, and of the children that they have waited for."""
    total = 0.0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getpgid(int(entry.name)) == leader:
                    total += cpu_of(int(entry.name))
            except (ProcessLookupError, FileNotFoundError):
                # It has ended, and its parent has its time.
                pass
    return total


def resident_of_group(leader: int) -> float:
    """MB of memory of all processes of a group; what they share is shared out among them."""
    total = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getpgid(int(entry.name)) == leader:
                    rollup = (entry / "smaps_rollup").read_text()
                    total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
            except (ProcessLookupError, FileNotFoundError):
                pass
    return total / 1024


def machine() -> str:
    """What it runs on, and what else runs there."""
    names = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    load = os.getloadavg()[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}, {memory:.0f} GiB, "
        f"Linux {platform.release()}, Python {platform.python_version()}, load {load:.1f} at the start; "
        f"{file_system('/tmp')} below /tmp, a sync of 4 KB there takes {sync_time('/tmp') * 1000:.2f} ms"
    )


def file_system(path: str) -> str:
    """The type and the options of the file system that PATH is on."""
    found = ("", "")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, kind, options = line.split()[:4]
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(found[0]):
            found = (point, f"{kind} ({options})")
    return found[1]


def sync_time(directory: str) -> float:
    """Seconds that it takes to append 4 KB to a file in DIRECTORY and sync it, the median of many times."""
    found = []
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        for _ in range(200):
            file.write(bytes(4096))
            began = time.perf_counter()
            os.fsync(file.fileno())
            found.append(time.perf_counter() - began)
    return statistics.median(found)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print ROWS below HEAD, the columns aligned."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  " + "  ".join([row[0].ljust(widths[0]), *numbers]).rstrip())
    print(flush=True)
