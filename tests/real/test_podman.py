"""Pulls of a real image by podman, skopeo and buildah, through the mirrors of registries.conf."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from .containers import Containers, Mirror, Pulled
from .image import RealImage
from .line import Line
from .pulls import NAME, TAG, UPSTREAM, assert_hashes, assert_held, cold_requests, once, reference, warm_requests
from .services import COMMAND_SECONDS, DockerRegistry, Pullcache, ServiceError, missing, pullcache_config, wait_until

_no_podman = missing("docker-registry", "skopeo", "podman", "unshare", root=True)
_no_buildah = missing("docker-registry", "skopeo", "podman", "buildah", "unshare", root=True)
_no_skopeo = missing("docker-registry", "skopeo", *(["unshare"] if os.geteuid() == 0 else []))
needs_podman = pytest.mark.skipif(_no_podman is not None, reason=str(_no_podman))
needs_buildah = pytest.mark.skipif(_no_buildah is not None, reason=str(_no_buildah))
needs_skopeo = pytest.mark.skipif(_no_skopeo is not None, reason=str(_no_skopeo))

SMALL = "linux/arm64"
"""The platform without the big layer: 28 MB in three layers, of which one is 25 MB and one 2 MB."""

MODERN = {
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
}


@pytest.fixture
def line(upstream: DockerRegistry) -> Iterator[Line]:
    """A line to the registry."""
    with Line(upstream.port) as between:
        yield between


@pytest.fixture
def behind(room: Path, line: Line) -> Iterator[Pullcache]:
    """pullcache with an empty cache, which reaches the registry by that line."""
    with Pullcache(pullcache_config(room / "cache", UPSTREAM, line.url), root=room / "pullcache") as server:
        yield server
        print(server.log[-4000:])  # pytest shows it when the test failed


def mirror_at(host: str, pull_from_mirror: str | None = None, primary: str | None = None) -> Mirror:
    """``host`` as the mirror of the registry."""
    return Mirror(UPSTREAM, f"{host}/{UPSTREAM}", pull_from_mirror, primary)


def assert_pulled(containers: Containers, name: str, image: RealImage, platform: str) -> None:
    """The storage holds one platform of the image: its manifests, its config, and what its layers unpack to."""
    config = image.contents[platform][0]
    layers = json.loads(image.path(config).read_text())["rootfs"]["diff_ids"]
    manifests = frozenset((image.index, image.manifests[platform]))
    assert containers.image(name) == Pulled(config, manifests, tuple(layers))


def podman_pulls(mirror: Mirror, name: str, image: RealImage, platform: str, room: Path) -> None:
    """One pull by a podman that has nothing yet, looked at and thrown away."""
    with tempfile.TemporaryDirectory(dir=room) as home:
        containers = Containers(Path(home), mirror)
        containers.podman("pull", "--platform", platform, f"{UPSTREAM}/{name}")
        assert_pulled(containers, f"{UPSTREAM}/{name}", image, platform)


def heads(line: Line) -> list[str]:
    """The heads of the requests that went through a line that keeps them; without hellos of TLS."""
    heads = "".join(bytes(kept).decode() for kept in line.requests if not kept.startswith(b"\x16")).split("\r\n\r\n")
    return [head for head in heads if head]


def assert_wire(line: Line, prefix: str, image: RealImage, how: str) -> None:
    """What went through is one pull from ``prefix``, as the three programs do it."""
    first, *others = heads(line) or ["nothing"]
    assert first.startswith("GET /v2/ HTTP/1.1\r\n")
    asked = Counter(" ".join(head.split(" ", 2)[:2]).replace(f"/v2/{prefix}/", "", 1) for head in others)
    assert asked == cold_requests(image, how, SMALL, by_head=False)
    for head in others:
        assert not re.search("^(Range|Authorization|If-[A-Za-z-]+):", head, re.MULTILINE | re.IGNORECASE)
        if "/manifests/" in head:
            assert set(re.findall(r"^Accept: (\S+)\r?$", head, re.MULTILINE)) >= MODERN


# -- podman ----------------------------------------------------------------------------------------------------------


@needs_podman
@pytest.mark.parametrize(("how", "platform"), [("tag", "linux/amd64"), ("digest", SMALL)])
def test_podman_cold_warm_and_without_upstream(
    upstream: DockerRegistry, pullcache: Pullcache, image: RealImage, room: Path, how: str, platform: str
) -> None:
    """Each part is asked for once, and a warm tag by one HEAD; a warm digest asks nothing, and both need no registry."""
    mirror = mirror_at(pullcache.host)
    podman_pulls(mirror, reference(image, how), image, platform, room)
    podman_pulls(mirror, reference(image, how), image, platform, room)
    upstream.stop()  # then its log is complete
    wanted = cold_requests(image, how, platform, by_head=False) + warm_requests(how)
    assert upstream.asked(wanted) == wanted

    podman_pulls(mirror, reference(image, how), image, platform, room)


@needs_podman
def test_podman_after_corruption(
    upstream: DockerRegistry, line: Line, behind: Pullcache, image: RealImage, room: Path
) -> None:
    """A flipped bit fails the pull, although the registry itself is right, and is not kept; the next pull is right."""
    containers = Containers(room / "containers", mirror_at(behind.host, primary=upstream.host))
    pull = ("pull", "--platform", SMALL, f"{UPSTREAM}/{reference(image, 'tag')}")
    line.garble_at(1_500_000)
    with pytest.raises(ServiceError, match=r"unexpected EOF|status code from registry 50\d"):
        containers.podman(*pull)
    assert_held(behind, room / "cache")
    assert behind.figure("mismatches_total") >= 1

    line.heal()
    containers.podman(*pull)
    assert_pulled(containers, pull[-1], image, SMALL)
    assert_held(behind, room / "cache", image.of(SMALL))
    assert {request.agent.partition("/")[0] for request in upstream.requests()} == {"pullcache"}


@needs_podman
def test_podman_when_the_upstream_always_breaks(line: Line, behind: Pullcache, image: RealImage, room: Path) -> None:
    """A registry that never gets far fails the pull; after that, a pull is right."""
    containers = Containers(room / "containers", mirror_at(behind.host))
    pull = ("pull", "--platform", SMALL, f"{UPSTREAM}/{reference(image, 'tag')}")
    line.cut_after(5_000)
    with pytest.raises(ServiceError, match=r"unexpected EOF|status code from registry 50\d"):
        containers.podman(*pull)
    assert_held(behind, room / "cache", frozenset((image.index, image.manifests[SMALL], image.contents[SMALL][0])))

    line.heal()
    containers.podman(*pull)
    assert_pulled(containers, pull[-1], image, SMALL)
    assert_held(behind, room / "cache", image.of(SMALL))


@needs_podman
def test_podman_does_not_notice_breaks(line: Line, behind: Pullcache, image: RealImage, room: Path) -> None:
    """A connection that breaks every 100 kB is continued inside each answer, hundreds of times."""
    line.cut_after(100_000)
    podman_pulls(mirror_at(behind.host), reference(image, "tag"), image, SMALL, room)
    assert behind.figure("resumes_total") > sum(image.sizes[digest] for digest in image.contents[SMALL]) // 100_000
    assert_held(behind, room / "cache", image.of(SMALL))


@needs_podman
def test_podman_cut_once(upstream: DockerRegistry, pullcache: Pullcache, image: RealImage, room: Path) -> None:
    """Cut in the middle of a blob, podman still gets the image, however it goes on; the registry is asked no more for it."""
    biggest = max(image.contents[SMALL], key=lambda digest: image.sizes[digest])
    left = re.compile(rf'/blobs/{biggest}".* status="(left|cut)"')
    with Line(pullcache.port) as to_podman:
        containers = Containers(room / "containers", mirror_at(to_podman.host))
        to_podman.cut_after(image.sizes[biggest] // 2)
        with containers.start("podman", "pull", "--platform", SMALL, f"{UPSTREAM}/{reference(image, 'tag')}") as podman:
            try:
                wait_until(lambda: left.search(pullcache.log) is not None, "the connection was cut")
                to_podman.heal()
                said = podman.communicate(timeout=COMMAND_SECONDS)
            except BaseException:
                podman.kill()
                raise
        assert podman.returncode == 0, said
    assert_pulled(containers, f"{UPSTREAM}/{reference(image, 'tag')}", image, SMALL)
    wanted = frozenset(image.contents[SMALL])
    assert upstream.wait_for_blobs(wanted) == once(wanted)


@needs_podman
def test_short_names(image: RealImage, data: Path, room: Path) -> None:
    """What is named without a registry is Docker Hub's, and arrives as ``docker.io/library/NAME``."""
    shutil.copytree(data, room / "hub-data", copy_function=os.link)
    repositories = room / "hub-data" / "docker" / "registry" / "v2" / "repositories"
    (repositories / "library").mkdir()
    (repositories / NAME).rename(repositories / "library" / "real")
    with (
        DockerRegistry(room / "hub", room / "hub-data") as hub,
        Pullcache(pullcache_config(room / "cache", "docker.io", hub.url), root=room / "pullcache") as pullcache,
    ):
        for program in ("skopeo", "podman"):
            with Line(pullcache.port, keep=8_000) as line:
                containers = Containers(room / program, Mirror("docker.io", f"{line.host}/docker.io"))
                if program == "skopeo":
                    containers.skopeo("--override-arch", "arm64", "copy", f"docker://real:{TAG}", f"dir:{room}/copied")
                else:
                    containers.podman("pull", "--platform", SMALL, f"real:{TAG}")
                    assert_pulled(containers, f"docker.io/library/real:{TAG}", image, SMALL)
                assert_wire(line, "docker.io/library/real", image, "tag")


# -- skopeo ----------------------------------------------------------------------------------------------------------


@needs_skopeo
@pytest.mark.parametrize("setting", ["all", "digest-only", "tag-only"])
def test_pull_from_mirror(
    upstream: DockerRegistry, pullcache: Pullcache, image: RealImage, room: Path, setting: str
) -> None:
    """The mirror gets all of a pull, or nothing of it, as ``pull-from-mirror`` says for tags and for digests."""
    for how in ("tag", "digest"):
        with Line(pullcache.port, keep=8_000) as mirror, Line(upstream.port, keep=8_000) as primary:
            containers = Containers(room / how, mirror_at(mirror.host, setting, primary.host))
            target = room / how / "copied"
            source = f"docker://{UPSTREAM}/{reference(image, how)}"
            containers.skopeo("--override-arch", "arm64", "copy", source, f"dir:{target}")
            if setting in ("all", f"{how}-only"):
                assert_wire(mirror, f"{UPSTREAM}/{NAME}", image, how)
                assert primary.connections == 0
            else:
                assert_wire(primary, NAME, image, how)
                assert mirror.connections == 0
        files = {f"sha256:{path.name}": path for path in target.iterdir() if len(path.name) == 64}
        assert files.keys() == set(image.contents[SMALL])
        assert_hashes({**files, image.manifests[SMALL]: target / "manifest.json"})


@needs_skopeo
def test_list_tags(pullcache: Pullcache, room: Path) -> None:
    """The tags of a repository, by the address of the cache itself: mirrors are not asked for them."""
    address = f"{pullcache.host}/{UPSTREAM}/{NAME}"
    listed = Containers(room / "containers").skopeo("list-tags", "--tls-verify=false", f"docker://{address}")
    assert json.loads(listed) == {"Repository": address, "Tags": [TAG]}


# -- buildah ---------------------------------------------------------------------------------------------------------


@needs_buildah
@pytest.mark.parametrize(("command", "how"), [("pull", "tag"), ("from", "digest")])
def test_buildah(
    upstream: DockerRegistry, pullcache: Pullcache, image: RealImage, room: Path, command: str, how: str
) -> None:
    """As podman: the mirror is asked for each part once, and brings the very image."""
    name = f"{UPSTREAM}/{reference(image, how)}"
    with Line(pullcache.port, keep=8_000) as line:
        containers = Containers(room / "containers", mirror_at(line.host))
        containers.buildah(command, "--platform", SMALL, name)
        assert_wire(line, f"{UPSTREAM}/{NAME}", image, how)
    assert_pulled(containers, name, image, SMALL)
    wanted = cold_requests(image, how, SMALL, by_head=False)
    assert upstream.asked(wanted) == wanted
