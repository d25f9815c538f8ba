"""The configuration: every fault at once, by key path and with a hint; nothing dangerous by default."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from proxy.config.faults import keys, sections
from proxy.config.file import ConfigError, load, validate
from proxy.config.model import Config
from proxy.config.upstreams import PUBLIC_REGISTRIES
from proxy.config.values import Address, parse_duration, parse_quantity, write_duration


def faults_of(raw: object) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        validate(raw)
    return refused.value.faults


def load_text(path: Path, text: str) -> Config:
    file = path / "config.yaml"
    file.write_text(text)
    return asyncio.run(load(file))


def faults_of_text(path: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        load_text(path, text)
    return refused.value.faults


def one(**upstream: Any) -> dict[str, Any]:
    return {"upstreams": [{"name": "corp.test", **upstream}]}


def test_nothing_written_is_a_good_configuration(tmp_path: Path) -> None:
    config = load_text(tmp_path, "")
    assert (str(config.listen), str(config.admin)) == ("127.0.0.1:5000", "127.0.0.1:5001")
    assert config.listen.is_loopback
    assert config.admin.is_loopback
    assert config.default_name == "docker.io"
    assert [upstream.name for upstream in config.upstreams] == list(PUBLIC_REGISTRIES)
    assert config.cache.max_blob_size == 128 * 1024**3
    assert (config.log.format, config.log.level) == ("text", "info")
    assert config == validate({})


def test_what_a_name_implies_is_filled_in() -> None:
    config = validate({"upstreams": [{"name": "index.docker.io"}, {"name": "corp.test:5000"}]})
    hub, corp = config.upstreams
    assert (hub.name, hub.endpoints, hub.prefix) == ("docker.io", ["https://registry-1.docker.io"], "docker.io")
    assert hub.token_hosts_of("https://registry-1.docker.io") == ["auth.docker.io"]
    assert (corp.endpoints, corp.prefix) == (["https://corp.test:5000"], "corp.test_5000")
    assert corp.token_hosts_of("https://corp.test:5000") == []
    assert not corp.insecure_skip_verify
    assert corp.timeouts.model_dump() == {"connect": 5, "headers": 10, "token": 5, "head": 3, "endpoint": 3, "progress": 30}


def test_http_is_used_only_where_it_is_written() -> None:
    for upstream in validate({}).upstreams + validate(one()).upstreams:
        assert all(endpoint.startswith("https://") for endpoint in upstream.endpoints)
    assert validate(one(endpoints=["http://corp.test"])).upstreams[0].endpoints == ["http://corp.test"]


def test_token_hosts_of_a_registry_are_not_lent_to_other_endpoints() -> None:
    mirrored = ["https://mirror.test", "https://registry-1.docker.io"]
    hub = validate({"upstreams": [{"name": "docker.io", "endpoints": mirrored, "tokenHosts": ["auth.corp"]}]}).upstreams[0]
    assert hub.token_hosts_of("https://mirror.test") == ["auth.corp"]
    assert hub.token_hosts_of("https://registry-1.docker.io") == ["auth.corp", "auth.docker.io"]


def test_without_docker_hub_there_is_no_default() -> None:
    assert validate(one()).default_name is None
    assert validate({**one(), "defaultUpstream": "corp.test"}).default_name == "corp.test"
    assert (
        validate({"upstreams": [{"name": "docker.io"}], "defaultUpstream": "registry-1.docker.io"}).default_name
        == "docker.io"
    )


def test_every_fault_is_named_at_once() -> None:
    faults = faults_of(
        {
            "listen": "nowhere",
            "lisen": ":1",
            "cache": {"maxBlobSize": "1.5Gi", "directoy": "/x"},
            "log": {"format": "xml", "level": "loud"},
            "upstreams": [
                {"name": "Corp"},
                {
                    "name": "corp.test",
                    "endpoints": ["ftp://x"],
                    "timeouts": {"connect": "5"},
                    "allowAddresses": ["10.0.0.1/8"],
                },
            ],
        }
    )
    assert len(faults) == 10
    text = "\n".join(faults)
    for path, hint in [
        ("listen", "127.0.0.1:5000"),
        ("lisen", "did you mean 'listen'"),
        ("cache.maxBlobSize", "50Gi"),
        ("cache.directoy", "did you mean 'directory'"),
        ("log.format", "'text' or 'json'"),
        ("log.level", "'debug', 'info', 'warning' or 'error'"),
        ("upstreams[0].name", "ghcr.io"),
        ("upstreams[1].endpoints[0]", "https://"),
        ("upstreams[1].timeouts.connect", "10s"),
    ]:
        assert any(fault.startswith(f"{path}: ") and hint in fault for fault in faults), (path, text)
    assert any(fault.startswith("upstreams[1].allowAddresses[0]") for fault in faults)


def test_each_clash_is_a_fault_of_its_own() -> None:
    faults = faults_of({**one(), "defaultUpstream": "else.test", "admin": "127.0.0.1:5000"})
    assert len(faults) == 2
    assert sorted(fault.partition(":")[0] for fault in faults) == ["admin", "defaultUpstream"]


def test_a_clash_is_named_beside_faults_of_single_keys() -> None:
    faults = faults_of({**one(), "defaultUpstream": "else.test", "log": {"level": "loud"}})
    assert {fault.partition(":")[0] for fault in faults} == {"defaultUpstream", "log.level"}


@pytest.mark.parametrize(
    ("raw", "path", "hint"),
    [
        ({"lissten": 1}, "lissten", "did you mean 'listen'"),
        ({"default_upstream": "x"}, "default_upstream", "did you mean 'defaultUpstream'"),
        ({"cache": {"maxBlobsize": "1Gi"}}, "cache.maxBlobsize", "did you mean 'maxBlobSize'"),
        (one(insecureSkipVerfy=True), "upstreams[0].insecureSkipVerfy", "did you mean 'insecureSkipVerify'"),
        (one(timeouts={"conect": "1s"}), "upstreams[0].timeouts.conect", "did you mean 'connect'"),
        ({"qqqqqqq": 1}, "qqqqqqq", "unknown key"),
        (one(endpoint=["https://a.test"]), "upstreams[0].endpoint", "did you mean 'endpoints'"),
        ({"imagePullSecrets": [{"file": "/a", "name": "x"}]}, "imagePullSecrets[0].name", "did you mean 'username'"),
        (one(access={"mod": "public"}), "upstreams[0].access.mod", "did you mean 'mode'"),
    ],
)
def test_an_unknown_key_is_refused_with_what_was_meant(raw: object, path: str, hint: str) -> None:
    (fault,) = faults_of(raw)
    assert fault.startswith(f"{path}: unknown key")
    assert hint in fault


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        ({"tokenHosts": ["a.test"]}, "tokenHosts: unknown key; tokenHosts belongs under upstreams[]"),
        ({"connect": "5s"}, "connect: unknown key; connect belongs under upstreams[].timeouts"),
        (one(offline=True), "upstreams[0].offline: unknown key; offline belongs at the top level"),
        (
            one(access={"pathPrefix": "x"}),
            "upstreams[0].access.pathPrefix: unknown key; pathPrefix belongs under upstreams[]",
        ),
        (
            {"clientCAFile": "/ca"},
            "clientCAFile: unknown key; clientCAFile belongs under listener or under adminListener",
        ),
        (
            one(endpoint=["https://a.test"]),
            "upstreams[0].endpoint: unknown key; did you mean 'endpoints'? endpoint belongs under upstreams[].timeouts",
        ),
        (one(qqqqqqq=1), "upstreams[0].qqqqqqq: unknown key"),
    ],
)
def test_a_key_that_belongs_elsewhere_is_told_where(raw: object, fault: str) -> None:
    assert faults_of(raw) == [fault]


def test_a_key_that_belongs_elsewhere_is_told_where_though_its_value_is_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "proxy").write_text("http://u:hunter2@proxy.test")
    (fault,) = faults_of_text(tmp_path, f"httpProxyFile: {tmp_path / 'proxy'}")
    assert fault == "httpProxy: unknown key; httpProxy belongs under upstreams[]"


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (
            {"imagePullPolicy": "Always"},
            "imagePullPolicy: keys are needed below it; write for example 'rules: [{match: \"*\", policy: Always}]'",
        ),
        (
            {"imagePullPolicy": {"rules": ["Always"]}},
            'imagePullPolicy.rules[0]: keys are needed below it; write for example \'- {match: "ghcr.io/corp/*:main", '
            "policy: Always}'",
        ),
        (
            {"imagePullPolicy": {"rules": [{"match": "*"}]}},
            "imagePullPolicy.rules[0].policy: is needed: 'Always', 'IfNotPresent' or 'Never'",
        ),
        (
            {"imagePullPolicy": {"rules": [{"policy": "Never"}]}},
            "imagePullPolicy.rules[0].match: is needed; write for example 'match: \"ghcr.io/corp/*:main\"'",
        ),
        ({"rules": [{"name": "a", "match": "*"}]}, "rules[0].action: is needed: 'allow' or 'deny'"),
        (
            {"rules": [{"name": "a", "action": "deny"}]},
            "rules[0].match: is needed; write for example 'match: \"ghcr.io/corp/*\"'",
        ),
        ({"upstreams": [{}]}, "upstreams[0].name: is needed; write for example 'name: docker.io'"),
        ({"rules": [{"match": "*", "action": "deny"}]}, "rules[0].name: is needed; write for example 'name: nothing else"),
    ],
)
def test_what_is_needed_is_shown(raw: object, fault: str) -> None:
    (told,) = faults_of(raw)
    assert told.startswith(fault)


def test_each_example_in_a_message_can_be_written() -> None:
    """It is the line of the key itself, or what stands below it."""
    found = [(key, field) for fields in sections().values() for key, field in fields.items() if field.examples]
    assert {"upstreams", "imagePullPolicy", "match"} <= {key for key, _ in found}
    for key, field in found:
        for example in field.examples or []:
            read = yaml.safe_load(example)
            value = read[key] if isinstance(read, dict) and key in read else read
            TypeAdapter[Any](cast(Any, field.annotation)).validate_python(value)


@pytest.mark.parametrize(
    ("raw", "path", "hint"),
    [
        ({"upstreams": []}, "upstreams", "at least one is needed"),
        ({"upstreams": None}, "upstreams", "a list is needed"),
        ({"upstreams": [{}]}, "upstreams[0].name", "is needed"),
        (one(endpoints=[]), "upstreams[0]", "endpoints: at least one"),
        (one(pathPrefix="a/b"), "upstreams[0].pathPrefix", "one component"),
        (one(pathPrefix=""), "upstreams[0].pathPrefix", "one component"),
        (one(caFile="/x", insecureSkipVerify=True), "upstreams[0]", "exclude each other"),
        (one(clientKeyFile="/k"), "upstreams[0]", "clientKeyFile: without clientCertFile"),
        (one(clientCertFile=["/c"]), "upstreams[0].clientCertFile", "path"),
        (one(clientCrtFile="/c"), "upstreams[0].clientCrtFile", "did you mean 'clientCertFile'"),
        (one(httpsProxy="http://a.test"), "upstreams[0].httpsProxy", "did you mean 'httpProxy'"),
        (one(timeouts={"endpoint": "0s"}), "upstreams[0].timeouts.endpoint", "more than 0s is needed"),
        (one(timeouts={"head": "0s"}), "upstreams[0].timeouts.head", "more than 0s is needed"),
        (one(timeouts={"head": "61m"}), "upstreams[0].timeouts.head", "at most 1h"),
        ({"rereadFilesEvery": "0ms"}, "rereadFilesEvery", "more than 0s is needed"),
        ({"maxStale": "721h"}, "maxStale", "at most 720h (30 days)"),
        ({"backoff": {"max": "43201m"}}, "backoff.max", "at most 720h (30 days)"),
        ({"queueTimeout": "2h"}, "queueTimeout", "at most 4m: containerd"),
        (one(allowAddresses=["10.0.0.0/33"]), "upstreams[0].allowAddresses[0]", ""),
        ({"log": {"level": "INFO"}}, "log.level", "'info'"),
        ({"log": {"level": 5}}, "log.level", "'info'"),
        ({"defaultUpstream": 5}, "defaultUpstream", "a text is needed"),
        (one(insecureSkipVerify="perhaps"), "upstreams[0].insecureSkipVerify", "true or false is needed"),
        (one(insecureSkipVerify=None), "upstreams[0].insecureSkipVerify", "true or false is needed"),
        (one(tokenHosts="auth.test"), "upstreams[0].tokenHosts", "a list is needed; write [..., ...]"),
        ({"cache": {"maxBlobSize": 0}}, "cache.maxBlobSize", "more than 0 is needed"),
        ({"cache": {"maxBlobSize": "0Gi"}}, "cache.maxBlobSize", "more than 0 is needed"),
        ({"upstreams": ["docker.io"]}, "upstreams[0]", "keys are needed below it; write for example '- name: docker.io'"),
    ],
)
def test_a_fault_names_its_key(raw: object, path: str, hint: str) -> None:
    faults = faults_of(raw)
    assert any(fault.startswith(f"{path}: ") and hint in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        ({"cache": []}, "cache"),
        ({"cache": 5}, "cache"),
        ({"log": "text"}, "log"),
        (one(timeouts="5s"), "upstreams[0].timeouts"),
        (one(timeouts=None), "upstreams[0].timeouts"),
    ],
)
def test_what_has_no_keys_below_it_is_said_plainly(raw: object, path: str) -> None:
    assert faults_of(raw) == [f"{path}: keys are needed below it"]


@pytest.mark.parametrize("raw", [[], ["docker.io"], "text", 5])
def test_a_file_that_holds_no_keys_is_said_plainly(raw: object) -> None:
    assert faults_of(raw) == ["the file must be keys and values; write for example 'listen: 127.0.0.1:5000'"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "corp",
        "Corp.test",
        "https://corp.test",
        "corp.test/a",
        "corp test.x",
        "corp.test:",
        "a..b",
        "-a.b",
        "\u0441.test",
        "a.b\n",
        5,
        None,
    ],
)
def test_a_name_that_is_no_registry_is_refused(name: object) -> None:
    assert any(fault.startswith("upstreams[0].name") for fault in faults_of({"upstreams": [{"name": name}]}))


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "corp.test",
        "ftp://corp.test",
        "https://",
        "https:///x",
        "https://u:p@corp.test",
        "https://u@corp.test",
        "https://corp.test?a=b",
        "https://corp.test#a",
        "https://corp.test:0",
        "https://corp.test:99999",
        "https://corp.test:x",
        "https://[::1",
        "https://a b",
        "https://a\n.test",
        5,
    ],
)
def test_an_endpoint_that_is_none_is_refused(endpoint: object) -> None:
    assert any(fault.startswith("upstreams[0].endpoints[0]") for fault in faults_of(one(endpoints=[endpoint])))


@pytest.mark.parametrize(
    "endpoint", ["https://corp.test/v2", "https://corp.test/v2/", "https://corp.test/mirror/v2", "https://corp.test/v2//"]
)
def test_an_endpoint_does_not_end_in_what_is_added_to_it(endpoint: str) -> None:
    """It would be asked for ``/v2/v2/``, and answer 404 to everything."""
    (fault,) = faults_of(one(endpoints=[endpoint]))
    assert fault == "upstreams[0].endpoints[0]: leave out /v2, which is added: a path P is asked as /P/v2/NAME"


@pytest.mark.parametrize("endpoint", ["https://corp.test/myv2", "https://corp.test/v2/mirror", "https://v2"])
def test_an_endpoint_may_have_v2_elsewhere(endpoint: str) -> None:
    assert validate(one(endpoints=[endpoint])).upstreams[0].endpoints == [endpoint]


def test_an_endpoint_with_a_path_is_kept_without_its_last_slash() -> None:
    assert validate(one(endpoints=["https://corp.test:5000/mirror/"])).upstreams[0].endpoints == [
        "https://corp.test:5000/mirror"
    ]


def test_a_password_in_an_endpoint_is_not_repeated() -> None:
    assert "hunter2" not in "\n".join(faults_of(one(endpoints=["https://u:hunter2@corp.test"])))


@pytest.mark.parametrize(
    "proxy",
    [
        "http://proxy.corp:3128",
        "http://proxy.corp",
        "http://proxy.corp:3128/",
        "http://proxy:3128",
        "http://10.0.0.1:3128",
        "http://[::1]:3128",
        "http://user:password@proxy.corp:3128",
        "http://user:p%40ss%3A%2F@proxy.corp:3128",
        "http://user@proxy.corp:3128",
    ],
)
def test_the_address_of_a_proxy(proxy: str) -> None:
    """It is the operator's word, so it may be private without being listed."""
    assert validate(one(httpProxy=proxy)).upstreams[0].http_proxy == proxy
    assert validate(one()).upstreams[0].http_proxy is None


@pytest.mark.parametrize(
    "proxy",
    [
        "",
        "proxy.corp:3128",
        "proxy.corp",
        "//proxy.corp:3128",
        "https://proxy.corp:3128",
        "socks5://proxy.corp:1080",
        "http://",
        "http://:3128",
        "http://proxy.corp:0",
        "http://proxy.corp:99999",
        "http://proxy.corp:x",
        "http://[::1",
        "http://a b:3128",
        "http://proxy.corp:3128\n",
        "http://proxy.corp:3128/path",
        "http://proxy.corp:3128?a=b",
        "http://proxy.corp:3128#a",
        5,
        ["http://proxy.corp:3128"],
    ],
)
def test_what_is_no_address_of_a_proxy_is_refused(proxy: object) -> None:
    assert any(fault.startswith("upstreams[0].httpProxy: ") for fault in faults_of(one(httpProxy=proxy)))


@pytest.mark.parametrize("form", ["https://u:{}@proxy.corp", "http://u:{}@proxy.corp/x", "u:{}@proxy.corp", "http://u:{}@"])
def test_the_password_of_a_proxy_is_not_repeated(form: str) -> None:
    assert "hunter2" not in "\n".join(faults_of(one(httpProxy=form.format("hunter2"))))


def test_the_address_of_a_proxy_can_be_in_a_file_or_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proxy").write_text("http://user:hunter2@proxy.corp:3128\n")
    monkeypatch.setenv("PULLCACHE_TEST_PASSWORD", "hunter2")
    for text in (f"httpProxyFile: {tmp_path}/proxy", "httpProxy: 'http://user:${PULLCACHE_TEST_PASSWORD}@proxy.corp:3128'"):
        config = load_text(tmp_path, f"upstreams: [{{name: corp.test, {text}}}]")
        assert config.upstreams[0].http_proxy == "http://user:hunter2@proxy.corp:3128"


def test_the_files_of_a_certificate_are_keys_of_their_own(tmp_path: Path) -> None:
    """What they name is not read into the configuration: a key stays where it is."""
    upstream = load_text(
        tmp_path,
        "upstreams: [{name: corp.test, clientCertFile: /c.pem, clientKeyFile: /k.pem, "
        "access: {mode: shared, iUnderstandThisIsShared: true}}]",
    ).upstreams[0]
    assert (upstream.client_cert_file, upstream.client_key_file) == (Path("/c.pem"), Path("/k.pem"))


def test_several_endpoints_are_kept_in_their_order() -> None:
    listed = ["https://b.test", "https://a.test/mirror", "https://corp.test"]
    assert validate(one(endpoints=listed)).upstreams[0].endpoints == listed


def test_each_endpoint_that_is_wrong_is_named() -> None:
    faults = faults_of(one(endpoints=["https://a.test", "ftp://b.test", "https://c.test", "d.test"]))
    assert [fault.partition(": ")[0] for fault in faults] == ["upstreams[0].endpoints[1]", "upstreams[0].endpoints[3]"]


@pytest.mark.parametrize(
    "host",
    [
        "10.0.0.1",
        "127.0.0.1",
        "169.254.169.254",
        "192.168.1.1",
        "[::1]",
        "[fd00::1]",
        "[fe80::1]",
        "100.64.0.1",
        "[::ffff:10.0.0.1]",
        "0.0.0.0",
        "localhost",
        "LOCALHOST",
        "registry.localhost",
    ],
)
def test_a_private_endpoint_has_to_be_meant(host: str) -> None:
    (fault,) = faults_of(one(endpoints=[f"http://{host}:5000"]))
    assert fault.startswith("upstreams[0]")
    hint = fault.rpartition("allowAddresses: [")[2].rstrip("]")
    assert validate(one(endpoints=[f"http://{host}:5000"], allowAddresses=[hint])), "the hint is what to write"


def test_localhost_is_refused_like_its_address() -> None:
    by_name, by_address = (faults_of(one(endpoints=[f"http://{host}:5000"])) for host in ("localhost", "127.0.0.1"))
    assert by_name == [fault.replace("127.0.0.1 is", "localhost is") for fault in by_address]


@pytest.mark.parametrize("network", ["127.0.0.0/8", "::1"])
def test_either_address_of_localhost_is_enough(network: str) -> None:
    assert validate(one(endpoints=["http://localhost:5000"], allowAddresses=[network]))


@pytest.mark.parametrize("host", ["8.8.8.8", "[2606:4700::1111]", "corp.test", "localhost.test"])
def test_a_public_endpoint_needs_no_permission(host: str) -> None:
    assert validate(one(endpoints=[f"https://{host}"]))


@pytest.mark.parametrize(
    "upstreams",
    [
        [{"name": "a.test"}, {"name": "b.test", "pathPrefix": "a.test"}],
        [{"name": "a.test", "pathPrefix": "x"}, {"name": "b.test", "pathPrefix": "x"}],
        [{"name": "a.test:1"}, {"name": "b.test", "pathPrefix": "a.test_1"}],
    ],
)
def test_two_upstreams_of_one_form_clash(upstreams: list[dict[str, str]]) -> None:
    assert any("means both" in fault and fault.startswith("upstreams") for fault in faults_of({"upstreams": upstreams}))


@pytest.mark.parametrize("second", [{"name": "a.test:1"}, {"name": "a.test:1", "pathPrefix": "x"}])
def test_an_upstream_that_stands_twice_is_said_once(second: dict[str, str]) -> None:
    assert faults_of({"upstreams": [{"name": "a.test:1"}, second]}) == ["upstreams: a.test:1 stands twice; remove one"]


@pytest.mark.parametrize("alias", ["index.docker.io", "registry-1.docker.io"])
def test_docker_hub_stands_twice_under_another_name_too(alias: str) -> None:
    (fault,) = faults_of({"upstreams": [{"name": "docker.io"}, {"name": alias}]})
    assert fault.startswith("upstreams: docker.io stands twice (")
    assert alias in fault


@pytest.mark.parametrize(
    ("listen", "admin"),
    [
        ("127.0.0.1:5000", "127.0.0.1:5000"),
        (":5000", ":5000"),
        (":5000", "127.0.0.1:5000"),
        ("127.0.0.1:5000", ":5000"),
        ("0.0.0.0:5000", "127.0.0.1:5000"),
        ("10.0.0.1:5000", "0.0.0.0:5000"),
        ("[::]:5000", "[::1]:5000"),
        ("0.0.0.0:5001", None),
        (None, ":5000"),
    ],
)
def test_one_port_for_clients_and_admin_is_refused(listen: str | None, admin: str | None) -> None:
    """Every host is among the hosts; what is not written is the default. Other faults do not hide it."""
    given: dict[str, object] = {key: value for key, value in (("listen", listen), ("admin", admin)) if value is not None}
    given |= {"adminListener": {"tokenFile": "/token"}}
    (fault,) = faults_of(given)
    assert fault.startswith("admin: ")
    assert "are one port; give admin a port of its own" in fault
    assert fault in faults_of({**given, "log": {"level": "loud"}})


@pytest.mark.parametrize(
    ("listen", "admin"),
    [
        ("127.0.0.1:0", "127.0.0.1:0"),
        (":0", ":0"),
        ("0.0.0.0:0", "127.0.0.1:0"),
        (":5000", ":5001"),
        ("10.0.0.1:5000", "127.0.0.1:5000"),
    ],
)
def test_two_ports_or_two_hosts_are_no_clash(listen: str, admin: str) -> None:
    """Port 0 is any that is free, so never the same."""
    assert validate({"listen": listen, "admin": admin, "adminListener": {"tokenFile": "/token"}})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.2.3.4:5", Address("1.2.3.4", 5)),
        (":5000", Address("", 5000)),
        ("[::1]:5000", Address("::1", 5000)),
        ("localhost:0", Address("localhost", 0)),
        ("a.b:65535", Address("a.b", 65535)),
    ],
)
def test_addresses(text: str, expected: Address) -> None:
    assert validate({"listen": text}).listen == expected


@pytest.mark.parametrize(
    "text", ["", "5000", "a", "a:", "a:b", ":65536", ":-1", "::1:5000", ":\u0661", "a:1 ", 5000, None, ["a:1"], True]
)
def test_what_is_no_address(text: object) -> None:
    (fault,) = faults_of({"listen": text})
    assert fault.startswith("listen: not an address")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1s", 1), ("250ms", 0.25), ("1m30s", 90), ("1.5s", 1.5), ("1h", 3600), ("1h1m1s1ms", 3661.001), ("0s", 0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.25, "0.25s"),
        (10, "10s"),
        (90, "90s"),
        (300, "5m"),
        (5400, "90m"),
        (2592000, "720h"),
        (2591999, "2591999s"),
    ],
)
def test_a_duration_is_told_as_it_is_written(seconds: float, text: str) -> None:
    assert write_duration(seconds) == text
    assert parse_duration(text) == seconds


def test_the_longest_periods_are_taken() -> None:
    config = validate({"maxStale": "720h", "queueTimeout": "4m", "rereadFilesEvery": "1h", "deletedGrace": "0s"})
    assert (config.max_stale, config.queue_timeout, config.reread_files_every) == (2592000, 240, 3600)


@pytest.mark.parametrize(
    ("backoff", "first", "most"),
    [
        ({"initial": "10m", "max": "90s"}, "10m", "90s"),
        ({"initial": "10m"}, "10m", "5m, the default"),
        ({"max": "5s"}, "10s, the default", "5s"),
    ],
)
def test_a_backoff_that_begins_above_its_end_names_both(backoff: dict[str, str], first: str, most: str) -> None:
    """With what to write, and which of them is the default."""
    assert faults_of({"backoff": backoff}) == [
        f"backoff: initial ({first}) is longer than max ({most}), the most that it grows to; write initial: "
        f"{most.partition(',')[0]} or less, or max: {first.partition(',')[0]} or more"
    ]


@pytest.mark.parametrize(
    "text", ["", "5", "s", "-1s", "1 s", "1d", "1S", "1s ", "1s\n", "1..5s", ".5s", "\u0661s", "1e3s", None, True, "inf"]
)
def test_what_is_no_duration(text: object) -> None:
    with pytest.raises(ValueError, match="10s"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("5", 5),
        (5, 5),
        ("1k", 1000),
        ("1M", 10**6),
        ("1G", 10**9),
        ("1T", 10**12),
        ("1P", 10**15),
        ("1Ki", 2**10),
        ("1Mi", 2**20),
        ("50Gi", 50 * 2**30),
        ("1Ti", 2**40),
        ("1Pi", 2**50),
    ],
)
def test_quantities(text: object, size: int) -> None:
    assert parse_quantity(text) == size


@pytest.mark.parametrize(
    "text", ["", "Gi", "-1", -1, "1.5Gi", "1 Gi", "1gi", "1GB", "1K", "1m", "1Gi ", "\u0661Gi", None, True, 1.5, "1e3"]
)
def test_what_is_no_quantity(text: object) -> None:
    with pytest.raises(ValueError, match="50Gi"):
        parse_quantity(text)


@given(st.text(max_size=20) | st.from_regex(r"[0-9.smhkMGTPi -]{0,12}", fullmatch=True))
def test_no_text_breaks_the_parsers(text: str) -> None:
    for parse in (parse_duration, parse_quantity):
        try:
            value = parse(text)
        except ValueError:
            continue
        assert isinstance(value, (int, float))
        assert value >= 0


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("listen: :1\nlisten: :2\n", "listen", 2),
        ("log:\n  level: info\n  level: debug\n", "level", 3),
        ("upstreams:\n- name: a.b\n  name: c.d\n", "name", 3),
    ],
)
def test_a_key_that_stands_twice_in_the_file_is_refused(tmp_path: Path, text: str, key: str, line: int) -> None:
    (fault,) = faults_of_text(tmp_path, text)
    assert f"'{key}' stands twice" in fault
    assert f"line {line}" in fault


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("a: [", id="unclosed"),
        pytest.param("\tlisten: x", id="tab"),
        pytest.param("a: !!python/object/apply:os.system ['true']", id="python-object"),
        pytest.param("a: \0", id="NUL"),
        pytest.param("listen: 2001-99-99", id="no-such-day"),
        pytest.param("? [a]\n: b\n", id="list-as-key"),
        pytest.param("{a: 1}: b\n", id="map-as-key"),
        pytest.param("a: &x [*x]", id="itself"),
        pytest.param("a: " + "[" * 5000, id="depth"),
        pytest.param('listenFile: "\\0"', id="NUL-in-a-file-name"),
        pytest.param("- a", id="list"),
        pytest.param("text", id="text"),
    ],
)
def test_a_file_that_is_no_configuration_is_a_fault_and_no_crash(tmp_path: Path, text: str) -> None:
    assert faults_of_text(tmp_path, text)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        pytest.param('httpProxy: "http://u:hunter2@proxy.corp:3128', "line 4", id="unclosed"),
        pytest.param("httpProxy: http://u:hunter2@proxy.corp: 3128", "line 3, column 43", id="stray-blank"),
        pytest.param("httpProxy: 0b_hunter2_", "httpProxy", id="no-address"),
        pytest.param("httpProxy: !hunter2 x", "line 3", id="a-tag"),
        pytest.param("httpProxy: {hunter2", "line 4", id="no-end"),
        pytest.param("httpProxy: [hunter2: [}", "line 3", id="another-end"),
        pytest.param("httpProxy: hunter2\0", "not YAML", id="NUL"),
    ],
)
def test_what_is_not_yaml_is_placed_and_not_quoted(tmp_path: Path, line: str, told: str) -> None:
    """A configuration may hold the password of a proxy."""
    (fault,) = faults_of_text(tmp_path, f"upstreams:\n  - name: docker.io\n    {line}\n")
    assert told in fault
    assert "hunter2" not in fault or line.startswith("httpProxy: !")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            asyncio.run(load(path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="cannot be read"):
        asyncio.run(load(tmp_path / "binary.yaml"))


def test_a_variable_stands_for_its_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PULLCACHE_TEST_HOST", "corp.test")
    monkeypatch.setenv("PULLCACHE_TEST_PORT", "5000")
    config = load_text(
        tmp_path, "upstreams: [{name: '${PULLCACHE_TEST_HOST}:${PULLCACHE_TEST_PORT}'}]\nlisten: ':${PULLCACHE_TEST_PORT}'\n"
    )
    assert config.upstreams[0].name == "corp.test:5000"
    assert config.listen == Address("", 5000)


def test_a_variables_value_is_not_expanded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PULLCACHE_TEST_A", "/x/${PULLCACHE_TEST_B}")
    assert str(load_text(tmp_path, "cache: {directory: '${PULLCACHE_TEST_A}'}").cache.directory) == "/x/${PULLCACHE_TEST_B}"


def test_variables_that_are_not_set_are_all_named(tmp_path: Path) -> None:
    text = "\n".join(
        faults_of_text(tmp_path, "upstreams: [{name: '${PULLCACHE_NO_A}'}]\ncache: {directory: '${PULLCACHE_NO_B}'}\n")
    )
    assert "upstreams[0].name: the environment variable PULLCACHE_NO_A is not set" in text
    assert "cache.directory: the environment variable PULLCACHE_NO_B is not set" in text


def test_a_key_with_file_takes_its_value_from_there(tmp_path: Path) -> None:
    (tmp_path / "address").write_text("127.0.0.1:7000\n")
    (tmp_path / "name").write_text("corp.test")
    config = load_text(tmp_path, f"listenFile: {tmp_path}/address\nupstreams: [{{nameFile: {tmp_path}/name}}]\n")
    assert config.listen == Address("127.0.0.1", 7000)
    assert config.upstreams[0].name == "corp.test"


@pytest.mark.parametrize("key", ["caFile", "clientCertFile"])
def test_an_empty_path_is_refused(key: str) -> None:
    """It is what an empty variable leaves, and would mean the working directory."""
    for raw, path in (({"cache": {"directory": ""}}, "cache.directory"), (one(**{key: ""}), f"upstreams[0].{key}")):
        assert faults_of(raw) == [f"{path}: an empty path; is a variable in it empty?"]


def test_a_relative_path_is_taken_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for written, meant in ((".", tmp_path), ("kept/here", tmp_path / "kept/here")):
        assert validate({"cache": {"directory": written}}).cache.directory == meant
    assert validate(one(caFile="ca.pem")).upstreams[0].ca_file == tmp_path / "ca.pem"


def test_ca_file_is_a_key_of_its_own(tmp_path: Path) -> None:
    assert load_text(tmp_path, "upstreams: [{name: corp.test, caFile: /ca.pem}]").upstreams[0].ca_file == Path("/ca.pem")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("listenFile: /nowhere/at/all", "listenFile"),
        ("listen: ':1'\nlistenFile: /nowhere", "listenFile"),
        ("lisenFile: /nowhere", "lisenFile"),
    ],
)
def test_a_file_key_that_cannot_be_used_is_named(tmp_path: Path, text: str, path: str) -> None:
    assert any(fault.startswith(f"{path}: ") for fault in faults_of_text(tmp_path, text))


def test_a_configuration_cannot_be_changed() -> None:
    config = validate(one())
    for part, name in [
        (config, "listen"),
        (config.cache, "directory"),
        (config.log, "level"),
        (config.upstreams[0], "name"),
        (config.upstreams[0].timeouts, "head"),
    ]:
        with pytest.raises(ValidationError):
            setattr(part, name, "x")
    with pytest.raises(AttributeError):
        config.listen.port = 1  # type: ignore[misc]


def test_one_configuration_shares_nothing_with_the_next() -> None:
    validate({}).upstreams[0].token_hosts.append("evil.test")
    validate({}).upstreams.clear()
    assert validate({}).upstreams[0].token_hosts == []


def test_keys_are_written_as_in_kubernetes() -> None:
    assert {"listen", "defaultUpstream", "insecureSkipVerify", "maxBlobSize", "allowAddresses", "progress"} <= keys()
    assert not any("_" in key for key in keys())


# --- what an upstream is known by ---


@pytest.mark.parametrize(
    ("upstream", "key"),
    [
        ({"name": "docker.io"}, "docker.io"),
        ({"name": "index.docker.io"}, "docker.io"),
        ({"name": "docker.io", "endpoints": ["https://registry-1.docker.io/"]}, "docker.io"),
        ({"name": "docker.io", "endpoints": ["https://mirror.test", "https://registry-1.docker.io"]}, "docker.io"),
        ({"name": "docker.io", "endpoints": ["https://else.test"]}, "docker.io https://else.test"),
        (
            {"name": "docker.io", "endpoints": ["https://registry-1.docker.io", "https://else.test"]},
            "docker.io https://else.test",
        ),
        ({"name": "corp.test"}, "corp.test"),
        ({"name": "corp.test:5000"}, "corp.test:5000"),
        ({"name": "corp.test", "endpoints": ["https://mirror.test", "https://corp.test"]}, "corp.test"),
        ({"name": "corp.test", "endpoints": ["http://corp.test"]}, "corp.test http://corp.test"),
        ({"name": "corp.test", "endpoints": ["https://corp.test/team"]}, "corp.test https://corp.test/team"),
        ({"name": "corp.test", "endpoints": ["https://corp.test:8443"]}, "corp.test https://corp.test:8443"),
    ],
)
def test_an_upstream_is_known_by_its_name_and_the_registry_behind_it(upstream: dict[str, Any], key: str) -> None:
    """Mirrors come and go; another registry under the same name inherits nothing."""
    assert validate({"upstreams": [upstream]}).upstreams[0].key == key


@pytest.mark.parametrize(
    ("endpoints", "hosts"),
    [
        (["https://corp.test"], []),
        (["https://else.test:8443/team"], []),
        (["https://mirror.test/path", "https://corp.test"], ["mirror.test"]),
        (["http://mirror.test:8080", "https://b.test", "https://corp.test"], ["mirror.test:8080", "b.test"]),
        (["https://MIRROR.test:443", "http://b.test:80", "https://corp.test"], ["mirror.test", "b.test"]),
    ],
)
def test_credentials_are_for_the_registrys_name_and_the_hosts_of_mirrors(endpoints: list[str], hosts: list[str]) -> None:
    """Those hosts by which a mirror's secret is looked up when it is asked."""
    assert validate(one(endpoints=endpoints)).upstreams[0].hosts == ["corp.test", *hosts]


# --- access ---


def test_access_is_unsaid_unless_it_is_said() -> None:
    """Not the same as public: with a pull secret it has to be said."""
    assert validate(one()).upstreams[0].access is None
    assert not validate(one()).verifies


@pytest.mark.parametrize("mode", ["public", "verify", "shared"])
def test_access_may_be_one_word(mode: str) -> None:
    around: dict[str, Any] = {
        "externalURL": "https://127.0.0.1:5000",
        "listener": {"tlsCertFile": "/c", "clientCAFile": "/a"},
    }
    short, long = (validate(one(access=access) | around) for access in (mode, {"mode": mode}))
    assert short == long
    access = short.upstreams[0].access
    assert access is not None
    assert access.mode == mode
    assert (access.public_for, access.max_age, access.stale_for) == (24 * 3600, 300, 24 * 3600)
    assert short.verifies is (mode == "verify")


@pytest.mark.parametrize(
    ("access", "path", "hint"),
    [
        ("privat", "upstreams[0].access.mode", "'public', 'verify' or 'shared'"),
        ("", "upstreams[0].access.mode", "'public', 'verify' or 'shared'"),
        ({"mode": "Public"}, "upstreams[0].access.mode", "'public', 'verify' or 'shared'"),
        (["public"], "upstreams[0].access", "keys are needed below it"),
        (5, "upstreams[0].access", "keys are needed below it"),
        ({"mod": "public"}, "upstreams[0].access.mod", "did you mean 'mode'"),
        ({"maxAge": "5"}, "upstreams[0].access.maxAge", "10s"),
        ({"maxAge": "721h"}, "upstreams[0].access.maxAge", "at most 720h (30 days)"),
        ({"publicFor": "-1s"}, "upstreams[0].access.publicFor", "10s"),
        ({"repositories": ["a"]}, "upstreams[0].access", "belong to mode: shared"),
        ({"mode": "verify", "iUnderstandThisIsShared": True}, "upstreams[0].access", "belong to mode: shared"),
    ],
)
def test_access_that_means_nothing_is_refused(access: object, path: str, hint: str) -> None:
    faults = faults_of(one(access=access))
    assert any(fault.startswith(f"{path}: ") and hint in fault for fault in faults), faults


def test_ages_may_be_nothing_at_all() -> None:
    """Then the registry is asked each time."""
    access = validate(one(access={"maxAge": "0s", "staleFor": "0s", "publicFor": "0s"})).upstreams[0].access
    assert access is not None
    assert (access.public_for, access.max_age, access.stale_for) == (0, 0, 0)


# --- what keys may be by themselves, and not together ---

OPEN = {"listen": ":5000"}
VERIFY = one(access="verify") | {"externalURL": "https://cache.corp:5000"}
SHARED = one(access="shared")
USERS = {"htpasswdFile": "/users"}
TLS = {"tlsCertFile": "/cert", "tlsKeyFile": "/key"}
CLIENTS = TLS | {"clientCAFile": "/ca"}


def at(raw: dict[str, Any], *paths: tuple[str, Any]) -> dict[str, Any]:
    """``raw`` with sections beside it."""
    return raw | dict(paths)


@pytest.mark.parametrize(
    ("raw", "path", "hints"),
    [
        pytest.param(
            one(access="verify"), "externalURL", ["access: verify", "https://cache.corp:5000"], id="no-external-url"
        ),
        pytest.param(
            {"externalURL": "http://cache.corp:5000", "listener": TLS}, "externalURL", ["https://"], id="clear-beside-tls"
        ),
        pytest.param(
            one(clientCertFile="/c"), "upstreams[0].access", ["clientCertFile", "access: shared"], id="certificate-public"
        ),
        pytest.param(
            at(one(access="verify", clientCertFile="/c"), ("externalURL", "https://cache.corp:5000")),
            "upstreams[0].access",
            ["clientCertFile", "access: shared"],
            id="certificate-verify",
        ),
        pytest.param(
            one(clientCertFile="/c", access={"mode": "shared", "repositories": ["corp.test/team/*"]}),
            "upstreams[0].access",
            ["clientCertFile", "without repositories"],
            id="certificate-shared-in-part",
        ),
        pytest.param(
            at(VERIFY, ("listener", USERS)), "listener.htpasswdFile", ["access: verify", "clientCAFile"], id="both"
        ),
        pytest.param(
            VERIFY | OPEN, "listen", ["access: verify", "tlsCertFile", "tlsTerminatedInFront"], id="verify-in-clear"
        ),
        pytest.param(
            VERIFY | {"listen": "10.0.0.1:5000"}, "listen", ["access: verify", "10.0.0.1:5000"], id="verify-on-one-address"
        ),
        pytest.param(
            at(OPEN, ("listener", USERS)), "listen", ["listener.htpasswdFile", "tlsCertFile"], id="passwords-in-clear"
        ),
        pytest.param(
            SHARED,
            "upstreams[0].access",
            ["htpasswdFile", "clientCAFile", "repositories", "iUnderstandThisIsShared"],
            id="open",
        ),
        pytest.param(at(SHARED, ("listener", TLS)), "upstreams[0].access", ["open"], id="open-with-tls"),
        pytest.param(
            one(access={"mode": "shared", "iUnderstandThisIsShared": False}), "upstreams[0].access", ["open"], id="not-meant"
        ),
        pytest.param(one(access={"mode": "shared", "repositories": []}), "upstreams[0].access", ["open"], id="empty-list"),
        pytest.param({"admin": ":5001"}, "admin", ["tokenFile", "clientCAFile", "loopback"], id="admin-in-the-open"),
        pytest.param(
            {"admin": "10.0.0.1:5001", "adminListener": TLS},
            "admin",
            ["tokenFile", "clientCAFile"],
            id="admin-with-tls-alone",
        ),
    ],
)
def test_a_danger_is_refused_and_named_with_what_to_do(raw: dict[str, Any], path: str, hints: list[str]) -> None:
    (fault,) = faults_of(raw)
    assert fault.startswith(path), fault
    assert not [hint for hint in hints if hint not in fault], fault


def test_every_danger_is_named_at_once() -> None:
    upstreams = [{"name": "a.test", "access": "verify"}, {"name": "b.test", "access": "shared"}]
    faults = faults_of({"upstreams": upstreams, "listen": ":5000", "admin": ":5001"})
    assert [fault.partition(":")[0] for fault in faults] == ["externalURL", "listen", "upstreams[1].access", "admin"]


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(OPEN, id="open-and-public"),
        pytest.param(at(OPEN, ("upstreams", [{"name": "corp.test", "access": "public"}])), id="open-and-public-said"),
        pytest.param(VERIFY, id="verify-on-loopback"),
        pytest.param(at(VERIFY | OPEN, ("listener", TLS)), id="verify-with-tls"),
        pytest.param(at(VERIFY | OPEN, ("listener", {"tlsCertFile": "/pem-with-key"})), id="verify-with-tls-of-one-file"),
        pytest.param(at(VERIFY | OPEN, ("listener", {"tlsTerminatedInFront": True})), id="verify-behind-a-front"),
        pytest.param(at(VERIFY | OPEN, ("listener", CLIENTS)), id="verify-with-client-certificates"),
        pytest.param({"listener": USERS}, id="users-on-loopback"),
        pytest.param(at(OPEN, ("listener", USERS | TLS)), id="users-with-tls"),
        pytest.param(at(OPEN, ("listener", USERS | {"tlsTerminatedInFront": True})), id="users-behind-a-front"),
        pytest.param(one(access={"mode": "shared", "iUnderstandThisIsShared": True}) | OPEN, id="shared-and-meant"),
        pytest.param(one(access={"mode": "shared", "repositories": ["corp.test/open/*"]}) | OPEN, id="shared-for-some"),
        pytest.param(at(SHARED, ("listener", USERS)), id="shared-with-users"),
        pytest.param(at(SHARED | OPEN, ("listener", CLIENTS)), id="shared-with-client-certificates"),
        pytest.param({"admin": "127.0.0.2:5001"}, id="admin-on-loopback"),
        pytest.param({"admin": ":5001", "adminListener": {"tokenFile": "/token"}}, id="admin-with-a-token"),
        pytest.param({"admin": ":5001", "adminListener": CLIENTS}, id="admin-with-client-certificates"),
    ],
)
def test_what_is_not_dangerous_is_taken(raw: dict[str, Any]) -> None:
    assert validate(raw)


@pytest.mark.parametrize("section", ["listener", "adminListener"])
@pytest.mark.parametrize("keys", [{"tlsKeyFile": "/k"}, {"clientCAFile": "/a"}, {"tlsKeyFile": "/k", "clientCAFile": "/a"}])
def test_keys_of_tls_need_a_certificate(section: str, keys: dict[str, str]) -> None:
    assert faults_of({section: keys}) == [f"{section}: tlsKeyFile and clientCAFile need tlsCertFile beside them"]


def test_users_need_to_say_who_they_are() -> None:
    repositories = {"users": {"alice": ["docker.io/*"], "*": []}}
    assert faults_of({"listener": repositories}) == [
        "listener: users: nobody says who he is; give htpasswdFile, or clientCAFile"
    ]
    for guard in (USERS, CLIENTS):
        assert validate({"listener": guard | repositories}).listener.users == repositories["users"]


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("https://cache.corp", "https://cache.corp"),
        ("https://cache.corp/", "https://cache.corp"),
        ("https://cache.corp:5000", "https://cache.corp:5000"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("http://[::1]:5000", "http://[::1]:5000"),
    ],
)
def test_the_external_url(url: str, kept: str) -> None:
    assert validate({"externalURL": url}).external_url == kept


@pytest.mark.parametrize(
    "url",
    [
        "",
        "cache.corp:5000",
        "//cache.corp",
        "ftp://cache.corp",
        "https://",
        "https://cache.corp/registry",
        "https://cache.corp/registry/",
        "https://cache.corp/v2",
        "https://u:hunter2@cache.corp",
        "https://cache.corp?a=hunter2",
        "https://cache.corp#a",
        'https://cache.corp"',
        "https://cache.corp\n",
        5,
    ],
)
def test_what_is_no_external_url_is_refused(url: object) -> None:
    """It goes into a header and into clients' hands."""
    (fault,) = faults_of({"externalURL": url})
    assert fault.startswith("externalURL: ")
    assert "hunter2" not in fault


@pytest.mark.parametrize("realm", ["", 'a"b', "a\\b", "a\r\nX: y", "\u00e9", "x" * 129])
def test_a_realm_that_would_break_its_header_is_refused(realm: str) -> None:
    (fault,) = faults_of({"listener": {"realm": realm}})
    assert fault.startswith("listener.realm: ")


@pytest.mark.parametrize(
    ("glob", "is_refused"),
    [
        ("corp.test/team/*", False),
        ("corp.test/*", False),
        ("*", False),
        ("*/team/app", False),
        ("corp.*/team", False),
        ("c[o]rp.test/a", False),
        ("team/*", True),
        ("corp.test", True),
        ("corp.test/team/app:1", True),
        ("corp.test/Team/*", True),
        ("corp.tes/*", True),
        ("corp.testing/*", True),
    ],
)
def test_a_glob_that_can_match_nothing_of_its_registry_is_refused(glob: str, is_refused: bool) -> None:
    access = one(access={"mode": "shared", "repositories": [glob]})
    secret = one(access="public") | {"imagePullSecrets": [{"file": "/a", "repositories": [glob]}]}
    for raw, key in ((access, "upstreams[0].access.repositories"), (secret, "imagePullSecrets[0].repositories")):
        if is_refused:
            (fault,) = faults_of(raw)
            assert fault.startswith(f"{key}: '{glob}' matches nothing of corp.test")
        else:
            validate(raw)


# --- pull secrets ---


@pytest.mark.parametrize(
    "source",
    [
        {"file": "/a/config.json"},
        {"directory": "/a"},
        {"registry": "corp.test", "username": "u", "passwordFile": "/p"},
        {"file": "/a", "repositories": ["corp.test/team/*"]},
    ],
)
def test_where_a_pull_secret_is(source: dict[str, Any]) -> None:
    (found,) = validate({**one(access="public"), "imagePullSecrets": [source]}).image_pull_secrets
    written = found.model_dump(by_alias=True, exclude_defaults=True, mode="json")
    assert written == source


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ({}, "exactly one of file, directory and registry is needed"),
        ({"file": "/a", "directory": "/b"}, "exactly one of file, directory and registry is needed"),
        (
            {"file": "/a", "registry": "corp.test", "username": "u", "passwordFile": "/p"},
            "exactly one of file, directory and registry is needed",
        ),
        ({"username": "u", "passwordFile": "/p"}, "exactly one of file, directory and registry is needed"),
        ({"registry": "corp.test"}, "registry, username and passwordFile belong together"),
        ({"registry": "corp.test", "username": "u"}, "registry, username and passwordFile belong together"),
        ({"registry": "corp.test", "passwordFile": "/p"}, "registry, username and passwordFile belong together"),
        ({"file": "/a", "username": "u"}, "registry, username and passwordFile belong together"),
        ({"directory": "/a", "passwordFile": "/p"}, "registry, username and passwordFile belong together"),
    ],
)
def test_a_pull_secret_is_in_one_place(source: dict[str, Any], hint: str) -> None:
    assert faults_of({"imagePullSecrets": [{"file": "/good"}, source]}) == [f"imagePullSecrets[1]: {hint}"]


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ({"registry": "corp.test", "username": "u", "password": "hunter2"}, "imagePullSecrets[0].password"),
        ({"file": ""}, "imagePullSecrets[0].file"),
        ({"directory": ["hunter2"]}, "imagePullSecrets[0].directory"),
        ({"registry": "", "username": "u", "passwordFile": "/p"}, "imagePullSecrets[0].registry"),
        ("hunter2", "imagePullSecrets[0]"),
    ],
)
def test_a_pull_secret_that_is_none_is_named_and_not_repeated(source: object, path: str) -> None:
    """A password itself is in no configuration."""
    faults = faults_of({"imagePullSecrets": [source]})
    assert any(fault.startswith(f"{path}: ") for fault in faults), faults
    assert "hunter2" not in "".join(faults)


def test_the_kubelets_plugins_need_both_of_its_flags() -> None:
    both = {"configFile": "/c.yaml", "binDirectory": "/bin"}
    assert validate({"imageCredentialProvider": both}).image_credential_provider is not None
    for key in both:
        assert faults_of({"imageCredentialProvider": {key: both[key]}}) == [
            f"imageCredentialProvider.{(set(both) - {key}).pop()}: is needed"
        ]


def test_a_password_file_is_not_read_into_the_configuration(tmp_path: Path) -> None:
    """It is read again while serving; and what is in no configuration is in no dump of it."""
    (tmp_path / "password").write_text("hunter2")
    entry = f"{{registry: corp.test, username: u, passwordFile: {tmp_path}/password}}"
    config = load_text(tmp_path, f"imagePullSecrets: [{entry}]\nadminListener: {{tokenFile: {tmp_path}/password}}")
    assert config.image_pull_secrets[0].password_file == tmp_path / "password"
    assert config.admin_listener.token_file == tmp_path / "password"
    assert "hunter2" not in repr(config)


# --- rules ---


@pytest.mark.parametrize(
    ("rule", "path"),
    [
        ({"match": "*", "action": "deny"}, "rules[0].name"),
        ({"name": "", "match": "*", "action": "deny"}, "rules[0].name"),
        ({"name": "a", "action": "deny"}, "rules[0].match"),
        ({"name": "a", "match": "", "action": "deny"}, "rules[0].match"),
        ({"name": "a", "match": "*"}, "rules[0].action"),
        ({"name": "a", "match": "*", "action": "block"}, "rules[0].action"),
        ({"name": "a", "match": "*", "action": "deny", "dryrun": True}, "rules[0].dryrun"),
    ],
)
def test_a_rule_that_is_not_whole_is_refused(rule: dict[str, Any], path: str) -> None:
    (fault,) = faults_of({"rules": [rule]})
    assert fault.startswith(f"{path}: ")
