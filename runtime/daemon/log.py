"""Structured logs on stderr: one line for each event, ``time=... level=info event=ready pid=12 ...`` (logfmt)."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from datetime import UTC, datetime

_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.,:;/+*%@~#()[]{}<>|!?&^$")


class Logfmt(logging.Formatter):
    """Formatter of log records as logfmt lines. A log record's message is the name of the event.

    Log records of ``log_event`` have further fields.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line: time, level, event, fields, and the traceback of an exception."""
        created = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, object] = {
            "time": created.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        fields |= getattr(record, "fields", {"logger": record.name})
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return " ".join(f"{name}={_value(value)}" for name, value in fields.items())


def _value(value: object) -> str:
    text = str(value)
    return text if text and set(text) <= _PLAIN else json.dumps(text, ensure_ascii=not text.isprintable())


def log_event(log: logging.Logger, event: str, level: int = logging.INFO, **fields: object) -> None:
    """Log an event with its fields. ``event`` is a name of a few words joined by hyphens."""
    log.log(level, event, extra={"fields": fields})


class RateLimitedLog:
    """Log of an event that clients can cause any number of times: at most one line in ``pause`` seconds. Thread-safe.

    Events in between are only counted. The field ``unsaid`` of the next line is their number.
    """

    def __init__(self, log: logging.Logger, event: str, level: int = logging.WARNING, *, pause: float = 1.0) -> None:
        self._log = log
        self._event = event
        self._level = level
        self._pause = pause
        self._lock = threading.Lock()  # guards: the two fields below
        self._next = 0.0  # on the monotonic clock
        self._unsaid = 0

    def log(self, **fields: object) -> None:
        """Log the event, or only count it if the last line is less than ``pause`` seconds old."""
        now = time.monotonic()
        with self._lock:
            if now < self._next:
                self._unsaid += 1
                return
            unsaid, self._unsaid = self._unsaid, 0
            self._next = now + self._pause
        log_event(self._log, self._event, self._level, **fields, **({"unsaid": unsaid} if unsaid else {}))


def log_to_stderr() -> None:
    """Write everything that this process logs, from level INFO on, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Logfmt())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.raiseExceptions = False  # a closed stderr must not stop the work
