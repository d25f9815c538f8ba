"""Pull secrets: each form is read as Kubernetes reads it, and what cannot be read is refused without a word of it."""

from __future__ import annotations

import base64
import json
import traceback
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.credentials.credential import Credential
from proxy.credentials.docker_config import (
    DockerConfig,
    Entry,
    SecretInvalid,
    parse_docker_config,
    parse_dockercfg,
    parse_file,
)

SOURCE = "/etc/pull/secret"
REGISTRY = "registry.example.com"
PARSERS = (parse_docker_config, parse_dockercfg, parse_file)
Parser = Callable[[bytes, str], DockerConfig]

KUBECTL = b"""\
apiVersion: v1
data:
  .dockerconfigjson: eyJhdXRocyI6eyJyZWdpc3RyeS5leGFtcGxlLmNvbSI6eyJ1c2VybmFtZSI6InJvYm90IiwicGFzc3dvcmQiOiJwOmEgw59cInMiLC\
JlbWFpbCI6ImFAYi5jIiwiYXV0aCI6ImNtOWliM1E2Y0RwaElNT2ZJbk09In19fQ==
kind: Secret
metadata:
  creationTimestamp: null
  name: regcred
type: kubernetes.io/dockerconfigjson
"""
"""What ``kubectl create secret docker-registry --dry-run=client -o yaml`` (1.32) wrote for robot and ``p:a ß"s``."""


def entry(username: str, password: str, registry: str = REGISTRY) -> Entry:
    return Entry(registry, Credential(username, password))


def base64_of(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def docker_config(fields: object, registry: str = REGISTRY) -> bytes:
    return json.dumps({"auths": {registry: fields}}).encode()


def secret(type_: str = "kubernetes.io/dockerconfigjson", **rest: object) -> bytes:
    return json.dumps({"apiVersion": "v1", "kind": "Secret", "type": type_, **rest}).encode()


@pytest.mark.parametrize(
    ("auth", "expected"),
    [
        pytest.param("Zm9vOmJhcg==", ("foo", "bar"), id="padded"),
        pytest.param("Zm9vOmJhcg", ("foo", "bar"), id="unpadded"),
        pytest.param("Zm9vOmJhcmI=", ("foo", "barb"), id="padded-by-one"),
        pytest.param("Zm9vOmJhcmI", ("foo", "barb"), id="unpadded-by-one"),
        pytest.param("cGluZzpwb25n", ("ping", "pong"), id="needs-no-padding"),
        pytest.param("Zm9vOm\nJhcg==\n", ("foo", "bar"), id="newlines-are-skipped-in-padded"),
        pytest.param("Zm9v\r\nOmJhcg\r\n", ("foo", "bar"), id="newlines-are-skipped-in-unpadded"),
        pytest.param("Zm9vOmJhcg=\n=", ("foo", "bar"), id="newline-inside-the-padding"),
        pytest.param("Zm9vOmJhch==", ("foo", "bar"), id="bits-after-the-last-byte-are-ignored"),
        pytest.param(base64_of("foo:bar\n"), ("foo", "bar\n"), id="an-encoded-newline-stays-in-the-password"),
        pytest.param(base64_of("foo:b:a:r"), ("foo", "b:a:r"), id="split-at-the-first-colon"),
        pytest.param(base64_of("foo:"), ("foo", ""), id="empty-password"),
        pytest.param(base64_of(":bar"), ("", "bar"), id="empty-user"),
        pytest.param(base64_of("r\u00f6b:\u00df"), ("r\u00f6b", "\u00df"), id="utf-8"),
        pytest.param("Zm9vOmI/Pz8+", ("foo", "b???>"), id="standard-alphabet"),
        pytest.param("Zm9vOmI_Pz8-", None, id="url-safe-alphabet-is-not-taken"),
        pytest.param("Zm9vOmJhcg== ", None, id="space-after"),
        pytest.param(" Zm9vOmJhcg==", None, id="space-before"),
        pytest.param("Zm9v OmJhcg==", None, id="space-within"),
        pytest.param("Zm9vOmJhcg==\t", None, id="tab-after"),
        pytest.param("Zm9vOmJhcg=", None, id="half-padded"),
        pytest.param("Zm9vOmJhcg===", None, id="padded-too-much"),
        pytest.param("cGluZzpwb25n=", None, id="padded-where-nothing-is-missing"),
        pytest.param("Zm9vOmJhcg==Zm9v", None, id="text-after-the-padding"),
        pytest.param("Zm9vO", None, id="five-characters-are-no-bytes"),
        pytest.param("====", None, id="padding-alone"),
        pytest.param("\n", None, id="newline-alone"),
        pytest.param("pants", None, id="no-base64"),
        pytest.param("cGFudHM=", None, id="no-colon"),
        pytest.param("\u0416m9vOmJhcg==", None, id="foreign-letter"),
        pytest.param(base64.b64encode(b"foo:\xff").decode(), None, id="not-utf-8"),
    ],
)
def test_auth_is_decoded_as_kubernetes_does(auth: str, expected: tuple[str, str] | None) -> None:
    """kubernetes ``pkg/credentialprovider/config.go``, ``decodeDockerConfigFieldAuth``, and Go's ``encoding/base64``."""
    text = docker_config({"auth": auth})
    if expected is None:
        with pytest.raises(SecretInvalid, match=f"^{SOURCE}: 'auth' of the entry '{REGISTRY}' .*; write it again with"):
            parse_docker_config(text, SOURCE)
    else:
        assert parse_docker_config(text, SOURCE).entries == (entry(*expected),)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({"username": "foo", "password": "bar", "email": "a@b"}, Credential("foo", "bar"), id="plain"),
        pytest.param(
            {"username": "foo", "password": "bar", "auth": base64_of("ping:pong")},
            Credential("ping", "pong"),
            id="auth-goes-before-the-plain-ones",
        ),
        pytest.param({"username": "foo", "password": "bar", "auth": ""}, Credential("foo", "bar"), id="empty-auth"),
        pytest.param({"username": "foo", "password": "bar", "auth": None}, Credential("foo", "bar"), id="null-auth"),
        pytest.param({"username": "foo"}, Credential("foo", ""), id="user-without-password"),
        pytest.param({"password": "bar"}, Credential("", "bar"), id="password-without-user"),
        pytest.param({"Username": "foo", "PASSWORD": "bar"}, Credential("foo", "bar"), id="names-of-fields-have-no-case"),
        pytest.param(
            {"username": "foo", "password": "bar", "registrytoken": 1, "x": [{}]},
            Credential("foo", "bar"),
            id="unknown-fields-of-any-kind",
        ),
        pytest.param({"identitytoken": "opaque"}, Credential(identity_token="opaque"), id="identity-token"),
        pytest.param(
            {"auth": base64_of("00000000-0000-0000-0000-000000000000:"), "identitytoken": "opaque"},
            Credential(identity_token="opaque"),
            id="identity-token-as-an-azure-login-writes-it",
        ),
        pytest.param({"identitytoken": "", "auth": base64_of("a:b")}, Credential("a", "b"), id="empty-identity-token"),
        pytest.param({}, None, id="nothing"),
        pytest.param(None, None, id="null"),
        pytest.param({"username": "", "password": ""}, None, id="empty-user-and-password"),
        pytest.param({"auth": base64_of(":")}, None, id="a-colon-alone"),
        pytest.param({"email": "a@b", "registrytoken": "t"}, None, id="nothing-that-kubernetes-reads"),
    ],
)
def test_an_entry_is_what_its_fields_say(fields: object, expected: Credential | None) -> None:
    """An entry with nothing usable in it is left out: ``docker login`` writes ``{}`` beside a ``credsStore``."""
    config = parse_docker_config(docker_config(fields), SOURCE)
    assert config.entries == (() if expected is None else (Entry(REGISTRY, expected),))
    assert parse_dockercfg(json.dumps({REGISTRY: fields}).encode(), SOURCE) == config


def test_an_entry_says_where_it_is_from() -> None:
    for found in parse_file(docker_config({"username": "foo"}, "https://index.docker.io/v1/"), SOURCE).entries:
        assert found.credential is not None
        assert found.source == found.credential.source == SOURCE
        assert found.registry == found.credential.registry == "https://index.docker.io/v1/"
        assert found.repositories == ()


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("https://robot:hunter2@registry.example.com/v1/", "https://registry.example.com/v1/"),
        ("robot:hunter2@registry.example.com", "registry.example.com"),
        ("a@b:hunter2@registry.example.com", "registry.example.com"),
        ("registry.example.com/a@b", "registry.example.com/a@b"),
    ],
)
def test_a_user_in_a_key_is_not_kept(key: str, shown: str) -> None:
    """It does not count for matching, and a password that stands there would be shown to people with the key."""
    (found,) = parse_docker_config(docker_config({"username": "foo"}, key), SOURCE).entries
    assert found.registry == shown
    assert "hunter2" not in repr(found)
    config = json.dumps({"credHelpers": {key: "pass"}}).encode()
    assert parse_docker_config(config, SOURCE).entries == (Entry(shown, helper="pass"),)


def test_the_content_is_not_in_any_repr() -> None:
    config = parse_file(docker_config({"username": "robot", "password": "hunter2", "identitytoken": "opaque"}), SOURCE)
    assert not [word for word in ("robot", "hunter2", "opaque") if word in repr(config)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param({"auths": {}}, DockerConfig(()), id="docker-logout"),
        pytest.param({"auths": None}, DockerConfig(()), id="null"),
        pytest.param({}, DockerConfig(()), id="empty-object"),
        pytest.param(
            {"auths": {"a.example": {"username": "a"}, "b.example": {"username": "b"}}},
            DockerConfig((entry("a", "", "a.example"), entry("b", "", "b.example"))),
            id="order-of-the-file",
        ),
        pytest.param(
            {"HttpHeaders": {"User-Agent": 1}, "psFormat": "x", "auths": {"a.example": {"username": "a"}}},
            DockerConfig((entry("a", "", "a.example"),)),
            id="other-keys-are-ignored",
        ),
        pytest.param(
            {"credsStore": "secretservice", "auths": {"a.example": {}}},
            DockerConfig((), "secretservice"),
            id="store-beside-empty-entries",
        ),
        pytest.param({"credsStore": ""}, DockerConfig(()), id="empty-store"),
        pytest.param(
            {"credHelpers": {"b.example": "ecr-login"}, "auths": {"a.example": {"username": "a"}}},
            DockerConfig((Entry("b.example", helper="ecr-login"), entry("a", "", "a.example"))),
            id="helper-first",
        ),
        pytest.param(
            {"auths": {"a.example": {"username": "a"}}, "credHelpers": {"a.example": "x.Y_z-1"}},
            DockerConfig((Entry("a.example", helper="x.Y_z-1"),)),
            id="helper-in-place-of-the-entry-of-its-key",
        ),
        pytest.param(
            {"auths": {"a.example": {"username": "a"}}, "credHelpers": {"a.example": ""}},
            DockerConfig((entry("a", "", "a.example"),)),
            id="helper-without-a-name-is-none",
        ),
        pytest.param({"AUTHS": {"A.example": {"username": "a"}}}, DockerConfig((entry("a", "", "A.example"),)), id="case"),
    ],
)
def test_a_docker_config_holds(config: object, expected: DockerConfig) -> None:
    assert parse_docker_config(json.dumps(config).encode(), SOURCE) == expected


INNER = docker_config({"username": "foo", "password": "bar"}).decode()
FLAT = json.dumps({REGISTRY: {"username": "foo", "password": "bar"}})


@pytest.mark.parametrize(
    "manifest",
    [
        pytest.param(secret(data={".dockerconfigjson": base64_of(INNER)}), id="dockerconfigjson"),
        pytest.param(secret("kubernetes.io/dockercfg", data={".dockercfg": base64_of(FLAT)}), id="dockercfg"),
        pytest.param(secret(stringData={".dockerconfigjson": INNER}), id="stringData"),
        pytest.param(
            secret(stringData={".dockerconfigjson": INNER}, data={".dockerconfigjson": "e30="}), id="stringData-goes-first"
        ),
        pytest.param(secret(stringData=None, data={".dockerconfigjson": base64_of(INNER)}), id="stringData-null"),
        pytest.param(
            secret(stringData={"other": "x"}, data={".dockerconfigjson": base64_of(INNER)}), id="stringData-of-another-key"
        ),
        pytest.param(
            json.dumps(json.loads(secret(stringData={".dockerconfigjson": INNER})), indent="\t").encode(), id="tabs"
        ),
        pytest.param(
            b"# ours\n---\nkind: Secret\ntype: kubernetes.io/dockerconfigjson\ndata:\n  .dockerconfigjson: |\n    "
            + base64.encodebytes(INNER.encode()).replace(b"\n", b"\n    "),
            id="yaml-in-lines",
        ),
        pytest.param(
            b"kind: Secret\ntype: kubernetes.io/dockerconfigjson\nstringData:\n  .dockerconfigjson: |\n    "
            + INNER.encode(),
            id="yaml-stringData",
        ),
    ],
)
def test_a_secret_manifest_is_read(manifest: bytes) -> None:
    config = parse_file(manifest, SOURCE)
    assert config.entries == (entry("foo", "bar"),)
    assert config.entries[0].source == SOURCE


def test_what_kubectl_writes_is_read_as_it_is() -> None:
    assert parse_file(KUBECTL, SOURCE).entries == (entry("robot", 'p:a \u00df"s'),)


@pytest.mark.parametrize("text", [INNER, FLAT, "\n " + INNER, " \t\r\n" + FLAT])
def test_a_file_tells_what_it_is(text: str) -> None:
    assert parse_file(text.encode(), SOURCE).entries == (entry("foo", "bar"),)


@pytest.mark.parametrize("key", ["credHelpers", "credsStore", "auths", "AUTHS"])
def test_a_file_with_a_key_of_docker_is_a_docker_config(key: str) -> None:
    assert parse_file(json.dumps({key: None, "currentContext": "x"}).encode(), SOURCE) == DockerConfig(())


DEEP = b'{"a":' * 100_000

FAULTS = [
    (parse_docker_config, b"", "empty"),
    (parse_docker_config, b" \n", "empty"),
    (parse_docker_config, b"{", "line 1 column 2: not JSON"),
    (parse_docker_config, b'{"auths": {}}\n}', "line 2 column 1: not JSON"),
    (parse_docker_config, b'{"auths": {"a": {"auth": "x\ny"}}}', "line 1 column 28: not JSON"),
    (parse_docker_config, b"[]", "not a JSON object"),
    (parse_docker_config, b"null", "not a JSON object"),
    (parse_docker_config, b'"auths"', "not a JSON object"),
    (parse_docker_config, b'{"auths": []}', "auths is not an object"),
    (parse_docker_config, b'{"auths": "x"}', "auths is not an object"),
    (parse_docker_config, b'{"auths": {"a.example": "x"}}', "the entry 'a.example' is not an object"),
    (parse_docker_config, b'{"auths": {"a.example": []}}', "the entry 'a.example' is not an object"),
    (parse_docker_config, docker_config({"email": False}), "'email' of the entry 'registry.example.com' is not a text"),
    (parse_docker_config, docker_config({"username": 1}), "'username' of the entry 'registry.example.com' is not a text"),
    (parse_docker_config, docker_config({"password": 1.5}), "'password' of the entry 'registry.example.com' is not a text"),
    (parse_docker_config, docker_config({"auth": {}}), "'auth' of the entry 'registry.example.com' is not a text"),
    (parse_docker_config, docker_config({"identitytoken": []}), "'identitytoken' of the entry"),
    (parse_docker_config, b'{"auths": {"a\\nb": 1}}', "an entry whose key is not a registry's name is not an object"),
    (parse_docker_config, b'{"auths": {"a.example": {}, "a.example": {}}}', "an object has a key twice"),
    (parse_docker_config, b'{"auths": {}, "auths": {}}', "an object has a key twice"),
    (parse_docker_config, b'{"auths": {"a": {"x": NaN}}}', "not JSON that can be read"),
    (parse_docker_config, b'{"x": -Infinity}', "not JSON that can be read"),
    (parse_docker_config, b'{"x": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
    (parse_docker_config, DEEP, "not JSON that can be read"),
    (parse_docker_config, b"{" + b" " * 2 * 1024 * 1024, "larger than 2 MiB"),
    (parse_docker_config, b'{"auths": {"\xff": {}}}', "not UTF-8"),
    (parse_docker_config, "{}".encode("utf-16"), "not UTF-8"),
    (parse_docker_config, docker_config({"password": "\ud800"}), "not UTF-8"),
    (parse_docker_config, docker_config({}, "\udfff"), "not UTF-8"),
    (parse_docker_config, b'{"credsStore": "../sh"}', "credsStore is not the name of a program"),
    (parse_docker_config, b'{"credsStore": "a\\u0000b"}', "credsStore is not the name of a program"),
    (parse_docker_config, b'{"credsStore": "a b"}', "credsStore is not the name of a program"),
    (parse_docker_config, b'{"credsStore": "a\\n"}', "credsStore is not the name of a program"),
    (parse_docker_config, '{"credsStore": "\u0430"}'.encode(), "credsStore is not the name of a program"),
    (parse_docker_config, b'{"credsStore": 1}', "credsStore is not a text"),
    (parse_docker_config, b'{"credHelpers": []}', "credHelpers is not an object"),
    (parse_docker_config, b'{"credHelpers": {"a.example": {}}}', "the entry 'a.example' in credHelpers is not a text"),
    (parse_docker_config, b'{"credHelpers": {"a.example": "/bin/sh"}}', "the entry 'a.example' in credHelpers is not the"),
    (parse_dockercfg, b'{"a.example": 1}', "the entry 'a.example' is not an object"),
    (parse_dockercfg, b'{"a.example": {"auth": "x"}}', "'auth' of the entry 'a.example' is not base64"),
    (parse_file, b"", "empty"),
    (parse_file, b"[" * 100_000, "neither JSON nor a YAML manifest"),
    (parse_file, b"- a", "neither JSON nor a YAML manifest"),
    (parse_file, b"a: b: c", "neither JSON nor a YAML manifest"),
    (parse_file, b"\xff\xfe", "neither JSON nor a YAML manifest"),
    (parse_file, b"kind: Secret\n---\nkind: Secret", "neither JSON nor a YAML manifest"),
    (parse_file, b"kind: Secret\nkind: Secret", "neither JSON nor a YAML manifest"),
    (parse_file, b"? [a]\n: b", "neither JSON nor a YAML manifest"),
    (parse_file, b'a: "\\UFFFFFFFF"', "neither JSON nor a YAML manifest"),
    (parse_file, b"a: &a {b: *a}", "neither JSON nor a YAML manifest"),
    (parse_file, b"a: b\n" * 500_000, "larger than 2 MiB"),
    (parse_file, b"kind: ConfigMap", r"neither a Docker configuration nor a Secret \(kind: Secret\)"),
    (parse_file, b"kind: Secret", "the Secret is of type neither kubernetes.io/dockerconfigjson nor"),
    (parse_file, secret("Opaque", data={".dockerconfigjson": "e30="}), "the Secret is of type neither"),
    (parse_file, b'{"kind": "Secret", "type": ["x"]}', "the Secret is of type neither"),
    (parse_file, secret(), "the Secret has no .dockerconfigjson in its data"),
    (parse_file, secret(data=None), "the Secret has no .dockerconfigjson in its data"),
    (parse_file, secret(data=["a"]), "the Secret has no .dockerconfigjson in its data"),
    (parse_file, secret(data={".dockercfg": "e30="}), "the Secret has no .dockerconfigjson in its data"),
    (
        parse_file,
        secret("kubernetes.io/dockercfg", data={"dockercfg": "e30="}),
        "the Secret has no .dockercfg in its data",
    ),
    (parse_file, secret(data={".dockerconfigjson": ""}), ".dockerconfigjson: empty"),
    (parse_file, secret(data={".dockerconfigjson": None}), ".dockerconfigjson: empty"),
    (parse_file, secret(data={".dockerconfigjson": 1}), ".dockerconfigjson in data is not a text"),
    (
        parse_file,
        secret(data={".dockerconfigjson": INNER}),
        ".dockerconfigjson in data is not base64; what is not encoded",
    ),
    (parse_file, secret(data={".dockerconfigjson": base64_of("x")}), ".dockerconfigjson: line 1 column 1: not JSON"),
    (parse_file, secret(stringData={".dockerconfigjson": {}}), ".dockerconfigjson in stringData is not a text"),
    (parse_file, b'kind: Secret\ntype: kubernetes.io/dockercfg\nstringData: {.dockercfg: "\\uD800"}', "not UTF-8"),
    (parse_file, b"", "empty"),
    (parse_file, b"[]", "neither JSON nor a YAML manifest"),
    (parse_file, b"foo:bar", "neither JSON nor a YAML manifest"),
    (parse_file, b'{"currentContext": "x"}', "the entry 'currentContext' is not an object"),
    (parse_file, b'{"kind": "Pod"}', "neither a Docker configuration nor a Secret"),
]


@pytest.mark.parametrize(
    ("parse", "text", "fault"), FAULTS, ids=[f"{number}-{fault}" for number, (*_, fault) in enumerate(FAULTS)]
)
def test_what_cannot_be_used_is_refused_by_its_source(parse: Parser, text: bytes, fault: str) -> None:
    """Each message names the source, what is wrong there, and what to do."""
    with pytest.raises(SecretInvalid, match=rf"^{SOURCE}: (\.docker\w+: )?{fault}.*; .") as caught:
        parse(text, SOURCE)
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert "\n" not in str(caught.value)


def test_aliases_in_yaml_do_not_multiply() -> None:
    """Nine lines that stand for a thousand million elements, as a value that nobody reads and as a merge."""
    lines = ["kind: Secret", "type: kubernetes.io/dockercfg", "stringData: {.dockercfg: '{}'}", "a0: &a0 {x: y}"]
    lines += [f"a{number + 1}: &a{number + 1} {{<<: [{', '.join([f'*a{number}'] * 10)}]}}" for number in range(9)]
    assert parse_file("\n".join(lines).encode(), SOURCE) == DockerConfig(())


def outcome(parse: Parser, text: bytes) -> DockerConfig | SecretInvalid:
    try:
        return parse(text, SOURCE)
    except SecretInvalid as error:
        return error


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["Secret", "kubernetes.io/dockercfg", "kubernetes.io/dockerconfigjson", "e30=", "{}", base64_of("a:b")]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=5)
            | st.sampled_from(
                [
                    "auths",
                    "credHelpers",
                    "credsStore",
                    "kind",
                    "type",
                    "data",
                    "stringData",
                    ".dockercfg",
                    ".dockerconfigjson",
                    "a.example",
                    "username",
                    "password",
                    "auth",
                    "identitytoken",
                    "email",
                ]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=12,
)
PIECES = st.lists(
    st.sampled_from(
        [*"{}[]:,\"\\&*!|>-?#%'\n\t ", "kind: Secret", "<<: ", "---", "\\U", "\\ud8", "%YAML 1.", "!!", "a", "9"]
    ),
    max_size=30,
).map(lambda pieces: "".join(pieces).encode())


@given(st.binary(max_size=100) | PIECES | VALUES.map(lambda value: json.dumps(value).encode()))
@example(b"%YAML " + b"9" * 5000)
@example(b'{"auths": {"a": {"auth": "' + b"A" * 100_000 + b'"}}}')
def test_any_bytes_are_a_config_or_refused(text: bytes) -> None:
    for parse in PARSERS:
        assert isinstance(outcome(parse, text), (DockerConfig, SecretInvalid))


PASSWORDS = st.text("QXZKVW", min_size=8, max_size=20)  # words of messages have no four of these in a row
SPOILT = [
    '{"auths": {"a.example": {"username": "u", "password": "%s"}}',
    '{"auths": {"a.example": {"username": "u", "password": "%s\n"}}}',
    '{"auths": {"a.example": {"username": "u", "password": "\\%s"}}}',
    '{"auths": {"a.example": {"username": "u", "password": %s}}}',
    '{"auths": {"a.example": {"username": "u", "password": ["%s"]}}}',
    '{"auths": {"a.example": {"auth": "%s:"}}}',
    '{"auths": {"a.example": {"auth": "-%s"}}}',
    '{"auths": {"a.example": {"auth": {"%s": 1}}}}',
    '{"auths": {"a.example": "%s"}}',
    '{"auths": {"u:%s@a.example": 1}}',
    '{"auths": "%s"}',
    '{"auths": {"a.example": {"%s": 1, "%s": 2}}}',
    '{"auths": {"a.example": {"password": "%s", "x": "\\ud800"}}}',
    '{"auths": {}, "credsStore": "/%s"}',
    '{"auths": {}, "credHelpers": {"a.example": "/%s"}}',
    '{"a.example": {"password": "%s"}, "x": NaN}',
    '{"a.example": {"password": "%s"}} x',
    '{"kind": "Secret", "type": "%s"}',
    '{"kind": "%s"}',
    '{"kind": "Secret", "type": "kubernetes.io/dockercfg", "data": {".dockercfg": "%s:"}}',
    '{"kind": "Secret", "type": "kubernetes.io/dockercfg", "data": {"%s": ""}}',
    '{"kind": "Secret", "type": "kubernetes.io/dockercfg", "stringData": {".dockercfg": "%s"}}',
    "kind: Secret\ntype: kubernetes.io/dockercfg\ndata: {.dockercfg: '%s'",
    "kind: Secret\n%s\n",
    "kind: Secret\npassword: @%s",
    'kind: Secret\npassword: "\\q%s"',
    "kind: Secret\n%s: a\n%s: b",
    "*%s",
    "user:%s",
    "%s",
]


@given(PASSWORDS, st.sampled_from(SPOILT))
def test_no_error_quotes_what_it_is_about(password: str, template: str) -> None:
    """Nor does what a traceback prints, nor any exception that hangs on the one raised."""
    text = template.replace("%s", password).encode()
    for parse in PARSERS:
        error = outcome(parse, text)
        if parse is parse_file:
            assert isinstance(error, SecretInvalid), "this is to be something that cannot be used"
        if isinstance(error, SecretInvalid):
            said = str(error) + repr(error) + "".join(traceback.format_exception(error))
            assert error.__cause__ is error.__context__ is None
            pieces = [password[start : start + 4] for start in range(len(password) - 3)]
            assert not [piece for piece in pieces if piece in said]


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_what_docker_writes_is_read_back(username: str, password: str) -> None:
    username = username.replace(":", "")
    expected = (entry(username, password),) if username or password else ()
    auth = base64_of(f"{username}:{password}")
    inner = docker_config({"username": "no", "password": "no", "auth": auth})
    assert parse_file(inner, SOURCE).entries == expected
    assert parse_docker_config(docker_config({"auth": auth.rstrip("=")}), SOURCE).entries == expected
    assert parse_file(docker_config({"username": username, "password": password}), SOURCE).entries == expected
    manifest = secret(data={".dockerconfigjson": base64.b64encode(inner).decode()})
    assert parse_file(manifest, SOURCE).entries == expected
