"""How often guesses are right, by how sure the gate was: its numbers rank guesses, and are no probabilities. Pure."""

from __future__ import annotations

import math

BUCKETS = 10  # by powers of two of the gate's number: 1 to 1/2, 1/2 to 1/4, ...
PRIOR = 0.5
MEMORY = 64  # guesses after which the oldest have faded to a third


class Confidence:
    """For each number of layers ahead."""

    def __init__(self, distances: int) -> None:
        """Of 0 to ``distances`` layers."""
        self._rates = [[PRIOR] * BUCKETS for _ in range(distances + 1)]
        self._seen = [[0] * BUCKETS for _ in range(distances + 1)]

    def of(self, distance: int, number: float) -> float:
        """How likely a guess is right of which the gate says ``number`` (0 to 1, or any score above)."""
        return self._rates[distance][_bucket(number)]

    def learn(self, distance: int, number: float, *, right: bool) -> None:
        bucket = _bucket(number)
        seen = self._seen[distance][bucket] = min(self._seen[distance][bucket] + 1, MEMORY)
        rate = self._rates[distance][bucket]
        self._rates[distance][bucket] = rate + (right - rate) / (seen + 1)


def _bucket(number: float) -> int:
    return min(max(int(-math.log2(number)), 0), BUCKETS - 1) if number > 0 else BUCKETS - 1
