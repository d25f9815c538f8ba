"""Content discovery: the tags of a repository, and what refers to a manifest.

Tags are asked for each time, and not kept: those who poll them want news. Referrers are kept for a minute, since runtimes
ask for them at each pull, and served stale when the upstream fails. Both lists grow, so neither is ever immutable.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from proxy.answers import Answer, Target
from proxy.credentials.credential import Identity
from proxy.errors import ManifestUnknown, NameUnknown, UpstreamBroken, UpstreamFailing, UpstreamUnavailable
from proxy.image_pull_policy import never_pulled
from proxy.listings import (
    ListInvalid,
    ListQuery,
    of_type,
    page_of,
    parse_referrers,
    parse_tags,
    referrers_document,
    referrers_tag,
    tags_document,
)
from proxy.manifests import MAX_BYTES, OCI_INDEX
from proxy.metrics import Metrics
from proxy.names import Digest, Repository, Tag, digest_of
from proxy.once import Once
from proxy.policy import Decision, Staleness, stale_warning
from proxy.storage.base import InlineContent
from proxy.storage.catalog import Listed
from proxy.storage.store import Store
from proxy.threads import Threads
from proxy.upstream.client import Upstream
from proxy.upstream.content import ManifestBody, Page

log = logging.getLogger(__name__)

_FRESH = 60.0
_JOIN_WITHIN = 1.0  # seconds: a later caller may have seen a push that an earlier question did not
_MAX_PAGES = 64
_PATIENCE = 20.0  # seconds for all pages; runtimes wait 30 s for headers


@dataclass(frozen=True, slots=True)
class Named:
    """How a client names a repository: what it is answered has the same form."""

    name: str
    ns: str | None = None

    def link(self, query: ListQuery) -> str:
        """The ``Link`` header that leads to the next page of its tags, through this cache."""
        ns = f"&ns={quote(self.ns, safe='')}" if self.ns is not None else ""
        return f'</v2/{self.name}/tags/list?{query.encoded()}{ns}>; rel="next"'


class Discovery:
    """Lists, from the upstreams or as they were a short while ago."""

    def __init__(
        self, upstreams: dict[str, Upstream], store: Store, threads: Threads, metrics: Metrics, staleness: Staleness
    ) -> None:
        self._upstreams = upstreams
        self._store = store
        self._threads = threads
        self._metrics = metrics
        self._staleness = staleness
        self._tags: Once[tuple[str, Repository, ListQuery, Identity], tuple[list[Tag], ListQuery | None]] = Once(
            _JOIN_WITHIN
        )
        self._referrers: Once[tuple[str, Repository, Digest, Identity], bytes] = Once(_JOIN_WITHIN)

    async def tags(self, target: Target, named: Named, query: ListQuery) -> Answer:
        """A page of a repository's tags (end-8); raises ``RegistryError``."""
        if not target.pull_policy.asks:
            raise NameUnknown(never_pulled(f"the list of tags of {target.upstream}/{target.repository}", target.pull_policy))
        upstream = self._upstreams[target.upstream]
        wanted = query.limited(1) if query.n == 0 else query  # whether there is such a repository is still to be asked

        async def verify(page: Page) -> tuple[list[Tag], ListQuery | None]:
            try:
                return await self._threads.run(parse_tags, page.body), page.following()
            except ListInvalid as error:
                raise UpstreamBroken(f"{target.upstream} sent no usable list of tags: {error}") from error

        async def ask() -> tuple[list[Tag], ListQuery | None]:
            return await upstream.list_tags(target.repository, wanted, target.asker, verify)

        found, following = await self._tags.run((target.upstream, target.repository, wanted, target.asker.identity), ask)
        tags, more = page_of(found, query, following)
        headers = {"Link": named.link(more)} if more else {}
        return _answer(tags_document(named.name, tags), "application/json", "miss", headers)

    async def referrers(self, target: Target, subject: Digest, artifact_type: str | None) -> Answer:
        """What refers to a manifest (end-12), as one page; raises ``RegistryError``."""
        body, decision, age, warning = await self._list_of_referrers(target, subject)
        headers = {}
        if artifact_type is not None:
            body = await self._threads.run(of_type, body, artifact_type)
            headers = {"OCI-Filters-Applied": "artifactType"}
        return replace(_answer(body, OCI_INDEX, decision, headers), age=age, warning=warning)

    async def _list_of_referrers(self, target: Target, subject: Digest) -> tuple[bytes, Decision, float, str | None]:
        key = (target.upstream, target.repository, subject, target.asker.identity)
        known = await self._kept(target, subject)
        age = time.time() - known.checked if known else 0.0
        if known is not None and (0 <= age < _FRESH or not target.pull_policy.asks):
            return known.body, "hit", age, None
        if not target.pull_policy.asks:
            raise ManifestUnknown(never_pulled(f"what refers to {subject}", target.pull_policy))
        try:
            return await self._referrers.run(key, lambda: self._ask_referrers(target, subject)), "miss", 0.0, None
        except UpstreamFailing as failure:
            if known is None or not self._staleness.serves(max(0.0, age)):
                raise
            self._metrics.stale.labels(target.upstream).inc()
            log.warning("the referrers of %s in %s are served stale: %s", subject, target.repository, failure.message)
            return known.body, "stale", age, stale_warning(age, failure.message)

    async def _kept(self, target: Target, subject: Digest) -> Listed | None:
        """What was last said; nothing, if it has rotted."""
        known = self._store.referrers(target.key, target.repository, subject, public=target.is_public)
        try:
            if known is not None:
                await self._threads.run(parse_referrers, known.body, OCI_INDEX)
        except ListInvalid as error:
            log.warning("the referrers of %s in %s were not kept well: %s", subject, target.repository, error)
            return None
        return known

    async def _ask_referrers(self, target: Target, subject: Digest) -> bytes:
        """All pages in one, kept from now on; where the upstream has no such list, what its tag schema holds."""
        try:
            async with asyncio.timeout(_PATIENCE):
                try:
                    descriptors = await self._pages(target, subject)
                except ManifestUnknown:
                    descriptors = await self._by_tag(target, subject)
        except TimeoutError as error:
            raise UpstreamUnavailable(f"{target.upstream} did not list what refers to {subject} in time") from error
        body = await self._threads.run(referrers_document, descriptors)
        await self._threads.run(self._store.put_referrers, target.origin, subject, body, time.time())
        return body

    async def _pages(self, target: Target, subject: Digest) -> list[dict[str, Any]]:
        upstream = self._upstreams[target.upstream]

        async def verify(page: Page) -> tuple[list[dict[str, Any]], int, ListQuery | None]:
            try:
                found = await self._threads.run(parse_referrers, page.body, page.content_type)
                return found, len(page.body), page.following()
            except ListInvalid as error:
                raise self._unusable(target, subject, str(error)) from error

        descriptors: list[dict[str, Any]] = []
        size = 0
        query = ListQuery()
        for _ in range(_MAX_PAGES):
            try:
                found, length, following = await upstream.list_referrers(
                    target.repository, subject, query, target.asker, verify
                )
            except ManifestUnknown as error:
                if query == ListQuery():
                    raise
                raise self._unusable(target, subject, "it breaks off between its pages") from error  # half would hide some
            descriptors += found
            size += length
            if following is None:
                return descriptors
            if size > MAX_BYTES or following == query:
                break
            query = following
        raise self._unusable(target, subject, "it is longer than any index may be")

    async def _by_tag(self, target: Target, subject: Digest) -> list[dict[str, Any]]:
        async def verify(answer: ManifestBody) -> list[dict[str, Any]]:
            try:
                return await self._threads.run(parse_referrers, answer.body, answer.content_type)
            except ListInvalid as error:
                raise self._unusable(target, subject, str(error)) from error

        tag = referrers_tag(subject)
        try:
            upstream = self._upstreams[target.upstream]
            return await upstream.get_manifest(target.repository, tag, OCI_INDEX, target.asker, verify, authority_only=True)
        except ManifestUnknown:
            return []

    def _unusable(self, target: Target, subject: Digest, why: str) -> UpstreamBroken:
        return UpstreamBroken(f"{target.upstream} sent no usable list of what refers to {subject}: {why}")


def _answer(body: bytes, media_type: str, decision: Decision, headers: dict[str, str]) -> Answer:
    digest = digest_of(body)
    return Answer(digest, len(body), media_type, decision, InlineContent(digest, body), changes=True, headers=headers)
