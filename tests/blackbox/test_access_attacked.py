"""Promises about credentials and private content that an attacker broke: each test says what should hold."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from pathlib import Path
from typing import Any

import bcrypt
import pytest

from proxy.config.file import ConfigError, validate
from tests.blackbox.private import (
    ALICE,
    APP,
    BOB,
    EXTERNAL,
    HERS,
    OPEN,
    PROXYS,
    Account,
    Clock,
    PrivateRegistry,
    Stock,
    assert_bare,
    bearer,
    deployed,
    fetch_from,
    parts,
    pull,
    secret_for,
    started,
    token,
    until,
    with_access,
)
from tests.conftest import UPSTREAM, StartCache, settings, upstream
from tests.fakes.answers import (
    Modifier,
    Step,
    gate,
    oci_error,
    status,
    with_headers,
)
from tests.fakes.messages import Answer, Request, Responder
from tests.fakes.registry import ScriptedRegistry
from tests.fakes.tls import Authority

VERIFY: dict[str, Any] = {"externalURL": EXTERNAL}
CROWD = 64


# --- a right that is withdrawn, and who can keep it ---


async def test_who_lost_his_right_cannot_keep_it_by_a_header_that_a_firewall_blocks(
    clock: Clock, start_cache: StartCache, private: PrivateRegistry, stock: Stock
) -> None:
    """His ``Via`` goes upstream with the question whether he may read; what fails for his sake is no failing upstream, so
    the yes that he had is not stretched."""

    def firewall(request: Request, default: Responder) -> Answer:
        if "OR 1=1" in (request.headers.get("Via") or ""):
            return status(403, b"<html>blocked</html>", "text/html")
        return private._refusal(request) or private.truth(request)

    private.fault = Modifier(firewall)
    cache = await start_cache(with_access(private, "verify"), **VERIFY)
    await pull(cache, APP, stock.app, ALICE.headers)
    private.withdraw(ALICE)
    clock.advance(301)
    layer = parts(APP, stock.app)["layer"]
    assert_bare(await cache.get(layer, [*ALICE.headers, ("Via", "1.1 ' OR 1=1 --")]), stock.app)


@pytest.mark.parametrize("kind", ["registry", "token-server"])
async def test_a_question_about_another_repository_stretches_nobodys_right(
    clock: Clock, start_cache: StartCache, private: PrivateRegistry, stock: Stock, kind: str
) -> None:
    """A registry, or its token server, answers 400 for a name that it does not take, as many do; whoever asks for it must
    not thereby let those whose right is gone read on, without end where everybody had it."""

    def picky(request: Request) -> bool:
        return "odd" in request.path if kind == "registry" else "odd" in request.target

    def answer(request: Request, default: Responder) -> Answer:
        return oci_error(400, "NAME_INVALID") if picky(request) else private._refusal(request) or private.truth(request)

    def give(request: Request, default: Responder) -> Answer:
        return oci_error(400, "UNSUPPORTED") if picky(request) else default(request)

    private.fault, private.token_fault = Modifier(answer), Modifier(give)
    cache = await start_cache(with_access(private, "verify", publicFor="5m"), **VERIFY)
    await pull(cache, OPEN, stock.open)
    await pull(cache, APP, stock.app, ALICE.headers)
    private.public.discard(OPEN)
    private.withdraw(ALICE)
    clock.advance(301)
    await cache.get("/v2/odd/name/manifests/1")
    assert_bare(await cache.get(parts(OPEN, stock.open)["layer"]), stock.open)
    await cache.get("/v2/odd/name/manifests/1")
    assert_bare(await cache.get(parts(APP, stock.app)["layer"], ALICE.headers), stock.app)


async def test_a_download_that_ends_after_the_right_was_withdrawn_proves_nothing(
    clock: Clock, start_cache: StartCache, private: PrivateRegistry, stock: Stock
) -> None:
    """Begun while the repository was public, it is linked as public after the registry has refused it; then whoever can
    write a manifest that names it opens it to everybody."""
    private.public.add(APP)
    cache = await start_cache(with_access(private, "verify"), **VERIFY)
    layer = parts(APP, stock.app)["layer"]
    held = asyncio.Event()
    private.script("GET", layer, gate(held, after=10))
    async with asyncio.TaskGroup() as group:
        first = group.create_task(cache.get(layer))
        await private.wait_for(lambda: private.count("GET", layer))
        private.public.discard(APP)
        assert (await cache.get(parts(APP, stock.app)["tag"])).status in (401, 403)
        held.set()
    assert first.result().status == 200
    await cache.settled()
    assert (await cache.get(f"/v2/{HERS}/manifests/1")).status == 200
    answer = await cache.get(parts(HERS, stock.app)["layer"])
    assert answer.status == 404
    assert_bare(answer, stock.app)


async def test_nor_does_it_bring_back_what_our_secret_opened(
    clock: Clock, start_cache: StartCache, private: PrivateRegistry, stock: Stock, tmp_path: Path
) -> None:
    """The registry has refused the cache's secret meanwhile; when it is down later, that late link would be a yes of
    before, which has no end."""
    cache = await start_cache(with_access(private, "shared"), imagePullSecrets=[secret_for(tmp_path)])
    layer = parts(APP, stock.app)["layer"]
    held = asyncio.Event()
    private.script("GET", layer, gate(held, after=10))
    async with asyncio.TaskGroup() as group:
        group.create_task(cache.get(layer))
        await private.wait_for(lambda: private.count("GET", layer))
        private.withdraw(PROXYS)
        assert (await cache.get(parts(APP, stock.app)["tag"])).status == 403
        held.set()
    await cache.settled()
    clock.advance(70)
    private.fault = status(503)
    assert_bare(await cache.get(layer), stock.app)


async def test_a_yes_that_comes_after_a_later_no_is_none(
    start_cache: StartCache, private: PrivateRegistry, stock: Stock, tmp_path: Path
) -> None:
    """Two questions as whether anybody may read, at once: the answer to the first was on its way while the registry closed
    the repository and refused the second. From then on the cache's own secret would fetch it for everybody, for a day."""
    private.public.add(APP)
    cache = await start_cache(with_access(private, "public"), imagePullSecrets=[secret_for(tmp_path)])
    tag, layer = parts(APP, stock.app)["tag"], parts(APP, stock.app)["layer"]
    held = asyncio.Event()
    private.script("HEAD", tag, gate(held))
    async with asyncio.TaskGroup() as group:
        group.create_task(cache.get(tag))
        await private.wait_for(lambda: any(asked.headers.has("Authorization") for asked in private.seen("HEAD", tag)))
        private.public.discard(APP)
        assert (await cache.get(layer)).status == 403
        held.set()
    assert_bare(await cache.get(layer), stock.app)


# --- what is taken for a yes ---


@pytest.mark.parametrize("kind", ["text/plain", "application/json", ""])
async def test_a_page_that_is_not_html_is_no_yes_for_a_blob_that_is_not_held(
    start_cache: StartCache, private: PrivateRegistry, stock: Stock, tmp_path: Path, kind: str
) -> None:
    """A middlebox that says 200 to everything for a moment: from then on, for ``publicFor``, everybody would be given what
    the cache's own secret opens."""
    cache = await start_cache(with_access(private, "public"), imagePullSecrets=[secret_for(tmp_path)])
    assert (await cache.get(f"/v2/{APP}/manifests/1")).status == 403
    cache = await start_cache(with_access(private, "public"), imagePullSecrets=[secret_for(tmp_path)])
    private.fault = status(200, b"please log in", kind)
    await cache.head(f"/v2/{APP}/blobs/sha256:{'0' * 64}")
    private.fault = None
    assert_bare(await cache.get(f"/v2/{APP}/manifests/1"), stock.app)


@pytest.mark.parametrize("part", ["digest", "config", "layer"])
async def test_the_right_to_list_is_no_right_to_pull(
    start_cache: StartCache, private: PrivateRegistry, stock: Stock, part: str
) -> None:
    """Amazon ECR has ``ecr:ListImages`` beside ``ecr:BatchGetImage``: who is told the tags and refused the image gets
    nothing of it here either."""

    def answer(request: Request, default: Responder) -> Answer:
        if private._user_of(request) == BOB.user and APP in request.path:
            return private.truth(request) if request.path.endswith("/tags/list") else oci_error(403, "DENIED")
        return private._refusal(request) or private.truth(request)

    private.allow(BOB, APP)
    private.fault = Modifier(answer)
    cache = await start_cache(with_access(private, "verify"), **VERIFY)
    await pull(cache, APP, stock.app, ALICE.headers)
    path = parts(APP, stock.app)[part]
    assert (await cache.get(f"/v2/{APP}/tags/list", BOB.headers)).status == 200
    assert_bare(await cache.get(path, BOB.headers), stock.app)


@pytest.mark.parametrize("part", ["manifest", "layer"])
async def test_an_upstream_that_only_says_that_it_has_a_private_image_does_not_open_it(
    start_cache: StartCache, private: PrivateRegistry, stock: Stock, part: str
) -> None:
    """The word of one registry (or of a mirror) about a digest that it has never shown the bytes of, against that of the
    private registry whose content it is."""
    async with ScriptedRegistry("127.0.0.3") as liar:
        liar.add_image("evil/app", "1", [b"bait"])
        cache = await start_cache(with_access(private, "verify"), upstream(liar, "evil.test", access="public"), **VERIFY)
        await pull(cache, APP, stock.app, ALICE.headers)
        tag = "/v2/evil.test/evil/app/manifests/1"
        assert (await cache.get(tag)).status == 200
        size = len(stock.app.layers[-1])
        says: dict[str, Step] = {
            "manifest": with_headers({"Docker-Content-Digest": stock.app.digest, "Content-Type": stock.app.media_type}),
            "layer": status(200, b"x" * size, "application/octet-stream"),
        }
        liar.script("HEAD", lambda _: True, says[part], forever=True)
        path = tag if part == "manifest" else f"/v2/evil.test/evil/app/blobs/{stock.app.layer_digests[-1]}"
        body = (await cache.get(path)).body
        assert body not in (stock.app.data, stock.app.layers[-1])


# --- the client certificate of an upstream is a credential, too ---


def _mutual(tmp_path: Path, mode: ssl.VerifyMode = ssl.CERT_REQUIRED) -> tuple[Authority, dict[str, Any], ssl.SSLContext]:
    ca = Authority(tmp_path)
    cert, key = ca.pair("pullcache.test", stem="client")
    context = ca.good()
    context.verify_mode = mode
    context.load_verify_locations(ca.ca_path)
    return ca, {"caFile": str(ca.ca_path), "clientCertFile": str(cert), "clientKeyFile": str(key)}, context


@pytest.mark.parametrize("access", [None, "verify"])
async def test_what_our_client_certificate_opens_is_not_what_the_anonymous_may_read(
    tmp_path: Path, access: str | None
) -> None:
    """A registry that knows the cache by its certificate alone, and an open listener: the start is refused, as with a pull
    secret."""
    _, files, context = _mutual(tmp_path)
    async with ScriptedRegistry(ssl=context) as registry:
        more = {"access": access} if access else {}
        with pytest.raises(ConfigError, match="clientCertFile"):
            validate(settings(tmp_path / "cache", upstream(registry, **files, **more), **VERIFY))


# --- who can keep others out ---


async def test_a_crowd_of_right_clients_is_no_attack(
    start_cache: StartCache, private: PrivateRegistry, stock: Stock
) -> None:
    """Many nodes that start at once, each with a secret of its own, and a registry that takes a moment."""
    accounts = [Account(f"node-{number}", f"right-{number}") for number in range(CROWD)]
    for account in accounts:
        private.allow(account, APP)
    cache = await start_cache(with_access(private, "verify"), **VERIFY)
    path = parts(APP, stock.app)["tag"]
    assert (await cache.get(path)).status == 401
    held = asyncio.Event()
    private.token_fault = gate(held)
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(fetch_from(f"127.0.1.{number + 1}", cache, "GET", path, account.headers))
            for number, account in enumerate(accounts)
        ]
        await until(lambda: private.count("GET", "/token") >= 20 or any(task.done() for task in tasks))
        held.set()
    assert {task.result().status for task in tasks} == {200}


async def test_tokens_that_others_fetch_do_not_end_mine(
    start_cache: StartCache, private: PrivateRegistry, stock: Stock
) -> None:
    """65 pairs of words, which nobody checks, from behind the same address: the token that was promised for minutes is good
    for those minutes."""
    cache = await start_cache(with_access(private, "verify"), **VERIFY)
    mine = bearer(await token(cache, ALICE))
    path = parts(APP, stock.app)["tag"]
    assert (await cache.get(path, mine)).status == 200
    for number in range(65):
        await token(cache, Account("nobody", str(number)))
    assert (await cache.get(path, mine)).status == 200


def _is_open(sock: socket.socket) -> bool:
    try:
        return sock.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


async def test_many_who_guess_do_not_use_up_the_places_of_those_who_log_in(
    registry: ScriptedRegistry, tmp_path: Path
) -> None:
    """Eight addresses, ten wrong passwords each, which is what each may try in a minute: another one's login is looked at,
    and not told that too many are waiting."""
    users = tmp_path / "htpasswd"
    users.write_text(f"alice:{bcrypt.hashpw(ALICE.password.encode(), bcrypt.gensalt(10)).decode()}\n")
    async with started(tmp_path / "cache", upstream(registry), listener={"htpasswdFile": str(users)}) as cache:
        guesses = [
            asyncio.create_task(fetch_from(f"127.0.1.{n % 8 + 1}", cache, "GET", "/v2/", Account("alice", str(n)).headers))
            for n in range(80)
        ]
        await until(lambda: cache.metric("requests_total", status="503") > 0 or all(guess.done() for guess in guesses))
        answer = await fetch_from("127.0.2.1", cache, "GET", "/v2/", ALICE.headers)
        await asyncio.gather(*guesses)
    assert answer.status == 200


# --- what is held is served, whoever fails ---


def _program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def _helper(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A credential helper ``canary`` that has the cache's own credential."""
    helper = folder / "docker-credential-canary"
    answer = json.dumps({"Username": PROXYS.user, "Secret": PROXYS.password})
    _program(helper, f"cat >/dev/null; echo '{answer}'")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return helper


def _plugin(folder: Path, key_type: str) -> tuple[Path, dict[str, Any], str]:
    """A provider plugin that has the cache's own credential: its program, the section of the configuration, its answer."""
    plugins = folder / "plugins"
    plugins.mkdir()
    version = "credentialprovider.kubelet.k8s.io/v1"
    provider = {"name": "canary", "matchImages": [UPSTREAM], "defaultCacheDuration": "5m", "apiVersion": version}
    document = {"kind": "CredentialProviderConfig", "apiVersion": "kubelet.config.k8s.io/v1", "providers": [provider]}
    config = folder / "providers.json"
    config.write_text(json.dumps(document))
    auth = {UPSTREAM: {"username": PROXYS.user, "password": PROXYS.password}}
    answer = {"kind": "CredentialProviderResponse", "apiVersion": version, "cacheKeyType": key_type, "auth": auth}
    section = {"imageCredentialProvider": {"configFile": str(config), "binDirectory": str(plugins)}}
    return plugins / "canary", section, json.dumps(answer)


@pytest.mark.parametrize("failure", ["helper-fails", "password-has-run-out"])
async def test_a_secret_that_cannot_be_used_is_no_withdrawal_where_another_one_has_no_right(
    clock: Clock,
    start_cache: StartCache,
    private: PrivateRegistry,
    stock: Stock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: str,
) -> None:
    """The secret with the right cannot be had, or is not accepted, just now; that the other one, which is for something
    else, is refused says nothing of what the first one opens."""
    helper = _helper(tmp_path, monkeypatch)
    docker = tmp_path / "config.json"
    docker.write_text(json.dumps({"credHelpers": {UPSTREAM: "canary"}}))
    secrets = [{"file": str(docker)}, secret_for(tmp_path, account=BOB)]
    cache = await start_cache(with_access(private, "shared"), imagePullSecrets=secrets)
    await pull(cache, APP, stock.app)
    if failure == "helper-fails":
        _program(helper, "exit 1")
    else:
        private.passwords[PROXYS.user] = "another"
    clock.advance(310)
    assert (await cache.get(parts(APP, stock.app)["layer"])).status == 200, "it is held, and nobody has withdrawn it"


async def test_a_reload_while_a_helper_fails_keeps_what_it_gave(
    private: PrivateRegistry, stock: Stock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGHUP is for using what is new: a credential that is good for minutes is not dropped for nothing."""
    helper = _helper(tmp_path, monkeypatch)
    docker = tmp_path / "config.json"
    docker.write_text(json.dumps({"credHelpers": {UPSTREAM: "canary"}}))
    section = with_access(private, "shared")
    config = validate(settings(tmp_path / "cache", section, imagePullSecrets=[{"file": str(docker)}]))
    async with deployed(config) as served:
        assert (await served.get(parts(APP, stock.app)["tag"])).status == 200
        _program(helper, "exit 1")
        served.cache.reload()
        assert (await served.get(parts(APP, stock.app)["layer"])).status == 200


async def test_one_artifact_that_is_blocked_does_not_close_its_repository(
    start_cache: StartCache, private: PrivateRegistry, stock: Stock, tmp_path: Path
) -> None:
    """Registries that scan refuse single artifacts with 403 DENIED (JFrog Xray): what anybody can ask for must not take the
    rest from all."""
    blocked = private.add_blob(APP, b"a virus")
    private.script("*", f"/v2/{APP}/blobs/{blocked}", oci_error(403, "DENIED", "blocked by policy"), forever=True)
    cache = await start_cache(with_access(private, "shared"), imagePullSecrets=[secret_for(tmp_path)])
    await pull(cache, APP, stock.app)
    assert (await cache.get(f"/v2/{APP}/blobs/{blocked}")).status == 403
    assert (await cache.get(parts(APP, stock.app)["tag"])).status == 200


GATEWAYS: dict[str, Step] = {
    "403-json": status(403, b'{"message":"Forbidden"}', "application/json"),
    "401-json": status(401, b'{"message":"Unauthorized"}', "application/json"),
    "401-basic-page": status(401, b"<html>", "text/html", {"WWW-Authenticate": 'Basic realm="gateway"'}),
}


CASES = [(mode, gateway) for mode in ("verify", "shared", "public") for gateway in GATEWAYS if "json" in gateway]


@pytest.mark.parametrize(("mode", "gateway"), [*CASES, ("verify", "401-basic-page")])
async def test_a_gateway_that_is_no_registry_withdraws_nothing(
    clock: Clock,
    start_cache: StartCache,
    private: PrivateRegistry,
    stock: Stock,
    tmp_path: Path,
    mode: str,
    gateway: str,
) -> None:
    """API gateways refuse in JSON that is no registry's error, and some want a password of their own."""
    secrets = [] if mode == "verify" else [secret_for(tmp_path)]
    headers = ALICE.headers if mode == "verify" else []
    repository, image = (OPEN, stock.open) if mode == "public" else (APP, stock.app)
    section = with_access(private, mode, publicFor="5m")
    cache = await start_cache(section, imagePullSecrets=secrets, **VERIFY)
    await pull(cache, repository, image, headers)
    clock.advance(301)
    if mode == "verify":  # that the anonymous may not read is known for a minute
        assert (await cache.get(parts(repository, image)["tag"])).status == 401
    private.fault = GATEWAYS[gateway]
    assert (await cache.get(parts(repository, image)["layer"], headers)).status == 200


async def test_a_gateways_page_at_the_token_server_is_no_word_on_a_clients_right(
    clock: Clock, start_cache: StartCache, private: PrivateRegistry, stock: Stock
) -> None:
    """The 403 of a firewall before the token server, in HTML, when a client's right is asked for again."""
    cache = await start_cache(with_access(private, "verify"), **VERIFY)
    await pull(cache, APP, stock.app, ALICE.headers)
    clock.advance(301)
    assert (await cache.get(parts(APP, stock.app)["tag"])).status == 401
    private.token_fault = status(403, b"<html>blocked</html>", "text/html")
    assert (await cache.get(parts(APP, stock.app)["layer"], ALICE.headers)).status == 200


async def test_a_plugin_that_hangs_keeps_nobody_waiting_for_what_is_held(
    clock: Clock, tmp_path: Path, private: PrivateRegistry, stock: Stock
) -> None:
    """containerd gives up after 30 s without headers; the right and the tag are asked for one after the other, and each
    waits for the same plugin."""
    plugin, section, answer = _plugin(tmp_path, "Registry")
    _program(plugin, f"cat >/dev/null; echo '{answer}'")
    async with started(tmp_path / "cache", with_access(private, "shared"), **section) as cache:
        await pull(cache, APP, stock.app)
        mark = tmp_path / "began"
        _program(plugin, f"cat >/dev/null; echo >>{mark}; exec sleep 1000")
        clock.advance(310)
        request = asyncio.create_task(cache.get(parts(APP, stock.app)["tag"], within=1000))
        await until(lambda: mark.exists() or request.done())
        for _ in range(29):
            clock.advance(1)
            for _ in range(5):
                await asyncio.sleep(0.01)
        is_answered = request.done()
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        clock.advance(100)  # the plugin's own time ends
        await asyncio.sleep(0.2)
    assert is_answered
