from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest

from moetier.tools.bench.output import BenchInterrupted, Spread, alternate, busy_notes
from moetier.tools.rates.hardware import CpuTimes


def test_every_way_once_a_round_and_none_always_first() -> None:
    told: list[str] = []

    def way(name: str) -> int:
        told.append(name)
        return len(told)

    found = alternate(3, {name: lambda name=name: way(name) for name in "abc"})
    assert "".join(told) == "abc" + "acb" + "cab"  # the second begins with b, and goes backwards
    assert found == {"a": [1, 4, 8], "b": [2, 6, 9], "c": [3, 5, 7]}


def test_no_round_begins_that_would_end_too_late() -> None:
    soon, later = time.monotonic(), time.monotonic() + 300
    assert alternate(3, {"a": lambda: 1}, until=soon) == {"a": [1]}
    assert alternate(3, {"a": lambda: 1}, until=later) == {"a": [1, 1, 1]}


def test_what_was_measured_before_ctrl_c_is_kept() -> None:
    """The interrupted run is not; and it is told how long the rest takes."""
    told: list[str] = []
    runs = iter([1, 2, 3])

    def way() -> int:
        if (number := next(runs, None)) is None:
            raise KeyboardInterrupt
        return number

    with pytest.raises(BenchInterrupted) as caught:
        alternate(3, {"a": way, "b": way}, say=told.append)
    assert caught.value.results == {"a": [1, 3], "b": [2]}
    assert told == ["round 1 of 3: a", "round 1 of 3: b", *(f"round 2 of 3, about 0 s left: {n}" for n in "ab")]


def test_a_note_says_that_the_machine_was_busy() -> None:
    now = CpuTimes.read()
    worked = replace(now, now=now.now - 100, work=now.work - 100 * len(os.sched_getaffinity(0)))
    (note,) = busy_notes(worked)
    assert note.startswith("busy     other processes used ")
    assert note.endswith(" CPUs meanwhile: without them it may be twice as fast; run it again then")
    assert busy_notes(replace(now, now=now.now - 1e6)) == []


def test_a_spread() -> None:
    spread = Spread.of([3.0, 1.0, 8.0])
    assert (spread.median, spread.min, spread.max) == (3.0, 1.0, 8.0)
    assert spread.to_json() == {"median": 3.0, "min": 1.0, "max": 8.0, "runs": [3.0, 1.0, 8.0]}
    assert spread.text(unit=2, digits=1) == "1.5 (0.5 to 4.0)"
    assert Spread.of([2.0]).text() == "2.00"
