"""Promises about credentials and private content that a second attack broke: each test says what should hold."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import bcrypt
import pytest

from proxy.storage.base import Origin
from proxy.storage.catalog import Catalog
from proxy.storage.layout import SpoolFile
from proxy.storage.store import Store
from tests.blackbox.mounted import Mounted, pull_secret
from tests.blackbox.private import (
    ALICE,
    APP,
    EXTERNAL,
    HERS,
    OPEN,
    PROXYS,
    Account,
    Clock,
    PrivateRegistry,
    Stock,
    assert_bare,
    body_of,
    parts,
    pull,
    secret_for,
    started,
    statuses,
    until,
    with_access,
)
from tests.conftest import UPSTREAM, StartCache, upstream
from tests.fakes.answers import Modifier, compose, gate, oci_error, status, unauthorized
from tests.fakes.client import open_wire
from tests.fakes.messages import Answer, Request, Responder
from tests.fakes.registry import ScriptedRegistry

VERIFY: dict[str, Any] = {"externalURL": EXTERNAL}


# --- T20 ---


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("through", ["same", "hers"])
async def test_t20_a_question_that_another_upstream_has_not_answered_yet_opens_nothing(
    start_cache: StartCache, private: PrivateRegistry, stock: Stock, through: str, method: str
) -> None:
    """An honest upstream that has nothing of it, and takes a moment to say so: until then the download that was begun there
    is no proof that anybody may have what is private, and held."""
    async with ScriptedRegistry() as other:
        cache = await start_cache(with_access(private, "verify"), with_access(other, "public", "other.test"), **VERIFY)
        await pull(cache, APP, stock.app, ALICE.headers)
        assert (await cache.get(f"/v2/{HERS}/manifests/1")).status == 200
        digest, held = stock.app.layer_digests[-1], asyncio.Event()
        path = f"/v2/some/app/blobs/{digest}"
        other.script("GET", path, gate(held), forever=True)
        async with asyncio.TaskGroup() as group:
            first = group.create_task(cache.get(f"/v2/other.test/some/app/blobs/{digest}"))
            await other.wait_for(lambda: other.count("GET", path))
            again = f"/v2/other.test/some/app/blobs/{digest}" if through == "same" else f"/v2/{HERS}/blobs/{digest}"
            second = group.create_task(cache.get(again) if method == "GET" else cache.head(again))
            await asyncio.wait({second}, timeout=1)  # it may wait for the same download
            held.set()
        assert first.result().status == 404
        assert_bare(second.result(), stock.app)


async def test_t20_a_download_whose_right_is_withdrawn_while_it_runs_is_not_followed_from_elsewhere(
    clock: Clock, start_cache: StartCache, private: PrivateRegistry, stock: Stock
) -> None:
    """It was public when it began; another upstream's word that it has the same is no right to what it brings."""
    layer, path, held = stock.app.layers[-1], parts(APP, stock.app)["layer"], asyncio.Event()
    async with ScriptedRegistry() as liar:
        cache = await start_cache(
            with_access(private, "verify", publicFor="5s"), with_access(liar, "public", "evil.test"), **VERIFY
        )
        private.public.add(APP)
        private.script("GET", path, gate(held, after=len(layer) // 2))
        liar.script("HEAD", lambda _: True, status(200, b"x" * len(layer), "application/octet-stream"), forever=True)
        async with asyncio.TaskGroup() as group:
            group.create_task(cache.get(path))
            await private.wait_for(lambda: private.bytes_sent(path) >= len(layer) // 2)
            private.public.discard(APP)
            clock.advance(6)
            assert (await cache.get(parts(APP, stock.app)["tag"])).status == 401
            second = group.create_task(cache.get(f"/v2/evil.test/evil/app/blobs/{stock.app.layer_digests[-1]}"))
            await asyncio.wait({second}, timeout=1)  # it may wait for the same download
            held.set()
        assert_bare(second.result(), stock.app)


@pytest.mark.parametrize("mode", ["shared", "verify"])
async def test_t20_what_nobody_may_read_any_more_is_not_opened_by_another_upstreams_word(
    clock: Clock, start_cache: StartCache, private: PrivateRegistry, stock: Stock, tmp_path: Path, mode: str
) -> None:
    """With the right of our secret, or of the anonymous, all links of the content were withdrawn: it is private still."""
    async with ScriptedRegistry() as liar:
        secrets = [secret_for(tmp_path)] if mode == "shared" else []
        section = with_access(private, mode, publicFor="5m")
        if mode == "verify":
            private.public.add(APP)
        cache = await start_cache(section, with_access(liar, "public", "evil.test"), imagePullSecrets=secrets, **VERIFY)
        await pull(cache, APP, stock.app)
        private.withdraw(PROXYS)
        private.public.discard(APP)
        clock.advance(400)
        assert (await cache.get(parts(APP, stock.app)["layer"])).status in (401, 403)
        layer = stock.app.layers[-1]
        liar.script("HEAD", lambda _: True, status(200, b"x" * len(layer), "application/octet-stream"), forever=True)
        answer = await cache.get(f"/v2/evil.test/evil/app/blobs/{stock.app.layer_digests[-1]}")
        assert answer.body != layer


async def test_t20_a_layer_that_became_private_is_not_public_after_the_catalog_was_lost(
    clock: Clock, tmp_path: Path, private: PrivateRegistry, stock: Stock
) -> None:
    """It was pulled by its digest while everybody could; only the attacker's manifest, which is in the cache, names it."""
    directory, hers, layer = tmp_path / "cache", f"/v2/{HERS}/manifests/1", parts(APP, stock.app)["layer"]
    private.public.add(APP)
    async with started(directory, with_access(private, "verify", publicFor="5m")) as cache:
        assert (await cache.get(layer)).status == 200
        await cache.settled()
        private.public.discard(APP)
        clock.advance(400)
        assert (await cache.get(layer)).status == 401
        assert (await cache.get(layer, ALICE.headers)).status == 200
        assert (await cache.get(hers)).status == 200
        assert (await cache.get(parts(HERS, stock.app)["layer"])).status == 404
    for name in ("cache.db", "cache.db-wal", "cache.db-shm"):
        (directory / name).unlink(missing_ok=True)
    async with started(directory, with_access(private, "verify")) as cache:
        assert (await cache.get(hers)).status == 200
        answer = await cache.get(parts(HERS, stock.app)["layer"])
        assert answer.status == 404
        assert_bare(answer, stock.app)


async def test_t20_a_private_layer_is_not_public_after_a_crash_in_the_moment_in_which_it_was_kept(
    tmp_path: Path, private: PrivateRegistry, stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk as it is when the file has its final name, and the catalog does not know it yet."""
    directory, crashed, hers = tmp_path / "cache", tmp_path / "crashed", f"/v2/{HERS}/manifests/1"
    adopt = SpoolFile.adopt

    def adopt_and_crash(self: SpoolFile, digest: Any) -> None:
        adopt(self, digest)
        if str(digest) == stock.app.layer_digests[-1]:
            shutil.copytree(directory, crashed)

    async with started(directory, with_access(private, "verify")) as cache:
        assert (await cache.get(hers)).status == 200
        monkeypatch.setattr(SpoolFile, "adopt", adopt_and_crash)
        assert (await cache.get(parts(APP, stock.app)["layer"], ALICE.headers)).status == 200
        await cache.settled()
    async with started(crashed, with_access(private, "verify")) as cache:
        assert (await cache.get(hers)).status == 200
        answer = await cache.get(parts(HERS, stock.app)["layer"])
        assert answer.status == 404
        assert_bare(answer, stock.app)


# --- T21: who keeps a right that is gone, and who loses one that is not ---


ODD = "web.config"
FAILURES = {
    "page": status(403, b"<html>blocked</html>", "text/html"),
    "500": status(500),
    "405": oci_error(405, "UNSUPPORTED"),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("mode", ["verify", "shared", "verify-public"])
async def test_t21_who_lost_his_right_cannot_keep_it_by_a_tag_that_a_firewall_blocks(
    clock: Clock, start_cache: StartCache, private: PrivateRegistry, stock: Stock, tmp_path: Path, mode: str, failure: str
) -> None:
    """What fails is one question of his own choice: the registry is up, and would refuse him what he then asks for."""

    def firewall(request: Request, default: Responder) -> Answer:
        blocked = request.path.endswith(f"/manifests/{ODD}")
        return FAILURES[failure] if blocked else private._refusal(request) or private.truth(request)

    private.fault = Modifier(firewall)
    secrets = [secret_for(tmp_path)] if mode == "shared" else []
    section = with_access(private, mode.partition("-")[0], publicFor="5m")
    cache = await start_cache(section, imagePullSecrets=secrets, **VERIFY)
    headers = ALICE.headers if mode == "verify" else []
    if mode == "verify-public":
        private.public.add(APP)
    await pull(cache, APP, stock.app, headers)
    private.withdraw(ALICE)
    private.withdraw(PROXYS)
    private.public.discard(APP)
    clock.advance(301)
    await cache.get(f"/v2/{APP}/manifests/{ODD}", headers)
    assert_bare(await cache.get(parts(APP, stock.app)["layer"], headers), stock.app)


@pytest.mark.parametrize("kind", ["405", "500"])
async def test_t21_a_registry_that_lists_no_tags_can_still_withdraw_a_right(
    clock: Clock, start_cache: StartCache, private: PrivateRegistry, stock: Stock, kind: str
) -> None:
    """It has refused this very content, certainly; that its list of tags cannot be had is no yes."""

    def lists_nothing(request: Request, default: Responder) -> Answer:
        if request.path.endswith("/tags/list"):
            return FAILURES[kind]
        return private._refusal(request) or private.truth(request)

    private.kind, private.fault = "basic", Modifier(lists_nothing)
    cache = await start_cache(with_access(private, "verify"), **VERIFY)
    for part in ("tag", "layer"):
        assert (await cache.get(parts(APP, stock.app)[part], ALICE.headers)).status == 200
    private.withdraw(ALICE)
    clock.advance(301)
    for _ in range(2):
        assert_bare(await cache.get(parts(APP, stock.app)["layer"], ALICE.headers), stock.app)


@pytest.mark.parametrize("mode", ["public", "verify", "client", "shared"])
async def test_t21_one_artifact_that_is_refused_by_401_does_not_close_its_repository(
    clock: Clock, start_cache: StartCache, private: PrivateRegistry, stock: Stock, tmp_path: Path, mode: str
) -> None:
    """As by 403: the question for the tags has to be asked, not answered by what was just said to the first one."""
    repository, image = (APP, stock.app) if mode in ("client", "shared") else (OPEN, stock.open)
    blocked = private.add_blob(repository, b"malware")

    def scanner(request: Request, default: Responder) -> Answer:
        refusal = private._refusal(request)
        if refusal is None and request.path.endswith(blocked):
            challenge = f'Bearer realm="{private.url}/token",service="registry",scope="repository:{repository}:pull"'
            return unauthorized([challenge])
        return refusal or private.truth(request)

    private.fault = Modifier(scanner)
    secrets = [secret_for(tmp_path)] if mode == "shared" else []
    access = "verify" if mode == "client" else mode
    cache = await start_cache(with_access(private, access), imagePullSecrets=secrets, **VERIFY)
    headers = ALICE.headers if mode == "client" else []
    await pull(cache, repository, image, headers)
    clock.advance(1000 if mode != "public" else 0)
    assert (await cache.get(f"/v2/{repository}/blobs/{blocked}", headers)).status in (401, 403)
    found = await statuses(cache, repository, image, headers, only=("tag", "digest", "config", "layer"))
    assert set(found.values()) == {200}


async def test_t21_a_refusal_of_the_old_secret_is_none_of_the_new_one(
    clock: Clock, tmp_path: Path, private: PrivateRegistry, stock: Stock, caplog: pytest.LogCaptureFixture
) -> None:
    """It comes when the secret has been exchanged for one that has the right."""
    caplog.set_level("INFO")
    weak = Account("weak", "we4k-c4n4ry-1199")
    private.allow(weak)
    mounted = Mounted(tmp_path / "secret", pull_secret({UPSTREAM: (weak.user, weak.password)}))
    section = [{"directory": str(mounted.directory)}]
    private.kind = "basic"
    async with started(
        tmp_path / "cache", with_access(private, "shared"), imagePullSecrets=section, rereadFilesEvery="0.05s"
    ) as cache:
        path, held = parts(APP, stock.app)["tag"], asyncio.Event()

        def refuse(request: Request, default: Responder) -> Answer:
            answer = private._refusal(request) or private.truth(request)
            return compose(answer, gate(held)).change(request, default) if answer.status == 403 else answer

        private.fault = Modifier(refuse)
        async with asyncio.TaskGroup() as group:
            first = group.create_task(cache.get(path))
            await private.wait_for(lambda: any(user == weak.user for user, _ in private.shown()))
            mounted.write(pull_secret({UPSTREAM: (PROXYS.user, PROXYS.password)}))
            await until(lambda: "the pull secrets have changed" in caplog.text)
            held.set()
        assert first.result().status == 403
        clock.advance(11)
        assert (await cache.get(path)).status == 200


# --- what is held is served ---


async def test_what_a_client_was_given_is_served_when_the_repository_is_public_now_and_the_registry_down(
    clock: Clock, start_cache: StartCache, private: PrivateRegistry, stock: Stock
) -> None:
    cache = await start_cache(with_access(private, "verify"), **VERIFY)
    await pull(cache, APP, stock.app, ALICE.headers)
    private.public.add(APP)
    clock.advance(61)
    new = f"/v2/{APP}/blobs/{private.add_blob(APP, b'new')}"
    assert (await cache.get(parts(APP, stock.app)["tag"])).status == 200
    assert (await cache.get(new)).status == 200
    private.fault = status(503)
    answer = await cache.get(parts(APP, stock.app)["layer"], ALICE.headers)
    assert (answer.status, answer.body) == (200, body_of(stock.app, "layer"))


@pytest.mark.parametrize(("mode", "part"), [("verify", "layer"), ("verify", "referrers"), ("shared", "referrers")])
async def test_what_is_held_is_served_in_time_when_the_registry_says_nothing(
    clock: Clock,
    start_cache: StartCache,
    private: PrivateRegistry,
    stock: Stock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    part: str,
) -> None:
    """containerd gives up after 30 s without headers; who may read and what there is are asked one after the other."""
    secrets = [secret_for(tmp_path)] if mode == "shared" else []
    headers = ALICE.headers if mode == "verify" else []
    cache = await start_cache(with_access(private, mode), imagePullSecrets=secrets, **VERIFY)
    await pull(cache, APP, stock.app, headers)
    clock.advance(400)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 400)
    never = asyncio.Event()
    private.fault = gate(never)
    request = asyncio.create_task(cache.get(parts(APP, stock.app)[part], headers, within=1000))
    seconds = 0
    while not request.done() and seconds < 90:
        clock.advance(1)
        seconds += 1
        for _ in range(5):
            await asyncio.sleep(0.01)
    never.set()
    answer = await request
    assert (answer.status, seconds < 30) == (200, True)


async def test_t21_that_the_anonymous_are_not_answered_stretches_no_right(
    clock: Clock, start_cache: StartCache, private: PrivateRegistry, stock: Stock
) -> None:
    """A token server that refuses those without an account in plain text, as cesanta/docker_auth does (``http.Error``): so
    whether they may read is never known, and who lost his right has only to ask without a credential first."""

    def accounts_only(request: Request, default: Responder) -> Answer:
        return default(request) if request.headers.has("Authorization") else status(401, b"Auth failed.")

    private.token_fault = Modifier(accounts_only)
    cache = await start_cache(with_access(private, "verify"), **VERIFY)
    await pull(cache, APP, stock.app, ALICE.headers)
    private.withdraw(ALICE)
    clock.advance(3600)
    layer = parts(APP, stock.app)["layer"]
    assert_bare(await cache.get(layer), stock.app)
    assert_bare(await cache.get(layer, ALICE.headers), stock.app)


async def test_wrong_credentials_that_a_registry_answers_late_are_bounded_too(
    clock: Clock, start_cache: StartCache, private: PrivateRegistry, stock: Stock
) -> None:
    """It lets whoever shows a wrong password wait, as those do that defend themselves."""
    private.kind = "basic"
    cache = await start_cache(with_access(private, "verify"), **VERIFY)
    layer = parts(APP, stock.app)["layer"]
    assert (await cache.get(layer, ALICE.headers)).status == 200
    assert (await cache.get(layer)).status == 401
    never = asyncio.Event()

    def tarpit(request: Request, default: Responder) -> Answer:
        answer = private._refusal(request) or private.truth(request)
        return gate(never).change(request, lambda _: answer) if request.headers.has("Authorization") else answer

    private.fault = Modifier(tarpit)
    tasks = []
    for number in range(110):
        tasks.append(asyncio.create_task(cache.get(layer, Account("alice", f"wrong-{number}").headers, within=1000)))
        clock.advance(0.5)
        for _ in range(3):
            await asyncio.sleep(0.005)
    reached = {password for _, password in private.shown() if password.startswith("wrong")}
    never.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(reached) <= 10


async def test_wrong_content_of_another_upstream_cannot_be_continued(
    start_cache: StartCache, private: PrivateRegistry, stock: Stock
) -> None:
    """A client of a good registry followed the download of a bad one; its body was cut, and what it has of it is wrong. It
    comes back for the rest (containerd does, to the same mirror first): it must be sent elsewhere."""
    data = b"the true layer " * 300_000
    digest = private.add_blob(OPEN, data)
    async with ScriptedRegistry() as bad:
        cache = await start_cache(with_access(private, "public"), with_access(bad, "public", "bad.test"))
        private.add_image(OPEN, "big", [data])
        assert (await cache.get(f"/v2/{OPEN}/manifests/big")).status == 200
        held, path = asyncio.Event(), f"/v2/{OPEN}/blobs/{digest}"
        wrong = status(200, b"x" * len(data), "application/octet-stream")
        bad.script("GET", f"/v2/bad/app/blobs/{digest}", compose(wrong, gate(held, after=2_000_000)))
        async with asyncio.TaskGroup() as group:
            group.create_task(cache.get(f"/v2/bad.test/bad/app/blobs/{digest}"))
            await bad.wait_for(lambda: bad.count("GET", f"/v2/bad/app/blobs/{digest}"))
            stream = await cache.open(path)
            held.set()
            async with stream:
                got = await stream.read_all()
                assert not stream.clean_end
                assert data[: len(got)] != got
        assert (await cache.get(path, [("Range", f"bytes={len(got)}-")])).status == 502


async def test_wrong_credentials_of_a_client_without_an_address_are_counted_too(
    tmp_path: Path, private: PrivateRegistry, stock: Stock
) -> None:
    """An ``X-Forwarded-For`` that ends with nothing names nobody; what is bounded for all together is bounded for him."""
    section = with_access(private, "verify")
    async with started(tmp_path / "cache", section, listener={"tlsTerminatedInFront": True}) as cache:
        for number in range(80):
            headers = [*Account("alice", f"wrong-{number}").headers, ("X-Forwarded-For", "10.0.0.1, ")]
            await cache.get(parts(APP, stock.app)["tag"], headers)
    assert len(private.shown()) <= 60


@pytest.mark.parametrize("way", ["adopt", "manifest"])
async def test_t21_what_is_linked_in_the_moment_of_a_withdrawal_is_withdrawn(
    clock: Clock,
    start_cache: StartCache,
    private: PrivateRegistry,
    stock: Stock,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    way: str,
) -> None:
    """One thread has found the right in order, another withdraws it, the first one writes its link."""
    is_void, withdrawn = Store.is_void, [False]

    def then_withdrawn(self: Store, origin: Origin) -> bool:
        answer = is_void(self, origin)
        if origin.proof == "anonymous" and origin.repository == APP and not withdrawn[0]:
            withdrawn[0] = True
            self.withdraw(origin.upstream, origin.repository, "anonymous")
        return answer

    private.public.add(APP)
    cache = await start_cache(with_access(private, "verify"), **VERIFY)
    part = "layer" if way == "adopt" else "digest"
    monkeypatch.setattr(Store, "is_void", then_withdrawn)
    assert (await cache.get(parts(APP, stock.app)[part])).status == 200
    await cache.settled()
    assert withdrawn[0]
    private.public.discard(APP)
    private.fault = status(503)
    clock.advance(48 * 3600)
    assert (await cache.get(parts(APP, stock.app)[part])).status >= 500


async def test_t20_a_private_manifest_is_not_opened_by_another_upstreams_word_while_it_is_being_kept(
    start_cache: StartCache, private: PrivateRegistry, stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The catalog knows it already, and not yet whose it is."""
    link, arrived, goes_on = Catalog.link, threading.Event(), threading.Event()

    def late(self: Catalog, origin: Origin, digest: Any) -> Any:
        if str(digest) == stock.app.digest and origin.proof == "client":
            arrived.set()
            goes_on.wait(10)
        return link(self, origin, digest)

    async with ScriptedRegistry() as liar:
        cache = await start_cache(with_access(private, "verify"), with_access(liar, "public", "evil.test"), **VERIFY)
        says = status(200, stock.app.data, stock.app.media_type, {"Docker-Content-Digest": stock.app.digest})
        liar.script("HEAD", lambda _: True, says, forever=True)
        monkeypatch.setattr(Catalog, "link", late)
        try:
            first = asyncio.create_task(cache.get(parts(APP, stock.app)["digest"], ALICE.headers))
            await until(arrived.is_set)
            answer = await cache.get(f"/v2/evil.test/evil/app/manifests/{stock.app.digest}")
        finally:
            goes_on.set()
        await first
        assert_bare(answer, stock.app)


async def test_a_right_password_of_a_client_that_leaves_is_no_wrong_one(
    tmp_path: Path, private: PrivateRegistry, stock: Stock
) -> None:
    """Ten times while it is checked, which takes as long as its hash is dear: the eleventh is no 429."""
    file, node = tmp_path / "htpasswd", Account("node", "n0de-c4n4ry-6d21")
    file.write_bytes(b"node:" + bcrypt.hashpw(node.password.encode(), bcrypt.gensalt(12)) + b"\n")
    async with started(tmp_path / "cache", upstream(private), listener={"htpasswdFile": str(file)}) as cache:
        for _ in range(10):
            wire = await open_wire(cache.host, cache.port)
            await wire.send(f"GET /v2/ HTTP/1.1\r\nHost: a\r\nAuthorization: {node.header}\r\n\r\n".encode())
            assert (await cache.get("/v2/")).status == 401  # what came before it is being looked at
            await wire.abort()
            await until(lambda: cache.metric("connections") == 0)
        assert (await cache.get("/v2/", node.headers)).status == 200


@pytest.mark.parametrize("part", ["digest", "layer"])
@pytest.mark.parametrize("mode", ["verify", "shared"])
async def test_what_is_held_is_served_to_who_may_read_when_the_registry_has_it_no_more(
    clock: Clock, start_cache: StartCache, private: PrivateRegistry, stock: Stock, tmp_path: Path, mode: str, part: str
) -> None:
    """The image was deleted there, and the right to its repository is as it was: the registry tells the tags. Of a public
    repository a digest is served on; so is this one, as long as the yes of before is fresh."""
    secrets = [secret_for(tmp_path)] if mode == "shared" else []
    headers = ALICE.headers if mode == "verify" else []
    cache = await start_cache(with_access(private, mode), imagePullSecrets=secrets, **VERIFY)
    await pull(cache, APP, stock.app, headers)

    def gone(request: Request, default: Responder) -> Answer:
        refusal = private._refusal(request)
        if refusal is None and not request.path.endswith("/tags/list"):
            return oci_error(404, "MANIFEST_UNKNOWN")
        return refusal or private.truth(request)

    private.fault = Modifier(gone)
    for seconds in (0, 400):
        clock.advance(seconds)
        assert ((await cache.get(parts(APP, stock.app)[part], headers)).status, seconds) == (200, seconds)
