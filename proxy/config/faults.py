"""What is wrong of one key, in plain words: where it stands, and what to write. Read from the models, so it stays true."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from proxy.config.model import Config

Fields = dict[str, FieldInfo]
"""The keys of a section, as they are written."""


def keys() -> set[str]:
    """Every key of the configuration, as it is written."""
    return {key for fields in sections().values() for key in fields}


def explained(error: ValidationError) -> list[str]:
    """A line for each fault, without any value that was given."""
    return [_explain(item) for item in error.errors(include_url=False, include_context=False, include_input=False)]


def sections() -> dict[str, Fields]:
    """The keys of each section; a section is its path, as ``upstreams[].timeouts``, and empty for the top level."""
    return dict(_walk(Config, ""))


def _walk(model: type[BaseModel], path: str) -> Iterator[tuple[str, Fields]]:
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    yield path, fields
    for key, field in fields.items():
        inner = f"{path}.{key}".lstrip(".") + ("[]" if get_origin(field.annotation) is list else "")
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _walk(part, inner)


def _explain(item: Any) -> str:
    kind, place = item["type"], item["loc"]
    message = _PLAIN.get(kind) or item["msg"].removeprefix("Value error, ").replace("Input should be", "it has to be", 1)
    if kind == "extra_forbidden":
        message = _unknown(place)
    elif kind == "model_type" and not place:
        message = "the file must be keys and values; write for example 'listen: 127.0.0.1:5000'"
    elif kind in ("missing", "model_type"):
        message += _form(place)
    return f"{_path(place)}: {message}" if place else message


def _path(place: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")


def _beside(place: Sequence[str | int]) -> Fields:
    """The keys that there are where this one stands."""
    return sections().get(re.sub(r"\[\d+\]", "[]", _path(place[:-1])), {})


def _unknown(place: Sequence[str | int]) -> str:
    key = str(place[-1])
    near = difflib.get_close_matches(key, _beside(place), n=1)
    homes = [f"under {path}" if path else "at the top level" for path, fields in sections().items() if key in fields]
    meant = f"; did you mean '{near[0]}'?" if near else ""
    belongs = f"{'' if near else ';'} {key} belongs {' or '.join(homes)}" if homes else ""
    return f"unknown key{meant}{belongs}"


def _form(place: Sequence[str | int]) -> str:
    """What may be written there: the words there are, or an example."""
    while isinstance(place[-1], int):
        place = place[:-1]
    if (field := _beside(place).get(str(place[-1]))) is None:
        return ""
    if words := [repr(word) for word in get_args(field.annotation) if isinstance(word, str)]:
        return f": {', '.join(words[:-1])} or {words[-1]}"
    return f"; write for example '{field.examples[0]}'" if field.examples else ""


_PLAIN = {
    "missing": "is needed",
    "model_type": "keys are needed below it",
    "list_type": "a list is needed; write [..., ...]",
    "too_short": "at least one is needed",
    "bool_parsing": "true or false is needed",
    "bool_type": "true or false is needed",
    "string_type": "a text is needed",
    "greater_than": "more than 0 is needed",
}
"""What a kind of fault is called, where pydantic speaks to programmers."""
