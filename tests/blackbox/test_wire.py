"""The listener against hostile bytes: smuggling, splitting, slow and many connections, forged log lines, the parser."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from proxy import listener, logs, send
from tests.conftest import RunningCache, settings
from tests.fakes.answers import oci_error, too_many_requests, with_headers
from tests.fakes.client import NoResponse, fetch, finish, open_stream, open_wire, raw_exchange, read_head
from tests.fakes.registry import ScriptedRegistry

TAG = "/v2/team/app/manifests/1"

# --- T40: one request, one answer ---

ONE = b"GET /v2/ HTTP/1.1\r\nHost: x\r\n"
END = b"GET /v2/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
HIDDEN = b"GET /v2/smuggled/x/manifests/1 HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = ONE + b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"\r\n0\r\n\r\n"

REFUSED = {
    "CL and TE": CHUNKED + b"Content-Length: 4\r\n" + CHUNKS + HIDDEN,
    "TE and CL": ONE + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n" + CHUNKS + HIDDEN,
    "two CL": ONE + b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    "CL list": ONE + b"Content-Length: 0, %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    "CL plus": ONE + b"Content-Length: +%d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    "CL minus": ONE + b"Content-Length: -1\r\n\r\n" + HIDDEN,
    "CL hex": ONE + b"Content-Length: 0x10\r\n\r\n" + HIDDEN,
    "CL overflow": ONE + b"Content-Length: 18446744073709551616\r\n\r\n" + HIDDEN,
    "CL space": ONE + b"Content-Length : %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    "CL empty": ONE + b"Content-Length: \r\n\r\n" + HIDDEN,
    "two TE": CHUNKED + b"Transfer-Encoding: chunked\r\n" + CHUNKS + HIDDEN,
    "TE identity": ONE + b"Transfer-Encoding: identity\r\n\r\n" + HIDDEN,
    "TE not last": ONE + b"Transfer-Encoding: chunked, gzip\r\n" + CHUNKS + HIDDEN,
    "TE unknown": ONE + b"Transfer-Encoding: xchunked\r\n" + CHUNKS + HIDDEN,
    "TE control": ONE + b"Transfer-Encoding: \x0bchunked\r\n" + CHUNKS + HIDDEN,
    "TE space": ONE + b"Transfer-Encoding : chunked\r\n" + CHUNKS + HIDDEN,
    "TE quoted": ONE + b'Transfer-Encoding: "chunked"\r\n' + CHUNKS + HIDDEN,
    "TE folded": ONE + b"Transfer-Encoding:\r\n chunked\r\n" + CHUNKS + HIDDEN,
    "TE in 1.0": CHUNKED.replace(b"1.1", b"1.0") + CHUNKS + HIDDEN,
    "two Host": ONE + b"Host: y\r\n\r\n" + HIDDEN,
    "no Host": b"GET /v2/ HTTP/1.1\r\n\r\n" + HIDDEN,
    "bare LF": b"GET /v2/ HTTP/1.1\nHost: x\n\n" + HIDDEN,
    "bare LF in a field": ONE + b"X: y\nZ: z\r\n\r\n" + HIDDEN,
    "bare CR": ONE + b"X: y\rZ: z\r\n\r\n" + HIDDEN,
    "obs-fold": ONE + b"X: a\r\n b\r\n\r\n" + HIDDEN,
    "NUL": ONE + b"X: a\0b\r\n\r\n" + HIDDEN,
    "field without name": ONE + b": y\r\n\r\n" + HIDDEN,
    "space first": b"GET /v2/ HTTP/1.1\r\n Host: x\r\n\r\n" + HIDDEN,
    "chunk extension LF": CHUNKED + b"\r\n1;a\nb\r\nx\r\n0\r\n\r\n" + HIDDEN,
    "chunk LF": CHUNKED + b"\r\n1\nx\n0\n\n" + HIDDEN,
    "chunk size": CHUNKED + b"\r\nzz\r\nx\r\n0\r\n\r\n" + HIDDEN,
    "chunk 0x": CHUNKED + b"\r\n0x1\r\nx\r\n0\r\n\r\n" + HIDDEN,
    "chunk overflow": CHUNKED + b"\r\nfffffffffffffffff\r\nx\r\n0\r\n\r\n" + HIDDEN,
    "chunk too long": CHUNKED + b"\r\n1\r\nxyz\r\n0\r\n\r\n" + HIDDEN,
    "HTTP/0.9": b"GET /v2/\r\n\r\n" + HIDDEN,
    "HTTP/1.11": b"GET /v2/ HTTP/1.11\r\nHost: x\r\n\r\n" + HIDDEN,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + HIDDEN,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + HIDDEN,
    "many fields": ONE + b"".join(b"X%d: y\r\n" % number for number in range(100)) + b"\r\n" + HIDDEN,
    "long field": ONE + b"X: " + b"a" * 20_000 + b"\r\n\r\n" + HIDDEN,
}
ANSWERED = {
    "alone": END,
    "pipelined": ONE + b"\r\n" + ONE + b"\r\n" + END,
    "body": ONE + b"Content-Length: 5\r\n\r\nhello" + END,
    "body like a request": ONE + b"Content-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN.replace(b"GET", b"\0ET") + END,
    "chunks": CHUNKED + b"\r\n5\r\nhello\r\n0\r\n\r\n" + END,
    "chunk extension": CHUNKED + b"\r\n1;a=b\r\nx\r\n0;c\r\n\r\n" + END,
    "TE case and tab": ONE + b"Transfer-Encoding:\tChUnKeD\r\n" + CHUNKS + END,
    "HEAD": ONE.replace(b"GET", b"HEAD") + b"\r\n" + END,
    "405": ONE.replace(b"GET", b"POST") + b"Content-Length: 5\r\n\r\nhello" + END,
    "404": ONE.replace(b"/v2/", b"/") + b"\r\n" + END,
    "expect": ONE + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\nhello" + END,
}


def statuses(answers: bytes) -> list[int]:
    """The statuses of final answers; no body here has a line like them."""
    return [int(code) for code in re.findall(rb"HTTP/1\.[01] ([2-5]\d\d) ", answers)]


async def test_t40_an_ambiguous_request_is_refused_once_and_its_connection_closed(
    cache: RunningCache, registry: ScriptedRegistry
) -> None:
    found = {case: statuses(await raw_exchange(cache.host, cache.port, data)) for case, data in REFUSED.items()}
    assert {case: answers for case, answers in found.items() if answers != [400]} == {}
    assert registry.connections == 0


@pytest.mark.parametrize("case", ANSWERED)
async def test_t40_there_are_as_many_answers_as_requests(cache: RunningCache, registry: ScriptedRegistry, case: str) -> None:
    data = ANSWERED[case]
    for piece in (1, 7, len(data)):
        async with await open_wire(cache.host, cache.port) as wire:
            for start in range(0, len(data), piece):
                await wire.send(data[start : start + piece])
                await asyncio.sleep(0)  # lets the server see pieces; which of them come together does not matter
            while await wire.more():
                pass
            found = statuses(wire.take(1 << 20))
        assert len(found) == len(re.findall(rb"(?:GET|HEAD|POST) /", data)), piece
    assert registry.connections == 0


@pytest.mark.parametrize("trailer", [b"Host: evil", b"Content-Length: 50", b"Transfer-Encoding: chunked", b"X: y"])
async def test_t40_trailers_change_nothing(cache: RunningCache, registry: ScriptedRegistry, trailer: bytes) -> None:
    answers = await raw_exchange(cache.host, cache.port, CHUNKED + b"\r\n0\r\n" + trailer + b"\r\n\r\n" + END)
    assert statuses(answers) in ([400], [200, 200])


@pytest.mark.parametrize("protocol", [b"h2c", b"foo", b"websocket"])
async def test_t40_what_follows_a_refused_upgrade_is_answered_or_the_connection_closed(
    cache: RunningCache, protocol: bytes
) -> None:
    async with await open_wire(cache.host, cache.port, within=3) as wire:
        await wire.send(ONE + b"Connection: Upgrade\r\nUpgrade: " + protocol + b"\r\n\r\n" + END)
        while await wire.more():
            pass
        assert statuses(wire.take(1 << 20)) in ([200], [200, 200])


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("size", [1, 64 * 1024])
async def test_t40_a_small_body_is_drained_and_ignored(
    cache: RunningCache, registry: ScriptedRegistry, framing: str, size: int
) -> None:
    image = registry.add_image("team/app", "1", [b"layer"])
    field = b"Content-Length: %d" % size if framing == "length" else b"Transfer-Encoding: chunked"
    body = b"x" * size if framing == "length" else b"%x\r\n" % size + b"x" * size + b"\r\n0\r\n\r\n"
    async with await open_wire(cache.host, cache.port) as wire:
        for _ in range(3):
            await wire.send(b"GET " + TAG.encode() + b" HTTP/1.1\r\nHost: x\r\n" + field + b"\r\n\r\n" + body)
            assert (await finish(await read_head(wire, "GET"))).body == image.data


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_t40_a_large_body_is_413_and_the_end_of_its_connection(
    cache: RunningCache, registry: ScriptedRegistry, framing: str
) -> None:
    size = 64 * 1024 + 1
    field = b"Content-Length: %d" % size if framing == "length" else b"Transfer-Encoding: chunked"
    body = b"x" * size if framing == "length" else b"%x\r\n" % size + b"x" * size + b"\r\n0\r\n\r\n"
    answers = await raw_exchange(cache.host, cache.port, ONE + field + b"\r\n\r\n" + body + HIDDEN)
    assert statuses(answers) == [413]
    assert b"SIZE_INVALID" in answers
    assert registry.connections == 0


# --- T41: nothing of the upstream's headers but what is checked ---

CANARY = "canary"
HOSTILE = [
    *[
        (name, f"{CANARY}=1")
        for name in ("Set-Cookie", "X-Evil", "Server", "Via", "Warning", "Location", "Content-Disposition")
    ],
    *[(name, CANARY) for name in ("Link", "WWW-Authenticate", "Refresh", "Access-Control-Allow-Origin", "Vary", "Pragma")],
    *[
        (name, CANARY)
        for name in ("Cache-Control", "Alt-Svc", "Docker-Distribution-Api-Version", "OCI-Namespace", "Cache-Status")
    ],
    *[("X-Long", CANARY * 1000), ("X-Bits", f"{CANARY}\xff\x80"), ("Content-Language", CANARY), ("Retry-After", CANARY)],
    *[("ETag", f'"{CANARY}"'), ("Last-Modified", CANARY), ("Age", CANARY), ("Strict-Transport-Security", CANARY)],
    ("Pullcache-Decision", CANARY),
]


@pytest.mark.parametrize("kind", ["tag", "digest", "blob", "denied", "limited"])
async def test_t41_hostile_headers_of_an_upstream_do_not_reach_clients(
    cache: RunningCache, registry: ScriptedRegistry, kind: str
) -> None:
    image = registry.add_image("team/app", "1", [b"layer"])
    path = {"digest": f"/v2/team/app/manifests/{image.digest}", "blob": f"/v2/team/app/blobs/{image.layer_digests[0]}"}
    target = path.get(kind, TAG)
    if kind in ("denied", "limited"):
        registry.script("*", target, oci_error(403, "DENIED", CANARY[:0]) if kind == "denied" else too_many_requests(CANARY))
    registry.script("*", target, with_headers(HOSTILE), forever=True)
    expected = {"denied": {403, 200}, "limited": {429, 200}}.get(kind, {200})
    for method in ("GET", "HEAD", "GET"):
        answer = await fetch(cache.host, cache.port, method, target)
        assert answer.status in expected
        assert CANARY not in str(answer.headers).lower()
        assert all(
            character.isprintable() and character.isascii() for pair in answer.headers for item in pair for character in item
        )


@pytest.mark.parametrize("value", ["text/html", f"{CANARY}/x", "a" * 9000, "x\xff/y", "\ttext", "application/json\x01"])
async def test_t41_a_media_type_that_is_none_of_a_manifest_does_not_reach_clients(
    cache: RunningCache, registry: ScriptedRegistry, value: str
) -> None:
    registry.add_image("team/app", "1", [b"layer"])
    registry.script("*", TAG, with_headers({"Content-Type": value, "Docker-Content-Digest": CANARY}), forever=True)
    for method in ("GET", "HEAD"):
        answer = await fetch(cache.host, cache.port, method, TAG)
        sent = answer.headers.get("Content-Type") or ""
        assert sent in ("application/json", "application/vnd.oci.image.manifest.v1+json"), (method, answer.status)
        assert CANARY not in str(answer.headers)


# --- T42: slow clients, and many ---


@pytest.mark.parametrize(
    ("start", "earlier"), [(b"", False), (b"GET /v2/ HTTP/1.1\r\nX: ", False), (b"GET /v2/ HTTP/1.1\r\nX: ", True)]
)
async def test_t42_a_header_that_does_not_end_is_cut_while_others_are_served(
    cache: RunningCache, monkeypatch: pytest.MonkeyPatch, start: bytes, earlier: bool
) -> None:
    monkeypatch.setattr(listener, "HEADER_SECONDS", 0.3)
    async with await open_wire(cache.host, cache.port) as wire:
        if earlier:
            await wire.send(ONE + b"\r\n")
            assert (await finish(await read_head(wire, "GET"))).status == 200
        await wire.send(start)
        async with asyncio.timeout(10):
            while wire.ending is None:
                assert (await cache.get("/v2/")).status == 200
                if start and not wire.transport.is_closing():
                    await wire.send(b"a")
                else:
                    await wire.more()
        assert statuses(wire.take(1 << 16)) == []


async def test_t42_a_reader_that_takes_nothing_is_cut_and_counted_while_others_are_served(
    cache: RunningCache, registry: ScriptedRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(send, "_SLOW_SECONDS", 0.3)
    data = os.urandom(1 << 20) * 24
    target = f"/v2/team/app/blobs/{registry.add_blob('team/app', data)}"
    for state in ("cold", "held"):
        before = cache.metric("slow_readers_total")
        stream = await open_stream(cache.host, cache.port, "GET", target, receive_buffer=4096)
        async with asyncio.timeout(20):
            while cache.metric("slow_readers_total") == before:
                answer = await cache.get(target)
                assert answer.body == data, state
                assert answer.clean_end
        assert await stream.read_all() != data
        assert not stream.clean_end
        await stream.close()
        await cache.settled()


@pytest.mark.parametrize("bound", ["MAX_PER_ADDRESS", "MAX_CONNECTIONS"])
async def test_t42_connections_beyond_the_bound_are_turned_away_and_those_before_are_served(
    cache: RunningCache, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(listener, bound, 5)
    wires = [await open_wire(cache.host, cache.port) for _ in range(5)]
    for _ in range(3):
        for wire in wires:
            await wire.send(ONE + b"\r\n")
            assert (await finish(await read_head(wire, "GET"))).status == 200
        with pytest.raises((NoResponse, ConnectionError)):
            await cache.get("/v2/")
    assert (await fetch(cache.host, cache.admin_port, "GET", "/healthz")).status == 200
    await wires.pop().close()
    async with asyncio.timeout(5):
        while cache.metric("connections") > 4:
            await asyncio.sleep(0.002)
    assert (await cache.get("/v2/")).status == 200
    for wire in wires:
        await wire.close()


# --- T47: log lines ---


@pytest.fixture(params=["json", "text"])
def lines(request: pytest.FixtureRequest) -> Iterator[tuple[str, io.StringIO]]:
    """What is logged, in either format."""
    root, server = logging.getLogger(), logging.getLogger("aiohttp.server")
    before = root.handlers[:], root.level, server.level
    stream = io.StringIO()
    logs.set_up(request.param, "debug", stream)
    yield request.param, stream
    root.handlers[:], root.level, server.level = before


FORGED = '"}\\n{"level":"error","message":"forged"}'


async def test_t47_a_client_cannot_forge_a_log_line(
    cache: RunningCache, registry: ScriptedRegistry, lines: tuple[str, io.StringIO]
) -> None:
    log_format, stream = lines
    series = len((await fetch(cache.host, cache.admin_port, "GET", "/metrics")).body.splitlines())
    evil = ["%0a", "%0d%0aforged", "%e2%80%a8", "%1b[31m", "%00", FORGED, "\x85forged", "\xe2\x80\xa8forged", "x" * 5000]
    sent = 0
    for text in evil:
        target = text.replace(" ", "%20")
        for path in (f"/v2/{target}/manifests/1", f"{TAG}?ns={target}", f"/{target}", f"/v2/a/manifests/{target}"):
            answer = await cache.get(path, [("User-Agent", text.replace("%0a", "\t")), ("Authorization", "Basic Q0FOQVJZ")])
            assert answer.status in (400, 404)
            sent += 1
    for broken in (b"A" * 20_000, b"\0", b"\r\nHost: y", b"\r\nContent-Length: x", b"\n folded"):
        for port in (cache.port, cache.admin_port):
            await raw_exchange(cache.host, port, ONE + b"Authorization: Basic Q0FOQVJZ" + broken + b"\r\n\r\n")
    logged = stream.getvalue()
    assert "Q0FOQVJZ" not in logged
    found = [line for line in logged.split("\n") if "proxy.access" in line]
    assert len(found) <= sent
    assert len(found) >= sent / 2, "requests are logged at all"
    assert all(line.isprintable() and len(line) < 4096 for line in found)
    assert len(logged.splitlines()) == logged.count("\n")
    for line in logged.splitlines():
        if log_format == "json":
            assert json.loads(line)["logger"].startswith(("proxy", "asyncio", "aiohttp"))
            assert json.loads(line)["message"] != "forged"
        else:
            assert re.match(r"\d{4}-\d\d-\d\dT[\d:.]+Z (debug|info|warning) ", line)
    after = len((await fetch(cache.host, cache.admin_port, "GET", "/metrics")).body.splitlines())
    assert after - series < 30, "no series for what a client sends"


# --- T52: the parser ---


def test_t52_without_the_compiled_parser_nothing_starts(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    section = {"name": "registry.test", "endpoints": ["http://127.0.0.1:1"], "allowAddresses": ["127.0.0.1/32"]}
    file.write_text(yaml.safe_dump(settings(tmp_path / "cache", section)))
    done = subprocess.run(
        [sys.executable, "-m", "proxy", "serve", "--config", str(file)],
        env=os.environ | {"AIOHTTP_NO_EXTENSIONS": "1"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert "AIOHTTP_NO_EXTENSIONS" in done.stderr
    assert "Traceback" not in done.stderr
