"""Files that change while we run: what is new is used once, what is bad is said once and changes nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from proxy.metrics import Metrics
from proxy.threads import Threads
from proxy.watch import Faults, Watch, when_changed

HOUR = 3600.0
PATIENCE = 20.0


class Thing:
    """Something that is read again: counts that, and has the faults that it is given."""

    def __init__(self) -> None:
        self.looks = 0
        self.faults: list[str] = []
        self.failure: Exception | None = None
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.seen = asyncio.Event()

    async def reread(self) -> None:
        self.looks += 1
        self.seen.set()
        await self.go_on.wait()
        if self.failure is not None:
            raise self.failure
        if self.faults:
            raise Faults(self.faults)

    async def until(self, looks: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while self.looks < looks:
                self.seen.clear()
                await self.seen.wait()


class BadContent(Exception):
    """What a file holds cannot be used."""


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads(1)
    yield threads
    threads.close()


def unusable(metrics: Metrics, what: str = "thing") -> float | None:
    return metrics.registry.get_sample_value("pullcache_unusable_files", {"what": what})


def said(caplog: pytest.LogCaptureFixture, level: int = logging.ERROR) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelno == level]
    caplog.clear()
    return found


# --- what is said of faults ---


async def test_a_fault_is_said_once_and_shown_as_long_as_it_lasts(
    metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    watch, thing = Watch(HOUR, metrics), Thing()
    watch.add("thing", thing.reread)
    assert unusable(metrics) == 0, "there from the start"
    await watch.look()
    assert (said(caplog), said(caplog, logging.INFO), unusable(metrics), watch.faults) == ([], [], 0, [])

    thing.faults = ["one", "two"]
    await watch.look()
    assert (said(caplog), unusable(metrics), watch.faults) == (["one", "two"], 2, ["one", "two"])
    await watch.look()
    assert (said(caplog), unusable(metrics)) == ([], 2)

    thing.faults = ["two", "three"]
    await watch.look()
    assert (said(caplog), unusable(metrics), watch.faults) == (["three"], 2, ["two", "three"])

    thing.faults = []
    await watch.look()
    assert (said(caplog, logging.INFO), unusable(metrics), watch.faults) == (["thing: all can be used again"], 0, [])
    await watch.look()
    assert said(caplog, logging.INFO) == []

    thing.faults = ["one"]
    await watch.look()
    assert said(caplog) == ["one"], "it is back, and that is news"


@pytest.mark.parametrize("failure", [Faults(["bad"]), RuntimeError("a bug")])
async def test_one_thing_that_fails_does_not_keep_the_others_from_being_read(
    metrics: Metrics, caplog: pytest.LogCaptureFixture, failure: Exception
) -> None:
    watch, bad, good = Watch(HOUR, metrics), Thing(), Thing()
    watch.add("bad", bad.reread)
    watch.add("good", good.reread)
    bad.failure = failure
    await watch.look()
    assert good.looks == 1
    assert len(said(caplog)) == 1
    bad.failure, bad.faults, good.faults = None, ["x"], ["y"]
    await watch.look()
    assert sorted(watch.faults) == ["x", "y"]
    assert (unusable(metrics, "bad"), unusable(metrics, "good")) == (1, 1)


# --- when it looks ---


@asynccontextmanager
async def running(watch: Watch) -> AsyncIterator[None]:
    task = asyncio.create_task(watch.run())
    await asyncio.sleep(0)  # it waits now
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_it_looks_again_and_again(metrics: Metrics) -> None:
    watch, thing = Watch(0.001, metrics), Thing()
    watch.add("thing", thing.reread)
    thing.failure = RuntimeError("a bug")  # which must not end it
    async with running(watch):
        await thing.until(3)


async def test_soon_is_at_once_and_once(metrics: Metrics) -> None:
    watch, thing = Watch(HOUR, metrics), Thing()
    watch.add("thing", thing.reread)
    async with running(watch):
        for _ in range(3):
            watch.soon()
        await thing.until(1)
        for _ in range(20):
            await asyncio.sleep(0)
        assert thing.looks == 1
        watch.soon()
        await thing.until(2)


async def test_soon_while_it_looks_is_not_lost(metrics: Metrics) -> None:
    """What was changed behind its back before the signal came must be seen, and the next look may be an hour away."""
    watch, thing = Watch(HOUR, metrics), Thing()
    watch.add("thing", thing.reread)
    thing.go_on.clear()
    async with running(watch):
        watch.soon()
        await thing.until(1)
        watch.soon()
        thing.go_on.set()
        for _ in range(50):
            await asyncio.sleep(0)
        assert thing.looks == 2


# --- when_changed ---


class Use:
    """Uses what the files hold, or finds it bad."""

    def __init__(self, *paths: Path) -> None:
        self.paths = paths
        self.used: list[bytes] = []
        self.tried = 0

    def __call__(self) -> None:
        self.tried += 1
        content = b" ".join(path.read_bytes() for path in self.paths)
        if b"bad" in content:
            raise BadContent(f"{self.paths[0]}: cannot be used")
        self.used.append(content)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = [tmp_path / "one", tmp_path / "two"]
    for path in found:
        path.write_bytes(b"old")
    return found


async def test_new_content_is_used_once(paths: list[Path], threads: Threads, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    use = Use(*paths)
    reread = when_changed(paths, use, BadContent, threads)
    await reread()
    assert said(caplog, logging.INFO) == [], "the first time is no news"
    await reread()
    for number, path in enumerate(paths):
        path.write_bytes(b"new%d" % number)
        await reread()
        await reread()
    assert use.used == [b"old old", b"new0 old", b"new0 new1"]
    assert said(caplog, logging.INFO) == [f"{paths[0]}, {paths[1]}: the new content is used"] * 2


async def test_a_file_that_is_written_again_with_the_same_content_is_not_new(paths: list[Path], threads: Threads) -> None:
    use = Use(*paths)
    reread = when_changed(paths, use, BadContent, threads)
    await reread()
    paths[0].unlink()
    paths[0].write_bytes(b"old")
    await reread()
    assert use.tried == 1


async def test_what_changed_before_the_first_look_is_used(paths: list[Path], threads: Threads) -> None:
    """What is in use is what was there at the start; the first look may be a whole interval later."""
    use = Use(*paths)
    reread = when_changed(paths, use, BadContent, threads)
    paths[0].write_bytes(b"new")
    await reread()
    assert use.used == [b"new old"]


async def test_a_link_that_is_exchanged_is_followed(tmp_path: Path, threads: Threads) -> None:
    """As Kubernetes exchanges what a mounted Secret holds."""
    for name in ("..1", "..2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "key").write_text(name)
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "key").symlink_to("..data/key")
    use = Use(tmp_path / "key")
    reread = when_changed([tmp_path / "key"], use, BadContent, threads)
    await reread()
    (tmp_path / "..data_tmp").symlink_to("..2")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    await reread()
    assert use.used == [b"..1", b"..2"]


async def test_bad_content_is_a_fault_until_it_is_good(
    paths: list[Path], threads: Threads, caplog: pytest.LogCaptureFixture
) -> None:
    use = Use(*paths)
    reread = when_changed(paths, use, BadContent, threads)
    await reread()
    paths[0].write_bytes(b"bad canary")
    for _ in range(3):
        with pytest.raises(Faults) as raised:
            await reread()
        assert raised.value.lines == (f"{paths[0]}: cannot be used; what it held before is still used",)
        assert raised.value.__cause__ is None
    assert use.used == [b"old old"]
    paths[0].write_bytes(b"good")
    await reread()
    await reread()
    assert use.used == [b"old old", b"good old"]
    assert "canary" not in caplog.text


async def test_content_that_changed_while_it_was_used_and_was_taken_back_is_used_again(
    paths: list[Path], threads: Threads
) -> None:
    """What is in use is then not what was seen before, though the files are as they were."""
    use = Use(*paths)

    def late() -> None:
        if use.tried == 1:
            paths[0].write_bytes(b"another")
        use()

    reread = when_changed(paths, late, BadContent, threads)
    await reread()
    paths[0].write_bytes(b"new")
    await reread()
    paths[0].write_bytes(b"bad")
    with pytest.raises(Faults):
        await reread()
    paths[0].write_bytes(b"new")
    await reread()
    assert use.used == [b"old old", b"another old", b"new old"]


async def test_bad_content_that_is_taken_back_is_no_fault_and_no_news(paths: list[Path], threads: Threads) -> None:
    use = Use(*paths)
    reread = when_changed(paths, use, BadContent, threads)
    await reread()
    paths[0].write_bytes(b"bad")
    with pytest.raises(Faults):
        await reread()
    paths[0].write_bytes(b"old")
    await reread()
    assert use.used == [b"old old"]


async def test_a_file_that_cannot_be_read_is_a_fault_that_names_it(paths: list[Path], threads: Threads) -> None:
    use = Use(*paths)
    reread = when_changed(paths, use, BadContent, threads)
    await reread()
    paths[1].unlink()
    with pytest.raises(Faults) as raised:
        await reread()
    assert raised.value.lines == (
        f"{paths[1]}: cannot be read: No such file or directory; what it held before is still used",
    )
    assert use.tried == 1
    paths[1].write_bytes(b"new")
    await reread()
    assert use.used == [b"old old", b"old new"]


async def test_what_is_not_among_the_faults_is_not_hidden(paths: list[Path], threads: Threads) -> None:
    def use() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        await when_changed(paths, use, BadContent, threads)()
