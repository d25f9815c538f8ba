"""One accepted connection of the scripted registry: requests come in, answers go out byte by byte."""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from http import HTTPStatus

from .messages import BEFORE_HEADERS, Answer, Cut, Ending, Gate, Headers, Pace, Request
from .waiting import PATIENCE

MAX_HEAD = 1 << 17
MAX_BODY = 1 << 24
SLICE = 65536
TICKS_PER_SECOND = 10
TCP_NOTSENT_LOWAT = 25
SIOCOUTQNSD = 0x894B


class Over(Exception):
    """The connection has come to the end its script wanted."""


class Malformed(Exception):
    """What came in is not an HTTP/1.1 request."""


class Peer(asyncio.StreamReaderProtocol):
    """A connection from a client; `gone` is set once the client has left, `lost` once it is all over."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.gone = asyncio.Event()
        self.lost = asyncio.Event()
        self._reader = asyncio.StreamReader(limit=MAX_HEAD)
        self._wire: asyncio.StreamWriter | None = None
        super().__init__(self._reader)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert isinstance(transport, asyncio.Transport)
        secure = transport.get_extra_info("sslcontext") is not None
        transport.set_write_buffer_limits(high=1 if secure else 0, low=0)
        self._wire = asyncio.StreamWriter(transport, self, self._reader, asyncio.get_running_loop())

    def eof_received(self) -> bool | None:
        self.gone.set()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.gone.set()
        self.lost.set()

    # --- coming in ---

    async def read_request(self) -> Request | None:
        """The next request, or None when the client has left instead of sending one."""
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as short:
            if short.partial:
                raise Malformed from short
            return None
        except asyncio.LimitOverrunError as long:
            raise Malformed from long
        line, *rest = head[:-4].decode("latin-1").split("\r\n")
        words = line.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1.") or not all(":" in field for field in rest):
            raise Malformed
        fields = (field.partition(":") for field in rest)
        headers = Headers((name, value.strip(" \t")) for name, _, value in fields)
        request = Request(words[0], words[1], headers, b"", words[2], self.number, head)
        body, wire = await self._read_body(headers)
        return replace(request, body=body, raw=head + wire)

    async def _read_body(self, headers: Headers) -> tuple[bytes, bytes]:
        """The decoded body, and its bytes on the wire."""
        try:
            if "chunked" in (headers.get("Transfer-Encoding") or "").lower():
                return await self._read_chunks()
            length = int(headers.get("Content-Length") or 0)
            if not 0 <= length <= MAX_BODY:
                raise Malformed
            body = await self._reader.readexactly(length)
            return body, body
        except (ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise Malformed from error

    async def _read_chunks(self) -> tuple[bytes, bytes]:
        body, wire = b"", b""
        while True:
            line = await self._reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            if not 0 <= size <= MAX_BODY - len(body):
                raise Malformed
            data = await self._reader.readexactly(size + 2) if size else b""
            body, wire = body + data[:-2], wire + line + data
            if not size:
                break
        while True:
            line = await self._reader.readuntil(b"\r\n")
            wire += line
            if line == b"\r\n":
                return body, wire

    # --- going out ---

    async def write(self, data: bytes) -> None:
        """Hand bytes over to the kernel, all of them."""
        if self._wire is None or self._wire.is_closing():
            raise ConnectionResetError
        self._wire.write(data)
        await self._wire.drain()

    async def end(self, how: Ending) -> None:
        """End the connection; on TLS, a FIN is preceded by a proper close of the session."""
        match how:
            case "fin":
                if self._wire is not None:
                    self._wire.close()
                    await self.lost.wait()
            case "rst":
                await self._all_sent()
                self._sock_option(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                await self.close()
            case "stall":
                await self.gone.wait()

    async def close(self) -> None:
        """Drop the connection at once."""
        if self._wire is not None:
            self._wire.transport.abort()
            await self.lost.wait()

    def _sock_option(self, level: int, option: int, value: int | bytes) -> None:
        if self._wire is not None and not self.lost.is_set():
            self._wire.get_extra_info("socket").setsockopt(level, option, value)

    async def _all_sent(self) -> None:
        """Wait until the kernel has sent everything: a reset throws away what it still holds."""
        if sys.platform != "linux" or self._wire is None or self.lost.is_set():
            return
        loop = asyncio.get_running_loop()
        sent = asyncio.Event()
        self._sock_option(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, 1)
        twin = os.dup(self._wire.get_extra_info("socket").fileno())

        def look() -> None:
            unsent = array.array("i", [0])
            fcntl.ioctl(twin, SIOCOUTQNSD, unsent)
            if not unsent[0] or self.lost.is_set():
                sent.set()

        loop.add_writer(twin, look)
        try:
            await sent.wait()
        finally:
            loop.remove_writer(twin)
            os.close(twin)


class Delivery:
    """One answer on its way to a client."""

    def __init__(self, peer: Peer, request: Request, answer: Answer, on_body: Callable[[int], None]) -> None:
        self._peer = peer
        self._request = request
        self._answer = answer
        self._on_body = on_body
        self._sent = 0
        self._pending = sorted((fault for fault in answer.faults if not isinstance(fault, Pace)), key=lambda fault: fault.at)
        self._pace = min((f.bytes_per_second for f in answer.faults if isinstance(f, Pace)), default=None)

    async def run(self) -> bool:
        """Send it all; True if the connection can carry another answer. Raises Over when a fault ended it."""
        await self._reach(BEFORE_HEADERS)
        await self._peer.write(self._head())
        await self._reach(0)
        if self._answer.verbatim is None and not self._bodiless():
            async for piece in self._pieces():
                await self._send(piece)
            if self._answer.framing == "chunked":
                await self._peer.write(b"0\r\n\r\n")
            claimed = self._answer.content_length
            if self._answer.framing == "length" and claimed is not None and claimed > self._sent:
                return False
        return self._answer.framing != "close"

    def _bodiless(self) -> bool:
        status = self._answer.status
        return self._request.method == "HEAD" or status < 200 or status in (204, 304)

    def _head(self) -> bytes:
        answer = self._answer
        if answer.verbatim is not None:
            return answer.verbatim
        match answer.framing:
            case "chunked":
                framing = ("Transfer-Encoding", "chunked")
            case "close":
                framing = ("Connection", "close")
            case "length":
                length = len(answer.payload) if answer.content_length is None else answer.content_length
                framing = ("Content-Length", str(length))
        try:
            reason = HTTPStatus(answer.status).phrase
        except ValueError:
            reason = "Unknown"
        lines = [
            f"HTTP/1.1 {answer.status} {reason}",
            *(f"{k}: {v}" for k, v in answer.headers.plus([framing])),
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    async def _pieces(self) -> AsyncIterator[bytes]:
        """The body, cut into chunks or into writes of a sensible size."""
        size = self._answer.chunk_size if self._answer.framing == "chunked" else SLICE
        body = self._answer.body
        if isinstance(body, bytes):
            for start in range(0, len(body), size):
                yield body[start : start + size]
        else:
            async for piece in body():
                if piece:
                    yield piece

    async def _send(self, piece: bytes) -> None:
        """Send one piece, as one chunk if chunked, stopping at the faults within it."""
        chunked = self._answer.framing == "chunked"
        prefix = b"%x\r\n" % len(piece) if chunked else b""
        while piece:
            size = self._until_next_stop(len(piece))
            part, piece = piece[:size], piece[size:]
            if self._pace is not None:
                await self._rest(len(part) / self._pace)
            suffix = b"\r\n" if chunked and not piece else b""
            await self._peer.write(prefix + part + suffix)
            prefix = b""
            self._sent += len(part)
            self._on_body(len(part))
            await self._reach(self._sent)

    def _until_next_stop(self, limit: int) -> int:
        if self._pace is not None:
            limit = min(limit, max(self._pace // TICKS_PER_SECOND, 1))
        if self._pending:
            limit = min(limit, self._pending[0].at - self._sent)
        return limit

    async def _reach(self, position: int) -> None:
        """Let happen what is due at this point of the body."""
        while self._pending and self._pending[0].at <= position:
            match self._pending.pop(0):
                case Gate(event=event):
                    await self._hold(event)
                case Cut(how=how):
                    await self._peer.end(how)
                    raise Over

    async def _hold(self, event: asyncio.Event) -> None:
        waits = [asyncio.create_task(event.wait()), asyncio.create_task(self._peer.gone.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if not event.is_set():
            raise Over

    async def _rest(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(min(seconds, PATIENCE)):
                await self._peer.gone.wait()
        except TimeoutError:
            return
        raise Over
