"""Pulls of a real image by skopeo and containerd, through pullcache, from a real registry."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import pytest

from .image import RealImage
from .pulls import (
    UPSTREAM,
    assert_content,
    assert_layout,
    cold_requests,
    known_without_upstream,
    once,
    reference,
    warm_requests,
)
from .services import (
    COMMAND_SECONDS,
    Containerd,
    DockerRegistry,
    Pullcache,
    missing,
    skopeo_pull,
    skopeo_pull_command,
    wait_until,
)

_no_skopeo = missing("docker-registry", "skopeo")
_no_ctr = missing("docker-registry", "skopeo", "containerd", "ctr", root=True)
needs_skopeo = pytest.mark.skipif(_no_skopeo is not None, reason=str(_no_skopeo))
needs_ctr = pytest.mark.skipif(_no_ctr is not None, reason=str(_no_ctr))


def skopeo_pulls(host: str, name: str, image: RealImage, room: Path) -> None:
    """One pull of all platforms by skopeo, looked at and thrown away."""
    with tempfile.TemporaryDirectory(dir=room) as target:
        skopeo_pull(f"{host}/{name}", Path(target))
        assert_layout(Path(target), image)


def ctr_pulls(mirror: str, name: str, image: RealImage, platform: str, room: Path, unpack: bool = True) -> None:
    """One pull of one platform by a containerd that has nothing yet."""
    with tempfile.TemporaryDirectory(dir=room) as home, Containerd(Path(home)) as containerd:
        containerd.hosts_toml(UPSTREAM, mirror)
        if unpack:
            containerd.pull(f"{UPSTREAM}/{name}", platform=platform)
        else:
            containerd.fetch(f"{UPSTREAM}/{name}", platform=platform)
        assert containerd.images() == {f"{UPSTREAM}/{name}": image.index}
        assert_content(containerd, image, platform)


@needs_skopeo
@pytest.mark.parametrize("how", ["tag", "digest"])
def test_skopeo_without_pullcache(upstream: DockerRegistry, image: RealImage, room: Path, how: str) -> None:
    """What the tests below compare with: the registry alone."""
    skopeo_pulls(upstream.host, reference(image, how), image, room)
    assert upstream.wait_for_blobs(image.blobs) == once(image.blobs)


@needs_ctr
@pytest.mark.parametrize("how", ["tag", "digest"])
def test_ctr_without_pullcache(upstream: DockerRegistry, image: RealImage, room: Path, how: str) -> None:
    """What the tests below compare with: the registry alone, as its own mirror."""
    wanted = frozenset(image.contents["linux/amd64"])
    ctr_pulls(upstream.url, reference(image, how), image, "linux/amd64", room)
    assert upstream.wait_for_blobs(wanted) == once(wanted)


@needs_skopeo
@pytest.mark.parametrize("how", ["tag", "digest"])
def test_skopeo_cold_warm_and_without_upstream(
    upstream: DockerRegistry, pullcache: Pullcache, image: RealImage, room: Path, how: str
) -> None:
    """All platforms: each part is asked for once, a warm tag by one HEAD; without a registry all is served."""
    name = reference(image, how)
    skopeo_pulls(pullcache.host, f"{UPSTREAM}/{name}", image, room)
    cold = cold_requests(image, how, *image.manifests, by_head=False)
    assert upstream.asked(cold) == cold

    skopeo_pulls(pullcache.host, f"{UPSTREAM}/{name}", image, room)
    skopeo_pulls(pullcache.host, name, image, room)
    upstream.stop()  # then its log is complete
    wanted = cold + warm_requests(how) + warm_requests(how)
    assert upstream.asked(wanted) == wanted

    for known in known_without_upstream(how):
        skopeo_pulls(pullcache.host, f"{UPSTREAM}/{reference(image, known)}", image, room)


@needs_ctr
@pytest.mark.parametrize(("how", "platform"), [("tag", "linux/amd64"), ("digest", "linux/amd64"), ("tag", "linux/arm64")])
def test_ctr_cold_warm_and_without_upstream(
    upstream: DockerRegistry, pullcache: Pullcache, image: RealImage, room: Path, how: str, platform: str
) -> None:
    """One platform, through ``hosts.toml``: its parts are asked for once, and no others; a warm tag by one HEAD."""
    name = reference(image, how)
    ctr_pulls(pullcache.url, name, image, platform, room)
    cold = cold_requests(image, how, platform, by_head=True)
    assert upstream.asked(cold) == cold

    ctr_pulls(pullcache.url, name, image, platform, room, unpack=False)
    upstream.stop()  # then its log is complete
    wanted = cold + warm_requests(how)
    assert upstream.asked(wanted) == wanted

    for known in known_without_upstream(how):
        ctr_pulls(pullcache.url, reference(image, known), image, platform, room, unpack=False)


@needs_ctr
def test_one_client_warms_the_cache_for_another(
    upstream: DockerRegistry, pullcache: Pullcache, image: RealImage, room: Path
) -> None:
    """What containerd pulled by ``?ns=`` is not fetched again for skopeo, which asks by path."""
    ctr_pulls(pullcache.url, reference(image, "tag"), image, "linux/amd64", room, unpack=False)
    skopeo_pulls(pullcache.host, f"{UPSTREAM}/{reference(image, 'tag')}", image, room)
    assert upstream.wait_for_blobs(image.blobs) == once(image.blobs)


@needs_skopeo
def test_cold_pulls_at_the_same_time(upstream: DockerRegistry, pullcache: Pullcache, image: RealImage, room: Path) -> None:
    """Three clients at once, all cold: still one download of each blob."""
    targets = [room / f"pulled-{number}" for number in range(3)]
    source = f"{pullcache.host}/{UPSTREAM}/{reference(image, 'tag')}"
    clients = [start_skopeo_pull(source, target) for target in targets]
    said = [client.communicate(timeout=COMMAND_SECONDS)[0] for client in clients]
    assert [client.returncode for client in clients] == [0, 0, 0], said
    for target in targets:
        assert_layout(target, image)
    assert upstream.wait_for_blobs(image.blobs) == once(image.blobs)


@needs_skopeo
def test_restart_keeps_the_cache(upstream: DockerRegistry, pullcache: Pullcache, image: RealImage, room: Path) -> None:
    """After a clean stop and a start, with no registry to ask."""
    skopeo_pulls(pullcache.host, f"{UPSTREAM}/{reference(image, 'tag')}", image, room)
    upstream.stop()
    assert pullcache.stop() == 0
    pullcache.start()
    for how in ("tag", "digest"):
        skopeo_pulls(pullcache.host, f"{UPSTREAM}/{reference(image, how)}", image, room)


@needs_skopeo
def test_killed_during_a_pull(upstream: DockerRegistry, pullcache: Pullcache, image: RealImage, room: Path) -> None:
    """What a killed process leaves behind is never served as a blob."""
    source = f"{pullcache.host}/{UPSTREAM}/{reference(image, 'tag')}"
    client = start_skopeo_pull(source, room / "broken")
    try:
        wait_until(lambda: size_of(room / "cache") > 10_000_000, "the cache holds a part of the image")
        pullcache.kill()
    finally:
        client.kill()
        client.communicate()
    pullcache.start()
    skopeo_pulls(pullcache.host, f"{UPSTREAM}/{reference(image, 'tag')}", image, room)
    upstream.stop()
    skopeo_pulls(pullcache.host, f"{UPSTREAM}/{reference(image, 'tag')}", image, room)


def start_skopeo_pull(source: str, target: Path) -> subprocess.Popen[str]:
    """``skopeo_pull`` in the background."""
    command = skopeo_pull_command(source, target)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def size_of(directory: Path) -> int:
    """The bytes in the files of a directory that is being written to."""
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total
