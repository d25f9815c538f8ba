"""An HTTP/1.1 client for black-box checks that sees how each response really ended."""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from ssl import SSLContext
from types import TracebackType
from typing import Literal

from .messages import Headers
from .recorder import authority
from .waiting import PATIENCE

MAX_HEAD = 1 << 18
MAX_AHEAD = 1 << 20
READ = 65536
HEX = re.compile(rb"[0-9A-Fa-f]{1,15}")


class NoResponse(ConnectionError):
    """The connection ended, or spoke something else, before a response head was complete."""

    def __init__(self, why: str, partial: bytes) -> None:
        super().__init__(f"{why} after {len(partial)} bytes")
        self.why = why
        self.partial = partial


@dataclass(frozen=True)
class WireResponse:
    """A response as seen on the wire; `clean_end` only if its framing was completed, and `why` in words.

    `extra` is what arrived beyond the end of the response.
    """

    version: str
    status: int
    reason: str
    headers: Headers
    body: bytes
    clean_end: bool
    why: str
    extra: bytes = b""


class Wire(asyncio.Protocol):
    """A bare connection; `ending` tells how the other side ended it.

    It is read only on demand, but on TLS up to MAX_AHEAD, as a reset there takes unread bytes with it.
    """

    def __init__(self, within: float = PATIENCE) -> None:
        self.buffer = bytearray()
        self.ending: Literal["fin", "rst"] | None = None
        self.within = within
        self._news = asyncio.Event()
        self._closed = asyncio.Event()
        self._transport: asyncio.Transport | None = None
        self._secure = False

    async def send(self, data: bytes) -> None:
        """Send any bytes; they may still be on their way on return."""
        if self.transport.is_closing():
            raise ConnectionResetError("the connection is closed")
        self.transport.write(data)

    async def more(self) -> bool:
        """Wait until the buffer has grown; False once nothing more can come."""
        if self.ending is not None:
            return False
        size = len(self.buffer)
        self._news.clear()
        self.transport.resume_reading()
        async with asyncio.timeout(self.within):
            while len(self.buffer) == size and self.ending is None:
                await self._news.wait()
                self._news.clear()
        return len(self.buffer) > size

    async def receive(self, size: int) -> bytes:
        """Some bytes, at most this many; none at the end."""
        while not self.buffer and await self.more():
            pass
        return self.take(size)

    async def line(self, limit: int = READ) -> bytes | None:
        """The next line without its CRLF, or None if the connection ends within it."""
        while (end := self.buffer.find(b"\r\n")) < 0 and len(self.buffer) < limit:
            if not await self.more():
                return None
        if end < 0:
            return None
        line = self.take(end + 2)
        return line[:-2]

    def take(self, size: int) -> bytes:
        """Up to this many bytes of what is already here."""
        taken = bytes(self.buffer[:size])
        del self.buffer[:size]
        return taken

    async def finish_sending(self) -> None:
        """Send a FIN, and go on reading."""
        self.transport.write_eof()

    async def close(self) -> None:
        """Hang up."""
        self.transport.close()
        try:
            async with asyncio.timeout(1):
                await self._closed.wait()
        except TimeoutError:
            self.transport.abort()
            await self._closed.wait()

    async def abort(self) -> None:
        """Hang up with a reset."""
        if not self._closed.is_set():
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()
        await self._closed.wait()

    async def __aenter__(self) -> Wire:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def transport(self) -> asyncio.Transport:
        """The transport underneath."""
        assert self._transport is not None, "not connected"
        return self._transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._secure = transport.get_extra_info("sslcontext") is not None

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if not self._secure or len(self.buffer) > MAX_AHEAD:
            self.transport.pause_reading()
        self._news.set()

    def eof_received(self) -> bool:
        self.ending = self.ending or "fin"
        self._news.set()
        return not self._secure

    def connection_lost(self, exc: Exception | None) -> None:
        self.ending = self.ending or ("fin" if exc is None else "rst")
        self._closed.set()
        self._news.set()


class Stream:
    """A response whose body is read on demand."""

    def __init__(self, wire: Wire, version: str, status: int, reason: str, headers: Headers, *, bodiless: bool) -> None:
        self.wire = wire
        self.version = version
        self.status = status
        self.reason = reason
        self.headers = headers
        self.clean_end = False
        self.why = ""
        self._chunked = headers.has("Transfer-Encoding")
        self._within_chunk = False
        self._remaining: int | None = None
        lengths = set(headers.getall("Content-Length"))
        if bodiless:
            self._end(True, "no body")
        elif self._chunked:
            self._remaining = 0
        elif len(lengths) > 1 or not all(length.isdecimal() for length in lengths):
            self._end(False, f"useless Content-Length: {sorted(lengths)}")
        elif lengths:
            self._remaining = int(lengths.pop())
            if self._remaining == 0:
                self._end(True, "length reached")

    async def read(self, size: int = READ) -> bytes:
        """Some bytes of the body, at most this many; none at its end, which `why` then explains."""
        if self.why:
            return b""
        if self._chunked and self._remaining == 0 and not await self._next_chunk():
            return b""
        data = await self.wire.receive(size if self._remaining is None else min(size, self._remaining))
        if not data:
            self._end_by_connection()
        elif self._remaining is not None:
            self._remaining -= len(data)
            if self._remaining == 0 and not self._chunked:
                self._end(True, "length reached")
        return data

    async def read_all(self, limit: int | None = None) -> bytes:
        """The rest of the body, or this many bytes of it."""
        body = bytearray()
        while limit is None or len(body) < limit:
            data = await self.read(READ if limit is None else min(READ, limit - len(body)))
            if not data:
                break
            body += data
        return bytes(body)

    async def close(self) -> None:
        """Hang up."""
        await self.wire.close()

    async def abort(self) -> None:
        """Hang up with a reset."""
        await self.wire.abort()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _end(self, clean: bool, why: str) -> None:
        self.clean_end, self.why = clean, why

    def _end_by_connection(self) -> None:
        how = self.wire.ending or "fin"
        if self._chunked:
            self._end(False, f"{how} before the final chunk")
        elif self._remaining is not None:
            self._end(False, f"{how} with {self._remaining} bytes missing")
        else:
            self._end(how == "fin", f"{how} of a body without length")

    async def _next_chunk(self) -> bool:
        """Go to the data of the next chunk; False if there is none."""
        if self._within_chunk and await self.wire.line() != b"":
            self._bad_chunk()
            return False
        size = (await self.wire.line() or b"").partition(b";")[0].strip()
        if not HEX.fullmatch(size):
            self._bad_chunk()
            return False
        self._remaining = int(size, 16)
        self._within_chunk = True
        if self._remaining > 0:
            return True
        while (trailer := await self.wire.line()) != b"":
            if trailer is None:
                self._bad_chunk()
                return False
        self._end(True, "final chunk seen")
        return False

    def _bad_chunk(self) -> None:
        if self.wire.ending is not None:
            self._end_by_connection()
        else:
            self._end(False, "malformed chunk")


async def open_wire(
    host: str,
    port: int,
    *,
    ssl: SSLContext | None = None,
    receive_buffer: int | None = None,
    within: float = PATIENCE,
) -> Wire:
    """Connect; `receive_buffer` limits what the kernel takes in before it is read, for slow readers."""
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setblocking(False)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        async with asyncio.timeout(within):
            await loop.sock_connect(sock, (host, port))
            _, wire = await loop.create_connection(
                lambda: Wire(within), sock=sock, ssl=ssl, server_hostname=host if ssl else None
            )
    except BaseException:
        sock.close()
        raise
    return wire


async def open_stream(
    host: str,
    port: int,
    method: str,
    target: str,
    headers: Iterable[tuple[str, str]] = (),
    *,
    body: bytes = b"",
    version: str = "1.1",
    ssl: SSLContext | None = None,
    receive_buffer: int | None = None,
    within: float = PATIENCE,
) -> Stream:
    """Send a request and read the head of the response, leaving the body to be read, or not.

    Host and Content-Length are added unless given. Raises NoResponse if no head arrives.
    """
    wire = await open_wire(host, port, ssl=ssl, receive_buffer=receive_buffer, within=within)
    try:
        async with asyncio.timeout(within):
            await wire.send(_request(authority(host, port), method, target, Headers(headers), body, version))
            return await read_head(wire, method)
    except BaseException:
        await wire.abort()
        raise


async def fetch(
    host: str,
    port: int,
    method: str,
    target: str,
    headers: Iterable[tuple[str, str]] = (),
    *,
    body: bytes = b"",
    version: str = "1.1",
    read_limit: int | None = None,
    ssl: SSLContext | None = None,
    within: float = PATIENCE,
) -> WireResponse:
    """One request on its own connection, and the response up to its end or to `read_limit` body bytes."""
    async with asyncio.timeout(within):
        stream = await open_stream(host, port, method, target, headers, body=body, version=version, ssl=ssl, within=within)
        async with stream:
            return await finish(stream, read_limit)


async def finish(stream: Stream, read_limit: int | None = None) -> WireResponse:
    """Read a stream to its end, or to a limit, and sum it up; the connection stays open."""
    body = await stream.read_all(read_limit)
    why = stream.why or "read limit reached"
    extra = stream.wire.take(READ) if stream.clean_end else b""
    return WireResponse(stream.version, stream.status, stream.reason, stream.headers, body, stream.clean_end, why, extra)


async def raw_exchange(
    host: str,
    port: int,
    data: bytes,
    *,
    until: bytes | None = None,
    ssl: SSLContext | None = None,
    limit: int = 1 << 20,
    within: float = PATIENCE,
) -> bytes:
    """Send any bytes; what comes back up to the close, up to a limit, or until it contains `until`."""
    wire = await open_wire(host, port, ssl=ssl, within=within)
    async with asyncio.timeout(within), wire:
        await wire.send(data)
        while (until is None or until not in wire.buffer) and len(wire.buffer) < limit:
            if not await wire.more():
                break
        return wire.take(limit)


def _request(host: str, method: str, target: str, headers: Headers, body: bytes, version: str) -> bytes:
    fields = headers if headers.has("Host") else Headers([("Host", host), *headers])
    if body and not fields.has("Content-Length") and not fields.has("Transfer-Encoding"):
        fields = fields.plus([("Content-Length", str(len(body)))])
    lines = [f"{method} {target} HTTP/{version}", *(f"{name}: {value}" for name, value in fields)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


async def read_head(wire: Wire, method: str) -> Stream:
    """Read the next response head of a connection, passing over interim ones."""
    while True:
        while (end := wire.buffer.find(b"\r\n\r\n")) < 0:
            if len(wire.buffer) > MAX_HEAD:
                raise NoResponse("endless head", bytes(wire.buffer))
            if not await wire.more():
                raise NoResponse(f"{wire.ending} before the end of the head", bytes(wire.buffer))
        head = wire.take(end + 4)
        line, *rest = head[:-4].decode("latin-1").split("\r\n")
        version, _, tail = line.partition(" ")
        code, _, reason = tail.partition(" ")
        if not version.startswith("HTTP/1.") or len(code) != 3 or not code.isdecimal():
            raise NoResponse("malformed status line", head)
        status = int(code)
        if status >= 200 or status == 101:
            break
    fields = (field.partition(":") for field in rest)
    headers = Headers((name, value.strip(" \t")) for name, _, value in fields)
    return Stream(wire, version, status, reason, headers, bodiless=method == "HEAD" or status in (101, 204, 304))
