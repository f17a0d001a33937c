"""The way to a MySQL server, on a loopback port of its own, on which packets are lost as the test says."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

from servers import HOST, free_port

QUERY = b"\x03"


class Proxy:
    """Passes all on, but for what its attributes say; they hold for connections that are open already, too."""

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self._target = target
        # Accepts, and never says a word.
        self.mute = False
        # Closes the connection at a longer packet, as a proxy with a max_allowed_packet of its own does.
        self.longest = 1 << 30
        # Closes the connection when the server has carried out an INSERT, before its answer comes through. So often.
        self.lose = 0
        # Seconds that each packet to the server takes.
        self.delay = 0.0
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server((HOST, self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def hang_up(self) -> None:
        """Closes all connections that are open."""
        for each in list(self._open):
            _close(each)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _close(self._listener)
        self.hang_up()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                self._open.add(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = None
        with suppress(OSError):
            if self.mute:
                while client.recv(1 << 16):
                    pass
                return
            server = socket.create_connection((HOST, self._target))
            self._open.add(server)
            losing = threading.Event()
            threading.Thread(target=self._back, args=(server, client, losing), daemon=True).start()
            while packet := _packet(client):
                time.sleep(self.delay)
                if len(packet) > self.longest:
                    break
                if self.lose and packet[4:11] == QUERY + b"INSERT":
                    self.lose -= 1
                    losing.set()
                server.sendall(packet)
        if server is None or not losing.is_set():
            _close(client)
        if server is not None and not losing.is_set():
            _close(server)

    def _back(self, server: socket.socket, client: socket.socket, losing: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 16):
                if losing.is_set():
                    break
                client.sendall(data)
        _close(client)
        _close(server)


def _packet(client: socket.socket) -> bytes:
    head = _exactly(client, 4)
    return head + _exactly(client, int.from_bytes(head[:3], "little")) if head else b""


def _exactly(client: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        data = client.recv(count - len(found))
        if not data:
            return b""
        found += data
    return found


def _close(each: socket.socket) -> None:
    with suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()
