"""The line of downloads: places of images, slots of upstreams, and nothing lost or left whoever comes and goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from proxy.admission import LINGER, Admission, Ticket, WaitedTooLong
from proxy.errors import RegistryError
from proxy.metrics import Metrics

PATIENCE = 120.0


class Timers:
    """A clock that is moved by hand, and calls what was to be called."""

    def __init__(self) -> None:
        self.now = 0.0
        self._set: list[_Timer] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, call: Callable[[], None]) -> _Timer:
        timer = _Timer(self.now + delay, call)
        self._set.append(timer)
        return timer

    def advance(self, seconds: float, after_each: Callable[[], None] = lambda: None) -> None:
        end = self.now + seconds
        while due := sorted((t for t in self.pending() if t.when <= end), key=lambda t: t.when):
            self.now = due[0].when
            due[0].cancelled = True
            due[0].call()
            after_each()
        self.now = end

    def pending(self) -> list[_Timer]:
        self._set = [timer for timer in self._set if not timer.cancelled]
        return self._set


@dataclass(eq=False)
class _Timer:
    when: float
    call: Callable[[], None]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass(eq=False)
class Download:
    """A transfer as the one sees it who has it made."""

    name: str
    line: str = "a"
    started: bool = False
    dropped: list[RegistryError | None] = field(default_factory=list)
    tickets: list[tuple[Ticket, str]] = field(default_factory=list)
    wanted_by: set[str] = field(default_factory=set)


class Line:
    """An admission with its clock; what was started, in that order."""

    def __init__(self, limit: int | None, slots: int = 16) -> None:
        self.timers = Timers()
        self.metrics = Metrics()
        self.order: list[str] = []
        self.running: list[Download] = []
        lines = {"a": slots, "b": slots}
        self.admission = Admission(limit, lines, PATIENCE, self.timers.time, self.timers.call_later, self.metrics)

    def enter(self, name: str, image: str, line: str = "a") -> Download:
        download = Download(name, line)

        def start() -> None:
            assert not download.started
            assert not download.dropped
            download.started = True
            self.order.append(name)
            self.running.append(download)

        download.wanted_by.add(image)
        ticket = self.admission.enter(name, line, image, start, download.dropped.append)
        download.tickets.append((ticket, image))
        return download

    def join(self, download: Download, image: str) -> Ticket:
        ticket = self.admission.join(download.tickets[0][0].transfer, image)
        download.tickets.append((ticket, image))
        download.wanted_by.add(image)
        return ticket

    def end(self, download: Download) -> None:
        self.running.remove(download)
        self.admission.end(download.tickets[0][0].transfer)

    def gauge(self, name: str) -> float:
        return self.metrics.registry.get_sample_value(f"pullcache_{name}") or 0.0

    def nothing_is_left(self) -> None:
        inside: Any = self.admission
        assert (inside._images, inside._queue, inside._waiting, inside._places) == ({}, [], set(), 0)
        assert all((line.running, line.ready) == (0, []) for line in inside._lines.values())
        assert self.timers.pending() == []
        assert (self.gauge("fills_waiting"), self.gauge("image_places")) == (0, 0)


# --- cases ---


def test_without_a_limit_everything_runs_up_to_the_slots_of_its_upstream() -> None:
    line = Line(None, slots=2)
    downloads = [line.enter(f"a{number}", "image") for number in range(4)]
    line.enter("b0", "image", "b")
    assert line.order == ["a0", "a1", "b0"]
    assert [download.tickets[0][0].may_run for download in downloads] == [True] * 4
    line.end(downloads[1])
    assert line.order == ["a0", "a1", "b0", "a2"]


def test_one_image_after_the_other() -> None:
    """The next one begins when the first has wanted nothing for a while; in that time it may go on with its next layer."""
    line = Line(1)
    first = [line.enter("1a", "1"), line.enter("1b", "1")]
    second = line.enter("2a", "2")
    assert line.order == ["1a", "1b"]
    for download in first:
        line.end(download)
    line.timers.advance(LINGER - 0.5)
    third = line.enter("1c", "1")
    line.timers.advance(LINGER)
    assert line.order == ["1a", "1b", "1c"]
    line.end(third)
    line.timers.advance(LINGER - 0.5)
    assert not second.started
    line.timers.advance(0.5)
    assert second.started


def test_what_two_images_share_runs_for_the_one_that_holds_a_place() -> None:
    line = Line(1)
    line.enter("1a", "1")
    shared = line.enter("shared", "2")
    assert not shared.started
    line.join(shared, "1")
    assert shared.started
    assert line.gauge("image_places") == 1


def test_an_image_whose_only_wish_another_one_covers_is_not_in_the_line() -> None:
    """It would take a place that it does not need before one that does."""
    line = Line(1, slots=1)
    first = line.enter("1a", "1")
    shared = line.enter("shared", "2")
    line.join(shared, "1")
    assert not shared.started
    third = line.enter("3a", "3")
    line.end(first)
    line.end(shared)
    line.timers.advance(LINGER)
    assert third.started


def test_who_leaves_while_it_waits_leaves_the_line_at_once() -> None:
    line = Line(1)
    line.enter("1a", "1")
    second, third = line.enter("2a", "2"), line.enter("3a", "3")
    ticket = line.join(second, "2")
    second.tickets[0][0].leave()
    second.tickets[0][0].leave()  # once is enough, twice does no harm
    assert not second.dropped
    ticket.leave()
    assert second.dropped == [None]
    assert "0 others" in str(third.tickets[0][0].send_away())


def test_what_runs_goes_on_without_clients_and_counts() -> None:
    """It outlives those who wanted it; until it ends its image holds the place."""
    line = Line(1)
    first, second = line.enter("1a", "1"), line.enter("2a", "2")
    first.tickets[0][0].leave()
    line.timers.advance(10 * LINGER)
    assert (first.dropped, second.started) == ([], False)
    line.end(first)
    line.timers.advance(LINGER)
    assert second.started


def test_an_image_that_only_followed_gives_its_place_back() -> None:
    line = Line(2)
    first = line.enter("1a", "1")
    second = line.enter("2a", "2")
    line.end(second)
    follower = line.join(first, "2")
    line.timers.advance(LINGER)
    assert line.gauge("image_places") == 2
    follower.leave()
    line.timers.advance(LINGER)
    assert line.gauge("image_places") == 1


def test_something_new_of_an_image_keeps_its_place_though_another_covers_it() -> None:
    line = Line(2, slots=1)
    first, second = line.enter("1a", "1"), line.enter("2a", "2")
    line.end(first)
    assert second.started
    line.timers.advance(LINGER / 2)
    line.join(line.enter("shared", "2"), "1")
    line.timers.advance(LINGER / 2)
    assert line.gauge("image_places") == 2
    line.timers.advance(LINGER / 2)
    assert line.gauge("image_places") == 1


def test_a_place_that_is_needed_is_kept_though_another_covers_a_part_of_it() -> None:
    line = Line(2, slots=1)
    first, second = line.enter("1a", "1"), line.enter("2a", "2")
    line.join(line.enter("shared", "3"), "1")
    own = line.enter("3a", "3")
    second.tickets[0][0].leave()
    line.timers.advance(LINGER)
    assert own.tickets[0][0].may_run
    line.timers.advance(LINGER)
    assert own.tickets[0][0].may_run
    line.end(first)


def test_who_was_sent_away_keeps_its_place_in_the_line_for_a_while() -> None:
    line = Line(1)
    first, second = line.enter("1a", "1"), line.enter("2a", "2")
    third = line.enter("3a", "3")
    for ticket, _ in second.tickets:
        assert ticket.send_away().headers == {"Retry-After": "5"}
        ticket.leave()
    line.timers.advance(PATIENCE / 2)
    again = line.enter("2a", "2")
    line.end(first)
    line.timers.advance(LINGER)
    assert (again.started, third.started) == (True, False)


def test_who_vanished_does_not() -> None:
    line = Line(1)
    first, second = line.enter("1a", "1"), line.enter("2a", "2")
    third = line.enter("3a", "3")
    second.tickets[0][0].leave()
    again = line.enter("2a", "2")
    line.end(first)
    line.timers.advance(LINGER)
    assert (again.started, third.started) == (False, True)


def test_what_waits_for_too_long_fails_and_says_what_for() -> None:
    line = Line(1, slots=1)
    line.enter("1a", "1")
    slot, place = line.enter("1b", "1"), line.enter("2a", "2")
    line.timers.advance(PATIENCE)
    (of_slot,), (of_place,) = slot.dropped, place.dropped
    assert isinstance(of_slot, WaitedTooLong)
    assert "downloads from a run 1 at a time (maxConcurrentFetches of that upstream), and 0 others" in str(of_slot)
    assert "images are pulled 1 at a time (serializeImagePulls, maxParallelImagePulls of this cache)" in str(of_place)
    for download in (slot, place):
        download.tickets[0][0].leave()
    line.end(line.running[0])
    line.timers.advance(LINGER)
    line.nothing_is_left()


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_thousands_that_come_and_go_leave_nothing(limit: int | None) -> None:
    line = Line(limit, slots=1)
    first = line.enter("first", "first")
    downloads = [line.enter(str(number), str(number % 700)) for number in range(5000)]
    assert line.gauge("fills_waiting") == 5000
    for download in downloads:
        download.tickets[0][0].leave()
    line.end(first)
    line.timers.advance(LINGER)
    line.nothing_is_left()


# --- at random ---

IMAGES = st.sampled_from("ABCDE")


class Anything(RuleBasedStateMachine):
    """Clients come, go and are sent away, downloads end, time passes: what holds after each step, whatever was before."""

    @initialize(limit=st.sampled_from([None, 1, 2, 3]), slots=st.integers(1, 3))
    def begin(self, limit: int | None, slots: int) -> None:
        self.limit, self.slots = limit, slots
        self.line = Line(limit, slots)
        self.inside: Any = self.line.admission
        self.downloads: list[Download] = []
        self.placed: set[Any] = set()
        self.seen_running: set[Download] = set()

    def alive(self) -> list[Download]:
        return [download for download in self.downloads if not download.dropped]

    def tickets(self) -> list[tuple[Download, int]]:
        return [(download, at) for download in self.downloads for at in range(len(download.tickets))]

    @rule(image=IMAGES, line=st.sampled_from("ab"))
    def comes(self, image: str, line: str) -> None:
        self.downloads.append(self.line.enter(f"{len(self.downloads)}", image, line))

    @rule(image=IMAGES, data=st.data())
    def follows(self, image: str, data: st.DataObject) -> None:
        if alive := self.alive():
            self.line.join(data.draw(st.sampled_from(alive)), image)

    @rule(data=st.data(), sent=st.booleans())
    def leaves(self, data: st.DataObject, sent: bool) -> None:
        if tickets := self.tickets():
            download, at = data.draw(st.sampled_from(tickets))
            ticket, _ = download.tickets[at]
            if sent and not ticket.runs and ticket._is_valid:
                ticket.send_away()
            ticket.leave()

    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        if running := self.line.running:
            download = data.draw(st.sampled_from(running))
            self.line.end(download)
            self.downloads.remove(download)

    @rule(seconds=st.sampled_from([0.5, LINGER, 30.0, PATIENCE]))
    def time_passes(self, seconds: float) -> None:
        self.line.timers.advance(seconds, self.first_come_first_served)

    @invariant()
    def the_limits_hold(self) -> None:
        running = self.line.running
        assert all(number <= self.slots for number in Counter(download.line for download in running).values())
        if self.limit is None:
            return
        assert self.inside._places == sum(image.has_place for image in self.inside._images.values()) <= self.limit
        wishes = [download.wanted_by for download in running]
        images = set().union(*wishes)
        places = min(self.limit, len(images))
        assert any(all(wanted & set(chosen) for wanted in wishes) for chosen in combinations(images, places))

    @invariant()
    def what_can_run_runs(self) -> None:
        holders = {key for key, image in self.inside._images.items() if image.has_place}
        for download in self.alive():
            transfer = download.tickets[0][0].transfer
            wanted = {image for ticket, image in download.tickets if ticket._is_valid}
            if download.started:
                continue
            assert wanted, "it waits for nobody"
            assert transfer.covers == len(wanted & holders)
            is_free = sum(each.line == download.line for each in self.line.running) < self.slots
            assert not (is_free and (self.limit is None or wanted & holders)), f"{download.name} could run"
            if self.limit is not None and not wanted & holders:
                assert len(holders) == self.limit, f"there is a place for {wanted}"
                assert all(self.inside._images[image] in self.inside._queue for image in wanted)

    @invariant()
    def only_who_needs_a_place_is_in_the_line_for_one(self) -> None:
        for image in self.inside._queue:
            assert not image.has_place
            assert any(transfer.covers == 0 for transfer in image.waiting)
        for image in self.inside._images.values():
            if image.has_place:
                is_needed = image.running or any(transfer.covers == 1 for transfer in image.waiting)
                assert (image.linger is None) == bool(is_needed)

    @invariant()
    def first_come_first_served(self) -> None:
        for ordered in (self.inside._queue, *(each.ready for each in self.inside._lines.values())):
            numbers = [item.number for item in ordered]
            assert numbers == sorted(numbers)
        placed = {image for image in self.inside._images.values() if image.has_place}
        for new in placed - self.placed:
            assert all(image.number >= new.number for image in self.inside._queue)
        self.placed = placed
        running = set(self.line.running)
        for download in running - self.seen_running:
            transfer = download.tickets[0][0].transfer
            assert all(other.number >= transfer.number for other in transfer.line.ready)
        self.seen_running = running

    @invariant()
    def the_figures_are_true(self) -> None:
        waiting = [download for download in self.alive() if not download.started]
        assert self.line.gauge("fills_waiting") == len(waiting)
        assert self.line.gauge("image_places") == self.inside._places

    def teardown(self) -> None:
        """Everything that waits has its turn, as long as what runs ends; then nothing is left."""
        if not hasattr(self, "line"):
            return
        for _ in range(20 * (len(self.downloads) + 1)):
            if not self.line.running and not any(not download.started for download in self.alive()):
                break
            if self.line.running:
                download = self.line.running[0]
                self.line.end(download)
                self.downloads.remove(download)
            else:
                self.line.timers.advance(LINGER)
        assert not [download for download in self.alive() if not download.started]
        self.line.timers.advance(LINGER)
        self.line.nothing_is_left()


Anything.TestCase.settings = settings(max_examples=400, stateful_step_count=50, deadline=None)
TestAtRandom = Anything.TestCase
