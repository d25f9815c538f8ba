"""The configuration: every fault at once, by key path and with a hint; nothing dangerous by default."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from proxy.config import PUBLIC_REGISTRIES, Config, ConfigError, keys, load, validate
from proxy.values import Address, parse_duration, parse_quantity


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
    ],
)
def test_an_unknown_key_is_refused_with_what_was_meant(raw: object, path: str, hint: str) -> None:
    (fault,) = faults_of(raw)
    assert fault.startswith(f"{path}: unknown key")
    assert hint in fault


@pytest.mark.parametrize(
    ("raw", "path", "hint"),
    [
        ({"upstreams": []}, "upstreams", "at least 1"),
        ({"upstreams": None}, "upstreams", "list"),
        ({"upstreams": [{}]}, "upstreams[0].name", "required"),
        (one(endpoints=[]), "upstreams[0]", "endpoints: at least one"),
        (one(pathPrefix="a/b"), "upstreams[0].pathPrefix", "one component"),
        (one(pathPrefix=""), "upstreams[0].pathPrefix", "one component"),
        (one(caFile="/x", insecureSkipVerify=True), "upstreams[0]", "exclude each other"),
        (one(clientKeyFile="/k"), "upstreams[0]", "clientKeyFile: without clientCertFile"),
        (one(clientCertFile=["/c"]), "upstreams[0].clientCertFile", "path"),
        (one(clientCrtFile="/c"), "upstreams[0].clientCrtFile", "did you mean 'clientCertFile'"),
        (one(httpsProxy="http://a.test"), "upstreams[0].httpsProxy", "did you mean 'httpProxy'"),
        (one(timeouts={"endpoint": "0s"}), "upstreams[0].timeouts.endpoint", "greater than 0"),
        (one(timeouts={"head": "0s"}), "upstreams[0].timeouts.head", "greater than 0"),
        (one(timeouts={"head": "2h"}), "upstreams[0].timeouts.head", "3600"),
        (one(allowAddresses=["10.0.0.0/33"]), "upstreams[0].allowAddresses[0]", ""),
        ({"log": {"level": "INFO"}}, "log.level", "'info'"),
        ({"cache": []}, "cache", "dictionary"),
        ([], "", "dictionary"),
        ("text", "", "dictionary"),
    ],
)
def test_a_fault_names_its_key(raw: object, path: str, hint: str) -> None:
    faults = faults_of(raw)
    assert any(fault.startswith(path) and hint in fault for fault in faults), faults


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
        tmp_path, "upstreams: [{name: corp.test, clientCertFile: /c.pem, clientKeyFile: /k.pem}]"
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
    ],
)
def test_a_private_endpoint_has_to_be_meant(host: str) -> None:
    (fault,) = faults_of(one(endpoints=[f"http://{host}:5000"]))
    assert fault.startswith("upstreams[0]")
    hint = fault.rpartition("allowAddresses: [")[2].rstrip("]")
    assert validate(one(endpoints=[f"http://{host}:5000"], allowAddresses=[hint])), "the hint is what to write"


@pytest.mark.parametrize("host", ["8.8.8.8", "[2606:4700::1111]", "corp.test"])
def test_a_public_endpoint_needs_no_permission(host: str) -> None:
    assert validate(one(endpoints=[f"https://{host}"]))


@pytest.mark.parametrize(
    "upstreams",
    [
        [{"name": "a.test"}, {"name": "a.test"}],
        [{"name": "docker.io"}, {"name": "index.docker.io"}],
        [{"name": "a.test"}, {"name": "b.test", "pathPrefix": "a.test"}],
        [{"name": "a.test", "pathPrefix": "x"}, {"name": "b.test", "pathPrefix": "x"}],
        [{"name": "a.test:1"}, {"name": "b.test", "pathPrefix": "a.test_1"}],
    ],
)
def test_two_upstreams_of_one_form_clash(upstreams: list[dict[str, str]]) -> None:
    assert any("means both" in fault and fault.startswith("upstreams") for fault in faults_of({"upstreams": upstreams}))


def test_any_free_port_is_no_clash() -> None:
    assert validate({"listen": "127.0.0.1:0", "admin": "127.0.0.1:0"})
    assert faults_of({"listen": ":5000", "admin": ":5000"})


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
