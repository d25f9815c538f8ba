"""Reading the configuration: YAML in, a model out, every fault named at once with its key path and a hint.

In any text value ``${NAME}`` stands for an environment variable, and a key written with ``File`` at its end takes its value
from that file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiofiles
import yaml
from pydantic import ValidationError

from proxy.config.faults import explained, keys
from proxy.config.model import Config
from proxy.config.upstreams import PUBLIC_REGISTRIES, AccessConfig
from proxy.config.values import Address, parse_address, parse_count
from proxy.globs import pointless
from proxy.names import DOCKER_HUB, DOCKER_HUB_ALIASES, canonical_host, path_form


class ConfigError(Exception):
    """The configuration cannot be used. ``faults`` holds one line for each thing that is wrong."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


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
        raise ConfigError([f"{path}: {_not_yaml(error)}"]) from None  # its own text quotes the line, passwords included
    except RecursionError as error:
        raise ConfigError([f"{path}: nested too deep, or within itself"]) from error
    return validate(_merge(expanded, overrides or {}), faults)


def _not_yaml(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None)
    if mark is None and type(error) is yaml.YAMLError:
        return str(error)  # our own
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return f"{place}not YAML: {problem or 'a number or date in it is none'}"


def validate(raw: object, faults: list[str] | None = None) -> Config:
    """The configuration that ``raw`` (parsed YAML) holds; ``faults`` are those found before."""
    faults = [*(faults or []), *_clashes(raw)]
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        faults += explained(error)
    else:
        faults += dangers(config)
    if faults:
        raise ConfigError(faults)
    return config


def dangers(config: Config) -> list[str]:
    """What each key may be by itself, and all of them together must not."""
    listener = config.listener
    is_covered = config.listen.is_loopback or listener.tls_cert_file is not None or listener.tls_terminated_in_front
    asks = "listener.htpasswdFile" if listener.htpasswd_file else "access: verify" if config.verifies else ""
    faults = []
    if config.verifies and config.external_url is None:
        faults.append(
            "externalURL: access: verify needs it: clients get their token there; write for example "
            "https://cache.corp:5000, the address of 'listen' as they see it"
        )
    is_tls = listener.tls_cert_file is not None or listener.tls_terminated_in_front
    if is_tls and config.external_url is not None and config.external_url.startswith("http://"):
        faults.append(
            "externalURL: clients would show their passwords in plain text there; the listener has TLS: write https://"
        )
    if config.verifies and listener.htpasswd_file:
        faults.append(
            "listener.htpasswdFile and access: verify exclude each other: a client has one Authorization header; use "
            "clientCAFile to say who may connect"
        )
    if asks and not is_covered:
        faults.append(
            f"listen: {config.listen} is not on loopback and without TLS, so whoever is on the line could read what clients "
            f"show for {asks}; give listener.tlsCertFile, or say listener.tlsTerminatedInFront: true"
        )
    names = [upstream.name for upstream in config.upstreams]
    for number, source in enumerate(config.image_pull_secrets):
        faults += _pointless(f"imagePullSecrets[{number}].repositories", source.repositories, names)
    for number, upstream in enumerate(config.upstreams):
        access = upstream.access or AccessConfig()
        faults += _pointless(f"upstreams[{number}].access.repositories", access.repositories, [upstream.name])
        if upstream.client_cert_file is not None and (access.mode != "shared" or access.repositories):
            faults.append(
                f"upstreams[{number}].access: clientCertFile is shown with every request, so nobody can find out what the "
                "anonymous may read; say access: shared, without repositories: what it opens is given to everybody who may "
                "use the listener"
            )
        is_meant = access.i_understand_this_is_shared or access.repositories or listener.is_guarded
        if access.mode == "shared" and not is_meant:
            faults.append(
                f"upstreams[{number}].access: shared gives what the secret opens to everybody who reaches the listener, "
                "and it is open; give listener.htpasswdFile or clientCAFile, list access.repositories, or say "
                "access.iUnderstandThisIsShared: true"
            )
    if not config.admin.is_loopback and not (config.admin_listener.token_file or config.admin_listener.client_ca_file):
        faults.append(
            f"admin: {config.admin} is not on loopback; give adminListener.tokenFile or adminListener.clientCAFile, or an "
            "address on loopback"
        )
    return faults


def _pointless(key: str, globs: Sequence[str], registries: Sequence[str]) -> list[str]:
    """A line for each glob that no image of these registries can match."""
    return [f"{key}: {told}" for glob in globs if (told := pointless(glob, registries))]


def _clashes(raw: object) -> list[str]:
    """What is wrong between keys; looked for before each key is known to be right, so that no fault hides another."""
    given = raw if isinstance(raw, dict) else {}
    faults: list[str] = []
    listed = given.get("upstreams", [{"name": name} for name in PUBLIC_REGISTRIES])
    owner: dict[str, str] = {}
    seen: set[str] = set()
    for upstream in listed if isinstance(listed, list) else []:
        if not isinstance(upstream, dict) or not isinstance(name := upstream.get("name"), str):
            continue
        name = canonical_host(name)
        if name in seen:
            also = f" ({', '.join(sorted(DOCKER_HUB_ALIASES))} are other names of it)" if name == DOCKER_HUB else ""
            faults.append(f"upstreams: {name} stands twice{also}; remove one")
        seen.add(name)
        for form in {name, str(upstream.get("pathPrefix") or path_form(name))}:
            if owner.get(form, name) != name:
                faults.append(f"upstreams: '{form}' means both {owner[form]} and {name}; change name or pathPrefix")
            owner[form] = name
    faults += _contradictory_limits(given, listed if isinstance(listed, list) else [])
    if _is_true(given.get("offline")) and _is_true(given.get("alwaysPullImages")):
        faults.append(
            "offline: excludes alwaysPullImages: the one asks no registry, the other asks for every tag; keep one of them"
        )
    if _is_false(given.get("staleIfError")) and given.get("maxStale") is not None:
        faults.append("maxStale: says nothing where staleIfError is false; keep one of them")
    names = list(dict.fromkeys(owner.values()))
    default = given.get("defaultUpstream")
    if isinstance(default, str) and canonical_host(default) not in names:
        faults.append(f"defaultUpstream: '{default}' is not among the upstreams ({', '.join(names)})")
    listen, admin = (_address(given, key) for key in ("listen", "admin"))
    if listen and admin and admin.overlaps(listen):
        faults.append(f"admin: {admin} and listen: {listen} are one port; give admin a port of its own")
    return faults


def _contradictory_limits(given: Mapping[Any, Any], upstreams: Sequence[object]) -> list[str]:
    """The kubelet's rules (``pkg/kubelet/apis/config/validation/validation.go``): serial and exactly 1 do not clash."""
    faults = []
    most = 0
    with suppress(ValueError):  # which is a fault of its own
        most = parse_count(given.get("maxParallelImagePulls"))
    if _is_true(given.get("serializeImagePulls")) and most > 1:
        faults.append(
            f"maxParallelImagePulls: {most} contradicts serializeImagePulls: true, which is one at a time; set "
            "serializeImagePulls to false, or leave one of them out"
        )
    for number, upstream in enumerate(upstreams):
        keys_of = upstream if isinstance(upstream, dict) else {}
        if keys_of.get("requestBurst") is not None and keys_of.get("requestsPerSecond") is None:
            faults.append(
                f"upstreams[{number}].requestBurst: it is what requestsPerSecond allows after a pause, and that is not set; "
                "set requestsPerSecond too, or leave out both"
            )
    return faults


def _is_true(value: object) -> bool:
    """Whether a key is true; a variable of the environment is a text."""
    return str(value).lower() in ("true", "t", "yes", "y", "on", "1")


def _is_false(value: object) -> bool:
    return str(value).lower() in ("false", "f", "no", "n", "off", "0")


def _address(given: Mapping[Any, Any], key: str) -> Address | None:
    """The address under ``key``, or its default; None where it is none, which is a fault of its own."""
    try:
        found = parse_address(given.get(key, Config.model_fields[key].default))
    except ValueError:
        return None
    return found if isinstance(found, Address) else None


def _merge(under: object, over: Mapping[str, Any]) -> object:
    """``under`` with the keys of ``over``, level by level; what is not a mapping is left for validation to refuse."""
    if not isinstance(under, dict):
        return under
    merged = dict(under)
    for key, value in over.items():
        merged[key] = _merge(under.get(key, {}), value) if isinstance(value, Mapping) else value
    return merged


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
