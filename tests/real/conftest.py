"""The real image, its registry, and pullcache before it, for every test of real clients."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import image as real_image
from .image import RealImage
from .pulls import IMAGE_CACHE, NAME, TAG, UPSTREAM
from .services import DockerRegistry, Pullcache, pullcache_config


@pytest.fixture(scope="session")
def image() -> RealImage:
    """The image, made on first use."""
    reason = real_image.missing(IMAGE_CACHE)
    if reason is not None:
        pytest.skip(reason)
    return real_image.build(IMAGE_CACHE)


@pytest.fixture(scope="session")
def data(image: RealImage) -> Iterator[Path]:
    """The data of a registry to which the image was pushed."""
    with tempfile.TemporaryDirectory(prefix="upstream-") as name:
        with DockerRegistry(Path(name)) as registry:
            registry.push(image.layout, f"{NAME}:{TAG}")
        yield registry.data


@pytest.fixture
def room() -> Iterator[Path]:
    """A directory that is gone after the test: pulled images are large."""
    with tempfile.TemporaryDirectory(prefix="real-") as name:
        yield Path(name)


@pytest.fixture
def upstream(room: Path, data: Path) -> Iterator[DockerRegistry]:
    """The registry that has the image, with an empty access log."""
    with DockerRegistry(room / "upstream", data) as registry:
        yield registry


@pytest.fixture
def pullcache(room: Path, upstream: DockerRegistry) -> Iterator[Pullcache]:
    """pullcache with an empty cache, in front of that registry."""
    config = pullcache_config(room / "cache", UPSTREAM, upstream.url)
    with Pullcache(config, root=room / "pullcache") as server:
        yield server
        print(server.log[-4000:])  # pytest shows it when the test failed
