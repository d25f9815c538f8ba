"""containerd as a kubelet drives it, over CRI, and the odd forms of its ``hosts.toml``, through pullcache."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.fakes.ports import free_port

from . import cri
from . import image as real_image
from .cri import Cri, CriError
from .image import CONFIG_TYPE, INDEX_TYPE, MANIFEST_TYPE, TAR_TYPE, RealImage
from .line import Line
from .pulls import NAME, TAG, UPSTREAM, assert_content, assert_held, cold_requests, reference, warm_requests
from .services import PLACE, Containerd, DockerRegistry, Pullcache, missing, pullcache_config, wait_until

_no_ctr = missing("docker-registry", "skopeo", "containerd", "ctr", root=True)
_no_cri = _no_ctr or cri.missing()
needs_ctr = pytest.mark.skipif(_no_ctr is not None, reason=str(_no_ctr))
needs_cri = pytest.mark.skipif(_no_cri is not None, reason=str(_no_cri))

PLATFORM = "linux/amd64"
NESTED = "a/b/c/d"
CRI_NAMESPACE = "k8s.io"


# -- what the tests need ---------------------------------------------------------------------------------------------


@contextmanager
def containerd_in(room: Path, namespace: str = CRI_NAMESPACE) -> Iterator[Containerd]:
    """A containerd that has nothing yet, and whose content is gone afterwards."""
    with TemporaryDirectory(dir=room) as home, Containerd(Path(home), namespace) as containerd:
        yield containerd


def assert_pulled(containerd: Containerd, client: Cri, name: str, image: RealImage) -> None:
    """The runtime has one image, byte for byte, and knows it by the names that a kubelet will ask for."""
    repository = name.removesuffix(f"@{image.index}").removesuffix(f":{TAG}")
    (pulled,) = client.images()
    assert pulled.id == image.contents[PLATFORM][0]  # the digest of the configuration
    assert pulled.tags == ((name,) if name.endswith(f":{TAG}") else ())
    assert pulled.digests == (f"{repository}@{image.index}",)
    assert_content(containerd, image, PLATFORM)


def cri_pulls(mirror: str, name: str, image: RealImage, room: Path, auth: Mapping[str, str] | None = None) -> None:
    """One pull over CRI by a containerd that has nothing yet, with nowhere else to go than to the mirror."""
    with containerd_in(room) as containerd, Cri(containerd.socket) as client:
        containerd.hosts_toml(UPSTREAM, mirror, server=nowhere())
        assert client.pull(f"{UPSTREAM}/{name}", auth) == image.contents[PLATFORM][0]
        assert_pulled(containerd, client, f"{UPSTREAM}/{name}", image)


def cold(image: RealImage, how: str) -> Counter[str]:
    """What upstream is asked for a cold pull."""
    return cold_requests(image, how, PLATFORM, by_head=True)


def nowhere() -> str:
    """A server at which nobody listens."""
    return f"http://127.0.0.1:{free_port()}"


def small_image(layout: Path, text: str) -> RealImage:
    """An image of one platform with one layer that holds one file: quick where only its way matters."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(content: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(content).hexdigest()
        (blobs / digest).write_bytes(content)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}

    def put_json(content: dict[str, object]) -> dict[str, object]:
        return put(json.dumps(content).encode(), str(content.get("mediaType", CONFIG_TYPE)))

    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        member = tarfile.TarInfo("file")
        member.size = len(text)
        tar.addfile(member, io.BytesIO(text.encode()))
    layer = put(archive.getvalue(), TAR_TYPE)
    rootfs = {"type": "layers", "diff_ids": [layer["digest"]]}
    config = put_json({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs})
    manifest = put_json({"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config, "layers": [layer]})
    platform = {"architecture": "amd64", "os": "linux"}
    index = put_json({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [{**manifest, "platform": platform}]})
    top = {**index, "annotations": {"org.opencontainers.image.ref.name": TAG}}
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    return real_image.read(layout)


@dataclass(frozen=True)
class Two:
    """pullcache with two upstreams that have different images of the same name; ``ported`` is named by its port."""

    pullcache: Pullcache
    default: DockerRegistry
    default_image: RealImage
    ported: DockerRegistry
    ported_image: RealImage


@contextmanager
def two_upstreams(room: Path, host: str) -> Iterator[Two]:
    """``Two``, with the default upstream as ``registry.test`` and the other as ``HOST:PORT``."""
    images = [small_image(room / name, name) for name in ("default", "ported")]
    with DockerRegistry(room / "r0") as default, DockerRegistry(room / "r1") as ported:
        for registry, image in zip((default, ported), images, strict=True):
            registry.push(image.layout, f"{NESTED}:{TAG}")
            registry.forget()
        config = pullcache_config(room / "cache", UPSTREAM, default.url)
        other = {"name": f"{host}:{ported.port}", "endpoints": [ported.url], "allowAddresses": ["127.0.0.1/32"]}
        with Pullcache({**config, "upstreams": [*config["upstreams"], other]}, root=room / "pullcache") as pullcache:
            yield Two(pullcache, default, images[0], ported, images[1])
            print(pullcache.log[-4000:])


# -- pulls, and what the upstream is asked for them -------------------------------------------------------------------


@needs_cri
def test_cri_by_tag(upstream: DockerRegistry, pullcache: Pullcache, image: RealImage, room: Path) -> None:
    """Cold, each thing is asked for once; warm, only where the tag points; without a registry, all is served."""
    name = reference(image, "tag")
    cri_pulls(pullcache.url, name, image, room)
    assert upstream.asked(cold(image, "tag")) == cold(image, "tag")

    upstream.forget()
    cri_pulls(pullcache.url, name, image, room)
    assert upstream.asked(warm_requests("tag")) == warm_requests("tag")

    upstream.stop()
    cri_pulls(pullcache.url, name, image, room)


@needs_cri
def test_cri_by_digest(upstream: DockerRegistry, pullcache: Pullcache, image: RealImage, room: Path) -> None:
    """Cold, each thing is asked for once; warm, nobody is asked, and so the registry need not be there."""
    name = reference(image, "digest")
    cri_pulls(pullcache.url, name, image, room)
    assert upstream.asked(cold(image, "digest")) == cold(image, "digest")

    upstream.stop()
    before = pullcache.figure("upstream_requests_total")
    cri_pulls(pullcache.url, name, image, room)
    assert pullcache.figure("upstream_requests_total") == before == cold(image, "digest").total()


@needs_cri
@pytest.mark.parametrize("how", ["tag", "digest"])
def test_what_containerd_sends(room: Path, how: str) -> None:
    """The requests of a pull over CRI, all of them: what pullcache relies on, and no credentials of the pod.

    The kubelet gives containerd those for the image; a mirror gets them only if it asks, which pullcache never does.
    """
    with two_upstreams(room, "localhost") as two, Line(two.pullcache.port, keep=1 << 16) as line:
        image = two.default_image
        name = f"{NESTED}:{TAG}" if how == "tag" else f"{NESTED}@{image.index}"
        cri_pulls(line.url, name, image, room, auth={"username": "user", "password": "secret"})
        sent = sent_over(line)
    expected = cold(image, how)  # a client with nothing asks for the same as a cache with nothing
    assert Counter(f"{each.method} {PLACE.sub('', each.target)}" for each in sent) == Counter(
        {f"{request}?ns={UPSTREAM}": count for request, count in expected.items()}
    )
    assert all(each.target.startswith(f"/v2/{NESTED}/") for each in sent)
    assert sent[0].method == "HEAD"
    assert {INDEX_TYPE, MANIFEST_TYPE} <= set(sent[0].headers["accept"].split(", "))
    for each in sent:
        assert each.headers.keys() - {"accept-encoding"} == {"host", "user-agent", "accept"}
        assert each.headers["host"] == line.host
        assert each.headers["user-agent"].startswith("containerd/")
        assert each.headers["accept"].endswith(", */*")


@dataclass(frozen=True)
class Sent:
    """One request as it came over the line."""

    method: str
    target: str
    headers: dict[str, str]


def sent_over(line: Line) -> list[Sent]:
    """All requests, none of which has a body; those of each connection in their order."""
    found = []
    for head in b"".join(bytes(kept) for kept in line.requests).decode().split("\r\n\r\n")[:-1]:
        first, *rest = head.split("\r\n")
        method, target, _ = first.split(" ")
        headers = {key.lower(): value for key, _, value in (each.partition(": ") for each in rest)}
        found.append(Sent(method, target, headers))
    return found


# -- a registry that fails and comes back ------------------------------------------------------------------------------


@needs_cri
@pytest.mark.parametrize("fault", ["corrupt", "cut"])
def test_cri_fails_and_then_succeeds(upstream: DockerRegistry, image: RealImage, room: Path, fault: str) -> None:
    """A pull of what comes corrupt or not whole fails and leaves nothing wrong anywhere; the next one is right."""
    name = f"{UPSTREAM}/{NAME}:{TAG}"
    with Line(upstream.port) as line:
        config = pullcache_config(room / "cache", UPSTREAM, line.url)
        with Pullcache(config, root=room / "pullcache") as pullcache, containerd_in(room) as containerd:
            containerd.hosts_toml(UPSTREAM, pullcache.url, server=nowhere())
            with Cri(containerd.socket) as client:
                if fault == "corrupt":
                    line.garble_at(10_000_000)  # in a layer: all else together is smaller
                said = failing_pull(client, name, meanwhile=lambda: cut(line) if fault == "cut" else None)
                assert_held(pullcache, room / "cache")
                assert pullcache.figure('fills_total{result="failed"}') >= 1, said
                assert (pullcache.figure("mismatches_total") > 0) == (fault == "corrupt"), said
                assert not client.images()
                wait_until(lambda: is_empty(containerd), "containerd has dropped the parts of what failed")

                line.heal()
                down = f'upstream_unavailable{{upstream="{UPSTREAM}"}}'
                wait_until(lambda: pullcache.figure(down) == 0, "a probe has found the registry answering")
                assert client.pull(name) == image.contents[PLATFORM][0]
                assert_pulled(containerd, client, name, image)
                assert_held(pullcache, room / "cache", image.of(PLATFORM))


def cut(line: Line) -> None:
    """In the middle of the image: the line, and each one after it."""
    wait_until(lambda: line.received > 20_000_000, "a part of the image has come")
    line.cut_after(1)


def failing_pull(client: Cri, name: str, meanwhile: Callable[[], None]) -> str:
    """A pull that must fail, with something done while it runs; what the runtime said."""
    with ThreadPoolExecutor(1) as pool:
        pulling = pool.submit(client.pull, name)
        meanwhile()
        with pytest.raises(CriError) as failure:
            pulling.result()
    return str(failure.value)


def is_empty(containerd: Containerd) -> bool:
    """Whether it has nothing, neither whole nor in parts.

    A moment after a failed pull its garbage collector removes what was pulled. A pull that comes before that may find a
    snapshot that is gone when it is wanted; a kubelet leaves ten seconds between the two.
    """
    snapshots = containerd.ctr("snapshots", "--snapshotter", "native", "ls").splitlines()[1:]
    return not (containerd.unfinished() or containerd.content() or snapshots)


# -- forms of hosts.toml -----------------------------------------------------------------------------------------------


@needs_cri
@pytest.mark.parametrize("folder", ["localhost_{}_", "localhost:{}", "127.0.0.1_{}_"])
def test_registry_with_a_port(room: Path, folder: str) -> None:
    """``ns`` with a port leads to the upstream of that name, however deep the repository, by tag and by digest."""
    host = folder.partition("_")[0].partition(":")[0]
    with two_upstreams(room, host) as two:
        image = two.ported_image
        repository = f"{host}:{two.ported.port}/{NESTED}"
        with containerd_in(room) as containerd, Cri(containerd.socket) as client:
            containerd.hosts_toml(folder.format(two.ported.port), two.pullcache.url, server=nowhere())
            client.pull(f"{repository}:{TAG}")
            assert_pulled(containerd, client, f"{repository}:{TAG}", image)
        with containerd_in(room, "default") as containerd:
            containerd.hosts_toml(folder.format(two.ported.port), two.pullcache.url, server=nowhere())
            containerd.fetch(f"{repository}@{image.index}", PLATFORM)
            assert_content(containerd, image, PLATFORM)
        assert two.ported.asked(cold(image, "tag")) == cold(image, "tag")
        assert {request.agent.partition("/")[0] for request in two.ported.requests()} == {"pullcache"}
        assert not two.default.requests()


@needs_ctr
def test_first_mirror_is_dead(room: Path) -> None:
    """With several mirrors the next one is asked, in the order of the file."""
    with two_upstreams(room, "localhost") as two, containerd_in(room, "default") as containerd:
        containerd.hosts_toml(UPSTREAM, nowhere(), two.pullcache.url, server=nowhere())
        containerd.fetch(f"{UPSTREAM}/{NESTED}:{TAG}", PLATFORM)
        assert_content(containerd, two.default_image, PLATFORM)


@needs_ctr
@pytest.mark.parametrize("with_port", [False, True])
def test_mirror_with_override_path(room: Path, with_port: bool) -> None:
    """A mirror's URL may hold the upstream's ``pathPrefix``; containerd sends ``ns`` all the same, which says it again."""
    with two_upstreams(room, "localhost") as two, containerd_in(room, "default") as containerd:
        registry = f"localhost:{two.ported.port}" if with_port else UPSTREAM
        mirror = f"{two.pullcache.url}/v2/{registry.replace(':', '_')}"
        containerd.hosts_toml(registry, mirror, server=nowhere(), override_path=True)
        containerd.fetch(f"{registry}/{NESTED}:{TAG}", PLATFORM)
        assert_content(containerd, two.ported_image if with_port else two.default_image, PLATFORM)
