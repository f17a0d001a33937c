"""What watching takes of the kernel is given back, however it fails: it is begun again with every scan."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path

import pytest
from watchdog.observers.inotify import InotifyEmitter

from releaser.watch import Wake, Watch


def taken() -> tuple[int, int]:
    """The descriptors and the threads of this process, without those that nobody has any more."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    (tmp_path / "wake").mkdir()
    (tmp_path / "etc").mkdir()
    return tmp_path


def test_watch_that_is_stopped(spool: Path) -> None:
    wake = Wake()
    before = taken()
    for _ in range(10):
        watch = Watch(str(spool), [str(spool / "etc")], wake)
        assert watch.alive() and taken() > before
        watch.stop()
    assert taken() == before


def test_watch_of_a_directory_that_is_not_there(spool: Path) -> None:
    wake = Wake()
    before = taken()
    for _ in range(10):
        with pytest.raises(FileNotFoundError):
            Watch(str(spool), [str(spool / "etc"), str(spool / "gone")], wake)
    assert taken() == before


def test_watch_that_fails_halfway(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has no room for the second directory."""
    begin = InotifyEmitter.on_thread_start

    def fails(emitter: InotifyEmitter) -> None:
        if str(emitter.watch.path).endswith("etc"):
            raise OSError(24, "inotify instance limit reached")
        begin(emitter)

    monkeypatch.setattr(InotifyEmitter, "on_thread_start", fails)
    wake = Wake()
    before = taken()
    for _ in range(10):
        with pytest.raises(OSError, match="limit"):
            Watch(str(spool), [str(spool / "etc")], wake)
    assert taken() == before


def test_more_nudges_than_the_kernel_keeps() -> None:
    """However many there are, the next wait ends at once, and the one behind it waits again."""
    wake = Wake()
    for _ in range(100_000):
        wake.nudge()
    began = time.monotonic()
    wake.wait(60)
    assert time.monotonic() - began < 30
    # A pipe keeps 64 KiB.
    for _ in range(2):
        wake.wait(0)
    began = time.monotonic()
    wake.wait(0.2)
    assert time.monotonic() - began >= 0.2
