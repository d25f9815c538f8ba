"""What a client asks about, and what it is told: the vocabulary between the endpoints and what answers them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from proxy.credentials.credential import Asker
from proxy.image_pull_policy import PullDecision
from proxy.names import Digest, Repository
from proxy.policy import Decision
from proxy.storage.base import Content, Origin


@dataclass(frozen=True, slots=True)
class Target:
    """What a client wants something of, and in whose name it is asked for."""

    upstream: str
    key: str
    """What the cache knows the upstream by."""
    repository: Repository
    asker: Asker
    pull_policy: PullDecision
    since: int = 0
    """How many withdrawals there had been when the right was proved."""
    client: int = 0
    """Who asks, as a number that is the same for the same client and credential, and tells nothing of either."""

    @property
    def origin(self) -> Origin:
        """What content is that comes from there."""
        return Origin(self.key, self.repository, self.asker.identity.proof, self.upstream, self.since)

    @property
    def is_public(self) -> bool:
        """Whether anybody may have what is there."""
        return self.asker.identity.proof == "anonymous"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client is told. ``content`` is None where only its headers are known; whoever gets it closes it.

    ``changes``: another answer may be right tomorrow. ``is_private``: it is for who asked, and nobody else. ``headers``:
    those of this kind of answer only. ``age``: seconds since the upstream was last heard to say this; of content by digest,
    since it was stored. Negative where the clock has gone back.
    """

    digest: Digest
    size: int | None
    media_type: str
    decision: Decision
    content: Content | None
    changes: bool = False
    is_private: bool = False
    warning: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    age: float = 0.0

    def close(self) -> None:
        """Gives the content back."""
        if self.content is not None:
            self.content.close()
