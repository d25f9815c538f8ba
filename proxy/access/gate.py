"""The door of the listener: who a client is, and what it is asked to show.

Without htpasswd and without an upstream of ``access: verify`` nothing is asked, and what is shown is not looked at: a client
that sends credentials unasked is served like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import parse_qsl

from proxy.access.attempts import Attempts
from proxy.access.authorization import (
    Basic,
    Bearer,
    TokenRequestInvalid,
    Unusable,
    parse,
    parse_token_request,
)
from proxy.access.caller import Caller
from proxy.access.handles import ANONYMOUS_HANDLE, Handles
from proxy.access.htpasswd import Users
from proxy.access.turns import Turns
from proxy.errors import CacheFailing, Denied, Unauthorized
from proxy.once import Once
from proxy.rules import may_read

SERVICE = "pullcache"
_AT_ONCE = 2  # passwords of one client that are checked at the same time


class Gate:
    """Admits clients. ``token_url`` is where a token is to be had; None where no upstream is of ``access: verify``."""

    def __init__(
        self,
        realm: str,
        users: Users | None,
        repositories: Mapping[str, Sequence[str]],
        token_url: str | None,
        handles: Handles,
        attempts: Attempts,
    ) -> None:
        self._realm = realm
        self._users = users
        self._repositories = repositories
        self._token_url = token_url
        self._handles = handles
        self._attempts = attempts
        self._once: Once[tuple[str, Basic], None] = Once(outlives_callers=True)  # who leaves early was not wrong
        self._turns = Turns()

    async def close(self) -> None:
        """Ends the checks that are running."""
        await self._once.close()

    async def admit(self, address: str, header: str | None, certificate_user: str | None) -> Caller:
        """Who the client is; raises ``Unauthorized`` where that has to be shown, ``TooManyAttempts`` after wrong tries."""
        if self._users is not None:
            return Caller(address, user=await self._log_in(self._users, address, header))
        if self._token_url is None:
            return Caller(address, user=certificate_user)
        shown = parse(header)
        if isinstance(shown, Unusable):
            raise self.unauthorized(shown.why)
        if isinstance(shown, Basic):
            return Caller(address, shown.credential, certificate_user)
        if isinstance(shown, Bearer) and shown.token != ANONYMOUS_HANDLE:
            credential = self._handles.find(shown.token)
            if credential is None:
                raise self.unauthorized("the token is not known here; ask for a new one", error="invalid_token")
            return Caller(address, credential, certificate_user)
        return Caller(address, user=certificate_user)

    def greet(self, header: str | None) -> None:
        """podman, skopeo and dockerd take a challenge from ``GET /v2/`` only; raises ``Unauthorized`` to give them one."""
        if self._token_url is not None and header is None:
            error = Unauthorized("ask for a token; the anonymous get one, too")
            error.challenges = (self._bearer(),)
            raise error

    def unauthorized(self, message: str, *, scope: str = "", error: str = "") -> Unauthorized:
        """The refusal of who has not shown what he should have."""
        refusal = Unauthorized(message)
        basic = f'Basic realm="{self._realm}"'
        refusal.challenges = (basic,) if self._token_url is None else (self._bearer(scope, error), basic)
        return refusal

    def check_repository(self, caller: Caller, name: str) -> None:
        """Raises ``Denied`` where the listener's own user may not read ``name`` (registry/repository)."""
        if not self._repositories:
            return
        globs = self._repositories.get(caller.user or "", self._repositories.get("*", ()))
        if not may_read(globs, name):
            raise Denied(f"{caller.user or 'this client'} may not read {name} here; listener.users says what he may")

    def token(self, address: str, method: str, query: str, body: bytes, header: str | None) -> dict[str, object]:
        """The answer of the token endpoint; raises ``TokenRequestInvalid``."""
        asked = parse_token_request(method, _pairs(query), _pairs(body.decode("utf-8", "surrogateescape")), parse(header))
        token = ANONYMOUS_HANDLE if asked.credential is None else self._handles.give(asked.credential, address)
        return {"token": token, "access_token": token, "expires_in": int(self._handles.promised_life)}

    async def _log_in(self, users: Users, address: str, header: str | None) -> str:
        shown = parse(header)
        if not isinstance(shown, Basic):
            raise self.unauthorized(shown.why if isinstance(shown, Unusable) else "this registry wants a user and password")
        if not users.knows(shown.username, shown.password):
            await self._once.run((address, shown), lambda: self._check(users, address, shown))
        return shown.username

    async def _check(self, users: Users, address: str, shown: Basic) -> None:
        """One check for all who show the same at the same time: a crowd that is right is not many that are wrong."""
        attempt = self._attempts.begin(address, "this listener")
        try:
            async with self._turns.of(address, _AT_ONCE):
                is_right = await users.verify(shown.username, shown.password)
        except Unauthorized as error:
            raise self.unauthorized(error.message) from None
        except CacheFailing:
            attempt.succeeded()  # it was not looked at
            raise
        if not is_right:
            raise self.unauthorized("the user or the password is wrong")
        attempt.succeeded()

    def _bearer(self, scope: str = "", error: str = "") -> str:
        parts = [f'Bearer realm="{self._token_url}"', f'service="{SERVICE}"']
        parts += [f'{name}="{value}"' for name, value in (("scope", scope), ("error", error)) if value]
        return ",".join(parts)


def _pairs(text: str) -> list[tuple[str, str]]:
    try:
        return parse_qsl(text, keep_blank_values=True, max_num_fields=256, errors="surrogateescape")
    except ValueError:
        raise TokenRequestInvalid("invalid_request", "it has more than 256 parameters") from None
