"""Secrets and certificates are exchanged while pulls run: what is new is used within 10 s, nothing fails, bad ones stay out.

Secrets are exchanged as the kubelet exchanges them. What counts is what the upstream received, or what a handshake showed.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import os
import shutil
import signal
import ssl
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Self

import bcrypt
import pytest
import trustme

from tests.blackbox.mounted import WITHIN, Mounted, pull_secret, until
from tests.blackbox.oracle import LARGE, blob_of, blob_path, manifest_path
from tests.conftest import UPSTREAM, RunningCache, StartCache, upstream
from tests.fakes.answers import compose, cut, gate, oci_error, unauthorized
from tests.fakes.client import Stream, WireResponse, fetch, open_stream
from tests.fakes.messages import Answer, Request
from tests.fakes.registry import ScriptedRegistry
from tests.fakes.tokens import TokenServer, basic, credentials_in
from tests.fakes.waiting import Signal
from tests.real.services import Pullcache, pullcache_config

REPO = "team/app"
USER = "pullcache"
SHARED = {"mode": "shared", "iUnderstandThisIsShared": True}
OFTEN = {"rereadFilesEvery": "5ms"}
ROTATIONS = 200
PULLERS = 4


# --- a registry whose passwords come and go ---


class Passwords(TokenServer):
    """Gives tokens for each password that is ``accepted``, the empty one being that of the anonymous.

    A token is good for as long as its password.
    """

    def __init__(self) -> None:
        super().__init__()
        self.accepted: set[str] = set()
        self._behind: dict[str, str] = {}

    def answer(self, request: Request) -> Answer:
        """The answer to a token request."""
        if (password := self.behind(request) or "") not in self.accepted:
            return unauthorized(['Basic realm="token"'])
        answer = super().answer(request)
        self._behind[json.loads(answer.payload)["token"]] = password
        return answer

    def given_for(self, password: str) -> set[str]:
        """The tokens so far."""
        return {token for token, behind in self._behind.items() if behind == password}

    def allows(self, token: str, scope: str | None) -> bool | None:
        """Whether a token is good for a scope; None if it is no more, or never was."""
        return super().allows(token, scope) if self._behind.get(token) in self.accepted else None

    def behind(self, request: Request) -> str | None:
        """The password that a request shows, or the one that its token was given for."""
        if (pair := credentials_in(request)) is not None:
            return pair[1]
        return self._behind.get((request.headers.get("Authorization") or "").removeprefix("Bearer "))


class Vault(ScriptedRegistry):
    """Lets in whoever shows a password that is accepted at the moment: with tokens, or by Basic alone."""

    def __init__(self, *accepted: str, basic_only: bool = False) -> None:
        super().__init__()
        self.passwords = Passwords()
        self.passwords.accepted |= set(accepted)
        self._basic_only = basic_only

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        return self

    async def start(self) -> None:
        """Begin to accept connections."""
        await super().start()
        self.tokens = self.passwords
        if self._basic_only:
            refuses = lambda request: self.behind(request) not in self.passwords.accepted  # noqa: E731
            self.script("*", refuses, unauthorized(['Basic realm="registry"']), forever=True)
        else:
            self.require_token(tokens=self.passwords)

    def behind(self, request: Request) -> str | None:
        """The password that a request rests on."""
        return self.passwords.behind(request)

    def heard_of(self, password: str, since: int = 0) -> bool:
        """Whether a request rested on a password, the first ones not counted."""
        return any(self.behind(request) == password for request in self.requests[since:])


def shared(vault: Vault, name: str = UPSTREAM, **keys: Any) -> dict[str, Any]:
    """The section of a registry that everybody may read through our secret."""
    return upstream(vault, name, access=SHARED, **keys)


def secret(password: str, *hosts: str) -> dict[str, str]:
    """A Secret with the same password for some hosts."""
    return pull_secret(dict.fromkeys(hosts or (UPSTREAM,), (USER, password)))


class Load:
    """Pulls that go on all the time; each failure is kept."""

    def __init__(self, pulls: Sequence[Callable[[], Awaitable[str | None]]]) -> None:
        self.failures: list[str] = []
        self.completed = [0] * len(pulls)
        self._pulls = pulls
        self._signal = Signal()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._go_on(number)) for number in range(len(self._pulls))]
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in ended), ended

    async def _go_on(self, number: int) -> None:
        while True:
            try:
                if failure := await self._pulls[number]():
                    self.failures.append(failure)
            except (OSError, TimeoutError) as error:
                self.failures.append(repr(error))
            self.completed[number] += 1
            self._signal.notify()

    async def turned_over(self) -> None:
        """Returns once whatever was running at the call has ended."""
        before = list(self.completed)
        await self._signal.wait_for(lambda: all(now > then for now, then in zip(self.completed, before, strict=True)))


def _now() -> float:
    return asyncio.get_running_loop().time()


def failure_of(answer: WireResponse, truth: bytes) -> str | None:
    """What is wrong with a pull; what is served stale is, too, since it hides that the upstream refused."""
    if (answer.status, answer.clean_end, answer.body) == (200, True, truth) and not answer.headers.has("Warning"):
        return None
    return f"{answer.status} {answer.why} {answer.headers.get('Warning')} {answer.body[:300]!r}"


# --- pull secrets ---


async def rotations(start_cache: StartCache, directory: Path, number_of: int, **sections: Any) -> tuple[list[float], int]:
    """Exchanges a password again and again under load; the seconds from each exchange to its first use, and all pulls.

    The registries accept the new password from its exchange on, and the one before until pulls that had begun have ended:
    from then on nothing may rest on it.
    """
    async with Vault("password-0") as by_token, Vault("password-0", basic_only=True) as by_basic:
        vaults = {"token.test": by_token, "basic.test": by_basic}
        images = {name: vault.add_image(REPO, "1", [b"layer"]) for name, vault in vaults.items()}
        mounted = Mounted(directory, secret("password-0", *vaults))
        upstreams = [shared(vault, name) for name, vault in vaults.items()]
        cache = await start_cache(*upstreams, imagePullSecrets=[{"directory": str(directory)}], **sections)
        numbers = count()

        def pull_from(name: str) -> Callable[[], Awaitable[str | None]]:
            async def pull() -> str | None:
                data = f"layer {next(numbers)}".encode()
                path = blob_path(vaults[name].add_blob(REPO, data), f"{name}/{REPO}")
                tag = failure_of(await cache.get(manifest_path("1", f"{name}/{REPO}")), images[name].data)
                return tag or failure_of(await cache.get(path), data)

            return pull

        async def used(password: str) -> float:
            began = _now()
            for vault in vaults.values():
                await vault.wait_for(partial(vault.heard_of, password, -100), WITHIN)
            return _now() - began

        over: list[tuple[Vault, int, str]] = []

        async def retire(password: str) -> None:
            await load.turned_over()
            for vault in vaults.values():
                vault.passwords.accepted.discard(password)
                over.append((vault, len(vault.requests), password))

        seconds: list[float] = []
        async with Load([pull_from(name) for name in vaults] * (PULLERS // 2)) as load, asyncio.TaskGroup() as retiring:
            await load.turned_over()
            for number in range(1, number_of + 1):
                for vault in vaults.values():
                    vault.passwords.accepted.add(f"password-{number}")
                mounted.write(secret(f"password-{number}", *vaults))
                seconds.append(await used(f"password-{number}"))
                retiring.create_task(retire(f"password-{number - 1}"))
        assert load.failures == []
        assert cache.metric("stale_total") == 0
        assert len(over) == number_of * len(vaults)
        for vault, since, password in over:
            assert not vault.heard_of(password, since), f"{password}, or a token of it, was sent when it was out of use"
        return seconds, sum(load.completed)


async def test_rotations_under_load_fail_no_pull(start_cache: StartCache, tmp_path: Path) -> None:
    """200 with files looked at every 100 ms, and beside them 3 at the default interval."""
    often, default = await asyncio.gather(
        rotations(start_cache, tmp_path / "often", ROTATIONS, rereadFilesEvery="100ms"),
        rotations(start_cache, tmp_path / "default", 3),
    )
    for what, (seconds, pulls) in (("every 100 ms", often), ("by default", default)):
        print(f"{what}: {pulls} pulls; first use after {statistics.median(seconds):.2f} s, at most {max(seconds):.2f} s")


@pytest.mark.parametrize("access", [SHARED, "public"], ids=["shared", "public"])
async def test_tokens_of_a_secret_go_with_it(start_cache: StartCache, tmp_path: Path, access: object) -> None:
    """Also where the secret comes back: who exchanged it may have had the tokens withdrawn."""
    async with Vault("old", "new", *([""] if access == "public" else [])) as vault:
        mounted = Mounted(tmp_path / "secret", secret("old"))
        sources = [{"directory": str(mounted.directory)}]
        cache = await start_cache(upstream(vault, access=access), imagePullSecrets=sources, **OFTEN)
        data = iter(blob_of(number, 100) for number in count())

        async def use(password: str) -> None:
            async def is_used() -> bool:
                since, body = len(vault.requests), next(data)
                assert failure_of(await cache.get(blob_path(vault.add_blob(REPO, body))), body) is None
                return vault.heard_of(password, since)

            mounted.write(secret(password))
            await until_true(is_used, f"{password} is used")

        await use("old")
        before = vault.passwords.given_for("old")
        await use("new")
        mark = len(vault.requests)
        await use("old")
        sent = {(request.headers.get("Authorization") or "").removeprefix("Bearer ") for request in vault.requests[mark:]}
        assert before
        assert sent & vault.passwords.given_for("old"), "tokens are what it is read with"
        assert not sent & before


async def test_a_download_that_breaks_off_after_a_rotation_goes_on_with_the_new_secret(
    start_cache: StartCache, tmp_path: Path
) -> None:
    """What was let in with the old one is not disturbed; what follows is asked for with the new one."""
    async with Vault("old") as vault:
        mounted = Mounted(tmp_path / "secret", secret("old"))
        cache = await start_cache(shared(vault), imagePullSecrets=[{"directory": str(mounted.directory)}], **OFTEN)
        body, small = blob_of("rotation", LARGE), b"small"
        path, other = (blob_path(vault.add_blob(REPO, data)) for data in (body, small))
        break_off = asyncio.Event()
        vault.script("GET", path, compose(gate(break_off, LARGE // 2), cut(LARGE // 2 + 1)))
        stream = await cache.open(path)
        async with stream:
            begun = await stream.read_all(LARGE // 4)
            vault.passwords.accepted = {"old", "new"}
            mounted.write(secret("new"))

            async def is_used() -> bool:
                assert (await cache.head(manifest_path("none"))).status == 404
                return vault.heard_of("new")

            await until_true(is_used, "the new secret is used")
            vault.passwords.accepted = {"new"}
            break_off.set()
            assert begun + await stream.read_all() == body
            assert stream.clean_end
        assert [vault.behind(request) for request in vault.seen("GET", path)][-1] == "new"
        assert failure_of(await cache.get(other), small) is None


async def until_true(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Wait until something that has to be asked for is so."""
    try:
        async with asyncio.timeout(WITHIN):
            while not await condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"{what}: not within {WITHIN:g} s") from None


@pytest.mark.parametrize("before", ["wrong", "weak", "none"])
async def test_a_secret_that_opens_more_is_used_within_10_s(start_cache: StartCache, tmp_path: Path, before: str) -> None:
    """A secret that is wrong, or may not read the repository, or is not there yet, is mended: no memory of the no stands in
    the way."""
    async with Vault("weak", "good") as vault:
        image = vault.add_image(REPO, "1", [b"layer"])
        refused = oci_error(403, "DENIED", "no right to this repository")
        vault.script(
            "*", lambda request: vault.behind(request) == "weak" and request.path != "/token", refused, forever=True
        )
        mounted = Mounted(tmp_path / "secret", secret(before, "other.test" if before == "none" else UPSTREAM))
        cache = await start_cache(shared(vault), imagePullSecrets=[{"directory": str(mounted.directory)}], **OFTEN)
        assert (await cache.get(manifest_path("1"))).status == 403
        mounted.write(secret("good"))

        async def is_given() -> bool:
            return failure_of(await cache.get(manifest_path("1")), image.data) is None

        await until_true(is_given, "it is given")


# --- secrets that cannot be used ---


class Sources:
    """Two Secrets in one directory, and one file: ``team`` and the file are damaged, ``clock`` tells that files were looked
    at."""

    def __init__(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.folder = folder / "secrets"
        self.team = Mounted(self.folder / "team", secret("good-0", "team.test"))
        self.clock = Mounted(self.folder / "clock", secret("tick-0", "clock.test"))
        self.file = folder / "config.json"
        self.write_file(secret("good-0", "file.test")[".dockerconfigjson"])
        self._caplog = caplog
        self._ticks = count(1)
        caplog.set_level(logging.INFO)

    @property
    def sources(self) -> list[dict[str, str]]:
        """The configuration."""
        return [{"directory": str(self.folder)}, {"file": str(self.file)}]

    def write_file(self, content: str | bytes) -> None:
        """Let the file hold this, at once."""
        new = self.file.with_suffix(".new")
        new.write_bytes(content.encode() if isinstance(content, str) else content)
        new.replace(self.file)

    def lines(self, level: int) -> list[str]:
        """What was logged about files."""
        found = [record for record in self._caplog.records if record.levelno == level]
        return [record.getMessage() for record in found if record.name in ("proxy.watch", "proxy.credentials.secrets")]

    async def looked(self) -> None:
        """Returns when all files were read once more."""
        for _ in range(2):  # the first may have been read before
            seen = len(self.changes)
            self.clock.write(secret(f"tick-{next(self._ticks)}", "clock.test"))
            await until(partial(self._more, seen), "the clock ticks")

    def _more(self, seen: int) -> bool:
        return len(self.changes) > seen

    @property
    def changes(self) -> list[str]:
        """The lines that say that secrets have changed."""
        return [line for line in self.lines(logging.INFO) if "have changed" in line]


def _replaced_by_file(sources: Sources) -> None:
    shutil.rmtree(sources.team.directory)
    sources.team.directory.write_text("not a directory")


def _directory_by_file(sources: Sources) -> None:
    sources.folder.rename(sources.folder.with_name("moved"))
    sources.folder.write_text("not a directory")


@pytest.mark.parametrize(
    ("where", "content"),
    [
        pytest.param("team.test", '{"auths": {"team.test": {"auth": "Z29vZC0w"', id="invalid-JSON"),
        pytest.param("team.test", "", id="empty"),
        pytest.param("team.test", '{"auths": {"team.test": {"auth": "%%%c2VjcmV0%%%"}}}', id="broken-base64"),
        pytest.param("file.test", '{"auths": {"file.test": {"auth": "c2VjcmV0LWdvb2QtMQ=="}}}', id="no-colon"),
        pytest.param("file.test", '{"auths": {"file.test": "good-1"}}', id="wrong-type"),
        pytest.param("file.test", b"\xff\xfe{}", id="not-UTF-8"),
    ],
)
async def test_a_secret_that_cannot_be_read_changes_nothing(
    start_cache: StartCache, tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str, content: str | bytes
) -> None:
    """The last good one stays in use; it is said once, shown in the metrics, and over when the file is good again."""
    sources = Sources(tmp_path, caplog)

    def write(text: str | bytes) -> None:
        if where == "team.test":
            sources.team.write({".dockerconfigjson": text})
        else:
            sources.write_file(text)

    name = "team/.dockerconfigjson" if where == "team.test" else "config.json"
    async with damaged(start_cache, sources, where, lambda: write(content), name):
        write(secret("good-1", where)[".dockerconfigjson"])


def _made_a_directory(sources: Sources) -> None:
    sources.file.unlink()
    sources.file.mkdir()


def _linked_to_itself(sources: Sources) -> None:
    sources.file.unlink()
    sources.file.symlink_to(sources.file)


@pytest.mark.parametrize("damage", [lambda sources: sources.file.unlink(), _made_a_directory, _linked_to_itself])
async def test_a_file_that_cannot_be_read_changes_nothing(
    start_cache: StartCache, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Sources], None]
) -> None:
    sources = Sources(tmp_path, caplog)
    async with damaged(start_cache, sources, "file.test", lambda: damage(sources), "config.json"):
        if sources.file.is_dir():
            sources.file.rmdir()
        sources.write_file(secret("good-1", "file.test")[".dockerconfigjson"])


@asynccontextmanager
async def damaged(
    start_cache: StartCache, sources: Sources, where: str, damage: Callable[[], object], named: str
) -> AsyncIterator[RunningCache]:
    """Does the damage and checks what it does, lets the caller mend it, and checks that."""
    async with Vault("good-0", "good-1") as vault:
        cache = await start_cache(shared(vault, where), imagePullSecrets=sources.sources, **OFTEN)
        await uses(cache, vault, "good-0")
        damage()
        await until(lambda: cache.metric("unusable_files", what="pull secrets") == 1, "the alarm")
        await sources.looked()
        await uses(cache, vault, "good-0")
        said = sources.lines(logging.ERROR)
        assert said
        assert len(said) == len(set(said)), "once, for as long as it lasts"
        for line in said:
            assert named in line
            assert "good-" not in line
            assert "c2VjcmV0" not in line
        yield cache
        await until(lambda: cache.metric("unusable_files", what="pull secrets") == 0, "the end of the alarm")
        await sources.looked()
        await uses(cache, vault, "good-1")
        assert [line for line in sources.lines(logging.INFO) if "can be used again" in line]


async def uses(cache: RunningCache, vault: Vault, password: str) -> None:
    """What the registry is asked for now rests on this password."""
    since = len(vault.requests)
    body = f"for {password} {since}".encode()
    assert failure_of(await cache.get(blob_path(vault.add_blob(REPO, body))), body) is None
    assert {vault.behind(request) for request in vault.requests[since:]} - {None} == {password}


async def test_a_directory_that_is_none_keeps_what_was_below_it(
    start_cache: StartCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sources = Sources(tmp_path, caplog)
    async with Vault("good-0", "good-1", "new") as vault:
        cache = await start_cache(shared(vault, "team.test"), imagePullSecrets=sources.sources, **OFTEN)
        await uses(cache, vault, "good-0")
        _directory_by_file(sources)
        await until(lambda: cache.metric("unusable_files", what="pull secrets") == 1, "the alarm")
        await uses(cache, vault, "good-0")
        assert str(sources.folder) in sources.lines(logging.ERROR)[-1]  # it may have looked between the two steps
        sources.folder.unlink()
        sources.folder.with_name("moved").rename(sources.folder)
        sources.team.write(secret("good-1", "team.test"))
        await until(lambda: cache.metric("unusable_files", what="pull secrets") == 0, "the end of the alarm")
        await sources.looked()
        await uses(cache, vault, "good-1")


@pytest.mark.parametrize(
    "remove",
    [
        pytest.param(lambda sources: sources.team.write(secret("good-0", "elsewhere.test")), id="host"),
        pytest.param(lambda sources: sources.team.write(pull_secret({})), id="all-hosts"),
        pytest.param(lambda sources: shutil.rmtree(sources.team.directory), id="Secret"),
        pytest.param(_replaced_by_file, id="Secret-for-a-file"),
    ],
)
async def test_what_is_taken_away_is_not_shown_any_more(
    start_cache: StartCache, tmp_path: Path, caplog: pytest.LogCaptureFixture, remove: Callable[[Sources], None]
) -> None:
    """A Secret without the host, or a directory without the Secret, is no fault: it is the operator's will. Others stay."""
    sources = Sources(tmp_path, caplog)
    async with Vault("good-0", "good-1") as vault:
        cache = await start_cache(shared(vault, "team.test"), imagePullSecrets=sources.sources, **OFTEN)
        await uses(cache, vault, "good-0")
        changes = len(sources.changes)
        remove(sources)
        await until(lambda: len(sources.changes) > changes, "it is seen")
        since = len(vault.requests)
        assert (await cache.get(blob_path(vault.add_blob(REPO, b"private")))).status == 403
        assert {vault.behind(request) for request in vault.requests[since:]} == {None}
        assert cache.metric("unusable_files", what="pull secrets") == 0
        assert sources.lines(logging.ERROR) == []
        if not sources.team.directory.is_dir():
            sources.team.directory.unlink(missing_ok=True)
            sources.team = Mounted(sources.team.directory, secret("good-1", "team.test"))
        else:
            sources.team.write(secret("good-1", "team.test"))
        await sources.looked()
        await uses(cache, vault, "good-1")


# --- the real process ---


class Unprivileged(Pullcache):
    """Also as root it may read only what the permissions of a file say."""

    def command(self) -> Sequence[str | Path]:
        """What to run."""
        drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
        return [*drop, *super().command()]


async def start(server: Pullcache) -> None:
    """Starts it while this loop goes on."""
    await asyncio.to_thread(server.start)


@asynccontextmanager
async def process(config: Mapping[str, Any], kind: type[Pullcache] = Pullcache) -> AsyncIterator[Pullcache]:
    """A real process, started and stopped while this loop, and the registries in it, go on."""
    server = kind(config)
    await asyncio.to_thread(server.__enter__)
    try:
        yield server
    finally:
        await asyncio.to_thread(server.__exit__, None, None, None)


async def test_what_may_not_be_read_changes_nothing(tmp_path: Path) -> None:
    """A directory and a key without permission: the last good ones stay, an alarm each, and all is well afterwards."""
    team = Mounted(tmp_path / "secrets" / "team", secret("good-0"))
    pairs = Pairs()
    tls = Mounted(tmp_path / "tls", pairs.new())
    async with Vault("good-0", "good-1") as vault:
        config = pullcache_config(
            tmp_path / "cache",
            UPSTREAM,
            vault.url,
            imagePullSecrets=[{"directory": str(team.directory.parent)}],
            listener=tls_files(tls),
            **OFTEN,
        )
        config["upstreams"][0]["access"] = SHARED
        async with process(config, Unprivileged) as server:

            async def pulls(password: str) -> None:
                since, body = len(vault.requests), f"{password} {len(vault.requests)}".encode()
                path = blob_path(vault.add_blob(REPO, body))
                assert failure_of(await fetch("127.0.0.1", server.port, "GET", path, ssl=pairs.client()), body) is None
                assert vault.heard_of(password, since)

            await pulls("good-0")
            await until(lambda: server.figure("unusable_files") == 0, "no alarm")
            team.directory.parent.chmod(0)
            (tls.directory / "..data" / "tls.key").chmod(0)
            try:
                await until(lambda: server.figure("unusable_files") == 2, "both alarms")
                await pulls("good-0")
            finally:
                team.directory.parent.chmod(0o700)
            team.write(secret("good-1"))
            tls.write(pairs.new())
            await until(lambda: server.figure("unusable_files") == 0, "the end of the alarms")
            await until_true(lambda: presents(server, pairs, 1), "the new certificate")
            await pulls("good-1")
            said = [line for line in server.log.splitlines() if "Permission denied" in line]
            assert len(said) == 2
            assert any(str(team.directory.parent) in line for line in said)
            assert any("tls.key" in line for line in said)


# --- certificates of the listener ---


class Pairs:
    """Certificates of one authority with their keys, as files of a Secret of type ``kubernetes.io/tls``, numbered."""

    def __init__(self) -> None:
        self.ca = trustme.CA()
        self._numbers: dict[bytes, int] = {}

    def new(self, **options: Any) -> dict[str, bytes]:
        """Another pair."""
        leaf = self.ca.issue_cert("localhost", "127.0.0.1", **options)
        self._numbers[ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode())] = len(self._numbers)
        return {
            "tls.crt": b"".join(blob.bytes() for blob in leaf.cert_chain_pems),
            "tls.key": leaf.private_key_pem.bytes(),
        }

    def expired(self) -> dict[str, bytes]:
        """A pair that was good until yesterday."""
        now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
        return self.new(not_before=now - 30 * day, not_after=now - day)

    def number(self, stream: Stream) -> int:
        """Which one was shown on a connection."""
        return self._numbers[stream.wire.transport.get_extra_info("ssl_object").getpeercert(True)]

    def client(self, *, trusting: bool = True, shown: trustme.LeafCert | None = None) -> ssl.SSLContext:
        """A client that trusts this authority only, or anybody."""
        context = ssl.create_default_context(cadata=self.ca.cert_pem.bytes().decode())
        if not trusting:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if shown is not None:
            shown.configure_cert(context)
        return context


def tls_files(mounted: Mounted) -> dict[str, str]:
    """The keys of a listener whose certificate is mounted."""
    return {"tlsCertFile": str(mounted.path("tls.crt")), "tlsKeyFile": str(mounted.path("tls.key"))}


async def presents(server: Pullcache, pairs: Pairs, number: int, *, trusting: bool = True) -> bool:
    """Whether a new connection is shown the pair of that number."""
    async with await open_stream("127.0.0.1", server.port, "GET", "/v2/", ssl=pairs.client(trusting=trusting)) as stream:
        assert stream.status == 200
        return pairs.number(stream) == number


@asynccontextmanager
async def secured(tmp_path: Path, mounted: Mounted, **keys: str) -> AsyncIterator[tuple[Pullcache, ScriptedRegistry]]:
    """A real process whose listener has the certificate that is mounted."""
    async with ScriptedRegistry() as registry:
        config = pullcache_config(
            tmp_path / "cache", UPSTREAM, registry.url, listener=tls_files(mounted) | keys, rereadFilesEvery="10ms"
        )
        async with process(config) as server:
            yield server, registry


async def test_exchanges_of_the_certificate_fail_no_handshake(tmp_path: Path) -> None:
    """200 of them, with handshakes all the time: each new pair is shown, and none before it any more."""
    pairs = Pairs()
    mounted = Mounted(tmp_path / "tls", pairs.new())
    client = pairs.client()
    newest = 0
    async with secured(tmp_path, mounted) as (server, _):

        async def shake_hands() -> str | None:
            nonlocal newest
            before = newest
            async with await open_stream("127.0.0.1", server.port, "GET", "/v2/", ssl=client) as stream:
                shown = pairs.number(stream)
                newest = max(newest, shown)
                return None if stream.status == 200 and shown >= before else f"{stream.status} with {shown} after {before}"

        def is_newest(number: int) -> bool:
            return newest >= number

        seconds = []
        async with Load([shake_hands] * 2) as load:
            for number in range(1, ROTATIONS + 1):
                mounted.write(pairs.new())
                began = _now()
                await until(partial(is_newest, number), f"pair {number} is shown")
                seconds.append(_now() - began)
        assert load.failures == []
        assert server.figure("unusable_files") == 0
        assert [line for line in server.log.splitlines() if " error " in line] == []
        print(
            f"{sum(load.completed)} handshakes; shown after {statistics.median(seconds):.3f} s, at most {max(seconds):.3f}"
        )


@asynccontextmanager
async def running_body(server: Pullcache, registry: ScriptedRegistry, client: ssl.SSLContext) -> AsyncIterator[None]:
    """A download that has begun before the block, and ends well after it."""
    body = blob_of("body", LARGE)
    path = blob_path(registry.add_blob(REPO, body))
    go_on = asyncio.Event()
    registry.script("GET", path, gate(go_on, LARGE // 2))
    async with await open_stream("127.0.0.1", server.port, "GET", path, ssl=client) as stream:
        begun = await stream.read_all(LARGE // 4)
        yield
        go_on.set()
        assert begun + await stream.read_all() == body
        assert stream.clean_end


async def test_a_key_of_another_certificate_is_refused_and_said_once(tmp_path: Path) -> None:
    """The pair before stays; what runs is not disturbed; a good pair ends the alarm."""
    pairs = Pairs()
    mounted = Mounted(tmp_path / "tls", pairs.new())
    client = pairs.client()
    async with secured(tmp_path, mounted) as (server, registry), running_body(server, registry, client):
        await until(lambda: server.figure('unusable_files{what="listener certificates"}') == 0, "no alarm")
        mounted.write({"tls.crt": pairs.new()["tls.crt"], "tls.key": pairs.new()["tls.key"]})
        await until(lambda: server.figure('unusable_files{what="listener certificates"}') == 1, "the alarm")
        assert await presents(server, pairs, 0)
        mounted.write(pairs.new())
        await until(lambda: server.figure('unusable_files{what="listener certificates"}') == 0, "the end of the alarm")
        await until_true(lambda: presents(server, pairs, 3), "the good pair")
        (line,) = [line for line in server.log.splitlines() if " error " in line]
        assert "listener.tlsCertFile" in line
        assert "the key does not belong to the certificate" in line
        assert "PRIVATE KEY" not in server.log


async def test_a_certificate_that_has_expired_is_used_with_a_warning(tmp_path: Path) -> None:
    """The clock here may be what is wrong: clients decide. What runs is not disturbed."""
    pairs = Pairs()
    mounted = Mounted(tmp_path / "tls", pairs.new())
    async with secured(tmp_path, mounted) as (server, registry), running_body(server, registry, pairs.client()):
        mounted.write(pairs.expired())
        await until_true(lambda: presents(server, pairs, 1, trusting=False), "the new pair")
        await until(lambda: "clients will refuse it" in server.log, "the warning")
        with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
            await presents(server, pairs, 1)
        mounted.write(pairs.new())
        await until_true(lambda: presents(server, pairs, 2, trusting=False), "a good pair")
        assert await presents(server, pairs, 2)
        assert server.log.count("clients will refuse it") == 1


async def test_another_client_ca_counts_for_new_connections(tmp_path: Path) -> None:
    """Clients of the old one are refused, those of the new one let in; connections that are open stay."""
    pairs, old, new = Pairs(), trustme.CA(), trustme.CA()
    good = pairs.new()
    mounted = Mounted(tmp_path / "tls", good | {"clients.crt": old.cert_pem.bytes()})
    of_old, of_new = (pairs.client(shown=ca.issue_cert("node.test", common_name="node")) for ca in (old, new))
    clients = str(mounted.path("clients.crt"))
    async with (
        secured(tmp_path, mounted, clientCAFile=clients) as (server, registry),
        running_body(server, registry, of_old),
    ):

        async def lets_in(client: ssl.SSLContext) -> bool:
            try:
                return (await fetch("127.0.0.1", server.port, "GET", "/v2/", ssl=client)).status == 200
            except OSError:
                return False

        assert await lets_in(of_old)
        assert not await lets_in(of_new)
        assert not await lets_in(pairs.client())
        mounted.write(good | {"clients.crt": new.cert_pem.bytes()})
        await until_true(lambda: lets_in(of_new), "a client of the new CA")
        assert not await lets_in(of_old)
        assert not await lets_in(pairs.client())


# --- certificates for upstreams ---


class Shown:
    """Which certificates clients have shown to a server, in order."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.certificates: list[bytes | None] = []
        shown = self.certificates

        class Noting(ssl.SSLObject):
            def do_handshake(self) -> None:
                super().do_handshake()
                shown.append(self.getpeercert(True))

        context.sslobject_class = Noting


def der(leaf: trustme.LeafCert) -> bytes:
    """A certificate as a handshake gives it."""
    return ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode())


def pair_of(leaf: trustme.LeafCert) -> dict[str, bytes]:
    """Its files."""
    return {
        "tls.crt": b"".join(blob.bytes() for blob in leaf.cert_chain_pems),
        "tls.key": leaf.private_key_pem.bytes(),
    }


async def test_certificates_for_an_upstream_are_exchanged(
    start_cache: StartCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """New connections are made with what ``clientCertFile`` and ``caFile`` hold now; a download goes on over its own."""
    ca, clients, stranger = trustme.CA(), trustme.CA(), trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    clients.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    shown = Shown(context)
    leaves = [clients.issue_cert(f"cache-{number}.test") for number in range(2)]
    trust = {"ca.crt": ca.cert_pem.bytes()}
    mounted = Mounted(tmp_path / "tls", pair_of(leaves[0]) | trust)
    async with ScriptedRegistry(ssl=context) as registry:
        cache = await start_cache(
            upstream(
                registry,
                access={"mode": "shared", "iUnderstandThisIsShared": True},
                caFile=str(mounted.path("ca.crt")),
                clientCertFile=str(mounted.path("tls.crt")),
                clientKeyFile=str(mounted.path("tls.key")),
            ),
            **OFTEN,
        )
        numbers = count()

        async def status() -> int:
            body = f"layer {next(numbers)}".encode()
            answer = await cache.get(blob_path(registry.add_blob(REPO, body)))
            assert answer.status != 200 or answer.body == body
            return answer.status

        assert await status() == 200
        assert set(shown.certificates) == {der(leaves[0])}
        body = blob_of("upstream", LARGE)
        path = blob_path(registry.add_blob(REPO, body))
        go_on = asyncio.Event()
        registry.script("GET", path, gate(go_on, LARGE // 2))
        async with await cache.open(path) as stream:
            begun = await stream.read_all(LARGE // 4)
            mounted.write(pair_of(leaves[1]) | trust)

            async def is_shown() -> bool:
                assert await status() == 200
                return shown.certificates[-1] == der(leaves[1])

            await until_true(is_shown, "the new certificate")

            async def is_refused() -> bool:
                return await status() == 503

            mounted.write(pair_of(leaves[1]) | {"ca.crt": stranger.cert_pem.bytes()})
            await until_true(is_refused, "the registry's certificate is of no CA that is trusted")
            what = f"certificates of {UPSTREAM}"
            mounted.write({"tls.crt": pair_of(leaves[0])["tls.crt"], "tls.key": pair_of(leaves[1])["tls.key"]} | trust)
            await until(lambda: cache.metric("unusable_files", what=what) == 1, "the alarm of a pair that does not fit")
            assert await status() == 503, "what was before is still used"
            mounted.write(pair_of(leaves[1]) | trust)
            await until(lambda: cache.metric("unusable_files", what=what) == 0, "the end of the alarm")
            assert await status() == 200
            go_on.set()
            assert begun + await stream.read_all() == body
            assert stream.clean_end
        assert set(shown.certificates) == {der(leaf) for leaf in leaves}
        assert "PRIVATE KEY" not in caplog.text


# --- SIGHUP ---


async def late(checks: Mapping[str, Callable[[], Awaitable[bool]]], pause: float = 0.01) -> list[str]:
    """What is not so within 10 s."""
    left = dict(checks)
    deadline = _now() + WITHIN
    while (left := {name: check for name, check in left.items() if not await check()}) and _now() < deadline:
        await asyncio.sleep(pause)
    return list(left)


def htpasswd(users: Mapping[str, str]) -> str:
    """A file of users and passwords."""
    hashed = {user: bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode() for user, password in users.items()}
    return "".join(f"{user}:{text}\n" for user, text in hashed.items())


async def test_sighup_reads_everything_again_at_once(tmp_path: Path) -> None:
    """Files are looked at every hour here. Twice: what was used at the start counts, and what was used since."""
    rounds = 2
    pairs = Pairs()
    ca, clients = trustme.CA(), trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    clients.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    shown = Shown(context)

    class Over(Vault):
        def __init__(self) -> None:
            super().__init__(*(f"secret-{number}" for number in range(rounds + 1)))
            self._ssl = context

    def files(number: int) -> tuple[dict[str, bytes], trustme.LeafCert]:
        leaf = clients.issue_cert(f"cache-{number}.test")
        users = htpasswd({"always": "there", USER: f"user-{number}"})
        words = {"htpasswd": users, "token": f"admin-token-of-operator-{number}"}
        own = {f"own.{name}": content for name, content in pair_of(leaf).items()}
        return (
            pairs.new()
            | own
            | {"ca.crt": ca.cert_pem.bytes()}
            | {name: text.encode() for name, text in (words | secret(f"secret-{number}")).items()},
            leaf,
        )

    content, _ = files(0)
    mounted = Mounted(tmp_path / "all", content)
    async with Over() as vault:
        config = pullcache_config(
            tmp_path / "cache",
            UPSTREAM,
            vault.url,
            imagePullSecrets=[{"file": str(mounted.path(".dockerconfigjson"))}],
            listener=tls_files(mounted) | {"htpasswdFile": str(mounted.path("htpasswd"))},
            adminListener={"tokenFile": str(mounted.path("token"))},
            rereadFilesEvery="1h",
        )
        config["upstreams"][0] |= {
            "access": "shared",
            "caFile": str(mounted.path("ca.crt")),
            "clientCertFile": str(mounted.path("own.tls.crt")),
            "clientKeyFile": str(mounted.path("own.tls.key")),
        }
        numbers = count()
        async with process(config) as server:
            admin = int(server.admin_host.rpartition(":")[2])

            always = [("Authorization", basic("always", "there"))]

            async def logs_in(number: int) -> bool:
                proof = [("Authorization", basic(USER, f"user-{number}"))]
                return (await fetch("127.0.0.1", server.port, "GET", "/v2/", proof, ssl=pairs.client())).status == 200

            async def is_admin(number: int) -> bool:
                proof = [("Authorization", f"Bearer admin-token-of-operator-{number}")]
                return (await fetch("127.0.0.1", admin, "GET", "/metrics", proof)).status == 200

            async def shows_secret(number: int) -> bool:
                since, body = len(vault.requests), f"layer {next(numbers)}".encode()
                path = blob_path(vault.add_blob(REPO, body))
                assert (
                    failure_of(await fetch("127.0.0.1", server.port, "GET", path, always, ssl=pairs.client()), body) is None
                )
                return vault.heard_of(f"secret-{number}", since)

            async def is_shown(leaf: trustme.LeafCert, number: int) -> bool:
                await shows_secret(number)
                return shown.certificates[-1] == der(leaf)

            async def is_presented(number: int) -> bool:
                client = pairs.client()
                async with await open_stream("127.0.0.1", server.port, "GET", "/v2/", always, ssl=client) as stream:
                    return pairs.number(stream) == number

            assert await shows_secret(0)
            for number in range(1, rounds + 1):
                content, leaf = files(number)
                mounted.write(content)
                assert await is_admin(number - 1), "nothing is looked at before the signal"
                assert server.pid is not None
                os.kill(server.pid, signal.SIGHUP)
                checks: dict[str, Callable[[], Awaitable[bool]]] = {
                    "certificate of the listener": partial(is_presented, number),
                    "admin token": partial(is_admin, number),
                    "pull secret": partial(shows_secret, number),
                    "certificate for the upstream": partial(is_shown, leaf, number),
                }
                assert await late(checks) == []
                users = {"htpasswd": partial(logs_in, number)}
                assert await late(users, pause=2.0) == [], "wrong ones are counted, and few are allowed"


HELPER = """#!/bin/sh
# docker-credential-helpers' 'list': an answer that lets itself be waited for
echo begun >> "{folder}/begun"
while [ ! -e "{folder}/go-on" ]; do sleep 0.02; done
echo '{{}}'
"""


async def test_a_sighup_that_comes_while_files_are_read_is_not_lost(tmp_path: Path) -> None:
    """Files changed after they were read, and the signal came before that look was over: another look follows."""
    programs = tmp_path / "bin"
    programs.mkdir()
    helper = programs / "docker-credential-slow"
    helper.write_text(HELPER.format(folder=tmp_path))
    helper.chmod(0o755)
    mounted = Mounted(tmp_path / "secret", secret("old"))
    store = tmp_path / "config.json"
    store.write_text("{}")
    async with Vault("old", "new") as vault:
        config = pullcache_config(
            tmp_path / "cache",
            UPSTREAM,
            vault.url,
            imagePullSecrets=[{"directory": str(mounted.directory)}, {"file": str(store)}],
            rereadFilesEvery="1h",
        )
        config["upstreams"][0]["access"] = SHARED
        server = Pullcache(config, environment={"PATH": f"{programs}:{os.environ['PATH']}"})
        await start(server)
        try:
            assert server.pid is not None
            store.write_text('{"credsStore": "slow"}')
            os.kill(server.pid, signal.SIGHUP)
            await until((tmp_path / "begun").exists, "the first look")
            mounted.write(secret("new"))
            os.kill(server.pid, signal.SIGHUP)
            assert (await fetch("127.0.0.1", server.port, "GET", "/v2/")).status == 200, "the signal was handled"
            (tmp_path / "go-on").touch()

            async def is_used() -> bool:
                body = f"layer {len(vault.requests)}".encode()
                path = blob_path(vault.add_blob(REPO, body))
                assert failure_of(await fetch("127.0.0.1", server.port, "GET", path), body) is None
                return vault.heard_of("new")

            await until_true(is_used, "the new secret is used")
        finally:
            await asyncio.to_thread(server.__exit__, None, None, None)
