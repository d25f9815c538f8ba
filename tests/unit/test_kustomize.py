"""A kustomization: its files, its images, its namespace, and what of it is not evaluated."""

from __future__ import annotations

import io
import os
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.kubernetes.documents import Document, DocumentsInvalid
from proxy.kubernetes.files import FilesUnusable, read_files
from proxy.kubernetes.kustomize import ImageChange, parse_kustomization, split
from proxy.kubernetes.pods import Plan, plan

DIGEST = "sha256:" + "b" * 64
PAGE_POD = """\
apiVersion: v1
kind: Pod
metadata:
  name: foo
  namespace: awesomeapps
spec:
  containers:
    - name: foo
      image: janedoe/awesomeapp:v1
  imagePullSecrets:
    - name: myregistrykey
"""
"""The pod of https://kubernetes.io/docs/concepts/containers/images/ and its kustomization, as the page's commands write
them."""
PAGE_KUSTOMIZATION = """\
resources:
- pod.yaml
"""


def write(directory: Path, **texts: str) -> None:
    """Files; ``__`` in a name is ``/``, and each is YAML unless it has a suffix after ``_dot_``."""
    for name, text in texts.items():
        path = directory / (name.replace("__", "/").replace("_dot_", ".") + ("" if "_dot_" in name else ".yaml"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


def simple(image: str, name: str = "it", kind: str = "containers") -> str:
    """A pod with one image."""
    return f"{{kind: Pod, metadata: {{name: {name}}}, spec: {{{kind}: [{{name: app, image: '{image}'}}]}}}}"


def read(*names: Path | str, stdin: str = "") -> tuple[Plan, tuple[str, ...]]:
    """What is pulled, and what is said."""
    objects, notes = read_files([str(name) for name in names], io.BytesIO(stdin.encode()))
    return plan(objects), notes


def images(found: Plan) -> list[str]:
    """In full, of all pods."""
    return [str(image.name) for pod in found.pods for image in pod.images]


def faults(*names: Path | str) -> tuple[str, ...]:
    """Why they are refused."""
    with pytest.raises(FilesUnusable) as caught:
        read(*names)
    return caught.value.faults


# --- files and directories ---


def test_files_directories_and_standard_input_are_one_input(tmp_path: Path) -> None:
    """A directory: its YAML and JSON by name, and nothing below it."""
    write(
        tmp_path, d__b=simple("b"), d__a_dot_yml=simple("a"), d__c_dot_json='{"kind": "Pod", "spec": {}}', d__n_dot_txt="["
    )
    write(tmp_path, d__below__x=simple("x"), file=simple("f"))
    found, _ = read(tmp_path / "file.yaml", tmp_path / "d", "-", stdin=simple("s"))
    assert images(found) == [f"docker.io/library/{name}:latest" for name in "fabs"]


def test_every_fault_of_every_file_is_named_at_once(tmp_path: Path) -> None:
    write(
        tmp_path, d__bad="a: [", d__worse="b: 'c", d__good=simple("a"), kustomization="resources: [gone.yaml, '/etc/passwd']"
    )
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "fifo")
    lines = faults(tmp_path / "d", tmp_path / "none.yaml", tmp_path / "empty", tmp_path / "fifo", tmp_path, "a\0b")
    assert [line.removeprefix(f"{tmp_path}/") for line in lines] == [
        "d/bad.yaml: line 2, column 1: not YAML",
        "d/worse.yaml: line 1, column 6: not YAML",
        "none.yaml: cannot be read: No such file or directory",
        "empty: no *.yaml, *.yml or *.json in it",
        "fifo: cannot be read: it is not a file",
        "kustomization.yaml: gone.yaml: cannot be read: No such file or directory",
        "kustomization.yaml: resources: /etc/passwd: absolute; write it relative to the kustomization",
        "a?b: no file can have that name",
    ]


# --- kustomizations ---


def test_the_pod_and_the_kustomization_of_the_kubernetes_page(tmp_path: Path) -> None:
    write(tmp_path, pod=PAGE_POD, kustomization=PAGE_KUSTOMIZATION)
    for name in (tmp_path, tmp_path / "kustomization.yaml"):
        found, notes = read(name)
        assert images(found) == ["docker.io/janedoe/awesomeapp:v1"]
        assert notes == ()
        assert found.warnings == (
            f"{tmp_path}/pod.yaml: document 1: Pod awesomeapps/foo: no pull secret myregistrykey in namespace awesomeapps",
        )


@pytest.mark.parametrize(
    ("image", "change", "result"),
    [
        ("app", {"new_tag": "2"}, "app:2"),
        ("app:1", {"new_tag": "2"}, "app:2"),
        (f"app:1@{DIGEST}", {"new_tag": "2"}, "app:2"),
        ("app:1", {"digest": DIGEST}, f"app@{DIGEST}"),
        ("app:1", {"new_tag": "2", "digest": DIGEST}, f"app:2@{DIGEST}"),
        ("app:1", {"new_name": "r.corp:5000/x"}, "r.corp:5000/x:1"),
        (f"app@{DIGEST}", {"new_name": "x"}, f"x@{DIGEST}"),
        ("app", {"new_name": "x"}, "x"),
        ("other/app:1", {"new_tag": "2"}, "other/app:1"),
        ("apps:1", {"new_tag": "2"}, "apps:1"),
        ("", {"new_tag": "2"}, ""),
    ],
)
def test_an_image_is_changed_as_kustomize_does(image: str, change: dict[str, str], result: str) -> None:
    assert ImageChange("app", **change).of(image) == result


def test_the_name_of_a_registry_with_a_port_is_a_part_of_the_name() -> None:
    assert split("r.corp:5000/team/app:1@sha256:x") == ("r.corp:5000/team/app", "1", "sha256:x")
    assert ImageChange("r.corp:5000/app", new_tag="2").of("r.corp:5000/app") == "r.corp:5000/app:2"


def test_changes_are_applied_in_turn_base_first(tmp_path: Path) -> None:
    """A namespace holds for what is below it too, and for secrets."""
    write(
        tmp_path, base__pod=simple("app:1"), base__kustomization="resources: [pod.yaml]\nimages: [{name: app, newTag: '2'}]"
    )
    write(
        tmp_path,
        over__kustomization="""\
            kind: Kustomization
            namespace: team
            resources: [../base]
            images: [{name: app, newName: quay.io/app}, {name: quay.io/app, newTag: '3'}]
            """,
    )
    found, _ = read(tmp_path / "over")
    assert images(found) == ["quay.io/app:3"]
    assert str(found.pods[0].place) == f"{tmp_path}/over/../base/pod.yaml: document 1: Pod team/it"


def test_ephemeral_containers_are_left_as_kustomize_leaves_them(tmp_path: Path) -> None:
    write(tmp_path, a=simple("app:1", kind="ephemeralContainers"), b=simple("app:1", kind="initContainers"))
    write(tmp_path, kustomization="resources: [a.yaml, b.yaml]\nimages: [{name: app, newTag: '2'}]")
    assert images(read(tmp_path)[0]) == ["docker.io/library/app:1", "docker.io/library/app:2"]


def test_what_is_not_evaluated_or_followed_is_named_once(tmp_path: Path) -> None:
    write(
        tmp_path,
        kustomization="""\
            resources: [https://example.com/x.yaml, 'github.com/o/r//base?ref=v1', pod.yaml]
            patches: [{path: x.yaml}, {path: y.yaml}]
            secretGenerator: []
            """,
        pod=simple("app"),
    )
    found, notes = read(tmp_path)
    assert images(found) == ["docker.io/library/app:latest"]
    assert [note.removeprefix(f"{tmp_path}/kustomization.yaml: ") for note in notes] == [
        "'patches' is not evaluated",
        "'secretGenerator' is not evaluated",
        "resources: https://example.com/x.yaml: a URL, which is not followed",
        "resources: github.com/o/r//base?ref=v1: a URL, which is not followed",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("resources: [../outside.yaml]", "a file that is not in or below the directory"),
        ("resources: [link.yaml]", "a file that is not in or below the directory"),
        ("resources: [.]", "a circle of kustomizations"),
        ("resources: [../plain]", "a directory without a kustomization.yaml"),
        ("resources: pod.yaml", "resources: a list is needed"),
        ("resources: [3]", "resources: a list of files and directories is needed"),
        ("images: [{newTag: '1'}]", "images: each needs a name"),
        ("images: [{name: a, newTag: 1.5}]", "images: newTag is not a text; put it in quotes"),
        ("namespace: [a]", "namespace: a text is needed"),
        ("kind: Pod", "its kind is not Kustomization"),
        ("", "one mapping is needed"),
        ("a: 1\n---\nb: 1", "one mapping is needed"),
    ],
)
def test_a_kustomization_that_cannot_be_followed(tmp_path: Path, text: str, fault: str) -> None:
    write(tmp_path, outside=simple("app"), plain__pod=simple("app"), it__kustomization=text)
    (tmp_path / "it/link.yaml").symlink_to(tmp_path / "outside.yaml")
    (line,) = faults(tmp_path / "it")
    assert fault in line
    assert line.startswith(f"{tmp_path}/it/")


def test_a_circle_of_two_is_found(tmp_path: Path) -> None:
    write(tmp_path, a__kustomization="resources: [../b]", b__kustomization="resources: [../a]")
    assert "circle" in faults(tmp_path / "a")[0]


def test_a_tree_of_kustomizations_is_bounded(tmp_path: Path) -> None:
    """Each names the next one ten times; and a chain of a hundred."""
    for number in range(10):
        write(tmp_path, **{f"wide{number}__kustomization": f"resources: [{', '.join([f'../wide{number + 1}'] * 10)}]"})
    for number in range(100):
        write(tmp_path, **{f"deep{number}__kustomization": f"resources: [../deep{number + 1}]"})
    assert "more than 1000 files" in faults(tmp_path / "wide0")[-1]
    assert "within each other" in faults(tmp_path / "deep0")[0]


VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.sampled_from(["Kustomization", "pod.yaml"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["resources", "images", "namespace", "kind", "name", "newTag", "digest"]) | st.integers(),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(VALUES)
def test_whatever_a_kustomization_holds(value: object) -> None:
    """It is understood, or refused by name."""
    fault = "it: "
    try:
        parse_kustomization([Document("it", 1, value)], "it")
    except DocumentsInvalid as error:
        fault = str(error)
    assert fault.startswith("it: ")


@given(
    st.from_regex(r"([a-z.]{1,9}(:[0-9]{1,5})?/)?[a-z/]{1,9}", fullmatch=True),
    st.from_regex(r"(:[A-Za-z0-9_.-]{1,9})?", fullmatch=True),
    st.from_regex(r"(@sha256:[0-9a-f]{1,9})?", fullmatch=True),
)
def test_what_was_put_together_is_taken_apart(name: str, tag: str, digest: str) -> None:
    assert split(name + tag + digest) == (name, tag[1:], digest[1:])
