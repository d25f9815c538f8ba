"""A container registry on loopback that tells the truth until it is scripted to do otherwise.

It speaks HTTP/1.1 over bare asyncio transports, so that it can lie about anything down to single bytes.
"""

from __future__ import annotations

import asyncio
import socket
import ssl as tls
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

from .answers import Step, perform
from .content import Content, Image, Manifest
from .messages import Answer, Request
from .peer import Delivery, Malformed, Over, Peer
from .recorder import authority, listen
from .tokens import BasicGuard, BearerGuard, Credentials, Guard, Rights, RightsGuard, RightsTokenServer, TokenServer
from .waiting import PATIENCE, Signal

__all__ = ["Image", "Manifest", "Request", "Script", "ScriptedRegistry"]

HANDSHAKE_SECONDS = 10.0
SHUTDOWN_SECONDS = 2.0


@dataclass
class Script:
    """Steps waiting for requests; `used` counts those taken."""

    method: str
    matches: Callable[[Request], bool]
    steps: deque[Step]
    forever: bool = False
    used: int = field(default=0)

    @property
    def exhausted(self) -> bool:
        """Whether no step is left to take."""
        return not self.steps

    def cancel(self) -> None:
        """Drop the steps that are left."""
        self.steps.clear()

    def take(self, request: Request) -> Step | None:
        """The step for this request, if the script has one."""
        if not self.steps or self.method not in ("*", request.method) or not self.matches(request):
            return None
        self.used += 1
        return self.steps[0] if self.forever and len(self.steps) == 1 else self.steps.popleft()


class ScriptedRegistry(Content):
    """A registry that records every request and answers by script, else truthfully.

    Access control comes first: scripts see only requests that are let in. The token endpoint is `/token`.
    An exception raised by a script is raised again on leaving the context.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        ssl: tls.SSLContext | None = None,
        port: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.port = port
        self.requests: list[Request] = []
        self.connections = 0
        self.failed_handshakes = 0
        self.malformed = 0
        self.tokens = TokenServer()
        self._address = host
        self._name = name or host
        self._ssl = ssl
        self._guard: Guard | None = None
        self._scripts: list[Script] = []
        self._sent: Counter[str] = Counter()
        self._signal = Signal()
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._conversations: set[asyncio.Task[None]] = set()
        self._failures: list[Exception] = []

    def truth(self, request: Request) -> Answer:
        """What a correct registry, with its token server, answers."""
        return self.tokens.answer(request) if request.path == "/token" else super().truth(request)

    # --- where it is ---

    @property
    def host(self) -> str:
        """Name (or address) and port, as in a Host header."""
        return authority(self._name, self.port)

    @property
    def url(self) -> str:
        """The base URL."""
        return f"{'https' if self._ssl else 'http'}://{self.host}"

    async def start(self) -> None:
        """Begin to accept connections; again on the same port after a stop."""
        self._listener = listen(self._address, self.port)
        self.port = self._listener.getsockname()[1]
        self._accepting = asyncio.create_task(self._accept(self._listener))

    async def stop(self) -> None:
        """Refuse connections from now on and drop those there are; content and records stay."""
        tasks = [*self._conversations, *([self._accepting] if self._accepting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        self._listener = self._accepting = None

    async def __aenter__(self) -> ScriptedRegistry:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
        if error is None and self._failures:
            raise ExceptionGroup("a script failed", self._failures)

    # --- what it is to do ---

    def script(self, method: str, path: str | Callable[[Request], bool], *answers: Step, forever: bool = False) -> Script:
        """Answer the next matching requests with these steps in turn; `forever` repeats the last one.

        A path is compared with the undecoded path of the request, without query; method "*" matches any.
        Where several scripts match, the oldest with steps left is followed.
        """
        matches = path if callable(path) else _path_is(path)
        script = Script(method, matches, deque(answers), forever)
        self._scripts.append(script)
        return script

    def require_token(
        self,
        realm: str | None = None,
        service: str = "registry.test",
        scope: str | None = None,
        *,
        tokens: TokenServer | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        """Let in only bearers of tokens from its own token server, or from a given one at another realm."""
        tokens = tokens or self.tokens
        if credentials is not None:
            tokens.credentials = credentials
        self._guard = BearerGuard(tokens, realm or f"{self.url}/token", service, scope)

    def require_basic(self, user: str, password: str) -> None:
        """Let in only one user, by Basic authentication."""
        self._guard = BasicGuard((user, password))

    def require_rights(self, rights: Rights, scheme: Literal["Basic", "Bearer"] = "Bearer") -> None:
        """Let in whoever may read what he asks for; who that is may change while it runs."""
        if scheme == "Basic":
            self._guard = RightsGuard(rights)
        else:
            self.tokens = RightsTokenServer(rights)
            self._guard = BearerGuard(self.tokens, f"{self.url}/token", "registry.test")

    def open_to_all(self) -> None:
        """Let in everybody, as at the start."""
        self._guard = None

    # --- what has happened ---

    def seen(self, method: str | None = None, path: str | None = None) -> list[Request]:
        """The requests so far, by method and path."""
        return [r for r in self.requests if method in (None, r.method) and path in (None, r.path)]

    def count(self, method: str, path: str) -> int:
        """How many requests there were of this kind."""
        return len(self.seen(method, path))

    def bytes_sent(self, path: str | None = None) -> int:
        """How many body bytes have been sent for a path, or in all."""
        return self._sent.total() if path is None else self._sent[path]

    def heard(self, secret: str | bytes) -> bool:
        """Whether this occurs anywhere in any request."""
        needle = secret.encode() if isinstance(secret, str) else secret
        return any(needle in request.raw for request in self.requests)

    @property
    def open_connections(self) -> int:
        """How many connections are open at present."""
        return len(self._conversations)

    async def wait_for(self, condition: Callable[[], object], within: float = PATIENCE) -> None:
        """Wait until a condition about this registry holds; looked at again after each event."""
        await self._signal.wait_for(condition, within)

    # --- how it works ---

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(listener)
            self.connections += 1
            self._signal.notify()
            task = asyncio.create_task(self._converse(sock, self.connections))
            self._conversations.add(task)
            task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._conversations.discard(task)
        self._signal.notify()

    async def _converse(self, sock: socket.socket, number: int) -> None:
        """Everything that happens on one connection."""
        peer = Peer(number)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: peer,
                sock,
                ssl=self._ssl,
                ssl_handshake_timeout=HANDSHAKE_SECONDS if self._ssl else None,
                ssl_shutdown_timeout=SHUTDOWN_SECONDS if self._ssl else None,
            )
        except OSError:
            self.failed_handshakes += 1
            return
        try:
            while await self._exchange(peer):
                pass
            await peer.end("fin")
        except (ConnectionError, Over):
            pass
        except Malformed:
            self.malformed += 1
        except Exception as failure:
            self._failures.append(failure)
        finally:
            await peer.close()

    async def _exchange(self, peer: Peer) -> bool:
        """One request and its answer; whether another may follow."""
        request = await peer.read_request()
        if request is None:
            return False
        self.requests.append(request)
        self._signal.notify()

        def count(size: int) -> None:
            self._sent[request.path] += size
            self._signal.notify()

        reusable = await Delivery(peer, request, self._answer(request), count).run()
        wishes = (request.headers.get("Connection") or "").lower()
        return reusable and "close" not in wishes and request.version == "HTTP/1.1"

    def _answer(self, request: Request) -> Answer:
        if self._guard is not None and request.path.startswith("/v2"):
            refusal = self._guard.refusal(request)
            if refusal is not None:
                return refusal
        for script in self._scripts:
            step = script.take(request)
            if step is not None:
                return perform(step, request, self.truth)
        return self.truth(request)


def _path_is(path: str) -> Callable[[Request], bool]:
    return lambda request: request.path == path
