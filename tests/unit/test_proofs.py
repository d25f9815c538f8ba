"""Who may read what: whom the registry is asked for, how long its yes and no hold, and what wrong credentials cost it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from proxy.access import proofs
from proxy.access.attempts import Attempts
from proxy.access.caller import Caller
from proxy.access.probes import Probe
from proxy.access.proofs import Access, Withdrawn, mode_of
from proxy.config.upstreams import UpstreamConfig
from proxy.credentials.credential import ANONYMOUS, QUOTA, SECRET, Asker, Credential, Identity, Proof
from proxy.errors import (
    BlobUnknown,
    CredentialRefused,
    Denied,
    ManifestUnknown,
    NameUnknown,
    RegistryError,
    SecretRefused,
    TooManyAttempts,
    TooManyRequests,
    Unauthorized,
    UpstreamBroken,
    UpstreamFailing,
    UpstreamUnavailable,
)
from proxy.listings import ListQuery
from proxy.metrics import Metrics
from proxy.names import Repository, digest_of
from proxy.storage.base import Origin
from proxy.storage.store import Store
from proxy.threads import Threads
from proxy.upstream.client import Upstream
from proxy.upstream.content import Page
from tests.unit.clock import Clock

APP, OTHER = Repository("team/app"), Repository("team/other")
ADDRESS, ELSEWHERE = "10.0.0.7", "10.0.0.8"
RIGHT, SECOND, WRONG = Credential("user", "right"), Credential("user", "second"), Credential("user", "wrong")
CLIENT = Identity("client", RIGHT)
MINUTE, HOUR = 60.0, 3600.0


def nobody() -> Caller:
    return Caller(ADDRESS)


def who(credential: Credential = RIGHT, address: str = ADDRESS) -> Caller:
    return Caller(address, credential)


def again(error: RegistryError) -> RegistryError:
    """The same, which has not been raised yet."""
    if isinstance(error, CredentialRefused):
        return CredentialRefused(error.message, is_certain=error.is_certain)
    return type(error)(error.message)


class Registry:
    """An upstream, with what it says to each identity; asking is the probe itself."""

    def __init__(self, access: object, name: str = "registry.test") -> None:
        self.config = UpstreamConfig.model_validate({"name": name} | ({} if access is None else {"access": access}))
        self.name = name
        self.key = self.config.key
        self.has_secret = False
        self.is_out = True
        self.failure: RegistryError | None = None
        """What everybody is answered."""
        self.said: dict[Proof, RegistryError | None] = {"anonymous": Denied("private"), "secret": None}
        self.right: set[Credential] = {RIGHT, SECOND}
        self.to_right: RegistryError | None = None
        self.to_wrong: RegistryError = CredentialRefused("wrong")
        self.to_list: RegistryError | None = None
        """What everybody is answered who asks for the tags."""
        self.asked: list[Identity] = []
        self.confirmed: list[Identity] = []
        self.open = asyncio.Event()
        self.open.set()
        self.began = asyncio.Event()

    @property
    def upstream(self) -> Upstream:
        return cast(Upstream, self)

    def asked_as(self, proof: Proof) -> int:
        return sum(identity.proof == proof for identity in self.asked)

    async def probe(self, identity: Identity) -> None:
        self.asked.append(identity)
        self.began.set()
        await asyncio.sleep(0)  # the others' turn, as with any question
        await self.open.wait()
        answer = self.failure or self._answer(identity)
        if answer is not None:
            raise again(answer)

    async def list_tags(
        self, repository: Repository, query: ListQuery, asker: Asker, verify: Callable[[Page], Awaitable[None]]
    ) -> Page:
        """What a no to whom it had said yes is confirmed by."""
        self.confirmed.append(asker.identity)
        page = Page(json.dumps({"name": str(repository), "tags": []}).encode(), "application/json", ())
        if answer := self.to_list or self.failure or self._answer(asker.identity):
            raise again(answer)
        await verify(page)
        return page

    def _answer(self, identity: Identity) -> RegistryError | None:
        if identity.credential is None:
            return self.said[identity.proof]
        return self.to_right if identity.credential in self.right else self.to_wrong


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads(2)
    yield threads
    threads.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(tmp_path / "cache", Metrics())
    yield store
    store.close()


class Case:
    """Access with the registry that it is about."""

    def __init__(self, access: Access, registry: Registry) -> None:
        self.access = access
        self.registry = registry

    async def identity(self, caller: Caller, repository: Repository = APP, registry: Registry | None = None) -> Identity:
        registry = registry or self.registry
        return await self.access.identity(registry.upstream, repository, caller, Probe("a tag", registry.probe))

    async def refused(self, kind: type[RegistryError], caller: Caller, repository: Repository = APP) -> RegistryError:
        with pytest.raises(kind) as raised:
            await self.identity(caller, repository)
        assert type(raised.value) is kind
        return raised.value


Make = Callable[..., Case]


@pytest.fixture
def make(store: Store, threads: Threads, clock: Clock) -> Make:
    """``make(access, secret=False)``: a registry that refuses the anonymous, and knows RIGHT and SECOND."""

    def build(access: object, *, secret: bool = False) -> Case:
        registry = Registry(access)
        registry.has_secret = secret
        built = Access(store, threads, Attempts(clock), lambda _: registry.has_secret, clock)
        return Case(built, registry)

    return build


def give(store: Store, registry: Registry, proof: Proof, repository: Repository = APP) -> None:
    """Something was given from there, and is held."""
    store.link(Origin(registry.key, repository, proof), digest_of(b"x"))


# --- public ---


@pytest.mark.parametrize("access", [None, "public"])
@pytest.mark.parametrize("caller", [nobody(), who(RIGHT), who(WRONG)])
async def test_public_without_a_secret_asks_nothing_and_shows_nothing(make: Make, access: object, caller: Caller) -> None:
    each = make(access)
    assert await each.identity(caller) == ANONYMOUS
    assert each.registry.asked == []


async def test_a_secret_for_the_quota_is_used_where_the_anonymous_were_given_it(make: Make, clock: Clock) -> None:
    each = make("public", secret=True)
    each.registry.said["anonymous"] = None
    for caller in (nobody(), who(WRONG), nobody()):
        assert await each.identity(caller) == QUOTA
    assert each.registry.asked == [ANONYMOUS], "without the secret"
    clock.now += 24 * HOUR - 1
    await each.identity(nobody())
    assert len(each.registry.asked) == 1
    clock.now += 2
    await each.identity(nobody())
    assert each.registry.asked == [ANONYMOUS, ANONYMOUS]
    await each.identity(nobody(), OTHER)
    assert len(each.registry.asked) == 3, "each repository for itself"


async def test_how_long_a_repository_stays_proved_public_is_configured(make: Make, clock: Clock) -> None:
    each = make({"mode": "public", "publicFor": "0s"}, secret=True)
    each.registry.said["anonymous"] = None
    for number in range(3):
        assert await each.identity(nobody()) == QUOTA
        assert len(each.registry.asked) == number + 1


@pytest.mark.parametrize("caller", [nobody(), who(RIGHT)])
async def test_what_is_refused_to_the_anonymous_is_not_given_for_our_secret(
    make: Make, clock: Clock, store: Store, caller: Caller
) -> None:
    """Nor for the client's own, which this upstream is not to see."""
    each = make("public", secret=True)
    give(store, each.registry, "anonymous")
    for _ in range(3):
        error = await each.refused(Denied, caller)
        assert error.message == "private"
    assert each.registry.asked == [ANONYMOUS], "the no is remembered"
    assert not store.was_given(each.registry.key, APP, "anonymous"), "what was public is withdrawn"
    clock.now += 61
    each.registry.said["anonymous"] = None
    assert await each.identity(caller) == QUOTA


@pytest.mark.parametrize("kind", [ManifestUnknown, BlobUnknown, NameUnknown])
async def test_what_is_not_there_says_nothing_of_the_repository(make: Make, kind: type[RegistryError]) -> None:
    each = make("public", secret=True)
    each.registry.said["anonymous"] = kind("not there")
    for _ in range(2):
        await each.refused(kind, nobody())
    each.registry.said["anonymous"] = None
    assert await each.identity(nobody()) == QUOTA
    assert len(each.registry.asked) == 3


@pytest.mark.parametrize("kind", [UpstreamUnavailable, UpstreamBroken, TooManyRequests])
async def test_what_was_public_is_served_while_the_registry_fails(
    make: Make, clock: Clock, store: Store, kind: type[UpstreamFailing], caplog: pytest.LogCaptureFixture
) -> None:
    """Also after a restart: that it was given is in the catalog. It is asked again every few seconds, not every time."""
    each = make("public", secret=True)
    give(store, each.registry, "anonymous")
    each.registry.failure = kind("down")
    for _ in range(5):
        assert await each.identity(nobody()) == QUOTA
    assert len(each.registry.asked) == 1
    assert "team/app of registry.test is served on the yes of before: down" in caplog.text
    clock.now += 5.1
    assert await each.identity(nobody()) == QUOTA
    assert len(each.registry.asked) == 2
    each.registry.failure = None
    clock.now += 5.1
    await each.refused(Denied, nobody())


@pytest.mark.parametrize("access", ["public", "shared", "verify"])
async def test_what_was_never_given_is_not_given_while_the_registry_fails(make: Make, store: Store, access: str) -> None:
    each = make(access, secret=True)
    for proof in ("anonymous", "secret"):
        give(store, each.registry, proof, OTHER)
    each.registry.failure = UpstreamUnavailable("down")
    for _ in range(2):
        for caller in (nobody(), who()):
            await each.refused(UpstreamUnavailable, caller)


# --- shared ---


async def test_shared_is_given_to_all_in_the_name_of_our_secret(make: Make, clock: Clock) -> None:
    each = make("shared", secret=True)
    for caller in (nobody(), who(WRONG)):
        assert await each.identity(caller) == SECRET
    assert each.registry.asked == [SECRET], "and never the anonymous, nor the client's credential"
    clock.now += 299
    await each.identity(nobody())
    assert len(each.registry.asked) == 1
    clock.now += 2
    await each.identity(nobody())
    assert each.registry.asked == [SECRET, SECRET]


async def test_what_our_secret_is_refused_is_withdrawn(make: Make, clock: Clock, store: Store) -> None:
    each = make("shared", secret=True)
    give(store, each.registry, "secret")
    give(store, each.registry, "secret", OTHER)
    assert await each.identity(nobody()) == SECRET
    clock.now += 301
    each.registry.said["secret"] = Denied("no more")
    for _ in range(3):
        await each.refused(Denied, nobody())
    assert len(each.registry.asked) == 2
    assert not store.was_given(each.registry.key, APP, "secret")
    assert store.was_given(each.registry.key, OTHER, "secret")


@pytest.mark.parametrize("kind", [UpstreamUnavailable, UpstreamBroken, TooManyRequests, SecretRefused])
async def test_what_our_secret_opened_is_served_while_the_registry_fails(
    make: Make, clock: Clock, store: Store, kind: type[UpstreamFailing]
) -> None:
    """A secret that is not accepted any more is the operator's fault, and takes nothing from the clients."""
    each = make("shared", secret=True)
    give(store, each.registry, "secret")
    each.registry.failure = kind("down")
    for _ in range(3):
        assert await each.identity(nobody()) == SECRET
    assert len(each.registry.asked) == 1
    clock.now += 30 * 24 * HOUR
    assert await each.identity(nobody()) == SECRET
    assert store.was_given(each.registry.key, APP, "secret")


async def test_a_list_of_repositories_narrows_what_is_shared(make: Make) -> None:
    each = make({"mode": "shared", "repositories": ["registry.test/team/app"]}, secret=True)
    assert await each.identity(nobody(), APP) == SECRET
    await each.refused(Denied, nobody(), OTHER)
    each.registry.said["anonymous"] = None
    assert await each.identity(nobody(), Repository("team/third")) == QUOTA
    assert each.registry.asked == [SECRET, ANONYMOUS, ANONYMOUS]


async def test_a_new_secret_is_asked_for_at_once(make: Make) -> None:
    each = make("shared", secret=True)
    each.registry.said["secret"] = Denied("no")
    await each.refused(Denied, nobody())
    each.registry.said["secret"] = None
    each.access.forget_secret()
    assert await each.identity(nobody()) == SECRET
    each.registry.said["secret"] = Denied("no")
    each.access.forget_secret()
    await each.refused(Denied, nobody())


@pytest.mark.parametrize(
    ("access", "repository", "mode"),
    [
        (None, "team/app", "public"),
        ("public", "team/app", "public"),
        ("verify", "team/app", "verify"),
        ("shared", "team/app", "shared"),
        ({"mode": "shared", "repositories": ["registry.test/team/*"]}, "team/app", "shared"),
        ({"mode": "shared", "repositories": ["registry.test/team/*"]}, "teams/app", "public"),
        ({"mode": "shared", "repositories": ["team/*"]}, "team/app", "public"),
        ({"mode": "shared", "iUnderstandThisIsShared": True}, "team/app", "shared"),
    ],
)
def test_the_mode_of_a_repository(access: object, repository: str, mode: str) -> None:
    assert mode_of(Registry(access).config, Repository(repository)) == mode


# --- verify ---


@pytest.mark.parametrize("secret", [False, True])
async def test_what_the_anonymous_are_given_is_given_to_all(make: Make, secret: bool) -> None:
    each = make("verify", secret=secret)
    each.registry.said["anonymous"] = None
    for caller in (nobody(), who(RIGHT), who(WRONG)):
        assert await each.identity(caller) == QUOTA
    assert each.registry.asked == [ANONYMOUS], "no credential is shown where none is needed"


async def test_who_shows_nothing_is_asked_for_a_credential(make: Make, clock: Clock) -> None:
    each = make("verify", secret=True)
    for _ in range(3):
        error = await each.refused(Unauthorized, nobody())
        assert error.message == "team/app of registry.test is not public: private"
    assert each.registry.asked == [ANONYMOUS]
    clock.now += 61
    each.registry.said["anonymous"] = None
    assert await each.identity(nobody()) == QUOTA


async def test_a_credential_that_is_right_is_remembered(make: Make, clock: Clock) -> None:
    each = make("verify", secret=True)
    for _ in range(3):
        assert await each.identity(who()) == CLIENT
    assert each.registry.asked == [ANONYMOUS, CLIENT]
    clock.now += 299
    assert await each.identity(who(address=ELSEWHERE)) == CLIENT
    assert each.registry.asked_as("client") == 1
    clock.now += 2
    assert await each.identity(who()) == CLIENT
    assert each.registry.asked_as("client") == 2
    assert each.registry.asked_as("secret") == 0, "our own secret is for nobody here"


async def test_a_credential_that_is_wrong_is_refused_and_that_is_remembered_a_little(make: Make, clock: Clock) -> None:
    """Its owner may just have been given the right."""
    each = make("verify")
    for _ in range(3):
        error = await each.refused(Unauthorized, who(WRONG))
        assert error.message == "registry.test does not give team/app to this credential: wrong"
        assert error.__cause__ is None
    assert each.registry.asked == [ANONYMOUS, Identity("client", WRONG)]
    each.registry.right.add(WRONG)
    clock.now += 10.1
    assert await each.identity(who(WRONG)) == Identity("client", WRONG)


async def test_a_yes_is_of_one_credential_one_repository_and_one_upstream(make: Make) -> None:
    each = make("verify")
    other = Registry("verify", "other.test")
    other.right = set()
    assert await each.identity(who()) == CLIENT
    await each.refused(Unauthorized, nobody())
    await each.refused(Unauthorized, who(WRONG))
    with pytest.raises(Unauthorized):
        await each.identity(who(), APP, other)
    assert other.asked == [ANONYMOUS, CLIENT]
    each.registry.to_right = Denied("not this one")
    await each.refused(Unauthorized, who(), OTHER)
    assert await each.identity(who()) == CLIENT, "a no for another repository takes nothing"


@pytest.mark.parametrize(
    "other",
    [
        Credential("use", "rright"),
        Credential("userright", ""),
        Credential("", "userright"),
        Credential("user", "", "right"),
        Credential(identity_token="userright"),
        Credential("user", "Right"),
        Credential("user", "right\0"),
    ],
)
async def test_credentials_that_look_alike_are_not_one(make: Make, other: Credential) -> None:
    each = make("verify")
    assert await each.identity(who()) == CLIENT
    await each.refused(Unauthorized, who(other))


async def test_where_a_credential_is_from_does_not_matter(make: Make) -> None:
    each = make("verify")
    await each.identity(who())
    await each.identity(who(Credential("user", "right", source="a token", registry="x")))
    assert each.registry.asked_as("client") == 1


# --- verify, and what is not there ---


async def test_what_is_not_there_is_not_there_for_who_shows_nothing(make: Make) -> None:
    each = make("verify")
    each.registry.said["anonymous"] = ManifestUnknown("no such tag")
    await each.refused(ManifestUnknown, nobody())


@pytest.mark.parametrize("kind", [ManifestUnknown, BlobUnknown, NameUnknown])
async def test_a_registry_that_hides_what_is_private_is_asked_with_the_credential(
    make: Make, kind: type[RegistryError]
) -> None:
    each = make("verify")
    each.registry.said["anonymous"] = kind("not there")
    assert await each.identity(who()) == CLIENT
    await each.refused(Unauthorized, who(WRONG))


async def test_what_is_not_there_for_a_credential_is_not_there_and_is_no_yes(make: Make) -> None:
    each = make("verify")
    each.registry.to_right = ManifestUnknown("no such tag")
    for number in range(3):
        await each.refused(ManifestUnknown, who())
        assert each.registry.asked_as("client") == number + 1
    each.registry.to_right = Denied("no")
    await each.refused(Unauthorized, who())


async def test_asking_often_for_what_is_not_there_is_no_guessing(make: Make, clock: Clock) -> None:
    """As a Deployment does whose tag was never pushed."""
    each = make("verify")
    each.registry.to_right = ManifestUnknown("no such tag")
    for _ in range(100):
        await each.refused(ManifestUnknown, who())
        clock.now += 1


# --- verify, and a registry that fails ---


async def test_a_yes_is_stretched_while_the_registry_fails(make: Make, clock: Clock) -> None:
    each = make({"mode": "verify", "maxAge": "5m", "staleFor": "1h"})
    await each.identity(who())
    each.registry.failure = UpstreamUnavailable("down")
    clock.now += HOUR + 299
    assert await each.identity(who()) == CLIENT
    await each.refused(UpstreamUnavailable, who(SECOND))
    await each.refused(UpstreamUnavailable, who(), OTHER)
    clock.now += 2
    await each.refused(UpstreamUnavailable, who())


async def test_a_yes_is_not_stretched_where_that_is_not_wanted(make: Make, clock: Clock) -> None:
    each = make({"mode": "verify", "maxAge": "1m", "staleFor": "0s"})
    await each.identity(who())
    each.registry.failure = UpstreamUnavailable("down")
    clock.now += 59
    assert await each.identity(who()) == CLIENT
    clock.now += 2
    await each.refused(UpstreamUnavailable, who())


async def test_a_no_ends_a_yes_at_once_whatever_may_be_stretched(make: Make, clock: Clock) -> None:
    each = make("verify")
    await each.identity(who())
    clock.now += 301
    each.registry.right.clear()
    await each.refused(Unauthorized, who())
    each.registry.failure = UpstreamUnavailable("down")
    clock.now += 11
    await each.refused(UpstreamUnavailable, who())


@pytest.mark.parametrize("later", [61, 301], ids=["fresh", "stretched"])
async def test_a_yes_costs_no_question_each_time_while_the_registry_fails(make: Make, clock: Clock, later: float) -> None:
    """Each question may last as long as one may wait for a registry that hangs."""
    each = make("verify")
    await each.identity(who())
    each.registry.asked.clear()
    each.registry.failure = UpstreamUnavailable("down")
    clock.now += later
    for _ in range(10):
        assert await each.identity(who()) == CLIENT
    assert len(each.registry.asked) <= 2, "one of each identity, within the seconds that a failure is remembered"


async def test_what_is_no_outage_stretches_a_yes_for_that_question_alone(make: Make, clock: Clock) -> None:
    """A client can choose a reference at which the line breaks: what else it asks for is asked about."""
    each = make("verify")
    await each.identity(who())
    each.registry.is_out = False
    each.registry.failure = UpstreamUnavailable("dropped")
    clock.now += 301
    bad = Probe("bad", each.registry.probe)
    assert await each.access.identity(each.registry.upstream, APP, who(), bad) == CLIENT
    each.registry.failure = None
    each.registry.right.clear()
    await each.refused(Unauthorized, who())


async def test_the_anonymous_get_what_was_public_while_the_registry_fails(make: Make, store: Store) -> None:
    each = make("verify")
    give(store, each.registry, "anonymous")
    each.registry.failure = UpstreamUnavailable("down")
    for caller in (nobody(), who(WRONG)):
        assert await each.identity(caller) == QUOTA


async def test_what_a_client_was_given_is_not_given_to_others_while_the_registry_fails(make: Make, store: Store) -> None:
    """Neither are those who were given it before a restart known after it."""
    each = make("verify")
    give(store, each.registry, "client")
    give(store, each.registry, "secret")
    each.registry.failure = UpstreamUnavailable("down")
    for caller in (nobody(), who(WRONG), who(RIGHT)):
        await each.refused(UpstreamUnavailable, caller)


async def test_a_registry_that_hangs_is_a_failing_one(make: Make, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    each = make("verify")
    await each.identity(who())
    clock.now += 301
    for bound in ("_PATIENCE", "_PATIENCE_GIVEN"):
        monkeypatch.setattr(proofs, bound, 0.01)
    each.registry.open.clear()
    assert await each.identity(who()) == CLIENT
    error = await each.refused(UpstreamUnavailable, who(SECOND))
    assert error.message == "registry.test did not say in time who may read team/app"


# --- what the registry refuses later ---


async def test_a_refusal_of_content_ends_the_yes_of_a_credential_and_no_other(make: Make, store: Store) -> None:
    each = make("verify")
    give(store, each.registry, "client")
    for credential in (RIGHT, SECOND):
        await each.identity(who(credential))
    each.registry.to_list = Denied("no more")
    with pytest.raises(Unauthorized, match=r"^no more$"):
        await each.access.refused(each.registry.upstream, APP, CLIENT, Denied("no more"))
    assert each.registry.confirmed == [CLIENT]
    await each.refused(Unauthorized, who())
    assert await each.identity(who(SECOND)) == Identity("client", SECOND)
    assert each.registry.asked_as("client") == 2, "nobody was asked again"
    assert store.was_given(each.registry.key, APP, "client"), "others may have it still"


@pytest.mark.parametrize("identity", [ANONYMOUS, QUOTA])
async def test_a_refusal_of_content_ends_that_it_is_public(make: Make, store: Store, identity: Identity) -> None:
    each = make("verify")
    each.registry.said["anonymous"] = None
    for repository in (APP, OTHER):
        give(store, each.registry, "anonymous", repository)
        assert await each.identity(nobody(), repository) == QUOTA
    give(store, each.registry, "secret")
    each.registry.to_list = Denied("private now")
    with pytest.raises(Withdrawn, match=r"^private now$"):
        await each.access.refused(each.registry.upstream, APP, identity, Denied("private now"))
    assert each.registry.confirmed == [ANONYMOUS], "without the secret for the quota"
    await each.refused(Unauthorized, nobody())
    assert not store.was_given(each.registry.key, APP, "anonymous")
    assert await each.identity(nobody(), OTHER) == QUOTA
    assert store.was_given(each.registry.key, OTHER, "anonymous")
    assert await each.identity(who()) == CLIENT


@pytest.mark.parametrize(("access", "identity"), [("verify", CLIENT), ("verify", QUOTA), ("shared", SECRET)])
async def test_a_refusal_of_a_single_artifact_leaves_the_repository_open(
    make: Make, store: Store, access: str, identity: Identity
) -> None:
    """As registries refuse what a scanner has found: whoever is still told the tags may read the others."""
    each = make(access, secret=True)
    each.registry.said["anonymous"] = None if identity is QUOTA else Denied("private")
    give(store, each.registry, identity.proof)
    caller = who() if identity is CLIENT else nobody()
    assert await each.identity(caller) == identity
    asked = len(each.registry.asked)
    await each.access.refused(each.registry.upstream, APP, identity, Denied("blocked by a scan"))
    assert len(each.registry.confirmed) == 1
    assert await each.identity(caller) == identity
    assert len(each.registry.asked) == asked, "the yes holds"
    assert store.was_given(each.registry.key, APP, identity.proof)


@pytest.mark.parametrize("which", ["first", "second", "failing"])
async def test_a_refusal_that_may_be_another_s_word_withdraws_nothing(make: Make, store: Store, which: str) -> None:
    """A page for people may be a gateway's; and who does not answer the second question has confirmed nothing."""
    each = make("verify")
    give(store, each.registry, "client")
    await each.identity(who())
    uncertain = CredentialRefused("a page", is_certain=False)
    each.registry.to_list = UpstreamUnavailable("down") if which == "failing" else uncertain
    with pytest.raises(UpstreamFailing):
        await each.access.refused(
            each.registry.upstream, APP, CLIENT, uncertain if which == "first" else CredentialRefused("no more")
        )
    assert len(each.registry.confirmed) == (which != "first")
    each.registry.right.clear()
    assert await each.identity(who()) == CLIENT, "the yes holds"


async def test_a_refusal_to_whom_nothing_was_given_is_left_as_it_is(make: Make) -> None:
    each = make("verify")
    await each.access.refused(each.registry.upstream, APP, CLIENT, Denied("no"))
    assert each.registry.confirmed == []


async def test_a_question_that_proves_nothing_is_not_remembered(make: Make) -> None:
    each = make("shared", secret=True)
    probe = Probe("tags", each.registry.probe, proves=False)
    for number in range(2):
        assert await each.access.identity(each.registry.upstream, APP, nobody(), probe) == SECRET
        assert len(each.registry.asked) == number + 1


# --- many at once ---


async def turns(count: int = 50) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_those_who_ask_the_same_share_one_question(make: Make) -> None:
    each = make("verify")
    each.registry.open.clear()
    crowd = [asyncio.ensure_future(each.identity(who())) for _ in range(100)]
    await each.registry.began.wait()
    await turns()
    each.registry.open.set()
    assert await asyncio.gather(*crowd) == [CLIENT] * 100
    assert each.registry.asked == [ANONYMOUS, CLIENT]


async def test_who_leaves_does_not_end_the_question_of_the_others(make: Make) -> None:
    each = make("shared", secret=True)
    each.registry.open.clear()
    first, second = (asyncio.ensure_future(each.identity(nobody())) for _ in range(2))
    await each.registry.began.wait()
    first.cancel()
    await turns()
    each.registry.open.set()
    assert await second == SECRET
    assert each.registry.asked == [SECRET]


async def test_many_right_credentials_of_one_client_are_all_taken(make: Make) -> None:
    """A node with as many pull secrets, after a restart of the cache."""
    each = make("verify")
    credentials = [Credential(f"user{number}", "right") for number in range(40)]
    each.registry.right.update(credentials)
    outcomes = await asyncio.gather(*(each.identity(who(credential)) for credential in credentials), return_exceptions=True)
    assert outcomes == [Identity("client", credential) for credential in credentials]


async def test_one_right_credential_for_many_repositories_is_taken_for_all(make: Make) -> None:
    each = make("verify")
    repositories = [Repository(f"team/app{number}") for number in range(40)]
    outcomes = await asyncio.gather(*(each.identity(who(), repository) for repository in repositories))
    assert outcomes == [CLIENT] * 40


# --- what wrong credentials cost ---


def wrong(number: int) -> Credential:
    return Credential("user", f"wrong{number}")


async def outcomes_of(each: Case, callers: list[Caller], at_once: bool) -> list[type[Any]]:
    """How it went for each."""
    calls = [each.identity(caller) for caller in callers]
    if at_once:
        return [type(outcome) for outcome in await asyncio.gather(*calls, return_exceptions=True)]
    return [type((await asyncio.gather(call, return_exceptions=True))[0]) for call in calls]


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("refusal", [CredentialRefused("wrong"), Denied("no right")], ids=["wrong", "no-right"])
async def test_wrong_credentials_of_one_client_cost_the_registry_ten_questions_a_minute(
    make: Make, clock: Clock, at_once: bool, refusal: RegistryError
) -> None:
    each = make("verify")
    each.registry.to_wrong = refusal
    each.registry.right.add(Credential("other", "right"))
    await each.identity(who(RIGHT))
    each.registry.asked.clear()
    outcomes = await outcomes_of(each, [who(wrong(number)) for number in range(200)], at_once)
    assert outcomes.count(Unauthorized) == 10
    assert outcomes.count(TooManyAttempts) == 190
    assert each.registry.asked_as("client") == 10
    assert await each.identity(who(RIGHT)) == CLIENT, "who is known goes on"
    other = Credential("other", "right")
    assert await each.identity(who(other, ELSEWHERE)) == Identity("client", other), "so does another client"
    clock.now += 61
    await each.refused(Unauthorized, who(wrong(500)))


async def test_wrong_credentials_of_all_clients_cost_a_registry_sixty_questions_a_minute(make: Make, clock: Clock) -> None:
    each = make("verify")
    for credential in (RIGHT, SECOND):
        await each.identity(who(credential))
    each.registry.asked.clear()
    crowd = [who(wrong(number), f"10.0.1.{number % 100}") for number in range(500)]
    outcomes = await outcomes_of(each, crowd, at_once=True)
    assert outcomes.count(Unauthorized) == each.registry.asked_as("client") == 60
    for credential in (RIGHT, SECOND):
        assert await each.identity(who(credential)) == Identity("client", credential)


async def test_the_same_wrong_credential_counts_once_while_it_is_remembered(make: Make, clock: Clock) -> None:
    each = make("verify")
    for _ in range(100):
        await each.refused(Unauthorized, who(WRONG))
    assert each.registry.asked_as("client") == 1
    assert await each.identity(who()) == CLIENT


async def test_right_credentials_do_not_count(make: Make) -> None:
    each = make("verify")
    for number in range(40):
        assert await each.identity(who(), Repository(f"team/app{number}")) == CLIENT
    await each.refused(Unauthorized, who(WRONG))


@pytest.mark.parametrize("kind", [UpstreamUnavailable, UpstreamBroken, TooManyRequests])
async def test_a_credential_that_a_failing_registry_did_not_hear_counts_once(
    make: Make, clock: Clock, kind: type[UpstreamFailing]
) -> None:
    """It may be right, and is tried again; but a token server that fails is not asked about ever new ones."""
    each = make("verify")
    each.registry.failure = kind("down")
    for _ in range(30):
        assert (await each.refused(kind, who())).message == "down"
    for number in range(9):
        assert (await each.refused(kind, who(wrong(number)))).message == "down"
    before = each.registry.asked_as("client")
    await each.refused(TooManyAttempts, who(wrong(9)))
    assert each.registry.asked_as("client") == before
    each.registry.failure = None
    clock.now += 5.1
    assert await each.identity(who()) == CLIENT


async def test_a_yes_that_is_renewed_costs_no_attempt(make: Make, clock: Clock) -> None:
    each = make("verify")
    await each.identity(who())
    clock.now += 301
    for number in range(10):
        await each.refused(Unauthorized, who(wrong(number)))
    await each.refused(TooManyAttempts, who(wrong(10)))
    assert await each.identity(who()) == CLIENT
    assert each.registry.asked[-1] == CLIENT


async def test_the_anonymous_cost_no_attempts(make: Make, clock: Clock) -> None:
    each = make("verify")
    for number in range(30):
        await each.refused(Unauthorized, nobody(), Repository(f"team/app{number}"))
    assert await each.identity(who()) == CLIENT


async def test_who_leaves_before_the_answer_has_tried(make: Make) -> None:
    """Else wrong credentials would be free for who hangs up in time."""
    each = make("verify")
    await each.refused(Unauthorized, nobody())
    await leave(each, [wrong(number) for number in range(10)])
    await each.refused(TooManyAttempts, who(wrong(10)))
    assert each.registry.asked_as("client") == 10


async def test_who_leaves_with_what_is_right_has_not_tried_in_vain(make: Make) -> None:
    """As a runtime does whose own time is over: its answer is waited for, and counts for its next pull."""
    each = make("verify")
    await each.refused(Unauthorized, nobody())
    credentials = [Credential(f"user{number}", "right") for number in range(10)]
    each.registry.right.update(credentials)
    await leave(each, credentials)
    assert each.registry.asked_as("client") == 10
    for credential in credentials:
        assert await each.identity(who(credential)) == Identity("client", credential)
    assert each.registry.asked_as("client") == 10
    for number in range(10):
        await each.refused(Unauthorized, who(wrong(number)))


async def leave(each: Case, credentials: list[Credential]) -> None:
    """Clients show these, and hang up before the registry has answered."""
    each.registry.open.clear()
    callers = [asyncio.ensure_future(each.identity(who(credential))) for credential in credentials]
    await turns()
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    each.registry.open.set()
    await turns(200)


async def test_nothing_of_a_credential_is_in_what_is_said(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    each = make("verify")
    canary = Credential("s3cr3t-user", "s3cr3t-password", "s3cr3t-token")
    error = await each.refused(Unauthorized, who(canary))
    assert "s3cr3t" not in f"{error!r} {error.message} {caplog.text} {vars(each.access)}"


async def test_closing_ends_what_is_asked(make: Make) -> None:
    each = make("shared", secret=True)
    each.registry.open.clear()
    waiting = asyncio.ensure_future(each.identity(nobody()))
    await each.registry.began.wait()
    await each.access.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_who_asks_for_what_is_not_there_spoils_nothing_for_another_who_asks_then(make: Make) -> None:
    """Both ask who may read the repository at the same time, by what each of them wants."""
    each = make("verify")
    each.registry.said["anonymous"] = None
    upstream = each.registry.upstream

    async def is_absent(_: Identity) -> None:
        await asyncio.sleep(0)
        raise ManifestUnknown("no such tag")

    outcomes = await asyncio.gather(
        each.access.identity(upstream, APP, who(), Probe("manifest 1", is_absent)),
        each.access.identity(upstream, APP, Caller(ADDRESS), Probe("manifest 2", each.registry.probe)),
        return_exceptions=True,
    )
    assert isinstance(outcomes[0], ManifestUnknown)
    assert outcomes[1] == QUOTA
