"""Pods, images and pull secrets, read from the objects of Kubernetes."""

from __future__ import annotations

import base64
import json
import textwrap
import time
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.kubernetes.documents import DocumentsInvalid, parse_documents
from proxy.kubernetes.pods import Plan, plan, read_objects

CANARY = "c4n4ry-password"
DIGEST = "sha256:" + "a" * 64


def planned(*texts: str) -> Plan:
    """What is pulled for these files."""
    documents = [
        document
        for number, text in enumerate(texts)
        for document in parse_documents(textwrap.dedent(text).encode(), f"f{number}.yaml")
    ]
    return plan(read_objects(documents))


def refused(text: str) -> str:
    """Why a file is."""
    with pytest.raises(DocumentsInvalid) as caught:
        planned(text)
    assert caught.value.__cause__ is None
    assert CANARY not in f"{caught.value}"
    return str(caught.value)


def images(found: Plan) -> list[list[tuple[str, str, str]]]:
    """By pod: what, image in full, policy."""
    return [[(image.what, str(image.name), image.policy) for image in pod.images] for pod in found.pods]


def pod(spec: dict[str, Any], kind: str = "Pod", **metadata: str) -> dict[str, Any]:
    """An object of a kind that holds a pod."""
    template: dict[str, Any] = {"spec": spec}
    inner = {
        "Pod": template,
        "PodTemplate": {"template": template},
        "CronJob": {"spec": {"jobTemplate": {"spec": {"template": template}}}},
    }.get(kind, {"spec": {"template": template}})
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": "it", **metadata}, **inner}


def container(image: object, **keys: object) -> dict[str, Any]:
    """A pod's spec with one container."""
    return {"containers": [{"name": "app", "image": image, **keys}]}


def pull_secret(
    name: str, namespace: str = "default", registry: str = "registry.corp", plain: bool = False, **keys: Any
) -> dict[str, Any]:
    """A Secret as kubectl creates it."""
    content = json.dumps({"auths": {registry: {"username": name, "password": CANARY}}})
    data = {"stringData": {".dockerconfigjson": content}} if plain else {}
    encoded = base64.b64encode(content.encode()).decode()
    return {
        "kind": "Secret",
        "type": "kubernetes.io/dockerconfigjson",
        "metadata": {"name": name, "namespace": namespace},
        "data": {".dockerconfigjson": encoded},
        **data,
        **keys,
    }


def dump(*values: object) -> str:
    """Documents as YAML."""
    return yaml.safe_dump_all(values)


KINDS = (
    "Pod",
    "PodTemplate",
    "Deployment",
    "ReplicaSet",
    "ReplicationController",
    "StatefulSet",
    "DaemonSet",
    "Job",
    "CronJob",
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_that_holds_a_pod(kind: str) -> None:
    """By itself, in a List, and in the typed list of its kind, whose items say no kind."""
    it = pod(container("debian:12"), kind, namespace="team")
    bare = {key: value for key, value in it.items() if key not in ("kind", "apiVersion")}
    found = planned(dump(it, {"kind": "List", "items": [it]}, {"kind": f"{kind}List", "items": [bare]}))
    assert images(found) == [[("container app", "docker.io/library/debian:12", "IfNotPresent")]] * 3
    assert not found.problems
    assert [str(each.place) for each in found.pods] == [
        f"f0.yaml: document {number}: {kind} team/it" for number in (1, 2, 3)
    ]


def test_everything_in_a_pod_that_names_an_image_in_the_order_of_the_kubelet() -> None:
    spec = {
        "containers": [{"name": "app", "image": "a"}],
        "initContainers": [{"name": "setup", "image": "i:1"}],
        "ephemeralContainers": [{"name": "debug", "image": "e:1", "imagePullPolicy": "Never"}],
        "volumes": [
            {"name": "model", "image": {"reference": "v:1", "pullPolicy": "Always"}},
            {"name": "other", "emptyDir": {}},
        ],
    }
    assert images(planned(dump(pod(spec)))) == [
        [
            ("volume model", "docker.io/library/v:1", "Always"),
            ("ephemeralContainer debug", "docker.io/library/e:1", "Never"),
            ("initContainer setup", "docker.io/library/i:1", "IfNotPresent"),
            ("container app", "docker.io/library/a:latest", "Always"),
        ]
    ]


@pytest.mark.parametrize(
    ("image", "written", "policy"),
    [
        ("app", None, "Always"),
        ("app:latest", None, "Always"),
        ("app:1", None, "IfNotPresent"),
        (f"app@{DIGEST}", None, "IfNotPresent"),
        (f"app:1@{DIGEST}", None, "IfNotPresent"),
        (f"app:latest@{DIGEST}", None, "Always"),
        ("app:latest", "IfNotPresent", "IfNotPresent"),
        ("app:latest", "Never", "Never"),
        ("app:1", "Always", "Always"),
        ("app:1", "", "IfNotPresent"),
    ],
)
def test_the_policy_is_the_one_written_else_derived(image: str, written: str | None, policy: str) -> None:
    keys = {} if written is None else {"imagePullPolicy": written}
    assert images(planned(dump(pod(container(image, **keys)))))[0][0][2] == policy


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (container("Bad/Name"), "InvalidImageName: Bad/Name"),
        (container("app:"), "InvalidImageName: app:"),
        (container("a" * 64), "image ID"),
        (container("app\x1b[31m"), "app?[31m"),
        (container(12), "no image is named"),
        ({"containers": [{"name": "app"}]}, "no image is named"),
        (container("app", imagePullPolicy="always"), "imagePullPolicy: always is none of Always, IfNotPresent, Never"),
        (container("app", imagePullPolicy=True), "not a text"),
    ],
)
def test_what_cannot_be_pulled_is_named_and_the_rest_goes_on(spec: dict[str, Any], why: str) -> None:
    found = planned(dump({}, pod({**spec, "initContainers": [{"name": "fine", "image": "b:1"}]})))
    (problem,) = found.problems
    assert str(problem.place) == "f0.yaml: document 2: Pod default/it"
    assert problem.what == "container app"
    assert why in problem.why
    assert [image[0] for image in images(found)[0]] == ["initContainer fine"]


def test_a_workload_without_its_pod_is_named() -> None:
    (problem,) = planned("{kind: Deployment, metadata: {name: it}, spec: {template: 3}}").problems
    assert problem.why == "it has no spec.template.spec"


def test_what_has_no_pods_is_counted() -> None:
    text = """\
        kind: Service
        ---
        ---
        just a text
        ---
        [a, b]
        ---
        {kind: Secret, type: Opaque, metadata: {name: it}}
        ---
        {kind: List, items: [1, {kind: ConfigMap}]}
        """
    found = read_objects(parse_documents(textwrap.dedent(text).encode(), "it"))
    assert (found.skipped, found.pods, found.problems) == (6, (), ())


# --- secrets ---


def shown(*values: object) -> tuple[list[str], Plan]:
    """The users that are shown for the first image, in turn."""
    found = planned(dump(*values))
    return [credential.username for credential in found.pods[0].images[0].credentials], found


def wanting(*names: str, image: str = "registry.corp/team/app:1", namespace: str = "default") -> dict[str, Any]:
    """A pod with these ``imagePullSecrets``."""
    return pod({**container(image), "imagePullSecrets": [{"name": name} for name in names]}, namespace=namespace)


@pytest.mark.parametrize("plain", [False, True])
def test_the_secret_of_a_pod_is_shown(plain: bool) -> None:
    users, found = shown(wanting("one"), pull_secret("one", plain=plain))
    assert users == ["one"]
    assert not found.warnings


def test_the_older_kind_of_secret_is_shown() -> None:
    content = json.dumps({"registry.corp": {"username": "old", "password": CANARY}})
    secret = pull_secret("one", type="kubernetes.io/dockercfg", stringData={".dockercfg": content})
    assert shown(wanting("one"), secret)[0] == ["old"]


def test_several_that_match_are_shown_in_turn_as_the_kubelet_orders_them() -> None:
    """Longer keys first; what is for another registry, and what no pod names, is not shown."""
    users, _ = shown(
        wanting("other", "one", "two", "path"),
        pull_secret("unnamed"),
        pull_secret("two"),
        pull_secret("one"),
        pull_secret("path", registry="registry.corp/team"),
        pull_secret("other", registry="quay.io"),
    )
    assert users == ["path", "one", "two"]


@pytest.mark.parametrize(
    ("values", "warning"),
    [
        ([wanting("one")], "no pull secret one in namespace default"),
        (
            [wanting("one"), pull_secret("one", "team")],
            "no pull secret one in namespace default; the one in namespace team is not used for it",
        ),
        (
            [wanting("one", namespace="team"), pull_secret("one")],
            "no pull secret one in namespace team; the one in namespace default is not used for it",
        ),
    ],
)
def test_a_secret_that_is_not_there_is_a_warning_and_the_pull_goes_on(values: list[object], warning: str) -> None:
    users, found = shown(*values)
    assert users == []
    assert len(found.warnings) == 1
    assert found.warnings[0].endswith(warning)
    assert not found.problems


@pytest.mark.parametrize(
    "broken",
    [
        {"data": {".dockerconfigjson": CANARY}},
        {"data": {".dockerconfigjson": base64.b64encode(f'{{"auths": "{CANARY}'.encode()).decode()}},
        {"data": {}},
        {"data": 3},
        {"stringData": {".dockerconfigjson": 3}},
    ],
)
def test_a_secret_that_cannot_be_decoded_fails_its_pods_and_no_others(broken: dict[str, Any]) -> None:
    found = planned(dump(wanting("one"), pod(container("b:1")), pull_secret("one", **broken)))
    (problem,) = found.problems
    assert problem.what == "container app"
    assert "Secret default/one" in problem.why
    assert [len(each.images) for each in found.pods] == [0, 1]
    assert CANARY not in repr(found)


def test_no_secret_is_in_what_is_shown_of_these_values() -> None:
    documents = parse_documents(dump(wanting("one"), pull_secret("one")).encode(), "it")
    objects = read_objects(documents)
    text = repr((documents, objects, plan(objects)))
    assert CANARY not in text
    assert base64.b64encode(CANARY.encode()).decode()[:8] not in text


# --- what is no YAML, or too much of it ---


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (f"a: 1\nb: [{CANARY}\nc: 3\n", "f0.yaml: line 3, column 2: not YAML"),
        (f"a: 1\npassword: '{CANARY}\n", "f0.yaml: line 3, column 1: not YAML"),
        (f"a: *{CANARY}\n", "line 1, column 4: not YAML"),
        (f"a: !{CANARY} b\n", "line 1, column 4: not YAML"),
        (f"ok: 1\n---\n{CANARY}: 1\n{CANARY}: 2\n", "line 3: a key stands twice"),
        (f'{{"{CANARY}": 1, "{CANARY}": 2}}', "a key stands twice"),
        ("a: &a [*a]\n", "it holds itself"),
        ("a: \x00\n", "line 1"),
        ("[" * 200_000, "nested too deep"),
        ("a:\n " + "[" * 200_000, "line 2: nested too deep"),
        ('{"a": "\\ud800"}', "not Unicode"),
        ("a: 0b_\n", "line 1: a number in it is none"),
    ],
)
def test_what_cannot_be_read_is_named_by_file_and_line_and_not_quoted(text: str, fault: str) -> None:
    assert fault in refused(text)


def test_text_that_is_not_utf8_is_refused_by_its_line() -> None:
    with pytest.raises(DocumentsInvalid, match="it: line 2: not UTF-8"):
        parse_documents(b"a: 1\nb: \xff\n", "it")


@pytest.mark.parametrize("form", ["[{}]", "{{<<: [{}]}}"])
def test_a_bomb_of_aliases_is_refused_at_once(form: str) -> None:
    """What it stands for has 10^20 values; also where the keys are merged."""
    lines = ["a0: &a0 {x: y}"]
    lines += [f"a{n}: &a{n} " + form.format(", ".join([f"*a{n - 1}"] * 10)) for n in range(1, 20)]
    began = time.monotonic()
    assert "too many values, perhaps by its aliases" in refused("\n".join(lines))
    assert time.monotonic() - began < 30


def test_a_chain_of_aliases_is_not_followed_without_end() -> None:
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 20_000)]
    assert "too many values" in refused("\n".join(lines))


def test_aliases_and_merged_keys_mean_what_they_stand_for() -> None:
    found = planned("""\
        base: &base {image: "debian:12", imagePullPolicy: Always}
        kind: Pod
        metadata: {name: it}
        spec: {containers: [{<<: *base, name: app, imagePullPolicy: Never}]}
        """)
    assert images(found) == [[("container app", "docker.io/library/debian:12", "Never")]]


def test_a_date_is_a_text_as_in_kubernetes() -> None:
    found = planned("{kind: Pod, metadata: {name: 2024-01-01}, spec: {containers: [{name: a, image: 2024-01-01}]}}")
    assert images(found)[0][0][1] == "docker.io/library/2024-01-01:latest"


WORDS = st.sampled_from(
    [
        *KINDS,
        *("List", "PodList", "Secret", "kind", "items", "metadata", "name", "namespace", "spec", "template", "containers"),
        *("jobTemplate", "initContainers", "ephemeralContainers", "volumes", "image", "reference", "imagePullPolicy"),
        *("imagePullSecrets", "type", "data", "stringData", ".dockerconfigjson", "kubernetes.io/dockerconfigjson", "Always"),
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | WORDS | st.dates()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | SCALARS, inner, max_size=6), max_leaves=30
)


def outcome(text: bytes) -> str:
    """Empty where there is a plan, else the declared error; no other comes out."""
    try:
        plan(read_objects(parse_documents(text, "it")))
    except DocumentsInvalid as error:
        return str(error)
    return ""


@given(st.lists(VALUES, max_size=3))
def test_whatever_objects_come_there_is_a_plan(values: list[object]) -> None:
    """But for keys that are no texts, of which two may look the same."""
    assert outcome(yaml.safe_dump_all(values).encode()) in (
        "",
        *(f"it: line {n}: a key stands twice in one mapping" for n in range(99)),
    )


@given(st.binary(max_size=200) | st.text(alphabet="{}[]:,-&*!|>'\"%@`#? \nab0.<~", max_size=60).map(str.encode))
@example(b"? [a]\n: b")
@example(b"<<: 3")
@example(b"!!binary x")
@example(b"!!set {a, b}")
def test_whatever_text_comes_there_is_a_plan_or_the_declared_error(text: bytes) -> None:
    assert (outcome(text) or "it: ").startswith("it: ")
