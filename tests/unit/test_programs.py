"""Programs are fed and bounded, leave nothing behind, and nothing that they write gets into a text."""

from __future__ import annotations

import asyncio
import os
import time
import traceback
from contextlib import suppress
from pathlib import Path

import pytest

from proxy.credentials.programs import ProgramFailed, ProgramRefused, parse_object, run

SECRET = "s3cr3t-canary"
LONG = 60.0
"""More than any program here needs: seconds."""


def script(directory: Path, body: str, name: str = "program") -> str:
    """A shell script with ``body``; its path."""
    path = directory / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def is_there(pid: int) -> bool:
    """Whether there is such a process, be it a zombie."""
    return Path(f"/proc/{pid}").exists()


def is_running(pid: int) -> bool:
    """Whether there is such a process and it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes_of(program: str) -> list[int]:
    """Those that have ``program`` in their command line: it, and what it forked."""
    found = []
    for number in filter(str.isdigit, os.listdir("/proc")):
        with suppress(FileNotFoundError, ProcessLookupError):
            if program.encode() in Path(f"/proc/{number}/cmdline").read_bytes():
                found.append(int(number))
    return found


async def until_gone(*pids: int) -> None:
    """Returns once they have ended; a signal takes its time."""
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still running: {[pid for pid in pids if is_running(pid)]}"
        await asyncio.sleep(0.01)


def lines_of(path: Path) -> list[str]:
    """What a script has written so far, its last line only if it is whole."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


async def pids_in(path: Path, count: int) -> list[int]:
    """The process ids that a script wrote into a file, once they are all there."""
    deadline = time.monotonic() + 20
    while len(lines_of(path)) < count:
        assert time.monotonic() < deadline, "the script has not begun"
        await asyncio.sleep(0.01)
    return [int(line) for line in lines_of(path)]


def open_pipes() -> int:
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return sum(os.path.islink(link) and os.readlink(link).startswith("pipe:") for link in links)


def text_of(failure: BaseException) -> str:
    """All that a log could show of it."""
    return "".join(traceback.format_exception(failure)) + repr(failure) + repr(failure.args)


async def test_its_output_is_the_answer(tmp_path: Path) -> None:
    program = script(tmp_path, 'read line; echo "$1 $2 $line $ONE"')
    answer = await run([program, "a b", "*"], stdin=b"in\n", within=LONG, environment={"ONE": "1", "PATH": "/bin"})
    assert answer == b"a b * in 1\n"


async def test_its_environment_is_ours_or_the_one_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "here")
    program = script(tmp_path, 'echo "$OURS"')
    assert await run([program], stdin=b"", within=LONG) == b"here\n"
    assert await run([program], stdin=b"", within=LONG, environment={}) == b"\n"


async def test_it_is_found_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path, "echo yes", "found-by-name")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert await run(["found-by-name"], stdin=b"", within=LONG) == b"yes\n"


@pytest.mark.parametrize("body", ["exec echo yes", "exec 0<&-; echo yes", "head -c 1 >/dev/null; echo yes"])
async def test_it_need_not_read_what_it_is_given(tmp_path: Path, body: str) -> None:
    assert await run([script(tmp_path, body)], stdin=b"x" * 1_000_000, within=LONG) == b"yes\n"


async def test_a_large_input_and_output_pass_at_once(tmp_path: Path) -> None:
    data = os.urandom(1_000_000)
    assert await run([script(tmp_path, "cat")], stdin=data, within=LONG, limit=1_000_000) == data


async def test_its_standard_error_is_dropped_however_much(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = script(tmp_path, f"head -c 1000000 /dev/zero >&2; echo {SECRET} >&2; echo yes")
    assert await run([program], stdin=b"", within=LONG) == b"yes\n"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("exit 1", "exit code 1"),
        ("exit 255", "exit code 255"),
        ("kill -9 $$", "died by signal 9"),
        ("exec head -c 101 /dev/zero", "more than 100 bytes"),
        ("while :; do echo yes; done", "more than 100 bytes"),
        ("head -c 101 /dev/zero; exit 1", "more than 100 bytes"),
        ("trap '' PIPE; while :; do echo yes; done 2>/dev/null", "more than 100 bytes"),
        ("setsid sh -c 'while :; do echo yes; done' & wait", "more than 100 bytes"),
    ],
)
async def test_what_it_did_is_told(tmp_path: Path, body: str, text: str) -> None:
    program = script(tmp_path, body)
    with pytest.raises(ProgramFailed) as caught:
        await run([program, SECRET], stdin=SECRET.encode(), within=LONG, limit=100)
    assert str(caught.value) == f"{program}: {text}"


async def test_a_hundred_bytes_are_not_more_than_a_hundred(tmp_path: Path) -> None:
    assert len(await run([script(tmp_path, "head -c 100 /dev/zero")], stdin=b"", within=LONG, limit=100)) == 100


async def test_a_program_that_cannot_be_started_is_named(tmp_path: Path) -> None:
    no_interpreter, not_executable = tmp_path / "no-interpreter", tmp_path / "not-executable"
    no_interpreter.write_text("#!/no/such/interpreter\n")
    no_interpreter.chmod(0o755)
    not_executable.write_text("")
    for program, text in (
        (str(tmp_path / "missing"), "not found, or its interpreter is not"),
        (str(no_interpreter), "not found, or its interpreter is not"),
        (str(not_executable), "cannot be started: Permission denied"),
        (str(tmp_path), "cannot be started: Permission denied"),
    ):
        with pytest.raises(ProgramFailed) as caught:
            await run([program], stdin=b"", within=LONG)
        assert str(caught.value) == f"{program}: {text}"


@pytest.mark.parametrize("value", [f"{SECRET}\0", f"{SECRET}\ud800"])
async def test_values_that_no_program_can_be_given_are_not_quoted(tmp_path: Path, value: str) -> None:
    program = script(tmp_path, "")
    for argv, environment in ([program, value], {}), ([program], {"NAME": value}):
        with pytest.raises(ProgramFailed, match="are not valid") as caught:
            await run(argv, stdin=b"", within=LONG, environment=environment)
        assert SECRET not in text_of(caught.value)
        assert caught.value.__context__ is None, "it would hold the value"


async def test_a_program_that_hangs_ends_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    program = script(tmp_path, f"sleep 1000 & echo $! >{pids}; echo $$ >>{pids}; echo {SECRET}; wait")
    with pytest.raises(ProgramFailed, match=r": no answer within 2 s$") as caught:
        await run([program], stdin=b"", within=2)
    child, parent = await pids_in(pids, 2)
    assert not is_there(parent), "it was waited for"
    await until_gone(child)
    assert SECRET not in text_of(caught.value)


async def test_a_program_that_ignores_signals_ends_too(tmp_path: Path) -> None:
    program = script(tmp_path, "trap '' TERM INT HUP; while :; do sleep 1000; done")
    with pytest.raises(ProgramFailed, match="no answer"):
        await run([program], stdin=b"", within=0.2)


async def test_a_flood_ends_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    program = script(tmp_path, f"sleep 1000 & echo $! >{pids}; echo $$ >>{pids}; while :; do echo {SECRET}; done")
    with pytest.raises(ProgramFailed, match="more than 65536 bytes") as caught:
        await run([program], stdin=b"", within=LONG)
    await until_gone(*await pids_in(pids, 2))
    assert SECRET not in text_of(caught.value)


async def test_whom_it_left_behind_ends_with_it(tmp_path: Path) -> None:
    """A child that still holds the output does not keep the answer."""
    pids = tmp_path / "pids"
    program = script(tmp_path, f"sleep 1000 & echo $! >{pids}; echo yes")
    assert await run([program], stdin=b"", within=LONG) == b"yes\n"
    await until_gone(*await pids_in(pids, 1))


async def test_who_left_the_session_with_the_output_does_not_keep_the_call(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    leaves = f"exec 3<&0; setsid sh -c 'echo $$ >{pids}; exec sleep 1000' <&3 &"
    program = script(tmp_path, f"{leaves} while [ ! -s {pids} ]; do sleep 0.01; done; echo yes")
    try:
        with pytest.raises(ProgramFailed, match="no answer"):
            await run([program], stdin=b"x" * 1_000_000, within=2)
    finally:
        for pid in await pids_in(pids, 1):
            os.kill(pid, 9)


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 4, 5, 10, 100])
async def test_a_caller_who_leaves_ends_it(tmp_path: Path, turns: int) -> None:
    """At whatever point: while it is being started too."""
    begun = tmp_path / "begun"
    program = script(tmp_path, f"(sleep 1000; :) & echo $! >{begun}; wait")
    call = asyncio.ensure_future(run([program], stdin=b"", within=LONG))
    for _ in range(turns):
        await asyncio.sleep(0)
    if turns == 100:
        await pids_in(begun, 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until_gone(*processes_of(program))


async def test_a_caller_who_leaves_while_it_is_being_started_ends_its_children(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    program = script(tmp_path, f"(sleep 1000; :) & echo $! >{begun}; wait")
    call = asyncio.ensure_future(run([program], stdin=b"", within=LONG))
    while not processes_of(program):
        await asyncio.sleep(0)
    while not lines_of(begun):
        time.sleep(0.01)  # noqa: ASYNC251 - the loop shall not get on with the start
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until_gone(*processes_of(program))


async def test_no_pipe_stays_open(tmp_path: Path) -> None:
    before = open_pipes()
    for body, within in (("echo yes", LONG), ("exit 1", LONG), ("sleep 1000", 0.1), ("yes", LONG)):
        try:
            await run([script(tmp_path, body)], stdin=b"x" * 1_000_000, within=within)
        except ProgramFailed:
            assert body != "echo yes"
    assert open_pipes() == before


async def test_a_refusal_is_told_apart_by_its_one_text(tmp_path: Path) -> None:
    refuses = script(tmp_path, "echo 'not here'; exit 3")
    with pytest.raises(ProgramRefused, match=r"exit code 3$"):
        await run([refuses], stdin=b"", within=LONG, refusal=b"not here")
    for body in ("echo 'not here, but'; exit 3", "echo 'not here' >&2; exit 3", "echo 'not here'; kill -9 $$"):
        with pytest.raises(ProgramFailed) as caught:
            await run([script(tmp_path, body)], stdin=b"", within=LONG, refusal=b"not here")
        assert type(caught.value) is ProgramFailed
    assert await run([script(tmp_path, "echo 'not here'")], stdin=b"", within=LONG, refusal=b"not here") == b"not here\n"


async def test_many_at_once(tmp_path: Path) -> None:
    program = script(tmp_path, "cat")
    answers = await asyncio.gather(*(run([program], stdin=b"%d" % number, within=LONG) for number in range(50)))
    assert answers == [b"%d" % number for number in range(50)]


@pytest.mark.parametrize(
    "answer",
    [
        *(b"", b"no", b"[]", b"null", b'"a"', b"7", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b'{"a": "s3cr3t-canary"'),
        *(b'{"a": "s3cr3t-canary\\ud800"}', b'{"a\\udfff": 1}', b'{"a": 1} {}'),
    ],
)
def test_only_an_object_is_an_answer(answer: bytes) -> None:
    with pytest.raises(ProgramFailed) as caught:
        parse_object("helper", answer)
    assert str(caught.value) == "helper: its answer is not a JSON object"
    assert SECRET not in text_of(caught.value)
    assert caught.value.__context__ is None


def test_an_object_is_read() -> None:
    assert parse_object("helper", '{"a": "ä\\ud83d\\ude00", "b": null}'.encode()) == {"a": "ä😀", "b": None}
