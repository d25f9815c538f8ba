"""The second listener, for those who run the cache: health, readiness, figures. On loopback unless configured otherwise.

No upstream is asked for any of it: a dead registry must not get the cache restarted.
"""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from proxy.listener import Listener
from proxy.metrics import Metrics
from proxy.send import COMMON_HEADERS

_TEXT = "text/plain; charset=utf-8"
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def listener(metrics: Metrics, is_ready: Callable[[], bool]) -> Listener:
    """``/healthz``: the event loop turns; ``/readyz``: no stop was asked for; ``/metrics``."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        status, body, kind = 404, b"not found\n", _TEXT
        if request.method not in ("GET", "HEAD"):
            status, body = 405, b"read only\n"
        elif request.rel_url.raw_path == "/healthz":
            status, body = 200, b"ok\n"
        elif request.rel_url.raw_path == "/readyz":
            status, body = (200, b"ready\n") if is_ready() else (503, b"not ready\n")
        elif request.rel_url.raw_path == "/metrics":
            status, body, kind = 200, metrics.render(), _PROMETHEUS
        return web.Response(status=status, body=body, headers=COMMON_HEADERS | {"Content-Type": kind, "Allow": "GET, HEAD"})

    return Listener(answer, metrics)
