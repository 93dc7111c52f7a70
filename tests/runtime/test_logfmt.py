"""Log lines, and the events that would be too many of them."""

from __future__ import annotations

import logging
import time

import pytest
from threads import run_all

from moetier.runtime.logfmt import Logfmt, Sparing

LOG = logging.getLogger("test")


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [Logfmt().format(record).partition(" ")[2] for record in caplog.records]


def test_what_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    event = Sparing(LOG, "read-failed")
    event.say(cause="a bad bit", expert=3)
    assert lines(caplog) == ['level=warning event=read-failed cause="a bad bit" expert=3']


def test_a_flood_is_a_line_a_pause_and_none_is_uncounted(caplog: pytest.LogCaptureFixture) -> None:
    event = Sparing(LOG, "refused", pause=0.2)

    def many() -> None:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            event.say(cause="x")

    began = time.monotonic()
    event.say(cause="first")
    run_all([many] * 4)
    time.sleep(0.2)
    event.say(cause="last")
    said = lines(caplog)
    assert 3 <= len(said) <= 1 + (time.monotonic() - began) / 0.2
    assert said[0] == "level=warning event=refused cause=first"
    assert all("unsaid=" in line for line in said[1:])
    event.say(cause="not said")
    time.sleep(0.2)
    event.say(cause="again")
    assert lines(caplog)[-1] == "level=warning event=refused cause=again unsaid=1"
