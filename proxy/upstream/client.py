"""The calls to a registry: manifests and blobs, by HEAD and GET, and lists."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from yarl import URL

from proxy.config.model import BackoffConfig
from proxy.config.upstreams import UpstreamConfig
from proxy.credentials.credential import ANONYMOUS, Asker, Credential, Identity, Proof
from proxy.errors import BlobUnknown, ManifestUnknown, NameUnknown, RegistryError, UpstreamBroken
from proxy.listings import MAX_PAGE, ListQuery
from proxy.manifests import MAX_BYTES, OCI_INDEX
from proxy.metrics import Metrics
from proxy.names import Digest, Reference, Repository
from proxy.upstream.content import BlobStream, ManifestBody, ManifestHead, Page
from proxy.upstream.endpoints import Endpoints
from proxy.upstream.exchange import Exchange, Lookup, Shown
from proxy.upstream.failures import Failed
from proxy.upstream.quota import RateLimit
from proxy.upstream.rate import Rate
from proxy.upstream.reply import Reply, Request, Where
from proxy.upstream.restraint import Restraint, Who

_LISTS = f"{OCI_INDEX}, application/json"

A = TypeVar("A")
T = TypeVar("T")

Verify = Callable[[A], Awaitable[T]]
"""Makes of an answer what is wanted, or refuses it with ``UpstreamBroken``."""


class Upstream:
    """One registry, which may have several endpoints."""

    def __init__(
        self, config: UpstreamConfig, metrics: Metrics, instance: str, lookup: Lookup, backoff: BackoffConfig
    ) -> None:
        self.name = config.name
        self.key = config.key
        self.config = config
        self._metrics = metrics
        self._exchange = Exchange(config, metrics, instance, lookup)
        self._listed = [Where(config.name, URL(endpoint)) for endpoint in config.endpoints]
        self._endpoints = Endpoints(self._listed, config.timeouts.endpoint, self._exchange.probe, metrics)
        for each in (metrics.stale, metrics.mismatches, metrics.upstream_bytes):
            each.labels(config.name)  # there from the start: what is first seen at 1 has no rate
        self._restraint = Restraint(config.name, self._probe, self._exchange.forget_failures, backoff, metrics)
        self._rate = Rate(config.name, config.requests_per_second, config.request_burst)
        self._patience = config.timeouts.connect + config.timeouts.headers
        self._given: tuple[Where, str] | None = None
        self._wanted = (self._listed[-1], "")

    @property
    def endpoints(self) -> int:
        """How many endpoints there are to ask."""
        return len(self._endpoints)

    def forget(self, credential: Credential) -> None:
        """Drops what was given to a secret that is no more."""
        self._exchange.forget(credential)

    def said(self, credential: Credential) -> str | None:
        """What the registry said last when that secret was shown to it."""
        return self._exchange.said.get(credential)

    @property
    def rate_limits(self) -> Mapping[Credential | None, RateLimit]:
        """What it said last of the quota of the anonymous (None), and of each secret of ours."""
        return self._exchange.rate_limits

    @property
    def outage(self) -> str:
        """Why it is not asked at all now; empty while it is."""
        return self._restraint.outage.message if self._restraint.outage else ""

    @property
    def is_out(self) -> bool:
        """Whether who gets no answer would get none to any other question, as far as is known."""
        return self._restraint.is_out

    def held_back(
        self, repository: Repository, reference: Reference, *, by_head: bool = False
    ) -> list[tuple[Proof, Failed, float]]:
        """Why that is not asked for now, in whose name, and for how many seconds."""
        path = _manifest_path(repository, reference)
        return self._restraint.state(Request("HEAD" if by_head else "GET", "manifest", path, repository))

    def use_files_again(self) -> None:
        """Uses the certificates that the files hold now; raises ``TLSFileUnusable``."""
        self._exchange.transport.use_files_again()

    def drop_expired(self) -> None:
        """Forgets the tokens, and the failures, whose time is over."""
        self._exchange.drop_expired()
        self._restraint.drop_expired()

    def ask_again(self) -> None:
        """Forgets what has failed and what was refused: everything may be asked for."""
        self._restraint.clear()

    def is_saving(self, identity: Identity) -> bool:
        """Whether so little of its quota is left that what is held is not asked for: ``rateLimitReserve``."""
        limits = self._exchange.rate_limits
        ours = [limit for credential, limit in limits.items() if credential is not None and identity != ANONYMOUS]
        known = ours or [limit for credential, limit in limits.items() if credential is None]
        now = asyncio.get_running_loop().time()
        return identity.proof != "client" and any(limit.is_low(self.config.rate_limit_reserve, now) for limit in known)

    async def close(self) -> None:
        """Drops every connection."""
        await self._restraint.close()
        await self._endpoints.close()
        await self._exchange.close()

    async def head_manifest(
        self,
        repository: Repository,
        reference: Reference,
        accept: str,
        asker: Asker,
        verify: Callable[[Digest | None], None] = lambda _: None,
    ) -> ManifestHead:
        """What the upstream says of a manifest, by HEAD; where ``verify`` refuses its digest, the next endpoint is asked.

        Raises ``RegistryError``.
        """
        shown = await self._exchange.prepare(repository, asker, by_head=True)

        request = Request("HEAD", "manifest", _manifest_path(repository, reference), repository, {"Accept": accept})

        async def ask(where: Where) -> ManifestHead:
            async with self._reply(where, request, shown) as reply:
                if reply.status == 405:
                    return ManifestHead(None, None, "")
                await reply.check(self._no_manifest(repository, reference))
                verify(reply.digest)
                return ManifestHead(reply.digest, reply.length, reply.media_type)

        return await self._ask(request, shown, ask, self.config.timeouts.head)

    async def get_manifest(
        self,
        repository: Repository,
        reference: Reference,
        accept: str,
        asker: Asker,
        verify: Verify[ManifestBody, T],
        *,
        authority_only: bool = False,
        no_cache: bool = False,
    ) -> T:
        """What ``verify`` makes of a manifest; where it refuses, the next endpoint is asked. Raises ``RegistryError``.

        ``no_cache``: a cache that is asked must ask in its turn (RFC 9111 section 5.2.1.4).
        """
        shown = await self._exchange.prepare(repository, asker)

        headers = {"Accept": accept} | ({"Cache-Control": "no-cache"} if no_cache else {})
        request = Request("GET", "manifest", _manifest_path(repository, reference), repository, headers)

        async def ask(where: Where) -> T:
            async with self._reply(where, request, shown) as reply:
                await reply.check(self._no_manifest(repository, reference))
                if reply.status != 200:
                    raise UpstreamBroken(f"{where} sent a part of a manifest of which the whole was asked")
                return await verify(ManifestBody(await reply.body(MAX_BYTES), reply.content_type))

        return await self._ask(request, shown, ask, self._patience, authority_only=authority_only)

    async def head_blob(
        self, repository: Repository, digest: Digest, asker: Asker, verify: Callable[[int | None], None] = lambda _: None
    ) -> int | None:
        """The size of a blob; where ``verify`` refuses it, the next endpoint is asked. Raises ``RegistryError``."""
        path = f"/v2/{repository}/blobs/{digest}"
        request = Request("HEAD", "blob", path, repository)
        shown = await self._exchange.prepare(repository, asker, by_head=True)

        async def size(where: Where) -> int | None:
            async with self._reply(where, request, shown) as reply:
                if reply.media_type == "text/html":
                    raise UpstreamBroken(f"{where} answered with a page for people; is a login page in between?")
                if reply.status != 405 and (reply.is_own or reply.status not in (400, 401, 403)):
                    await reply.check(self._no_blob(repository, digest))
                    if reply.length is not None:
                        return reply.length
            # HEAD is not to be had, for example of a signed URL for GET: one byte is asked for.
            async with self._reply(where, Request("GET", "blob", path, repository, {"Range": "bytes=0-0"}), shown) as reply:
                await reply.check(self._no_blob(repository, digest))
                if reply.status == 206:
                    return reply.part.total if reply.part else None
                return reply.length

        async def ask(where: Where) -> int | None:
            told = await size(where)
            verify(told)
            return told

        limit = self.config.timeouts.head if asker.wants_a_right else self._patience
        return await self._ask(request, shown, ask, limit)

    async def open_blob(self, repository: Repository, digest: Digest, offset: int, attempt: int, asker: Asker) -> BlobStream:
        """A blob from ``offset`` on, at the endpoint whose turn the ``attempt`` is; raises ``RegistryError``."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        request = Request("GET", "blob", f"/v2/{repository}/blobs/{digest}", repository, headers)
        count = self._metrics.upstream_bytes.labels(self.name).inc
        shown = await self._exchange.prepare(repository, asker)

        async def ask(where: Where) -> BlobStream:
            with self._exchange.hiding(shown):
                reply = await self._exchange.ask(where, request, shown)
                broken = partial(self._endpoints.failing, where)
                try:
                    await reply.check(self._no_blob(repository, digest))
                    if reply.status != 206:
                        return BlobStream(reply, 0, reply.length, count, broken)
                    if reply.part is None:
                        raise UpstreamBroken(f"{where} sent a part of a blob without saying which")
                    return BlobStream(reply, reply.part.start, reply.part.total, count, broken)
                except BaseException:
                    reply.close()
                    raise

        return await self._ask(request, shown, ask, self._patience, attempt=attempt, goes_on=offset > 0)

    async def list_tags(self, repository: Repository, query: ListQuery, asker: Asker, verify: Verify[Page, T]) -> T:
        """What ``verify`` makes of a page of tags; raises ``RegistryError``."""
        path = f"/v2/{repository}/tags/list"
        unknown = NameUnknown(f"{self.name} has no repository {repository}")
        return await self._page(repository, path, query, asker, unknown, verify)

    async def list_referrers(
        self, repository: Repository, subject: Digest, query: ListQuery, asker: Asker, verify: Verify[Page, T]
    ) -> T:
        """What ``verify`` makes of a page of referrers; raises ``ManifestUnknown`` where there is no such list.

        Any 404 or 405 says so, a page for people too: what an endpoint of the API that is not there is answered with.
        """
        path = f"/v2/{repository}/referrers/{subject}"
        unknown = ManifestUnknown(f"{self.name} does not list what refers to {subject} in {repository}")
        return await self._page(repository, path, query, asker, unknown, verify, absent=(404, 405))

    async def _page(
        self,
        repository: Repository,
        path: str,
        query: ListQuery,
        asker: Asker,
        unknown: RegistryError,
        verify: Verify[Page, T],
        absent: tuple[int, ...] = (),
    ) -> T:
        target = f"{path}?{query.encoded()}" if query.parameters else path
        request = Request("GET", "list", target, repository, {"Accept": _LISTS})
        shown = await self._exchange.prepare(repository, asker)

        async def ask(where: Where) -> T:
            async with self._reply(where, request, shown) as reply:
                if reply.status in absent:
                    raise unknown
                await reply.check(unknown)
                body = await reply.body(MAX_PAGE)
                return await verify(Page(body, reply.content_type, tuple(reply.headers.getall("Link", []))))

        return await self._ask(request, shown, ask, self._patience, authority_only=True)

    async def _ask(
        self,
        request: Request,
        shown: Shown,
        question: Callable[[Where], Awaitable[T]],
        limit: float,
        *,
        attempt: int = 0,
        authority_only: bool = False,
        goes_on: bool = False,
    ) -> T:
        """Asks the endpoints, if the upstream may be asked now. ``goes_on``: what was begun is gone on with."""
        asker = shown.asker
        only = authority_only or asker.asks_registry_only
        who = Who(asker.identity.proof, shown.number)
        self._wanted = (self._listed[-1], request.path)

        async def given(where: Where) -> T:
            answer = await question(where)
            self._given = (where, request.path)
            return answer

        async def ask(restrained: Callable[[Where], Awaitable[T]]) -> T:
            await self._rate.turn()
            return await self._endpoints.ask(restrained, limit, attempt=attempt, authority_only=only)

        return await self._restraint.ask(
            request, who, given, ask, via=asker.via, authority_only=only and self.endpoints > 1, goes_on=goes_on
        )

    async def _probe(self) -> None:
        """Whether any endpoint answers; raises ``RegistryError`` or ``TimeoutError``.

        That ``/v2/`` is silent does not say that nothing can be had: what was given last, and what somebody wants now, are
        asked for, too.
        """
        asks = dict.fromkeys(((where, "") for where in self._listed), None)
        asks |= dict.fromkeys([self._given, self._wanted] if self._given else [self._wanted])
        probes = [asyncio.create_task(self._exchange.probe(where, path)) for where, path in asks]
        failures: list[RegistryError | OSError] = []
        try:
            async with asyncio.timeout(self.config.timeouts.endpoint):
                for probe in asyncio.as_completed(probes):
                    try:
                        return await probe
                    except (RegistryError, OSError) as error:
                        failures.append(error)
        except TimeoutError:
            if not failures:
                raise
        finally:
            for task in probes:
                task.cancel()
            await asyncio.gather(*probes, return_exceptions=True)
        raise next((failure for failure in failures if isinstance(failure, UpstreamBroken)), failures[0])

    @asynccontextmanager
    async def _reply(self, where: Where, request: Request, shown: Shown) -> AsyncIterator[Reply]:
        """An answer, closed when the block is left."""
        with self._exchange.hiding(shown):
            reply = await self._exchange.ask(where, request, shown)
            try:
                yield reply
            finally:
                reply.close()

    def _no_manifest(self, repository: Repository, reference: Reference) -> ManifestUnknown:
        return ManifestUnknown(f"{self.name} has no manifest {reference} in {repository}")

    def _no_blob(self, repository: Repository, digest: Digest) -> BlobUnknown:
        return BlobUnknown(f"{self.name} has no blob {digest} in {repository}")


def _manifest_path(repository: Repository, reference: Reference) -> str:
    return f"/v2/{repository}/manifests/{reference}"
