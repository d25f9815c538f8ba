"""Names: the grammars of image names, and that no hostile text passes them or holds the interpreter."""

from __future__ import annotations

import contextlib
import hashlib
import string
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import DigestInvalid, ManifestUnknown, NameInvalid, RegistryError
from proxy.names import (
    Digest,
    Tag,
    canonical_host,
    digest_of,
    is_host,
    is_host_like,
    parse_digest,
    parse_image_name,
    parse_reference,
    parse_repository,
    parse_tag,
)

SHA256 = "sha256:" + "a" * 64
SHA512 = "sha512:" + "0123456789abcdef" * 8

COMPONENT = st.from_regex(r"[a-z0-9]{1,6}((\.|_|__|-{1,3})[a-z0-9]{1,4}){0,2}", fullmatch=True)
REPOSITORY = st.lists(COMPONENT, min_size=1, max_size=4).map("/".join)
TAG = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", fullmatch=True)
HEX = "0123456789abcdef"
DIGEST = st.one_of(
    st.text(HEX, min_size=64, max_size=64).map(lambda digits: f"sha256:{digits}"),
    st.text(HEX, min_size=128, max_size=128).map(lambda digits: f"sha512:{digits}"),
)
HOST = st.sampled_from(
    [
        "docker.io",
        "index.docker.io",
        "registry-1.docker.io",
        "ghcr.io",
        "localhost",
        "localhost:5000",
        "a.b:1",
        "[::1]:5000",
        "Host",
    ]
)
NEARLY = st.lists(
    st.sampled_from([*"ab0/.:@_-%\\~ \n\0A", "..", "/..", "sha256:", "localhost", "a" * 64, "\u0663", "\uff21", "\u00e9"]),
    max_size=40,
).map("".join)
PARSERS: list[Callable[[str], object]] = [parse_repository, parse_tag, parse_digest, parse_reference, parse_image_name]


@pytest.mark.parametrize(
    ("text", "full"),
    [
        pytest.param("a" * 63, f"docker.io/library/{'a' * 63}:latest", id="N1-63-digits-are-a-name"),
        pytest.param("g" * 64, f"docker.io/library/{'g' * 64}:latest", id="N1-64-other-letters-are-a-name"),
        pytest.param("x/" + "a" * 64, f"docker.io/x/{'a' * 64}:latest", id="N1-only-alone"),
        pytest.param("localhost/app", "localhost/app:latest", id="N2-localhost"),
        pytest.param("index.docker.io/a/b", "docker.io/a/b:latest", id="N2-index.docker.io"),
        pytest.param("corp.test/app", "corp.test/app:latest", id="N2-dot"),
        pytest.param("corp:5000/app", "corp:5000/app:latest", id="N2-colon"),
        pytest.param("Corp/app", "Corp/app:latest", id="N2-upper-case"),
        pytest.param("corp/app", "docker.io/corp/app:latest", id="N2-none-of-these"),
        pytest.param("localhost", "docker.io/library/localhost:latest", id="N3-localhost"),
        pytest.param("localhost:5000", "docker.io/library/localhost:5000", id="N3-the-port-is-a-tag"),
        pytest.param("example.com", "docker.io/library/example.com:latest", id="N3-example.com"),
        pytest.param("index.docker.io/busybox", "docker.io/library/busybox:latest", id="N4-N5"),
        pytest.param("registry-1.docker.io/busybox", "docker.io/library/busybox:latest", id="N4-alias-of-ours"),
        pytest.param("docker.io/busybox", "docker.io/library/busybox:latest", id="N5-docker.io"),
        pytest.param("busybox", "docker.io/library/busybox:latest", id="N5-nothing"),
        pytest.param("ghcr.io/busybox", "ghcr.io/busybox:latest", id="N5-nobody-else"),
        pytest.param("a/b.c_d__e---f/g:1", "docker.io/a/b.c_d__e---f/g:1", id="N6-separators"),
        pytest.param("ghcr.io/" + "a" * 255, f"ghcr.io/{'a' * 255}:latest", id="N7-255-in-the-path"),
        pytest.param("[2001:db8::1]:5000/a", "[2001:db8::1]:5000/a:latest", id="N8-ipv6"),
        pytest.param("10.0.0.1:5000/a", "10.0.0.1:5000/a:latest", id="N8-ipv4"),
        pytest.param("a:_1.2-X", "docker.io/library/a:_1.2-X", id="N9-tag"),
        pytest.param(f"a:{'t' * 128}", f"docker.io/library/a:{'t' * 128}", id="N9-128"),
        pytest.param(f"a@{SHA256}", f"docker.io/library/a@{SHA256}", id="N10-sha256"),
        pytest.param(f"a@{SHA512}", f"docker.io/library/a@{SHA512}", id="N10-sha512"),
        pytest.param("a/b", "docker.io/a/b:latest", id="N11-latest"),
        pytest.param(f"a:1@{SHA256}", f"docker.io/library/a:1@{SHA256}", id="N12-both"),
    ],
)
def test_an_image_name_means_what_the_reference_library_makes_of_it(text: str, full: str) -> None:
    assert str(parse_image_name(text)) == full


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("a" * 64, id="N1-image-id"),
        pytest.param("0123456789abcdef" * 4, id="N1-digits"),
        pytest.param("ghcr.io/" + "a" * 256, id="N7-path-of-256"),
        pytest.param("a" * 250, id="N7-library-counts"),
        pytest.param("-corp.test/a", id="N8-label-begins-with-hyphen"),
        pytest.param("corp..test/a", id="N8-empty-label"),
        pytest.param("corp.test:port/a", id="N8-port"),
        pytest.param("[fe80::1%eth0]/a", id="N8-zone"),
        pytest.param("a:", id="N9-empty-tag"),
        pytest.param("a:.1", id="N9-first-character"),
        pytest.param(f"a:{'t' * 129}", id="N9-129"),
        pytest.param("a:1:2", id="N9-two"),
        pytest.param("a@sha256:" + "a" * 63, id="N10-63"),
        pytest.param("a@", id="N10-empty"),
        pytest.param(f"a@{SHA256}@{SHA256}", id="N10-two"),
        "",
        "/",
        "/a",
        "a/",
        "a//b",
        "A",
        "docker.io/A",
        "ghcr.io/",
        "https://ghcr.io/a",
        " a",
        "a ",
        "a\n",
    ],
)
def test_what_is_not_an_image_name_is_refused(text: str) -> None:
    with pytest.raises(RegistryError):
        parse_image_name(text)


def test_a_runtime_asks_for_the_digest_where_a_tag_stands_beside_it() -> None:
    assert parse_image_name(f"a:1@{SHA256}").reference == Digest("sha256", "a" * 64)
    assert parse_image_name("a:1").reference == "1"
    assert parse_image_name("a").reference == "latest"
    assert parse_image_name(f"a@{SHA256}").tag is None


@pytest.mark.parametrize("text", ["a", "a.b", "a_b", "a__b", "a-b", "a-----b", "a/b/c", "0", "a" * 255])
def test_repositories(text: str) -> None:
    assert parse_repository(text) == text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "/",
            "a/",
            "/a",
            "a//b",
            ".",
            "..",
            "a/..",
            "a/../b",
            "a/./b",
            "a..b",
            "a___b",
            "a._b",
            ".a",
            "a.",
            "-a",
            "a-",
            "_a",
            "a_",
        ),
        *("A", "aB", "a%2fb", "a%2Fb", "a b", "a\0", "a\n", "\na", "a\tb", "a\\b", "a:b", "a@b", "a~b", "a+b"),
        *("\u0661", "a\u0661", "\uff41", "\u00df", "\u212a", "a" * 256, "a/" * 127 + "ab"),
    ],
)
def test_what_is_not_a_repository_is_refused(text: str) -> None:
    with pytest.raises(NameInvalid):
        parse_repository(text)


def test_an_upper_case_repository_is_told_why() -> None:
    with pytest.raises(NameInvalid, match="must be lowercase"):
        parse_repository("Team/App")


@pytest.mark.parametrize("text", ["latest", "1", "_", "A.b-C_d", "t" * 128])
def test_tags(text: str) -> None:
    assert parse_tag(text) == text
    assert parse_reference(text) == Tag(text)


@pytest.mark.parametrize(
    "text", ["", ".a", "-a", "..", "a/b", "a b", "a\n", "a\0", "a%41", "a+b", "t" * 129, "\u0661", "\u00e9"]
)
def test_an_illegal_tag_is_a_manifest_that_does_not_exist(text: str) -> None:
    with pytest.raises(ManifestUnknown):
        parse_tag(text)
    with pytest.raises(ManifestUnknown):
        parse_reference(text)


@pytest.mark.parametrize(("text", "algorithm"), [(SHA256, "sha256"), (SHA512, "sha512")])
def test_digests(text: str, algorithm: str) -> None:
    digest = parse_digest(text)
    assert digest.algorithm == algorithm
    assert str(digest) == text
    assert parse_reference(text) == digest


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "sha256", "sha256:", "sha256:../../x", "sha256:totallywrong", "sha256:" + "a" * 63, "sha256:" + "a" * 65),
        *("sha256:" + "A" * 64, "SHA256:" + "a" * 64, "sha512:" + "a" * 64, "sha256:" + "a" * 128, "md5:" + "a" * 32),
        *(
            "sha1:" + "a" * 40,
            "sha384:" + "a" * 96,
            "sha256+b64u:" + "a" * 64,
            "sha256:" + "a" * 64 + "\n",
            "sha256:" + "a" * 64 + "\0",
        ),
        *(
            " " + SHA256,
            SHA256 + " ",
            "sha256:" + "\u0661" * 64,
            "sha256:" + "\uff11" * 64,
            "sha256::" + "a" * 63,
            "blake3:" + "a" * 64,
        ),
    ],
)
def test_what_is_not_a_digest_is_refused(text: str) -> None:
    with pytest.raises(DigestInvalid):
        parse_digest(text)


@given(st.binary(max_size=200))
def test_a_digest_matches_its_own_content_and_no_other(content: bytes) -> None:
    for digest in (digest_of(content), Digest("sha512", hashlib.sha512(content).hexdigest())):
        assert digest.matches(content)
        assert not digest.matches(content + b"x")
        hasher = digest.hasher()
        hasher.update(content)
        assert hasher.hexdigest() == digest.hex


@pytest.mark.parametrize(
    ("component", "expected"),
    [
        ("localhost", True),
        ("a.b", True),
        ("a:1", True),
        ("A", True),
        ("a", False),
        ("localhosts", False),
        ("library", False),
        ("", False),
    ],
)
def test_what_is_host_like_is_a_registry(component: str, expected: bool) -> None:
    assert is_host_like(component) is expected


@pytest.mark.parametrize("text", ["a", "a.b", "A-1.b", "localhost:1", "10.0.0.1", "[::1]", "[::1]:65535", "a" * 63 + ".b"])
def test_hosts(text: str) -> None:
    assert is_host(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "a.",
        ".a",
        "a..b",
        "-a",
        "a-",
        "a_b",
        "a:",
        "a:b",
        "a:123456",
        ":1",
        "::1",
        "[::1",
        "[::1%lo]",
        "[]",
        "a/b",
        "u@a",
        "a\n",
        "a\0",
        "\u0661",
        "a:\u0661",
        "a" * 64,
    ],
)
def test_what_is_not_a_host(text: str) -> None:
    assert not is_host(text)


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("docker.io", "docker.io"),
        ("index.docker.io", "docker.io"),
        ("registry-1.docker.io", "docker.io"),
        ("hub.docker.io", "hub.docker.io"),
        ("a.b", "a.b"),
    ],
)
def test_only_docker_hubs_aliases_change_their_name(host: str, name: str) -> None:
    assert canonical_host(host) == name


@given(HOST, REPOSITORY, st.none() | TAG, st.none() | DIGEST)
def test_a_full_name_means_itself(host: str, repository: str, tag: str | None, digest: str | None) -> None:
    text = f"{host}/{repository}" + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")
    image = parse_image_name(text)
    assert parse_image_name(str(image)) == image
    assert image.repository.endswith(repository)
    assert image.tag == (tag or (None if digest else "latest"))


@given(st.text(max_size=80) | NEARLY)
def test_every_parser_gives_a_value_or_an_error_of_the_registry(text: str) -> None:
    for parse in PARSERS:
        try:
            value = parse(text)
        except RegistryError:
            continue
        if parse is not parse_image_name:
            assert str(value) == text


@given(
    NEARLY | st.text(max_size=40),
    st.sampled_from(["/..", "../", "%", "%2f", "A", "Z", "\0", "\n", "\r", " ", "\\", "\u0661", "\u0966", "\uff10"]),
    NEARLY,
)
def test_no_repository_holds_what_could_lead_elsewhere(before: str, evil: str, after: str) -> None:
    with pytest.raises(NameInvalid):
        parse_repository(before + evil + after)


@given(REPOSITORY, st.sampled_from(["/..", "%", "A", "\0", "\n", "\u0661", "\\"]), st.integers(0, 100))
def test_no_repository_with_a_flaw_anywhere_is_accepted(repository: str, evil: str, at: int) -> None:
    at %= len(repository) + 1
    with pytest.raises(NameInvalid):
        parse_repository(repository[:at] + evil + repository[at:])


@given(TAG, st.sampled_from(["/", "..\u2024", "%", "\0", "\n", "\u0661", "\\", ":", "@"]), st.integers(0, 200))
def test_no_tag_with_a_flaw_anywhere_is_accepted(tag: str, evil: str, at: int) -> None:
    at %= len(tag) + 1
    with pytest.raises(RegistryError):
        parse_reference(tag[:at] + evil + tag[at:])


@given(DIGEST, st.sampled_from([*string.ascii_uppercase, "g", "/", ".", "%", "\0", "\n", "\u0661"]), st.integers(0, 200))
def test_no_digest_with_a_flaw_anywhere_is_accepted(digest: str, evil: str, at: int) -> None:
    at %= len(digest)
    for flawed in (digest[:at] + evil + digest[at:], digest[:at] + evil + digest[at + 1 :]):
        with pytest.raises(DigestInvalid):
            parse_digest(flawed)


@pytest.mark.parametrize("parse", [*PARSERS, is_host, is_host_like], ids=lambda parse: str(parse.__name__))
@pytest.mark.parametrize(
    "unit", ["a", "-", "a-", "a_", "a.", "a/", "/", ".", ":", "@", "a:", "[:", "A", "\0", "\u0661", "sha256:", "a--", "__"]
)
@pytest.mark.parametrize("end", ["", "!", "-", "]"])
def test_no_text_takes_long(parse: Callable[[str], object], unit: str, end: str) -> None:
    text = unit * (100_000 // len(unit)) + end
    began = time.perf_counter()
    with contextlib.suppress(RegistryError):
        parse(text)
    assert time.perf_counter() - began < 2
