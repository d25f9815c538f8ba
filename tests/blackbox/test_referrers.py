"""Referrers: one whole list of a subject, filtered here, kept for a minute; from the API or the tag in its place."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.config.file import validate
from tests.blackbox.addressing import DEFAULT, NS, PREFIX, Client, Style, digests_of, index_of
from tests.blackbox.oracle import error_of, forget_peak, peak_memory
from tests.blackbox.test_credentials_stay import CANARY, SECRETS
from tests.blackbox.test_lists import HUB, PORTED, WAYS, deep, until_served
from tests.blackbox.test_upstream_errors import FAILING
from tests.conftest import UPSTREAM, RunningCache, StartCache, running, settings, upstream
from tests.fakes import answers
from tests.fakes.answers import Step, as_json, compose, status, with_headers
from tests.fakes.content import DOCKER_LIST, OCI_INDEX, OCI_MANIFEST, Manifest, digest_of
from tests.fakes.lists import referrers_tag
from tests.fakes.messages import BEFORE_HEADERS, Answer, Headers, Request
from tests.fakes.recorder import Sink
from tests.fakes.registry import ScriptedRegistry

REPO = "team/app"
SIGNATURE, SBOM = "application/vnd.example.signature.v1+json", "application/vnd.example.sbom"
FRESH = 60
NOTES = {"org.example.note": '\u00fc <&> \\ " \n'}
NOBODY = digest_of(b"nobody refers to this")

Wind = Callable[[float], None]


@pytest.fixture
def wind(monkeypatch: pytest.MonkeyPatch) -> Wind:
    """Lets seconds pass at once, on every clock. Asked for before any cache, it outlives them."""
    passed = 0.0
    clocks = {name: getattr(time, name) for name in ("time", "monotonic")}

    def told(name: str) -> Callable[[], float]:
        return lambda: clocks[name]() + passed

    for name in clocks:
        monkeypatch.setattr(time, name, told(name))

    def forward(seconds: float) -> None:
        nonlocal passed
        passed += seconds

    return forward


@pytest.fixture
def subject(registry: ScriptedRegistry) -> Manifest:
    """An image with five referrers: four signatures and an SBOM between them."""
    return refer(registry, REPO)


def refer(registry: ScriptedRegistry, repo: str) -> Manifest:
    """Give a repository such an image."""
    image = registry.add_image(repo, "1", [b"layer"])
    for number, kind in enumerate((SIGNATURE, SIGNATURE, SBOM, SIGNATURE, SIGNATURE)):
        registry.add_artifact(repo, image, kind, data=b"%d" % number, annotations=NOTES)
    return image


def client_of(cache: RunningCache, style: Style = DEFAULT) -> Client:
    """A client that asks about ``team/app``."""
    return Client(cache, style, REPO)


def api(digest: str) -> str:
    """The path of the referrers of a digest, at cache and upstream."""
    return f"/v2/{REPO}/referrers/{digest}"


def by_tag(digest: str) -> str:
    """The path of the tag that stands in for the API."""
    return f"/v2/{REPO}/manifests/{referrers_tag(digest)}"


# --- the answer ---


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fallback", [False, True], ids=["api", "tag"])
async def test_referrers_are_had_in_every_way_of_addressing(
    registry: ScriptedRegistry, start_cache: StartCache, way: str, fallback: bool
) -> None:
    """The descriptors are what the upstream has, in its order, with everything in them."""
    name, style, repo, there = WAYS[way]
    own = {"pathPrefix": "mine"} if style.prefix == "mine" else {}
    client = Client(await start_cache(upstream(registry, name, **own)), style, repo)
    image = refer(registry, there)
    if fallback:
        registry.lists.referrers_api = False
        registry.push_referrers_tag(there, image.digest)
    index = index_of(await client.get(f"referrers/{image.digest}"))
    assert index["manifests"] == registry.referrers(there, image.digest)
    assert len(index["manifests"]) == 5
    paths = {f"/v2/{there}/referrers/{image.digest}", f"/v2/{there}/manifests/{referrers_tag(image.digest)}"}
    assert {request.path for request in registry.requests} <= paths
    assert not any("ns" in request.params for request in registry.requests)


async def test_the_headers_of_referrers(cache: RunningCache, subject: Manifest) -> None:
    client = client_of(cache)
    for query in ({"artifactType": SBOM}, {"artifactType": "none/such"}, None):
        rest = f"referrers/{subject.digest}"
        answer, head = await client.ask("GET", rest, query=query), await client.ask("HEAD", rest, query=query)
        assert answer.headers.getall("Content-Type") == [OCI_INDEX]
        assert answer.headers.getall("Content-Length") == [str(len(answer.body))]
        assert answer.headers.getall("OCI-Filters-Applied") == (["artifactType"] if query else [])
        assert "immutable" not in (answer.headers.get("Cache-Control") or "")
        assert "max-age=31536000" not in (answer.headers.get("Cache-Control") or "")
        assert not answer.headers.has("Link")
        assert not answer.headers.has("Warning")
        assert (head.status, head.body) == (200, b"")
        for name in ("Content-Type", "Content-Length", "OCI-Filters-Applied", "Cache-Control"):
            assert head.headers.getall(name) == answer.headers.getall(name)


@pytest.mark.parametrize("repo", [REPO, "no/such/repository"])
async def test_what_nobody_refers_to_has_an_empty_index(cache: RunningCache, registry: ScriptedRegistry, repo: str) -> None:
    """Also where the registry says 404 to all of it: a registry with the API never does (OCI distribution spec 1.1.1)."""
    registry.add_image(REPO, "1", [b"layer"])
    for _ in range(2):
        assert digests_of(await Client(cache, DEFAULT, repo).get(f"referrers/{NOBODY}")) == []


@pytest.mark.parametrize(
    "digest",
    [
        *(
            "sha256:short",
            "sha256:",
            "sha256",
            "md5:" + "0" * 32,
            "sha256:" + "0" * 65,
            "sha256:" + "A" * 64,
            ":" + "0" * 64,
        ),
        *("sha512:" + "0" * 64, "sha256:" + "g" * 64, "latest", "..", "sha256:" + "0" * 63 + "%30"),
    ],
)
async def test_a_malformed_digest_is_400_without_any_contact(
    cache: RunningCache, registry: ScriptedRegistry, digest: str
) -> None:
    answer = await client_of(cache).get(f"referrers/{digest}")
    assert error_of(answer)[0] == (404 if "%" in digest else 400)
    assert error_of(answer)[1] == ("NAME_UNKNOWN" if "%" in digest else "DIGEST_INVALID")
    assert registry.connections == 0


@pytest.mark.parametrize(
    ("target", "status_", "code"),
    [
        (f"/v2/Upper/referrers/{NOBODY}?ns=registry.test", 400, "NAME_INVALID"),
        (f"/v2/team/app/referrers/{NOBODY}?ns=quay.test", 404, "NAME_UNKNOWN"),
        (f"/v2/quay.test/team/app/referrers/{NOBODY}", 404, "NAME_UNKNOWN"),
        ("/v2/team/app/referrers", 404, "NAME_UNKNOWN"),
        (f"/v2/team/app/referrers/{NOBODY}/", 404, "NAME_UNKNOWN"),
        (f"/v2/referrers/{NOBODY}", 404, "NAME_UNKNOWN"),
    ],
)
async def test_what_has_no_referrers_is_refused_without_any_contact(
    cache: RunningCache, registry: ScriptedRegistry, target: str, status_: int, code: str
) -> None:
    assert error_of(await cache.get(target))[:2] == (status_, code)
    assert registry.connections == 0


async def test_referrers_of_sha512(cache: RunningCache, registry: ScriptedRegistry) -> None:
    digest = registry.add_manifest(REPO, b"{}", OCI_MANIFEST, alg="sha512")
    made = registry.add_artifact(REPO, Manifest(OCI_MANIFEST, b"{}", digest), SBOM)
    assert digests_of(await client_of(cache).get(f"referrers/{digest}")) == [made.digest]


@pytest.mark.parametrize("style", [DEFAULT, PREFIX, NS], ids=["default", "prefix", "ns"])
@pytest.mark.parametrize("source", ["api that filters", "api that does not", "tag"])
@pytest.mark.parametrize("size", [None, 2], ids=["whole", "paged"])
async def test_the_filter_is_applied_whether_or_not_the_upstream_does(
    cache: RunningCache, registry: ScriptedRegistry, subject: Manifest, style: Style, source: str, size: int | None
) -> None:
    """Those of the type and no others, from every page; and all of them without a filter."""
    registry.lists.filters = source == "api that filters"
    registry.lists.referrers_page_size = size
    if source == "tag":
        registry.lists.referrers_api = False
        registry.push_referrers_tag(REPO, subject.digest)
    client = client_of(cache, style)
    every = registry.referrers(REPO, subject.digest)
    for kind in (SIGNATURE, SBOM, "none/such", SIGNATURE.upper(), None):
        answer = await client.ask("GET", f"referrers/{subject.digest}", query={"artifactType": kind} if kind else None)
        expected = [entry for entry in every if kind in (None, entry["artifactType"])]
        assert index_of(answer)["manifests"] == expected
        assert answer.headers.getall("OCI-Filters-Applied") == (["artifactType"] if kind else [])


# --- pages of the upstream ---


@pytest.mark.parametrize("size", [1, 2, 4, 5])
@pytest.mark.parametrize("cursor", [None, "next"])
@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
async def test_the_pages_of_the_upstream_become_one(
    cache: RunningCache, registry: ScriptedRegistry, subject: Manifest, size: int, cursor: str | None, absolute: bool
) -> None:
    registry.lists.referrers_page_size, registry.lists.cursor = size, cursor
    if absolute:
        registry.lists.link_to = lambda target: registry.url + target
    answer = await client_of(cache).get(f"referrers/{subject.digest}")
    assert index_of(answer)["manifests"] == registry.referrers(REPO, subject.digest)
    assert not answer.headers.has("Link")
    assert registry.count("GET", api(subject.digest)) == -(-5 // size)


async def test_who_is_on_two_pages_is_listed_once(
    cache: RunningCache, registry: ScriptedRegistry, subject: Manifest
) -> None:
    entry = registry.referrers(REPO, subject.digest)[0]
    page = as_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry, entry]})
    linked = with_headers({"Content-Type": OCI_INDEX, "Link": f'<{api(subject.digest)}?page=2>; rel="next"'})
    registry.script("GET", api(subject.digest), compose(page, linked))
    found = digests_of(await client_of(cache).get(f"referrers/{subject.digest}"))
    assert sorted(found) == sorted(item["digest"] for item in registry.referrers(REPO, subject.digest))


@pytest.mark.parametrize("fresh", [False, True], ids=["the same page", "ever new pages"])
async def test_pages_without_end_are_given_up(
    cache: RunningCache, registry: ScriptedRegistry, subject: Manifest, fresh: bool
) -> None:
    """Refused rather than cut: a list that lacks its end would hide a referrer."""
    entry = registry.referrers(REPO, subject.digest)[0]

    def page(request: Request) -> Answer:
        number = len(registry.requests) if fresh else 0
        other = {**entry, "digest": digest_of(b"%d" % number)}
        link = [("Link", f'<{api(subject.digest)}?page={number}>; rel="next"')]
        listed = as_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [other]}, headers=link)
        return Answer(200, listed.headers.without("Content-Type").plus([("Content-Type", OCI_INDEX)]), listed.body)

    registry.script("GET", api(subject.digest), page, forever=True)
    assert error_of(await client_of(cache).get(f"referrers/{subject.digest}"))[:2] == (502, "UNKNOWN")
    assert len(registry.requests) <= 1000


@pytest.mark.parametrize("form", ["http://{sink}{target}", "//{sink}{target}", "http://user:pw@{sink}{target}"])
async def test_a_link_to_another_host_is_not_followed(
    cache: RunningCache, registry: ScriptedRegistry, subject: Manifest, form: str
) -> None:
    """The next page is asked of the upstream itself, or the list is refused; nobody else hears of it."""
    registry.lists.referrers_page_size = 2
    async with Sink() as sink:
        registry.lists.link_to = lambda target: form.format(sink=sink.host, target=target)
        answer = await client_of(cache).get(f"referrers/{subject.digest}")
        assert sink.silent
    if answer.status == 200:
        assert index_of(answer)["manifests"] == registry.referrers(REPO, subject.digest)
    else:
        assert error_of(answer)[:2] == (502, "UNKNOWN")


@pytest.mark.parametrize(
    "path", ["/v2/other/secret/referrers/{digest}", "/token", "/v2/_catalog", "/v2/team/app/manifests/1"]
)
async def test_a_link_to_something_else_is_not_followed(
    cache: RunningCache, registry: ScriptedRegistry, subject: Manifest, path: str
) -> None:
    registry.lists.referrers_page_size = 2
    registry.lists.link_to = lambda target: path.format(digest=subject.digest) + "?" + target.partition("?")[2]
    await client_of(cache).get(f"referrers/{subject.digest}")
    assert {request.path for request in registry.requests} <= {api(subject.digest), by_tag(subject.digest)}


@pytest.mark.parametrize(
    "step", [status(500), answers.oci_error(404, "MANIFEST_UNKNOWN"), status(404)], ids=["500", "404", "404 page"]
)
async def test_a_page_that_fails_fails_the_list(
    cache: RunningCache, registry: ScriptedRegistry, subject: Manifest, step: Step
) -> None:
    """Half a list would hide a referrer. A registry that has one page has the API, and does not say 404 to the next."""
    registry.lists.referrers_page_size = 2
    failing = registry.script("GET", lambda request: bool(request.query), step, forever=True)
    assert error_of(await client_of(cache).get(f"referrers/{subject.digest}"))[:2] == (502, "UNKNOWN")
    failing.cancel()
    assert len(digests_of(await client_of(cache).get(f"referrers/{subject.digest}"))) == 5


# --- for a minute ---


async def test_for_a_minute_one_question_serves_all(
    wind: Wind, cache: RunningCache, registry: ScriptedRegistry, subject: Manifest
) -> None:
    client = client_of(cache)
    first = digests_of(await client.get(f"referrers/{subject.digest}"))
    late = registry.add_artifact(REPO, subject, SBOM, data=b"late")
    for _ in range(3):
        assert digests_of(await client.get(f"referrers/{subject.digest}")) == first
    wind(FRESH - 2)
    assert digests_of(await client.get(f"referrers/{subject.digest}")) == first
    assert len(registry.requests) == 1
    wind(4)
    assert digests_of(await client.get(f"referrers/{subject.digest}")) == [*first, late.digest]
    assert len(registry.requests) == 2


@pytest.mark.parametrize("fallback", [False, True], ids=["api", "tag"])
async def test_that_there_are_none_holds_for_a_minute_only(
    wind: Wind, cache: RunningCache, registry: ScriptedRegistry, fallback: bool
) -> None:
    registry.lists.referrers_api = not fallback
    image = registry.add_image(REPO, "1", [b"layer"])
    client = client_of(cache)
    for _ in range(3):
        assert digests_of(await client.get(f"referrers/{image.digest}")) == []
    assert len(registry.requests) == (2 if fallback else 1)
    made = registry.add_artifact(REPO, image, SBOM)
    registry.push_referrers_tag(REPO, image.digest)
    wind(FRESH + 2)
    assert digests_of(await client.get(f"referrers/{image.digest}")) == [made.digest]


@pytest.mark.parametrize("kind", FAILING)
async def test_while_the_upstream_fails_the_last_list_is_served_with_a_warning(
    wind: Wind, cache: RunningCache, registry: ScriptedRegistry, subject: Manifest, kind: str
) -> None:
    client = client_of(cache)
    before = index_of(await client.get(f"referrers/{subject.digest}"))
    script = registry.script("*", lambda request: True, FAILING[kind][0], forever=True)
    assert not (await client.get(f"referrers/{subject.digest}")).headers.has("Warning"), "still fresh"
    wind(FRESH + 2)
    for query in (None, {"artifactType": SBOM}):
        answer = await client.ask("GET", f"referrers/{subject.digest}", query=query)
        wanted = [entry for entry in before["manifests"] if not query or entry["artifactType"] == SBOM]
        assert index_of(answer)["manifests"] == wanted
        [warning] = answer.headers.getall("Warning")
        assert warning.startswith("299 - ")
        assert UPSTREAM in warning
        assert "immutable" not in (answer.headers.get("Cache-Control") or "")
    script.cancel()
    wind(FRESH + 2)
    answer = await client.get(f"referrers/{subject.digest}")
    assert (index_of(answer), answer.headers.has("Warning")) == (before, False)


async def test_a_list_outlives_a_restart(wind: Wind, registry: ScriptedRegistry, subject: Manifest, tmp_path: Path) -> None:
    """A cluster that comes up again with its registry down still finds its signatures."""
    config = validate(settings(tmp_path / "cache", upstream(registry)))
    async with running(config) as cache:
        before = index_of(await client_of(cache).get(f"referrers/{subject.digest}"))
    await registry.stop()
    async with running(config) as cache:
        answer = await client_of(cache).get(f"referrers/{subject.digest}")
        assert (index_of(answer), answer.headers.has("Warning")) == (before, False)
        wind(FRESH + 2)
        answer = await client_of(cache).get(f"referrers/{subject.digest}")
        assert (index_of(answer), answer.headers.has("Warning")) == (before, True)


@pytest.mark.parametrize(
    "step", [answers.oci_error(401, "UNAUTHORIZED"), answers.oci_error(403, "DENIED")], ids=["401", "403"]
)
async def test_a_refusal_is_not_overruled_by_what_was_known(
    wind: Wind, cache: RunningCache, registry: ScriptedRegistry, subject: Manifest, step: Step
) -> None:
    """A registry that has made a repository private has answered; the old list is not its answer."""
    await client_of(cache).get(f"referrers/{subject.digest}")
    registry.script("*", lambda request: True, step, forever=True)
    wind(FRESH + 2)
    assert error_of(await client_of(cache).get(f"referrers/{subject.digest}"))[:2] == (403, "DENIED")


async def test_repositories_do_not_share_their_referrers(cache: RunningCache, registry: ScriptedRegistry) -> None:
    """The right to read one is not the right to read another, and a digest may be in both."""
    here, there = registry.add_image(REPO, "1", [b"layer"]), registry.add_image("other/app", "1", [b"layer"])
    assert here.digest == there.digest
    made = [registry.add_artifact(repo, here, SBOM, data=repo.encode()).digest for repo in (REPO, "other/app")]
    for _ in range(2):
        for repo, digest in zip((REPO, "other/app"), made, strict=True):
            assert digests_of(await Client(cache, DEFAULT, repo).get(f"referrers/{here.digest}")) == [digest]


async def test_upstreams_do_not_share_their_referrers(registry: ScriptedRegistry, start_cache: StartCache) -> None:
    async with ScriptedRegistry() as other:
        cache = await start_cache(upstream(registry), upstream(other, "other.test"))
        images = [there.add_image(REPO, "1", [b"layer"]) for there in (registry, other)]
        made = other.add_artifact(REPO, images[1], SBOM)
        rest = f"referrers/{images[0].digest}"
        assert digests_of(await client_of(cache).get(rest)) == []
        assert digests_of(await client_of(cache, Style(ns="other.test")).get(rest)) == [made.digest]


# --- the tag schema ---

NO_API: dict[str, Step] = {
    "as distribution says it": status(404, b"404 page not found\n", "text/plain; charset=utf-8"),
    "with an error": answers.oci_error(404, "NOT_FOUND"),
    "with an unknown name": answers.oci_error(404, "NAME_UNKNOWN"),
    "with an unknown manifest": answers.oci_error(404, "MANIFEST_UNKNOWN"),
    "without a body": status(404),
    "with JSON that is no error": as_json({}, 404),
}


@pytest.mark.parametrize("kind", NO_API)
@pytest.mark.parametrize("pushed", [False, True], ids=["none", "some"])
async def test_a_registry_without_the_api_is_asked_for_the_tag(
    cache: RunningCache, registry: ScriptedRegistry, subject: Manifest, kind: str, pushed: bool
) -> None:
    registry.script("*", api(subject.digest), NO_API[kind], forever=True)
    if pushed:
        registry.push_referrers_tag(REPO, subject.digest)
    found = index_of(await client_of(cache).get(f"referrers/{subject.digest}"))
    assert found["manifests"] == (registry.referrers(REPO, subject.digest) if pushed else [])
    assert registry.seen(path=by_tag(subject.digest))


async def test_a_tag_beside_a_working_api_means_nothing(
    cache: RunningCache, registry: ScriptedRegistry, subject: Manifest
) -> None:
    """Registries that have the API answer from it, and take in what such tags held by themselves."""
    registry.push_referrers_tag(REPO, subject.digest)
    registry.add_artifact(REPO, subject, SBOM, data=b"late")
    assert len(digests_of(await client_of(cache).get(f"referrers/{subject.digest}"))) == 6
    assert not registry.seen(path=by_tag(subject.digest))


@pytest.mark.parametrize("kind", FAILING)
@pytest.mark.parametrize("where", ["api", "tag"])
async def test_what_fails_is_not_taken_for_an_empty_list(
    cache: RunningCache, registry: ScriptedRegistry, subject: Manifest, kind: str, where: str
) -> None:
    """Who asks for signatures must not hear that there are none because a gateway was down; nor is it remembered."""
    registry.push_referrers_tag(REPO, subject.digest)
    step, expected, code = FAILING[kind]
    if where == "tag":
        registry.lists.referrers_api = False
    path = api(subject.digest) if where == "api" else by_tag(subject.digest)
    script = registry.script("*", path, step, forever=True)
    got = error_of(await client_of(cache).get(f"referrers/{subject.digest}"))
    assert got[:2] == (expected, code)
    assert UPSTREAM in got[2]
    script.cancel()
    assert len(digests_of(await client_of(cache).get(f"referrers/{subject.digest}"))) == 5


async def test_the_pages_of_a_middlebox_are_not_taken_for_an_empty_list(
    cache: RunningCache, registry: ScriptedRegistry, subject: Manifest
) -> None:
    """Every registry answers a question for a manifest in JSON; a page for people says that it was not asked."""
    page = status(404, b"<html>no such site</html>", "text/html")
    script = registry.script("*", lambda request: True, page, forever=True)
    assert error_of(await client_of(cache).get(f"referrers/{subject.digest}"))[:2] == (502, "UNKNOWN")
    script.cancel()
    assert len(digests_of(await client_of(cache).get(f"referrers/{subject.digest}"))) == 5


async def test_what_is_refused_is_not_taken_for_an_empty_list(
    cache: RunningCache, registry: ScriptedRegistry, subject: Manifest
) -> None:
    for step in (answers.oci_error(401, "UNAUTHORIZED"), answers.oci_error(403, "DENIED")):
        registry.script("*", api(subject.digest), step)
        assert error_of(await client_of(cache).get(f"referrers/{subject.digest}"))[:2] == (403, "DENIED")


@pytest.mark.parametrize("kind", ["manifest", "list", "lying", "page", "broken", "huge"])
async def test_a_tag_that_holds_no_index_names_no_referrer(
    cache: RunningCache, registry: ScriptedRegistry, subject: Manifest, kind: str
) -> None:
    """Refused, or an index without entries; never what stands in a document of another type."""
    registry.lists.referrers_api = False
    tag = referrers_tag(subject.digest)
    entry = registry.referrers(REPO, subject.digest)[0]
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}
    if kind == "manifest":
        registry.move_tag(REPO, tag, subject.digest)
    elif kind == "list":
        registry.add_manifest(REPO, json.dumps({**index, "mediaType": DOCKER_LIST}).encode(), DOCKER_LIST, tag)
    elif kind == "lying":
        registry.add_manifest(REPO, json.dumps({**index, "mediaType": OCI_MANIFEST}).encode(), OCI_INDEX, tag)
    elif kind == "page":
        registry.script("*", by_tag(subject.digest), status(200, b"<html></html>", "text/html"), forever=True)
    elif kind == "broken":
        registry.add_manifest(REPO, b'{"schemaVersion": 2, "manifests": [', OCI_INDEX, tag)
    else:
        registry.add_manifest(REPO, json.dumps(index).encode() + b" " * 20_000_000, OCI_INDEX, tag)
    answer = await client_of(cache).get(f"referrers/{subject.digest}")
    if answer.status == 200:
        assert index_of(answer)["manifests"] == []
        assert kind in ("manifest", "list")
    else:
        assert error_of(answer)[:2] == (502, "UNKNOWN")


# --- upstreams that are hostile or broken ---


def index_with(*entries: Any, **more: Any) -> Answer:
    """An index with any entries."""
    listed = as_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list(entries), **more})
    return Answer(200, listed.headers.without("Content-Type").plus([("Content-Type", OCI_INDEX)]), listed.body)


NO_INDEX: dict[str, Answer] = {
    "a page": status(200, b"<html>sign in</html>", "text/html"),
    "a page that says it is an index": status(200, b"<html>sign in</html>", OCI_INDEX),
    "nothing": status(200, b"", OCI_INDEX),
    "no content": status(204),
    "half": status(200, b'{"schemaVersion": 2, "manifests": [', OCI_INDEX),
    "null": status(200, b"null", OCI_INDEX),
    "an array": status(200, b"[]", OCI_INDEX),
    "no manifests": status(200, b'{"schemaVersion": 2}', OCI_INDEX),
    "an object": index_with(manifests={"a": "b"}),
    "a string": index_with(manifests="x"),
    "deep": status(200, deep(100_000), OCI_INDEX),
    "an image": as_json({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": {}, "layers": []}),
    "an error with 200": as_json({"errors": [{"code": "UNKNOWN"}]}),
    "compressed": status(200, b"\x1f\x8b", OCI_INDEX, {"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("kind", NO_INDEX)
async def test_what_is_no_index_is_502_and_not_remembered(
    cache: RunningCache, registry: ScriptedRegistry, subject: Manifest, kind: str
) -> None:
    registry.script("GET", api(subject.digest), NO_INDEX[kind])
    got = error_of(await client_of(cache).get(f"referrers/{subject.digest}"))
    assert got[:2] == (502, "UNKNOWN")
    assert UPSTREAM in got[2]
    assert len(digests_of(await client_of(cache).get(f"referrers/{subject.digest}"))) == 5


GOOD: dict[str, Any] = {"mediaType": OCI_MANIFEST, "digest": NOBODY, "size": 5, "artifactType": SBOM}
HOSTILE: dict[str, Any] = {
    "null": None,
    "a string": "sha256:x",
    "a list": [GOOD],
    "nothing": {},
    "no digest": {key: value for key, value in GOOD.items() if key != "digest"},
    "a digest that is none": {**GOOD, "digest": "sha256:x"},
    "a path as digest": {**GOOD, "digest": "../../../etc/passwd"},
    "a number as digest": {**GOOD, "digest": 5},
    "no size": {key: value for key, value in GOOD.items() if key != "size"},
    "a negative size": {**GOOD, "size": -1},
    "a size in words": {**GOOD, "size": "5"},
    "a size beyond all measure": {**GOOD, "size": 10**400},
    "half a byte": {**GOOD, "size": 5.5},
    "true bytes": {**GOOD, "size": True},
    "no type": {key: value for key, value in GOOD.items() if key != "mediaType"},
    "a type with a line break": {**GOOD, "mediaType": "a/b\r\nX-Evil: 1"},
    "a number as type": {**GOOD, "mediaType": 5},
    "a list as artifact type": {**GOOD, "artifactType": [SBOM]},
    "annotations that are none": {**GOOD, "annotations": "x"},
    "annotations of numbers": {**GOOD, "annotations": {"a": 5}},
    "what is no number": {**GOOD, "x": float("nan")},
    "what is no finite number": {**GOOD, "x": float("inf")},
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("fallback", [False, True], ids=["api", "tag"])
async def test_a_descriptor_that_is_none_is_left_out_or_refused(
    cache: RunningCache, registry: ScriptedRegistry, subject: Manifest, kind: str, fallback: bool
) -> None:
    """What clients get are descriptors: with the digest, the size and the type that the OCI image spec wants."""
    other = {**GOOD, "digest": digest_of(b"good")}
    hostile = index_with(HOSTILE[kind], other)
    hostile = replace(hostile, body=hostile.payload.replace(b"Infinity", b"1e999"))  # both are read as the same
    if fallback:
        registry.lists.referrers_api = False
        registry.add_manifest(REPO, hostile.payload, OCI_INDEX, referrers_tag(subject.digest))
    else:
        registry.script("GET", api(subject.digest), hostile, forever=True)
    for query in (None, {"artifactType": SBOM}):
        answer = await client_of(cache).ask("GET", f"referrers/{subject.digest}", query=query)
        assert not answer.headers.has("X-Evil")
        if answer.status != 200:
            assert error_of(answer)[:2] == (502, "UNKNOWN")
            continue
        found = index_of(answer)["manifests"]
        assert other in found
        for entry in found:
            assert isinstance(entry["digest"], str)
            assert entry["digest"] in (NOBODY, other["digest"])
            assert type(entry["size"]) is int
            assert 0 <= entry["size"] < 1 << 63
            assert entry["mediaType"] == OCI_MANIFEST
            assert isinstance(entry.get("artifactType", ""), str)
            assert isinstance(entry.get("annotations", {}), dict)


async def test_what_a_descriptor_may_hold_is_passed_on(
    cache: RunningCache, registry: ScriptedRegistry, subject: Manifest
) -> None:
    """Fields of later versions too; clients know more of them than a cache."""
    full = {
        **GOOD,
        "annotations": {"a": "b"},
        "platform": {"os": "linux"},
        "urls": ["https://x.test/"],
        "data": "e30=",
        "new": 1,
    }
    registry.script("GET", api(subject.digest), index_with(full, annotations={"of": "the index"}))
    [entry] = index_of(await client_of(cache).get(f"referrers/{subject.digest}"))["manifests"]
    assert {key: entry[key] for key in (*GOOD, "annotations")} == {**GOOD, "annotations": {"a": "b"}}


async def test_many_referrers_are_whole_or_refused_in_little_memory(
    cache: RunningCache, registry: ScriptedRegistry, subject: Manifest
) -> None:
    entries = [{**GOOD, "digest": digest_of(b"%d" % number), "annotations": {"a": "x" * 500}} for number in range(20_000)]
    registry.script("GET", api(subject.digest), index_with(*entries), forever=True)
    before = forget_peak()
    answer = await client_of(cache).get(f"referrers/{subject.digest}")
    assert peak_memory() - before < 300_000_000
    assert (answer.status == 200 and len(digests_of(answer)) == 20_000) or error_of(answer)[:2] == (502, "UNKNOWN")


async def test_an_index_without_end_is_refused_and_hung_up_on(
    cache: RunningCache, registry: ScriptedRegistry, subject: Manifest
) -> None:
    async def entries() -> AsyncIterator[bytes]:
        yield b'{"schemaVersion": 2, "mediaType": "' + OCI_INDEX.encode() + b'", "manifests": ['
        while True:
            yield json.dumps(GOOD).encode() * 500 + b","

    registry.script(
        "GET", api(subject.digest), Answer(headers=Headers([("Content-Type", OCI_INDEX)]), body=entries, framing="chunked")
    )
    before = forget_peak()
    assert error_of(await client_of(cache).get(f"referrers/{subject.digest}"))[:2] == (502, "UNKNOWN")
    assert peak_memory() - before < 200_000_000
    await registry.wait_for(lambda: registry.open_connections == 0)


@pytest.mark.parametrize("after", [BEFORE_HEADERS, 10], ids=["headers", "body"])
async def test_an_upstream_that_stalls_is_given_up(
    registry: ScriptedRegistry, subject: Manifest, start_cache: StartCache, after: int
) -> None:
    times = {"headers": "300ms", "head": "300ms", "connect": "300ms", "progress": "600ms"}
    cache = await start_cache(upstream(registry, timeouts=times))
    registry.script("GET", api(subject.digest), answers.cut(after, "stall"), forever=True)
    assert error_of(await client_of(cache).get(f"referrers/{subject.digest}"))[:2] == (503, "UNAVAILABLE")
    await registry.wait_for(lambda: registry.open_connections == 0)


async def test_secrets_stay_where_they_are(cache: RunningCache, registry: ScriptedRegistry, subject: Manifest) -> None:
    registry.require_token()
    registry.lists.referrers_page_size = 2
    answer = await client_of(cache).ask("GET", f"referrers/{subject.digest}", SECRETS)
    assert len(digests_of(answer)) == 5
    assert registry.tokens.issued
    assert not any(token in repr(answer) for token in registry.tokens.issued)
    assert not registry.heard(CANARY)


async def test_fifty_clients_at_once_are_one_question(
    cache: RunningCache, registry: ScriptedRegistry, subject: Manifest
) -> None:
    """However each of them names the repository and filters."""
    opened = asyncio.Event()
    registry.script("GET", api(subject.digest), answers.gate(opened), forever=True)
    clients = [client_of(cache, style) for style in (DEFAULT, PREFIX, NS)]
    queries = (None, {"artifactType": SBOM})
    rest = f"referrers/{subject.digest}"
    asking = [asyncio.create_task(clients[n % 3].ask("GET", rest, query=queries[n % 2])) for n in range(50)]
    try:
        await registry.wait_for(lambda: registry.requests)
        await until_served(cache, 50)
    finally:
        opened.set()
    found = await asyncio.gather(*asking)
    assert [len(digests_of(answer)) for answer in found] == [5, 1] * 25
    assert len(registry.requests) == 1


def test_the_ways_of_addressing_hold_those_of_ports_and_of_docker_hub() -> None:
    """Else the tests above show less than they say."""
    assert {PORTED, HUB} <= {way[0] for way in WAYS.values()}
