"""What a workload lacks by itself, whatever is guessed: about what an LRU of as many slots would miss. Pure.

Steps take as long as reads take, and how many a step needs is chance. To know it tells how much longer a step took
because it guessed from how much longer it took because it needed more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence


class Shadow:
    """Of every block's slots."""

    def __init__(self, slots: Sequence[int]) -> None:
        """By block."""
        self.misses = 0
        self._demands = 0
        self._lacking = 0  # of the demands: those that missed anything
        self._guessed = 0  # misses of what was guessed before
        self._last = 0  # of these demands: those that hit what a wish would have evicted next
        self._slots = slots
        self._resident: list[dict[int, None]] = [{} for _ in slots]  # experts by block, the latest last

    @property
    def lacks(self) -> float:
        """The share of demands that miss anything."""
        return self._lacking / self._demands if self._demands else 1.0

    @property
    def regrets(self) -> float:
        """How often a record is used again that is evicted one miss too early."""
        return min(self._last / self._guessed, 1.0) if self._guessed else 0.0

    def demand(self, block: int, experts: Collection[int], spared: Collection[int] | None = None) -> None:
        """A passage, which is more than there are slots, leaves what is there. ``spared`` is what no wish would have
        evicted, where there was a guess."""
        resident, slots = self._resident[block], self._slots[block]
        if len(experts) > slots:
            return
        missing = sum(expert not in resident for expert in experts)
        self._demands += 1
        self._lacking += missing > 0
        if spared is not None:
            self._guessed += missing
            if len(resident) == slots:
                self._last += next((expert for expert in resident if expert not in spared), None) in experts
        self.misses += missing
        for expert in experts:
            resident.pop(expert, None)
            resident[expert] = None
        while len(resident) > slots:
            del resident[next(iter(resident))]
