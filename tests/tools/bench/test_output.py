from __future__ import annotations

import time

from moetier.tools.bench.output import Spread, alternate


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


def test_a_spread() -> None:
    spread = Spread.of([3.0, 1.0, 8.0])
    assert (spread.median, spread.min, spread.max) == (3.0, 1.0, 8.0)
    assert spread.to_json() == {"median": 3.0, "min": 1.0, "max": 8.0, "runs": [3.0, 1.0, 8.0]}
    assert spread.text(unit=2, digits=1) == "1.5 (0.5 to 4.0)"
    assert Spread.of([2.0]).text() == "2.00"
