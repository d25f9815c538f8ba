"""Pulls of a real image by dockerd, with graph drivers and with the containerd image store, through pullcache."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .dockerd import Dockerd, newer
from .image import RealImage
from .line import Line
from .pulls import IMAGE_CACHE, NAME, TAG, UPSTREAM, assert_hashes, assert_held, cold_requests, reference, warm_requests
from .services import (
    COMMAND_SECONDS,
    DockerRegistry,
    Pullcache,
    ServiceError,
    missing,
    pullcache_config,
    run,
    wait_until,
)

_no_dockerd = missing("docker-registry", "skopeo", "dockerd", "docker", "containerd", "unshare", root=True)
pytestmark = pytest.mark.skipif(_no_dockerd is not None, reason=str(_no_dockerd))

AMD64 = "linux/amd64"
ARM64 = "linux/arm64"  # the small one: nothing of it is run
MIDWAY = 15_000_000
"""A byte of the largest layer of linux/arm64; everything else that the pull needs is shorter."""


@dataclass(frozen=True)
class Kind:
    """A dockerd and where it keeps images."""

    store: bool
    programs: Path | None = None

    @property
    def release(self) -> int:
        """The first number of its version."""
        said = run([self.programs / "usr" / "sbin" / "dockerd" if self.programs else "dockerd", "--version"])
        found = re.search(r"version (\d+)", said)
        return int(found[1]) if found else 0

    def daemon(self, room: Path, *mirrors: str) -> Dockerd:
        """One that has no image yet."""
        return Dockerd(room / "dockerd", mirrors, self.programs, self.store)


@pytest.fixture(scope="session", params=["graph", "store"])
def kind(request: pytest.FixtureRequest) -> Kind:
    """The installed dockerd with its graph drivers, and a newer one with the containerd image store."""
    if request.param == "graph":
        return Kind(store=False)
    try:
        return Kind(store=True, programs=newer(IMAGE_CACHE.parent))
    except (ServiceError, OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"not to be had here: a dockerd with the containerd image store: {error}")


@pytest.fixture(scope="session")
def hub_data(data: Path) -> Iterator[Path]:
    """The data of a Docker Hub that has the image twice: as an official one, and as an owner's."""
    with tempfile.TemporaryDirectory(prefix="hub-", dir=data.parent.parent) as name:
        copy = Path(name) / "data"
        shutil.copytree(data, copy, copy_function=os.link)
        repositories = copy / "docker" / "registry" / "v2" / "repositories"
        shutil.copytree(repositories / NAME, repositories / "library" / "real")
        yield copy


@pytest.fixture
def hub(room: Path, hub_data: Path) -> Iterator[DockerRegistry]:
    """What pullcache knows as docker.io, with an empty access log."""
    with DockerRegistry(room / "hub", hub_data) as registry:
        yield registry


@pytest.fixture
def mirror(room: Path, hub: DockerRegistry) -> Iterator[Pullcache]:
    """pullcache with an empty cache, in front of that registry."""
    with serve(room, hub.url) as server:
        yield server


@contextlib.contextmanager
def serve(room: Path, endpoint: str) -> Iterator[Pullcache]:
    """pullcache as the mirror of Docker Hub, which is at ``endpoint``."""
    with Pullcache(pullcache_config(room / "cache", "docker.io", endpoint), root=room / "pullcache") as server:
        yield server
        print(server.log[-4000:])  # pytest shows it when the test failed


def cold(image: RealImage, kind: Kind, how: str = "tag", platform: str = ARM64) -> Counter[str]:
    """What upstream is asked for a cold pull: the image store begins one by digest with a HEAD, too."""
    return cold_requests(image, how, platform, by_head=how == "tag" or kind.store)


def assert_image(docker: Dockerd, name: str, image: RealImage, platform: str = ARM64) -> None:
    """docker has one platform of the image under this name, with the right digests everywhere."""
    found = docker.inspect(name)
    repository = re.sub(r"(@sha256:.*|:\w+)$", "", name).removeprefix("docker.io/")
    assert found["RepoDigests"] == [f"{repository}@{image.index}"]
    config = image.contents[platform][0]
    assert found["RootFS"]["Layers"] == json.loads(image.path(config).read_text())["rootfs"]["diff_ids"]
    if not docker.containerd_store:
        assert found["Id"] == config
        return
    assert found["Id"] == image.index
    kept = docker.root / "data" / "containerd" / "daemon" / "io.containerd.content.v1.content" / "blobs" / "sha256"
    files = {f"sha256:{path.name}": path for path in kept.iterdir()}
    assert files.keys() == image.of(platform)
    assert_hashes(files)


@pytest.mark.parametrize(("how", "repository"), [("tag", "real"), ("digest", "docker.io/debian/real")])
def test_docker_hub_image_cold_warm_and_without_registry(
    hub: DockerRegistry, mirror: Pullcache, image: RealImage, room: Path, kind: Kind, how: str, repository: str
) -> None:
    """Through ``registry-mirrors``: each manifest and blob is asked for once, a tag by one HEAD at each pull, no more."""
    name = f"{repository}:{TAG}" if how == "tag" else f"{repository}@{image.index}"
    with kind.daemon(room, mirror.url) as docker:
        docker.pull(name, ARM64)
        assert_image(docker, name, image)
        wanted = cold(image, kind, how)
        assert hub.asked(wanted) == wanted

        docker.forget()
        docker.pull(name, ARM64)
        assert_image(docker, name, image)
        docker.forget()
        hub.stop()  # then its log is complete
        wanted += warm_requests(how)
        assert hub.asked(wanted) == wanted
        docker.pull(name, ARM64)
        assert_image(docker, name, image)


@pytest.mark.parametrize("kind", ["graph"], indirect=True)
def test_a_large_layer(hub: DockerRegistry, mirror: Pullcache, image: RealImage, room: Path, kind: Kind) -> None:
    """The other platform, with a layer of more than 100 MB that is not compressed."""
    name = f"real:{TAG}"
    with kind.daemon(room, mirror.url) as docker:
        docker.pull(name, AMD64)
        assert_image(docker, name, image, AMD64)
    wanted = cold(image, kind, platform=AMD64)
    assert hub.asked(wanted) == wanted


@pytest.mark.parametrize("kind", ["graph"], indirect=True)
def test_a_second_name_of_the_same_image(
    hub: DockerRegistry, mirror: Pullcache, image: RealImage, room: Path, kind: Kind
) -> None:
    """What was fetched as an official image serves an owner's one, after questions without a body."""
    with kind.daemon(room, mirror.url) as docker:
        docker.pull(f"real:{TAG}", ARM64)
        hub.forget()
        docker.forget()
        docker.pull(f"{NAME}@{image.index}", ARM64)
        assert_image(docker, f"{NAME}@{image.index}", image)
        assert {request.method for request in hub.requests()} == {"HEAD"}


def test_the_cache_named_in_front(
    upstream: DockerRegistry, pullcache: Pullcache, image: RealImage, room: Path, kind: Kind
) -> None:
    """Any registry, by naming the cache before it; loopback may be http without being told."""
    name = f"{pullcache.host}/{UPSTREAM}/{reference(image, 'tag')}"
    with kind.daemon(room) as docker:
        docker.pull(name, ARM64)
        assert_image(docker, name, image)
    wanted = cold(image, kind)
    assert upstream.asked(wanted) == wanted


@pytest.mark.parametrize("kind", ["store"], indirect=True)
def test_hosts_toml_makes_it_the_mirror_of_any_registry(
    upstream: DockerRegistry, pullcache: Pullcache, image: RealImage, room: Path, kind: Kind
) -> None:
    """With the containerd image store a ``hosts.toml`` below Docker's ``certs.d`` does what ``registry-mirrors`` cannot."""
    if kind.release < 28:
        pytest.skip("not to be had here: a dockerd that reads it; 28 does (PULLCACHE_DOCKER_SUITE=sid), 26 does not")
    name = f"{UPSTREAM}/{reference(image, 'tag')}"
    with kind.daemon(room) as docker:
        folder = docker.certs_dir / UPSTREAM
        folder.mkdir()
        (folder / "hosts.toml").write_text(f'[host."{pullcache.url}"]\ncapabilities = ["pull", "resolve"]\n')
        docker.pull(name, ARM64)
        assert_image(docker, name, image)
    wanted = cold(image, kind)
    assert upstream.asked(wanted) == wanted


def test_a_layer_that_arrives_corrupt(hub: DockerRegistry, image: RealImage, room: Path, kind: Kind) -> None:
    """It reaches neither docker nor the cache; once the line is sound the image comes.

    Graph drivers wait and try the layer anew. The containerd image store fails, and for some seconds would go on with what
    it got, which is refused: so it is another machine's pull that succeeds at once.
    """
    name = f"real:{TAG}"
    with Line(hub.port) as line, serve(room, line.url) as mirror, kind.daemon(room, mirror.url) as docker:
        line.garble_at(MIDWAY)
        command = docker.docker_command("pull", "--platform", ARM64, name)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pulling:
            try:
                wait_until(lambda: mirror.figure("mismatches_total") > 0, "pullcache saw it", 30)
                line.heal()
                said = pulling.communicate(timeout=COMMAND_SECONDS)[0]
            finally:
                pulling.kill()
        assert_held(mirror, room / "cache")
        if kind.store:
            assert pulling.returncode != 0, said
            with kind.daemon(room / "another", mirror.url) as another:
                another.pull(name, ARM64)
                assert_image(another, name, image)
        else:
            assert pulling.returncode == 0, said
            assert "retrying (1/5): unexpected EOF" in docker.log
            assert_image(docker, name, image)
        assert mirror.figure("mismatches_total") == 1
        assert_held(mirror, room / "cache")
        assert_held(mirror, room / "cache", image.of(ARM64))
    wanted = cold(image, kind) + Counter([f"GET blobs/{image.contents[ARM64][1]}"])
    wanted += warm_requests("tag") if kind.store else Counter()
    assert hub.asked(wanted) == wanted


def test_a_registry_that_breaks_off(hub: DockerRegistry, image: RealImage, room: Path, kind: Kind) -> None:
    """Every connection to it ends early, more often than pullcache goes on; once that is over the next pull is right.

    Graph drivers try the layer anew by themselves. The containerd image store fails, and is told to pull again.
    """
    name = f"real:{TAG}"
    with Line(hub.port) as line, serve(room, line.url) as mirror, kind.daemon(room, mirror.url) as docker:
        line.cut_after(5_000)
        command = docker.docker_command("pull", "--platform", ARM64, name)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pulling:
            try:
                wait_until(lambda: mirror.figure('fills_total{result="failed"}') > 0, "pullcache has given up", 60)
                assert_held(mirror, room / "cache")
                line.heal()
                said = pulling.communicate(timeout=COMMAND_SECONDS)[0]
            finally:
                pulling.kill()
        if kind.store and pulling.returncode != 0:
            docker.pull(name, ARM64)
        else:
            assert pulling.returncode == 0, said
        assert_image(docker, name, image)
        assert_held(mirror, room / "cache", image.of(ARM64))
        assert mirror.figure("mismatches_total") == 0


def test_a_line_cut_between_docker_and_the_cache(
    hub: DockerRegistry, mirror: Pullcache, image: RealImage, room: Path, kind: Kind
) -> None:
    """Graph drivers go on by themselves: they ask for the rest, and get it as 206. The registry is not asked again.

    The containerd image store goes on where it sees an end; as a rule it sees a reset, and fails. What it has it
    keeps for some seconds, and the next ``docker pull`` asks for the rest, or for all.
    """
    name = f"real:{TAG}"
    with Line(mirror.port, keep=100_000) as line, kind.daemon(room, line.url) as docker:
        line.cut_after(MIDWAY)  # what is missing then is shorter: one cut
        if kind.store:
            try:
                docker.pull(name, ARM64)
            except ServiceError as error:
                assert "connection reset by peer" in str(error)  # noqa: PT017 - it may also go on by itself
            line.heal()
        docker.pull(name, ARM64)
        assert_image(docker, name, image)
        layer = image.contents[ARM64][1]
        heads = b"".join(map(bytes, line.requests)).split(b"\r\n\r\n")  # the small layer may have been cut, too
        ranges = [
            found[1]
            for head in heads
            if layer.encode() in head.partition(b"\r\n")[0] and (found := re.search(rb"\r\nRange: bytes=(\d+)-", head))
        ]
    parts = [entry for entry in mirror.log.splitlines() if 'status="206"' in entry and layer in entry]
    assert len(parts) == len(ranges)
    if not kind.store:
        assert [0 < int(start) < MIDWAY for start in ranges] == [True]
    wanted = cold(image, kind) + (warm_requests("tag") if kind.store else Counter())
    assert hub.asked(wanted) == wanted


def test_dockerd_leaves_nothing_behind(room: Path, kind: Kind) -> None:
    """Stopped or killed: no process and no mount of it is left, and it starts again."""
    docker = kind.daemon(room)
    for end in (docker.kill, docker.stop):
        docker.start()
        assert len(docker.left_behind()) == 2  # itself and its containerd
        assert docker.docker("image", "ls", "--quiet") == ""
        end()
        assert not docker.left_behind()
        assert not docker.mounts()
