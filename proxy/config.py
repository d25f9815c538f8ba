"""The configuration: one frozen model, read once, every fault named at once with its key path and a hint.

YAML with camelCase keys. In any text value ``${NAME}`` stands for an environment variable, and a key written with
``File`` at its end takes its value from that file. Sizes are Kubernetes quantities, times are durations.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import aiofiles
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from proxy.logs import LogFormat, LogLevel
from proxy.names import DOCKER_HUB, canonical_host, path_form
from proxy.values import (
    Address,
    Duration,
    Endpoint,
    Listener,
    LocalPath,
    Network,
    PathPrefix,
    ProxyAddress,
    Quantity,
    TokenHost,
    UpstreamName,
)


class ConfigError(Exception):
    """The configuration cannot be used. ``faults`` holds one line for each thing that is wrong."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class _Section(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel, extra="forbid", frozen=True, hide_input_in_errors=True, validate_default=True
    )


class Timeouts(_Section):
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


class UpstreamConfig(_Section):
    """A registry that is cached."""

    name: UpstreamName
    path_prefix: PathPrefix | None = None
    endpoints: list[Endpoint] = Field(default_factory=list)
    ca_file: LocalPath | None = None
    client_cert_file: LocalPath | None = None
    client_key_file: LocalPath | None = None
    http_proxy: ProxyAddress | None = None
    insecure_skip_verify: bool = False
    token_hosts: list[TokenHost] = Field(default_factory=list)
    allow_addresses: list[Network] = Field(default_factory=list)
    timeouts: Timeouts = Timeouts()

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
                address = ipaddress.ip_address(host)
            except ValueError:
                continue
            if not address.is_global and not any(address in network for network in self.allow_addresses):
                raise ValueError(
                    f"endpoints: {host} is not a public address; if you mean it, list it: allowAddresses: [{address}/"
                    f"{address.max_prefixlen}]"
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
    def prefix(self) -> str:
        """The first component of paths that mean this upstream."""
        return self.path_prefix or path_form(self.name)


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


def _default_directory() -> Path:
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "pullcache"
    return Path("~/.cache/pullcache").expanduser()


class CacheConfig(_Section):
    """Where content is kept."""

    directory: LocalPath = Field(default_factory=_default_directory)
    max_blob_size: Quantity = Field(default="128Gi", description="larger blobs are refused")  # type: ignore[assignment]


class LogConfig(_Section):
    """How log lines look."""

    format: LogFormat = "text"
    level: LogLevel = "info"


class Config(_Section):
    """Everything that an operator decides."""

    listen: Listener = Address("127.0.0.1", 5000)
    admin: Listener = Address("127.0.0.1", 5001)
    cache: CacheConfig = Field(default_factory=CacheConfig)
    default_upstream: str | None = None
    upstreams: list[UpstreamConfig] = Field(
        default_factory=lambda: [UpstreamConfig.model_validate({"name": name}) for name in PUBLIC_REGISTRIES], min_length=1
    )
    log: LogConfig = LogConfig()

    @property
    def default_name(self) -> str | None:
        """The upstream of names that do not say one: as configured, else Docker Hub if it is cached, else none."""
        if self.default_upstream is not None:
            return canonical_host(self.default_upstream)
        return DOCKER_HUB if any(upstream.name == DOCKER_HUB for upstream in self.upstreams) else None


def _models(model: type[BaseModel] = Config) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _models(part)


def keys() -> set[str]:
    """Every key of the configuration, as it is written."""
    return {field.alias or name for model in _models() for name, field in model.model_fields.items()}


async def load(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration in the file ``path``, with ``overrides`` over it; raises ``ConfigError`` with every fault found."""
    try:
        async with aiofiles.open(path, encoding="utf-8") as file:
            text = await file.read()
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from error
    faults: list[str] = []
    try:
        raw = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
        expanded = await _expand({} if raw is None else raw, "", faults)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError([f"{path}: not YAML: {' '.join(str(error).split())}"]) from error
    except RecursionError as error:
        raise ConfigError([f"{path}: nested too deep, or within itself"]) from error
    return validate(_merge(expanded, overrides or {}), faults)


def validate(raw: object, faults: list[str] | None = None) -> Config:
    """The configuration that ``raw`` (parsed YAML) holds; ``faults`` are those found before."""
    faults = [*(faults or []), *_clashes(raw)]
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        faults += [_explain(item) for item in error.errors(include_url=False, include_context=False, include_input=False)]
    if faults:
        raise ConfigError(faults)
    return config


def _clashes(raw: object) -> list[str]:
    """What is wrong between keys; looked for before each key is known to be right, so that no fault hides another."""
    given = raw if isinstance(raw, dict) else {}
    faults: list[str] = []
    listed = given.get("upstreams", [{"name": name} for name in PUBLIC_REGISTRIES])
    owner: dict[str, str] = {}
    for upstream in listed if isinstance(listed, list) else []:
        if not isinstance(upstream, dict) or not isinstance(name := upstream.get("name"), str):
            continue
        name = canonical_host(name)
        for form in {name, str(upstream.get("pathPrefix") or path_form(name))}:
            if form in owner:
                faults.append(f"upstreams: '{form}' means both {owner[form]} and {name}; change name or pathPrefix")
            owner[form] = name
    names = list(dict.fromkeys(owner.values()))
    default = given.get("defaultUpstream")
    if isinstance(default, str) and canonical_host(default) not in names:
        faults.append(f"defaultUpstream: '{default}' is not among the upstreams ({', '.join(names)})")
    admin = given.get("admin", "127.0.0.1:5001")
    if given.get("listen", "127.0.0.1:5000") == admin and not str(admin).endswith(":0"):
        faults.append("admin: the same address as listen; give it a port of its own")
    return faults


def _merge(under: object, over: Mapping[str, Any]) -> object:
    """``under`` with the keys of ``over``, level by level; what is not a mapping is left for validation to refuse."""
    if not isinstance(under, dict):
        return under
    merged = dict(under)
    for key, value in over.items():
        merged[key] = _merge(under.get(key, {}), value) if isinstance(value, Mapping) else value
    return merged


def _explain(item: Any) -> str:
    where = ""
    for part in item["loc"]:
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else str(part)
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(item["loc"][-1]), keys(), n=1)
        message = "unknown key" + (f"; did you mean '{near[0]}'?" if near else "")
    return f"{where}: {message}" if where else message


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: YAML would keep the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if not isinstance(key, Hashable):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: a key must be a text")
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: the key '{key}' stands twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


async def _expand(value: object, where: str, faults: list[str]) -> object:
    """``value`` with ``${NAME}`` and ``...File`` replaced by what they stand for."""
    if isinstance(value, list):
        return [await _expand(item, f"{where}[{index}]", faults) for index, item in enumerate(value)]
    if isinstance(value, dict):
        known = keys()
        result: dict[object, object] = {}
        for key, item in value.items():
            path = f"{where}.{key}" if where else str(key)
            item = await _expand(item, path, faults)
            if isinstance(key, str) and key.endswith("File") and key not in known and key[:-4] in known:
                if key[:-4] in value:
                    faults.append(f"{path}: stands beside '{key[:-4]}'; keep one of them")
                    continue
                key, item = key[:-4], await _read(item, path, faults)
            result[key] = item
        return result
    if isinstance(value, str):
        for name in _VARIABLE.findall(value):
            if name not in os.environ:
                faults.append(f"{where}: the environment variable {name} is not set")
        return _VARIABLE.sub(lambda match: os.environ.get(match[1], ""), value)
    return value


async def _read(path: object, where: str, faults: list[str]) -> object:
    try:
        async with aiofiles.open(str(path), encoding="utf-8") as file:
            return (await file.read()).rstrip("\r\n")
    except (OSError, ValueError) as error:
        faults.append(f"{where}: cannot be read: {error}")
        return None
