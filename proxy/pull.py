"""The product: what a client gets for a manifest or a blob.

    names -> route -> access -> policy -> content

Access comes first: content is shared between repositories, the right to read it is not. A digest is served for a
repository only after its link there was proved, by our own GET or HEAD of it or by a manifest of that repository that
names it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace

from cachetools import LRUCache

from proxy.admission import WaitedTooLong
from proxy.answers import Answer, Target
from proxy.credentials.credential import Identity
from proxy.errors import BlobUnknown, Denied, ManifestGone, ManifestUnknown, RegistryError, UpstreamBroken, UpstreamFailing
from proxy.fetch import VERIFIED_FIRST, Fetcher, Mismatch, Stream
from proxy.image_pull_policy import never_pulled
from proxy.images import Images
from proxy.manifests import Manifest, ManifestInvalid, parse_manifest
from proxy.metrics import Metrics
from proxy.names import Digest, Reference, Repository, Tag, digest_of
from proxy.once import Once
from proxy.policy import Accept, Decision, Staleness, stale_warning
from proxy.storage.base import InlineContent
from proxy.storage.catalog import Tagged
from proxy.storage.store import Store
from proxy.threads import Threads
from proxy.upstream.client import ManifestBody, Upstream

log = logging.getLogger(__name__)

BLOB_TYPE = "application/octet-stream"
_MOST_GONE = 10_000
_JOIN_WITHIN = 1.0  # seconds: a later caller may have seen a push that an earlier question did not
_REFUSALS = 8
_PATIENCE = 20.0  # seconds for its turn, and for small content to be whole; containerd 2.3 waits 30 s for headers


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


class Pull:
    """Manifests and blobs, from the store or from the upstreams."""

    def __init__(
        self,
        upstreams: Mapping[str, Upstream],
        store: Store,
        fetcher: Fetcher,
        images: Images,
        threads: Threads,
        metrics: Metrics,
        staleness: Staleness,
    ) -> None:
        self._upstreams = upstreams
        self._store = store
        self._fetcher = fetcher
        self._images = images
        self._threads = threads
        self._metrics = metrics
        self._staleness = staleness
        self._gone: LRUCache[_TagKey, float] = LRUCache(_MOST_GONE)  # since when the upstream says so
        self._heads: Once[tuple[str, Repository, Tag, str, Identity], _Pointed] = Once(_JOIN_WITHIN)
        self._gets: Once[tuple[str, Repository, Reference, str, Identity], _Held] = Once(_JOIN_WITHIN)
        self._proofs: Once[tuple[str, Repository, Digest, Identity], None] = Once()

    def _upstream_of(self, target: Target, what: Reference, unknown: type[RegistryError] = ManifestUnknown) -> Upstream:
        """Whom to ask; raises ``unknown`` where nobody may be asked."""
        if not target.pull_policy.asks:
            raise unknown(never_pulled(f"{what} of {target.upstream}/{target.repository}", target.pull_policy))
        return self._upstreams[target.upstream]

    # -- manifests ---------------------------------------------------------------------------------------------------

    async def manifest(self, target: Target, reference: Reference, accept: Accept) -> Answer:
        """A manifest, verified; raises ``RegistryError``."""
        if isinstance(reference, Digest):
            if (held := await self._held_manifest(target, reference)) is not None:
                return held.answer("hit", changes=False, age=time.time() - held.stored)
            return (await self._get(target, reference, accept)).answer("miss", changes=False)
        known = self._store.tagged(target.key, target.repository, reference, accept.key)
        held = self._manifest(known.digest) if known else None
        if known is None or held is None:
            return (await self._get(target, reference, accept)).answer("miss", changes=True)
        if self._is_served_unasked(target, known):
            return held.answer("hit", changes=True, age=time.time() - known.checked)
        try:
            head = await self._ask_tag(target, reference, accept)
            if head.digest == held.digest and self._is_linked(target, held.digest):
                return held.answer("revalidated", changes=True)
            try:
                known_one = self._manifest(head.digest) if self._is_linked(target, head.digest) else None
                fresh = known_one or await self._get(target, head.digest, accept)
            except ManifestUnknown as error:
                raise UpstreamBroken(f"{target.upstream} contradicts itself: {error}") from error
            return fresh.answer("refreshed" if fresh.digest != held.digest else "revalidated", changes=True)
        except UpstreamFailing as failure:
            return self._stale(target, known, held, failure)

    async def manifest_head(self, target: Target, reference: Reference, accept: Accept) -> Answer:
        """What a GET would bring, without it; asks upstream by HEAD where it must. Raises ``RegistryError``."""
        if isinstance(reference, Digest):
            if (held := await self._held_manifest(target, reference)) is not None:
                return held.answer("hit", changes=False, age=time.time() - held.stored)
            upstream = self._upstream_of(target, reference)

            def verify(told: Digest | None) -> None:
                if told is not None and told.algorithm == reference.algorithm and told != reference:
                    raise self._mismatch(target, f"answered {told} when asked for {reference}")

            head = await upstream.head_manifest(target.repository, reference, accept.sent, target.asker, verify)
            if not head.is_told:
                return (await self._get(target, reference, accept)).answer("miss", changes=False)
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
        if not self._is_linked(target, known.digest):
            return False
        if policy.serves_held(age):
            return True
        return policy.policy == "IfNotPresent" and self._upstreams[target.upstream].is_saving(target.asker.identity)

    def _manifest(self, digest: Digest) -> _Held | None:
        found = self._store.manifest(digest)
        return _Held(digest, *found) if found else None

    async def _held_manifest(self, target: Target, digest: Digest) -> _Held | None:
        """A held manifest that this repository may be served; asks upstream where that was not proved."""
        held = self._manifest(digest)
        if held is not None and not self._is_linked(target, digest):
            media_type = held.media_type  # "*/*" would not do: docker-registry 2.8 then knows no OCI image
            upstream = self._upstream_of(target, digest)

            async def verify(answer: ManifestBody) -> None:
                if not digest.matches(answer.body):
                    raise self._mismatch(target, f"sent another manifest than {digest}")

            async def head() -> None:
                told = await upstream.head_manifest(target.repository, digest, media_type, target.asker)
                is_word = told.is_told and told.digest == digest  # not 405, a login page, no word of which
                if not is_word or self._store.is_others(target.key, digest):
                    await upstream.get_manifest(target.repository, digest, media_type, target.asker, verify)

            await self._prove(target, digest, head)
        return held

    async def _ask_tag(self, target: Target, tag: Tag, accept: Accept) -> _Pointed:
        """Where the upstream says that the tag points. One HEAD for all who wait."""
        upstream = self._upstream_of(target, tag)
        key = (target.key, target.repository, tag, accept.key)

        async def ask() -> _Pointed:
            try:
                head = await upstream.head_manifest(target.repository, tag, accept.sent, target.asker)
            except ManifestUnknown as error:
                if self._is_in_grace(key):
                    raise ManifestGone(error.message) from error
                await self._threads.run(self._store.forget_tag, *key)
                raise
            self._gone.pop(key, None)
            if head.digest is None or head.size is None or not head.is_told:
                held = await self._get(target, tag, accept)
                return _Pointed(held.digest, len(held.body), held.media_type)
            await self._set_tag(target, tag, accept, head.digest)
            if self._store.has(head.digest) and not self._store.is_others(target.key, head.digest):
                await self._link(target, head.digest)  # so the upstream has just said
            return _Pointed(head.digest, head.size, head.media_type)

        return await self._heads.run((target.upstream, target.repository, tag, accept.key, target.asker.identity), ask)

    async def _get(self, target: Target, reference: Reference, accept: Accept) -> _Held:
        """One GET for all who wait: verified, saved with its link, and the tag remembered."""
        upstream = self._upstream_of(target, reference)

        async def verify(answer: ManifestBody) -> tuple[Digest, bytes, Manifest]:
            try:
                manifest = await self._threads.run(parse_manifest, answer.body, answer.content_type)
            except ManifestInvalid as error:
                raise self._mismatch(target, f"sent what cannot be used as manifest {reference}: {error}") from error
            if isinstance(reference, Digest):
                digest = reference
                if not digest.matches(answer.body):
                    raise self._mismatch(target, f"sent another manifest than {reference}")
            else:
                digest = digest_of(answer.body)
            if (known := self._store.manifest(digest)) is not None:  # where the bytes do not say, the first sender has
                manifest = replace(manifest, media_type=known[1])
            return digest, answer.body, manifest

        async def get() -> _Held:
            digest, body, manifest = await upstream.get_manifest(
                target.repository, reference, accept.sent, target.asker, verify
            )
            await self._threads.run(self._store.put_manifest, target.origin, digest, body, manifest)
            if not isinstance(reference, Digest):
                await self._set_tag(target, reference, accept, digest)
            return _Held(digest, body, manifest.media_type)

        key = (target.upstream, target.repository, reference, accept.key, target.asker.identity)
        return await self._gets.run(key, get)

    async def _set_tag(self, target: Target, tag: Tag, accept: Accept, digest: Digest) -> None:
        now = time.time()
        await self._threads.run(self._store.set_tag, target.key, target.repository, tag, accept.key, digest, now)

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
        if not (is_served and self._is_linked(target, held.digest)):
            raise failure
        self._metrics.stale.labels(target.upstream).inc()
        log.warning("a tag of %s is served stale: %s", target.repository, failure.message)
        return held.answer("stale", changes=True, age=age, warning=stale_warning(age, failure.message))

    def _mismatch(self, target: Target, text: str) -> UpstreamBroken:
        self._metrics.mismatches.labels(target.upstream).inc()
        return UpstreamBroken(f"{target.upstream} {text}; nothing was kept")

    # -- blobs -------------------------------------------------------------------------------------------------------

    async def blob(
        self, target: Target, digest: Digest, start: int, *, own: bool = False, mismatches: int = 0, refusals: int = 0
    ) -> Answer:
        """A blob, to be read from about ``start`` on; raises ``RegistryError``.

        ``own``: another repository's download of it has just failed; this one's own is begun. ``mismatches``: so many
        endpoints have just sent something else, of which the client has seen nothing yet. ``refusals``: so many others,
        whose download this one followed, have just lost their right.
        """
        origin = target.origin
        is_proved = await self._may_read(target, digest)
        # From here to join there is no await: what ends being in flight is held before it leaves the table.
        if is_proved and (stored := self._store.open_blob(digest)) is not None:
            return Answer(digest, stored.size, BLOB_TYPE, "hit", stored, age=time.time() - stored.stored)
        own = own or not is_proved
        upstream = self._upstream_of(target, digest, BlobUnknown)

        async def source(offset: int, attempt: int) -> Stream:
            return await upstream.open_blob(target.repository, digest, offset, attempt, target.asker)

        followed = self._fetcher.origin(digest)
        size = self._store.size_of(target.key, target.repository, digest)
        is_linked = self._is_linked(target, digest) or (target.is_public and self._is_named(target, digest))
        reader = self._fetcher.join(
            digest,
            origin,
            source,
            size=size,
            start=start,
            floor=upstream.config.timeouts.progress,
            image=self._images.of(target, digest),
            own=own,
            again=mismatches > 0,
        )
        try:
            await reader.ready(VERIFIED_FIRST, _PATIENCE, size if is_proved and is_linked else None)
        except RegistryError as error:
            reader.close()
            if isinstance(error, WaitedTooLong):
                raise
            if isinstance(error, Mismatch) and mismatches + 1 < upstream.endpoints:
                return await self.blob(target, digest, start, own=own, mismatches=mismatches + 1)  # the next one's turn
            if followed is not None and isinstance(error, Denied) and refusals < _REFUSALS:  # it concerns who was refused
                return await self.blob(target, digest, start, own=own, refusals=refusals + 1)
            if own or followed in (None, origin):
                raise
            return await self.blob(target, digest, start, own=True)
        except BaseException:
            reader.close()
            raise
        return Answer(digest, reader.size, BLOB_TYPE, "followed" if reader.follows else "miss", reader)

    async def blob_head(self, target: Target, digest: Digest) -> Answer:
        """The size of a blob; starts no download. Raises ``RegistryError``."""
        is_proved = await self._may_read(target, digest)
        if is_proved and (stored := self._store.open_blob(digest)) is not None:
            return Answer(digest, stored.size, BLOB_TYPE, "hit", stored, age=time.time() - stored.stored)
        size = self._store.size_of(target.key, target.repository, digest)
        if is_proved and size is not None and self._is_named(target, digest):
            return Answer(digest, size, BLOB_TYPE, "hit", None)
        size = await self._upstream_of(target, digest, BlobUnknown).head_blob(target.repository, digest, target.asker)
        return Answer(digest, size, BLOB_TYPE, "miss", None)

    async def _may_read(self, target: Target, digest: Digest) -> bool:
        """Proves the link of what is held or in flight, by one HEAD. What is neither is proved by the GET that brings it.

        What is in flight may be followed for what it brings; it opens nothing that is held, since it may end in a no. False:
        it is private elsewhere, and an upstream that only says that it has it, too, has to show it.
        """
        if self._is_linked(target, digest):
            return True
        is_held = self._store.has(digest)
        in_flight = None if is_held else self._fetcher.origin(digest)
        if not is_held and in_flight is None:
            return True
        if in_flight is not None and (in_flight.upstream, in_flight.repository) == (target.key, target.repository):
            return True
        # Who can write a manifest can name what he cannot read: it proves what anybody may have, and no more.
        is_public = self._store.is_public(digest) or (
            in_flight is not None and in_flight.proof == "anonymous" and not self._store.is_void(in_flight)
        )
        if is_public and self._is_named(target, digest):
            return True
        if not is_public and (in_flight.upstream != target.key if in_flight else self._store.is_others(target.key, digest)):
            return False
        upstream = self._upstream_of(target, digest, BlobUnknown)

        def verify(told: int | None) -> None:
            held = self._store.held_size(digest)
            if held is not None and told != held:  # the 200 of a login page is no yes
                raise self._mismatch(target, f"says that {digest} has {told} bytes, and it has {held}")

        async def head() -> None:
            await upstream.head_blob(target.repository, digest, target.asker, verify)

        await self._prove(target, digest, head)
        return True

    async def _prove(self, target: Target, digest: Digest, head: Callable[[], Awaitable[None]]) -> None:
        """One HEAD for all who wait, by which the upstream says that the content is in that repository."""

        async def ask() -> None:
            await head()
            await self._link(target, digest)

        await self._proofs.run((target.upstream, target.repository, digest, target.asker.identity), ask)

    async def _link(self, target: Target, digest: Digest) -> None:
        if not self._is_linked(target, digest):
            await self._threads.run(self._store.link, target.origin, digest)

    def _is_linked(self, target: Target, digest: Digest) -> bool:
        return self._store.is_linked(target.key, target.repository, digest, public=target.is_public)

    def _is_named(self, target: Target, digest: Digest) -> bool:
        return self._store.is_named(target.key, target.repository, digest, public=target.is_public)
