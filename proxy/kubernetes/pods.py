"""Pods and their images, read from the objects of Kubernetes: which are pulled, how, and with whose secrets.

What the kubelet would do: the images of a pod in the order of ``pkg/kubelet/kuberuntime/kuberuntime_manager.go``
(``SyncPod``), the policy of ``pkg/apis/core/v1/defaults.go``, and of the secrets those of the pod's own namespace
(``pkg/kubelet/kubelet_pods.go``, ``getPullSecretsForPod``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from proxy.config.model import PullPolicy
from proxy.credentials.credential import Credential
from proxy.credentials.docker_config import Entry, SecretInvalid, parse_secret
from proxy.credentials.keyring import Keyring
from proxy.errors import RegistryError
from proxy.image_pull_policy import derived_policy
from proxy.kubernetes.documents import Document
from proxy.logs import printable
from proxy.names import ImageName, parse_image_name

_TEMPLATE = ("spec", "template")
_TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "Pod": (),
    "PodTemplate": ("template",),
    **dict.fromkeys(("Deployment", "ReplicaSet", "ReplicationController", "StatefulSet", "DaemonSet", "Job"), _TEMPLATE),
    "CronJob": ("spec", "jobTemplate", *_TEMPLATE),
}
"""Where the pod is in an object."""

_SECRET_TYPES = ("kubernetes.io/dockerconfigjson", "kubernetes.io/dockercfg")

Field = Literal["volume", "ephemeralContainer", "initContainer", "container"]
"""What of a pod names an image, in the order in which the kubelet pulls."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which object something is about, for people."""

    source: str
    document: int
    kind: str
    name: str
    namespace: str = "default"

    def __str__(self) -> str:
        return f"{self.source}: document {self.document}: {self.kind} {self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Use:
    """An image as it is written. ``policy`` is None where none is."""

    field: Field
    name: str
    image: str
    policy: str | None


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod, or what pods are made from. ``secrets``: the names of its ``imagePullSecrets``."""

    place: Place
    uses: tuple[Use, ...]
    secrets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SecretObject:
    """A Secret that may be a pull secret."""

    place: Place
    content: Mapping[str, object] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that cannot be pulled: ``what`` it is, and ``why``."""

    place: Place
    what: str
    why: str


@dataclass(frozen=True, slots=True)
class Objects:
    """What was found. ``skipped`` counts what has no pods and is no pull secret."""

    pods: tuple[Pod, ...] = ()
    secrets: tuple[SecretObject, ...] = ()
    problems: tuple[Problem, ...] = ()
    skipped: int = 0

    def __add__(self, other: Objects) -> Objects:
        return Objects(
            self.pods + other.pods,
            self.secrets + other.secrets,
            self.problems + other.problems,
            self.skipped + other.skipped,
        )


@dataclass(frozen=True, slots=True)
class PodImage:
    """An image that a pod wants, and what is shown for it, in turn; nothing where ``credentials`` are empty."""

    what: str
    name: ImageName
    policy: PullPolicy
    credentials: tuple[Credential, ...] = ()


@dataclass(frozen=True, slots=True)
class PodPull:
    """The images of one pod, which are pulled one after another."""

    images: tuple[PodImage, ...]
    place: Place | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be pulled, what cannot be, and what is to be said."""

    pods: tuple[PodPull, ...]
    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()


def read_objects(documents: Sequence[Document]) -> Objects:
    """The pods and pull secrets in ``documents``, lists unfolded; what is neither is counted, whatever it is."""
    pods: list[Pod] = []
    secrets: list[SecretObject] = []
    problems: list[Problem] = []
    skipped = 0
    for document in documents:
        for kind, content in _items(document.value, ""):
            place = _place(document, kind, content)
            if kind == "Secret" and content.get("type") in _SECRET_TYPES:
                secrets.append(SecretObject(place, content))
            elif kind not in _TEMPLATES:
                skipped += 1
            elif (spec := _at(content, (*_TEMPLATES[kind], "spec"))) is None:
                problems.append(Problem(place, kind, f"it has no {'.'.join((*_TEMPLATES[kind], 'spec'))}"))
            else:
                pods.append(Pod(place, tuple(_uses(spec)), tuple(_secret_names(spec))))
    return Objects(tuple(pods), tuple(secrets), tuple(problems), skipped)


def plan(objects: Objects) -> Plan:
    """What is pulled for ``objects``: names parsed, policies derived, secrets found.

    A secret that is not there, or in another namespace only, is a warning, and the pull goes on without it, as the kubelet's
    does (``FailedToRetrieveImagePullSecret``). One that cannot be decoded fails the pulls of its pods, as there.
    """
    pods: list[PodPull] = []
    problems = list(objects.problems)
    warnings: dict[str, None] = {}
    for pod in objects.pods:
        fault, keyring = "", Keyring()
        try:
            keyring = Keyring(_entries(pod, objects.secrets, warnings))
        except SecretInvalid as error:
            fault = str(error)
        images: list[PodImage] = []
        for use in pod.uses:
            what = f"{use.field} {use.name}"
            try:
                if fault:
                    raise _Unusable(fault)
                images.append(_image(use, what, keyring))
            except _Unusable as error:
                problems.append(Problem(pod.place, what, str(error)))
        pods.append(PodPull(tuple(images), pod.place))
    return Plan(tuple(pods), tuple(problems), tuple(warnings))


class _Unusable(Exception):
    """Why an image cannot be pulled."""


def _image(use: Use, what: str, keyring: Keyring) -> PodImage:
    if not use.image:
        raise _Unusable("InvalidImageName: no image is named there")
    try:
        name = parse_image_name(use.image)
    except RegistryError as error:
        raise _Unusable(f"InvalidImageName: {printable(use.image, 256)}: {error.message}") from None
    policy = use.policy or derived_policy(name.tag, name.digest)
    for known in get_args(PullPolicy):
        if policy == known:
            found = dict.fromkeys(entry.credential for entry in keyring.matching(f"{name.host}/{name.repository}"))
            return PodImage(what, name, known, tuple(credential for credential in found if credential is not None))
    raise _Unusable(f"imagePullPolicy: {printable(policy, 64)} is none of {', '.join(get_args(PullPolicy))}")


def _entries(pod: Pod, secrets: Sequence[SecretObject], warnings: dict[str, None]) -> list[Entry]:
    """What the pod's secrets hold, in its order; raises ``SecretInvalid``."""
    entries: list[Entry] = []
    for name in dict.fromkeys(pod.secrets):
        named = {secret.place.namespace: secret for secret in secrets if secret.place.name == name}
        if (secret := named.get(pod.place.namespace)) is not None:
            entries += parse_secret(secret.content, f"{secret.place.source}: Secret {secret.place.namespace}/{name}").entries
            continue
        others = ", ".join(sorted(named))
        there = f"; the one in namespace {others} is not used for it" if named else ""
        warnings[f"{pod.place}: no pull secret {name} in namespace {pod.place.namespace}{there}"] = None
    return entries


def _items(value: object, kind: str, depth: int = 0) -> Iterator[tuple[str, Mapping[str, object]]]:
    """The objects in a value: itself, or those of a list; the items of a typed list need not say their kind."""
    content = _mapping(value)
    if content is None:
        yield "", {}
        return
    said = content.get("kind")
    kind = said if isinstance(said, str) else kind
    items = content.get("items")
    if kind.endswith("List") and isinstance(items, list) and depth < 8:
        for item in items:
            yield from _items(item, kind.removesuffix("List"), depth + 1)
    else:
        yield kind, content


def _place(document: Document, kind: str, content: Mapping[str, object]) -> Place:
    metadata = _mapping(content.get("metadata")) or {}
    name = metadata.get("name") or metadata.get("generateName")
    namespace = metadata.get("namespace")
    return Place(
        document.source,
        document.number,
        kind,
        printable(name, 253) if isinstance(name, str) else "(without a name)",
        printable(namespace, 253) if isinstance(namespace, str) and namespace else "default",
    )


def _uses(spec: Mapping[str, object]) -> Iterator[Use]:
    for volume in _list(spec, "volumes"):
        if (source := _mapping(volume.get("image"))) is not None:
            yield _use("volume", volume, source, "reference", "pullPolicy")
    fields: tuple[tuple[Field, str], ...] = (
        ("ephemeralContainer", "ephemeralContainers"),
        ("initContainer", "initContainers"),
        ("container", "containers"),
    )
    for kind, key in fields:
        for container in _list(spec, key):
            yield _use(kind, container, container, "image", "imagePullPolicy")


def _use(kind: Field, named: Mapping[str, object], source: Mapping[str, object], image: str, policy: str) -> Use:
    name, written, said = named.get("name"), source.get(image), source.get(policy)
    return Use(
        kind,
        printable(name, 63) if isinstance(name, str) else "(without a name)",
        written if isinstance(written, str) else "",
        said if isinstance(said, str) or said is None else "what is not a text",
    )


def _secret_names(spec: Mapping[str, object]) -> Iterator[str]:
    for reference in _list(spec, "imagePullSecrets"):
        if isinstance(name := reference.get("name"), str) and name:
            yield printable(name, 253)


def _at(content: Mapping[str, object], path: Sequence[str]) -> Mapping[str, object] | None:
    found: Mapping[str, object] | None = content
    for key in path:
        found = None if found is None else _mapping(found.get(key))
    return found


def _mapping(value: object) -> Mapping[str, object] | None:
    return value if isinstance(value, dict) else None


def _list(content: Mapping[str, object], key: str) -> list[Mapping[str, object]]:
    """The mappings in a list; in the place of what is none, an empty one."""
    value = content.get(key)
    return [_mapping(item) or {} for item in value] if isinstance(value, list) else []
