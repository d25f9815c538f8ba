"""The endpoints of the registry API (OCI distribution spec 1.1.1): parse, ask for manifest, blob or list, send."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from re import Match

from aiohttp import web

from proxy.access import probes
from proxy.access.authorization import TokenRequestInvalid
from proxy.access.caller import Caller
from proxy.access.gate import Gate
from proxy.access.probes import Probe
from proxy.access.proofs import Access, Withdrawn
from proxy.answers import Answer, Target
from proxy.credentials.credential import Asker, Identity
from proxy.errors import Denied, LoopDetected, NameUnknown, RequestTooLarge, Unauthorized, UpstreamFailing
from proxy.image_pull_policy import PullDecision, PullPolicies, anew, never_pulled
from proxy.listings import parse_query
from proxy.logs import printable
from proxy.metrics import Metrics
from proxy.names import Digest, Reference, Repository, parse_digest, parse_reference
from proxy.policy import Routes, classify_accept, route
from proxy.pull.blobs import Blobs
from proxy.pull.discovery import Discovery, Named
from proxy.pull.images import Images
from proxy.pull.manifests import Manifests
from proxy.ranges import Range, parse_range
from proxy.rules import Rules
from proxy.send import COMMON_HEADERS, DECISION_HEADER, send
from proxy.storage.store import Store
from proxy.upstream.client import Upstream

Handler = Callable[[web.BaseRequest, "Match[str]"], Awaitable[web.StreamResponse]]

DECISION = web.RequestKey("decision", str)
"""What was decided about a request (``policy.Decision``), for its log line and the counters; "none": nothing was."""

CALLER = web.RequestKey("caller", Caller)
"""Who asks."""

log = logging.getLogger(__name__)

_MAX_VIA = 1024
_MAX_HOPS = 8
_FORM_SECONDS = 10.0
_NOT_KEPT = {"Cache-Control": "no-store", "Pragma": "no-cache"}


def authorization_of(request: web.BaseRequest) -> str | None:
    """What a request shows; two headers are one that cannot be read."""
    return ", ".join(shown) if (shown := request.headers.getall("Authorization", [])) else None


def range_of(request: web.BaseRequest, digest: Digest) -> Range | None:
    """The range that a request asks of this content: of a GET only, and if its ``If-Range`` names it (RFC 9110)."""
    condition = request.headers.get("If-Range")
    if request.method != "GET" or (condition is not None and condition.strip() != f'"{digest}"'):
        return None
    return parse_range(request.headers.get("Range"))


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks of a repository: whose that is, as the client named it, what proxies it came through, and whether
    the upstream is asked about it."""

    upstream: Upstream
    repository: Repository
    name: str
    via: str
    policy: PullDecision

    @property
    def image(self) -> str:
        """``registry/repository``."""
        return f"{self.upstream.name}/{self.repository}"


@dataclass(frozen=True, slots=True)
class Handlers:
    """What each endpoint needs; one method an endpoint."""

    upstreams: Mapping[str, Upstream]
    gate: Gate
    rules: Rules
    policies: PullPolicies
    access: Access
    store: Store
    manifests: Manifests
    blobs: Blobs
    discovery: Discovery
    images: Images
    routes: Routes
    metrics: Metrics
    instance: str

    async def base(self, request: web.BaseRequest, _: Match[str]) -> web.StreamResponse:
        """end-1: this is a registry."""
        self.gate.greet(authorization_of(request))
        request[DECISION] = "hit"
        return web.json_response({}, headers=COMMON_HEADERS | {DECISION_HEADER: "hit", "Age": "0"})

    async def manifest(self, request: web.BaseRequest, path: Match[str]) -> web.StreamResponse:
        """end-3: a manifest, by tag or digest."""
        reference = parse_reference(path["reference"])
        asked = self._asked(request, path["name"], reference)
        accept = classify_accept(request.headers.getall("Accept", []))
        ask = self.manifests.head if request.method == "HEAD" else self.manifests.get
        probe = probes.of_manifest(asked.upstream, asked.repository, reference)

        async def answer(target: Target) -> Answer:
            given = await ask(target, reference, accept)
            self.images.serve(target, given.digest)
            self.store.touch(given.digest, is_pull=True)
            return given

        return await self._answer(request, asked, probe, answer)

    async def blob(self, request: web.BaseRequest, path: Match[str]) -> web.StreamResponse:
        """end-2: a blob."""
        digest = parse_digest(path["digest"])
        asked = self._asked(request, path["name"], digest)
        probe = probes.of_blob(asked.upstream, asked.repository, digest, self.store)
        if request.method == "HEAD":
            return await self._answer(request, asked, probe, lambda target: self.blobs.head(target, digest))
        part = range_of(request, digest)
        start = (part.first or 0) if part else 0
        return await self._answer(request, asked, probe, lambda target: self.blobs.get(target, digest, start))

    async def tags(self, request: web.BaseRequest, path: Match[str]) -> web.StreamResponse:
        """end-8: a page of a repository's tags."""
        asked = self._asked(request, path["name"])
        query = parse_query(request.rel_url.raw_query_string)
        named = Named(path["name"], request.rel_url.query.get("ns"))
        probe = probes.of_list(asked.upstream, asked.repository)
        return await self._answer(request, asked, probe, lambda target: self.discovery.tags(target, named, query))

    async def referrers(self, request: web.BaseRequest, path: Match[str]) -> web.StreamResponse:
        """end-12: what refers to a manifest."""
        asked = self._asked(request, path["name"])
        subject = parse_digest(path["digest"])
        artifact_type = request.rel_url.query.get("artifactType")
        probe = probes.of_list(asked.upstream, asked.repository)
        return await self._answer(
            request, asked, probe, lambda target: self.discovery.referrers(target, subject, artifact_type)
        )

    async def token(self, request: web.BaseRequest, _: Match[str]) -> web.StreamResponse:
        """A token for the credential that the client shows, or for the anonymous (distribution ``spec/auth``)."""
        try:
            async with asyncio.timeout(_FORM_SECONDS):
                body = await request.read() if request.method == "POST" else b""
        except TimeoutError:
            raise RequestTooLarge("the form did not come in time") from None
        header = authorization_of(request)
        try:
            given = self.gate.token(request[CALLER].address, request.method, request.rel_url.raw_query_string, body, header)
        except TokenRequestInvalid as error:
            refusal = {"error": error.error, "error_description": error.description}
            return web.json_response(refusal, status=400, headers=COMMON_HEADERS | _NOT_KEPT)
        return web.json_response(given, headers=COMMON_HEADERS | _NOT_KEPT)

    async def not_offered(self, request: web.BaseRequest, path: Match[str]) -> web.StreamResponse:
        """Everything else below ``/v2/``, the catalog among it: nobody may list what is cached."""
        raise NameUnknown("this cache has no such endpoint; it serves manifests, blobs, tags/list and referrers")

    def _asked(self, request: web.BaseRequest, name: str, reference: Reference | None = None) -> Asked:
        """Raises ``RegistryError`` where the name means nothing, or what may not be pulled."""
        via = ", ".join(request.headers.getall("Via", []))
        if self.instance in via or via.count(",") >= _MAX_HOPS:
            raise LoopDetected("the request has come through this cache before; an upstream of it leads back to it")
        routed = route(self.routes, request.rel_url.query.getall("ns", []), name)
        image = f"{routed.upstream}/{routed.repository}"
        self.gate.check_repository(request[CALLER], image)
        verdict = self.rules.decide(image)
        if verdict.dry_run_denied is not None:
            self.metrics.rule_hits.labels(verdict.dry_run_denied, "dryrun").inc()
            log.info("the rule '%s' would deny %s, were it not on dryRun", verdict.dry_run_denied, image)
        if not verdict.allowed:
            self.metrics.rule_hits.labels(verdict.rule, "denied").inc()
            raise Denied(f"{image} may not be pulled: the rule '{verdict.rule}' of this cache denies it")
        policy = anew(self.policies.decide(image, reference), request.headers.getall("Cache-Control", []))
        return Asked(self.upstreams[routed.upstream], routed.repository, name, printable(via, _MAX_VIA), policy)

    async def _answer(
        self,
        request: web.BaseRequest,
        asked: Asked,
        probe: Probe,
        ask: Callable[[Target], Awaitable[Answer]],
    ) -> web.StreamResponse:
        """Access first, then content. A refusal of the registry ends what its yes had allowed."""
        caller = request[CALLER]
        try:
            try:
                identity, answer = await self._read(asked, caller, probe, ask)
            except Withdrawn:  # whoever has a right of his own does not suffer for it that others have none any more
                identity, answer = await self._read(asked, caller, probe, ask)
        except Unauthorized as error:
            raise self.gate.unauthorized(error.message, scope=f"repository:{asked.name}:pull") from None
        is_private = identity.proof != "anonymous" or caller.user is not None
        return await self._send(request, replace(answer, is_private=is_private))

    async def _read(
        self,
        asked: Asked,
        caller: Caller,
        probe: Probe,
        ask: Callable[[Target], Awaitable[Answer]],
    ) -> tuple[Identity, Answer]:
        """In whose name, and what; raises ``Withdrawn`` where that has just lost its right, and another may have one."""
        since = self.store.withdrawals
        if not asked.policy.asks:
            probe = probes.of_nothing(never_pulled(asked.image, asked.policy))
        identity = await self.access.identity(asked.upstream, asked.repository, caller, probe)

        def target(identity: Identity) -> Target:
            asker = Asker(identity, asked.via)
            key, client = asked.upstream.key, hash(caller)
            return Target(asked.upstream.name, key, asked.repository, asker, asked.policy, since, client)

        try:
            return identity, await ask(target(identity))
        except Denied as refusal:
            await self.access.refused(asked.upstream, asked.repository, identity, refusal)
            raise
        except UpstreamFailing:
            if (other := self.access.fallback(asked.upstream, asked.repository, caller, identity)) is None:
                raise
            return other, await ask(target(other))

    async def _send(self, request: web.BaseRequest, answer: Answer) -> web.StreamResponse:
        request[DECISION] = answer.decision
        try:
            return await send(request, answer, range_of(request, answer.digest), self.metrics)
        finally:
            answer.close()
