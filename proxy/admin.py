"""The second listener, for those who run the cache: health, readiness, figures, explanations.

No upstream is asked for any of it: a dead registry must not get the cache restarted. Health and readiness are told to
everybody who reaches it; the rest, where there is a token, to who shows it.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, Mapping
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
_WHICH = b'{"error": "which image? Ask for example /explain?image=docker.io/library/debian:12"}\n'

Explain = Callable[[str, str], Awaitable[dict[str, Any]]]


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
    metrics: Metrics, is_ready: Callable[[], bool], explain: Explain | None = None, token: AdminToken | None = None
) -> Listener:
    """``/healthz``: the event loop turns; ``/readyz``: no stop was asked for; ``/metrics``; ``/explain?image=``, and
    perhaps ``&platform=``; without an image that is 400."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        path = request.rel_url.raw_path
        status, body, kind = 404, b"not found\n", _TEXT
        headers = COMMON_HEADERS | {"Allow": "GET, HEAD"}
        if request.method not in ("GET", "HEAD"):
            status, body = 405, b"read only\n"
        elif path == "/healthz":
            status, body = 200, b"ok\n"
        elif path == "/readyz":
            status, body = (200, b"ready\n") if is_ready() else (503, b"not ready\n")
        elif token is not None and not token.opens(request.headers.get("Authorization")):
            status, body = 401, b"a token is needed: Authorization: Bearer, with what adminListener.tokenFile holds\n"
            headers["WWW-Authenticate"] = 'Bearer realm="pullcache admin"'
        elif path == "/metrics":
            status, body, kind = 200, metrics.render(), _PROMETHEUS
        elif path == "/explain" and explain is not None:
            status, kind = 200 if request.rel_url.query.get("image") else 400, _JSON
            body = await _explanation(explain, request.rel_url.query) if status == 200 else _WHICH
        return web.Response(status=status, body=body, headers=headers | {"Content-Type": kind})

    return Listener(answer, metrics)


async def _explanation(explain: Explain, query: Mapping[str, str]) -> bytes:
    try:
        found = await explain(query.get("image", ""), query.get("platform", ""))
    except RegistryError as error:
        found = {"error": error.message}
    return json.dumps(found, indent=1).encode() + b"\n"
