"""The layers of ``proxy/``, read from its source: who may import whom, and what the pure modules do without.

A module imports only from rows below its own. Members of one package (``cli/``, ``pull/``, ``access/``, ...) may import each
other as long as no circle comes of it; modules that merely stand in one row may not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "proxy"

ROWS = (
    {"__main__"},
    {"cli/*"},
    {"serve"},
    {"app"},
    {"admin"},
    {"listener"},
    {"edge"},  # edge stands above handlers: it calls them, and takes DECISION and Handler from there
    {"handlers"},
    {"send"},
    {"explain", "pull/*", "warm"},
    {"kubernetes/*"},
    {"answers", "access/*"},
    {"fetch", "held"},
    {"spool", "admission"},
    {"policy", "image_pull_policy", "upstream/*", "storage/*"},
    {"backoff"},
    {"credentials/*"},  # storage and upstream know whose a link or a request is, and nothing of who may read
    {"listings", "rules", "platforms"},
    {"config/*", "manifests", "watch"},
    {"globs"},
    {"names", "ranges", "once", "threads", "certificates", "files", "unique"},
    {"errors", "logs", "metrics"},
    {"__init__"},
)
"""From the outside in."""

FOREIGN = {
    "aiohttp": {"upstream/*", "send", "listener", "edge", "handlers", "admin", "app", "serve"},
    "sqlite3": {"storage/*"},
    "click": {"cli/*"},
    "tqdm": {"cli/warm"},
    "yaml": {"config/file", "kubernetes/documents", "credentials/docker_config", "credentials/providers"},
    "pydantic": {"config/*"},
    "prometheus_client": {"metrics", "upstream/*"},
    "ssl": {"upstream/*", "certificates", "cli/admin"},
    "bcrypt": {"access/htpasswd"},
}
"""Libraries that only some may know."""

PURE = (
    "names",
    "ranges",
    "globs",
    "unique",
    "manifests",
    "platforms",
    "listings",
    "policy",
    "backoff",
    "rules",
    "image_pull_policy",
    "kubernetes/documents",
    "kubernetes/pods",
    "kubernetes/kustomize",
    "admission",
    "errors",
    "upstream/challenge",
    "upstream/addresses",
    "upstream/quota",
    "credentials/credential",
    "credentials/docker_config",
    "credentials/keyring",
    "access/authorization",
    "access/caller",
)
NOT_PURE = frozenset(
    {
        "asyncio",
        "threading",
        "time",
        "datetime",
        "os",
        "io",
        "pathlib",
        "aiofiles",
        "tempfile",
        "subprocess",
        "random",
        "secrets",
        "logging",
    }
)


def modules() -> dict[str, ast.Module]:
    """Every module by its path below ``proxy/`` without ``.py``; a package is its name with ``/__init__``."""
    return {
        path.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    }


MODULES = modules()


def group(module: str) -> str:
    return f"{module.partition('/')[0]}/*" if "/" in module else module


def row(module: str) -> int:
    for number, names in enumerate(ROWS):
        if module in names or group(module) in names:
            return number
    raise AssertionError(f"proxy/{module}.py is in no row; decide where it belongs")


def module_of(dotted: str) -> str | None:
    """The module of ours that a dotted name is, or is in."""
    parts = dotted.split(".")
    if parts[0] != "proxy":
        return None
    path = "/".join(parts[1:])
    if path in MODULES:
        return path
    if f"{path}/__init__".lstrip("/") in MODULES:
        return f"{path}/__init__".lstrip("/")
    return module_of(".".join(parts[:-1]))


def imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names of what a module imports, at its top or later; names imported from a module included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(module: str) -> set[str]:
    return {found for dotted in imports(MODULES[module]) if (found := module_of(dotted)) is not None}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_below(module: str) -> None:
    for imported in own_imports(module):
        if group(module) == group(imported) and "/" in module:
            continue
        assert row(imported) > row(module), f"proxy/{module}.py imports proxy/{imported}.py, which is not below it"


def test_every_row_has_its_modules() -> None:
    present = {group(module) for module in MODULES}
    for names in ROWS:
        assert names <= present, f"{names - present} is gone; take it off the table"


def test_there_is_no_circle() -> None:
    edges = {module: own_imports(module) - {module} for module in MODULES}
    while edges:
        leaves = {module for module, targets in edges.items() if not targets & edges.keys()}
        assert leaves, f"these import each other in a circle: {sorted(edges)}"
        edges = {module: targets for module, targets in edges.items() if module not in leaves}


@pytest.mark.parametrize("library", FOREIGN)
def test_a_library_is_known_only_where_it_belongs(library: str) -> None:
    users = {module for module, tree in MODULES.items() if any(dotted.split(".")[0] == library for dotted in imports(tree))}
    allowed = FOREIGN[library]
    assert users, "nobody uses it; take it off the table"
    assert not {module for module in users if module not in allowed and group(module) not in allowed}


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_have_no_async_no_clock_no_file(module: str) -> None:
    tree = MODULES[module]
    for node in ast.walk(tree):
        assert not isinstance(node, (ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith, ast.Await)), f"line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("open", "print", "input"), f"line {node.lineno}"
    assert not {dotted.split(".")[0] for dotted in imports(tree)} & NOT_PURE


MUTABLE_CALLS = frozenset(
    {
        "dict",
        "list",
        "set",
        "bytearray",
        "Counter",
        "defaultdict",
        "OrderedDict",
        "deque",
        "TTLCache",
        "LRUCache",
        "TLRUCache",
        "Once",
        "Lock",
        "Event",
        "Queue",
        "WeakSet",
    }
)
CHANGERS = frozenset(
    {"append", "add", "update", "setdefault", "pop", "popitem", "clear", "extend", "insert", "remove", "discard", "inc"}
)


def name_of(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)):
        return True
    if isinstance(value, ast.Call):
        function = value.func.value if isinstance(value.func, ast.Subscript) else value.func
        return name_of(function) in MUTABLE_CALLS
    return isinstance(value, ast.BinOp) and (is_mutable(value.left) or is_mutable(value.right))


def assignments(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr | None, int]]:
    """Names bound at the top of a module or of its classes."""
    for statement in body:
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                yield name_of(target), statement.value, statement.lineno
        elif isinstance(statement, ast.AnnAssign):
            yield name_of(statement.target), statement.value, statement.lineno
        elif isinstance(statement, (ast.ClassDef, ast.If, ast.Try, ast.With)):
            yield from assignments(statement.body)


def is_constant(name: str) -> bool:
    return name.lstrip("_").isupper() or name in ("model_config", "__all__")


@pytest.mark.parametrize("module", MODULES)
def test_no_module_and_no_class_keeps_state(module: str) -> None:
    for name, value, line in assignments(MODULES[module].body):
        assert is_constant(name) or not is_mutable(value), f"proxy/{module}.py:{line}: {name} is state that everybody shares"


@pytest.mark.parametrize("module", MODULES)
def test_constants_are_not_changed(module: str) -> None:
    """Whatever has an UPPER_CASE name is a constant, also where Python would let it change."""
    for node in ast.walk(MODULES[module]):
        assert not isinstance(node, ast.Global), f"line {node.lineno}: 'global' is state"
        line = getattr(node, "lineno", 0)
        changed: list[ast.expr] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGERS:
            changed = [node.func.value]
        elif isinstance(node, (ast.Assign, ast.Delete)):
            changed = [target.value for target in node.targets if isinstance(target, ast.Subscript)]
        elif isinstance(node, ast.AugAssign):
            changed = [node.target.value if isinstance(node.target, ast.Subscript) else node.target]
        for target in changed:
            assert not (isinstance(target, ast.Name) and target.id.lstrip("_").isupper()), f"proxy/{module}.py:{line}"


@pytest.mark.parametrize(
    ("source", "state"),
    [
        ("cache = {}", True),
        ("cache: dict[str, int] = dict()", True),
        ("class A:\n    tokens = []", True),
        ("seen = collections.Counter()", True),
        ("tokens = TTLCache[str, str](10, 60)", True),
        ("both = {} | {}", True),
        ("TABLE = {}", False),
        ("pattern = re.compile('a')", False),
        ("names = frozenset({'a'})", False),
        ("pair = ('a', 'b')", False),
    ],
)
def test_state_is_recognised(source: str, state: bool) -> None:
    assert (
        any(is_mutable(value) and not is_constant(name) for name, value, _ in assignments(ast.parse(source).body)) is state
    )
