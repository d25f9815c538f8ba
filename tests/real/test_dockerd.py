"""Pulls of a real image by dockerd, with graph drivers and with the containerd image store, through pullcache."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .dockerd import Dockerd, newer
from .image import RealImage
from .line import Line
from .pulls import IMAGE_CACHE, NAME, TAG, UPSTREAM, assert_hashes, reference
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


def port_of(server: Pullcache) -> int:
    """The port on which clients reach it."""
    return int(server.host.rpartition(":")[2])


def figure(server: Pullcache, name: str) -> float:
    """The sum of a figure over its labels."""
    with urllib.request.urlopen(f"{server.admin_url}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if re.match(rf"{name}[{{ ]", line))


def needed(image: RealImage, platform: str, *first: str) -> Counter[str]:
    """One request for what is ``first`` asked, and one GET for each manifest and blob of a platform."""
    return Counter([*first, *(f"GET {digest}" for digest in image.of(platform))])


def first_request(how: str, image: RealImage, kind: Kind) -> list[str]:
    """What upstream is asked before anything is fetched."""
    if how == "tag":
        return [f"HEAD {TAG}"]
    return [f"HEAD {image.index}"] if kind.store else []


def asked(registry: DockerRegistry, wanted: Counter[str]) -> Counter[str]:
    """All that a registry was asked, by method and by tag or digest, once it was asked for what is wanted."""

    def now() -> Counter[str]:
        return Counter(f"{request.method} {request.path.rpartition('/')[2]}" for request in registry.requests())

    with contextlib.suppress(ServiceError):  # the caller compares
        wait_until(lambda: now() >= wanted, "the log names the requests", 5)
    return now()


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


def assert_cache(room: Path) -> None:
    """Whatever pullcache keeps has the content that its name says."""
    assert_hashes({f"sha256:{path.name}": path for path in (room / "cache" / "blobs" / "sha256").iterdir()})


@pytest.mark.parametrize(("how", "repository"), [("tag", "real"), ("digest", "docker.io/debian/real")])
def test_docker_hub_image_cold_warm_and_without_registry(
    hub: DockerRegistry, mirror: Pullcache, image: RealImage, room: Path, kind: Kind, how: str, repository: str
) -> None:
    """Through ``registry-mirrors``: each manifest and blob is asked for once, a tag by one HEAD at each pull, no more.

    The containerd image store begins a pull by digest with a HEAD as well; while the manifest is not held, upstream gets it.
    """
    name = f"{repository}:{TAG}" if how == "tag" else f"{repository}@{image.index}"
    with kind.daemon(room, mirror.url) as docker:
        docker.pull(name, ARM64)
        assert_image(docker, name, image)
        wanted = needed(image, ARM64, *first_request(how, image, kind))
        assert asked(hub, wanted) == wanted

        docker.forget()
        hub.forget()
        if how == "tag":
            docker.pull(name, ARM64)
            assert_image(docker, name, image)
            wanted = Counter([f"HEAD {TAG}"])
            assert asked(hub, wanted) == wanted
            docker.forget()

        hub.stop()
        docker.pull(name, ARM64)
        assert_image(docker, name, image)


@pytest.mark.parametrize("kind", ["graph"], indirect=True)
def test_a_large_layer(hub: DockerRegistry, mirror: Pullcache, image: RealImage, room: Path, kind: Kind) -> None:
    """The other platform, with a layer of more than 100 MB that is not compressed."""
    name = f"real:{TAG}"
    with kind.daemon(room, mirror.url) as docker:
        docker.pull(name, AMD64)
        assert_image(docker, name, image, AMD64)
    wanted = needed(image, AMD64, f"HEAD {TAG}")
    assert asked(hub, wanted) == wanted


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
    wanted = needed(image, ARM64, f"HEAD {TAG}")
    assert asked(upstream, wanted) == wanted


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
    wanted = needed(image, ARM64, f"HEAD {TAG}")
    assert asked(upstream, wanted) == wanted


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
                wait_until(lambda: figure(mirror, "pullcache_mismatches_total") > 0, "pullcache saw it", 30)
                line.heal()
                said = pulling.communicate(timeout=COMMAND_SECONDS)[0]
            finally:
                pulling.kill()
        assert_cache(room)
        if kind.store:
            assert pulling.returncode != 0, said
            with kind.daemon(room / "another", mirror.url) as another:
                another.pull(name, ARM64)
                assert_image(another, name, image)
        else:
            assert pulling.returncode == 0, said
            assert "retrying (1/5): unexpected EOF" in docker.log
            assert_image(docker, name, image)
        assert figure(mirror, "pullcache_mismatches_total") == 1
        assert_cache(room)
    again = image.contents[ARM64][1]
    wanted = Counter({f"GET {digest}": 1 + (digest == again) for digest in image.of(ARM64)})
    got = asked(hub, wanted)
    assert {what: got[what] for what in wanted} == wanted


def test_a_line_cut_between_docker_and_the_cache(
    hub: DockerRegistry, mirror: Pullcache, image: RealImage, room: Path, kind: Kind
) -> None:
    """Graph drivers go on by themselves: they ask for the rest, and get it as 206. The registry is not asked again.

    The containerd image store fails when a connection is reset. What it has it keeps for some seconds, and the next
    ``docker pull`` asks for the rest, or for all.
    """
    name = f"real:{TAG}"
    with Line(port_of(mirror), keep=100_000) as line, kind.daemon(room, line.url) as docker:
        line.cut_after(MIDWAY)  # what is missing then is shorter: one cut
        if kind.store:
            with pytest.raises(ServiceError, match="connection reset by peer"):
                docker.pull(name, ARM64)
            line.heal()
        docker.pull(name, ARM64)
        assert_image(docker, name, image)
        ranges = re.findall(rb"\r\nRange: bytes=(\d+)-\r\n", b"".join(map(bytes, line.requests)))
    parts = [entry for entry in mirror.log.splitlines() if 'status="206"' in entry and image.contents[ARM64][1] in entry]
    assert len(parts) == len(ranges)
    if not kind.store:
        assert [0 < int(start) < MIDWAY for start in ranges] == [True]
    wanted = needed(image, ARM64, *([f"HEAD {TAG}"] * (2 if kind.store else 1)))
    assert asked(hub, wanted) == wanted


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
