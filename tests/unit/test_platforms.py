"""Platforms: how they are written, and what of an index is for one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import ManifestUnknown
from proxy.manifests import OCI_INDEX, OCI_MANIFEST, parse_manifest
from proxy.platforms import ALL, Platform, parse_platform, platform_of, select


def index(*platforms: Any) -> bytes:
    """An index with a manifest for each; its digest ends with its place."""
    listed = [
        {"mediaType": OCI_MANIFEST, "digest": f"sha256:{number:064x}", "size": 1}
        | ({} if platform is None else {"platform": platform})
        for number, platform in enumerate(platforms)
    ]
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": listed}).encode()


def of(text: str) -> dict[str, str]:
    """A platform as an index has it."""
    return dict(zip(("os", "architecture", "variant"), text.split("/"), strict=False))


def chosen(wanted: str, *platforms: Any) -> list[int]:
    """Which places."""
    body = index(*platforms)
    return [int(digest.hex, 16) for digest in select(parse_manifest(body, OCI_INDEX), body, parse_platform(wanted))]


@pytest.mark.parametrize(
    ("wanted", "listed", "place"),
    [
        ("linux/amd64", ["linux/arm64", "linux/amd64"], 1),
        ("linux/amd64", ["windows/amd64", "linux/amd64/v1"], 1),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v4", "linux/amd64/v2"], 2),
        ("linux/arm64", ["linux/arm64/v8"], 0),
        ("linux/arm64/v8", ["linux/arm64"], 0),
        ("linux/arm", ["linux/arm/v5", "linux/arm/v7", "linux/arm/v6"], 1),
        ("linux/arm/v6", ["linux/arm/v7", "linux/arm/v5", "linux/arm/v6"], 2),
        ("linux/s390x", ["linux/s390x"], 0),
        ("linux/amd64", ["linux/amd64", "linux/amd64"], 0),
    ],
)
def test_the_manifest_of_a_platform(wanted: str, listed: list[str], place: int) -> None:
    """The best variant that runs there; of equals the first."""
    assert chosen(wanted, None, *map(of, listed)) == [place + 1]


@pytest.mark.parametrize("wanted", ["linux/amd64", "linux/arm/v6", "linux/arm64", "linux/odd/v9"])
def test_where_none_is_for_a_platform_those_that_are_there_are_named(wanted: str) -> None:
    with pytest.raises(ManifestUnknown, match="the platforms in it: linux/arm/v7, unknown/unknown, linux/odd/x"):
        chosen(wanted, of("linux/arm/v7"), of("unknown/unknown"), of("linux/odd/x"), None)


def test_all_of_them() -> None:
    """What has no platform too: signatures and attestations."""
    assert chosen("all", of("linux/arm/v7"), None, of("unknown/unknown")) == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "platform"),
    [
        ("linux/amd64", Platform("linux", "amd64")),
        ("Linux/x86_64", Platform("linux", "amd64")),
        ("linux/arm/v7", Platform("linux", "arm", "v7")),
        ("all", ALL),
    ],
)
def test_how_a_platform_is_written(text: str, platform: Platform) -> None:
    assert parse_platform(text) == platform


@pytest.mark.parametrize("text", ["", "linux", "amd64", "linux/", "a/b/c/d", "linux/amd 64", "linux/amd64\n", "/amd64"])
def test_what_is_no_platform(text: str) -> None:
    with pytest.raises(ValueError, match="write for example linux/amd64"):
        parse_platform(text)


@pytest.mark.parametrize(
    ("machine", "platform"),
    [("x86_64", "linux/amd64"), ("aarch64", "linux/arm64"), ("armv7l", "linux/arm/v7"), ("s390x", "linux/s390x")],
)
def test_the_platform_of_a_machine(machine: str, platform: str) -> None:
    assert str(platform_of(machine)) == platform


ODD = st.none() | st.integers() | st.text(max_size=4) | st.lists(st.integers(), max_size=1)


@given(st.lists(ODD | st.dictionaries(st.sampled_from(["os", "architecture", "variant"]), ODD), max_size=4))
def test_whatever_an_index_says_of_platforms(platforms: list[Any]) -> None:
    try:
        places = chosen("linux/amd64", *platforms)
    except ManifestUnknown:
        places = [0]
    assert len(places) == 1
