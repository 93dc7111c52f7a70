"""What a workload lacks by itself, whatever is guessed: about what a tier of as many slots would miss. Pure.

Steps take as long as reads take, and how many a step needs is chance. To know it tells how much longer a step took
because it guessed from how much longer it took because it needed more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice
from random import Random

from moetier.tiers.cache.orders import DEFAULT_ORDER, ORDERS
from moetier.tiers.layout import ExpertKey

SAMPLED = 0.3  # of the guesses: those by which it is known what is regretted


class Shadow:
    """Of every block's slots."""

    def __init__(self, slots: Sequence[int], policy: str = DEFAULT_ORDER, *, sampled: float = SAMPLED) -> None:
        """``slots`` by block; ``policy`` is one of ``ORDERS``: the tier's, which of a daemon's is not known."""
        self._sampled = sampled
        self._chance = Random(0)
        self.misses = 0
        self._demands = 0
        self._lacking = 0  # of the demands: those that missed anything
        self._guessed = 0  # misses of what was guessed before, as far as it is looked at
        self._last = 0  # of these demands: those that hit what a wish would have evicted next
        self._slots = slots
        self._make_order = ORDERS[policy]
        self._orders = [self._make_order(count) for count in slots]
        self._resident: list[dict[int, ExpertKey]] = [{} for _ in slots]  # by block: each expert's key

    @property
    def lacks(self) -> float:
        """The share of demands that miss anything."""
        return self._lacking / self._demands if self._demands else 1.0

    @property
    def regrets(self) -> float:
        """How often a record is used again that is evicted one miss too early."""
        return min(self._last / self._guessed, 1.0) if self._guessed else 0.0

    def demand(self, block: int, experts: Collection[int], spared: Collection[int] | None = None) -> None:
        """What is given first is evicted last. A passage, which is more than there are slots, leaves what is there.
        ``spared`` is what no wish would have evicted, where there was a guess."""
        if len(self._resident[block]) != len(self._orders[block]):  # an exception from outside has cut it
            self._resident[block], self._orders[block] = {}, self._make_order(self._slots[block])
        resident, order, slots = self._resident[block], self._orders[block], self._slots[block]
        if len(experts) > slots:
            return
        missing = [expert for expert in experts if expert not in resident]
        excess = len(resident) + len(missing) - slots
        is_looked_at = spared is not None and self._chance.random() < self._sampled
        is_asked = is_looked_at and len(resident) == slots
        victims = [key.expert for key in order.victims(passing=False)] if is_asked or excess > 0 else []
        self._demands += 1
        self._lacking += bool(missing)
        if spared is not None and is_looked_at:
            self._guessed += len(missing)
            if is_asked:
                self._last += next((expert for expert in victims if expert not in spared), None) in experts
        self.misses += len(missing)
        others = (expert for expert in victims if expert not in experts)
        for expert in islice(others, max(excess, 0)):
            order.remove(resident.pop(expert))
        for expert in missing:
            resident[expert] = ExpertKey(block, expert)
            order.add(resident[expert], passing=False)
        for expert in reversed([*experts]):
            order.touch(resident[expert], passing=False)
