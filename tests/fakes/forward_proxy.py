"""A forward proxy as companies have them: CONNECT for https, the whole address in the request line for http.

It forwards for real, to wherever a request says, or to where ``names`` says that a name is: so a test can use names that
nobody but the proxy can resolve.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Literal
from urllib.parse import urlsplit

from .messages import Headers
from .recorder import authority, listen
from .tokens import Credentials
from .waiting import PATIENCE, Signal

MAX_HEAD = 1 << 17
_HOP_BY_HOP = ("Proxy-Authorization", "Proxy-Connection", "Connection", "Keep-Alive")

Silence = Literal["stall", "close"]


@dataclass(frozen=True)
class Forwarded:
    """One request to the proxy: where it was to go, and every byte of its head."""

    method: str
    target: str
    headers: Headers
    raw: bytes

    @property
    def host(self) -> str:
        """Host and port that were asked for."""
        return self.target if self.method == "CONNECT" else urlsplit(self.target).netloc


class ForwardProxy:
    """Forwards what it is asked to, and records who wanted to go where.

    ``credentials``: asked of everybody, by Basic. ``refusal``: the status with which everything is answered instead, or how
    everything is met with silence. ``opened`` are the hosts that it has connected to.
    """

    def __init__(
        self, names: Mapping[str, str] | None = None, credentials: Credentials | None = None, host: str = "127.0.0.1"
    ) -> None:
        self.names = dict(names or {})
        self.credentials = credentials
        self.refusal: int | Silence | None = None
        self.requests: list[Forwarded] = []
        self.opened: list[str] = []
        self.connections = 0
        self.address = host
        self.port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._signal = Signal()

    @property
    def host(self) -> str:
        """Address and port."""
        return authority(self.address, self.port)

    @property
    def url(self) -> str:
        """What ``httpProxy`` is set to, without credentials."""
        return f"http://{self.host}"

    def url_for(self, user: str, password: str) -> str:
        """What ``httpProxy`` is set to, with credentials as they stand in a URL."""
        return f"http://{user}:{password}@{self.host}"

    @property
    def targets(self) -> list[str]:
        """The hosts that requests were to go to, in order."""
        return [request.host for request in self.requests]

    async def wait_for(self, condition: object, within: float = PATIENCE) -> None:
        """Wait until a condition about this proxy holds."""
        assert callable(condition)
        await self._signal.wait_for(condition, within)

    async def start(self) -> None:
        """Begin to accept connections; again on the same port after a stop."""
        self._server = await asyncio.start_server(self._accept, sock=listen(self.address, self.port), limit=MAX_HEAD)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuse connections from now on, and drop those there are."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await server.wait_closed()

    async def __aenter__(self) -> ForwardProxy:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # --- how it works ---

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: writer.transport.abort())  # one that is cancelled before it begins closes nothing

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request a connection: whoever asks for http again connects again."""
        try:
            request = await _read_request(reader)
            if request is None:
                return
            self.requests.append(request)
            self._signal.notify()
            if self.refusal == "stall":
                await reader.read()
            elif self.refusal == "close":
                pass
            elif self.refusal is not None:
                await _say(writer, self.refusal)
            elif not self._lets_in(request):
                await _say(writer, 407, 'Proxy-Authenticate: Basic realm="proxy"\r\n')
            elif request.method == "CONNECT":
                await self._tunnel(request, reader, writer)
            else:
                await self._forward(request, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def _lets_in(self, request: Forwarded) -> bool:
        if self.credentials is None:
            return True
        wanted = base64.b64encode(":".join(self.credentials).encode()).decode()
        return request.headers.get("Proxy-Authorization") == f"Basic {wanted}"

    async def _open(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self.names.get(host, host), port, limit=MAX_HEAD)
        self.opened.append(authority(host, port))
        return reader, writer

    async def _tunnel(self, request: Forwarded, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = request.target.rpartition(":")
        try:
            there, back = await self._open(host.strip("[]"), int(port))
        except OSError:
            await _say(writer, 502)
            return
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        try:
            up = asyncio.create_task(_relay(reader, back))
            try:
                await _relay(there, writer)
            finally:
                up.cancel()
                await asyncio.gather(up, return_exceptions=True)
        finally:
            await _drop(back)

    async def _forward(self, request: Forwarded, writer: asyncio.StreamWriter) -> None:
        url = urlsplit(request.target)
        try:
            there, back = await self._open(url.hostname or "", url.port or 80)
        except OSError:
            await _say(writer, 502)
            return
        path = url._replace(scheme="", netloc="").geturl() or "/"
        fields = request.headers.without(*_HOP_BY_HOP).plus([("Connection", "close")])
        head = f"{request.method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields)
        try:
            back.write(f"{head}\r\n".encode("latin-1"))
            status = await there.readline()
            writer.write(status + b"Connection: close\r\n" if status else b"")
            await _relay(there, writer)
        finally:
            await _drop(back)


async def _read_request(reader: asyncio.StreamReader) -> Forwarded | None:
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    line, *rest = raw[:-4].decode("latin-1").split("\r\n")
    method, target, _ = line.split(" ", 2)
    fields = (field.partition(":") for field in rest)
    return Forwarded(method, target, Headers((name, value.strip(" \t")) for name, _, value in fields), raw)


async def _relay(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(65536):
        sink.write(data)
        await sink.drain()
    if sink.can_write_eof():
        sink.write_eof()


async def _say(writer: asyncio.StreamWriter, status: int, fields: str = "") -> None:
    page = b"<html>the proxy says no</html>"
    head = (
        f"HTTP/1.1 {status} Proxy\r\n{fields}Content-Type: text/html\r\nContent-Length: {len(page)}\r\nConnection: close\r\n"
    )
    writer.write(f"{head}\r\n".encode() + page)
    await writer.drain()


async def _drop(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
