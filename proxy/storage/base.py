"""The values that storage, transfers and responses hand to each other."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from proxy.credentials.credential import Proof
from proxy.names import Digest, Repository


@dataclass(frozen=True, slots=True)
class Origin:
    """Where content comes from (``upstream``: what the cache knows it by), and to whom it was given there."""

    upstream: str
    repository: Repository
    proof: Proof
    name: str = field(default="", compare=False)
    """The upstream's, for people."""
    since: int = field(default=0, compare=False)
    """How many withdrawals there had been when the right to it was proved: what is withdrawn later voids it."""


@dataclass(frozen=True, slots=True)
class FileSpan:
    """Bytes that stand in an open file, for ``sendfile``. Valid until the content that gave it is closed."""

    descriptor: int
    offset: int
    count: int


Piece = FileSpan | bytes


class Content(Protocol):
    """The bytes of one digest, complete or still arriving, to be read by one client."""

    @property
    def digest(self) -> Digest:
        """What the bytes hash to; they end cleanly only if they do."""
        ...

    @property
    def size(self) -> int | None:
        """Bytes in all; None while a download has not told."""
        ...

    def read(self, start: int, stop: int | None) -> AsyncIterator[Piece]:
        """The bytes from ``start`` to ``stop`` (None: the end), in order; raises ``RegistryError`` if they end early."""
        ...

    def close(self) -> None:
        """Gives back what reading holds. Must be called exactly once, read or not."""
        ...


class StoredBlob:
    """Content in a file of its own."""

    def __init__(self, digest: Digest, descriptor: int, size: int) -> None:
        self.digest = digest
        self.size = size
        self.descriptor = descriptor

    @property
    def stored(self) -> float:
        """When it was stored (seconds since the epoch)."""
        return os.fstat(self.descriptor).st_mtime

    async def read(self, start: int, stop: int | None) -> AsyncIterator[Piece]:
        """The bytes as one span of the file."""
        end = self.size if stop is None else stop
        if end > start:
            yield FileSpan(self.descriptor, start, end - start)

    def close(self) -> None:
        """Closes the file."""
        os.close(self.descriptor)


class InlineContent:
    """Content in memory: manifests."""

    def __init__(self, digest: Digest, body: bytes) -> None:
        self.digest = digest
        self.size = len(body)
        self._body = body

    async def read(self, start: int, stop: int | None) -> AsyncIterator[Piece]:
        """The bytes in one piece."""
        yield self._body[start:stop]

    def close(self) -> None:
        """Nothing is held."""
