"""What clients show: every header is told as something, nothing, or unusable; no text of it quotes what was shown."""

from __future__ import annotations

import base64
import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.access.authorization import (
    Basic,
    Bearer,
    TokenRequest,
    TokenRequestInvalid,
    Unusable,
    parse,
    parse_token_request,
)
from proxy.credentials.credential import Credential

CANARY = "canary-5eb1c3"
ALICE = Credential("alice", CANARY)
PULL = "repository:library/debian:pull"


def basic(text: str | bytes) -> str:
    """A Basic header of ``text``."""
    return "Basic " + base64.b64encode(text if isinstance(text, bytes) else text.encode()).decode()


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        pytest.param("Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==", Basic("Aladdin", "open sesame"), id="RFC7617-2"),
        pytest.param("Basic dGVzdDoxMjPCow==", Basic("test", "123\u00a3"), id="RFC7617-2.1"),
        pytest.param("basic dGVzdDoxMjPCow==", Basic("test", "123\u00a3"), id="case"),
        pytest.param("BASIC   dGVzdDoxMjPCow==", Basic("test", "123\u00a3"), id="spaces"),
        pytest.param(basic("a:b:c"), Basic("a", "b:c"), id="first-colon"),
        pytest.param(basic("alice:"), Basic("alice", ""), id="no-password"),
        pytest.param(basic(":token"), Basic("", "token"), id="no-user"),
        pytest.param(basic("a:" + "p" * 12_000), Basic("a", "p" * 12_000), id="long"),
        pytest.param("Bearer mF_9.B5f-4.1JqM", Bearer("mF_9.B5f-4.1JqM"), id="RFC6750-2.1"),
        pytest.param("bearer abc~+/==", Bearer("abc~+/=="), id="every-character"),
    ],
)
def test_a_header_shows_a_user_or_a_token(header: str, expected: Basic | Bearer) -> None:
    assert parse(header) == expected


@pytest.mark.parametrize("header", [None, "Basic Og=="])
def test_no_header_and_podmans_empty_one_show_nothing(header: str | None) -> None:
    assert parse(header) is None


@pytest.mark.parametrize(
    "header",
    [
        pytest.param("", id="empty"),
        pytest.param("Basic", id="no-credentials"),
        pytest.param("Basic ", id="no-credentials-but-a-space"),
        pytest.param("Basic\tdGVzdDoxMjM=", id="tab"),
        pytest.param(f"Basic {CANARY}", id="no-base64"),
        pytest.param("Basic dGVzdDoxMjM", id="no-padding"),
        pytest.param("Basic dGVzdDoxMjM==", id="too-much-padding"),
        pytest.param("Basic dGVzdDoxMjM= x", id="text-after-it"),
        pytest.param("Basic dGVz dDoxMjM=", id="space-within"),
        pytest.param("Basic dGVzdDoxMj-_", id="URL-alphabet"),
        pytest.param("Basic \u0661\u0662\u0663\u0664", id="foreign-digits"),
        pytest.param(basic(CANARY), id="no-colon"),
        pytest.param(basic(b"a:\xff" + CANARY.encode()), id="no-UTF-8"),
        pytest.param(basic(f"a:{CANARY}\n"), id="line-break"),
        pytest.param(basic(f"a\r\nX: y:{CANARY}"), id="header-within"),
        pytest.param(basic(f"a\0:{CANARY}"), id="NUL"),
        pytest.param(basic(f"a:{CANARY}\x7f"), id="DEL"),
        pytest.param(basic("a:" + "p" * 16_384), id="too-long"),
        pytest.param("Bearer", id="no-token"),
        pytest.param("Bearer " + "t" * 16_384, id="token-too-long"),
        pytest.param("Bearer a b", id="two-tokens"),
        pytest.param("Bearer a,b", id="comma"),
        pytest.param("Bearer =a", id="padding-first"),
        pytest.param("Bearer a\n", id="token-with-line-break"),
        pytest.param("Bearer a\udcff", id="token-with-a-byte-that-is-no-UTF-8"),
        pytest.param(f"Negotiate {CANARY}", id="other-scheme"),
        pytest.param(f"{CANARY}", id="no-scheme"),
        pytest.param(" Basic dGVzdDoxMjM=", id="leading-space"),
        pytest.param('Digest username="a"', id="digest"),
    ],
)
def test_a_header_that_cannot_be_read_is_not_the_same_as_none(header: str) -> None:
    shown = parse(header)
    assert isinstance(shown, Unusable)
    assert shown.why
    assert CANARY not in repr(shown)


def test_no_secret_in_a_repr() -> None:
    user, token = parse(basic(f"{CANARY}:{CANARY}")), parse(f"Bearer {CANARY}")
    assert isinstance(user, Basic)
    assert CANARY not in repr([user, token, user.credential, TokenRequest(user.credential, (), "")])


@given(st.text(max_size=80) | st.text("BasicBearer \t=:AQ+/\n\udcff", max_size=40) | st.binary(max_size=40).map(basic))
def test_no_header_raises(header: str) -> None:
    shown = parse(header)
    if isinstance(shown, Basic):
        assert shown.username or shown.password
        assert ":" not in shown.username
        assert not any(character < " " or character == "\x7f" for character in shown.username + shown.password)
        (shown.username + shown.password).encode()
    elif isinstance(shown, Bearer):
        assert re.fullmatch("[!-~]+", shown.token)


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30)


@given(TEXT.filter(lambda text: ":" not in text), TEXT)
def test_what_was_written_by_the_grammar_is_read_back(username: str, password: str) -> None:
    expected = Basic(username, password) if username or password else None
    assert parse(basic(f"{username}:{password}")) == expected


Pairs = list[tuple[str, str]]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        pytest.param([], ((), ""), id="nothing"),
        pytest.param(
            [("service", "pullcache"), ("scope", PULL), ("account", "x"), ("client_id", "y"), ("offline_token", "true")],
            ((PULL,), "pullcache"),
            id="distribution-spec",
        ),
        pytest.param(
            [("scope", PULL), ("scope", "repository:docker.io/library/debian:pull")],
            ((PULL, "repository:docker.io/library/debian:pull"), ""),
            id="repeated",
        ),
        pytest.param([("scope", f"repository:b:pull  {PULL}")], (("repository:b:pull", PULL), ""), id="separated-by-spaces"),
        pytest.param([("scope", PULL), ("scope", PULL)], ((PULL,), ""), id="twice-the-same"),
        pytest.param(
            [("scope", "repository:host:5000/a:pull,push"), ("scope", "repository:b:*")],
            (("repository:host:5000/a:pull,push", "repository:b:*"), ""),
            id="colon-in-the-name-and-more-actions",
        ),
        pytest.param(
            [
                ("scope", f"aws registry:catalog:* repository:x:push repository::pull repository:pull repository {PULL}"),
                ("scope", "repository(plugin):x:pull"),
                ("scope", ""),
                ("scope", "\udcff \0"),
            ],
            ((PULL,), ""),
            id="unknown-ones-are-passed-over",
        ),
        pytest.param([("scope", f"repository:{'x' * 512}:pull {PULL}")], ((PULL,), ""), id="over-long"),
        pytest.param([("grant_type", "junk"), ("username", "x")], ((), ""), id="what-is-for-POST-means-nothing"),
    ],
)
@pytest.mark.parametrize("header", [None, basic(f"alice:{CANARY}")])
def test_a_get_asks_for_scopes_with_basic_or_without(
    query: Pairs, expected: tuple[tuple[str, ...], str], header: str | None
) -> None:
    credential = ALICE if header else None
    assert parse_token_request("GET", query, [], parse(header)) == TokenRequest(credential, *expected)


def test_an_empty_user_and_password_are_the_anonymous() -> None:
    assert parse_token_request("GET", [], [], parse("Basic Og==")).credential is None
    form = [("grant_type", "password"), ("username", ""), ("password", "")]
    assert parse_token_request("POST", [], form, None).credential is None


def test_a_form_shows_a_user_as_containerd_sends_it() -> None:
    form = [
        ("client_id", "containerd-client"),
        ("grant_type", "password"),
        ("password", CANARY),
        ("scope", f"repository:docker.io/library/debian:pull {PULL}"),
        ("service", "pullcache"),
        ("username", "alice"),
    ]
    expected = TokenRequest(ALICE, ("repository:docker.io/library/debian:pull", PULL), "pullcache")
    assert parse_token_request("POST", [("scope", "repository:query:pull")], form, parse("Bearer x")) == expected


def test_a_form_shows_a_refresh_token() -> None:
    form = [("grant_type", "refresh_token"), ("refresh_token", CANARY), ("service", "s"), ("access_type", "offline")]
    assert parse_token_request("POST", [], form, None) == TokenRequest(Credential(identity_token=CANARY), (), "s")


USER = [("grant_type", "password"), ("username", "alice"), ("password", CANARY)]


@pytest.mark.parametrize(
    ("form", "error"),
    [
        pytest.param([], "invalid_request", id="empty"),
        pytest.param(USER[1:], "invalid_request", id="no-grant-type"),
        pytest.param([("grant_type", "")], "unsupported_grant_type", id="empty-grant-type"),
        pytest.param([("grant_type", "client_credentials"), *USER[1:]], "unsupported_grant_type", id="other-grant-type"),
        pytest.param([("grant_type", CANARY)], "unsupported_grant_type", id="a-secret-in-the-wrong-place"),
        pytest.param(USER[:2], "invalid_request", id="no-password"),
        pytest.param([USER[0], USER[2]], "invalid_request", id="no-user"),
        pytest.param([*USER, ("grant_type", "password")], "invalid_request", id="two-grant-types"),
        pytest.param([*USER, ("username", "bob")], "invalid_request", id="two-users"),
        pytest.param([*USER, ("password", CANARY)], "invalid_request", id="two-passwords"),
        pytest.param([*USER, ("service", "a"), ("service", "b")], "invalid_request", id="two-services"),
        pytest.param([*USER, ("service", "s" * 257)], "invalid_request", id="over-long-service"),
        pytest.param([*USER, ("service", f"{CANARY}\r\n")], "invalid_request", id="line-break-in-service"),
        pytest.param([USER[0], ("username", "a:b"), USER[2]], "invalid_request", id="colon-in-user"),
        pytest.param([*USER[:2], ("password", f"{CANARY}\n")], "invalid_request", id="line-break"),
        pytest.param([*USER[:2], ("password", f"{CANARY}\udcff")], "invalid_request", id="no-UTF-8"),
        pytest.param([*USER[:2], ("password", CANARY * 2000)], "invalid_request", id="over-long-password"),
        pytest.param([("grant_type", "refresh_token")], "invalid_request", id="no-refresh-token"),
        pytest.param([("grant_type", "refresh_token"), ("refresh_token", "")], "invalid_request", id="empty-refresh-token"),
        pytest.param(
            [("grant_type", "refresh_token"), ("refresh_token", f"{CANARY}\r\n")],
            "invalid_request",
            id="refresh-token-line-break",
        ),
    ],
)
def test_a_form_that_cannot_be_answered_has_an_oauth_error_without_a_secret(form: Pairs, error: str) -> None:
    with pytest.raises(TokenRequestInvalid) as caught:
        parse_token_request("POST", [], form, None)
    assert caught.value.error == error
    assert caught.value.description
    assert CANARY not in f"{caught.value!r} {caught.value}"
    assert caught.value.__context__ is None


@pytest.mark.parametrize("header", ["Basic x", f"Bearer {CANARY}", "", basic(f"a:{CANARY}\n")])
def test_a_get_with_anything_but_basic_is_told_what_is_wrong(header: str) -> None:
    with pytest.raises(TokenRequestInvalid) as caught:
        parse_token_request("GET", [("service", "s")], [], parse(header))
    assert caught.value.error == "invalid_request"
    assert CANARY not in str(caught.value)


def test_more_scopes_than_anybody_needs_are_passed_over() -> None:
    many = [("scope", f"repository:r{number}:pull") for number in range(10_000)]
    request = parse_token_request("GET", many, [], None)
    assert request.scopes == tuple(f"repository:r{number}:pull" for number in range(64))
    assert len(parse_token_request("GET", [("scope", " ".join(value for _, value in many))], [], None).scopes) == 64


NAMES = st.sampled_from(["grant_type", "username", "password", "refresh_token", "scope", "service", "x"])
VALUES = st.sampled_from(["password", "refresh_token", "", "a", PULL, "\n", ":"]) | st.text(max_size=10)


@given(
    st.sampled_from(["GET", "POST", "HEAD"]),
    st.lists(st.tuples(NAMES, VALUES), max_size=6),
    st.sampled_from([None, "Basic Og==", basic("a:b"), "junk"]),
)
def test_no_request_raises_anything_else(method: str, pairs: Pairs, header: str | None) -> None:
    with contextlib.suppress(TokenRequestInvalid):
        request = parse_token_request(method, pairs, pairs, parse(header))
        assert request.credential is None or not request.credential.is_empty
