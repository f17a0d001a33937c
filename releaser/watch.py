"""Watching shortens the wait; scanning does the work. The only module that imports watchdog."""

import os
import select
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

# More rings a second than this are no mail: watchdog keeps what it has read of them in memory without end, and the other
# bells' events are somewhere behind. All mail of a busy host rings less often, since rings coalesce.
MOST_RINGS = 5_000


class Wake:
    """What has happened since the main loop last looked: bells rung, configuration touched. Coalesces; thread-safe."""

    def __init__(self) -> None:
        self._awake, self._nudged = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._lock = threading.Lock()
        self._bells: set[str] = set()
        self._configuration = False

    def ring(self, bell: str) -> None:
        with self._lock:
            self._bells.add(bell)
        self.nudge()

    def touch_configuration(self) -> None:
        self._configuration = True
        self.nudge()

    def nudge(self) -> None:
        """End a wait."""
        try:
            os.write(self._nudged, b"\0")
        except BlockingIOError:
            # As many have said so as a pipe can hold.
            pass

    def wake_on_signals(self) -> None:
        """Let every signal end a wait, also one that has arrived just before it, or in another thread."""
        signal.set_wakeup_fd(self._nudged, warn_on_full_buffer=False)

    def wait(self, seconds: float, others: Iterable[int] = ()) -> None:
        """Return when anything happened, when one of the descriptors OTHERS can be read, or after SECONDS."""
        poll = select.poll()
        for descriptor in (self._awake, *others):
            poll.register(descriptor, select.POLLIN)
        if any(descriptor == self._awake for descriptor, _ in poll.poll(seconds * 1000)):
            # All that a pipe can hold.
            os.read(self._awake, 1 << 16)

    def take(self) -> tuple[set[str], bool]:
        """The bells rung and whether the configuration was touched, since the last call."""
        with self._lock:
            bells, self._bells = self._bells, set()
            configuration, self._configuration = self._configuration, False
        return bells, configuration


class _Handler(FileSystemEventHandler):
    def __init__(self, call: Callable[[str], None]) -> None:
        self._call = call
        self._second = self._count = 0
        self._rings: Counter[str] = Counter()
        # The name that has had most of more than MOST_RINGS events in a second.
        self.loudest: str | None = None

    def on_any_event(self, event: FileSystemEvent) -> None:
        # Ringing arrives as a modification or as a change of attributes, depending on watchdog's version: any event counts.
        name = os.path.basename(os.fsdecode(event.src_path))
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._count, self._rings = second, 0, Counter()
        self._count += 1
        self._rings[name] += 1
        if self.loudest is None and self._count > MOST_RINGS:
            self.loudest = self._rings.most_common(1)[0][0]
        self._call(name)


class Watch:
    """Watches the bells in SPOOL/wake and the directories of the configuration."""

    def __init__(self, spool: str, configuration: list[str], wake: Wake) -> None:
        """Raises OSError where nothing can be watched."""
        # watchdog swallows a directory that it may not read, and then watches nothing.
        for directory in (f"{spool}/wake", *configuration):
            os.listdir(directory)
        self._bells = _Handler(wake.ring)
        self._observer = Observer()
        try:
            self._observer.schedule(self._bells, f"{spool}/wake", recursive=False)
            for directory in configuration:
                self._observer.schedule(_Handler(lambda _: wake.touch_configuration()), directory, recursive=False)
            self._observer.start()
        except OSError:
            # This is tried again and again: what was begun keeps descriptors of the kernel, of which there are few.
            self._observer.on_thread_stop()
            raise

    @property
    def loudest(self) -> str | None:
        """The bell that is rung more often than mail can come, while there is one: stop() then, and look without bells."""
        return self._bells.loudest

    def alive(self) -> bool:
        """Whether every thread that watches still runs."""
        return self._observer.is_alive() and all(emitter.is_alive() for emitter in self._observer.emitters)

    def stop(self) -> None:
        self._observer.stop()
        self._observer.join()
