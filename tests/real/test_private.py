"""Private images of real registries, pulled by real clients through pullcache: who gets them, and who does not.

First the registries alone; then secrets that the proxy holds (``access: shared``); then each client's own (``access:
verify``). What the registry and its token server received is asserted on everywhere.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from . import cri
from .containers import Containers
from .cri import Cri, CriError
from .dockerd import Dockerd, newer
from .image import RealImage
from .line import Line
from .private import (
    ALICE,
    BOB,
    GUARDS,
    MISTAKEN,
    STRANGER,
    Account,
    Private,
    Sent,
    ask,
    private_registry,
    sent_over,
)
from .pulls import IMAGE_CACHE, NAME, TAG, UPSTREAM, assert_hashes, once
from .services import DockerRegistry, Pullcache, ServiceError, missing, pullcache_config, wait_until
from .test_cri import PLATFORM, assert_pulled, containerd_in, nowhere, small_image
from .test_podman import SMALL as ARM64
from .test_podman import assert_pulled as assert_stored

_no_registry = missing("docker-registry", "skopeo")
_no_cri = missing("containerd", "ctr", root=True) or cri.missing()
_no_podman = missing("podman", "unshare", root=True)
_no_dockerd = missing("dockerd", "docker", "containerd", "unshare", root=True)
pytestmark = pytest.mark.skipif(_no_registry is not None, reason=str(_no_registry))
needs_cri = pytest.mark.skipif(_no_cri is not None, reason=str(_no_cri))
needs_podman = pytest.mark.skipif(_no_podman is not None, reason=str(_no_podman))
needs_dockerd = pytest.mark.skipif(_no_dockerd is not None, reason=str(_no_dockerd))

APP, LITTLE, PUBLIC, OTHER = "team/app", "team/little", "public/app", "other/app"
REFUSED = {401, 403, 404, 429}
BROKEN = {500, 502, 503, 504}
SHARED = {"mode": "shared", "iUnderstandThisIsShared": True}


# -- what the tests need ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stock:
    """What every private registry here has: the real image as ``team/app``, and small ones that share nothing."""

    data: Path
    app: RealImage
    little: RealImage
    public: RealImage
    other: RealImage


@pytest.fixture(scope="session")
def stock(data: Path, image: RealImage) -> Iterator[Stock]:
    """The data of a private registry, pushed while it was open."""
    with tempfile.TemporaryDirectory(prefix="private-", dir=data.parent.parent) as folder:
        copy = Path(folder) / "data"
        shutil.copytree(data, copy, copy_function=os.link)
        repositories = copy / "docker" / "registry" / "v2" / "repositories"
        (repositories / "team").mkdir()
        (repositories / NAME).rename(repositories / APP)
        small = {name: small_image(Path(folder) / name.replace("/", "-"), name) for name in (LITTLE, PUBLIC, OTHER)}
        with DockerRegistry(Path(folder) / "open", copy) as registry:
            for repository, each in small.items():
                registry.push(each.layout, f"{repository}:{TAG}")
        yield Stock(copy, image, small[LITTLE], small[PUBLIC], small[OTHER])


@pytest.fixture(params=GUARDS)
def private(request: pytest.FixtureRequest, room: Path, stock: Stock) -> Iterator[Private]:
    """A private registry of either kind."""
    with private_registry(request.param, room / "private", stock.data) as registry:
        yield registry


@pytest.fixture
def by_token(room: Path, stock: Stock) -> Iterator[Private]:
    """The kind with a token server, where everybody may read ``public/*`` and each user something of his own."""
    with private_registry("token", room / "private", stock.data) as registry:
        yield registry


@pytest.fixture
def by_password(room: Path, stock: Stock) -> Iterator[Private]:
    """The kind with htpasswd, where a right that is withdrawn is gone at once."""
    with private_registry("htpasswd", room / "private", stock.data) as registry:
        yield registry


@dataclass(frozen=True)
class Served:
    """pullcache in front of a private registry, and the line on which clients reach it."""

    pullcache: Pullcache
    line: Line
    cache: Path

    @property
    def host(self) -> str:
        """Where clients find it; this is also its ``externalURL``."""
        return self.line.host

    @property
    def url(self) -> str:
        """The same, as a URL."""
        return self.line.url

    def came(self) -> list[Sent]:
        """What clients sent."""
        return sent_over(self.line)

    def accounts(self) -> set[Account]:
        """Every credential that clients showed."""
        return {sent.account for sent in self.came() if sent.account is not None}


@contextmanager
def serving(
    room: Path,
    private: Private,
    access: str | Mapping[str, Any],
    secrets: Sequence[Mapping[str, Any]] = (),
    name: str = UPSTREAM,
    **more: object,
) -> Iterator[Served]:
    """pullcache with an empty cache, for which the private registry is ``name``; its log must name no password."""
    config = pullcache_config(room / "cache", name, private.url, **more)
    config["upstreams"] = [private.upstream(name, access=access)]
    config["imagePullSecrets"] = list(secrets)
    with Line(int(config["listen"].rpartition(":")[2]), keep=1 << 20) as line:
        config["externalURL"] = line.url
        with Pullcache(config, root=room / "pullcache") as pullcache:
            yield Served(pullcache, line, room / "cache")
            print(pullcache.log[-6000:])  # pytest shows it when the test failed
            for account in (ALICE, BOB, MISTAKEN, STRANGER):
                assert account.password not in pullcache.log
                assert account.entry["auth"] not in pullcache.log


def docker_config(host: str, account: Account) -> dict[str, Any]:
    """``~/.docker/config.json`` after a login."""
    return {"auths": {host: account.entry}}


def parts(image: RealImage) -> tuple[str, ...]:
    """Everything that can be asked for of a small image: by tag, by digest, and its blobs."""
    (manifest,) = image.manifests.values()
    blobs = image.contents[PLATFORM]
    return (f"manifests/{TAG}", f"manifests/{image.index}", f"manifests/{manifest}", *(f"blobs/{blob}" for blob in blobs))


def content(image: RealImage, part: str) -> bytes:
    """What the registry has under one of ``parts``."""
    named = part.partition("/")[2]
    return image.path(image.index if named == TAG else named).read_bytes()


def assert_all(url: str, repository: str, image: RealImage, account: Account | None) -> None:
    """This client gets the whole small image."""
    for part in parts(image):
        reply = ask(f"{url}/v2/{repository}/{part}", account)
        assert (part, reply.status) == (part, 200), reply.body
        assert reply.body == content(image, part)


def sample(private: Private, stock: Stock) -> tuple[str, RealImage]:
    """What clients pull: of one kind of registry the real image; of the other a small one, since only its way matters."""
    return (APP, stock.app) if private.tokens else (LITTLE, stock.little)


def only_pulls(private: Private, *repositories: str) -> bool:
    """Whether the token server was asked for the right to pull from these repositories alone."""
    assert private.tokens is not None
    wanted = {f"repository:{repository}:pull" for repository in repositories}
    return {scope for request in private.tokens.requests for scope in request.scopes} == wanted


# -- the registries themselves -----------------------------------------------------------------------------------------


def read_at_registry(private: Private, repository: str, account: Account | None) -> int:
    """What comes of asking the registry for a manifest as its documentation says; the status."""
    url = f"{private.url}/v2/{repository}/manifests/{TAG}"
    if private.tokens is None:
        return ask(url, account).status
    service, scope = private.tokens.service, f"repository:{repository}:pull"
    answer = ask(f"{private.tokens.realm}?service={service}&scope={scope}", account)
    if answer.status != 200:
        return answer.status
    return ask(url, token=json.loads(answer.body)["token"]).status


def test_who_may_read_what_at_the_registry(private: Private) -> None:
    """The rights on which all that follows rests, without pullcache."""
    accounts = (None, ALICE, BOB, MISTAKEN, STRANGER)
    table = {
        repository: [read_at_registry(private, repository, account) for account in accounts]
        for repository in (APP, LITTLE, PUBLIC, OTHER)
    }
    team = [401, 200, 401, 401, 401]
    assert table == (
        {APP: team, LITTLE: team, PUBLIC: [200, 200, 200, 401, 401], OTHER: [401, 401, 200, 401, 401]}
        if private.tokens
        else {name: [401, 200, 200, 401, 401] for name in table}
    )
    assert private.shown() == {ALICE, BOB, MISTAKEN, STRANGER}

    private.withdraw(ALICE)
    private.forget()
    assert read_at_registry(private, APP, ALICE) == 401
    assert private.shown() == {ALICE}


def test_what_a_token_is_good_for(by_token: Private) -> None:
    """docker-registry verifies it: for its repository, unaltered, and signed by the one whom it trusts."""
    tokens = by_token.tokens
    assert tokens is not None
    url = f"{by_token.url}/v2/{{}}/manifests/{TAG}"
    challenge = ask(url.format(APP)).all("www-authenticate")
    assert challenge == [f'Bearer realm="{tokens.realm}",service="{tokens.service}",scope="repository:{APP}:pull"']

    form = {"grant_type": "password", "username": ALICE.user, "password": ALICE.password, "access_type": "offline"}
    form |= {"service": tokens.service, "scope": f"repository:{APP}:pull repository:{OTHER}:pull", "client_id": "test"}
    answer = json.loads(ask(tokens.realm, method="POST", form=form).body)
    token = answer["access_token"]
    assert [ask(url.format(name), token=token).status for name in (APP, OTHER, LITTLE)] == [200, 401, 401]
    head, claims, signature = token.split(".")
    for wrong in (f"{head}.{claims}.{signature[::-1]}", f"{head}.{claims}.", "no-token"):
        assert ask(url.format(APP), token=wrong).status == 401
    (request,) = tokens.requests
    assert (request.account, request.granted) == (ALICE, (APP,))

    form = {"grant_type": "refresh_token", "refresh_token": answer["refresh_token"], "scope": f"repository:{APP}:pull"}
    token = json.loads(ask(tokens.realm, method="POST", form=form).body)["access_token"]
    assert ask(url.format(APP), token=token).status == 200


@needs_podman
def test_skopeo_at_the_registry(private: Private, stock: Stock, room: Path) -> None:
    """A real client is let in and turned away as it should be, and brings the image."""
    containers = Containers(room / "containers")

    def inspect(repository: str, *options: str) -> str:
        return containers.skopeo("inspect", "--raw", "--tls-verify=false", *options, f"docker://{private.host}/{repository}")

    for options in ((), ("--creds", MISTAKEN.pair), ("--creds", STRANGER.pair)):
        with pytest.raises(ServiceError, match=r"unauthorized|authentication required|access to the resource is denied"):
            inspect(f"{APP}:{TAG}", *options)
    if private.tokens:
        assert inspect(f"{PUBLIC}:{TAG}") == content(stock.public, f"manifests/{TAG}").decode()
    source, target = f"docker://{private.host}/{APP}:{TAG}", room / "copied"
    containers.skopeo(
        "--override-arch", "arm64", "copy", "--src-creds", ALICE.pair, "--src-tls-verify=false", source, f"dir:{target}"
    )
    files = {f"sha256:{path.name}": path for path in target.iterdir() if len(path.name) == 64}
    assert files.keys() == set(stock.app.contents[ARM64])
    assert_hashes(files)
    assert private.shown() == {ALICE, MISTAKEN, STRANGER}


@needs_cri
@pytest.mark.parametrize("address", ["", "mirror", "registry"])
def test_where_containerd_sends_a_pods_secret(private: Private, stock: Stock, room: Path, address: str) -> None:
    """To every mirror that challenges, as long as ``server_address`` is empty; else only to the server of that address."""
    auth = ALICE.auth | {"server_address": {"": "", "mirror": private.url, "registry": f"https://{UPSTREAM}"}[address]}
    with containerd_in(room) as containerd, Cri(containerd.socket) as client:
        containerd.hosts_toml(UPSTREAM, private.url, server=nowhere())
        name = f"{UPSTREAM}/{LITTLE}:{TAG}"
        if address == "registry":
            with pytest.raises(CriError):
                client.pull(name, auth)
            assert private.shown() == set()
        else:
            client.pull(name, auth)
            assert private.shown() == {ALICE}


# -- secrets that the proxy holds ----------------------------------------------------------------------------------------


@needs_cri
def test_a_secret_of_the_proxy_over_cri(private: Private, stock: Stock, room: Path) -> None:
    """A pod without any secret pulls a private image: pullcache shows its own, to this registry and for this image only."""
    secret = room / ".dockerconfigjson"
    secret.write_text(json.dumps(docker_config(UPSTREAM, ALICE)))
    repository, image = sample(private, stock)
    name = f"{UPSTREAM}/{repository}:{TAG}"
    with serving(room, private, SHARED, [{"file": str(secret)}]) as served:
        pull_over_cri(served.url, name, image, room)
        assert private.shown() == {ALICE}
        assert {sent.agent for sent in private.seen()} == {"pullcache"}
        assert served.accounts() == set()
        assert not any(sent.authorization for sent in served.came())
        if private.tokens:
            assert only_pulls(private, repository)
            assert {request.account for request in private.tokens.requests} == {ALICE}, "no attempt without the secret"
        private.registry.stop()
        blobs = image.contents[PLATFORM]
        assert private.registry.blobs() == once(blobs)

        pull_over_cri(served.url, name, image, room, auth=STRANGER.auth)  # not asked for, so not sent
        assert served.accounts() == set()


def pull_over_cri(mirror: str, name: str, image: RealImage, room: Path, auth: Mapping[str, str] | None = None) -> None:
    """One pull by a containerd that has nothing yet, with nowhere else to go."""
    with containerd_in(room) as containerd, Cri(containerd.socket) as client:
        containerd.hosts_toml(UPSTREAM, mirror, server=nowhere())
        client.pull(name, auth)
        assert_pulled(containerd, client, name, image)


def assert_not_pulled(mirror: str, name: str, room: Path, auth: Mapping[str, str] | None) -> None:
    """The pull fails, and containerd has got nothing, not even a manifest."""
    with containerd_in(room) as containerd, Cri(containerd.socket) as client:
        containerd.hosts_toml(UPSTREAM, mirror, server=nowhere())
        with pytest.raises(CriError):
            client.pull(name, auth)
        assert not client.images()
        assert containerd.content() == {}


def _file(folder: Path, name: str, document: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(json.dumps(document) if not name.endswith(".yaml") else yaml.safe_dump(document))
    return file


def _mounted(folder: Path) -> Path:
    """A Secret as the kubelet mounts it: through two symbolic links."""
    _file(folder / "..2026_01_01", ".dockerconfigjson", docker_config(UPSTREAM, ALICE))
    (folder / "..data").symlink_to("..2026_01_01")
    (folder / ".dockerconfigjson").symlink_to("..data/.dockerconfigjson")
    return folder


def _kubectl(kind: str, key: str, document: object) -> dict[str, Any]:
    data = {key: base64.b64encode(json.dumps(document).encode()).decode()}
    metadata = {"creationTimestamp": None, "name": "pull"}
    return {"apiVersion": "v1", "data": data, "kind": "Secret", "metadata": metadata, "type": f"kubernetes.io/{kind}"}


def _inline(folder: Path) -> list[dict[str, Any]]:
    folder.mkdir()
    (folder / "password").write_text(f"{ALICE.password}\n")
    return [{"registry": UPSTREAM, "username": ALICE.user, "passwordFile": str(folder / "password")}]


_PLAIN = {UPSTREAM: {"username": ALICE.user, "password": ALICE.password, "email": "alice@registry.test"}}
FORMS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    "dockerconfigjson": lambda at: [{"file": str(_file(at, ".dockerconfigjson", docker_config(UPSTREAM, ALICE)))}],
    "dockercfg": lambda at: [{"file": str(_file(at, ".dockercfg", _PLAIN))}],
    "kubectl-dockerconfigjson": lambda at: [
        {"file": str(_file(at, "s.yaml", _kubectl("dockerconfigjson", ".dockerconfigjson", {"auths": _PLAIN})))}
    ],
    "kubectl-dockercfg": lambda at: [{"file": str(_file(at, "s.yaml", _kubectl("dockercfg", ".dockercfg", _PLAIN)))}],
    "docker-login": lambda at: [{"file": str(_file(at, "config.json", docker_config(f"https://{UPSTREAM}/v2/", ALICE)))}],
    "mounted": lambda at: [{"directory": str(_mounted(at))}],
    "mounted-several": lambda at: [{"directory": str(_mounted(at / "pull").parent)}],
    "inline": _inline,
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_secret(by_token: Private, stock: Stock, room: Path, form: str) -> None:
    """Whatever form it is written in, it opens the registry."""
    with serving(room, by_token, SHARED, FORMS[form](room / "secrets")) as served:
        assert_all(served.url, LITTLE, stock.little, None)
    assert by_token.tokens is not None
    assert {request.account for request in by_token.tokens.requests} == {ALICE}
    assert only_pulls(by_token, LITTLE)


def test_secrets_that_match_are_tried_in_turn(by_token: Private, stock: Stock, room: Path) -> None:
    """The one with the longer path first; when it is refused the next, and nothing without any."""
    config = {"auths": {UPSTREAM: ALICE.entry, f"{UPSTREAM}/team": MISTAKEN.entry, f"{UPSTREAM}/other": BOB.entry}}
    secret = _file(room / "secrets", "config.json", config)
    with serving(room, by_token, SHARED, [{"file": str(secret)}]) as served:
        assert_all(served.url, LITTLE, stock.little, None)
        assert by_token.tokens is not None
        asked = [request.account for request in by_token.tokens.requests]
        assert asked[0] == MISTAKEN
        assert set(asked) == {MISTAKEN, ALICE}
        by_token.forget()
        assert_all(served.url, OTHER, stock.other, None)
        assert by_token.shown() == {BOB}
        assert only_pulls(by_token, OTHER)


def test_an_identity_token(by_token: Private, stock: Stock, room: Path) -> None:
    """What ``docker login`` keeps of some registries in place of a password: it goes to the token server, and only there."""
    assert by_token.tokens is not None
    identity = by_token.tokens.refresh_token(ALICE.user)
    entry = {"auth": base64.b64encode(f"{ALICE.user}:".encode()).decode(), "identitytoken": identity}
    secret = _file(room / "secrets", "config.json", {"auths": {UPSTREAM: entry}})
    with serving(room, by_token, SHARED, [{"file": str(secret)}]) as served:
        assert_all(served.url, LITTLE, stock.little, None)
        assert identity not in served.pullcache.log
    assert {request.method for request in by_token.tokens.requests if request.granted} == {"POST"}
    assert not any(identity.encode() in kept for kept in by_token.line.requests)


# -- each client's own secret ----------------------------------------------------------------------------------------


@needs_cri
def test_a_pods_own_secret_over_cri(private: Private, stock: Stock, room: Path) -> None:
    """The pod that has the right gets the image, cold, warm and without a registry; a wrong secret or none gets nothing."""
    repository, image = sample(private, stock)
    name = f"{UPSTREAM}/{repository}:{TAG}"
    with serving(room, private, "verify") as served:
        pull_over_cri(served.url, name, image, room, ALICE.auth)
        assert private.shown() == {ALICE} == served.accounts()
        assert {sent.agent for sent in private.seen()} == {"pullcache"}
        assert {sent.subject for sent in private.seen()} <= {"", ALICE.user}
        if private.tokens:
            assert only_pulls(private, repository)
        blobs = image.contents[PLATFORM]
        assert private.registry.wait_for_blobs(frozenset(blobs)) == once(blobs)

        private.forget()
        for outsider in private.outsiders():
            assert_not_pulled(served.url, name, room, outsider.auth if outsider else None)
        assert private.shown() == {outsider for outsider in private.outsiders() if outsider}
        assert not any(sent.subject == ALICE.user and sent.account != MISTAKEN for sent in private.seen())
        assert not private.registry.blobs()
        assert_not_pulled(served.url, f"{UPSTREAM}/{repository}@{image.index}", room, None)

        private.stop()
        for outsider in private.outsiders():
            assert_not_pulled(served.url, name, room, outsider.auth if outsider else None)
        pull_over_cri(served.url, name, image, room, ALICE.auth)


def test_nobody_else_gets_a_cached_private_image(private: Private, stock: Stock, room: Path) -> None:
    """By tag, by digest, by blob, through any other repository, however the upstream is named: nothing of it."""
    with serving(room, private, "verify") as served:
        assert_all(served.url, LITTLE, stock.little, ALICE)
        assert_all(served.url, OTHER, stock.other, BOB)
        assert_all(served.url, PUBLIC, stock.public, None if private.tokens else BOB)
        assert private.shown() == {ALICE, BOB}
        private.forget()
        assert_hidden(served, private, stock.little)
        assert ALICE not in private.shown()
        private.forget()
        assert_all(served.url, LITTLE, stock.little, ALICE)
        assert not [sent for sent in private.seen() if sent.method == "GET" and "/blobs/" in sent.path], "they are cached"

        private.stop()
        assert_hidden(served, private, stock.little, BROKEN)
        assert_all(served.url, LITTLE, stock.little, ALICE)
        assert_all(served.url, OTHER, stock.other, BOB)
        assert_all(served.url, PUBLIC, stock.public, None if private.tokens else BOB)


def assert_hidden(served: Served, private: Private, image: RealImage, more: set[int] | None = None) -> None:
    """Who may not read ``team/*`` gets no part of an image there, nor its tags, by any way of asking."""
    for outsider in private.outsiders():
        for way in (f"/v2/{{}}/{{}}?ns={UPSTREAM}", f"/v2/{UPSTREAM}/{{}}/{{}}", "/v2/{}/{}"):
            for part in (*parts(image), "tags/list"):
                for method in ("GET", "HEAD"):
                    reply = ask(served.url + way.format(LITTLE, part), outsider, method=method)
                    assert reply.status in REFUSED | (more or set()), (outsider, way, part, reply)
        for repository in (PUBLIC, OTHER, APP, "team/none", "public/none"):
            for part in parts(image)[1:]:  # the tag is one of theirs, too
                reply = ask(f"{served.url}/v2/{repository}/{part}", outsider)
                assert reply.status in REFUSED | (more or set()), (outsider, repository, part, reply)
                assert content(image, part) not in reply.body


def test_the_challenges(by_token: Private, stock: Stock, room: Path) -> None:
    """``/v2/`` names the token endpoint, which is there for the anonymous, too; what needs a right says how to show it."""
    with serving(room, by_token, "verify") as served:
        bearer = f'Bearer realm="{served.url}/token",service="pullcache"'
        ping = ask(f"{served.url}/v2/")
        assert ping.status == 401
        assert [line for line in ping.all("www-authenticate") if line.startswith("Bearer")] == [bearer]

        refused = ask(f"{served.url}/v2/{LITTLE}/manifests/{TAG}")
        assert refused.status == 401
        schemes = [line.split(" ")[0] for line in refused.all("www-authenticate")]
        assert set(schemes) == {"Bearer", "Basic"}
        assert any(line.startswith(bearer) for line in refused.all("www-authenticate"))

        scopes = f"scope=repository:{UPSTREAM}/{LITTLE}:pull&scope=repository:{LITTLE}:pull,push&scope=what:is:this"
        get = ask(f"{served.url}/token?service=pullcache&{scopes}", ALICE)
        form = {"grant_type": "password", "username": ALICE.user, "password": ALICE.password, "service": "pullcache"}
        post = ask(f"{served.url}/token", method="POST", form=form | {"scope": "what:is:this", "client_id": "test"})
        for answer in (get, post):
            assert answer.status == 200
            token = json.loads(answer.body)
            token = token.get("token") or token["access_token"]
            assert ALICE.password not in token
            reply = ask(f"{served.url}/v2/{LITTLE}/manifests/{TAG}", token=token)
            assert (reply.status, reply.body) == (200, content(stock.little, f"manifests/{TAG}"))
        for account in (None, Account("", "")):
            anonymous = json.loads(ask(f"{served.url}/token?service=pullcache", account).body)["token"]
            assert ask(f"{served.url}/v2/", token=anonymous).status == 200
            assert ask(f"{served.url}/v2/{PUBLIC}/manifests/{TAG}", token=anonymous).status == 200
            assert ask(f"{served.url}/v2/{LITTLE}/manifests/{TAG}", token=anonymous).status in REFUSED
        unknown = ask(f"{served.url}/v2/{LITTLE}/manifests/{TAG}", token="made-up")
        assert unknown.status == 401
        assert any('error="invalid_token"' in line for line in unknown.all("www-authenticate"))
    assert by_token.shown() == {ALICE}


def test_a_right_that_is_withdrawn(by_password: Private, stock: Stock, room: Path) -> None:
    """Once the registry has said no to him, who had the image yesterday gets it no more; others do."""
    with serving(room, by_password, {"mode": "verify", "maxAge": "1s"}) as served:
        for account in (ALICE, BOB):
            assert_all(served.url, LITTLE, stock.little, account)
        by_password.withdraw(ALICE)
        blob = f"{served.url}/v2/{LITTLE}/{parts(stock.little)[-1]}"
        wait_until(lambda: ask(blob, ALICE).status in (401, 403), "she is refused")
        for part in parts(stock.little):
            assert ask(f"{served.url}/v2/{LITTLE}/{part}", ALICE).status in (401, 403)
        assert_all(served.url, LITTLE, stock.little, BOB)


@pytest.mark.parametrize("stale_for", ["1h", "0s"])
def test_a_yes_that_is_old_while_the_registry_is_down(private: Private, stock: Stock, room: Path, stale_for: str) -> None:
    """It is stretched by ``access.staleFor``, and no longer; nobody else gains by it."""
    with serving(room, private, {"mode": "verify", "maxAge": "0s", "staleFor": stale_for}) as served:
        assert_all(served.url, LITTLE, stock.little, ALICE)
        private.stop()
        if stale_for == "1h":
            assert_all(served.url, LITTLE, stock.little, ALICE)
        for account in (*private.outsiders(), *([ALICE] if stale_for == "0s" else [])):
            for part in parts(stock.little):
                assert ask(f"{served.url}/v2/{LITTLE}/{part}", account).status in REFUSED | BROKEN


@needs_cri
def test_a_secret_with_a_server_address_stays_away(private: Private, stock: Stock, room: Path) -> None:
    """containerd shows it to that server only: the 401 sends the node there, past the cache, which learns nothing."""
    name = f"{UPSTREAM}/{LITTLE}:{TAG}"
    with serving(room, private, "verify") as served, containerd_in(room) as containerd, Cri(containerd.socket) as client:
        containerd.hosts_toml(UPSTREAM, served.url, server=private.url)
        client.pull(name, ALICE.auth | {"server_address": private.url})
        assert_pulled(containerd, client, name, stock.little)
        assert {sent.path for sent in served.came()} & {f"/v2/{LITTLE}/manifests/{TAG}"}
        assert served.accounts() == set()
        assert not any(ALICE.password.encode() in kept for kept in served.line.requests)
        by_agent = {sent.agent for sent in private.seen() if sent.subject == ALICE.user}
        assert by_agent == {"containerd"}
        assert not list((served.cache / "blobs").glob("*/*")), "nothing of it is kept"


# -- podman and skopeo -------------------------------------------------------------------------------------------------


@needs_podman
def test_podman_with_creds(private: Private, stock: Stock, room: Path) -> None:
    """By the path prefix of the upstream: the right credentials bring the image, wrong ones and none do not."""
    with serving(room, private, "verify") as served:
        repository, image = sample(private, stock)
        platform = ARM64 if ARM64 in image.contents else PLATFORM
        name = f"{served.host}/{UPSTREAM}/{repository}:{TAG}"

        def pull(home: str, account: Account | None) -> Containers:
            containers = Containers(room / home)
            creds = ["--creds", account.pair] if account else []
            containers.podman("pull", "--tls-verify=false", "--platform", platform, *creds, name)
            return containers

        assert_stored(pull("alice", ALICE), name, image, platform)
        assert private.shown() == {ALICE} == served.accounts()
        blobs = image.contents[platform]
        assert private.registry.wait_for_blobs(frozenset(blobs)) == once(blobs)
        private.forget()
        for number, outsider in enumerate(private.outsiders()):
            with pytest.raises(ServiceError, match=r"unauthorized|authentication required|denied"):
                pull(f"outsider-{number}", outsider)
        assert ALICE not in private.shown()
        private.stop()
        assert_stored(pull("again", ALICE), name, image, platform)
        with pytest.raises(ServiceError):
            pull("wrong", MISTAKEN)


@needs_podman
def test_skopeo_with_creds(by_token: Private, stock: Stock, room: Path) -> None:
    """The ping's challenge makes it fetch a token, with its credentials or without; public images need none."""
    with serving(room, by_token, "verify") as served:
        containers = Containers(room / "containers")

        def inspect(repository: str, account: Account | None) -> str:
            creds = ["--creds", account.pair] if account else []
            address = f"docker://{served.host}/{UPSTREAM}/{repository}:{TAG}"
            return containers.skopeo("inspect", "--raw", "--tls-verify=false", *creds, address)

        assert inspect(PUBLIC, None) == content(stock.public, f"manifests/{TAG}").decode()
        assert by_token.shown() == set() == served.accounts()
        assert inspect(LITTLE, ALICE) == content(stock.little, f"manifests/{TAG}").decode()
        assert by_token.shown() == {ALICE} == served.accounts()
        for outsider in by_token.outsiders():
            with pytest.raises(ServiceError, match=r"unauthorized|authentication required|denied"):
                inspect(LITTLE, outsider)
        assert inspect(OTHER, BOB) == content(stock.other, f"manifests/{TAG}").decode()
        pings = [sent for sent in served.came() if sent.path == "/v2/" and not sent.authorization]
        tokens = [sent for sent in served.came() if sent.path == "/token"]
        assert pings
        assert tokens
        assert all(sent.authorization.startswith("Bearer ") for sent in served.came() if "/manifests/" in sent.path)


# -- Docker --------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["graph", "store"])
def docker_of(request: pytest.FixtureRequest) -> Callable[..., Dockerd]:
    """A dockerd with its graph drivers, or a newer one with the containerd image store."""
    programs: Path | None = None
    if request.param == "store":
        try:
            programs = newer(IMAGE_CACHE.parent)
        except (ServiceError, OSError) as error:
            pytest.skip(f"not to be had here: a dockerd with the containerd image store: {error}")
    return lambda root, *mirrors: Dockerd(root, mirrors, programs, request.param == "store")


def log_in(docker: Dockerd, host: str, account: Account) -> None:
    """What ``docker login`` would leave."""
    _file(docker.root / "client", "config.json", docker_config(host, account))


@needs_dockerd
def test_docker_hub_credentials_at_the_mirror(
    by_token: Private, stock: Stock, room: Path, docker_of: Callable[..., Dockerd]
) -> None:
    """Graph drivers show the mirror those of Docker Hub, when its ping asks; the containerd image store shows it none."""
    hub = "https://index.docker.io/v1/"
    with serving(room, by_token, "verify", name="docker.io") as served, docker_of(room / "d", served.url) as docker:
        if docker.containerd_store:
            log_in(docker, hub, ALICE)
            with pytest.raises(ServiceError):
                docker.pull(f"{LITTLE}:{TAG}", PLATFORM)
            assert any(sent.path == f"/v2/{LITTLE}/manifests/{TAG}" for sent in served.came())
            assert by_token.shown() == set() == served.accounts()
            docker.pull(f"{PUBLIC}:{TAG}", PLATFORM)
            return
        for wrong in (MISTAKEN, BOB):
            log_in(docker, hub, wrong)
            with pytest.raises(ServiceError):
                docker.pull(f"{LITTLE}:{TAG}", PLATFORM)
        log_in(docker, hub, ALICE)
        docker.pull(f"{APP}:{TAG}", ARM64)
        assert docker.inspect(f"{APP}:{TAG}")["Id"] == stock.app.contents[ARM64][0]
        assert by_token.shown() == {MISTAKEN, BOB, ALICE} == served.accounts()
        blobs = stock.app.contents[ARM64]
        assert by_token.registry.wait_for_blobs(frozenset(blobs)) == once(blobs)

        docker.forget()
        by_token.stop()
        docker.pull(f"{APP}:{TAG}", ARM64)
        docker.forget()
        log_in(docker, hub, MISTAKEN)
        with pytest.raises(ServiceError):
            docker.pull(f"{APP}:{TAG}", ARM64)


@needs_dockerd
def test_docker_with_credentials_for_the_cache(
    by_token: Private, stock: Stock, room: Path, docker_of: Callable[..., Dockerd]
) -> None:
    """Named in front of the image, the cache is the registry: both image stores show it what is meant for it."""
    with serving(room, by_token, "verify") as served, docker_of(room / "d") as docker:
        name = f"{served.host}/{UPSTREAM}/{LITTLE}:{TAG}"
        with pytest.raises(ServiceError):
            docker.pull(name, PLATFORM)
        log_in(docker, served.host, ALICE)
        docker.pull(name, PLATFORM)
        digests = [re.sub(".*@", "", digest) for digest in docker.inspect(name)["RepoDigests"]]
        assert digests == [stock.little.index]
        assert by_token.shown() == {ALICE} == served.accounts()
        docker.forget()
        log_in(docker, served.host, MISTAKEN)
        with pytest.raises(ServiceError):
            docker.pull(name, PLATFORM)
