"""From when on it is worth to read a record on a guess. Pure.

A right guess saves what has been read of it when its demand comes. A wrong one is in the way of the next demand that
has to read, for as long as it can't stand back, and has evicted what may be wanted again. With probability p that it is
right, a read is expected to gain p * saved - (1 - p) * cost seconds of whoever decodes.
"""

from __future__ import annotations

from moetier.tiers.source import Pace

NEGLIGIBLE = 1e-3


def break_even(pace: Pace, *, lacks: float, regrets: float) -> float:
    """The probability from which on a read gains; 1 where none does. A share of demands, ``lacks``, has to wait for
    reads, and a share of what is evicted, ``regrets``, would have been used again. What idle time there is for guesses
    is in what they have saved."""
    if pace.saved <= 0:
        return 1.0
    cost = _in_the_way(pace, lacks)
    if pace.saved >= pace.beside:  # a wrong one is under way as long as a right one, and has evicted something then
        cost += regrets * pace.read
    return cost / (pace.saved + cost)


def _in_the_way(pace: Pace, lacks: float) -> float:
    """Seconds that a wrong read is expected to delay demands. One comes whenever as much time has passed as a right
    read saves. Where reads can be given up it ends at the first, which is its own, and which comes anywhere in a piece:
    half of one is left on average; else it delays the first that reads."""
    left = pace.read - pace.saved
    if pace.grain < pace.read:
        return lacks * min(max(left, 0.0), pace.grain / 2)
    cost, chance = 0.0, lacks
    while left > 0 and chance > NEGLIGIBLE:
        cost += chance * left
        chance *= 1 - lacks
        left -= pace.saved
    return cost
