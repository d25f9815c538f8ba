"""Log lines: no secret, no forged line, and JSON that parses."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.logs import JsonFormatter, LogFormat, TextFormatter, printable, redact, set_up


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GET https://cdn.test/blob?X-Amz-Signature=secret&b=secret HTTP", "GET https://cdn.test/blob?[redacted] HTTP"),
        ("'https://cdn.test/a?sig=secret', x", "'https://cdn.test/a?[redacted]', x"),
        ("(https://cdn.test/?secret)", "(https://cdn.test/?[redacted])"),
        ("https://cdn.test?secret", "https://cdn.test?[redacted]"),
        ("/v2/a/blobs/sha256:ab?ns=secret", "/v2/a/blobs/sha256:ab?[redacted]"),
        ("a/b-?secret=1 and c/d?secret=2", "a/b-?[redacted] and c/d?[redacted]"),
        ("https://user:secret@corp.test/x", "https://corp.test/x"),
        ("http://secret@corp.test", "http://corp.test"),
        ("Authorization: Bearer secret.abc-_~+/==", "Authorization: Bearer [redacted]"),
        ("authorization: basic c2VjcmV0", "authorization: basic [redacted]"),
        ("BEARER\tsecret", "BEARER [redacted]"),
        ("b'Basic secret='", "b'Basic [redacted]'"),
        ("is it up? yes", "is it up? yes"),
        ("user@corp.test", "user@corp.test"),
        ("https://corp.test/v2/", "https://corp.test/v2/"),
    ],
)
def test_secrets_are_cut_off(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("https://cdn.test/a~?sig=secret", id="tilde-before-the-query"),
        pytest.param("https://cdn.test/a=?sig=secret", id="equals-before-the-query"),
        pytest.param("https://cdn.test/a+?sig=secret", id="plus-before-the-query"),
        pytest.param("https://[::1]?sig=secret", id="bracket-before-the-query"),
        pytest.param("https://cdn.test/(a)?sig=secret", id="parenthesis-before-the-query"),
        pytest.param("https://cdn.test/a?b=(c)&sig=secret", id="parenthesis-in-the-query"),
        pytest.param("https://cdn.test/a?b='c'&sig=secret", id="quote-in-the-query"),
        pytest.param("https://user:p@secret@corp.test/x", id="at-in-the-password"),
        pytest.param("https://user:it's-secret@corp.test/x", id="quote-in-the-password"),
    ],
)
def test_no_character_that_urls_may_hold_ends_the_cut(text: str) -> None:
    assert "secret" not in redact(text)


SECRET = st.text("abcdefXYZ0123456789._~+/-", min_size=8, max_size=40).map(lambda text: f"S3CR3T{text}")


@given(
    SECRET,
    st.sampled_from(
        ["Bearer {}", "bearer  {}", "Basic {}==", "https://cdn.test/x?a={}", "https://cdn.test/x?{}&b=1", "/v2/a?x=1&y={}"]
    ),
    st.sampled_from(["", " ", "GET ", "'", '"']),
)
def test_no_secret_passes_in_any_field(secret: str, form: str, before: str) -> None:
    text = before + form.format(secret)
    record = logging.LogRecord("proxy", logging.INFO, "", 0, "said %s", (text,), None)
    record.fields = {"url": text}
    for formatter in (TextFormatter(), JsonFormatter()):
        assert "S3CR3T" not in formatter.format(record)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb", "a??b"),
        ("\0\x1b[31m\x7f\x85\u2028\u2029", "??[31m????"),
        ("\u00e9\u4e2d", "\u00e9\u4e2d"),
        ("a" * 300, "a" * 256),
    ],
)
def test_control_characters_do_not_pass(text: str, expected: str) -> None:
    assert printable(text) == expected


def record_of(message: str, fields: dict[str, object]) -> logging.LogRecord:
    record = logging.LogRecord("proxy.access", logging.WARNING, "", 0, "%s", (message,), None)
    record.created = 0.5
    record.fields = fields
    return record


ANYTHING = st.text(max_size=60) | st.text('a\r\n\0\x1b\x85\u2028"\\?=@:/ ', max_size=30)
FIELDS = st.dictionaries(
    st.sampled_from(["status", "url", "client"]), ANYTHING | st.integers() | st.none() | st.booleans(), max_size=3
)


@given(ANYTHING, FIELDS)
def test_a_record_is_one_line_and_json_parses(message: str, fields: dict[str, object]) -> None:
    record = record_of(message, fields)
    text, line = TextFormatter().format(record), JsonFormatter().format(record)
    assert len(text.splitlines()) == 1
    assert len(line.splitlines()) == 1
    parsed = json.loads(line)
    assert {"time", "level", "logger", "message", *fields} == set(parsed)
    assert parsed["time"] == "1970-01-01T00:00:00.500Z"
    assert parsed["level"] == "warning"


def test_an_exception_stays_on_the_line() -> None:
    try:
        raise ValueError("first\nsecond Bearer secret")
    except ValueError as error:
        record = logging.LogRecord("proxy", logging.ERROR, "", 0, "failed", (), (ValueError, error, error.__traceback__))
    for formatter in (TextFormatter(), JsonFormatter()):
        line = formatter.format(record)
        assert len(line.splitlines()) == 1
        assert "ValueError" in line
        assert "secret" not in line


def test_text_lines_say_time_level_logger_message_and_fields() -> None:
    line = TextFormatter().format(record_of("done", {"status": 200, "url": 'a "b"'}))
    assert line == '1970-01-01T00:00:00.500Z warning proxy.access: done status=200 url="a \\"b\\""'


@pytest.fixture
def restored() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("", "asyncio", "aiohttp.server")]
    before = [(logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_every_logger_of_the_process_writes_there(log_format: LogFormat) -> None:
    stream = io.StringIO()
    set_up(log_format, "info", stream)
    logging.getLogger("some.library").warning("asked https://cdn.test/?secret")
    logging.getLogger("some.library").debug("unseen")
    logging.getLogger("aiohttp.server").error("bad header: Authorization: hunter2")
    (line,) = stream.getvalue().splitlines()
    assert "asked https://cdn.test/?[redacted]" in line
    assert line.startswith("{") is (log_format == "json")
