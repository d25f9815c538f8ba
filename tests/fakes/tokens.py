"""Token servers: who may read what, in the way of the distribution token specification."""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

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
    """Issues random tokens, to anybody or to one user, and knows what each is good for."""

    def __init__(self, credentials: Credentials | None = None, expires_in: int = 300) -> None:
        self.credentials = credentials
        self.expires_in = expires_in
        self._issued: dict[str, frozenset[str]] = {}

    @property
    def issued(self) -> list[str]:
        """The tokens that are good at present."""
        return list(self._issued)

    def issue(self, scopes: Iterable[str], token: str | None = None) -> str:
        """Make a token, or make a given string one, that is good for these scopes."""
        token = token or secrets.token_urlsafe(24)
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
