"""Which content is proved to be in which repository, and how that is proved.

Content is shared between repositories, the right to read it is not. A digest is served for a repository only after its link
there was proved, by our own GET or HEAD of it or by a manifest of that repository that names it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from proxy.answers import Target
from proxy.credentials.credential import Identity
from proxy.errors import ManifestUnknown, RegistryError, UpstreamBroken
from proxy.image_pull_policy import never_pulled
from proxy.metrics import Metrics
from proxy.names import Digest, Reference, Repository
from proxy.once import Once
from proxy.storage.store import Store
from proxy.threads import Threads
from proxy.upstream.client import Upstream


class Links:
    """The links of what is held, as far as a client may use them."""

    def __init__(self, upstreams: Mapping[str, Upstream], store: Store, threads: Threads, metrics: Metrics) -> None:
        self._upstreams = upstreams
        self._store = store
        self._threads = threads
        self._metrics = metrics
        self._proofs: Once[tuple[str, Repository, Digest, Identity], None] = Once()

    def upstream_of(self, target: Target, what: Reference, unknown: type[RegistryError] = ManifestUnknown) -> Upstream:
        """Whom to ask; raises ``unknown`` where nobody may be asked."""
        if not target.pull_policy.asks:
            name = f"{target.upstream}/{target.repository}{'@' if isinstance(what, Digest) else ':'}{what}"
            raise unknown(never_pulled(name, target.pull_policy))
        return self._upstreams[target.upstream]

    def is_linked(self, target: Target, digest: Digest) -> bool:
        """Whether it was proved for this client's kind of proof."""
        return self._store.is_linked(target.key, target.repository, digest, public=target.is_public)

    def is_named(self, target: Target, digest: Digest) -> bool:
        """Whether a manifest that is linked names it."""
        return self._store.is_named(target.key, target.repository, digest, public=target.is_public)

    async def prove(self, target: Target, digest: Digest, head: Callable[[], Awaitable[None]]) -> None:
        """One HEAD for all who wait, by which the upstream says that the content is in that repository."""

        async def ask() -> None:
            await head()
            await self.link(target, digest)

        await self._proofs.run((target.upstream, target.repository, digest, target.asker.identity), ask)

    async def link(self, target: Target, digest: Digest) -> None:
        """It was proved."""
        if not self.is_linked(target, digest):
            await self._threads.run(self._store.link, target.origin, digest)

    def mismatch(self, target: Target, text: str) -> UpstreamBroken:
        """What an upstream has said or sent cannot be so."""
        self._metrics.mismatches.labels(target.upstream).inc()
        return UpstreamBroken(f"{target.upstream} {text}; nothing was kept")
