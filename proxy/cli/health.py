"""``pullcache health``: asks a running pullcache how it is, for a container's health check, which has no curl.

It is started every few seconds, so it imports neither the server nor the model of the configuration.
"""

from __future__ import annotations

import re
import socket
import time

import click

SECONDS = 3.0
"""For all of it; below the time limit of the image's HEALTHCHECK, so that the line below is still printed."""

_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]]*)):([0-9]{1,5})", re.ASCII)
_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})[ \r]")
_MOST = 4096


class Unhealthy(Exception):
    """What is wrong."""


def run(admin: str, seconds: float = SECONDS) -> int:
    """The exit code: 0 when it is healthy; else 1, and one line that says why."""
    try:
        status = _ask(*_parse(admin), seconds)
        if status != 200:
            raise Unhealthy(f"/healthz is answered with {status}; is this pullcache's admin address?")
    except Unhealthy as error:
        click.echo(f"not healthy: {admin}: {error}", err=True)
        return 1
    return 0


def _parse(admin: str) -> tuple[str, int]:
    """Host and port; whoever listens on every interface (``:5001``) is asked on loopback."""
    match = _ADDRESS.fullmatch(admin)
    if match is None or not 0 < int(match[3]) < 65536:
        raise Unhealthy("not an address; write for example 127.0.0.1:5001, [::1]:5001 or :5001")
    return match[1] or match[2] or "127.0.0.1", int(match[3])


def _ask(host: str, port: int, seconds: float) -> int:
    """The status of ``/healthz``. Nothing is taken from the environment: no proxy, no netrc."""
    deadline = time.monotonic() + seconds
    name = f"[{host}]" if ":" in host else host
    answer = b""
    status = None
    try:
        with socket.create_connection((host, port), seconds) as connection:
            connection.sendall(f"GET /healthz HTTP/1.1\r\nHost: {name}:{port}\r\nConnection: close\r\n\r\n".encode())
            while status is None and len(answer) < _MOST:
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                data = connection.recv(_MOST)
                if not data:
                    break
                if time.monotonic() > deadline:
                    raise TimeoutError
                answer += data
                status = _STATUS.match(answer)
    except TimeoutError as error:
        raise Unhealthy(f"no answer within {seconds:g} s") from error
    except (OSError, UnicodeError) as error:
        raise Unhealthy(f"cannot be reached: {getattr(error, 'strerror', None) or error}") from error
    if status is None:
        raise Unhealthy("what answers there does not speak HTTP" if answer else "closed the connection without an answer")
    return int(status[1])
