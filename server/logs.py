"""The log lines of a service's processes: each says which service, shard, step and generation it is of."""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Callable, Mapping

from .config import LogFormat

Context = Mapping[str, str | int]
"""What a line is of, by name."""


def begin_logs(log_format: LogFormat, read: Callable[[], Context]) -> None:
    """Have this process, an actor of a service, write our lines to its stderr, which Ray keeps.

    Args:
        log_format: ``"text"``, or ``"json"``: one object a line.
        read: What a line is of, at the moment when it is written.
    """
    handler = logging.StreamHandler()
    handler.addFilter(ContextFilter(read))
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logger = logging.getLogger("stepwell")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # or Ray's own handler would write the line once more


class ContextFilter(logging.Filter):
    """Notes with each record what it is of; lets all pass.

    Args:
        read: See :func:`begin_logs`.
    """

    def __init__(self, read: Callable[[], Context]) -> None:
        super().__init__()
        self._read = read

    def filter(self, record: logging.LogRecord) -> bool:
        """See :class:`logging.Filter`."""
        record.stepwell = self._read()
        return True


class TextFormatter(logging.Formatter):
    """``time LEVEL service=trainer shard=0 step=12 generation=1.2: message``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(of)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """See :class:`logging.Formatter`."""
        record.of = " ".join(f"{name}={value}" for name, value in context_of(record).items())
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """One object a line: ``time`` (UTC), ``level``, ``message``, what it is of, ``exception`` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """See :class:`logging.Formatter`."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        fields: dict[str, str | int] = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "message": record.getMessage(),
            **context_of(record),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def context_of(record: logging.LogRecord) -> Context:
    """What :class:`ContextFilter` has noted."""
    context: Context = record.__dict__["stepwell"]
    return context
