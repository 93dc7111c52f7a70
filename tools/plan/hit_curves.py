"""How often experts are found in memory, by the share of them that is there: from traces of real models, bundled.

``tests/measurements/hit_curves.py`` makes ``hit_curves.json``. For another model it is an estimate, and no more.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

FILE = "hit_curves.json"


@dataclass(frozen=True, slots=True)
class HitCurve:
    """Of one trace's decoding: with ``shares`` of each block's experts cached, ascending to 1."""

    trace: str
    experts: int  # of a block
    top_k: int
    shares: tuple[float, ...]
    hit_ratios: tuple[float, ...]

    def at(self, share: float) -> float:
        """Between two points of the curve, straight; it begins at nothing."""
        if share >= 1:
            return 1.0
        low, below = 0.0, 0.0
        for high, above in zip(self.shares, self.hit_ratios, strict=True):
            if share <= high:
                return below + (above - below) * (share - low) / (high - low)
            low, below = high, above
        return below

    def distance(self, experts: int, top_k: int) -> float:
        """From a block of so many: doublings of either number."""
        return abs(math.log2(experts / self.experts)) + abs(math.log2(top_k / self.top_k))


@cache
def hit_curves() -> tuple[HitCurve, ...]:
    found = json.loads((files(__package__) / FILE).read_text())
    return tuple(
        HitCurve(c["trace"], c["experts"], c["top_k"], tuple(c["shares"]), tuple(c["hit_ratios"]))
        for c in found["curves"]
    )


def nearest_curve(experts: int, top_k: int) -> HitCurve:
    return min(hit_curves(), key=lambda curve: curve.distance(experts, top_k))
