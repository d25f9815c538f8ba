"""Clients that close once they have the whole answer, as podman, skopeo and buildah do."""

from __future__ import annotations

import asyncio
import os
import socket
import struct

from tests.blackbox.test_api import REPO, TAG, blob
from tests.conftest import RunningCache
from tests.fakes.registry import ScriptedRegistry


def take(port: int, path: str) -> bool:
    """One GET over a connection of its own, closed at the last byte; whether the whole answer came."""
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: cache\r\nConnection: close\r\n\r\n".encode())
        got = b""
        while b"\r\n\r\n" not in got:
            got += sock.recv(65536)
        head, _, body = got.partition(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
        while len(body) < length and (more := sock.recv(65536)):
            body += more
        return len(body) == length


async def test_who_closes_after_the_whole_answer_has_not_left(cache: RunningCache, registry: ScriptedRegistry) -> None:
    """Such a request is counted and logged by its status, not as a client that went away."""
    image = registry.add_image(REPO, "1", [b"x" * 700, b"y" * 3_000_000])
    for path in (TAG, *map(blob, image.layer_digests)):
        await cache.get(path)
        for _ in range(100):
            assert await asyncio.to_thread(take, cache.port, path)
    await cache.settled()
    assert cache.metric("requests_total", status="left") == 0
    assert cache.metric("requests_total", status="200") == 303


def reset_after(port: int, path: str, count: int) -> None:
    """One GET whose connection is reset once ``count`` bytes have come."""
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
        while count > 0:
            count -= len(sock.recv(1024 * 1024))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def test_who_resets_in_the_middle_has_left_and_was_not_cut(cache: RunningCache, registry: ScriptedRegistry) -> None:
    """Whether sendfile or the event loop is the first to notice: nobody but the client has ended it."""
    image = registry.add_image(REPO, "1", [os.urandom(20_000_000)])
    path = blob(image.layer_digests[0])
    await cache.get(path)
    await asyncio.gather(
        *(asyncio.to_thread(reset_after, cache.port, path, 1 + number % 10 * 1_000_000) for number in range(100))
    )
    async with asyncio.timeout(10):
        while cache.metric("requests_total", kind="blob") < 101:
            await asyncio.sleep(0.005)
    assert cache.metric("requests_total", status="cut") == 0
    assert cache.metric("requests_total", kind="blob", status="left") == 100
