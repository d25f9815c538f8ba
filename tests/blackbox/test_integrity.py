"""Nothing that is not what its digest names ends cleanly at a client or is stored: T27, T28, T30, T31."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.blackbox.oracle import (
    LARGE,
    SMALL,
    blob_of,
    blob_path,
    error_of,
    manifest_path,
    pulls_well,
    vouched_wrongly,
    wrong_files,
)
from tests.conftest import RunningCache
from tests.fakes import answers
from tests.fakes.answers import Step, compose
from tests.fakes.content import DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, digest_of
from tests.fakes.registry import ScriptedRegistry

REPO = "team/app"
WRONG_BODY = {
    "one bit flipped": answers.flip_bit(100),
    "last bit flipped": answers.flip_bit(-1),
    "one byte added": answers.extra_bytes(b"x"),
    "one byte dropped": answers.drop_last(1),
    "another body": answers.swap_body(blob_of("another", SMALL)),
    "no body": answers.swap_body(b""),
    "flipped, in chunks": compose(answers.flip_bit(50), answers.chunked()),
    "dropped, to the close": compose(answers.drop_last(1), answers.close_delimited()),
    "added, in chunks": compose(answers.extra_bytes(b"x"), answers.chunked()),
}
wrong_bodies = pytest.mark.parametrize("damage", WRONG_BODY.values(), ids=WRONG_BODY.keys())


# --- T27: a wrong body for a digest ---


@wrong_bodies
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
async def test_a_blob_with_a_wrong_body_never_ends_cleanly(
    cache: RunningCache, registry: ScriptedRegistry, damage: Step, size: int
) -> None:
    """T27, blobs: right headers, right ``Docker-Content-Digest``, wrong bytes."""
    data = blob_of("T27", size)
    path = blob_path(registry.add_blob(REPO, data))
    lie = registry.script("GET", path, damage, forever=True)
    answer = await cache.get(path)
    assert not vouched_wrongly(answer, data)
    assert not answer.clean_end or answer.status == 502
    if size == SMALL:
        assert error_of(answer)[:2] == (502, "UNKNOWN"), "small content has a status of its own"
    await cache.settled()
    assert cache.files("blobs") == []
    assert cache.metric("mismatches_total", upstream="registry.test") == 1
    lie.cancel()
    await pulls_well(cache, path, data)


async def test_two_valid_blobs_that_are_swapped_are_both_refused(cache: RunningCache, registry: ScriptedRegistry) -> None:
    """T27, swap: each answer is a blob of the same registry, only not the one that was asked for."""
    contents = [blob_of(f"swap {i}", LARGE) for i in range(2)]
    paths = [blob_path(registry.add_blob(REPO, data)) for data in contents]
    for path, other in zip(paths, reversed(contents), strict=True):
        registry.script("GET", path, answers.swap_body(other))
    for path, data in zip(paths, contents, strict=True):
        answer = await cache.get(path)
        assert not vouched_wrongly(answer, data)
        assert not answer.clean_end
    assert cache.files("blobs") == []
    for path, data in zip(paths, contents, strict=True):
        await pulls_well(cache, path, data)


async def test_a_client_that_comes_back_for_the_rest_of_a_wrong_blob_is_sent_elsewhere(
    cache: RunningCache, registry: ScriptedRegistry
) -> None:
    """T27; else a runtime would splice a good end to the wrong beginning that it has."""
    data = blob_of("splice", LARGE)
    path = blob_path(registry.add_blob(REPO, data))
    registry.script("GET", path, answers.flip_bit(5))
    first = await cache.get(path)
    assert 0 < len(first.body) < len(data)
    assert not first.clean_end
    rest = await cache.get(path, [("Range", f"bytes={len(first.body)}-")])
    assert error_of(rest)[:2] == (502, "UNKNOWN")
    await pulls_well(cache, path, data)


@pytest.mark.parametrize("asked", ["bytes={last}-", "bytes=-1", "bytes=0-{last}", "bytes=1-", "bytes={last}-{last}"])
async def test_every_range_with_the_last_byte_is_vouched_for(
    cache: RunningCache, registry: ScriptedRegistry, asked: str
) -> None:
    """T27: what is promised of ranges (docs/threats.md)."""
    data = blob_of("range", LARGE)
    path = blob_path(registry.add_blob(REPO, data))
    registry.script("GET", path, answers.flip_bit(-1))
    answer = await cache.get(path, [("Range", asked.format(last=LARGE - 1))])
    assert (answer.status, answer.clean_end) == (206, False)
    await cache.settled()
    again = await cache.get(path)
    assert (again.body, again.clean_end) == (data, True)


@wrong_bodies
async def test_a_manifest_by_digest_with_a_wrong_body_is_refused(
    cache: RunningCache, registry: ScriptedRegistry, damage: Step
) -> None:
    """T27, manifests by digest: nothing of it goes out, whatever the headers say."""
    image = registry.add_image(REPO, "1", [b"layer"])
    lie = registry.script("GET", manifest_path(image.digest), damage, forever=True)
    assert error_of(await cache.get(manifest_path(image.digest)))[:2] == (502, "UNKNOWN")
    assert cache.files("blobs") == []
    lie.cancel()
    await pulls_well(cache, manifest_path(image.digest), image.data)


async def test_another_valid_manifest_than_the_digest_names_is_refused(
    cache: RunningCache, registry: ScriptedRegistry
) -> None:
    """T27: right ``Docker-Content-Digest``, right type, a manifest that is in itself valid."""
    asked, other = (registry.add_image(REPO, tag, [tag.encode()]) for tag in ("1", "2"))
    registry.script("GET", manifest_path(asked.digest), answers.swap_body(other.data))
    assert error_of(await cache.get(manifest_path(asked.digest)))[:2] == (502, "UNKNOWN")
    assert cache.files("blobs") == []
    await pulls_well(cache, manifest_path(asked.digest), asked.data)


@wrong_bodies
async def test_a_manifest_by_tag_is_served_under_the_digest_of_its_bytes_or_refused(
    cache: RunningCache, registry: ScriptedRegistry, damage: Step
) -> None:
    """T27, manifests by tag: the digest that a client is told is that of the bytes it gets."""
    image = registry.add_image(REPO, "1", [b"layer"])
    registry.script("GET", manifest_path("1"), damage)
    answer = await cache.get(manifest_path("1"))
    if answer.status == 200:
        assert answer.headers.get("Docker-Content-Digest") == digest_of(answer.body)
    else:
        assert error_of(answer)[:2] == (502, "UNKNOWN")
    assert wrong_files(cache) == []
    await pulls_well(cache, manifest_path("1"), image.data)


async def test_a_manifest_by_tag_is_never_taken_from_an_answer_that_was_cut(
    cache: RunningCache, registry: ScriptedRegistry
) -> None:
    """T27, F30: a manifest shorter than its Content-Length is refused even where what came is valid."""
    image = registry.add_image(REPO, "1", [b"layer"])
    registry.script("GET", manifest_path("1"), answers.claim_length(len(image.data) + 1))
    assert error_of(await cache.get(manifest_path("1")))[0] in (502, 503)
    assert cache.files("blobs") == []
    await pulls_well(cache, manifest_path("1"), image.data)


# --- T28: the digest in a header ---


@pytest.mark.parametrize("lie", ["sha256:" + "0" * 64, "sha512:" + "0" * 128, "nonsense", "", "sha256:../../x"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("by_tag", [True, False], ids=["tag", "digest"])
async def test_a_lying_digest_header_never_reaches_a_client(
    cache: RunningCache, registry: ScriptedRegistry, lie: str, method: str, by_tag: bool
) -> None:
    """T28: on GET our own value or an error; on HEAD nothing can be computed, but a known digest is never contradicted."""
    image = registry.add_image(REPO, "1", [b"layer"])
    path = manifest_path("1" if by_tag else image.digest)
    registry.script("*", path, answers.with_headers({"Docker-Content-Digest": lie}))
    answer = await (cache.get(path) if method == "GET" else cache.head(path))
    told = answer.headers.get("Docker-Content-Digest")
    believable = method == "HEAD" and by_tag and lie.endswith("00")
    if answer.status == 200:
        assert told == (lie if believable else image.digest)
        assert answer.body in (b"", image.data)
    else:
        assert answer.status == 502
    await pulls_well(cache, path, image.data)
    assert (await cache.head(path)).headers.get("Docker-Content-Digest") == image.digest


async def test_a_lying_digest_header_on_head_does_not_cost_a_held_tag(
    cache: RunningCache, registry: ScriptedRegistry
) -> None:
    """T28: what a HEAD claims is a question to ask, not a fact: the manifest that is held stays there for an outage."""
    image = registry.add_image(REPO, "1", [b"layer"])
    await pulls_well(cache, manifest_path("1"), image.data)
    registry.script("HEAD", manifest_path("1"), answers.with_headers({"Docker-Content-Digest": "sha256:" + "0" * 64}))
    await cache.head(manifest_path("1"))
    await registry.stop()
    answer = await cache.get(manifest_path("1"))
    assert (answer.status, answer.body) == (200, image.data)
    assert answer.headers.get("Warning") is not None


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_lying_digest_header_on_a_blob_changes_nothing(
    cache: RunningCache, registry: ScriptedRegistry, method: str
) -> None:
    """T28, blobs."""
    data = blob_of("T28", SMALL)
    digest = registry.add_blob(REPO, data)
    registry.script("*", blob_path(digest), answers.with_headers({"Docker-Content-Digest": "sha256:" + "0" * 64}))
    answer = await (cache.get(blob_path(digest)) if method == "GET" else cache.head(blob_path(digest)))
    assert answer.status == 502 or answer.headers.get("Docker-Content-Digest") == digest
    await pulls_well(cache, blob_path(digest), data)


# --- T30: one meaning for each digest ---


def document(**changes: Any) -> dict[str, Any]:
    """A valid manifest, changed; None drops a key."""
    blank = digest_of(b"{}")
    whole: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": blank, "size": 2},
        "layers": [],
        **changes,
    }
    return {key: value for key, value in whole.items() if value is not None}


AMBIGUOUS = {
    "index and image": (json.dumps(document(manifests=[])), OCI_MANIFEST),
    "index with layers": (json.dumps(document(mediaType=OCI_INDEX, manifests=[], config=None)), OCI_INDEX),
    "schema 1 and index": (
        json.dumps(document(mediaType=None, manifests=[], config=None, layers=None, fsLayers=[])),
        OCI_INDEX,
    ),
    "a key twice": ('{"config":{"digest":"sha256:' + "1" * 64 + '","size":1},' + json.dumps(document())[1:], OCI_MANIFEST),
    "a key twice, inside": (json.dumps(document()).replace('"size": 2', '"size": 2, "size": 3'), OCI_MANIFEST),
    "two types": (json.dumps(document()), DOCKER_MANIFEST),
    "image called index": (json.dumps(document(mediaType=None)), OCI_INDEX),
    "type that is none": (json.dumps(document(mediaType=["x"])), OCI_MANIFEST),
    "schema 1": (json.dumps({"schemaVersion": 1, "fsLayers": []}), "application/vnd.docker.distribution.manifest.v1+json"),
    "negative size": (json.dumps(document()).replace('"size": 2', '"size": -2'), OCI_MANIFEST),
    "bad digest": (json.dumps(document()).replace("sha256:", "sha256:../../"), OCI_MANIFEST),
    "not an object": ("[]", OCI_MANIFEST),
}


@pytest.mark.parametrize(("text", "content_type"), AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
@pytest.mark.parametrize("by_tag", [True, False], ids=["tag", "digest"])
async def test_a_manifest_that_could_be_read_in_two_ways_is_refused(
    cache: RunningCache, registry: ScriptedRegistry, text: str, content_type: str, by_tag: bool
) -> None:
    """T30: hybrid documents, duplicate keys, a type that contradicts the body."""
    digest = registry.add_manifest(REPO, text.encode(), content_type, "1")
    answer = await cache.get(manifest_path("1" if by_tag else digest))
    status, code, message = error_of(answer)
    assert (status, code) == (502, "UNKNOWN")
    assert "registry.test" in message
    assert cache.files("blobs") == []


@pytest.mark.parametrize(
    "sent", ["application/json", "text/plain", "application/json; charset=utf-8", "application/octet-stream", None]
)
@pytest.mark.parametrize("inner", [OCI_MANIFEST, DOCKER_MANIFEST, None])
async def test_a_generic_type_gives_way_to_that_of_the_body(
    cache: RunningCache, registry: ScriptedRegistry, sent: str | None, inner: str | None
) -> None:
    """T30; without any type the body's form decides."""
    data = json.dumps(document(mediaType=inner)).encode()
    digest = registry.add_manifest(REPO, data, sent or OCI_MANIFEST, "1")
    if sent is None:
        registry.script("*", manifest_path(digest), answers.without_headers("Content-Type"), forever=True)
    answer = await cache.get(manifest_path(digest))
    assert (answer.status, answer.body) == (200, data)
    assert answer.headers.getall("Content-Type") == [inner or OCI_MANIFEST]


@pytest.mark.parametrize("second", ["tag", "digest"])
async def test_a_digest_keeps_the_type_it_was_first_stored_with(
    cache: RunningCache, registry: ScriptedRegistry, second: str
) -> None:
    """T30: the same bytes again under another type: stable type or error."""
    data = json.dumps(document(mediaType=None)).encode()
    digest = registry.add_manifest(REPO, data, OCI_MANIFEST)
    await pulls_well(cache, manifest_path(digest), data)
    registry.add_manifest(REPO, data, DOCKER_MANIFEST, "other")
    answer = await cache.get(manifest_path("other" if second == "tag" else digest))
    if answer.status == 200:
        assert answer.headers.get("Content-Type") == OCI_MANIFEST
    else:
        assert error_of(answer)[:2] == (502, "UNKNOWN")
    assert (await cache.get(manifest_path(digest))).headers.get("Content-Type") == OCI_MANIFEST


# --- T31: lies about sizes ---


@pytest.mark.parametrize("claimed", [1, LARGE // 2, LARGE - 1, LARGE + 1, LARGE * 2])
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
async def test_a_blob_of_another_size_than_its_descriptor_says_is_refused(
    cache: RunningCache, registry: ScriptedRegistry, claimed: int, framing: str
) -> None:
    """T31: the manifest names the right digest and a wrong size; what came is cut off at the declared size."""
    data = blob_of("T31", LARGE)
    digest = registry.add_blob(REPO, data)
    manifest = document(layers=[{"mediaType": "application/octet-stream", "digest": digest, "size": claimed}])
    registry.add_manifest(REPO, json.dumps(manifest).encode(), OCI_MANIFEST, "1")
    frame = {"chunked": answers.chunked(), "close": answers.close_delimited()}.get(framing, answers.with_headers({}))
    registry.script("GET", blob_path(digest), frame, forever=True)
    assert (await cache.get(manifest_path("1"))).status == 200
    answer = await cache.get(blob_path(digest))
    assert not vouched_wrongly(answer, data)
    assert not (answer.clean_end and answer.status == 200)
    assert len(answer.body) <= max(claimed, 1024), "no more than the declared size goes out"
    await cache.settled()
    assert cache.held(digest) is None


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("delta", [-1000, -1, 1, 1000])
async def test_a_content_length_that_lies_is_seen(
    cache: RunningCache, registry: ScriptedRegistry, size: int, delta: int
) -> None:
    """T31: Content-Length smaller or larger than the body."""
    data = blob_of("length", size)
    path = blob_path(registry.add_blob(REPO, data))
    registry.script("GET", path, answers.claim_length(size + delta))
    answer = await cache.get(path)
    assert not vouched_wrongly(answer, data)
    await cache.settled()
    assert wrong_files(cache) == []
    await pulls_well(cache, path, data)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "while the connection is idle"])
async def test_what_follows_a_body_is_not_taken_for_the_next_answer(
    cache: RunningCache, registry: ScriptedRegistry, late: bool
) -> None:
    """T31: response splitting; the surplus of one answer looks like the answer to the request after it."""
    image = registry.add_image(REPO, "1", [b"layer"])
    evil = json.dumps(document(annotations={"evil": "yes"})).encode()
    smuggled = f"HTTP/1.1 200 OK\r\nContent-Type: {OCI_MANIFEST}\r\nContent-Length: {len(evil)}\r\n\r\n".encode() + evil
    data = blob_of("split", SMALL)
    path = blob_path(registry.add_blob(REPO, data))
    go_on = asyncio.Event()
    steps = [answers.extra_bytes(smuggled), answers.claim_length(SMALL)]
    registry.script("GET", path, compose(*steps, *([answers.gate(go_on, after=SMALL)] if late else [])))
    assert not vouched_wrongly(await cache.get(path), data)
    go_on.set()
    await registry.wait_for(lambda: registry.bytes_sent(path) == SMALL + len(smuggled) or registry.open_connections == 0)
    await pulls_well(cache, manifest_path("1"), image.data)
