"""Numbers of options, looked at as they are read: on a command line, and in what is set beforehand."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moetier.tiers.errors import ConfigError

MOST = (1 << 31) - 1  # of what is counted: with any number of digits one would compute for ever, or overflow


@dataclass(frozen=True)
class Number:
    """The type of an option. ``fix`` says what to give."""

    kind: type[int] | type[float]
    least: float
    most: float
    fix: str

    def __call__(self, text: str) -> float:
        """Raises ConfigError for what is out of range, ValueError for what is no number."""
        number = self.kind(text)
        if not self.least <= number <= self.most or number == math.inf:
            raise ConfigError(f"{text} is out of range.", self.fix)
        return number

    @property
    def __name__(self) -> str:
        """What argparse calls it."""
        return self.kind.__name__


TINY = math.ulp(0.0)  # more than 0
COUNT = Number(int, 1, MOST, "Give 1 to 2^31 - 1.")
SECONDS = Number(float, TINY, 86_400, "Give more than 0, to 86,400 at most.")
