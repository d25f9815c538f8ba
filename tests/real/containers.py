"""podman, skopeo and buildah with a home of their own: configuration, storage and caches below one directory.

Nothing of the machine's is written, and of its configuration only ``/etc/containers/certs.d`` is looked at. What no option
moves is in ``/var/lib/containers`` (where the programs of root note which registry has which blob) and in
``/var/cache/containers`` (short names): for root other folders are mounted there, in a namespace that ends with the program.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .services import COMMAND_SECONDS, ServiceError, which

_HIDE = 'mount --bind "$1/var-lib" /var/lib && mount --bind "$1/var-cache" /var/cache && shift && exec "$@"'


@dataclass(frozen=True)
class Mirror:
    """A ``[[registry]]`` of registries.conf with one mirror, on plain http."""

    prefix: str
    """The registry, as images name it."""
    location: str
    """The mirror, with the path that stands before a repository there: ``HOST/registry.test``."""
    pull_from_mirror: str | None = None
    """``all``, ``digest-only`` or ``tag-only``; None leaves the key out."""
    primary: str | None = None
    """Where the registry itself is, on plain http; None is its name, which for a ``.test`` is nowhere."""

    def toml(self) -> str:
        """As registries.conf has it."""
        lines = ["[[registry]]", f"prefix = {json.dumps(self.prefix)}"]
        lines.append(f"location = {json.dumps(self.primary or self.prefix)}")
        lines += ["insecure = true"] if self.primary else []
        lines += ["[[registry.mirror]]", f"location = {json.dumps(self.location)}", "insecure = true"]
        lines += [f"pull-from-mirror = {json.dumps(self.pull_from_mirror)}"] if self.pull_from_mirror else []
        return "\n".join([*lines, ""])


@dataclass(frozen=True)
class Pulled:
    """What podman or buildah says that it holds under a name."""

    config: str
    """The digest of its config, which is the image's id."""
    manifests: frozenset[str]
    """The digests under which it can be named."""
    layers: tuple[str, ...]
    """The digests of its unpacked layers."""


class Containers:
    """The three programs. The machine's own storage and configuration are out of their reach."""

    def __init__(self, home: Path, *mirrors: Mirror) -> None:
        self.home = home
        # In this folder of HOME all three look before /etc/containers; with a registries.conf here, they do not look there.
        self._own = home / ".config" / "containers"
        for folder in ("tmp", "run", "cni", "hooks", "var-lib", "var-cache"):
            (home / folder).mkdir(parents=True)
        (self._own / "registries.d").mkdir(parents=True)
        (self._own / "policy.json").write_text(json.dumps({"default": [{"type": "insecureAcceptAnything"}]}))
        (home / "auth.json").write_text("{}")
        (home / "storage.conf").write_text(
            f'[storage]\ndriver = "vfs"\ngraphroot = "{home}/storage"\nrunroot = "{home}/run/storage"\n'
        )
        (home / "containers.conf").write_text(
            f'[network]\nnetwork_config_dir = "{home}/cni"\n'
            '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
            'lock_type = "file"\n'  # those in shared memory belong to the machine's own podman
            f'hooks_dir = ["{home}/hooks"]\nvolume_path = "{home}/volumes"\n'
            f'static_dir = "{home}/libpod"\ntmp_dir = "{home}/run/libpod"\n'
        )
        self.mirrors(*mirrors)

    def mirrors(self, *mirrors: Mirror) -> None:
        """Write registries.conf; it holds from the next command on."""
        text = 'unqualified-search-registries = ["docker.io"]\nshort-name-mode = "disabled"\n'
        (self._own / "registries.conf").write_text(text + "".join(mirror.toml() for mirror in mirrors))

    def environment(self) -> Mapping[str, str]:
        """Nothing of the caller's but the path: no proxy, no credentials, no configuration."""
        return {
            "PATH": os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin")),
            "HOME": str(self.home),
            "TMPDIR": str(self.home / "tmp"),
            "XDG_RUNTIME_DIR": str(self.home / "run"),
            "CONTAINERS_CONF": str(self.home / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.home / "storage.conf"),
            "REGISTRY_AUTH_FILE": str(self.home / "auth.json"),
            "BUILDAH_ISOLATION": "chroot",
        }

    def start(self, program: str, *arguments: str | Path) -> subprocess.Popen[str]:
        """Run one of the programs in the background."""
        command = [which(program) or program, *map(str, arguments)]
        if os.geteuid() == 0:
            command = [which("unshare") or "unshare", "--mount", "sh", "-c", _HIDE, "sh", str(self.home), *command]
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(self.environment()),
        )

    def run(self, program: str, *arguments: str | Path) -> str:
        """Run one of the programs to its end; its standard output. Fails with what it said."""
        with self.start(program, *arguments) as process:
            try:
                said, complained = process.communicate(timeout=COMMAND_SECONDS)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            text = f"{said.strip()}\n{complained.strip()}".strip()
            raise ServiceError(f"{program} {' '.join(map(str, arguments))}: exit {process.returncode}: {text[-4000:]}")
        return said

    def podman(self, *arguments: str | Path) -> str:
        """Run podman; its output."""
        return self.run("podman", *arguments)

    def buildah(self, *arguments: str | Path) -> str:
        """Run buildah; its output."""
        return self.run("buildah", *arguments)

    def skopeo(self, *arguments: str | Path) -> str:
        """Run skopeo; its output."""
        return self.run("skopeo", *arguments)

    def image(self, name: str) -> Pulled:
        """What the storage, which podman and buildah share, holds under a name."""
        found = json.loads(self.podman("image", "inspect", name))[0]
        digests = frozenset(digest.partition("@")[2] for digest in found["RepoDigests"])
        return Pulled(f"sha256:{found['Id']}", digests, tuple(found["RootFS"]["Layers"]))
