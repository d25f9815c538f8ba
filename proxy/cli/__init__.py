"""The command ``pullcache``: parses, calls, prints, exits. 0 is success; 2: it cannot do that as it was told to.

What takes long to import (the model of the configuration, aiohttp) is imported by the commands that need it:
``pullcache health`` runs every few seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from proxy import __version__

if TYPE_CHECKING:
    from proxy.config.model import Config

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pullcache")
def main() -> None:
    """A pull-through cache for container registries."""


@main.command("check-config")
@click.argument("file", type=_FILE)
def check_config(file: Path) -> None:
    """Checks a configuration FILE and names everything that is wrong with it."""
    config = _load(file)
    from proxy.cli.check import check

    faults, warnings = check(config)
    if faults:
        _refuse(faults)
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
    count = len(config.upstreams)
    names = ", ".join(upstream.name for upstream in config.upstreams)
    click.echo(f"{file}: good; {count} upstream{'s' if count > 1 else ''}: {names}")


@main.command()
@click.option("--config", "file", type=_FILE, help="The configuration (YAML). Without it: the public registries.")
@click.option("--listen", metavar="ADDRESS", help="Overrides 'listen', for example 0.0.0.0:5000.")
@click.option("--admin", metavar="ADDRESS", help="Overrides 'admin'.")
@click.option("--cache-directory", metavar="DIR", help="Overrides 'cache.directory'.")
def serve(file: Path | None, listen: str | None, admin: str | None, cache_directory: str | None) -> None:
    """Serves the cache until it is told to stop (SIGTERM, Ctrl-C)."""
    overrides: dict[str, object] = {key: value for key, value in (("listen", listen), ("admin", admin)) if value}
    if cache_directory:
        overrides["cache"] = {"directory": cache_directory}
    config = _load(file, overrides)
    from proxy.cli.serve import run  # aiohttp takes longer to import than all the rest

    sys.exit(run(config))


@main.command()
@click.option("--admin", metavar="HOST:PORT", default="127.0.0.1:5001", show_default=True, help="Its admin address.")
def health(admin: str) -> None:
    """Asks a running pullcache whether it is healthy: 0 if it is, else 1 and the reason."""
    from proxy.cli.health import run

    sys.exit(run(admin))


@main.command()
@click.argument("image")
@click.option("--config", "file", type=_FILE, help="Its configuration, which says where it is, and what it would do.")
@click.option("--admin", metavar="ADDRESS", help="Its admin address, or a URL.  [default: as --config says]")
@click.option("--token-file", type=_FILE, help="Holds what adminListener.tokenFile holds.")
@click.option("--ca-file", type=_FILE, help="The CA of its certificate, where that is none of the system's.")
@click.option("--platform", default="", metavar="OS/ARCH", help="Which has to be held. Without it: any.")
@click.option("--json", "as_json", is_flag=True, help="For programs: what the admin address answers.")
def explain(
    image: str,
    file: Path | None,
    admin: str | None,
    token_file: Path | None,
    ca_file: Path | None,
    platform: str,
    as_json: bool,
) -> None:
    """Says what pullcache would do about an IMAGE, and why: upstream, rules, policy, what is held, how its registry does.

    A running one is asked; where none runs, it is told from the configuration and the cache directory.
    """
    if not image:
        raise click.UsageError("an image is needed, for example docker.io/library/debian:12")
    config = _load(file) if file else None
    from proxy.cli.admin import Admin
    from proxy.cli.explain import run

    sys.exit(run(image, Admin(admin, config, token_file, ca_file), platform, as_json=as_json))


@main.command()
@click.argument("refs", metavar="[REF]...", nargs=-1)
@click.option(
    "-f", "--filename", "names", metavar="FILE|DIR|-", multiple=True, help="Kubernetes manifests, or a kustomization."
)
@click.option(
    "--platform", "platforms", metavar="OS/ARCH", multiple=True, help="Or 'all'. Without it: that of this machine."
)
@click.option("--check", is_flag=True, help="Only says what is missing; pulls nothing.")
@click.option("--server", metavar="URL", help="The pullcache.  [default: http://127.0.0.1:5000]")
@click.option("--config", "file", type=_FILE, help="Its configuration, which says where it is.")
@click.option("--ca-file", type=_FILE, help="The CA of its certificate, where that is none of the system's.")
@click.option("--admin", metavar="ADDRESS", help="Its admin address, which says what is held.  [default: as --server says]")
@click.option("--token-file", type=_FILE, help="Holds what adminListener.tokenFile holds.")
def warm(
    refs: tuple[str, ...],
    names: tuple[str, ...],
    platforms: tuple[str, ...],
    check: bool,
    server: str | None,
    file: Path | None,
    ca_file: Path | None,
    admin: str | None,
    token_file: Path | None,
) -> None:
    """Fetches images into a running pullcache: each REF, and all those of Kubernetes manifests, with the imagePullSecrets
    that stand there. 0: all are held; 1: some are not."""
    if not refs and not names:
        raise click.UsageError("nothing to do: give an image, or manifests with -f")
    if server and file:
        raise click.UsageError("--server and --config exclude each other")
    config = _load(file) if file else None
    from proxy.cli.warm import Where, run

    sys.exit(run(refs, names, platforms, check, Where(server, config, ca_file, admin, token_file)))


def _load(file: Path | None, overrides: dict[str, object] | None = None) -> Config:
    import asyncio

    from proxy.config.file import ConfigError, load, validate

    try:
        return asyncio.run(load(file, overrides)) if file else validate(overrides or {})
    except ConfigError as error:
        _refuse(error.faults)


def _refuse(faults: list[str]) -> NoReturn:
    for fault in faults:
        click.echo(fault, err=True)
    click.echo(f"the configuration has {len(faults)} fault{'s' if len(faults) > 1 else ''}", err=True)
    sys.exit(2)
