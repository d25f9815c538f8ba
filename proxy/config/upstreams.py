"""What an operator decides of each registry: its section in the configuration."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from proxy.config.values import (
    Count,
    Duration,
    Endpoint,
    Glob,
    LocalPath,
    Network,
    PathPrefix,
    Period,
    ProxyAddress,
    Rate,
    Reserve,
    Section,
    TokenHost,
    UpstreamName,
    host_of,
)
from proxy.names import DOCKER_HUB, canonical_host, path_form


class Timeouts(Section):
    """Bounds on waiting for an upstream, in seconds; a text value is a duration."""

    connect: Duration = Field(default="5s", description="TCP, TLS and DNS of one connection")  # type: ignore[assignment]
    headers: Duration = Field(default="10s", description="the answer's headers")  # type: ignore[assignment]
    token: Duration = Field(default="5s", description="the token server, in all")  # type: ignore[assignment]
    head: Duration = Field(default="3s", description="asking an endpoint for the digest of a tag")  # type: ignore[assignment]
    endpoint: Duration = Field(  # type: ignore[assignment]
        default="3s", description="an endpoint that has others after it: to begin a blob, to give anything else"
    )
    progress: Duration = Field(  # type: ignore[assignment]
        default="30s", description="a download that brings under 10 KiB in this time is continued elsewhere"
    )


class AccessConfig(Section):
    """Who may read what comes from an upstream. A text stands for ``mode`` alone."""

    mode: Literal["public", "verify", "shared"] = "public"
    public_for: Period = Field(default="24h", description="how long a repository stays proved public")  # type: ignore[assignment]
    max_age: Period = Field(default="5m", description="how long the registry's yes to a credential holds")  # type: ignore[assignment]
    stale_for: Period = Field(  # type: ignore[assignment]
        default="24h", description="how much longer it holds while the registry cannot be asked"
    )
    repositories: list[Glob] = Field(default_factory=list, description="shared: these alone, as globs; others are public")
    i_understand_this_is_shared: bool = False

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"mode": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mode != "shared" and (self.repositories or self.i_understand_this_is_shared):
            raise ValueError("repositories and iUnderstandThisIsShared belong to mode: shared")
        return self


class UpstreamConfig(Section):
    """A registry that is cached."""

    name: UpstreamName = Field(examples=["name: docker.io"])
    path_prefix: PathPrefix | None = None
    endpoints: list[Endpoint] = Field(default_factory=list)
    ca_file: LocalPath | None = None
    client_cert_file: LocalPath | None = None
    client_key_file: LocalPath | None = None
    http_proxy: ProxyAddress | None = None
    insecure_skip_verify: bool = False
    token_hosts: list[TokenHost] = Field(default_factory=list)
    allow_addresses: list[Network] = Field(default_factory=list)
    access: AccessConfig | None = None
    max_concurrent_fetches: Count = Field(default=16, description="blobs that are fetched at once; others wait")
    requests_per_second: Rate | None = Field(default=None, description="others wait; None: no limit")
    request_burst: Count | None = Field(default=None, description="so many at once after a pause; None: twice the rate")
    timeouts: Timeouts = Timeouts()
    rate_limit_reserve: Reserve = Field(default=0, description="pulls left, below which held tags past maxAge are served")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """What the name alone implies: the endpoint."""
        if not isinstance(data, dict) or not isinstance(name := data.get("name"), str):
            return data
        endpoint, _ = PUBLIC_REGISTRIES.get(canonical_host(name), (f"https://{name}", []))
        return {"endpoints": [endpoint]} | data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.endpoints:
            raise ValueError("endpoints: at least one is needed")
        if len(set(self.endpoints)) < len(self.endpoints):
            raise ValueError("endpoints: one is listed twice")
        for endpoint in self.endpoints:
            host = urlsplit(endpoint).hostname or ""
            try:
                meant = [ipaddress.ip_address(each) for each in _addresses_of(host)]
            except ValueError:
                continue
            if not any(each.is_global or any(each in network for network in self.allow_addresses) for each in meant):
                raise ValueError(
                    f"endpoints: {host} is not a public address; if you mean it, list it: allowAddresses: [{meant[0]}/"
                    f"{meant[0].max_prefixlen}]"
                )
        if self.client_key_file and not self.client_cert_file:
            raise ValueError("clientKeyFile: without clientCertFile it is a key to nothing; give both")
        if self.insecure_skip_verify and self.ca_file:
            raise ValueError("insecureSkipVerify and caFile exclude each other; keep caFile")
        return self

    def token_hosts_of(self, endpoint: str) -> list[str]:
        """Token servers that an endpoint may name beside its own origin; a registry's known one is not lent to others."""
        known, token_hosts = PUBLIC_REGISTRIES.get(self.name, ("", []))
        return self.token_hosts + (token_hosts if endpoint == known else [])

    @property
    def hosts(self) -> list[str]:
        """What credentials for it are known by: the registry by its name, a mirror by its own host."""
        return [self.name, *(host_of(endpoint) for endpoint in self.endpoints[:-1])]

    @property
    def tls_files(self) -> list[Path]:
        """The certificates and keys that it is spoken to with."""
        return [path for path in (self.ca_file, self.client_cert_file, self.client_key_file) if path is not None]

    @property
    def key(self) -> str:
        """What the cache knows it by: another registry under the same name inherits nothing from the one before."""
        known, _ = PUBLIC_REGISTRIES.get(self.name, (f"https://{self.name}", []))
        return self.name if self.endpoints[-1] == known else f"{self.name} {self.endpoints[-1]}"

    @property
    def prefix(self) -> str:
        """The first component of paths that mean this upstream."""
        return self.path_prefix or path_form(self.name)


def _addresses_of(host: str) -> tuple[str, ...]:
    """What a host is known to mean without asking a resolver."""
    return ("127.0.0.1", "::1") if host.rpartition(".")[2] == "localhost" else (host,)


PUBLIC_REGISTRIES: dict[str, tuple[str, list[str]]] = {
    DOCKER_HUB: ("https://registry-1.docker.io", ["auth.docker.io"]),
    "ghcr.io": ("https://ghcr.io", []),
    "quay.io": ("https://quay.io", []),
    "registry.k8s.io": ("https://registry.k8s.io", []),
    "gcr.io": ("https://gcr.io", []),
    "mcr.microsoft.com": ("https://mcr.microsoft.com", []),
    "public.ecr.aws": ("https://public.ecr.aws", []),
}
"""Name -> (endpoint, token hosts other than the endpoint's own)."""
