"""Where an upstream may connect to (T05, T06): public addresses and what is listed, however an address is written."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.addresses import AddressInfo, AddressRefused, Network, effective, is_allowed, socket_factory
from proxy.upstream.resolver import Resolver

PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "93.184.216.34",
    "2606:4700::1111",
    "2a00:1450:4001::1",
    "172.32.0.1",
    "11.0.0.1",
    "100.128.0.1",
]
PRIVATE_4 = [
    *(
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "10.255.255.255",
        "100.64.0.1",
        "127.0.0.1",
        "127.255.0.1",
        "169.254.169.254",
        "172.16.0.1",
    ),
    *("172.31.255.255", "192.0.0.1", "192.0.2.1", "192.168.0.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1"),
    *("239.255.255.255", "240.0.0.1", "255.255.255.255"),
]
PRIVATE_6 = [
    *(
        "::",
        "::1",
        "::127.0.0.1",
        "fe80::1",
        "fc00::1",
        "fd00:ec2::254",
        "ff02::1",
        "ff0e::1",
        "2001:db8::1",
        "100::1",
        "fec0::1",
    ),
    *("64:ff9b:1::a00:1", "2001:2::1", "4000::1"),
]


def mapped(address: str) -> str:
    return f"::ffff:{address}"


def six_to_four(address: str) -> str:
    return str(ipaddress.IPv6Address((0x2002 << 112) | (int(ipaddress.IPv4Address(address)) << 80) | 1))


def teredo(address: str) -> str:
    return str(
        ipaddress.IPv6Address(
            (0x20010000 << 96)
            | (int(ipaddress.IPv4Address("8.8.8.8")) << 64)
            | (int(ipaddress.IPv4Address(address)) ^ 0xFFFFFFFF)
        )
    )


def nat64(address: str) -> str:
    return str(ipaddress.IPv6Address((0x64FF9B << 96) | int(ipaddress.IPv4Address(address))))


WAYS = [mapped, six_to_four, teredo, nat64]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str) -> None:
    assert is_allowed(ipaddress.ip_address(address), [])


def test_a_public_address_behind_nat64_is_allowed() -> None:
    """What DNS64 answers in a network that has IPv6 only: without it no public registry could be reached there."""
    assert is_allowed(ipaddress.ip_address(nat64("8.8.8.8")), [])


@pytest.mark.parametrize("address", [*PRIVATE_4, *PRIVATE_6])
def test_no_other_address_is(address: str) -> None:
    assert not is_allowed(ipaddress.ip_address(address), [])


@pytest.mark.parametrize("way", WAYS, ids=lambda way: str(way.__name__))
@pytest.mark.parametrize("address", PRIVATE_4)
def test_a_private_address_inside_an_ipv6_address_is_seen(way: Callable[[str], str], address: str) -> None:
    inside = ipaddress.ip_address(way(address))
    assert effective(inside) == ipaddress.ip_address(address)
    assert not is_allowed(inside, [])


@pytest.mark.parametrize(
    ("address", "networks"),
    [
        ("10.0.0.1", ["10.0.0.0/8"]),
        ("10.0.0.1", ["192.168.0.0/16", "10.0.0.1/32"]),
        ("127.0.0.1", ["127.0.0.0/8"]),
        ("fd00::1", ["fd00::/8"]),
        ("fe80::1", ["fe80::/10"]),
        (mapped("10.0.0.1"), ["10.0.0.0/8"]),
        (nat64("10.0.0.1"), ["10.0.0.0/8"]),
        ("8.8.8.8", ["10.0.0.0/8"]),
    ],
)
def test_what_is_listed_is_allowed(address: str, networks: list[str]) -> None:
    assert is_allowed(ipaddress.ip_address(address), [ipaddress.ip_network(network) for network in networks])


@pytest.mark.parametrize(
    ("address", "networks"),
    [
        ("10.0.0.2", ["10.0.0.1/32"]),
        ("11.0.0.0", []),
        ("127.0.0.1", ["10.0.0.0/8", "::/0"]),
        ("::1", ["0.0.0.0/0"]),
        (mapped("127.0.0.1"), ["10.0.0.0/8"]),
        ("169.254.169.254", ["10.0.0.0/8"]),
    ],
)
def test_a_list_allows_no_more_than_it_says(address: str, networks: list[str]) -> None:
    allowed: list[Network] = [ipaddress.ip_network(network) for network in networks]
    expected = address == "11.0.0.0"
    assert is_allowed(ipaddress.ip_address(address), allowed) is expected


@given(st.ip_addresses(v=4) | st.ip_addresses(v=6))
def test_nothing_is_allowed_that_python_calls_private(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    real = effective(address)
    if is_allowed(address, []):
        assert real.is_global
        assert not (real.is_private)
        assert not (real.is_loopback)
        assert not (real.is_link_local)
        assert not (real.is_multicast)
        assert not (real.is_unspecified)
        assert not (real.is_reserved)
    everything: list[Network] = [ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0")]
    assert is_allowed(address, everything)


def info(address: str, family: socket.AddressFamily = socket.AF_INET) -> AddressInfo:
    target = (address, 443) if family is socket.AF_INET else (address, 443, 0, 0)
    return (family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", target)


def test_a_refused_address_gets_no_socket_and_is_counted() -> None:
    refused: list[int] = []
    make = socket_factory([], lambda: refused.append(1))
    hint = "{} is not a public address; if you mean it, list it: allowAddresses: [{}]"
    for address in ("127.0.0.1", "10.0.0.1"):
        with pytest.raises(AddressRefused) as said:
            make(info(address))
        assert str(said.value) == hint.format(address, f"{address}/32")
    with pytest.raises(AddressRefused) as said:
        make(info("fe80::1%eth0", socket.AF_INET6))
    assert str(said.value) == hint.format("fe80::1", "fe80::1/128")
    assert len(refused) == 3


def test_an_allowed_address_gets_a_socket_that_does_not_block() -> None:
    refused: list[int] = []
    made = socket_factory([ipaddress.ip_network("10.0.0.0/8")], lambda: refused.append(1))(info("10.0.0.1"))
    with made:
        assert not made.getblocking()
    assert not refused


@pytest.mark.parametrize("spelling", ["2130706433", "0x7f000001", "127.1", "0177.0.0.1", "0x7f.1", "127.0.0.1", "localhost"])
async def test_no_odd_spelling_of_loopback_leads_there(spelling: str) -> None:
    resolver = Resolver(10)
    found = await resolver.resolve(spelling, 443)
    await resolver.close()
    assert found
    for result in found:
        assert not is_allowed(ipaddress.ip_address(result["host"].partition("%")[0]), [])
        with pytest.raises(AddressRefused):
            socket_factory([], lambda: None)(info(result["host"]))
