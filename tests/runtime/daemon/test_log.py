"""Log lines, and the events that would be too many of them."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from threads import run_all

from moetier.runtime.daemon import log as logfmt
from moetier.runtime.daemon.log import Logfmt, RateLimitedLog, log_event

LOG = logging.getLogger("test")


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [Logfmt().format(record).partition(" ")[2] for record in caplog.records]


def test_what_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    event = RateLimitedLog(LOG, "read-failed")
    event.log(cause="a bad bit", expert=3)
    assert lines(caplog) == ['level=warning event=read-failed cause="a bad bit" expert=3']


def test_what_others_say_cannot_write_to_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    for cause in ("\x1b]0;owned\x07", "\x9b31m\n", "perché no"):
        log_event(LOG, "read-failed", logging.ERROR, cause=cause)
    causes = [line.partition("cause=")[2] for line in lines(caplog)]
    assert causes == ['"\\u001b]0;owned\\u0007"', '"\\u009b31m\\n"', '"perché no"']


def test_a_flood_is_a_line_a_pause_and_none_is_uncounted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    event, now = RateLimitedLog(LOG, "refused", pause=0.2), 100.0
    monkeypatch.setattr(logfmt, "time", SimpleNamespace(monotonic=lambda: now))

    def many() -> None:
        for _ in range(1000):
            event.log(cause="x")

    event.log(cause="first")
    for _ in range(3):
        run_all([many] * 4)
        now += 0.201
    now -= 0.1
    event.log(cause="not said")
    now += 0.1
    event.log(cause="again")
    first, *others, last = lines(caplog)
    assert first == "level=warning event=refused cause=first"
    assert others == [f"level=warning event=refused cause=x unsaid={unsaid}" for unsaid in (4000, 3999)]
    assert last == "level=warning event=refused cause=again unsaid=4000"
