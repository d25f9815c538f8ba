"""What a registry gives: heads and bodies of manifests, pages of lists, and blobs as they come. None of it is verified."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from proxy.errors import UpstreamFailing
from proxy.listings import ListQuery, next_page
from proxy.manifests import MODERN
from proxy.names import Digest
from proxy.upstream.reply import Reply


@dataclass(frozen=True, slots=True)
class ManifestHead:
    """What a HEAD tells of a manifest; None where the upstream did not say."""

    digest: Digest | None
    size: int | None
    media_type: str

    @property
    def is_told(self) -> bool:
        """Whether size and type are what a client can be told; the page of a captive portal has another type."""
        return self.size is not None and self.media_type in MODERN


@dataclass(frozen=True, slots=True)
class ManifestBody:
    """A manifest as it came, not verified."""

    body: bytes
    content_type: str


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a list as it came, not verified."""

    body: bytes
    content_type: str
    link: tuple[str, ...]

    def following(self) -> ListQuery | None:
        """The query of the next page; raises ``ListInvalid``."""
        return next_page(self.link)


class BlobStream:
    """A blob being received."""

    def __init__(
        self, reply: Reply, offset: int, size: int | None, count: Callable[[int], None], broken: Callable[[str], None]
    ) -> None:
        self.offset = offset
        self.size = size
        self._reply = reply
        self._count = count
        self._broken = broken

    async def read(self) -> bytes:
        """Some more bytes; empty at a clean end. Raises ``UpstreamFailing`` where the stream breaks."""
        try:
            data = await self._reply.read()
        except UpstreamFailing as error:
            self._broken(error.message)
            raise
        except asyncio.CancelledError:
            self._broken("it brought too little for too long")
            raise
        self._count(len(data))
        return data

    def blame(self) -> None:
        """What it brought was wrong: other endpoints are asked before this one for a while."""
        self._broken("it sent wrong content")

    def close(self) -> None:
        """Gives the connection back, or drops it where more would come."""
        self._reply.close()
