"""Every request passes here once, in and out: method, route, errors to JSON, one log line, the counters."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web

from proxy.access.caller import Caller
from proxy.access.gate import Gate
from proxy.certificates import user_of
from proxy.errors import NameUnknown, RegistryError, RequestInvalid, RequestTooLarge, Unsupported
from proxy.handlers import CALLER, DECISION, Handler, authorization_of
from proxy.logs import printable
from proxy.metrics import Metrics
from proxy.policy import age_header, decision_of
from proxy.send import BODY_BYTES, COMMON_HEADERS, DECISION_HEADER, PRIVATE, TAKEN, BodyCut, cut

log = logging.getLogger(__name__)
access_log = logging.getLogger("proxy.access")

_MAX_IGNORED_BODY = 64 * 1024
_MAX_FORM = 64 * 1024
_BODY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Route:
    """Kind of content (for the counters), the whole raw path, and who answers.

    ``is_open``: who the client is does not matter. ``takes_form``: POST is offered, and its body read.
    """

    kind: str
    path: re.Pattern[str]
    handler: Handler
    is_open: bool = False
    takes_form: bool = False

    def methods(self) -> tuple[str, ...]:
        """What is offered there."""
        return ("GET", "HEAD", "POST") if self.takes_form else ("GET", "HEAD")


class Edge:
    """Answers every request of the listener that clients use. ``is_fronted``: what stands in front says who they are."""

    def __init__(self, routes: Sequence[Route], gate: Gate, metrics: Metrics, *, is_fronted: bool = False) -> None:
        self._routes = routes
        self._gate = gate
        self._metrics = metrics
        self._is_fronted = is_fronted

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answers one request. Raises only what ends the connection."""
        began = time.monotonic()
        identity = secrets.token_hex(8)
        kind, status, error = "other", "-", ""
        request[DECISION] = "none"
        try:
            if "Upgrade" in request.headers:  # it is not done; what aiohttp has read behind it would wait for ever
                request.protocol.close()
            found = self._find(request)
            if found is not None and found[0].takes_form and request.method == "POST":
                _check_form(request)
            else:
                await _ignore_body(request)
            route, match = _offered(request, found)
            kind = route.kind
            request[CALLER] = await self._caller(request, is_open=route.is_open)
            response = await route.handler(request, match)
            status = str(response.status)
        except RegistryError as failure:
            status, error = str(failure.status), failure.message
            request[DECISION] = decision_of(failure)
            response = render(failure, identity)
            if isinstance(failure, RequestTooLarge | RequestInvalid):
                response.force_close()
        except BodyCut as failure:
            status, error = "cut", str(failure)
            raise
        except (ConnectionError, asyncio.CancelledError) as failure:
            if (taken := request.get(TAKEN)) is not None:
                status = str(taken)
            elif isinstance(failure, asyncio.CancelledError) and getattr(request.protocol, "is_ended", False):
                status, error = "cut", "pullcache is stopping"
            else:
                status, error = "left", "the client has gone"
            raise
        except Exception as failure:
            status, error = "500", type(failure).__name__
            log.exception("request %s failed by a fault of pullcache", identity)
            if request.writer.output_size > 0:
                cut(request, reset=True)
                raise ConnectionResetError("failed after its headers") from failure
            fault = RegistryError("pullcache failed; its log tells more under this request's id")
            request[DECISION] = decision_of(fault)
            response = render(fault, identity)
        finally:
            self._metrics.requests.labels(kind, request[DECISION], status).inc()
            self._log(request, identity, status, error, time.monotonic() - began)
        return response

    def _find(self, request: web.BaseRequest) -> tuple[Route, re.Match[str]] | None:
        path = request.rel_url.raw_path
        return next(((route, match) for route in self._routes if (match := route.path.fullmatch(path))), None)

    async def _caller(self, request: web.BaseRequest, *, is_open: bool) -> Caller:
        address = request.remote or "-"
        if self._is_fronted:  # the last one is what the front has written; what is before it anybody can write
            address = request.headers.getall("X-Forwarded-For", [""])[-1].rpartition(",")[2].strip()[:64] or address
        if is_open:
            return Caller(address)
        certificate = request.transport.get_extra_info("peercert") if request.transport is not None else None
        return await self._gate.admit(address, authorization_of(request), user_of(certificate))

    def _log(self, request: web.BaseRequest, identity: str, status: str, error: str, seconds: float) -> None:
        if not access_log.isEnabledFor(logging.INFO):
            return
        fields: dict[str, object] = {
            "id": identity,
            "client": caller.address if (caller := request.get(CALLER)) else request.remote or "-",
            "method": request.method,
            "path": request.rel_url.raw_path,
            "ns": request.rel_url.query.get("ns", ""),
            "status": status,
            "decision": request[DECISION],
            "bytes": request.get(BODY_BYTES, 0),
            "seconds": round(seconds, 4),
            "agent": request.headers.get("User-Agent", ""),
        }
        if caller is not None and caller.user is not None:
            fields["user"] = caller.user
        if error:
            fields["error"] = error
        access_log.info("request", extra={"fields": fields})


def _offered(request: web.BaseRequest, found: tuple[Route, re.Match[str]] | None) -> tuple[Route, re.Match[str]]:
    methods = found[0].methods() if found else ("GET", "HEAD")
    if request.method not in methods:
        raise Unsupported("this registry is a cache: it can be read only", headers={"Allow": ", ".join(methods)})
    if found is None:
        raise NameUnknown("this is a registry; its API is below /v2/")
    return found


def _check_form(request: web.BaseRequest) -> None:
    if request.content_length is None or request.content_length > _MAX_FORM:
        raise RequestTooLarge(f"a form of at most {_MAX_FORM} bytes is taken, with its length")


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
    described = {"X-Request-Id": identity, DECISION_HEADER: decision_of(error), "Age": age_header(error.age)}
    headers = COMMON_HEADERS | PRIVATE | described | error.headers
    response = web.Response(
        status=error.status, body=json.dumps(body).encode(), content_type="application/json", headers=headers
    )
    for challenge in error.challenges:  # a line each: containerd reads one scheme a line
        response.headers.add("WWW-Authenticate", challenge)
    return response
