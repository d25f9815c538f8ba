"""The second listener, for those who run the cache: health, readiness, figures. On loopback unless configured otherwise.

No upstream is asked for any of it: a dead registry must not get the cache restarted.
"""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from proxy.metrics import Metrics


def application(metrics: Metrics, is_ready: Callable[[], bool]) -> web.Application:
    """``/healthz``: the event loop turns; ``/readyz``: hits can be served, and no stop was asked for; ``/metrics``."""

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ready\n") if is_ready() else web.Response(status=503, text="not ready\n")

    async def figures(_: web.Request) -> web.Response:
        return web.Response(body=metrics.render(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", figures)])
    return app
