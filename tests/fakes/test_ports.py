"""No two servers of tests meet on one port."""

from __future__ import annotations

import subprocess
import sys


def test_two_processes_are_given_different_ports() -> None:
    """And each gives one a second time only when it has given all of its own."""
    code = "from tests.fakes.ports import free_port; print(*(free_port() for _ in range(900)), flush=True); input()"
    pipe = subprocess.PIPE
    runs = [subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    given = []
    for run in runs:
        assert run.stdout is not None
        given.append({int(port) for port in run.stdout.readline().split()})
    for run in runs:
        run.communicate("\n", timeout=20)
    assert [len(ports) for ports in given] == [900, 900]
    assert not given[0] & given[1]
