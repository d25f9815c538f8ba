"""``clientCertFile`` and ``clientKeyFile``: shown to whoever of the upstream's own hosts asks for a certificate."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import pytest
import trustme

from tests.blackbox.oracle import LARGE, blob_of, blob_path, error_of, manifest_path, pulls_well
from tests.blackbox.private import until
from tests.conftest import UPSTREAM, RunningCache, StartCache, upstream
from tests.fakes import answers
from tests.fakes.forward_proxy import ForwardProxy
from tests.fakes.registry import ScriptedRegistry
from tests.fakes.tls import Authority

REPO = "team/app"
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
SHARED = {"mode": "shared", "iUnderstandThisIsShared": True}
QUICK = {"connect": "2s", "headers": "2s", "head": "2s", "token": "2s"}


class Wanting:
    """Servers that want a certificate of one authority, and the certificates of that and of another one."""

    def __init__(self, folder: Path) -> None:
        self.servers = Authority(_made(folder / "servers"))
        self.clients = Authority(_made(folder / "clients"))
        self.others = Authority(_made(folder / "others"))
        self.cert, self.key = self.clients.pair("pullcache.test", stem="client")
        self.combined = folder / "combined.pem"
        self.combined.write_bytes(self.key.read_bytes() + self.cert.read_bytes())

    def context(self, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
        """A server that speaks this version alone, and not a word to whoever shows no certificate."""
        context = self.servers.good()
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(self.clients.ca_path)
        context.minimum_version = context.maximum_version = version
        return context

    def section(self, registry: ScriptedRegistry, shown: str = "pair", **keys: Any) -> dict[str, Any]:
        """The upstream, with the right certificate or another one."""
        return upstream(registry, **{**self.files(shown), **keys})

    def files(self, shown: str) -> dict[str, Any]:
        """The keys of an upstream that say what is shown, and what is trusted."""
        wrong = self.others.pair("pullcache.test", stem="client")
        files: dict[str, dict[str, str]] = {
            "pair": {"clientCertFile": str(self.cert), "clientKeyFile": str(self.key)},
            "combined": {"clientCertFile": str(self.combined)},
            "foreign": {"clientCertFile": str(wrong[0]), "clientKeyFile": str(wrong[1])},
            "none": {},
        }
        trusted = {"caFile": str(self.servers.ca_path), "timeouts": QUICK}
        return trusted | files[shown] | ({"access": SHARED} if files[shown] else {})


class Refusing:
    """A server that says in TLS why it refuses, as real ones do; asyncio's own hangs up without a word.

    ``heard`` is what came after a handshake that was good.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self.heard: list[bytes] = []
        self.refused = 0
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(5)
            secure = self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            with secure:
                try:
                    secure.do_handshake()
                    self.heard.append(secure.recv(4096))
                except ssl.SSLError:
                    self.refused += 1
                    self._let_it_read(secure)
                except OSError:
                    pass

    def _let_it_read(self, secure: ssl.SSLSocket) -> None:
        """A close with something unread would be a reset, which can overtake what was said."""
        with contextlib.suppress(OSError):
            secure.shutdown(socket.SHUT_WR)
            while socket.socket.recv(secure, 4096):
                pass


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def wanting(tmp_path: Path) -> Wanting:
    """Who wants a certificate."""
    return Wanting(tmp_path / "tls")


@pytest.fixture(params=VERSIONS, ids=["TLS 1.2", "TLS 1.3"])
async def strict(request: pytest.FixtureRequest, wanting: Wanting) -> AsyncIterator[ScriptedRegistry]:
    """A registry that wants a certificate."""
    async with ScriptedRegistry(ssl=wanting.context(request.param)) as registry:
        yield registry


@pytest.mark.parametrize("shown", ["pair", "combined"])
async def test_with_its_certificate_everything_works(
    start_cache: StartCache, wanting: Wanting, strict: ScriptedRegistry, shown: str
) -> None:
    """Key and certificate in two files, or in one."""
    data = blob_of("certificate", LARGE)
    image = strict.add_image(REPO, "1", [data])
    strict.require_token()
    path = blob_path(image.layer_digests[0])
    strict.script("GET", path, answers.cut(LARGE // 2, "fin"))
    cache = await start_cache(wanting.section(strict, shown))
    assert (await cache.head(manifest_path("1"))).status == 200
    await pulls_well(cache, manifest_path("1"), image.data)
    await pulls_well(cache, path, data)
    assert strict.failed_handshakes == 0


@pytest.mark.parametrize("shown", ["none", "foreign"])
@pytest.mark.parametrize("version", VERSIONS, ids=["TLS 1.2", "TLS 1.3"])
@pytest.mark.parametrize("kind", ["tag", "blob"])
async def test_without_the_right_one_it_is_a_clear_503(
    start_cache: StartCache, wanting: Wanting, version: ssl.TLSVersion, shown: str, kind: str
) -> None:
    """The server hears no request; the text says that TLS is what failed, and which key of the configuration counts."""
    with Refusing(wanting.context(version)) as strict:
        section = {"name": UPSTREAM, "endpoints": [strict.url], "allowAddresses": ["127.0.0.1/32"]}
        cache = await start_cache(section | wanting.files(shown))
        path = manifest_path("1") if kind == "tag" else blob_path(f"sha256:{'0' * 64}")
        status, code, text = error_of(await cache.get(path))
        assert (status, code) == (503, "UNAVAILABLE")
        await until(lambda: strict.refused > 0)  # its thread may hear of it after us
        assert strict.heard == []
        assert UPSTREAM in text
        assert "TLS" in text
        assert "clientCertFile" in text


@pytest.mark.parametrize("shown", ["none", "foreign"])
@pytest.mark.parametrize("kind", ["tag", "blob"])
async def test_a_server_that_hangs_up_on_the_certificate_is_a_503_as_well(
    start_cache: StartCache, wanting: Wanting, strict: ScriptedRegistry, shown: str, kind: str
) -> None:
    """Nothing tells why it did."""
    image = strict.add_image(REPO, "1", [b"layer"])
    cache = await start_cache(wanting.section(strict, shown))
    path = manifest_path("1") if kind == "tag" else blob_path(image.layer_digests[0])
    status, code, text = error_of(await cache.get(path))
    assert (status, code) == (503, "UNAVAILABLE")
    assert strict.requests == []
    assert UPSTREAM in text


async def test_a_held_tag_is_served_stale_when_the_certificate_is_not_taken_any_more(
    start_cache: StartCache, wanting: Wanting
) -> None:
    async with ScriptedRegistry(ssl=wanting.context()) as strict:
        image = strict.add_image(REPO, "1", [b"layer"])
        first: RunningCache = await start_cache(wanting.section(strict))
        await pulls_well(first, manifest_path("1"), image.data)
        await strict.stop()
        changed = wanting.servers.good()
        changed.verify_mode = ssl.CERT_REQUIRED
        changed.load_verify_locations(wanting.others.ca_path)
        async with ScriptedRegistry(ssl=changed, port=strict.port) as other:
            answer = await first.get(manifest_path("1"))
            assert (answer.status, answer.body) == (200, image.data)
            assert answer.headers.has("Warning")
            assert other.requests == []


@pytest.mark.parametrize("shown", ["pair", "none"])
@pytest.mark.parametrize("way", ["realm", "redirect"])
async def test_token_servers_and_storage_are_shown_it_as_well(
    start_cache: StartCache, wanting: Wanting, way: str, shown: str
) -> None:
    """The registry itself wants none; whom it names does."""
    async with (
        ScriptedRegistry(ssl=wanting.servers.good()) as registry,
        ScriptedRegistry(ssl=wanting.context()) as strict,
    ):
        path = blob_path(registry.add_image(REPO, "1", [b"layer"]).layer_digests[0])
        if way == "realm":
            registry.require_token(realm=f"{strict.url}/token", tokens=strict.tokens)
        else:
            registry.script("GET", path, answers.redirect(f"{strict.url}/signed"), forever=True)
            strict.script("GET", "/signed", answers.status(200, b"layer"))
        cache = await start_cache(wanting.section(registry, shown, tokenHosts=[strict.host]))
        if shown == "pair":
            await pulls_well(cache, path, b"layer")
            assert strict.requests
        else:
            status, _, text = error_of(await cache.get(path))
            assert status == 503
            assert UPSTREAM in text
            assert strict.requests == []


async def test_every_endpoint_is_shown_it(start_cache: StartCache, wanting: Wanting) -> None:
    async with (
        ScriptedRegistry(ssl=wanting.context()) as mirror,
        ScriptedRegistry(ssl=wanting.context()) as registry,
    ):
        image = registry.add_image(REPO, "1", [b"layer"])
        mirror.add_blob(REPO, b"layer")
        cache = await start_cache(wanting.section(registry, endpoints=[mirror.url, registry.url]))
        await pulls_well(cache, manifest_path("1"), image.data)
        await pulls_well(cache, blob_path(image.layer_digests[0]), b"layer")
        assert mirror.seen(path=blob_path(image.layer_digests[0]))
        assert not registry.seen(path=blob_path(image.layer_digests[0]))


async def test_an_endpoint_that_takes_no_certificate_of_ours_is_passed_over(
    start_cache: StartCache, wanting: Wanting
) -> None:
    """The mirror wants another one: the registry answers, and the mirror is not asked each time."""
    async with ScriptedRegistry(ssl=wanting.context()) as mirror, ScriptedRegistry(ssl=wanting.servers.good()) as registry:
        image = registry.add_image(REPO, "1", [blob_of(number, 1000) for number in range(10)])
        cache = await start_cache(wanting.section(registry, "foreign", endpoints=[mirror.url, registry.url]))
        await pulls_well(cache, manifest_path("1"), image.data)
        before = mirror.connections
        for data, digest in zip(image.layers, image.layer_digests, strict=True):
            await pulls_well(cache, blob_path(digest), data)
        assert 1 <= before <= 3
        assert mirror.connections == before


async def test_one_upstreams_certificate_is_not_anothers(start_cache: StartCache, wanting: Wanting) -> None:
    """Though both ask the same host, and one of them has just been let in."""
    async with ScriptedRegistry(ssl=wanting.context()) as strict:
        image = strict.add_image(REPO, "1", [b"layer"])
        cache = await start_cache(wanting.section(strict), wanting.section(strict, "none", name="other.test"))
        await pulls_well(cache, manifest_path("1"), image.data)
        heard = len(strict.requests)
        assert (await cache.get(f"{manifest_path('1')}?ns=other.test")).status == 503
        assert len(strict.requests) == heard


async def test_through_a_proxy_it_is_shown_to_the_registry(start_cache: StartCache, wanting: Wanting) -> None:
    """And not to the proxy, which is spoken to in plain http."""
    async with ForwardProxy() as forward, ScriptedRegistry(ssl=wanting.context()) as strict:
        image = strict.add_image(REPO, "1", [b"layer"])
        cache = await start_cache(wanting.section(strict, httpProxy=forward.url))
        await pulls_well(cache, manifest_path("1"), image.data)
        assert forward.opened == [strict.host] * strict.connections


async def test_it_proves_nothing_about_the_server(start_cache: StartCache, wanting: Wanting) -> None:
    """The registry's own certificate is verified as ever; a stranger is shown nothing but a closed connection."""
    stranger = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    stranger.issue_cert("127.0.0.1").configure_cert(context)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.load_verify_locations(wanting.clients.ca_path)
    async with ScriptedRegistry(ssl=context) as registry:
        cache = await start_cache(wanting.section(registry))
        status, _, text = error_of(await cache.get(manifest_path("1")))
        assert (status, registry.requests) == (503, [])
        assert "caFile" in text


@pytest.mark.parametrize("shown", ["pair", "combined", "foreign"])
async def test_the_key_is_in_no_log_and_no_answer(
    start_cache: StartCache, wanting: Wanting, caplog: pytest.LogCaptureFixture, shown: str
) -> None:
    caplog.set_level(logging.DEBUG)
    async with ScriptedRegistry(ssl=wanting.context()) as strict:
        strict.add_image(REPO, "1", [b"layer"])
        cache = await start_cache(wanting.section(strict, shown))
        said = [await cache.get(manifest_path(tag)) for tag in ("1", "2")]
    lines = [line for line in wanting.key.read_text().splitlines() if re.fullmatch(r"[A-Za-z0-9+/=]{20,}", line)]
    assert lines
    everything = "\n".join([*(f"{record.getMessage()} {record.__dict__}" for record in caplog.records), *map(str, said)])
    assert not [line for line in lines if line in everything]
    assert "PRIVATE KEY" not in everything
