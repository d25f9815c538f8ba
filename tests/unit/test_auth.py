"""Tokens: who may give one (T01, T02), what is taken for one (T35), and how long it is used."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from yarl import URL

from proxy.credentials.credential import Credential
from proxy.errors import CredentialRefused, Denied, RegistryError, UpstreamBroken
from proxy.names import Repository
from proxy.upstream.auth import RealmRefused, Tokens, check_realm, may_carry, parse_token
from proxy.upstream.challenge import Basic, Bearer
from tests.unit.clock import Clock

HTTPS = URL("https://registry.test")
PLAIN = URL("http://registry.test:5000")
REALM = URL("https://auth.test/token")
APP, OTHER = Repository("team/app"), Repository("team/other")
BEARER = Bearer("https://auth.test/token", "registry.test", ("repository:team/app:pull",))


@pytest.mark.parametrize(
    ("realm", "endpoint", "token_hosts"),
    [
        pytest.param("https://registry.test/token", HTTPS, [], id="own-origin"),
        pytest.param("https://REGISTRY.test:443/token", HTTPS, [], id="own-origin-spelt-out"),
        pytest.param("https://registry.test/token?account=x", HTTPS, [], id="with-a-query"),
        pytest.param("https://auth.test/token", HTTPS, ["auth.test"], id="listed"),
        pytest.param("https://auth.test:8443/token", HTTPS, ["auth.test:8443"], id="listed-with-port"),
        pytest.param("http://registry.test:5000/token", PLAIN, [], id="plain-own-origin"),
        pytest.param("http://auth.test/token", PLAIN, ["auth.test"], id="plain-listed"),
        pytest.param("https://auth.test/token", PLAIN, ["auth.test"], id="better-than-plain"),
    ],
)
def test_a_trusted_token_server_is_used(realm: str, endpoint: URL, token_hosts: list[str]) -> None:
    assert check_realm(realm, endpoint, token_hosts) == URL(realm).with_query(None), "what it is asked for is ours to say"


@pytest.mark.parametrize(
    ("realm", "endpoint", "token_hosts"),
    [
        pytest.param("https://evil.test/token", HTTPS, [], id="T01-foreign"),
        pytest.param("https://evil.test/token", HTTPS, ["auth.test"], id="T01-not-listed"),
        pytest.param("https://auth.test.evil.test/token", HTTPS, ["auth.test"], id="T01-suffix"),
        pytest.param("https://evil-auth.test/token", HTTPS, ["auth.test"], id="T01-prefix"),
        pytest.param("https://sub.auth.test/token", HTTPS, ["auth.test"], id="T01-subdomain"),
        pytest.param("https://sub.registry.test/token", HTTPS, [], id="T01-subdomain-of-our-own"),
        pytest.param("https://registry.test:8443/token", HTTPS, [], id="T01-other-port"),
        pytest.param("https://auth.test:8443/token", HTTPS, ["auth.test"], id="T01-other-port-of-listed"),
        pytest.param("https://registry.test/token", PLAIN, [], id="T01-other-scheme-is-another-origin"),
        pytest.param("https://auth.test%2eevil.test/", HTTPS, ["auth.test"], id="T01-encoded-dot"),
        pytest.param("https://auth.test\\@evil.test/", HTTPS, ["auth.test"], id="T01-backslash"),
        pytest.param("https://auth.test\n.evil.test/", HTTPS, ["auth.test"], id="T01-line-break"),
        pytest.param("https://auth.test./token", HTTPS, ["auth.test"], id="T01-final-dot"),
        pytest.param("https://127.0.0.1/token", HTTPS, ["auth.test"], id="T01-loopback"),
        pytest.param("https://[::1]/token", HTTPS, ["auth.test"], id="T01-loopback-6"),
        pytest.param("http://registry.test/token", HTTPS, [], id="T02-downgrade"),
        pytest.param("http://registry.test:443/token", HTTPS, [], id="T02-downgrade-on-the-same-port"),
        pytest.param("http://auth.test/token", HTTPS, ["auth.test"], id="T02-downgrade-of-listed"),
        pytest.param("https://user:pw@auth.test/token", HTTPS, ["auth.test"], id="T02-userinfo"),
        pytest.param("https://user@auth.test/token", HTTPS, ["auth.test"], id="T02-user"),
        pytest.param("https://:pw@auth.test/token", HTTPS, ["auth.test"], id="T02-password"),
        pytest.param("https://auth.test@evil.test/token", HTTPS, ["auth.test"], id="T02-host-as-user"),
        pytest.param("https://auth.test/token#x", HTTPS, ["auth.test"], id="T02-fragment"),
        pytest.param("file:///etc/passwd", HTTPS, [], id="T02-file"),
        pytest.param("file://registry.test/etc/passwd", PLAIN, [], id="T02-file-with-host"),
        pytest.param("ftp://auth.test/", HTTPS, ["auth.test"], id="T02-ftp"),
        pytest.param("javascript:alert(1)", HTTPS, [], id="T02-javascript"),
        pytest.param("", HTTPS, [], id="T02-empty"),
        pytest.param("token", HTTPS, [], id="T02-relative"),
        pytest.param("/token", HTTPS, [], id="T02-path"),
        pytest.param("//auth.test/token", HTTPS, ["auth.test"], id="T02-no-scheme"),
        pytest.param("https:auth.test", HTTPS, ["auth.test"], id="T02-no-slashes"),
        pytest.param("https://", HTTPS, [], id="T02-no-host"),
        pytest.param("https://auth.test:99999/", HTTPS, ["auth.test"], id="T02-port-too-large"),
        pytest.param("https://auth.test:x/", HTTPS, ["auth.test"], id="T02-port-no-number"),
        pytest.param("https://[::1/", HTTPS, [], id="T02-bracket"),
        pytest.param("https://auth.test/" + "a" * 9000, HTTPS, ["auth.test"], id="T02-9-KB"),
        pytest.param("https://\u0430uth.test/token", HTTPS, ["auth.test"], id="T02-look-alike"),
        pytest.param("https://xn--uth-5cd.test/token", HTTPS, ["auth.test"], id="T02-punycode-look-alike"),
        pytest.param("https://xn--/", HTTPS, [], id="T02-broken-punycode"),
        pytest.param("https://\u2025/", HTTPS, [], id="T02-dots"),
    ],
)
def test_any_other_token_server_is_refused(realm: str, endpoint: URL, token_hosts: list[str]) -> None:
    with pytest.raises(RealmRefused):
        check_realm(realm, endpoint, token_hosts)


HOSTS = st.sampled_from(["auth.test", "registry.test", "evil.test", "auth.test.evil.test", "10.0.0.1", "[::1]"])


@given(
    st.sampled_from(["https", "http", "HTTPS", "ftp"]),
    st.sampled_from(["", "u@", "u:p@", "auth.test@", "auth.test:443@"]),
    HOSTS,
    st.sampled_from(["", ":443", ":80", ":8443"]),
    st.sampled_from(["", "/", "/t", "?a", "#a", "\\@auth.test/", "@auth.test"]),
)
def test_whatever_is_accepted_is_https_at_a_trusted_host(scheme: str, user: str, host: str, port: str, rest: str) -> None:
    try:
        url = check_realm(f"{scheme}://{user}{host}{port}{rest}", HTTPS, ["auth.test"])
    except RealmRefused:
        return
    assert (url.scheme, url.port, url.user, url.fragment) == ("https", 443, None, "")
    assert url.host in ("auth.test", "registry.test")


@given(st.text(max_size=80) | st.text("htps:/@.[]#?%\\ ae1\n", max_size=60).map(lambda text: "https://" + text))
@example("0://[]@")
def test_no_realm_raises_anything_else(realm: str) -> None:
    with contextlib.suppress(RealmRefused):
        check_realm(realm, HTTPS, [])


@pytest.mark.parametrize(
    ("url", "endpoint", "token_hosts", "allowed"),
    [
        pytest.param("https://registry.test/v2/a", HTTPS, [], True, id="own-origin"),
        pytest.param("https://registry.test:443/v2/a", HTTPS, [], True, id="own-origin-spelt-out"),
        pytest.param("http://registry.test:5000/v2/a", PLAIN, [], True, id="plain-own-origin"),
        pytest.param("https://auth.test/token", HTTPS, ["auth.test"], True, id="listed"),
        pytest.param("https://auth.test/token", PLAIN, ["auth.test"], True, id="listed-and-better-than-plain"),
        pytest.param("https://cdn.test/blob", HTTPS, [], False, id="another-host"),
        pytest.param("https://registry.test:8443/v2/a", HTTPS, [], False, id="another-port"),
        pytest.param("http://registry.test/v2/a", HTTPS, [], False, id="downgrade"),
        pytest.param("http://registry.test:443/v2/a", HTTPS, [], False, id="downgrade-on-the-same-port"),
        pytest.param("http://auth.test/token", HTTPS, ["auth.test"], False, id="downgrade-of-listed"),
        pytest.param("https://registry.test:5000/v2/a", PLAIN, [], False, id="another-scheme-is-another-origin"),
        pytest.param("https://sub.registry.test/", HTTPS, ["registry.test"], False, id="subdomain"),
        pytest.param("https://registry.test.evil.test/", HTTPS, ["registry.test"], False, id="suffix"),
        pytest.param("https://auth.test:8443/token", HTTPS, ["auth.test"], False, id="another-port-of-listed"),
    ],
)
def test_where_what_proves_who_asks_may_go(url: str, endpoint: URL, token_hosts: list[str], allowed: bool) -> None:
    assert may_carry(URL(url), endpoint, token_hosts) is allowed


def answer(**document: object) -> bytes:
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (answer(token="abc"), "abc"),
        (answer(access_token="abc"), "abc"),
        (answer(token="abc", access_token="def"), "abc"),
        (answer(token="", access_token="def"), "def"),
        (answer(token="a.b-c_d~e+f/g=="), "a.b-c_d~e+f/g=="),
        (answer(token="x" * 16384), "x" * 16384),
    ],
)
def test_a_token_is_read(body: bytes, value: str) -> None:
    assert parse_token(body).value == value


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"no", b"<html>", b"[]", b"null", b'"abc"', b"7", b"{}", b"\xff", b"[" * 50_000, b'{"token": "abc"'),
        *(
            answer(token=value)
            for value in (
                "",
                7,
                None,
                True,
                ["abc"],
                {"a": 1},
                "a b",
                "a\r\nX-Evil: 1",
                "a\nb",
                "a\0",
                "\u00e9",
                "\u0661",
                "x" * 16385,
                " abc",
                "abc\n",
            )
        ),
        *(answer(access_token=value) for value in (7, "a\r\nb")),
    ],
)
def test_what_is_no_token_is_refused(body: bytes) -> None:
    with pytest.raises(UpstreamBroken):
        parse_token(body)


@pytest.mark.parametrize(
    ("life", "seconds"),
    [
        ("300", 240), ("100.5", 80.4), ("60", 48), ("59", 48), ("0", 48), ("-1", 48), ("-1e308", 48),
        ("3600", 2880), ("3601", 2880),
        ("1000000000000", 2880), ("1e308", 2880), ("Infinity", 2880), ("-Infinity", 48),
        ('"300"', 48), ('"x"', 48), ("null", 48), ("true", 48), ("[300]", 48), ("{}", 48),
        pytest.param("NaN", 48, id="not-a-number"),
        pytest.param("1" + "0" * 400, 2880, id="more-than-a-float-holds"),
        pytest.param("-1" + "0" * 400, 48, id="less-than-a-float-holds"),
    ],
)  # fmt: skip
def test_a_tokens_life_is_between_a_minute_and_an_hour_and_a_fifth_of_it_is_not_used(life: str, seconds: float) -> None:
    token = parse_token(f'{{"token": "abc", "expires_in": {life}}}'.encode())
    assert token.seconds == pytest.approx(seconds)


def test_a_token_without_a_life_has_a_minute() -> None:
    assert parse_token(answer(token="abc")).seconds == pytest.approx(48)


JSON_VALUE = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.lists(st.integers(), max_size=2)
)


@given(JSON_VALUE, JSON_VALUE, JSON_VALUE)
def test_no_answer_raises_anything_but_the_one_error(token: object, access: object, life: object) -> None:
    try:
        parsed = parse_token(answer(token=token, access_token=access, expires_in=life))
    except UpstreamBroken:
        return
    assert parsed.value.isascii()
    assert parsed.value.isprintable()
    assert 48 <= parsed.seconds <= 2880


class TokenServer:
    """Gives t1, t2, ... or raises; ``open`` holds its answers back."""

    def __init__(self, life: int = 300) -> None:
        self.asked: list[URL] = []
        self.life = life
        self.failure: RegistryError | None = None
        self.open = asyncio.Event()
        self.open.set()

    async def __call__(self, url: URL) -> bytes:
        self.asked.append(url)
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        return answer(token=f"t{len(self.asked)}", expires_in=self.life)


Get = Callable[..., Awaitable[str]]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tokens(clock: Clock) -> Tokens:
    return Tokens(clock)


async def test_a_token_is_reused(tokens: Tokens) -> None:
    server = TokenServer()
    assert [await tokens.get(REALM, BEARER, APP, server) for _ in range(3)] == ["t1", "t1", "t1"]
    assert len(server.asked) == 1


async def test_a_token_is_renewed_when_four_fifths_of_its_life_are_over(tokens: Tokens, clock: Clock) -> None:
    server = TokenServer(life=100)
    assert await tokens.get(REALM, BEARER, APP, server) == "t1"
    clock.now += 79.9
    assert await tokens.get(REALM, BEARER, APP, server) == "t1"
    clock.now += 0.2
    assert await tokens.get(REALM, BEARER, APP, server) == "t2"


async def test_a_failure_is_the_answer_for_a_minute(tokens: Tokens, clock: Clock) -> None:
    server = TokenServer()
    server.failure = Denied("no")
    for _ in range(3):
        with pytest.raises(Denied, match="no"):
            await tokens.get(REALM, BEARER, APP, server)
    server.failure = None
    clock.now += 59.9
    with pytest.raises(Denied):
        await tokens.get(REALM, BEARER, APP, server)
    assert len(server.asked) == 1
    clock.now += 0.2
    assert await tokens.get(REALM, BEARER, APP, server) == "t2"


async def test_an_answer_that_is_no_token_is_remembered_too(tokens: Tokens) -> None:
    asked: list[URL] = []

    async def ask(url: URL) -> bytes:
        asked.append(url)
        return b"<html>"

    for _ in range(3):
        with pytest.raises(UpstreamBroken):
            await tokens.get(REALM, BEARER, APP, ask)
    assert len(asked) == 1


async def test_a_failure_of_one_repository_is_not_that_of_another(tokens: Tokens) -> None:
    server = TokenServer()
    server.failure = Denied("no")
    with pytest.raises(Denied):
        await tokens.get(REALM, BEARER, APP, server)
    server.failure = None
    assert await tokens.get(REALM, BEARER, OTHER, server) == "t2"


async def test_those_who_wait_share_one_request(tokens: Tokens) -> None:
    server = TokenServer()
    server.open.clear()
    waiting = [asyncio.ensure_future(tokens.get(REALM, BEARER, APP, server)) for _ in range(20)]
    while not server.asked:
        await asyncio.sleep(0)
    server.open.set()
    assert await asyncio.gather(*waiting) == ["t1"] * 20
    assert len(server.asked) == 1


async def test_those_who_wait_share_one_failure(tokens: Tokens) -> None:
    server = TokenServer()
    server.failure = Denied("no")
    server.open.clear()
    waiting = [asyncio.ensure_future(tokens.get(REALM, BEARER, APP, server)) for _ in range(20)]
    while not server.asked:
        await asyncio.sleep(0)
    server.open.set()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(outcome, Denied) for outcome in outcomes)
    assert len(server.asked) == 1


async def test_a_dropped_token_is_not_used_again_and_the_others_are(tokens: Tokens) -> None:
    server = TokenServer()
    first = await tokens.get(REALM, BEARER, APP, server)
    second = await tokens.get(REALM, BEARER, OTHER, server)
    tokens.drop(first)
    tokens.drop("unknown")
    assert await tokens.get(REALM, BEARER, APP, server) == "t3"
    assert await tokens.get(REALM, BEARER, OTHER, server) == second


@pytest.mark.parametrize(
    ("realm", "bearer", "repository"),
    [
        pytest.param(URL("https://auth.test/other"), BEARER, APP, id="realm"),
        pytest.param(REALM, Bearer(BEARER.realm, "else.test", BEARER.scope), APP, id="service"),
        pytest.param(REALM, BEARER, OTHER, id="repository"),
        pytest.param(REALM, Bearer(BEARER.realm, BEARER.service, ("aws",)), APP, id="scope"),
    ],
)
async def test_a_token_is_not_used_for_anything_else(
    tokens: Tokens, realm: URL, bearer: Bearer, repository: Repository
) -> None:
    server = TokenServer()
    assert await tokens.get(REALM, BEARER, APP, server) == "t1"
    assert await tokens.get(realm, bearer, repository, server) == "t2"


async def test_the_scope_is_ours_whatever_the_challenge_says(tokens: Tokens) -> None:
    server = TokenServer()
    greedy = Bearer(
        BEARER.realm,
        "registry.test",
        ("repository:team/app:pull,push", "repository:secret:pull", "registry:catalog:*", "aws", "A"),
    )
    await tokens.get(URL("https://auth.test/token?account=x"), greedy, APP, server)
    query = server.asked[0].query
    assert query.getall("scope") == ["repository:team/app:pull", "aws"]
    assert query.getall("service") == ["registry.test"]
    assert query.getall("account") == ["x"]
    assert server.asked[0].origin() == URL("https://auth.test")


async def test_a_challenge_without_a_service_asks_without_one(tokens: Tokens) -> None:
    server = TokenServer()
    await tokens.get(REALM, Bearer(BEARER.realm, "", ()), APP, server)
    assert "service" not in server.asked[0].query


async def test_a_service_cannot_add_to_the_query(tokens: Tokens) -> None:
    server = TokenServer()
    await tokens.get(REALM, Bearer(BEARER.realm, "a&scope=repository:x:push#\r\n", ()), APP, server)
    assert server.asked[0].query.getall("scope") == ["repository:team/app:pull"]
    assert server.asked[0].query["service"] == "a&scope=repository:x:push#\r\n"


async def test_a_challenge_is_expected_again_for_that_repository_only(tokens: Tokens, clock: Clock) -> None:
    assert tokens.expected(HTTPS, APP) is None
    tokens.expect(HTTPS, APP, BEARER)
    assert tokens.expected(HTTPS, APP) == BEARER
    assert tokens.expected(HTTPS, OTHER) is None
    assert tokens.expected(PLAIN, APP) is None
    clock.now += 24 * 3600 + 1
    assert tokens.expected(HTTPS, APP) is None


@pytest.mark.parametrize("challenge", [BEARER, Basic()])
async def test_either_kind_of_challenge_is_expected_again(tokens: Tokens, challenge: Bearer | Basic) -> None:
    tokens.expect(HTTPS, APP, challenge)
    assert tokens.expected(HTTPS, APP) == challenge


# --- whose tokens ---

USER, OTHER_USER = Credential("user", "p1", source="a file"), Credential("user", "p2", source="a file")


async def test_a_token_is_for_the_credential_that_it_was_given_to(tokens: Tokens) -> None:
    server = TokenServer()
    given = [await tokens.get(REALM, BEARER, APP, server, whose) for whose in (None, USER, OTHER_USER) for _ in range(2)]
    assert given == ["t1", "t1", "t2", "t2", "t3", "t3"]
    same = Credential("user", "p1", source="another file", registry="x")
    assert await tokens.get(REALM, BEARER, APP, server, same) == "t2", "wherever it is from"
    assert await tokens.get(REALM, BEARER, OTHER, server, USER) == "t4"


async def test_the_failure_of_a_credential_is_its_own_and_the_answer_for_ten_seconds(tokens: Tokens, clock: Clock) -> None:
    """Its owner may just have been given the right."""
    server = TokenServer()
    server.failure = CredentialRefused("wrong")
    for _ in range(3):
        with pytest.raises(CredentialRefused, match="wrong"):
            await tokens.get(REALM, BEARER, APP, server, USER)
    assert len(server.asked) == 1
    server.failure = None
    assert await tokens.get(REALM, BEARER, APP, server) == "t2"
    assert await tokens.get(REALM, BEARER, APP, server, OTHER_USER) == "t3"
    clock.now += 9.9
    with pytest.raises(CredentialRefused):
        await tokens.get(REALM, BEARER, APP, server, USER)
    clock.now += 0.2
    assert await tokens.get(REALM, BEARER, APP, server, USER) == "t4"


@pytest.mark.parametrize(("whose", "seconds"), [(None, 60.0), (USER, 10.0)])
async def test_a_fresh_token_that_the_registry_refuses_is_not_asked_for_again_at_once(
    tokens: Tokens, clock: Clock, whose: Credential | None, seconds: float
) -> None:
    server = TokenServer()
    assert await tokens.get(REALM, BEARER, APP, server, whose) == "t1"
    tokens.refuse(REALM, BEARER, APP, Denied("not with that"), whose)
    clock.now += seconds - 0.1
    with pytest.raises(Denied, match="not with that"):
        await tokens.get(REALM, BEARER, APP, server, whose)
    clock.now += 0.2
    tokens.drop("t1")
    assert await tokens.get(REALM, BEARER, APP, server, whose) == "t2"


async def test_what_a_credential_was_given_and_refused_is_forgotten_with_it(tokens: Tokens) -> None:
    server = TokenServer()
    anonymous = await tokens.get(REALM, BEARER, APP, server)
    others = await tokens.get(REALM, BEARER, APP, server, OTHER_USER)
    assert await tokens.get(REALM, BEARER, APP, server, USER) == "t3"
    server.failure = CredentialRefused("wrong")
    with pytest.raises(CredentialRefused):
        await tokens.get(REALM, BEARER, OTHER, server, USER)
    server.failure = None
    tokens.forget(Credential("user", "p1"))
    assert await tokens.get(REALM, BEARER, APP, server, USER) == "t5"
    assert await tokens.get(REALM, BEARER, OTHER, server, USER) == "t6"
    assert await tokens.get(REALM, BEARER, APP, server) == anonymous
    assert await tokens.get(REALM, BEARER, APP, server, OTHER_USER) == others


async def test_what_a_credential_was_given_for_one_repository_can_be_renounced(tokens: Tokens) -> None:
    server = TokenServer()
    for whose in (None, USER):
        for repository in (APP, OTHER):
            await tokens.get(REALM, BEARER, repository, server, whose)
    tokens.renounce(APP, USER)
    assert await tokens.get(REALM, BEARER, APP, server, USER) == "t5"
    assert await tokens.get(REALM, BEARER, OTHER, server, USER) == "t4"
    assert await tokens.get(REALM, BEARER, APP, server) == "t1"
    tokens.renounce(APP, None)
    assert await tokens.get(REALM, BEARER, APP, server) == "t6"
    assert await tokens.get(REALM, BEARER, APP, server, USER) == "t5"


async def test_one_upstreams_tokens_are_unknown_to_another(clock: Clock) -> None:
    server = TokenServer()
    assert await Tokens(clock).get(REALM, BEARER, APP, server) == "t1"
    assert await Tokens(clock).get(REALM, BEARER, APP, server) == "t2"
