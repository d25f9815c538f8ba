"""Decisions: which upstream a request means (design, section 4), and what that upstream is asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import proxy.app  # every module, and so every class of error
from proxy.errors import NameInvalid, NameUnknown, RegistryError
from proxy.manifests import DOCKER_LIST, DOCKER_MANIFEST, MODERN, OCI_INDEX, OCI_MANIFEST
from proxy.policy import Route, Routes, age_header, classify_accept, decision_of, route

SCHEMA1 = (
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
    "application/vnd.docker.distribution.manifest.v1+json",
)
PREFIXES = {
    "docker.io": "docker.io",
    "ghcr.io": "ghcr.io",
    "corp.test:5000": "corp.test:5000",
    "corp.test_5000": "corp.test:5000",
    "mirror": "ghcr.io",
}
ROUTES = Routes(PREFIXES, frozenset({"docker.io", "ghcr.io", "corp.test:5000"}), "docker.io")
NO_DEFAULT = Routes(PREFIXES, ROUTES.names, None)


@pytest.mark.parametrize(
    ("namespaces", "name", "where"),
    [
        (["quay.io"], "team/app", "named in 'ns'"),
        (["user:hunter2@quay.io"], "a", "named in 'ns'"),
        ([], "quay.io/a", "in the name"),
    ],
)
def test_who_asks_for_a_registry_that_is_no_upstream_is_told_what_to_do(
    namespaces: list[str], name: str, where: str
) -> None:
    """What was sent is not repeated."""
    with pytest.raises(NameUnknown) as raised:
        route(ROUTES, namespaces, name)
    assert raised.value.message == (
        f"the registry {where} is not among the upstreams of this cache; have it added to 'upstreams' there, or pull "
        "without the cache"
    )


def test_several_ns_are_told_as_that() -> None:
    with pytest.raises(NameUnknown, match="'ns' is given more than once"):
        route(ROUTES, ["docker.io", "docker.io"], "team/app")


@pytest.mark.parametrize(
    ("namespaces", "name", "upstream", "repository"),
    [
        pytest.param(["docker.io"], "library/debian", "docker.io", "library/debian", id="ns"),
        pytest.param(["docker.io"], "debian", "docker.io", "library/debian", id="ns-library"),
        pytest.param(["index.docker.io"], "debian", "docker.io", "library/debian", id="ns-alias"),
        pytest.param(["registry-1.docker.io"], "a/b", "docker.io", "a/b", id="ns-api-host"),
        pytest.param(["ghcr.io"], "debian", "ghcr.io", "debian", id="ns-no-library-elsewhere"),
        pytest.param(["corp.test:5000"], "a/b", "corp.test:5000", "a/b", id="ns-port"),
        pytest.param(["ghcr.io"], "ghcr.io/a", "ghcr.io", "a", id="ns-and-prefix"),
        pytest.param(["corp.test:5000"], "corp.test_5000/a/b", "corp.test:5000", "a/b", id="ns-and-prefix-underscore"),
        pytest.param(["docker.io"], "docker.io/debian", "docker.io", "library/debian", id="ns-and-prefix-library"),
        pytest.param(["ghcr.io"], "ghcr.io/ghcr.io/a", "ghcr.io", "ghcr.io/a", id="ns-and-prefix-once"),
        pytest.param(["ghcr.io"], "docker.io/a", "ghcr.io", "docker.io/a", id="ns-path-is-verbatim"),
        pytest.param(["ghcr.io"], "mirror/a", "ghcr.io", "mirror/a", id="ns-no-prefix-is-looked-for"),
        pytest.param(["ghcr.io"], "unknown.test/a", "ghcr.io", "unknown.test/a", id="ns-host-like-path"),
        pytest.param([], "ghcr.io/a/b", "ghcr.io", "a/b", id="prefix"),
        pytest.param([], "docker.io/debian", "docker.io", "library/debian", id="prefix-library"),
        pytest.param([], "corp.test:5000/a", "corp.test:5000", "a", id="prefix-port"),
        pytest.param([], "corp.test_5000/a", "corp.test:5000", "a", id="prefix-underscore"),
        pytest.param([], "mirror/a/b", "ghcr.io", "a/b", id="prefix-chosen"),
        pytest.param([], "ghcr.io/docker.io/a", "ghcr.io", "docker.io/a", id="prefix-once"),
        pytest.param([], "debian", "docker.io", "library/debian", id="default-library"),
        pytest.param([], "team/app", "docker.io", "team/app", id="default"),
        pytest.param([], "localhosts/app", "docker.io", "localhosts/app", id="default-not-localhost"),
    ],
)
def test_a_request_means_one_upstream(namespaces: list[str], name: str, upstream: str, repository: str) -> None:
    assert route(ROUTES, namespaces, name) == Route(upstream, repository)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("routes", "namespaces", "name"),
    [
        pytest.param(ROUTES, ["unknown.test"], "a", id="ns-unknown"),
        pytest.param(ROUTES, [""], "a", id="ns-empty"),
        pytest.param(ROUTES, ["mirror"], "a", id="ns-is-no-prefix"),
        pytest.param(ROUTES, ["corp.test_5000"], "a", id="ns-is-no-path-form"),
        pytest.param(ROUTES, ["ghcr.io", "ghcr.io"], "a", id="ns-twice"),
        pytest.param(ROUTES, ["ghcr.io", "docker.io"], "a", id="ns-two"),
        pytest.param(ROUTES, ["ghcr.io:443"], "a", id="ns-port"),
        pytest.param(ROUTES, ["GHCR.IO"], "a", id="ns-case"),
        pytest.param(ROUTES, ["ghcr.io."], "a", id="ns-dot"),
        pytest.param(ROUTES, ["http://ghcr.io"], "a", id="ns-url"),
        pytest.param(ROUTES, [], "unknown.test/a", id="unknown-host"),
        pytest.param(ROUTES, [], "unknown.test/ghcr.io/a", id="unknown-host-before-known"),
        pytest.param(ROUTES, [], "localhost/a", id="localhost"),
        pytest.param(ROUTES, [], "localhost:5000/a", id="localhost-port"),
        pytest.param(ROUTES, [], "10.0.0.1/a", id="address"),
        pytest.param(ROUTES, [], "Corp/a", id="upper-case-host"),
        pytest.param(ROUTES, [], "unknown.test", id="host-alone"),
        pytest.param(ROUTES, [], "ghcr.io:443/a", id="other-port"),
        pytest.param(NO_DEFAULT, [], "debian", id="no-default"),
        pytest.param(NO_DEFAULT, [], "team/app", id="no-default-path"),
    ],
)
def test_what_is_not_configured_is_unknown(routes: Routes, namespaces: list[str], name: str) -> None:
    with pytest.raises(NameUnknown):
        route(routes, namespaces, name)


@pytest.mark.parametrize(
    ("namespaces", "name"),
    [
        ([], "ghcr.io"),
        ([], "mirror"),
        ([], "ghcr.io/"),
        ([], "ghcr.io//a"),
        ([], "ghcr.io/../a"),
        ([], "a/../b"),
        ([], ""),
        ([], "/a"),
        (["ghcr.io"], ""),
        (["ghcr.io"], "A"),
        ([], "a" * 256),
    ],
)
def test_a_name_that_breaks_the_grammar_is_invalid(namespaces: list[str], name: str) -> None:
    with pytest.raises(NameInvalid):
        route(ROUTES, namespaces, name)


WORD = st.text("abz09-_", min_size=1, max_size=8)
HOST_LIKE = st.one_of(
    st.builds("{}.{}".format, WORD, WORD),
    st.builds("{}:{}".format, WORD, st.integers(0, 99999)),
    WORD.map(lambda word: word + "A"),
    st.just("localhost"),
).filter(lambda host: host not in PREFIXES)


@given(HOST_LIKE, st.text("ab/.", max_size=10))
def test_no_host_like_name_falls_to_the_default(host: str, rest: str) -> None:
    with pytest.raises(NameUnknown):
        route(ROUTES, [], f"{host}/{rest}")


@given(
    st.lists(st.text(max_size=12) | st.sampled_from([*ROUTES.names, "index.docker.io"]), max_size=2),
    st.text(max_size=20) | st.text("ab./:_", max_size=20),
)
def test_a_route_leads_to_a_configured_upstream_or_nowhere(namespaces: list[str], name: str) -> None:
    try:
        found = route(ROUTES, namespaces, name)
    except RegistryError:
        return
    assert found.upstream in ROUTES.names
    assert found.repository.removeprefix("library/") in name


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param([], id="none"),
        pytest.param([""], id="empty"),
        pytest.param(["*/*"], id="anything"),
        pytest.param(["*/*;q=0.1"], id="anything-with-q"),
        pytest.param(["text/html", "application/json"], id="nothing-known"),
        pytest.param([", ".join(MODERN)], id="one-line"),
        pytest.param(list(MODERN), id="lines"),
        pytest.param(list(reversed(MODERN)), id="any-order"),
        pytest.param([f"{kind.upper()};q=0.5" for kind in MODERN], id="case-and-parameters"),
        pytest.param([OCI_MANIFEST, "*/*"], id="one-and-anything"),
        pytest.param([OCI_MANIFEST, "application/*"], id="one-and-any-application-type"),
        pytest.param([",".join(MODERN), "application/vnd.example"], id="foreign-type-beside"),
    ],
)
def test_who_takes_everything_is_asked_the_modern_types_for(lines: list[str]) -> None:
    accept = classify_accept(lines)
    assert accept.sent == ", ".join(MODERN)
    assert accept.key == ""


@pytest.mark.parametrize(
    ("lines", "kinds"),
    [
        ([OCI_MANIFEST], [OCI_MANIFEST]),
        ([DOCKER_MANIFEST], [DOCKER_MANIFEST]),
        ([DOCKER_MANIFEST, DOCKER_LIST], [DOCKER_LIST, DOCKER_MANIFEST]),
        ([f"{OCI_MANIFEST},{OCI_INDEX}"], [OCI_INDEX, OCI_MANIFEST]),
        ([f" {OCI_INDEX} ; q=1"], [OCI_INDEX]),
        ([OCI_MANIFEST, OCI_MANIFEST, "text/html"], [OCI_MANIFEST]),
    ],
)
def test_who_takes_less_has_a_class_of_his_own(lines: list[str], kinds: list[str]) -> None:
    accept = classify_accept(lines)
    assert accept.sent.split(", ") == kinds
    assert accept.key
    assert accept.key != classify_accept(MODERN).key
    assert accept == classify_accept(list(reversed(lines)))


@given(st.lists(st.sampled_from([*MODERN, *SCHEMA1, "*/*", "text/html", "application/*"]), max_size=8))
def test_schema_1_is_never_asked_for(kinds: list[str]) -> None:
    sent = set(classify_accept(kinds).sent.split(", "))
    assert sent
    assert sent <= set(MODERN)


@given(st.lists(st.sampled_from([*MODERN, *SCHEMA1, "*/*", "text/html"]), max_size=8), st.randoms())
def test_order_and_lines_do_not_matter(kinds: list[str], random: object) -> None:
    shuffled = sorted(kinds, key=lambda _: random.random())  # type: ignore[attr-defined]
    assert classify_accept(kinds) == classify_accept([",".join(shuffled)])


@given(
    st.lists(st.sampled_from(MODERN), min_size=1, max_size=3, unique=True),
    st.lists(st.sampled_from(MODERN), min_size=1, max_size=3, unique=True),
)
def test_clients_share_an_answer_only_if_they_take_the_same(one: list[str], other: list[str]) -> None:
    assert (classify_accept(one).key == classify_accept(other).key) == (set(one) == set(other))


@given(st.lists(st.text(max_size=40), max_size=5))
def test_no_accept_line_puts_its_own_words_upstream(lines: list[str]) -> None:
    assert set(classify_accept(lines).sent.split(", ")) <= set(MODERN)


# --- what is said of an answer ---

NEGATIVE = {
    *("RegistryError", "NameUnknown", "ManifestUnknown", "BlobUnknown", "LoopDetected", "CacheFailing"),
    *("UpstreamFailing", "UpstreamUnavailable", "UpstreamBroken", "UpstreamIntercepted", "UpstreamRefused"),
    *(
        "SecretRefused",
        "ManifestGone",
        "TooManyRequests",
        "Mismatch",
        "_OtherSize",
        "RealmRefused",
        "Dropped",
        "Garbled",
        "WaitedTooLong",
    ),
}
"""There is none, or none to be had now."""

DENIED = {
    *("Denied", "CredentialRefused", "Withdrawn", "Unauthorized", "TooManyAttempts"),
    *("NameInvalid", "DigestInvalid", "PaginationNumberInvalid", "Unsupported", "RangeInvalid", "RequestTooLarge"),
    "RequestInvalid",
}
"""Not for this client, or nothing that this cache answers."""


def kinds_of(error: type[RegistryError]) -> dict[str, type[RegistryError]]:
    """A class of errors and all that are made of it, by name."""
    below = [kinds_of(kind) for kind in error.__subclasses__()]
    return {error.__name__: error} | {name: kind for kinds in below for name, kind in kinds.items()}


KINDS = {name: kind for name, kind in kinds_of(RegistryError).items() if kind.__module__.startswith(f"{proxy.__name__}.")}


def test_of_every_error_it_is_decided_what_it_is_called() -> None:
    assert not NEGATIVE & DENIED
    assert set(KINDS) == NEGATIVE | DENIED


@pytest.mark.parametrize("name", sorted(KINDS))
def test_an_error_is_negative_or_denied(name: str) -> None:
    """Nobody gets it now, or this client does not: ``SecretRefused`` and ``TooManyRequests`` are about the cache's own
    standing with the upstream, ``TooManyAttempts`` about the client's with the cache."""
    error = KINDS[name].__new__(KINDS[name])
    assert decision_of(error) == ("negative" if name in NEGATIVE else "denied")


@pytest.mark.parametrize(
    ("age", "stated"),
    [
        (0.0, "0"),
        (0.999, "0"),
        (59.9, "59"),
        (-0.5, "0"),
        (-1e9, "0"),
        (1e12, "2147483648"),
        (float("inf"), "2147483648"),
        (float("-inf"), "0"),
        (float("nan"), "0"),
    ],
)
def test_age_is_whole_seconds_and_never_negative(age: float, stated: str) -> None:
    """RFC 9111, 5.1; more than 2^31 is said to be that (1.2.2)."""
    assert age_header(age) == stated
