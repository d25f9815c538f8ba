"""The kinds of values that a configuration holds: each knows how it is written, and says so where it is not."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict
from pydantic.alias_generators import to_camel

from proxy.names import canonical_host, is_host, is_host_like

_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h))+", re.ASCII)
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)", re.ASCII)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"(\d+)(|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)", re.ASCII)
_UNITS = {unit: 1000**n for n, unit in enumerate(["", "k", "M", "G", "T", "P"])} | {
    unit: 1024**n for n, unit in enumerate(["Ki", "Mi", "Gi", "Ti", "Pi"], start=1)
}


def parse_duration(value: object) -> object:
    """Seconds of a duration such as ``10s``, ``1m30s`` or ``250ms`` (Go's ``time.ParseDuration``)."""
    if isinstance(value, str) and _DURATION.fullmatch(value):
        return sum(float(number) * _SECONDS[unit] for number, unit in _DURATION_PART.findall(value))
    raise ValueError("not a duration; write for example 10s, 250ms or 1m30s")


def write_duration(seconds: float) -> str:
    """A duration as ``parse_duration`` takes it, in the largest unit of which it is a whole number."""
    for unit in ("h", "m"):
        if seconds and seconds % _SECONDS[unit] == 0:
            return f"{seconds / _SECONDS[unit]:.10g}{unit}"
    return f"{seconds:.10g}s"


def _at_most(most: float, why: str = "", *, or_none: bool = False) -> Callable[[float], float]:
    def check(value: float) -> float:
        if not value and not or_none:
            raise ValueError("more than 0s is needed")
        if value > most:
            raise ValueError(f"at most {write_duration(most)}{why}")
        return value

    return check


def parse_quantity(value: object) -> object:
    """Bytes of a quantity such as ``50Gi`` or ``500M`` (Kubernetes ``resource.Quantity``, whole numbers)."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("not a quantity; write for example 50Gi or 500M")
    return int(match[1]) * _UNITS[match[2]]


def parse_min_free(value: object) -> object:
    """What is left free of a disk: bytes of a quantity, or a part of it below 1, written as a percentage such as ``5%``."""
    percent = re.fullmatch(r"(\d{1,2}(?:\.\d{1,2})?)%", value) if isinstance(value, str) else None
    if percent is not None:
        return float(percent[1]) / 100
    try:
        return parse_quantity(value)
    except ValueError:
        raise ValueError("neither a percentage below 100 nor a quantity; write for example 5% or 10Gi") from None


@dataclass(frozen=True, slots=True)
class Address:
    """Where a listener is bound. An empty host is every interface."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def overlaps(self, other: Address) -> bool:
        """Whether both cannot be listened on: one port, and one host or every host."""
        every = ("", "0.0.0.0", "::")  # noqa: S104 - told apart, not bound
        hosts = (self.host, other.host)
        return self.port == other.port != 0 and (self.host == other.host or any(host in every for host in hosts))


def parse_address(value: object) -> object:
    """The address of a listener: ``host:port``, ``[ipv6]:port`` or ``:port``."""
    if isinstance(value, Address):
        return value
    host, colon, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535 or (":" in bare and bare == host):
        raise ValueError("not an address; write for example 127.0.0.1:5000, [::1]:5000 or :5000")
    return Address(bare, int(port))


def _endpoint(value: str) -> str:
    try:
        url = urlsplit(value)  # which drops line breaks without a word
        port_is_valid = value.isprintable() and (url.port is None or 0 < url.port < 65536)
    except ValueError:
        port_is_valid = False
    if not port_is_valid or url.scheme not in ("http", "https") or not is_host(url.netloc.rpartition("@")[2]):
        raise ValueError("not an endpoint; write for example https://registry-1.docker.io")
    if url.username is not None or url.password is not None or url.query or url.fragment:
        raise ValueError("an endpoint is scheme, host, port and path only: no credentials, no query")
    if url.path.rstrip("/").endswith("/v2"):
        raise ValueError("leave out /v2, which is added: a path P is asked as /P/v2/NAME")
    return value.rstrip("/")


def host_of(endpoint: str) -> str:
    """The host of an endpoint, with its port where that is not the scheme's own."""
    url = urlsplit(endpoint)
    host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname or ""
    return f"{host}:{url.port}" if url.port not in (None, {"http": 80, "https": 443}[url.scheme]) else host


def _proxy_address(value: str) -> str:
    try:
        url = urlsplit(value)
        port_is_valid = value.isprintable() and (url.port is None or 0 < url.port < 65536)
    except ValueError:
        port_is_valid = False
    if not port_is_valid or url.scheme != "http" or not is_host(url.netloc.rpartition("@")[2]):
        raise ValueError(
            "not the address of an HTTP proxy; write for example http://proxy.corp:3128 (it is spoken to in http)"
        )
    if ":" in unquote(url.username or ""):
        raise ValueError("the user of a proxy cannot have a ':' in it")
    if url.path not in ("", "/") or url.query or url.fragment:
        raise ValueError("the address of a proxy is scheme, host and port only, and user:password@ before the host")
    return value


def _upstream_name(value: str) -> str:
    if not is_host(value) or not is_host_like(value) or value != value.lower():
        raise ValueError(
            "not a registry host; write the name as images have it, in lower case and without _, for example ghcr.io or "
            "registry.corp:5000"
        )
    return canonical_host(value)


def _token_host(value: str) -> str:
    if not is_host(value):
        raise ValueError("not a host; write for example auth.corp or auth.corp:5001, without a scheme")
    return value.lower()


def _not_empty(value: object) -> object:
    if value == "":  # of which Path makes ".", the working directory
        raise ValueError("an empty path; is a variable in it empty?")
    return value


def _absolute(value: Path) -> Path:
    return value.expanduser().absolute()


def _path_prefix(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", value, re.ASCII):
        raise ValueError("not a path prefix; one component of a-z 0-9 . _ -")
    return value


def parse_network(value: object) -> object:
    """A network in CIDR notation; one address is a network of its own."""
    try:
        return ipaddress.ip_network(str(value))
    except ValueError as error:
        raise ValueError(f"not a network; write for example 10.0.0.0/8 ({error})") from error


def _glob(value: str) -> str:
    rest = re.sub(r"\[!?\]?[^\]]*\]", "", value)  # as fnmatch reads a set: a ']' that is first in it is one of its own
    if not value or not value.isprintable() or "[" in rest:
        raise ValueError("not a glob; write for example docker.io/library/*, with a ']' for each '['")
    return value


def _external_url(value: str) -> str:
    try:
        value = _endpoint(value)
    except ValueError:
        raise ValueError("not an address of a registry; write for example https://cache.corp:5000") from None
    if urlsplit(value).path:
        raise ValueError("scheme, host and port only: clients ask a registry at the root of its host")
    return value


def parse_count(value: object) -> int:
    """How many of something; at least one. A text, too: that is what a variable of the environment is."""
    if (count := _whole(value)) is not None and count >= 1:
        return count
    raise ValueError("not a whole number of at least 1; write for example 4, or leave the key out")


def parse_reserve(value: object) -> int:
    """How many of something are kept; perhaps none."""
    if (count := _whole(value)) is not None:
        return count
    raise ValueError("not a whole number of at least 0; write for example 20, or leave the key out")


def _whole(value: object) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,15}", value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def parse_rate(value: object) -> object:
    """How many in a second."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,15})?", value):
        value = float(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf"):
        return value
    raise ValueError(
        "not a number of more than 0; write for example 10 or 0.5, or leave the key out: then there is no limit"
    )


class Section(BaseModel):
    """A part of the configuration: its keys are camelCase, no other is taken, and no error repeats a value."""

    model_config = ConfigDict(
        alias_generator=to_camel, extra="forbid", frozen=True, hide_input_in_errors=True, validate_default=True
    )


Count = Annotated[int, BeforeValidator(parse_count)]
Reserve = Annotated[int, BeforeValidator(parse_reserve)]
Rate = Annotated[float, BeforeValidator(parse_rate)]
Duration = Annotated[float, BeforeValidator(parse_duration), AfterValidator(_at_most(3600))]
QueueTimeout = Annotated[
    float,
    BeforeValidator(parse_duration),
    AfterValidator(_at_most(240, ": containerd gives up a pull in which nothing comes for 5 minutes")),
]
Period = Annotated[
    float, BeforeValidator(parse_duration), AfterValidator(_at_most(30 * 24 * 3600, " (30 days)", or_none=True))
]
Glob = Annotated[str, AfterValidator(_glob)]
ExternalURL = Annotated[str, AfterValidator(_external_url)]
Quantity = Annotated[int, BeforeValidator(parse_quantity)]
MinFree = Annotated[float, BeforeValidator(parse_min_free)]
TokenHost = Annotated[str, AfterValidator(_token_host)]
Listener = Annotated[Address, BeforeValidator(parse_address)]
Endpoint = Annotated[str, AfterValidator(_endpoint)]
AnyNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
Network = Annotated[AnyNetwork, BeforeValidator(parse_network)]
ProxyAddress = Annotated[str, AfterValidator(_proxy_address)]
UpstreamName = Annotated[str, AfterValidator(_upstream_name)]
PathPrefix = Annotated[str, AfterValidator(_path_prefix)]
LocalPath = Annotated[Path, BeforeValidator(_not_empty), AfterValidator(_absolute)]
