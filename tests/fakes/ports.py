"""Ports for the servers of tests: one that stops and starts again finds its own free, and who asks one that is gone meets no
other.

What the system calls a free port it gives to whoever connects next. These lie below those that it gives, and each process
of a test run has a share of them to itself, by a name among the abstract Unix sockets, which ends with the process.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import cache
from itertools import cycle, islice

_LOWEST, _SHARE, _SHARES = 10_000, 1_000, 22


def free_port(host: str = "127.0.0.1") -> int:
    """A port of an address of this machine that nobody uses; the one that was given longest ago."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in islice(_mine(), _SHARE):
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"all {_SHARE} ports of this process are in use")


@cache
def _mine() -> Iterator[int]:
    for share in range(_SHARES):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0pullcache-tests-{share}")
        except OSError:
            claim.close()
            continue
        _CLAIMS.append(claim)
        first = _LOWEST + share * _SHARE
        return cycle(range(first, first + _SHARE))
    raise RuntimeError(f"{_SHARES} test runs use this machine already")


_CLAIMS: list[socket.socket] = []
