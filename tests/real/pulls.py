"""What a pull of the real image must have brought, whoever pulled it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from . import image as real_image
from .image import RealImage
from .services import REPOSITORY, Containerd

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
