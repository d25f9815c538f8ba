"""A private dockerd: Debian's, and newer ones that have the containerd image store; needs root."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .services import COMMAND_SECONDS, Service, ServiceError, run, wait_until, which

_HOSTS = """\
127.0.0.1 localhost
0.0.0.0 registry-1.docker.io index.docker.io auth.docker.io docker.io
"""
_IN_NAMESPACE = """
set -e
mount --bind "$1" /etc/hosts
mount --bind "$2" /etc/docker  # old ones write a key there, new ones read certs.d there
mount -t tmpfs tmpfs /run  # sockets of plugins
shift 2
exec "$@"
"""
_NOT_OURS = re.compile(r"(DOCKER_.*|.*_proxy)", re.IGNORECASE)


class Dockerd(Service):
    """A dockerd with its own data, socket and containerd, and no network, firewall or route of its own.

    It runs in a mount namespace, with a hosts file of its own: whatever it mounts ends with it, and Docker Hub is an address
    of loopback where nobody listens. A pull that falls back to Docker Hub fails at once, and asks nobody, on every machine.
    """

    name = "dockerd"

    def __init__(
        self,
        root: Path,
        mirrors: Sequence[str] = (),
        programs: Path | None = None,
        containerd_store: bool = False,
        insecure: Sequence[str] = (),
    ) -> None:
        super().__init__(root)
        self.socket = root / "docker.sock"
        self.programs = programs
        self.containerd_store = containerd_store
        self.certs_dir = root / "etc" / "certs.d"
        self.certs_dir.mkdir(parents=True)
        self._mirrors = list(mirrors)
        self._insecure = list(insecure)
        if len(str(self.socket)) > 80:  # that of its containerd is longer
            raise ServiceError(f"too long for a socket: {self.socket}")

    def program(self, name: str) -> str:
        """Its own version of a program, if there is one."""
        found = shutil.which(name, path=self._path())
        return found or name

    def command(self) -> Sequence[str | Path]:
        file = self.root / "daemon.json"
        settings: dict[str, Any] = {"registry-mirrors": self._mirrors, "insecure-registries": self._insecure}
        if self.programs is not None:
            settings["features"] = {"containerd-snapshotter": self.containerd_store}
        file.write_text(json.dumps(settings))
        hosts = self.root / "hosts"
        hosts.write_text(_HOSTS)
        return [
            *(which("unshare") or "unshare", "--mount", "--propagation", "slave"),
            *("sh", "-c", _IN_NAMESPACE, "sh", hosts, self.root / "etc"),
            self.program("dockerd"),
            *("--config-file", file),
            *("--data-root", self.root / "data"),
            *("--exec-root", self.root / "exec"),
            *("--pidfile", self.root / "dockerd.pid"),
            *("--host", f"unix://{self.socket}"),
            f"--storage-driver={'native' if self.containerd_store else 'vfs'}",
            *("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false"),
        ]

    def environment(self) -> Mapping[str, str]:
        ours = {name: value for name, value in os.environ.items() if not _NOT_OURS.fullmatch(name)}
        return {**ours, "PATH": self._path()}

    def _path(self) -> str:
        own = [] if self.programs is None else [str(self.programs / "usr" / folder) for folder in ("sbin", "bin")]
        return os.pathsep.join([*own, os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

    def ready(self) -> bool:
        if not self.socket.exists():
            return False
        return subprocess.run(self.docker_command("version"), check=False, capture_output=True, timeout=20).returncode == 0

    # -- its client --------------------------------------------------------------------------------------------------

    def docker_command(self, *arguments: str | Path) -> list[str]:
        """The command line that ``docker()`` runs."""
        options = ["--config", str(self.root / "client"), "--host", f"unix://{self.socket}"]
        return [self.program("docker"), *options, *map(str, arguments)]

    def docker(self, *arguments: str | Path, timeout: float = COMMAND_SECONDS) -> str:
        """Run ``docker`` against it; its output."""
        return run(self.docker_command(*arguments), timeout)

    def pull(self, reference: str, platform: str = "linux/amd64", timeout: float = COMMAND_SECONDS) -> str:
        """``docker pull``; what it said."""
        return self.docker("pull", "--platform", platform, reference, timeout=timeout)

    def inspect(self, reference: str) -> dict[str, Any]:
        """``docker image inspect`` of one image."""
        found: list[dict[str, Any]] = json.loads(self.docker("image", "inspect", reference))
        return found[0]

    def forget(self) -> None:
        """Remove every image."""
        found = set(self.docker("image", "ls", "--all", "--quiet", "--no-trunc").split())
        if found:
            self.docker("image", "rm", "--force", *found)

    # -- nothing stays behind ----------------------------------------------------------------------------------------

    def _end(self, number: signal.Signals) -> int | None:
        try:
            return super()._end(number)
        finally:
            try:
                wait_until(lambda: not self.left_behind(), "its containerd has ended", 10)
            except ServiceError:
                left = self.left_behind()
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                raise ServiceError(f"dockerd left processes behind: {left}") from None
            shutil.rmtree(self.root / "exec", ignore_errors=True)  # what else is gone after a boot

    def left_behind(self) -> dict[int, str]:
        """Processes whose command line names its directory."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if f"{self.root}/" in line:
                found[int(folder.name)] = line
        return found

    def mounts(self) -> list[str]:
        """What is mounted below its directory, as this process sees it."""
        return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {self.root}/" in line]


def newer(cache: Path, suite: str = "") -> Path:
    """The programs of a newer Debian's Docker, unpacked below ``cache`` and not installed.

    They come from where this machine's own apt gets its packages. Raises ``ServiceError`` where that cannot be, or where
    they do not run. ``PULLCACHE_DOCKER_SUITE`` names another suite than the next stable Debian.
    """
    suite = suite or os.environ.get("PULLCACHE_DOCKER_SUITE", "trixie")
    done = cache / f"docker-{suite}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "docker-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.is_dir():
            with tempfile.TemporaryDirectory(dir=cache, prefix="fetching-") as name:
                _fetch(Path(name), suite)
                (Path(name) / "root").rename(done)
    run([done / "usr" / "sbin" / "dockerd", "--version"])
    return done


def _fetch(folder: Path, suite: str) -> None:
    absent = [name for name in ("apt-get", "dpkg-deb") if which(name) is None]
    if absent:
        raise ServiceError(f"no newer Docker without {', '.join(absent)}")
    where = set(run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Origin: Debian", "Label: Debian"]).split())
    if not where:
        raise ServiceError("apt has no sources of Debian")
    signed = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
    (folder / "sources.list").write_text(f"deb {signed} {sorted(where)[0]} {suite} main\n")
    for name in ("lists", "archives"):
        (folder / name / "partial").mkdir(parents=True)
    settings = {
        "Dir::Etc::SourceList": folder / "sources.list",
        "Dir::Etc::SourceParts": "-",
        "Dir::State::Lists": folder / "lists",
        "Dir::Cache": folder,
        "APT::Sandbox::User": "root",
    }
    options = [f"-o{name}={value}" for name, value in settings.items()]
    run(["apt-get", "-qq", *options, "update"])
    packages = ("docker.io", "docker-cli", "containerd")
    download = shlex.join(["apt-get", "-qq", *options, "download", *packages])  # to where it runs
    run(["sh", "-c", f"cd {shlex.quote(str(folder))} && {download}"])
    for package in folder.glob("*.deb"):
        run(["dpkg-deb", "-x", package, folder / "root"])
