"""A mirror before the registry that is down, silent, broken or breaks off: the real image is pulled all the same.

What it costs is printed (``pytest -s``) and not asserted: the machine may be busy. What is asserted is how often a dead
mirror is asked.
"""

from __future__ import annotations

import contextlib
import http.server
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from tests.fakes.ports import free_port

from .image import RealImage
from .line import Line
from .pulls import UPSTREAM, assert_layout, once, reference
from .services import DockerRegistry, Pullcache, missing, pullcache_config, skopeo_pull, status_of, wait_until

_no_skopeo = missing("docker-registry", "skopeo")
needs_skopeo = pytest.mark.skipif(_no_skopeo is not None, reason=str(_no_skopeo))

BUDGET = 3.0
"""``timeouts.endpoint``, as it is by default."""

CUT_AFTER = 30_000_000
"""In the middle of the largest layer."""


class Failing:
    """An HTTP server that answers everything with one status, and keeps the paths."""

    def __init__(self, status: int) -> None:
        self.paths: list[str] = []
        paths = self.paths

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                paths.append(self.path)
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing is printed."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()


@contextlib.contextmanager
def mirrored(room: Path, *endpoints: str, **timeouts: str) -> Iterator[Pullcache]:
    """pullcache with an empty cache of its own before these endpoints."""
    with tempfile.TemporaryDirectory(dir=room) as home:
        config = pullcache_config(Path(home) / "cache", UPSTREAM, endpoints[-1])
        config["upstreams"][0] |= {"endpoints": list(endpoints), "timeouts": timeouts}
        with Pullcache(config, root=Path(home) / "pullcache") as server:
            yield server
            print(server.log[-4000:])  # pytest shows it when the test failed


def pull(server: Pullcache, image: RealImage, room: Path, how: str = "tag") -> float:
    """A pull of all platforms, looked at and thrown away; the seconds it took."""
    with tempfile.TemporaryDirectory(dir=room) as target:
        began = time.monotonic()
        skopeo_pull(f"{server.host}/{UPSTREAM}/{reference(image, how)}", Path(target))
        seconds = time.monotonic() - began
        assert_layout(Path(target), image)
    return seconds


@contextlib.contextmanager
def mirror(fault: str, upstream: DockerRegistry) -> Iterator[str]:
    """The URL of a mirror with that fault."""
    if fault == "closed port":
        yield f"http://127.0.0.1:{free_port()}"
    elif fault in ("500", "404"):
        with Failing(int(fault)) as server:
            yield server.url
    else:
        with Line(upstream.port) as line:
            if fault == "black hole":
                line.hold()
            elif fault == "cuts midway":
                line.cut_after(CUT_AFTER)
            yield line.url


@needs_skopeo
@pytest.mark.parametrize("how", ["tag", "digest"])
@pytest.mark.parametrize("fault", ["none", "closed port", "black hole", "500", "404", "cuts midway"])
def test_the_image_is_pulled_whatever_is_wrong_with_the_mirror(
    upstream: DockerRegistry, image: RealImage, room: Path, fault: str, how: str
) -> None:
    """Digests are right, and the registry is asked for each blob once; the time that it costs is printed."""
    with mirrored(room, upstream.url) as server:
        alone = pull(server, image, room, how)
    with mirror(fault, upstream) as url, mirrored(room, url, upstream.url, endpoint=f"{BUDGET:g}s") as server:
        upstream.forget()
        seconds = pull(server, image, room, how)
        warm = pull(server, image, room, how)
        resumes = server.figure("resumes_total")
    print(
        f"\nEXTRA {fault} by {how}: {seconds - alone:+.2f} s ({alone:.2f} s without a mirror, {seconds:.2f} s with it, "
        f"{warm:.2f} s again, {resumes:g} continued)"
    )
    asked = upstream.wait_for_blobs(image.blobs)
    if fault == "cuts midway":
        assert resumes >= 1
        assert asked.keys() == image.blobs
        assert asked.total() <= len(image.blobs) + resumes
    else:
        assert resumes == 0
        assert asked == once(image.blobs)


@needs_skopeo
def test_a_black_hole_is_asked_once(upstream: DockerRegistry, image: RealImage, room: Path) -> None:
    """By a client; a probe may come where a pull takes longer than the first rest of 5 s."""
    with Line(upstream.port) as line, mirrored(room, line.url, upstream.url, endpoint="500ms") as server:
        line.hold()
        began = time.monotonic()
        for how in ("digest", "tag"):
            pull(server, image, room, how)
        took = time.monotonic() - began
        probes, rest = 0, 5.0
        while took > rest:  # rests of 5, 10, 20, ... s: so many can have ended
            probes, took, rest = probes + 1, took - rest, rest * 2
        assert 1 <= line.connections <= 1 + probes


@needs_skopeo
@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_mirror_that_answers_with_errors_is_asked_once(
    upstream: DockerRegistry, image: RealImage, room: Path, status: int
) -> None:
    """Beside ``/v2/``, which is the probe's."""
    with Failing(status) as failing, mirrored(room, failing.url, upstream.url) as server:
        for how in ("digest", "tag"):
            pull(server, image, room, how)
        assert len([path for path in failing.paths if path != "/v2/"]) == 1


@needs_skopeo
def test_a_mirror_that_comes_back_is_used_again(upstream: DockerRegistry, image: RealImage, room: Path) -> None:
    """A probe finds out, and clients are sent there again."""
    with Line(upstream.port) as line, mirrored(room, line.url, upstream.url, endpoint="500ms") as server:
        line.hold()
        manifest = f"{server.url}/v2/{UPSTREAM}/{reference(image, 'tag').replace(':', '/manifests/')}"
        assert status_of(manifest, 10) == 200
        line.heal()
        before = line.received

        def is_used() -> bool:
            assert status_of(manifest, 10) == 200
            return line.received > before + 1000  # more than the answer to a probe

        wait_until(is_used, "the mirror is asked again", 60)
        pull(server, image, room)
        assert line.received > image.sizes[image.biggest]
