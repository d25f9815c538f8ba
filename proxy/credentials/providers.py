"""The kubelet's credential provider plugins: programs that nodes have for registries whose passwords are short-lived.

Rules and names are those of kubernetes/kubelet ``config/v1/types.go`` and ``pkg/apis/credentialprovider/v1/types.go``, and
of the kubelet's ``pkg/credentialprovider/plugin/{config,plugin}.go``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from proxy.credentials.ahead import Ahead
from proxy.credentials.credential import Credential, Found
from proxy.credentials.docker_config import Entry
from proxy.credentials.keyring import Keyring, matches
from proxy.credentials.programs import ProgramFailed, parse_object, run
from proxy.logs import printable

log = logging.getLogger(__name__)

_CONFIG_VERSIONS = tuple(f"kubelet.config.k8s.io/{version}" for version in ("v1", "v1beta1", "v1alpha1"))
_PLUGIN_VERSIONS = tuple(f"credentialprovider.kubelet.k8s.io/{version}" for version in ("v1", "v1beta1", "v1alpha1"))
_CONFIG_KEYS = frozenset({"kind", "apiVersion", "providers"})
_VARIABLE_KEYS = frozenset({"name", "value"})
_PROVIDER_KEYS = frozenset({"name", "matchImages", "defaultCacheDuration", "apiVersion", "args", "env", "tokenAttributes"})
_CACHE_KEY_TYPES = ("Image", "Registry", "Global")  # in the order in which they are looked for
_AT_ONCE = 8

_HOST_PART = re.compile(r"(?:https?://)?[^/]*")
_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_DURATION = re.compile(rf"([+-]?)((?:{_NUMBER}(?:ns|us|µs|μs|ms|s|m|h))+)|[+-]?0", re.ASCII)
_DURATION_PART = re.compile(rf"({_NUMBER})(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_MAX = 2**63 / 1e9


class ProviderConfigInvalid(ValueError):
    """A ``CredentialProviderConfig`` cannot be used. The text names its source and the key."""


_Key = tuple[str, str, str]
"""A provider's name, a cache key type, and the image or registry that it is of."""


@dataclass(frozen=True, slots=True)
class Provider:
    """One entry of a ``CredentialProviderConfig``. ``default_cache_seconds`` is for answers that do not say how long they
    hold. What may hold secrets is not in its ``repr``."""

    name: str
    match_images: tuple[str, ...]
    default_cache_seconds: float
    api_version: str
    args: tuple[str, ...] = field(default=(), repr=False)
    env: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def concerns(self, image: str) -> bool:
        """Whether it is to be asked about ``image``, a name without tag and digest."""
        return any(matches(pattern, image) for pattern in self.match_images)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a plugin gave: for which images (``cache_key_type``) and how long it holds, and credentials by pattern."""

    cache_key_type: str
    seconds: float
    entries: tuple[Entry, ...]


def parse_duration(text: object) -> float:
    """Seconds of a duration as Go's ``time.ParseDuration`` reads it; raises ``ValueError``."""
    match = _DURATION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError("not a duration; write for example 12h, 1m30s or 0s")
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in _DURATION_PART.findall(match[2] or ""))
    if seconds >= _DURATION_MAX:
        raise ValueError("longer than a duration can be")
    return -seconds if match[1] == "-" else seconds


def parse_provider_config(text: bytes, source: str) -> tuple[Provider, ...]:
    """The providers in a ``CredentialProviderConfig``, YAML or JSON; raises ``ProviderConfigInvalid``.

    The versions that the kubelet takes are taken: v1, v1beta1 and v1alpha1, of the file and of the plugin API; unknown keys
    are refused, as there.
    """
    try:
        document = _load(text)
        root = _mapping(document, "the file")
        if root.get("kind") != "CredentialProviderConfig":
            raise ValueError("kind: CredentialProviderConfig is needed")
        if root.get("apiVersion") not in _CONFIG_VERSIONS:
            raise ValueError(f"apiVersion: {_CONFIG_VERSIONS[0]} is needed")
        _check_keys(root, _CONFIG_KEYS, "")
        entries = _list(root.get("providers"), "providers")
        if not entries:
            raise ValueError("providers: at least one is needed")
        providers = tuple(_provider(entry, f"providers[{index}]") for index, entry in enumerate(entries))
        names = [provider.name for provider in providers]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(f"providers[{index}].name: stands twice")
    except ValueError as error:
        raise ProviderConfigInvalid(f"{source}: {error}") from None
    return providers


def _load(text: bytes) -> object:
    try:
        return json.loads(text)  # which has tabs and escapes that YAML 1.1 has not
    except (ValueError, RecursionError):
        pass
    try:
        return yaml.safe_load(text)
    except Exception as error:  # where a tag does not fit its value, KeyError and others come out
        mark = getattr(error, "problem_mark", None)
    raise ValueError("neither YAML nor JSON" + (f"; see line {mark.line + 1}" if mark else ""))  # the error quotes the text


def _provider(entry: object, where: str) -> Provider:
    keys = _mapping(entry, where)
    _check_keys(keys, _PROVIDER_KEYS, f"{where}.")
    if keys.get("tokenAttributes") is not None:
        raise ValueError(
            f"{where}.tokenAttributes: the plugin wants tokens of pods' service accounts, which only a kubelet can get"
        )
    name = _text(keys.get("name"), f"{where}.name")
    if not name or name in (".", "..") or "/" in name or " " in name:
        raise ValueError(f"{where}.name: the name of a program is needed, without '/' and spaces")
    if not (patterns := _texts(keys.get("matchImages"), f"{where}.matchImages")):
        raise ValueError(f"{where}.matchImages: at least one is needed")
    for index, pattern in enumerate(patterns):
        if not pattern or " " in pattern or not pattern.isprintable():
            raise ValueError(f"{where}.matchImages[{index}]: not a host with an optional path, such as *.corp.example/team")
    try:
        default = parse_duration(keys.get("defaultCacheDuration"))
    except ValueError as error:
        raise ValueError(f"{where}.defaultCacheDuration: {error}") from None
    if default < 0:
        raise ValueError(f"{where}.defaultCacheDuration: less than 0")
    if (version := keys.get("apiVersion")) not in _PLUGIN_VERSIONS:
        raise ValueError(f"{where}.apiVersion: {_PLUGIN_VERSIONS[0]} is needed")
    return Provider(
        name=name,
        match_images=patterns,
        default_cache_seconds=default,
        api_version=str(version),
        args=_texts(keys.get("args"), f"{where}.args"),
        env=tuple(
            _variable(variable, f"{where}.env[{index}]")
            for index, variable in enumerate(_list(keys.get("env"), f"{where}.env"))
        ),
    )


def _variable(entry: object, where: str) -> tuple[str, str]:
    keys = _mapping(entry, where)
    _check_keys(keys, _VARIABLE_KEYS, f"{where}.")
    name = _text(keys.get("name"), f"{where}.name")
    if not name or "=" in name:
        raise ValueError(f"{where}.name: the name of a variable is needed, without '='")
    return name, _text(keys.get("value", ""), f"{where}.value")


def _mapping(value: object, where: str) -> dict[object, object]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: keys are needed below it")
    return value


def _list(value: object, where: str) -> list[object]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{where}: a list is needed")
    return value


def _texts(value: object, where: str) -> tuple[str, ...]:
    return tuple(_text(item, f"{where}[{index}]") for index, item in enumerate(_list(value, where)))


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: a text is needed; write it in quotes")
    if "\0" in value:
        raise ValueError(f"{where}: a NUL cannot be given to a program")
    return value


def _check_keys(keys: Mapping[object, object], known: frozenset[str], where: str) -> None:
    for key in keys:
        if key not in known:
            raise ValueError(f"{where}{printable(str(key))}: unknown key")


class Providers:
    """What the plugins in ``bin_directory`` give, asked and kept as the kubelet does, but renewed ahead of its end.

    A plugin may take ``within`` seconds. One that fails gives no credentials, and is not asked about the same again for
    10 s; a warning names it once until it has worked again.
    """

    def __init__(
        self, providers: Sequence[Provider], bin_directory: Path, timer: Callable[[], float], within: float = 60.0
    ) -> None:
        self._providers = tuple(providers)
        self._bin_directory = bin_directory
        self._within = within
        self._kept: Ahead[_Key, Answer] = Ahead(4096, timer)
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._failing: set[str] = set()

    def concerns(self, registry: str) -> bool:
        """Whether some plugin is to be asked about some image of the host ``registry``."""
        patterns = [pattern for provider in self._providers for pattern in provider.match_images]
        return any(matches(match[0], registry) for pattern in patterns if (match := _HOST_PART.match(pattern)))

    async def lookup(self, image: str) -> Found:
        """The credentials for ``image``, a full name without tag and digest, in the order in which to try them."""
        answers = await asyncio.gather(
            *(self._answer(provider, image) for provider in self._providers if provider.concerns(image))
        )
        keyring = Keyring(entry for answer in answers if isinstance(answer, tuple) for entry in answer)
        found = tuple(entry.credential for entry in keyring.matching(image) if entry.credential is not None)
        return Found(found, "; ".join(str(answer) for answer in answers if isinstance(answer, ProgramFailed)))

    def renew(self) -> None:
        """Asks again for what is kept when it is used next."""
        self._kept.renew()

    async def close(self) -> None:
        """Stops the plugins that run."""
        await self._kept.close()

    async def _answer(self, provider: Provider, image: str) -> tuple[Entry, ...] | ProgramFailed:
        scopes = dict(zip(_CACHE_KEY_TYPES, (image, image.partition("/")[0], ""), strict=True))
        keys = [(provider.name, kind, scope) for kind, scope in scopes.items()]

        async def fetch() -> tuple[_Key, Answer, float]:
            try:
                answer = await self._ask(provider, image)
            except ProgramFailed as failure:
                if provider.name not in self._failing:
                    log.warning("no credentials from the provider %s: %s", provider.name, failure)
                self._failing.add(provider.name)
                raise
            self._failing.discard(provider.name)
            return (provider.name, answer.cache_key_type, scopes[answer.cache_key_type]), answer, answer.seconds

        try:
            return (await self._kept.find(keys, fetch)).entries
        except ProgramFailed as failure:
            return failure

    async def _ask(self, provider: Provider, image: str) -> Answer:
        program = str(self._bin_directory / provider.name)
        request = {"kind": "CredentialProviderRequest", "apiVersion": provider.api_version, "image": image}
        try:
            async with asyncio.timeout(self._within), self._slots:
                output = await run(
                    [program, *provider.args],
                    stdin=json.dumps(request).encode(),
                    within=self._within,
                    environment={**os.environ, **dict(provider.env)},
                )
        except TimeoutError:
            raise ProgramFailed(f"{program}: no answer within {self._within:g} s") from None
        return parse_answer(output, program, provider)


def parse_answer(output: bytes, program: str, provider: Provider) -> Answer:
    """What ``program`` answered as ``provider``; raises ``ProgramFailed``."""
    document = parse_object(program, output)
    if document.get("kind") != "CredentialProviderResponse":
        raise ProgramFailed(f"{program}: its answer is not a CredentialProviderResponse")
    if document.get("apiVersion") != provider.api_version:
        raise ProgramFailed(f"{program}: its answer is not of the apiVersion {provider.api_version}")
    if (kind := document.get("cacheKeyType")) not in _CACHE_KEY_TYPES:
        raise ProgramFailed(f"{program}: the cacheKeyType of its answer is none of {', '.join(_CACHE_KEY_TYPES)}")
    duration = document.get("cacheDuration")
    try:
        seconds = provider.default_cache_seconds if duration is None else parse_duration(duration)
    except ValueError:
        raise ProgramFailed(f"{program}: the cacheDuration of its answer is not a duration") from None
    auth = {} if document.get("auth") is None else document["auth"]
    if not isinstance(auth, dict) or not all(_is_pair(entry) for entry in auth.values()):
        raise ProgramFailed(f"{program}: the auth of its answer is not a map to username and password")
    entries = [
        Entry(
            pattern, Credential(pair.get("username", ""), pair.get("password", ""), source=provider.name, registry=pattern)
        )
        for pattern, pair in auth.items()
    ]
    return Answer(str(kind), seconds, tuple(entries))


def _is_pair(entry: object) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key, ""), str) for key in ("username", "password"))
