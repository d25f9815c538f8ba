"""Every request passes here once, in and out: method, route, errors to JSON, one log line, the counters."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Sequence

from aiohttp import web

from proxy.errors import NameUnknown, RegistryError, RequestInvalid, RequestTooLarge, Unsupported
from proxy.handlers import DECISION, Handler
from proxy.logs import printable
from proxy.metrics import Metrics
from proxy.send import BODY_BYTES, COMMON_HEADERS, TAKEN, BodyCut, cut

log = logging.getLogger(__name__)
access_log = logging.getLogger("proxy.access")

_MAX_IGNORED_BODY = 64 * 1024
_BODY_SECONDS = 10.0
_PRIVATE = COMMON_HEADERS | {"Cache-Control": "private, no-store", "Vary": "Authorization, Accept"}

Route = tuple[str, re.Pattern[str], Handler]
"""Kind of content (for the counters), the whole raw path, and who answers."""


class Edge:
    """Answers every request of the listener that clients use."""

    def __init__(self, routes: Sequence[Route], metrics: Metrics) -> None:
        self._routes = routes
        self._metrics = metrics

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answers one request. Raises only what ends the connection."""
        began = time.monotonic()
        identity = secrets.token_hex(8)
        kind, status, error = "other", "-", ""
        request[DECISION] = "none"
        try:
            if "Upgrade" in request.headers:  # it is not done; what aiohttp has read behind it would wait for ever
                request.protocol.close()
            await _ignore_body(request)
            kind, handler, match = self._route(request)
            response = await handler(request, match)
            status = str(response.status)
        except RegistryError as failure:
            status, error = str(failure.status), failure.message
            request[DECISION] = "error"
            response = render(failure, identity)
            if isinstance(failure, RequestTooLarge | RequestInvalid):
                response.force_close()
        except BodyCut as failure:
            status, error = "cut", str(failure)
            raise
        except (ConnectionError, asyncio.CancelledError):
            if (taken := request.get(TAKEN)) is not None:
                status = str(taken)
            else:
                status, error = "left", "the client has gone"
            raise
        except Exception as failure:
            status, error = "500", type(failure).__name__
            log.exception("request %s failed by a fault of pullcache", identity)
            if request.writer.output_size > 0:
                cut(request, reset=True)
                raise ConnectionResetError("failed after its headers") from failure
            response = render(RegistryError("pullcache failed; its log tells more under this request's id"), identity)
        finally:
            self._metrics.requests.labels(kind, request[DECISION], status).inc()
            self._log(request, identity, status, error, time.monotonic() - began)
        return response

    def _route(self, request: web.BaseRequest) -> tuple[str, Handler, re.Match[str]]:
        if request.method not in ("GET", "HEAD"):
            raise Unsupported("this registry is a cache: it can be read only", headers={"Allow": "GET, HEAD"})
        path = request.rel_url.raw_path
        for kind, pattern, handler in self._routes:
            if match := pattern.fullmatch(path):
                return kind, handler, match
        raise NameUnknown("this is a registry; its API is below /v2/")

    def _log(self, request: web.BaseRequest, identity: str, status: str, error: str, seconds: float) -> None:
        if not access_log.isEnabledFor(logging.INFO):
            return
        fields: dict[str, object] = {
            "id": identity,
            "client": request.remote or "-",
            "method": request.method,
            "path": request.rel_url.raw_path,
            "ns": request.rel_url.query.get("ns", ""),
            "status": status,
            "decision": request[DECISION],
            "bytes": request.get(BODY_BYTES, 0),
            "seconds": round(seconds, 4),
            "agent": request.headers.get("User-Agent", ""),
        }
        if error:
            fields["error"] = error
        access_log.info("request", extra={"fields": fields})


async def _ignore_body(request: web.BaseRequest) -> None:
    """A body has no meaning here: a small one is drained (OCI conformance sends one), a large one refused."""
    if not request.body_exists:
        return
    taken = 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for data in request.content.iter_any():
                taken += len(data)
                if taken > _MAX_IGNORED_BODY:
                    raise RequestTooLarge("a request to this registry needs no body")
    except TimeoutError as error:
        raise RequestTooLarge("the request's body did not come in time; none is needed") from error


def render(error: RegistryError, identity: str) -> web.Response:
    """The JSON of an error (OCI distribution spec, "Error Codes"); the input is not repeated in it."""
    body = {"errors": [{"code": error.code, "message": printable(error.message, 1024), "detail": {"request": identity}}]}
    headers = _PRIVATE | {"X-Request-Id": identity} | error.headers
    return web.Response(
        status=error.status, body=json.dumps(body).encode(), content_type="application/json", headers=headers
    )
