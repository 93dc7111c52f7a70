"""Structured logs: one line an event, ``time=... level=info event=ready pid=12 ...`` (logfmt), on stderr."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from datetime import UTC, datetime

_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.,:;/+*%@~#()[]{}<>|!?&^$")


class Logfmt(logging.Formatter):
    """Of records that ``say`` made, and of all others: their message is the event."""

    def format(self, record: logging.LogRecord) -> str:
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


def say(log: logging.Logger, event: str, level: int = logging.INFO, **fields: object) -> None:
    """``event`` is a few words joined by hyphens, and names what happened; ``fields`` say to what."""
    log.log(level, event, extra={"fields": fields})


class Sparing:
    """Says one event whose occasions others make, as often as they like: at most once a second. ``unsaid``, in the next
    line, counts the times in between. Thread-safe."""

    def __init__(self, log: logging.Logger, event: str, level: int = logging.WARNING, *, pause: float = 1.0) -> None:
        self._log = log
        self._event = event
        self._level = level
        self._pause = pause
        self._lock = threading.Lock()  # guards the two below
        self._next = 0.0  # on the monotonic clock
        self._unsaid = 0

    def say(self, **fields: object) -> None:
        now = time.monotonic()
        with self._lock:
            if now < self._next:
                self._unsaid += 1
                return
            unsaid, self._unsaid = self._unsaid, 0
            self._next = now + self._pause
        say(self._log, self._event, self._level, **fields, **({"unsaid": unsaid} if unsaid else {}))


def log_to_stderr() -> None:
    """Everything that is logged in this process, from INFO on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Logfmt())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.raiseExceptions = False  # a log that nobody reads any more must not stop the work
