"""What a client gets for a manifest, by tag or digest.

    names -> route -> access -> policy -> content

Access comes first. Whether the upstream is asked where a tag points is for its pull policy to say. What is held is served
while the upstream fails.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace

from cachetools import LRUCache

from proxy.answers import Answer, Target
from proxy.credentials.credential import Identity
from proxy.errors import ManifestGone, ManifestUnknown, UpstreamBroken, UpstreamFailing
from proxy.manifests import Manifest, ManifestInvalid, parse_manifest
from proxy.metrics import Metrics
from proxy.names import Digest, Reference, Repository, Tag, digest_of
from proxy.once import Once
from proxy.policy import Accept, Decision, Staleness, stale_warning
from proxy.pull.links import Links
from proxy.storage.base import InlineContent
from proxy.storage.catalog import Tagged
from proxy.storage.store import Store
from proxy.threads import Threads
from proxy.upstream.content import ManifestBody

log = logging.getLogger(__name__)

_MOST_GONE = 10_000
_JOIN_WITHIN = 1.0  # seconds: a later caller may have seen a push that an earlier question did not

_TagKey = tuple[str, Repository, Tag, str]


@dataclass(frozen=True, slots=True)
class _Held:
    digest: Digest
    body: bytes
    media_type: str
    stored: float = 0.0
    """Seconds since the epoch; of what has just come 0."""

    def answer(self, decision: Decision, *, changes: bool, age: float = 0.0, warning: str | None = None) -> Answer:
        content = InlineContent(self.digest, self.body)
        return Answer(self.digest, len(self.body), self.media_type, decision, content, changes, warning=warning, age=age)


@dataclass(frozen=True, slots=True)
class _Pointed:
    """Where a tag points."""

    digest: Digest
    size: int
    media_type: str


class Manifests:
    """Manifests, from the store or from the upstreams."""

    def __init__(self, links: Links, store: Store, threads: Threads, metrics: Metrics, staleness: Staleness) -> None:
        self._links = links
        self._store = store
        self._threads = threads
        self._metrics = metrics
        self._staleness = staleness
        self._gone: LRUCache[_TagKey, float] = LRUCache(_MOST_GONE)  # since when the upstream says so
        self._heads: Once[tuple[str, Repository, Tag, str, Identity], _Pointed] = Once(_JOIN_WITHIN)
        self._gets: Once[tuple[str, Repository, Reference, str, Identity], _Held] = Once(_JOIN_WITHIN)

    async def get(self, target: Target, reference: Reference, accept: Accept) -> Answer:
        """A manifest, verified; raises ``RegistryError``."""
        if isinstance(reference, Digest):
            if (held := await self._held_manifest(target, reference)) is not None:
                return held.answer("hit", changes=False, age=time.time() - held.stored)
            return (await self._fetch(target, reference, accept)).answer("miss", changes=False)
        known = self._store.tagged(target.key, target.repository, reference, accept.key)
        held = self._manifest(known.digest) if known else None
        if known is None or held is None:
            return (await self._fetch(target, reference, accept)).answer("miss", changes=True)
        if self._is_served_unasked(target, known):
            return held.answer("hit", changes=True, age=time.time() - known.checked)
        try:
            head = await self._ask_tag(target, reference, accept)
            if head.digest == held.digest and self._links.is_linked(target, held.digest):
                return held.answer("revalidated", changes=True)
            try:
                known_one = self._manifest(head.digest) if self._links.is_linked(target, head.digest) else None
                fresh = known_one or await self._fetch(target, head.digest, accept)
            except ManifestUnknown as error:
                raise UpstreamBroken(f"{target.upstream} contradicts itself: {error}") from error
            return fresh.answer("refreshed" if fresh.digest != held.digest else "revalidated", changes=True)
        except UpstreamFailing as failure:
            return self._stale(target, known, held, failure)

    async def head(self, target: Target, reference: Reference, accept: Accept) -> Answer:
        """What a GET would bring, without it; asks upstream by HEAD where it must. Raises ``RegistryError``."""
        if isinstance(reference, Digest):
            if (held := await self._held_manifest(target, reference)) is not None:
                return held.answer("hit", changes=False, age=time.time() - held.stored)
            upstream = self._links.upstream_of(target, reference)

            def verify(told: Digest | None) -> None:
                if told is not None and told.algorithm == reference.algorithm and told != reference:
                    raise self._links.mismatch(target, f"answered {told} when asked for {reference}")

            head = await upstream.head_manifest(target.repository, reference, accept.sent, target.asker, verify)
            if not head.is_told:
                return (await self._fetch(target, reference, accept)).answer("miss", changes=False)
            return Answer(reference, head.size, head.media_type, "miss", None)
        known = self._store.tagged(target.key, target.repository, reference, accept.key)
        held = self._manifest(known.digest) if known else None
        if known is not None and held is not None and self._is_served_unasked(target, known):
            return held.answer("hit", changes=True, age=time.time() - known.checked)
        try:
            pointed = await self._ask_tag(target, reference, accept)
        except UpstreamFailing as failure:
            if known is None or held is None:
                raise
            return self._stale(target, known, held, failure)
        if held is not None and pointed.digest == held.digest:
            return held.answer("revalidated", changes=True)
        decision: Decision = "miss" if held is None else "refreshed"
        return Answer(pointed.digest, pointed.size, pointed.media_type, decision, None, changes=True)

    def _is_served_unasked(self, target: Target, known: Tagged) -> bool:
        policy, age = target.pull_policy, time.time() - known.checked
        if not self._links.is_linked(target, known.digest):
            return False
        if policy.serves_held(age) or policy.policy == "Always":
            return policy.serves_held(age)
        return self._links.upstream_of(target, known.digest).is_saving(target.asker.identity)

    def _manifest(self, digest: Digest) -> _Held | None:
        found = self._store.manifest(digest)
        return _Held(digest, *found) if found else None

    async def _held_manifest(self, target: Target, digest: Digest) -> _Held | None:
        """A held manifest that this repository may be served; asks upstream where that was not proved."""
        held = self._manifest(digest)
        if held is not None and not self._links.is_linked(target, digest):
            media_type = held.media_type  # "*/*" would not do: docker-registry 2.8 then knows no OCI image
            upstream = self._links.upstream_of(target, digest)

            async def verify(answer: ManifestBody) -> None:
                if not digest.matches(answer.body):
                    raise self._links.mismatch(target, f"sent another manifest than {digest}")

            async def head() -> None:
                told = await upstream.head_manifest(target.repository, digest, media_type, target.asker)
                is_word = told.is_told and told.digest == digest  # not 405, a login page, no word of which
                if not is_word or self._store.is_others(target.key, digest):
                    await upstream.get_manifest(target.repository, digest, media_type, target.asker, verify)

            await self._links.prove(target, digest, head)
        return held

    async def _ask_tag(self, target: Target, tag: Tag, accept: Accept) -> _Pointed:
        """Where the upstream says that the tag points. One HEAD for all who wait."""
        upstream = self._links.upstream_of(target, tag)
        key = (target.key, target.repository, tag, accept.key)

        async def ask() -> _Pointed:
            try:
                head = await upstream.head_manifest(target.repository, tag, accept.sent, target.asker)
            except ManifestUnknown as error:
                if self._is_in_grace(key):
                    raise ManifestGone(error.message) from error
                if not target.pull_policy.is_wish:  # others, who need not ask, are served it on
                    await self._threads.run(self._store.forget_tag, *key)
                raise
            if head.digest is None or head.size is None or not head.is_told:
                held = await self._fetch(target, tag, accept)
                return _Pointed(held.digest, len(held.body), held.media_type)
            await self._set_tag(target, tag, accept, head.digest)
            if self._store.has(head.digest) and not self._store.is_others(target.key, head.digest):
                await self._links.link(target, head.digest)  # so the upstream has just said
            return _Pointed(head.digest, head.size, head.media_type)

        return await self._heads.run((target.upstream, target.repository, tag, accept.key, target.asker.identity), ask)

    async def _fetch(self, target: Target, reference: Reference, accept: Accept) -> _Held:
        """One GET for all who wait: verified, saved with its link, and the tag remembered."""
        upstream = self._links.upstream_of(target, reference)

        async def verify(answer: ManifestBody) -> tuple[Digest, bytes, Manifest]:
            try:
                manifest = await self._threads.run(parse_manifest, answer.body, answer.content_type)
            except ManifestInvalid as error:
                raise self._links.mismatch(target, f"sent what cannot be used as manifest {reference}: {error}") from error
            if isinstance(reference, Digest):
                digest = reference
                if not digest.matches(answer.body):
                    raise self._links.mismatch(target, f"sent another manifest than {reference}")
            else:
                digest = digest_of(answer.body)
            if (known := self._store.manifest(digest)) is not None:  # where the bytes do not say, the first sender has
                manifest = replace(manifest, media_type=known[1])
            return digest, answer.body, manifest

        async def fetch() -> _Held:
            digest, body, manifest = await upstream.get_manifest(
                target.repository, reference, accept.sent, target.asker, verify
            )
            await self._threads.run(self._store.put_manifest, target.origin, digest, body, manifest)
            if not isinstance(reference, Digest):
                await self._set_tag(target, reference, accept, digest)
            return _Held(digest, body, manifest.media_type)

        key = (target.upstream, target.repository, reference, accept.key, target.asker.identity)
        return await self._gets.run(key, fetch)

    async def _set_tag(self, target: Target, tag: Tag, accept: Accept, digest: Digest) -> None:
        key, now = (target.key, target.repository, tag, accept.key), time.time()
        self._gone.pop(key, None)
        await self._threads.run(self._store.set_tag, *key, digest, now)

    def _is_in_grace(self, key: _TagKey) -> bool:
        """Whether a held tag that the upstream says is gone is served on: ``deletedGrace``, from the first 404."""
        if self._staleness.deleted_grace == 0 or self._store.tagged(*key) is None:
            return False
        now = time.time()
        return 0 <= now - self._gone.setdefault(key, now) < self._staleness.deleted_grace

    def _stale(self, target: Target, known: Tagged, held: _Held, failure: UpstreamFailing) -> Answer:
        """What a tag pointed at when its upstream was last heard, if that is this client's to read; raises ``failure``."""
        age = max(0.0, time.time() - known.checked)
        is_served = isinstance(failure, ManifestGone) or self._staleness.serves(age)
        if not (is_served and self._links.is_linked(target, held.digest)):
            raise failure
        self._metrics.stale.labels(target.upstream).inc()
        log.warning("a tag of %s is served stale: %s", target.repository, failure.message)
        return held.answer("stale", changes=True, age=age, warning=stale_warning(age, failure.message))
