"""Sockets and signals: listens, says so, looks at changed files on SIGHUP, lets running answers finish on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable

from aiohttp import http_parser, http_writer, web

from proxy import admin, app
from proxy.certificates import ServerTLS
from proxy.config.model import Config
from proxy.config.values import Address

log = logging.getLogger(__name__)

GRACE_SECONDS = 25.0


class CannotStart(Exception):
    """The program cannot serve here; the text says why and what to do."""


def check_libraries() -> None:
    """Refuses to run on aiohttp's pure Python parser, which accepts what the compiled one refuses (request smuggling)."""
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy or http_writer._serialize_headers is (
        http_writer._py_serialize_headers
    ):
        raise CannotStart(
            "aiohttp runs without its compiled extensions; unset AIOHTTP_NO_EXTENSIONS and install aiohttp from a wheel"
        )


async def serve(config: Config, announce: Callable[[Config], None]) -> None:
    """Serves until a signal asks to stop. ``announce`` is called once the listeners are open."""
    check_libraries()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with app.build(config) as cache:
        loop.add_signal_handler(signal.SIGHUP, cache.reload)
        admin_runner = web.ServerRunner(
            admin.listener(cache.metrics, lambda: not stop.is_set(), cache.actions, cache.admin_token), shutdown_timeout=1
        )
        runner = web.ServerRunner(
            cache.listener, shutdown_timeout=GRACE_SECONDS / 2
        )  # spent twice: on the answer, then on its connection
        try:
            await _listen(admin_runner, config.admin, "admin", cache.admin_tls)
            await _listen(runner, config.listen, "listen", cache.tls)
            announce(config)
            await stop.wait()
            log.info("stopping: answers that are running have %g s to finish", GRACE_SECONDS)
        finally:
            await runner.cleanup()
            await admin_runner.cleanup()


async def _listen(runner: web.BaseRunner, address: Address, key: str, tls: ServerTLS | None) -> None:
    await runner.setup()
    try:
        await web.TCPSite(runner, address.host or None, address.port, ssl_context=tls.context if tls else None).start()
    except OSError as error:
        raise CannotStart(f"{key}: {address} cannot be listened on: {error.strerror}; choose another address") from error
