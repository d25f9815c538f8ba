"""Between one writer and many readers: everybody gets exactly the right bytes, whatever the disk does, in bounded memory."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy import spool as spool_module
from proxy.errors import UpstreamBroken
from proxy.names import Digest, digest_of
from proxy.spool import WINDOW, WITHHELD, Abandoned, Spool, SpoolReader
from proxy.storage.base import FileSpan
from proxy.storage.layout import Layout, SpoolFile

MIB = 1024 * 1024
PATIENCE = 20.0
CONTENT = random.Random(1).randbytes(24 * MIB)


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[Layout]:
    opened = Layout.open(tmp_path / "cache")
    yield opened
    opened.close()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Layout]:
    """A disk of 3 MB."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a tmpfs")
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m,mode=0700", "tmpfs", where], check=False)
    if mounted.returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        opened = Layout.open(where)
        yield opened
        opened.close()
    finally:
        subprocess.run(["umount", "--lazy", where], check=True)


def taken(piece: FileSpan | bytes) -> bytes:
    data = os.pread(piece.descriptor, piece.count, piece.offset) if isinstance(piece, FileSpan) else bytes(piece)
    assert data, "an empty piece would turn for ever"
    return data


async def read(reader: SpoolReader, start: int = 0, stop: int | None = None, pause: int = 0) -> bytes:
    """What a client gets that lets others go on so many times after each piece."""
    body = bytearray()
    try:
        async for piece in reader.read(start, stop):
            body += taken(piece)
            for _ in range(pause):
                await asyncio.sleep(0)
    finally:
        reader.close()
    return bytes(body)


async def write(spool: Spool, content: bytes, piece: int = MIB) -> None:
    """A whole download; memory is looked at after each piece."""
    spool.announce()
    for start in range(0, len(content), piece):
        data = content[start : start + piece]
        await spool.commit(data, spool.absorb(data))
        assert held(spool) <= spool_module.WINDOW + piece
    assert spool.agrees()
    spool.release()
    spool.finish()


def held(spool: Spool) -> int:
    """Bytes in memory."""
    return len(spool._window)


def spool_of(content: bytes, file: SpoolFile | None, size: bool = True) -> Spool:
    spool = Spool(digest_of(content), file)
    spool.size = len(content) if size else None
    return spool


async def within(*awaitables: asyncio.Task[bytes] | asyncio.Task[None]) -> None:
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*awaitables)


# --- a disk that works ---


@pytest.mark.parametrize("size_known", [True, False])
async def test_readers_at_any_offset_get_their_bytes_while_they_come(layout: Layout, size_known: bool) -> None:
    content = CONTENT[: 4 * MIB + 7]
    spool = spool_of(content, layout.spool(), size_known)
    spans = [(0, None), (0, 1), (MIB, 3 * MIB), (len(content) - 1, None), (len(content), None), (5, 5)]
    readers = [asyncio.create_task(read(spool.attach(start), start, stop)) for start, stop in spans]
    await within(*readers, asyncio.create_task(write(spool, content)))
    assert [reader.result() for reader in readers] == [content[start:stop] for start, stop in spans]
    assert held(spool) == 0


async def test_the_end_is_withheld_until_the_digest_agrees(layout: Layout) -> None:
    content = CONTENT[: 2 * MIB]
    spool = spool_of(content, layout.spool())
    reader = asyncio.create_task(read(spool.attach(0)))
    spool.announce()
    await spool.commit(content, spool.absorb(content))
    assert spool.readable() == len(content) - WITHHELD
    spool.fail(UpstreamBroken("the digest does not agree"))
    with pytest.raises(UpstreamBroken, match="does not agree"):
        await reader
    spool.finish()


async def test_the_file_goes_when_the_last_reader_has(layout: Layout, tmp_path: Path) -> None:
    spool = spool_of(b"content", layout.spool())
    first, second = spool.attach(0), spool.attach(0)
    await write(spool, b"content")
    assert await read(first) == b"content"
    assert len(list((tmp_path / "cache" / "ingest").iterdir())) == 1
    assert await read(second) == b"content"
    assert list((tmp_path / "cache" / "ingest").iterdir()) == []


# --- a disk that does not ---


@pytest.mark.parametrize("size_known", [True, False])
@pytest.mark.parametrize("from_the_start", [True, False])
async def test_a_full_disk_is_noticed_by_no_reader(tiny_disk: Layout, from_the_start: bool, size_known: bool) -> None:
    """F11: behind, ahead and slow, in bounded memory. (In the middle: the tmpfs really is full after 3 MB.)"""
    spool = spool_of(CONTENT, None if from_the_start else tiny_disk.spool(), size_known)
    spans = [(0, None), (7 * MIB, 9 * MIB), (20 * MIB, None), (len(CONTENT) - 5, None), (1, 2)]
    readers = [asyncio.create_task(read(spool.attach(start), start, stop)) for start, stop in spans]
    slow = asyncio.create_task(read(spool.attach(0), pause=50))
    await within(*readers, slow, asyncio.create_task(write(spool, CONTENT)))
    assert [reader.result() == CONTENT[start:stop] for reader, (start, stop) in zip(readers, spans, strict=True)] == [
        True
    ] * len(spans)
    assert slow.result() == CONTENT
    assert spool.file is None


async def test_the_writer_waits_for_a_reader_that_stands_still_and_memory_is_bounded() -> None:
    """F11."""
    spool = spool_of(CONTENT, None)
    quick, still = spool.attach(0), spool.attach(0)
    writer = asyncio.create_task(write(spool, CONTENT))
    got = asyncio.create_task(read(quick))
    while held(spool) < WINDOW:
        await asyncio.sleep(0)
    for _ in range(1000):
        await asyncio.sleep(0)
    assert spool.received == held(spool) == WINDOW
    assert not writer.done()
    assert await asyncio.wait_for(read(still), PATIENCE) == CONTENT
    await within(writer, got)
    assert got.result() == CONTENT


@pytest.mark.parametrize("saved", [0, 2 * MIB])
async def test_who_comes_after_the_window_has_moved_on_needs_another_download(layout: Layout, saved: int) -> None:
    """F11: it must never be attached, since the bytes between file and window are nowhere."""
    spool = spool_of(CONTENT, layout.spool())
    reader = spool.attach(0)
    async with asyncio.timeout(PATIENCE):
        for start in range(0, 12 * MIB, MIB):
            data = CONTENT[start : start + MIB]
            await spool.commit(data, start < saved and spool.absorb(data))
            async for piece in reader.read(reader.position, spool.readable()):
                taken(piece)
                if reader.position + len(taken(piece)) >= spool.readable():
                    reader.position = spool.readable()
                    spool.moved()
                    break
    spool._trim()
    late = [start for start in (0, 1, saved, saved + 1, 8 * MIB) if spool.serves(start)]
    assert late == []
    assert spool.serves(12 * MIB)
    reader.close()
    spool.fail(UpstreamBroken("over"))
    spool.finish()


async def test_a_download_that_nobody_reads_and_no_disk_takes_is_abandoned() -> None:
    spool = spool_of(CONTENT, None)
    reader = spool.attach(0)
    await spool.commit(CONTENT[:MIB], False)
    reader.close()
    with pytest.raises(Abandoned):
        await spool.commit(CONTENT[MIB : 2 * MIB], False)


# --- all of it at random ---


class Failing(SpoolFile):
    """A file on a disk that takes so many bytes, the last write in part, and then refuses for ever."""

    def __init__(self, file: SpoolFile, room: int) -> None:
        super().__init__(file._layout, file.name, file.descriptor, file.digest)
        self._room = room

    def write(self, data: bytes, size: int | None = None) -> None:
        part = data[: self._room]
        self._room -= len(part)
        super().write(part, size)
        if len(part) < len(data):
            raise OSError(errno.ENOSPC, "No space left on device")


@dataclass(frozen=True)
class Client:
    """When it comes (pieces received), what it wants, how slow it is, and after how many pieces it leaves, if it does."""

    comes: int
    start: float
    stop: float | None
    pause: int
    leaves: int | None


CLIENTS = st.builds(
    Client,
    st.integers(0, 30),
    st.floats(0, 1),
    st.none() | st.floats(0, 1),
    st.integers(0, 12),
    st.none() | st.integers(0, 5),
)
ROOM = st.none() | st.integers(0, 40_000) | st.just(-1)


async def _client(spool: Spool, content: bytes, client: Client, arrivals: Callable[[], int]) -> bool:
    """Whether it was served; it checks every byte."""
    while arrivals() < client.comes and not spool.released:
        await asyncio.sleep(0)
    start = int(client.start * len(content))
    stop = None if client.stop is None else max(start, int(client.stop * len(content)))
    if not spool.serves(start):
        return False
    reader, at, pieces = spool.attach(start), start, 0
    try:
        async for piece in reader.read(start, stop):
            data = taken(piece)
            assert data == content[at : at + len(data)], f"wrong bytes at {at}"
            at += len(data)
            assert spool.released or spool.size is None or at <= len(content) - spool_module.WITHHELD
            pieces += 1
            if pieces == client.leaves:
                return True
            for _ in range(client.pause):
                await asyncio.sleep(0)
        assert at == (len(content) if stop is None else stop), f"ended at {at}"
        return True
    finally:
        reader.close()


async def _run(spool: Spool, content: bytes, pieces: list[int], clients: list[Client]) -> None:
    count = 0

    async def writer() -> None:
        nonlocal count
        position = 0
        spool.announce()
        try:
            for size in pieces:
                data = content[position : position + size]
                position += size
                saved = spool.absorb(data)
                committing = asyncio.ensure_future(spool.commit(data, saved))
                while not committing.done():
                    await asyncio.sleep(0)
                    assert held(spool) <= spool_module.WINDOW + size
                await committing
                count += 1
            assert spool.agrees()
            spool.release()
        except Abandoned:
            assert not spool._readers
            spool.fail(UpstreamBroken("abandoned"))
        finally:
            count = 1 << 30
            spool.finish()

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        first = group.create_task(_client(spool, content, Client(0, 0.0, None, 0, None), lambda: count))
        await asyncio.sleep(0)
        group.create_task(writer())
        others = [group.create_task(_client(spool, content, client, lambda: count)) for client in clients]
    assert first.result()
    assert all(task.done() for task in others)
    assert spool._file is None


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 3000), min_size=1, max_size=25),
    clients=st.lists(CLIENTS, max_size=6),
    room=ROOM,
    size_known=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_every_reader_gets_exactly_the_right_bytes_in_bounded_memory(
    pieces: list[int], clients: list[Client], room: int | None, size_known: bool, seed: int
) -> None:
    """F11, at random: readers at random offsets that come, go and dawdle, a disk that fails anywhere (-1: at once)."""
    content = random.Random(seed).randbytes(sum(pieces))
    digest: Digest = digest_of(content)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        for name, value in (("WINDOW", 4096), ("_PIECE", 512), ("WITHHELD", 256)):
            patch.setattr(spool_module, name, value)
        layout = Layout.open(Path(folder) / "cache")
        try:
            file = None if room == -1 else layout.spool() if room is None else Failing(layout.spool(), room)
            spool = Spool(digest, file)
            spool.size = len(content) if size_known else None
            asyncio.run(_run(spool, content, pieces, clients))
            assert list((Path(folder) / "cache" / "ingest").iterdir()) == []
        finally:
            layout.close()
