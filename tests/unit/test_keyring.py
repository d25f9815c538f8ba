"""Keys and images: matched and put in order as the kubelet does, its surprises included."""

from __future__ import annotations

import re
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.credentials.credential import Credential
from proxy.credentials.docker_config import Entry
from proxy.credentials.keyring import Keyring, matches

HUB = "docker.io/library/debian"


@pytest.mark.parametrize(
    ("key", "image", "expected"),
    [
        # from TestURLsMatch and TestDockerKeyringForGlob of kubernetes pkg/credentialprovider/keyring_test.go
        pytest.param("*.kubernetes.io", "prefix.kubernetes.io", True, id="star-for-the-first-label"),
        pytest.param("prefix.*.io", "prefix.kubernetes.io", True, id="star-for-a-middle-label"),
        pytest.param("prefix.kubernetes.*", "prefix.kubernetes.io", True, id="star-for-the-last-label"),
        pytest.param("*-good.kubernetes.io", "prefix-good.kubernetes.io", True, id="star-within-a-label"),
        pytest.param("*.kubernetes.io/blah", "prefix.kubernetes.io/blah", True, id="path"),
        pytest.param("prefix.*.io/foo", "prefix.kubernetes.io/foo/bar", True, id="path-that-goes-on"),
        pytest.param("*.kubernetes.io:1111/blah", "prefix.kubernetes.io:1111/blah", True, id="port-and-path"),
        pytest.param("*.kubernetes.io", "kubernetes.io", False, id="too-few-labels"),
        pytest.param("*.*.kubernetes.io", "prefix.kubernetes.io", False, id="too-few-labels-for-two-stars"),
        pytest.param("kubernetes.io", "kubernetes.com", False, id="another-label"),
        pytest.param("k*.io", "quay.io", False, id="another-beginning"),
        pytest.param("*.kubernetes.io:1234/blah", "prefix.kubernetes.io:1111/blah", False, id="another-port"),
        pytest.param("prefix.*.io/foo", "prefix.kubernetes.io:1111/foo/bar", False, id="port-only-in-the-image"),
        pytest.param("https://*.docker.io/v1/", "prefix.docker.io/path:1111/foo/bar", True, id="v1"),
        pytest.param("https://prefix.*.io/path:1111", "prefix.docker.io/path/subpath:1111/foo", False, id="colon-in-a-path"),
        # host
        pytest.param("registry.example.com", "registry.example.com/team/app", True, id="host"),
        pytest.param("example.com", "evil-example.com/app", False, id="not-a-suffix"),
        pytest.param("example.com", "example.com.evil/app", False, id="not-a-prefix"),
        pytest.param("*.com", "registry.example.com/app", False, id="a-star-does-not-cross-a-dot"),
        pytest.param("*", "registry.example.com/app", False, id="a-star-is-one-label"),
        pytest.param("*", "localhost/app", True, id="a-star-is-any-host-of-one-label"),
        pytest.param("*.example.com", ".example.com/app", True, id="a-star-is-also-nothing"),
        pytest.param("a*b*c.example.com", "a-b-b-c.example.com/app", True, id="several-stars"),
        pytest.param("a*b*c.example.com", "a-c-b.example.com/app", False, id="several-stars-out-of-order"),
        pytest.param("a**c.example.com", "abc.example.com/app", True, id="two-stars-are-one"),
        pytest.param("*a*a.example.com", "a.example.com/app", False, id="stars-do-not-share-a-letter"),
        pytest.param("Registry.example.com", "registry.example.com/app", False, id="case-counts"),
        pytest.param("registry.example.com.", "registry.example.com/app", False, id="a-dot-at-the-end-is-a-label"),
        pytest.param("127.0.0.1:5000", "127.0.0.1:5000/app", True, id="address"),
        pytest.param("[::1]:5000", "[::1]:5000/app", True, id="ipv6-with-port"),
        pytest.param("[::1]", "[::1]/app", False, id="ipv6-without-port-is-read-as-a-class"),
        # classes, as filepath.Match has them
        pytest.param("reg[12].example.com", "reg2.example.com/app", True, id="class"),
        pytest.param("reg[12].example.com", "reg3.example.com/app", False, id="not-in-the-class"),
        pytest.param("reg[1-35].example.com", "reg2.example.com/app", True, id="range"),
        pytest.param("reg[3-1].example.com", "reg2.example.com/app", False, id="range-backwards-is-empty"),
        pytest.param("reg[!1].example.com", "reg2.example.com/app", False, id="an-exclamation-mark-negates-nothing"),
        pytest.param("reg[!1].example.com", "reg1.example.com/app", True, id="an-exclamation-mark-is-itself"),
        pytest.param("reg[^1].example.com", "reg2.example.com/app", False, id="a-caret-negates-nothing"),
        pytest.param("reg[^1].example.com", "reg1.example.com/app", False, id="no-host-has-a-caret"),
        pytest.param("reg[a*].example.com", "regxx.example.com/app", False, id="no-star-in-a-class"),
        pytest.param("reg*[0-9].example.com", "reg-eu1.example.com/app", True, id="star-and-class"),
        pytest.param("reg[].example.com", "reg].example.com/app", False, id="empty-class"),
        pytest.param("reg[-1].example.com", "reg1.example.com/app", False, id="dash-first-is-no-class"),
        pytest.param("reg[1-].example.com", "reg1.example.com/app", False, id="dash-last-is-no-class"),
        pytest.param("reg[1.example.com", "reg1.example.com/app", False, id="class-not-closed"),
        pytest.param("reg[1.2].example.com", "reg1.example.com/app", False, id="labels-are-split-before-classes"),
        pytest.param("[ab].example.com", "a.example.com/app", False, id="brackets-in-front-are-for-ipv6"),
        pytest.param("reg[12].example.com:5000", "reg1.example.com:5000/app", False, id="no-port-after-a-class"),
        pytest.param("reg?.example.com", "reg1.example.com/app", False, id="a-question-mark-begins-a-query"),
        pytest.param("reg\\*.example.com", "reg*.example.com/app", False, id="no-host-has-a-backslash"),
        # port
        pytest.param("registry.example.com:443", "registry.example.com/app", False, id="443-is-not-none"),
        pytest.param("https://registry.example.com:443", "registry.example.com/app", False, id="443-is-not-that-of-https"),
        pytest.param("registry.example.com", "registry.example.com:443/app", False, id="none-is-not-443"),
        pytest.param("registry.example.com:0443", "registry.example.com:443/app", False, id="ports-are-texts"),
        pytest.param("registry.example.com:", "registry.example.com/app", True, id="an-empty-port-is-none"),
        pytest.param("registry.example.com:*", "registry.example.com:443/app", False, id="no-pattern-in-a-port"),
        # scheme, user, query
        pytest.param("https://registry.example.com", "registry.example.com/app", True, id="https"),
        pytest.param("http://registry.example.com", "registry.example.com/app", True, id="http"),
        pytest.param("HTTPS://registry.example.com", "registry.example.com/app", False, id="a-scheme-in-capitals-is-a-host"),
        pytest.param("https://http://registry.example.com", "registry.example.com/app", False, id="two-schemes"),
        pytest.param("oci://registry.example.com", "registry.example.com/app", False, id="another-scheme"),
        pytest.param("https://user@registry.example.com", "registry.example.com/app", True, id="a-user-does-not-count"),
        pytest.param("registry.example.com@evil.example", "registry.example.com/app", False, id="a-host-as-user"),
        pytest.param("registry.example.com@evil.example", "evil.example/app", True, id="the-host-is-behind-the-last-at"),
        pytest.param("a@b@evil.example", "evil.example/app", True, id="several-at"),
        pytest.param("registry.example.com?x=/team", "registry.example.com/app", True, id="a-query-does-not-count"),
        pytest.param("registry.example.com#/team", "registry.example.com/app", True, id="a-fragment-does-not-count"),
        # path
        pytest.param("registry.example.com/", "registry.example.com/app", True, id="a-slash-is-no-path"),
        pytest.param("registry.example.com/v1/", "registry.example.com/app", True, id="v1-is-no-path"),
        pytest.param("registry.example.com/v2/", "registry.example.com/app", True, id="v2-is-no-path"),
        pytest.param("registry.example.com/v2/team", "registry.example.com/team/app", True, id="path-behind-v2"),
        pytest.param("registry.example.com/v2/v2/team", "registry.example.com/v2/team/app", True, id="v2-goes-once"),
        pytest.param("registry.example.com/v3/", "registry.example.com/app", False, id="v3-is-a-path"),
        pytest.param("registry.example.com/v1", "registry.example.com/app", False, id="v1-without-slash-is-a-path"),
        pytest.param("registry.example.com/v1", "registry.example.com/v1beta/app", True, id="v1-without-slash-is-a-prefix"),
        pytest.param("registry.example.com/images", "registry.example.com/images/x", True, id="path-of-components"),
        pytest.param("registry.example.com/images", "registry.example.com/images-private/x", True, id="a-path-is-a-text"),
        pytest.param("registry.example.com/images/", "registry.example.com/images-private/x", False, id="path-with-slash"),
        pytest.param("registry.example.com/images/", "registry.example.com/images", False, id="longer-than-the-image"),
        pytest.param("registry.example.com/team", "registry.example.com/other/app", False, id="another-path"),
        pytest.param("registry.example.com/Team", "registry.example.com/team/app", False, id="case-counts-in-a-path"),
        pytest.param("registry.example.com/*/app", "registry.example.com/team/app", False, id="no-pattern-in-a-path"),
        pytest.param("registry.example.com//team", "registry.example.com/team", False, id="two-slashes"),
        pytest.param("registry.example.com/te%61m", "registry.example.com/team", True, id="an-encoded-letter-in-a-path"),
        # what cannot be read
        pytest.param("", "registry.example.com/app", False, id="empty"),
        pytest.param("https://", "registry.example.com/app", False, id="scheme-alone"),
        pytest.param("/app", "registry.example.com/app", False, id="path-alone"),
        pytest.param("registry example.com", "registry.example.com/app", False, id="space"),
        pytest.param("registry.example.com\n", "registry.example.com/app", False, id="newline"),
        pytest.param("registry.example.com/%zz", "registry.example.com/app", False, id="bad-escape"),
        pytest.param("reg%69stry.example.com", "registry.example.com/app", False, id="no-escape-in-a-host"),
        pytest.param("registry.example.com:port", "registry.example.com/app", False, id="no-port-of-letters"),
        pytest.param("a:b:5000", "a:b:5000/app", True, id="too-many-colons-are-a-host"),
        pytest.param("registry.example.com", "", False, id="no-image"),
        pytest.param("registry.example.com", "registry.example.com/a\0", False, id="image-that-cannot-be-read"),
        # Docker Hub by its names
        pytest.param("docker.io", HUB, True, id="docker.io"),
        pytest.param("https://docker.io/library", HUB, True, id="docker.io-with-path"),
        pytest.param("*.io", HUB, True, id="pattern-for-docker.io"),
        pytest.param("registry-1.docker.io", HUB, False, id="registry-1.docker.io"),
        pytest.param("*.docker.io", HUB, False, id="pattern-for-the-aliases"),
    ],
)
def test_a_key_matches_an_image(key: str, image: str, expected: bool) -> None:
    """kubernetes ``pkg/credentialprovider/keyring.go``: ``Add`` and ``URLsMatch``. A keyring says what ``matches`` says."""
    assert matches(key, image) is expected
    assert bool(Keyring([Entry(key)]).matching(image)) is expected


@pytest.mark.parametrize("key", ["index.docker.io", "https://index.docker.io/v1/"])
def test_the_fallback_of_docker_hub_is_no_match(key: str) -> None:
    assert not matches(key, HUB)
    assert matches(key, "index.docker.io/library/debian")


def keyring(*keys: str) -> Keyring:
    return Keyring(Entry(key, source=f"{number}") for number, key in enumerate(keys))


def found(ring: Keyring, image: str) -> list[str]:
    return [entry.registry for entry in ring.matching(image)]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        pytest.param(
            "quay.io/coreos/etcd",
            ["https://quay.io/v2/coreos/etcd", "quay.io/coreos", "quay.io", "q*.io", "*.io"],
            id="longer-path-first-and-letters-before-star",
        ),
        pytest.param("gcr.io/etcd", ["gcr.io", "*.io"], id="names-before-patterns"),
        pytest.param("gcr.io:5000/etcd", ["gcr.io:5000"], id="port"),
        pytest.param("ghcr.com/etcd", [], id="none"),
    ],
)
def test_keys_are_tried_in_reverse_lexical_order(image: str, expected: list[str]) -> None:
    """Whatever the order in which the secrets come."""
    keys = ["*.io", "gcr.io", "gcr.io:5000", "q*.io", "quay.io", "quay.io/coreos", "https://quay.io/v2/coreos/etcd"]
    assert found(keyring(*keys), image) == expected
    assert found(keyring(*reversed(keys)), image) == expected


@pytest.mark.parametrize(
    ("keys", "image", "expected"),
    [
        pytest.param(["a.io/b", "a.io/b-c"], "a.io/b-c/d", ["a.io/b-c", "a.io/b"], id="prefix-of-another"),
        pytest.param(["a[bc].io", "ab.io"], "ab.io/x", ["ab.io", "a[bc].io"], id="letters-before-brackets"),
        pytest.param(["a.io/B", "a.io/b", "*.io/b"], "a.io/b", ["a.io/b", "*.io/b"], id="only-those-that-match"),
        pytest.param(
            ["http://z.io", "a.io", "https://a.io"], "a.io/x", ["a.io", "https://a.io"], id="the-scheme-does-not-order"
        ),
        pytest.param(
            ["a-long.io", "a*.io", "*-long.io"], "a-long.io/x", ["a-long.io", "a*.io", "*-long.io"], id="early-star-last"
        ),
    ],
)
def test_order_is_that_of_reduced_keys(keys: list[str], image: str, expected: list[str]) -> None:
    assert found(keyring(*keys), image) == expected


def test_keys_that_reduce_to_one_keep_the_order_of_their_sources() -> None:
    """Several secrets for one registry: the pod's first one is tried first."""
    same = ["a.io", "https://a.io", "http://a.io/", "a.io/v1/", "https://a.io/v2/", "user@a.io"]
    for keys in list(permutations(same))[::37]:
        assert found(keyring(*keys), "a.io/app") == list(keys)


def test_equal_entries_are_each_tried() -> None:
    ring = Keyring([Entry("a.io", Credential("u", "old")), Entry("a.io", Credential("u", "new"))])
    assert [entry.credential for entry in ring.matching("a.io/x")] == [Credential("u", "old"), Credential("u", "new")]


@pytest.mark.parametrize(
    ("keys", "image", "expected"),
    [
        pytest.param(
            ["https://index.docker.io/v1/"], HUB, ["https://index.docker.io/v1/"], id="the-key-that-kubectl-writes"
        ),
        pytest.param(["index.docker.io"], HUB, ["index.docker.io"], id="host-alone"),
        pytest.param(["http://index.docker.io/v2/"], HUB, ["http://index.docker.io/v2/"], id="v2"),
        pytest.param(
            ["index.docker.io/", "https://index.docker.io/v1/"],
            HUB,
            ["index.docker.io/", "https://index.docker.io/v1/"],
            id="several-in-the-order-of-their-sources",
        ),
        pytest.param(["https://index.docker.io/v1"], HUB, [], id="v1-without-slash-is-a-path"),
        pytest.param(["index.docker.io/library"], HUB, [], id="with-a-path"),
        pytest.param(["index.docker.io:443"], HUB, [], id="with-a-port"),
        pytest.param(["index.*.io"], HUB, [], id="a-pattern-is-not-that-key"),
        pytest.param(["registry-1.docker.io"], HUB, [], id="registry-1-never"),
        pytest.param(["hub.docker.com", "auth.docker.io"], HUB, [], id="other-hosts-of-docker"),
        pytest.param(["docker.io", "https://index.docker.io/v1/"], HUB, ["docker.io"], id="docker.io-hides-it"),
        pytest.param(["*.io", "https://index.docker.io/v1/"], HUB, ["*.io"], id="a-pattern-hides-it"),
        pytest.param(["docker.io/team", "index.docker.io"], "docker.io/team/app", ["docker.io/team"], id="a-path-hides-it"),
        pytest.param(["docker.io/team", "index.docker.io"], HUB, ["index.docker.io"], id="another-path-does-not-hide-it"),
        pytest.param(["docker.io:443", "index.docker.io"], HUB, ["index.docker.io"], id="another-port-does-not-hide-it"),
        pytest.param(["index.docker.io"], "index.docker.io/library/debian", ["index.docker.io"], id="direct"),
        pytest.param(["docker.io"], "index.docker.io/library/debian", [], id="docker.io-is-not-for-the-alias"),
        pytest.param(["index.docker.io"], "quay.io/library/debian", [], id="not-for-others"),
        pytest.param(["index.docker.io"], "registry-1.docker.io/library/debian", [], id="not-for-registry-1"),
        pytest.param(["index.docker.io"], "docker.io.evil/library/debian", [], id="not-for-what-begins-like-it"),
        pytest.param(["index.docker.io"], "docker.io:443/library/debian", [], id="not-for-it-with-a-port"),
        pytest.param(["index.docker.io"], "localhost/library/debian", [], id="not-for-localhost"),
        pytest.param(["index.docker.io"], "localhost:5000/library/debian", [], id="not-for-localhost-with-a-port"),
    ],
)
def test_docker_hub_falls_back_to_index_docker_io(keys: list[str], image: str, expected: list[str]) -> None:
    """Only if no key matches.

    The kubelet does so for ``localhost/x`` as well (``isDefaultRegistryMatch``), which it takes for a short name. Names here
    are in full, and the password for Docker Hub is not for a registry on ``localhost``.
    """
    assert found(keyring(*keys), image) == expected


@pytest.mark.parametrize(
    ("globs", "image", "expected"),
    [
        pytest.param((), "a.io/team/app", True, id="none-is-all"),
        pytest.param(("a.io/team/*",), "a.io/team/app", True, id="star"),
        pytest.param(("a.io/team/*",), "a.io/team/deep/app", True, id="a-star-crosses-slashes"),
        pytest.param(("a.io/team/*",), "a.io/team", False, id="the-slash-is-wanted"),
        pytest.param(("a.io/team/*",), "a.io/team-b/app", False, id="not-the-neighbour"),
        pytest.param(("b.io/*", "*/app"), "a.io/team/app", True, id="one-of-several"),
        pytest.param(("team/*",), "a.io/team/app", False, id="with-the-registry"),
        pytest.param(("a.io/Team/*",), "a.io/team/app", False, id="case-counts"),
    ],
)
def test_an_entry_is_used_for_its_repositories_only(globs: tuple[str, ...], image: str, expected: bool) -> None:
    entry = Entry("a.io", repositories=globs)
    assert Keyring([entry]).matching(image) == ([entry] if expected else [])


@pytest.mark.parametrize("image", ["docker.io/debian", "docker.io/library/debian"])
@pytest.mark.parametrize("key", ["docker.io", "index.docker.io"])
def test_globs_see_official_images_under_library(key: str, image: str) -> None:
    assert found(Keyring([Entry(key, repositories=("docker.io/library/*",))]), image) == [key]
    assert found(Keyring([Entry(key, repositories=("docker.io/debian",))]), image) == []


def test_an_entry_kept_for_other_repositories_hides_nothing() -> None:
    """It is as if absent: the entries behind it are tried, and Docker Hub's fallback too."""
    kept, other, hub = Entry("docker.io", repositories=("docker.io/team/*",)), Entry("*.io"), Entry("index.docker.io")
    assert Keyring([kept, hub]).matching("docker.io/team/app") == [kept]
    assert Keyring([kept, hub]).matching(HUB) == [hub]
    assert Keyring([kept, other, hub]).matching(HUB) == [other]
    assert Keyring([Entry("index.docker.io", repositories=("docker.io/team/*",)), hub]).matching(HUB) == [hub]


@pytest.mark.parametrize(
    ("key", "registry", "expected"),
    [
        pytest.param("registry.example.com", "registry.example.com", True, id="host"),
        pytest.param("https://registry.example.com/v2/team", "registry.example.com", True, id="some-of-its-repositories"),
        pytest.param("*.example.com", "registry.example.com", True, id="pattern"),
        pytest.param("registry.example.com:5000", "registry.example.com:5000", True, id="port"),
        pytest.param("registry.example.com:5000", "registry.example.com", False, id="another-port"),
        pytest.param("registry.example.com", "quay.io", False, id="another-host"),
        pytest.param("docker.io/team", "docker.io", True, id="docker.io"),
        pytest.param("https://index.docker.io/v1/", "docker.io", True, id="fallback"),
        pytest.param("https://index.docker.io/v1", "docker.io", False, id="no-fallback-without-slash"),
        pytest.param("registry-1.docker.io", "docker.io", False, id="registry-1-never"),
        pytest.param("https://index.docker.io/v1/", "quay.io", False, id="no-fallback-for-others"),
        pytest.param("registry.example.com:x", "registry.example.com", False, id="unreadable-key"),
        pytest.param("registry.example.com", "", False, id="empty"),
        pytest.param("registry.example.com", "a b", False, id="unreadable-registry"),
    ],
)
def test_a_keyring_tells_which_registries_it_concerns(key: str, registry: str, expected: bool) -> None:
    assert Keyring([Entry(key)]).concerns(registry) is expected
    assert Keyring([Entry("other.example"), Entry(key, repositories=("x/*",))]).concerns(registry) is expected


def test_keyrings_are_equal_by_their_entries() -> None:
    """So that a file that was written anew with the same content is no change; where it is does not count."""
    one, two = Entry("a.io", Credential("u", "p"), source="x"), Entry("b.io", helper="pass")
    assert Keyring([one, two]) == Keyring([Entry("a.io", Credential("u", "p"), source="y"), two])
    assert Keyring([one, two]) != Keyring([two, one]), "the order is that of trying them"
    assert Keyring([one]) != Keyring([Entry("a.io", Credential("u", "q"))])
    assert Keyring([one]) != Keyring([Entry("a.io", Credential("u", "p"), repositories=("a.io/x",))])
    assert Keyring() == Keyring([])
    assert Keyring() != ()
    assert Keyring([one, two]).entries == (one, two)


KEYS = st.lists(
    st.sampled_from(
        ["https://", "http://", "/v1", "/v2/", "/", ":", "5000", "a", "b", ".", "*", "[", "]", "-", "!", "^", "?"]
    )
    | st.sampled_from(["docker.io", "index.docker.io", "@", "#", "%", "%61", "\\", " ", "\0", "\u00e9", "::1", "library"]),
    max_size=12,
).map("".join)


@given(st.lists(KEYS | st.text(max_size=12), max_size=4), KEYS | st.text(max_size=12))
def test_no_key_and_no_image_raises(keys: list[str], image: str) -> None:
    """And what a keyring finds, its registry is concerned by; in the order of no source but that of its keys."""
    ring = keyring(*keys)
    entries = ring.matching(image)
    assert {entry.source for entry in entries} <= {entry.source for entry in ring.entries}
    if entries:
        assert ring.concerns(image.partition("/")[0])
    for key in keys:
        assert not matches(key, image) or key in {entry.registry for entry in entries}


@given(st.text("ab*", max_size=10), st.text("ab", max_size=10))
def test_stars_match_as_the_plain_rule_says(glob: str, label: str) -> None:
    plain = re.fullmatch(glob.replace("*", ".*"), label) is not None
    assert matches(f"x{glob}.io", f"x{label}.io/app") is plain


def test_stars_are_not_tried_in_every_combination() -> None:
    """That would not end."""
    assert not matches("*a" * 100 + "b.io", "a" * 250 + ".io/app")
