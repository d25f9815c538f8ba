"""The second listener, for those who run the cache: health, readiness, figures, and what they ask or have done.

No upstream is asked for health, readiness and figures: a dead registry must not get the cache restarted. Health and
readiness are told to everybody who reaches it; the rest, where there is a token, to who shows it.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from proxy import files
from proxy.access.authorization import Bearer, parse
from proxy.errors import RegistryError
from proxy.listener import Listener
from proxy.metrics import Metrics
from proxy.send import COMMON_HEADERS

_TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_SHORTEST = 16
_CHANGING = (
    b"what changes something is asked for by POST, with Content-Type: application/json, which no web page sends unasked\n"
)


@dataclass(frozen=True, slots=True)
class Action:
    """What operators may ask for; ``is_change``: by POST, else by GET.

    ``answer`` takes the query and gives a JSON object; it raises ``RegistryError``, or ``ValueError`` with a text that says
    what was wrong with the query.
    """

    answer: Callable[[Mapping[str, str]], Awaitable[dict[str, Any]]]
    is_change: bool = False


class AdminTokenUnusable(Exception):
    """The file of the token cannot be used; the text names it."""


class AdminToken:
    """What an operator shows, read from a file; ``reread`` uses what the file holds now."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.reread()

    def reread(self) -> None:
        """Blocks; raises ``AdminTokenUnusable``."""
        try:
            token = files.read(self._path).strip()
        except OSError as error:
            raise AdminTokenUnusable(f"adminListener.tokenFile {self._path}: cannot be read: {error.strerror}") from None
        if len(token) < _SHORTEST:
            raise AdminTokenUnusable(
                f"adminListener.tokenFile {self._path}: shorter than {_SHORTEST} characters; write for example what "
                "'openssl rand -hex 32' prints into it"
            )
        if not isinstance(parse(f"Bearer {token.decode('ascii', 'replace')}"), Bearer):
            raise AdminTokenUnusable(
                f"adminListener.tokenFile {self._path}: no header can show it: one line of A-Z a-z 0-9 . _ ~ + / - is needed"
            )
        self._token = token

    def opens(self, header: str | None) -> bool:
        """Whether an ``Authorization`` header shows it."""
        shown = parse(header)
        return isinstance(shown, Bearer) and hmac.compare_digest(shown.token.encode(), self._token)


def listener(
    metrics: Metrics,
    is_ready: Callable[[], bool],
    actions: Mapping[str, Action],
    token: AdminToken | None = None,
) -> Listener:
    """``/healthz``: the event loop turns; ``/readyz``: no stop was asked for; ``/metrics``; ``actions`` by path."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        path = request.rel_url.raw_path
        action = actions.get(path)
        status, body, kind = 404, b"not found\n", _TEXT
        methods = ("POST",) if action is not None and action.is_change else ("GET", "HEAD")
        headers = COMMON_HEADERS | {"Allow": ", ".join(methods)}
        if request.method not in methods:
            status, body = 405, _CHANGING if methods == ("POST",) else b"read only\n"
        elif path == "/healthz":
            status, body = 200, b"ok\n"
        elif path == "/readyz":
            status, body = (200, b"ready\n") if is_ready() else (503, b"not ready\n")
        elif token is not None and not token.opens(request.headers.get("Authorization")):
            status, body = 401, b"a token is needed: Authorization: Bearer, with what adminListener.tokenFile holds\n"
            headers["WWW-Authenticate"] = 'Bearer realm="pullcache admin"'
        elif path == "/metrics":
            status, body, kind = 200, metrics.render(), _PROMETHEUS
        elif action is not None and action.is_change and request.content_type != _JSON:
            status, body = 415, _CHANGING
        elif action is not None:
            kind = _JSON
            status, body = await _answer(action, request.rel_url.query)
        return web.Response(status=status, body=body, headers=headers | {"Content-Type": kind})

    return Listener(answer, metrics)


async def _answer(action: Action, query: Mapping[str, str]) -> tuple[int, bytes]:
    status = 200
    try:
        found = await action.answer(query)
    except RegistryError as error:
        found = {"error": error.message}
    except ValueError as error:
        status, found = 400, {"error": str(error)}
    return status, json.dumps(found, indent=1).encode() + b"\n"
