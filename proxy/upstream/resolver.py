"""Names to addresses, by the system's resolver; what was right lately still counts while the resolver fails (F36)."""

from __future__ import annotations

import asyncio
import socket

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from cachetools import TTLCache

_LAST_GOOD = 3600.0


class Resolver(AbstractResolver):
    """The system's resolver, with a memory of the last good answers for an hour."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._system = ThreadedResolver()
        self._good: TTLCache[tuple[str, int, int], list[ResolveResult]] = TTLCache(1024, _LAST_GOOD)

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        """The addresses of ``host``; raises ``OSError``."""
        key = (host, port, int(family))
        try:
            async with asyncio.timeout(self._patience):
                addresses = await self._system.resolve(host, port, family)
        except OSError as error:  # TimeoutError is one
            if (good := self._good.get(key)) is not None:
                return good
            raise OSError(None, f"the name {host} cannot be resolved") from error
        self._good[key] = addresses
        return addresses

    async def close(self) -> None:
        """Nothing is held."""
        await self._system.close()
