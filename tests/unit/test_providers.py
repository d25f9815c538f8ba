"""The kubelet's credential provider plugins: their configuration, when they are asked, and what becomes of their answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy.credentials.credential import Credential, Found
from proxy.credentials.programs import ProgramFailed
from proxy.credentials.providers import (
    Provider,
    ProviderConfigInvalid,
    Providers,
    parse_answer,
    parse_duration,
    parse_provider_config,
)
from tests.unit.clock import Clock
from tests.unit.test_ahead import turns
from tests.unit.test_programs import SECRET, pids_in, script, text_of, until_gone

V1 = "credentialprovider.kubelet.k8s.io/v1"
APP, OTHER, ELSEWHERE = "one.registry.test/team/app", "one.registry.test/team/other", "two.registry.test/team/app"

# The form that nodes of Amazon EKS and Azure have.
EKS = b"""
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
  - name: ecr-credential-provider
    matchImages:
      - "*.dkr.ecr.*.amazonaws.com"
      - "*.dkr.ecr.*.amazonaws.com.cn"
    defaultCacheDuration: "12h"
    apiVersion: credentialprovider.kubelet.k8s.io/v1
    args:
      - get-credentials
    env:
      - name: AWS_PROFILE
        value: example_profile
      - name: EMPTY
  - name: acr-credential-provider
    matchImages: ["*.azurecr.io"]
    defaultCacheDuration: 0s
    apiVersion: credentialprovider.kubelet.k8s.io/v1alpha1
    args:
    tokenAttributes: null
"""


def test_the_configuration_of_nodes_is_read() -> None:
    assert parse_provider_config(EKS, "providers.yaml") == (
        Provider(
            name="ecr-credential-provider",
            match_images=("*.dkr.ecr.*.amazonaws.com", "*.dkr.ecr.*.amazonaws.com.cn"),
            default_cache_seconds=12 * 3600,
            api_version=V1,
            args=("get-credentials",),
            env=(("AWS_PROFILE", "example_profile"), ("EMPTY", "")),
        ),
        Provider("acr-credential-provider", ("*.azurecr.io",), 0, f"{V1}alpha1"),
    )


def entry(**keys: object) -> dict[str, object]:
    """A provider as it is configured; None takes a key away."""
    whole = {"name": "plugin", "matchImages": ["*.registry.test"], "defaultCacheDuration": "1m", "apiVersion": V1} | keys
    return {key: value for key, value in whole.items() if value is not None}


def config(*entries: object, **keys: object) -> dict[str, object]:
    kinds = {"apiVersion": "kubelet.config.k8s.io/v1", "kind": "CredentialProviderConfig"}
    return {**kinds, "providers": list(entries) or [entry()], **keys}


@pytest.mark.parametrize("version", ["v1", "v1beta1", "v1alpha1"])
@pytest.mark.parametrize("write", [json.dumps, yaml.safe_dump, lambda value: json.dumps(value, indent="\t")])
def test_every_version_that_the_kubelet_takes_and_both_notations(version: str, write: Callable[[object], str]) -> None:
    document = config(
        entry(apiVersion=f"credentialprovider.kubelet.k8s.io/{version}"), apiVersion=f"kubelet.config.k8s.io/{version}"
    )
    (provider,) = parse_provider_config(write(document).encode(), "file")
    assert provider.api_version == f"credentialprovider.kubelet.k8s.io/{version}"


@pytest.mark.parametrize(
    ("document", "text"),
    [
        (None, "the file: keys are needed"),
        ([], "the file: keys are needed"),
        (config(kind="Config"), "kind: CredentialProviderConfig is needed"),
        (config(apiVersion="v1"), "apiVersion: kubelet.config.k8s.io/v1 is needed"),
        (config(apiVersion="kubelet.config.k8s.io/v2"), "apiVersion: kubelet"),
        (config(apiVersion=["kubelet.config.k8s.io/v1"]), "apiVersion: kubelet"),
        (config(provider=[]), "provider: unknown key"),
        (config(providers=[]), "providers: at least one"),
        (config(providers=None), "providers: at least one"),
        (config(providers={}), "providers: a list"),
        (config(entry(), "plugin"), "providers[1]: keys are needed"),
        (config(entry(), entry()), "providers[1].name: stands twice"),
        (config(entry(name=None)), "providers[0].name: a text is needed"),
        *((config(entry(name=name)), "providers[0].name: the name of a program") for name in ("", ".", "..", "a/b", "a b")),
        (config(entry(name="a\0")), "providers[0].name: a NUL"),
        (config(entry(matchImages=None)), "providers[0].matchImages: at least one"),
        (config(entry(matchImages=[])), "providers[0].matchImages: at least one"),
        (config(entry(matchImages="*.test")), "providers[0].matchImages: a list"),
        (config(entry(matchImages=["a.test", 7])), "providers[0].matchImages[1]: a text"),
        (config(entry(matchImages=[""])), "providers[0].matchImages[0]: not a host"),
        (config(entry(matchImages=["a.test b.test"])), "providers[0].matchImages[0]: not a host"),
        (config(entry(defaultCacheDuration=None)), "providers[0].defaultCacheDuration: not a duration"),
        (config(entry(defaultCacheDuration=60)), "providers[0].defaultCacheDuration: not a duration"),
        (config(entry(defaultCacheDuration="1d")), "providers[0].defaultCacheDuration: not a duration"),
        (config(entry(defaultCacheDuration="-1s")), "providers[0].defaultCacheDuration: less than 0"),
        (config(entry(apiVersion=None)), f"providers[0].apiVersion: {V1} is needed"),
        (config(entry(apiVersion="client.authentication.k8s.io/v1")), f"providers[0].apiVersion: {V1} is needed"),
        (config(entry(apiVersion=f"{V1}beta2")), f"providers[0].apiVersion: {V1} is needed"),
        (config(entry(args="get")), "providers[0].args: a list"),
        (config(entry(args=[True])), "providers[0].args[0]: a text is needed; write it in quotes"),
        (config(entry(env={"A": SECRET})), "providers[0].env: a list"),
        (config(entry(env=[f"A={SECRET}"])), "providers[0].env[0]: keys"),
        (config(entry(env=[{"value": SECRET}])), "providers[0].env[0].name: a text"),
        (config(entry(env=[{"name": "", "value": SECRET}])), "providers[0].env[0].name: the name"),
        (config(entry(env=[{"name": "A=B", "value": SECRET}])), "providers[0].env[0].name: the name"),
        (config(entry(env=[{"name": "A", "value": [SECRET]}])), "providers[0].env[0].value: a text"),
        (config(entry(env=[{"name": "A", "value": f"{SECRET}\0"}])), "providers[0].env[0].value: a NUL"),
        (config(entry(env=[{"name": "A", "valueFrom": SECRET}])), "providers[0].env[0].valueFrom: unknown key"),
        (config(entry(matchImage=[])), "providers[0].matchImage: unknown key"),
        (
            config(entry(tokenAttributes={"serviceAccountTokenAudience": "a", "requireServiceAccount": True})),
            "providers[0].tokenAttributes: the plugin wants tokens of pods' service accounts",
        ),
    ],
)
@pytest.mark.parametrize("write", [json.dumps, yaml.safe_dump])
def test_a_fault_is_named_with_its_source_and_key(document: object, text: str, write: Callable[[object], str]) -> None:
    with pytest.raises(ProviderConfigInvalid) as caught:
        parse_provider_config(write(document).encode(), "/etc/providers.yaml")
    assert str(caught.value).startswith(f"/etc/providers.yaml: {text}")
    assert SECRET not in text_of(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *(
            f"a: [{SECRET}",
            f"{{'{SECRET}': ",
            f"a: !!bool {SECRET}",
            f"a: !!timestamp {SECRET}",
            f"&{SECRET} a: *b",
            "a: 1\n\tb: 2",
        ),
        *(f"a: 1\n---\nb: {SECRET}", f"{SECRET}: \x00", "[" * 100_000, '{"a":' * 100_000, "{[]: 1}: 2", "a: 2001-99-99"),
    ],
)
def test_what_cannot_be_read_is_not_quoted(text: str) -> None:
    with pytest.raises(ProviderConfigInvalid) as caught:
        parse_provider_config(text.encode(), "providers.yaml")
    assert SECRET not in text_of(caught.value)
    chained: BaseException | None = caught.value
    while chained is not None:
        assert SECRET not in str(chained)
        chained = chained.__context__


def test_the_line_of_a_fault_is_told() -> None:
    with pytest.raises(ProviderConfigInvalid, match=r"^providers.yaml: neither YAML nor JSON; see line 3$"):
        parse_provider_config(b"kind: a\nb:\n\t- c\n", "providers.yaml")


@given(st.binary() | st.text(alphabet="{}[]:,-!&*|>'\"# \n\tabe10_.?%@").map(str.encode))
def test_no_configuration_raises_anything_else(text: bytes) -> None:
    with contextlib.suppress(ProviderConfigInvalid):
        parse_provider_config(text, "file")


def test_a_provider_does_not_show_its_arguments_and_environment() -> None:
    (provider,) = parse_provider_config(
        json.dumps(config(entry(args=[SECRET], env=[{"name": "A", "value": SECRET}]))).encode(), "file"
    )
    assert SECRET not in repr(provider)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("0", 0), ("0s", 0), ("12h", 43200), ("12h0m0s", 43200), ("1m30s", 90), ("1.5h", 5400), (".5s", 0.5), ("1.s", 1)),
        *(("300ms", 0.3), ("100us", 1e-4), ("100µs", 1e-4), ("100μs", 1e-4), ("5ns", 5e-9), ("+5s", 5), ("-5s", -5)),
        *(("-0", 0), ("1s1h", 3601), ("2562047h", 2562047 * 3600)),
    ],
)
def test_a_duration_is_read_as_go_reads_it(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        *("", "1", "s", ".s", "1 s", " 1s", "1s ", "1d", "1H", "--1s", "1s-1s", "1e3s", "inf", "nan", "\u0661s", "0x1s"),
        *("2562048h", "9" * 400 + "h", None, 60, 0, True, ["1s"], {}),
    ],
)
def test_no_duration(text: object) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


class Plugin:
    """A plugin that notes each request and gives what is in the file ``answer``."""

    def __init__(self, directory: Path, name: str = "plugin") -> None:
        self.directory = directory / f"{name}.d"
        self.directory.mkdir()
        self.bin, self.name = directory, name
        self.does(f"cat {self.directory}/answer")

    def does(self, body: str) -> None:
        script(self.bin, f'echo "$(cat)" >>{self.directory}/requests\n{body}', self.name)

    def gives(self, kind: str = "Image", duration: object = None, auth: object = None, **keys: object) -> None:
        if auth is None:
            auth = {"*.registry.test": {"username": "user", "password": f"{kind}-{duration}"}}
        answer = {"apiVersion": V1, "kind": "CredentialProviderResponse", "cacheKeyType": kind, "cacheDuration": duration}
        (self.directory / "answer").write_text(json.dumps(answer | {"auth": auth} | keys))

    @property
    def requests(self) -> list[dict[str, Any]]:
        path = self.directory / "requests"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def asked(self) -> list[str]:
        return [request["image"] for request in self.requests]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    return Plugin(tmp_path)


def provider(name: str = "plugin", *patterns: str, default: float = 1000, **keys: Any) -> Provider:
    return Provider(name, patterns or ("*.registry.test",), default, V1, **keys)


@pytest.fixture
async def providers(tmp_path: Path, clock: Clock) -> AsyncIterator[Providers]:
    providers = Providers([provider()], tmp_path, clock)
    yield providers
    await providers.close()


def passwords(found: Found) -> list[str]:
    return [credential.password for credential in found.credentials]


async def test_a_plugin_is_asked_as_the_kubelet_asks_it(
    plugin: Plugin, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OURS", "ours")
    monkeypatch.setenv("BOTH", "ours")
    plugin.does(f'echo "$# $1 $2 $OURS $BOTH $THEIRS" >{tmp_path}/given; cat {plugin.directory}/answer')
    plugin.gives()
    env = (("BOTH", "first"), ("BOTH", "theirs"), ("THEIRS", "a  b"))
    found = (await Providers([provider(args=("get", "a  b"), env=env)], tmp_path, clock).lookup(APP)).credentials
    assert plugin.requests == [{"apiVersion": V1, "kind": "CredentialProviderRequest", "image": APP}]
    assert (tmp_path / "given").read_text() == "2 get a  b ours theirs a  b\n"
    assert found == (Credential("user", "Image-None"),)
    assert (found[0].source, found[0].registry) == ("plugin", "*.registry.test")


async def test_a_plugin_is_asked_only_about_its_images(plugin: Plugin, tmp_path: Path, clock: Clock) -> None:
    plugin.gives(auth={"*.test": {"username": "user", "password": "password"}})
    providers = Providers([provider("plugin", "a.test:5000/team", "*.b.test")], tmp_path, clock)
    images = ["a.test/team/app", "a.test:5000/app", "b.test/app", "a.b.test:443/app", "x.a.b.test/app", "docker.io/team/app"]
    for image in images:
        assert await providers.lookup(image) == Found(())
    assert plugin.asked == []
    await providers.lookup("a.test:5000/team/app")
    await providers.lookup("x.b.test/app")
    assert plugin.asked == ["a.test:5000/team/app", "x.b.test/app"]


@pytest.mark.parametrize(
    ("registry", "expected"),
    [
        *(("a.test:5000", True), ("a.test", False), ("x.b.test", True), ("b.test", False), ("x.y.b.test", False)),
        *(("c.test", True), ("docker.io", False), ("", False)),
    ],
)
def test_which_registries_are_concerned(registry: str, expected: bool, tmp_path: Path, clock: Clock) -> None:
    two = [provider("one", "a.test:5000/team", "*.b.test"), provider("two", "c.test/v1/team?x")]
    assert Providers(two, tmp_path, clock).concerns(registry) is expected


async def test_the_credentials_for_the_image_come_in_the_order_of_a_keyring(
    plugin: Plugin, providers: Providers, tmp_path: Path
) -> None:
    patterns = ["*.registry.test", "one.registry.test", "one.registry.test/team", "two.registry.test", "one.registry.test/x"]
    plugin.gives(auth={pattern: {"username": "user", "password": pattern} for pattern in patterns})
    assert passwords(await providers.lookup(APP)) == ["one.registry.test/team", "one.registry.test", "*.registry.test"]


async def test_several_plugins_for_one_image(tmp_path: Path, clock: Clock) -> None:
    for name, key in (("first", "*.registry.test"), ("second", "one.registry.test"), ("third", "*.registry.test")):
        Plugin(tmp_path, name).gives(auth={key: {"username": "user", "password": name}})
    broken = Plugin(tmp_path, "broken")
    broken.does("exit 1")
    providers = Providers([provider(name) for name in ("first", "broken", "second", "third")], tmp_path, clock)
    found = await providers.lookup(APP)
    assert passwords(found) == ["second", "first", "third"]
    assert found.failure == f"{tmp_path}/broken: exit code 1"


@pytest.mark.parametrize("auth", [{}, {"two.registry.test": {"username": "user", "password": "password"}}])
async def test_none_is_an_answer_and_kept(plugin: Plugin, providers: Providers, auth: object) -> None:
    plugin.gives(auth=auth)
    assert [await providers.lookup(APP) for _ in range(2)] == [Found(()), Found(())]
    assert plugin.asked == [APP]


async def test_auth_may_be_null_and_its_parts_missing(plugin: Plugin, providers: Providers) -> None:
    plugin.gives(duration="0s")
    answer = json.loads((plugin.directory / "answer").read_text())
    for auth, expected in ((None, []), ({"*.registry.test": {"password": "only"}}, [Credential("", "only")])):
        (plugin.directory / "answer").write_text(json.dumps(answer | {"auth": auth}))
        assert list((await providers.lookup(APP)).credentials) == expected


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("Image", [APP, OTHER, ELSEWHERE]),
        ("Registry", [APP, ELSEWHERE]),
        ("Global", [APP]),
    ],
)
async def test_an_answer_serves_what_it_is_for(plugin: Plugin, providers: Providers, kind: str, asked: list[str]) -> None:
    plugin.gives(kind)
    for image in (APP, OTHER, ELSEWHERE, APP, OTHER, ELSEWHERE):
        assert passwords(await providers.lookup(image)) == [f"{kind}-None"]
    assert plugin.asked == asked


async def test_a_registry_is_host_and_port(plugin: Plugin, tmp_path: Path, clock: Clock) -> None:
    plugin.gives("Registry", auth={})
    providers = Providers([provider("plugin", "a.test", "a.test:5000")], tmp_path, clock)
    for image in ("a.test/app", "a.test:5000/app", "a.test/other", "a.test:5000/other"):
        await providers.lookup(image)
    assert plugin.asked == ["a.test/app", "a.test:5000/app"]


async def test_an_answer_for_the_image_goes_before_the_registrys_and_that_before_the_global(
    plugin: Plugin, providers: Providers
) -> None:
    for kind, image in (("Image", APP), ("Registry", OTHER), ("Global", ELSEWHERE)):
        plugin.gives(kind)
        await providers.lookup(image)
    assert len(plugin.asked) == 3
    for image, kind in ((APP, "Image"), (OTHER, "Registry"), (ELSEWHERE, "Global"), ("three.registry.test/app", "Global")):
        assert passwords(await providers.lookup(image)) == [f"{kind}-None"]
    assert len(plugin.asked) == 3


async def test_answers_of_two_plugins_are_apart(tmp_path: Path, clock: Clock) -> None:
    plugins = [Plugin(tmp_path, name) for name in ("first", "second")]
    for each in plugins:
        each.gives("Global", auth={"*.registry.test": {"username": "user", "password": each.name}})
    providers = Providers([provider("first", "one.registry.test"), provider("second", "two.registry.test")], tmp_path, clock)
    assert passwords(await providers.lookup(APP)) == ["first"]
    assert passwords(await providers.lookup(ELSEWHERE)) == ["second"]


@pytest.mark.parametrize(
    ("duration", "default", "seconds"),
    [("5m", 1000, 300), (None, 1000, 1000), ("0s", 1000, 0), (None, 0, 0), ("-5m", 1000, 0)],
)
async def test_how_long_an_answer_holds(
    plugin: Plugin, tmp_path: Path, clock: Clock, duration: str | None, default: float, seconds: float
) -> None:
    plugin.gives(duration=duration)
    providers = Providers([provider(default=default)], tmp_path, clock)
    await providers.lookup(APP)
    if seconds:
        clock.now += seconds * 0.79
        await providers.lookup(APP)
        assert len(plugin.asked) == 1
        clock.now += seconds * 0.21
    await providers.lookup(APP)
    assert len(plugin.asked) == 2


@pytest.mark.parametrize("kind", ["Image", "Registry", "Global"])
async def test_an_answer_is_renewed_ahead_of_its_end(plugin: Plugin, providers: Providers, clock: Clock, kind: str) -> None:
    plugin.gives(kind, "100s")
    await providers.lookup(APP)
    plugin.gives(kind, "200s")
    clock.now += 80
    assert passwords(await providers.lookup(APP)) == [f"{kind}-100s"], "nobody waits for it"
    async with asyncio.timeout(20):
        while passwords(await providers.lookup(APP)) != [f"{kind}-200s"]:
            await asyncio.sleep(0.01)
    assert len(plugin.asked) == 2


async def test_fifty_callers_start_it_once(plugin: Plugin, providers: Providers) -> None:
    for kind in ("Image", "Registry"):
        plugin.gives(kind, "0s")
        found = await asyncio.gather(*(providers.lookup(APP) for _ in range(50)))
        assert [passwords(each) for each in found] == [[f"{kind}-0s"]] * 50
    assert plugin.asked == [APP, APP]


async def test_a_few_run_at_once_however_many_images_are_asked_for(plugin: Plugin, providers: Providers) -> None:
    """A client that makes up names does not fill the machine with programs."""
    plugin.does(
        f"echo 1 >>{plugin.directory}/log; sleep 0.05; cat {plugin.directory}/answer; echo -1 >>{plugin.directory}/log"
    )
    plugin.gives()
    images = [f"one.registry.test/{number}" for number in range(50)]
    found = await asyncio.gather(*(providers.lookup(image) for image in images))
    assert [passwords(each) for each in found] == [["Image-None"]] * 50
    running = accumulate(map(int, (plugin.directory / "log").read_text().split()))
    assert max(running) in range(2, 9)


async def test_the_limit_of_time_holds_for_the_wait_for_a_turn(tmp_path: Path, clock: Clock) -> None:
    plugin = Plugin(tmp_path)
    plugin.does("exec sleep 1000")
    providers = Providers([provider()], tmp_path, clock, within=2)
    found = await asyncio.gather(*(providers.lookup(f"one.registry.test/{number}") for number in range(50)))
    assert [(each.credentials, bool(each.failure)) for each in found] == [((), True)] * 50
    assert len(plugin.asked) < 50, "most never had a turn"


BROKEN = [
    ("exit 1", "exit code 1"),
    (f"echo {SECRET}; echo {SECRET} >&2; exit 1", "exit code 1"),
    (f"echo {SECRET}", "its answer is not a JSON object"),
    (f"while :; do echo {SECRET}; done", "more than 65536 bytes"),
    (f"echo {SECRET}; kill -9 $$", "died by signal 9"),
]


@pytest.mark.parametrize(("body", "text"), BROKEN)
async def test_a_plugin_that_fails_gives_none_and_is_named_once(
    plugin: Plugin, providers: Providers, clock: Clock, caplog: pytest.LogCaptureFixture, body: str, text: str
) -> None:
    caplog.set_level(logging.DEBUG)
    plugin.does(body)
    failed = Found((), f"{plugin.bin}/plugin: {text}")
    for _ in range(3):
        assert await providers.lookup(APP) == failed
        clock.now += 10
    assert await providers.lookup(OTHER) == failed
    assert len(plugin.asked) == 4
    line = f"no credentials from the provider plugin: {plugin.bin}/plugin: {text}"
    assert [
        (record.name, record.levelname, record.getMessage()) for record in caplog.records if record.name != "asyncio"
    ] == [("proxy.credentials.providers", "WARNING", line)]
    assert SECRET not in caplog.text


def changed(**keys: object) -> dict[str, object]:
    auth = {"*.registry.test": {"username": "user", "password": SECRET}}
    whole = {"apiVersion": V1, "kind": "CredentialProviderResponse", "cacheKeyType": "Image", "auth": auth}
    return whole | keys


ANSWERS: list[tuple[dict[str, object], str]] = [
    (changed(kind="ExecCredential"), "its answer is not a CredentialProviderResponse"),
    (changed(kind=None), "its answer is not a CredentialProviderResponse"),
    (changed(kind=[SECRET]), "its answer is not a CredentialProviderResponse"),
    (changed(apiVersion=f"{V1}beta1"), f"its answer is not of the apiVersion {V1}"),
    (changed(apiVersion=SECRET), f"its answer is not of the apiVersion {V1}"),
    (changed(cacheKeyType=SECRET), "the cacheKeyType of its answer is none of Image, Registry, Global"),
    (changed(cacheKeyType="image"), "the cacheKeyType of its answer is none of Image, Registry, Global"),
    (changed(cacheKeyType=None), "the cacheKeyType of its answer is none of Image, Registry, Global"),
    (changed(cacheDuration=SECRET), "the cacheDuration of its answer is not a duration"),
    (changed(cacheDuration=60), "the cacheDuration of its answer is not a duration"),
    (changed(auth=[SECRET]), "the auth of its answer is not a map to username and password"),
    (changed(auth=SECRET), "the auth of its answer is not a map to username and password"),
    (changed(auth={"*.registry.test": SECRET}), "the auth of its answer is not a map to username and password"),
    (
        changed(auth={"*.registry.test": {"username": [SECRET]}}),
        "the auth of its answer is not a map to username and password",
    ),
    (
        changed(auth={"*.registry.test": {"password": 7}, SECRET: {}}),
        "the auth of its answer is not a map to username and password",
    ),
]


@pytest.mark.parametrize(("answer", "text"), ANSWERS)
async def test_an_answer_that_is_none(
    plugin: Plugin, providers: Providers, caplog: pytest.LogCaptureFixture, answer: dict[str, object], text: str
) -> None:
    (plugin.directory / "answer").write_text(json.dumps(answer))
    assert await providers.lookup(APP) == Found((), f"{plugin.bin}/plugin: {text}")
    assert f"{plugin.bin}/plugin: {text}" in caplog.text
    assert SECRET not in caplog.text
    with pytest.raises(ProgramFailed) as caught:
        parse_answer(json.dumps(answer).encode(), "plugin", provider())
    assert SECRET not in text_of(caught.value)


async def test_a_plugin_that_hangs_ends_with_its_child(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = Plugin(tmp_path)
    plugin.does(f"sleep 1000 & echo $! >{tmp_path}/pids; wait")
    providers = Providers([provider()], tmp_path, clock, within=2)
    failed = Found((), f"{tmp_path}/plugin: no answer within 2 s")
    assert await asyncio.gather(*(providers.lookup(APP) for _ in range(50))) == [failed] * 50
    assert await providers.lookup(APP) == failed
    assert plugin.asked == [APP], "not started again at once"
    await until_gone(*await pids_in(tmp_path / "pids", 1))
    assert f"{tmp_path}/plugin: no answer within 2 s" in caplog.text


async def test_a_plugin_that_is_missing(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    assert await Providers([provider("missing")], tmp_path, clock).lookup(APP) == Found(
        (), f"{tmp_path}/missing: not found, or its interpreter is not"
    )
    assert f"{tmp_path}/missing: not found" in caplog.text


async def test_each_streak_of_failures_is_told(
    plugin: Plugin, providers: Providers, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        plugin.does("exit 1")
        assert (await providers.lookup(APP)).failure
        clock.now += 10
        assert (await providers.lookup(APP)).failure
        clock.now += 10
        plugin.does(f"cat {plugin.directory}/answer")
        plugin.gives(duration="0s")
        assert len((await providers.lookup(APP)).credentials) == 1
    assert caplog.text.count("no credentials from the provider plugin") == 2


async def test_a_failing_renewal_is_told_and_harms_nobody(
    plugin: Plugin, providers: Providers, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    plugin.gives(duration="100s")
    await providers.lookup(APP)
    plugin.does("exit 1")
    clock.now += 80
    async with asyncio.timeout(20):
        while not caplog.records:
            assert passwords(await providers.lookup(APP)) == ["Image-100s"]
            await asyncio.sleep(0.01)
    clock.now += 19
    assert passwords(await providers.lookup(APP)) == ["Image-100s"]


async def test_close_ends_the_plugins(plugin: Plugin, providers: Providers, tmp_path: Path) -> None:
    plugin.does(f"sleep 1000 & echo $! >{tmp_path}/pids; wait")
    caller = asyncio.ensure_future(providers.lookup(APP))
    pids = await pids_in(tmp_path / "pids", 1)
    await providers.close()
    await turns()
    assert caller.cancelled()
    await until_gone(*pids)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.sampled_from(["Image", "1h", "0s"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["username", "password"]) | st.text(), inner),
)


@given(
    st.fixed_dictionaries({}, optional={"cacheKeyType": JSON, "cacheDuration": JSON, "auth": JSON, "more": JSON}).map(
        lambda keys: json.dumps(changed(**keys)).encode()
    )
    | st.binary()
)
def test_no_answer_raises_anything_else(output: bytes) -> None:
    with contextlib.suppress(ProgramFailed):
        answer = parse_answer(output, "plugin", provider())
        assert all(isinstance(entry.credential, Credential) for entry in answer.entries)
