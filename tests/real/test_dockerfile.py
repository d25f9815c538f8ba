"""The Dockerfile: built on a base image made of Debian packages, looked into, and run by runc as a cluster would run it.

Run means: as user 65532 without a capability, on a read-only root file system, with the volume as the one place to write
to, and without any shell in the image.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import pytest

from proxy.cli.health import SECONDS as HEALTH_SECONDS

from . import debian_base
from .containers import Containers
from .image import RealImage
from .pulls import IMAGE_CACHE, UPSTREAM, assert_layout, once, reference
from .services import (
    REPOSITORY,
    DockerRegistry,
    Service,
    ServiceError,
    missing,
    pullcache_config,
    run,
    skopeo_pull,
    which,
)

_missing = missing("mmdebstrap", "apt-config", "buildah", "runc", "unshare", root=True)
_no_skopeo = missing("docker-registry", "skopeo")
pytestmark = pytest.mark.skipif(_missing is not None, reason=str(_missing))
needs_skopeo = pytest.mark.skipif(_no_skopeo is not None, reason=str(_no_skopeo))

BASE_CACHE = IMAGE_CACHE.parent / "debian-base"
BUILD_SECONDS = 900.0
IMAGE = "localhost/pullcache:test"
USER = 65532
VOLUME = "/var/lib/pullcache"
CONFIG = "/etc/pullcache.yaml"
CERTIFICATES = "/pip-cert.pem"
ADMIN = "127.0.0.1:5001"
SHELLS = frozenset({"sh", "dash", "bash", "rbash"})
SECOND = 1_000_000_000

TOOLS = re.compile(r"(pip|setuptools|_distutils_hack|pkg_resources|ensurepip|wheel)([-_.\d].*)?|.*\.whl")
"""What installs Python packages, by the name of a file or folder anywhere."""
COMPILERS = re.compile(r"(.*-)?(cc|c\+\+|gcc|g\+\+|cpp|clang|ld|as|make|tcc)(-[\d.]+)?")
"""What compiles, by the name of a program."""


@dataclass(frozen=True)
class Built:
    """The image, with a root file system out of which all shells were taken after ``files`` was noted."""

    root: Path
    config: Mapping[str, Any]
    files: Mapping[str, os.stat_result]
    """Every file and folder by its path in the image, as it was built."""


class Builder(Containers):
    """buildah with a storage of its own; a proxy of the machine's holds for the build as well."""

    def environment(self) -> Mapping[str, str]:
        proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
        return {**proxies, **super().environment()}

    def buildah(self, *arguments: str | Path) -> str:
        with self.start("buildah", *arguments) as process:
            try:
                said, complained = process.communicate(timeout=BUILD_SECONDS)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise ServiceError(f"buildah {arguments[0]}: exit {process.returncode}: {f'{said}{complained}'[-4000:]}")
        return said.strip()


def pip_settings() -> dict[str, str]:
    """How pip is configured here: from its files, and from the environment, which has the last word."""
    listed = run([sys.executable, "-m", "pip", "config", "list"]).splitlines()
    pairs = [line.partition("=") for line in listed if line.partition(".")[0] in ("global", "install", ":env:")]
    pairs.sort(key=lambda pair: (":env:", "install", "global").index(pair[0].partition(".")[0]), reverse=True)
    return {name.partition(".")[2]: str(ast.literal_eval(value)) for name, _, value in pairs}


def pip_mounts(room: Path) -> dict[str, Path]:
    """That configuration for a build: a file, the folders and the certificates that it names, by where they belong."""
    settings = pip_settings()
    mounts: dict[str, Path] = {}
    if (certificates := settings.pop("cert", None)) is not None:
        mounts[CERTIFICATES] = Path(certificates)
    for word in " ".join(settings.values()).split():
        path = urlsplit(word).path if word.startswith("file://") else word
        # An index in a folder has its files beside its pages.
        folder = Path(path).parent if word.startswith("file://") else Path(path)
        if path.startswith("/") and folder.is_dir():
            mounts[str(folder)] = folder
    file = room / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    return {**mounts, "/etc/pip.conf": file}


@pytest.fixture(scope="module")
def built() -> Iterator[Built]:
    """The image, built once."""
    reason = debian_base.missing()
    if reason is not None:
        pytest.skip(reason)
    base = debian_base.build(BASE_CACHE)
    with tempfile.TemporaryDirectory(prefix="dockerfile-") as name:
        room = Path(name)
        builder = Builder(room / "containers")
        scratch = builder.buildah("from", "scratch")
        builder.buildah("add", "--quiet", scratch, base, "/")
        builder.buildah("commit", "--quiet", "--rm", scratch, debian_base.NAME)
        mounts = pip_mounts(room)
        options = ["--pull-never", "--format", "docker", "--network", "host"]
        options += [f"--volume={source}:{target}:ro" for target, source in mounts.items()]
        options += [f"--build-arg=PIP_CERT={CERTIFICATES}"] if CERTIFICATES in mounts else []
        builder.buildah("bud", *options, "--tag", IMAGE, REPOSITORY)
        inspected = json.loads(builder.buildah("inspect", "--type", "image", IMAGE))
        root = Path(builder.buildah("mount", builder.buildah("from", "--pull-never", IMAGE)))
        root.chmod(0o755)
        files = {f"/{path.relative_to(root)}": path.lstat() for path in root.rglob("*")}
        for target in mounts:  # an empty file or folder stays where something was mounted during the build
            files.pop(target, None)
        for path in [*root.glob("usr/bin/*"), *root.glob("bin/*")]:
            if path.name in SHELLS:
                path.unlink(missing_ok=True)
        yield Built(root, inspected["Docker"]["config"], files)


class Container(Service):
    """The image, run by runc with a folder as its volume.

    It has a network of its own, on which nobody else is; with a configuration it is on the host's.
    """

    name = "container"
    _numbers = itertools.count()

    def __init__(self, root: Path, built: Built, *command: str, config: Path | None = None, admin: str = ADMIN) -> None:
        super().__init__(root)
        self._admin = admin
        self.volume = root / "volume"
        self._id = f"pullcache-test-{os.getpid()}-{next(self._numbers)}"
        self._bundle = root / "bundle"
        self.volume.mkdir(mode=0o700)
        os.chown(self.volume, USER, USER)
        self._bundle.mkdir()
        run(self._runc("spec", "--bundle", self._bundle))
        file = self._bundle / "config.json"
        spec = json.loads(file.read_text())
        self._configure(spec, built, command or tuple(built.config["Cmd"]), config)
        file.write_text(json.dumps(spec))

    def _configure(self, spec: dict[str, Any], built: Built, command: Sequence[str], config: Path | None) -> None:
        """What the image says, and what the strictest of pod security policies asks for."""
        uid, gid = map(int, built.config["User"].split(":"))
        spec["root"] = {"path": str(built.root), "readonly": True}
        spec["process"] = {
            "args": [*built.config["Entrypoint"], *command],
            "env": built.config["Env"],
            "cwd": "/",
            "user": {"uid": uid, "gid": gid},
            "capabilities": {},
            "noNewPrivileges": True,
        }
        # Without the folders in memory that could be written to.
        mounts = [mount for mount in spec["mounts"] if mount["destination"] in ("/proc", "/dev", "/dev/pts", "/sys")]
        mounts.append({"destination": VOLUME, "type": "bind", "source": str(self.volume), "options": ["bind", "rw"]})
        spaces = ["pid", "ipc", "uts", "mount"]
        if config is None:
            spaces.append("network")
        else:
            mounts.append({"destination": CONFIG, "type": "bind", "source": str(config), "options": ["bind", "ro"]})
        spec["mounts"] = mounts
        spec["linux"]["namespaces"] = [{"type": space} for space in spaces]
        spec["linux"]["resources"] = {}

    def _runc(self, *arguments: str | Path) -> list[str | Path]:
        return [which("runc") or "runc", "--root", self.root / "state", *arguments]

    def command(self) -> Sequence[str | Path]:
        return self._runc("run", "--bundle", self._bundle, self._id)

    def ready(self) -> bool:
        return self.health().returncode == 0

    def health(self, admin: str | None = None) -> subprocess.CompletedProcess[str]:
        """``pullcache health``, within the container."""
        return self.execute("pullcache", "health", "--admin", admin or self._admin)

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program in the container, as the container's user."""
        done = self._runc("exec", self._id, *command)
        return subprocess.run(list(map(str, done)), check=False, capture_output=True, text=True, timeout=60)

    def once(self) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(list(map(str, self.command())), check=False, capture_output=True, text=True, timeout=60)

    @property
    def status(self) -> dict[str, str]:
        """What the kernel says of its first process."""
        pid = json.loads(run(self._runc("state", self._id)))["pid"]
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return {key: " ".join(value.split()) for key, _, value in (line.partition(":") for line in lines)}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            delete = self._runc("delete", "--force", self._id)
            subprocess.run(list(map(str, delete)), check=False, capture_output=True, timeout=60)


def names(built: Built, pattern: re.Pattern[str], folder: str = "") -> list[str]:
    """The files and folders of the image whose own name is of this pattern."""
    return [path for path in built.files if folder in path and pattern.fullmatch(path.rpartition("/")[2])]


def test_what_the_image_says_of_itself(built: Built) -> None:
    """User, command, ports, volume, and a health check without a shell, which says what is wrong before Docker ends it."""
    config = built.config
    assert config["User"] == f"{USER}:{USER}"
    assert config["Entrypoint"] == ["pullcache"]
    assert config["Cmd"] == ["serve", "--listen", ":5000"], "admin stays on loopback: it is without a token"
    assert set(config["ExposedPorts"]) == {"5000/tcp", "5001/tcp"}
    assert set(config["Volumes"]) == {VOLUME}
    check = config["Healthcheck"]
    assert check["Test"] == ["CMD", "pullcache", "health"]
    assert check["Timeout"] > HEALTH_SECONDS * SECOND
    assert check["Interval"] > check["Timeout"]
    assert check["StartPeriod"] >= 30 * SECOND


def test_the_image_cannot_install_or_compile(built: Built) -> None:
    """Neither pip nor setuptools nor a compiler nor what the first stage had; and the search for them finds such things."""
    assert names(built, re.compile("pullcache"), "/bin/") == ["/opt/pullcache/bin/pullcache"]
    assert names(built, re.compile(r"python3\.\d+"), "/usr/bin/")
    assert not names(built, TOOLS)
    assert not names(built, COMPILERS, "bin/")
    assert not {"/src", "/wheel", "/opt/build"} & built.files.keys()
    assert not [path for path in built.files if path.startswith("/var/lib/apt/lists/")]
    for name in ("pip", "pip3.11", "pip-23.0.1.dist-info", "setuptools", "setuptools-66.1.1-py3-none-any.whl", "ensurepip"):
        assert TOOLS.fullmatch(name)
    for name in ("cc", "gcc", "gcc-12", "x86_64-linux-gnu-gcc-12", "x86_64-linux-gnu-ld", "as", "c++", "make"):
        assert COMPILERS.fullmatch(name)


def test_the_user_owns_nothing_but_the_volume(built: Built) -> None:
    """So what runs cannot change itself, even where the root file system can be written to."""
    assert [path for path, found in built.files.items() if USER in (found.st_uid, found.st_gid)] == [VOLUME]
    assert stat.S_IMODE(built.files[VOLUME].st_mode) == 0o700
    open_to_all = {
        path for path, found in built.files.items() if found.st_mode & stat.S_IWOTH and not stat.S_ISLNK(found.st_mode)
    }
    assert {path for path in open_to_all if stat.S_ISDIR(built.files[path].st_mode)} <= {"/tmp", "/var/tmp", "/run/lock"}
    assert not [path for path in open_to_all if stat.S_ISREG(built.files[path].st_mode)]


def test_it_runs_as_it_comes(built: Built, room: Path) -> None:
    """With its own command, without a network, without a shell; it is healthy by its own health check, and ends with 0."""
    with Container(room / "container", built) as container:
        assert container.execute(*built.config["Healthcheck"]["Test"][1:]).returncode == 0
        status = container.status
        assert (status["Uid"], status["Gid"]) == (f"{USER} " * 3 + str(USER), f"{USER} " * 3 + str(USER))
        assert status["NoNewPrivs"] == "1"
        assert {status[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        assert "executable file not found" in container.execute("sh", "-c", "true").stderr
        assert writable(container) == [VOLUME]
        wrong = container.health("127.0.0.1:5000")
        assert (wrong.returncode, wrong.stdout) == (1, "")
        assert wrong.stderr.startswith("not healthy: 127.0.0.1:5000: /healthz is answered with 404")
        assert container.stop() == 0
    assert {path.stat().st_uid for path in container.volume.rglob("*")} == {USER}


def test_a_stopped_one_is_not_healthy(built: Built, room: Path) -> None:
    """Where nobody listens: 1, and a line that names the address."""
    done = Container(room / "container", built, "health").once()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "not healthy: 127.0.0.1:5001: cannot be reached: Connection refused\n"


def writable(container: Container) -> list[str]:
    """The folders in which its user can make a file."""
    script = (
        "import os, tempfile\n"
        "for folder, folders, _ in os.walk('/'):\n"
        "    folders[:] = [] if folder in ('/proc', '/sys') else folders\n"
        "    try:\n"
        "        tempfile.TemporaryFile(dir=folder).close()\n"
        "        print(folder)\n"
        "    except OSError:\n"
        "        continue\n"
    )
    done = container.execute("python3", "-c", script)
    assert done.returncode == 0, done.stderr
    # What is below the volume is pullcache's own.
    return [folder for folder in done.stdout.splitlines() if not folder.startswith(f"{VOLUME}/")]


@needs_skopeo
def test_an_image_is_pulled_through_it(built: Built, upstream: DockerRegistry, image: RealImage, room: Path) -> None:
    """With a configuration, on the host's network: each blob is asked for once, and nothing changes for the clients."""
    config = pullcache_config(Path(VOLUME), UPSTREAM, upstream.url)
    file = room / "pullcache.yaml"
    file.write_text(json.dumps(config))  # which is YAML
    with Container(room / "container", built, "serve", "--config", CONFIG, config=file, admin=config["admin"]) as container:
        for target in (room / "cold", room / "warm"):
            skopeo_pull(f"{config['listen']}/{UPSTREAM}/{reference(image, 'tag')}", target)
            assert_layout(target, image)
        assert upstream.wait_for_blobs(image.blobs) == once(image.blobs)
        upstream.stop()
        assert container.health().returncode == 0
        assert container.stop() == 0
    for digest, size in image.sizes.items():
        kept = (container.volume / "blobs" / digest.replace(":", "/")).stat()
        assert (kept.st_uid, kept.st_size) == (USER, size)
