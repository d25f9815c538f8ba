"""What is held of an image: where its tag points, which platforms' manifests are here, and which of their blobs are not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from proxy.errors import ManifestUnknown
from proxy.manifests import INDEXES, Manifest, ManifestInvalid, parse_manifest
from proxy.names import Digest, Reference, Repository
from proxy.platforms import Platform, platforms, select
from proxy.storage.store import Store

_MODERN = ""  # the class of ``Accept`` of those who take every type of today


@dataclass(frozen=True, slots=True)
class HeldImage:
    """One platform's image. ``size``: the bytes of its blobs that are held."""

    platform: str
    manifest: Digest
    held: int
    size: int
    missing: tuple[Digest, ...]

    @property
    def is_complete(self) -> bool:
        """Whether manifest, config and all layers are held."""
        return not self.missing


@dataclass(frozen=True, slots=True)
class Holding:
    """What is held for a reference. ``manifest``: the image or index that it means, None where that is not held; ``age``:
    seconds since the upstream last said that the tag points there, None for a digest."""

    manifest: Digest | None = None
    age: float | None = None
    images: Sequence[HeldImage] = ()
    wanted: Sequence[HeldImage] = ()
    """Those of the platform that was asked for; where none was, the one of which the least is missing."""
    error: str = ""
    """Why there is none of that platform."""

    @property
    def is_complete(self) -> bool:
        """Whether all that is wanted can be pulled from here."""
        return bool(self.wanted) and all(image.is_complete for image in self.wanted)

    @property
    def missing(self) -> tuple[Digest, ...]:
        """What of it is not held."""
        return tuple(dict.fromkeys(digest for image in self.wanted for digest in image.missing))


def holding(
    store: Store, upstream: str, repository: Repository, reference: Reference, platform: Platform | None = None
) -> Holding:
    """What is held for a reference in a repository; ``upstream``: its key. Reads inline."""
    age = None
    if isinstance(reference, Digest):
        digest = reference
        if not store.is_linked(upstream, repository, digest, public=False):
            return Holding()
    elif (tagged := store.tagged(upstream, repository, reference, _MODERN)) is None:
        return Holding()
    else:
        digest, age = tagged.digest, max(0.0, time.time() - tagged.checked)
    if (found := _manifest(store, digest)) is None:
        return Holding()
    manifest, body = found
    if manifest.media_type not in INDEXES:
        image = _image(store, "", digest, manifest)
        return Holding(digest, age, (image,), (image,))
    images = [_of_index(store, *each) for each in platforms(manifest, body)]
    if platform is None:
        return Holding(digest, age, images, sorted(images, key=lambda image: len(image.missing) + (not image.held))[:1])
    try:
        wanted = select(manifest, body, platform)
    except ManifestUnknown as error:
        return Holding(digest, age, images, error=error.message)
    return Holding(digest, age, images, [image for image in images if image.manifest in wanted])


def _of_index(store: Store, platform: Platform | None, digest: Digest) -> HeldImage:
    name = str(platform) if platform else ""
    found = _manifest(store, digest)
    return _image(store, name, digest, found[0]) if found else HeldImage(name, digest, 0, 0, (digest,))


def _image(store: Store, platform: str, digest: Digest, manifest: Manifest) -> HeldImage:
    sizes = {child.digest: store.held_size(child.digest) for child in manifest.children}
    held = [size for size in sizes.values() if size is not None]
    missing = tuple(child for child, size in sizes.items() if size is None)
    return HeldImage(platform, digest, len(held), sum(held), missing)


def _manifest(store: Store, digest: Digest) -> tuple[Manifest, bytes] | None:
    if (found := store.manifest(digest)) is None:
        return None
    body, media_type = found[:2]
    try:
        return parse_manifest(body, media_type), body
    except ManifestInvalid:
        return None
