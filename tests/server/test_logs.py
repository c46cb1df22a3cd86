"""Log lines of a service's processes, in words and as JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from stepwell.server.config import LogFormat, ServiceConfig, default_log_format
from stepwell.server.logs import Context, begin_logs

CONTEXT: dict[str, str | int] = {"service": "trainer", "shard": 1, "step": 12, "generation": "1.2"}


@pytest.fixture(autouse=True)
def _logger_as_before() -> Iterator[None]:
    logger = logging.getLogger("stepwell")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def read() -> Context:
    return dict(CONTEXT)


def test_text_line_says_what_it_is_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    begin_logs("text", read)
    logging.getLogger("stepwell").warning("shard %d: cut off", 1)
    monkeypatch.setitem(CONTEXT, "step", 13)
    logging.getLogger("stepwell.part").info("more")
    first, second = (line.split(" ", 2)[2] for line in capsys.readouterr().err.splitlines())
    assert first == "WARNING service=trainer shard=1 step=12 generation=1.2: shard 1: cut off"
    assert second == "INFO service=trainer shard=1 step=13 generation=1.2: more"


def test_json_line_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    begin_logs("json", read)
    try:
        raise ValueError("in two\nlines")
    except ValueError:
        logging.getLogger("stepwell").exception("a step failed")
    (line,) = capsys.readouterr().err.splitlines()
    fields = json.loads(line)
    assert fields.pop("time").endswith("+00:00")
    assert "ValueError: in two\nlines" in fields.pop("exception")
    assert fields == {"level": "ERROR", "message": "a step failed", **CONTEXT}


@pytest.mark.parametrize(("value", "expected"), [(None, "text"), ("", "text"), ("json", "json"), ("text", "text")])
def test_environment_chooses_the_form(value: str | None, expected: LogFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEPWELL_LOG", raising=False)
    if value is not None:
        monkeypatch.setenv("STEPWELL_LOG", value)
    assert default_log_format() == expected


def test_unknown_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWELL_LOG", "xml")
    with pytest.raises(ValueError, match=r"\$STEPWELL_LOG: expected one of \('text', 'json'\), got 'xml'"):
        default_log_format()
    with pytest.raises(ValueError, match="log_format: expected one of"):
        ServiceConfig("a", log_format="xml")  # type: ignore[arg-type]
