"""Which image a blob is pulled for: the manifest in the middle, between a tag or an index and the layers."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from cachetools import TTLCache

from proxy.answers import Target
from proxy.names import Digest, Repository
from proxy.storage.store import Store

_CLIENTS = 10_000
_REMEMBERED = 3600.0  # seconds: a large image on a slow line
_LATEST = 16


class Images:
    """The manifests that clients were given last, so that of several that name a blob the right one is known.

    ``are_counted``: whether anybody wants to know.
    """

    def __init__(self, store: Store, clock: Callable[[], float], *, are_counted: bool) -> None:
        self._store = store
        self._are_counted = are_counted
        self._served: TTLCache[tuple[int, str, Repository], tuple[Digest, ...]] = TTLCache(
            _CLIENTS, _REMEMBERED, timer=clock
        )

    def serve(self, target: Target, manifest: Digest) -> None:
        """A client is told of a manifest, or given it."""
        if not self._are_counted:
            return
        key = (target.client, target.key, target.repository)
        before = self._served.pop(key, ())
        self._served[key] = (manifest, *(each for each in before if each != manifest))[:_LATEST]

    def of(self, target: Target, digest: Digest) -> Hashable:
        """What a client pulls that asks for this blob: of the held manifests of the repository that name it the one that it
        was given last, else any of them, else the blob itself."""
        if not self._are_counted:
            return None
        latest = self._served.get((target.client, target.key, target.repository), ())
        manifest = self._store.named_by(target.key, target.repository, digest, latest)
        return target.key, target.repository, manifest or digest
