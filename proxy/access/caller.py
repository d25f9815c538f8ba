"""Who asks us."""

from __future__ import annotations

from dataclasses import dataclass

from proxy.credentials.credential import Credential


@dataclass(frozen=True, slots=True)
class Caller:
    """A client: where it is, what it showed for its registry, and which user of the listener it is."""

    address: str
    credential: Credential | None = None
    user: str | None = None
