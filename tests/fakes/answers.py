"""The vocabulary of scripts: whole answers, modifiers of the true answer, and their composition.

A step is an `Answer`, a function from a request to an `Answer`, or a `Modifier`, which changes what the
registry would have answered by itself. `compose` puts steps together; later ones see what earlier ones made.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any, TypeAlias

from .messages import (
    BEFORE_HEADERS,
    Answer,
    Cut,
    Ending,
    Fault,
    Framing,
    Gate,
    Headers,
    Pace,
    Pairs,
    Request,
    Responder,
)


@dataclass(frozen=True)
class Modifier:
    """A change to what another responder would answer."""

    change: Callable[[Request, Responder], Answer]


Step: TypeAlias = Answer | Callable[[Request], Answer] | Modifier


def perform(step: Step, request: Request, default: Responder) -> Answer:
    """The answer a step gives to a request, where `default` is the undisturbed answer."""
    if isinstance(step, Answer):
        return step
    if isinstance(step, Modifier):
        return step.change(request, default)
    return step(request)


def compose(*steps: Step) -> Modifier:
    """All the steps in one, each applied to the outcome of those before it."""

    def change(request: Request, default: Responder) -> Answer:
        responder = default
        for step in steps:
            responder = _after(step, responder)
        return responder(request)

    return Modifier(change)


def _after(step: Step, inner: Responder) -> Responder:
    return lambda request: perform(step, request, inner)


def modifier(rewrite: Callable[[Answer], Answer]) -> Modifier:
    """A modifier that needs to see only the undisturbed answer."""
    return Modifier(lambda request, default: rewrite(default(request)))


# --- faults of the connection ---


def _striking(fault: Fault) -> Modifier:
    return modifier(lambda answer: replace(answer, faults=(*answer.faults, fault)))


def cut(after: int, how: Ending = "fin") -> Modifier:
    """The response ends after this many body bytes; nothing happens when the body is shorter.

    Cut at exactly the length of a chunked body, it lacks only the final chunk.
    """
    return _striking(Cut(after, how))


def before_headers(how: Ending = "fin") -> Modifier:
    """The connection ends, or falls silent, before any byte of the response."""
    return cut(BEFORE_HEADERS, how)


def gate(event: asyncio.Event, after: int = BEFORE_HEADERS) -> Modifier:
    """The response is held after this many body bytes until the event is set."""
    return _striking(Gate(after, event))


def slow(bytes_per_second: int) -> Modifier:
    """The body trickles."""
    return _striking(Pace(bytes_per_second))


# --- damage to the body ---


def swap_body(data: bytes) -> Modifier:
    """Other bytes under the true headers, honestly measured."""
    return modifier(lambda answer: replace(answer, body=data))


def flip_bit(at: int) -> Modifier:
    """The lowest bit of body byte `at` is inverted; a negative position counts from the end."""

    def rewrite(answer: Answer) -> Answer:
        damaged = bytearray(answer.payload)
        damaged[at] ^= 1
        return replace(answer, body=bytes(damaged))

    return modifier(rewrite)


def extra_bytes(data: bytes) -> Modifier:
    """The body goes on after its end, honestly measured."""
    return modifier(lambda answer: replace(answer, body=answer.payload + data))


def drop_last(count: int) -> Modifier:
    """The body lacks its end, honestly measured, so that the response looks complete."""

    def rewrite(answer: Answer) -> Answer:
        return replace(answer, body=answer.payload[: max(len(answer.payload) - count, 0)])

    return modifier(rewrite)


# --- framing ---


def chunked(size: int = 16384) -> Modifier:
    """Chunked transfer coding instead of a Content-Length."""
    return modifier(lambda answer: replace(answer, framing="chunked", chunk_size=size))


def close_delimited() -> Modifier:
    """Neither Content-Length nor chunks: the body ends with the connection."""
    return modifier(lambda answer: replace(answer, framing="close"))


def claim_length(length: int) -> Modifier:
    """A Content-Length that does not fit; the connection closes if the claim is more than there is."""
    return modifier(lambda answer: replace(answer, framing="length", content_length=length))


# --- ranges ---

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


def ignore_range() -> Modifier:
    """The whole body with status 200, though a part was asked for."""
    return Modifier(lambda request, default: default(request.having(Range=None)))


def wrong_range(offset: int, *, admitted: bool = True) -> Modifier:
    """A 206 with the bytes of another range; if not admitted, labelled as the one that was asked for."""

    def change(request: Request, default: Responder) -> Answer:
        asked = _RANGE.fullmatch(request.headers.get("Range") or "")
        if asked is None:
            return default(request)
        first = max(int(asked[1]) + offset, 0)
        last = str(max(int(asked[2]) + offset, first)) if asked[2] else ""
        answer = default(request.having(Range=f"bytes={first}-{last}"))
        label = default(request).headers.get("Content-Range")
        if admitted or label is None:
            return answer
        return replace(answer, headers=_set(answer.headers, [("Content-Range", label)]))

    return Modifier(change)


def changed_total(delta: int) -> Modifier:
    """The total in Content-Range is off by this much, where there is one."""

    def rewrite(answer: Answer) -> Answer:
        stated = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range") or "")
        if stated is None:
            return answer
        lie = f"bytes {stated[1]}-{stated[2]}/{int(stated[3]) + delta}"
        return replace(answer, headers=_set(answer.headers, [("Content-Range", lie)]))

    return modifier(rewrite)


# --- headers ---


def _set(headers: Headers, pairs: Sequence[tuple[str, str]]) -> Headers:
    return headers.without(*(name for name, _ in pairs)).plus(pairs)


def with_headers(fields: Mapping[str, str] | Pairs) -> Modifier:
    """These fields instead of any of the same names; pairs may repeat a name.

    The fields of the framing are not replaced but repeated.
    """
    pairs = list(fields.items()) if isinstance(fields, Mapping) else list(fields)
    return modifier(lambda answer: replace(answer, headers=_set(answer.headers, pairs)))


def without_headers(*names: str) -> Modifier:
    """The answer lacks these fields."""
    return modifier(lambda answer: replace(answer, headers=answer.headers.without(*names)))


# --- whole answers ---


def status(
    code: int, body: bytes = b"", content_type: str = "text/plain", headers: Mapping[str, str] | Pairs = ()
) -> Answer:
    """Any status with any body."""
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    return Answer(code, Headers([("Content-Type", content_type), *pairs]), body)


def as_json(value: Any, code: int = 200, headers: Pairs = ()) -> Answer:
    """A JSON document."""
    return status(code, json.dumps(value).encode(), "application/json", headers)


def oci_error(code: int, error: str, message: str = "", headers: Pairs = ()) -> Answer:
    """An error in the form the distribution specification prescribes."""
    text = message or HTTPStatus(code).phrase.lower()
    return as_json({"errors": [{"code": error, "message": text, "detail": None}]}, code, headers)


def redirect(location: str, code: int = 307) -> Answer:
    """A redirect to any location."""
    return status(code, headers={"Location": location})


def unauthorized(www_authenticate: Sequence[str]) -> Answer:
    """A 401 with one WWW-Authenticate line per challenge."""
    challenges = [("WWW-Authenticate", challenge) for challenge in www_authenticate]
    return oci_error(401, "UNAUTHORIZED", "authentication required", challenges)


def too_many_requests(retry_after: int | str | None = None, *, plain: bool = False) -> Answer:
    """A 429 as of a registry's rate limit, or in plain text as of an abuse limiter in front of it."""
    headers = [] if retry_after is None else [("Retry-After", str(retry_after))]
    if plain:
        return status(429, b"Too Many Requests\n", headers=headers)
    return oci_error(429, "TOOMANYREQUESTS", "You have reached your pull rate limit.", headers)


def endless(content_type: str = "application/octet-stream", *, framing: Framing = "chunked") -> Answer:
    """Zeros at full speed until the client leaves."""

    async def zeros() -> AsyncIterator[bytes]:
        block = bytes(65536)
        while True:
            yield block

    length = 1 << 62 if framing == "length" else None
    headers = Headers([("Content-Type", content_type)])
    return Answer(headers=headers, body=zeros, framing=framing, content_length=length, chunk_size=65536)


def raw(data: bytes, how: Ending = "fin") -> Answer:
    """Exactly these bytes in place of a response, and then the end of the connection."""
    return Answer(verbatim=data, faults=(Cut(0, how),))
