"""The checks of the new conformance suite (opencontainers/distribution-spec, main, a plain Go program), request for request.

The suite would be run with OCI_API_PUSH=false, deletes off, and OCI_RO_DATA_TAGS, _MANIFESTS, _BLOBS, _REFERRERS. Its
versions differ only in this: ``1.0`` leaves referrers out, ``stable`` (1.1) wants ``Docker-Content-Digest`` to be right
where it is, ``dev`` wants it to be there as well. What ``dev`` wants is tested, which the others are part of. With read-only
data the suite compares no body, since it does not know it, and looks for the digest header of a manifest where it never has
one; here the upstream holds the data that the suite would push, and header and body are compared.

Its checks, by function of ``conformance/run.go``, with the name under which it reports them:

``TestPing``: "ping".
``TestEmpty``: "empty/tag list", "empty/referrers".
``TestBlobAPIs``, for sha256 and sha512: "get-missing"; "range requests/range 500-1499", "range 500-", "range -500",
    "range 2000-5000", "range 500-0", "range 5000-10000"; "empty" and "emptyJSON" as far as they read. Not applicable: "post
    only", "post+put", "chunked single", "stream", "mount", "mount anonymous", "mount missing", "post cancel", the "chunked
    multi" and "chunked out-of-order" ones, and the "bad digest" ones: they push.
``TestPush``: not applicable.
``TestList``: "tag-list", with its part about ``last``.
``TestHead``: "manifest-head-by-tag", "manifest-head-by-digest", "blob-head".
``TestPull``: "manifest-by-tag", "manifest-by-digest", "blob-get".
``TestReferrers``: "referrers", with its part about ``artifactType``.
``TestDelete``: "tag-delete", "manifest-delete", "blob-delete": not applicable, switched off. That they are refused with the
    405 that they allow is tested with the old suite's.
``TestManifestErrors``: "missing-manifest/by-digest", "missing-manifest/by-tag", "invalid-digest-format/manifest-get". Not
    applicable: "invalid-digest-format/manifest-put".

The data (``GenerateData``) are those of its names: image, image-uncompressed, large-manifest, index, nested-index,
empty-index, artifact, artifact-index, artifact-without-layers, artifacts-with-subject, index-with-subject, missing-subject,
data-field, non-distributable-layers, custom-fields, no-layers, sparse, sha512. Not applicable: tag-param-* and
bad-digest-image, which are about pushing.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.blackbox.addressing import Client, Style, names, styles
from tests.conftest import RunningCache
from tests.fakes.client import WireResponse
from tests.fakes.content import OCI_CONFIG, OCI_EMPTY, OCI_INDEX, OCI_LAYER, OCI_MANIFEST, Content, Manifest, digest_of
from tests.fakes.registry import ScriptedRegistry

AGENT = ("User-Agent", "Go-http-client/1.1")
GZIP = ("Accept-Encoding", "gzip")
ACCEPT = [("Accept", OCI_INDEX), ("Accept", OCI_MANIFEST)]
EXAMPLE_1, EXAMPLE_2 = "application/vnd.example.oci.conformance.v1", "application/vnd.example.oci.conformance.v2"
NOTES = {"org.opencontainers.conformance": "hello conformance test"}
ALGORITHMS = ("sha256", "sha512")
HOLDS = "conformance/data"
RANGED = random.Random(2048).randbytes(2048)

algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)
pytestmark = [styles, names]


@dataclass
class Data:
    """What the suite knows of its data: by tag, by digest, and what refers to which subject."""

    content: Content = field(default_factory=Content)
    tags: dict[str, str] = field(default_factory=dict)
    manifests: dict[str, Manifest] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    referrers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def blob(self, data: bytes, kind: str = OCI_LAYER, algorithm: str = "sha256") -> dict[str, Any]:
        """A blob, as a descriptor."""
        digest = self.content.add_blob(HOLDS, data, algorithm)
        self.blobs[digest] = data
        return {"mediaType": kind, "digest": digest, "size": len(data)}

    def manifest(
        self, document: dict[str, Any], tag: str | None = None, kind: str = OCI_MANIFEST, algorithm: str = "sha256"
    ) -> Manifest:
        """A manifest; one with a subject is expected among its referrers."""
        data = json.dumps({"schemaVersion": 2, "mediaType": kind, **document}).encode()
        stored = Manifest(kind, data, self.content.add_manifest(HOLDS, data, kind, tag, algorithm))
        self.manifests[stored.digest] = stored
        if tag:
            self.tags[tag] = stored.digest
        if subject := document.get("subject"):
            kind_of = document.get("artifactType") or document.get("config", {}).get("mediaType")
            goal = stored.descriptor(artifactType=kind_of, annotations=document.get("annotations", {}))
            self.referrers.setdefault(subject["digest"], []).append(goal)
        return stored

    def image(self, tag: str | None = None, layers: int = 1, algorithm: str = "sha256", **more: Any) -> Manifest:
        """An image whose blobs nobody else has."""
        seed = f"{tag}{len(self.blobs)}"
        config = json.dumps({"architecture": "amd64", "os": "linux", "author": seed}).encode()
        parts = [self.blob(f"{seed} layer {n}".encode(), algorithm=algorithm) for n in range(layers)]
        return self.manifest(
            {"config": self.blob(config, OCI_CONFIG, algorithm), "layers": parts, **more}, tag, algorithm=algorithm
        )

    def artifact(self, kind: str, tag: str | None = None, layer: bytes | None = None, **more: Any) -> Manifest:
        """An artifact with the empty config."""
        layers = [self.blob(f"{tag}{len(self.manifests)}".encode() if layer is None else layer, kind)]
        config = self.blob(b"{}", OCI_EMPTY)
        return self.manifest({"artifactType": kind, "config": config, "layers": layers, **more}, tag)

    def index(
        self, manifests: Sequence[Manifest], tag: str | None = None, algorithm: str = "sha256", **more: Any
    ) -> Manifest:
        """An index over manifests."""
        entries = [manifest.descriptor() for manifest in manifests]
        return self.manifest({"manifests": entries, **more}, tag, OCI_INDEX, algorithm)


@functools.cache
def generate() -> Data:
    """All that the suite generates; nothing of it is changed after."""
    data = Data()
    data.image("image", layers=2)
    data.image("image-uncompressed")
    data.image("large-manifest", annotations={f"large-annotation-{n}": "A" * 10_000 for n in range(390)})
    data.index([data.image(), data.image()], "index")
    nested = [data.index([data.image()]) for _ in range(2)]
    data.index(nested, "index-of-index")
    data.index([], "empty-index")
    data.artifact(EXAMPLE_1, "artifact")
    data.index([data.artifact(EXAMPLE_1)], "artifact-index", artifactType=EXAMPLE_1)
    data.artifact(OCI_EMPTY, "artifact-without-layers", b"{}")
    subject = data.image("with-referrers").descriptor()
    data.image(subject=subject)
    data.artifact(EXAMPLE_1, "tagged-artifact1", subject=subject, annotations=NOTES | {"unique": "1"})
    data.artifact(EXAMPLE_2, "tagged-artifact2", subject=subject, annotations=NOTES | {"unique": "2"})
    of_index = data.index([data.image()], "index-with-referrers").descriptor()
    parts = [data.artifact(EXAMPLE_1)]
    data.index(parts, "tagged-index", artifactType=EXAMPLE_1, subject=of_index, annotations=NOTES | {"unique": "3"})
    missing = {"mediaType": OCI_MANIFEST, "digest": digest_of(b"missing content"), "size": 123}
    data.artifact(EXAMPLE_1, "of-missing", subject=missing, annotations=NOTES | {"unique": "4"})
    inline = {"data": base64.b64encode(b"{}").decode()}
    data.manifest({"config": data.blob(b"{}", OCI_CONFIG) | inline, "layers": []}, "data-field")
    foreign = {"mediaType": "application/vnd.oci.image.layer.nondistributable.v1.tar", "size": 12345}
    far = digest_of(b"far away")
    layers = [foreign | {"digest": far, "urls": [f"https://store.example.com/{far}"]}, data.blob(b"near")]
    data.manifest({"config": data.blob(b'{"os":"linux"}', OCI_CONFIG), "layers": layers}, "non-distributable-image")
    data.index([data.image(customField="x")], "custom-fields", customField="y")
    data.image("no-layers", layers=0)
    absent = {"mediaType": OCI_LAYER, "digest": digest_of(b"never pushed"), "size": 12}
    data.manifest({"config": data.blob(b'{"os":"none"}', OCI_CONFIG), "layers": [absent]}, "sparse-image")
    data.index([data.image(), Manifest(OCI_MANIFEST, bytes(1024), digest_of(b"no manifest"))], "sparse-index")
    data.index([data.image(algorithm="sha512")], algorithm="sha512")
    for algorithm in ALGORITHMS:
        for blob in (b"", b"{}", RANGED):
            data.blob(blob, algorithm=algorithm)
    return data


@pytest.fixture
def data(registry: ScriptedRegistry, repo: str) -> Data:
    """The suite's data, which the repository upstream holds."""
    generated = generate()
    registry.repositories[repo] = generated.content.repository(HOLDS)
    return generated


@pytest.fixture
def client(cache: RunningCache, style: Style, repo: str) -> Client:
    """The suite's client."""
    return Client(cache, style, repo)


async def ask(client: Client, method: str, rest: str, *headers: tuple[str, str], **query: str) -> WireResponse:
    """A request as Go's client sends it, which offers to decompress what is not a range."""
    ranged = any(name == "Range" for name, _ in headers)
    offers = [GZIP] if method == "GET" and not ranged else []
    return await client.ask(method, rest, [AGENT, *headers, *offers], query)


def verify_digest(answer: WireResponse, digest: str) -> None:
    """``VerifyDigest`` with ``RequireDigestHeader``, as in ``dev``."""
    assert answer.headers.getall("Docker-Content-Digest") == [digest]


async def each(
    client: Client, method: str, kind: str, references: Iterable[str], *headers: tuple[str, str]
) -> dict[str, WireResponse]:
    """One request a reference; the suite sends them one after the other."""
    asked = list(references)
    answers = await asyncio.gather(*(ask(client, method, f"{kind}/{reference}", *headers) for reference in asked))
    return dict(zip(asked, answers, strict=True))


def described(answer: WireResponse, manifest: Manifest) -> None:
    """``ManifestHeadExists`` and ``ManifestGetExists``: status, type, length and digest."""
    assert answer.status == 200, (manifest.data[:200], answer.body[:300])
    assert manifest.media_type in answer.headers.getall("Content-Type")
    assert str(len(manifest.data)) in answer.headers.getall("Content-Length")
    verify_digest(answer, manifest.digest)


async def tag_list(client: Client, **query: str) -> list[str]:
    """``TagList``: 200 with JSON, or 404."""
    answer = await ask(client, "GET", "tags/list", **query)
    assert answer.status in (200, 404)
    return list(json.loads(answer.body)["tags"]) if answer.status == 200 else []


async def referrers_list(client: Client, subject: str, **query: str) -> tuple[list[dict[str, Any]], list[str]]:
    """``ReferrersList``: the type exactly, the status, and an index that says what it is; the filters that were applied."""
    answer = await ask(client, "GET", f"referrers/{subject}", **query)
    assert OCI_INDEX in answer.headers.getall("Content-Type")
    assert answer.status == 200
    index = json.loads(answer.body)
    assert (index["mediaType"], index["schemaVersion"]) == (OCI_INDEX, 2)
    filters = (answer.headers.get("OCI-Filters-Applied") or "").split(",")
    return index["manifests"], [name.strip() for name in filters]


def contains(found: list[dict[str, Any]], goal: dict[str, Any]) -> bool:
    """Whether a referrer is listed, described as it should be; more annotations than its own do no harm."""
    same = ("digest", "mediaType", "size", "artifactType")
    return any(
        all(entry.get(key) == goal[key] for key in same)
        and goal["annotations"].items() <= entry.get("annotations", {}).items()
        for entry in found
    )


# --- TestPing ---


async def test_ping(client: Client) -> None:
    """ping: 200, which the client's error handling wants although the check does not name it."""
    answer = await client.cache.get("/v2/", [AGENT, GZIP])
    assert answer.status == 200


# --- TestEmpty ---


async def test_empty_tag_list(client: Client) -> None:
    """empty/tag list: a repository that nobody has pushed to yet may be 404, and is here."""
    assert await tag_list(client) == []


async def test_empty_referrers(client: Client) -> None:
    """empty/referrers: 200 even then, of any digest."""
    assert (await referrers_list(client, digest_of(b"random text")))[0] == []


# --- TestBlobAPIs ---


@algorithms
async def test_get_missing(client: Client, data: Data, algorithm: str) -> None:
    """get-missing: a blob that was not pushed is 404."""
    assert (await ask(client, "GET", f"blobs/{digest_of(b'post cancel', algorithm)}")).status == 404


@algorithms
@pytest.mark.parametrize("held", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [("500-1499", 500, 1499), ("500-", 500, 2047), ("-500", 1548, 2047), ("2000-5000", 2000, 2047)],
)
async def test_range_requests(
    client: Client, data: Data, algorithm: str, held: bool, asked: str, first: int, last: int
) -> None:
    """range requests/range 500-1499, 500-, -500, 2000-5000: 206; the whole instead would be reported as not supported."""
    rest = f"blobs/{digest_of(RANGED, algorithm)}"
    if held:
        await ask(client, "GET", rest)
    answer = await ask(client, "GET", rest, ("Range", f"bytes={asked}"))
    assert (answer.status, answer.body) == (206, RANGED[first : last + 1])
    assert answer.headers.getall("Content-Length") == [str(last + 1 - first)]
    assert answer.headers.get("Content-Range") in (f"bytes {first}-{last}/2048", f"bytes {first}-{last}/*")


@algorithms
@pytest.mark.parametrize("held", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("asked", ["500-0", "5000-10000"])
async def test_range_requests_that_cannot_be_met(client: Client, data: Data, algorithm: str, held: bool, asked: str) -> None:
    """range requests/range 500-0 and 5000-10000: 416, or the whole, as RFC 9110 wants it of a range that is no range."""
    rest = f"blobs/{digest_of(RANGED, algorithm)}"
    if held:
        await ask(client, "GET", rest)
    answer = await ask(client, "GET", rest, ("Range", f"bytes={asked}"))
    whole = (answer.status, answer.body, answer.headers.get("Content-Length")) == (200, RANGED, "2048")
    assert answer.status == 416 or (whole and asked == "500-0")


@algorithms
@pytest.mark.parametrize("blob", [b"", b"{}"], ids=["empty", "emptyJSON"])
async def test_well_known_blobs(client: Client, data: Data, algorithm: str, blob: bytes) -> None:
    """empty, emptyJSON: blob-head and blob-get of contents that everybody has."""
    digest = digest_of(blob, algorithm)
    for method, body in (("HEAD", b""), ("GET", blob)):
        answer = await ask(client, method, f"blobs/{digest}")
        assert (answer.status, answer.body) == (200, body)
        assert answer.headers.getall("Content-Length") == [str(len(blob))]
        verify_digest(answer, digest)


# --- TestList ---


async def test_tag_list(client: Client, data: Data) -> None:
    """tag-list: every tag is in it; with ``last``, exactly those after it are."""
    tags = await tag_list(client)
    assert set(data.tags) <= set(tags)
    in_order = sorted(tags)
    half = len(in_order) // 2
    rest = await tag_list(client, last=in_order[half - 1])
    assert not set(in_order[:half]) & set(rest)
    assert set(in_order[half:]) <= set(rest)


# --- TestHead ---


async def test_manifest_head_by_tag(client: Client, data: Data) -> None:
    """manifest-head-by-tag."""
    for tag, answer in (await each(client, "HEAD", "manifests", data.tags, *ACCEPT)).items():
        described(answer, data.manifests[data.tags[tag]])
        assert answer.body == b""


async def test_manifest_head_by_digest(client: Client, data: Data) -> None:
    """manifest-head-by-digest."""
    for digest, answer in (await each(client, "HEAD", "manifests", data.manifests, *ACCEPT)).items():
        described(answer, data.manifests[digest])
        assert answer.body == b""


async def test_blob_head(client: Client, data: Data) -> None:
    """blob-head."""
    for digest, answer in (await each(client, "HEAD", "blobs", data.blobs)).items():
        assert (answer.status, answer.body) == (200, b"")
        assert answer.headers.getall("Content-Length") == [str(len(data.blobs[digest]))]
        verify_digest(answer, digest)


# --- TestPull ---


async def test_manifest_by_tag(client: Client, data: Data) -> None:
    """manifest-by-tag."""
    for tag, answer in (await each(client, "GET", "manifests", data.tags, *ACCEPT)).items():
        manifest = data.manifests[data.tags[tag]]
        described(answer, manifest)
        assert answer.body == manifest.data


async def test_manifest_by_digest(client: Client, data: Data) -> None:
    """manifest-by-digest."""
    for digest, answer in (await each(client, "GET", "manifests", data.manifests, *ACCEPT)).items():
        described(answer, data.manifests[digest])
        assert answer.body == data.manifests[digest].data


async def test_blob_get(client: Client, data: Data) -> None:
    """blob-get."""
    for digest, answer in (await each(client, "GET", "blobs", data.blobs)).items():
        assert (answer.status, answer.body) == (200, data.blobs[digest])
        assert answer.headers.getall("Content-Length") == [str(len(answer.body))]
        verify_digest(answer, digest)


# --- TestReferrers ---


async def test_referrers(client: Client, data: Data) -> None:
    """referrers: every one of each subject, and with ``artifactType`` those of the type and no other."""
    assert len(data.referrers) == 3
    for subject, goals in data.referrers.items():
        found, _ = await referrers_list(client, subject)
        assert all(contains(found, goal) for goal in goals), (goals, found)
        for kind in {goal["artifactType"] for goal in goals}:
            found, filters = await referrers_list(client, subject, artifactType=kind)
            assert "artifactType" in filters
            assert all(contains(found, goal) for goal in goals if goal["artifactType"] == kind)
            assert {entry["artifactType"] for entry in found} == {kind}


# --- TestManifestErrors ---


async def test_missing_manifest_by_digest(client: Client, data: Data) -> None:
    """missing-manifest/by-digest: 404."""
    assert (await ask(client, "GET", f"manifests/{digest_of(b'random')}", *ACCEPT)).status == 404


async def test_missing_manifest_by_tag(client: Client, data: Data) -> None:
    """missing-manifest/by-tag: 404."""
    assert (await ask(client, "GET", "manifests/missing-abcdefghijklmnopqrst", *ACCEPT)).status == 404


async def test_invalid_digest_format_manifest_get(client: Client, data: Data) -> None:
    """invalid-digest-format/manifest-get: 404 or 400."""
    assert (await ask(client, "GET", "manifests/sha256:baddigeststring", *ACCEPT)).status in (404, 400)
