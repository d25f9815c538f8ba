"""What a kubelet asks of its container runtime, without a kubelet: images over the CRI socket."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .services import COMMAND_SECONDS, REPOSITORY

_PROTO = "tests/real/cri.proto"


class CriError(RuntimeError):
    """The runtime refused; the text is what a user of Kubernetes finds in the events of a pod."""


def missing() -> str | None:
    """Why ``Cri`` cannot be used, if so."""
    absent = [package for package in ("grpc", "grpc_tools") if find_spec(package) is None]
    return f"not installed: {', '.join(absent)} (requirements-test.lock)" if absent else None


@functools.cache
def _runtime() -> tuple[Any, Any]:
    """The messages and stubs of ``cri.proto``, made in memory: no generated file in the tree."""
    if str(REPOSITORY) not in sys.path:  # where the name of the file is looked up
        sys.path.append(str(REPOSITORY))
    messages, services = import_module("grpc").protos_and_services(_PROTO)
    return messages, services


@dataclass(frozen=True)
class CriImage:
    """An image as the runtime lists it."""

    id: str
    tags: tuple[str, ...]
    digests: tuple[str, ...]
    size: int


class Cri:
    """The image service behind a CRI socket."""

    def __init__(self, socket: Path) -> None:
        grpc: Any = import_module("grpc")
        self._error: type[Exception] = grpc.RpcError
        self._messages, services = _runtime()
        self._channel = grpc.insecure_channel(f"unix://{socket}")
        self._images = services.ImageServiceStub(self._channel)
        self._runtime = services.RuntimeServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._channel.close()

    def version(self) -> str:
        """The runtime's name and version."""
        answer = self._call(self._runtime.Version, self._messages.VersionRequest())
        return f"{answer.runtime_name} {answer.runtime_version}"

    def pull(self, reference: str, auth: Mapping[str, str] | None = None, timeout: float = COMMAND_SECONDS) -> str:
        """Pull an image; its id. ``auth`` are the fields of an ``AuthConfig``."""
        request = self._messages.PullImageRequest(image=self._messages.ImageSpec(image=reference))
        if auth is not None:
            request.auth.CopyFrom(self._messages.AuthConfig(**auth))
        return str(self._call(self._images.PullImage, request, timeout).image_ref)

    def images(self) -> list[CriImage]:
        """The images that the runtime has."""
        answer = self._call(self._images.ListImages, self._messages.ListImagesRequest())
        return [
            CriImage(image.id, tuple(image.repo_tags), tuple(image.repo_digests), int(image.size)) for image in answer.images
        ]

    def remove(self, reference: str) -> None:
        """Remove an image, by any of its names."""
        image = self._messages.ImageSpec(image=reference)
        self._call(self._images.RemoveImage, self._messages.RemoveImageRequest(image=image))

    def _call(self, method: Any, request: Any, timeout: float = COMMAND_SECONDS) -> Any:
        try:
            return method(request, timeout=timeout)
        except self._error as error:
            call: Any = error
            raise CriError(f"{call.code().name}: {call.details()}") from error
