"""``pullcache health``: what it says of each way not to be healthy, within its time, and what it does not import."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from proxy.cli import main
from proxy.cli.health import run
from tests.conftest import RunningCache
from tests.fakes.ports import free_port

ROOT = Path(__file__).parents[2]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n"


def invoke(admin: str) -> Result:
    return CliRunner().invoke(main, ["health", "--admin", admin])


@contextmanager
def server(answer: Callable[[socket.socket], None], host: str = "127.0.0.1") -> Iterator[str]:
    """Takes one connection, reads its request, and answers; its address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:

        def serve() -> None:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # nobody came
            with connection:
                connection.settimeout(10)
                asked = b""
                while b"\r\n\r\n" not in asked:
                    asked += connection.recv(4096)
                requests.append(asked)
                answer(connection)

        requests: list[bytes] = []
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        try:
            yield f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            assert all(request.startswith(b"GET /healthz HTTP/1.1\r\n") for request in requests), requests


def test_a_running_cache_is_healthy(tmp_path: Path) -> None:
    """The real thing, as a process of its own, by a process of its own; and not any more when it has stopped."""
    admin_port, port = free_port(), free_port()
    admin = f"127.0.0.1:{admin_port}"
    command = [sys.executable, "-m", "proxy", "serve", "--admin", admin, "--listen", f"127.0.0.1:{port}"]
    with subprocess.Popen(
        [*command, "--cache-directory", str(tmp_path / "cache")], cwd=ROOT, stdout=subprocess.PIPE
    ) as cache:
        try:
            assert cache.stdout is not None
            assert cache.stdout.readline().startswith(b"pullcache serves")
            healthy = health("--admin", admin)
        finally:
            cache.terminate()
    assert (healthy.returncode, healthy.stdout, healthy.stderr) == (0, "", "")
    stopped = health("--admin", admin)
    assert (stopped.returncode, stopped.stdout) == (1, "")
    assert stopped.stderr == f"not healthy: {admin}: cannot be reached: Connection refused\n"


def health(*arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-m", "proxy", "health", *arguments]
    # A proxy of the environment is not for this question.
    environment = os.environ | {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


async def test_it_asks_what_the_admin_address_answers(cache: RunningCache) -> None:
    """The port that serves images is not the admin address, and is told apart."""
    assert (await asyncio.to_thread(invoke, f"127.0.0.1:{cache.admin_port}")).exit_code == 0
    wrong = await asyncio.to_thread(invoke, f"127.0.0.1:{cache.port}")
    assert wrong.exit_code == 1
    assert wrong.stderr.startswith(f"not healthy: 127.0.0.1:{cache.port}: /healthz is answered with 404;")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_the_forms_of_an_address(host: str) -> None:
    """IPv4, IPv6 in brackets, a name."""
    if ":" in host and not has_ipv6():
        pytest.skip("no IPv6 on loopback")
    with server(lambda connection: connection.sendall(OK), "127.0.0.1" if host == "localhost" else host) as admin:
        result = invoke(admin.replace("127.0.0.1", "localhost") if host == "localhost" else admin)
    assert (result.exit_code, result.output) == (0, "")


def test_every_interface_is_asked_on_loopback() -> None:
    """``:5001``, as ``admin`` may be written in the configuration."""
    with server(lambda connection: connection.sendall(OK)) as admin:
        assert invoke(f":{admin.rpartition(':')[2]}").exit_code == 0


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "answered with 503"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", "does not speak HTTP"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "does not speak HTTP"),
        (b"\x15\x03\x01\x00\x02\x02\x16", "does not speak HTTP"),
        (b"x" * 100_000, "does not speak HTTP"),
        (b"", "closed the connection without an answer"),
    ],
)
def test_a_wrong_answer_is_named(answer: bytes, reason: str) -> None:
    """Whatever listens there: one line with the address and what is wrong, and 1."""

    def send(connection: socket.socket) -> None:
        try:
            connection.sendall(answer)
        except OSError:
            return  # it had seen enough

    with server(send) as admin:
        result = invoke(admin)
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"not healthy: {admin}: ")
    assert reason in line


@pytest.mark.parametrize("trickles", [False, True])
def test_it_does_not_wait_without_a_bound(trickles: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """The time limit is for all of the answer: a server that is silent, or sends a byte now and then, is not healthy."""
    given_up = threading.Event()

    def answer(connection: socket.socket) -> None:
        try:
            while not given_up.wait(0.02):
                connection.sendall(b"H" if trickles else b"")
        except OSError:
            return

    with server(answer) as admin:
        try:
            assert run(admin, 0.2) == 1
        finally:
            given_up.set()
    assert capsys.readouterr().err == f"not healthy: {admin}: no answer within 0.2 s\n"


@pytest.mark.parametrize(
    "admin", ["", "127.0.0.1", "127.0.0.1:", ":0", ":65536", "::1:5001", "[::1]", "http://a:1", "a b:1", "[x]:1"]
)
def test_what_is_no_address_is_said(admin: str) -> None:
    """1 like every other failure: Docker keeps 2 for itself."""
    result = invoke(admin)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"not healthy: {admin}: not an address; write for example 127.0.0.1:5001")
    assert len(result.stderr.splitlines()) == 1


def test_a_name_that_is_none_is_said() -> None:
    """A name that no resolver has to be asked about."""
    result = invoke(f"{'a' * 64}.test:5001")
    assert result.exit_code == 1
    assert "cannot be reached" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_by_default_it_asks_where_the_image_has_its_admin_address() -> None:
    """127.0.0.1:5001, which ``serve`` has as its default, too."""
    from proxy.config.file import validate

    result = CliRunner().invoke(main, ["health", "--help"])
    assert f"[default: {validate({}).admin}]" in result.stdout


def test_it_is_quick_because_it_imports_little() -> None:
    """Neither aiohttp nor pydantic, nor asyncio: a health check runs every few seconds on each node."""
    result = health("--admin", ":1", options=("-X", "importtime"))
    assert result.returncode == 1
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "proxy.cli.health" in imported
    assert not imported & {"aiohttp", "asyncio", "pydantic", "yaml", "ssl", "proxy.config.model", "proxy.serve"}
