"""The checks of the conformance suites, and whole lists, through pullcache from a real registry.

Debian's docker-registry has no endpoint for referrers, so that they come from the tag that stands in for it.
"""

from __future__ import annotations

import http.client
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.blackbox.addressing import DEFAULT, NS, PREFIX, Style
from tests.blackbox.test_conformance_old import DUMMY_DIGEST, NONEXISTENT_MANIFEST, TAG, TYPE_A, Pushed, push
from tests.fakes.content import OCI_INDEX, OCI_MANIFEST, Content
from tests.fakes.lists import referrers_tag

from .services import DockerRegistry, Pullcache, missing, pullcache_config

REPO = "conformance/a-b/c_d"
TAGS = ["tagtest0", "test0", "test1", "test2", "test3"]
UPSTREAM = "registry.test"

_missing = missing("docker-registry")
pytestmark = [
    pytest.mark.skipif(_missing is not None, reason=str(_missing)),
    pytest.mark.parametrize("style", [DEFAULT, PREFIX, NS], ids=["default", "prefix", "ns"]),
]


@dataclass(frozen=True)
class Got:
    """An answer."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def document(self) -> Any:
        """The JSON in it."""
        return json.loads(self.body)


def ask(host: str, method: str, target: str, body: bytes | None = None, **headers: str) -> Got:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection(host, timeout=20)
    try:
        connection.request(method, target, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return Got(answer.status, answer.headers, answer.read())
    finally:
        connection.close()


def upload(host: str, content: Content, repo: str) -> None:
    """Push everything of a repository, as clients do."""
    held = content.repository(repo)
    for digest, blob in held.blobs.items():
        place = ask(host, "POST", f"/v2/{repo}/blobs/uploads/").headers["Location"]
        target = place.partition(host)[2] if host in place else place
        assert ask(host, "PUT", f"{target}&digest={digest}", blob, Content_Type="application/octet-stream").status == 201
    names = {digest: digest for digest in held.manifests} | held.tags
    for name, digest in names.items():
        manifest = held.manifests[digest]
        assert (
            ask(host, "PUT", f"/v2/{repo}/manifests/{name}", manifest.data, Content_Type=manifest.media_type).status == 201
        )


@pytest.fixture(scope="module")
def pushed() -> Iterator[tuple[Pushed, Content, Path]]:
    """What the suites push, in the data of a registry."""
    content = Content()
    made = push(content, REPO)
    for subject in (made.manifests[4], made.manifests[3]):
        content.push_referrers_tag(REPO, subject)
    with tempfile.TemporaryDirectory(prefix="upstream-") as name:
        with DockerRegistry(Path(name)) as registry:
            upload(registry.host, content, REPO)
        yield made, content, registry.data


@pytest.fixture
def before(room: Path, pushed: tuple[Pushed, Content, Path]) -> Iterator[DockerRegistry]:
    """The registry."""
    with DockerRegistry(room / "upstream", pushed[2]) as registry:
        yield registry


@pytest.fixture
def cache(room: Path, before: DockerRegistry) -> Iterator[Pullcache]:
    """pullcache with an empty cache, in front of it."""
    with Pullcache(pullcache_config(room / "cache", UPSTREAM, before.url), root=room / "pullcache") as server:
        yield server
        print(server.log[-4000:])


def test_what_the_suites_pull(cache: Pullcache, pushed: tuple[Pushed, Content, Path], style: Style) -> None:
    """Each request of the Pull checks, with its status, its digest and its bytes."""
    made, content, _ = pushed
    held = content.repository(REPO)
    assert ask(cache.host, "GET", "/v2/").status == 200
    for method in ("HEAD", "GET"):

        def get(rest: str, method: str = method) -> Got:
            return ask(cache.host, method, style.target(REPO, rest), Accept=OCI_MANIFEST)

        for rest in (f"blobs/{DUMMY_DIGEST}", f"manifests/{NONEXISTENT_MANIFEST}", f"manifests/{DUMMY_DIGEST}"):
            assert get(rest).status == 404
        assert get("manifests/sha256:totallywrong").status in (400, 404)
        for name in (TAG, made.manifests[0], made.manifests[1]):
            got = get(f"manifests/{name}")
            digest = held.tags.get(name, name)
            assert (got.status, got.headers["Docker-Content-Digest"]) == (200, digest)
            assert got.body == (held.manifests[digest].data if method == "GET" else b"")
        got = get(f"blobs/{made.configs[0]}")
        assert (got.status, got.headers["Docker-Content-Digest"]) == (200, made.configs[0])
        assert got.body == (held.blobs[made.configs[0]] if method == "GET" else b"")


def test_every_page_of_tags(
    cache: Pullcache, before: DockerRegistry, pushed: tuple[Pushed, Content, Path], style: Style
) -> None:
    """From link to link as the registry pages, under the client's own name; ``n=0`` and no number are answered here."""
    whole = ask(cache.host, "GET", style.target(REPO, "tags/list")).document
    assert whole["name"] == style.name(REPO)
    every = sorted([*TAGS, *(referrers_tag(digest) for digest in pushed[0].manifests[3:])])
    assert whole["tags"] == every, "in order, which this registry does not keep"
    for number, last in enumerate(every):
        rest = ask(cache.host, "GET", style.target(REPO, "tags/list", last=last)).document["tags"]
        assert rest == every[number + 1 :]
    target, found = style.target(REPO, "tags/list", n="2"), []
    for _ in range(10):
        got = ask(cache.host, "GET", target)
        assert (got.status, len(got.document["tags"]) <= 2) == (200, True)
        found += got.document["tags"]
        if "Link" not in got.headers:
            break
        target = got.headers["Link"].removeprefix("<").partition(">")[0]
        assert target.startswith(f"/v2/{style.name(REPO)}/tags/list?")
    assert found == every
    none = ask(cache.host, "GET", style.target(REPO, "tags/list", n="0"))
    assert (none.status, none.document["tags"], "Link" in none.headers) == (200, [], False)
    refused = ask(cache.host, "GET", style.target(REPO, "tags/list", n="x"))
    assert (refused.status, refused.document["errors"][0]["code"]) == (400, "PAGINATION_NUMBER_INVALID")
    unknown = ask(cache.host, "GET", style.target("no/such", "tags/list"))
    assert (unknown.status, unknown.document["errors"][0]["code"]) == (404, "NAME_UNKNOWN")
    assert all(request.path.startswith(("/v2/conformance/", "/v2/no/such/")) for request in before.requests())


def test_referrers_of_a_registry_without_the_api(
    cache: Pullcache, before: DockerRegistry, pushed: tuple[Pushed, Content, Path], style: Style
) -> None:
    """The checks of the listing of references; then, with the registry gone, the same list again."""
    made, content, _ = pushed

    def get(digest: str, **query: str) -> tuple[list[dict[str, Any]], str | None]:
        got = ask(cache.host, "GET", style.target(REPO, f"referrers/{digest}", **query))
        assert (got.status, got.headers["Content-Type"]) == (200, OCI_INDEX)
        assert (got.document["schemaVersion"], got.document["mediaType"]) == (2, OCI_INDEX)
        return got.document["manifests"], got.headers["OCI-Filters-Applied"]

    assert get(DUMMY_DIGEST) == ([], None)
    assert get(made.manifests[3])[0][0]["digest"] == made.of_missing
    every = content.referrers(REPO, made.manifests[4])
    assert get(made.manifests[4]) == (every, None)
    asked = len(before.requests())
    filtered, applied = get(made.manifests[4], artifactType=TYPE_A)
    assert (len(filtered), applied) == (2, "artifactType")
    assert len(before.requests()) == asked, "one question serves all for a minute"
    before.stop()
    assert get(made.manifests[4]) == (every, None)
