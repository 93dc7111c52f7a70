"""From when on it is worth to read a record on a guess. Pure.

A right guess saves what has been read of it when its demand comes. A wrong one is in the way of that demand's reads
for as long as it can't stand back, and has evicted what may be wanted again. With probability p that it is right, a
read is expected to gain p * saved - (1 - p) * cost seconds of whoever decodes.
"""

from __future__ import annotations

from moetier.tiers.source import Pace


def break_even(pace: Pace, *, lacks: float, regrets: float) -> float:
    """The probability from which on a read gains; 1 where none does. A share of demands, ``lacks``, has to wait for
    reads, and a share of what is evicted, ``regrets``, would have been used again. What idle time there is for guesses
    is in what they have saved."""
    cost = lacks * min(max(pace.read - pace.saved, 0.0), pace.grain) + regrets * pace.read
    return cost / (pace.saved + cost) if pace.saved > 0 else 1.0
