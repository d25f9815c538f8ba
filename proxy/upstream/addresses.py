"""Where an upstream may connect to: public addresses, and what its ``allowAddresses`` lists.

Checked on the address of each new connection, after name resolution, so no name, redirect, realm or odd spelling of an
address leads inside (T05, T06).
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterable, Sequence

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class AddressRefused(OSError):
    """The address is not public, and not listed."""


def effective(address: Address) -> Address:
    """The IPv4 address that an IPv6 address leads to, if it is one of the kinds that do."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address.sixtofour is not None:
            return address.sixtofour
        if address.teredo is not None:
            return address.teredo[1]
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def is_allowed(address: Address, allowed: Iterable[Network]) -> bool:
    """Whether a connection to ``address`` may be made."""
    real = effective(address)
    if any(
        candidate in network for candidate in {address, real} for network in allowed if candidate.version == network.version
    ):
        return True
    judged = {real} if address in _NAT64 else {address, real}
    return all(_is_public(a) for a in judged)


def is_allowed_literal(host: str, allowed: Iterable[Network]) -> bool:
    """Whether a proxy may be asked to connect to ``host``, as far as its spelling tells: a name is the proxy's to judge."""
    host = host.rstrip(".")  # 127.0.0.1. is 127.0.0.1 for proxies that drop the dot, as Squid does
    if "%" in host and ":" not in host:  # what it spells depends on who decodes it; the other kind is an IPv6 zone
        return False
    try:
        return is_allowed(ipaddress.ip_address(host), allowed)
    except ValueError:
        pass
    try:
        return is_allowed(ipaddress.IPv4Address(socket.inet_aton(host)), allowed)  # 127.1, 0x7f000001, 2130706433
    except OSError:
        local = host.lower().rpartition(".")[2] == "localhost"
        return not local or is_allowed(ipaddress.IPv4Address("127.0.0.1"), allowed)


def _is_public(address: Address) -> bool:
    local = isinstance(address, ipaddress.IPv6Address) and address.is_site_local
    return address.is_global and not (address.is_multicast or address.is_reserved or local)


AddressInfo = tuple[int, int, int, str, tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]]


def socket_factory(allowed: Sequence[Network], refused: Callable[[], None]) -> Callable[[AddressInfo], socket.socket]:
    """Makes the sockets of one upstream; ``refused`` is called for each address that gets none."""

    def make(info: AddressInfo) -> socket.socket:
        family, kind, protocol, _, target = info
        address = ipaddress.ip_address(str(target[0]).partition("%")[0])
        if not is_allowed(address, allowed):
            refused()
            entry = f"{address}/{address.max_prefixlen}"
            raise AddressRefused(f"{address} is not a public address; if you mean it, list it: allowAddresses: [{entry}]")
        made = socket.socket(family, kind, protocol)
        made.setblocking(False)
        return made

    return make
