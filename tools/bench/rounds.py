"""Alternating runs: each way once a round, in an order that changes, so that a machine's moods fall on all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Spread:
    """What several runs gave."""

    runs: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        return cls(tuple(values))

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def min(self) -> float:
        return min(self.runs)

    @property
    def max(self) -> float:
        return max(self.runs)

    def to_json(self) -> dict[str, Any]:
        return {"median": self.median, "min": self.min, "max": self.max, "runs": list(self.runs)}

    def text(self, unit: float = 1.0, digits: int = 2) -> str:
        """For people, in so many of what was measured: "1.20 (1.10 to 1.30)"."""
        middle, low, high = (f"{value / unit:.{digits}f}" for value in (self.median, self.min, self.max))
        return middle if len(self.runs) == 1 else f"{middle} ({low} to {high})"


def alternate(rounds: int, ways: Mapping[K, Callable[[], T]]) -> dict[K, list[T]]:
    """What each way gave in each round. Every round begins with the next way; every second goes backwards."""
    found: dict[K, list[T]] = {name: [] for name in ways}
    names = [*ways]
    for number in range(rounds):
        first = number % len(names)
        order = names[first:] + names[:first]
        for name in order if number % 2 == 0 else reversed(order):
            found[name].append(ways[name]())
    return found
