"""The senders in a process of their own: talking to the MTA takes no time from the engine, nor waits for it."""

import os
import pickle
import queue
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from releaser import child, maillog
from releaser.maillog import LOG
from releaser.mta import Job, Kind, Outcome, Result, Results, Senders

# Seconds until a process that has ended by itself is made again.
AGAIN = 1


def start(url: str, wake: Callable[[], None], results: Results) -> "Senders | Process":
    """Senders for the MTA at URL: threads where these only wait for another program or the disk, else a process."""
    return Process(url, results) if url.startswith("smtp:") else Senders(url, wake, results)


class Process:
    """A child with Senders, which are used as if they were here. It has no file of ours but the messages it is given, and
    ends with us, however we end: at once, since the other end of its socket is closed then.

    What it says waits in the socket for collect(): a thread that waited there would take the interpreter from the engine.
    """

    def __init__(self, url: str, results: Results) -> None:
        """As those of Senders."""
        self.url = url
        self.max_size, self.pace = 0, float("inf")
        self._results = results
        # What is sent with the next flush(), and what was, until there is a result.
        self._waiting: list[Job] = []
        self._jobs: dict[str, Job] = {}
        self._ending = False
        self._start()

    def _start(self) -> None:
        self._pid, self._socket = child.fork(partial(_work, self.url))
        # What was read, up to the next whole message.
        self._heard = bytearray()

    @property
    def descriptors(self) -> list[int]:
        """What can be read when collect() has something to do; nothing when the child has ended as it was told."""
        return [self._socket.fileno()] if self._socket.fileno() >= 0 else []

    def send(self, job: Job) -> None:
        """Let JOB be sent behind the next flush()."""
        self._waiting.append(job)

    def flush(self) -> None:
        """Hand over what waits for that."""
        if self._waiting:
            jobs, self._waiting = self._waiting, []
            self._jobs.update((job.queue_id, job) for job in jobs)
            self._tell(jobs)

    def collect(self) -> None:
        """Pass on the results that are there."""
        data = b" "
        while data and self.descriptors:
            try:
                data = self._socket.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self._heard += data
        while len(self._heard) >= child.LENGTH.size:
            end = child.LENGTH.size + child.LENGTH.unpack_from(self._heard)[0]
            if len(self._heard) < end:
                break
            done, self.pace, self.max_size = pickle.loads(self._heard[child.LENGTH.size : end])
            del self._heard[:end]
            for queue_id, result in done:
                self._results.put((self._jobs.pop(queue_id), result))
        if not data and self._results.empty():
            # Otherwise next time: what was read just now is made durable first.
            self._ended()

    def give_back(self, result: Result = None) -> None:
        """Let RESULT be that of all jobs that no session has begun with."""
        self._tell(("give back", result))

    def stop(self) -> None:
        """Let the child end when its jobs are done."""
        self.flush()
        self._ending = True
        self._tell(None)

    def join(self) -> None:
        """Wait for that."""
        while self.descriptors:
            child.can_be_read(self._socket)
            self.collect()

    def _tell(self, what: Any) -> None:
        try:
            child.send(self._socket, what)
        except OSError:
            # It has ended; collect() sees to its jobs.
            pass

    def _ended(self) -> None:
        self._socket.close()
        os.waitpid(self._pid, 0)
        if self._ending and not self._jobs:
            return
        # It was killed: nobody knows what has become of its jobs.
        words = "the process that talks to the MTA has ended"
        LOG.error(maillog.sender_lost(words))
        time.sleep(AGAIN)
        jobs, self._jobs = self._jobs, {}
        self._start()
        if self._ending:
            self._tell(None)
        for job in jobs.values():
            self._results.put((job, [Outcome(recipient, Kind.UNKNOWN, words) for recipient in job.recipients]))


def _work(url: str, parent: socket.socket) -> None:
    """The child."""
    # None is behind the last.
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    senders = Senders(url, lambda: None, results)
    writer = threading.Thread(target=_write, args=(parent, senders, results), daemon=True)
    writer.start()
    while (told := child.receive(parent)) is not None:
        if told is child.GONE:
            # What the parent has begun is the next one's.
            return
        if isinstance(told, list):
            for job in told:
                senders.send(job)
        else:
            senders.give_back(told[1])
    senders.stop()
    senders.join()
    results.put(None)
    writer.join()


def _write(parent: socket.socket, senders: Senders, results: queue.SimpleQueue[Any]) -> None:
    """Pass on the results, as many at once as there are."""
    while True:
        found = [results.get()]
        try:
            while True:
                found.append(results.get_nowait())
        except queue.Empty:
            pass
        done = [(each[0].queue_id, each[1]) for each in found if each is not None]
        try:
            child.send(parent, (done, senders.pace, senders.max_size))
        except OSError:
            # The parent has ended, which the other thread hears of.
            return
        if found[-1] is None:
            return
