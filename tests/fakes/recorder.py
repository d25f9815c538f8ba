"""A listener that nobody should ever contact."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from .ports import free_port
from .waiting import PATIENCE, Signal

MAX_FIRST_BYTES = 4096
MAX_CONTACTS = 1024


def listen(host: str, port: int = 0, backlog: int = 512) -> socket.socket:
    """A non-blocking listening socket on a literal IPv4 or IPv6 address; without a port, on one of this process's own.

    It names its protocol, since asyncio sets TCP_NODELAY on connections of such sockets only: without it every answer in
    two pieces waits 40 ms for the other side's acknowledgement.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind((host, port or free_port(host)))
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def authority(host: str, port: int) -> str:
    """Host and port as they stand in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass
class Contact:
    """One connection made to a sink, and the first bytes sent over it."""

    peer: tuple[Any, ...]
    data: bytearray = field(default_factory=bytearray)
    closed: bool = False


class Sink:
    """Accepts connections, never says a word, and remembers who came and what was said first."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.address = host
        self.port = port
        self._contacts: list[Contact] = []
        self._sockets: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self._signal = Signal()

    @property
    def host(self) -> str:
        """Address and port as in a Host header."""
        return authority(self.address, self.port)

    @property
    def url(self) -> str:
        """The base URL for plain HTTP."""
        return f"http://{self.host}"

    @property
    def contacts(self) -> list[Contact]:
        """Every connection so far, including those the kernel has completed only just now."""
        self._accept()
        return self._contacts

    @property
    def silent(self) -> bool:
        """True as long as nobody has connected."""
        return not self.contacts

    async def wait_for(self, condition: Callable[[], object], within: float = PATIENCE) -> None:
        """Wait until a condition about this sink holds."""
        await self._signal.wait_for(condition, within)

    async def __aenter__(self) -> Sink:
        self._listener = listen(self.address, self.port)
        self.port = self._listener.getsockname()[1]
        asyncio.get_running_loop().add_reader(self._listener, self._accept)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._accept()
        for sock in (self._listener, *self._sockets):
            if sock is not None:
                asyncio.get_running_loop().remove_reader(sock)
                sock.close()
        self._listener = None
        self._sockets.clear()

    def _accept(self) -> None:
        if self._listener is None:
            return
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, peer = self._listener.accept()
                if len(self._contacts) >= MAX_CONTACTS:
                    sock.close()
                    continue
                sock.setblocking(False)
                contact = Contact(peer)
                self._contacts.append(contact)
                self._sockets.append(sock)
                asyncio.get_running_loop().add_reader(sock, self._read, sock, contact)
                self._signal.notify()

    def _read(self, sock: socket.socket, contact: Contact) -> None:
        try:
            data = sock.recv(MAX_FIRST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        contact.data += data[: MAX_FIRST_BYTES - len(contact.data)]
        if not data:
            contact.closed = True
            asyncio.get_running_loop().remove_reader(sock)
        self._signal.notify()
