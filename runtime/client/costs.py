"""Measured times of fetches and of computations on other hosts, and how often experts were used recently."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable

RATE = 100e6  # bytes per second that fetches are expected to get before one was measured; 1 Gbit/s is 118e6
FORGET_BYTES = 64e6  # the rate is that of about the last FORGET_BYTES
HORIZON = 4096  # tokens after which a use counts 1/e. With fewer, no expert of large records is ever used often enough
DEVIATIONS = 3  # standard deviations by which an expert has to be used more than the one that it replaces


class FetchRate:
    """Bytes per second that fetches get while at least one is under way. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards: the fields below
        self._under_way = 0
        self._since = 0.0  # when (monotonic clock) the time of the fetches under way was counted last
        self._seconds = 0.0
        self._bytes = 0.0

    def begin(self) -> None:
        """Note that a fetch begins."""
        with self._lock:
            self._count()
            self._under_way += 1

    def end(self, nbytes: int) -> None:
        """Note that a fetch of ``nbytes`` ends; 0 if it has failed."""
        with self._lock:
            self._count()
            self._under_way -= 1
            self._bytes += nbytes
            if self._bytes > FORGET_BYTES:
                self._seconds, self._bytes = self._seconds / 2, self._bytes / 2

    @property
    def value(self) -> float:
        """Bytes per second."""
        with self._lock:
            return self._bytes / self._seconds if self._bytes else RATE

    def _count(self) -> None:
        """Count the time since the last change. The caller holds ``_lock``."""
        now = time.monotonic()
        if self._under_way:
            self._seconds += now - self._since
        self._since = now


class OutputSeconds:
    """Seconds that computations of one block on other hosts take for each output, with a share of the round trip.

    Daemons that compute at the same time count once. A longer time raises the estimate at most by half, as it may be an
    exception. The first time is not counted, as it includes making connections.
    """

    def __init__(self) -> None:
        self.value = 0.0  # 0 before the second computation, so that two are tried
        self._is_first = True

    def add(self, seconds: float, outputs: int) -> None:
        """Note that a computation of ``outputs`` outputs took ``seconds``."""
        newest = seconds / outputs
        if not self._is_first:
            self.value = min(newest, 1.5 * self.value) if self.value else newest
        self._is_first = False

    def fade(self) -> None:
        """Lower the estimate a little, because no host was asked to compute. So a host is asked again later."""
        self.value *= 0.95


class RecentUses:
    """Numbers of uses of each expert of a block, during about the last HORIZON tokens."""

    def __init__(self, experts: int) -> None:
        self._counts = [0.0] * experts
        self._weight = 1.0  # of a use by the present token; it grows, so that earlier uses count less

    def add(self, uses: Iterable[tuple[int, int]], tokens: int) -> None:
        """Count uses by ``tokens`` tokens; ``uses`` are experts with the number of tokens that use each."""
        self._weight *= (1 + 1 / HORIZON) ** tokens
        for expert, count in uses:
            self._counts[expert] += count * self._weight
        if self._weight > 1e100:
            weight, self._weight = self._weight, 1.0  # first: another thread must not add the old weight to new counts
            self._counts = [count / weight for count in self._counts]

    def of(self, expert: int) -> float:
        """Return the number of recent uses of an expert."""
        return self._counts[expert] / self._weight


def earns_slot(uses: float, least: float, price: float) -> bool:
    """Return whether to fetch a record into a slot, so that its expert is no longer computed on other hosts.

    This is the rule of ski rental: buy once renting has cost as much (Karlin et al. 1988, "Competitive snoopy
    caching"). The counts are random, so the difference must exceed the price by DEVIATIONS of its standard deviations.
    Otherwise two experts that are used equally often would evict each other again and again: with one deviation, a busy
    machine fetched 60 times as many bytes in ``tests/measurements/remote_compute.py``.
    ``tests/measurements/remote_compute_slots.py`` replays the rule.

    Args:
        uses: number of recent uses of the expert.
        least: that of the expert that would be evicted; 0 if a slot is empty.
        price: number of uses that other hosts compute in the time of a fetch.
    """
    return uses - least >= price + DEVIATIONS * math.sqrt(uses + least)
