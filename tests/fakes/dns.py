"""A DNS server on loopback whose answers are scripted, and the means to make a process ask it."""

from __future__ import annotations

import asyncio
import ipaddress
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from .waiting import PATIENCE, Signal

Failure = Literal["NXDOMAIN", "SERVFAIL", "TIMEOUT"]
DnsAnswer = Sequence[str] | Failure
"""Addresses of either family, or the way in which there are none."""

TYPES = {1: "A", 28: "AAAA"}
_RCODES = {"NXDOMAIN": 3, "SERVFAIL": 2}
_POINTER_TO_QUESTION = 0xC00C
_IN = 1


@dataclass(frozen=True)
class Query:
    """One question: a name in lower case without its final dot, and A, AAAA or TYPEn."""

    name: str
    type: str


class ScriptedDNS(asyncio.DatagramProtocol):
    """Answers A and AAAA by script with TTL 0, NXDOMAIN for unknown names, nothing for other types.

    Each type of question moves through the script of a name by itself, as resolvers ask for both at once.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.address = host
        self.port = port
        self.queries: list[Query] = []
        self._scripts: dict[str, tuple[DnsAnswer, ...]] = {}
        self._taken: Counter[Query] = Counter()
        self._signal = Signal()
        self._transport: asyncio.DatagramTransport | None = None
        self._closed = asyncio.Event()

    def script(self, name: str, *answers: DnsAnswer) -> None:
        """Answer questions about a name with these in turn, the last one for ever."""
        name = _normal(name)
        self._scripts[name] = answers
        for kind in TYPES.values():
            self._taken.pop(Query(name, kind), None)

    def seen(self, name: str | None = None, kind: str | None = None) -> list[Query]:
        """The questions so far, by name and type."""
        wanted = None if name is None else _normal(name)
        return [q for q in self.queries if wanted in (None, q.name) and kind in (None, q.type)]

    async def wait_for(self, condition: Callable[[], object], within: float = PATIENCE) -> None:
        """Wait until a condition about this server holds; looked at again after each question."""
        await self._signal.wait_for(condition, within)

    async def __aenter__(self) -> ScriptedDNS:
        loop = asyncio.get_running_loop()
        await loop.create_datagram_endpoint(lambda: self, local_addr=(self.address, self.port))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._transport is not None:
            self._transport.abort()
            await self._closed.wait()

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport
        self.port = transport.get_extra_info("sockname")[1]

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed.set()

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        parsed = _parse(data)
        if parsed is None or self._transport is None:
            return
        query, question = parsed
        self.queries.append(query)
        reply = self._reply(data[:2], data[2] & 1, query, question)
        if reply is not None:
            self._transport.sendto(reply, addr)
        self._signal.notify()

    def _reply(self, identity: bytes, recursion: int, query: Query, question: bytes) -> bytes | None:
        answer = self._next(query)
        if answer == "TIMEOUT":
            return None
        rcode, records = 0, []
        if isinstance(answer, str):
            rcode = _RCODES[answer]
        else:
            family = {"A": 4, "AAAA": 6}.get(query.type)
            addresses = [ipaddress.ip_address(text) for text in answer]
            records = [address.packed for address in addresses if address.version == family]
        kind = int.from_bytes(question[-4:-2], "big")
        header = identity + struct.pack(">BBHHHH", 0x84 | recursion, 0x80 | rcode, 1, len(records), 0, 0)
        body = [struct.pack(">HHHIH", _POINTER_TO_QUESTION, kind, _IN, 0, len(packed)) + packed for packed in records]
        return header + question + b"".join(body)

    def _next(self, query: Query) -> DnsAnswer:
        script = self._scripts.get(query.name)
        if script is None:
            return "NXDOMAIN"
        if query.type not in TYPES.values():
            return ()
        position = self._taken[query]
        self._taken[query] += 1
        return script[min(position, len(script) - 1)] if script else ()


def _normal(name: str) -> str:
    return name.rstrip(".").lower()


def _parse(data: bytes) -> tuple[Query, bytes] | None:
    """The single question in a packet, parsed and as it stands there."""
    if len(data) < 17 or data[2] & 0x80 or data[4:6] != b"\x00\x01":
        return None
    labels, at = [], 12
    while at < len(data) and (size := data[at]):
        if size > 63:
            return None
        labels.append(data[at + 1 : at + 1 + size].decode("latin-1"))
        at += 1 + size
    question = data[12 : at + 5]
    if len(question) != at - 7:
        return None
    kind = int.from_bytes(question[-4:-2], "big")
    return Query(_normal(".".join(labels)), TYPES.get(kind, f"TYPE{kind}")), question


def write_resolv_conf(path: Path, address: str) -> Path:
    """A resolver configuration that names one server, on port 53, and gives up on it soon."""
    path.write_text(f"nameserver {address}\noptions timeout:1 attempts:2\n")
    return path


def with_resolver(argv: Sequence[str], resolv_conf: Path) -> list[str]:
    """A command line that runs another one, in the same process, under its own /etc/resolv.conf.

    It needs root and Linux. The hosts file and nsswitch.conf of the machine stay in force.
    """
    script = 'mount --bind "$1" /etc/resolv.conf && shift && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "with-resolver", str(resolv_conf.resolve()), *argv]
