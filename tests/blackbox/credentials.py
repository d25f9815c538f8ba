"""Credentials at stake: who holds them, who could take them, and what was received of them."""

from __future__ import annotations

import asyncio
import json
import os
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, quote, quote_plus, urlencode

import pytest

from tests.blackbox.helpers import REPO
from tests.conftest import Pairs, RunningCache, StartCache
from tests.fakes.answers import Modifier, Step, perform
from tests.fakes.client import WireResponse, fetch
from tests.fakes.messages import Request
from tests.fakes.recorder import Sink
from tests.fakes.registry import ScriptedRegistry
from tests.fakes.tokens import Account, Rights, basic, credentials_in

ALICE = Account("alice", "c4n4ry:p4ss/w0rd+&=%", "c4n4ry-1d3nt1ty/of+alice", ("team/*",))
"""Her password and identity token have what forms, URLs and base64 treat specially."""
BOB = Account("bob", "h0ney:of/bob+&=%", "h0ney-1d3nt1ty/of+bob", ("team/*",))

SHARED = {"mode": "shared", "iUnderstandThisIsShared": True}
Way = Literal["shared", "identity", "public", "verify", "handle", "refresh"]
WAYS: tuple[Way, ...] = ("shared", "identity", "public", "verify", "handle", "refresh")
"""The cache's own password or identity token, for all or for its quota; a client's password, as it is or behind a token of
the cache, and its identity token."""
PASSWORD_WAYS: tuple[Way, ...] = ("shared", "verify", "handle")
"""Those that a registry which asks for Basic can see: it asks for no token, and nobody for what is public."""
Scheme = Literal["Basic", "Bearer"]


# --- secrets that the cache holds ---


def entry(account: Account, *, identity: bool = False) -> dict[str, str]:
    """An entry of a Docker configuration."""
    if identity:
        return {"auth": b64encode(f"{account.user}:".encode()).decode(), "identitytoken": account.identity_token}
    return {"auth": b64encode(f"{account.user}:{account.password}".encode()).decode()}


def write_secret(path: Path, content: object) -> dict[str, str]:
    """Writes a Docker configuration, or any text, as rotations do, at once; the section of ``imagePullSecrets`` for it."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(content if isinstance(content, str) else json.dumps(content))
    os.replace(new, path)
    return {"file": str(path)}


def secret(path: Path, *entries: tuple[str, Account], identity: bool = False) -> dict[str, str]:
    """A Docker configuration with these keys and whose accounts they are."""
    return write_secret(path, {"auths": {key: entry(account, identity=identity) for key, account in entries}})


# --- a credential at stake ---


@dataclass(frozen=True)
class Stake:
    """A cache by which a credential may go upstream, and a client that may cause it to."""

    cache: RunningCache
    headers: Pairs = field(default_factory=list)

    async def get(self, path: str, **options: Any) -> WireResponse:
        """GET in the name of the client."""
        return await self.cache.get(path, self.headers, **options)

    async def head(self, path: str, **options: Any) -> WireResponse:
        """HEAD in the name of the client."""
        return await self.cache.head(path, self.headers, **options)


def guard(registry: ScriptedRegistry, way: Way, scheme: Scheme = "Bearer") -> Rights:
    """The registry lets Alice in; everybody, where her credential is for the quota only."""
    rights = Rights([ALICE], public=("team/*",) if way == "public" else ())
    registry.require_rights(rights, scheme)
    return rights


async def stake(start_cache: StartCache, folder: Path, way: Way, section: dict[str, Any], **sections: Any) -> Stake:
    """A cache before that upstream to which, in this way, Alice's credential is entrusted."""
    if way in ("shared", "identity", "public"):
        access = "public" if way == "public" else SHARED
        held = [secret(folder / "config.json", (section["name"], ALICE), identity=way == "identity")]
        return Stake(await start_cache({"access": access} | section, imagePullSecrets=held, **sections))
    cache = await start_cache({"access": "verify"} | section, externalURL="http://127.0.0.1:5000", **sections)
    return Stake(cache, await shown_to(cache, way))


async def shown_to(cache: RunningCache, way: Way, account: Account = ALICE) -> Pairs:
    """What a client of that account shows to a cache of ``access: verify``."""
    if way == "verify":
        return [("Authorization", account.basic)]
    if way == "handle":
        given = await cache.get("/token?service=pullcache", [("Authorization", account.basic)])
    else:
        form = urlencode({"grant_type": "refresh_token", "refresh_token": account.identity_token, "service": "pullcache"})
        kind = [("Content-Type", "application/x-www-form-urlencoded")]
        given = await fetch(cache.host, cache.port, "POST", "/token", kind, body=form.encode())
    assert given.status == 200, given.body
    return [("Authorization", f"Bearer {json.loads(given.body)['token']}")]


def proves(request: Request) -> bool:
    """Whether a request shows who asks."""
    return request.headers.has("Authorization") or bool(request.body)


def to_credentials(step: Step) -> Modifier:
    """That step for those who show who they are; others get the undisturbed answer."""
    return Modifier(lambda request, default: perform(step, request, default) if proves(request) else default(request))


def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock of the event loop forward by seconds, so that an age takes no time."""
    loop = asyncio.get_running_loop()
    real, ahead = loop.time, [0.0]
    monkeypatch.setattr(loop, "time", lambda: real() + ahead[0])

    def forward(seconds: float) -> None:
        ahead[0] += seconds

    return forward


# --- what was received ---


def forms(account: Account) -> list[str]:
    """Every form in which an account's secrets may stand somewhere."""
    raw = [account.password, account.identity_token, f"{account.user}:{account.password}"]
    plain = [*raw, *(quote(each, safe="") for each in raw), *(quote_plus(each) for each in raw)]
    return [*dict.fromkeys(plain), *(b64encode(each.encode()).decode().rstrip("=") for each in raw)]


def received(server: ScriptedRegistry | Sink | Sequence[Request]) -> bytes:
    """Every byte that came."""
    if isinstance(server, Sink):
        return b"".join(bytes(contact.data) for contact in server.contacts)
    return b"".join(request.raw for request in (server.requests if isinstance(server, ScriptedRegistry) else server))


def tells(text: object, account: Account = ALICE, tokens: Iterable[str] = ()) -> list[str]:
    """What of an account's secrets, and of these tokens, stands in a text."""
    where = text if isinstance(text, bytes) else str(text).encode()
    return [form for form in (*forms(account), *tokens) if form.encode() in where]


def hears(server: ScriptedRegistry | Sink | Sequence[Request], account: Account = ALICE, tokens: Iterable[str] = ()) -> bool:
    """Whether a server has received any of an account's secrets, or of these tokens, in any form."""
    return bool(tells(received(server), account, tokens))


def who(request: Request) -> str:
    """Whose credential a request shows: a user, ``token``, ``refresh`` or, for nobody, ``-``."""
    given = credentials_in(request)
    if given is not None:
        return given[0]
    if request.headers.has("Authorization"):
        return "token"
    return "refresh" if "refresh_token" in parse_qs(request.body.decode("latin-1")) else "-"


def shown(requests: Iterable[Request]) -> list[str]:
    """Who asked, request by request."""
    return [who(request) for request in requests]


def asked(registry: ScriptedRegistry) -> list[Request]:
    """The requests to its token server."""
    return registry.seen(path="/token")


def in_its_place(registry: ScriptedRegistry, account: Account = ALICE) -> None:
    """What a registry with tokens received of an account was where it belongs: at its token server, in the header or the
    body and never in an address; elsewhere its tokens alone."""
    for request in registry.requests:
        assert not tells(f"{request.target} {request.headers.without('Authorization')}", account)
        if request.path != "/token":
            assert not tells(request.raw, account)
            assert who(request) in ("-", "token")
        elif request.method == "POST":
            assert not request.headers.has("Authorization")
        else:
            assert request.headers.get("Authorization") in (None, basic(account.user, account.password))


def blobs(registry: ScriptedRegistry, count: int, prefix: str = "layer", repo: str = REPO) -> list[str]:
    """The paths of so many blobs that the registry has."""
    return [f"/v2/{repo}/blobs/{registry.add_blob(repo, f'{prefix} {number}'.encode())}" for number in range(count)]


def logged(caplog: pytest.LogCaptureFixture) -> str:
    """Everything that was logged, and what hung on to it."""
    return "\n".join(f"{record.getMessage()} {record.__dict__} {record.exc_text}" for record in caplog.records)
