"""Where pull secrets lie: files, and directories in which Kubernetes mounts Secrets. Blocking.

A mounted Secret is a directory with a file for each key, behind a symbolic link that is exchanged when the Secret changes
(Kubernetes ``pkg/volume/util/atomic_writer.go``). So everything is read again, by name, each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from proxy import files
from proxy.config.model import PullSecretSource
from proxy.credentials.credential import Credential
from proxy.credentials.docker_config import (
    DockerConfig,
    Entry,
    SecretInvalid,
    parse_docker_config,
    parse_dockercfg,
    parse_file,
)

_KEYS: dict[str, Callable[[bytes, str], DockerConfig]] = {
    ".dockerconfigjson": parse_docker_config,
    ".dockercfg": parse_dockercfg,
}
_MAX_SECRETS = 4096


@dataclass(frozen=True, slots=True)
class Reading:
    """What one file held: a configuration, or why there is none that can be used."""

    config: DockerConfig | None
    fault: str = ""


def read(sources: Sequence[PullSecretSource]) -> dict[str, Reading]:
    """Every secret of ``sources``, by the path it was read from, in their order."""
    found: dict[str, Reading] = {}
    for number, source in enumerate(sources):
        for name, parse in _documents(source, f"imagePullSecrets[{number}]"):
            try:
                found[name] = Reading(_limited(parse(), source))
            except SecretInvalid as error:
                found[name] = Reading(None, str(error))
            except OSError as error:
                if source.directory is not None and isinstance(error, FileNotFoundError):
                    continue  # taken away since it was listed: it is not there
                reason = f"cannot be read: {error.strerror}; is it there, and may pullcache read it?"
                found[name] = Reading(None, f"{name}: {reason}")
    return found


def _documents(source: PullSecretSource, key: str) -> Iterator[tuple[str, Callable[[], DockerConfig]]]:
    if source.registry is not None:
        yield f"{key} {source.password_file}", partial(_inline, source)
    elif source.file is not None:
        yield f"{key} {source.file}", partial(_parse, source.file)
    elif source.directory is not None:
        yield from _mounted(source.directory, key)


def _mounted(directory: Path, key: str) -> Iterator[tuple[str, Callable[[], DockerConfig]]]:
    """The files of a mounted Secret, or of each Secret that is mounted in a directory below."""
    try:
        below = sorted(path for path in directory.iterdir() if not path.name.startswith("..") and path.is_dir())
    except OSError as error:
        yield _fault(directory, key, f"cannot be read: {error.strerror}; pullcache needs the right to read and to enter it")
        return
    is_empty = True
    for path in (directory, *below[:_MAX_SECRETS]):
        try:
            found = [path / name for name in _KEYS if (path / name).exists()]
        except OSError as error:
            yield _fault(path, key, f"cannot be read: {error.strerror}; pullcache needs the right to enter it")
            is_empty = False
            continue
        is_empty = is_empty and not found
        for file in found:
            yield f"{key} {file}", partial(_parse, file)
    if is_empty:
        yield _fault(
            directory, key, "no Secret is in it: neither .dockerconfigjson nor .dockercfg, nor directories with these"
        )


def _fault(path: Path, key: str, reason: str) -> tuple[str, Callable[[], DockerConfig]]:
    return f"{key} {path}", partial(_refuse, f"{path}: {reason}")


def _parse(file: Path) -> DockerConfig:
    return _KEYS.get(file.name, parse_file)(files.read(file), str(file))


def _inline(source: PullSecretSource) -> DockerConfig:
    registry, path = source.registry or "", source.password_file or Path()
    try:
        password = files.read(path).decode().rstrip("\r\n")
    except UnicodeDecodeError:
        password = ""
    if not password or not password.isprintable():
        _refuse(f"{path}: the password of {registry} is empty, or no text of one line")
    credential = Credential(source.username or "", password, source=str(path), registry=registry)
    return DockerConfig((Entry(registry, credential, source=str(path)),))


def _limited(config: DockerConfig, source: PullSecretSource) -> DockerConfig:
    repositories = tuple(source.repositories)
    return replace(config, entries=tuple(replace(entry, repositories=repositories) for entry in config.entries))


def _refuse(text: str) -> DockerConfig:
    raise SecretInvalid(text)
