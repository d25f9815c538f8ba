"""Programs that answer on their standard output: fed, bounded in time and size, and gone with all they began.

Nothing that a program writes is in any text from here, since it may hold secrets.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Mapping, Sequence
from contextlib import suppress


class ProgramFailed(Exception):
    """A program gave no usable answer. The text names it and says what it did, never what it wrote."""


class ProgramRefused(ProgramFailed):
    """It ended with an exit code other than 0 and wrote the one text that its protocol has for "no"."""


async def run(
    argv: Sequence[str],
    *,
    stdin: bytes,
    within: float,
    environment: Mapping[str, str] | None = None,
    limit: int = 64 * 1024,
    refusal: bytes | None = None,
) -> bytes:
    """What the program ``argv`` writes, at most ``limit`` bytes and ``within`` seconds; raises ``ProgramFailed``.

    ``environment`` is the whole of it; None is our own. It need not read ``stdin``; what it writes to its standard error
    is dropped. It runs in a session of its own, which is killed when it ends, or when it may not go on: with its time, its
    bytes or the caller gone. Whoever left that session and still holds the output counts as it not having ended.
    ``refusal`` is the text, spaces around it apart, by which a failure is a ``ProgramRefused``.
    """
    program = _Program(limit)
    try:
        async with asyncio.timeout(within):
            await asyncio.get_running_loop().subprocess_exec(
                lambda: program, *argv, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment, start_new_session=True
            )
            program.feed(stdin)
            await program.closed.wait()
    except TimeoutError:
        failure = f"no answer within {within:g} s"
    except FileNotFoundError:
        failure = "not found, or its interpreter is not"
    except OSError as error:
        failure = f"cannot be started: {error.strerror}"
    except ValueError:  # which may hold them
        failure = "cannot be started: its arguments or environment are not valid"
    else:
        failure = program.failure()
    finally:
        await program.end()
    if failure:
        refused = program.code > 0 and refusal is not None and program.output.strip() == refusal
        raise (ProgramRefused if refused else ProgramFailed)(f"{argv[0]}: {failure}")
    return bytes(program.output)


def parse_object(program: str, answer: bytes) -> dict[str, object]:
    """The JSON object that ``program`` answered with, all texts in it fit to be sent; raises ``ProgramFailed``."""
    try:
        document = json.loads(answer)
        json.dumps(document, ensure_ascii=False).encode()  # fails on half a surrogate pair
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise ProgramFailed(f"{program}: its answer is not a JSON object")
    return document


class _Program(asyncio.SubprocessProtocol):
    def __init__(self, limit: int) -> None:
        self.output = bytearray()
        self.code = 0
        """As it exited, or the signal that ended it, negative."""
        self.closed = asyncio.Event()
        self._exited = asyncio.Event()
        self._limit = limit
        self._begun = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.SubprocessTransport)
        self._transport = transport
        self._begun = True

    def feed(self, data: bytes) -> None:
        stdin = self._transport.get_pipe_transport(0)
        assert isinstance(stdin, asyncio.WriteTransport)
        stdin.write(data)
        stdin.close()  # once it is written

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.output += data
        if len(self.output) > self._limit:
            self._kill()
            self._close_output()

    def process_exited(self) -> None:
        self._kill()  # those it left in its session would hold its output open
        self.code = self._transport.get_returncode() or 0
        self._exited.set()

    def failure(self) -> str:
        """What went wrong, now that it has ended; empty if nothing did."""
        if len(self.output) > self._limit:
            return f"more than {self._limit} bytes"
        return f"died by signal {-self.code}" if self.code < 0 else f"exit code {self.code}" if self.code else ""

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()

    async def end(self) -> None:
        """Leaves nothing behind: neither processes nor pipes."""
        if not self._begun:
            return
        if not self._exited.is_set():
            self._kill()
            await self._exited.wait()
        stdin = self._transport.get_pipe_transport(0)
        assert isinstance(stdin, asyncio.WriteTransport)
        if stdin.get_write_buffer_size():
            stdin.abort()  # close() would wait until it is read
        self._transport.close()
        await self.closed.wait()

    def _close_output(self) -> None:
        if (stdout := self._transport.get_pipe_transport(1)) is not None:
            stdout.close()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._transport.get_pid(), signal.SIGKILL)
