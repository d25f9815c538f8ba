"""What travels between a client and the scripted registry: headers, requests, answers and their faults."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal
from urllib.parse import parse_qs

Framing = Literal["length", "chunked", "close"]
Ending = Literal["fin", "rst", "stall"]
BodySource = Callable[[], AsyncIterator[bytes]]
Pairs = Iterable[tuple[str, str]]

BEFORE_HEADERS = -1
"""The position of a fault that strikes before the first byte of the response."""


class Headers(tuple[tuple[str, str], ...]):
    """Header fields in wire order, duplicates kept; names are looked up without regard to case."""

    __slots__ = ()

    def get(self, name: str, default: str | None = None) -> str | None:
        """The first value of a field."""
        return next(iter(self.getall(name)), default)

    def getall(self, name: str) -> list[str]:
        """Every value of a field, in order."""
        return [value for key, value in self if key.lower() == name.lower()]

    def has(self, name: str) -> bool:
        """Whether the field occurs at all."""
        return bool(self.getall(name))

    def without(self, *names: str) -> Headers:
        """A copy that lacks these fields."""
        dropped = {name.lower() for name in names}
        return Headers(pair for pair in self if pair[0].lower() not in dropped)

    def plus(self, pairs: Pairs) -> Headers:
        """A copy with more fields at the end, whether or not they repeat earlier ones."""
        return Headers((*self, *pairs))


@dataclass(frozen=True)
class Request:
    """One request as it arrived; `raw` is every byte of its head and body."""

    method: str
    target: str
    headers: Headers
    body: bytes = b""
    version: str = "HTTP/1.1"
    connection_id: int = 0
    raw: bytes = b""

    @property
    def path(self) -> str:
        """The target up to the question mark, percent-encoding untouched."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        """The target after the question mark, undecoded."""
        return self.target.partition("?")[2]

    @property
    def params(self) -> dict[str, list[str]]:
        """The decoded query parameters."""
        return parse_qs(self.query, keep_blank_values=True)

    def having(self, **headers: str | None) -> Request:
        """The same request with header fields set, or dropped where None (underscores stand for dashes)."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        kept = self.headers.without(*names)
        return replace(self, headers=kept.plus((k, v) for k, v in names.items() if v is not None))


@dataclass(frozen=True)
class Cut:
    """The response ends right after body byte `at`, in the given way."""

    at: int
    how: Ending


@dataclass(frozen=True)
class Gate:
    """The response is held after body byte `at` until the event is set."""

    at: int
    event: asyncio.Event


@dataclass(frozen=True)
class Pace:
    """The body is not sent faster than this."""

    bytes_per_second: int


Fault = Cut | Gate | Pace


@dataclass(frozen=True)
class Answer:
    """A response to put on the wire, true or false in any part.

    The framing adds its own field (Content-Length, Transfer-Encoding or Connection: close) after `headers`.
    `content_length` is a lie told instead of the true length. `verbatim` replaces head and body altogether.
    """

    status: int = 200
    headers: Headers = field(default_factory=Headers)
    body: bytes | BodySource = b""
    framing: Framing = "length"
    content_length: int | None = None
    faults: tuple[Fault, ...] = ()
    chunk_size: int = 16384
    verbatim: bytes | None = None

    @property
    def payload(self) -> bytes:
        """The body, for modifiers that rewrite it; streamed bodies cannot be rewritten."""
        if isinstance(self.body, bytes):
            return self.body
        raise TypeError("a streamed body cannot be rewritten")


Responder = Callable[[Request], Answer]
"""What would answer a request if nothing interfered."""
