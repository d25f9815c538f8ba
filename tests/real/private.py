"""Private registries: Debian's docker-registry behind htpasswd, or behind a token server whose tokens it verifies.

Whatever credentials reach the registry or its token server is kept, so that a test can say who was told what.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
import http.client
import http.server
import json
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import parse_qs, urlencode, urlsplit

import bcrypt
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID

from tests.fakes.ports import free_port
from tests.fakes.tokens import basic

from .image import INDEX_TYPE, MANIFEST_TYPE
from .line import Line
from .services import DockerRegistry, status_of

Guard = Literal["htpasswd", "token"]
GUARDS: tuple[Guard, ...] = ("htpasswd", "token")


@dataclass(frozen=True, slots=True)
class Account:
    """A user, with the password that is right or one that is not."""

    user: str
    password: str

    @property
    def pair(self) -> str:
        """``USER:PASSWORD``, as programs take it."""
        return f"{self.user}:{self.password}"

    @property
    def auth(self) -> dict[str, str]:
        """As an ``AuthConfig`` of the CRI, as the kubelet fills it in."""
        return {"username": self.user, "password": self.password}

    @property
    def entry(self) -> dict[str, str]:
        """As an entry of a Docker configuration."""
        return {"auth": base64.b64encode(self.pair.encode()).decode()}


ALICE = Account("alice", "open:sesame+/=")
"""May read ``team/*``. Her password has what is easily lost on the way: a colon, and what forms and base64 use."""
BOB = Account("bob", "hunter2-of-bob")
"""May read ``other/*``; where there are no rights, as behind htpasswd, all."""
MISTAKEN = Account("alice", "not-her-password")
STRANGER = Account("mallory", "nobody-knows-him")

RIGHTS: Mapping[str, tuple[str, ...]] = {
    "": ("public/*",),
    ALICE.user: ("public/*", "team/*"),
    BOB.user: ("public/*", "other/*"),
}
"""User -> what he may read; without a name: everybody."""


# -- a token server --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What the token server was asked, by whom, and what came of it."""

    method: str
    account: Account | None
    """As shown, whether right or not; None is the anonymous, or a refresh token."""
    scopes: tuple[str, ...]
    granted: tuple[str, ...]
    """The repositories that the token is good for."""
    status: int


class TokenServer:
    """Issues tokens as in distribution's ``spec/auth/token.md`` and ``oauth.md``, signed by a key of its own (ES256).

    Who shows a wrong password gets none; the others get one for as much of what they ask for as they may have.
    """

    issuer = "issuer.test"
    service = "private.test"

    def __init__(self, accounts: Iterable[Account], rights: Mapping[str, tuple[str, ...]], life: int = 300) -> None:
        self.requests: list[TokenRequest] = []
        self._passwords = {account.user: account.password for account in accounts}
        self._rights = dict(rights)
        self._life = life
        self._refresh: dict[str, str] = {}
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._port = free_port()
        self._server: http.server.ThreadingHTTPServer | None = None
        self.host = f"127.0.0.1:{self._port}"
        self.realm = f"http://{self.host}/token"

    def withdraw(self, user: str) -> None:
        """No token gives this user any right from now on; those that he has are good until they end."""
        self._rights[user] = ()

    @property
    def certificate(self) -> bytes:
        """What a registry has to trust, PEM."""
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.issuer)])
        now = datetime.datetime.now(datetime.UTC)
        day = datetime.timedelta(days=1)
        builder = x509.CertificateBuilder(name, name, self._key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - day).not_valid_after(now + 30 * day)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    # -- what it answers -------------------------------------------------------------------------------------------------

    def answer(self, method: str, target: str, authorization: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """The status and the document for one request."""
        form = parse_qs(body.decode() if method == "POST" else urlsplit(target).query)
        scopes = tuple(scope for value in form.get("scope", []) for scope in value.split())
        account: Account | None = None
        user: str | None = ""
        grant = form.get("grant_type", [""])[0]
        if urlsplit(target).path != "/token":
            return 404, {}
        if grant == "refresh_token":
            user = self._refresh.get(form.get("refresh_token", [""])[0])
        elif grant == "password":
            account = Account(form.get("username", [""])[0], form.get("password", [""])[0])
        else:
            account = account_in(authorization)
        if account is not None:
            user = account.user if self._passwords.get(account.user) == account.password else None
        granted: tuple[str, ...] = ()
        document: dict[str, Any] = {"errors": [{"code": "UNAUTHORIZED", "message": "who is that?"}]}
        if user is not None:
            asked = [scope.partition(":")[2].rpartition(":") for scope in scopes if scope.startswith("repository:")]
            may = [name for name, _, actions in asked if "pull" in actions.split(",") and self._allows(user, name)]
            granted = tuple(sorted(set(may)))
            token = self._token(user, granted)
            document = {"token": token, "access_token": token, "expires_in": self._life}
            if user and (form.get("offline_token") == ["true"] or form.get("access_type") == ["offline"]):
                document["refresh_token"] = self.refresh_token(user)
        status = 200 if user is not None else 401
        self.requests.append(TokenRequest(method, account, scopes, granted, status))
        return status, document

    def refresh_token(self, user: str) -> str:
        """What Docker calls an identity token: good for tokens of this user, in place of the password."""
        token = secrets.token_urlsafe(24)
        self._refresh[token] = user
        return token

    def _allows(self, user: str, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self._rights.get(user, ()))

    def _token(self, user: str, repositories: Sequence[str]) -> str:
        now = int(time.time())
        header = {"typ": "JWT", "alg": "ES256", "kid": self._key_id()}
        claims = {
            "iss": self.issuer,
            "sub": user,
            "aud": self.service,
            "nbf": now - 10,
            "iat": now,
            "exp": now + self._life,
            "jti": secrets.token_hex(8),
            "access": [{"type": "repository", "name": name, "actions": ["pull"]} for name in repositories],
        }
        signed = ".".join(_base64url(json.dumps(part).encode()) for part in (header, claims))
        r, s = decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{_base64url(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    def _key_id(self) -> str:
        """The key's name as libtrust makes it (``key.go``, ``util.go``), by which docker-registry finds it."""
        public = self._key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        text = base64.b32encode(hashlib.sha256(public).digest()[:30]).decode()
        return ":".join(text[at : at + 4] for at in range(0, len(text), 4))

    # -- how it runs -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Serve, on the same port at each start."""
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, document = server.answer(self.command, self.path, self.headers.get("Authorization", ""), body)
                content = json.dumps(document).encode()
                self.send_response(status)
                if status == 401:
                    self.send_header("WWW-Authenticate", 'Basic realm="token"')
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing is printed."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        running, self._server = self._server, None
        if running is not None:
            running.shutdown()
            running.server_close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def account_in(authorization: str) -> Account | None:
    """What a ``Basic`` header shows; nobody by ``Og==``, which podman and skopeo send when they have no credentials."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, _, password = base64.b64decode(value, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return Account(user, password) if user or password else None


# -- requests, made and seen -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer; the names of its headers in lower case."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def all(self, name: str) -> list[str]:
        """Every line of a header."""
        return [value for key, value in self.headers if key == name]


def ask(
    url: str, account: Account | None = None, *, method: str = "GET", form: Mapping[str, str] | None = None, token: str = ""
) -> Reply:
    """One request, with the credentials given and no others, on a connection of its own; no redirect is followed."""
    parts = urlsplit(url)
    headers = {"Accept": f"{INDEX_TYPE}, {MANIFEST_TYPE}, */*"}  # docker-registry has no index for a mere */*
    if account is not None:
        headers["Authorization"] = basic(account.user, account.password)
    if token:
        headers["Authorization"] = f"Bearer {token}"
    body = None
    if form is not None:
        headers["Content-Type"] = "application/x-www-form-urlencoded"
        body = urlencode(form)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        connection.request(method, parts._replace(scheme="", netloc="").geturl(), body, headers)
        answer = connection.getresponse()
        found = tuple((name.lower(), value) for name, value in answer.getheaders())
        return Reply(answer.status, found, answer.read())
    finally:
        connection.close()


@dataclass(frozen=True, slots=True)
class Sent:
    """A request as it went over a line."""

    method: str
    target: str
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    @property
    def agent(self) -> str:
        """The program that sent it, without its version."""
        return self.headers.get("user-agent", "").partition("/")[0]

    @property
    def authorization(self) -> str:
        """The header of that name."""
        return self.headers.get("authorization", "")

    @property
    def account(self) -> Account | None:
        """Whom it shows, as ``Basic``, or in the form of a token request."""
        form = parse_qs(self.body.decode(errors="replace"))
        if form.get("grant_type") == ["password"]:
            return Account(form.get("username", [""])[0], form.get("password", [""])[0])
        return account_in(self.authorization)

    @property
    def subject(self) -> str:
        """The user in whose name it is made, by password or by a token of ``TokenServer``; empty for the anonymous."""
        account = self.account
        if account is not None:
            return account.user
        scheme, _, token = self.authorization.partition(" ")
        if scheme.lower() != "bearer" or token.count(".") != 2:
            return ""
        claims = token.split(".")[1]
        return str(json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["sub"])


def sent_over(line: Line) -> list[Sent]:
    """All requests that a line kept, in the order of their connections."""
    return [request for kept in list(line.requests) for request in _parse(bytes(kept))]


def _parse(data: bytes) -> Iterator[Sent]:
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        if not end:
            return
        first, *rest = head.decode().split("\r\n")
        headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in rest)}
        size = int(headers.get("content-length", "0"))
        method, target, _ = first.split(" ")
        yield Sent(method, target, headers, data[:size])
        data = data[size:]


# -- the registries ----------------------------------------------------------------------------------------------------


class PrivateRegistry(DockerRegistry):
    """docker-registry that lets in only those who show what ``auth``, a section of its configuration, asks for."""

    def __init__(self, root: Path, data: Path, auth: Mapping[str, Any]) -> None:
        super().__init__(root, data)
        self._auth = dict(auth)

    def command(self) -> Sequence[str | Path]:
        *command, file = super().command()
        config = yaml.safe_load(Path(file).read_text())
        Path(file).write_text(yaml.safe_dump({**config, "auth": self._auth}))
        return [*command, file]

    def ready(self) -> bool:
        return status_of(f"{self.url}/v2/") == 401


@dataclass(frozen=True)
class Private:
    """A private registry as others know it: behind a line that keeps every request."""

    guard: Guard
    registry: PrivateRegistry
    line: Line
    tokens: TokenServer | None
    passwords: Path

    @property
    def host(self) -> str:
        """Where clients find it."""
        return self.line.host

    @property
    def url(self) -> str:
        """The same, as a URL."""
        return self.line.url

    def upstream(self, name: str, **more: object) -> dict[str, Any]:
        """As an upstream in a configuration of pullcache."""
        known = {"name": name, "endpoints": [self.url], "allowAddresses": ["127.0.0.1/32"]}
        return {**known, **({"tokenHosts": [self.tokens.host]} if self.tokens else {}), **more}

    def outsiders(self) -> tuple[Account | None, ...]:
        """Who may not read ``team/*``; None is the anonymous. Behind htpasswd whoever has a password may."""
        return (None, MISTAKEN, STRANGER, *([BOB] if self.tokens else []))

    def seen(self) -> list[Sent]:
        """What the registry was asked since the last ``forget()``, as it went over the line."""
        return sent_over(self.line)

    def shown(self) -> set[Account]:
        """Every credential that the registry or its token server was shown since the last ``forget()``."""
        found = [request.account for request in self.seen()]
        found += [request.account for request in self.tokens.requests] if self.tokens else []
        return {account for account in found if account is not None}

    def forget(self) -> None:
        """Let ``seen()`` and ``shown()`` begin here, and the registry's own log."""
        for kept in list(self.line.requests):
            kept.clear()
        if self.tokens is not None:
            self.tokens.requests.clear()
        self.registry.forget()

    def withdraw(self, account: Account) -> None:
        """The registry, or its token server, gives this user nothing from now on."""
        if self.tokens is not None:
            self.tokens.withdraw(account.user)
        else:
            lines = self.passwords.read_text().splitlines(keepends=True)
            self.passwords.write_text("".join(line for line in lines if not line.startswith(f"{account.user}:")))

    def stop(self) -> None:
        """Nobody answers any more, the token server neither."""
        self.registry.stop()
        if self.tokens is not None:
            self.tokens.stop()


def htpasswd(*accounts: Account) -> str:
    """A file as Apache's htpasswd writes it, with the cheapest bcrypt there is."""
    return "".join(
        f"{account.user}:{bcrypt.hashpw(account.password.encode(), bcrypt.gensalt(4)).decode()}\n" for account in accounts
    )


@contextmanager
def private_registry(
    guard: Guard, root: Path, data: Path, rights: Mapping[str, tuple[str, ...]] = RIGHTS
) -> Iterator[Private]:
    """A registry with this data to which Alice and Bob have the keys. ``rights``: where there are any, as in ``RIGHTS``."""
    root.mkdir(parents=True)
    passwords, bundle = root / "htpasswd", root / "issuer.pem"
    passwords.write_text(htpasswd(ALICE, BOB))
    with TokenServer((ALICE, BOB), rights) as tokens:
        bundle.write_bytes(tokens.certificate)
        auth: dict[str, dict[str, Any]] = {
            "htpasswd": {"realm": "private", "path": str(passwords)},
            "token": {
                "realm": tokens.realm,
                "service": tokens.service,
                "issuer": tokens.issuer,
                "rootcertbundle": str(bundle),
            },
        }
        with PrivateRegistry(root, data, {guard: auth[guard]}) as registry, Line(registry.port, keep=1 << 20) as line:
            yield Private(guard, registry, line, tokens if guard == "token" else None, passwords)
