"""Serial and parallel image pulls: which download may run now. ``serializeImagePulls`` and ``maxParallelImagePulls`` count
images, as the kubelet does (``pkg/kubelet/images/puller.go``); ``maxConcurrentFetches`` counts the transfers of an upstream.

A *transfer* belongs to every image whose clients wait for it. Where images are limited, a limited number of them hold a
*place*, and a transfer may run as soon as any of its images holds one: so what several images share blocks none of them.

    clients -> transfer -> its images -- a place --> may run -- a slot of its upstream --> runs -> ended

Places are given in the order in which the images came, slots in that of the transfers that may run. An image queues only
while something waits that no image with a place covers. It gives its place back when nothing of it runs and nothing waits
that it alone could start, after a while: clients fetch the layers of an image in turns.

A state machine of the event loop: nothing in it waits, and it calls back in the same turn.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from itertools import count
from operator import attrgetter
from typing import Literal, Protocol, TypeVar

from cachetools import TTLCache

from proxy.errors import CacheFailing, RegistryError
from proxy.metrics import Metrics

LINGER = 2.0
"""Seconds for which an image keeps a place that it does not need."""

_REMEMBERED = 10_000
_RETRY_AFTER = 5
_BY_NUMBER = attrgetter("number")


class WaitedTooLong(CacheFailing):
    """What a client wants has not had its turn in time. Its place in the line is kept for it for a while."""


class Timer(Protocol):
    """A call that is to come."""

    def cancel(self) -> None:
        """It is not to come."""
        ...


CallLater = Callable[[float, Callable[[], None]], Timer]
"""Calls something after so many seconds."""


@dataclass(eq=False, slots=True)
class _Image:
    """``needs``: how many of its waiting transfers no image with a place covers."""

    key: Hashable
    number: int
    waiting: dict[Transfer, None] = field(default_factory=dict)
    running: dict[Transfer, None] = field(default_factory=dict)
    needs: int = 0
    has_place: bool = False
    linger: Timer | None = None

    @property
    def is_busy(self) -> bool:
        """Whether it needs the place that it holds: something of it runs, or waits that it alone covers."""
        return bool(self.running) or any(transfer.covers == 1 for transfer in self.waiting)


@dataclass(eq=False, slots=True)
class Transfer:
    """One download, waiting or running. ``covers``: how many of its images hold a place."""

    key: Hashable
    line: _Line
    number: int
    start: Callable[[], None]
    drop: Callable[[RegistryError | None], None]
    state: Literal["waiting", "running", "ended"] = "waiting"
    clients: Counter[Hashable] = field(default_factory=Counter)
    images: dict[Hashable, _Image] = field(default_factory=dict)
    covers: int = 0
    deadline: Timer | None = None


@dataclass(eq=False, slots=True)
class _Line:
    """The transfers of one upstream. ``ready``: those that wait for nothing but a slot, in the order in which they came."""

    name: str
    slots: int
    running: int = 0
    ready: list[Transfer] = field(default_factory=list)


@dataclass(slots=True)
class Ticket:
    """That a client wants a transfer for an image. Whoever gets it leaves."""

    transfer: Transfer
    _admission: Admission
    _image: Hashable
    _is_valid: bool = True

    @property
    def runs(self) -> bool:
        """Whether the transfer has had its turn."""
        return self.transfer.state != "waiting"

    @property
    def may_run(self) -> bool:
        """Whether it runs, or waits for a slot of its upstream and nothing else."""
        return self.runs or self._admission.may_run(self.transfer)

    def send_away(self) -> WaitedTooLong:
        """What a client is told that has waited long enough: what for, behind whom, and which keys decide."""
        return self._admission.send_away(self.transfer, self._image)

    def leave(self) -> None:
        """The client has gone. A transfer that waits for nobody leaves the line at once; one that runs goes on."""
        if self._is_valid:
            self._is_valid = False
            self._admission.leave(self.transfer, self._image)


class Admission:
    """The line of one cache.

    ``limit``: how many images may be pulled at once, None for any number. ``slots``: how many transfers each upstream may
    have. ``patience``: seconds after which a transfer that still waits fails; as long the number of an image whose client
    was sent away is kept.
    """

    def __init__(
        self,
        limit: int | None,
        slots: Mapping[str, int],
        patience: float,
        clock: Callable[[], float],
        call_later: CallLater,
        metrics: Metrics,
    ) -> None:
        self._limit = limit
        self._lines = {name: _Line(name, number) for name, number in slots.items()}
        self._patience = patience
        self._call_later = call_later
        self._metrics = metrics
        self._numbers = count()
        self._images: dict[Hashable, _Image] = {}
        self._places = 0
        self._queue: list[_Image] = []
        self._waiting: set[Transfer] = set()
        self._kept: TTLCache[Hashable, int] = TTLCache(_REMEMBERED, patience, timer=clock)

    def enter(
        self,
        key: Hashable,
        line: str,
        image: Hashable,
        start: Callable[[], None],
        drop: Callable[[RegistryError | None], None],
    ) -> Ticket:
        """A new transfer of the upstream ``line``, and its first client's ticket.

        Either ``start`` is called, perhaps before this returns, and ``end`` is to be called in time; or ``drop``: with a
        reason when it has waited too long, without one when its last client has left.
        """
        transfer = Transfer(key, self._lines[line], self._number(key), start, drop)
        self._waiting.add(transfer)
        if self._limit is None:
            insort(transfer.line.ready, transfer, key=_BY_NUMBER)
        ticket = self.join(transfer, image)
        if transfer.state == "waiting":
            transfer.deadline = self._call_later(self._patience, lambda: self._expire(transfer))
        return ticket

    def join(self, transfer: Transfer, image: Hashable) -> Ticket:
        """One more client's ticket for a transfer that has not ended."""
        transfer.clients[image] += 1
        if self._limit is not None and image not in transfer.images:
            self._attach(transfer, image)
        self._advance()
        return Ticket(transfer, self, image)

    def end(self, transfer: Transfer, *, has_failed: bool = False) -> None:
        """A transfer that was started has ended. What has failed is no reason to wait for more of its image."""
        if transfer.state != "running":
            return
        transfer.state = "ended"
        transfer.line.running -= 1
        for image in list(transfer.images.values()):
            image.running.pop(transfer, None)
            self._look_at(image)
            if has_failed and image.linger is not None:
                self._stop_linger(image)
                self._give_back(image)
        self._advance()

    def leave(self, transfer: Transfer, image: Hashable) -> None:
        """A client has gone (``Ticket.leave``)."""
        transfer.clients[image] -= 1
        if transfer.state == "ended" or transfer.clients[image] > 0:
            return
        del transfer.clients[image]
        if image in transfer.images:
            self._detach(transfer, transfer.images[image])
        if transfer.state == "waiting" and not transfer.clients:
            self._forget(transfer)
            transfer.drop(None)
        self._advance()

    def may_run(self, transfer: Transfer) -> bool:
        """Whether it needs nothing but a slot of its upstream."""
        return self._limit is None or transfer.covers > 0

    def send_away(self, transfer: Transfer, image: Hashable) -> WaitedTooLong:
        """What a client is told that has waited long enough (``Ticket.send_away``)."""
        self._kept[transfer.key] = transfer.number
        line = transfer.line
        if self.may_run(transfer):
            before = bisect_left(line.ready, transfer.number, key=_BY_NUMBER)
            text = (
                f"downloads from {line.name} run {line.slots} at a time (maxConcurrentFetches of that upstream), and "
                f"{before} others that wait are before it"
            )
        else:
            own = transfer.images[image]
            self._kept[own.key] = own.number
            before = bisect_left(self._queue, own.number, key=_BY_NUMBER)
            text = (
                f"images are pulled {self._limit} at a time (serializeImagePulls, maxParallelImagePulls of this cache), and "
                f"{before} others that wait are before this one"
            )
        message = f"{transfer.key} has to wait for its turn: {text}; its place in the line is kept for {self._patience:g} s"
        return WaitedTooLong(message, headers={"Retry-After": str(_RETRY_AFTER)})

    def close(self, reason: RegistryError) -> None:
        """Drops everything that waits: nothing is to start any more."""
        self._queue.clear()
        for line in self._lines.values():
            line.ready.clear()
        for transfer in list(self._waiting):
            transfer.state = "ended"
            self._stop_waiting(transfer)
            transfer.drop(reason)

    # -- transfers ---------------------------------------------------------------------------------------------------

    def _number(self, key: Hashable) -> int:
        """What says who came first: of its own, or that with which it was sent away."""
        number = next(self._numbers)
        return self._kept.get(key, number)

    def _attach(self, transfer: Transfer, key: Hashable) -> None:
        """An image wants a transfer that it did not want before."""
        image = self._images.get(key)
        if image is None:
            image = self._images[key] = _Image(key, self._number(key))
        if transfer.state == "running":
            image.running[transfer] = None
        else:
            image.waiting[transfer] = None
            if image.has_place:
                self._cover(transfer)
            elif transfer.covers == 0:
                self._need(image, 1)
        transfer.images[key] = image
        self._stop_linger(image)  # something new of it: its time begins anew
        self._look_at(image)

    def _detach(self, transfer: Transfer, image: _Image) -> None:
        """An image wants a transfer no more."""
        others = [each for each in transfer.images.values() if each is not image]
        if transfer.state == "running":
            if image.has_place and not any(each.has_place for each in others):
                return  # what runs without clients still counts for somebody
            image.running.pop(transfer, None)
        else:
            image.waiting.pop(transfer, None)
            if image.has_place:
                self._uncover(transfer, others)
            elif transfer.covers == 0:
                self._need(image, -1)
        del transfer.images[image.key]
        self._look_at(image)

    def _forget(self, transfer: Transfer) -> None:
        """A transfer that waits is not to run any more."""
        transfer.state = "ended"
        self._stop_waiting(transfer)
        if self._limit is None:
            _remove(transfer.line.ready, transfer)

    def _expire(self, transfer: Transfer) -> None:
        """It has waited for as long as anything may."""
        first = next(iter(transfer.clients))
        reason = self.send_away(transfer, first)
        images = list(transfer.images.values())
        if not self.may_run(transfer):
            self._kept.update((image.key, image.number) for image in images)
        for image in images:
            self._detach(transfer, image)
        self._forget(transfer)
        transfer.drop(reason)
        self._advance()

    def _stop_waiting(self, transfer: Transfer) -> None:
        self._waiting.discard(transfer)
        if transfer.deadline is not None:
            transfer.deadline.cancel()

    # -- places ------------------------------------------------------------------------------------------------------

    def _cover(self, transfer: Transfer) -> None:
        """One more of its images holds a place."""
        transfer.covers += 1
        if transfer.covers == 1:
            insort(transfer.line.ready, transfer, key=_BY_NUMBER)
            for image in transfer.images.values():
                if not image.has_place:
                    self._need(image, -1)
        else:
            for image in transfer.images.values():
                self._look_at(image)

    def _uncover(self, transfer: Transfer, others: list[_Image]) -> None:
        """One of its images holds a place no more, or does not want it any more."""
        transfer.covers -= 1
        if transfer.covers == 0:
            _remove(transfer.line.ready, transfer)
            for image in others:
                self._need(image, 1)
        else:
            for image in others:
                self._look_at(image)

    def _need(self, image: _Image, change: int) -> None:
        """An image queues for a place while it needs one."""
        before = image.needs
        image.needs += change
        if before == 0:
            insort(self._queue, image, key=_BY_NUMBER)
        elif image.needs == 0:
            _remove(self._queue, image)

    def _look_at(self, image: _Image) -> None:
        """Begins to take back a place that is not needed, or stops it; forgets an image that wants nothing."""
        if not image.has_place:
            if not image.waiting and not image.running:
                self._images.pop(image.key, None)
        elif image.is_busy:
            self._stop_linger(image)
        elif image.linger is None:
            image.linger = self._call_later(LINGER, lambda: self._give_back(image))

    def _stop_linger(self, image: _Image) -> None:
        if image.linger is not None:
            image.linger.cancel()
            image.linger = None

    def _give_back(self, image: _Image) -> None:
        """Nothing new came of an image that did not need its place."""
        image.linger = None
        image.has_place = False
        self._places -= 1
        for transfer in image.waiting:
            self._uncover(transfer, [each for each in transfer.images.values() if each is not image])
        self._look_at(image)
        self._advance()

    # -- whose turn it is --------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Gives the places and slots that are free to those who have waited longest."""
        while self._limit is not None and self._places < self._limit and self._queue:
            image = self._queue.pop(0)
            image.needs, image.has_place = 0, True
            self._places += 1
            for transfer in image.waiting:
                self._cover(transfer)
            self._look_at(image)  # what it needs its place for is known only now
        for line in self._lines.values():
            while line.running < line.slots and line.ready:
                self._start(line.ready.pop(0))
        self._metrics.waiting.set(len(self._waiting))
        self._metrics.image_places.set(self._places)

    def _start(self, transfer: Transfer) -> None:
        transfer.state = "running"
        transfer.line.running += 1
        self._stop_waiting(transfer)
        for image in transfer.images.values():
            image.waiting.pop(transfer, None)
            image.running[transfer] = None
            self._look_at(image)
        transfer.start()


_Numbered = TypeVar("_Numbered", _Image, Transfer)


def _remove(ordered: list[_Numbered], item: _Numbered) -> None:
    """Takes an item out of a list that is in the order of its numbers."""
    at = bisect_left(ordered, item.number, key=_BY_NUMBER)
    del ordered[ordered.index(item, at)]
