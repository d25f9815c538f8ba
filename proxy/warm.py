"""Fetches images through a pullcache, as a client of its registry API, so that it holds them afterwards.

In the order in which a node does: the images of one pod one after another, different pods at the same time.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from proxy.config.model import BackoffConfig, PullPolicy
from proxy.config.upstreams import UpstreamConfig
from proxy.credentials.credential import Asker, Credential, Found, Identity
from proxy.errors import RegistryError, UpstreamBroken, UpstreamFailing, UpstreamUnavailable
from proxy.kubernetes.pods import PodPull
from proxy.manifests import INDEXES, MODERN, Descriptor, Manifest, ManifestInvalid, parse_manifest
from proxy.metrics import Metrics
from proxy.names import Digest, ImageName, Reference, Repository, digest_of, path_form
from proxy.platforms import Platform, select
from proxy.upstream.auth import RealmRefused
from proxy.upstream.client import Upstream
from proxy.upstream.content import ManifestBody

PODS_AT_ONCE = 4
_LAYERS_AT_ONCE = 3  # as containerd fetches an image
_PATIENCE = 45.0  # seconds in which a manifest is asked for again that the cache wants later: its registry is away
_PATIENCE_IN_LINE = 300.0  # a blob, which perhaps has to wait for others
_SAVING = 5.0
_LOOK_AGAIN = 0.1
_SILENCE = 120.0
_OPENS = 5
_NESTING = 4
_TIMEOUTS = {"connect": "5s", "headers": "60s", "token": "30s"}  # the cache asks its upstream meanwhile

_ASK_AGAIN = BackoffConfig.model_validate({"initial": "0s", "notFound": "0s", "refused": "0s"})  # the cache itself remembers

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Server:
    """A pullcache. ``prefixes``: the first component of the paths of a registry, where that is not its name."""

    url: str
    ca_file: Path | None = None
    prefixes: Mapping[str, str] = field(default_factory=dict)

    @property
    def config(self) -> UpstreamConfig:
        """It, as a registry that is asked; raises ``ValueError`` where that is none."""
        section = {
            "name": "cache.invalid",
            "endpoints": [self.url],
            "allowAddresses": ["0.0.0.0/0", "::/0"],  # wherever it is: the user has named it
            "timeouts": _TIMEOUTS,
            **({"caFile": self.ca_file} if self.ca_file else {}),
        }
        return UpstreamConfig.model_validate(section).model_copy(update={"name": "the cache"})  # as messages call it


@dataclass(frozen=True, slots=True)
class Held:
    """What the cache has of an image for a platform; ``why``: if it can have nothing of it."""

    complete: bool
    missing: int = 0
    why: str = ""


AskHeld = Callable[[str, Platform], Awaitable[Held | None]]
"""What is held of an image, named in full; None where the cache does not say."""


class Bar(Protocol):
    """How far one image is, in bytes."""

    def expect(self, size: int) -> None:
        """So many more are to come."""

    def add(self, size: int) -> None:
        """So many have come."""

    def close(self) -> None:
        """It is over."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is pulled once, however many pods want it."""

    name: ImageName
    policy: PullPolicy
    credentials: tuple[Credential, ...]
    platform: Platform


@dataclass(frozen=True, slots=True)
class Result:
    """What became of it; ``size``: the bytes of the image that were read."""

    held: bool
    text: str
    size: int = 0
    seconds: float = 0.0


class Warmer:
    """One run. ``results`` grows as images are done. ``check``: nothing is pulled. ``tell``: that something takes longer."""

    def __init__(
        self,
        server: Server,
        ask_held: AskHeld,
        bar: Callable[[Wanted], Bar],
        tell: Callable[[str], None],
        *,
        check: bool = False,
    ) -> None:
        self._server = server
        self._ask_held = ask_held
        self._bar = bar
        self._tell = tell
        self._check = check
        self._cache = Upstream(server.config, Metrics(), "pullcache-warm", _no_secrets, _ASK_AGAIN)
        self._images: dict[Wanted, asyncio.Task[Result]] = {}
        self._blobs: dict[tuple[str, Digest, Credential | None], asyncio.Task[None]] = {}
        self.results: dict[Wanted, Result] = {}

    async def run(self, pods: Sequence[PodPull], platforms: Sequence[Platform]) -> None:
        """Pulls what the pods want."""
        places = asyncio.Semaphore(PODS_AT_ONCE)

        async def one(pod: PodPull) -> None:
            async with places:
                for image in pod.images:
                    for platform in platforms:
                        await self._image(Wanted(image.name, image.policy, image.credentials, platform))

        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._cache.close)
            stack.push_async_callback(self._stop)
            async with asyncio.TaskGroup() as group:
                for pod in pods:
                    group.create_task(one(pod))

    async def _stop(self) -> None:
        running = [task for task in (*self._images.values(), *self._blobs.values()) if not task.done()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _image(self, wanted: Wanted) -> None:
        if wanted not in self._images:
            self._images[wanted] = asyncio.create_task(self._result(wanted))
        self.results[wanted] = await self._images[wanted]

    async def _result(self, wanted: Wanted) -> Result:
        began = time.monotonic()
        image = _Pull(wanted, self._bar(wanted))
        try:
            held, text = await self._obey(wanted, image)
        except RegistryError as error:
            held, text = False, f"ErrImagePull: {error.message}"
        finally:
            image.bar.close()
        return Result(held, text, image.size, time.monotonic() - began)

    async def _obey(self, wanted: Wanted, image: _Pull) -> tuple[bool, str]:
        """Whether the image is held now, and what was done for it."""
        held = None
        if self._check or wanted.policy != "Always":
            held = await self._ask_held(str(wanted.name), wanted.platform)
            if held is not None and held.complete:
                return True, "already held"
        if wanted.policy == "Never" or self._check:
            missing = "what is held is not known"
            if held is not None:
                parts = f" ({held.missing} of its parts)" if held.missing else ""
                missing = f"missing: {held.why}" if held.why else f"missing{parts}"
            return False, missing if self._check else f"ErrImageNeverPull: {missing}"
        failures: dict[str, None] = {}
        for credential in wanted.credentials or (None,):
            try:
                return await self._pull(wanted, credential, image)
            except RegistryError as error:
                failures[self._told(error)] = None
        raise UpstreamBroken("; ".join(failures))

    def _told(self, error: RegistryError) -> str:
        if isinstance(error.__cause__, RealmRefused):  # whose advice is for the configuration of a cache
            return f"the cache gives its tokens elsewhere than at {self._server.url}; let --server be what externalURL says"
        return error.message

    async def _pull(self, wanted: Wanted, credential: Credential | None, image: _Pull) -> tuple[bool, str]:
        prefix = self._server.prefixes.get(wanted.name.host, path_form(wanted.name.host))
        there = _There(self._cache, Repository(f"{prefix}/{wanted.name.repository}"), Asker(Identity("client", credential)))
        is_always = wanted.policy == "Always"
        manifest, body = await self._manifest(there, wanted.name.reference, image, fresh=is_always)
        pointed = f"{wanted.name.host}/{wanted.name.repository}@{digest_of(body)}"
        if is_always:
            held = await self._ask_held(pointed, wanted.platform)
            if held is not None and held.complete:
                return True, "already held"
        blobs = await self._tree(there, manifest, body, wanted.platform, image)
        image.bar.expect(sum(blob.size for blob in blobs))
        places = asyncio.Semaphore(_LAYERS_AT_ONCE)

        async def one(blob: Descriptor) -> None:
            async with places:
                await self._blob_once(there, blob, credential, image)

        # One that fails stops no other: what is held will not be fetched again.
        for outcome in await asyncio.gather(*map(one, blobs), return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
        return await self._is_held(pointed, wanted.platform)

    async def _is_held(self, image: str, platform: Platform) -> tuple[bool, str]:
        """Whether what has come is held: a client has the last byte a moment before it is saved, if the disk takes it."""
        deadline = time.monotonic() + _SAVING
        while True:
            held = await self._ask_held(image, platform)
            if held is None or held.complete:
                return True, "pulled"
            if time.monotonic() > deadline:
                lacking = held.why or f"{held.missing} of its parts are missing"
                return False, f"pulled, but not held: {lacking}; the log of the cache says why"
            await asyncio.sleep(_LOOK_AGAIN)

    async def _tree(
        self, there: _There, manifest: Manifest, body: bytes, platform: Platform, image: _Pull, depth: int = 0
    ) -> list[Descriptor]:
        """The blobs of the manifests that a platform wants, each once; the manifests themselves are read on the way."""
        if manifest.media_type not in INDEXES:
            return list(dict.fromkeys(manifest.children))
        if depth == _NESTING:
            raise UpstreamBroken(f"more than {_NESTING} indexes within each other")
        blobs: dict[Descriptor, None] = {}
        for digest in select(manifest, body, platform):
            child, content = await self._manifest(there, digest, image)
            blobs |= dict.fromkeys(await self._tree(there, child, content, platform, image, depth + 1))
        return list(blobs)

    async def _manifest(
        self, there: _There, reference: Reference, image: _Pull, *, fresh: bool = False
    ) -> tuple[Manifest, bytes]:
        async def verify(came: ManifestBody) -> tuple[Manifest, bytes]:
            if isinstance(reference, Digest) and not reference.matches(came.body):
                raise UpstreamBroken(f"what came for the manifest {reference} has another digest")
            try:
                return parse_manifest(came.body, came.content_type), came.body
            except ManifestInvalid as error:
                raise UpstreamBroken(f"the manifest {reference} is not valid: {error}") from None

        manifest, body = await self._patiently(
            partial(
                there.cache.get_manifest,
                there.repository,
                reference,
                ", ".join(MODERN),
                there.asker,
                verify,
                no_cache=fresh,
            ),
            image,
            _PATIENCE,
        )
        image.took(len(body), expected=False)
        return manifest, body

    async def _blob_once(self, there: _There, blob: Descriptor, credential: Credential | None, image: _Pull) -> None:
        """What several images have in common is read once."""
        key = (there.repository, blob.digest, credential)
        if (task := self._blobs.get(key)) is not None:
            await asyncio.shield(task)
            image.took(blob.size)
        else:
            self._blobs[key] = task = asyncio.create_task(self._blob(there, blob.digest, image))
            await task

    async def _blob(self, there: _There, digest: Digest, image: _Pull) -> None:
        """Reads a blob, and continues where it breaks off; what it brought is verified once more."""
        hasher, received = digest.hasher(), 0
        failure: RegistryError = UpstreamUnavailable(f"the blob {digest} broke off")
        for attempt in range(_OPENS):
            stream = await self._patiently(
                partial(there.cache.open_blob, there.repository, digest, received, attempt, there.asker),
                image,
                _PATIENCE_IN_LINE,
            )
            try:
                if stream.offset != received:
                    hasher, received = digest.hasher(), stream.offset
                    if received:
                        raise UpstreamBroken(f"another part of the blob {digest} came than was asked for")
                while data := await _soon(stream.read()):
                    hasher.update(data)
                    received += len(data)
                    image.took(len(data))
            except UpstreamFailing as error:
                failure = error
            else:
                if hasher.hexdigest() != digest.hex:
                    raise UpstreamBroken(f"what came for the blob {digest} has another digest")
                return
            finally:
                stream.close()
        raise failure

    async def _patiently(self, ask: Callable[[], Awaitable[T]], image: _Pull, patience: float) -> T:
        """Asks again when the cache says to come back (``Retry-After``), for as long as there is patience."""
        deadline = time.monotonic() + patience
        while True:
            try:
                return await ask()
            except RegistryError as error:
                seconds = _retry_after(error)
                if time.monotonic() + seconds > deadline:
                    raise
                if not image.waits:
                    image.waits = True
                    self._tell(f"{image.wanted.name}: asked for again for up to {patience:g} s: {error.message}")
            await asyncio.sleep(seconds)


@dataclass(frozen=True, slots=True)
class _There:
    """Whom and where, and in whose name."""

    cache: Upstream
    repository: Repository
    asker: Asker


@dataclass(slots=True)
class _Pull:
    """One image as it comes."""

    wanted: Wanted
    bar: Bar
    size: int = 0
    waits: bool = False

    def took(self, size: int, *, expected: bool = True) -> None:
        """So many bytes of it are here."""
        self.size += size
        if not expected:
            self.bar.expect(size)
        self.bar.add(size)


async def _no_secrets(_: str) -> Found:
    return Found(())


async def _soon(read: Awaitable[bytes]) -> bytes:
    try:
        async with asyncio.timeout(_SILENCE):
            return await read
    except TimeoutError:
        raise UpstreamUnavailable(f"nothing came for {_SILENCE:g} s") from None


def _retry_after(error: RegistryError) -> float:
    """Seconds until it is worth asking again; endless where that was not said."""
    said = error.headers.get("Retry-After", "") or (error.retry_after if isinstance(error, UpstreamBroken) else "")
    return max(1.0, float(said)) if said.isascii() and said.isdigit() else math.inf
