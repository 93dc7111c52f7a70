"""What a workload lacks by itself, whatever is guessed: about what a tier of as many slots would miss. Pure.

Steps take as long as reads take, and how many a step needs is chance. To know it tells how much longer a step took
because it guessed from how much longer it took because it needed more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice

from moetier.tiers.cache.orders import DEFAULT_ORDER, ORDERS
from moetier.tiers.layout import ExpertKey


class Shadow:
    """Of every block's slots."""

    def __init__(self, slots: Sequence[int], policy: str = DEFAULT_ORDER) -> None:
        """``slots`` by block; ``policy`` is one of ``ORDERS``: the tier's, which of a daemon's is not known."""
        self.misses = 0
        self._slots = slots
        self._make_order = ORDERS[policy]
        self._orders = [self._make_order(count) for count in slots]
        self._resident: list[dict[int, ExpertKey]] = [{} for _ in slots]  # by block: each expert's key

    def demand(self, block: int, experts: Collection[int]) -> None:
        """What is given first is evicted last. A passage, which is more than there are slots, leaves what is there."""
        if len(self._resident[block]) != len(self._orders[block]):  # an exception from outside has cut it
            self._resident[block], self._orders[block] = {}, self._make_order(self._slots[block])
        resident, order, slots = self._resident[block], self._orders[block], self._slots[block]
        if len(experts) > slots:
            return
        missing = [expert for expert in experts if expert not in resident]
        excess = len(resident) + len(missing) - slots
        self.misses += len(missing)
        victims = [key.expert for key in order.victims(passing=False)] if excess > 0 else []
        others = (expert for expert in victims if expert not in experts)
        for expert in islice(others, max(excess, 0)):
            order.remove(resident.pop(expert))
        for expert in missing:
            resident[expert] = ExpertKey(block, expert)
            order.add(resident[expert], passing=False)
        for expert in reversed([*experts]):
            order.touch(resident[expert], passing=False)
