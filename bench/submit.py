"""enqueue as a whole process, started through `sh -c` as PHP does it, in turn with what else takes a mail there."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

from host import Host
from measure import Bench, Run, spread, table
from peers import TIME, Peer, Peers, installed

VHOST = "www.a.example"
# Bytes of text, and rounds one at a time and four at once; in a full run five times as many.
SIZES = (("1 KB", 1 << 10, 40, 10), ("100 KB", 100 << 10, 15, 5), ("20 MB", 20 << 20, 3, 1))


def measure(bench: Bench) -> None:
    with Peers() as peers, Host() as host:
        host.add(VHOST)
        ours = f"{installed(peers.directory)} --spool {host.spool} {VHOST} -t -i"
        everyone = [
            peers.postfix(), Peer("secure-sendmail-enqueue", ours, [host.spool / "vhosts" / VHOST / "new"]),
            peers.nullmailer(), peers.script(),
        ]  # fmt: skip
        message = peers.directory / "message"
        for title, size, alone, together in SIZES:
            line = b"x" * 75 + b"\n"
            message.write_bytes(b"To: one@x.example\nFrom: two@x.example\nSubject: subject\n\n" + line * (size // len(line)))
            for at_once, rounds in ((1, alone), (4, together)):
                rounds *= 5 if bench.full else 1
                print(f"  a message of {title}, {at_once} at a time, {rounds} rounds:")
                _compare(bench, everyone, message, at_once, rounds, f"submit {title} x{at_once}")


def _compare(bench: Bench, everyone: list[Peer], message: Path, at_once: int, rounds: int, key: str) -> None:
    runs: dict[str, list[Run]] = {peer.name: [] for peer in everyone}
    for number in range(rounds + 1):
        # In another order each time, so that none has always the same one before it, and what that leaves in the caches.
        for peer in random.Random(number).sample(everyone, len(everyone)):
            run = _start(peer, message, at_once)
            # The first of each only warms up.
            if number:
                runs[peer.name].append(run)
            _remove_mail(peer)
    peaks = {peer.name: _peak(peer, message) for peer in everyone}
    first = runs[everyone[0].name]
    rows = []
    for name, found in runs.items():
        ratio = spread([run.wall / other.wall for run, other in zip(found, first, strict=True)])
        wall, cpu = (spread([getattr(run, what) * 1000 for run in found]) for what in ("wall", "cpu"))
        memory = peaks[name]
        rows.append([name, wall.text(".1f"), ratio.text(), f"{cpu.median:.1f}", f"{memory:.0f}"])
        bench.note(f"{key}: {name}, ms", wall.median)
        bench.note(f"{key}: {name}, times Postfix", ratio.median)
        bench.note(f"{key}: {name}, MB", memory)
    table(["", "wall ms, median (5..95 %)", "ratio pair by pair", "CPU ms", "peak MB"], rows)


def _start(peer: Peer, message: Path, at_once: int) -> Run:
    """So many at once, until all have ended; CPU is that of all."""
    environment = _environment(peer)
    stdin = [(os.POSIX_SPAWN_OPEN, 0, str(message), os.O_RDONLY, 0)]
    began = time.perf_counter()
    pids = [
        os.posix_spawn(
            "/bin/sh", ["sh", "-c", peer.command], environment, file_actions=stdin, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ]
        )
        for _ in range(at_once)
    ]
    ended = [os.wait4(pid, 0) for pid in pids]
    wall = time.perf_counter() - began
    assert not any(status for _, status, _ in ended), f"{peer.name} ended with {[status for _, status, _ in ended]}"
    return Run(wall, sum(usage.ru_utime + usage.ru_stime for _, _, usage in ended))


def _peak(peer: Peer, message: Path) -> float:
    """MB of the largest process, as GNU time has it: that is small, and its child does not begin with our own peak."""
    with open(message, "rb") as stdin:
        words = [TIME, "-q", "-f", "%M", "sh", "-c", peer.command]
        run = subprocess.run(words, stdin=stdin, env=_environment(peer), stderr=subprocess.PIPE, text=True)
    assert run.returncode == 0, f"{peer.name} ended with {run.returncode}: {run.stderr}"
    _remove_mail(peer)
    return int(run.stderr.split()[-1]) / 1024


def _environment(peer: Peer) -> dict[str, str]:
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **peer.environment}


def _remove_mail(peer: Peer) -> None:
    for place in peer.places:
        for entry in os.scandir(place):
            os.unlink(entry.path)
