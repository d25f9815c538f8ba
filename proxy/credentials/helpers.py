"""Docker's credential helpers: programs ``docker-credential-NAME`` that a ``config.json`` names to keep credentials.

Their protocol is that of docker/docker-credential-helpers (README, ``client/client.go``, ``credentials/error.go``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from proxy.credentials.ahead import Ahead
from proxy.credentials.credential import Credential
from proxy.credentials.programs import ProgramFailed, ProgramRefused, parse_object, run
from proxy.logs import printable

_NAME = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)
_NOT_FOUND = b"credentials not found in native keychain"
_TOKEN = "<token>"  # noqa: S105 - the user name by which a secret is an identity token
_KEPT = 300.0
_ABSENCE_KEPT = 10.0  # a login shall be seen soon


class CredentialHelpers:
    """What credential helpers hold. A credential is kept 5 minutes, and asked for again ahead of that; its absence 10 s."""

    def __init__(self, timer: Callable[[], float], within: float = 10.0) -> None:
        self._within = within
        self._kept: Ahead[tuple[str, str], Credential | None] = Ahead(1024, timer)

    async def get(self, helper: str, registry: str) -> Credential | None:
        """The credential that ``docker-credential-HELPER`` has for ``registry``, a key of the Docker configuration as it
        is written there; None if it says that it has none. Raises ``ProgramFailed``; a failure is the answer for 10 s."""
        return await self._kept.get((helper, registry), partial(self._get, helper, registry))

    async def registries(self, helper: str) -> list[str]:
        """The keys that ``docker-credential-HELPER`` has credentials for, asked each time; raises ``ProgramFailed``."""
        answer = await self._run(helper, "list", "")
        return list(parse_object(_program(helper), answer))

    def renew(self) -> None:
        """Asks again for what is kept when it is used next."""
        self._kept.renew()

    async def close(self) -> None:
        """Stops the programs that run for ``get``."""
        await self._kept.close()

    async def _get(self, helper: str, registry: str) -> tuple[Credential | None, float]:
        try:
            answer = await self._run(helper, "get", registry)
        except ProgramRefused:
            return None, _ABSENCE_KEPT
        credential = parse_credential(_program(helper), registry, answer)
        return (None, _ABSENCE_KEPT) if credential.is_empty else (credential, _KEPT)

    async def _run(self, helper: str, action: str, text: str) -> bytes:
        program = _program(helper)
        return await run([program, action], stdin=text.encode(errors="replace"), within=self._within, refusal=_NOT_FOUND)


def parse_credential(program: str, registry: str, answer: bytes) -> Credential:
    """The credential in what ``program`` answered to ``get``; raises ``ProgramFailed``."""
    document = parse_object(program, answer)
    username, secret = document.get("Username", ""), document.get("Secret", "")
    if not isinstance(username, str) or not isinstance(secret, str):
        raise ProgramFailed(f"{program}: its Username or Secret is not a text")
    if username == _TOKEN:
        return Credential(identity_token=secret, source=program, registry=registry)
    return Credential(username, secret, source=program, registry=registry)


def _program(helper: str) -> str:
    if not _NAME.fullmatch(helper):  # a '/' in it would run a program of any name
        raise ProgramFailed(f"docker-credential-{printable(helper)}: not the name of a credential helper")
    return f"docker-credential-{helper}"
