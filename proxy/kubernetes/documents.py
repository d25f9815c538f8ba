"""Documents of YAML or JSON that others wrote, as plain values: bounded in size, in depth, and in what aliases make of them.

What is wrong is said by file and line. Nothing of the text is quoted: it may hold a secret.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn

import yaml

from proxy.unique import KeyTwice, unique

MAX_BYTES = 32 * 1024 * 1024
_MAX_DEPTH = 100
_MAX_VALUES = 2_000_000  # with each alias counted as what it stands for
_DEEP = "nested too deep"
_TWICE = "a key stands twice in one mapping"


class DocumentsInvalid(ValueError):
    """What was read cannot be used; the text names the file and the place, and quotes nothing of it."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document: ``number`` counts from 1 in its ``source``."""

    source: str
    number: int
    value: object = field(repr=False)


def parse_documents(text: bytes, source: str) -> list[Document]:
    """The documents of a file, empty ones left out; raises ``DocumentsInvalid``."""
    if len(text) > MAX_BYTES:
        _refuse(source, f"larger than {MAX_BYTES // 1024 // 1024} MiB")
    try:
        decoded = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
    else:
        values = _json(decoded, source) if decoded.lstrip()[:1] in ("{", "[") else None
        values = _yaml(decoded, source) if values is None else values
        return [Document(source, number, value) for number, value in enumerate(values, start=1) if value is not None]
    _refuse(source, f"line {line}: not UTF-8")


def _json(text: str, source: str) -> list[object] | None:
    """None where it is not JSON: in YAML too a document may begin with a brace."""
    try:
        value = json.loads(text, object_pairs_hook=unique)
        if "\\ud" in text.lower():  # half of a surrogate pair could not be printed
            json.dumps(value, ensure_ascii=False).encode()
        return [value]
    except UnicodeEncodeError:
        fault = "a text in it is not Unicode"
    except KeyTwice:
        fault = _TWICE
    except RecursionError:
        fault = _DEEP
    except ValueError:
        return None
    _refuse(source, fault)


def _yaml(text: str, source: str) -> list[object]:
    try:
        _check_depth(text, source)
        return list(_values(_Loader(text), source))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        fault = f"line {mark.line + 1}, column {mark.column + 1}: not YAML" if mark else "not YAML"
    except yaml.reader.ReaderError as error:
        fault = f"line {text.count(chr(10), 0, error.position) + 1}: a character that YAML does not allow"
    except DocumentsInvalid:
        raise
    except Exception:  # PyYAML also raises what its documentation does not name
        fault = "not YAML"
    _refuse(source, fault)


def _check_depth(text: str, source: str) -> None:
    """Before anything recurs: what composes the nodes ends the process where they are nested too deep."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _MAX_DEPTH:
                _refuse(source, f"{_line(event)}: {_DEEP}")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _values(loader: _Loader, source: str) -> Iterator[object]:
    try:
        while loader.check_node():
            node = loader.get_node()
            assert node is not None
            place = f"the document at {_line(node)}"
            if _size(node, {}, source) > _MAX_VALUES:
                _refuse(source, f"{place}: too many values, perhaps by its aliases")
            try:
                yield loader.construct_document(node)
            except ValueError:
                fault = f"{place}: a number in it is none"
            else:
                continue
            _refuse(source, fault)
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, int], source: str) -> int:
    """How many values there are, each alias counted as what it stands for."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if (size := known.get(id(node))) is not None:
        if not size:
            _refuse(source, f"{_line(node)}: it holds itself")
        return size
    known[id(node)] = 0
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            _refuse(source, f"{_line(node)}: {_TWICE}")
        size = sum(_size(part, known, source) for pair in node.value for part in pair)
    else:
        size = sum(_size(part, known, source) for part in node.value)
    known[id(node)] = size + 1
    return size + 1


def _line(at: yaml.Event | yaml.Node) -> str:
    return f"line {at.start_mark.line + 1}" if at.start_mark is not None else "a line"


def _refuse(source: str, fault: str) -> NoReturn:
    raise DocumentsInvalid(f"{source}: {fault}") from None


class _Loader(yaml.CSafeLoader):
    """Leaves dates as texts, as Kubernetes does."""

    def resolve(self, kind: type[yaml.Node], value: str | None, implicit: tuple[bool, bool] | bool) -> str:
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        return "tag:yaml.org,2002:str" if tag == "tag:yaml.org,2002:timestamp" else tag
