"""Content to a client: one sender for what is held, what is arriving, and what is in memory.

Bytes in a file go out by ``sendfile`` from the event loop, a megabyte at a time, without a thread and without passing
through Python, unless TLS has to see them; aiohttp writes the headers and all else. A client that takes next
to nothing is cut.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Coroutine
from typing import Any

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

from proxy.answers import Answer
from proxy.errors import CacheFailing, RegistryError
from proxy.metrics import Metrics
from proxy.policy import Decision, age_header
from proxy.ranges import Range, Span
from proxy.storage.base import Content, FileSpan

_AT_ONCE = 1024 * 1024
_CHUNK = 256 * 1024
_SLOW_BYTES = 1024
_SLOW_SECONDS = 60.0
_CLOSE_WAIT = 8  # tcp_states.h
_GOODBYE = 31  # bytes of a close_notify on the wire, at most: TLS 1.2 with AES-GCM; 1.3 takes 24


BODY_BYTES = web.RequestKey("body_bytes", int)
"""How much of a body a client was given."""


TAKEN = web.RequestKey("taken", int)
"""The status of an answer that the client took whole before it closed: podman closes after each."""


class BodyCut(ConnectionResetError):
    """The body was ended short on purpose: its end could not be vouched for."""


COMMON_HEADERS = {
    "Server": "pullcache",
    "X-Content-Type-Options": "nosniff",
    "Docker-Distribution-Api-Version": "registry/2.0",
}
"""On every response."""


DECISION_HEADER = "Pullcache-Decision"
"""On every response of the registry API: one word of ``policy.Decision``."""


PRIVATE = {"Cache-Control": "private, no-store", "Vary": "Authorization, Accept"}
"""On what is for one client only: errors, and whatever was served after a right was checked."""


def headers_of(answer: Answer) -> dict[str, str]:
    """The headers that describe an answer, whatever part of it is sent."""
    headers = COMMON_HEADERS | {
        **answer.headers,
        "Content-Type": answer.media_type,
        "Docker-Content-Digest": str(answer.digest),
        "ETag": f'"{answer.digest}"',
        "Accept-Ranges": "bytes",
        "Cache-Status": f"pullcache; {_CACHE_STATUS[answer.decision]}",
        DECISION_HEADER: answer.decision,
        "Age": age_header(answer.age),
    }
    if answer.is_private:
        headers |= PRIVATE
    elif answer.changes:
        headers |= {"Cache-Control": "no-cache", "Vary": "Accept"}
    else:
        headers["Cache-Control"] = "public, max-age=31536000, immutable"
    if answer.warning is not None:
        text = answer.warning.encode("ascii", "replace").decode().replace("\\", "\\\\").replace('"', '\\"')
        headers["Warning"] = f'299 - "{text}"'
    return headers


_CACHE_STATUS: dict[Decision, str] = {  # RFC 9211; an error has none
    "hit": "hit",
    "revalidated": "hit; detail=revalidated",
    "refreshed": "fwd=stale",
    "miss": "fwd=miss",
    "followed": "fwd=miss; collapsed",
    "stale": "hit; detail=stale",
}


async def send(request: web.BaseRequest, answer: Answer, asked: Range | None, metrics: Metrics) -> web.StreamResponse:
    """Answers ``request``; raises ``RegistryError`` before the headers, ``BodyCut`` after them."""
    headers = headers_of(answer)
    if _matches(request.headers.get("If-None-Match"), answer):
        del headers["Content-Type"]
        return await _head_only(request, 304, headers, None)
    span = asked.within(answer.size) if asked and answer.size is not None else None
    status = 206 if span else 200
    if span:
        headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{answer.size}"
    length = span.stop - span.start if span else answer.size
    if request.method == "HEAD" or answer.content is None:
        return await _head_only(request, status, headers, length)
    response = web.StreamResponse(status=status, headers=headers)
    if length is not None:
        response.content_length = length
    elif request.version < HttpVersion11:
        response.force_close()
    await response.prepare(request)
    closes = length is None and request.version < HttpVersion11
    if closes:
        _linger(request, on=True)  # until the whole is sent, whatever ends the connection resets it
    try:
        whole = Span(0, length) if length is not None else None
        await _send_body(request, response, answer.content, span or whole, metrics)
    except RegistryError as error:
        metrics.aborted.inc()
        cut(request, reset=closes)
        raise BodyCut(str(error)) from error
    if closes:
        _linger(request, on=False)
    return response


def _linger(request: web.BaseRequest, *, on: bool) -> None:
    if request.transport is not None:
        option = struct.pack("ii", int(on), 0)
        request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)


def cut(request: web.BaseRequest, *, reset: bool) -> None:
    """Ends the connection so that the client sees that its body is not whole."""
    transport = request.transport
    if transport is None:
        return
    if reset:  # without length and chunks a plain close would look like the end
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


async def _head_only(
    request: web.BaseRequest, status: int, headers: dict[str, str], length: int | None
) -> web.StreamResponse:
    response = web.StreamResponse(status=status, headers=headers)
    if length is not None:
        response.content_length = length
    await response.prepare(request)
    await response.write_eof()
    return response


async def _send_body(
    request: web.BaseRequest, response: web.StreamResponse, content: Content, span: Span | None, metrics: Metrics
) -> None:
    start, stop = (span.start, span.stop) if span else (0, None)
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client has gone")
    transport.set_write_buffer_limits(high=1)  # 0 would stop a TLS transport for good
    with _Socket(transport, request.writer, metrics) as wire:
        async for piece in content.read(start, stop):
            if isinstance(piece, bytes):
                await wire.patiently(response.write(piece))
            elif stop is None or not wire.takes_files:  # chunks, which aiohttp frames, or TLS
                for offset in range(piece.offset, piece.offset + piece.count, _CHUNK):
                    count = min(_CHUNK, piece.offset + piece.count - offset)
                    if len(data := os.pread(piece.descriptor, count, offset)) != count:
                        raise CacheFailing("a file in the cache directory was cut short")
                    await wire.patiently(response.write(data))
            else:
                await wire.send_file(piece)
            count = len(piece) if isinstance(piece, bytes) else piece.count
            request[BODY_BYTES] = request.get(BODY_BYTES, 0) + count
            metrics.sent_bytes.inc(count)
        try:
            await wire.patiently(response.write_eof())
            await wire.patiently(request.writer.drain())  # aiohttp leaves what is below 64 KiB an answer in its buffer
        except (ConnectionError, asyncio.CancelledError):
            if wire.all_taken():
                request[TAKEN] = response.status
            raise


class _Socket:
    """The client's socket, by a descriptor of our own: the event loop keeps reading from the other, and so sees the
    client leave while we wait for room."""

    def __init__(self, transport: asyncio.Transport, writer: AbstractStreamWriter, metrics: Metrics) -> None:
        self._transport = transport
        self.takes_files = transport.get_extra_info("sslcontext") is None  # sendfile would write past TLS, in the clear
        self._writer = writer
        self._metrics = metrics
        try:
            self._socket = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        except OSError as error:
            raise CacheFailing("pullcache has too many files open; raise its limit (ulimit -n)") from error
        self._descriptor = self._socket.fileno()

    def __enter__(self) -> _Socket:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    async def send_file(self, piece: FileSpan) -> None:
        """Sends bytes of a file; raises ``ConnectionError`` when the client has gone."""
        if self._transport.get_write_buffer_size():
            await self.patiently(self._writer.drain())  # what was written before must be sent before
        offset, end = piece.offset, piece.offset + piece.count
        while offset < end:
            if self._transport.is_closing():
                raise ConnectionResetError("the client has gone")
            try:
                sent = os.sendfile(self._descriptor, piece.descriptor, offset, min(_AT_ONCE, end - offset))
            except BlockingIOError:
                await self.patiently(self._room())
                continue
            except ConnectionError:
                raise
            except OSError as error:
                raise CacheFailing(f"the cache directory cannot be read: {error.strerror}") from error
            if sent == 0:
                raise CacheFailing("a file in the cache directory was cut short")
            offset += sent
            if offset < end:
                await asyncio.sleep(0)  # one client's speed is not another's wait

    async def patiently(self, writing: Coroutine[Any, Any, None]) -> None:
        """Waits for ``writing`` as long as the client goes on taking something; cuts it otherwise."""
        task = asyncio.ensure_future(writing)
        try:
            left = self._left()
            while not (await asyncio.wait({task}, timeout=_SLOW_SECONDS))[0]:
                before, left = left, self._left()
                if before - left < _SLOW_BYTES:
                    self._metrics.slow_readers.inc()
                    self._transport.abort()
                    raise ConnectionResetError("the client takes too little")
            await task
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
            if not task.cancelled():
                task.exception()  # we may have been cancelled: its failure is then nobody's

    async def _room(self) -> None:
        loop = asyncio.get_running_loop()
        writable = loop.create_future()

        def wake() -> None:
            if not writable.done():
                writable.set_result(None)

        loop.add_writer(self._descriptor, wake)
        try:
            await writable
        finally:
            loop.remove_writer(self._descriptor)

    def all_taken(self) -> bool:
        """Whether the client has acknowledged all that it was given and closed in good order, without a reset.

        Over TLS our goodbye, which answers the client's alone, may still be on its way, or have come to a closed door.
        """
        state = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        left = self._left()
        return (left == 0 and state == _CLOSE_WAIT) or (not self.takes_files and 0 < left <= _GOODBYE)

    def _left(self) -> int:
        """Bytes that the client has not yet taken of what was given to it (``SIOCOUTQ``, tcp(7), and the transport's)."""
        queued = fcntl.ioctl(self._descriptor, termios.TIOCOUTQ, b"\0\0\0\0")
        waiting = 0 if self._transport.is_closing() else self._transport.get_write_buffer_size()
        return int(struct.unpack("i", queued)[0]) + waiting


def _matches(header: str | None, answer: Answer) -> bool:
    if header is None:
        return False
    tags = {item.strip().removeprefix("W/") for item in header.split(",")}
    return "*" in tags or f'"{answer.digest}"' in tags
