"""Handles: random names of credentials, found while they live, really gone afterwards, and never too many."""

from __future__ import annotations

import gc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.access.handles import ANONYMOUS_HANDLE, Handles
from proxy.credentials.credential import Credential
from tests.unit.clock import Clock

ALICE = Credential("alice", "canary-one")
BOB = Credential("bob", "canary-two")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def handles(clock: Clock) -> Handles:
    return Handles(clock)


def test_a_handle_stands_for_its_credential_as_long_as_it_lives(handles: Handles, clock: Clock) -> None:
    handle = handles.give(ALICE, "a")
    clock.now += 299.9
    assert handles.find(handle) is ALICE
    clock.now += 0.1
    assert handles.find(handle) is None


@pytest.mark.parametrize("handle", ["", ANONYMOUS_HANDLE, "alice", "x" * 43, "\udcff"])
def test_any_other_handle_is_unknown(handles: Handles, handle: str) -> None:
    handles.give(ALICE, "a")
    assert handles.find(handle) is None


def test_handles_cannot_be_guessed_and_say_nothing(handles: Handles) -> None:
    given = {handles.give(Credential("alice", str(number)), f"{number}") for number in range(1000)}
    assert len(given) == 1000
    assert all(len(handle) >= 43 and "alice" not in handle for handle in given)


def test_the_same_again_while_half_its_life_is_to_come(handles: Handles, clock: Clock) -> None:
    first = handles.give(ALICE, "a")
    clock.now += 149
    assert handles.give(Credential("alice", "canary-one", source="elsewhere"), "a") == first
    clock.now += 11
    second = handles.give(ALICE, "a")
    assert second != first
    assert handles.find(first) == handles.find(second) == ALICE, "the one given before lives on"
    clock.now += 141
    assert handles.find(first) is None
    assert handles.give(ALICE, "a") == second, "the end of the first is not the second's"


def test_a_handle_lives_as_long_as_promised_from_whenever_it_is_given(clock: Clock) -> None:
    handles = Handles(clock, life=300)
    for _ in range(20):
        handle = handles.give(ALICE, "a")
        began, clock.now = clock.now, clock.now + handles.promised_life - 0.1
        assert handles.find(handle) == ALICE
        clock.now = began + 37
    assert handles.promised_life >= 60, "less than a minute is not given by a token server (distribution spec/auth/token.md)"


def test_owners_and_credentials_have_their_own(handles: Handles) -> None:
    given = [handles.give(credential, owner) for credential in (ALICE, BOB) for owner in ("a", "b")]
    assert len(set(given)) == 4
    assert [handles.find(handle) for handle in given] == [ALICE, ALICE, BOB, BOB]


def test_who_has_too_many_loses_his_own_oldest(clock: Clock) -> None:
    handles = Handles(clock, per_owner=3, size=100)
    other = handles.give(BOB, "b")
    own = [handles.give(Credential("alice", str(number)), "a") for number in range(5)]
    assert [handles.find(handle) is not None for handle in own] == [False, False, True, True, True]
    assert handles.find(other) == BOB


def test_when_all_are_too_many_the_oldest_of_all_goes(clock: Clock) -> None:
    handles = Handles(clock, per_owner=2, size=3)
    given = [handles.give(ALICE, f"{number}") for number in range(5)]
    assert [handles.find(handle) is not None for handle in given] == [False, False, True, True, True]
    assert len(handles) == 3


def test_an_owner_at_his_limit_takes_no_place_from_others(clock: Clock) -> None:
    handles = Handles(clock, per_owner=2, size=3)
    other = handles.give(BOB, "b")
    for number in range(10):
        handles.give(Credential("alice", str(number)), "a")
    assert handles.find(other) == BOB


def test_what_went_early_is_given_anew(clock: Clock) -> None:
    handles = Handles(clock, per_owner=1)
    first = handles.give(ALICE, "a")
    handles.give(BOB, "a")
    again = handles.give(ALICE, "a")
    assert again != first
    assert handles.find(again) == ALICE


def test_expired_credentials_are_no_longer_in_memory(clock: Clock) -> None:
    class Watched(Credential):
        """Told from the credentials of other tests."""

    handles = Handles(clock)
    for number in range(100):
        handles.give(Watched("alice", str(number)), f"{number % 7}")
    clock.now += 300
    handles.drop_expired()
    gc.collect()
    assert not [found for found in gc.get_objects() if isinstance(found, Watched)]
    assert len(handles) == 0


def test_no_secret_in_its_repr(handles: Handles) -> None:
    handle = handles.give(ALICE, "a")
    text = repr(handles) + repr(vars(handles))
    assert "canary" not in text
    assert handle not in repr(handles)


STEPS = st.lists(
    st.tuples(st.just("give"), st.integers(0, 5), st.integers(0, 3))
    | st.tuples(st.just("wait"), st.integers(0, 9), st.just(0)),
    max_size=60,
)


@given(STEPS, st.integers(1, 3), st.integers(1, 6))
def test_it_keeps_what_a_plain_list_keeps(steps: list[tuple[str, int, int]], per_owner: int, size: int) -> None:
    """A list of (end, owner, credential, handle), oldest first, says what there is after each step."""
    clock = Clock()
    handles = Handles(clock, life=10.0, per_owner=per_owner, size=size)
    model: list[tuple[float, str, Credential, str]] = []
    every: set[str] = set()
    for action, one, other in steps:
        if action == "wait":
            clock.now += one
        else:
            credential, owner = Credential("u", str(one)), f"{other}"
            model = [each for each in model if each[0] > clock.now]
            same = [each for each in model if each[1:3] == (owner, credential) and each[0] - clock.now > 5]
            own = [each for each in model if each[1] == owner]
            handle = handles.give(credential, owner)
            every.add(handle)
            if same:
                assert handle == same[-1][3]
            else:
                if len(own) >= per_owner:
                    model.remove(own[0])
                elif len(model) >= size:
                    del model[0]
                assert handle not in {each[3] for each in model}
                model.append((clock.now + 10, owner, credential, handle))
        live = {each[3]: each[2] for each in model if each[0] > clock.now}
        assert {handle: found for handle in every if (found := handles.find(handle)) is not None} == live
        assert len(handles) == len(live)
