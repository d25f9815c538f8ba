"""``make demo``: what pullcache saves, shown with real programs and real images, on this machine alone.

A docker-registry stands for the Internet, and every byte to and from it passes a line that counts. Before the line stands
pullcache, and before that skopeo, once or twenty times. The images are made of programs that are installed here. All that
is started and written is gone afterwards, however this ends; that is looked for, and said at the end.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from tests.real.line import Line
from tests.real.services import (
    COMMAND_SECONDS,
    DockerRegistry,
    Pullcache,
    ServiceError,
    missing,
    pullcache_config,
    run,
    skopeo_command,
    wait_until,
)

CLIENTS = 20
UPSTREAM = "registry.test"
TAG = "1"
ROOM_BYTES = 2_000_000_000
"""Free disk space without which it is not begun: twenty clients keep an image each."""

# A tag is confirmed by one small request, so the line is never quite silent while the registry is up.
TALK_BYTES = 100_000


class DemoError(RuntimeError):
    """The demonstration cannot be given here, or did not show what it should."""


class Stopped(BaseException):
    """Ctrl-C, or another signal to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


# -- images out of installed packages ------------------------------------------------------------------------------------

INDEX_NAME = "org.opencontainers.image.ref.name"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"

IMAGES = {
    "demo/shell": (("bash", "coreutils"), ("perl-base",), (r"libpython3\.\d+-(minimal|stdlib)", r"python3(\.\d+)?-minimal")),
    "demo/registry": (("bash", "coreutils"), ("docker-registry",), ("skopeo",), ("containerd",)),
}
"""Name -> the packages of each layer; those that are not installed are left out. The first layer must be there."""

_LEFT_OUT = re.compile(r"/usr/share/(doc|doc-base|info|locale|man|lintian|bug|bash-completion)/|/etc/init\.d/|.*\.pyc$")


@dataclass(frozen=True)
class Image:
    """An image in an OCI layout of its own."""

    name: str
    layout: Path
    packages: tuple[str, ...]
    layers: int
    sizes: Mapping[str, int]
    """Digest -> size of manifest, config and layers: all that a client pulls."""

    @property
    def size(self) -> int:
        """The bytes that a pull of it takes."""
        return sum(self.sizes.values())


def make_image(name: str, layers: Sequence[Sequence[str]], layout: Path) -> Image:
    """An image of installed packages, with the libraries that their programs need; it runs."""
    (layout / "blobs" / "sha256").mkdir(parents=True)
    sizes: dict[str, int] = {}

    def keep(data: bytes, kind: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (layout / "blobs" / "sha256" / digest).write_bytes(data)
        sizes[f"sha256:{digest}"] = len(data)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}

    descriptors, diff_ids, used, there = [], [], [], set[str]()
    installed = _installed()
    for wanted in layers:
        packages = [package for package in installed if any(re.fullmatch(pattern, package) for pattern in wanted)]
        if packages:
            files = _files(packages) - there
            # The name goes into each layer, so that no two images share one: each costs its own download.
            tar = _tar(files, {"etc/demo-image": f"{name}: {' '.join(packages)}\n"})
            descriptors.append(keep(gzip.compress(tar, 1, mtime=0), LAYER_TYPE))
            diff_ids.append(f"sha256:{hashlib.sha256(tar).hexdigest()}")
            there |= files
            used += packages
    architecture = _architecture()
    config = {
        "architecture": {"armhf": "arm", "i386": "386", "ppc64el": "ppc64le"}.get(architecture, architecture),
        "os": "linux",
        "config": {"Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["/bin/bash"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }
    manifest: dict[str, object] = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE}
    manifest |= {"config": keep(json.dumps(config).encode(), CONFIG_TYPE), "layers": descriptors}
    top = keep(json.dumps(manifest).encode(), MANIFEST_TYPE)
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (layout / "index.json").write_text(
        json.dumps({"schemaVersion": 2, "manifests": [{**top, "annotations": {INDEX_NAME: TAG}}]})
    )
    return Image(name, layout, tuple(used), len(descriptors), sizes)


def _output(*command: str) -> str:
    return run(command).strip()


def _architecture() -> str:
    return _output("dpkg", "--print-architecture")


def _installed() -> list[str]:
    """The packages of this machine, for its own architecture, by name."""
    shown = "${db:Status-Status} ${Architecture} ${Package}\n"
    rows = (line.split() for line in _output("dpkg-query", "--show", "--showformat", shown).splitlines())
    own = (_architecture(), "all")
    return sorted({row[2] for row in rows if row[0] == "installed" and row[1] in own})


def _files(packages: Iterable[str]) -> set[str]:
    """The files and links of packages, and the libraries of their programs."""
    files: set[str] = set()
    native = _architecture()
    for path in _output("dpkg", "--listfiles", *(f"{package}:{native}" for package in packages)).splitlines():
        if not _LEFT_OUT.match(path) and (os.path.islink(path) or os.path.isfile(path)):
            _take(path, files)
    programs = sorted(path for path in files if not os.path.islink(path) and _is_elf(path))
    # It fails for those that are linked statically, and goes on.
    listed = subprocess.run(["ldd", *programs], check=False, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    for path in set(re.findall(r"(?:=>|^)\s+(/\S+) \(0x", listed.stdout, re.MULTILINE)):
        _take(path, files)
    return files


def _take(path: str, files: set[str]) -> None:
    """A file; a link with what it leads to. Each by the place where it is really (/bin is a link, too)."""
    path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    if path in files or not os.path.isfile(path) or not os.access(path, os.R_OK):
        return
    files.add(path)
    if os.path.islink(path):
        _take(os.path.join(os.path.dirname(path), os.readlink(path)), files)


def _is_elf(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"\x7fELF"


def _tar(files: Iterable[str], texts: Mapping[str, str]) -> bytes:
    """A layer."""

    def of_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        return member

    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for link in ("/bin", "/sbin", "/lib", "/lib64"):
            if os.path.islink(link):
                tar.add(link, filter=of_root)
        for path in sorted(files):
            tar.add(path, recursive=False, filter=of_root)
        for name, text in texts.items():
            member = of_root(tarfile.TarInfo(name))
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return stream.getvalue()


# -- clients -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def clients(host: str, images: Sequence[Image], room: Path) -> Iterator[list[tuple[Path, Image]]]:
    """One skopeo for each of these images, all at once, each on a machine of its own as far as it can see.

    Within, all of them have ended well; afterwards what they pulled is gone.
    """
    started: list[subprocess.Popen[str]] = []
    pulled: list[tuple[Path, Image]] = []
    with tempfile.TemporaryDirectory(dir=room, prefix="clients-", ignore_cleanup_errors=True) as name:
        try:
            for number, image in enumerate(images):
                home = Path(name, str(number))
                home.mkdir()
                pulled.append((home / "image", image))
                source = f"docker://{host}/{UPSTREAM}/{image.name}:{TAG}"
                options = ["--preserve-digests", "--src-tls-verify=false"]
                started.append(
                    subprocess.Popen(
                        skopeo_command("copy", *options, source, f"dir:{home / 'image'}"),
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.PIPE,
                        text=True,
                        env=os.environ | {"TMPDIR": str(home), "XDG_DATA_HOME": str(home)},
                    )
                )
            deadline = time.monotonic() + COMMAND_SECONDS
            for process in started:
                _, complained = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
                if process.returncode:
                    raise DemoError(f"a client failed: {complained.strip()[-1000:]}")
            yield pulled
        finally:
            for process in started:
                with process:
                    process.kill()


def verified(target: Path, image: Image) -> int:
    """The bytes that a client got: the whole image and nothing else, every file of the digest that it has as its name."""
    found = {}
    for path in target.iterdir():
        if path.name != "version":
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if path.name not in (digest, "manifest.json"):
                raise DemoError(f"{image.name}: a client got something else for sha256:{path.name}")
            found[f"sha256:{digest}"] = path.stat().st_size
    if found != image.sizes:
        raise DemoError(f"{image.name}: a client did not get the image that is in the registry")
    return sum(found.values())


# -- the steps -----------------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """What one step took."""

    clients: int = 0
    seconds: float = 0.0
    line: int = 0
    requests: int = 0
    served: int = 0

    @property
    def saved(self) -> int:
        """What the clients would have taken from the registry themselves, and did not."""
        return max(0, self.served - self.line)


_COLUMNS = "  {:<33} {:>7} {:>8} {:>14} {:>9} {:>12} {:>12}"


def heading() -> str:
    """The table's head."""
    names = _COLUMNS.format("step", "clients", "time", "over the line", "requests", "served", "saved")
    return f"{names}\n  {'-' * (len(names) - 2)}"


def row(title: str, figures: Figures) -> str:
    """A line of the table."""
    return _COLUMNS.format(
        title,
        figures.clients,
        f"{figures.seconds:.1f} s",
        size_of(figures.line),
        figures.requests,
        size_of(figures.served),
        size_of(figures.saved),
    )


def size_of(count: int) -> str:
    """Bytes for people."""
    if count < 1000:
        return f"{count} B"
    return f"{count / 1000:.1f} kB" if count < 1_000_000 else f"{count / 1_000_000:,.1f} MB"


def requests_on(line: Line) -> int:
    """The requests that went over the line; it keeps the beginning of each connection, which is all of these."""
    return sum(len(re.findall(rb"^[A-Z]+ /\S* HTTP/1\.1\r$", bytes(sent), re.MULTILINE)) for sent in line.requests)


@dataclass
class Stage:
    """The programs, running."""

    registry: DockerRegistry
    line: Line
    pullcache: Pullcache
    room: Path
    steps: list[Figures] = field(default_factory=list)

    def step(self, title: str, images: Sequence[Image], expected: Callable[[int], bool]) -> None:
        """Pull these images at the same time, and tell what it took."""
        line, requests, begun = self.line.sent + self.line.received, requests_on(self.line), time.monotonic()
        with clients(self.pullcache.host, images, self.room) as pulled:
            figures = Figures(len(images), time.monotonic() - begun)
            figures.line = self.line.sent + self.line.received - line
            figures.requests = requests_on(self.line) - requests
            figures.served = sum(verified(target, image) for target, image in pulled)
        self.steps.append(figures)
        say(row(f"{len(self.steps)}. {title}", figures))
        if not expected(figures.line):
            raise DemoError(f"that is not what should have passed over the line: {figures.line:,} bytes")


@contextlib.contextmanager
def stage(room: Path) -> Iterator[Stage]:
    """Starts the programs, and stops them."""
    with DockerRegistry(room / "upstream") as registry, Line(registry.port, keep=1_000_000) as line:
        config = pullcache_config(room / "cache", UPSTREAM, line.url)
        with Pullcache(config, root=room / "pullcache") as pullcache:
            try:
                yield Stage(registry, line, pullcache, room)
            except (DemoError, ServiceError):
                say(f"\npullcache said last:\n{pullcache.log[-2000:]}")
                raise


def demonstrate(room: Path) -> None:
    """All of it."""
    say("pullcache demo: real programs, real images. Nothing is fetched from the Internet. It takes about 20 seconds.\n")
    images = [make_image(name, layers, room / name) for name, layers in IMAGES.items()]
    with stage(room) as on:
        for image in images:
            on.registry.push(image.layout, f"{image.name}:{TAG}", TAG)
        say(f"  skopeo -> pullcache {on.pullcache.host} -> the line {on.line.host} -> docker-registry {on.registry.host}\n")
        for image in images:
            names = ", ".join(name for name in image.packages if not name.startswith("lib"))
            say(f"  {image.name:<14} {size_of(image.size):>8}, {image.layers} layers: {names} and their libraries")
        say(f"\n{heading()}")
        first, second = images
        on.step(f"cold: {first.name}, one client", [first], costs(first))
        on.step(f"cold: {second.name}, {CLIENTS} at once", [second] * CLIENTS, costs(second))
        on.step(f"warm: {first.name}, {CLIENTS} at once", [first] * CLIENTS, lambda count: count <= TALK_BYTES)
        on.registry.stop()
        on.step("registry stopped: both images", [first, second], lambda count: count == 0)
        on.pullcache.stop()
        summary(on.steps, second)


def costs(image: Image) -> Callable[[int], bool]:
    """Whether so many bytes over the line are one download of the image."""
    return lambda count: image.size <= count <= image.size * 1.01 + TALK_BYTES


def summary(steps: Sequence[Figures], crowd: Image) -> None:
    """The sum, and what it means."""
    total = Figures(*(sum(column) for column in zip(*(vars(step).values() for step in steps), strict=True)))
    say(f"  {'-' * (len(heading().splitlines()[1]) - 2)}")
    say(row("sum", total))
    say(
        "\n  over the line: both directions between pullcache and the registry, headers and all; served: what the clients\n"
        "  hold in the end; saved: what they would have taken from the registry without pullcache.\n"
    )
    say(f"{CLIENTS} clients that came at once to a cold cache cost one download of {size_of(crowd.size)}.")
    say("With the registry stopped, both images were still served, by tag.")
    say(f"{100 * total.saved / total.served:.1f} % of what was served never passed the line.")
    say(f"All {total.clients} pulled images were verified: the manifest and every layer agree with their digests.")


# -- before and after ----------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print it now, also into a pipe."""
    print(text, flush=True)


def obstacle() -> str | None:
    """Why the demonstration cannot be given here, if so."""
    if missing("dpkg", "dpkg-query", "ldd") is not None:
        return "the images are made of installed Debian packages, and there is no dpkg here: this needs Debian or Ubuntu"
    absent = missing("docker-registry", "skopeo")
    if absent is not None:
        return f"{absent}; as root: apt-get install --no-install-recommends docker-registry skopeo"
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < ROOM_BYTES:
        return f"{tempfile.gettempdir()} has {size_of(free)} left and {size_of(ROOM_BYTES)} are needed; set TMPDIR"
    return None


def processes_of(room: Path) -> list[int]:
    """The processes that were started with their temporary files in ``room``, which is all that were started here."""
    mark = os.fsencode(room)
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(folder.name) != os.getpid() and mark in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def clean(room: Path) -> str | None:
    """End what may still run and remove what may still be there; what that was, if anything."""
    left = processes_of(room)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    wait_until(lambda: not processes_of(room), "what was started has ended")
    shutil.rmtree(room)
    if room.exists():
        return f"{room} could not be removed"
    return f"processes {left} had to be ended" if left else None


def main() -> int:
    """The exit code: 0 if everything was shown and nothing is left."""
    reason = obstacle()
    if reason is not None:
        print(f"make demo cannot run here: {reason}", file=sys.stderr)
        return 1
    listen_to_signals(_stop)
    room = Path(tempfile.mkdtemp(prefix="pullcache-demo-"))
    code = 1
    try:
        # For all that is started: temporary files, and where skopeo notes which registry has what, are within the room.
        # Root's skopeo would note that below /var/lib/containers, had it not been told that it is somebody else's.
        os.environ.update(TMPDIR=str(room), XDG_DATA_HOME=str(room), XDG_RUNTIME_DIR=str(room), _CONTAINERS_ROOTLESS_UID="1")
        demonstrate(room)
        code = 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read this has gone
    except (DemoError, ServiceError, OSError, subprocess.SubprocessError) as error:
        print(f"\nthe demo failed: {error}", file=sys.stderr)
    except Stopped as stopped:
        say("\nstopped")
        code = 128 + stopped.number
    finally:
        listen_to_signals(_do_not)
        left = clean(room)
    if left is not None:
        print(f"something was left behind and is gone now: {left}", file=sys.stderr)
        return code or 1
    say("Nothing was left behind: no process, no file.")
    return code


def listen_to_signals(how: Callable[[int, FrameType | None], None]) -> None:
    """What is done when it is told to stop. Not ``SIG_IGN``, which programs that are started would inherit."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, how)


def _stop(number: int, frame: FrameType | None) -> None:
    listen_to_signals(_do_not)  # once is enough: what follows is cleaning up
    raise Stopped(number)


def _do_not(number: int, frame: FrameType | None) -> None:
    """A second Ctrl-C, while the first one is being obeyed."""


if __name__ == "__main__":
    sys.exit(main())
