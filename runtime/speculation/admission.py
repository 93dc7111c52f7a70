"""Admission of predictions: which of the predicted experts are prefetched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from moetier.tiers.layout import ExpertKey
from moetier.tiers.source import ExpertSource

from .predictor import Prediction


class Admission:
    """Prefetch the predicted experts that ``source`` lacks.

    A request also names the predicted experts, and the runners-up, that are resident: a requested record is not
    evicted for a prefetch, and a wrong prediction is mostly wrong by a little.
    """

    def __init__(self, source: ExpertSource[Any], experts: Sequence[int], *, most: int | None = None) -> None:
        """``experts``: number of experts of each block. At most ``most`` of a block are read for one request."""
        self._source = source
        self._most = most
        self._keys = [[ExpertKey(block, expert) for expert in range(count)] for block, count in enumerate(experts)]
        self._requested: set[int] = set()  # blocks whose demand has not come since

    def admit(self, block: int, prediction: Prediction) -> list[int]:
        """Prefetch for a block. Return the predicted experts, as often as tokens want them."""
        keys = self._keys[block]
        likely = [expert for expert in prediction.likely if expert < len(keys)]  # larger indices have no record
        near = [expert for expert in prediction.near if expert < len(keys)]
        absent = self._absent(keys, likely)
        if absent or block in self._requested:
            absent |= self._absent(keys, near)
            resident = [keys[expert] for expert in dict.fromkeys([*near, *likely]) if expert not in absent]
            missing = [keys[expert] for expert in dict.fromkeys(likely) if expert in absent]
            self._source.prefetch(block, [*resident, *missing[: self._most]])
            self._requested.add(block)
        return likely

    def _absent(self, keys: Sequence[ExpertKey], experts: Iterable[int]) -> set[int]:
        return {key.expert for key in self._source.absent([keys[expert] for expert in experts])}

    def is_requested(self, block: int) -> bool:
        """Whether a prefetch was requested for the block since its last demand."""
        return block in self._requested

    def demanded(self, block: int) -> None:
        """The tier has dropped the block's requests, because its demand came."""
        self._requested.discard(block)

    def reset(self) -> None:
        """Forget all requests: the demands of their blocks may not come."""
        self._requested.clear()
