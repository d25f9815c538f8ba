"""The pull secrets together: rotated without a restart, kept when broken, dropped when gone, tried in their order."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from proxy.config.file import validate
from proxy.config.model import PullSecretSource
from proxy.config.upstreams import UpstreamConfig
from proxy.credentials.credential import Credential
from proxy.credentials.helpers import CredentialHelpers
from proxy.credentials.providers import Provider, Providers
from proxy.credentials.secrets import PullSecrets
from proxy.threads import Threads
from proxy.watch import Faults
from tests.conftest import running, settings, upstream
from tests.fakes.registry import ScriptedRegistry
from tests.unit.clock import Clock
from tests.unit.test_helpers import calls, giving, helper
from tests.unit.test_programs import script
from tests.unit.test_sources import CANARY, Mounted, docker_config, dockercfg, source

IMAGE = "corp.test/team/app"
HUB = "https://index.docker.io/v1/"


class Secrets:
    """Pull secrets of some sources, and what was said to be no more of them, each time that others are used."""

    def __init__(self, build: Callable[[Callable[[Collection[Credential]], None]], PullSecrets]) -> None:
        self.changes: list[set[Credential]] = []
        self.pull_secrets = build(lambda gone: self.changes.append(set(gone)))

    @property
    def dropped(self) -> set[Credential]:
        """All that are no more."""
        return set[Credential]().union(*self.changes)

    async def reread(self) -> list[str]:
        """What cannot be used."""
        try:
            await self.pull_secrets.reread()
        except Faults as faults:
            return list(faults.lines)
        return []

    async def passwords(self, image: str = IMAGE) -> list[str]:
        return [credential.password for credential in (await self.pull_secrets.lookup(image)).credentials]

    def concerns(self, name: str, *endpoints: str) -> bool:
        keys = {"name": name} | ({"endpoints": list(endpoints)} if endpoints else {})
        return self.pull_secrets.concerns(UpstreamConfig.model_validate(keys))


Make = Callable[..., Secrets]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def make(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    """Makes pull secrets; helpers and plugins are programs in ``tmp_path``."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    async with AsyncExitStack() as stack:
        threads = Threads(2)
        stack.callback(threads.close)

        def build(*sources: PullSecretSource, plugins: tuple[Provider, ...] = ()) -> Secrets:
            helpers = CredentialHelpers(clock, within=60)
            providers = Providers(plugins, tmp_path, clock)
            stack.push_async_callback(helpers.close)
            stack.push_async_callback(providers.close)
            return Secrets(lambda changed: PullSecrets(sources, helpers, providers, threads, clock, changed))

        yield build


@pytest.fixture
def files(tmp_path: Path) -> Callable[[str, bytes], PullSecretSource]:
    """Writes a file; the source that it is."""

    def write(name: str, content: bytes, **keys: Any) -> PullSecretSource:
        (tmp_path / name).write_bytes(content)
        return source(file=tmp_path / name, **keys)

    return write


Files = Callable[..., PullSecretSource]


# --- rotation ---


async def test_nothing_is_known_before_the_first_reading(make: Make, files: Files) -> None:
    secrets = make(files("a", docker_config()))
    assert await secrets.passwords() == []
    assert not secrets.concerns("corp.test")
    assert await secrets.reread() == []
    assert await secrets.passwords() == [CANARY]
    assert secrets.concerns("corp.test")


async def test_a_secret_that_changes_is_used_and_the_old_one_dropped(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    mounted = Mounted(tmp_path / "mount", dockerconfigjson=docker_config(password="first"))
    secrets = make(source(directory=mounted.path))
    await secrets.reread()
    for _ in range(2):
        assert await secrets.reread() == []
    assert (secrets.changes, caplog.messages) == ([set()], []), "nothing has changed since"
    mounted.update(dockerconfigjson=docker_config(password="second"))
    assert await secrets.reread() == []
    assert await secrets.passwords() == ["second"]
    assert secrets.dropped == {Credential("user", "first")}
    assert caplog.messages == ["the pull secrets have changed: 1 entries, 1 of before dropped"]


async def test_a_password_in_a_file_of_its_own_is_rotated_too(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("first")
    secrets = make(source(registry="corp.test", username="u", passwordFile=path))
    await secrets.reread()
    path.write_text("second\n")
    await secrets.reread()
    assert (await secrets.passwords(), secrets.dropped) == (["second"], {Credential("u", "first")})


async def test_a_secret_of_a_directory_that_is_gone_is_dropped(make: Make, tmp_path: Path) -> None:
    for name in ("a", "b"):
        Mounted(tmp_path / "mount" / name, dockerconfigjson=docker_config(password=name))
    secrets = make(source(directory=tmp_path / "mount"))
    await secrets.reread()
    assert await secrets.passwords() == ["a", "b"]
    (tmp_path / "mount" / "a").rename(tmp_path / "elsewhere")
    assert await secrets.reread() == []
    assert await secrets.passwords() == ["b"]
    assert secrets.dropped == {Credential("user", "a")}


async def test_a_secret_that_is_held_elsewhere_too_is_not_dropped(make: Make, files: Files) -> None:
    """The same user and password, be it for another registry: its tokens go on to be good."""
    secrets = make(files("a", docker_config()), files("b", docker_config("other.test")))
    await secrets.reread()
    files("a", docker_config(password="new"))
    await secrets.reread()
    assert secrets.dropped == set()
    files("b", docker_config(password="new"))
    await secrets.reread()
    assert secrets.dropped == {Credential("user", CANARY)}


async def test_a_secret_that_comes_is_a_change_too(make: Make, files: Files, tmp_path: Path) -> None:
    """A no to those there were says nothing of it."""
    secrets = make(files("a", docker_config()), source(file=tmp_path / "b"))
    assert len(await secrets.reread()) == 1
    files("b", docker_config("other.test"))
    assert await secrets.reread() == []
    assert secrets.changes == [set(), set()]
    assert secrets.concerns("other.test"), "also where it was asked before"


# --- what cannot be used ---


async def test_one_bad_secret_at_the_start_is_named_and_the_others_are_used(
    make: Make, files: Files, tmp_path: Path
) -> None:
    secrets = make(files("bad", b"{canary"), files("good", docker_config()))
    (fault,) = await secrets.reread()
    assert str(tmp_path / "bad") in fault
    assert "canary" not in fault
    assert await secrets.passwords() == [CANARY]


@pytest.mark.parametrize("content", [b"", b"{", b"{}x", None], ids=["empty", "half", "more", "gone"])
async def test_a_file_that_breaks_keeps_what_it_held_last(
    make: Make, files: Files, tmp_path: Path, content: bytes | None
) -> None:
    """Also one that is away for a moment, as when another program writes it anew."""
    path = tmp_path / "a"
    secrets = make(files("a", docker_config(password="first")))
    await secrets.reread()
    path.unlink() if content is None else path.write_bytes(content)
    for _ in range(2):
        (fault,) = await secrets.reread()
        assert str(path) in fault
        assert await secrets.passwords() == ["first"]
    assert secrets.dropped == set()
    path.write_bytes(docker_config(password="second"))
    assert await secrets.reread() == []
    assert await secrets.passwords() == ["second"]
    assert secrets.dropped == {Credential("user", "first")}


async def test_what_is_good_is_used_beside_what_breaks(make: Make, tmp_path: Path) -> None:
    mounts = {
        name: Mounted(tmp_path / "mount" / name, dockerconfigjson=docker_config(f"{name}.test", password=f"{name}1"))
        for name in ("a", "b")
    }
    secrets = make(source(directory=tmp_path / "mount"))
    await secrets.reread()
    mounts["a"].update(dockerconfigjson=b"{")
    mounts["b"].update(dockerconfigjson=docker_config("b.test", password="b2"))
    assert len(await secrets.reread()) == 1
    assert [await secrets.passwords(f"{name}.test/x") for name in ("a", "b")] == [["a1"], ["b2"]]
    assert secrets.dropped == {Credential("user", "b1")}


async def test_a_directory_that_cannot_be_read_keeps_all_that_was_below(make: Make, tmp_path: Path) -> None:
    for name in ("a", "b"):
        Mounted(tmp_path / "mount" / name, dockerconfigjson=docker_config(password=name))
    secrets = make(source(directory=tmp_path / "mount"))
    await secrets.reread()
    (tmp_path / "mount").rename(tmp_path / "elsewhere")
    assert len(await secrets.reread()) == 1
    (tmp_path / "mount").mkdir()
    assert len(await secrets.reread()) == 1, "empty, as before the first mount"
    assert (await secrets.passwords(), secrets.dropped) == (["a", "b"], set())


async def test_a_directory_of_a_name_that_begins_like_anothers_is_not_kept_with_it(make: Make, tmp_path: Path) -> None:
    for name in ("mount", "mount2"):
        Mounted(tmp_path / name, dockerconfigjson=docker_config(password=name))
    Mounted(tmp_path / "mount2" / "below", dockerconfigjson=docker_config(password="below"))
    secrets = make(source(directory=tmp_path / "mount"), source(directory=tmp_path / "mount2"))
    await secrets.reread()
    (tmp_path / "mount").rename(tmp_path / "elsewhere")
    (tmp_path / "mount2" / "below").rename(tmp_path / "below")
    assert len(await secrets.reread()) == 1
    assert await secrets.passwords() == ["mount", "mount2"]


async def test_an_empty_configuration_is_no_fault_and_ends_what_was_before(make: Make, files: Files) -> None:
    """``docker logout`` leaves that."""
    secrets = make(files("a", docker_config()))
    await secrets.reread()
    files("a", b'{"auths": {}}')
    assert await secrets.reread() == []
    assert (await secrets.passwords(), secrets.dropped) == ([], {Credential("user", CANARY)})


# --- in which order ---


async def test_secrets_of_one_key_are_tried_in_the_order_of_their_sources(make: Make, files: Files) -> None:
    secrets = make(*(files(name, docker_config(password=name)) for name in ("b", "a", "c")))
    await secrets.reread()
    assert await secrets.passwords() == ["b", "a", "c"]


async def test_the_order_stays_when_one_of_them_breaks(make: Make, files: Files) -> None:
    secrets = make(*(files(name, docker_config(password=name)) for name in ("b", "a", "c")))
    await secrets.reread()
    files("c", b"{")
    assert len(await secrets.reread()) == 1
    assert await secrets.passwords() == ["b", "a", "c"]
    files("c", docker_config(password="c"))
    files("a", b"{")
    assert len(await secrets.reread()) == 1
    assert await secrets.passwords() == ["b", "a", "c"]


async def test_whether_there_is_a_secret_is_known_anew_when_they_change(make: Make, files: Files) -> None:
    secrets = make(files("a", docker_config("one.test")))
    await secrets.reread()
    assert (secrets.concerns("one.test"), secrets.concerns("two.test")) == (True, False)
    files("a", docker_config("two.test"))
    await secrets.reread()
    assert (secrets.concerns("one.test"), secrets.concerns("two.test")) == (False, True)


async def test_a_secret_for_a_mirror_concerns_the_registry_that_is_mirrored(make: Make, files: Files) -> None:
    for mirror, concerned in (("https://mirror.test:8443", True), ("https://mirror.test", False)):
        secrets = make(files("a", docker_config("mirror.test:8443")))
        await secrets.reread()
        assert secrets.concerns("corp.test", mirror, "https://corp.test") is concerned


async def test_longer_keys_go_first_and_equal_credentials_are_tried_once(make: Make, files: Files) -> None:
    secrets = make(
        files("a", docker_config("corp.test", password="short")),
        files("b", docker_config("corp.test/team", password="long")),
        files("c", docker_config("https://corp.test/v2/", password="short")),
        files("d", docker_config("other.test", password="other")),
    )
    await secrets.reread()
    assert await secrets.passwords() == ["long", "short"]
    assert await secrets.passwords("corp.test/else") == ["short"]


async def test_a_secret_is_for_its_repositories(make: Make, files: Files) -> None:
    secrets = make(files("a", docker_config(), repositories=["corp.test/team/*"]))
    await secrets.reread()
    assert await secrets.passwords() == [CANARY]
    assert await secrets.passwords("corp.test/other/app") == []
    assert secrets.concerns("corp.test")


# --- helpers, stores and plugins ---


def with_helper(registry: str, name: str = "test", **auths: object) -> bytes:
    return json.dumps({"credHelpers": {registry: name}, "auths": auths}).encode()


async def test_a_helper_is_asked_when_its_registry_is_used(make: Make, files: Files, tmp_path: Path) -> None:
    helper(tmp_path, giving("user", "of a helper"))
    secrets = make(files("a", with_helper("corp.test")))
    assert await secrets.reread() == []
    assert not (tmp_path / "calls").exists()
    assert secrets.concerns("corp.test")
    for _ in range(2):
        assert await secrets.passwords() == ["of a helper"]
    assert calls(tmp_path) == ["get corp.test"]
    assert await secrets.passwords("other.test/x") == []


async def test_a_helper_that_fails_is_named_and_the_next_credential_is_tried(
    make: Make, files: Files, tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    helper(tmp_path, f"echo {CANARY}; echo {CANARY} >&2; exit 3")
    secrets = make(files("a", with_helper("corp.test")), files("b", docker_config(password="next")))
    await secrets.reread()
    for _ in range(3):
        assert await secrets.passwords() == ["next"]
        clock.now += 11
    assert caplog.messages == ["corp.test: docker-credential-test: exit code 3"], "said once"
    helper(tmp_path, giving("user", "works"))
    assert await secrets.passwords() == ["works", "next"]
    helper(tmp_path, "exit 4")
    clock.now += 24 * 3600
    assert await secrets.passwords() == ["next"]
    assert caplog.messages[1:] == ["corp.test: docker-credential-test: exit code 4"], "and again when it had worked"


async def test_what_programs_gave_is_used_until_they_have_answered_anew(make: Make, files: Files, tmp_path: Path) -> None:
    """As an operator asks for with a signal."""
    helper(tmp_path, giving("user", "first"))
    secrets = make(files("a", with_helper("corp.test")))
    await secrets.reread()
    assert await secrets.passwords() == ["first"]
    helper(tmp_path, giving("user", "second"))
    assert await secrets.passwords() == ["first"]
    secrets.pull_secrets.renew()
    assert await secrets.passwords() == ["first"], "nobody waits for it"
    async with asyncio.timeout(20):
        while await secrets.passwords() != ["second"]:
            await asyncio.sleep(0.01)


async def test_a_helper_that_has_none_is_passed_over(
    make: Make, files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    helper(tmp_path, "echo credentials not found in native keychain; exit 1")
    secrets = make(files("a", with_helper("corp.test")), files("b", docker_config(password="next")))
    await secrets.reread()
    assert (await secrets.passwords(), caplog.messages) == (["next"], [])


STORE = b'{"credsStore": "test", "auths": {"corp.test": {}}}'


def store(tmp_path: Path, *registries: str) -> None:
    """A store that has a secret for these."""
    known = json.dumps(dict.fromkeys(registries, "user"))
    give = giving("user", "of a store")
    helper(tmp_path, f"if [ \"$1\" = list ]; then\necho '{known}'\nelse\n{give}\nfi")


async def test_a_store_is_asked_what_it_knows_now_and_then_only(
    make: Make, files: Files, tmp_path: Path, clock: Clock
) -> None:
    store(tmp_path, "corp.test")
    secrets = make(files("a", STORE))
    for _ in range(3):
        assert await secrets.reread() == []
        clock.now += 90
    assert calls(tmp_path) == ["list "]
    assert await secrets.passwords() == ["of a store"]
    assert not secrets.concerns("new.test")
    store(tmp_path, "corp.test", "new.test")
    clock.now += 30
    assert await secrets.reread() == []
    assert calls(tmp_path) == ["list ", "get corp.test", "list "]
    assert secrets.concerns("new.test")


async def test_a_store_that_fails_keeps_what_it_knew_and_is_a_fault_as_long_as_that_is_so(
    make: Make, files: Files, tmp_path: Path, clock: Clock
) -> None:
    store(tmp_path, "corp.test")
    secrets = make(files("a", STORE))
    await secrets.reread()
    helper(tmp_path, f"echo {CANARY}; exit 1")
    clock.now += 301
    for _ in range(2):
        assert await secrets.reread() == ["docker-credential-test: exit code 1"]
        assert secrets.concerns("corp.test")
        clock.now += 5
    store(tmp_path, "corp.test")
    clock.now += 301
    assert await secrets.reread() == []


async def test_plugins_come_after_the_secrets(make: Make, files: Files, tmp_path: Path) -> None:
    answer = {
        "kind": "CredentialProviderResponse",
        "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
        "cacheKeyType": "Registry",
        "auth": {
            "corp.test": {"username": "user", "password": "of a plugin"},
            "*.test": {"username": "u", "password": CANARY},
        },
    }
    script(tmp_path, f"cat >/dev/null\ncat <<'END'\n{json.dumps(answer)}\nEND", "plugin")
    plugin = Provider("plugin", ("*.test",), 60.0, "credentialprovider.kubelet.k8s.io/v1")
    secrets = make(files("a", docker_config()), plugins=(plugin,))
    await secrets.reread()
    assert await secrets.passwords() == [CANARY, "of a plugin", CANARY]
    assert secrets.concerns("else.test")
    assert not secrets.concerns("else.corp")


async def test_docker_hub_is_concerned_by_the_names_it_has(make: Make, files: Files) -> None:
    secrets = make(files("a", dockercfg(HUB)))
    await secrets.reread()
    assert secrets.concerns("docker.io")
    assert not secrets.concerns("quay.io")
    assert await secrets.passwords("docker.io/library/debian") == [CANARY]


async def test_a_helper_that_fails_takes_nothing_from_what_is_served(
    registry: ScriptedRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its failure is not the registry's word that our secret opens nothing: no answer without it may count as that."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    registry.require_basic("user", "right")
    image = registry.add_image("team/app", "1", [b"layer"])
    target, digest = f"/v2/team/app/manifests/{image.digest}", f"/v2/team/app/blobs/{image.layer_digests[0]}"
    (tmp_path / "config.json").write_bytes(with_helper("registry.test"))
    access = {"mode": "shared", "iUnderstandThisIsShared": True}
    written = settings(
        tmp_path / "cache",
        upstream(registry, access=access),
        imagePullSecrets=[{"file": str(tmp_path / "config.json")}],
    )
    helper(tmp_path, giving("user", "right"))
    async with running(validate(written)) as cache:
        assert [(await cache.get(path)).status for path in (target, digest)] == [200, 200]
    helper(tmp_path, "exit 3")  # as one that asks a cloud whose metadata service is away
    async with running(validate(written)) as cache:
        assert [(await cache.get(path)).status for path in (target, digest)] == [200, 200]


# --- nothing secret in any text ---


async def test_no_text_holds_a_secret(make: Make, files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    helper(tmp_path, f"echo {CANARY}; exit 3")
    (tmp_path / "password").write_text(CANARY)
    secrets = make(
        files("a", docker_config()),
        files("b", with_helper("corp.test")),
        files("c", b'{"auths": {"corp.test": {"auth": "' + CANARY.encode() + b'"}}}'),
        source(registry="corp.test", username=CANARY, passwordFile=tmp_path / "password"),
    )
    texts = [*(await secrets.reread())]
    texts.append(repr(await secrets.pull_secrets.lookup(IMAGE)))
    (tmp_path / "password").write_text(f"{CANARY}\n{CANARY}")
    files("a", b"{" + CANARY.encode())
    texts += await secrets.reread()
    files("a", b"{}")
    texts += await secrets.reread()
    texts.append(repr(secrets.dropped))
    assert secrets.dropped
    assert len(caplog.records) >= 2
    assert CANARY not in "\n".join([*texts, caplog.text])
