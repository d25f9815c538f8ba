"""The door: who is admitted with what, what the others are asked to show, and what the token endpoint gives."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator, Sequence
from urllib.parse import urlencode

import bcrypt
import pytest

from proxy.access import htpasswd
from proxy.access.attempts import Attempts
from proxy.access.authorization import TokenRequestInvalid
from proxy.access.caller import Caller
from proxy.access.gate import Gate
from proxy.access.handles import ANONYMOUS_HANDLE, Handles
from proxy.access.htpasswd import Users
from proxy.credentials.credential import Credential
from proxy.errors import CacheFailing, Denied, TooManyAttempts, Unauthorized
from tests.unit.clock import Clock

URL = "https://cache.corp:5000/token"
ADDRESS = "10.0.0.7"
CANARY = "s3cr3t-canary"
BASIC_CHALLENGE = 'Basic realm="pullcache"'
BEARER_CHALLENGE = f'Bearer realm="{URL}",service="pullcache"'


def basic(username: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{username}:{password}'.encode()).decode()}"


def bearer(token: object) -> str:
    return f"Bearer {token}"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def attempts(clock: Clock) -> Attempts:
    return Attempts(clock)


@pytest.fixture
def users(clock: Clock) -> Iterator[Users]:
    hashes = {name: bcrypt.hashpw(f"{name}'s".encode(), bcrypt.gensalt(4)) for name in ("alice", "bob")}
    users = Users(hashes, clock)
    yield users
    users.close()


@pytest.fixture
def open_gate(clock: Clock, attempts: Attempts) -> Gate:
    """Nobody is asked for anything."""
    return Gate("pullcache", None, {}, None, Handles(clock), attempts)


@pytest.fixture
def gate(clock: Clock, attempts: Attempts) -> Gate:
    """Clients' credentials are looked at, for some upstream."""
    return Gate("pullcache", None, {}, URL, Handles(clock), attempts)


@pytest.fixture
def guarded(clock: Clock, attempts: Attempts, users: Users) -> Gate:
    """The listener has users."""
    return Gate("pullcache", users, {}, None, Handles(clock), attempts)


async def refusal(gate: Gate, header: str | None, address: str = ADDRESS) -> Unauthorized:
    with pytest.raises(Unauthorized) as raised:
        await gate.admit(address, header, None)
    assert raised.value.__cause__ is None
    return raised.value


# --- where nothing is asked ---


@pytest.mark.parametrize(
    "header",
    [None, "", basic("u", "p"), basic("", ""), bearer("x"), bearer(CANARY), "Basic !!!", "Digest x", "x" * 100_000, "\r\n"],
)
async def test_an_open_listener_looks_at_nothing_that_is_shown(open_gate: Gate, header: str | None) -> None:
    """dockerd shows unasked what it has for the registry; refusing that would send it past the cache."""
    assert await open_gate.admit(ADDRESS, header, None) == Caller(ADDRESS)
    open_gate.greet(header)


async def test_who_has_a_certificate_is_known_by_it(open_gate: Gate, gate: Gate) -> None:
    for each in (open_gate, gate):
        assert await each.admit(ADDRESS, None, "node-1") == Caller(ADDRESS, user="node-1")
    assert await gate.admit(ADDRESS, basic("u", "p"), "node-1") == Caller(ADDRESS, Credential("u", "p"), "node-1")


# --- where clients' own credentials count ---


@pytest.mark.parametrize("header", [None, basic("", ""), bearer(ANONYMOUS_HANDLE), "bearer  anonymous"])
async def test_the_anonymous_come_in(gate: Gate, header: str | None) -> None:
    """What they may read is for the upstream to say."""
    assert await gate.admit(ADDRESS, header, None) == Caller(ADDRESS)


async def test_a_credential_is_taken_as_it_is_shown(gate: Gate) -> None:
    """Whether it is right only the upstream knows."""
    assert await gate.admit(ADDRESS, basic("u", f"{CANARY}:x"), None) == Caller(ADDRESS, Credential("u", f"{CANARY}:x"))


async def test_a_token_stands_for_its_credential_as_long_as_it_lives(gate: Gate, clock: Clock) -> None:
    given = gate.token(ADDRESS, "GET", "", b"", basic("u", "p"))
    for address in (ADDRESS, "10.0.0.8"):
        assert (await gate.admit(address, bearer(given["token"]), None)).credential == Credential("u", "p")
    assert isinstance(given["expires_in"], int)
    clock.now += given["expires_in"]
    assert (await gate.admit(ADDRESS, bearer(given["token"]), None)).credential == Credential("u", "p"), "as promised"
    clock.now += 301
    error = await refusal(gate, bearer(given["token"]))
    assert error.challenges == (f'{BEARER_CHALLENGE},error="invalid_token"', BASIC_CHALLENGE)


@pytest.mark.parametrize("header", [bearer(CANARY), bearer("Anonymous"), bearer("x" * 43)])
async def test_an_unknown_token_is_refused_as_invalid(gate: Gate, header: str) -> None:
    error = await refusal(gate, header)
    assert error.challenges == (f'{BEARER_CHALLENGE},error="invalid_token"', BASIC_CHALLENGE)
    assert CANARY not in f"{error!r} {error.challenges}"


@pytest.mark.parametrize(
    "header", ["", f"Basic {CANARY}!", f"Digest {CANARY}", f"Bearer {CANARY} x", "Basic " + "A" * 20_000]
)
async def test_what_cannot_be_read_is_refused_with_a_challenge(gate: Gate, guarded: Gate, header: str) -> None:
    error = await refusal(gate, header)
    assert error.challenges == (BEARER_CHALLENGE, BASIC_CHALLENGE)
    assert CANARY not in f"{error!r} {error.challenges}"
    error = await refusal(guarded, header)
    assert error.challenges == (BASIC_CHALLENGE,)
    assert CANARY not in f"{error!r} {error.challenges}"


def test_the_ping_of_who_shows_nothing_is_answered_with_a_challenge(gate: Gate) -> None:
    """Bearer alone: podman and dockerd take what they are to show from here (containers/image docker/docker_client.go)."""
    with pytest.raises(Unauthorized) as raised:
        gate.greet(None)
    assert raised.value.challenges == (BEARER_CHALLENGE,)
    for header in (bearer(ANONYMOUS_HANDLE), basic("u", "p")):
        gate.greet(header)


def test_a_refusal_names_the_scope(gate: Gate) -> None:
    error = gate.unauthorized("no", scope="repository:team/app:pull")
    assert (error.message, error.challenges) == (
        "no",
        (f'{BEARER_CHALLENGE},scope="repository:team/app:pull"', BASIC_CHALLENGE),
    )


# --- the token endpoint ---


def test_the_anonymous_get_a_token(gate: Gate) -> None:
    form = urlencode({"grant_type": "password", "username": "", "password": ""}).encode()
    for given in (
        gate.token(ADDRESS, "GET", "scope=repository:a:pull&service=pullcache", b"", None),
        gate.token(ADDRESS, "GET", "", b"", basic("", "")),
        gate.token(ADDRESS, "POST", "", form, None),
    ):
        assert given["token"] == given["access_token"] == ANONYMOUS_HANDLE


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "query",
    [
        "",
        "account=u&service=pullcache&scope=repository:a:pull",
        "scope=repository:a:pull&scope=repository:b:pull,push&scope=registry:catalog:*",
        "scope=repository%3Aa%3Apull+repository%3Ab%3Apull",
        "scope=nonsense&unknown=x&unknown=y",
        "scope=%ff%00&a=%zz",
    ],
)
async def test_a_token_is_given_for_basic_whatever_the_scopes(gate: Gate, method: str, query: str) -> None:
    """containerd adds a scope of its own making."""
    given = gate.token(ADDRESS, method, query, b"", basic("u", CANARY))
    assert given["token"] == given["access_token"] != ANONYMOUS_HANDLE
    assert CANARY not in str(given)
    assert (await gate.admit(ADDRESS, bearer(given["token"]), None)).credential == Credential("u", CANARY)


@pytest.mark.parametrize(
    ("form", "credential"),
    [
        ({"grant_type": "password", "username": "u", "password": CANARY}, Credential("u", CANARY)),
        ({"grant_type": "password", "username": "\u00e9", "password": "a+b &=%"}, Credential("\u00e9", "a+b &=%")),
        ({"grant_type": "refresh_token", "refresh_token": CANARY}, Credential(identity_token=CANARY)),
        (
            {"grant_type": "password", "username": "u", "password": "p", "client_id": "containerd-client", "scope": "x y"},
            Credential("u", "p"),
        ),
    ],
)
async def test_a_token_is_given_for_a_form(gate: Gate, form: dict[str, str], credential: Credential) -> None:
    given = gate.token(ADDRESS, "POST", "", urlencode(form).encode(), None)
    assert (await gate.admit(ADDRESS, bearer(given["token"]), None)).credential == credential


def test_one_client_gets_one_token_for_one_credential(gate: Gate) -> None:
    tokens = {str(gate.token(ADDRESS, "GET", "", b"", basic("u", "p"))["token"]) for _ in range(50)}
    assert len(tokens) == 1
    assert gate.token(ADDRESS, "GET", "", b"", basic("u", "other"))["token"] not in tokens


@pytest.mark.parametrize(
    ("method", "query", "body", "header"),
    [
        pytest.param("POST", "", b"", None, id="empty-form"),
        pytest.param("POST", "grant_type=password&username=u&password=p", b"", None, id="form-in-the-query"),
        pytest.param("POST", "", b"grant_type=canary", None, id="unknown-grant"),
        pytest.param("POST", "", b"grant_type=password&username=canary", None, id="no-password"),
        pytest.param("POST", "", b"grant_type=password&username=a%00&password=canary", None, id="NUL"),
        pytest.param("POST", "", b"\xff\xfe\x00canary", None, id="no-form"),
        pytest.param("POST", "", b"a=canary&" * 300, None, id="many-fields-in-a-form"),
        pytest.param("GET", "a=canary&" * 300, b"", None, id="many-fields-in-a-query"),
        pytest.param("GET", "", b"", "Basic canary!", id="broken-Basic"),
        pytest.param("GET", "", b"", bearer("canary"), id="Bearer"),
    ],
)
def test_a_token_request_that_cannot_be_read_is_the_clients_fault(
    gate: Gate, method: str, query: str, body: bytes, header: str | None
) -> None:
    with pytest.raises(TokenRequestInvalid) as raised:
        gate.token(ADDRESS, method, query, body, header)
    assert "canary" not in f"{raised.value!r} {raised.value.description}"


# --- users of the listener ---


@pytest.mark.parametrize("header", [None, basic("", ""), bearer("x"), bearer(ANONYMOUS_HANDLE)])
async def test_who_shows_no_user_is_asked_for_one(guarded: Gate, header: str | None) -> None:
    assert (await refusal(guarded, header)).challenges == (BASIC_CHALLENGE,)


async def test_a_user_is_admitted_and_his_password_goes_no_further(guarded: Gate) -> None:
    assert await guarded.admit(ADDRESS, basic("alice", "alice's"), None) == Caller(ADDRESS, user="alice")
    guarded.greet(None)


@pytest.mark.parametrize(
    ("username", "password"), [("alice", "bob's"), ("alice", ""), ("carol", "alice's"), ("Alice", "alice's"), ("", "x")]
)
async def test_a_wrong_one_is_refused_alike_whether_there_is_such_a_user(
    guarded: Gate, username: str, password: str
) -> None:
    error = await refusal(guarded, basic(username, password))
    assert (error.message, error.challenges) == ("the user or the password is wrong", (BASIC_CHALLENGE,))


async def test_a_password_that_is_too_long_for_bcrypt_is_asked_for_again(guarded: Gate) -> None:
    """A 401 has a challenge (RFC 9110 section 15.5.2)."""
    error = await refusal(guarded, basic("alice", "x" * 73))
    assert error.challenges == (BASIC_CHALLENGE,)


async def test_wrong_passwords_are_bounded_and_right_ones_are_not(guarded: Gate, clock: Clock) -> None:
    for number in range(10):
        await refusal(guarded, basic("alice", f"wrong{number}"))
    for header in (basic("alice", "wrong"), basic("bob", "bob's")):
        with pytest.raises(TooManyAttempts):
            await guarded.admit(ADDRESS, header, None)
    other = "10.0.0.8"
    assert (await guarded.admit(other, basic("bob", "bob's"), None)).user == "bob"
    assert (await guarded.admit(ADDRESS, basic("bob", "bob's"), None)).user == "bob", "he is known by now"
    clock.now += 61
    for _ in range(30):
        assert (await guarded.admit(ADDRESS, basic("alice", "alice's"), None)).user == "alice"
    await refusal(guarded, basic("alice", "wrong"))


async def test_a_crowd_with_the_right_password_comes_in(guarded: Gate) -> None:
    """A node that begins to pull many images at once, before a first yes is known."""
    crowd = [guarded.admit(ADDRESS, basic("alice", "alice's"), None) for _ in range(30)]
    outcomes = await asyncio.gather(*crowd, return_exceptions=True)
    assert [outcome for outcome in outcomes if outcome != Caller(ADDRESS, user="alice")] == []


async def test_a_password_that_was_not_checked_was_not_wrong(
    guarded: Gate, users: Users, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(users, "_begun", htpasswd._AT_ONCE + htpasswd._WAITING)
        for _ in range(10):
            with pytest.raises(CacheFailing):
                await guarded.admit(ADDRESS, basic("alice", "alice's"), None)
    assert (await guarded.admit(ADDRESS, basic("alice", "alice's"), None)).user == "alice"


# --- what a user may read ---

REPOSITORIES: dict[str, Sequence[str]] = {"alice": ["docker.io/*"], "nobody": [], "*": ["docker.io/library/*"]}


@pytest.mark.parametrize(
    ("user", "name", "allowed"),
    [
        ("alice", "docker.io/team/app", True),
        ("alice", "quay.io/team/app", False),
        ("bob", "docker.io/library/debian", True),
        ("bob", "docker.io/team/app", False),
        (None, "docker.io/library/debian", True),
        (None, "docker.io/team/app", False),
        ("nobody", "docker.io/library/debian", False),
    ],
)
def test_a_user_reads_what_is_listed_for_him_or_else_for_everybody(
    clock: Clock, attempts: Attempts, user: str | None, name: str, allowed: bool
) -> None:
    gate = Gate("pullcache", None, REPOSITORIES, None, Handles(clock), attempts)
    if allowed:
        gate.check_repository(Caller(ADDRESS, user=user), name)
    else:
        with pytest.raises(Denied, match=f"{user or 'this client'} may not read {name} here"):
            gate.check_repository(Caller(ADDRESS, user=user), name)


def test_without_a_list_everybody_reads_everything(clock: Clock, attempts: Attempts, open_gate: Gate) -> None:
    open_gate.check_repository(Caller(ADDRESS), "docker.io/team/app")
    only_alice = Gate("pullcache", None, {"alice": ["*"]}, None, Handles(clock), attempts)
    only_alice.check_repository(Caller(ADDRESS, user="alice"), "docker.io/team/app")
    with pytest.raises(Denied):
        only_alice.check_repository(Caller(ADDRESS, user="bob"), "docker.io/team/app")


async def test_nothing_that_is_shown_is_in_a_repr(gate: Gate) -> None:
    caller = await gate.admit(ADDRESS, basic(CANARY, CANARY), None)
    assert caller.credential is not None
    assert CANARY not in repr(caller)
