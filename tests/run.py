"""Runs every test, and says last how many were skipped and why: ``python -m tests.run [pytest arguments]``.

With ``CI`` set, a skip is a failure: there everything that a test needs can be had, but for what says that it is not.
"""

from __future__ import annotations

import os
import sys

import pytest

_OPTIONAL = "not to be had here: "
"""How the reason of a skip begins that is no failure: a program that this release of Debian does not have."""


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


def main() -> int:
    """The exit code: pytest's, or 1 for a skip in CI."""
    count = Count()
    code = int(pytest.main(["-q", *sys.argv[1:]], plugins=[count]))
    for line in count.skipped:
        print(f"skipped: {line}")
    print(f"{count.passed} passed, {count.failed} failed, {len(count.skipped)} skipped")
    missed = [line for line in count.skipped if _OPTIONAL not in line]
    return code or (1 if missed and os.environ.get("CI") else 0)


if __name__ == "__main__":
    sys.exit(main())
