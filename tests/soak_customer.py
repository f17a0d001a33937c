"""A customer of the soak: sends, and does what he likes in his own maildrop, under a uid of his own.

Runs by itself, with Debian's Python and nothing of ours but enqueue; until the end of its standard input. Each act is a line
of JSON on standard output, written when it is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

# Seconds after which enqueue is killed, at most, and the bytes of a message that the releaser copies first.
MOST_PATIENCE = 0.07
LARGE = 1_200_000
# Files that can only be left where they are: each is looked at with every scan.
MOST_THAT_STAY = 5


def say(act: str, token: str, vhost: str, recipients: list[str], **more: object) -> None:
    line = json.dumps({"act": act, "token": token, "vhost": vhost, "recipients": recipients, "uid": os.getuid(), **more})
    os.write(1, line.encode() + b"\n")


class Customer:
    def __init__(self, name: str, seed: str, enqueue: list[str], spool: str, maildrops: dict[str, str], registered: str) -> None:
        """MAILDROPS: the vhosts that he sends as, and where their maildrop is; REGISTERED is a vhost of another's."""
        self.name, self.enqueue, self.spool, self.maildrops, self.registered = name, enqueue, spool, maildrops, registered
        self.pick = random.Random(f"{seed}/{name}")
        self.count = self.staying = 0

    def act(self) -> None:
        acts: dict[Callable[[], None], int] = {
            self.send: 60, self.burst: 8, self.send_and_kill: 8, self.write: 8, self.rewrite: 5, self.junk: 5, self.forge: 3,
            self.flood: 1, self.stay: 1,
        }  # fmt: skip
        (chosen,) = self.pick.choices(list(acts), list(acts.values()))
        try:
            chosen()
        except OSError:
            # The file system is full: what he has begun is in his tmp/, and he has not said anything.
            pass

    def message(self) -> tuple[str, str, list[str], bytes]:
        """A new message: its token, its vhost, its recipients, and its text."""
        self.count += 1
        token = f"{self.name}-{self.count:05}"
        kinds = self.pick.choices(("ok", "grey", "bad"), (80, 10, 10), k=self.pick.choice((1, 1, 1, 2, 3)))
        recipients = [f"{token}.{number}@{kind}.example" for number, kind in enumerate(kinds)]
        size = LARGE if self.pick.random() < 0.02 else self.pick.randrange(10, 3000)
        text = self.pick.randbytes(size // 2 + 1).hex()
        return token, self.pick.choice(list(self.maildrops)), recipients, f"{text[:size]}\n.\n".encode()

    @staticmethod
    def written(token: str, recipients: list[str], text: bytes) -> bytes:
        return f"To: {', '.join(recipients)}\nFrom: {token}@sender.example\nSubject: {token}\n\n".encode() + text

    def send(self) -> None:
        self.submit(*self.message())

    def submit(self, token: str, vhost: str, recipients: list[str], text: bytes) -> None:
        run = subprocess.run(
            self.command(token, vhost), input=self.written(token, recipients, text), stderr=subprocess.PIPE, timeout=60
        )
        say("sent", token, vhost, recipients, status=run.returncode, words=run.stderr.decode()[-200:], text=digest(text))

    def command(self, token: str, vhost: str) -> list[str]:
        return [*self.enqueue, vhost, "-t", "-i", "-f", f"{token}@sender.example"]

    def burst(self) -> None:
        """More at once than any limit allows."""
        threads = [threading.Thread(target=self.submit, args=self.message()) for _ in range(self.pick.randrange(3, 8))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def send_and_kill(self) -> None:
        """Ends enqueue at any point, also behind its commit."""
        token, vhost, recipients, text = self.message()
        number = self.pick.choice((signal.SIGKILL, signal.SIGTERM))
        process = subprocess.Popen(self.command(token, vhost), stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        killer = threading.Timer(self.pick.uniform(0, MOST_PATIENCE), process.send_signal, [number])
        killer.start()
        process.communicate(self.written(token, recipients, text), timeout=60)
        killer.cancel()
        say("sent", token, vhost, recipients, status=process.returncode, text=digest(text))

    def drop(self, vhost: str, content: bytes) -> tuple[int, str]:
        """Writes a file into new/ past enqueue; the descriptor, still open, and its path."""
        top = f"{self.spool}/vhosts/{self.maildrops[vhost]}"
        name = f"{time.time():.6f}.P{os.getpid()}.{os.urandom(12).hex()},S={len(content)}"
        fd = os.open(f"{top}/tmp/{name}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
        try:
            if os.write(fd, content) != len(content):
                raise OSError("no room")
            os.rename(f"{top}/tmp/{name}", f"{top}/new/{name}")
        except OSError:
            os.unlink(f"{top}/tmp/{name}")
            os.close(fd)
            raise
        return fd, f"{top}/new/{name}"

    def layout(self, token: str, vhost: str, recipients: list[str], text: bytes) -> bytes:
        lines = "".join(f"Recipient: {each}\n" for each in recipients)
        head = f"Layout: 2\nVhost: {vhost}\nSender: {token}@sender.example\n{lines}\n"
        return head.encode() + self.written(token, recipients, text)

    def write(self) -> None:
        """Valid mail of his own hand: as good as any."""
        token, vhost, recipients, text = self.message()
        fd, _ = self.drop(vhost, self.layout(token, vhost, recipients, text))
        say("sent", token, vhost, recipients, status=0, text=digest(text))
        os.close(fd)
        self.ring(vhost)

    def rewrite(self) -> None:
        """Changes the text through the descriptor while it is judged, sent or held."""
        token, vhost, recipients, text = self.message()
        content = self.layout(token, vhost, recipients, text)
        fd, _ = self.drop(vhost, content)
        say("rewritten", token, vhost, recipients, status=0, text=digest(text))
        self.ring(vhost)
        time.sleep(self.pick.uniform(0, 0.3))
        os.pwrite(fd, b"F" * (len(text) - 4), len(content) - len(text))
        os.close(fd)

    def forge(self) -> None:
        """Claims to be from another's vhost."""
        token, vhost, recipients, text = self.message()
        fd, _ = self.drop(vhost, self.layout(token, self.registered, recipients, text))
        os.close(fd)
        say("forged", token, vhost, recipients, status=0, text=digest(text))
        self.ring(vhost)

    def junk(self) -> None:
        """What is no message."""
        vhost = self.pick.choice(list(self.maildrops))
        path = f"{self.spool}/vhosts/{self.maildrops[vhost]}/new/junk{os.urandom(8).hex()}"
        kind = self.pick.randrange(4)
        if kind == 0:
            os.symlink("/etc/passwd", path)
        elif kind == 1:
            os.mkfifo(path)
        elif kind == 2:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0))
        else:
            fd, path = self.drop(vhost, self.pick.randbytes(100))
            os.close(fd)
        say("junk", os.path.basename(path), vhost, [])
        self.ring(vhost)

    def stay(self) -> None:
        """A file of a layout that nobody knows yet: it can only be left where it is."""
        if self.staying < MOST_THAT_STAY:
            self.staying += 1
            vhost = self.pick.choice(list(self.maildrops))
            fd, path = self.drop(vhost, b"Layout: 99\n\nlater\n")
            os.close(fd)
            say("stays", os.path.basename(path), vhost, [])

    def ring(self, vhost: str) -> None:
        try:
            with open(f"{self.spool}/vhosts/{self.maildrops[vhost]}/policy", encoding="utf-8") as policy:
                lines = dict(line.split(": ", 1) for line in policy.read().splitlines() if ": " in line)
            os.utime(f"{self.spool}/wake/{lines['Bell']}")
        except (OSError, KeyError):
            # There is none yet, or it is torn: the next scan sees what is there.
            pass

    def flood(self) -> None:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            for vhost in self.maildrops:
                self.ring(vhost)


def digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def main() -> None:
    os.umask(0o027)
    customer = Customer(**json.loads(sys.argv[1]))
    while not select.select([0], [], [], customer.pick.expovariate(4))[0]:
        customer.act()


if __name__ == "__main__":
    main()
