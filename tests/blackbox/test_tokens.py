"""What token servers may say, and what they are asked: T09, and T35 and F35 as far as anonymous access has them."""

from __future__ import annotations

import pytest

from tests.blackbox.helpers import REPO, TAG, blob, message, token_requests
from tests.conftest import UPSTREAM, RunningCache, StartCache, upstream
from tests.fakes.answers import Step, as_json, before_headers, endless, oci_error, status, too_many_requests, unauthorized
from tests.fakes.registry import ScriptedRegistry
from tests.fakes.tokens import TokenServer

SCOPE = f"repository:{REPO}:pull"


# --- T09: scopes and services ---


@pytest.mark.parametrize(
    "challenge",
    [
        'realm="{realm}",service="s",scope="repository:other:pull,push"',
        'realm="{realm}",service="s",scope="repository:team/app:pull,push,delete repository:other:* registry:catalog:*"',
        'realm="{realm}",service="s",scope="*"',
        'realm="{realm}",service="s",scope="push delete"',
        'realm="{realm}",service="s"',
        'realm="{realm}",service="s&scope=repository:other:push"',
        'realm="{realm}",service="s#&scope=registry:catalog:*"',
        'realm="{realm}",service="s\\",scope=\\"registry:catalog:*"',
        'realm="{realm}",service="s%0d%0aX-Evil: 1",scope="repository:other:pull%0d%0a"',
        'realm="{realm}",service="s",scope="repository:other\r\n :push"',
        'realm="{realm}",service="s",scope="x\r\nX-Evil: 1"',
        'realm="{realm}?scope=repository:other:pull,push&account=root&offline_token=true",service="s"',
        'realm="{realm}",service="s",account="root",client_id="docker",offline_token="true"',
        'realm="{realm}",service="\xff\xfe"',
    ],
)
async def test_t09_only_pulling_from_this_repository_is_ever_asked_for(
    cache: RunningCache, registry: ScriptedRegistry, challenge: str
) -> None:
    path = blob(registry)
    text = f"Bearer {challenge.format(realm=f'{registry.url}/token')}"
    registry.script("GET", path, unauthorized([text]))
    answer = await cache.get(path)
    if "\r\n" not in challenge and "\xff" not in challenge:  # these two may also be refused as what they are
        assert (answer.status, token_requests(registry)) == (200, 1)
    elif answer.status != 200:
        assert answer.status == 502
        assert message(answer)
    for request in registry.seen(path="/token"):
        assert request.params["scope"] == [SCOPE]
        assert len(request.params["service"]) == 1
        assert request.params.keys() == {"scope", "service"}
        assert not request.headers.has("X-Evil")
        assert not request.headers.has("Authorization")
    assert registry.malformed == 0


# --- T35, F35: tokens ---


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(as_json({"token": "a\r\nX-Evil: 1"}), id="CRLF"),
        pytest.param(as_json({"token": "a\nX-Evil: 1"}), id="LF"),
        pytest.param(as_json({"token": "a X-Evil"}), id="space"),
        pytest.param(as_json({"token": "\u00fc\u2028"}), id="not-ASCII"),
        pytest.param(as_json({"token": "a" * 10_000_000}), id="10MB"),
        pytest.param(as_json({"token": "a" * 20_000}), id="20KB"),
        pytest.param(as_json({"token": "a", "more": "a" * 100_000}), id="100KB-around-it"),
        pytest.param(endless("application/json"), id="endless"),
        pytest.param(as_json({"token": ""}), id="empty"),
        pytest.param(as_json({"token": 42}), id="number"),
        pytest.param(as_json({"token": ["a"]}), id="list"),
        pytest.param(as_json({}), id="none"),
        pytest.param(as_json(None), id="null"),
        pytest.param(status(200), id="no-body"),
        pytest.param(status(200, b"<html>log in</html>", "text/html"), id="page"),
        pytest.param(status(200, b"\xff\xfe{", "application/json"), id="not-UTF-8"),
        pytest.param(status(200, b"[" * 60_000, "application/json"), id="deep"),
        pytest.param(
            status(200, b'{"token":"a","expires_in":' + b"9" * 5000 + b"}", "application/json"), id="too-many-digits"
        ),
    ],
)
async def test_t35_an_unusable_token_is_not_used_and_not_asked_for_again(
    cache: RunningCache, registry: ScriptedRegistry, answer: Step
) -> None:
    path = blob(registry)
    registry.require_token()
    registry.script("GET", "/token", answer, forever=True)
    for _ in range(3):
        refused = await cache.get(path)
        assert refused.status == 502
        assert UPSTREAM in message(refused) or "token server" in message(refused)
    assert token_requests(registry) == 1
    assert not registry.heard("Authorization")
    assert not registry.heard("X-Evil")


@pytest.mark.parametrize(
    "life",
    [
        *("-1", "0", "1", "1e12", "1e400", "-1e400", "NaN", '"x"', '"300"', "null", "true", "[]"),
        pytest.param("1" * 400, id="400-digits"),
    ],
)
async def test_t35_whatever_life_is_stated_a_token_lives_a_while(
    cache: RunningCache, registry: ScriptedRegistry, life: str
) -> None:
    paths = [blob(registry, data) for data in (b"1", b"2", b"3")]
    registry.require_token()
    registry.tokens.issue([SCOPE], "good")
    registry.script(
        "GET", "/token", status(200, f'{{"token":"good","expires_in":{life}}}'.encode(), "application/json"), forever=True
    )
    for path in paths:
        assert (await cache.head(path)).status == 200
    assert token_requests(registry) == 1


async def test_t35_one_token_serves_many_requests_and_a_withdrawn_one_is_replaced(
    cache: RunningCache, registry: ScriptedRegistry
) -> None:
    """F35, a flap: a token that is refused leads to one fresh one."""
    image = registry.add_image(REPO, "1", [bytes([n]) for n in range(5)])
    registry.require_token()
    paths = [TAG, *(f"/v2/{REPO}/blobs/{digest}" for digest in image.layer_digests)]
    for path in paths[:3]:
        assert (await cache.get(path)).status == 200
    assert token_requests(registry) == 1
    assert len(registry.requests) == 1 + 1 + 3, "one challenge, one token, and each path once"
    registry.tokens.revoke()
    for path in paths[3:]:
        assert (await cache.get(path)).status == 200
    assert token_requests(registry) == 2


@pytest.mark.parametrize(
    ("answer", "code", "most"),
    [
        pytest.param(status(500), 502, 1, id="500"),
        pytest.param(status(503, headers={"Retry-After": "1"}), 502, 1, id="503"),
        pytest.param(too_many_requests(1), 429, 1, id="429"),
        pytest.param(too_many_requests(plain=True), 429, 1, id="429-plain"),
        pytest.param(oci_error(401, "UNAUTHORIZED"), 403, 1, id="401"),
        pytest.param(status(401, b"<html>", "text/html"), 502, 1, id="401-page"),
        pytest.param(status(404), 502, 1, id="404"),
        pytest.param(before_headers("rst"), 503, 3, id="reset"),  # one burst: a dropped connection is tried again
        pytest.param(before_headers("stall"), 503, 1, id="silent"),
    ],
)
async def test_f35_a_failing_token_server_is_asked_once_a_minute(
    registry: ScriptedRegistry, start_cache: StartCache, answer: Step, code: int, most: int
) -> None:
    cache = await start_cache(upstream(registry, timeouts={"token": "300ms"}))
    paths = [blob(registry, data) for data in (b"1", b"2", b"3")]
    registry.require_token()
    registry.script("GET", "/token", answer, forever=True)
    for path in paths:
        refused = await cache.get(path)
        assert refused.status == code
        assert f"token server of {UPSTREAM}" in message(refused)
        assert token_requests(registry) <= most
    assert not registry.heard("Authorization")


async def test_f35_a_token_server_slower_than_a_tag_may_take_is_asked_once_a_minute(
    registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    """``timeouts.head`` is shorter than ``timeouts.token``: whoever gives up first, the failure is remembered."""
    cache = await start_cache(upstream(registry, timeouts={"token": "600ms", "head": "200ms"}))
    registry.require_token()
    registry.script("GET", "/token", before_headers("stall"), forever=True)
    for _ in range(3):
        assert (await cache.head(TAG)).status == 503
    assert token_requests(registry) == 1


async def test_f35_a_registry_that_takes_no_token_any_more_causes_no_token_storm(
    cache: RunningCache, registry: ScriptedRegistry
) -> None:
    paths = [blob(registry, bytes([n])) for n in range(6)]
    registry.require_token()
    assert (await cache.get(paths[0])).status == 200
    registry.require_token(realm=f"{registry.url}/token", tokens=TokenServer())
    for path in paths[1:]:
        assert (await cache.get(path)).status == 502
    assert token_requests(registry) <= 2, "the first, and one fresh one"


@pytest.mark.parametrize(
    "lines",
    [
        ['Basic realm="x"', 'Bearer realm="{realm}",service="s"'],
        ['Bearer realm="{realm}",service="s"', 'Basic realm="x"'],
        ['Basic realm="x", Bearer realm="{realm}", service="s"'],
        ['Negotiate, Basic realm="a, Bearer realm=b", Bearer service="s" , realm="{realm}"'],
        ["NTLM", "Negotiate dG9rZW4=", 'bEARER REALM="{realm}",Service="s"'],
        ['Bearer realm="{realm}",service=s,error="invalid_token"'],
        [',, Bearer  realm = "{realm}" ,, service="s"'],
    ],
)
async def test_t35_the_bearer_challenge_is_found_among_others(
    cache: RunningCache, registry: ScriptedRegistry, lines: list[str]
) -> None:
    path = blob(registry)
    registry.script("GET", path, unauthorized([line.format(realm=f"{registry.url}/token") for line in lines]))
    assert (await cache.get(path)).status == 200
    (asked,) = registry.seen(path="/token")
    assert asked.params == {"service": ["s"], "scope": [SCOPE]}
    assert registry.requests[-1].headers.get("Authorization") == f"Bearer {registry.tokens.issued[0]}"
