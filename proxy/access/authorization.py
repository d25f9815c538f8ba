"""What a client shows: the ``Authorization`` header, and requests to our token endpoint.

RFC 7617 (Basic), RFC 6750 section 2.1 (Bearer); distribution ``spec/auth/token.md`` (GET) and ``spec/auth/oauth.md`` (POST).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from proxy.credentials.credential import Credential

_MAX = 16 * 1024
_MAX_SERVICE = 256
_MAX_SCOPE = 512
_MAX_SCOPES = 64
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+)(?: +(.*))?", re.ASCII | re.DOTALL)
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_FROM_CLIENT = "the client"


@dataclass(frozen=True, slots=True)
class Basic:
    """A user and a password, not both empty; neither is in its ``repr``."""

    username: str = field(repr=False)
    password: str = field(repr=False)

    @property
    def credential(self) -> Credential:
        """The same, for a registry."""
        return Credential(self.username, self.password, source=_FROM_CLIENT)


@dataclass(frozen=True, slots=True)
class Bearer:
    """A token, which is not in its ``repr``."""

    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Unusable:
    """Something was shown that cannot be read; ``why`` is for people and quotes nothing of it."""

    why: str


Authorization = Basic | Bearer | Unusable | None
"""What was shown; None: nothing."""


def parse(header: str | None) -> Authorization:
    """What an ``Authorization`` header shows. An empty user and password (podman's ``Basic Og==``) is nothing."""
    if header is None:
        return None
    if len(header) > _MAX:
        return Unusable("the Authorization header is longer than 16 KiB")
    found = _HEADER.fullmatch(header)
    scheme = found[1].lower() if found else ""
    value = (found and found[2]) or ""
    if scheme == "basic":
        return _parse_basic(value)
    if scheme != "bearer":
        return Unusable("the Authorization header is neither Basic nor Bearer")
    return Bearer(value) if _TOKEN.fullmatch(value) else Unusable("the Bearer token has characters that no token has")


def _parse_basic(value: str) -> Authorization:
    try:
        text = base64.b64decode(value, validate=True).decode()
    except ValueError:
        return Unusable("the Basic credentials are not base64 of UTF-8")
    username, colon, password = text.partition(":")
    if not colon:
        return Unusable("the Basic credentials have no colon")
    if _CONTROL.search(text):
        return Unusable("the Basic credentials hold a control character, such as a line break at the end of a password")
    return Basic(username, password) if username or password else None


class TokenRequestInvalid(Exception):
    """A token request that is answered with an OAuth error (RFC 6749 section 5.2), status 400; quotes nothing of it."""

    def __init__(self, error: Literal["invalid_request", "unsupported_grant_type"], description: str) -> None:
        super().__init__(f"{error}: {description}")
        self.error = error
        self.description = description


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What a client wants a token for. No credential: the anonymous."""

    credential: Credential | None
    scopes: tuple[str, ...]
    """Those that ask to pull from a repository, each once; all others are passed over, for containerd adds its own."""
    service: str


Pairs = Iterable[tuple[str, str]]
"""Names and values as they came, decoded."""


def parse_token_request(method: str, query: Pairs, form: Pairs, authorization: Authorization) -> TokenRequest:
    """What a token request asks for; raises ``TokenRequestInvalid``.

    POST: by its form alone, where an ``Authorization`` header would be that of the client program (RFC 6749 section 2.3.1).
    Any other method: by its query, with ``authorization`` as the user's.
    """
    if method == "POST":
        values = _collect(form)
        credential = _credential_of(values)
    else:
        values = _collect(query)
        if isinstance(authorization, Unusable):
            raise TokenRequestInvalid("invalid_request", authorization.why)
        if isinstance(authorization, Bearer):
            raise TokenRequestInvalid("invalid_request", "a token is given for Basic credentials, or for none")
        credential = authorization.credential if authorization is not None else None
    return TokenRequest(credential, _scopes_of(values.get("scope", [])), _one(values, "service", _MAX_SERVICE) or "")


def _credential_of(form: dict[str, list[str]]) -> Credential | None:
    grant = _one(form, "grant_type")
    if grant is None:
        raise TokenRequestInvalid("invalid_request", "grant_type is missing")
    if grant == "refresh_token":
        token = _one(form, "refresh_token")
        if not token:
            raise TokenRequestInvalid("invalid_request", "refresh_token is missing")
        return Credential(identity_token=token, source=_FROM_CLIENT)
    if grant != "password":
        raise TokenRequestInvalid("unsupported_grant_type", "grant_type is password or refresh_token here")
    username, password = _one(form, "username"), _one(form, "password")
    if username is None or password is None:
        raise TokenRequestInvalid("invalid_request", "username or password is missing")
    if ":" in username:
        raise TokenRequestInvalid("invalid_request", "username has a colon, which Basic credentials cannot hold")
    credential = Credential(username, password, source=_FROM_CLIENT)
    return None if credential.is_empty else credential


def _collect(pairs: Pairs) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for name, value in pairs:
        values.setdefault(name, []).append(value)
    return values


def _one(values: dict[str, list[str]], name: str, limit: int = _MAX) -> str | None:
    """The value of a parameter that may stand once (RFC 6749 section 3.2); None if it does not stand at all."""
    found = values.get(name, [])
    if len(found) > 1:
        raise TokenRequestInvalid("invalid_request", f"{name} is given more than once")
    for value in found:
        if len(value) > limit or _CONTROL.search(value) or not _is_unicode(value):
            raise TokenRequestInvalid("invalid_request", f"{name} is too long, or holds what is no text")
        return value
    return None


def _is_unicode(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _scopes_of(lines: Iterable[str]) -> tuple[str, ...]:
    scopes: dict[str, None] = {}
    for line in lines:
        for scope in line[: _MAX_SCOPE * _MAX_SCOPES].split():
            # The name may hold a colon itself: type up to the first, actions after the last.
            kind, _, rest = scope.partition(":")
            name, _, actions = rest.rpartition(":")
            if (
                kind == "repository"
                and name
                and not {"pull", "*"}.isdisjoint(actions.split(","))
                and len(scope) <= _MAX_SCOPE
            ):
                scopes[scope] = None
    return tuple(scopes)[:_MAX_SCOPES]
