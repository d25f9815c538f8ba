"""What each failure of an upstream becomes for a client: F35."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.blackbox.oracle import blob_path, error_of, manifest_path, pulls_well
from tests.conftest import RunningCache
from tests.fakes import answers
from tests.fakes.answers import Step
from tests.fakes.content import digest_of
from tests.fakes.registry import ScriptedRegistry

REPO = "team/app"
PAGE = b"<html><body>Blocked by your administrator</body></html>"

FAILING: dict[str, tuple[Step, int, str]] = {
    "429": (answers.too_many_requests(), 429, "TOOMANYREQUESTS"),
    "429 with Retry-After": (answers.too_many_requests(7), 429, "TOOMANYREQUESTS"),
    "429 with a date": (answers.too_many_requests("Wed, 21 Oct 2026 07:28:00 GMT"), 429, "TOOMANYREQUESTS"),
    "429 in plain text": (answers.too_many_requests(7, plain=True), 429, "TOOMANYREQUESTS"),
    "408": (answers.status(408), 502, "UNKNOWN"),
    "500": (answers.oci_error(500, "UNKNOWN"), 502, "UNKNOWN"),
    "500 page": (answers.status(500, PAGE, "text/html"), 502, "UNKNOWN"),
    "502": (answers.status(502, PAGE, "text/html"), 502, "UNKNOWN"),
    "503": (answers.status(503, b"", "text/plain", {"Retry-After": "1"}), 502, "UNKNOWN"),
    "504": (answers.status(504), 502, "UNKNOWN"),
    "401 of a middlebox": (answers.status(401, PAGE, "text/html"), 502, "UNKNOWN"),
    "403 of a middlebox": (answers.status(403, PAGE, "text/html"), 502, "UNKNOWN"),
    "403 in plain text": (answers.status(403, b"forbidden"), 502, "UNKNOWN"),
    "200 of a middlebox": (answers.status(200, PAGE, "text/html"), 502, "UNKNOWN"),
    "511": (answers.status(511, PAGE, "text/html"), 502, "UNKNOWN"),
    "204": (answers.status(204), 502, "UNKNOWN"),
    "304": (answers.status(304), 502, "UNKNOWN"),
    "redirect to nowhere": (answers.status(307), 502, "UNKNOWN"),
    "redirect to no host": (answers.redirect("//[]@"), 502, "UNKNOWN"),
    "redirect to file": (answers.redirect("file:///etc/passwd"), 502, "UNKNOWN"),
    "redirect to itself": (answers.redirect("?again"), 502, "UNKNOWN"),
    "not HTTP": (answers.raw(b"SSH-2.0-OpenSSH_9.6\r\n"), 502, "UNKNOWN"),
    "no answer": (answers.before_headers("rst"), 503, "UNAVAILABLE"),
}
REFUSING: dict[str, tuple[Step, int, str]] = {
    "401 of the registry": (answers.oci_error(401, "UNAUTHORIZED"), 403, "DENIED"),
    "401 with a challenge it has no answer to": (answers.unauthorized(['Basic realm="x"']), 403, "DENIED"),
    "403 of the registry": (answers.oci_error(403, "DENIED", "requested access is denied"), 403, "DENIED"),
    "404 of the registry": (answers.oci_error(404, "MANIFEST_UNKNOWN"), 404, "MANIFEST_UNKNOWN"),
}
failing = pytest.mark.parametrize("kind", FAILING)
refusing = pytest.mark.parametrize("kind", REFUSING)


@pytest.mark.parametrize("kind", [*FAILING, *REFUSING])
@pytest.mark.parametrize("what", ["tag", "manifest", "blob"])
async def test_what_is_not_held_gets_the_status_that_fits(
    cache: RunningCache, registry: ScriptedRegistry, kind: str, what: str
) -> None:
    """F35: upstream's answer -> status and code; the text names the upstream; nothing of it may be cached."""
    step, status, code = {**FAILING, **REFUSING}[kind]
    digest = digest_of(b"content")
    path = {"tag": manifest_path("1"), "manifest": manifest_path(digest), "blob": blob_path(digest)}[what]
    script = registry.script("*", lambda request: True, step, forever=True)
    answer = await cache.get(path)
    got_status, got_code, message = error_of(answer)
    assert (got_status, got_code) == (status, code.replace("MANIFEST", "BLOB") if what == "blob" else code)
    if (kind, what) != ("200 of a middlebox", "blob"):  # known by its digest only
        assert "registry.test" in message
    assert PAGE.decode() not in message
    assert answer.headers.get("Cache-Control") == "private, no-store"
    assert answer.headers.get("WWW-Authenticate") is None
    expected = {"429 with Retry-After": "7", "429 in plain text": "7", "429 with a date": "Wed, 21 Oct 2026 07:28:00 GMT"}
    assert answer.headers.get("Retry-After") == expected.get(kind)
    head = await cache.head(path)
    assert (head.status, head.body) == (status, b"") or (kind, what) == ("200 of a middlebox", "blob")
    script.cancel()
    image = registry.add_image(REPO, "1", [b"content"])
    target, truth = {
        "tag": (path, image.data),
        "manifest": (manifest_path(image.digest), image.data),
        "blob": (path, b"content"),
    }[what]
    await pulls_well(cache, target, truth)


@failing
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_held_tag_is_served_stale_while_its_upstream_is_failing(
    cache: RunningCache, registry: ScriptedRegistry, kind: str, method: str
) -> None:
    """F35: every failure of the upstream, with a Warning; without one as soon as it is well again."""
    image = registry.add_image(REPO, "1", [b"layer"])
    await pulls_well(cache, manifest_path("1"), image.data)
    script = registry.script("*", lambda request: True, FAILING[kind][0], forever=True)
    for _ in range(2):
        answer = await (cache.get if method == "GET" else cache.head)(manifest_path("1"))
        assert (answer.status, answer.body) == (200, image.data if method == "GET" else b"")
        assert answer.headers.get("Docker-Content-Digest") == image.digest
        warning = answer.headers.get("Warning") or ""
        assert warning.startswith("299 - ")
        assert "registry.test" in warning
    script.cancel()
    answer = await cache.get(manifest_path("1"))
    assert (answer.status, answer.body, answer.headers.get("Warning")) == (200, image.data, None)


@failing
async def test_a_tag_that_moved_is_served_stale_while_its_new_content_cannot_be_had(
    cache: RunningCache, registry: ScriptedRegistry, kind: str
) -> None:
    """F35: HEAD tells of a new digest, GET fails, as often as it is asked."""
    old = registry.add_image(REPO, "1", [b"old"])
    await pulls_well(cache, manifest_path("1"), old.data)
    new = registry.add_image(REPO, "1", [b"new"])
    script = registry.script("GET", lambda request: True, FAILING[kind][0], forever=True)
    for _ in range(3):
        answer = await cache.get(manifest_path("1"))
        assert (answer.status, answer.body) == (200, old.data)
        assert "registry.test" in (answer.headers.get("Warning") or "")
    script.cancel()
    await pulls_well(cache, manifest_path("1"), new.data)


@refusing
async def test_a_registry_that_answers_no_is_not_overruled_by_the_cache(
    cache: RunningCache, registry: ScriptedRegistry, kind: str
) -> None:
    """F35: a refusal or a 404 by the registry itself is an answer, not a failure."""
    step, status, code = REFUSING[kind]
    image = registry.add_image(REPO, "1", [b"layer"])
    await pulls_well(cache, manifest_path("1"), image.data)
    script = registry.script("*", manifest_path("1"), step, forever=True)
    assert error_of(await cache.get(manifest_path("1")))[:2] == (status, code)
    assert (await cache.head(manifest_path("1"))).status == status
    script.cancel()
    await pulls_well(cache, manifest_path("1"), image.data)


async def test_a_tag_that_flaps_comes_back(cache: RunningCache, registry: ScriptedRegistry) -> None:
    """F35: 404 flaps; each answer is what the registry says at the time."""
    image = registry.add_image(REPO, "1", [b"layer"])
    missing = answers.oci_error(404, "MANIFEST_UNKNOWN")
    for _ in range(3):
        await pulls_well(cache, manifest_path("1"), image.data)
        registry.script("*", manifest_path("1"), missing)
        assert error_of(await cache.get(manifest_path("1")))[:2] == (404, "MANIFEST_UNKNOWN")
    await pulls_well(cache, manifest_path(image.digest), image.data)


@pytest.mark.parametrize("kind", ["401 of a middlebox", "403 of a middlebox"])
async def test_a_middlebox_that_asks_for_a_login_is_failing(
    cache: RunningCache, registry: ScriptedRegistry, kind: str
) -> None:
    """F35: an HTML page with a Basic challenge of a proxy is nobody's refusal, to HEAD as to GET."""
    image = registry.add_image(REPO, "1", [b"layer"])
    await pulls_well(cache, manifest_path("1"), image.data)
    page = answers.compose(FAILING[kind][0], answers.with_headers({"WWW-Authenticate": 'Basic realm="Corporate proxy"'}))
    registry.script("*", lambda request: True, page, forever=True)
    answer = await cache.get(manifest_path("1"))
    assert (answer.status, answer.body) == (200, image.data)
    assert "registry.test" in (answer.headers.get("Warning") or "")


# --- no storm ---


async def ask_often(cache: RunningCache, count: int = 10) -> set[int]:
    """Statuses of many askers, half of them at once and half in turn."""
    at_once = await asyncio.gather(*(cache.get(manifest_path("1")) for _ in range(count)))
    in_turn = [await cache.get(manifest_path("1")) for _ in range(count)]
    return {answer.status for answer in (*at_once, *in_turn)}


@pytest.mark.parametrize("before", ["never worked", "worked before"])
async def test_a_storm_of_401_is_not_answered_by_a_storm_of_token_requests(
    cache: RunningCache, registry: ScriptedRegistry, before: str
) -> None:
    """F35: a registry that calls every token invalid costs one fresh token, not one for each client; it is failing, and has
    not refused anybody (RFC 6750 section 3.1: that would be ``insufficient_scope``)."""
    image = registry.add_image(REPO, "1", [b"layer"])
    registry.require_token()
    if before == "worked before":
        await pulls_well(cache, manifest_path("1"), image.data)
    asked = registry.count("GET", "/token")
    registry.tokens.allows = lambda token, scope: None  # type: ignore[method-assign]
    assert await ask_often(cache) == {200 if before == "worked before" else 502}
    assert registry.count("GET", "/token") - asked <= 2


@pytest.mark.parametrize("step", ["500", "429", "401 of a middlebox", "no answer", "not HTTP"])
async def test_a_failing_token_server_is_asked_once_a_minute(
    cache: RunningCache, registry: ScriptedRegistry, step: str
) -> None:
    """F35: one attempt of at most a few tries; everybody gets its outcome, which names the upstream."""
    registry.add_image(REPO, "1", [b"layer"])
    registry.require_token()
    registry.script("GET", "/token", FAILING[step][0], forever=True)
    assert await ask_often(cache) == {FAILING[step][1]}
    assert registry.count("GET", "/token") <= (4 if step == "no answer" else 1)
    assert "registry.test" in error_of(await cache.get(manifest_path("1")))[2]


async def test_many_askers_of_a_failing_upstream_share_one_attempt(cache: RunningCache, registry: ScriptedRegistry) -> None:
    """F35: single flight, for what is held and for what is not."""
    registry.add_image(REPO, "1", [b"layer"])
    go_on = asyncio.Event()
    registry.script(
        "*", manifest_path("1"), answers.compose(answers.too_many_requests(30), answers.gate(go_on)), forever=True
    )
    asking = [asyncio.create_task(cache.get(manifest_path("1"))) for _ in range(50)]
    await registry.wait_for(lambda: registry.seen())
    go_on.set()
    for answer in await asyncio.gather(*asking):
        assert answer.status == 429
        assert json.loads(answer.body)["errors"][0]["code"] == "TOOMANYREQUESTS"
    assert len(registry.seen()) <= 2
