"""Token servers: who may read what, in the way of the distribution token specification; and users with rights."""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Protocol
from urllib.parse import parse_qs

from .answers import as_json, oci_error, unauthorized
from .content import repo_of
from .messages import Answer, Request

Credentials = tuple[str, str]


def basic(user: str, password: str) -> str:
    """The Authorization value for a user and password."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def credentials_in(request: Request) -> Credentials | None:
    """The user and password a request carries."""
    scheme, _, value = (request.headers.get("Authorization") or "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, _, password = base64.b64decode(value, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return user, password


def _covers(granted: str, wanted: str) -> bool:
    """Whether a granted scope includes a wanted one; scopes without actions are compared as they are."""
    if granted.count(":") < 2 or wanted.count(":") < 2:
        return granted == wanted
    had, had_actions = granted.rsplit(":", 1)
    need, need_actions = wanted.rsplit(":", 1)
    return had == need and set(need_actions.split(",")) <= set(had_actions.split(","))


class TokenServer:
    """Issues random tokens, to anybody or to one user, and knows what each is good for.

    `ever` are all that it has issued, withdrawn ones too.
    """

    def __init__(self, credentials: Credentials | None = None, expires_in: int = 300) -> None:
        self.credentials = credentials
        self.expires_in = expires_in
        self.ever: list[str] = []
        self._issued: dict[str, frozenset[str]] = {}

    @property
    def issued(self) -> list[str]:
        """The tokens that are good at present."""
        return list(self._issued)

    def issue(self, scopes: Iterable[str], token: str | None = None) -> str:
        """Make a token, or make a given string one, that is good for these scopes."""
        token = token or secrets.token_urlsafe(24)
        self.ever.append(token)
        self._issued[token] = frozenset(scopes)
        return token

    def revoke(self) -> None:
        """No token issued so far is good any more."""
        self._issued.clear()

    def allows(self, token: str, scope: str | None) -> bool | None:
        """Whether a token is good for a scope; None if there is no such token."""
        if token not in self._issued:
            return None
        return scope is None or any(_covers(granted, scope) for granted in self._issued[token])

    def answer(self, request: Request) -> Answer:
        """The answer to a token request."""
        if request.method != "GET":
            return oci_error(405, "UNSUPPORTED")
        given = credentials_in(request)
        if self.credentials is not None and given != self.credentials:
            return unauthorized(['Basic realm="token"'])
        scopes = [scope for value in request.params.get("scope", []) for scope in value.split()]
        return as_json({"token": self.issue(scopes), "expires_in": self.expires_in})


@dataclass(frozen=True)
class Account:
    """A user of a registry, and the repositories that he may read (globs); the identity token stands for the password."""

    user: str
    password: str
    identity_token: str = ""
    may_read: tuple[str, ...] = ("*",)

    @property
    def basic(self) -> str:
        """The Authorization value that shows the password."""
        return basic(self.user, self.password)


@dataclass
class Rights:
    """The accounts of a registry, and what everybody may read without one."""

    accounts: list[Account] = field(default_factory=list)
    public: tuple[str, ...] = ()

    def find(self, given: Credentials) -> Account | None:
        """Whose user and password these are."""
        return next((account for account in self.accounts if (account.user, account.password) == given), None)

    def find_by_token(self, token: str) -> Account | None:
        """Whose identity token this is."""
        return next((account for account in self.accounts if token and account.identity_token == token), None)

    def allow(self, account: Account | None, repo: str) -> bool:
        """Whether an account, or everybody, may read a repository."""
        globs = self.public + (account.may_read if account else ())
        return any(fnmatchcase(repo, glob) for glob in globs)


class RightsTokenServer(TokenServer):
    """Gives each account a token for as much of what it asks for as it may read, and everybody one for what is public.

    Who is mistaken in the password gets none. GET is answered as in the distribution token specification, POST as in its
    OAuth one.
    """

    def __init__(self, rights: Rights, expires_in: int = 300) -> None:
        super().__init__(expires_in=expires_in)
        self.rights = rights

    def answer(self, request: Request) -> Answer:
        form = parse_qs(request.body.decode("latin-1")) if request.method == "POST" else request.params
        account, is_known = None, True
        if request.method == "POST":
            match form.get("grant_type"):
                case ["refresh_token"]:
                    account = self.rights.find_by_token(form.get("refresh_token", [""])[0])
                case ["password"]:
                    account = self.rights.find((form.get("username", [""])[0], form.get("password", [""])[0]))
                case _:
                    return oci_error(400, "UNSUPPORTED")
            is_known = account is not None
        elif request.headers.has("Authorization"):
            given = credentials_in(request)
            account = self.rights.find(given) if given else None
            is_known = account is not None
        if not is_known:
            return unauthorized(['Basic realm="token"'])
        scopes = [scope for value in form.get("scope", []) for scope in value.split()]
        granted = [scope for scope in scopes if self.rights.allow(account, scope.partition(":")[2].rpartition(":")[0])]
        return as_json({"token": self.issue(granted), "expires_in": self.expires_in})


class Guard(Protocol):
    """Who is let in."""

    def refusal(self, request: Request) -> Answer | None:
        """The challenge to a request, or None if it may pass."""


@dataclass(frozen=True)
class RightsGuard:
    """Lets in, by Basic, whoever may read the repository: without a good password 401, without the right 403."""

    rights: Rights

    def refusal(self, request: Request) -> Answer | None:
        """The refusal of a request, or None if it may pass."""
        given = credentials_in(request)
        account = self.rights.find(given) if given else None
        if account is None and request.headers.has("Authorization"):
            return unauthorized(['Basic realm="registry"'])
        if self.rights.allow(account, repo_of(request.path) or ""):
            return None
        return unauthorized(['Basic realm="registry"']) if account is None else oci_error(403, "DENIED")


@dataclass(frozen=True)
class BearerGuard:
    """Lets in whoever has a token for the repository, or for one fixed scope."""

    tokens: TokenServer
    realm: str
    service: str
    scope: str | None = None

    def refusal(self, request: Request) -> Answer | None:
        """The challenge to a request, or None if it may pass."""
        repo = repo_of(request.path)
        scope = self.scope or (f"repository:{repo}:pull" if repo else None)
        challenge = f'Bearer realm="{self.realm}",service="{self.service}"'
        if scope is not None:
            challenge += f',scope="{scope}"'
        scheme, _, token = (request.headers.get("Authorization") or "").partition(" ")
        if scheme.lower() != "bearer":
            return unauthorized([challenge])
        match self.tokens.allows(token, scope):
            case True:
                return None
            case False:
                return unauthorized([f'{challenge},error="insufficient_scope"'])
            case None:
                return unauthorized([f'{challenge},error="invalid_token"'])


@dataclass(frozen=True)
class BasicGuard:
    """Lets in one user."""

    credentials: Credentials

    def refusal(self, request: Request) -> Answer | None:
        """The challenge to a request, or None if it may pass."""
        if credentials_in(request) == self.credentials:
            return None
        return unauthorized(['Basic realm="registry"'])
