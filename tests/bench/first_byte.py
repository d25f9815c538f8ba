"""First byte of cold 100 MB blobs: through pullcache, against the registry's own, in one run.

    python -m tests.bench.first_byte [blobs] [MB]

Each blob is asked once of the registry and once, cold, of the cache, in turn; the figure is the time from the request to
the first byte of the body, and the whole.
"""

from __future__ import annotations

import hashlib
import random
import socket
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from tests.real.services import DockerRegistry, Pullcache, pullcache_config

REPOSITORY = "bench/blobs"


def push(registry: DockerRegistry, data: bytes) -> str:
    """Uploads a blob in one piece; its digest."""
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    start = urllib.request.Request(f"{registry.url}/v2/{REPOSITORY}/blobs/uploads/", method="POST", data=b"")
    with urllib.request.urlopen(start) as answer:
        location = answer.headers["Location"]
    put = urllib.request.Request(
        f"{location}&digest={digest}", method="PUT", data=data, headers={"Content-Type": "application/octet-stream"}
    )
    with urllib.request.urlopen(put):
        return digest


def timed_get(host: str, target: str) -> tuple[float, float, str]:
    """Seconds to the first byte of the body and to the last, and the sha256 of what came."""
    name, _, port = host.rpartition(":")
    buffer = bytearray(1 << 20)
    digest = hashlib.sha256()
    with socket.create_connection((name, int(port))) as wire:
        began = time.perf_counter()
        wire.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head or not head.partition(b"\r\n\r\n")[2]:
            head += wire.recv(4096)
        first = time.perf_counter() - began
        digest.update(head.partition(b"\r\n\r\n")[2])
        while count := wire.recv_into(buffer):
            digest.update(memoryview(buffer)[:count])
        return first, time.perf_counter() - began, f"sha256:{digest.hexdigest()}"


def main(blobs: int = 15, megabytes: int = 100) -> None:
    """Prints the table."""
    chance = random.Random(1)
    rows: list[tuple[float, float, float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with DockerRegistry(root / "registry") as registry:
            config = pullcache_config(root / "cache", "registry.test", registry.url)
            with Pullcache(config) as cache:
                for _ in range(blobs):
                    digest = push(registry, chance.randbytes(megabytes * 1_000_000))
                    target = f"/v2/{REPOSITORY}/blobs/{digest}"
                    own_first, own_all, own = timed_get(registry.host, target)
                    cold_first, cold_all, cold = timed_get(cache.host, target)
                    assert own == cold == digest
                    rows.append((own_first, own_all, cold_first, cold_all))
    titles = ("registry: first byte", "registry: whole", "pullcache cold: first byte", "pullcache cold: whole")
    for title, figures in zip(titles, zip(*rows, strict=True), strict=True):
        low, middle, high = min(figures), statistics.median(figures), max(figures)
        print(f"{title:28} median {middle * 1000:7.1f} ms   min {low * 1000:7.1f}   max {high * 1000:7.1f}")
    added = [cold - own for own, _, cold, _ in rows]
    print(f"{'first byte, added':28} median {statistics.median(added) * 1000:7.1f} ms   max {max(added) * 1000:7.1f}")
    print(f"whole, pullcache cold / registry: {statistics.median(c / o for _, o, _, c in rows):.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
