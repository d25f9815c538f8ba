"""Log lines as text or JSON, without secrets and without what a client could forge.

Query strings are where signed URLs and tokens live: they are cut off every URL that passes through a log line, ours or
a library's. Values of headers are never logged by us; aiohttp quotes them in its parse errors, so these are muted.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Literal, TextIO

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

_QUERY = re.compile(r"""\?[^\s"<>]*[^\s"<>'),.;:]""")
_USERINFO = re.compile(r"""(?<=://)[^/\s"<>]*@""")
_CREDENTIAL = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]+", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def redact(text: str) -> str:
    """``text`` without query strings, user information of URLs, and credentials."""
    return _CREDENTIAL.sub(r"\1 [redacted]", _USERINFO.sub("", _QUERY.sub("?[redacted]", text)))


def printable(text: str, limit: int = 256) -> str:
    """``text`` that came from outside, cut to ``limit`` characters, each control character as ``?``."""
    return _CONTROL.sub("?", text[:limit])


class _Formatter(logging.Formatter):
    def fields(self, record: logging.LogRecord) -> dict[str, object]:
        extra: dict[str, object] = getattr(record, "fields", {})
        return {key: printable(redact(value)) if isinstance(value, str) else value for key, value in extra.items()}

    def text(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += " " + " | ".join(self.formatException(record.exc_info).splitlines())
        return redact(text)

    def time(self, record: logging.LogRecord) -> str:
        return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class TextFormatter(_Formatter):
    """``time level logger: message key=value ...``, one line a record."""

    def format(self, record: logging.LogRecord) -> str:
        parts = [f"{self.time(record)} {record.levelname.lower()} {record.name}: {printable(self.text(record), 4096)}"]
        parts += [
            f"{key}={json.dumps(value) if isinstance(value, str) else value}" for key, value in self.fields(record).items()
        ]
        return " ".join(parts)


class JsonFormatter(_Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self.text(record),
        }
        return json.dumps({**line, **self.fields(record)})


def set_up(log_format: LogFormat, level: LogLevel, stream: TextIO | None = None) -> None:
    """Sends every logger of the process through one handler to ``stream`` (standard error)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    # Its messages about bad requests quote header values, Authorization included; edge counts and answers these itself.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
