"""Outermost: the connections of clients, and the bounds on what each may hold.

aiohttp's low-level server with connections counted, a deadline for each header block, and a page of our own for what is
not HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from proxy.edge import render
from proxy.errors import RegistryError, RequestInvalid
from proxy.metrics import Metrics

log = logging.getLogger(__name__)

HEADER_SECONDS = 15.0
IDLE_SECONDS = 60.0
MAX_CONNECTIONS = 4096
MAX_PER_ADDRESS = 256


class Connection(RequestHandler):
    """One client connection, with a deadline for each header block and our own page for what is not HTTP."""

    __slots__ = ("_deadline", "is_ended")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self.is_ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        if self._deadline is None and self._current_request is None:
            self._expect()
        super().data_received(data)
        if self._messages or self._current_request is not None:
            self._forget()

    def force_close(self) -> None:
        """Ends it from our side: where its answer is then cut, it is not the client who has left."""
        self.is_ended = self.transport is not None and not self.transport.is_closing()
        super().force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """aiohttp's own page would quote the header that is at fault, credentials included."""
        if request.writer.output_size > 0:
            raise ConnectionError("failed after its headers")
        fault = RequestInvalid("the request is not valid HTTP") if status == 400 else RegistryError("pullcache failed")
        if status != 400:
            log.error("a request failed outside its handler", exc_info=exc)
        response = render(fault, "-")
        response.force_close()
        return response

    def _expect(self) -> None:
        self._deadline = asyncio.get_running_loop().call_later(HEADER_SECONDS, self._late)

    def _late(self) -> None:
        self._deadline = None
        if self._current_request is None and self.transport is not None:
            self.transport.abort()

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Listener(web.Server):
    """aiohttp's low-level server with bounds: connections in all and for each address, sizes, idle time."""

    def __init__(self, handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]], metrics: Metrics) -> None:
        super().__init__(
            handler,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=IDLE_SECONDS,
            lingering_time=0,
            max_line_size=8190,
            max_field_size=16 * 1024,
            max_headers=64,
            auto_decompress=False,
        )
        self._metrics = metrics
        self._addresses: Counter[str] = Counter()
        self._open: dict[object, str] = {}

    def __call__(self) -> RequestHandler:
        return Connection(self, loop=self._loop, **self._kwargs)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Counts a connection in, or turns it away."""
        super().connection_made(handler, transport)
        address = str((transport.get_extra_info("peername") or ("",))[0])
        self._open[handler] = address
        self._addresses[address] += 1
        self._metrics.connections.inc()
        if len(self._open) > MAX_CONNECTIONS or self._addresses[address] > MAX_PER_ADDRESS:
            self._metrics.turned_away.inc()
            transport.abort()

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Counts a connection out."""
        super().connection_lost(handler, exc)
        if (address := self._open.pop(handler, None)) is not None:
            self._metrics.connections.dec()
            self._addresses[address] -= 1
            if not self._addresses[address]:
                del self._addresses[address]
