"""What the pull policies promise, held by a real containerd over CRI and a real registry; and an image that was warmed."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.unit.test_kustomize import PAGE_KUSTOMIZATION, PAGE_POD

from . import cri
from .cri import Cri, CriError
from .image import RealImage
from .private import ALICE, GUARDS, MISTAKEN, STRANGER, Account, Guard, private_registry
from .pulls import TAG, UPSTREAM, assert_content, assert_held, once, warm_requests
from .services import (
    COMMAND_SECONDS,
    REPOSITORY,
    Containerd,
    DockerRegistry,
    Pullcache,
    ServiceError,
    missing,
    pullcache_config,
    skopeo,
)
from .test_cri import PLATFORM, cold, containerd_in, small_image
from .test_private import serving

_no_cri = missing("docker-registry", "skopeo", "containerd", "ctr", root=True) or cri.missing()
pytestmark = pytest.mark.skipif(_no_cri is not None, reason=str(_no_cri))

APP = "team/app"


# -- what the tests need ---------------------------------------------------------------------------------------------


@pytest.fixture
def registry(room: Path) -> Iterator[DockerRegistry]:
    """A registry that has nothing yet."""
    with DockerRegistry(room / "registry") as upstream:
        yield upstream


@contextmanager
def serving_by(room: Path, registry: DockerRegistry, **policy: object) -> Iterator[Pullcache]:
    """pullcache with an empty cache before a registry; its policies are the derived ones, or as ``policy`` says."""
    config = pullcache_config(room / "cache", UPSTREAM, registry.url, **{"alwaysPullImages": False, **policy})
    with Pullcache(config, root=room / "pullcache") as pullcache:
        yield pullcache
        print(pullcache.log[-4000:])  # pytest shows it when the test failed


@contextmanager
def node(room: Path, cache: str, registry: str = UPSTREAM) -> Iterator[tuple[Containerd, Cri]]:
    """A node that has nothing yet and knows no way around the cache, which is the ``server`` of the registry."""
    with containerd_in(room) as containerd, Cri(containerd.socket) as client:
        containerd.hosts_toml(registry).write_text(f'server = "{cache}"\n[host]\n')
        yield containerd, client


def pushed(registry: DockerRegistry, room: Path, name: str, text: str) -> RealImage:
    """A small image that is made of this text, under this name from now on."""
    image = small_image(room / f"layout-{text}", text)
    registry.push(image.layout, name)
    registry.forget()
    return image


def config_of(image: RealImage) -> str:
    """The id of an image at a runtime: the digest of its configuration."""
    return image.contents[PLATFORM][0]


def asked_upstream(pullcache: Pullcache) -> float:
    """How often pullcache has asked its registry for something, or tried to."""
    return pullcache.figure("upstream_requests_total")


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it said."""

    code: int
    output: str
    said: str


def command(*arguments: str | Path) -> Outcome:
    """``pullcache`` with these arguments, to its end."""
    line = [sys.executable, "-m", "proxy", *map(str, arguments)]
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=COMMAND_SECONDS, cwd=REPOSITORY)
    return Outcome(done.returncode, done.stdout, done.stderr)


def pull_would(pullcache: Pullcache, image: str) -> str:
    """The line ``now`` of ``pullcache explain``, which ends well."""
    told = command("explain", image, "--config", pullcache.config_file)
    assert told.code == 0, told
    (line,) = [line for line in told.output.splitlines() if line.startswith("now ")]
    return line.removeprefix("now").strip()


# -- Always, IfNotPresent, Never -----------------------------------------------------------------------------------------


def test_always_follows_a_tag_that_moves(registry: DockerRegistry, room: Path) -> None:
    """``latest`` is asked for at each pull: by one HEAD and nothing else, until the tag moves; then the new image comes."""
    name, by_head = f"{UPSTREAM}/{APP}:latest", Counter(["HEAD manifests/latest"])
    old = pushed(registry, room, f"{APP}:latest", "old")
    with serving_by(room, registry) as pullcache, node(room, pullcache.url) as (_, client):
        assert client.pull(name) == config_of(old)
        before = asked_upstream(pullcache)
        registry.forget()
        assert client.pull(name) == config_of(old)
        assert registry.asked(by_head) == by_head
        with node(room, pullcache.url) as (empty, its_client):
            assert its_client.pull(name) == config_of(old)
            assert_content(empty, old, PLATFORM)
        assert registry.asked(by_head + by_head) == by_head + by_head
        assert asked_upstream(pullcache) == before + 2

        new = pushed(registry, room, f"{APP}:latest", "new")
        assert config_of(new) != config_of(old)
        assert client.pull(name) == config_of(new)
        (moved,) = [image for image in client.images() if name in image.tags]
        assert moved.digests == (f"{UPSTREAM}/{APP}@{new.index}",)
        all_of_it = cold(new, "tag") - warm_requests("tag") + by_head
        assert registry.asked(all_of_it) == all_of_it
        assert_held(pullcache, room / "cache", old.of(PLATFORM) | new.of(PLATFORM))


NEVER: Mapping[str, Mapping[str, object]] = {
    "offline is true": {"offline": True},
    f"imagePullPolicy.rules[0] ('{UPSTREAM}/team/**')": {
        "imagePullPolicy": {"rules": [{"match": f"{UPSTREAM}/team/**", "policy": "Never"}]}
    },
}


@pytest.mark.parametrize("why", NEVER, ids=["offline", "rule"])
def test_never_and_absent(registry: DockerRegistry, room: Path, why: str) -> None:
    """The pull fails and nobody is asked. A runtime that asks by GET shows ErrImageNeverPull and why; to containerd's HEAD
    no text can be answered, and so the log and ``pullcache explain`` say it."""
    name = f"{UPSTREAM}/{APP}:{TAG}"
    pushed(registry, room, f"{APP}:{TAG}", "absent")
    with serving_by(room, registry, **NEVER[why]) as pullcache:
        with node(room, pullcache.url) as (containerd, client):
            with pytest.raises(CriError, match=f'failed to resolve reference "{re.escape(name)}": .*: not found'):
                client.pull(name)
            assert containerd.content() == {}
        (line,) = [line for line in pullcache.log.splitlines() if 'method="HEAD"' in line]
        assert 'status="404"' in line
        assert "ErrImageNeverPull" in line
        assert why in line

        with pytest.raises(ServiceError, match=f"ErrImageNeverPull: {re.escape(name)} is not held .*: {re.escape(why)}"):
            skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{pullcache.host}/{name}")
        now = pull_would(pullcache, name)
        assert now == f"a pull is refused with ErrImageNeverPull: it is not held, and no registry is asked: {why}"
        assert asked_upstream(pullcache) == 0
        assert registry.requests() == []


def test_if_not_present_asks_nobody(registry: DockerRegistry, room: Path) -> None:
    """A held tag is pulled by an empty node while its registry is there and moves the tag, and when it is stopped."""
    name = f"{UPSTREAM}/{APP}:{TAG}"
    image = pushed(registry, room, f"{APP}:{TAG}", "held")
    with serving_by(room, registry) as pullcache:
        with node(room, pullcache.url) as (_, client):
            client.pull(name)
        pushed(registry, room, f"{APP}:{TAG}", "moved")
        before = asked_upstream(pullcache)
        for is_stopped in (False, True):
            if is_stopped:
                registry.stop()
            with node(room, pullcache.url) as (containerd, client):
                assert client.pull(name) == config_of(image)
                assert_content(containerd, image, PLATFORM)
        assert registry.requests() == []
        assert pull_would(pullcache, name) == "a pull is served from the cache, and nobody is asked"
        assert asked_upstream(pullcache) == before


# -- warmed, then pulled ---------------------------------------------------------------------------------------------


_PAGE = f"""\
cat <<EOF > pod.yaml
{PAGE_POD}EOF
cat <<EOF >> ./kustomization.yaml
{PAGE_KUSTOMIZATION}EOF
"""
"""The commands of https://kubernetes.io/docs/concepts/containers/images/."""


def kubectl_create_secret(server: str, account: Account) -> str:
    """What ``kubectl create secret docker-registry myregistrykey -n awesomeapps --dry-run=client -o yaml`` prints."""
    entry = {"username": account.user, "password": account.password, **account.entry}
    content = base64.b64encode(json.dumps({"auths": {server: entry}}).encode()).decode()
    secret = {
        "apiVersion": "v1",
        "data": {".dockerconfigjson": content},
        "kind": "Secret",
        "metadata": {"creationTimestamp": None, "name": "myregistrykey", "namespace": "awesomeapps"},
        "type": "kubernetes.io/dockerconfigjson",
    }
    return yaml.safe_dump(secret)


@pytest.mark.parametrize(
    ("guard", "registry_name", "server"),
    [("htpasswd", "docker.io", "https://index.docker.io/v1/"), ("token", UPSTREAM, UPSTREAM)],
    ids=GUARDS,
)
def test_the_pod_of_the_kubernetes_page(room: Path, guard: Guard, registry_name: str, server: str) -> None:
    """Warmed from its kustomization and its secret, it is pulled by a node with that secret, and no blob is asked for
    again; nor is the registry needed any more. Behind htpasswd the pod is the page's to the letter, at Docker Hub."""
    written = "janedoe/awesomeapp:v1" if registry_name == "docker.io" else f"{registry_name}/janedoe/awesomeapp:v1"
    name = f"{registry_name}/janedoe/awesomeapp:v1"
    site = room / "site"
    site.mkdir()
    commands = _PAGE.replace("janedoe/awesomeapp:v1", written) + "echo '- secret.yaml' >> kustomization.yaml\n"
    subprocess.run(["sh", "-e"], input=commands, text=True, check=True, cwd=site, timeout=COMMAND_SECONDS)
    (site / "secret.yaml").write_text(kubectl_create_secret(server, ALICE))
    with DockerRegistry(room / "open") as registry:
        image = pushed(registry, room, "janedoe/awesomeapp:v1", "awesome")
    rights = {ALICE.user: ("janedoe/*",)}
    with (
        private_registry(guard, room / "private", registry.data, rights) as private,
        serving(room, private, "verify", name=registry_name, alwaysPullImages=False) as served,
    ):

        def warm(*options: str) -> Outcome:
            outcome = command("warm", "-f", site, "--config", served.pullcache.config_file, *options)
            assert "warning" not in outcome.said
            assert not any(text in outcome.output + outcome.said for text in (ALICE.password, ALICE.entry["auth"]))
            return outcome

        check = warm("--check")
        assert (check.code, asked_upstream(served.pullcache)) == (1, 0), check
        assert re.search(rf"^{re.escape(name)} .* IfNotPresent .*missing", check.output, re.MULTILINE), check

        first = warm()
        assert first.code == 0, first
        blobs = once(image.contents[PLATFORM])
        assert private.registry.wait_for_blobs(frozenset(blobs)) == blobs
        assert private.shown() == {ALICE}
        assert_held(served.pullcache, served.cache, image.of(PLATFORM))
        before = asked_upstream(served.pullcache)
        assert warm("--check").code == 0
        assert warm().code == 0

        for is_stopped in (False, True):
            if is_stopped:
                private.stop()
            with node(room, served.url, registry_name) as (containerd, client):
                assert client.pull(written, ALICE.auth) == config_of(image)
                assert_content(containerd, image, PLATFORM)
        assert asked_upstream(served.pullcache) == before
        assert private.registry.blobs() == blobs
        assert not private.registry.blobs("HEAD")

        for outsider in (None, MISTAKEN, STRANGER):
            with node(room, served.url, registry_name) as (containerd, client):
                with pytest.raises(CriError):
                    client.pull(written, outsider.auth if outsider else None)
                assert containerd.content() == {}
