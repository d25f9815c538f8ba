"""A ``kustomization.yaml``, of which ``resources``, ``images`` and ``namespace`` are evaluated, as kustomize evaluates them.

``images``: kustomize ``api/internal/image/image.go`` and ``api/filters/imagetag``; a name is compared as it is, not as the
regular expression that kustomize makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from proxy.kubernetes.documents import Document, DocumentsInvalid
from proxy.kubernetes.pods import Objects, Place, Pod, Use
from proxy.logs import printable

FILE_NAMES = ("kustomization.yaml", "kustomization.yml", "Kustomization")

_EVALUATED = frozenset({"apiVersion", "kind", "resources", "images", "namespace"})
_IMAGE_KEYS = ("name", "newName", "newTag", "digest")


@dataclass(frozen=True, slots=True)
class ImageChange:
    """An item of ``images``; empty is what is not given."""

    name: str
    new_name: str = ""
    new_tag: str = ""
    digest: str = ""

    def of(self, image: str) -> str:
        """What becomes of an image name. A new tag or digest replaces both."""
        name, tag, digest = split(image)
        if name != self.name:
            return image
        if self.new_tag or self.digest:
            tag, digest = self.new_tag, self.digest
        return (self.new_name or name) + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")


@dataclass(frozen=True, slots=True)
class Kustomization:
    """What is evaluated, and the names of the fields that are not."""

    resources: tuple[str, ...] = ()
    images: tuple[ImageChange, ...] = ()
    namespace: str = ""
    not_evaluated: tuple[str, ...] = ()


def split(image: str) -> tuple[str, str, str]:
    """Name, tag and digest, as kustomize takes an image name apart."""
    rest, _, digest = image.partition("@")
    host, slash, path = rest.partition("/")
    name, _, tag = (path if slash else host).partition(":")
    return (f"{host}/{name}" if slash else name), tag, digest


def parse_kustomization(documents: Sequence[Document], source: str) -> Kustomization:
    """The kustomization in a file; raises ``DocumentsInvalid``."""
    value = documents[0].value if len(documents) == 1 else None
    if not isinstance(value, dict):
        raise DocumentsInvalid(f"{source}: one mapping is needed; write for example 'resources: [pod.yaml]'")
    kind = value.get("kind") or "Kustomization"
    if kind not in ("Kustomization", "Component"):
        raise DocumentsInvalid(f"{source}: its kind is not Kustomization")
    resources = _list(value.get("resources"), "resources", source)
    texts = [item for item in resources if isinstance(item, str) and item]
    if len(texts) < len(resources):
        raise DocumentsInvalid(f"{source}: resources: a list of files and directories is needed")
    images = [_image(item, source) for item in _list(value.get("images"), "images", source)]
    namespace = value.get("namespace") or ""
    if not isinstance(namespace, str):
        raise DocumentsInvalid(f"{source}: namespace: a text is needed")
    others = sorted(printable(str(key), 64) for key in value if key not in _EVALUATED)
    return Kustomization(tuple(texts), tuple(images), namespace, tuple(others))


def apply(kustomization: Kustomization, objects: Objects) -> Objects:
    """``objects`` in the namespace and with the images that a kustomization gives them, one item after another."""
    namespace = printable(kustomization.namespace, 253)

    def moved(place: Place) -> Place:
        return replace(place, namespace=namespace) if namespace else place

    def changed(pod: Pod) -> Pod:
        return replace(pod, place=moved(pod.place), uses=tuple(_changed(use, kustomization.images) for use in pod.uses))

    return replace(
        objects,
        pods=tuple(changed(pod) for pod in objects.pods),
        secrets=tuple(replace(secret, place=moved(secret.place)) for secret in objects.secrets),
        problems=tuple(replace(problem, place=moved(problem.place)) for problem in objects.problems),
    )


def _changed(use: Use, images: Sequence[ImageChange]) -> Use:
    if use.field == "ephemeralContainer":  # which kustomize leaves as they are
        return use
    image = use.image
    for change in images:
        image = change.of(image)
    return replace(use, image=image)


def _image(item: object, source: str) -> ImageChange:
    if not isinstance(item, dict) or not item.get("name"):
        raise DocumentsInvalid(f"{source}: images: each needs a name")
    values = []
    for key in _IMAGE_KEYS:
        value = item.get(key)
        if value is not None and not isinstance(value, str):
            raise DocumentsInvalid(f"{source}: images: {key} is not a text; put it in quotes")
        values.append(value or "")
    return ImageChange(*values)


def _list(value: object, key: str, source: str) -> list[object]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise DocumentsInvalid(f"{source}: {key}: a list is needed")
    return value
