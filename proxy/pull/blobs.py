"""What a client gets for a blob: what is held, what is arriving, or a download of its own."""

from __future__ import annotations

import time

from proxy.admission import WaitedTooLong
from proxy.answers import Answer, Target
from proxy.errors import BlobUnknown, Denied, RegistryError
from proxy.fetch import VERIFIED_FIRST, Fetcher, Mismatch, Stream
from proxy.names import Digest
from proxy.pull.images import Images
from proxy.pull.links import Links
from proxy.storage.store import Store

BLOB_TYPE = "application/octet-stream"
_REFUSALS = 8
_PATIENCE = 20.0  # seconds for its turn, and for small content to be whole; containerd 2.3 waits 30 s for headers


class Blobs:
    """Blobs, from the store, from a download in flight, or from the upstreams."""

    def __init__(self, links: Links, store: Store, fetcher: Fetcher, images: Images) -> None:
        self._links = links
        self._store = store
        self._fetcher = fetcher
        self._images = images

    async def get(
        self, target: Target, digest: Digest, start: int, *, own: bool = False, mismatches: int = 0, refusals: int = 0
    ) -> Answer:
        """A blob, to be read from about ``start`` on; raises ``RegistryError``.

        ``own``: another repository's download of it has just failed; this one's own is begun. ``mismatches``: so many
        endpoints have just sent something else, of which the client has seen nothing yet. ``refusals``: so many others,
        whose download this one followed, have just lost their right.
        """
        origin = target.origin
        is_proved = await self._may_read(target, digest)
        self._store.touch(digest)
        # From here to join there is no await: what ends being in flight is held before it leaves the table.
        if is_proved and (stored := self._store.open_blob(digest)) is not None:
            return Answer(digest, stored.size, BLOB_TYPE, "hit", stored, age=time.time() - stored.stored)
        own = own or not is_proved
        upstream = self._links.upstream_of(target, digest, BlobUnknown)

        async def source(offset: int, attempt: int) -> Stream:
            return await upstream.open_blob(target.repository, digest, offset, attempt, target.asker)

        followed = self._fetcher.origin(digest)
        size = self._store.size_of(target.key, target.repository, digest)
        is_linked = self._links.is_linked(target, digest) or (target.is_public and self._links.is_named(target, digest))
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
                return await self.get(target, digest, start, own=own, mismatches=mismatches + 1)  # the next one's turn
            if followed is not None and isinstance(error, Denied) and refusals < _REFUSALS:  # it concerns who was refused
                return await self.get(target, digest, start, own=own, refusals=refusals + 1)
            if own or followed in (None, origin):
                raise
            return await self.get(target, digest, start, own=True)
        except BaseException:
            reader.close()
            raise
        return Answer(digest, reader.size, BLOB_TYPE, "followed" if reader.follows else "miss", reader)

    async def head(self, target: Target, digest: Digest) -> Answer:
        """The size of a blob; starts no download. Raises ``RegistryError``."""
        is_proved = await self._may_read(target, digest)
        if is_proved and (stored := self._store.open_blob(digest)) is not None:
            return Answer(digest, stored.size, BLOB_TYPE, "hit", stored, age=time.time() - stored.stored)
        size = self._store.size_of(target.key, target.repository, digest)
        if is_proved and size is not None and self._links.is_named(target, digest):
            return Answer(digest, size, BLOB_TYPE, "hit", None)
        size = await self._links.upstream_of(target, digest, BlobUnknown).head_blob(target.repository, digest, target.asker)
        return Answer(digest, size, BLOB_TYPE, "miss", None)

    async def _may_read(self, target: Target, digest: Digest) -> bool:
        """Proves the link of what is held or in flight, by one HEAD. What is neither is proved by the GET that brings it.

        What is in flight may be followed for what it brings; it opens nothing that is held, since it may end in a no. False:
        it is private elsewhere, and an upstream that only says that it has it, too, has to show it.
        """
        if self._links.is_linked(target, digest):
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
        if is_public and self._links.is_named(target, digest):
            return True
        if not is_public and (in_flight.upstream != target.key if in_flight else self._store.is_others(target.key, digest)):
            return False
        upstream = self._links.upstream_of(target, digest, BlobUnknown)

        def verify(told: int | None) -> None:
            held = self._store.held_size(digest)
            if held is not None and told != held:  # the 200 of a login page is no yes
                raise self._links.mismatch(target, f"says that {digest} has {told} bytes, and it has {held}")

        async def head() -> None:
            await upstream.head_blob(target.repository, digest, target.asker, verify)

        await self._links.prove(target, digest, head)
        return True
