"""Globs that no image can match are told, with one that can; of what may match nothing is said."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.globs import pointless
from proxy.names import digest_of
from proxy.rules import compile_glob

REGISTRIES = ["docker.io", "ghcr.io", "corp.test:5000"]
DIGEST = str(digest_of(b""))


@pytest.mark.parametrize(
    ("glob", "better"),
    [
        ("ghcr.io/corp/app", "ghcr.io/corp/app:*"),
        ("corp.test:5000/app", "corp.test:5000/app:*"),
        ("ghcr.io", "ghcr.io/*"),
        ("*/app", "*/app:*"),
        ("ghcr.io/*/app", "ghcr.io/*/app:*"),
        ("docker.io/nginx", "docker.io/library/nginx:*"),
        ("docker.io/nginx:1.27", "docker.io/library/nginx:1.27"),
        ("docker.io/nginx:*", "docker.io/library/nginx:*"),
        ("nginx:1.27", "docker.io/base/*"),
        ("quay.io/*", "docker.io/base/*"),
        ("corp.test/*", "docker.io/base/*"),
        ("ghcr.io/Corp/*", "docker.io/base/*"),
        ("ghcr.io/corp/app:1 ", "docker.io/base/*"),
        ("ghcr.io/corp/app@1.27", "docker.io/base/*"),
        ("*@sha256:abc", "docker.io/base/*"),
        ("*:latest@*", "docker.io/base/*"),
        ("ghcr.io/a:-*", "docker.io/base/*"),
        ("[!a-z]*:latest", "docker.io/base/*"),
        ("index.docker.io/library/*", "docker.io/base/*"),
    ],
)
def test_what_matches_no_image_is_told_with_what_does(glob: str, better: str) -> None:
    told = pointless(glob, REGISTRIES, is_tagged=True)
    assert told == (
        f"'{glob}' matches nothing of docker.io, ghcr.io, corp.test:5000; it is about registry/repository:tag: write for "
        f"example {better}"
    )


@pytest.mark.parametrize(
    "glob",
    [
        "*",
        "**",
        "*/*",
        "*:latest",
        "*@*",
        "ghcr.io/*",
        "ghcr.io/corp*",
        "ghcr.io/corp/app?1",
        "ghcr.io/corp/app[:@]*",
        "g[a-h]cr.io/*",
        "*.io/*",
        "docker.io/nginx*",
        "docker.io/*:1",
        "docker.io/nginx/a:1",
        "corp.test:5000/app:1.27",
        "corp.test*/app:1.27",
        "*:[A-Z]*",
        f"ghcr.io/corp/app@{DIGEST}",
        "*@sha512:*",
        "?" * 200,
    ],
)
def test_of_what_may_match_nothing_is_said(glob: str) -> None:
    assert pointless(glob, REGISTRIES, is_tagged=True) == ""


@pytest.mark.parametrize(
    ("glob", "is_pointless"),
    [("ghcr.io/corp", False), ("ghcr.io/corp:1", True), ("docker.io/nginx", True), ("docker.io/library/nginx", False)],
)
def test_without_a_tag_it_is_about_repositories(glob: str, is_pointless: bool) -> None:
    assert bool(pointless(glob, REGISTRIES)) is is_pointless


IMAGES = [
    "docker.io/library/nginx:1.27",
    "docker.io/grafana/grafana:Main_2",
    "ghcr.io/corp/a-b/c__d:latest",
    "corp.test:5000/app:v1.2-rc.1",
    f"corp.test:5000/team/app@{DIGEST}",
]


@given(st.sampled_from(IMAGES), st.data())
def test_a_glob_that_matches_an_image_is_never_told(image: str, data: st.DataObject) -> None:
    """Made of an image by putting wildcards in the place of parts of it."""
    glob = "".join(
        data.draw(st.sampled_from((char, char, "?", "*", f"[{char}]", "[!\u00e9]", "**", f"*{char}"))) for char in image
    )
    assert compile_glob(glob).match(image)
    assert pointless(glob, REGISTRIES, is_tagged=True) == ""


@given(st.text(alphabet="abcghilorkdceit./:@*?_-[]!", max_size=12).filter(lambda glob: glob != ""))
def test_what_it_proposes_is_never_told_itself(glob: str) -> None:
    for is_tagged in (False, True):
        if told := pointless(glob, REGISTRIES, is_tagged=is_tagged):
            better = re.sub(r"(?s).*write for example ", "", told)
            assert pointless(better, REGISTRIES, is_tagged=is_tagged) == ""
