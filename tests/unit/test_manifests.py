"""Manifests: what is read of them, and that nothing which could be read in two ways is accepted."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.manifests import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MAX_BYTES,
    MODERN,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    ManifestInvalid,
    is_same_for,
    parse_manifest,
)
from proxy.names import Digest

EMPTY: list[object] = [[], None, "x", 1, True, 0.5]
A, B, C = (Digest("sha256", letter * 64) for letter in "abc")


def descriptor(digest: object = A, size: object = 1, **more: object) -> dict[str, object]:
    return {"mediaType": "application/octet-stream", "digest": str(digest), "size": size, **more}


def image(**changes: object) -> dict[str, Any]:
    return {"schemaVersion": 2, "config": descriptor(A, 1), "layers": [descriptor(B, 2), descriptor(C, 3)], **changes}


def index(**changes: object) -> dict[str, Any]:
    return {"schemaVersion": 2, "manifests": [descriptor(A, 1), descriptor(B, 2)], **changes}


def encode(document: object) -> bytes:
    return json.dumps(document).encode()


@pytest.mark.parametrize("media_type", [OCI_MANIFEST, DOCKER_MANIFEST])
def test_an_image_names_its_config_and_layers_in_order(media_type: str) -> None:
    manifest = parse_manifest(encode(image(mediaType=media_type)), media_type)
    assert manifest.media_type == media_type
    assert manifest.children == (Descriptor(A, 1), Descriptor(B, 2), Descriptor(C, 3))


@pytest.mark.parametrize("media_type", [OCI_INDEX, DOCKER_LIST])
def test_an_index_names_its_manifests(media_type: str) -> None:
    manifest = parse_manifest(encode(index(mediaType=media_type)), media_type)
    assert manifest.media_type == media_type
    assert manifest.children == (Descriptor(A, 1), Descriptor(B, 2))


def test_an_image_may_be_without_layers_and_an_index_without_manifests() -> None:
    artifact = {"schemaVersion": 2, "config": descriptor()}
    assert parse_manifest(encode(artifact), OCI_MANIFEST).children == (Descriptor(A, 1),)
    assert parse_manifest(encode(index(manifests=[])), OCI_INDEX).children == ()


def test_a_subject_is_no_child() -> None:
    assert len(parse_manifest(encode(image(subject=descriptor(Digest("sha256", "d" * 64)))), OCI_MANIFEST).children) == 3


def test_sha512_is_a_digest_too() -> None:
    long = Digest("sha512", "e" * 128)
    assert parse_manifest(encode(index(manifests=[descriptor(long, 9)])), OCI_INDEX).children == (Descriptor(long, 9),)


@pytest.mark.parametrize(
    "sent", ["", "application/json", "text/plain", "application/octet-stream", "TEXT/plain; charset=utf-8"]
)
@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (image(), OCI_MANIFEST),
        (index(), OCI_INDEX),
        (image(mediaType=DOCKER_MANIFEST), DOCKER_MANIFEST),
        (index(mediaType=DOCKER_LIST), DOCKER_LIST),
        (image(mediaType=""), OCI_MANIFEST),
    ],
)
def test_a_content_type_that_says_nothing_gives_way_to_the_body(document: dict[str, Any], sent: str, expected: str) -> None:
    assert parse_manifest(encode(document), sent).media_type == expected


@pytest.mark.parametrize(
    "sent", [DOCKER_MANIFEST, DOCKER_MANIFEST.upper(), f"{DOCKER_MANIFEST}; charset=utf-8", f" {DOCKER_MANIFEST} ;x=y"]
)
def test_the_content_type_holds_without_parameters(sent: str) -> None:
    assert parse_manifest(encode(image()), sent).media_type == DOCKER_MANIFEST
    assert parse_manifest(encode(image(mediaType=DOCKER_MANIFEST)), sent).media_type == DOCKER_MANIFEST


@pytest.mark.parametrize(
    ("document", "sent"),
    [
        pytest.param(index(layers=[]), OCI_INDEX, id="index-with-layers"),
        pytest.param(index(config=descriptor()), OCI_INDEX, id="index-with-config"),
        pytest.param(index(fsLayers=[]), OCI_INDEX, id="index-with-fsLayers"),
        pytest.param(image(manifests=[]), OCI_MANIFEST, id="image-with-manifests"),
        pytest.param(image(), OCI_INDEX, id="image-sent-as-index"),
        pytest.param(index(), OCI_MANIFEST, id="index-sent-as-image"),
        pytest.param(image(mediaType=OCI_INDEX), OCI_INDEX, id="image-that-calls-itself-index"),
        pytest.param(index(mediaType=DOCKER_MANIFEST), "", id="index-that-calls-itself-image"),
        pytest.param(image(mediaType=OCI_MANIFEST), DOCKER_MANIFEST, id="two-types"),
        pytest.param(image(mediaType="application/vnd.example"), "", id="foreign-inner-type"),
        pytest.param(image(), "application/vnd.example", id="foreign-sent-type"),
        pytest.param(image(), "text/html", id="html"),
        pytest.param(image(mediaType=7), OCI_MANIFEST, id="type-is-a-number"),
        pytest.param(image(mediaType="a\r\nb"), "", id="type-with-control-characters"),
        pytest.param(image(mediaType="a" * 300), "", id="type-too-long"),
        pytest.param({"schemaVersion": 2}, OCI_MANIFEST, id="neither"),
        pytest.param({"schemaVersion": 2, "layers": []}, OCI_MANIFEST, id="no-config"),
        pytest.param({"schemaVersion": 1, "fsLayers": []}, "", id="schema-1"),
        pytest.param(image(schemaVersion="2"), OCI_MANIFEST, id="schema-is-text"),
        pytest.param(image(schemaVersion=3), OCI_MANIFEST, id="schema-3"),
        pytest.param({"config": descriptor()}, OCI_MANIFEST, id="no-schema"),
        pytest.param(image(layers={}), OCI_MANIFEST, id="layers-is-an-object"),
        pytest.param(image(layers="ab"), OCI_MANIFEST, id="layers-is-text"),
        pytest.param(index(manifests={"a": descriptor()}), OCI_INDEX, id="manifests-is-an-object"),
        pytest.param(image(config=None), OCI_MANIFEST, id="config-null"),
        pytest.param(image(layers=[str(A)]), OCI_MANIFEST, id="descriptor-is-text"),
        pytest.param(image(layers=[{"size": 1}]), OCI_MANIFEST, id="no-digest"),
        pytest.param(image(layers=[{"digest": str(A)}]), OCI_MANIFEST, id="no-size"),
        pytest.param(image(layers=[descriptor("sha256:../../etc/passwd")]), OCI_MANIFEST, id="digest-is-a-path"),
        pytest.param(image(layers=[descriptor("sha256:" + "A" * 64)]), OCI_MANIFEST, id="digest-upper-case"),
        pytest.param(image(layers=[descriptor("md5:" + "a" * 32)]), OCI_MANIFEST, id="digest-md5"),
        pytest.param(image(layers=[descriptor(size=-1)]), OCI_MANIFEST, id="size-negative"),
        pytest.param(image(layers=[descriptor(size=2**63)]), OCI_MANIFEST, id="size-too-large"),
        pytest.param(image(layers=[descriptor(size=10**1000)]), OCI_MANIFEST, id="size-huge"),
        pytest.param(image(layers=[descriptor(size=1.5)]), OCI_MANIFEST, id="size-fraction"),
        pytest.param(image(layers=[descriptor(size="1")]), OCI_MANIFEST, id="size-text"),
        pytest.param(image(layers=[descriptor(size=True)]), OCI_MANIFEST, id="size-true"),
        pytest.param(image(layers=[descriptor(size=float("nan"))]), OCI_MANIFEST, id="size-nan"),
        *(pytest.param(document, OCI_MANIFEST, id=f"a-{type(document).__name__}") for document in EMPTY),
    ],
)
def test_what_cannot_be_trusted_is_refused(document: object, sent: str) -> None:
    with pytest.raises(ManifestInvalid):
        parse_manifest(encode(document), sent)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(b'{"schemaVersion": 2', b'{"schemaVersion": 2, "schemaVersion": 2', id="top"),
        pytest.param(b'"layers": [', b'"layers": [], "layers": [', id="layers"),
        pytest.param(b'"size": 3', b'"size": 3, "size": 3', id="in-a-descriptor"),
        pytest.param(b'"size": 3', b'"size": 3, "annotations": {"a": "1", "\\u0061": "2"}', id="by-an-escape"),
    ],
)
def test_a_key_that_stands_twice_is_refused(old: bytes, new: bytes) -> None:
    body = encode(image())
    assert old in body
    with pytest.raises(ManifestInvalid):
        parse_manifest(body.replace(old, new, 1), OCI_MANIFEST)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"<html>", b"\xff\xfe", b'{"a": }', b"\0" * 10, encode(image()) + b"{}", b'{"\xff": 1}']
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        parse_manifest(body, OCI_MANIFEST)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"[" * 200_000, id="brackets"),
        pytest.param(b"[" * 200_000 + b"]" * 200_000, id="closed-brackets"),
        pytest.param(b'{"a":' * 200_000 + b"1" + b"}" * 200_000, id="objects"),
        pytest.param(b'{"schemaVersion": 2, "config": ' + b"[" * 5000 + b"]" * 5000 + b"}", id="a-few-thousand"),
    ],
)
def test_a_document_of_any_depth_is_refused_without_harm(body: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        parse_manifest(body, OCI_MANIFEST)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"a":[' + b"1," * 1_000_000 + b"1]}", id="elements"),
        pytest.param(b"[" + b"{}," * 400_000 + b"{}]", id="objects"),
        pytest.param(b'{"a":"' + b"," * 1_000_000 + b'"}', id="commas"),
        pytest.param(b'{"schemaVersion": ' + b"9" * (MAX_BYTES - 100) + b"}", id="a-huge-number"),
        pytest.param(b'{"a":[' + b"9" * 4000 + b"," * 1 + (b"9" * 4000 + b",") * 1500 + b"1]}", id="many-large-numbers"),
        pytest.param(b'{"a":"' + b"\\u0041" * 1_000_000 + b'"}', id="escapes"),
        pytest.param(b" " * MAX_BYTES, id="white-space"),
    ],
)
def test_no_document_holds_the_interpreter_for_long(body: bytes) -> None:
    assert len(body) <= MAX_BYTES
    began = time.perf_counter()
    with pytest.raises(ManifestInvalid):
        parse_manifest(body, OCI_MANIFEST)
    assert time.perf_counter() - began < 5


def test_a_manifest_with_as_many_layers_as_anybody_has_is_read() -> None:
    layers = [descriptor(B, 2, annotations={"a": "b", "c": "d"}) for _ in range(4000)]
    assert len(parse_manifest(encode(image(layers=layers)), OCI_MANIFEST).children) == 4001


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(str(A)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["digest", "size", "mediaType", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(["schemaVersion", "mediaType", "config", "layers", "manifests", "fsLayers", "subject"])


@given(
    st.dictionaries(KEYS, JSON, max_size=5),
    st.sampled_from(["", OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, "a/b"]),
    st.booleans(),
)
def test_any_json_gives_a_manifest_or_the_one_error(document: dict[str, object], sent: str, valid_schema: bool) -> None:
    if valid_schema:
        document["schemaVersion"] = 2
    try:
        manifest = parse_manifest(encode(document), sent)
    except ManifestInvalid:
        return
    assert ("manifests" in document) == (manifest.media_type in (OCI_INDEX, DOCKER_LIST))


@given(st.binary(max_size=200))
def test_any_bytes_give_the_one_error(body: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        parse_manifest(body, OCI_MANIFEST)


# --- for whom else ---

DOCKER, OCI, IMAGES = f"{DOCKER_LIST},{DOCKER_MANIFEST}", f"{OCI_INDEX},{OCI_MANIFEST}", f"{OCI_MANIFEST},{DOCKER_MANIFEST}"


@pytest.mark.parametrize(
    ("media_type", "asked", "wanted", "is_same"),
    [
        (OCI_MANIFEST, "", OCI, True),
        (OCI_MANIFEST, "", OCI_MANIFEST, True),
        (OCI_MANIFEST, "", DOCKER, False),
        (OCI_INDEX, "", IMAGES, False),
        (DOCKER_MANIFEST, "", DOCKER_LIST, False),
        (DOCKER_LIST, "", DOCKER, True),
        (OCI_INDEX, OCI, "", True),
        (DOCKER_LIST, DOCKER_LIST, "", True),
        (OCI_MANIFEST, OCI, "", False),  # a Docker list was not asked for
        (OCI_MANIFEST, f"{OCI_INDEX},{DOCKER_LIST},{OCI_MANIFEST}", "", True),
        (DOCKER_MANIFEST, DOCKER_MANIFEST, "", False),
        (DOCKER_MANIFEST, DOCKER_MANIFEST, DOCKER, False),
        (DOCKER_MANIFEST, DOCKER_MANIFEST, IMAGES, True),
    ],
)
def test_what_one_is_given_another_would_be_if_he_takes_it_and_no_index_was_left_out(
    media_type: str, asked: str, wanted: str, is_same: bool
) -> None:
    assert is_same_for(media_type, asked, wanted) is is_same


@pytest.mark.parametrize("media_type", MODERN)
def test_who_asks_for_everything_asks_for_all(media_type: str) -> None:
    """His answer is everybody's who takes it."""
    for wanted in ("", media_type, OCI, DOCKER, IMAGES):
        assert is_same_for(media_type, "", wanted) is (not wanted or media_type in wanted.split(","))
