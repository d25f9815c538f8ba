"""What a client asks about, and what it is told: the vocabulary between the endpoints and what answers them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from proxy.names import Digest, Repository
from proxy.storage.base import Content

Decision = Literal["hit", "revalidated", "miss", "follow", "head", "pass", "stale"]
"""hit: held, nobody asked; revalidated: held, upstream said it still is so; miss: fetched; follow: somebody else was
fetching it; head: upstream told of it; pass: fetched, and not kept; stale: held, upstream was failing."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a client wants something from, and the proxies that its request came through."""

    upstream: str
    repository: Repository
    via: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client is told. ``content`` is None where only its headers are known; whoever gets it closes it.

    ``changes``: another answer may be right tomorrow. ``headers``: those of this kind of answer only.
    """

    digest: Digest
    size: int | None
    media_type: str
    decision: Decision
    content: Content | None
    changes: bool = False
    warning: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def close(self) -> None:
        """Gives the content back."""
        if self.content is not None:
            self.content.close()
