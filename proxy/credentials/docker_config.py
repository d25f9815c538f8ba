"""Pull secrets as they are written: Docker's ``config.json``, the older ``.dockercfg``, and Kubernetes Secrets of both.

Fields are read as Kubernetes reads them (``pkg/credentialprovider/config.go``): ``auth`` goes before ``username`` and
``password``, names of fields have no case (Go's ``encoding/json``). Beyond that, what Docker has: ``identitytoken``,
``credHelpers``, ``credsStore`` (docker/cli ``cli/config/configfile``).
"""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import yaml

from proxy.credentials.credential import Credential
from proxy.unique import KeyTwice, unique

_MAX = 2 * 1024 * 1024  # bytes; Kubernetes allows a Secret 1 MiB, and base64 makes a third more of it
_REMEDY = "write it again with 'kubectl create secret docker-registry' or 'docker login'"

_BASE64 = re.compile(r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}(?:==)?|[A-Za-z0-9+/]{3}=?)?")
_PROGRAM = re.compile(r"[A-Za-z0-9._-]+")
_USER = re.compile(r"^(https?://)?[^/?#]*@")
_PLAIN_KEY = re.compile(r"[A-Za-z0-9.:/*\[\]_-]{1,255}")


class SecretInvalid(ValueError):
    """A secret cannot be used. The text names the source and the key, says what is wrong and what to do, and quotes nothing.

    It has neither a cause nor a context: errors of parsers hold the text that they parsed.
    """


@dataclass(frozen=True, slots=True)
class Entry:
    """What is to be shown to registries of one key."""

    registry: str
    """The key as it is written, but for a user in front of the host."""
    credential: Credential | None = None
    """None: ``helper`` is to be asked."""
    helper: str = ""
    """NAME, where the program is ``docker-credential-NAME``."""
    source: str = field(default="", compare=False)
    repositories: tuple[str, ...] = ()
    """Globs over registry/repository: the entry is for these alone; without any, for all."""


@dataclass(frozen=True, slots=True)
class DockerConfig:
    """The entries of one file, helpers first, else in its order."""

    entries: tuple[Entry, ...]
    store: str = ""
    """NAME of a ``docker-credential-NAME`` that is to be asked which registries it knows; empty: none."""


def parse_docker_config(text: bytes, source: str) -> DockerConfig:
    """The content of ``config.json`` or of a Secret's ``.dockerconfigjson``; raises ``SecretInvalid``.

    An entry with nothing in it is left out: ``docker login`` writes such beside a program that holds the credential.
    """
    return _docker_config(_json_object(text, source), source)


def parse_dockercfg(text: bytes, source: str) -> DockerConfig:
    """The content of ``.dockercfg``, which is the map of registries itself; raises ``SecretInvalid``."""
    return _dockercfg(_json_object(text, source), source)


def parse_file(text: bytes, source: str) -> DockerConfig:
    """Either of these, or a Secret's manifest as kubectl writes it (YAML or JSON), told apart by what is in it; raises
    ``SecretInvalid``."""
    if not _is_json(text):
        return parse_secret(_yaml_mapping(text, source), source)
    content = _json_object(text, source)
    if isinstance(content.get("kind"), str):
        return parse_secret(content, source)
    if {name.lower() for name in content} & {"auths", "credhelpers", "credsstore"}:
        return _docker_config(content, source)
    return _dockercfg(content, source)


def _docker_config(content: Mapping[str, object], source: str) -> DockerConfig:
    fields = _fields(content)
    programs = {
        key: name
        for key, value in _map(fields.get("credhelpers"), "credHelpers", source).items()
        if (name := _program(value, f"{_called(key)} in credHelpers", source))
    }
    helpers = [Entry(_USER.sub(r"\1", key), helper=name, source=source) for key, name in programs.items()]
    auths = _map(fields.get("auths"), "auths", source)
    held = _entries({key: value for key, value in auths.items() if key not in programs}, source)
    return DockerConfig((*helpers, *held), _program(fields.get("credsstore"), "credsStore", source))


def _dockercfg(content: Mapping[str, object], source: str) -> DockerConfig:
    return DockerConfig(tuple(_entries(content, source)))


def _entries(auths: Mapping[str, object], source: str) -> list[Entry]:
    found = []
    for key, value in auths.items():
        registry = _USER.sub(r"\1", key)
        credential = _credential(_fields(_map(value, _called(registry), source)), registry, source)
        if not credential.is_empty:
            found.append(Entry(registry, credential, source=source))
    return found


def _credential(fields: Mapping[str, object], registry: str, source: str) -> Credential:
    username, password, _, auth, token = (
        _text(fields.get(name), f"'{name}' of {_called(registry)}", source)
        for name in ("username", "password", "email", "auth", "identitytoken")
    )
    if auth:
        username, password = _decode_auth(auth, registry, source)
    if token:
        return Credential(identity_token=token, source=source, registry=registry)
    return Credential(username, password, source=source, registry=registry)


def _decode_auth(auth: str, registry: str, source: str) -> tuple[str, str]:
    """The user and password: split at the first colon; a newline that was encoded with them stays in the password."""
    decoded = _decode_base64(auth)
    if decoded is None:
        _refuse(f"{source}: 'auth' of {_called(registry)} is not base64 (the standard alphabet, without spaces)")
    user, colon, password = decoded.partition(b":")
    if not colon:
        _refuse(f"{source}: 'auth' of {_called(registry)} has no colon between user and password")
    try:
        return user.decode(), password.decode()
    except UnicodeDecodeError:
        pass
    _refuse(f"{source}: 'auth' of {_called(registry)} is not UTF-8")


def _decode_base64(text: str) -> bytes | None:
    """As Go's ``encoding/base64`` does: line breaks anywhere, and with all of its padding or none."""
    text = text.replace("\r", "").replace("\n", "")
    return binascii.a2b_base64(text + "=" * (-len(text) % 4)) if _BASE64.fullmatch(text) else None


def parse_secret(content: Mapping[str, object], source: str) -> DockerConfig:
    if content.get("kind") != "Secret":
        _refuse(f"{source}: neither a Docker configuration nor a Secret (kind: Secret)")
    match content.get("type"):
        case "kubernetes.io/dockerconfigjson":
            key, read = ".dockerconfigjson", _docker_config
        case "kubernetes.io/dockercfg":
            key, read = ".dockercfg", _dockercfg
        case _:
            _refuse(f"{source}: the Secret is of type neither kubernetes.io/dockerconfigjson nor kubernetes.io/dockercfg")
    return read(_json_object(_datum(content, key, source), f"{source}: {key}"), source)


def _datum(content: Mapping[str, object], key: str, source: str) -> bytes:
    """What a Secret holds under a key; ``stringData`` goes before ``data``, as in the Kubernetes API."""
    plain, data = content.get("stringData"), content.get("data")
    if isinstance(plain, dict) and key in plain:
        return _text(plain[key], f"{key} in stringData", source).encode(errors="surrogatepass")
    if not isinstance(data, dict) or key not in data:
        _refuse(f"{source}: the Secret has no {key} in its data")
    decoded = _decode_base64(_text(data[key], f"{key} in data", source))
    if decoded is None:
        _refuse(f"{source}: {key} in data is not base64; what is not encoded belongs in stringData")
    return decoded


def _fields(content: Mapping[str, object]) -> dict[str, object]:
    return {name.lower(): value for name, value in content.items()}


def _map(value: object, what: str, source: str) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        _refuse(f"{source}: {what} is not an object")
    return value


def _text(value: object, what: str, source: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        _refuse(f"{source}: {what} is not a text")
    return value


def _program(value: object, what: str, source: str) -> str:
    name = _text(value, what, source)
    if name and not _PROGRAM.fullmatch(name):
        raise SecretInvalid(
            f"{source}: {what} is not the name of a program; it is what follows 'docker-credential-', of A-Z a-z 0-9 . _ -"
        )
    return name


def _called(key: str) -> str:
    """An entry by its key, unless that is nothing to put into a message."""
    return f"the entry '{key}'" if _PLAIN_KEY.fullmatch(key) else "an entry whose key is not a registry's name"


def _refuse(fault: str) -> NoReturn:
    raise SecretInvalid(f"{fault}; {_REMEDY}")


def _is_json(text: bytes) -> bool:
    return text.lstrip().startswith(b"{")


def _json_object(text: bytes, where: str) -> dict[str, object]:
    _check_size(text, where)
    try:
        value = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=_no_number)
        json.dumps(value, ensure_ascii=False).encode()  # fails at half a surrogate pair, which no header can carry
    except json.JSONDecodeError as error:
        fault = f"line {error.lineno} column {error.colno}: not JSON"
    except KeyTwice:
        fault = "an object has a key twice"
    except UnicodeError:
        fault = "not UTF-8"
    except (ValueError, RecursionError):
        fault = "not JSON that can be read"
    else:
        if isinstance(value, dict):
            return value
        fault = "not a JSON object"
    _refuse(f"{where}: {fault}")


def _check_size(text: bytes, where: str) -> None:
    if not text.strip():
        _refuse(f"{where}: empty")
    if len(text) > _MAX:
        _refuse(f"{where}: larger than {_MAX // 1024 // 1024} MiB")


def _no_number(_: str) -> NoReturn:
    raise ValueError


def _yaml_mapping(text: bytes, source: str) -> dict[str, object]:
    _check_size(text, source)
    try:
        value = yaml.load(text.decode(), _Loader)  # noqa: S506 - it makes texts, lists and mappings only
    except Exception:  # PyYAML also raises what its documentation does not name
        value = None
    if not isinstance(value, dict):
        _refuse(f"{source}: neither JSON nor a YAML manifest")
    return value


class _Loader(yaml.BaseLoader):
    """Refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        mapping: dict[object, object] = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.YAMLError
        return mapping
