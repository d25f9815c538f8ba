"""What a pull of the real image must have brought, whoever pulled it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from . import image as real_image
from .image import RealImage
from .services import REPOSITORY, Containerd, Pullcache, wait_until

UPSTREAM = "registry.test"
NAME = "debian/real"
TAG = real_image.TAG
IMAGE_CACHE = REPOSITORY / ".cache" / "real-image"


def reference(image: RealImage, how: str) -> str:
    """The image by tag or by digest."""
    return f"{NAME}:{TAG}" if how == "tag" else f"{NAME}@{image.index}"


def known_without_upstream(how: str) -> tuple[str, ...]:
    """What can be asked for afterwards: a tag is only known to a cache that was asked for it."""
    return ("tag", "digest") if how == "tag" else ("digest",)


def cold_requests(image: RealImage, how: str, *platforms: str, by_head: bool) -> Counter[str]:
    """All that an upstream may be asked for one pull of platforms that are not held: each part once.

    ``by_head``: the client begins with a HEAD of what was named, as containerd does, and Docker with a tag.
    """
    named = TAG if how == "tag" else image.index
    first = [f"HEAD manifests/{named}", f"GET manifests/{image.index}"] if by_head else [f"GET manifests/{named}"]
    manifests = [f"GET manifests/{image.manifests[platform]}" for platform in platforms]
    blobs = {f"GET blobs/{digest}" for platform in platforms for digest in image.contents[platform]}
    return Counter([*first, *manifests, *blobs])


def warm_requests(how: str) -> Counter[str]:
    """All that it may be asked once they are held: where the tag points, and of a digest nothing."""
    return Counter([f"HEAD manifests/{TAG}"] if how == "tag" else [])


def held(cache: Path) -> dict[str, Path]:
    """What the cache holds, by the digest that the name of the file states."""
    return {f"{file.parent.name}:{file.name}": file for file in cache.glob("blobs/*/*")}


def assert_held(pullcache: Pullcache, cache: Path, digests: frozenset[str] | None = None) -> None:
    """When nothing is being downloaded any more, all that is held has the content of its name. ``digests`` is what."""
    wait_until(lambda: pullcache.figure("fills_in_flight") == 0, "no download runs")
    files = held(cache)
    assert_hashes(files)
    assert digests is None or files.keys() == digests


def once(digests: Iterable[str]) -> Counter[str]:
    """Each of these, one time."""
    return Counter(set(digests))


def assert_hashes(paths: dict[str, Path]) -> None:
    """Every file has the content that its digest says."""
    for digest, path in paths.items():
        with path.open("rb") as file:
            assert f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}" == digest


def assert_layout(layout: Path, image: RealImage) -> None:
    """An OCI layout holds the image, all of it and nothing else, byte for byte."""
    pulled = real_image.read(layout)
    assert pulled.index == image.index
    assert pulled.manifests == image.manifests
    assert pulled.contents == image.contents
    files = {f"sha256:{path.name}": path for path in (layout / "blobs" / "sha256").iterdir()}
    assert files.keys() == image.everything
    assert_hashes(files)


def assert_content(containerd: Containerd, image: RealImage, platform: str) -> None:
    """containerd holds one platform of the image, and nothing else, byte for byte."""
    assert containerd.content() == {digest: image.sizes[digest] for digest in image.of(platform)}
    assert_hashes({digest: containerd.content_path(digest) for digest in image.of(platform)})
