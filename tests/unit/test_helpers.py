"""Docker's credential helpers are asked as Docker asks them, seldom, and their secrets stay out of every text."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.credentials.credential import Credential
from proxy.credentials.helpers import CredentialHelpers, parse_credential
from proxy.credentials.programs import ProgramFailed
from tests.unit.clock import Clock
from tests.unit.test_ahead import turns
from tests.unit.test_programs import SECRET, pids_in, script, text_of, until_gone

HUB = "https://index.docker.io/v1/"
NOT_FOUND = "echo credentials not found in native keychain; exit 1"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def helpers(clock: Clock) -> AsyncIterator[CredentialHelpers]:
    helpers = CredentialHelpers(clock, within=60)
    yield helpers
    await helpers.close()


@pytest.fixture(autouse=True)
def _path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def helper(directory: Path, body: str, name: str = "test") -> None:
    """Installs ``docker-credential-NAME``, which notes each call in the file ``calls`` first."""
    script(directory, f'echo "$* $(cat)" >>{directory}/calls\n{body}', f"docker-credential-{name}")


def calls(directory: Path) -> list[str]:
    return (directory / "calls").read_text().splitlines()


def giving(username: str, secret: str) -> str:
    answer = json.dumps({"ServerURL": "https://other.test", "Username": username, "Secret": secret})
    return f"cat <<'END'\n{answer}\nEND"


async def test_a_user_and_password(helpers: CredentialHelpers, tmp_path: Path) -> None:
    helper(tmp_path, giving("user", "pa:ss"))
    found = await helpers.get("test", HUB)
    assert found == Credential("user", "pa:ss")
    assert (found.source, found.registry) == ("docker-credential-test", HUB)
    assert calls(tmp_path) == [f"get {HUB}"], "asked for the key as it is written, without a line break"


async def test_an_identity_token(helpers: CredentialHelpers, tmp_path: Path) -> None:
    helper(tmp_path, giving("<token>", "tok"))
    found = await helpers.get("test", "registry.test")
    assert found == Credential(identity_token="tok")
    assert (found.source, found.registry) == ("docker-credential-test", "registry.test")


@pytest.mark.parametrize("body", [NOT_FOUND, giving("", ""), "echo '{}'"])
async def test_none_is_an_answer(helpers: CredentialHelpers, tmp_path: Path, body: str) -> None:
    helper(tmp_path, body)
    assert await helpers.get("test", HUB) is None


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("echo credentials not found in native keychain", "its answer is not a JSON object"),
        ("echo no credentials server URL; exit 1", "exit code 1"),
        (f"echo {SECRET}; exit 2", "exit code 2"),
        (f"echo {SECRET} >&2; exit 1", "exit code 1"),
        (f"echo {SECRET}", "its answer is not a JSON object"),
        (f"""echo '["{SECRET}"]'""", "its answer is not a JSON object"),
        (f"""echo '{{"Username": 1, "Secret": "{SECRET}"}}'""", "its Username or Secret is not a text"),
        (f"""echo '{{"Username": "u", "Secret": ["{SECRET}"]}}'""", "its Username or Secret is not a text"),
        (f"""echo '{{"Username": "u", "Secret": null, "a": "{SECRET}"}}'""", "its Username or Secret is not a text"),
        (f"while :; do echo {SECRET}; done", "more than 65536 bytes"),
        (f"echo {SECRET}; kill -9 $$", "died by signal 9"),
    ],
)
async def test_a_failure_names_the_program_and_not_what_it_wrote(
    helpers: CredentialHelpers, tmp_path: Path, body: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    helper(tmp_path, body)
    with pytest.raises(ProgramFailed) as caught:
        await helpers.get("test", HUB)
    assert str(caught.value) == f"docker-credential-test: {text}"
    assert SECRET not in text_of(caught.value) + caplog.text


async def test_one_that_hangs_ends_with_its_child_and_is_not_started_for_each_request(tmp_path: Path, clock: Clock) -> None:
    helpers = CredentialHelpers(clock, within=2)
    helper(tmp_path, f"sleep 1000 & echo $! >{tmp_path}/pids; wait")
    outcomes = await asyncio.gather(*(helpers.get("test", HUB) for _ in range(50)), return_exceptions=True)
    outcomes.append((await asyncio.gather(helpers.get("test", HUB), return_exceptions=True))[0])
    assert {str(outcome) for outcome in outcomes} == {"docker-credential-test: no answer within 2 s"}
    assert len(calls(tmp_path)) == 1
    await until_gone(*await pids_in(tmp_path / "pids", 1))


async def test_one_that_is_missing(helpers: CredentialHelpers) -> None:
    with pytest.raises(ProgramFailed, match=r"^docker-credential-missing: not found"):
        await helpers.get("missing", HUB)


@pytest.mark.parametrize("name", ["", "a/b", "../../bin/sh", "a b", "a\nb", "a;b", "\u00e4", "a\0b"])
async def test_a_name_is_no_path_and_no_command(helpers: CredentialHelpers, name: str) -> None:
    with pytest.raises(ProgramFailed, match="not the name of a credential helper") as caught:
        await helpers.get(name, HUB)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("registry", ["registry.test\ud800", "registry.test; exit 1", "$(exit 1)", "registry.test\0", ""])
async def test_any_registry_may_be_asked_for(helpers: CredentialHelpers, tmp_path: Path, registry: str) -> None:
    helper(tmp_path, giving("user", "password"))
    assert await helpers.get("test", registry) == Credential("user", "password")


async def test_fifty_callers_start_it_once(helpers: CredentialHelpers, tmp_path: Path) -> None:
    helper(tmp_path, giving("user", "password"))
    found = await asyncio.gather(*(helpers.get("test", HUB) for _ in range(50)))
    assert found == [Credential("user", "password")] * 50
    assert len(calls(tmp_path)) == 1


async def test_a_credential_is_kept_5_minutes_and_its_absence_10_s(
    helpers: CredentialHelpers, tmp_path: Path, clock: Clock
) -> None:
    helper(tmp_path, giving("user", "one"))
    assert await helpers.get("test", HUB) == Credential("user", "one")
    helper(tmp_path, NOT_FOUND)
    clock.now += 239
    assert await helpers.get("test", HUB) == Credential("user", "one")
    clock.now += 61
    assert await helpers.get("test", HUB) is None
    helper(tmp_path, giving("user", "two"))
    assert await helpers.get("test", HUB) is None
    clock.now += 10
    assert await helpers.get("test", HUB) == Credential("user", "two")
    assert len(calls(tmp_path)) == 3


async def test_it_is_asked_again_ahead_of_the_end(helpers: CredentialHelpers, tmp_path: Path, clock: Clock) -> None:
    helper(tmp_path, giving("user", "one"))
    await helpers.get("test", HUB)
    helper(tmp_path, giving("user", "two"))
    clock.now += 240
    assert await helpers.get("test", HUB) == Credential("user", "one")
    async with asyncio.timeout(20):
        while await helpers.get("test", HUB) != Credential("user", "two"):
            await asyncio.sleep(0.01)
    assert len(calls(tmp_path)) == 2


async def test_registries_and_helpers_are_apart(helpers: CredentialHelpers, tmp_path: Path) -> None:
    helper(tmp_path, giving("user", "one"))
    helper(tmp_path, giving("user", "two"), "other")
    found = [await helpers.get(name, key) for name in ("test", "other") for key in (HUB, "registry.test")]
    assert [each and each.password for each in found] == ["one", "one", "two", "two"]
    assert len(calls(tmp_path)) == 4


async def test_close_ends_the_program(helpers: CredentialHelpers, tmp_path: Path) -> None:
    helper(tmp_path, f"sleep 1000 & echo $! >{tmp_path}/pids; wait")
    caller = asyncio.ensure_future(helpers.get("test", HUB))
    pids = await pids_in(tmp_path / "pids", 1)
    await helpers.close()
    await turns()
    assert caller.cancelled()
    await until_gone(*pids)


async def test_the_registries_that_it_has(helpers: CredentialHelpers, tmp_path: Path) -> None:
    helper(tmp_path, """echo '{"https://index.docker.io/v1/": "user", "registry.test:5000": "other"}'""")
    assert await helpers.registries("test") == [HUB, "registry.test:5000"]
    assert calls(tmp_path) == ["list "]


@pytest.mark.parametrize("body", [f"echo '[\"{SECRET}\"]'", f"echo {SECRET}", f"echo {SECRET}; exit 1", NOT_FOUND])
async def test_a_list_that_fails(helpers: CredentialHelpers, tmp_path: Path, body: str) -> None:
    helper(tmp_path, body)
    with pytest.raises(ProgramFailed, match=r"^docker-credential-test: ") as caught:
        await helpers.registries("test")
    assert SECRET not in text_of(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["Username", "Secret", "ServerURL"]) | st.text(), inner),
)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_answer_raises_anything_else(answer: bytes) -> None:
    with contextlib.suppress(ProgramFailed):
        credential = parse_credential("docker-credential-test", HUB, answer)
        for text in (credential.username, credential.password, credential.identity_token):
            text.encode()
