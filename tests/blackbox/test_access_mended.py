"""Promises about access that were once broken: one test for each."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import ssl
from contextlib import suppress
from pathlib import Path

import bcrypt
import pytest

from proxy.config.file import validate
from proxy.credentials.credential import Credential
from tests.blackbox.private import (
    ALICE,
    ANNE,
    APP,
    BOB,
    EXTERNAL,
    HERS,
    OPEN,
    Account,
    Clock,
    PrivateRegistry,
    Stock,
    assert_bare,
    bearer,
    body_of,
    challenges,
    deployed,
    parts,
    pull,
    started,
    token,
    until,
    with_access,
)
from tests.blackbox.test_listener_access import Certificates
from tests.conftest import RunningCache, StartCache, settings, upstream
from tests.fakes.answers import Step, compose, gate, oci_error, perform, status, too_many_requests
from tests.fakes.client import open_wire
from tests.fakes.messages import Answer, Request


@pytest.fixture
async def cache(clock: Clock, start_cache: StartCache, private: PrivateRegistry, stock: Stock) -> RunningCache:
    """A cache of ``access: verify`` before it."""
    return await start_cache(with_access(private, "verify"), externalURL=EXTERNAL)


# --- TLS of the listener ---


async def over_tls(port: int, context: ssl.SSLContext, path: str) -> tuple[bytes, bytes]:
    """What comes over the line for a GET, and what TLS makes of it up to where it is TLS no more."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    line, content, asked = bytearray(), bytearray(), False
    wire = await open_wire("127.0.0.1", port)
    async with asyncio.timeout(30), wire:
        while True:
            try:
                if not asked:
                    session.do_handshake()
                    session.write(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
                    asked = True
                while data := session.read(65536):
                    content += data
                return bytes(line), bytes(content)  # it has said that this is the end
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLZeroReturnError:
                return bytes(line), bytes(content)
            except ssl.SSLError:
                incoming = ssl.MemoryBIO()  # the rest is only written down
            if outgoing.pending:
                await wire.send(outgoing.read())
            if not (data := await wire.receive(65536)):
                return bytes(line), bytes(content)
            line += data
            incoming.write(data)


@pytest.mark.parametrize("part", ["config", "layer", "large"])
async def test_content_over_tls_is_whole_and_cannot_be_read_on_the_line(
    tmp_path: Path, private: PrivateRegistry, stock: Stock, part: str
) -> None:
    """``os.sendfile`` writes past TLS into the socket: whatever is in a file must go through it."""
    certificates = Certificates(tmp_path)
    data = b"a private line, which only its reader may have\n" * 60_000 if part == "large" else body_of(stock.app, part)
    path = f"/v2/{OPEN}/blobs/{private.add_blob(OPEN, data)}"
    listener = certificates.listener(of_clients=False)
    config = validate(settings(tmp_path / "cache", upstream(private), listener=listener))
    async with deployed(config) as cache:
        line, answer = await over_tls(cache.port, certificates.client(), path)
    assert data[:32] not in line, "the content went over the line in the clear"
    assert answer.endswith(b"\r\n\r\n" + data)


async def test_a_client_that_leaves_over_tls_is_no_fault_of_the_cache(
    tmp_path: Path, private: PrivateRegistry, stock: Stock, caplog: pytest.LogCaptureFixture
) -> None:
    """One that hangs up as soon as it has what it asked for; several times, since it is a race."""
    certificates = Certificates(tmp_path)
    config = validate(settings(tmp_path / "cache", upstream(private), listener=certificates.listener(of_clients=False)))
    request = f"GET {parts(OPEN, stock.open)['tag']} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    async with deployed(config) as cache:
        for _ in range(30):
            wire = await open_wire("127.0.0.1", cache.port, ssl=certificates.client())
            await wire.send(request)
            await wire.receive(1)
            await wire.close()
        await until(lambda: cache.metric("connections") == 0)
    assert "failed by a fault of pullcache" not in caplog.text


def take_and_hang_up(port: int, tls: ssl.SSLContext, path: str) -> bytes:
    """One request as Go's clients make it: the whole answer, a goodbye of TLS, and the socket closed without waiting for the
    other side's."""
    with (
        socket.create_connection(("127.0.0.1", port), 20) as plain,
        tls.wrap_socket(plain, server_hostname="127.0.0.1") as wire,
    ):
        wire.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += wire.recv(65536)
        head, _, body = answer.partition(b"\r\n\r\n")
        (length,) = (int(line[16:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length: "))
        while len(body) < length:
            body += wire.recv(65536)
        wire.settimeout(0)
        with suppress(OSError):
            wire.unwrap()
    return body


@pytest.mark.parametrize("part", ["tag", "layer"])
async def test_whoever_has_taken_the_whole_over_tls_has_not_left(
    tmp_path: Path, private: PrivateRegistry, stock: Stock, part: str
) -> None:
    """Its goodbye and ours cross; several times, since it is a race."""
    certificates = Certificates(tmp_path)
    config = validate(settings(tmp_path / "cache", upstream(private), listener=certificates.listener(of_clients=False)))
    path, tls = parts(OPEN, stock.open)[part], certificates.client()
    async with deployed(config) as cache:
        for _ in range(50):
            assert await asyncio.to_thread(take_and_hang_up, cache.port, tls, path) == body_of(stock.open, part)
        await until(lambda: cache.metric("connections") == 0)
        assert cache.metric("requests_total", status="200") == 50


async def test_the_access_log_names_the_user(
    tmp_path: Path, private: PrivateRegistry, stock: Stock, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "htpasswd"
    file.write_bytes(b"ci:" + bcrypt.hashpw(b"its password", bcrypt.gensalt(4)) + b"\n")
    with caplog.at_level(logging.INFO, logger="proxy.access"):
        async with started(tmp_path / "cache", upstream(private), listener={"htpasswdFile": str(file)}) as cache:
            assert (await cache.get(parts(OPEN, stock.open)["tag"], Account("ci", "its password").headers)).status == 200
            await until(lambda: bool(caplog.records))
    assert [record.fields["user"] for record in caplog.records if hasattr(record, "fields")] == ["ci"]


# --- T20 ---


async def test_t20_a_private_blob_whose_manifest_is_not_held_is_not_public_after_the_catalog_was_lost(
    tmp_path: Path, private: PrivateRegistry, stock: Stock
) -> None:
    """Of what is in the cache only the attacker's own public manifest names it: that proves nothing."""
    directory, hers = tmp_path / "cache", f"/v2/{HERS}/manifests/1"
    async with started(directory, with_access(private, "verify")) as cache:
        assert (await cache.get(parts(APP, stock.app)["layer"], ALICE.headers)).status == 200
        assert (await cache.get(hers)).status == 200
        assert (await cache.get(parts(HERS, stock.app)["layer"])).status == 404
        await cache.settled()
    for name in ("cache.db", "cache.db-wal", "cache.db-shm"):
        (directory / name).unlink(missing_ok=True)
    async with started(directory, with_access(private, "verify")) as cache:
        assert (await cache.get(hers)).status == 200
        answer = await cache.get(parts(HERS, stock.app)["layer"])
        assert answer.status == 404
        assert_bare(answer, stock.app)


# --- T21 ---


async def test_t21_when_the_right_of_several_is_withdrawn_before_a_byte_came_the_others_still_get_it(
    cache: RunningCache, private: PrivateRegistry, stock: Stock
) -> None:
    """Two of three: the second's refusal, by whose download the third then goes on, is not the third's."""
    registry = private
    registry.allow(BOB, APP)
    for account in (ALICE, BOB, ANNE):
        assert (await cache.get(parts(APP, stock.app)["tag"], account.headers)).status == 200
    path, held = parts(APP, stock.app)["layer"], asyncio.Event()

    def refuse(request: Request) -> Answer:
        return compose(oci_error(403, "DENIED"), gate(held)).change(request, registry.truth)

    registry.script("GET", path, refuse)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(cache.get(path, ALICE.headers))]
        await registry.wait_for(lambda: registry.count("GET", path))
        for number, account in enumerate((BOB, ANNE), start=1):
            tasks.append(group.create_task(cache.get(path, account.headers)))
            await until(lambda number=number: cache.metric("followers_total") == number)  # type: ignore[misc]
        registry.withdraw(ALICE)
        registry.withdraw(BOB)
        held.set()
    assert [task.result().status for task in tasks] == [401, 401, 200]
    assert (await cache.get(path, ANNE.headers)).status == 200


@pytest.mark.parametrize("part", ["tag", "new-layer"])
async def test_t21_what_became_private_is_asked_for_with_the_clients_credential_at_once(
    cache: RunningCache, private: PrivateRegistry, stock: Stock, part: str
) -> None:
    """Public a moment ago: the first who asks is challenged; a 403 without a challenge ends a pull."""
    await pull(cache, OPEN, stock.open)
    private.public.discard(OPEN)
    private.allow(ALICE, OPEN)
    new = f"/v2/{OPEN}/blobs/{private.add_blob(OPEN, b'new')}"
    path = new if part == "new-layer" else parts(OPEN, stock.open)["tag"]
    answer = await cache.get(path)
    assert (answer.status, len(challenges(answer))) == (401, 2)


@pytest.mark.parametrize("part", ["tag", "new-layer"])
async def test_t21_so_is_it_for_the_first_who_has_the_right(
    cache: RunningCache, private: PrivateRegistry, stock: Stock, part: str
) -> None:
    await pull(cache, OPEN, stock.open)
    private.public.discard(OPEN)
    private.allow(ALICE, OPEN)
    new = f"/v2/{OPEN}/blobs/{private.add_blob(OPEN, b'new')}"
    path = new if part == "new-layer" else parts(OPEN, stock.open)["tag"]
    assert (await cache.get(path, ALICE.headers)).status == 200


@pytest.mark.parametrize("code", [400, 401, 403])
async def test_t21_a_page_in_front_of_the_token_server_ends_no_right(
    clock: Clock, cache: RunningCache, private: PrivateRegistry, stock: Stock, code: int
) -> None:
    """A login page or a firewall there is no refusal of the registry, any more than it is before the registry itself."""
    await pull(cache, APP, stock.app, ALICE.headers)
    private.given.clear()
    private.token_fault = status(code, b"<html>blocked</html>", "text/html")
    clock.advance(400)
    for part in ("layer", "digest", "tag"):
        answer = await cache.get(parts(APP, stock.app)[part], ALICE.headers)
        assert (part, answer.status) == (part, 200)


# --- attempts ---


@pytest.mark.parametrize("answer", [too_many_requests(5), status(503)], ids=["429", "503"])
async def test_attempts_that_a_token_server_fails_to_answer_are_bounded_too(
    cache: RunningCache, private: PrivateRegistry, stock: Stock, answer: Step
) -> None:
    """Above all those that it answers with 429: it has begun to defend itself, and we go on at whatever speed."""
    assert (await cache.get(parts(APP, stock.app)["tag"])).status == 401

    def fails(request: Request) -> Answer:
        return perform(answer if request.headers.has("Authorization") else private.truth(request), request, private.truth)

    private.token_fault = fails
    for number in range(30):
        await cache.get(parts(APP, stock.app)["tag"], Account("alice", f"wrong-{number}").headers)
    assert len(private.shown()) <= 10


async def test_a_client_that_leaves_before_the_answer_has_not_tried_a_wrong_credential(
    cache: RunningCache, private: PrivateRegistry, stock: Stock
) -> None:
    """Ten times, with the right one, at a slow registry: the eleventh is no 429."""
    assert (await cache.get(parts(APP, stock.app)["tag"])).status == 401
    for _ in range(10):
        held = asyncio.Event()
        private.fault = compose(lambda request: private._refusal(request) or private.truth(request), gate(held))
        questions = len(private.requests)
        wire = await open_wire(cache.host, cache.port)
        lines = (
            f"GET {parts(APP, stock.app)['tag']} HTTP/1.1",
            "Host: cache.test",
            f"Authorization: {ALICE.header}",
            "",
            "",
        )
        await wire.send("\r\n".join(lines).encode())
        await private.wait_for(lambda questions=questions: len(private.requests) > questions)  # type: ignore[misc]
        await wire.abort()
        held.set()
        await until(lambda: cache.metric("connections") == 0)
    private.fault = None
    assert (await cache.get(parts(APP, stock.app)["tag"], ALICE.headers)).status == 200


async def test_a_front_that_adds_a_line_of_its_own_says_who_the_client_is(
    tmp_path: Path, private: PrivateRegistry, stock: Stock
) -> None:
    """HAProxy, ``option forwardfor``: "this header is always appended at the end of the existing header list"; what
    stands in an earlier line the client has written, who would be somebody else with each request."""
    section = with_access(private, "verify")
    async with started(tmp_path / "cache", section, listener={"tlsTerminatedInFront": True}) as cache:
        for number in range(25):
            lines = [("X-Forwarded-For", f"10.1.1.{number}"), ("X-Forwarded-For", "10.0.0.9")]
            await cache.get(parts(APP, stock.app)["tag"], [*Account("alice", f"wrong-{number}").headers, *lines])
    assert len(private.shown()) == 10


# --- what is kept of clients ---


async def test_a_clients_password_is_not_in_memory_when_its_token_has_ended(
    clock: Clock, cache: RunningCache, private: PrivateRegistry, stock: Stock
) -> None:
    """Remembered refusals are exceptions, whose tracebacks hold the frames that held it; neither is needed."""
    await pull(cache, APP, stock.app, bearer(await token(cache, ALICE)))
    for _ in range(5):
        clock.advance(100)
        await pull(cache, OPEN, stock.open)
    gc.collect()
    assert [each for each in gc.get_objects() if isinstance(each, Credential) and each.password == ALICE.password] == []


async def test_a_form_that_never_ends_does_not_hold_a_connection_for_ever(
    clock: Clock, cache: RunningCache, private: PrivateRegistry
) -> None:
    """Ignored bodies have 10 s; so should this one."""
    wire = await open_wire(cache.host, cache.port)
    async with wire:
        await wire.send(b"POST /token HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\ngrant_type=")
        await until(lambda: cache.metric("connections") >= 1)
        for _ in range(3):
            await cache.get("/v2/")
            clock.advance(30)
        async with asyncio.timeout(3):
            while await wire.more():
                pass
        assert not wire.buffer or b"HTTP/1.1 413" in wire.buffer
