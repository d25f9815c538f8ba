"""The real programs of these tests, each on loopback with a directory of its own.

Every program is started here and stopped here, by its own process id. All of them are context
managers; they can also be stopped and started again, on the same port and with the same data.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import yaml

from tests.fakes.ports import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
START_SECONDS = 20.0
STOP_SECONDS = 20.0
COMMAND_SECONDS = 180.0

_SYSTEM_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))


class ServiceError(RuntimeError):
    """A program did not start, did not stop well, or failed."""


def which(program: str) -> str | None:
    """Like ``shutil.which``, looking into the system directories as well."""
    return shutil.which(program, path=_SYSTEM_PATH)


def missing(*programs: str, root: bool = False) -> str | None:
    """Why a test that needs these programs must be skipped, if so."""
    absent = [program for program in programs if which(program) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (tests/real/install.sh)"
    if root and os.geteuid() != 0:
        return "needs root"
    return None


def wait_until(condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
    """Poll until something is so; fail after a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ServiceError(f"{what}: not within {seconds:g} s")
        time.sleep(0.02)


def status_of(url: str, timeout: float = 2.0) -> int | None:
    """The status with which a GET of an http URL is answered; none if nobody listens."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    try:
        connection.request("GET", parts.path or "/")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def run(command: Sequence[str | Path], timeout: float = COMMAND_SECONDS) -> str:
    """Run a program to its end; its standard output. Fails with what it said."""
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        said = f"{done.stdout.strip()}\n{done.stderr.strip()}".strip()
        raise ServiceError(f"{' '.join(map(str, command))}: exit {done.returncode}: {said[-4000:]}")
    return done.stdout


class Service:
    """A program that runs in the background, with its output in a log file."""

    name = "service"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log_file = root / f"{self.name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        root.mkdir(parents=True, exist_ok=True)

    def command(self) -> Sequence[str | Path]:
        """What to run."""
        raise NotImplementedError

    def ready(self) -> bool:
        """Whether it serves."""
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        """Its environment."""
        return os.environ

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._process.pid if self._process is not None else None

    @property
    def log(self) -> str:
        """All that it wrote, over all its starts."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def start(self, wait: bool = True) -> None:
        """Start it and wait until it serves."""
        if self._process is not None:
            raise ServiceError(f"{self.name} runs already")
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                list(map(str, self.command())),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=REPOSITORY,
                env=dict(self.environment()),
                start_new_session=True,
            )
        if not wait:
            return
        try:
            wait_until(self._up, f"{self.name} is ready")
        except BaseException:
            self.kill()
            raise

    def _up(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            code = self._process.returncode
            raise ServiceError(f"{self.name} ended with {code}: {self.log.strip()[-4000:]}")
        return self.ready()

    def stop(self) -> int | None:
        """SIGTERM and wait; its exit status, none if it did not run."""
        return self._end(signal.SIGTERM)

    def kill(self) -> int | None:
        """SIGKILL and wait."""
        return self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        if process.poll() is None:
            process.send_signal(number)
        try:
            return process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise ServiceError(f"{self.name} did not stop in {STOP_SECONDS:g} s: {self.log[-4000:]}") from None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.stop()
        except ServiceError:
            if error is None:
                raise


PLACE = re.compile(r"^/v2/.+/(?=(manifests|blobs|tags|referrers)/)")
"""What stands before the place in a repository that a request is about."""


@dataclass(frozen=True)
class Request:
    """One line of a registry's access log."""

    method: str
    path: str
    status: int
    agent: str


class DockerRegistry(Service):
    """Debian's docker-registry: an upstream with its own data, port and access log."""

    name = "docker-registry"
    _LINE = re.compile(r'^\S+ - \S+ \[[^]]*\] "(\S+) (\S+) HTTP/[\d.]+" (\d+) \d+ "[^"]*" "([^"]*)"$', re.MULTILINE)
    _BLOB = re.compile(r"^/v2/.+/blobs/(sha256:[0-9a-f]{64})(?:\?|$)")
    _MANIFEST = re.compile(r"^/v2/.+/manifests/([^?]+)")

    def __init__(self, root: Path, data: Path | None = None, port: int | None = None) -> None:
        super().__init__(root)
        self.data = data or root / "data"
        self.port = port or free_port()
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.host}"
        self._seen = 0

    def command(self) -> Sequence[str | Path]:
        config = {
            "version": 0.1,
            "log": {"level": "warn", "accesslog": {"disabled": False}},
            "storage": {"filesystem": {"rootdirectory": str(self.data)}, "delete": {"enabled": True}},
            "http": {"addr": self.host, "secret": "of-this-test"},
        }
        file = self.root / "registry.yml"
        file.write_text(yaml.safe_dump(config))
        return [which("docker-registry") or "docker-registry", "serve", file]

    def environment(self) -> Mapping[str, str]:
        # Variables that begin with REGISTRY_ would override the configuration.
        return {name: value for name, value in os.environ.items() if not name.startswith(("REGISTRY_", "OTEL_"))}

    def ready(self) -> bool:
        return status_of(f"{self.url}/v2/") == 200

    def push(self, layout: Path, name: str, tag_of_layout: str = "12") -> None:
        """Push the image of an OCI layout, all platforms, byte for byte."""
        skopeo(
            "copy",
            "--all",
            "--preserve-digests",
            "--dest-tls-verify=false",
            f"oci:{layout}:{tag_of_layout}",
            f"docker://{self.host}/{name}",
        )

    def requests(self) -> list[Request]:
        """What it was asked since the last ``forget()``; without the ``/v2/`` of readiness checks."""
        text = self.log_file.read_bytes()[self._seen :].decode(errors="replace")
        found = (Request(match[1], match[2], int(match[3]), match[4]) for match in self._LINE.finditer(text))
        return [request for request in found if request.path != "/v2/"]

    def forget(self) -> None:
        """Let ``requests()`` begin here."""
        self._seen = self.log_file.stat().st_size if self.log_file.exists() else 0

    def blobs(self, method: str = "GET") -> Counter[str]:
        """How often each blob was asked for."""
        return self._count(self._BLOB, method)

    def manifests(self, method: str = "GET") -> Counter[str]:
        """How often each manifest was asked for, by its tag or digest."""
        return self._count(self._MANIFEST, method)

    def wait_for_blobs(self, digests: frozenset[str], seconds: float = 5.0) -> Counter[str]:
        """The count of blob downloads, once all of these are in the log.

        The log line is written after the last byte was sent, so a client can be quicker.
        """
        with contextlib.suppress(ServiceError):  # the caller compares
            wait_until(lambda: digests <= self.blobs().keys(), "the log names the blobs", seconds)
        return self.blobs()

    def asked(self, expected: Counter[str], seconds: float = 5.0) -> Counter[str]:
        """All that it was asked, such as ``GET blobs/sha256:...``, once that is in the log; the caller compares."""

        def now() -> Counter[str]:
            return Counter(f"{request.method} {PLACE.sub('', request.path)}" for request in self.requests())

        with contextlib.suppress(ServiceError):
            wait_until(lambda: now() >= expected, "the log names the requests", seconds)
        return now()

    def _count(self, pattern: re.Pattern[str], method: str) -> Counter[str]:
        matches = (pattern.match(request.path) for request in self.requests() if request.method == method)
        return Counter(match[1] for match in matches if match)


class Containerd(Service):
    """A containerd with its own root, state, socket and registry hosts; needs root."""

    name = "containerd"

    def __init__(self, root: Path, namespace: str = "default") -> None:
        super().__init__(root)
        self.namespace = namespace
        self.hosts_dir = root / "certs.d"
        self.hosts_dir.mkdir(exist_ok=True)
        self.socket = root / "containerd.sock"
        if len(str(self.socket)) > 100:
            raise ServiceError(f"too long for a socket: {self.socket}")

    def command(self) -> Sequence[str | Path]:
        file = self.root / "config.toml"
        file.write_text(
            "version = 2\n"
            f'root = "{self.root / "root"}"\n'
            f'state = "{self.root / "state"}"\n'
            f'[grpc]\naddress = "{self.socket}"\n'
            f'[ttrpc]\naddress = "{self.socket}.ttrpc"\n'
            '[plugins."io.containerd.internal.v1.opt"]\n'
            f'path = "{self.root / "opt"}"\n'
            '[plugins."io.containerd.grpc.v1.cri"]\ndisable_cgroup = true\n'
            '[plugins."io.containerd.grpc.v1.cri".containerd]\nsnapshotter = "native"\n'
            '[plugins."io.containerd.grpc.v1.cri".cni]\n'
            f'conf_dir = "{self.root / "cni"}"\n'
            '[plugins."io.containerd.grpc.v1.cri".registry]\n'
            f'config_path = "{self.hosts_dir}"\n'
        )
        return [which("containerd") or "containerd", "--config", file]

    def environment(self) -> Mapping[str, str]:
        return {**os.environ, "PATH": _SYSTEM_PATH}

    def ready(self) -> bool:
        if not self.socket.exists():
            return False
        command = [which("ctr") or "ctr", "--address", str(self.socket), "version"]
        return subprocess.run(command, check=False, capture_output=True, timeout=START_SECONDS).returncode == 0

    def ctr(self, *arguments: str | Path, timeout: float = COMMAND_SECONDS) -> str:
        """Run ``ctr`` against it; its output."""
        options: list[str | Path] = ["--address", self.socket, "--namespace", self.namespace]
        return run([which("ctr") or "ctr", *options, *arguments], timeout)

    def hosts_toml(
        self,
        registry_host: str,
        *mirror_urls: str,
        server: str | None = None,
        capabilities: Sequence[str] = ("pull", "resolve"),
        override_path: bool = False,
    ) -> Path:
        """Give a registry mirrors, in this order; the file, which may also be written anew.

        Without ``server`` the registry itself, over https, is what a failing mirror leads to. A registry with a port
        may be written as ``host_port_``, too.
        """
        lines = [f"server = {json.dumps(server)}"] if server is not None else []
        for url in mirror_urls:
            lines += [f"[host.{json.dumps(url)}]", f"capabilities = {json.dumps(list(capabilities))}"]
            lines += ["override_path = true"] if override_path else []
        folder = self.hosts_dir / registry_host
        folder.mkdir(exist_ok=True)
        file = folder / "hosts.toml"
        file.write_text("".join(f"{line}\n" for line in lines))
        return file

    def pull(self, reference: str, *options: str, platform: str | None = None) -> str:
        """``ctr images pull`` with the hosts of ``hosts_toml``, unpacked by the native snapshotter."""
        which_platforms: list[str] = ["--platform", platform] if platform else []
        return self.ctr(
            "images",
            "pull",
            "--hosts-dir",
            self.hosts_dir,
            "--snapshotter",
            "native",
            *which_platforms,
            *options,
            reference,
        )

    def fetch(self, reference: str, platform: str) -> str:
        """``ctr content fetch``: the same download, nothing is unpacked."""
        return self.ctr("content", "fetch", "--hosts-dir", self.hosts_dir, "--platform", platform, reference)

    def content(self) -> dict[str, int]:
        """Digest -> size of all that it holds, as ``ctr content ls`` says."""
        rows = (line.split() for line in self.ctr("content", "ls").splitlines()[1:])
        return {row[0]: self.content_path(row[0]).stat().st_size for row in rows if row}

    def unfinished(self) -> list[str]:
        """What it has begun to receive and not completed, as ``ctr content active`` says."""
        return [row.split()[0] for row in self.ctr("content", "active").splitlines()[1:] if row.strip()]

    def images(self) -> dict[str, str]:
        """Reference -> digest of the images that it knows."""
        rows = (line.split() for line in self.ctr("images", "ls").splitlines()[1:])
        return {row[0]: row[2] for row in rows if row}

    def content_path(self, digest: str) -> Path:
        """The file in which it keeps a digest."""
        algorithm, _, value = digest.partition(":")
        return self.root / "root" / "io.containerd.content.v1.content" / "blobs" / algorithm / value


class Pullcache(Service):
    """pullcache itself, ``python -m proxy serve``, ready when its admin address says so."""

    name = "pullcache"

    def __init__(
        self,
        config: Mapping[str, Any] | str,
        python: str | Path = sys.executable,
        root: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._own = tempfile.TemporaryDirectory(prefix="pullcache-") if root is None else None
        super().__init__(Path(self._own.name) if self._own is not None else root or Path())
        self.python = python
        self.config_file = self.root / "pullcache.yaml"
        self._more = dict(environment or {})
        self.configure(config)

    def configure(self, config: Mapping[str, Any] | str) -> None:
        """Write the configuration; it holds from the next start."""
        text = config if isinstance(config, str) else yaml.safe_dump(dict(config), sort_keys=False)
        parsed = yaml.safe_load(text)
        self.host = str(parsed["listen"])
        self.admin_host = str(parsed["admin"])
        self.url = f"http://{self.host}"
        self.admin_url = f"http://{self.admin_host}"
        self.config_file.write_text(text)

    def command(self) -> Sequence[str | Path]:
        return [self.python, "-m", "proxy", "serve", "--config", self.config_file]

    def environment(self) -> Mapping[str, str]:
        return {**os.environ, "PYTHONUNBUFFERED": "1", **self._more}

    def ready(self) -> bool:
        return status_of(f"{self.admin_url}/readyz") == 200

    @property
    def port(self) -> int:
        """The port on which clients reach it."""
        return int(self.host.rpartition(":")[2])

    def figure(self, name: str) -> float:
        """One of its figures, such as ``fills_total{result="held"}``, summed over the labels that are not given."""
        with urllib.request.urlopen(f"{self.admin_url}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        family, _, labels = f"pullcache_{name}".partition("{")
        samples = (line.rpartition(" ") for line in lines if line.startswith((f"{family} ", f"{family}{{")))
        return sum(float(value) for sample, _, value in samples if labels.rstrip("}") in sample)

    def stop(self) -> int | None:
        """SIGTERM and wait; anything but a clean exit is an error."""
        code = super().stop()
        if code:
            raise ServiceError(f"pullcache stopped with {code}: {self.log.strip()[-4000:]}")
        return code

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            if self._own is not None:
                self._own.cleanup()


def pullcache_config(cache: Path, upstream: str, endpoint: str, **more: object) -> dict[str, Any]:
    """A configuration on free ports, with one upstream on loopback; ``more`` replaces whole sections."""
    return {
        "listen": f"127.0.0.1:{free_port()}",
        "admin": f"127.0.0.1:{free_port()}",
        "cache": {"directory": str(cache)},
        "defaultUpstream": upstream,
        "alwaysPullImages": True,
        "upstreams": [{"name": upstream, "endpoints": [endpoint], "allowAddresses": ["127.0.0.1/32"]}],
        "log": {"format": "text", "level": "info"},
        **more,
    }


def skopeo(*arguments: str | Path, timeout: float = COMMAND_SECONDS) -> str:
    """Run skopeo, on any machine without a signature policy; its output."""
    return run(skopeo_command(*arguments), timeout)


def skopeo_command(*arguments: str | Path) -> list[str]:
    """The command line that ``skopeo()`` runs."""
    return [which("skopeo") or "skopeo", "--insecure-policy", *map(str, arguments)]


def skopeo_pull_command(source: str, target: Path) -> list[str]:
    """The command line that ``skopeo_pull()`` runs."""
    return skopeo_command(
        "copy",
        "--all",
        "--preserve-digests",
        "--src-tls-verify=false",
        f"docker://{source}",
        f"oci:{target}:12",
    )


def skopeo_pull(source: str, target: Path) -> None:
    """Copy all platforms of ``HOST/NAME:TAG`` or ``HOST/NAME@DIGEST`` to an OCI layout, byte for byte."""
    run(skopeo_pull_command(source, target))
