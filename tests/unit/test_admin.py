"""The listener of the operators: what everybody may ask, what wants the token, and what a token is."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from proxy import admin
from proxy.admin import Action, AdminToken, AdminTokenUnusable
from proxy.errors import NameInvalid
from proxy.metrics import Metrics
from tests.conftest import Pairs
from tests.fakes.client import WireResponse, fetch

TOKEN = "0123456789abcdef"


class Running:
    """The listener on a port of its own."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def get(self, target: str, headers: Pairs | None = None, method: str = "GET") -> WireResponse:
        return await fetch("127.0.0.1", self.port, method, target, headers or [])


async def explain(query: Mapping[str, str]) -> dict[str, Any]:
    if "image" not in query:
        raise ValueError("which image?")
    if query["image"] == "wrong":
        raise NameInvalid("not an image")
    return {"image": query["image"]}


ACTIONS = {"/explain": Action(explain), "/purge": Action(explain, is_change=True)}


class Start:
    """Starts listeners."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack

    async def __call__(self, token: AdminToken | None = None, *, is_ready: bool = True) -> Running:
        runner = web.ServerRunner(admin.listener(Metrics(), lambda: is_ready, ACTIONS, token))
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return Running(runner.addresses[0][1])


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    async with AsyncExitStack() as stack:
        yield Start(stack)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    return path


def shown(token: str, scheme: str = "Bearer") -> Pairs:
    return [("Authorization", f"{scheme} {token}")]


async def test_without_a_token_everything_is_told_to_who_reaches_it(start: Start) -> None:
    running = await start()
    paths = ("/healthz", "/readyz", "/metrics", "/explain?image=debian", "/other")
    assert [(await running.get(path)).status for path in paths] == [200, 200, 200, 200, 404]


async def test_with_a_token_health_and_readiness_are_for_all_and_the_rest_for_who_shows_it(
    start: Start, token_file: Path
) -> None:
    """kubelet's probes have no token."""
    running = await start(AdminToken(token_file))
    for path in ("/healthz", "/readyz"):
        assert (await running.get(path)).status == 200
    for path in ("/metrics", "/explain?image=a", "/other"):
        refused = await running.get(path)
        assert (refused.status, refused.headers.get("WWW-Authenticate")) == (401, 'Bearer realm="pullcache admin"')
        assert TOKEN.encode() not in refused.body
        assert (await running.get(path, shown(TOKEN))).status == (404 if path == "/other" else 200)
    assert b"pullcache_requests" in (await running.get("/metrics", shown(TOKEN))).body


@pytest.mark.parametrize(
    "headers",
    [
        shown(TOKEN[:-1]),
        shown(TOKEN + "0"),
        shown(TOKEN.upper()),
        shown(""),
        shown("\u00e9" * 16),
        shown(TOKEN, "Basic"),
        [("Authorization", TOKEN)],
        shown("x" * 7000),
    ],
)
async def test_what_is_not_the_token_opens_nothing(start: Start, token_file: Path, headers: Pairs) -> None:
    running = await start(AdminToken(token_file))
    assert (await running.get("/metrics", headers)).status == 401


async def test_what_is_no_change_is_read_only_whoever_asks(start: Start, token_file: Path) -> None:
    running = await start(AdminToken(token_file))
    for method in ("POST", "PUT", "DELETE"):
        assert (await running.get("/metrics", shown(TOKEN), method)).status == 405
        assert (await running.get("/explain?image=a", shown(TOKEN), method)).status == 405


JSON: Pairs = [("Content-Type", "application/json")]


async def test_a_change_is_made_by_post_with_the_token(start: Start, token_file: Path) -> None:
    running = await start(AdminToken(token_file))
    made = await running.get("/purge?image=a", [*shown(TOKEN), *JSON], "POST")
    assert (made.status, json.loads(made.body)) == (200, {"image": "a"})
    assert (await running.get("/purge?image=a", JSON, "POST")).status == 401
    for method in ("GET", "HEAD", "PUT", "DELETE"):
        refused = await running.get("/purge?image=a", [*shown(TOKEN), *JSON], method)
        assert (refused.status, refused.headers.get("Allow")) == (405, "POST")


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a"])
async def test_no_web_page_can_make_a_change_unasked(start: Start, kind: str) -> None:
    """On loopback a browser reaches it too: what a page may send without being asked makes no change."""
    headers: Pairs = [("Content-Type", kind)] if kind else []
    assert (await (await start()).get("/purge?image=a", headers, "POST")).status == 415


async def test_a_cache_that_stops_is_not_ready_and_alive(start: Start) -> None:
    running = await start(is_ready=False)
    assert [(await running.get(path)).status for path in ("/healthz", "/readyz")] == [200, 503]


async def test_explanations_are_json_and_so_is_that_there_is_none(start: Start) -> None:
    running = await start()
    for image, expected in (("debian", {"image": "debian"}), ("wrong", {"error": "not an image"})):
        answer = await running.get(f"/explain?image={image}")
        assert (answer.status, json.loads(answer.body)) == (200, expected)


async def test_a_question_that_cannot_be_understood_is_400(start: Start) -> None:
    answer = await (await start()).get("/explain")
    assert (answer.status, answer.headers.get("Content-Type")) == (400, "application/json")
    assert json.loads(answer.body) == {"error": "which image?"}


# --- the token ---


def test_a_token_that_is_exchanged_is_used_when_it_is_read_again(token_file: Path) -> None:
    token = AdminToken(token_file)
    token_file.write_text("fedcba9876543210")
    assert token.opens(f"Bearer {TOKEN}")
    token.reread()
    assert not token.opens(f"Bearer {TOKEN}")
    assert token.opens("Bearer fedcba9876543210")


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"s3cr3t", b" " * 40, b"s3cr3t \n" + b" " * 40])
def test_a_file_without_a_token_is_refused_and_what_was_good_stays(token_file: Path, content: bytes | None) -> None:
    """An empty one would open the door to all."""
    token = AdminToken(token_file)
    token_file.unlink()
    if content is not None:
        token_file.write_bytes(content)
    for attempt in (token.reread, lambda: AdminToken(token_file)):
        with pytest.raises(AdminTokenUnusable) as raised:
            attempt()
        assert f"adminListener.tokenFile {token_file}: " in str(raised.value)
        assert "s3cr3t" not in str(raised.value)
        assert raised.value.__cause__ is None
    assert token.opens(f"Bearer {TOKEN}")


@pytest.mark.parametrize(
    "content", ["0123456789 abcdef", "0123456789abcd!ef", "pass-phrase-with-\u00e9-in-it", "one-line-of-two\nand-another"]
)
def test_a_token_that_no_header_can_show_is_refused(token_file: Path, content: str) -> None:
    """RFC 6750 section 2.1: nobody could ever open the door with it, and nobody would know why."""
    token_file.write_text(content)
    with pytest.raises(AdminTokenUnusable) as raised:
        AdminToken(token_file)
    assert str(token_file) in str(raised.value)
    assert content[:10] not in str(raised.value)
