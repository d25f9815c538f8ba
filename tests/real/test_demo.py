"""``make demo``: its figures are what they should be, its images run, and it leaves nothing behind however it ends."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from tests import demo

from .services import REPOSITORY, missing, run, wait_until, which

_missing = missing("docker-registry", "skopeo", "dpkg", "dpkg-query", "ldd")
_no_root = missing("dpkg", "dpkg-query", "ldd", "chroot", root=True)
needs_programs = pytest.mark.skipif(_missing is not None, reason=str(_missing))
needs_root = pytest.mark.skipif(_no_root is not None, reason=str(_no_root))

SECONDS = 180.0
NOTED = Path("/var/lib/containers")
"""Where root's skopeo keeps notes, if it is let."""

_SIZE = r"([\d.,]+ (?:B|kB|MB))"
_ROW = re.compile(rf"^  (\d\. .+?|sum) +(\d+) +([\d.]+) s +{_SIZE} +(\d+) +{_SIZE} +{_SIZE}$", re.MULTILINE)
_IMAGE = re.compile(rf"^  (demo/\w+) +{_SIZE}, (\d) layers: ", re.MULTILINE)
_UNITS = {"B": 1, "kB": 1e3, "MB": 1e6}
ROUNDED = 100_000
"""Figures in the table are rounded; and a line carries more than content."""


def in_bytes(text: str) -> float:
    number, _, unit = text.partition(" ")
    return float(number.replace(",", "")) * _UNITS[unit]


def command(notes: Path) -> list[str]:
    """The demonstration; for root without any network but loopback, and with an empty folder in the place of ``NOTED``."""
    demonstration = [sys.executable, "-m", "tests.demo"]
    if missing("unshare", "ip", "mount", root=True) is not None:
        return demonstration
    script = 'ip link set lo up && if [ -d "$2" ]; then mount --bind "$1" "$2"; fi && shift 2 && exec "$@"'
    unshare = [which("unshare") or "unshare", "--net", "--mount"]
    return [*unshare, "sh", "-c", script, "sh", str(notes), str(NOTED), *demonstration]


@pytest.fixture
def notes(room: Path) -> Path:
    """What stands in the place of ``NOTED``."""
    folder = room / "notes"
    folder.mkdir()
    return folder


@pytest.fixture
def temporary(room: Path) -> Path:
    """The TMPDIR of the demonstration."""
    folder = room / "temporary"
    folder.mkdir()
    return folder


def start(notes: Path, temporary: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(notes),
        cwd=REPOSITORY,
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def running(temporary: Path) -> list[int]:
    """The processes that were started by it, the demonstration among them."""
    return demo.processes_of(temporary)


def assert_nothing_left(notes: Path, temporary: Path) -> None:
    """No file and no process."""
    assert list(temporary.iterdir()) == []
    assert list(notes.iterdir()) == []
    assert running(temporary) == []


@needs_programs
def test_what_it_shows(notes: Path, temporary: Path) -> None:
    """Twenty cold clients cost one image, warm ones next to nothing, and a stopped registry nothing; without a network."""
    with start(notes, temporary) as process:
        said, complained = process.communicate(timeout=SECONDS)
    assert (process.returncode, complained) == (0, ""), said + complained
    assert said.splitlines()[-1] == "Nothing was left behind: no process, no file."
    assert_nothing_left(notes, temporary)

    (shell, shell_size), (registry, registry_size) = [(name, in_bytes(size)) for name, size, _ in _IMAGE.findall(said)]
    assert (shell, registry) == ("demo/shell", "demo/registry")
    assert min(shell_size, registry_size) > 5_000_000
    names, clients, line, served, saved = zip(*parsed(said), strict=True)
    assert [name.partition(" ")[0] for name in names] == ["1.", "2.", "3.", "4.", "sum"]
    assert clients == (1, 20, 20, 2, 43)
    for carried, expected in zip(line, (shell_size, registry_size, 0, 0, shell_size + registry_size), strict=True):
        assert carried == pytest.approx(expected, abs=3 * ROUNDED, rel=0.01)
    assert line[3] == 0
    wanted = (shell_size, 20 * registry_size, 20 * shell_size, shell_size + registry_size)
    assert served[:4] == pytest.approx(wanted, rel=0.01)
    for figures in (line, served, saved):
        assert figures[4] == pytest.approx(sum(figures[:4]), abs=5 * ROUNDED)
    for got, carried, spared in zip(served, line, saved, strict=True):
        assert spared == pytest.approx(got - carried, abs=2 * ROUNDED)


def parsed(said: str) -> list[tuple[str, int, float, float, float]]:
    """The rows of the table: step, clients, and the three sizes."""
    found = _ROW.findall(said)
    assert len(found) == 5, said
    return [
        (title, int(clients), in_bytes(line), in_bytes(served), in_bytes(saved))
        for title, clients, _, line, _, served, saved in found
    ]


def wait_for_the_crowd(process: subprocess.Popen[str]) -> str:
    """Read what it says until its first step has been shown: then twenty clients are pulling, or soon will be."""
    assert process.stdout is not None
    said = ""
    while not re.search(r"^  1\. ", said, re.MULTILINE):
        line = process.stdout.readline()
        assert line, f"it ended early: {said}{process.stderr.read() if process.stderr else ''}"
        said += line
    return said


@needs_programs
@pytest.mark.parametrize(("number", "tell"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)])
def test_it_can_be_stopped(
    notes: Path, temporary: Path, number: signal.Signals, tell: Callable[[int, signal.Signals], None]
) -> None:
    """In the middle of twenty pulls; by Ctrl-C, which reaches the clients too, or alone; twice, as the impatient do it."""
    with start(notes, temporary) as process:
        wait_for_the_crowd(process)
        wait_until(lambda: len(running(temporary)) > 10, "the crowd is there")
        tell(process.pid, number)
        tell(process.pid, number)
        said, complained = process.communicate(timeout=SECONDS)
    assert (process.returncode, complained) == (128 + number, ""), said + complained
    assert said.splitlines()[-1] == "Nothing was left behind: no process, no file."
    assert_nothing_left(notes, temporary)


@needs_programs
def test_a_failure_is_a_failure(notes: Path, temporary: Path) -> None:
    """The registry is killed in the middle: 1, the reason, and nothing is left."""
    with start(notes, temporary) as process:
        wait_for_the_crowd(process)
        for pid in running(temporary):
            if Path(f"/proc/{pid}/comm").read_text().strip() == "docker-registry":
                os.kill(pid, signal.SIGKILL)
        said, complained = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, said + complained
    assert "the demo failed: a client failed" in complained
    assert "pullcache said last" in said
    assert said.splitlines()[-1] == "Nothing was left behind: no process, no file."
    assert_nothing_left(notes, temporary)


@pytest.mark.parametrize(
    ("programs", "reason"), [((), "this needs Debian"), (("dpkg", "dpkg-query", "ldd"), "docker-registry")]
)
def test_where_it_cannot_run_it_says_why(room: Path, programs: Sequence[str], reason: str) -> None:
    """One line, and 1."""
    for program in programs:
        (room / program).write_text("")
        (room / program).chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "tests.demo"],
        cwd=REPOSITORY,
        env={"PATH": str(room)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("make demo cannot run here: ")
    assert reason in line


@needs_root
@pytest.mark.parametrize("name", demo.IMAGES)
def test_its_images_run(room: Path, name: str) -> None:
    """Every program that an image is named after starts in it, with the libraries of the image only."""
    image = demo.make_image(name, demo.IMAGES[name], room / "layout")
    root = room / "root"
    for blob in sorted((room / "layout" / "blobs" / "sha256").iterdir()):
        if tarfile.is_tarfile(blob):
            with tarfile.open(blob) as layer:
                layer.extractall(root, filter="tar")
    run(["chroot", root, "/bin/bash", "-c", "ls / && cat /etc/demo-image"])
    for package in image.packages:
        if (root / "usr" / "bin" / package).exists():
            run(["chroot", root, f"/usr/bin/{package}", "--version"])
    (tried,) = {"demo/shell": ["perl"], "demo/registry": ["docker-registry"]}[name]
    assert run(["chroot", root, f"/usr/bin/{tried}", "--version"])


def test_a_wrong_image_is_noticed(tmp_path: Path) -> None:
    """One byte changed, one file missing, one too many: whoever pulled that is not counted as served."""
    contents = (b"a manifest", b"a layer", b"another")
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    sizes = {f"sha256:{digest}": len(content) for digest, content in zip(digests, contents, strict=True)}
    image = demo.Image("demo/x", tmp_path, (), 2, sizes)
    files = dict(zip(("manifest.json", *digests[1:]), contents, strict=True))
    assert demo.verified(pulled(tmp_path / "good", files | {"version": b"1"}), image) == sum(sizes.values())
    for number, wrong in enumerate(
        [
            files | {digests[1]: b"a layeR"},
            files | {"manifest.json": b"A manifest"},
            {name: content for name, content in files.items() if name != digests[2]},
            files | {hashlib.sha256(b"more").hexdigest(): b"more"},
        ]
    ):
        with pytest.raises(demo.DemoError):
            demo.verified(pulled(tmp_path / str(number), wrong), image)


def pulled(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
