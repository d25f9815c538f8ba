"""The documents say what is: keys, files, versions, and the test behind every threat."""

from __future__ import annotations

import ast
import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import get_origin

import pytest
import yaml
from pydantic import BaseModel

from proxy import __version__
from proxy.config.faults import keys
from proxy.config.file import load, validate
from proxy.config.model import Config

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "config.example.yaml"
COMMENTED_KEY = re.compile(r"^(\s*(?:- )?)# ?(\s*(?:- )?[a-z][A-Za-z]*:(?: .*)?)$")


def read(name: str) -> str:
    return (ROOT / name).read_text()


def key_paths(model: type[BaseModel] = Config, before: str = "") -> Iterator[str]:
    """Every key as the README writes it: ``cache.directory``, ``upstreams[].name``."""
    for name, field in model.model_fields.items():
        path = before + (field.alias or name)
        inner = [part for part in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(part, type)]
        models = [part for part in inner if issubclass(part, BaseModel)]
        if not models:
            yield path
        for part in models:
            if field.annotation is not part:  # a list of them, or one that may be left out
                yield path
            yield from key_paths(part, f"{path}[]." if get_origin(field.annotation) is list else f"{path}.")


KEYS = sorted(set(key_paths()))


def uncommented(text: str) -> str:
    """The example with every key that is commented out."""
    lines = []
    for line in text.splitlines():
        known = COMMENTED_KEY.match(line)
        is_key = known is not None and known[2].strip().removeprefix("- ").partition(":")[0] in keys()
        lines.append(known[1] + known[2] if known is not None and is_key else line)
    return "\n".join(lines) + "\n"


def paths_in(value: object, before: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{before}{key}"
            yield from paths_in(item, f"{before}{key}." if isinstance(item, dict) else f"{before}{key}[].")
    elif isinstance(value, list):
        for item in value:
            yield from paths_in(item, before)


def test_the_keys_are_found() -> None:
    assert {
        "listen",
        "cache.directory",
        "upstreams",
        "upstreams[].name",
        "upstreams[].timeouts.connect",
        "log.level",
    } <= set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_in_the_example(key: str) -> None:
    assert key in set(paths_in(yaml.safe_load(uncommented(EXAMPLE.read_text()))))


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_in_the_readme(key: str) -> None:
    assert f"| `{key}` |" in read("README.md")


def test_the_readme_lists_no_key_that_is_none() -> None:
    section = read("README.md").partition("| `listen` |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)) <= set(KEYS)


def test_the_example_loads_as_it_stands() -> None:
    asyncio.run(load(EXAMPLE))


def test_each_key_of_the_example_loads(tmp_path: Path) -> None:
    """All that is commented out at once, but for what excludes each other: each of a pair in its turn."""
    text = re.sub(r"(?m)^(\s*)insecureSkipVerify:.*$", r"\1insecureSkipVerify: false", uncommented(EXAMPLE.read_text()))
    file = tmp_path / "config.yaml"
    for left_out in (r"client(Cert|Key)File", r"repositories"):
        file.write_text(re.sub(rf"(?m)^ {{4,6}}{left_out}:.*\n", "", text))
        asyncio.run(load(file))


EXAMPLES = re.findall(r"(?m)^    listen: .*\n(?:(?:    .*)?\n)*", read("docs/credentials.md"))


@pytest.mark.parametrize("example", EXAMPLES)
def test_each_example_to_copy_is_a_good_configuration(example: str) -> None:
    """But for the files that it names."""
    assert len(EXAMPLES) >= 8
    validate(yaml.safe_load(dedent(example)))


def rows() -> list[tuple[str, str]]:
    """Id and tests of each row of docs/threats.md."""
    found = []
    for line in read("docs/threats.md").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and re.fullmatch(r"[TF]\d\d\w?", cells[0]):
            found.append((cells[0], cells[-1]))
    return found


def functions_of(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }


def test_every_threat_names_a_test_that_exists() -> None:
    assert rows(), "docs/threats.md has no rows"
    faults = []
    for identity, cell in rows():
        named = re.findall(r"([\w/.-]+\.py)::(\w+)", cell)
        if not named:
            faults.append(f"{identity}: names no test")
        for file, function in named:
            if not (ROOT / file).is_file():
                faults.append(f"{identity}: {file} does not exist")
            elif not function.startswith("test_") or function not in functions_of(ROOT / file):
                faults.append(f"{identity}: {file} has no test {function}")
    assert not faults, "\n".join(faults)


def test_every_threat_has_one_row() -> None:
    identities = [identity for identity, _ in rows()]
    assert len(identities) == len(set(identities))


def named_files(text: str) -> set[str]:
    """What a document names as a file or folder of this repository: links, and code that looks like a path of ours."""
    links = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target}
    code = {word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split()}
    folders = tuple(f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
    paths = {word for word in code if word.startswith(folders) and re.fullmatch(r"[\w./-]+", word)}
    files = {
        word for word in code if re.fullmatch(r"[\w.-]+\.(?:md|toml|lock)|Makefile|Dockerfile|config\.example\.yaml", word)
    }
    return {name for name in links | paths | files if name}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_file_that_is_named_exists(document: str) -> None:
    named = named_files(read(document))
    assert named
    assert not {name for name in named if not (ROOT / name).exists()}


def test_the_changelog_has_the_present_version() -> None:
    assert re.search(rf"^## \[?{re.escape(__version__)}\b", read("CHANGELOG.md"), re.MULTILINE)
