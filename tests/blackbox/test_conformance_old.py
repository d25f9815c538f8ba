"""The checks of the old conformance suite (opencontainers/distribution-spec, tag v1.1.1, Ginkgo), request for request.

The suite would be run with read-only data (OCI_TEST_PULL, OCI_TEST_CONTENT_DISCOVERY, OCI_TAG_NAME, OCI_MANIFEST_DIGEST,
OCI_BLOB_DIGEST, OCI_TAG_LIST); here the upstream holds what its set-up would have pushed. Its checks, by file:

``01_pull_test.go``, Pull
    Setup: four of "Populate registry with ...": not applicable, they push; "Get tag name from environment": sends nothing.
    Pull blobs: "HEAD request to nonexistent blob should result in 404 response", "HEAD request to existing blob should
    yield 200", "GET nonexistent blob should result in 404 response", "GET request to existing blob URL should yield 200".
    Pull manifests: "HEAD request to nonexistent manifest should return 404", "HEAD request to manifest[0] path (digest)
    should yield 200 response", the same of manifest[1] and of the path by tag, "GET nonexistent manifest should return 404",
    "GET request to manifest[0] path (digest) should yield 200 response", the same of manifest[1] and of the path by tag.
    Error codes: "400 response body should contain OCI-conforming JSON message".
    Teardown: five of "Delete ...": once below, since a cache refuses them all alike, with the 405 that they allow.

``02_push_test.go``, Push, and ``04_management_test.go``, Content Management
    Not applicable: the cache claims neither category. That it refuses each kind of their requests is tested once.

``03_discovery_test.go``, Content Discovery
    Setup: push, as above.
    Listing tags: "GET request to list tags should yield 200 response", "GET number of tags should be limitable by `n` query
    parameter", "GET start of tag is set by `last` query parameter" (its condition on ``last`` is the one of later versions,
    which is stricter: in v1.1.1 it looks at the first page only).
    Listing references: "GET request to nonexistent blob should result in empty 200 response", "GET request to existing blob
    should yield 200", "GET request to existing blob with filter should yield 200", "GET request to missing manifest should
    yield 200". With the suite itself these need its own artifacts in the repository: with OCI_MANIFEST_DIGEST the last two
    subjects would be one, so that no registry could pass both.
    Teardown: deletes, as above.

There is no check of ``GET /v2/`` in this version; see the new suite's.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

import pytest

from tests.blackbox.addressing import Client, Style, names, styles
from tests.conftest import RunningCache
from tests.fakes.client import WireResponse
from tests.fakes.content import OCI_CONFIG, OCI_EMPTY, OCI_INDEX, OCI_LAYER, OCI_MANIFEST, Content, digest_of
from tests.fakes.registry import ScriptedRegistry

AGENT = ("User-Agent", "distribution-spec-conformance-tests")
ACCEPT = ("Accept", OCI_MANIFEST)
NONEXISTENT_MANIFEST = ".INVALID_MANIFEST_NAME"
DUMMY_DIGEST = digest_of(b"hello world")
TAG = "tagtest0"
TYPE_A, TYPE_B = "application/vnd.nhl.peanut.butter.bagel", "application/vnd.nba.strawberry.jam.croissant"
ANNOTATION = "org.opencontainers.conformance.test"
ERROR_CODES = {
    *("BLOB_UNKNOWN", "BLOB_UPLOAD_INVALID", "BLOB_UPLOAD_UNKNOWN", "DIGEST_INVALID", "MANIFEST_BLOB_UNKNOWN"),
    *("MANIFEST_INVALID", "MANIFEST_UNKNOWN", "MANIFEST_UNVERIFIED", "NAME_INVALID", "NAME_UNKNOWN", "SIZE_INVALID"),
    *("TAG_INVALID", "UNAUTHORIZED", "DENIED", "UNSUPPORTED"),
}

pytestmark = [styles, names]


@dataclass(frozen=True)
class Pushed:
    """What the set-up of the suite leaves in the repository: five configs and manifests, and annotations of referrers."""

    configs: list[str]
    manifests: list[str]
    annotations: dict[str, str]
    of_missing: str


def push(content: Content, repo: str) -> Pushed:
    """What the set-ups of Pull and of Content Discovery push; only the subject manifest[3] is never pushed there."""

    def described(kind: str, data: bytes) -> dict[str, Any]:
        return {"mediaType": kind, "digest": digest_of(data), "size": len(data)}

    def stored(document: dict[str, Any], kind: str = OCI_MANIFEST) -> str:
        data = json.dumps({"schemaVersion": 2, "mediaType": kind, **document}, indent="\t").encode()
        return content.add_manifest(repo, data, kind)

    layer = b"you bothered to find out what was in here. Congratulations!"
    for data in (layer, b"{}", b"bagel", b"croissant"):
        content.add_blob(repo, data)
    tags = {0: [TAG], 2: ["test0", "test1", "test2", "test3"]}
    configs, manifests, subjects = [], [], []
    for number in range(5):
        config = json.dumps({"architecture": "amd64", "os": "linux", "author": str(number)}, indent="\t").encode()
        unusual = {
            "data": base64.b64encode(config).decode(),
            "newUnspecifiedField": base64.b64encode(b"hello world").decode(),
        }
        configs.append(content.add_blob(repo, config))
        manifests.append(
            stored({"config": described(OCI_CONFIG, config) | unusual, "layers": [described(OCI_LAYER, layer)]})
        )
        for tag in tags.get(number, []):
            content.move_tag(repo, tag, manifests[number])
        subjects.append(content.repository(repo).manifests[manifests[number]].descriptor())
    content.remove(repo, manifests[3])
    annotations = {}
    empty = described(OCI_EMPTY, b"{}")
    for kind, data in ((TYPE_A, b"bagel"), (TYPE_B, b"croissant")):
        of = {"subject": subjects[4]}
        by_config = {"config": described(kind, data), "layers": [empty]}
        by_layer = {"artifactType": kind, "config": empty, "layers": [described(kind, data)]}
        for note, parts in ((f"test config {kind}", by_config), (f"test layer {kind}", by_layer)):
            annotations[stored(parts | of | {"annotations": {ANNOTATION: note}})] = note
    index = {"artifactType": "application/vnd.food.stand", "manifests": [], "subject": subjects[4]}
    annotations[stored(index | {"annotations": {ANNOTATION: "test index"}}, OCI_INDEX)] = "test index"
    last = stored({"artifactType": TYPE_B, "config": empty, "layers": [empty], "subject": subjects[3]})
    return Pushed(configs, manifests, annotations, last)


@pytest.fixture
def pushed(registry: ScriptedRegistry, repo: str) -> Pushed:
    """The content of the repository upstream."""
    return push(registry, repo)


@pytest.fixture
def client(cache: RunningCache, style: Style, repo: str) -> Client:
    """The suite's client."""
    return Client(cache, style, repo)


async def ask(client: Client, method: str, rest: str, *headers: tuple[str, str], **query: str) -> WireResponse:
    """A request as the suite's client sends it."""
    return await client.ask(method, rest, [AGENT, *headers], query)


def says(answer: WireResponse, digest: str) -> bool:
    """The suite's condition on the digest header: right, or absent. Of this cache it is never absent."""
    return answer.headers.getall("Docker-Content-Digest") == [digest]


# --- 01_pull_test.go: Pull blobs ---


async def test_head_request_to_nonexistent_blob(client: Client, pushed: Pushed) -> None:
    """HEAD request to nonexistent blob should result in 404 response."""
    assert (await ask(client, "HEAD", f"blobs/{DUMMY_DIGEST}")).status == 404


async def test_head_request_to_existing_blob(client: Client, pushed: Pushed) -> None:
    """HEAD request to existing blob should yield 200."""
    answer = await ask(client, "HEAD", f"blobs/{pushed.configs[0]}")
    assert (answer.status, says(answer, pushed.configs[0])) == (200, True)


async def test_get_nonexistent_blob(client: Client, pushed: Pushed) -> None:
    """GET nonexistent blob should result in 404 response."""
    assert (await ask(client, "GET", f"blobs/{DUMMY_DIGEST}")).status == 404


async def test_get_request_to_existing_blob_url(client: Client, pushed: Pushed) -> None:
    """GET request to existing blob URL should yield 200."""
    assert (await ask(client, "GET", f"blobs/{pushed.configs[0]}")).status == 200


# --- 01_pull_test.go: Pull manifests ---


async def test_head_request_to_nonexistent_manifest(client: Client, pushed: Pushed) -> None:
    """HEAD request to nonexistent manifest should return 404."""
    assert (await ask(client, "HEAD", f"manifests/{NONEXISTENT_MANIFEST}")).status == 404


@pytest.mark.parametrize("number", [0, 1])
async def test_head_request_to_manifest_path_by_digest(client: Client, pushed: Pushed, number: int) -> None:
    """HEAD request to manifest[0] (and manifest[1]) path (digest) should yield 200 response."""
    digest = pushed.manifests[number]
    answer = await ask(client, "HEAD", f"manifests/{digest}", ACCEPT)
    assert (answer.status, says(answer, digest)) == (200, True)


async def test_head_request_to_manifest_path_by_tag(client: Client, pushed: Pushed) -> None:
    """HEAD request to manifest path (tag) should yield 200 response."""
    answer = await ask(client, "HEAD", f"manifests/{TAG}", ACCEPT)
    assert (answer.status, says(answer, pushed.manifests[0])) == (200, True)


async def test_get_nonexistent_manifest(client: Client, pushed: Pushed) -> None:
    """GET nonexistent manifest should return 404."""
    assert (await ask(client, "GET", f"manifests/{NONEXISTENT_MANIFEST}")).status == 404


@pytest.mark.parametrize("number", [0, 1])
async def test_get_request_to_manifest_path_by_digest(client: Client, pushed: Pushed, number: int) -> None:
    """GET request to manifest[0] (and manifest[1]) path (digest) should yield 200 response."""
    answer = await ask(client, "GET", f"manifests/{pushed.manifests[number]}", ACCEPT)
    assert (answer.status, digest_of(answer.body)) == (200, pushed.manifests[number])


async def test_get_request_to_manifest_path_by_tag(client: Client, pushed: Pushed) -> None:
    """GET request to manifest path (tag) should yield 200 response."""
    answer = await ask(client, "GET", f"manifests/{TAG}", ACCEPT)
    assert (answer.status, digest_of(answer.body)) == (200, pushed.manifests[0])


# --- 01_pull_test.go: Error codes ---


async def test_error_codes(client: Client, pushed: Pushed) -> None:
    """400 response body should contain OCI-conforming JSON message: of a GET that brings a body, which is ignored."""
    headers = [AGENT, ("Content-Type", OCI_MANIFEST)]
    answer = await client.ask("GET", "manifests/sha256:totallywrong", headers, body=b"blablabla")
    assert answer.status in (400, 404)
    assert answer.status != 400 or json.loads(answer.body)["errors"][0]["code"] in ERROR_CODES


# --- 03_discovery_test.go: Test content discovery endpoints (listing tags) ---


async def test_get_request_to_list_tags(client: Client, pushed: Pushed) -> None:
    """GET request to list tags should yield 200 response."""
    answer = await ask(client, "GET", "tags/list")
    document = json.loads(answer.body)
    assert (answer.status, document["tags"]) == (200, ["tagtest0", "test0", "test1", "test2", "test3"])
    assert document["name"] == client.name


async def test_get_number_of_tags_is_limited_by_n(client: Client, pushed: Pushed) -> None:
    """GET number of tags should be limitable by `n` query parameter."""
    total = len(json.loads((await ask(client, "GET", "tags/list")).body)["tags"])
    answer = await ask(client, "GET", "tags/list", n=str(total // 2))
    assert (answer.status, len(json.loads(answer.body)["tags"])) == (200, total // 2)


async def test_get_start_of_tag_is_set_by_last(client: Client, pushed: Pushed) -> None:
    """GET start of tag is set by `last` query parameter."""
    total = len(json.loads((await ask(client, "GET", "tags/list")).body)["tags"])
    number = total // 2
    first = await ask(client, "GET", "tags/list", n=str(number))
    assert first.status == 200
    last = json.loads(first.body)["tags"][number - 1]
    answer = await ask(client, "GET", "tags/list", n=str(number), last=last)
    tags = json.loads(answer.body)["tags"]
    assert (answer.status, last in tags) == (200, False)
    assert len(tags) <= number
    assert tags, "there are more"


# --- 03_discovery_test.go: Test content discovery endpoints (listing references) ---


async def referrers(client: Client, subject: str, **query: str) -> tuple[list[dict[str, Any]], WireResponse]:
    """The descriptors in an answer that has the status and the type that the suite wants."""
    answer = await ask(client, "GET", f"referrers/{subject}", **query)
    assert (answer.status, answer.headers.get("Content-Type")) == (200, OCI_INDEX)
    found: list[dict[str, Any]] = json.loads(answer.body)["manifests"]
    return found, answer


def annotated(found: list[dict[str, Any]], pushed: Pushed) -> bool:
    """Whether each has the one annotation of its manifest."""
    return all(entry["annotations"] == {ANNOTATION: pushed.annotations[entry["digest"]]} for entry in found)


async def test_get_request_to_referrers_of_nonexistent_blob(client: Client, pushed: Pushed) -> None:
    """GET request to nonexistent blob should result in empty 200 response."""
    found, _ = await referrers(client, DUMMY_DIGEST)
    assert found == []


async def test_get_request_to_referrers_of_existing_blob(client: Client, pushed: Pushed) -> None:
    """GET request to existing blob should yield 200."""
    found, _ = await referrers(client, pushed.manifests[4])
    assert len(found) == 5
    assert {entry["digest"] for entry in found} == set(pushed.annotations)
    assert annotated(found, pushed)


async def test_get_request_to_referrers_with_filter(client: Client, pushed: Pushed) -> None:
    """GET request to existing blob with filter should yield 200: two, if it says that it filters, as it must here."""
    found, answer = await referrers(client, pushed.manifests[4], artifactType=TYPE_A)
    assert answer.headers.getall("OCI-Filters-Applied") == ["artifactType"]
    assert len(found) == 2
    assert annotated(found, pushed)


async def test_get_request_to_referrers_of_missing_manifest(client: Client, pushed: Pushed) -> None:
    """GET request to missing manifest should yield 200."""
    found, _ = await referrers(client, pushed.manifests[3])
    assert [entry["digest"] for entry in found] == [pushed.of_missing]


# --- 02_push_test.go, 04_management_test.go, and every teardown ---


@pytest.mark.parametrize(
    ("method", "rest"),
    [
        ("POST", "blobs/uploads/"),
        ("PUT", f"blobs/uploads/1?digest={DUMMY_DIGEST}"),
        ("PATCH", "blobs/uploads/1"),
        ("PUT", f"manifests/{TAG}"),
        ("DELETE", f"manifests/{TAG}"),
        ("DELETE", "manifests/{manifest}"),
        ("DELETE", "blobs/{blob}"),
    ],
)
async def test_pushes_and_deletes_are_refused(
    registry: ScriptedRegistry, client: Client, pushed: Pushed, method: str, rest: str
) -> None:
    """What the suite allows to a registry that claims neither Push nor Content Management: 405 (end-4 to end-11)."""
    path, _, query = rest.format(manifest=pushed.manifests[0], blob=pushed.configs[0]).partition("?")
    parameters = {"digest": query.removeprefix("digest=")} if query else {}
    answer = await client.ask(method, path, [AGENT, ("Content-Type", OCI_MANIFEST)], parameters, b"{}")
    assert (answer.status, json.loads(answer.body)["errors"][0]["code"]) == (405, "UNSUPPORTED")
    assert registry.connections == 0
