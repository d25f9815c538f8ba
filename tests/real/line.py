"""A line to a server that can be watched, cut, garbled, held and slowed: real bytes on loopback.

It stands between pullcache and its upstream, or between a client and pullcache. What it is told holds for connections
that are open, too; ``heal()`` makes it a plain line again.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from types import TracebackType
from typing import Self

_AT_ONCE = 64 * 1024


class Line:
    """A relay from a port of its own on 127.0.0.1 to another one.

    ``sent`` and ``received`` count bytes to and from the server, over all connections; ``requests`` and ``answers`` keep
    what passed (the first ``keep`` bytes of each connection and direction), for assertions about the wire.
    """

    def __init__(self, target: int, keep: int = 0) -> None:
        self.sent = 0
        self.received = 0
        self.connections = 0
        self.requests: list[bytearray] = []
        self.answers: list[bytearray] = []
        self._target = target
        self._keep = keep
        self._cut: int | None = None
        self._garble: int | None = None
        self._open = threading.Event()
        self._open.set()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.host}"

    # -- what it is told ---------------------------------------------------------------------------------------------

    def cut_after(self, count: int) -> None:
        """Reset each connection once the server has sent so many bytes on it."""
        self._cut = count

    def garble_at(self, offset: int) -> None:
        """Change the byte at this place of what the server sends on each connection; far enough, it is a blob's."""
        self._garble = offset

    def hold(self) -> None:
        """Let nothing pass in either direction, and answer nothing: a black hole that accepts connections."""
        self._open.clear()

    def heal(self) -> None:
        """A plain line from now on."""
        self._cut = self._garble = None
        self._open.set()

    # -- how it works ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._run(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._open.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        with self._lock:
            for sock in self._sockets:
                _shut(sock)
        for thread in list(self._threads):
            thread.join(10)
        self._listener.close()

    def _run(self, work: object, *arguments: object) -> None:
        assert callable(work)
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target), 10)
            except OSError:
                _reset(client)
                client.close()
                continue
            server.settimeout(None)
            with self._lock:
                self.connections += 1
                self._sockets |= {client, server}
                self.requests.append(bytearray())
                self.answers.append(bytearray())
                ends = [2]  # the relays of this connection that still run
                self._run(self._relay, client, server, True, self.requests[-1], ends)
                self._run(self._relay, server, client, False, self.answers[-1], ends)
            if self._ended.is_set():
                _shut(client)
                _shut(server)

    def _relay(self, source: socket.socket, sink: socket.socket, up: bool, kept: bytearray, ends: list[int]) -> None:
        passed = 0
        try:
            while data := source.recv(_AT_ONCE):
                self._open.wait()
                if not up and self._garble is not None and passed <= self._garble < passed + len(data):
                    at = self._garble - passed
                    data = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
                is_cut = not up and self._cut is not None and passed + len(data) >= self._cut
                if is_cut and self._cut is not None:
                    data = data[: max(0, self._cut - passed)]
                kept += data[: max(0, self._keep - len(kept))]
                passed += len(data)
                with self._lock:
                    if up:
                        self.sent += len(data)
                    else:
                        self.received += len(data)
                sink.sendall(data)
                if is_cut:
                    _reset(sink)
                    _shut(source)
                    break
            else:
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            _shut(source)
            _shut(sink)
        finally:
            with self._lock:
                ends[0] -= 1
                if ends[0] == 0:
                    for sock in (source, sink):
                        self._sockets.discard(sock)
                        sock.close()


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _reset(sock: socket.socket) -> None:
    """Let the close that follows be a reset; until then whoever reads from it sees an end."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.shutdown(socket.SHUT_RD)
