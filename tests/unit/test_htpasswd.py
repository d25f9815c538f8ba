"""Users of the listener: what the file may hold, who is let in, and how much work a crowd can make."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import bcrypt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.access import htpasswd
from proxy.access.htpasswd import HtpasswdInvalid, Users, parse_htpasswd
from proxy.errors import CacheFailing, Unauthorized
from tests.unit.clock import Clock


def hash_of(password: str) -> bytes:
    """A cheap hash."""
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(rounds=4))


ALICE = hash_of("wonderland")
BOB = hash_of("builder")
BODY = ALICE[7:].decode()


@pytest.mark.parametrize(
    ("text", "users"),
    [
        pytest.param(b"alice:" + ALICE, {"alice": ALICE}, id="one"),
        pytest.param(b"alice:" + ALICE + b"\nbob:" + BOB + b"\n", {"alice": ALICE, "bob": BOB}, id="two"),
        pytest.param(b"alice:" + ALICE + b"\r\nbob:" + BOB + b"\r\n", {"alice": ALICE, "bob": BOB}, id="Windows-lines"),
        pytest.param(b"# people\n\n  \nalice:" + ALICE + b"\n\n", {"alice": ALICE}, id="comments-and-empty-lines"),
        pytest.param(b"  alice:" + ALICE + b" ", {"alice": ALICE}, id="white-space-around-a-line"),
        pytest.param("\u00e9ve:".encode() + ALICE, {"\u00e9ve": ALICE}, id="UTF-8"),
        pytest.param(b"a:$2a$04$" + ALICE[7:], {"a": b"$2a$04$" + ALICE[7:]}, id="2a"),
        pytest.param(b"a:$2y$04$" + ALICE[7:], {"a": b"$2y$04$" + ALICE[7:]}, id="2y-as-htpasswd-writes-it"),
    ],
)
def test_a_file_holds_users(text: bytes, users: dict[str, bytes]) -> None:
    assert parse_htpasswd(text, "users") == users


@pytest.mark.parametrize(
    ("line", "why"),
    [
        pytest.param("canary", "user:hash", id="no-colon"),
        pytest.param(f":$2b$04${BODY}", "user:hash", id="no-user"),
        pytest.param("canary:", "bcrypt", id="no-hash"),
        pytest.param("a:canary", "bcrypt", id="plain-text"),
        pytest.param("a:$apr1$canary$canary", "bcrypt", id="MD5"),
        pytest.param("a:{SHA}canary", "bcrypt", id="SHA-1"),
        pytest.param("a:$6$canary$canary", "bcrypt", id="SHA-512-crypt"),
        pytest.param("a:canaryDESxyz", "bcrypt", id="DES"),
        pytest.param(f"a:$2x$04${BODY}", "bcrypt", id="2x"),
        pytest.param(f"a:$2b$04${BODY[:-1]}", "bcrypt", id="cut-off"),
        pytest.param(f"a:$2b$04${BODY}canary", "bcrypt", id="text-after-it"),
        pytest.param(f"a:$2b$04${BODY[:21]}/{BODY[22:]}", "bcrypt", id="a-salt-that-bcrypt-does-not-take"),
        pytest.param(f"a:$2b$\u0660\u0664${BODY}", "bcrypt", id="foreign-digits"),
        pytest.param(f"a:$2b$03${BODY}", "cost", id="cost-too-low"),
        pytest.param(f"a:$2b$31${BODY}", "cost", id="a-cost-of-weeks"),
        pytest.param(b"a\xffcanary:" + ALICE, "UTF-8", id="no-UTF-8"),
        pytest.param(f"first:$2b$04${BODY}", "line 1", id="the-same-user-again"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_line_and_not_shown(line: str | bytes, why: str) -> None:
    text = b"first:" + ALICE + b"\n# note\n" + (line if isinstance(line, bytes) else line.encode()) + b"\nbob:" + BOB
    with pytest.raises(HtpasswdInvalid) as caught:
        parse_htpasswd(text, "/etc/users")
    message = str(caught.value)
    assert message.startswith("/etc/users: line 3: ")
    assert why in message
    assert "canary" not in message
    assert BODY[:8] not in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("text", [b"", b"\n\n", b"# nobody\n"])
def test_a_file_without_users_is_no_file_of_users(text: bytes) -> None:
    """Half of a file that is being written must not turn everybody away."""
    with pytest.raises(HtpasswdInvalid, match=r"^/etc/users: no user"):
        parse_htpasswd(text, "/etc/users")


@given(st.binary(max_size=60) | st.text("ab:#$2y04.\n\r", max_size=80).map(str.encode))
def test_no_file_raises_anything_else(text: bytes) -> None:
    try:
        users = parse_htpasswd(text, "f")
    except HtpasswdInvalid:
        return
    assert users
    assert all(name and ":" not in name for name in users)


class Bcrypt:
    """bcrypt, counted, and held up on demand."""

    def __init__(self) -> None:
        self.costs: list[bytes] = []
        self.go = threading.Event()
        self.go.set()
        self.yes_to_all = False
        self.at_once = 0
        self.most = 0
        self._lock = threading.Lock()

    def checkpw(self, password: bytes, hashed: bytes) -> bool:
        """The real one, once it may go."""
        with self._lock:
            self.costs.append(hashed[4:6])
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        assert self.go.wait(30)
        with self._lock:
            self.at_once -= 1
        return self.yes_to_all or bcrypt.checkpw(password, hashed)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bcrypt]:
    counter = Bcrypt()
    monkeypatch.setattr(htpasswd, "bcrypt", counter)
    yield counter
    counter.go.set()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def users(clock: Clock) -> Iterator[Users]:
    made = Users({"alice": ALICE, "bob": BOB, "y": b"$2y" + ALICE[3:], "a": b"$2a" + ALICE[3:]}, clock)
    yield made
    made.close()


async def until_begun(counted: Bcrypt, number: int) -> None:
    """Waits until so many checks have begun."""
    async with asyncio.timeout(30):
        while len(counted.costs) < number:
            await asyncio.sleep(0.001)


async def turned_away(users: Users, counted: Bcrypt) -> CacheFailing:
    """The refusal of one more check while others are held up, which then go on."""
    task = asyncio.create_task(users.verify("bob", "builder"))
    done, _ = await asyncio.wait([task], timeout=10)
    counted.go.set()
    assert done, "it waits like the others"
    refusal = task.exception()
    assert isinstance(refusal, CacheFailing)
    return refusal


@pytest.mark.parametrize(
    ("username", "password", "right"),
    [
        ("alice", "wonderland", True),
        ("bob", "builder", True),
        ("y", "wonderland", True),
        ("a", "wonderland", True),
        ("alice", "builder", False),
        ("alice", "", False),
        ("alice", "wonderland ", False),
        ("Alice", "wonderland", False),
        ("alic", "ewonderland", False),
        ("", "", False),
        ("nobody", "wonderland", False),
        ("nobody\udcff", "wonderland", False),
        ("\ud800", "\ud800", False),
    ],
)
async def test_the_right_password_of_a_user_is_a_yes(users: Users, username: str, password: str, right: bool) -> None:
    for _ in range(2):
        assert await users.verify(username, password) is right


async def test_a_yes_is_remembered_five_minutes_and_a_no_is_not(users: Users, clock: Clock, counted: Bcrypt) -> None:
    for _ in range(3):
        assert await users.verify("alice", "wonderland")
        clock.now += 100
    assert len(counted.costs) == 1, "asking does not lengthen it either"
    assert await users.verify("alice", "wonderland")
    assert len(counted.costs) == 2
    for _ in range(3):
        assert not await users.verify("alice", "looking-glass")
    assert len(counted.costs) == 5


async def test_a_remembered_yes_is_for_that_user_and_password_alone(users: Users) -> None:
    assert await users.verify("alice", "wonderland")
    assert not await users.verify("alicewonder", "land")
    assert not await users.verify("alicew", "onderland")
    assert not await users.verify("bob", "wonderland")


async def test_an_unknown_user_costs_as_much_as_a_known_one(clock: Clock, counted: Bcrypt) -> None:
    users = Users({"alice": ALICE, "dear": bcrypt.hashpw(b"x", bcrypt.gensalt(rounds=5))}, clock)
    assert not await users.verify("nobody", "x")
    assert counted.costs == [b"05"]
    users.close()


async def test_what_is_known_needs_no_check(users: Users, clock: Clock) -> None:
    assert not users.knows("alice", "wonderland")
    assert await users.verify("alice", "wonderland")
    assert users.knows("alice", "wonderland")
    assert not users.knows("alice", "looking-glass")
    assert not users.knows("alice", "w" * 100)
    clock.now += 300
    assert not users.knows("alice", "wonderland")


async def test_other_users_are_taken_at_once_and_a_yes_is_forgotten(users: Users, counted: Bcrypt) -> None:
    assert await users.verify("alice", "wonderland")
    users.use({"alice": hash_of("new"), "carol": ALICE})
    assert not await users.verify("alice", "wonderland")
    assert await users.verify("alice", "new")
    assert await users.verify("carol", "wonderland")
    assert not await users.verify("bob", "builder")
    users.use({})
    assert not await users.verify("alice", "new")


async def test_a_yes_that_was_under_way_at_the_exchange_is_not_kept(users: Users, counted: Bcrypt) -> None:
    counted.go.clear()
    running = asyncio.create_task(users.verify("alice", "wonderland"))
    await until_begun(counted, 1)
    users.use({"alice": hash_of("new")})
    newcomer = asyncio.create_task(users.verify("alice", "wonderland"))
    await until_begun(counted, 2)
    counted.go.set()
    await running
    assert not await newcomer, "nor shared with those who ask after it"
    assert not await users.verify("alice", "wonderland")


@pytest.mark.parametrize("username", ["alice", "nobody"])
async def test_a_password_that_bcrypt_would_cut_off_is_refused_in_words(users: Users, username: str) -> None:
    with pytest.raises(Unauthorized, match="72 bytes") as caught:
        await users.verify(username, "\u00e9" * 36 + "x")
    assert "\u00e9" not in caught.value.message
    users.use({"alice": hash_of("\u00e9" * 36)})
    assert await users.verify("alice", "\u00e9" * 36), "72 bytes are not too many"


async def test_many_requests_with_one_password_are_one_check(users: Users, counted: Bcrypt) -> None:
    assert all(await asyncio.gather(*(users.verify("alice", "wonderland") for _ in range(500))))
    assert len(counted.costs) == 1


async def test_four_are_checked_at_once_sixty_four_wait_and_more_are_turned_away(users: Users, counted: Bcrypt) -> None:
    counted.go.clear()
    crowd = [asyncio.create_task(users.verify("alice", f"wrong-{number}")) for number in range(68)]
    await until_begun(counted, 4)
    refusal = await turned_away(users, counted)
    assert refusal.status == 503
    assert int(refusal.headers["Retry-After"]) >= 1
    assert not any(await asyncio.gather(*crowd))
    assert counted.most == 4
    assert await users.verify("bob", "builder"), "the way is free again"


async def test_the_remembered_are_served_while_a_crowd_is_checked(users: Users, counted: Bcrypt) -> None:
    assert await users.verify("bob", "builder")
    counted.go.clear()
    crowd = [asyncio.create_task(users.verify("alice", f"wrong-{number}")) for number in range(68)]
    await until_begun(counted, 5)
    async with asyncio.timeout(30):
        assert await users.verify("bob", "builder")
    counted.go.set()
    await asyncio.gather(*crowd)


async def test_those_who_leave_still_count_until_their_check_is_over(users: Users, counted: Bcrypt) -> None:
    """A client that hangs up at once must not get more done than one that waits."""
    counted.go.clear()
    crowd = [asyncio.create_task(users.verify("alice", f"wrong-{number}")) for number in range(68)]
    await until_begun(counted, 4)
    for task in crowd:
        task.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)
    await turned_away(users, counted)
    async with asyncio.timeout(30):
        while True:
            try:
                assert await users.verify("bob", "builder")
                break
            except CacheFailing:
                await asyncio.sleep(0.001)


async def test_what_is_remembered_is_bounded_and_holds_no_password(clock: Clock, counted: Bcrypt) -> None:
    users = Users({f"user-{number}": ALICE for number in range(4100)}, clock)
    counted.yes_to_all = True
    for number in range(4100):
        assert await users.verify(f"user-{number}", "wonderland")
    assert users.knows("user-4099", "wonderland")
    assert not users.knows("user-0", "wonderland"), "the oldest made room"
    assert "wonderland" not in repr(vars(users))
    users.close()
