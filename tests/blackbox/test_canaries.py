"""Secrets that are told apart are sent through a real process, in every way that they may take; none comes out where people
or other programs look: log, metrics, explanations, disk, error bodies, command line and environment.

A canary that did not reach the place that it is for would prove nothing: each is accounted for.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import bcrypt
import trustme
from cryptography.hazmat.primitives import serialization

from tests.blackbox.mounted import Mounted, pull_secret, until
from tests.blackbox.oracle import LARGE, blob_of, blob_path, manifest_path
from tests.fakes.answers import (
    Step,
    as_json,
    before_headers,
    compose,
    cut,
    gate,
    oci_error,
    raw,
    redirect,
    status,
    swap_body,
    too_many_requests,
    with_headers,
)
from tests.fakes.client import WireResponse, fetch, open_stream, raw_exchange
from tests.fakes.forward_proxy import ForwardProxy
from tests.fakes.messages import Answer, Request
from tests.fakes.recorder import Sink
from tests.fakes.registry import ScriptedRegistry
from tests.fakes.tokens import basic, credentials_in
from tests.real.services import REPOSITORY, Pullcache, pullcache_config

REPO = "team/app"
USER = "canary-user"
HOST = "127.0.0.1"
SHARED = {"mode": "shared", "iUnderstandThisIsShared": True}
QUICK = {"connect": "500ms", "headers": "500ms", "head": "500ms", "token": "500ms"}
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_PART = 9
"""Characters of a secret that are too many to be there by chance."""


class Cage:
    """The canaries: what each is, whether it reached its place, and where it was found where it must not be."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self._proofs: dict[str, Callable[[], object]] = {}

    def new(self, name: str, proof: Callable[[], object] | None = None) -> str:
        """A secret that nobody else has: letters and digits, so that it is the same in a URL, in JSON and in a shell.

        ``proof`` says whether it reached its place; without it ``saw`` has to.
        """
        number = int.from_bytes(hashlib.sha512(f"canary {name}".encode()).digest())
        return self.adopt(name, "".join(_DIGITS[number // 62**place % 62] for place in range(28)), proof)

    def new_for(self, name: str, registry: ScriptedRegistry) -> str:
        """A secret that a registry, or a token server, must have been shown."""
        return self.new(name, lambda: any(shows(request, self.values[name]) for request in registry.requests))

    def adopt(self, name: str, value: str, proof: Callable[[], object] | None = None) -> str:
        """A secret that somebody else has made."""
        assert name not in self.values, name
        self.values[name] = value
        if proof is not None:
            self._proofs[name] = proof
        return value

    def saw(self, name: str, condition: object = True) -> None:
        """It reached its place, if so."""
        assert name in self.values, name
        if condition:
            self._proofs[name] = lambda: True

    @property
    def missing(self) -> list[str]:
        """Those that did not reach the place that they are for."""
        return sorted(name for name in self.values if name not in self._proofs or not self._proofs[name]())

    def found_in(self, data: bytes) -> list[str]:
        """Those of which a part is in there, as it is or in base64."""
        return [name for name, value in self.values.items() if any(part in data for part in _parts(value))]


def _parts(value: str) -> set[bytes]:
    """Pieces of a secret, one of which is in any text that holds a good deal of it."""
    pieces = set()
    for begin in range(0, len(value) - _PART + 1, _PART):
        piece = value[begin : begin + _PART].encode()
        pieces.add(piece)
        for shift in range(3):
            encoded = base64.b64encode(b"." * shift + piece + b"." * ((-shift - _PART) % 3))
            inner = encoded[-(-shift * 4 // 3) + (shift > 0) : len(encoded) - 4].strip(b"=")
            pieces |= {inner, inner.replace(b"+", b"-").replace(b"/", b"_")}
    return pieces


def shows(request: Request, value: str) -> bool:
    """Whether a request carries a secret, as it is, in base64 or in a form."""
    pair = credentials_in(request) or ("", "")
    return value in pair[1] or value.encode() in request.raw


class Captive(Pullcache):
    """The real process, which leaves no core file behind."""

    def command(self) -> Sequence[str | Path]:
        """What to run."""
        return ["sh", "-c", 'ulimit -c 0; exec "$@"', "sh", *super().command()]

    def environment(self) -> Mapping[str, str]:
        """With a dump of every thread where it is aborted."""
        return {**super().environment(), "PYTHONFAULTHANDLER": "1"}

    async def ended(self) -> int:
        """Waits for its end; the code."""
        process, self._process = self._process, None
        assert process is not None
        return await asyncio.to_thread(process.wait, 20)


class Watched:
    """A real process with all that goes in, and all that comes out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cage = Cage()
        self.answers: list[bytes] = []
        self.looked_at: dict[str, bytes] = {}
        self.stack = AsyncExitStack()
        self.registries: dict[str, ScriptedRegistry] = {}
        self.sections: dict[str, dict[str, Any]] = {}
        self.large = blob_of("at the end", LARGE)
        self.client: ssl.SSLContext | None = None
        self._port = 0
        folder.mkdir()

    def write(self, name: str, content: str | bytes, mode: int = 0o600) -> str:
        """A file, put there at once; its path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.new")
        new.write_bytes(content.encode() if isinstance(content, str) else content)
        new.chmod(mode)
        new.replace(path)
        return str(path)

    async def add(
        self, name: str, access: object = SHARED, secured: ssl.SSLContext | None = None, **keys: Any
    ) -> ScriptedRegistry:
        """An upstream with an image, and its section."""
        registry = await self.stack.enter_async_context(ScriptedRegistry(ssl=secured))
        registry.add_image(REPO, "1", [f"layer of {name}".encode()])
        self.registries[name] = registry
        here = {"name": name, "endpoints": [registry.url], "allowAddresses": ["127.0.0.0/8"], "timeouts": QUICK}
        self.sections[name] = here | ({"access": access} if access else {}) | keys
        return registry

    def adopt_tokens(self) -> None:
        """What token servers have given is secret, too."""
        for name, registry in self.registries.items():
            for number, token in enumerate(registry.tokens.issued):
                self.cage.adopt(f"token {number} of {name}", token)
                self.cage.saw(f"token {number} of {name}", registry.heard(token))

    def logged(self, text: str) -> bool:
        """Whether it has said so."""
        return text in self.server.log

    async def signal(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        assert self.server.pid is not None
        os.kill(self.server.pid, number)

    async def start(self, config: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> None:
        """Starts the process."""
        self.server = Captive(config, root=self.folder / "run", environment=environment)
        self._port = self.server.port
        self.admin_port = int(self.server.admin_host.rpartition(":")[2])
        await asyncio.to_thread(self.server.start, False)
        await until(lambda: self.logged("serving on") or self.logged("cannot start"), "the start")
        assert self.logged("serving on"), self.server.log

    async def ask(
        self, target: str, *headers: tuple[str, str], method: str = "GET", body: bytes = b"", keep: bool = True
    ) -> WireResponse:
        """One request; the answer is kept."""
        answer = await fetch(HOST, self._port, method, target, headers, body=body, ssl=self.client)
        if keep:
            self.answers.append(repr((answer.headers, answer.body)).encode())
        return answer

    async def say(self, data: bytes) -> bytes:
        """Any bytes; what comes back is kept."""
        try:
            answer = await raw_exchange(HOST, self._port, data, ssl=self.client, within=20)
        except OSError as error:
            answer = repr(error).encode()
        self.answers.append(answer)
        return answer

    async def admin(self, target: str, token: str) -> WireResponse:
        """One request to the admin listener; the answer is kept."""
        proof = [("Authorization", f"Bearer {token}")]
        answer = await fetch(HOST, self.admin_port, "GET", target, proof, ssl=self.client)
        self.answers.append(repr((answer.headers, answer.body)).encode())
        return answer

    async def pulls(self, name: str, *, well: bool = True) -> None:
        """A tag of an upstream, which is given, or not."""
        answer = await self.ask(manifest_path("1", f"{name}/{REPO}"))
        assert (answer.status == 200) == well, (name, answer.status, answer.body)

    async def look(self, token: str, names: Sequence[str]) -> None:
        """Keeps what the process shows while it runs."""
        for target in ("/metrics", *(f"/explain?image={name}/{REPO}" for name in names)):
            answer = await self.admin(target, token)
            assert answer.status == 200
        for name in ("cmdline", "environ"):
            with open(f"/proc/{self.server.pid}/{name}", "rb") as file:  # noqa: ASYNC230 - it is memory
                self.looked_at[f"/proc/PID/{name}"] = file.read()

    async def command(self, *arguments: str) -> None:
        """Keeps what a command says."""
        done = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-m", "proxy", *arguments], check=False, capture_output=True, cwd=REPOSITORY
        )
        self.looked_at[arguments[0]] = done.stdout + done.stderr
        assert b"Traceback" not in done.stderr
        assert done.stdout + done.stderr

    def leaks(self) -> list[str]:
        """Every place where a canary was found, once the process has ended."""
        places = {"log": self.server.log_file.read_bytes(), **self.looked_at}
        places |= {f"answer {number}": answer for number, answer in enumerate(self.answers)}
        held = [path for path in (self.folder / "cache").rglob("*") if path.is_file()]
        assert any(path.name == "cache.db" for path in held)
        assert any(path.parent.name == "sha256" for path in held)
        contents = {str(path.relative_to(self.folder)): path.read_bytes() for path in held}
        places |= {name: data for name, data in contents.items() if not self.large.startswith(data)}
        places |= {f"name of {path}": str(path.relative_to(self.folder)).encode() for path in held}
        if not self.cage.found_in(b"\n".join(places.values())):
            return []
        return [
            f"{name} in {place}: {_around(data, self.cage.values[name])}"
            for place, data in places.items()
            for name in self.cage.found_in(data)
        ]


def _around(data: bytes, value: str) -> str:
    places = [at for part in _parts(value) if (at := data.find(part)) >= 0]
    return repr(data[max(min(places) - 200, 0) : min(places) + 60]) if places else "in base64 for URLs"


def test_what_is_found_is_found() -> None:
    """The search itself: as it is, within JSON and URLs, and in base64 wherever it begins; half of it is enough."""
    cage = Cage()
    value = cage.new("this")
    cage.new("that")
    for text in (
        value,
        f'{{"a": "{value}"}}',
        f"https://a:{quote(value)}@b/?c={value}",
        value[:18],
        value[-19:],
        f"..{value[5:25]}",
    ):
        assert cage.found_in(text.encode()) == ["this"], text
    for before in range(6):
        whole = b"x" * before + value.encode() + b"yz"
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            assert cage.found_in(b"Basic " + encode(whole)) == ["this"], before
            assert cage.found_in(encode(b"?" * before + b"\xff\xfb" + value[:20].encode())) == ["this"], before
    assert cage.found_in(b"nothing " * 1000) == []
    assert cage.found_in(gzip.compress(value.encode())) == []


# --- programs that know secrets ---


def helper(secret: str, user: str = USER) -> str:
    """A ``docker-credential-`` program."""
    answer = json.dumps({"ServerURL": "any", "Username": user, "Secret": secret})
    return f"""#!/bin/sh
cat > /dev/null
case $1 in
  list) echo '{{"store.test": "{user}"}}' ;;
  *) echo '{answer}' ;;
esac
"""


def plugin(folder: Path, password: str, said: str, version: str = "v1") -> str:
    """A credential provider plugin, which says something on its standard error and notes that it was called."""
    answer = {
        "kind": "CredentialProviderResponse",
        "apiVersion": f"credentialprovider.kubelet.k8s.io/{version}",
        "cacheKeyType": "Registry",
        "cacheDuration": "0s",
        "auth": {"*.test": {"username": USER, "password": password}},
    }
    return f"""#!/bin/sh
cat > /dev/null
echo "{said}" >&2
echo "$FROM_CONFIGURATION {version}" >> {folder}/called
echo '{json.dumps(answer)}'
"""


def gives_to_refresh_token(registry: ScriptedRegistry, *refresh_tokens: str) -> None:
    """The token server takes identity tokens by POST, and nothing else; what it refuses it quotes."""

    def answer(request: Request) -> Answer:
        if not any(f"refresh_token={each}".encode() in request.body for each in refresh_tokens):
            return oci_error(401, "UNAUTHORIZED", f"not good: {request.body!r}")
        return as_json({"access_token": registry.tokens.issue([f"repository:{REPO}:pull"]), "expires_in": 300})

    registry.script("POST", "/token", answer, forever=True)


def quotes(code: int) -> Callable[[Request], Answer]:
    """A registry that repeats in its refusal whatever it was shown."""

    def answer(request: Request) -> Answer:
        value = request.headers.get("Authorization") or ""
        shown = f"{value} {value.partition(' ')[2]} {' '.join(credentials_in(request) or ())} {request.query}"
        return oci_error(code, "DENIED" if code in (401, 403) else "UNKNOWN", f"refused: {shown}")

    return answer


# --- the open process: every kind of secret, access for those whose own credential is accepted ---


def entry(host: str, password: str) -> dict[str, Any]:
    """One of ``auths``."""
    return {host: {"auth": base64.b64encode(f"{USER}:{password}".encode()).decode()}}


async def secrets_in_files(watched: Watched) -> list[dict[str, str]]:
    """Upstreams with secrets of every form, good and refused; the sources of these."""
    cage, write, add = watched.cage, watched.write, watched.add
    registry = await add("kubectl.test")
    password = cage.new_for("password in a Secret of kubectl", registry)
    registry.require_basic(USER, password)
    data = base64.b64encode(json.dumps({"auths": entry("kubectl.test", password)}).encode()).decode()
    kubectl = f"apiVersion: v1\nkind: Secret\ntype: kubernetes.io/dockerconfigjson\ndata: {{.dockerconfigjson: {data}}}\n"
    registry = await add("dockercfg.test")
    password = cage.new_for("password in a .dockercfg", registry)
    registry.require_basic(USER, password)
    dockercfg = {"https://dockercfg.test/v1/": {"username": USER, "password": password}}
    registry = await add("inline.test")
    inline = cage.new_for("passwordFile", registry)
    registry.require_basic(USER, inline)
    registry = await add("identity.test")
    identity = cage.new_for("identitytoken in a config.json", registry)
    registry.require_token()
    gives_to_refresh_token(registry, identity)
    registry = await add("wrong.test")
    registry.script("*", lambda request: request.path.startswith("/v2"), _asking(quotes(401)), forever=True)
    wrong = cage.new_for("password that is refused", registry)
    registry = await add("wrong-token.test")
    registry.require_token()
    registry.script("GET", "/token", quotes(401), forever=True)
    wrong_there = cage.new_for("password that a token server refuses", registry)
    registry = await add("wrong-identity.test")
    registry.require_token()
    gives_to_refresh_token(registry)
    wrong_identity = cage.new_for("identitytoken that is refused", registry)
    config = {
        "auths": {
            "identity.test": {"identitytoken": identity},
            "wrong-identity.test": {"identitytoken": wrong_identity},
            **entry("wrong.test", wrong),
            **entry("wrong-token.test", wrong_there),
        },
        "credHelpers": {
            "helper.test": "good",
            "token-helper.test": "token",
            "junk.test": "junk",
            "failed.test": "failed",
        },
        "credsStore": "store",
    }
    return [
        {"file": write("kubectl.yaml", kubectl)},
        {"file": write("old/.dockercfg", json.dumps(dockercfg))},
        {"registry": "inline.test", "username": USER, "passwordFile": write("inline", f"{inline}\n")},
        {"file": write("config.json", json.dumps(config))},
    ]


async def secrets_of_programs(watched: Watched) -> dict[str, str]:
    """Upstreams whose secrets helpers and plugins know, or fail to tell; the configuration of the plugins."""
    cage, write, add, folder = watched.cage, watched.write, watched.add, watched.folder
    registry = await add("helper.test")
    password = cage.new_for("password of a helper", registry)
    registry.require_basic(USER, password)
    write("bin/docker-credential-good", helper(password), 0o755)
    registry = await add("token-helper.test")
    token = cage.new_for("identity token of a helper", registry)
    registry.require_token()
    gives_to_refresh_token(registry, token)
    write("bin/docker-credential-token", helper(token, "<token>"), 0o755)
    registry = await add("store.test")
    password = cage.new_for("password of a credsStore", registry)
    registry.require_basic(USER, password)
    write("bin/docker-credential-store", helper(password), 0o755)

    def was_called(program: str) -> Callable[[], bool]:
        return lambda: program in (folder / "called").read_text()

    await add("junk.test")
    junk = cage.new("output of a helper that prints junk", was_called("junk"))
    write("bin/docker-credential-junk", f"#!/bin/sh\necho junk >> {folder}/called\necho 'password: {junk}'\n", 0o755)
    await add("failed.test")
    failed = cage.new("output of a helper that fails", was_called("failed"))
    said = cage.new("complaint of a helper that fails", was_called("failed"))
    lines = f"#!/bin/sh\necho failed >> {folder}/called\necho {failed}\necho {said} >&2\nexit 1\n"
    write("bin/docker-credential-failed", lines, 0o755)

    registry = await add("plugin.test")
    await add("bad-plugin.test")
    variable = cage.new("variable for a plugin")
    cage.saw("variable for a plugin", False)
    password, said = cage.new_for("password of a plugin", registry), cage.new("complaint of a plugin", was_called(variable))
    registry.require_basic(USER, password)
    write("bin/good-plugin", plugin(folder, password, said), 0o755)
    bad = cage.new("password of a plugin of another version", was_called("v9"))
    write("bin/bad-plugin", plugin(folder, bad, said, "v9"), 0o755)
    providers = [
        {
            "name": f"{kind}-plugin",
            "matchImages": [host],
            "defaultCacheDuration": "0s",
            "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
            "env": [{"name": "FROM_CONFIGURATION", "value": variable}],
        }
        for kind, host in (("good", "plugin.test"), ("bad", "bad-plugin.test"))
    ]
    document = {"kind": "CredentialProviderConfig", "apiVersion": "kubelet.config.k8s.io/v1", "providers": providers}
    return {"configFile": write("providers.yaml", json.dumps(document)), "binDirectory": str(folder / "bin")}


async def secrets_in_urls(watched: Watched) -> None:
    """Upstreams with secrets in the addresses of proxies and token servers."""
    cage, write, add = watched.cage, watched.write, watched.add
    proxy = await watched.stack.enter_async_context(ForwardProxy())

    def at_proxy(name: str) -> Callable[[], bool]:
        def is_there() -> bool:
            wanted = basic(USER, cage.values[name])
            return any(request.headers.get("Proxy-Authorization") == wanted for request in proxy.requests)

        return is_there

    for host, name in (
        ("proxied.test", "password in httpProxy"),
        ("unproxied.test", "password in httpProxy that is refused"),
    ):
        password = cage.new(name, at_proxy(name))
        await add(host, None, httpProxyFile=write(f"proxy-of-{host}", proxy.url_for(USER, password)))
    proxy.credentials = (USER, cage.values["password in httpProxy"])
    registry = await add("realm.test", None)
    key = cage.new_for("key in the query of a realm", registry)
    registry.require_token(realm=f"{registry.url}/token?key={key}")
    registry = await add("odd-realm.test", None)
    password = cage.new("password in a realm", lambda: watched.registries["odd-realm.test"].requests)
    registry.require_token(realm=f"http://{USER}:{password}@{registry.host}/token")


ODD_TOKENS: dict[str, Callable[[str], Step]] = {
    "token with a line break": lambda secret: as_json({"token": f"{secret}\r\nX-Evil: 1"}),
    "token of 20 KB": lambda secret: as_json({"token": secret + "a" * 20_000}),
    "refresh token beside no token": lambda secret: as_json({"refresh_token": secret}),
    "token that is no JSON": lambda secret: status(200, f"token={secret}".encode(), "application/json"),
    "token in an error": lambda secret: oci_error(500, "UNKNOWN", f"Bearer {secret}"),
}
"""Answers of a token server that are no use."""


async def odd_tokens(watched: Watched) -> None:
    """Upstreams whose token servers give what cannot be used."""
    for number, (name, answer) in enumerate(ODD_TOKENS.items()):
        registry = await watched.add(f"odd-token-{number}.test", None)
        registry.require_token()
        script = registry.script("GET", "/token", forever=True)
        script.steps.append(answer(watched.cage.new(name, partial(getattr, script, "used"))))


BAD_FILES: dict[str, Callable[[str], str]] = {
    "password in invalid JSON": lambda secret: f'{{"auths": {{"x.test": {{"password": "{secret}"',
    "password in a broken auth": lambda secret: json.dumps({"auths": {"x.test": {"auth": f"%{secret}%"}}}),
    "password in an auth without colon": lambda secret: json.dumps(
        {"auths": {"x.test": {"auth": base64.b64encode(secret.encode()).decode()}}}
    ),
    "password in invalid YAML": lambda secret: f"kind: Secret\ndata: {{password: '{secret}\n  - {secret}: [\n",
    "password where an object should be": lambda secret: json.dumps({"auths": {"x.test": secret}}),
    "password in a key": lambda secret: json.dumps({"auths": {f"user:{secret}@x y": {"auth": "!"}}}),
    "name of a helper that is none": lambda secret: json.dumps({"credHelpers": {"x.test": f"../{secret}"}}),
}
"""Files that cannot be used."""


def bad_files(watched: Watched) -> list[dict[str, str]]:
    """Sources that cannot be used."""
    sources = []
    for number, (name, content) in enumerate(BAD_FILES.items()):
        file = f"bad-{number}.json"
        secret = watched.cage.new(name, partial(watched.logged, file))
        sources.append({"file": watched.write(file, content(secret))})
    return sources


GOOD = ("kubectl", "dockercfg", "inline", "identity", "helper", "token-helper", "store", "plugin", "mounted", "proxied")
REFUSED = ("wrong", "wrong-token", "wrong-identity", "unproxied", "odd-realm")


async def opened(folder: Path, log_format: str, end: signal.Signals) -> Watched:
    """Sends every kind of secret through a process of which everybody may ask; returns when it has ended."""
    watched = Watched(folder)
    cage, write, registries = watched.cage, watched.write, watched.registries
    async with watched.stack:
        public, verify, rotating = (
            await watched.add("public.test", None),
            await watched.add("verify.test", "verify"),
            await watched.add("mounted.test"),
        )
        by_mount, next_one = (cage.new_for(f"password in a mounted Secret, {which}", rotating) for which in ("old", "new"))
        rotating.require_token(credentials=(USER, by_mount))
        mounted = Mounted(folder / "mounted", pull_secret({"mounted.test": (USER, by_mount)}))
        sources = [*await secrets_in_files(watched), {"directory": str(mounted.directory)}, *bad_files(watched)]
        plugins = await secrets_of_programs(watched)
        await secrets_in_urls(watched)
        await odd_tokens(watched)
        admin_token, wrong_admin = cage.new("admin token"), cage.new("admin token that is wrong")
        config = pullcache_config(folder / "cache", "public.test", public.url)
        config |= {
            "upstreams": list(watched.sections.values()),
            "backoff": {"initial": "0s", "notFound": "0s", "refused": "0s"},  # so that each question reaches its place
            "externalURL": f"http://{config['listen']}",
            "imagePullSecrets": sources,
            "imageCredentialProvider": plugins,
            "adminListener": {"tokenFile": write("admin-token", f"{admin_token}\n")},
            "rereadFilesEvery": "1h",
            "log": {"format": log_format, "level": "debug"},
        }
        await watched.start(config, {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"})
        try:
            for name in (*GOOD, "realm", "public"):
                await watched.pulls(f"{name}.test")
            for name in (*REFUSED, *(f"odd-token-{number}" for number in range(len(ODD_TOKENS)))):
                await watched.pulls(f"{name}.test", well=False)
            for name in ("junk.test", "failed.test", "bad-plugin.test"):
                await watched.ask(manifest_path("1", f"{name}/{REPO}"))
            cage.saw(
                "variable for a plugin", (folder / "called").read_text().count(cage.values["variable for a plugin"]) > 1
            )
            async with asyncio.TaskGroup() as group:
                group.create_task(quoted(watched, rotating, "mounted.test", by_mount))
                group.create_task(signed(watched, public))
                group.create_task(shown_by_clients(watched, verify))
                group.create_task(malformed(watched))

            rotating.tokens.credentials = (USER, next_one)
            mounted.write(pull_secret({"mounted.test": (USER, next_one)}))
            write("admin-token", cage.adopt("admin token that is cut short", "tooShort0Xq4"))
            await watched.signal(signal.SIGHUP)
            await until(partial(watched.logged, "shorter than"), "the reload")
            cage.saw("admin token that is cut short")
            await watched.ask(blob_path(rotating.add_blob(REPO, b"after"), f"mounted.test/{REPO}"))
            assert (await watched.admin("/metrics", wrong_admin)).status == 401
            cage.saw("admin token that is wrong")
            await watched.look(admin_token, list(registries))
            cage.saw("admin token")
            admin = ("--admin", f"http://{watched.server.admin_host}", "--token-file", write("operator", admin_token))
            async with asyncio.TaskGroup() as group:
                group.create_task(watched.command("explain", f"wrong.test/{REPO}", *admin))
                group.create_task(watched.command("check-config", str(watched.server.config_file)))
            await stopped(watched, public, "public.test", end)
        finally:
            watched.server.kill()
        watched.adopt_tokens()
        assert cage.missing == [], "these did not reach the place that they are for"
    return watched


def _asking(answer: Callable[[Request], Answer]) -> Step:
    """With a challenge for Basic."""
    return compose(answer, with_headers({"WWW-Authenticate": 'Basic realm="registry"'}))


def guard_by(registry: ScriptedRegistry, passwords: Iterable[str], refresh_token: str) -> None:
    """Its token server takes any of these, and quotes what it refuses."""
    registry.require_token()
    gives_to_refresh_token(registry, refresh_token)

    def answer(request: Request) -> Answer:
        if (credentials_in(request) or ("", ""))[1] not in passwords:
            return quotes(401)(request)
        return as_json({"token": registry.tokens.issue([f"repository:{REPO}:pull"]), "expires_in": 300})

    registry.script("GET", "/token", answer, forever=True)


async def quoted(watched: Watched, registry: ScriptedRegistry, name: str, password: str) -> None:
    """Errors of a registry that repeats what it was shown: token, and the password behind it."""

    def tells(request: Request) -> Answer:
        return oci_error(403, "DENIED", f"{request.headers.get('Authorization')} of {USER}:{password} may not")

    def ends_within(request: Request) -> Answer:
        return oci_error(403, "DENIED", "." * 235 + password)  # where texts are cut to length

    for number, step in enumerate((tells, ends_within, quotes(403), quotes(404), quotes(429), quotes(500), quotes(400))):
        repository = f"team/quoted-{number}"  # a refusal is remembered, of this repository
        registry.add_image(repository, "1", [b"layer"])
        assert (await watched.ask(manifest_path("1", f"{name}/{repository}"))).status == 200
        digest = registry.add_blob(repository, b"quoted")
        script = registry.script("GET", blob_path(digest, repository), step, forever=True)
        answer = await watched.ask(blob_path(digest, f"{name}/{repository}"))
        assert answer.status >= 400
        assert script.used


async def signed(watched: Watched, registry: ScriptedRegistry) -> None:
    """Redirects to signed URLs, everything that can go wrong there, and answers that are none."""
    cage = watched.cage
    storage = await watched.stack.enter_async_context(ScriptedRegistry())
    sink = await watched.stack.enter_async_context(Sink())
    dead = await watched.stack.enter_async_context(ScriptedRegistry())
    await dead.stop()
    long = "x" * 40_000

    def echo(request: Request) -> Answer:
        return status(403, f"<Error><Url>{request.target}</Url></Error>".encode(), "application/xml")

    steps: dict[str, tuple[Step | None, ...]] = {
        "that works": (None,),
        "that is quoted in XML": (echo,),
        "that is quoted in a 403": (quotes(403),),
        "that is quoted in a 404": (quotes(404),),
        "that is quoted in a 500": (quotes(500),),
        "where the rate is limited": (too_many_requests(1),),
        "where nothing is answered": (before_headers("stall"),),
        "where the connection is reset": (before_headers("rst"),),
        "where other content is": (swap_body(b"other content"),),
        "where the content breaks off": (cut(5), None),
        "where garbage is": (raw(b"SIGNATURE garbage\r\n\r\n"),),
        "where a header is too long": (with_headers({"X-Long": long}),),
        "where a header is none": (raw(b"HTTP/1.1 200 OK\r\nno header\r\n\r\n"),),
        "where it goes round": (lambda request: redirect(request.target),),
    }

    async def stored(name: str, *steps: Step | None) -> None:
        title = f"signature of a URL {name}"
        value, body = cage.new(title), title.encode()
        path, there = blob_path(registry.add_blob(REPO, body)), f"/{len(cage.values)}"
        registry.script("*", path, redirect(f"{storage.url}{there}?X-Amz-Signature={value}&x=1"), forever=True)
        good = status(200, body)
        storage.script("*", there, *(compose(good, step) if step else good for step in steps), forever=True)
        answer = await watched.ask(path)
        assert (answer.status == 200) == (steps[-1] is None), (name, answer)
        cage.saw(title, any(shows(request, value) for request in storage.seen(path=there)))

    targets = {
        "to a dead host": f"{dead.url}/x?sig={{}}",
        "to TLS where none is": f"https://{sink.host}/x?sig={{}}",
        "with a password in it": f"http://{USER}:{{}}@{storage.host}/x",
        "to an address that is not allowed": "http://10.255.255.1/x?sig={}",
        "to a scheme of its own": "ftp://storage.test/x?sig={}",
        "to what is no address": "http://[broken/x?sig={}",
    }

    async def redirected(name: str, target: str) -> None:
        title = f"signature of a redirect {name}"
        value = cage.new(title)
        path = blob_path(registry.add_blob(REPO, title.encode()))
        script = registry.script("*", path, redirect(target.format(value)), forever=True)
        answer = await watched.ask(path)
        assert answer.status in (502, 503), (name, answer)
        cage.saw(title, script.used)

    none = {
        "cookie beside a broken header": b"HTTP/1.1 200 OK\r\nSet-Cookie: session=%s\r\nbroken %s\r\n\r\n",
        "header that is too long": b"HTTP/1.1 200 OK\r\nSet-Cookie: %s=" + long.encode() + b"%s\r\n\r\n",
        "status line": b"HTTP/1.1 2x0 %s %s\r\n\r\n",
        "length": b"HTTP/1.1 200 OK\r\nContent-Length: %s%s\r\n\r\n",
        "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%s\r\n%s\r\n",
        "challenge": b'HTTP/1.1 401 No\r\nWWW-Authenticate: Bearer realm="%s\\,service=%s\r\nContent-Length: 0\r\n\r\n',
    }

    async def answered(name: str, text: bytes) -> None:
        title = f"secret of a registry in a {name}"
        value = cage.new(title).encode()
        tag = f"odd-{len(cage.values)}"
        script = registry.script("*", manifest_path(tag), raw(text % (value, value)), forever=True)
        answer = await watched.ask(manifest_path(tag, f"public.test/{REPO}"))
        assert answer.status >= 400, (name, answer)
        cage.saw(title, script.used)

    async with asyncio.TaskGroup() as group:
        for name, each in steps.items():
            group.create_task(stored(name, *each))
        for name, target in targets.items():
            group.create_task(redirected(name, target))
        for name, text in none.items():
            group.create_task(answered(name, text))


async def shown_by_clients(watched: Watched, registry: ScriptedRegistry) -> None:
    """Everything that a client can show, right and wrong, at the registry's paths and at the token endpoint."""
    cage = watched.cage
    tag = manifest_path("1", f"verify.test/{REPO}")
    passwords = {
        way: cage.new_for(f"password of a client, {way}", registry) for way in ("Basic", "Basic to /token", "form to /token")
    }
    refresh = cage.new_for("refresh token of a client", registry)
    guard_by(registry, passwords.values(), refresh)

    assert (await watched.ask("/v2/")).status == 401
    assert (await watched.ask(tag, ("Authorization", basic(USER, passwords["Basic"])))).status == 200

    async def given(name: str, target: str, *headers: tuple[str, str], form: Mapping[str, str] | None = None) -> None:
        body = urlencode(form or {}).encode()
        kind = [("Content-Type", "application/x-www-form-urlencoded")] if form else []
        answer = await watched.ask(target, *headers, *kind, method="POST" if form else "GET", body=body, keep=False)
        assert answer.status == 200, answer
        handle = cage.adopt(name, json.loads(answer.body)["token"])
        assert (await watched.ask(tag, ("Authorization", f"Bearer {handle}"))).status == 200
        cage.saw(name)

    scope = f"scope=repository:verify.test/{REPO}:pull&service=pullcache"
    await given("token of ours for Basic", f"/token?{scope}", ("Authorization", basic(USER, passwords["Basic to /token"])))
    form = {"grant_type": "password", "username": USER, "password": passwords["form to /token"], "service": "x"}
    await given("token of ours for a form", "/token", form=form)
    await given(
        "token of ours for a refresh token", "/token", form={"grant_type": "refresh_token", "refresh_token": refresh}
    )

    wrong = cage.new_for("password of a client that is wrong", registry)
    assert (await watched.ask(tag, ("Authorization", basic(USER, wrong)))).status == 401
    strange = cage.new_for("refresh token of a client that is wrong", registry)
    answer = await watched.ask(
        "/token", method="POST", body=f"grant_type=refresh_token&refresh_token={strange}".encode(), keep=False
    )
    handle = cage.adopt("token of ours for what is wrong", json.loads(answer.body)["token"])
    cage.saw("token of ours for what is wrong")
    assert (await watched.ask(tag, ("Authorization", f"Bearer {handle}"))).status == 401

    headers: dict[str, Callable[[str], str]] = {
        "Bearer token that nobody gave": lambda secret: f"Bearer {secret}",
        "Bearer token of odd characters": lambda secret: f"Bearer {secret}\x7f!{secret}",
        "Basic that is no base64": lambda secret: f"Basic {secret}!",
        "Basic without a colon": lambda secret: f"Basic {base64.b64encode(secret.encode()).decode()}",
        "Basic with a line break": lambda secret: basic(USER, f"{secret}\n"),
        "scheme that is not known": lambda secret: f"Negotiate {secret}",
        "header that is no scheme": lambda secret: secret,
        "header of 16 KB": lambda secret: f"Bearer {secret}{'a' * 16_380}{secret}",
    }
    for name, header in headers.items():
        title = f"{name}, from a client"
        for target in (tag, "/token"):
            answer = await watched.ask(target, ("Authorization", header(cage.values.get(title) or cage.new(title))))
            assert answer.status in (400, 401), (name, answer)
            cage.saw(title)
    bodies: dict[str, Callable[[str], str]] = {
        "password given twice": lambda secret: f"grant_type=password&username=u&password={secret}&password={secret}",
        "grant type that is not known": lambda secret: f"grant_type={secret}",
        "password without a user": lambda secret: f"grant_type=password&password={secret}",
        "password with a line break": lambda secret: f"grant_type=password&username=u&password={secret}%0A",
        "password that is no UTF-8": lambda secret: f"grant_type=password&username=u&password={secret}%ff",
        "form of 300 fields": lambda secret: f"password={secret}" + "&a=1" * 300,
        "form of 100 KB": lambda secret: f"grant_type=password&username=u&password={secret}" + "a" * 100_000,
        "form that is none": lambda secret: json.dumps({"password": secret}),
    }
    for name, body in bodies.items():
        title = f"{name}, from a client"
        answer = await watched.ask("/token", method="POST", body=body(cage.new(title)).encode())
        assert answer.status in (400, 413), (name, answer)
        cage.saw(title)
    for name, target in {
        "password in a query": f"/v2/verify.test/{REPO}/manifests/1?password={{}}",
        "password in the query of /token": "/token?grant_type=password&username=u&password={}&scope=x",
        "password in the query of a list": f"/v2/public.test/{REPO}/tags/list?n=x{{}}",
        "password in ns": f"/v2/{REPO}/manifests/1?ns=https://{USER}:{{}}@public.test",
    }.items():
        title = f"{name}, from a client"
        await watched.ask(target.format(cage.new(title)), keep="/token" not in target)
        cage.saw(title)
    title = "password that nobody asked for"
    unasked = cage.new(title)
    others = [(name, unasked) for name in ("Proxy-Authorization", "Cookie", "X-Registry-Auth", "X-Forwarded-Authorization")]
    answer = await watched.ask(
        manifest_path("1", f"public.test/{REPO}"),
        ("Authorization", basic(USER, unasked)),
        *others,
        ("Referer", f"http://x/?{unasked}"),
    )
    assert answer.status == 200
    cage.saw(title)


async def malformed(watched: Watched) -> None:
    """What is no request: aiohttp's own errors quote it."""
    cage = watched.cage
    end = b"\r\nHost: x\r\nConnection: close\r\n"
    tag = manifest_path("1", f"public.test/{REPO}").encode()
    requests: dict[str, bytes] = {
        "over-long header": b"GET /v2/" + end + b"Authorization: Bearer %s" + b"a" * 20_000 + b"%s\r\n\r\n",
        "over-long name of a header": b"GET /v2/" + end + b"X-%s" + b"a" * 20_000 + b"%s: 1\r\n\r\n",
        "header without a colon": b"GET /v2/ HTTP/1.1" + end + b"Authorization Bearer %s%s\r\n\r\n",
        "header with a NUL": b"GET /v2/ HTTP/1.1" + end + b"Authorization: Bearer %s\0%s\r\n\r\n",
        "header with a bare CR": b"GET /v2/ HTTP/1.1" + end + b"Authorization: Bearer %s\r%s\r\n\r\n",
        "folded header": b"GET /v2/ HTTP/1.1" + end + b"Authorization: Bearer\r\n %s%s\r\n\r\n",
        "header that stands twice": b"GET " + tag + b" HTTP/1.1" + end + b"Content-Length: %s\r\nContent-Length: %s\r\n\r\n",
        "request line without a version": b"GET /v2/?token=%s%s\r\n\r\n",
        "request line with spaces": b"GET /v2/ ?token=%s %s HTTP/1.1" + end + b"\r\n",
        "version that is none": b"GET /v2/?token=%s HTTP/%s" + end + b"\r\n",
        "method that is none": b"%s(%s) /v2/ HTTP/1.1" + end + b"\r\n",
        "over-long request line": b"GET /v2/?token=%s" + b"a" * 9_000 + b"%s HTTP/1.1" + end + b"\r\n",
        "absolute form with a password": b"GET http://u:%s@x" + tag + b"?sig=%s HTTP/1.1" + end + b"\r\n",
        "authority form with a password": b"CONNECT u:%s@%s:80 HTTP/1.1" + end + b"\r\n",
        "chunk that is none": b"POST /token HTTP/1.1" + end + b"Transfer-Encoding: chunked\r\n\r\n%s\r\n%s\r\n",
        "body where none is": b"GET /v2/ HTTP/1.1" + end + b"Content-Length: 70\r\n\r\n%s%s\r\n\r\n" + b" " * 10,
        "pipelined garbage": b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n%s %s\r\n\r\n",
        "handshake of another protocol": b"\x16\x03\x01\x02%s\r\n%s\r\n\r\n",
        "too many headers": b"GET /v2/ HTTP/1.1"
        + end
        + b"".join(b"X-%d: 1\r\n" % n for n in range(80))
        + b"Cookie: %s%s\r\n\r\n",
        "Host with a password": b"GET /v2/ HTTP/1.1\r\nHost: u:%s@%s\r\nConnection: close\r\n\r\n",
        "upgrade": b"GET /v2/ HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: %s\r\nSec-WebSocket-Key: %s\r\n\r\n",
    }
    for name, text in requests.items():
        title = f"{name}, from a client"
        value = cage.new(title).encode()
        answer = await watched.say(text % (value, value))
        assert answer, name
        cage.saw(title, answer.startswith(b"HTTP/"))


async def stopped(watched: Watched, registry: ScriptedRegistry, name: str, end: signal.Signals) -> None:
    """Ends it in the middle of a download whose signature is a canary, too."""
    cage = watched.cage
    title = "signature of a URL that is being read at the end"
    value = cage.new(title)
    go_on = asyncio.Event()
    path = blob_path(registry.add_blob(REPO, watched.large))
    storage = await watched.stack.enter_async_context(ScriptedRegistry())
    registry.script("*", path, redirect(f"{storage.url}/last?sig={value}"), forever=True)
    storage.script("*", "/last", compose(status(200, watched.large), gate(go_on, LARGE // 2)), forever=True)
    proof = [("Authorization", basic(USER, cage.values["password of a user"]))] if watched.client else []
    target = blob_path(path.rpartition("/")[2], f"{name}/{REPO}")
    async with await open_stream(HOST, watched.server.port, "GET", target, proof, ssl=watched.client) as stream:
        assert await stream.read_all(LARGE // 4)
        cage.saw(title, any(shows(request, value) for request in storage.requests))
        await watched.signal(end)
        if end == signal.SIGTERM:
            await until(partial(watched.logged, "stopping"), "it stops")
            go_on.set()
            await stream.read_all()
            assert stream.clean_end
            assert await watched.server.ended() == 0
        else:
            assert await watched.server.ended() == -signal.SIGABRT
            assert "Fatal Python error: Aborted" in watched.server.log


# --- the guarded process: TLS, users, certificates ---


def chain(leaf: trustme.LeafCert) -> bytes:
    """A certificate, as a file."""
    return b"".join(blob.bytes() for blob in leaf.cert_chain_pems)


def secret_of(pem: bytes) -> str:
    """What nobody may see of a key in PEM: its public part comes last."""
    return "".join(pem.decode().splitlines()[1:-1])[12:52]


def encrypted(pem: bytes) -> bytes:
    """The same key under a passphrase."""
    kind = serialization.PrivateFormat.PKCS8
    by = serialization.BestAvailableEncryption(b"passphrase")
    return serialization.load_pem_private_key(pem, None).private_bytes(serialization.Encoding.PEM, kind, by)


async def guarded(folder: Path, log_format: str, end: signal.Signals) -> Watched:
    """Sends what only a guarded listener knows through a process; returns when it has ended."""
    watched = Watched(folder)
    cage, write, ca = watched.cage, watched.write, trustme.CA()
    leaf, own = ca.issue_cert(HOST), ca.issue_cert("cache.test")
    watched.client = ssl.create_default_context(cadata=ca.cert_pem.bytes().decode())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(HOST).configure_cert(context)
    ca.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    for name, each in (("key of the listener", leaf), ("key for the upstream", own)):
        cage.adopt(name, secret_of(each.private_key_pem.bytes()))
    password, admin_token = cage.new("password of a user"), cage.new("admin token")
    hashed = bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()
    cage.adopt("hash of a password", hashed[-31:])
    files: dict[str, str | bytes] = {
        "tls.crt": chain(leaf),
        "tls.key": leaf.private_key_pem.bytes(),
        "own.crt": chain(own),
        "own.key": own.private_key_pem.bytes(),
        "ca.crt": ca.cert_pem.bytes(),
        "htpasswd": f"{USER}:{hashed}\n",
        "token": admin_token,
    }
    at = {name: write(name, content) for name, content in files.items()}
    async with watched.stack:
        public = await watched.add("public.test", None)
        keys = {"caFile": at["ca.crt"], "clientCertFile": at["own.crt"], "clientKeyFile": at["own.key"]}
        registry = await watched.add("guarded.test", "shared", context, **keys)
        ours = cage.new_for("password in a Secret", registry)
        registry.require_token(credentials=(USER, ours))
        pair = {"tlsCertFile": at["tls.crt"], "tlsKeyFile": at["tls.key"]}
        config = pullcache_config(folder / "cache", "public.test", public.url)
        config |= {
            "upstreams": list(watched.sections.values()),
            "backoff": {"initial": "0s", "notFound": "0s", "refused": "0s"},  # so that each question reaches its place
            "listener": pair | {"htpasswdFile": at["htpasswd"]},
            "adminListener": pair | {"tokenFile": at["token"]},
            "imagePullSecrets": [
                {"file": write("config.json", pull_secret({"guarded.test": (USER, ours)})[".dockerconfigjson"])}
            ],
            "rereadFilesEvery": "1h",
            "log": {"format": log_format, "level": "debug"},
        }
        await watched.start(config)
        try:
            proof = ("Authorization", basic(USER, password))
            tag = manifest_path("1", f"guarded.test/{REPO}")
            assert (await watched.ask(tag, proof)).status == 200
            for name in ("password of a user", "hash of a password", "key of the listener", "key for the upstream"):
                cage.saw(name)
            await log_in_wrongly(watched, tag)
            await malformed(watched)
            await exchange_for_what_is_bad(watched, ca)
            assert (await watched.ask(tag, proof)).status == 200
            await watched.look(admin_token, list(watched.registries))
            cage.saw("admin token")
            await watched.command("check-config", str(watched.server.config_file))
            await stopped(watched, public, "public.test", end)
        finally:
            watched.server.kill()
        watched.adopt_tokens()
        assert cage.missing == [], "these did not reach the place that they are for"
    return watched


async def log_in_wrongly(watched: Watched, target: str) -> None:
    """Shows what is no user's password, also where no TLS is spoken."""
    tries: dict[str, Callable[[str], str]] = {
        "password of a user that is wrong": lambda secret: basic(USER, secret),
        "password of a user that is too long": lambda secret: basic(USER, secret * 3),
        "password of nobody": lambda secret: basic("nobody", secret),
        "user that is a secret": lambda secret: basic(secret, ""),
        "user that is a token": lambda secret: f"Bearer {secret}",
        "user that is unreadable": lambda secret: f"Basic {secret}!",
    }
    for name, header in tries.items():
        answer = await watched.ask(target, ("Authorization", header(watched.cage.new(name))))
        assert answer.status == 401, (name, answer)
        watched.cage.saw(name)
    plain = watched.cage.new("password sent in the clear").encode()
    for data in (
        b"GET / HTTP/1.1\r\nAuthorization: %s\r\n\r\n" % plain,
        b"\x16\x03\x01\0%c%s" % (len(plain), plain),
    ):
        watched.answers.append(await _plainly(watched.server.port, data))
    watched.cage.saw("password sent in the clear")


async def exchange_for_what_is_bad(watched: Watched, ca: trustme.CA) -> None:
    """Every file is exchanged for one that cannot be used, and looked at."""
    cage, write = watched.cage, watched.write
    locked, other = encrypted((watched.folder / "own.key").read_bytes()), ca.issue_cert(HOST).private_key_pem.bytes()
    cage.adopt("key that is encrypted", secret_of(locked))
    cage.adopt("key of another certificate", secret_of(other))
    write("htpasswd", f"{USER}:{cage.new('password in the clear in htpasswd')}\n")
    write("tls.key", other)
    write("own.key", locked)
    write("config.json", f'{{"auths": {{"guarded.test": {{"auth": "{cage.new("password in a reloaded file")}')
    said = {
        "password in the clear in htpasswd": "htpasswdFile",
        "key of another certificate": "does not belong to the certificate",
        "key that is encrypted": "clientKeyFile",
        "password in a reloaded file": "config.json",
    }
    await watched.signal(signal.SIGHUP)
    for name, text in said.items():
        await until(partial(watched.logged, text), f"the complaint about: {name}")
        cage.saw(name)


async def _plainly(port: int, data: bytes) -> bytes:
    """What comes back where TLS is wanted and something else is said."""
    try:
        return await raw_exchange(HOST, port, data, within=10)
    except OSError as error:
        return repr(error).encode()


async def test_no_canary_is_found(tmp_path: Path) -> None:
    """At log level debug, in both formats, through success, all kinds of errors, a reload, and SIGTERM or SIGABRT."""
    async with asyncio.TaskGroup() as group:
        runs = [
            group.create_task(run(tmp_path / f"{run.__name__}-{log_format}", log_format, end))
            for run, log_format, end in (
                (opened, "text", signal.SIGABRT),
                (opened, "json", signal.SIGTERM),
                (guarded, "text", signal.SIGTERM),
                (guarded, "json", signal.SIGABRT),
            )
        ]
    total, leaks = 0, []
    for run in runs:
        watched = run.result()
        canaries, lines = len(watched.cage.values), len(watched.server.log.splitlines())
        print(f"{watched.folder.name}: {canaries} canaries seen on their way, {len(watched.answers)} answers, {lines} lines")
        total += canaries
        leaks += [f"{watched.folder.name}: {leak}" for leak in watched.leaks()]
    assert leaks == []
    assert total >= 80
