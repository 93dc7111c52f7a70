"""Chooses between two ways to compute steps by their times."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

AGAIN = 32  # after this many steps the slower way is tried once
WEIGHT = 0.25  # of a new time in the mean


class FasterWay:
    """Runs steps in the way that was faster for as many sequences. Both ways give the same result."""

    def __init__(self) -> None:
        self._times: dict[int, list[float]] = {}  # number of sequences -> mean seconds of each way; 0: not tried
        self._steps: dict[int, int] = {}

    def run(self, sequences: int, *ways: Callable[[], T]) -> T:
        """Compute a step of ``sequences`` sequences in the way of ``ways`` with the lower mean time.

        Every AGAIN-th step is computed in the slower way, whose time may have changed.
        """
        times = self._times.setdefault(sequences, [0.0] * len(ways))
        step = self._steps[sequences] = self._steps.get(sequences, 0) + 1
        pick = max if step % AGAIN == 0 else min
        way = pick(range(len(ways)), key=times.__getitem__)
        begin = time.perf_counter()
        result = ways[way]()
        seconds = time.perf_counter() - begin
        times[way] += (seconds - times[way]) * (WEIGHT if times[way] else 1.0)
        return result
