"""What an upstream is asked to find out whether somebody may read a repository: one HEAD of what he wants.

Nothing of a client's goes with it but his credential: what he could spoil would be the answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from proxy.credentials.credential import Asker, Identity
from proxy.errors import ManifestUnknown, UpstreamBroken
from proxy.listings import ListInvalid, ListQuery, parse_tags
from proxy.manifests import MODERN, ManifestInvalid, parse_manifest
from proxy.names import Digest, Reference, Repository
from proxy.storage.store import Store
from proxy.upstream.client import Upstream
from proxy.upstream.content import ManifestBody, Page


@dataclass(frozen=True, slots=True)
class Probe:
    """Asks the upstream for ``what`` of a repository, in somebody's name; raises ``RegistryError`` unless it is a yes."""

    what: str
    ask: Callable[[Identity], Awaitable[None]]
    proves: bool = True
    """Whether its yes is one to pull whatever is in the repository."""
    asks_nobody: bool = False
    """Whether what was said before has to do."""


_ANY = ", ".join(MODERN)


def of_nothing(refusal: str) -> Probe:
    """For what no registry is asked about: without a yes of before it raises ``ManifestUnknown`` of that text."""

    async def probe(identity: Identity) -> None:
        raise ManifestUnknown(refusal)

    return Probe("nothing", probe, proves=False, asks_nobody=True)


def of_manifest(upstream: Upstream, repository: Repository, reference: Reference) -> Probe:
    """Whether a manifest is given; by GET where HEAD does not tell."""

    async def verify(answer: ManifestBody) -> None:
        try:
            parse_manifest(answer.body, answer.content_type)
        except ManifestInvalid as error:  # the 200 of a login page is no yes
            raise UpstreamBroken(f"{upstream.name} sent what is no manifest: {error}") from error
        if isinstance(reference, Digest) and not reference.matches(answer.body):
            raise UpstreamBroken(f"{upstream.name} sent another manifest than {reference}")

    async def probe(identity: Identity) -> None:
        asker = Asker(identity, wants_a_right=True, is_fresh=True)
        head = await upstream.head_manifest(repository, reference, _ANY, asker)
        if not head.is_told or (isinstance(reference, Digest) and head.digest != reference):
            await upstream.get_manifest(repository, reference, _ANY, asker, verify)

    return Probe(f"manifest {reference}", probe)


def of_blob(upstream: Upstream, repository: Repository, digest: Digest, store: Store) -> Probe:
    """Whether a blob is given, of the size that it has; of one that is not held, any 200 would do, so it proves nothing."""

    def verify(told: int | None) -> None:
        held = store.held_size(digest)
        if held is not None and told != held:
            raise UpstreamBroken(f"{upstream.name} says that {digest} has {told} bytes, and it has {held}")

    async def probe(identity: Identity) -> None:
        await upstream.head_blob(repository, digest, Asker(identity, wants_a_right=True, is_fresh=is_held), verify)

    is_held = store.has(digest)
    return Probe(f"blob {digest}", probe, proves=is_held)


def of_list(upstream: Upstream, repository: Repository) -> Probe:
    """Whether the tags are told, which is another right than that to pull."""

    async def verify(page: Page) -> None:
        try:
            parse_tags(page.body)
        except ListInvalid as error:
            raise UpstreamBroken(f"{upstream.name} sent no usable list of tags: {error}") from error

    async def probe(identity: Identity) -> None:
        await upstream.list_tags(
            repository, ListQuery().limited(1), Asker(identity, wants_a_right=True, is_fresh=True), verify
        )

    return Probe("tags", probe, proves=False)
