"""Whether a guess is better for what a block's experts have given so far. Pure.

While some of a block's experts are read, others have been computed. What they give goes into the residual stream that
the next gate will see; but some architectures scale or normalise it first, or add more. So guesses are tried both
ways, with and without, and what names more of what is used is taken.
"""

from __future__ import annotations

TRIALS = 64  # guesses


class PartialSum:
    """Of one model. Without, until it is known."""

    def __init__(self) -> None:
        self._tried = 0
        self._more = 0  # that guesses with it have named rightly

    @property
    def is_tried(self) -> bool:
        """Whether it is not known yet: both ways are to be asked."""
        return self._tried < TRIALS

    @property
    def is_better(self) -> bool:
        return not self.is_tried and self._more > 0

    def judge(self, with_it: int, without: int) -> None:
        """So many experts did a guess name rightly, with and without."""
        if self.is_tried:
            self._tried += 1
            self._more += with_it - without
