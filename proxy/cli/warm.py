"""``pullcache warm``: what is to be pulled, how far it is, and what came of it, for people."""

from __future__ import annotations

import asyncio
import platform as machine
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from tqdm import tqdm  # type: ignore[import-untyped]

from proxy.cli.admin import Admin, Unasked, ask, reachable
from proxy.config.model import Config
from proxy.errors import RegistryError
from proxy.image_pull_policy import derived_policy
from proxy.kubernetes.files import FilesUnusable, read_files
from proxy.kubernetes.pods import Plan, PodImage, PodPull, plan
from proxy.logs import printable
from proxy.names import parse_image_name
from proxy.platforms import Platform, parse_platform, platform_of
from proxy.upstream.tls import TLSFileUnusable, context_of
from proxy.warm import Bar, Held, Result, Server, Wanted, Warmer

_SERVER = "http://127.0.0.1:5000"
_HEADINGS = ("IMAGE", "PLATFORM", "POLICY", "SIZE", "SECONDS", "RESULT")


@dataclass(frozen=True, slots=True)
class Where:
    """Which pullcache, as a user says it."""

    server: str | None = None
    config: Config | None = None
    ca_file: Path | None = None
    admin: str | None = None
    token_file: Path | None = None

    def at(self) -> Server:
        """Its registry API; raises ``ValueError`` where that is none."""
        prefixes = {upstream.name: upstream.prefix for upstream in self.config.upstreams} if self.config else {}
        server = Server(self.server or (_url_of(self.config) if self.config else _SERVER), self.ca_file, prefixes)
        context_of(server.config)
        return server

    def admin_of(self) -> Admin | None:
        """Where it says what is held. Of a server that is named by itself, nobody knows."""
        if self.server and not self.admin:
            return None
        return Admin(self.admin, self.config, self.token_file, self.ca_file)


def run(refs: Sequence[str], names: Sequence[str], platforms: Sequence[str], check: bool, where: Where) -> int:
    """The exit code: 0 where all is held, 1 where not, 2 where what was given cannot be used or names no image."""
    faults: list[str] = []
    pods, wanted, planned, server, skipped = _refs(refs, faults), _platforms(platforms, faults), Plan(()), None, 0
    try:
        objects, notes = read_files(names, sys.stdin.buffer)
        planned, skipped = plan(objects), objects.skipped
        for line in (*notes, *planned.warnings):
            click.echo(f"warning: {line}", err=True)
    except FilesUnusable as error:
        faults += error.faults
    try:
        server = where.at()
    except TLSFileUnusable as error:
        faults.append(f"--ca-file: {error}")
    except ValueError:
        faults.append(f"--server: {printable(where.server or '')}: not a server; write for example {_SERVER}")
    for fault in faults:
        click.echo(fault, err=True)
    if faults or server is None:
        return 2
    pods += planned.pods
    if check and where.admin_of() is None:
        click.echo("warning: what is held is not known: give --admin, or --config instead of --server", err=True)
    results = asyncio.run(_warm(server, where, check, pods, wanted))
    rows = list(_rows(pods, wanted, results, planned))
    for line in _table(rows):
        click.echo(line)
    missing = sum(not is_held for is_held, _ in rows)
    nothing = f"no image is named there ({skipped} objects have no pods)"
    click.echo(f"{len(rows) - missing} held, {missing} not" if rows else nothing, err=True)
    return 2 if not rows else 1 if missing else 0


async def _warm(
    server: Server, where: Where, check: bool, pods: Sequence[PodPull], wanted: Sequence[Platform]
) -> dict[Wanted, Result]:
    """What became of the images; of those that were done, where it is interrupted."""
    warmer = Warmer(server, _Holdings(where).ask, _no_bar if check else _bar, _tell, check=check)
    try:
        await warmer.run(pods, wanted)
    except asyncio.CancelledError:  # Ctrl-C
        click.echo("stopped", err=True)
    return warmer.results


class _Holdings:
    """Asks the admin listener what is held, until it turns out that it does not tell."""

    def __init__(self, where: Where) -> None:
        self._admin = where.admin_of()

    async def ask(self, image: str, platform: Platform) -> Held | None:
        """What is held of an image; None where that is not known."""
        if self._admin is None:
            return None
        try:
            found = await asyncio.to_thread(ask, self._admin, "/explain", {"image": image, "platform": str(platform)})
        except Unasked as error:
            if self._admin is not None:
                tqdm.write(f"warning: what is held is not known: {error}", file=sys.stderr)
            self._admin = None
            return None
        if isinstance(why := found.get("error"), str):
            return Held(False, why=why)
        held = found.get("held")
        if not isinstance(held, dict) or not isinstance(held.get("complete"), bool):
            return None
        missing, why = held.get("missing"), held.get("error")
        return Held(held["complete"], len(missing) if isinstance(missing, list) else 0, why if isinstance(why, str) else "")


def _refs(refs: Sequence[str], faults: list[str]) -> list[PodPull]:
    """Each is as a pod of its own, whose container names no policy."""
    pods = []
    for ref in refs:
        try:
            name = parse_image_name(ref)
        except RegistryError as error:
            faults.append(f"InvalidImageName: {printable(ref)}: {error.message}")
        else:
            pods.append(PodPull((PodImage("image", name, derived_policy(name.tag, name.digest)),)))
    return pods


def _platforms(texts: Sequence[str], faults: list[str]) -> list[Platform]:
    found: dict[Platform, None] = {}
    for text in texts:
        try:
            found[parse_platform(text)] = None
        except ValueError as error:
            faults.append(f"--platform {printable(text, 64)}: {error}")
    return list(found) or [platform_of(machine.machine())]


def _url_of(config: Config) -> str:
    """Where clients are told to find it, for its tokens are given there; else where it listens."""
    scheme = "https" if config.listener.tls_cert_file else "http"
    return config.external_url or f"{scheme}://{reachable(config.listen)}"


def _rows(
    pods: Sequence[PodPull], platforms: Sequence[Platform], results: dict[Wanted, Result], planned: Plan
) -> Iterator[tuple[bool, tuple[str, ...]]]:
    """A row for each image once, in the order in which they were named: whether it is held, and what to show."""
    named = [Wanted(it.name, it.policy, it.credentials, each) for pod in pods for it in pod.images for each in platforms]
    for wanted in dict.fromkeys(named):
        result = results.get(wanted, Result(False, "stopped before it was done"))
        sizes = (_bytes(result.size), f"{result.seconds:.1f}") if result.size else ("", "")
        yield result.held, (str(wanted.name), str(wanted.platform), wanted.policy, *sizes, printable(result.text, 2048))
    for problem in planned.problems:
        yield False, (problem.what, "", "", "", "", f"{problem.place}: {problem.why}")


def _table(rows: Sequence[tuple[bool, tuple[str, ...]]]) -> Iterator[str]:
    lines = [_HEADINGS, *(cells for _, cells in rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _bytes(size: int) -> str:
    text: str = tqdm.format_sizeof(size, "B")
    return text


class _Hidden:
    """Of an image, where nobody sees it grow."""

    def expect(self, size: int) -> None:
        """Nothing is shown of it."""

    def add(self, size: int) -> None:
        """Nothing is shown of it."""

    def close(self) -> None:
        """The table tells."""


class _Shown:
    """A bar that is there while its image comes."""

    def __init__(self, wanted: Wanted) -> None:
        tqdm.monitor_interval = 0  # no thread of its own
        self._bar = tqdm(
            desc=str(wanted.name), total=0, unit="B", unit_scale=True, leave=False, dynamic_ncols=True, file=sys.stderr
        )

    def expect(self, size: int) -> None:
        """The bar becomes longer."""
        self._bar.total += size
        self._bar.refresh()

    def add(self, size: int) -> None:
        """The bar fills."""
        self._bar.update(size)

    def close(self) -> None:
        """The bar goes."""
        self._bar.close()


def _bar(wanted: Wanted) -> Bar:
    """On a terminal a bar, elsewhere a line."""
    if sys.stderr.isatty():
        return _Shown(wanted)
    click.echo(f"warming {wanted.name} ({wanted.platform})", err=True)
    return _Hidden()


def _tell(text: str) -> None:
    tqdm.write(printable(text, 2048), file=sys.stderr)  # above the bars


def _no_bar(_: Wanted) -> Bar:
    return _Hidden()
