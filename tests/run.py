"""Runs every test, and says last how many were skipped and why: ``python -m tests.run [pytest arguments]``.

Without arguments four parts run side by side: with docker and podman; with other real programs; units, access and pull
policies; and all else. With ``CI`` set, a skip is a failure: there everything that a test needs can be had, but for what
says that it is not.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

_UNITS_AND_POLICIES = [
    "tests/unit",
    *(
        f"tests/blackbox/test_{name}.py"
        for name in (
            "access",
            "access_attacked",
            "access_attacked_again",
            "access_mended",
            "listener_access",
            "secrets",
            "rotation",
            "canaries",
            "admission",
            "backoff",
            "decisions",
            "explain",
            "image_pull_policy",
            "policy_table",
            "warm",
        )
    ),
]
_DOCKER = [f"tests/real/test_{name}.py" for name in ("dockerd", "dockerfile", "podman", "demo")]
PARTS = {
    "docker": _DOCKER,
    "real": ["tests/real", *(f"--ignore={path}" for path in _DOCKER)],
    "policies": _UNITS_AND_POLICIES,
    "rest": ["tests", "--ignore=tests/real", *(f"--ignore={path}" for path in _UNITS_AND_POLICIES)],
}
"""Much of each is waiting for others to fail, so that two processors are enough for four."""

_OPTIONAL = "not to be had here: "
"""How the reason of a skip begins that is no failure: a program that this release of Debian does not have."""

_SUM = re.compile(r"(\d+) passed, (\d+) failed, (\d+) skipped")


class Count:
    """What became of the tests."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed = 0
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one test."""
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skipped.append(f"{report.nodeid}: {reason}")
        elif report.failed:
            self.failed += 1
        elif report.when == "call":
            self.passed += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """One file."""
        if report.failed:
            self.failed += 1


def one(arguments: list[str]) -> int:
    """One run of pytest; the exit code: pytest's, or 1 for a skip in CI."""
    count = Count()
    code = int(pytest.main(["-q", *arguments], plugins=[count]))
    for line in count.skipped:
        print(f"skipped: {line}")
    print(f"{count.passed} passed, {count.failed} failed, {len(count.skipped)} skipped")
    missed = [line for line in count.skipped if _OPTIONAL not in line]
    return code or (1 if missed and os.environ.get("CI") else 0)


class Part(threading.Thread):
    """One run in a process of its own, its lines passed on as they come."""

    def __init__(self, name: str, arguments: list[str]) -> None:
        super().__init__(name=name)
        self.lines: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.run", "-p", "no:cacheprovider", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=Path(__file__).parents[1],
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self.start()

    def run(self) -> None:
        """Passes the lines on."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip())
            print(f"{self.name} | {line}", end="", flush=True)

    @property
    def code(self) -> int:
        """Its exit code, once it has ended."""
        self.join()
        return self._process.wait()


def main() -> int:
    """The exit code."""
    if sys.argv[1:]:
        return one(sys.argv[1:])
    parts = [Part(name, arguments) for name, arguments in PARTS.items()]
    codes = [part.code for part in parts]
    print()
    for part in parts:
        print("\n".join(line for line in part.lines if line.startswith(("FAILED", "ERROR", "skipped: "))))
    found = [match for part in parts for line in part.lines[-1:] if (match := _SUM.fullmatch(line))]
    passed, failed, skipped = (sum(int(match[group]) for match in found) for group in (1, 2, 3))
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return max(codes, key=abs)


if __name__ == "__main__":
    sys.exit(main())
