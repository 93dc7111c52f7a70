"""How often guesses are right, by how clear the gate was: its numbers rank guesses, and are no probabilities. Pure.

How clear is by how much a guess beats the best expert that the gate does not choose: a first that barely wins is less
likely right than a second that is far ahead of the third.
"""

from __future__ import annotations

BUCKETS = 12
FINE = 6.0  # buckets to a lead of 1: e times as likely
PRIOR = 0.5
MEMORY = 64  # guesses after which the oldest have faded to a third


class Confidence:
    """For each number of layers ahead."""

    def __init__(self, distances: int) -> None:
        """Of 0 to ``distances`` layers."""
        self._rates = [[PRIOR] * BUCKETS for _ in range(distances + 1)]
        self._seen = [[0] * BUCKETS for _ in range(distances + 1)]

    def of(self, distance: int, lead: float) -> float:
        """How likely a guess is right whose logit is ``lead`` above the best that is not chosen."""
        return self._rates[distance][_bucket(lead)]

    def learn(self, distance: int, lead: float, *, right: bool) -> None:
        bucket = _bucket(lead)
        seen = self._seen[distance][bucket] = min(self._seen[distance][bucket] + 1, MEMORY)
        rate = self._rates[distance][bucket]
        self._rates[distance][bucket] = rate + (right - rate) / (seen + 1)


def _bucket(lead: float) -> int:
    return int(min(FINE * lead, BUCKETS - 1.0)) if lead > 0 else 0  # no number at all is no lead
