"""The endpoints of the registry API (OCI distribution spec 1.1.1): parse, ask ``pull`` or ``discovery``, send."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from re import Match

from aiohttp import web

from proxy.answers import Answer, Target
from proxy.discovery import Asked, Discovery
from proxy.errors import LoopDetected, NameUnknown
from proxy.listings import parse_query
from proxy.logs import printable
from proxy.metrics import Metrics
from proxy.names import Digest, parse_digest, parse_reference
from proxy.policy import Routes, classify_accept, route
from proxy.pull import Pull
from proxy.ranges import Range, parse_range
from proxy.send import COMMON_HEADERS, send

Handler = Callable[[web.BaseRequest, "Match[str]"], Awaitable[web.StreamResponse]]

DECISION = web.RequestKey("decision", str)
"""What was decided about a request, for its log line and the counters."""

_MAX_VIA = 1024
_MAX_HOPS = 8


def range_of(request: web.BaseRequest, digest: Digest) -> Range | None:
    """The range that a request asks of this content: of a GET only, and if its ``If-Range`` names it (RFC 9110)."""
    condition = request.headers.get("If-Range")
    if request.method != "GET" or (condition is not None and condition.strip() != f'"{digest}"'):
        return None
    return parse_range(request.headers.get("Range"))


@dataclass(frozen=True, slots=True)
class Handlers:
    """What each endpoint needs; one method an endpoint."""

    pull: Pull
    discovery: Discovery
    routes: Routes
    metrics: Metrics
    instance: str

    async def base(self, request: web.BaseRequest, _: Match[str]) -> web.StreamResponse:
        """end-1: this is a registry."""
        return web.json_response({}, headers=COMMON_HEADERS)

    async def manifest(self, request: web.BaseRequest, path: Match[str]) -> web.StreamResponse:
        """end-3: a manifest, by tag or digest."""
        target = self._target(request, path["name"])
        reference = parse_reference(path["reference"])
        accept = classify_accept(request.headers.getall("Accept", []))
        ask = self.pull.manifest_head if request.method == "HEAD" else self.pull.manifest
        return await self._send(request, await ask(target, reference, accept))

    async def blob(self, request: web.BaseRequest, path: Match[str]) -> web.StreamResponse:
        """end-2: a blob."""
        target = self._target(request, path["name"])
        digest = parse_digest(path["digest"])
        if request.method == "HEAD":
            return await self._send(request, await self.pull.blob_head(target, digest))
        asked = range_of(request, digest)
        start = (asked.first or 0) if asked else 0
        return await self._send(request, await self.pull.blob(target, digest, start))

    async def tags(self, request: web.BaseRequest, path: Match[str]) -> web.StreamResponse:
        """end-8: a page of a repository's tags."""
        target = self._target(request, path["name"])
        query = parse_query(request.rel_url.raw_query_string)
        asked = Asked(path["name"], request.rel_url.query.get("ns"))
        return await self._send(request, await self.discovery.tags(target, asked, query))

    async def referrers(self, request: web.BaseRequest, path: Match[str]) -> web.StreamResponse:
        """end-12: what refers to a manifest."""
        target = self._target(request, path["name"])
        subject = parse_digest(path["digest"])
        artifact_type = request.rel_url.query.get("artifactType")
        return await self._send(request, await self.discovery.referrers(target, subject, artifact_type))

    async def not_offered(self, request: web.BaseRequest, path: Match[str]) -> web.StreamResponse:
        """Everything else below ``/v2/``, the catalog among it: nobody may list what is cached."""
        raise NameUnknown("this cache has no such endpoint; it serves manifests, blobs, tags/list and referrers")

    def _target(self, request: web.BaseRequest, name: str) -> Target:
        via = ", ".join(request.headers.getall("Via", []))
        if self.instance in via or via.count(",") >= _MAX_HOPS:
            raise LoopDetected("the request has come through this cache before; an upstream of it leads back to it")
        routed = route(self.routes, request.rel_url.query.getall("ns", []), name)
        return Target(routed.upstream, routed.repository, printable(via, _MAX_VIA))

    async def _send(self, request: web.BaseRequest, answer: Answer) -> web.StreamResponse:
        request[DECISION] = answer.decision
        try:
            return await send(request, answer, range_of(request, answer.digest), self.metrics)
        finally:
            answer.close()
