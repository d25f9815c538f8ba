"""A registry with accounts and private repositories, clients who show credentials, a clock, and a whole cache."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import parse_qs

from aiohttp import web

from proxy import admin, app
from proxy.config.file import validate
from proxy.config.model import Config
from tests.conftest import UPSTREAM, Pairs, RunningCache, running, settings, upstream
from tests.fakes.answers import Step, as_json, oci_error, perform, unauthorized
from tests.fakes.client import Wire, WireResponse, fetch, finish, read_head
from tests.fakes.content import Image, repo_of
from tests.fakes.messages import Answer, Headers, Request
from tests.fakes.registry import ScriptedRegistry
from tests.fakes.tokens import basic, credentials_in

EXTERNAL = "https://cache.test:8443"
Kind = Literal["token", "basic"]
KINDS: tuple[Kind, ...] = ("token", "basic")


@dataclass(frozen=True)
class Account:
    """A user and password."""

    user: str
    password: str

    @property
    def header(self) -> str:
        """The value of ``Authorization``."""
        return basic(self.user, self.password)

    @property
    def headers(self) -> Pairs:
        """What a client sends of it."""
        return [("Authorization", self.header)]


ALICE = Account("alice", "al1ce-c4n4ry-4f1d")
ANNE = Account("anne", "4nne-c4n4ry-77b0")
BOB = Account("bob", "b0b-c4n4ry-91aa")
WRONG = Account("alice", "wr0ng-c4n4ry-03ce")
PROXYS = Account("cache", "pr0xy-c4n4ry-5e5e")
SECRET_TEXTS = [account.password for account in (ALICE, ANNE, BOB, WRONG, PROXYS)]

APP, LIB, OPEN, HERS = "team/app", "team/lib", "open/app", "mallory/pub"


@dataclass(frozen=True)
class Issued:
    """A token of the registry: whose, and for what."""

    user: str | None
    repositories: frozenset[str]


class PrivateRegistry(ScriptedRegistry):
    """Gives a repository to whoever has the right to it, by tokens or by Basic; ``public`` ones to everybody.

    ``fault``, while it is set, answers every request below ``/v2/`` (``token_fault``: to the token server). Tokens are
    ``opaque``: a right that is withdrawn is gone at once; others are good until they end.
    """

    def __init__(self, kind: Kind = "token", host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__(host, port=port)
        self.kind = kind
        self.public: set[str] = set()
        self.passwords: dict[str, str] = {}
        self.rights: dict[str, set[str]] = {}
        self.refresh: dict[str, str] = {}
        self.fault: Step | None = None
        self.token_fault: Step | None = None
        self.opaque = True
        self.expires_in = 300
        self.given: dict[str, Issued] = {}
        self.refusals: list[Request] = []

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        return self

    def allow(self, account: Account, *repositories: str) -> None:
        """An account, and what it may read."""
        self.passwords[account.user] = account.password
        self.rights.setdefault(account.user, set()).update(repositories)

    def withdraw(self, account: Account) -> None:
        """It may read nothing from now on; it can still log in."""
        self.rights[account.user] = set()

    # --- what arrived ---

    def shown(self) -> set[tuple[str, str]]:
        """Every user and password that arrived."""
        return {found for request in self.requests if (found := credentials_in(request)) is not None}

    def attempts(self) -> int:
        """How many requests brought a user and password, a refresh token, or a token that was given for them."""
        return sum(
            credentials_in(request) is not None or b"refresh_token" in request.body or bool(self._user_of(request))
            for request in self.requests
        )

    def brought(self, path: str) -> int:
        """How often the content of a path was sent."""
        return self.count("GET", path)

    def knows(self, text: str) -> bool:
        """Whether a secret arrived in any form: as it is, or in a Basic header."""
        return self.heard(text) or any(text in f"{user}:{password}" for user, password in self.shown())

    # --- how it answers ---

    def truth(self, request: Request) -> Answer:
        """With its own token server."""
        return self._give(request) if request.path == "/token" else super().truth(request)

    def _answer(self, request: Request) -> Answer:
        if request.path == "/token" and self.token_fault is not None:
            return perform(self.token_fault, request, self.truth)
        if request.path.startswith("/v2"):
            if self.fault is not None:
                return perform(self.fault, request, self.truth)
            if (refusal := self._refusal(request)) is not None:
                self.refusals.append(request)
                return refusal
        return super()._answer(request)

    def _may(self, user: str | None, repository: str) -> bool:
        return repository in self.public or repository in self.rights.get(user or "", set())

    def _known(self, request: Request) -> tuple[str | None, bool]:
        """The user of a Basic header, and whether what came is in order."""
        shown = credentials_in(request)
        if shown is None:
            return None, not request.headers.has("Authorization")
        return shown[0], self.passwords.get(shown[0]) == shown[1]

    def _user_of(self, request: Request) -> str | None:
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.given[token].user if token in self.given else None

    def _refusal(self, request: Request) -> Answer | None:
        repository = repo_of(request.path)
        if self.kind == "basic":
            user, good = self._known(request)
            if not good or (user is None and not (repository and self._may(None, repository))):
                return unauthorized(['Basic realm="registry"'])
            return None if repository is None or self._may(user, repository) else oci_error(403, "DENIED")
        challenge = f'Bearer realm="{self.url}/token",service="registry"'
        if repository is None:
            return None if request.headers.has("Authorization") else unauthorized([challenge])
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        issued = self.given.get(token)
        if issued and repository in issued.repositories and (not self.opaque or self._may(issued.user, repository)):
            return None
        error = ',error="insufficient_scope"' if issued else ""
        return unauthorized([f'{challenge},scope="repository:{repository}:pull"{error}'])

    def _give(self, request: Request) -> Answer:
        user: str | None
        if request.method == "POST":
            form = parse_qs(request.body.decode())
            user = self.refresh.get(form.get("refresh_token", [""])[0])
            good, scopes = user is not None, form.get("scope", [])
        else:
            (user, good), scopes = self._known(request), request.params.get("scope", [])
        if not good:
            return oci_error(401, "UNAUTHORIZED", "incorrect username or password")
        wanted = {scope.split(":")[1] for line in scopes for scope in line.split() if scope.startswith("repository:")}
        token = secrets.token_urlsafe(24)
        self.given[token] = Issued(user, frozenset(each for each in wanted if self._may(user, each)))
        return as_json({"token": token, "expires_in": self.expires_in})


@dataclass(frozen=True)
class Stock:
    """What the registry has: ``team/app`` and ``team/lib`` are private, ``open/app`` and ``mallory/pub`` are public."""

    app: Image
    lib: Image
    open: Image
    hers: Image
    """In ``mallory/pub``: its manifest names the config and the layers of ``team/app``, and an index the manifest."""


def fill(registry: PrivateRegistry) -> Stock:
    """Content and rights: Alice and Anne may read ``team/*``, Bob ``team/lib`` alone."""
    app_image = registry.add_image(APP, "1", [b"private layer one", b"private layer two" * 5000])
    lib = registry.add_image(LIB, "1", [b"private library"])
    opened = registry.add_image(OPEN, "1", [b"public layer"])
    data = app_image.data + b"\n"  # the registry has never checked whether she has what she names
    hers = replace(app_image, data=data, digest=registry.add_manifest(HERS, data, app_image.media_type, "1"))
    registry.add_index(HERS, "index", [app_image])
    registry.add_artifact(APP, app_image, "application/x.signature", data=b"a private signature")
    registry.public |= {OPEN, HERS}
    for account, repositories in ((ALICE, (APP, LIB)), (ANNE, (APP, LIB)), (BOB, (LIB,)), (PROXYS, (APP, LIB))):
        registry.allow(account, *repositories)
    return Stock(app_image, lib, opened, hers)


def parts(repository: str, image: Image) -> dict[str, str]:
    """Everything of an image that can be asked for, by its kind; the content itself first."""
    return {
        "tag": f"/v2/{repository}/manifests/1",
        "digest": f"/v2/{repository}/manifests/{image.digest}",
        "config": f"/v2/{repository}/blobs/{image.config_digest}",
        "layer": f"/v2/{repository}/blobs/{image.layer_digests[-1]}",
        "tags": f"/v2/{repository}/tags/list",
        "referrers": f"/v2/{repository}/referrers/{image.digest}",
    }


CONTENT = ("tag", "digest", "config", "layer")
PARTS = (*CONTENT, "tags", "referrers")


def body_of(image: Image, part: str) -> bytes:
    """What one of ``CONTENT`` holds."""
    return {"tag": image.data, "digest": image.data, "config": image.config, "layer": image.layers[-1]}[part]


def with_access(registry: ScriptedRegistry, mode: str, name: str = UPSTREAM, **more: Any) -> dict[str, Any]:
    """The section of an upstream of that ``access``; keys of ``access`` itself are in ``more``, others in ``section``."""
    section = more.pop("section", {})
    shared = {"iUnderstandThisIsShared": True} if mode == "shared" else {}
    return upstream(registry, name, access={"mode": mode, **shared, **more}, **section)


def secret_for(directory: Path, registry: str = UPSTREAM, account: Account = PROXYS) -> dict[str, Any]:
    """The section of a pull secret of the cache, and its file."""
    file = directory / f"password-{account.user}"
    file.write_text(account.password)
    return {"registry": registry, "username": account.user, "passwordFile": str(file)}


async def pull(cache: RunningCache, repository: str, image: Image, headers: Pairs | None = None) -> None:
    """A whole pull, verified."""
    paths = parts(repository, image)
    for part in CONTENT:
        answer = await cache.get(paths[part], headers)
        assert (part, answer.status, answer.body) == (part, 200, body_of(image, part))
    for part in ("tags", "referrers"):
        assert (await cache.get(paths[part], headers)).status == 200


async def statuses(
    cache: RunningCache, repository: str, image: Image, headers: Pairs | None = None, only: Iterable[str] = PARTS
) -> dict[str, int]:
    """What each part is answered with; refusals must hold no content."""
    found = {}
    for part, path in parts(repository, image).items():
        if part not in only:
            continue
        answer = await cache.get(path, headers)
        found[part] = answer.status
        if answer.status >= 400:
            assert_bare(answer, image)
    return found


def assert_bare(answer: WireResponse, image: Image) -> None:
    """A refusal tells nothing of an image, and is nobody else's."""
    assert answer.status >= 400
    for content in (image.data, image.config, *image.layers, b"x.signature"):
        assert content not in answer.body
    for name in ("ETag", "Docker-Content-Digest", "Accept-Ranges"):
        assert not answer.headers.has(name)
    assert answer.headers.get("Cache-Control") == "private, no-store"


async def token(cache: RunningCache, account: Account | None, *scopes: str) -> str:
    """A token of the cache's own, as a client gets it: by GET, with Basic or without."""
    query = "&".join([f"scope={scope}" for scope in scopes] + ["service=pullcache"])
    answer = await cache.get(f"/token?{query}", account.headers if account else [])
    assert answer.status == 200, answer.body
    return str(json.loads(answer.body)["token"])


def bearer(value: str) -> Pairs:
    """The header that shows a token."""
    return [("Authorization", f"Bearer {value}")]


# --- where secrets must not be ---


def forms(text: str) -> set[bytes]:
    """A secret as it is and as Basic headers carry it, whatever user name is before it."""
    raw = text.encode()
    shifted = {base64.b64encode(b"x" * skip + raw)[4:-4] for skip in range(3)}
    return {raw, *shifted}


def found_on_disk(directory: Path, text: str) -> list[Path]:
    """The files that hold a secret in any form."""
    files = (path for path in directory.rglob("*") if path.is_file())
    found = []
    for path in files:
        with suppress(FileNotFoundError):  # a spool that was renamed or removed meanwhile
            found += [path] if any(form in path.read_bytes() for form in forms(text)) else []
    return found


# --- time ---


@dataclass
class Clock:
    """The event loop's time, which can be put forward."""

    ahead: float = 0.0
    held_at: float | None = None

    def hold(self) -> None:
        """No time passes from now on, however long things take."""
        self.held_at = asyncio.get_running_loop().time()

    def go_on(self) -> None:
        """It passes again, from where it was held."""
        now, self.held_at = self.held_at or 0.0, None
        self.ahead -= asyncio.get_running_loop().time() - now

    def advance(self, seconds: float) -> None:
        """So many seconds have passed."""
        self.ahead += seconds


@contextmanager
def movable_clock() -> Iterator[Clock]:
    """The running loop's clock, for caches that are started within; timers that are set fire when it is put forward."""
    loop = asyncio.get_running_loop()
    clock, real = Clock(), loop.time
    loop.time = lambda: real() + clock.ahead if clock.held_at is None else clock.held_at  # type: ignore[method-assign]
    try:
        yield clock
    finally:
        del loop.time


# --- other clients ---


async def fetch_from(
    source: str, cache: RunningCache, method: str, target: str, headers: Pairs | None = None, body: bytes = b""
) -> WireResponse:
    """One request from another address of this machine, such as 127.0.0.2."""
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    sock.setblocking(False)
    sock.bind((source, 0))
    await loop.sock_connect(sock, (cache.host, cache.port))
    _, wire = await loop.create_connection(Wire, sock=sock)
    length = [("Content-Length", str(len(body)))] if body else []
    lines = [f"{method} {target} HTTP/1.1", "Host: cache.test", *(f"{k}: {v}" for k, v in [*(headers or []), *length])]
    async with asyncio.timeout(30), wire:
        await wire.send("\r\n".join([*lines, "", ""]).encode() + body)
        return await finish(await read_head(wire, method))


# --- the cache as it is deployed ---


@dataclass
class Served:
    """A cache with its TLS, its admin listener and its explanations, as ``serve`` puts them together."""

    cache: app.Cache
    host: str
    port: int
    admin_port: int
    tls: ssl.SSLContext | None = None
    admin_tls: ssl.SSLContext | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    async def ask(self, method: str, target: str, headers: Pairs | None = None, **options: Any) -> WireResponse:
        """A request to the listener."""
        return await fetch(self.host, self.port, method, target, headers or [], ssl=options.pop("tls", self.tls), **options)

    async def get(self, target: str, headers: Pairs | None = None, **options: Any) -> WireResponse:
        """GET from the listener."""
        return await self.ask("GET", target, headers, **options)

    async def admin(self, target: str, headers: Pairs | None = None, **options: Any) -> WireResponse:
        """GET from the admin listener."""
        tls = options.pop("tls", self.admin_tls)
        return await fetch(self.host, self.admin_port, "GET", target, headers or [], ssl=tls, **options)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        samples = (s for family in self.cache.metrics.registry.collect() for s in family.samples)
        return sum(s.value for s in samples if s.name == f"pullcache_{name}" and labels.items() <= s.labels.items())


@asynccontextmanager
async def deployed(
    config: Config, tls: ssl.SSLContext | None = None, admin_tls: ssl.SSLContext | None = None
) -> AsyncIterator[Served]:
    """Serves ``config`` on ports of its own; the contexts are those that its clients use."""
    async with app.build(config) as built, AsyncExitStack() as stack:
        ports = []
        operators = admin.listener(built.metrics, lambda: True, built.actions, built.admin_token)
        for listener, server_tls in ((built.listener, built.tls), (operators, built.admin_tls)):
            runner = web.ServerRunner(listener, shutdown_timeout=1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            context = server_tls.context if server_tls else None
            await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
            ports.append(runner.addresses[0][1])
        yield Served(built, "127.0.0.1", ports[0], ports[1], tls, admin_tls)


def started(directory: Path, *upstreams: dict[str, Any], **sections: Any) -> AbstractAsyncContextManager[RunningCache]:
    """A cache that can be stopped, and started again on the same directory."""
    return running(validate(settings(directory, *upstreams, **{"externalURL": EXTERNAL, **sections})))


async def until(condition: Callable[[], bool], within: float = 20.0) -> None:
    """Waits for something that another task brings about."""
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.005)


def challenges(answer: WireResponse) -> list[str]:
    """What a refusal asks for."""
    return answer.headers.getall("WWW-Authenticate")


def values(headers: Headers, name: str) -> set[str]:
    """The items of a list header."""
    return {item.strip().lower() for value in headers.getall(name) for item in value.split(",")}
