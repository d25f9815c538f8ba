"""What must hold whatever an upstream does: no wrong body ends cleanly, and nothing wrong is ever stored."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
from pathlib import Path

from tests.conftest import RunningCache
from tests.fakes.client import Stream, Wire, WireResponse, read_head
from tests.fakes.content import Image

SMALL = 4_000
REPO = "team/app"
LARGE = 3 * 1024 * 1024 + 17
"""Beyond what is verified before the status line."""

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


def blob_of(seed: int | str, size: int) -> bytes:
    """Bytes that nobody else has."""
    return random.Random(seed).randbytes(size)


def blob_path(digest: str, repository: str = "team/app") -> str:
    """Where a blob is, at the cache and at its registry."""
    return f"/v2/{repository}/blobs/{digest}"


def manifest_path(reference: str, repository: str = "team/app") -> str:
    """Where a manifest is, at the cache and at its registry."""
    return f"/v2/{repository}/manifests/{reference}"


def path_of(image: Image, kind: str) -> str:
    """The path of an image's ``tag`` (which is 1), ``manifest`` or first ``blob``."""
    if kind == "blob":
        return blob_path(image.layer_digests[0])
    return manifest_path("1" if kind == "tag" else image.digest)


def content_of(image: Image, kind: str) -> bytes:
    """What is there."""
    return image.layers[0] if kind == "blob" else image.data


def wrong_files(cache: RunningCache) -> list[Path]:
    """Files below ``blobs/`` that are not what their name says."""
    found = []
    for path in cache.files("blobs"):
        if hashlib.new(path.parent.name, path.read_bytes()).hexdigest() != path.name:
            found.append(path)
    return found


def vouched_wrongly(answer: WireResponse, truth: bytes) -> bool:
    """Whether this is a body that ended cleanly although it is not the content, or the part of it, that it claims to be."""
    if answer.status not in (200, 206) or not answer.clean_end:
        return False
    if answer.status == 200:
        return answer.body != truth
    span = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range") or "")
    return span is None or int(span[3]) != len(truth) or answer.body != truth[int(span[1]) : int(span[2]) + 1]


def error_of(answer: WireResponse) -> tuple[int, str, str]:
    """Status, code and text of an error, which must have the form that the distribution specification prescribes."""
    assert answer.clean_end, answer.why
    assert answer.headers.get("Content-Type", "").partition(";")[0] == "application/json", answer  # type: ignore[union-attr]
    error = json.loads(answer.body)["errors"][0]
    return answer.status, error["code"], error["message"]


async def pulls_well(cache: RunningCache, path: str, truth: bytes) -> None:
    """The next pull is good, and what it leaves behind is right."""
    answer = await cache.get(path)
    assert (answer.status, answer.clean_end) == (200, True), (answer.status, answer.body[:300], answer.why)
    assert answer.body == truth
    await cache.settled()
    assert wrong_files(cache) == []


def peak_memory() -> int:
    """The most memory that this process has had resident since ``forget_peak``, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def forget_peak() -> int:
    """The peak begins again here; what is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


async def open_from(address: str, cache: RunningCache, target: str, headers: str = "") -> Stream:
    """A GET from one of the many addresses of loopback: the cache allows each only so many connections."""
    loop = asyncio.get_running_loop()
    _, wire = await loop.create_connection(Wire, cache.host, cache.port, local_addr=(address, 0))
    await wire.send(f"GET {target} HTTP/1.1\r\nHost: cache\r\n{headers}\r\n".encode())
    return await read_head(wire, "GET")
